"""What the stages of one run share."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl import checkpoints, data
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its configuration, where it writes, and what it runs on.

    Attributes:
      config: The resolved configuration, plain nested dicts.
      workdir: Each stage has a directory in it.
      parallel: The devices.
      progress: Shows how far a stage is.
    """

    config: Mapping[str, Any]
    workdir: pathlib.Path
    parallel: Parallel
    progress: Progress

    @property
    def seed(self) -> int:
        """The integer all random keys of the run derive from."""
        return self.config["seed"]

    def open(
        self, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> checkpoints.StageDirectory:
        """Opens the directory of a stage; see `checkpoints.open_stage`."""
        return checkpoints.open_stage(self.workdir, name, config, inputs, self.seed)

    def load(self, entry: str, config: Mapping[str, Any], *, split: str):
        """Loads a split of the data set that a config entry describes, once per run.

        Args:
          entry: Where in the config it stands, for error messages.
          config: ``{"source": ..., "train_split"?: ..., "test_split"?: ..., **options}``.
          split: ``"train"`` or ``"test"``: the config's own names for them are looked up.
        """
        return _load(self.seed, _freeze(config), split)


def _freeze(config: Mapping[str, Any]) -> tuple:
    return tuple(sorted(config.items(), key=lambda item: item[0]))


@functools.lru_cache(maxsize=8)
def _load(seed: int, config: tuple, split: str):
    options = {name: value for name, value in config if value is not None}
    source = options.pop("source")
    names = {"train": options.pop("train_split", "train"), "test": options.pop("test_split", "test")}
    return data.load(source, split=names[split], seed=seed, **options)
