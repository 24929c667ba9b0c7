"""Frozen dataclasses that are pytrees, as `flax.struct` has them, which `jax.jit` tells apart.

`flax.struct.dataclass` registers its classes with ``jax.tree_util.register_dataclass``.  Up to jax
0.12, the tree structures of two such classes compare *equal* if they have as many fields and the
same static values: ``L2(0.5)`` and ``Linf(0.5)`` would be one structure.  Their hashes differ, so a
compiled function nearly always finds the right program.  Where the hashes meet in seven bits of a
table, in one process of a hundred, it silently runs the program of the other class.  The classes of
this package, and those that are put into it, are registered the general way, which compares
classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import jax
import numpy as np
from flax.struct import field
from jax.tree_util import GetAttrKey

__all__ = ["Value", "as_floats", "dataclass", "field"]

T = TypeVar("T")

if TYPE_CHECKING:
    from typing import Self

    class Value:
        """A base for classes whose `replace` type checkers should know; at run time `object`."""

        def replace(self, **updates: Any) -> Self:
            """Returns a copy with other values."""
            raise NotImplementedError

else:
    Value = object


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree, with a method ``replace(**updates)``.

    Every field is a child, but those made by ``field(pytree_node=False)``, which are static: part
    of the structure, hashable, and another value compiles again.

    A method ``__check_init__(self)`` is called where a value is made or replaced, and not where
    JAX puts one together, whose leaves may be anything: there belong checks of the leaves.

    Args:
      cls: A class with annotated fields.

    Returns:
      The class, frozen and registered with JAX.

    Example:
      >>> @dataclass
      ... class Shift:
      ...     by: float
      ...     axis: int = field(pytree_node=False, default=0)
      >>> jax.tree.map(lambda leaf: 2 * leaf, Shift(0.25)).replace(axis=1)
      Shift(by=0.5, axis=1)
    """
    frozen: Any = dataclasses.dataclass(frozen=True)(cls)
    init = frozen.__init__
    fields = [(f.name, f.metadata.get("pytree_node", True)) for f in dataclasses.fields(frozen)]
    children = [name for name, is_child in fields if is_child]
    static = [name for name, is_child in fields if not is_child]

    def flatten(value):
        leaves = [getattr(value, name) for name in children]
        return leaves, tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value):
        leaves, rest = flatten(value)
        return list(zip(map(GetAttrKey, children), leaves, strict=True)), rest

    def unflatten(rest, leaves):
        value = object.__new__(frozen)
        init(value, **dict(zip([*children, *static], [*leaves, *rest], strict=True)))
        return value

    frozen.replace = dataclasses.replace
    frozen.__init__ = _naming_what_it_takes(frozen, [*children, *static])
    # `flatten` besides, since it is what every call of a compiled function does, and is faster.
    jax.tree_util.register_pytree_with_keys(frozen, flatten_with_keys, unflatten, flatten)
    return frozen


def check_passable(value: Any) -> None:
    """Raises ValueError for an object that no compiled function takes as an argument.

    Example:
      >>> check_passable({"an array": 1.0})
      >>> check_passable(object())
      Traceback (most recent call last):
      ValueError: object is no pytree, so no compiled step takes it: make its class with
      robust_ssl.struct.dataclass
    """
    number = hasattr(value, "dtype") or isinstance(value, int | float | complex)
    if not number and any(leaf is value for leaf in jax.tree.leaves(value)):
        raise ValueError(
            f"{type(value).__name__} is no pytree, so no compiled step takes it: make its class "
            "with robust_ssl.struct.dataclass"
        )


def _naming_what_it_takes(cls: type, fields: Sequence[str]) -> Callable[..., None]:
    """Returns ``cls.__init__`` that says what it takes of an unknown argument, and checks."""
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]  # of this very class

    @functools.wraps(init)
    def init_or_say(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except TypeError as error:
            unknown = next((name for name in kwargs if name not in fields), None)
            if unknown is None:
                raise
            raise TypeError(_unknown(cls, unknown, fields)) from error
        if hasattr(self, "__check_init__"):
            self.__check_init__()

    return init_or_say


def _unknown(cls: type, name: str, fields: Sequence[str]) -> str:
    takes = f"{cls.__name__} takes no {name!r}; it takes {', '.join(fields) or 'nothing'}"
    # What is guessed first, since other libraries have the budget in the attack.
    if name in ("eps", "epsilon", "epsilons"):
        if "threat" in fields:
            return f"{takes}. Its budget is a threat: threat=robust_ssl.threats.Linf(8 / 255)"
        if hasattr(cls, "step") and hasattr(cls, "delta"):
            return (
                f"{takes}. Its budget is said where it is fitted: robust_ssl.attack(encoder, "
                f"images, attack={cls.__name__}(), epsilon=8 / 255)"
            )
    close = difflib.get_close_matches(name, fields, n=1)
    return f"{takes}; did you mean {close[0]!r}?" if close else takes


# --- What a `repr` shows --------------------------------------------------------------------------

COLUMNS = 100  # of a line of it


def is_number(leaf: Any) -> bool:
    """Returns whether a leaf is a number whose value can be looked at, and no array.

    Example:
      >>> is_number(0.5), is_number(jax.numpy.ones(())), is_number(None)
      (True, False, False)
    """
    return isinstance(leaf, int | float | np.number) and not isinstance(leaf, bool)


def kind(leaf: Any) -> str:
    """Returns ``float32[2, 64]``; leaves may be tracers, or placeholders without a shape."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return "None" if leaf is None else type(leaf).__name__


def size(tree: Any) -> str:
    """Returns how many arrays and numbers there are in a tree."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return f"{len(shapes)} arrays, {sum(map(math.prod, shapes)):,} numbers"


def count(variables: Any) -> str:
    """Returns how many parameters there are in variables."""
    params = variables.get("params") if isinstance(variables, Mapping) else None
    shapes = [leaf.shape for leaf in jax.tree.leaves(params) if hasattr(leaf, "shape")]
    return f"{sum(map(math.prod, shapes)):,} parameters" if shapes else "no parameters of JAX"


def lines(*lines: str) -> str:
    """Joins lines, of which none is longer than `COLUMNS` nor has a line break in it."""
    whole = [line if "\n" not in line else " ".join(line.split()) for line in lines]
    return "\n".join(x if len(x) <= COLUMNS else x[: COLUMNS - 3] + "..." for x in whole)


def as_floats(tree: T) -> T:
    """Returns a pytree with whole numbers as floats, but those of fields that say ``int``.

    Example:
      >>> @dataclass
      ... class Steps:
      ...     length: float
      ...     times: int
      >>> as_floats(Steps(1, 2))
      Steps(length=1.0, times=2)
    """

    def leaf_as_float(path: Sequence[Any], leaf: Any) -> Any:
        if type(leaf) is not int or _says_int(tree, [getattr(step, "name", "") for step in path]):
            return leaf
        return float(leaf)

    return jax.tree_util.tree_map_with_path(leaf_as_float, tree)


def _says_int(tree: Any, names: Sequence[str]) -> bool:
    owner = functools.reduce(lambda value, name: getattr(value, name, None), names[:-1], tree)
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    return any(f.name == names[-1] and f.type in (int, "int") for f in fields)
