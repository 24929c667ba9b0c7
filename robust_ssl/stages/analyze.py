"""The `analyze` stage: in which layers, at which frequencies and on which models attacks work."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import data, evaluation
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.evaluation import analysis
from robust_ssl.evaluation.analysis.spectra import check_edges
from robust_ssl.evaluation.analysis.transfer import RESIZING
from robust_ssl.progress import Stopped, stop_requested
from robust_ssl.report import analysis as drawn
from robust_ssl.stages import finetune
from robust_ssl.stages.attack import attack, budgets, build_attacks, is_noise, load_perturbations
from robust_ssl.stages.evaluate import MODELS
from robust_ssl.stages.run import Run, load_or_import
from robust_ssl.stages.training import stage_key
from robust_ssl.trees import fingerprint
from robust_ssl.types import Classifier, Encoder

PARTS = ("layers", "energy", "fourier", "filtering", "transfer")
PUBLIC = "public encoder"
NOISE = "random noise"


@dataclasses.dataclass(frozen=True)
class _Looked:
    """What every part of the analysis looks at.

    Attributes:
      run: The run; its `config` says how.
      models: The fine-tuned models, or the public encoder where there are none.
      perturbations: The public ones at their main budget and first seed, by method.
      images: Downstream images that no test is made of, with labels.
      encoders: The runs of the transfer matrix, by encoder.
      directory: Where figures go.
    """

    run: Run
    models: Mapping[str, Classifier | Encoder]
    perturbations: Mapping[str, UniversalPerturbation]
    images: Any
    encoders: Mapping[str, Run]
    directory: pathlib.Path

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.analyze``."""
        return self.run.config["analyze"]

    @property
    def key(self) -> jax.Array:
        """The stage's random key."""
        return stage_key(self.run.seed, "analyze")

    def read(self, count: int) -> dict[str, np.ndarray]:
        """Returns the first `count` images and labels."""
        return self.images.read(np.arange(min(count, len(self.images))))


Part = Callable[[_Looked], tuple[dict[str, Any], list[pathlib.Path]]]


