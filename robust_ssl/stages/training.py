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
from robust_ssl.finetuning import raise_if_stuck
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress, Stopped, stop_requested
from robust_ssl.types import TrainState, Variables

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
      checkpoint_every: Steps between checkpoints; None is once an epoch.
      at_epoch_end: Called with the number of finished epochs and the variables; what it returns
        is logged.
      score: Which entry of that decides the best epoch; None keeps none.

    Returns:
      The state after the last step, and the best epoch (None without `score`).

    Raises:
      Stopped: If a stop was asked for; the state has been saved.
      FloatingPointError: If too many updates in a row were not finite.
    """
    total = epochs * batches.steps_per_epoch
    kept = {"state": state} | ({"best": Best.none_yet(state.variables)} if score else {})
    kept = parallel.replicate(kept)
    first, kept = stage.restore_latest(kept) or (0, kept)
    compiled = parallel.compile(step)
    in_flight: collections.deque = collections.deque()
    unwritten: list[tuple[int, Mapping[str, Any]]] = []
    with progress.stage(stage.path.name, total, batches.batch_size, first) as bar:
        for index in range(first, total):
            state, metrics = compiled(kept["state"], batches(index))
            kept = {**kept, "state": state}
            in_flight.append(metrics["loss"])
            if len(in_flight) > _AHEAD:
                jax.block_until_ready(in_flight.popleft())
            bar.update(index + 1, loss=metrics["loss"])
            done, epoch_ends = index + 1, (index + 1) % batches.steps_per_epoch == 0
            if epoch_ends:
                epoch = done // batches.steps_per_epoch
                extra = at_epoch_end(epoch, state.variables) if at_epoch_end else {}
                metrics = {**metrics, "epoch": epoch, **extra}
                kept = _keep_best(kept, extra.get(score), epoch, parallel)
            unwritten.append((index, metrics))
            stopping = stop_requested() or stage.reached_preemption(done)
            saving = stopping or done % (checkpoint_every or batches.steps_per_epoch) == 0
            if saving or epoch_ends:
                _write(stage, unwritten)
                if "skipped_in_a_row" in state.counters:
                    raise_if_stuck(state)
            if saving and done < total:
                stage.save(done, kept)
            if stopping and done < total:
                stage.wait()
                raise Stopped(f"{stage.path.name} stopped after step {done} of {total}")
    batches.close()
    return kept["state"], kept.get("best")


def _keep_best(kept: dict, score: float | None, epoch: int, parallel: Parallel) -> dict:
    # `>=`: of equal epochs the later one, which has seen more.
    if score is None or score < float(kept["best"].score):
        return kept
    scalars = {"score": jnp.asarray(score, jnp.float32), "epoch": jnp.asarray(epoch, jnp.int32)}
    best = Best(variables=kept["state"].variables, **parallel.replicate(scalars))
    return {**kept, "best": best}


def _write(stage: StageDirectory, unwritten: list) -> None:
    for index, metrics in unwritten:
        stage.log(index, **{name: np.asarray(value).item() for name, value in metrics.items()})
    unwritten.clear()
