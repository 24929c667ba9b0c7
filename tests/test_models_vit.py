"""What public vision transformers do differently, option by option, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import models, weights
from robust_ssl.models import vit
from robust_ssl.models.positions import resize_positions

IMAGES = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
SMALL = {"width": 12, "heads": 2, "depth": 1, "patch_size": 4, "image_size": 8}
PUBLIC = {
    "registers": 2, "layer_scale": True, "pre_norm": True, "patch_bias": False,
    "activation": "swiglu", "mlp_width": 10, "norm_epsilon": 1e-5,
}  # fmt: skip


def shapes(builder, **options):
    """An encoder with shapes in place of weights: nothing is compiled."""
    return jax.eval_shape(functools.partial(builder, **options), jax.random.key(0))


@functools.cache
def built(**options):
    """With random numbers also where a fresh network has zeros and ones."""
    encoder = shapes(models.vision_transformer, **SMALL, **options)
    random = np.random.default_rng(1)
    fill = lambda x: jnp.asarray(random.normal(scale=0.4, size=x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(fill, encoder)


@jax.jit
def run(encoder, images):
    return encoder(images)


def with_params(encoder, **changed):
    return encoder.replace(variables={"params": {**encoder.variables["params"], **changed}})


def layer_norm(x, norm, epsilon=1e-6):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return x * np.reshape(norm["scale"], shape) + np.reshape(norm["bias"], shape)


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_each_option_brings_its_own_parameters_and_no_others():
    def paths(**options):
        flat = jax.tree.leaves_with_path(built(**options).variables["params"])
        return {"/".join(key.key for key in path) for path, _ in flat}

    plain = paths()
    assert paths(layer_scale=True) - plain == {"block1/scale1", "block1/scale2"}
    assert paths(registers=2) - plain == {"embed/registers"}
    assert paths(pre_norm=True) - plain == {"embed/norm/scale", "embed/norm/bias"}
    assert plain - paths(patch_bias=False) == {"embed/patch/bias"}
    assert plain - paths(class_token=False, pooling="mean") == {"embed/token"}


def test_the_general_builder_makes_the_named_sizes():
    options = {"depth": 1, "patch_size": 4, "image_size": 8}
    for name, (width, heads) in vit.SIZES.items():
        sized = shapes(getattr(models, f"vit_{name}"), **options)
        same = shapes(models.vision_transformer, width=width, heads=heads, **options)
        assert sized.module == same.module and sized.variables == same.variables


def test_a_layer_scale_of_zero_switches_a_block_off():
    encoder = built(layer_scale=True)
    block = encoder.variables["params"]["block1"]
    outputs = run(with_params(encoder, block1=block | {"scale1": 0 * block["scale1"]}), IMAGES)
    assert not np.allclose(outputs.taps["block1"], outputs.taps["embed"], atol=1e-3)
    off = {name: jnp.zeros(12) for name in ("scale1", "scale2")}
    outputs = run(with_params(encoder, block1=block | off), IMAGES)
    np.testing.assert_array_equal(outputs.taps["block1"], outputs.taps["embed"])
    close(
        outputs.features,
        layer_norm(outputs.taps["embed"], encoder.variables["params"]["norm"])[:, 0],
    )


def test_registers_come_after_the_class_token_and_have_no_position():
    encoder = built(registers=2)
    embed = encoder.variables["params"]["embed"]
    tokens = run(encoder, IMAGES).taps["embed"]
    assert tokens.shape == (2, 1 + 2 + 4, 12)
    close(tokens[:, 0], np.tile(embed["token"][0, 0] + embed["position"][0, 0], (2, 1)))
    close(tokens[:, 1:3], np.tile(embed["registers"], (2, 1, 1)))
    without = dict(embed)
    del without["registers"]
    plain = run(with_params(built(), embed=without), IMAGES).taps["embed"]
    close(tokens[:, 3:], plain[:, 1:])


def test_the_first_norm_is_before_the_tap():
    encoder = built(pre_norm=True, norm_epsilon=0.5)
    embed = dict(encoder.variables["params"]["embed"])
    norm = embed.pop("norm")
    plain = run(with_params(built(), embed=embed), IMAGES).taps["embed"]
    close(run(encoder, IMAGES).taps["embed"], layer_norm(plain, norm, 0.5))


@pytest.mark.parametrize("after", [False, True])
def test_the_mean_is_over_patches_alone(after):
    encoder = built(registers=2, pooling="mean", norm_after_pooling=after)
    outputs, norm = run(encoder, IMAGES), encoder.variables["params"]["norm"]
    tokens = np.asarray(outputs.taps["block1"], np.float64)
    pooled_last = layer_norm(tokens, norm)[:, 3:].mean(1)
    close(outputs.features, layer_norm(tokens[:, 3:].mean(1), norm) if after else pooled_last)


def test_activations():
    x = np.linspace(-3, 3, 8)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = {
        "gelu": [-0.0040496941, 2.9959503059],  # of -3 and 3: x times the normal distribution
        "gelu_tanh": [-0.0036374, 2.9963626],  # its approximation by a hyperbolic tangent
        "quick_gelu": (x * sigmoid(1.702 * x))[[0, -1]],
        "swiglu": (x[:4] * sigmoid(x[:4]) * x[4:])[[0, -1]],
    }
    assert expected.keys() == vit.ACTIVATIONS.keys()
    for name, ends in expected.items():
        np.testing.assert_allclose(
            vit.ACTIVATIONS[name](jnp.float32(x))[jnp.array([0, -1])], ends, rtol=1e-4
        )


def test_a_gated_mlp_is_wider_before_its_gate():
    mlp = built(**PUBLIC).variables["params"]["block1"]["mlp"]
    assert mlp["dense1"]["kernel"].shape == (12, 20) and mlp["dense2"]["kernel"].shape == (10, 12)


def test_a_public_model_round_trips(tmp_path):
    encoder = built(**PUBLIC)
    loaded = weights.load_encoder(weights.save_encoder(encoder, tmp_path))
    assert loaded.module == encoder.module
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, encoder.variables)


def test_positions_of_another_size():
    encoder = built()
    assert resize_positions(encoder, 8) is encoder
    position = encoder.variables["params"]["embed"]["position"]
    larger = resize_positions(encoder, 24)
    assert larger.image_size == larger.module.image_size == 24
    resized = larger.variables["params"]["embed"]["position"]
    np.testing.assert_array_equal(resized[:, 0], position[:, 0])  # the class token's
    grid = resized[0, 1:].reshape(6, 6, 12)  # three times as fine: every third is an old one
    close(grid[1::3, 1::3], position[0, 1:].reshape(2, 2, 12))
    assert run(larger, jnp.zeros((1, 24, 24, 3))).taps["block1"].shape == (1, 37, 12)
    flat = {**encoder.variables["params"]["embed"], "position": jnp.ones((1, 5, 12))}
    ones = resize_positions(with_params(encoder, embed=flat), 20).variables["params"]["embed"]
    close(ones["position"], np.ones((1, 26, 12)))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"heads": 5}, "5 heads do not divide a width of 12"),
        ({"activation": "relu"}, "activation must be one of .*got 'relu'"),
        ({"class_token": False}, "pooling='token' needs class_token=True"),
        ({"patch_size": 3}, "patches of 3 pixels do not tile an image of 8"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.vision_transformer(jax.random.key(0), **{**SMALL, **options})


def test_positions_cannot_become_any_size():
    with pytest.raises(ValueError, match="patches of 4 pixels do not tile an image of 10"):
        resize_positions(built(), 10)
    resnet = models.resnet18(jax.random.key(0), width=2, image_size=8)
    with pytest.raises(ValueError, match="only a ViT has positions, this is a ResNet"):
        resize_positions(resnet, 16)
