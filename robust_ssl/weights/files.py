"""Foreign files of weights as named arrays, whatever their format; nothing in them is executed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
      path: The file of the tensors.
      format: ``"safetensors"``, ``"torch zip"`` or ``"torch legacy"``.
      sha256: Of the file.
      tensors: By name, as in the file's state dict; dtypes as in the file (bfloat16 is
        `ml_dtypes.bfloat16`).
      found_under: Where in the file the state dict was, ``"state_dict"`` or ``""``.
      configs: JSON files beside it, by file name (``"config.json"``,
        ``"preprocessor_config.json"``), and the safetensors header's own as ``"__metadata__"``.
      notes: What a reader should know: shared storages, metadata left out.
    """

    path: str
    format: str
    sha256: str
    tensors: Mapping[str, np.ndarray]
    found_under: str = ""
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weights(path: str | os.PathLike) -> WeightsFile:
    """Reads a file of weights, or a folder of one with its JSON files (Hugging Face)."""
    raise ValueError(f"cannot read {path}")
