"""Contrastive pre-training: the loss in closed form, honest views, one result on any layout."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import method_steps
import numpy as np
import optax
import pytest
import tiny

from robust_ssl import data, experiment, load_encoder, models, parallel, pretraining, struct
from robust_ssl.experiment import loop, pretrain, sections
from robust_ssl.parallel import Parallel
from robust_ssl.pretraining import augmentation
from robust_ssl.progress import Progress
from robust_ssl.stopping import Stopped
from robust_ssl.workdir import ConfigChangedError, fingerprint

RANDOM = np.random.default_rng(0)
FIRST, SECOND = (RANDOM.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
NOISE = RANDOM.uniform(size=(8, 8, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(3), 64)

nt_xent = jax.jit(pretraining.nt_xent, static_argnames="temperature")


# --- NT-Xent ----------------------------------------------------------------------------------


def nt_xent_float64(first, second, temperature):
    """Eq. 1 of the paper, pair by pair."""
    both = np.concatenate([first, second]).astype(np.float64)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    n, losses = len(first), []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        terms = [np.exp(both[i] @ both[k] / temperature) for k in range(2 * n) if k != i]
        losses.append(-both[i] @ both[partner] / temperature + np.log(np.sum(terms)))
    return (np.array(losses[:n]) + np.array(losses[n:])) / 2


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_projections_leave_a_guess_among_all_others(n):
    ones = np.ones((n, 3), np.float32)
    losses = nt_xent(ones, 5 * ones, temperature=0.1)
    np.testing.assert_allclose(losses, np.full(n, np.log(2 * n - 1)), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_papers_formula(temperature):
    losses = nt_xent(FIRST, SECOND, temperature=temperature)
    assert losses.shape == (6,)
    expected = nt_xent_float64(FIRST, SECOND, temperature)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_nt_xent_is_optax_ntxent():
    labels = np.concatenate([np.arange(6), np.arange(6)])
    theirs = jax.jit(lambda both: optax.losses.ntxent(both, labels, temperature=0.2))
    with jax.numpy_rank_promotion("allow"):  # inside optax
        expected = theirs(np.concatenate([FIRST, SECOND]))
    np.testing.assert_allclose(np.mean(nt_xent(FIRST, SECOND)), expected, rtol=2e-5)


def test_nt_xent_sees_directions_only_and_either_view_first():
    losses = nt_xent(FIRST, SECOND)
    np.testing.assert_allclose(nt_xent(3 * FIRST, 0.1 * SECOND), losses, rtol=1e-5)
    np.testing.assert_allclose(nt_xent(SECOND, FIRST), losses, rtol=1e-5)


def test_gradients_are_finite_at_zero_projections_and_at_equal_ones():
    gradient = jax.jit(jax.grad(lambda views: jnp.mean(nt_xent(*views))))
    zeros = np.zeros_like(FIRST)
    for views in ((zeros, zeros), (FIRST, zeros), (FIRST, FIRST)):
        assert all(np.isfinite(leaf).all() for leaf in gradient(views))


def test_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError):
        nt_xent(FIRST, SECOND[:5])
    with pytest.raises(AssertionError):
        nt_xent(FIRST[0], SECOND[0])


# --- Views ------------------------------------------------------------------------------------

VIEWS = {
    "crop": augmentation.random_resized_crop,
    "colors": augmentation.color_jitter,
    "simclr": augmentation.View(),
    "all": augmentation.View(blur=0.5, solarise=0.5),
    "flip_and_shift": augmentation.flip_and_shift,
    "shift_only": augmentation.shift_only,
}


@functools.cache
def over_keys(name):
    return jax.jit(jax.vmap(VIEWS[name], (0, None)))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_an_image_and_a_function_of_its_key(name):
    extremes = np.round(NOISE)  # blacks and whites, where colors overflow first
    views = over_keys(name)(KEYS, extremes)
    assert views.shape == (64, 8, 8, 3)
    assert float(views.min()) >= -1e-6 and float(views.max()) <= 1 + 1e-6
    again = over_keys(name)(KEYS[::-1], extremes)[::-1]  # other neighbours, the same keys
    np.testing.assert_array_equal(views, again)
    assert len({np.asarray(view).tobytes() for view in views}) > 16


def test_views_of_zero_strength_are_the_image():
    key = KEYS[0]
    whole = augmentation.random_resized_crop(key, NOISE, scale=(1.0, 1.0), log_ratio=0.0)
    np.testing.assert_allclose(whole, NOISE, atol=1e-6)
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    np.testing.assert_allclose(augmentation.color_jitter(key, NOISE, **none), NOISE, atol=1e-5)
    np.testing.assert_array_equal(augmentation.shift_only(key, NOISE, shift=0), NOISE)


def test_a_crop_of_one_color_is_that_color_up_to_the_border():
    color = np.broadcast_to(np.float32([0.2, 0.5, 0.9]), (8, 8, 3))
    views = over_keys("crop")(KEYS, color)
    np.testing.assert_allclose(views, np.broadcast_to(color, views.shape), atol=1e-5)


def test_a_crop_has_the_area_and_the_shape_it_says():
    # On a ramp along each axis, a crop is a ramp whose slope is the crop's share of that axis.
    size = 32
    across, down = np.meshgrid(np.arange(size) / size, np.arange(size) / size)
    ramps = np.stack([down, across, 0 * across], axis=-1).astype(np.float32)
    crop = functools.partial(augmentation.random_resized_crop, scale=(0.2, 0.5))
    views = np.asarray(jax.jit(jax.vmap(crop, (0, None)))(KEYS, ramps))
    middle = size // 2
    height = (views[:, middle + 4, middle, 0] - views[:, middle - 4, middle, 0]) * size / 8
    width = (views[:, middle, middle + 4, 1] - views[:, middle, middle - 4, 1]) * size / 8
    area, ratio = height * width, width / height
    assert 0.2 - 1e-3 <= area.min() < 0.3 and 0.4 < area.max() <= 0.5 + 1e-3
    assert 0.75 - 1e-2 <= ratio.min() < 0.85 and 1.2 < ratio.max() <= 4 / 3 + 1e-2
    corner = views[:, 0, 0, :2]  # where it begins, which differs from crop to crop
    assert corner.std(axis=0).min() > 0.05


def test_the_smallest_crop_of_all_views_can_be_set_at_once():
    whole = {"jitter": 0.0, "gray": 0.0, "flip": 0.0}
    ways = (augmentation.View(**whole), augmentation.View(**whole, solarise=1.0))
    first, second = augmentation.random_views(KEYS[0], NOISE, ways, min_scale=1.0)
    # The whole area, but still of a random shape: nearer to the image than a crop of a fifth.
    np.testing.assert_allclose(first.mean(), NOISE.mean(), atol=0.05)
    crop, _ = augmentation.random_views(KEYS[0], NOISE, ways, min_scale=0.2)
    assert not np.array_equal(first, crop)
    assert float(second.max()) <= 0.5  # solarised: the bright half is inverted


def test_half_of_the_images_are_mirrored():
    flip = jax.jit(jax.vmap(functools.partial(augmentation.flip_and_shift, shift=0), (0, None)))
    views = np.asarray(flip(jax.random.split(jax.random.key(0), 400), NOISE))
    unchanged = (views == NOISE).all(axis=(1, 2, 3))
    mirrored = (views == NOISE[:, ::-1]).all(axis=(1, 2, 3))
    assert (unchanged ^ mirrored).all()
    assert 160 < mirrored.sum() < 240  # four standard deviations


def test_colors_do_not_touch_what_has_none():
    gray = np.broadcast_to(NOISE[..., :1], NOISE.shape)
    turned = augmentation.color_jitter(KEYS[1], gray, brightness=0.0, contrast=0.0)
    np.testing.assert_allclose(turned, gray, atol=1e-3)  # the grays' weights add up to 0.9999
    black = augmentation.color_jitter(KEYS[1], np.zeros_like(NOISE))
    np.testing.assert_array_equal(black, np.zeros_like(NOISE))


def test_a_fifth_of_the_views_is_gray():
    views = over_keys("simclr")(KEYS, NOISE)
    gray = (np.ptp(np.asarray(views), axis=-1) < 1e-6).all(axis=(1, 2))
    assert 3 <= gray.sum() <= 25  # 12.8 expected, deviation 3.2


# --- The step ---------------------------------------------------------------------------------

SIMCLR = pretraining.SimCLR(hidden=16, projection_dim=8)
METHOD = method_steps.plain_simclr()
TX = optax.sgd(0.1, momentum=0.9)
BATCH = {
    "images": RANDOM.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
    "indices": np.arange(8, dtype=np.int32),
    "rows": np.arange(8, dtype=np.int32),
}
STEPS = {"key": jax.random.key(2), "total_steps": 30, "steps_per_epoch": 1}


def two_steps(layout):
    encoder = tiny.encoder()
    state = pretraining.init_state(jax.random.key(1), encoder, METHOD, TX, num_images=8)
    step = layout.compile(
        pretraining.make_step(encoder, METHOD, TX, axis_name=layout.axis_name, **STEPS)
    )
    state, first = step(layout.replicate(state), layout.put(BATCH))
    state, second = step(state, layout.put(BATCH))
    return jax.device_get((state, first, second))


@functools.cache
def on_one_device():
    return two_steps(Parallel.create(num_devices=1))


@pytest.mark.parametrize(
    "devices,method", [(2, "pmap"), (4, "pmap"), (2, "shard_map"), (4, "shard_map"), (4, "jit")]
)
def test_a_step_does_not_depend_on_the_devices(devices, method):
    ours = two_steps(Parallel.create(num_devices=devices, kind=method))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, on_one_device()
    )


def test_a_step_moves_encoder_method_and_statistics():
    state, first, second = on_one_device()
    before = pretraining.init_state(jax.random.key(1), tiny.encoder(), METHOD, TX, num_images=8)
    for part in (("params", "encoder"), ("params", "method"), ("batch_stats", "encoder")):
        old, new = (functools.reduce(dict.get, part, s.variables) for s in (before, state))
        moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), old, new)
        assert sum(jax.tree.leaves(moved)) > 0, part
    assert int(state.step) == 2
    assert first["loss"] != second["loss"]  # fresh views, moved weights


def test_bfloat16_is_for_the_network_only():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        encoder = models.vit_tiny(jax.random.key(0), image_size=8, depth=1, dtype=dtype)
        state = pretraining.init_state(jax.random.key(1), encoder, METHOD, TX, num_images=8)
        step = jax.jit(pretraining.make_step(encoder, METHOD, TX, **STEPS))
        state, metrics = step(state, BATCH)
        types = {leaf.dtype.name for leaf in jax.tree.leaves(state.variables["params"])}
        assert types == {"float32"}
        assert metrics["loss"].dtype == jnp.float32
        losses[dtype] = float(metrics["loss"])
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_training_makes_two_views_agree():
    encoder, tx = tiny.encoder(), optax.adam(1e-2)
    state = pretraining.init_state(jax.random.key(1), encoder, SIMCLR, tx, num_images=8)
    step = jax.jit(pretraining.make_step(encoder, SIMCLR, tx, **STEPS))
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    trained = pretraining.trained_encoder(encoder, state.variables)
    assert trained(NOISE).features.shape == (8,)


def test_an_update_that_is_not_finite_is_left_out_and_counted():
    encoder, tx = tiny.encoder(), optax.sgd(np.inf)
    state = pretraining.init_state(jax.random.key(1), encoder, METHOD, tx, num_images=8)
    step = jax.jit(pretraining.make_step(encoder, METHOD, tx, **STEPS))
    after, metrics = step(state, BATCH)
    assert float(metrics["skipped"]) == 1.0 and np.isfinite(metrics["loss"])
    assert int(after.counters["skipped"]) == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.variables, state.variables)


# --- Accumulation, schedules, labels ----------------------------------------------------------


class Linear(nn.Module):
    """An encoder without batch norm: what an image gives does not depend on its neighbours."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(4)(x.reshape(len(x), -1)), {}


