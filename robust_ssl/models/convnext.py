"""ConvNeXt (Liu et al., CVPR 2022) and ConvNeXt V2 (Woo et al., CVPR 2023) in linen.

Parameter paths are what layer-wise rules are written against: ``stem/conv``, ``stem/norm``,
``stage1/block1/conv``, ``stage1/block1/mlp/dense1``, ``stage2/downsample/conv``, ``norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.models.products import dot_general, gelu, once
from robust_ssl.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from robust_ssl.models.sizes import check_sizes, first_variables, number_type
from robust_ssl.types import Encoder

_KERNEL = 7  # of the depthwise convolutions


def _norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    # The two-pass variance: after many residual blocks the mean is no longer small.
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def _truncated():
    return nn.initializers.truncated_normal(0.02)


class Downsample(nn.Module):
    """A convolution of patches that do not overlap and a norm, after it in the stem."""

    width: int
    patch: int
    norm_first: bool
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, height / patch, width / patch, width]``."""
        norm = _norm(self.epsilon, self.dtype, "norm")
        patch = (self.patch, self.patch)
        convolution = nn.Conv(
            self.width, patch, patch, "VALID", dtype=self.dtype, kernel_init=_truncated(),
            name="conv",
        )  # fmt: skip
        return convolution(norm(x)) if self.norm_first else norm(convolution(x))


class ResponseNorm(nn.Module):
    """Global response normalization: a channel's norm over the image against the mean of all."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, height, width, channels]``."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.zeros, (channels,)).reshape(1, 1, 1, -1)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).reshape(1, 1, 1, -1)
        # A root whose gradient at zero is finite; sums of squares are in float32.
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True)
        norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
        relative = norms / (jnp.mean(norms, axis=-1, keepdims=True) + 1e-6)
        response = x * relative.astype(x.dtype)
        return scale.astype(x.dtype) * response + bias.astype(x.dtype) + x


class MLP(nn.Module):
    """Two dense layers, exact GELU between them, and in V2 a response norm after it."""

    response_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, height, width, channels]``."""
        width = x.shape[-1]

        def dense(features: int, name: str) -> nn.Dense:
            options = {"kernel_init": _truncated(), "dot_general": dot_general}
            return nn.Dense(features, dtype=self.dtype, name=name, **options)

        hidden = gelu(dense(4 * width, "dense1")(x))
        if self.response_norm:
            hidden = ResponseNorm(self.dtype, name="response")(hidden)
        return dense(width, "dense2")(hidden)


class Block(nn.Module):
    """A depthwise convolution, a norm and an MLP, added, scaled or not."""

    layer_scale: bool
    response_norm: bool
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, height, width, channels]``."""
        width = x.shape[-1]
        x = once(x)  # and its gradient, which is the sum of all later ones
        y = nn.Conv(
            width, (_KERNEL, _KERNEL), padding=_KERNEL // 2, feature_group_count=width,
            dtype=self.dtype, kernel_init=_truncated(), name="conv",
        )(x)  # fmt: skip
        y = MLP(self.response_norm, self.dtype, name="mlp")(
            _norm(self.epsilon, self.dtype, "norm")(y)
        )
        if self.layer_scale:
            scale = self.param("scale", nn.initializers.constant(1e-6), (width,))
            y = y * scale.astype(y.dtype).reshape(1, 1, 1, -1)
        return x + y


class Stage(nn.Module):
    """A downsampling, but for the first stage, and blocks of one width."""

    depth: int
    width: int
    downsampled: bool
    layer_scale: bool
    response_norm: bool
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the last activation and every block's, by name."""
        if self.downsampled:
            x = Downsample(self.width, 2, True, self.epsilon, self.dtype, name="downsample")(x)
        taps = {}
        block = nn.remat(Block) if self.remat else Block
        for index in range(self.depth):
            name = f"block{index + 1}"
            x = block(self.layer_scale, self.response_norm, self.epsilon, self.dtype, name=name)(x)
            taps[name] = x
        return x, taps


