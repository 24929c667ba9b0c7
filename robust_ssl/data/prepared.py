"""Where prepared data sets lie: one folder for each name and version."""

from __future__ import annotations

import os
import pathlib
import re

from robust_ssl import disk


def data_directory(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns where data sets are: what is named, ``$TFDS_DATA_DIR``, or TFDS's own default."""
    named = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return disk.expanded(named)


def find(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the newest (or the named) prepared version, or None.

    Args:
      name: ``"name"`` or ``"name/config"``, either with ``":version"``.
      data_dir: Where data sets are prepared.
    """
    base, _, version = name.partition(":")
    # An interrupted preparation leaves a folder whose name is no version.
    versions = [
        p.parent
        for p in (data_dir / base).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", p.parent.name)
    ]
    if version:
        versions = [p for p in versions if p.name == version]
    # By number: as text 9.0.0 comes after 10.0.0.
    return max(versions, key=lambda p: [int(n) for n in p.name.split(".")], default=None)
