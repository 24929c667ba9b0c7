"""Self-supervised pre-training: a method is a value with `init`, `views` and `loss`."""

from robust_ssl.pretraining.augmentation import flip_and_shift, shift_only, simclr_view
from robust_ssl.pretraining.monitor import (
    effective_rank,
    feature_std,
    knn_accuracy,
    linear_accuracy,
)
from robust_ssl.pretraining.simclr import SimCLR, nt_xent
from robust_ssl.pretraining.step import Method, init_state, make_step, trained_encoder

__all__ = [
    "Method",
    "SimCLR",
    "effective_rank",
    "feature_std",
    "flip_and_shift",
    "init_state",
    "knn_accuracy",
    "linear_accuracy",
    "make_step",
    "nt_xent",
    "shift_only",
    "simclr_view",
    "trained_encoder",
]
