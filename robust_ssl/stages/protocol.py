"""The `protocol` stage: any saved classifiers under the whole suite, and a leaderboard."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import data, evaluation, report, threats, weights
from robust_ssl.attacks import autoattack
from robust_ssl.build import resolve
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.evaluation import PerImage
from robust_ssl.manifests import WorkdirError
from robust_ssl.parallel import release_programs
from robust_ssl.stages import methods, recipes
from robust_ssl.stages.attack import (
    attack,
    build_attacks,
    function_of,
    is_noise,
    load_perturbations,
)
from robust_ssl.stages.examining import examine
from robust_ssl.stages.run import Run, check_names, check_seeds
from robust_ssl.stages.scoring import (
    Group,
    Member,
    Scored,
    Scorer,
    by_budget,
    file_name,
    identity,
    outcomes,
    per_image_members,
    sample,
)
from robust_ssl.stages.training import stage_key
from robust_ssl.trees import fingerprint, keep_arrays, kept_arrays
from robust_ssl.types import Classifier

OUTCOMES = "outcomes.npz"
_THREATS = {"Linf": threats.Linf, "L2": threats.L2}
_ENSEMBLES = {"standard": autoattack.standard, "rand": autoattack.rand}


def load_classifiers(run: Run, *, made: bool = True) -> dict[str, Classifier]:
    """Returns the classifiers of ``config.classifiers`` and of ``config.methods``, by name.

    Each is ``{"path": directory}``, what `weights.save_classifier` wrote or a finished fine-tuning
    stage, or ``{"function": "module:function", **options}``, which returns a `Classifier`.

    Raises:
      ValueError: If there is none, one cannot be read, or one does not fit the test split.

    Recipes that are not `made` yet are shown with the weights they start from.
    """
    config = run.config["classifiers"]
    check_names(config or (), "config.classifiers")
    found = _recipes(run, made) if "methods" in run.config else {}
    if not config and not found:
        raise ValueError(
            "config.classifiers is empty; name what is to be scored, for example "
            '--config.classifiers=\'{"secured": {"path": "runs/gtsrb/stage2"}}\''
        )
    for name, options in config.items():
        try:
            found[name] = _load(options)
            _check_fits(run, found[name])
        except (ValueError, TypeError, OSError) as error:
            error.add_note(f"in config.classifiers.{name}")
            raise
    return found


def _recipes(run: Run, made: bool) -> dict[str, Classifier]:
    """The classifiers of the recipes, which are methods of this run, with every seed."""
    if not made:
        return {name: methods.untrained(run, name) for name in recipes.scored(run.config)}
    failed = methods.defend(run).results["failed"]
    return {
        methods.model_name(name, seed): methods.load_method(run, name, seed)
        for name in recipes.scored(run.config)
        for seed in run.config["defend"]["seeds"]
        if methods.directory(name, seed) not in failed
    }


def _check_fits(run: Run, classifier: Classifier) -> None:
    size, public, classes = classifier.image_size, run.encoder.image_size, run.num_classes
    if size != public:
        raise ValueError(
            f"the classifier takes {size} x {size} pixels and the public encoder "
            f"{run.encoder.name} {public} x {public}: perturbations fitted on one do not fit the "
            "other; take the encoder that the classifier was built on (config.encoder)"
        )
    data.check_image_size(run.test, size)
    if classifier.num_classes != classes:
        raise ValueError(
            f"the classifier has {classifier.num_classes} classes and {run.test.name} {classes}: "
            "it was made for another task; change config.downstream or the classifier"
        )


def _load(options: Mapping[str, Any]) -> Classifier:
    kinds = {"path", "function"}
    if not isinstance(options, Mapping) or len(kinds & {k for k, v in options.items() if v}) != 1:
        raise ValueError(
            'give {"path": directory} or {"function": "module:function", **options}, got '
            f"{options!r}"
        )
    options = {name: value for name, value in options.items() if value is not None}
    if "path" in options:
        return weights.load_classifier(options["path"])
    function = options.pop("function")
    made = resolve(function)(**options)
    if not isinstance(made, Classifier):
        raise TypeError(
            f"{function} must return a robust_ssl.Classifier, got {type(made).__name__}"
        )
    return made


def build_methods(run: Run, epsilon: float) -> dict[str, Any]:
    """Builds the per-image attacks of ``config.protocol.per_image.methods`` at one budget.

    An option ``target`` is the place of a surrogate image, the threat image of a targeted attack.

    Raises:
      ValueError: If a function or an option is not known, or the budget is not in [0, 1].
    """
    threats.check_epsilon(epsilon)
    methods, built = run.config["protocol"]["per_image"]["methods"], {}
    check_names(methods, "config.protocol.per_image.methods")
    for name, options in methods.items():
        options = dict(options)
        function = function_of(name, options)
        if "target" in options:
            target = options.pop("target")
            if not 0 <= target < len(run.surrogate):
                raise ValueError(
                    f"attack {name!r}: target {target} is not the place of one of the "
                    f"{len(run.surrogate)} surrogate images"
                )
            [image] = run.surrogate.read(np.asarray([target]))["images"]
            options["target_image"] = evaluation.to_pixels(jnp.asarray(image))
        try:
            built[name] = resolve(function)(threats.Linf(epsilon), **options)
        except TypeError as error:
            raise ValueError(f"attack {name!r}: {function} does not take that: {error}") from error
    return built


def build_ensembles(run: Run, num_classes: int) -> dict[tuple[str, float], Mapping[str, Any]]:
    """Builds AutoAttack of ``config.protocol.autoattack``, by (threat, epsilon).

    Raises:
      ValueError: If the version or a threat is not known.
    """
    config = run.config["protocol"]["autoattack"]
    if config["version"] not in _ENSEMBLES or set(config["threats"]) - set(_THREATS):
        raise ValueError(
            f"config.protocol.autoattack: version {config['version']!r} of {sorted(_ENSEMBLES)}, "
            f"threats {sorted(config['threats'])} of {sorted(_THREATS)}"
        )
    built = {}
    for name, epsilons in config["threats"].items():
        for epsilon in epsilons:
            threat = _THREATS[name](epsilon)
            try:
                threats.check(threat, run.test.image_shape)
            except ValueError as error:
                error.add_note(f"in autoattack.threats.{name}")
                raise
            built[name, epsilon] = _ENSEMBLES[config["version"]](threat, num_classes)
    return built


def check(run: Run) -> None:
    """Builds everything the stage needs, without a step of it.

    Raises:
      ValueError: With what is wrong and what to do.
    """
    config = run.config["protocol"]
    _check_entries(config)
    check_seeds(config["seeds"], "config.protocol.seeds")
    for size in (config["batch_size"], config["autoattack"]["batch_size"]):
        run.parallel.check_batch(size)
    attacks = [list(build_methods(run, e).values()) for e in config["per_image"]["epsilons"]]
    traced = set()  # one of each kind: most classifiers and the members of AutoAttack are alike
    for classifier in load_classifiers(run, made=False).values():
        ensembles = build_ensembles(run, classifier.num_classes)
        parts = [
            part for ensemble in ensembles.values() for some in ensemble.values() for part in some
        ]
        for attack_value in [value for some in attacks for value in some] + parts:
            leaves, structure = jax.tree.flatten((attack_value, classifier))
            kind = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            if kind not in traced:
                _trace(attack_value, classifier, run.test.image_shape)
                traced.add(kind)


def _check_entries(config: Mapping[str, Any]) -> None:
    expected = {
        "": ("seeds", "batch_size", "adaptive", "checks", "per_image", "autoattack"),
        "per_image": ("methods", "epsilons"),
        "autoattack": ("version", "threats", "images", "batch_size"),
    }
    for part, names in expected.items():
        found = config[part] if part else config
        if set(found) != set(names):
            raise ValueError(
                f"config.protocol{'.' * bool(part)}{part} must have the entries {sorted(names)}, "
                f"got {sorted(found)}"
            )
    if (config["autoattack"]["images"] or 1) < 1 or config["autoattack"]["batch_size"] < 1:
        raise ValueError("config.protocol.autoattack: images and batch_size must be at least 1")
    lists = [config["per_image"]["epsilons"], *config["autoattack"]["threats"].values()]
    if not all(isinstance(some, list | tuple) for some in lists):
        raise ValueError("config.protocol: epsilons are lists, for example (0.03,), also of one")


def _trace(attack: Any, classifier: Classifier, image_shape: tuple[int, ...]) -> None:
    """Traces an attack, so that one which does not suit the classifier is refused at the start."""
    image, label = jnp.zeros(image_shape), jnp.zeros((), jnp.int32)
    jax.eval_shape(lambda a, c: a(jax.random.key(0), c, image, label), attack, classifier)


def protocol(run: Run) -> StageDirectory:
    """Scores every classifier under the whole suite, and writes the leaderboard.

    Each attack is scored by itself and in the worst case per image; a group of attacks is kept as
    soon as it is done, so an interrupted stage goes on where it was.

    Returns:
      The stage's directory, with ``outcomes.npz``: which images stayed right
      (`scoring.outcomes`).  ``leaderboard.json``, ``leaderboard.md``, ``leaderboard.csv`` and
      ``attacks.csv`` are in the workdir.
    """
    config = run.config["protocol"]
    models = load_classifiers(run)
    public = attack(run)
    crafted = {name: _crafted_again(run, name, model) for name, model in models.items()}
    inputs = {
        **{f"classifier/{name}": identity(model) for name, model in models.items()},
        **{f"attack/{name}": stage.fingerprint for name, stage in crafted.items() if stage},
        "attack": public.fingerprint,
        "test": run.test.fingerprint(),
    }
    with run.open("protocol", {"protocol": config}, inputs, collects=True) as stage:
        if stage.done and kept_arrays(stage.path / OUTCOMES) is not None:
            if not (run.workdir / "leaderboard.md").exists():
                _write(run, stage.results["results"], stage.results["verdicts"])
            return stage
        results, verdicts, found = [], {}, {}
        jobs = {n: _jobs(run, n, model, public, crafted[n]) for n, model in models.items()}
        total = sum(parts for some in jobs.values() for parts, _ in some)
        with run.progress.stage("protocol", total) as bar:
            done = itertools.count(1)
            scorer = Scorer(run, stage, config["batch_size"], lambda: bar.update(next(done)))
            quiet = dataclasses.replace(scorer, on_part=lambda: None)
            for name, model in models.items():
                release_programs()
                scored = [job(scorer) for _, job in jobs[name]]
                verdicts[name] = (
                    examine(quiet, name, model, scored, inputs[f"classifier/{name}"])
                    if config["checks"]
                    else {"verdict": "not examined", "checks": []}
                )
                results += [e for s in scored for e in s.entries(verdicts[name]["verdict"])]
                found |= outcomes(scored)
        _write(run, results, verdicts)
        if jax.process_index() == 0:
            keep_arrays(stage.path / OUTCOMES, found)
        stage.finish(None, {"results": results, "verdicts": verdicts})
    return stage


def read_outcomes(stage: StageDirectory) -> dict[str, np.ndarray]:
    """Returns what `protocol` left in ``outcomes.npz``; see `scoring.outcomes`.

    Raises:
      WorkdirError: If a process cannot read it (a network disk may show it a minute late).
    """
    found = kept_arrays(stage.path / OUTCOMES)
    if found is None:
        raise WorkdirError(
            f"{stage.path / OUTCOMES} cannot be read by all processes; give all of them the same "
            "disk and run the same command again, which makes it anew from what was scored"
        )
    return found


def _crafted_again(run: Run, name: str, model: Classifier) -> StageDirectory | None:
    """Fits the universal attacks on the classifier's own encoder; None where that is not asked."""
    if not run.config["protocol"]["adaptive"]:
        return None
    if identity(model.encoder) == identity(run.encoder):
        return attack(run)
    return attack(run, f"attack_{name}", model.encoder, curve=True)


