"""The only place that knows of devices: `pmap`, `shard_map` or `jit` over a mesh, one interface.

A *step* is written once, for the part of the batch that one device holds, and is told the name of
the device axis (None under ``jit``, where the compiler sees the global batch).  What it must do is
gather the small outputs that a loss compares across the batch (`gather`) and average gradients
(`average`); then the result does not depend on how many devices there are.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"
METHODS = ("pmap", "shard_map", "jit")
MOST_CPU_DEVICES = 16  # with more, a device of a batch of 64 has too little to do
MOST_MEMORY_MAPS = 20_000  # of the 65,530 that Linux gives a process
PATIENCE = 600  # seconds that one CPU device waits for another
IN_FLIGHT = 4  # calls of a step on several CPU devices before the host waits for the oldest


def use_every_core() -> None:
    """Gives each CPU core a device of its own; call it before JAX is first used.

    One convolution keeps about one thread busy on XLA:CPU, so two cores are best fed by two
    devices that run the sharded step.  Takes a power of two, at most `MOST_CPU_DEVICES`, so that
    the usual batches divide over them.  Does nothing when JAX has already started, and has no
    effect on accelerators.
    """
    wait_for_late_devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = min(1 << (cores.bit_length() - 1), MOST_CPU_DEVICES)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the backend is already up, with the devices it has
        return


def wait_for_late_devices(seconds: int = PATIENCE) -> None:
    """Has CPU devices wait for each other; call it before JAX is first used.

    On a machine that is busy with other work one device may be half a minute behind another, and
    XLA aborts the whole process where an exchange between them waits for 40 seconds.  What
    ``XLA_FLAGS`` says of it already is kept.

    Args:
      seconds: After which the process is aborted.
    """
    flag, flags = "--xla_cpu_collective_call_terminate_timeout_seconds", os.environ.get("XLA_FLAGS")
    if flag not in (flags or ""):
        os.environ["XLA_FLAGS"] = " ".join(filter(None, [flags, f"{flag}={seconds}"]))


def release_programs(most: int = MOST_MEMORY_MAPS) -> bool:
    """Drops all compiled programs if they hold many memory maps; for between two parts of a run.

    On a CPU every compiled program takes memory maps, of which Linux gives a process a fixed
    number; a comparison of thirty methods needs more, and XLA then dies without an exception.
    What is needed again is compiled again, or read from the persistent cache.

    Args:
      most: Memory maps that are few enough.

    Returns:
      Whether programs were dropped; never where a process cannot count its maps.
    """
    try:
        maps = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return False
    if maps > most:
        jax.clear_caches()
    return maps > most


def use_cache(directory: str | None) -> None:
    """Keeps every compiled program, however small, in a directory; None keeps none.

    A setting of the whole process, as all of JAX's are.
    """
    _configure_cache((directory, 0, -1) if directory else (None, 1, 0))


@contextlib.contextmanager
def cache_in(directory: str | None) -> Iterator[None]:
    """As `use_cache`, until the block is left."""
    before = [getattr(jax.config, name) for name in _CACHE]
    use_cache(directory)
    try:
        yield
    finally:
        _configure_cache(before)


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Compiles what is alike once, however many steps, attacks or points of a sweep it is part of.

    Where JAX's compilation cache is on (the command line turns it on), nothing is changed; else
    there is one in a temporary directory until the block is left.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        yield
        return
    with (
        tempfile.TemporaryDirectory(prefix="robust_ssl_programs_") as directory,
        cache_in(directory),
    ):
        yield


_CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def _configure_cache(values: Sequence[Any]) -> None:
    for name, value in zip(_CACHE, values, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it looks at its settings once


def gather(tree: Any, axis_name: str | None) -> Any:
    """Returns the global batch of every leaf: ``[batch / devices, ...]`` to ``[batch, ...]``."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def average(tree: Any, axis_name: str | None) -> Any:
    """Returns the mean over devices of every leaf.

    After `gather`, the mean of the devices' gradients is the gradient of the global loss.
    """
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How steps are spread over devices.

    Attributes:
      devices: The devices, in order; all processes' devices on a cluster.
      method: ``"pmap"`` (the default), ``"shard_map"`` or ``"jit"``.

    Example:
      >>> parallel = Parallel.create(num_devices=2)
      >>> def step(total, batch):
      ...     total = total + average(jnp.mean(batch["x"]), parallel.axis_name)
      ...     return total, {"mean": total}
      >>> state, info = parallel.compile(step)(jnp.zeros(()), parallel.put({"x": np.arange(4.0)}))
      >>> float(state)
      1.5
    """

    devices: tuple[Any, ...]
    method: str = "pmap"

    @classmethod
    def create(cls, *, num_devices: int | None = None, method: str = "pmap") -> Parallel:
        """Takes all devices, or the first `num_devices`.

        Raises:
          ValueError: If there are fewer devices than asked for, or the method is not known.
        """
        devices = jax.devices()
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if num_devices is not None and not 1 <= num_devices <= len(devices):
            raise ValueError(
                f"num_devices={num_devices}, but there are {len(devices)} devices: {devices}"
            )
        return cls(tuple(devices[:num_devices]), method)

    @property
    def axis_name(self) -> str | None:
        """Name of the device axis inside a step; None where the compiler shards by itself."""
        return None if self.method == "jit" else AXIS

    @property
    def _way(self) -> str:
        # Among several processes `pmap`, itself a `shard_map` inside, returns each process's own
        # part; state and checkpoints need the global arrays.
        several = self.method == "pmap" and jax.process_count() > 1
        return "shard_map" if several else self.method

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The one-dimensional mesh of all devices."""
        return Mesh(np.asarray(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    @property
    def _sharded(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(AXIS))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, P())

    def check_batch(self, size: int) -> None:
        """Raises ValueError unless a batch of `size` images divides over the devices."""
        if size < 1 or size % len(self.devices):
            raise ValueError(
                f"a batch of {size} does not divide over {len(self.devices)} devices; "
                f"take a multiple of {len(self.devices)}"
            )

    def replicate(self, tree: Any) -> Any:
        """Puts the same values on every device; every process has them all."""
        return jax.tree.map(self._replicate_leaf, tree)

    def _replicate_leaf(self, x) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, self.replicated)
        # Here device_put would compare the value between the processes, leaf by leaf: slow, not
        # for Python scalars, and NaN is not equal to itself.
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = self._replicate_leaf(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(jnp.asarray(x))  # a Python scalar gets JAX's dtype, not NumPy's
        return jax.make_array_from_callback(host.shape, self.replicated, lambda index: host[index])

    def put(self, batch: Any) -> Any:
        """Spreads ``[batch, ...]`` arrays over the devices along their first axis.

        On several processes each one passes the whole global batch, or the same function of the
        step; every process keeps only its part.
        """
        return jax.tree.map(self._put_leaf, batch)

    def _put_leaf(self, x) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == self._sharded:
            return x
        self.check_batch(x.shape[0])
        if jax.process_count() > 1:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self._sharded, lambda index: x[index])
        return jax.device_put(x, self._sharded)

    def compile(self, step: Callable, *, donate: bool = False, constants: Any = None) -> Callable:
        """Compiles ``step(state, batch) -> (state, info)``; state whole, batch spread.

        Args:
          step: Written for one device's part of the batch; uses `axis_name` to talk to the
            others.  Its results must be equal on all devices (averaged or gathered).
          donate: Let the new state reuse the memory of the old one, which is then gone.
          constants: What the step reads besides, whole on every device as `replicate` leaves it;
            where it is given the step is ``step(state, batch, constants)``.

        Returns:
          A function of (state, batch) where batch leaves are ``[global batch, ...]`` as `put`
          leaves them.  State goes in and comes out unstacked.  The host does not wait for it, but
          on several CPU devices for the call that was `IN_FLIGHT` before.
        """
        if len(self.devices) > 1 and self.devices[0].platform == "cpu":
            return _bounded(self._compile(step, donate, constants))
        return self._compile(step, donate, constants)

    def _compile(self, step: Callable, donate: bool, constants: Any) -> Callable:
        more = () if constants is None else (constants,)
        donated = (0,) if donate else ()
        if self.method == "jit":
            compiled = jax.jit(
                step,
                in_shardings=(self.replicated, self._sharded, *(self.replicated for _ in more)),
                out_shardings=self.replicated,
                donate_argnums=donated,
            )
            return compiled if not more else lambda state, batch: compiled(state, batch, *more)
        if self._way == "shard_map":
            specs = (P(), P(AXIS), *(P() for _ in more))
            spread = jax.shard_map(
                step, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False
            )
            compiled = jax.jit(spread, donate_argnums=donated)
            return compiled if not more else lambda state, batch: compiled(state, batch, *more)
        mapped = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0, *(None for _ in more)),
            out_axes=None,
            devices=self.devices,
            donate_argnums=donated,
        )
        return lambda state, batch: mapped(state, jax.tree.map(self._stack, batch), *more)

    def map(self, function: Callable) -> Callable:
        """Compiles ``function(constants, batch) -> per-image results`` for any batch size.

        The batch is padded to a multiple of the device count by repeating its first image, and
        what was padded is cut off again, so a short last batch counts every image once.

        Args:
          function: Maps constants and ``[n, ...]`` leaves to ``[n, ...]`` leaves, each image by
            itself.

        Returns:
          A function of (constants, batch) that returns NumPy arrays ``[batch, ...]``.
        """

        @functools.cache
        def compiled(structure):
            # Not by JAX's own comparison: it takes two classes of `flax.struct` for one (`struct`).
            del structure
            return self._map(lambda constants, batch: function(constants, batch))

        def call(constants, batch):
            size = len(jax.tree.leaves(batch)[0])
            missing = -size % len(self.devices)
            padded = jax.tree.map(lambda x: _pad(np.asarray(x), missing), batch)
            structure = hash(jax.tree.structure(constants))
            results = compiled(structure)(constants, self.put(padded))
            return jax.tree.map(lambda x: to_host(x)[:size], results)

        return call

    def _map(self, function: Callable) -> Callable:
        # One sharding discipline whatever the method: results are per image, so there is nothing
        # to gather.
        if self.method == "jit":
            return jax.jit(
                function,
                in_shardings=(self.replicated, self._sharded),
                out_shardings=self._sharded,
            )
        if self._way == "shard_map":
            return jax.jit(
                jax.shard_map(
                    function,
                    mesh=self.mesh,
                    in_specs=(P(), P(AXIS)),
                    out_specs=P(AXIS),
                    check_vma=False,
                )
            )
        mapped = jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=self.devices)

        def stacked(constants, batch):
            results = mapped(constants, jax.tree.map(self._stack, batch))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

        return stacked

    def _stack(self, x: jax.Array) -> jax.Array:
        """``[batch, ...]`` to ``[devices, batch / devices, ...]`` without moving a byte."""
        return x.reshape(len(self.devices), -1, *x.shape[1:])


