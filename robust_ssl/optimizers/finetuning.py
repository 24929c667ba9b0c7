"""The optimizer of every fine-tuning: Adam by layer, with L2-SP and held zeros where wanted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import optax

from robust_ssl.optimizers import pruning
from robust_ssl.optimizers.anchoring import pull_to_start
from robust_ssl.optimizers.layerwise import Rate, adam_l2, frozen_paths, layerwise_optimizer


def fine_tuning_optimizer(
    params: Mapping[str, Any],
    rates: Mapping[str, Rate],
    *,
    weight_decay: float,
    decay: float | str,
    steps_per_epoch: int,
    total_steps: int | None = None,
    l2_sp: float = 0.0,
    hold_zeros: bool = False,
) -> tuple[optax.GradientTransformation, frozenset[str]]:
    """Builds the optimizer of a fine-tuning and names the parameters that it leaves alone.

    Args:
      params: The parameters that training starts from, ``{"encoder": ..., "head": ...}``.
      rates: Path to rate, as `layer_rates` returns.
      weight_decay: Of all that is trained; with `l2_sp`, of the head only.
      decay: Every rate is multiplied by this after each epoch; or ``"cosine"``, see `adam_l2`.
      steps_per_epoch: Updates per epoch.
      total_steps: Updates in all, for a cosine.
      l2_sp: Weight of the pull to `params`, for the encoder in the place of weight decay.
      hold_zeros: Whether kernel weights that are zero in `params` stay zero.

    Returns:
      An optax transformation, and the frozen paths, which a fine-tuning step takes as `frozen`.

    Example:
      >>> params = {"encoder": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
      >>> rates = {"encoder/kernel": "freeze", "head/kernel": 0.1}
      >>> tx, frozen = fine_tuning_optimizer(
      ...     params, rates, weight_decay=0.0, decay=0.96, steps_per_epoch=10
      ... )
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["encoder"]["kernel"].tolist(), sorted(frozen)
      ([0.0, 0.0], ['encoder/kernel'])
    """
    adam = functools.partial(
        adam_l2,
        weight_decay=0.0 if l2_sp else weight_decay,
        decay=decay,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    parts = [layerwise_optimizer(params, rates, adam)]
    if l2_sp:
        # The encoder is pulled to where it started instead of to zero; only the head decays.
        is_head = {part: part == "head" for part in params}
        pull = functools.partial(pull_to_start, params)
        parts = [
            # In the state, as rates are: two runs that differ in the weight share one program.
            optax.inject_hyperparams(lambda weight: pull(weight))(float(l2_sp)),
            optax.masked(optax.add_decayed_weights(weight_decay), is_head),
            *parts,
        ]
    if hold_zeros:
        parts.append(pruning.hold_zeros(params))  # last: momentum moves zeros too
    tx = parts[0] if len(parts) == 1 else optax.chain(*parts)
    return tx, frozen_paths(rates)
