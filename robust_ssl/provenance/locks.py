"""`encoder.lock.json`: what an encoder is, so that anybody can see later whether it still is."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl.build import name_of
from robust_ssl.provenance import content, documents, network
from robust_ssl.provenance.check import NAMES, Check, some
from robust_ssl.provenance.examination import examine, of_network
from robust_ssl.provenance.lock_files import SCHEMA, read_lock
from robust_ssl.provenance.source import Source, open_source
from robust_ssl.weights import hub
from robust_ssl.workdir import versions

# Without these nothing is shown of an encoder, whatever the lock had.
ALWAYS = ("files", "architecture", "weights", "references")
_REFUSED = ("format", *ALWAYS)  # what fails one of them in itself is not locked


def lock(
    source: str | os.PathLike | Source, *, allow_moving: bool = False, **options: Any
) -> dict[str, Any]:
    """Returns what an encoder is now: files, architecture, outputs for eight images, documents.

    Args:
      source: As `examine` takes it.
      allow_moving: As in `examine`; the lock has the commit of today.
      **options: As in `examine`; they are kept, so that `verify` needs none.

    Returns:
      The lock, JSON values; the same encoder has the same lock.

    Raises:
      ValueError: If the source makes no network, or a check of the encoder itself fails: a lock
        says that somebody has looked.
      FileNotFoundError: If it is not there.

    Example:
      >>> made = lock("simclr-cifar10-r18w24")
      >>> made["source"]["kind"], len(made["references"]["features"])
      ('shipped', 8)
    """
    if not isinstance(source, Source):
        source = open_source(source, allow_moving=allow_moving, **options)
    read = network.read(source)
    checks = of_network(source, read)
    wrong = [check for check in checks if check.outcome == "fail" and check.name in _REFUSED]
    if wrong or read.model is None:
        said = some([f"{check.name}: {check.said}" for check in wrong], 3)
        raise ValueError(f"{source.given} is not locked as it is: {said or 'it makes no network'}")
    revision = source.revision or documents.origin(source)
    return {
        "schema": SCHEMA,
        "kind": "robust_ssl encoder lock",
        "package": versions()["robust-ssl"],
        "source": {
            "given": str(source.address or source.given),
            "kind": source.kind,
            "revision": revision,
        },
        "options": _as_text(source.options),
        "files": content.sums(source),
        "architecture": dict(read.architecture),
        "references": read.outputs,
        "documents": documents.documents(source),
        "training": documents.training(source),
        "outcomes": {check.name: check.outcome for check in checks},
    }


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options as JSON has them: a function of your own by its name."""
    named = {name: name_of(x) if callable(x) else x for name, x in options.items()}
    return json.loads(json.dumps(named))


def verify(
    lock: Mapping[str, Any] | str | os.PathLike,
    source: str | os.PathLike | None = None,
    *,
    signature_file: str | os.PathLike | None = None,
    public_key: str | os.PathLike | None = None,
    **options: Any,
) -> tuple[Check, ...]:
    """Makes the ten checks of an encoder against its lock.

    Args:
      lock: What `write_lock` wrote, or `lock` returned.
      source: The encoder; None for the one that the lock names, from the folder of its file.
      signature_file: As in `examine`.
      public_key: As in `examine`.
      **options: As in `examine`.

    Returns:
      Ten checks; `needed` says which of them must not be absent.

    Raises:
      ValueError: If the lock or the source cannot be used.
      FileNotFoundError: If one of them is not there.
    """
    is_file = isinstance(lock, str | os.PathLike)
    record = read_lock(lock) if is_file else lock
    if source is None:
        source = record["source"]["given"]
        if is_file and record["source"]["kind"] != "shipped" and not hub.is_address(source):
            source = pathlib.Path(lock).parent / source
    return examine(source, lock, signature_file=signature_file, public_key=public_key, **options)


def needed(record: Mapping[str, Any], *, signed: bool = False) -> tuple[str, ...]:
    """Returns the checks, by name, without which it is not shown that a lock holds.

    Args:
      record: The lock; what had passed when it was made must not be absent now.
      signed: Whether a signature is asked for.
    """
    had = [name for name in NAMES if record["outcomes"].get(name) == "pass"]
    names = {*had, *ALWAYS, *(["signature"] if signed else [])} - {"scanner"}
    if not signed:
        names.discard("signature")
    return tuple(name for name in NAMES if name in names)
