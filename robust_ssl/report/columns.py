"""The columns of a comparison: what a method has, what it costs, and how they are shown."""

from __future__ import annotations

from typing import NamedTuple

from robust_ssl.report.tables import SOURCES


class Column(NamedTuple):
    """How a figure is shown.

    Attributes:
      heading: Of the table.
      scale: What the value is multiplied by.
      decimals: Digits after the point.
      unit: Written behind the number.
      meaning: A line of the legend.
    """

    heading: str
    scale: float
    decimals: int
    unit: str
    meaning: str


SHARES = {
    "clean": Column("clean", 100, 1, " %", "accuracy when nobody attacks"),
    "robust_public": Column(
        "robust, public",
        100,
        1,
        " %",
        f"accuracy in the worst case per image over the attacks {SOURCES['public']}",
    ),
    "robust_hardened": Column(
        "robust, hardened",
        100,
        1,
        " %",
        f"accuracy in the worst case per image over the attacks {SOURCES['hardened']}",
    ),
    "robust_worst": Column(
        "robust, both",
        100,
        1,
        " %",
        "accuracy in the worst case per image over the attacks of both suites",
    ),
    "autoattack": Column("AutoAttack", 100, 1, " %", "accuracy under AutoAttack"),
}
COSTS = {
    "cost_factor": Column(
        "cost",
        1,
        2,
        "x",
        "time of the training steps, of all that a method starts from too, relative to usual "
        "fine-tuning of all layers; steps of all methods timed in turn; choosing layers counts by "
        "its gradients, at what one in that reference's step takes; validation and the "
        "interpolation guard do not count",
    ),
    "gradients": Column(
        "grads",
        1,
        1,
        "",
        "gradient evaluations per training image, of all that a method starts from and of choosing "
        "layers too, over the epochs of that reference",
    ),
    "gradients_per_epoch": Column(
        "grads/epoch",
        1,
        1,
        "",
        "gradient evaluations per training image in one epoch of the method's own training",
    ),
    "seconds_per_image": Column(
        "ms/image",
        1000,
        2,
        "",
        "milliseconds per training image in one epoch of the method's own training",
    ),
    "training_seconds": Column(
        "training", 1, 1, " s", "seconds from start to end, with compiling and validation"
    ),
    "peak_bytes": Column(
        "memory", 2**-20, 0, " MiB", "memory that the compiled step plans on one device"
    ),
}
COLUMNS = SHARES | COSTS
FIELDS = (
    *("method", "seed", "verdict", *SHARES, "images", "autoattack_images"),
    *COSTS,
)
OPTIONAL = (
    *("autoattack", "autoattack_images", "cost_factor"),
    *("gradients_per_epoch", "seconds_per_image", "peak_bytes"),
)
