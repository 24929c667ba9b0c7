"""How weights move: learning rates by layer, L2-SP, held zeros, LARS, and updates left out."""

from robust_ssl.optimizers.anchoring import pull_to_start
from robust_ssl.optimizers.blocks import last_blocks
from robust_ssl.optimizers.finetuning import fine_tuning_optimizer
from robust_ssl.optimizers.finite import no_skips, raise_if_stuck, take_if_finite
from robust_ssl.optimizers.layerwise import (
    COSINE,
    FREEZE,
    Rate,
    adam_l2,
    frozen_paths,
    keep_frozen,
    layer_rates,
    layerwise_optimizer,
    match_paths,
    stop_frozen,
)
from robust_ssl.optimizers.pretraining import lars, pretraining_optimizer
from robust_ssl.optimizers.pruning import hold_zeros, prune
from robust_ssl.optimizers.table import LayerRow, layer_table, render_table

__all__ = [
    "COSINE",
    "FREEZE",
    "LayerRow",
    "Rate",
    "adam_l2",
    "fine_tuning_optimizer",
    "frozen_paths",
    "hold_zeros",
    "keep_frozen",
    "lars",
    "last_blocks",
    "layer_rates",
    "layer_table",
    "layerwise_optimizer",
    "match_paths",
    "no_skips",
    "pretraining_optimizer",
    "prune",
    "pull_to_start",
    "raise_if_stuck",
    "render_table",
    "stop_frozen",
    "take_if_finite",
]
