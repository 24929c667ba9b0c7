"""Text becomes typed values: numbers with limits, lists, mappings, frozen dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers an entry may be; goes into ``Annotated[float, Range(0, 1)]``.

    Attributes:
      low: The least one.
      high: The largest one.
      above: Whether `low` itself is too small.
      below: Whether `high` itself is too large.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and over and under

    def describe(self, number: str) -> str:
        """Returns the words for these numbers: ``"number"`` or ``"whole number"`` with limits."""
        if self.high < math.inf:
            left, right = "(" if self.above else "[", ")" if self.below else "]"
            low, high = (f"{end:g}" if end % 1 else str(int(end)) for end in (self.low, self.high))
            return f"a {number} in {left}{low}, {high}{right}"
        if self.low == -math.inf:
            return f"a finite {number}"
        return f"a {number} {'above' if self.above else 'of at least'} {self.low:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX's keys: of 2**32 they are those of 0
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]


def near(name: str, known: Iterable[str]) -> str:
    """Returns what to say after naming something unknown: near names, else all.

    Example:
      >>> near("epoch", ["epochs", "decay"])
      "; did you mean 'epochs'?"
      >>> near("FGSM", ["fgsm", "pgd"])
      "; did you mean 'fgsm'?"
    """
    known = [str(entry) for entry in known]
    same = [entry for entry in known if entry.lower() == str(name).lower()]
    close = same or difflib.get_close_matches(str(name), known, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known: {', '.join(known)}" if known else ""


def check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ValueError for an unknown name, with near ones; for a misspelt one first of all."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    # The misspelt name of a function makes its options unknown too.
    misspelt = [name for name in unknown if difflib.get_close_matches(name, known)]
    for name in misspelt or unknown:
        raise ValueError(f"unknown entry {name!r} in {where}{near(name, known)}")


def read(kind: Any, value: Any, where: str) -> Any:
    """Turns text into a value of a kind, or says which entry is wrong, and how.

    Args:
      kind: ``int``, ``float``, ``bool``, ``str``, ``Annotated`` numbers with a `Range`,
        ``Literal``, ``X | None``, ``tuple[X, ...]``, ``Mapping[str, X]``, a class with a function
        ``read(value, where)``, or a dataclass, whose fields are the entries of a mapping.
      value: Plain JSON values.
      where: The entry's name, for errors: ``"config.suite"``.

    Raises:
      ValueError: If an entry is unknown (with near names), missing, of another kind or out of
        range.

    Example:
      >>> read(tuple[Share, ...], [0.5, 1], "config.shares")
      (0.5, 1.0)
      >>> read(Count, 0, "config.epochs")
      Traceback (most recent call last):
      ...
      ValueError: config.epochs must be a whole number of at least 1, got 0
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _read_number(arguments[0], arguments[1], value, where)
    if is_union(kind):
        if value is None and type(None) in arguments:
            return None
        [wanted] = [argument for argument in arguments if argument is not type(None)]
        return read(wanted, value, where)
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in arguments:
            words = ", ".join(map(repr, arguments))
            raise ValueError(f"{where} must be one of {words}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, even for one value, got {value!r}")
        return tuple(read(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (Mapping, dict):
        entries, kind = _mapping(value, where), arguments[1]
        if kind is not Any and not (is_union(kind) and type(None) in typing.get_args(kind)):
            entries = without_none(entries)
        return {str(n): read(kind, v, f"{where}.{n}") for n, v in entries.items()}
    if hasattr(kind, "read"):
        return kind.read(value, where)
    if dataclasses.is_dataclass(kind):
        return read_entries(kind, value, where)
    if kind in (int, float):
        return _read_number(kind, Range(), value, where)
    if not isinstance(value, kind):
        words = {bool: "true or false", str: "a text"}.get(kind, f"a {kind.__name__}")
        raise ValueError(f"{where} must be {words}, got {value!r}")
    return value


def read_entries(kind: type, value: Any, where: str, **linked: Any) -> Any:
    """Returns a dataclass of a mapping's entries.

    Args:
      kind: The dataclass; a field without a default must be there.
      value: The mapping.
      where: Its name, for errors.
      **linked: Fields that are given as values.
    """
    entries = _mapping(value, where)
    hints = annotations(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    names = [field.name for field in fields if not field.metadata.get("hidden")]
    check_known(entries, names, where)
    values = {}
    for field in fields:
        if field.name in linked:
            values[field.name] = linked[field.name]
        elif field.name in entries:
            place = f"{where}.{field.name}"
            values[field.name] = read(hints[field.name], entries[field.name], place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} needs an entry {field.name!r}")
    with inside(where):
        return kind(**values)


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields; evaluating them is half of planning."""
    return typing.get_type_hints(kind, include_extras=True)


def without_none(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is named without the names that None leaves out.

    Example:
      >>> without_none({"pgd": 1, "fab": None})
      {'pgd': 1}
    """
    return {name: value for name, value in named.items() if value is not None}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return value


def _read_number(kind: type, limits: Range, value: Any, where: str) -> Any:
    whole = numbers.Integral if kind is int else numbers.Real  # NumPy's scalars are such
    number = isinstance(value, whole) and not isinstance(value, bool)
    if not number or value not in limits:
        words = limits.describe("whole number" if kind is int else "number")
        raise ValueError(f"{where} must be {words}, got {value!r}")
    return kind(value)


@contextlib.contextmanager
def inside(where: str) -> Iterator[None]:
    """Says of a ValueError which entry it comes from, unless it says so itself."""
    try:
        yield
    except ValueError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


def text_of(value: Any) -> Any:
    """Returns what a value was read from, as plain JSON values: what a manifest keeps.

    Example:
      >>> from robust_ssl.build import Function
      >>> text_of({"rate": 1e-3, "loss": Function.read("robust_ssl.losses:trades_kl", "here")})
      {'rate': 0.001, 'loss': 'robust_ssl.losses:trades_kl'}
    """
    if hasattr(value, "text"):
        return text_of(value.text)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        text = {}
        for field in dataclasses.fields(value):
            entry = getattr(value, field.name)
            # One that came later is not said where it does nothing: manifests of before are so.
            if not field.metadata.get("later") or entry != field.default:
                text[field.name] = text_of(entry)
        return text
    if isinstance(value, Mapping):
        return {str(name): text_of(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [text_of(entry) for entry in value]
    if callable(value):
        return _findable_name(value)
    # JSON has no scalars of NumPy.
    return value.item() if isinstance(value, numbers.Real) and hasattr(value, "item") else value


def _findable_name(function: Callable[..., Any]) -> str:
    """Returns ``"module:name"``; raises ValueError unless that leads to this very function."""
    name = name_of(function)
    module, _, attribute = name.partition(":")
    if getattr(sys.modules.get(module), attribute, None) is not function:
        raise ValueError(
            f"{function!r} is no function or class that a module has by its own name, so no config "
            'can keep it; write {"function": "module:name", **options}, or give a name in a module '
            "to what this makes"
        )
    return name


def name_of(function: Callable[..., Any]) -> str:
    """Returns ``"module:name"`` of a function or a value."""
    module = getattr(function, "__module__", "")
    return f"{module}:{getattr(function, '__qualname__', type(function).__name__)}"


def is_union(hint: Any) -> bool:
    """Whether an annotation is ``X | Y``."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