def _jobs(
    run: Run,
    name: str,
    model: Classifier,
    public: StageDirectory,
    crafted: StageDirectory | None,
) -> list[tuple[int, Callable[[Scorer], Scored]]]:
    """Returns what is to be scored of one classifier: in how many parts, and how."""
    jobs = []

    def add(group: Group, members: Sequence[Member]) -> None:
        parts = len(members) if group.family == "per_image" else 1
        jobs.append((parts, lambda scorer: scorer.score(group, model, members)))

    for against, stage in (("public", public), ("hardened", crafted)):
        found = {} if stage is None else by_budget(_found(run, stage, against), stage.results)
        for (threat, epsilon), members in found.items():
            add(Group(name, against, "universal", threat, epsilon), members)
    config = run.config["protocol"]
    for against in ("public", "hardened"):
        for epsilon in config["per_image"]["epsilons"]:
            built = build_methods(run, epsilon)
            members = per_image_members(run, built, against, config["seeds"])
            if members:
                add(Group(name, against, "per_image", "Linf", epsilon), members)
    for (threat, epsilon), ensemble in build_ensembles(run, model.num_classes).items():
        group = Group(name, "hardened", "autoattack", threat, epsilon)
        jobs.append((len(ensemble), functools.partial(_in_turn, group, model, ensemble)))
    return jobs


