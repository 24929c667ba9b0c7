"""What robustness costs in clean accuracy and in time: the front, its area, the picture."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE
from robust_ssl.report.comparison import Summary
from robust_ssl.report.figures import QUIET, STYLES, Folder, new_figure, save_figure
from robust_ssl.report.style import styled
from robust_ssl.report.tables import MARK, label

FRONT = STYLES["gen_af"]["color"]
INK = "#303030"
MOST_NAMES = 30  # with more points only those of the front are named
MOST_LABELS = 12  # with more, names stand in a list, and marks have numbers
LARGEST = 520.0  # area of the mark of the highest cost, square points
PER_COST = 45.0  # area of a mark for each unit of cost, square points, where that is less
GAPS = (1.5, 5.0, 9.0)  # from a mark to its label, points; further off nobody sees whose it is


class Point(NamedTuple):
    """A recipe in the trade-off.

    Attributes:
      name: What it is called.
      clean: Clean accuracy, a share in [0, 1].
      robust: Robust accuracy, the same.
      cost: Training time, relative to the reference; above 0.
      believable: Whether its figures under attack are; else it has no part in front, area, advice.
      images: On how many images the accuracies were measured; 0 is not known.
    """

    name: str
    clean: float
    robust: float
    cost: float
    believable: bool = True
    images: int = 0


def front(points: Iterable[Point]) -> list[Point]:
    """Returns the points that no other beats: those with the best of one share given the other.

    Of points that are equal in both shares the cheapest stands for all.

    They come by rising clean accuracy, so robust accuracy falls strictly.

    Raises:
      ValueError: If a share is not in [0, 1], a cost not finite and above 0, or a name given twice.

    Example:
      >>> a, b, c = Point("a", 0.9, 0.1, 1), Point("b", 0.8, 0.5, 2), Point("c", 0.7, 0.4, 1)
      >>> [point.name for point in front([a, b, c])]
      ['b', 'a']
    """
    best: list[Point] = []
    most = -1.0
    believable = [point for point in checked_points(points) if point.believable]
    for point in sorted(believable, key=lambda p: (-p.clean, -p.robust, p.cost)):
        if point.robust > most:
            best.append(point)
            most = point.robust
    return best[::-1]


def checked_points(points: Iterable[Point]) -> list[Point]:
    """Returns the points as a list; raises ValueError if one is none, as `front` says."""
    points = list(points)
    for point in points:
        shares_fit = 0 <= point.clean <= 1 and 0 <= point.robust <= 1  # a NaN does not
        if not (shares_fit and math.isfinite(point.cost) and point.cost > 0):
            raise ValueError(
                f"{point} is no point: clean and robust are shares in [0, 1], cost is finite and "
                "above 0"
            )
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names given to several points: {twice}; each needs its own")
    return points


def area_under_front(points: Iterable[Point]) -> float:
    r"""Measures the whole trade-off in one number, the hypervolume with reference (0, 0).

    .. math:: \mathrm{area}\,\bigcup_i\, [0, \mathrm{clean}_i] \times [0, \mathrm{robust}_i]

    1 is perfect on both; 0 means that nothing is robust.  A dominated point adds nothing.

    Example:
      >>> area_under_front([Point("a", 1.0, 0.25, 1), Point("b", 0.5, 0.75, 1)])
      0.5

    References:
      Zitzler and Thiele, "Multiobjective Optimization Using Evolutionary Algorithms: A Comparative
      Case Study", PPSN 1998, the size of the space covered.
    """
    best = front(points)
    lefts = [0.0, *(point.clean for point in best)]
    return float(sum((p.clean - left) * p.robust for p, left in zip(best, lefts, strict=False)))


def points_of(summary: Summary) -> list[Point]:
    """Returns the points of a comparison: the recipes whose cost was measured."""
    return [
        Point(
            recipe,
            part["clean"].mean,
            part["robust_worst"].mean,
            part["cost_factor"].mean,
            part["verdict"] != NOT_BELIEVABLE,
            part["images"],
        )
        for recipe, part in summary.items()
        if part["cost_factor"].mean
    ]


@styled
def figure_pareto(
    directory: Folder, points, *, label_clean: str, label_robust: str, name: str = "pareto"
) -> pathlib.Path:
    """Draws clean against robust accuracy; the area of a mark is the cost, the steps the front.

    A point that is not believable is a ring, and says so.  Names stand beside their marks; where
    one finds no place, all stand in a list, by number.  With more than thirty points only those
    of the front are named; the CSV has all.

    The texts say what each accuracy is, without unit, for example ``"clean accuracy"``.

    Raises:
      ValueError: As `front`, or if there is no point.
    """
    points = checked_points(points)
    if not points:
        raise ValueError("there is no point to draw")
    title = f"area under the front: {area_under_front(points):.3f}"
    axes = {"xlabel": f"{label_clean} (%)", "ylabel": f"{label_robust} (%)"}
    figure = _draw(points, axes, title, listed=False) or _draw(points, axes, title, listed=True)
    best = front(points)
    numbers = [(*p._replace(believable=int(p.believable)), int(p in best)) for p in points]
    header = (*Point._fields, "on_front")
    return save_figure(figure, directory, name, header, numbers)


def _draw(points: Sequence[Point], axes, title: str, *, listed: bool):
    """Draws everything; None where names do not fit beside their marks and are not `listed`."""
    best = front(points)
    named = sorted(points if len(points) <= MOST_NAMES else best, key=lambda p: (p.clean, p.robust))
    if len(named) > MOST_LABELS and not listed:
        return None
    texts = [label(p.name) + ("" if p.believable else f" {MARK}") for p in named]
    inks = [{"color": FRONT, "weight": "bold"} if p in best else {"color": INK} for p in named]
    figure = new_figure(9.2 if listed else 7.2, 5.0)
    axis = figure.subplots()
    axis.set(**axes)
    axis.set_title(title, loc="left", fontsize=10)
    _limits(axis, points)
    _draw_front(axis, best)
    per_cost = min(PER_COST, LARGEST / max(point.cost for point in points))
    for point in sorted(points, key=lambda p: -p.cost):  # small marks lie on large ones
        color = FRONT if point in best else QUIET
        look = {"facecolor": color, "edgecolor": "white", "linewidth": 0.8}
        if not point.believable:
            look = {"facecolor": "none", "edgecolor": QUIET, "linewidth": 1.4}
        look |= {"s": per_cost * point.cost, "zorder": 4 if point in best else 3}
        axis.scatter(100 * point.clean, 100 * point.robust, **look)
    _cost_legend(figure, points, per_cost)
    if listed:
        _list_names(figure, texts, inks)
        texts = [str(number) for number, _ in enumerate(named, 1)]
    order = [*named, *(point for point in points if point not in named)]
    marks = [(100 * p.clean, 100 * p.robust, math.sqrt(per_cost * p.cost / math.pi)) for p in order]
    fits = _write_labels(figure, axis, texts, inks, np.asarray(marks))
    return figure if fits or listed else None


def _limits(axis, points: Sequence[Point]) -> None:
    for place, limit in ((1, axis.set_xlim), (2, axis.set_ylim)):
        shares = [100 * point[place] for point in points]
        low, high = min(shares), max(shares)
        margin = max(1.5, 0.14 * (high - low))
        limit(max(low - margin, -3), min(high + margin, 103))


def _draw_front(axis, best: Sequence[Point]) -> None:
    """Draws the outline of what the front covers."""
    left, bottom = axis.get_xlim()[0], axis.get_ylim()[0]
    corners = [(left, 100 * point.robust) for point in best[:1]]
    for point, after in zip(best, [*best[1:], None], strict=False):
        end = bottom if after is None else 100 * after.robust
        corners += [(100 * point.clean, 100 * point.robust), (100 * point.clean, end)]
    if corners:
        x, y = np.asarray(corners).T
        axis.fill_between(x, y, bottom, color=FRONT, alpha=0.06, lw=0, zorder=1)
        axis.plot(x, y, color=FRONT, lw=1.2, alpha=0.7, zorder=2)


def _cost_legend(figure, points: Sequence[Point], per_cost: float) -> None:
    from matplotlib.lines import Line2D

    low, high = (f([point.cost for point in points]) for f in (min, max))
    nice = [m * 10**e for e in range(-3, 7) for m in (1, 2, 5)]
    inside = [value for value in nice if 0.7 * low <= value <= 1.4 * high]
    shown = sorted({inside[0], inside[len(inside) // 2], inside[-1]}) if inside else [high]
    style = {"marker": "o", "linestyle": "", "color": QUIET, "markeredgecolor": "white"}
    figure.legend(
        [Line2D([], [], markersize=math.sqrt(per_cost * cost), **style) for cost in shown],
        [f"{cost:.2g}x" if cost < 10 else f"{cost:.0f}x" for cost in shown],
        **{"title": "training time", "loc": "outside right upper", "alignment": "left"},
        **{"labelspacing": 1.4, "handletextpad": 1.0},
    )


def _list_names(figure, texts: Sequence[str], inks: Sequence[dict[str, str]]) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], linestyle="")] * len(texts),
        [f"{number}  {text}" for number, text in enumerate(texts, 1)],
        labelcolor=[ink["color"] for ink in inks],
        fontsize=7.5 if len(texts) <= 20 else 6,
        loc="outside right lower",
        **{"handlelength": 0, "handletextpad": 0, "labelspacing": 0.35},
    )


def _write_labels(figure, axis, labels, inks, marks: np.ndarray) -> bool:
    """Writes labels beside their marks; says whether each has a place of its own.

    The marks are center, per cent, and radius, points; the first ones are those with a label.
    """
    style = {"textcoords": "offset points", "ha": "center", "va": "center", "zorder": 6}
    style |= {"fontsize": 9 if len(labels) <= 10 else 7.5, "in_layout": False}
    texts = [
        axis.annotate(text, mark[:2], xytext=(0, 0), **style, **ink)
        for text, mark, ink in zip(labels, marks, inks, strict=False)
    ]
    figure.draw_without_rendering()  # now the axes have their place and the texts their size
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi  # points in a pixel
    sizes = scale * np.asarray([text.get_window_extent().size for text in texts]).reshape(-1, 2)
    circles = np.column_stack([scale * axis.transData.transform(marks[:, :2]), marks[:, 2]])
    boxes, fits = place(sizes, circles, scale * axis.get_window_extent().extents)
    for text, box, circle in zip(texts, boxes, circles, strict=False):
        text.set_position((box[:2] + box[2:]) / 2 - circle[:2])
    return fits


def place(sizes: np.ndarray, circles: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns a box beside its circle for each label, and whether all are free; all in points.

    Each label in turn takes the first of some places around its mark that is free of marks and of
    earlier labels, else the one that covers least of them.  Sizes are width and height, circles
    center and radius of each mark, those with a label first; boxes and frame are left, bottom,
    right and top.
    """
    inner = 0.9 * circles[:, 2:]  # a circle does not fill the corners of its box
    taken = np.hstack([circles[:, :2] - inner, circles[:, :2] + inner])
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)  # to the right first
    around = np.tile(np.column_stack([np.cos(angles), np.sin(angles)]), (len(GAPS), 1))
    gaps = np.repeat(GAPS, len(angles)).reshape(-1, 1)
    boxes, covers = [], []
    for size, (x, y, radius) in zip(sizes, circles, strict=False):
        # Half the label's size further out, less where the direction is askew.
        middle = (x, y) + (radius + gaps) * around + size / 2 * np.clip(1.4 * around, -1, 1)
        tried = np.hstack([middle - size / 2, middle + size / 2])
        outside = np.prod(size) - _overlap(tried, frame.reshape(1, 4))
        covered = np.round(outside + _overlap(tried, taken), 3)
        boxes.append(tried[np.argmin(covered)])
        covers.append(covered.min())
        taken = np.vstack([taken, boxes[-1]])
    return np.asarray(boxes).reshape(-1, 4), not any(covers)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the area that each box shares with the others, ``[n]``."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.sum(np.prod(np.clip(high - low, 0, None), axis=-1), axis=1)
