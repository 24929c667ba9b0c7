"""Both trainings' optimizers: LARS in closed form, the chain of a fine-tuning part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl.optimizers import (
    adam_l2,
    fine_tuning_optimizer,
    hold_zeros,
    layer_rates,
    layerwise_optimizer,
    pretraining_optimizer,
    pull_to_start,
)

PARAMS = {
    "encoder": {"a": {"kernel": jnp.array([[1.0, 0.0]])}, "b": {"kernel": jnp.array([[2.0, 3.0]])}},
    "head": {"kernel": jnp.array([[4.0]])},
}
RATES = layer_rates(PARAMS, {"encoder/**": 1e-2, "encoder/b/**": "freeze", "head/**": 5e-2})
OPTIONS = {"weight_decay": 0.1, "decay": 0.5, "steps_per_epoch": 2}


def weights_after(tx, steps=4):
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(steps):
        gradients = jax.tree.map(lambda x, step=step: jnp.cos(x + step), params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_equal(tx, expected):
    jax.tree.map(np.testing.assert_array_equal, weights_after(tx), weights_after(expected))


def layerwise(**options):
    return layerwise_optimizer(PARAMS, RATES, lambda rate: adam_l2(rate, **{**OPTIONS, **options}))


# --- Fine-tuning ------------------------------------------------------------------------------


def test_it_is_adam_by_layer_and_names_what_is_frozen():
    tx, frozen = fine_tuning_optimizer(PARAMS, RATES, **OPTIONS)
    assert frozen == {"encoder/b/kernel"}
    assert_equal(tx, layerwise())


def test_l2_sp_takes_the_place_of_the_encoders_weight_decay():
    tx, _ = fine_tuning_optimizer(PARAMS, RATES, **OPTIONS, l2_sp=0.7)
    head = {"encoder": False, "head": True}
    decay = optax.masked(optax.add_decayed_weights(0.1), head)
    assert_equal(tx, optax.chain(pull_to_start(PARAMS, 0.7), decay, layerwise(weight_decay=0.0)))


def test_the_weight_of_l2_sp_is_state_so_that_two_weights_share_a_program():
    states = [
        fine_tuning_optimizer(PARAMS, RATES, **OPTIONS, l2_sp=weight)[0].init(PARAMS)
        for weight in (0.5, 2.0)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert [float(state[0].hyperparams["weight"]) for state in states] == [0.5, 2.0]


def test_held_zeros_stay_zero_and_the_rest_moves_as_without():
    tx, _ = fine_tuning_optimizer(PARAMS, RATES, **OPTIONS, hold_zeros=True)
    assert_equal(tx, optax.chain(layerwise(), hold_zeros(PARAMS)))
    kernel = weights_after(tx)["encoder"]["a"]["kernel"]
    assert float(kernel[0, 1]) == 0.0 and float(kernel[0, 0]) != 1.0


# --- Pre-training -----------------------------------------------------------------------------


def lars_step(gradient, rate, weight_decay=0.0, **options):
    """How far LARS moves a kernel of length 10 and a bias of length 10."""
    params = {"kernel": jnp.full((5, 5), 2.0), "bias": jnp.full(25, 2.0)}
    tx = pretraining_optimizer(
        "lars", learning_rate=rate, total_steps=100, warmup_steps=0, weight_decay=weight_decay,
        **options,
    )  # fmt: skip
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, gradient / 5), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    return {name: float(jnp.linalg.norm(update)) for name, update in updates.items()}


@pytest.mark.parametrize("gradient", [1e-3, 1.0, 100.0])
def test_lars_moves_a_kernel_by_its_length_but_never_further_than_sgd(gradient):
    free, clipped = (lars_step(gradient, 0.3, clip=clip) for clip in (False, True))
    assert free["kernel"] == pytest.approx(0.3 * 0.02 * 10, rel=1e-4)
    assert clipped["kernel"] == pytest.approx(min(0.02 * 10, 0.3 * gradient), rel=1e-4)
    assert free["bias"] == clipped["bias"] == pytest.approx(0.3 * gradient, rel=1e-4)


def test_lars_leaves_alone_what_nothing_pulls_at():
    assert lars_step(0.0, 0.3, weight_decay=1e-2) == {"kernel": 0.0, "bias": 0.0}


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="must be 'sgd', 'lars', 'adam' or 'adamw', got 'adamax'"):
        pretraining_optimizer(
            "adamax", learning_rate=0.1, total_steps=2, warmup_steps=1, weight_decay=0.0
        )
