"""Every kind of value has a check, which built-ins pass and broken ones fail with their law."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import attacks, check, models, objectives, parallel, pretraining, struct, threats
from robust_ssl.attacks import random_delta
from robust_ssl.conformance import KINDS, check_threat
from robust_ssl.types import Encoder

pytestmark = pytest.mark.usefixtures("quick_programs")

# ------------------------------------------------------------------------------------------ kinds


def test_an_unknown_kind_is_refused_with_near_names():
    words = r"unknown kind 'universal'; did you mean 'universal_attack'\? The kinds are attack, "
    with pytest.raises(ValueError, match=words):
        check("universal", None)
    with pytest.raises(ValueError, match=r"unknown kind 'x'\. The kinds are"):
        check("x", None)
    assert set(KINDS) == {
        *("loss", "objective", "attack", "universal_attack"),
        *("threat", "encoder", "method", "augmentation", "detector"),
    }


@struct.dataclass
class Brighter:
    """Heeds no budget."""

    threat: threats.Linf
    by: float = 0.05
    top: float = 2.0

    def __call__(self, key, model, image, label=None):
        return jnp.minimum(image + self.by, self.top)


def _fails(kind, value, law, **options):
    with pytest.raises(AssertionError, match=law):
        check(kind, value, **options)


# ------------------------------------------------------------------------------ losses, attacks


def test_losses_and_attacks_pass_by_name():
    check("loss", "robust_ssl.losses:trades_kl")
    check("attack", "robust_ssl.attacks:EmbedAttack", threat=threats.Linf(0.1))
    check("attack", attacks.FGSM(threats.L2(0.5)), needs_label=True)
    _fails("loss", lambda x: x.clean.logits.mean(), r"must return \[batch\]")
    _fails("loss", lambda x: x.labels, "must be float")
    _fails("attack", Brighter(threats.Linf(0.1)), r"Brighter leaves \[0, 1\]")
    _fails("attack", Brighter(threats.Linf(0.1), by=0.2, top=1.0), "Brighter leaves the budget")
    plain = dataclasses.make_dataclass("Plain", ["threat"])
    plain.__call__ = Brighter.__call__
    _fails("attack", plain, "Plain is no pytree, .* robust_ssl.struct.dataclass")


@pytest.mark.parametrize(
    ("kind", "value", "law"),
    [
        ("loss", lambda i: np.exp(np.asarray(i.clean.logits[:, 0])), "compute with jax.numpy"),
        (
            "loss",
            lambda i: i.clean.logits[:, 0] * (1 if i.clean.logits.mean() > 0 else 2),
            "take jnp.where",
        ),
        ("loss", lambda i: i.pretrained.logits[:, 0], "the public encoder has no logits"),
        ("loss", lambda i: i.clean.taps["stage1/block2"], "layers stem, block1.*pass taps="),
        ("loss", lambda i: (i.pretrained.features**2).sum(1), "gradient of zero"),
        ("loss", lambda i: (i.teacher.logits**2).sum(1), "gradient of zero"),
        ("loss", Brighter, "Brighter is a class"),
        ("objective", lambda i: i.clean.logits[i.labels[0]].sum(), "needs_label=True"),
    ],
)
def test_what_goes_wrong_inside_is_said_with_what_to_do(kind, value, law):
    _fails(kind, value, law)


def test_a_loss_may_read_the_layers_of_an_encoder():
    def second(inputs):
        assert list(inputs.adversarial.taps) == ["stem", "stage1/block2", "a"]
        return (inputs.adversarial.taps["stage1/block2"] ** 2).mean((1, 2, 3))

    check("loss", second, taps=("stem", "stage1/block2", "a"))


@pytest.mark.parametrize("kind", ["loss", "attack", "encoder", "threat"])
def test_laws_of_a_batch_need_a_batch(kind):
    with pytest.raises(ValueError, match="batch must be a whole number of at least"):
        check(kind, "robust_ssl.losses:trades_kl", batch=0)


# ------------------------------------------------------------------------------------- objectives

LABELLED = ("cross_entropy", "margin", "dlr", "margin_targeted", "dlr_targeted")
LABEL_FREE = (
    *("feature_cosine_distance", "feature_l2", "info_nce", "pixel_l2", "high_frequency_change"),
    *("advencoder_paper", "advencoder_released", "kl_divergence", "activation_distance"),
    *("activation_energy", "fused_energy", "log_activation_norms", "negative_dispersion"),
)


@pytest.mark.parametrize("name", [*LABELLED, *LABEL_FREE])
def test_objectives_pass(name):
    options = {"layer": 0} if name in ("activation_distance", "negative_dispersion") else {}
    objective = functools.partial(getattr(objectives, name), **options)
    check("objective", objective, needs_label=name in LABELLED)


def test_objectives_of_attacks_pass():
    check("objective", attacks.towards_target)
    check("objective", "robust_ssl.attacks:cluster_change_rate")


def _norm(inputs):
    change = inputs.adversarial.features - inputs.clean.features
    return jnp.mean(jnp.linalg.norm(change, axis=1))


@pytest.mark.parametrize(
    ("objective", "law"),
    [
        (lambda x: x.adversarial.features.mean(axis=1), r"must return a scalar, .*got \(6,\)"),
        (lambda x: jnp.argmax(x.adversarial.features), "must be float"),
        (lambda x: jnp.log(jnp.mean(x.adversarial.features**2)), "not finite at zero outputs"),
        (_norm, r"_norm has a gradient that is not finite at zero perturbation, in \[0\].features"),
        (lambda x: x.adversarial.features[0, 0], "does not follow a permutation"),
        (
            lambda x: (
                x.adversarial.features.mean()
                * (2 if isinstance(x.adversarial.features, jax.core.Tracer) else 1)
            ),
            "something else under jax.jit",
        ),
    ],
)
def test_broken_objectives_fail(objective, law):
    _fails("objective", objective, law)


# ------------------------------------------------------------------------------ universal attacks

UNIVERSAL = (
    pytest.param("AdvEncoderPER", marks=pytest.mark.slow),  # `AdvEncoderPAT` is the same code
    *("FFF", "L4ABase", "L4AFuse", "L4AUGS", "RandomNoise", "SSP", "STD"),
    *("UAP", "UAPPGD", "UniversalPGD"),
)


@pytest.mark.parametrize("name", UNIVERSAL)
def test_universal_attacks_pass(name):
    check("universal_attack", tiny.quick_attack(name))


@pytest.mark.parametrize("name", ["AdvEncoderPAT", "UAP"])
def test_universal_attacks_pass_in_a_patch_of_random_location(name):
    threat = functools.partial(threats.Patch, location="random")
    check("universal_attack", tiny.quick_attack(name), threat=threat, epsilon=0.25)


@struct.dataclass
class Ascent:
    """A universal attack that breaks one law at a time."""

    how: str = struct.field(pytree_node=False, default="well")

    def init(self, key, image_shape, threat):
        return random_delta(key, image_shape, threat)

    def step(self, state, threat, batch):
        value, gradient = batch.value_and_grad(objectives.feature_l2, state)
        if self.how == "part":  # what a device sees alone
            objective = objectives.feature_l2
            value, gradient = batch.replace(axis_name=None).value_and_grad(objective, state)
        if self.how == "objective":
            value = batch.clean.features.mean(axis=1)
        if self.how == "nan":
            value = jnp.log(-1.0 - value)
        moved = state + 0.02 * batch.steepest(gradient)
        if self.how == "budget":
            return 3.0 * moved, value
        if self.how == "type":
            return batch.project(moved).astype(jnp.bfloat16), value
        if self.how == "calls":
            Ascent.calls = getattr(Ascent, "calls", 0) + 1
            moved = moved * (Ascent.calls % 7) / 7
        if self.how == "jit" and isinstance(state, jax.core.Tracer):
            moved = 0.5 * moved
        return batch.project(moved), value

    def delta(self, state, threat):
        if self.how == "zero":
            return jnp.where(threat.epsilon == 0, 1e-3, state)
        return state[None] if self.how == "shape" else state


@struct.dataclass
class Half:
    """Has no step."""

    init = delta = None


@pytest.mark.parametrize(
    ("how", "law"),
    [
        ("part", "depends on the number of devices"),
        ("objective", r"must return the objective as a scalar, got \(8,\)"),
        ("nan", "has an objective that is not finite"),
        ("budget", "leaves the budget"),
        ("type", "keep the shapes and types"),
        ("calls", "another perturbation for the same key"),
        ("jit", "something else under jax.jit"),
        ("zero", "leaves the budget"),
        ("shape", r"must return \(8, 8, 3\), got \(1, 8, 8, 3\)"),
    ],
)
def test_broken_universal_attacks_fail(how, law):
    _fails("universal_attack", Ascent(how), rf"Ascent.*{law}")


def test_a_universal_attack_may_be_a_class():
    check("universal_attack", Ascent)
    _fails("universal_attack", Half(), "Half has no init and no step and no delta")


# ---------------------------------------------------------------------------------------- threats


@pytest.mark.parametrize(
    "threat",
    [
        *(threats.Linf(0.1), threats.L2(0.5), threats.Patch(0.25), threats.Patch(0.1, "random")),
        *(threats.Band(threats.Linf(0.1), 0.0, 0.2), threats.Band(threats.L2(0.5), 0.1, 0.3)),
    ],
)
def test_threats_pass(threat):
    check("threat", threat)


@struct.dataclass
class Ball:
    """A threat that breaks one law at a time."""

    epsilon: Any = 0.1
    how: Any = struct.field(pytree_node=False, default="well")

    def norm(self, change):
        return jnp.max(jnp.abs(change))

    def project(self, candidate, image):
        epsilon = 1.5 * self.epsilon if self.how == "ball" else self.epsilon
        moved = jnp.clip(candidate, image - epsilon, image + epsilon)
        if self.how == "twice":
            moved = image + 0.5 * (moved - image)
        if self.how == "image":
            moved = jnp.where(image == candidate, image + 0.01, moved)
        if self.how == "gradient":
            moved = moved + 0.0 * jnp.linalg.norm(candidate - image)
        return moved if self.how == "range" else jnp.clip(moved, 0.0, 1.0)

    def sample(self, key, image):
        noise = jax.random.uniform(key, image.shape, minval=-1.0)
        far = 2.0 if self.how == "sample" else 1.0
        return jnp.clip(image + far * self.epsilon * noise, 0.0, 1.0)

    def steepest(self, gradient):
        if self.how == "downhill":
            return -jnp.sign(gradient)
        if self.how == "long":
            return 2.0 * jnp.sign(gradient)
        return gradient / jnp.max(jnp.abs(gradient)) if self.how == "zero" else jnp.sign(gradient)


@pytest.mark.parametrize(
    ("how", "law"),
    [
        ("ball", "leaves the ball"),
        ("range", r"project leaves \[0, 1\]"),
        ("twice", "twice is not project once"),
        ("image", "does not allow the image itself"),
        ("gradient", "has a gradient not finite"),
        ("sample", "sample is not allowed"),
        ("downhill", "does not go uphill"),
        ("long", "must be a unit step"),
        ("zero", "steepest is not finite"),
        (("a", "tuple"), "cannot be saved and loaded: .* its field 'how' is a tuple"),
    ],
)
def test_broken_threats_fail(how, law):
    _fails("threat", Ball(how=how), rf"Ball.*{law}")


def test_a_threat_may_be_made_of_a_budget():
    check("threat", Ball)
    check("threat", "robust_ssl.threats:L2", epsilon=0.5)
    check_threat(lambda area: threats.Patch(area), epsilon=0.25)
    _fails("threat", Ball, r"threats\.check: epsilon must lie in \[0, 1\]", epsilon=8)


# --------------------------------------------------------------------------------------- encoders


def test_encoders_pass():
    check("encoder", tiny.encoder())
    check("encoder", "tiny:encoder")
    check("encoder", models.vit_tiny, image_size=8, patch_size=4, depth=1)


class Net(nn.Module):
    """An encoder that breaks one law at a time."""

    how: str = "well"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), (2, 2))(x)
        axis_name = None if self.how == "axis" or not train else self.axis_name
        x = nn.BatchNorm(use_running_average=not train, axis_name=axis_name)(x)
        if self.how == "neighbors":
            x = x - jnp.mean(x, axis=0, keepdims=True)
        features, taps = jnp.mean(nn.tanh(x), axis=(1, 2)), {"block1": x}
        if self.how == "taps":
            taps = {"block1": jnp.mean(x, axis=0)}
        if self.how == "nan":
            features = features / jnp.max(jnp.abs(x - x[:, :1, :1]), axis=(1, 2))
        if self.how == "flat":
            features = jnp.round(features)
        return features, taps


class NoAxis(nn.Module):
    """Knows of no devices."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return jnp.mean(nn.Conv(4, (3, 3), (2, 2))(x), axis=(1, 2)), {}


