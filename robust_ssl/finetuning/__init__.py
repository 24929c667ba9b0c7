"""Secure fine-tuning: the step, learning rates by layer, layer sensitivity, interpolation."""

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
from robust_ssl.finetuning.sensitivity import layer_sensitivity, rates_for, select_redundant
from robust_ssl.finetuning.step import init_state, make_step, mixed_losses

__all__ = [
    "FREEZE",
    "CurvePoint",
    "Guarded",
    "LayerRow",
    "adam_l2",
    "frozen_paths",
    "guard",
    "init_state",
    "interpolate",
    "label_paths",
    "layer_rates",
    "layer_sensitivity",
    "layer_table",
    "layerwise_optimizer",
    "make_step",
    "mixed_losses",
    "rates_for",
    "render_table",
    "select_redundant",
]
