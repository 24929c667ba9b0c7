"""The `evaluate` stage: what the attacks do to every model, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from robust_ssl import attacks, data, evaluation, report, threats
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.progress import Stopped, stop_requested
from robust_ssl.stages import finetune
from robust_ssl.stages.attack import attack, budgets, build_attacks, is_noise, load_perturbations
from robust_ssl.stages.run import Run
from robust_ssl.stages.training import stage_key
from robust_ssl.trees import fingerprint
from robust_ssl.types import Classifier, Encoder

MODELS = ("usual", "stage1", "stage2")
PER_IMAGE = {"embed": attacks.EmbedAttack, "pgd": attacks.PGD}
SEES_LABELS = ("pgd",)


@struct.dataclass
class Transferred:
    """A per-image attack that looks at another model than the one it is then used on.

    Attributes:
      attack: The attack.
      source: The model it sees, for example the public encoder.
    """

    attack: Any
    source: Any

    def __call__(self, key, model, image, label=None) -> jax.Array:
        """Returns the adversarial image, crafted on `source`."""
        del model
        return self.attack(key, self.source, image, label)


def check_models(names: Sequence[str]) -> None:
    """Raises ValueError unless `names`, ``config.evaluate.models``, names models to score."""
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise ValueError(
            f"config.evaluate.models: {unknown or 'empty'}; there are {', '.join(MODELS)}"
        )


def build_per_image(config: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the per-image attacks of ``config.evaluate.per_image``.

    Raises:
      ValueError: If a name is not ``"embed"`` or ``"pgd"``, or the budget is not in [0, 1].
    """
    built = {}
    for name in config["attacks"]:
        if name not in PER_IMAGE:
            raise ValueError(
                f"config.evaluate.per_image.attacks: {name!r} is not in {sorted(PER_IMAGE)}"
            )
        threats.check_epsilon(config["epsilon"])
        built[name] = PER_IMAGE[name](
            threats.Linf(config["epsilon"]),
            step_size=config["step_size"],
            num_steps=config["num_steps"],
        )
    return built


def evaluate(run: Run) -> StageDirectory:
    """Scores every model under every attack on the whole test split, and writes the report.

    Universal perturbations are crafted against the public encoder and again against each model's
    own (a model whose encoder did not move is attacked with the public ones).  Per-image attacks
    see the public encoder (where they need no label) and the model itself.

    Returns:
      The stage's directory.  ``results.json``, ``report.md`` and ``figures/`` are in the workdir.
    """
    config = run.config["evaluate"]
    models = {name: finetune.load_classifier(run, name) for name in config["models"]}
    public = attack(run)
    crafted = {name: _crafted_again(run, name, model.encoder) for name, model in models.items()}
    inputs = {
        **{name: fingerprint(model.variables) for name, model in models.items()},
        **{f"attack_{name}": stage.fingerprint for name, stage in crafted.items()},
        "attack": public.fingerprint,
        "test": run.test.fingerprint(),
    }
    with run.open("evaluate", config, inputs) as stage:
        if stage.done:
            return stage
        results, curves, drifts, examples = [], {}, {}, {}
        total = len(models)
        with run.progress.stage("evaluate", total) as bar:
            for number, (name, model) in enumerate(models.items()):
                results += _score_model(run, name, model, public, crafted[name])
                curves[name] = _curve(run, model, public)
                strongest = _strongest(run, public, results, name)
                examples[name], drifts[name] = _look(model, run, strongest)
                bar.update(number + 1)
        _write(run, results, curves, drifts, examples)
        stage.finish(None, {"results": results})
    return stage


def _crafted_again(run: Run, name: str, encoder: Encoder) -> StageDirectory:
    if fingerprint(encoder.variables) == fingerprint(run.encoder.variables):
        return attack(run)
    return attack(run, f"attack_{name}", encoder)


