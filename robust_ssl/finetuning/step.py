"""One update of fine-tuning: craft, look, compare, move; the same for every method.

Usual fine-tuning is clean cross-entropy; Gen-AF's first stage is `mixed_losses` with an attack and
two learning rates; its second stage is clean cross-entropy with most parameters frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_ssl import losses as losses_lib
from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.conformance import resolve
from robust_ssl.finetuning.adversaries import COLLECTION, Adversary
from robust_ssl.finetuning.layerwise import keep_frozen, stop_frozen
from robust_ssl.parallel import average, gather
from robust_ssl.types import (
    Attack,
    Classifier,
    Encoder,
    Loss,
    LossInputs,
    Outputs,
    TrainState,
    Variables,
)
from robust_ssl.updates import no_skips, take_if_finite

Batch = Mapping[str, jax.Array]
BATCH_STATISTICS = ("clean", "adversarial", "both", "frozen", "twins")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One update, ``step(state, batch) -> (state, metrics)``, as `make_step` builds it.

    Attributes:
      function: ``(state, batch, settings) -> (state, metrics)``.
      settings: What differs between runs that share a compiled program: the weights of the losses,
        the attack with its budget, the random key, the pre-trained encoder.  A pytree of NumPy
        arrays and keys, for `Parallel.compile(function, constants=settings)`.
    """

    function: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]
    settings: Any

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
) -> TrainState:
    """Returns the state before the first update.

    Args:
      classifier: Its variables are copied, so that the state may be donated.
      tx: What updates the parameters.
      attack: What the step is given; an `Adversary` has perturbations in the state.
      key: Random key of an adversary's first perturbations.
      batch_size: Size of the global batch, for an adversary.

    Returns:
      A `TrainState` at step 0 with the counters ``skipped`` and ``skipped_in_a_row``.

    Raises:
      ValueError: If an adversary comes without `key` or `batch_size`.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> int(init_state(net, optax.sgd(0.1)).step)
      0
    """
    variables = jax.tree.map(jnp.array, classifier.variables)
    if isinstance(attack, Adversary):
        if key is None or batch_size is None:
            raise ValueError(
                f"{type(attack).__name__} keeps perturbations in the state: give init_state key= "
                "and batch_size= too"
            )
        size = classifier.image_size
        deltas = attack.init(key, (size, size, 3), batch_size)
        variables = {**variables, COLLECTION: {"deltas": deltas}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables["params"]),
        counters=no_skips(),
    )


def mixed_losses(
    adv_ratio: float,
    regularization_weight: float = 0.0,
    *,
    on: str = "logits",
    compat: str = "corrected",
) -> dict[str, tuple[Loss, float]]:
    r"""Returns Gen-AF's first-stage losses with their weights.

    .. math:: (1 - r)\,\mathrm{CE}(x) + r\,\mathrm{CE}(\tilde x) + w\,\mathrm{GR}

    A term of weight 0 is left out, so ``mixed_losses(0)`` is usual fine-tuning and needs no attack.

    Args:
      adv_ratio: `r` in [0, 1]; the released code has 1, no clean cross-entropy.
      regularization_weight: `w`, at least 0.  The step takes the mean over images where the
        released code adds up all pairs: its 20 at batch 256 is ``20 * 256`` here.
      on: ``"logits"`` or ``"features"``, as in `genetic_regularization`.
      compat: ``"corrected"`` or ``"released"``, as in `genetic_regularization`.  The released
        code's other choices are arguments elsewhere: the attack's (budget 0.03, step 0.007, no
        random start, un-normalised inputs) belong to the attack and the encoder.  Its leak of the
        attack's gradients into the update is a bug that pure functions cannot have.

    Returns:
      Name to (loss, weight), as `make_step` takes them.

    Raises:
      ValueError: If `adv_ratio` is outside [0, 1] or the weight is negative.

    Example:
      >>> {name: weight for name, (_, weight) in mixed_losses(0.25, 2.0).items()}
      {'clean_cross_entropy': 0.75, 'adversarial_cross_entropy': 0.25, 'genetic_regularization': 2.0}

    References:
      Zhou et al., IEEE S&P 2024, first stage.
    """  # noqa: E501
    if not 0 <= adv_ratio <= 1:
        raise ValueError(f"adv_ratio must be in [0, 1], got {adv_ratio}")
    if not 0 <= regularization_weight < float("inf"):
        raise ValueError(f"regularization_weight must be at least 0, got {regularization_weight}")
    regularization = functools.partial(losses_lib.genetic_regularization, on=on, compat=compat)
    terms = {
        "clean_cross_entropy": (losses_lib.clean_cross_entropy, 1 - adv_ratio),
        "adversarial_cross_entropy": (losses_lib.adversarial_cross_entropy, adv_ratio),
        "genetic_regularization": (regularization, regularization_weight),
    }
    return {name: (loss, weight) for name, (loss, weight) in terms.items() if weight > 0}


