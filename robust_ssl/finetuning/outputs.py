"""The outputs that losses read: under one rule of batch statistics, and no others."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl.build import happened_in, resolve
from robust_ssl.finetuning.parts import in_parts
from robust_ssl.losses.inputs import advice
from robust_ssl.optimizers.finite import check_metrics
from robust_ssl.parallel import gather
from robust_ssl.types import Classifier, Encoder, Loss, LossInputs, Outputs, Variables

BATCH_STATISTICS = ("clean", "adversarial", "both", "frozen", "twins")
_MAY_BE_ABSENT = ("adversarial", "pretrained", "teacher")  # among what a loss gets
_BATCH = 8  # images of the batch of shapes on which losses are traced


def training_outputs(
    model: Classifier,
    key: jax.Array,
    batch_statistics: str,
    start_statistics: Variables | None,
    axis_name: str | None,
    parts: int,
    images: jax.Array,
    read: Set[str],
) -> tuple[Outputs, Variables | None]:
    """Returns outputs for the global batch and the new batch statistics (or None).

    The head runs on the gathered features: it is small, and its dropout then does not depend on
    how the batch is spread; that of an encoder does, as far as its random numbers go.  Clean and
    adversarial images share one key, so that dropout makes no difference between them.
    """
    encoder_key, head_key = jax.random.split(key)
    if axis_name is not None:  # one key for all would give each device's images the same dropout
        encoder_key = jax.random.fold_in(encoder_key, jax.lax.axis_index(axis_name))
    train = functools.partial(model.encoder.apply_train, key=encoder_key, axis_name=axis_name)
    if batch_statistics == "frozen":
        outputs, statistics = encoded(model.encoder, images, read, parts), None
    elif parts > 1:  # no batch norm: see `parts.check`
        outputs, statistics = encoded(lambda x: train(x)[0], images, read, parts), None
    elif batch_statistics == "twins":
        outputs, statistics = _twins(model.encoder, start_statistics, train, images)
    else:
        outputs, statistics = train(images)
    outputs = gather_outputs(outputs, read, axis_name)
    logits = model.head.apply(
        model.head_variables, outputs.features, train=True, rngs={"dropout": head_key}
    )
    return outputs.replace(logits=logits), statistics


def encoded(
    model: Callable[[jax.Array], Outputs], images: jax.Array, read: Set[str], parts: int
) -> Outputs:
    """Returns the outputs of a model, run on so many parts of the images in turn."""
    if parts == 1:
        return model(images)

    def run(part):
        outputs = model(part)
        # What is not read would lie in memory for the whole batch.
        return outputs.replace(taps={n: tap for n, tap in outputs.taps.items() if n in read})

    outputs = in_parts(run, parts, images)
    # A loss that takes "the second block" needs all names: where nothing is read, zeros will do.
    shapes = jax.eval_shape(model, images).taps
    taps = [(n, outputs.taps.get(n, jnp.zeros(s.shape, s.dtype))) for n, s in shapes.items()]
    return outputs.replace(taps=OrderedDict(taps))


def _twins(encoder: Encoder, start_statistics: Variables, train: Callable, images: jax.Array):
    """Runs even places on the statistics of their own batch, odd ones on those of the start."""
    if images.shape[0] % 2:
        raise ValueError(
            f'batch_statistics="twins" halves a batch: each device needs an even number of '
            f"images, got {images.shape[0]}"
        )
    adaptive, statistics = train(images[0::2])
    start = {**encoder.variables, "batch_stats": start_statistics["encoder"]}
    static = encoder.replace(variables=start)(images[1::2])

    def interleaved(a, b):
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(interleaved, adaptive, static), statistics


def gather_outputs(outputs: Outputs, read: Set[str], axis_name: str | None) -> Outputs:
    """Gathers the features, and those logits and taps that a loss reads, for the global batch.

    The others stay where they are: a loss that takes "the second block" needs all their names.
    """
    # In the order of the taps, not of the set: all processes must compile the same program, and
    # the second block is the second one.  JAX sorts a `dict`.
    taps = OrderedDict(outputs.taps)
    for name, tap in outputs.taps.items():
        if name in read:
            taps[name] = gather(tap, axis_name)
    logits = outputs.logits
    if logits is not None and "logits" in read:
        logits = gather(logits, axis_name)
    return Outputs(features=gather(outputs.features, axis_name), logits=logits, taps=taps)


def running_statistics(batch_statistics: str, clean, adversarial) -> Variables:
    """Chooses the new running statistics; empty where nothing changes."""
    if batch_statistics == "both":
        new = jax.tree.map(lambda a, b: (a + b) / 2, clean, adversarial)
    elif batch_statistics == "twins":
        new = clean if adversarial is None else adversarial
    else:
        new = {"clean": clean, "adversarial": adversarial}.get(batch_statistics)
    return {"batch_stats": {"encoder": new}} if new else {}


def functions_and_weights(
    losses: Mapping[str, tuple[Loss | str, float]],
) -> tuple[dict[str, Loss], dict[str, float]]:
    """Returns the losses and their weights, each by name; raises unless there is one of both."""
    functions: dict[str, Loss] = {}
    weights: dict[str, float] = {}
    for name, term in losses.items():
        if not (isinstance(term, tuple | list) and len(term) == 2):
            raise ValueError(f"the loss {name!r} must be (loss, weight), such as (loss, 1.0)")
        loss, weight = term
        functions[name] = resolve(loss)
        # As a float: with 6 among the weights of a sweep the program of 6.5 would be another one.
        weights[name] = float(weight)
        if not math.isfinite(weights[name]):
            raise ValueError(f"the weight of the loss {name!r} must be a number, got {weight}")
    return functions, weights


def loss_per_image(name: str, loss: Loss, inputs: LossInputs) -> jax.Array:
    """Calls a loss; raises with its name unless it returns one value per image."""
    absent = {n: advice(n) for n in _MAY_BE_ABSENT if getattr(inputs, n) is None}
    with happened_in(f"the loss {name!r}", absent):
        values = loss(inputs)
    shape = getattr(values, "shape", None)
    if shape != inputs.labels.shape:
        raise ValueError(
            f"the loss {name!r} must return one value per image, [batch] = {inputs.labels.shape}, "
            f"but returned {_returned(values)}"
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"the loss {name!r} must return floats, which have a gradient, but returned "
            f"{values.dtype}"
        )
    return values


def _returned(values: Any) -> str:
    """Says what came in place of a value per image, and why it may have."""
    shape = getattr(values, "shape", None)
    if shape is None:
        kind = type(values).__name__
        return f"a {kind}; a loss is a function of its inputs, or an instance that can be called"
    return f"shape {shape}" + ("; do not take the mean in it" if shape == () else "")


def outputs_read(
    losses: Mapping[str, Loss],
    template: Classifier,
    attacked: bool,
    pretrained: Encoder | None,
    teacher: Classifier | None = None,
) -> dict[str, set[str]]:
    """Returns what the losses read: ``"logits"``, ``"features"`` and taps of each output.

    Every loss is called on shapes only, so that a wrong one fails before anything is compiled.
    """
    if not losses:
        raise ValueError("there is nothing to minimize: losses is empty")
    check_metrics(losses, "losses")
    size = template.image_size
    images = jax.ShapeDtypeStruct((_BATCH, size, size, 3), jnp.float32)
    outputs = jax.eval_shape(template, images)
    inputs = LossInputs(
        labels=jax.ShapeDtypeStruct((_BATCH,), jnp.int32),
        clean=outputs,
        adversarial=outputs if attacked else None,
        pretrained=None if pretrained is None else jax.eval_shape(pretrained, images),
        teacher=None if teacher is None else jax.eval_shape(teacher, images),
    )
    names = ("clean", "adversarial", "pretrained", "teacher")
    read: dict[str, set[str]] = {name: set() for name in names}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(inputs)[0]]
    # A loss reads what is an operand of its traced program, or its result.
    for name, loss in losses.items():
        program = jax.make_jaxpr(functools.partial(loss_per_image, name, loss))(inputs).jaxpr
        for (output, *rest), is_used in zip(paths, _used(program), strict=True):
            if rest and is_used:
                read[output.name].add(_output_name(rest))
    return read


def _used(program: Any) -> list[bool]:
    """Returns which arguments of a traced program it looks at, in programs that it calls too."""
    used = {id(v) for v in program.outvars}
    for equation in program.eqns:
        inner = equation.params.get("jaxpr")
        inner = getattr(inner, "jaxpr", inner)  # one that has its constants is a pair
        alike = inner is not None and len(inner.invars) == len(equation.invars)
        looked_at = _used(inner) if alike else [True] * len(equation.invars)
        used |= {id(v) for v, is_used in zip(equation.invars, looked_at, strict=True) if is_used}
    return [id(variable) in used for variable in program.invars]


def _output_name(path) -> str:
    """``"logits"`` of ``.logits``, ``"stage1/block1"`` of ``.taps["stage1/block1"]``."""
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))


def accuracies(inputs: LossInputs, read: Mapping[str, Set[str]]) -> dict[str, jax.Array]:
    """Returns the accuracies of those outputs whose logits a loss reads; others cost a pass."""
    names = {"clean_accuracy": "clean", "robust_accuracy": "adversarial"}
    return {
        name: jnp.mean(jnp.argmax(getattr(inputs, which).logits, axis=-1) == inputs.labels)
        for name, which in names.items()
        if "logits" in read[which]
    }
