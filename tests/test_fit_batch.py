"""What a universal attack's step sees does not depend on the devices, nor does a user's attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import struct, threats
from robust_ssl.attacks import FitBatch, UniversalPGD, fit, members, random_delta
from robust_ssl.objectives import cross_entropy, feature_l2
from robust_ssl.parallel import Parallel
from robust_ssl.types import Outputs

SHAPE = (8, 8, 3)
LAYOUTS = [(1, "pmap"), (2, "pmap"), (4, "pmap"), (2, "shard_map"), (4, "shard_map"), (4, "jit")]


@struct.dataclass
class Bend:
    """One dense layer with a bend."""

    weights: jax.Array

    def __call__(self, images):
        return Outputs(features=jnp.tanh(images.reshape(len(images), -1) @ self.weights))


@functools.cache
def _model():
    weights = np.random.default_rng(0).normal(size=(192, 8)) / 14
    with jax.ensure_compile_time_eval():  # it is kept, and may be asked for first in a step
        return Bend(jnp.asarray(weights, jnp.float32))


def _images(count=8):
    return np.random.default_rng(1).uniform(size=(count, *SHAPE)).astype(np.float32)


# A user's attack, whole: no device in sight.


@struct.dataclass
class SteepestAscent:
    step_size: float = 0.01

    def init(self, key, image_shape, threat):
        return random_delta(key, image_shape, threat)

    def step(self, state, threat, batch):
        value, gradient = batch.value_and_grad(feature_l2, state)
        return batch.project(state + self.step_size * batch.steepest(gradient)), value

    def delta(self, state, threat):
        return state


def _fit(layout, threat=threats.L2, epsilons=(0.5, 1.0)):
    keys, budgets = members((0,), epsilons)
    devices, method = layout
    return fit(
        SteepestAscent(),
        _model(),
        [{"images": _images()}] * 3,
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=devices, kind=method),
        threat=threat,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_users_attack_is_the_same_on_all_devices(layout):
    one, several = _fit((1, "jit")), _fit(layout)
    np.testing.assert_allclose(several.curve, one.curve, rtol=1e-5)
    np.testing.assert_allclose(several.perturbations.delta, one.perturbations.delta, atol=1e-6)
    assert np.all(one.curve[-1] > one.curve[0])
    assert one.member(0).name == "SteepestAscent"


def test_a_users_attack_is_its_formula():
    threat, weights = threats.L2(0.5), np.asarray(_model().weights, np.float64)
    key, images = members((0,), (0.5,))[0][0], _images().reshape(8, -1).astype(np.float64)
    start = np.asarray(random_delta(key, SHAPE, threat), np.float64).reshape(-1)

    def value(delta):
        moved = np.clip(images + delta, 0, 1)
        return np.mean(np.linalg.norm(np.tanh(moved @ weights) - np.tanh(images @ weights), axis=1))

    nudges = 1e-6 * np.eye(192)
    gradient = np.array([(value(start + x) - value(start - x)) / 2e-6 for x in nudges])
    moved = start + 0.01 * gradient / np.linalg.norm(gradient)
    moved *= min(1.0, 0.5 / np.linalg.norm(moved))
    batch = FitBatch.on(_model(), threat, jnp.asarray(_images()))
    found, first = SteepestAscent().step(jnp.asarray(start, "f4").reshape(SHAPE), threat, batch)
    np.testing.assert_allclose(first, value(start), rtol=1e-5)
    np.testing.assert_allclose(found.reshape(-1), moved, atol=1e-5)


def _on_devices(function, layout):
    """Runs a function of a batch in a step, as `fit` does."""
    devices, method = layout
    parallel = Parallel.create(num_devices=devices, kind=method)

    def step(state, batch):
        images = batch["images"]
        threat, clean = threats.Linf(0.1), _model()(images)
        return state, function(FitBatch(_model(), threat, images, clean, parallel.axis_name))

    state = parallel.replicate(jnp.zeros(()))
    return jax.device_get(parallel.compile(step)(state, parallel.put({"images": _images()}))[1])


DELTA = jnp.asarray(np.random.default_rng(2).uniform(-0.1, 0.1, SHAPE), jnp.float32)


def _distance(batch, delta):
    return feature_l2_of(batch.clean.features, batch.model(batch.attacked(delta)).features)


def feature_l2_of(clean, moved):
    return jnp.mean(jnp.linalg.norm(moved - clean, axis=1))


def _gradient_for_weights(batch):
    weights = {"low": DELTA, "high": 2.0 * DELTA}
    return batch.value_and_grad(feature_l2, weights, lambda w: w["low"] + 0.1 * w["high"])


WAYS = {
    "value_and_grad": lambda batch: batch.value_and_grad(feature_l2, DELTA),
    "the gradient of value": lambda batch: jax.value_and_grad(
        lambda delta: batch.value(feature_l2, delta)
    )(DELTA),
    "a gradient by hand": lambda batch: jax.value_and_grad(lambda delta: _distance(batch, delta))(
        DELTA
    ),
    "weights of a generator": _gradient_for_weights,
    "all that is read": lambda batch: (batch.images, batch.clean, batch.attacked(DELTA)),
    "other images": lambda batch: batch.with_images(
        lambda places: jnp.ones((1, *SHAPE)) * places.reshape(-1, 1, 1, 1) / 8
    ).value_and_grad(feature_l2, DELTA),
    "one image": lambda batch: batch.only(jnp.full((1, *SHAPE), 0.5)).value_and_grad(
        feature_l2, DELTA
    ),
    "a map": lambda batch: batch.map(lambda x: x["a"] ** 2, {"a": jnp.arange(8.0)}),
    "a map that does not divide": lambda batch: batch.map(lambda x: x**2, jnp.arange(7.0)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [(4, "pmap"), (2, "shard_map")])
def test_what_a_step_sees_is_the_global_batch(way, layout):
    one = _on_devices(WAYS[way], (1, "jit"))
    several = _on_devices(WAYS[way], layout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), several, one)


@struct.dataclass
class Linear:
    """Logits that are linear in the pixels, ``[192, 3]``."""

    weights: jax.Array

    def __call__(self, images):
        logits = images.reshape(len(images), -1) @ self.weights
        return Outputs(features=logits, logits=logits)


LABELS = np.arange(8, dtype=np.int32) % 3


def _fit_with_labels(layout, num_steps=1, **batch):
    devices, method = layout
    keys, budgets = members((0,), (0.1,))
    return fit(
        UniversalPGD(step_size=1.0, momentum=0.0, objective=cross_entropy),
        Linear(_model().weights[:, :3]),
        [{"images": 0.5 + 0.2 * (_images() - 0.5), **batch}] * num_steps,
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=devices, kind=method),
    )


@pytest.mark.parametrize("layout", [(1, "jit"), (2, "pmap"), (4, "shard_map")])
def test_with_labels_one_long_step_is_the_corner_that_the_gradient_points_to(layout):
    """Of a linear model, by NumPy: the mean over images of softmax less label, times weights."""
    weights = np.asarray(_model().weights[:, :3], np.float64)
    start = np.asarray(random_delta(members((0,), (0.1,))[0][0], SHAPE, threats.Linf(0.1)))
    images = (0.5 + 0.2 * (_images() - 0.5)).reshape(8, -1) + start.reshape(-1)
    logits = images.astype(np.float64) @ weights
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (shares - np.eye(3)[LABELS]).mean(0) @ weights.T
    found = _fit_with_labels(layout, labels=LABELS)
    np.testing.assert_allclose(
        found.member(0).delta.reshape(-1), 0.1 * np.sign(gradient), atol=1e-6
    )
    value = -np.log(shares[np.arange(8), LABELS]).mean()
    np.testing.assert_allclose(found.curve[0, 0], value, rtol=1e-5)


def test_an_objective_that_needs_labels_says_so_where_there_are_none():
    with pytest.raises(
        ValueError, match=r"cross_entropy needs labels.*batches of attacks.fit take"
    ):
        _fit_with_labels((1, "jit"))
    batch = FitBatch.on(_model(), threats.Linf(0.1), jnp.asarray(_images()), jnp.asarray(LABELS))
    assert batch.with_images(lambda places: jnp.zeros((len(places), *SHAPE))).part_labels is None


def test_three_ways_to_a_gradient_agree():
    batch = FitBatch.on(_model(), threats.Linf(0.1), jnp.asarray(_images()))
    ways = ("value_and_grad", "the gradient of value", "a gradient by hand")
    first, *others = (WAYS[way](batch)[1] for way in ways)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-8)
    _, of_weights = _gradient_for_weights(batch)
    np.testing.assert_allclose(of_weights["high"], 0.1 * of_weights["low"], rtol=1e-5, atol=1e-9)
