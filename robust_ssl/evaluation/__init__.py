"""Whether an attack succeeds, and how sure one can be: exact counts with intervals."""

from robust_ssl.evaluation import analysis, checks
from robust_ssl.evaluation.analysis import per_layer_stability
from robust_ssl.evaluation.counts import (
    Counts,
    PerImage,
    balanced_accuracy,
    difference,
    largest_excess,
    wilson_interval,
    worst_case,
)
from robust_ssl.evaluation.in_turn import clean_correct, gathered, score_in_turn, strike
from robust_ssl.evaluation.metrics import (
    WORST,
    predictions,
    quantize,
    score,
    to_pixels,
)

__all__ = [
    "WORST",
    "Counts",
    "PerImage",
    "analysis",
    "balanced_accuracy",
    "checks",
    "clean_correct",
    "difference",
    "gathered",
    "largest_excess",
    "per_layer_stability",
    "predictions",
    "quantize",
    "score",
    "score_in_turn",
    "strike",
    "to_pixels",
    "wilson_interval",
    "worst_case",
]
