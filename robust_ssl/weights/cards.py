"""A card and a file of weights that belong together: what encoders and classifiers write alike.

A card is a JSON object.  It describes the safetensors file beside it, so that a file which was cut
off, changed or taken from elsewhere is noticed before a single weight is used.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from robust_ssl import disk, schemas, struct
from robust_ssl.build import resolve
from robust_ssl.models import preprocessing
from robust_ssl.types import Encoder

_log = logging.getLogger(__name__)
SCHEMA = 1
CARDS = ("encoder.json", "classifier.json")
# A card names its input transformation; only these names are ever called, whatever the card says.
_STEPS = {
    step.__name__: step
    for step in (preprocessing.JPEG, preprocessing.Quantize, preprocessing.Smooth)
}


def encode(record: Mapping[str, Any]) -> bytes:
    """Returns a card as it is written, with a checksum of itself.

    Raises:
      ValueError: If the record is not JSON; NaN and infinity are not, and other readers choke.
    """
    # Python writes NaN as a bare word by default, which is no JSON.  Keys are texts once read.
    record = json.loads(json.dumps(record, allow_nan=False))
    sealed = {**record, "sha256": _sum(record)}
    return (json.dumps(sealed, indent=2, allow_nan=False) + "\n").encode()


def _sum(record: Mapping[str, Any]) -> str:
    said = {name: entry for name, entry in record.items() if name != "sha256"}
    text = json.dumps(said, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_seal(record: Mapping[str, Any], where: str | os.PathLike) -> None:
    """Raises ValueError if a card is not what was written: one digit makes another encoder of it.

    A card without a checksum, which version 0.1 wrote, is taken with a note: its weights have one,
    and what others have published stays usable.
    """
    path = pathlib.PurePath(str(where))
    seal = f"robust_ssl.weights.seal_card({str(path.parent)!r})"
    is_card = path.name in CARDS  # a lock or a baseline is made again in a moment
    if "sha256" not in record:
        advice = f"{seal} adds one once you have looked at it" if is_card else "make it again"
        _log.warning(
            "%s has no checksum of itself, so an edited entry would not be seen; %s", where, advice
        )
    elif record["sha256"] != _sum(record):
        edited = f" (or, if you have edited it yourself, {seal} accepts it as it is)"
        raise ValueError(
            f"{where} is not what was written: its checksum does not agree; bring it back from a "
            f"copy, or make it again{edited if is_card else ''}"
        )


def read_sealed(path: str | os.PathLike, schema: str, newest: int, what: str) -> dict[str, Any]:
    """Reads a record that says which schema it has, and a checksum of itself.

    Args:
      path: The file.
      schema: Name of its JSON Schema; see `robust_ssl.schemas.read`.
      newest: The number that this version of the package reads.
      what: What the file should be, for messages.

    Raises:
      ValueError: If it is none, of a newer version, or not what was written.
      FileNotFoundError: If it is not there.
    """
    record = decode(disk.read_bytes(path, disk.MOST_JSON), path)
    number = record.get("schema") if isinstance(record, Mapping) else None
    if isinstance(number, int) and number > newest:
        raise ValueError(
            f"{path} has schema {number}, this version reads {newest}; take a newer robust-ssl"
        )
    problem = schemas.problem(schema, record)
    if problem is not None:
        where = schemas.place(problem)
        raise ValueError(f"{path} is no {what}: {where}: {problem.message[:200]}")
    check_seal(record, path)
    return record


def seal_card(directory: str | os.PathLike) -> None:
    """Gives the cards of a directory a new checksum, for whoever has looked at what they say.

    Args:
      directory: Of `save_encoder` or `save_classifier`; what lies deeper in it comes with it.

    Raises:
      ValueError: If a card is no JSON.
      FileNotFoundError: If there is no card.
    """
    folder = pathlib.Path(directory)
    files = [file for name in CARDS for file in sorted(folder.rglob(name))]
    if not files:
        raise FileNotFoundError(f"{folder} has no card: none of {', '.join(CARDS)}")
    for file in files:
        replace_file(file, encode(decode(file.read_bytes(), file)))


def decode(content: bytes, where: str | os.PathLike) -> Any:
    """Returns the JSON value of a card's file.

    Raises:
      ValueError: If it is not JSON, or not UTF-8, or larger or deeper than any card.
    """
    return disk.parse_json(content, where, finite=True)


def check_normalization(mean: Any, std: Any, where: str | os.PathLike) -> None:
    """Raises ValueError unless mean and deviation are three finite numbers, the latter above 0."""
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list | tuple) and len(values) == 3
        numbers = numbers and all(struct.is_number(x) and math.isfinite(x) for x in values)
        if not numbers or (name == "std" and min(values) <= 0):
            shown = repr(values)
            shown = shown if len(shown) < 80 else f"{shown[:77]}..."
            positive = " above 0" if name == "std" else ""
            raise ValueError(f"{where}: {name} must be three finite numbers{positive}, got {shown}")


def check_card(record: Any, kinds: Mapping[str, type], where: str | os.PathLike) -> None:
    """Raises ValueError that lists the entries of a card that are absent or of the wrong type."""
    entries = record if isinstance(record, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(entries.get(key), kind)]
    if not wrong and "weights" in kinds and not isinstance(record["weights"].get("sha256"), str):
        wrong = ["weights/sha256"]
    if wrong:
        raise ValueError(f"{where}: missing or of the wrong type: {', '.join(wrong)}")


def describe_file(name: str, content: bytes) -> dict[str, Any]:
    """Returns what a card says of a file: its name, length and SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    return {"file": name, "bytes": len(content), "sha256": digest}


