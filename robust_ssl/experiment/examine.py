"""Asks of each model's figures whether they can be believed, from what was scored anyway."""

from __future__ import annotations

import json
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import data, disk, evaluation, threats
from robust_ssl.evaluation import PerImage, checks
from robust_ssl.experiment.context import Context, identity
from robust_ssl.experiment.examined import (
    budget_of,
    counts_of,
    sees_labels,
    sees_model,
    subject_of,
)
from robust_ssl.experiment.groups import Group, Member, Scored, Scorer, sample
from robust_ssl.experiment.loop import stage_key
from robust_ssl.parallel import everywhere
from robust_ssl.types import Classifier
from robust_ssl.workdir import digest, write_atomically

_log = logging.getLogger(__name__)

_PLANS = ((20, 200, 64), (10, 50, 32))  # steps, queries, the fewest images that say something
PER_IMAGE_CHECKS = tuple(group for group in checks.GROUPS if group not in ("universal", "data"))
# Those that need a perturbation fitted on the public encoder.
_OF_FITTED = (
    "per_image_not_weaker",
    "beats_noise_and_shuffle",
    "holds_on_new_images",
    "seeds_agree",
    "crafted_again_agrees",
)
FITTED_IMAGES = 512  # images of each split on which `holds_on_new_images` looks for changes
_MOST_AT_ONCE = 128  # images of an examination: its probe passes each eighteen times
_FITTED_SEED = 23  # beside the run's: another number examines other images


