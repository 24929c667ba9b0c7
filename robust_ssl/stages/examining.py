"""Asks of each model's figures whether they can be believed, from what was scored anyway."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import evaluation, manifests, threats
from robust_ssl.attacks import attack_batch
from robust_ssl.evaluation import PerImage, checks
from robust_ssl.parallel import everywhere
from robust_ssl.progress import Stopped, stop_requested
from robust_ssl.stages.run import Run
from robust_ssl.stages.scoring import Member, Scored, Scorer, identity, sample
from robust_ssl.stages.training import stage_key
from robust_ssl.types import Classifier

_PLANS = ((20, 200, 64), (10, 50, 32))  # steps, queries, the fewest images that say something
FITTED_IMAGES = 512  # surrogate images that check 23 looks at


def examine(
    scorer: Scorer, name: str, model: Classifier, scored: Sequence[Scored], known_as: str
) -> dict[str, Any]:
    """Returns the verdict on a model's figures, `Verdict.as_dict`, and keeps it.

    The model is examined on a sample of the test split that costs at most a quarter of what its
    per-image attacks took (and on 32 images at least); the universal checks use what was scored.

    Args:
      scorer: Knows the run and where to keep the verdict.
      name: The model's name.
      model: The model.
      scored: All its groups.
      known_as: Its `scoring.identity` before anything attacked it.
    """
    file = scorer.stage.path / "groups" / f"{name}-verdict.json"
    kept = _kept(file)
    if everywhere(kept is not None):
        return kept
    if stop_requested():
        raise Stopped(f"{scorer.stage.path.name} stopped; run it again to go on")
    begun = time.perf_counter()
    examined, found = _per_image(scorer.run, model, scored)
    found += _universal(scorer, name, model, scored)
    unchanged = identity(model) == known_as
    after = checks.statistics_unchanged({}, {} if unchanged else {"changed": np.ones(())})
    found += checks.Verdict((after,))
    verdict = found.as_dict() | {
        "examined": examined,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        manifests.write_atomically(file, json.dumps(verdict, indent=2, allow_nan=False) + "\n")
    return verdict


def _kept(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns a verdict kept before; None if there is none, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if {"verdict", "checks", "examined"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _per_image(run: Run, model: Classifier, scored: Sequence[Scored]) -> tuple[str, checks.Verdict]:
    """Checks 1 to 20, on the per-image attacks that saw the model itself.

    Where there are none, on the examination's own PGD at the budget of the universal attacks.
    """
    seen = [
        s
        for s in scored
        if s.group.crafted_against == "hardened"
        and s.group.family in ("per_image", "autoattack")
        and s.group.epsilon > 0
    ]
    options: dict[str, Any] = {}
    rows, spent = np.arange(len(run.test)), 0
    if seen:
        group = max((s.group for s in seen), key=lambda g: (g.threat == "Linf", g.epsilon))
        seen = [
            s for s in seen if (s.group.threat, s.group.epsilon) == (group.threat, group.epsilon)
        ]
        rows, figure = _figure(seen, len(run.test))
        spent = sum(member.gradient_evaluations for s in seen for member in s.members)
        threat, words = seen[0].members[0].value.threat, f"{group.threat} {group.epsilon:.4g}"
    else:
        epsilon = max((s.group.epsilon for s in scored if s.group.threat == "Linf"), default=0)
        if not epsilon:
            reason = "nothing was scored that checks of one image could look at"
            return "nothing", checks.Verdict(checks.not_run(range(1, 21), reason))
        threat, words = threats.Linf(epsilon), f"Linf {epsilon:.4g}, no per-image attack was scored"
    steps, queries, count = _plan(spent)
    chosen = np.intersect1d(rows, sample(run, count))
    batch = run.test.read(chosen)
    if seen:
        options["reported"] = figure.robust_correct[np.searchsorted(rows, chosen)]
        options["counts"] = figure.counts
        options["adversarial"] = _strongest_images(run, model, seen, chosen, batch)
    try:
        verdict = checks.examine(
            model,
            batch["images"],
            batch["labels"],
            threat=threat,
            key=stage_key(run.seed, "examine"),
            num_steps=steps,
            num_queries=queries,
            parallel=run.parallel,
            **options,
        )
    except ValueError as error:  # hours of scoring are not lost for it
        verdict = checks.Verdict(checks.not_run(range(1, 21), str(error)))
    return f"{words}, {len(chosen)} images", verdict


def _plan(spent: float) -> tuple[int, int, int]:
    """Returns steps, queries and images of an examination that costs a quarter of `spent`.

    A small evaluation gets a short examination of few images, which may cost more than that.
    """
    for steps, queries, least in _PLANS:
        count = checks.affordable_images(spent, steps, queries, least=0)
        if count >= least:
            return steps, queries, count
    return steps, queries, least


def _strongest_images(run: Run, model: Classifier, seen: Sequence[Scored], chosen, batch):
    """Returns what the strongest attack makes of the examined images, for check 18."""
    found = [
        (s.results[m.label].robust_correct.mean(), place, m.value)
        for s in seen
        if s.group.family == "per_image"
        for place, m in enumerate(s.members)
    ]
    if not found:
        return None
    attack = min(found, key=lambda entry: entry[:2])[2]
    return jax.jit(attack_batch)(
        attack,
        stage_key(run.seed, "evaluate"),
        model,
        evaluation.to_pixels(batch["images"]),
        jnp.asarray(batch["labels"], jnp.int32),
        jnp.asarray(chosen, jnp.int32),
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
    public = [
        s
        for s in groups
        if s.group.crafted_against == "public" and not all(map(_is_noise, s.members))
    ]
    if not public:
        reason = "no universal perturbation was fitted under Linf"
        return checks.Verdict((*checks.not_run(range(21, 26), reason), *_over_places(scored)))
    at = max(public, key=lambda s: s.group.epsilon)
    members = [m for m in at.members if not _is_noise(m)]
    strongest = min(members, key=lambda m: at.results[m.label].robust_correct.mean())
    found = at.results[strongest.label]
    public_worst = evaluation.worst_case(at.results[m.label] for m in members)
    again = [
        s.worst.robust_correct
        for s in groups
        if s.group == at.group._replace(crafted_against="hardened")
    ]
    return checks.Verdict(
        (
            *_against_per_image(scored, at, found),
            *_against_baselines(scorer, name, model, at, strongest, found),
            *_on_new_images(scorer, model, strongest),
            *_over_seeds(at, strongest),
            # Noise is not crafted, and is not among what was crafted again.
            checks.crafted_again(public_worst.robust_correct, again[0] if again else None),
            *_over_places(scored),
        )
    )


def _is_noise(member: Member) -> bool:
    return member.gradient_evaluations == 0


def _against_per_image(scored: Sequence[Scored], at: Scored, found: PerImage):
    """Check 21: with the per-image attacks of the same budget, or of a smaller one if they do."""
    alike = [
        s
        for s in scored
        if s.group.family == "per_image"
        and s.group.crafted_against == "hardened"
        and s.group.threat == at.group.threat
        and s.group.epsilon <= at.group.epsilon
    ]
    if not alike:
        return checks.not_run([21], "no per-image attack of that budget was scored")
    per_image = max(alike, key=lambda s: s.group.epsilon)
    check = checks.per_image_not_weaker(found.robust_correct, per_image.worst.robust_correct)
    if check.status != "passed" and per_image.group.epsilon < at.group.epsilon:
        return checks.not_run([21], "per-image attacks had a smaller budget")
    return (check,)


def _against_baselines(scorer, name: str, model, at: Scored, strongest: Member, found: PerImage):
    """Check 22: random noise where it was scored, and the perturbation's own pixels shuffled."""
    key = stage_key(scorer.run.seed, "examine")
    moved = strongest.value.replace(delta=checks.shuffled(key, strongest.value.delta))
    group = at.group._replace(family="shuffled")
    apart = scorer.score(group, model, [Member("shuffled", None, moved)])
    baselines = {"its own pixels shuffled": apart.worst.robust_correct}
    noise = [at.results[m.label].robust_correct for m in at.members if _is_noise(m)]
    if noise:
        baselines["random noise"] = min(noise, key=np.mean)  # of the strongest seed
    check = checks.beats_noise_and_shuffle(found.robust_correct, baselines)
    if check.status == "failed" and identity(model.encoder) != identity(scorer.run.encoder):
        # It was fitted on another encoder; doing nothing on this one is what a defence is for.
        meaning = "On this model the perturbation does hardly more than noise of its size."
        advice = "See that it breaks usual fine-tuning: else it is weak, and the defence unproved."
        check = dataclasses.replace(check, status="note", meaning=meaning, advice=advice)
    return (check,)


