"""SupCon and NNCLR: losses in closed form, the queue, one result on any layout, training."""

import itertools

import jax
import jax.numpy as jnp
import method_steps
import numpy as np
import pytest
import tiny

from robust_ssl import pretraining
from robust_ssl.pretraining import augmentation, contrastive, method, two_views

RANDOM = np.random.default_rng(0)
FIRST, SECOND = (RANDOM.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
LABELS = np.array([0, 1, 0, 2, 1, 0], np.int32)
SUPCON = contrastive.SupCon(hidden=16, projection_dim=8)
NNCLR = contrastive.NNCLR(hidden=16, predictor_hidden=16, projection_dim=8, queue_size=24)

supcon = jax.jit(contrastive.supcon_loss, static_argnames="temperature")
nnclr = jax.jit(contrastive.nnclr_loss, static_argnames="temperature")


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- SupCon -----------------------------------------------------------------------------------


def supcon_float64(first, second, labels, temperature):
    """Eq. 2 of the paper, anchor by anchor."""
    both, classes, n = unit(np.concatenate([first, second])), np.tile(labels, 2), len(first)
    losses = []
    for i in range(2 * n):
        others = [k for k in range(2 * n) if k != i]
        total = sum(np.exp(both[i] @ both[k] / temperature) for k in others)
        positives = [k for k in others if classes[k] == classes[i]]
        shares = [np.exp(both[i] @ both[p] / temperature) / total for p in positives]
        losses.append(-np.mean(np.log(shares)))
    return (np.array(losses[:n]) + np.array(losses[n:])) / 2


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_supcon_is_the_papers_formula(temperature):
    losses = supcon(FIRST, SECOND, LABELS, temperature=temperature)
    assert losses.shape == (6,)
    expected = supcon_float64(FIRST, SECOND, LABELS, temperature)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_supcon_of_images_that_share_no_label_is_nt_xent():
    losses = supcon(FIRST, SECOND, np.array([9, 4, 2, 0, 7, 1]), temperature=0.2)
    np.testing.assert_allclose(losses, pretraining.nt_xent(FIRST, SECOND), rtol=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0, 1, 1]])
def test_supcon_of_equal_projections_is_a_guess_among_all_others(labels):
    ones = np.ones((3, 4), np.float32)
    losses = supcon(ones, 2 * ones, np.array(labels))
    np.testing.assert_allclose(losses, np.full(3, np.log(5)), rtol=1e-6)


def test_supcon_of_orthogonal_classes_is_a_guess_among_the_class():
    corners = np.eye(2, dtype=np.float32)[[0, 0, 1]]
    losses = supcon(corners, corners, np.array([5, 5, 8]), temperature=0.05)
    # exp(-1 / 0.05) = 2e-9 is what the other class adds: nothing in float32.
    np.testing.assert_allclose(losses, [np.log(3), np.log(3), 0.0], atol=2e-6)


