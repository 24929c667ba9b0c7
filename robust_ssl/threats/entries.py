"""Threats as a few small arrays by name, for files that NumPy alone can read.

A file names the class of a user's threat, ``"module:Class"``, so that a reader knows what it needs.
Nothing that a file names is imported: whoever loads it passes the class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.threats.balls import L2, Linf, check_budget
from robust_ssl.threats.band import Band
from robust_ssl.threats.patch import Patch

_KINDS = {"Linf": Linf, "L2": L2, "Patch": Patch, "Band": Band}
_FIELD = "field."  # before a user's field, which may be called `name` or `delta` as the file's own


def check_saveable(threat: Any) -> None:
    """Raises ValueError if a threat cannot be saved, naming the field; for before a fit.

    Args:
      threat: A threat of this package, or a dataclass (`robust_ssl.struct.dataclass` or Python's)
        whose fields are numbers, arrays, strings, bools, other such threats, or None where that is
        the default.

    Raises:
      ValueError: If it is no dataclass, a field holds something else, or a band is in a band.

    Example:
      >>> check_saveable(Band(Linf(0.1)))
      >>> check_saveable(Band(Band(Linf(0.1), low=0.1), high=0.2))
      Traceback (most recent call last):
      ValueError: a Band inside a Band cannot be saved; make one Band of what both let through
    """
    to_entries(threat)


def to_entries(threat: Any) -> dict[str, np.ndarray]:
    """Returns a threat as small NumPy arrays by name, for a file.

    Raises:
      ValueError: As `check_saveable`.

    Example:
      >>> {name: entry.tolist() for name, entry in to_entries(L2(0.5)).items()}
      {'epsilon': 0.5, 'kind': 'L2'}
    """
    kind = _kind_of(threat)
    if isinstance(threat, Patch) and kind == "Patch":
        entries = {"area": np.asarray(threat.area, np.float32), "location": threat.location}
    elif isinstance(threat, Band) and kind == "Band":
        inner = to_entries(threat.threat)
        if inner["kind"] == "Band":
            raise ValueError(
                "a Band inside a Band cannot be saved; make one Band of what both let through"
            )
        edges = {name: np.asarray(getattr(threat, name), np.float32) for name in ("low", "high")}
        entries = {**inner, **edges, "inner": inner["kind"]}
    elif kind in _KINDS:
        entries = {"epsilon": np.asarray(threat.epsilon, np.float32)}
    else:
        entries = _fields_to_entries(threat, kind)
    return {name: np.asarray(entry) for name, entry in {**entries, "kind": kind}.items()}


def from_entries(
    entries: Mapping[str, np.ndarray],
    threat: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Returns the threat that `to_entries` took apart.

    Args:
      entries: What a file holds.
      threat: The class of a user's threat, or any callable that takes its fields as keywords; a
        mapping from kinds to those where several are in each other.

    Raises:
      ValueError: If an entry is missing or not possible, or the class is needed and not given; the
        message says which.

    Example:
      >>> from_entries(to_entries(L2(0.5)))
      L2(epsilon=Array(0.5, dtype=float32))
    """
    kind = str(entries.get("kind", "missing"))
    if kind not in _KINDS:
        value = _users_threat(kind, entries, threat)
        check_budget(value)
        return value
    needed = {"Patch": ("area", "location"), "Band": ("low", "high", "inner")}
    absent = [name for name in needed.get(kind, ("epsilon",)) if name not in entries]
    if absent:
        raise ValueError(f"the threat {kind} has no entry {' and no '.join(absent)}")
    if kind == "Patch":
        value = Patch(_number(entries, "area"), str(entries["location"]))
    elif kind == "Band":
        if str(entries["inner"]) == "Band":
            raise ValueError("a band inside a band cannot be loaded")
        inner = from_entries({**entries, "kind": entries["inner"]}, threat)
        value = Band(inner, _number(entries, "low"), _number(entries, "high"))
    else:
        value = _KINDS[kind](_number(entries, "epsilon"))
    check_budget(value)
    return value


def _number(entries: Mapping[str, np.ndarray], name: str) -> jax.Array:
    value = np.asarray(entries[name])
    if value.shape or value.dtype.kind not in "fiu":
        raise ValueError(f"expected one number as {name}, got {value!r}")
    return jnp.asarray(value, jnp.float32)


# ------------------------------------------------------------------------------- a user's threats


def _kind_of(threat: Any) -> str:
    kind = type(threat)
    # By identity: a user's class may be called Linf, or be a subclass of it.
    if _KINDS.get(kind.__name__) is kind:
        return kind.__name__
    return f"{kind.__module__}:{kind.__qualname__}"


def _fields_to_entries(threat: Any, kind: str) -> dict[str, Any]:
    if isinstance(threat, type) or not dataclasses.is_dataclass(threat):
        raise ValueError(
            f"the threat {kind} cannot be saved: it is no dataclass, so its fields are not known; "
            "make its class with robust_ssl.struct.dataclass"
        )
    entries = {}
    for field in dataclasses.fields(threat):
        value = getattr(threat, field.name)
        if not field.init or (value is None and field.default is None):
            continue  # loading makes it again
        if dataclasses.is_dataclass(value):
            for name, entry in to_entries(value).items():
                entries[f"{_FIELD}{field.name}.{name}"] = entry
            continue
        if not _is_plain(value):
            raise ValueError(
                f"the threat {kind} cannot be saved: its field {field.name!r} is a "
                f"{type(value).__name__}, not a number, an array, a string, a bool or such a threat"
            )
        entries[f"{_FIELD}{field.name}"] = np.asarray(value)
    return entries


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return True
    # Random keys and bfloat16 are arrays to JAX, but nothing that NumPy alone can read back.
    plain = isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array)
    dtype = getattr(value, "dtype", np.dtype(float))
    return plain and getattr(dtype, "kind", "none") in tuple("biuf")


