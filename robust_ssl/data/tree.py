"""What lies in a folder and below it: pictures, other files, folders that are left out."""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from robust_ssl.data import pictures

# Left by archives, network disks, file systems and notebooks; hidden ones besides.
_FOREIGN = {
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "__pycache__"),
    "system volume information",
}
_FOREIGN_FILES = {"thumbs.db", "desktop.ini", "icon\r"}


class Contents(NamedTuple):
    """What lies in a folder and below it.

    Attributes:
      pictures: Files that are read, sorted.
      holders: Names of the folders below it on the way to pictures; ``"."`` is itself.
      others: How many other files there are, by suffix.
      foreign: How many folders were not entered, by name.
    """

    pictures: list[pathlib.Path]
    holders: set[str]
    others: collections.Counter[str]
    foreign: collections.Counter[str]


def folders(folder: pathlib.Path) -> list[str]:
    """Returns the names of the folders in a folder, in order, but for foreign ones."""
    names = [e.name for e in os.scandir(folder) if _is_folder(e) and not _is_foreign(e.name)]
    return sorted(names, key=natural)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_foreign(name: str) -> bool:
    return name.startswith(".") or name.lower() in _FOREIGN


def walk(
    folder: pathlib.Path, found: Contents | None = None, above: tuple = ()
) -> Iterator[pathlib.Path]:
    """Yields each picture in a folder and below; counts what is none in `found`."""
    status = folder.stat()
    place = (status.st_dev, status.st_ino)
    if place in above:  # a link to a folder above
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if _is_folder(entry):
            if not _is_foreign(entry.name):
                yield from walk(pathlib.Path(entry.path), found, (*above, place))
            elif found is not None:
                found.foreign[entry.name] += 1
        elif _is_picture(entry):
            yield pathlib.Path(entry.path)
        elif found is not None and not _is_foreign_file(entry.name):
            found.others[_kind(entry)] += 1


def _is_foreign_file(name: str) -> bool:
    # macOS leaves "._name.png" beside each file it copies.
    return name.startswith(".") or name.lower() in _FOREIGN_FILES


def _is_picture(entry: os.DirEntry) -> bool:
    # Neither a pipe, which waits for ever, nor /dev/zero, which never ends, is a file.
    if _is_foreign_file(entry.name) or not _is_file(entry):
        return False
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in pictures.SUFFIXES:
        return True
    return suffix not in pictures.UNREAD_SUFFIXES and pictures.starts_like_picture(entry.path)


def _kind(entry: os.DirEntry) -> str:
    if not _is_file(entry):
        return "no regular file"
    return os.path.splitext(entry.name)[1].lower() or "no suffix"


def contents(folder: pathlib.Path) -> Contents:
    """Returns all that lies in a folder and below it."""
    found = Contents([], set(), collections.Counter(), collections.Counter())
    parent = None
    for file in walk(folder, found):
        found.pictures.append(file)
        if file.parent != parent:
            parent = file.parent
            found.holders.update(parent.relative_to(folder).parts or (".",))
    return found


def foreign(folder: pathlib.Path) -> collections.Counter[str]:
    """Returns the folders right in a folder that are no classes, each once."""
    entries = os.scandir(folder)
    return collections.Counter(e.name for e in entries if _is_folder(e) and _is_foreign(e.name))


def stray(folder: pathlib.Path) -> list[str]:
    """Returns the names of the pictures right in a folder."""
    return sorted((e.name for e in os.scandir(folder) if _is_picture(e)), key=natural)


def natural(name: str) -> tuple:
    """Returns a key by which ``class2`` comes before ``class10``.

    Example:
      >>> sorted(["class10", "class2", "class02"], key=natural)
      ['class02', 'class2', 'class10']
    """
    parts = re.split(r"([0-9]+)", name)
    # Texts and numbers take turns, so that no two of unlike kinds are compared.
    key = [int(part) if index % 2 else part for index, part in enumerate(parts)]
    return (key, name)