def _bounded(call: Callable) -> Callable:
    """Lets few calls be in flight: with 32 of them CPU devices that exchange values lock up.

    A CPU device takes up no more than that; where one is full and the other is not, the exchange
    of the oldest waits for a call that cannot begin.
    """
    in_flight: collections.deque = collections.deque()

    def bounded(state, batch):
        state, info = call(state, batch)
        result = (jax.tree.leaves(info) or jax.tree.leaves(state))[:1]
        if not any(isinstance(x, jax.core.Tracer) for x in result):
            in_flight.append(result)
        if len(in_flight) > IN_FLIGHT:  # what was donated to a later call is gone
            jax.block_until_ready([x for x in in_flight.popleft() if not x.is_deleted()])
        return state, info

    for name in ("lower", "_cache_size"):  # what a jitted function has besides
        if hasattr(call, name):
            setattr(bounded, name, getattr(call, name))
    return bounded


def _pad(x: np.ndarray, missing: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) if missing else x


def to_host(x: jax.Array) -> np.ndarray:
    """Returns the whole of an array that may live on several processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def everywhere(ok: bool) -> bool:
    """Returns whether something holds in all processes, so that all take the same turn.

    All of them have to ask, at the same point: one that turned off would leave the others waiting.
    """
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def prefetch(iterator: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """Runs an iterator in a thread of its own, `depth` items ahead.

    An exception in it is raised where the item would have come.
    """
    import queue
    import threading

    items: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(entry) -> None:
        while not stop.is_set():
            try:
                return items.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for item in iterator:
                offer((item, None))
                if stop.is_set():
                    return
            offer((None, StopIteration()))
        except BaseException as error:
            offer((None, error))

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