def _found(run: Run, stage: StageDirectory, against: str) -> dict[tuple[str, int, float], Any]:
    config = run.config["attack"]
    methods = build_attacks(config["methods"])
    curve = stage.manifest["config"]["curve"]
    return {
        key: perturbation
        for key, perturbation in load_perturbations(stage, config, curve=curve).items()
        if not (against == "hardened" and is_noise(methods[key[0]]))
    }


def _in_turn(
    group: Group, model: Classifier, ensemble: Mapping[str, Sequence[Any]], scorer: Scorer
) -> Scored:
    """Scores AutoAttack: each attack on what the ones before have left, kept one by one."""
    run, config = scorer.run, scorer.run.config["protocol"]["autoattack"]
    rows = sample(run, config["images"] or len(run.test))
    part = run.test.read(rows)
    examples = {
        "images": part["images"],
        "labels": part["labels"].astype(np.int32),
        "indices": rows.astype(np.int32),
    }
    shared = {
        "key": stage_key(run.seed, "autoattack"),
        "parallel": run.parallel,
        "batch_size": config["batch_size"],
    }
    before, members, results = None, [], {}
    for name, parts in ensemble.items():
        file = file_name(group, [config["version"], name, f"{len(rows)} images"])
        found = scorer.kept(
            file, lambda p=parts, b=before: {"after": _after(model, examples, p, b, shared)}
        )["after"]
        alive = found.clean_correct if before is None else before.robust_correct
        gradients = int(alive.sum()) * sum(part.gradient_evaluations for part in parts)
        members.append(Member(name, None, parts[0], 0.0, gradients))
        results[name] = before = found
    total = sum(result.seconds for result in results.values())
    worst = dataclasses.replace(before, seconds=total)
    return Scored(group, tuple(members), {**results, evaluation.WORST: worst}, rows)


