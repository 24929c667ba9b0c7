"""The loop of every training stage: what stops it early, and what is on disk when it breaks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from robust_ssl import data, stopping
from robust_ssl.experiment import loop
from robust_ssl.optimizers.finite import no_skips, take_if_finite
from robust_ssl.parallel import Parallel, average
from robust_ssl.progress import Progress
from robust_ssl.stopping import Stopped
from robust_ssl.types import TrainState
from robust_ssl.workdir import open_stage, read_tree

STEPS = 3  # in an epoch
LOOPS = pytest.mark.parametrize("loop_on_device", [False, True])


def layout():
    return Parallel.create(num_devices=2)


def begin():
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables={"params": {"w": jnp.zeros(2)}},
        opt_state=(),
        counters=no_skips(),
    )


def mean_of_images(nan_from=None, nan_until=None):
    """A step that adds up the batches' means, with a loss of NaN in some steps."""

    def step(state, batch):
        mean = average(jnp.mean(batch["images"].astype(jnp.float32)), layout().axis_name)
        bad = jnp.zeros((), bool)
        if nan_from is not None:
            bad = (state.step >= nan_from) & (state.step < nan_until)
        w = state.variables["params"]["w"] + mean
        metrics = {"loss": jnp.where(bad, jnp.nan, mean), "gradient_norm": mean}
        return take_if_finite(state, {"params": {"w": w}}, (), metrics)

    return step


def go(workdir, step=None, *, epochs=8, scores=None, stop_after=None, **options):
    """Trains in `workdir`; returns the state, the best epoch and the metrics."""
    pixels, labels = tiny.images(n=8 * STEPS)
    batches = data.Batches(
        data.from_arrays(pixels, labels), 8, seed=0, stage="loop", parallel=layout()
    )
    if scores is not None:
        options |= {
            "score": "accuracy",
            "at_epoch_end": lambda epoch, variables: {"accuracy": scores[epoch - 1]},
        }
    with (
        open_stage(workdir, "loop", {}, {}, 0) as stage,
        pytest.MonkeyPatch.context() as m,
    ):
        if stop_after is not None:
            asked = iter(range(1, 1000))
            m.setattr(loop, "stop_requested", lambda: next(asked) >= stop_after)
        state, best = loop.train(
            stage,
            begin(),
            step or mean_of_images(),
            batches,
            epochs=epochs,
            parallel=layout(),
            progress=Progress("quiet"),
            **options,
        )
        return jax.device_get(state), jax.device_get(best), stage.metrics()


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[:2], other[:2])
    assert one[2] == other[2]


# --- Stopping early ---------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize(
    ("scores", "patience", "last", "best"),
    [
        ([0.1, 0.3, 0.2, 0.2, 0.4, 0.5, 0.6, 0.7], 2, 4, 2),
        ([0.1, 0.3, 0.2, 0.2, 0.4, 0.5, 0.6, 0.7], 3, 8, 8),
        ([0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], 2, 3, 3),  # equal is no improvement
        ([0.5, 0.4, 0.5, 0.6, 0.6, 0.5, 0.5, 0.5], 2, 3, 3),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], 1, 2, 1),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], None, 8, 1),
    ],
)
def test_it_stops_when_nothing_improves(scores, patience, last, best, loop_on_device, tmp_path):
    state, found, metrics = go(
        tmp_path, scores=scores, patience=patience, loop_on_device=loop_on_device
    )
    assert int(state.step) == len(metrics) == STEPS * last
    assert int(found.epoch) == best
    assert float(found.score) == np.float32(scores[best - 1])


