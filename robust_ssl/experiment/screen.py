"""The stage `screen`: detectors on one classifier, tried by attacks, and a function to serve."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import report, screening, weights
from robust_ssl.build import inside
from robust_ssl.evaluation import to_pixels
from robust_ssl.experiment import saving, train
from robust_ssl.experiment.attack import Fitted, attack, load_perturbations
from robust_ssl.experiment.context import Context, identity
from robust_ssl.experiment.groups import threat_name
from robust_ssl.experiment.jobs import build_per_image
from robust_ssl.experiment.loop import stage_key
from robust_ssl.experiment.score import saved_classifiers
from robust_ssl.screening import Adaptive, Bench, Case, Images, Known, Screen
from robust_ssl.screening.bench import Arrays
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.types import Classifier
from robust_ssl.workdir import (
    ConfigChangedError,
    StageDirectory,
    digest,
    json_ready,
    load_arrays,
    read_manifest,
    save_arrays,
    write_atomically,
    write_pages,
)

_log = logging.getLogger(__name__)

SCHEMA = 1
FILE, PAGE = "screening.json", "screening.md"


def check(context: Context) -> None:
    """Fits every detector to made-up images, so that one which does not suit is refused.

    Raises:
      ValueError: With the detector's entry in the config.
    """
    settings = context.plan.screening
    context.check_unchanged("screen", _told(context))
    context.parallel.check_batch(settings.batch_size)
    name, _ = _names(context)
    last = _last_screened(context)
    if last not in (None, name):
        raise ConfigChangedError(
            f"{context.workdir / 'screen'} holds the screening of {last!r}, and {name!r} is to be "
            f"screened; set screening.model={last}, or take another --workdir; nothing was changed"
        )
    recipe = context.plan.recipes.get(name)
    model = saved_classifiers(context)[name] if recipe is None else train.untrained(context, recipe)
    images = jax.random.uniform(jax.random.key(0), (4, *context.test.image_shape))
    known = Known(jnp.full((1, *images.shape[1:]), 0.1), ("made_up",), model)
    for detector_name, fit in settings.detectors.items():
        with inside(f"config.screening.detectors.{detector_name}"):
            detector = fit(jax.random.key(0), model, images, known)
            if not callable(getattr(detector, "score", None)):
                raise ValueError(f"it must return a detector, got {type(detector).__name__}")
            score = functools.partial(_score, jax.random.key(0))
            shape = jax.eval_shape(score, detector, model, images[0])
            if getattr(shape, "shape", None) != ():
                raise ValueError(f"its score must be a scalar, got {shape}")


def _score(key: jax.Array, detector: Any, model: Classifier, image: jax.Array) -> jax.Array:
    return detector.score(key, model, image)


def _told(context: Context) -> dict[str, Any]:
    return {"screening": context.plan.screening, "per_image": context.plan.scoring.per_image}


def screen(context: Context) -> StageDirectory:
    """Fits the detectors of ``config.screening``, tries them, and leaves a screen to serve.

    Detectors are fitted on training images, calibrated on validation images, and tried on test
    images: under the run's attacks, which do not know them, on the attacker's clean images, and
    under attacks that know them.  Every part is kept as soon as it is done, so an interrupted stage
    goes on where it was.

    Returns:
      The stage's directory, with ``classifier/`` for `robust_ssl.load_screen`; its results are
      ``screening.json`` in the workdir, and ``screening.md`` for readers.
    """
    names = _names(context)  # now: the stage's directory says less while it is worked in
    model, public = (_model(context, name) for name in names)
    inputs = {
        "classifier": identity(model),
        **({} if public is None else {"public": identity(public)}),
        "attack": attack(context).fingerprint,
        "test": context.test.fingerprint(),
        "surrogate": context.surrogate.fingerprint(),
        "train": context.downstream[0].fingerprint(),
    }
    with context.open("screen", _told(context), inputs, redo=True, made="screened") as stage:
        if not stage.done:
            _try_detectors(context, stage, names, model, public)
    write_pages(stage, {context.workdir / PAGE: report.screening_page(stage.results)})
    return stage


def _try_detectors(
    context: Context,
    stage: StageDirectory,
    names: tuple[str, str | None],
    model: Classifier,
    public: Classifier | None,
) -> None:
    """Does the stage's work and finishes it."""
    bench = Bench(
        *(model, _images(context), stage_key(context.plan.seed, "screen"), context.parallel),
        batch_size=context.plan.screening.batch_size,
    )
    perturbations = load_perturbations(context, attack(context))
    detectors, absent = _fit(context, bench, perturbations, public)
    cases = _cases(context, perturbations)
    parts = screening.parts_of(len(detectors), len(cases), _adaptive(context))
    with context.progress.stage("screen", parts) as bar:
        keeping = dataclasses.replace(bench, keep=_Keeper(stage, bar))
        evaluation = screening.evaluate(detectors, keeping, cases, _adaptive(context))
    results = {
        **{"schema": SCHEMA, "model": names[0], "public": names[1]},
        "images": _counts(context, bench),
        "detectors": evaluation.entries,
        "absent": absent,
    }
    beside = []
    if jax.process_index() == 0:
        served = Screen(model, evaluation.fused, evaluation.threshold, bench.detector_key)
        _save(context, stage, names[0], served)
        text = json.dumps(json_ready(results), indent=1, allow_nan=False) + "\n"
        beside = [context.workdir / FILE]
        write_atomically(beside[0], text)
    stage.finish(results, _identity(results), beside)


