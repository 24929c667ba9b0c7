import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl import losses
from robust_ssl.conformance import check_loss
from robust_ssl.types import LossInputs, Outputs


def make_inputs(seed=0, batch=6, classes=4, dim=5):
    random = np.random.default_rng(seed)

    def draw(size):
        return jnp.asarray(random.normal(size=(batch, size)), jnp.float32)

    return LossInputs(
        labels=jnp.asarray(random.integers(0, classes, batch), jnp.int32),
        clean=Outputs(features=draw(dim), logits=3 * draw(classes)),
        adversarial=Outputs(features=draw(dim), logits=3 * draw(classes)),
        pretrained=Outputs(features=draw(dim)),
    )


def cross_entropy_float64(logits, labels):
    logits = np.asarray(logits, np.float64)
    top = logits.max(1)
    log_total = np.log(np.exp(logits - top[:, None]).sum(1)) + top
    return log_total - logits[np.arange(len(labels)), labels]


def genetic_float64(reference, follower, error, labels):
    """The definition, pair by pair."""
    n = len(labels)

    def distances(x):
        x = np.asarray(x, np.float64)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        d = 1 - x @ x.T
        nearest = [min(d[i, j] for j in range(n) if j != i) for i in range(n)]
        return d - np.array(nearest)[:, None]

    def neighbours(d):
        s = 1 - np.clip(d, 0, 2) / 2
        np.fill_diagonal(s, 0)
        return s / s.sum(1, keepdims=True)

    def kl(p, q):
        return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))

    target = distances(reference)
    for i in range(n):
        for j in range(n):
            s = np.tanh((error[i] + error[j]) / 32)
            m = -1 if labels[i] == labels[j] else 1
            target[i, j] = (1 - s) * target[i, j] + 2 * m * s
    p, q = neighbours(target), neighbours(distances(follower))
    return np.array(
        [sum(kl(p[i, j], q[i, j]) + kl(q[i, j], p[i, j]) for j in range(n) if j != i)
         for i in range(n)]
    )  # fmt: skip


