"""The budget of the inner attack over the steps of one training: none, then rising, then all."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, tree_flatten_with_path, tree_map_with_path

from robust_ssl import struct

SCALED = ("epsilon", "step_size")  # fields of an attack and of its threat, pixel units

AttackT = TypeVar("AttackT")


@struct.dataclass
class BudgetSchedule:
    r"""Says which share of its budget the attack has at a step, in [0, 1].

    .. math:: s(t) = 0 \;(t < a), \quad \frac{t - a + 1}{b - a + 1} \;(a \le t < b), \quad 1

    A network that was not pre-trained to be robust learns the task first, on clean images.  What
    meets the whole budget at once learns late, or never.  With ``b = a`` the budget comes at once.

    Attributes:
      first: `a`, the first step that is attacked.  A leaf.
      full: `b`, the first step with the whole budget, at least `first`.  A leaf.
      stairs: None rises with every step; a number of equal stairs between none and all, ``1 / (n +
        1), ..., n / (n + 1)``, keeps a budget for a while.

    Example:
      >>> schedule = BudgetSchedule(first=2, full=5)
      >>> [float(schedule(step)) for step in range(7)]
      [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
      >>> [float(schedule.replace(stairs=1)(step)) for step in range(7)]
      [0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0]

    References:
      Ngnawe et al., "Epsilon-Scheduling", ICLR 2026: from a quarter to three quarters of training.
    """

    first: jax.Array | int
    full: jax.Array | int
    stairs: int | None = struct.field(pytree_node=False, default=None)

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """Returns the share of a step, float32 scalar."""
        risen, length = step - self.first, self.full - self.first
        if self.stairs is None:
            share = (risen + 1) / (length + 1)
        else:
            stair = (self.stairs * risen) // jnp.maximum(length, 1)
            share = (stair + 1) / (self.stairs + 1)
        share = jnp.where(step >= self.full, 1.0, share)
        return jnp.where(step < self.first, 0.0, share).astype(jnp.float32)


def scaled(attack: AttackT, share: jax.Array | float) -> AttackT:
    """Returns an attack with a share of its budget, in steps that are as much shorter.

    Every field `epsilon` and `step_size` is multiplied, the threat's among them.  A step that is
    not said (None) stays the attack's own: of `PGD` under Linf 2/255, under L2 a part of the
    budget.

    Example:
      >>> from robust_ssl import attacks, threats
      >>> half = scaled(attacks.PGD(threats.Linf(0.25), step_size=0.125), 0.5)
      >>> half.threat.epsilon, half.step_size
      (0.125, 0.0625)
    """
    return tree_map_with_path(lambda path, leaf: leaf * share if _is_scaled(path) else leaf, attack)


def has_budget(attack: Any) -> bool:
    """Returns whether there is an `epsilon` to scale; a patch has an area instead.

    Example:
      >>> from robust_ssl import attacks, threats
      >>> has_budget(attacks.PGD(threats.Linf(0.1))), has_budget(attacks.PGD(threats.Patch(0.1)))
      (True, False)
    """
    return any(
        isinstance(path[-1], GetAttrKey) and path[-1].name == "epsilon"
        for path, _ in tree_flatten_with_path(attack)[0]
        if path
    )


def _is_scaled(path: tuple[Any, ...]) -> bool:
    # Attributes alone: a parameter of an encoder inside the attack may have such a name as well.
    return bool(path) and isinstance(path[-1], GetAttrKey) and path[-1].name in SCALED
