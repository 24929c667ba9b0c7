"""Self-supervised pre-training: a method is a value with `init`, `views` and `loss`."""

from robust_ssl.pretraining.augmentation import (
    View,
    crop_and_flip,
    flip_and_shift,
    random_views,
    shift_only,
)
from robust_ssl.pretraining.clustering import DeepClusterV2, SwAV
from robust_ssl.pretraining.contrastive import NNCLR, SupCon
from robust_ssl.pretraining.decorrelation import WMSE, BarlowTwins, VIbCReg, VICReg
from robust_ssl.pretraining.distillation import DINO
from robust_ssl.pretraining.method import MLP, Method, MethodUpdate, PretrainInputs
from robust_ssl.pretraining.momentum import MoCoV2Plus, MoCoV3, ReSSL
from robust_ssl.pretraining.monitor import (
    effective_rank,
    feature_std,
    knn_accuracy,
    linear_accuracy,
)
from robust_ssl.pretraining.siamese import BYOL, SimSiam
from robust_ssl.pretraining.simclr import SimCLR, nt_xent
from robust_ssl.pretraining.step import init_state, make_step, trained_encoder

__all__ = [
    "BYOL",
    "DINO",
    "MLP",
    "NNCLR",
    "WMSE",
    "BarlowTwins",
    "DeepClusterV2",
    "Method",
    "MethodUpdate",
    "MoCoV2Plus",
    "MoCoV3",
    "PretrainInputs",
    "ReSSL",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "SwAV",
    "VICReg",
    "VIbCReg",
    "View",
    "crop_and_flip",
    "effective_rank",
    "feature_std",
    "flip_and_shift",
    "init_state",
    "knn_accuracy",
    "linear_accuracy",
    "make_step",
    "nt_xent",
    "random_views",
    "shift_only",
    "trained_encoder",
]
