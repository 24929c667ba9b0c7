"""The `compare` stage: every recipe's accuracies and costs in one table and one picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import report
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.manifests import json_ready
from robust_ssl.report import goals, tables
from robust_ssl.report.results import NOT_TRUSTED
from robust_ssl.stages import costs, methods
from robust_ssl.stages.attack import budgets, build_attacks, fit_option, is_noise
from robust_ssl.stages.protocol import protocol, read_outcomes
from robust_ssl.stages.recipes import chain, scored
from robust_ssl.stages.run import Run
from robust_ssl.stages.scoring import Group, outcome_name

_log = logging.getLogger(__name__)

CLAIM = "Zhou et al. (IEEE S&P 2024)"


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless everything that a row has will be there."""
    names = scored(config)
    asked = [config["compare"]["reference"], *config["compare"]["order"]]
    missing = [name for name in asked if name not in names]
    if missing and set(asked) - set(missing):
        _log.warning("config.compare names %s, which is not compared", ", ".join(missing))
    if config["compare"]["reference"] not in config["methods"]:
        raise ValueError(
            f"config.compare.reference is {config['compare']['reference']!r}, which is not in "
            f"config.methods; there are {', '.join(names)}"
        )
    costs.check(config, names)
    _check_suite(config)
    missing = {"usual", "max_clean_loss", "max_cost"} - set(config["sweep"])
    if missing:
        raise ValueError(f"config.sweep has no {sorted(missing)}, by which the advice is given")


def _check_suite(config: Mapping[str, Any]) -> None:
    """Whether there will be the two figures under attack that every row has."""
    if not config["protocol"]["adaptive"]:
        raise ValueError(
            "config.protocol.adaptive must be True: the comparison has the suite crafted again on "
            "the hardened encoder"
        )
    suite, built = config["attack"], build_attacks(config["attack"]["methods"])
    if not any(
        "threat" not in options
        and budgets(suite, curve=False, method=name)[0] == suite["epsilon"]
        and not is_noise(built[name])
        for name, options in suite["methods"].items()
    ):
        raise ValueError(
            "config.attack.methods has only noise, or other threats and budgets than Linf at "
            f"config.attack.epsilon, {suite['epsilon']}, under which methods are compared"
        )


def compare(run: Run) -> StageDirectory:
    """Joins what `protocol` found with what training cost; writes the comparison.

    Returns:
      The stage's directory.  ``comparison.csv``, ``comparison.md``, ``differences.csv`` and
      ``figures/pareto.png`` are in the workdir.
    """
    config = run.config["compare"]
    board, made = protocol(run), methods.defend(run)
    seeds = run.config["defend"]["seeds"]
    names, measured = scored(run.config), {}
    reference = config["reference"]
    # With the first seed that a recipe was made with, those first that the reference was made with.
    for seed in sorted(seeds, key=lambda seed: not _survived(made, reference, seed)):
        new = [name for name in names if name not in measured and _survived(made, name, seed)]
        if new:
            stage = "cost" if seed == seeds[0] else f"cost-seed{seed}"
            new += [reference] if _survived(made, reference, seed) else []
            measured = {**costs.measure(run, new, seed, stage), **measured}
    pairs = [(n, s) for n in names for s in seeds if _survived(made, n, s)]
    inputs = {methods.model_name(*pair): "scored" for pair in pairs}
    inputs |= dict.fromkeys(made.results["failed"], "failed")
    outcomes = read_outcomes(board)
    right = {pair: images_right(run, outcomes, *pair) for pair in pairs}
    with run.open("compare", config, inputs, collects=True) as stage:
        rows = [row(run, board.results, right[p], *p, measured[p[0]]) for p in pairs]
        rows.sort(key=lambda one: -one["robust_worst"])
        results = json_ready({"rows": rows, "failed": made.results["failed"]})
        if not stage.done or stage.results != results:  # models may have been examined again
            stage.finish(None, results)
    _write(run, stage.results["rows"], right, made.results)
    return stage


def _survived(made: StageDirectory, name: str, seed: int) -> bool:
    return methods.directory(name, seed) in made.results["made"]