@LOOPS
@pytest.mark.parametrize(
    ("scores", "images", "best"),
    [
        ([0.19, 0.117, 0.143, 0.14, 0.143], 300, 5),
        ([0.19, 0.117, 0.143, 0.14, 0.143], 3000, 1),
        ([0.19, 0.117, 0.143, 0.14, 0.143], None, 1),
        ([0.2, 0.3, 0.02, 0.01, 0.0], 300, 2),  # catastrophic overfitting
        ([0.4, 0.38, 0.36, 0.34, 0.32], 300, 4),  # each is little below the one before
        ([0.0, 0.0, 0.0, 0.0, 0.0], 300, 5),
        ([1.0, 1.0, 0.99, 0.5, 0.99], 100, 5),
    ],
)
def test_of_epochs_within_chance_the_latest_is_kept(scores, images, best, loop_on_device, tmp_path):
    """The first are of a TRADES: on test images its last epoch has 13 points more."""
    how = {"epochs": 5, "scores": scores, "images": images, "loop_on_device": loop_on_device}
    whole = go(tmp_path / "whole", **how)
    assert int(whole[1].epoch) == best
    assert float(whole[1].score) == np.float32(scores[best - 1])
    assert float(whole[1].highest) == np.float32(max(scores))
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", stop_after=4 if loop_on_device else 10, **how)
    assert_same(go(tmp_path / "stopped", **how), whole)


@pytest.mark.parametrize(("patience_from", "last"), [(0, 2), (2.5, 4), (5, 6), (99, 8)])
def test_some_epochs_cost_no_patience(patience_from, last, tmp_path):
    falling = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    state, best, _ = go(tmp_path, scores=falling, patience=1, patience_from=patience_from)
    assert (int(state.step), int(best.epoch)) == (STEPS * last, 1)


@pytest.mark.parametrize("score", [0.7, 0.8, 1 / 3])
def test_of_equal_epochs_the_later_is_kept_whatever_the_rounding(score, tmp_path):
    assert int(go(tmp_path, scores=[score] * 2, epochs=2)[1].epoch) == 2


@LOOPS
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_resumed_training_stops_at_the_same_epoch(stop_after, loop_on_device, tmp_path):
    options = {
        "scores": [0.1, 0.3, 0.3, 0.2, 0.4, 0.5, 0.6, 0.7],
        "patience": 2,
        "loop_on_device": loop_on_device,
    }
    expected = go(tmp_path / "whole", **options)
    assert int(expected[0].step) == 4 * STEPS
    with pytest.raises(Stopped):
        go(tmp_path / "parts", **options, stop_after=stop_after)
    assert_same(go(tmp_path / "parts", **options), expected)


