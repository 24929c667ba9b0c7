"""What vision transformers are made of: patches, attention, MLPs, and pooling by attention."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.models.products import attend, dot_general, gelu, once

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # SigLIP
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "swiglu": lambda x: nn.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
}


def layer_norm(module: nn.Module, name: str) -> nn.LayerNorm:
    """Returns a layer norm with a module's epsilon and dtype."""
    # The two-pass variance: after twelve residual blocks the mean is no longer small.
    return nn.LayerNorm(
        epsilon=module.norm_epsilon, dtype=module.dtype, use_fast_variance=False, name=name
    )


def _dense(width: int, dtype: Any, name: str, use_bias: bool = True) -> nn.Dense:
    initializer = nn.initializers.xavier_uniform()
    return nn.Dense(
        width, use_bias, dtype, kernel_init=initializer, dot_general=dot_general, name=name
    )


class Embedding(nn.Module):
    """Cuts the image into patches, maps each to a token, adds positions.

    The patch map is a dense layer on reshaped pixels rather than a strided convolution: the same
    numbers, and its gradient is a matrix product everywhere, also inside loops on a CPU.
    """

    width: int
    patch_size: int
    image_size: int
    class_token: bool
    registers: int = 0
    pre_norm: bool = False
    patch_bias: bool = True
    norm_epsilon: float = 1e-6
    positions: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns tokens ``[batch, tokens, width]``: class token, registers, patches."""
        batch, size, patch = x.shape[0], self.image_size, self.patch_size
        if x.shape[1:] != (size, size, 3):
            raise ValueError(
                f"this ViT has positions for images [{size}, {size}, 3], got {x.shape[1:]}; "
                f"resize them, or build it with image_size={x.shape[1]}; small views of a "
                "pre-training (local_crops) are for networks that take any size"
            )
        side = size // patch
        # Pixels in a convolution kernel's order, row, column, color; `mapping.patches` needs it.
        x = x.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, side * side, patch**2 * 3)
        x = _dense(self.width, self.dtype, "patch", self.patch_bias)(x)
        # DINOv2's order: positions for class token and patches, then registers between them.
        if self.class_token:
            x = self._prepend("token", 1, x)
        if self.positions:
            position = self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
            x = x + position.astype(x.dtype)
        if self.registers:  # they have no place in the image, so no position
            first = int(self.class_token)
            rest = self._prepend("registers", self.registers, x[:, first:])
            x = jnp.concatenate([x[:, :first], rest], axis=1)
        return layer_norm(self, "norm")(x) if self.pre_norm else x

    def _prepend(self, name: str, count: int, x: jax.Array) -> jax.Array:
        # timm's and DINOv2's start.
        tokens = self.param(name, nn.initializers.normal(1e-6), (1, count, self.width))
        tokens = jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], count, self.width))
        return jnp.concatenate([tokens, x], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention; one product makes queries, keys and values, in this order.

    With `rotary`, the base of its frequencies, patches' queries and keys are turned by where they
    are; the first `prefix` tokens are no patches.  `reference` is EVA-02's, see `patch_angles`.
    """

    heads: int
    rotary: float | None = None
    reference: int | None = None
    inner_norm: bool = False
    prefix: int = 0
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, tokens, width]``."""
        batch, tokens, width = x.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        heads = (batch, tokens, self.heads, width // self.heads)
        queries, keys, values = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        if self.rotary is not None:
            side = math.isqrt(tokens - self.prefix)
            angles = patch_angles(side, width // self.heads, self.rotary, self.reference)
            paired = self.reference is not None
            queries, keys = (_turned(x, angles, self.prefix, paired) for x in (queries, keys))
        mixed = attend(queries, keys, values).reshape(batch, tokens, width)
        if self.inner_norm:
            mixed = layer_norm(self, "norm")(mixed)
        return _dense(width, self.dtype, "output")(mixed)


def patch_angles(
    side: int, head_width: int, base: float, reference: int | None = None
) -> np.ndarray:
    """Angles of rotary positions, float64 ``[side ** 2, head_width]``.

    Half of a head's pairs of features turn with the row, half with the column.  A pair is a feature
    and the one half a head further on; with `reference` it is two neighbors.

    Args:
      side: Patches along a side.
      head_width: Features of a head; a multiple of 4.
      base: Of the geometric row of frequencies, 100 in DINOv3, 10,000 in EVA-02.
      reference: None counts places in whole turns, from -1 to 1 (DINOv3); a number counts them from
        0 to this, whatever the side (EVA-02: 16, its patches along a side in pre-training).

    References:
      Simeoni et al., "DINOv3", 2025, Section 3.2 (coordinates in [-1, 1]); Fang et al., "EVA-02",
      2023, Section 2.1.
    """
    if reference is None:
        places = 2 * np.pi * (2 * (np.arange(side) + 0.5) / side - 1)
    else:
        places = np.arange(side) / side * reference
    rows, columns = np.meshgrid(places, places, indexing="ij")
    frequencies = base ** -np.arange(0, 1, 4 / head_width)
    turns = np.stack([rows, columns], axis=-1).reshape(-1, 2, 1) * frequencies
    turns = turns.reshape(side * side, -1)
    return np.tile(turns, 2) if reference is None else np.repeat(turns, 2, axis=1)


def _turned(x: jax.Array, angles: np.ndarray, prefix: int, paired: bool = False) -> jax.Array:
    """Turns each pair of a head's features, of patches only; x is ``[batch, tokens, heads, n]``."""
    cosine, sine = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    patches = x[:, prefix:]
    if paired:  # neighbors are a pair
        crossed = jnp.stack([-patches[..., 1::2], patches[..., ::2]], axis=-1)
        crossed = crossed.reshape(patches.shape)
    else:
        first, second = jnp.split(patches, 2, axis=-1)
        crossed = jnp.concatenate([-second, first], axis=-1)
    patches = patches * cosine + crossed * sine
    return jnp.concatenate([x[:, :prefix], patches], axis=1)


