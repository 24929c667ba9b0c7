"""`bom.cdx.json`: a CycloneDX bill of materials of one machine-learning model."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from typing import Any

from robust_ssl.provenance import content, documents
from robust_ssl.provenance.source import Source, open_source
from robust_ssl.workdir import versions

# Serial numbers are made from what they are of, so that equal is equal.
_SPACE = uuid.UUID("5a1a7b0e-6d3c-5a57-9f5e-0d7a3f3c1b11")


def bill_of_materials(source: str | os.PathLike | Source, **options: Any) -> dict[str, Any]:
    """Returns a CycloneDX 1.6 document: the model, its files, its data and the libraries it needs.

    The same files give the same document: it has no date, and its serial number is made from them.

    Args:
      source: As `open_source` takes it.
      **options: As `open_source` takes them.

    Raises:
      ValueError: If it cannot be read.
      FileNotFoundError: If it is not there.

    Example:
      >>> made = bill_of_materials("simclr-cifar10-r18w24")
      >>> made["metadata"]["component"]["type"], made["specVersion"]
      ('machine-learning-model', '1.6')
    """
    source = source if isinstance(source, Source) else open_source(source, **options)
    sums = content.sums(source)
    whole = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    libraries = [
        {
            "type": "library",
            "bom-ref": name,
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
        }
        for name, version in versions().items()
        if name != "python" and version[:1].isdigit()
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, whole)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {
                        "type": "application",
                        "name": "robust-ssl",
                        "version": versions()["robust-ssl"],
                    }
                ]
            },
            "component": _model(source, sums, whole),
        },
        "components": libraries,
        "dependencies": [{"ref": "model", "dependsOn": [lib["bom-ref"] for lib in libraries]}],
    }


def _model(source: Source, sums: Any, whole: str) -> dict[str, Any]:
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": entry["sha256"]}],
        }
        for name, entry in sums.items()
    ]
    said, data = documents.documents(source)["license"], documents.training(source)["data"]
    parameters: dict[str, Any] = {"approach": {"type": "self-supervised"}, "task": "features"}
    if source.kind == "classifier":
        parameters = {"approach": {"type": "supervised"}, "task": "classification"}
    if data:
        parameters["datasets"] = [{"type": "dataset", "name": data}]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": source.name,
        "version": source.revision or f"sha256:{whole[:16]}",
        "modelCard": {"modelParameters": parameters},
        "components": files,
    }
    if said:
        # As a name: an identifier of SPDX must be one of its list.
        component["licenses"] = [{"license": {"name": said}}]
    return component
