"""The `pretrain` stage: images without labels in, a public encoder out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_ssl import checkpoints, data, pretraining, weights
from robust_ssl.build import resolve
from robust_ssl.parallel import Parallel
from robust_ssl.stages.run import Run, build_encoder, own_builder, without_labels
from robust_ssl.stages.training import stage_key, train
from robust_ssl.types import Encoder, Variables

_log = logging.getLogger(__name__)
COLLAPSED = 0.1  # of `feature_std`, which is 1 for even directions and 0 for equal features


def optimizer(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.02,  # solo-learn, CIFAR
    clip: bool = True,  # solo-learn, CIFAR (all methods but VIbCReg)
) -> optax.GradientTransformation:
    """Returns SGD with momentum, LARS, Adam or AdamW under a cosine schedule with linear warm-up.

    Args:
      name: ``"sgd"``, ``"lars"``, ``"adam"`` or ``"adamw"``.
      learning_rate: At the schedule's peak.
      total_steps: Where the cosine reaches zero.
      warmup_steps: How long the rate rises linearly from zero.
      weight_decay: Of kernels only; biases and norms have none.
      momentum: Of SGD and LARS.
      trust_coefficient: LARS: how large a kernel's update may be against the kernel.
      clip: LARS: whether a kernel never moves further than SGD would move it.

    Raises:
      ValueError: If the name is not known.

    Example:
      >>> tx = optimizer("sgd", learning_rate=0.1, total_steps=10, warmup_steps=1,
      ...                weight_decay=0.0)
      >>> tx.init({"w": jnp.zeros(2)}) is not None
      True
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, total_steps)
    kernels = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, kernels),
            optax.sgd(schedule, momentum=momentum),
        )
    if name == "lars":
        return optax.chain(
            _scale_by_trust(schedule, weight_decay, trust_coefficient, clip, kernels),
            optax.trace(momentum),
            optax.scale_by_learning_rate(schedule),
        )
    if name == "adam":  # decay inside the gradient, as in torch
        return optax.chain(optax.add_decayed_weights(weight_decay, kernels), optax.adam(schedule))
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=weight_decay, mask=kernels)
    raise ValueError(f"optimizer must be 'sgd', 'lars', 'adam' or 'adamw', got {name!r}")


def _scale_by_trust(
    schedule: optax.Schedule,
    weight_decay: float,
    trust_coefficient: float,
    clip: bool,
    kernels: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """LARS as solo-learn has it, which `optax.lars` is not: clipped, and still where nothing pulls.

    A kernel's gradient, decay added, is scaled so that a step of the learning rate moves it by
    ``trust_coefficient`` times its length, or by less where plain SGD would.

    References:
      You et al., "Large Batch Training of Convolutional Networks", 2017, Algorithm 1.
    """

    def update(gradients, count, params):
        rate = schedule(count)

        def one(gradient, kernel, is_kernel):
            if not is_kernel:
                return gradient
            length, pull = optax.tree.norm(kernel), optax.tree.norm(gradient)
            ratio = trust_coefficient * length / (pull + weight_decay * length + 1e-8)
            if clip:
                ratio = jnp.minimum(ratio / jnp.maximum(rate, 1e-12), 1.0)
            scaled = ratio * (gradient + weight_decay * kernel)
            return jnp.where((length > 0) & (pull > 0), scaled, gradient)

        return jax.tree.map(one, gradients, params, kernels(params)), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def _extract(encoder: Encoder, batch: Mapping[str, jax.Array]) -> jax.Array:
    return encoder(batch["images"].astype(jnp.float32) / 255.0).features


@functools.lru_cache(maxsize=4)
def _extractor(parallel: Parallel):
    return parallel.map(_extract)


def features_of(
    encoder: Encoder, examples, parallel: Parallel, batch_size: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole split's features in evaluation mode, ``[n, dim]``, and labels ``[n]``."""
    extract = _extractor(parallel)
    features, labels = [], []
    for batch in data.epoch_batches(examples, batch_size):
        features.append(extract(encoder, {"images": batch["images"]}))
        labels.append(batch["labels"])
    return np.concatenate(features), np.concatenate(labels)


def build_optimizer(
    config: Mapping[str, Any], steps_per_epoch: int
) -> optax.GradientTransformation:
    """Returns what ``config.pretrain`` asks for; see `optimizer`.

    Raises:
      ValueError: If there is no epoch, or nothing left of them after the warm-up.
    """
    epochs, warmup = config["epochs"], config["warmup_epochs"]
    if epochs < 1 or not 0 <= warmup < epochs:
        raise ValueError(
            f"epochs={epochs} and warmup_epochs={warmup}: at least one epoch, and a warm-up that "
            "ends before the training"
        )
    return optimizer(
        config["optimizer"],
        learning_rate=config["learning_rate"],
        total_steps=config["epochs"] * steps_per_epoch,
        warmup_steps=int(config["warmup_epochs"] * steps_per_epoch),
        weight_decay=config["weight_decay"],
        **config.get("optimizer_options", {}),
    )


def check_step(
    config: Mapping[str, Any],
    encoder: Encoder,
    method: pretraining.Method,
    tx: optax.GradientTransformation,
    train_set,
) -> None:
    """Traces two steps on shapes only, so that a method that does not fit fails before the first.

    Raises:
      ValueError: Whatever the method has against batch, encoder, accumulation or data.
    """
    size, count = encoder.image_size, config["batch_size"]
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
        accumulate=config.get("accumulate", 1),
    )
    state = jax.eval_shape(
        lambda key: pretraining.init_state(key, encoder, method, tx, num_images=len(train_set)), key
    )
    try:
        jax.eval_shape(step, state, batch)
    except AssertionError as error:  # chex
        raise ValueError(str(error)) from error


def pretrain(run: Run) -> checkpoints.StageDirectory:
    """Pre-trains ``config.pretrain.encoder`` on ``config.pretrain.data`` and writes the encoder.

    Every few epochs the log gets the accuracies of k-NN and of a linear probe on a part of the
    images and, to show collapse, `feature_std` and `effective_rank` (with a warning below
    `COLLAPSED`); at the end both accuracies on all images.  Labels are used for this monitoring
    only (and by a method that needs them), and the test split's are in no decision.

    Returns:
      The stage's directory; ``encoder/`` in it is what `robust_ssl.load_encoder` takes.
    """
    config = run.config["pretrain"]
    train_set, test_set = (run.load(config["data"], split) for split in ("train", "test"))
    inputs = {"train": train_set.fingerprint(), "test": test_set.fingerprint()}
    with run.open("pretrain", config, inputs) as stage:
        if stage.done:
            return stage
        key = stage_key(run.seed, "pretrain")
        encoder = build_encoder(jax.random.fold_in(key, 0), config["encoder"])
        data.check_image_size(train_set, encoder.image_size)
        method = resolve(config["method"])(**config["method_options"])
        batches = data.Batches(
            train_set if getattr(method, "needs_labels", False) else without_labels(train_set),
            config["batch_size"],
            seed=run.seed,
            stage="pretrain",
            parallel=run.parallel,
        )
        tx = build_optimizer(config, batches.steps_per_epoch)
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
                total_steps=config["epochs"] * batches.steps_per_epoch,
                steps_per_epoch=batches.steps_per_epoch,
                accumulate=config.get("accumulate", 1),
                axis_name=run.parallel.axis_name,
            ),
            batches,
            epochs=config["epochs"],
            parallel=run.parallel,
            progress=run.progress,
            checkpoint_every=config["checkpoint_every"],
            loop_on_device=config.get("loop_on_device"),
            at_epoch_end=functools.partial(
                _monitor, encoder, train_set, test_set, config["monitor"], run.parallel
            ),
        )
        trained = pretraining.trained_encoder(encoder, jax.device_get(state.variables))
        if own_builder(config["encoder"]) is None:
            trained = _in_float32(trained)
        results = _probe(trained, train_set, test_set, run.parallel)
        random = _probe(encoder, train_set, test_set, run.parallel, linear=False)
        results["random_knn_accuracy"] = random["knn_accuracy"]
        _log.info("pretrain: %s", ", ".join(f"{k} {v:.4f}" for k, v in results.items()))
        weights.save_encoder(
            trained,
            stage.path / "encoder",
            card=_card(run, stage, results, trained, method, len(train_set)),
            builder=own_builder(config["encoder"]),
            options={k: v for k, v in config["encoder"].items() if k != "builder"},
        )
        stage.finish(trained.variables, results)
    return stage


