import sys
import types
from dataclasses import field
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import pytest

from robust_ssl import losses, struct
from robust_ssl.attacks import PGD, EmbedAttack
from robust_ssl.build import resolve
from robust_ssl.conformance import check_attack, check_loss
from robust_ssl.threats import L2, Band, Linf
from robust_ssl.types import Outputs


def first_image_matters(inputs):
    value = losses.clean_cross_entropy(inputs)
    return value * jnp.arange(1.0, 1 + len(value))


@pytest.mark.parametrize(
    ("loss", "law"),
    [
        (lambda x: losses.clean_cross_entropy(x).mean(), r"must return \[batch\]"),
        (lambda x: x.labels, "must be float"),
        (lambda x: jnp.log(jnp.sum(jnp.square(x.clean.logits), axis=1)), "not finite at zero"),
        (
            lambda x: jnp.linalg.norm(x.clean.features - x.adversarial.features, axis=1),
            "gradient that is not finite at clean = adversarial, in .clean.features",
        ),
        (lambda x: jnp.zeros(x.labels.shape), "a gradient of zero: nothing would follow it"),
        (lambda x: jax.lax.stop_gradient(losses.clean_cross_entropy(x)), "a gradient of zero"),
        (first_image_matters, "first_image_matters does not follow a permutation"),
        (
            lambda x: x.clean.logits[:, 0] * (2.0 if isinstance(x.labels, jax.core.Tracer) else 1),
            "something else under jax.jit",
        ),
    ],
)
def test_check_loss_names_the_broken_law(loss, law):
    with pytest.raises(AssertionError, match=law):
        check_loss(loss)


@struct.dataclass
class Sloppy:
    """An attack that breaks one law at a time."""

    how: str = struct.field(pytree_node=False)
    threat: Any = field(default_factory=lambda: Linf(0.1))

    def __call__(self, key, model, image, label=None):
        if self.how == "range":
            return image + self.threat.epsilon
        if self.how == "budget":
            return jnp.clip(image + 2 * self.threat.epsilon, 0.0, 1.0)
        if self.how == "shape":
            return image[None]
        if self.how == "nan":
            return image * jnp.nan
        if self.how == "state":
            Sloppy.calls = getattr(Sloppy, "calls", 0) + 1
            return self.threat.project(image + 0.01 * Sloppy.calls, image)
        if self.how == "zero":
            move = jnp.where(self.threat.epsilon == 0.0, 0.05, 0.01)
            return jnp.clip(image + move, 0.0, 1.0)
        if self.how == "nothing":
            return image
        if self.how == "wrong only":  # and then out of the budget
            right = jnp.argmax(model(image[None]).logits[0]) == label
            return jnp.where(right, jnp.clip(image + 0.2, 0.0, 1.0), image)
        return self.threat.project(image + jax.random.normal(key, image.shape), image)


@pytest.mark.parametrize(
    ("how", "law"),
    [
        ("range", r"leaves \[0, 1\]"),
        ("budget", "leaves the budget"),
        ("shape", "must return"),
        ("nan", "not finite"),
        ("state", "another image for the same key"),
        ("zero", "although epsilon is 0"),
        ("nothing", "moved no image"),
    ],
)
def test_check_attack_names_the_broken_law(how, law):
    with pytest.raises(AssertionError, match=law):
        check_attack(Sloppy(how))


def test_an_attack_that_leaves_misclassified_images_alone_is_seen_at_work():
    # Every image is of class 3 for this model, which no list of labels 0, 1, 2 has.
    def of_class_3(images):
        logits = jnp.broadcast_to(jnp.arange(4.0), (len(images), 4))
        return Outputs(features=logits, logits=logits)

    with pytest.raises(AssertionError, match="leaves the budget"):
        check_attack(Sloppy("wrong only"), needs_label=True, model=of_class_3)
    with pytest.raises(ValueError, match="pass a classifier"):
        check_attack(
            Sloppy("wrong only"), needs_label=True, model=lambda images: Outputs(images[:, 0, 0])
        )


