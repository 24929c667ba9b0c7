"""`inspect`: a classifier, its baseline and perhaps new images in, nine checks out."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl import provenance, weights
from robust_ssl.inspection import findings, measuring
from robust_ssl.inspection.baselines import Baseline, read_baseline
from robust_ssl.provenance import Check
from robust_ssl.types import Classifier
from robust_ssl.workdir import versions

SCHEMA = 1
_MOST_NEW = 256  # images whose features are compared; more make no difference that matters
_OF_FILES = ("files", "architecture", "references")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
      checks: Nine, in the order of `NAMES`.
      verdict: ``"pass"``, ``"fail"``, or ``"missing"`` where a needed check had no evidence.
      figures: What is followed over time, numbers or None.
      record: All of it, as ``inspection.json`` has it.
    """

    checks: tuple[Check, ...]
    verdict: str
    figures: Mapping[str, float | None]
    record: Mapping[str, Any]

    def __str__(self) -> str:
        counts = [check.outcome for check in self.checks].count("pass")
        said = "; ".join(check.said for check in self.checks if check.outcome == "fail")
        wrong = f": {said}" if said else ""
        return f"{self.record['model']}: {self.verdict}, {counts} of {len(self.checks)}{wrong}"


def inspect(
    model: Classifier | str | os.PathLike,
    baseline: Baseline | str | os.PathLike,
    images: np.ndarray | None = None,
    *,
    seed: int | None = None,
    note: str = "",
    unreadable: int = 0,
    **options: Any,
) -> Inspection:
    """Compares a classifier with its baseline; writes nothing.

    Files and outputs against the lock, predictions of canary images, accuracy, the stored
    perturbations again, one short new fit, drift of new images, and pace.  The new fit has a new
    seed each time: an old perturbation is not the attacker's next.

    Args:
      model: The directory of a saved classifier, or a value, whose files are then not looked at.
      baseline: What `robust_ssl.inspection.baseline` made, or its folder.
      images: New images without labels, uint8 ``[n, H, W, 3]``, of which at most 256 are looked
        at; None skips the check of drift, and an empty array leaves it without evidence.
      seed: Of the new fit and of what is drawn; None takes one from the time.
      note: What else is to be said of the new images.
      unreadable: How many of them could not be read; above a tenth there is no evidence of drift.
      **options: As `load_classifier` takes them of a classifier with code of its own.

    Returns:
      The inspection.

    Raises:
      FileNotFoundError: If the model or the baseline is not there.
      ValueError: If the baseline cannot be used, is of a model with other classes or another image
        size, or images do not fit.
    """
    begun, when = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    if not isinstance(baseline, Baseline):
        baseline = read_baseline(baseline)
    seed = int(when.timestamp()) % 2**31 if seed is None else seed
    checks = {check.name: check for check in _of_files(model, baseline, options)}
    classifier, problem = _loaded(model, options)
    if classifier is None:
        said = f"the classifier cannot be read: {problem}"
        others = [name for name in findings.NAMES if name not in _OF_FILES]
        checks |= {name: findings.of(name, "absent", said) for name in others}
        figures: dict[str, float | None] = {}
    else:
        _check_fits(classifier, baseline)
        new = _some(images, baseline, seed)
        measured = _measured(classifier, baseline, new, seed, note, unreadable)
        checks |= {check.name: check for check in measured}
        figures = _figures(checks)
    ordered = tuple(checks[name] for name in findings.NAMES)
    verdict = _verdict(ordered, baseline, images is not None)
    record = {
        **_described(model, baseline, when),
        "verdict": verdict,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 2),
        "figures": figures,
        "checks": provenance.as_json(ordered),
    }
    return Inspection(ordered, verdict, figures, record)


def _described(model: Any, baseline: Baseline, when: datetime.datetime) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "when": when.isoformat(timespec="seconds"),
        "model": os.fspath(model) if isinstance(model, str | os.PathLike) else "a value",
        "baseline": baseline.record["sha256"],
        "device": measuring.device(),
        "versions": versions(),
    }


def _of_files(model: Any, baseline: Baseline, options: Mapping[str, Any]) -> list[Check]:
    if not isinstance(model, str | os.PathLike) or baseline.lock is None:
        said = "there is no lock" if baseline.lock is None else "a value has no files"
        return [findings.of(name, "absent", said) for name in _OF_FILES]
    checks = provenance.examine(model, baseline.lock, **options)
    return [
        findings.of(check.name, check.outcome, check.said, **check.evidence)
        for check in checks
        if check.name in _OF_FILES
    ]


