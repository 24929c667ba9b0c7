"""One update of fine-tuning: attack, forward, losses, update; the same for every recipe.

Usual fine-tuning is clean cross-entropy; Gen-AF's first stage is `mixed_losses` with an attack and
two learning rates; its second stage is clean cross-entropy with most parameters frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_ssl import struct
from robust_ssl.finetuning import parts
from robust_ssl.finetuning.adversaries import COLLECTION, Adversary, by_image, deltas_in
from robust_ssl.finetuning.averaging import AVERAGE, average_in, check_decay, first_average, follow
from robust_ssl.finetuning.budget import BudgetSchedule, has_budget, scaled
from robust_ssl.finetuning.images import Batch, attacked_images, clean_images, step_keys
from robust_ssl.finetuning.lora import merged
from robust_ssl.finetuning.outputs import (
    BATCH_STATISTICS,
    accuracies,
    encoded,
    functions_and_weights,
    gather_outputs,
    loss_per_image,
    outputs_read,
    running_statistics,
    training_outputs,
)
from robust_ssl.keys import check_key
from robust_ssl.optimizers.finite import no_skips, take_if_finite
from robust_ssl.optimizers.layerwise import keep_frozen, stop_frozen
from robust_ssl.parallel import Parallel, Program, average, copied, gather
from robust_ssl.types import Attack, Classifier, Encoder, Loss, LossInputs, TrainState, Variables


@struct.dataclass
class Settings:
    """What differs between runs that share a compiled program: arguments of the step, not of XLA.

    Attributes:
      weights: Of the losses, by name.
      attack: The attack with its budget, or None.
      pretrained: The public encoder, or None.
      statistics: The batch statistics that training starts from, for ``"twins"``, or None.
      key: Base key.
      budget: The share of its budget that the attack has at a step; None: all of it, always.
      teacher: Another classifier, or None.
      ema: Decay of the average of weights, or None.
    """

    weights: Mapping[str, Any]
    attack: Attack | Adversary | None
    pretrained: Encoder | None
    statistics: Variables | None
    key: jax.Array
    budget: BudgetSchedule | None = None
    teacher: Classifier | None = None
    ema: jax.Array | None = None


class Computation:
    """What a step computes, with its settings an argument; compiled once for each `Parallel`.

    Attributes:
      function: ``(state, batch, settings) -> (state, metrics)``.
    """

    def __init__(self, function: Callable):
        self.function = function
        self._programs: dict[Parallel, Program] = {}

    def program(self, parallel: Parallel) -> Program:
        """Returns ``(state, batch) -> (state, metrics)`` on all devices; bind its settings."""
        if parallel not in self._programs:
            self._programs[parallel] = parallel.compile(self.function, constants=())
        return self._programs[parallel]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One update, ``step(state, batch) -> (state, metrics)``, as `make_step` builds it.

    Attributes:
      computation: Steps that differ in their settings alone may share one, and its program.
      settings: A pytree of NumPy arrays and keys.
      passes: How often an image goes through the network and back for the update itself: once for
        clean and once for adversarial outputs, where a loss reads them.
      read: Those that a loss reads of the clean, adversarial, pretrained and teacher outputs.
    """

    computation: Computation
    settings: Settings
    passes: int
    read: frozenset[str] = frozenset()

    @property
    def function(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """``(state, batch, settings) -> (state, metrics)``."""
        return self.computation.function

    def compiled(self, parallel: Parallel) -> Program:
        """Returns ``(state, batch) -> (state, metrics)`` on all devices."""
        return self.computation.program(parallel).bind(parallel.replicate(self.settings))

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the next state and the metrics; under `jax.jit` the settings are constants."""
        return self.function(state, batch, self.settings)


def init_state(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    attack: Attack | Adversary | None = None,
    *,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    num_images: int | None = None,
    average: bool = False,
    adapters: Variables | None = None,
) -> TrainState:
    """Returns the state before the first update.

    Args:
      classifier: Its variables are copied, so that the state may be donated.
      tx: What updates the parameters.
      attack: What the step is given; an `Adversary` has perturbations in the state.
      key: Random key of an adversary's first perturbations.
      batch_size: Size of the global batch, for an adversary.
      num_images: Size of the training set, for an adversary that remembers every image.
      average: Whether the state keeps an average of the weights, as a step with `ema` needs.
      adapters: As `finetuning.adapters` returns; `tx` must know their paths, and `frozen` of the
        step those of their kernels.

    Returns:
      A `TrainState` at step 0 with the counters ``skipped`` and ``skipped_in_a_row``.

    Raises:
      ValueError: If an adversary comes without `key`, `batch_size` or the `num_images` it needs.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> int(init_state(net, optax.sgd(0.1)).step)
      0
    """
    # Copies: a donated state must not take the classifier's arrays with it.
    variables = copied(classifier.variables)
    if isinstance(attack, Adversary):
        of = "num_images" if by_image(attack) else "batch_size"
        count = num_images if by_image(attack) else batch_size
        if key is None or count is None:
            raise ValueError(
                f"{type(attack).__name__} keeps perturbations in the state: give init_state key= "
                f"and {of}= too"
            )
        size = classifier.image_size
        deltas = attack.init(key, (size, size, 3), count)
        variables = {**variables, COLLECTION: {"deltas": deltas}}
    if adapters is not None:
        params = {**variables["params"], **adapters["params"]}
        variables = {**variables, **adapters, "params": params}
    if average:
        variables = {**variables, AVERAGE: first_average(variables)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables["params"]),
        counters=no_skips(),
    )


def make_step(
    template: Classifier,
    tx: optax.GradientTransformation,
    *,
    losses: Mapping[str, tuple[Loss | str, float]],
    key: jax.Array,
    attack: Attack | Adversary | None = None,
    budget: BudgetSchedule | None = None,
    pretrained: Encoder | None = None,
    teacher: Classifier | None = None,
    batch_statistics: str = "clean",
    frozen: Collection[str] = (),
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ema: float | None = None,
    accumulate: int = 1,
    remat: bool = False,
    axis_name: str | None = None,
) -> Step:
    """Builds the update; give it to `Parallel.compile`.

    Adversarial images are crafted against the very weights that are being trained, in evaluation
    mode, and are constants; those of an `Adversary` have a gradient, by which it moves.  Losses see
    the gathered global batch.  What no loss reads is not computed.  A step whose loss, gradient
    or new state is not finite changes nothing but the counters.

    Args:
      template: The classifier's structure; the weights come from the state.
      tx: What updates the parameters, for example `layerwise_optimizer`.
      losses: Name to (loss, weight); a loss may be ``"module:function"``.  Logged by name.
      key: Base key; step `t` uses ``fold_in(key, t)``, image `i` of it ``fold_in(..., i)``.
      attack: Perturbs one image, sees its label; or an `Adversary`, whose perturbations are in the
        state (`init_state`).  None where no loss needs adversarial outputs.
      budget: Which share of its budget the attack has at a step; None: all of it.  Where it has
        none, per-image attacks are not computed, and adversarial images are the clean ones.
      pretrained: The public encoder, for losses that compare with it; frozen, evaluation mode.
      teacher: A finished classifier, for losses that pull to its outputs on the clean images.
      batch_statistics: Whose statistics the running ones follow: ``"clean"``, ``"adversarial"``,
        ``"both"`` (the mean of the two) or ``"frozen"``.  In the first three each forward pass is
        normalized by its own batch; with ``"frozen"`` the encoder runs in evaluation mode,
        normalized by the running statistics, which is what a frozen encoder needs.  ``"twins"``:
        images at even places are normalized by their own batch, which the running statistics
        follow, those at odd places by the statistics of `template`, which stay.
      frozen: Paths of parameters that must not move, from `frozen_paths`.  They get no gradient
        (whose cost is saved), and a frozen norm's running statistics stay as they are too.
      augment: ``augment(key, image) -> image`` for one image in [0, 1], or None.
      ema: Decay of the average of weights and batch statistics that the state keeps (`init_state`
        with ``average=True``); None keeps none.
      accumulate: Parts that each device runs its batch in, attack included; the numbers are the
        same to rounding.  Refused where a part would be another computation: batch norm or dropout
        in training mode.
      remat: Whether only the inputs of the encoder's blocks are kept for a gradient.
      axis_name: `Parallel.axis_name`.

    Returns:
      A `Step`, ``step(state, batch) -> (state, metrics)``.  The batch has ``images``, float32 in
      [0, 1] or uint8, ``[n, H, W, 3]``; ``labels``, int32 ``[n]``; ``indices``, int32 ``[n]``,
      each image's position in the global batch; and, for an adversary that remembers every image,
      ``rows``, its position in the training set.  Metrics are scalars: each loss by name,
      unweighted, and ``loss``, ``clean_accuracy`` and ``robust_accuracy`` (where a loss reads
      those logits; shares of this batch in training mode), ``gradient_norm`` (of what is trained),
      ``budget`` (the share, where it has a schedule) and ``skipped`` (0 or 1).

    Raises:
      ValueError: If there is no loss, one is not ``(loss, weight)``, `batch_statistics` is not
        known or asks for an attack or a batch norm that is not there, `budget` for an epsilon that
        is not, a loss does not return ``[batch]``, or it needs outputs that are missing; if the
        encoder cannot be run in parts, or has no blocks to keep.

    Example:
      >>> from robust_ssl import models
      >>> from robust_ssl.finetuning import mixed_losses
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> tx = optax.sgd(0.1)
      >>> step = make_step(net, tx, losses=mixed_losses(0.0), key=jax.random.key(2))
      >>> batch = {"images": jnp.zeros((4, 8, 8, 3)), "labels": jnp.arange(4) % 3}
      >>> batch["indices"] = jnp.arange(4)
      >>> state, metrics = jax.eval_shape(step, init_state(net, tx), batch)
      >>> sorted(metrics)
      ['clean_accuracy', 'clean_cross_entropy', 'gradient_norm', 'loss', 'skipped']

    References:
      Zhou et al., IEEE S&P 2024, both stages; what differs from the released code is named here.
      Liu et al., "TWINS: A Fine-Tuning Framework for Improved Transferability of Adversarial
      Robustness and Generalization", CVPR 2023, for ``"twins"``; there each of the two halves of a
      batch goes through one of two networks that share their weights, as here.
    """
    check_key(key)
    if batch_statistics not in BATCH_STATISTICS:
        raise ValueError(
            f"batch_statistics must be one of {BATCH_STATISTICS}, got {batch_statistics!r}"
        )
    if attack is None and batch_statistics in ("adversarial", "both"):
        raise ValueError(f"batch_statistics={batch_statistics!r} needs an attack, got None")
    if budget is not None and not has_budget(attack):
        kind = type(attack).__name__
        raise ValueError(f"a budget schedule scales an attack's epsilon, and {kind} has none")
    if batch_statistics == "twins" and "encoder" not in template.variables.get("batch_stats", {}):
        raise ValueError(
            'batch_statistics="twins" is about batch norm, and this encoder has none; take "clean"'
        )
    check_decay(ema)
    parts.check(template, accumulate, batch_statistics)
    losses, weights = functions_and_weights(losses)
    # As NumPy: constants must not sit on one device or in one process.
    statistics = template.variables["batch_stats"] if batch_statistics == "twins" else None
    weights, attack, pretrained, budget, teacher, statistics = jax.tree.map(
        np.asarray, (weights, attack, pretrained, budget, teacher, statistics)
    )
    read = outputs_read(losses, template, attack is not None, pretrained, teacher)
    if remat:
        template = parts.rematerialized(template)
    # Shapes in place of weights: who keeps a step does not keep those too.
    template = template.with_variables(jax.eval_shape(lambda x: x, template.variables))
    plan = _Plan(
        template, tx, losses, read, batch_statistics, frozen, augment, axis_name, accumulate
    )
    by_loss = frozenset(which for which, names in read.items() if names)
    decay = None if ema is None else np.float32(ema)
    settings = Settings(weights, attack, pretrained, statistics, key, budget, teacher, decay)
    passes = len(by_loss & {"clean", "adversarial"})
    return Step(Computation(functools.partial(_update, plan)), settings, passes, by_loss)


class _Plan(NamedTuple):
    """What is fixed when the step is compiled."""

    template: Classifier
    tx: optax.GradientTransformation
    losses: Mapping[str, Loss]
    read: Mapping[str, Set[str]]
    batch_statistics: str
    frozen: Collection[str]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    axis_name: str | None
    parts: int


def _update(
    plan: _Plan, state: TrainState, batch: Batch, settings: Settings
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Attacks the images, takes the gradient of the losses and moves the weights."""
    attack, params, share = settings.attack, state.variables["params"], None
    if settings.budget is not None:
        share = settings.budget(state.step)
        attack = scaled(attack, share)
    keys = step_keys(settings.key, state.step)
    images = clean_images(plan.augment, state.step, batch, settings.key, settings.attack)
    # Against the weights before this step, outside of the loss: no gradient goes back through it.
    model = plan.template.with_variables(merged(state.variables))
    adversarial_images = attacked_images(
        attack, keys.attack, model, images, batch, share=share, parts=plan.parts
    )
    labels = gather(batch["labels"], plan.axis_name)
    held = {}  # what no gradient flows into
    for name in ("pretrained", "teacher"):
        if (model := getattr(settings, name)) is not None:
            outputs = encoded(model, images, plan.read[name], plan.parts)
            held[name] = gather_outputs(outputs, plan.read[name], plan.axis_name)

    def total_loss(params, deltas):
        variables = merged({**state.variables, "params": stop_frozen(params, plan.frozen)})
        outputs_of = functools.partial(
            training_outputs,
            plan.template.with_variables(variables),
            keys.network,
            plan.batch_statistics,
            settings.statistics,
            plan.axis_name,
            plan.parts,
        )
        clean, statistics = outputs_of(images, plan.read["clean"])
        adversarial, adversarial_statistics = None, None
        if attack is not None:
            adversarial, adversarial_statistics = outputs_of(
                adversarial_images(deltas), plan.read["adversarial"]
            )
        inputs = LossInputs(labels=labels, clean=clean, adversarial=adversarial, **held)
        loss, metrics = _weighted_sum(plan.losses, settings.weights, inputs)
        running = running_statistics(plan.batch_statistics, statistics, adversarial_statistics)
        return loss, (metrics | accuracies(inputs, plan.read), running)

    # One backward pass for weights and perturbations is what makes an adversary free.
    # Without an adversary the tree is empty, and so is its gradient.
    deltas = deltas_in(state.variables, attack)
    gradients, (metrics, running) = jax.grad(total_loss, argnums=(0, 1), has_aux=True)(
        params, deltas
    )
    gradient, uphill = average(gradients, plan.axis_name)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    if share is not None:
        metrics["budget"] = share
    updates, opt_state = plan.tx.update(gradient, state.opt_state, params)
    new = {**state.variables, **running, "params": optax.apply_updates(params, updates)}
    variables = keep_frozen(new, state.variables, plan.frozen)
    if isinstance(attack, Adversary):
        moved = attack.update(deltas["deltas"], uphill["deltas"], keys.renewal, state.step)
        variables[COLLECTION] = {"deltas": moved}
    if settings.ema is not None:
        variables[AVERAGE] = follow(average_in(state.variables), variables, settings.ema)
    return take_if_finite(state, variables, opt_state, metrics)


def _weighted_sum(losses, weights, inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    metrics = {}
    total = jnp.zeros(())
    for name, loss in losses.items():
        metrics[name] = jnp.mean(loss_per_image(name, loss, inputs))
        total = total + weights[name] * metrics[name]
    return total, metrics | {"loss": total}