def _score_model(
    run: Run, name: str, model: Classifier, public: StageDirectory, crafted: StageDirectory
) -> list[dict[str, Any]]:
    """Returns the entries of ``results.json`` for one model."""
    universal, per_image = run.config["attack"], run.config["evaluate"]["per_image"]
    same = public.path == crafted.path
    # Noise looks at no encoder: it is not crafted again.
    unfitted = [
        method for method, value in build_attacks(universal["methods"]).items() if is_noise(value)
    ]
    entries = []
    for against, stage in (("public", public), ("hardened", crafted)):
        found = load_perturbations(stage, universal, curve=against == "public" or same)
        named = {
            label: (method, perturbation)
            for label, (method, perturbation) in _at_main_budget(universal, found).items()
            if against == "public" or method not in unfitted
        }
        chosen = {label: perturbation for label, (_, perturbation) in named.items()}
        costs = {label: stage.results[method] for label, (method, _) in named.items()}
        if chosen:
            entries += _entries(run, name, model, against, universal["epsilon"], chosen, costs)
        single = build_per_image(per_image)
        if against == "public":
            single = {
                label: Transferred(value, run.encoder)
                for label, value in single.items()
                if label not in SEES_LABELS
            }
        if single:
            steps = per_image["num_steps"] * len(run.test)
            costs = {label: {"seconds": 0.0, "gradient_evaluations": steps} for label in single}
            entries += _entries(run, name, model, against, per_image["epsilon"], single, costs)
    return entries


def _at_main_budget(config: Mapping[str, Any], found: Mapping) -> dict[str, tuple[str, Any]]:
    """Returns (method, perturbation) at the main epsilon, by the name that tables give it."""
    return {
        method if len(config["seeds"]) == 1 else f"{method}-seed{seed}": (method, perturbation)
        for (method, seed, epsilon), perturbation in found.items()
        if epsilon == config["epsilon"]
    }


