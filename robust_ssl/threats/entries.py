"""Threats as a few small arrays by name, for files that NumPy alone can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.threats.balls import L2, Linf, check
from robust_ssl.threats.band import Band
from robust_ssl.threats.patch import Patch

_KINDS = {"Linf": Linf, "L2": L2, "Patch": Patch, "Band": Band}


def to_entries(threat: Any) -> dict[str, np.ndarray]:
    """Returns a threat of this package as small NumPy arrays by name, for a file.

    Raises:
      ValueError: If it is not a threat of this package.

    Example:
      >>> {name: entry.tolist() for name, entry in to_entries(L2(0.5)).items()}
      {'epsilon': 0.5, 'kind': 'L2'}
    """
    kind = type(threat).__name__
    if _KINDS.get(kind) is not type(threat):
        raise ValueError(f"only the threats {sorted(_KINDS)} can be saved, got {kind}")
    if isinstance(threat, Patch):
        entries = {"area": np.asarray(threat.area, np.float32), "location": threat.location}
    elif isinstance(threat, Band):
        inner = to_entries(threat.threat)
        edges = {name: np.asarray(getattr(threat, name), np.float32) for name in ("low", "high")}
        entries = {**inner, **edges, "inner": inner["kind"]}
    else:
        entries = {"epsilon": np.asarray(threat.epsilon, np.float32)}
    return {name: np.asarray(entry) for name, entry in {**entries, "kind": kind}.items()}


def from_entries(entries: Mapping[str, np.ndarray]) -> Any:
    """Returns the threat that `to_entries` took apart.

    Raises:
      ValueError: If an entry is missing or not possible; the message says which.
    """
    kind = str(entries.get("kind", "missing"))
    if kind not in _KINDS:
        raise ValueError(f"expected a threat of {sorted(_KINDS)}, got {kind!r}")
    needed = {"Patch": ("area", "location"), "Band": ("low", "high", "inner")}
    absent = [name for name in needed.get(kind, ("epsilon",)) if name not in entries]
    if absent:
        raise ValueError(f"the threat {kind} has no entry {' and no '.join(absent)}")
    if kind == "Patch":
        threat = Patch(_number(entries, "area"), str(entries["location"]))
    elif kind == "Band":
        if str(entries["inner"]) == "Band":
            raise ValueError("a band inside a band cannot be loaded")
        inner = from_entries({**entries, "kind": entries["inner"]})
        threat = Band(inner, _number(entries, "low"), _number(entries, "high"))
    else:
        threat = _KINDS[kind](_number(entries, "epsilon"))
    check(threat)
    return threat


def _number(entries: Mapping[str, np.ndarray], name: str) -> jax.Array:
    value = np.asarray(entries[name])
    if value.shape or value.dtype.kind not in "fiu":
        raise ValueError(f"expected one number as {name}, got {value!r}")
    return jnp.asarray(value, jnp.float32)