def _on_new_images(scorer: Scorer, model: Classifier, strongest: Member):
    """Check 23: predictions that change on the attacker's images, and on others of their kind."""
    run = scorer.run
    try:
        others = run.load(run.config["surrogate"], "test")
    except (ValueError, OSError, KeyError) as error:
        return checks.not_run([23], f"the surrogate data have no test split: {error}")

    def flipped(examples) -> np.ndarray:
        count = min(FITTED_IMAGES, len(examples))
        places = np.random.default_rng([run.seed, 23]).permutation(len(examples))[:count]
        # Only whether an answer changes is looked at, so any label does.
        images, labels = examples.read(np.sort(places))["images"], np.zeros(count, np.int32)
        batches = [
            {
                "images": images[i : i + scorer.batch_size],
                "labels": labels[i : i + scorer.batch_size],
            }
            for i in range(0, count, scorer.batch_size)
        ]
        scored = evaluation.score(
            model,
            batches,
            {"perturbation": strongest.value},
            key=stage_key(run.seed, "examine"),
            parallel=run.parallel,
        )
        return scored["perturbation"].flipped

    return (checks.holds_on_new_images(flipped(run.surrogate), flipped(others)),)


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
    found = {place: evaluation.worst_case(results) for place, results in places.items()}
    reported = found.pop("fixed", None) or found.pop("random")
    elsewhere = found["random"].robust_correct if found else None
    return (checks.patch_places(reported.robust_correct, elsewhere),)