class MLP(nn.Module):
    """Two dense layers with an activation in between; ``"swiglu"`` makes its own gate first."""

    width: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    inner_norm: bool = False
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, tokens, width]``."""
        width = 2 * self.width if self.activation == "swiglu" else self.width
        hidden = ACTIVATIONS[self.activation](_dense(width, self.dtype, "dense1")(x))
        if self.inner_norm:
            hidden = layer_norm(self, "norm")(hidden)
        return _dense(x.shape[-1], self.dtype, "dense2")(hidden)


class Block(nn.Module):
    """Attention and MLP, each normalized before and added, scaled or not, after."""

    heads: int
    mlp_width: int
    activation: str = "gelu"
    layer_scale: bool = False
    norm_epsilon: float = 1e-6
    rotary: float | None = None
    reference: int | None = None
    attention_norm: bool = False
    mlp_norm: bool = False
    prefix: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, tokens, width]``."""
        attention = Attention(
            self.heads, self.rotary, self.reference, self.attention_norm, self.prefix,
            self.norm_epsilon, self.dtype, name="attention",
        )  # fmt: skip
        mlp = MLP(
            self.mlp_width, self.activation, self.dtype, self.mlp_norm, self.norm_epsilon,
            name="mlp",
        )  # fmt: skip
        x = once(x)  # and its gradient, which is the sum of all later ones
        x = once(x + self._scaled("scale1", attention(layer_norm(self, "norm1")(x))))
        return x + self._scaled("scale2", mlp(layer_norm(self, "norm2")(x)))

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return x
        scale = self.param(name, nn.initializers.constant(1e-5), (x.shape[-1],))  # DINOv2's start
        return x * scale.astype(x.dtype).reshape(1, 1, -1)


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, then a block's MLP, as in SigLIP."""

    heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, width]``."""
        batch, _, width = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(x.dtype), (batch, 1, width))
        # One product for the query, of the probe, and for keys and values, of the tokens: files
        # have one matrix for the three.
        qkv = _dense(3 * width, self.dtype, "qkv")(jnp.concatenate([probe, x], axis=1))
        qkv = qkv.reshape(batch, -1, 3, self.heads, width // self.heads)
        mixed = attend(qkv[:, :1, 0], qkv[:, 1:, 1], qkv[:, 1:, 2])
        x = _dense(width, self.dtype, "output")(mixed.reshape(batch, width))
        mlp = MLP(self.mlp_width, self.activation, self.dtype, name="mlp")
        return x + mlp(layer_norm(self, "norm")(x))
