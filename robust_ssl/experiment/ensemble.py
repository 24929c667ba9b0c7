"""AutoAttack in the stage `score`: each attack on what the ones before have left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import evaluation
from robust_ssl.attacks import autoattack
from robust_ssl.evaluation import PerImage
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.groups import Group, Member, Scored, Scorer, file_name, sample
from robust_ssl.experiment.loop import stage_key
from robust_ssl.experiment.suites import Budget
from robust_ssl.types import Classifier

_ENSEMBLES = {name: getattr(autoattack, name) for name in ("standard", "apgd", "rand")}


def build_autoattack(context: Context, num_classes: int) -> list[tuple[Budget, Mapping[str, Any]]]:
    """Returns AutoAttack at each of its budgets."""
    settings = context.plan.scoring.autoattack
    ensemble = _ENSEMBLES[settings.version]
    return [(budget, ensemble(budget.threat, num_classes)) for budget in settings.budgets]


def score_autoattack(
    group: Group, model: Classifier, ensemble: Mapping[str, Sequence[Any]], scorer: Scorer
) -> Scored:
    """Scores AutoAttack: each attack on what the ones before have left, kept one by one."""
    context = scorer.context
    settings = context.plan.scoring.autoattack
    rows = sample(context, settings.images or len(context.test))
    part = context.test.read(rows)
    examples = {
        "images": part["images"],
        "labels": part["labels"].astype(np.int32),
        "indices": rows.astype(np.int32),
    }
    shared = {
        "key": stage_key(context.plan.seed, "autoattack"),
        "parallel": context.parallel,
        "batch_size": settings.batch_size,
    }
    before, members, results = None, [], {}
    for name, parts in ensemble.items():
        file = file_name(group, [settings.version, name, f"{len(rows)} images"])
        after = scorer.kept(
            file, lambda p=parts, b=before: {"after": _after(model, examples, p, b, shared)}
        )["after"]
        alive = after.clean_correct if before is None else before.robust_correct
        gradients = int(alive.sum()) * sum(part.gradient_evaluations for part in parts)
        members.append(Member(name, None, parts[0], 0.0, gradients))
        results[name] = before = after
    total = sum(result.seconds for result in results.values())
    worst = dataclasses.replace(before, seconds=total)
    return Scored(group, tuple(members), {**results, evaluation.WORST: worst}, rows)


def _after(model, examples, parts, before: PerImage | None, shared) -> PerImage:
    """Returns what is left after an attack of what the ones before have left."""
    begun = time.perf_counter()
    if before is None:
        clean = alive = evaluation.clean_correct(model, examples, **shared)
    else:
        clean, alive = before.clean_correct, before.robust_correct
    # As AutoAttack's own code: FAB stops just past the boundary, and rounding may push it back.
    left = evaluation.strike(model, examples, parts, alive, eight_bit=False, **shared)
    return PerImage(clean, left, clean & ~left, time.perf_counter() - begun)
