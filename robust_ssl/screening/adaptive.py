"""How detectors fare under attacks that know them, on single images and for all images at once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, threats
from robust_ssl.evaluation import to_pixels
from robust_ssl.screening import verdict
from robust_ssl.screening.bench import Arrays, Bench
from robust_ssl.screening.evasion import Evasion, UniversalEvasion
from robust_ssl.screening.statistics import JUDGED, alarms, separation, threshold
from robust_ssl.types import Threat

# The attacker aims below the threshold, since rounding to 8 bits moves a score.
_AIM = 0.9
_KINDS = ("per_image", "universal")


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """How the adaptive attacks are made.

    Attributes:
      epsilon: The budget of both, what `threat` takes.
      threat: Makes a threat of a budget.
      images: Clean images that are attacked one by one; the universal attack takes all.
      num_steps: Steps of the attack on single images.
      weights: Of the detector's score, as for `Evasion`, as are the next.
      cutoffs: Each is tried with each weight, and an image counts under what does most to it.
      universal_steps: Steps of the universal attack; 0 leaves it out.
      universal_batch: Its images a step.
    """

    epsilon: float
    threat: Callable[[Any], Threat] = threats.Linf
    images: int = 128
    num_steps: int = 40
    weights: tuple[float, ...] = (1.0,)
    cutoffs: tuple[float, ...] = (1.0, 0.25)
    universal_steps: int = 200
    universal_batch: int = 64

    def __post_init__(self):
        for name in ("weights", "cutoffs"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name} must be at least one number above 0, got {list(values)}")

    @property
    def tries(self) -> list[tuple[float, float]]:
        """Every weight with every cutoff."""
        return list(itertools.product(self.weights, self.cutoffs))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which attacks are made."""
        return _KINDS if self.universal_steps else _KINDS[:1]


class Target(NamedTuple):
    """A detector that is to be passed.

    Attributes:
      name: Its name.
      detector: With scores in nats.
      calibration: Its nats of the calibration images.
      clean: Of the clean images.
    """

    name: str
    detector: Any
    calibration: np.ndarray
    clean: np.ndarray

    @property
    def threshold(self) -> float:
        """The score that 5 % of clean images exceed."""
        return threshold(self.calibration, JUDGED)


def pass_detector(
    bench: Bench, target: Target, settings: Adaptive, right: np.ndarray
) -> list[dict[str, Any]]:
    """Attacks classifier and detector at once; returns an entry for each kind of attack.

    Args:
      bench: The model and the images.
      target: What is to be passed.
      settings: How.
      right: Which clean images are classified correctly when nobody attacks, bool ``[n]``.
    """
    entries = []
    for kind in settings.kinds:
        # Without a weight it is the attack that does not know the detector, in the same program.
        plain = bench.keep(f"plain-{kind}", lambda k=kind: _tried(bench, target, settings, k, 0, 1))
        parts = [
            bench.keep(
                f"{kind}-{target.name}-{weight:g}-{cutoff:g}",
                lambda k=kind, w=weight, c=cutoff: _tried(bench, target, settings, k, w, c),
            )
            for weight, cutoff in settings.tries
        ]
        entries.append(_entry(bench, target, settings, kind, right, plain, parts))
    return entries


def count_parts(settings: Adaptive | None, detectors: int) -> int:
    """Returns how many parts `pass_detector` keeps for a number of detectors."""
    if settings is None:
        return 0
    return len(settings.kinds) * (1 + detectors * len(settings.tries))


def _tried(
    bench: Bench, target: Target, settings: Adaptive, kind: str, weight: float, cutoff: float
) -> Arrays:
    known = {
        "detector": target.detector,
        "detector_key": bench.detector_key,
        "threshold": jnp.float32(_AIM * target.threshold),
        "weight": jnp.float32(weight),
        "cutoff": jnp.float32(cutoff),
    }
    if kind == "per_image":
        threat = settings.threat(settings.epsilon)
        attack: Any = Evasion(threat, **known, num_steps=settings.num_steps)
        attacked = bench.attack(attack, settings.images)
    else:
        attacked = bench.attack(_fit(bench, settings, known))
    scores = bench.scores(target.detector, attacked["images"])
    return {"answers": attacked["answers"], "scores": scores}


def _fit(bench: Bench, settings: Adaptive, known: Mapping[str, Any]) -> Any:
    steps = jnp.float32(settings.universal_steps)
    attack = UniversalEvasion(bench.model, **known, num_steps=steps)
    keys, epsilons = attacks.members((0,), (settings.epsilon,))
    fitted = attacks.fit(
        *(attack, bench.model, _random_batches(bench, settings)),
        keys=keys,
        epsilons=epsilons,
        image_shape=bench.images.fit.shape[1:],
        parallel=bench.parallel,
        threat=settings.threat,
    )
    return fitted.member(0)


def _random_batches(bench: Bench, settings: Adaptive) -> Iterator[dict[str, jax.Array]]:
    random, images = np.random.default_rng(0), bench.images.fit
    devices = len(bench.parallel.devices)
    size = max(min(settings.universal_batch, len(images)) // devices, 1) * devices
    for _ in range(settings.universal_steps):
        rows = random.choice(len(images), size, replace=size > len(images))
        yield {"images": to_pixels(images[rows])}


def _entry(
    bench: Bench,
    target: Target,
    settings: Adaptive,
    kind: str,
    right: np.ndarray,
    plain: Arrays,
    parts: list[Arrays],
) -> dict[str, Any]:
    count = len(plain["answers"])
    labels, right = bench.images.labels[:count], right[:count]
    wrong = np.stack([part["answers"] != labels for part in parts])
    scores = np.stack([part["scores"] for part in parts])
    passed = scores <= target.threshold
    # Each image counts under the weight that does most: wrong unseen, then seen the least.
    best = np.lexsort((scores, ~(wrong & passed)), axis=0)[0]
    each = np.arange(count)
    judged = verdict.judge(right, plain["answers"] != labels, wrong[best, each], passed[best, each])
    return {
        "attack": "evasion" if kind == "per_image" else "universal_evasion",
        "family": kind,
        "crafted_against": "hardened",
        "threat": type(settings.threat(settings.epsilon)).__name__,
        "epsilon": settings.epsilon,
        "n": count,
        "num_steps": settings.num_steps if kind == "per_image" else settings.universal_steps,
        **separation(target.clean, scores[best, each]),
        **alarms(target.calibration, scores[best, each]),
        **judged,
    }
