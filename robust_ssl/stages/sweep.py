"""The `sweep` stage: a grid over a recipe's settings, and what each point buys and costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from robust_ssl import data, evaluation, manifests, report
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.manifests import ConfigChangedError, WorkdirError, json_ready
from robust_ssl.report import leaderboard, tables
from robust_ssl.stages import costs, fitting, methods
from robust_ssl.stages.attack import attack, budgets, load_perturbations
from robust_ssl.stages.grid import apart, combinations, expand, read, replaced
from robust_ssl.stages.run import Run
from robust_ssl.stages.training import stage_key
from robust_ssl.trees import digest

_log = logging.getLogger(__name__)

_LONGEST = 80  # characters of a point's name, by which its directory is called

# Paths to a weight that `adv_ratio` decides, and to one of two ways to say how many layers move.
_WEIGHT = re.compile(r"((?:start\.)*)losses\.(?:clean|adversarial)_cross_entropy(?:\..*)?")
_LAYERS = re.compile(r"((?:start\.)*select\.)(top_k|top_k_fraction)")


class Points(NamedTuple):
    """The points of a sweep.

    Attributes:
      recipes: By a name that can be a directory's.
      starts: What they start from, by name, where that is no recipe of ``config.methods``: points
        that start from the same share it.
      values: What each path of the grid is at each point, by the point's name.
    """

    recipes: dict[str, dict[str, Any]]
    starts: dict[str, dict[str, Any]]
    values: dict[str, dict[str, Any]]


def points(config: Mapping[str, Any]) -> Points:
    """Returns the points of ``config.sweep``.

    A path that begins with ``start.`` leads into the recipe that the method starts from.  A point
    whose name is another's too, or longer than 80 characters, ends in a digest of its values.

    Raises:
      ValueError: If the method is not there, the grid is no list of (path, values) pairs, or a path
        leads nowhere or to a weight that ``adv_ratio`` decides.
    """
    name = config["sweep"]["method"]
    grid = read(config["sweep"]["grid"])
    values = combinations(grid)
    base = _opened(config, name, list(values[0]))
    _check_weights(base, values)
    recipes = expand(base, grid)
    shown = (point.replace("=", " ").replace(",", "") for point in recipes)
    labels = [f"{name} {re.sub(r'[^0-9A-Za-z_.+ -]', '_', label)}" for label in shown]
    found, starts = {}, {}
    names = apart(labels, values, _LONGEST)
    for point, recipe, chosen in zip(names, recipes.values(), values, strict=True):
        closed = _closed(config, name, _with_one_number_of_layers(recipe, chosen), starts)
        found[point] = {**closed, "scored": True}
    return Points(found, starts, dict(zip(names, values, strict=True)))


def _check_weights(base: Mapping[str, Any], values: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a path to a weight that an `adv_ratio` overwrites at some point."""
    for path in values[0]:
        if (weight := _WEIGHT.fullmatch(path)) is None:
            continue
        ratio, own = f"{weight[1]}adv_ratio", base
        for part in ratio.split("."):
            own = own.get(part) if isinstance(own, Mapping) else None
        if any(chosen.get(ratio, own) is not None for chosen in values):
            raise ValueError(
                f"the grid's path {path!r} leads to what {ratio} decides, so its points would be "
                f"the same; sweep {ratio} instead, the weight of adversarial cross-entropy (clean "
                f"has 1 - {ratio})"
            )


def _with_one_number_of_layers(
    recipe: Mapping[str, Any], values: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The recipe without its own `top_k_fraction` where the grid has a `top_k`; the same way round.

    Not where the grid has both, or says None.
    """
    for path, value in values.items():
        if value is not None and (layers := _LAYERS.fullmatch(path)):
            other = {"top_k": "top_k_fraction", "top_k_fraction": "top_k"}[layers[2]]
            if f"{layers[1]}{other}" not in values:
                recipe = replaced(recipe, f"{layers[1]}{other}", None)
    return recipe


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


def check(run: Run) -> tuple[Run, Points, dict[str, str]]:
    """Tries every point without a step of it, once in a run.

    Returns:
      The run with the points among its recipes, the points, and why some of them are impossible.

    Raises:
      ValueError: If no point is possible, or what points are held against.
      ConfigChangedError: If the workdir has a point of the same name with other settings.
    """
    # A pre-training that is yet to come has another encoder in its place, of the same shape.
    key = "sweep", digest(json_ready({**run.config, "encoder": None}))
    found = points(run.config)
    whole = {**run.config["methods"], **found.starts, **found.recipes}
    with_points = dataclasses.replace(run, config={**run.config, "methods": whole})
    tried = run.once(key, lambda: _tried(run, with_points, list(found.recipes)))
    return with_points, found, dict(tried)


def _tried(run: Run, with_points: Run, names: Sequence[str]) -> dict[str, str]:
    """Why points are impossible, by name."""
    methods.check_validation(run)
    for name in (run.config["sweep"]["usual"], run.config["compare"]["reference"]):
        methods.check_one(run, name, [run.seed])
        costs.check(run.config, [name])
    impossible = {}
    for name in names:
        try:
            methods.check_one(with_points, name, [run.seed])
            costs.check(with_points.config, [name])
        except WorkdirError:
            raise
        except ConfigChangedError as error:
            message = f"the workdir has a point {name!r} with other settings: {error}"
            raise ConfigChangedError(message) from error
        except methods.WRONG as error:
            impossible[name] = str(error)
            _log.warning("sweep: %s is impossible and left out: %s", name, error)
    if len(impossible) == len(names):
        raise ValueError(f"no point of the sweep is possible: {next(iter(impossible.values()))}")
    return impossible


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
    run, found, failed = check(run)
    mine = [name for name in found.recipes if name not in failed]
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
    _write(run, stage.results, _csv_rows(stage.results, found.values, measured))
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


def _csv_rows(
    results: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Every point with its exact values, what it buys and costs, or why it is not there."""
    paths, measures = next(iter(values.values())), ("gradients", "seconds_per_image", "peak_bytes")
    columns = (*paths, "clean", "robust", "cost", *measures, "why")
    failed = [{"point": name, "why": why} for name, why in results["failed"].items()]
    lines = []
    for row in [*results["rows"], *failed]:
        name = row["point"]
        chosen = {path: _exact(value) for path, value in values.get(name, {}).items()}
        cost = {measure: measured.get(name, {}).get(measure) for measure in measures}
        lines.append({"point": name, **dict.fromkeys(columns), **chosen, **row, **cost})
    return lines


def _exact(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _write(run: Run, results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
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
    manifests.write_atomically(run.workdir / "sweep.csv", leaderboard.csv_text(lines))
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