def make_step(
    template: Classifier,
    tx: optax.GradientTransformation,
    *,
    losses: Mapping[str, tuple[Loss | str, float]],
    key: jax.Array,
    attack: Attack | Adversary | None = None,
    pretrained: Encoder | None = None,
    batch_statistics: str = "clean",
    frozen: Collection[str] = (),
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    axis_name: str | None = None,
) -> Step:
    """Builds the update; give it to `Parallel.compile`.

    Adversarial images are crafted against the very weights that are being trained, in evaluation
    mode, and are constants; those of an `Adversary` have a gradient, by which it moves.  Losses see
    the gathered global batch.  What no loss looks at is not computed.  A step whose loss, gradient
    or new state is not finite changes nothing but the counters.

    Args:
      template: The classifier's structure; the weights come from the state.
      tx: What updates the parameters, for example `layerwise_optimizer`.
      losses: Name to (loss, weight); a loss may be ``"module:function"``.  Logged by name.
      key: Base key; step `t` uses ``fold_in(key, t)``, image `i` of it ``fold_in(..., i)``.
      attack: Perturbs one image, sees its label; or an `Adversary`, whose perturbations are in the
        state (`init_state`).  None where no loss needs adversarial outputs.
      pretrained: The public encoder, for losses that compare with it; frozen, evaluation mode.
      batch_statistics: Whose statistics the running ones follow: ``"clean"``, ``"adversarial"``,
        ``"both"`` (the mean of the two) or ``"frozen"``.  In the first three each forward pass is
        normalised by its own batch; with ``"frozen"`` the encoder runs in evaluation mode,
        normalised by the running statistics, which is what a frozen encoder needs.  ``"twins"``:
        images at even places are normalised by their own batch, which the running statistics
        follow, those at odd places by the statistics of `template`, which stay.
      frozen: Paths of parameters that must not move, from `frozen_paths`.  They get no gradient
        (whose cost is saved), and a frozen norm's running statistics stay as they are too.
      augment: ``augment(key, image) -> image`` for one image in [0, 1], or None.
      axis_name: `Parallel.axis_name`.

    Returns:
      A `Step`, ``step(state, batch) -> (state, metrics)``.  The batch has ``images``, float32 in
      [0, 1] or uint8, ``[n, H, W, 3]``; ``labels``, int32 ``[n]``; and ``indices``, int32 ``[n]``,
      each image's position in the global batch.  Metrics are scalars: each loss by name,
      unweighted, and ``loss``, ``clean_accuracy`` and ``robust_accuracy`` (where a loss looks at
      those logits; shares of this batch in training mode), ``gradient_norm`` (of what is trained)
      and ``skipped`` (0 or 1).

    Raises:
      ValueError: If there is no loss, `batch_statistics` is not known or asks for an attack or a
        batch norm that is not there, a loss does not return ``[batch]``, or it needs outputs that
        are missing.

    Example:
      >>> from robust_ssl import models
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
    if batch_statistics not in BATCH_STATISTICS:
        raise ValueError(
            f"batch_statistics must be one of {BATCH_STATISTICS}, got {batch_statistics!r}"
        )
    if attack is None and batch_statistics in ("adversarial", "both"):
        raise ValueError(f"batch_statistics={batch_statistics!r} needs an attack, got None")
    if batch_statistics == "twins" and "encoder" not in template.variables.get("batch_stats", {}):
        raise ValueError(
            'batch_statistics="twins" is about batch norm, and this encoder has none; take "clean"'
        )
    # As floats: with 6 among the weights of a sweep the program of 6.5 would be another one.
    weights = {name: float(weight) for name, (_, weight) in losses.items()}
    losses = {name: resolve(loss) for name, (loss, _) in losses.items()}
    read = _read_by(losses, template, attack is not None, pretrained)
    carried, twins = isinstance(attack, Adversary), batch_statistics == "twins"
    settings = {
        # Read once, as NumPy: constants must not sit on one device or in one process.
        **_on_host({"weights": weights, "attack": attack, "pretrained": pretrained}),
        "statistics": _on_host(template.variables["batch_stats"]) if twins else None,
        "key": key,
    }

    def function(
        state: TrainState, batch: Batch, settings: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        attack, pretrained = settings["attack"], settings["pretrained"]
        step_key, train_key = jax.random.split(jax.random.fold_in(settings["key"], state.step))
        # Every replay of a batch has the same augmentation.
        shown = state.step // getattr(attack, "replays", 1)
        image_key, _ = jax.random.split(jax.random.fold_in(settings["key"], shown))
        images = _clean_images(jax.random.split(image_key)[0], batch, augment)
        _, attack_key = jax.random.split(step_key)
        labels, indices = batch["labels"], batch["indices"]
        look = functools.partial(
            _look, train_key, batch_statistics, settings["statistics"], axis_name
        )
        if attack is not None and not carried:
            model = template.with_variables(state.variables)
            crafted = attack_batch(attack, attack_key, model, images, labels, indices)
            crafted = jax.lax.stop_gradient(crafted)
        anchor = None
        if pretrained is not None:
            anchor = _gathered(pretrained(images), read["pretrained"], axis_name)
        deltas = state.variables.get(COLLECTION, {})
        everyones_labels = gather(labels, axis_name)

        def total_loss(params, deltas):
            variables = {**state.variables, "params": stop_frozen(params, frozen)}
            model = template.with_variables(variables)
            clean, clean_statistics = look(read["clean"], model, images)
            attacked, attacked_statistics = None, None
            if attack is not None:
                adversarial = (
                    attack.apply(deltas["deltas"], attack_key, images, indices)
                    if carried
                    else crafted
                )
                attacked, attacked_statistics = look(read["adversarial"], model, adversarial)
            inputs = LossInputs(
                labels=everyones_labels, clean=clean, adversarial=attacked, pretrained=anchor
            )
            loss, metrics = _weighted_sum(losses, settings["weights"], inputs)
            metrics |= _accuracies(inputs, read)
            return loss, (metrics, (clean_statistics, attacked_statistics))

        (gradient, uphill), (metrics, statistics) = jax.grad(
            total_loss, argnums=(0, 1), has_aux=True
        )(state.variables["params"], deltas)
        gradient, uphill = average((gradient, uphill), axis_name)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.variables["params"])
        variables = {
            **state.variables,
            **_follow(batch_statistics, *statistics),
            "params": optax.apply_updates(state.variables["params"], updates),
        }
        variables = keep_frozen(variables, state.variables, frozen)
        if carried:
            renewal_key = jax.random.fold_in(step_key, 2)  # 0 and 1 are taken: the split above
            moved = attack.update(deltas["deltas"], uphill["deltas"], renewal_key, state.step)
            variables[COLLECTION] = {"deltas": moved}
        return take_if_finite(state, variables, opt_state, metrics)

    return Step(function, settings)


def _on_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.asarray(leaf).dtype), tree)


def _clean_images(key: jax.Array, batch: Batch, augment) -> jax.Array:
    """Returns the step's clean images, augmented; each is keyed by its index."""
    images = batch["images"]
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255.0
    if augment is None:
        return images
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["indices"])
    return jax.vmap(augment)(keys, images)