def read_variables(folder, description: Mapping[str, Any], name: str, like: Any) -> dict[str, Any]:
    """Reads a safetensors file of this package and checks all of it.

    Args:
      folder: Where it lies, a path or a `Traversable`.
      description: What its card says of it; see `describe_file`.
      name: Of the file; the card's own word for it could point out of the folder.
      like: The tree expected, arrays or shapes.

    Returns:
      The variables, a tree like `like`.

    Raises:
      ValueError: If the file is not the one that the card describes, or does not fit.
      FileNotFoundError: If it is not there.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    where = f"{folder}/{name}"
    content = read_described(folder, description, name)
    try:
        arrays = load(content)
    except SafetensorError as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{where} has numbers of type {error}; it must be F32") from error
    # A right sum proves that the file is the card's, not that both fit the network.
    check_arrays(arrays, flatten(like), where)
    # Not `jnp.asarray`, which compiles a program for each shape.
    return traverse_util.unflatten_dict(jax.device_put(arrays), sep="/")


def read_described(folder, description: Mapping[str, Any], name: str) -> bytes:
    """Reads a file that a card describes; arguments and errors are those of `read_variables`."""
    content = read_bytes(folder, name)
    # safetensors notices a cut-off file and a bad header, but not a flipped bit.
    digest = hashlib.sha256(content).hexdigest()
    if digest != description["sha256"]:
        size = description.get("bytes")
        cut = f" (it has {len(content)} bytes instead of {size})" if size != len(content) else ""
        raise ValueError(
            f"{folder}/{name} is not the file its card describes{cut}: SHA-256 is {digest}, the "
            f"card says {description['sha256']}; fetch or save it again"
        )
    return content


def read_bytes(folder, name: str) -> bytes:
    """Reads one file of a folder, which may lie in a zip."""
    file = folder.joinpath(name)
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {name}; save_encoder and save_classifier write a card and its weights"
        )
    return disk.read_bytes(file) if isinstance(file, os.PathLike) else file.read_bytes()


def replace_file(file: pathlib.Path, content: bytes) -> None:
    """Writes beside the file and renames, so that nobody ever reads half of it."""
    disk.check_place(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        disk.replace(file, content)
    except disk.PlaceError:
        raise
    except OSError as error:  # a full disk names no file
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = "; make room" if full else "; name another place"
        reason = f"{error.strerror or error}{way_out}"
        raise OSError(error.errno, f"cannot write {file}: {reason}") from error
    if file.read_bytes() != content:  # by its name, as whoever comes later does
        raise OSError(errno.EIO, f"{file} is not what was just written there")


def flatten(variables) -> dict[str, Any]:
    """Returns the leaves of a tree by path, ``params/stem/conv/kernel``."""
    return traverse_util.flatten_dict(variables, sep="/")


def to_arrays(variables) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by path, on the host."""
    return {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}