def _entries(
    run: Run,
    name: str,
    model: Classifier,
    against: str,
    epsilon: float,
    chosen: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    scored = _score(run, model, chosen)
    costs = {label: dict(cost) for label, cost in costs.items()}
    costs[evaluation.WORST] = {
        "seconds": sum(cost["seconds"] for cost in costs.values()),
        "gradient_evaluations": sum(cost["gradient_evaluations"] for cost in costs.values()),
    }
    labels = [*chosen, evaluation.WORST] if len(chosen) > 1 else list(chosen)
    return [
        {
            "model": name,
            "attack": label,
            "crafted_against": against,
            "epsilon": float(epsilon),
            **scored[label].counts.as_dict(),
            "seconds": round(costs[label]["seconds"] + scored[label].seconds, 3),
            "gradient_evaluations": int(costs[label]["gradient_evaluations"]),
        }
        for label in labels
    ]


def _score(run: Run, model: Classifier, chosen: Mapping[str, Any]):
    if stop_requested():
        raise Stopped("evaluate stopped")
    return evaluation.score(
        model,
        _test_batches(run),
        chosen,
        key=stage_key(run.seed, "evaluate"),
        parallel=run.parallel,
    )


def _test_batches(run: Run):
    return data.epoch_batches(run.test, run.config["evaluate"]["batch_size"])


def _curve(run: Run, model: Classifier, public: StageDirectory):
    """Accuracy against epsilon: the worst case per image over methods and seeds at each budget."""
    config = run.config["attack"]
    found = load_perturbations(public, config, curve=True)
    points = []
    for epsilon in sorted(budgets(config, curve=True)):
        chosen = {f"{m}-{s}": value for (m, s, e), value in found.items() if e == epsilon}
        counts = _score(run, model, chosen)[evaluation.WORST].counts
        if not points:
            points.append((0.0, counts.clean_accuracy, *counts.ci95["clean_accuracy"]))
        points.append((epsilon, counts.robust_accuracy, *counts.ci95["robust_accuracy"]))
    return points


def _strongest(run: Run, public: StageDirectory, results, name: str):
    """Returns the public perturbation that costs this model the most accuracy."""
    config = run.config["attack"]
    found = load_perturbations(public, config, curve=True)
    named = _at_main_budget(config, found)
    scored = [
        entry
        for entry in results
        if (entry["model"], entry["crafted_against"]) == (name, "public")
        and entry["attack"] in named
    ]
    return named[min(scored, key=lambda entry: entry["robust_accuracy"])["attack"]][1]


def _look(model: Classifier, run: Run, perturbation):
    """Returns eight test images for the figure, and how far each layer moves."""
    count = min(256, len(run.test))
    clean = evaluation.to_pixels(run.test.read(np.arange(count))["images"])
    attacked = evaluation.quantise(perturbation.apply(clean))
    drift = evaluation.per_layer_stability(model.encoder, clean, attacked)
    names = run.test.class_names
    spread = np.linspace(0, count - 1, 8).astype(int)
    answers = [
        [names[label] if names else str(label) for label in np.asarray(predicted)]
        for predicted in (
            evaluation.predictions(model, clean[spread]),
            evaluation.predictions(model, attacked[spread]),
        )
    ]
    return (
        np.asarray(clean[spread]),
        np.asarray(attacked[spread]),
        list(zip(*answers, strict=True)),
    ), drift


def _write(run: Run, results, curves, drifts, examples) -> None:
    if jax.process_index():
        return
    figures = run.workdir / "figures"
    clean, attacked, answers = examples["usual" if "usual" in examples else next(iter(examples))]
    drawn = [
        report.figure_examples(figures, clean, attacked, predictions=answers),
        report.figure_epsilon(figures, curves),
        report.figure_stability(figures, drifts),
    ]
    if "stage2" in run.config["evaluate"]["models"]:
        measured = finetune.sensitivity(run).results
        drawn.append(report.figure_sensitivity(figures, measured["scores"], measured["selected"]))
    costs = _costs(run)
    about = _about(run)
    report.write_results(run.workdir / "results.json", {**about, "costs": costs}, results)
    report.write_report(run.workdir / "report.md", about, results, costs, drawn)


def _costs(run: Run) -> dict[str, dict[str, float]]:
    """What it took to get each model: stage 2 includes stage 1 and the sensitivity."""
    models = run.config["evaluate"]["models"]
    needed = [*models, "stage1"] if "stage2" in models else models
    taken = {name: getattr(finetune, name)(run) for name in dict.fromkeys(needed)}
    costs = {
        name: {
            "seconds": stage.manifest["seconds"],
            "gradient_evaluations": float(stage.results["gradient_evaluations_per_image"]),
        }
        for name, stage in taken.items()
    }
    if "stage2" in costs:
        measured = finetune.sensitivity(run)
        spent = measured.results["gradient_evaluations"] / len(run.downstream[0])
        costs["stage2"]["seconds"] += measured.manifest["seconds"] + costs["stage1"]["seconds"]
        costs["stage2"]["gradient_evaluations"] += spent + costs["stage1"]["gradient_evaluations"]
    return {name: {k: round(v, 3) for k, v in costs[name].items()} for name in models}


def _about(run: Run) -> dict[str, Any]:
    train, validation = run.downstream
    manifest = attack(run).manifest
    return {
        "encoder": {"name": run.encoder.name, "fingerprint": fingerprint(run.encoder.variables)},
        "downstream": {
            "name": train.name,
            "train": len(train),
            "validation": len(validation),
            "test": len(run.test),
        },
        "surrogate": {"name": run.surrogate.name, "images": len(run.surrogate)},
        "seed": run.seed,
        "devices": manifest["devices"],
        "versions": manifest["versions"],
        "checkpoints": {name: f"{name}/final" for name in run.config["evaluate"]["models"]},
        "config": run.config,
    }
