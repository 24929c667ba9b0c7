"""The main job on handwritten digits: offline, no accelerator.

    robust-ssl run --config=configs/quickstart.py --workdir=runs/quickstart

The shipped encoder (SimCLR on CIFAR-10) is attacked with crops of two photographs, fine-tuned for
digits in the usual way and securely, and everything is scored on 360 test images.  Digits are
nearly black and white, so the budget is larger than the 10/255 that photographs get.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Takes no arguments."""
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "usual", "stage1", "sensitivity", "stage2", "evaluate")

    # What a foreign file does not say is named beside its path; None is what it does say.
    of_a_foreign_file = (
        *("normalization", "mean", "std", "image_size", "layout", "under", "reader"),
        *("stem", "stem_padding", "heads", "pooling", "activation"),
    )
    config.encoder = {"path": "simclr-cifar10-r18w24", **dict.fromkeys(of_a_foreign_file)}
    config.surrogate = {"source": "robust_ssl.data:photo_crops", "n": 2000}
    config.downstream = {"source": "robust_ssl.data:digits", "validation": 0.1}
    config.downstream_head = "mlp"

    config.attack = {
        "methods": {
            "advencoder": {
                "function": "robust_ssl.attacks:AdvEncoderPER",
                "form": "released",
                "width": 16,
                "learning_rate": 1e-3,
            },
            "universal_pgd": {"function": "robust_ssl.attacks:UniversalPGD"},
            "random_noise": {"function": "robust_ssl.attacks:RandomNoise"},
        },
        "epsilon": 24 / 255,
        "curve": (6 / 255, 12 / 255, 18 / 255),
        "seeds": (0,),
        "num_steps": 100,
        "batch_size": 64,
    }

    # Usual fine-tuning: the public encoder as it is, a head trained on clean images.
    config.usual = {
        "rates": {"encoder/**": "freeze", "head/**": 5e-3},
        "batch_statistics": "frozen",
        "batch_size": 64,
        "epochs": 10,
        "weight_decay": 8e-4,
        "decay": 0.96,
        "augment": "",
        "losses": {},
    }

    # Stage 1: both tracks, on adversarial images.
    config.finetune = {
        "rates": {"encoder/**": 1e-3, "head/**": 5e-3},
        "batch_statistics": "both",
        "batch_size": 64,
        "epochs": 8,
        "weight_decay": 8e-4,
        "decay": 0.96,
        "augment": "",
        "adv_ratio": 0.7,
        # Per image, whatever the batch; the released code's 20 adds up all pairs of a batch of
        # 256, which is 5120 here.
        "regularization_weight": 20.0,
        "regularize": "logits",
        "compat": "corrected",
        "compare_with_pretrained": False,
        "attack": {
            "epsilon": 24 / 255,
            "step_size": 6 / 255,
            "num_steps": 7,
            "random_start": True,
        },
        "losses": {},  # her own: {"name": ("module:function", weight)}
    }

    config.sensitivity = {
        "images": 128,
        "num_steps": 3,
        "learning_rate": 1.0,
        "radius": 0.1,
        "top_k": None,
        "top_k_fraction": 0.2,
    }

    # Stage 2: only the robust-redundant layers, on clean images.
    config.stage2 = {
        "learning_rate": 1e-3,
        "batch_statistics": "frozen",
        "batch_size": 64,
        "epochs": 5,
        "weight_decay": 8e-4,
        "decay": 0.96,
        "augment": "",
        "tolerance": 0.02,
        "losses": {},
    }

    config.evaluate = {
        "models": ("usual", "stage1", "stage2"),
        "batch_size": 180,
        "per_image": {
            "attacks": ("embed", "pgd"),
            "epsilon": 8 / 255,
            "step_size": 2 / 255,
            "num_steps": 10,
        },
    }
    return config
