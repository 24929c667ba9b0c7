"""The networks of the torch side: the same layers as this package's, as one writes them in torch.

Parameter names follow the package's paths (``stage1.block1.conv1.conv.weight``), so that a test
can carry weights over and compare outputs.
"""

from __future__ import annotations

import torch
from torch import nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
STEMS = {"cifar": (3, 1, 1, False), "cifar_half": (3, 2, 1, False), "imagenet": (7, 2, 3, True)}


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        """Returns ``[batch, outputs, H / stride, W / stride]``."""
        return self.norm(self.conv(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 3, stride, 1)
        self.conv2 = ConvNorm(outputs, outputs, 3, 1, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        """Returns ``[batch, outputs, H / stride, W / stride]``."""
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.shortcut(x))


class Normalize(nn.Module):
    """Pixels in [0, 1] less their mean, by their deviation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images):
        """Returns ``[batch, 3, H, W]``."""
        return (images - self.mean) / self.std


class ResNet18(nn.Module):
    """Pixels in [0, 1] to ``8 * width`` features; normalizes by itself."""

    def __init__(self, width: int, stem: str):
        super().__init__()
        kernel, stride, padding, pool = STEMS[stem]
        self.normalize = Normalize()
        self.stem = ConvNorm(3, width, kernel, stride, padding)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        inputs = width
        for index in range(4):
            outputs = width * 2**index
            stage = nn.Sequential()
            stage.add_module("block1", BasicBlock(inputs, outputs, 1 if index == 0 else 2))
            stage.add_module("block2", BasicBlock(outputs, outputs, 1))
            self.add_module(f"stage{index + 1}", stage)
            inputs = outputs
        self.dim = inputs

    def forward(self, images):
        """Returns features, ``[batch, dim]``."""
        x = self.pool(self.relu(self.stem(self.normalize(images))))
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return x.mean((2, 3))


class MLPHead(nn.Sequential):
    """Gen-AF's head: dense, ReLU, dropout, dense, ReLU, dense."""

    def __init__(self, dim: int, classes: int, hidden: int = 512, dropout: float = 0.2):
        super().__init__(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes),
        )  # fmt: skip


class Projector(nn.Sequential):
    """SimCLR's projector: dense, ReLU, dense."""

    def __init__(self, dim: int, hidden: int, projections: int):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, projections))


class Generator(nn.Module):
    """AdvEncoder's generator with instance norm: noise ``[n, 100]`` to ``[3, size, size]``."""

    def __init__(self, size: int, channels: int, noise_vectors: int):
        super().__init__()
        doublings = (size // 4).bit_length() - 1
        self.size, self.start = size, -(-size // 2**doublings)
        width = channels * 2 ** (doublings - 1)
        self.dense = nn.Linear(100, self.start**2 * width, bias=False)
        layers: list[nn.Module] = []
        for index in range(doublings):
            last = index == doublings - 1
            after = 3 if last else width // 2
            layers += [
                nn.InstanceNorm2d(width, eps=1e-6, affine=True),
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(width, after, 4, 2, 1, bias=last),
            ]
            width = after
        self.layers = nn.Sequential(*layers)
        self.mix = nn.Conv2d(noise_vectors, 1, 3, padding=1, bias=False)

    def forward(self, noise):
        """Returns the perturbation in [-1, 1]."""
        x = self.dense(noise).view(len(noise), -1, self.start, self.start)
        x = x.contiguous(memory_format=torch.channels_last)
        images = torch.tanh(self.layers(x)[:, :, : self.size, : self.size])
        return torch.tanh(self.mix(images.transpose(0, 1))[:, 0])  # each color by itself
