"""What every training step does with an update: takes it if all of it is finite, else counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_ssl.types import TrainState


def no_skips() -> dict[str, jax.Array]:
    """Returns the counters of a new state: updates skipped because something was not finite."""
    return {name: jnp.zeros((), jnp.int32) for name in ("skipped", "skipped_in_a_row")}


# What a step and the loop around it log besides.
_TAKEN = ("step", "epoch", "loss", "gradient_norm", "budget", "skipped", "skipped_in_a_row")
_TAKEN += ("clean_accuracy", "robust_accuracy")


def check_metrics(names: Iterable[str], what: str) -> None:
    """Raises ValueError if one would be logged by a name that is something else's.

    Args:
      names: By which a user's values are logged.
      what: What has them, for the message: ``"losses"``.

    Example:
      >>> check_metrics(["ce", "pull"], "losses")
    """
    for name in names:
        if name in _TAKEN or name.startswith("validation_"):
            raise ValueError(
                f"{what} has {name!r}, by which something else is logged; take another name, "
                f"such as my_{name}"
            )


def take_if_finite(
    state: TrainState, variables: Any, opt_state: Any, metrics: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes the whole new state if all of it is finite, else keeps the old one and counts.

    Args:
      state: The state before the step, with the counters of `no_skips`.
      variables: The new variables.
      opt_state: The new state of the optimizer.
      metrics: Of the step, with ``loss`` and ``gradient_norm``.

    Returns:
      The next state, and the metrics with ``skipped``, 1.0 where nothing was taken.
    """
    new, old = (variables, opt_state), (state.variables, state.opt_state)
    # One number that is not finite if anything is: testing each of hundreds of leaves by itself
    # compiles many times longer.  Integers (an optimizer's count) are finite, and would overflow.
    floats = [leaf for leaf in jax.tree.leaves(new) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = jnp.isfinite(optax.tree.norm(floats) + metrics["gradient_norm"] + metrics["loss"])
    variables, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    skipped = 1 - finite.astype(jnp.int32)
    counters = {
        **state.counters,
        "skipped": state.counters["skipped"] + skipped,
        "skipped_in_a_row": skipped * (state.counters["skipped_in_a_row"] + 1),
    }
    metrics = metrics | {"skipped": skipped.astype(jnp.float32)}
    return (
        TrainState(
            step=state.step + 1, variables=variables, opt_state=opt_state, counters=counters
        ),
        metrics,
    )


def raise_if_stuck(state: TrainState, limit: int = 20) -> None:
    """Stops a training that only skips; call it where the host looks at the state anyway.

    Args:
      state: After an update.
      limit: Skipped updates in a row that are too many.

    Raises:
      FloatingPointError: If the last `limit` updates were all skipped.

    Example:
      >>> counters = {"skipped": 3, "skipped_in_a_row": 2}
      >>> raise_if_stuck(TrainState(step=9, variables={}, opt_state=(), counters=counters))
    """
    in_a_row = int(state.counters["skipped_in_a_row"])
    if in_a_row >= limit:
        raise FloatingPointError(
            f"the last {in_a_row} updates up to step {int(state.step)} were not finite and were "
            f"skipped: lower the learning rate or the weight of the loss that grows"
        )
