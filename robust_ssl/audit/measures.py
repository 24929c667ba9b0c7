"""What the figures of an audit can be: the unit of each, the least and the greatest value.

A limit outside of these is kept by every figure or by none, whatever unit somebody typed for it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

UNITS = ("share", "points", "factor", "count", "money", "word")


class Measure(NamedTuple):
    """What is known of a figure before anything is measured.

    Attributes:
      unit: One of `UNITS`.
      low: The least that it can be.
      high: The greatest.
    """

    unit: str
    low: float = -math.inf
    high: float = math.inf


_OF_UNIT = {
    "share": Measure("share", 0, 1),
    "points": Measure("points", -1, 1),
    "factor": Measure("factor", 0),
    "count": Measure("count", 0),
}
# Figures with Wilson's interval, whose ends are never 1 below and never 0 above.
_ESTIMATED = (
    r"/measured/(clean/(usual|secured)|data/largest_class|attacked/\w+/\w+"
    r"|rows/\d+/(accuracy|success)|curve/\w+/\d+/accuracy|screening/rows/\d+/tpr_\d+)"
)
_END = r"(/(value|low|high))?"
_KNOWN = {
    _ESTIMATED + _END: _OF_UNIT["share"],
    r"/measured/(trade_off/\d+/(clean|robust)|bands/\d+/share)": _OF_UNIT["share"],
    r"/measured/screening/rows/\d+/auc": _OF_UNIT["share"],
    r"/decided/risk/(probability_worth_it|break_even_share)": _OF_UNIT["share"],
    r"/measured/clean/loss" + _END: _OF_UNIT["points"],
    r"/measured/data/test(_distinct)?": Measure("count", 1),  # without one nothing is measured
    r"/measured/data/(train|validation|classes|test_among_train|surrogate_images)": (
        _OF_UNIT["count"]
    ),
    r"/measured/(trust/\w+/images|.+/n)": _OF_UNIT["count"],
    r"/measured/provenance/(passed|failed|absent)": Measure("count", 0, 10),  # of ten checks
    r"/decided/risk/loss_(before|after)/p\d+": Measure("money", 0),
    r"/decided/risk/(gain|investment|running|cost|net)/p\d+": Measure("money"),
    r"/decided/risk/net_likely": Measure("money"),
}


def measure_at(pointer: str, unit: str | None = None) -> Measure:
    """Returns what the figure at a JSON pointer can be.

    Args:
      pointer: For example ``"/measured/clean/secured"``.
      unit: What somebody calls a figure that is not known here; None is a factor.

    Example:
      >>> measure_at("/measured/clean/secured", "factor")
      Measure(unit='share', low=0, high=1)
      >>> measure_at("/measured/cost/factor")
      Measure(unit='factor', low=0, high=inf)
    """
    for pattern, measure in _KNOWN.items():
        if re.fullmatch(pattern, pointer):
            return measure
    unit = unit or "factor"
    return _OF_UNIT.get(unit, Measure(unit))


def is_estimated(pointer: str, end: str) -> bool:
    """Whether the end of Wilson's interval is compared, ``"low"`` or ``"high"``.

    Example:
      >>> is_estimated("/measured/clean/usual", "low")
      True
      >>> is_estimated("/measured/clean/usual/value", "low")
      False
    """
    return re.fullmatch(_ESTIMATED, pointer.removesuffix(f"/{end}")) is not None
