"""Secure fine-tuning: the step, adversaries in its state, layer sensitivity, interpolation."""

from robust_ssl.finetuning.adversaries import (
    ATTA,
    COLLECTION,
    Adversary,
    FreeReplays,
    UniversalPool,
    by_image,
    check_inner,
)
from robust_ssl.finetuning.averaging import AVERAGE, served
from robust_ssl.finetuning.budget import BudgetSchedule, has_budget, scaled
from robust_ssl.finetuning.cost import Cost, measure, planned_bytes
from robust_ssl.finetuning.interpolation import CurvePoint, Guarded, guard, interpolate
from robust_ssl.finetuning.lora import ADAPTERS, adapters, merged
from robust_ssl.finetuning.mixture import mixed_losses
from robust_ssl.finetuning.overfitting import overfitting_epoch, overfitting_warning
from robust_ssl.finetuning.sensitivity import (
    kernels,
    layer_sensitivity,
    rates_for,
    select_redundant,
)
from robust_ssl.finetuning.step import Computation, Step, init_state, make_step

__all__ = [
    "ADAPTERS",
    "ATTA",
    "AVERAGE",
    "COLLECTION",
    "Adversary",
    "BudgetSchedule",
    "Computation",
    "Cost",
    "CurvePoint",
    "FreeReplays",
    "Guarded",
    "Step",
    "UniversalPool",
    "adapters",
    "by_image",
    "check_inner",
    "guard",
    "has_budget",
    "init_state",
    "interpolate",
    "kernels",
    "layer_sensitivity",
    "make_step",
    "measure",
    "merged",
    "mixed_losses",
    "overfitting_epoch",
    "overfitting_warning",
    "planned_bytes",
    "rates_for",
    "scaled",
    "select_redundant",
    "served",
]
