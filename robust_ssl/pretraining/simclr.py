"""SimCLR (Chen et al., ICML 2020): two views of an image agree, views of others do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.pretraining.method import MethodUpdate, PretrainInputs, check_pair, option
from robust_ssl.pretraining.two_views import TwoViews
from robust_ssl.types import Encoder, Variables


def nt_xent(first: jax.Array, second: jax.Array, *, temperature: float = 0.2) -> jax.Array:
    r"""The normalized temperature-scaled cross-entropy between two views.

    .. math:: \ell_i = -\log \frac{\exp(\cos(z_i, z_i') / \tau)}
                                  {\sum_{k \ne i} \exp(\cos(z_i, z_k) / \tau)}

    where the sum runs over all other projections of both views; averaged over both directions.
    With n images it is ``log(2 n - 1)`` when all projections are equal.

    Args:
      first: Projections of one view, float ``[batch, dim]``, of the global batch.
      second: Projections of the other view, ``[batch, dim]``.
      temperature: How sharply near negatives are pushed away; 0.2 is solo-learn's on CIFAR.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> losses = nt_xent(jnp.ones((2, 3)), jnp.ones((2, 3)))
      >>> losses.shape, round(float(losses[0]), 4)  # log 3
      ((2,), 1.0986)

    References:
      Chen et al., ICML 2020, Eq. 1.
    """
    check_pair(first, second)
    n = first.shape[0]
    both = jnp.concatenate([first, second])
    norms = jnp.sqrt(jnp.maximum(jnp.sum(both**2, axis=1, keepdims=True), 1e-12))
    both = both / norms
    similarity = both @ both.T / temperature
    similarity = jnp.where(jnp.eye(2 * n, dtype=bool), -jnp.inf, similarity)
    positive = jnp.sum(both[:n] * both[n:], axis=1) / temperature
    losses = jax.nn.logsumexp(similarity, axis=1) - jnp.concatenate([positive, positive])
    return (losses[:n] + losses[n:]) / 2


@struct.dataclass
class SimCLR(TwoViews):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `TwoViews`.

    Attributes:
      temperature: Of `nt_xent`.
    """

    temperature: float = option(0.2)  # solo-learn, CIFAR; as the defaults of `TwoViews`

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `nt_xent` per image of the global batch."""
        first, second, update = self.projections(variables, encoder, inputs)
        return nt_xent(first, second, temperature=self.temperature), update
