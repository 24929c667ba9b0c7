"""A grid over a recipe's settings becomes named recipes, one for each point."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def expand(base: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Returns the recipe of each point of a grid.

    Args:
      base: The recipe that every point starts from: plain values, mappings, tuples and lists.  It
        is not changed, and shares nothing with what is returned.
      grid: Dotted path into `base` to the values it takes.  A part of a path is a key of a
        mapping, or a place in a tuple or list, from 0.  Paths that move together are joined by
        ``&``, as ``"attack.layer & losses.drift.2.layers.0"``; the first one names the point.

    Returns:
      Point's name to recipe, in the order of a product: the last path changes fastest.  A name
      has the shortest endings of the paths that tell them apart, and numbers with as many digits
      as tell them apart, three at least.

    Raises:
      ValueError: If the grid is empty, a path leads nowhere (naming those near) or into another
        path of the grid, or the values of a path are no list, none, or not all different.

    Example:
      >>> recipe = {"epochs": 10, "attack": {"epsilon": 8 / 255}, "losses": {"trades_kl": ("m", 6)}}
      >>> points = expand(recipe, {"attack.epsilon": [4 / 255, 8 / 255], "losses.trades_kl.1": [3]})
      >>> list(points)
      ['epsilon=0.0157, trades_kl.1=3', 'epsilon=0.0314, trades_kl.1=3']
      >>> points["epsilon=0.0314, trades_kl.1=3"]["losses"]
      {'trades_kl': ('m', 3)}
    """
    if not grid:
        raise ValueError("the grid is empty; name at least one path, such as attack.epsilon")
    together = [[path.strip() for path in paths.split("&")] for paths in grid]
    every = [path for paths in together for path in paths]
    for path in every:
        _check_path(base, path)
    _check_apart(every)
    labels = _labels([paths[0] for paths in together])
    texts = [_texts(path, values) for path, values in grid.items()]
    points = {}
    for places in itertools.product(*(range(len(values)) for values in grid.values())):
        recipe = copy.deepcopy(dict(base))
        for place, paths, values in zip(places, together, grid.values(), strict=True):
            for path in paths:
                recipe = _replaced(recipe, path.split("."), values[place])
        shown = (text[place] for place, text in zip(places, texts, strict=True))
        points[", ".join(map("=".join, zip(labels, shown, strict=True)))] = recipe
    return points


def _inside(node: Any) -> dict[str, Any]:
    """Returns what a dotted path may go on to from here."""
    if isinstance(node, Mapping):
        return {str(key): entry for key, entry in node.items()}
    if isinstance(node, tuple | list):
        return {str(place): entry for place, entry in enumerate(node)}
    return {}


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for part, entry in _inside(node).items():
        yield prefix + part
        yield from _paths(entry, f"{prefix}{part}.")


def _check_path(base: Mapping[str, Any], path: str) -> None:
    known = list(_paths(base))
    if path in known:
        return
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    raise ValueError(f"the grid's path {path!r} leads to no setting of the recipe{hint}")


def _check_apart(paths: list[str]) -> None:
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"the grid's path {twice!r} is there twice")
    for outer, inner in itertools.permutations(paths, 2):
        if inner.startswith(f"{outer}."):
            raise ValueError(
                f"the grid's path {inner!r} lies in {outer!r}, which the grid replaces too; keep "
                "one of the two"
            )


def _labels(paths: list[str]) -> list[str]:
    """Returns the shortest ending of each path that no other has and that is no mere place."""

    def endings(path: str) -> list[str]:
        parts = path.split(".")
        return [".".join(parts[start:]) for start in range(len(parts))]

    everyone = [ending for path in paths for ending in endings(path)]
    return [
        next(
            (
                ending
                for ending in reversed(endings(path))
                if everyone.count(ending) == 1 and not ending.split(".")[0].isdigit()
            ),
            path,
        )
        for path in paths
    ]


def _texts(path: str, values: Sequence[Any]) -> list[str]:
    """Returns each value as a name shows it, as short as tells them apart."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"the grid's {path!r} must be a list of values, got {values!r}")
    if not values:
        raise ValueError(f"the grid's {path!r} is an empty list; give it at least one value")
    for digits in (3, 4, 6, 9, 17):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
        if len({*texts}) == len(texts):
            return texts
    texts = [repr(value) for value in values]
    if len({*texts}) < len(texts):
        raise ValueError(f"the grid's {path!r} lists a value twice: {list(values)}")
    return texts


def _replaced(node: Any, parts: list[str], value: Any) -> Any:
    """Returns the node with the value at the end of the path; containers keep their type."""
    if not parts:
        return copy.deepcopy(value)
    part, *rest = parts
    if isinstance(node, Mapping):
        return {k: _replaced(v, rest, value) if str(k) == part else v for k, v in node.items()}
    return type(node)(
        _replaced(entry, rest, value) if str(place) == part else entry
        for place, entry in enumerate(node)
    )
