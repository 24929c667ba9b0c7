"""Objectives against float64 NumPy, closed forms and degenerate points."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl import frequencies, objectives
from robust_ssl.types import AttackInputs, Outputs

RNG = np.random.default_rng(0)
FEATURES = [
    objectives.feature_l2,
    objectives.feature_cosine_distance,
    objectives.info_nce,
]
PIXELS = [objectives.pixel_l2, objectives.high_frequency_change]
FORMS = [objectives.advencoder_paper, objectives.advencoder_released]


def _inputs(batch=5, size=16):
    def outputs():
        return Outputs(
            features=jnp.asarray(RNG.normal(size=(batch, 7)), jnp.float32),
            logits=jnp.asarray(RNG.normal(size=(batch, 4)), jnp.float32),
        )

    images = jnp.asarray(RNG.uniform(size=(2, batch, size, size, 3)), jnp.float32)
    labels = jnp.asarray(RNG.integers(4, size=batch))
    return AttackInputs(outputs(), outputs(), images[0], images[1], labels)


def _unchanged(inputs):
    return inputs.replace(adversarial=inputs.clean, adversarial_images=inputs.clean_images)


def _numpy_info_nce(clean, adversarial, temperature):
    clean, adversarial = np.asarray(clean, np.float64), np.asarray(adversarial, np.float64)
    total = 0.0
    for i, query in enumerate(clean):
        scores = np.array(
            [query @ k / (np.linalg.norm(query) * np.linalg.norm(k)) for k in adversarial]
        )
        total += np.log(np.exp(scores / temperature).sum()) - scores[i] / temperature
    return total / len(clean)


def _numpy_high_pass(images, radius):
    """Mask on the full shifted spectrum, entry by entry, as AdvEncoder's code draws it."""
    images = np.asarray(images, np.float64)
    height, width = images.shape[1:3]
    keep = np.ones((height, width))
    for row in range(height):
        for column in range(width):
            keep[row, column] = np.hypot(row - height / 2, column - width / 2) >= radius
    spectrum = np.fft.fftshift(np.fft.fft2(images, axes=(1, 2)), axes=(1, 2))
    spectrum = np.fft.ifftshift(spectrum * keep[None, :, :, None], axes=(1, 2))
    return np.fft.ifft2(spectrum, axes=(1, 2)).real


def test_cross_entropy_is_optax_and_margin_is_its_definition():
    inputs = _inputs()
    logits, labels = inputs.adversarial.logits, inputs.labels
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(objectives.cross_entropy(inputs), expected, rtol=1e-6)
    rows = [
        np.delete(row, label).max() - row[label]
        for row, label in zip(np.asarray(logits, np.float64), np.asarray(labels), strict=True)
    ]
    np.testing.assert_allclose(objectives.margin(inputs), np.mean(rows), rtol=1e-6)


@pytest.mark.parametrize("objective", [objectives.cross_entropy, objectives.margin])
def test_missing_labels_or_logits_are_named(objective):
    inputs = _inputs()
    with pytest.raises(ValueError, match="needs labels"):
        objective(inputs.replace(labels=None))
    with pytest.raises(ValueError, match="needs logits"):
        objective(inputs.replace(adversarial=inputs.adversarial.replace(logits=None)))


