"""Asks of each model's figures whether they can be believed, from what was scored anyway."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import evaluation, manifests, threats
from robust_ssl.evaluation import PerImage, checks
from robust_ssl.progress import Stopped, stop_requested
from robust_ssl.stages.run import Run
from robust_ssl.stages.scoring import Member, Scored, Scorer, sample
from robust_ssl.stages.training import stage_key
from robust_ssl.types import Classifier

FITTED_IMAGES = 512  # surrogate images that check 23 looks at


def examine(
    scorer: Scorer, name: str, model: Classifier, scored: Sequence[Scored]
) -> dict[str, Any]:
    """Returns the verdict on a model's figures, `Verdict.as_dict`, and keeps it.

    The model is examined on a sample of the test split that costs at most a quarter of what its
    per-image attacks took (and on 64 images at least); the universal checks use what was scored.

    Args:
      scorer: Knows the run and where to keep the verdict.
      name: The model's name.
      model: The model.
      scored: All its groups.
    """
    file = scorer.stage.path / "groups" / f"{name}-verdict.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    if stop_requested():
        raise Stopped(f"{scorer.stage.path.name} stopped; run it again to go on")
    before = jax.device_get(model.variables)
    found = _per_image(scorer.run, model, scored) + _universal(scorer, name, model, scored)
    after = checks.statistics_unchanged(before, jax.device_get(model.variables))
    found += checks.Verdict((after,))
    verdict = found.as_dict()
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        manifests.write_atomically(file, json.dumps(verdict, indent=2, allow_nan=False) + "\n")
    return verdict


def _per_image(run: Run, model: Classifier, scored: Sequence[Scored]) -> checks.Verdict:
    """Checks 1 to 20, on the per-image attacks that saw the model itself."""
    seen = [
        s
        for s in scored
        if s.group.crafted_against == "hardened" and s.group.family in ("per_image", "autoattack")
    ]
    if not seen:
        reason = "no per-image attack saw the model itself; add one to examine its figures"
        return checks.Verdict(checks.not_run(range(1, 21), reason))
    group = max((s.group for s in seen), key=lambda g: (g.threat == "Linf", g.epsilon))
    seen = [s for s in seen if (s.group.threat, s.group.epsilon) == (group.threat, group.epsilon)]
    rows, figure = _figure(seen, len(run.test))
    spent = sum(member.gradient_evaluations for s in seen for member in s.members)
    chosen = np.intersect1d(rows, sample(run, checks.affordable_images(spent)))
    batch = run.test.read(chosen)
    return checks.examine(
        model,
        batch["images"],
        batch["labels"],
        threat=seen[0].members[0].value.threat,
        key=stage_key(run.seed, "examine"),
        reported=figure.robust_correct[np.searchsorted(rows, chosen)],
        counts=figure.counts,
        parallel=run.parallel,
    )


def _figure(seen: Sequence[Scored], size: int) -> tuple[np.ndarray, PerImage]:
    """Returns the images that all groups were scored on, and the worst case for them."""
    rows = np.arange(size)
    for s in seen:
        rows = rows if s.rows is None else np.intersect1d(rows, s.rows)

    def of_those(s: Scored) -> PerImage:
        places = rows if s.rows is None else np.searchsorted(s.rows, rows)
        worst = s.worst
        fields = (worst.clean_correct, worst.robust_correct, worst.flipped)
        return PerImage(*(field[places] for field in fields), worst.seconds)

    return rows, evaluation.worst_case(of_those(s) for s in seen)


def _universal(
    scorer: Scorer, name: str, model: Classifier, scored: Sequence[Scored]
) -> checks.Verdict:
    """Checks 21 to 26, on the strongest fitted perturbation of the public encoder."""
    groups = [s for s in scored if s.group.family == "universal" and s.group.threat == "Linf"]
    public = [s for s in groups if s.group.crafted_against == "public"]
    fitted = [m for s in public for m in s.members if not _is_noise(m)]
    if not fitted:
        return checks.Verdict(checks.not_run(range(21, 27), "no universal perturbation was fitted"))
    at = max(public, key=lambda s: s.group.epsilon)
    members = [m for m in at.members if not _is_noise(m)]
    strongest = min(members, key=lambda m: at.results[m.label].robust_correct.mean())
    found = at.results[strongest.label]
    everything = evaluation.worst_case(s.worst for s in groups)
    again = [s.worst for s in groups if s.group.crafted_against == "hardened"]
    moved = None if not again else evaluation.worst_case(again).robust_correct
    return checks.Verdict(
        (
            *_against_per_image(scored, at, found),
            *_against_baselines(scorer, name, model, at, strongest, found),
            _on_new_images(scorer.run, model, strongest, found),
            *_over_seeds(at, strongest),
            checks.crafted_again(everything.robust_correct, moved),
            *_over_places(scored),
        )
    )


def _is_noise(member: Member) -> bool:
    return member.gradient_evaluations == 0


def _against_per_image(scored: Sequence[Scored], at: Scored, found: PerImage):
    """Check 21, where a per-image attack had the same budget."""
    same = [
        s.worst
        for s in scored
        if s.group.family == "per_image"
        and s.group.crafted_against == "hardened"
        and (s.group.threat, s.group.epsilon) == (at.group.threat, at.group.epsilon)
    ]
    if not same:
        return checks.not_run([21], "no per-image attack of the same budget was scored")
    per_image = evaluation.worst_case(same).robust_correct
    return (checks.per_image_not_weaker(found.robust_correct, per_image),)


def _against_baselines(scorer, name: str, model, at: Scored, strongest: Member, found: PerImage):
    """Check 22: random noise where it was scored, and the perturbation's own pixels shuffled."""
    key = stage_key(scorer.run.seed, "examine")
    moved = strongest.value.replace(delta=checks.shuffled(key, strongest.value.delta))
    group = at.group._replace(family="shuffled")
    apart = scorer.score(group, model, [Member("shuffled", None, moved)])
    baselines = {"its own pixels shuffled": apart.worst.robust_correct}
    for member in at.members:
        if _is_noise(member):
            baselines["random noise"] = at.results[member.label].robust_correct
    return (checks.beats_noise_and_shuffle(found.robust_correct, baselines),)


