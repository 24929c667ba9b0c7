"""The stage `sweep`: a grid over a recipe's entries, and what each point buys and costs."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import data, evaluation, report, words
from robust_ssl.experiment import costs, trace, train
from robust_ssl.experiment.attack import at_main_budget, attack
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.grid import Points, points
from robust_ssl.experiment.loop import stage_key
from robust_ssl.experiment.plan import Plan, check_recipe_text, with_recipes
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.workdir import (
    ConfigChangedError,
    StageDirectory,
    WorkdirError,
    digest,
    load_arrays,
    readable,
    save_arrays,
    write_pages,
)

_CLAIMS = ("compare.claims",)  # may come and go: nothing that is measured depends on one
# Names among the inputs; until they were fingerprints, a point's own name was one.
_RECIPE, _ATTACK, _IMAGES = "recipe/", "perturbations", "validation"

_log = logging.getLogger(__name__)


def with_points(context: Context) -> tuple[Context, Points, dict[str, str]]:
    """Tries every point without a step of it, once in a run.

    Returns:
      The run with the possible points among its recipes, the points, and why others are not.

    Raises:
      ValueError: If no point is possible, or what points are held against is not.
      ConfigChangedError: If the workdir has a point of the same name with other settings.
    """
    return context.once("sweep", lambda: _tried(context))


def _tried(context: Context) -> tuple[Context, Points, dict[str, str]]:
    planned = context.plan
    context.check_unchanged("sweep", _told(planned), _CLAIMS)
    costs.check(context, "sweep_cost")
    grid = points(planned.recipes[planned.sweep.recipe], planned.sweep.grid)
    seeds = dataclasses.replace(planned.training, seeds=(planned.seed,))
    planned = dataclasses.replace(planned, training=seeds)
    for name in (planned.compare.baseline, planned.compare.reference):
        trace.check_recipe(dataclasses.replace(context, plan=planned), planned.recipes[name])
    reference, impossible = planned.recipes[planned.compare.reference], {}
    for name, entries in grid.entries.items():
        try:
            more = with_recipes(planned, {**grid.starts, name: entries})
            check_recipe_text(more, name)
            if more.recipes[name].batch_size != reference.batch_size:
                raise ValueError(f"costs are compared at one batch size, {reference.batch_size}")
            trace.check_recipe(dataclasses.replace(context, plan=more), more.recipes[name])
        except WorkdirError:
            raise
        except ConfigChangedError as error:
            message = f"the workdir has a point {name!r} with other settings: {error}"
            raise ConfigChangedError(message) from error
        except trace.WRONG as error:
            impossible[name] = str(error)
            _log.warning("sweep: %s is impossible and left out: %s", name, error)
            continue
        planned = more
    if len(impossible) == len(grid.entries):
        raise ValueError(f"no point of the sweep is possible: {next(iter(impossible.values()))}")
    return dataclasses.replace(context, plan=planned), grid, impossible


def sweep(context: Context) -> StageDirectory:
    """Makes and scores every point of the grid on **validation** images.

    Robust accuracy is the worst case per image over the suite, crafted on the public encoder.  A
    point that cannot be built, or whose training fails, is reported, and the others go on;
    finished points are kept.

    Returns:
      The stage's directory.  ``sweep.csv``, ``sweep.md`` and ``figures/sweep.png`` are in the
      workdir.

    Raises:
      Stopped: If a stop was asked for; points that were scored are kept.
    """
    context, grid, impossible = with_points(context)
    planned, seed = context.plan, context.plan.seed
    baseline, reference = (
        planned.recipes[name] for name in (planned.compare.baseline, planned.compare.reference)
    )
    possible = [planned.recipes[name] for name in grid.entries if name not in impossible]
    trained = train.train_all(context, list(dict.fromkeys([baseline, reference, *possible])))
    failed = {**impossible}
    for model, why in trained.failed.items():
        failed[model.removesuffix(f"-seed{seed}")] = why
    made = [r for r in dict.fromkeys([baseline, *possible]) if r.name not in failed]
    if not made:
        raise FloatingPointError(f"every point of the sweep failed: {failed}")
    inputs = _inputs(context, made, failed)
    how = {"collects": True, "places": _CLAIMS, "redo": True, "made": "scored"}
    with context.open("sweep", _told(planned), inputs, **how) as stage:
        scores = {} if stage.done else _scores(context, stage, made)
        timed = made if reference.name in failed else [*made, reference]
        measured = costs.measure(context, timed, seed, "sweep_cost")
        if not stage.done:
            rows = [
                {"point": recipe.name, **score, "cost": measured[recipe.name]["factor"]}
                for recipe, score in scores.items()
            ]
            stage.finish({"rows": rows, "failed": failed})
    _write(context, stage, _csv_rows(stage.results, grid.values, measured))
    return stage


def _inputs(context: Context, made: Sequence[Recipe], failed: Mapping[str, str]) -> dict[str, str]:
    """What the scores are a function of; recipes may come and go.

    Not the scores themselves: another device may count one image more.
    """
    seed = context.plan.seed
    inputs = {_ATTACK: attack(context).fingerprint}
    inputs[_IMAGES] = context.downstream[1].fingerprint()
    for recipe in made:
        inputs[_RECIPE + recipe.name] = train.train_recipe(context, recipe, seed).fingerprint
    return inputs | {f"{name}, left out": "failed" for name in failed}  # may be made another time


def _told(planned: Plan) -> dict[str, Any]:
    return {"recipe": planned.sweep.recipe, "compare": planned.compare}


def _scores(
    context: Context, stage: StageDirectory, made: Sequence[Recipe]
) -> dict[Recipe, dict[str, float]]:
    """Returns the shares of each point, which are kept as soon as they are there."""
    fitted = {
        f"{one.attack}, seed {one.seed}": one.perturbation
        for one in at_main_budget(context, attack(context))
    }
    inputs, scores = stage.manifest["inputs"], {}
    with context.progress.stage("sweep", len(made)) as bar:
        for done, recipe in enumerate(made):
            file = stage.path / "points" / f"{train.model_name(recipe, context.plan.seed)}.npz"
            # Not the stage's own origin: points may come to it and go.
            made_from = [inputs[name] for name in (_RECIPE + recipe.name, _ATTACK, _IMAGES)]
            origin = digest([context.plan.seed, *made_from])[:16]
            shares = load_arrays(file, origin)
            if shares is None:
                shares = _score(context, recipe, fitted)
                if jax.process_index() == 0:
                    save_arrays(file, shares, origin)
            scores[recipe] = {name: float(share) for name, share in shares.items()}
            bar.update(done + 1)
    return scores


def _score(context: Context, recipe: Recipe, fitted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    batches = data.epoch_batches(context.downstream[1], context.plan.training.batch_size)
    results = evaluation.score(
        train.load_trained(context, recipe, context.plan.seed),
        _until_stopped(batches),
        fitted,
        key=stage_key(context.plan.seed, "sweep"),
        parallel=context.parallel,
    )
    counts = results[evaluation.WORST].counts
    shares = {"clean": counts.clean_accuracy, "robust": counts.robust_accuracy}
    return {name: np.asarray(share) for name, share in shares.items()}


def _until_stopped(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches; a stop waits for one of them, not for a whole point."""
    for batch in batches:
        if stop_requested():
            raise Stopped("sweep stopped, and the points that were scored are kept")
        yield batch


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


