"""The sections of a config besides data, suite and recipes, with every default of theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from robust_ssl import weights
from robust_ssl.build import (
    Count,
    Function,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    check_known,
    inside,
    read,
    read_entries,
)
from robust_ssl.evaluation.analysis.spectra import check_edges
from robust_ssl.experiment.sources import Data
from robust_ssl.experiment.suites import InnerAttack, check_seeds
from robust_ssl.recipes import pgd
from robust_ssl.report.analysis import PARTS
from robust_ssl.report.comparison import SHARES
from robust_ssl.types import Classifier


@dataclasses.dataclass(frozen=True)
class Training:
    """What all recipes of a run share besides their entries.

    Attributes:
      seeds: Of heads, batches and keys; each recipe is made with each.
      validation: The attack by which every recipe's epochs are chosen.
      batch_size: Validation images at a time.
    """

    seeds: tuple[Seed, ...] = (0,)
    validation: InnerAttack = dataclasses.field(
        default_factory=lambda: InnerAttack.read(pgd(), "config.training.validation")
    )
    batch_size: Count = 250

    def __post_init__(self):
        check_seeds(self.seeds, "seeds")
        if not self.validation.is_per_image:
            raise ValueError(
                "validation must be an attack on single images with num_steps, such as "
                '{"function": "robust_ssl.attacks:PGD", "epsilon": 8 / 255, "num_steps": 10}: all '
                "recipes' epochs are judged by it"
            )


@dataclasses.dataclass(frozen=True)
class SavedClassifier:
    """A classifier that was made elsewhere.

    Attributes:
      path: What `weights.save_classifier` wrote, or a finished recipe's directory.
      builder: ``"module:function"`` of its encoder, where that is not of this package.
      head: ``"module:function"`` of its head, likewise.
      preprocess: ``"module:Class"`` of its input transformation, likewise.
      class_names: What each logit stands for, in place of what its card says.
      function: Returns a `robust_ssl.Classifier`, in place of a path.
    """

    path: str | None = None
    builder: str | None = None
    head: str | None = None
    preprocess: str | None = None
    class_names: tuple[str, ...] | None = None
    function: Function | None = None

    @classmethod
    def read(cls, value: Any, where: str) -> SavedClassifier:
        """Reads ``{"path": directory}``, a bare path, or a function with options."""
        entries = {"path": value} if isinstance(value, str) else value
        if not isinstance(entries, Mapping) or ("path" in entries) == ("function" in entries):
            raise ValueError(
                f'{where}: give {{"path": directory}} or {{"function": "module:function", '
                f"**options}}, got {value!r}"
            )
        if "function" in entries:
            return cls(function=Function.read(entries, where))
        read(str, entries["path"], f"{where}.path")
        saved = read_entries(cls, entries, where)
        with inside(where):
            try:
                card = weights.classifier_card(saved.path)
            except FileNotFoundError as error:
                raise ValueError(str(error)) from error
            if saved.class_names and len(saved.class_names) != card["num_classes"]:
                raise ValueError(
                    f"class_names has {len(saved.class_names)} names, and the classifier "
                    f"{card['num_classes']} logits"
                )
        for name, function in saved.own.items():
            Function.read(function, f"{where}.{name}")
        return saved

    @property
    def text(self) -> Any:
        """What a manifest keeps."""
        if self.function is not None:
            return self.function.text
        names = {"class_names": self.class_names} if self.class_names else {}
        return {"path": self.path, **self.own, **names}

    @property
    def own(self) -> dict[str, str]:
        """The functions that it is made of besides those of this package."""
        names = {name: getattr(self, name) for name in ("builder", "head", "preprocess")}
        return {name: function for name, function in names.items() if function}

    def load(self) -> Classifier:
        """Returns the classifier."""
        if self.function is None:
            classifier = weights.load_classifier(self.path, **self.own)
            names = self.class_names or classifier.class_names
            return classifier.replace(class_names=tuple(names))
        classifier = self.function()
        if not isinstance(classifier, Classifier):
            raise TypeError(
                f"{self.function.text} must return a robust_ssl.Classifier, got "
                f"{type(classifier).__name__}"
            )
        return classifier


class Claim:
    """What is claimed of recipes, as `report.judge` takes it: plain values of the right kinds."""

    KINDS: ClassVar = {
        "order": tuple[str, ...],
        "of": str,
        "by": Literal[tuple(SHARES)],
        "reach": Annotated[float, Range(0, 1, above=True)],
        "over": str,
        "within": Positive,
        "better_than": str,
        "more": str,
        "than": str,
        "margin": Share,
        "seen": Natural,
    }

    @classmethod
    def read(cls, value: Any, where: str) -> Mapping[str, Any]:
        """Reads a claim's entries; which belong together `report.check_claim` says."""
        entries = read(Mapping[str, Any], value, where)
        check_known(entries, cls.KINDS, where)
        for name, entry in entries.items():
            read(cls.KINDS[name], entry, f"{where}.{name}")
        return entries


