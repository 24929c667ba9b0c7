"""The loop that every training stage shares: resumable, logged, stoppable, never waiting."""

from __future__ import annotations

import collections
import contextlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.data import Batches
from robust_ssl.data.batches import take
from robust_ssl.evaluation.counts import independent_difference
from robust_ssl.finetuning import Computation, Step
from robust_ssl.optimizers.finite import raise_if_stuck
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.types import TrainState, Variables
from robust_ssl.workdir import StageDirectory

MOST_TRIES = 3  # that may end without one finite update since the one before
_AHEAD = 3  # steps that may be in flight before the loop waits for the oldest


def stage_key(seed: int, stage: str) -> jax.Array:
    """Returns the random key of a stage: a function of the run's seed and the stage's name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


@struct.dataclass
class Best:
    """The epoch that is kept so far, by validation.

    Attributes:
      variables: Its weights.
      score: Its score, float32 scalar; -1 before the first epoch.
      epoch: Its number, from 1, int32 scalar.
      highest: The highest score of all epochs so far, float32 scalar.
    """

    variables: Variables
    score: jax.Array
    epoch: jax.Array
    highest: jax.Array

    @classmethod
    def none_yet(cls, variables: Variables) -> Best:
        """Returns what any epoch is better than."""
        none = jnp.asarray(-1.0, jnp.float32)
        return cls(variables, none, jnp.asarray(0, jnp.int32), none)


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
    images: int | None = None,
    patience: int | None = None,
    patience_from: float = 0,
    loop_on_device: bool | None = None,
) -> tuple[TrainState, Best | None]:
    """Trains from the stage's newest checkpoint to its end.

    Updates that are not finite are skipped and counted by the step.  Too many in a row end the
    training, with the last good state kept: the same command goes on from there with the batches
    that follow, and with its full limit again, up to `MOST_TRIES` times without a finite update.  A
    training of which more than half was skipped has not been done, and is not finished.

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
      score: Which entry of that decides the epoch that is kept; None keeps none.
      images: How many images it is a share of.  Then the latest epoch is kept that is not beyond
        chance below the highest score; None keeps the highest.
      patience: Stops after this many epochs whose score was not above all before; None never
        does.  What it needs is part of the checkpoint, so a resumed training stops at the same
        epoch.
      patience_from: Epochs that cost no patience, such as those of an attack whose budget grows.
      loop_on_device: Whether the steps up to the next checkpoint or epoch's end are one compiled
        scan; None: on accelerators, where the data lie on the device.

    Returns:
      The state after the last step, and the best epoch (None without `score`).  With `patience`
      the number of steps is the state's.

    Raises:
      ValueError: If `patience` is below 1 or there is no `score` to judge by.
      Stopped: If a stop was asked for; the state has been saved.
      FloatingPointError: If too many updates in a row were not finite (the message says where the
        last good state is kept), or more than half of all.
    """
    total = epochs * batches.steps_per_epoch
    every = checkpoint_every or batches.steps_per_epoch
    kept = parallel.replicate(_nothing_yet(state, score, patience))
    first, kept = stage.restore_latest(kept) or (0, kept)
    _raise_if_hopeless(stage, first)
    _raise_if_stuck(stage, first, total, kept, parallel)  # one that was so at its end still is
    advance, looped = _advance(step, batches, parallel, loop_on_device)
    if looped:
        every = _fitting(every, batches.steps_per_epoch)
    in_flight: collections.deque = collections.deque()
    unwritten: list[tuple[int, int, Mapping[str, Any], Mapping[str, Any]]] = []
    done = first
    shown = progress.stage(stage.path.name, total, batches.batch_size, first)
    # Closed when it is stopped, too: workers that read end before the process does.
    with contextlib.closing(batches), shown as bar:
        while done < total and not _lost_patience(kept, done, batches, patience, patience_from):
            start, done = done, done + 1
            if looped:
                done = _next_stop(start, every, batches.steps_per_epoch)
            try:
                state, metrics = advance(kept["state"], start, done - start)
            except _NoBatchAfterStopError:
                _write(stage, unwritten)
                _save_and_stop(stage, kept, start, total)
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
                kept = _keep_best(kept, measured.get(score), epoch, parallel, images)
            unwritten.append((start, done, metrics, extra))
            stopping = stop_requested()
            saving = stopping or done % every == 0
            if saving or epoch_ends:
                _write(stage, unwritten)
                _raise_if_stuck(stage, done, total, kept, parallel)
            if saving and not stopping and done < total:
                stage.save(done, kept)
            if stopping and done < total:
                _save_and_stop(stage, kept, done, total)
    _raise_if_mostly_skipped(kept["state"])
    return kept["state"], kept.get("best")


class _NoBatchAfterStopError(Exception):
    """A stop was asked for, and the signal has ended what reads the batches, too."""


def _save_and_stop(stage: StageDirectory, kept: dict, done: int, total: int) -> None:
    stage.save(done, kept)
    stage.wait()
    raise Stopped(f"{stage.path.name} stopped after step {done} of {total}")


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
    if not isinstance(step, Step):  # a plain function of (state, batch)
        step = Step(Computation(lambda state, batch, _, plain=step: plain(state, batch)), (), 0)
    if not loop_on_device:
        compiled = step.compiled(parallel)

        def one_step(state, first, count):
            try:
                batch = batches(first)
            except Exception as error:
                # One of several processes cannot save alone, nor count a point more than others.
                if jax.process_count() == 1 and stop_requested():
                    raise _NoBatchAfterStopError from error
                raise
            return compiled(state, batch)

        return one_step, False

    def loop(state, order, constants):
        def one(state, rows):
            batch = take(constants["set"], rows)
            batch = {**batch, "indices": order["indices"], "rows": rows}
            return step.function(state, batch, constants["settings"])

        return jax.lax.scan(one, state, order["rows"].T)

    constants = {"set": batches.resident_set, "settings": parallel.replicate(step.settings)}
    compiled = parallel.compile(loop, constants=constants)
    return lambda state, first, count: compiled(state, batches.rows(first, count)), True


def _nothing_yet(state: TrainState, score: str | None, patience: int | None) -> dict[str, Any]:
    """Returns all that a checkpoint holds, before the first step."""
    if patience is not None and (patience < 1 or score is None):
        raise ValueError(
            f"patience={patience} with score={score!r}: stopping early needs a patience of at "
            "least 1 epoch and a score to judge by"
        )
    kept: dict[str, Any] = {"state": state}
    if score is not None:
        kept["best"] = Best.none_yet(state.variables)
    if patience is not None:
        kept["improved"] = jnp.asarray(0, jnp.int32)  # the last epoch above all before it
    return kept


def _keep_best(
    kept: dict, score: float | None, epoch: int, parallel: Parallel, images: int | None
) -> dict:
    if score is None:
        return kept
    # In the precision that is kept: 0.8 would be below its own float32.
    score, before = np.float32(score), np.float32(kept["best"].highest)
    highest = parallel.replicate(jnp.asarray(max(score, before)))
    kept = {**kept, "best": kept["best"].replace(highest=highest)}
    if score < before and (images is None or _is_less(score, before, images)):
        return kept
    # Of equal epochs the later one, which has seen more; but it is no improvement.
    number = jnp.asarray(epoch, jnp.int32)
    scalars = parallel.replicate({"score": jnp.asarray(score), "epoch": number})
    kept["best"] = kept["best"].replace(variables=kept["state"].variables, **scalars)
    if "improved" in kept and score > before:
        kept["improved"] = parallel.replicate(number)
    return kept


def _is_less(score: np.float32, than: np.float32, images: int) -> bool:
    """Whether a share of so many images is below another beyond chance."""
    lower, higher = (round(float(share) * images) for share in (score, than))
    return independent_difference(higher, images, lower, images)[0] > 0


def _lost_patience(
    kept: dict, done: int, batches: Batches, patience: int | None, patience_from: float
) -> bool:
    """Whether training ends here; a function of what a checkpoint of this step holds."""
    epoch, steps = divmod(done, batches.steps_per_epoch)
    if patience is None or steps:
        return False
    return epoch - max(int(kept["improved"]), patience_from) >= patience


def _raise_if_stuck(
    stage: StageDirectory, done: int, total: int, kept: dict, parallel: Parallel
) -> None:
    """Raises if only updates that are not finite come, once the last good state is on disk."""
    state = kept["state"]
    try:
        raise_if_stuck(state)
    except FloatingPointError as error:
        stuck = FloatingPointError(
            f"{error}; the last good state is kept in {stage.checkpoints / str(done)}"
        )
        tries = _count_try(stage, done, int(state.counters["skipped"]))
        if done < total:  # who goes on from it has the full limit again
            if tries < MOST_TRIES:
                stuck.add_note("the same command goes on from there with the batches that follow")
            none = parallel.replicate(jnp.zeros((), jnp.int32))
            state = state.replace(counters={**state.counters, "skipped_in_a_row": none})
        stage.save(done, {**kept, "state": state})
        stage.wait()
        raise stuck from None


def _count_try(stage: StageDirectory, done: int, skipped: int) -> int:
    """Returns how many tries in a row ended stuck without a finite update between; keeps it."""
    before = stage.manifest.get("stuck") or {"tries": 0, "step": 0, "skipped": 0}
    if done > before["step"]:  # else it is the same end, seen again
        none_between = done - before["step"] == skipped - before["skipped"]
        tries = before["tries"] + 1 if none_between else 1
        stage.manifest["stuck"] = {"tries": tries, "step": done, "skipped": skipped}
    return stage.manifest["stuck"]["tries"]


def _raise_if_hopeless(stage: StageDirectory, first: int) -> None:
    stuck = stage.manifest.get("stuck")
    if stuck and stuck["step"] == first and stuck["tries"] >= MOST_TRIES:
        raise FloatingPointError(
            f"{stuck['tries']} tries ended without one finite update, the last at step {first}: "
            "the same command would end the same; lower the learning rate or the weight of the "
            f"loss that grows, or remove {stage.path} to begin again"
        )


def _raise_if_mostly_skipped(state: TrainState) -> None:
    steps, skipped = int(state.step), int(state.counters["skipped"])
    if 2 * skipped > steps:
        some = "all" if skipped == steps else f"{skipped} of"
        raise FloatingPointError(
            f"{some} its {steps} updates were skipped, as "
            f"{'none was' if skipped == steps else 'they were not'} finite: this is no training; "
            "lower the learning rate"
        )


def check_gradient(stage: StageDirectory) -> None:
    """Raises FloatingPointError for a training whose every update had a gradient of exactly 0.

    For the caller of `train`, who knows whether anything was to move.
    """
    norms = [line["gradient_norm"] for line in stage.metrics() if "gradient_norm" in line]
    if norms and all(norm == 0 for norm in norms):
        raise FloatingPointError(
            f"all its {len(norms)} updates had a gradient of exactly 0: the losses have no "
            "gradient, and nothing was trained; look for stop_gradient, NumPy and weights of 0"
        )


def _write(stage: StageDirectory, unwritten: list) -> None:
    for start, done, metrics, extra in unwritten:
        values = {name: np.asarray(value).reshape(-1) for name, value in metrics.items()}
        for index in range(start, done):
            line = {name: value[index - start].item() for name, value in values.items()}
            stage.log(index, **line, **(extra if index == done - 1 else {}))
    unwritten.clear()
