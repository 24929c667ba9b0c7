"""Which files weights are read from: the file itself, its shards, and what lies beside it."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from robust_ssl import disk

INDEX = ".index.json"
FETCH_AGAIN = "fetch it again"
_FOLDER_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
_FOLDER_FILES += ("open_clip_pytorch_model.bin",)
_NEIGHBORS = ("config.json", "preprocessor_config.json", "processor_config.json")
_NEIGHBORS += ("open_clip_config.json",)


def locate(path: pathlib.Path) -> pathlib.Path:
    """Returns the file of tensors, or the index of several, that a path means."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; give a file of weights or its folder")
        return path  # a pipe too: what opens it says so
    for name in _FOLDER_FILES:
        for file in (path / name, path / (name + INDEX)):
            if file.exists():
                return file
    suffixes = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{path} has "
            + (f"several files of weights, {names}" if files else "no file of weights")
            + "; give the path of one"
        )
    return files[0]


def files_of(path: str | os.PathLike) -> list[pathlib.Path]:
    """Returns all files that weights are read from, the one that was named first.

    Raises:
      ValueError: If an index names files that are not beside it.
    """
    file = locate(pathlib.Path(path))
    shards = sorted(set(places_of(file).values())) if file.name.endswith(INDEX) else []
    return [file, *(file.parent / name for name in shards), *_neighbors(path, file)]


def read_neighbors(path: str | os.PathLike, file: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON files that belong to a file of weights, by name.

    Args:
      path: As it was named.
      file: Of the tensors.
    """
    return {neighbor.name: read_json(neighbor) for neighbor in _neighbors(path, file)}


def _neighbors(path: str | os.PathLike, file: pathlib.Path) -> list[pathlib.Path]:
    # A file of a download folder does not belong to what lies beside it.
    published = file.name.endswith(INDEX) or file.name in _FOLDER_FILES
    if not (published or pathlib.Path(path).is_dir()):
        return []
    return [file.parent / name for name in _NEIGHBORS if (file.parent / name).is_file()]


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns what a JSON file beside weights says.

    Raises:
      ValueError: If it is no JSON object.
    """
    try:
        value = disk.read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; {FETCH_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must be a JSON object; {FETCH_AGAIN}")
    return value


def places_of(index: pathlib.Path) -> dict[str, str]:
    """Returns the shard of each tensor, by name.

    Raises:
      ValueError: If an index says no such thing, or names files that are not beside it.
    """
    places = read_json(index).get("weight_map")
    if not places or not isinstance(places, dict) or {*map(type, places.values())} != {str}:
        raise ValueError(f'{index} has no "weight_map" of tensor names to files; {FETCH_AGAIN}')
    names = sorted(set(places.values()))
    # An index is foreign data: "../" in it could read any file of this machine.
    outside = [name for name in names if pathlib.PurePath(name).name != name or "\\" in name]
    if outside:
        raise ValueError(f"{index} names files outside its folder: {outside[:5]}; do not use it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(
            f"{index} names shards that are not beside it: {absent[:5]}; fetch them too"
        )
    return places
