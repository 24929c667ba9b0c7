"""Secure fine-tuning: the step, learning rates by layer, layer sensitivity, interpolation."""

from robust_ssl.finetuning.adversaries import COLLECTION, Adversary, FreeReplays, UniversalPool
from robust_ssl.finetuning.anchoring import pull_to_start
from robust_ssl.finetuning.cost import Cost, measure, planned_bytes, relative
from robust_ssl.finetuning.interpolation import CurvePoint, Guarded, guard, interpolate
from robust_ssl.finetuning.layerwise import (
    FREEZE,
    LayerRow,
    adam_l2,
    frozen_paths,
    label_paths,
    layer_rates,
    layer_table,
    layerwise_optimizer,
    render_table,
)
from robust_ssl.finetuning.overfitting import overfitting_epoch, overfitting_warning
from robust_ssl.finetuning.pruning import hold_zeros, prune, render_sparsity, sparsity
from robust_ssl.finetuning.sensitivity import (
    kernels,
    layer_sensitivity,
    rates_for,
    select_redundant,
)
from robust_ssl.finetuning.step import Step, init_state, make_step, mixed_losses

__all__ = [
    "COLLECTION",
    "FREEZE",
    "Adversary",
    "Cost",
    "CurvePoint",
    "FreeReplays",
    "Guarded",
    "LayerRow",
    "Step",
    "UniversalPool",
    "adam_l2",
    "frozen_paths",
    "guard",
    "hold_zeros",
    "init_state",
    "interpolate",
    "kernels",
    "label_paths",
    "layer_rates",
    "layer_sensitivity",
    "layer_table",
    "layerwise_optimizer",
    "make_step",
    "measure",
    "mixed_losses",
    "overfitting_epoch",
    "overfitting_warning",
    "planned_bytes",
    "prune",
    "pull_to_start",
    "rates_for",
    "relative",
    "render_sparsity",
    "render_table",
    "select_redundant",
    "sparsity",
]
