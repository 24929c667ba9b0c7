"""The story of a run: pretrain, attack, finetune, sensitivity, evaluate."""
