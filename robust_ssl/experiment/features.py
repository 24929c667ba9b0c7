"""Features of a whole split, computed once: what a head on a frozen encoder can be trained on."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import data, optimizers, struct
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.finetuning.outputs import outputs_read
from robust_ssl.parallel import Parallel
from robust_ssl.types import Classifier, Encoder, Outputs

_log = logging.getLogger(__name__)


def _extract(encoder: Encoder, batch: Mapping[str, jax.Array]) -> jax.Array:
    return encoder(batch["images"].astype(jnp.float32) / 255.0).features


@functools.lru_cache(maxsize=4)
def _extractor(parallel: Parallel):
    return parallel.map(_extract)


def features_of(
    encoder: Encoder, examples, parallel: Parallel, batch_size: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole split's features in evaluation mode, ``[n, dim]``, and labels ``[n]``.

    Without labels none are returned, ``[0]``.
    """
    extract = _extractor(parallel)
    features, labels = [], []
    for batch in data.epoch_batches(examples, batch_size):
        features.append(extract(encoder, {"images": batch["images"]}))
        labels.append(batch.get("labels", np.zeros(0, np.int32)))
    return np.concatenate(features), np.concatenate(labels)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExamples:
    """A split of which only the features are left, in the place of its images.

    Attributes:
      images: Features, ``float32 [n, 1, 1, dim]``.
      labels: ``int32 [n]``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Any, *, places: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns ``{"images", "labels"}`` of the chosen examples, or of some places of them."""
        chosen = indices if places is None else indices[places]
        return {"images": self.images[chosen], "labels": self.labels[chosen]}

    @property
    def resident(self) -> bool:
        """Whether they are few enough to lie on the devices."""
        return self.images.nbytes <= data.batches.RESIDENT_LIMIT


@struct.dataclass
class FeatureEncoder(Encoder):
    """An encoder that also takes its own features, ``[..., 1, 1, dim]``, for images."""

    def __call__(self, images: jax.Array) -> Outputs:
        """Returns the features where they are given, else the encoder's outputs."""
        if images.shape[-3:] == (1, 1, self.dim):
            return Outputs(features=images.reshape(*images.shape[:-3], self.dim))
        return Encoder.__call__(self, images)


def on_features(classifier: Classifier) -> Classifier:
    """Returns the classifier that takes features of its encoder as well as images.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> on_features(net)(jnp.ones((2, 1, 1, 64))).logits.shape
      (2, 3)
    """
    fields = {f.name: getattr(classifier.encoder, f.name) for f in dataclasses.fields(Encoder)}
    return classifier.replace(encoder=FeatureEncoder(**fields))


def shapes(count: int, dim: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of the features of so many images."""
    return jax.ShapeDtypeStruct((count, 1, 1, dim), jnp.float32)


def cached(
    splits: Sequence[Any], encoder: Encoder, parallel: Parallel, batch_size: int
) -> list[FeatureExamples]:
    """Returns the features of each split, one pass over it."""
    _log.info("computing the features of %d images once, for all epochs", sum(map(len, splits)))
    kept = []
    for examples in splits:
        features, labels = features_of(encoder, examples, parallel, batch_size)
        kept.append(FeatureExamples(features.reshape(len(features), 1, 1, -1), labels))
    return kept


def check(recipe: Recipe, classifier: Classifier, rates: Mapping[str, Any]) -> None:
    """Raises ValueError unless features can stand for images in a recipe's training.

    Args:
      recipe: One with `cache_features`.
      classifier: What it starts from.
      rates: Path to learning rate.
    """
    check_frozen(rates)
    losses = {name: term.loss for name, term in recipe.losses.items()}
    read = outputs_read(losses, classifier, False, None)["clean"]
    if taps := sorted(read - {"features", "logits"}):
        raise ValueError(
            f"cache_features keeps features alone, and a loss reads the tap {taps[0]!r}; leave "
            "one of them out"
        )


def check_frozen(rates: Mapping[str, Any]) -> None:
    """Raises ValueError if a parameter of the encoder moves."""
    encoder = {path: rate for path, rate in rates.items() if path.startswith("encoder/")}
    moved = [path for path, rate in encoder.items() if rate != optimizers.FREEZE]
    if moved:
        raise ValueError(
            f"cache_features needs a frozen encoder, and rates move {moved[0]} "
            f'({len(moved)} of {len(encoder)} parameters); write "encoder/**": "freeze"'
        )
