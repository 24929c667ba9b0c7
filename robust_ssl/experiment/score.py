"""The stage `score`: every classifier under the whole suite; what happened to each test image."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import data, evaluation, report
from robust_ssl.build import inside, text_of
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import Fitted, attack, check_with_labels, load_perturbations
from robust_ssl.experiment.attackers import MORE, check_half, fits
from robust_ssl.experiment.class_order import in_order_of_test
from robust_ssl.experiment.context import Context, identity
from robust_ssl.experiment.ensemble import build_autoattack, score_autoattack
from robust_ssl.experiment.examine import examine
from robust_ssl.experiment.groups import (
    Group,
    Member,
    Scored,
    Scorer,
    by_budget,
    outcomes,
    per_image_members,
    sample,
    threat_name,
)
from robust_ssl.experiment.suites import Budget
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
AGAIN = {  # how a group is announced
    "hardened": ", crafted again on it",
    "twin": ", crafted on its twin",
    "half": ", crafted on its twin of half of the images",
    "labelled": ", fitted with its head and labels",
}


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


def build_per_image(context: Context, budget: Budget) -> dict[str, Any]:
    """Returns the attacks of a budget; a target's place becomes its surrogate image.

    Raises:
      ValueError: If an option is not possible.
    """
    built = {}
    for name, entry in context.plan.scoring.per_image.at(budget).items():
        with inside(f"config.scoring.per_image.attacks.{name}"):
            target = None
            if entry.target is not None:
                if not 0 <= entry.target < len(context.surrogate):
                    raise ValueError(
                        f"target {entry.target} is not the place of one of the "
                        f"{len(context.surrogate)} surrogate images"
                    )
                [image] = context.surrogate.read(np.asarray([entry.target]))["images"]
                target = evaluation.to_pixels(jnp.asarray(image))
            built[name] = entry.build(budget.threat, target)
    return built


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
        results, verdicts, right = [], {}, {}
        # Where an encoder did not move, what was crafted again is the public stage.
        stages = {one.path: one for by_model in made.values() for one in by_model.values()}
        fitted = {path: load_perturbations(context, one) for path, one in stages.items()}
        jobs = {}
        for name, model in models.items():
            of_model = {a: fitted[by[name].path] for a, by in made.items() if name in by}
            jobs[name] = _jobs(context, name, model, of_model)
        total = sum(job.parts for some in jobs.values() for job in some)
        with context.progress.stage("score", total) as bar:
            done = itertools.count(1)
            for name, model in models.items():
                release_programs()
                scored = []
                origin = origin_of(stage, inputs, name)
                quiet = Scorer(context, stage, scoring.batch_size, origin=origin)
                for job in jobs[name]:
                    doing = f"{name} under {job.name}"
                    bar.update(doing=doing)
                    step = functools.partial(_advance, bar, done, doing)
                    made_from = origin_of(stage, inputs, name, job.settings, job.kinds)
                    scored.append(
                        job.run(dataclasses.replace(quiet, on_part=step, origin=made_from))
                    )
                bar.update(doing=f"examining the figures of {name}")
                verdicts[name] = (
                    examine(quiet, name, model, scored, inputs[f"classifier/{name}"])
                    if scoring.checks
                    else {"verdict": "not examined", "checks": []}
                )
                for group in scored:
                    results += group.entries(verdicts[name]["verdict"])
                right |= outcomes(scored)
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


class _Job(NamedTuple):
    """One group to be scored.

    Attributes:
      name: For people.
      parts: In how many parts it is kept.
      run: Scores it.
      settings: What its scores are made from besides the model, JSON-able.
      kinds: The fitted perturbations among it; see `origin_of`.
    """

    name: str
    parts: int
    run: Callable[[Scorer], Scored]
    settings: Any
    kinds: tuple[str, ...] = ()


def _jobs(
    context: Context, name: str, model: Classifier, fitted: Mapping[str, Sequence[Fitted]]
) -> list[_Job]:
    scoring, jobs = context.plan.scoring, []
    count = scoring.per_image.images
    some = None if count is None else sample(context, count)

    for against, perturbations in fitted.items():
        for (threat, epsilon), members in _universal(context, perturbations, against).items():
            group = Group(name, against, "universal", threat, epsilon)
            run = functools.partial(_score, group, model, members, None)
            # On the public encoder they are an input of the stage itself.
            kinds = {"public": (), "hardened": ("attack",)}.get(against, (against,))
            jobs.append(_Job(_words(group), 1, run, [scoring.batch_size], kinds))
    for against in ("public", "hardened"):
        for budget in scoring.per_image.scored:
            built = build_per_image(context, budget)
            members = per_image_members(context, built, against, scoring.seeds)
            if members:
                threat = threat_name(budget.threat)
                group = Group(name, against, "per_image", threat, budget.epsilon)
                run = functools.partial(_score, group, model, members, some)
                settings = [scoring.batch_size, text_of(budget)]
                jobs.append(_Job(_words(group), len(members), run, settings))
    for budget, ensemble in build_autoattack(context, model.num_classes):
        group = Group(name, "hardened", "autoattack", threat_name(budget.threat), budget.epsilon)
        run = functools.partial(score_autoattack, group, model, ensemble)
        settings = [scoring.autoattack.batch_size, text_of(budget)]
        jobs.append(_Job(_words(group), len(ensemble), run, settings))
    return jobs


def _score(
    group: Group,
    model: Classifier,
    members: Sequence[Member],
    rows: np.ndarray | None,
    scorer: Scorer,
) -> Scored:
    return scorer.score(group, model, members, rows)


def _words(group: Group) -> str:
    budget = report.budget(group.epsilon, group.threat)
    if group.family != "universal":
        family = {"per_image": "per-image attacks"}.get(group.family, "AutoAttack")
        return f"{family} at {budget}"
    family = "universal attacks" if group.crafted_against == "labelled" else "the suite"
    return f"{family} at {budget}{AGAIN.get(group.crafted_against, '')}"


def _universal(
    context: Context, fitted: Sequence[Fitted], against: str
) -> dict[tuple[str, float], list[Member]]:
    """A stage's perturbations by threat and budget, those that are worth scoring."""
    suite, adaptive_curve = context.plan.suite, context.plan.scoring.adaptive_curve
    if against == "labelled":  # attacks of its own, at one budget
        return by_budget(fitted)
    scored = []
    for one in fitted:
        member = suite.attacks[one.attack]
        if against != "public":
            # Noise looks at no encoder: the public one is scored already.
            on_curve = one.epsilon != member.budgets[0]
            if member.is_noise or (on_curve and not adaptive_curve):
                continue
        scored.append(one)
    return by_budget(scored)
