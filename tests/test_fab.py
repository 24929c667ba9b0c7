"""FAB-T: exact steps to a plane, the closed-form minimal distance, and the laws of attacks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import conformance, threats
from robust_ssl.attacks import fab
from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.types import Outputs

SHAPE = (4, 4, 3)
KEY = jax.random.key(0)
KINDS = [threats.Linf, threats.L2]


def _linear(weights, bias=0.0):
    def model(images):
        logits = images.reshape(len(images), -1) @ jnp.asarray(weights, jnp.float32) + bias
        return Outputs(features=logits, logits=logits)

    return model


def _no_limit(kind):
    return kind(1.0 if kind is threats.Linf else 10.0)


def _norm(kind, change):
    flat = np.asarray(change, np.float64).reshape(-1)
    return np.abs(flat).max() if kind is threats.Linf else np.sqrt(np.sum(flat**2))


def _shortest_by_bisection(kind, point, gradient, value):
    """Bisects the one unknown of the optimality conditions, in float64."""
    direction = -np.sign(value) * np.sign(gradient)
    room = np.where(direction > 0, 1 - point, point)
    speed = np.abs(gradient) if kind is threats.L2 else np.ones_like(gradient)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        gained = np.sum(np.abs(gradient) * np.minimum(middle * speed, room))
        low, high = (middle, high) if gained < abs(value) else (low, middle)
    return direction * np.minimum(high * speed, room)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_shortest_in_the_box_and_reaches_the_plane(kind):
    rng, cases = np.random.default_rng(0), []
    for _ in range(200):
        point = rng.uniform(size=20)
        point[:6] = rng.integers(0, 2, size=6)  # no room on one side
        gradient = rng.normal(size=20) * 10.0 ** rng.uniform(-2, 2, size=20)
        gradient[18:] = 0.0
        # From well inside to a little beyond what the box can give.
        most = np.sum(np.abs(gradient) * np.where(gradient > 0, 1 - point, point))
        cases.append((point, gradient, -most * rng.uniform(0.0, 1.1)))
        cases.append((1 - point, -gradient, most * rng.uniform(0.0, 0.9)))
    points, gradients, values = (np.stack(part) for part in zip(*cases, strict=True))
    expected = np.stack([_shortest_by_bisection(kind, *case) for case in cases])
    step = jax.jit(jax.vmap(lambda *case: fab.step_to_plane(kind(1.0), *case)))
    found = np.asarray(step(*(jnp.asarray(a, jnp.float32) for a in (points, gradients, values))))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.all(found[:, 18:] == 0)
    reached = values + np.sum(gradients * expected, axis=1)
    infeasible = np.abs(reached) > 1e-6 * np.abs(values)
    assert 5 < infeasible.sum() < 100  # both kinds of cases were there
    left = values + np.sum(gradients * found, axis=1)
    np.testing.assert_allclose(left, reached, atol=1e-4 * np.abs(values).max())


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_feasible_change_is_shorter_than_the_step(kind):
    # Independent of the optimality conditions: what reaches the plane is at least as long.
    rng = np.random.default_rng(1)
    point, gradient = rng.uniform(size=3), np.array([2.0, -1.0, 0.5])
    value = -0.6
    best = fab.step_to_plane(kind(1.0), jnp.asarray(point), jnp.asarray(gradient), value)
    changes = rng.uniform(size=(200_000, 3)) - point.reshape(1, 3)
    crossing = changes[value + changes @ gradient >= 0]
    lengths = np.abs(crossing).max(1) if kind is threats.Linf else np.linalg.norm(crossing, axis=1)
    assert _norm(kind, best) <= lengths.min() < 1.1 * _norm(kind, best)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_step_does_not_depend_on_the_scale_of_the_function(kind, scale):
    point, gradient = jnp.full(2, 0.5), jnp.array([3.0, 1.0])
    found = fab.step_to_plane(kind(1.0), point, scale * gradient, jnp.array(-scale))
    expected = [0.25, 0.25] if kind is threats.Linf else [0.3, 0.1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_no_step(kind):
    found = fab.step_to_plane(kind(1.0), jnp.full(4, 0.5), jnp.zeros(4), jnp.array(-1.0))
    np.testing.assert_array_equal(found, np.zeros(4))


@pytest.mark.parametrize("kind", KINDS)
def test_fab_reaches_the_closed_form_minimal_distance_of_a_linear_model(kind):
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(48, 4))
    image = np.full(SHAPE, 0.5)
    logits = image.reshape(-1) @ weights
    order = np.argsort(-logits)
    dual = (lambda w: np.abs(w).sum()) if kind is threats.Linf else np.linalg.norm

    def distance(wrong):
        difference = weights[:, wrong] - weights[:, order[0]]
        return (logits[order[0]] - logits[wrong]) / dual(difference)

    nearest = min(distance(wrong) for wrong in order[1:])
    run = jax.jit(lambda attack, image: attack(KEY, _linear(weights), image, order[0]))
    found = []
    for rank in (1, 2, 3):
        adversarial = run(fab.FABT(_no_limit(kind), num_steps=20, rank=rank), jnp.float32(image))
        assert np.argmax(np.asarray(adversarial, float).reshape(-1) @ weights) != order[0]
        found.append(_norm(kind, adversarial - image))
        # Another class may be met on the way, so a target's plane is an upper bound.
        assert nearest * 0.9999 <= found[-1] <= 1.01 * distance(order[rank])
    assert min(found) <= 1.01 * nearest


@pytest.mark.parametrize("kind", KINDS)
def test_success_is_exactly_when_the_minimal_distance_fits_the_budget(kind):
    weights = np.random.default_rng(3).normal(size=(48, 2))
    image = jnp.full(SHAPE, 0.5)
    logits = np.full(48, 0.5) @ weights
    label = int(np.argmax(logits))
    difference = weights[:, 1] - weights[:, 0]
    dual = np.abs(difference).sum() if kind is threats.Linf else np.linalg.norm(difference)
    needed = abs(logits[1] - logits[0]) / dual
    run = jax.jit(lambda attack: attack(KEY, _linear(weights), image, label))
    short = run(fab.FABT(kind(0.99 * needed), num_steps=10))
    np.testing.assert_array_equal(short, image)
    enough = run(fab.FABT(kind(1.02 * needed), num_steps=10))
    assert 0 < _norm(kind, enough - image) <= 1.02 * needed
    assert np.argmax(np.asarray(enough, float).reshape(-1) @ weights) != label


@pytest.mark.parametrize(("threat", "restarts"), [(threats.Linf(0.3), 1), (threats.L2(2.0), 2)])
def test_the_laws_of_attacks(threat, restarts):
    attack = fab.FABT(threat, num_steps=4, restarts=restarts)
    conformance.check_attack(attack, needs_label=True, image_size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_zero_and_misclassified_images_come_back_untouched(kind):
    weights = np.random.default_rng(4).normal(size=(48, 3))
    images = jnp.asarray(np.random.default_rng(5).uniform(size=(6, *SHAPE)), jnp.float32)
    model = _linear(weights)
    right = jnp.argmax(model(images).logits, axis=-1)
    run = jax.jit(lambda attack, labels: attack_batch(attack, KEY, model, images, labels))
    np.testing.assert_array_equal(run(fab.FABT(kind(0.0), num_steps=3), right), images)
    wrong = right.at[::2].set((right[::2] + 1) % 3)
    found = run(fab.FABT(_no_limit(kind), num_steps=3), wrong)
    np.testing.assert_array_equal(found[::2], images[::2])
    assert np.all(np.any(found[1::2] != images[1::2], axis=(1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", [1.0, np.nan])
def test_a_model_without_information_leaves_the_image(kind, fill):
    def model(images):
        logits = jnp.full((len(images), 3), fill) + 0.0 * jnp.sum(images)
        return Outputs(features=logits, logits=logits)

    image = jnp.full(SHAPE, 0.25)
    attack = fab.FABT(kind(0.5), num_steps=3, restarts=2)
    for label in (0, 1):
        found = jax.jit(lambda label: attack(KEY, model, image, label))(label)
        np.testing.assert_array_equal(found, image)


def test_budgets_targets_and_factors_share_one_trace():
    chex.clear_trace_counter()
    model = _linear(np.random.default_rng(6).normal(size=(48, 4)))

    @jax.jit
    @chex.assert_max_traces(1)
    def run(attack, image, label):
        return attack(KEY, model, image, label)

    image = jnp.full(SHAPE, 0.5)
    label = jnp.argmax(model(image[None]).logits[0])
    first = run(fab.FABT(threats.Linf(1.0), num_steps=3), image, label)
    second = run(fab.FABT(threats.Linf(0.9), num_steps=3, rank=2, eta=1.2), image, label)
    assert not np.array_equal(first, second)
    # A rank beyond the classes is the last wrong class, not an index out of range.
    third = run(fab.FABT(threats.Linf(1.0), num_steps=3, rank=3), image, label)
    beyond = run(fab.FABT(threats.Linf(1.0), num_steps=3, rank=99), image, label)
    np.testing.assert_array_equal(third, beyond)


@pytest.mark.parametrize("kind", KINDS)
def test_later_tries_start_at_half_the_budget(kind):
    image, attack = jnp.full(SHAPE, 0.5), fab.FABT(kind(0.4), restarts=2)
    starts = [attack._start(jax.random.fold_in(KEY, index), image) for index in range(2)]
    for start in starts:
        np.testing.assert_allclose(_norm(kind, start - image), 0.2, rtol=1e-5)
    assert not np.array_equal(*starts)
    assert attack.gradient_evaluations == 200


def test_bad_input_is_refused():
    attack, image = fab.FABT(threats.Linf(0.1)), jnp.full(SHAPE, 0.5)
    assert attack.gradient_evaluations == 100 and attack.queries == 201
    with pytest.raises(ValueError, match="num_steps and restarts"):
        fab.FABT(threats.Linf(0.1), num_steps=0)
    with pytest.raises(ValueError, match="needs labels"):
        attack(KEY, _linear(np.ones((48, 2))), image)
    with pytest.raises(ValueError, match="at least two classes"):
        attack(KEY, _linear(np.ones((48, 1))), image, 0)
    with pytest.raises(ValueError, match="no head"):
        attack(KEY, lambda images: Outputs(features=images), image, 0)
    with pytest.raises(TypeError, match="Linf and L2, got object"):
        attack.replace(threat=object())(KEY, _linear(np.ones((48, 2))), image, 0)
