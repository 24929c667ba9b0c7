"""The stage `compare`: accuracies beside costs, and what they allow to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import report, workdir
from robust_ssl.build import text_of
from robust_ssl.data.order import permutation
from robust_ssl.experiment import costs, train
from robust_ssl.experiment.attackers import MORE
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.groups import Group, outcome_name, sample, threat_name
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.experiment.score import read_outcomes, score
from robust_ssl.report import comparison
from robust_ssl.workdir import StageDirectory, json_ready

Right = Mapping[str, np.ndarray]  # which test images were right, by share
_CLAIMS = ("claims",)  # may come and go: nothing that is measured depends on one


def check(context: Context) -> None:
    """Raises ConfigChangedError if the workdir has a comparison, or costs, made otherwise."""
    context.check_unchanged("compare", context.plan.compare, _CLAIMS)
    costs.check(context)


def compare(context: Context) -> StageDirectory:
    """Joins what `score` measured with what training cost.

    Returns:
      The stage's directory; its results are the ``comparison`` of ``results.json``.
    """
    scored, trained = score(context), train.trained(context)
    pairs = train.scored(context, trained)
    measured = _costs(context, trained, pairs)
    right = outcomes_of(context, scored, pairs)
    inputs = {train.model_name(*pair): "scored" for pair in pairs}
    inputs |= dict.fromkeys(trained.failed, "failed")
    how = {"collects": True, "places": _CLAIMS}
    with context.open("compare", context.plan.compare, inputs, **how) as stage:
        rows = [_row(context, scored, right[pair], *pair, measured[pair[0]]) for pair in pairs]
        rows.sort(key=lambda row: -row["robust_worst"])
        results = json_ready(_comparison(context, rows, right, trained))
        if not stage.done or stage.results != results:  # models may have been examined again
            stage.finish(results)
    return stage


def _costs(
    context: Context, trained: train.Trained, pairs: Sequence[tuple[Recipe, int]]
) -> dict[Recipe, Any]:
    """What each recipe costs, with the first seed that it was made with."""
    reference = context.plan.recipes[context.plan.compare.reference]
    seeds = context.plan.training.seeds
    first = _first_seed(context)

    def has(recipe: Recipe, seed: int) -> bool:
        return train.model_name(recipe, seed) in trained.results

    measured: dict[Recipe, Any] = {}
    # Seeds first that the reference was made with: without it there is no factor.
    for seed in sorted(seeds, key=lambda seed: not has(reference, seed)):
        new = [recipe for recipe, s in pairs if s == seed and recipe not in measured]
        if new:
            stage = "cost" if seed == first else f"cost-seed{seed}"
            beside = [*new, reference] if has(reference, seed) else new
            numbers = costs.measure(context, beside, seed, stage)
            measured |= {recipe: numbers[recipe.name] for recipe in new}
    return measured


def _first_seed(context: Context) -> int:
    """Returns the seed of ``cost``: the first, unless it was measured when another one was."""
    try:
        return workdir.read_manifest(context.workdir / "cost")["seed"]
    except workdir.WorkdirError:
        return context.plan.training.seeds[0]


def _row(
    context: Context,
    scored: StageDirectory,
    right: Right,
    recipe: Recipe,
    seed: int,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns a recipe's row of the comparison; see `report.FIELDS`."""
    auto = right.get("autoattack")
    verdict = scored.results["verdicts"][train.model_name(recipe, seed)]["verdict"]
    return {
        "recipe": recipe.name,
        "seed": seed,
        **{share: float(np.mean(each)) for share, each in right.items()},
        "autoattack": None if auto is None else float(np.mean(auto)),
        **{share: None for share in comparison.LATER if share not in right},
        "images": len(right["clean"]),
        "autoattack_images": None if auto is None else len(auto),
        "verdict": verdict,
        "training_seconds": round(costs.total_seconds(context, recipe, seed), 3),
        "cost_factor": cost["factor"] or None,
        "gradients": cost["gradients"],
        **{name: cost[name] for name in costs.OWN if name != "seconds_per_step"},
    }


def outcomes_of(
    context: Context, scored: StageDirectory, pairs: Sequence[tuple[Recipe, int]]
) -> dict[tuple[Recipe, int], Right]:
    """Returns which test images each recipe got right, bool ``[n]`` by share of the comparison.

    Returns:
      ``"clean"``; ``"robust_public"`` and ``"robust_hardened"`` in the worst case over each suite;
      ``"robust_worst"`` over both; if they were asked for, ``"robust_twin"`` under what was crafted
      on another seed's encoder, ``"robust_half"`` on one of half of the images,
      ``"robust_labelled"`` with head and labels, and ``"autoattack"`` at its first budget.
    """
    outcomes = read_outcomes(scored)
    suite = ("universal", "Linf", context.plan.suite.epsilon)
    auto = context.plan.scoring.autoattack.budgets[:1]
    right = {}
    for recipe, seed in pairs:
        model = train.model_name(recipe, seed)
        public, hardened = (
            outcomes[outcome_name(Group(model, against, *suite))]
            for against in ("public", "hardened")
        )
        shares = {
            "clean": outcomes[f"{model}, clean"],
            "robust_public": public,
            "robust_hardened": hardened,
            # Who sees the model can use both suites, and the second is not always the stronger.
            "robust_worst": public & hardened,
        }
        for against in MORE:
            labelled = context.plan.scoring.labelled
            epsilon = labelled.epsilon if against == "labelled" and labelled else suite[-1]
            name = outcome_name(Group(model, against, *suite[:-1], epsilon))
            if name in outcomes:
                shares[f"robust_{against}"] = outcomes[name]
        for budget in auto:
            kind = threat_name(budget.threat)
            group = Group(model, "hardened", "autoattack", kind, budget.epsilon)
            shares["autoattack"] = outcomes[outcome_name(group)]
        right[recipe, seed] = shares
    return right


