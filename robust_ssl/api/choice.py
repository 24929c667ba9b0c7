"""Which attacks a classifier is measured with: names, perturbations and values, by budget."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

from robust_ssl import threats
from robust_ssl.api.attacking import Perturbation, refuse_class
from robust_ssl.api.names import AUTOATTACK, PER_IMAGE, UNIVERSAL
from robust_ssl.attacks import UniversalPerturbation, autoattack
from robust_ssl.build import Function, names_function, near
from robust_ssl.evaluation import WORST
from robust_ssl.experiment.groups import Group, threat_name

EPSILON = 8 / 255  # the usual budget of attacks on single images
TAKEN = ("none", WORST, "worst case per image")  # names that no attack may have
MODEL = "classifier"  # of the one model, among entries


def named(given: Any) -> dict[str, Any]:
    """Returns attacks by what they are called."""
    if isinstance(given, Mapping):
        if given and all(isinstance(some, (list, tuple)) for some in given.values()):
            raise ValueError(
                "these are attacks that are run in turn; give them a name: "
                'attacks={"autoattack": ...}'
            )
        by_name = {"attack": given} if _is_of_config(given) else dict(given)
    else:
        alone = isinstance(given, str) or not isinstance(given, Iterable)
        by_name = {}
        for attack in [given] if alone else given:
            name = _name_of(attack)
            # Two of one name are two attacks.
            others = (f"{name} ({number})" for number in itertools.count(2))
            by_name[next(n for n in itertools.chain([name], others) if n not in by_name)] = attack
    if not by_name:
        raise ValueError('name at least one attack; see robust_ssl.list("attacks")')
    for name in by_name:
        if not isinstance(name, str) or name in TAKEN:
            raise ValueError(
                f"{name!r} cannot be what an attack is called; give it another name, a text and "
                f"none of {', '.join(map(repr, TAKEN))}, which are lines of every result"
            )
    return {name: _value(attack) for name, attack in by_name.items()}


def _is_of_config(given: Any) -> bool:
    return isinstance(given, Mapping) and names_function(given.get("function"))


def _name_of(attack: Any) -> str:
    if isinstance(attack, (str, os.PathLike)):
        return os.fspath(attack).rpartition(":")[2]
    value = _value(attack)
    return getattr(value, "name", type(value).__name__.lower())


def _value(attack: Any) -> Any:
    return attack.value if isinstance(attack, Perturbation) else attack


def largest_budget(named: Mapping[str, Any]) -> float:
    """Returns the largest budget of the perturbations under Linf, else the usual one."""
    budgets = [
        float(attack.threat.epsilon)
        for attack in named.values()
        if isinstance(getattr(attack, "threat", None), threats.Linf)
    ]
    return max(budgets, default=EPSILON)


def grouped(
    named: Mapping[str, Any], epsilon: float, num_classes: int
) -> dict[Group, list[tuple[str, Any]]]:
    """Returns attacks by family, threat and budget: of each group there is a worst case."""
    groups: dict[Group, list[tuple[str, Any]]] = {}
    linf = threats.Linf(epsilon)
    with_budget = {n: _built(a, linf, num_classes) for n, a in named.items()}
    for name, value in with_budget.items():
        if isinstance(value, Mapping):
            threat = _threat_of(name, value)
            group = Group(MODEL, "hardened", AUTOATTACK, threat_name(threat), float(threat.epsilon))
        else:
            universal = isinstance(value, UniversalPerturbation)
            threat = getattr(value, "threat", None)
            # NaN equals nothing: what nobody knows the budgets of is never taken together.
            budget = float(getattr(threat, "epsilon", getattr(threat, "area", "nan")))
            family, against = ("universal", "public") if universal else ("per_image", "hardened")
            kind = "unknown" if threat is None else threat_name(threat)
            group = Group(MODEL, against, family, kind, budget)
        groups.setdefault(group, []).append((name, value))
    return groups


def _threat_of(name: str, ensemble: Mapping[str, Any]) -> Any:
    """Returns the threat of attacks that are run in turn, as `autoattack.standard` gives them."""
    members = [attack for some in ensemble.values() for attack in some]
    found: list[Any] = [getattr(attack, "threat", None) for attack in members]
    if not found or any(not hasattr(threat, "epsilon") for threat in found):
        raise ValueError(f"attacks[{name!r}] is run in turn: each of its attacks needs a threat")
    budgets = {(threat_name(threat), float(threat.epsilon)) for threat in found}
    if len(budgets) > 1:
        raise ValueError(
            f"attacks[{name!r}] is run in turn, and its attacks have several budgets: "
            f"{sorted(budgets)}; give those of each budget a name"
        )
    return found[0]


def _built(attack: Any, linf: threats.Linf, num_classes: int) -> Any:
    """Returns an attack by name under a threat; AutoAttack is a mapping of several."""
    attack = os.fspath(attack) if isinstance(attack, os.PathLike) else attack
    if not isinstance(attack, str):
        refuse_class(attack)
        if attack is None:
            raise ValueError('None is no attack; see robust_ssl.list("attacks")')
        if hasattr(attack, "init") and hasattr(attack, "step"):
            raise ValueError(
                f"{type(attack).__name__} is yet to be fitted: measure(..., "
                "attacks=robust_ssl.attack(encoder, surrogate_images, attack=...))"
            )
        if _is_of_config(attack):
            raise ValueError(
                f"{dict(attack)!r} is what a config says of an attack; measure takes its value, "
                "such as robust_ssl.attacks.PGD(robust_ssl.threats.Linf(8 / 255), num_steps=50)"
            )
        if isinstance(attack, Mapping):
            attack = {n: a if isinstance(a, (list, tuple)) else [a] for n, a in attack.items()}
        each = itertools.chain(*attack.values()) if isinstance(attack, Mapping) else [attack]
        for one in each:
            if not callable(one):
                raise ValueError(f'{one!r} attacks no image; see robust_ssl.list("attacks")')
        return attack
    if attack == AUTOATTACK:
        return autoattack.standard(linf, num_classes)
    if attack in UNIVERSAL:
        raise ValueError(
            f"{attack!r} is one perturbation for all images, fitted before: measure(..., attacks="
            f"robust_ssl.attack(encoder, surrogate_images, attack={attack!r}))"
        )
    if attack.endswith(".npz"):
        raise ValueError(
            f"{attack!r} is the name of a file; read it: measure(..., attacks="
            f"robust_ssl.Perturbation.load({attack!r}))"
        )
    if attack not in PER_IMAGE and ":" not in attack:
        known = [*PER_IMAGE, AUTOATTACK]
        raise ValueError(
            f'no attack {attack!r}{near(attack, known)}; see robust_ssl.list("attacks")'
        )
    return Function.read(PER_IMAGE.get(attack, attack), f"attack {attack!r}")(linf)
