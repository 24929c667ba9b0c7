"""What robustness costs in clean accuracy and in time: the front, its area, a plain sentence."""

from __future__ import annotations

import math
import os
import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from robust_ssl.report.figures import QUIET, STYLES, new_figure, save_figure, styled
from robust_ssl.report.tables import method_name

FRONT = STYLES["stage2"]["color"]
BEHIND = "#8C8C8C"
INK = "#303030"
MOST_NAMES = 30  # with more points only those of the front are named
MOST_LONG = 8  # with more names, one of them longer than `LONG`, they stand in a list
LONG = 24  # letters
LARGEST = 520.0  # area of the mark of the highest cost, square points
PER_COST = 45.0  # area of a mark for each unit of cost, square points, where that is less


class Point(NamedTuple):
    """A method in the trade-off.

    Attributes:
      name: What it is called.
      clean: Clean accuracy, a share in [0, 1].
      robust: Robust accuracy, a share in [0, 1].
      cost: Training time, relative to usual fine-tuning of all layers; above 0.
      trusted: Whether its figures under attack can be believed; it has no part in the front, the
        area and the advice otherwise.
      images: On how many images the accuracies were measured; 0 is not known.
    """

    name: str
    clean: float
    robust: float
    cost: float
    trusted: bool = True
    images: int = 0


def front(points: Iterable[Point]) -> list[Point]:
    """Returns the points that no other beats: those with the best of one share given the other.

    Of points that are equal in both shares the cheapest stands for all.

    Args:
      points: In any order.

    Returns:
      By rising clean accuracy; so robust accuracy falls strictly.

    Raises:
      ValueError: If a share is not in [0, 1], a cost not finite and above 0, or a name given twice.

    Example:
      >>> a, b, c = Point("a", 0.9, 0.1, 1), Point("b", 0.8, 0.5, 2), Point("c", 0.7, 0.4, 1)
      >>> [point.name for point in front([a, b, c])]
      ['b', 'a']
    """
    kept: list[Point] = []
    best = -1.0
    trusted = [point for point in checked_points(points) if point.trusted]
    for point in sorted(trusted, key=lambda p: (-p.clean, -p.robust, p.cost)):
        if point.robust > best:
            kept.append(point)
            best = point.robust
    return kept[::-1]


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

    Args:
      points: In any order; none gives 0.

    Returns:
      Area in [0, 1].

    Raises:
      ValueError: As `front`.

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


def _called(point: Point) -> str:
    return method_name(point.name) + ("" if point.trusted else " NOT TRUSTED")


@styled
def figure_pareto(
    directory: str | os.PathLike,
    points: Sequence[Point],
    *,
    label_clean: str,
    label_robust: str,
    name: str = "pareto",
) -> pathlib.Path:
    """Draws clean against robust accuracy; the area of a mark is the cost, the steps the front.

    A point that is not trusted is a ring, and says so.  Many long names stand in a list, by
    number.  With more than thirty points only those of the front are named; the CSV has all.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      points: At least one.
      label_clean: What the clean accuracy is, without unit, for example ``"clean accuracy"``.
      label_robust: What the robust accuracy is, without unit.
      name: File name without suffix.

    Returns:
      Path of the PNG.

    Raises:
      ValueError: As `front`, or if there is no point.
    """
    points = checked_points(points)
    if not points:
        raise ValueError("there is no point to draw")
    best = front(points)
    per_cost = min(PER_COST, LARGEST / max(point.cost for point in points))
    named = sorted(points if len(points) <= MOST_NAMES else best, key=lambda p: (p.clean, p.robust))
    listed = len(named) > MOST_LONG and any(len(_called(p)) > LONG for p in named)
    figure = new_figure(9.2 if listed else 7.2, 5.0)
    axis = figure.subplots()
    _limits(axis, points)
    corners = _draw_front(axis, best)
    for point in sorted(points, key=lambda p: -p.cost):  # small marks lie on large ones
        axis.scatter(
            100 * point.clean,
            100 * point.robust,
            s=per_cost * point.cost,
            facecolor=FRONT if point in best else QUIET if point.trusted else "none",
            edgecolor="white" if point.trusted else QUIET,
            linewidth=0.8 if point.trusted else 1.4,
            zorder=4 if point in best else 3,
        )
    axis.set_xlabel(f"{label_clean} (%)")
    axis.set_ylabel(f"{label_robust} (%)")
    axis.set_title(f"area under the front: {area_under_front(points):.3f}", loc="left", fontsize=10)
    _cost_legend(figure, points, per_cost)
    if listed:
        _list_names(figure, named, best)
    order = [*named, *(point for point in points if point not in named)]
    marks = [(100 * p.clean, 100 * p.robust, math.sqrt(per_cost * p.cost / math.pi)) for p in order]
    labels = [
        str(number) if listed else textwrap.fill(_called(point), 24, break_long_words=False)
        for number, point in enumerate(named, 1)
    ]
    _write_names(figure, axis, labels, [_ink(point, best) for point in named], marks, corners)
    numbers = [(*p._replace(trusted=int(p.trusted)), int(p in best)) for p in points]
    header = (*Point._fields, "on_front")
    return save_figure(figure, pathlib.Path(directory) / name, header, numbers)


