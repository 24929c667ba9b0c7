"""Does what you brought keep the package's laws?  One check for each kind of value.

Call `check` from a test of your own; it raises `AssertionError` and names the value and the law.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from robust_ssl.conformance.attacks import check_attack, check_universal_attack
from robust_ssl.conformance.detectors import check_detector
from robust_ssl.conformance.encoders import check_encoder
from robust_ssl.conformance.losses import check_loss, check_objective
from robust_ssl.conformance.methods import check_augmentation, check_method
from robust_ssl.conformance.threats import check_threat

KINDS: dict[str, Callable[..., None]] = {
    "attack": check_attack,
    "augmentation": check_augmentation,
    "detector": check_detector,
    "encoder": check_encoder,
    "loss": check_loss,
    "method": check_method,
    "objective": check_objective,
    "threat": check_threat,
    "universal_attack": check_universal_attack,
}
__all__ = ["KINDS", "check", *(f"check_{kind}" for kind in KINDS)]


def check(kind: str, value: Any, **options: Any) -> None:
    """Checks that a value of your own keeps the laws of its kind.

    Args:
      kind: One of `KINDS`.
      value: What you brought, or ``"module:name"`` of it.  A class is called: an attack's with a
        threat, a threat's with a budget, a method's or an augmentation's with nothing.  A loss or
        an objective is no class, but a function, or an instance that can be called.
      **options: Of the check, as its own docstring lists them; of an encoder's builder.

    Raises:
      AssertionError: Names the value and the law it breaks.
      ValueError: If there is no such kind.

    Example:
      >>> check("loss", "robust_ssl.losses:trades_kl")
      >>> check("los", "robust_ssl.losses:trades_kl")
      Traceback (most recent call last):
      ValueError: unknown kind 'los'; did you mean 'loss'? The kinds are attack, augmentation,
      detector, encoder, loss, method, objective, threat, universal_attack
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise ValueError(f"unknown kind {kind!r}{hint} The kinds are {', '.join(KINDS)}")
    KINDS[kind](value, **options)
