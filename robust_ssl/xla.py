"""What XLA needs of a process: its cores, patience, compile caches and memory maps.

All of it is set for the whole process, as XLA's own settings are.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import mmap
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from robust_ssl import disk

MOST_CPU_DEVICES = 16  # with more, a device of a batch of 64 has too little to do
MOST_MEMORY_MAPS = 20_000  # of the 65,530 that Linux gives a process
PATIENCE = 600  # seconds that one CPU device waits for another
IN_FLIGHT = 4  # calls of a step on several CPU devices before the host waits for the oldest


def on_cpu() -> bool:
    """Whether this process computes on a CPU; asked when a function is traced."""
    return jax.default_backend() == "cpu"


def use_every_core() -> None:
    """Gives each CPU core a device of its own; call it before JAX is first used.

    One convolution keeps about one thread busy on XLA:CPU, so two cores are best fed by two
    devices that run the sharded step.  Takes a power of two, at most `MOST_CPU_DEVICES`, so that
    the usual batches divide over them.  Does nothing when JAX has already started or its user has
    named a number, by ``JAX_NUM_CPU_DEVICES`` or a flag of XLA, and has no effect on accelerators.
    """
    set_flags()
    if jax.config.jax_num_cpu_devices > 0 or _DEVICE_COUNT in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = min(1 << (cores.bit_length() - 1), MOST_CPU_DEVICES)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the backend is already up, with the devices it has
        return


_DEVICE_COUNT = "--xla_force_host_platform_device_count="

# What XLA is told before it starts, all of it for CPUs:
FLAGS = {
    # On a machine that is busy with other work one device may be half a minute behind another.
    # XLA aborts the whole process where an exchange between them waits for 40 seconds.
    "xla_cpu_collective_call_terminate_timeout_seconds": f"{PATIENCE}",
    # Barriers live until kernels are made, so that what stands before one is computed once and not
    # in each copy of it: see `models.cpu_forms.kernel_gradient`.
    "xla_disable_hlo_passes": "cse_barrier_expander",
    # Large programs compile in 85 % of the time, small ones in half, and run as fast: convolutions
    # and products are not of LLVM's making.
    "xla_backend_optimization_level": "1",
}


def set_flags(flags: Mapping[str, str] | None = None) -> None:
    """Adds flags to ``XLA_FLAGS``; call it before JAX is first used.

    What is set there already stays.  A flag that this jaxlib does not have is left out, since XLA
    ends the process over one that it does not know.  Of a file that is named there the flags are
    taken over, since XLA reads either a file or flags.

    Args:
      flags: By name, without dashes; None is `FLAGS`.
    """
    present = os.environ.get("XLA_FLAGS", "").strip()
    if present and not present.startswith("-"):
        try:
            present = pathlib.Path(present).read_text().strip()
        except (OSError, ValueError):  # XLA says so itself, and names the file
            return
    words = [word for word in [present] if word]
    for name, value in (FLAGS if flags is None else flags).items():
        if f"--{name}" not in present and _has_flag(name):
            words.append(f"--{name}={value}")
    if words:
        os.environ["XLA_FLAGS"] = " ".join(words)


@functools.cache
def _has_flag(name: str) -> bool:
    """Whether this jaxlib has a flag: its largest library holds the name."""
    import jaxlib

    folder = pathlib.Path(jaxlib.__file__).parent
    libraries = [*folder.rglob("*.so*"), *folder.rglob("*.dylib"), *folder.rglob("*.pyd")]
    largest = max(libraries, key=lambda file: file.stat().st_size, default=None)
    if largest is None:
        return False
    with (
        open(largest, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents,
    ):
        return contents.find(name.encode() + b"\0") >= 0


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


def private_directory(path: str | os.PathLike, *, tighten: bool = False) -> str:
    """Makes a directory for compiled programs that nobody else can write, and returns its path.

    What lies there is machine code, which is run without a look.

    Args:
      path: Made with mode 0700 if it is not there.
      tighten: Whether a directory of one's own that others may write is closed to them; one that a
        user has named may be shared on purpose, so it is refused.

    Returns:
      The path without symbolic links: one that is turned elsewhere later has no effect.

    Raises:
      OSError: If it cannot be made, belongs to somebody else, holds something of somebody else, or
        others could write it or put another in its place.
    """
    path = disk.expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    path = path.resolve(strict=True)
    if not hasattr(os, "geteuid"):  # Windows has no such bits
        return str(path)
    status, safe_owners = path.stat(), {os.geteuid(), 0}
    if tighten and status.st_uid == os.geteuid() and status.st_mode & _OTHERS_WRITE:
        path.chmod(0o700)
        status = path.stat()
    if status.st_uid not in safe_owners:
        raise PermissionError(f"{path} belongs to somebody else; {_NAME_ANOTHER}")
    if status.st_mode & _OTHERS_WRITE:
        raise PermissionError(f"others can write {path}; chmod go-w it, or {_NAME_ANOTHER}")
    for parent in path.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # sticky: each renames their own only
            raise PermissionError(f"anybody can replace what is in {parent}; {_NAME_ANOTHER}")
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_uid not in safe_owners:
                raise PermissionError(
                    f"{entry.path} belongs to somebody else; remove it, or {_NAME_ANOTHER}"
                )
    return str(path)


_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NAME_ANOTHER = "name another directory for compiled programs, which are run as they lie there"


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
    if values[0]:
        _let_every_process_write()


def _let_every_process_write() -> None:
    """Has each of several processes on CPUs keep its own programs.

    On a CPU a program's key names its devices, so no process finds what another one has kept; and
    JAX lets process 0 alone write.  At a second start that one would be ready at once, and the
    others would compile.
    """
    from jax._src import compiler, distributed

    write, state = getattr(compiler, "_cache_write", None), distributed.global_state
    if write is None or state.process_id == 0 or hasattr(write, "everywhere"):
        return

    def write_here(key, seconds, name, backend, *more):
        own = state.process_id
        try:
            if backend.platform == "cpu":
                state.process_id = 0
            write(key, seconds, name, backend, *more)
        finally:
            state.process_id = own

    write_here.everywhere = True
    compiler._cache_write = write_here


def limit_in_flight(call: Callable) -> Callable:
    """Lets few calls be in flight: with 32 of them CPU devices that exchange values lock up.

    A CPU device takes up no more than that; where one is full and the other is not, the exchange
    of the oldest waits for a call that cannot begin.
    """
    in_flight: collections.deque = collections.deque()

    def bounded(*arguments):
        state, info = call(*arguments)
        result = (jax.tree.leaves(info) or jax.tree.leaves(state))[:1]
        if not any(isinstance(x, jax.core.Tracer) for x in result):
            in_flight.append(result)
        if len(in_flight) > IN_FLIGHT:  # what was donated to a later call is gone
            jax.block_until_ready([x for x in in_flight.popleft() if not x.is_deleted()])
        return state, info

    return bounded
