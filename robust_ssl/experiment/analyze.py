"""The stage `analyze`: in which layers, at which frequencies and on which models attacks work."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import data, disk, evaluation, report
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.evaluation import analysis
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import at_main_budget, attack
from robust_ssl.experiment.context import Context, identity
from robust_ssl.experiment.linking import entries_of
from robust_ssl.experiment.loop import stage_key
from robust_ssl.experiment.plan import with_recipes
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.experiment.sections import PARTS, Analyze
from robust_ssl.experiment.sources import EncoderSource
from robust_ssl.experiment.suites import Suite
from robust_ssl.report import analysis as figures
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.types import Classifier, Encoder
from robust_ssl.workdir import StageDirectory, write_pages

FILE, PAGE = "analysis.json", "analysis.md"
PUBLIC = "public encoder"
NOISE = "random noise"
PROBE = "probe"  # the recipe of each encoder of the transfer matrix: a linear head


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What every part of the analysis looks at.

    Attributes:
      context: The run.
      models: The trained models by recipe, or the public encoder where there are none.
      perturbations: The public ones at their main budget and first seed, by attack.
      images: Downstream images that no test is made of, with labels.
      encoders: The runs of the transfer matrix, by encoder.
      directory: Where figures go.
    """

    context: Context
    models: Mapping[str, Classifier | Encoder]
    perturbations: Mapping[str, UniversalPerturbation]
    images: Any
    encoders: Mapping[str, Context]
    directory: pathlib.Path

    @property
    def settings(self) -> Analyze:
        """``config.analyze``."""
        return self.context.plan.analyze

    @property
    def key(self) -> jax.Array:
        """The stage's random key."""
        return stage_key(self.context.plan.seed, "analyze")

    def read(self, count: int) -> dict[str, np.ndarray]:
        """Returns the first `count` images and labels."""
        return self.images.read(np.arange(min(count, len(self.images))))


Part = Callable[[_Subject], tuple[dict[str, Any], list[pathlib.Path]]]


def analyze(context: Context) -> StageDirectory:
    """Looks into the models of a run, with the perturbations of its public encoder.

    Everything is measured on validation images of the downstream task: the most harmful band may
    be used by a defense, and must not have seen the test split.  For the transfer matrix each
    encoder gets a perturbation and a linear classifier of its own, under ``encoders/`` in the
    workdir.

    Args:
      context: ``plan.analyze`` says which parts, and how.

    Returns:
      The stage's directory; its results are ``{"most_harmful_band": {model: {"low", "high",
      "harm"}}}``.  Figures, ``analysis.json`` and ``analysis.md`` are under ``analysis/`` in the
      workdir.

    Raises:
      Stopped: If a stop was asked for; finished encoders of the transfer matrix are kept.
    """
    settings, public = context.plan.analyze, attack(context)
    encoders = _encoders(context) if "transfer" in settings.parts else {}
    validation = context.downstream[1]
    subject = _Subject(
        context=context,
        models=_models(context),
        perturbations=_first_seed(context, public),
        images=validation.subset(min(settings.images, len(validation)), context.plan.seed),
        encoders=encoders,
        directory=context.workdir / "analysis",
    )
    inputs = {
        **{name: identity(model) for name, model in subject.models.items()},
        **{f"transfer_{name}": attack(own).fingerprint for name, own in encoders.items()},
        **{f"classifier_{name}": _probe(own)[0].fingerprint for name, own in encoders.items()},
        "attack": public.fingerprint,
        "images": subject.images.fingerprint(),
    }
    with context.open("analyze", settings, inputs, redo=True) as stage:
        if not stage.done:
            numbers, paths = _run_parts(subject)
            written: list[pathlib.Path] = []
            if jax.process_index() == 0:
                file = subject.directory / FILE
                figures.write_numbers(file, _about(subject), numbers)
                # Not all that lies there: others leave files in a folder of pictures.
                written = [file, *(each for path in paths for each in report.files_of(path))]
            bands = {
                model: entry["most_harmful_band"]
                for model, entry in numbers.get("fourier", {}).items()
            }
            stage.finish({"most_harmful_band": bands}, beside=written)
    _write_page(stage, subject.directory)
    return stage


def _write_page(stage: StageDirectory, directory: pathlib.Path) -> None:
    """Writes the page from what the finished stage has left, unless it is there."""
    if jax.process_index() == 0:
        document = disk.read_json(directory / FILE)
        drawn = {pathlib.PurePath(name).name for name in stage.manifest["files"]}
        write_pages(stage, {directory / PAGE: figures.analysis_page(document, drawn)})


