"""A zoo that can be made again: pre-training configs in, folders of encoders and a table out."""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from robust_ssl import disk, experiment, provenance, settings, weights, words
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress
from robust_ssl.stopping import Stopped
from robust_ssl.weights import native
from robust_ssl.workdir import hold, make_directory, read_metrics

_log = logging.getLogger(__name__)

_COLUMNS = (
    ("encoder", "name"),
    ("method", "method"),
    ("epochs", "epochs"),
    ("width", "width"),
    ("parameters", "parameters"),
    ("hardware", "hardware"),
    ("minutes", "minutes"),
    ("k-NN %", "knn_accuracy"),
    ("random weights' k-NN %", "random_knn_accuracy"),
    ("linear %", "linear_accuracy"),
)
_NUMBERS = {name for _, name in _COLUMNS[2:]} - {"hardware"}


def build(
    configs: Iterable[Mapping[str, Any]],
    out: str | os.PathLike,
    *,
    parallel: Parallel | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Pre-trains an encoder for each config and writes what one needs to trust and remake it.

    For each of them ``out/NAME`` gets ``encoder.safetensors`` and ``encoder.json`` (with its
    SHA-256, its config and its accuracies), ``training_log.jsonl``, ``config.json`` and a model
    card, ``README.md``; ``out/README.md`` is the table of all encoders that lie in `out`.  What a
    config has finished is kept in ``out/runs/NAME``: the same call again goes on.

    Args:
      configs: Each with the stage ``pretrain`` and its encoder's ``name``.
      out: Made if it does not exist.
      parallel: As in `robust_ssl.experiment.run`.
      progress: As in `robust_ssl.experiment.run`.

    Returns:
      What went wrong, by encoder name; the others have been made.

    Raises:
      UsageError: If two configs make encoders of the same name, one names none, or none of them can
        be used.
      WorkdirError: If `out` cannot be made or written, or another build writes there.
      Stopped: If a stop was asked for; call again to go on.
    """
    named = _by_name(configs)
    out = make_directory(out)
    with hold(out):  # two builds would write one table, and one would fail on the other's runs
        return _build(named, out, parallel, progress)


def _build(
    named: Mapping[str, Mapping[str, Any]],
    out: pathlib.Path,
    parallel: Parallel | None,
    progress: Progress | None,
) -> dict[str, str]:
    errors: dict[str, Exception] = {}
    for name, config in named.items():
        work = out / "runs" / name
        try:
            config = {**config, "stages": ["pretrain"]}
            experiment.run(config, work, parallel=parallel, progress=progress)
            if jax.process_index() == 0:
                _publish(work, out / name)
        except Stopped:
            raise
        except Exception as error:  # the others do not depend on it
            _log.error("zoo: %s failed: %s", name, error)
            errors[name] = error
        if jax.process_index() == 0:
            disk.replace(out / "README.md", table(out))
    unusable = [isinstance(errors.get(name), experiment.UsageError) for name in named]
    if named and all(unusable):
        raise experiment.UsageError("\n".join(f"{n}: {error}" for n, error in errors.items()))
    return {name: f"{type(error).__name__}: {error}" for name, error in errors.items()}


def table(out: str | os.PathLike) -> str:
    """Returns a Markdown table of all encoders in a folder, the best k-NN first."""
    rows = []
    for file in sorted(pathlib.Path(out).glob("*/encoder.json")):
        try:
            rows.append(_row(weights.encoder_card(file.parent)))
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            # Of somebody else: it must not end a build of hours at its last line.
            _log.warning("zoo: %s is not in the table: %s", file.parent.name, error)
    rows.sort(key=lambda row: -float(row["knn_accuracy"]))
    head = "| " + " | ".join(title for title, _ in _COLUMNS) + " |"
    line = "| " + " | ".join("---:" if name in _NUMBERS else "---" for _, name in _COLUMNS) + " |"
    cells = [[words.markdown(row[name]) for _, name in _COLUMNS] for row in rows]
    body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, line, *body]) + "\n"


def _by_name(configs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    named: dict[str, dict[str, Any]] = {}
    for config in configs:
        plain = settings.to_json(config)
        encoder = plain.get("pretrain", {}).get("encoder", {})
        name = encoder.get("name") if isinstance(encoder, Mapping) else None
        if not name or pathlib.PurePath(name).name != name or name == "runs":
            raise experiment.UsageError(
                f"a zoo names its folders by config.pretrain.encoder.name, which is {name!r}"
            )
        if name in named:
            raise experiment.UsageError(f"two configs make an encoder of the name {name!r}")
        named[name] = plain
    return named


def _row(card: Mapping[str, Any]) -> dict[str, str]:
    details = card["card"]
    config = details.get("config", {})
    percent = {
        name: f"{100 * float(details[name]):.1f}" if name in details else "-1"
        for name in ("knn_accuracy", "random_knn_accuracy", "linear_accuracy")
    }
    return {
        "name": card["name"],
        "method": _function(config.get("method", "")).rpartition(":")[2],
        "epochs": str(config.get("epochs", "")),
        "width": str(card["options"].get("width", "")),
        "parameters": f"{details.get('parameters', 0) / 1e6:.2f} M",
        "hardware": str(details.get("hardware", "")),
        "minutes": f"{details.get('seconds', 0) / 60:.0f}",
        **percent,
    }


def _function(text: Any) -> str:
    """The name in a function with options."""
    return str(text["function"] if isinstance(text, Mapping) else text)


def _options(text: Any) -> dict[str, Any]:
    """The options of a function with options."""
    return {n: v for n, v in text.items() if n != "function"} if isinstance(text, Mapping) else {}


def _publish(work: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a finished run's encoder, log and config, and writes its model card."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = work / "pretrain"
    for name in (native.WEIGHTS_FILE, native.CARD_FILE):  # what else lies there is no part of it
        disk.replace(folder / name, (stage / "encoder" / name).read_bytes())
    entries = read_metrics(stage / "metrics.jsonl")
    epochs = [json.dumps(entry) for entry in entries if "epoch" in entry]
    disk.replace(folder / "training_log.jsonl", "\n".join(epochs) + "\n")
    card = weights.encoder_card(folder)
    text = json.dumps(card["card"].get("config", {}), indent=2)
    disk.replace(folder / "config.json", text + "\n")
    disk.replace(folder / "README.md", _model_card(card))
    provenance.write_beside(folder)


def _model_card(card: Mapping[str, Any]) -> str:
    details, row, options = card["card"], _row(card), card["options"]
    config, normalization = details["config"], f"mean {options['mean']}, std {options['std']}"
    settings_of_method = json.dumps(_options(config["method"]))
    return f"""# {words.markdown(card["name"])}

{card["builder"].rpartition(":")[2]} of width {row["width"]} ({row["parameters"]} parameters, {card["weights"]["bytes"] / 1e6:.1f} MB), images of {options["image_size"]} pixels.
Pre-trained with {row["method"]} on `{config["data"].get("source") or config["data"]["function"]}`, {details["images"]} images, {"labels used" if details["labels_used"] else "no labels"}.

| accuracy, % | |
| --- | ---: |
| k nearest neighbours (k = 20, all training images as the bank) | {row["knn_accuracy"]} |
| the same with random weights | {row["random_knn_accuracy"]} |
| linear probe on frozen features | {row["linear_accuracy"]} |

All on the test split; no epoch was chosen by it.

- Training: {row["epochs"]} epochs, batch {config["batch_size"]}, {config["optimizer"]} at {config["learning_rate"]:g}, seed {details["seed"]}, {row["minutes"]} minutes on {row["hardware"]}.
- Method's settings: `{settings_of_method}`.
- Normalization: {normalization}.
- SHA-256 of `{card["weights"]["file"]}`: `{card["weights"]["sha256"]}`.
- Files: `config.json` has every setting of the stage `pretrain`, `training_log.jsonl` every epoch.

`robust_ssl.load_encoder` takes this folder's path, or its name where the package ships it.
"""  # noqa: E501
