"""Bands: nothing outside the band, exactly inside the budget, for any additive threat."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import threats
from robust_ssl.attacks import universal
from robust_ssl.attacks.per_image import FGSM, PGD, attack_batch
from robust_ssl.attacks.perturbation import UniversalPerturbation, random_delta, within_budget
from robust_ssl.parallel import Parallel
from robust_ssl.threats import L2, Band, Linf
from robust_ssl.types import Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
INFINITY = float("inf")
BANDS = [
    Band(Linf(0.1), 0.0, 0.2),
    Band(Linf(0.1), 0.3, INFINITY),
    Band(Linf(0.1), 0.1, 0.3),
    Band(L2(0.7), 0.0, 0.2),
    Band(L2(0.7), 0.2, 0.4),
]
GRAY = jnp.full(SHAPE, 0.5)


def _outside(threat, change):
    """Returns the largest amplitude outside the band, by NumPy in float64."""
    change = np.asarray(change, np.float64)
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, SHAPE[:2]), indexing="ij"))
    outside = (frequency < threat.low) | (frequency >= threat.high)
    return np.abs(np.fft.fft2(change, axes=(0, 1)))[outside].max(initial=0)


def _size(threat, change):
    change = np.asarray(change, np.float64)
    return np.abs(change).max() if isinstance(threat.threat, Linf) else np.linalg.norm(change)


@pytest.mark.parametrize("threat", BANDS)
def test_band_and_budget_hold_together_for_whatever_makes_a_delta(threat):
    noise = jax.random.normal(KEY, SHAPE)
    start = random_delta(KEY, SHAPE, threat)
    full = threat.delta_of(jnp.sign(noise))
    for delta in (within_budget(noise, threat), start, full):
        assert _outside(threat, delta) < 1e-5
        assert 0.05 < _size(threat, delta) <= threat.epsilon * (1 + 1e-6)
    for filled in (within_budget(noise, threat), full):
        np.testing.assert_allclose(_size(threat, filled), threat.epsilon, rtol=1e-6)
    np.testing.assert_allclose(within_budget(full, threat), full, atol=1e-6)
    np.testing.assert_allclose(within_budget(0.1 * full, threat), 0.1 * full, atol=1e-6)


@pytest.mark.parametrize("threat", BANDS)
def test_images_keep_the_laws_where_the_pixel_range_is_far(threat):
    once = threat.project(GRAY + jax.random.normal(KEY, SHAPE), GRAY)
    np.testing.assert_allclose(threat.project(once, GRAY), once, atol=1e-6)
    for image in (once, threat.sample(KEY, GRAY)):
        assert _outside(threat, image - GRAY) < 1e-5
        assert _size(threat, image - GRAY) <= threat.epsilon * (1 + 1e-6)
    black = threat.project(GRAY, jnp.zeros(SHAPE).at[0].set(1.0))
    assert black.min() >= 0 and black.max() <= 1


def test_the_whole_spectrum_is_the_inner_threat_scaled_and_nothing_is_nothing():
    delta = jnp.clip(jax.random.normal(KEY, SHAPE), -0.1, 0.1)
    np.testing.assert_allclose(Band(Linf(0.1)).project_delta(delta), delta, atol=1e-6)
    high = Band(Linf(0.1), 0.1)
    for nothing in (jnp.zeros(SHAPE), jnp.full(SHAPE, 0.3)):  # a mean has no high frequency
        for result in (high.delta_of(nothing), high.project_delta(nothing), high.steepest(nothing)):
            np.testing.assert_allclose(result, 0.0, atol=1e-6)
    for result in (Band(L2(0.0)).project_delta(delta), Band(Linf(0.0)).project_delta(delta)):
        np.testing.assert_array_equal(result, jnp.zeros(SHAPE))
    gradient = jax.grad(lambda x: Band(L2(0.5), 0.1).delta_of(x).sum())(jnp.zeros(SHAPE))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("threat", BANDS)
def test_steepest_is_a_unit_step_in_the_band_and_the_best_one_for_a_euclidean_ball(threat):
    gradient = jax.random.normal(KEY, SHAPE)
    step = threat.steepest(gradient)
    assert _outside(threat, step) < 1e-4
    np.testing.assert_allclose(threat.norm(step), 1.0, rtol=1e-5)
    assert jnp.vdot(step, gradient) > 0
    np.testing.assert_allclose(threat.steepest(1e-30 * gradient), step, atol=1e-5)  # saturated
    if isinstance(threat.threat, L2):
        inside = threat.replace(threat=L2(1e9)).project_delta(gradient)
        np.testing.assert_allclose(step, inside / jnp.linalg.norm(inside), atol=1e-6)


@pytest.mark.parametrize("size", [19, 20, 25])
def test_a_band_that_begins_at_any_frequency_of_the_image_holds_it(size):
    for place in range(1, size // 2 + 1):
        band = Band(Linf(0.1), place / size, place / size + 1e-3)
        band.check((size, size, 3))
        stripes = jnp.cos(2 * jnp.pi * place * jnp.arange(size) / size).reshape(1, size, 1)
        kept = band.filter_delta(jnp.broadcast_to(stripes, (size, size, 3)))
        assert float(jnp.max(jnp.abs(kept))) > 0.9


@pytest.mark.parametrize(
    ("threat", "shape", "words"),
    [
        (Band(Linf(np.array(2.0))), None, "epsilon must lie"),
        (Band(Linf(0.1), 0.3, 0.2), None, "low=0.3 and high=0.2"),
        (Band(Linf(0.1), -0.1, 0.2), None, "0 <= low < high"),
        (Band(Linf(0.1), 0.0, float("nan")), None, "high=nan"),
        (Band(threats.Patch(0.1)), None, "additive threat.*got Patch"),
        (Band(0.1), None, r"additive threat.*got a number; .*lambda epsilon: threats\.Band\("),
        (Band(Linf(0.1), 0.8), SHAPE, "8x8 has no frequency from 0.8 to inf"),
        (Band(Linf(0.1), 0.01, 0.1), SHAPE, "they are 0.125 apart"),
    ],
)
def test_an_impossible_band_is_refused(threat, shape, words):
    with pytest.raises(ValueError, match=words):
        threats.check(threat, shape)


# ---------------------------------------------------------------------------------------- attacks


def _linear(images):
    """One feature: how much of one wave, 0.125 cycles per pixel, and of chequers is in an image."""
    wave = jnp.cos(2 * jnp.pi * jnp.arange(8) / 8).reshape(1, 8, 1, 1)
    rows, columns = jnp.arange(8).reshape(1, 8, 1, 1), jnp.arange(8).reshape(1, 1, 8, 1)
    chequers = (-1.0) ** (rows + columns)
    score = jnp.sum(images * (wave + 5 * chequers), axis=(1, 2, 3)).reshape(-1, 1)
    return Outputs(features=score, logits=jnp.concatenate([score, -score], axis=1))


LINEAR = jax.tree_util.Partial(_linear)


def raise_feature(inputs):
    return jnp.mean(inputs.adversarial.features)


def _fit(threat, attack, budgets=(0.1,), *, devices=1, steps=12):
    keys, budgets = universal.members((0,), budgets)
    return universal.fit(
        attack,
        LINEAR,
        [{"images": np.full((4, *SHAPE), 0.5, np.float32)} for _ in range(steps)],
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=devices),
        threat=threat,
    )


def _low_pass(epsilon, kind=Linf):
    return Band(kind(epsilon), 0.0, 0.15)


def test_a_low_pass_perturbation_is_the_wave_and_not_the_chequers_at_every_budget():
    # A step far beyond the ball forgets the start: what is left is the steepest direction.
    attack = universal.UniversalPGD(step_size=1e3, objective=raise_feature)
    fitted = _fit(functools.partial(_low_pass, kind=L2), attack, (0.2, 0.5))
    wave = np.broadcast_to(np.cos(2 * np.pi * np.arange(8) / 8).reshape(8, 1, 1), SHAPE)
    for index, budget in enumerate((0.2, 0.5)):
        best = budget * wave / np.linalg.norm(wave)
        np.testing.assert_allclose(fitted.member(index).delta, best, atol=1e-3 * budget)
    several = _fit(functools.partial(_low_pass, kind=L2), attack, (0.2, 0.5), devices=4)
    np.testing.assert_allclose(several.perturbations.delta, fitted.perturbations.delta, atol=1e-5)


@pytest.mark.parametrize(
    "attack",
    [
        universal.UniversalPGD(step_size=0.02, objective=raise_feature),
        universal.RandomNoise(objective=raise_feature),
    ],
)
def test_every_fitted_band_is_kept_and_filled(attack):
    fitted = _fit(_low_pass, attack, (0.05, 0.2), steps=15)
    for index, budget in enumerate((0.05, 0.2)):
        member = fitted.member(index)
        assert _outside(member.threat, member.delta) < 1e-5
        np.testing.assert_allclose(np.abs(member.delta).max(), budget, rtol=1e-3)


@pytest.mark.parametrize("threat", BANDS[2:4])
def test_per_image_attacks_stay_in_the_band(threat):
    attacks = [PGD(threat, step_size=0.3 * threat.epsilon, num_steps=4), FGSM(threat)]
    for attack in attacks:
        images = jnp.full((2, *SHAPE), 0.5)
        found = jax.jit(attack_batch)(attack, KEY, LINEAR, images, jnp.array([0, 1]))
        for image in found:
            assert _outside(threat, image - GRAY) < 1e-5
            assert _size(threat, image - GRAY) <= threat.epsilon * (1 + 1e-5)


def test_another_band_does_not_trace_again():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def project(threat, image):
        return threat.project(image + 0.1, image)

    for threat in (Band(Linf(0.1), 0.0, 0.2), Band(Linf(0.2), 0.1, INFINITY)):
        project(threat, GRAY)


# ---------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("threat", BANDS)
def test_a_band_survives_saving_and_resizing(tmp_path, threat):
    attack = UniversalPerturbation(random_delta(KEY, SHAPE, threat), threat, name="low")
    attack.save(tmp_path / "band.npz")
    loaded = UniversalPerturbation.load(tmp_path / "band.npz")
    np.testing.assert_array_equal(loaded.delta, attack.delta)
    assert type(loaded.threat.threat) is type(threat.threat)
    expected = [np.float32(number) for number in (threat.epsilon, threat.low, threat.high)]
    assert [loaded.threat.epsilon, loaded.threat.low, loaded.threat.high] == expected
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(3, *SHAPE)), jnp.float32)
    np.testing.assert_allclose(loaded.apply(images), attack.apply(images), atol=1e-6)
    larger = loaded.resized(16)
    assert larger.delta.shape == (16, 16, 3)
    np.testing.assert_allclose(within_budget(larger.delta, threat), larger.delta, atol=1e-6)