def _look(
    key: jax.Array,
    batch_statistics: str,
    start_statistics: Variables,
    axis_name: str | None,
    read: Collection[str],
    model: Classifier,
    images: jax.Array,
) -> tuple[Outputs, Variables | None]:
    """Returns outputs for the global batch and the new batch statistics (or None).

    The head runs on the gathered features: it is small, and its dropout then does not depend on
    how the batch is spread.  Clean and adversarial images share one key, so that dropout makes no
    difference between them.
    """
    encoder_key, head_key = jax.random.split(key)
    train = functools.partial(model.encoder.apply_train, key=encoder_key, axis_name=axis_name)
    if batch_statistics == "frozen":
        outputs, statistics = model.encoder(images), None
    elif batch_statistics == "twins":
        outputs, statistics = _twins(model.encoder, start_statistics, train, images)
    else:
        outputs, statistics = train(images)
    outputs = _gathered(outputs, read, axis_name)
    logits = model.head.apply(
        model.head_variables, outputs.features, train=True, rngs={"dropout": head_key}
    )
    return outputs.replace(logits=logits), statistics


def _twins(encoder: Encoder, start_statistics: Variables, train: Callable, images: jax.Array):
    """Even places through batch norm of their own batch, odd ones through that of the start."""
    if images.shape[0] % 2:
        raise ValueError(
            f'batch_statistics="twins" halves a batch: each device needs an even number of '
            f"images, got {images.shape[0]}"
        )
    adaptive, statistics = train(images[0::2])
    start = {**encoder.variables, "batch_stats": start_statistics["encoder"]}
    held = encoder.replace(variables=start)(images[1::2])

    def in_turn(a, b):
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(in_turn, adaptive, held), statistics


