"""`provenance.intoto.json`: an in-toto Statement v1 with a SLSA provenance v1 predicate."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl.provenance import content, documents
from robust_ssl.provenance.materials import bill_of_materials
from robust_ssl.provenance.source import MATERIALS, STATEMENT, Source, open_source
from robust_ssl.weights import cards, native
from robust_ssl.workdir import versions

HOME = "https://github.com/robust-ssl/robust-ssl"
_BUILD_TYPE = f"{HOME}/blob/main/docs/provenance.md#build-type-v1"


def statement(
    source: str | os.PathLike | Source,
    *,
    made_from: Sequence[str | os.PathLike | Source] = (),
    **options: Any,
) -> dict[str, Any]:
    """Returns what an encoder or a classifier of this package was made from, and with what.

    The subject is every file with its SHA-256.  The parameters are what its card says; what it was
    converted from is a dependency.  Nobody has signed it: sign it, or the files, where you publish.

    Args:
      source: As `open_source` takes it.
      made_from: Encoders and classifiers that it was made from, as `open_source` takes them.
      **options: As `open_source` takes them.

    Raises:
      ValueError: If it cannot be read.
      FileNotFoundError: If it is not there.

    Example:
      >>> made = statement("simclr-cifar10-r18w24")
      >>> made["_type"], made["predicateType"]
      ('https://in-toto.io/Statement/v1', 'https://slsa.dev/provenance/v1')

    References:
      The formats: in-toto attestation framework, Statement v1; SLSA, Provenance v1.
    """
    source = source if isinstance(source, Source) else open_source(source, **options)
    sums = content.sums(source)
    record = _record(source)
    card = record.get("card", {})
    imported = card.get("imported_from", {})
    parameters = {name: card[name] for name in ("config", "stage", "downstream") if name in card}
    network = {name: record[name] for name in ("builder", "options") if name in record}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": name, "digest": {"sha256": entry["sha256"]}} for name, entry in sums.items()
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {"name": source.name, "network": network, **parameters},
                "internalParameters": {"versions": card.get("versions", {})},
                "resolvedDependencies": [
                    *_dependencies(source, imported),
                    *(_weights_of(origin) for origin in made_from),
                ],
            },
            "runDetails": {
                "builder": {"id": HOME, "version": {"robust-ssl": versions()["robust-ssl"]}},
                "metadata": {},
            },
        },
    }


def _record(source: Source) -> Mapping[str, Any]:
    try:
        file = source.folder / native.CARD_FILE
        record = cards.decode(file.read_bytes(), file)
    except OSError:
        return {}
    return record if isinstance(record, Mapping) else {}


def _dependencies(source: Source, imported: Any) -> list[dict[str, Any]]:
    dependencies: list[dict[str, Any]] = []
    if isinstance(imported, Mapping) and imported:
        entry: dict[str, Any] = {"name": str(imported.get("file", "encoder"))}
        if "sha256" in imported:
            entry["digest"] = {"sha256": imported["sha256"]}
        if "source" in imported:
            entry["uri"] = imported["source"]
        dependencies.append(entry)
    data = documents.training(source)["data"]
    if data:
        # A name alone is no descriptor there: it needs a digest or a URI.
        uri = f"urn:robust-ssl:data:{urllib.parse.quote(data, safe='')}"
        entry = {"name": data, "uri": uri, "annotations": {"role": "training data"}}
        dependencies.append(entry)
    return dependencies


def _weights_of(source: str | os.PathLike | Source) -> dict[str, Any]:
    """Returns an origin with the hash of its weights, of several files that of their hashes."""
    source = source if isinstance(source, Source) else open_source(source)
    sums = [entry["sha256"] for name, entry in content.sums(source).items() if _is_weights(name)]
    whole = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    entry = {"name": source.name, "digest": {"sha256": whole}}
    return entry if source.address is None else {**entry, "uri": str(source.address)}


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt"))


def write_beside(
    source: str | os.PathLike | Source,
    folder: str | os.PathLike | None = None,
    *,
    made_from: Sequence[str | os.PathLike | Source] = (),
    **options: Any,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes ``provenance.intoto.json`` and ``bom.cdx.json`` beside what they are about.

    Args:
      source: As `open_source` takes it.
      folder: Where to; None is the source's own.  Beside a lone file their names begin with its.
      made_from: As in `statement`.
      **options: As `open_source` takes them.

    Returns:
      The two files.
    """
    source = source if isinstance(source, Source) else open_source(source, **options)
    place = source.folder if folder is None else pathlib.Path(folder)
    # A folder may hold several lone files, and each has a statement of its own.
    prefix = f"{source.path.name}." if source.path.is_file() else ""
    made = {
        place / f"{prefix}{STATEMENT}": statement(source, made_from=made_from),
        place / f"{prefix}{MATERIALS}": bill_of_materials(source),
    }
    for file, document in made.items():
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        cards.replace_file(file, text.encode())
    statement_file, materials = made
    return statement_file, materials