@struct.dataclass
class Recorder:
    """Pulls features to the label, remembers rows, counts epochs and updates."""

    needs_labels = True

    def init(self, key, encoder, num_images):
        counters = {"epochs": jnp.zeros(()), "updates": jnp.zeros(())}
        return {"state": {"seen": jnp.zeros(num_images), "progress": jnp.zeros(()), **counters}}

    def views(self, key, image):
        return (image,)

    def loss(self, variables, encoder, inputs):
        outputs, statistics = encoder.apply_train(inputs.views[0], axis_name=inputs.axis_name)
        features, rows, labels = parallel.gather(
            (outputs.features, inputs.rows, inputs.labels), inputs.axis_name
        )
        state = variables["state"]
        state = {**state, "seen": state["seen"].at[rows].add(1.0), "progress": inputs.progress}
        losses = jnp.sum((features - labels.reshape(-1, 1)) ** 2, axis=1)
        return losses, pretraining.MethodUpdate(statistics, state=state)

    def after_update(self, variables, encoder, progress):
        state = variables["state"]
        return {**variables, "state": {**state, "updates": state["updates"] + 1}}

    def epoch_start(self, key, variables):
        state = variables["state"]
        return {**variables, "state": {**state, "epochs": state["epochs"] + 1}}


def recorded(devices, accumulate, method=None):
    tx, method = optax.sgd(1e-3), method or Recorder()
    layout, module = Parallel.create(num_devices=devices), Linear()
    encoder = tiny.encoder().replace(
        module=module, variables=module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))), dim=4
    )
    state = pretraining.init_state(jax.random.key(1), encoder, method, tx, num_images=9)
    options = {"total_steps": 6, "steps_per_epoch": 2, "accumulate": accumulate}
    step = layout.compile(
        pretraining.make_step(
            encoder, method, tx, key=jax.random.key(2), axis_name=layout.axis_name, **options
        )
    )
    batch = {**BATCH, "rows": BATCH["rows"] + 1, "labels": np.arange(8, dtype=np.int32) % 3}
    state = layout.replicate(state)
    for _ in range(3):
        state, metrics = step(state, layout.put(batch))
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("devices,accumulate", [(1, 2), (2, 2), (2, 4)])
def test_accumulated_gradients_are_those_of_the_whole_batch(devices, accumulate):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        recorded(devices, accumulate),
        recorded(1, 1),
    )


