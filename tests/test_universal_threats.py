"""Every universal attack under bands and patches, the gradients it sees, and what `fit` refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import attacks, struct, threats
from robust_ssl.attacks import accumulated, perturbation, universal
from robust_ssl.attacks.fit_batch import FitBatch
from robust_ssl.parallel import Parallel
from robust_ssl.types import AttackInputs, Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)


@struct.dataclass
class FourBlocks:
    """Dense layers with a bend; cheap to compile."""

    weights: tuple[jax.Array, ...]

    def __call__(self, images):
        x, taps = images.reshape(len(images), -1) - 0.5, {}
        for place, weight in enumerate(self.weights):
            x = taps[f"block{place}"] = jnp.tanh(x @ weight)
        return Outputs(features=x, taps=taps)


@functools.cache
def _model():
    random = np.random.default_rng(0)
    sizes = (192, 16, 16, 16, 16)
    pairs = itertools.pairwise(sizes)
    return FourBlocks(tuple(jnp.asarray(random.normal(size=s) / s[0] ** 0.5, "f4") for s in pairs))


def _images(count=8, low=0.0, high=1.0):
    random = np.random.default_rng(3)
    return jnp.asarray(random.uniform(low, high, (count, *SHAPE)), jnp.float32)


def _fit(attack, threat, budgets, *, steps=6, model=None, parallel=None):
    keys, budgets = universal.members((0,), budgets)
    return universal.fit(
        attack,
        model or _model(),
        [{"images": _images()}] * steps,
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=parallel or Parallel.create(num_devices=1, kind="jit"),
        threat=threat,
    )


def _low_pass(epsilon):
    return threats.Band(threats.Linf(epsilon), 0.0, 0.2)


def _random_patch(area):
    return threats.Patch(area, "random")


def _outside(delta):
    """Returns the largest amplitude outside the band of `_low_pass`, by NumPy in float64."""
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, SHAPE[:2]), indexing="ij"))
    return np.abs(np.fft.fft2(np.asarray(delta, np.float64), axes=(0, 1)))[frequency >= 0.2].max()


# ------------------------------------------------------------------------------------ all attacks

UNIVERSAL = {
    name: kind
    for name, kind in vars(attacks).items()
    if isinstance(kind, type)
    and kind is not attacks.UniversalAttack
    and all(hasattr(kind, method) for method in ("init", "step", "delta"))
}


def _check_rises(attack, fitted):
    """The objective, on the images and at the places of the first step, is above the start's."""
    for index in range(len(fitted)):
        member = fitted.member(index)
        threat = perturbation.at_step(member.threat, KEY, jnp.int32(0))
        start = attack.delta(attack.init(KEY, SHAPE, threat), threat)
        batch = FitBatch.on(_model(), threat, _images())
        before, after = (
            float(batch.value(attack.objective, delta)) for delta in (start, member.delta)
        )
        if attack.name == "random_noise":
            np.testing.assert_array_equal(member.delta, start)
        elif attack.name == "uap":  # starts at zero, and its objective is a share of 8 images
            assert np.abs(member.delta).max() > 0.01
        else:
            assert after > before + 1e-3 * abs(before)


def test_all_universal_attacks_are_found():
    assert {"UAP", "FFF", "RandomNoise", "UniversalPGD", "AdvEncoderPAT"} <= set(UNIVERSAL)
    assert len(UNIVERSAL) >= 12


@pytest.mark.parametrize("name", sorted(set(UNIVERSAL) - {"AdvEncoderPAT"}))
def test_every_attack_keeps_its_band_and_its_budget_and_rises(name):
    fitted = _fit(tiny.quick_attack(name), _low_pass, (0.05, 0.2))
    for index, budget in enumerate((0.05, 0.2)):
        delta = np.asarray(fitted.member(index).delta)
        assert _outside(delta) < 1e-5
        assert 0.2 * budget < np.abs(delta).max() <= budget * (1 + 1e-6)
    assert np.isfinite(fitted.curve).all() and (name != "UAP" or fitted.curve[-1, 1] > 0)
    _check_rises(tiny.quick_attack(name), fitted)


