"""A batch that fits: the fewest parts in which a training step stays within a device's memory.

What a compiled step plans is known before it runs (`finetuning.planned_bytes`).  The choice is kept
in the recipe's directory, so that a resumed training has the same parts wherever it goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import disk, finetuning
from robust_ssl.experiment import features
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.recipe import AUTO, Recipe
from robust_ssl.parallel import everywhere, first_process
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory, WorkdirError

_log = logging.getLogger(__name__)

FILE = "parts.json"
SHARE = 0.9  # of a device's memory: libraries take some for themselves while a step runs
_MIB = 2**20

Build = Callable[[Context, Recipe], tuple[Any, Any]]  # -> (state, step)


def alone(context: Context) -> Context:
    """Returns the run with steps in which nothing is exchanged: those of one device's part."""
    return dataclasses.replace(context, parallel=dataclasses.replace(context.parallel, kind="jit"))


def batch_shapes(
    context: Context, recipe: Recipe, classifier: Classifier
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one device's part of a recipe's batch."""
    images, size = recipe.batch_size // len(context.parallel.devices), classifier.image_size
    numbers = jax.ShapeDtypeStruct((images,), jnp.int32)
    batch = {
        "images": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        **dict.fromkeys(("labels", "indices", "rows"), numbers),
    }
    if recipe.cache_features:
        batch["images"] = features.shapes(images, classifier.encoder.dim)
    return batch


def of_all(batch: Any, devices: int) -> Any:
    """Returns the shapes of a whole batch, from those of one device's part.

    Example:
      >>> of_all({"labels": jax.ShapeDtypeStruct((2,), "int32")}, 4)["labels"].shape
      (8,)
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((devices * x.shape[0], *x.shape[1:]), x.dtype), batch
    )


def planned(step: Any, state: Any, batch: Any) -> int | None:
    """Returns the memory that one device's step plans, bytes; None where the backend is silent."""
    function = jax.jit(functools.partial(step.function, settings=step.settings), donate_argnums=0)
    return finetuning.planned_bytes(function, state, batch)


def limit(context: Context, recipe: Recipe, beside: int = 0) -> int:
    """Returns how many bytes a recipe's step may plan on a device.

    Args:
      context: The run.
      recipe: Its ``step_bytes``; without it, `SHARE` of what the device says it has.
      beside: Bytes that lie there besides, a training set for one.

    Raises:
      ValueError: If neither is known.
    """
    if recipe.step_bytes is not None:
        return recipe.step_bytes
    own = (x for x in context.parallel.devices if x.process_index == jax.process_index())
    device = next(own)  # others' do not say what they have
    whole = (device.memory_stats() or {}).get("bytes_limit")
    if whole is None:
        raise ValueError(
            f'accumulate="auto": a {device.platform} device does not say how much memory it has; '
            "give step_bytes, what a step may plan, for example 8_000_000_000"
        )
    return int(SHARE * whole) - beside


def fewest_parts(
    images: int, bytes_of: Callable[[int], int | None], most: int
) -> tuple[int, int | None]:
    """Returns the smallest number of equal parts whose step fits, and what that step plans.

    Args:
      images: Of a device's batch; only its divisors are tried, from 1 up.
      bytes_of: What the step in so many parts plans, None where that is not known.
      most: Bytes that it may plan.

    Raises:
      ValueError: If none fits.

    Example:
      >>> fewest_parts(8, lambda parts: 100 + 800 // parts, 350)
      (4, 300)
    """
    tried: dict[int, int] = {}
    for parts in (n for n in range(1, images + 1) if images % n == 0):
        plan = bytes_of(parts)
        if plan is None or plan <= most:
            return parts, plan
        tried[parts] = plan
        _log.info("%d parts plan %d MiB, and %d fit", parts, plan // _MIB, most // _MIB)
    best = min(tried, key=tried.__getitem__)
    raise ValueError(
        f"a step plans {tried[1] // _MIB} MiB on a device, and in {best} parts "
        f"{tried[best] // _MIB} MiB; {most // _MIB} are there: take a smaller batch_size, remat, "
        "or more step_bytes"
    )


def with_parts(
    context: Context,
    stage: StageDirectory,
    recipe: Recipe,
    classifier: Classifier,
    resident: Iterable[jax.Array],
    build: Build,
) -> tuple[Recipe, dict[str, Any]]:
    """Returns a recipe whose number of parts is known, and what results say of it.

    Args:
      context: The run.
      stage: The recipe's directory, which keeps the choice.
      recipe: Any; only ``accumulate="auto"`` is decided on.
      classifier: What it starts from.
      resident: What lies on the devices besides.
      build: Makes the step of a recipe like this one, with a number of parts.

    Raises:
      ValueError: If no number of parts fits, or the network cannot be run in parts.
    """
    if recipe.accumulate != AUTO:
        return recipe, {}
    file = stage.path / FILE
    if everywhere(file.exists()):
        kept = _read(file, recipe.batch_size)
    else:
        kept = choose(context, recipe, classifier, resident, build)
        if jax.process_index() == 0:
            disk.replace(file, json.dumps(kept) + "\n")
    _log.info("%s: a batch of %d in %s", recipe.name, recipe.batch_size, _said(kept))
    return recipe.in_parts(kept["accumulate"]), {"batch_in_parts": kept}


def choose(
    context: Context,
    recipe: Recipe,
    classifier: Classifier,
    resident: Iterable[jax.Array],
    build: Build,
) -> dict[str, Any]:
    """Returns ``accumulate``, the ``step_bytes`` that this plans, and ``limit_bytes``.

    Arguments and errors are those of `with_parts`.
    """
    batch = batch_shapes(context, recipe, classifier)
    single = alone(context)
    most = limit(context, recipe, sum(array.nbytes for array in resident))

    def bytes_of(parts: int) -> int | None:
        state, step = build(single, recipe.in_parts(parts))
        return planned(step, state, batch)

    parts, plan = fewest_parts(batch["labels"].shape[0], bytes_of, most)
    parts = first_process([parts])[0]  # devices of several processes run one program
    return {"accumulate": parts, "step_bytes": plan, "limit_bytes": most}


def as_trained(recipe: Recipe, results: Mapping[str, Any]) -> Recipe:
    """Returns a recipe in as many parts as the results of its training say."""
    kept = results.get("batch_in_parts")
    return recipe if kept is None else recipe.in_parts(kept["accumulate"])


def _read(file: Any, batch_size: int) -> dict[str, Any]:
    kept = disk.read_json(file)
    parts = kept.get("accumulate") if isinstance(kept, dict) else None
    if not isinstance(parts, int) or parts < 1 or batch_size % parts:
        raise WorkdirError(
            f"{file} does not say in how many parts the batch was; remove its folder to train anew"
        )
    return kept


def _said(kept: Mapping[str, Any]) -> str:
    parts, plan = kept["accumulate"], kept["step_bytes"]
    many = "one part" if parts == 1 else f"{parts} parts"
    if plan is None:
        return f"{many}: nobody knows what the step plans"
    return f"{many}: {math.ceil(plan / _MIB)} of {kept['limit_bytes'] // _MIB} MiB"
