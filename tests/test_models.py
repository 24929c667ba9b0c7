"""Encoders: their contract, their taps, their numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import models, parallel
from robust_ssl.models import vit
from robust_ssl.parallel import Parallel

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
small_resnet = functools.partial(models.resnet18, width=4, image_size=8)
small_vit = functools.partial(vit.vit_tiny, depth=2, image_size=8, patch_size=4)
SMALL = {"resnet": small_resnet, "vit": small_vit}


@jax.jit
def run(encoder, images):
    return encoder(images)


@jax.jit
def run_training(encoder, images):
    return encoder.apply_train(images)


@functools.cache
def built(kind, **options):
    return SMALL[kind](jax.random.key(0), **options)


@pytest.fixture(params=sorted(SMALL))
def encoder(request):
    return built(request.param)


def abstract(builder, **options):
    """The encoder and its outputs in shapes only: nothing is compiled."""
    encoder = jax.eval_shape(functools.partial(builder, **options), jax.random.key(0))
    size = encoder.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return encoder, jax.eval_shape(lambda e, x: e(x), encoder, images)


def num_params(encoder):
    return sum(leaf.size for leaf in jax.tree.leaves(encoder.variables["params"]))


@pytest.mark.parametrize(
    "builder,depths,expansion,size_in_the_paper",
    [  # torchvision's parameter counts less the classifier, 513,000 or 2,049,000
        (models.resnet18, (2, 2, 2, 2), 1, 11_689_512 - 513_000),
        (models.resnet34, (3, 4, 6, 3), 1, 21_797_672 - 513_000),
        (models.resnet50, (3, 4, 6, 3), 4, 25_557_032 - 2_049_000),
    ],
)
def test_resnets_have_the_published_shape(builder, depths, expansion, size_in_the_paper):
    encoder, outputs = abstract(builder, stem="imagenet", image_size=64)
    assert encoder.dim == 512 * expansion == outputs.features.shape[1]
    assert num_params(encoder) == size_in_the_paper
    names = []
    for stage, depth in enumerate(depths, 1):
        names += [f"stage{stage}/block{block}" for block in range(1, depth + 1)]
    assert set(outputs.taps) == {"stem", *names}
    for stage in range(4):
        shape = outputs.taps[f"stage{stage + 1}/block1"].shape
        assert shape == (2, 16 >> stage, 16 >> stage, 64 * 2**stage * expansion)


@pytest.mark.parametrize(
    "stem,padding,side",
    [("cifar", None, 32), ("cifar", 2, 34), ("cifar_half", None, 16), ("imagenet", None, 8)],
)
def test_stems(stem, padding, side):
    encoder, outputs = abstract(models.resnet18, width=4, stem=stem, stem_padding=padding)
    assert outputs.taps["stem"].shape == (2, side, side, 4)
    assert encoder.dim == 8 * 4


@pytest.mark.parametrize(
    "builder,width,size_in_timm",
    [  # vit_*_patch16_224: parameters less the classifier's 1000 * width + 1000
        (vit.vit_tiny, 192, 5_717_416 - 193_000),
        (vit.vit_small, 384, 22_050_664 - 385_000),
        (vit.vit_base, 768, 86_567_656 - 769_000),
    ],
)
def test_vits_have_the_published_shape(builder, width, size_in_timm):
    encoder, outputs = abstract(builder, patch_size=16, image_size=224)
    assert encoder.dim == width == outputs.features.shape[1]
    assert num_params(encoder) == size_in_timm
    assert set(outputs.taps) == {"embed", *(f"block{i + 1}" for i in range(12))}
    assert {tap.shape for tap in outputs.taps.values()} == {(2, 14 * 14 + 1, width)}


def test_a_mean_pooled_vit_has_no_class_token():
    encoder, outputs = abstract(small_vit, pooling="mean")
    assert outputs.taps["block2"].shape == (2, 4, 192)
    assert "token" not in encoder.variables["params"]["embed"]


def test_mean_pooling_does_not_see_where_a_patch_is_without_positions():
    encoder = small_vit(jax.random.key(0), pooling="mean")
    assert jnp.any(encoder.variables["params"]["embed"]["position"] != 0)
    moved = np.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)  # whole patches change place
    assert not np.allclose(run(encoder, IMAGES).features, run(encoder, moved).features, atol=1e-5)
    params = dict(encoder.variables["params"])
    params["embed"] = params["embed"] | {"position": jnp.zeros((1, 4, 192))}
    blind = encoder.replace(variables={"params": params})
    np.testing.assert_allclose(run(blind, IMAGES).features, run(blind, moved).features, atol=2e-5)


def test_a_patch_is_read_in_rows_columns_channels():
    encoder = small_vit(jax.random.key(0), pooling="mean")
    params = encoder.variables["params"]["embed"]
    x = np.asarray(encoder.normalize(IMAGES), np.float64)
    expected = x[:, :4, 4:].reshape(4, -1) @ np.asarray(params["patch"]["kernel"], np.float64)
    expected = expected + np.asarray(params["patch"]["bias"] + params["position"][0, 1])
    np.testing.assert_allclose(
        run(encoder, IMAGES).taps["embed"][:, 1], expected, rtol=1e-4, atol=1e-5
    )


def test_parameter_paths_read_like_the_network():
    paths = {
        kind: ["/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(tree)]
        for kind, tree in ((kind, built(kind).variables["params"]) for kind in SMALL)
    }
    assert {"stem/conv/kernel", "stage2/block1/shortcut/conv/kernel", "stem/norm/scale"} <= set(
        paths["resnet"]
    )
    assert {
        "embed/patch/kernel",
        "embed/position",
        "embed/token",
        "block2/attention/qkv/kernel",
        "block2/attention/output/bias",
        "block1/mlp/dense1/kernel",
        "block1/norm1/scale",
        "norm/bias",
    } <= set(paths["vit"])


def test_one_image_is_a_batch_of_one(encoder):
    alone, batch = run(encoder, IMAGES[0]), run(encoder, IMAGES[:1])
    assert alone.features.shape == (encoder.dim,)
    np.testing.assert_array_equal(alone.features, batch.features[0])
    assert all(alone.taps[name].shape == batch.taps[name].shape[1:] for name in batch.taps)
    with pytest.raises(ValueError, match=r"must be \[batch, H, W, 3\].*\(8, 8\)"):
        run(encoder, IMAGES[0, :, :, 0])


def test_an_image_does_not_see_its_neighbours(encoder):
    np.testing.assert_allclose(
        run(encoder, IMAGES).features[1], run(encoder, IMAGES[1]).features, rtol=1e-4, atol=1e-5
    )


def test_normalization_is_inside(encoder):
    shifted = encoder.replace(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    assert not np.allclose(run(encoder, IMAGES).features, run(shifted, IMAGES).features, atol=1e-3)
    raw = encoder.replace(mean=(0.0,) * 3, std=(1.0,) * 3)
    by_hand = (IMAGES - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.25, 2.0])
    np.testing.assert_allclose(
        run(shifted, IMAGES).features, run(raw, by_hand).features, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_bfloat16_is_only_what_is_computed_in(kind):
    encoder = built(kind, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.variables)} == {jnp.dtype("float32")}
    outputs = run(encoder, IMAGES)
    assert outputs.features.dtype == jnp.float32
    assert {tap.dtype for tap in outputs.taps.values()} == {jnp.dtype(jnp.bfloat16)}
    precise = run(built(kind).replace(variables=encoder.variables), IMAGES).features
    error = jnp.linalg.norm(outputs.features - precise) / jnp.linalg.norm(precise)
    assert 0 < error < 0.03
    _, statistics = run_training(encoder, IMAGES)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(statistics))


def test_a_resnet_updates_its_statistics_in_training_only():
    encoder = built("resnet")
    outputs, statistics = run_training(encoder, IMAGES)
    assert not np.allclose(outputs.features, run(encoder, IMAGES).features, atol=1e-3)
    x = np.asarray(encoder.normalize(IMAGES))
    kernel = encoder.variables["params"]["stem"]["conv"]["kernel"]
    conv = nn.Conv(4, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x)
    new = statistics["stem"]["norm"]  # from mean 0 and variance 1, with momentum 0.9
    np.testing.assert_allclose(new["mean"], 0.1 * conv.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * conv.var((0, 1, 2)), rtol=1e-4)


def test_a_vit_has_no_statistics():
    encoder = built("vit")
    outputs, statistics = run_training(encoder, IMAGES)
    assert statistics == {} and set(encoder.variables) == {"params"}
    np.testing.assert_array_equal(outputs.features, run(encoder, IMAGES).features)


@pytest.mark.parametrize("method", parallel.KINDS)
def test_batch_statistics_across_devices_are_those_of_the_global_batch(method):
    encoder = built("resnet")
    expected, statistics = run_training(encoder, IMAGES)
    layout = Parallel.create(num_devices=2, kind=method)

    def step(encoder, images):
        outputs, statistics = encoder.apply_train(images, axis_name=layout.axis_name)
        return statistics, parallel.gather(outputs.features, layout.axis_name)

    ours, features = layout.compile(step)(layout.replicate(encoder), layout.put(IMAGES))
    np.testing.assert_allclose(features, expected.features, rtol=1e-3, atol=1e-4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, statistics
    )


def test_heads_drop_in_training_only():
    encoder = built("resnet")
    net = models.classifier(jax.random.key(1), encoder, 3, head="mlp")
    logits = run(net, IMAGES).logits
    np.testing.assert_array_equal(logits, run(net, IMAGES).logits)
    features = jnp.ones((4, encoder.dim))
    hidden = models.MLPHead(3, hidden=1000, dropout=0.25)
    variables = hidden.init(jax.random.key(0), features)
    still = hidden.apply(variables, features, train=False)
    one, other = (
        hidden.apply(variables, features, train=True, rngs={"dropout": jax.random.key(i)})
        for i in (1, 2)
    )
    assert not np.allclose(one, still) and not np.allclose(one, other)
    with pytest.raises(Exception, match="dropout"):
        hidden.apply(variables, features, train=True)


def test_a_classifier_trains_head_and_encoder_in_one_tree():
    encoder = built("vit")
    net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
    assert set(net.variables) == {"params"} and set(net.variables["params"]) == {"encoder", "head"}
    doubled = net.with_variables(jax.tree.map(lambda x: 2 * x, net.variables))
    kernel = net.head_variables["params"]["linear"]["kernel"]
    np.testing.assert_array_equal(doubled.head_variables["params"]["linear"]["kernel"], 2 * kernel)
    np.testing.assert_array_equal(
        doubled.encoder.variables["params"]["norm"]["scale"],
        2 * encoder.variables["params"]["norm"]["scale"],
    )
    outputs, statistics = jax.jit(lambda net, x, key: net.apply_train(x, key=key))(
        net, IMAGES, jax.random.key(0)
    )
    assert outputs.logits.shape == (4, 3) and statistics == {}
    np.testing.assert_allclose(
        outputs.logits,
        np.asarray(outputs.features) @ kernel,  # a fresh head's bias is zero
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_encoder_is_a_pytree_that_does_not_trace_again():
    traces = []

    @jax.jit
    def features(encoder, images):
        traces.append(1)
        return encoder(images).features

    encoder = built("vit")
    first = features(encoder, IMAGES)
    twice = jax.tree.map(lambda x: 2 * x, encoder)
    assert not np.allclose(first, features(twice, IMAGES))
    features(small_vit(jax.random.key(7)), IMAGES)  # built again: an equal static part
    assert len(traces) == 1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda key: models.resnet18(key, stem="stl"), "stem must be one of .*got 'stl'"),
        (lambda key: vit.vit_tiny(key, pooling="max"), "pooling must be one of .*got 'max'"),
        (lambda key: vit.vit_tiny(key, patch_size=5), "patches of 5 pixels do not tile .* 32"),
        (
            lambda key: vit.vit_tiny(key, patch_size=0),
            "patch_size must be a whole number of at least 1, got 0",
        ),
        (lambda key: built("vit")(jnp.zeros((1, 16, 16, 3))), r"positions for images \[8, 8, 3\]"),
        (lambda key: models.classifier(key, built("vit"), 1), "at least two classes, got 1"),
        (lambda key: models.classifier(key, built("vit"), 3, head="x"), "head must be one of"),
    ],
)
def test_bad_choices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0))
