import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finetuning_steps import KEY, SmoothStep, assert_same, batches, run, tiny
from flax.traverse_util import flatten_dict

from robust_ssl import losses, struct
from robust_ssl.finetuning import guard, init_state, interpolate, make_step, mixed_losses
from robust_ssl.optimizers import frozen_paths, layer_rates, layerwise_optimizer
from robust_ssl.optimizers.finite import raise_if_stuck
from robust_ssl.parallel import Parallel
from robust_ssl.types import LossInputs

FLIP = dict(augment=lambda key, x: jnp.where(jax.random.bernoulli(key), x, x[:, ::-1]))
EVERYTHING = dict(
    losses=mixed_losses(0.5, 5.0)
    | {
        "trades": (losses.trades_kl, 1.0),
        "features": ("robust_ssl.losses:genetic_regularization", 1.0),
        "preservation": (losses.feature_preservation, 0.1),
    },
    attack=SmoothStep(),
    batch_statistics="both",
    **FLIP,
)


@functools.cache
def on_one_device():
    net = tiny()
    return run(net, optax.sgd(0.1), batches(2), pretrained=net.encoder, **EVERYTHING)


@pytest.mark.parametrize(
    ("method", "num_devices"),
    [("pmap", 1), ("pmap", 2), ("pmap", 4), ("shard_map", 2), ("shard_map", 4), ("jit", 4)],
)
def test_the_result_does_not_depend_on_the_devices(method, num_devices):
    net = tiny()
    parallel = Parallel.create(num_devices=num_devices, kind=method)
    state, metrics = run(
        net, optax.sgd(0.1), batches(2), parallel=parallel, pretrained=net.encoder, **EVERYTHING
    )
    expected, expected_metrics = on_one_device()
    assert_same(state.variables, expected.variables, 1e-5)
    for info, expected_info in zip(metrics, expected_metrics, strict=True):
        assert info.keys() == expected_info.keys()
        for name in info:
            np.testing.assert_allclose(info[name], expected_info[name], rtol=1e-4, err_msg=name)


def test_something_moved_and_every_loss_is_logged_by_name():
    net = tiny()
    state, metrics = on_one_device()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.variables, net.variables)
    # A bias in front of a ReLU that is off for the whole batch may stay; weights never do.
    assert all(x for path, x in flatten_dict(moved, sep="/").items() if "kernel" in path)
    assert all(jax.tree.leaves(moved["batch_stats"]))
    assert set(metrics[0]) == {
        "clean_cross_entropy", "adversarial_cross_entropy", "genetic_regularization", "trades",
        "features", "preservation", "loss", "clean_accuracy", "robust_accuracy", "gradient_norm",
        "skipped",
    }  # fmt: skip
    assert int(state.step) == 2


def test_one_step_is_the_hand_written_update():
    net, batch, rate, weight = tiny("linear"), batches(1)[0], 0.1, 2.0
    attack = SmoothStep()
    state, (metrics,) = run(
        net, optax.sgd(rate), [batch], losses=mixed_losses(0.25, weight), attack=attack
    )
    images, labels = jnp.asarray(batch["images"] / np.float32(255)), batch["labels"]
    step_key, train_key = jax.random.split(jax.random.fold_in(KEY, 0))
    attack_key = jax.random.split(step_key)[1]
    adversarial = jnp.stack(
        [attack(jax.random.fold_in(attack_key, i), net, x, y)
         for i, (x, y) in enumerate(zip(images, labels, strict=True))]
    )  # fmt: skip

    def loss(params):
        model = net.with_variables({**net.variables, "params": params})
        clean, statistics = model.apply_train(images, key=train_key)
        attacked, _ = model.apply_train(adversarial, key=train_key)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        regularizer = losses.genetic_regularization(
            LossInputs(labels=jnp.asarray(labels), clean=clean, adversarial=attacked)
        )
        total = (
            0.75 * cross_entropy(clean.logits, labels).mean()
            + 0.25 * cross_entropy(attacked.logits, labels).mean()
            + weight * regularizer.mean()
        )
        return total, statistics

    params = net.variables["params"]
    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    expected = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    assert_same(state.variables["params"], expected, 1e-6)
    assert_same(state.variables["batch_stats"], statistics, 1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)


