"""The section `audit` of a config: what is decided on, by which policy, and by which answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Literal

from robust_ssl.build import Count, near


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit decides on.

    Attributes:
      usual: The recipe that fine-tunes as everybody does.
      secured: The recipe, or the classifier from elsewhere, that is to be used.
      stage: Of the roll-out: whose gates decide.
      answers: The company's ``answers.yaml``; None leaves money out.
      policy: A policy of the company's own; None is the shipped one.
      lock: The encoder's lock, as ``robust-ssl encoder lock`` writes it.
      examples: Images that the page shows.
      command: What was typed, for the page.
    """

    usual: str = "baseline"
    secured: str = "gen_af"
    stage: Literal["pilot", "staged", "full"] = "pilot"
    answers: str | None = None
    policy: str | None = None
    lock: str | None = None
    examples: Count = 4
    command: str = ""

    def check_names(self, recipes: Collection[str], classifiers: Collection[str]) -> None:
        """Raises ValueError unless both are there and differ; recipes are those that are scored."""
        if self.usual not in recipes:
            raise ValueError(
                f"config.audit.usual is {self.usual!r}, which is not in config.recipes, or is "
                f"not scored{near(self.usual, recipes)}"
            )
        known = [*recipes, *classifiers]
        if self.secured not in known:
            raise ValueError(
                f"config.audit.secured is {self.secured!r}, which is in neither config.recipes nor "
                f"config.classifiers, or is not scored{near(self.secured, known)}"
            )
        if self.usual == self.secured:
            raise ValueError(
                f"config.audit.usual and config.audit.secured are both {self.usual!r}; an audit "
                "holds one against the other"
            )
