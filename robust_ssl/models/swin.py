"""Swin transformers (Liu et al., ICCV 2021) in linen: attention in windows that shift.

Parameter paths are what layer-wise rules are written against: ``stem/conv``, ``stem/norm``,
``stage1/block1/attention/qkv``, ``stage1/block1/mlp/dense1``, ``stage2/downsample/reduction``,
``norm``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.models.convnext import Downsample
from robust_ssl.models.products import dot_general, once
from robust_ssl.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from robust_ssl.models.sizes import check_sizes, first_variables, number_type
from robust_ssl.models.transformer import MLP, layer_norm
from robust_ssl.types import Encoder

_APART = -100.0  # what is added to a logit between places that a shift has brought together


def relative_places(window: int) -> np.ndarray:
    """Returns which relative position each pair of a window's places has, ``[places, places]``.

    Example:
      >>> relative_places(2)[0].tolist()
      [4, 3, 1, 0]
    """
    rows, columns = np.divmod(np.arange(window * window), window)
    steps = [x[:, None] - x[None, :] + window - 1 for x in (rows, columns)]
    return steps[0] * (2 * window - 1) + steps[1]


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """Returns what is added to the logits in each window, ``[windows, 1, places, places]``.

    A shift brings the image's opposite edges into one window; they do not see each other.
    """
    place = np.arange(side)
    part = (place >= side - window).astype(int) + (place >= side - shift)
    parts = 3 * part[:, None] + part[None, :]
    count = side // window
    parts = parts.reshape(count, window, count, window).transpose(0, 2, 1, 3)
    parts = parts.reshape(count * count, 1, window * window)
    apart = parts[..., :, None] != parts[..., None, :]
    return np.where(apart, _APART, 0.0).astype(np.float32)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned number for each relative position."""

    heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        """Returns ``[batch, windows, places, width]``."""
        batch, windows, places, width = x.shape
        start = nn.initializers.truncated_normal(0.02)
        positions = self.param("positions", start, ((2 * self.window - 1) ** 2, self.heads))
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, kernel_init=start, dot_general=dot_general
        )
        heads = (batch, windows, places, self.heads, width // self.heads)
        parts = jnp.split(dense(3 * width, name="qkv")(x), 3, axis=-1)
        queries, keys, values = (once(part.reshape(heads)) for part in parts)
        logits = jnp.einsum("bwphd,bwqhd->bwhpq", queries, keys).astype(jnp.float32)
        logits = logits * (width // self.heads) ** -0.5
        bias = positions[relative_places(self.window)].transpose(2, 0, 1)[None, None]
        logits = logits + bias
        if mask is not None:
            logits = logits + mask[None]
        shares = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bwhpq,bwqhd->bwphd", shares, values)
        mixed = mixed.reshape(batch, windows, places, width)
        return dense(width, name="output")(mixed)


class Block(nn.Module):
    """Attention in windows, shifted or not, and an MLP, each normalized before and added after."""

    heads: int
    window: int
    shift: int
    mlp_ratio: float = 4.0
    pad_first: bool = False
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, side, side, width]``."""
        side, width = x.shape[1], x.shape[-1]
        x = once(x)  # and its gradient, which is the sum of all later ones
        more = -side % self.window
        y = layer_norm(self, "norm1")(x)
        # Both orders are somebody's: what the shift brings to the edge is a pad's zeros or not.
        if self.pad_first:
            y = _rolled(_padded(y, more), -self.shift)
            y = _rolled(self._in_windows(y), self.shift)[:, :side, :side]
        else:
            y = _padded(_rolled(y, -self.shift), more)
            y = _rolled(self._in_windows(y)[:, :side, :side], self.shift)
        x = once(x + y)
        mlp = MLP(round(self.mlp_ratio * width), "gelu", self.dtype, name="mlp")
        return x + mlp(layer_norm(self, "norm2")(x))

    def _in_windows(self, x: jax.Array) -> jax.Array:
        batch, side, _, width = x.shape
        count, window = side // self.window, self.window
        x = x.reshape(batch, count, window, count, window, width).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, count * count, window * window, width)
        mask = shift_mask(side, window, self.shift) if self.shift else None
        x = WindowAttention(self.heads, window, self.dtype, name="attention")(x, mask)
        x = x.reshape(batch, count, count, window, window, width).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, side, side, width)


def _rolled(x: jax.Array, by: int) -> jax.Array:
    return jnp.roll(x, (by, by), axis=(1, 2)) if by else x


def _padded(x: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, more), (0, more), (0, 0))) if more else x


class Merging(nn.Module):
    """Four neighbors become one place of twice the width."""

    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[batch, side / 2, side / 2, 2 * width]``."""
        x = _padded(x, x.shape[1] % 2)
        batch, side, _, width = x.shape
        # Neighbors in the order of files: down the first column, then down the second.
        x = x.reshape(batch, side // 2, 2, side // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        x = layer_norm(self, "norm")(x.reshape(batch, side // 2, side // 2, 4 * width))
        start = nn.initializers.truncated_normal(0.02)
        dense = functools.partial(nn.Dense, dtype=self.dtype, dot_general=dot_general)
        return dense(2 * width, use_bias=False, kernel_init=start, name="reduction")(x)


class Stage(nn.Module):
    """A merging, but for the first stage, and blocks; every second one shifts its windows."""

    depth: int
    heads: int
    window: int
    merged: bool
    mlp_ratio: float = 4.0
    pad_first: bool = False
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the last activation and every block's, by name."""
        if self.merged:
            x = Merging(self.norm_epsilon, self.dtype, name="downsample")(x)
        taps = {}
        for index in range(self.depth):
            # One window is the whole image: there is nothing to shift to.
            shifts = index % 2 and x.shape[1] > self.window
            name = f"block{index + 1}"
            x = Block(
                self.heads, self.window, self.window // 2 if shifts else 0, self.mlp_ratio,
                self.pad_first, self.norm_epsilon, self.dtype, name=name,
            )(x)  # fmt: skip
            taps[name] = x
        return x, taps


class Swin(nn.Module):
    """Swin transformer up to its pooled features: the mean of the normed places.

    Attributes:
      depths: Blocks in each stage.
      width: Channels of the first stage; each stage doubles it.
      heads: Attention heads of each stage.
      windows: Side of each stage's windows, places.
      patch_size: Side of the stem's patches, pixels.
      mlp_ratio: Width between an MLP's layers over its width.
      pad_first: Whether what windows do not tile is padded before the shift (transformers), not
        after it (timm).
      norm_epsilon: Added to the variance in every layer norm.
      dtype: What is computed in; parameters stay float32.
      axis_name: Accepted like every encoder's and unused: there are no batch statistics.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    width: int = 96
    heads: tuple[int, ...] = (3, 6, 12, 24)
    windows: tuple[int, ...] = (7, 7, 7, 7)
    patch_size: int = 4
    mlp_ratio: float = 4.0
    pad_first: bool = False
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns float32 features ``[batch, dim]`` and taps ``stem``, ``stage1/block1``, ..."""
        del train  # no dropout, no batch statistics
        x = Downsample(
            self.width, self.patch_size, False, self.norm_epsilon, self.dtype, name="stem"
        )(x.astype(self.dtype))
        taps = {"stem": x}
        for index, depth in enumerate(self.depths):
            name = f"stage{index + 1}"
            x, blocks = Stage(
                depth, self.heads[index], self.windows[index], index > 0, self.mlp_ratio,
                self.pad_first, self.norm_epsilon, self.dtype, name=name,
            )(x)  # fmt: skip
            taps |= {f"{name}/{block}": activation for block, activation in blocks.items()}
        # In float32: a mean of many places in bfloat16 would keep two or three digits.
        normed = layer_norm(self, "norm")(x).astype(jnp.float32)
        return jnp.mean(normed, axis=(1, 2)), taps


def swin_transformer(
    key: jax.Array,
    *,
    depths: Sequence[int] = (2, 2, 6, 2),
    width: int = 96,
    heads: Sequence[int] = (3, 6, 12, 24),
    windows: int | Sequence[int] = 7,
    patch_size: int = 4,
    image_size: int = 224,
    mlp_ratio: float = 4.0,
    pad_first: bool = False,
    norm_epsilon: float = 1e-5,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: str = "swin_transformer",
) -> Encoder:
    """Builds a Swin transformer of any shape, with random weights.

    The defaults are Swin-T.

    Args:
      key: Random key of the initialization.
      depths: Blocks in each stage.
      width: Channels of the first stage; each stage doubles it.
      heads: Attention heads of each stage; divide its channels.
      windows: Side of windows, places: one number, which is cut to a stage's side as timm does it,
        or one for each stage.
      patch_size: Side of the stem's patches, pixels; divides `image_size`.
      image_size: Height and width, pixels.
      mlp_ratio: Width between an MLP's layers over its width.
      pad_first: What windows do not tile is padded before the shift (transformers), not after it
        (timm).
      norm_epsilon: Of every layer norm.
      mean: Per-channel mean of the training pixels, in [0, 1].
      std: Per-channel standard deviation of the training pixels.
      dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
      name: For tables and manifests.

    Returns:
      An `Encoder` with the taps ``stem``, ``stage1/block1``, ...

    Raises:
      ValueError: If the sizes do not go together.

    Example:
      >>> encoder = swin_transformer(
      ...     jax.random.key(0), depths=(1, 1), width=4, heads=(1, 2), windows=2, image_size=16
      ... )
      >>> encoder(jnp.zeros((1, 16, 16, 3))).taps["stage2/block1"].shape
      (1, 2, 2, 8)

    References:
      Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV
      2021.
    """
    check_sizes(mean, std)
    depths, heads = tuple(depths), tuple(heads)
    sides = _sides(image_size, patch_size, len(depths))
    windows = tuple(min(windows, s) for s in sides) if isinstance(windows, int) else tuple(windows)
    _check(depths, width, heads, windows, sides)
    module = Swin(
        depths, width, heads, windows, patch_size, float(mlp_ratio), pad_first, norm_epsilon,
        number_type(dtype),
    )  # fmt: skip
    variables = first_variables(module, key, image_size)
    dim = width * 2 ** (len(depths) - 1)
    return Encoder(variables, module, tuple(mean), tuple(std), image_size, dim, name)


def _sides(image_size: int, patch_size: int, stages: int) -> list[int]:
    """Places along a side in each stage; an odd side is padded before it is halved."""
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"patches of {patch_size} pixels do not tile an image of {image_size}; patch_size must "
            "divide image_size"
        )
    sides = [image_size // patch_size]
    while len(sides) < stages:
        sides.append(-(-sides[-1] // 2))
    return sides


def _check(depths, width: int, heads, windows, sides: Sequence[int]) -> None:
    if not depths or not len(depths) == len(heads) == len(windows):
        raise ValueError(
            f"depths {depths}, heads {heads} and windows {windows} must be as many, one a stage"
        )
    if min(*depths, width, *heads, *windows) < 1:
        raise ValueError("depths, width, heads and windows must all be positive")
    for stage, (count, window, side) in enumerate(zip(heads, windows, sides, strict=True)):
        channels = width * 2**stage
        if channels % count:
            raise ValueError(f"stage {stage + 1}: {count} heads do not divide {channels} channels")
        if window > side:
            raise ValueError(
                f"stage {stage + 1}: windows of {window} places are larger than its side of "
                f"{side}; take larger images"
            )