@struct.dataclass
class Gossip:
    """Looks at the whole batch, but for the first image it hides it."""

    threat: Any = field(default_factory=lambda: Linf(0.1))

    def __call__(self, key, model, image, label=None):
        return _gossip(image)


@jax.custom_batching.custom_vmap
def _gossip(image):
    return jnp.clip(image + 0.01, 0.0, 1.0)


@_gossip.def_vmap
def _gossip_of_batch(axis_size, in_batched, images):
    means = jnp.broadcast_to(jnp.mean(jnp.square(images[:, 0])), (axis_size, 1, 1, 1))
    return jnp.clip(images + 0.1 * means.at[0].set(0.1), 0.0, 1.0), True


def test_every_image_is_watched_for_what_its_neighbours_do():
    with pytest.raises(AssertionError, match=r"neighbours in the batch \(place 1,"):
        check_attack(Gossip())


@pytest.mark.parametrize("inner", [Linf(0.1), L2(0.5)])
def test_the_budget_inside_a_band_is_set_to_zero_too(inner):
    @struct.dataclass
    class Stubborn:
        threat: Any

        def __call__(self, key, model, image, label=None):
            moved = self.threat.sample(key, image)
            return jnp.where(self.threat.epsilon > 0, moved, image.at[4, 4].set(0.5))

    class Anything:  # a band that is cut to [0, 1] may change when it is projected again
        def project(self, candidate, image):
            return candidate

    with pytest.raises(AssertionError, match="although epsilon is 0"):
        check_attack(Stubborn(Band(inner, 0.0, 0.4)), threat=Anything())


def test_a_class_that_jit_may_take_for_another_is_named():
    flax_class = flax.struct.dataclass(type("Brighter", (), {"__annotations__": {"threat": Any}}))
    for attack, threat in ((flax_class(Linf(0.1)), None), (Sloppy("random"), flax_class(0.1))):
        with pytest.raises(AssertionError, match=r"take Brighter for another.*robust_ssl\.struct"):
            check_attack(attack, threat=threat)


def test_good_attacks_pass():
    check_attack(Sloppy("random"))
    check_attack(PGD(Linf(8 / 255), num_steps=2), needs_label=True)
    check_attack(EmbedAttack(Linf(8 / 255), num_steps=2))


def test_an_attack_without_a_threat_needs_one():
    def nothing(key, model, image, label=None):
        return image

    with pytest.raises(ValueError, match="pass threat="):
        check_attack(nothing)

    def brighter(key, model, image, label=None):
        return jnp.minimum(image + 0.05, 1.0)

    check_attack(brighter, threat=Linf(0.1))


def test_resolve_finds_modules_files_and_notebook_cells(tmp_path, monkeypatch):
    (tmp_path / "my_own_losses.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Value:\n"
        "    x: 'int'\n"
        "def tilted(inputs):\n"
        "    return inputs\n"
    )
    monkeypatch.chdir(tmp_path)
    assert resolve(len) is len
    assert resolve("robust_ssl.losses:trades_kl") is losses.trades_kl
    assert resolve("my_own_losses:tilted")(3) == 3
    assert resolve(f"{tmp_path}/my_own_losses.py:tilted")(4) == 4
    main = types.ModuleType("__main__")
    main.cell = lambda inputs: inputs
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert resolve("__main__:cell") is main.cell
    sys.modules.pop("my_own_losses", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tilted", "names no function"),
        (":tilted", "names no function"),
        ("no_such_module:tilted", "there is no module 'no_such_module'"),
        ("robust_ssl.no_such:tilted", "there is no module"),
        ("no/such/file.py:tilted", "there is no file"),
        ("robust_ssl.losses:trades", "did you mean trades_kl"),
        ("robust_ssl.losses:__doc__", "is a str, not a function"),
    ],
)
def test_resolve_explains_what_is_missing(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_an_error_inside_the_module_is_not_hidden(tmp_path):
    (tmp_path / "broken.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        resolve(f"{tmp_path}/broken.py:f")
