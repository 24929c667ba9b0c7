"""ResNet-18 to -152 (He et al., CVPR 2016) with CIFAR and ImageNet stems, in linen.

Parameter paths are what layer-wise rules are written against: ``stem/conv``, ``stem/norm``,
``stage1/block1/conv1``, ``stage2/block1/shortcut/conv`` and so on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.models.convolution import conv_general_dilated
from robust_ssl.models.sizes import check_sizes, first_variables, number_type
from robust_ssl.types import Encoder

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)  # of the training split's pixels
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision
IMAGENET_STD = (0.229, 0.224, 0.225)

# stem -> (kernel, stride, max-pool, default padding)
STEMS = {"cifar": (3, 1, False, 1), "cifar_half": (3, 2, False, 1), "imagenet": (7, 2, True, 3)}


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm (momentum 0.9, as torch's 0.1)."""

    width: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns ``[batch, height / stride, width / stride, width]``."""
        x = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            # Not "SAME", which pads a strided convolution at the end only; torch pads both sides.
            [(self.padding, self.padding)] * 2,
            use_bias=False,
            dtype=self.dtype,
            # He et al., ICCV 2015, as torchvision starts its ResNets.
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            conv_general_dilated_cls=lambda: (
                conv_general_dilated
            ),  # linen calls it for the function
            name="conv",
        )(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            # Evaluation reads running statistics, so there need be no device axis.
            axis_name=self.axis_name if train else None,
            name="norm",
        )(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    width: int
    stride: int
    make: Any  # functools.partial(ConvNorm, dtype=..., axis_name=...)
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns ``[batch, height / stride, width / stride, width]``."""
        y = nn.relu(self.make(self.width, 3, self.stride, 1, name="conv1")(x, train))
        y = self.make(self.width, 3, 1, 1, name="conv2")(y, train)
        if x.shape[-1] != self.width or self.stride != 1:
            x = self.make(self.width, 1, self.stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as torchvision), 1x1 of four times the width, and a shortcut."""

    width: int
    stride: int
    make: Any
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns ``[batch, height / stride, width / stride, 4 * width]``."""
        out = self.width * self.expansion
        y = nn.relu(self.make(self.width, 1, name="conv1")(x, train))
        y = nn.relu(self.make(self.width, 3, self.stride, 1, name="conv2")(y, train))
        y = self.make(out, 1, name="conv3")(y, train)
        if x.shape[-1] != out or self.stride != 1:
            x = self.make(out, 1, self.stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class Stage(nn.Module):
    """Blocks of one width; the first one strides."""

    block: Any
    depth: int
    width: int
    stride: int
    make: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the last activation and every block's, by name."""
        taps = {}
        block = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block  # 2: train
        for index in range(self.depth):
            stride = self.stride if index == 0 else 1
            name = f"block{index + 1}"
            x = block(self.width, stride, self.make, name=name)(x, train)
            taps[name] = x
        return x, taps


class ResNet(nn.Module):
    """Residual network up to its global average pool.

    Attributes:
      block: `BasicBlock` or `Bottleneck`.
      depths: Blocks in each of the four stages.
      width: Channels of the first stage (64 in the paper); each stage doubles it.
      stem: ``"cifar"`` (3x3, stride 1), ``"cifar_half"`` (3x3, stride 2) or ``"imagenet"``
        (7x7, stride 2, then a 3x3 max-pool of stride 2).
      stem_padding: Zeros around the image, pixels; solo-learn's CIFAR checkpoints use 2.
      dtype: What is computed in; parameters and statistics stay float32.
      axis_name: Device axis over which batch statistics are averaged in training mode.
      remat: Whether a gradient computes each block's activations again instead of keeping them.
    """

    block: Any = BasicBlock
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    stem: str = "cifar"
    stem_padding: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns float32 features ``[batch, dim]`` and taps ``stem``, ``stage1/block1``, ..."""
        make = functools.partial(ConvNorm, dtype=self.dtype, axis_name=self.axis_name)
        kernel, stride, pool, _ = STEMS[self.stem]
        x = make(self.width, kernel, stride, self.stem_padding, name="stem")(
            x.astype(self.dtype), train
        )
        x = nn.relu(x)
        if pool:  # padded on both sides, as torchvision's
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        taps = {"stem": x}
        for index, depth in enumerate(self.depths):
            name = f"stage{index + 1}"
            stage = Stage(
                self.block, depth, self.width * 2**index, 1 if index == 0 else 2, make, self.remat,
                name=name,
            )  # fmt: skip
            x, blocks = stage(x, train)
            taps |= {f"{name}/{block}": activation for block, activation in blocks.items()}
        # float32 for heads, losses and attacks, whatever the network computes in.
        return jnp.mean(x, axis=(1, 2)).astype(jnp.float32), taps


# Blocks and how many of them each stage has: He et al., Table 1.
VARIANTS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def _builder(variant: str) -> Callable[..., Encoder]:
    """Makes the public function of a variant; they differ in blocks, names and features only."""
    block, depths = VARIANTS[variant]
    expansion = 2 ** (len(depths) - 1) * block.expansion

    def build(
        key: jax.Array,
        *,
        width: int = 64,
        stem: Literal["cifar", "cifar_half", "imagenet"] = "cifar",
        stem_padding: int | None = None,
        image_size: int = 32,
        mean: tuple[float, float, float] = CIFAR10_MEAN,
        std: tuple[float, float, float] = CIFAR10_STD,
        dtype: Literal["float32", "bfloat16"] = "float32",
        name: str = variant,
    ) -> Encoder:
        """Builds a RESNET encoder with random weights.

        Args:
          key: Random key of the initialization.
          width: Channels of the first stage; the encoder has ``EXPANSION * width`` features.
          stem: ``"cifar"``, ``"cifar_half"`` or ``"imagenet"``.
          stem_padding: Zeros around the image; None is the stem's usual value (1 for CIFAR, 3 for
            ImageNet).  solo-learn's CIFAR checkpoints were trained with 2.
          image_size: Height and width, pixels.
          mean: Per-channel mean of the training pixels, in [0, 1].
          std: Per-channel standard deviation of the training pixels.
          dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
          name: For tables and manifests.

        Returns:
          An `Encoder` of ``EXPANSION * width`` features.

        Raises:
          ValueError: If `stem` or `dtype` is not known, or a size is not positive.

        Example:
          >>> shapes = jax.eval_shape(lambda key: VARIANT(key, width=1), jax.random.key(0))
          >>> shapes.dim
          EXPANSION

        References:
          He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1.
        """
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {sorted(STEMS)}, got {stem!r}")
        check_sizes(mean, std, width=width, image_size=image_size)
        padding = STEMS[stem][3] if stem_padding is None else stem_padding
        module = ResNet(block, depths, width, stem, padding, number_type(dtype))
        variables = first_variables(module, key, image_size)
        dim = width * expansion
        return Encoder(variables, module, tuple(mean), tuple(std), image_size, dim, name)

    build.__name__ = build.__qualname__ = variant  # a saved encoder's card names its builder so
    # One text, so that the five functions cannot come to say different things.
    title = variant.replace("resnet", "ResNet-")
    for placeholder, value in (("RESNET", title), ("VARIANT", variant), ("EXPANSION", expansion)):
        build.__doc__ = build.__doc__.replace(placeholder, str(value))
    return build


resnet18 = _builder("resnet18")
resnet34 = _builder("resnet34")
resnet50 = _builder("resnet50")
resnet101 = _builder("resnet101")
resnet152 = _builder("resnet152")