def check_encoder(model: Any) -> None:
    """Raises ValueError for a whole classifier where an encoder is meant."""
    if not isinstance(model, Encoder):
        raise ValueError(
            f"this takes an Encoder, got a {type(model).__name__}; of a classifier give "
            "classifier.encoder, or save and export the whole: save_classifier, export_torch"
        )


def check_arrays(arrays: Mapping[str, np.ndarray], expected: Mapping[str, Any], where: str) -> None:
    """Raises ValueError that lists every difference between the arrays and the network."""
    problems = [f"missing {path}" for path in sorted(expected.keys() - arrays.keys())]
    problems += [f"unexpected {path}" for path in sorted(arrays.keys() - expected.keys())]
    for path in sorted(arrays.keys() & expected.keys()):
        array, leaf = arrays[path], expected[path]
        if array.shape != leaf.shape:
            problems.append(f"{path} has shape {array.shape}, the network needs {leaf.shape}")
        # No cast: float16 weights would load in silence and be others than were saved.
        elif array.dtype != np.float32 or leaf.dtype != np.float32:
            problems.append(f"{path} is {array.dtype} for {leaf.dtype}; both must be float32")
        elif not np.isfinite(array).all():
            problems.append(f"{path} has NaN or infinite values")
    if problems:
        raise ValueError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join(problems))


def describe_preprocess(preprocess: Any) -> dict[str, Any]:
    """Returns what a card says of an input transformation, nothing where there is none.

    Raises:
      ValueError: If it is no dataclass of plain values, from which it could be made again.
    """
    if preprocess is None:
        return {}
    kind = type(preprocess)
    # By identity: a subclass of the same name may compute something else.
    ours = _STEPS.get(kind.__name__) is kind
    if not dataclasses.is_dataclass(preprocess) or isinstance(preprocess, type):
        raise ValueError(
            f"a card cannot name the input transformation {preprocess!r}: write a frozen dataclass "
            "with __call__, whose fields are its options"
        )
    options = dataclasses.asdict(preprocess)
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the options of {preprocess!r} are not plain values: {error}") from error
    name = kind.__name__ if ours else f"{kind.__module__}:{kind.__qualname__}"
    return {"preprocess": {"name": name, "options": options}}


def read_preprocess(
    record: Mapping[str, Any],
    where: str | os.PathLike,
    preprocess: str | Callable[..., Any] | None = None,
) -> Any:
    """Returns the input transformation that a card tells of, None where it tells of none.

    Args:
      record: The card.
      where: Its file, for errors.
      preprocess: Makes a transformation that is not of this package, or its name; what a card
        names itself is never imported.
    """
    entry = record.get("preprocess")
    if entry is None:
        return None
    well_formed = isinstance(entry, dict) and isinstance(entry.get("options"), dict)
    if not well_formed or not isinstance(entry.get("name"), str):
        raise ValueError(
            f'{where}: "preprocess" must be {{"name": ..., "options": {{...}}}} with one of the '
            f"names {sorted(_STEPS)}, got {entry!r}"
        )
    step = _STEPS.get(entry["name"]) or (resolve(preprocess) if preprocess else None)
    if step is None:
        raise ValueError(
            f"{where} has the input transformation {entry['name']!r}, which is not one of "
            f"{sorted(_STEPS)}; if you trust it, pass the class itself as preprocess=, or in a "
            f'config write {{"path": ..., "preprocess": "module:Class"}}'
        )
    try:
        return step(**entry["options"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot make {entry['name']}: {error}") from error
