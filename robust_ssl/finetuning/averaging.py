"""The exponential moving average of weights, kept in the training state beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl.finetuning.adversaries import COLLECTION
from robust_ssl.finetuning.lora import merged
from robust_ssl.types import Variables

AVERAGE = "average"  # where the variables of a training state keep it
AVERAGED = ("params", "batch_stats")


def check_decay(decay: float | None) -> None:
    """Raises ValueError unless a decay is in [0, 1), or None."""
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"ema, the decay of an average, must be in [0, 1), got {decay}")


def average_in(variables: Variables) -> dict[str, Variables]:
    """Returns the average that a training state keeps; ValueError where it keeps none."""
    if AVERAGE not in variables:
        raise ValueError("ema needs an average in the state: init_state(..., average=True)")
    return variables[AVERAGE]


def first_average(variables: Variables) -> dict[str, Variables]:
    """Returns the average before the first update: the variables, in arrays of their own."""
    return {name: jax.tree.map(jnp.array, variables[name]) for name in _averaged(variables)}


def follow(average: Variables, variables: Variables, decay: jax.Array | float) -> Variables:
    r"""Returns the average after an update.

    .. math:: a \leftarrow a + (1 - d)(w - a)

    So a weight that does not move is its own average, bit by bit.  After `n` updates the start has
    a share of ``d ** n`` left: take `d` for the length of the training.

    Args:
      average: What `first_average` or this function returned.
      variables: Weights and batch statistics after the update.
      decay: `d`, in [0, 1); 0 is the weights themselves.

    Example:
      >>> follow({"params": {"w": 1.0}}, {"params": {"w": 2.0}}, 0.75)
      {'params': {'w': 1.25}}
    """
    moved = {name: variables[name] for name in average}
    return jax.tree.map(lambda a, w: a + (1 - decay) * (w - a), average, moved)


def served(variables: Variables) -> dict[str, Variables]:
    """Returns the variables of the classifier that a training state stands for.

    They are the average where there is one, adapters merged, without what else a state keeps.

    Example:
      >>> served({"params": {"w": 1}, "average": {"params": {"w": 2}}, "attack": {"deltas": 3}})
      {'params': {'w': 2}}
    """
    own = {n: tree for n, tree in variables.items() if n not in (AVERAGE, COLLECTION)}
    return dict(merged({**own, **variables.get(AVERAGE, {})}))


def _averaged(variables: Variables) -> list[str]:
    return [name for name in AVERAGED if name in variables]
