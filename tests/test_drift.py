"""DriftPGD: away from the public encoder's features or layers, against float64 NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import TwoBlocks

from robust_ssl import attacks, models, struct, threats
from robust_ssl.attacks import DriftPGD, attack_batch
from robust_ssl.conformance import check_attack
from robust_ssl.types import Outputs

SHAPE = (4, 4, 3)
KEY = jax.random.key(0)
IMAGE = jnp.asarray(np.random.default_rng(9).uniform(0.2, 0.8, SHAPE), jnp.float32)


def _weights(seed):
    random = np.random.default_rng(seed)
    return 0.3 * random.normal(size=(48, 5)), random.normal(size=(5, 4))


def _two_blocks(seed):
    return TwoBlocks(*(jnp.asarray(w, jnp.float32) for w in _weights(seed)))


@struct.dataclass
class Score:
    """One linear feature and a constant: the optimum of a distance is known."""

    weights: jax.Array  # [48]
    constant: float

    def __call__(self, images):
        score = images.reshape(len(images), -1) @ self.weights + self.constant
        return Outputs(features=score.reshape(-1, 1))


def test_on_a_linear_model_it_reaches_the_corner_that_is_farthest_from_the_source():
    # (w.d + gap)^2 with |gap| > epsilon |w|_1 is largest at d = epsilon sign(gap) sign(w),
    # wherever one starts; the model's own clean features would have no such preference.
    weights = jnp.asarray(np.random.default_rng(0).normal(size=48), jnp.float32)
    for gap in (50.0, -50.0):
        source = Score(weights, -gap)
        attack = DriftPGD(threats.Linf(0.1), source, step_size=0.05, num_steps=4)
        moved = attack(KEY, Score(weights, 0.0), IMAGE) - IMAGE
        expected = 0.1 * np.sign(gap) * jnp.sign(weights).reshape(SHAPE)
        np.testing.assert_allclose(moved, expected, atol=1e-6)


def _numpy_path(layer, image, start, model, source, epsilon, step_size, num_steps):
    """The definition in float64, gradients by the chain rule."""
    (first, second), (first0, second0) = model, source
    image, current = (np.asarray(x, np.float64).reshape(-1) for x in (image, start))
    one0 = image @ first0
    two0 = np.tanh(one0 @ second0)
    for _ in range(num_steps):
        one = current @ first
        two = np.tanh(one @ second)
        if layer == "block1":
            gradient = first @ (2 * (one - one0))
        else:
            gradient = first @ (second @ (2 * (two - two0) * (1 - two**2)))
        current = np.clip(
            current + step_size * np.sign(gradient), image - epsilon, image + epsilon
        ).clip(0, 1)
    return current.reshape(SHAPE)


@pytest.mark.parametrize(
    ("layer", "name"),
    [(None, "block2"), ("block2", "block2"), (-1, "block2"), (0, "block1"), ("block1", "block1")],
)
def test_it_takes_the_steps_of_its_definition(layer, name):
    threat = threats.Linf(0.1)
    model, source = _two_blocks(1), _two_blocks(2)
    moved = DriftPGD(threat, source, step_size=0.03, layer=layer, num_steps=3)(KEY, model, IMAGE)
    start = threat.sample(KEY, IMAGE)
    expected = _numpy_path(name, IMAGE, start, _weights(1), _weights(2), 0.1, 0.03, 3)
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_the_step_is_the_usual_one_where_none_is_given():
    model, source = _two_blocks(1), _two_blocks(2)
    attack = DriftPGD(threats.Linf(0.1), source, num_steps=2)
    explicit = attack.replace(step_size=2 / 255)
    assert (attack(KEY, model, IMAGE) == explicit(KEY, model, IMAGE)).all()
    assert (attack(KEY, model, IMAGE) != explicit.replace(step_size=0.04)(KEY, model, IMAGE)).any()


@pytest.mark.parametrize("layer", [None, 0])
@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(0.5)])
def test_it_moves_the_encoder_that_is_its_own_source(layer, threat):
    # At the image itself the distance is zero and stationary; the random start gets it going.
    encoder = _two_blocks(1)

    def drift(image):
        seen, anchor = (encoder(x[None]) for x in (image, IMAGE))
        seen, anchor = (o.features if layer is None else o.taps["block1"] for o in (seen, anchor))
        return float(jnp.sum((seen - anchor) ** 2))

    moved = DriftPGD(threat, encoder, layer=layer, num_steps=20)(KEY, encoder, IMAGE)
    assert drift(moved) > 2 * drift(threat.sample(KEY, IMAGE)) > 0


@pytest.mark.parametrize("layer", [None, "block1", 0])
@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(0.5)])
def test_it_keeps_the_laws_of_attacks(layer, threat):
    attack = DriftPGD(threat, _two_blocks(2), layer=layer, num_steps=2)
    check_attack(attack, model=_two_blocks(1), image_size=4)


def test_it_says_that_it_needs_no_label_and_what_it_costs():
    attack = DriftPGD(threats.Linf(0.1), _two_blocks(2), num_steps=3)
    assert attack.label_free and attack.gradient_evaluations == 3
    model = _two_blocks(1)
    assert (attack(KEY, model, IMAGE) == attack(KEY, model, IMAGE, jnp.array(1))).all()
    assert attacks.DriftPGD is DriftPGD
    assert DriftPGD(threats.Linf(0.1), _two_blocks(2)).num_steps == 10


def test_budget_step_and_source_are_leaves():
    calls = []

    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def craft(attack, model):
        calls.append(attack)
        return attack(KEY, model, IMAGE)

    chex.clear_trace_counter()
    attack = DriftPGD(threats.Linf(0.1), _two_blocks(2), step_size=0.03, num_steps=2)
    results = [
        craft(attack, _two_blocks(1)),
        craft(attack.replace(step_size=0.05), _two_blocks(1)),
        craft(attack.replace(threat=threats.Linf(0.2)), _two_blocks(1)),
        craft(attack.replace(source=_two_blocks(3)), _two_blocks(1)),
        craft(attack, _two_blocks(4)),
    ]
    assert len(calls) == 1
    assert len({np.asarray(moved).tobytes() for moved in results}) == 5


def test_no_gradient_flows_into_the_source():
    model = _two_blocks(1)

    def total(source):
        attack = DriftPGD(threats.L2(0.5), source, step_size=0.1, num_steps=1)
        return jnp.sum(attack(KEY, model, IMAGE))

    chex.assert_trees_all_equal(
        jax.grad(total)(_two_blocks(2)), jax.tree.map(jnp.zeros_like, _two_blocks(2))
    )


@pytest.mark.parametrize("layer", [None, "conv1"])
def test_it_attacks_a_classifier_away_from_an_encoder(layer):
    public = tiny.encoder()
    net = models.classifier(jax.random.key(1), public, 4, head="linear")
    public = jax.device_get(public)  # as the step keeps its constants
    images = jnp.asarray(tiny.images(n=4)[0], jnp.float32) / 255
    attack = DriftPGD(threats.Linf(8 / 255), public, layer=layer, num_steps=2)
    craft = jax.jit(functools.partial(attack_batch, attack))
    moved = craft(KEY, net, images, jnp.arange(4))
    assert moved.shape == images.shape and moved.dtype == images.dtype
    largest = jnp.max(jnp.abs(moved - images), axis=(1, 2, 3))
    assert ((largest > 0) & (largest <= 8 / 255 + 1e-6)).all()
    # The labels do not matter, nor what the head says.
    assert (moved == craft(KEY, net, images, jnp.zeros(4, jnp.int32))).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda make: make(num_steps=0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda make: make(layer="block3"), ValueError, "there is no layer 'block3'.*stem"),
        (lambda make: make(layer=2), ValueError, "there is no layer 2"),
        (lambda make: make(layer=0, source=Score(jnp.zeros(48), 0.0)), ValueError, "no layer 0"),
        (lambda make: make(source=Score(jnp.zeros(48), 0.0)), AssertionError, "shape"),
    ],
)
def test_what_cannot_be_compared_is_an_error(call, error, message):
    def make(source=None, **options):
        return DriftPGD(threats.Linf(0.1), source or _two_blocks(2), **options)

    with pytest.raises(error, match=message):
        call(make)(KEY, _two_blocks(1), IMAGE)
