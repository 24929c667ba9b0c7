"""Screens on disk: detectors beside the classifier that they screen.

``screen.safetensors`` has their arrays, ``screen.json`` is the card; a second classifier that a
detector asks lies in ``screen_models/<detector>/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import screening
from robust_ssl.screening import Calibrated, Fused, Screen, Surprise
from robust_ssl.types import Classifier
from robust_ssl.weights import cards
from robust_ssl.weights.classifiers import _folder, load_classifier, save_classifier

WEIGHTS_FILE = "screen.safetensors"
CARD_FILE = "screen.json"
MODELS = "screen_models"
# A card names its detectors; only these names are ever made, whatever the card says.
_KINDS = {
    kind.__name__: kind
    for kind in (
        *(screening.Template, screening.Squeeze, screening.Neighbors),
        *(screening.Spectrum, screening.Disagreement),
    )
}


def save_screen(
    screen: Screen,
    directory: str | os.PathLike,
    card: Mapping[str, Any] | None = None,
    *,
    builder: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a screen beside its classifier, and the classifier where there is none.

    Args:
      screen: What to save.  Its detectors are dataclasses of float arrays, static plain values, and
        classifiers.
      directory: What `save_classifier` wrote, or an empty or new one.
      card: Anything JSON can say: the rate of false alarms, what the images were.
      builder: Of a classifier that detectors ask, as for `save_classifier`; of the screened one,
        where that is not there yet.
      options: Keyword arguments of `builder`.

    Returns:
      The directory.

    Raises:
      ValueError: If the classifier there is another one, or a detector cannot be written.
    """
    from safetensors.numpy import save

    folder = pathlib.Path(directory)
    with_builder = {"builder": builder, "options": options}
    if not (_folder(folder) / "classifier.json").is_file():
        save_classifier(screen.model, folder, **with_builder)
    folder = _folder(folder)
    arrays: dict[str, np.ndarray] = {}
    members, models = {}, {}
    for name, member in screen.fused.members.items():
        _check_name(name, "the screen to save")
        members[name], own, models[name] = _describe(name, member)
        arrays |= own
    cards.check_arrays(arrays, arrays, "the screen to save")
    weights = save(arrays)
    record = {
        "schema": cards.SCHEMA,
        "classifier": _sum_of(screen.model),
        "threshold": float(screen.threshold),
        "key": np.asarray(jax.random.key_data(screen.key)).tolist(),
        "members": members,
        "weights": cards.describe_file(WEIGHTS_FILE, weights),
        "card": dict(card or {}),
    }
    text = cards.encode(record)  # may fail, so before anything is written
    for name, by_field in models.items():
        for field, model in by_field.items():
            save_classifier(model, folder / MODELS / name / field, **with_builder)
    cards.replace_file(folder / WEIGHTS_FILE, weights)
    cards.replace_file(folder / CARD_FILE, text)
    return folder


def load_screen(
    directory: str | os.PathLike,
    *,
    detectors: Mapping[str, type] | None = None,
    **options: Any,
) -> Screen:
    """Reads a screen with its classifier and checks all of it; nothing that it says is executed.

    Args:
      directory: What `save_screen` wrote, or a stage's directory that holds it in ``classifier/``.
      detectors: Classes that are not of this package, by their names.
      **options: Of `load_classifier`, for encoders and heads of your own.

    Returns:
      ``screen(images)`` says of uint8 images, or of pixels in [0, 1], ``[n, H, W, 3]``, which are
      suspicious, how much, and why: see `screening.Screen`.

    Raises:
      ValueError: If a file is not what was written, or the classifier is another one.
      FileNotFoundError: If there is no screen.
    """
    folder = _folder(directory)
    where = folder / CARD_FILE
    if not where.is_file():
        raise FileNotFoundError(
            f"no screen in {folder} (there is no {CARD_FILE}); give a directory that save_screen "
            "wrote, or the stage `screen` of a run, such as runs/digits/screen"
        )
    record = cards.decode(cards.read_bytes(folder, CARD_FILE), where)
    kinds = {"schema": int, "classifier": str, "threshold": float, "key": list, "members": dict}
    cards.check_card(record, {**kinds, "weights": dict}, where)
    cards.check_seal(record, where)
    model = load_classifier(folder, **options)
    if _sum_of(model) != record["classifier"]:
        raise ValueError(
            f"{where} was fitted for another classifier than the one beside it; run the stage "
            "`screen` again, or bring that classifier back"
        )
    _check_members(record["members"], where)
    known = {**_KINDS, **(detectors or {})}
    # A class of one's own is saved by its module too, and may be given by its name alone.
    for kind in {entry["kind"] for entry in record["members"].values()} - known.keys():
        if (name := kind.rpartition(":")[2]) in (detectors or {}):
            known[kind] = detectors[name]
    try:
        flat = cards.flatten(_read_arrays(folder, record))
        members = {
            name: _make(name, entry, flat, folder, known, options)
            for name, entry in record["members"].items()
        }
        key = jax.random.wrap_key_data(jnp.asarray(record["key"], jnp.uint32))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: its entries do not make a screen: {error}") from error
    return Screen(model, Fused(members), record["threshold"], key)


