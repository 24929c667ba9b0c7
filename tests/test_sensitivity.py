import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from robust_ssl import models
from robust_ssl.finetuning import layer_sensitivity, rates_for, select_redundant
from robust_ssl.optimizers import layer_rates
from robust_ssl.parallel import Parallel
from robust_ssl.types import Encoder


class OneLayerDoesNotMatter(nn.Module):
    """What `unused` computes is multiplied by 1e-6 before it joins."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), (2, 2), name="used")(x)
        x = nn.relu(x)
        x = x + 1e-6 * nn.Conv(4, (3, 3), name="unused")(x)
        return jnp.mean(x, axis=(1, 2)), {}


def make_classifier():
    module = OneLayerDoesNotMatter()
    encoder = Encoder(
        variables=module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
        module=module, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=8, dim=4,
    )  # fmt: skip
    return models.classifier(jax.random.key(1), encoder, 3, head="linear")


def make_batch(size=8):
    random = np.random.default_rng(0)
    images = random.uniform(size=(size, 8, 8, 3)).astype(np.float32)
    return images, (np.arange(size) % 3).astype(np.int32)


@pytest.mark.parametrize("size", [8, 6])  # the second does not divide over four devices
def test_the_layer_that_does_not_matter_ranks_last_on_any_number_of_devices(size):
    net, (images, labels) = make_classifier(), make_batch(size)
    scores = layer_sensitivity(net, images, labels, num_steps=4)
    assert set(scores) == {"encoder/used/kernel", "encoder/unused/kernel", "head/linear/kernel"}
    assert select_redundant(scores, top_k=1) == ["encoder/unused/kernel"]
    assert 0 <= scores["encoder/unused/kernel"] < 1e-5 < 1e-3 < scores["encoder/used/kernel"]
    spread = layer_sensitivity(
        net, images, labels, num_steps=4, parallel=Parallel.create(num_devices=4)
    )
    for path in scores:
        np.testing.assert_allclose(spread[path], scores[path], atol=1e-5, err_msg=path)


def test_the_score_is_that_of_projected_gradient_ascent_by_hand():
    net, (images, labels) = make_classifier(), make_batch()
    path, radius, rate = ("head", "linear", "kernel"), 0.1, 1.0

    def loss(kernel):
        params = net.variables["params"]
        head = {**params["head"], "linear": {**params["head"]["linear"], "kernel": kernel}}
        outputs = net.with_variables({**net.variables, "params": {**params, "head": head}})(images)
        return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels).mean()

    original = net.variables["params"][path[0]][path[1]][path[2]]
    kernel, values = original, []
    for _ in range(3):
        delta = kernel + rate * jax.grad(loss)(kernel) - original
        length, limit = np.linalg.norm(delta), radius * np.linalg.norm(original)
        kernel = original + delta * min(1.0, limit / length)
        values.append(loss(kernel))
    scores = layer_sensitivity(net, images, labels, num_steps=3, layers=["head/**"])
    assert list(scores) == ["head/linear/kernel"]
    np.testing.assert_allclose(
        scores["head/linear/kernel"], max(values) - loss(original), rtol=1e-4
    )


def test_a_larger_ball_costs_more():
    net, (images, labels) = make_classifier(), make_batch()
    scores = [
        layer_sensitivity(
            net, images, labels, num_steps=3, radius=r, learning_rate=100.0, layers=["**/used/*"]
        )["encoder/used/kernel"]
        for r in (0.01, 0.1)
    ]
    assert scores[0] < scores[1] / 3


def test_a_loss_that_is_no_number_is_not_the_least_sensitive():
    net, (images, labels) = make_classifier(), make_batch()
    images[0] = np.nan
    with pytest.raises(ValueError, match=r"the loss is not finite at encoder/u.*0 to classes - 1"):
        layer_sensitivity(net, images, labels, num_steps=2)


def test_select_redundant_takes_the_least_sensitive_first():
    scores = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.1, "e": 0.5}
    assert select_redundant(scores, top_k=3) == ["b", "d", "c"]
    assert select_redundant(scores, top_k_fraction=0.5) == ["b", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        (dict(top_k=1, top_k_fraction=0.5), "exactly one"),
        (dict(top_k=0), "selects 0 of 2"),
        (dict(top_k=3), "selects 3 of 2"),
        (dict(top_k_fraction=0.2), "selects 0 of 2"),
    ],
)
def test_a_selection_of_nothing_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_redundant({"a": 0.1, "b": 0.2}, **arguments)


def test_the_rules_free_exactly_the_selected_kernels():
    params = make_classifier().variables["params"]
    rates = layer_rates(params, rates_for(["encoder/unused/kernel"], 1e-3))
    assert [path for path, rate in rates.items() if rate != "freeze"] == ["encoder/unused/kernel"]


@pytest.mark.parametrize("wrong", [dict(num_steps=0), dict(radius=0.0), dict(layers=["stage9/**"])])
def test_wrong_arguments_are_errors(wrong):
    images, labels = make_batch()
    with pytest.raises(ValueError, match=r"must be positive|matches no parameter"):
        layer_sensitivity(make_classifier(), images, labels, **wrong)


def test_all_layers_and_the_first_gradient_share_two_programs():
    classifier, (images, labels) = make_classifier(), make_batch()
    with tiny.programs() as compiled:
        layer_sensitivity(
            classifier, images, labels, num_steps=3, parallel=Parallel.create(num_devices=2)
        )
    assert sum("_fun" in name for name in compiled) == 2, compiled
