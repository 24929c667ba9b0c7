"""The stage `audit`: what the other stages measured, brought together and decided on.

Nothing is measured twice.  What this stage adds is the time of one inference, the pictures of the
page, the encoder's provenance, and a baseline for inspections.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import evaluation, report
from robust_ssl.audit import decision, document, files
from robust_ssl.audit import pages as audit_pages
from robust_ssl.evaluation.checks.result import BELIEVABLE, WITH_NOTES
from robust_ssl.experiment import audit_pictures, audit_provenance, pages, train
from robust_ssl.experiment.attack import at_main_budget, attack
from robust_ssl.experiment.audit_baseline import write_baseline
from robust_ssl.experiment.audit_screening import read_screening
from robust_ssl.experiment.audit_section import Audit
from robust_ssl.experiment.compare import compare
from robust_ssl.experiment.context import Context, identity, model_inputs
from robust_ssl.experiment.examined import needs_labels
from robust_ssl.experiment.groups import Group, outcome_name, threat_name
from robust_ssl.experiment.jobs import build_per_image
from robust_ssl.experiment.score import read_outcomes, score
from robust_ssl.parallel import barrier
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory, WorkdirError, fingerprint, json_ready, sum_files

ROLES = ("usual", "secured")
ROUNDS, BATCH = 5, 64  # of the timed inference
Names = Mapping[str, str | None]  # of the models, by role


def check(context: Context) -> None:
    """Raises unless pages can be written, files can be read, and classifier and encoder fit."""
    audit_pages.check_installed()
    section = context.plan.audit
    given = _given(context)
    limits, _, answers = decision.rules(given.policy, given.answers)
    decision.at(section.stage, limits, answers)
    audit_provenance.check(context)
    context.check_unchanged("audit", _settings(context))


def _given(context: Context) -> files.Given:
    section = context.plan.audit
    return context.once(
        "audit files",
        lambda: files.chosen(context.workdir, section.answers, section.policy),
    )


def _settings(context: Context) -> dict[str, Any]:
    """What is measured; what a decision goes by may change without measuring anything again."""
    return {name: getattr(context.plan.audit, name) for name in ("usual", "secured", "examples")}


def audit(context: Context) -> StageDirectory:
    """Brings together what was measured, decides on it, and writes ``audit.json`` and its pages.

    Returns:
      The stage's directory; its results are ``measured`` of ``audit.json``.
    """
    compared = compare(context)
    pages.write(context, compared)
    barrier("audit")  # one process has written the results that all read
    models = _models(context)
    inputs = {role: identity(model) for role, model in models.items()}
    with context.open("audit", _settings(context), inputs, collects=True) as stage:
        kept = stage.results.get("cost") if stage.done else None
        measured = json_ready(_measure(context, compared, models, kept))
        if not stage.done or stage.results != measured:
            stage.finish(measured)
    if jax.process_index() == 0:
        _decide(context, stage.results)
    return stage


def _decide(context: Context, measured: Mapping[str, Any]) -> None:
    section = context.plan.audit
    given = _given(context)
    limits, items, answers = decision.rules(given.policy, given.answers)
    # Written once, with the decision: the next one is for the same stage, if nobody says another.
    whole = document.sealed(measured)
    decided = decision.decide(whole, section.stage, limits, items, answers)
    files.keep(context.workdir, given)
    audit_pages.write(context.workdir, decided)


def _names(context: Context) -> dict[str, str | None]:
    """Returns the models by role; None where a recipe failed."""
    seed, section = context.plan.training.seeds[0], context.plan.audit
    done = train.trained(context)
    names: dict[str, str | None] = {}
    for role in ROLES:
        name = getattr(section, role)
        if name in context.plan.recipes:
            model = train.model_name(context.plan.recipes[name], seed)
            name = model if model in done.results else None
        names[role] = name
    if names["usual"] is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in done.failed.items())
        raise WorkdirError(f"there is nothing to hold the secured classifier against: {why}")
    return names


def _models(context: Context) -> dict[str, Classifier]:
    pairs = train.scored(context, train.trained(context))
    every = pages.models_of(context, pairs)
    return {role: every[name] for role, name in _names(context).items() if name}


def _measure(
    context: Context,
    compared: StageDirectory,
    models: Mapping[str, Classifier],
    kept: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns ``measured`` of ``audit.json``; see its schema."""
    section, scored, names = context.plan.audit, score(context), _names(context)
    results = report.results.read(context.workdir / "results.json")
    right = {role: _right(context, read_outcomes(scored), name) for role, name in names.items()}
    public = at_main_budget(context, attack(context))
    looks = {
        role: pages.look(context, scored, names[role], model, public)
        for role, model in models.items()
    }
    return {
        "date": scored.manifest["finished"][:10],
        "encoder": results["run"]["encoder"],
        "data": _data(results["run"], elsewhere=section.secured in context.plan.classifiers),
        "epsilon": float(context.plan.suite.epsilon),
        "models": _named(context, results, names, models["usual"]),
        "clean": _clean(right),
        "attacked": {role: each and _attacked(each) for role, each in right.items()},
        "rows": _rows(results["results"], names),
        "curve": {role: _curve(results["results"], name) for role, name in names.items() if name},
        "trade_off": _trade_off(results["comparison"]["rows"], section),
        "layers": {role: audit_pictures.layers(look) for role, look in looks.items()},
        "bands": audit_pictures.bands(looks["usual"]),
        "cost": _cost(context, compared.results["rows"], models, kept),
        "trust": {role: name and _trust(results["verdicts"], name) for role, name in names.items()},
        "examples": audit_pictures.examples(looks["usual"], section.examples),
        "provenance": audit_provenance.examine(context),
        "screening": read_screening(context),
        "inspection": write_baseline(context, models["secured"]) if names["secured"] else None,
        "made": _made(context, scored),
    }