def test_a_methods_state_sees_rows_epochs_updates_and_progress():
    state = recorded(1, 1)[0].variables["state"]
    np.testing.assert_array_equal(state["seen"], [0] + [3] * 8)
    assert (state["epochs"], state["updates"], state["progress"]) == (2, 3, np.float32(2 / 6))


def test_a_batch_that_accumulation_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="accumulate=3 does not divide a device's 8 images"):
        recorded(1, 3)


def test_a_method_that_loses_its_state_is_told():
    class Forgetful(Recorder):
        def loss(self, variables, encoder, inputs):
            losses, update = super().loss(variables, encoder, inputs)
            return losses, update.replace(state={})

    encoder = tiny.encoder()
    state = pretraining.init_state(jax.random.key(1), encoder, Forgetful(), TX, num_images=9)
    step = pretraining.make_step(encoder, Forgetful(), TX, **STEPS)
    with pytest.raises(ValueError, match="state shaped as its init made them"):
        jax.eval_shape(step, state, {**BATCH, "labels": np.zeros(8, np.int32)})


# --- Monitoring -------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_feature_std_is_one_for_even_directions_and_zero_for_collapse(dim):
    even = np.concatenate([np.eye(dim), -np.eye(dim)]).astype(np.float32)
    np.testing.assert_allclose(pretraining.feature_std(7 * even), 1.0, rtol=1e-6)
    collapsed = np.tile(RANDOM.normal(size=(1, dim)), (9, 1)).astype(np.float32)
    assert float(pretraining.feature_std(collapsed)) < 1e-6
    assert float(pretraining.feature_std(np.zeros((4, dim), np.float32))) == 0.0