def _loaded(model: Any, options: Mapping[str, Any]) -> tuple[Classifier | None, str]:
    if isinstance(model, Classifier):
        return model, ""
    try:
        return weights.load_classifier(model, **options), ""
    except (ValueError, OSError) as error:  # damaged, changed, gone: what an inspection is for
        return None, str(error).splitlines()[0]


def _check_fits(classifier: Classifier, baseline: Baseline) -> None:
    record, size = baseline.record, classifier.encoder.image_size
    ours = {"classes": classifier.num_classes, "image_size": size}
    other = [f"{name} {record[name]}, here {value}" for name, value in ours.items()
             if record[name] != value]  # fmt: skip
    if other:
        raise ValueError(
            f"{baseline.folder} is the baseline of another model: {'; '.join(other)}; give its own"
        )


def _some(images: np.ndarray | None, baseline: Baseline, seed: int) -> np.ndarray | None:
    if images is None or not len(images):
        return images
    if images.dtype != np.uint8 or images.shape[1:] != baseline.images.shape[1:]:
        raise ValueError(
            f"new images must be uint8 of {baseline.images.shape[1:]}, got {images.dtype} of "
            f"{images.shape[1:]}"
        )
    return _some_of(images, seed)


def _some_of(rows: np.ndarray, seed: int) -> np.ndarray:
    """Returns at most `_MOST_NEW`, drawn at random: pictures of a folder come class by class."""
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:_MOST_NEW])]


def _measured(
    classifier: Classifier,
    baseline: Baseline,
    new: np.ndarray | None,
    seed: int,
    note: str,
    unreadable: int,
) -> list[Check]:
    images, labels, record = baseline.images, baseline.labels, baseline.record
    _, logits = measuring.outputs(classifier, images)
    first = record["canaries"]
    now = {
        name: measuring.attacked(classifier, perturbation, images) == labels
        for name, perturbation in baseline.perturbations.items()
    }
    features = new
    if new is not None and len(new):
        features, _ = measuring.outputs(classifier, new)
    return [
        findings.canaries(baseline.logits[:first], logits[:first]),
        findings.accuracy(
            measuring.predicted(baseline.logits) == labels, measuring.predicted(logits) == labels
        ),
        findings.replay(dict(baseline.correct), now),
        _new_fit(classifier, baseline, seed),
        findings.shift(_some_of(baseline.features, record["seed"]), features, note, unreadable),
        findings.latency(
            record["figures"]["milliseconds"],
            measuring.milliseconds(classifier, images),
            record["device"] == measuring.device(),
        ),
    ]


def _new_fit(classifier: Classifier, baseline: Baseline, seed: int) -> Check:
    fits = baseline.record["fits"]
    # Never the seeds of the baseline, whose perturbations are known.
    seed = seed + baseline.record["seed"] + fits["count"]
    try:
        fitted = measuring.short_fit(
            classifier, baseline.images, epsilon=fits["epsilon"], seed=seed, steps=fits["steps"]
        )
    except ValueError as error:  # an objective that is no number
        return findings.of("new_fit", "fail", f"no perturbation can be fitted: {error}", seed=seed)
    right = measuring.attacked(classifier, fitted, baseline.images) == baseline.labels
    return findings.new_fit(baseline.fits, right, seed)


def _figures(checks: Mapping[str, Check]) -> dict[str, float | None]:
    replayed = checks["replay"].evidence.get("perturbations", {})
    return {
        "accuracy": checks["accuracy"].evidence.get("now"),
        "replay": min((entry["now"] for entry in replayed.values()), default=None),
        "new_fit": checks["new_fit"].evidence.get("now"),
        "drift_p": checks["drift"].evidence.get("p"),
        "milliseconds": checks["latency"].evidence.get("now"),
    }


def _verdict(checks: tuple[Check, ...], baseline: Baseline, with_images: bool) -> str:
    needed = {"canaries", "accuracy", "new_fit"}
    if baseline.lock is not None:
        needed |= set(_OF_FILES)
    if baseline.perturbations:
        needed.add("replay")
    if with_images:
        needed.add("drift")
    if provenance.differs(checks):
        return "fail"
    return "missing" if provenance.is_missing(checks, needed) else "pass"
