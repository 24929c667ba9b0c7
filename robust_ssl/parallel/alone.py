"""What a program cannot be kept for: functions and objects whose surroundings may have changed.

A compiled function holds what it has closed over as it was when it was traced.  A function of a
user's may read weights that are trained on between two calls, so each call compiles it anew.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

MOST = 8  # such functions whose weights JAX holds at once
_numbers = itertools.count(1)

# What `robust_ssl.types` keeps traced, whatever program holds it: a new one reads no other globals.
_KEPT = ("preprocess",)


def reads_more(value: Any) -> bool:
    """Whether a value may compute with more than its own arrays and choices.

    Functions and objects from outside this package may, and what holds one; an `Encoder` or a
    `Classifier` does not.

    Args:
      value: A model, an attack, or lists and mappings of them.

    Example:
      >>> reads_more(max), reads_more({"w": 2.0})
      (True, False)
    """
    if isinstance(value, Mapping):
        return any(map(reads_more, value.values()))
    if isinstance(value, list | tuple):
        return any(map(reads_more, value))
    if isinstance(value, functools.partial):  # jax.tree_util.Partial too
        return reads_more([value.func, value.args, value.keywords])
    if isinstance(value, types.FunctionType | type):
        return not _of_package(value)
    if isinstance(value, nn.Module):
        return False
    if not dataclasses.is_dataclass(value):
        return callable(value) and not _of_package(type(value))
    held = [getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in _KEPT]
    return (
        bool(getattr(value, "closes_over", False))
        or not _of_package(type(value))
        or any(map(reads_more, held))
    )


class Programs:
    """Programs that go with whoever has them, or a few calls later."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        # Of what `pmap` has seen JAX (0.10) lets go only so: one copy of the weights a call.
        if next(_numbers) % MOST == 0:
            jax.clear_caches()

    def made(self, make: Callable, *arguments: Any) -> Any:
        """Returns ``make(*arguments)``, made once."""
        # By identity: what is brought need not hash.
        key = (make, *map(id, arguments))
        if key not in self._made:
            self._made[key] = (make(*arguments), arguments)  # kept, else an id were another's
        return self._made[key][0]


@functools.lru_cache(maxsize=80)
def kept(make: Callable, *arguments: Any) -> Any:
    """Returns ``make(*arguments)``, made once in this process."""
    return make(*arguments)


def _of_package(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] == "robust_ssl"