def test_effective_rank_counts_directions():
    even = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    np.testing.assert_allclose(pretraining.effective_rank(even), 4.0, rtol=1e-5)
    np.testing.assert_allclose(pretraining.effective_rank(even + 3), 4.0, rtol=1e-5)  # centered
    line = np.outer(np.arange(5.0), np.ones(3)).astype(np.float32)
    np.testing.assert_allclose(pretraining.effective_rank(line), 1.0, rtol=1e-3)
    np.testing.assert_allclose(pretraining.effective_rank(np.ones((5, 3), np.float32)), 1.0)
    features = RANDOM.normal(size=(20, 6)).astype(np.float32)
    values = np.linalg.svd(features.astype(np.float64) - features.mean(0), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-np.sum(shares * np.log(shares)))
    np.testing.assert_allclose(pretraining.effective_rank(features), expected, rtol=1e-5)


def blobs(count, seed):
    random, labels = np.random.default_rng(seed), np.arange(count) % 3
    centers = 4 * np.eye(3, 6)[labels]
    return (centers + 0.1 * random.normal(size=(count, 6))).astype(np.float32), labels


@pytest.mark.parametrize(
    "accuracy", [pretraining.knn_accuracy, pretraining.linear_accuracy], ids=["knn", "linear"]
)
def test_separable_features_are_told_apart(accuracy):
    train, (features, labels) = blobs(60, 0), blobs(31, 1)
    assert accuracy(*train, features, labels) == 1.0
    assert accuracy(*train, features, (labels + 1) % 3) == 0.0
    labels[:4] = (labels[:4] + 1) % 3  # four of 31 are now called something else
    assert accuracy(*train, features, labels) == pytest.approx(27 / 31)


