"""What a user's function closes over is read anew: figures are those of the weights of now."""

import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import robust_ssl
from robust_ssl import attacks, evaluation, objectives, struct, threats
from robust_ssl.evaluation.analysis import per_layer_stability, spectra
from robust_ssl.parallel import Parallel, reads_more
from robust_ssl.parallel.alone import MOST
from robust_ssl.types import Outputs

QUIET = {"progress": "quiet", "batch_size": 8}
WEIGHTS = {"w": None}
SIGN = {"of": 1.0}
IMAGES, LABELS = tiny.images("test", n=8)


def first_classes():
    """Weights by which the first image feature decides; their opposite is always wrong."""
    return jnp.eye(192)[:, :4] + jax.random.normal(jax.random.key(0), (192, 4))


def net(images):
    logits = (images.reshape(len(images), -1) - 0.5) @ WEIGHTS["w"]
    return Outputs(features=logits, logits=logits)


def logits_alone(images):
    return net(images).logits


class Net:
    def __init__(self):
        self.weights = WEIGHTS["w"]

    def __call__(self, images):
        logits = (images.reshape(len(images), -1) - 0.5) @ self.weights
        return Outputs(features=logits, logits=logits)


def train_on(model):
    WEIGHTS["w"] = -WEIGHTS["w"]
    if isinstance(model, Net):
        model.weights = -model.weights


MODELS = {
    "function": lambda: net,
    "object": Net,
    "partial": lambda: jax.tree_util.Partial(net),
    "from_callable": lambda: robust_ssl.from_callable(logits_alone, 8, num_classes=4),
}


@pytest.fixture(autouse=True)
def _weights():
    WEIGHTS["w"], SIGN["of"] = first_classes(), 1.0


@pytest.fixture
def labels():
    return np.asarray(jnp.argmax(net(jnp.asarray(IMAGES / np.float32(255))).logits, axis=1))


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_measured_with_the_weights_of_now(kind, labels):
    model = MODELS[kind]()
    options = {"attacks": "fgsm", "epsilon": 0.0, "examine": False, **QUIET}
    before = robust_ssl.measure(model, IMAGES, labels, **options)
    train_on(model)
    after = robust_ssl.measure(model, IMAGES, labels, **options)
    assert (before.clean_accuracy, before.robust_accuracy) == (1.0, 1.0)
    assert (after.clean_accuracy, after.robust_accuracy) == (0.0, 0.0)


def test_attacks_in_turn_and_the_examination_see_the_weights_of_now(labels):
    options = {"attacks": {"both": {"fgsm": [attacks.FGSM(threats.Linf(2 / 255))]}}, **QUIET}
    first = robust_ssl.measure(net, IMAGES, labels, **options)
    train_on(net)
    again = robust_ssl.measure(net, IMAGES, labels, **options)
    fresh = robust_ssl.measure(lambda images: net(images), IMAGES, labels, **options)
    assert first.clean_accuracy == 1.0 and again.clean_accuracy == 0.0
    assert str(again) == str(fresh)


def test_a_model_called_or_scored_alone_is_that_of_now(labels):
    model = MODELS["from_callable"]()
    images = jnp.asarray(IMAGES / np.float32(255))
    batches = [{"images": IMAGES, "labels": labels}]
    options = {"key": jax.random.key(0), "parallel": Parallel.create(num_devices=1)}
    attack = {"none": attacks.FGSM(threats.Linf(0.0))}

    def look():
        scored = evaluation.score(model, batches, attack, **options)["none"]
        logits = model(images).logits
        return np.mean(np.argmax(logits, axis=1) == labels), scored.counts.clean_accuracy

    assert look() == (1.0, 1.0)
    train_on(model)
    assert look() == (0.0, 0.0)


