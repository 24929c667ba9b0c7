"""What the stages of one run share: its configuration, its data, its public encoder."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from robust_ssl import checkpoints, data, models, weights
from robust_ssl.build import resolve
from robust_ssl.evaluation import WORST
from robust_ssl.parallel import Parallel, release_programs
from robust_ssl.progress import Progress
from robust_ssl.types import Classifier, Encoder


class UsageError(ValueError):
    """The config, or the data it names, cannot be used; found before the first step."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

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
    _made: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def seed(self) -> int:
        """The integer all random keys of the run derive from."""
        return self.config["seed"]

    def open(
        self,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        seed: int | None = None,
        *,
        collects: bool = False,
    ) -> checkpoints.StageDirectory:
        """Opens the directory of a stage; see `checkpoints.open_stage`.  None is the run's seed."""
        release_programs()  # of the stages before
        seed = self.seed if seed is None else seed
        return checkpoints.open_stage(self.workdir, name, config, inputs, seed, collects=collects)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The public encoder: what the attacker knows and the defender starts from."""
        options = dict(self.config["encoder"])
        path = options.pop("path", None)
        if path is not None:
            return load_or_import(path, options)
        if options:
            return build_encoder(jax.random.key(self.seed), options)
        made_by = self.config.get("pretrain", {}).get("encoder")
        return weights.load_encoder(
            self.workdir / "pretrain" / "encoder", builder=made_by and own_builder(made_by)
        )

    @property
    def own_builder(self) -> tuple[Callable[..., Encoder] | None, dict[str, Any] | None]:
        """The user's own builder of the public encoder and its options; None for the package's."""
        options = dict(self.config["encoder"] or self.config.get("pretrain", {}).get("encoder", {}))
        builder = own_builder(options) if "builder" in options else None
        options.pop("builder", None)
        return (builder, options) if builder else (None, None)

    @functools.cached_property
    def surrogate(self):
        """The attacker's images; their labels, if there are any, are dropped."""
        images = self.load(self.config["surrogate"], "train")
        data.check_image_size(images, self.encoder.image_size)
        return without_labels(images)

    @functools.cached_property
    def downstream(self):
        """The defender's data: train and validation, carved from the training split."""
        config = self.config["downstream"]
        whole = self.load(config, "train")
        data.check_image_size(whole, self.encoder.image_size)
        return data.carve(whole, config["validation"], seed=self.seed)

    @functools.cached_property
    def test(self):
        """The defender's test split; only `evaluate` scores anything on it."""
        test = self.load(self.config["downstream"], "test")
        data.check_image_size(test, self.encoder.image_size)
        data.check_classes(test, self.num_classes)
        return test

    @property
    def num_classes(self) -> int:
        """Classes of the downstream task, of which a config may say how many it expects."""
        train = self.downstream[0]
        expected = self.config["downstream"].get("num_classes")
        if expected is not None:
            data.check_classes(train, expected)
        return expected or train.num_classes

    def classifier(
        self, head: str, seed: int | None = None, encoder: Encoder | None = None
    ) -> Classifier:
        """Returns the public encoder, or another, with a fresh head, the same one for a seed."""
        module = head if ":" not in head else resolve(head)(self.num_classes)
        key = jax.random.fold_in(jax.random.key(self.seed if seed is None else seed), 1)
        return models.classifier(key, encoder or self.encoder, self.num_classes, head=module)

    def load(self, config: Mapping[str, Any], split: str):
        """Loads a split of a data set, once per run.

        Args:
          config: ``{"source": ..., **options}`` of `data.load`; ``train_split`` and
            ``test_split`` rename the splits, ``train_limit`` and ``test_limit`` take a random
            part of them.
          split: ``"train"`` or ``"test"``.
        """
        key = json.dumps(config, sort_keys=True), split
        return self.once(key, lambda: self._read(config, split))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what was made under a key before in this run, also by a replaced copy of it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _read(self, config: Mapping[str, Any], split: str):
        options = {name: value for name, value in config.items() if value is not None}
        for mine in ("validation", "num_classes"):
            options.pop(mine, None)
        names = {s: options.pop(f"{s}_split", s) for s in ("train", "test")}
        limits = {s: options.pop(f"{s}_limit", None) for s in ("train", "test")}
        return data.load(
            options.pop("source"),
            split=names[split],
            limit=limits[split],
            seed=self.seed,
            **options,
        )


def without_labels(examples):
    """Returns the same images without labels; a streamed set keeps its own, unread."""
    if isinstance(examples, data.Examples):
        return data.from_arrays(examples.images, name=examples.name, split=examples.split)
    return examples


def load_or_import(path: str, options: Mapping[str, Any]) -> Encoder:
    """Returns the encoder of ``{"path": ..., **options}``.

    Args:
      path: A shipped encoder's name, a directory that `weights.save_encoder` wrote, or a foreign
        file or folder.
      options: Of `weights.import_encoder`, for a foreign one: what the file does not say
        (``normalization``, ``image_size``, ``layout``, ``stem_padding``, ...); None counts as
        absent.

    Raises:
      ValueError: If options are given with an encoder of this package, which has its own, or the
        foreign file cannot be imported.
    """
    options = {name: value for name, value in options.items() if value is not None}
    unknown = {"builder", "path"} & options.keys()
    if unknown:
        raise ValueError(f"config.encoder has a path and also {sorted(unknown)}; give one")
    if not weights.is_foreign(path):
        encoder = weights.load_encoder(path)
        if options:
            raise ValueError(
                f"config.encoder has a path and also {sorted(options)}; give one: only a foreign "
                "file of weights needs to be told more"
            )
        return encoder
    return weights.import_encoder(path, **options)


def build_encoder(key: jax.Array, options: Mapping[str, Any]) -> Encoder:
    """Builds an encoder from ``{"builder": ..., **options}``.

    Args:
      key: Random key of the initialization.
      options: ``builder`` is a name in `robust_ssl.models` or the user's own ``"module:function"``
        or ``"file.py:function"``, called as ``builder(key, **options)``.

    Raises:
      ValueError: If there is no such builder.

    Example:
      >>> options = {"builder": "resnet18", "width": 8, "image_size": 8}
      >>> build_encoder(jax.random.key(0), options).dim
      64
    """
    options = dict(options)
    name = options.pop("builder")
    if ":" in name:
        return resolve(name)(key, **options)
    if name not in models.__all__:
        raise ValueError(f"no builder {name!r} in robust_ssl.models; there are {models.__all__}")
    return getattr(models, name)(key, **options)


def own_builder(options: Mapping[str, Any]) -> Callable[..., Encoder] | None:
    """Returns the user's own builder of ``{"builder": ..., **options}``, None for the package's."""
    name = options["builder"]
    return resolve(name) if ":" in name and not name.startswith("robust_ssl.models") else None


def check_names(names: Iterable[str], where: str) -> None:
    """Raises ValueError for a name that cannot be a file's, or that means something else."""
    for name in names:
        if name == WORST or not re.fullmatch(r"[\w][\w .+\-]*", name):
            raise ValueError(
                f"{where}: {name!r} cannot be a name; take letters, digits, spaces and . + - _ "
                f"(and not {WORST!r}, which is the worst case over all)"
            )


def check_seeds(seeds: Sequence[int], where: str) -> None:
    """Raises ValueError unless there is a seed and none twice."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"{where}: need at least one seed and none twice, got {list(seeds)}")
