"""Threats, attacks and budgets, as a config says them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from robust_ssl import attacks, finetuning, struct, threats
from robust_ssl.attacks.perturbation import check_fits_gray
from robust_ssl.build import (
    Count,
    Function,
    Natural,
    NotNegative,
    Seed,
    Share,
    check_known,
    inside,
    name_of,
    read,
    read_entries,
    without_none,
)
from robust_ssl.evaluation import WORST
from robust_ssl.types import Encoder, Threat


def check_names(names: Iterable[str], where: str) -> None:
    """Raises ValueError for a name that cannot be a file's, or that means something else."""
    for name in names:
        if name == WORST or not re.fullmatch(r"[\w][\w .+\-]*", name):
            raise ValueError(
                f"{where}: {name!r} cannot be a name; take letters, digits, spaces and . + - _ "
                f"(and not {WORST!r}, which is the worst case over all)"
            )


def check_seeds(seeds: Sequence[int], where: str) -> None:
    """Raises ValueError unless there is a seed and none twice."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"{where}: need at least one seed and none twice, got {list(seeds)}")


def read_threat(value: Any, where: str) -> Callable[[Any], Threat]:
    """Returns what makes a threat of a budget, as `attacks.fit` takes it.

    Args:
      value: ``"module:function"`` or ``{"function": ..., **options}``, whose first argument is the
        budget.  Where the options hold a ``threat`` of their own, as those of `threats.Band`, that
        one gets the budget.  None is `threats.Linf`.
      where: The entry's name, for errors.

    Example:
      >>> read_threat({"function": "robust_ssl.threats:Patch"}, "here")(0.03).area
      0.03
      >>> low = {"function": "robust_ssl.threats:Band", "threat": "robust_ssl.threats:Linf"}
      >>> read_threat({**low, "high": 0.125}, "x")(0.1)
      Band(threat=Linf(epsilon=0.1), low=0.0, high=0.125)
    """
    if value is None:
        return threats.Linf
    if not isinstance(value, Mapping) or "threat" not in value:
        return functools.partial(_make_threat, Function.read(value, where, ("threat",)), None)
    options = {name: entry for name, entry in value.items() if name != "threat"}
    function = Function.read(options, where)
    if not function.takes("threat"):
        raise ValueError(f"{where}.threat: {name_of(function.function)} takes no other threat")
    nested = read_threat(value["threat"], f"{where}.threat")
    return functools.partial(_make_threat, function, nested)


def _make_threat(function: Function, inner: Callable[[Any], Threat] | None, budget: Any) -> Threat:
    return function(budget if inner is None else inner(budget))


@dataclasses.dataclass(frozen=True)
class Budget:
    """A threat with its budget, under which attacks are scored.

    Attributes:
      epsilon: Pixel units; for a patch the share of the image's area.
      threat: The threat itself.
      text: What the config said.
    """

    epsilon: float
    threat: Threat
    text: Any

    @classmethod
    def read(cls, value: Any, where: str) -> Budget:
        """Reads a number, under `threats.Linf`, or ``{"epsilon": number, "threat": ...}``."""
        entries = value if isinstance(value, Mapping) else {"epsilon": value}
        check_known(entries, ("epsilon", "threat"), where)
        if "epsilon" not in entries:
            raise ValueError(f"{where} needs an epsilon, for example 8 / 255")
        place = f"{where}.epsilon" if entries is value else where
        epsilon = read(NotNegative, entries["epsilon"], place)
        make = read_threat(entries.get("threat"), f"{where}.threat")
        with inside(place):
            threats.check(threat := make(epsilon))
        return cls(epsilon, threat, value)

    @property
    def key(self) -> tuple[float, str]:
        """Tells budgets apart: their number, and what the config said of the threat."""
        entries = self.text if isinstance(self.text, Mapping) else {}
        return self.epsilon, json.dumps(entries.get("threat"), sort_keys=True)


@dataclasses.dataclass(frozen=True)
class InnerAttack:
    """The attack of training, per image or an `finetuning.Adversary`, before it has an encoder.

    Attributes:
      function: Makes it of a threat, with its options.
      threat: What bounds it.
      text: What the config said.
    """

    function: Function
    threat: Threat
    text: Any

    @classmethod
    def read(cls, value: Any, where: str) -> InnerAttack:
        """Reads ``{"function": ..., "epsilon": ..., "threat": ..., **options}``."""
        if not isinstance(value, Mapping) or "function" not in value:
            raise ValueError(
                f'{where} must be a mapping with a "function", such as "robust_ssl.attacks:PGD", '
                f"and an epsilon, got {value!r}"
            )
        apart = ("epsilon", "threat")  # not the attack's own
        options = {n: v for n, v in value.items() if n not in apart}
        function = Function.read(options, where, apart)
        if "epsilon" not in value:
            raise ValueError(f'{where} needs an "epsilon", for example 8/255')
        epsilon = read(NotNegative, value["epsilon"], f"{where}.epsilon")
        with inside(f"{where}.epsilon"):
            threat = read_threat(value.get("threat"), f"{where}.threat")(epsilon)
            threats.check(threat)
        attack = cls(function, threat, dict(value))
        with inside(where):
            finetuning.check_inner(attack.build(None))
        return attack

    @property
    def is_per_image(self) -> bool:
        """Whether it attacks single images in a number of steps."""
        attack = self.build(None)
        return not isinstance(attack, finetuning.Adversary) and hasattr(attack, "num_steps")

    def build(self, encoder: Encoder | None) -> Any:
        """Returns the attack; one that has a field `source` gets the public encoder there."""
        options = {}
        if self.function.takes("source"):
            options["source"] = encoder
        attack = dataclasses.replace(self.function, options={**self.function.options, **options})(
            self.threat
        )
        # A whole number among the leaves would be an integer, and another program than a fraction.
        return struct.as_floats(attack)

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raises ValueError if the budget makes no sense for images of this shape."""
        threats.check(self.threat, image_shape)
        if issubclass_of(self.function.function, finetuning.UniversalPool):
            check_fits_gray(self.threat, image_shape)


