"""The table of learning rates that is printed before training: a few patterns, not every layer."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from robust_ssl.optimizers.layerwise import FREEZE, Rate


class LayerRow(NamedTuple):
    """One line of the table.

    Attributes:
      pattern: The parameters that it is about, less those of later rows.
      kernels: How many of them are convolution or dense kernels.
      size: Numbers in all of them.
      rate: Their learning rate, or ``"freeze"``.
    """

    pattern: str
    kernels: int
    size: int
    rate: Rate


def layer_table(params: Mapping[str, Any], rates: Mapping[str, Rate]) -> list[LayerRow]:
    """Folds the rates of all parameters into a few patterns, to be read as rules are.

    A part of the network with one rate is one row.  Another has a row for each of its layers or
    stages with the rate that most of its parameters have, followed by what differs from it: **a
    later row overrides an earlier one**.

    Args:
      params: Nested mapping of parameters.
      rates: Path to rate, as `layer_rates` returns.

    Returns:
      Rows in natural order (stage2 before stage10).  Every parameter counts in exactly one row.

    Example:
      >>> params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> layer_table(params, {"head/kernel": 0.1, "head/bias": 0.1})
      [LayerRow(pattern='head/**', kernels=1, size=9, rate=0.1)]
    """
    leaves = flatten_dict(params, sep="/")

    def row(pattern, paths):
        kernels = sum(path.endswith("kernel") and leaves[path].ndim >= 2 for path in paths)
        return LayerRow(pattern, kernels, sum(leaves[p].size for p in paths), rates[paths[0]])

    rows = []
    for part, paths in _children("", list(leaves)):
        # A frozen encoder is one row, however many layers it has.
        one_rate = len({rates[path] for path in paths}) == 1
        sections = [(part, paths)] if one_rate else _children(part, paths)
        for section, members in sections:
            rate = collections.Counter(rates[path] for path in members).most_common(1)[0][0]
            majority = [path for path in members if rates[path] == rate]
            rows.append(row(_pattern(section, members), majority))
            for pattern, group in _pieces(section, members, rates):
                if rates[group[0]] != rate:
                    rows.append(row(pattern, group))
    return rows


def _children(prefix: str, paths: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Groups paths by the next name after a prefix, in natural order."""
    depth = prefix.count("/") + 2 if prefix else 1
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault("/".join(path.split("/")[:depth]), []).append(path)
    return sorted(groups.items(), key=lambda group: natural(group[0]))


def _pieces(
    prefix: str, paths: Sequence[str], rates: Mapping[str, Rate]
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yields the largest subtrees of one rate each."""
    if len({rates[path] for path in paths}) == 1:
        yield _pattern(prefix, paths), paths
        return
    for child, members in _children(prefix, paths):
        yield from _pieces(child, members, rates)


def _pattern(prefix: str, paths: Sequence[str]) -> str:
    return prefix if list(paths) == [prefix] else f"{prefix}/**"


def natural(path: str) -> list[tuple[int, str]]:
    """A key for sorting in which stage2 comes before stage10."""
    pieces = re.findall(r"\d+|\D+", path)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def render_table(rows: Iterable[LayerRow]) -> str:
    """Returns the table as text, with the totals that learn and that are frozen.

    Example:
      >>> rows = [LayerRow("encoder/**", 12, 150_000, "freeze"), LayerRow("head/**", 1, 90, 0.005)]
      >>> print(render_table(rows))
      layers      kernels    size    rate
      encoder/**       12  0.15 M  freeze
      head/**           1      90   0.005
      90 of 150,090 parameters are trained
    """
    rows = list(rows)
    cells = [("layers", "kernels", "size", "rate")]
    cells += [(row.pattern, str(row.kernels), _short(row.size), str(row.rate)) for row in rows]
    layers, kernels, size, rate = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [f"{a:<{layers}}  {b:>{kernels}}  {c:>{size}}  {d:>{rate}}" for a, b, c, d in cells]
    trained = sum(row.size for row in rows if row.rate != FREEZE)
    total = sum(row.size for row in rows)
    return "\n".join([*lines, f"{trained:,} of {total:,} parameters are trained"])


def _short(size: int) -> str:
    return f"{size / 1e6:.2f} M" if size >= 10_000 else f"{size:,}"
