"""Settings of every test: four virtual CPU devices, strict shapes, a compilation cache."""

import itertools
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl.xla import cache_in, private_directory, release_programs, set_flags

# Torch for slow tests, which skip themselves where it is missing; no tests of their own.
collect_ignore = ["tests/parity_cases_vit.py", "tests/torchvision_operators.py"]

USER = os.getuid() if hasattr(os, "getuid") else "own"

FINISHED = itertools.count(1)
# Begun first by workers that take files in turn, lest one of them be alone at the end.
LONG = (
    *("wheel", "notebooks", "two_processes", "golden", "faults", "experiment", "compare"),
    *("conformance_kinds", "recipes", "sweep", "benchmarks", "lora", "screen", "docs", "score"),
    *("pretraining", "train", "plan", "checks", "finetuning", "parallel", "convert"),
)

set_flags()  # as the command line does; with two workers on two cores eight devices share them
jax.config.update("jax_num_cpu_devices", 4)
jax.devices()  # at once: a test that is first to call the command line would have one for each core
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR")
    or private_directory(pathlib.Path(tempfile.gettempdir()) / f"robust_ssl_test_cache_{USER}"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config):
    # Compiling is most of what fast tests do; slow ones run the programs that users run.
    fast = "not slow" in config.option.markexpr
    jax.config.update("jax_disable_most_optimizations", fast)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="module")
def quick_programs():
    """Compiling is most of it, and the programs that users run are looked at elsewhere."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # programs in memory are found whatever they were compiled with
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, np=np)


@pytest.fixture(autouse=True)
def _bounded_memory_maps():
    yield
    if next(FINISHED) % 16 == 0:  # counting them takes longer than most tests
        release_programs()


@pytest.fixture
def compiled_programs():
    """Turns the cache on disk off; a list of what was compiled since and not found in a cache."""
    compiled = []

    def listener(event, **_):
        if event == "/jax/compilation_cache/cache_misses":
            compiled.append(event)

    with cache_in(None):
        jax.monitoring.register_event_listener(listener)
        yield compiled
        jax.monitoring.unregister_event_listener(listener)