def _gathered(outputs: Outputs, read: Collection[str], axis_name: str | None) -> Outputs:
    """The global batch of the features and of those taps that a loss looks at.

    The others stay where they are: a loss that takes "the second block" needs all their names.
    """
    taps = {
        name: gather(tap, axis_name) if name in read else tap for name, tap in outputs.taps.items()
    }
    return Outputs(features=gather(outputs.features, axis_name), taps=taps)


def _follow(batch_statistics: str, clean, adversarial) -> Variables:
    """Chooses the new running statistics; empty where nothing changes."""
    if batch_statistics == "both":
        new = jax.tree.map(lambda a, b: (a + b) / 2, clean, adversarial)
    elif batch_statistics == "twins":
        new = clean if adversarial is None else adversarial
    else:
        new = {"clean": clean, "adversarial": adversarial}.get(batch_statistics)
    return {"batch_stats": {"encoder": new}} if new else {}


def _weighted_sum(losses, weights, inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    metrics = {}
    total = jnp.zeros(())
    for name, loss in losses.items():
        metrics[name] = jnp.mean(_per_image(name, loss, inputs))
        total = total + weights[name] * metrics[name]
    return total, metrics | {"loss": total}


def _per_image(name: str, loss: Loss, inputs: LossInputs) -> jax.Array:
    try:
        values = loss(inputs)
    except (AttributeError, ValueError) as error:
        error.add_note(f"this happened in the loss {name!r}")
        raise
    shape = getattr(values, "shape", None)
    if shape != inputs.labels.shape:
        raise ValueError(
            f"the loss {name!r} must return one value per image, [batch] = "
            f"{inputs.labels.shape}, but returned shape {shape}; do not take the mean in it"
        )
    return values


def _read_by(
    losses: Mapping[str, Loss], template: Classifier, attacked: bool, pretrained: Encoder | None
) -> dict[str, set[str]]:
    """Returns what the losses look at: ``"logits"``, ``"features"`` and taps of each output.

    Every loss is called on shapes only, so that a wrong one fails before anything is compiled.
    """
    if not losses:
        raise ValueError("there is nothing to minimise: losses is empty")
    size = template.image_size
    images = jax.ShapeDtypeStruct((_BATCH, size, size, 3), jnp.float32)
    outputs = jax.eval_shape(template, images)
    inputs = LossInputs(
        labels=jax.ShapeDtypeStruct((_BATCH,), jnp.int32),
        clean=outputs,
        adversarial=outputs if attacked else None,
        pretrained=None if pretrained is None else jax.eval_shape(pretrained, images),
    )
    read: dict[str, set[str]] = {"clean": set(), "adversarial": set(), "pretrained": set()}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(inputs)[0]]
    for name, loss in losses.items():
        program = jax.make_jaxpr(functools.partial(_per_image, name, loss))(inputs).jaxpr
        used = {id(v) for equation in program.eqns for v in equation.invars}
        used |= {id(v) for v in program.outvars}
        for (output, *rest), variable in zip(paths, program.invars, strict=True):
            if rest and id(variable) in used:
                read[output.name].add(_last(rest))
    return read


_BATCH = 8  # images of the made-up batch on which losses are tried


def _last(path) -> str:
    """``"logits"`` of ``.logits``, ``"stage1/block1"`` of ``.taps["stage1/block1"]``."""
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))


def _accuracies(inputs: LossInputs, read: Mapping[str, Collection[str]]) -> dict[str, jax.Array]:
    """The accuracies of those outputs whose logits a loss looks at; others would cost a pass."""
    names = {"clean_accuracy": "clean", "robust_accuracy": "adversarial"}
    return {
        name: jnp.mean(jnp.argmax(getattr(inputs, which).logits, axis=-1) == inputs.labels)
        for name, which in names.items()
        if "logits" in read[which]
    }