class ConvNeXt(nn.Module):
    """ConvNeXt up to its pooled features, which a norm follows.

    Attributes:
      depths: Blocks in each stage.
      widths: Channels of each stage.
      patch_size: Side of the stem's patches, pixels.
      layer_scale: Whether each block's branch is multiplied by a learned vector (the first
        version).
      response_norm: Whether each MLP has a response norm (V2).
      norm_epsilon: Added to the variance in the last norm.
      inner_epsilon: Added to the variance in all others.
      dtype: What is computed in; parameters stay float32.
      axis_name: Accepted like every encoder's and unused: there are no batch statistics.
      remat: Whether a gradient computes each block's activations again instead of keeping them.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch_size: int = 4
    layer_scale: bool = True
    response_norm: bool = False
    norm_epsilon: float = 1e-6
    inner_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns float32 features ``[batch, dim]`` and taps ``stem``, ``stage1/block1``, ..."""
        del train  # no dropout, no batch statistics
        stem = Downsample(
            self.widths[0], self.patch_size, False, self.inner_epsilon, self.dtype, name="stem"
        )
        x = stem(x.astype(self.dtype))
        taps = {"stem": x}
        for index, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            name = f"stage{index + 1}"
            stage = Stage(
                depth, width, index > 0, self.layer_scale, self.response_norm, self.inner_epsilon,
                self.dtype, self.remat, name=name,
            )  # fmt: skip
            x, blocks = stage(x)
            taps |= {f"{name}/{block}": activation for block, activation in blocks.items()}
        # Before the mean: a mean of many places in bfloat16 would keep two or three digits.
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return _norm(self.norm_epsilon, jnp.float32, "norm")(pooled), taps


def convnext(
    key: jax.Array,
    *,
    depths: Sequence[int] = (3, 3, 9, 3),
    widths: Sequence[int] = (96, 192, 384, 768),
    patch_size: int = 4,
    image_size: int = 224,
    layer_scale: bool = True,
    response_norm: bool = False,
    norm_epsilon: float = 1e-6,
    inner_epsilon: float = 1e-6,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: str = "convnext",
) -> Encoder:
    """Builds a ConvNeXt of any shape, with random weights.

    The defaults are ConvNeXt-T.  V2 has ``layer_scale=False, response_norm=True``.

    Args:
      key: Random key of the initialization.
      depths: Blocks in each stage.
      widths: Channels of each stage; the last is the number of features.
      patch_size: Side of the stem's patches, pixels; 4 for ImageNet, 1 or 2 for small images.
      image_size: Height and width, pixels.
      layer_scale: Each block's branch is multiplied by a learned vector.
      response_norm: Each MLP has a global response norm.
      norm_epsilon: Of the last norm: 1e-6, and 1e-12 in Hugging Face's.
      inner_epsilon: Of all others.
      mean: Per-channel mean of the training pixels, in [0, 1].
      std: Per-channel standard deviation of the training pixels.
      dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
      name: For tables and manifests.

    Returns:
      An `Encoder` with the taps ``stem``, ``stage1/block1``, ...

    Raises:
      ValueError: If there are not as many depths as widths, or the image is too small.

    Example:
      >>> encoder = convnext(
      ...     jax.random.key(0), depths=(1, 1), widths=(4, 8), patch_size=2, image_size=8
      ... )
      >>> encoder(jnp.zeros((1, 8, 8, 3))).taps["stage2/block1"].shape
      (1, 2, 2, 8)

    References:
      Liu et al., "A ConvNet for the 2020s", CVPR 2022; Woo et al., "ConvNeXt V2", CVPR 2023.
    """
    depths, widths = tuple(depths), tuple(widths)
    if not depths or len(depths) != len(widths) or min(*depths, *widths, patch_size) < 1:
        raise ValueError(f"depths {depths} and widths {widths} must be as many, and all positive")
    check_sizes(mean, std, image_size=image_size)
    smallest = patch_size * 2 ** (len(depths) - 1)
    if image_size < smallest:
        raise ValueError(f"images of {image_size} pixels are too small; the least is {smallest}")
    module = ConvNeXt(
        depths, widths, patch_size, layer_scale, response_norm, norm_epsilon, inner_epsilon,
        number_type(dtype),
    )  # fmt: skip
    variables = first_variables(module, key, image_size)
    return Encoder(variables, module, tuple(mean), tuple(std), image_size, widths[-1], name)
