"""What an option of a function may be: its annotation, its default and its name say it."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from robust_ssl.build.entries import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Range,
    Share,
    is_union,
    near,
    read,
)

# What an option means goes by its name, the same in every function of this package: so each number
# has its limits in one place.  A function from elsewhere has those of its own annotations.
OPTIONS: dict[str, Any] = {
    "num_steps": Count,
    "restarts": Count,
    "step_size": Annotated[float, Range(0, 1, above=True)],
    "epsilon": Share,
    "momentum": Share,
    "learning_rate": Positive,
    "width": Count,
    "size": Count,
    "replays": Count,
    "clean_share": Share,
    "target": Natural,
    "temperature": Positive,
    "noise": NotNegative,
    "smoothing": Annotated[float, Range(0, 1, below=True)],
    "stabilizer": Positive,
    "image_size": Count,
    "projection_dim": Count,
    "hidden": Count,
    "predictor_hidden": Count,
    "num_prototypes": Count,
    "queue_size": Natural,
    "min_scale": Share,
    "low": NotNegative,
    "high": Positive,
    "n": Count,
    "final_momentum": Share,
    "teacher_temperature": Positive,
    "freeze": NotNegative,
    "smoothness": Positive,
    "renew_every": Count,
    "eot": Count,
    "fraction": Share,
    "quality": Annotated[float, Range(0, 100, above=True)],
    "levels": Annotated[int, Range(2)],
    "weight": NotNegative,
    "share": Share,
    "adv_ratio": Share,
    "tolerance": Share,
    "epochs": Natural,
    "images": Count,
    "num_clusters": Count,
    "images_at_once": Count,
    "noise_vectors": Count,
    "fine_step_size": Annotated[float, Range(0, 1, above=True)],
    "rank": Count,
    "num_queries": Count,
    "key_temperature": Positive,
    "first_teacher_temperature": Positive,
    "center_momentum": Share,
    "local_crops": Natural,
    "local_size": Count,
    "whitening_size": Annotated[int, Range(2)],
    "group_size": Count,
    "sinkhorn_steps": Count,
    "kmeans_steps": Count,
    "num_clusterings": Count,
    "invariance": NotNegative,
    "variance": NotNegative,
    "covariance": NotNegative,
    "redundancy": NotNegative,
    "queue_start": NotNegative,
    "warmup": NotNegative,
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_LISTS = (tuple, list, Sequence)


def read_option(value: Any, hint: Any, default: Any, where: str) -> Any:
    """Returns an option that is no function, or says why it cannot be one.

    Args:
      value: Plain JSON values.
      hint: The parameter's annotation; `Any` if it has none, then its default's kind counts.
      default: The parameter's default.
      where: The option's name, for errors.

    Raises:
      ValueError: If it is of another kind.
    """
    kinds = _kinds(hint, default)
    if isinstance(value, np.number | np.bool_):
        value = value.item()
    # Many a signature says `float` and means that None is its default's other word.
    if value is None and (default is None or type(None) in kinds):
        return None
    lists = [kind for kind in kinds if _origin(kind) in _LISTS]
    if isinstance(value, list | tuple) and lists:
        return tuple(_read_items(value, lists[0], where))
    if Any in kinds:
        return tuple(value) if isinstance(value, list) else value
    choices = [word for kind in kinds for word in _choices(kind)]
    if isinstance(value, str) and choices and str not in kinds and value not in choices:
        raise ValueError(f"{where} must be {_wanted(kinds)}, got {value!r}{near(value, choices)}")
    for kind in kinds:
        if typing.get_origin(kind) is Annotated:
            return read(kind, value, where)
        if _fits(kind, value):
            return value
    raise ValueError(f"{where} must be {_wanted(kinds)}, got {value!r}")


def limited(value: Any, name: str, where: str) -> Any:
    """Returns a number, or a list of them, unless it is out of the range that its name has."""
    if isinstance(value, tuple):
        for place, item in enumerate(value):
            limited(item, name, f"{where}[{place}]")
    elif isinstance(value, int | float) and not isinstance(value, bool) and name in OPTIONS:
        return read(OPTIONS[name], value, where)
    return value


def may_be_function(hint: Any, default: Any) -> bool:
    """Whether what an option may be is called, or is not known."""
    return any(
        kind is Any or _is_function(kind) or _is_unknown(kind) for kind in _kinds(hint, default)
    )


def _kinds(hint: Any, default: Any) -> tuple[Any, ...]:
    if is_union(hint):
        return typing.get_args(hint)
    if hint is Any and isinstance(default, bool | int | float | str):
        # Without an annotation 1 may be meant as 1.0, but never as a text.
        return (float,) if type(default) is int else (type(default),)
    return (hint,)


def _read_items(value: Sequence[Any], kind: Any, where: str) -> list[Any]:
    arguments = [a for a in typing.get_args(kind) if a is not Ellipsis] or [Any]
    fixed = _origin(kind) is tuple and Ellipsis not in typing.get_args(kind) and len(arguments) > 1
    if fixed and len(value) != len(arguments):
        raise ValueError(f"{where} must be a list of {len(arguments)}, got {list(value)!r}")
    hints = arguments if fixed else [arguments[0]] * len(value)
    missing = object()
    return [
        read_option(item, hint, missing, f"{where}[{place}]")
        for place, (item, hint) in enumerate(zip(value, hints, strict=True))
    ]


def _fits(kind: Any, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return number and isinstance(value, int)
    if kind is float or _is_array(kind):  # a text has no arrays: what stands for one is a number
        return number
    if kind is str:
        return isinstance(value, str)
    if choices := _choices(kind):
        return value in choices
    if _origin(kind) in (Mapping, dict):
        return isinstance(value, Mapping)
    return _is_unknown(kind)


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _is_array(kind: Any) -> bool:
    return kind in (jax.Array, np.ndarray)


def _is_function(kind: Any) -> bool:
    return _origin(kind) is Callable or getattr(kind, "_is_protocol", False)


def _is_unknown(kind: Any) -> bool:
    """Whether it is some class, of which a text cannot be said not to stand for it."""
    known = (*_WORDS, *_LISTS, Mapping, dict, types.NoneType, Annotated, typing.Literal)
    return not (_origin(kind) in known or _is_array(kind) or _is_function(kind))


def _wanted(kinds: Sequence[Any]) -> str:
    words = []
    for kind in kinds:
        if choices := _choices(kind):
            words.append(f"one of {', '.join(map(repr, choices))}")
        elif _is_array(kind):
            words.append("a number")
        elif _is_function(kind):
            words.append('"module:function"')
        elif _origin(kind) in _LISTS:
            words.append("a list")
        elif _origin(kind) in (Mapping, dict):
            words.append("a mapping")
        elif kind in _WORDS:
            words.append(_WORDS[kind])
    return " or ".join(dict.fromkeys(words)) or "another kind of value"
