"""What was saved comes back bit for bit, or not at all; what was done is not done twice."""

import gc
import json
import os
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from robust_ssl.parallel import Parallel
from robust_ssl.types import TrainState
from robust_ssl.workdir import (
    ConfigChangedError,
    DamagedTreeError,
    WorkdirError,
    WrongTreeError,
    arrays,
    check_layout,
    open_stage,
    read_tree,
)

# Where one array cannot be read, orbax drops the coroutines that read the others.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _collect_dropped_coroutines():
    yield
    gc.collect()  # here, and not in the middle of another module's test


@pytest.fixture
def stage(tmp_path):
    with open_stage(tmp_path, "stage1", {"epochs": 2}, {}, seed=0) as stage:
        yield stage


def _state(step: int) -> TrainState:
    bits = np.arange(300, dtype=np.uint32) * 2654435761 + step  # NaNs and denormals among them
    return TrainState(
        step=jnp.int32(step),
        variables={"params": {"w": jnp.asarray(bits.view(np.float32).reshape(10, 30))}},
        opt_state=(None, {"m": jnp.full((3,), step, jnp.bfloat16)}, ()),
        counters={"skipped": jnp.zeros((), jnp.int32), "mask": jnp.array([True, False])},
    )


def _bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _flip_one_bit(step_directory) -> None:
    files = [f for f in (step_directory / arrays.TREE).rglob("d/*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)


def test_a_state_comes_back_bit_for_bit_with_its_structure(stage):
    state = _state(5)
    stage.save(5, state)
    stage.wait()
    step, restored = stage.restore_latest(jax.tree.map(jnp.zeros_like, state))
    assert step == 5
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert _bits(restored) == _bits(state)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(state)]
    assert not restored.step.committed  # free to join others on any devices, as it was


def test_the_last_two_states_are_kept_and_nothing_saved_is_none(stage):
    assert stage.restore_latest(_state(0)) is None
    for step in (1, 2, 3, 3):
        stage.save(step, _state(step))
    stage.wait()
    names = sorted(entry.name for entry in stage.checkpoints.iterdir())
    assert names == ["2", "3"]
    assert stage.restore_latest(_state(0))[0] == 3


def test_a_flipped_bit_falls_back_to_the_state_before(stage, caplog):
    for step in (1, 2):
        stage.save(step, _state(step))
    stage.wait()
    _flip_one_bit(stage.checkpoints / "2")
    step, restored = stage.restore_latest(_state(0))
    assert step == 1
    assert _bits(restored) == _bits(_state(1))
    assert "damaged" in caplog.text and "damaged-2" in caplog.text
    assert (stage.path / "damaged-2").is_dir()
    stage.save(2, _state(2))  # the step can be saved again
    stage.wait()
    assert _bits(stage.restore_latest(_state(0))[1]) == _bits(_state(2))


def test_no_single_flip_in_any_file_restores_wrong_values(tmp_path):
    with open_stage(tmp_path, "s", {}, {}, seed=0) as stage:
        for step in (1, 2):
            stage.save(step, _state(step))
    files = sorted(f for f in (stage.checkpoints / "2").rglob("*") if f.is_file())
    for file in files:
        original = file.read_bytes()
        for place in {len(original) // 3, len(original) - 1} if original else ():
            data = bytearray(original)
            data[place] ^= 16
            file.write_bytes(data)
            try:
                restored = read_tree(stage.checkpoints / "2", _state(0))
            except Exception:
                continue  # noticed
            assert _bits(restored) == _bits(_state(2)), file
        file.write_bytes(original)


def test_when_no_state_is_intact_nothing_is_moved_and_the_way_out_is_named(stage):
    stage.save(1, _state(1))
    stage.wait()
    _flip_one_bit(stage.checkpoints / "1")
    with pytest.raises(DamagedTreeError, match=r"step 1: .*\n.*remove"):
        stage.restore_latest(_state(0))
    assert (stage.checkpoints / "1").is_dir()


def test_another_tree_fails_naming_every_difference(stage):
    stage.save(1, {"a": jnp.zeros(3), "b": {"c": jnp.zeros(2)}})
    stage.wait()
    like = {"a": jnp.zeros(4), "b": {"c": jnp.zeros(2, jnp.bfloat16)}, "d": jnp.zeros(1)}
    with pytest.raises(WrongTreeError) as caught:
        stage.restore_latest(like)
    message = str(caught.value)
    assert "a: float32[3] on disk, float32[4] asked for" in message
    assert "b/c: float32[2] on disk, bfloat16[2] asked for" in message
    assert "d: missing on disk" in message
    with pytest.raises(WrongTreeError, match="b/c: on disk, but not asked for"):
        stage.restore_latest({"a": jnp.zeros(3)})


def test_a_state_of_two_devices_is_restored_on_one(stage):
    two, one = Parallel.create(num_devices=2), Parallel.create(num_devices=1)
    values = jnp.arange(8.0)
    sharded = jax.device_put(values, jax.NamedSharding(two.mesh, P("devices")))
    stage.save(1, {"sharded": sharded, "whole": two.replicate(values)})
    stage.wait()
    leaf = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=one.replicated)
    _, restored = stage.restore_latest({"sharded": leaf, "whole": leaf})
    for array in restored.values():
        assert array.sharding == one.replicated
        assert array.tolist() == values.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "complex64"])
