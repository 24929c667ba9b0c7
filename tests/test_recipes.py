"""Every recipe of ``configs/compare.py``: a few steps of it are the same on any devices."""

import functools
import pathlib

import jax
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from robust_ssl import experiment, optimizers, settings
from robust_ssl.experiment import fitting, train
from robust_ssl.experiment.linking import entries_of
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress

# Two compilations for each of some thirty recipes.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_programs")]
STEPS, BATCH = 2, 8
# Sums differ by 1e-7 between layouts.  Where a gradient is that small, the sign of a pixel's step
# differs, and the weights by up to 3e-5.  A mean over devices that is forgotten moves them by 0.09.
ATOL, RTOL = 2e-4, 1e-3


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_half_the_time():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # nothing compiled so is met by another test, whose sums it would round


@functools.cache
def plan():
    """The config with a tiny encoder: its taps have names, and no places among the blocks."""
    config = settings.load_config(str(tiny.CONFIGS / "compare.py")).unlock()
    config.encoder = {"function": "tiny:encoder"}
    config.surrogate = {"function": "tiny:unlabelled"}
    config.downstream = {"function": "tiny:images", "validation": 0.25}
    entries = settings.to_json(config)
    entries["recipes"] = {name: small(value) for name, value in entries["recipes"].items()}
    return experiment.plan(entries)


def small(value):
    """A recipe with few steps, on the tiny encoder's taps."""
    recipe = dict(entries_of(value, {"epochs": 2}, "recipe"))
    if recipe["members"]:  # which have all that it has
        return recipe
    recipe.update(batch_size=BATCH, encoder=None)  # a shipped encoder wants images of 32x32
    attack = recipe["attack"] or {}
    if attack.get("num_steps", 1) > 2:
        attack["num_steps"] = 2
    if "layer" in attack:
        attack["layer"] = "conv1"
    for loss in recipe["losses"].values():
        if "layers" in loss:
            loss["layers"] = ("conv1",)
    return recipe


def rates_of(recipe):
    if recipe.select is None:
        return recipe.rates
    return {"**": "freeze", "encoder/conv2/**": recipe.select.rate}


def trained():
    """The names of all recipes that take a step, but for those whose step another has."""
    names = [name for name, recipe in plan().recipes.items() if recipe.is_trained]
    return [name for name in names if name not in ALIKE]


# `gen_af` without its guard, and ramps: test_ramp.py and test_step_options.py are about those.
ALIKE = ("gen_af_unguarded", "ramp_fgsm", "ramp_pgd", "ramp_pgd2", "ramp_nfgsm", "ramp_ema")
ALIKE += ("ramp_from_start", "ramp_teacher")


def gradient_descent(rate, *, weight_decay, decay, steps_per_epoch, total_steps):
    """Adam divides a gradient by its size, and so makes a step of rounding where it is zero."""
    del decay, steps_per_epoch, total_steps
    # Not more than a step can take: a loss that explodes makes large differences of rounding, too.
    clip = optax.clip_by_global_norm(0.3)
    return optax.chain(optax.add_decayed_weights(weight_decay), clip, optax.sgd(100 * rate))


def context(kind, devices):
    layout = Parallel.create(num_devices=devices, kind=kind)
    return experiment.Context(plan(), pathlib.Path("nowhere"), layout, Progress("quiet"))


def build(run, name):
    recipe = run.plan.recipes[name]
    return fitting.build_step(
        *(run, name, recipe, train.untrained(run, recipe), train.public_encoder(run, recipe)),
        rates=rates_of(recipe),
        steps_per_epoch=1,
        seed=0,
        teacher=train.untrained_teacher(run, recipe),
    )


