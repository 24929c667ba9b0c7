"""A grid over a recipe's settings becomes named recipes, one for each point."""

from __future__ import annotations

import collections
import copy
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_ssl.manifests import json_ready
from robust_ssl.trees import digest


def read(pairs: Any) -> dict[str, Sequence[Any]]:
    """Returns a grid as `expand` takes it.

    Args:
      pairs: What ``config.sweep.grid`` holds: a list of (path, values) pairs.

    Raises:
      ValueError: If it is anything else, or a path is there twice.

    Example:
      >>> read((("attack.epsilon", (0.01, 0.02)), ("epochs", (5,))))
      {'attack.epsilon': (0.01, 0.02), 'epochs': (5,)}
    """
    entries = pairs if isinstance(pairs, list | tuple) else [pairs]
    for entry in entries:
        pair = isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if not pair:
            raise ValueError(
                f"config.sweep.grid must be a list of (path, values) pairs, got {entry!r} where a "
                'pair should be; write for example (("attack.epsilon", (0.01, 0.02)),)'
            )
    _check_once([path for path, _ in entries])
    for path, values in entries:
        _check_values(path, values)
    return dict(entries)


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns what each single path is at each point of a grid, in the order of `expand`.

    Example:
      >>> combinations({"a & b": [1, 2], "c": [3]})
      [{'a': 1, 'b': 1, 'c': 3}, {'a': 2, 'b': 2, 'c': 3}]
    """
    together = [_single(joined) for joined in grid]
    return [
        {path: value for paths, value in zip(together, point, strict=True) for path in paths}
        for point in itertools.product(*grid.values())
    ]


def apart(names: Sequence[str], values: Sequence[Any], longest: int | None = None) -> list[str]:
    """Returns names that differ and are short: most as they are.

    Args:
      names: Those wanted.
      values: What each stands for, plain values; a digest of it ends a name that is too long or
        that others have too.
      longest: Characters that a name may have; None: any number.

    Example:
      >>> apart(["a", "b", "a"], [1, 2, 3])
      ['a 6b86b273', 'b', 'a 4e074085']
    """
    times = collections.Counter(names)

    def distinct(name: str, value: Any) -> str:
        if times[name] == 1 and (longest is None or len(name) <= longest):
            return name
        mark = f" {digest(json_ready(value))[:8]}"
        return name[: longest and longest - len(mark)].rstrip() + mark

    return [distinct(name, value) for name, value in zip(names, values, strict=True)]


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
      as tell them apart, three at least; a digest of the values where that is another's name too.

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
    together = [_single(joined) for joined in grid]
    every = [path for paths in together for path in paths]
    for path in every:
        _check_path(base, path)
    _check_apart(every)
    labels = _labels([paths[0] for paths in together])
    texts = [_texts(path, values) for path, values in grid.items()]
    names = [
        ", ".join(map("=".join, zip(labels, shown, strict=True)))
        for shown in itertools.product(*texts)
    ]
    points = combinations(grid)
    return {
        name: _with(base, point) for name, point in zip(apart(names, points), points, strict=True)
    }


def _single(joined: str) -> list[str]:
    """Returns the paths that move together."""
    return [path.strip() for path in joined.split("&")]


def _with(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    recipe = copy.deepcopy(dict(base))
    for path, value in values.items():
        recipe = replaced(recipe, path, value)
    return recipe


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


def _check_once(paths: list[str]) -> None:
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"the grid's path {twice!r} is there twice; keep one")


def _check_apart(paths: list[str]) -> None:
    _check_once(paths)
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


def _check_values(path: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(
            f"the grid's {path!r} must have a list of values, got {values!r}; write ({values!r},) "
            "for this one"
        )
    if not values:
        raise ValueError(f"the grid's {path!r} has an empty list; give it at least one value")


def _texts(path: str, values: Sequence[Any]) -> list[str]:
    """Returns each value as a name shows it, as short as tells them apart."""
    _check_values(path, values)
    for digits in (3, 4, 6, 9, 17):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
        if len({*texts}) == len(texts):
            return texts
    texts = [repr(value) for value in values]
    if len({*texts}) < len(texts):
        raise ValueError(f"the grid's {path!r} lists a value twice: {list(values)}")
    return texts


def replaced(base: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns a recipe with another value at the end of a path that leads somewhere.

    Example:
      >>> replaced({"losses": {"drift": ("m", 1.0)}}, "losses.drift.1", 2.0)
      {'losses': {'drift': ('m', 2.0)}}
    """
    return _replaced(base, path.split("."), value)


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
