"""Batches that are functions of (seed, stage, step), so that a resumed run sees the same ones."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.data.examples import Examples
from robust_ssl.data.order import permutation
from robust_ssl.data.streamed import StreamedExamples
from robust_ssl.data.workers import read_in_processes
from robust_ssl.parallel import Parallel, prefetch

RESIDENT_LIMIT = 2 * 2**30  # bytes of uint8 pixels that may lie on a device


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Returns how many whole batches `n` examples make; the rest is dropped.

    Raises:
      ValueError: If not even one.

    Example:
      >>> steps_per_epoch(10, 4)
      2
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > n:
        raise ValueError(
            f"a batch of {batch_size} is larger than the set of {n} examples; take batch_size "
            f"<= {n}, or more data"
        )
    return n // batch_size


def batch_indices(n: int, batch_size: int, *, seed: int, stage: str, step: int) -> np.ndarray:
    """Returns which examples make the batch of a step.

    Every epoch, ``n // batch_size`` steps, has a random order of its own, from a counter-based
    generator keyed by (seed, stage, epoch): no state, so any step can be asked for at any time.

    Args:
      n: Number of examples.
      batch_size: Size of the global batch.
      seed: The run's seed.
      stage: Name of the stage; stages with the same seed see different orders.
      step: Number of the step, from 0.

    Returns:
      int64 ``[batch_size]``, no number twice, and none twice in an epoch.

    Raises:
      ValueError: If the batch is larger than the set, or `step` or `seed` is negative.

    Example:
      >>> both = [batch_indices(4, 2, seed=0, stage="finetune", step=step) for step in (0, 1)]
      >>> np.sort(np.concatenate(both)).tolist()
      [0, 1, 2, 3]
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    epoch, position = divmod(int(step), steps_per_epoch(n, batch_size))
    order = _epoch_order(n, seed, stage, epoch)
    return order[position * batch_size : (position + 1) * batch_size]


# Sorted once an epoch instead of once a step.
@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    order = permutation(n, seed, stage, epoch)
    order.flags.writeable = False  # every caller gets the same array
    return order


