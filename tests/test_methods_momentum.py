"""MoCo v2+, MoCo v3, ReSSL, BYOL, SimSiam: losses, the momentum copy, queues, training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import method_steps
import numpy as np
import pytest
import tiny

from robust_ssl import models, pretraining
from robust_ssl.pretraining import augmentation, momentum, momentum_copy, siamese, two_views

RANDOM = np.random.default_rng(0)
FIRST, SECOND = (RANDOM.normal(size=(6, 5)).astype(np.float32) for _ in range(2))


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


QUEUE = unit(RANDOM.normal(size=(9, 5))).astype(np.float32)
SMALL = {"hidden": 16, "projection_dim": 8}
METHODS = {
    "mocov2plus": momentum.MoCoV2Plus(**SMALL, queue_size=24),
    "mocov3": momentum.MoCoV3(**SMALL, predictor_hidden=16),
    "ressl": momentum.ReSSL(**SMALL, queue_size=24),
    "byol": siamese.BYOL(**SMALL, predictor_hidden=16),
    "simsiam": siamese.SimSiam(**SMALL, predictor_hidden=16),
}
# ReSSL pushes nothing apart: with eight images, larger steps make all relations equal.
OPTIONS = {"ressl": {"learning_rate": 0.003}}
WITH_COPY = ["mocov2plus", "mocov3", "ressl", "byol"]

moco_v2 = jax.jit(momentum.moco_v2_loss, static_argnames="temperature")
moco_v3 = jax.jit(momentum.moco_v3_loss, static_argnames="temperature")
ressl = jax.jit(momentum.ressl_loss, static_argnames=("temperature", "key_temperature"))
byol, simsiam = jax.jit(siamese.byol_loss), jax.jit(siamese.simsiam_loss)


def run(name):
    return method_steps.run(METHODS[name], **OPTIONS.get(name, {}))


# --- Losses -----------------------------------------------------------------------------------


def shares(rows, others, temperature):
    exps = np.exp(unit(rows) @ unit(others).T / temperature)
    return exps / exps.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_moco_v2_is_the_papers_formula(temperature):
    losses = moco_v2(FIRST, SECOND, QUEUE, temperature=temperature)
    expected = [
        -np.log(shares(query[None], np.concatenate([key[None], QUEUE]), temperature)[0, 0])
        for query, key in zip(FIRST, SECOND, strict=True)
    ]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_moco_v3_is_the_papers_formula(temperature):
    losses = moco_v3(FIRST, SECOND, temperature=temperature)
    expected = -2 * temperature * np.log(np.diag(shares(FIRST, SECOND, temperature)))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_ressl_is_the_papers_formula():
    losses = ressl(FIRST, SECOND, QUEUE)
    targets, ours = shares(SECOND, QUEUE, 0.04), shares(FIRST, QUEUE, 0.1)
    np.testing.assert_allclose(losses, -np.sum(targets * np.log(ours), axis=1), rtol=2e-5)


def test_byol_and_simsiam_are_the_papers_formulas():
    distances = np.sum((unit(FIRST) - unit(SECOND)) ** 2, axis=1)
    np.testing.assert_allclose(byol(FIRST, SECOND), distances, rtol=1e-5)
    cosines = np.sum(unit(FIRST) * unit(SECOND), axis=1)
    np.testing.assert_allclose(simsiam(FIRST, SECOND), -cosines, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [1, 4])
def test_equal_projections_leave_a_guess(n):
    ones, queue = np.ones((n, 4), np.float32), np.full((7, 4), 0.5, np.float32)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-6)
    close(moco_v2(ones, 3 * ones, queue), np.full(n, np.log(8)))
    close(moco_v3(ones, 3 * ones, temperature=0.5), np.full(n, np.log(n)))
    close(ressl(ones, 3 * ones, queue), np.full(n, np.log(7)))
    close(byol(ones, 3 * ones), np.zeros(n))
    close(simsiam(ones, 3 * ones), -np.ones(n))


def test_orthogonal_negatives_leave_their_number():
    corners, queue = np.eye(4, 5, dtype=np.float32), np.eye(5, dtype=np.float32)[[4, 4]]
    np.testing.assert_allclose(
        moco_v2(corners, corners, queue, temperature=0.5), np.log(1 + 2 * np.exp(-2)), rtol=1e-5
    )
    np.testing.assert_allclose(
        moco_v3(corners, corners, temperature=0.5), np.log(1 + 3 * np.exp(-2)), rtol=1e-5
    )
    np.testing.assert_allclose(ressl(corners, corners, queue), np.full(4, np.log(2)), rtol=1e-5)
    np.testing.assert_allclose(byol(corners, corners[::-1]), np.full(4, 2.0))
    np.testing.assert_array_equal(simsiam(corners, corners[::-1]), np.zeros(4))


def test_ressl_is_least_where_both_relations_are_equal():
    losses = functools.partial(ressl, temperature=0.3, key_temperature=0.3)
    least = losses(SECOND, SECOND, QUEUE)
    entropy = -np.sum(shares(SECOND, QUEUE, 0.3) * np.log(shares(SECOND, QUEUE, 0.3)), axis=1)
    np.testing.assert_allclose(least, entropy, rtol=1e-5)
    assert (losses(FIRST, SECOND, QUEUE) > least).all()


LOSSES = {
    "mocov2plus": lambda first, second: moco_v2(first, second, QUEUE),
    "mocov3": moco_v3,
    "ressl": lambda first, second: ressl(first, second, QUEUE),
    "byol": byol,
    "simsiam": simsiam,
}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_finite_and_none_flows_into_the_target(name):
    gradient = jax.jit(jax.grad(lambda *views: jnp.mean(LOSSES[name](*views)), argnums=(0, 1)))
    zeros = np.zeros_like(FIRST)
    for views in ((zeros, zeros), (zeros, FIRST), (FIRST, zeros), (FIRST, FIRST), (FIRST, SECOND)):
        ours, target = gradient(*views)
        assert np.isfinite(ours).all()
        assert not np.asarray(target).any()
    assert np.abs(ours).max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_losses_see_directions_only_and_refuse_wrong_shapes(name):
    loss = LOSSES[name]
    assert loss(FIRST, SECOND).shape == (6,)
    np.testing.assert_allclose(
        loss(3 * FIRST, 0.1 * SECOND), loss(FIRST, SECOND), rtol=1e-4, atol=1e-5
    )
    for views in ((FIRST, SECOND[:5]), (FIRST[0], SECOND[0])):
        with pytest.raises(AssertionError):
            loss(*views)


# --- The momentum copy ------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_COPY)
def test_the_copy_is_the_moving_average_of_encoder_and_projector(name):
    states, _ = run(name)
    method = METHODS[name]
    for step in range(3):
        before, after = states[step].variables, states[step + 1].variables
        cosine = np.cos(np.pi * step / method_steps.NUM_STEPS)
        share = method.final_momentum - (method.final_momentum - method.momentum) * (cosine + 1) / 2
        old, new = (v["state"]["momentum"] for v in (before, after))
        online = {
            "encoder": after["params"]["encoder"],
            "projector": after["params"]["method"]["projector"],
        }
        for part, params in online.items():
            expected = jax.tree.map(
                lambda slow, fast, share=share: share * slow + (1 - share) * fast,
                old[part]["params"],
                params,
            )
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
                new[part]["params"],
                expected,
            )


@pytest.mark.parametrize("name", WITH_COPY)
def test_the_copy_begins_equal_and_keeps_statistics_of_its_own(name):
    states, _ = run(name)
    start, end = states[0].variables, states[-1].variables
    jax.tree.map(
        np.testing.assert_array_equal,
        start["state"]["momentum"]["encoder"]["params"],
        start["params"]["encoder"],
    )
    norms = [
        v["norm1"]["mean"]
        for v in (
            start["state"]["momentum"]["encoder"]["batch_stats"],
            end["state"]["momentum"]["encoder"]["batch_stats"],
            end["batch_stats"]["encoder"],
        )
    ]
    assert np.abs(norms[1] - norms[0]).max() > 1e-3  # moved by its own forward passes
    assert np.abs(norms[1] - norms[2]).max() > 1e-4  # which are not the trained encoder's


def test_a_copy_shares_no_memory_with_the_trained_weights():
    encoder = tiny.encoder()
    own = METHODS["byol"].init(jax.random.key(1), encoder, 8)
    fast, slow = own["params"]["projector"], own["state"]["momentum"]["projector"]["params"]
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    step({"fast": fast, "slow": slow})  # raises where one buffer is donated twice


def test_a_copy_of_an_encoder_without_batch_norm():
    encoder = models.vit_tiny(jax.random.key(0), depth=1, image_size=8)
    own = METHODS["mocov2plus"].init(jax.random.key(1), encoder, 8)
    copy = own["state"]["momentum"]
    assert not copy["encoder"]["batch_stats"] and not copy["projector"]["batch_stats"]
    projector = pretraining.MLP((16, 8), batch_norm=False)
    keys, new = jax.jit(momentum_copy.apply_copy, static_argnums=(0, 4))(
        projector, copy, encoder, [jnp.zeros((2, 8, 8, 3))], None
    )
    assert keys[0].shape == (2, 8)
    assert jax.tree.structure(new) == jax.tree.structure(copy)


# --- Queues -----------------------------------------------------------------------------------


def queues_of(state):
    own = state.variables["state"]
    return own["queues"] if "queues" in own else {"weak": own["queue"]}


@pytest.mark.parametrize("name", ["mocov2plus", "ressl"])
def test_queues_hold_the_batches_newest_first(name):
    queues = [queues_of(state) for state in run(name)[0]]
    for view in queues[0]:
        for before, after in itertools.pairwise(queues[:5]):
            assert after[view].shape == (24, 8)
            np.testing.assert_array_equal(after[view][8:], before[view][:-8])
            np.testing.assert_allclose(np.linalg.norm(after[view], axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["mocov2plus", "ressl"])
def test_a_batch_larger_than_the_queue_is_refused(name):
    with pytest.raises(ValueError, match=r"batch of 8 .* queue of 7 rows.*queue_size"):
        method_steps.run(METHODS[name].replace(queue_size=7), num_steps=1)


def test_ressl_remembers_the_copys_keys_of_the_weak_view():
    method, encoder = METHODS["ressl"], tiny.encoder()
    own = method.init(jax.random.key(1), encoder, 8)
    strong, weak = RANDOM.uniform(size=(2, 8, 8, 8, 3)).astype(np.float32)
    inputs = pretraining.PretrainInputs(
        views=(strong, weak), rows=jnp.arange(8), key=jax.random.key(0), progress=jnp.zeros(())
    )
    _, update = jax.jit(method.loss)(own, encoder, inputs)
    features = np.asarray(encoder.apply_train(weak)[0].features, np.float64)
    weights = jax.tree.map(np.float64, own["params"]["projector"])
    hidden = np.maximum(features @ weights["dense1"]["kernel"] + weights["dense1"]["bias"], 0)
    keys = unit(hidden @ weights["output"]["kernel"] + weights["output"]["bias"])
    np.testing.assert_allclose(update.state["queue"][:8], keys, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(update.state["queue"][8:], own["state"]["queue"][:16])


# --- Steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_depend_on_the_devices(name):
    method_steps.assert_devices_do_not_matter(METHODS[name], **OPTIONS.get(name, {}))


def test_a_step_does_not_depend_on_the_devices_under_shard_map():
    method_steps.assert_devices_do_not_matter(METHODS["mocov2plus"], layout="shard_map")


@pytest.mark.parametrize("name", METHODS)
def test_training_makes_two_views_agree_without_collapse(name):
    states, metrics = run(name)
    before, _ = method_steps.agreement_and_spread(states[0])
    after, spread = method_steps.agreement_and_spread(states[-1])
    assert after > before + 0.03
    assert spread > 0.15
    if name != "mocov2plus":  # whose random queue is easier than real keys, so its loss rises
        losses = np.array([now["loss"] for now in metrics])
        assert losses[-5:].mean() < losses[:5].mean() - 0.1


def test_views_are_the_recipes_with_crops_as_small_as_asked_for(monkeypatch):
    monkeypatch.setattr(
        two_views, "random_views", lambda key, image, views, *, min_scale: (views, min_scale)
    )
    recipes = {}
    for name, method in METHODS.items():
        recipes[name] = method.replace(min_scale=0.3).views(None, None)
    assert recipes["mocov2plus"] == recipes["simsiam"] == (augmentation.SYMMETRIC_WEAK, 0.3)
    assert recipes["mocov3"] == recipes["byol"] == (augmentation.ASYMMETRIC, 0.3)
    assert recipes["ressl"] == (augmentation.STRONG_AND_WEAK, 0.3)