def test_frozen_layers_are_bit_equal_after_ten_steps_with_decay_and_statistics():
    net = tiny()
    params = net.variables["params"]
    rates = layer_rates(
        params, {"**": 1e-2, "encoder/*1/**": "freeze", "head/output/bias": "freeze"}
    )
    tx = layerwise_optimizer(params, rates)  # with weight decay
    state, _ = run(net, tx, batches(10), losses=mixed_losses(0.0), frozen=frozen_paths(rates))
    new, old = flatten_dict(state.variables, sep="/"), flatten_dict(net.variables, sep="/")
    for path, leaf in old.items():
        same = np.asarray(leaf).tobytes() == new[path].tobytes()
        frozen = "1/" in path.split("encoder/")[-1] and "encoder" in path
        assert same == (frozen or path.endswith("output/bias")), path


def test_a_frozen_encoder_in_evaluation_mode_keeps_its_features():
    net = tiny("linear")
    rates = layer_rates(net.variables["params"], {"encoder/**": "freeze", "head/**": 0.1})
    state, _ = run(
        net,
        layerwise_optimizer(net.variables["params"], rates, optax.sgd),
        batches(2),
        losses=mixed_losses(0.0),
        batch_statistics="frozen",
        frozen=frozen_paths(rates),
    )
    for old, new in zip(
        jax.tree.leaves(net.encoder.variables),
        jax.tree.leaves(net.with_variables(state.variables).encoder.variables),
        strict=True,
    ):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert (state.variables["params"]["head"]["linear"]["kernel"]
            != net.variables["params"]["head"]["linear"]["kernel"]).all()  # fmt: skip


@pytest.mark.parametrize("which", ["clean", "adversarial"])
def test_statistics_follow_the_images_that_are_named(which):
    net = tiny("linear")
    images = jnp.full((4, 8, 8, 3), 0.25).at[:, ::2].set(0.5)
    batch = {"images": images, "labels": jnp.zeros(4, jnp.int32), "indices": jnp.arange(4)}
    brighter = Brighter()
    state, _ = run(
        net, optax.sgd(0.0), [batch], losses=mixed_losses(1.0), attack=brighter,
        batch_statistics=which,
    )  # fmt: skip
    seen = images if which == "clean" else images + 0.25
    _, expected = net.encoder.apply_train(seen)
    assert_same(state.variables["batch_stats"]["encoder"], expected, 1e-6)


@struct.dataclass
class Brighter:
    def __call__(self, key, model, image, label=None):
        return image + 0.25


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    net, steps = tiny("linear"), batches(4)
    poisoned = [{**b, "images": b["images"].astype(np.float32) / 255} for b in steps]
    for i in (1, 2):
        poisoned[i]["images"][0, 0, 0, 0] = np.nan
    tx = optax.adam(0.1)
    state, metrics = run(net, tx, poisoned, losses=mixed_losses(0.0))
    assert [m["skipped"] for m in metrics] == [0, 1, 1, 0]
    assert int(state.step) == 4 and int(state.counters["skipped"]) == 2
    assert int(state.counters["skipped_in_a_row"]) == 0
    # The two good batches alone give the same weights, statistics and optimizer state.
    expected, _ = run(net, tx, [poisoned[0], poisoned[3]], losses=mixed_losses(0.0))
    assert_same(state.variables, expected.variables, 1e-6)
    assert int(state.opt_state[0].count) == int(expected.opt_state[0].count) == 2
    stuck, _ = run(net, tx, poisoned[1:3], losses=mixed_losses(0.0))
    raise_if_stuck(stuck, limit=3)
    with pytest.raises(FloatingPointError, match="the last 2 updates up to step 2"):
        raise_if_stuck(stuck, limit=2)


