"""Magnitude pruning: the count is exact, the choice is the smallest, zeros stay zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from robust_ssl.optimizers.pruning import hold_zeros, prune


def params(dtype=np.float32):
    random = np.random.default_rng(0)
    return {
        "encoder": {
            "conv": {"kernel": random.normal(size=(3, 3, 2, 4)).astype(dtype)},
            "norm": {"scale": np.full(4, 1e-6, dtype), "bias": np.zeros(4, dtype)},
            "dense": {"kernel": (0.1 * random.normal(size=(4, 5))).astype(dtype)},
        },
        "head": {"kernel": np.full((5, 2), 1e-6, dtype), "bias": np.zeros(2, dtype)},
    }


def kernels(tree):
    flat = flatten_dict(tree["encoder"], sep="/")
    return np.concatenate([np.ravel(x) for path, x in flat.items() if path.endswith("kernel")])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.99])
def test_the_smallest_share_of_all_kernels_is_zero_and_no_more(share):
    before, pruned = params(), prune(params(), share)
    old, new = kernels(before), kernels(pruned)
    count = round(share * old.size)
    assert np.sum(new == 0) == count
    assert np.all(new[new != 0] == old[new != 0])
    if count:
        assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
    for path in ("encoder/norm/scale", "encoder/norm/bias", "head/kernel", "head/bias"):
        np.testing.assert_array_equal(
            flatten_dict(pruned, sep="/")[path], flatten_dict(before, sep="/")[path]
        )


def test_layers_are_compared_with_each_other():
    pruned = prune(params(), 0.2)["encoder"]
    small, large = (np.mean(pruned[layer]["kernel"] == 0) for layer in ("dense", "conv"))
    assert small > 0.5 > large


@pytest.mark.parametrize("count", range(6))
def test_ties_fall_in_order(count):
    flat = {"encoder": {"a": {"kernel": jnp.array([2.0, -1.0, 1.0])}, "b": {"kernel": jnp.ones(3)}}}
    pruned = kernels(prune(flat, count / 6))
    expected = np.array([2.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    expected[1 : 1 + count] = 0.0
    np.testing.assert_array_equal(pruned, expected)


def test_the_dtype_is_kept():
    pruned = prune(params(jnp.bfloat16), 0.5)
    assert {x.dtype for x in jax.tree.leaves(pruned)} == {np.dtype(jnp.bfloat16)}
    assert np.sum(kernels(pruned) == 0) >= round(0.5 * kernels(pruned).size)


def test_pruned_stays_pruned_bit_for_bit_while_the_rest_moves():
    start = prune(params(), 0.5)
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1), hold_zeros(start))
    weights, state = jax.tree.map(jnp.array, start), tx.init(start)
    update = jax.jit(tx.update)
    for step in range(3):
        gradient = jax.tree.map(lambda x, step=step: jnp.cos(x + step), weights)
        updates, state = update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    old, new = flatten_dict(start, sep="/"), flatten_dict(weights, sep="/")
    for path in ("encoder/conv/kernel", "encoder/dense/kernel"):
        np.testing.assert_array_equal(np.asarray(new[path]).view(np.uint32)[old[path] == 0], 0)
        assert np.all(new[path][old[path] != 0] != old[path][old[path] != 0])
    # Zeros that were not pruned are no zeros to hold.
    assert np.all(new["encoder/norm/bias"] != 0) and np.all(new["head/bias"] != 0)


def test_an_update_that_is_not_a_number_stays_out_of_the_zeros_too():
    start = {"encoder": {"kernel": np.array([1.0, 0.0], np.float32)}}
    tx = hold_zeros(start)
    nan = {"encoder": {"kernel": jnp.full(2, jnp.nan)}}
    updates, _ = tx.update(nan, tx.init(start), start)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], [np.nan, 0.0])


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"in \[0, 1\), got"):
        prune(params(), share)


def test_a_scope_without_kernels_is_named():
    with pytest.raises(ValueError, match="no kernel to prune in 'encoder/norm/"):
        prune(params(), 0.5, scope="encoder/norm/**")
    with pytest.raises(ValueError, match="near names: params/encoder"):
        prune({"params": params()}, 0.5)
