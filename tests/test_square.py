"""Square attack: the published proposals, exactly, and the laws of attacks."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import conformance, threats
from robust_ssl.attacks import square
from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.types import Outputs

SHAPE = (10, 10, 3)
KEY = jax.random.key(0)
KINDS = [threats.Linf, threats.L2]


def _linear(weights):
    def model(images):
        logits = images.reshape(len(images), -1) @ jnp.asarray(weights, jnp.float32)
        return Outputs(features=logits, logits=logits)

    return model


def _bump_by_the_definition(height, width):
    """Adds nested squares one by one, as the paper writes it."""
    bump = np.zeros((height, width))
    for ring in range(max(height, width) // 2 + 1):
        for row in range(height):
            for column in range(width):
                if max(abs(row - height // 2), abs(column - width // 2)) <= ring:
                    bump[row, column] += 1 / (ring + 1) ** 2
    return bump / np.linalg.norm(bump)


@pytest.mark.parametrize("side", [2, 3, 5, 6, 9])
def test_the_window_is_two_opposite_bumps_of_length_one(side):
    upper = _bump_by_the_definition(side // 2, side)
    lower = _bump_by_the_definition(side - side // 2, side)
    expected = np.concatenate([upper, -lower]) / math.sqrt(2)
    np.testing.assert_allclose(square.window(side), expected, atol=1e-12)


def test_the_smallest_window_is_one_pixel():
    np.testing.assert_array_equal(square.window(1), [[-1.0]])


def test_the_schedule_halves_the_area_at_the_published_queries():
    sides = square.side_lengths(10_000, (32, 32), 0.8, 1)
    for query, halvings in [(0, 0), (10, 0), (11, 1), (51, 2), (500, 3), (2001, 6), (9999, 9)]:
        assert sides[query] == max(round(math.sqrt(0.8 / 2**halvings * 1024)), 1)
    # Stretched: half as many queries see the same sizes twice as fast.
    np.testing.assert_array_equal(square.side_lengths(5000, (32, 32), 0.8, 1), sides[::2])
    odd = square.side_lengths(10_000, (32, 32), 0.8, 3)
    assert np.all(odd % 2 == 1) and odd.min() == 3 and odd.max() == 29
    assert square.side_lengths(5, (8, 32), 1.0, 1).max() == 8


def _corner_by_hand(draws, side):
    return [
        math.floor(float(draw) * (size - side)) for draw, size in zip(draws, SHAPE, strict=False)
    ]


def _signs_by_hand(draws):
    return np.where(np.asarray(draws) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("side", [1, 4, 10])
def test_a_linf_proposal_is_the_published_one_in_numpy(side):
    rng = np.random.default_rng(side)
    image = rng.uniform(size=SHAPE).astype(np.float32)
    best = np.clip(image + rng.choice([-0.1, 0.1], size=SHAPE), 0, 1).astype(np.float32)
    draws = rng.uniform(size=8).astype(np.float32)
    row, column = _corner_by_hand(draws[:2], side)
    expected = best.astype(np.float64)
    expected[row : row + side, column : column + side] += 0.2 * _signs_by_hand(draws[2:5])
    expected = np.clip(np.clip(expected, image - 0.1, image + 0.1), 0, 1)
    found = square.Square(threats.Linf(0.1))._propose_linf(
        jnp.asarray(draws), jnp.asarray(image), jnp.asarray(best), jnp.array(side), 0
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", [3, 5, 10])
def test_an_l2_proposal_is_the_published_one_in_numpy(side, seed):
    rng, epsilon = np.random.default_rng(10 * side + seed), 0.7
    image = rng.uniform(0.3, 0.7, size=SHAPE).astype(np.float32)
    change = rng.normal(size=SHAPE)
    change *= 0.8 * epsilon / np.linalg.norm(change)  # a fifth of the budget is unused
    best = (image + change).astype(np.float32)
    draws = rng.uniform(size=8).astype(np.float32)

    # The published steps with slices, in float64.
    change = best.astype(np.float64) - image
    (r1, c1), (r2, c2) = _corner_by_hand(draws[:2], side), _corner_by_hand(draws[2:4], side)
    into = slice(r1, r1 + side), slice(c1, c1 + side)
    out_of = slice(r2, r2 + side), slice(c2, c2 + side)
    both = np.zeros((*SHAPE[:2], 1))
    both[into] = both[out_of] = 1
    held = np.sqrt(np.sum((change * both) ** 2, axis=(0, 1)))
    unused = max(epsilon**2 - np.sum(change**2), 0)
    pattern = square.window(side).T if draws[4] < 0.5 else square.window(side)
    new = pattern[..., None] * _signs_by_hand(draws[5:8])
    new = new + change[into] / np.sqrt(np.sum(change[into] ** 2, axis=(0, 1)))
    new = new / np.sqrt(np.sum(new**2, axis=(0, 1))) * np.sqrt(unused / 3 + held**2)
    change[out_of] = 0
    change[into] = new
    expected = np.clip(image + epsilon * change / np.linalg.norm(change), 0, 1)

    distinct = np.array([3, 5, 10])
    propose = jax.jit(square.Square(threats.L2(epsilon))._propose_l2(distinct, SHAPE[:2]))
    index = int(np.searchsorted(distinct, side))
    found = propose(*map(jnp.asarray, (draws, image, best, side, index)))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_l2_start_is_a_grid_of_windows_and_the_linf_start_is_stripes():
    grid = np.asarray(square._grid(KEY, (16, 16, 3)))  # five windows of side 3 from (0, 0)
    assert np.all(grid[15] == 0) and np.all(grid[:, 15] == 0)
    allowed = [s * p for p in (square.window(3), square.window(3).T) for s in (-1, 1)]
    seen = set()
    for row in range(0, 15, 3):
        for column in range(0, 15, 3):
            tile = grid[row : row + 3, column : column + 3]
            kinds = [
                [k for k, p in enumerate(allowed) if np.allclose(tile[..., c], p, atol=1e-6)]
                for c in range(3)
            ]
            assert all(len(kind) == 1 for kind in kinds)
            assert len({kind[0] // 2 for kind in kinds}) == 1  # channels are turned together
            seen.update(kind[0] for kind in kinds)
    assert seen == {0, 1, 2, 3}
    image = jnp.full(SHAPE, 0.5)
    state = square.Square(threats.Linf(0.125)).start(KEY, _linear(np.eye(300)[:, :2]), image, 0)
    change = np.asarray(state.best - image)
    assert np.all(np.abs(change) == 0.125) and np.all(change == change[:1])
    assert np.unique(change).size == 2


@pytest.mark.parametrize("kind", KINDS)
def test_square_fools_a_linear_model_where_the_margin_is_well_under_the_budget(kind):
    rng = np.random.default_rng(1)
    # The difference of the two logits is smooth in space: squares find only such things quickly.
    plane = np.kron(rng.normal(size=(2, 2, 3)), np.ones((5, 5, 1))).reshape(300)
    weights = jnp.asarray(np.stack([np.zeros(300), plane], axis=1), jnp.float32)
    dual = np.abs(plane).sum() if kind is threats.Linf else np.linalg.norm(plane)
    needed = 0.03 if kind is threats.Linf else 0.3
    images = jnp.asarray(rng.uniform(0.3, 0.7, size=(4, *SHAPE)), jnp.float32)
    biases = jnp.asarray(needed * dual + np.asarray(images).reshape(4, 300) @ plane, jnp.float32)

    def logits(image, bias):  # the first class is right by `needed` in the dual norm
        return (image.reshape(-1, 300) @ weights) + jnp.stack([bias, jnp.zeros(())]).reshape(1, 2)

    @jax.jit
    def run(attack):
        def one(key, image, bias):
            found = attack(key, lambda x: Outputs(x, logits(x, bias)), image, 0)
            return found, jnp.argmax(logits(found, bias)[0])

        return jax.vmap(one)(jax.random.split(KEY, 4), images, biases)

    plenty = 2.5 if kind is threats.Linf else 6.0  # bumps are far from the best L2 direction
    found, predicted = run(square.Square(kind(plenty * needed), num_queries=300))
    np.testing.assert_array_equal(predicted, 1)
    # And none where the closed form says there is none; the search got nearer all the same.
    found, predicted = run(square.Square(kind(0.95 * needed), num_queries=300))
    np.testing.assert_array_equal(predicted, 0)
    assert np.all((found - images).reshape(4, 300) @ plane > 0.1 * needed * dual)


@pytest.mark.parametrize(("threat", "restarts"), [(threats.Linf(0.05), 2), (threats.L2(0.5), 1)])
def test_the_laws_of_attacks(threat, restarts):
    attack = square.Square(threat, num_queries=6, restarts=restarts)
    conformance.check_attack(attack, needs_label=True)


def _model_with_labels(seed=2, count=6):
    rng = np.random.default_rng(seed)
    model = _linear(rng.normal(size=(300, 3)))
    images = jnp.asarray(rng.uniform(size=(count, *SHAPE)), jnp.float32)
    return model, images, jnp.argmax(model(images).logits, axis=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_zero_and_misclassified_images_come_back_untouched(kind):
    model, images, right = _model_with_labels()
    run = jax.jit(lambda attack, labels: attack_batch(attack, KEY, model, images, labels))
    np.testing.assert_array_equal(run(square.Square(kind(0.0), num_queries=4), right), images)
    wrong = right.at[::2].set((right[::2] + 1) % 3)
    found = run(square.Square(kind(0.1), num_queries=4), wrong)
    np.testing.assert_array_equal(found[::2], images[::2])
    assert np.all(np.any(found[1::2] != images[1::2], axis=(1, 2, 3)))


def test_restarts_never_raise_the_margin():
    model, images, labels = _model_with_labels()

    def margins(attack):
        found = jax.jit(lambda: attack_batch(attack, KEY, model, images, labels))()
        logits = np.asarray(model(found).logits)
        right = np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]
        rest = np.where(np.arange(3)[None] == np.asarray(labels)[:, None], -np.inf, logits)
        return right - rest.max(1)

    attack = square.Square(threats.Linf(1e-3), num_queries=15)
    one, three = margins(attack), margins(attack.replace(restarts=3))
    assert np.all(three <= one + 1e-5) and np.any(three < one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_in_parts_is_the_search_in_one_go(kind):
    model, images, labels = _model_with_labels()
    attack, image, label = square.Square(kind(1e-3), num_queries=20), images[0], labels[0]

    @jax.jit
    def search(state, until):
        return attack.search(KEY, model, image, label, state, until)

    start = attack.start(KEY, model, image, label)
    whole = search(start, 20)
    parts = search(search(search(start, 7), 7), 20)
    assert int(whole.asked) == 20
    chex.assert_trees_all_close(whole, parts)


def test_the_search_stops_when_the_image_is_fooled():
    model, images, labels = _model_with_labels()
    attack = square.Square(threats.Linf(0.5), num_queries=50)
    state = attack.start(KEY, model, images[0], labels[0])
    done = attack.search(KEY, model, images[0], labels[0], state, 50)
    assert bool(done.fooled) and int(done.asked) < 50
    later = attack.search(KEY, model, images[0], labels[0], done, 50)
    chex.assert_trees_all_equal(done, later)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", [1.0, np.nan])
def test_a_model_without_information_gives_finite_allowed_images(kind, fill):
    def model(images):
        logits = jnp.full((len(images), 3), fill) + 0.0 * jnp.sum(images)
        return Outputs(features=logits, logits=logits)

    image, attack = jnp.full(SHAPE, 0.25), square.Square(kind(0.1), num_queries=4)
    for label in (0, 1):
        found = jax.jit(lambda label: attack(KEY, model, image, label))(label)
        assert np.all(np.isfinite(found))
        np.testing.assert_allclose(attack.threat.project(found, image), found, atol=1e-6)


def test_another_budget_does_not_trace_again():
    chex.clear_trace_counter()
    model, images, labels = _model_with_labels()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(attack):
        return attack(KEY, model, images[0], labels[0])

    small = run(square.Square(threats.Linf(1e-3), num_queries=3))
    large = run(square.Square(threats.Linf(1e-1), num_queries=3))
    assert np.abs(small - images[0]).max() < 1.01e-3 < np.abs(large - images[0]).max()


def test_bad_input_is_refused():
    attack, image = square.Square(threats.Linf(0.1)), jnp.full(SHAPE, 0.5)
    assert attack.gradient_evaluations == 0 and attack.queries == 5002
    with pytest.raises(ValueError, match="num_queries and restarts"):
        square.Square(threats.Linf(0.1), num_queries=0)
    with pytest.raises(ValueError, match="p_init is a share"):
        square.Square(threats.Linf(0.1), p_init=0.0)
    with pytest.raises(ValueError, match="needs labels"):
        attack(KEY, _linear(np.ones((300, 2))), image)
    with pytest.raises(ValueError, match="at least two classes"):
        attack(KEY, _linear(np.ones((300, 1))), image, 0)
    with pytest.raises(TypeError, match="Linf and L2, got object"):
        attack.replace(threat=object())(KEY, _linear(np.ones((300, 2))), image, 0)
