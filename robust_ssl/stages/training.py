"""The loop that every training stage shares: resumable, logged, stoppable, never waiting."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from robust_ssl.checkpoints import StageDirectory
from robust_ssl.data import Batches
from robust_ssl.data.batches import take
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress, Stopped, stop_requested
from robust_ssl.types import TrainState, Variables
from robust_ssl.updates import raise_if_stuck

_AHEAD = 3  # steps that may be in flight before the loop waits for the oldest


def stage_key(seed: int, stage: str) -> jax.Array:
    """Returns the random key of a stage: a function of the run's seed and the stage's name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


@struct.dataclass
class Best:
    """The best epoch so far, by validation.

    Attributes:
      variables: Its weights.
      score: Its score, float32 scalar; -1 before the first epoch.
      epoch: Its number, from 1, int32 scalar.
    """

    variables: Variables
    score: jax.Array
    epoch: jax.Array

    @classmethod
    def none_yet(cls, variables: Variables) -> Best:
        """Returns what any epoch is better than."""
        return cls(variables, jnp.asarray(-1.0, jnp.float32), jnp.asarray(0, jnp.int32))


def train(
    stage: StageDirectory,
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
    batches: Batches,
    *,
    epochs: int,
    parallel: Parallel,
    progress: Progress,
    checkpoint_every: int | None = None,
    at_epoch_end: Callable[[int, Variables], Mapping[str, float]] | None = None,
    score: str | None = None,
    loop_on_device: bool | None = None,
) -> tuple[TrainState, Best | None]:
    """Trains from the stage's newest checkpoint to its end.

    Args:
      stage: Where checkpoints and metrics go.
      state: The state before the first step.
      step: The function of one device's part, for `Parallel.compile`.
      batches: The batch of each step.
      epochs: Passes over the training set.
      parallel: The devices.
      progress: Shows how far it is.
      checkpoint_every: Steps between checkpoints; None is once an epoch.  With steps in a loop on
        the devices, the nearest smaller number that fits an epoch.
      at_epoch_end: Called with the number of finished epochs and the variables; what it returns
        is logged.
      score: Which entry of that decides the best epoch; None keeps none.
      loop_on_device: Whether the steps up to the next checkpoint or epoch's end are one compiled
        scan; None: on accelerators, where the data lie on the device.

    Returns:
      The state after the last step, and the best epoch (None without `score`).

    Raises:
      Stopped: If a stop was asked for; the state has been saved.
      FloatingPointError: If too many updates in a row were not finite.
    """
    total = epochs * batches.steps_per_epoch
    every = checkpoint_every or batches.steps_per_epoch
    kept = {"state": state} | ({"best": Best.none_yet(state.variables)} if score else {})
    kept = parallel.replicate(kept)
    first, kept = stage.restore_latest(kept) or (0, kept)
    advance, looped = _advance(step, batches, parallel, loop_on_device)
    if looped:
        every = _fitting(every, batches.steps_per_epoch)
    in_flight: collections.deque = collections.deque()
    unwritten: list[tuple[int, int, Mapping[str, Any], Mapping[str, Any]]] = []
    done = first
    with progress.stage(stage.path.name, total, batches.batch_size, first) as bar:
        while done < total:
            start, done = done, done + 1
            if looped:
                done = _next_stop(start, every, batches.steps_per_epoch)
            state, metrics = advance(kept["state"], start, done - start)
            kept, extra = {**kept, "state": state}, {}
            in_flight.append(metrics["loss"])
            if len(in_flight) > _AHEAD:
                jax.block_until_ready(in_flight.popleft())
            bar.update(done, loss=metrics["loss"][-1] if looped else metrics["loss"])
            epoch_ends = done % batches.steps_per_epoch == 0
            if epoch_ends:
                epoch = done // batches.steps_per_epoch
                measured = at_epoch_end(epoch, state.variables) if at_epoch_end else {}
                extra = {"epoch": epoch, **measured}
                kept = _keep_best(kept, measured.get(score), epoch, parallel)
            unwritten.append((start, done, metrics, extra))
            stopping = stop_requested()
            saving = stopping or done % every == 0
            if saving or epoch_ends:
                _write(stage, unwritten)
                raise_if_stuck(state)
            if saving and done < total:
                stage.save(done, kept)
            if stopping and done < total:
                stage.wait()
                raise Stopped(f"{stage.path.name} stopped after step {done} of {total}")
    batches.close()
    return kept["state"], kept.get("best")


def _fitting(every: int, steps_per_epoch: int) -> int:
    """The longest interval up to `every` with which all loops have one length: one program."""
    if every >= steps_per_epoch:
        return every - every % steps_per_epoch
    return max(d for d in range(1, every + 1) if steps_per_epoch % d == 0)


def _next_stop(step: int, *intervals: int) -> int:
    """The first step after `step` that is a multiple of one of the intervals."""
    return min((step // interval + 1) * interval for interval in intervals)


def _advance(
    step: Callable, batches: Batches, parallel: Parallel, loop_on_device: bool | None
) -> tuple[Callable, bool]:
    """Returns ``(state, first, count) -> (state, metrics)`` and whether it loops on the devices.

    On accelerators many steps are one program, a scan over data that lie on the device; metrics
    then have an axis of steps.  On CPU a step is a program of its own, because XLA compiles
    convolutions in a loop to slow code there.
    """
    if loop_on_device is None:
        loop_on_device = batches.resident and parallel.devices[0].platform != "cpu"
    if loop_on_device and not batches.resident:
        raise ValueError(
            "loop_on_device needs a set that lies on the devices, and this one is read in a "
            "stream; leave it None"
        )
    if not loop_on_device:
        compiled = parallel.compile(step)
        return lambda state, first, count: compiled(state, batches(first)), False

    def loop(state, order, resident_set):
        def one(state, rows):
            batch = take(resident_set, rows)
            return step(state, {**batch, "indices": order["indices"], "rows": rows})

        return jax.lax.scan(one, state, order["rows"].T)

    compiled = parallel.compile(loop, constants=batches.resident_set)
    return lambda state, first, count: compiled(state, batches.rows(first, count)), True


def _keep_best(kept: dict, score: float | None, epoch: int, parallel: Parallel) -> dict:
    # `>=`: of equal epochs the later one, which has seen more.
    if score is None or score < float(kept["best"].score):
        return kept
    scalars = {"score": jnp.asarray(score, jnp.float32), "epoch": jnp.asarray(epoch, jnp.int32)}
    best = Best(variables=kept["state"].variables, **parallel.replicate(scalars))
    return {**kept, "best": best}


def _write(stage: StageDirectory, unwritten: list) -> None:
    for start, done, metrics, extra in unwritten:
        values = {name: np.asarray(value).reshape(-1) for name, value in metrics.items()}
        for index in range(start, done):
            line = {name: value[index - start].item() for name, value in values.items()}
            stage.log(index, **line, **(extra if index == done - 1 else {}))
    unwritten.clear()