@pytest.mark.parametrize("name", sorted(UNIVERSAL))
def test_every_attack_keeps_its_patch_of_random_location_and_rises(name):
    fitted = _fit(tiny.quick_attack(name), _random_patch, (0.1, 0.25))
    for index in range(2):
        member = fitted.member(index)
        delta, mask = np.asarray(member.delta), np.asarray(member.threat.mask(8, 8))[..., 0]
        assert delta.min() >= 0 and delta.max() <= 1 and np.all(delta[~mask] == 0)
    assert np.isfinite(fitted.curve).all()
    _check_rises(tiny.quick_attack(name), fitted)


def test_fast_feature_fool_in_a_band_beats_noise_of_the_same_band():
    attack = attacks.FFF(learning_rate=0.02)
    found = _fit(attack, _low_pass, (0.1,), steps=30).member(0)
    noise = _fit(attacks.RandomNoise(objective=attack.objective), _low_pass, (0.1,), steps=1)
    gray = jnp.full((1, *SHAPE), 0.5)

    def value(perturbed):
        outputs = _model()(perturbed.apply(gray))
        return float(attack.objective(AttackInputs(outputs, outputs, gray, gray)))

    zero = float(attack.objective(AttackInputs(*[_model()(gray + 1e-3)] * 2, gray, gray)))
    assert value(found) > value(noise.member(0)) + 0.1 * abs(zero)
    np.testing.assert_allclose(np.abs(found.delta).max(), 0.1, rtol=0.02)


@pytest.mark.parametrize("threat", [threats.L2(0.5), _low_pass(0.1), threats.Patch(0.9)])
def test_fast_feature_fool_halves_only_where_the_budget_is_each_entrys(threat):
    attack = attacks.FFF(learning_rate=0.5)  # every step reaches far beyond the budget
    state, sizes = attack.init(KEY, SHAPE, threat), []
    batch = FitBatch.on(_model(), threat, _images())
    step = jax.jit(lambda state: attack.step(state, threat, batch)[0])
    for _ in range(6):
        state = step(state)
        sizes.append(float(jnp.linalg.norm(state.current)))
    assert min(sizes) > 0.7 * max(sizes)


def test_the_share_at_the_budget_by_hand():
    delta = jnp.array([0.1, -0.1, 0.05, 0.0]).reshape(2, 2, 1)
    for threat, share in (
        (threats.Linf(0.1), 0.5),
        (threats.Band(threats.Linf(0.1)), 0.5),
        (threats.L2(0.15), 0.0),
        (threats.Patch(1.0), 0.0),
    ):
        assert float(perturbation.share_at_budget(delta, threat)) == share


# -------------------------------------------------------------------------------------- gradients


def _gradient(threat, delta, images):
    return jax.grad(
        lambda delta: jnp.sum(
            _model()(perturbation.attacked_images(delta, images, threat)).features ** 2
        )
    )(delta)


@pytest.mark.parametrize("kind", [threats.Linf, threats.L2])
def test_gradients_lie_in_the_band_and_are_those_without_it_filtered(kind):
    threat, images = threats.Band(kind(0.1), 0.0, 0.2), _images(3, 0.3, 0.7)
    delta = threat.sample_delta(KEY, SHAPE)
    found = _gradient(threat, delta, images)
    size = float(jnp.abs(found).max())
    assert size > 0 and _outside(found) < 1e-4 * size
    whole = _gradient(kind(0.1), delta, images)
    assert _outside(whole) > size
    np.testing.assert_allclose(found, threat.filter_delta(whole), atol=1e-5 * size)


def test_a_deepfool_step_in_a_band_needs_no_frequency_outside_it():
    attack, images = attacks.UAP(num_clusters=3), _images(6, 0.3, 0.7)
    centers = accumulated.cluster_directions(_model()(images).features, 3)
    labels = jnp.argmax(_model()(images).features @ centers.T, axis=1)
    example = {"image": images[0], "label": labels[0], "place": jnp.int32(0)}
    batch = FitBatch.on(_model(), _low_pass(0.1), images)
    change = attack._change(jnp.zeros(SHAPE), example, batch, centers)
    size = float(jnp.abs(change).max())
    assert size > 0 and _outside(change) < 1e-4 * size