def _limits(axis, points: Sequence[Point]) -> None:
    for shares, limit in (
        ([p.clean for p in points], axis.set_xlim),
        ([p.robust for p in points], axis.set_ylim),
    ):
        low, high = 100 * min(shares), 100 * max(shares)
        margin = max(1.5, 0.14 * (high - low))
        limit(max(low - margin, -3), min(high + margin, 103))


def _draw_front(axis, best: Sequence[Point]) -> np.ndarray:
    """Draws the outline of what the front covers; returns its corners, per cent, ``[n, 2]``."""
    if not best:  # the bottom line, which nothing runs over
        return np.column_stack([axis.get_xlim(), [axis.get_ylim()[0]] * 2])
    corners = [(axis.get_xlim()[0], 100 * best[0].robust)]
    for point, after in zip(best, [*best[1:], None], strict=True):
        bottom = axis.get_ylim()[0] if after is None else 100 * after.robust
        corners += [(100 * point.clean, 100 * point.robust), (100 * point.clean, bottom)]
    x, y = np.asarray(corners).T
    axis.fill_between(x, y, axis.get_ylim()[0], color=FRONT, alpha=0.06, lw=0, zorder=1)
    axis.plot(x, y, color=FRONT, lw=1.2, alpha=0.7, zorder=2)
    return np.asarray(corners)


def _cost_legend(figure, points: Sequence[Point], per_cost: float) -> None:
    from matplotlib.lines import Line2D

    low, high = (f([point.cost for point in points]) for f in (min, max))
    nice = [m * 10**e for e in range(-3, 7) for m in (1, 2, 5)]
    inside = [value for value in nice if 0.7 * low <= value <= 1.4 * high]
    shown = sorted({inside[0], inside[len(inside) // 2], inside[-1]}) if inside else [high]
    marks = [
        Line2D(
            *([], []),
            marker="o",
            linestyle="",
            color=QUIET,
            markeredgecolor="white",
            markersize=math.sqrt(per_cost * cost),
        )
        for cost in shown
    ]
    figure.legend(
        marks,
        [f"{cost:.2g}x" if cost < 10 else f"{cost:.0f}x" for cost in shown],
        title="training time",
        loc="outside right upper",
        labelspacing=1.4,
        handletextpad=1.0,
        alignment="left",
    )


def _ink(point: Point, best: Sequence[Point]) -> dict[str, str]:
    return {"color": FRONT, "weight": "bold"} if point in best else {"color": INK}


def _list_names(figure, named: Sequence[Point], best: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], linestyle="")] * len(named),
        [f"{number}  {_called(point)}" for number, point in enumerate(named, 1)],
        labelcolor=[_ink(point, best)["color"] for point in named],
        fontsize=7.5 if len(named) <= 20 else 6,
        loc="outside right lower",
        handlelength=0,
        handletextpad=0,
        labelspacing=0.35,
    )


