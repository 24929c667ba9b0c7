"""The loop that every training stage shares: resumable, logged, stoppable, never waiting."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from robust_ssl.checkpoints import StageDirectory
from robust_ssl.data import Batches
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress, Stopped, stop_requested
from robust_ssl.types import TrainState

_AHEAD = 3  # steps that may be in flight before the loop waits for the oldest


def stage_key(seed: int, stage: str) -> jax.Array:
    """Returns the random key of a stage: a function of the run's seed and the stage's name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


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
    at_epoch_end: Callable[[int, TrainState], Mapping[str, float]] | None = None,
) -> TrainState:
    """Trains from the stage's newest checkpoint to its end.

    Args:
      stage: Where checkpoints and metrics go.
      state: The state before the first step.
      step: The function of one device's part, for `Parallel.compile`.
      batches: The batch of each step.
      epochs: Passes over the training set.
      parallel: The devices.
      progress: Shows how far it is.
      checkpoint_every: Steps between checkpoints; None is once an epoch.
      at_epoch_end: Called with the epoch, from 0, and the state; what it returns is logged.

    Returns:
      The state after the last step.

    Raises:
      Stopped: If a stop was asked for; the state has been saved.
    """
    total = epochs * batches.steps_per_epoch
    state = parallel.replicate(state)
    restored = stage.restore_latest(state)
    first, state = restored or (0, state)
    compiled = parallel.compile(step)
    pending: collections.deque = collections.deque()
    unwritten: list[tuple[int, Mapping[str, jax.Array]]] = []
    with progress.stage(stage.path.name, total, batches.batch_size, first) as bar:
        for index in range(first, total):
            state, metrics = compiled(state, batches(index))
            unwritten.append((index, metrics))
            pending.append(metrics)
            if len(pending) > _AHEAD:
                jax.block_until_ready(pending.popleft())
            bar.update(index + 1, loss=metrics["loss"])
            done = index + 1
            epoch, inside = divmod(done, batches.steps_per_epoch)
            stopping = stop_requested() or stage.reached_preemption(done)
            if inside == 0:
                extra = at_epoch_end(epoch - 1, state) if at_epoch_end else {}
                unwritten[-1] = (index, {**metrics, "epoch": epoch, **extra})
            save_now = done % (checkpoint_every or batches.steps_per_epoch) == 0 or stopping
            if save_now or inside == 0:
                _write(stage, unwritten)
            if save_now and done < total:
                stage.save(done, state)
            if stopping and done < total:
                stage.wait()
                raise Stopped(f"{stage.path.name} stopped after step {done} of {total}")
    batches.close()
    return state


def _write(stage: StageDirectory, unwritten: list) -> None:
    for index, metrics in unwritten:
        stage.log(index, **{name: np.asarray(value).item() for name, value in metrics.items()})
    unwritten.clear()