def _in_float32(encoder: Encoder) -> Encoder:
    """The same weights, computed with in float32 from here on, whatever training computed in.

    Pixels near 1 are 1/256 apart in bfloat16, half of an attack's usual step: what is attacked and
    scored is not left to it.
    """
    return encoder.replace(module=encoder.module.clone(dtype=jnp.dtype("float32")))


def _card(
    run: Run,
    stage: checkpoints.StageDirectory,
    results: Mapping[str, float],
    encoder: Encoder,
    method: Any,
    num_images: int,
) -> dict[str, Any]:
    devices = run.parallel.devices
    return {
        **results,
        "config": run.config["pretrain"],
        "devices": stage.manifest["devices"],
        "hardware": f"{len(devices)} x {_kind(devices[0])}",
        "images": num_images,
        "labels_used": bool(getattr(method, "needs_labels", False)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(encoder.variables["params"])),
        "seconds": round(stage.seconds, 1),
        "seed": run.seed,
        "versions": stage.manifest["versions"],
    }


def _kind(device: jax.Device) -> str:
    return "CPU core" if device.platform == "cpu" else device.device_kind


def _monitor(
    encoder: Encoder,
    train_set,
    test_set,
    config: Mapping[str, Any],
    parallel: Parallel,
    epoch: int,
    variables: Variables,
) -> dict[str, float]:
    if epoch % config["every_epochs"]:
        return {}
    trained = pretraining.trained_encoder(encoder, jax.device_get(variables))
    bank, queries = (s.subset(min(config["images"], len(s))) for s in (train_set, test_set))
    known, asked = (features_of(trained, part, parallel) for part in (bank, queries))
    features = jnp.asarray(asked[0])
    results = {
        "knn_accuracy": pretraining.knn_accuracy(*known, *asked),
        "linear_accuracy": pretraining.linear_accuracy(*known, *asked),
        "feature_std": float(pretraining.feature_std(features)),
        "effective_rank": float(pretraining.effective_rank(features)),
    }
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
    fitted, scored = (features_of(encoder, part, parallel) for part in (train_set, test_set))
    results = {"knn_accuracy": pretraining.knn_accuracy(*fitted, *scored)}
    if linear:
        results["linear_accuracy"] = pretraining.linear_accuracy(*fitted, *scored)
    return results
