"""`examine`: the ten checks of one source, in order, none left out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl.provenance import content, documents, network, signature
from robust_ssl.provenance.check import Check
from robust_ssl.provenance.lock_files import read_lock
from robust_ssl.provenance.source import Source, open_source

_CODE = ("builder", "preprocess", "head")


def examine(
    source: str | os.PathLike | Source,
    lock: Mapping[str, Any] | str | os.PathLike | None = None,
    *,
    signature_file: str | os.PathLike | None = None,
    public_key: str | os.PathLike | None = None,
    allow_moving: bool = False,
    **options: Any,
) -> tuple[Check, ...]:
    """Makes the ten checks of where an encoder comes from and whether it is what it was.

    Each is passed, failed, or absent where there is nothing to judge by.  Nothing in the files is
    executed.  The ninth is another program's opinion, and decides nothing.

    Args:
      source: As `open_source` takes it: a shipped name, a directory of this package, a foreign
        file or folder, ``hf://owner/name@<commit>``; or what `open_source` has found.
      lock: What `lock` returned, or the file that `write_lock` wrote, which may lie among those
        of the source; None where there is none.
      signature_file: Of model-signing; None looks beside the files.
      public_key: The signer's, PEM.
      allow_moving: Whether a revision of the hub may be a branch or a tag; the first check says so.
      **options: What a foreign file has to be told, or the builder of an own network; by default
        those of the lock, but for code of your own, which is named again.

    Returns:
      Ten checks, in the order of `NAMES`.

    Raises:
      ValueError: If there is nothing of this name, or the hub or the lock cannot be read.
      FileNotFoundError: If a path is not there.

    Example:
      >>> checks = examine("simclr-cifar10-r18w24")
      >>> [check.number for check in checks], checks[4].outcome
      ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 'pass')
    """
    own = None
    if isinstance(lock, str | os.PathLike):
        own, lock = pathlib.Path(lock).resolve(), read_lock(lock)
    if not isinstance(source, Source):
        source = open_source(source, allow_moving=allow_moving, **told(lock, options))
    # Whatever a lock beside its encoder is called, it is not in itself.
    files = {name: file for name, file in source.files.items() if file.resolve() != own}
    source = dataclasses.replace(source, files=files)
    return of_network(source, network.read(source), lock, signature_file, public_key)


def told(lock: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a foreign file has to be told: by the lock, and over it by who asks."""
    # A name from a file is never imported: code of one's own is named again by who verifies.
    by_lock = {} if lock is None else {n: x for n, x in lock["options"].items() if n not in _CODE}
    return {**by_lock, **options}


def of_network(
    source: Source,
    read: network.Network,
    lock: Mapping[str, Any] | None = None,
    signature_file: str | os.PathLike | None = None,
    public_key: str | os.PathLike | None = None,
) -> tuple[Check, ...]:
    """Makes the ten checks of a source whose network has been read."""
    return (
        documents.check_revision(source, lock),
        content.check_files(source, lock),
        content.check_format(source),
        signature.check_signature(source, signature_file, public_key),
        network.check_architecture(read, lock),
        network.check_weights(read),
        network.check_references(read, lock),
        documents.check_documents(source, lock),
        content.check_scanner(source),
        documents.check_training(source, lock),
    )
