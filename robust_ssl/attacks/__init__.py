"""Attacks: frozen values called as ``attack(key, model, image, label)``, and how to fit them."""

from robust_ssl.attacks import autoattack
from robust_ssl.attacks.accumulated import UAP, cluster_change_rate
from robust_ssl.attacks.apgd import APGD
from robust_ssl.attacks.drift import DriftPGD
from robust_ssl.attacks.fab import FABT
from robust_ssl.attacks.fit_batch import FitBatch
from robust_ssl.attacks.generative import AdvEncoderPAT, AdvEncoderPER
from robust_ssl.attacks.layers import FFF, L4AUGS, SSP, STD, UAPPGD, L4ABase, L4AFuse
from robust_ssl.attacks.noisy import NFGSM
from robust_ssl.attacks.per_image import FGSM, PGD, EmbedAttack, attack_batch
from robust_ssl.attacks.perturbation import UniversalPerturbation, random_delta
from robust_ssl.attacks.square import Square
from robust_ssl.attacks.targeted import TDAA, towards_target
from robust_ssl.attacks.universal import (
    FittedUniversal,
    RandomNoise,
    UniversalAttack,
    UniversalPGD,
    fit,
    members,
)

__all__ = [
    "APGD",
    "FABT",
    "FFF",
    "FGSM",
    "L4AUGS",
    "NFGSM",
    "PGD",
    "SSP",
    "STD",
    "TDAA",
    "UAP",
    "UAPPGD",
    "AdvEncoderPAT",
    "AdvEncoderPER",
    "DriftPGD",
    "EmbedAttack",
    "FitBatch",
    "FittedUniversal",
    "L4ABase",
    "L4AFuse",
    "RandomNoise",
    "Square",
    "UniversalAttack",
    "UniversalPGD",
    "UniversalPerturbation",
    "attack_batch",
    "autoattack",
    "cluster_change_rate",
    "fit",
    "members",
    "random_delta",
    "towards_target",
]