def _users_threat(kind: str, entries: Mapping[str, np.ndarray], threat: Any) -> Any:
    if ":" not in kind:
        raise ValueError(f"expected a threat of {sorted(_KINDS)}, got {kind!r}")
    make = threat.get(kind) if isinstance(threat, Mapping) else threat
    if make is None:
        raise ValueError(
            f"the threat is of the kind {kind!r}, which is not of this package; nothing a file "
            f"names is imported, so pass its class: threat={kind.rpartition(':')[2]} (or, of "
            f"several, threat={{{kind!r}: ...}})"
        )
    fields: dict[str, Any] = {}
    inner: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in entries.items():
        if not name.startswith(_FIELD):
            continue
        field, dot, rest = name.removeprefix(_FIELD).partition(".")
        if dot:
            inner.setdefault(field, {})[rest] = entry
        else:
            fields[field] = _field_value(field, np.asarray(entry))
    for field, parts in inner.items():
        foreign = ":" in str(parts.get("kind", ""))
        if foreign and not isinstance(threat, Mapping):
            raise ValueError(
                f"the threat {kind!r} holds another one, {str(parts['kind'])!r}, in {field!r}: "
                "pass a mapping from both kinds to their classes as threat="
            )
        fields[field] = from_entries(parts, threat)
    try:
        return make(**fields)
    except TypeError as error:
        names = ", ".join(sorted(fields))
        raise ValueError(f"{kind!r} cannot be made of its fields {names}: {error}") from error


def _field_value(name: str, entry: np.ndarray) -> Any:
    if not (entry.dtype.kind in "biuf" or (entry.dtype.kind == "U" and not entry.ndim)):
        raise ValueError(f"expected a number, an array or a string as {name}, got {entry.dtype}")
    # A Python value where there is one: a static field must hash.
    return jnp.asarray(entry) if entry.ndim else entry.item()
