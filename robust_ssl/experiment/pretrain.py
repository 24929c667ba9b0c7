"""The `pretrain` stage: images without labels in, a public encoder out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_ssl import data, optimizers, pretraining, provenance, weights
from robust_ssl.build import text_of
from robust_ssl.experiment.context import Context, without_labels
from robust_ssl.experiment.features import features_of
from robust_ssl.experiment.loop import stage_key, train
from robust_ssl.experiment.sections import Monitor, Pretrain
from robust_ssl.parallel import Parallel
from robust_ssl.types import Encoder, Variables
from robust_ssl.workdir import StageDirectory, fingerprint

_log = logging.getLogger(__name__)
COLLAPSED = 0.1  # of `feature_std`, which is 1 for even directions and 0 for equal features


def build_optimizer(settings: Pretrain, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns the optimizer of a pre-training; see `optimizers.pretraining_optimizer`."""
    return optimizers.pretraining_optimizer(
        settings.optimizer,
        learning_rate=settings.learning_rate,
        total_steps=settings.epochs * steps_per_epoch,
        warmup_steps=int(settings.warmup_epochs * steps_per_epoch),
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        trust_coefficient=settings.trust_coefficient,
        clip=settings.clip,
    )


Labelled = tuple[np.ndarray, np.ndarray]  # features and labels, as `features_of` returns them


def check(context: Context) -> None:
    """Reads the images and traces a step.

    Raises:
      ValueError: With what is wrong and what to do.
    """
    settings = context.plan.pretrain
    context.check_unchanged("pretrain", settings)
    encoder = settings.encoder(jax.random.key(context.plan.seed))
    train_set, test_set = _splits(context, encoder)
    method = settings.method()
    needed = _labelled(train_set, test_set) or getattr(method, "needs_labels", False)
    for examples in (train_set, test_set):
        data.check_image_size(examples, encoder.image_size)
        if needed:
            data.check_classes(examples, train_set.num_classes)
    tx = build_optimizer(settings, data.steps_per_epoch(len(train_set), settings.batch_size))
    context.parallel.check_batch(settings.batch_size)
    _trace(settings, encoder, method, tx, train_set)


def _labelled(train_set, test_set) -> bool:
    """Whether accuracies can be measured; without labels the features alone are looked at."""
    return bool(train_set.class_names and test_set.class_names)


def _splits(context: Context, encoder: Encoder | None = None) -> list[Any]:
    """Returns train and test split, at the size of the encoder that is to be trained."""

    def load():
        settings = context.plan.pretrain
        whose = encoder or settings.encoder(jax.random.key(context.plan.seed))
        return [context.load_sized(settings.data, split, whose) for split in ("train", "test")]

    return context.once("pretrain data", load)


def _trace(
    settings: Pretrain,
    encoder: Encoder,
    method: pretraining.Method,
    tx: optax.GradientTransformation,
    train_set,
) -> None:
    """Traces two steps on shapes only, so that a method that does not fit fails before the first.

    Raises:
      ValueError: Whatever the method has against batch, encoder, accumulation or data.
    """
    size, count = encoder.image_size, settings.batch_size
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    batch = {
        "images": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8),
        "indices": numbers,
        "rows": numbers,
    }
    if train_set.num_classes:
        batch["labels"] = numbers
    key = jax.random.key(0)
    step = pretraining.make_step(
        encoder,
        method,
        tx,
        key=key,
        total_steps=1,
        steps_per_epoch=1,
        accumulate=settings.accumulate,
    )
    state = jax.eval_shape(
        lambda key: pretraining.init_state(key, encoder, method, tx, num_images=len(train_set)), key
    )
    try:
        jax.eval_shape(step, state, batch)
    except AssertionError as error:  # chex
        raise ValueError(str(error)) from error


def pretrain(context: Context) -> StageDirectory:
    """Pre-trains ``config.pretrain.encoder`` on ``config.pretrain.data`` and writes the encoder.

    Every few epochs the log gets the accuracies of k-NN and of a linear probe on a part of the
    images and, to show collapse, `feature_std` and `effective_rank` (with a warning below
    `COLLAPSED`); at the end both accuracies on all images.  Labels are used for this monitoring
    only (and by a method that needs them), and the test split's are in no decision.  Without labels
    there are no accuracies.

    Returns:
      The stage's directory; ``encoder/`` in it is what `robust_ssl.load_encoder` takes.
    """
    settings = context.plan.pretrain
    train_set, test_set = _splits(context)
    inputs = {"train": train_set.fingerprint(), "test": test_set.fingerprint()}
    with context.open("pretrain", settings, inputs, made="trained") as stage:
        if stage.done:
            return stage
        key = stage_key(context.plan.seed, "pretrain")
        encoder = settings.encoder(jax.random.fold_in(key, 0))
        data.check_image_size(train_set, encoder.image_size)
        method = settings.method()
        trained = _train(context, stage, encoder, method, train_set, test_set)
        builder, options = context.own_builder
        if builder is None:
            trained = _in_float32(trained)
        results = _probe(trained, train_set, test_set, context.parallel)
        random = _probe(encoder, train_set, test_set, context.parallel, linear=False)
        results |= {f"random_{name}": value for name, value in random.items()}
        _log.info("pretrain: %s", ", ".join(f"{k} {v:.4f}" for k, v in results.items()))
        weights.save_encoder(
            trained,
            stage.path / "encoder",
            card=_card(context, stage, results, trained, method, len(train_set)),
            builder=builder,
            options=options or None,
        )
        provenance.write_beside(stage.path / "encoder")
        stage.finish(results, identity=fingerprint(trained.variables))
    return stage


