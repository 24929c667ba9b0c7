"""The stage `attack`: an encoder and surrogate images in, universal perturbations out.

`attack_with_labels` is the same for an attacker who has the whole classifier and its labelled
training images: who knows the most that one perturbation for all images can be fitted on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, data, threats
from robust_ssl.attacks.perturbation import check_fits_gray
from robust_ssl.build import inside
from robust_ssl.evaluation import to_pixels
from robust_ssl.experiment.context import Context, model_inputs
from robust_ssl.experiment.suites import Suite, SuiteAttack, budget_name
from robust_ssl.parallel import Parallel
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.types import Classifier, Encoder, Model
from robust_ssl.workdir import (
    StageDirectory,
    WorkdirError,
    fingerprint,
    load_arrays,
    save_arrays,
)

_pixels = jax.jit(to_pixels)  # one program for all fits

Images = data.Examples | data.StreamedExamples


class Fitted(NamedTuple):
    """One fitted perturbation.

    Attributes:
      attack: The attack's name.
      seed: Of its fit.
      epsilon: Its budget.
      perturbation: The perturbation.
      seconds: What it took; members of one fit are charged alike.
      gradient_evaluations: Input gradients that it took; 0 for noise.
    """

    attack: str
    seed: int
    epsilon: float
    perturbation: attacks.UniversalPerturbation
    seconds: float
    gradient_evaluations: int


def check(context: Context) -> None:
    """Raises ValueError unless every attack can be fitted on the surrogate images.

    Raises:
      ConfigChangedError: If the workdir has attacks of another suite or seed.
    """
    suite = context.plan.suite
    _check(context, suite, context.surrogate, "config.suite", "the surrogate set")
    context.check_unchanged("attack", _settings(suite, curve=True))


def check_with_labels(context: Context) -> None:
    """Raises ValueError unless every attack that knows labels can be fitted on training images."""
    if (suite := context.plan.scoring.labelled) is not None:
        images, place = context.downstream[0], "config.scoring.labelled"
        _check(context, suite, images, place, "the training images")


def _check(context: Context, suite: Suite, images: Images, place: str, which: str) -> None:
    context.parallel.check_batch(suite.batch_size)
    for name, attack in suite.attacks.items():
        with inside(f"{place}.attacks.{name}"):
            try:
                data.steps_per_epoch(len(images), attack.batch_size)
            except ValueError as error:
                raise ValueError(f"{which}: {error}") from error
            for budget in attack.budgets:
                threat = attack.make_threat(budget)
                threats.check(threat, images.image_shape)
                check_fits_gray(threat, images.image_shape)


def attack(
    context: Context, name: str = "attack", encoder: Encoder | None = None, *, curve: bool = True
) -> StageDirectory:
    """Fits every attack of the suite against an encoder, all seeds and budgets at once.

    An attack that was fitted before an interruption is not fitted again.

    Args:
      context: The run.
      name: The stage's name.
      encoder: What is attacked; None is the public encoder.
      curve: Whether every budget of the accuracy-against-budget curve is fitted, or the main one.

    Returns:
      The stage's directory, with one ``.npz`` per perturbation, readable by
      `attacks.UniversalPerturbation.load`.
    """
    suite, public = context.plan.suite, encoder is None
    encoder = context.encoder if public else encoder
    # Noise looks at no encoder: there is nothing to craft again.
    wanted = {n: one for n, one in suite.attacks.items() if public or not one.is_noise}
    inputs = {
        **model_inputs("encoder", encoder),
        "surrogate": context.surrogate.fingerprint(),
    }
    return _stage(context, name, encoder, _settings(suite, curve=curve), inputs, wanted)


def _settings(suite: Suite, *, curve: bool) -> dict[str, Any]:
    return {"suite": suite, "curve": curve}


def attack_with_labels(context: Context, name: str, classifier: Classifier) -> StageDirectory:
    """Fits ``config.scoring.labelled`` on a classifier and its labelled training images.

    Nobody who attacks a deployed model has as much.  It shows how much one perturbation for all
    images may take, so that a figure under the suite is not mistaken for a bound.

    Args:
      context: The run.
      name: The stage's name.
      classifier: What is attacked, head and all.

    Returns:
      The stage's directory, as of `attack`.
    """
    suite = context.plan.scoring.labelled
    inputs = {
        **model_inputs("classifier", classifier),
        "train": context.downstream[0].fingerprint(),
    }
    settings = {"labelled": suite, "curve": False}
    return _stage(context, name, classifier, settings, inputs, suite.attacks)


def _stage(
    context: Context,
    name: str,
    model: Model,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    wanted: Mapping[str, SuiteAttack],
) -> StageDirectory:
    curve = settings["curve"]
    with context.open(name, settings, inputs, redo=True, made="fitted") as stage:
        if stage.done:
            return stage
        tree, results, steps = {}, {}, 0
        for attack_name, member in wanted.items():
            arrays = load_arrays(_file(stage, attack_name), stage.origin)
            if arrays is None:
                arrays = _fit_and_keep(context, stage, member, model, curve)
            if jax.process_index() == 0:
                _export(stage, _suite(context, stage), member, arrays["delta"], curve)
            tree[attack_name] = {"delta": arrays["delta"], "curve": arrays["curve"]}
            results[attack_name] = {
                "seconds": float(arrays["seconds"]),
                "gradient_evaluations": member.gradients,
                "objective": [float(x) for x in arrays["curve"][-1]],
            }
            for values in arrays["curve"]:
                stage.log(steps, attack=attack_name, objective=list(values))
                steps += 1
        stage.finish(results, identity=fingerprint(tree))
    return stage


def _file(stage: StageDirectory, name: str):
    return stage.path / "fitted" / f"{name}.npz"


def _suite(context: Context, stage: StageDirectory) -> Suite:
    """The attacks of a stage, by what its manifest says that it fits."""
    planned, labelled = context.plan, "labelled" in stage.manifest["config"]
    return planned.scoring.labelled if labelled else planned.suite


def _fit_and_keep(
    context: Context, stage: StageDirectory, member: SuiteAttack, model: Model, curve: bool
) -> dict[str, np.ndarray]:
    begun = time.monotonic()
    fitted = _fit(
        *(context, stage.path.name, member, model, member.budgets_for(curve)),
        seeds=_suite(context, stage).seeds,
        labelled="labelled" in stage.manifest["config"],
    )
    arrays = {
        "delta": np.asarray(fitted.perturbations.delta),
        "curve": np.asarray(fitted.curve),
        "seconds": np.asarray(time.monotonic() - begun),
    }
    if jax.process_index() == 0:
        save_arrays(_file(stage, member.name), arrays, stage.origin)
    return arrays


def load_perturbations(context: Context, stage: StageDirectory) -> list[Fitted]:
    """Returns what an attack stage fitted.

    Raises:
      WorkdirError: If it is not there any more as it was fitted.
    """
    suite, curve = _suite(context, stage), stage.manifest["config"]["curve"]
    tree, fitted = {}, []
    for name, member in suite.attacks.items():
        if name not in stage.results:
            continue
        arrays = load_arrays(_file(stage, name), stage.origin)
        if arrays is None:
            raise WorkdirError(
                f"{_file(stage, name)} cannot be read; remove {stage.path} to fit it again"
            )
        tree[name] = {"delta": arrays["delta"], "curve": arrays["curve"]}
        cost = stage.results[name]
        seconds = cost["seconds"] / max(len(cost["objective"]), 1)
        for seed, epsilon, perturbation in _perturbations(suite, member, arrays["delta"], curve):
            gradients = cost["gradient_evaluations"]
            fitted.append(Fitted(name, seed, epsilon, perturbation, seconds, gradients))
    if fingerprint(tree) != stage.fingerprint:
        raise WorkdirError(
            f"{stage.path / 'fitted'} is not what was fitted there; remove {stage.path} to fit it "
            "again"
        )
    return fitted


def at_main_budget(context: Context, stage: StageDirectory) -> list[Fitted]:
    """Returns what an attack stage fitted at the main budget of each attack."""
    main = {name: member.budgets[0] for name, member in context.plan.suite.attacks.items()}
    return [f for f in load_perturbations(context, stage) if f.epsilon == main[f.attack]]


def _fit(
    context: Context,
    stage: str,
    member: SuiteAttack,
    model: Model,
    budgets: Sequence[float],
    *,
    seeds: Sequence[int],
    labelled: bool,
) -> attacks.FittedUniversal:
    steps = 1 if member.is_noise else member.num_steps
    keys, epsilons = attacks.members(seeds, budgets)
    images = context.downstream[0] if labelled else context.surrogate
    with context.progress.stage(f"{stage} {member.name}", steps, member.batch_size) as bar:

        def on_step(number, values):
            bar.update(number + 1, loss=values[0])
            if stop_requested():
                raise Stopped(f"{stage} stopped while fitting {member.name}")

        return attacks.fit(
            member.attack,
            model,
            surrogate_batches(
                *(images, steps, member.batch_size),
                seed=context.plan.seed,
                parallel=context.parallel,
                labelled=labelled,
            ),
            keys=keys,
            epsilons=epsilons,
            image_shape=images.image_shape,
            parallel=context.parallel,
            threat=member.make_threat,
            on_step=on_step,
        )


def surrogate_batches(
    surrogate: Images,
    steps: int,
    batch_size: int,
    *,
    seed: int,
    parallel: Parallel,
    labelled: bool = False,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of a fit, pixels in [0, 1]: the same images for each attack of a seed.

    Labels come along only where they are asked for: a surrogate set may have some, unread.
    """
    # Of every attack stage: a fit on a hardened encoder sees the same images.
    batches = data.Batches(surrogate, batch_size, seed=seed, stage="attack", parallel=parallel)
    for step in range(steps):
        batch = batches(step)
        labels = {"labels": batch["labels"]} if labelled else {}
        yield {"images": _pixels(batch["images"]), **labels}


def _perturbations(
    suite: Suite, member: SuiteAttack, deltas: np.ndarray, curve: bool
) -> Iterator[tuple[int, float, attacks.UniversalPerturbation]]:
    """Yields seed, budget and perturbation of each member of a fit."""
    budgets = member.budgets_for(curve)
    pairs = [(seed, epsilon) for seed in suite.seeds for epsilon in budgets]
    for delta, (seed, epsilon) in zip(deltas, pairs, strict=True):
        threat = jax.tree.map(jnp.float32, member.make_threat(epsilon))
        yield seed, epsilon, attacks.UniversalPerturbation(jnp.asarray(delta), threat, member.name)


def _export(
    stage: StageDirectory, suite: Suite, member: SuiteAttack, deltas: np.ndarray, curve: bool
) -> None:
    """Writes each perturbation as a file that NumPy alone can read."""
    for seed, epsilon, perturbation in _perturbations(suite, member, deltas, curve):
        budget = budget_name(perturbation.threat, epsilon)
        perturbation.save(stage.path / f"{member.name}-{budget}-seed{seed}.npz")
