"""A grid over a recipe's settings becomes named recipes, one for each point."""

from __future__ import annotations

import collections
import copy
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from robust_ssl.build import inside
from robust_ssl.experiment.linking import check_each, entries_of, undecided
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.workdir import digest, json_ready

_GRID = "config.sweep.grid"
_LONGEST = 80  # characters of a point's name, by which its directory is called
_WEIGHT = re.compile(
    r"((?:start\.)*)losses\.(?:clean|adversarial)_cross_entropy(?:\.(?:weight|function))?"
)


class Points(NamedTuple):
    """The points of a sweep.

    Attributes:
      entries: Of each point's recipe, by a name that can be a directory's.
      starts: Of what they start from, by name, where that is no recipe of the plan: points that
        start from the same share it.
      values: What each path of the grid is at each point, by the point's name.
    """

    entries: dict[str, dict[str, Any]]
    starts: dict[str, dict[str, Any]]
    values: dict[str, dict[str, Any]]


def points(recipe: Recipe, pairs: Any) -> Points:
    """Returns the points of ``config.sweep``.

    Args:
      recipe: The one that is swept.
      pairs: What `read` takes.

    A path that begins with ``start.`` leads into the recipe that the swept one starts from.  A
    point whose name is another's too, or longer than 80 characters, ends in a digest of its values.

    Raises:
      ValueError: If the grid is no list of (path, values) pairs, or a path leads nowhere or to a
        weight that ``adv_ratio`` decides.
    """
    grid = read(pairs)
    values = combinations(grid)
    base = _opened(recipe, list(values[0]))
    _check_weights(base, values)
    expanded = expand(base, grid)
    shown = (point.replace("=", " ").replace(",", "") for point in expanded)
    labels = [f"{recipe.name} {re.sub(r'[^0-9A-Za-z_.+ -]', '_', label)}" for label in shown]
    names = apart(labels, values, _LONGEST)
    entries, starts = {}, {}
    for point, text in zip(names, expanded.values(), strict=True):
        entries[point] = {**_closed(recipe, text, starts), "scored": True}
    return Points(entries, starts, dict(zip(names, values, strict=True)))


def check_values(recipe: Recipe, pairs: Any) -> None:
    """Raises ValueError for a value that is no value of the entry that its path leads to.

    A number out of range is none of them: the sweep tries it, and names it.
    """
    for row, (joined, values) in enumerate(read(pairs).items()):
        for place, value in enumerate(values):
            if _is_number(value) and _is_number(_entry_at(recipe, _single(joined)[0])):
                continue
            point = points(recipe, [(joined, (value,))])
            for entries in (*point.entries.values(), *point.starts.values()):
                with inside(f"{_GRID}[{row}][1][{place}]"):
                    check_each(entries, f"config.recipes.{recipe.name}")


def _entry_at(recipe: Recipe, path: str) -> Any:
    node = _opened(recipe, [path])
    for part in path.split("."):
        node = _inside(node)[part]
    return node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_weights(base: Mapping[str, Any], values: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a path to a weight that an `adv_ratio` overwrites at some point."""
    for path in values[0]:
        if (weight := _WEIGHT.fullmatch(path)) is None:
            continue
        ratio, default = f"{weight[1]}adv_ratio", base
        for part in ratio.split("."):
            default = default.get(part) if isinstance(default, Mapping) else None
        if any(point.get(ratio, default) is not None for point in values):
            raise ValueError(
                f"the grid's path {path!r} leads to what {ratio} decides, so its points would be "
                f"the same; sweep {ratio} instead, the weight of adversarial cross-entropy (clean "
                f"has 1 - {ratio})"
            )


def _text(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.text, "scored": recipe.scored}


def _opened(recipe: Recipe, paths: Sequence[str]) -> dict[str, Any]:
    """A recipe's text with its start's in place of its name, as far as paths lead into it."""
    text = _text(recipe)
    inner = [path.removeprefix("start.") for path in paths if path.startswith("start.")]
    if inner and recipe.start:
        text["start"] = _opened(recipe.start, inner)
    return text


def _closed(
    recipe: Recipe, text: Mapping[str, Any], starts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The text with the name of what it starts from, which is new where the grid changed it."""
    start = text.get("start")
    if isinstance(start, Mapping):
        known = _closed(recipe.start, _text(recipe.start), {})
        start = _closed(recipe.start, start, starts)
        if start == known:
            start = recipe.start.name
        else:
            label = f"{recipe.start.name} {digest(json_ready(start))[:8]}"
            starts[label], start = {**start, "scored": False}, label
    whole = undecided({**text, "start": start})
    return entries_of(whole, {}, f"config.recipes.{recipe.name}")


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
    for row, entry in enumerate(entries):
        pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not pair or not isinstance(entry[0], str):
            place = f"{_GRID}[{row}][0]" if pair else f"{_GRID}[{row}]"
            raise ValueError(
                f"{_GRID} must be a list of (path, values) pairs, got {entry!r} where a pair "
                f'should be, {place}; write for example (("attack.epsilon", (0.01, 0.02)),)'
            )
    _check_once([path for path, _ in entries])
    for row, (path, values) in enumerate(entries):
        with inside(f"{_GRID}[{row}][1]"):
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
        ``&``, as ``"attack.layer & losses.drift.layers.0"``; the first one names the point.

    Returns:
      Point's name to recipe, in the order of a product: the last path changes fastest.  A name
      has the shortest endings of the paths that tell them apart, and numbers with as many digits
      as tell them apart, three at least; a digest of the values where that is another's name too.

    Raises:
      ValueError: If the grid is empty, a path leads nowhere (naming those near) or into another
        path of the grid, or the values of a path are no list, none, or not all different.

    Example:
      >>> recipe = {"attack": {"epsilon": 8 / 255}, "losses": {"trades_kl": {"weight": 6}}}
      >>> grid = {"attack.epsilon": [4 / 255, 8 / 255], "losses.trades_kl.weight": [3]}
      >>> points = expand(recipe, grid)
      >>> list(points)
      ['epsilon=0.0157, weight=3', 'epsilon=0.0314, weight=3']
      >>> points["epsilon=0.0314, weight=3"]["losses"]
      {'trades_kl': {'weight': 3}}
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
        recipe = _replace(recipe, path, value)
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
    known = [value if _is_number(value) else repr(value) for value in values]  # 5 is 5.0
    if len({*known}) < len(known):
        raise ValueError(f"the grid's {path!r} lists a value twice: {list(values)}")


def _texts(path: str, values: Sequence[Any]) -> list[str]:
    """Returns each value as a name shows it, as short as tells them apart."""
    _check_values(path, values)
    for digits in (3, 4, 6, 9, 17):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
        if len({*texts}) == len(texts):
            return texts
    return [repr(value) for value in values]


def _replace(base: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns a recipe with another value at the end of a path that leads somewhere.

    Example:
      >>> _replace({"losses": {"drift": {"weight": 1.0}}}, "losses.drift.weight", 2.0)
      {'losses': {'drift': {'weight': 2.0}}}
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
