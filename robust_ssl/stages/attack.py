"""The `attack` stage: the public encoder and surrogate images in, perturbations out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, checkpoints, data, threats
from robust_ssl.conformance import resolve
from robust_ssl.progress import Stopped, stop_requested
from robust_ssl.stages.run import Run
from robust_ssl.trees import fingerprint
from robust_ssl.types import Encoder


def build_attacks(config: Mapping[str, Any]) -> dict[str, attacks.UniversalAttack]:
    """Builds the universal attacks of ``config.attack.methods``, by name.

    Args:
      config: ``{name: {"function": "module:function", **options}}``.

    Returns:
      Values that `attacks.fit` takes; they carry the name they have in the config.

    Raises:
      ValueError: If there is none, or a function or an option is not known.
    """
    built = {}
    for name, options in config.items():
        options = dict(options)
        function = options.pop("function")
        try:
            built[name] = resolve(function)(**options, name=name)
        except TypeError as error:
            raise ValueError(f"attack {name!r}: {function} does not take that: {error}") from error
    if not built:
        raise ValueError("config.attack.methods is empty; name at least one attack")
    return built


def budgets(config: Mapping[str, Any], *, curve: bool) -> list[float]:
    """Returns the epsilons to fit: the main one first, then those of the curve."""
    more = [e for e in config["curve"] if e != config["epsilon"]] if curve else []
    return [config["epsilon"], *more]


def attack(
    run: Run, name: str = "attack", encoder: Encoder | None = None
) -> checkpoints.StageDirectory:
    """Fits every method of the config against an encoder, all seeds and budgets at once.

    Args:
      run: The run; ``config.attack`` and ``config.surrogate`` say what is fitted on what.
      name: The stage's name.
      encoder: What is attacked; None is the public encoder, which also gets every budget of the
        accuracy-against-epsilon curve.

    Returns:
      The stage's directory, with one ``.npz`` per perturbation, readable by
      `attacks.UniversalPerturbation.load`.
    """
    config, public = run.config["attack"], encoder is None
    encoder = run.encoder if public else encoder
    inputs = {
        "encoder": fingerprint(encoder.variables),
        "surrogate": run.surrogate.fingerprint(),
    }
    with run.open(name, {"attack": config, "curve": public}, inputs) as stage:
        if stage.done:
            return stage
        epsilons = budgets(config, curve=public)
        tree, results = {}, {}
        methods = build_attacks(config["methods"])
        if not public:  # noise does not look at the encoder: there is nothing to craft again
            methods = {m: u for m, u in methods.items() if not is_noise(u)}
        for number, (method, universal) in enumerate(methods.items()):
            begun = time.monotonic()
            fitted = _fit(run, stage.path.name, universal, encoder, epsilons)
            tree[method] = {"delta": fitted.perturbations.delta, "curve": fitted.curve}
            results[method] = {
                "seconds": time.monotonic() - begun,
                "gradient_evaluations": _gradients(universal, config),
                "objective": [float(x) for x in fitted.curve[-1]],
            }
            for step, values in enumerate(fitted.curve):
                stage.log(number * len(fitted.curve) + step, method=method, objective=list(values))
            _save(stage, fitted, config["seeds"], epsilons)
        stage.finish(jax.device_get(tree), results)
    return stage


def load_perturbations(
    stage: checkpoints.StageDirectory, config: Mapping[str, Any], *, curve: bool
) -> dict[tuple[str, int, float], attacks.UniversalPerturbation]:
    """Returns what an attack stage fitted, by (method, seed, epsilon)."""
    stored, found = stage.read_final(), {}
    epsilons = budgets(config, curve=curve)
    for method in (m for m in config["methods"] if m in stored):
        for index, (seed, epsilon) in enumerate((s, e) for s in config["seeds"] for e in epsilons):
            found[method, seed, epsilon] = attacks.UniversalPerturbation(
                delta=jnp.asarray(stored[method]["delta"][index]),
                threat=threats.Linf(jnp.float32(epsilon)),
            )
    return found


def _fit(run: Run, stage: str, universal, encoder: Encoder, epsilons) -> attacks.FittedUniversal:
    config = run.config["attack"]
    steps = 1 if is_noise(universal) else config["num_steps"]
    keys, members = attacks.members(config["seeds"], epsilons)
    images = run.config["attack"]["batch_size"]
    with run.progress.stage(f"{stage} {universal.name}", steps, images) as bar:

        def on_step(number, values):
            bar.update(number + 1, loss=values[0])
            if stop_requested():
                raise Stopped(f"{stage} stopped while fitting {universal.name}")

        return attacks.fit(
            universal,
            encoder,
            _surrogate_batches(run, steps),
            keys=keys,
            epsilons=members,
            image_shape=run.surrogate.image_shape,
            parallel=run.parallel,
            on_step=on_step,
        )


def _surrogate_batches(run: Run, steps: int) -> Iterator[dict[str, jax.Array]]:
    batches = data.Batches(
        run.surrogate,
        run.config["attack"]["batch_size"],
        seed=run.seed,
        stage="attack",
        parallel=run.parallel,
    )
    pixels = jax.jit(lambda images: images.astype(jnp.float32) / 255.0)
    for step in range(steps):
        yield {"images": pixels(batches(step)["images"])}


def _gradients(universal, config: Mapping[str, Any]) -> int:
    """Gradients with respect to an image that one perturbation cost."""
    return 0 if is_noise(universal) else config["num_steps"] * config["batch_size"]


def is_noise(universal: attacks.UniversalAttack) -> bool:
    """Whether it looks at no encoder, so that there is nothing to fit."""
    return isinstance(universal, attacks.RandomNoise)


def _save(stage, fitted: attacks.FittedUniversal, seeds, epsilons) -> None:
    if jax.process_index():
        return
    names = [(s, e) for s in seeds for e in epsilons]
    for index, (seed, epsilon) in enumerate(names):
        member = fitted.member(index)
        budget = f"{np.round(255 * epsilon, 2):g}"
        member.save(stage.path / f"{member.name}-eps{budget}-seed{seed}.npz")
