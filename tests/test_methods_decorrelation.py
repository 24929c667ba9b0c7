"""Barlow Twins, VICReg, VIbCReg and W-MSE: closed forms, whitening, one result anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods_clustering import check_layouts, losses_of_training

from robust_ssl.parallel import Parallel
from robust_ssl.pretraining import covariance, decorrelation

RANDOM = np.random.default_rng(0)
MIX = RANDOM.normal(size=(4, 4))
FIRST, SECOND = ((RANDOM.normal(size=(12, 4)) @ MIX).astype(np.float32) for _ in range(2))
# Orthogonal columns, mean 0, variance 1 (12/11 when unbiased): uncorrelated axes.
HADAMARD = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)
SMALL = {"hidden": 16, "projection_dim": 8}

barlow = jax.jit(covariance.barlow_twins_loss)
vicreg = jax.jit(covariance.vicreg_loss)
vibcreg = jax.jit(covariance.vibcreg_loss)
wmse = jax.jit(decorrelation.wmse_loss)
whiten = jax.jit(decorrelation.whiten, static_argnames="stabilizer")
iterative = jax.jit(
    decorrelation.iterative_normalization, static_argnames=("group_size", "num_steps")
)


def off_diagonal_squares(matrix):
    return (matrix**2).sum() - (np.diagonal(matrix) ** 2).sum()


# --- Barlow Twins -----------------------------------------------------------------------------


def test_barlow_twins_is_zero_when_the_correlation_is_the_identity():
    np.testing.assert_allclose(barlow(HADAMARD, 3 * HADAMARD + 1), np.zeros(4), atol=1e-6)


def test_barlow_twins_counts_what_is_missing():
    opposite = barlow(HADAMARD, -HADAMARD, redundancy=0.5, scale=1.0)  # C = -I
    np.testing.assert_allclose(opposite, np.full(4, 3 * 4.0), rtol=1e-4)
    shifted = barlow(HADAMARD, np.roll(HADAMARD, 1, axis=1), redundancy=0.5, scale=1.0)
    np.testing.assert_allclose(shifted, np.full(4, 3 * 1.0 + 0.5 * 3 * 1.0), rtol=1e-4)
    constant = barlow(np.ones_like(HADAMARD), HADAMARD, scale=0.1)
    np.testing.assert_allclose(constant, np.full(4, 0.1 * 3), rtol=1e-5)


def test_barlow_twins_is_the_papers_formula():
    first, second = (
        (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        for x in (FIRST.astype(np.float64), SECOND.astype(np.float64))
    )
    correlation = first.T @ second / 12
    expected = ((1 - np.diagonal(correlation)) ** 2).sum()
    expected += 0.01 * off_diagonal_squares(correlation)
    losses = barlow(FIRST, SECOND, redundancy=0.01, scale=2.0)
    np.testing.assert_allclose(losses, np.full(12, 2 * expected), rtol=1e-5)


# --- VICReg and VIbCReg -----------------------------------------------------------------------


def test_the_terms_on_matrices_made_by_hand():
    unbiased = np.sqrt(4 / 3)  # the deviation of a column of HADAMARD
    hinge = jax.jit(covariance.variance_hinge, static_argnames="stabilizer")
    np.testing.assert_allclose(hinge(HADAMARD), 0.0)
    np.testing.assert_allclose(hinge(HADAMARD / 2, stabilizer=0.0), 1 - unbiased / 2, rtol=1e-5)
    np.testing.assert_allclose(hinge(np.ones_like(HADAMARD)), 1 - 0.01, rtol=1e-5)
    twins = HADAMARD[:, [0, 0, 1]]  # one pair of equal axes of variance 4/3
    covariances = jax.jit(covariance.covariance_penalty)
    np.testing.assert_allclose(covariances(HADAMARD), 0.0, atol=1e-6)
    np.testing.assert_allclose(covariances(twins), 2 * (4 / 3) ** 2 / 3, rtol=1e-5)
    correlation = jax.jit(covariance.correlation_penalty)
    np.testing.assert_allclose(correlation(HADAMARD), 0.0, atol=1e-6)
    np.testing.assert_allclose(correlation(twins), 2 / 9, rtol=1e-5)
    np.testing.assert_allclose(correlation(100 * twins), 2 / 9, rtol=1e-5)


@pytest.mark.parametrize("name", ["vicreg", "vibcreg"])
def test_the_loss_is_the_papers_formula(name):
    weights = {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}
    expected = 3 * ((FIRST.astype(np.float64) - SECOND) ** 2).mean(axis=1)
    for view in (FIRST.astype(np.float64) / 3, SECOND.astype(np.float64) / 3):
        expected += 5 * np.maximum(0, 1 - np.sqrt(9 * view.var(axis=0, ddof=1) + 1e-4)).mean()
        if name == "vicreg":
            expected += 7 * off_diagonal_squares(9 * np.cov(view.T)) / 4
        else:
            expected += 7 * off_diagonal_squares(np.corrcoef(view.T)) / 16
    losses = {"vicreg": vicreg, "vibcreg": vibcreg}[name](FIRST, SECOND, **weights)
    assert losses.shape == (12,)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_each_term_can_be_left_out():
    nothing = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}
    for loss in (vicreg, vibcreg):
        np.testing.assert_array_equal(loss(FIRST, SECOND, **nothing), np.zeros(12))
        np.testing.assert_array_equal(
            loss(FIRST, FIRST, **{**nothing, "invariance": 1.0}), np.zeros(12)
        )


# --- W-MSE and whitening ----------------------------------------------------------------------


def test_wmse_is_the_squared_distance_of_directions():
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (FIRST, SECOND))
    cosines = (first.astype(np.float64) * second).sum(axis=1)
    np.testing.assert_allclose(wmse(FIRST, 7 * SECOND), 2 - 2 * cosines, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(wmse(FIRST, 2 * FIRST), np.zeros(12), atol=1e-6)
    np.testing.assert_allclose(wmse(FIRST, -FIRST), np.full(12, 4.0), rtol=1e-5)


def test_whitened_covariance_is_the_identity():
    whitened = np.asarray(whiten(100 + 5 * FIRST))
    np.testing.assert_allclose(whitened.mean(axis=0), np.zeros(4), atol=1e-3)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(4), atol=5e-3)
    factor = np.linalg.cholesky(np.cov(FIRST.astype(np.float64).T))
    expected = np.linalg.solve(factor, (FIRST - FIRST.astype(np.float64).mean(axis=0)).T).T
    np.testing.assert_allclose(whiten(FIRST, stabilizer=0.0), expected, rtol=1e-3, atol=1e-3)


def test_one_image_has_nothing_to_whiten():
    with pytest.raises(ValueError, match="one image has no variance"):
        decorrelation.whiten(jnp.ones((1, 4)))


def test_dependent_axes_and_any_scale_are_whitened_finitely():
    line = np.outer(RANDOM.normal(size=12), np.arange(1, 5)).astype(np.float32)  # rank 1
    for scale in (1e-4, 1.0, 1e4):
        gradient = whitened_gradient(scale * line, FIRST)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(np.asarray(whiten(scale * line)).var(0, ddof=1)[0], 1, rtol=1e-2)


@jax.jit
def whitened_gradient(first, second):
    def loss(first):
        return jnp.mean(decorrelation.wmse_loss(*map(decorrelation.whiten, (first, second))))

    return jax.grad(loss)(first)


def iterative64(x, size, num_steps):
    """Algorithm 1 of the paper, group by group."""
    x, out = x.astype(np.float64), []
    for group in np.split(x - x.mean(axis=0), x.shape[1] // size, axis=1):
        covariance = group.T @ group / len(x) + 1e-5 * np.eye(size)
        root = np.eye(size)
        for _ in range(num_steps):
            cubed = np.linalg.matrix_power(root, 3)
            root = (3 * root - cubed @ covariance / np.trace(covariance)) / 2
        out.append(group @ root.T / np.sqrt(np.trace(covariance)))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("size,num_steps", [(2, 5), (4, 3), (1, 5)])
def test_iterative_normalization_is_the_papers_algorithm(size, num_steps):
    whitened = iterative(FIRST, group_size=size, num_steps=num_steps)
    expected = iterative64(FIRST, size, num_steps)
    np.testing.assert_allclose(whitened, expected, rtol=1e-4, atol=1e-5)


def test_many_newton_steps_whiten_within_groups():
    whitened = np.asarray(iterative(FIRST, group_size=6, num_steps=30))  # gcd(6, 4) is 2
    covariances = whitened.T @ whitened / 12
    for group in (slice(0, 2), slice(2, 4)):
        np.testing.assert_allclose(covariances[group, group], np.eye(2), atol=2e-3)
    assert np.abs(covariances[:2, 2:]).max() > 0.05  # the groups know nothing of each other


# --- Degenerate points ------------------------------------------------------------------------

PAIRS = {
    "barlow": covariance.barlow_twins_loss,
    "vicreg": covariance.vicreg_loss,
    "vibcreg": lambda first, second: covariance.vibcreg_loss(
        *map(decorrelation.iterative_normalization, (first, second))
    ),
    "wmse": lambda first, second: decorrelation.wmse_loss(
        *map(decorrelation.whiten, (first, second))
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_constant_projections_have_a_finite_loss_and_gradient(name):
    both = jax.jit(jax.value_and_grad(lambda pair: jnp.mean(PAIRS[name](*pair))))
    zeros = np.zeros_like(FIRST)
    for pair in ((zeros, zeros), (zeros + 0.1, FIRST), (zeros + 1e3, zeros - 1e3), (FIRST, FIRST)):
        loss, gradients = both(pair)
        assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize(
    "loss", [covariance.barlow_twins_loss, covariance.vicreg_loss,
             covariance.vibcreg_loss, decorrelation.wmse_loss],
)  # fmt: skip
def test_wrong_shapes_are_refused(loss):
    with pytest.raises(AssertionError):
        loss(FIRST, SECOND[:5])
    with pytest.raises(AssertionError):
        loss(FIRST[0], SECOND[0])


# --- The methods ------------------------------------------------------------------------------

WMSE = decorrelation.WMSE(hidden=16, projection_dim=2, whitening_size=4)
METHODS = {
    "barlow": (decorrelation.BarlowTwins(**SMALL), 0.01),
    "vicreg": (decorrelation.VICReg(**SMALL), 0.0003),
    "vibcreg": (decorrelation.VIbCReg(group_size=4, **SMALL), 0.0003),
    "wmse": (WMSE, 0.01),
}


def test_wmse_whitens_random_parts_of_the_batch():
    method = decorrelation.WMSE(whitening_size=6, stabilizer=0.0)
    whitened = np.asarray(jax.jit(method._whiten)(FIRST))
    for part in (slice(0, 6), slice(6, 12)):
        np.testing.assert_allclose(np.cov(whitened[part].T), np.eye(4), atol=1e-2)
    with pytest.raises(ValueError, match="a batch of 12 does not divide"):
        decorrelation.WMSE(whitening_size=5)._whiten(FIRST)


@pytest.mark.parametrize("name", METHODS)
def test_views_are_two_images(name):
    views = jax.eval_shape(METHODS[name][0].views, jax.random.key(0), jnp.zeros((8, 8, 3)))
    assert [view.shape for view in views] == [(8, 8, 3)] * 2


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_depend_on_the_devices(name):
    # Whitening four images divides by small variances, which enlarges rounding errors.
    tolerance = 1e-3 if name == "wmse" else 1e-4
    check_layouts(*METHODS[name], Parallel.create(num_devices=4), tolerance=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss_without_collapse(name):
    losses = losses_of_training(*METHODS[name])
    assert losses[-5:].mean() < 0.8 * losses[:5].mean(), losses
