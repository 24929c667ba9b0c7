"""Magnitude pruning: the smallest weights become zero, and stay zero while the rest is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from robust_ssl.optimizers.layerwise import match_paths


def prune(params: Mapping[str, Any], share: float, *, scope: str = "encoder/**") -> dict[str, Any]:
    """Sets the smallest kernel weights to zero, compared over all layers at once.

    Biases and norms are left alone.  Of weights of one size those that come first are pruned, so
    the number of zeros is exact.

    Args:
      params: Nested mapping of parameters, as ``classifier.variables["params"]``.
      share: Of all kernel weights in scope, how many become zero, in [0, 1); rounded to a whole
        number of weights.
      scope: Pattern of paths, as in `match_paths`; of these, the kernels.

    Returns:
      The parameters; pruned kernels are new NumPy arrays of the same dtype.

    Raises:
      ValueError: If `share` is outside [0, 1), or no kernel is in scope.

    Example:
      >>> params = {"encoder": {"kernel": jnp.array([3.0, -1.0, 2.0, -4.0]), "bias": jnp.ones(1)}}
      >>> prune(params, 0.5)["encoder"]["kernel"].tolist()
      [3.0, 0.0, 0.0, -4.0]

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS
      2015 (magnitude pruning; there by layer, here over all of them).  As a defence compare Liu et
      al., "Fine-Pruning", RAID 2018, and Sehwag et al., "HYDRA", NeurIPS 2020, who choose the
      weights by activation and by a learned score.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share to prune must be in [0, 1), got {share}")
    flat = flatten_dict(params, sep="/")
    kernels = {path: np.asarray(flat[path]) for path in _kernels(flat, scope)}
    sizes = [kernel.size for kernel in kernels.values()]
    magnitudes = [np.abs(kernel.astype(np.float32)).reshape(-1) for kernel in kernels.values()]
    # One ranking over all layers, cut up again: a layer of small weights loses more of them.
    smallest = _smallest(np.concatenate(magnitudes), round(share * sum(sizes)))
    masks = np.split(smallest, np.cumsum(sizes)[:-1])
    for (path, kernel), mask in zip(kernels.items(), masks, strict=True):
        flat[path] = np.where(mask.reshape(kernel.shape), np.zeros((), kernel.dtype), kernel)
    return unflatten_dict(flat, sep="/")


def hold_zeros(
    params: Mapping[str, Any], *, scope: str = "encoder/**"
) -> optax.GradientTransformation:
    """Keeps pruned weights at zero, bit for bit; put it after the optimizer.

    ``optax.chain(optimizer, hold_zeros(pruned))``.  Every kernel weight that is zero in `params`
    gets an update of zero, also where the optimizer has momentum.  Zeros elsewhere, such as
    biases that start there, move as usual.

    Args:
      params: The pruned parameters that training starts from.  Their zeros are kept on the host.
      scope: As in `prune`.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: If no kernel is in scope.

    Example:
      >>> params = {"encoder": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.zeros(1)}}
      >>> tx = hold_zeros(params)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
      >>> updates["encoder"]["kernel"].tolist(), updates["encoder"]["bias"].tolist()
      ([1.0, 0.0], [1.0])
    """
    flat = flatten_dict(params, sep="/")
    zeros = {path: np.asarray(flat[path]) == 0 for path in _kernels(flat, scope)}

    def hold(updates: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
        flat = flatten_dict(updates, sep="/")
        for path, zero in zeros.items():
            # Not a product with the mask: NaN times 0 is NaN.
            flat[path] = jnp.where(zero, jnp.zeros((), flat[path].dtype), flat[path])
        return unflatten_dict(flat, sep="/")

    return optax.stateless(hold)


def _kernels(paths: Iterable[str], scope: str) -> list[str]:
    kernels = [path for path in match_paths(paths, scope) if path.rpartition("/")[2] == "kernel"]
    if not kernels:
        raise ValueError(f"no kernel to prune in {scope!r}; choose a scope such as 'encoder/**'")
    return kernels


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Marks exactly `count` of the smallest values, bool of the same shape; ties by order."""
    if count == 0:
        return np.zeros(values.shape, bool)
    limit = np.partition(values, count - 1)[count - 1]
    smallest = values < limit
    # Weights equal to the limit fill up in order: a comparison with it would prune all of them.
    ties = np.flatnonzero(values == limit)
    smallest[ties[: count - np.sum(smallest)]] = True
    return smallest
