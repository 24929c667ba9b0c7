"""What is examined: an encoder or a classifier, however it is named, and its files."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from robust_ssl import disk, weights
from robust_ssl.weights import beside, classifiers, hub, native
from robust_ssl.workdir import versions

Kind = Literal["shipped", "encoder", "classifier", "foreign"]
# What this package writes about an encoder, and signatures, are no part of it.
LOCK, STATEMENT, MATERIALS = "encoder.lock.json", "provenance.intoto.json", "bom.cdx.json"
_OWN = (".lock.json", ".sig", ".intoto.json", ".cdx.json")
_MOST_FILES = 10_000  # of a folder; an encoder has a few
# What is said beside a lone file of weights; what is not read with it need not belong to it.
_BESIDE = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclasses.dataclass(frozen=True)
class Source:
    """An encoder or a classifier on disk.

    Attributes:
      given: As it was named.
      kind: ``"shipped"``, ``"encoder"`` or ``"classifier"`` of this package, or ``"foreign"``.
      folder: Where its files lie.
      files: Its files by their path from the folder, in order; links are read through.
      path: What `weights` reads it from.
      address: Of the hub, pinned; None of any other.
      moved: The revision that was asked for on the hub, where that one may move.
      options: What a foreign file had to be told, or the builder of an own network.
    """

    given: str
    kind: Kind
    folder: pathlib.Path
    files: Mapping[str, pathlib.Path]
    path: pathlib.Path
    address: hub.Address | None = None
    moved: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def revision(self) -> str:
        """What cannot change under its name: a commit, or the package's version; else ``""``."""
        if self.address is not None:
            return self.address.revision
        return f"robust-ssl {versions()['robust-ssl']}" if self.kind == "shipped" else ""

    @property
    def name(self) -> str:
        """The name for statements and tables."""
        if self.address is not None:
            return self.address.name
        place = self.path.resolve() if self.path.is_dir() else pathlib.PurePath(self.given)
        return place.name if self.path.is_dir() else place.stem


def open_source(
    source: str | os.PathLike, *, allow_moving: bool | None = False, **options: Any
) -> Source:
    """Finds an encoder or a classifier and its files; no weights are read yet.

    Args:
      source: A shipped name, a directory of `save_encoder` or `save_classifier` (or a finished
        recipe's), a foreign file or folder, or ``hf://owner/name@<commit>``.
      allow_moving: Whether a revision of the hub may be a branch or a tag.
      **options: As `import_encoder` takes them of a foreign file, as `load_encoder` and
        `load_classifier` of an own network; None is not named.

    Raises:
      ValueError: If there is nothing of this name, or the hub cannot be read.
      FileNotFoundError: If a path is not there.

    Example:
      >>> source = open_source("simclr-cifar10-r18w24")
      >>> source.kind, "encoder.safetensors" in source.files
      ('shipped', True)
    """
    given = os.fspath(source)
    options = {name: option for name, option in options.items() if option is not None}
    if isinstance(source, str) and source in weights.list_encoders():
        folder = pathlib.Path(str(importlib.resources.files("robust_ssl.zoo") / source))
        return Source(given, "shipped", folder, _listed(folder), folder, options=options)
    address, place = hub.located(source, allow_moving)
    path = disk.expanded(place)
    if address is not None:
        moved = hub.parse(given, allow_moving=True)
        kind: Kind = "encoder" if (path / native.CARD_FILE).is_file() else "foreign"
        files = {name: file for name, file in _listed(path).items() if hub.wanted(name)}
        asked = "" if moved.is_pinned else moved.revision or "main"
        return Source(given, kind, path, files, path, address, asked, options)
    return _on_disk(given, path, options)


def _on_disk(given: str, path: pathlib.Path, options: Mapping[str, Any]) -> Source:
    if path.is_dir():
        inner = path / "classifier"
        is_inner = not (path / classifiers.CARD_FILE).is_file()
        folder = inner if is_inner and (inner / classifiers.CARD_FILE).is_file() else path
        kind: Kind = "foreign"
        if (folder / classifiers.CARD_FILE).is_file():
            kind = "classifier"
        elif (folder / native.CARD_FILE).is_file():
            kind = "encoder"
        return Source(given, kind, folder, _listed(folder), folder, options=options)
    if not path.exists():
        weights.encoder_card(given)  # which says what is near
        raise FileNotFoundError(f"{path} is not there")
    try:
        read = beside.files_of(path)
    except ValueError:  # of an index whose shards are gone, which reading says
        read = [path]
    said = [path.parent / name for name in _BESIDE if (path.parent / name).is_file()]
    files = {file.name: file for file in (*read, *said)}
    return Source(given, "foreign", path.parent, files, path, options=options)


def _listed(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the files of a folder by their path in it; hidden ones and what is about it are not.

    Links to folders are not followed: they could lead around in a circle.
    """
    files = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left(name))
        for name in sorted(names):
            if not _is_left(name):
                file = pathlib.Path(place) / name
                files[file.relative_to(folder).as_posix()] = file
        if len(files) > _MOST_FILES:
            raise ValueError(
                f"{folder} has more than {_MOST_FILES:,} files; give the folder of one encoder"
            )
    return dict(sorted(files.items()))


def about(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the locks, statements and bills of materials in a folder, by name."""
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(_OWN)]
    return {name: folder / name for name in names if (folder / name).is_file()}


def _is_left(name: str) -> bool:
    hidden = name.startswith(".") or name == "__pycache__"
    return hidden or name.endswith(_OWN)
