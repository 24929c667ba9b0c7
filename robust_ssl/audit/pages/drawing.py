"""The figures of the pages as inline SVG, drawn from numbers alone.

Text stays text: it is set in the page's own font, so Japanese needs no font package, and it can be
searched, copied and read aloud.  Colors are Okabe and Ito's, and shapes differ too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_ssl import words
from robust_ssl.audit.pages.catalog import Catalog
from robust_ssl.audit.pages.numbers import Numbers, money, percent, plain

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 104, 14, 44
COLORS = {"usual": "#b34700", "secured": "#0060a0"}
DOUBT = "#7a4b00"  # what is open, in style.css
INK, QUIET, GRID = "#222222", "#666666", "#dddddd"
ROLES = ("usual", "secured")
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
SIDE = 104  # for an amount of money on either side of its bar
MOST_NAME = 24  # characters of a layer or a recipe beside its bar


@dataclasses.dataclass
class Figures:
    """Draws figures with words and numbers of one language; each has ids of its own.

    Attributes:
      text: The catalogue.
      numbers: How numbers are written.
    """

    text: Catalog
    numbers: Numbers
    _ids: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def curve(self, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
        """Draws accuracy against the attacker's budget, with intervals as bands."""
        largest = max(p["epsilon"] for points in curves.values() for p in points) or 1.0
        x = _scale(0, largest, LEFT, WIDTH - RIGHT)
        y = _scale(0, 1, HEIGHT - BOTTOM, TOP)
        budgets = [point["epsilon"] for point in next(iter(curves.values()))]
        parts = [*self._percents(y), *_ticks(x, budgets)]
        ends = _apart({r: y(points[-1]["accuracy"]["value"]) for r, points in curves.items()}, 26)
        for role, points in curves.items():
            parts += self._line(role, points, x, y)
            parts += self._name(role, x(largest) + 9, ends[role], points[-1]["accuracy"]["value"])
        parts += self._axes("figure.budget", "figure.accuracy")
        return self._svg("figure.curve", parts)

    def _line(self, role: str, points: Sequence[Mapping[str, Any]], x: Any, y: Any) -> list[str]:
        color = COLORS[role]
        values = [(x(p["epsilon"]), p["accuracy"]) for p in points]
        upper = [(at, y(share["high"])) for at, share in values]
        lower = [(at, y(share["low"])) for at, share in reversed(values)]
        middle = [(at, y(share["value"])) for at, share in values]
        dash = ' stroke-dasharray="6 3"' if role == "usual" else ""
        parts = [f'<polygon points="{_points(upper + lower)}" fill="{color}" fill-opacity="0.15"/>']
        parts += [
            f'<polyline points="{_points(middle)}" fill="none" stroke="{color}" '
            f'stroke-width="2"{dash}/>'
        ]
        return parts + [_mark(role, *point) for point in middle]

    def _name(self, role: str, x: float, y: float, share: float) -> list[str]:
        return [
            _text(x, y, self.text.plain(f"role.{role}.short"), fill=COLORS[role], weight="bold"),
            _text(x, y + 13, percent(share), fill=COLORS[role], value=share),
        ]

    def trade_off(self, points: Sequence[Mapping[str, Any]]) -> Any:
        """Draws accuracy under attack against the cost of training; a ring marks what is chosen."""
        shown = [point for point in points if point["cost_factor"]]
        if not shown:
            return None
        costs = [math.log10(max(point["cost_factor"], 1e-3)) for point in shown]
        low, high = min([0.0, *costs]), max([1.0, *costs])
        place = _scale(low, high * 1.05, LEFT + 8, WIDTH - RIGHT)
        y = _scale(0, 1, HEIGHT - BOTTOM, TOP)
        parts = self._percents(y)
        for power in range(math.ceil(low), math.floor(high) + 1):
            parts.append(
                _text(place(power), HEIGHT - BOTTOM + 15, f"{10.0**power:g}{TIMES}", "middle")
            )
        doubted = any(not point["trusted"] for point in shown)
        labels = _apart({p["recipe"]: y(p["robust"]) for p in shown}, 40 if doubted else 27)
        for point, cost in zip(shown, costs, strict=True):
            role = "secured" if point["chosen"] else "usual"
            at = (place(cost), y(point["robust"]))
            if point["chosen"]:
                parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="9" class="ring"/>')
            label = labels[point["recipe"]]
            factor = f"{plain(point['cost_factor'])}{TIMES}"
            parts += [
                _mark(role, *at),
                _text(at[0] + 13, label + 2, _short(point["recipe"]), fill=COLORS[role]),
                _text(at[0] + 13, label + 15, factor, value=point["cost_factor"]),
            ]
            if not point["trusted"]:
                said = self.text.plain("doubted")
                parts.append(_text(at[0] + 13, label + 28, said, fill=DOUBT, weight="bold"))
        parts += self._axes("figure.cost", "figure.attacked")
        return self._svg("figure.trade_off", parts)

    def layers(self, layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
        """Draws how far the output of each layer moves, the two classifiers side by side."""
        names = list(dict.fromkeys(e["layer"] for entries in layers.values() for e in entries))
        drifts = {r: {e["layer"]: e["drift"] for e in entries} for r, entries in layers.items()}
        largest = max([1e-9, *(v for each in drifts.values() for v in each.values())])
        rows = []
        for name in names:
            bars = [(drifts[r][name], COLORS[r], r) for r in drifts if name in drifts[r]]
            rows.append((_short(name), [(v, color, plain(v)) for v, color, _ in bars]))
        return self._svg("figure.layers", *_bars(rows, largest))

    def bands(self, bands: Sequence[Mapping[str, Any]]) -> Any:
        """Draws which share of the change lies in each band of frequency."""
        rows = []
        for band, name in zip(bands, _band_names(len(bands)), strict=True):
            edges = f"{self.text.plain(name)} {band['low']:g}{DASH}{band['high']:g}"
            rows.append((edges, [(band["share"], QUIET, percent(band["share"]))]))
        return self._svg("figure.bands", *_bars(rows, max(band["share"] for band in bands)))

    def tornado(self, bars: Sequence[Mapping[str, Any]], likely: float) -> Any:
        """Draws the first year's net at both ends of each amount, what matters most on top."""
        shown = [bar for bar in bars if bar["at_low"] != bar["at_high"]][:6]
        if not shown:
            return None
        ends = [bar[end] for bar in shown for end in ("at_low", "at_high")] + [likely, 0.0]
        x = _scale(min(ends), max(ends), SIDE, WIDTH - SIDE)
        row, bottom = 36, 8 + 36 * len(shown)
        parts = [f'<path d="M{x(0):.1f} 8V{bottom}" stroke="{QUIET}" stroke-dasharray="2 3"/>']
        for number, bar in enumerate(shown):
            top = 8 + number * row
            low, high = sorted((bar["at_low"], bar["at_high"]))
            parts += [
                _text(4, top + 10, self.text.plain(f"amount.{bar['amount']}")),
                _rect(x(low), top + 16, x(high) - x(low), 12, COLORS["secured"]),
                self._amount(x(low) - 4, top + 26, low, "end"),
                self._amount(x(high) + 4, top + 26, high, "start"),
            ]
        parts.append(_text(x(0), bottom + 13, "0", "middle"))
        return self._svg("figure.tornado", parts, bottom + 20)

    def _amount(self, x: float, y: float, value: float, anchor: str) -> str:
        shown = money(value, self.numbers.currency, self.numbers.language)
        return _text(x, y, shown, anchor, value=value)

    def _percents(self, y: Any) -> list[str]:
        parts = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            at = y(share)
            parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
            parts.append(_text(LEFT - 6, at + 4, f"{100 * share:.0f}", "end", kind="tick"))
        return parts

    def _axes(self, x_name: str, y_name: str) -> list[str]:
        middle = (LEFT + WIDTH - RIGHT) / 2
        across = (TOP + HEIGHT - BOTTOM) / 2
        return [
            _text(middle, HEIGHT - 8, self.text.plain(x_name), "middle"),
            f'<g transform="rotate(-90 11 {across:.1f})">'
            + _text(11, across, self.text.plain(y_name), "middle")
            + "</g>",
        ]

    def _svg(self, title: str, parts: Sequence[str], height: float = HEIGHT) -> Any:
        from markupsafe import Markup, escape

        name = f"figure-{next(self._ids)}"
        head = (
            f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}">'
            f'<title id="{name}">{escape(self.text.plain(title))}</title>'
        )
        return Markup(head + "".join(parts) + "</svg>")


