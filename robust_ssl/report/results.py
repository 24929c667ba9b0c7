"""`results.json`: written only if it keeps the contract in ``schemas/results.schema.json``."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import manifests

SCHEMA = 2  # of results.json
NOT_TRUSTED = "not trusted"  # the verdict of a figure that must not be shown without this mark
METRICS = ("clean_accuracy", "robust_accuracy", "attack_success_rate", "fooling_rate")


def results_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of ``results.json`` that the package ships."""
    file = importlib.resources.files("robust_ssl.schemas") / "results.schema.json"
    return json.loads(file.read_text(encoding="utf-8"))


def check_results(document: Any) -> None:
    """Raises unless a document keeps the contract.

    Args:
      document: What ``results.json`` holds, plain Python values.

    Raises:
      ValueError: Naming the offending field, such as ``results[2].robust_accuracy``.
    """
    import jsonschema

    _refuse_nan(document, "")
    validator = jsonschema.Draft202012Validator(results_schema())
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error is not None:
        raise ValueError(f"results.json, {_dotted(error.absolute_path)}: {error.message}")
    for model, found in document["verdicts"].items():
        if any(c["status"] == "failed" for c in found["checks"]) != (
            found["verdict"] == NOT_TRUSTED
        ):
            raise ValueError(
                f"results.json, verdicts.{model}: {found['verdict']!r} is not what its checks say"
            )
    for index, entry in enumerate(document["results"]):
        if entry["epsilon"] > 1 and not entry["threat"].startswith("L2"):
            raise ValueError(
                f"results.json, results[{index}].epsilon: {entry['epsilon']} is greater than 1, "
                f"the whole range of {entry['threat']}"
            )
        examined = document["verdicts"].get(entry["model"], {"verdict": "not examined"})
        if entry["verdict"] != examined["verdict"]:
            raise ValueError(
                f"results.json, results[{index}].verdict: {entry['verdict']!r}, but the verdict "
                f"on {entry['model']!r} is {examined['verdict']!r}"
            )
        for metric in METRICS:
            low, high = entry["ci95"][metric]
            if not low <= entry[metric] <= high:
                raise ValueError(
                    f"results.json, results[{index}].ci95.{metric}: [{low}, {high}] does not hold "
                    f"the share {entry[metric]}"
                )


def write_results(
    path: str | os.PathLike,
    run: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    verdicts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes ``results.json``; the file is there whole or not at all.

    Args:
      path: Where to write.
      run: What was run; any fields.  Arrays become lists.
      results: One entry per model and attack, for example
        ``{"model": "usual", "attack": "pgd", ..., **counts.as_dict()}``.
      verdicts: By model, `evaluation.checks.Verdict.as_dict`; its word is in each entry too.

    Raises:
      ValueError: If an entry breaks the contract, naming the field; nothing is written.
    """
    verdicts = {name: dict(verdict) for name, verdict in (verdicts or {}).items()}
    document = {"schema": SCHEMA, "run": run, "verdicts": verdicts, "results": list(results)}
    _refuse_nan(document, "")  # before NaN becomes null
    document = manifests.json_ready(document)
    check_results(document)
    text = json.dumps(document, indent=2, allow_nan=False)
    manifests.write_atomically(pathlib.Path(path), text + "\n")


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Reads ``results.json``.

    Returns:
      ``{"schema": 2, "run": {...}, "verdicts": {model: ...}, "results": [...]}``.

    Raises:
      ValueError: If the file breaks the contract, naming the field.
    """
    document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    check_results(document)
    return document


def _dotted(parts: Sequence[str | int]) -> str:
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts)
    return text.lstrip(".") or "the whole file"


def _refuse_nan(value: Any, where: str) -> None:
    # JSON Schema cannot: a NaN is neither below the minimum nor above the maximum.
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _refuse_nan(entry, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _refuse_nan(entry, f"{where}[{index}]")
    elif hasattr(value, "tolist"):  # a NumPy or JAX array or number
        _refuse_nan(value.tolist(), where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"results.json, {where.lstrip('.')}: {value} is not a finite number")
