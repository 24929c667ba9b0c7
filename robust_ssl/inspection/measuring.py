"""What is measured of a classifier: its answers, also under perturbations, and its pace."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, evaluation
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.parallel import Parallel
from robust_ssl.types import Classifier

BATCH = 64
STEPS = 40  # of a short fit: the loss of most of what a long one takes, in seconds
_ROUNDS = 7


def outputs(classifier: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns features ``[n, dim]`` and logits ``[n, classes]`` of uint8 or float images."""
    features, logits = [], []
    for count, batch in _batches(images):
        answer = _outputs(classifier, batch)
        features.append(np.asarray(answer.features)[:count])
        logits.append(np.asarray(answer.logits)[:count])
    return np.concatenate(features), np.concatenate(logits)


def attacked(
    classifier: Classifier, perturbation: UniversalPerturbation, images: np.ndarray
) -> np.ndarray:
    """Returns the predictions under a perturbation, int ``[n]``; images are rounded to 8 bits."""
    answers = []
    for start, (count, batch) in enumerate(_batches(images)):
        key = jax.random.fold_in(jax.random.key(0), start)  # of a patch's places
        answers.append(np.asarray(_attacked(classifier, perturbation, batch, key))[:count])
    return np.concatenate(answers)


def predicted(logits: np.ndarray) -> np.ndarray:
    """Returns the likeliest classes; -1 where a logit is no number."""
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def short_fit(
    classifier: Classifier, images: np.ndarray, *, epsilon: float, seed: int, steps: int = STEPS
) -> UniversalPerturbation:
    """Fits one perturbation against the encoder in seconds: what an attacker would try next.

    Args:
      classifier: Whose encoder is attacked.
      images: What it is fitted on, uint8 ``[n, H, W, 3]``.
      epsilon: Budget under Linf, pixel units.
      seed: Of its start and its batches.
      steps: Of the fit.
    """
    keys, epsilons = attacks.members(seeds=(seed,), epsilons=(epsilon,))
    fitted = attacks.fit(
        attacks.UniversalPGD(step_size=epsilon / 8),
        classifier.encoder,
        _drawn(images, steps, seed),
        keys=keys,
        epsilons=epsilons,
        image_shape=images.shape[1:],
        parallel=Parallel.create(num_devices=1),
    )
    return fitted.member(0)


def _drawn(images: np.ndarray, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(seed)
    size = min(BATCH, len(images))
    for _ in range(steps):
        rows = random.choice(len(images), size, replace=False)
        yield {"images": evaluation.to_pixels(images[rows])}


def milliseconds(classifier: Classifier, images: np.ndarray) -> float:
    """Returns what one image takes in a batch, at best: others may be at work, too."""
    _, batch = next(_batches(images))
    jax.block_until_ready(_outputs(classifier, batch))  # compiled
    taken = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready(_outputs(classifier, batch))
        taken.append(time.perf_counter() - begun)
    return 1000 * min(taken) / len(batch)


def device() -> str:
    """Returns what it is measured on, so that only like is compared with like."""
    first = jax.devices()[0]
    return f"{first.platform} {first.device_kind} {os.cpu_count()} cores"


def _batches(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of images, batch), all of one shape: what is padded repeats the first."""
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        count = len(batch)
        yield count, np.concatenate([batch, np.repeat(batch[:1], BATCH - count, axis=0)])


@jax.jit
def _outputs(classifier: Classifier, images: jax.Array) -> Any:
    return classifier(evaluation.to_pixels(images)).without_taps()


@jax.jit
def _attacked(classifier: Classifier, perturbation, images: jax.Array, key: jax.Array) -> jax.Array:
    changed = perturbation.apply(evaluation.to_pixels(jnp.asarray(images)), key)
    return evaluation.predictions(classifier, evaluation.quantize(changed))
