"""What a recipe may say: its entries, what they are if it does not say, and what makes no sense."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

CLEAN = {"clean_cross_entropy": ("robust_ssl.losses:clean_cross_entropy", 1.0)}

# What a recipe need not say.
DEFAULTS: dict[str, Any] = {
    "start": None,  # another recipe's name; None: the public encoder and a fresh head
    "encoder": None,  # another public encoder, a path or a shipped one's name
    "head": "mlp",
    "preprocess": None,  # {"function": ..., **options}: what happens to pixels first
    "members": (),  # names of recipes: an ensemble, nothing is trained
    "prune": 0.0,  # share of the encoder's kernel weights set to zero before training
    "epochs": 0,  # 0: nothing is trained
    "batch_size": 128,
    "rates": {"encoder/**": 1e-3, "head/**": 5e-3},
    "select": None,  # options of layer sensitivity: only robust-redundant layers move
    "losses": CLEAN,
    "adv_ratio": None,  # r: clean cross-entropy weighs 1 - r, adversarial r, beside the losses
    "attack": None,
    "batch_statistics": "clean",
    "augment": "",
    "compare_with_pretrained": False,
    "weight_decay": 8e-4,
    "decay": 0.96,
    "l2_sp": 0.0,  # weight of the distance to the start
    "patience": None,  # epochs without a better one after which training stops
    "best": None,  # "clean", "robust" or "last"; None: robust where there is an attack
    "tolerance": None,  # of the interpolation guard towards the start
    "scored": True,  # whether it is a method, not only another one's start
}

# What layer sensitivity must be told (`finetune.measure_sensitivity`), and the chosen layers' rate.
SELECT = ("images", "num_steps", "learning_rate", "radius", "top_k", "top_k_fraction", "rate")

# Entries that are numbers: whether whole ones, from where to where, and whether None is one too.
_INFINITY = math.inf
NUMBERS = {
    "epochs": (True, 0, _INFINITY, False),
    "batch_size": (True, 1, _INFINITY, False),
    "patience": (True, 1, _INFINITY, True),
    "prune": (False, 0, _INFINITY, False),
    "weight_decay": (False, 0, _INFINITY, False),
    "decay": (False, 0, 1, False),
    "l2_sp": (False, 0, _INFINITY, False),
    "tolerance": (False, 0, 1, True),
}
# Entries that are mappings, and whether None is one too.
MAPPINGS = {"rates": False, "losses": False, "attack": True, "select": True, "preprocess": True}
# Options of an attack that are numbers, as far as it has them.
ATTACK_NUMBERS = {"num_steps": (True, 1, _INFINITY, False), "step_size": (False, 0, 1, True)}


def complete(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a recipe of ``config.methods`` with what it does not say.

    Args:
      config: The run's; ``config.common`` is what all recipes share, and is overridden by each.
      name: Of the recipe.

    Raises:
      ValueError: If there is no such recipe, or it has an entry that means nothing.

    Example:
      >>> config = {"common": {"epochs": 5}, "methods": {"probe": {"head": "linear"}}}
      >>> recipe = complete(config, "probe")
      >>> recipe["epochs"], recipe["head"], recipe["attack"]
      (5, 'linear', None)
    """
    methods = config["methods"]
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=3) or sorted(methods)
        raise ValueError(f"config.methods has no {name!r}; near names: {', '.join(near)}")
    given = {**config.get("common", {}), **methods[name]}
    if "patience" not in methods[name] and given.get("best") == "last":
        given.pop("patience", None)  # where no epoch is judged, none can be better
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], DEFAULTS, n=3) or sorted(DEFAULTS)
        raise ValueError(
            f"the recipe {name!r} has an entry {unknown[0]!r} that means nothing; near names: "
            f"{', '.join(near)}"
        )
    ignored = sorted({"head", "encoder"} & set(methods[name])) if methods[name].get("start") else ()
    if ignored:
        raise ValueError(
            f"the recipe {name!r} has both a start and {ignored[0]!r}, which its start decides; "
            "give one"
        )
    recipe = {**DEFAULTS, **given}
    if recipe["adv_ratio"] is not None:
        mixed = _mixed(name, recipe["adv_ratio"])
        recipe["losses"] = {
            loss: entry for loss, entry in {**recipe["losses"], **mixed}.items() if entry[1]
        }
    return recipe