def test_the_checksum_ignores_the_sharding_and_agrees_with_python_integers(dtype):
    x = np.asarray(np.arange(24).reshape(8, 3) % 5, jnp.dtype(dtype))
    word = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    words = [int(w) for w in x.reshape(-1).view(word)]
    expected = sum(w * (2 * i + 1) for i, w in enumerate(words)) % 2**32
    two = Parallel.create(num_devices=2)
    for array in (jnp.asarray(x), jax.device_put(x, jax.NamedSharding(two.mesh, P("devices")))):
        assert int(arrays._checksum(array)) == expected
    assert arrays._checksum_on_host(x) == expected


def test_a_donated_buffer_does_not_reach_the_disk(stage):
    update = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros(200_000)
    stage.save(1, {"w": w})
    for _ in range(5):
        w = update(w)
    stage.wait()
    assert float(stage.restore_latest({"w": w})[1]["w"].sum()) == 0


def test_keys_and_numbers_are_refused_by_path(stage):
    with pytest.raises(TypeError, match="a/key is a random key"):
        stage.save(1, {"a": {"key": jax.random.key(0)}})
    with pytest.raises(TypeError, match=r"lr is 0\.1; only arrays"):
        stage.save(1, {"lr": 0.1})


def test_a_finished_stage_is_done_and_keeps_its_results(tmp_path):
    result = {"accuracy": 0.5, "bad": float("nan"), "per_class": np.ones(2)}
    with open_stage(tmp_path / "new" / "run", "stage1", {"x": (1, 2)}, {"d": "f"}, 3) as stage:
        assert not stage.done
        with pytest.raises(ValueError, match="not finished"):
            _ = stage.fingerprint
        time.sleep(0.002)  # seconds are kept to a thousandth
        stage.finish(result, "identity")
    again = open_stage(tmp_path / "new" / "run", "stage1", {"x": [1, 2]}, {"d": "f"}, 3)
    assert again.done
    assert again.results == {"accuracy": 0.5, "bad": None, "per_class": [1.0, 1.0]}
    assert again.fingerprint == "identity"
    manifest = json.loads((again.path / "manifest.json").read_text())
    assert manifest["schema"] == 2 and manifest["status"] == "done" and manifest["seed"] == 3
    assert manifest["devices"] == {"platform": "cpu", "count": 4, "kind": "cpu"}
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["finished"] >= manifest["started"] and manifest["seconds"] > 0


def _everything(path) -> dict:
    return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in path.rglob("*")}


def test_another_config_is_refused_with_the_difference_and_nothing_changes(tmp_path):
    config = {"attack": {"epsilon": 0.1}, "old": 1}
    with open_stage(tmp_path, "stage1", config, {"data": "aa"}, seed=0) as stage:
        stage.save(1, {"w": jnp.ones(2)})
    before = _everything(tmp_path)
    with pytest.raises(ConfigChangedError) as caught:
        open_stage(tmp_path, "stage1", {"attack": {"epsilon": 0.2}, "new": "x"}, {"data": "bb"}, 1)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "config.attack.epsilon: 0.1 -> 0.2" in lines
    assert 'config.new: (absent) -> "x"' in lines
    assert "config.old: 1 -> (absent)" in lines
    assert 'inputs.data: "aa" -> "bb"' in lines
    assert "seed: 0 -> 1" in lines
    assert "--workdir" in lines[-1]
    assert _everything(tmp_path) == before
    assert open_stage(tmp_path, "stage1", config, {"data": "aa"}, seed=0).manifest["status"] == (
        "running"
    )


