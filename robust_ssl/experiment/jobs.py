"""What is to be scored, group by group: each model under the attacks that one budget has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from robust_ssl import evaluation, report
from robust_ssl.build import inside, text_of
from robust_ssl.experiment.attack import Fitted, load_perturbations
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.ensemble import build_autoattack, score_autoattack
from robust_ssl.experiment.groups import (
    Group,
    Member,
    Scored,
    Scorer,
    by_budget,
    per_image_members,
    sample,
    threat_name,
)
from robust_ssl.experiment.suites import Budget
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory

_AGAIN = {  # how a group is announced
    "hardened": ", crafted again on it",
    "twin": ", crafted on its twin",
    "half": ", crafted on its twin of half of the images",
    "labelled": ", fitted with its head and labels",
}


class Job(NamedTuple):
    """One group to be scored.

    Attributes:
      name: For people.
      parts: In how many parts it is kept.
      run: Scores it.
      settings: What its scores are made from besides the model, JSON-able.
      kinds: The fitted perturbations among it; see `origin_of`.
    """

    name: str
    parts: int
    run: Callable[[Scorer], Scored]
    settings: Any
    kinds: tuple[str, ...] = ()


def all_jobs(
    context: Context,
    models: Mapping[str, Classifier],
    fitted: Mapping[str, Mapping[str, StageDirectory]],
) -> dict[str, list[Job]]:
    """Returns the groups to score, by model.

    Args:
      context: The run.
      models: By name.
      fitted: The stages of perturbations, by attacker and model.
    """
    # Read once: where an encoder did not move, what was crafted again is the public stage.
    stages = {stage.path: stage for by_model in fitted.values() for stage in by_model.values()}
    perturbations = {path: load_perturbations(context, stage) for path, stage in stages.items()}
    jobs = {}
    for name, model in models.items():
        of_model = {a: perturbations[by[name].path] for a, by in fitted.items() if name in by}
        jobs[name] = _jobs(context, name, model, of_model)
    return jobs


def _jobs(
    context: Context, name: str, model: Classifier, fitted: Mapping[str, Sequence[Fitted]]
) -> list[Job]:
    scoring, jobs = context.plan.scoring, []
    count = scoring.per_image.images
    some = None if count is None else sample(context, count)

    for against, perturbations in fitted.items():
        for (threat, epsilon), members in _universal(context, perturbations, against).items():
            group = Group(name, against, "universal", threat, epsilon)
            run = functools.partial(_score, group, model, members, None)
            # On the public encoder they are an input of the stage itself.
            kinds = {"public": (), "hardened": ("attack",)}.get(against, (against,))
            jobs.append(Job(_words(group), 1, run, [scoring.batch_size], kinds))
    for against in ("public", "hardened"):
        for budget in scoring.per_image.scored:
            built = build_per_image(context, budget)
            members = per_image_members(context, built, against, scoring.seeds)
            if members:
                threat = threat_name(budget.threat)
                group = Group(name, against, "per_image", threat, budget.epsilon)
                run = functools.partial(_score, group, model, members, some)
                settings = [scoring.batch_size, text_of(budget)]
                jobs.append(Job(_words(group), len(members), run, settings))
    for budget, ensemble in build_autoattack(context, model.num_classes):
        group = Group(name, "hardened", "autoattack", threat_name(budget.threat), budget.epsilon)
        run = functools.partial(score_autoattack, group, model, ensemble)
        settings = [scoring.autoattack.batch_size, text_of(budget)]
        jobs.append(Job(_words(group), len(ensemble), run, settings))
    return jobs


def _score(
    group: Group,
    model: Classifier,
    members: Sequence[Member],
    rows: np.ndarray | None,
    scorer: Scorer,
) -> Scored:
    return scorer.score(group, model, members, rows)


def _words(group: Group) -> str:
    budget = report.budget(group.epsilon, group.threat)
    if group.family != "universal":
        family = {"per_image": "per-image attacks"}.get(group.family, "AutoAttack")
        return f"{family} at {budget}"
    family = "universal attacks" if group.crafted_against == "labelled" else "the suite"
    return f"{family} at {budget}{_AGAIN.get(group.crafted_against, '')}"


def _universal(
    context: Context, fitted: Sequence[Fitted], against: str
) -> dict[tuple[str, float], list[Member]]:
    """A stage's perturbations by threat and budget, those that are worth scoring."""
    suite, adaptive_curve = context.plan.suite, context.plan.scoring.adaptive_curve
    if against == "labelled":  # attacks of its own, at one budget
        return by_budget(fitted)
    scored = []
    for one in fitted:
        member = suite.attacks[one.attack]
        if against != "public":
            # Noise looks at no encoder: the public one is scored already.
            on_curve = one.epsilon != member.budgets[0]
            if member.is_noise or (on_curve and not adaptive_curve):
                continue
        scored.append(one)
    return by_budget(scored)


def build_per_image(context: Context, budget: Budget) -> dict[str, Any]:
    """Returns the attacks of a budget; a target's place becomes its surrogate image.

    Raises:
      ValueError: If an option is not possible.
    """
    built = {}
    for name, entry in context.plan.scoring.per_image.at(budget).items():
        with inside(f"config.scoring.per_image.attacks.{name}"):
            target = None
            if entry.target is not None:
                if not 0 <= entry.target < len(context.surrogate):
                    raise ValueError(
                        f"target {entry.target} is not the place of one of the "
                        f"{len(context.surrogate)} surrogate images"
                    )
                [image] = context.surrogate.read(np.asarray([entry.target]))["images"]
                target = evaluation.to_pixels(jnp.asarray(image))
            built[name] = entry.build(budget.threat, target)
    return built