# --- NNCLR ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nnclr_is_the_papers_formula(temperature):
    losses = nnclr(FIRST, SECOND, temperature=temperature)
    exps = np.exp(unit(FIRST) @ unit(SECOND).T / temperature)
    np.testing.assert_allclose(losses, -np.log(np.diag(exps) / exps.sum(1)), rtol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_nnclr_of_equal_predictions_is_a_guess_among_images(n):
    losses = nnclr(RANDOM.normal(size=(n, 3)).astype(np.float32), np.ones((n, 3), np.float32))
    np.testing.assert_allclose(losses, np.full(n, np.log(n)), rtol=1e-6, atol=2e-6)


def test_nnclr_of_right_predictions_of_orthogonal_neighbours():
    corners = np.eye(4, dtype=np.float32)
    expected = np.log(1 + 3 * np.exp(-1 / 0.5))
    np.testing.assert_allclose(nnclr(corners, 3 * corners, temperature=0.5), expected, rtol=1e-6)


def test_the_nearest_row_is_the_one_at_the_smallest_distance():
    queue = unit(RANDOM.normal(size=(9, 5))).astype(np.float32)
    distances = np.linalg.norm(unit(FIRST)[:, None] - queue[None], axis=2)
    ours = contrastive.nearest(FIRST, queue)
    np.testing.assert_array_equal(ours, queue[np.argmin(distances, axis=1)])
    gradient = jax.grad(lambda *args: jnp.sum(contrastive.nearest(*args)), argnums=(0, 1))
    assert all((np.asarray(leaf) == 0).all() for leaf in gradient(FIRST, queue))


# --- Both -------------------------------------------------------------------------------------


def test_gradients_are_finite_at_zero_projections_and_at_equal_ones():
    def total(first, second):
        return jnp.mean(supcon(first, second, LABELS)) + jnp.mean(nnclr(first, second))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    zeros = np.zeros_like(FIRST)
    for views in ((zeros, zeros), (FIRST, zeros), (FIRST, FIRST)):
        assert all(np.isfinite(leaf).all() for leaf in gradient(*views))


def test_wrong_shapes_are_refused():
    for call in (
        lambda: contrastive.supcon_loss(FIRST, SECOND[:5], LABELS),
        lambda: contrastive.supcon_loss(FIRST, SECOND, LABELS[:5]),
        lambda: contrastive.nnclr_loss(FIRST[0], SECOND[0]),
        lambda: contrastive.nnclr_loss(FIRST, SECOND[:5]),
    ):
        with pytest.raises(AssertionError):
            call()


def test_a_batch_larger_than_the_queue_is_refused_with_the_two_numbers():
    with pytest.raises(ValueError, match=r"batch of 3 .* queue of 2 rows.*queue_size"):
        method.enqueue(np.ones((2, 4)), np.ones((3, 4)))
    small = NNCLR.replace(queue_size=7)
    with pytest.raises(ValueError, match=r"batch of 8 .* queue of 7"):
        method_steps.run(small, num_steps=1)


def test_a_queue_takes_the_newest_first_and_forgets_the_oldest():
    queue = jnp.zeros((5, 1))
    for batch in ([[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [6.0]]):
        queue = method.enqueue(queue, jnp.array(batch))
    assert queue.ravel().tolist() == [5.0, 6.0, 3.0, 4.0, 1.0]


@pytest.mark.parametrize("method", [SUPCON, NNCLR], ids=["supcon", "nnclr"])
def test_a_step_does_not_depend_on_the_devices(method):
    method_steps.assert_devices_do_not_matter(method, optimized=True)


def test_nnclr_remembers_the_first_view_of_each_batch():
    states, _ = method_steps.run(NNCLR)
    queues = [state.variables["state"]["queue"] for state in states]
    np.testing.assert_allclose(np.linalg.norm(queues[0], axis=1), 1.0, rtol=1e-6)
    for before, after in itertools.pairwise(queues[:6]):
        np.testing.assert_array_equal(after[8:], before[:-8])
        np.testing.assert_allclose(np.linalg.norm(after[:8], axis=1), 1.0, rtol=1e-5)
        assert np.abs(after[:8] - before[:8]).max() > 1e-3


def test_nnclr_stores_its_projections_image_by_image():
    encoder, pixels = tiny.encoder(), method_steps.IMAGES.astype(np.float32) / 255
    own = NNCLR.init(jax.random.key(1), encoder, 8)
    inputs = pretraining.PretrainInputs(
        views=(pixels, 1 - pixels),
        rows=jnp.arange(8),
        key=jax.random.key(0),
        progress=jnp.zeros(()),
    )
    # An image that comes twice must be stored twice, each time in its own place.
    twice = inputs.replace(
        views=tuple(view.at[5].set(view[2]) for view in map(jnp.asarray, inputs.views))
    )
    update = jax.jit(NNCLR.loss)(own, encoder, twice)[1]
    front = np.asarray(update.state["queue"][:8])
    cosines = front @ front.T
    np.testing.assert_allclose(cosines[2, 5], 1.0, rtol=1e-5)
    assert np.sum(cosines > 1 - 1e-5) == 8 + 2


def test_supcon_learns_the_classes():
    states, metrics = method_steps.run(SUPCON)
    losses = np.array([now["loss"] for now in metrics])
    assert losses[-5:].mean() < losses[:2].mean() - 0.3
    assert method_steps.agreement_and_spread(states[-1])[1] > 0.15


def test_nnclr_makes_two_views_agree_without_collapse():
    states, metrics = method_steps.run(NNCLR)
    losses = np.array([now["loss"] for now in metrics])
    assert losses[-5:].mean() < losses[:2].mean() - 0.3
    (before, _), (after, spread) = map(method_steps.agreement_and_spread, (states[0], states[-1]))
    assert after > before + 0.03 and spread > 0.15


def test_views_are_the_recipes_with_crops_as_small_as_asked_for(monkeypatch):
    monkeypatch.setattr(
        two_views, "random_views", lambda key, image, views, *, min_scale: (views, min_scale)
    )
    assert SUPCON.replace(min_scale=0.3).views(None, None) == (augmentation.SYMMETRIC, 0.3)
    assert NNCLR.replace(min_scale=0.3).views(None, None) == (augmentation.ASYMMETRIC, 0.3)
