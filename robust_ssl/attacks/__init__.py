"""Attacks: frozen values called as ``attack(key, model, image, label)``, and how to fit them."""

from robust_ssl.attacks.generative import AdvEncoderPER
from robust_ssl.attacks.per_image import FGSM, PGD, EmbedAttack, attack_batch
from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.attacks.universal import (
    FittedUniversal,
    RandomNoise,
    UniversalAttack,
    UniversalPGD,
    fit,
    members,
)

__all__ = [
    "FGSM",
    "PGD",
    "AdvEncoderPER",
    "EmbedAttack",
    "FittedUniversal",
    "RandomNoise",
    "UniversalAttack",
    "UniversalPGD",
    "UniversalPerturbation",
    "attack_batch",
    "fit",
    "members",
]
