"""What a network and a head must be: refused, with what to do, before anything is computed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny

import robust_ssl
from robust_ssl import models
from robust_ssl.models.contract import check_network

KEY = jax.random.key(0)


class Features(nn.Module):
    """Sums over pixels, with what tests change of it."""

    axis_name: str | None = None
    param_dtype: jnp.dtype = jnp.float32
    stream: str = ""
    collection: str = ""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.mean((1, 2)).astype(self.param_dtype)
        x = nn.Dense(4, param_dtype=self.param_dtype)(x)
        if train and self.stream:
            x = x + jax.random.normal(self.make_rng(self.stream), x.shape)
        if self.collection:
            self.variable(self.collection, "mean", jnp.zeros, (4,)).value = x.mean(0)
        return x, {}


class NoAxis(nn.Module):
    """It lacks the field that batch norm on several devices needs."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(4)(x.mean((1, 2))), {}


def encoder(module):
    variables = jax.jit(module.init)(KEY, jnp.zeros((1, 8, 8, 3)))
    options = {"module": module, "variables": variables, "dim": 4, "name": "mine"}
    return tiny.encoder().replace(**options)


@pytest.mark.parametrize("module", [Features(), Features(stream="dropout")])
def test_a_network_of_ones_own_can_be_trained(module):
    check_network(encoder(module))
    check_network(tiny.encoder())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (NoAxis(), "cannot be called.*needs a field axis_name"),
        (Features(stream="noise"), "cannot be called.*under the name dropout alone"),
        (Features(param_dtype=jnp.bfloat16), "weights of bfloat16; training takes float32 alone"),
        (Features(param_dtype=jnp.float16), "weights of float16"),
    ],
)
def test_a_network_that_fails_in_training_is_refused_before(module, words):
    with pytest.raises(ValueError, match=f"the encoder 'mine' .*{words}"):
        check_network(encoder(module))


class Head(nn.Module):
    """A dense layer, with what tests change of it."""

    classes: int
    kind: str = ""

    @nn.compact
    def __call__(self, x, *, train=False):
        if self.kind == "batch norm":
            x = nn.BatchNorm(use_running_average=not train)(x)
        if self.kind == "dropout":
            x = nn.Dropout(0.5, deterministic=not train)(x)
        if self.kind == "noise" and train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        logits = nn.Dense(self.classes + (self.kind == "one more"))(x)
        return (logits, x) if self.kind == "two" else logits


@pytest.mark.parametrize("kind", ["", "dropout"])
def test_a_head_of_ones_own_is_taken(kind):
    net = models.classifier(KEY, tiny.encoder(), 3, head=Head(3, kind))
    assert net(jnp.zeros((2, 8, 8, 3))).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("batch norm", "keeps batch_stats, which nothing updates.*layer norm for batch norm"),
        ("noise", "cannot be called: .*draws under dropout alone"),
        ("two", r"must return logits \[batch, 3\], and returned tuple"),
        ("one more", r"must return logits \[batch, 3\], and returned \(8, 4\)"),
    ],
)
def test_a_head_that_makes_no_logits_is_refused(kind, words):
    with pytest.raises(ValueError, match=f"the head Head {words}"):
        models.classifier(KEY, tiny.encoder(), 3, head=Head(3, kind))


@pytest.mark.parametrize("head", [3, None, nn.relu, Head])
def test_what_is_no_module_is_no_head(head):
    with pytest.raises(ValueError, match=r"a head is a flax.linen.Module, .*; got "):
        models.classifier(KEY, tiny.encoder(), 3, head=head)


def no_head(classes):
    """A head's function that returns no module."""
    return classes


def test_a_function_that_makes_no_head_is_refused_before_training():
    images, labels = tiny.images("train", n=16)
    with pytest.raises(ValueError, match=r"recipe baseline.head: a head is a flax.*; got int"):
        robust_ssl.secure(
            tiny.encoder(), images, labels, recipe="baseline", head="test_contract:no_head"
        )


def test_a_head_that_takes_no_train_is_refused():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    with pytest.raises(ValueError, match=r"Plain cannot be called.*head\(features, train=...\)"):
        models.classifier(KEY, tiny.encoder(), 3, head=Plain())