def _after(model, examples, parts, before: PerImage | None, shared) -> PerImage:
    """Returns what is left after an attack of what the ones before have left."""
    begun = time.perf_counter()
    if before is None:
        clean = alive = evaluation.clean_correct(model, examples, **shared)
    else:
        clean, alive = before.clean_correct, before.robust_correct
    # As AutoAttack's own code: FAB stops just past the boundary, and rounding may push it back.
    left = evaluation.strike(model, examples, parts, alive, eight_bit=False, **shared)
    return PerImage(clean, left, clean & ~left, time.perf_counter() - begun)


def _write(run: Run, results, verdicts) -> None:
    if jax.process_index():
        return
    about = {
        "encoder": {"name": run.encoder.name, "fingerprint": fingerprint(run.encoder.variables)},
        "downstream": {"name": run.test.name, "test": len(run.test)},
        "surrogate": {"name": run.surrogate.name, "images": len(run.surrogate)},
        "seeds": list(run.config["protocol"]["seeds"]),
        "config": run.config,
    }
    report.write_results(run.workdir / "leaderboard.json", about, results, verdicts)
    said = [
        f"Test split of {run.test.name}, {len(run.test)} images; universal attacks fitted on "
        f"{run.encoder.name} with {len(run.surrogate)} images of {run.surrogate.name}."
    ]
    report.write_leaderboard(run.workdir, results, verdicts, said)
