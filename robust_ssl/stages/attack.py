"""The `attack` stage: the public encoder and surrogate images in, perturbations out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, checkpoints, data, threats
from robust_ssl.build import resolve
from robust_ssl.progress import Stopped, stop_requested
from robust_ssl.stages.run import Run, check_names, check_seeds
from robust_ssl.trees import fingerprint, keep_arrays, kept_arrays
from robust_ssl.types import Encoder, Threat

_OF_THE_FIT = ("threat", "epsilon", "curve", "fit")  # options that are not the attack's own


def build_attacks(config: Mapping[str, Any]) -> dict[str, attacks.UniversalAttack]:
    """Builds the universal attacks of ``config.attack.methods``, by name.

    Args:
      config: ``{name: {"function": "module:function", **options}}``.  The options ``threat``,
        ``epsilon``, ``curve`` and ``fit`` say how it is fitted (`build_threat`, `budgets`,
        `fit_option`); the attack gets the others.

    Returns:
      Values that `attacks.fit` takes; they carry the name they have in the config.

    Raises:
      ValueError: If there is none, or a function or an option is not known, or a threat is not.
    """
    built = {}
    for name, options in config.items():
        threat_of(name, options)
        options = {key: value for key, value in options.items() if key not in _OF_THE_FIT}
        function = function_of(name, options)
        try:
            built[name] = resolve(function)(**options, name=name)
        except TypeError as error:
            raise ValueError(f"attack {name!r}: {function} does not take that: {error}") from error
    if not built:
        raise ValueError("config.attack.methods is empty; name at least one attack")
    return built


def function_of(name: str, options: dict[str, Any]) -> str:
    """Takes ``"function"`` out of an attack's options.

    Raises:
      ValueError: If there is none.
    """
    if "function" not in options:
        raise ValueError(
            f'attack {name!r} needs a "function", such as "robust_ssl.attacks:PGD"; got {options}'
        )
    return options.pop("function")


def build_threat(options: Mapping[str, Any] | None) -> Callable[[Any], Threat]:
    """Returns what makes a threat of a budget, as `attacks.fit` takes it.

    Args:
      options: ``{"function": "module:function", **options}``; the function's first argument is the
        budget.  Where the options hold a ``threat`` of their own, as those of a `threats.Band`,
        that one gets the budget.  None is `threats.Linf`.

    Raises:
      ValueError: If a function or an option is not known.

    Example:
      >>> build_threat({"function": "robust_ssl.threats:Patch", "location": "random"})(0.03).area
      0.03
      >>> linf = {"function": "robust_ssl.threats:Linf"}
      >>> low = {"function": "robust_ssl.threats:Band", "threat": linf, "high": 0.125}
      >>> build_threat(low)(0.1)
      Band(threat=Linf(epsilon=0.1), low=0.0, high=0.125)
    """
    if options is None:
        return threats.Linf
    options = dict(options)
    if "function" not in options:
        raise ValueError(f'a threat needs a "function", such as "robust_ssl.threats:L2": {options}')
    name = options.pop("function")
    function = resolve(name)
    inner = build_threat(options.pop("threat")) if "threat" in options else lambda budget: budget

    def make(budget):
        try:
            return function(inner(budget), **options)
        except TypeError as error:
            raise ValueError(f"{name} does not take that: {error}") from error

    return make


def threat_of(name: str, options: Mapping[str, Any]) -> Callable[[Any], Threat]:
    """Returns what makes the threat of a method; its budget's unit must be settled.

    Raises:
      ValueError: If the threat cannot be built, or its budget is not in pixel units and the
        method names none of its own.
    """
    try:
        make = build_threat(options.get("threat"))
        example = make(0.5)
    except ValueError as error:
        raise ValueError(f"attack {name!r}: {error}") from error
    if "epsilon" not in options and not hasattr(example, "epsilon"):
        raise ValueError(
            f"attack {name!r}: the budget of {type(example).__name__} is not in pixel units, so "
            "config.attack.epsilon is not for it; give the method an epsilon of its own (for a "
            'patch the share of the area: "epsilon": 0.03)'
        )
    return make


def budgets(config: Mapping[str, Any], *, curve: bool, method: str | None = None) -> list[float]:
    """Returns the budgets to fit: the main one first, then those of the curve.

    Args:
      config: ``config.attack``.
      curve: Whether those of the curve are wanted.
      method: A method whose options may name an ``epsilon`` and a ``curve`` of its own; one with
        its own ``epsilon`` alone has no curve.  None, and every other method, has the config's.
    """
    own = {} if method is None else config["methods"][method]
    main = own.get("epsilon", config["epsilon"])
    others = own.get("curve", () if "epsilon" in own else config["curve"])
    return [main, *(e for e in others if e != main)] if curve else [main]


def fit_option(config: Mapping[str, Any], method: str, option: str) -> int:
    """Returns ``num_steps`` or ``batch_size`` of a fit: the method's own, else the config's.

    Example:
      >>> methods = {"uap": {"fit": {"num_steps": 20}}}
      >>> fit_option({"methods": methods, "num_steps": 300}, "uap", "num_steps")
      20
    """
    return config["methods"][method].get("fit", {}).get(option, config[option])


def check_config(config: Mapping[str, Any], surrogate: data.Examples) -> None:
    """Raises ValueError unless every method can be built and fitted at each of its budgets.

    Args:
      config: ``config.attack``.
      surrogate: The attacker's images, at least one batch of them.
    """
    check_names(config["methods"], "config.attack.methods")
    check_seeds(config["seeds"], "config.attack.seeds")
    build_attacks(config["methods"])
    for method, options in config["methods"].items():
        try:
            data.steps_per_epoch(len(surrogate), fit_option(config, method, "batch_size"))
        except ValueError as error:
            raise ValueError(f"attack {method!r}, the surrogate set: {error}") from error
        make = threat_of(method, options)
        for budget in budgets(config, curve=True, method=method):
            try:
                threats.check(make(budget), surrogate.image_shape)
            except ValueError as error:
                raise ValueError(f"attack {method!r}: {error}") from error


def attack(
    run: Run, name: str = "attack", encoder: Encoder | None = None, *, curve: bool | None = None
) -> checkpoints.StageDirectory:
    """Fits every method of the config against an encoder, all seeds and budgets at once.

    A method that was fitted before an interruption is not fitted again.

    Args:
      run: The run; ``config.attack`` and ``config.surrogate`` say what is fitted on what.
      name: The stage's name.
      encoder: What is attacked; None is the public encoder.
      curve: Whether every budget of the accuracy-against-epsilon curve is fitted, not the main
        one only; None is yes for the public encoder, no for another.

    Returns:
      The stage's directory, with one ``.npz`` per perturbation, readable by
      `attacks.UniversalPerturbation.load`.
    """
    config, public = run.config["attack"], encoder is None
    check_config(config, run.surrogate)
    curve = public if curve is None else curve
    encoder = run.encoder if public else encoder
    inputs = {
        "encoder": fingerprint(encoder.variables),
        "surrogate": run.surrogate.fingerprint(),
    }
    with run.open(name, {"attack": config, "curve": curve}, inputs) as stage:
        if stage.done:
            return stage
        tree, results, steps = {}, {}, 0
        methods = build_attacks(config["methods"])
        if not public:  # noise does not look at the encoder: there is nothing to craft again
            methods = {m: u for m, u in methods.items() if not is_noise(u)}
        for method, universal in methods.items():
            epsilons = budgets(config, curve=curve, method=method)
            found = kept_arrays(stage.path / "fitted" / f"{method}.npz")
            if found is None:
                found = _fit_and_keep(run, stage, universal, encoder, epsilons)
            tree[method] = {"delta": found["delta"], "curve": found["curve"]}
            results[method] = {
                "seconds": float(found["seconds"]),
                "gradient_evaluations": _gradients(universal, config),
                "objective": [float(x) for x in found["curve"][-1]],
            }
            for values in found["curve"]:
                stage.log(steps, method=method, objective=list(values))
                steps += 1
        stage.finish(tree, results)
    return stage


def _fit_and_keep(run: Run, stage, universal, encoder: Encoder, epsilons) -> dict[str, np.ndarray]:
    begun = time.monotonic()
    fitted = _fit(run, stage.path.name, universal, encoder, epsilons)
    found = {
        "delta": np.asarray(fitted.perturbations.delta),
        "curve": np.asarray(fitted.curve),
        "seconds": np.asarray(time.monotonic() - begun),
    }
    if jax.process_index() == 0:
        _save(stage, fitted, run.config["attack"]["seeds"], epsilons)
        keep_arrays(stage.path / "fitted" / f"{universal.name}.npz", found)
    return found


def load_perturbations(
    stage: checkpoints.StageDirectory, config: Mapping[str, Any], *, curve: bool
) -> dict[tuple[str, int, float], attacks.UniversalPerturbation]:
    """Returns what an attack stage fitted, by (method, seed, budget).

    The main budget of a method is ``budgets(config, curve=False, method=method)[0]``.
    """
    stored, found = stage.read_final(), {}
    for method in (m for m in config["methods"] if m in stored):
        make = threat_of(method, config["methods"][method])
        epsilons = budgets(config, curve=curve, method=method)
        for index, (seed, epsilon) in enumerate((s, e) for s in config["seeds"] for e in epsilons):
            found[method, seed, epsilon] = attacks.UniversalPerturbation(
                delta=jnp.asarray(stored[method]["delta"][index]),
                threat=jax.tree.map(jnp.float32, make(epsilon)),
                name=method,
            )
    return found


def _fit(run: Run, stage: str, universal, encoder: Encoder, epsilons) -> attacks.FittedUniversal:
    config = run.config["attack"]
    steps = 1 if is_noise(universal) else fit_option(config, universal.name, "num_steps")
    keys, members = attacks.members(config["seeds"], epsilons)
    images = fit_option(config, universal.name, "batch_size")
    with run.progress.stage(f"{stage} {universal.name}", steps, images) as bar:

        def on_step(number, values):
            bar.update(number + 1, loss=values[0])
            if stop_requested():
                raise Stopped(f"{stage} stopped while fitting {universal.name}")

        return attacks.fit(
            universal,
            encoder,
            _surrogate_batches(run, steps, images),
            keys=keys,
            epsilons=members,
            image_shape=run.surrogate.image_shape,
            parallel=run.parallel,
            threat=threat_of(universal.name, config["methods"][universal.name]),
            on_step=on_step,
        )


def _surrogate_batches(run: Run, steps: int, batch_size: int) -> Iterator[dict[str, jax.Array]]:
    batches = data.Batches(
        run.surrogate,
        batch_size,
        seed=run.seed,
        stage="attack",
        parallel=run.parallel,
    )
    pixels = jax.jit(lambda images: images.astype(jnp.float32) / 255.0)
    for step in range(steps):
        yield {"images": pixels(batches(step)["images"])}


def _gradients(universal, config: Mapping[str, Any]) -> int:
    """Gradients with respect to an image that one perturbation cost."""
    steps, images = (fit_option(config, universal.name, o) for o in ("num_steps", "batch_size"))
    each = getattr(universal, "gradients_per_batch", lambda images: images)
    return 0 if is_noise(universal) else steps * each(images)


def is_noise(universal: attacks.UniversalAttack) -> bool:
    """Whether it looks at no encoder, so that there is nothing to fit."""
    return isinstance(universal, attacks.RandomNoise)


def _save(stage, fitted: attacks.FittedUniversal, seeds, epsilons) -> None:
    names = [(s, e) for s in seeds for e in epsilons]
    for index, (seed, epsilon) in enumerate(names):
        member = fitted.member(index)
        in_pixels = hasattr(member.threat, "epsilon")
        budget = f"eps{np.round(255 * epsilon, 2):g}" if in_pixels else f"area{epsilon:g}"
        member.save(stage.path / f"{member.name}-{budget}-seed{seed}.npz")
