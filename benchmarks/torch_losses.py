"""The losses of the torch side: the same formulas as this package's, in plain torch."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

_STABILIZER = 1e-6


def genetic_regularization(clean, adversarial, labels):
    """Gen-AF's regularizer on logits, the clean ones as a constant; the mean over images."""
    clean = clean.detach()
    error = functional.cross_entropy(clean, labels, reduction="none")
    doubt = torch.tanh((error[:, None] + error[None, :]) / 32)
    sign = 1 - 2 * (labels[:, None] == labels[None, :]).float()
    diagonal = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    target = (1 - doubt) * _local_distances(clean, diagonal) + 2 * sign * doubt
    p = _neighbours(target, diagonal)
    q = _neighbours(_local_distances(adversarial, diagonal), diagonal)
    difference = p.log() - torch.log1p(-p) - q.log() + torch.log1p(-q)
    return ((p - q) * difference).sum(1).mean()


def _local_distances(outputs, diagonal):
    directions = functional.normalize(outputs, dim=1)
    distances = 1 - directions @ directions.T
    return distances - distances.masked_fill(diagonal, 4.0).amin(1, keepdim=True)


def _neighbours(distances, diagonal):
    similarities = (1 - distances.clamp(0, 2) / 2).masked_fill(diagonal, 0.0)
    shares = similarities / similarities.sum(1, keepdim=True).clamp(min=_STABILIZER)
    return shares.clamp(_STABILIZER, 1 - _STABILIZER)


def info_nce(clean, adversarial, temperature: float = 0.1):
    """How hard it is to find each clean image's own adversarial image; the mean over images."""
    cosines = functional.normalize(clean, dim=1) @ functional.normalize(adversarial, dim=1).T
    own = torch.arange(len(clean), device=clean.device)
    return functional.cross_entropy(cosines / temperature, own)


def high_pass(images, cutoff: float = 8 / 64):
    """Removes spatial frequencies below `cutoff` cycles per pixel from ``[batch, 3, H, W]``."""
    height, width = images.shape[2:]
    vertical = torch.fft.fftfreq(height, device=images.device).view(height, 1)
    horizontal = torch.fft.rfftfreq(width, device=images.device).view(1, -1)
    keep = vertical**2 + horizontal**2 >= cutoff**2
    return torch.fft.irfft2(torch.fft.rfft2(images) * keep, s=(height, width))


def advencoder_released(clean, adversarial, change):
    """AdvEncoder's objective as released; `change` is adversarial minus clean pixels."""
    return (
        5 * info_nce(clean, adversarial)
        - change.square().mean()
        + high_pass(change).square().mean()
    )


def nt_xent(first, second, temperature: float = 0.2):
    """SimCLR's loss between the projections of two views; the mean over images."""
    count = len(first)
    both = functional.normalize(torch.cat([first, second]), dim=1)
    similarity = (both @ both.T / temperature).fill_diagonal_(-math.inf)
    own = torch.arange(2 * count, device=both.device).roll(count)
    return functional.cross_entropy(similarity, own)
