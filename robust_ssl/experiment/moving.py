"""What of a network moves, where learning rates alone do not say it: chosen layers, adapters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax

from robust_ssl import finetuning, optimizers
from robust_ssl.build import Count, Positive, Range, read


class Layers:
    """How many layers: a whole number, or a share of them in (0, 1]."""

    @classmethod
    def read(cls, value: Any, where: str) -> int | float:
        """Reads the one or the other."""
        for kind in (Count, Annotated[float, Range(0, 1, above=True)]):
            with contextlib.suppress(ValueError):
                return read(kind, value, where)
        raise ValueError(
            f"{where} must be a whole number of at least 1, or a share in (0, 1], got {value!r}"
        )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Only robust-redundant layers move: those whose weights can be perturbed at least cost.

    Attributes:
      images: Validation images that it is measured on.
      num_steps: Ascent steps in each layer's weights.
      learning_rate: Of these steps, of plain gradient ascent.
      radius: How far weights may go, relative to their norm.
      layers: How many layers move: a whole number of them, or what part of all, in (0, 1].
      rate: Learning rate of those that move.

    References:
      Zhou et al., IEEE S&P 2024, second stage.
    """

    images: Count = 256
    num_steps: Count = 10
    learning_rate: Positive = 1.0
    radius: Positive = 0.1
    layers: Layers = 0.2
    rate: Positive = 1e-3

    def choose(self, scores: Mapping[str, float]) -> list[str]:
        """Returns the layers that move.

        Args:
          scores: Sensitivity by layer.

        Raises:
          ValueError: If that is none of them, or more than there are.
        """
        whole = isinstance(self.layers, int)
        return finetuning.select_redundant(
            scores,
            top_k=self.layers if whole else None,
            top_k_fraction=None if whole else self.layers,
        )


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters of frozen kernels, which are trained in their place.

    Attributes:
      rank: Of the adapters.
      alpha: Their product is multiplied by ``alpha / rank``.
      rate: Their learning rate.
      kernels: Path patterns of the kernels that have one: a ViT's attention.

    References:
      Hu et al., "LoRA", ICLR 2022.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    rate: Positive = 1e-3
    kernels: tuple[str, ...] = ("encoder/**/attention/**/kernel",)

    def adapters(self, params: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
        """Returns them as `finetuning.init_state` takes them."""
        return finetuning.adapters(params, self.kernels, rank=self.rank, alpha=self.alpha, key=key)

    def check(self, params: Mapping[str, Any], rates: Mapping[str, Any]) -> None:
        """Raises ValueError unless every kernel with an adapter is there, large and frozen."""
        jax.eval_shape(self.adapters, params, jax.eval_shape(lambda: jax.random.key(0)))
        for pattern in self.kernels:
            for path in optimizers.match_paths(rates, pattern):
                if rates[path] != optimizers.FREEZE:
                    raise ValueError(
                        f"{path} has an adapter and moves itself, at {rates[path]}; write "
                        '"encoder/**": "freeze" in rates'
                    )