# --- What is screened, and by what --------------------------------------------------------------


def _names(context: Context) -> tuple[str, str | None]:
    """Names of the screened classifier and of the second one, without seeds."""
    planned, settings = context.plan, context.plan.screening
    names = [recipe.name for recipe in planned.scored] + list(planned.classifiers)
    if not names:
        raise ValueError("config.screening: no recipe is scored, so there is nothing to screen")
    audited = planned.audit.secured if "audit" in planned.stages else None
    # A recipe that comes after the stage is finished is not meant.
    usual = [each for each in (audited, _last_screened(context)) if each in names]
    name = settings.model or [*usual, names[-1]][0]
    public = settings.public
    if public is None and planned.compare.baseline in planned.recipes:
        public = planned.compare.baseline
    return name, None if public == name else public


def finished(context: Context) -> Mapping[str, Any] | None:
    """Returns the results of the stage; None where it was not run to its end."""
    folder = context.workdir / "screen"
    if not (folder / "manifest.json").is_file():
        return None
    manifest = read_manifest(folder)
    return manifest["results"] if manifest["status"] == "done" else None


def _last_screened(context: Context) -> str | None:
    return (finished(context) or {}).get("model")


def _model(context: Context, name: str | None) -> Classifier | None:
    """Returns a recipe's classifier with the first seed, or one from elsewhere."""
    if name is None:
        return None
    recipe = context.plan.recipes.get(name)
    if recipe is None:
        return saved_classifiers(context)[name]
    return train.load_trained(context, recipe, context.plan.training.seeds[0])


def _images(context: Context) -> Images:
    settings, seed = context.plan.screening, context.plan.seed

    def some(examples, count: int) -> dict[str, np.ndarray]:
        chosen = examples.subset(min(count, len(examples)), seed)
        return chosen.read(np.arange(len(chosen)))

    clean = some(context.test, settings.test)
    return Images(
        fit=some(context.downstream[0], settings.images)["images"],
        calibration=some(context.downstream[1], settings.calibration)["images"],
        clean=clean["images"],
        labels=clean["labels"].astype(np.int32),
        # The attacker's: of another set, and nobody has attacked them.
        shifted=some(context.surrogate, settings.test)["images"],
    )