def test_neighbours_weigh_by_likeness():
    bank = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    queries = (bank, np.array([0, 1, 1]), np.array([[2.0, 1.0]], np.float32), np.array([0]))
    assert pretraining.knn_accuracy(*queries, temperature=0.07) == 1.0  # the nearest one
    assert pretraining.knn_accuracy(*queries, temperature=100.0) == 0.0  # the many
    assert pretraining.knn_accuracy(*queries, temperature=100.0, neighbours=1) == 1.0


def test_knn_counts_a_short_last_chunk_once():
    train, queries = blobs(60, 0), blobs(31, 1)
    chunks = {pretraining.knn_accuracy(*train, *queries, chunk=size) for size in (7, 31, 500)}
    assert chunks == {1.0}


# --- The stage, with a method of one's own ----------------------------------------------------

MINE = '''
import jax, jax.numpy as jnp
from robust_ssl import struct
from robust_ssl.pretraining import MethodUpdate

@struct.dataclass
class Mine:
    """Two noisy copies have the same features, in directions that are spread."""
    noise: float = struct.field(pytree_node=False, default=0.1)

    def init(self, key, encoder, num_images):
        return {"params": {"scale": jnp.ones(())}}

    def views(self, key, image):
        return image, jnp.clip(image + self.noise * jax.random.normal(key, image.shape), 0, 1)

    def loss(self, variables, encoder, inputs):
        first, second = inputs.views
        clean, _ = encoder.apply_train(first, axis_name=inputs.axis_name)
        noisy, statistics = encoder.apply_train(second, axis_name=inputs.axis_name)
        scale = variables["params"]["scale"]
        losses = jnp.sum((scale * clean.features - noisy.features) ** 2, 1)
        return losses, MethodUpdate(statistics)
'''


def pretrain_config(**changes):
    return {
        "seed": 0,
        "stages": ["pretrain"],
        "pretrain": {
            "data": {"function": "tiny:images"},
            "encoder": {
                "function": "robust_ssl.models.vit:vit_tiny",
                "depth": 1,
                "image_size": 8,
                "name": "mine",
            },
            "method": "robust_ssl.pretraining:SimCLR",
            "batch_size": 16,
            "epochs": 2,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "warmup_epochs": 1,
            "weight_decay": 1e-4,
            "checkpoint_every": 3,
            "monitor": {"every_epochs": 1, "images": 32},
            **changes,
        },
    }


