"""Attacks: closed-form optima, the laws of per-image attacks, and fitting universal ones."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import attacks, models, objectives, screening, struct, threats
from robust_ssl.attacks import per_image, universal
from robust_ssl.models.generator import Generator, mix, upsampling_convolution
from robust_ssl.parallel import Parallel
from robust_ssl.types import AttackInputs, Encoder, Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
PER_IMAGE = [
    attacks.FGSM(threats.Linf(0.05)),
    attacks.PGD(threats.Linf(0.05), num_steps=3),
    attacks.PGD(threats.L2(0.5), step_size=0.2, num_steps=3, keep_best=False),
    attacks.EmbedAttack(threats.Linf(0.05), num_steps=3, restarts=2),
    attacks.EmbedAttack(threats.L2(0.5), step_size=0.2, num_steps=2),
]


@struct.dataclass
class Linear:
    """Logits and features are linear in the pixels."""

    weights: jax.Array  # [192, classes]

    def __call__(self, images):
        scores = images.reshape(len(images), -1) @ self.weights
        return Outputs(features=scores, logits=scores)


class TwoConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.tanh(nn.Conv(8, (3, 3), (2, 2))(x))
        return jnp.mean(x, axis=(1, 2)), {"last": x}


@functools.cache
def _encoder(seed=0):
    module = TwoConvolutions()
    variables = module.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)))
    return Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size=8, dim=8)


@functools.cache
def _classifier():
    return models.classifier(jax.random.key(1), _encoder(), 4, head="linear")


def _images(count, seed=0):
    return np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(np.float32)


@jax.jit
def _attack(attack, model, images, labels):
    return attacks.attack_batch(attack, KEY, model, images, labels)


# ------------------------------------------------------------------------------------- per image


def not_a_number(inputs):
    return objectives.cross_entropy(inputs) * jnp.nan


def without_gradient(inputs):  # finite, but the norm of zero has none
    return objectives.cross_entropy(inputs) + jnp.linalg.norm(0 * inputs.adversarial.logits)


def infinite_where_broken(inputs):
    shares = jax.nn.softmax(1000 * inputs.adversarial.logits)
    return -jnp.mean(jnp.log(jnp.take_along_axis(shares, inputs.labels[:, None], axis=1)))


@pytest.mark.parametrize("objective", [not_a_number, without_gradient])
@pytest.mark.parametrize(
    "attack",
    [
        attacks.FGSM,
        attacks.PGD,
        functools.partial(attacks.PGD, restarts=3),
        functools.partial(attacks.PGD, keep_best=False),
        functools.partial(attacks.EmbedAttack, restarts=2),
        functools.partial(attacks.TDAA, target_image=jnp.ones(SHAPE)),
        functools.partial(attacks.APGD, num_steps=3),
    ],
)
def test_an_objective_that_is_nan_makes_no_image(attack, objective):
    images, attack = _images(4), attack(threats.Linf(0.05), objective=objective)
    labels = jnp.argmax(_classifier()(images).logits, axis=1)
    if isinstance(attack, attacks.EmbedAttack | attacks.TDAA):  # their objectives see no label
        nan = jnp.nan if objective is not_a_number else 1.0
        attack = attack.replace(
            objective=lambda x: nan * jnp.linalg.norm(0 * x.adversarial.features)
        )
    assert np.isnan(_attack(attack, _classifier(), images, labels)).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("make", [attacks.PGD, attacks.FGSM, attacks.APGD])
def test_an_objective_of_a_value_for_each_image_is_refused(make):
    def margins(inputs):
        return inputs.adversarial.logits[:, 0]

    attack = make(threats.Linf(0.1), objective=margins)
    with pytest.raises(ValueError, match=r"objective margins must return one number.*float32\[1\]"):
        _attack(attack, _classifier(), jnp.asarray(_images(2)), jnp.zeros(2, int))


def test_a_fit_takes_no_objective_of_a_value_for_each_image():
    def norms(inputs):
        return inputs.adversarial.features.sum(axis=1)

    with pytest.raises(ValueError, match="the objective norms must return one number"):
        _fit(attacks.UniversalPGD(objective=norms))


def _asks_for_a_wrong_name(inputs):
    return inputs.adversarial.featurs.mean()


def _asks_for_a_wrong_tap(inputs):
    return inputs.adversarial.taps["conv9"].mean()


def _divides_by_zero(inputs):
    return inputs.adversarial.features.mean() * (1 // 0)


def _asks_for_a_value(inputs):
    return 1.0 if inputs.adversarial.features.mean() > 0 else 0.0


def _reads_no_labels(inputs):
    return inputs.adversarial.features.mean() * inputs.labels.mean()


WRONG = [
    (_asks_for_a_wrong_name, AttributeError),
    (_asks_for_a_wrong_tap, KeyError),
    (_divides_by_zero, ZeroDivisionError),
    (_asks_for_a_value, jax.errors.TracerBoolConversionError),
    (_reads_no_labels, AttributeError),
]


@pytest.mark.parametrize(("objective", "kind"), WRONG)
@pytest.mark.parametrize(
    "run",
    [
        lambda objective: _fit(attacks.UniversalPGD(objective=objective)),
        lambda objective: _crafted(attacks.PGD(threats.Linf(0.1), objective=objective)),
        lambda objective: _crafted(
            attacks.TDAA(threats.Linf(0.1), jnp.ones(SHAPE), objective=objective)
        ),
    ],
)
def test_an_objective_that_raises_is_named(run, objective, kind):
    with pytest.raises(kind) as caught:
        run(objective)
    notes = "\n".join(caught.value.__notes__)
    assert f"this happened in the objective '{objective.__name__}'" in notes
    assert ("inputs.labels is None here" in notes) == (objective is _reads_no_labels)


def _crafted(attack):
    return _attack(attack, _classifier(), _images(2), None)


@pytest.mark.parametrize("key", [0, 7.5, None, "0", np.int32(3), jnp.arange(3)])
@pytest.mark.parametrize(
    "call",
    [
        lambda key: attacks.attack_batch(PER_IMAGE[0], key, _classifier(), jnp.asarray(_images(2))),
        lambda key: models.resnet18(key, width=8, image_size=8),
        lambda key: models.classifier(key, _encoder(), 4, head="linear"),
    ],
)
def test_what_is_no_key_is_told_what_one_is(call, key):
    with pytest.raises(ValueError, match=r"key= is a random key of JAX, such as jax.random.key\("):
        call(key)


def test_keys_of_the_old_kind_are_taken():
    assert models.resnet18(jax.random.PRNGKey(0), width=8, image_size=8).dim == 64


def test_an_objective_of_infinity_is_the_highest_and_may_have_no_gradient():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(192, 4)), jnp.float32)
    model, images = Linear(weights), _images(6)
    labels = jnp.argmax(model(images).logits, axis=1)
    attack = attacks.PGD(threats.Linf(0.2), objective=infinite_where_broken)
    start = attacks.PGD(threats.Linf(0.2), num_steps=8)
    broken = np.asarray(_attack(start, model, images, labels))
    assert (jnp.argmax(model(broken).logits, axis=1) != labels).all()
    # From a broken image: nothing is above infinity, so it is what comes back.
    attack = attack.replace(threat=threats.Linf(1e-6), random_start=False)
    np.testing.assert_allclose(_attack(attack, model, broken, labels), broken, atol=1e-5)


def test_labels_that_are_no_classes_make_no_image():
    images, labels = _images(3), jnp.arange(3) + 4
    attacked = _attack(attacks.PGD(threats.Linf(0.05)), _classifier(), images, labels)
    assert np.isnan(attacked).all()


@struct.dataclass
class Kinked:
    """A linear model whose square root has no gradient: it is of zero."""

    weights: jax.Array

    def __call__(self, images):
        scores = images.reshape(len(images), -1) @ self.weights
        scores = scores + jnp.sqrt(jnp.sum((images - images) ** 2))
        return Outputs(features=scores, logits=scores)


@pytest.mark.parametrize("attack", [attacks.FABT, attacks.APGD])
def test_a_model_whose_gradient_is_nan_is_not_taken_for_robust(attack):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(192, 4)), jnp.float32)
    model, images = Kinked(weights), _images(4)
    labels = jnp.argmax(model(images).logits, axis=1)
    attacked = _attack(attack(threats.Linf(1e-5), num_steps=3), model, images, labels)
    assert np.isnan(attacked).all(axis=(1, 2, 3)).all()


@struct.dataclass
class Returning:
    """An attack that returns the image as something else."""

    kind: str = struct.field(pytree_node=False)

    def __call__(self, key, model, image, label=None):
        if self.kind == "levels":
            return jnp.round(255 * image).astype(jnp.uint8)
        return image[:4] if self.kind == "a part" else (image, label)


@pytest.mark.parametrize(
    ("kind", "returned"),
    [("levels", r"uint8 \[8, 8, 3\]"), ("a part", r"float32 \[4, 8, 3\]"), ("a pair", "tuple")],
)
def test_an_attack_must_return_an_image_as_it_gets_it(kind, returned):
    message = rf"attack Returning must return .* \[8, 8, 3\], and returned {returned}"
    with pytest.raises((TypeError, ValueError), match=message):
        _attack(Returning(kind), _classifier(), _images(2), jnp.arange(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "attack",
    [
        attacks.FGSM(threats.Linf(8 / 255)),
        attacks.PGD(threats.Linf(8 / 255), num_steps=3),
        attacks.APGD(threats.Linf(8 / 255), num_steps=3),
        attacks.UniversalPerturbation(jnp.full(SHAPE, 8 / 255), threats.Linf(8 / 255)),
    ],
)
def test_half_precision_images_stay_in_the_budget(attack, dtype):
    images = jnp.asarray(_images(4), dtype)
    labels = jnp.argmax(_classifier()(images).logits, axis=1)
    attacked = [_attack(attack, _classifier(), images, labels)]
    if isinstance(attack, attacks.UniversalPerturbation):
        attacked += [attack.apply(images), attack(None, None, images[0])[None]]
    for some in attacked:
        assert some.dtype == jnp.float32
        change = np.asarray(some, np.float64) - np.asarray(images[: len(some)], np.float64)
        assert np.abs(change).max() < 8 / 255 + 1e-6


def test_integers_are_no_pixels():
    with pytest.raises(TypeError, match=r"takes float pixels in .*, got uint8; divide"):
        attacks.attack_batch(
            attacks.FGSM(threats.Linf(0.1)), KEY, _classifier(), np.zeros((2, *SHAPE), np.uint8)
        )


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("kind", [threats.Linf, threats.L2])
def test_pgd_reaches_the_closed_form_optimum_of_a_linear_model(kind, keep_best):
    weights = np.random.default_rng(0).normal(size=(192, 2)).astype(np.float32)
    image, label = np.full(SHAPE, 0.5, np.float32), 0
    direction = (weights[:, 1] - weights[:, 0]).reshape(SHAPE)
    if kind is threats.Linf:
        best = image + 0.1 * np.sign(direction)
    else:
        best = image + 0.1 * direction / np.linalg.norm(direction)
    attack = attacks.PGD(kind(0.1), 0.02, objectives.margin, num_steps=30, keep_best=keep_best)
    found = attack(KEY, Linear(jnp.asarray(weights)), jnp.asarray(image), jnp.asarray(label))
    np.testing.assert_allclose(found, best, atol=2e-4)


def test_pgd_is_an_independent_numpy_pgd_on_a_small_mlp():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(192, 6)) * 0.2, rng.normal(size=(6, 3))
    image, label = _images(1)[0].astype(np.float64), 2

    def gradient(x):  # of the cross-entropy, by hand
        hidden = np.tanh(x.reshape(-1) @ first)
        scores = np.exp(hidden @ second)
        wrong = scores / scores.sum() - np.eye(3)[label]
        return (first @ ((second @ wrong) * (1 - hidden**2))).reshape(SHAPE)

    expected = image
    for _ in range(7):
        expected = expected + 0.01 * np.sign(gradient(expected))
        expected = np.clip(np.clip(expected, image - 0.03, image + 0.03), 0, 1)

    def mlp(images):
        hidden = jnp.tanh(images.reshape(len(images), -1) @ jnp.asarray(first, jnp.float32))
        return Outputs(features=hidden, logits=hidden @ jnp.asarray(second, jnp.float32))

    attack = attacks.PGD(threats.Linf(0.03), 0.01, num_steps=7, random_start=False, keep_best=False)
    found = attack(KEY, mlp, jnp.asarray(image, jnp.float32), jnp.asarray(label))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("attack", PER_IMAGE)
def test_attacked_images_are_allowed_and_changed(attack):
    images = jnp.asarray(_images(3)).at[0].set(0.0).at[1].set(1.0)
    found = _attack(attack, _classifier(), images, jnp.array([0, 1, 2]))
    assert found.min() >= 0 and found.max() <= 1 and found.dtype == jnp.float32
    for image, adversarial in zip(images, found, strict=True):
        np.testing.assert_allclose(
            attack.threat.project(adversarial, image), adversarial, atol=1e-6
        )
        assert not np.array_equal(image, adversarial)


@pytest.mark.parametrize("attack", PER_IMAGE)
def test_epsilon_zero_returns_the_image(attack):
    images = jnp.asarray(_images(3))
    attack = attack.replace(threat=attack.threat.replace(epsilon=0.0))
    found = _attack(attack, _classifier(), images, jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("attack", PER_IMAGE)
def test_an_image_does_not_depend_on_its_neighbours_or_its_place(attack):
    images, labels = jnp.asarray(_images(3)), jnp.array([0, 1, 2])
    together = _attack(attack, _classifier(), images, labels)
    batch_of = jax.jit(
        lambda images, labels, indices: attacks.attack_batch(
            attack, KEY, _classifier(), images, labels, indices
        )
    )
    others = jnp.asarray(_images(3, seed=9)).at[0].set(images[2])
    found = batch_of(others, labels.at[0].set(2), jnp.array([2, 7, 8]))
    np.testing.assert_allclose(found[0], together[2], atol=1e-6)


@pytest.mark.parametrize(
    ("attack", "objective"),
    [
        (attacks.PGD(threats.Linf(0.3), 0.3, num_steps=4), objectives.cross_entropy),
        (attacks.EmbedAttack(threats.Linf(0.3), 0.3, num_steps=4), objectives.feature_l2),
    ],
)
def test_the_objective_never_ends_below_its_start(attack, objective):
    # Steps as long as the whole budget overshoot: the last point is often not the best.
    images, labels = jnp.asarray(_images(8)), jnp.arange(8) % 4
    model = _classifier()

    def value(image, adversarial, label):
        inputs = AttackInputs(
            model(image[None]),
            model(adversarial[None]),
            image[None],
            adversarial[None],
            label[None],
        )
        return objective(inputs)

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))(jnp.arange(8))
    starts = jax.vmap(attack.threat.sample)(keys, images)
    ends = _attack(attack, model, images, labels)
    before = jax.vmap(value)(images, starts, labels)
    after = jax.vmap(value)(images, ends, labels)
    assert np.all(after >= before - 1e-6) and after.mean() > before.mean()
    more = _attack(attack.replace(restarts=3), model, images, labels)
    assert np.all(jax.vmap(value)(images, more, labels) >= after - 1e-6)


def test_embed_attack_never_sees_a_label():
    image, attack = jnp.asarray(_images(1)[0]), attacks.EmbedAttack(threats.Linf(0.05), num_steps=2)
    found = [attack(KEY, _encoder(), image, label) for label in (None, jnp.array(0), jnp.array(3))]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_another_budget_does_not_trace_again():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(attack, image):
        return attack(KEY, _classifier(), image, jnp.array(1))

    image = jnp.asarray(_images(1)[0])
    small = run(attacks.PGD(threats.Linf(1 / 255), num_steps=2), image)
    large = run(attacks.PGD(threats.Linf(32 / 255), num_steps=2), image)
    assert np.abs(small - image).max() < 1.01 / 255 < np.abs(large - image).max()
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(run.__wrapped__.__wrapped__, 1))
    for step_size in (1 / 255, 4 / 255):  # nor does another step, or another L2 budget
        run(attacks.PGD(threats.Linf(32 / 255), step_size, num_steps=2), image)


# ------------------------------------------------------------------------------ the usual step


@pytest.mark.parametrize(
    ("threat", "num_steps", "expected"),
    [
        (threats.Linf(8 / 255), 7, 2 / 255),
        (threats.L2(3.0), 10, 0.75),
        (threats.Band(threats.L2(0.5), 0.1), 5, 0.25),
        (threats.Patch(0.1), 10, 0.1),
    ],
)
def test_the_usual_step_follows_the_threat(threat, num_steps, expected):
    assert per_image.usual_step_size(threat, num_steps) == pytest.approx(expected)
    image, label = jnp.asarray(_images(1)[0]), jnp.array(1)
    usual, given = (
        attacks.PGD(threat, step, num_steps=num_steps)(KEY, _classifier(), image, label)
        for step in (None, expected)
    )
    np.testing.assert_allclose(usual, given, atol=1e-5)


def test_l2_pgd_without_a_given_step_is_nearly_as_strong_as_apgd():
    rng = np.random.default_rng(3)
    first, second = 0.4 * rng.normal(size=(192, 10)), rng.normal(size=(10, 5))

    def mlp(images):
        hidden = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ jnp.asarray(first, jnp.float32))
        return Outputs(features=hidden, logits=hidden @ jnp.asarray(second, jnp.float32))

    images = jnp.asarray(_images(100))
    labels = jnp.argmax(mlp(images).logits, axis=-1)

    def accuracy(attack):
        found = jax.jit(lambda: attacks.attack_batch(attack, KEY, mlp, images, labels))()
        return float(jnp.mean(jnp.argmax(mlp(found).logits, axis=-1) == labels))

    threat = threats.L2(0.15)
    pgd, apgd = accuracy(attacks.PGD(threat)), accuracy(attacks.APGD(threat, num_steps=50))
    assert 0.1 < apgd < 0.9 and pgd <= apgd + 0.03
    assert accuracy(attacks.PGD(threat, 2 / 255)) > pgd + 0.03  # what the step of Linf leaves


def test_fgsm_says_which_threats_it_takes():
    attack = attacks.FGSM(threats.Patch(0.25))
    with pytest.raises(ValueError, match=r"FGSM .*takes the threats Linf, L2 and Band.*got Patch"):
        attack(KEY, _classifier(), jnp.full(SHAPE, 0.5), jnp.array(1))


def test_training_pgd_costs_its_gradients_and_nothing_more():
    # Without keep_best there is no further forward pass: one convolution less per layer.
    image = jnp.asarray(_images(1)[0])

    def convolutions(attack):
        run = jax.jit(lambda image: attack(KEY, _classifier(), image, jnp.array(1)))
        return run.lower(image).compile().as_text().count(" convolution(")

    last, best = (
        convolutions(attacks.PGD(threats.Linf(0.1), num_steps=2, keep_best=keep))
        for keep in (False, True)
    )
    assert last == 4 and best == 6  # two forward and two backward in the loop; two after it


def test_bad_static_fields_are_refused():
    with pytest.raises(ValueError, match="num_steps"):
        attacks.PGD(threats.Linf(0.1), num_steps=0)
    for label_free in (attacks.EmbedAttack, functools.partial(attacks.TDAA, target_image=0.0)):
        with pytest.raises(ValueError, match="num_steps and restarts must be at least 1"):
            label_free(threats.Linf(0.1), num_steps=-1)
    for layered in (attacks.L4AFuse, attacks.L4AUGS):
        with pytest.raises(ValueError, match="weight must be a finite number, got nan"):
            layered(weight=float("nan"))
    evasion = {"detector": None, "detector_key": KEY, "threshold": 0.5}
    for evade in (
        functools.partial(screening.Evasion, threats.Linf(0.1), **evasion),
        functools.partial(screening.UniversalEvasion, None, **evasion),
    ):
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            evade(num_steps=0)
        with pytest.raises(ValueError, match="weight must be a finite number"):
            evade(weight=float("nan"))
    with pytest.raises(ValueError, match="restarts=2 needs random_start"):
        attacks.PGD(threats.Linf(0.1), random_start=False, restarts=2)
    with pytest.raises(ValueError, match="form must be one of"):
        attacks.AdvEncoderPER(form="code")


# ------------------------------------------------------------------------------------- universal


def _fit(
    attack, *, devices=1, method="pmap", seeds=(0,), epsilons=(0.1,), steps=6, model=None, **more
):
    keys, budgets = attacks.members(seeds, epsilons)
    return attacks.fit(
        attack,
        model or _encoder(),
        [{"images": _images(8, seed=step)} for step in range(steps)],
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=devices, kind=method),
        **more,
    )


FITTED = [
    attacks.UniversalPGD(step_size=0.02),
    attacks.UniversalPGD(step_size=0.02, objective=objectives.info_nce),
    attacks.AdvEncoderPER(learning_rate=5e-3, form="paper", width=8, noise_vectors=2),
    attacks.AdvEncoderPER(learning_rate=5e-3, form="released", width=8, noise_vectors=2),
]


@pytest.mark.parametrize("attack", FITTED)
def test_fitting_raises_the_objective_within_the_budget(attack):
    fitted = _fit(attack, steps=15)
    assert fitted.curve.shape == (15, 1)
    assert fitted.curve[-3:].mean() > 1.05 * fitted.curve[:3].mean()
    assert np.abs(fitted.perturbations.delta).max() <= 0.1 + 1e-6
    if attack.objective is not objectives.advencoder_paper:  # noise is all high frequency
        noise = _fit(attacks.RandomNoise(objective=attack.objective), steps=3)
        assert fitted.curve[-3:].mean() > noise.curve.mean()


@pytest.mark.parametrize("attack", [FITTED[1], FITTED[2]])
@pytest.mark.parametrize(
    ("devices", "method"), [(2, "pmap"), (4, "pmap"), (4, "shard_map"), (2, "jit")]
)
def test_a_fit_does_not_depend_on_the_devices(attack, devices, method):
    one = _fit(attack, steps=3)
    several = _fit(attack, steps=3, devices=devices, method=method)
    np.testing.assert_allclose(several.curve, one.curve, rtol=1e-5)
    np.testing.assert_allclose(several.perturbations.delta, one.perturbations.delta, atol=1e-5)


@pytest.mark.parametrize("attack", [FITTED[0], FITTED[3]])
def test_eight_members_at_once_equal_eight_fitted_one_at_a_time(attack):
    seeds, epsilons = (0, 1), (0.0, 0.02, 0.05, 0.1)
    together = _fit(attack, seeds=seeds, epsilons=epsilons, steps=3)
    assert len(together) == 8
    for index, (seed, epsilon) in enumerate((s, e) for s in seeds for e in epsilons):
        alone = _fit(attack, seeds=(seed,), epsilons=(epsilon,), steps=3)
        np.testing.assert_allclose(
            alone.curve[:, 0], together.curve[:, index], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(alone.member(0).delta, together.member(index).delta, atol=1e-5)


def test_an_l2_budget_is_kept_by_every_attack():
    for attack in (attacks.UniversalPGD(step_size=0.1), FITTED[2], attacks.RandomNoise()):
        fitted = _fit(attack, threat=threats.L2, epsilons=(0.0, 0.5), steps=2)
        sizes = jnp.sqrt(jnp.sum(fitted.perturbations.delta**2, axis=(1, 2, 3)))
        assert np.isfinite(sizes).all() and sizes[0] == 0 and 0 < sizes[1] <= 0.5 + 1e-5


def test_another_encoder_or_step_size_does_not_compile_again():
    parallel = Parallel.create(num_devices=2, kind="jit")
    _fit(attacks.UniversalPGD(step_size=0.02), devices=2, method="jit", steps=2)
    compiled = universal._fit_step(parallel)
    before = compiled._cache_size()
    first = _fit(attacks.UniversalPGD(step_size=0.02), devices=2, method="jit", steps=2)
    other = _fit(
        attacks.UniversalPGD(step_size=0.01), devices=2, method="jit", steps=2, model=_encoder(5)
    )
    assert compiled._cache_size() == before
    assert not np.array_equal(first.curve, other.curve)


def test_fit_speaks_up_before_the_first_step():
    with pytest.raises(ValueError, match="empty"):
        _fit(attacks.UniversalPGD(), steps=0)
    with pytest.raises(ValueError, match="epsilon must lie"):
        _fit(attacks.UniversalPGD(), epsilons=(2.0,))
    keys, epsilons = attacks.members((0, 1), (0.1,))
    with pytest.raises(ValueError, match="batch 0: expected images"):
        attacks.fit(
            attacks.UniversalPGD(), _encoder(), [{"images": np.zeros((2, 4, 4, 3), np.float32)}],
            keys=keys, epsilons=epsilons, image_shape=SHAPE,
            parallel=Parallel.create(num_devices=1),
        )  # fmt: skip


def test_on_step_sees_every_step():
    seen = []
    fitted = _fit(attacks.RandomNoise(), steps=3, on_step=lambda step, value: seen.append(value))
    np.testing.assert_array_equal(np.stack(seen), fitted.curve)


@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(0.4)])
def test_a_perturbation_survives_saving_resizing_and_applying(tmp_path, threat):
    delta = universal.random_delta(KEY, SHAPE, threat)
    attack = attacks.UniversalPerturbation(delta, threat, name="mine")
    path = tmp_path / "perturbation.npz"
    attack.save(path)
    loaded = attacks.UniversalPerturbation.load(path)
    assert loaded.name == "mine" and type(loaded.threat) is type(threat)
    images = jnp.asarray(_images(3))
    np.testing.assert_array_equal(loaded.apply(images), attack.apply(images))
    np.testing.assert_array_equal(
        _attack(attack, _encoder(), images, jnp.zeros(3, int)), attack.apply(images)
    )
    assert attack.apply(images).min() >= 0 and attack.apply(images).max() <= 1
    larger = attack.resized(16)
    for size in (0, (16, -1), "16", 16.0, (16, 16, 3)):
        with pytest.raises(ValueError, match="a size is"):
            attack.resized(size)
    assert larger.delta.shape == (16, 16, 3)
    gray = jnp.full((16, 16, 3), 0.5)
    np.testing.assert_allclose(larger(None, None, gray), gray + larger.delta, atol=1e-6)


def test_a_perturbation_of_another_size_or_a_foreign_file_is_refused(tmp_path):
    attack = attacks.UniversalPerturbation(jnp.zeros(SHAPE), threats.Linf(0.1))
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*\(16, 16, 3\).*resized\(\(16, 16\)\)"):
        attack.apply(jnp.zeros((2, 16, 16, 3)))
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(ValueError, match="not a saved universal perturbation"):
            attacks.UniversalPerturbation.load(tmp_path / name)
    with pytest.raises(ValueError, match="one by one"):
        attack.replace(delta=jnp.zeros((2, *SHAPE))).save(tmp_path / "stack.npz")


# ------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5)])
def test_the_matrix_product_is_the_transposed_convolution(shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *shape, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 4, 5, 3)), jnp.float32)

    def reference(x, kernel):
        return jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "SAME")

    np.testing.assert_allclose(
        upsampling_convolution(x, kernel), reference(x, kernel), rtol=1e-4, atol=1e-4
    )
    layer = nn.ConvTranspose(3, (4, 4), (2, 2), use_bias=False)
    linen = layer.apply({"params": {"kernel": kernel[::-1, ::-1]}}, x)
    np.testing.assert_allclose(upsampling_convolution(x, kernel), linen, rtol=1e-4, atol=1e-4)
    gradients = [
        jax.grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k))), argnums=(0, 1))(x, kernel)
        for f in (upsampling_convolution, reference)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-3, atol=1e-3)


def test_mixing_is_a_convolution_across_the_images():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 6, 7, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32)
    colors = images.transpose(3, 1, 2, 0)  # each color an image, each image a channel
    expected = jax.lax.conv_general_dilated(
        colors, kernel[..., None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        mix(images, kernel), expected[..., 0].transpose(1, 2, 0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [(8, 8), (12, 9), (64, 64)])
def test_the_generator_makes_any_size_within_one_from_any_number_of_noise_vectors(size):
    module = Generator(*size, channels=4)
    for count in (1, 3) if size == (8, 8) else (2,):
        output, variables = jax.jit(module.init_with_output)(KEY, jnp.ones((count, 100)))
        assert output.shape == (*size, 3) and np.abs(output).max() <= 1 and np.std(output) > 0.01
    if size == (64, 64):  # 4x4 of 8 x channels, then halved three times: 1024-512-256-128 at 128
        widths = [variables["params"][f"kernel{i}"].shape[2] for i in range(1, 5)]
        assert widths == [32, 16, 8, 4]
    with pytest.raises(ValueError, match="at least 8x8"):
        Generator(4, 8).init(KEY, jnp.zeros((1, 100)))
