"""The laws of what training minimizes and of what an attacker maximizes."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.build import resolve
from robust_ssl.conformance.laws import Laws, check_batch, name_of
from robust_ssl.types import AttackInputs, Loss, LossInputs, Objective, Outputs

TAPS = ("stem", "block1", "block2", "block3")


def check_loss(
    loss: Loss | str,
    *,
    batch: int = 6,
    num_classes: int = 4,
    dim: int = 8,
    seed: int = 0,
    taps: Sequence[str] = TAPS,
) -> None:
    """Checks that a loss keeps the laws of training.

    It returns one finite float per image, ``[batch]``, with a finite gradient (at ordinary outputs,
    where that for clean or adversarial outputs is not zero, where these agree, and at zero
    outputs), gives the same under `jax.jit`, and follows its images when the batch is permuted.

    Args:
      loss: ``LossInputs -> [batch]``, or ``"module:function"``.
      batch: Number of made-up images, at least 2.
      num_classes: Number of made-up logits.
      dim: Number of made-up features.
      seed: Of the made-up outputs.
      taps: Names of the made-up layers, in order; those of your encoder, where the loss reads them.

    Raises:
      AssertionError: Names the loss and the law it breaks.
      ValueError: If there are fewer than two images.

    Example:
      >>> check_loss(lambda inputs: inputs.clean.features.sum(axis=1))
    """
    labels, _, outputs = _made_up(batch, num_classes, dim, seed, taps)
    pretrained = outputs().replace(logits=None)
    inputs = LossInputs(labels, outputs(), outputs(), pretrained, teacher=outputs())
    equal = {"clean = adversarial": inputs.replace(adversarial=inputs.clean)}
    what = f"[batch] = ({batch},)"

    def parts(example):  # what training moves: the public encoder and a teacher are constants
        return example.replace(labels=None, pretrained=None, teacher=None)

    def put(example, moved):
        return example.replace(clean=moved.clean, adversarial=moved.adversarial)

    _check(loss, inputs, equal, (batch,), what, seed, parts, put)


def check_objective(
    objective: Objective | str,
    *,
    needs_label: bool = False,
    batch: int = 6,
    num_classes: int = 4,
    dim: int = 8,
    seed: int = 0,
    taps: Sequence[str] = TAPS,
) -> None:
    """Checks that an attack objective keeps the laws of attacks.

    It returns one finite scalar, with a finite gradient for what the attacker moves (at ordinary
    outputs, where it is not zero unless the value itself follows the attacker, zero perturbation
    and zero outputs), the same under `jax.jit` and in any order.

    Args:
      objective: ``AttackInputs -> scalar``, or ``"module:function"``; `functools.partial` sets its
        options.
      needs_label: Whether it gets labels; a downstream-agnostic attack never has one.
      batch: Number of made-up images, at least 2.
      num_classes: Number of made-up logits.
      dim: Number of made-up features.
      seed: Of the made-up outputs.
      taps: Names of the made-up layers, in order.

    Raises:
      AssertionError: Names the objective and the law it breaks.
      ValueError: If there are fewer than two images.

    Example:
      >>> check_objective("robust_ssl.objectives:margin", needs_label=True)
    """
    labels, draw, outputs = _made_up(batch, num_classes, dim, seed, taps)
    pair, images = (outputs(), outputs()), (draw(8, 8, 3), draw(8, 8, 3))
    inputs = AttackInputs(*pair, *images, labels if needs_label else None, target=outputs())
    still = inputs.replace(adversarial=inputs.clean, adversarial_images=inputs.clean_images)
    equal, what = {"zero perturbation": still}, "a scalar, the mean over the batch"

    def parts(example):
        return example.adversarial, example.adversarial_images

    def put(example, moved):
        return example.replace(adversarial=moved[0], adversarial_images=moved[1])

    _check(objective, inputs, equal, (), what, seed, parts, put)


def _made_up(batch: int, num_classes: int, dim: int, seed: int, taps: Sequence[str]):
    """Returns labels and functions that draw arrays and outputs, one after another."""
    check_batch(batch)
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(random.normal(size=(batch, *shape)), jnp.float32)

    def outputs():
        layers = OrderedDict((name, draw(4, 4, 2)) for name in taps)
        return Outputs(features=draw(dim), logits=draw(num_classes), taps=layers)

    return jnp.arange(batch, dtype=jnp.int32) % num_classes, draw, outputs


def _check(brought, inputs, equal, shape, what, seed, parts, put) -> None:
    """Checks a function of a batch; `parts` of its inputs get a gradient, `put` puts them back."""
    function = resolve(brought)
    laws = Laws(name_of(function))
    law = "is a class: bring a function, or an instance that can be called"
    laws.hold(not isinstance(function, type), law)
    function = laws.calls(function, functools.partial(_advice, inputs))
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


def _advice(inputs: Any, error: Exception) -> str:
    if isinstance(error, KeyError) and error.args[0] not in inputs.clean.taps:
        known = ", ".join(inputs.clean.taps)
        return f"; the made-up outputs have the layers {known}: pass taps=, those of your encoder"
    if "NoneType" not in str(error):
        return ""
    if isinstance(inputs, LossInputs):
        return "; the public encoder has no logits: inputs.pretrained.logits is None"
    return (
        "; inputs.labels is None unless needs_label=True, and no downstream-agnostic attack has "
        "labels"
    )
