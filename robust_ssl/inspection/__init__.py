"""Whether a deployed classifier still is what was approved: light, periodic, comparable.

`baseline` keeps what it was: a lock, images with its answers, perturbations, figures.  `inspect`
compares it with now, in minutes on a CPU, and `record` writes that down beside the ones before.
"""

from robust_ssl.inspection.baselines import (
    Baseline,
    baseline,
    in_order_of_logits,
    read_baseline,
)
from robust_ssl.inspection.drift import energy_test
from robust_ssl.inspection.findings import NAMES
from robust_ssl.inspection.inspecting import Inspection, inspect
from robust_ssl.inspection.record import as_junit, read_history, record

__all__ = [
    "NAMES",
    "Baseline",
    "Inspection",
    "as_junit",
    "baseline",
    "energy_test",
    "in_order_of_logits",
    "inspect",
    "read_baseline",
    "read_history",
    "record",
]
