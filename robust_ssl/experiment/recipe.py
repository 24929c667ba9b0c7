"""A recipe: what one training starts from, minimizes, moves and is attacked by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from robust_ssl import finetuning, optimizers
from robust_ssl.build import (
    Count,
    Function,
    Natural,
    NotNegative,
    Range,
    Share,
    read,
    read_entries,
)
from robust_ssl.experiment.moving import Lora, Selection
from robust_ssl.experiment.sources import EncoderSource
from robust_ssl.experiment.suites import InnerAttack
from robust_ssl.types import Encoder, Loss

LOSSES = "robust_ssl.losses:"
CLEAN = {"clean_cross_entropy": f"{LOSSES}clean_cross_entropy"}
MIXED = ("clean_cross_entropy", "adversarial_cross_entropy")  # what `adv_ratio` weighs
HEADS = ("linear", "mlp")
AUTO = "auto"  # as few parts of a batch as fit


@dataclasses.dataclass(frozen=True)
class WeightedLoss:
    """A loss with its weight.

    Attributes:
      loss: ``LossInputs -> [batch]``, its options set.
      weight: What its mean is multiplied by.
      text: What the config said.
    """

    loss: Loss
    weight: float
    text: Any

    @classmethod
    def read(cls, value: Any, where: str) -> WeightedLoss:
        """Reads ``{"function": ..., "weight": number, **options}``; the weight is 1 if not said."""
        entries = dict(value) if isinstance(value, Mapping) else {"function": value}
        if isinstance(value, list | tuple):
            raise ValueError(
                f'{where} must be {{"function": "module:function", "weight": number, **options}}, '
                f"got {value!r}"
            )
        weight = read(NotNegative, entries.pop("weight", 1.0), f"{where}.weight")
        return cls(Function.read(entries, where, ("weight",)).bound, weight, value)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """How the budget of the inner attack grows within one training: none, rising, all of it.

    Attributes:
      start: Share of the training before which images stay clean, below 1: the paper's T1.
      end: Share of the training from which on the attack has its whole budget: its T2.
      stairs: Equal stairs between the two; None: the budget rises with every update.

    References:
      Ngnawe et al., "Epsilon-Scheduling", ICLR 2026: 12 and 37 of 50 epochs.
    """

    start: Annotated[float, Range(0, 1, below=True)] = 0.25  # at 1 nothing would be attacked
    end: Share = 0.75
    stairs: Count | None = None

    @classmethod
    def read(cls, value: Any, where: str) -> Ramp:
        """Reads its entries, of which the end comes last."""
        ramp = read_entries(cls, value, where)
        if ramp.start > ramp.end:
            raise ValueError(
                f"{where}.end must be at least the start, {ramp.start:g}, got {ramp.end:g}"
            )
        return ramp

    def schedule(self, steps: int) -> finetuning.BudgetSchedule:
        """Returns the share of the budget by update, of a training of so many.

        Raises:
          ValueError: If there are so few that none is attacked.
        """
        first, full = (round(share * steps) for share in (self.start, self.end))
        if first >= steps:
            raise ValueError(
                f"ramp.start of {self.start:g} leaves none of the {steps} updates attacked, which "
                "is training on clean images; lower it, or train for more epochs"
            )
        return finetuning.BudgetSchedule(first, full, self.stairs)


class Decay:
    """How learning rates fall: a factor for each epoch in (0, 1], or ``"cosine"``."""

    @classmethod
    def read(cls, value: Any, where: str) -> float | str:
        """Reads the one or the other."""
        if value == optimizers.COSINE:
            return value
        try:
            return read(Annotated[float, Range(0, 1, above=True)], value, where)
        except ValueError as error:
            raise ValueError(f'{error}, which is not "{optimizers.COSINE}" either') from None


class Parts:
    """In how many parts a batch runs: a number, or ``"auto"``."""

    @classmethod
    def read(cls, value: Any, where: str) -> int | str:
        """Reads the one or the other."""
        if value == AUTO:
            return value
        try:
            return read(Count, value, where)
        except ValueError as error:
            raise ValueError(f'{error}, which is not "{AUTO}" either') from None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training, resolved: what a config's ``recipes`` become.

    Attributes:
      name: In the config; its directory is called by it.
      start: The recipe whose classifier it starts from; None: the public encoder, a fresh head.
      teacher: The recipe whose outputs on clean images losses pull to; see `losses.teacher_kl`.
      encoder: Another public encoder than the run's; None is the run's.
      head: ``"linear"``, ``"mlp"`` or a function of the number of classes.
      preprocess: What happens to pixels first.
      members: Recipes that make an ensemble; nothing is trained.
      prune: Share of the encoder's kernel weights set to zero before training.
      epochs: Passes over the training images; 0 trains nothing.
      batch_size: Images of an update.
      rates: Path pattern to learning rate, or ``"freeze"``; a later pattern overrides an earlier.
      last_blocks: Of the encoder only so many blocks move, and what comes after them; None: all
        that `rates` say.
      lora: Low-rank adapters, trained in the place of frozen kernels.
      select: Chooses which layers move, in place of `rates`.
      losses: What is minimized, by the name that is logged.
      adv_ratio: r: clean cross-entropy weighs 1 - r and adversarial r, beside the losses.
      attack: What crafts adversarial images; None where no loss needs them.
      ramp: How the attack's budget grows; None: it has all of it from the first update on.
      batch_statistics: Whose statistics the running ones follow; see `finetuning.make_step`.
      augment: ``(key, image) -> image``.
      compare_with_pretrained: Whether losses see the public encoder's outputs.
      weight_decay: In the gradient, as in Gen-AF's code.
      decay: Learning rates are multiplied by it after each epoch; ``"cosine"`` takes them to
        zero by the last update of `epochs`, along half a cosine.
      l2_sp: Weight of the squared distance to the start.
      ema: Decay, by update, of the average of weights and batch statistics; where it is above 0,
        the average is what is validated and kept.
      accumulate: Parts that a device runs its batch in, so that a larger one fits; the same numbers
        to rounding.  ``"auto"`` takes the fewest whose compiled step fits, and keeps to them.
      step_bytes: Memory that such a step may plan on a device, bytes; None is nine tenths of what
        the device says it has.
      remat: Whether a gradient keeps only the inputs of the encoder's blocks and computes the rest
        again; how much memory that saves is the compiler's word.
      cache_features: Whether a frozen encoder sees each image once and the head is trained on what
        it said; the same numbers to rounding.  Not with what needs images: attack, augmentation.
      patience: Epochs without a better one after which training stops.
      best: Which epoch is kept: the latest that is not beyond chance below the highest, by
        ``"clean"`` or ``"robust"`` validation accuracy; None is robust where there is an attack.
        ``"highest"`` is the highest itself, and ``"last"`` the last, whatever it is.
      tolerance: Robust accuracy that the interpolation guard may lose on the way from the start.
      scored: Whether it is compared, or only another one's start.
      text: All of it, plain JSON values: what its directory keeps.
    """

    name: str
    start: Recipe | None = None
    teacher: Recipe | None = None
    encoder: EncoderSource | None = None
    head: str | Function = "mlp"
    preprocess: Function | None = None
    members: tuple[Recipe, ...] = ()
    prune: Annotated[float, Range(0, 1, below=True)] = 0.0
    epochs: Natural = 0
    batch_size: Count = 128
    rates: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"encoder/**": 1e-3, "head/**": 5e-3}
    )
    last_blocks: Count | None = None
    lora: Lora | None = None
    select: Selection | None = None
    losses: Mapping[str, WeightedLoss] = dataclasses.field(default_factory=lambda: dict(CLEAN))
    adv_ratio: Share | None = None
    attack: InnerAttack | None = None
    ramp: Ramp | None = None
    batch_statistics: Literal["clean", "adversarial", "both", "frozen", "twins"] = "clean"
    augment: Function | None = None
    compare_with_pretrained: bool = False
    weight_decay: NotNegative = 8e-4
    decay: Decay = 0.96
    l2_sp: NotNegative = 0.0
    ema: Annotated[float, Range(0, 1, below=True)] = 0.0
    accumulate: Parts = 1
    step_bytes: Count | None = None
    remat: bool = False
    cache_features: bool = False
    patience: Count | None = None
    best: Literal["clean", "robust", "highest", "last"] | None = None
    tolerance: Share | None = None
    scored: bool = True
    text: Any = dataclasses.field(default=None, repr=False, metadata={"hidden": True})

    def __post_init__(self):
        if self.best == "robust" and self.attack is None:
            raise ValueError('best="robust" needs an attack: without one only "clean" is validated')
        if self.patience is not None and self.best == "last":
            raise ValueError(
                f"patience={self.patience} with best='last': stopping early needs a validated "
                "epoch to judge by"
            )
        if self.attack is None and self.batch_statistics in ("adversarial", "both"):
            raise ValueError(f"batch_statistics={self.batch_statistics!r} needs an attack")
        if self.ramp is not None and not finetuning.has_budget(self.build_attack(None)):
            raise ValueError(
                "ramp scales the epsilon of an attack, and "
                + ("there is no attack" if self.attack is None else "this attack has none")
            )
        remembers = self.attack is not None and finetuning.by_image(self.build_attack(None))
        if self.augment is not None and remembers:
            raise ValueError(
                "augment moves the pixels that the attack remembers perturbations of; leave out one"
            )
        if self.step_bytes is not None and self.accumulate != AUTO:
            raise ValueError('step_bytes is for accumulate="auto": say that too, or leave it out')
        if self.batch_size % self.parts:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}"
            )
        if self.parts > 1 and self.batch_statistics == "twins":
            raise ValueError(
                'accumulate is refused with batch_statistics="twins", which is about batch norm: a '
                "part's statistics are not the batch's"
            )
        self._check_cache()
        self._check_moving()
        if self.epochs and not self.members and not self.losses:
            raise ValueError("losses is empty: there is nothing to minimize")
        if self.members and len(self.members) < 2:
            raise ValueError("members: an ensemble is made of at least two recipes")

    def _check_cache(self) -> None:
        needing = {
            "attack": self.attack,
            "augment": self.augment,
            "teacher": self.teacher,
            "compare_with_pretrained": self.compare_with_pretrained,
            "select": self.select,
            "lora": self.lora,
        }
        if not self.cache_features:
            return
        for entry, value in needing.items():
            if value:
                raise ValueError(f"cache_features and {entry}, which needs images; leave out one")
        if self.batch_statistics != "frozen":
            raise ValueError(
                f"cache_features with batch_statistics={self.batch_statistics!r}: features are "
                'kept of a network that stays; take batch_statistics="frozen"'
            )

    def _check_moving(self) -> None:
        entries = {"select": self.select, "last_blocks": self.last_blocks, "lora": self.lora}
        given = [entry for entry, value in entries.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what moves; give one of them")
        if self.lora is not None and (self.prune or self.l2_sp):
            raise ValueError(
                f"lora with {'prune' if self.prune else 'l2_sp'}: adapters move every weight of a "
                "kernel, and have no start to be pulled to; leave one of them out"
            )

    def layer_rates(self, params: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the rate of each of a classifier's parameters, by path.

        Args:
          params: ``{"encoder": ..., "head": ...}``, arrays or their shapes.
          rates: By pattern: the recipe's, or those of the layers that it has chosen.

        Raises:
          ValueError: If they do not suit the parameters.
        """
        by_path = optimizers.layer_rates(params, rates)
        if self.last_blocks is not None:
            by_path = optimizers.last_blocks(by_path, self.last_blocks)
        if self.lora is not None:
            self.lora.check(params, by_path)
        return by_path

    def moves(self, params: Mapping[str, Any], rates: Mapping[str, Any]) -> bool:
        """Returns whether any parameter has a rate, or an adapter; arguments: `layer_rates`."""
        by_path = self.layer_rates(params, rates)
        return self.lora is not None or set(by_path.values()) != {optimizers.FREEZE}

    @property
    def parts(self) -> int:
        """In how many parts its batch runs; 1 as long as nobody has decided on ``"auto"``."""
        return 1 if self.accumulate == AUTO else self.accumulate

    def in_parts(self, parts: int) -> Recipe:
        """Returns the recipe with that decided; its text is as it was."""
        return dataclasses.replace(self, accumulate=parts, step_bytes=None)

    @property
    def needs(self) -> tuple[Recipe, ...]:
        """The recipes that come first: its members, or its start and its teacher."""
        return (*self.members, *filter(None, (self.start, self.teacher)))

    @property
    def is_trained(self) -> bool:
        """Whether it has a training of its own."""
        return self.epochs > 0 and not self.members

    def chain(self) -> list[Recipe]:
        """Returns the recipe with all that it needs, each once, itself first."""
        chain = [self]
        for recipe in chain:
            chain += [other for other in recipe.needs if other not in chain]
        return chain

    def lineage(self) -> list[Recipe]:
        """Returns the recipe with those whose network it has: its starts, and its members."""
        lineage = [self]
        for recipe in lineage:
            before = (*recipe.members, *filter(None, (recipe.start,)))
            lineage += [other for other in before if other not in lineage]
        return lineage

    @property
    def first(self) -> Recipe:
        """Where its starts begin: this one decides on encoder and head."""
        return self.start.first if self.start else self

    def public_encoder(self) -> EncoderSource | None:
        """Returns the encoder that it, or what it starts from, names; None is the run's."""
        return self.first.encoder

    @property
    def weighted_losses(self) -> dict[str, tuple[Loss, float]]:
        """The losses as `finetuning.make_step` takes them."""
        return {name: (term.loss, term.weight) for name, term in self.losses.items()}

    def build_head(self, num_classes: int) -> Any:
        """Returns the head as `models.classifier` takes it."""
        return self.head if isinstance(self.head, str) else self.head(num_classes)

    def build_attack(self, encoder: Encoder) -> Any:
        """Returns the attack of training, None where there is none."""
        return None if self.attack is None else self.attack.build(encoder)

    def budget(self, steps: int) -> finetuning.BudgetSchedule | None:
        """Returns the share of its budget that the attack has at each of so many updates."""
        return None if self.ramp is None else self.ramp.schedule(steps)

    def __repr__(self) -> str:
        return f"Recipe({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and (self.name, self.text) == (other.name, other.text)

    def __hash__(self) -> int:
        return hash(self.name)