@pytest.mark.parametrize("loss", [losses.clean_cross_entropy, losses.adversarial_cross_entropy])
def test_cross_entropy_agrees_with_optax_and_numpy(loss):
    inputs = make_inputs()
    outputs = inputs.clean if loss is losses.clean_cross_entropy else inputs.adversarial
    expected = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, inputs.labels)
    np.testing.assert_allclose(loss(inputs), expected, rtol=1e-5, atol=1e-6)
    float64 = cross_entropy_float64(outputs.logits, np.asarray(inputs.labels))
    np.testing.assert_allclose(loss(inputs), float64, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_a_guess_is_log_classes_and_stays_finite_far_out():
    outputs = Outputs(features=jnp.zeros((2, 1)), logits=jnp.array([[0.0, 0.0], [0.0, 1e4]]))
    values = losses.clean_cross_entropy(LossInputs(labels=jnp.array([1, 0]), clean=outputs))
    np.testing.assert_allclose(values, [np.log(2), 1e4], rtol=1e-6)


def test_trades_is_the_divergence_from_clean_to_adversarial():
    inputs = make_inputs()
    p, q = jax.nn.log_softmax(inputs.clean.logits), jax.nn.log_softmax(inputs.adversarial.logits)
    expected = optax.losses.kl_divergence_with_log_targets(q, p)
    np.testing.assert_allclose(losses.trades_kl(inputs), expected, rtol=1e-5)
    backwards = optax.losses.kl_divergence_with_log_targets(p, q)
    assert np.abs(losses.trades_kl(inputs) - backwards).max() > 0.1


def test_feature_preservation_moves_only_the_fine_tuned_encoder():
    inputs = make_inputs()
    clean, pretrained = (
        np.asarray(outputs.features, np.float64) for outputs in (inputs.clean, inputs.pretrained)
    )
    expected = np.sum((clean - pretrained) ** 2, axis=1)
    np.testing.assert_allclose(losses.feature_preservation(inputs, of="clean"), expected, rtol=1e-5)
    gradient = jax.grad(lambda x: losses.feature_preservation(x).sum(), allow_int=True)(inputs)
    assert not gradient.pretrained.features.any() and not gradient.clean.features.any()
    assert gradient.adversarial.features.any()


@pytest.mark.parametrize("on", ["logits", "features"])
def test_genetic_regularization_agrees_with_its_definition(on):
    inputs = make_inputs()
    labels = np.asarray(inputs.labels)
    clean, adversarial = getattr(inputs.clean, on), getattr(inputs.adversarial, on)
    corrected = genetic_float64(
        clean, adversarial, cross_entropy_float64(inputs.clean.logits, labels), labels
    )
    np.testing.assert_allclose(losses.genetic_regularization(inputs, on=on), corrected, rtol=1e-4)
    released = genetic_float64(
        adversarial, clean, cross_entropy_float64(inputs.adversarial.logits, labels), labels
    )
    values = losses.genetic_regularization(inputs, on=on, compat="released")
    np.testing.assert_allclose(values, released, rtol=1e-4)
    np.testing.assert_allclose(values.mean() * len(labels), released.sum(), rtol=1e-4)


def test_genetic_regularization_of_a_hand_computed_batch():
    # Clean rows a, a, b with a orthogonal to b, different labels, no doubt (cross-entropy ~ 0):
    # distances less the nearest are 0 and 1 for rows a, 0 and 0 for row b; similarities 1 and 1/2.
    # Adversarial rows all alike: every similarity is 1, every entry 1/2.
    features = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    certain = 60 * jnp.eye(3)
    inputs = LossInputs(
        labels=jnp.arange(3),
        clean=Outputs(features=features, logits=certain),
        adversarial=Outputs(features=jnp.ones((3, 2)), logits=certain),
    )
    row = (
        2 * (2 / 3 - 1 / 2) * np.log(2)
    )  # both pairs: (p - q)(logit p - logit q), logit 2/3 = ln 2
    values = losses.genetic_regularization(inputs, on="features")
    np.testing.assert_allclose(values, [row, row, 0], atol=1e-6)


def test_only_the_released_form_moves_the_reference():
    inputs = make_inputs()

    def gradient(compat):
        total = lambda x: losses.genetic_regularization(x, compat=compat).sum()  # noqa: E731
        return jax.grad(total, allow_int=True)(inputs)

    assert not gradient("corrected").clean.logits.any()
    assert gradient("corrected").adversarial.logits.any()
    assert gradient("released").clean.logits.any() and gradient("released").adversarial.logits.any()


@pytest.mark.parametrize("compat", ["corrected", "released"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_genetic_regularization_is_finite_at_degenerate_points(compat, batch):
    same = Outputs(features=jnp.ones((batch, 3)), logits=jnp.ones((batch, 4)))
    zero = jax.tree.map(jnp.zeros_like, same)
    opposite = Outputs(features=same.features, logits=-1e4 * same.logits)
    labels = jnp.arange(batch) % 4
    for clean, adversarial in [(same, same), (zero, zero), (same, zero), (zero, opposite)]:
        inputs = LossInputs(labels=labels, clean=clean, adversarial=adversarial)
        total = lambda x: losses.genetic_regularization(x, compat=compat).sum()  # noqa: E731
        value, gradient = jax.value_and_grad(total, allow_int=True)(inputs)
        assert np.isfinite(value) and value >= -1e-6
        chex.assert_tree_all_finite((gradient.clean, gradient.adversarial))


def test_the_size_of_genetic_regularization_does_not_depend_on_the_batch_size():
    means = [
        float(losses.genetic_regularization(make_inputs(0, batch=n)).mean()) for n in (32, 128)
    ]
    assert 0.7 < means[0] / means[1] < 1.4


@pytest.mark.parametrize(
    "loss",
    [
        losses.clean_cross_entropy,
        losses.adversarial_cross_entropy,
        losses.trades_kl,
        losses.feature_preservation,
        losses.genetic_regularization,
    ],
)
def test_every_loss_keeps_the_laws(loss):
    check_loss(loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (losses.adversarial_cross_entropy, "give the step an attack"),
        (losses.trades_kl, "give the step an attack"),
        (losses.feature_preservation, r"pretrained=encoder .*compare_with_pretrained=True"),
        (lambda x: losses.feature_preservation(x, of="both"), "of must be"),
        (lambda x: losses.genetic_regularization(x, on="taps"), "on must be"),
        (lambda x: losses.genetic_regularization(x, compat="old"), "compat must be"),
    ],
)
def test_missing_outputs_and_unknown_choices_are_errors(call, message):
    outputs = Outputs(features=jnp.zeros((2, 3)), logits=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=message):
        call(LossInputs(labels=jnp.array([0, 1]), clean=outputs))
