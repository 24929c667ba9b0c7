"""The `sweep` stage: a grid over a recipe's settings, and what each point buys and costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from robust_ssl import data, evaluation, manifests, report
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.manifests import json_ready
from robust_ssl.report import leaderboard, tables
from robust_ssl.stages import costs, fitting, methods
from robust_ssl.stages.attack import attack, budgets, load_perturbations
from robust_ssl.stages.grid import expand
from robust_ssl.stages.run import Run
from robust_ssl.stages.training import stage_key
from robust_ssl.trees import digest

_log = logging.getLogger(__name__)


def points(
    config: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns the recipes of ``config.sweep``, by a name that can be a directory's.

    A path that begins with ``start.`` leads into the recipe that the method starts from.

    Returns:
      The points, and what they start from where that is no recipe of ``config.methods``: points
      that start from the same share it.

    Raises:
      ValueError: If the method is not there, or a path leads nowhere.
    """
    name = config["sweep"]["method"]
    grid = {path: list(values) for path, values in config["sweep"]["grid"]}
    paths = [path.strip() for joined in grid for path in joined.split("&")]
    found, starts = {}, {}
    for point, recipe in expand(_opened(config, name, paths), grid).items():
        label = re.sub(r"[^0-9A-Za-z_.+ -]", "_", point.replace("=", " ").replace(",", ""))
        found[f"{name} {label}"] = {**_closed(config, name, recipe, starts), "scored": True}
    return found, starts


def _opened(config: Mapping[str, Any], name: str, paths: Sequence[str]) -> dict[str, Any]:
    """A recipe with the recipe that it starts from in its place, as far as paths lead into it."""
    recipe = methods.complete(config, name)
    inner = [path.removeprefix("start.") for path in paths if path.startswith("start.")]
    if inner and recipe["start"]:
        recipe["start"] = _opened(config, recipe["start"], inner)
    return recipe


def _closed(
    config: Mapping[str, Any], name: str, recipe: Mapping[str, Any], starts: dict[str, Any]
) -> dict[str, Any]:
    """The recipe with the name of what it starts from, which is new where the grid changed it."""
    start = recipe["start"]
    if isinstance(start, Mapping):
        original = methods.complete(config, name)["start"]
        known = _closed(config, original, methods.complete(config, original), {})
        start = _closed(config, original, start, starts)
        if start == known:
            start = original
        else:
            label = f"{original} {digest(json_ready(start))[:8]}"
            starts[label], start = {**start, "scored": False}, label
    decided = ("head", "encoder") if start else ()  # by what it starts from
    return {**{key: v for key, v in recipe.items() if key not in decided}, "start": start}


def check(run: Run) -> tuple[Run, dict[str, str]]:
    """Tries every point without a step of it.

    Returns:
      The run with the possible points among its recipes, and why the others are impossible.

    Raises:
      ValueError: If no point is possible, or what points are held against.
    """
    methods.check_validation(run)
    for name in (run.config["sweep"]["usual"], run.config["compare"]["reference"]):
        methods.check_one(run, name, [run.seed])
        costs.check(run.config, [name])
    found, starts = points(run.config)
    whole = {**run.config["methods"], **starts, **found}
    run = dataclasses.replace(run, config={**run.config, "methods": whole})
    impossible = {}
    for name in found:
        try:
            methods.check_one(run, name, [run.seed])
            costs.check(run.config, [name])
        except methods.WRONG as error:
            impossible[name] = str(error)
            _log.warning("sweep: %s is impossible and left out: %s", name, error)
    if len(impossible) == len(found):
        raise ValueError(f"no point of the sweep is possible: {next(iter(impossible.values()))}")
    return run, impossible


