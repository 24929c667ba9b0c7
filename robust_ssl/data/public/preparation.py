"""From a name to a prepared data set, all or nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping

from robust_ssl import disk
from robust_ssl.build import near
from robust_ssl.data import prepared
from robust_ssl.data.public.digests import file_digests
from robust_ssl.data.public.obtain import Say, obtain
from robust_ssl.data.public.scratch import put, remove_stale, scratch
from robust_ssl.data.public.table import SETS, find_set
from robust_ssl.data.public.values import Files, PublicSet
from robust_ssl.data.public.write import write
from robust_ssl.progress import Progress

RECORD = "source.json"  # beside TFDS's own files: which archives a set was made from
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared set.

    Attributes:
      folder: Where it is.
      pixels: The digest of each split's pixels; empty where TFDS itself prepared the set.
      new: Whether it was prepared just now.
    """

    folder: pathlib.Path
    pixels: Mapping[str, str]
    new: bool


def prepare(
    which: str | PublicSet,
    *,
    data_dir: str | os.PathLike | None = None,
    source: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say = print,
) -> Prepared:
    """Fetches a public data set and writes it for `robust_ssl.data.load` and for TFDS.

    Args:
      which: A set's name, or a set that is described like those of the table.
      data_dir: Where it goes; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      source: A copy of the archive, or a folder of the archives; then nothing is fetched.
      overwrite: Whether to prepare anew what is there.
      progress: How to report.
      say: Told what one should know, line by line.

    Returns:
      Where it is and what it holds.

    Raises:
      ValueError: If the name is unknown, a digest is wrong, or an archive is damaged.
      OSError: If an archive cannot be fetched, or the set not be written; then nothing is there
        that counts as prepared, and what was there before is still there.
    """
    public = named(which) if isinstance(which, str) else which
    directory = prepared.data_directory(data_dir)
    remove_stale(directory)
    folder = prepared.find(f"{public.stored}:{public.version}", directory)
    if folder is not None and not overwrite:
        return Prepared(folder, _recorded(folder), new=False)
    source = None if source is None else disk.expanded(source)
    files = obtain(public, directory / "downloads", source, progress=progress, say=say)
    try:
        return _write(public, files, directory, progress)
    except OSError as error:
        raise OSError(
            f"{public.name} cannot be prepared under {directory}: {error.strerror or error}\nmake "
            "room, or take another place with --data-dir; nothing half-made is left"
        ) from error


def named(name: str) -> PublicSet:
    """Returns the public set of a name.

    Raises:
      ValueError: If there is none; names near ones.
    """
    public = find_set(name)
    if public is None:
        known = [public.name for public in SETS]
        hint = near(name.lower(), known)
        raise ValueError(f"unknown data set {name!r}{hint}\n`robust-ssl data list` shows all")
    return public


def _write(public: PublicSet, files: Files, directory: pathlib.Path, progress) -> Prepared:
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / public.stored / public.version
    with scratch(directory, target) as folder:
        made, digests = write(public, public.read(files), folder, progress=progress)
        _compare(public, digests)
        record = {
            "set": public.name,
            "archives": {name: file_digests(path) for name, path in files.items()},
            "pixels": digests,
        }
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        put(made, target, folder)
    return Prepared(target, digests, new=True)


def _compare(public: PublicSet, digests: Mapping[str, str]) -> None:
    """Compares pixels with the table's digests."""
    for split, expected in public.pixels.items():
        if digests[split] == expected:
            continue
        text = (
            f"the pixels of {public.name} ({split}) have the digest {digests[split]}, where the "
            f"table has {expected}"
        )
        if public.proven:
            raise ValueError(f"{text}; nothing was written")
        _log.warning("%s, which was computed from a copy; the archives are the right ones", text)


def _recorded(folder: pathlib.Path) -> dict[str, str]:
    try:
        return dict(disk.read_json(folder / RECORD)["pixels"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # prepared by other means
