"""How well detectors find attacks: by attack and budget, on another set, under adaptive attacks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl.screening import verdict
from robust_ssl.screening.adaptive import Adaptive, Target, count_parts, pass_detector
from robust_ssl.screening.bench import Arrays, Bench, Case
from robust_ssl.screening.detector import Detector
from robust_ssl.screening.fusion import Calibrated, Fused, Surprise
from robust_ssl.screening.statistics import JUDGED, alarms, separation, share, threshold

FUSED = "fused"
_SETS = ("calibration", "clean", "shifted")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
      entries: One for each detector and the last for their fusion, plain JSON values: see
        ``docs/tasks/screen.md``.
      fused: The fusion, for `Screen`.
      threshold: The score in nats that 1 % of the calibration images exceed.
    """

    entries: list[dict[str, Any]]
    fused: Fused
    threshold: float


def evaluate(
    detectors: Mapping[str, Detector],
    bench: Bench,
    cases: Sequence[Case],
    adaptive: Adaptive | None = None,
) -> Evaluation:
    """Scores detectors and their fusion on clean and attacked images.

    Thresholds come from the calibration images, figures from others.  A detector that knows an
    attack is scored on it without, its thresholds chosen anew, and so is the fusion.

    Args:
      detectors: By name.
      bench: The model, the images and how parts are kept.
      cases: Attacks that do not know the detectors.
      adaptive: Attacks that do; None leaves every verdict at "not tried".

    Raises:
      ValueError: If there is no detector, one is called "fused", or a score is not finite.
    """
    if not detectors or FUSED in detectors:
        raise ValueError(f"name at least one detector, and none {FUSED!r}; got {list(detectors)}")
    base = bench.keep("clean", lambda: _clean(detectors, bench))
    members = {
        name: Calibrated(detector, Surprise.fit(base[f"calibration_{name}"]))
        for name, detector in detectors.items()
    }
    right = base["answers"] == bench.images.labels
    by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in (*detectors, FUSED)}
    for number, case in enumerate(cases):
        part = bench.keep(
            f"attack-{number}-{case.attack}", lambda c=case: _case(detectors, bench, c)
        )
        for name, entry in _case_entries(case, base, part, list(detectors), right).items():
            by_name[name].append(entry)
    fused = Fused(members)
    nats = {name: _in_nats(base, name) for name in (*detectors,)} | {
        FUSED: _fused(base, [*detectors])
    }
    entries = []
    for name in by_name:
        target = Target(
            name, members.get(name, fused), nats[name]["calibration"], nats[name]["clean"]
        )
        tried = pass_detector(bench, target, adaptive, right) if adaptive else []
        entries.append(_entry(name, nats[name], _seconds(base, name), by_name[name], tried))
    return Evaluation(entries, fused, threshold(nats[FUSED]["calibration"], JUDGED))


def parts_of(detectors: int, cases: int, adaptive: Adaptive | None) -> int:
    """Returns how many parts `evaluate` keeps, for a progress bar."""
    return 1 + cases + count_parts(adaptive, detectors + 1)


def _clean(detectors: Mapping[str, Detector], bench: Bench) -> Arrays:
    """Scores of all clean sets, and the seconds an image that they took."""
    arrays: Arrays = {"answers": bench.answers()}
    for name, detector in detectors.items():
        for kind in _SETS:
            images = getattr(bench.images, kind)
            if images is not None:
                begun = time.perf_counter()
                arrays[f"{kind}_{name}"] = bench.scores(detector, images)
                if kind == "clean":  # compiled by then
                    seconds = (time.perf_counter() - begun) / len(images)
                    arrays[f"seconds_{name}"] = np.asarray(seconds)
    return arrays


def _case(detectors: Mapping[str, Detector], bench: Bench, case: Case) -> Arrays:
    attacked = bench.attack(case.value)
    arrays: Arrays = {"answers": attacked["answers"]}
    for name, detector in detectors.items():
        if hasattr(detector, "without") and case.attack in getattr(detector, "names", ()):
            detector = detector.without(case.attack)
            # Another detector, so with other thresholds.
            arrays[f"calibration_{name}"] = bench.scores(detector, bench.images.calibration)
            arrays[f"clean_{name}"] = bench.scores(detector, bench.images.clean)
        arrays[f"attacked_{name}"] = bench.scores(detector, attacked["images"])
    return arrays


def _case_entries(
    case: Case, base: Arrays, part: Arrays, names: list[str], right: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Each detector's entry of one attack, and the fusion's."""
    arrays = {**base, **part}
    left_out = [name for name in names if f"calibration_{name}" in part]
    facts = {"attack": case.attack, **case.facts, "n": len(right)}
    moved = part["answers"] != base["answers"]
    success = {"attack_success": share(moved[right])}
    entries = {}
    for name in names:
        own = {kind: arrays[f"{kind}_{name}"] for kind in ("calibration", "clean", "attacked")}
        entries[name] = {**facts, "left_out": name in left_out, **_figures(own), **success}
    own = _fused(arrays, names, ("calibration", "clean", "attacked"))
    entries[FUSED] = {**facts, "left_out": bool(left_out), **_figures(own), **success}
    return entries


def _figures(scores: Arrays) -> dict[str, Any]:
    return {
        **separation(scores["clean"], scores["attacked"]),
        **alarms(scores["calibration"], scores["attacked"]),
    }


def _in_nats(arrays: Arrays, name: str, kinds: Sequence[str] = _SETS) -> Arrays:
    surprise = Surprise.fit(arrays[f"calibration_{name}"])
    scores = {kind: arrays[f"{kind}_{name}"] for kind in kinds if f"{kind}_{name}" in arrays}
    return {kind: np.asarray(surprise(some), np.float64) for kind, some in scores.items()}


def _fused(arrays: Arrays, names: list[str], kinds: Sequence[str] = _SETS) -> Arrays:
    members = [_in_nats(arrays, name, kinds) for name in names]
    return {kind: np.max([own[kind] for own in members], axis=0) for kind in members[0]}


def _seconds(base: Arrays, name: str) -> float:
    own = {key: float(value) for key, value in base.items() if key.startswith("seconds_")}
    return sum(own.values()) if name == FUSED else own[f"seconds_{name}"]


def _entry(
    name: str,
    nats: Arrays,
    seconds: float,
    attacks: list[dict[str, Any]],
    adaptive: list[dict[str, Any]],
) -> dict[str, Any]:
    shifted = {}
    if "shifted" in nats:
        shifted = {
            **separation(nats["clean"], nats["shifted"]),
            **alarms(nats["calibration"], nats["shifted"]),
        }
    return {
        "detector": name,
        "verdict": verdict.overall(adaptive),
        "milliseconds": round(1000 * seconds, 3),
        "clean": alarms(nats["calibration"], nats["clean"]),
        "shifted": shifted,
        "attacks": attacks,
        "adaptive": adaptive,
    }