@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(0.5)])
def test_black_and_white_pixels_feel_the_whole_gradient(threat):
    image = jnp.asarray([0.0, 1.0, 128 / 255, 1 / 255] * 48, jnp.float32).reshape(1, *SHAPE)

    def total(delta):
        return jnp.sum(perturbation.attacked_images(delta, image, threat))

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(SHAPE)), 1.0)
    # Pixels that are cut cannot move: the black ones downwards, the white ones upwards.
    down, up = (jax.grad(total)(jnp.full(SHAPE, s)) for s in (-1 / 512, 1 / 512))
    np.testing.assert_array_equal(down, np.where(image[0] == 0, 0.0, 1.0))
    np.testing.assert_array_equal(up, np.where(image[0] == 1, 0.0, 1.0))


@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(0.5), _low_pass(0.1)])
def test_fitting_sees_the_images_that_attacking_makes(threat):
    delta = perturbation.random_delta(KEY, SHAPE, threat)
    found = perturbation.attacked_images(delta, _images(), threat)
    np.testing.assert_array_equal(
        found, attacks.UniversalPerturbation(delta, threat).apply(_images())
    )


def test_uap_sees_the_patch_at_the_place_of_each_image():
    attack, images = attacks.UAP(num_clusters=3, images_at_once=8), _images()
    threat = perturbation.at_step(threats.Patch(0.25, "random"), KEY, jnp.int32(0))
    start, clean = threat.sample_delta(KEY, SHAPE), _model()(images)
    centers = accumulated.cluster_directions(clean.features, 3)
    labels = jnp.argmax(clean.features @ centers.T, axis=1)

    def scores(delta):  # of all images at once, each at its own place
        features = _model()(perturbation.attacked_images(delta, images, threat)).features
        return features / jnp.linalg.norm(features, axis=1, keepdims=True) @ centers.T

    changes = jax.vmap(accumulated.deepfool_step)(scores(start), jax.jacrev(scores)(start), labels)
    expected = threat.project_delta(start + 1.02 * jnp.sum(changes, axis=0))
    found, _ = attack.step(start, threat, FitBatch.on(_model(), threat, images))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - start).max() > 1e-3


def test_uap_with_a_random_patch_does_not_depend_on_the_devices():
    one, parallel = (
        _fit(tiny.quick_attack("UAP"), _random_patch, (0.1, 0.25)),
        Parallel.create(num_devices=4),
    )
    several = _fit(tiny.quick_attack("UAP"), _random_patch, (0.1, 0.25), parallel=parallel)
    np.testing.assert_allclose(several.perturbations.delta, one.perturbations.delta, atol=1e-5)


# ------------------------------------------------------------------------------------ what is told


@pytest.mark.parametrize("name", sorted(set(UNIVERSAL) - {"AdvEncoderPAT"}))
def test_a_model_that_gives_nan_is_an_error_and_not_a_perturbation(name):
    broken = jax.tree.map(lambda weight: weight.at[0, 0].set(jnp.nan), _model())
    words = r"member\(s\) \[0, 1\] of 2 is not finite, first in step 0; look at what the encoder"
    with pytest.raises(ValueError, match=words):
        _fit(tiny.quick_attack(name), _low_pass, (0.05, 0.2), steps=2, model=broken)


def test_the_first_bad_step_and_member_are_named():
    curve = np.array([[1.0, 1.0, 1.0], [1.0, np.inf, 1.0], [1.0, 1.0, np.nan]])
    deltas = np.zeros((3, 2, 2, 3))
    universal._check_finite("x", np.ones((3, 3)), deltas)
    with pytest.raises(ValueError, match=r"^x: .*\[1, 2\] of 3 .*first in step 1;"):
        universal._check_finite("x", curve, deltas)
    deltas[2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"\[2\] of 3 is not finite, after the last step, 3;"):
        universal._check_finite("x", np.ones((3, 3)), deltas)


