"""What recipes cost, measured step by step beside the one that all are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robust_ssl import data, finetuning
from robust_ssl.stages import fitting, methods
from robust_ssl.stages.recipes import chain
from robust_ssl.stages.run import Run


def check(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ValueError unless recipes can be timed beside ``config.compare.reference``."""
    reference = config["compare"]["reference"]
    recipes = {
        other: methods.complete(config, other)
        for name in (*names, reference)
        for other in chain(config, name)
    }
    trained = {n: r["batch_size"] for n, r in recipes.items() if r["epochs"] and not r["members"]}
    if reference not in trained:
        raise ValueError(
            f"config.compare.reference is {reference!r}, in which nothing is trained: costs cannot "
            "be relative to its"
        )
    other = next((n for n, size in trained.items() if size != trained[reference]), None)
    if other is not None:
        raise ValueError(
            f"costs are compared at one batch size, but {reference} has {trained[reference]} and "
            f"{other} {trained[other]}"
        )


def measure(run: Run, names: Sequence[str], seed: int, stage: str = "cost") -> dict[str, Any]:
    """Returns what the training of made recipes costs, relative to ``config.compare.reference``.

    Steps of all recipes are timed in turn in one process (`finetuning.measure`); a recipe's time is
    its steps', with those of all it starts from.  Choosing layers counts by its gradients, each of
    which takes what one in the reference's step takes: its own wall time has compiling in it.
    Nothing is trained here.

    Args:
      run: The run; ``config.compare`` has ``reference``, ``rounds`` and ``steps_per_round``.
      names: Recipes that are finished; what they start from comes with them.  Where the reference
        is not among them, because it failed, there are no factors.
      seed: They were made with.
      stage: Where the measurement is kept.

    Returns:
      By recipe: ``factor`` (training time over the reference's; None without it), ``gradients``
      (gradient evaluations per image, over the reference's epochs), and of its own training, None
      where there is none: ``seconds_per_step``, ``seconds_per_image`` and ``gradients_per_epoch``
      (of one image in one epoch), ``peak_bytes``.
    """
    config = run.config["compare"]
    reference = config["reference"]
    names = list(dict.fromkeys(names))
    chains = {name: chain(run.config, name) for name in names}
    everyone = list(dict.fromkeys(other for chain in chains.values() for other in chain))
    made = {name: methods.method(run, name, seed) for name in everyone}
    inputs = {name: stage.fingerprint for name, stage in made.items()}
    with run.open(stage, config, inputs, seed, collects=True) as directory:
        if not directory.done:
            found = {name: stage.results for name, stage in made.items()}
            steps = _measure_steps(run, [n for n in everyone if found[n]["epochs"]], found)
            own = {name: _own(run, name, found[name], steps.get(name)) for name in everyone}
            whole = {}
            if reference in names:
                epochs = found[reference]["epochs"]
                whole = {n: _seconds(run, chains[n], found, own) for n in names}
            else:
                epochs = methods.complete(run.config, reference)["epochs"]
            results = {}
            for name in names:
                gradients = total_gradients(found[other] for other in chains[name])
                results[name] = {
                    "factor": whole[name] / whole[reference] if whole else None,
                    "gradients": gradients / max(epochs, 1),
                    **own[name],
                }
            directory.finish(None, results)
    return directory.results


def _own(run: Run, name: str, results: Mapping[str, Any], cost: finetuning.Cost | None) -> dict:
    """What a recipe's own training costs, without that of what it starts from."""
    if cost is None:
        nothing = ("seconds_per_step", "seconds_per_image", "gradients_per_epoch", "peak_bytes")
        return dict.fromkeys(nothing)
    recipe = methods.complete(run.config, name)
    # An epoch has as many times more steps as each batch is shown.
    replays = getattr(fitting.build_attack(run, recipe["attack"]), "replays", 1)
    return {
        "seconds_per_step": cost.seconds_per_step,
        "seconds_per_image": cost.seconds_per_step * replays / recipe["batch_size"],
        "gradients_per_epoch": results["gradient_evaluations_per_image"] / results["epochs"],
        "peak_bytes": cost.peak_bytes,
    }


def total_cost(run: Run, name: str, seed: int) -> dict[str, float]:
    """Returns what a finished recipe took with all it starts from: seconds, gradients per image."""
    made = [methods.method(run, other, seed) for other in chain(run.config, name)]
    return {
        "seconds": sum(
            one.manifest["seconds"] + one.results.get("selection_seconds", 0) for one in made
        ),
        "gradient_evaluations": total_gradients([one.results for one in made]),
    }


def total_gradients(results: Iterable[Mapping[str, Any]]) -> float:
    """Returns gradient evaluations per image of some finished recipes, choosing layers included."""
    return sum(
        one["gradient_evaluations_per_image"]
        + one.get("selection_gradient_evaluations_per_image", 0)
        for one in results
    )


def _seconds(run: Run, chain: Sequence[str], found: Mapping[str, Any], own) -> float:
    """Training time of a chain of recipes by the measured steps, without validation."""
    reference = own[run.config["compare"]["reference"]]
    per_gradient = reference["seconds_per_image"] / reference["gradients_per_epoch"]
    total = 0.0
    for name in (n for n in chain if found[n]["epochs"]):
        selecting = found[name].get("selection_gradient_evaluations_per_image", 0)
        total += found[name]["steps"] * own[name]["seconds_per_step"]
        total += selecting * len(run.downstream[0]) * per_gradient
    return total


def _measure_steps(
    run: Run, names: Sequence[str], found: Mapping[str, Any]
) -> dict[str, finetuning.Cost]:
    config, compiled, states = run.config["compare"], {}, {}
    for name in names:
        recipe = methods.complete(run.config, name)
        if recipe["select"] is not None:
            rate = recipe["select"]["rate"]
            recipe["rates"] = finetuning.rates_for(found[name]["selected"], rate)
        classifier = methods.untrained(run, name)
        encoder = methods.other_encoder(run, name)
        attack = fitting.build_attack(run, recipe["attack"], encoder)
        losses = fitting.build_losses(recipe["losses"])
        state, step = fitting.build_step(
            run, name, classifier, recipe, losses, attack, 1, encoder=encoder
        )
        settings = run.parallel.replicate(step.settings)
        states[name] = run.parallel.replicate(state)
        compiled[name] = run.parallel.compile(step.function, constants=settings)
    size = methods.complete(run.config, config["reference"])["batch_size"]
    batches = data.Batches(
        run.downstream[0], size, seed=run.seed, stage="cost", parallel=run.parallel
    )
    return finetuning.measure(
        compiled,
        states,
        batches(0),
        rounds=config["rounds"],
        steps_per_round=config["steps_per_round"],
        memory=config["memory"],
    )