def _encoder(module, dim=4):
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size=8, dim=dim, name="net")


@pytest.mark.parametrize(
    ("how", "law"),
    [
        ("axis", "ignore axis_name"),
        ("neighbors", "depend on the neighbors"),
        ("taps", "tap 'block1' without the batch axis"),
        ("flat", "do not depend on the image"),
    ],
)
def test_broken_encoders_fail(how, law):
    _fails("encoder", _encoder(Net(how)), f"the encoder 'net'.*{law}")


def test_more_broken_encoders_fail():
    check("encoder", _encoder(Net()))
    _fails("encoder", _encoder(NoAxis()), "NoAxis has no field axis_name")
    _fails("encoder", _encoder(Net(), dim=5), r"\[batch, dim\] = \(6, 5\), got \(6, 4\)")
    _fails("encoder", lambda key: Net(), "must return an Encoder, got Net")
    keys = iter(range(9))
    _fails(
        "encoder",
        lambda key: tiny.encoder().replace(variables={"params": jnp.float32(next(keys))}),
        "makes other weights of the same key",
    )


# ---------------------------------------------------------------------------------------- methods

SMALL = {"hidden": 16, "projection_dim": 8}


CROPS = {"num_prototypes": 6, "local_crops": 2, "local_size": 4}
METHODS = {
    "BYOL": {"predictor_hidden": 16, **SMALL},
    "BarlowTwins": SMALL,
    "DINO": {**CROPS, **SMALL},
    "DeepClusterV2": {"num_prototypes": 4, "num_clusterings": 2, **SMALL},
    "MoCoV2Plus": {"queue_size": 24, **SMALL},
    "MoCoV3": {"predictor_hidden": 16, **SMALL},
    "NNCLR": {"predictor_hidden": 16, "queue_size": 24, **SMALL},
    "ReSSL": {"queue_size": 24, **SMALL},
    "SimCLR": SMALL,
    "SimSiam": {"predictor_hidden": 16, **SMALL},
    "SupCon": SMALL,
    "SwAV": {"queue_size": 12, **CROPS, **SMALL},
    "VICReg": SMALL,
    "VIbCReg": {"group_size": 4, **SMALL},
    "WMSE": {"hidden": 16, "projection_dim": 2, "whitening_size": 4},
}


