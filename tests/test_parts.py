"""A batch in parts, and blocks computed again: the same numbers, and less memory."""

import json
import logging
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from finetuning_steps import SmoothStep, assert_same, batches, run, tiny

from robust_ssl import losses, models
from robust_ssl.experiment import Recipe, batch_parts, trace, train
from robust_ssl.finetuning import init_state, make_step, mixed_losses, planned_bytes
from robust_ssl.finetuning.outputs import training_outputs
from robust_ssl.finetuning.parts import draws_in_training, rematerialized
from robust_ssl.models.resnet import ResNet
from robust_ssl.parallel import Parallel
from robust_ssl.types import Encoder

TX = optax.sgd(0.1)
CLEAN = mixed_losses(0.0)


def vit(depth=2):
    encoder = models.vision_transformer(
        jax.random.key(0), width=8, heads=2, depth=depth, patch_size=4, image_size=8
    )
    return models.classifier(jax.random.key(1), encoder, 3, head="linear")


def around(module, dim):
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    encoder = Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size=8, dim=dim)
    return models.classifier(jax.random.key(1), encoder, 3, head="linear")


class Dropped(nn.Module):
    """A network with dropout."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(4)(x), {}


def between_images(inputs):
    """A loss that no part could tell: each image against all others, at a tap."""
    tap = inputs.adversarial.taps["block1"].mean(axis=1)
    return jnp.sum((tap[:, None] - tap[None]) ** 2, axis=(1, 2))


def assert_equal_runs(net, others, **arguments):
    state, metrics = run(net, TX, batches(2), **arguments)
    for other in others:
        again, measured = run(net, TX, batches(2), **arguments, **other)
        assert_same(again.variables["params"], state.variables["params"], 2e-6)
        for one, two in zip(measured, metrics, strict=True):
            assert one == pytest.approx(two, abs=2e-5)


def test_parts_and_kept_blocks_give_the_numbers_of_the_whole_batch():
    between = {"between": (between_images, 0.1), "robust": (losses.adversarial_cross_entropy, 1.0)}
    assert_equal_runs(
        vit(depth=1),
        [{"accumulate": 2, "remat": True}],
        losses=between,
        attack=SmoothStep(),
        batch_statistics="adversarial",
    )


def test_the_last_block_is_the_last_one_in_parts_and_on_devices():
    def last(inputs):
        return (list(inputs.clean.taps.values())[-1] ** 2).mean(axis=(1, 2))

    net = vit(depth=1)
    names = list(net(jnp.zeros((1, 8, 8, 3))).taps)
    assert names != sorted(names)
    on_two = {"parallel": Parallel.create(num_devices=2)}
    assert_equal_runs(net, [{"accumulate": 2}, on_two], losses={"last": (last, 1.0)})


def test_devices_draw_their_own_dropout():
    net, same = around(Dropped(), 4), jnp.full((2, 2, 8, 8, 3), 0.7)

    def features(images):
        arguments = (net, jax.random.key(0), "clean", None, "devices", 1, images, set())
        return training_outputs(*arguments)[0].features

    [of_all, _] = jax.vmap(features, axis_name="devices")(same)
    assert of_all.shape == (4, 4) and not np.allclose(of_all[:2], of_all[2:])


def test_a_frozen_batch_norm_may_be_run_in_parts():
    arguments = {"losses": CLEAN, "batch_statistics": "frozen"}
    assert_equal_runs(tiny(), [{"accumulate": 2}], **arguments)


def test_kept_blocks_leave_gradients_and_batch_statistics_as_they_are():
    net = around(ResNet(depths=(1,), width=4), 4)

    @jax.jit
    def of(encoder, images):
        def loss(params):
            with_params = encoder.replace(variables={**encoder.variables, "params": params})
            outputs, statistics = with_params.apply_train(images)
            return jnp.sum(outputs.features**2), statistics

        return jax.grad(loss, has_aux=True)(encoder.variables["params"])

    images = jax.random.uniform(jax.random.key(2), (4, 8, 8, 3))
    for one, two in zip(*(of(m.encoder, images) for m in (net, rematerialized(net))), strict=True):
        assert_same(one, two, 1e-5)


@pytest.mark.slow
def test_parts_take_less_memory():
    def planned(**arguments):
        net = vit(depth=3)
        step = make_step(net, TX, losses=CLEAN, key=jax.random.key(0), **arguments)
        return planned_bytes(jax.jit(step), init_state(net, TX), batches(1, 64)[0])

    # Of `remat` that is no law: XLA on a CPU may keep what it was to compute again.
    assert planned(accumulate=4) < 0.8 * planned()


def test_a_plan_refuses_parts_that_do_not_divide_or_are_about_batch_norm():
    with pytest.raises(ValueError, match="accumulate=3 does not divide batch_size=8"):
        Recipe("mine", batch_size=8, accumulate=3)
    with pytest.raises(ValueError, match="which is about batch norm"):
        Recipe("mine", accumulate=2, batch_statistics="twins")


def refusal(net, **arguments):
    with pytest.raises(ValueError) as refused:
        step = make_step(net, TX, losses=CLEAN, key=jax.random.key(0), **arguments)
        jax.eval_shape(step, init_state(net, TX), batches(1)[0])
    return str(refused.value)


def test_what_parts_would_change_is_refused_with_the_reason():
    normed, dropped = around(ResNet(depths=(1,), width=4), 4), around(Dropped(), 4)
    assert "batch norm" in refusal(normed, accumulate=2)
    assert "dropout" in refusal(dropped, accumulate=2)
    assert "accumulate=3 does not divide the 8 images" in refusal(vit(), accumulate=3)
    assert "Dropped has no field `remat`" in refusal(dropped, remat=True)
    assert draws_in_training(dropped.encoder) and not draws_in_training(vit().encoder)


# --- As few parts as fit ----------------------------------------------------------------------


def test_the_fewest_parts_that_fit_are_taken():
    def plan(parts):
        return 100 + 800 // parts

    assert batch_parts.fewest_parts(8, plan, 900) == (1, 900)
    assert batch_parts.fewest_parts(8, plan, 350) == (4, 300)
    assert batch_parts.fewest_parts(6, plan, 240) == (6, 233)  # 4 and 5 do not divide
    assert batch_parts.fewest_parts(8, lambda parts: None, 1) == (1, None)
    with pytest.raises(ValueError, match=r"plans 9 MiB.*in 8 parts 2 MiB; 1 are there"):
        batch_parts.fewest_parts(8, lambda parts: 2**20 + plan(parts) * 10**4, 2**20)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"accumulate": "automatic"}, 'which is not "auto" either'),
        ({"accumulate": 0}, 'which is not "auto" either'),
        ({"step_bytes": 10**9}, "say that too, or leave it out"),
        ({"accumulate": "auto", "step_bytes": 0}, "step_bytes must be a whole number"),
    ],
)
def test_a_misspelt_choice_of_parts_is_refused(entries, message):
    config = tiny_recipes.config({"mine": {**tiny_recipes.FROZEN, **entries}})
    with pytest.raises(ValueError, match=message):
        tiny_recipes.context(config, None)


def test_a_device_that_does_not_say_its_memory_asks_for_a_number(tmp_path):
    config = tiny_recipes.config({"mine": {**tiny_recipes.FROZEN, "accumulate": "auto"}})
    with pytest.raises(ValueError, match=r"cpu device does not say.*give step_bytes"):
        tiny_recipes.go(config, tmp_path)
    assert not list(tmp_path.glob("recipes/*"))


def test_a_device_that_says_it_leaves_room_for_what_lies_there():
    device = types.SimpleNamespace(
        platform="gpu", process_index=0, memory_stats=lambda: {"bytes_limit": 1000}
    )
    run = types.SimpleNamespace(parallel=types.SimpleNamespace(devices=(device,)))
    assert batch_parts.limit(run, Recipe("mine", accumulate="auto"), beside=100) == 800
    assert batch_parts.limit(run, Recipe("mine", accumulate="auto", step_bytes=7), beside=100) == 7


def test_the_choice_is_made_once_and_kept(tmp_path, monkeypatch, caplog):
    recipe = Recipe("mine", batch_size=8, accumulate="auto", step_bytes=300)
    run = types.SimpleNamespace(parallel=types.SimpleNamespace(devices=(None,)))
    stage = types.SimpleNamespace(path=tmp_path)
    monkeypatch.setattr(batch_parts, "planned", lambda step, state, batch: 100 + 800 // step)
    monkeypatch.setattr(batch_parts, "alone", lambda run: run)
    chosen = (run, stage, recipe, vit(), ())
    with caplog.at_level(logging.INFO, logger="robust_ssl"):
        decided, said = batch_parts.with_parts(*chosen, lambda run, tried: (None, tried.parts))
    assert decided.accumulate == 4 and decided == recipe
    assert said == {"batch_in_parts": {"accumulate": 4, "step_bytes": 300, "limit_bytes": 300}}
    assert "mine: a batch of 8 in 4 parts" in caplog.text
    # Resumed, wherever: nothing is compiled to find out.
    again, kept = batch_parts.with_parts(*chosen, pytest.fail)
    assert (again.accumulate, kept) == (4, said)
    assert batch_parts.as_trained(recipe, kept).parts == 4
    assert batch_parts.as_trained(recipe, {}).parts == 1
    (tmp_path / batch_parts.FILE).write_text('{"accumulate": 3}')
    with pytest.raises(batch_parts.WorkdirError, match="does not say in how many parts"):
        batch_parts.with_parts(*chosen, pytest.fail)


@pytest.mark.slow
def test_a_training_that_chose_its_parts_is_the_one_that_was_told_them(tmp_path):
    def config(**entries):
        still = {**tiny_recipes.ON_ADVERSARIAL, "batch_statistics": "frozen", "epochs": 1}
        return tiny_recipes.config({"mine": {**still, "attack": tiny_recipes.PGD, **entries}})

    def trained(name, **entries):
        results = tiny_recipes.go(config(**entries), tmp_path / name)["train"]["trained"]
        return results["mine-seed0"], tiny_recipes.final(tmp_path / name, "mine")

    run = tiny_recipes.context(config(), tmp_path)
    recipe = run.plan.recipes["mine"]
    classifier = train.untrained(run, recipe)
    state, step = trace.step_of(batch_parts.alone(run), recipe, classifier)
    batch = batch_parts.batch_shapes(run, recipe, classifier)
    most = batch_parts.planned(step, state, batch) - 1
    chosen, ours = trained("chosen", accumulate="auto", step_bytes=most)
    parts = chosen["batch_in_parts"]
    assert parts["accumulate"] > 1 and parts["step_bytes"] <= most == parts["limit_bytes"]
    told, theirs = trained("told", accumulate=parts["accumulate"])
    assert "batch_in_parts" not in told
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf)
    kept = json.loads((tmp_path / "chosen/recipes/mine-seed0" / batch_parts.FILE).read_text())
    assert kept == parts