def _mixed(name: str, adv_ratio: float) -> dict[str, tuple[str, float]]:
    if not 0 <= adv_ratio <= 1:
        raise ValueError(f"the recipe {name!r}: adv_ratio must be in [0, 1], got {adv_ratio}")
    weights = {"clean_cross_entropy": 1 - adv_ratio, "adversarial_cross_entropy": adv_ratio}
    return {loss: (f"robust_ssl.losses:{loss}", weight) for loss, weight in weights.items()}


def scored(config: Mapping[str, Any]) -> list[str]:
    """Returns the names of the recipes that are methods, in order."""
    return [name for name in config["methods"] if complete(config, name)["scored"]]


def made_from(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the recipes that one needs first: its members, or its start."""
    return (*recipe["members"], *filter(None, [recipe["start"]]))


def chain(config: Mapping[str, Any], name: str) -> list[str]:
    """Returns a recipe with all that it starts from, each once."""
    needed, waiting = [], [name]
    while waiting:
        other = waiting.pop()
        if other not in needed:
            needed.append(other)
            waiting += made_from(complete(config, other))
    return needed


def check_chain(config: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if a recipe starts, over others, from itself."""
    path = [name]
    waiting = [(name, path)]
    while waiting:
        name, path = waiting.pop()
        recipe = complete(config, name)
        for other in made_from(recipe):
            if other in path:
                raise ValueError(f"recipes start from each other: {' <- '.join([*path, other])}")
            waiting.append((other, [*path, other]))


def check_values(recipe: Mapping[str, Any]) -> None:
    """Raises ValueError, with the entry's name, unless every value is of the kind it must be."""
    for name, optional in MAPPINGS.items():
        value = recipe[name]
        if not (isinstance(value, Mapping) or (optional and value is None)):
            raise ValueError(f"{name} must be a mapping{' or None' * optional}, got {value!r}")
    for name, kind in NUMBERS.items():
        _check_number(name, recipe[name], *kind)
    for name, kind in ATTACK_NUMBERS.items():
        if name in (recipe["attack"] or {}):
            _check_number(f"attack.{name}", recipe["attack"][name], *kind)
    if recipe["decay"] == 0 or (recipe["attack"] or {}).get("step_size") == 0:
        raise ValueError("decay and attack.step_size must be above 0: nothing would move")
    for name, entry in recipe["losses"].items():
        weight = entry[1] if isinstance(entry, list | tuple) and len(entry) > 1 else 0.0
        _check_number(f"the weight of the loss {name!r}", weight, False, -_INFINITY, _INFINITY)
    _check_epochs(recipe)


def _check_number(
    name: str, value: Any, whole: bool, low: float, high: float, optional: bool = False
) -> None:
    if optional and value is None:
        return
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        if high == _INFINITY:
            limits = f"of at least {low}" if low > -_INFINITY else ""
        else:
            limits = f"in [{low}, {high}]"
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} must be a {kind} {limits}".rstrip() + f", got {value!r}")


def _check_epochs(recipe: Mapping[str, Any]) -> None:
    """How many epochs there are, and which of them is kept."""
    best, patience = recipe["best"], recipe["patience"]
    if best not in (None, "clean", "robust", "last"):
        raise ValueError(f'best must be "clean", "robust" or "last", got {best!r}')
    if best == "robust" and recipe["attack"] is None:
        raise ValueError('best="robust" needs an attack: without one only "clean" is validated')
    if patience is not None and best == "last":
        raise ValueError(
            f"patience={patience} with best={best!r}: stopping early needs a validated epoch to "
            "judge by"
        )
