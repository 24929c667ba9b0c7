"""UAP: clusters and DeepFool steps in closed form, the accumulation, and the laws of fitting."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import conformance, struct, threats
from robust_ssl.attacks import accumulated, universal
from robust_ssl.attacks.accumulated import UAP
from robust_ssl.attacks.fit_batch import FitBatch
from robust_ssl.parallel import Parallel
from robust_ssl.types import AttackInputs, Encoder, Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)


def _images(count, seed=0, shape=SHAPE):
    random = np.random.default_rng([seed, 3])
    return random.uniform(size=(count, *shape)).astype(np.float32)


# ------------------------------------------------------------------------------------- the parts


def _numpy_clusters(features, count):
    vectors = features / np.linalg.norm(features, axis=1, keepdims=True)
    centers = [vectors[0]]
    while len(centers) < count:
        centers.append(vectors[np.argmin((vectors @ np.array(centers).T).max(axis=1))])
    centers = np.array(centers)
    for _ in range(10):
        nearest = np.argmax(vectors @ centers.T, axis=1)
        for index in set(nearest):
            total = vectors[nearest == index].sum(axis=0)
            centers[index] = total / np.linalg.norm(total)
    return centers


def test_clusters_are_numpy_spherical_k_means():
    features = np.random.default_rng(0).normal(size=(40, 6))
    found = accumulated.cluster_directions(jnp.asarray(features, jnp.float32), 5)
    np.testing.assert_allclose(found, _numpy_clusters(features, 5), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)


def test_clusters_find_well_separated_groups_and_stand_degenerate_features():
    random = np.random.default_rng(1)
    corners = np.eye(4)[np.arange(32) % 4]
    features = jnp.asarray(3 * corners + 0.1 * random.normal(size=(32, 4)), jnp.float32)
    centers = accumulated.cluster_directions(features, 4)
    nearest = np.argmax(np.asarray(features @ centers.T), axis=1).reshape(8, 4)
    assert np.all(nearest == nearest[:1]) and len(set(nearest[0])) == 4
    assert accumulated.cluster_directions(features[:3], 10).shape == (3, 4)  # one for each image
    for same in (jnp.ones((4, 3)), jnp.zeros((4, 3))):
        assert np.isfinite(accumulated.cluster_directions(same, 3)).all()
    for some, count in ((features[:1], 4), (features, 1)):
        with pytest.raises(ValueError, match="at least 2 clusters and 2 images"):
            accumulated.cluster_directions(some, count)


def test_a_deepfool_step_reaches_the_nearest_boundary_of_a_linear_model():
    random = np.random.default_rng(2)
    weights, offsets = random.normal(size=(5, 2, 2, 3)), random.normal(size=5)
    image = random.normal(size=(2, 2, 3))
    scores = np.tensordot(weights, image, 3) + offsets
    label = int(np.argmax(scores))
    gaps = [  # distance to the hyperplane between the label and every other class
        np.inf if c == label
        else (scores[label] - scores[c]) / np.linalg.norm(weights[c] - weights[label])
        for c in range(5)
    ]  # fmt: skip
    args = jnp.asarray(scores, jnp.float32), jnp.asarray(weights, jnp.float32), jnp.array(label)
    change = np.asarray(accumulated.deepfool_step(*args), np.float64)
    assert np.linalg.norm(change) == pytest.approx(min(gaps), rel=1e-5)
    after = np.tensordot(weights, image + 1.02 * change, 3) + offsets
    assert np.argmax(after) == np.argmin(gaps) != label
    # An image that has left its class, and one that nothing moves, get no change.
    other = jnp.array((label + 1) % 5)
    assert not np.any(accumulated.deepfool_step(args[0], args[1], other))
    assert not np.any(accumulated.deepfool_step(args[0], 0 * args[1], args[2]))


@struct.dataclass
class Linear:
    weights: jax.Array  # [12, dim]

    def __call__(self, images):
        return Outputs(features=(images.reshape(len(images), -1) - 0.5) @ self.weights)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_step_is_the_accumulation_in_numpy(at_once):
    weights = np.random.default_rng(4).normal(size=(12, 3))
    shape, budget = (2, 2, 3), threats.Linf(0.05)
    images = 0.3 + 0.4 * _images(4, shape=shape)
    features = (images.reshape(4, 12).astype(np.float64) - 0.5) @ weights
    centers = _numpy_clusters(features, 3)
    labels = np.argmax(features @ centers.T, axis=1)

    def scores(x):
        found = (x.reshape(-1) - 0.5) @ weights
        return centers @ (found / np.linalg.norm(found))

    def change(x, label):
        jacobian = np.zeros((3, 12))
        for place in range(12):
            nudge = np.zeros(12)
            nudge[place] = 1e-6
            up, down = scores(x.reshape(-1) + nudge), scores(x.reshape(-1) - nudge)
            jacobian[:, place] = (up - down) / 2e-6
        reached = scores(x)
        if np.argmax(reached) != label:
            return np.zeros(shape)
        options = [
            (reached[label] - reached[c], jacobian[c] - jacobian[label])
            for c in range(3) if c != label
        ]  # fmt: skip
        gap, slope = min(options, key=lambda pair: pair[0] / np.linalg.norm(pair[1]))
        return (gap / np.sum(slope**2) * slope).reshape(shape)

    expected = np.zeros(shape)
    for first in range(0, 4, at_once):
        group = range(first, first + at_once)
        total = sum(change(images[i] + expected, labels[i]) for i in group)
        expected = np.clip(expected + 1.02 * total, -0.05, 0.05)
    attack, model = UAP(num_clusters=3, images_at_once=at_once), Linear(jnp.asarray(weights))
    state = attack.init(KEY, shape, budget)
    state, value = attack.step(state, budget, FitBatch.on(model, budget, jnp.asarray(images)))
    np.testing.assert_allclose(attack.delta(state, budget), expected, atol=2e-5)
    assert np.abs(expected).max() > 0.01 and float(value) == 0.0  # the curve begins unperturbed


def test_the_rate_of_changed_clusters():
    clean = Outputs(jnp.eye(4))
    moved = Outputs(jnp.eye(4)[jnp.array([0, 1, 2, 0])])
    rate = accumulated.cluster_change_rate(AttackInputs(clean, moved, None, None), num_clusters=4)
    assert float(rate) == 0.25


# --------------------------------------------------------------------------------------- fitting


class TwoConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.tanh(nn.Conv(8, (3, 3), (2, 2))(x))
        return jnp.mean(x, axis=(1, 2)), {}


@functools.cache
def _encoder():
    module = TwoConvolutions()
    variables = module.init(KEY, jnp.zeros((1, *SHAPE)))
    return Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size=8, dim=8)


def _fit(attack, *, devices=1, method="jit", epsilons=(0.0, 0.05), steps=2, **more):
    keys, budgets = universal.members((0,), epsilons)
    return universal.fit(
        attack,
        _encoder(),
        [{"images": _images(8, seed=step)} for step in range(steps)],
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=devices, kind=method),
        **more,
    )


def test_fitting_changes_more_clusters_than_noise_within_the_budget():
    attack = UAP(num_clusters=4)
    fitted = _fit(attack, epsilons=(0.0, 0.1), steps=8)
    np.testing.assert_array_equal(fitted.perturbations.delta[0], 0.0)  # epsilon 0
    assert 0.05 < np.abs(fitted.perturbations.delta[1]).max() <= 0.1 + 1e-6
    np.testing.assert_array_equal(fitted.curve[:, 0], 0.0)
    held_out = jnp.asarray(_images(128, seed=99))

    def rate(perturbation):
        outputs = [_encoder()(x) for x in (held_out, perturbation.apply(held_out))]
        return float(attack.objective(AttackInputs(*outputs, None, None)))

    noise = _fit(universal.RandomNoise(), epsilons=(0.0, 0.1), steps=1)
    assert rate(fitted.member(1)) > max(0.1, 2 * rate(noise.member(1)))
    conformance.check_attack(fitted.member(1), model=_encoder())


@pytest.mark.parametrize("method", ["pmap", "shard_map"])
@pytest.mark.parametrize("at_once", [3, 8])  # groups that the devices share, or do not
def test_a_fit_does_not_depend_on_the_devices(at_once, method):
    attack = UAP(num_clusters=4, images_at_once=at_once)
    one, several = (_fit(attack, devices=n, method=method) for n in (1, 4))
    np.testing.assert_array_equal(several.curve, one.curve)
    np.testing.assert_allclose(several.perturbations.delta, one.perturbations.delta, atol=1e-5)


def test_members_at_once_equal_those_fitted_alone_and_nothing_compiles_again():
    attack = UAP(num_clusters=4)
    together = _fit(attack, epsilons=(0.02, 0.05))
    compiled = universal._fit_step(Parallel.create(num_devices=1, kind="jit"))
    for index, epsilon in enumerate((0.02, 0.05)):
        alone = _fit(attack, epsilons=(epsilon,))
        np.testing.assert_allclose(alone.member(0).delta, together.member(index).delta, atol=1e-5)
    before = compiled._cache_size()
    other = _fit(attack.replace(overshoot=0.5), epsilons=(0.05,))
    assert compiled._cache_size() == before
    assert not np.array_equal(other.member(0).delta, together.member(1).delta)


def test_an_l2_budget_is_kept():
    fitted = _fit(UAP(num_clusters=4), threat=threats.L2, epsilons=(0.0, 0.3))
    sizes = jnp.sqrt(jnp.sum(fitted.perturbations.delta**2, axis=(1, 2, 3)))
    assert sizes[0] == 0 and 0.1 < sizes[1] <= 0.3 + 1e-5


def test_bad_static_fields_are_refused():
    for bad in ({"images_at_once": 0}, {"num_clusters": 1}):
        with pytest.raises(ValueError, match="images_at_once of at least 1"):
            UAP(**bad)
