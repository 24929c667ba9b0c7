"""JSON Schemas of the files that other programs read, and what a document breaks of them."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


def read(name: str) -> dict[str, Any]:
    """Returns a schema (draft 2020-12) that the package ships.

    Example:
      >>> read("results")["type"]
      'object'
    """
    file = importlib.resources.files("robust_ssl.schemas") / f"{name}.schema.json"
    return json.loads(file.read_text(encoding="utf-8"))


def problem(name: str, document: Any) -> Any:
    """Returns the ``jsonschema.ValidationError`` that says best what is wrong; None if nothing is.

    Example:
      >>> problem("results", []).message
      "[] is not of type 'object'"
    """
    import jsonschema

    return jsonschema.exceptions.best_match(_validator(name).iter_errors(document))


def place(error: Any) -> str:
    """Returns where in a document an error is, as ``checks/2/outcome``."""
    return "/".join(map(str, error.absolute_path)) or "the whole file"


def dotted(error: Any) -> str:
    """Returns the same as ``results[2].epsilon``."""
    parts = error.absolute_path
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".") or "the whole file"


def not_finite(value: Any, where: str = "") -> tuple[str, float] | None:
    """Returns place and value of the first number that is not finite; None if there is none.

    JSON Schema cannot: a NaN is neither below the minimum nor above the maximum.

    Example:
      >>> not_finite({"results": [{"epsilon": float("inf")}]})
      ('results[0].epsilon', inf)
    """
    if hasattr(value, "tolist"):  # a NumPy or JAX array or number
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return where.lstrip("."), value
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        inner = ((f"{where}.{name}", entry) for name, entry in value.items())
    elif isinstance(value, list | tuple):
        inner = ((f"{where}[{index}]", entry) for index, entry in enumerate(value))
    return next((found for at, entry in inner if (found := not_finite(entry, at))), None)


@functools.cache
def _validator(name: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(read(name))