def check_analyze(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the stage can do what ``config.analyze`` asks for.

    Args:
      config: The whole configuration.
    """
    asked = config["analyze"]
    unknown = [part for part in asked["parts"] if part not in PARTS]
    if unknown or not asked["parts"]:
        raise ValueError(f"analyze.parts: {unknown or 'empty'}; there are {', '.join(PARTS)}")
    if asked["images"] < 1:
        raise ValueError(f"analyze.images must be at least 1, got {asked['images']}")
    check_edges(asked["edges"])
    if "transfer" in asked["parts"]:
        _check_transfer(config)


def _check_transfer(config: Mapping[str, Any]) -> None:
    transfer, methods = config["analyze"]["transfer"], config["attack"]["methods"]
    if transfer["method"] not in methods:
        raise ValueError(
            f"analyze.transfer.method {transfer['method']!r} is none of config.attack.methods: "
            f"{', '.join(methods)}"
        )
    if transfer["resize"] not in RESIZING:
        raise ValueError(f"analyze.transfer.resize must be one of {RESIZING}")
    names = [_name(path) for path in transfer["encoders"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or NOISE in names:
        raise ValueError(f"analyze.transfer.encoders: the names must differ, got {names}")


def analyze(run: Run) -> StageDirectory:
    """Looks into the models of a run, with the perturbations of its public encoder.

    Everything is measured on validation images of the downstream task: the most harmful band may
    be used by a defence, and must not have seen the test split.  For the transfer matrix each
    encoder gets a perturbation and a linear classifier of its own, under ``encoders/`` in the
    workdir.

    Args:
      run: ``config.analyze`` says which `PARTS`, and how.

    Returns:
      The stage's directory; its results are ``{"most_harmful_band": {model: {"low", "high",
      "harm"}}}``.  Figures, ``analysis.json`` and ``analysis.md`` are under ``analysis/`` in the
      workdir.

    Raises:
      ValueError: If the config asks for what there is not; see `check_analyze`.
      Stopped: If a stop was asked for; finished encoders of the transfer matrix are kept.
    """
    check_analyze(run.config)
    config, public = run.config["analyze"], attack(run)
    encoders = _encoders(run) if "transfer" in config["parts"] else {}
    validation = run.downstream[1]
    looked = _Looked(
        run=run,
        models=_models(run),
        perturbations=_at_main_budget(run, public),
        images=validation.subset(min(config["images"], len(validation)), run.seed),
        encoders=encoders,
        directory=run.workdir / "analysis",
    )
    inputs = {
        **{name: fingerprint(model.variables) for name, model in looked.models.items()},
        **{f"transfer_{name}": attack(own).fingerprint for name, own in encoders.items()},
        **{f"classifier_{name}": finetune.usual(own).fingerprint for name, own in encoders.items()},
        "attack": public.fingerprint,
        "images": looked.images.fingerprint(),
    }
    with run.open("analyze", config, inputs) as stage:
        if stage.done:
            return stage
        numbers, figures = _look(looked)
        if jax.process_index() == 0:
            drawn.write_analysis(looked.directory, _about(looked), numbers, figures)
        found = numbers.get("fourier", {})
        bands = {model: entry["most_harmful_band"] for model, entry in found.items()}
        stage.finish(None, {"most_harmful_band": bands})
    return stage


def _look(looked: _Looked) -> tuple[dict[str, Any], list[pathlib.Path]]:
    steps: dict[str, Part] = {
        "layers": _layers,
        "energy": _energy,
        "fourier": _fourier,
        "filtering": _filtering,
        "transfer": _transfer,
    }
    numbers, figures = {}, []
    chosen = [part for part in PARTS if part in looked.config["parts"]]
    with looked.run.progress.stage("analyze", len(chosen)) as bar:
        for done, part in enumerate(chosen):
            if stop_requested():
                raise Stopped("analyze stopped")
            found, shown = steps[part](looked)
            numbers.update(found)
            figures += shown
            bar.update(done + 1)
    return numbers, figures


def _models(run: Run) -> dict[str, Classifier | Encoder]:
    names = [name for name in MODELS if name in run.config["stages"]]
    return {name: finetune.load_classifier(run, name) for name in names} or {PUBLIC: run.encoder}


def _at_main_budget(run: Run, stage: StageDirectory) -> dict[str, UniversalPerturbation]:
    config = run.config["attack"]
    found = load_perturbations(stage, config, curve=True)
    return {
        method: found[method, config["seeds"][0], budgets(config, curve=False, method=method)[0]]
        for method in config["methods"]
    }


def _about(looked: _Looked) -> dict[str, Any]:
    return {
        "models": ", ".join(looked.models),
        "images": f"{len(looked.images)} of {looked.images.name}, validation",
        "perturbations": ", ".join(looked.perturbations),
        "crafted on": looked.run.encoder.name,
        "seed": looked.run.seed,
    }


# --- The parts ----------------------------------------------------------------------------------


def _layers(looked: _Looked):
    clean = evaluation.to_pixels(looked.read(len(looked.images))["images"])
    sensitivity = {}
    if "sensitivity" in looked.run.config["stages"]:
        sensitivity = finetune.sensitivity(looked.run).results["scores"]
    found, figures = {}, []
    for method, perturbation in looked.perturbations.items():
        attacked = evaluation.quantize(perturbation.apply(clean, looked.key))
        found[method] = {
            name: analysis.per_layer_stability(model, clean, attacked)
            for name, model in looked.models.items()
        }
        by_tap = analysis.sensitivity_by_tap(sensitivity, next(iter(found[method].values())))
        figures.append(
            drawn.figure_layers(looked.directory, found[method], by_tap, name=f"layers-{method}")
        )
    return {"layers": found, "sensitivity": sensitivity}, figures


def _energy(looked: _Looked):
    edges = looked.config["edges"]
    found = {
        method: np.asarray(analysis.energy_by_band(perturbation.delta, edges))
        for method, perturbation in looked.perturbations.items()
    }
    figure = drawn.figure_energy(looked.directory, found, edges)
    return {"edges": edges, "energy": found}, [figure]


def _fourier(looked: _Looked):
    options, edges = looked.config["fourier"], looked.config["edges"]
    batch = looked.read(options["images"])
    has_labels = PUBLIC not in looked.models
    maps, bands, numbers = {}, {}, {}
    for name, model in looked.models.items():
        maps[name] = analysis.fourier_sensitivity(
            model,
            batch["images"],
            batch["labels"] if has_labels else None,
            key=looked.key,
            norm=options["norm"],
            stride=options["stride"],
            parallel=looked.run.parallel,
            on_chunk=_stop_if_asked,
        )
        bands[name] = analysis.most_harmful_band(maps[name], edges)
        numbers[name] = {
            **dataclasses.asdict(maps[name]),
            "harm_by_band": analysis.harm_by_band(maps[name], edges),
            "most_harmful_band": dataclasses.asdict(bands[name]),
        }
    figure = drawn.figure_fourier(looked.directory, maps, bands)
    return {"edges": edges, "fourier": numbers}, [figure]


def _stop_if_asked(done: int, total: int) -> None:
    if stop_requested():
        raise Stopped(f"analyze stopped after {done} of {total} frequencies")


def _filtering(looked: _Looked):
    options, found, figures = looked.config["filtering"], {}, []
    additive = {m: p for m, p in looked.perturbations.items() if hasattr(p.threat, "norm")}
    for name, model in looked.models.items():
        if name == PUBLIC or not additive:  # features have no accuracy
            continue
        curves = {
            method: analysis.filtering_curves(
                model,
                _batches(looked.run, looked.images),
                perturbation.replace(name="filtered"),  # static: one compilation for all methods
                options["cutoffs"],
                key=looked.key,
                parallel=looked.run.parallel,
                rescale=options["rescale"],
            )
            for method, perturbation in additive.items()
        }
        found[name] = {
            method: {
                kind: [{"cutoff": cutoff, **c.as_dict()} for cutoff, c in points.items()]
                for kind, points in curve.items()
            }
            for method, curve in curves.items()
        }
        file = f"filtering-{name}"
        figures.append(drawn.figure_filtering(looked.directory, curves, name=file))
    return {"filtering": found}, figures


def _transfer(looked: _Looked):
    options = looked.config["transfer"]
    if not looked.encoders:
        return {}, []
    crafted, noise = {}, {}
    for name, own in looked.encoders.items():
        found = _at_main_budget(own, attack(own))
        crafted[name] = found.pop(options["method"])
        for perturbation in found.values():  # of the first encoder: no other one changes it
            noise.setdefault(NOISE, perturbation)
    matrix = analysis.transfer_matrix(
        crafted | noise,
        {name: finetune.load_classifier(own, "usual") for name, own in looked.encoders.items()},
        lambda name: _batches(
            looked.encoders[name],
            looked.encoders[name].downstream[1].subset(len(looked.images), looked.run.seed),
        ),
        key=looked.key,
        parallel=looked.run.parallel,
        resize=options["resize"],
    )
    figure = drawn.figure_transfer(looked.directory, matrix)
    counted = {i: {j: counts.as_dict() for j, counts in row.items()} for i, row in matrix.items()}
    return {"transfer": counted}, [figure]


def _batches(run: Run, images):
    return data.epoch_batches(images, run.config["evaluate"]["batch_size"])


# --- The encoders of the transfer matrix --------------------------------------------------------


def _name(path: str) -> str:
    return pathlib.PurePath(path).name


def _encoders(run: Run) -> dict[str, Run]:
    return {
        _name(path): _own_run(run, path) for path in run.config["analyze"]["transfer"]["encoders"]
    }


def _own_run(run: Run, path: str) -> Run:
    """Returns a run around another encoder: its perturbation, and a linear head on its features.

    Images are read at the encoder's own size.
    """
    options, size = run.config["analyze"]["transfer"], load_or_import(path, {}).image_size
    methods = run.config["attack"]["methods"]
    kept = [options["method"], *_noise(methods, options["method"])]
    at_size = {} if size == run.encoder.image_size else {"image_size": size}
    config = {
        **run.config,
        "encoder": {"path": path},
        "surrogate": {**run.config["surrogate"], **at_size},
        "downstream": {**run.config["downstream"], **at_size},
        "downstream_head": "linear",
        "attack": {
            **run.config["attack"],
            "methods": {method: _without_curve(methods[method]) for method in kept},
            "curve": (),
            "seeds": run.config["attack"]["seeds"][:1],
        },
        "usual": {
            **run.config["usual"],
            "rates": {"encoder/**": "freeze", "head/**": options["head_learning_rate"]},
            "batch_statistics": "frozen",
            "epochs": options["head_epochs"],
        },
    }
    return dataclasses.replace(run, config=config, workdir=run.workdir / "encoders" / _name(path))


def _noise(methods: Mapping[str, Any], method: str) -> Sequence[str]:
    """The first method, besides the one transferred, that looks at no encoder."""
    built = build_attacks(methods)
    return [name for name in methods if name != method and is_noise(built[name])][:1]


def _without_curve(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "curve"}
