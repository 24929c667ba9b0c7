"""The `compare` stage: every recipe's accuracies and costs in one table and one picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from robust_ssl import report
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.evaluation import WORST
from robust_ssl.report.results import NOT_TRUSTED
from robust_ssl.stages import costs, methods
from robust_ssl.stages.attack import budgets, build_attacks, is_noise
from robust_ssl.stages.protocol import protocol
from robust_ssl.stages.run import Run

_log = logging.getLogger(__name__)

CLAIM = "Zhou et al. (IEEE S&P 2024)"


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless everything that a row has will be there."""
    names = methods.scored(config)
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
      The stage's directory.  ``comparison.csv``, ``comparison.md`` and ``figures/pareto.png`` are
      in the workdir.
    """
    config = run.config["compare"]
    board, made = protocol(run), methods.defend(run)
    seeds = run.config["defend"]["seeds"]
    names, measured = methods.scored(run.config), {}
    for seed in seeds:  # the first with which a recipe was made
        new = [name for name in names if name not in measured and _survived(made, name, seed)]
        if new:
            stage = "cost" if seed == seeds[0] else f"cost-seed{seed}"
            measured = {**costs.measure(run, new, seed, stage), **measured}
    pairs = [(n, s) for n in names for s in seeds if _survived(made, n, s)]
    inputs = {methods.model_name(*pair): "scored" for pair in pairs}
    with run.open("compare", config, inputs, collects=True) as stage:
        if not stage.done:
            rows = [row(run, board.results, *pair, measured[pair[0]]) for pair in pairs]
            rows.sort(key=lambda one: -one["robust_hardened"])
            stage.finish(None, {"rows": rows, "failed": made.results["failed"]})
    _write(run, stage.results["rows"], stage.results["failed"])
    return stage


def _survived(made: StageDirectory, name: str, seed: int) -> bool:
    return methods.directory(name, seed) in made.results["made"]


def row(
    run: Run, board: Mapping[str, Any], name: str, seed: int, cost: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a recipe's row of the comparison.

    Args:
      run: The run.
      board: Results of the `protocol` stage.
      name: Of the recipe.
      seed: It was made with.
      cost: Of `costs.measure`.
    """
    model = methods.model_name(name, seed)
    mine = [entry for entry in board["results"] if entry["model"] == model]
    universal = [
        entry
        for entry in mine
        if entry["family"] == "universal"
        and (entry["threat"], entry["epsilon"]) == ("Linf", run.config["attack"]["epsilon"])
    ]
    auto = [entry for entry in mine if entry["family"] == "autoattack"]
    public, hardened = (_worst(universal, against) for against in ("public", "hardened"))
    return {
        "method": name,
        "seed": seed,
        "clean": public["clean_accuracy"],
        "robust_public": public["robust_accuracy"],
        "robust_hardened": hardened["robust_accuracy"],
        "autoattack": _worst(auto, "hardened")["robust_accuracy"] if auto else None,
        "images": public["n"],
        "autoattack_images": auto[0]["n"] if auto else None,
        "verdict": board["verdicts"][model]["verdict"],
        "training_seconds": round(methods.total_cost(run, name, seed)["seconds"], 3),
        "cost_factor": cost["factor"] if cost["factor"] > 0 else None,
        "gradients": cost["gradients"],
        "peak_bytes": cost["peak_bytes"],
    }


def _worst(entries: Sequence[Mapping[str, Any]], against: str) -> Mapping[str, Any]:
    mine = [entry for entry in entries if entry["crafted_against"] == against]
    together = [entry for entry in mine if entry["attack"] == WORST]
    return together[0] if together else min(mine, key=lambda entry: entry["robust_accuracy"])


def _write(run: Run, rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> None:
    if jax.process_index():
        return
    summary = report.summarise(rows)
    said = [f"{name} failed: {why}." for name, why in failed.items()]
    order = [name for name in run.config["compare"]["order"] if name in summary]
    if len(order) > 1:
        said += [
            f"The order that {CLAIM} report, by accuracy under the suite {where}: "
            f"{report.ordering(summary, order, by=by)}"
            for by, where in (
                ("robust_public", "crafted on the public encoder"),
                ("robust_hardened", "crafted again on the hardened one"),
            )
        ]
    points = pareto_points(summary)
    sweep = run.config["sweep"]
    if any(point.name == sweep["usual"] for point in points):
        limits = {name: sweep[name] for name in ("max_clean_loss", "max_cost")}
        said.append(report.advice(points, usual=sweep["usual"], **limits))
    report.write_comparison(run.workdir, rows, said)
    if points:
        report.figure_pareto(
            run.workdir / "figures",
            points,
            label_clean="clean accuracy",
            label_robust="accuracy under the suite crafted again on the hardened encoder",
        )


def pareto_points(summary: Mapping[str, Mapping[str, Any]]) -> list[report.Point]:
    """Returns the points of the picture: methods with a cost; what is not trusted says so."""
    return [
        report.Point(
            name if found["verdict"] != NOT_TRUSTED else f"{name} ({NOT_TRUSTED.upper()})",
            found["clean"].mean,
            found["robust_hardened"].mean,
            found["cost_factor"].mean,
        )
        for name, found in summary.items()
        if found["cost_factor"].mean
    ]
