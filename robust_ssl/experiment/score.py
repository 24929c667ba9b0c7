"""The stage `score`: every classifier under the whole suite; what happened to each test image."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import data, report
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import attack, check_with_labels
from robust_ssl.experiment.attackers import MORE, check_half, fits
from robust_ssl.experiment.class_order import in_order_of_test
from robust_ssl.experiment.context import Context, identity
from robust_ssl.experiment.ensemble import build_autoattack
from robust_ssl.experiment.examine import examine
from robust_ssl.experiment.groups import (
    Scorer,
    outcomes,
    threat_name,
)
from robust_ssl.experiment.jobs import Job, all_jobs, build_per_image
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory, WorkdirError, digest, load_arrays, save_arrays
from robust_ssl.xla import release_programs

OUTCOMES = "outcomes.npz"
# Entries that may come and go: what the others' scores are made from does not change by it.
_ATTACKERS = tuple(
    f"scoring.{entry}"
    for entry in (
        "per_image.attacks",
        "per_image.budgets",
        "autoattack.budgets",
        "labelled",
        "twin",
        "half_twin",
    )
)


# --- What is scored -----------------------------------------------------------------------------


def saved_classifiers(context: Context) -> dict[str, Classifier]:
    """Returns the classifiers from elsewhere, by name.

    Raises:
      ValueError: If one cannot be read, or does not fit the test split.
    """
    return context.once("classifiers", lambda: _load_saved(context))


def _load_saved(context: Context) -> dict[str, Classifier]:
    classifiers = {}
    for name, source in context.plan.classifiers.items():
        try:
            classifiers[name] = in_order_of_test(context, name, source.load())
            _check_fits(context, classifiers[name])
        except (ValueError, TypeError, OSError) as error:
            error.add_note(f"in config.classifiers.{name}")
            raise
    return classifiers


def _trained(context: Context) -> dict[str, Classifier]:
    """The classifiers of the scored recipes, with every seed, by model name."""
    return {
        train.model_name(*pair): train.load_trained(context, *pair)
        for pair in train.scored(context, train.trained(context))
    }


def _check_fits(context: Context, classifier: Classifier) -> None:
    size, public, classes = classifier.image_size, context.encoder.image_size, context.num_classes
    if size != public:
        raise ValueError(
            f"the classifier takes {size} x {size} pixels and the public encoder "
            f"{context.encoder.name} {public} x {public}: perturbations fitted on one do not fit "
            "the other; take the encoder that the classifier was built on (config.encoder)"
        )
    data.check_image_size(context.test, size)
    if classifier.num_classes != classes:
        raise ValueError(
            f"the classifier has {classifier.num_classes} classes and {context.test.name} "
            f"{classes}: it was made for another task; change config.downstream or the classifier"
        )


# --- Attacks ------------------------------------------------------------------------------------


def check(context: Context) -> None:
    """Builds and traces every attack on every classifier without running it.

    Raises:
      ValueError: With what is wrong and what to do.
      ConfigChangedError: If the workdir has figures that were scored otherwise.
    """
    scoring = context.plan.scoring
    context.check_unchanged("score", {"scoring": scoring}, _ATTACKERS)
    check_with_labels(context)
    if scoring.half_twin:
        check_half(context)
    context.parallel.check_batch(scoring.batch_size)
    if scoring.autoattack.budgets:
        context.parallel.check_batch(scoring.autoattack.batch_size)
    budgets = scoring.per_image.scored
    names = [(budget.epsilon, threat_name(budget.threat)) for budget in budgets]
    for place, name in enumerate(names):
        if name in names[:place]:
            alike = [budgets[i].text for i in (names.index(name), place)]
            raise ValueError(
                "config.scoring.per_image has two budgets that tables call "
                f"{report.budget(*name)}: {alike[0]!r} and {alike[1]!r}; score one of them in "
                "another working directory"
            )
    built = [build_per_image(context, budget) for budget in budgets]
    models = [train.untrained(context, recipe) for recipe in context.plan.scored]
    traced = set()  # one of each kind: most classifiers and the members of AutoAttack are alike
    for classifier in [*models, *saved_classifiers(context).values()]:
        attacks = [attack for by_name in built for attack in by_name.values()]
        for _, ensemble in build_autoattack(context, classifier.num_classes):
            attacks += itertools.chain.from_iterable(ensemble.values())
        for attack_value in attacks:
            leaves, structure = jax.tree.flatten((attack_value, classifier))
            kind = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            if kind not in traced:
                _trace(attack_value, classifier, context.test.image_shape)
                traced.add(kind)


def _trace(attack: Any, classifier: Classifier, image_shape: tuple[int, ...]) -> None:
    """Traces an attack, so that one which does not suit the classifier is refused at the start."""
    image, label = jnp.zeros(image_shape), jnp.zeros((), jnp.int32)
    jax.eval_shape(lambda a, c: a(jax.random.key(0), c, image, label), attack, classifier)


# --- The stage ----------------------------------------------------------------------------------


def score(context: Context) -> StageDirectory:
    """Scores every classifier under the whole suite.

    Universal perturbations are crafted on the public encoder and again on each classifier's own (a
    classifier whose encoder did not move is attacked with the public ones).  Per-image attacks see
    the public encoder, where they need no label, and the classifier itself.  Each attack is scored
    by itself and in the worst case per image; a group of attacks is kept as soon as it is done, so
    an interrupted stage goes on where it was.

    Returns:
      The stage's directory: ``results`` and ``verdicts`` of ``results.json``, and
      ``outcomes.npz``: which images stayed right (`groups.outcomes`).
    """
    scoring = context.plan.scoring
    models = {**_trained(context), **saved_classifiers(context)}
    if not models:
        raise FloatingPointError("nothing is left to score: every recipe failed")
    public = attack(context)
    made = fits(context, models, public)
    inputs = {
        **{f"classifier/{name}": identity(model) for name, model in models.items()},
        **{f"attack/{name}": stage.fingerprint for name, stage in made["hardened"].items()},
        **{
            f"{against}/{name}": stage.fingerprint
            for against in MORE
            for name, stage in made[against].items()
        },
        "attack": public.fingerprint,
        "test": context.test.fingerprint(),
    }
    # A seed that comes later gives the first one another twin: not a change of the old one.
    twins = {f"twin/{name}": stage.path.name for name, stage in made["twin"].items()}
    told = {f"{n}/{twins[n]}" if n in twins else n: value for n, value in inputs.items()}
    how = {"collects": True, "places": _ATTACKERS, "redo": True, "made": "scored"}
    with context.open("score", {"scoring": scoring}, told, **how) as stage:
        if stage.done:
            return stage
        jobs = all_jobs(context, models, made)
        results, verdicts, right = _score_all(context, stage, models, jobs, inputs)
        if jax.process_index() == 0:
            save_arrays(stage.path / OUTCOMES, right, OUTCOMES)
        # Kept, since a set that is read on demand would have to be read again to say so.
        shared = context.shared if scoring.checks else None
        split = {
            "test_among_train": shared and shared.count,
            "test_distinct": shared and shared.distinct,
        }
        stage.finish({"results": results, "verdicts": verdicts, **split})
    return stage


def _score_all(
    context: Context,
    stage: StageDirectory,
    models: Mapping[str, Classifier],
    jobs: Mapping[str, Sequence[Job]],
    inputs: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, np.ndarray]]:
    """Returns the results of all models, their verdicts, and which images stayed right."""
    scoring = context.plan.scoring
    results, verdicts, right = [], {}, {}
    total = sum(job.parts for of_model in jobs.values() for job in of_model)
    with context.progress.stage("score", total) as bar:
        done = itertools.count(1)
        for name, model in models.items():
            release_programs()
            scored = []
            quiet = Scorer(
                context, stage, scoring.batch_size, origin=origin_of(stage, inputs, name)
            )
            for job in jobs[name]:
                doing = f"{name} under {job.name}"
                bar.update(doing=doing)
                on_part = functools.partial(_advance, bar, done, doing)
                origin = origin_of(stage, inputs, name, job.settings, job.kinds)
                scored.append(job.run(dataclasses.replace(quiet, on_part=on_part, origin=origin)))
            bar.update(doing=f"examining the figures of {name}")
            verdicts[name] = (
                examine(quiet, name, model, scored, inputs[f"classifier/{name}"])
                if scoring.checks
                else {"verdict": "not examined", "checks": []}
            )
            for group in scored:
                results += group.entries(verdicts[name]["verdict"])
            right |= outcomes(scored)
    return results, verdicts, right


def read_outcomes(stage: StageDirectory) -> dict[str, np.ndarray]:
    """Returns what `score` left in ``outcomes.npz``; see `groups.outcomes`.

    Raises:
      WorkdirError: If a process cannot read it (a network disk may show it a minute late).
    """
    right = load_arrays(stage.path / OUTCOMES, OUTCOMES)
    if right is None:
        raise WorkdirError(
            f"{stage.path / OUTCOMES} cannot be read by all processes; give all of them the same "
            "disk and run the same command again, which makes it anew from what was scored"
        )
    return right


def origin_of(
    stage: StageDirectory,
    inputs: Mapping[str, str],
    model: str,
    settings: Any = None,
    kinds: Sequence[str] = ("attack", *MORE),
) -> str:
    """Identifies what a model's scores are made from: other models may come to it and go.

    Args:
      stage: The stage `score`.
      inputs: Fingerprints of what it reads.
      model: The model's name.
      settings: What they depend on, JSON-able; None is all of ``config.scoring``.
      kinds: The fitted perturbations among it besides the public ones; by default all.
    """
    manifest = stage.manifest
    shared = {n: v for n, v in manifest["inputs"].items() if "/" not in n or n[:5] == "code/"}
    own = {"classifier": inputs.get(f"classifier/{model}")}
    own |= {kind: inputs[f"{kind}/{model}"] for kind in kinds if f"{kind}/{model}" in inputs}
    settings = manifest["config"] if settings is None else settings
    return digest([settings, manifest["seed"], shared, own])[:16]


def _advance(bar: Any, done: Iterator[int], doing: str) -> None:
    bar.update(next(done), doing=doing)
