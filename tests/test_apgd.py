"""DLR and targeted objectives by closed forms; APGD against float64 NumPy and the attack laws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import conformance, struct, threats
from robust_ssl.attacks import per_image
from robust_ssl.attacks.apgd import APGD, checkpoints, draw
from robust_ssl.objectives import feature_l2, labelled
from robust_ssl.types import AttackInputs, Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


# ----------------------------------------------------------------------------------- objectives


def _inputs(adversarial, labels, clean=None):
    def outputs(logits):
        logits = jnp.asarray(logits, jnp.float32)
        return Outputs(features=logits, logits=logits)

    images = jnp.zeros((len(labels), *SHAPE))
    clean = adversarial if clean is None else clean
    return AttackInputs(outputs(clean), outputs(adversarial), images, images, jnp.asarray(labels))


def test_dlr_is_its_float64_formula():
    logits, labels = RNG.normal(size=(6, 5)), RNG.integers(5, size=6)
    expected = []
    for z, y in zip(logits, labels, strict=True):
        down = np.sort(z)[::-1]
        expected.append(-(z[y] - np.delete(z, y).max()) / (down[0] - down[2]))
    found = labelled.dlr(_inputs(logits, labels))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)
    for other in (1000 * logits, logits + 3):  # neither scale nor shift changes it
        assert float(labelled.dlr(_inputs(other, labels))) == pytest.approx(float(found), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_targeted_objectives_aim_at_the_class_that_ranks_there_when_clean(rank):
    clean = np.array([[9.0, 1.0, 4.0, 3.0, 2.0], [5.0, 8.0, 7.0, 6.0, 4.0]])
    labels = [0, 2]  # the second image is misclassified: its best class is a target like any other
    targets = {1: [2, 1], 2: [3, 3], 4: [1, 4]}[rank]
    logits = RNG.normal(size=(2, 5))
    margins = [z[t] - z[y] for z, t, y in zip(logits, targets, labels, strict=True)]
    down = -np.sort(-logits, axis=1)
    spreads = down[:, 0] - (down[:, 2] + down[:, 3]) / 2
    inputs = _inputs(logits, labels, clean)
    found = float(labelled.margin_targeted(inputs, rank))
    assert found == pytest.approx(np.mean(margins), rel=1e-5)
    found = float(labelled.dlr_targeted(inputs, jnp.int32(rank)))
    assert found == pytest.approx(np.mean(np.array(margins) / spreads), rel=1e-5)


@pytest.mark.parametrize("objective", [labelled.dlr, labelled.dlr_targeted])
def test_equal_logits_give_zero_and_a_finite_gradient(objective):
    inputs = _inputs(np.zeros((2, 5)), [1, 3])
    assert float(objective(inputs)) == 0
    gradient = jax.grad(
        lambda z: objective(inputs.replace(adversarial=Outputs(features=z, logits=z)))
    )
    assert np.isfinite(gradient(jnp.zeros((2, 5)))).all()


def test_too_few_classes_and_impossible_targets_are_refused():
    with pytest.raises(ValueError, match=r"dlr needs at least 3 classes.* has 2.*margin"):
        labelled.dlr(_inputs(np.zeros((1, 2)), [0]))
    with pytest.raises(ValueError, match=r"at least 4 classes.* has 3.*margin_targeted"):
        labelled.dlr_targeted(_inputs(np.zeros((1, 3)), [0]))
    with pytest.raises(ValueError, match=r"between 1 and classes - 1 = 2, got 3"):
        labelled.margin_targeted(_inputs(np.zeros((1, 3)), [0]), 3)
    with pytest.raises(ValueError, match="needs labels"):
        labelled.dlr_targeted(_inputs(np.zeros((1, 5)), [0]).replace(labels=None))
    with pytest.raises(ValueError, match=r"at least 2 classes.* has 1"):
        labelled.margin_targeted(_inputs(np.zeros((1, 1)), [0]), jnp.int32(1))


@pytest.mark.parametrize("objective", [labelled.margin_targeted, labelled.dlr_targeted])
@pytest.mark.parametrize(("rank", "nearest"), [(-3, 1), (0, 1), (5, 4), (99, 4)])
def test_a_traced_rank_out_of_range_means_the_end_of_the_range(objective, rank, nearest):
    # Not the true class, whose margin is 0 whatever the image, and not no class at all.
    inputs = _inputs(RNG.normal(size=(3, 5)), [0, 4, 2], RNG.normal(size=(3, 5)))
    found = jax.jit(objective)(inputs, rank)
    assert float(found) == pytest.approx(float(objective(inputs, nearest)), rel=1e-6) != 0
    with pytest.raises(ValueError, match=f"between 1 and classes - 1 = 4, got {rank}"):
        objective(inputs, np.int64(rank))


# --------------------------------------------------------------------------------------- models


@struct.dataclass
class Mlp:
    first: jax.Array  # [192, hidden]
    second: jax.Array  # [hidden, classes]

    def __call__(self, images):
        hidden = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ self.first)
        return Outputs(features=hidden, logits=hidden @ self.second)


@struct.dataclass
class Noisy:
    """A randomized model: it answers for the image with noise on it."""

    inner: Mlp
    key: jax.Array
    size: float = 0.1

    def with_key(self, key):
        return self.replace(key=key)

    def __call__(self, images):
        return self.inner(images + self.size * jax.random.normal(self.key, images.shape))


@struct.dataclass
class StartAt:
    """A threat whose random start is given."""

    ball: threats.Linf | threats.L2
    start: jax.Array

    @property
    def epsilon(self):
        return self.ball.epsilon

    def sample(self, key, image):
        return self.ball.project(self.start, image)

    def project(self, candidate, image):
        return self.ball.project(candidate, image)

    def steepest(self, gradient):
        return self.ball.steepest(gradient)


@functools.cache
def _weights(scale=1.0, seed=3):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(192, 10)) * 0.4, rng.normal(size=(10, 5))


@functools.cache
def _mlp(scale=1.0):
    return Mlp(*(jnp.asarray(w, jnp.float32) for w in _weights(scale)))


def _images(count, seed=0):
    return np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(np.float32)


@jax.jit
def _attack(attack, model, images, labels):
    return per_image.attack_batch(attack, KEY, model, images, labels)


# ----------------------------------------------------------------------- APGD, derived once more


def _cross_entropy(logits, label, _):
    shifted = logits - logits.max()
    shares = np.exp(shifted) / np.exp(shifted).sum()
    return -np.log(shares[label]), shares - np.eye(5)[label]


def _dlr(logits, label, _):
    order = np.argsort(-logits)
    best = order[1] if order[0] == label else order[0]
    spread = logits[order[0]] - logits[order[2]]
    value = -(logits[label] - logits[best]) / spread
    slope = (np.eye(5)[best] - np.eye(5)[label]) / spread
    return value, slope - value * (np.eye(5)[order[0]] - np.eye(5)[order[2]]) / spread


def _dlr_targeted(logits, label, target):
    order = np.argsort(-logits)
    spread = logits[order[0]] - (logits[order[2]] + logits[order[3]]) / 2
    value = -(logits[label] - logits[target]) / spread
    turn = np.eye(5)[order[0]] - (np.eye(5)[order[2]] + np.eye(5)[order[3]]) / 2
    return value, (np.eye(5)[target] - np.eye(5)[label] - value * turn) / spread


def _numpy_apgd(image, label, start, norm, epsilon, steps, objective, target=None):
    """Algorithm 1 of Croce and Hein with its history written out, in float64."""
    first, second = _weights()

    def look(x):
        hidden = np.tanh((x.reshape(-1) - 0.5) @ first)
        value, slope = objective(hidden @ second, label, target)
        gradient = first @ ((second @ slope) * (1 - hidden**2))
        return value, gradient.reshape(SHAPE), np.argmax(hidden @ second) != label

    def project(x):
        if norm == "Linf":
            return np.clip(np.clip(x, image - epsilon, image + epsilon), 0, 1)
        length = np.linalg.norm(x - image)
        return np.clip(image + (x - image) * min(1, epsilon / length), 0, 1)

    def unit(g):
        return np.sign(g) if norm == "Linf" else g / np.linalg.norm(g)

    x, previous, eta = start, start, 2 * epsilon
    value, gradient, wrong = look(x)
    values, seen = [value], [(wrong, value, x, gradient)]
    window, since = max(int(0.22 * steps), 1), 0
    reduced, best_then = True, value
    for i in range(steps):
        weight = 1.0 if i == 0 else 0.75
        ahead = project(x + eta * unit(gradient))
        x, previous = project(x + weight * (ahead - x) + (1 - weight) * (x - previous)), x
        value, gradient, wrong = look(x)
        values.append(value)
        seen.append((wrong, value, x, gradient))
        since += 1
        if since == window:
            raised = sum(values[-j] > values[-j - 1] for j in range(1, window + 1))
            best = max(seen, key=lambda s: s[1])
            stuck = not reduced and best_then >= best[1]
            reduced, best_then = bool(raised <= 0.75 * window or stuck), best[1]
            if reduced:
                eta, x, gradient = eta / 2, best[2], best[3]
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            since = 0
    return max(seen, key=lambda s: (s[0], s[1]))[2]


@pytest.mark.parametrize(
    ("ours", "theirs", "rank"),
    [
        (labelled.cross_entropy, _cross_entropy, None),
        (labelled.dlr, _dlr, None),
        (labelled.dlr_targeted, _dlr_targeted, 2),
    ],
)
@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.008), ("L2", 0.06)])
def test_apgd_is_an_independent_float64_apgd(norm, epsilon, ours, theirs, rank):
    first, second = _weights()
    images = _images(3, seed=5)
    clean = np.tanh((images.reshape(3, -1) - 0.5) @ first) @ second
    labels = np.argmax(clean, axis=1)
    rng = np.random.default_rng(6)
    ball = {"Linf": threats.Linf, "L2": threats.L2}[norm](epsilon)
    for image, label, logits in zip(images.astype(np.float64), labels, clean, strict=True):
        noise = rng.uniform(-1, 1, SHAPE)
        noise *= epsilon / (np.abs(noise).max() if norm == "Linf" else np.linalg.norm(noise))
        start = np.clip(image + noise, 0, 1)
        target = None if rank is None else np.argsort(-logits)[rank]
        expected = _numpy_apgd(image, label, start, norm, epsilon, 30, theirs, target)
        with jax.enable_x64(True):  # one sign of a tiny gradient would be another path
            model = Mlp(*map(jnp.asarray, _weights()))
            attack = APGD(StartAt(ball, jnp.asarray(start)), ours, rank, num_steps=30)
            found = _attack(attack, model, jnp.asarray(image)[None], jnp.asarray([label]))[0]
        np.testing.assert_allclose(found, expected, atol=1e-8)


# ------------------------------------------------------------------------------------ its laws


def test_checkpoints_are_those_of_the_paper():
    # Windows of 22, 19, 16, 13, 10, 7 and then 6 steps.
    flags, lengths = checkpoints(100)
    assert np.flatnonzero(flags).tolist() == [21, 40, 56, 69, 79, 86, 92, 98]
    assert lengths[flags].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checkpoints(1)[0].tolist() == [True] and checkpoints(3)[0].all()


ATTACKS = [
    APGD(threats.Linf(0.05), num_steps=5),
    APGD(threats.L2(0.5), labelled.dlr, num_steps=5, restarts=2),
    APGD(threats.Linf(0.05), labelled.margin_targeted, rank=2, num_steps=5),
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_keeps_the_laws_of_attacks(attack):
    conformance.check_attack(attack, needs_label=True)


def test_without_a_label_it_raises_any_objective():
    conformance.check_attack(APGD(threats.Linf(0.05), feature_l2, num_steps=3))


@pytest.mark.parametrize("kind", [threats.Linf, threats.L2])
def test_it_reaches_the_closed_form_optimum_of_a_linear_model(kind):
    weights = np.random.default_rng(0).normal(size=(192, 2)).astype(np.float32)

    def linear(images):
        scores = images.reshape(len(images), -1) @ jnp.asarray(weights)
        return Outputs(features=scores, logits=scores)

    image = np.full(SHAPE, 0.5, np.float32)
    way = (weights[:, 1] - weights[:, 0]).reshape(SHAPE)
    best = 0.1 * (np.sign(way) if kind is threats.Linf else way / np.linalg.norm(way))
    attack = APGD(kind(0.1), labelled.margin, num_steps=30)
    found = jax.jit(lambda x: attack(KEY, linear, x, jnp.asarray(0)))(image)
    np.testing.assert_allclose(found - image, best, atol=2e-4)


def test_a_misclassified_point_goes_before_one_with_a_higher_objective():
    # Raising the objective leads away from the wrong answers; only the start is misclassified.
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(192, 2)), jnp.float32)
    image = jnp.full(SHAPE, 0.5)
    way = (weights[:, 1] - weights[:, 0]).reshape(SHAPE)

    def linear(images):
        moved = images.reshape(len(images), -1) - 0.5
        scores = moved @ weights + jnp.array([[0.01, 0.0]])
        return Outputs(features=scores, logits=scores)

    def backwards(inputs):
        return -labelled.margin(inputs)

    start = image + 0.1 * jnp.sign(way)
    attack = APGD(StartAt(threats.Linf(0.1), start), backwards, num_steps=5)
    found = attack(KEY, linear, image, jnp.asarray(0))
    assert int(jnp.argmax(linear(found[None]).logits)) == 1
    unlabelled = attack.replace(objective=lambda i: i.adversarial.logits[0, 0])
    found = unlabelled(KEY, linear, image)  # no label: the highest objective
    assert int(jnp.argmax(linear(found[None]).logits)) == 0


def test_more_restarts_are_never_weaker():
    images, labels = jnp.asarray(_images(6)), jnp.arange(6) % 5
    once = APGD(threats.Linf(0.01), labelled.margin, num_steps=4)

    def margins(found):
        logits = _mlp()(found).logits
        true = jax.nn.one_hot(labels, 5, dtype=bool)
        wrong = jnp.max(jnp.where(true, -jnp.inf, logits), axis=1)
        return wrong - jnp.sum(jnp.where(true, logits, 0), axis=1)

    one = margins(_attack(once, _mlp(), images, labels))
    three = margins(_attack(once.replace(restarts=3), _mlp(), images, labels))
    assert np.all(three >= one - 1e-6) and np.any(three > one)


def test_all_targets_and_budgets_share_one_trace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(attack, image):
        return attack(KEY, _mlp(), image, jnp.array(1))

    image = jnp.asarray(_images(1)[0])
    attack = APGD(threats.Linf(0.05), labelled.dlr_targeted, rank=1, num_steps=3)
    found = [run(attack.replace(rank=rank), image) for rank in (1, 2, 3)]
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])
    run(attack.replace(threat=threats.Linf(0.01)), image)


def test_a_saturated_cross_entropy_stops_it_but_dlr_goes_on():
    images, labels = jnp.asarray(_images(4)), jnp.argmax(_mlp()(jnp.asarray(_images(4))).logits, 1)
    loud = Mlp(_mlp().first, 1000 * _mlp().second)
    attack = APGD(threats.Linf(0.05), labelled.dlr, num_steps=10)
    found = _attack(attack, loud, images, labels)
    quiet = _attack(attack, _mlp(), images, labels)
    wrong = [jnp.argmax(_mlp()(x).logits, 1) != labels for x in (found, quiet)]
    np.testing.assert_array_equal(*wrong)
    assert wrong[0].all()


# -------------------------------------------------------------------------------- randomized


def test_a_randomized_model_is_drawn_anew_at_every_step():
    noisy = Noisy(_mlp(), jax.random.key(5))
    image = jnp.asarray(_images(1)[0])
    one, other = (draw(noisy, jax.random.key(i))(image[None]).logits for i in (0, 1))
    assert not np.allclose(one, other) and draw(_mlp(), KEY) is _mlp()
    attack = APGD(threats.Linf(0.05), num_steps=3)
    # The key that the model carries does not matter: each step has one of its own.
    found = [attack(KEY, m, image, jnp.array(1)) for m in (noisy, noisy.with_key(KEY))]
    np.testing.assert_array_equal(*found)


def test_averaging_over_many_draws_finds_the_gradient_of_the_expectation():
    # Logits are linear in noisy pixels, so the mean over draws is nearly the clean model's.
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(192, 4)), jnp.float32)
    tilted = Noisy(Mlp(0.01 * weights, jnp.eye(4)), KEY, size=2.0)
    image = jnp.full(SHAPE, 0.5)
    attack = APGD(threats.Linf(0.1), labelled.margin_targeted, rank=1, num_steps=8)
    exact = attack(KEY, tilted.inner, image, jnp.array(1))
    found = [attack.replace(eot=n)(KEY, tilted, image, jnp.array(1)) for n in (1, 64)]
    assert attack.replace(eot=64, restarts=2).gradient_evaluations == 9 * 2 * 64
    agree = [float(jnp.mean(jnp.sign(x - image) == jnp.sign(exact - image))) for x in found]
    assert agree[1] > 0.8


def test_bad_static_fields_are_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        APGD(threats.Linf(0.1), num_steps=0)
    with pytest.raises(ValueError, match=r"eot=20 averages.*with_key\(key\)"):
        APGD(threats.Linf(0.1), eot=20)(KEY, _mlp(), jnp.zeros(SHAPE), jnp.array(0))


def test_a_threat_without_epsilon_and_an_objective_without_rank_are_refused():
    image, label = jnp.zeros(SHAPE), jnp.array(0)
    with pytest.raises(ValueError, match=r"APGD .*takes the threats Linf, L2 and Band.*got Patch"):
        APGD(threats.Patch(0.25))(KEY, _mlp(), image, label)
    with pytest.raises(ValueError, match=r"dlr_targeted and margin_targeted.*cross_entropy"):
        APGD(threats.Linf(0.1), rank=2)(KEY, _mlp(), image, label)

    def any_words(inputs, **words):
        return labelled.margin_targeted(inputs, **words)

    attack = APGD(threats.Linf(0.1), any_words, rank=2, num_steps=1)
    assert attack(KEY, _mlp(), image, label).shape == SHAPE
