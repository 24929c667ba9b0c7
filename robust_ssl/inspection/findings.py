"""The checks of an inspection, each a pure function of what was and what is."""

from __future__ import annotations

from typing import Any

import numpy as np

from robust_ssl.evaluation import difference
from robust_ssl.inspection import drift
from robust_ssl.provenance import Check

# In this order, always all of them.
NAMES = (
    *("files", "architecture", "references", "canaries", "accuracy"),
    *("replay", "new_fit", "drift", "latency"),
)
# Where the model did not change nothing moves, so that what moves may be rare.
_P_WORSE = 0.01  # of McNemar's test, on the same images
_P_DRIFT = 0.001  # once a month for a year: one false alarm in eighty years
_LITTLE = 0.05  # of accuracy: what a short fit takes more than those of before, beside chance
_TIE = 1e-3  # of the largest logit: two classes that close may change places on other hardware
_LOGITS = 1e-2  # of the largest logit: more than other hardware moves them
_SLOWER = 5.0  # times; a machine with other work to do is not a changed model
_MOST_UNREADABLE = 0.1  # of the new images
LEAST = 20  # new images; fewer tell no shift from chance


def of(name: str, outcome: Any, said: str, **evidence: Any) -> Check:
    """Returns the outcome of one check of an inspection."""
    return Check(NAMES.index(name) + 1, name, outcome, said, evidence)


def canaries(then: np.ndarray, now: np.ndarray) -> Check:
    """Compares the logits of the canary images, ``[n, classes]``, then and now.

    A prediction must not change, but for ties that other hardware may break otherwise.

    Example:
      >>> logits = np.array([[2.0, 0.0], [0.0, 1.0]])
      >>> canaries(logits, logits).outcome, canaries(logits, logits[::-1]).outcome
      ('pass', 'fail')
    """
    scale = float(np.abs(then).max()) or 1.0
    finite = np.isfinite(now).all(axis=1)
    moved = np.where(finite, np.abs(now - then).max(axis=1), np.inf) / scale
    ranked = np.sort(then, axis=1)
    is_tie = ranked[:, -1] - ranked[:, -2] < _TIE * scale
    changed = ~finite | ((then.argmax(axis=1) != now.argmax(axis=1)) & ~is_tie)
    evidence = {
        "images": len(then),
        "changed": np.flatnonzero(changed).tolist(),
        "largest_move": float(moved.max()) if finite.all() else None,
    }
    if changed.any():
        said = f"{changed.sum()} of {len(then)} predictions have changed"
        return of("canaries", "fail", said, **evidence)
    if moved.max() > _LOGITS:
        said = f"no prediction has changed, but logits have moved by {100 * moved.max():.1f} %"
        return of("canaries", "fail", said, **evidence)
    return of("canaries", "pass", f"all {len(then)} predictions are as they were", **evidence)


def mcnemar(then: np.ndarray, now: np.ndarray) -> float:
    """Returns how often chance alone makes the second as much worse; exact, one-sided.

    Args:
      then: Which images were right, bool ``[n]``.
      now: Which of the same are right, bool ``[n]``.

    Example:
      >>> mcnemar(np.ones(5, bool), np.zeros(5, bool))
      0.03125

    References:
      McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions", 1947.
    """
    from scipy import stats

    lost, won = int((then & ~now).sum()), int((~then & now).sum())
    if not lost + won:
        return 1.0
    return float(stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue)


def accuracy(then: np.ndarray, now: np.ndarray) -> Check:
    """Compares which images are right, bool ``[n]``, then and now."""
    p = mcnemar(then, now)
    evidence = {"then": float(then.mean()), "now": float(now.mean()), "p": p, "images": len(then)}
    said = f"accuracy {now.mean():.3f}, it was {then.mean():.3f} (p {p:.2g})"
    return of("accuracy", "fail" if p < _P_WORSE else "pass", said, **evidence)


def replay(then: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> Check:
    """Compares which images are right under each stored perturbation, then and now."""
    if not now:
        return of("replay", "absent", "the baseline has no perturbation")
    entries = {}
    for name, right in now.items():
        p = mcnemar(then[name], right)
        entries[name] = {"then": float(then[name].mean()), "now": float(right.mean()), "p": p}
    # Each of several is a chance of a false alarm.
    worse = [name for name, entry in entries.items() if entry["p"] < _P_WORSE / len(entries)]
    lowest = min(entries, key=lambda name: entries[name]["now"])
    shown = entries[lowest]
    said = f"accuracy {shown['now']:.3f} under {lowest}, it was {shown['then']:.3f}"
    if worse:
        said = f"weaker than it was against {', '.join(worse)}: {said}"
    return of("replay", "fail" if worse else "pass", said, perturbations=entries)


def new_fit(then: list[np.ndarray], now: np.ndarray, seed: int) -> Check:
    """Compares a perturbation fitted today, with a new seed, with those fitted then.

    The worst of those then is what it is compared with, and their spread is allowed: fits differ by
    their seeds.
    """
    shares = [float(right.mean()) for right in then]
    worst = then[int(np.argmin(shares))]
    lost, half = difference(worst, now)
    allowed = max(_LITTLE, max(shares) - min(shares))
    evidence = {
        "then": shares,
        "now": float(now.mean()),
        "seed": seed,
        "lost": lost,
        "half_width": half,
        "allowed": allowed,
    }
    between = f"{min(shares):.3f} to {max(shares):.3f}"
    said = f"accuracy {now.mean():.3f} under a perturbation fitted now, {between} under those then"
    return of("new_fit", "fail" if lost - half > allowed else "pass", said, **evidence)


def shift(then: np.ndarray, now: np.ndarray | None, note: str = "", unreadable: int = 0) -> Check:
    """Compares the features of new images, ``[m, dim]``, with those of the baseline, ``[n, dim]``.

    `now` is None where no images were given; `note` says what of them could not be read, and
    `unreadable` how many: where it is more than a tenth, the others say nothing of them.
    """
    if now is None:
        return of("drift", "absent", "no new images are given: --images DIR")
    if len(now) < LEAST:
        said = f"{len(now)} new images tell nothing; give {LEAST} or more{note}"
        return of("drift", "absent", said, images=len(now))
    if unreadable > _MOST_UNREADABLE * (len(now) + unreadable):
        total = len(now) + unreadable
        said = f"{len(now)} of {total} new images can be read, too few to tell{note}"
        return of("drift", "absent", said, images=len(now), unreadable=unreadable)
    if not np.isfinite(now).all():
        return of("drift", "fail", f"features of new images are not finite{note}", images=len(now))
    distance, p = drift.energy_test(then, now)
    evidence = {"distance": distance, "p": p, "images": len(now), "unreadable": unreadable}
    if p < _P_DRIFT:
        said = f"{len(now)} new images are unlike those of the baseline (p {p:.2g}){note}"
        return of("drift", "fail", said, **evidence)
    said = f"{len(now)} new images are like those of the baseline (p {p:.2g}){note}"
    return of("drift", "pass", said, **evidence)


def latency(then: float, now: float, same_device: bool) -> Check:
    """Compares milliseconds an image, then and now; on another device there is no comparison."""
    evidence = {"then": then, "now": now}
    if not same_device:
        said = f"{now:.2g} ms an image; the baseline was measured on another device"
        return of("latency", "absent", said, **evidence)
    said = f"{now:.2g} ms an image, it was {then:.2g}"
    return of("latency", "fail" if now > _SLOWER * then else "pass", said, **evidence)
