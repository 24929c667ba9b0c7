"""Losses of the baselines: MART's two terms, drift of layers, and the objective of TRADES."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl import losses, objectives, threats
from robust_ssl.attacks import PGD
from robust_ssl.conformance import check_loss
from robust_ssl.types import AttackInputs, LossInputs, Outputs

MART = (losses.boosted_cross_entropy, losses.misclassification_kl)


def _random_logits(seed, batch=7, classes=5, scale=3.0):
    return scale * np.random.default_rng(seed).normal(size=(batch, classes))


def _inputs(labels, clean, adversarial):
    def outputs(logits):
        logits = jnp.asarray(logits, jnp.float32)
        return Outputs(features=jnp.zeros((len(logits), 1)), logits=logits)

    return LossInputs(
        labels=jnp.asarray(labels, jnp.int32),
        clean=outputs(clean),
        adversarial=outputs(adversarial),
    )


def _with_taps(inputs, *names):
    """Lets the features stand for taps as well."""

    def add(outputs):
        return outputs.replace(taps={name: outputs.features for name in names})

    return inputs.replace(
        clean=add(inputs.clean),
        adversarial=add(inputs.adversarial),
        pretrained=add(inputs.pretrained),
    )


def _gradient(loss, inputs):
    return jax.grad(lambda x: loss(x).sum(), allow_int=True)(inputs)


# ------------------------------------------------------------------------------------------ MART


def _softmax(logits):
    logits = logits - logits.max(1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def _mart_float64(labels, clean, adversarial):
    """The two terms as the paper writes them."""
    boosted, weighted = [], []
    for y, p, q in zip(labels, _softmax(clean), _softmax(adversarial), strict=True):
        rival = max(q[k] for k in range(len(q)) if k != y)
        boosted.append(-np.log(q[y]) - np.log(1 - rival))
        weighted.append(np.sum(p * np.log(p / q)) * (1 - p[y]))
    return np.array(boosted), np.array(weighted)


def test_mart_agrees_with_its_formulas():
    clean, adversarial = _random_logits(0), _random_logits(1)
    labels = np.arange(7) % 5
    boosted, weighted = _mart_float64(labels, clean, adversarial)
    inputs = _inputs(labels, clean, adversarial)
    np.testing.assert_allclose(losses.boosted_cross_entropy(inputs), boosted, rtol=2e-5)
    np.testing.assert_allclose(losses.misclassification_kl(inputs), weighted, rtol=2e-5, atol=1e-6)


def test_the_gradients_of_mart_agree_with_differences_and_flow_into_both_predictions():
    clean, adversarial = _random_logits(2, scale=1.0), _random_logits(3, scale=1.0)
    labels = np.arange(7) % 5

    def total(term, clean, adversarial):
        return _mart_float64(labels, clean, adversarial)[term].sum()

    def differences(term, which, step=1e-6):
        found = np.zeros_like(clean)
        for place in np.ndindex(*found.shape):
            ends = []
            for sign in (1, -1):
                logits = [clean.copy(), adversarial.copy()]
                logits[which][place] += sign * step
                ends.append(total(term, *logits))
            found[place] = (ends[0] - ends[1]) / (2 * step)
        return found

    for term, loss in enumerate(MART):
        gradient = _gradient(loss, _inputs(labels, clean, adversarial))
        for which, outputs in enumerate((gradient.clean, gradient.adversarial)):
            np.testing.assert_allclose(outputs.logits, differences(term, which), atol=2e-5)
    assert np.abs(gradient.clean.logits).max() > 0.01  # the second term moves the clean one


def test_boosted_cross_entropy_of_two_classes_is_twice_the_cross_entropy():
    logits, labels = _random_logits(4, classes=2), np.arange(7) % 2
    inputs = _inputs(labels, logits, logits)
    values = losses.boosted_cross_entropy(inputs)
    np.testing.assert_allclose(values, 2 * losses.adversarial_cross_entropy(inputs), rtol=1e-5)


def test_boosted_cross_entropy_of_a_guess_and_of_equal_rivals():
    # p = (1/2, 1/4, 1/4): two equal rivals, of which one counts.
    logits = np.log([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    values = losses.boosted_cross_entropy(_inputs([0, 0], logits, logits))
    np.testing.assert_allclose(values, np.log([3 * 3 / 2, 2 * 4 / 3]), rtol=1e-6)


def test_boosted_cross_entropy_pushes_a_sure_rival_down_as_hard_as_the_true_class_up():
    # Far out both terms are linear in the gap: -log p_y = gap, -log(1 - p_k) = gap - log(others).
    gap = 300.0
    inputs = _inputs([0], [[0.0, gap, 0.0]], [[0.0, gap, 0.0]])
    np.testing.assert_allclose(
        losses.boosted_cross_entropy(inputs), [2 * gap - np.log(2)], rtol=1e-6
    )
    gradient = _gradient(losses.boosted_cross_entropy, inputs).adversarial.logits
    np.testing.assert_allclose(gradient, [[-1.5, 2.0, -0.5]], atol=1e-6)


@pytest.mark.parametrize("loss", MART)
@pytest.mark.parametrize("size", [20.0, 90.0, 1e4, 1e30])
def test_mart_stays_finite_where_probabilities_are_zero_and_one(loss, size):
    sure = size * np.eye(3)[[0, 1, 2, 0, 1, 2]]
    other = size * np.eye(3)[[0, 1, 2, 1, 2, 0]]
    labels = [0, 1, 0, 0, 0, 0]
    for clean, adversarial in [(sure, sure), (sure, other), (-sure, other), (0 * sure, -other)]:
        inputs = _inputs(labels, clean, adversarial)
        values, gradient = loss(inputs), _gradient(loss, inputs)
        assert np.isfinite(values).all() and values.min() >= -1e-6
        chex.assert_tree_all_finite((gradient.clean.logits, gradient.adversarial.logits))


def test_misclassification_kl_counts_what_was_wrong_and_forgives_what_was_sure():
    labels, adversarial = [0, 0], [[0.0, 1.0], [0.0, 1.0]]
    clean = [[40.0, 0.0], [0.0, 40.0]]  # sure and right; sure and wrong
    inputs = _inputs(labels, clean, adversarial)
    divergences = losses.trades_kl(inputs)
    values = losses.misclassification_kl(inputs)
    assert divergences[0] > 1 and values[0] < 1e-6
    np.testing.assert_allclose(values[1], divergences[1], rtol=1e-6)


def test_the_factor_of_misclassification_kl_is_exact_for_a_nearly_sure_prediction():
    # 1 - p of float32 knows multiples of 6e-8 only; here it is 1e-6 to five digits.
    p = 1 - 1e-6
    inputs = _inputs([0], [[np.log(p / (1 - p)), 0.0]], [[0.0, 0.0]])
    factor = losses.misclassification_kl(inputs) / losses.trades_kl(inputs)
    np.testing.assert_allclose(factor, [1e-6], rtol=1e-5)


def test_boosted_cross_entropy_needs_a_wrong_class():
    with pytest.raises(ValueError, match="at least 2 logits, got 1"):
        losses.boosted_cross_entropy(_inputs([0], [[0.0]], [[0.0]]))


@pytest.mark.parametrize("loss", MART)
def test_mart_needs_an_attack(loss):
    inputs = _inputs([0], [[0.0, 1.0]], [[0.0, 1.0]]).replace(adversarial=None)
    with pytest.raises(ValueError, match="give the step an attack"):
        loss(inputs)


# ----------------------------------------------------------------------------------- feature_drift


def _tapped(seed, scale=1.0):
    random = np.random.default_rng(seed)
    taps = {
        "stem": random.normal(size=(3, 2, 2, 4)),
        "block2": 100 * random.normal(size=(3, 2, 2, 4)),
        "block10": random.normal(size=(3, 5)),
    }
    taps = {name: jnp.asarray(scale * tap, jnp.float32) for name, tap in taps.items()}
    return Outputs(features=jnp.zeros((3, 2)), taps=taps)


def _drift_inputs():
    return LossInputs(
        labels=jnp.zeros(3, jnp.int32),
        clean=_tapped(0),
        adversarial=_tapped(1),
        pretrained=_tapped(2),
    )


@pytest.mark.parametrize("of", ["adversarial", "clean"])
@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ((0,), ["block2"]),
        ((-1,), ["block10"]),
        (("stem", 1), ["stem", "block10"]),
        (["block2", "stem", 1], ["block2", "stem", "block10"]),
    ],
)
def test_feature_drift_is_the_mean_of_squared_relative_distances(of, layers, names):
    inputs = _drift_inputs()
    expected = np.zeros(3)
    for name in names:
        for image in range(3):
            anchor = np.asarray(inputs.pretrained.taps[name][image], np.float64)
            moved = np.asarray(getattr(inputs, of).taps[name][image], np.float64)
            expected[image] += np.sum((moved - anchor) ** 2) / np.sum(anchor**2) / len(names)
    values = losses.feature_drift(inputs, layers, of=of)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_feature_drift_is_of_the_first_block_and_of_the_attacked_image_by_default():
    inputs = _drift_inputs()
    explicit = losses.feature_drift(inputs, layers=("block2",), of="adversarial")
    assert (losses.feature_drift(inputs) == explicit).all()


def test_feature_drift_does_not_see_the_scale_of_a_layer_and_is_zero_where_nothing_moved():
    inputs = _drift_inputs()
    larger = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, inputs)
    values = losses.feature_drift(inputs, layers=("stem", 0))
    np.testing.assert_allclose(losses.feature_drift(larger, layers=("stem", 0)), values, rtol=1e-6)
    still = inputs.replace(adversarial=inputs.pretrained)
    assert losses.feature_drift(still, layers=("stem", 0)).tolist() == [0.0, 0.0, 0.0]


def test_feature_drift_moves_only_the_layer_it_names_and_never_the_anchor():
    gradient = _gradient(lambda x: losses.feature_drift(x, layers=("block2",)), _drift_inputs())
    assert gradient.adversarial.taps["block2"].any()
    assert not any(gradient.adversarial.taps[name].any() for name in ("stem", "block10"))
    assert not any(tap.any() for tap in (*gradient.pretrained.taps.values(),))
    assert not any(tap.any() for tap in (*gradient.clean.taps.values(),))


def test_feature_drift_from_a_silent_layer_is_the_squared_distance():
    silent = jax.tree.map(jnp.zeros_like, _tapped(0))
    inputs = _drift_inputs().replace(pretrained=silent)
    expected = jnp.sum(inputs.adversarial.taps["block10"] ** 2, axis=-1)
    np.testing.assert_allclose(losses.feature_drift(inputs, (-1,)), expected, rtol=1e-6)
    chex.assert_tree_all_finite(_gradient(losses.feature_drift, inputs).adversarial.taps)


def test_feature_drift_sees_a_nan_of_the_anchor():
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), _tapped(0))
    values = losses.feature_drift(_drift_inputs().replace(pretrained=broken))
    assert np.isnan(values).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"adversarial": None}, {}, "give the step an attack"),
        ({"pretrained": None}, {}, "feature_drift needs .* pretrained=encoder"),
        ({"pretrained": _tapped}, {}, "needs pretrained taps, and the outputs have none"),
        ({"adversarial": _tapped}, {}, "needs adversarial taps, and the outputs have none"),
        ({"clean": _tapped}, {"of": "clean"}, "needs clean taps, and the outputs have none"),
        ({}, {"of": "both"}, "feature_drift: of must be"),
        ({}, {"layers": ("stage1",)}, "there is no layer 'stage1'.*block2"),
        ({}, {"layers": (2,)}, "there is no layer 2"),
        ({}, {"layers": ()}, "at least one"),
        ({}, {"layers": "stem"}, "at least one, as .* got 'stem'"),
        ({}, {"layers": 0}, "at least one, as .* got 0"),
    ],
)
def test_feature_drift_says_what_is_missing(change, options, message):
    change = {k: v and v(0).without_taps() for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        losses.feature_drift(_drift_inputs().replace(**change), **options)


def test_every_loss_keeps_the_laws():
    for loss in MART:
        check_loss(loss)

    def drift(inputs, of):
        return losses.feature_drift(_with_taps(inputs, "stem", "block1"), ("stem", 0), of=of)

    for of in ("adversarial", "clean"):
        named = functools.wraps(losses.feature_drift)(functools.partial(drift, of=of))
        check_loss(named)


# ----------------------------------------------------------------------------------- kl_divergence


def _attack_inputs(clean, adversarial):
    image = jnp.zeros((len(clean), 2, 2, 3))
    inputs = _inputs(np.zeros(len(clean)), clean, adversarial)
    return AttackInputs(inputs.clean, inputs.adversarial, image, image)


def test_kl_divergence_is_the_mean_from_clean_to_adversarial():
    clean, adversarial = _random_logits(5), _random_logits(6)
    p, q = _softmax(clean), _softmax(adversarial)
    expected = np.mean(np.sum(p * np.log(p / q), axis=1))
    inputs = _attack_inputs(clean, adversarial)
    value = objectives.kl_divergence(inputs)
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        value, losses.trades_kl(_inputs(np.zeros(7), clean, adversarial)).mean(), rtol=1e-6
    )


def test_the_gradient_of_kl_divergence_is_the_change_of_the_prediction():
    clean, adversarial = _random_logits(7), _random_logits(8)
    gradient = jax.grad(objectives.kl_divergence)(_attack_inputs(clean, adversarial))
    expected = (_softmax(adversarial) - _softmax(clean)) / len(clean)
    np.testing.assert_allclose(gradient.adversarial.logits, expected, atol=1e-6)
    assert not gradient.clean.logits.any()


def test_kl_divergence_is_stationary_at_zero_and_finite_far_out():
    logits = _random_logits(9)
    value, gradient = jax.value_and_grad(objectives.kl_divergence)(_attack_inputs(logits, logits))
    assert abs(value) < 1e-6 and np.abs(gradient.adversarial.logits).max() < 1e-7
    inputs = _attack_inputs(1e4 * np.eye(3), 1e4 * np.eye(3)[::-1])
    value, gradient = jax.value_and_grad(objectives.kl_divergence)(inputs)
    np.testing.assert_allclose(value, 2e4 / 3, rtol=1e-6)  # the middle row is the same
    chex.assert_tree_all_finite(gradient.adversarial.logits)


def test_kl_divergence_needs_logits():
    inputs = _attack_inputs(np.zeros((1, 2)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="kl_divergence needs logits"):
        objectives.kl_divergence(inputs.replace(adversarial=Outputs(jnp.zeros((1, 2)))))


def test_pgd_on_kl_divergence_leaves_a_linear_model_at_its_corner():
    """Two logits (w.x, 0): the divergence grows with |w.d|, so the end is a corner of the ball."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3)), jnp.float32)

    def model(images):
        score = jnp.sum(images * weights.reshape(1, 2, 2, 3), axis=(1, 2, 3))
        logits = jnp.stack([score, jnp.zeros_like(score)], axis=-1)
        return Outputs(features=logits, logits=logits)

    image = jnp.full((2, 2, 3), 0.5)
    attack = PGD(threats.Linf(0.1), 0.05, objectives.kl_divergence, num_steps=5, keep_best=False)
    moved = attack(jax.random.key(0), model, image) - image
    side = jnp.sign(jnp.sum(moved * weights))
    np.testing.assert_allclose(moved, 0.1 * side * jnp.sign(weights), atol=1e-6)
    expected = optax.losses.kl_divergence_with_log_targets(
        *(jax.nn.log_softmax(model((image + d)[None]).logits) for d in (moved, 0 * moved))
    )
    assert expected[0] > 0.01
