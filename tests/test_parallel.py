"""Results do not depend on how many devices there are, nor on how a step is spread over them."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import parallel
from robust_ssl.parallel import KINDS, Parallel

LAYOUTS = [(devices, kind) for kind in KINDS for devices in (1, 2, 4)]
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


@pytest.mark.parametrize("devices,kind", LAYOUTS)
def test_a_pairwise_loss_has_the_same_gradient_on_every_layout(devices, kind, on_one_device):
    layout = Parallel.create(num_devices=devices, kind=kind)
    step = layout.compile(train_step(layout.axis_name))
    weights, first = step(layout.replicate(WEIGHTS), layout.put({"x": IMAGES}))
    weights, second = step(weights, layout.put({"x": IMAGES[::-1].copy()}))
    for ours, expected in zip(
        jax.tree.leaves((weights, first, second)), jax.tree.leaves(on_one_device), strict=True
    ):
        assert ours.shape == expected.shape  # state and info come out unstacked
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices,kind", LAYOUTS)
def test_what_was_lowered_for_shapes_is_the_program_of_the_calls(devices, kind):
    layout, traced = Parallel.create(num_devices=devices, kind=kind), []
    step = train_step(layout.axis_name)

    def counted(weights, batch, constants):
        traced.append(1)
        weights, info = step(weights, batch)
        return weights, {**info, "sum": constants["more"] + info["loss"]}

    program = layout.compile(counted, constants={"more": np.float32(0)})
    shapes = jax.eval_shape(lambda: (WEIGHTS, {"x": jnp.asarray(IMAGES)}))
    lowered = program.lower(*shapes)
    assert lowered.compile().memory_analysis() is not None
    weights, batch = layout.replicate(WEIGHTS), layout.put({"x": IMAGES})
    with tiny.programs() as compiled:
        for more in (1, 2):
            bound = program.bind(layout.replicate({"more": np.float32(more)}))
            _, info = bound(weights, batch)
            np.testing.assert_allclose(info["sum"] - info["loss"], more, rtol=1e-6)
    assert len(traced) == 1
    assert not [name for name in compiled if "counted" in name or "_fun" in name]


def test_without_the_gather_the_gradient_would_be_another_one(on_one_device):
    layout = Parallel.create(num_devices=4)

    def step(weights, batch):
        loss = lambda w: jnp.mean(pairwise_loss(jnp.tanh(batch["x"] @ w)))  # noqa: E731
        return weights, parallel.average(jax.grad(loss)(weights), layout.axis_name)

    _, gradient = layout.compile(step)(WEIGHTS, layout.put({"x": IMAGES}))
    expected = on_one_device[1]["gradient"]
    assert jnp.linalg.norm(gradient - expected) > 0.1 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gather_returns_the_batch_in_order(kind):
    layout = Parallel.create(num_devices=4, kind=kind)

    def step(state, batch):
        return state, parallel.gather({"i": batch["i"]}, layout.axis_name)

    _, info = layout.compile(step)(jnp.zeros(()), layout.put({"i": np.arange(8)}))
    assert info["i"].tolist() == list(range(8))


def test_gather_and_average_are_the_identity_without_an_axis():
    tree = {"x": jnp.arange(3.0)}
    assert parallel.gather(tree, None) is tree
    assert parallel.average(tree, None) is tree


@pytest.mark.parametrize("devices,kind", LAYOUTS)
@pytest.mark.parametrize("size", [1, 5, 8])
def test_map_counts_every_image_once(devices, kind, size):
    layout = Parallel.create(num_devices=devices, kind=kind)
    double = layout.map(lambda scale, batch: {"y": scale * batch["x"], "first": batch["x"][:, 0]})
    result = double(jnp.float32(2), {"x": IMAGES[:size]})
    assert isinstance(result["y"], np.ndarray)
    np.testing.assert_array_equal(result["y"], 2 * IMAGES[:size])
    np.testing.assert_array_equal(result["first"], IMAGES[:size, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_donated_state_gives_the_same_result(kind):
    layout = Parallel.create(num_devices=2, kind=kind)
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
    assert (len(layout.devices), layout.kind) == (jax.device_count(), "pmap") == (4, "pmap")


def test_a_jax_without_pmap_takes_shard_map_and_says_so_once(monkeypatch, caplog, on_one_device):
    monkeypatch.delattr(jax, "pmap")
    layout = Parallel.create(num_devices=4)
    assert layout.axis_name is not None
    step = layout.compile(train_step(layout.axis_name))
    weights, first = step(layout.replicate(WEIGHTS), layout.put({"x": IMAGES}))
    weights, second = step(weights, layout.put({"x": IMAGES[::-1].copy()}))
    for ours, expected in zip(
        jax.tree.leaves((weights, first, second)), jax.tree.leaves(on_one_device), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    double = layout.map(lambda scale, batch: scale * batch["x"])
    np.testing.assert_array_equal(double(jnp.float32(2), {"x": IMAGES[:5]}), 2 * IMAGES[:5])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["this jax has no pmap; shard_map is used, the results agree"]


@pytest.mark.parametrize("devices", [0, 5, -1])
def test_a_wrong_number_of_devices_is_refused(devices):
    with pytest.raises(ValueError, match=f"num_devices={devices}, but there are 4"):
        Parallel.create(num_devices=devices)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of .*'shard_map'.*got 'xmap'"):
        Parallel.create(kind="xmap")
    with pytest.raises(ValueError, match="kind must be one of"):
        Parallel(jax.devices(), "xmap")
    with pytest.raises(ValueError, match="devices is empty"):
        Parallel(())


def test_devices_may_be_a_list():
    layout = Parallel(jax.devices()[:2])
    assert {layout: 1}[Parallel.create(num_devices=2)] == 1


@pytest.mark.parametrize("size", [0, 3, 6])
def test_a_batch_that_does_not_divide_is_refused(size):
    layout = Parallel.create(num_devices=4)
    with pytest.raises(ValueError, match=f"a batch of {size} does not divide over 4 devices"):
        layout.put({"x": IMAGES[:size]})


def test_prefetch_keeps_the_order():
    assert list(parallel.prefetch(iter(range(20)), depth=3)) == list(range(20))
    assert list(parallel.prefetch([])) == []


def test_running_ahead_without_a_limit_is_refused():
    """A queue takes 0 for no limit: the thread would read until memory is full."""
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        next(parallel.prefetch(itertools.count(), depth=0))


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
    produced = []

    def items():
        for i in range(1000):
            produced.append(i)
            yield i

    stream = parallel.prefetch(items(), depth=2)
    assert next(stream) == 0
    time.sleep(0.3)
    assert len(produced) <= 1 + 2 + 1  # taken, waiting in the queue, in the thread's hand
    stream.close()
    deadline = time.time() + 5
    while any(t.name == "prefetch" for t in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(t.name == "prefetch" for t in threading.enumerate())
    assert len(produced) <= 5


def test_who_closes_prefetch_waits_until_its_iterator_is_closed():
    """Else what it started outlives the run, and ends with it in the wrong order."""
    closed = []

    def items():
        try:
            while True:
                time.sleep(0.2)
                yield threading.current_thread().name
        finally:
            closed.append(threading.current_thread().name)

    stream = parallel.prefetch(items(), depth=1)
    assert next(stream) == "prefetch"
    stream.close()
    assert closed == ["prefetch"]


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_calls_that_exchange_values_do_not_lock_up(kind):
    """Without a limit on calls in flight this never ends."""
    two = Parallel.create(num_devices=2, kind=kind)

    def step(state, batch):
        x = batch["x"]
        for _ in range(6):
            x = jnp.tanh(x @ state)
        gram = parallel.average(x.T @ x / len(x), two.axis_name)
        return state + 1e-3 * gram, jnp.mean(gram)

    compiled, state = two.compile(step), two.replicate(0.5 * jnp.eye(400))
    images = np.random.default_rng(0).normal(size=(256, 400)).astype(np.float32)
    batch, values = two.put({"x": images}), []
    for _ in range(300):
        state, value = compiled(state, batch)
        values.append(value)
    assert np.isfinite(jax.device_get(values)).all()
