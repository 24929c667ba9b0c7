"""Vision transformers, tiny to base (Dosovitskiy et al., ICLR 2021), in linen, as timm has them.

Pre-norm blocks, exact GELU, learned positions.  Parameter paths are what layer-wise rules are
written against: ``embed/patch``, ``embed/position``, ``block1/attention/qkv``,
``block1/mlp/dense1``, ``norm`` and so on.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.models.resnet import CIFAR10_MEAN, CIFAR10_STD
from robust_ssl.types import Encoder

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, attention heads; DeiT
DEPTH = 12  # blocks of all three sizes
POOLINGS = ("token", "mean")


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    # The two-pass variance: after twelve residual blocks the mean is no longer small.
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def _dense(width: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


class Embedding(nn.Module):
    """Cuts the image into patches, maps each to a token, adds positions.

    The patch map is a dense layer on reshaped pixels rather than a strided convolution: the same
    numbers, and its gradient is a matrix product everywhere, also inside loops on a CPU.
    """

    width: int
    patch_size: int
    image_size: int
    class_token: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns tokens, ``[batch, patches (+ 1), width]``; the class token comes first."""
        batch, size, patch = x.shape[0], self.image_size, self.patch_size
        if x.shape[1:] != (size, size, 3):
            raise ValueError(
                f"this ViT has positions for images [{size}, {size}, 3], got {x.shape[1:]}; "
                f"resize them, or build it with image_size={x.shape[1]}"
            )
        side = size // patch
        x = x.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = _dense(self.width, self.dtype, "patch")(x.reshape(batch, side * side, patch**2 * 3))
        if self.class_token:
            token = self.param("token", nn.initializers.normal(1e-6), (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        position = self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + position.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; one product makes queries, keys and values, in this order."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, tokens, width]``."""
        batch, tokens, width = x.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return _dense(width, self.dtype, "output")(mixed.reshape(batch, tokens, width))


class MLP(nn.Module):
    """Two dense layers, four times as wide in between, with exact GELU."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, tokens, width]``."""
        width = x.shape[-1]
        x = nn.gelu(_dense(4 * width, self.dtype, "dense1")(x), approximate=False)
        return _dense(width, self.dtype, "dense2")(x)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added after."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, tokens, width]``."""
        x = x + Attention(self.heads, self.dtype, name="attention")(_norm(self.dtype, "norm1")(x))
        return x + MLP(self.dtype, name="mlp")(_norm(self.dtype, "norm2")(x))


class ViT(nn.Module):
    """Vision transformer up to its pooled features.

    Attributes:
      width: Size of a token.
      heads: Attention heads; divides `width`.
      depth: Number of blocks.
      patch_size: Height and width of a patch, pixels; divides `image_size`.
      image_size: Height and width of the images it has positions for, pixels.
      pooling: ``"token"`` (features are the class token) or ``"mean"`` (there is no class token;
        features are the mean of all patch tokens), both after the last layer norm.
      dtype: What is computed in; parameters stay float32.
      axis_name: Accepted like every encoder's and unused: there are no batch statistics.
    """

    width: int = 192
    heads: int = 3
    depth: int = DEPTH
    patch_size: int = 4
    image_size: int = 32
    pooling: str = "token"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns float32 features ``[batch, width]`` and taps ``embed``, ``block1``, ..."""
        del train  # no dropout, no batch statistics
        class_token = self.pooling == "token"
        x = Embedding(
            self.width, self.patch_size, self.image_size, class_token, self.dtype, name="embed"
        )(x.astype(self.dtype))
        taps = {"embed": x}
        for index in range(self.depth):
            name = f"block{index + 1}"
            x = Block(self.heads, self.dtype, name=name)(x)
            taps[name] = x
        x = _norm(self.dtype, "norm")(x).astype(jnp.float32)
        return x[:, 0] if class_token else jnp.mean(x, axis=1), taps


def _vit(key, size, *, patch_size, image_size, pooling, depth, mean, std, dtype, name) -> Encoder:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(
            f"patches of {patch_size} pixels do not tile an image of {image_size}; "
            f"patch_size must divide image_size"
        )
    width, heads = SIZES[size]
    module = ViT(
        width=width,
        heads=heads,
        depth=DEPTH if depth is None else depth,
        patch_size=patch_size,
        image_size=image_size,
        pooling=pooling,
        dtype=jnp.dtype(dtype),
    )
    variables = jax.jit(module.init)(key, jnp.zeros((1, image_size, image_size, 3)))
    return Encoder(
        variables=variables,
        module=module,
        mean=tuple(mean),
        std=tuple(std),
        image_size=image_size,
        dim=width,
        name=name,
    )


def vit_tiny(
    key: jax.Array,
    *,
    patch_size: int = 4,
    image_size: int = 32,
    pooling: str = "token",
    depth: int | None = None,
    mean: tuple[float, float, float] = CIFAR10_MEAN,
    std: tuple[float, float, float] = CIFAR10_STD,
    dtype: Any = "float32",
    name: str = "vit_tiny",
) -> Encoder:
    """Builds a ViT-Tiny encoder (192 features, 3 heads) with random weights.

    Args:
      key: Random key of the initialisation.
      patch_size: Height and width of a patch, pixels; must divide `image_size`.  4 for CIFAR, 16
        for ImageNet.
      image_size: Height and width, pixels; positions are learned for this size only.
      pooling: ``"token"``: the features are the class token.  ``"mean"``: there is no class token
        and the features are the mean over patches (timm's ``gap`` models).
      depth: Number of blocks; None is 12.
      mean: Per-channel mean of the training pixels, in [0, 1].
      std: Per-channel standard deviation of the training pixels.
      dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
      name: For tables and manifests.

    Returns:
      An `Encoder` of 192 features with the taps ``embed``, ``block1``, ``block2``, ...

    Raises:
      ValueError: If `pooling` is not known or the patches do not tile the image.

    Example:
      >>> encoder = vit_tiny(jax.random.key(0), image_size=16, depth=1)
      >>> encoder(jnp.zeros((2, 16, 16, 3))).features.shape
      (2, 192)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, Section 3.1.
      Touvron et al., "Training data-efficient image transformers", ICML 2021, Table 1 (sizes).
    """
    return _vit(
        key, "tiny", patch_size=patch_size, image_size=image_size, pooling=pooling, depth=depth,
        mean=mean, std=std, dtype=dtype, name=name,
    )  # fmt: skip


def vit_small(key: jax.Array, *, patch_size: int = 4, image_size: int = 32,
              pooling: str = "token", depth: int | None = None,
              mean: tuple[float, float, float] = CIFAR10_MEAN,
              std: tuple[float, float, float] = CIFAR10_STD,
              dtype: Any = "float32", name: str = "vit_small") -> Encoder:  # fmt: skip
    """Builds a ViT-Small encoder (6 heads); arguments as `vit_tiny`, 384 features."""
    return _vit(
        key, "small", patch_size=patch_size, image_size=image_size, pooling=pooling, depth=depth,
        mean=mean, std=std, dtype=dtype, name=name,
    )  # fmt: skip


def vit_base(key: jax.Array, *, patch_size: int = 4, image_size: int = 32,
             pooling: str = "token", depth: int | None = None,
             mean: tuple[float, float, float] = CIFAR10_MEAN,
             std: tuple[float, float, float] = CIFAR10_STD,
             dtype: Any = "float32", name: str = "vit_base") -> Encoder:  # fmt: skip
    """Builds a ViT-Base encoder (12 heads); arguments as `vit_tiny`, 768 features."""
    return _vit(
        key, "base", patch_size=patch_size, image_size=image_size, pooling=pooling, depth=depth,
        mean=mean, std=std, dtype=dtype, name=name,
    )  # fmt: skip
