"""Adversarial robustness of pre-trained encoders: attack, secure fine-tuning, evidence.

A public encoder goes in, a secured classifier and the proof come out:
``robust_ssl.stages.run(config, workdir)``, or ``robust-ssl run`` on the command line.
"""

from robust_ssl.conformance import check_attack, check_loss
from robust_ssl.types import AttackInputs, Classifier, Encoder, LossInputs, Outputs, TrainState
from robust_ssl.weights import encoder_card, list_encoders, load_encoder, save_encoder

__version__ = "0.1.0"

__all__ = [
    "AttackInputs",
    "Classifier",
    "Encoder",
    "LossInputs",
    "Outputs",
    "TrainState",
    "check_attack",
    "check_loss",
    "encoder_card",
    "list_encoders",
    "load_encoder",
    "save_encoder",
]
