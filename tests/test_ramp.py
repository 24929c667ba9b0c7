"""Budgets that grow within one training: closed forms, and equality with the phases one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from finetuning_steps import KEY, SmoothStep, assert_same, batches, tiny
from tiny_recipes import ON_ADVERSARIAL, PGD_AT, context, final, go, manifest

from robust_ssl import attacks, experiment, finetuning, losses, threats
from robust_ssl.experiment import costs, forecast, loop
from robust_ssl.finetuning import BudgetSchedule, FreeReplays, init_state, make_step, scaled
from robust_ssl.parallel import Parallel
from robust_ssl.stopping import Stopped

pytestmark = pytest.mark.usefixtures("quick_programs")

slow = pytest.mark.slow
ADVERSARIAL = {"adversarial": (losses.adversarial_cross_entropy, 1.0)}


@pytest.mark.parametrize("stairs", [None, 1, 2, 4])
@pytest.mark.parametrize(("first", "full"), [(0, 0), (0, 7), (3, 3), (2, 9), (9, 10)])
def test_the_schedule_is_its_closed_form(first, full, stairs):
    schedule = BudgetSchedule(first, full, stairs)
    for step in range(12):
        if step < first:
            expected = 0.0
        elif step >= full:
            expected = 1.0
        elif stairs is None:
            expected = (step - first + 1) / (full - first + 1)
        else:
            expected = (int(stairs * (step - first) / (full - first)) + 1) / (stairs + 1)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6), step


def test_what_is_scaled_are_budget_and_step_alone():
    source = tiny("linear").encoder
    pgd = attacks.PGD(threats.Linf(0.2), step_size=0.1)
    band = attacks.PGD(threats.Band(threats.L2(0.5), low=0.1, high=0.3))
    drift = attacks.DriftPGD(threats.Linf(0.2), source=source, step_size=0.1)
    pool = finetuning.UniversalPool(threats.Linf(0.2), clean_share=0.3)
    assert scaled(pgd, 0.5) == pgd.replace(threat=threats.Linf(0.1), step_size=0.05)
    half = scaled(band, 0.5)
    assert half == band.replace(threat=threats.Band(threats.L2(0.25), low=0.1, high=0.3))
    assert scaled(pool, 0.5) == pool.replace(threat=threats.Linf(0.1))
    moved = scaled(drift, 0.5)
    assert (moved.threat.epsilon, moved.step_size) == (0.1, 0.05)
    jax.tree.map(np.testing.assert_array_equal, moved.source, source)


@functools.cache
def net():
    return tiny("linear")


@slow
def test_each_phase_is_the_step_with_that_attack_and_the_optimizer_goes_on():
    attack = attacks.PGD(threats.Linf(0.1), step_size=0.05, num_steps=2, keep_best=False)
    schedule, tx = BudgetSchedule(2, 4), optax.adam(1e-2)
    given = {"key": KEY, "losses": ADVERSARIAL, "batch_statistics": "adversarial"}
    ramp = make_step(net(), tx, attack=attack, budget=schedule, **given)
    whole = make_step(net(), tx, attack=attack, **given)
    clean = make_step(net(), tx, losses={"c": (losses.clean_cross_entropy, 1.0)}, key=KEY)
    ramped, attacked, unattacked = (jax.jit(s.function) for s in (ramp, whole, clean))
    state = init_state(net(), tx)
    for number, batch in enumerate(batches(5)):
        share = float(schedule(number))
        settings = whole.settings.replace(attack=scaled(whole.settings.attack, np.float32(share)))
        if share:
            expected, _ = attacked(state, batch, settings)
        else:
            expected, _ = unattacked(state, batch, clean.settings)
        state, metrics = ramped(state, batch, ramp.settings)
        assert float(metrics["budget"]) == pytest.approx([0, 0, 1 / 3, 2 / 3, 1][number])
        assert_same(state.variables, expected.variables, 1e-6)
        moments = state.opt_state[0], expected.opt_state[0]  # counts and both moments go on
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *moments)


def test_without_a_budget_the_attack_is_not_computed():
    program = jax.make_jaxpr(
        make_step(net(), optax.sgd(0.1), key=KEY, losses=ADVERSARIAL,
                  attack=attacks.PGD(threats.Linf(0.1), num_steps=3, keep_best=False),
                  budget=BudgetSchedule(1, 1), batch_statistics="adversarial")
    )(init_state(net(), optax.sgd(0.1)), batches(1)[0])  # fmt: skip
    [branch] = [e for e in program.jaxpr.eqns if e.primitive.name == "cond"]
    nothing, attack = (str(b) for b in branch.params["branches"])
    assert "conv" in attack and "conv" not in nothing


def test_schedules_that_differ_in_their_steps_share_one_program():
    def program(budget):
        step = make_step(net(), optax.sgd(0.1), key=KEY, losses=ADVERSARIAL, attack=SmoothStep(),
                         budget=budget, batch_statistics="adversarial")  # fmt: skip
        state = init_state(net(), optax.sgd(0.1))
        return jax.jit(step.function).lower(state, batches(1)[0], step.settings).as_text()

    assert program(BudgetSchedule(1, 2)) == program(BudgetSchedule(30, 90))


@slow
@pytest.mark.parametrize(("kind", "devices"), [("pmap", 2)])
def test_a_ramp_does_not_depend_on_the_devices(kind, devices):
    endings = []
    for parallel in (
        Parallel.create(num_devices=1, kind="jit"), Parallel.create(num_devices=devices, kind=kind)
    ):  # fmt: skip
        step = make_step(net(), optax.sgd(0.1), key=KEY, losses=ADVERSARIAL, attack=SmoothStep(),
                         budget=BudgetSchedule(1, 2), batch_statistics="adversarial",
                         axis_name=parallel.axis_name)  # fmt: skip
        compiled, state = parallel.compile(step), init_state(net(), optax.sgd(0.1))
        for batch in batches(3):
            state, metrics = compiled(state, parallel.put(batch))
        assert float(metrics["budget"]) == 1
        endings.append(jax.device_get(state.variables))
    assert_same(*endings, 1e-5)


def test_the_perturbations_of_an_adversary_grow_with_their_budget():
    free, tx = FreeReplays(threats.Linf(0.1), replays=1), optax.sgd(0.1)
    given = {"losses": ADVERSARIAL, "attack": free, "batch_statistics": "adversarial"}
    step = jax.jit(make_step(net(), tx, key=KEY, budget=BudgetSchedule(1, 3), **given))
    state, largest = init_state(net(), tx, free, key=KEY, batch_size=8), []
    for batch in batches(4):
        state, _ = step(state, batch)
        largest.append(float(jnp.abs(state.variables[finetuning.COLLECTION]["deltas"]).max()))
    np.testing.assert_allclose(largest, [0, 0.1 / 3, 0.2 / 3, 0.1], atol=1e-6)


def test_an_attack_without_an_epsilon_has_no_schedule():
    patch = attacks.PGD(threats.Patch(0.1))
    with pytest.raises(ValueError, match=r"scales an attack's epsilon, and .* has none"):
        make_step(net(), optax.sgd(0.1), key=KEY, losses=ADVERSARIAL, attack=patch,
                  budget=BudgetSchedule(1, 2))  # fmt: skip


# ------------------------------------------------------------------------------------- as recipes

HALF = {"start": 0.5, "end": 0.75}
RECIPES = {
    "full": {"best": "last"},
    "ramp": {**PGD_AT, "ramp": HALF, "decay": "cosine", "best": "last"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ramp")
    config = tiny_recipes.config(RECIPES)
    return context(config, workdir), go(config, workdir)["train"]["trained"]


@slow
def test_a_ramp_in_a_run_is_logged_and_counted(trained):
    run, results = trained
    lines = (run.workdir / "recipes" / "ramp-seed0" / "metrics.jsonl").read_text().splitlines()
    shares = [float(line.split('"budget": ')[1].split(",")[0].rstrip("}")) for line in lines]
    np.testing.assert_allclose(shares, [0, 0, 0, 1 / 2, 1, 1])  # 3 and round(4.5) of 6 updates
    ramp = results["ramp-seed0"]
    # Three of six updates are attacked by two gradients: of two epochs one.
    assert ramp["clean_epochs"] == 1.0 and ramp["gradient_evaluations_per_image"] == 2 + 1 * 2
    assert "clean_epochs" not in results["full-seed0"]
    assert [one.gradients for one in forecast.forecasts(run)] == [2, 4]


@slow
def test_a_ramp_that_was_interrupted_ends_bit_by_bit_the_same(trained, tmp_path, monkeypatch):
    config = tiny_recipes.config({"ramp": RECIPES["ramp"]})
    calls = []

    def stops():
        calls.append(1)
        return len(calls) in (2, 6)  # in the clean phase, and with a part of the budget

    monkeypatch.setattr(loop, "stop_requested", stops)
    for step in (2, 5):
        with pytest.raises(Stopped, match=f"ramp-seed0 stopped after step {step} of 6"):
            go(config, tmp_path)
        calls.append(1)
    go(config, tmp_path)
    ours, theirs = final(tmp_path, "ramp"), final(trained[0].workdir, "ramp")
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


@slow
def test_a_cost_is_that_of_the_clean_steps_and_of_the_attacked_ones(monkeypatch, trained):
    run, results = trained
    planned = run.plan.recipes

    def measure(steps, states, batch, **_):
        seconds = {}
        for name, state in states.items():
            step = int(np.asarray(jax.device_get(state.step)).reshape(-1)[0])
            _, metrics = steps[name](state, batch)
            share = float(np.asarray(metrics.get("budget", 1.0)).reshape(-1)[0])
            seconds[name] = finetuning.Cost(1.0 + 3.0 * share + 0 * step, None)
        return seconds

    monkeypatch.setattr(finetuning, "measure", measure)
    recipes = [planned["full"], planned["ramp"]]
    of = {recipe: results[f"{recipe.name}-seed0"] for recipe in recipes}
    measured = costs._measure_steps(run, recipes, of, lambda: None)
    assert [measured[r].seconds_per_step for r in recipes] == [4.0, 0.5 * 1 + 0.5 * 4]


def test_the_text_of_a_recipe_without_a_ramp_is_what_it_was():
    """So a workdir from before there were ramps goes on."""
    plan = experiment.plan(tiny_recipes.config(RECIPES))
    recipes = plan.recipes
    assert "ramp" not in recipes["full"].text and recipes["ramp"].text["ramp"] == HALF
    again = experiment.plan(plan.text).recipes
    assert {n: r.text for n, r in again.items()} == {n: r.text for n, r in recipes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ramp": {"start": 0.6, "end": 0.4}}, "ramp.end must be at least the start, 0.6, got 0.4"),
        ({"ramp": {"start": 2}}, r"ramp.start must be a number in \[0, 1\)"),
        ({"ramp": {"start": 1.0, "end": 1.0}}, r"ramp.start must be a number in \[0, 1\)"),
        ({"ramp": {"begin": 0}}, "unknown entry 'begin'"),
        ({"ramp": {"stairs": 0}}, "ramp.stairs must be a whole number of at least 1"),
        ({"attack": None, "losses": {"c": f"{tiny_recipes.LOSSES}clean_cross_entropy"},
          "batch_statistics": "clean"}, "there is no attack"),
        ({"attack": {**PGD_AT["attack"], "threat": "robust_ssl.threats:Patch",
                     "epsilon": 0.1}}, "this attack has none"),
        ({"decay": "cosinus"}, r'decay must be a number in \(0, 1\], .* not "cosine" either'),
        ({"decay": 0}, r"decay must be a number in \(0, 1\]"),
    ],
)  # fmt: skip
def test_a_ramp_that_cannot_be_is_refused(change, message):
    recipe = {**ON_ADVERSARIAL, **RECIPES["ramp"], **change}
    with pytest.raises(experiment.UsageError, match=message):
        experiment.plan(tiny_recipes.config({"ramp": recipe}))


def test_a_ramp_that_comes_after_the_last_update_is_refused():
    late = experiment.recipe.Ramp(start=0.96, end=1.0)
    with pytest.raises(ValueError, match="leaves none of the 10 updates attacked"):
        late.schedule(10)
    schedule = late.schedule(20)
    assert [float(schedule(step)) for step in (18, 19)] == [0.0, 0.5]


def test_a_function_s_ramp_is_changed_setting_by_setting():
    config = tiny_recipes.config({"mine": {"function": "test_ramp:ramped", "ramp": {"end": 0.9}}})
    ramp = experiment.plan(config).recipes["mine"].ramp
    assert dataclasses.astuple(ramp) == (0.5, 0.9, None)


def ramped():
    """A recipe by its function."""
    return dict(RECIPES["ramp"])


@slow
def test_the_manifest_keeps_what_was_asked_for(trained):
    kept = manifest(trained[0].workdir, "recipes/ramp-seed0")["config"]["recipe"]
    assert kept["ramp"] == HALF and kept["decay"] == "cosine"