def issubclass_of(function: Any, kind: type) -> bool:
    """Whether a function is a class of a kind."""
    return isinstance(function, type) and issubclass(function, kind)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How long an attack is fitted, where it is not as long as the others of its suite.

    Attributes:
      num_steps: Steps; None is the suite's number.
      batch_size: Surrogate images a step; None is the suite's number.
    """

    num_steps: Count | None = None
    batch_size: Count | None = None


def budget_name(threat: Threat, epsilon: float) -> str:
    """Returns what files call a budget of a universal attack."""
    in_pixels = hasattr(threat, "epsilon")
    return f"eps{round(255 * epsilon, 2):g}" if in_pixels else f"area{epsilon:g}"


@dataclasses.dataclass(frozen=True)
class SuiteAttack:
    """A universal attack with what it is fitted for.

    Attributes:
      name: In the config.
      attack: What `attacks.fit` takes.
      make_threat: Makes a threat of a budget.
      budgets: Main budget first, then those of the accuracy-against-budget curve.
      num_steps: Steps of a fit.
      batch_size: Surrogate images a step.
      is_linf: Whether it has the suite's own budget under `threats.Linf`, by which recipes are
        compared.
      text: What the config said.
    """

    name: str
    attack: Any
    make_threat: Callable[[Any], Threat]
    budgets: tuple[float, ...]
    num_steps: int
    batch_size: int
    is_linf: bool
    text: Any

    @property
    def is_noise(self) -> bool:
        """Whether it looks at no encoder, so that there is nothing to fit."""
        return isinstance(self.attack, attacks.RandomNoise)

    def budgets_for(self, curve: bool) -> tuple[float, ...]:
        """Returns the budgets to fit: the main one first, then, with `curve`, the others."""
        return self.budgets if curve else self.budgets[:1]

    @property
    def gradients(self) -> int:
        """Gradients with respect to an image that one perturbation costs."""
        each = getattr(self.attack, "gradients_per_batch", lambda images: images)
        return 0 if self.is_noise else self.num_steps * each(self.batch_size)


@dataclasses.dataclass(frozen=True)
class Suite:
    """The downstream-agnostic attacks, fitted on surrogate images.

    Attributes:
      attacks: By name.
      epsilon: Their budget under `threats.Linf`, pixel units.
      curve: More budgets, for accuracy against budget on the public encoder's perturbations.
      seeds: One perturbation each.
      num_steps: Steps of a fit.
      batch_size: Surrogate images a step.
    """

    attacks: Mapping[str, Any]
    epsilon: Share = 10 / 255
    curve: tuple[Share, ...] = ()
    seeds: tuple[Seed, ...] = (0,)
    num_steps: Count = 4000
    batch_size: Count = 64

    @classmethod
    def read(cls, value: Any, where: str) -> Suite:
        """Reads ``config.suite``: every attack is built, at each of its budgets."""
        suite = read_entries(cls, value, where)
        check_seeds(suite.seeds, f"{where}.seeds")
        named = without_none(suite.attacks)
        check_names(named, f"{where}.attacks")
        if not named:
            raise ValueError(f"{where}.attacks is empty; name at least one attack")
        built = {
            name: suite._attack(name, entry, f"{where}.attacks.{name}")
            for name, entry in named.items()
        }
        return dataclasses.replace(suite, attacks=built)

    def _attack(self, name: str, value: Any, where: str) -> SuiteAttack:
        entries = value if isinstance(value, Mapping) else {"function": value}
        apart = ("threat", "epsilon", "curve", "fit")  # not the attack's own
        options = {option: entry for option, entry in entries.items() if option not in apart}
        function = Function.read(options, where, apart)
        with inside(where):
            named = {"name": name} if function.takes("name") else {}
            attack = dataclasses.replace(function, options={**function.options, **named})()
        make = read_threat(entries.get("threat"), f"{where}.threat")
        own = "epsilon" in entries
        main = read(NotNegative, entries["epsilon"], f"{where}.epsilon") if own else self.epsilon
        curve = () if own else self.curve
        if "curve" in entries:
            curve = read(tuple[NotNegative, ...], entries["curve"], f"{where}.curve")
        budgets = tuple(dict.fromkeys((main, *curve)))  # each once
        for place, budget in [("epsilon", main), *(("curve", epsilon) for epsilon in curve)]:
            with inside(f"{where}.{place}"):
                threats.check(make(budget))
        with inside(where):
            if not own and not hasattr(make(main), "epsilon"):
                raise ValueError(
                    f"the budget of {type(make(main)).__name__} is not in pixel units, so the "
                    "suite's epsilon is not for it; give the attack an epsilon of its own (for a "
                    'patch the share of the area: "epsilon": 0.03)'
                )
            threats.check_saveable(make(main))
        named = [budget_name(make(budget), budget) for budget in budgets]
        if twice := [name for name in named if named.count(name) > 1]:
            alike = [b for b, name in zip(budgets, named, strict=True) if name == twice[0]]
            raise ValueError(f"{where}: files call these budgets {twice[0]}: {alike}; leave one")
        fit = read(Fit, entries.get("fit", {}), f"{where}.fit")
        return SuiteAttack(
            name=name,
            attack=attack,
            make_threat=make,
            budgets=budgets,
            num_steps=fit.num_steps or self.num_steps,
            batch_size=fit.batch_size or self.batch_size,
            is_linf=isinstance(make(main), threats.Linf) and main == self.epsilon,
            text=value,
        )


@dataclasses.dataclass(frozen=True)
class PerImageAttack:
    """An attack on single images, before it has a threat.

    Attributes:
      function: Makes it of a threat, with its options.
      target: Place of the surrogate image that a targeted attack aims at; None for all others.
      text: What the config said.
      budgets: Under which it is scored, where they are not those of all.
    """

    function: Function
    target: int | None
    text: Any
    budgets: tuple[Budget, ...] | None = None

    @classmethod
    def read(cls, value: Any, where: str) -> PerImageAttack:
        """Reads ``{"function": ..., **options}``; ``target`` and ``budgets``: see above."""
        if not isinstance(value, Mapping):
            return cls(Function.read(value, where), None, value)
        kinds = {"target": Natural, "budgets": tuple[Budget, ...]}  # not the attack's own
        options = {name: option for name, option in value.items() if name not in kinds}
        apart = {n: read(kinds[n], value[n], f"{where}.{n}") for n in kinds if n in value}
        function = Function.read(options, where, (*kinds,))
        return cls(function, apart.get("target"), value, apart.get("budgets"))

    def build(self, threat: Threat, target_image: jax.Array | None = None) -> Any:
        """Returns the attack under a threat."""
        options = {} if target_image is None else {"target_image": target_image}
        return dataclasses.replace(self.function, options={**self.function.options, **options})(
            threat
        )


@dataclasses.dataclass(frozen=True)
class PerImage:
    """Attacks on single images.

    Attributes:
      attacks: By name; those that need no label are crafted on the public encoder too.
      budgets: Under which each is scored that has none of its own; a number is an epsilon of
        `threats.Linf`.
      images: Of the test split, at random; None takes all.
    """

    attacks: Mapping[str, PerImageAttack] = dataclasses.field(
        default_factory=lambda: {
            "pgd": PerImageAttack.read(
                {"function": "robust_ssl.attacks:PGD", "num_steps": 20}, "pgd"
            )
        }
    )
    budgets: tuple[Budget, ...] = (Budget(8 / 255, threats.Linf(8 / 255), 8 / 255),)
    images: Count | None = dataclasses.field(default=None, metadata={"later": True})

    def __post_init__(self):
        check_names(self.attacks, "attacks")
        for name, attack in self.attacks.items():
            for budget in self._of(attack):
                if attack.target is None:
                    with inside(f"attacks.{name}"):
                        attack.build(budget.threat)

    def _of(self, attack: PerImageAttack) -> tuple[Budget, ...]:
        return self.budgets if attack.budgets is None else attack.budgets

    @property
    def scored(self) -> tuple[Budget, ...]:
        """The budgets under which something is scored, each once."""
        asked = [budget for attack in self.attacks.values() for budget in self._of(attack)]
        once = {budget.key: budget for budget in (*self.budgets, *asked)}
        return tuple(budget for budget in once.values() if self.at(budget))

    def at(self, budget: Budget) -> dict[str, PerImageAttack]:
        """Returns the attacks that are scored under a budget, by name."""
        return {
            name: attack
            for name, attack in self.attacks.items()
            if budget.key in [own.key for own in self._of(attack)]
        }
