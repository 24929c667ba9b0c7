"""A batch in parts, and blocks computed again: the same numbers, and less memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from finetuning_steps import SmoothStep, assert_same, batches, run, tiny

from robust_ssl import losses, models
from robust_ssl.experiment import Recipe
from robust_ssl.finetuning import init_state, make_step, mixed_losses, planned_bytes
from robust_ssl.finetuning.parts import draws_in_training, rematerialized
from robust_ssl.models.resnet import ResNet
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
