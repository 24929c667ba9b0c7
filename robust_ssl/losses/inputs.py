"""What losses take out of `LossInputs`, with what to do where it is not there."""

from __future__ import annotations

import chex
import jax

from robust_ssl.types import Outputs

_ADVICE = {
    "adversarial": ": give the step an attack",
    "pretrained": ": give the step pretrained=encoder (in a recipe compare_with_pretrained=True)",
    "teacher": ': give the step a teacher (in a recipe the entry "teacher", another one\'s name)',
}


def logits_of(outputs: Outputs | None, which: str) -> jax.Array:
    """Returns the logits ``[batch, classes]`` of some outputs, or raises ValueError with advice."""
    if outputs is None or outputs.logits is None:
        raise ValueError(f"this loss needs {which} logits{advice(which)}")
    chex.assert_rank(outputs.logits, 2)
    return outputs.logits


def advice(which: str) -> str:
    """Returns what to do where the outputs `which` are missing, as the end of a sentence."""
    return _ADVICE.get(which, ", and there are none")