@functools.cache
def after_steps(name, kind, devices):
    """Returns the variables by path, and the metrics of each step."""
    run = context(kind, devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers.finetuning, "adam_l2", gradient_descent)
        state, step = build(run, name)
    compiled = run.parallel.compile(step.function, constants=run.parallel.replicate(step.settings))
    state, history = run.parallel.replicate(state), []
    for number in range(STEPS):
        images, labels = tiny.images(n=STEPS * BATCH)
        rows = slice(number * BATCH, (number + 1) * BATCH)
        batch = {"images": images[rows], "labels": labels[rows].astype(np.int32)}
        batch["indices"] = np.arange(BATCH, dtype=np.int32)
        state, metrics = compiled(state, run.parallel.put(batch))
        history.append(jax.device_get(metrics))
    return flatten_dict(jax.device_get(state.variables), sep="/"), history


def assert_same(ours, expected):
    (variables, metrics), (wanted, wanted_metrics) = ours, expected
    assert variables.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(variables[path], leaf, atol=ATOL, rtol=0, err_msg=path)
    for step, wanted_step in zip(metrics, wanted_metrics, strict=True):
        assert step.keys() == wanted_step.keys()
        for name, value in wanted_step.items():
            np.testing.assert_allclose(step[name], value, rtol=RTOL, atol=ATOL, err_msg=name)


def test_every_recipe_that_trains_is_looked_at():
    left = set(plan().recipes) - set(trained()) - set(ALIKE)
    assert left == {"jpeg", "quantized", "smoothed", "ensemble"} and len(trained()) >= 25


def layout_of(name):
    """Another layout than one device: half of the recipes have one, half the other."""
    return (("pmap", 4), ("shard_map", 2))[trained().index(name) % 2]


@pytest.mark.parametrize("name", trained())
def test_a_recipe_is_the_same_on_one_device_and_on_several(name):
    one = after_steps(name, "jit", 1)
    assert_same(after_steps(name, *layout_of(name)), one)
    # And something happened: what has a rate moved, what has none is bit by bit what it was.
    variables, metrics = one
    recipe = plan().recipes[name]
    start = train.untrained(context("jit", 1), recipe).variables
    rates = optimizers.layer_rates(start["params"], rates_of(recipe))
    for path, leaf in flatten_dict(start["params"], sep="/").items():
        same = np.asarray(leaf).tobytes() == variables[f"params/{path}"].tobytes()
        if rates[path] == "freeze":
            assert same, path
        elif "kernel" in path:
            assert not same, path
    assert [float(m["skipped"]) for m in metrics] == [0.0] * STEPS


# What differs between layouts: statistics of the batch and pairs of images (Gen-AF), perturbations
# in the state (universal, FreeAT), what an optimizer holds or pulls to, bands.
@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        ("gen_af_stage1", "pmap", 2),
        ("gen_af_stage1", "shard_map", 4),
        ("universal_shallow", "jit", 4),
        ("free_at", "pmap", 2),
        ("l2_sp", "shard_map", 4),
        ("pruned", "pmap", 2),
        ("universal_band", "pmap", 2),
        ("warm_fgsm", "shard_map", 4),
    ],
)
def test_a_recipe_is_the_same_on_any_layout(name, kind, devices):
    assert_same(after_steps(name, kind, devices), after_steps(name, "jit", 1))


def test_steps_of_all_seeds_are_one_computation_unless_they_hold_first_weights():
    run = context("pmap", 2)

    def computation(name, seed, **more):
        recipe = run.plan.recipes[name]
        start = train.untrained(run, recipe, seed)
        how = {"rates": rates_of(recipe), "steps_per_epoch": 1, "seed": seed, **more}
        made = fitting.build_step(
            *(run, name, recipe, start, train.public_encoder(run, recipe)), **how
        )
        return made[1].computation

    first = computation("full", 0)
    assert computation("full", 1) is first
    assert computation("full", 0, steps_per_epoch=2) is not first
    assert computation("full", 0, rates={"**": 1e-2}) is not first
    assert computation("l2_sp", 0) is not computation("l2_sp", 0)
