"""ConvNeXt, and the parts of vision transformers that public towers add."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import models
from robust_ssl.models import swin, transformer
from robust_ssl.models.convnext import ResponseNorm

TINY = {"depths": (1, 2), "widths": (4, 8), "patch_size": 2, "image_size": 8}


@functools.cache
def tiny(**options):
    return models.convnext(jax.random.key(0), **TINY, **options)


applied = jax.jit(lambda encoder, images: encoder(images))


@pytest.mark.parametrize("options", [{}, {"layer_scale": False, "response_norm": True}])
def test_features_taps_and_a_gradient_everywhere(options):
    encoder = tiny(**options)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    outputs = applied(encoder, images)
    assert outputs.features.shape == (2, 8) and outputs.features.dtype == jnp.float32
    shapes = {name: tap.shape for name, tap in outputs.taps.items()}
    assert shapes == {
        "stem": (2, 4, 4, 4), "stage1/block1": (2, 4, 4, 4), "stage2/block1": (2, 2, 2, 8),
        "stage2/block2": (2, 2, 2, 8),
    }  # fmt: skip
    gradient = jax.jit(jax.grad(lambda images: encoder(images).features.std()))(images)
    assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 0


def test_features_are_normed_means_of_the_last_tap():
    outputs = applied(tiny(), jax.random.uniform(jax.random.key(1), (2, 8, 8, 3)))
    pooled = np.asarray(outputs.taps["stage2/block2"], np.float64).mean((1, 2))
    centered = pooled - pooled.mean(-1, keepdims=True)
    wanted = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(outputs.features, wanted, rtol=1e-4, atol=1e-5)


def test_a_response_norm_is_what_the_paper_says():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 3, 3, 5)).astype(np.float32)
    scale, bias = draw.normal(size=(2, 5)).astype(np.float32)
    ours = ResponseNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    norms = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
    wanted = scale * x * norms / (norms.mean(-1, keepdims=True) + 1e-6) + bias + x
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_a_response_norm_of_nothing_has_a_gradient():
    layer = ResponseNorm()
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    gradient = jax.jit(jax.grad(lambda x: layer.apply(variables, x).sum()))(jnp.zeros((1, 2, 2, 4)))
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, "must be as many"),
        ({"widths": (4, 0)}, "all positive"),
        ({"image_size": 2}, "the least is 4"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.convnext(jax.random.key(0), **{**TINY, **options})


# --- rotary positions and pooling by attention ---------------------------------------------------


def test_turned_products_depend_on_the_way_between_two_patches_alone():
    side, width = 4, 8
    angles = transformer.patch_angles(side, width, 100.0)
    draw = np.random.default_rng(0)
    query, key = (np.tile(draw.normal(size=(1, 1, 1, width)), (1, side * side, 1, 1))
                  for _ in range(2))  # fmt: skip
    query, key = (np.asarray(transformer._turned(jnp.asarray(x, jnp.float32), angles, 0))[0, :, 0]
                  for x in (query, key))  # fmt: skip
    products = (query @ key.T).reshape((side,) * 4)
    # From (0, 0) to (1, 2) as from (1, 1) to (2, 3); tokens before the patches are left alone.
    np.testing.assert_allclose(products[0, 0, 1, 2], products[1, 1, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(products[2, 1, 0, 0], products[3, 2, 1, 1], rtol=1e-5)
    tokens = jnp.ones((1, 2 + side * side, 1, width))
    np.testing.assert_array_equal(transformer._turned(tokens, angles, 2)[:, :2], tokens[:, :2])


def test_a_rotary_vit_has_no_positions_and_takes_other_sizes():
    build = functools.partial(models.vision_transformer, width=8, heads=2, depth=1, patch_size=4)
    encoder = build(jax.random.key(0), image_size=8, rotary=100.0, registers=1)
    assert set(encoder.variables["params"]["embed"]) == {"token", "patch", "registers"}
    larger = models.resize_positions(encoder, 12)
    assert larger(jnp.zeros((1, 12, 12, 3))).taps["embed"].shape == (1, 11, 8)
    for options, message in (
        ({"heads": 4}, "multiple of 4"),
        ({"image_size": 4096}, "at most 512"),
    ):
        with pytest.raises(ValueError, match=message):
            build(jax.random.key(0), **{"image_size": 8, "rotary": 1e2, **options})


def test_pooling_by_attention_does_not_mind_the_order_of_tokens():
    pool = transformer.AttentionPool(heads=2, mlp_width=8)
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 4))
    variables = jax.jit(pool.init)(jax.random.key(1), tokens)
    apply = jax.jit(pool.apply)
    features = apply(variables, tokens)
    np.testing.assert_allclose(apply(variables, tokens[:, ::-1]), features, atol=1e-5)
    # Of equal tokens it takes their value: the query does not matter.
    equal = jnp.tile(tokens[:, :1], (1, 5, 1))
    np.testing.assert_allclose(apply(variables, equal), apply(variables, equal[:, :1]), atol=1e-5)


# --- CLIP's ResNets ------------------------------------------------------------------------------

CLIP = {"depths": (1, 1, 1, 1), "width": 2, "heads": 2, "dim": 5, "image_size": 32}


def test_clips_resnet_halves_where_others_stride():
    shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    encoder = jax.eval_shape(lambda key: models.clip_resnet(key, **CLIP), jax.random.key(0))
    outputs = jax.eval_shape(lambda encoder, x: encoder(x), encoder, shape)
    assert outputs.features.shape == (2, 5) and outputs.features.dtype == jnp.float32
    shapes = {name: tap.shape for name, tap in outputs.taps.items()}
    assert shapes == {
        "stem": (2, 8, 8, 2), "stage1/block1": (2, 8, 8, 8), "stage2/block1": (2, 4, 4, 16),
        "stage3/block1": (2, 2, 2, 32), "stage4/block1": (2, 1, 1, 64),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": (1, 1)}, "four positive depths"),
        ({"heads": 3}, "3 heads do not divide 64"),
        ({"image_size": 40}, "multiple of 32"),
    ],
)
def test_sizes_of_clips_resnet_that_do_not_go_together_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        models.clip_resnet(jax.random.key(0), **{**CLIP, **wrong})


# --- Swin ----------------------------------------------------------------------------------------

SWIN = {"depths": (2, 1), "width": 4, "heads": (1, 2), "windows": 2, "image_size": 32}


def test_swin_has_a_tap_for_each_block_and_windows_no_larger_than_its_sides():
    encoder = jax.eval_shape(
        lambda key: models.swin_transformer(key, **{**SWIN, "windows": 7}), jax.random.key(0)
    )
    assert encoder.module.windows == (7, 4)
    shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    outputs = jax.eval_shape(lambda encoder, x: encoder(x), encoder, shape)
    assert outputs.features.shape == (2, 8) and outputs.features.dtype == jnp.float32
    shapes = {name: tap.shape for name, tap in outputs.taps.items()}
    assert shapes == {
        "stem": (2, 8, 8, 4), "stage1/block1": (2, 8, 8, 4), "stage1/block2": (2, 8, 8, 4),
        "stage2/block1": (2, 4, 4, 8),
    }  # fmt: skip


def test_a_shift_hides_what_was_not_beside_each_other():
    """A row of four places moved by one: the first has come behind the last."""
    mask = swin.shift_mask(4, 2, 1)[:, 0]
    assert mask.shape == (4, 4, 4)
    np.testing.assert_array_equal(mask[0], 0)  # the first window moved as a whole
    apart = mask[1] < 0  # places 2 and 3 of the first two rows: 3 has come from the other edge
    np.testing.assert_array_equal(apart[0], [False, True, False, True])


def test_relative_places_are_the_same_for_the_same_step():
    places = swin.relative_places(3)
    assert places.min() == 0 and places.max() == 24 and len(np.unique(places)) == 25
    assert places[0, 1] == places[1, 2] == places[3, 4] and places[0, 1] != places[2, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": (1, 3)}, "stage 2: 3 heads do not divide 8"),
        ({"windows": (2, 5)}, "stage 2: windows of 5 places"),
        ({"depths": (1,)}, "must be as many"),
        ({"image_size": 30}, "patch_size must divide"),
        ({"width": 0}, "must all be positive"),
    ],
)
def test_sizes_of_a_swin_that_do_not_go_together_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        models.swin_transformer(jax.random.key(0), **{**SWIN, **wrong})