# --- Shares -------------------------------------------------------------------------------------


def _share(right: np.ndarray) -> dict[str, Any]:
    """Returns the share of images that are right, with Wilson's interval."""
    count, n = int(np.sum(right)), len(right)
    low, high = evaluation.wilson_interval(count, n)
    return {"value": count / n if n else 0.0, "low": low, "high": high, "n": n}


def _right(
    context: Context, outcomes: Mapping[str, np.ndarray], name: str | None
) -> dict[str, np.ndarray] | None:
    """Returns which test images a model got right: clean, and under each kind of attack."""
    if name is None:
        return None
    suite = ("universal", "Linf", context.plan.suite.epsilon)
    right = {
        "clean": outcomes[f"{name}, clean"],
        "public": outcomes[outcome_name(Group(name, "public", *suite))],
        "adaptive": outcomes[outcome_name(Group(name, "hardened", *suite))],
    }
    if budgets := _white_box(context):
        each = [Group(name, "hardened", "per_image", "Linf", epsilon) for epsilon in budgets]
        right["per_image"] = np.logical_and.reduce([outcomes[outcome_name(g)] for g in each])
    return right


def _white_box(context: Context) -> list[float]:
    """Returns the Linf budgets of who knows the model: the widest at which an attack sees labels.

    Whoever has that one has those below it, too, and what needs no labels there.
    """
    budgets = [b for b in context.plan.scoring.per_image.scored if threat_name(b.threat) == "Linf"]
    seeing = [
        b.epsilon for b in budgets if any(map(needs_labels, build_per_image(context, b).values()))
    ]
    return [b.epsilon for b in budgets if seeing and b.epsilon <= max(seeing)]


def _clean(right: Mapping[str, Mapping[str, np.ndarray] | None]) -> dict[str, Any]:
    shares = {role: each and _share(each["clean"]) for role, each in right.items()}
    if right["secured"] is None:
        return {**shares, "loss": None}
    usual, secured = (right[role]["clean"] for role in ROLES)
    loss, half = evaluation.difference(usual, secured)
    interval = {"value": loss, "low": loss - half, "high": loss + half, "n": len(usual)}
    return {**shares, "loss": interval}