def test_a_long_training_is_not_skipped_because_of_its_count():
    net, tx = tiny("linear"), optax.adam(1e-3)
    step = jax.jit(make_step(net, tx, losses=mixed_losses(0.0), key=KEY))
    state = init_state(net, tx)
    moments = state.opt_state[0]._replace(count=jnp.array(50_000, jnp.int32))  # squared: overflows
    _, metrics = step(state.replace(opt_state=(moments, *state.opt_state[1:])), batches(1)[0])
    assert float(metrics["skipped"]) == 0


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda inputs: jnp.mean(losses.clean_cross_entropy(inputs)), r"\(\)"),
        (lambda inputs: inputs.clean.logits, r"\(8, 3\)"),
    ],
)
def test_a_loss_that_is_not_per_image_is_an_error_before_the_first_step(loss, shape):
    with pytest.raises(
        ValueError, match=rf"'mine' must return .*\(8,\), but returned shape {shape}"
    ):
        make_step(tiny(), optax.sgd(0.1), losses={"mine": (loss, 1.0)}, key=KEY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(losses={}), "losses is empty"),
        (dict(losses=mixed_losses(0.5)), "give the step an attack"),
        (dict(losses=mixed_losses(0.0), batch_statistics="all"), "batch_statistics must be"),
        (dict(losses=mixed_losses(0.0), batch_statistics="both"), "needs an attack"),
        (dict(losses={"x": ("robust_ssl.losses:tades_kl", 1.0)}), "did you mean trades_kl"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_step(tiny(), optax.sgd(0.1), key=KEY, **arguments)


@pytest.mark.parametrize(
    "name", ["step", "epoch", "loss", "gradient_norm", "clean_accuracy", "validation_mine"]
)
def test_a_loss_is_not_named_as_what_is_logged_besides(name):
    losses = {name: ("robust_ssl.losses:clean_cross_entropy", 1.0)}
    with pytest.raises(ValueError, match=f"losses has '{name}'.*such as my_{name}"):
        make_step(tiny(), optax.sgd(0.1), losses=losses, key=KEY)


@pytest.mark.parametrize("adv_ratio", [-0.1, 1.1, float("nan")])
def test_an_adv_ratio_outside_the_unit_interval_is_an_error(adv_ratio):
    with pytest.raises(ValueError, match="adv_ratio must be in"):
        mixed_losses(adv_ratio)


def test_the_first_state_may_be_donated_without_losing_the_classifier():
    net, parallel = tiny("linear"), Parallel.create(num_devices=2)
    tx = optax.sgd(0.1)
    step = make_step(net, tx, losses=mixed_losses(0), key=KEY, axis_name=parallel.axis_name)
    state, _ = parallel.compile(step, donate=True)(init_state(net, tx), parallel.put(batches(1)[0]))
    assert int(state.step) == 1
    assert np.isfinite(jax.tree.leaves(net.variables)[0]).all()


def test_interpolation_has_exact_ends_and_leaves_equal_leaves_alone():
    random = np.random.default_rng(0)
    a = {"params": {"x": jnp.asarray(random.normal(size=50)), "same": jnp.full(3, 0.1)}}
    b = {"params": {"x": jnp.asarray(random.normal(size=50)), "same": jnp.full(3, 0.1)}}
    for alpha, end in ((0.0, a), (1.0, b)):
        assert_same(interpolate(a, b, alpha), end, 0)
    middle = interpolate(a, b, 0.3)["params"]
    np.testing.assert_allclose(
        middle["x"], 0.7 * a["params"]["x"] + 0.3 * b["params"]["x"], rtol=1e-5
    )
    assert (middle["same"] == a["params"]["same"]).all()
    with pytest.raises(ValueError, match="differ in structure"):
        interpolate(a, {"params": {"x": a["params"]["x"]}}, 0.5)


def test_the_guard_stops_at_the_largest_alpha_within_the_tolerance():
    here, there = {"params": jnp.zeros(2)}, {"params": jnp.ones(2)}

    def evaluate(variables):
        alpha = float(variables["params"][0])
        return 0.5 + 0.3 * alpha, 0.6 - 0.1 * alpha**2

    guarded = guard(here, there, evaluate, tolerance=0.0251, alphas=(1.0, 0.75, 0.5, 0.25))
    assert guarded.alpha == 0.5 and guarded.variables["params"].tolist() == [0.5, 0.5]
    assert [point.alpha for point in guarded.curve] == [1.0, 0.75, 0.5, 0.0]  # and not 0.25
    np.testing.assert_allclose(guarded.curve[0][1:], (0.8, 0.5))
    assert guard(here, there, evaluate, tolerance=0.2).alpha == 1.0
    assert guard(here, there, evaluate, tolerance=0.0, alphas=(1.0, 0.5)).alpha == 0.0
    with pytest.raises(ValueError, match="alphas in"):
        guard(here, there, evaluate, alphas=(1.5,))


@pytest.mark.parametrize(("images", "before", "after"), [(100, 10, 9), (200, 20, 18), (300, 4, 1)])
def test_a_mixture_that_loses_just_the_tolerance_is_within_it(images, before, after):
    here, there = {"params": jnp.zeros(2)}, {"params": jnp.ones(2)}

    def evaluate(variables):
        return 0.5, (after if float(variables["params"][0]) else before) / images

    assert guard(here, there, evaluate, tolerance=0.01, alphas=(1.0,)).alpha == 1.0