def test_feature_distances_are_numpys():
    inputs = _inputs()
    moved, clean = (np.asarray(o.features, np.float64) for o in (inputs.adversarial, inputs.clean))
    distances = np.linalg.norm(moved - clean, axis=1)
    np.testing.assert_allclose(objectives.feature_l2(inputs), distances.mean(), rtol=1e-5)
    cosines = (moved * clean).sum(1) / np.linalg.norm(moved, axis=1) / np.linalg.norm(clean, axis=1)
    value = objectives.feature_cosine_distance(inputs)
    np.testing.assert_allclose(value, (1 - cosines).mean(), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_info_nce_is_the_float64_derivation(temperature):
    inputs = _inputs()
    value = objectives.info_nce(inputs, temperature=temperature)
    expected = _numpy_info_nce(inputs.clean.features, inputs.adversarial.features, temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_info_nce_refuses_a_single_image():
    with pytest.raises(ValueError, match="at least 2"):
        objectives.info_nce(_inputs(batch=1))


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf")])
def test_info_nce_refuses_a_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0 and finite"):
        objectives.info_nce(_inputs(), temperature=temperature)


def test_info_nce_takes_a_temperature_that_is_traced():
    inputs = _inputs()
    value = jax.jit(lambda t: objectives.info_nce(inputs, temperature=t))(0.1)
    np.testing.assert_allclose(value, objectives.info_nce(inputs), rtol=1e-5)


def test_info_nce_extremes():
    eye = Outputs(features=jnp.eye(4))
    image = jnp.zeros((4, 8, 8, 3))
    found = objectives.info_nce(AttackInputs(eye, eye, image, image))
    np.testing.assert_allclose(found, np.log(1 + 3 * np.exp(-10)), atol=1e-6)
    swapped = Outputs(features=jnp.roll(jnp.eye(4), 1, axis=0))
    lost = objectives.info_nce(AttackInputs(eye, swapped, image, image))
    np.testing.assert_allclose(lost, 10 + np.log(1 + 3 * np.exp(-10)), rtol=1e-6)


@pytest.mark.parametrize("size", [16, 64])
def test_high_pass_is_the_released_mask(size):
    images = _inputs(batch=2, size=size).clean_images
    expected = _numpy_high_pass(images, radius=size / 8)
    np.testing.assert_allclose(frequencies.high_pass(images), expected, atol=1e-6)


def test_high_pass_keeps_what_it_keeps_and_handles_odd_sizes():
    images = jnp.asarray(RNG.uniform(size=(2, 9, 12, 3)), jnp.float32)
    np.testing.assert_allclose(frequencies.high_pass(images, cutoff=0.0), images, atol=1e-6)
    once = frequencies.high_pass(images)
    np.testing.assert_allclose(frequencies.high_pass(once), once, atol=1e-6)


def test_frequencies_are_cut_without_an_fft():
    # Two CPU devices that run one at the same time wait for each other for ever (jax 0.11).
    images = _inputs(batch=2, size=8).clean_images
    gradient = jax.grad(lambda x: frequencies.high_pass(x).sum())
    assert "fft" not in str(jax.make_jaxpr(gradient)(images))


def test_the_transform_is_orthonormal_and_mixes_waves_of_one_radius():
    images = RNG.normal(size=(9, 12, 2))
    found = np.asarray(frequencies.transform(jnp.asarray(images, jnp.float32)))
    spectrum = np.fft.fft2(images, axes=(0, 1)) / np.sqrt(9 * 12)
    mirrored = np.roll(spectrum[:, ::-1], 1, axis=1)  # of the opposite horizontal frequency
    expected = mirrored.real - spectrum.imag
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(images), rtol=1e-6)


def test_pixel_terms_and_both_forms_are_their_definitions():
    inputs = _inputs(size=16)
    change = np.asarray(inputs.adversarial_images - inputs.clean_images, np.float64)
    high = _numpy_high_pass(change, 2)
    nce = _numpy_info_nce(inputs.clean.features, inputs.adversarial.features, 0.1)
    pixel, frequency = (np.sqrt((x**2).sum((1, 2, 3))).mean() for x in (change, high))
    np.testing.assert_allclose(objectives.pixel_l2(inputs), pixel, rtol=1e-5)
    np.testing.assert_allclose(objectives.high_frequency_change(inputs), frequency, rtol=1e-5)
    paper, released = nce + 5 * frequency - pixel, 5 * nce - (change**2).mean() + (high**2).mean()
    np.testing.assert_allclose(objectives.advencoder_paper(inputs), paper, rtol=1e-5)
    np.testing.assert_allclose(objectives.advencoder_released(inputs), released, rtol=1e-5)


@pytest.mark.parametrize("objective", [FEATURES[0], FEATURES[1], *PIXELS])
def test_distances_are_zero_where_nothing_changed(objective):
    np.testing.assert_allclose(objective(_unchanged(_inputs())), 0.0, atol=1e-6)


@pytest.mark.parametrize("objective", [*FEATURES, *PIXELS, *FORMS])
def test_gradients_are_finite_at_equality_and_at_zero_features(objective):
    unchanged = _unchanged(_inputs())
    dead = Outputs(features=jnp.zeros((5, 7)))
    for inputs in (unchanged, unchanged.replace(clean=dead, adversarial=dead)):
        floats = inputs.replace(labels=None)
        value, gradient = jax.value_and_grad(objective)(floats)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_zero_feature_vector_is_at_cosine_distance_one():
    dead, image = Outputs(features=jnp.zeros((2, 3))), jnp.zeros((2, 8, 8, 3))
    inputs = AttackInputs(dead, Outputs(features=jnp.ones((2, 3))), image, image)
    assert float(objectives.feature_cosine_distance(inputs)) == 1.0


@pytest.mark.parametrize("objective", [objectives.cross_entropy, *FEATURES, *PIXELS, *FORMS])
def test_the_order_of_the_batch_does_not_matter(objective):
    inputs = _inputs()
    turned = jax.tree.map(lambda leaf: leaf[::-1], inputs)
    np.testing.assert_allclose(objective(turned), objective(inputs), rtol=1e-5)