def take(resident_set: Mapping[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    """Returns the images, and labels if there are any, of some rows of a resident set."""
    return {key: jnp.take(x, rows, axis=0, mode="clip") for key, x in resident_set.items()}


@functools.lru_cache(maxsize=8)
def _gatherer(sharding):
    """One compiled gather per layout: each device takes its own part out of its own copy."""
    return jax.jit(take, out_shardings=sharding)


class Batches:
    """The training batches of a stage, on the devices.

    ``batches(step)`` returns ``{"images": uint8 [batch, H, W, 3], "labels": int32 [batch],
    "indices": int32 [batch], "rows": int32 [batch]}``, spread over the devices; ``indices`` is the
    image's place in the global batch, from which its random key is made, and ``rows`` its place
    in the set.  A set without labels has no ``labels``.

    A small set lies whole on every device, and a step sends only row numbers there; a large one
    is read on the host in a thread that runs ahead, or by ``examples.workers`` processes; fastest
    if steps are asked for in order.  Of several processes each reads what its own devices get.
    Either way, and on any number of devices, the batch of a step is the same.

    Args:
      examples: The training examples.
      batch_size: Size of the global batch.
      seed: The run's seed.
      stage: Name of the stage.
      parallel: The devices.
      resident: Whether the set lies on the devices; None decides by size, up to 2 GiB.
      ahead: How many batches the reading thread prepares.
      replays: How many steps in a row see the same batch; an epoch has as many times more steps.

    Raises:
      ValueError: If the batch is larger than the set or does not divide over the devices, or
        `ahead` or `replays` is below 1.

    Example:
      >>> from robust_ssl import data
      >>> from robust_ssl.parallel import Parallel
      >>> examples = data.from_arrays(np.zeros((8, 4, 4, 3), np.uint8), np.arange(8))
      >>> batches = data.Batches(
      ...     examples, 4, seed=0, stage="finetune", parallel=Parallel.create(num_devices=2)
      ... )
      >>> batches(0)["images"].shape, batches.steps_per_epoch
      ((4, 4, 4, 3), 2)
    """

    def __init__(
        self,
        examples: Examples | StreamedExamples,
        batch_size: int,
        *,
        seed: int,
        stage: str,
        parallel: Parallel,
        resident: bool | None = None,
        ahead: int = 2,
        replays: int = 1,
    ):
        for name, count in (("ahead", ahead), ("replays", replays)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.steps_per_epoch = steps_per_epoch(len(examples), batch_size) * replays
        parallel.check_batch(batch_size)
        self.batch_size = batch_size
        # A replayed batch is the same function of an earlier step: still no state.
        self._order = lambda step: batch_indices(
            len(examples), batch_size, seed=seed, stage=stage, step=step // replays
        )
        self._parallel = parallel
        # Put once; every batch has the same places.
        self._places = parallel.put(np.arange(batch_size, dtype=np.int32))
        self._examples, self._ahead = examples, ahead
        self.resident_set: dict[str, jax.Array] | None = None
        self._stream, self._next_step = None, None
        if resident is None:
            resident = (
                isinstance(examples, Examples)
                and _resident_bytes(examples, parallel) <= RESIDENT_LIMIT
            )
        if resident:
            if isinstance(examples, StreamedExamples):
                examples = examples.in_memory()
            whole = {"images": examples.images}
            if examples.labels is not None:
                whole["labels"] = examples.labels
            # Whole on each device, so that a step's gather needs no communication.
            self.resident_set = parallel.replicate(whole)

    @property
    def resident(self) -> bool:
        """Whether the whole set lies on the devices, as `resident_set`."""
        return self.resident_set is not None

    def rows(self, first: int, count: int) -> dict[str, jax.Array]:
        """Returns which images make the batches of `count` steps, for a loop on the devices.

        Returns:
          ``{"rows": int32 [batch, count], "indices": int32 [batch]}``; see `take`.
        """
        order = [self._order(step=first + offset) for offset in range(count)]
        rows = self._parallel.put(np.stack(order, axis=1).astype(np.int32))
        return {"rows": rows, "indices": self._places}

    def __call__(self, step: int) -> dict[str, jax.Array]:
        """Returns the batch of a step, a Python int from 0."""
        if self.resident:
            rows = self._parallel.put(self._order(step=step).astype(np.int32))
            batch = {**_gatherer(self._places.sharding)(self.resident_set, rows), "rows": rows}
        else:
            batch = self._read_ahead(step)
        return {**batch, "indices": self._places}

    batch = __call__

    def _read_ahead(self, step: int) -> dict[str, jax.Array]:
        if self._stream is None or step != self._next_step:
            self.close()
            read = _host_batches(self._examples, self._order, self._parallel, step)
            self._stream = prefetch(read, self._ahead)
        self._next_step = None  # after an error the next call starts anew
        batch = next(self._stream)
        self._next_step = step + 1
        return batch

    def close(self) -> None:
        """Stops the reading thread, if there is one; the next call starts it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _host_batches(examples, order, parallel, first: int) -> Iterator[dict[str, jax.Array]]:
    # Not a method: the thread that runs this must not keep a forgotten `Batches` alive.
    put, own = parallel.put, {}
    if jax.process_count() > 1:  # no process decodes what others train on
        count = len(order(step=first))
        put = functools.partial(parallel.put_own, count=count)
        own = {"places": parallel.own_places(count)}
    if workers := getattr(examples, "workers", 0):
        reading = read_in_processes(examples, order, first, workers, **own)
        with contextlib.closing(reading) as batches:
            yield from map(put, batches)
    for step in itertools.count(first):
        rows = order(step=step)
        yield put({**examples.read(rows, **own), "rows": _int32(rows, **own)})


def _int32(rows: np.ndarray, places: Any = slice(None)) -> np.ndarray:
    return rows[places].astype(np.int32)


def _resident_bytes(examples: Examples, parallel: Parallel) -> int:
    """Bytes that a copy per device takes; on CPU all copies lie in the same memory."""
    shared = parallel.devices[0].platform == "cpu"
    return examples.nbytes * (len(parallel.devices) if shared else 1)


def epoch_batches(
    examples: Examples | StreamedExamples, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Passes over a whole split once, in order, for evaluation.

    Args:
      examples: The split.
      batch_size: Images a batch; the last one is shorter where it does not divide.

    Yields:
      NumPy ``{"images": uint8, "labels": int32, "indices": int32}``; ``indices`` is the place in
      the split.  A set without labels has no ``labels``.

    Raises:
      ValueError: If `batch_size` is not positive.

    Example:
      >>> from robust_ssl import data
      >>> examples = data.from_arrays(np.zeros((5, 4, 4, 3)))
      >>> [len(batch["images"]) for batch in epoch_batches(examples, 2)]
      [2, 2, 1]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(examples), batch_size):
        places = np.arange(start, min(start + batch_size, len(examples)), dtype=np.int32)
        yield {**examples.read(places), "indices": places}