def _check_members(members: Mapping[str, Any], where: pathlib.Path) -> None:
    for name, entry in members.items():
        _check_name(name, where)
        kinds = {"kind": str, "options": dict, "models": list, "shapes": dict}
        cards.check_card(entry, kinds, f"{where}, member {name!r}")
        for field in entry["models"]:
            _check_name(field, where)


def _check_name(name: Any, where: Any) -> None:
    # Names are directories, and one like ".." would lead out of the screen's.
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w .+\-]*", name):
        raise ValueError(f"{where}: {name!r} cannot be a name; take letters, digits and . + - _")


def _describe(name: str, member: Calibrated):
    """Returns a member's entry of the card, its arrays by path, and its classifiers by field."""
    detector, arrays, models, plain = member.detector, {}, {}, {}
    for field in dataclasses.fields(detector):
        value = getattr(detector, field.name)
        if not field.metadata.get("pytree_node", True):
            plain[field.name] = value
        elif isinstance(value, Classifier):
            models[field.name] = value
        else:
            arrays[f"{name}/{field.name}"] = np.asarray(value, np.float32)
    surprise = member.surprise
    arrays[f"{name}.quantiles"] = np.asarray(surprise.quantiles, np.float32)
    arrays[f"{name}.excess"] = np.asarray(surprise.excess, np.float32)
    entry = {
        "kind": _kind_of(detector),
        "options": plain,
        "models": sorted(models),
        "shapes": {path: list(array.shape) for path, array in arrays.items()},
    }
    return entry, arrays, models


def _kind_of(detector: Any) -> str:
    kind = type(detector)
    # By identity: a user's class may be called Spectrum, or be a subclass of it.
    if _KINDS.get(kind.__name__) is kind:
        return kind.__name__
    return f"{kind.__module__}:{kind.__qualname__}"


def _read_arrays(folder: pathlib.Path, record: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {}
    for entry in record["members"].values():
        shapes |= entry["shapes"]
    like = {path: jax.ShapeDtypeStruct(tuple(s), np.float32) for path, s in shapes.items()}
    return cards.read_variables(folder, record["weights"], WEIGHTS_FILE, like)


def _make(
    name: str,
    entry: Mapping[str, Any],
    flat: Mapping[str, jax.Array],
    folder: pathlib.Path,
    known: Mapping[str, type],
    options: Mapping[str, Any],
) -> Calibrated:
    if entry["kind"] not in known:
        raise ValueError(
            f"{folder / CARD_FILE} has the detector {entry['kind']!r}, which is not one of "
            f"{sorted(_KINDS)}; if you trust it, pass its class: "
            f"load_screen(..., detectors={{{entry['kind']!r}: ...}})"
        )
    fields = {path.partition("/")[2]: a for path, a in flat.items() if path.startswith(f"{name}/")}
    models = {
        field: load_classifier(folder / MODELS / name / field, **options)
        for field in entry["models"]
    }
    # JSON has no tuples, and a list does not hash.
    plain = {n: tuple(v) if isinstance(v, list) else v for n, v in entry["options"].items()}
    surprise = Surprise(flat[f"{name}.quantiles"], flat[f"{name}.excess"])
    return Calibrated(known[entry["kind"]](**fields, **models, **plain), surprise)


def _sum_of(model: Any) -> str:
    """Identifies a classifier by its weights, and by what it is made of besides."""
    total = hashlib.sha256()
    for path, array in sorted(cards.to_arrays(model.variables).items()):
        total.update(f"{path} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    encoder = model.encoder
    total.update(repr((encoder.mean, encoder.std, encoder.preprocess)).encode())
    return total.hexdigest()