@dataclasses.dataclass(frozen=True)
class Compare:
    """How recipes are held against each other.

    Attributes:
      reference: The recipe whose training costs 1.
      baseline: The recipe that gains are counted from.
      claims: What is judged, as `report.judge` takes it.
      max_clean_loss: Clean accuracy that the advice may give up, a share.
      max_cost: Training time that it may take, relative to the reference.
      memory: Whether the memory of each step is measured.
      rounds: How often the steps of all recipes are timed in turn.
      steps_per_round: Steps of each recipe in a round.
    """

    reference: str = "full"
    baseline: str = "baseline"
    claims: tuple[Claim, ...] = ()
    max_clean_loss: Share = 0.02
    max_cost: Positive = 2.0
    memory: bool = True
    rounds: Count = 3
    steps_per_round: Count = 3


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid over one recipe's entries.

    Attributes:
      recipe: Its name.
      grid: Pairs of a path and its values; see `grid.read`.
    """

    recipe: str
    grid: Any = ()


@dataclasses.dataclass(frozen=True)
class Fourier:
    """Noise of single frequencies: its L2 norm in each channel, the stride, how many images."""

    norm: Positive = 4.0  # Yin et al. 2019, for 32 pixels
    stride: Count = 1
    images: Count = 128


@dataclasses.dataclass(frozen=True)
class Filtering:
    """Cutoffs in cycles per pixel; whether what is left gets the size of the whole."""

    cutoffs: tuple[Positive, ...] = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
    rescale: bool = False

    def __post_init__(self):
        if not self.cutoffs:
            raise ValueError("cutoffs is empty; name at least one, in cycles per pixel")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """From encoder to encoder: which attack, which encoders, how the linear heads are trained."""

    attack: str = "universal_pgd"
    encoders: tuple[str, ...] = (
        "simclr-cifar10-r18w24",
        "byol-cifar10-r18w16",
        "swav-cifar10-r18w16",
        "vibcreg-cifar10-r18w16",
    )
    head_epochs: Count = 5
    head_learning_rate: Positive = 5e-3
    resize: Literal["refuse", "bilinear"] = "refuse"


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Where attacks work: which parts, on how many validation images.

    Attributes:
      parts: Some of `PARTS`.
      images: Of the validation images.
      edges: Of the bands of spatial frequency, cycles per pixel, rising.
      fourier: Of the part of this name, as the next two.
      filtering: Likewise.
      transfer: Likewise.
    """

    parts: tuple[Literal["layers", "energy", "fourier", "filtering", "transfer"], ...] = PARTS
    images: Count = 512
    edges: tuple[NotNegative, ...] = (
        *(0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 0.71),
    )
    fourier: Fourier = Fourier()
    filtering: Filtering = Filtering()
    transfer: Transfer = Transfer()

    def __post_init__(self):
        if not self.parts:
            raise ValueError(f"parts is empty; there are {', '.join(PARTS)}")
        check_edges(self.edges)


@dataclasses.dataclass(frozen=True)
class Monitor:
    """What a pre-training logs of its features: how often, on how many images."""

    every_epochs: Count = 1
    images: Count = 4000


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A self-supervised pre-training.

    Attributes:
      data: Its images; labels are for monitoring, and for a method that needs them.
      encoder: Builds the encoder.
      method: Makes the method; see `robust_ssl.pretraining`.
      name: Of the encoder, for tables; None is the builder's.
      epochs: Passes over the images.
      batch_size: Images of an update.
      accumulate: Parts that a batch is computed in.
      optimizer: See `robust_ssl.optimizers.pretraining_optimizer`, as the next six.
      learning_rate: At the peak of the schedule.
      warmup_epochs: How long it rises.
      weight_decay: Of kernels.
      momentum: Of SGD and LARS.
      trust_coefficient: Of LARS.
      clip: Of LARS.
      checkpoint_every: Steps between two checkpoints.
      loop_on_device: Whether many steps are one program; None: on accelerators.
      monitor: What is logged of the features.
    """

    data: Data
    encoder: Function
    method: Function
    epochs: Count
    batch_size: Count = 256
    accumulate: Count = 1
    optimizer: Literal["sgd", "lars", "adam", "adamw"] = "adamw"
    learning_rate: Positive = 1e-3
    warmup_epochs: NotNegative = 0.0
    weight_decay: NotNegative = 1e-4
    momentum: Share = 0.9
    trust_coefficient: Positive = 0.02  # solo-learn, CIFAR
    clip: bool = True  # solo-learn, CIFAR (all methods but VIbCReg)
    checkpoint_every: Count = 200
    loop_on_device: bool | None = None
    monitor: Monitor = Monitor()

    def __post_init__(self):
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"epochs={self.epochs} and warmup_epochs={self.warmup_epochs:g}: a warm-up must "
                "end before the training"
            )
        self.method()
