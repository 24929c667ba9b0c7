"""What a step may have besides: an average of weights, a teacher, perturbations by image."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from finetuning_steps import KEY, assert_same, batches, tiny
from flax.traverse_util import flatten_dict
from tiny_recipes import LOSSES, ON_ADVERSARIAL, PGD_AT, context, final, go, manifest

from robust_ssl import attacks, experiment, losses, models, threats
from robust_ssl.experiment import costs, loop
from robust_ssl.finetuning import (
    ATTA,
    AVERAGE,
    COLLECTION,
    init_state,
    make_step,
    mixed_losses,
    served,
)
from robust_ssl.optimizers import frozen_paths, layer_rates, layerwise_optimizer
from robust_ssl.parallel import Parallel
from robust_ssl.stopping import Stopped
from robust_ssl.types import LossInputs, Outputs

slow = pytest.mark.slow
ON_ATTACKED = {"attacked": (losses.adversarial_cross_entropy, 1.0)}


@functools.cache
def net():
    return tiny("linear")


def trail(tx, steps, *, parallel=None, start=None, **arguments):
    """Every state of a training, the first among them."""
    parallel = parallel or Parallel.create(num_devices=1, kind="jit")
    step = make_step(net(), tx, key=KEY, axis_name=parallel.axis_name, **arguments)
    compiled = parallel.compile(step)
    states = [start or init_state(net(), tx, average="ema" in arguments)]
    for batch in steps:
        states.append(jax.device_get(compiled(states[-1], parallel.put(batch))[0]))
    return states


# ---------------------------------------------------------------------------------------- average


def test_the_average_is_its_closed_form_of_weights_and_statistics():
    decay = 0.75
    steps = [{**b, "images": b["images"].astype(np.float32) / 255} for b in batches(4)]
    steps[2]["images"][0, 0, 0, 0] = np.nan  # an update that is skipped, and the average waits
    states = trail(optax.sgd(0.1), steps, losses=mixed_losses(0.0), ema=decay)
    weights, expected = [], None
    for state in states:
        own = {name: tree for name, tree in state.variables.items() if name != AVERAGE}
        weights = {p: np.asarray(w, np.float64) for p, w in flatten_dict(own, sep="/").items()}
        if expected is None:
            expected = weights
        elif int(state.step) != 3:
            expected = {p: decay * a + (1 - decay) * weights[p] for p, a in expected.items()}
        average = flatten_dict(state.variables[AVERAGE], sep="/")
        assert average.keys() == expected.keys()
        for path, leaf in average.items():
            np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    assert [int(state.counters["skipped"]) for state in states] == [0, 0, 0, 1, 1]


def test_what_is_frozen_is_its_own_average_bit_by_bit():
    rates = layer_rates(net().variables["params"], {"**": "freeze", "head/**": 0.1})
    tx = layerwise_optimizer(net().variables["params"], rates, optax.sgd)
    *_, last = trail(tx, batches(3), losses=mixed_losses(0.0), ema=0.9,
                     batch_statistics="frozen", frozen=frozen_paths(rates))  # fmt: skip
    kept, start = (flatten_dict(v, sep="/") for v in (served(last.variables), net().variables))
    for path, leaf in start.items():
        assert (np.asarray(leaf).tobytes() == kept[path].tobytes()) == ("head" not in path), path


def test_what_is_served_has_neither_deltas_nor_the_last_weights():
    state = {"params": 1, "own": 2, "attack": {"deltas": 3}, "average": {"params": 4}}
    assert served(state) == {"params": 4, "own": 2}
    assert served({"params": 1, "attack": {"deltas": 3}}) == {"params": 1}


# ---------------------------------------------------------------------------------------- teacher


def outputs(seed, classes=4, size=5):
    logits = 3 * np.random.default_rng(seed).normal(size=(size, classes)).astype(np.float32)
    return Outputs(features=jnp.zeros((size, 2)), logits=jnp.asarray(logits))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("of", ["clean", "adversarial"])
def test_the_pull_to_a_teacher_is_its_closed_form(of):
    inputs = LossInputs(jnp.zeros(5, jnp.int32), outputs(0), outputs(1), teacher=outputs(2))
    student = np.asarray(getattr(inputs, of).logits, np.float64)
    teacher = np.asarray(inputs.teacher.logits, np.float64)
    p, q = softmax(teacher / 2), softmax(student / 2)
    divergence = 4 * (p * (np.log(p) - np.log(q))).sum(-1)
    np.testing.assert_allclose(
        losses.teacher_kl(inputs, of=of, temperature=2.0), divergence, rtol=1e-4
    )
    distance = ((student - teacher) ** 2).mean(-1)
    np.testing.assert_allclose(losses.teacher_distance(inputs, of=of), distance, rtol=1e-5)
    for loss in (losses.teacher_kl, losses.teacher_distance):
        gradient = jax.grad(lambda i, loss=loss: loss(i, of=of).sum(), allow_int=True)(inputs)
        assert not jnp.any(gradient.teacher.logits)  # a constant
        assert jnp.any(getattr(gradient, of).logits)


def test_without_a_teacher_the_pull_says_what_to_do():
    inputs = LossInputs(jnp.zeros(5, jnp.int32), outputs(0), outputs(1))
    with pytest.raises(ValueError, match=r'teacher logits: give .*"teacher"'):
        losses.teacher_kl(inputs)
    with pytest.raises(ValueError, match='of must be "clean" or "adversarial", got \'both\''):
        losses.teacher_kl(inputs.replace(teacher=outputs(2)), of="both")


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    inputs = LossInputs(jnp.zeros(5, jnp.int32), outputs(0), outputs(1), teacher=outputs(2))
    with pytest.raises(ValueError, match="temperature must be above 0 and finite"):
        losses.teacher_kl(inputs, temperature=temperature)


@slow
def test_a_step_with_a_teacher_is_the_hand_written_update():
    teacher = models.classifier(jax.random.key(8), net().encoder, 3, head="linear")
    pull = functools.partial(losses.teacher_distance, of="clean")
    batch, parallel = batches(1)[0], Parallel.create(num_devices=2)
    states = trail(
        optax.sgd(0.1), [batch], parallel=parallel, teacher=teacher, losses={"pull": (pull, 0.5)}
    )
    images = jnp.asarray(batch["images"] / np.float32(255))

    @jax.jit
    def loss(params):
        model = net().with_variables({**net().variables, "params": params})
        logits = model.apply_train(images, key=KEY)[0].logits
        return 0.5 * jnp.mean((logits - teacher(images).logits) ** 2)

    params = net().variables["params"]
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    assert_same(states[1].variables["params"], expected, 1e-6)


# -------------------------------------------------------------------- perturbations by image, ATTA


def rows(*places):
    batch = batches(1)[0]
    return {name: leaf[: len(places)] for name, leaf in batch.items()} | {
        "rows": np.array(places, np.int32)
    }


@jax.jit
@functools.partial(jax.grad, argnums=1)
def uphill_of(variables, pixels, labels):
    logits = net().with_variables(variables).apply_train(pixels, key=KEY)[0].logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@slow
def test_an_image_meets_its_own_perturbation_again():
    atta, tx = ATTA(threats.Linf(0.1), step_size=0.05), optax.sgd(0.1)
    start = init_state(net(), tx, atta, key=KEY, num_images=12)
    given = {"losses": ON_ATTACKED, "batch_statistics": "adversarial", "attack": atta}
    parallel = Parallel.create(num_devices=2)
    seen = [(11, 2, 5, 7), (2, 11, 0, 1)]
    states = trail(tx, [rows(*places) for places in seen], parallel=parallel, start=start, **given)
    deltas = [np.asarray(state.variables[COLLECTION]["deltas"]) for state in states]
    assert deltas[0].shape == (12, 8, 8, 3) and np.abs(deltas[0]).max() <= 0.1
    images = jnp.asarray(rows(*seen[0])["images"] / np.float32(255))
    for number, places in enumerate(seen):
        attacked = jnp.clip(images + deltas[number][list(places)], 0, 1)
        inside = attacked == images + deltas[number][list(places)]

        slope = uphill_of(served(states[number].variables), attacked, rows(*places)["labels"])
        uphill = np.sign(np.where(inside, slope, 0))
        expected = deltas[number].copy()
        expected[list(places)] = np.clip(expected[list(places)] + 0.05 * uphill, -0.1, 0.1)
        # A gradient that rounds to zero has no sign to compare.
        agree = np.isclose(deltas[number + 1], expected, atol=1e-6)
        assert agree.mean() > 0.999
        others = [place for place in range(12) if place not in places]
        np.testing.assert_allclose(deltas[number + 1][others], deltas[number][others], atol=1e-7)


def test_an_adversary_by_image_needs_to_know_how_many_there_are():
    with pytest.raises(ValueError, match=r"ATTA .* give init_state key= and num_images="):
        init_state(net(), optax.sgd(0.1), ATTA(threats.Linf(0.1)), key=KEY, batch_size=8)


# ------------------------------------------------------------------- N-FGSM and smoothed labels


def linear(weights):
    return lambda x: Outputs(
        features=x.reshape(len(x), -1),
        logits=jnp.stack([jnp.sum(x * weights[None], (1, 2, 3)), jnp.zeros(len(x))], -1),
    )


def test_n_fgsm_on_a_linear_model_is_its_closed_form():
    weights = jax.random.normal(jax.random.key(3), (8, 8, 3))
    image = jax.random.uniform(jax.random.key(4), (8, 8, 3))
    attack = attacks.NFGSM(threats.Linf(0.1))
    moved = attack(KEY, linear(weights), image, jnp.array(0))
    noise = np.asarray(jax.random.uniform(KEY, (8, 8, 3), minval=-1.0), np.float64)
    expected = np.clip(image + 2 * 0.1 * noise - 0.1 * np.sign(weights), 0, 1)
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert 0.2 < jnp.abs(moved - image).max() <= 0.3 + 1e-6  # out of the ball, as published
    same = attacks.NFGSM(threats.Linf(0.0))(KEY, linear(weights), image, jnp.array(0))
    np.testing.assert_array_equal(same, image)
    short = attack.replace(step_size=0.02, noise=0.0)(KEY, linear(weights), image, jnp.array(0))
    np.testing.assert_allclose(short, jnp.clip(image - 0.02 * jnp.sign(weights), 0, 1), atol=1e-6)


@pytest.mark.parametrize("threat", [threats.L2(0.5), threats.Patch(0.1)])
def test_the_noise_of_n_fgsm_fills_a_box_and_no_other_ball(threat):
    with pytest.raises(ValueError, match="its threat is Linf"):
        attacks.NFGSM(threat)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_labels_are_those_of_optax(smoothing):
    labels = jnp.array([0, 3, 1, 1, 2])
    inputs = LossInputs(labels, outputs(0), outputs(1))
    target = optax.smooth_labels(jax.nn.one_hot(labels, 4), smoothing)
    for name in ("clean", "adversarial"):
        expected = optax.softmax_cross_entropy(getattr(inputs, name).logits, target)
        values = getattr(losses, f"{name}_cross_entropy")(inputs, smoothing=smoothing)
        np.testing.assert_allclose(values, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------- as recipes

PULL = {"function": f"{LOSSES}teacher_kl", "weight": 0.5, "of": "clean"}
SMOOTHED = {"function": f"{LOSSES}adversarial_cross_entropy", "smoothing": 0.1}
RECIPES = {
    "full": {"best": "last"},
    "taught": {"losses": {"pull": PULL}, "teacher": "full", "ema": 0.5, "best": "clean"},
    "atta": {**ON_ADVERSARIAL, "losses": {"smoothed": SMOOTHED}, "best": "last",
             "attack": {"function": "robust_ssl.finetuning:ATTA", "epsilon": 0.1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("options")
    config = tiny_recipes.config(RECIPES)
    return context(config, workdir), go(config, workdir)["train"]["trained"]


@slow
def test_they_are_the_same_after_an_interruption(trained, tmp_path, monkeypatch):
    calls = []

    def stops():  # in the second epoch of `atta`, and, after `full`, within `taught`
        calls.append(1)
        return len(calls) in (5, 6 + 6 + 2)

    monkeypatch.setattr(loop, "stop_requested", stops)
    for name, step in (("atta", 5), ("taught", 2)):
        with pytest.raises(Stopped, match=f"{name}-seed0 stopped after step {step} of 6"):
            go(tiny_recipes.config(RECIPES), tmp_path)
    go(tiny_recipes.config(RECIPES), tmp_path)
    for name in RECIPES:
        ours, theirs = final(tmp_path, name), final(trained[0].workdir, name)
        assert ours.keys() == theirs.keys() and not any("average" in path for path in ours)
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg=f"{name}: {path}")


@slow
def test_a_teacher_is_made_first_is_an_input_and_costs(trained):
    run, results = trained
    taught = run.plan.recipes["taught"]
    inputs = manifest(run.workdir, "recipes/taught-seed0")["inputs"]
    assert inputs["teacher"] == manifest(run.workdir, "recipes/full-seed0")["fingerprint"]
    assert inputs["start"] == manifest(run.workdir, "recipes/full-seed0")["inputs"]["start"]
    each = [results[f"{name}-seed0"] for name in ("taught", "full")]
    assert costs.total_gradients(results[f"{r.name}-seed0"] for r in taught.chain()) == 2 + 2
    assert [one["gradient_evaluations_per_image"] for one in each] == [2, 2]
    lines = (run.workdir / "recipes" / "taught-seed0" / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) >= {"pull", "loss"}


def test_recipes_that_teach_each_other_are_refused():
    taught = {"losses": {"pull": PULL}, "teacher": "b"}
    for recipes, message in (
        ({"a": taught, "b": {**taught, "teacher": "a"}}, "start from each other: a <- b <- a"),
        ({"a": {**taught, "teacher": "a"}}, "start from each other: a <- a"),
        ({"a": {**taught, "teacher": "full"}}, "recipes.a.teacher: there is no recipe 'full'"),
        ({"a": {**taught, "teacher": 3}}, "recipes.a.teacher must be a text"),
    ):
        with pytest.raises(experiment.UsageError, match=message):
            experiment.plan(tiny_recipes.config(recipes))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"ema": 1.0}, r"ema must be a number in \[0, 1\)"),
        ({**RECIPES["atta"], "augment": "test_step_options:softmax"}, "augment moves the pixels"),
        ({**PGD_AT, "losses": {"s": {**SMOOTHED, "smoothing": 1.0}}}, r"in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_are_refused(recipe, message):
    with pytest.raises(experiment.UsageError, match=message):
        experiment.plan(tiny_recipes.config({"mine": recipe}))


def test_all_recipes_cannot_have_one_of_them_as_teacher():
    config = tiny_recipes.config(RECIPES)
    config.common["teacher"] = "full"
    with pytest.raises(experiment.UsageError, match=r"config\.common\.teacher"):
        experiment.plan(config)
