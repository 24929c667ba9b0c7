"""The table of all checks: what each is called, what it is about and where it comes from.

A check is named like the function of this package that computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_ATHALYE, _CARLINI = "Athalye et al. 2018", "Carlini et al. 2019, Section 3"
_FLAGS, _PINTOR = "Croce and Hein 2020, flags", "Pintor et al. 2022"
_TRAMER, _OURS = "Tramer et al. 2020", "limit of this package"


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
      number: Its number in print and in ``docs/attacks.md``; nothing is looked up by it.
      group: What it examines, one of `GROUPS`.
      title: What is checked, in words.
      source: Where the check comes from.
    """

    number: int
    group: str
    title: str
    source: str

    @property
    def essential(self) -> bool:
        """Whether a figure is not examined unless this check was run."""
        # A gradient that lies makes every other number look good: without these nothing is known.
        return self.group in ("model", "gradients")


# In the order in which they are run and printed: a check presumes what those before it show.
_LISTED = {
    "model": {
        "finite_logits": ("finite logits", _FLAGS),
        "deterministic": ("deterministic output", f"{_FLAGS}; {_ATHALYE}"),
        "gives_logits": ("logits, not probabilities", f"{_FLAGS} (softmax output)"),
    },
    "gradients": {
        "gradient_not_zero": (
            "nonzero gradient, cross-entropy",
            f"{_FLAGS} (zero gradient); Carlini and Wagner 2017, Section III",
        ),
        "margin_gradient_not_zero": ("nonzero gradient, margin", f"{_ATHALYE}, Section 4"),
        "gradient_matches_differences": (
            "gradient against finite differences",
            f"{_ATHALYE}, Section 3 (shattered gradients); {_OURS}",
        ),
    },
    "path": {
        "steps_raise_loss": ("steps that raise the loss", _PINTOR),
        "converged": ("converged", f"{_PINTOR}; {_OURS}"),
        "no_silent_hits": ("no silent hits", f"{_PINTOR}; {_OURS}"),
    },
    "strength": {
        "twice_the_steps_not_stronger": ("twice the steps not stronger", f"{_CARLINI}; {_TRAMER}"),
        "one_step_not_stronger": ("one step not stronger", f"{_CARLINI}; {_ATHALYE}"),
        "objectives_agree": ("objectives agree", f"Croce and Hein 2020, Section 4; {_OURS}"),
        "accuracy_falls_with_epsilon": ("accuracy falls with epsilon", _CARLINI),
        "full_range_breaks_all": ("full-range epsilon breaks all", f"{_CARLINI}; {_PINTOR}"),
        "beats_noise": ("stronger than random noise", f"{_CARLINI}; {_OURS}"),
        "black_box_not_stronger": (
            "black box not stronger",
            f"{_FLAGS} (Square improves); {_ATHALYE}",
        ),
        "transfer_not_stronger": ("transfer not stronger", f"{_CARLINI}; {_TRAMER}"),
    },
    "scoring": {
        "budget_kept": ("budget and range kept", "RobustBench, rules; Croce and Hein 2020"),
        "survives_rounding": (
            "survives 8-bit rounding",
            f"Carlini et al. 2019, Section 4.9; {_OURS}",
        ),
        "enough_images": ("enough images", f"Wilson 1927; {_OURS}"),
    },
    "universal": {
        "per_image_not_weaker": ("per-image attack not weaker", _OURS),
        "beats_noise_and_shuffle": ("stronger than noise and its own shuffled pixels", _OURS),
        "holds_on_new_images": ("holds on new images", _OURS),
        "seeds_agree": ("seeds agree", _OURS),
        "crafted_again_agrees": (
            "agrees when crafted again after hardening",
            f"{_TRAMER}; {_OURS}",
        ),
        "patch_places_agree": ("patch at random and fixed places", _OURS),
        "model_unchanged": ("model unchanged by the evaluation", "errors seen in released code"),
    },
    "data": {
        "leakage": ("test images not among the training images", _OURS),
        "one_answer": ("more than one answer", _OURS),
    },
}
CHECKS: dict[str, Entry] = {}
for _group, _members in _LISTED.items():
    for _name, (_title, _source) in _members.items():
        CHECKS[_name] = Entry(len(CHECKS) + 1, _group, _title, _source)
GROUPS = tuple(_LISTED)
ESSENTIAL = frozenset(name for name, entry in CHECKS.items() if entry.essential)


def names_of(names: str | Iterable[str]) -> tuple[str, ...]:
    """Returns the names of checks, with groups replaced by all that are in them.

    Args:
      names: A name, a group, or several of both.

    Raises:
      ValueError: If one is neither a check nor a group.

    Example:
      >>> names_of(["path", "budget_kept"])
      ('steps_raise_loss', 'converged', 'no_silent_hits', 'budget_kept')
    """
    listed: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name in GROUPS:
            listed += [check for check, entry in CHECKS.items() if entry.group == name]
        elif name in CHECKS:
            listed.append(name)
        else:
            raise ValueError(
                f"unknown check {name!r}; checks are {', '.join(CHECKS)}; groups of them are "
                f"{', '.join(GROUPS)}"
            )
    return tuple(listed)