def test_layers_and_spectra_see_the_weights_of_now(labels):
    images, other = (jnp.asarray(x / np.float32(255)) for x in (IMAGES, IMAGES[::-1]))

    options = {"key": jax.random.key(0), "norm": 0.1, "stride": 4}

    def look():
        drift = per_layer_stability(net, images, other)["features"]["relative_drift"]
        return drift, spectra.fourier_sensitivity(net, IMAGES, labels, **options).clean

    first = look()
    WEIGHTS["w"] = -jnp.roll(jnp.sort(WEIGHTS["w"]), 1, axis=0)
    second = look()
    assert first[0] != second[0] and first[1] == 0.0 and second[1] > 0.0


def upside_down(inputs):
    return SIGN["of"] * jnp.sum(inputs.adversarial.logits[:, 0])


@struct.dataclass
class Shift:
    """Adds what a global says."""

    threat: object

    def __call__(self, key, model, image, label=None):
        return jnp.clip(image + SIGN["of"] * 8 / 255, 0, 1)


@pytest.mark.parametrize("kind", ["objective", "attack", "partial"])
def test_an_attack_reads_the_globals_of_now(kind, labels):
    threat = threats.Linf(8 / 255)
    attack = {
        "objective": attacks.PGD(threat, objective=upside_down, num_steps=1),
        "attack": Shift(threat),
        "partial": jax.tree_util.Partial(
            lambda key, model, image, label: jnp.clip(image + SIGN["of"] * 0.3, 0, 1)
        ),
    }[kind]
    model = robust_ssl.from_callable(
        lambda images: jnp.stack([images.mean((1, 2, 3)) - 0.5, jnp.zeros(len(images))], 1),
        8,
        num_classes=2,
    )
    gray = np.full((4, 8, 8, 3), 128, np.uint8)  # the first class by a little: 128 is above 0.5
    options = {"attacks": attack, "examine": False, **QUIET, "batch_size": 4}
    accuracies = []
    for sign in (1.0, -1.0):
        SIGN["of"] = sign
        result = robust_ssl.measure(model, gray, np.array([0, 0, 0, 0]), **options)
        accuracies.append(result.robust_accuracy)
    assert accuracies == [1.0, 0.0]


def test_a_fit_sees_the_weights_and_the_objective_of_now():
    def fit(**options):
        return robust_ssl.attack(net, IMAGES, num_steps=3, **options, **QUIET).numpy()

    objective = attacks.UniversalPGD(objective=upside_down)
    first, by_objective = fit(), fit(attack=objective)
    SIGN["of"] = -1.0
    assert not np.array_equal(fit(attack=objective), by_objective)
    WEIGHTS["w"] = jnp.roll(WEIGHTS["w"], 1, axis=0)
    again = fit()
    fresh = robust_ssl.attack(lambda images: net(images), IMAGES, num_steps=3, **QUIET).numpy()
    assert not np.array_equal(again, first)
    np.testing.assert_array_equal(again, fresh)


def test_programs_of_a_function_go_after_a_few_calls():
    model = Net()
    robust_ssl.measure(model, IMAGES, LABELS, attacks="fgsm", examine=False, **QUIET)
    left = weakref.ref(model)
    del model
    for _ in range(MOST):
        Parallel.create(num_devices=1).anew_for(net)
    gc.collect()
    assert left() is None


def test_what_is_of_the_package_is_compiled_once():
    parallel = Parallel.create(num_devices=1)
    threat = threats.Linf(0.1)
    pgd = attacks.PGD(threat, objective=objectives.margin)
    models = [tiny.encoder(), tiny.encoder().replace(preprocess=lambda x: x)]
    assert not any(map(reads_more, [pgd, "pgd", {"a": [pgd]}, threats.Linf, *models]))
    assert parallel.anew_for(pgd, models) is parallel
    own = [pgd.replace(objective=upside_down), {"a": [lambda: 0]}, Net, types.FunctionType]
    assert all(map(reads_more, own)) and parallel.anew_for(own[0]) != parallel