def _write_names(figure, axis, labels, inks, marks, corners) -> None:
    """Writes names where they cover neither each other nor marks, as near as that goes.

    The marks are center, per cent, and radius, points; the first ones are those with a name.
    """
    texts = [
        axis.annotate(
            label,
            mark[:2],
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5 if len(labels) > 10 else 9,
            zorder=6,
            in_layout=False,  # what is placed by the layout must not move it
            **ink,
        )
        for label, ink, mark in zip(labels, inks, marks, strict=False)
    ]
    figure.draw_without_rendering()  # now the axes have their place and the texts their size
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi  # points in a pixel
    sizes = np.asarray([scale * text.get_window_extent().size for text in texts])
    centers = scale * axis.transData.transform([mark[:2] for mark in marks])
    circles = np.column_stack([centers, [mark[2] for mark in marks]])
    lines = scale * axis.transData.transform(corners)
    frame = scale * axis.get_window_extent().extents
    boxes = _placed(sizes, circles, lines, frame)
    for text, box, (x, y, radius) in zip(texts, boxes, circles, strict=False):
        text.set_position(((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y))
        end = np.clip((x, y), box[:2], box[2:])
        if math.dist(end, (x, y)) > radius + 5:  # too far to be seen whose name it is
            ends = axis.transData.inverted().transform([(x / scale, y / scale), end / scale])
            axis.plot(*ends.T, color=BEHIND, lw=0.6, zorder=2.5, scalex=False, scaley=False)


def _placed(
    sizes: np.ndarray, circles: np.ndarray, lines: np.ndarray, frame: np.ndarray
) -> np.ndarray:
    """Finds a box beside its circle for each name, all in points.

    Each name in turn takes the place that disturbs least, three times over.

    Args:
      sizes: Width and height of each name, ``[names, 2]``.
      circles: Center and radius of each mark, those with a name first, ``[marks, 3]``.
      lines: Corners of a line of vertical and horizontal pieces, ``[corners, 2]``.
      frame: Left, bottom, right and top of what the names should stay in, ``[4]``.

    Returns:
      Left, bottom, right and top of each name, ``[names, 4]``.
    """
    inner = 0.9 * circles[:, 2:]  # a circle does not fill the corners of its box
    marks = np.hstack([circles[:, :2] - inner, circles[:, :2] + inner])
    pieces = np.hstack([np.minimum(lines[:-1], lines[1:]), np.maximum(lines[:-1], lines[1:])])
    pieces = pieces + np.asarray([-1.0, -1.0, 1.0, 1.0])
    boxes = np.full((len(sizes), 4), np.nan)
    for _ in range(3):
        for i, size in enumerate(sizes):
            tried, gaps = _beside(circles[i], size)
            others = np.delete(boxes, i, axis=0)
            disturbs = 10 * _overlap(tried, others) + 5 * _overlap(tried, marks)
            disturbs += 4 * _overlap(tried, pieces) + 3 * gaps
            disturbs += 20 * (np.prod(size) - _overlap(tried, frame.reshape(1, 4)))
            disturbs += 80 * _crossed(tried, circles[i], others, np.delete(marks, i, axis=0))
            disturbs += 20 * _mistaken(tried, circles[i], np.delete(circles, i, axis=0))
            boxes[i] = tried[np.argmin(disturbs)]
    return boxes


def _beside(circle: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes around a circle, the nearest first, ``[n, 4]``, and their gaps, ``[n]``."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    gaps = np.repeat([2.0, 6.0, 12.0, 20.0, 30.0, 42.0, 56.0], len(angles))
    directions = np.tile(directions, (7, 1))
    reach = (circle[2] + gaps).reshape(-1, 1)
    # Half the name's size further out, less where the direction is askew.
    middle = circle[:2] + reach * directions + size / 2 * np.clip(1.4 * directions, -1, 1)
    return np.hstack([middle - size / 2, middle + size / 2]), gaps


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the area each box shares with the others, ``[n]``; one that is NaN shares none."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.nansum(np.prod(np.clip(high - low, 0, None), axis=-1), axis=1)


def _mistaken(boxes: np.ndarray, circle: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Counts the other circles that each box is about as near to as to its own, ``[n]``."""

    def distances(circles: np.ndarray) -> np.ndarray:
        nearest = np.clip(circles[:, None, :2], boxes[:, :2], boxes[:, 2:])
        return np.linalg.norm(nearest - circles[:, None, :2], axis=-1) - circles[:, 2:]

    return (distances(others) < distances(circle.reshape(1, 3)) + 2).sum(0)


def _crossed(
    boxes: np.ndarray, circle: np.ndarray, names: np.ndarray, marks: np.ndarray
) -> np.ndarray:
    """Counts what the line from the circle to each box would run over, ``[n]``."""
    ends = np.clip(circle[:2], boxes[:, :2], boxes[:, 2:])
    along = np.linspace(0.1, 0.9, 9).reshape(1, -1, 1)
    dots = circle[:2] + along * (ends - circle[:2])[:, None]
    things = np.concatenate([names, marks])
    inside = (dots[:, :, None] > things[:, :2]) & (dots[:, :, None] < things[:, 2:])
    return inside.all(-1).any(1).sum(-1)
