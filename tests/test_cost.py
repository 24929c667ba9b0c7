"""Cost: the order of measuring, the median, and memory that XLA itself has planned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl.finetuning import cost
from robust_ssl.finetuning.cost import Cost, measure, planned_bytes
from robust_ssl.parallel import KINDS, Parallel, average


class Clock:
    """Time that passes only when a step says so."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(cost.time, "perf_counter", lambda: self.now)

    def step(self, name, seconds):
        durations = iter(seconds)

        def step(state, batch):
            self.calls.append((name, state))
            self.now += next(durations)
            return state + 1, {}

        return step


def test_steps_are_timed_in_turn_and_the_median_round_counts(monkeypatch):
    clock = Clock(monkeypatch)
    steps = {  # compiling, then three rounds of two
        "a": clock.step("a", [100.0, 1.0, 3.0, 50.0, 50.0, 2.0, 4.0]),
        "b": clock.step("b", [200.0, 5.0, 5.0, 6.0, 6.0, 7.0, 7.0]),
    }
    costs = measure(steps, {"a": 0, "b": 10}, None, steps_per_round=2, memory=False)
    assert costs == {"a": Cost(3.0, None), "b": Cost(6.0, None)}
    assert "".join(name for name, _ in clock.calls) == "ab" + 3 * "aabb"
    assert [state for name, state in clock.calls if name == "b"] == list(range(10, 17))


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_who_asks_to_stop_waits_for_one_timing(monkeypatch, number):
    clock, asked = Clock(monkeypatch), []

    def stop_at():
        asked.append(len(clock.calls))
        if len(asked) == number:
            raise InterruptedError

    steps = {name: clock.step(name, [1.0] * 9) for name in "ab"}
    with pytest.raises(InterruptedError):
        measure(steps, {"a": 0, "b": 0}, None, memory=False, before_each=stop_at)
    # Two compilations, two first updates, and timings of three updates.
    assert asked == [0, 0, 0, 1, 2, 5, 8][:number]


@pytest.mark.parametrize("method", KINDS)
def test_memory_is_known_for_every_way_to_be_parallel(method):
    parallel = Parallel.create(num_devices=2, kind=method)

    def step(state, batch):
        return state + average(jnp.sum(batch["x"] ** 2), parallel.axis_name), {}

    state = parallel.replicate(jnp.zeros((64, 32)))
    batch = parallel.put({"x": np.ones((128, 16), np.float32)})
    costs = measure(
        {"step": parallel.compile(step)}, {"step": state}, batch, rounds=1, steps_per_round=1
    )
    one_device = 4 * (64 * 32 + 64 * 16 + 64 * 32)  # the state, half of the batch, the new state
    assert costs["step"].seconds_per_step > 0
    assert one_device <= costs["step"].peak_bytes < one_device + 64 * 16 * 4 + 1024


def test_temporaries_count_and_donated_memory_counts_once():
    state, size = jnp.eye(64), 64 * 64 * 4

    def longer(state, batch):
        return jnp.tanh(state @ state) @ state, {}

    assert planned_bytes(jax.jit(longer), state, None) >= 3 * size  # in, between, out
    plain = jax.jit(lambda state, batch: (jnp.sin(state), {}))
    donated = jax.jit(lambda state, batch: (jnp.sin(state), {}), donate_argnums=0)
    assert planned_bytes(plain, state, None) >= 2 * size
    assert planned_bytes(donated, state, None) <= planned_bytes(plain, state, None) - size
    compiled = plain.lower(state, None).compile()
    assert planned_bytes(compiled, state, None) == planned_bytes(plain, state, None)


def test_what_xla_does_not_plan_is_unknown():
    def step(state, batch):
        return np.float32(state) + 1, {}  # on the host: nothing that XLA compiles

    costs = measure({"step": step}, {"step": jnp.zeros(())}, None)
    assert costs["step"].peak_bytes is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": {"b": 0}}, "states are"),
        ({"rounds": 0}, "rounds must be"),
        ({"steps_per_round": 0}, "steps_per_round must be"),
        ({"warmup": 0}, "warmup must be"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"steps": {"a": None}, "states": {"a": 0}, "batch": None, **options})