def test_a_method_from_a_users_file_pretrains_an_encoder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    name = f"{tmp_path}/mine.py:Mine"
    config = pretrain_config(method={"function": name, "noise": 0.2})
    config["pretrain"]["encoder"]["dtype"] = "bfloat16"
    layout = Parallel.create(num_devices=2)
    results = experiment.run(config, tmp_path / "run", parallel=layout, progress=Progress("quiet"))
    assert set(results["pretrain"]) == {
        *("knn_accuracy", "linear_accuracy", "random_knn_accuracy"),
    }
    encoder = load_encoder(tmp_path / "run" / "pretrain" / "encoder")
    assert encoder.name == "mine"
    assert (tmp_path / "run" / "pretrain" / "encoder" / "bom.cdx.json").is_file()
    assert encoder.module.dtype == jnp.float32  # what is attacked and scored

    manifest = json.loads((tmp_path / "run" / "pretrain" / "manifest.json").read_text())
    assert manifest["fingerprint"] == fingerprint(encoder.variables)
    pixels = tiny.images("test")[0][:5].astype(np.float32) / 255
    assert np.isfinite(encoder(pixels).features).all()

    # Later stages are of what was trained, and of nothing that the config says now.
    later = pretrain_config(method={"function": name, "noise": 0.3}, epochs=3)
    later |= {
        "stages": ["attack"],
        "suite": {"attacks": {"random_noise": "robust_ssl.attacks:RandomNoise"}},
        "surrogate": {"function": "tiny:images"},
    }
    with pytest.raises(
        ConfigChangedError, match=r"(?s)config\.epochs: 2 -> 3.*noise: 0\.2 -> 0\.3"
    ):
        experiment.run(later, tmp_path / "run", parallel=layout, progress=Progress("quiet"))

    lines = [line for line in _metrics(tmp_path / "run") if "knn_accuracy" in line]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"feature_std", "effective_rank", "loss", "gradient_norm"} <= lines[-1].keys()


def _metrics(workdir):
    text = (workdir / "pretrain" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("kind", ["pmap", "jit"])
def test_an_epoch_in_one_program_is_the_same_steps(tmp_path, kind):
    layout = Parallel.create(num_devices=2, kind=kind)
    finals = []
    for looped in (False, True):
        workdir = tmp_path / f"{looped}"
        config = pretrain_config(
            method="method_steps:plain_simclr",
            encoder={"function": "tiny:encoder"},
            loop_on_device=looped,
        )
        planned = experiment.plan(config)
        pretrain.pretrain(experiment.Context(planned, workdir, layout, Progress("quiet")))
        encoder = load_encoder(workdir / "pretrain" / "encoder", builder=tiny.encoder)
        finals.append(encoder.variables)
        steps = [line["step"] for line in _metrics(workdir)]
        assert steps == list(range(8))  # 64 images, batches of 16, two epochs
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *finals)


def test_features_that_collapse_are_warned_of(caplog, tmp_path):
    (tmp_path / "same.py").write_text(
        MINE.replace("jnp.sum((scale * clean", "0 * jnp.sum((scale * clean")
    )
    config = pretrain_config(
        method=f"{tmp_path}/same.py:Mine",
        epochs=1,
        warmup_epochs=0,
        weight_decay=0.0,
        learning_rate=1e-9,
    )
    config["pretrain"]["encoder"] = {"function": "tiny:constant"}
    layout = Parallel.create(num_devices=2)
    with caplog.at_level("WARNING", logger="robust_ssl"):
        experiment.run(config, tmp_path / "run", parallel=layout, progress=Progress("quiet"))
    assert "collapsed" in caplog.text


def stopped_and_resumed(config, workdir, steps, monkeypatch):
    layout, counter = Parallel.create(num_devices=2), iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_requested", lambda: next(counter) >= steps)
        with pytest.raises(Stopped, match=f"after step {steps} of 8"):
            experiment.run(config, workdir, parallel=layout, progress=Progress("quiet"))
    return experiment.run(config, workdir, parallel=layout, progress=Progress("quiet"))


@pytest.mark.parametrize("name,steps", [("MoCoV2Plus", 3), ("DeepClusterV2", 4)])
def test_a_resumed_method_remembers_what_it_knew(tmp_path, monkeypatch, name, steps):
    options = {
        "MoCoV2Plus": {"queue_size": 32},
        "DeepClusterV2": {"num_prototypes": 4, "num_clusterings": 1},  # stopped as an epoch ends
    }[name]
    config = pretrain_config(
        method={
            "function": f"robust_ssl.pretraining:{name}",
            **{"hidden": 16, "projection_dim": 8, **options},
        },
        encoder={"function": "tiny:encoder"},
    )
    config["pretrain"]["monitor"]["images"] = 8
    layout = Parallel.create(num_devices=2)
    whole = experiment.run(config, tmp_path / "whole", parallel=layout, progress=Progress("quiet"))
    parts = stopped_and_resumed(config, tmp_path / "parts", steps, monkeypatch)
    assert parts == whole
    assert _metrics(tmp_path / "parts") == _metrics(tmp_path / "whole")


