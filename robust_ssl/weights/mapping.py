"""Names of foreign weights against ours: one table, read forwards to import, backwards to export.

A layout lists an `Entry` for every variable of a network: its path in our tree, the foreign
tensor or tensors it is made of, and how the numbers are arranged there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from robust_ssl.types import Encoder


@dataclasses.dataclass(frozen=True)
class Kind:
    """How numbers are arranged in the foreign file.

    Attributes:
      join: Foreign arrays to ours.
      split: Our array to the foreign ones, given how many there are; the inverse of `join`.
    """

    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray, int], Sequence[np.ndarray]]


def _one(forward: Callable, backward: Callable) -> Kind:
    return Kind(lambda arrays: forward(arrays[0]), lambda array, count: [backward(array)])


COPY = _one(lambda x: x, lambda x: x)
CONV = _one(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
DENSE = _one(np.transpose, np.transpose)  # [out, in], [in, out]
# Several dense layers over the same input that are one here: queries, keys and values.
STACKED_DENSE = Kind(
    lambda arrays: np.concatenate([x.T for x in arrays], axis=1),
    lambda array, count: [x.T for x in np.split(array, count, axis=1)],
)
STACKED_BIAS = Kind(
    lambda arrays: np.concatenate(arrays), lambda array, count: np.split(array, count)
)


def patches(patch_size: int) -> Kind:
    """A strided convolution ``[out, 3, patch, patch]`` that is a dense layer on patches here."""
    return _one(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1),
    )


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variable of ours and what it is called elsewhere.

    Attributes:
      path: Ours, ``"params/stage1/block1/conv1/conv/kernel"``.
      names: The foreign tensors it is made of, in order.
      kind: How they are arranged.
    """

    path: str
    names: tuple[str, ...]
    kind: Kind = COPY


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which encoders are named in files.

    Attributes:
      name: What `--layout` calls it, ``"torchvision-resnet"``.
      source: Who writes such files, for people.
      matches: Whether a file's tensor names look like this layout; the first that does is taken.
      rename: A file's tensor name to the name in `entries`, without wrappers' prefixes; None for
        what is dropped on purpose (projector, classifier, momentum copy, counters).  A name it
        does not know comes back as it is, and `join` reports it.
      network: The builder's name in `robust_ssl.models` and its options, worked out from the
        renamed tensors' shapes and the JSON files beside them (by file name).  Raises ValueError
        that says what must be named where they do not tell (stem padding, attention heads).
      entries: Every variable of such an encoder.
    """

    name: str
    source: str
    matches: Callable[[Set[str]], bool]
    rename: Callable[[str], str | None]
    network: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], tuple[str, dict[str, Any]]]
    entries: Callable[[Encoder], list[Entry]]


def join(
    entries: Sequence[Entry],
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    where: str,
) -> dict[str, np.ndarray]:
    """Returns our arrays, float32, by path; every foreign tensor must be used, every path filled.

    Args:
      entries: The whole network.
      tensors: Foreign tensors by name, wrappers' prefixes already removed.
      expected: Our leaves by path, anything with a shape.
      where: What errors call the file.

    Raises:
      ValueError: A list of all that is missing, unexpected, transposed or of a wrong shape.
    """
    asked = {name: entry for entry in entries for name in entry.names}
    problems = [f"missing {name}" for name in asked if name not in tensors]
    problems += [f"unexpected {name} {x.shape}" for name, x in tensors.items() if name not in asked]
    arrays = {}
    for entry in entries:
        if any(name not in tensors for name in entry.names):
            continue
        needed = entry.kind.split(np.empty(expected[entry.path].shape, np.int8), len(entry.names))
        wrong = []
        for name, like in zip(entry.names, needed, strict=True):
            found = tensors[name].shape
            if found != like.shape:
                turned = like.shape != found and sorted(like.shape) == sorted(found)
                wrong.append(
                    f"{name} has shape {found}, the network needs {like.shape}"
                    + (" (are its axes transposed?)" if turned else "")
                )
        problems += wrong
        if not wrong:
            joined = entry.kind.join([np.asarray(tensors[name]) for name in entry.names])
            arrays[entry.path] = np.ascontiguousarray(joined, dtype=np.float32)
    uncovered = expected.keys() - {entry.path for entry in entries}
    problems += [f"no foreign name is known for {path}" for path in sorted(uncovered)]
    if problems:
        raise ValueError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join(problems))
    return arrays


def split(entries: Sequence[Entry], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns foreign tensors by name from our arrays by path: the way back of `join`.

    Example:
      >>> entry = Entry("params/dense/kernel", ("fc.weight",), DENSE)
      >>> split([entry], {"params/dense/kernel": np.zeros((2, 3), np.float32)})["fc.weight"].shape
      (3, 2)
    """
    tensors = {}
    for entry in entries:
        parts = entry.kind.split(arrays[entry.path], len(entry.names))
        for name, part in zip(entry.names, parts, strict=True):
            tensors[name] = np.ascontiguousarray(part)
    return tensors
