"""What the stages of one run share: its plan, its data, its public encoder, its directory."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import re
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from robust_ssl import data, models, weights
from robust_ssl.build import code_of, text_of
from robust_ssl.experiment.plan import Plan
from robust_ssl.experiment.sources import Data, EncoderSource
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress
from robust_ssl.types import Classifier, Encoder
from robust_ssl.workdir import (
    StageDirectory,
    WorkdirError,
    check_left,
    check_unchanged,
    fingerprint,
    json_ready,
    open_stage,
    read_manifest,
)
from robust_ssl.xla import release_programs

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Context:
    """One run.

    Attributes:
      plan: What is to be done.
      workdir: Each stage has a directory in it.
      parallel: The devices.
      progress: Shows how far a stage is.
      half: Whether only half of the downstream images are there: an attacker's; see `halved`.
    """

    plan: Plan
    workdir: pathlib.Path
    parallel: Parallel
    progress: Progress
    half: bool = False
    _values: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def open(
        self,
        name: str,
        settings: Any,
        inputs: Mapping[str, str],
        seed: int | None = None,
        *,
        collects: bool = False,
        places: Sequence[str] = (),
        redo: bool = False,
        made: str = "made",
    ) -> StageDirectory:
        """Opens the directory of a stage.

        Args:
          name: The stage's name, also the directory's.
          settings: All that it was told, values of the plan; the manifest keeps their text.
          inputs: Fingerprints of what it reads.  The code of functions that are not of this package
            comes to them: an edited function is another input.
          seed: Of its keys; None is the run's.
          collects: As for `open_stage`.
          places: As for `open_stage`.
          redo: As for `open_stage`.
          made: As for `open_stage`.
        """
        release_programs()  # of the stages before
        text = text_of(settings)
        seed = self.plan.seed if seed is None else seed
        inputs = {**inputs, **code_inputs(settings)}
        how = {"collects": collects, "places": places, "redo": redo, "made": made}
        return open_stage(self.workdir, name, text, inputs, seed, **how)

    def check_unchanged(
        self, name: str, settings: Any, places: Sequence[str] = (), *, any_seed: bool = False
    ) -> None:
        """Compares what a stage will be told with what the directory of that name was made with.

        Args:
          name: The stage's name.
          settings: As for `open`.
          places: As for `open`.
          any_seed: Whether it may have another seed than the run's.

        Raises:
          ConfigChangedError: If they differ, with what.  Nothing is made of what is there.
        """
        path = self.workdir / name
        if (path / "manifest.json").exists():
            manifest = read_manifest(path)
            now = {"config": text_of(settings), "inputs": code_inputs(settings)}
            now |= {} if any_seed else {"seed": self.plan.seed}
            check_unchanged(path, manifest, json_ready(now), collects=True, places=places)

    def check_images(self, name: str, **images: Any) -> None:
        """Compares images with those that a stage was made with, before hours go into others.

        Args:
          name: The stage's name.
          **images: Splits, by their names among its inputs.

        Raises:
          ConfigChangedError: If they differ, with which.
        """
        path = self.workdir / name
        if (path / "manifest.json").exists():
            now = {"inputs": {split: each.fingerprint() for split, each in images.items()}}
            check_unchanged(path, read_manifest(path), now, collects=True)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what was made under a key before in this run, also by a replaced copy of it."""
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The public encoder: what the attacker knows and the defender starts from."""
        source = self.plan.encoder
        if not source.is_pretrained:
            return self.load_encoder(source)
        return self._pretrained()

    def _pretrained(self) -> Encoder:
        """The encoder that the stage `pretrain` left, if it is still what was left."""
        stage, (builder, _) = self.workdir / "pretrain", self.own_builder
        way_out = f"run the stage pretrain, or bring {stage} back from a copy"
        if not (stage / "manifest.json").exists():
            raise WorkdirError(f"there is no encoder in {stage}; {way_out}")
        manifest = read_manifest(stage)
        if self.plan.pretrain is not None:  # it would be told of what was not trained
            self.check_unchanged("pretrain", self.plan.pretrain)
        check_left(stage, manifest, made="trained")
        try:
            encoder = weights.load_encoder(stage / "encoder", builder=builder)
        except (OSError, ValueError) as error:
            raise WorkdirError(f"{stage / 'encoder'} cannot be read: {error}; {way_out}") from error
        left = manifest["fingerprint"]
        if manifest["status"] != "done" or fingerprint(encoder.variables) != left:
            raise WorkdirError(f"{stage / 'encoder'} is not what was trained there; {way_out}")
        return encoder

    def load_encoder(self, source: EncoderSource) -> Encoder:
        """Returns an encoder, which is read once in a run."""
        key = "encoder", str(text_of(source))
        return self.once(key, lambda: source.load(jax.random.key(self.plan.seed)))

    @property
    def own_builder(self) -> tuple[Callable[..., Encoder] | None, dict[str, Any]]:
        """The builder of a public encoder that is not of this package, and its options."""
        source = self.plan.encoder
        if source.is_pretrained and self.plan.pretrain is not None:
            source = EncoderSource(function=self.plan.pretrain.encoder)
        return source.own_builder

    @functools.cached_property
    def image_size(self) -> int:
        """What the public encoder takes, pixels; known before this run has pre-trained it."""
        section = self.plan.pretrain
        if self.plan.encoder.is_pretrained and section is not None:
            return jax.eval_shape(section.encoder, jax.random.key(0)).image_size
        return self.encoder.image_size

    @functools.cached_property
    def surrogate(self):
        """The attacker's images; their labels, if there are any, are dropped."""
        images = self.load_sized(self.plan.surrogate, "train")
        data.check_image_size(images, self.image_size)
        return without_labels(images)

    @functools.cached_property
    def downstream(self):
        """The defender's data: train and validation, carved from the training split."""
        whole = self.load_sized(self.plan.downstream, "train")
        data.check_image_size(whole, self.image_size)
        data.check_trained(whole)
        seed = self.plan.seed
        train, validation = data.carve(whole, self.plan.downstream.validation, seed=seed)
        if self.half:  # every class keeps an image to train on
            train, _ = data.carve(train, 0.5, seed=seed)
            validation = validation.subset((len(validation) + 1) // 2, seed=seed)
        return train, validation

    @functools.cached_property
    def halved(self) -> Context:
        """The run of an attacker who has half of the downstream images, which are read once.

        What it makes lies in a directory of its own, ``half/``.
        """
        return dataclasses.replace(self, workdir=self.workdir / "half", half=True)

    @functools.cached_property
    def test(self):
        """The defender's test split; only `score` attacks anything on it."""
        test = self.load_sized(self.plan.downstream, "test")
        data.check_image_size(test, self.image_size)
        return data.with_classes_of(test, self.downstream[0])

    @functools.cached_property
    def test_labels(self) -> np.ndarray:
        """The labels of the test split, ``int32 [n]``."""
        return data.labels_of(self.test)

    @functools.cached_property
    def shared(self) -> data.Shared:
        """How many test images are among the training and validation images.

        Of a set that is read on demand, this reads what nobody has read before.  What is wrong
        with the split is logged, once.
        """
        shared = data.shared(self.test, *self.downstream)
        for note in shared.notes:
            _log.warning("config.downstream: %s", note)
        return shared

    @property
    def num_classes(self) -> int:
        """Classes of the downstream task, of which a config may say how many it expects."""
        train, expected = self.downstream[0], self.plan.downstream.num_classes
        if expected is not None:
            data.check_classes(train, expected)
        return expected or train.num_classes

    def classifier(self, encoder: Encoder, head: Any, seed: int) -> Classifier:
        """Returns an encoder with a fresh head, the same one for a seed.

        It keeps how the defender's pictures get their size, for whoever uses it afterwards.
        """
        encoder = encoder.replace(resizing=self.resizing_of_downstream(encoder))
        key = jax.random.fold_in(jax.random.key(seed), 1)
        names = self.downstream[0].class_names
        return models.classifier(key, encoder, self.num_classes, head=head, class_names=names)

    def resizing_of_downstream(self, encoder: Encoder) -> data.Resizing | None:
        """Returns how pictures of the task are resized for a classifier on an encoder."""
        source = self.plan.downstream
        if source is None or not self._is_resized(source):  # images that had their size
            return encoder.resizing
        return self._as_resized(source, encoder.image_size).resizing

    @staticmethod
    def _is_resized(source: Data) -> bool:
        named = (source.resizing, source.image_size) != (None, None)
        return named or data.is_folder(source.source)

    def _as_resized(self, source: Data, image_size: int) -> Data:
        """A source of pictures with its size, and resized as the public encoder's files say."""
        source = dataclasses.replace(source, image_size=source.image_size or image_size)
        if source.resizing is not None:
            return source
        resizing = self.plan.encoder.resizing(source.image_size)
        return dataclasses.replace(source, resizing=resizing)

    def load_sized(
        self, source: Data, split: Literal["train", "test"], encoder: Encoder | None = None
    ):
        """Returns a split; a folder's pictures get the encoder's size, unless told otherwise.

        So do images that a function makes, where it has an option ``image_size``.  What is resized
        is resized as the public encoder's card says, unless told otherwise.

        Args:
          source: Where it comes from.
          split: Which one.
          encoder: Whose size; None is the public one.
        """
        if encoder is None and source.function is not None:
            function = source.function.with_defaults(image_size=self.image_size)
            source = dataclasses.replace(source, function=function)
        if not self._is_resized(source):
            return self.load(source, split)
        if encoder is None:
            return self.load(self._as_resized(source, self.image_size), split)
        size = source.image_size or encoder.image_size
        return self.load(dataclasses.replace(source, image_size=size), split)

    def load(self, source: Data, split: Literal["train", "test"]):
        """Returns a split, which is read once in a run."""
        return self.once(("data", str(text_of(source)), split), lambda: self._read(source, split))

    def _read(self, source: Data, split: Literal["train", "test"]):
        names = ("image_size", "data_dir", "memory_limit", "workers", "skip_unreadable", "resizing")
        given = {name: getattr(source, name) for name in names}
        options = {name: value for name, value in given.items() if value is not None}
        named = source.source
        if source.function is not None:
            named = source.function.bound  # its options may have the names of ours
        name = source.train_split if split == "train" else source.test_split
        limit, seed = source.limit(split), self.plan.seed
        read = data.load(named, split=name, limit=limit, seed=seed, **options)
        if isinstance(read, data.StreamedExamples):  # whatever the split is called
            read = dataclasses.replace(read, trained_on=split == "train")
        return read


def without_labels(examples):
    """Returns the same images without labels; a streamed set keeps its own, unread."""
    if isinstance(examples, data.Examples):
        return data.from_arrays(examples.images, name=examples.name, split=examples.split)
    return examples


def code_inputs(settings: Any) -> dict[str, str]:
    """Returns the code of a user's functions among settings, as inputs of a stage."""
    return {f"code/{name}": digest for name, digest in code_of(settings).items()}


def identity(model: Classifier | Encoder) -> str:
    """Identifies a model by its weights and by everything else it is made of.

    Two classifiers of the same weights and another normalization, head or module differ, and so
    does one whose module is the user's own, and was edited.
    """
    return "-".join(model_inputs("model", model).values())


def model_inputs(name: str, model: Classifier | Encoder) -> dict[str, str]:
    """Returns a model as inputs of a stage: its weights, and the network that they are in."""
    made_of = repr(jax.tree.structure(_without_resizing(model)))
    # An encoder's last static field.  What was fingerprinted before there was one stays as it was.
    made_of = made_of.replace(", None)], [", ")], [")
    made_of = re.sub(r" at 0x[0-9a-f]+", "", made_of)  # of functions
    code = code_of(_kinds(model))
    text = made_of + "".join(f"{name}={digest}" for name, digest in code.items())
    network = f"{zlib.crc32(text.encode()):08x}"
    return {name: fingerprint(model.variables), f"{name}_network": network}


def _without_resizing(model: Classifier | Encoder) -> Any:
    """The same model, whatever is said of its pictures' resizing: that computes nothing."""
    if isinstance(model, Classifier):
        return model.replace(encoder=model.encoder.replace(resizing=None))
    return model.replace(resizing=None) if isinstance(model, Encoder) else model


def _kinds(model: Any) -> list[Any]:
    """The classes that a model computes with, whose code is a part of it."""
    kinds: list[Any] = []
    for owner in (model, getattr(model, "encoder", None)):
        for name in ("module", "head", "preprocess"):
            value = getattr(owner, name, None)
            if value is not None:  # a function is its own code; its type is Python's
                kinds += [value] if isinstance(value, types.FunctionType) else [value, type(value)]
    return kinds
