"""Results do not depend on how many devices there are, nor on how a step is spread over them."""

import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import parallel
from robust_ssl.parallel import METHODS, Parallel, shared_programs

LAYOUTS = [(devices, method) for method in METHODS for devices in (1, 2, 4)]
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
IMAGES = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)


def pairwise_loss(features):
    """Each image against every other one of the global batch: a contrastive loss in small."""
    similarity = features @ features.T
    return -jnp.diagonal(jax.nn.log_softmax(similarity, axis=-1))


def train_step(axis_name):
    def step(weights, batch):
        def loss(weights):
            features = parallel.gather(jnp.tanh(batch["x"] @ weights), axis_name)
            return jnp.mean(pairwise_loss(features))

        value, gradient = jax.value_and_grad(loss)(weights)
        gradient = parallel.average(gradient, axis_name)
        return weights - 0.1 * gradient, {"loss": value, "gradient": gradient}

    return step


@pytest.fixture(scope="module")
def on_one_device():
    """Two steps as a plain function of the whole batch, with no layout at all."""
    step = jax.jit(train_step(None))
    weights, first = step(WEIGHTS, {"x": IMAGES})
    weights, second = step(weights, {"x": IMAGES[::-1]})
    return weights, first, second


@pytest.mark.parametrize("devices,method", LAYOUTS)
def test_a_pairwise_loss_has_the_same_gradient_on_every_layout(devices, method, on_one_device):
    layout = Parallel.create(num_devices=devices, method=method)
    step = layout.compile(train_step(layout.axis_name))
    weights, first = step(layout.replicate(WEIGHTS), layout.put({"x": IMAGES}))
    weights, second = step(weights, layout.put({"x": IMAGES[::-1].copy()}))
    for ours, expected in zip(
        jax.tree.leaves((weights, first, second)), jax.tree.leaves(on_one_device), strict=True
    ):
        assert ours.shape == expected.shape  # state and info come out unstacked
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_without_the_gather_the_gradient_would_be_another_one(on_one_device):
    layout = Parallel.create(num_devices=4)

    def step(weights, batch):
        loss = lambda w: jnp.mean(pairwise_loss(jnp.tanh(batch["x"] @ w)))  # noqa: E731
        return weights, parallel.average(jax.grad(loss)(weights), layout.axis_name)

    _, gradient = layout.compile(step)(WEIGHTS, layout.put({"x": IMAGES}))
    expected = on_one_device[1]["gradient"]
    assert jnp.linalg.norm(gradient - expected) > 0.1 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_gather_returns_the_batch_in_order(method):
    layout = Parallel.create(num_devices=4, method=method)

    def step(state, batch):
        return state, parallel.gather({"i": batch["i"]}, layout.axis_name)

    _, info = layout.compile(step)(jnp.zeros(()), layout.put({"i": np.arange(8)}))
    assert info["i"].tolist() == list(range(8))


def test_gather_and_average_are_the_identity_without_an_axis():
    tree = {"x": jnp.arange(3.0)}
    assert parallel.gather(tree, None) is tree
    assert parallel.average(tree, None) is tree


@pytest.mark.parametrize("devices,method", LAYOUTS)
@pytest.mark.parametrize("size", [1, 5, 8])
def test_map_counts_every_image_once(devices, method, size):
    layout = Parallel.create(num_devices=devices, method=method)
    double = layout.map(lambda scale, batch: {"y": scale * batch["x"], "first": batch["x"][:, 0]})
    result = double(jnp.float32(2), {"x": IMAGES[:size]})
    assert isinstance(result["y"], np.ndarray)
    np.testing.assert_array_equal(result["y"], 2 * IMAGES[:size])
    np.testing.assert_array_equal(result["first"], IMAGES[:size, 0])


@pytest.mark.parametrize("method", METHODS)
def test_a_donated_state_gives_the_same_result(method):
    layout = Parallel.create(num_devices=2, method=method)
    step = layout.compile(train_step(layout.axis_name), donate=True)
    plain = layout.compile(train_step(layout.axis_name))
    batch = layout.put({"x": IMAGES})
    state, expected = layout.replicate(jnp.array(WEIGHTS)), layout.replicate(WEIGHTS)
    for _ in range(3):
        state, _ = step(state, batch)
        expected, _ = plain(expected, batch)
    np.testing.assert_array_equal(state, expected)


def test_put_spreads_and_leaves_alone_what_is_spread():
    layout = Parallel.create(num_devices=4)
    batch = layout.put({"x": IMAGES})
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    assert layout.put(batch)["x"] is batch["x"]
    np.testing.assert_array_equal(parallel.to_host(batch["x"]), IMAGES)


def test_replicate_puts_the_whole_on_every_device():
    layout = Parallel.create(num_devices=4)
    weights = layout.replicate({"w": WEIGHTS})["w"]
    assert len(weights.addressable_shards) == 4
    for shard in weights.addressable_shards:
        np.testing.assert_array_equal(shard.data, WEIGHTS)