def test_another_order_of_rates_is_another_config_where_it_means_something(tmp_path):
    rates = {"encoder/**": 0.1, "**/bias": "freeze", "head/**": 0.2}
    open_stage(tmp_path, "stage1", {"rates": rates}, {}, seed=0).wait()
    same = {"encoder/**": 0.1, "**/bias": "freeze"}  # no path is in both parts
    apart = {"head/**": 0.2} | {"encoder/**": 0.1}
    open_stage(tmp_path, "apart", {"rates": apart}, {}, seed=0).wait()
    open_stage(tmp_path, "apart", {"rates": dict(sorted(apart.items()))}, {}, seed=0).wait()
    for other in ({"head/**": 0.2} | same, dict(sorted(rates.items()))):
        with pytest.raises(ConfigChangedError, match=r"config\.rates, in this order: "):
            open_stage(tmp_path, "stage1", {"rates": other}, {}, seed=0)


@pytest.mark.parametrize("some", ["encoder/block[12]/**", "encoder/block?/**"])
def test_every_wildcard_of_a_pattern_is_one(tmp_path, some):
    rates = {"**": 0.1, some: "freeze", "encoder/block1/**": 0.2}
    open_stage(tmp_path, "stage1", {"rates": rates}, {}, seed=0).wait()
    other = {"**": 0.1, "encoder/block1/**": 0.2, some: "freeze"}
    with pytest.raises(ConfigChangedError, match=r"config\.rates, in this order: "):
        open_stage(tmp_path, "stage1", {"rates": other}, {}, seed=0)


def test_metrics_have_no_nan_no_half_line_and_no_step_twice(stage):
    for step in range(4):
        stage.log(step, loss=jnp.float32(step), norm=float("inf"))
    stage.save(2, {"w": jnp.ones(2)})
    stage.wait()
    with open(stage.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert stage.restore_latest({"w": jnp.ones(2)})[0] == 2
    stage.log(2, loss=9.0)
    assert stage.metrics() == [
        {"step": 0, "loss": 0.0, "norm": None},
        {"step": 1, "loss": 1.0, "norm": None},
        {"step": 2, "loss": 9.0},
    ]


def test_seconds_add_up_over_interruptions(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 100.0, 100.0, 105.0, 105.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    open_stage(tmp_path, "s", {}, {}, seed=0).write_manifest()
    stage = open_stage(tmp_path, "s", {}, {}, seed=0)
    stage.write_manifest()
    assert stage.manifest["seconds"] == 15.0


def test_a_workdir_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="Not a directory"):
        open_stage(tmp_path / "file" / "run", "s", {}, {}, seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_that_cannot_be_written_says_why(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WorkdirError, match="Permission denied"):
        open_stage(tmp_path / "run", "s", {}, {}, seed=0)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '"\\ud800"'])
def test_a_corrupted_manifest_is_named(tmp_path, text):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(WorkdirError, match=r"s/manifest\.json"):
        open_stage(tmp_path, "s", {}, {}, seed=0)


