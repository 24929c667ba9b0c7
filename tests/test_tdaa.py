"""TDAA: the closed form on a linear model, the laws of attacks, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import conformance, struct, threats
from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.attacks.targeted import TDAA, towards_target
from robust_ssl.types import AttackInputs, Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)


@struct.dataclass
class Model:
    """Features are a bent linear function of the pixels; with bend 0 a linear one."""

    weights: jax.Array  # [192, dim]
    bend: float = struct.field(pytree_node=False, default=1.0)

    def __call__(self, images):
        features = images.reshape(len(images), -1) @ self.weights
        return Outputs(features=jnp.tanh(features) if self.bend else features)


@functools.cache
def _model(dim=6, bend=1.0):
    weights = np.random.default_rng(0).normal(size=(192, dim)) / 8
    return Model(jnp.asarray(weights, jnp.float32), bend)


def _images(count, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.uniform(0.2, 0.8, size=(count, *SHAPE)), jnp.float32)


@jax.jit
def _attack(attack, model, images):
    return attack_batch(attack, KEY, model, images)


def _distances(images, target):
    model = _model()
    return np.linalg.norm(model(images).features - model(target[None]).features, axis=1)


def test_the_objective_is_its_numpy_formula():
    random = np.random.default_rng(0)
    moved, goal = random.normal(size=(4, 5)), random.normal(size=(1, 5))
    outputs = Outputs(jnp.asarray(moved, jnp.float32))
    target = Outputs(jnp.asarray(goal, jnp.float32))
    found = towards_target(AttackInputs(outputs, outputs, None, None, target=target))
    np.testing.assert_allclose(found, -np.linalg.norm(moved - goal, axis=1).mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="needs a target"):
        towards_target(AttackInputs(outputs, outputs, None, None))


def test_it_reaches_the_closed_form_optimum_of_a_linear_model():
    # One feature, a target far away: every pixel moves the whole budget towards it.
    model, image, budget = _model(dim=1, bend=0), jnp.full(SHAPE, 0.5), 0.05
    direction = np.sign(np.asarray(model.weights)).reshape(SHAPE)
    target = jnp.asarray(0.5 + 0.4 * direction, jnp.float32)
    attack = TDAA(threats.Linf(budget), target, 0.01, num_steps=15)
    found = attack(KEY, model, image)
    np.testing.assert_allclose(found, 0.5 + budget * direction, atol=1e-5)


def test_a_step_is_numpy_sign_descent_of_the_distance():
    image, target = (np.asarray(x, np.float64) for x in _images(2))
    weights = np.asarray(_model().weights, np.float64)

    def features(x):
        return np.tanh(x.reshape(-1) @ weights)

    goal = features(target)
    start = np.asarray(
        threats.Linf(0.05).sample(jax.random.fold_in(KEY, 0), jnp.asarray(image, jnp.float32)),
        np.float64,
    )
    expected = start
    for _ in range(3):
        reached = features(expected)
        change = (reached - goal) / np.linalg.norm(reached - goal)
        gradient = -(weights @ (change * (1 - reached**2))).reshape(SHAPE)
        expected = np.clip(expected + 0.01 * np.sign(gradient), image - 0.05, image + 0.05)
    attack = TDAA(threats.Linf(0.05), jnp.asarray(target, jnp.float32), 0.01, num_steps=3)
    found = attack(KEY, _model(), jnp.asarray(image, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_comes_nearer_than_noise_of_the_same_size_and_restarts_never_hurt():
    images, target = _images(8), _images(1, seed=5)[0]
    threat = threats.Linf(0.05)
    attack = TDAA(threat, target, 0.02, num_steps=10)
    found = _attack(attack, _model(), images)
    assert np.abs(found - images).max() <= 0.05 + 1e-6
    noise = jax.vmap(lambda key, x: threat.project(x + 0.05 * jax.random.rademacher(
        key, SHAPE, jnp.float32), x))(jax.random.split(KEY, 8), images)  # fmt: skip
    near, far = _distances(found, target), _distances(noise, target)
    assert np.all(near < 0.5 * far)
    more = _attack(attack.replace(restarts=2), _model(), images)
    assert np.all(_distances(more, target) <= near + 1e-5)


@pytest.mark.parametrize("threat", [threats.Linf(0.05), threats.L2(0.5)])
def test_it_keeps_the_laws_of_attacks(threat):
    conformance.check_attack(TDAA(threat, jnp.ones(SHAPE), num_steps=2))


def test_no_label_is_seen_and_another_target_does_not_trace_again():
    traces, model = [], _model()

    @jax.jit
    def run(attack, image):
        traces.append(1)
        return attack(KEY, model, image, jnp.array(1))

    image, (first, second) = _images(1)[0], _images(2, seed=3)
    attack = TDAA(threats.Linf(0.05), first, num_steps=2)
    found = run(attack, image)
    unlabelled = jax.jit(lambda attack, image: attack(KEY, model, image))(attack, image)
    np.testing.assert_allclose(found, unlabelled, atol=1e-6)
    other = run(TDAA(threats.Linf(0.1), second, num_steps=2), image)
    assert len(traces) == 1 and not np.array_equal(found, other)
    assert attack.gradient_evaluations == 2


def test_a_target_of_another_size_says_how_to_resize_it():
    attack = TDAA(threats.Linf(0.05), jnp.ones((16, 16, 3)), num_steps=1)
    with pytest.raises(ValueError, match=r"\(16, 16, 3\).*\(8, 8, 3\).*jax.image.resize"):
        attack(KEY, _model(), _images(1)[0])


def test_without_a_given_step_an_l2_budget_is_spent():
    images, target = _images(4), _images(1, seed=5)[0]
    attack = TDAA(threats.L2(1.0), target, num_steps=10)
    usual, given, short = (
        _distances(_attack(attack.replace(step_size=step), _model(), images), target)
        for step in (None, 0.25, 2 / 255)
    )
    np.testing.assert_allclose(usual, given, rtol=1e-5)
    assert np.all(usual < 0.9 * short)