def test_all_devices_and_pmap_are_the_default():
    layout = Parallel.create()
    assert (len(layout.devices), layout.method) == (jax.device_count(), "pmap") == (4, "pmap")


@pytest.mark.parametrize("devices", [0, 5, -1])
def test_a_wrong_number_of_devices_is_refused(devices):
    with pytest.raises(ValueError, match=f"num_devices={devices}, but there are 4"):
        Parallel.create(num_devices=devices)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of .*'shard_map'.*got 'xmap'"):
        Parallel.create(method="xmap")


@pytest.mark.parametrize("size", [0, 3, 6])
def test_a_batch_that_does_not_divide_is_refused(size):
    layout = Parallel.create(num_devices=4)
    with pytest.raises(ValueError, match=f"a batch of {size} does not divide over 4 devices"):
        layout.put({"x": IMAGES[:size]})


def test_asking_for_every_core_after_jax_has_started_changes_nothing():
    parallel.use_every_core()
    assert jax.device_count() == 4


def test_late_devices_are_waited_for_unless_the_user_says_how_long(monkeypatch):
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    monkeypatch.delenv("XLA_FLAGS")  # it is set: conftest.py did
    parallel.wait_for_late_devices(70)
    assert os.environ["XLA_FLAGS"] == f"{flag}=70"
    parallel.wait_for_late_devices()
    assert os.environ["XLA_FLAGS"] == f"{flag}=70"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    parallel.wait_for_late_devices()
    assert os.environ["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {flag}=600"


def test_prefetch_keeps_the_order():
    assert list(parallel.prefetch(iter(range(20)), depth=3)) == list(range(20))
    assert list(parallel.prefetch([])) == []


def test_prefetch_raises_where_the_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise OSError("disk gone")

    stream = parallel.prefetch(items(), depth=5)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_prefetch_runs_no_further_ahead_than_asked_and_stops_when_closed():
    made = []

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    stream = parallel.prefetch(items(), depth=2)
    assert next(stream) == 0
    time.sleep(0.3)
    assert len(made) <= 1 + 2 + 1  # taken, waiting in the queue, in the thread's hand
    stream.close()
    deadline = time.time() + 5
    while any(t.name == "prefetch" for t in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(t.name == "prefetch" for t in threading.enumerate())
    assert len(made) <= 5


def test_programs_are_dropped_only_when_they_hold_many_memory_maps():
    traced = []

    @jax.jit
    def double(x):
        traced.append(x)
        return 2 * x

    double(1.0)
    assert not parallel.release_programs(most=10**9)
    double(2.0)
    assert len(traced) == 1
    assert parallel.release_programs(most=0)
    assert double(3.0) == 6.0 and len(traced) == 2


def test_what_is_alike_is_compiled_once_without_a_cache_on_disk(compiled_programs):
    def programs():
        for _ in range(2):  # two functions, of which JAX itself knows nothing in common
            jax.jit(lambda x: jnp.sin(x) + 3)(jnp.ones(7)).block_until_ready()

    with shared_programs():
        assert jax.config.jax_compilation_cache_dir
        programs()
        first = compiled_programs.copy()
        programs()
    assert compiled_programs == first
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1


def test_a_cache_on_disk_stays_the_one_in_use():
    before = jax.config.jax_compilation_cache_dir
    with shared_programs():
        assert before and jax.config.jax_compilation_cache_dir == before
    assert jax.config.jax_compilation_cache_dir == before


def test_few_calls_are_in_flight_on_several_cpu_devices(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
    two = Parallel.create(num_devices=2)
    add = two.compile(lambda state, batch: (state + 1, {"before": state}), donate=True)
    state, batch = two.replicate(jnp.zeros(())), two.put({"x": np.zeros(2)})
    for _ in range(10):
        state, _ = add(state, batch)
    found = [float(info) for (info,) in waited]
    assert found == list(range(10 - parallel.IN_FLIGHT))
    assert float(state) == 10


@pytest.mark.parametrize("method", METHODS)
def test_hundreds_of_calls_that_exchange_values_do_not_lock_up(method):
    """Without a limit on calls in flight this never ends."""
    two = Parallel.create(num_devices=2, method=method)

    def step(state, batch):
        x = batch["x"]
        for _ in range(6):
            x = jnp.tanh(x @ state)
        gram = parallel.average(x.T @ x / len(x), two.axis_name)
        return state + 1e-3 * gram, jnp.mean(gram)

    compiled, state = two.compile(step), two.replicate(0.5 * jnp.eye(400))
    images = np.random.default_rng(0).normal(size=(256, 400)).astype(np.float32)
    batch, found = two.put({"x": images}), []
    for _ in range(300):
        state, value = compiled(state, batch)
        found.append(value)
    assert np.isfinite(jax.device_get(found)).all()