def _run_parts(subject: _Subject) -> tuple[dict[str, Any], list[pathlib.Path]]:
    steps: dict[str, Part] = {
        "layers": _layers,
        "energy": _energy,
        "fourier": _fourier,
        "filtering": _filtering,
        "transfer": _transfer,
    }
    numbers, paths = {}, []
    chosen = [part for part in PARTS if part in subject.settings.parts]
    with subject.context.progress.stage("analyze", len(chosen)) as bar:
        for done, part in enumerate(chosen):
            if stop_requested():
                raise Stopped("analyze stopped")
            results, shown = steps[part](subject)
            numbers.update(results)
            paths += shown
            bar.update(done + 1)
    return numbers, paths


def _models(context: Context) -> dict[str, Classifier | Encoder]:
    """The compared recipes' classifiers with the first seed."""
    first = context.plan.training.seeds[0]
    models = {
        recipe.name: train.load_trained(context, recipe, seed)
        for recipe, seed in train.scored(context, train.trained(context))
        if seed == first
    }
    return models or {PUBLIC: context.encoder}


def _first_seed(context: Context, stage: StageDirectory) -> dict[str, UniversalPerturbation]:
    first = context.plan.suite.seeds[0]
    fitted = at_main_budget(context, stage)
    return {one.attack: one.perturbation for one in fitted if one.seed == first}


def _about(subject: _Subject) -> dict[str, Any]:
    return {
        "models": ", ".join(subject.models),
        "images": f"{len(subject.images)} of {subject.images.name}, validation",
        "perturbations": ", ".join(subject.perturbations),
        "crafted on": subject.context.encoder.name,
        "seed": subject.context.plan.seed,
    }


# --- The parts ----------------------------------------------------------------------------------


def _layers(subject: _Subject):
    clean = evaluation.to_pixels(subject.read(len(subject.images))["images"])
    sensitivity = _sensitivity(subject.context)
    stability, paths = {}, []
    for name, perturbation in subject.perturbations.items():
        attacked = evaluation.quantize(perturbation.apply(clean, subject.key))
        stability[name] = {
            model_name: analysis.per_layer_stability(model, clean, attacked)
            for model_name, model in subject.models.items()
        }
        taps = next(iter(stability[name].values()))
        by_tap = analysis.sensitivity_by_tap(sensitivity, taps)
        paths += report.attempt(
            figures.figure_layers, subject.directory, stability[name], by_tap, name=f"layers-{name}"
        )
    return {"layers": stability, "sensitivity": sensitivity}, paths


def _sensitivity(context: Context) -> dict[str, float]:
    """The sensitivity of layers that a recipe has measured; the first one's."""
    seed = context.plan.training.seeds[0]
    for recipe in context.plan.recipes.values():
        if recipe.select is not None:
            return train.layers_of(context, recipe, seed)["scores"]
    return {}


def _energy(subject: _Subject):
    edges = subject.settings.edges
    energy = {
        name: np.asarray(analysis.energy_by_band(perturbation.delta, edges))
        for name, perturbation in subject.perturbations.items()
    }
    paths = report.attempt(figures.figure_energy, subject.directory, energy, edges)
    return {"edges": edges, "energy": energy}, paths


def _fourier(subject: _Subject):
    settings, edges = subject.settings.fourier, subject.settings.edges
    batch = subject.read(settings.images)
    has_labels = PUBLIC not in subject.models
    maps, bands, numbers = {}, {}, {}
    for name, model in subject.models.items():
        maps[name] = analysis.fourier_sensitivity(
            model,
            batch["images"],
            batch["labels"] if has_labels else None,
            key=subject.key,
            norm=settings.norm,
            stride=settings.stride,
            parallel=subject.context.parallel,
            on_chunk=_stop_if_asked,
        )
        bands[name] = analysis.most_harmful_band(maps[name], edges)
        numbers[name] = {
            **dataclasses.asdict(maps[name]),
            "harm_by_band": analysis.harm_by_band(maps[name], edges),
            "most_harmful_band": dataclasses.asdict(bands[name]),
        }
    paths = report.attempt(figures.figure_fourier, subject.directory, maps, bands)
    return {"edges": edges, "fourier": numbers}, paths


def _stop_if_asked(done: int, total: int) -> None:
    if stop_requested():
        raise Stopped(f"analyze stopped after {done} of {total} frequencies")


