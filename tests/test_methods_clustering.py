"""SwAV, DeepCluster v2 and DINO: losses in closed form, what they remember, one result anywhere."""

import functools

import jax
import jax.numpy as jnp
import method_steps
import numpy as np
import optax
import pytest
import tiny

from robust_ssl import pretraining
from robust_ssl.parallel import Parallel
from robust_ssl.pretraining import clustering, distillation
from robust_ssl.pretraining.method import PretrainInputs, apply_network, encode, normalize

RANDOM = np.random.default_rng(0)
LOGITS, OTHERS = (RANDOM.normal(size=(2, 6, 5)).astype(np.float32) for _ in range(2))
CENTRE = RANDOM.normal(size=5).astype(np.float32)
SMALL = {"hidden": 16, "projection_dim": 8}
DINO = distillation.DINO(
    num_prototypes=6, momentum=0.9, local_crops=2, local_size=4, freeze=0.1, **SMALL
)
SWAV = clustering.SwAV(
    num_prototypes=6, queue_size=12, queue_start=0.5, local_crops=2, local_size=4, freeze=0.1,
    **SMALL,
)  # fmt: skip
DEEPCLUSTER = clustering.DeepClusterV2(num_prototypes=4, num_clusterings=2, **SMALL)


def softmax64(x, axis=-1):
    x = np.exp(np.asarray(x, np.float64) - np.max(x, axis=axis, keepdims=True))
    return x / x.sum(axis=axis, keepdims=True)


def sinkhorn64(scores, num_steps=3, smoothness=0.05):
    """The paper's algorithm, with sums in the place of logarithms."""
    weights = np.exp(np.asarray(scores, np.float64) / smoothness).T
    prototypes, batch = weights.shape
    weights /= weights.sum()
    for _ in range(num_steps):
        weights /= prototypes * weights.sum(axis=1, keepdims=True)
        weights /= batch * weights.sum(axis=0, keepdims=True)
    return weights.T * batch


def swapped64(targets, logits):
    pairs = [(a, v) for a in range(len(targets)) for v in range(len(logits)) if a != v]
    return np.mean([-(targets[a] * np.log(softmax64(logits[v]))).sum(1) for a, v in pairs], axis=0)


# --- Sinkhorn ---------------------------------------------------------------------------------

sinkhorn = jax.jit(clustering.sinkhorn, static_argnames=("num_steps", "smoothness"))
SCORES = np.tanh(RANDOM.normal(size=(12, 4))).astype(np.float32)


def test_sinkhorn_is_the_papers_algorithm():
    for options in ({}, {"num_steps": 1}, {"smoothness": 0.5}):
        np.testing.assert_allclose(
            sinkhorn(SCORES, **options), sinkhorn64(SCORES, **options), rtol=2e-4, atol=1e-7
        )


def test_rows_are_distributions_and_prototypes_get_equal_shares():
    weights = sinkhorn(SCORES, num_steps=100, smoothness=0.3)
    np.testing.assert_allclose(weights.sum(axis=1), np.ones(12), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), np.full(4, 3.0), rtol=1e-3)
    np.testing.assert_allclose(sinkhorn(np.ones((6, 3), np.float32)), np.full((6, 3), 1 / 3))


def test_sinkhorn_neither_overflows_nor_passes_a_gradient():
    weights = sinkhorn(1000 * SCORES)
    np.testing.assert_allclose(weights.sum(axis=1), np.ones(12), rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(clustering.sinkhorn(x) ** 2)))(SCORES)
    np.testing.assert_array_equal(gradient, np.zeros_like(SCORES))


# --- The two losses between views -------------------------------------------------------------

entropy = jax.jit(clustering.cross_view_entropy)
dino = jax.jit(distillation.dino_loss)


@pytest.mark.parametrize("views", [2, 4])
def test_cross_view_entropy_averages_over_pairs_of_different_views(views):
    logits = RANDOM.normal(size=(views, 6, 5)).astype(np.float32)
    targets = softmax64(OTHERS).astype(np.float32)
    losses = entropy(targets, logits)
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses, swapped64(targets, logits), rtol=1e-5)


def test_dino_is_the_papers_formula():
    losses = dino(LOGITS, OTHERS, CENTRE, temperature=0.2, teacher_temperature=0.05)
    targets = softmax64((OTHERS.astype(np.float64) - CENTRE) / 0.05)
    np.testing.assert_allclose(losses, swapped64(targets, LOGITS / 0.2), rtol=1e-4)


def test_dino_of_uniform_outputs_is_log_prototypes():
    flat = np.full((2, 3, 7), 0.3, np.float32)
    np.testing.assert_allclose(dino(flat, flat, flat[0, 0]), np.full(3, np.log(7)), rtol=1e-6)