def _stage_of_version_0_1(path) -> None:
    path.mkdir(parents=True)
    manifest = {
        **{"schema": 1, "stage": path.name, "status": "done", "config": {}, "inputs": {}},
        **{"seed": 0, "started": "", "seconds": 1.0},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_stage_of_version_0_1_is_refused_with_the_way_out(tmp_path):
    _stage_of_version_0_1(tmp_path / "stage1")
    before = _everything(tmp_path)
    with pytest.raises(WorkdirError, match=r"has schema 1.*another --workdir.*robust_ssl 0\.1"):
        open_stage(tmp_path, "stage1", {}, {}, seed=0)
    assert _everything(tmp_path) == before


def test_a_workdir_of_version_0_1_is_refused_as_a_whole(tmp_path):
    check_layout(tmp_path / "new")  # need not exist
    for name in ("usual", "stage1", "methods/trades-seed0"):
        _stage_of_version_0_1(tmp_path / name)
    before = _everything(tmp_path)
    with pytest.raises(WorkdirError) as caught:
        check_layout(tmp_path)
    assert "of robust_ssl 0.1: methods/trades-seed0, stage1, usual; take another" in str(
        caught.value
    )
    assert _everything(tmp_path) == before


def test_what_this_version_wrote_and_what_is_no_stage_is_not_refused(tmp_path):
    open_stage(tmp_path, "evaluate", {}, {}, seed=0)
    for name, text in (("notes", "{"), ("weights", '{"schema": 1}'), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    check_layout(tmp_path)
    _stage_of_version_0_1(tmp_path / "another run" / "stage1")  # a run of its own, further down
    check_layout(tmp_path)


def test_saving_leaves_no_thread_behind(stage):
    """Orbax keeps threads of its own; twenty more saves must not add twenty."""
    stage.save(0, {"w": jnp.ones(2)})
    stage.wait()
    before = set(threading.enumerate())
    for step in range(1, 21):
        stage.save(step, {"w": jnp.ones(2)})
    stage.wait()
    end = time.monotonic() + 20  # a thread that has done its work may take a moment to end
    while len(new := set(threading.enumerate()) - before) > 5 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(new) <= 5, sorted(thread.name for thread in new)


def test_a_clock_that_was_set_while_a_state_was_written_is_named(stage):
    """Orbax measures its patience by the wall's clock."""

    class Late:
        def result(self):
            raise TimeoutError("timed out after -172799.99 seconds")

    stage.save(1, _state(1))
    stage.wait()
    for since, cause in ((time.monotonic(), "the clock was set"), (-1e3, "timed out")):
        stage._saving, stage._saving_since = Late(), since
        with pytest.raises(OSError, match=cause):
            stage.wait()


def test_the_last_two_states_are_kept_while_nobody_waits(stage):
    for step in (1, 2, 3):
        stage.save(step, _state(step))
    end = time.monotonic() + 20
    while (stage.checkpoints / "1").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert sorted(entry.name for entry in stage.checkpoints.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("text", ["", "[]", '{"unknown": 1}'])
def test_metadata_that_cannot_be_read_falls_back_to_the_state_before(tmp_path, text):
    with open_stage(tmp_path, "s", {}, {}, seed=0) as stage:
        for step in (1, 2):
            stage.save(step, _state(step))
    (stage.checkpoints / "2" / "_CHECKPOINT_METADATA").write_text(text)
    with open_stage(tmp_path, "s", {}, {}, seed=0) as stage:
        step, restored = stage.restore_latest(_state(0))
    assert step == 1
    assert _bits(restored) == _bits(_state(1))


def test_a_save_that_fails_is_an_error_and_the_one_before_is_still_there(stage):
    state = {"w": jax.random.normal(jax.random.key(0), 20_000)}
    stage.save(1, state)  # compiles what the second one needs
    stage.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # fails as a full disk does
    try:
        stage.save(2, state)
        with pytest.raises(Exception, match="File too large"):  # OSError or ValueError
            stage.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    step, restored = stage.restore_latest(state)
    assert step == 1
    assert _bits(restored) == _bits(state)


def test_what_a_sudden_end_left_unfinished_is_removed(tmp_path):
    rest = tmp_path / "s" / "checkpoints" / "3.orbax-checkpoint-tmp"
    rest.mkdir(parents=True)
    with open_stage(tmp_path, "s", {}, {}, seed=0) as stage:
        stage.save(1, {"w": jnp.ones(2)})
        assert stage.restore_latest({"w": jnp.ones(2)})[0] == 1
    assert not rest.exists()


def test_a_release_of_orbax_with_its_v1_api_at_the_top_will_do(monkeypatch):
    import orbax.checkpoint

    assert arrays.orbax_v1() is orbax.checkpoint.v1
    monkeypatch.delattr(orbax.checkpoint, "v1")
    assert arrays.orbax_v1() is orbax.checkpoint