def _fit(
    context: Context, bench: Bench, perturbations: list[Fitted], public: Classifier | None
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns the detectors by name, and why others are not there."""
    images = to_pixels(bench.images.fit)
    by_attack: dict[str, list[Any]] = {}
    for one in perturbations:
        by_attack.setdefault(one.attack, []).append(one.perturbation)
    known = Known.of(by_attack, images, public)
    detectors, absent = {}, []
    for name, fit in context.plan.screening.detectors.items():
        if public is None and fit.function is screening.fit_disagreement:
            reason = "there is no second classifier: name one in config.screening.public"
            absent.append({"detector": name, "reason": reason})
            _log.warning("screen: the detector %s is left out: %s", name, reason)
            continue
        with inside(f"config.screening.detectors.{name}"):
            detectors[name] = fit(bench.detector_key, bench.model, images, known)
    return detectors, absent


def _cases(context: Context, perturbations: list[Fitted]) -> list[Case]:
    """The run's attacks: perturbations of the public encoder, and attacks on single images."""
    cases = []
    for one in perturbations:
        threat = one.perturbation.threat
        facts = _facts("universal", one.seed, threat, one.epsilon)
        cases.append(Case(one.attack, one.perturbation, facts))
    for budget in context.plan.scoring.per_image.scored:
        for name, value in build_per_image(context, budget).items():
            facts = _facts("per_image", None, budget.threat, budget.epsilon)
            cases.append(Case(name, value, facts))
    return cases


def _facts(family: str, seed: int | None, threat: Any, epsilon: float) -> dict[str, Any]:
    against = "public" if family == "universal" else "hardened"
    facts = {"seed": seed, "family": family, "crafted_against": against}
    return {**facts, "threat": threat_name(threat), "epsilon": epsilon}


def _adaptive(context: Context) -> Adaptive | None:
    planned, settings = context.plan, context.plan.screening.adaptive
    if settings is None:
        return None
    options = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    if settings.epsilon is None:
        options["epsilon"] = planned.suite.epsilon
    return Adaptive(**options)


def _identity(results: dict[str, Any]) -> str:
    """Identifies figures whatever the machine: milliseconds are no result."""
    entries = [{**entry, "milliseconds": None} for entry in results["detectors"]]
    return digest(json_ready({**results, "detectors": entries}))[:16]


def _counts(context: Context, bench: Bench) -> dict[str, Any]:
    images, settings = bench.images, context.plan.screening.adaptive
    adaptive = 0 if settings is None else min(settings.images, len(images.clean))
    return {
        "fit": len(images.fit),
        "calibration": len(images.calibration),
        "test": len(images.clean),
        "adaptive": adaptive,
        "shifted": {"name": context.surrogate.name, "n": len(images.shifted)},
    }


# --- What is kept -------------------------------------------------------------------------------


class _Keeper:
    """Keeps the parts of an evaluation in the stage's directory; calling it is `Bench.keep`."""

    def __init__(self, stage: StageDirectory, bar: Any):
        self._stage, self._bar = stage, bar
        self._done: set[str] = set()

    def __call__(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        file = self._stage.path / "parts" / f"{name}.npz"
        self._bar.update(len(self._done), doing=name)
        arrays = load_arrays(file, self._stage.origin)
        if arrays is None:
            if stop_requested():
                raise Stopped("screen stopped")
            arrays = dict(compute())
            if jax.process_index() == 0:
                save_arrays(file, arrays, self._stage.origin)
        self._done.add(name)
        self._bar.update(len(self._done))
        return arrays


def _save(context: Context, stage: StageDirectory, name: str, served: Screen) -> None:
    """Leaves the classifier with its screen; one whose parts no card can name is left out."""
    recipe = context.plan.recipes.get(name)
    builder, options = saving.builder_of(context, recipe) if recipe is not None else (None, None)
    card = {"false_alarms": screening.JUDGED, "detectors": sorted(served.fused.members)}
    try:
        weights.save_screen(
            served, stage.path / "classifier", card, builder=builder, options=options
        )
    except (ValueError, TypeError) as error:
        _log.warning("screen: nothing to serve is left, the figures are: %s", error)