def test_no_gradient_into_the_teacher_and_finite_ones_into_the_student():
    gradients = jax.jit(jax.grad(lambda *xs: jnp.sum(distillation.dino_loss(*xs)), (0, 1, 2)))
    student, teacher, center = gradients(LOGITS, OTHERS, CENTRE)
    assert np.abs(student).max() > 0
    np.testing.assert_array_equal(teacher, np.zeros_like(OTHERS))
    np.testing.assert_array_equal(center, np.zeros_like(CENTRE))
    assert np.isfinite(gradients(1e4 * LOGITS, 1e4 * OTHERS, CENTRE)[0]).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        distillation.dino_loss(LOGITS, OTHERS[:, :5], CENTRE)
    with pytest.raises(AssertionError):
        distillation.dino_loss(LOGITS, OTHERS, OTHERS[0])
    with pytest.raises(AssertionError):
        clustering.sinkhorn(SCORES[0])


# --- Clusters ---------------------------------------------------------------------------------


def test_kmeans_recovers_separated_directions():
    labels = np.arange(60) % 3
    points = 10 * np.eye(3, 6)[labels] + RANDOM.normal(size=(60, 6))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    points[57:] = 0  # never seen
    kmeans = functools.partial(clustering.spherical_kmeans, num_clusters=3)
    clusterings = jax.jit(jax.vmap(kmeans, (0, None)))(
        jax.random.split(jax.random.key(1), 10), jnp.asarray(points)
    )
    centroids, nearest = (np.asarray(x) for x in clusterings)
    np.testing.assert_array_equal(nearest[:, 57:], -1)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=2), 1.0, rtol=1e-5)
    right = [len({*zip(labels[:57], row[:57], strict=True)}) == 3 for row in nearest]
    assert sum(right) >= 3  # of ten random starts; the others share a start within one cluster
    best = right.index(True)
    for label in range(3):  # a centroid is the direction of the mean of its points
        mean = points[:57][labels[:57] == label].astype(np.float64).mean(axis=0)
        cluster = nearest[best][label]
        np.testing.assert_allclose(
            centroids[best][cluster], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5
        )


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ValueError, match="3 clusters need as many points, there are 2"):
        clustering.spherical_kmeans(jax.random.key(0), jnp.ones((2, 2)), num_clusters=3)
    with pytest.raises(ValueError, match="set fewer prototypes"):
        DEEPCLUSTER.init(jax.random.key(0), tiny.encoder(), 3)


