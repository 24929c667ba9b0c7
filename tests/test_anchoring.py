"""L2-SP: the closed form of a spring, and nothing but the spring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl.optimizers.anchoring import pull_to_start


def start():
    return {
        "encoder": {"conv": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}},
        "head": {"kernel": jnp.array([3.0])},
    }


def moved():
    return jax.tree.map(lambda x: x + 4.0, start())


def descend(tx, params, steps, gradient=0.0):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(
            jax.tree.map(lambda x: jnp.full_like(x, gradient), params), state, params
        )
        params = optax.apply_updates(params, updates)
    return params


def test_without_a_loss_weights_come_home_at_the_geometric_rate():
    weight, rate, steps = 0.5, 0.2, 7
    tx = optax.chain(pull_to_start(start(), weight), optax.sgd(rate))
    weights = descend(tx, moved(), steps)
    left = 4.0 * (1 - rate * weight) ** steps
    expected = jax.tree.map(lambda x: x + left, start()["encoder"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), weights["encoder"], expected
    )
    np.testing.assert_array_equal(weights["head"]["kernel"], moved()["head"]["kernel"])
    home = descend(tx, moved(), 400)["encoder"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), home, start()["encoder"])


def test_against_a_constant_gradient_it_comes_to_rest_where_the_forces_are_equal():
    tx = optax.chain(pull_to_start(start(), 0.5), optax.sgd(0.5))
    weights = descend(tx, start(), 100, gradient=1.0)["encoder"]["conv"]["kernel"]
    np.testing.assert_allclose(weights, np.array([[1.0, -2.0]]) - 1.0 / 0.5, rtol=1e-5)


def test_it_is_the_gradient_of_the_penalty_for_any_traced_weight():
    home = start()

    def penalty(params, weight):
        differences = jax.tree.map(jnp.subtract, params["encoder"], home["encoder"])
        return weight / 2 * sum(jnp.sum(d**2) for d in jax.tree.leaves(differences))

    @jax.jit
    @jax.vmap
    def pulls(weight):
        tx = pull_to_start(home, weight)
        zeros = jax.tree.map(jnp.zeros_like, moved())
        return tx.update(zeros, tx.init(moved()), moved())[0]

    weights = jnp.array([0.0, 0.3, 2.0])
    expected = jax.vmap(jax.grad(penalty), in_axes=(None, 0))(moved(), weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), pulls(weights), expected)


def test_only_what_the_pattern_names_is_pulled():
    tx = pull_to_start(start(), 1.0, anchored="**/kernel")
    zeros = jax.tree.map(jnp.zeros_like, moved())
    updates, _ = tx.update(zeros, tx.init(moved()), moved())
    np.testing.assert_array_equal(updates["encoder"]["conv"]["kernel"], [[4.0, 4.0]])
    np.testing.assert_array_equal(updates["encoder"]["conv"]["bias"], [0.0])
    np.testing.assert_array_equal(updates["head"]["kernel"], [4.0])


def test_home_is_a_copy_on_the_host():
    origin = {"encoder": {"kernel": np.zeros(2, np.float32)}}
    tx = pull_to_start(origin, 1.0)
    origin["encoder"]["kernel"] += 5.0  # whoever made it may use its memory again
    params = {"encoder": {"kernel": jax.device_put(jnp.ones(2), jax.devices()[1])}}
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], [1.0, 1.0])
    assert updates["encoder"]["kernel"].devices() == {jax.devices()[1]}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_makes_no_sense_is_refused(weight):
    with pytest.raises(ValueError, match="weight of L2-SP"):
        pull_to_start(start(), weight)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="matches no parameter"):
        pull_to_start(start(), 1.0, anchored="stage1/**")
    tx = pull_to_start(start(), 1.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(start(), tx.init(start()))
