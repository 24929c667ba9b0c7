"""One update of fine-tuning: craft, look, compare, move; the same for every method.

Usual fine-tuning is clean cross-entropy; Gen-AF's first stage is `mixed_losses` with an attack and
two learning rates; its second stage is clean cross-entropy with most parameters frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import optax

from robust_ssl import losses as losses_lib
from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.conformance import resolve
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
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
BATCH_STATISTICS = ("clean", "adversarial", "both", "frozen")


def init_state(classifier: Classifier, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update.

    Args:
      classifier: Its variables are copied, so that the state may be donated.
      tx: What updates the parameters.

    Returns:
      A `TrainState` at step 0 with the counters ``skipped`` and ``skipped_in_a_row``.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> int(init_state(net, optax.sgd(0.1)).step)
      0
    """
    variables = jax.tree.map(jnp.array, classifier.variables)
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
    attack: Attack | None = None,
    pretrained: Encoder | None = None,
    batch_statistics: str = "clean",
    frozen: Collection[str] = (),
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    axis_name: str | None = None,
) -> Step:
    """Builds the update; give it to `Parallel.compile`.

    Adversarial images are crafted against the very weights that are being trained, in evaluation
    mode, and are constants.  Losses see the gathered global batch.  A step whose loss, gradient or
    new state is not finite changes nothing but the counters.

    Args:
      template: The classifier's structure; the weights come from the state.
      tx: What updates the parameters, for example `layerwise_optimizer`.
      losses: Name to (loss, weight); a loss may be ``"module:function"``.  Logged by name.
      key: Base key; step `t` uses ``fold_in(key, t)``, image `i` of it ``fold_in(..., i)``.
      attack: Perturbs one image, sees its label; None where no loss needs adversarial outputs.
      pretrained: The public encoder, for losses that compare with it; frozen, evaluation mode.
      batch_statistics: Whose statistics the running ones follow: ``"clean"``, ``"adversarial"``,
        ``"both"`` (the mean of the two) or ``"frozen"``.  In the first three each forward pass is
        normalised by its own batch; with ``"frozen"`` the encoder runs in evaluation mode,
        normalised by the running statistics, which is what a frozen encoder needs.
      frozen: Paths of parameters that must not move, from `frozen_paths`.  They get no gradient
        (whose cost is saved), and a frozen norm's running statistics stay as they are too.
      augment: ``augment(key, image) -> image`` for one image in [0, 1], or None.
      axis_name: `Parallel.axis_name`.

    Returns:
      ``step(state, batch) -> (state, metrics)``.  The batch has ``images``, float32 in [0, 1] or
      uint8, ``[n, H, W, 3]``; ``labels``, int32 ``[n]``; and ``indices``, int32 ``[n]``, each
      image's position in the global batch.  Metrics are scalars: each loss by name, unweighted,
      and ``loss``, ``clean_accuracy``, ``robust_accuracy`` (with an attack; shares of this batch in
      training mode), ``gradient_norm`` (of what is trained) and ``skipped`` (0 or 1).

    Raises:
      ValueError: If there is no loss, `batch_statistics` is not known or asks for an attack that
        is not there, a loss does not return ``[batch]``, or it needs outputs that are missing.

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
    """
    if batch_statistics not in BATCH_STATISTICS:
        raise ValueError(
            f"batch_statistics must be one of {BATCH_STATISTICS}, got {batch_statistics!r}"
        )
    if attack is None and batch_statistics in ("adversarial", "both"):
        raise ValueError(f"batch_statistics={batch_statistics!r} needs an attack, got None")
    losses = {name: (resolve(loss), weight) for name, (loss, weight) in losses.items()}
    _check_losses(losses, template, attack is not None, pretrained is not None)
    # Read once, as NumPy: constants must not sit on one device or in one process.
    pretrained = None if pretrained is None else jax.device_get(pretrained)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        step_key, train_key = jax.random.split(jax.random.fold_in(key, state.step))
        model = template.with_variables(state.variables)
        images, adversarial = _images(step_key, model, batch, augment, attack)
        anchor = None if pretrained is None else pretrained(images).without_taps()
        anchor = gather(anchor, axis_name)
        labels = gather(batch["labels"], axis_name)

        def total_loss(params):
            variables = {**state.variables, "params": stop_frozen(params, frozen)}
            look = functools.partial(
                _look, template.with_variables(variables), train_key, batch_statistics, axis_name
            )
            clean, clean_statistics = look(images)
            attacked, attacked_statistics = (None, None) if attack is None else look(adversarial)
            inputs = LossInputs(labels=labels, clean=clean, adversarial=attacked, pretrained=anchor)
            loss, metrics = _weighted_sum(losses, inputs)
            metrics |= _accuracies(inputs)
            return loss, (metrics, (clean_statistics, attacked_statistics))

        gradient, (metrics, statistics) = jax.grad(total_loss, has_aux=True)(
            state.variables["params"]
        )
        gradient = average(gradient, axis_name)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.variables["params"])
        variables = {
            **state.variables,
            **_follow(batch_statistics, *statistics),
            "params": optax.apply_updates(state.variables["params"], updates),
        }
        variables = keep_frozen(variables, state.variables, frozen)
        return take_if_finite(state, variables, opt_state, metrics)

    return step


