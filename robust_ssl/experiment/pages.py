"""What a run leaves to read: ``results.json``, ``report.md`` with its tables and figures."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import disk, evaluation, report
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import Fitted, at_main_budget, attack
from robust_ssl.experiment.compare import outcomes_of, over_seeds
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.loop import stage_key
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.experiment.score import origin_of, read_outcomes, saved_classifiers, score
from robust_ssl.parallel import everywhere
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.types import Classifier
from robust_ssl.workdir import (
    StageDirectory,
    changed_files,
    fingerprint,
    load_arrays,
    readable,
    save_arrays,
    sum_files,
)

_log = logging.getLogger(__name__)

IMAGES = 256  # test images by which the outputs of layers are compared
PICTURES = 8
WRITTEN = readable.RECORD

_predictions = jax.jit(evaluation.predictions)


Pairs = Sequence[tuple[Recipe, int]]


def write(
    context: Context, comparison: StageDirectory | None = None
) -> dict[str, dict[str, np.ndarray]] | None:
    """Writes ``results.json``, ``report.md``, its tables and figures, unless they are there.

    Args:
      context: The run, in which `score` is done.
      comparison: What `compare` left; None writes the page without it.

    Returns:
      In what part of the seeds each test image was right, by recipe and share; None without a
      comparison.
    """
    page, file = context.workdir / "report.md", context.workdir / "results.json"
    scored, pairs = score(context), train.scored(context, train.trained(context))
    right = None
    if comparison is not None:
        right = over_seeds(outcomes_of(context, scored, pairs))
    document = _document(context, scored, comparison, pairs)
    # First of all: what somebody wrote into a page is kept when there are other results, too.
    if everywhere(_as_written(context.workdir) and page.exists() and _same(file, document)):
        return right
    if jax.process_index() == 0:
        # Before the page and its figures: whatever becomes of them, the numbers are there.
        report.results.write(file, **document)
    # What opens stages comes first: all processes have to, and only one writes the page.
    models = models_of(context, pairs)
    public = at_main_budget(context, attack(context))
    looks = {n: look(context, scored, n, model, public) for n, model in models.items()}
    layers = _layers(context, pairs)
    if jax.process_index():
        return right
    written = report.results.read(file)
    figures = _figures(context, written, looks, layers)
    shown = _shown(context, written)
    curves = {name: _curve(written["results"], name) for name in shown}
    if max(map(len, curves.values())) <= 2:
        curves = {}  # a line between two points says nothing more
    paths = report.write_report(
        context.workdir, written, curves=curves, outcomes=right, figures=figures
    )
    readable.write_record(context.workdir / WRITTEN, sum_files(context.workdir, [file, *paths]))
    return right


def _as_written(workdir: pathlib.Path) -> bool:
    """Whether pages, tables and figures are there as they were written; says which are not.

    What somebody has edited since is kept under another name.
    """
    if jax.process_index():
        return True  # the first process looks
    sums = readable.read_record(workdir / WRITTEN)
    changed = changed_files(workdir, sums)
    for name, why in changed.items():
        kept = disk.keep_edited(workdir / name)
        again = f"the report is written again{kept and f'; {kept}'}"
        _log.warning("%s: %s %s; %s", workdir, name, why, again)
    return bool(sums) and not changed


def _same(file: pathlib.Path, document: Mapping[str, Any]) -> bool:
    try:
        written = report.results.read(file)
    except (OSError, ValueError):  # of before, or damaged: it is made again from the stages
        return False
    new = report.results.document(**document)
    return all(written[part] == new[part] for part in ("results", "verdicts", "comparison"))


def models_of(context: Context, pairs: Pairs) -> dict[str, Classifier]:
    """Returns every scored classifier by name: those that were trained, those from elsewhere."""
    trained = {train.model_name(r, s): train.load_trained(context, r, s) for r, s in pairs}
    return {**trained, **saved_classifiers(context)}


def _document(
    context: Context, scored: StageDirectory, comparison: StageDirectory | None, pairs: Pairs
) -> dict[str, Any]:
    train_set, validation = context.downstream
    manifest, suite = attack(context).manifest, context.plan.suite
    models = {train.model_name(r, s): {"recipe": r.name, "seed": s} for r, s in pairs}
    models |= {name: {"recipe": None, "seed": None} for name in context.plan.classifiers}
    encoder = context.encoder
    run = {
        "encoder": {"name": encoder.name, "fingerprint": fingerprint(encoder.variables)},
        "downstream": {
            "name": train_set.name,
            "train": len(train_set),
            "validation": len(validation),
            "test": len(context.test),
            "classes": context.num_classes,
            "largest_class": _largest_class(context),
            "test_among_train": scored.results.get("test_among_train"),
            "test_distinct": scored.results.get("test_distinct"),
            "notes": [
                f"{part.split}: {n}" for part in (train_set, context.test) for n in part.notes
            ],
        },
        "surrogate": {"name": context.surrogate.name, "images": len(context.surrogate)},
        "suite": {
            "epsilon": suite.epsilon,
            "attacks": list(suite.attacks),
            "seeds": list(suite.seeds),
        },
        "seeds": list(context.plan.training.seeds),
        "balanced_accuracy": _balanced(context, scored, models),
        "devices": manifest["devices"],
        "versions": manifest["versions"],
        "config": context.plan.text,
    }
    if skipped := _skipped(context):
        run["skipped_updates"] = skipped
    return {
        "run": run,
        "models": models,
        "results": scored.results["results"],
        "verdicts": scored.results["verdicts"],
        "comparison": None if comparison is None else comparison.results,
    }


def _balanced(context: Context, scored: StageDirectory, models: Iterable[str]) -> dict[str, float]:
    """Clean accuracy as the mean over classes, of the models scored on the whole test split."""
    right, labels = read_outcomes(scored), context.test_labels
    known = [name for name in models if f"{name}, clean" in right]
    return {n: evaluation.balanced_accuracy(right[f"{n}, clean"], labels) for n in known}


def _largest_class(context: Context) -> dict[str, Any]:
    """The class that most test images are of: what one answer for all is right about."""
    counts = np.bincount(context.test_labels)
    largest = int(np.argmax(counts))
    return {"name": context.test.class_names[largest], "images": int(counts[largest])}


def _skipped(context: Context) -> dict[str, str]:
    """How many updates of each model's training were not finite, where some were."""
    results = train.trained(context).results
    return {
        model: f"{one['skipped']} of {one['steps']}"
        for model, one in results.items()
        if one.get("skipped")
    }