def over_seeds(right: Mapping[tuple[Recipe, int], Right]) -> dict[str, dict[str, np.ndarray]]:
    """Returns in what part of the seeds each image was right, by recipe and share."""
    by_recipe: dict[str, dict[str, list[np.ndarray]]] = {}
    for (recipe, _), shares in right.items():
        for share, images in shares.items():
            by_recipe.setdefault(recipe.name, {}).setdefault(share, []).append(images)
    means = {}
    for name, shares in by_recipe.items():
        means[name] = {share: np.mean(each, axis=0) for share, each in shares.items()}
    return means


def _comparison(
    context: Context,
    rows: list[dict[str, Any]],
    right: Mapping[tuple[Recipe, int], Right],
    trained: train.Trained,
) -> dict[str, Any]:
    settings = context.plan.compare
    summary = report.summarize(rows, over_seeds(right))
    names = {settings.baseline, settings.reference} & summary.keys()
    claims = _judged(context, summary, right)
    sentences = [*_what_happened(trained)]
    points = report.points_of(summary)
    if any(point.name == settings.baseline for point in points):
        sentences.append(
            report.advice(
                points,
                baseline=settings.baseline,
                max_clean_loss=settings.max_clean_loss,
                max_cost=settings.max_cost,
            )
        )
    return {
        "baseline": settings.baseline if settings.baseline in names else None,
        "reference": settings.reference if settings.reference in names else None,
        "rows": rows,
        "failed": dict(trained.failed),
        "claims": [claim for claim in claims if claim["sentence"]],
        "sentences": sentences,
    }


def _judged(
    context: Context, summary: Any, right: Mapping[tuple[Recipe, int], Right]
) -> list[dict[str, Any]]:
    """Returns the claims with what can be said of them; announced ones are judged together."""
    claims = context.plan.compare.claims
    announced = [claim for claim in claims if "more" in claim]
    by_seed: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for (recipe, seed), shares in right.items():
        for share, images in shares.items():
            by_seed.setdefault((recipe.name, share), {})[seed] = images
    asked = {(claim.get("by", "robust_worst"), claim.get("seen", 0)) for claim in claims}
    unseen = {one: _unseen(context, *one) for one in asked}
    tested = iter(report.announced.judge(announced, by_seed, unseen, report.claims.PLACES))
    judged = []
    for claim in claims:
        entry: dict[str, Any] = {"claim": text_of(claim)}
        if "more" in claim:
            found = next(tested)
            entry["sentence"] = found.sentence + report.claims.mark(claim, summary)
            if found.measured is not None:
                entry["measured"] = found.measured
        else:
            gains = report.gain_shares(claim, by_seed, unseen) if "reach" in claim else None
            entry["sentence"] = report.claims.judge(claim, summary, gains)
            # Where the whole gain rests on what is not believable there are no shares of it.
            if gains is not None and not report.claims.doubt(claim, summary):
                entry["shares"] = report.share_rows(gains, summary)
        judged.append(entry)
    return judged


def _unseen(context: Context, share: str, seen: int) -> np.ndarray:
    """Returns which images of a share are not among those that a ``test_limit`` would take."""
    count, auto = len(context.test), context.plan.scoring.autoattack
    rows = np.arange(count)
    if share == "autoattack":
        rows = sample(context, auto.images or count)
    return ~np.isin(rows, permutation(count, context.plan.seed, "subset")[:seen])


def _what_happened(trained: train.Trained) -> list[str]:
    """Says what went wrong in training."""
    sentences = []
    for model, results in trained.results.items():
        if results["skipped"]:
            sentences.append(
                f"{model}: {results['skipped']} of {results['steps']} updates were not finite and "
                "were skipped."
            )
        epoch = results.get("catastrophic_overfitting")
        if epoch is not None:
            kept = results["best_epoch"]
            late = ", so its figures are those of a model that has overfitted" * (kept >= epoch)
            sentences.append(
                f"{model} overfitted catastrophically at epoch {epoch}: it withstood the one step "
                f"of its own attack and no longer PGD. The weights of epoch {kept} were kept{late}."
            )
    return sentences
