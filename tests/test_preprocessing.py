"""Input transformations: what they do to pixels, and what an attacker's gradient sees of them."""

import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from robust_ssl import models
from robust_ssl.models import JPEG, Quantize, Smooth, preprocessing

ALL = [Quantize(), Smooth(), JPEG(), JPEG(subsample=True)]


def picture(height=24, width=40):
    """Gradients and stripes, as in a photograph: every channel differs."""
    y, x = np.mgrid[:height, :width] / 24
    waves = [0.5 + 0.4 * np.sin(3 * x + 2 * y), 0.2 + 0.4 * y, 0.5 + 0.3 * np.cos(9 * x - 5 * y)]
    return np.rint(255 * np.clip(np.stack(waves, axis=-1), 0, 1)).astype(np.uint8)


def pixels(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def pillow(image, quality, subsample):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=2 if subsample else 0)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("step", ALL, ids=str)
def test_shape_range_and_batch(step):
    images = pixels(2, 3, 9, 10, 3)
    processed = jax.jit(step)(images)
    assert processed.shape == images.shape and processed.dtype == jnp.float32
    assert processed.min() >= 0 and processed.max() <= 1 + 1e-6
    np.testing.assert_allclose(step(images[1, 2]), processed[1, 2], atol=1e-5)
    np.testing.assert_allclose(jax.vmap(step)(images[0]), processed[0], atol=1e-5)


@pytest.mark.parametrize("step", ALL, ids=str)
def test_equal_by_value_and_hashable(step):
    same = type(step)(**vars(step))
    assert same == step and hash(same) == hash(step)
    assert step not in (Quantize(3), Smooth(2.0), JPEG(10), None)