def _filtering(subject: _Subject):
    settings, numbers, paths = subject.settings.filtering, {}, []
    additive = {m: p for m, p in subject.perturbations.items() if hasattr(p.threat, "norm")}
    for name, model in subject.models.items():
        if name == PUBLIC or not additive:  # features have no accuracy
            continue
        curves = {
            attack_name: analysis.filtering_curves(
                model,
                _batches(subject.context, subject.images),
                perturbation.replace(name="filtered"),  # static: one compilation for all attacks
                settings.cutoffs,
                key=subject.key,
                parallel=subject.context.parallel,
                rescale=settings.rescale,
            )
            for attack_name, perturbation in additive.items()
        }
        numbers[name] = {attack_name: _points(curve) for attack_name, curve in curves.items()}
        file = f"filtering-{name}"
        paths += report.attempt(figures.figure_filtering, subject.directory, curves, name=file)
    return {"filtering": numbers}, paths


def _points(curve: Mapping[str, Mapping[float, Any]]) -> dict[str, list[dict[str, Any]]]:
    points = {}
    for kind, by_cutoff in curve.items():
        points[kind] = [{"cutoff": cutoff, **c.as_dict()} for cutoff, c in by_cutoff.items()]
    return points


def _transfer(subject: _Subject):
    settings = subject.settings.transfer
    if not subject.encoders:
        return {}, []
    crafted, noise = {}, {}
    for name, own in subject.encoders.items():
        perturbations = _first_seed(own, attack(own))
        crafted[name] = perturbations.pop(settings.attack)
        for perturbation in perturbations.values():  # of the first encoder: no other changes it
            noise.setdefault(NOISE, perturbation)
    matrix = analysis.transfer_matrix(
        crafted | noise,
        {name: _probe(own)[1] for name, own in subject.encoders.items()},
        lambda name: _batches(
            subject.encoders[name],
            subject.encoders[name]
            .downstream[1]
            .subset(len(subject.images), subject.context.plan.seed),
        ),
        key=subject.key,
        parallel=subject.context.parallel,
        resize=settings.resize,
    )
    paths = report.attempt(figures.figure_transfer, subject.directory, matrix)
    counts = {}
    for row_name, row in matrix.items():
        counts[row_name] = {column: cell.as_dict() for column, cell in row.items()}
    return {"transfer": counts}, paths


def _batches(context: Context, images):
    return data.epoch_batches(images, context.plan.scoring.batch_size)


# --- The encoders of the transfer matrix --------------------------------------------------------


def _name(path: str) -> str:
    return pathlib.PurePath(path).name


def _encoders(context: Context) -> dict[str, Context]:
    paths = context.plan.analyze.transfer.encoders
    return {_name(path): _run_around(context, path) for path in paths}


def _run_around(context: Context, path: str) -> Context:
    """Returns a run around another encoder: its perturbation, and a linear head on its features.

    Images are read at the encoder's own size.
    """
    planned, settings = context.plan, context.plan.analyze.transfer
    source = EncoderSource(path=path)
    size = context.load_encoder(source).image_size
    sizes = [recipe.batch_size for recipe in planned.recipes.values()]
    at_size = {} if size == context.encoder.image_size else {"image_size": size}
    probe = {
        "head": "linear",
        "rates": {"encoder/**": "freeze", "head/**": settings.head_learning_rate},
        "batch_statistics": "frozen",
        "epochs": settings.head_epochs,
        "batch_size": max(sizes, default=Recipe.batch_size),
    }
    own = dataclasses.replace(
        planned,
        encoder=source,
        surrogate=dataclasses.replace(planned.surrogate, **at_size),
        downstream=dataclasses.replace(planned.downstream, **at_size),
        suite=_suite(planned.suite, settings.attack),
        recipes={},
    )
    own = with_recipes(own, {PROBE: entries_of(probe, {}, "config.analyze.transfer")})
    workdir = context.workdir / "encoders" / _name(path)
    return Context(own, workdir, context.parallel, context.progress)


def _suite(suite: Suite, name: str) -> Suite:
    """The transferred attack and one that looks at no encoder, with one seed, at one budget."""
    noise: Sequence[str] = [n for n, a in suite.attacks.items() if a.is_noise and n != name][:1]
    attacks = {n: suite.attacks[n] for n in (name, *noise)}
    attacks = {
        n: dataclasses.replace(a, budgets=a.budgets[:1], text=_without_curve(a.text))
        for n, a in attacks.items()
    }
    return dataclasses.replace(suite, attacks=attacks, curve=(), seeds=suite.seeds[:1])


def _without_curve(text: Any) -> Any:
    if not isinstance(text, Mapping):
        return text
    return {name: value for name, value in text.items() if name != "curve"}


def _probe(context: Context) -> tuple[StageDirectory, Classifier]:
    recipe, seed = context.plan.recipes[PROBE], context.plan.training.seeds[0]
    stage = train.train_recipe(context, recipe, seed)
    return stage, train.load_trained(context, recipe, seed)