@pytest.mark.parametrize("last", [0, 2])
def test_where_the_batches_end_by_the_signal_the_state_is_saved(last, tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", epochs=2)
    read = data.Batches.__call__

    def ended(batches, step):
        if step == last:
            stopping.request_stop()
            raise RuntimeError("Worker process was terminated unexpectedly")
        return read(batches, step)

    with monkeypatch.context() as m:
        m.setattr(data.Batches, "__call__", ended)
        with pytest.raises(Stopped, match=f"stopped after step {last} of 6"):
            go(tmp_path / "parts", epochs=2)
    stopping.clear_stop()
    assert_same(go(tmp_path / "parts", epochs=2), whole)


def test_a_stop_at_the_last_epoch_is_not_overrun(tmp_path):
    options = {"scores": [0.5, 0.4, 0.9, 0.9], "patience": 1, "epochs": 4}
    expected = go(tmp_path / "whole", **options)
    with pytest.raises(Stopped):  # asked in the very step after which patience is lost
        go(tmp_path / "parts", **options, stop_after=2 * STEPS)
    assert_same(go(tmp_path / "parts", **options), expected)


@pytest.mark.parametrize("options", [{"patience": 0, "scores": [0.1]}, {"patience": 2}])
def test_patience_needs_a_number_and_a_score(options, tmp_path):
    with pytest.raises(ValueError, match=r"a patience of at least 1 epoch and a score"):
        go(tmp_path, epochs=1, **options)


# --- Updates that are not finite --------------------------------------------------------------


@LOOPS
def test_a_bad_update_is_skipped_and_counted(loop_on_device, tmp_path):
    state, _, metrics = go(tmp_path, mean_of_images(4, 6), epochs=3, loop_on_device=loop_on_device)
    assert {name: int(n) for name, n in state.counters.items()} == {
        "skipped": 2,
        "skipped_in_a_row": 0,
    }
    assert [line["skipped"] for line in metrics] == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert [line["loss"] is None for line in metrics] == [n in (4, 5) for n in range(9)]
    added = sum(line["gradient_norm"] for line in metrics if not line["skipped"])
    np.testing.assert_allclose(state.variables["params"]["w"], added, rtol=1e-5)


@LOOPS
def test_too_many_stop_the_run_and_the_last_good_state_is_kept(loop_on_device, tmp_path):
    options = {"epochs": 20, "loop_on_device": loop_on_device}
    good = go(tmp_path / "good", epochs=2)[0]  # six updates
    broken = mean_of_images(6, 30)
    kept = tmp_path / "bad" / "loop" / "checkpoints" / "27"
    with pytest.raises(FloatingPointError) as caught:  # 21 skipped, seen where an epoch ends
        go(tmp_path / "bad", broken, **options)
    for part in ("the last 21 updates up to step 27", "lower the learning rate", str(kept)):
        assert part in str(caught.value)
    state = read_tree(kept / "default" if (kept / "default").exists() else kept)["state"]
    np.testing.assert_array_equal(state["variables"]["params"]["w"], good.variables["params"]["w"])
    assert state["counters"] == {"skipped": 21, "skipped_in_a_row": 0}

    # The same command goes on: three more are skipped, then it recovers.
    state, _, metrics = go(tmp_path / "bad", broken, **options)
    assert int(state.step) == len(metrics) == 60
    assert int(state.counters["skipped"]) == 24
    assert [line["step"] for line in metrics] == list(range(60))
    added = sum(line["gradient_norm"] for line in metrics if not line["skipped"])
    np.testing.assert_allclose(state.variables["params"]["w"], added, rtol=1e-5)


def test_a_resumed_run_has_its_full_limit_again(tmp_path):
    broken = mean_of_images(0, 1000)
    for first in (0, 21):
        with pytest.raises(
            FloatingPointError, match=f"the last 21 updates up to step {first + 21}"
        ):
            go(tmp_path, broken, epochs=100)


def test_a_training_that_ends_stuck_never_counts_as_done(tmp_path):
    for _ in range(2):  # nothing is left to go on with
        with pytest.raises(FloatingPointError, match="the last 21 updates up to step 27") as caught:
            go(tmp_path, mean_of_images(6, 1000), epochs=9)
        assert "goes on" not in str(caught.value)
        assert str(tmp_path / "loop" / "checkpoints" / "27") in str(caught.value)


def test_the_best_epoch_is_kept_too(tmp_path):
    options = {"epochs": 20, "scores": [0.1, 0.9] + [0.2] * 18}
    with pytest.raises(FloatingPointError):
        go(tmp_path, mean_of_images(6, 30), **options)
    _, best, _ = go(tmp_path, mean_of_images(6, 30), **options)
    assert int(best.epoch) == 2
    assert optax.tree.norm(best.variables) > 0


@LOOPS
def test_a_training_that_was_mostly_skipped_is_never_finished(loop_on_device, tmp_path):
    options = {"epochs": 4, "loop_on_device": loop_on_device}  # 12 steps, 7 of them bad
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="7 of its 12 updates were skipped"):
            go(tmp_path, mean_of_images(2, 9), **options)
    with pytest.raises(FloatingPointError, match="all its 12 updates were skipped"):
        go(tmp_path / "nan", mean_of_images(0, 12), **options)


def test_tries_without_progress_are_counted_and_come_to_an_end(tmp_path):
    broken = mean_of_images(0, 1000)
    for tries in (1, 2, 3):
        with pytest.raises(FloatingPointError, match=f"up to step {21 * tries}") as caught:
            go(tmp_path, broken, epochs=100)
        assert ("goes on" in str(getattr(caught.value, "__notes__", ""))) == (tries < 3)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="3 tries ended without one finite update"):
            go(tmp_path, broken, epochs=100)


def test_a_finite_update_between_begins_the_count_again(tmp_path):
    def step(state, batch):  # one good update in 24
        return mean_of_images(0, 1000 * (state.step % 24 != 0))(state, batch)

    for _ in range(4):
        with pytest.raises(FloatingPointError, match="the last 2"):
            go(tmp_path, step, epochs=100)
