"""Whether an attack succeeds, and how sure one can be: exact counts with intervals."""

from robust_ssl.evaluation.counts import Counts, PerImage, wilson_interval, worst_case
from robust_ssl.evaluation.metrics import (
    WORST,
    accuracy_against_epsilon,
    per_layer_stability,
    predictions,
    quantise,
    score,
    to_pixels,
)

__all__ = [
    "WORST",
    "Counts",
    "PerImage",
    "accuracy_against_epsilon",
    "per_layer_stability",
    "predictions",
    "quantise",
    "score",
    "to_pixels",
    "wilson_interval",
    "worst_case",
]