def _images(key, model: Classifier, batch: Batch, augment, attack):
    """Returns the step's clean and adversarial images (or None), each keyed by its index."""
    augment_key, attack_key = jax.random.split(key)
    images, labels, indices = batch["images"], batch["labels"], batch["indices"]
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255.0
    if augment is not None:
        keys = jax.vmap(lambda index: jax.random.fold_in(augment_key, index))(indices)
        images = jax.vmap(augment)(keys, images)
    if attack is None:
        return images, None
    adversarial = attack_batch(attack, attack_key, model, images, labels, indices)
    return images, jax.lax.stop_gradient(adversarial)


def _look(model: Classifier, key, batch_statistics, axis_name, images):
    """Returns outputs for the global batch and the new batch statistics (or None).

    The head runs on the gathered features: it is small, and its dropout then does not depend on
    how the batch is spread.  Clean and adversarial images share one key, so that dropout makes no
    difference between them.
    """
    encoder_key, head_key = jax.random.split(key)
    if batch_statistics == "frozen":
        outputs, statistics = model.encoder(images), None
    else:
        outputs, statistics = model.encoder.apply_train(
            images, key=encoder_key, axis_name=axis_name
        )
    features = gather(outputs.features, axis_name)
    logits = model.head.apply(
        model.head_variables, features, train=True, rngs={"dropout": head_key}
    )
    return Outputs(features=features, logits=logits), statistics


def _follow(batch_statistics: str, clean, adversarial) -> Variables:
    """Chooses the new running statistics; empty where nothing changes."""
    new = {"clean": clean, "adversarial": adversarial, "frozen": None}.get(batch_statistics)
    if batch_statistics == "both":
        new = jax.tree.map(lambda a, b: (a + b) / 2, clean, adversarial)
    return {"batch_stats": {"encoder": new}} if new else {}


def _weighted_sum(losses, inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    metrics = {}
    total = jnp.zeros(())
    for name, (loss, weight) in losses.items():
        metrics[name] = jnp.mean(_per_image(name, loss, inputs))
        total = total + weight * metrics[name]
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


def _check_losses(losses, template: Classifier, attacked: bool, anchored: bool) -> None:
    """Calls every loss on shapes only, so that a wrong one fails before anything is compiled."""
    if not losses:
        raise ValueError("there is nothing to minimise: losses is empty")
    batch = 8
    features = jax.ShapeDtypeStruct((batch, template.encoder.dim), jnp.float32)
    outputs = Outputs(
        features=features, logits=jax.ShapeDtypeStruct((batch, template.num_classes), jnp.float32)
    )
    inputs = LossInputs(
        labels=jax.ShapeDtypeStruct((batch,), jnp.int32),
        clean=outputs,
        adversarial=outputs if attacked else None,
        pretrained=Outputs(features=features) if anchored else None,
    )
    for name, (loss, _) in losses.items():
        jax.eval_shape(functools.partial(_per_image, name, loss), inputs)


def _accuracies(inputs: LossInputs) -> dict[str, jax.Array]:
    def accuracy(outputs):
        return jnp.mean(jnp.argmax(outputs.logits, axis=-1) == inputs.labels)

    found = {"clean_accuracy": accuracy(inputs.clean)}
    return (
        found
        if inputs.adversarial is None
        else found | {"robust_accuracy": accuracy(inputs.adversarial)}
    )
