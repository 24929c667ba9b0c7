"""The laws of what training minimizes and of what an attacker maximizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.build import resolve
from robust_ssl.conformance.laws import Laws, name_of
from robust_ssl.types import AttackInputs, Loss, LossInputs, Objective, Outputs


def check_loss(
    loss: Loss | str, *, batch: int = 6, num_classes: int = 4, dim: int = 8, seed: int = 0
) -> None:
    """Checks that a loss keeps the laws of training.

    It returns one finite float per image, ``[batch]``, with a finite gradient (at ordinary outputs,
    where it is not zero, where clean and adversarial agree, and at zero outputs), gives the same
    under `jax.jit`, and follows its images when the batch is permuted.

    Args:
      loss: ``LossInputs -> [batch]``, or ``"module:function"``.
      batch: Number of made-up images.
      num_classes: Number of made-up logits.
      dim: Number of made-up features.
      seed: Of the made-up outputs.

    Raises:
      AssertionError: Names the loss and the law it breaks.

    Example:
      >>> check_loss(lambda inputs: inputs.clean.features.sum(axis=1))
    """
    labels, _, outputs = _made_up(batch, num_classes, dim, seed)
    pretrained = outputs().replace(logits=None)
    inputs = LossInputs(labels, outputs(), outputs(), pretrained, teacher=outputs())
    equal = {"clean = adversarial": inputs.replace(adversarial=inputs.clean)}
    what = f"[batch] = ({batch},)"
    _check(resolve(loss), inputs, equal, (batch,), what, seed, lambda x: x, lambda _, moved: moved)


def check_objective(
    objective: Objective | str,
    *,
    needs_label: bool = False,
    batch: int = 6,
    num_classes: int = 4,
    dim: int = 8,
    seed: int = 0,
) -> None:
    """Checks that an attack objective keeps the laws of attacks.

    It returns one finite scalar, with a finite gradient for what the attacker moves (at ordinary
    outputs, where it is not zero unless the value itself follows the attacker, zero perturbation
    and zero outputs), the same under `jax.jit` and in any order.

    Args:
      objective: ``AttackInputs -> scalar``, or ``"module:function"``; `functools.partial` sets its
        options.
      needs_label: Whether it gets labels; a downstream-agnostic attack never has one.
      batch: Number of made-up images.
      num_classes: Number of made-up logits.
      dim: Number of made-up features.
      seed: Of the made-up outputs.

    Raises:
      AssertionError: Names the objective and the law it breaks.

    Example:
      >>> check_objective("robust_ssl.objectives:margin", needs_label=True)
    """
    labels, draw, outputs = _made_up(batch, num_classes, dim, seed)
    pair, images = (outputs(), outputs()), (draw(8, 8, 3), draw(8, 8, 3))
    inputs = AttackInputs(*pair, *images, labels if needs_label else None, target=outputs())
    still = inputs.replace(adversarial=inputs.clean, adversarial_images=inputs.clean_images)
    equal, what = {"zero perturbation": still}, "a scalar, the mean over the batch"

    def parts(example):
        return example.adversarial, example.adversarial_images

    def put(example, moved):
        return example.replace(adversarial=moved[0], adversarial_images=moved[1])

    _check(resolve(objective), inputs, equal, (), what, seed, parts, put)


def _made_up(batch: int, num_classes: int, dim: int, seed: int):
    """Returns labels and functions that draw arrays and outputs, one after another."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(random.normal(size=(batch, *shape)), jnp.float32)

    def outputs():
        taps = {name: draw(4, 4, 2) for name in ("stem", "block1", "block2", "block3")}
        return Outputs(features=draw(dim), logits=draw(num_classes), taps=taps)

    return jnp.arange(batch, dtype=jnp.int32) % num_classes, draw, outputs


def _check(function, inputs, equal, shape, what, seed, parts, put) -> None:
    """Checks a function of a batch; `parts` of its inputs get a gradient, `put` puts them back."""
    laws = Laws(name_of(function))
    zero = jax.tree.map(jnp.zeros_like, inputs).replace(labels=inputs.labels)
    for case, example in {"ordinary outputs": inputs, **equal, "zero outputs": zero}.items():
        values = function(example)
        actual = getattr(values, "shape", None)
        laws.hold(actual == shape, f"must return {what}, got {actual} at {case}")
        laws.hold(jnp.issubdtype(values.dtype, jnp.floating), f"must be float: {values.dtype}")
        laws.hold(jnp.isfinite(values).all(), f"is not finite at {case}: {values}")

        def mean(moved, example=example):
            return jnp.mean(function(put(example, moved)))

        gradients = jax.grad(mean, allow_int=True)(parts(example))
        laws.finite(gradients, f"has a gradient that is not finite at {case}")
        if example is inputs:  # elsewhere it may be at its best
            # An objective may also be a rate, which a search follows.
            changes = not shape and any(function(other) != values for other in equal.values())
            if not changes:
                laws.moves(gradients, "has a gradient of zero: nothing would follow it")
    values = np.asarray(function(inputs))
    laws.close(jax.jit(function)(inputs), values, "gives something else under jax.jit")
    order = np.random.default_rng(seed).permutation(len(inputs.clean.features))
    permuted = function(jax.tree.map(lambda x: x[order], inputs))
    desired = values[order] if values.ndim else values
    laws.close(permuted, desired, "does not follow a permutation of the batch")
