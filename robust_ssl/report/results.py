"""`results.json`: written and read only if it keeps ``schemas/results.schema.json``."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import disk, schemas
from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE, NOT_EXAMINED
from robust_ssl.report.comparison import check_rows
from robust_ssl.workdir import json_ready, write_atomically

SCHEMA = 3  # of results.json
Part = Mapping[str, Any]
METRICS = ("clean_accuracy", "robust_accuracy", "attack_success_rate", "fooling_rate")


def schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of ``results.json`` that the package ships."""
    return schemas.read("results")


def check(document: Any) -> None:
    """Raises unless a document keeps the contract of ``results.json``.

    Raises:
      ValueError: Naming the offending field, such as ``results[2].robust_accuracy``.
    """
    version = document.get("schema") if isinstance(document, Mapping) else None
    if isinstance(version, int) and version < SCHEMA:
        raise ValueError(
            f"results.json, schema: {version}, which an older version of this package wrote; this "
            f"one reads {SCHEMA}. Score again in a new --workdir"
        )
    _refuse_nan(document)
    error = schemas.problem("results", document)
    if error is not None:
        raise _error(schemas.dotted(error), error.message)
    _check_downstream(document["run"]["downstream"])
    _check_models(document["models"])
    _check_verdicts(document)
    for index, entry in enumerate(document["results"]):
        _check_entry(document, entry, f"results[{index}]")
    if document["comparison"] is not None:
        _check_comparison(document)


def _check_downstream(downstream: Mapping[str, Any]) -> None:
    if (largest := downstream.get("largest_class")) is None:
        return
    if "classes" not in downstream:
        raise _error("run.downstream.classes", "is not there; largest_class is one of them")
    if largest["images"] > downstream["test"]:
        message = f"{largest['images']} are more than all {downstream['test']} test images"
        raise _error("run.downstream.largest_class.images", message)


def _check_models(models: Mapping[str, Mapping[str, Any]]) -> None:
    recipes = {origin["recipe"] for origin in models.values()}
    for model, origin in models.items():
        if (origin["recipe"] is None) != (origin["seed"] is None):
            raise _error(f"models.{model}", "recipe and seed go together")
        if origin["recipe"] is None and model in recipes:
            # Both would share one line of the first table.
            raise _error(f"models.{model}", "a classifier must not be called as a recipe is")


def _check_verdicts(document: Mapping[str, Any]) -> None:
    for model, verdict in document["verdicts"].items():
        if model not in document["models"]:
            raise _error(f"verdicts.{model}", "there is no such model")
        failed = any(check["status"] == "failed" for check in verdict["checks"])
        # A forged word would carry a figure past every mark.
        if failed != (verdict["verdict"] == NOT_BELIEVABLE):
            raise _error(f"verdicts.{model}", f"{verdict['verdict']!r} is not what its checks say")


def _check_entry(document: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> None:
    if entry["model"] not in document["models"]:
        raise _error(f"{where}.model", f"{entry['model']!r} is none of the models")
    # Of an L2 ball, or somebody's own threat, a budget is no number of pixel values.
    if entry["epsilon"] > 1 and entry["threat"].startswith(("Linf", "Patch")):
        message = f"{entry['epsilon']} is greater than 1, the whole range of {entry['threat']}"
        raise _error(f"{where}.epsilon", message)
    verdict = document["verdicts"].get(entry["model"], {"verdict": NOT_EXAMINED})["verdict"]
    if entry["verdict"] != verdict:
        message = f"{entry['verdict']!r}, but the verdict on {entry['model']!r} is {verdict!r}"
        raise _error(f"{where}.verdict", message)
    for metric in METRICS:
        low, high = entry["ci95"][metric]
        if not low <= entry[metric] <= high:
            message = f"[{low}, {high}] does not hold the share {entry[metric]}"
            raise _error(f"{where}.ci95.{metric}", message)


def _check_comparison(document: Mapping[str, Any]) -> None:
    comparison = document["comparison"]
    try:
        check_rows(comparison["rows"])
    except ValueError as error:
        raise _error("comparison.rows", str(error)) from error
    recipes = {row["recipe"] for row in comparison["rows"]}
    for name in ("baseline", "reference"):
        if comparison[name] not in (*recipes, None):
            raise _error(f"comparison.{name}", f"{comparison[name]!r} has no row")


def document(
    *, run: Part, models: Part, results: Sequence[Part], verdicts=None, comparison=None
) -> dict[str, Any]:
    """Builds what ``results.json`` holds, plain values.

    Args:
      run: What was run.  Arrays become lists.
      models: Recipe and seed of each model; both None for a saved classifier.
      results: One entry per model and attack, for example
        ``{"model": "gen_af-seed0", "attack": "pgd", ..., **counts.as_dict()}``.
      verdicts: By model, `evaluation.checks.Verdict.as_dict`; its word is in each entry too.
      comparison: Rows and claims of the compared recipes; None where nothing was compared.

    Raises:
      ValueError: If the contract is broken, naming the field.
    """
    whole = {"schema": SCHEMA, "run": run, "models": models, "verdicts": verdicts or {}}
    whole |= {"results": list(results), "comparison": comparison}
    # Before `json_ready` makes it null, which a reader would take for not measured.
    _refuse_nan(whole)
    whole = json_ready(whole)
    check(whole)
    return whole


def write(path: str | os.PathLike, **parts: Any) -> dict[str, Any]:
    """Writes the parts of a `document`, which it returns; the file is there whole or not at all.

    Raises:
      ValueError: If the contract is broken, naming the field; nothing is written.
    """
    whole = document(**parts)
    text = json.dumps(whole, indent=2, allow_nan=False)
    write_atomically(pathlib.Path(path), text + "\n")
    return whole


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads ``results.json``.

    Raises:
      ValueError: If the file breaks the contract, naming the field.
    """
    document = disk.read_json(path)
    check(document)
    return document


def _error(where: str, message: str) -> ValueError:
    return ValueError(f"results.json, {where}: {message}")


def _refuse_nan(document: Any) -> None:
    found = schemas.not_finite(document)
    if found is not None:
        raise _error(found[0], f"{found[1]} is not a finite number")
