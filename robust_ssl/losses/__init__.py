"""What training minimizes: functions of `LossInputs` that return one value per image.

A loss is never reduced: the step takes the mean, knows the weight and logs the name.  A loss sees
the global batch, so one that compares images with each other does not depend on how many devices
there are.
"""

from robust_ssl.losses.adversarial import (
    adversarial_cross_entropy,
    boosted_cross_entropy,
    clean_cross_entropy,
    feature_drift,
    feature_preservation,
    genetic_regularization,
    misclassification_kl,
    trades_kl,
)
from robust_ssl.losses.distillation import teacher_distance, teacher_kl

__all__ = [
    "adversarial_cross_entropy",
    "boosted_cross_entropy",
    "clean_cross_entropy",
    "feature_drift",
    "feature_preservation",
    "genetic_regularization",
    "misclassification_kl",
    "teacher_distance",
    "teacher_kl",
    "trades_kl",
]
