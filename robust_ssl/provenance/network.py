"""Checks 5 to 7: the network that the files make, its weights, and what it answers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl import disk, weights
from robust_ssl.build import resolve
from robust_ssl.provenance import images
from robust_ssl.provenance.check import Check, absent, failed, passed, some
from robust_ssl.provenance.source import Source
from robust_ssl.weights import cards, native

_LEAST = 16  # numbers of a kernel: a smaller one may be constant, or equal to another, by chance
_NOT_NUMBERS = ("NaN or infinite", "negative variances")


@dataclasses.dataclass(frozen=True)
class Network:
    """What the files of a source make.

    Attributes:
      model: The encoder or classifier; None where the files do not make one.
      arrays: Its variables by path, as far as they can be read.
      architecture: Builder, options and shapes; empty where they cannot be told.
      problems: What does not fit.
    """

    model: Any = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @functools.cached_property
    def outputs(self) -> dict[str, Any] | None:
        """What the network answers to the eight images; None where there is none."""
        if self.model is None:
            return None
        return images.reference_outputs(self.model, self.architecture["image_size"])


def read(source: Source) -> Network:
    """Reads what the files of a source make, however damaged they are.

    A card's checksum is not asked here: that a file has changed is another check, and what it has
    become is worth knowing.
    """
    readers = {"classifier": _classifier, "foreign": _foreign}
    try:
        return readers.get(source.kind, _encoder)(source)
    except (ValueError, OSError) as error:
        return Network(problems=tuple(_lines(error)))


def _lines(error: Exception) -> list[str]:
    first, *others = str(error).splitlines() or [type(error).__name__]
    return [line.strip() for line in others] if others else [first]


def _encoder(source: Source) -> Network:
    where = source.folder / native.CARD_FILE
    record = cards.decode(disk.read_bytes(where), where)
    try:
        skeleton = _skeleton(source, record)
    except (KeyError, TypeError) as error:
        return Network(problems=(f"{where}: {type(error).__name__} {error}",))
    arrays = _arrays(source.folder / native.WEIGHTS_FILE)
    problems = _misfits(arrays, skeleton.variables)
    if problems:
        return Network(arrays=arrays, problems=tuple(problems))
    loaded = skeleton.replace(variables=_nested(arrays), name=str(record.get("name")))
    named = {"builder": record["builder"], "options": record["options"]}
    return Network(loaded, arrays, _architecture(arrays, loaded, named))


def _skeleton(source: Source, record: Mapping[str, Any]) -> Any:
    builder, where = source.options.get("builder"), source.folder / native.CARD_FILE
    make = resolve(builder) if builder else native.allowed_builder(record["builder"], source.folder)
    skeleton = native.build_skeleton(make, record["options"], str(where))
    preprocess = cards.read_preprocess(record, where, source.options.get("preprocess"))
    cards.check_normalization(skeleton.mean, skeleton.std, where)
    return skeleton.replace(preprocess=preprocess or skeleton.preprocess)


def _arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(disk.read_bytes(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file} has numbers of type {error}; it must be F32") from error


def _misfits(arrays: Mapping[str, np.ndarray], variables: Any) -> list[str]:
    """Returns what does not fit the network; NaN and infinity are for another check."""
    whole = {path: np.nan_to_num(array) for path, array in arrays.items()}
    try:
        cards.check_arrays(whole, cards.flatten(variables), "the weights")
    except ValueError as error:
        return _lines(error)
    return []


def _nested(arrays: Mapping[str, np.ndarray]) -> Any:
    from flax import traverse_util

    return traverse_util.unflatten_dict(dict(arrays), sep="/")


def _classifier(source: Source) -> Network:
    names = ("head", "builder", "preprocess")
    options = {name: source.options[name] for name in names if name in source.options}
    try:
        loaded = weights.load_classifier(source.path, **options)
    except ValueError as error:
        arrays = _all_arrays(source)
        problems = [line for line in _lines(error) if not _is_of_others(line)]
        return Network(arrays=arrays, problems=tuple(problems))
    arrays = cards.to_arrays(loaded.variables)
    card = weights.classifier_card(source.path)
    named = {"head": card["head"], "num_classes": card["num_classes"]}
    if (source.folder / native.CARD_FILE).is_file():
        encoder = weights.encoder_card(str(source.folder.absolute()))
        named |= {"builder": encoder["builder"], "options": encoder["options"]}
    return Network(loaded, arrays, _architecture(arrays, loaded.encoder, named))


def _all_arrays(source: Source) -> dict[str, np.ndarray]:
    arrays = {}
    for name, file in source.files.items():
        if name.endswith(".safetensors"):
            try:
                stored = _arrays(file)
            except (ValueError, OSError):
                continue  # said by the error that led here
            arrays |= {f"{name}:{path}": array for path, array in stored.items()}
    return arrays


def _is_of_others(line: str) -> bool:
    return any(words in line for words in _NOT_NUMBERS)


def _foreign(source: Source) -> Network:
    try:
        loaded = weights.import_encoder(source.path, **source.options)
    except (ValueError, TypeError) as error:
        lines = _lines(error)
        bad = {
            line.partition(" has ")[0]: np.array([np.nan]) for line in lines if _is_of_others(line)
        }
        return Network(arrays=bad, problems=tuple(x for x in lines if not _is_of_others(x)))
    arrays = cards.to_arrays(loaded.variables)
    builder, options = native.builder_of(loaded.replace(preprocess=None))
    return Network(
        loaded, arrays, _architecture(arrays, loaded, {"builder": builder, "options": options})
    )


def _architecture(
    arrays: Mapping[str, np.ndarray], encoder: Any, named: Mapping[str, Any]
) -> dict[str, Any]:
    shapes = {path: [str(array.dtype), *array.shape] for path, array in sorted(arrays.items())}
    return {
        **named,
        "features": encoder.dim,
        "image_size": encoder.image_size,
        "mean": [float(x) for x in encoder.mean],
        "std": [float(x) for x in encoder.std],
        "preprocess": None if encoder.preprocess is None else repr(encoder.preprocess),
        "parameters": sum(a.size for path, a in arrays.items() if "batch_stats/" not in path),
        "arrays": shapes,
    }


def check_architecture(network: Network, lock: Mapping[str, Any] | None) -> Check:
    """Check 5: keys, shapes, types and number of parameters, and normalization, are the lock's."""
    if network.problems:
        return failed(
            "architecture",
            f"the files make no network: {some(network.problems, 3)}",
            problems=list(network.problems),
        )
    ours = network.architecture
    if not ours:
        return absent(
            "architecture", "the network cannot be built while its weights are no numbers"
        )
    evidence = {name: value for name, value in ours.items() if name != "arrays"}
    evidence["arrays"] = len(ours["arrays"])
    shown = f"{len(ours['arrays'])} arrays, {ours['parameters']:,} parameters"
    if lock is None:
        return passed("architecture", f"{shown} fit the network exactly", **evidence)
    changes = _changes(lock["architecture"], ours)
    if changes:
        return failed(
            "architecture",
            f"other than the lock's: {some(changes, 3)}",
            changes=changes,
            **evidence,
        )
    return passed("architecture", f"{shown} are those of the lock", **evidence)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changes = []
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        if name == "arrays" and isinstance(old, Mapping):
            changes += [f"{path} is missing" for path in sorted(old.keys() - new.keys())]
            changes += [f"{path} is new" for path in sorted(new.keys() - old.keys())]
            both = sorted(old.keys() & new.keys())
            changes += [
                f"{path}: {old[path]} -> {new[path]}" for path in both if old[path] != new[path]
            ]
        elif old != new:
            changes.append(f"{name}: {old} -> {new}")
    return changes