def examine(
    scorer: Scorer, name: str, model: Classifier, scored: Sequence[Scored], known_as: str
) -> dict[str, Any]:
    """Returns the verdict on a model's figures, `Verdict.as_dict`, and stores it.

    The model is examined on a sample of the test split that costs at most a quarter of what its
    per-image attacks took (and on 32 images at least); the universal checks use what was scored.

    Args:
      scorer: Knows the run and where to store the verdict.
      name: The model's name.
      model: The model.
      scored: All its groups.
      known_as: Its `groups.identity` before anything attacked it.
    """
    file = scorer.stage.path / "groups" / f"{name}-verdict.json"
    stored = _stored(file, scorer.origin)
    # Asked of every process: one that examines alone would wait for the others forever.
    if everywhere(stored is not None):
        return stored
    scorer.check_stop()
    begun = time.perf_counter()
    examined, verdict = _per_image(scorer, model, scored)
    verdict += _universal(scorer, model, scored)
    verdict += checks.Verdict(
        (_unchanged(model, known_as), *_of_data(scorer.context, name, scored))
    )
    document = verdict.as_dict() | {
        "examined": examined,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        # As JSON has it: what is read again must have the same checksum.
        document = json.loads(json.dumps(document, allow_nan=False))
        sealed = {**document, "origin": scorer.origin, "sha256": _sum(document, scorer.origin)}
        write_atomically(file, json.dumps(sealed, indent=2, allow_nan=False) + "\n")
    return document


def _sum(document: Mapping[str, Any], origin: str | None) -> str:
    return digest([document, origin])


def _stored(file: pathlib.Path, origin: str) -> dict[str, Any] | None:
    """Returns a verdict stored before; None if there is none, it is damaged or of other work."""
    words = (checks.BELIEVABLE, checks.WITH_NOTES, checks.NOT_BELIEVABLE, checks.NOT_EXAMINED)
    try:
        document = disk.read_json(file)
        made_from, checksum = document.pop("origin", None), document.pop("sha256", None)
        complete = {"verdict", "checks", "examined"} <= document.keys()
        if complete and document["verdict"] in words and checksum == _sum(document, made_from):
            # Of other attackers or settings: whoever adds some expects another examination.
            return document if made_from == origin else None
    except OSError:
        return None
    except (ValueError, AttributeError, TypeError):
        pass
    _log.warning("%s is damaged; the model is examined again", file)
    return None


def _unchanged(model: Classifier, known_as: str) -> checks.Check:
    # Only a digest was remembered, not the weights, so there is no size of the change to give.
    before, changed = {}, {"changed": np.ones(())}
    return checks.model_unchanged(before, before if identity(model) == known_as else changed)


def _of_data(context: Context, name: str, scored: Sequence[Scored]) -> tuple[checks.Check, ...]:
    """Runs the checks of the images themselves, on the whole test split."""
    shared = context.shared
    leakage = checks.leakage(shared.count, shared.test, shared.train)
    if name in context.plan.classifiers and not shared.count:
        reason = "It was trained elsewhere, on images that are not known here."
        [leakage] = checks.not_run("leakage", reason)
    whole = next((s.worst.clean_correct for s in scored if s.rows is None), None)
    if whole is None:
        reason = "No attack was scored on the whole test split."
        return (leakage, *checks.not_run("one_answer", reason))
    names = context.test.class_names
    return (leakage, checks.one_answer(whole, context.test_labels, names))


def _per_image(
    scorer: Scorer, model: Classifier, scored: Sequence[Scored]
) -> tuple[str, checks.Verdict]:
    """Runs all checks but the universal ones; returns what was examined, in words, and them."""
    context = scorer.context
    subject = subject_of(context, scored)
    if subject is None:
        reason = "Nothing was scored that checks of one image could look at."
        return "nothing", checks.Verdict(checks.not_run(PER_IMAGE_CHECKS, reason))
    steps, queries, count = affordable(subject.spent)
    chosen = np.intersect1d(subject.rows, sample(context, count))
    chosen = of_two_classes(chosen, subject.rows, context.test_labels)
    batch = context.test.read(chosen)
    verdict = of_sample(
        model,
        batch,
        subject.figure,
        np.searchsorted(subject.rows, chosen),
        counts=counts_of(subject.figure, scored),
        # Whatever its budget: each has a row in the tables.
        excess=evaluation.largest_excess(s.worst for s in scored),
        threat=subject.threat,
        key=stage_key(context.plan.seed, "examine"),
        num_steps=steps,
        num_queries=queries,
        parallel=context.parallel,
        at_once=scorer.at_once(len(context.test)),
    )
    return f"{subject.words}, {len(chosen)} images", verdict


def of_two_classes(chosen: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns places of which one is of another class than the others, if any place is.

    Few images of a set with one large class may all be of it, and then nothing can be examined.

    Example:
      >>> of_two_classes(np.array([0, 1]), np.arange(4), np.array([7, 7, 7, 8])).tolist()
      [0, 3]
    """
    others = rows[labels[rows] != labels[chosen[0]]] if len(chosen) > 1 else rows[:0]
    if not len(others) or len(np.unique(labels[chosen])) > 1:
        return chosen
    return np.sort(np.r_[chosen[:-1], others[0]])


def of_sample(
    model: Classifier,
    batch: Mapping[str, np.ndarray],
    figure: PerImage | None,
    places: np.ndarray,
    *,
    at_once: int,
    **how: Any,
) -> checks.Verdict:
    """Runs all checks but the universal ones on a sample; `places` is where the figure has it.

    At most `at_once` images are passed together: where they are scored, there is memory for them.
    """
    options: dict[str, Any] = {"batch_size": min(_MOST_AT_ONCE, at_once)}
    if figure is not None:
        options["reported"] = figure.robust_correct[places]
    try:
        return checks.examine(model, batch["images"], batch["labels"], **options, **how)
    except ValueError as error:  # hours of scoring are not lost for it
        return checks.Verdict(checks.not_run(PER_IMAGE_CHECKS, str(error)))


def affordable(spent: float) -> tuple[int, int, int]:
    """Returns steps, queries and images of an examination that costs a quarter of `spent`.

    A small evaluation gets a short examination of few images, which may cost more than that.
    """
    for steps, queries, least in _PLANS:
        count = checks.affordable_images(spent, steps, queries, least=0)
        if count >= least:
            return steps, queries, count
    return steps, queries, least


def _universal(scorer: Scorer, model: Classifier, scored: Sequence[Scored]) -> checks.Verdict:
    """Runs the universal checks, on the strongest fitted perturbation of the public encoder."""
    groups = [s for s in scored if s.group.family == "universal" and s.group.threat == "Linf"]
    public = [s for s in groups if s.group.crafted_against == "public" and _fitted(s)]
    if not public:
        reason = "No universal perturbation was fitted under Linf."
        return checks.Verdict((*checks.not_run(_OF_FITTED, reason), _over_places(scored)))
    at = _compared(public, groups, scorer.context.plan.suite.epsilon)
    members = _fitted(at)
    strongest = min(members, key=lambda m: at.results[m.label].robust_correct.mean())
    # Noise is not crafted, and is not among what was crafted again.
    worst = evaluation.worst_case(at.results[m.label] for m in members)
    again = next((s.worst.robust_correct for s in groups if s.group == _again(at)), None)
    per_image = _per_image_alike(scored, at)
    fitted_here = identity(model.encoder) == identity(scorer.context.encoder)
    compared = (
        _against_per_image(at, strongest, per_image),
        _against_baselines(scorer, model, at, strongest, fitted_here),
        _on_new_images(scorer, model, strongest),
        _over_seeds(at, strongest),
        checks.crafted_again_agrees(worst.robust_correct, again),
    )
    independent = _independent(at, per_image) if fitted_here else again
    if independent is not None:
        among = per_image.among if fitted_here else np.asarray  # of a part of the split, maybe
        right = among(worst.robust_correct) & independent
        compared = checks.settle(compared, among(worst.clean_correct), right)
    return checks.Verdict((*compared, _over_places(scored)))


def _compared(public: Sequence[Scored], groups: Sequence[Scored], main: float) -> Scored:
    """Returns the public suite at the main budget, else where it was crafted again, the largest."""
    everything = [scored.group for scored in groups]

    def rank(scored: Scored):
        epsilon = scored.group.epsilon
        return epsilon == main, _again(scored) in everything, epsilon

    return max(public, key=rank)


def _again(scored: Scored) -> Group:
    """Returns the group of the same attacks, crafted on the model's own encoder."""
    return scored.group._replace(crafted_against="hardened")


def _fitted(scored: Scored) -> list[Member]:
    """Returns the members that were crafted, that is all but noise."""
    return [member for member in scored.members if not _is_noise(member)]


def _is_noise(member: Member) -> bool:
    return member.gradient_evaluations == 0


def _per_image_alike(scored: Sequence[Scored], at: Scored) -> Scored | None:
    """Returns the per-image attacks of the largest budget that is not above the perturbation's."""
    alike = [
        s
        for s in scored
        if s.group.family == "per_image"
        and sees_model(s)
        and sees_labels(s)
        and s.group.threat == at.group.threat
        and s.group.epsilon <= at.group.epsilon
    ]
    return max(alike, key=lambda s: s.group.epsilon, default=None)


def _independent(at: Scored, per_image: Scored | None) -> np.ndarray | None:
    """Returns what a per-image attack of the same budget leaves right; None where none was scored.

    On the encoder that they were fitted on, perturbations crafted again are the same once more.
    """
    if per_image is None or budget_of(per_image) != budget_of(at):
        return None
    return per_image.worst.robust_correct


def _against_per_image(at: Scored, strongest: Member, per_image: Scored | None) -> checks.Check:
    name = "per_image_not_weaker"
    if per_image is None:
        return checks.not_run(name, "No per-image attack of that budget was scored.")[0]
    correct = per_image.among(at.results[strongest.label].robust_correct)
    check = checks.per_image_not_weaker(correct, per_image.worst.robust_correct)
    # With a smaller budget a stronger attack still proves the point, a weaker one proves nothing.
    if check.status != "passed" and per_image.group.epsilon < at.group.epsilon:
        return checks.not_run(name, "Per-image attacks had a smaller budget.")[0]
    return check


def _against_baselines(
    scorer: Scorer, model: Classifier, at: Scored, strongest: Member, fitted_here: bool
) -> checks.Check:
    """Compares with random noise where it was scored, and with the pixels shuffled."""
    key = stage_key(scorer.context.plan.seed, "examine")
    moved = strongest.value.replace(delta=checks.shuffled(key, strongest.value.delta))
    group = at.group._replace(family="shuffled")
    apart = scorer.score(group, model, [Member("shuffled", None, moved)])
    baselines = {"its own pixels shuffled": apart.worst.robust_correct}
    noise = [at.results[m.label].robust_correct for m in at.members if _is_noise(m)]
    if noise:
        baselines["random noise"] = min(noise, key=np.mean)  # of the strongest seed
    correct = at.results[strongest.label].robust_correct
    return checks.beats_noise_and_shuffle(correct, baselines, fitted_here=fitted_here)


def _on_new_images(scorer: Scorer, model: Classifier, strongest: Member) -> checks.Check:
    """Compares predictions that change on the attacker's images, and on others of their kind."""
    context = scorer.context
    try:
        others = context.load_sized(context.plan.surrogate, "test")
        data.check_image_size(others, context.image_size)
    except Exception as error:  # of anybody's function, which nothing asked for this split before
        reason = f"The surrogate data have no test split: {error}"
        return checks.not_run("holds_on_new_images", reason)[0]
    fitted, new = (_flipped(scorer, model, strongest, part) for part in (context.surrogate, others))
    return checks.holds_on_new_images(fitted, new)


def _flipped(scorer: Scorer, model: Classifier, strongest: Member, examples) -> np.ndarray:
    """Returns whose predictions a perturbation changes among some of the examples, bool ``[n]``."""
    context = scorer.context
    size = scorer.at_once(len(context.test))  # as the test split was scored: the same program
    count = min(FITTED_IMAGES, len(examples))
    order = np.random.default_rng([context.plan.seed, _FITTED_SEED]).permutation(len(examples))
    places = order[:count]
    # Only whether an answer changes is looked at, so any label does.
    images, labels = examples.read(np.sort(places))["images"], np.zeros(count, np.int32)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    batches = [{"images": images[rows], "labels": labels[rows]} for rows in parts]
    results = evaluation.score(
        model,
        batches,
        {"perturbation": strongest.value},
        key=stage_key(context.plan.seed, "examine"),
        parallel=context.parallel,
    )
    return results["perturbation"].flipped


def _over_seeds(at: Scored, strongest: Member) -> checks.Check:
    """Compares the seeds of the strongest method, where it was fitted with three."""
    alike = [m for m in at.members if m.attack == strongest.attack]
    if len(alike) < 3:
        reason = f"{strongest.attack} was fitted with {len(alike)} of 3 seeds."
        return checks.not_run("seeds_agree", reason)[0]
    return checks.seeds_agree([at.results[m.label].robust_correct for m in alike])


def _over_places(scored: Sequence[Scored]) -> checks.Check:
    """Compares a patch at fixed places with one at random places, where a patch was scored."""
    places: dict[str, list[PerImage]] = {}
    for s in scored:
        # A patch of one image has one place, and who knows labels takes more at any place.
        alike = s.group.family == "universal" and s.group.crafted_against != "labelled"
        for member in s.members if alike else ():
            if isinstance(threat := getattr(member.value, "threat", None), threats.Patch):
                places.setdefault(threat.location, []).append(s.results[member.label])
    if not places:
        return checks.not_run("patch_places_agree", "No patch was scored.")[0]
    worst = {place: evaluation.worst_case(results) for place, results in places.items()}
    reported = worst.pop("fixed", None) or worst.pop("random")
    elsewhere = worst["random"].robust_correct if worst else None
    return checks.patch_places_agree(reported.robust_correct, elsewhere)