def _attacked(right: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns accuracy and success over all that an attacker with a universal attack can use."""
    worst = right["public"] & right["adaptive"]
    turned = ~worst[right["clean"]]
    per_image = right.get("per_image")
    return {
        "accuracy": _share(worst),
        "success": _share(turned),
        "public": _share(right["public"]),
        "adaptive": _share(right["adaptive"]),
        "per_image": None if per_image is None else _share(per_image),
    }


def _estimate(entry: Mapping[str, Any], metric: str) -> dict[str, Any]:
    low, high = entry["ci95"][metric]
    return {"value": entry[metric], "low": low, "high": high, "n": entry["n"]}


def _rows(entries: Sequence[Mapping[str, Any]], names: Names) -> list[dict[str, Any]]:
    """Returns every attack on the two models."""
    roles = {name: role for role, name in names.items() if name}
    return [
        {
            "role": roles[entry["model"]],
            **{n: entry[n] for n in ("attack", "family", "threat", "crafted_against", "epsilon")},
            "accuracy": _estimate(entry, "robust_accuracy"),
            "success": _estimate(entry, "attack_success_rate"),
        }
        for entry in entries
        if entry["model"] in roles
    ]


def _curve(entries: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
    """Returns accuracy by budget, the worst case over the public encoder's perturbations."""
    points = {}
    for entry in entries:
        group = tuple(entry[n] for n in ("model", "family", "crafted_against", "threat"))
        if group == (model, "universal", "public", "Linf"):
            points[0.0] = _estimate(entry, "clean_accuracy")
            # The worst case comes last in its group; where there is one attack it is that one's.
            points[entry["epsilon"]] = _estimate(entry, "robust_accuracy")
    return [{"epsilon": epsilon, "accuracy": points[epsilon]} for epsilon in sorted(points)]


def _times(factor: float | None, usual: float | None) -> float | None:
    """Returns a factor over the usual recipe's: rows have it over the comparison's reference's."""
    return factor / usual if factor and usual else None


def _trade_off(rows: Sequence[Mapping[str, Any]], section: Audit) -> list[dict[str, Any]]:
    first = {}
    for row in rows:
        first.setdefault(row["recipe"], row)
    usual = first.get(section.usual, {}).get("cost_factor")
    return [
        {
            "recipe": recipe,
            "clean": row["clean"],
            "robust": row["robust_worst"],
            "cost_factor": _times(row["cost_factor"], usual),
            "trusted": row["verdict"] in (BELIEVABLE, WITH_NOTES),
            "chosen": recipe == section.secured,
        }
        for recipe, row in first.items()
    ]


# --- What they rest on --------------------------------------------------------------------------


def _data(run: Mapping[str, Any], *, elsewhere: bool) -> dict[str, Any]:
    """Returns the images by number; `elsewhere` is whether the secured one was trained there."""
    downstream, surrogate = run["downstream"], run.get("surrogate") or {}
    largest = downstream.get("largest_class")
    numbers = ("name", "train", "validation", "test", "classes", "test_among_train")
    numbers += ("test_distinct",)
    if elsewhere and not downstream["test_among_train"]:
        # None of them is among this run's training images; among its own, nobody knows.
        downstream = {**downstream, "test_among_train": None}
    right = largest and np.arange(downstream["test"]) < largest["images"]
    return {
        **{name: downstream[name] for name in numbers},
        "surrogate": surrogate.get("name"),
        "surrogate_images": surrogate.get("images"),
        "largest_class": None if largest is None else _share(right),
    }


def _named(
    context: Context, results: Mapping[str, Any], names: Names, usual: Classifier
) -> dict[str, Any]:
    """Returns the models by role, and whether the usual one has another encoder than the public."""
    named: dict[str, Any] = {
        role: name and {"name": name, "recipe": results["models"][name]["recipe"]}
        for role, name in names.items()
    }
    public = train.public_encoder(context, context.plan.recipes[context.plan.audit.usual])
    moved = fingerprint(usual.encoder.variables) != fingerprint(public.variables)
    return named | {"usual": {**named["usual"], "trains_encoder": moved}}


def _trust(verdicts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns whether a model's figures are believed: one that was not examined is not."""
    verdict = verdicts.get(name) or {"verdict": "not examined", "checks": []}
    shown = ("name", "title", "number", "status", "value", "limit")
    return {
        "verdict": verdict["verdict"],
        "trusted": verdict["verdict"] in (BELIEVABLE, WITH_NOTES),
        "images": verdict.get("images", 0),
        "checks": [{name: check[name] for name in shown} for check in verdict["checks"]],
    }


def _cost(
    context: Context,
    rows: Sequence[Mapping[str, Any]],
    models: Mapping[str, Classifier],
    kept: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns seconds of training and inference; those of a classifier from elsewhere are unknown.

    Networks that are the same cost the same: a difference of their times would be noise.
    """
    section, seed = context.plan.audit, context.plan.training.seeds[0]
    found = {row["recipe"]: row for row in rows if row["seed"] == seed}
    seconds = {role: found.get(getattr(section, role), {}) for role in ROLES}
    training = {role: row.get("training_seconds") for role, row in seconds.items()}
    if kept and all(kept[role] for role in models):
        inference = {role: kept[role]["seconds_per_image"] for role in models}
    else:
        inference = _inference_seconds(context, models)
    networks = {model_inputs("m", model)["m_network"] for model in models.values()}
    same = len(networks) == 1 and len(models) == len(ROLES)
    ratio = 1.0
    if not same and len(models) == len(ROLES):
        ratio = inference["secured"] / inference["usual"]
    extra = None
    if None not in training.values():
        extra = training["secured"] - training["usual"]
    return {
        **{
            role: {
                "training_seconds": training[role],
                "seconds_per_image": inference.get(role),
            }
            for role in ROLES
        },
        "factor": _times(*(seconds[role].get("cost_factor") for role in ("secured", "usual"))),
        "extra_training_seconds": extra,
        "inference_ratio": ratio,
        "same_network": same,
    }


def _inference_seconds(context: Context, models: Mapping[str, Classifier]) -> dict[str, float]:
    """Returns seconds an image, the median of rounds in which the models take turns."""
    count = min(BATCH, len(context.test))
    images = evaluation.to_pixels(context.test.read(np.arange(count))["images"])
    predict = jax.jit(lambda model, x: model(x).logits)
    seconds: dict[str, list[float]] = {role: [] for role in models}
    for number in range(ROUNDS + 1):
        for role, model in models.items():
            begun = time.perf_counter()
            jax.block_until_ready(predict(model, images))
            if number:  # the first compiles
                seconds[role].append((time.perf_counter() - begun) / count)
    return {role: statistics.median(times) for role, times in seconds.items()}


def _made(context: Context, scored: StageDirectory) -> dict[str, Any]:
    file = context.workdir / "results.json"
    text = context.plan.text
    text.pop("audit", None)  # what it says changes nothing that was measured
    return {
        "results_sha256": sum_files(context.workdir, [file])[file.name]["sha256"],
        "config_sha256": document.digest(json_ready(text)),
        "versions": scored.manifest["versions"],
        "devices": scored.manifest["devices"],
        "seed": context.plan.seed,
        "command": context.plan.audit.command,
    }
