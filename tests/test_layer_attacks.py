"""Attacks on layers: objectives and steps against float64 NumPy, and the laws of fitting."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TwoBlocks

from robust_ssl import conformance, threats
from robust_ssl.attacks import universal
from robust_ssl.attacks.fit_batch import FitBatch
from robust_ssl.attacks.layers import FFF, L4AUGS, SSP, STD, UAPPGD, L4ABase, L4AFuse
from robust_ssl.objectives import layers
from robust_ssl.parallel import Parallel
from robust_ssl.types import AttackInputs, Encoder, Outputs

SHAPE = (4, 4, 3)
KEY = jax.random.key(0)
BUDGET = threats.Linf(0.1)


def _weights():
    random = np.random.default_rng(0)
    return random.normal(size=(48, 5)) * 0.3, random.normal(size=(5, 4))


def _two_blocks():
    return TwoBlocks(*(jnp.asarray(w, jnp.float32) for w in _weights()))


def _numpy_blocks(images):
    first, second = _weights()
    one = np.asarray(images, np.float64).reshape(len(images), -1) @ first
    return one, np.tanh(one @ second)


def _images(count, seed=0, shape=SHAPE, low=0.2, high=0.8):
    random = np.random.default_rng([seed, 7])
    return random.uniform(low, high, size=(count, *shape)).astype(np.float32)


def _energy(clean, moved):
    return np.mean(moved[0] ** 2)


def _fused(weight):
    return lambda clean, moved: np.mean(moved[0] ** 2) + weight * np.mean(moved[1] ** 2)


def _distance(place):
    return lambda clean, moved: np.mean(np.linalg.norm(moved[place] - clean[place], axis=1))


def _log_norms(clean, moved):
    return np.mean(sum(np.log(np.linalg.norm(block, axis=1)) for block in moved))


def _flatness(clean, moved):
    return -np.mean(np.std(moved[1], axis=1))


# ------------------------------------------------------------------------------------ objectives

OBJECTIVES = [
    (layers.activation_energy, _energy),
    (functools.partial(layers.fused_energy, weight=0.5), _fused(0.5)),
    (functools.partial(layers.fused_energy, layer="block1"), _fused(1.0)),
    (functools.partial(layers.activation_distance, layer=1), _distance(1)),
    (functools.partial(layers.activation_distance, layer="block1"), _distance(0)),
    (layers.log_activation_norms, _log_norms),
    (functools.partial(layers.log_activation_norms, layers=(0, -1)), _log_norms),
    (functools.partial(layers.negative_dispersion, layer=-1), _flatness),
]


@pytest.mark.parametrize(("objective", "expected"), OBJECTIVES)
def test_an_objective_is_its_numpy_formula(objective, expected):
    clean, moved = _images(3), _images(3, seed=1)
    outputs = [_two_blocks()(jnp.asarray(x)) for x in (clean, moved)]
    found = objective(AttackInputs(*outputs, clean, moved))
    assert found.shape == ()
    np.testing.assert_allclose(found, expected(_numpy_blocks(clean), _numpy_blocks(moved)), 1e-5)


@pytest.mark.parametrize(("objective", "_"), OBJECTIVES)
def test_gradients_are_finite_where_layers_are_silent_or_unmoved(objective, _):
    images = jnp.zeros((2, *SHAPE))

    def value(x):
        clean = _two_blocks()(images)
        return objective(AttackInputs(clean, _two_blocks()(x), images, x))

    found, gradient = jax.value_and_grad(value)(images)
    assert np.isfinite(found) and np.isfinite(gradient).all()


def test_a_silent_layer_counts_as_the_smallest_norm():
    silent = Outputs(jnp.zeros((2, 1)), taps={"block1": jnp.zeros((2, 4))})
    inputs = AttackInputs(silent, silent, None, None)
    np.testing.assert_allclose(layers.log_activation_norms(inputs), np.log(1e-6), rtol=1e-6)


def test_blocks_stand_in_natural_order_whatever_the_order_of_the_dict():
    names = ["stage2/block1", "stem", "stage1/block10", "stage1/block2", "embed", "stage10/block1"]
    expected = ["stage1/block2", "stage1/block10", "stage2/block1", "stage10/block1"]
    taps = {name: jnp.full((1, 1), float(i)) for i, name in enumerate(names)}
    assert layers.block_names(taps) == layers.block_names(dict(sorted(taps.items()))) == expected
    outputs = Outputs(jnp.zeros((1, 1)), taps=taps)
    for place, name in enumerate(expected):
        for layer in (place, place - 4, name):
            assert layers.activation(outputs, layer) == taps[name]
    assert layers.activation(outputs, "stem") == 1.0


@pytest.mark.parametrize("layer", [2, -3, "block3"])
def test_an_absent_layer_is_an_error_that_lists_the_taps(layer):
    outputs = _two_blocks()(jnp.asarray(_images(1)))
    with pytest.raises(ValueError, match=r"no layer .*'block1', 'block2', 'stem'.*are blocks"):
        layers.activation(outputs, layer)


def test_errors_of_fused_and_summed_layers():
    outputs = _two_blocks()(jnp.asarray(_images(1)))
    inputs = AttackInputs(outputs, outputs, None, None)
    for layer in (1, -1, "block2"):
        with pytest.raises(ValueError, match="no block comes after"):
            layers.fused_energy(inputs, layer=layer)
    with pytest.raises(ValueError, match="'stem' is no block"):
        layers.fused_energy(inputs, layer="stem")
    none = Outputs(jnp.zeros((1, 1)), taps={"stem": jnp.zeros((1, 1))})
    with pytest.raises(ValueError, match=r"no layer 0.*\['stem'\]"):
        layers.log_activation_norms(AttackInputs(none, none, None, None))


# ------------------------------------------------------------------------- steps, in float64 NumPy


def _numpy_gradient(formula, delta, images):
    """Central differences of a formula of the blocks, with respect to the perturbation."""
    clean, found = _numpy_blocks(images), np.zeros(SHAPE)
    for place in np.ndindex(*SHAPE):
        nudge = np.zeros(SHAPE)
        nudge[place] = 1e-6
        up, down = (formula(clean, _numpy_blocks(images + delta + s * nudge)) for s in (1, -1))
        found[place] = (up - down) / 2e-6
    return found


def _steps(attack, images, count=1):
    """Returns the perturbation before and after, and the curve."""
    model = _two_blocks()
    state = attack.init(KEY, SHAPE, BUDGET)
    before, batch, curve = attack.delta(state, BUDGET), FitBatch.on(model, BUDGET, images), []
    for _ in range(count):
        state, value = attack.step(state, BUDGET, batch)
        curve.append(float(value))
    return np.asarray(before, np.float64), state, curve


@pytest.mark.parametrize(
    ("attack", "formula"),
    [
        (L4ABase(0.01), _energy),
        (L4AFuse(0.01, weight=2.0), _fused(2.0)),
        (SSP(0.01, layer=1), _distance(1)),
        (STD(0.01, layer=1), _flatness),
    ],
)
def test_a_step_follows_the_sign_of_the_gradient(attack, formula):
    images = _images(3)
    before, state, curve = _steps(attack, jnp.asarray(images))
    gradient = _numpy_gradient(formula, before, images)
    expected = np.clip(before + 0.01 * np.sign(gradient), -0.1, 0.1)
    np.testing.assert_allclose(attack.delta(state, BUDGET), expected, atol=1e-6)
    after = formula(_numpy_blocks(images), _numpy_blocks(images + before))
    np.testing.assert_allclose(curve[0], after, rtol=1e-5)


def test_l4a_ugs_steps_on_gaussian_images_of_its_own():
    attack, images = L4AUGS(0.01), jnp.asarray(_images(4))
    before, state, _ = _steps(attack, images)
    start = attack.init(KEY, SHAPE, BUDGET)
    drawn = attack.gaussian_images(jax.random.fold_in(start.key, 0), jnp.arange(4), SHAPE)
    drawn = np.asarray(drawn, np.float64)
    gradient = _numpy_gradient(_fused(0.01), before, drawn)
    expected = np.clip(before + 0.01 * np.sign(gradient), -0.1, 0.1)
    np.testing.assert_allclose(attack.delta(state, BUDGET), expected, atol=1e-6)
    # The images of the batch are not looked at, and another step draws others.
    _, other, _ = _steps(attack, 1.0 - images)
    chex.assert_trees_all_equal(attack.delta(state, BUDGET), attack.delta(other, BUDGET))
    assert int(state.count) == 1
    again = attack.gaussian_images(jax.random.fold_in(start.key, 1), jnp.arange(4), SHAPE)
    assert np.abs(again - drawn).min() > 0


def test_gaussian_images_have_the_published_moments_and_follow_their_global_index():
    attack = L4AUGS()
    images = np.asarray(attack.gaussian_images(KEY, jnp.arange(200), (16, 16, 3)))
    means, stds = images.mean((1, 2, 3)), images.std((1, 2, 3))
    assert 0.39 < means.min() < 0.42 and 0.58 < means.max() < 0.61
    assert 0.045 < stds.min() < 0.055 and 0.095 < stds.max() < 0.105
    assert images.min() >= 0 and images.max() <= 1
    part = attack.gaussian_images(KEY, jnp.arange(7, 9), (16, 16, 3))
    np.testing.assert_allclose(part, images[7:9], atol=1e-6)


def test_uap_pgd_is_numpy_momentum_ascent_with_long_and_then_short_steps():
    attack, images = UAPPGD(0.01, 0.001, momentum=0.5, num_steps=2), _images(3)
    delta, state, curve = _steps(attack, jnp.asarray(images))
    formula, velocity = _distance(1), np.zeros(SHAPE)
    assert curve[0] == pytest.approx(formula(_numpy_blocks(images), _numpy_blocks(images + delta)))
    for length in (0.01, 0.01, 0.001, 0.001):
        gradient = _numpy_gradient(formula, delta, images)
        velocity = 0.5 * velocity + gradient / np.abs(gradient).mean()
        delta = np.clip(delta + length * np.sign(velocity), -0.1, 0.1)
    np.testing.assert_allclose(attack.delta(state, BUDGET), delta, atol=1e-5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        UAPPGD(num_steps=0)


def test_fff_is_numpy_adam_on_a_gray_image():
    attack, gray = FFF(0.004), np.full((1, *SHAPE), 0.5)
    delta, state, curve = _steps(attack, jnp.asarray(_images(3)), count=3)
    first, second, values, path = np.zeros(SHAPE), np.zeros(SHAPE), [], []
    for step in range(1, 4):
        values.append(_log_norms(None, _numpy_blocks(gray + delta)))
        path.append(delta)
        gradient = _numpy_gradient(_log_norms, delta, gray)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        delta = np.clip(delta + 0.004 * first / (1 - 0.9**step) / scale, -0.1, 0.1)
    np.testing.assert_allclose(curve, values, rtol=1e-4)
    np.testing.assert_allclose(state.current, delta, atol=2e-5)
    np.testing.assert_allclose(attack.delta(state, BUDGET), path[np.argmax(values)], atol=2e-5)


def test_fff_halves_a_perturbation_that_stays_at_the_budget():
    attack, images, model = FFF(1.0), jnp.asarray(_images(2)), _two_blocks()
    state, sizes = attack.init(KEY, SHAPE, BUDGET), []
    for _ in range(2):  # both steps reach far beyond the budget
        state, _ = attack.step(state, BUDGET, FitBatch.on(model, BUDGET, images))
        sizes.append(float(jnp.abs(state.current).max()))
    assert float(state.saturation) == 1.0
    np.testing.assert_allclose(sizes, [0.1, 0.05], rtol=1e-5)


# ------------------------------------------------------------------------------------- fitting


class TwoConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = one = nn.relu(nn.Conv(8, (3, 3))(x))
        x = two = nn.tanh(nn.Conv(8, (3, 3), (2, 2))(x))
        return jnp.mean(x, axis=(1, 2)), {"block1": one, "block2": two}


@functools.cache
def _encoder():
    module = TwoConvolutions()
    variables = module.init(KEY, jnp.zeros((1, 8, 8, 3)))
    return Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size=8, dim=8)


def _fit(attack, *, devices=1, method="jit", seeds=(0,), epsilons=(0.0, 0.1), steps=6, **more):
    keys, budgets = universal.members(seeds, epsilons)
    return universal.fit(
        attack,
        _encoder(),
        [{"images": _images(8, step, (8, 8, 3), 0.0, 1.0)} for step in range(steps)],
        keys=keys,
        epsilons=budgets,
        image_shape=(8, 8, 3),
        parallel=Parallel.create(num_devices=devices, kind=method),
        **more,
    )


ATTACKS = [
    L4ABase(0.02),
    L4AFuse(0.02),
    L4AUGS(0.02),
    SSP(0.02, layer=1),
    STD(0.02, layer=1),
    FFF(0.02),
    UAPPGD(0.01, 0.002, num_steps=2),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_fitting_beats_noise_on_the_attacks_own_objective_within_the_budget(attack):
    fitted = _fit(attack, steps=12)
    noise = _fit(universal.RandomNoise(objective=attack.objective), steps=12)
    assert fitted.curve.shape == (12, 2)
    found, other = fitted.perturbations, noise.perturbations
    np.testing.assert_array_equal(found.delta[0], 0.0)  # epsilon 0
    assert 0.05 < np.abs(found.delta[1]).max() <= 0.1 + 1e-6
    held_out = jnp.asarray(_images(16, 99, (8, 8, 3), 0.0, 1.0))

    def value(perturbation):
        inputs = AttackInputs(
            _encoder()(held_out), _encoder()(perturbation.apply(held_out)), held_out, held_out
        )
        return float(attack.objective(inputs))

    zero = value(fitted.member(0))
    assert value(fitted.member(1)) - zero > 1.1 * abs(value(noise.member(1)) - zero)
    assert other.name == "random_noise" and found.name == attack.name
    conformance.check_attack(fitted.member(1), model=_encoder())


@pytest.mark.parametrize("attack", [ATTACKS[2], ATTACKS[5], ATTACKS[6]], ids=lambda a: a.name)
@pytest.mark.parametrize("method", ["pmap", "shard_map"])
def test_a_fit_does_not_depend_on_the_devices(attack, method):
    one, several = (_fit(attack, steps=2, devices=n, method=method) for n in (1, 4))
    np.testing.assert_allclose(several.curve, one.curve, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(several.perturbations.delta, one.perturbations.delta, atol=1e-5)


@pytest.mark.parametrize("attack", [ATTACKS[2], ATTACKS[5]], ids=lambda attack: attack.name)
def test_members_at_once_equal_those_fitted_alone(attack):
    together = _fit(attack, seeds=(0, 1), epsilons=(0.05, 0.1), steps=2)
    for index, (seed, epsilon) in enumerate([(0, 0.05), (0, 0.1), (1, 0.05), (1, 0.1)]):
        alone = _fit(attack, seeds=(seed,), epsilons=(epsilon,), steps=2)
        np.testing.assert_allclose(alone.member(0).delta, together.member(index).delta, atol=1e-5)


@pytest.mark.parametrize("attack", [ATTACKS[0], ATTACKS[6]], ids=lambda attack: attack.name)
def test_another_step_size_does_not_compile_again(attack):
    first = _fit(attack, steps=2)
    compiled = universal._fit_step(Parallel.create(num_devices=1, kind="jit"))
    before = compiled._cache_size()
    other = _fit(attack.replace(step_size=0.001), steps=2)
    assert compiled._cache_size() == before
    assert not np.array_equal(first.perturbations.delta, other.perturbations.delta)


def test_an_l2_budget_is_kept():
    for attack in (ATTACKS[0], ATTACKS[5]):
        fitted = _fit(attack, threat=threats.L2, epsilons=(0.0, 0.5), steps=2)
        sizes = jnp.sqrt(jnp.sum(fitted.perturbations.delta**2, axis=(1, 2, 3)))
        assert sizes[0] == 0 and 0 < sizes[1] <= 0.5 + 1e-5
