"""The `evaluate` stage: what the attacks do to every model, and the report of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import attacks, evaluation, report, threats
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.stages import finetune
from robust_ssl.stages.attack import attack, budgets, build_attacks, is_noise, load_perturbations
from robust_ssl.stages.examining import examine
from robust_ssl.stages.run import Run
from robust_ssl.stages.scoring import Group, Scored, Scorer, by_budget, identity, per_image_members
from robust_ssl.trees import fingerprint
from robust_ssl.types import Classifier, Encoder

MODELS = ("usual", "stage1", "stage2")
PER_IMAGE = {"embed": attacks.EmbedAttack, "pgd": attacks.PGD}


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
    unknown = [name for name in config["attacks"] if name not in PER_IMAGE]
    if unknown:
        raise ValueError(
            f"config.evaluate.per_image.attacks: {unknown[0]!r} is not in {sorted(PER_IMAGE)}"
        )
    threats.check_epsilon(config["epsilon"])
    return {
        name: PER_IMAGE[name](
            threats.Linf(config["epsilon"]),
            step_size=config["step_size"],
            num_steps=config["num_steps"],
        )
        for name in config["attacks"]
    }


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
        **{name: identity(model) for name, model in models.items()},
        **{f"attack_{name}": stage.fingerprint for name, stage in crafted.items()},
        "attack": public.fingerprint,
        "test": run.test.fingerprint(),
    }
    with run.open("evaluate", config, inputs) as stage:
        if stage.done:
            return stage
        results, verdicts, curves, drifts, examples = [], {}, {}, {}, {}
        with run.progress.stage("evaluate", len(models)) as bar:
            for number, (name, model) in enumerate(models.items()):
                scorer = Scorer(
                    run, stage, config["batch_size"], functools.partial(bar.update, number)
                )
                scored = _score_model(scorer, name, model, public, crafted[name])
                verdicts[name] = examine(scorer, name, model, scored, inputs[name])
                results += [e for s in scored for e in s.entries(verdicts[name]["verdict"])]
                curves[name] = _curve(scorer, name, model, public)
                examples[name], drifts[name] = _look(model, run, _strongest(scored))
                bar.update(number + 1)
        _write(run, results, verdicts, curves, drifts, examples)
        stage.finish(None, {"results": results, "verdicts": verdicts})
    return stage


def _crafted_again(run: Run, name: str, encoder: Encoder) -> StageDirectory:
    if identity(encoder) == identity(run.encoder):
        return attack(run)
    return attack(run, f"attack_{name}", encoder)


def _score_model(
    scorer: Scorer, name: str, model: Classifier, public: StageDirectory, crafted: StageDirectory
) -> list[Scored]:
    """Scores one model under the universal and the per-image attacks, public and adaptive."""
    run = scorer.run
    universal, per_image = run.config["attack"], run.config["evaluate"]["per_image"]
    scored = []
    for against, stage in (("public", public), ("hardened", crafted)):
        found = _at_main_budget(universal, stage, against)
        for (threat, epsilon), members in by_budget(found, stage.results).items():
            group = Group(name, against, "universal", threat, epsilon)
            scored.append(scorer.score(group, model, members))
        members = per_image_members(run, build_per_image(per_image), against)
        if members:
            group = Group(name, against, "per_image", "Linf", per_image["epsilon"])
            scored.append(scorer.score(group, model, members))
    return scored


def _at_main_budget(config: Mapping[str, Any], stage: StageDirectory, against: str):
    """Returns a stage's perturbations at the main budget of each method.

    Noise looks at no encoder: what is in the public stage is not scored again.
    """
    methods = build_attacks(config["methods"])
    return {
        (method, seed, epsilon): perturbation
        for (method, seed, epsilon), perturbation in load_perturbations(
            stage, config, curve=stage.manifest["config"]["curve"]
        ).items()
        if epsilon == budgets(config, curve=False, method=method)[0]
        and not (against == "hardened" and is_noise(methods[method]))
    }


def _curve(scorer: Scorer, name: str, model: Classifier, public: StageDirectory):
    """Accuracy against epsilon: the worst case per image over methods and seeds at each budget."""
    config = scorer.run.config["attack"]
    found = load_perturbations(public, config, curve=True)
    points = []
    for epsilon in sorted(budgets(config, curve=True)):
        chosen = {key: value for key, value in found.items() if _on_curve(key, value, epsilon)}
        if not chosen:  # every method has budgets of its own
            continue
        [members] = by_budget(chosen, public.results).values()
        group = Group(name, "public", "universal", "Linf", epsilon)
        counts = scorer.score(group, model, members).worst.counts
        if not points:
            points.append((0.0, counts.clean_accuracy, *counts.ci95["clean_accuracy"]))
        points.append((epsilon, counts.robust_accuracy, *counts.ci95["robust_accuracy"]))
    return points


def _on_curve(key: tuple[str, int, float], perturbation, epsilon: float) -> bool:
    return key[2] == epsilon and isinstance(perturbation.threat, threats.Linf)


def _strongest(scored: Sequence[Scored]):
    """Returns the public perturbation that costs this model the most accuracy."""
    public = [s for s in scored if s.group.crafted_against == "public"]
    found = [
        (s.results[member.label].robust_correct.mean(), number, member.value)
        for s in public
        if s.group.family == "universal"
        for number, member in enumerate(s.members)
    ]
    return min(found, key=lambda entry: entry[:2])[2]


def _look(model: Classifier, run: Run, perturbation):
    """Returns eight test images for the figure, and how far each layer moves."""
    count = min(256, len(run.test))
    clean = evaluation.to_pixels(run.test.read(np.arange(count))["images"])
    attacked = evaluation.quantize(perturbation.apply(clean))
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


def _write(run: Run, results, verdicts, curves, drifts, examples) -> None:
    costs, about = _costs(run), _about(run)  # open stages, which all processes do together
    stage2 = "stage2" in run.config["evaluate"]["models"]
    measured = finetune.sensitivity(run).results if stage2 else {}
    if jax.process_index():
        return
    figures = run.workdir / "figures"
    clean, attacked, answers = examples["usual" if "usual" in examples else next(iter(examples))]
    drawn = [
        report.figure_examples(figures, clean, attacked, predictions=answers),
        report.figure_epsilon(figures, curves, verdicts=verdicts),
        report.figure_stability(figures, drifts),
    ]
    if stage2:
        drawn.append(report.figure_sensitivity(figures, measured["scores"], measured["selected"]))
    whole = {**about, "costs": costs}
    report.write_results(run.workdir / "results.json", whole, results, verdicts)
    page = run.workdir / "report.md"
    report.write_report(page, about, results, costs, drawn, verdicts=verdicts)


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
