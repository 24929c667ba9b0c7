"""CLIP's ResNets (Radford et al., ICML 2021, Section 2.4) in linen.

Three convolutions in the stem, average pools where others stride, and attention in place of the
last pool.  Parameter paths are what layer-wise rules are written against: ``stem/conv1/conv``,
``stage1/block1/conv1``, ``pool/qkv`` and so on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.models.products import attend, dot_general
from robust_ssl.models.resnet import ConvNorm, Stage
from robust_ssl.models.sizes import check_sizes, first_variables, number_type
from robust_ssl.types import Encoder

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's release, clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STRIDE = 32  # of the whole network
_EXPANSION = 4
_HEAD = 64  # features of a head, in all of OpenAI's


def _halved(x: jax.Array, by: int) -> jax.Array:
    return x if by == 1 else nn.avg_pool(x, (by, by), (by, by))


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of which strides, and an average pool."""

    width: int
    make: Any  # functools.partial(ConvNorm, dtype=..., axis_name=...)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns ``[batch, height / 4, width / 4, width]``."""
        for number, (width, stride) in enumerate(
            ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), start=1
        ):
            x = nn.relu(self.make(width, 3, stride, 1, name=f"conv{number}")(x, train))
        return _halved(x, 2)


class Bottleneck(nn.Module):
    """1x1, 3x3, an average pool in place of a stride, 1x1 of four times the width, a shortcut."""

    width: int
    stride: int
    make: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns ``[batch, height / stride, width / stride, 4 * width]``."""
        out = self.width * _EXPANSION
        y = nn.relu(self.make(self.width, 1, name="conv1")(x, train))
        y = nn.relu(self.make(self.width, 3, 1, 1, name="conv2")(y, train))
        y = self.make(out, 1, name="conv3")(_halved(y, self.stride), train)
        if x.shape[-1] != out or self.stride != 1:
            x = self.make(out, 1, name="shortcut")(_halved(x, self.stride), train)
        return nn.relu(x + y)


class MeanAttentionPool(nn.Module):
    """The mean of all places attends to them and to itself, and is mapped to the features."""

    heads: int
    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, dim]`` of an activation ``[batch, height, width, channels]``."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height * width, channels)
        # In float32: a mean of many places in bfloat16 would keep two or three digits.
        mean = jnp.mean(x.astype(jnp.float32), axis=1, keepdims=True).astype(x.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        start = nn.initializers.normal(channels**-0.5)
        position = self.param("position", start, (1, *x.shape[1:]))
        x = x + position.astype(x.dtype)
        # Torch's start; queries of the places are computed for nothing, and files have one place.
        options = {"dtype": self.dtype, "kernel_init": start, "dot_general": dot_general}
        dense = functools.partial(nn.Dense, **options)
        qkv = dense(3 * channels, name="qkv")(x)
        qkv = qkv.reshape(batch, -1, 3, self.heads, channels // self.heads)
        mixed = attend(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2])
        return dense(self.dim, name="output")(mixed.reshape(batch, channels))


class CLIPResNet(nn.Module):
    """CLIP's residual network with its attention pooling, whose output is in the space of texts.

    Attributes:
      depths: Blocks in each of the four stages.
      width: Channels of the first stage; each stage doubles it.
      heads: Attention heads of the pooling.
      dim: Number of features.
      dtype: What is computed in; parameters and statistics stay float32.
      axis_name: Device axis over which batch statistics are averaged in training mode.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32
    dim: int = 1024
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns float32 features ``[batch, dim]`` and taps ``stem``, ``stage1/block1``, ..."""
        make = functools.partial(ConvNorm, dtype=self.dtype, axis_name=self.axis_name)
        x = Stem(self.width, make, name="stem")(x.astype(self.dtype), train)
        taps = {"stem": x}
        for index, depth in enumerate(self.depths):
            name, stride = f"stage{index + 1}", 1 if index == 0 else 2
            x, blocks = Stage(Bottleneck, depth, self.width * 2**index, stride, make, name=name)(
                x, train
            )
            taps |= {f"{name}/{block}": activation for block, activation in blocks.items()}
        pool = MeanAttentionPool(self.heads, self.dim, self.dtype, name="pool")
        return pool(x).astype(jnp.float32), taps


def clip_resnet(
    key: jax.Array,
    *,
    depths: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    heads: int | None = None,
    dim: int = 1024,
    image_size: int = 224,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: str = "clip_resnet",
) -> Encoder:
    """Builds one of CLIP's ResNets of any shape, with random weights.

    The defaults are RN50.

    Args:
      key: Random key of the initialization.
      depths: Blocks in each of the four stages.
      width: Channels of the first stage; a multiple of 2.
      heads: Attention heads of the pooling; divides ``32 * width``; None: of 64 features.
      dim: Number of features.
      image_size: Height and width, pixels, a multiple of 32; positions are for this size only.
      mean: Per-channel mean of the training pixels, in [0, 1].
      std: Per-channel standard deviation of the training pixels.
      dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
      name: For tables and manifests.

    Returns:
      An `Encoder` with the taps ``stem``, ``stage1/block1``, ...

    Raises:
      ValueError: If the sizes do not go together.

    Example:
      >>> encoder = clip_resnet(
      ...     jax.random.key(0), depths=(1, 1, 1, 1), width=2, heads=1, dim=5, image_size=32
      ... )
      >>> encoder(jnp.zeros((2, 32, 32, 3))).features.shape
      (2, 5)

    References:
      Radford et al., "Learning Transferable Visual Models", ICML 2021, Section 2.4.
    """
    depths, channels = tuple(depths), 8 * _EXPANSION * width
    if len(depths) != 4 or min(*depths, width, dim) < 1 or width % 2:
        raise ValueError(
            f"there must be four positive depths and an even width, got {depths} and {width}"
        )
    heads = max(channels // _HEAD, 1) if heads is None else heads
    if heads < 1 or channels % heads:
        raise ValueError(
            f"{heads} heads do not divide {channels} channels; take a number that does"
        )
    if image_size < STRIDE or image_size % STRIDE:
        raise ValueError(f"image_size must be a multiple of {STRIDE} pixels, got {image_size}")
    check_sizes(mean, std)
    module = CLIPResNet(depths, width, heads, dim, number_type(dtype))
    variables = first_variables(module, key, image_size)
    return Encoder(variables, module, tuple(mean), tuple(std), image_size, dim, name)
