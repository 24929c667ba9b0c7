"""Which tensors of a file are the encoder: wrappers come off, other parts are counted and left out.

What wraps a network puts its own words before the tensors' names, and trains other parts beside it.
Neither says anything about the encoder, so neither stops an import; what is left out is counted.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl.build import near
from robust_ssl.weights.mapping import Layout

# What torch's own wrappers put into names, anywhere: compilation, data parallelism, checkpointing.
_WRAPPERS = {
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "_forward_module",
}
_TRAINERS = ("module", "model")  # hold the network and are no part of their own
_DEEPEST = 8  # names before an encoder's own; VISSL's have three
_FEWEST = 10  # tensors of an encoder; most prefixes, of single layers, have two
# Words of a second copy that follows the first one; it is taken only if it is named.
_COPIES = {"momentum", "target", "ema", "k", "key", "slow", "averaged", "moving"}


@dataclasses.dataclass(frozen=True)
class Selection:
    """The encoder's tensors among a file's.

    Attributes:
      layout: How they are called.
      names: The file's names of the encoder's tensors, to names without wrappers and prefix.
      dropped: The file's names of all others.
      notes: What was found out on the way.
    """

    layout: Layout
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


def select(
    tensors: Mapping[str, np.ndarray],
    layouts: Sequence[Layout],
    *,
    layout: str | None = None,
    prefix: str | None = None,
    drop: Sequence[str] = (),
) -> Selection:
    """Finds the encoder in a file.

    Args:
      tensors: The file's.
      layouts: Those to try, in order.
      layout: The name of one; None to find it.
      prefix: What the encoder's names begin with, ``"student_backbone"``; None to find it.
      drop: Parts to leave out, ``"queue"``: their names, or what their names begin with.

    Raises:
      ValueError: If no layout fits, several encoders are in the file and none is named, or a
        prefix or part is not there.
    """
    layouts = _candidates(layouts, layout)
    names = {name: _unwrap(name) for name in tensors}
    names, dropped = _without(names, drop)
    if prefix is not None:
        names, outside = _below(names, f"{_unwrap(prefix.rstrip('.'))}.")
        dropped += outside
    chosen, start, notes = _find(names, tensors, layouts, layout)
    if start:
        names, outside = _below(names, start)
        dropped += outside
    if drop:
        notes += (f"left out, because it is asked for: {', '.join(drop)}",)
    return Selection(chosen, names, tuple(dropped), notes)


def _candidates(layouts: Sequence[Layout], choice: str | None) -> Sequence[Layout]:
    if choice is None:
        return layouts
    named = [layout for layout in layouts if layout.name == choice]
    if not named:
        known = near(choice, [layout.name for layout in layouts])
        raise ValueError(f"no layout {choice!r}; there are\n{_table(layouts)}\n{known[2:]}")
    return named


def _table(layouts: Sequence[Layout]) -> str:
    return "\n".join(f"    {layout.name}: {layout.source}" for layout in layouts)


def _unwrap(name: str) -> str:
    """A name without the words of torch's wrappers."""
    if _WRAPPERS.isdisjoint(name.split(".")):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _without(names: Mapping[str, str], drop: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    parts = [_unwrap(part.rstrip(".")) for part in drop]
    for given, part in zip(drop, parts, strict=True):
        if not any(_is_below(name, part) for name in names.values()):
            raise ValueError(f"there is no part {given!r} to leave out{near(part, _tops(names))}")
    dropped = [name for name, own in names.items() if any(_is_below(own, x) for x in parts)]
    return {name: own for name, own in names.items() if name not in {*dropped}}, dropped


def _is_below(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _tops(names: Mapping[str, str]) -> list[str]:
    """What the names begin with, one and two words of it."""
    tops: dict[str, None] = {}
    for own in names.values():
        first, _, rest = own.partition(".")
        tops[first] = None
        if rest:
            tops[f"{first}.{rest.partition('.')[0]}"] = None
    return list(tops)


def _below(names: Mapping[str, str], prefix: str) -> tuple[dict[str, str], list[str]]:
    inside = {name: own[len(prefix) :] for name, own in names.items() if own.startswith(prefix)}
    if not inside:
        raise ValueError(f"no tensor's name begins with {prefix!r}{near(prefix, _tops(names))}")
    return inside, [name for name in names if name not in inside]


def _find(names, tensors, layouts: Sequence[Layout], choice: str | None):
    """The layout, the prefix under which it fits, and notes about other places."""
    every = set(names.values())
    for layout in layouts:
        if layout.matches(every):
            return layout, "", ()
    places = _places(every, layouts)
    if not places:
        # A layout that is named says itself what is missing.
        if choice is not None:
            return layouts[0], "", ()
        if not names:
            raise ValueError("there are no tensors in it; save the weights of the network again")
        examples = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"no layout has tensors called {examples}, ...; looked for\n{_table(layouts)}"
        )
    start, others = _first(places, names, tensors)
    notes = [f"the encoder is what is under {start[:-1]!r}; all else is left out"]
    if others:
        listed = ", ".join(repr(place[:-1]) for place in others)
        notes.append(f"another one is under {listed}: --prefix takes it instead")
    return places[start], start, tuple(notes)


def _places(names: Collection[str], layouts: Sequence[Layout]) -> dict[str, Layout]:
    """The prefixes under which a layout fits, outermost first, none inside another."""
    below: dict[str, set[str]] = collections.defaultdict(set)
    for name in names:
        parts = name.split(".", _DEEPEST)
        for count in range(1, len(parts)):
            below[".".join(parts[:count]) + "."].add(".".join(parts[count:]))
    places: dict[str, Layout] = {}
    for prefix in sorted(below, key=lambda prefix: (prefix.count("."), _is_copy(prefix), prefix)):
        # Parts of an encoder may look like a small one.
        if len(below[prefix]) < _FEWEST or prefix.startswith(tuple(places)):
            continue
        layout = next((x for x in layouts if x.matches(below[prefix])), None)
        if layout is not None:
            places[prefix] = layout
    return places


def _first(places: Mapping[str, Any], names, tensors) -> tuple[str, list[str]]:
    """The place to take, and the others that hold other weights."""
    content = {place: _content(place, names, tensors) for place in places}
    distinct: list[str] = []
    for place in places:
        # Trainers often call the same module by two names.
        if not any(_equal(content[place], content[other]) for other in distinct):
            distinct.append(place)
    own = [place for place in distinct if not _is_copy(place)]
    if len(own) != 1 and len(distinct) > 1:
        listed = " or ".join(place[:-1] for place in own or distinct)
        raise ValueError(f"several encoders are in the file; name one: --prefix {listed}")
    (start,) = own or distinct
    return start, [place for place in distinct if place != start]


def _is_copy(place: str) -> bool:
    return not _COPIES.isdisjoint(re.split(r"[._]", place))


def _content(place: str, names: Mapping[str, str], tensors) -> dict[str, np.ndarray]:
    return {own[len(place) :]: tensors[x] for x, own in names.items() if own.startswith(place)}


def _equal(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        array is theirs[name] or np.array_equal(array, theirs[name]) for name, array in ours.items()
    )


def count_parts(dropped: Iterable[str], kept: Iterable[str]) -> dict[str, int]:
    """Returns how many tensors are left out of each part, ``projector`` or ``backbone.fc``.

    Example:
      >>> count_parts(["fc.weight", "fc.bias", "bn1.num_batches_tracked"], ["conv1.weight"])
      {'fc': 2, 'num_batches_tracked': 1}
    """
    roots = {_parts(name)[0] for name in kept}
    return dict(collections.Counter(_part(name, roots) for name in dropped))


def _parts(name: str) -> list[str]:
    own = [part for part in _unwrap(name).split(".") if part not in _TRAINERS]
    return own or [name]


def _part(name: str, roots: set[str]) -> str:
    if name.endswith("num_batches_tracked"):
        return "num_batches_tracked"
    parts = _parts(name)
    return ".".join(parts[: 2 if parts[0] in roots else 1])