def row(
    run: Run,
    board: Mapping[str, Any],
    right: Mapping[str, np.ndarray],
    name: str,
    seed: int,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns a recipe's row of the comparison.

    Args:
      run: The run.
      board: Results of the `protocol` stage.
      right: Of `images_right`.
      name: Of the recipe.
      seed: It was made with.
      cost: Of `costs.measure`.
    """
    auto = right.get("autoattack")
    return {
        "method": name,
        "seed": seed,
        **{share: float(np.mean(each)) for share, each in right.items()},
        "autoattack": None if auto is None else float(np.mean(auto)),
        "images": len(right["clean"]),
        "autoattack_images": None if auto is None else len(auto),
        "verdict": board["verdicts"][methods.model_name(name, seed)]["verdict"],
        "training_seconds": round(costs.total_cost(run, name, seed)["seconds"], 3),
        "cost_factor": cost["factor"] or None,
        **{
            name: cost[name]
            for name in ("gradients", "gradients_per_epoch", "seconds_per_image", "peak_bytes")
        },
    }


def images_right(
    run: Run, outcomes: Mapping[str, np.ndarray], name: str, seed: int
) -> dict[str, np.ndarray]:
    """Returns which test images a recipe got right, bool ``[n]`` by share of the comparison.

    Args:
      run: The run.
      outcomes: Of `protocol.read_outcomes`.
      name: Of the recipe.
      seed: It was made with.

    Returns:
      ``"clean"``; ``"robust_public"`` and ``"robust_hardened"`` in the worst case over each suite;
      ``"robust_worst"`` over both; ``"autoattack"`` if it was asked for, at its first budget.
    """
    model = methods.model_name(name, seed)
    suite = ("universal", "Linf", run.config["attack"]["epsilon"])
    public, hardened = (
        outcomes[outcome_name(Group(model, against, *suite))] for against in ("public", "hardened")
    )
    found = {
        "clean": outcomes[f"{model}, clean"],
        "robust_public": public,
        "robust_hardened": hardened,
        "robust_worst": public & hardened,
    }
    for kind, epsilons in run.config["protocol"]["autoattack"]["threats"].items():
        for epsilon in epsilons:
            auto = Group(model, "hardened", "autoattack", kind, epsilon)
            found.setdefault("autoattack", outcomes[outcome_name(auto)])
    return found


def _write(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    each: Mapping[tuple[str, int], Mapping[str, np.ndarray]],
    made: Mapping[str, Any],
) -> None:
    if jax.process_index():
        return
    right = {
        name: {
            share: np.mean([found[share] for (n, _), found in each.items() if n == name], axis=0)
            for share in shares
        }
        for (name, _), shares in each.items()
    }
    summary = report.summarize(rows, right)
    points, sweep = pareto_points(summary), run.config["sweep"]
    said = [*compared(run), *happened(made), *_orders(run, summary)]
    if any(point.name == sweep["usual"] for point in points):
        limits = {name: sweep[name] for name in ("max_clean_loss", "max_cost")}
        said.append(report.advice(points, usual=sweep["usual"], **limits))
    if "gen_af" in summary:
        if sweep["usual"] in summary:
            usual, reference = sweep["usual"], run.config["compare"]["reference"]
            said.append(goals.cheap_robustness(summary, usual=usual, reference=reference))
        said.append(goals.better_on_all(summary))
    report.write_comparison(run.workdir, rows, said, right, leader="gen_af")
    if points:
        report.figure_pareto(
            run.workdir / "figures",
            points,
            label_clean="clean accuracy",
            label_robust="accuracy, worst case over both suites",
        )


def compared(run: Run) -> list[str]:
    """Says what was compared: the encoder, the data, the training and the attacks."""
    config, suite = run.config, run.config["attack"]
    train, validation = run.downstream
    names = scored(config)
    recipes = {name: methods.complete(config, name) for name in names}
    recipes |= {o: methods.complete(config, o) for n in names for o in chain(config, n)}
    trained = {name: recipe for name, recipe in recipes.items() if recipe["epochs"]}
    budgeted: dict[str, list[str]] = {}
    for name, recipe in trained.items():
        if recipe["attack"] is not None:
            budgeted.setdefault(_budget(recipe["attack"]), []).append(name)
    training = "; ".join(f"{found} for {', '.join(who)}" for found, who in budgeted.items())
    built = build_attacks(suite["methods"])
    attacks = []
    for name, options in suite["methods"].items():
        details = [] if is_noise(built[name]) else [f"{fit_option(suite, name, 'num_steps')} steps"]
        details += [_budget(options)] if "epsilon" in options else []
        attacks.append(f"{name} ({', '.join(details)})" if details else name)
    auto = [
        tables.budget(epsilon, kind)
        for kind, epsilons in config["protocol"]["autoattack"]["threats"].items()
        for epsilon in epsilons
    ]
    return [
        f"Encoder {run.encoder.name}; surrogate {run.surrogate.name} ({len(run.surrogate):,} "
        f"images); downstream set {train.name}: {len(train):,} training, {len(validation):,} "
        f"validation and {len(run.test):,} test images.",
        f"Training: {_each(trained, 'epochs')} epochs of batches of "
        f"{_each(trained, 'batch_size')}, seeds {_listed(config['defend']['seeds'])}; the best "
        "epoch by validation images unless a recipe takes the last. Budgets of the attacks in "
        f"training: {training or 'none'}.",
        f"Attacked at epsilon {tables.budget(suite['epsilon'])} by the suite "
        f"{', '.join(attacks)}, fitted with seeds {_listed(suite['seeds'])}"
        + (f"; AutoAttack at {_listed(auto)}." if auto else "."),
    ]


def _budget(options: Mapping[str, Any]) -> str:
    """The budget of an attack's options, with the name of a threat of its own."""
    if not options.get("threat"):
        return tables.budget(options["epsilon"])
    return f"{options['epsilon']:g} ({options['threat']['function'].rpartition(':')[2]})"


def _each(recipes: Mapping[str, Mapping[str, Any]], setting: str) -> str:
    """The value of most recipes, and which have others."""
    values = [recipe[setting] for recipe in recipes.values()]
    usual = max(values, key=values.count) if values else None
    others = [f"{name}: {r[setting]}" for name, r in recipes.items() if r[setting] != usual]
    return f"{usual}" + (f" ({', '.join(others)})" if others else "")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def happened(made: Mapping[str, Any]) -> list[str]:
    """Says what went wrong in training; `made` is what `methods.defend` returns as results."""
    said = [f"{stage} failed: {why}." for stage, why in made["failed"].items()]
    for stage, results in made["made"].items():
        name = stage.removeprefix("methods/")
        if results["skipped"]:
            said.append(
                f"{name}: {results['skipped']} of {results['steps']} updates were skipped, as they "
                "were not finite."
            )
        epoch = results.get("catastrophic_overfitting")
        if epoch is not None:
            said.append(
                f"{name} overfitted catastrophically at epoch {epoch}: it withstood the one step "
                f"of its own attack and no longer PGD; the weights of epoch "
                f"{results['best_epoch']} were kept."
            )
    return said


def _orders(run: Run, summary: Mapping[str, Any]) -> list[str]:
    """Whether the claimed order is found under attack, and whether clean accuracy has it too."""
    order = [name for name in run.config["compare"]["order"] if name in summary]
    orders = dict.fromkeys(("robust_public", "robust_hardened", "robust_worst"), order)
    orders["clean"] = [name for name in order if name != run.config["sweep"]["usual"]]
    return [
        report.ordering(summary, names, by=by, of=CLAIM)
        for by, names in orders.items()
        if len(names) > 1
    ]


def pareto_points(summary: Mapping[str, Mapping[str, Any]]) -> list[report.Point]:
    """Returns the points of the picture: methods with a cost."""
    return [
        report.Point(
            name,
            found["clean"].mean,
            found["robust_worst"].mean,
            found["cost_factor"].mean,
            found["verdict"] != NOT_TRUSTED,
            found["images"],
        )
        for name, found in summary.items()
        if found["cost_factor"].mean
    ]
