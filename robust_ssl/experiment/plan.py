"""The one place that reads a config: text in, typed and linked values out.

Whatever a config gets wrong fails in `plan`, with near names, before data are read or anything is
written.  Below it nobody sees a mapping of settings or looks a name up.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from robust_ssl import threats
from robust_ssl.build import (
    Seed,
    check_known,
    inside,
    near,
    read,
    read_entries,
    text_of,
    without_none,
)
from robust_ssl.experiment.audit_section import Audit
from robust_ssl.experiment.grid import check_values, points
from robust_ssl.experiment.linking import check_against, entries_of, in_order, link, read_common
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.experiment.scoring_section import Scoring
from robust_ssl.experiment.screening import Screening, check_models
from robust_ssl.experiment.sections import (
    Analyze,
    Compare,
    Pretrain,
    SavedClassifier,
    Sweep,
    Training,
)
from robust_ssl.experiment.sources import Data, Downstream, EncoderSource
from robust_ssl.experiment.suites import Suite, check_names
from robust_ssl.report.claims import check_claim
from robust_ssl.types import Encoder

STAGES = ("pretrain", "attack", "train", "score", "screen", "compare", "audit", "sweep", "analyze")
# What each stage reads of the config; `compare` and `sweep` run what they need of the others.
NEEDS = {
    "pretrain": ("pretrain",),
    "attack": ("encoder", "surrogate", "suite"),
    "train": ("encoder", "downstream", "recipes"),
    "score": ("encoder", "surrogate", "downstream", "suite"),
    "screen": ("encoder", "surrogate", "downstream", "suite"),
    "compare": ("encoder", "surrogate", "downstream", "suite", "recipes"),
    "audit": ("encoder", "surrogate", "downstream", "suite", "recipes", "audit"),
    "sweep": ("encoder", "surrogate", "downstream", "suite", "recipes", "sweep"),
    "analyze": ("encoder", "surrogate", "downstream", "suite"),
}


class UsageError(ValueError):
    """The config, or the data it names, cannot be used; known before the first step."""

    @classmethod
    def of(cls, error: Exception) -> UsageError:
        """Returns what an error says, with its notes: where in the config it happened."""
        notes = getattr(error, "__notes__", [])
        # JAX adds a paragraph on its own traceback, which no user sees here.
        places = [note for note in notes if "JAX_TRACEBACK_FILTERING" not in note]
        return cls("; ".join([str(error), *places]))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config, read.  Its fields are the config's sections.

    Attributes:
      stages: What is run, in order.
      seed: The integer that all random keys derive from.
      encoder: The public encoder: what the attacker knows and the defender starts from.
      surrogate: The attacker's images.
      downstream: The defender's images.
      suite: The downstream-agnostic attacks.
      training: What all recipes share.
      recipes: By name, linked.
      classifiers: Classifiers from elsewhere that are scored too.
      scoring: How classifiers are scored.
      screening: How inputs are screened for attacks.
      compare: How recipes are held against each other.
      audit: What is decided on, and by which policy and answers.
      sweep: A grid over a recipe.
      analyze: Where attacks work.
      pretrain: How the public encoder is made, where it is.
    """

    stages: tuple[str, ...] = ("attack", "train", "score", "compare")
    seed: Seed = 0
    encoder: EncoderSource = EncoderSource()  # noqa: RUF009 (frozen)
    surrogate: Data | None = None
    downstream: Downstream | None = None
    suite: Suite | None = None
    training: Training = dataclasses.field(default_factory=Training)
    recipes: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)
    classifiers: Mapping[str, SavedClassifier] = dataclasses.field(default_factory=dict)
    scoring: Scoring = dataclasses.field(default_factory=Scoring)
    screening: Screening = dataclasses.field(default_factory=Screening)
    compare: Compare = dataclasses.field(default_factory=Compare)
    audit: Audit | None = None
    sweep: Sweep | None = None
    analyze: Analyze = dataclasses.field(default_factory=Analyze)
    pretrain: Pretrain | None = None

    @property
    def scored(self) -> list[Recipe]:
        """The recipes that are compared, in order."""
        return [recipe for recipe in self.recipes.values() if recipe.scored]

    def in_order(self) -> Iterator[Recipe]:
        """Yields recipes so that what others need comes first."""
        return in_order(self.recipes)

    @property
    def text(self) -> dict[str, Any]:
        """Every setting, defaults among them, plain JSON values."""
        sections = {f.name: text_of(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for name, recipe in self.recipes.items():
            sections["recipes"][name] = {**recipe.text, "scored": recipe.scored}
        return {name: section for name, section in sections.items() if section is not None}


def plan(config: Mapping[str, Any]) -> Plan:
    """Reads a config: the only function that does.

    Args:
      config: Plain JSON values, or an ``ml_collections.ConfigDict``; see `Plan` for its sections.
        ``common`` has entries of all recipes that do not say otherwise themselves.

    Returns:
      Typed, linked, frozen values; `Plan.text` says all of them.

    Raises:
      UsageError: With what is wrong, where, and near names: an unknown entry, a wrong value, a
        function that is not there or does not take an option, recipes that need each other, a
        threat that cannot be saved.  Nothing has been read but the encoder, nothing written.

    Example:
      >>> plan({"stagse": ["attack"]})
      Traceback (most recent call last):
      ...
      robust_ssl.experiment.plan.UsageError: unknown entry 'stagse' in config; did you ...
    """
    from robust_ssl.settings import to_json

    try:
        entries = to_json(config)
        planned = _read(entries)
        _check(planned)
        return planned
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        raise UsageError.of(error) from error


def _read(entries: dict[str, Any]) -> Plan:
    check_known(entries, [*(field.name for field in dataclasses.fields(Plan)), "common"], "config")
    common = read_common(entries.pop("common", {}), "config.common")
    recipes = _read_recipes(entries.pop("recipes", {}), common)
    stages = read(tuple[str, ...], entries.get("stages", list(Plan().stages)), "config.stages")
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"config.stages: there is no stage {stage!r}{near(stage, STAGES)}")
    if not stages:
        raise ValueError(f"config.stages is empty; there are {', '.join(STAGES)}")
    return read_entries(Plan, entries, "config", recipes=recipes)


def _read_recipes(value: Any, common: Mapping[str, Any]) -> dict[str, Recipe]:
    recipes = without_none(read(Mapping[str, Any], value, "config.recipes"))
    check_names(recipes, "config.recipes")
    whole = {n: entries_of(v, common, f"config.recipes.{n}") for n, v in recipes.items()}
    return link(whole, "config.recipes")


def with_recipes(planned: Plan, entries: Mapping[str, Mapping[str, Any]]) -> Plan:
    """Returns a plan with more recipes, of complete entries; those it has stay as they are."""
    known = {n: {**recipe.text, "scored": recipe.scored} for n, recipe in planned.recipes.items()}
    linked = link({**known, **entries}, "config.recipes")
    return dataclasses.replace(planned, recipes={**linked, **planned.recipes})


# --- What sections say of each other ------------------------------------------------------------


def _check(planned: Plan) -> None:
    for stage in planned.stages:
        for section in NEEDS[stage]:
            if section == "encoder":
                made = "pretrain" in planned.stages or planned.pretrain is not None
                if planned.encoder.is_pretrained and not made:
                    raise ValueError(f"the stage {stage!r} needs config.encoder")
            elif not getattr(planned, section):
                raise ValueError(f"the stage {stage!r} needs config.{section}")
    if {"score", "screen"} & {*planned.stages} and not planned.recipes | planned.classifiers:
        raise ValueError(
            "config.classifiers is empty; name what is to be scored, for example "
            "--config.classifiers.secured.path=runs/gtsrb/recipes/gen_af-seed0"
        )
    _check_names(planned)
    _check_names_in_sections(planned)
    if {"score", "compare", "audit"} & {*planned.stages}:
        scored = [recipe.name for recipe in planned.scored]
        planned.scoring.check(planned.stages, planned.training.seeds, scored)
    if {"compare", "audit", "sweep"} & {*planned.stages}:
        _check_compare(planned)
    if planned.pretrain is not None:
        with inside("config.pretrain.encoder"):
            _shape(EncoderSource(function=planned.pretrain.encoder))
    if set(planned.stages) != {"pretrain"}:
        _check_sections(planned, encoder_shape(planned))


def _check_names_in_sections(planned: Plan) -> None:
    """Refuses names that sections have of recipes and attacks which are not there."""
    # What a section says is checked, whether its stage runs or not.
    compared = bool({"compare", "audit", "sweep"} & {*planned.stages})
    for entry in ("reference", "baseline"):
        name = getattr(planned.compare, entry)
        if compared or (planned.recipes and name != getattr(Compare(), entry)):
            _check_recipe_name(planned, f"config.compare.{entry}", name)
    for number, claim in enumerate(planned.compare.claims if compared else ()):
        with inside(f"config.compare.claims[{number}]"):
            check_claim(claim, list(planned.recipes))
            limit = planned.downstream and planned.downstream.test_limit
            if claim.get("seen") and limit:
                raise ValueError(
                    f"seen={claim['seen']} leaves out images of the whole test split, of which "
                    f"config.downstream.test_limit={limit} takes others; leave test_limit out"
                )
    check_models(planned.screening, [*planned.recipes, *planned.classifiers])
    if planned.sweep is not None:
        _check_sweep(planned)
    if planned.audit is not None:
        planned.audit.check_names([r.name for r in planned.scored], planned.classifiers)
    if "analyze" in planned.stages or planned.analyze != Analyze():
        _check_transfer(planned)


def _check_recipe_name(planned: Plan, place: str, name: str) -> None:
    if name not in planned.recipes:
        raise ValueError(
            f"{place} is {name!r}, which is not in config.recipes{near(name, planned.recipes)}"
        )


def _check_names(planned: Plan) -> None:
    """Refuses names of which two would be one directory, one model or one stage."""
    models: dict[str, str] = {}
    names = [(n, f"config.recipes.{n}") for n in planned.recipes]
    names += [(n, f"config.classifiers.{n}") for n in planned.classifiers]
    check_names(planned.classifiers, "config.classifiers")
    for name, place in names:
        if name in STAGES or name in ("cost", "recipes"):
            raise ValueError(f"{place}: {name!r} is a stage's name; take another one")
        _, mark, seed = name.rpartition("-seed")
        if mark and seed.isdigit():
            raise ValueError(f"{place}: a name must not end in -seed{seed}, as seeds are added")
        if (same := models.setdefault(name.casefold(), place)) != place:
            raise ValueError(f"{place} and {same} are one name to a disk; rename one")


def encoder_shape(planned: Plan) -> Encoder:
    """Returns the public encoder; where it is yet to be trained, one of its shape."""
    if planned.encoder.is_pretrained:
        return _shape(EncoderSource(function=planned.pretrain.encoder))
    with inside("config.encoder"):
        return _shape(planned.encoder)


def _shape(source: EncoderSource) -> Encoder:
    builder, _ = source.own_builder
    try:
        if source.function is None or builder is not None:  # yours may keep what it has made once
            return source.load(jax.random.key(0))
        return jax.eval_shape(source.load, jax.random.key(0))  # no weights are made
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the encoder cannot be built: {error}") from error


def check_recipe_text(planned: Plan, name: str) -> None:
    """Raises ValueError unless a recipe suits the encoder that it is built on."""
    _check_recipe(planned.recipes[name], encoder_shape(planned))


def _check_recipe(recipe: Recipe, encoder: Encoder) -> None:
    source, place = recipe.public_encoder(), f"config.recipes.{recipe.name}"
    with inside(f"{place}.encoder"):
        own = encoder if source is None else _shape(source)
    if own.image_size != encoder.image_size:
        raise ValueError(
            f"{place}: its encoder, {own.name}, takes images of {own.image_size} pixels and the "
            f"run's, {encoder.name}, of {encoder.image_size}; take another one for it, or leave "
            "the recipe out"
        )
    check_against(recipe, own, place)


def _check_sections(planned: Plan, encoder: Encoder) -> None:
    for recipe in planned.in_order():
        _check_recipe(recipe, encoder)
    for name in ("surrogate", "downstream"):
        source = getattr(planned, name)
        if source is not None and source.resizing is not None:
            with inside(f"config.{name}.resizing"):
                source.resizing.size(source.image_size or encoder.image_size)
    shape = (encoder.image_size, encoder.image_size, 3)
    suites = {"config.suite": planned.suite, "config.scoring.labelled": planned.scoring.labelled}
    for place, suite in suites.items():
        for name, attack in suite.attacks.items() if suite else ():
            with inside(f"{place}.attacks.{name}"):
                for budget in attack.budgets:
                    threats.check(attack.make_threat(budget), shape)
    budgets = [*planned.scoring.per_image.scored, *planned.scoring.autoattack.budgets]
    with inside("config.scoring"):
        for budget in budgets:
            threats.check(budget.threat, shape)


def _check_compare(planned: Plan) -> None:
    reference = planned.recipes[planned.compare.reference]
    if not reference.is_trained:
        raise ValueError(
            f"config.compare.reference is {reference.name!r}, in which nothing is trained: costs "
            "cannot be relative to its"
        )
    if reference.cache_features:
        raise ValueError(
            f"config.compare.reference is {reference.name!r}, which caches features: its updates "
            "do not pass the encoder, so costs cannot be relative to its; name another one"
        )
    for recipe in planned.recipes.values():
        if recipe.is_trained and recipe.batch_size != reference.batch_size:
            raise ValueError(
                f"costs are compared at one batch size, but {reference.name} has "
                f"{reference.batch_size} and {recipe.name} {recipe.batch_size}"
            )
    if {"compare", "audit"} & {*planned.stages} and not planned.scoring.adaptive:
        raise ValueError(
            "config.scoring.adaptive must be true: the comparison has the suite crafted again on "
            "the hardened encoder"
        )
    if not any(a.is_linf and not a.is_noise for a in planned.suite.attacks.values()):
        raise ValueError(
            "config.suite.attacks has only noise, or other threats and budgets than Linf at "
            f"config.suite.epsilon, {planned.suite.epsilon}, under which recipes are compared"
        )


def _check_sweep(planned: Plan) -> None:
    name = planned.sweep.recipe
    _check_recipe_name(planned, "config.sweep.recipe", name)
    with inside("config.sweep.grid"):
        points(planned.recipes[name], planned.sweep.grid)
        check_values(planned.recipes[name], planned.sweep.grid)


def _check_transfer(planned: Plan) -> None:
    transfer = planned.analyze.transfer
    if transfer.attack not in planned.suite.attacks:
        raise ValueError(
            f"config.analyze.transfer.attack is {transfer.attack!r}, which is not in "
            f"config.suite.attacks{near(transfer.attack, planned.suite.attacks)}"
        )
    place = "config.analyze.transfer.encoders"
    # Each has a directory and a row of the matrix, called by the last part of its path.
    names = [pathlib.PurePath(path).name for path in transfer.encoders]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{place}: the last parts of paths are names, and names must differ: {names}"
        )
    for path in transfer.encoders:
        with inside(place):
            EncoderSource.read(path, place)
