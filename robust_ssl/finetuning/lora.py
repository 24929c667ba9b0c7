"""Low-rank adapters: a frozen kernel plus a product of two thin matrices, which alone are trained.

The product is added to the kernel before the network runs, so every encoder can have adapters, and
a classifier on disk has none: they are in its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robust_ssl.optimizers.layerwise import match_paths
from robust_ssl.types import Variables

ADAPTERS = "adapters"  # beside "encoder" and "head" in the parameters of a training state
SCALES = "lora"  # the collection that keeps what their product is multiplied by


def adapters(
    params: Mapping[str, Any],
    kernels: Sequence[str],
    *,
    rank: int,
    alpha: float,
    key: jax.Array,
) -> dict[str, Any]:
    """Returns adapters that change nothing yet.

    Args:
      params: ``{"encoder": ..., "head": ...}``.
      kernels: Path patterns of the kernels that get one, ``[..., in, out]``.
      rank: Columns of the first matrix, ``[... * in, rank]``, and rows of the second.
      alpha: Their product is multiplied by ``alpha / rank``.
      key: Random key of the first matrices; the second are zero.

    Returns:
      ``{"params": {"adapters": ...}, "lora": {"scale": ...}}``, for `init_state`.

    Raises:
      ValueError: If a pattern matches nothing, or a parameter that is no kernel, or one whose
        smaller side is no larger than the rank; if `rank` is no whole number of at least 1, or
        `alpha` not above 0 and finite.

    Example:
      >>> params = {"encoder": {"qkv": {"kernel": jnp.ones((8, 24))}}}
      >>> made = adapters(params, ["encoder/**/kernel"], rank=2, alpha=4, key=jax.random.key(0))
      >>> made["params"]["adapters"]["encoder"]["qkv"]["kernel"]["down"].shape
      (8, 2)

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, Section 4.1.
    """
    if not (isinstance(rank, int | np.integer) and rank >= 1 and 0 < alpha < math.inf):
        raise ValueError(
            f"lora: rank must be a whole number of at least 1 and alpha above 0 and finite, got "
            f"{rank} and {alpha}"
        )
    leaves = flatten_dict(params, sep="/")
    try:
        paths = dict.fromkeys(path for pattern in kernels for path in match_paths(leaves, pattern))
    except ValueError as error:  # who wrote no pattern has to know whose it is
        raise ValueError(f"lora: of its kernels the {error}") from None
    made = {}
    for number, path in enumerate(paths):
        shape = leaves[path].shape
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        if len(shape) < 2 or rank >= min(rows, columns):
            raise ValueError(
                f"lora: a rank of {rank} saves nothing at {path}, which has shape {shape}; name "
                "larger kernels, or take a smaller rank"
            )
        bound = 1 / math.sqrt(rows)
        made[f"{path}/down"] = jax.random.uniform(
            jax.random.fold_in(key, number), (rows, rank), minval=-bound, maxval=bound
        )
        made[f"{path}/up"] = jnp.zeros((rank, columns))
    scale = {"scale": jnp.asarray(alpha / rank, jnp.float32)}
    return {"params": {ADAPTERS: unflatten_dict(made, sep="/")}, SCALES: scale}


def merged(variables: Variables) -> Variables:
    """Returns variables with each adapter's product added to its kernel; without one, the same.

    Example:
      >>> pair = {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}
      >>> params = {"encoder": {"kernel": jnp.eye(2)}, "adapters": {"encoder": {"kernel": pair}}}
      >>> whole = merged({"params": params, "lora": {"scale": jnp.array(0.5)}})
      >>> whole["params"]["encoder"]["kernel"].tolist()
      [[1.5, 0.5], [0.5, 1.5]]
    """
    if SCALES not in variables:
        return variables
    params = dict(variables["params"])
    thin = flatten_dict(params.pop(ADAPTERS), sep="/")
    leaves = flatten_dict(params, sep="/")
    for path in [name.removesuffix("/down") for name in thin if name.endswith("/down")]:
        product = thin[f"{path}/down"] @ thin[f"{path}/up"] * variables[SCALES]["scale"]
        leaves[path] = leaves[path] + product.reshape(leaves[path].shape)
    rest = {name: tree for name, tree in variables.items() if name != SCALES}
    return {**rest, "params": unflatten_dict(leaves, sep="/")}
