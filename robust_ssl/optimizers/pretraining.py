"""The optimizers of self-supervised pre-training, LARS among them, under one schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def pretraining_optimizer(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.02,  # solo-learn, CIFAR
    clip: bool = True,  # solo-learn, CIFAR (all methods but VIbCReg)
) -> optax.GradientTransformation:
    """Returns SGD with momentum, LARS, Adam or AdamW under a cosine schedule with linear warm-up.

    Args:
      name: ``"sgd"``, ``"lars"``, ``"adam"`` or ``"adamw"``.
      learning_rate: At the schedule's peak.
      total_steps: Where the cosine reaches zero.
      warmup_steps: How long the rate rises linearly from zero.
      weight_decay: Of what has two axes or more, which are kernels, tokens and positions; biases
        and norms have none.
      momentum: Of SGD and LARS.
      trust_coefficient: Of `lars`.
      clip: Of `lars`.

    Raises:
      ValueError: If the name is not known, or the warm-up is not shorter than the training.

    Example:
      >>> tx = pretraining_optimizer(
      ...     "sgd", learning_rate=0.1, total_steps=10, warmup_steps=1, weight_decay=0.0
      ... )
      >>> tx.init({"w": jnp.zeros(2)}) is not None
      True
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be below {total_steps} steps, got {warmup_steps}")
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, total_steps)
    decay = optax.add_decayed_weights(weight_decay, _is_kernel)
    if name == "sgd":
        return optax.chain(decay, optax.sgd(schedule, momentum=momentum))
    if name == "lars":
        return lars(
            schedule,
            weight_decay=weight_decay,
            momentum=momentum,
            trust_coefficient=trust_coefficient,
            clip=clip,
        )
    if name == "adam":  # decay inside the gradient, as in torch
        return optax.chain(decay, optax.adam(schedule))
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=weight_decay, mask=_is_kernel)
    raise ValueError(f"optimizer must be 'sgd', 'lars', 'adam' or 'adamw', got {name!r}")


def lars(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.02,  # solo-learn, CIFAR
    clip: bool = True,  # solo-learn, CIFAR (all methods but VIbCReg)
) -> optax.GradientTransformation:
    """LARS as solo-learn has it, which `optax.lars` is not: clipped, and still where nothing pulls.

    A kernel's gradient, decay added, is scaled so that a step of the learning rate moves it by
    ``trust_coefficient`` times its length, or by less where plain SGD would.

    Args:
      schedule: Step to learning rate.
      weight_decay: Of what has two axes or more.
      momentum: Applied after the scaling.
      trust_coefficient: How large a kernel's update may be against the kernel.
      clip: Whether a kernel never moves further than SGD would move it.

    Returns:
      An optax transformation.

    Example:
      >>> tx = lars(lambda count: 0.5, weight_decay=0.0, momentum=0.0, clip=False)
      >>> params = {"kernel": jnp.array([[3.0, 4.0]])}  # length 5
      >>> updates, _ = tx.update({"kernel": jnp.array([[8.0, 0.0]])}, tx.init(params), params)
      >>> updates["kernel"].round(3).tolist()  # 0.5 * 0.02 * 5
      [[-0.05..., ...0.0]]

    References:
      You et al., "Large Batch Training of Convolutional Networks", 2017, Algorithm 1.
    """
    return optax.chain(
        _scale_by_trust(schedule, weight_decay, trust_coefficient, clip),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _scale_by_trust(
    schedule: optax.Schedule, weight_decay: float, trust_coefficient: float, clip: bool
) -> optax.GradientTransformation:
    def update(gradients, count, params):
        rate = schedule(count)

        def scaled(gradient, kernel, is_kernel):
            if not is_kernel:
                return gradient
            length, pull = optax.tree.norm(kernel), optax.tree.norm(gradient)
            ratio = trust_coefficient * length / (pull + weight_decay * length + 1e-8)
            if clip:
                # The first rate of a warm-up is 0.
                ratio = jnp.minimum(ratio / jnp.maximum(rate, 1e-12), 1.0)
            # A kernel of zeros has no length to go by, and one without a gradient does not decay.
            moves = (length > 0) & (pull > 0)
            return jnp.where(moves, ratio * (gradient + weight_decay * kernel), gradient)

        return jax.tree.map(scaled, gradients, params, _is_kernel(params)), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)
