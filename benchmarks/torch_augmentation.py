"""SimCLR's random view on the torch side: a whole batch at once, on the device, in plain torch.

The operations are those of `robust_ssl.pretraining.View`: resized crop, flip, brightness,
contrast, saturation and hue in that order, sometimes gray; every image draws its own numbers.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def simclr_view(images, min_scale: float = 0.2):
    """Returns one random view of each image, ``[batch, 3, H, W]`` in [0, 1]."""
    count, device = len(images), images.device
    draw = torch.rand(count, 10, device=device)
    area = min_scale + (1 - min_scale) * draw[:, 0]
    ratio = torch.exp(math.log(4 / 3) * (2 * draw[:, 1] - 1))
    down, across = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    images = crop(images, draw[:, 2] * (1 - down), draw[:, 3] * (1 - across), down, across)
    images = _choose(draw[:, 4] < 0.5, images.flip(3), images).clamp(0, 1)
    factors = 2 * torch.rand(count, 4, device=device) - 1
    images = _choose(draw[:, 5] < 0.8, color_jitter(images, factors), images)
    return _choose(draw[:, 6] < 0.2, _gray(images).expand_as(images), images)


def crop(images, top, left, down, across):
    """Resizes a rectangle of each image to full size; all four are shares, ``[batch]``."""
    zero = torch.zeros_like(top)
    theta = torch.stack(
        [
            torch.stack([across, zero, 2 * left + across - 1], 1),
            torch.stack([zero, down, 2 * top + down - 1], 1),
        ],
        1,
    )
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color_jitter(images, factors):
    """Scales brightness, contrast and saturation and turns the hue; factors in [-1, 1]."""
    factors = factors.view(len(images), 4, 1, 1, 1)
    images = (images * (1 + 0.8 * factors[:, 0])).clamp(0, 1)
    mean = _gray(images).mean((1, 2, 3), keepdim=True)
    images = (mean + (images - mean) * (1 + 0.8 * factors[:, 1])).clamp(0, 1)
    gray = _gray(images)
    images = (gray + (images - gray) * (1 + 0.8 * factors[:, 2])).clamp(0, 1)
    return _turn_hue(images, 0.2 * factors[:, 3, 0]).clamp(0, 1)


def _choose(where, yes, no):
    return torch.where(where.view(-1, 1, 1, 1), yes, no)


def _gray(images):
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.5870 * green + 0.1140 * blue).unsqueeze(1)


def _turn_hue(images, turn):
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    spread = value - lowest
    norm = 1 / (6 * torch.where(spread > 0, spread, 1.0))
    hue = torch.where(value == green, norm * (blue - red) + 1 / 3, norm * (red - green) + 2 / 3)
    hue = torch.where(value == red, norm * (green - blue), hue)
    hue = torch.where(spread > 0, hue, 0.0)
    sixths = 6 * ((hue + turn) % 1.0)
    wheel = torch.stack(
        [(sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()], 1
    ).clamp(0, 1)
    # value * (1 - saturation) is the lowest of the three, value * saturation their spread.
    return lowest.unsqueeze(1) + spread.unsqueeze(1) * wheel
