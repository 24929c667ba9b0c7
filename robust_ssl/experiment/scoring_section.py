"""``config.scoring``: who attacks the classifiers, and on how many images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from robust_ssl import threats
from robust_ssl.build import Count, Seed
from robust_ssl.experiment.suites import Budget, PerImage, Suite, check_seeds


@dataclasses.dataclass(frozen=True)
class AutoAttack:
    """The ensemble of Croce and Hein, each attack on what the ones before have left.

    Attributes:
      version: ``"standard"``, ``"apgd"`` (its first two), ``"rand"`` for randomized classifiers.
      budgets: Under which it is scored, of `threats.Linf` or `threats.L2`; none leaves it out.
      images: Of the test split, at random; None takes all.
      batch_size: Images at a time.
    """

    version: Literal["standard", "apgd", "rand"] = "standard"
    budgets: tuple[Budget, ...] = ()
    images: Count | None = 1000
    batch_size: Count = 100

    def __post_init__(self):
        for budget in self.budgets:
            if not isinstance(budget.threat, threats.Linf | threats.L2):
                raise ValueError(
                    f"budgets: AutoAttack is for Linf and L2, got {type(budget.threat).__name__}"
                )
        if len({budget.key for budget in self.budgets}) < len(self.budgets):
            raise ValueError(f"budgets: none twice, got {[b.epsilon for b in self.budgets]}")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How classifiers are scored.

    Attributes:
      seeds: Of per-image attacks.
      batch_size: Test images at a time.
      adaptive: Whether the suite is crafted again on each classifier's own encoder.
      adaptive_curve: Whether at all budgets of its curve, and not at the main one alone.
      checks: Whether the figures are examined.
      per_image: Attacks on single images.
      autoattack: The ensemble.
      twin: Whether a recipe is attacked by what was crafted on its encoder of another seed, too:
        by who knows how it was made, and has made one too.  Each seed attacks one other.
      half_twin: Whether by one who has half of the training images, and has made it from those
        with a seed of its own.  It costs about half of a training and a fit of the suite for each
        recipe, however many seeds there are.
      labelled: Attacks on all images at once that know head and labels, fitted on each classifier
        and its training images; entries as of ``config.suite``.  None leaves them out.
    """

    seeds: tuple[Seed, ...] = (0,)
    batch_size: Count = 250
    adaptive: bool = True
    adaptive_curve: bool = False
    checks: bool = True
    per_image: PerImage = PerImage()  # noqa: RUF009 (frozen)
    autoattack: AutoAttack = AutoAttack()
    twin: bool = dataclasses.field(default=False, metadata={"later": True})
    half_twin: bool = dataclasses.field(default=False, metadata={"later": True})
    labelled: Suite | None = dataclasses.field(default=None, metadata={"later": True})

    def __post_init__(self):
        check_seeds(self.seeds, "seeds")
        for name, attack in self.labelled.attacks.items() if self.labelled else ():
            if attack.is_noise:
                raise ValueError(
                    f"labelled.attacks.{name} is noise, which knows no label; the suite has it"
                )
            if len(attack.budgets) > 1:
                raise ValueError(
                    f"labelled.attacks.{name} has a curve of budgets, and is fitted at its epsilon "
                    "alone; leave the curve out"
                )

    def check(self, stages: Sequence[str], seeds: Sequence[int], recipes: Sequence[str]) -> None:
        """Raises ValueError for attackers that a run has no models for."""
        if self.twin and len(seeds) < 2:
            raise ValueError(
                "config.scoring.twin needs another seed of each recipe: give config.training.seeds "
                "two or more, or take config.scoring.half_twin, whose seed is its own"
            )
        for entry in [name for name in ("twin", "half_twin") if getattr(self, name)]:
            if not recipes:
                raise ValueError(
                    f"config.scoring.{entry} is for recipes, which an attacker can repeat, and "
                    "none is scored; leave it false for classifiers from elsewhere"
                )
            if not self.adaptive:
                raise ValueError(
                    f"config.scoring.{entry} has the suite crafted again on another encoder, which "
                    "config.scoring.adaptive=False leaves out; change one of the two"
                )
        if self.labelled is None or not {"compare", "audit"} & {*stages}:
            return
        if not any(attack.is_linf for attack in self.labelled.attacks.values()):
            raise ValueError(
                "config.scoring.labelled.attacks has none under Linf at its epsilon, "
                f"{self.labelled.epsilon}, by which recipes are compared"
            )
