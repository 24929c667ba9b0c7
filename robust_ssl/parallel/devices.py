"""The only place that knows of devices: `pmap`, `shard_map` or `jit` over a mesh, one interface.

A *step* is written once, for the part of the batch that one device holds.  It is given the name of
the device axis: None under ``jit``, where the compiler sees the global batch.  It gathers the small
outputs that a loss compares across the batch (`gather`) and averages gradients (`average`).  Then
the result does not depend on how many devices there are.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from robust_ssl.parallel import alone
from robust_ssl.parallel.processes import barrier
from robust_ssl.xla import limit_in_flight

AXIS = "devices"
KINDS = ("pmap", "shard_map", "jit")

_log = logging.getLogger(__name__)


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
      kind: ``"pmap"`` (the default), ``"shard_map"`` or ``"jit"``.  Their results agree.

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
    kind: str = "pmap"
    _programs: alone.Programs | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "devices", tuple(self.devices))  # `jax.devices()` is a list
        if not self.devices:
            raise ValueError("devices is empty; take jax.devices(), or Parallel.create()")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")

    @classmethod
    def create(cls, *, num_devices: int | None = None, kind: str = "pmap") -> Parallel:
        """Takes all devices, or the first `num_devices`.

        A JAX that has no `jax.pmap` any more gets ``"shard_map"`` for it.

        Raises:
          ValueError: If there are fewer devices than asked for, or the kind is not known.
        """
        devices = jax.devices()
        if kind == "pmap" and not hasattr(jax, "pmap"):
            _log.warning("this jax has no pmap; shard_map is used, the results agree")
        if num_devices is not None and not 1 <= num_devices <= len(devices):
            raise ValueError(
                f"num_devices={num_devices}, but there are {len(devices)} devices: {devices}"
            )
        layout = cls(tuple(devices[:num_devices]), kind)
        if num_devices is None and jax.process_count() > 1:
            _connect(layout)
        return layout

    @property
    def axis_name(self) -> str | None:
        """Name of the device axis inside a step; None where the compiler shards by itself."""
        return None if self.kind == "jit" else AXIS

    @property
    def _transform(self) -> str:
        # Among several processes `pmap`, itself a `shard_map` inside, returns each process's own
        # part; state and checkpoints need the global arrays.
        unfit = jax.process_count() > 1 or not hasattr(jax, "pmap")
        return "shard_map" if self.kind == "pmap" and unfit else self.kind

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

    def anew_for(self, *brought: Any) -> Parallel:
        """Returns the layout to run models and attacks with, so that none is stale.

        Where one may read more than it holds (`reads_more`), no program of before is taken, and
        those that are made are not kept; else it is this one.
        """
        if self._programs is not None or not alone.reads_more(brought):
            return self
        return dataclasses.replace(self, _programs=alone.Programs())

    def made_once(self, make: Callable, *arguments: Any) -> Any:
        """Returns ``make(self, *arguments)``, made once for all equal layouts and arguments."""
        if self._programs is None:
            return alone.kept(make, self, *arguments)
        return self._programs.made(make, self, *arguments)

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

    def own_places(self, count: int) -> np.ndarray:
        """Returns which of a batch's `count` places lie on devices of this process, ascending.

        Example:
          >>> Parallel.create(num_devices=2).own_places(4).tolist()
          [0, 1, 2, 3]
        """
        self.check_batch(count)
        parts = self._sharded.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

    def put_own(self, batch: Any, count: int) -> Any:
        """Spreads a batch of `count` of which each process passes its `own_places` alone."""
        places = self.own_places(count)

        def put(own: np.ndarray) -> jax.Array:
            def on_device(index: tuple[slice, ...]) -> np.ndarray:
                return own[np.searchsorted(places, np.arange(count)[index[0]])]

            shape = (count, *own.shape[1:])
            return jax.make_array_from_callback(shape, self._sharded, on_device)

        return jax.tree.map(put, batch)

    def _put_leaf(self, x) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == self._sharded:
            return x
        self.check_batch(x.shape[0])
        if jax.process_count() > 1:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self._sharded, lambda index: x[index])
        return jax.device_put(x, self._sharded)

    def compile(self, step: Callable, *, donate: bool = False, constants: Any = None) -> Program:
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
          on several CPU devices for the call that was `xla.IN_FLIGHT` before.
        """
        more = () if constants is None else (constants,)
        return Program(
            self, self._spread(step, out_spread=False, more=len(more), donate=donate), more
        )

    def _spread(
        self, function: Callable, *, out_spread: bool, more: int = 0, donate: bool = False
    ) -> Callable:
        """Compiles a function of (whole, spread, whole...), its result spread or whole.

        Args:
          function: It.
          out_spread: Whether the result is per image.
          more: How many further arguments it takes.
          donate: Whether the result may take the memory of the first.
        """
        donated = (0,) if donate else ()
        if self.kind == "jit":
            whole, spread = self.replicated, self._sharded
            return jax.jit(
                function,
                in_shardings=(whole, spread, *[whole] * more),
                out_shardings=spread if out_spread else whole,
                donate_argnums=donated,
            )
        if self._transform == "shard_map":
            mapped = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(P(), P(AXIS), *[P()] * more),
                out_specs=P(AXIS) if out_spread else P(),
                check_vma=False,
            )
            return jax.jit(mapped, donate_argnums=donated)
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=(None, 0, *[None] * more),
            out_axes=0 if out_spread else None,
            devices=self.devices,
            donate_argnums=donated,
        )

    def map(self, function: Callable) -> Callable:
        """Compiles ``function(constants, batch) -> per-image results`` for any batch size.

        The batch is padded to a multiple of the device count by repeating its first image.  What
        was padded is cut off again, so a short last batch counts every image once.

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
            return self._spread(
                lambda constants, batch: function(constants, batch), out_spread=True
            )

        def call(constants, batch):
            size = len(jax.tree.leaves(batch)[0])
            missing = -size % len(self.devices)
            structure = hash(jax.tree.structure(constants))
            # Stacked and joined on the host: each shape would be a program of its own.
            taken = jax.tree.map(lambda x: self._put_taken(_pad(np.asarray(x), missing)), batch)
            results = compiled(structure)(constants, taken)
            return jax.tree.map(lambda x: self._joined(to_host(x))[:size], results)

        return call

    def _put_taken(self, x: np.ndarray) -> jax.Array:
        """Puts what `_as_taken` makes of an array on the devices."""
        if self._transform != "pmap":
            return self._put_leaf(x)
        return jax.device_put(self._stack(x), self._sharded)

    def _as_taken(self, batch: Any) -> Any:
        """A batch as `put` leaves it, as the compiled function takes it."""
        return jax.tree.map(self._stack, batch) if self._transform == "pmap" else batch

    def _joined(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, *x.shape[2:]) if self._transform == "pmap" else x

    def _stack(self, x: Any) -> Any:
        """``[batch, ...]`` to ``[devices, batch / devices, ...]`` without moving a byte."""
        return x.reshape(len(self.devices), -1, *x.shape[1:])


class Program:
    """``step(state, batch) -> (state, info)`` on all devices, as `Parallel.compile` returns it."""

    def __init__(self, parallel: Parallel, jitted: Any, constants: tuple = ()):
        self._parallel, self._jitted, self._constants = parallel, jitted, constants
        several_cpus = len(parallel.devices) > 1 and parallel.devices[0].platform == "cpu"
        self._call = limit_in_flight(jitted) if several_cpus else jitted

    def bind(self, constants: Any) -> Program:
        """Returns the same program with the constants that it reads; nothing is compiled again."""
        return Program(self._parallel, self._jitted, (constants,))

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Returns the next state and what the step says."""
        return self._call(state, self._parallel._as_taken(batch), *self._constants)

    def lower(self, state: Any, batch: Any) -> jax.stages.Lowered:
        """Returns the program for such a state and batch, or their shapes.

        A call with such arguments traces nothing again.
        """
        whole = _shapes((state, *self._constants), self._parallel.replicated)
        spread = _shapes(batch, self._parallel._sharded)
        taken = jax.eval_shape(self._parallel._as_taken, spread)
        return self._jitted.lower(whole[0], _shapes(taken, self._parallel._sharded), *whole[1:])

    def _cache_size(self) -> int:
        return self._jitted._cache_size()


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    """The shapes of leaves that lie where `sharding` says."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        weak = getattr(kind, "weak_type", False)
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(shape, tree)


@functools.cache
def _connect(layout: Parallel) -> None:
    """Has the devices of all processes exchange something once they are all there.

    The first exchange between CPU devices opens their connections, and gives up after 30 seconds.
    Later ones wait for who is late: who compiles longer, or reads more.
    """
    barrier("connect")
    ones = layout.put(np.ones(len(layout.devices), np.float32))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, AXIS), mesh=layout.mesh, in_specs=P(AXIS), out_specs=P()
    )
    jax.block_until_ready(jax.jit(total)(ones))


def _pad(x: np.ndarray, missing: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) if missing else x


def to_host(x: jax.Array) -> np.ndarray:
    """Returns the whole of an array that may live on several processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def copied(tree: Any) -> Any:
    """Returns arrays that share no memory with a tree's.

    By way of the host where that can be: on the devices each shape would be a program of its own.
    """

    def copy(x: Any) -> jax.Array:
        on_host = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
        return jax.device_put(np.array(x)) if on_host else jnp.array(x)

    return jax.tree.map(copy, tree)
