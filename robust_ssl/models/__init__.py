"""Networks: builders that return an `Encoder`, and heads that make a `Classifier` of it."""

from robust_ssl.models.clip_resnet import CLIPResNet, clip_resnet
from robust_ssl.models.convnext import ConvNeXt, convnext
from robust_ssl.models.ensembles import confidence_ensemble, ensemble_members
from robust_ssl.models.heads import LinearHead, MLPHead, classifier, in_order_of
from robust_ssl.models.positions import RESIZINGS, resize_positions
from robust_ssl.models.preprocessing import JPEG, Quantize, Smooth
from robust_ssl.models.resnet import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from robust_ssl.models.swin import Swin, swin_transformer
from robust_ssl.models.vit import ViT, vision_transformer, vit_base, vit_small, vit_tiny

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "JPEG",
    "RESIZINGS",
    "CLIPResNet",
    "ConvNeXt",
    "LinearHead",
    "MLPHead",
    "Quantize",
    "ResNet",
    "Smooth",
    "Swin",
    "ViT",
    "classifier",
    "clip_resnet",
    "confidence_ensemble",
    "convnext",
    "ensemble_members",
    "in_order_of",
    "resize_positions",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "swin_transformer",
    "vision_transformer",
    "vit_base",
    "vit_small",
    "vit_tiny",
]
