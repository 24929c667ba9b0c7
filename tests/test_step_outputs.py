"""What losses see, what is not computed because no loss looks at it, and the twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finetuning_steps import KEY, SmoothStep, assert_same, batches, run, tiny
from flax.traverse_util import flatten_dict
from tiny import encoder as tiny_encoder

from robust_ssl import attacks, losses, models, struct, threats
from robust_ssl.finetuning import init_state, make_step, mixed_losses
from robust_ssl.optimizers import layer_rates, layerwise_optimizer
from robust_ssl.parallel import Parallel

# --------------------------------------------------------- what losses see, and what nobody reads


@functools.cache
def tapped():
    return models.classifier(jax.random.key(1), tiny_encoder(), 3, head="linear")


def test_a_loss_sees_the_taps_of_clean_attacked_and_pretrained_images():
    net, batch = tapped(), batches(1)[0]
    seen = {
        "clean": lambda inputs: inputs.clean.taps["conv1"],
        "adversarial": lambda inputs: inputs.adversarial.taps["conv2"],
        "pretrained": lambda inputs: inputs.pretrained.taps["conv1"],
    }
    of_taps = {
        name: (lambda inputs, tap=tap: jnp.mean(tap(inputs), axis=(1, 2, 3)), weight)
        for (name, tap), weight in zip(seen.items(), (1.0, 2.0, 4.0), strict=True)
    }
    state, (metrics,) = run(
        net, optax.sgd(0.1), [batch], losses=of_taps, attack=Darker(), pretrained=net.encoder
    )
    images = jnp.asarray(batch["images"] / np.float32(255))

    def loss(params):
        model = net.with_variables({**net.variables, "params": params})
        first = model.apply_train(images, key=KEY)[0].taps["conv1"].mean()
        second = model.apply_train(images / 2, key=KEY)[0].taps["conv2"].mean()
        return first + 2 * second, (first, second)

    gradient, (first, second) = jax.grad(loss, has_aux=True)(net.variables["params"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, net.variables["params"], gradient)
    assert_same(state.variables["params"], expected, 1e-6)
    held = net.encoder(images).taps["conv1"].mean()
    for name, value in zip(seen, (first, second, held), strict=True):
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert set(metrics) == {*seen, "loss", "gradient_norm", "skipped"}  # nobody looked at logits


CLEAN = {"clean": (losses.clean_cross_entropy, 1.0)}
ATTACKED = {"attacked": (losses.adversarial_cross_entropy, 1.0)}


@struct.dataclass
class Darker:
    def __call__(self, key, model, image, label=None):
        return image / 2


def test_of_a_tap_that_is_not_there_the_loss_is_named():
    mine = {"mine": (functools.partial(losses.feature_drift, layers=("conv9",)), 1.0)}
    with pytest.raises(ValueError, match=r"conv9.*conv1") as caught:
        make_step(tapped(), optax.sgd(0.1), losses=mine, key=KEY, attack=Darker(),
                  pretrained=tapped().encoder)  # fmt: skip
    assert "the loss 'mine'" in " ".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda inputs: inputs.clean.taps["conv9"].mean(), KeyError),
        (lambda inputs: [inputs.labels][1], IndexError),
        (lambda inputs: inputs.labels * (1 / 0), ZeroDivisionError),
        (lambda inputs: float(inputs.clean.features.sum()), jax.errors.ConcretizationTypeError),
    ],
)
def test_a_loss_that_raises_is_named_whatever_it_raises(loss, kind):
    with pytest.raises(kind) as caught:
        make_step(tapped(), optax.sgd(0.1), losses={"mine": (loss, 1.0)}, key=KEY)
    assert "this happened in the loss 'mine'" in caught.value.__notes__


def test_what_a_recipe_does_not_give_a_loss_is_named_with_its_entry():
    near = lambda inputs: (inputs.clean.features - inputs.pretrained.features).sum(axis=1)  # noqa: E731
    with pytest.raises(AttributeError) as caught:
        make_step(tapped(), optax.sgd(0.1), losses={"near": (near, 1.0)}, key=KEY)
    notes = " ".join(caught.value.__notes__)
    assert "inputs.pretrained is None here" in notes and "compare_with_pretrained=True" in notes
    assert "inputs.adversarial" not in notes and "inputs.teacher" not in notes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losses": {"mine": (lambda inputs: inputs.labels, 1.0)}}, "must return floats.*int32"),
        (
            {"losses": {"mine": (lambda inputs: inputs.labels == 1, 1.0)}},
            "must return floats.*bool",
        ),
        ({"losses": {"mine": (losses.clean_cross_entropy, float("nan"))}}, "must be a number"),
        ({"ema": 1.5}, r"ema, the decay of an average, must be in \[0, 1\), got 1.5"),
    ],
)
def test_what_cannot_train_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make_step(tapped(), optax.sgd(0.1), **{"losses": CLEAN, "key": KEY, **options})


def test_an_average_that_the_state_does_not_keep_is_asked_for():
    net, tx = tapped(), optax.sgd(0.1)
    step = make_step(net, tx, losses=CLEAN, key=KEY, ema=0.9)
    with pytest.raises(ValueError, match=r"init_state\(\.\.\., average=True\)"):
        jax.eval_shape(step, init_state(net, tx), batches(1)[0])


def test_a_compiled_loss_reads_what_it_looks_at():
    compiled = {"clean": (jax.jit(losses.clean_cross_entropy), 1.0)}
    step = make_step(tapped(), optax.sgd(0.1), losses=compiled, key=KEY, attack=Darker())
    assert step.passes == 1
    twice = {"clean": (jax.jit(jax.jit(losses.adversarial_cross_entropy)), 1.0)}
    step = make_step(tapped(), optax.sgd(0.1), losses=twice, key=KEY, attack=Darker())
    assert step.passes == 1


def operations(of_losses, **arguments):
    """Floating-point operations of the compiled step."""
    net, tx = tapped(), optax.sgd(0.1)
    step = make_step(net, tx, losses=of_losses, key=KEY, attack=Darker(), **arguments)
    state = init_state(net, tx)
    lowered = jax.jit(step.function).lower(state, batches(1)[0], step.settings)
    return lowered.compile().cost_analysis()["flops"]


def test_what_no_loss_reads_is_neither_computed_nor_logged():
    _, (metrics,) = run(tapped(), optax.sgd(0.1), batches(1), losses=CLEAN, attack=SmoothStep())
    assert "clean_accuracy" in metrics and "robust_accuracy" not in metrics
    shallow = {"tap": (lambda inputs: jnp.mean(inputs.adversarial.taps["conv1"], (1, 2, 3)), 1.0)}
    clean, attacked = operations(CLEAN), operations(CLEAN | ATTACKED)
    assert attacked > 1.6 * clean  # two passes and not one
    assert clean < operations(CLEAN | shallow) < 0.85 * attacked
    # An encoder in evaluation mode hands no gradient on to weights that are frozen.
    frozen = [f"{p}" for p in flatten_dict(tapped().variables["params"], sep="/") if p[0] == "e"]
    probe = operations(CLEAN, frozen=frozen, batch_statistics="frozen")
    assert probe < 0.6 * clean


def test_runs_that_differ_in_weight_budget_and_rate_share_one_program():
    net = tapped()

    def program(weight, epsilon, step_size, rate, seed):
        rates = layer_rates(net.variables["params"], {"encoder/**": rate, "head/**": 0.1})
        tx = layerwise_optimizer(net.variables["params"], rates)
        attack = attacks.PGD(threats.Linf(epsilon), step_size=step_size, num_steps=2)
        step = make_step(
            net, tx, key=jax.random.key(seed), attack=attack, pretrained=net.encoder,
            losses={"attacked": (losses.adversarial_cross_entropy, weight)},
        )  # fmt: skip
        state = init_state(net, tx)
        return jax.jit(step.function).lower(state, batches(1)[0], step.settings).as_text()

    first = program(0.5, 8 / 255, 2 / 255, 1e-2, 0)
    assert program(6, 4 / 255, 1 / 255, 1e-3, 1) == first


# -------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("attack", [None, Darker()])
def test_twins_are_the_hand_written_two_branches(attack):
    start = tiny("linear")
    # The running statistics are others than those of the start, which the second branch keeps.
    (state, _), batch = run(start, optax.sgd(0.1), batches(1), losses=mixed_losses(0.0)), batches(2)
    tx, batch = optax.sgd(0.1), batch[1]
    which = losses.clean_cross_entropy if attack is None else losses.adversarial_cross_entropy
    step = make_step(
        start, tx, losses={"one": (which, 1.0)}, key=KEY, attack=attack, batch_statistics="twins"
    )
    after, metrics = jax.jit(step)(state, batch)
    images = jnp.asarray(batch["images"] / np.float32(255)) / (1 if attack is None else 2)

    def loss(params):
        moved = start.with_variables({**state.variables, "params": params})
        held = start.with_variables({**start.variables, "params": params})
        adaptive, statistics = moved.apply_train(images[::2], key=KEY)
        logits = jnp.zeros((8, 3)).at[::2].set(adaptive.logits)
        logits = logits.at[1::2].set(held(images[1::2]).logits)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return each.mean(), statistics

    params = state.variables["params"]
    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    np.testing.assert_allclose(metrics["one"], value, rtol=1e-5)
    assert_same(after.variables["params"], expected, 1e-6)
    assert_same(after.variables["batch_stats"], statistics, 1e-6)


def test_only_the_adaptive_half_moves_the_statistics_of_twins():
    net, (batch,) = tiny("linear"), batches(1)
    other = batch["images"].copy()
    other[1::2] = 255 - other[1::2]
    variables = [
        run(net, optax.sgd(0.1), [{**batch, "images": images}], losses=mixed_losses(0.0),
            batch_statistics="twins")[0].variables
        for images in (batch["images"], other)
    ]  # fmt: skip
    assert_same(variables[0]["batch_stats"], variables[1]["batch_stats"], 0)
    kernel = "encoder", "conv2", "kernel"
    assert (
        flatten_dict(variables[0]["params"])[kernel] != flatten_dict(variables[1]["params"])[kernel]
    ).any()


@pytest.mark.parametrize("devices", [1, 4])
def test_twins_of_an_odd_number_of_images_are_refused(devices):
    parallel = Parallel.create(num_devices=devices)
    with pytest.raises(ValueError, match="each device needs an even number of images, got 3"):
        run(tiny("linear"), optax.sgd(0.1), batches(1, size=3 * devices), parallel=parallel,
            losses=mixed_losses(0.0), batch_statistics="twins")  # fmt: skip


def test_twins_of_an_encoder_without_batch_norm_are_refused():
    net = tiny("linear")
    without = net.encoder.replace(variables={"params": net.encoder.variables["params"]})
    with pytest.raises(ValueError, match="this encoder has none"):
        make_step(net.replace(encoder=without), optax.sgd(0.1), key=KEY,
                  losses=mixed_losses(0.0), batch_statistics="twins")  # fmt: skip


def test_a_block_can_be_named_by_its_place():
    encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
    net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
    by_place, by_name = (
        functools.partial(losses.feature_drift, layers=(layer,)) for layer in (1, "stage1/block2")
    )
    values = []
    for drift in (by_place, by_name):
        step = make_step(
            net,
            optax.sgd(0.1),
            losses={"drift": (drift, 1.0)},
            key=KEY,
            attack=SmoothStep(),
            pretrained=encoder,
        )
        _, metrics = jax.jit(step)(init_state(net, optax.sgd(0.1)), batches(1)[0])
        assert set(metrics) == {"drift", "loss", "gradient_norm", "skipped"}
        values.append(float(metrics["drift"]))
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] > 0