# --- Figures ------------------------------------------------------------------------------------


def _figures(
    context: Context,
    document: Mapping[str, Any],
    looks: Mapping[str, Mapping[str, np.ndarray]],
    layers: Mapping[str, Mapping[str, Any]],
) -> list[pathlib.Path]:
    folder, shown = context.workdir / "figures", _shown(context, document)
    verdicts = {shown[n]: v for n, v in document["verdicts"].items() if n in shown}
    judged = report.figures.verdict_words(shown.values(), verdicts)
    model = next(iter(shown))
    first, verdict = looks[model], judged[shown[model]]
    answers = [tuple(pair) for pair in first["answers"].tolist()]
    examples = (first["clean"], first["attacked"])
    paths = report.attempt(
        report.figure_examples, folder, *examples, predictions=answers, verdict=verdict
    )
    drifts = {label: drift(looks[name]) for name, label in shown.items()}
    paths += report.attempt(report.figure_stability, folder, drifts, verdicts=verdicts)
    for recipe, results in layers.items():
        chosen, name = (results["scores"], results["selected"]), f"sensitivity-{recipe}"
        paths += report.attempt(report.figure_sensitivity, folder, *chosen, name=name)
    return paths


def _layers(context: Context, pairs: Pairs) -> dict[str, Mapping[str, Any]]:
    """What each recipe that chooses its layers chose with the first seed."""
    return {
        recipe.name: train.layers_of(context, recipe, seed)
        for recipe, seed in pairs
        if recipe.select is not None and seed == context.plan.training.seeds[0]
    }


