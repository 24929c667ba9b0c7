"""What an inspection compares with: a folder of its own, made when the classifier was approved."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import data, disk, models, provenance, threats, weights
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.data.resizing import Resizing
from robust_ssl.inspection import measuring
from robust_ssl.types import Classifier
from robust_ssl.weights import cards, transforms
from robust_ssl.workdir import versions

_log = logging.getLogger(__name__)

SCHEMA = 1
CARD, ARRAYS, LOCK = "baseline.json", "baseline.npz", "encoder.lock.json"
_MOST_BYTES = 2**26  # of the images that are kept
_EPSILON = 8 / 255  # of the short fits where no perturbation says more
_FITS = 5  # short fits with seeds of their own, by whose spread a new one is judged


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """What a classifier was when it was approved.

    Attributes:
      folder: Where it lies.
      record: What ``baseline.json`` says.
      images: Its images, uint8 ``[n, H, W, 3]``.
      labels: Their classes, int ``[n]``.
      logits: The classifier's answers, float ``[n, classes]``.
      features: Its features, float ``[n, dim]``.
      correct: Which images were right under each stored perturbation, bool ``[n]``, and under each
        short fit, ``"fit 0"`` to ``"fit 4"``.
      perturbations: The stored perturbations by name.
      lock: Of the classifier's files; None where it was made from a value.
    """

    folder: pathlib.Path
    record: Mapping[str, Any]
    images: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    features: np.ndarray
    correct: Mapping[str, np.ndarray]
    perturbations: Mapping[str, UniversalPerturbation]
    lock: Mapping[str, Any] | None

    @property
    def resizing(self) -> Resizing | None:
        """How the classifier's pictures got their size, where it says so."""
        told = self.record.get("resizing")
        return transforms.resizing(told, self.record["image_size"]) if told else None

    @property
    def fits(self) -> list[np.ndarray]:
        """Which images were right under each short fit."""
        return [self.correct[f"fit {place}"] for place in range(self.record["fits"]["count"])]


