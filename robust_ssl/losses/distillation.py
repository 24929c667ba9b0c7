"""Losses that pull a classifier to the predictions of a teacher, another classifier."""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from robust_ssl.losses.inputs import logits_of
from robust_ssl.types import LossInputs

_Pulled = Literal["adversarial", "clean"]


def teacher_kl(
    inputs: LossInputs, of: _Pulled = "adversarial", temperature: float = 1.0
) -> jax.Array:
    r"""Measures how far a prediction is from what the teacher says of the clean image.

    .. math:: \ell_i = T^2\,\mathrm{KL}\big(p_T^\text{teacher}(x_i) \,\|\, p_T(\tilde x_i)\big)

    with `p_T` the softmax of logits over `T`.  0 means "the same prediction".  A teacher that was
    fine-tuned on clean images holds clean accuracy up while the student learns to withstand.

    Args:
      inputs: Uses `teacher.logits`, a constant, and the logits of `of`, float
        ``[batch, classes]``.  Labels play no part.
      of: Whose logits are pulled: ``"adversarial"``, or ``"clean"``.
      temperature: `T`, above 0; the factor `T^2` keeps the gradient's size.

    Returns:
      One divergence per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If there is no teacher, there are no logits to pull, or `temperature` is not above
        0 and finite.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 3)), logits=jnp.array([[0.0, 2.0]]))
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=outputs, teacher=outputs)
      >>> teacher_kl(inputs, of="clean").tolist()
      [0.0]

    References:
      Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Goldblum et al.,
      "Adversarially Robust Distillation", AAAI 2020, Eq. 4, for the perturbed student.
    """
    if not 0 < temperature < float("inf"):  # all predictions would be alike, and T^2 infinite
        raise ValueError(
            f"teacher_kl: temperature must be above 0 and finite, got {temperature}; 1 is the "
            "softmax itself"
        )
    teacher, student = _pair(inputs, of)
    target = jax.nn.log_softmax(teacher / temperature)
    reached = jax.nn.log_softmax(student / temperature)
    return temperature**2 * jnp.sum(jnp.exp(target) * (target - reached), axis=-1)


def teacher_distance(inputs: LossInputs, of: _Pulled = "adversarial") -> jax.Array:
    r"""Measures how far logits are from the teacher's for the clean image.

    .. math:: \ell_i = \frac{1}{C}\,\|f(\tilde x_i) - f^\text{teacher}(x_i)\|_2^2

    LBGAT's pull: the teacher's decision boundaries, and not its predictions alone.

    Args:
      inputs: Uses `teacher.logits`, a constant, and the logits of `of`, float
        ``[batch, classes]``.  Labels play no part.
      of: Whose logits are pulled: ``"adversarial"``, or ``"clean"``.

    Returns:
      One mean square per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If there is no teacher, or there are no logits to pull.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> student = Outputs(features=jnp.zeros((1, 3)), logits=jnp.array([[0.0, 2.0]]))
      >>> teacher = student.replace(logits=jnp.array([[2.0, 2.0]]))
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=student, teacher=teacher)
      >>> teacher_distance(inputs, of="clean").tolist()
      [2.0]

    References:
      Cui et al., "Learnable Boundary Guided Adversarial Training", ICCV 2021, whose natural network
      is trained beside the robust one; here it is finished before.
    """
    teacher, student = _pair(inputs, of)
    return jnp.mean(jnp.square(student - teacher), axis=-1)


def _pair(inputs: LossInputs, of: str) -> tuple[jax.Array, jax.Array]:
    """Returns the teacher's logits, as constants, and those that are pulled."""
    if of not in ("clean", "adversarial"):
        raise ValueError(f'of must be "clean" or "adversarial", got {of!r}')
    teacher = jax.lax.stop_gradient(logits_of(inputs.teacher, "teacher"))
    student = logits_of(getattr(inputs, of), of)
    chex.assert_equal_shape([teacher, student])
    return teacher, student