@pytest.mark.parametrize(
    "name",
    [n if n == "SimCLR" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_methods_pass(name):
    check("method", getattr(pretraining, name)(**METHODS[name]))


@struct.dataclass
class Alike:
    """A method that breaks one law at a time."""

    how: str = struct.field(pytree_node=False, default="well")

    def init(self, key, encoder, num_images):
        if self.how == "collection":
            return {"weights": {}}
        return {"state": {"mean": jnp.zeros(encoder.dim)}}

    def views(self, key, image):
        noise = jax.random.uniform(key, image.shape, minval=-0.2, maxval=0.2)
        noisy = image + noise if self.how == "range" else jnp.clip(image + noise, 0.0, 1.0)
        return noisy if self.how == "views" else (image, noisy)

    def loss(self, variables, encoder, inputs):
        first, second = inputs.views
        clean, _ = encoder.apply_train(first, axis_name=inputs.axis_name)
        noisy, statistics = encoder.apply_train(second, axis_name=inputs.axis_name)
        features = jnp.stack([clean.features, noisy.features], axis=1)
        if self.how != "local":
            features = parallel.gather(features, inputs.axis_name)
        if self.how == "constant":
            features = jax.lax.stop_gradient(features)
        losses = jnp.sum((features[:, 0] - features[:, 1]) ** 2, axis=1)
        mean = jnp.mean(features[:, 0], axis=0)
        losses = losses + jnp.sum((mean - 1.0) ** 2)
        state = {} if self.how == "state" else {"mean": jax.lax.stop_gradient(mean)}
        if self.how == "scalar":
            losses = jnp.mean(losses)
        if self.how == "nan":
            losses = jnp.log(-1.0 - losses)
        return losses, pretraining.MethodUpdate(statistics, state=state)


@pytest.mark.parametrize(
    ("how", "law"),
    [
        ("collection", r"init returns \['weights'\]"),
        ("range", r"views leaves \[0, 1\]"),
        ("views", "views must return a tuple"),
        ("state", "an update whose state is shaped as before"),
        ("scalar", r"one value per image, \(8,\), got \(\)"),
        ("nan", "loss is not finite"),
        ("constant", "no gradient for the encoder's weights"),
        ("local", "depends on the number of devices: gather"),
    ],
)
def test_broken_methods_fail(how, law):
    _fails("method", Alike(how), rf"Alike.*{law}")


def test_a_users_method_passes_as_a_class():
    check("method", Alike)


# ---------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize("augmentation", ["flip_and_shift", "crop_and_flip", "shift_only", "View"])
def test_augmentations_pass(augmentation):
    check("augmentation", f"robust_ssl.pretraining:{augmentation}")


def _random_each_call(key, image):
    return jnp.clip(image + np.random.default_rng().uniform(), 0.0, 1.0)


@pytest.mark.parametrize(
    ("augmentation", "law"),
    [
        (lambda key, image: image + 0.5, r"leaves \[0, 1\]"),
        (lambda key, image: image[1:], r"must return \(8, 8, 3\), got \(7, 8, 3\)"),
        (lambda key, image: image / jnp.sum(image - image), "not finite"),
        (lambda key, image: (255 * image).astype(jnp.uint8), "must return float32, got uint8"),
        (_random_each_call, "_random_each_call gives another image for the same key"),
        (
            lambda key, image: 0.5 * image if isinstance(image, jax.core.Tracer) else image,
            "something else in a batch under jax.jit",
        ),
    ],
)
def test_broken_augmentations_fail(augmentation, law):
    _fails("augmentation", augmentation, law)


@struct.dataclass
class Blind:
    """A detector that no attack can follow."""

    def score(self, key, model, image):
        return jax.lax.stop_gradient(image.mean())


@pytest.mark.parametrize(
    ("kind", "value", "law"),
    [
        ("objective", lambda x: (x.clean.features**2).mean(), "a gradient of zero"),
        ("objective", lambda x: jnp.float32(0), "a gradient of zero"),
        ("detector", Blind(), "an attack that adapts would see nothing"),
        ("augmentation", lambda key, image: jnp.zeros_like(image), "one and the same of all"),
        (
            "augmentation",
            lambda key, image: jax.random.uniform(key, image.shape),
            "one and the same of all",
        ),
    ],
)
def test_what_does_nothing_is_named(kind, value, law):
    with pytest.raises(AssertionError, match=law):
        check(kind, value)
