"""Threats: what they allow is in the budget and in [0, 1], and allowed points stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import threats

SHAPE = (6, 5, 3)
BOTH = [threats.Linf(0.1), threats.L2(0.7)]


def _size(threat, change):
    change = np.asarray(change, np.float64)
    return np.abs(change).max() if isinstance(threat, threats.Linf) else np.linalg.norm(change)


def _image_and_candidate():
    image_key, candidate_key = jax.random.split(jax.random.key(0))
    image = jnp.round(jax.random.uniform(image_key, SHAPE) * 4) / 4  # with exact zeros and ones
    return image, image + 0.5 * jax.random.normal(candidate_key, SHAPE)


@pytest.mark.parametrize("threat", BOTH)
def test_project_lands_in_the_ball_and_in_the_pixel_range(threat):
    image, candidate = _image_and_candidate()
    assert _size(threat, candidate - image) > 2 * threat.epsilon
    projected = threat.project(candidate, image)
    assert _size(threat, projected - image) <= threat.epsilon + 1e-6
    assert projected.min() >= 0 and projected.max() <= 1


@pytest.mark.parametrize("threat", BOTH)
def test_project_is_idempotent_and_leaves_allowed_points_alone(threat):
    image, candidate = _image_and_candidate()
    once = threat.project(candidate, image)
    np.testing.assert_allclose(threat.project(once, image), once, atol=1e-6)
    inside = jnp.clip(image + 0.01, 0, 1)
    np.testing.assert_array_equal(threat.project(inside, image), inside)


@pytest.mark.parametrize("threat", BOTH)
def test_epsilon_zero_allows_the_image_only(threat):
    image, candidate = _image_and_candidate()
    threat = threat.replace(epsilon=0.0)
    np.testing.assert_array_equal(threat.project(candidate, image), image)
    np.testing.assert_array_equal(threat.sample(jax.random.key(1), image), image)


@pytest.mark.parametrize("threat", BOTH)
def test_samples_are_allowed_differ_and_fill_the_budget(threat):
    image = jnp.full(SHAPE, 0.5)
    keys = jax.random.split(jax.random.key(2), 50)
    samples = jax.vmap(lambda key: threat.sample(key, image))(keys)
    sizes = [_size(threat, sample - image) for sample in samples]
    assert max(sizes) <= threat.epsilon + 1e-6 and max(sizes) > 0.95 * threat.epsilon
    assert not np.array_equal(samples[0], samples[1])


@pytest.mark.parametrize("threat", BOTH)
def test_steepest_raises_a_linear_function_the_most_and_is_finite_at_zero(threat):
    gradient = jax.random.normal(jax.random.key(3), SHAPE)
    best = jnp.vdot(gradient, threat.steepest(gradient))
    dual = (
        jnp.abs(gradient).sum() if isinstance(threat, threats.Linf) else (gradient**2).sum() ** 0.5
    )
    np.testing.assert_allclose(best, dual, rtol=1e-5)
    np.testing.assert_array_equal(threat.steepest(jnp.zeros(SHAPE)), jnp.zeros(SHAPE))
    np.testing.assert_allclose(threat.steepest(1e-30 * gradient), threat.steepest(gradient), 1e-5)


def test_l2_project_has_a_finite_gradient_everywhere():
    image = jnp.full(SHAPE, 0.5)
    for epsilon in (0.0, 0.7):
        gradient = jax.grad(lambda x, e=epsilon: threats.L2(e).project(x, image).sum())(image)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("epsilon", [-0.01, 1.5, float("nan"), [0.1, 8.0]])
def test_bad_epsilon_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, 1\]"):
        threats.check_epsilon(epsilon)


@pytest.mark.parametrize("threat", BOTH)
def test_norm_is_the_size_that_epsilon_bounds_and_has_a_gradient_at_zero(threat):
    change = jax.random.normal(jax.random.key(4), SHAPE)
    np.testing.assert_allclose(threat.norm(change), _size(threat, change), rtol=1e-6)
    assert threat.norm(jnp.zeros(SHAPE)) == 0
    assert np.isfinite(jax.grad(threat.norm)(jnp.zeros(SHAPE))).all()


@pytest.mark.parametrize(
    "threat",
    [*BOTH, threats.Patch(0.25, "random"), threats.Band(threats.L2(0.5), 0.1, 0.25)],
)
def test_every_threat_survives_being_taken_apart(threat):
    again = threats.from_entries(threats.to_entries(threat))
    as_float32 = jax.tree.map(np.float32, threat)
    assert jax.tree.structure(again) == jax.tree.structure(as_float32)
    assert [float(x) for x in jax.tree.leaves(again)] == jax.tree.leaves(as_float32)


@pytest.mark.parametrize("epsilon", [8, 8.0, 1.01, -0.1, float("nan"), np.float32(8)])
def test_a_ball_of_a_number_that_is_no_budget_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"8/255"):
        threats.Linf(epsilon)
    with pytest.raises(ValueError, match=r"8/255"):
        threats.Linf(0.1).replace(epsilon=epsilon)
    if not epsilon > 0:
        with pytest.raises(ValueError, match="Euclidean length"):
            threats.L2(epsilon)


def test_what_jax_makes_of_a_ball_may_hold_anything():
    doubled = jax.tree.map(lambda leaf: 40 * leaf, threats.Linf(0.1))
    assert doubled.epsilon == 4.0
    assert jax.jit(lambda threat: threat.epsilon)(threats.Linf(jnp.float32(8))) == 8
    assert jax.vmap(threats.L2)(jnp.arange(3.0)).epsilon.shape == (3,)


@pytest.mark.parametrize("what", [{"epsilon": 0.1}, 0.1, None, "linf", threats.Linf, object()])
def test_what_is_no_threat_is_told_what_one_is(what):
    with pytest.raises(ValueError, match="no threat"):
        threats.check(what)


def test_check_looks_at_every_budget_of_a_stack():
    threats.check(threats.Linf(np.array([0.0, 0.1])), SHAPE)
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, 1\].*got 8"):
        threats.check(threats.Linf(np.array([0.1, 8.0])))
    with pytest.raises(ValueError, match=r"epsilon of L2.*got -8"):
        threats.check(threats.L2(np.array([0.1, -8.0])))


def test_an_l2_budget_may_be_as_long_as_the_image_allows():
    threats.check(threats.L2(3.0), (224, 224, 3))
    threats.check(threats.L2(np.sqrt(8 * 8 * 3)), (8, 8, 3))
    threats.check(threats.L2(500.0))  # for an image of unknown size
    threats.check(threats.Band(threats.L2(3.0), 0.1), (224, 224, 3))
    with pytest.raises(ValueError, match=r"at most 13.86 for \(8, 8, 3\), got 14"):
        threats.check(threats.L2(14.0), (8, 8, 3))
    for epsilon in (-0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and at least 0"):
            threats.check(threats.L2(epsilon))