def _scale(low: float, high: float, start: float, end: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _apart(places: Mapping[str, float], least: float) -> dict[str, float]:
    """Returns places of labels, moved down until none lies on another."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name, place in sorted(places.items(), key=lambda pair: pair[1]):
        placed[name] = last = max(place, last + least)
    over = max(0.0, last - (HEIGHT - BOTTOM - 14))
    return {name: place - over for name, place in placed.items()}


def _ticks(x: Any, budgets: Sequence[float]) -> list[str]:
    y = HEIGHT - BOTTOM + 15
    return [_text(x(b), y, plain(255 * b), "middle", value=b) for b in budgets]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _mark(role: str, x: float, y: float) -> str:
    if role == "usual":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLORS[role]}"/>'
    corners = _points([(x, y - 5), (x + 4.5, y + 3.5), (x - 4.5, y + 3.5)])
    return f'<polygon points="{corners}" fill="{COLORS[role]}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    *,
    fill: str = INK,
    weight: str = "normal",
    value: float | None = None,
    kind: str = "label",
) -> str:
    from markupsafe import escape

    told = "" if value is None else f' data-value="{escape(json.dumps(value))}"'
    kind = "" if value is not None else f' class="{kind}"'
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}"{kind}{told}>{escape(text)}</text>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:g}" '
        f'fill="{fill}"/>'
    )


def _bars(rows: Sequence[tuple[str, list]], largest: float) -> tuple[list[str], float]:
    """Returns horizontal bars with their names and values, and the height they take."""
    left, parts, y = 150, [], 6.0
    x = _scale(0, largest, left, WIDTH - 62)
    for name, bars in rows:
        height = 13 * len(bars)
        parts.append(_text(left - 6, y + height / 2 + 4, name, "end"))
        for number, (value, color, shown) in enumerate(bars):
            top = y + 13 * number
            parts.append(_rect(left, top + 1, x(value) - left, 11, color))
            parts.append(_text(x(value) + 4, top + 11, shown, value=value))
        y += height + 7
    return parts, y


def _band_names(count: int) -> list[str]:
    middle = ["band.middle"] * max(0, count - 2)
    return ["band.coarse", *middle, "band.fine"][:count]


def _short(name: str) -> str:
    name = words.line(name)
    half = MOST_NAME // 2
    return name if len(name) <= MOST_NAME else f"{name[: half - 1]}…{name[-half:]}"