def _on_new_images(run: Run, model: Classifier, strongest: Member, found: PerImage) -> checks.Check:
    """Check 23: predictions that change on the attacker's images and on the test split."""
    images = run.surrogate.read(np.arange(min(FITTED_IMAGES, len(run.surrogate))))["images"]
    # Only whether an answer changes is looked at, so any label does.
    batch = {"images": images, "labels": np.zeros(len(images), np.int32)}
    applied = evaluation.score(
        model,
        [batch],
        {"fitted": strongest.value},
        key=stage_key(run.seed, "examine"),
        parallel=run.parallel,
    )
    return checks.holds_on_new_images(applied["fitted"].flipped, found.flipped)


def _over_seeds(at: Scored, strongest: Member):
    """Check 24, where the strongest method was fitted with three seeds."""
    alike = [m for m in at.members if m.attack == strongest.attack]
    if len(alike) < 3:
        return checks.not_run([24], f"{strongest.attack} was fitted with {len(alike)} of 3 seeds")
    return (checks.seeds_agree([at.results[m.label].robust_correct for m in alike]),)


def _over_places(scored: Sequence[Scored]):
    """Check 26, where a patch was scored: fixed against random places."""
    places: dict[str, list[PerImage]] = {}
    for s in scored:
        for member in s.members:
            threat = getattr(member.value, "threat", None)
            if isinstance(threat, threats.Patch):
                places.setdefault(threat.location, []).append(s.results[member.label])
    if not places:
        return checks.not_run([26], "no patch was scored")
    everything = evaluation.worst_case(r for results in places.values() for r in results)
    found = [evaluation.worst_case(results) for results in places.values()]
    elsewhere = found[1].robust_correct if len(found) > 1 else None
    return (checks.patch_places(everything.robust_correct, elsewhere),)