def test_deepcluster_loss_is_the_formula_and_skips_the_unassigned():
    projections = RANDOM.normal(size=(2, 6, 5)).astype(np.float32)
    prototypes = RANDOM.normal(size=(3, 4, 5)).astype(np.float32)
    assigned = RANDOM.integers(0, 4, (3, 6)).astype(np.int32)
    assigned[:, 5] = -1
    loss = functools.partial(clustering.deepcluster_loss, temperature=0.3)
    losses, pullback = jax.vjp(lambda z: loss(z, prototypes, assigned), projections)
    (gradient,) = pullback(jnp.ones(6))
    expected = np.zeros(6)
    for i in range(5):
        logs = [
            np.log(softmax64(prototypes[h].astype(np.float64) @ projections[v, i] / 0.3))
            for h in range(3)
            for v in range(2)
        ]
        expected[i] = -np.mean([log[assigned[j // 2, i]] for j, log in enumerate(logs)])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[5] == 0 and np.all(gradient[:, 5] == 0) and np.all(np.isfinite(gradient))


# --- What a forward pass and an update leave --------------------------------------------------


VIEWS = tuple(RANDOM.uniform(size=(2, 4, 8, 8, 3)).astype(np.float32))
ROWS = np.array([5, 0, 3, 6], np.int32)


@functools.cache
def forward(method):
    """``forward(method)(variables, progress)``: gradient, losses and update of one batch."""

    def losses(params, variables, progress):
        inputs = PretrainInputs(
            views=VIEWS, rows=ROWS, key=jax.random.key(7), progress=jnp.float32(progress)
        )
        losses, update = method.loss({**variables, "params": params}, tiny.encoder(), inputs)
        return jnp.mean(losses), (losses, update)

    gradient = jax.grad(losses, has_aux=True)
    return jax.jit(lambda variables, progress: gradient(variables["params"], variables, progress))


@functools.cache
def fresh(method):
    return method.init(jax.random.key(1), tiny.encoder(), 8)


@pytest.mark.parametrize("method", [DINO, SWAV], ids=["dino", "swav"])
def test_prototypes_have_no_gradient_at_first(method):
    gradients, _ = forward(method)(fresh(method), 0.05)
    np.testing.assert_array_equal(gradients["prototypes"], 0)
    assert np.abs(gradients["projector"]["output"]["kernel"]).max() > 0
    gradients, _ = forward(method)(fresh(method), 0.15)
    assert np.abs(gradients["prototypes"]).max() > 0


def test_the_center_is_the_moving_average_of_what_the_teacher_says():
    variables = fresh(DINO)
    state = {**variables["state"], "center": jnp.arange(6.0)}
    _, (_, update) = forward(DINO)({**variables, "state": state}, 0.5)
    features, statistics = encode(tiny.encoder(), VIEWS, None)
    out, _ = apply_network(
        DINO.networks["projector"], variables, "projector", jnp.concatenate(features), None
    )
    prototypes = normalize(variables["params"]["prototypes"].T).T
    cosines = np.asarray(normalize(out), np.float64) @ np.asarray(prototypes, np.float64)
    expected = 0.9 * np.arange(6.0) + 0.1 * cosines.mean(axis=0)
    np.testing.assert_allclose(update.state["center"], expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(  # the teacher, still equal to the student, saw the same two views
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        update.state["teacher"]["encoder"]["batch_stats"],
        statistics,
    )


def test_the_teacher_follows_the_student_by_its_momentum():
    variables, encoder = fresh(DINO), tiny.encoder()
    ones = jax.tree.map(jnp.ones_like, encoder.variables["params"])
    moved = encoder.replace(variables={**encoder.variables, "params": ones})
    params = jax.tree.map(jnp.zeros_like, variables["params"])
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        new = DINO.after_update({**variables, "params": params}, moved, jnp.float32(progress))
        before, after = variables["state"]["teacher"], new["state"]["teacher"]
        for part, student in (("encoder", 1.0), ("params", 0.0)):
            jax.tree.map(
                lambda old, new, student=student, momentum=momentum: np.testing.assert_allclose(
                    new, momentum * old + (1 - momentum) * student, rtol=1e-4, atol=1e-6
                ),
                before["encoder"]["params"] if part == "encoder" else before["params"],
                after["encoder"]["params"] if part == "encoder" else after["params"],
            )
        assert after["encoder"]["batch_stats"] is before["encoder"]["batch_stats"]


def test_the_teachers_temperature_warms_up():
    method = distillation.DINO(warmup=0.2)
    given = [float(method._teacher_temperature(jnp.float32(p))) for p in (0.0, 0.1, 0.2, 0.9)]
    np.testing.assert_allclose(given, [0.04, 0.055, 0.07, 0.07], rtol=1e-5)
    assert distillation.DINO()._teacher_temperature(jnp.float32(0)) == 0.07


@pytest.mark.parametrize("progress,full", [(0.4, True), (0.6, False), (0.6, True)])
def test_swav_is_the_papers_loss_and_its_queue_joins_when_full_and_due(progress, full):
    method = SWAV.replace(local_crops=0)
    variables = fresh(method)
    queue = RANDOM.normal(size=(2, 12, 8)).astype(np.float32)
    queue /= np.linalg.norm(queue, axis=2, keepdims=True)
    if not full:
        queue[:, -1] = 0
    _, (losses, update) = forward(method)({**variables, "state": {"queue": queue}}, progress)
    new = np.asarray(update.state["queue"])
    np.testing.assert_array_equal(new[:, 4:], queue[:, :8])
    projections = new[:, :4].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(projections, axis=2), 1.0, rtol=1e-5)
    prototypes = np.asarray(variables["params"]["prototypes"], np.float64)
    scores = projections @ prototypes
    seen = np.concatenate([scores, queue @ prototypes], axis=1)
    used = seen if full and progress > 0.5 else scores
    assigned = [sinkhorn64(view)[:4] for view in used]
    np.testing.assert_allclose(losses, swapped64(assigned, scores / 0.1), rtol=1e-3)


def test_prototypes_have_length_one_after_an_update():
    variables = fresh(SWAV)
    scaled = {**variables["params"], "prototypes": 3 * variables["params"]["prototypes"]}
    new = SWAV.after_update({**variables, "params": scaled}, tiny.encoder(), jnp.float32(0))
    np.testing.assert_allclose(
        new["params"]["prototypes"], variables["params"]["prototypes"], rtol=1e-5
    )
    np.testing.assert_allclose(np.linalg.norm(new["params"]["prototypes"], axis=0), 1.0, rtol=1e-5)


def test_deepcluster_remembers_by_row_and_tells_clusters_once_there_are_some():
    variables = fresh(DEEPCLUSTER)
    gradients, (losses, update) = forward(DEEPCLUSTER)(variables, 0.0)
    np.testing.assert_array_equal(losses, np.zeros(4))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients))
    memory = np.asarray(update.state["memory"])
    np.testing.assert_allclose(np.linalg.norm(memory[:, ROWS], axis=2), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(memory[:, [1, 2, 4, 7]], 0)

    clustered = jax.jit(DEEPCLUSTER.epoch_start)(
        jax.random.key(2), {**variables, "state": update.state}
    )
    assigned = np.asarray(clustered["state"]["assignments"])
    prototypes = np.asarray(clustered["state"]["prototypes"], np.float64)
    np.testing.assert_array_equal(assigned[:, [1, 2, 4, 7]], -1)
    for clustering_ in range(2):  # four images, four clusters: each image is its own
        assert sorted(assigned[clustering_, ROWS]) == [0, 1, 2, 3]
    _, (losses, _) = forward(DEEPCLUSTER)(clustered, 0.0)
    logs = np.log(softmax64(np.einsum("vbd,hkd->hvbk", memory[:, ROWS], prototypes) / 0.1))
    chosen = np.take_along_axis(logs, assigned[:, None, ROWS, None], axis=-1)
    np.testing.assert_allclose(losses, -chosen.mean(axis=(0, 1))[:, 0], rtol=1e-4)


@pytest.mark.parametrize(
    "method,shapes",
    [(DINO, [8, 8, 4, 4]), (SWAV, [8, 8, 4, 4]), (DEEPCLUSTER, [8, 8])],
    ids=["dino", "swav", "deepcluster"],
)
def test_views_have_their_sizes(method, shapes):
    views = jax.eval_shape(method.views, jax.random.key(0), jnp.zeros((8, 8, 3)))
    assert [view.shape for view in views] == [(size, size, 3) for size in shapes]


# --- Steps, also for test_methods_decorrelation.py --------------------------------------------

BATCH = {
    "images": RANDOM.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
    "indices": np.arange(8, dtype=np.int32),
    "rows": np.arange(8, dtype=np.int32),
}


@functools.cache
def compiled(method, learning_rate, layout):
    """The state before training and a step, with `noisy_views`."""
    encoder, method = tiny.encoder(), method_steps.plain(method)
    tx = optax.sgd(learning_rate, momentum=0.9)
    state = pretraining.init_state(jax.random.key(1), encoder, method, tx, num_images=8)
    step = pretraining.make_step(
        encoder, method, tx, axis_name=layout.axis_name,
        key=jax.random.key(2), total_steps=30, steps_per_epoch=1,
    )  # fmt: skip
    return layout.replicate(state), layout.compile(step)


def train(method, learning_rate, layout, num_steps):
    """The state and the metrics of each step."""
    state, step = compiled(method, learning_rate, layout)
    metrics = []
    for _ in range(num_steps):
        state, info = step(state, layout.put(BATCH))
        metrics.append(info)
    return jax.device_get((state, metrics))


def check_layouts(method, learning_rate, layout, *, tolerance=1e-4):
    """Asserts that two steps on a layout are those of one device."""
    ours, one = (
        train(method, learning_rate, where, 2) for where in (layout, Parallel.create(num_devices=1))
    )

    def close(ours, one):
        # Of an array's largest entry: gradients are sums in which large parts cancel.
        np.testing.assert_allclose(ours, one, atol=tolerance * np.abs(one).max() + 1e-5)

    jax.tree.map(close, ours, one)


def losses_of_training(method, learning_rate):
    """Losses of 30 steps; asserts that the features did not collapse."""
    state, metrics = train(method, learning_rate, Parallel.create(num_devices=1), 30)
    trained = pretraining.trained_encoder(tiny.encoder(), state.variables)
    features = trained(BATCH["images"].astype(np.float32) / 255).features
    assert float(pretraining.feature_std(features)) > 0.2
    return np.array([float(info["loss"]) for info in metrics])


METHODS = {
    "dino": (DINO.replace(local_crops=0), 0.1),
    "swav": (SWAV, 0.03),
    "deepcluster": (DEEPCLUSTER, 0.03),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_depend_on_the_devices(name):
    check_layouts(*METHODS[name], Parallel.create(num_devices=4))


def test_swav_does_not_depend_on_who_spreads_it():
    check_layouts(*METHODS["swav"], Parallel.create(num_devices=4, kind="shard_map"))


@pytest.mark.parametrize("name", ["swav", "deepcluster"])
def test_training_lowers_the_loss_without_collapse(name):
    losses = losses_of_training(*METHODS[name])
    assert losses[-5:].mean() < 0.8 * losses[1:6].mean(), losses


def test_dinos_student_learns_what_differs_between_images():
    # The loss starts low, while the center is not yet known and the teacher says one thing of all
    # images; once it is, a student that says one thing of all is at log(prototypes).
    losses = losses_of_training(*METHODS["dino"])
    assert losses[-5:].mean() < 0.8 * np.log(6), losses