def _shown(context: Context, document: Mapping[str, Any]) -> dict[str, str]:
    """The models of the figures, of recipes the first seed, with what they are called there."""
    first, names = context.plan.training.seeds[0], report.names(document["models"])
    chosen = {n: names[n] for n, m in document["models"].items() if m["seed"] in (None, first)}
    return chosen or names


def _curve(
    results: Sequence[Mapping[str, Any]], model: str
) -> list[tuple[float, float, float, float]]:
    """Accuracy by budget: the worst case over the public encoder's perturbations under Linf."""
    points = {}
    for entry in results:
        group = (entry["model"], entry["family"], entry["crafted_against"], entry["threat"])
        if group != (model, "universal", "public", "Linf"):
            continue
        clean = entry["clean_accuracy"], *entry["ci95"]["clean_accuracy"]
        points.setdefault(0.0, (0.0, *clean))
        robust = entry["robust_accuracy"], *entry["ci95"]["robust_accuracy"]
        # The worst case comes last in its group; where there is one attack it is that one's.
        points[entry["epsilon"]] = (entry["epsilon"], *robust)
    return [points[epsilon] for epsilon in sorted(points)]


def look(
    context: Context,
    scored: StageDirectory,
    name: str,
    model: Classifier,
    public: Sequence[Fitted],
) -> dict[str, np.ndarray]:
    """Returns what the strongest public perturbation does to some images; kept once made.

    Returns:
      ``clean`` and ``attacked`` images, the model's ``answers`` to both, and by how much the
      output of each layer moves: ``taps``, ``measures`` and ``drift`` ``[taps, measures]``.

    Raises:
      Stopped: If a stop was asked for, and this is not there yet.
    """
    file = scored.path / "groups" / f"{name}-look.npz"
    origin = origin_of(scored, scored.manifest["inputs"], name, [IMAGES, PICTURES], kinds=())
    arrays = load_arrays(file, origin)
    if arrays is not None:
        return arrays
    if stop_requested():
        raise Stopped("stopped before the report, and what was scored is kept")
    perturbation = _strongest(scored, name, public)
    count = min(IMAGES, len(context.test))
    clean = evaluation.to_pixels(context.test.read(np.arange(count))["images"])
    key = stage_key(context.plan.seed, "score")
    attacked = evaluation.quantize(perturbation.apply(clean, key))
    stability = evaluation.per_layer_stability(model.encoder, clean, attacked)
    names = context.test.class_names
    spread = np.linspace(0, count - 1, PICTURES).astype(int)
    answers = []
    for images in (clean[spread], attacked[spread]):
        labels = np.asarray(_predictions(model, images))
        # A function of a user may name fewer classes than its labels have.
        answers.append([names[n] if names and n < len(names) else str(n) for n in labels])
    measures = list(next(iter(stability.values())))
    arrays = {
        "clean": np.asarray(clean[spread]),
        "attacked": np.asarray(attacked[spread]),
        "answers": np.asarray(answers).T,
        "taps": np.asarray(list(stability)),
        "measures": np.asarray(measures),
        "drift": np.asarray([[tap[m] for m in measures] for tap in stability.values()]),
    }
    if jax.process_index() == 0:
        save_arrays(file, arrays, origin)
    return arrays


def drift(look: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns by how much the output of each layer moves, by tap and measure."""
    rows = zip(look["taps"].tolist(), look["drift"].tolist(), strict=True)
    return {tap: dict(zip(look["measures"].tolist(), row, strict=True)) for tap, row in rows}


def _strongest(scored: StageDirectory, model: str, public: Sequence[Fitted]):
    """Returns the public perturbation that costs a model the most accuracy."""
    group, robust = (model, "universal", "public"), {}
    for entry in scored.results["results"]:
        if (entry["model"], entry["family"], entry["crafted_against"]) == group:
            robust[entry["attack"], entry["seed"], entry["epsilon"]] = entry["robust_accuracy"]
    return min(public, key=lambda f: robust[f.attack, f.seed, float(f.epsilon)]).perturbation