def sweep(run: Run) -> StageDirectory:
    """Makes and scores every point of the grid on **validation** images.

    Robust accuracy is the worst case per image over the universal attacks of ``config.attack``,
    crafted on the public encoder.  A point that cannot be built, or whose training fails, is
    reported, and the others go on; finished points are kept.

    Returns:
      The stage's directory.  ``sweep.csv``, ``sweep.md`` and ``figures/sweep.png`` are in the
      workdir.
    """
    config = run.config["sweep"]
    run, failed = check(run)
    mine = [name for name in points(run.config)[0] if name not in failed]
    usual, reference = config["usual"], run.config["compare"]["reference"]
    scores, public = {}, attack(run)
    made: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for name in dict.fromkeys([usual, reference, *mine]):
        methods.make(run, name, run.seed, made, lost)
        if methods.directory(name, run.seed) in made and name in (usual, *mine):
            scores[name] = _score(run, name, public)
    failed |= {
        stage.removeprefix("methods/").removesuffix(f"-seed{run.seed}"): why
        for stage, why in lost.items()
    }
    if not scores:
        raise FloatingPointError(f"every point of the sweep failed: {failed}")
    timed = list(scores) if reference in failed else [*scores, reference]
    measured = costs.measure(run, timed, run.seed, "sweep_cost")
    inputs = {name: json.dumps(score) for name, score in scores.items()}
    inputs |= {f"{name}, left out": "failed" for name in failed}  # it may be made another time
    kept = {name: value for name, value in config.items() if name != "grid"}
    with run.open("sweep", kept, inputs, collects=True) as stage:
        if not stage.done:
            rows = [
                {"point": n, **score, "cost": measured[n]["factor"]} for n, score in scores.items()
            ]
            stage.finish(None, {"rows": rows, "failed": failed})
    _write(run, stage.results)
    return stage


def _score(run: Run, name: str, public: StageDirectory) -> dict[str, float]:
    model = methods.load_method(run, name, run.seed)
    config = run.config["attack"]
    found = {
        f"{method}, seed {seed}": perturbation
        for (method, seed, epsilon), perturbation in load_perturbations(
            public, config, curve=public.manifest["config"]["curve"]
        ).items()
        if epsilon == budgets(config, curve=False, method=method)[0]
    }
    results = evaluation.score(
        model,
        data.epoch_batches(run.downstream[1], fitting.scoring_batch_size(run)),
        found,
        key=stage_key(run.seed, "sweep"),
        parallel=run.parallel,
    )
    counts = results[evaluation.WORST].counts
    return {"clean": counts.clean_accuracy, "robust": counts.robust_accuracy}


def _write(run: Run, results: Mapping[str, Any]) -> None:
    if jax.process_index():
        return
    config, rows = run.config["sweep"], results["rows"]
    images = len(run.downstream[1])
    found = [
        report.Point(r["point"], r["clean"], r["robust"], r["cost"], images=images)
        for r in rows
        if r["cost"]
    ]
    usual, limits = config["usual"], {k: config[k] for k in ("max_clean_loss", "max_cost")}
    said = []
    if any(point.name == usual for point in found):
        said.append(report.advice(found, usual=usual, **limits))
    said += [f"{name} is left out: {why}" for name, why in results["failed"].items()]
    said += [
        f"Accuracies on {images} validation images; robust: the worst case per "
        "image over the universal attacks crafted on the public encoder.  Nobody attacked the "
        "points themselves: choose by this, and believe the comparison.",
        _table(rows),
    ]
    manifests.write_atomically(run.workdir / "sweep.csv", leaderboard.csv_text(rows))
    manifests.write_atomically(run.workdir / "sweep.md", "\n\n".join(said) + "\n")
    if found:
        report.figure_pareto(
            run.workdir / "figures",
            found,
            label_clean="clean accuracy, validation",
            label_robust="accuracy under the universal attacks, validation",
            name="sweep",
        )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return leaderboard.markdown_table(
        [
            {
                "point": tables.method_name(row["point"]),
                "clean": f"{row['clean']:.1%}",
                "robust": f"{row['robust']:.1%}",
                "training time": f"{row['cost']:.2f}x" if row["cost"] else "n/a",
            }
            for row in rows
        ]
    )