def _write(context: Context, stage: StageDirectory, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes page, table and figure, unless they are there."""
    if jax.process_index():
        return
    images, folder = len(context.downstream[1]), context.workdir
    shown = [
        report.Point(r["point"], r["clean"], r["robust"], r["cost"], images=images)
        for r in stage.results["rows"]
        if r["cost"]
    ]
    texts = {
        folder / "sweep.csv": report.csv_text(lines),
        folder / "sweep.md": _page(context, stage.results, shown),
    }
    drawn = all(file.is_file() for file in report.files_of(folder / "figures" / "sweep.png"))
    # Before the pages: where they are there, the figure is of the same numbers.
    if shown and not (drawn and all(readable.holds(*each) for each in texts.items())):
        report.attempt(
            report.figure_pareto,
            folder / "figures",
            shown,
            label_clean="clean accuracy, validation",
            label_robust="accuracy under the universal attacks, validation",
            name="sweep",
        )
    write_pages(stage, texts)


def _page(context: Context, results: Mapping[str, Any], shown: Sequence[report.Point]) -> str:
    settings, page = context.plan.compare, []
    if any(point.name == settings.baseline for point in shown):
        limits = {n: getattr(settings, n) for n in ("max_clean_loss", "max_cost")}
        page.append(words.markdown(report.advice(shown, baseline=settings.baseline, **limits)))
    left_out = [f"{name} is left out: {why}" for name, why in results["failed"].items()]
    page += map(words.markdown, left_out)
    page += [
        f"Accuracies on {len(context.downstream[1])} validation images; robust: the worst case per "
        "image over the universal attacks crafted on the public encoder.  Nobody attacked the "
        "points themselves: choose by this, and believe the comparison.",
        _table(results["rows"]),
    ]
    return "\n\n".join(page) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return report.markdown_table(
        [
            {
                "point": row["point"],
                "clean": f"{row['clean']:.1%}",
                "robust": f"{row['robust']:.1%}",
                "training time": f"{row['cost']:.2f}x" if row["cost"] else "n/a",
            }
            for row in rows
        ]
    )
