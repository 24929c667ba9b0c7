"""Which of a user's functions an error comes from, and what it was not given: notes of errors."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def short_name(function: Callable[..., Any]) -> str:
    """Returns what errors call a function, a partial or an instance that is called.

    Example:
      >>> short_name(short_name)
      'short_name'
    """
    inner = getattr(function, "func", function)  # of a partial
    return getattr(inner, "__name__", type(inner).__name__)


@contextlib.contextmanager
def happened_in(what: str, absent: Mapping[str, str] | None = None) -> Iterator[None]:
    """Adds to an error in which function it happened: the trace alone shows a line of it.

    Args:
      what: The function, for example ``"the loss 'mine'"``.
      absent: What is None in its inputs, by name, with what to do about it.

    Example:
      >>> try:
      ...     with happened_in("the loss 'mine'"):
      ...         {}["conv9"]
      ... except KeyError as error:
      ...     error.__notes__
      ["this happened in the loss 'mine'"]
    """
    try:
        yield
    except Exception as error:
        before = len(getattr(error, "__notes__", ()))
        # An objective may call another one; the inner one is who raised.
        if not any("this happened in" in note for note in getattr(error, "__notes__", ())):
            error.add_note(f"this happened in {what}")
        if before == 0 and absent and "None" in str(error):
            # Which of them it was, the name of an attribute in the failing lines says.
            failing = _lines(error)
            named = [name for name in absent if f".{name}" in failing]
            for name in named or absent:
                error.add_note(f"inputs.{name} is None here{absent[name]}")
        raise


def _lines(error: Exception) -> str:
    """Returns the text of the last line that is not JAX's and of the last one of all."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = ("/jax/", "/jaxlib/", "/optax/", "/chex/", "/flax/", "\\jax\\")
    own = [frame for frame in frames if not any(part in frame.filename for part in theirs)]
    return "\n".join(frame.line or "" for frame in [*own[-1:], *frames[-1:]])