@struct.dataclass
class _Doubles(attacks.RandomNoise):
    """Leaves its budget."""

    def delta(self, state, threat):
        return 2 * state


@pytest.mark.parametrize("threat", [threats.Linf, threats.L2], ids=["Linf", "L2"])
def test_a_perturbation_beyond_its_budget_is_an_error(threat):
    words = r"random_noise: the perturbation of member\(s\) \[1\] is larger .* where 0.2 is allowed"
    with pytest.raises(ValueError, match=words):
        _fit(_Doubles(), threat, (0.0, 0.2), steps=1)


def test_a_perturbation_that_is_not_finite_is_not_saved(tmp_path):
    for bad in (jnp.nan, jnp.inf):
        delta = jnp.zeros(SHAPE).at[0, 0, 0].set(bad)
        with pytest.raises(ValueError, match="not finite and is not saved"):
            attacks.UniversalPerturbation(delta, threats.Linf(0.1)).save(tmp_path / "bad.npz")
    assert not (tmp_path / "bad.npz").exists()


def test_a_budget_that_no_perturbation_can_use_is_refused_with_advice():
    attack = attacks.RandomNoise()
    with pytest.raises(ValueError, match=r"epsilon 0\.6: .* take at most 0\.5, or a per-image"):
        _fit(attack, threats.Linf, (0.1, 0.6), steps=1)
    for threat, budget in ((threats.Linf, 0.5), (threats.L2, 1.0), (_low_pass, 0.8)):
        delta = _fit(attack, threat, (budget,), steps=1).member(0).delta
        size = jnp.linalg.norm(delta) if threat is threats.L2 else jnp.abs(delta).max()
        np.testing.assert_allclose(size, budget, rtol=1e-5)


def test_uap_counts_a_gradient_for_each_cluster_it_really_makes():
    assert attacks.UAP(num_clusters=10).gradients_per_batch(4) == 16
    assert attacks.UAP(num_clusters=10).gradients_per_batch(64) == 640


@struct.dataclass
class Ball:
    """An L2 ball that does not say that it is one."""

    epsilon: jax.Array | float

    def check(self, image_shape=None):
        threats.L2(self.epsilon).check(image_shape)

    def norm(self, change):
        return threats.L2(self.epsilon).norm(change)

    def project(self, candidate, image):
        return threats.L2(self.epsilon).project(candidate, image)

    def sample(self, key, image):
        return threats.L2(self.epsilon).sample(key, image)

    def steepest(self, gradient):
        return threats.L2(self.epsilon).steepest(gradient)


def test_a_ball_of_ones_own_is_gone_through_as_the_packages():
    ours, theirs = (_fit(universal.UniversalPGD(), ball, (2.0,)) for ball in (threats.L2, Ball))
    np.testing.assert_allclose(ours.member(0).delta, theirs.member(0).delta, atol=1e-6)
    assert universal.usual_length(threats.Linf(0.3), 2e-3) == 2e-3
    assert universal.usual_length(threats.Patch(0.1), 2e-3) == 2e-3


@struct.dataclass
class Shift:
    """Any shift by one pixel: nothing on a gray image."""

    epsilon: jax.Array | float

    def _all(self, image):
        return jnp.stack([jnp.roll(image, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)])

    def project(self, candidate, image):
        shifted = self._all(image)
        return shifted[jnp.argmin(jnp.sum((shifted - candidate[None]) ** 2, axis=(1, 2, 3)))]

    def sample(self, key, image):
        return self._all(image)[jax.random.randint(key, (), 0, 9)]

    def steepest(self, gradient):
        return jnp.sign(gradient)


def test_a_threat_that_leaves_a_gray_image_alone_fits_nothing_and_says_so():
    with pytest.raises(ValueError, match=r"Shift allows no change of a gray image.*project_delta"):
        _fit(universal.UniversalPGD(), Shift, (0.1,))
