"""What recipes cost, measured step by step beside the one that all are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import data, finetuning
from robust_ssl.stages import fitting, methods
from robust_ssl.stages.run import Run


def check(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ValueError unless recipes can be timed beside ``config.compare.reference``."""
    reference = config["compare"]["reference"]
    recipes = {
        other: methods.complete(config, other)
        for name in (*names, reference)
        for other in methods.chain(config, name)
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
    its steps' and that of choosing its layers, with those of all it starts from.

    Args:
      run: The run; ``config.compare`` has ``reference``, ``rounds`` and ``steps_per_round``.
      names: Recipes; what they start from comes with them.
      seed: They were made with.
      stage: Where the measurement is kept.

    Returns:
      By recipe: ``seconds_per_step`` (None where nothing is trained), ``peak_bytes``, ``factor``
      (training time over the reference's), ``gradients`` (gradient evaluations per image, over the
      reference's epochs).
    """
    config = run.config["compare"]
    reference = config["reference"]
    names = list(dict.fromkeys([*names, reference]))
    chains = {name: methods.chain(run.config, name) for name in names}
    everyone = list(dict.fromkeys(other for chain in chains.values() for other in chain))
    made = {name: methods.method(run, name, seed) for name in everyone}
    inputs = {name: stage.fingerprint for name, stage in made.items()}
    with run.open(stage, config, inputs, seed, collects=True) as directory:
        if not directory.done:
            steps = _measure_steps(run, [n for n in everyone if made[n].results["epochs"]], made)
            results = {}
            whole = {n: _seconds(run, chains[n], made, steps) for n in names}
            epochs = max(made[reference].results["epochs"], 1)
            for name in names:
                own = steps.get(name)
                results[name] = {
                    "seconds_per_step": own and own.seconds_per_step,
                    "peak_bytes": own and own.peak_bytes,
                    "factor": whole[name] / whole[reference],
                    "gradients": methods.total_cost(run, name, seed)["gradient_evaluations"]
                    / epochs,
                }
            directory.finish(None, results)
    return directory.results


def _seconds(run: Run, chain: Sequence[str], made: Mapping[str, Any], steps) -> float:
    """Training time of a chain of recipes by the measured steps, without validation."""
    total = 0.0
    for name in (n for n in chain if n in steps):
        results = made[name].results
        total += results["steps"] * steps[name].seconds_per_step
        total += results.get("selection_seconds", 0.0)
    return total


def _measure_steps(run: Run, names: Sequence[str], made) -> dict[str, finetuning.Cost]:
    config, compiled, states = run.config["compare"], {}, {}
    for name in names:
        recipe = methods.complete(run.config, name)
        if recipe["select"] is not None:
            rate = recipe["select"]["rate"]
            recipe["rates"] = finetuning.rates_for(made[name].results["selected"], rate)
        classifier = methods.untrained(run, name)
        attack = fitting.build_attack(run, recipe["attack"])
        losses = fitting.build_losses(recipe["losses"])
        state, step = fitting.build_step(run, name, classifier, recipe, losses, attack, 1)
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
