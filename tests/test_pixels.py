"""Images of another kind are refused wherever they come in, with the line that makes them right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import evaluation, models, screening, threats
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.evaluation.analysis import fourier_sensitivity
from robust_ssl.parallel import Parallel
from robust_ssl.pixels import check_images

BYTES, LABELS = tiny.images("test", n=4)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def net():
    return models.classifier(jax.random.key(0), tiny.encoder(), 4, head="linear")


def scored(net, images, labels=LABELS):
    batches = [{"images": images, "labels": labels}]
    attack = {"added": UniversalPerturbation(jnp.full((8, 8, 3), 0.1), threats.Linf(0.1))}
    parallel = Parallel.create(num_devices=1)
    return evaluation.score(net, batches, attack, key=KEY, parallel=parallel)


TAKERS = {
    "score": scored,
    "a perturbation": lambda net, images: UniversalPerturbation(
        jnp.zeros((8, 8, 3)), threats.Linf(0.1)
    ).apply(images),
    "known attacks": lambda net, images: screening.Known.of({}, images),
    "a screen's images": lambda net, images: screening.fit_screen(
        KEY, net, images, np.zeros((100, 8, 8, 3), np.uint8)
    ),
    "its calibration": lambda net, images: screening.fit_screen(
        KEY, net, BYTES, np.repeat(images, 25, axis=0), detectors={"it": screening.fit_spectrum}
    ),
    "a Fourier map": lambda net, images: fourier_sensitivity(net, images, key=KEY),
    "an examination": lambda net, images: evaluation.checks.examine(
        net, images, LABELS, threat=threats.Linf(0.1), key=KEY
    ),
}


@pytest.mark.parametrize("kind", ["of 255", "whole numbers", "NaN", "below 0"])
@pytest.mark.parametrize("taker", TAKERS)
def test_pixels_that_are_none_are_refused(taker, kind, net):
    images = {
        "of 255": BYTES.astype(np.float32),
        "whole numbers": BYTES.astype(np.int64),
        "NaN": np.full(BYTES.shape, np.nan, np.float32),
        "below 0": BYTES / np.float32(255) - 0.5,
    }[kind]
    with pytest.raises(ValueError, match="must be uint8, or float pixels in"):
        TAKERS[taker](net, images)


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        ((2, 3, 8, 8), r"colors come last: np.moveaxis\(images, -3, -1\)"),
        ((3, 8, 8), r"np.moveaxis\(images, -3, -1\)"),
        ((2, 8, 8, 1), r"images.repeat\(3, axis=-1\)"),
        ((2, 8, 8, 4), r"images\[..., :3\]"),
        ((2, 8, 8, 5), r"got \(2, 8, 8, 5\)(\n|$)"),
    ],
)
def test_an_encoder_says_which_line_brings_colors_to_their_place(shape, way):
    with pytest.raises(ValueError, match=way):
        tiny.encoder()(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"\[n, H, W, 3\]" if len(shape) == 3 else way):
        check_images(np.zeros(shape))


def test_what_is_traced_has_its_shape_looked_at():
    jax.jit(check_images)(jnp.full((1, 2, 2, 3), 9.0))
    with pytest.raises(ValueError, match="moveaxis"):
        jax.jit(check_images)(jnp.zeros((1, 3, 2, 2)))
    check_images(jnp.ones((1, 2, 2, 3), jnp.bfloat16))


def test_eight_bits_are_pixels_to_a_perturbation_and_to_what_is_known_of_it():
    attack = UniversalPerturbation(jnp.full((8, 8, 3), 0.1), threats.Linf(0.1))
    pixels = BYTES / np.float32(255)
    np.testing.assert_allclose(attack.apply(BYTES), attack.apply(pixels), atol=1e-6)
    known = [screening.Known.of({"a": [attack]}, images).changes for images in (BYTES, pixels)]
    np.testing.assert_allclose(*known, atol=1e-6)
    assert float(known[0].min()) > 0 and float(known[0].max()) <= 0.1 + 1e-6
    assert attack.resized(np.int64(4)).delta.shape == (4, 4, 3)