def check_weights(network: Network) -> Check:
    """Check 6: every number is finite, no layer is constant and no two are the same."""
    arrays = network.arrays
    if not arrays:
        return absent("weights", "no weights can be read")
    bad = [path for path, array in arrays.items() if not np.isfinite(array).all()]
    kernels = {p: a for p, a in arrays.items() if a.ndim > 1 and a.size >= _LEAST and p not in bad}
    constant = [path for path, array in kernels.items() if (array == array.flat[0]).all()]
    twins = _twins({path: array for path, array in kernels.items() if path not in constant})
    problems = [f"{path} is not finite" for path in bad]
    problems += [f"{path} is constant" for path in constant]
    problems += [f"{first} and {second} are equal" for first, second in twins]
    if problems:
        return failed("weights", some(problems, 3), problems=problems)
    return passed(
        "weights",
        f"{len(arrays)} arrays are finite, none is constant and no two are equal",
        arrays=len(arrays),
    )


def _twins(kernels: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    seen: dict[Any, str] = {}
    twins = []
    for path, array in sorted(kernels.items()):
        # Members of an ensemble may be one network with other heads; within one, nothing repeats.
        member = path.partition("member")[2].split("/")[0]
        key = (member, array.shape, hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
        if key in seen:
            twins.append((seen[key], path))
        seen.setdefault(key, path)
    return twins


def check_references(network: Network, lock: Mapping[str, Any] | None) -> Check:
    """Check 7: the eight built-in images give the features of the lock."""
    now = network.outputs
    if now is None:
        return absent("references", "there is no network to ask")
    if not all(np.isfinite(rows).all() for rows in map(np.asarray, now.values())):
        return failed("references", "features of the eight images are not finite")
    if lock is None:
        return absent("references", "no lock to compare the features of the eight images with")
    tolerance = images.TOLERANCE
    moved = images.largest_difference(now, lock["references"])
    evidence = {"largest_difference": moved if np.isfinite(moved) else None, "tolerance": tolerance}
    if not moved <= tolerance:
        by = f"by {100 * moved:.2g} %" if np.isfinite(moved) else "to other shapes"
        said = (
            f"features of the eight images have moved {by}; at most {100 * tolerance:.2g} % may be"
        )
        return failed("references", f"{said}: other weights or another preprocessing", **evidence)
    return passed("references", "the eight images have the features of the lock", **evidence)