def _train(context: Context, stage, encoder: Encoder, method, train_set, test_set) -> Encoder:
    settings, key = context.plan.pretrain, stage_key(context.plan.seed, "pretrain")
    batches = data.Batches(
        train_set if getattr(method, "needs_labels", False) else without_labels(train_set),
        settings.batch_size,
        seed=context.plan.seed,
        stage="pretrain",
        parallel=context.parallel,
    )
    tx = build_optimizer(settings, batches.steps_per_epoch)
    state, _ = train(
        stage,
        pretraining.init_state(
            jax.random.fold_in(key, 1), encoder, method, tx, num_images=len(train_set)
        ),
        pretraining.make_step(
            encoder,
            method,
            tx,
            key=jax.random.fold_in(key, 2),
            total_steps=settings.epochs * batches.steps_per_epoch,
            steps_per_epoch=batches.steps_per_epoch,
            accumulate=settings.accumulate,
            axis_name=context.parallel.axis_name,
        ),
        batches,
        epochs=settings.epochs,
        parallel=context.parallel,
        progress=context.progress,
        checkpoint_every=settings.checkpoint_every,
        loop_on_device=settings.loop_on_device,
        at_epoch_end=functools.partial(
            _monitor, encoder, train_set, test_set, settings.monitor, context.parallel
        ),
    )
    if skipped := int(state.counters["skipped"]):
        _log.warning(
            "pretrain: %d of %d updates were not finite and were skipped", skipped, int(state.step)
        )
    return pretraining.trained_encoder(encoder, jax.device_get(state.variables))


def _in_float32(encoder: Encoder) -> Encoder:
    """The same weights, computed with in float32 from here on, whatever training computed in.

    Pixels near 1 are 1/256 apart in bfloat16, half of an attack's usual step: what is attacked and
    scored is not left to it.
    """
    return encoder.replace(module=encoder.module.clone(dtype=jnp.dtype("float32")))


def _card(
    context: Context,
    stage: StageDirectory,
    results: Mapping[str, float],
    encoder: Encoder,
    method: Any,
    num_images: int,
) -> dict[str, Any]:
    devices = context.parallel.devices
    return {
        **results,
        "config": text_of(context.plan.pretrain),
        "devices": stage.manifest["devices"],
        "hardware": f"{len(devices)} x {_kind(devices[0])}",
        "images": num_images,
        "labels_used": bool(getattr(method, "needs_labels", False)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(encoder.variables["params"])),
        "seconds": round(stage.seconds, 1),
        "seed": context.plan.seed,
        "versions": stage.manifest["versions"],
    }


def _kind(device: jax.Device) -> str:
    return "CPU core" if device.platform == "cpu" else device.device_kind


def _monitor(
    encoder: Encoder,
    train_set,
    test_set,
    monitor: Monitor,
    parallel: Parallel,
    epoch: int,
    variables: Variables,
) -> dict[str, float]:
    if epoch % monitor.every_epochs:
        return {}
    trained = pretraining.trained_encoder(encoder, jax.device_get(variables))
    bank, queries = (s.subset(min(monitor.images, len(s))) for s in (train_set, test_set))
    scored = features_of(trained, queries, parallel)
    results = _spread(scored[0])
    if _labelled(train_set, test_set):
        results = _accuracies(features_of(trained, bank, parallel), scored) | results
    _log.info("epoch %d: %s", epoch, {name: round(v, 4) for name, v in results.items()})
    if not results["feature_std"] >= COLLAPSED:  # NaN too
        _log.warning(
            "epoch %d: the features of all images are nearly equal (feature_std %.3f, below %.1f): "
            "collapsed; a lower learning rate or a larger batch is what usually helps",
            *(epoch, results["feature_std"], COLLAPSED),
        )
    return results


def _probe(
    encoder: Encoder, train_set, test_set, parallel: Parallel, *, linear: bool = True
) -> dict[str, float]:
    scored = features_of(encoder, test_set, parallel)
    if not _labelled(train_set, test_set):
        return _spread(scored[0])
    return _accuracies(features_of(encoder, train_set, parallel), scored, linear=linear)


def _accuracies(fitted: Labelled, scored: Labelled, *, linear: bool = True) -> dict[str, float]:
    """Returns the accuracies on features of one split by those of another."""
    results = {"knn_accuracy": pretraining.knn_accuracy(*fitted, *scored)}
    if linear:
        results["linear_accuracy"] = pretraining.linear_accuracy(*fitted, *scored)
    return results


def _spread(features: np.ndarray) -> dict[str, float]:
    """Returns what tells collapse, without labels."""
    features = jnp.asarray(features)
    return {
        "feature_std": float(pretraining.feature_std(features)),
        "effective_rank": float(pretraining.effective_rank(features)),
    }
