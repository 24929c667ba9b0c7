"""From the text of recipes to recipes: defaults filled in, names linked, parameters matched."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import finetuning, models, optimizers
from robust_ssl.build import (
    Function,
    Positive,
    Share,
    annotations,
    check_known,
    inside,
    near,
    read,
    read_entries,
    text_of,
)
from robust_ssl.experiment import features
from robust_ssl.experiment.recipe import HEADS, LOSSES, MIXED, Recipe, Selection
from robust_ssl.models.bridge import refuse_bridge
from robust_ssl.models.contract import check_module, check_network
from robust_ssl.settings.overrides import MAY_HAVE_OTHERS, OTHERS
from robust_ssl.types import Encoder

ENTRIES = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "text"))
# Came later: where they do nothing no text has them, so workdirs from before them go on.
LATER = {
    "ramp": None,
    "teacher": None,
    "ema": 0.0,
    "accumulate": 1,
    "step_bytes": None,
    "remat": False,
    "cache_features": False,
    "last_blocks": None,
    "lora": None,
}
# An entry that is there decides on others, which are then none: a text that had both, read again,
# would seem to say both.
DECIDED = {
    "members": tuple(name for name in ENTRIES if name not in ("members", "scored")),
    "start": ("head", "encoder"),
    "select": ("rates",),
}


def entries_of(value: Any, common: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns all entries of a recipe, defaults and what its function returns among them.

    Args:
      value: A mapping of `Recipe`'s entries; ``"module:function"`` of a function that returns one;
        or ``{"function": ..., **options}``: options that the function does not take replace what
        it returns, of ``select``, ``attack``, ``ramp`` and ``lora`` setting by setting.
      common: Entries of all recipes that do not say otherwise.
      where: Its name, for errors.
    """
    given = {"function": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping or a function's name, got {value!r}")
    own = given.get("losses")
    given = _with_others(given, common, where)
    if "function" in given:
        given = _from_function(given, common, where)
    check_known(given, (*ENTRIES, "function"), where)
    entries = {**common, **given}
    if "patience" not in given and entries.get("best") == "last":
        entries.pop("patience", None)  # where no epoch is judged, none can be better
    # By themselves first: a wrong one decides nothing.
    kinds = {"start": str | None, "teacher": str | None, "select": Selection | None}
    for name, kind in kinds.items():
        read(kind, given.get(name), f"{where}.{name}")
    read(tuple[str, ...], given.get("members", ()), f"{where}.members")
    for decider, names in DECIDED.items():
        for name in names if entries.get(decider) else ():
            if given.get(name) is not None:
                raise ValueError(
                    f"{where} has both {decider!r} and {name!r}, which the first decides; give one"
                )
    text = {}
    for field in dataclasses.fields(Recipe):
        if field.name in ENTRIES:
            missing = field.default_factory is dataclasses.MISSING
            default = field.default if missing else field.default_factory()
            with inside(f"{where}.{field.name}"):
                text[field.name] = text_of(entries.get(field.name, default))
    text = {n: v for n, v in undecided(text).items() if n not in LATER or v != LATER[n]}
    if text.get("losses") and isinstance(text["losses"], Mapping):
        if read(Share | None, text["adv_ratio"], f"{where}.adv_ratio") is not None:
            _check_mixed(own, where)
        text["losses"] = _losses_text(text)
    return text


def undecided(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that no other one decides on."""
    deciders = [decider for decider in DECIDED if entries.get(decider)]
    decided = {name for decider in deciders for name in DECIDED[decider]}
    return {name: entry for name, entry in entries.items() if name not in decided}


def read_common(value: Any, where: str) -> dict[str, Any]:
    """Returns the entries of all recipes, each tried by itself: else a recipe would be blamed."""
    common = dict(read(Mapping[str, Any], value, where))
    check_known(common, ENTRIES, where)
    for name in ("start", "teacher", "members"):
        if name in common:
            raise ValueError(
                f"{where}.{name}: recipes cannot all be made from one of them; say it in each"
            )
    check_each(common, where)
    return common


def check_each(entries: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for an entry that is wrong by itself, whatever the others are."""
    hints = annotations(Recipe)
    for name, entry in entries.items():
        place = f"{where}.{name}"
        if name == "rates":
            _check_rates(entry, place)
        elif name == "head":
            _read_head(entry, place)
        elif name not in ("start", "teacher", "members"):
            read(hints[name], entry, place)


def _with_others(
    given: Mapping[str, Any], common: Mapping[str, Any], where: str
) -> Mapping[str, Any]:
    """Fills in what a recipe has besides a loss or a rate that was given with `OTHERS`."""
    for name in MAY_HAVE_OTHERS:
        entry = given.get(name)
        if isinstance(entry, Mapping) and entry.get(OTHERS):
            rest = {n: value for n, value in given.items() if n != name}
            made = entries_of(rest, common, where).get(name)
            own = {n: value for n, value in entry.items() if n != OTHERS}
            beside = dict(made) if isinstance(made, Mapping) else {}
            if name == "rates":  # of patterns the later one counts
                beside = {p: r for p, r in beside.items() if not _covers(own, p)}
            given = {**given, name: beside | {n: _merged(beside, n, v) for n, v in own.items()}}
    return given


def _covers(patterns: Iterable[str], other: str) -> bool:
    return any(other != pattern and fnmatch.fnmatchcase(other, pattern) for pattern in patterns)


def _merged(beside: Mapping[str, Any], name: str, value: Any) -> Any:
    """Returns a loss of which only the weight was given as the one that is there, with it."""
    before = beside.get(name)
    options = isinstance(value, Mapping) and "function" not in value
    return {**before, **value} if options and isinstance(before, Mapping) else value


def _from_function(
    given: Mapping[str, Any], common: Mapping[str, Any], where: str
) -> dict[str, Any]:
    function = Function.read(given["function"], where).function
    parameters = inspect.signature(function).parameters
    # What it cannot do without, such as the epochs that `free_at` shares out, all recipes may say.
    needed = [n for n, parameter in parameters.items() if parameter.default is parameter.empty]
    options = {n: common[n] for n in needed if n in common}
    options |= {n: v for n, v in given.items() if n in parameters}
    rest = {n: v for n, v in given.items() if n not in parameters and n != "function"}
    check_known(rest, [*parameters, *ENTRIES], where)
    made = Function.read({"function": given["function"], **options}, where)()
    if not isinstance(made, Mapping):
        raise ValueError(
            f"{where}: {given['function']} must return a mapping of a recipe's entries"
        )
    for name in ("select", "attack", "ramp", "lora"):
        # Settings of one thing: those that are not said stay, unless it is another thing.
        override, before = rest.get(name), made.get(name)
        settings = isinstance(override, Mapping) and isinstance(before, Mapping)
        if settings and "function" not in override:
            rest[name] = {**before, **override}
    return {**made, **rest}


def _losses_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Each loss with its weight, for a sweep; of the two that `adv_ratio` weighs, the options."""
    losses = {}
    for name, loss in text["losses"].items():
        if text["adv_ratio"] is None or name not in MIXED:
            bare = isinstance(loss, str)
            losses[name] = {"function": loss, "weight": 1.0} if bare else loss
        elif isinstance(loss, Mapping):
            options = {n: v for n, v in loss.items() if n not in ("function", "weight")}
            if options:
                losses[name] = {"function": f"{LOSSES}{name}", **options}
    return losses


def _check_mixed(losses: Any, where: str) -> None:
    """Raises ValueError for a loss that `adv_ratio` weighs and that is given as another one."""
    for name in MIXED if isinstance(losses, Mapping) else ():
        loss, place = losses.get(name), f"{where}.losses.{name}"
        entry = {"function": loss} if isinstance(loss, str) else {} if loss is None else loss
        if not isinstance(entry, Mapping):
            raise ValueError(f"{place} must be a function's name or a mapping, got {loss!r}")
        if "weight" in entry:
            raise ValueError(
                f"{place}.weight is what adv_ratio decides: clean cross-entropy weighs 1 - "
                "adv_ratio, adversarial adv_ratio; give that, or adv_ratio=None and both weights"
            )
        if entry.get("function", f"{LOSSES}{name}") != f"{LOSSES}{name}":
            raise ValueError(
                f"{place}: with adv_ratio it is {LOSSES}{name}; give yours another name, or "
                "adv_ratio=None"
            )


def _mixed(ratio: float, own: Mapping[str, Any]) -> dict[str, Any]:
    """The losses that a ratio means; one of weight 0 would cost a pass for nothing."""
    weights = zip(MIXED, (1 - ratio, ratio), strict=True)
    mixed = {n: {"function": f"{LOSSES}{n}", "weight": weight} for n, weight in weights if weight}
    mixed = {n: {**loss, **own.get(n, {})} for n, loss in mixed.items()}
    return mixed | {n: loss for n, loss in own.items() if n not in MIXED}


def link(entries: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Recipe]:
    """Returns recipes with their starts and members as values.

    Args:
      entries: Of each recipe, by name; see `entries_of`.
      where: What they stand in, for errors: ``"config.recipes"``.

    Raises:
      ValueError: If a recipe names none that is there, starts over others from itself, or starts
        from an ensemble.
    """
    recipes: dict[str, Recipe] = {}

    def build(name: str, path: tuple[str, ...]) -> Recipe:
        if name in path:
            chain = " <- ".join([*path[path.index(name) :], name])
            raise ValueError(f"{where}: recipes start from each other: {chain}")
        if name not in recipes:
            recipes[name] = _linked(name, entries, where, lambda n: build(n, (*path, name)))
        return recipes[name]

    for name in entries:
        build(name, ())
    return {name: recipes[name] for name in entries}


def _linked(name: str, entries: Mapping[str, Any], where: str, get: Any) -> Recipe:
    place = f"{where}.{name}"
    mine = entries[name]
    members = read(tuple[str, ...], mine["members"], f"{place}.members")
    start = read(str | None, mine.get("start"), f"{place}.start")
    teacher = read(str | None, mine.get("teacher"), f"{place}.teacher")
    others = [("start", start), ("teacher", teacher), *(("members", name) for name in members)]
    for entry, other in others:
        if other is not None and other not in entries:
            raise ValueError(f"{place}.{entry}: there is no recipe {other!r}{near(other, entries)}")
    start = None if start is None else get(start)
    if start is not None and start.members:
        raise ValueError(
            f"{place}.start: {start.name!r} is an ensemble, from which nothing can be trained; "
            "start from one of its members"
        )
    text = {entry: value for entry, value in mine.items() if entry != "scored"}
    linked = {"name": name, "start": start, "members": tuple(map(get, members)), "text": text}
    linked["teacher"] = None if teacher is None else get(teacher)
    values = {entry: value for entry, value in mine.items() if entry not in linked}
    if "rates" in values:
        _check_rates(values["rates"], f"{place}.rates")
    if values.get("adv_ratio") is not None:
        ratio = read(Share, values["adv_ratio"], f"{place}.adv_ratio")
        own = read(Mapping[str, Any], values["losses"], f"{place}.losses")
        values["losses"] = _mixed(ratio, own)
    if "head" in values:
        linked["head"] = _read_head(values.pop("head"), f"{place}.head")
    return read_entries(Recipe, values, place, **linked)


def _read_head(value: Any, where: str) -> str | Function:
    if isinstance(value, str) and ":" not in value:
        if value not in HEADS:
            raise ValueError(f"{where} is {value!r}{near(value, HEADS)}")
        return value
    return Function.read(value, where)


def _check_rates(value: Any, where: str) -> None:
    for pattern, rate in read(Mapping[str, Any], value, where).items():
        if rate != optimizers.FREEZE:
            if isinstance(rate, str):
                raise ValueError(f'{where}.{pattern} must be a number or "freeze", got {rate!r}')
            read(Positive, rate, f"{where}.{pattern}")


def check_against(recipe: Recipe, encoder: Encoder, where: str) -> None:
    """Raises ValueError unless a recipe suits an encoder's parameters and image size.

    Args:
      recipe: What is checked.
      encoder: The public encoder, or one with shapes in place of weights.
      where: The recipe's place in the config, for errors.
    """
    shape = (encoder.image_size, encoder.image_size, 3)
    with inside(where):
        refuse_bridge(encoder, "trained")
        check_network(encoder)
    with inside(f"{where}.attack"):
        if recipe.attack is not None:
            recipe.attack.check(shape)
    with inside(f"{where}.head"):
        params = _params(recipe, encoder)
    if recipe.select is None:
        with inside(f"{where}.rates"):
            rates = recipe.layer_rates(params, recipe.rates)
            if recipe.cache_features:
                features.check_frozen(rates)
        return
    with inside(f"{where}.select.layers"):
        recipe.select.choose(dict.fromkeys(finetuning.kernels(params), 0.0))


def _params(recipe: Recipe, encoder: Encoder) -> dict[str, Any]:
    """Shapes of a recipe's parameters but for the number of classes, which data will tell."""
    head = recipe.first.head
    shape = _named_head(head, encoder.dim) if isinstance(head, str) else _head(head(2), encoder.dim)
    return {"encoder": encoder.variables["params"], "head": shape}


@functools.cache  # thirty recipes of a comparison have the same few heads
def _named_head(name: str, dim: int) -> Any:
    return _head(models.heads.HEADS[name](2), dim)


def _head(head: Any, dim: int) -> Any:
    check_module(head)
    features = jax.ShapeDtypeStruct((1, dim), jnp.float32)
    return jax.eval_shape(head.init, jax.random.key(0), features)["params"]


def in_order(recipes: Mapping[str, Recipe]) -> Iterator[Recipe]:
    """Yields recipes so that what others need comes first."""
    done: dict[Recipe, None] = {}

    def visit(recipe: Recipe) -> None:
        for other in recipe.needs:
            visit(other)
        done.setdefault(recipe)

    for recipe in recipes.values():
        visit(recipe)
    yield from done