def test_loops_on_the_devices_have_one_length():
    for every, epoch in ((200, 390), (2000, 195), (7, 390), (100, 100), (390, 390), (1, 5)):
        fitted = loop._fitting(every, epoch)
        stops, step = [], 0
        while step < 3 * epoch:
            stops.append(loop._next_stop(step, fitted, epoch) - step)
            step += stops[-1]
        assert len(set(stops)) == 1 and 1 <= fitted <= every, (every, epoch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"warmup_epochs": 2}, "a warm-up must end before the training"),
        ({"monitor": {"every_epochs": 0, "images": 8}}, "every_epochs must be a whole number"),
        ({"accumulate": 3}, "accumulate=3 does not divide"),
        ({"method": {"function": "robust_ssl.pretraining:NNCLR", "queue_size": 8}},
         "does not fit into a queue of 8"),
        ({"method": {"function": "robust_ssl.pretraining:SimCLR", "min_scale": 0.0}},
         "share in .0, 1. of the area|min_scale"),
        ({"method": {"function": "robust_ssl.pretraining:DINO", "local_crops": 1,
          "local_size": 4}}, "positions for images"),
        ({"method": {"function": "robust_ssl.pretraining:WMSE", "whitening_size": 5}},
         "whitening"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found_before_anything_is_written(tmp_path, changes, message):
    config = pretrain_config(**changes)
    layout = Parallel.create(num_devices=2)
    with pytest.raises(experiment.UsageError, match=message):
        experiment.run(config, tmp_path / "run", parallel=layout, progress=Progress("quiet"))
    assert not (tmp_path / "run" / "pretrain").exists()


def test_a_crops_shape_does_not_say_whether_it_is_mirrored():
    y, x = jnp.meshgrid(jnp.arange(32) / 32, jnp.arange(32) / 32, indexing="ij")
    image = jnp.stack([x, y, 0 * x], -1)
    keys = jax.random.split(jax.random.key(0), 1000)
    crops = jax.vmap(lambda key: pretraining.crop_and_flip(key, image, smallest=0.3))(keys)
    across = crops[:, 16, 20, 0] - crops[:, 16, 12, 0]
    down = crops[:, 20, 16, 1] - crops[:, 12, 16, 1]
    mirrored, wide = across < 0, jnp.abs(across) < down
    for share in (mirrored.mean(), (mirrored == wide).mean()):
        assert 0.44 < share < 0.56


def test_what_an_epoch_begins_with_stays_where_its_first_update_is_skipped():
    class Broken(Recorder):
        def loss(self, variables, encoder, inputs):
            losses, update = super().loss(variables, encoder, inputs)
            first = variables["state"]["epochs"] == 2
            return losses + jnp.where(first & (inputs.progress < 3 / 6), jnp.nan, 0), update

    state, _ = recorded(1, 1, Broken())
    assert int(state.counters["skipped"]) == 1
    seen = state.variables["state"]
    assert (seen["epochs"], seen["updates"]) == (2, 2)


@pytest.mark.parametrize("labelled", [True, False])
def test_images_without_labels_have_no_accuracy(labelled, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    labels = np.arange(12) % 3 if labelled else None
    sets = [data.from_arrays(images, labels, split=split) for split in ("train", "test")]
    encoder = tiny.encoder()
    one, monitor = Parallel.create(num_devices=1), sections.Monitor(every_epochs=1)
    found = pretrain._probe(encoder, *sets, one, linear=False)
    assert {*found} == ({"knn_accuracy"} if labelled else {"feature_std", "effective_rank"})
    monkeypatch.setattr(pretraining, "trained_encoder", lambda encoder, variables: encoder)
    logged = pretrain._monitor(encoder, *sets, monitor, one, 1, {})
    assert ("knn_accuracy" in logged) == labelled and logged["feature_std"] > 0