def test_equal_steps_compile_once():
    traced = chex.assert_max_traces(lambda encoder, image: encoder(image).features, n=1)
    run = jax.jit(traced)
    for step in (Quantize(4), Quantize(4)):
        run(tiny.encoder().replace(preprocess=step), jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize("levels", [2, 3, 8, 256])
def test_quantize_is_the_nearest_level(levels):
    images = pixels(4, 4, 3)
    grid = np.arange(levels) / (levels - 1)
    nearest = grid[np.abs(images[..., None].astype(np.float64) - grid).argmin(-1)]
    np.testing.assert_allclose(Quantize(levels)(images), nearest, atol=1e-7)
    once = Quantize(levels)(images)
    np.testing.assert_array_equal(Quantize(levels)(once), once)


def test_smooth_is_a_gaussian():
    point = jnp.zeros((15, 15, 3)).at[7, 7].set(1.0)
    spread = np.asarray(Smooth(sigma=1.5)(point), np.float64)[..., 0]
    bell = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    bell /= bell.sum()
    np.testing.assert_allclose(spread[2:13, 2:13], np.outer(bell, bell), atol=1e-7)
    assert spread[:2].max() == 0


def test_smooth_keeps_what_is_flat_to_the_edge():
    ramp = np.broadcast_to(np.linspace(0, 1, 12).reshape(12, 1, 1), (12, 5, 3))
    smoothed = Smooth(sigma=1.0)(jnp.asarray(ramp, jnp.float32))
    np.testing.assert_allclose(smoothed[3:-3], ramp[3:-3], atol=1e-6)
    padded = np.pad(ramp, ((3, 3), (0, 0), (0, 0)), mode="edge")
    bell = np.exp(-0.5 * np.arange(-3, 4) ** 2.0)
    want = sum(w * padded[i : i + 12] for i, w in enumerate(bell / bell.sum()))
    np.testing.assert_allclose(smoothed, want, atol=1e-6)


def test_the_cosine_transform_is_the_standard_s():
    place = np.arange(8)
    want = np.zeros((8, 8))
    for u in range(8):  # ITU-T T.81, A.3.3, one axis
        scale = (1 / np.sqrt(2) if u == 0 else 1) / 2
        want[u] = scale * np.cos((2 * place + 1) * u * np.pi / 16)
    cosines = preprocessing._cosines()
    np.testing.assert_allclose(cosines, want, atol=1e-7)
    np.testing.assert_allclose(want @ want.T, np.eye(8), atol=1e-12)


def test_coefficients_are_multiples_of_their_steps():
    planes = 64 + 128 * pixels(16, 24, 1)  # nothing is clipped
    steps = preprocessing._table(preprocessing._LUMINANCE, 30)
    coded = np.asarray(preprocessing._quantize_blocks(jnp.asarray(planes), steps), np.float64)
    cosines = preprocessing._cosines().astype(np.float64)
    for top, left in ((0, 0), (8, 16)):
        block = np.s_[top : top + 8, left : left + 8, 0]
        want = np.rint(cosines @ (planes[block] - 128.0) @ cosines.T / steps) * steps
        want = np.rint(cosines.T @ want @ cosines + 128.0)
        np.testing.assert_array_equal(coded[block], np.clip(want, 0, 255))


@pytest.mark.parametrize("quality, factor", [(50, 1.0), (25, 2.0), (75, 0.5), (10, 5.0)])
def test_tables_scale_with_quality(quality, factor):
    for table in (preprocessing._LUMINANCE, preprocessing._CHROMINANCE):
        want = np.clip(np.floor(np.asarray(table) * factor + 0.5), 1, 255)
        np.testing.assert_array_equal(preprocessing._table(table, quality), want)
        assert (preprocessing._table(table, 100) == 1).all()


@pytest.mark.parametrize("subsample", [False, True])
@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_is_pillow_s(quality, subsample):
    image = picture()
    want = pillow(image, quality, subsample)
    ours = 255 * np.asarray(JPEG(quality, subsample)(image.astype(np.float32) / 255))
    change, error = np.abs(want.astype(float) - image).mean(), np.abs(ours - want).mean()
    # Of 255.  Averages of color often end on a half, where a last bit decides the rounding.
    assert error < (1.5 if subsample else 0.3)
    assert error < (0.5 if subsample else 0.4) * change


def test_jpeg_pads_like_pillow():
    image = picture(13, 11)
    ours = 255 * np.asarray(JPEG(10)(image.astype(np.float32) / 255))
    assert np.abs(ours - pillow(image, 10, False)).mean() < 0.1


def test_jpeg_at_full_quality_changes_little():
    images = pixels(8, 8, 3)
    assert np.abs(JPEG(100)(images) - images).max() < 4 / 255


@pytest.mark.parametrize("step", [Quantize(4), JPEG(20)], ids=str)
def test_straight_through_is_the_identity_s_gradient_at_the_same_value(step):
    images, weights = pixels(9, 8, 3), pixels(9, 8, 3)
    images[:4] = 1.0  # where the decoder clips
    honest = type(step)(**{**vars(step), "straight_through": False})
    np.testing.assert_array_equal(step(images), honest(images))
    gradient = jax.grad(lambda x: jnp.vdot(step(x), weights))(images)
    np.testing.assert_allclose(gradient, weights, rtol=1e-6)
    assert not jax.grad(lambda x: jnp.vdot(honest(x), weights))(images).any()


def test_straight_through_of_subsampled_colors():
    images, weights = pixels(16, 16, 3), pixels(16, 16, 3)
    gradient = jax.grad(lambda x: jnp.vdot(JPEG(subsample=True)(x), weights))(images)
    forward, back = preprocessing._FROM_RGB, np.linalg.inv(preprocessing._FROM_RGB)
    double = np.zeros((16, 8))  # 3/4 of one's own mean, 1/4 of the nearer neighbour's
    for pixel in range(16):
        double[pixel, pixel // 2] += 0.75
        double[pixel, np.clip(pixel // 2 + (1 if pixel % 2 else -1), 0, 7)] += 0.25

    def subsampled(x):  # the same without rounding, in float64
        luma, chroma = np.split(x @ forward.T, [1], axis=-1)
        chroma = chroma.reshape(8, 2, 8, 2, 2).mean((1, 3))
        chroma = np.einsum("ij,kl,jlc->ikc", double, double, chroma)
        return np.concatenate([luma, chroma], axis=-1) @ back.T

    # It is linear: the gradient's product with any direction is the direction's image.
    for seed in range(3):
        direction = np.random.default_rng(seed + 1).normal(size=(16, 16, 3))
        np.testing.assert_allclose(
            np.vdot(gradient, direction), np.vdot(weights, subsampled(direction)), rtol=1e-4
        )
    honest = JPEG(subsample=True, straight_through=False)
    np.testing.assert_array_equal(JPEG(subsample=True)(images), honest(images))


def test_an_encoder_preprocesses_before_it_normalizes():
    encoder, images = tiny.encoder(), pixels(2, 8, 8, 3)
    squeezed = encoder.replace(preprocess=Quantize(3))
    rounded = np.rint(images * 2) / 2
    np.testing.assert_allclose(squeezed.normalize(jnp.asarray(images)), (rounded - 0.5) / 0.25)
    ours, want = squeezed(jnp.asarray(images)), encoder(jnp.asarray(rounded))
    np.testing.assert_array_equal(ours.features, want.features)
    ours, _ = squeezed.apply_train(jnp.asarray(images))
    want, _ = encoder.apply_train(jnp.asarray(rounded))
    np.testing.assert_array_equal(ours.features, want.features)


def test_a_classifier_s_gradient_is_what_the_step_says():
    net = models.classifier(jax.random.key(0), tiny.encoder(), 3, head="linear")

    def gradient(step):
        model = net.replace(encoder=net.encoder.replace(preprocess=step))
        return jax.grad(lambda x: model(x).logits[0])(jnp.asarray(pixels(8, 8, 3)))

    assert jnp.abs(gradient(Quantize(4))).max() > 0
    assert jnp.abs(gradient(Quantize(4, straight_through=False))).max() == 0


def test_another_shape_is_refused():
    encoder = tiny.encoder().replace(preprocess=lambda images: images[..., :-1, :, :])
    with pytest.raises(ValueError, match=r"\(1, 7, 8, 3\); it must keep the shape"):
        encoder(jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize(
    "step, options",
    [
        (Quantize, {"levels": 1}),
        (Quantize, {"levels": 2.5}),
        (Quantize, {"levels": True}),
        (Quantize, {"straight_through": 1}),
        (Smooth, {"sigma": 0.0}),
        (Smooth, {"sigma": float("nan")}),
        (Smooth, {"sigma": 1e9}),
        (Smooth, {"sigma": "1"}),
        (JPEG, {"quality": 0}),
        (JPEG, {"quality": 101}),
        (JPEG, {"subsample": "4:2:0"}),
    ],
)
def test_what_makes_no_sense_is_refused(step, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        step(**options)
