"""What to take if little clean accuracy and little time may be given, in a plain sentence."""

from __future__ import annotations

from collections.abc import Iterable

from robust_ssl.evaluation import wilson_interval
from robust_ssl.report.pareto import Point, checked_points
from robust_ssl.report.tables import method_name


def advice(
    points: Iterable[Point], *, usual: str, max_clean_loss: float = 0.02, max_cost: float = 2.0
) -> str:
    """Says what to take if little clean accuracy and little time may be given.

    Args:
      points: All that there is to choose from, `usual` among them.
      usual: Name of the point that loss and gain are counted from.
      max_clean_loss: Clean accuracy that may be lost, a share.
      max_cost: Training time that may be taken, as a point's `cost`.

    Returns:
      One sentence: the most robust point within both limits, or that none in them is more robust
      than `usual`, and what the most robust of all would take.  What is not trusted is not taken,
      and where `usual` is not, another sentence says that no gain is counted from it.  Another
      one says where the gain may be chance on so many images.

    Raises:
      ValueError: As `front`, or if there is no point `usual`.

    Example:
      >>> points = [Point("plain", 0.9, 0.1, 1.0), Point("secure", 0.89, 0.5, 1.5)]
      >>> print(advice(points, usual="plain"))
      For at most 2 points of clean accuracy and 2x the training time of usual fine-tuning of all
      layers, take secure: 50.0 % robust (40.0 points more than plain), clean 89.0 % (1.0 points
      less than plain), cost 1.5x.
    """
    points = checked_points(points)
    base = next((point for point in points if point.name == usual), None)
    if base is None:
        names = ", ".join(point.name for point in points)
        raise ValueError(f"no point is called {usual!r}, which others are held against: {names}")
    limits = (
        f"For at most {100 * max_clean_loss:g} points of clean accuracy and {max_cost:g}x the "
        "training time of usual fine-tuning of all layers, "
    )
    called, held, mark = method_name(usual), "is trusted", ""
    if base.trusted:
        held = f"is more robust than {called} ({_percent(base.robust)} %)"
    else:
        mark = f" {called} is NOT TRUSTED under attack: only its clean accuracy is used."
    least = base.robust if base.trusted else -1.0
    better = [point for point in points if point.trusted and point.robust > least]
    if not better:
        return f"{limits}no point helps: none {held}.{mark}"
    slack = 1e-9  # 0.9 - 0.88 is a little more than 0.02
    within = [
        point
        for point in better
        if base.clean - point.clean <= max_clean_loss + slack and point.cost <= max_cost + slack
    ]
    chosen = max(within or better, key=lambda p: (p.robust, p.clean, -p.cost))
    chance = " On so few images that gain may be chance." * _may_be_chance(chosen, base)
    taken = f"{method_name(chosen.name)}: {_told(chosen, base)}.{chance}{mark}"
    if within:
        return f"{limits}take {taken}"
    return f"{limits}no point {held}; the most robust at any price is {taken}"


def _may_be_chance(point: Point, base: Point) -> bool:
    """Whether what is known of both robust accuracies overlaps, where it is counted from one."""
    if not (point.images and base.images and base.trusted):
        return False
    low, _ = wilson_interval(round(point.robust * point.images), point.images)
    _, high = wilson_interval(round(base.robust * base.images), base.images)
    return low <= high


def _told(point: Point, base: Point) -> str:
    called = method_name(base.name)
    gain = _percent(point.robust) - _percent(base.robust)
    more = f" ({gain:.1f} points more than {called})" if base.trusted else ""
    lost = _percent(base.clean) - _percent(point.clean)
    return (
        f"{_percent(point.robust)} % robust{more}, clean {_percent(point.clean)} % "
        f"({abs(lost):.1f} points {'less' if lost > 0 else 'more'} than {called}), cost "
        f"{point.cost:.1f}x"
    )


def _percent(share: float) -> float:
    return round(100 * share, 1)  # as it is shown, so that differences agree with the text