def baseline(
    classifier: Classifier | str | os.PathLike,
    images: Any,
    labels: Any,
    perturbations: Mapping[str, UniversalPerturbation] | Sequence[UniversalPerturbation],
    folder: str | os.PathLike,
    *,
    canaries: int = 128,
    limit: int = 512,
    epsilon: float | None = None,
    seed: int = 0,
    replace: bool = False,
    **options: Any,
) -> Baseline:
    """Writes what later inspections of a classifier compare with.

    The folder is complete in itself: images, answers, perturbations, a lock, figures.  Whoever has
    it has these images; choose such as may be kept.

    Args:
      classifier: The directory of a saved one, whose files are then locked; or a value.
      images: Of the task, which the classifier was not trained on, ``uint8`` or float in [0, 1],
        ``[n, H, W, 3]``.
      labels: Their classes, int ``[n]``, in the order of the logits.
      perturbations: Fitted ones, whose effect is replayed; by name, or each by its own name.
      folder: Made if it is not there.
      canaries: So many images must keep their predictions.
      limit: At most so many images are kept, drawn by `seed`; fewer where they are large.
      epsilon: Budget of the short fits, pixel units; None is that of the perturbations.
      seed: Of the images and the short fits.
      replace: Whether a baseline that lies there may be replaced: it is what was approved.
      **options: As `provenance.lock` takes them of a classifier with code of its own.

    Returns:
      The baseline, as `read_baseline` reads it.

    Raises:
      ValueError: If images, labels, perturbations and classifier do not fit, or it is no
        `Classifier`, or cannot be locked as it is.
      FileExistsError: If there is one and it may not be replaced.
      OSError: If it cannot be written.
    """
    if (pathlib.Path(folder) / CARD).exists() and not replace:
        raise FileExistsError(f"there is a baseline in {folder}; remove it, or give another folder")
    for name, value in (("canaries", canaries), ("limit", limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1 image, got {value}")
    classifier, lock = _locked(classifier, options)
    examples = _drawn(images, labels, classifier, limit, seed)
    named = _named(perturbations, examples.images.shape[1:])
    epsilon = _budget(named) if epsilon is None else epsilon
    arrays, figures = _measured(classifier, examples, named, epsilon, seed)
    record = {
        **_described(classifier),
        "seed": seed,
        "images": len(examples),
        "canaries": min(canaries, len(examples)),
        "fits": {"count": _FITS, "steps": measuring.STEPS, "epsilon": float(epsilon)},
        "figures": figures,
    }
    _write(pathlib.Path(folder), record, arrays, named, lock)
    return read_baseline(folder)


def in_order_of_logits(
    classifier: Classifier, labels: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    """Returns labels of classes in the order of a classifier's logits, int ``[n]``.

    Another data set may have the same classes in another order.  Where one of the two has no names
    but numbers, they are taken as they are.

    Args:
      classifier: The classifier.
      labels: Places in `class_names`, int ``[n]``.
      class_names: Of the data set.

    Raises:
      ValueError: If its logits stand for other classes.
    """
    mine = classifier.class_names
    if not mine or data.is_numbered(mine) or data.is_numbered(class_names):
        if not data.is_numbered(class_names):
            _log.warning("the classifier: %s", data.taken_in_order(mine, class_names))
        return labels
    models.in_order_of(classifier, class_names)
    return np.asarray([mine.index(name) for name in class_names])[labels]


def _described(classifier: Classifier) -> dict[str, Any]:
    resizing, size = classifier.encoder.resizing, classifier.encoder.image_size
    return {
        **({} if resizing is None else {"resizing": transforms.described(resizing, size)}),
        "schema": SCHEMA,
        "kind": "robust_ssl inspection baseline",
        "versions": versions(),
        "classes": classifier.num_classes,
        "class_names": list(classifier.class_names),
        "image_size": size,
        "device": measuring.device(),
    }


def _locked(
    classifier: Any, options: Mapping[str, Any]
) -> tuple[Classifier, dict[str, Any] | None]:
    """Returns the classifier, and the lock of its files where it is a directory."""
    lock = None
    if isinstance(classifier, str | os.PathLike):
        source = provenance.open_source(classifier, **options)
        if source.kind != "classifier":
            raise ValueError(f"{classifier} is no saved classifier; an encoder has no answers")
        lock = provenance.lock(source)
        classifier = weights.load_classifier(source.path, **options)
    if not isinstance(classifier, Classifier):
        raise ValueError(f"need a Classifier or its directory, got {type(classifier).__name__}")
    return classifier, lock


def _drawn(images: Any, labels: Any, classifier: Classifier, limit: int, seed: int) -> Any:
    names = classifier.class_names or [str(place) for place in range(classifier.num_classes)]
    examples = data.from_arrays(images, labels, class_names=names, name="baseline", split="test")
    size = classifier.encoder.image_size
    if examples.image_shape[:2] != (size, size):
        raise ValueError(f"images are {examples.image_shape}, the classifier takes {size} pixels")
    most = max(1, min(limit, _MOST_BYTES // int(np.prod(examples.image_shape))))
    # In random order: a folder's come class by class, and some checks look at the first of them.
    return examples.take(np.random.default_rng(seed).permutation(len(examples))[:most])


def _named(perturbations: Any, shape: tuple[int, ...]) -> dict[str, UniversalPerturbation]:
    if isinstance(getattr(perturbations, "value", perturbations), UniversalPerturbation):
        perturbations = [perturbations]
    pairs = (
        perturbations.items() if isinstance(perturbations, Mapping) else enumerate(perturbations)
    )
    named: dict[str, UniversalPerturbation] = {}
    for key, value in pairs:
        value = getattr(value, "value", value)  # what `robust_ssl.attack` returns holds it
        if not isinstance(value, UniversalPerturbation):
            raise ValueError(f"perturbation {key!r} is a {type(value).__name__}; fit it first")
        if value.delta.shape != shape:
            raise ValueError(
                f"perturbation {key!r} is of {value.delta.shape} and images are of {shape}; "
                f".resized({shape[0]}) fits it"
            )
        name = key if isinstance(key, str) else value.name
        named[f"{name} {len(named)}" if name in named else name] = value
    return named


def _budget(named: Mapping[str, UniversalPerturbation]) -> float:
    budgets = [
        float(p.threat.epsilon) for p in named.values() if isinstance(p.threat, threats.Linf)
    ]
    return max(budgets, default=_EPSILON)


def _measured(classifier, examples, named, epsilon, seed) -> tuple[dict[str, Any], dict[str, Any]]:
    images, labels = examples.images, examples.labels
    features, logits = measuring.outputs(classifier, images)
    if not np.isfinite(logits).all():
        raise ValueError("the classifier's logits are not finite for some of these images")
    arrays = {"images": images, "labels": labels, "features": features, "logits": logits}
    right = measuring.predicted(logits) == labels
    correct = {n: measuring.attacked(classifier, p, images) == labels for n, p in named.items()}
    for place in range(_FITS):
        fitted = measuring.short_fit(classifier, images, epsilon=epsilon, seed=seed + place)
        correct[f"fit {place}"] = measuring.attacked(classifier, fitted, images) == labels
    arrays |= {f"correct {name}": under for name, under in correct.items()}
    figures = {
        "accuracy": float(right.mean()),
        "under": {name: float(under.mean()) for name, under in correct.items()},
        "milliseconds": measuring.milliseconds(classifier, images),
    }
    return arrays, figures


def _write(folder: pathlib.Path, record, arrays, named, lock) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The card last: until it is there, or if it is of before, what lies here does not fit it.
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    files = {ARRAYS: content.getvalue()}
    (folder / "perturbations").mkdir(exist_ok=True)
    entries = {}
    for place, (name, perturbation) in enumerate(named.items()):
        safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60]
        file = f"perturbations/{place}-{safe}.npz"
        perturbation.save(folder / file)
        files[file], entries[name] = (folder / file).read_bytes(), file
    if lock is not None:
        files[LOCK] = cards.encode(lock)
    for name, text in files.items():
        cards.replace_file(folder / name, text)
    sums = {name: hashlib.sha256(text).hexdigest() for name, text in files.items()}
    record = {**record, "perturbations": entries, "files": sums}
    cards.replace_file(folder / CARD, cards.encode(record))


def read_baseline(folder: str | os.PathLike, threat: Any = None) -> Baseline:
    """Reads a baseline and checks all of it.

    Args:
      folder: What `baseline` wrote, or a directory that has it in ``baseline/``.
      threat: The class of a threat of your own, as `UniversalPerturbation.load` takes it.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is of a newer version, or not what was written.
    """
    folder = disk.expanded(folder)
    if not (folder / CARD).is_file() and (folder / "baseline" / CARD).is_file():
        folder = folder / "baseline"
    if not (folder / CARD).is_file():
        raise FileNotFoundError(
            f"no baseline in {folder} (there is no {CARD}); make one: robust-ssl inspect MODEL "
            f"--make-baseline {folder} --data DATA"
        )
    record = cards.read_sealed(folder / CARD, "baseline", SCHEMA, "baseline")
    for name, sum_ in record["files"].items():
        if hashlib.sha256(_content(folder, name)).hexdigest() != sum_:
            raise ValueError(f"{folder / name} is not what was written; bring it back from a copy")
    with disk.open_regular(folder / ARRAYS) as file:
        arrays = disk.read_npz(file, 2**30)
    names = {"images", "labels", "logits", "features"}
    correct = {n.removeprefix("correct "): a for n, a in arrays.items() if n not in names}
    stored = {
        name: UniversalPerturbation.load(folder / file, threat)
        for name, file in record["perturbations"].items()
    }
    lock = provenance.read_lock(folder / LOCK) if LOCK in record["files"] else None
    kept = {name: arrays[name] for name in names}
    return Baseline(folder, record, **kept, correct=correct, perturbations=stored, lock=lock)


def _content(folder: pathlib.Path, name: str) -> bytes:
    # A name from a file must not lead out of the folder.
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{folder / CARD} names a file outside its folder: {name!r}")
    return disk.read_bytes(folder / name)
