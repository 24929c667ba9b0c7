"""Where data and encoders come from, as a config says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax

from robust_ssl import weights
from robust_ssl.build import (
    Count,
    Function,
    Natural,
    Range,
    inside,
    names_function,
    near,
    read,
    read_entries,
)
from robust_ssl.data import Resizing
from robust_ssl.types import Encoder
from robust_ssl.weights import hub

# What a foreign file may have to be told; `weights.import_encoder` says what each means.
ENCODER_WORDS = (
    *("path", "function", "layout", "under", "normalization", "mean", "std", "image_size", "name"),
    *("reader", "inert", "prefix", "drop", "channels", "stem", "stem_padding", "variant", "heads"),
    *("pooling", "activation", "norm_epsilon", "position_resizing", "rotary_reference"),
    "allow_moving",
)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set: a name or a folder (`source`), or a function with options.

    Attributes:
      source: As `robust_ssl.data.load` takes it.
      function: Called as `robust_ssl.data.load` calls a function; an option ``image_size`` that it
        is not given is the public encoder's.
      image_size: Height and width that images are brought to, pixels; None leaves them, but for a
        folder, whose pictures get the encoder's, and where `resizing` is given.
      train_split: Name of the training split.
      test_split: Name of the test split; of a folder without one, ``val`` or the like is it.
      train_limit: At most so many training images; None takes all.
      test_limit: At most so many test images; None takes all.
      data_dir: Where prepared sets are; None is the usual place.
      memory_limit: Above so many bytes of pixels a set is read on demand; None is the usual limit.
      workers: Processes that read and decode such a set; 0 are threads.  Batches are the same.
      skip_unreadable: Whether pictures that cannot be decoded are left out and counted.
      resizing: How pictures are brought to their size, see `robust_ssl.data.Resizing`; None is as
        the encoder's card says, of those of another size.
    """

    source: str | None = None
    function: Function | None = None
    image_size: Count | None = None
    train_split: str = "train"
    test_split: str = "test"
    train_limit: Count | None = None
    test_limit: Count | None = None
    data_dir: str | None = None
    memory_limit: Count | None = None
    workers: Natural = 0
    skip_unreadable: bool = False
    resizing: Resizing | None = None

    def __post_init__(self):
        if self.resizing is not None and self.image_size is not None:
            with inside("resizing"):
                self.resizing.size(self.image_size)

    @classmethod
    def read(cls, value: Any, where: str) -> Data:
        """Reads ``{"source": name, ...}``, ``{"function": "module:function", ...}`` or a name."""
        if isinstance(value, str):
            value = {"function" if names_function(value) else "source": value}
        entries = dict(value) if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and names_function(value.get("source")):
            # A function may stand where a name does: both say where images come from.
            entries["function"] = entries.pop("source")
        by_name = isinstance(entries, Mapping) and entries.get("source") is not None
        if not isinstance(entries, Mapping) or by_name or "function" not in entries:
            data = read_entries(cls, entries, where)
            if data.source and data.function is not None:
                raise ValueError(f"{where} has a source and also a function; give one")
            if not data.source:
                raise ValueError(
                    f'{where} needs a "source", a data set\'s name or a folder, or a "function"; '
                    f"{where}.source is {data.source!r}"
                )
            return data
        fields = {field.name for field in dataclasses.fields(cls)} - {"source"}
        options = {name: entry for name, entry in entries.items() if name not in fields}
        named = {"function": entries["function"], **options}
        function = Function.read(named, where, sorted(fields))
        shared = {n: e for n, e in entries.items() if n in fields and n != "function"}
        return read_entries(cls, shared, where, function=function)

    @property
    def text(self) -> dict[str, Any]:
        """What a manifest keeps."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.function is None:
            return {name: field for name, field in fields.items() if name != "function"}
        named = self.function.text
        named = {"function": named} if isinstance(named, str) else dict(named)
        return {**{n: v for n, v in fields.items() if n not in ("source", "function")}, **named}

    def limit(self, split: Literal["train", "test"]) -> int | None:
        """Returns how many images of a split are read at most."""
        return self.train_limit if split == "train" else self.test_limit


@dataclasses.dataclass(frozen=True)
class Downstream(Data):
    """The defender's data.

    Attributes:
      validation: Share of the training images by which epochs are chosen, in (0, 1).
      num_classes: How many classes are expected; None takes what is there.
    """

    validation: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    num_classes: Count | None = None


@dataclasses.dataclass(frozen=True)
class EncoderSource:
    """Where the public encoder comes from.

    Attributes:
      path: A shipped encoder's name, a directory of `weights.save_encoder`, a foreign file, or
        ``hf://owner/name@<commit>``.
      function: Builds it: ``(key, **options) -> Encoder``.
      options: What a foreign file does not say itself, as `weights.import_encoder` takes it; of a
        directory, the ``builder`` of an encoder of your own.
    """

    path: str | None = None
    function: Function | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, value: Any, where: str) -> EncoderSource:
        """Reads ``{"path": ..., **options}``, ``{"function": ..., **options}`` or one of the two.

        An empty mapping is the encoder that the stage `pretrain` leaves.
        """
        if isinstance(value, str):
            value = {"function" if names_function(value) else "path": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a path or a mapping, got {value!r}")
        given = {name: entry for name, entry in value.items() if entry is not None}
        if "path" in given and "function" in given:
            raise ValueError(f"{where} has a path and also a function; give one")
        if "function" in given:
            return cls(function=Function.read(given, where))
        if not value:
            return cls()
        if not given:
            read(str, None, f"{where}.{next(iter(value))}")
        if "path" not in given:
            unknown = next(iter(given))
            raise ValueError(f"unknown entry {unknown!r} in {where}{near(unknown, ENCODER_WORDS)}")
        options = {name: entry for name, entry in given.items() if name != "path"}
        source = cls(path=read(str, given["path"], f"{where}.path"), options=options)
        with inside(where):
            source.check()
        return source

    @property
    def text(self) -> Any:
        """What a manifest keeps."""
        if self.function is not None:
            return self.function.text
        return {"path": self.path, **self.options} if self.path else {}

    @property
    def is_pretrained(self) -> bool:
        """Whether it is what the stage `pretrain` leaves, for a config names no other."""
        return self.path is None and self.function is None

    def check(self) -> None:
        """Raises ValueError for a path without an encoder, or options that it does not take."""
        if weights.is_foreign(self.path):
            for name in self.options:
                if name not in ENCODER_WORDS:
                    raise ValueError(f"unknown entry {name!r}{near(name, ENCODER_WORDS)}")
            if hub.is_address(self.path):
                hub.parse(self.path, allow_moving=bool(self.options.get("allow_moving")))
            return
        try:
            weights.encoder_card(self.path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        unknown = sorted(set(self.options) - {"builder"})
        if unknown:
            raise ValueError(
                f"a path and also {unknown}; give one: only a foreign file of weights needs to be "
                f"told more{near(unknown[0], ['builder'])}"
            )

    def resizing(self, image_size: int) -> Resizing | None:
        """Returns how its pictures were resized where it was evaluated, as far as its files say."""
        if not self.path:
            return None
        moving = hub.is_address(self.path) and bool(self.options.get("allow_moving"))
        return weights.resizing_of(self.path, image_size, allow_moving=moving)

    def load(self, key: jax.Array) -> Encoder:
        """Returns the encoder with its weights; `key` is for a builder's first ones."""
        if self.function is not None:
            encoder = self.function(key)
            if not isinstance(encoder, Encoder):
                raise ValueError(
                    f"{self.function.text} must return a robust_ssl.Encoder, got "
                    f"{type(encoder).__name__}"
                )
            return encoder
        if weights.is_foreign(self.path):
            return weights.import_encoder(self.path, **self.options)
        return weights.load_encoder(self.path, **self.options)

    @property
    def own_builder(self) -> tuple[Callable[..., Encoder] | None, dict[str, Any]]:
        """The builder of an encoder that is not of this package, and its options."""
        if self.function is not None:
            name = self.function.function.__module__
            if name.startswith("robust_ssl.models"):
                return None, {}
            return self.function.function, dict(self.function.options)
        if self.path and not weights.is_foreign(self.path) and "builder" in self.options:
            builder = Function.read(self.options["builder"], "builder").function
            return builder, dict(weights.encoder_card(self.path)["options"])
        return None, {}
