"""Perturbations that training carries along: their optimum, their bookkeeping, their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from robust_ssl import data, losses, models, threats
from robust_ssl.attacks import attack_batch
from robust_ssl.attacks.perturbation import random_delta, within_budget
from robust_ssl.finetuning import (
    ATTA,
    COLLECTION,
    FreeReplays,
    UniversalPool,
    init_state,
    make_step,
)
from robust_ssl.parallel import Parallel

KEY = jax.random.key(5)
SHAPE = (8, 8, 3)
THREATS = {
    "Linf": threats.Linf(0.1),
    "L2": threats.L2(0.5),
    "Band": threats.Band(threats.L2(0.5), low=0.1, high=0.3),
    "BandLinf": threats.Band(threats.Linf(0.1), low=0.1, high=0.3),
    "Patch": threats.Patch(0.1),
    "Patch anywhere": threats.Patch(0.1, location="random"),
}


def gray(n):
    """Images that no budget here pushes to 0 or 1."""
    return jax.random.uniform(KEY, (n, *SHAPE), minval=0.4, maxval=0.6)


def slopes(n):
    """The weights of a linear loss, others for every image."""
    return jax.random.normal(jax.random.key(9), (n, *SHAPE))


def climb(pool, deltas, images, weights, steps, key=KEY):
    """What training on the linear loss ``mean_i <w_i, x_i>`` does to the pool."""
    indices = jnp.arange(len(images))

    def loss(deltas):
        attacked = pool.apply(deltas, key, images, indices)
        return jnp.mean(jnp.sum(weights * attacked, axis=(1, 2, 3)))

    def one(step, deltas):
        return pool.update(deltas, jax.grad(loss)(deltas), jax.random.fold_in(key, step), step)

    return jax.lax.fori_loop(0, steps, one, deltas)


def optimum(threat, weight):
    """The allowed perturbation that raises ``<weight, delta>`` most, in closed form."""
    weight = np.asarray(weight, np.float64)
    if isinstance(threat, threats.Linf):
        return threat.epsilon * np.sign(weight)
    if isinstance(threat, threats.L2):
        return threat.epsilon * weight / np.linalg.norm(weight)
    if isinstance(threat, threats.Band):
        inside = np.asarray(threat.filter_delta(jnp.asarray(weight)), np.float64)
        return threat.epsilon * inside / np.linalg.norm(inside)
    return np.where(threat.mask(*SHAPE[:2]), weight > 0, 0.0)


@pytest.mark.parametrize("name", ["Linf", "L2", "Band", "Patch"])
def test_on_a_linear_loss_the_pool_climbs_to_the_best_allowed_perturbation(name):
    threat, images, weights = THREATS[name], gray(6), slopes(6)
    pool = UniversalPool(threat, clean_share=0.0, size=1)
    start = pool.init(KEY, SHAPE, batch_size=6)
    (deltas,) = climb(pool, start, images, weights, 60)
    np.testing.assert_allclose(deltas, optimum(threat, weights.mean(0)), atol=1e-5)


def test_each_member_climbs_on_its_own_images_alone():
    images, weights = gray(16), slopes(16)
    pool = UniversalPool(threats.Linf(0.1), clean_share=0.3, size=3)
    start = pool.init(KEY, SHAPE, batch_size=16)
    moved = pool.apply(start, KEY, images, jnp.arange(16)) - images
    distances = np.abs(np.asarray(moved)[:, None] - np.asarray(start)[None]).max((2, 3, 4))
    clean = np.abs(moved).max((1, 2, 3)) == 0
    member = np.where(clean, -1, distances.argmin(1))
    assert set(member) == {-1, 0, 1, 2} and distances.min(1)[~clean].max() < 1e-6
    deltas = climb(pool, start, images, weights, 20)
    for k in range(3):
        expected = optimum(pool.threat, weights[member == k].mean(0))
        np.testing.assert_allclose(deltas[k], expected, atol=2e-6)


@pytest.mark.parametrize("name", THREATS)
def test_the_pool_stays_in_its_budget_and_its_images_valid(name):
    threat, images = THREATS[name], jnp.round(4 * gray(4)) / 4 - 0.5  # zeros, and 0.25
    images = jnp.concatenate([images, 1 - images])
    pool = UniversalPool(threat, step_size=0.3, clean_share=0.0, size=2)
    deltas = pool.init(KEY, SHAPE, batch_size=8)
    for steps in (0, 1, 7):
        deltas = climb(pool, deltas, images, slopes(8), steps)
        np.testing.assert_allclose(
            jax.vmap(lambda d: within_budget(d, threat))(deltas), deltas, atol=1e-6
        )
        attacked = pool.apply(deltas, KEY, images, jnp.arange(8))
        assert attacked.min() >= 0 and attacked.max() <= 1
        assert not jnp.allclose(attacked, images)
        if name == "Linf":
            assert jnp.abs(attacked - images).max() <= threat.epsilon + 1e-6


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_clean_share_of_one_leaves_all_images_and_of_zero_none(share):
    pool = UniversalPool(threats.Linf(0.1), clean_share=share, size=2)
    deltas, images = pool.init(KEY, SHAPE, batch_size=64), gray(64)
    changed = np.any(pool.apply(deltas, KEY, images, jnp.arange(64)) != images, axis=(1, 2, 3))
    assert changed.all() if share == 0 else not changed.any()
    after = climb(pool, deltas, images, slopes(64), 1)
    moved = jnp.abs(after - deltas).max(axis=(1, 2, 3))  # without an image, without a gradient
    assert (moved > 0.01).all() if share == 0 else (moved < 1e-7).all()


def test_the_clean_share_and_the_members_come_as_often_as_they_say():
    pool = UniversalPool(threats.Linf(0.1), clean_share=0.25, size=3)
    deltas = 0.1 * jnp.array([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1) * jnp.ones((3, *SHAPE)) + 0.01
    n = 4000
    moved = pool.apply(deltas, KEY, jnp.full((n, *SHAPE), 0.5), jnp.arange(n))[:, 0, 0, 0] - 0.5
    counts = [int(jnp.sum(jnp.abs(moved - value) < 1e-3)) for value in (0.0, -0.09, 0.01, 0.1)]
    np.testing.assert_allclose(np.array(counts) / n, 0.25, atol=0.03)


@pytest.mark.parametrize("name", THREATS)
def test_what_an_image_gets_depends_on_its_index_alone(name):
    pool = UniversalPool(THREATS[name], clean_share=0.3, size=3)
    deltas, images = pool.init(KEY, SHAPE, batch_size=8), gray(8)
    whole = pool.apply(deltas, KEY, images, jnp.arange(8))
    half = pool.apply(deltas, KEY, images[4:], jnp.arange(4, 8))
    np.testing.assert_array_equal(half, whole[4:])
    order = jnp.array([3, 7, 0, 5])
    np.testing.assert_array_equal(pool.apply(deltas, KEY, images[order], order), whole[order])
    another_step = pool.apply(deltas, jax.random.key(6), images, jnp.arange(8))
    assert not jnp.array_equal(another_step, whole)


def test_one_member_in_turn_is_drawn_anew_and_the_others_are_not_touched():
    threat = threats.Linf(0.1)
    pool = UniversalPool(threat, size=3, renew_every=4)
    deltas, nothing = pool.init(KEY, SHAPE, batch_size=2), jnp.zeros((3, *SHAPE))
    kept = within_budget(deltas[0], threat)
    np.testing.assert_allclose(kept, deltas[0], atol=1e-7)
    renewals = []
    for step in range(16):
        key = jax.random.fold_in(KEY, step)
        after = pool.update(deltas, nothing, key, jnp.asarray(step))
        renewed = np.flatnonzero(jnp.abs(after - deltas).max(axis=(1, 2, 3)) > 1e-6).tolist()
        if (step + 1) % 4:
            assert renewed == [], step
        else:
            renewals += renewed
            np.testing.assert_array_equal(after[renewed[0]], random_delta(key, SHAPE, threat))
        deltas = after
    assert renewals == [1, 2, 0, 1]
    never = pool.replace(renew_every=None).update(deltas, nothing, KEY, jnp.asarray(3))
    np.testing.assert_allclose(never, deltas, atol=1e-7)


@pytest.mark.parametrize("name", THREATS)
def test_a_member_does_to_images_in_scoring_what_it_did_in_training(name):
    pool = UniversalPool(THREATS[name], clean_share=0.0, size=1)
    deltas = pool.init(KEY, SHAPE, batch_size=4)
    images = jnp.clip(2 * gray(4) - 0.5, 0, 1).at[:, 0].set(0.0).at[:, 1].set(1.0)
    trained = pool.apply(deltas, KEY, images, jnp.arange(4))
    (member,) = pool.members(np.asarray(deltas))
    keys = [jax.random.split(jax.random.fold_in(KEY, i), 3)[2] for i in range(4)]  # of the place
    scored = jnp.stack([member(key, None, x) for key, x in zip(keys, images, strict=True)])
    np.testing.assert_allclose(trained, scored, atol=1e-7)


def test_members_are_attacks_that_are_scored_like_others():
    pool = UniversalPool(threats.Linf(0.1), size=3)
    deltas, images = pool.init(KEY, SHAPE, batch_size=4), gray(4)
    members = pool.members(deltas)
    assert len(members) == 3 and {m.gradient_evaluations for m in members} == {0}
    for member, delta in zip(members, deltas, strict=True):
        attacked = attack_batch(member, KEY, None, images)
        expected = jnp.clip(images + delta.reshape(1, *SHAPE), 0, 1)
        np.testing.assert_allclose(attacked, expected, atol=1e-7)


def test_the_steps_default_to_a_share_of_the_budget():
    up = jnp.ones((2, *SHAPE))
    for adversary, share in ((UniversalPool(threats.Linf(0.1), size=2), 1 / 5),
                             (FreeReplays(threats.Linf(0.1)), 1.0)):  # fmt: skip
        moved = adversary.update(jnp.zeros((2, *SHAPE)), up, KEY, jnp.asarray(0))
        np.testing.assert_allclose(moved, 0.1 * share, atol=1e-7)
    patch = UniversalPool(threats.Patch(0.1), size=2)
    moved = patch.update(jnp.zeros((2, *SHAPE)), up, KEY, jnp.asarray(0))
    np.testing.assert_allclose(moved.max(), 0.1, atol=1e-7)


# ------------------------------------------------------------------------------------ in the step


@functools.cache
def net():
    return models.classifier(jax.random.key(1), tiny.encoder(), 4, head="linear")


def batch(n=8):
    images, labels = tiny.images(n=n)
    return {"images": images, "labels": labels.astype(np.int32), "indices": np.arange(n)}


ON_ATTACKED = {"attacked": (losses.adversarial_cross_entropy, 1.0)}


def one_step(attack, tx, parallel=None, **arguments):
    """Returns the first state of a training against an adversary and its compiled step."""
    parallel = parallel or Parallel.create(num_devices=1, kind="jit")
    arguments = {"losses": ON_ATTACKED, "batch_statistics": "adversarial", **arguments}
    step = make_step(net(), tx, key=KEY, attack=attack, axis_name=parallel.axis_name, **arguments)
    compiled = parallel.compile(step)
    state = init_state(net(), tx, attack, key=jax.random.key(2), batch_size=8)
    return state, lambda state, batch: compiled(state, parallel.put(batch))


def deltas_of(state):
    return state.variables[COLLECTION]["deltas"]


def cross_entropy(params, attacked, labels, statistics=None):
    """The loss in training mode, and what the running statistics become."""
    variables = {"params": params, "batch_stats": statistics or net().variables["batch_stats"]}
    outputs, new = net().with_variables(variables).apply_train(attacked, key=KEY)
    each = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
    return jnp.mean(each), new


def test_the_pool_in_a_step_moves_by_the_gradient_of_the_hand_written_loss():
    pool = UniversalPool(threats.L2(0.5), step_size=0.2, clean_share=0.3, size=2)
    state, step = one_step(pool, optax.sgd(0.1), losses=ON_ATTACKED | {
        "clean": (losses.clean_cross_entropy, 0.5)})  # fmt: skip
    after, metrics = step(state, batch())
    images, labels = jnp.asarray(batch()["images"] / np.float32(255)), batch()["labels"]
    step_key = jax.random.split(jax.random.fold_in(KEY, 0))[0]
    attack_key = jax.random.split(step_key)[1]

    def member(i):
        choice, coin, _ = jax.random.split(jax.random.fold_in(attack_key, i), 3)
        return (
            None if jax.random.bernoulli(coin, 0.3) else int(jax.random.randint(choice, (), 0, 2))
        )

    members = [member(i) for i in range(8)]
    assert set(members) == {None, 0, 1}

    def loss(params, deltas):
        moved = [x if m is None else x + deltas[m] for x, m in zip(images, members, strict=True)]
        attacked = jnp.clip(jnp.stack(moved), 0, 1)  # of which no pixel lies exactly at 0 or 1
        clean = cross_entropy(params, images, labels)[0]
        return cross_entropy(params, attacked, labels)[0] + 0.5 * clean

    params, deltas = state.variables["params"], deltas_of(state)
    value, (by_weights, by_deltas) = jax.value_and_grad(loss, (0, 1))(params, deltas)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for new, old, g in zip(*map(jax.tree.leaves, (after.variables["params"], params, by_weights)),
                           strict=True):  # fmt: skip
        np.testing.assert_allclose(new, old - 0.1 * g, atol=1e-6)
    for new, old, g in zip(deltas_of(after), deltas, by_deltas, strict=True):
        climbed = old + 0.2 * g / jnp.linalg.norm(g)
        climbed = climbed * min(1.0, 0.5 / float(jnp.linalg.norm(climbed)))
        np.testing.assert_allclose(new, climbed, atol=1e-6)
        assert jnp.abs(new - old).max() > 1e-3


@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(0.5)])
def test_two_steps_of_free_training_are_the_published_algorithm(threat):
    rate = 0.1
    state, step = one_step(FreeReplays(threat, replays=2), optax.sgd(rate))
    images, labels = jnp.asarray(batch()["images"] / np.float32(255)), batch()["labels"]
    assert images.min() == 0  # pixels that cannot go down are among them
    params, statistics = state.variables["params"], None
    deltas = np.zeros((8, *SHAPE), np.float32)
    for _ in range(2):
        state, _ = step(state, batch())
        candidates = images + deltas
        (_, statistics), (by_weights, by_pixels) = jax.value_and_grad(
            cross_entropy, (0, 1), has_aux=True
        )(params, jnp.clip(candidates, 0, 1), labels, statistics)
        by_deltas = np.where((candidates >= 0) & (candidates <= 1), by_pixels, 0.0)
        params = jax.tree.map(lambda p, g: p - rate * g, params, by_weights)
        if isinstance(threat, threats.Linf):
            deltas = np.clip(deltas + 0.1 * np.sign(by_deltas), -0.1, 0.1)
        else:
            norms = np.sqrt((by_deltas**2).sum((1, 2, 3), keepdims=True))
            deltas = deltas + 0.5 * by_deltas / norms
            norms = np.sqrt((deltas**2).sum((1, 2, 3), keepdims=True))
            deltas = deltas * np.minimum(1, 0.5 / norms)
        np.testing.assert_allclose(deltas_of(state), deltas, atol=2e-6)
        for new, old in zip(*map(jax.tree.leaves, (state.variables["params"], params)),
                            strict=True):  # fmt: skip
            np.testing.assert_allclose(new, old, atol=2e-6)
        for new, old in zip(*map(jax.tree.leaves, (state.variables["batch_stats"], statistics)),
                            strict=True):  # fmt: skip
            np.testing.assert_allclose(new, old, atol=2e-6)


def test_free_perturbations_belong_to_a_place_in_the_batch_and_are_carried_over():
    free = FreeReplays(threats.Linf(0.1))
    deltas = jnp.arange(4.0).reshape(4, 1, 1, 1) / 40 * jnp.ones((4, *SHAPE))
    moved = free.apply(deltas, KEY, gray(4)[:2], jnp.array([3, 1])) - gray(4)[:2]
    np.testing.assert_allclose(moved[:, 0, 0, 0], [3 / 40, 1 / 40], atol=1e-6)
    state, step = one_step(free, optax.sgd(0.0))
    first, _ = step(state, batch())
    other = {**batch(), "images": batch()["images"][::-1], "labels": batch()["labels"][::-1]}
    second, _ = step(first, other)
    before, after = (np.round(20 * deltas_of(state), 3) for state in (first, second))
    assert set(np.unique(before)) <= {-2, 0, 2} and np.abs(before).mean() > 1
    # The step is the whole budget: from a bound a pixel comes back to zero or stays.
    assert set(np.unique(after[before != 0] * before[before != 0])) == {0, 4}


@pytest.mark.parametrize("resident", [True, False])
def test_every_batch_is_shown_as_often_as_said(resident):
    examples = data.from_arrays(*tiny.images(n=16))
    make = functools.partial(
        data.Batches, examples, 4, seed=0, stage="x", resident=resident,
        parallel=Parallel.create(num_devices=2),
    )  # fmt: skip
    shown, once = make(replays=3), make()
    assert shown.steps_per_epoch == 3 * once.steps_per_epoch == 12
    for step in (0, 1, 2, 3, 11, 12, 14):
        for name, values in once(step // 3).items():
            np.testing.assert_array_equal(shown(step)[name], values)
    shown.close(), once.close()


def test_a_replay_of_a_batch_is_augmented_as_before():
    noise = lambda key, x: x + jax.random.uniform(key, x.shape, maxval=0.01)  # noqa: E731
    of_pixels = {"mean": (lambda inputs: jnp.mean(inputs.clean.taps["conv1"], (1, 2, 3)), 1.0)}
    state, step = one_step(
        FreeReplays(threats.Linf(0.1), replays=3), optax.sgd(0.0), losses=of_pixels, augment=noise
    )
    seen = []
    for _ in range(5):
        state, metrics = step(state, batch())
        seen.append(float(metrics["mean"]))
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


def test_an_augmentation_keeps_the_shape_of_images():
    smaller = lambda key, x: x[:4]  # noqa: E731
    arguments = {"losses": {"ce": ("robust_ssl.losses:clean_cross_entropy", 1.0)}}
    arguments |= {"batch_statistics": "clean", "augment": smaller}
    state, step = one_step(None, optax.sgd(0.0), **arguments)
    with pytest.raises(
        ValueError, match=r"augment must return images as it gets them, .*\(4, 8, 3"
    ):
        step(state, batch())


@pytest.mark.parametrize("adversary", [
    UniversalPool(threats.Linf(0.1), size=1, renew_every=1), FreeReplays(threats.L2(0.5))
])  # fmt: skip
def test_a_step_that_is_not_finite_leaves_the_perturbations_too(adversary):
    state, step = one_step(adversary, optax.sgd(0.1))
    poisoned = batch() | {"images": batch()["images"].astype(np.float32) / 255}
    good, _ = step(state, poisoned)
    poisoned["images"] = poisoned["images"].copy()
    poisoned["images"][3, 0, 0, 0] = np.nan
    bad, metrics = step(good, poisoned)
    assert float(metrics["skipped"]) == 1 and int(bad.step) == 2
    for a, b in zip(*map(jax.tree.leaves, (good.variables, bad.variables)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not jnp.array_equal(deltas_of(good), deltas_of(state))


@pytest.mark.parametrize(
    ("method", "adversary"),
    [
        ("pmap", UniversalPool(threats.L2(0.5), size=3)),
        ("shard_map", UniversalPool(threats.Patch(0.1, location="random"), size=2, renew_every=2)),
        ("jit", UniversalPool(threats.L2(0.5), size=3)),
        ("pmap", FreeReplays(threats.L2(0.5), replays=2)),
    ],
)
def test_perturbations_do_not_depend_on_the_devices(method, adversary):
    endings = []
    for parallel in (
        Parallel.create(num_devices=1, kind="jit"), Parallel.create(num_devices=4, kind=method)
    ):  # fmt: skip
        state, step = one_step(adversary, optax.sgd(0.1), parallel)
        for _ in range(2):
            state, _ = step(state, batch())
        endings.append(jax.device_get(state.variables))
    for a, b in zip(*map(jax.tree.leaves, endings), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("options", [{"size": 0}, {"size": -1}, {"renew_every": 0}])
def test_a_pool_of_none_is_an_error(options):
    with pytest.raises(ValueError, match="size >= 1 and renew_every >= 1 or None"):
        UniversalPool(threats.Linf(0.1), **options)


@pytest.mark.parametrize("share", [-0.1, 1.5, 30, float("nan")])
def test_a_clean_share_that_is_none_is_an_error(share):
    with pytest.raises(ValueError, match="clean_share must be in"):
        UniversalPool(threats.Linf(0.1), clean_share=share)


def test_a_batch_without_a_perturbation_for_every_image_is_an_error():
    with pytest.raises(ValueError, match="a batch of 4 images, but perturbations for 2"):
        FreeReplays(threats.Linf(0.1)).apply(jnp.zeros((2, *SHAPE)), KEY, gray(4), jnp.arange(4))


def test_no_replay_is_an_error():
    with pytest.raises(ValueError, match="replays must be at least 1, got 0"):
        FreeReplays(threats.Linf(0.1), replays=0)


@pytest.mark.parametrize("given", [{}, {"key": KEY}, {"batch_size": 8}])
def test_a_state_without_what_an_adversary_needs_is_an_error(given):
    with pytest.raises(ValueError, match=r"FreeReplays .* give init_state key= and batch_size="):
        init_state(net(), optax.sgd(0.1), FreeReplays(threats.Linf(0.1)), **given)


@pytest.mark.parametrize(
    ("attack", "lacking", "message"),
    [
        (
            FreeReplays(threats.Linf(0.1)),
            (),
            r"in the state, and this one has none: .* batch_size=",
        ),
        (
            ATTA(threats.Linf(0.1)),
            ("rows",),
            "ATTA finds .* by the batch's 'rows', and the batch has images",
        ),
    ],
)
def test_a_step_that_does_not_find_the_perturbations_says_what_to_do(attack, lacking, message):
    tx = optax.sgd(0.1)
    step = make_step(net(), tx, key=KEY, attack=attack, losses=ON_ATTACKED)
    arguments = (attack,) if lacking else ()
    state = init_state(net(), tx, *arguments, key=KEY, num_images=8)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, state, batch())


@pytest.mark.parametrize("term", [losses.clean_cross_entropy, (losses.clean_cross_entropy,)])
def test_a_loss_without_a_weight_is_an_error(term):
    with pytest.raises(ValueError, match=r"the loss 'mine' must be \(loss, weight\)"):
        make_step(net(), optax.sgd(0.1), key=KEY, losses={"mine": term})
