"""What a value is made of: texts, the same in every process, and a user's functions."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from robust_ssl.build.entries import name_of
from robust_ssl.build.sources import has_code, source_of

_NUMBERS = (bool, int, float, complex, str, bytes)
_SAY_ALL = (  # by their repr
    *(range, slice, types.EllipsisType, pathlib.PurePath, fractions.Fraction, decimal.Decimal),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
)
_BUNCHES = (types.SimpleNamespace, argparse.Namespace)
_OF_FLAX = ("_id", "_state", "_parent_ref")  # of a module: it counts them in every process


class UnknownValueError(Exception):
    """A value whose parts nobody knows, such as an open file."""


def is_plain(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether a value is numbers, texts and arrays only; `above` are those that it is within."""
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        entries = value.values() if isinstance(value, Mapping) else value
        above = (*above, id(value))
        return id(value) not in above[:-1] and all(is_plain(entry, above) for entry in entries)
    return value is None or isinstance(value, _NUMBERS) or _is_array(value)


def constant(value: Any) -> str:
    """Returns the text of a plain value, of an array with a digest of its entries."""
    if _is_array(value):
        with contextlib.suppress(Exception):  # a random key, an array that is gone
            import numpy as np

            array = np.asarray(value)
            if not array.dtype.hasobject:  # else its bytes are addresses
                return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _is_array(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("dtype", "shape", "__array__"))


def in_order(entries: set | frozenset) -> list[Any]:
    """Returns a set's entries, in the same order in every process."""
    return sorted(entries, key=lambda e: (constant(e), source_of(e) if has_code(e) else ""))


def state_of(value: Any) -> dict[str, Any]:
    """Returns the fields of an object without running a line of it."""
    fields = {}
    for kind in reversed(type(value).__mro__):
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType):  # a slot
                with contextlib.suppress(AttributeError):  # not filled
                    fields[name] = member.__get__(value)
    with contextlib.suppress(AttributeError):
        fields |= object.__getattribute__(value, "__dict__")
    flax = sys.modules.get("flax.linen")
    hidden = _OF_FLAX if flax is not None and isinstance(value, flax.Module) else ()
    return {n: v for n, v in fields.items() if n not in hidden and not _is_cached(value, n)}


def _is_cached(value: Any, name: str) -> bool:
    members = (vars(kind).get(name) for kind in type(value).__mro__)
    return any(isinstance(member, functools.cached_property) for member in members)


def describe(
    value: Any, is_users: Callable[[Any], bool], met: dict[int, int] | None = None
) -> Iterator[Any]:
    """Yields what a value is made of, in a fixed order.

    Args:
      value: Whatever a module holds.
      is_users: Whether a function, a class or an object's class is the user's own.
      met: The numbers of what was met before, by `id`; a loop ends there.

    Yields:
      Texts, and functions and classes of the user's, which are to be read.

    Raises:
      UnknownValueError: If a part is of a kind that nobody knows.
    """
    kind, met = type(value), {} if met is None else met
    if value is None or kind in _NUMBERS:
        yield constant(value)
        return
    if id(value) in met:
        yield f"again {met[id(value)]}"
        return
    met[id(value)] = len(met)
    if isinstance(value, type | types.FunctionType) or (
        callable(value) and not is_users(kind) and hasattr(value, "__wrapped__")
    ):
        yield value if is_users(value) else _library_name(value)
    elif is_users(kind):
        yield kind
        yield from _contents(value, is_users, met)
        if not isinstance(value, enum.Enum):  # its class says the rest
            yield from _parts("object", state_of(value), is_users, met)
    elif isinstance(value, functools.partial):
        arguments = {"args": value.args, "keywords": value.keywords}
        yield from _parts("partial", {"func": value.func, **arguments}, is_users, met)
    elif isinstance(value, types.MethodType):
        parts = {"func": value.__func__, "self": value.__self__}
        yield from _parts("method", parts, is_users, met)
    else:
        yield from _of_library(value, is_users, met)


def _of_library(value: Any, is_users, met) -> Iterator[Any]:
    if isinstance(value, re.Pattern):  # its repr is cut
        yield f"pattern {value.pattern!r} {value.flags}"
    elif isinstance(value, _SAY_ALL) or _is_array(value) or type(value).__name__ == "dtype":
        yield constant(value)
    elif _is_container(value) or isinstance(value, enum.Enum):
        yield name_of(type(value))
        yield from _contents(value, is_users, met)
    elif isinstance(value, _BUNCHES) or dataclasses.is_dataclass(value):
        yield from _parts(name_of(type(value)), state_of(value), is_users, met)
    else:
        yield _library_name(value)


def _is_container(value: Any) -> bool:
    # ml_collections.ConfigDict is no Mapping, but dict() takes it.
    kinds = (list, tuple, set, frozenset, collections.deque, Mapping)
    return isinstance(value, kinds) or all(hasattr(value, n) for n in ("keys", "__getitem__"))


def _contents(value: Any, is_users, met) -> Iterator[Any]:
    """What a container contains, and what a user's kind of number or text is."""
    if isinstance(value, enum.Enum):
        yield value._name_
    elif isinstance(value, dict):
        yield from _parts("mapping", dict(dict.items(value)), is_users, met)
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        entries = in_order(value) if isinstance(value, set | frozenset) else list(value)
        yield from _parts("entries", dict(enumerate(entries)), is_users, met)
    elif isinstance(value, _NUMBERS):
        base = next(kind for kind in _NUMBERS if isinstance(value, kind))
        yield base.__repr__(value)
    elif not is_users(type(value)) and _is_container(value):
        yield from _parts("mapping", {key: value[key] for key in iter(value)}, is_users, met)


def _parts(title: str, parts: Mapping[Any, Any], is_users, met) -> Iterator[Any]:
    yield f"{title} of {len(parts)}"
    for name, part in parts.items():
        yield from describe(name, is_users, met)
        yield from describe(part, is_users, met)


def _library_name(value: Any) -> str:
    """The name by which a library has this very thing."""
    path = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    for module in (getattr(value, "__module__", None), type(value).__module__):
        owner = sys.modules.get(module) if isinstance(module, str) else None
        for part in str(path).split("."):
            owner = getattr(owner, part, None)
        if owner is value and path:
            return f"{module}:{path}"
    raise UnknownValueError(type(value).__name__)
