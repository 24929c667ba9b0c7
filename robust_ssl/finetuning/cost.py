"""What a training step costs, measured beside the steps it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from robust_ssl.xla import MOST_MEMORY_MAPS, release_programs

_MOST_ALIVE = 50_000  # memory maps; Linux gives a process 65,530
_MAPS_OF_STEP = 2_500  # that of a ResNet-18 takes 850

Step = Callable[[Any, Any], tuple[Any, Any]]


class Cost(NamedTuple):
    """What one step costs.

    Attributes:
      seconds_per_step: Wall time, the median over rounds.
      peak_bytes: Memory that the compiled step plans on one device; None where that is unknown.
    """

    seconds_per_step: float
    peak_bytes: int | None


def measure(
    steps: Mapping[str, Step],
    states: Mapping[str, Any],
    batch: Any,
    *,
    rounds: int = 3,
    steps_per_round: int = 3,
    warmup: int = 1,
    memory: bool = True,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Cost]:
    """Measures several steps in turn, so that the drift of a noisy machine falls on all alike.

    A round times `steps_per_round` updates of the first step, then of the second, and so on
    (a, b, c, a, b, c, ...).  Every state goes on from where its last round ended.

    Args:
      steps: Name to ``step(state, batch) -> (state, info)``, as `Parallel.compile` returns.
      states: Name to the state before its first update.  Where a step donates its state, this
        one is gone afterwards.
      batch: The batch of every update, as `Parallel.put` leaves it.
      rounds: How often all are timed; the median counts.
      steps_per_round: Updates in a timing; the clock is read when the last one has ended.
      warmup: Updates of each step before the first round, not timed: they compile.  At least 1.
      memory: Whether to ask for `planned_bytes`, which compiles a step that cannot be lowered once
        more.
      before_each: Called before each compilation and each timing.  What it raises ends the
        measurement: a wish to stop, for example.

    Returns:
      Name to cost, in the order of `steps`.

    Raises:
      ValueError: If the names of `steps` and `states` differ, or a number is below 1.

    Example:
      >>> step = jax.jit(lambda state, batch: (state + batch.sum(), {}))
      >>> costs = measure({"sum": step}, {"sum": jnp.zeros(())}, jnp.ones(4))
      >>> costs["sum"].seconds_per_step > 0
      True
    """
    if set(steps) != set(states):
        raise ValueError(f"steps are {sorted(steps)}, but states are {sorted(states)}")
    numbers = {"rounds": rounds, "steps_per_round": steps_per_round, "warmup": warmup}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    peak_bytes = {}
    for name, step in steps.items():
        before_each()
        peak_bytes[name] = planned_bytes(step, states[name], batch) if memory else None
        release_programs(_room(len(steps)))  # all steps are alive at once from here on
    states = dict(states)

    def timed(name: str, count: int) -> float:
        before_each()
        # What is still under way on the device would be counted as this step's.
        state = jax.block_until_ready(states[name])
        start = time.perf_counter()
        for _ in range(count):
            state, info = steps[name](state, batch)
        jax.block_until_ready((state, info))
        states[name] = state
        return (time.perf_counter() - start) / count

    # All compile here, before a round counts.
    for name in steps:
        timed(name, warmup)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in steps:
            seconds[name].append(timed(name, steps_per_round))
    return {name: Cost(statistics.median(seconds[name]), peak_bytes[name]) for name in steps}


def _room(steps: int) -> int:
    """The memory maps that may be taken before so many steps are compiled."""
    return min(MOST_MEMORY_MAPS, max(MOST_MEMORY_MAPS // 4, _MOST_ALIVE - steps * _MAPS_OF_STEP))


def planned_bytes(step: Step, state: Any, batch: Any) -> int | None:
    """Returns the memory that a compiled step plans on one device, bytes; nothing is run.

    Arguments, results and temporaries as XLA has laid them out, less what results share with
    donated arguments.  That is the same in every run, and belongs to this step alone: the
    ``peak_bytes_in_use`` of a device is the highest of everything the process has ever run.  Not
    in it: constants compiled into the program (on some platforms), what a library takes for
    itself while a convolution runs, and a training set that lies on the device but is no argument.

    Args:
      step: A compiled function (`jax.stages.Compiled`), one with ``lower``, such as `jax.jit` and
        `Parallel.compile` return, which keeps what is compiled here for its calls, or any function
        that JAX can trace, which is compiled for this question only.  A donation inside the last
        kind is not seen, so its number is higher.
      state: As the step takes it.
      batch: As the step takes it.

    Returns:
      Bytes, or None where the backend does not say or the step cannot be traced.

    Example:
      >>> step = jax.jit(lambda state, batch: (state + batch.sum(), {}))
      >>> planned_bytes(step, jnp.zeros(()), jnp.ones(4)) >= 4 + 16 + 4  # in: 20 bytes, out: 4
      True
    """
    if not hasattr(step, "memory_analysis"):
        lowerable = step if hasattr(step, "lower") else jax.jit(step)
        try:
            step = lowerable.lower(state, batch).compile()
        except (TypeError, jax.errors.JAXTypeError):  # it looks at values: plain Python
            return None
    plan = step.memory_analysis()
    if plan is None:
        return None
    # A donated argument and the result in its place are one piece of memory.
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )
