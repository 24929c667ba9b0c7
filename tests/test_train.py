"""The stage `train`: what a recipe says happens, and nothing else; what fails stops no other."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import tiny
import tiny_recipes
from flax.traverse_util import flatten_dict
from jax.errors import JaxRuntimeError
from tiny_recipes import (
    ATTACKS,
    BROKEN,
    FROZEN,
    LOSSES,
    PGD_AT,
    SMOOTH,
    UNIVERSAL,
    context,
    final,
    go,
    manifest,
)

from robust_ssl import models, weights
from robust_ssl.data import UnreadableError
from robust_ssl.experiment import costs, fitting, loop
from robust_ssl.experiment import train as stage_train
from robust_ssl.experiment.trace import is_made
from robust_ssl.experiment.train import load_trained, train_recipe, untrained
from robust_ssl.parallel import Parallel
from robust_ssl.stopping import Stopped
from robust_ssl.workdir import ConfigChangedError, fingerprint

LAYERS = {"images": 16, "num_steps": 2, "layers": 1, "rate": 1e-2}
DRIFT = {"function": f"{ATTACKS}DriftPGD", "epsilon": 4 / 255, "step_size": 1 / 255, "num_steps": 2}
NO_MOVE = {"rates": {"**": 1e-12}, "batch_statistics": "frozen"}
RECIPES = {
    "baseline": FROZEN,
    "full": {},
    "lp_ft": {"start": "baseline", "rates": {"encoder/**": 1e-4, "head/**": 1e-3}},
    "l2_sp": {"l2_sp": 10.0},
    "pruned": {"prune": 0.5},
    "pgd_at": PGD_AT,
    "universal": UNIVERSAL,
    "rift": {
        "start": "pgd_at",
        "select": LAYERS,
        "batch_statistics": "frozen",
        "tolerance": 0.01,
        "best": "last",
    },
    "fare_encoder": {
        "losses": {"preservation": f"{LOSSES}feature_preservation"},
        "attack": DRIFT,
        "rates": {"encoder/**": 1e-3, "head/**": "freeze"},
        "batch_statistics": "adversarial",
        "compare_with_pretrained": True,
        "best": "last",
        "scored": False,
    },
    "fare": {**FROZEN, "start": "fare_encoder"},
    "smoothed": SMOOTH,
    "ensemble": {"members": ("baseline", "pgd_at")},
    "impatient": {**NO_MOVE, "epochs": 5, "patience": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The context of a run with all of them, and their results."""
    workdir = tmp_path_factory.mktemp("train")
    config = tiny_recipes.config(RECIPES)
    results = go(config, workdir)["train"]
    assert results["failed"] == {}
    return context(config, workdir), results["trained"]


def weights_of(trained, name):
    return final(trained[0].workdir, name)


def start_of(trained, name):
    """The weights before any training, by path."""
    return flatten_dict(untrained(trained[0], trained[0].plan.recipes[name]).variables, sep="/")


def gradients(trained, name):
    """Of a recipe with all it starts from."""
    chain = trained[0].plan.recipes[name].chain()
    return costs.total_gradients(trained[1][f"{recipe.name}-seed0"] for recipe in chain)


def moved(left, right):
    assert left.keys() == right.keys()
    return {path for path in left if not np.array_equal(left[path], right[path])}


def distance(left, right, part="params/encoder/"):
    return sum(np.sum((left[p] - right[p]) ** 2) for p in left if p.startswith(part))


# --- What happens -----------------------------------------------------------------------------


def test_every_recipe_is_made_and_loads_elsewhere(trained):
    run, results = trained
    assert sorted(results) == sorted(f"{name}-seed0" for name in RECIPES)
    images = jax.numpy.asarray(tiny.images("test")[0][:4] / 255, "float32")
    for name in RECIPES:
        directory = run.workdir / "recipes" / f"{name}-seed0"
        loaded = weights.load_classifier(directory, builder=tiny.encoder)
        ours = load_trained(run, run.plan.recipes[name], 0)
        np.testing.assert_array_equal(loaded(images).logits, ours(images).logits, err_msg=name)
        card = json.loads((directory / "classifier" / "classifier.json").read_text())["card"]
        assert card["stage"] == f"{name}-seed0" and card["downstream"] == run.downstream[0].name
        made = json.loads((directory / "classifier" / "provenance.intoto.json").read_text())
        assert "classifier.json" in [entry["name"] for entry in made["subject"]]


def test_only_what_has_a_rate_moves(trained):
    baseline = moved(weights_of(trained, "baseline"), start_of(trained, "baseline"))
    assert baseline == {"params/head/linear/kernel", "params/head/linear/bias"}
    full = moved(weights_of(trained, "full"), start_of(trained, "full"))
    assert full == set(start_of(trained, "full"))
    fare_encoder = moved(weights_of(trained, "fare_encoder"), start_of(trained, "fare_encoder"))
    assert fare_encoder == {path for path in full if "/encoder/" in path}
    fare = moved(weights_of(trained, "fare"), weights_of(trained, "fare_encoder"))
    assert fare == baseline


def test_what_starts_from_another_starts_from_its_weights(trained):
    run, _ = trained
    for name, start in (("lp_ft", "baseline"), ("rift", "pgd_at"), ("fare", "fare_encoder")):
        inputs = manifest(run.workdir, f"recipes/{name}-seed0")["inputs"]
        assert inputs["start"] == manifest(run.workdir, f"recipes/{start}-seed0")["fingerprint"]
    first = manifest(run.workdir, "recipes/full-seed0")["inputs"]["start"]
    assert first == fingerprint(untrained(run, run.plan.recipes["full"]).variables)
    assert moved(weights_of(trained, "lp_ft"), weights_of(trained, "baseline"))


def test_every_recipe_of_a_seed_has_the_same_head_and_other_seeds_another(trained):
    run, _ = trained
    one, two, other = (
        untrained(run, run.plan.recipes[name], seed).head_variables
        for name, seed in (("baseline", 0), ("full", 0), ("baseline", 1))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert fingerprint(one) != fingerprint(other)


def test_only_selected_layers_move(trained):
    _, results = trained
    [selected] = results["rift-seed0"]["selected"]
    start, end = weights_of(trained, "pgd_at"), weights_of(trained, "rift")
    layer = selected.removesuffix("/kernel")
    assert moved(start, end) <= {p for p in start if p.startswith(f"params/{layer}/")}
    assert results["rift-seed0"]["alpha"] == 0 or moved(start, end)
    assert 0 <= results["rift-seed0"]["alpha"] <= 1
    scores = manifest(trained[0].workdir, "recipes/rift-seed0-layers")["results"]["scores"]
    assert min(scores, key=scores.get) == selected


def test_pruned_weights_stay_zero(trained):
    start, end = start_of(trained, "pruned"), weights_of(trained, "pruned")
    kernels = [path for path in start if "/encoder/" in path and path.endswith("kernel")]
    zeros = {path: start[path] == 0 for path in kernels}
    total = sum(mask.size for mask in zeros.values())
    assert sum(mask.sum() for mask in zeros.values()) == round(total / 2)
    for path, mask in zeros.items():
        np.testing.assert_array_equal(end[path] == 0, mask)
        assert not np.array_equal(end[path], start[path])


def test_a_spring_keeps_the_encoder_near_its_start(trained):
    start = start_of(trained, "full")
    near, far = (distance(weights_of(trained, name), start) for name in ("l2_sp", "full"))
    assert 0 < near < far


def test_an_input_transformation_has_its_starts_weights(trained):
    run, results = trained
    assert not moved(weights_of(trained, "smoothed"), weights_of(trained, "baseline"))
    smoothed, baseline = (
        load_trained(run, run.plan.recipes[name], 0) for name in ("smoothed", "baseline")
    )
    assert type(smoothed.encoder.preprocess).__name__ == "Smooth"
    images = jax.numpy.asarray(tiny.images("test")[0][:4] / 255, "float32")
    np.testing.assert_array_equal(
        smoothed(images).logits, baseline(smoothed.encoder.preprocess(images)).logits
    )
    assert not np.array_equal(smoothed(images).logits, baseline(images).logits)
    assert results["smoothed-seed0"]["gradient_evaluations_per_image"] == 0
    assert results["smoothed-seed0"]["steps"] == 0


def test_an_ensembles_members_are_the_classifiers_that_were_made(trained):
    run, _ = trained
    ensemble = load_trained(run, run.plan.recipes["ensemble"], 0)
    for name, member in zip(("baseline", "pgd_at"), models.ensemble_members(ensemble), strict=True):
        alone = load_trained(run, run.plan.recipes[name], 0)
        jax.tree.map(np.testing.assert_array_equal, member.variables, alone.variables)


def test_what_is_counted_is_what_was_done(trained):
    _, results = trained
    each = {name: results[f"{name}-seed0"]["gradient_evaluations_per_image"] for name in RECIPES}
    assert each["baseline"] == each["full"] == each["universal"] == 2  # epochs of one gradient
    assert each["pgd_at"] == each["fare_encoder"] == 2 * (1 + 2)
    for name in ("full", "pgd_at"):
        assert results[f"{name}-seed0"]["steps"] == 2 * 3
        assert results[f"{name}-seed0"]["skipped"] == 0
    assert gradients(trained, "lp_ft") == each["baseline"] + each["lp_ft"]
    layers = manifest(trained[0].workdir, "recipes/rift-seed0-layers")["results"]
    measured = layers["gradient_evaluations"] / 48
    assert gradients(trained, "rift") == each["pgd_at"] + each["rift"] + measured
    # PGD, the gradient that all layers share, and one more for each; none after the last step.
    assert measured == 16 * (2 + 1 + len(layers["scores"])) / 48


def test_the_last_epoch_is_kept_without_validation(trained):
    run, results = trained
    last = results["fare_encoder-seed0"]
    assert last["best_epoch"] == last["epochs"] == 2 and last["validation_score"] is None

    def validated(name):
        lines = (run.workdir / "recipes" / f"{name}-seed0" / "metrics.jsonl").read_text()
        entries = json.loads(lines.splitlines()[-1])
        return {name for name in entries if name.startswith("validation")}

    assert validated("fare_encoder") == set()
    assert validated("baseline") == {"validation_clean_accuracy"}
    assert validated("pgd_at") == {"validation_clean_accuracy", "validation_robust_accuracy"}


def test_what_does_not_get_better_is_stopped_early(trained):
    results = trained[1]["impatient-seed0"]
    assert (results["epochs"], results["steps"]) == (2, 6)  # of five
    assert results["gradient_evaluations_per_image"] == 2


def test_the_adversarys_perturbations_are_no_part_of_the_classifier(trained):
    assert set(weights_of(trained, "universal")) == set(start_of(trained, "universal"))


# --- Again ------------------------------------------------------------------------------------


def test_what_is_finished_is_not_trained_again(trained, monkeypatch):
    run, results = trained
    before = tiny_recipes.snapshot(run.workdir)
    for place in (fitting, loop):
        monkeypatch.setattr(place, "train", lambda *a, **k: pytest.fail("trained again"))
    # Nor is its step built, only to see that it could be.
    monkeypatch.setattr(fitting, "build_step", lambda *a, **k: pytest.fail("built again"))
    assert go(tiny_recipes.config(RECIPES), run.workdir)["train"]["trained"] == results
    assert tiny_recipes.snapshot(run.workdir) == before


def test_another_setting_is_refused_in_the_same_workdir(trained):
    run, _ = trained
    config = tiny_recipes.config({**RECIPES, "full": {"weight_decay": 0.5}})
    before = tiny_recipes.snapshot(run.workdir)
    changed = context(config, run.workdir)
    with pytest.raises(ConfigChangedError, match="weight_decay"):
        train_recipe(changed, changed.plan.recipes["full"], 0)
    assert tiny_recipes.snapshot(run.workdir) == before


@pytest.mark.parametrize(
    ("name", "change", "seeds"),
    [
        ("full", {"weight_decay": 0.5}, (0,)),
        ("full", {"rates": {"**": 0.5}}, (0,)),
        ("rift", {"tolerance": 0.5}, (0,)),
        ("full", {}, (0, 1)),
    ],
)
def test_only_what_is_made_as_it_is_asked_for_counts_as_made(trained, name, change, seeds):
    recipe = {**RECIPES[name], **change}
    config = tiny_recipes.config({**RECIPES, name: recipe})
    config.training.seeds = seeds
    run = context(config, trained[0].workdir)
    assert not is_made(run, run.plan.recipes[name])
    assert is_made(trained[0], trained[0].plan.recipes[name])


def test_recipes_that_differ_in_the_pull_to_the_start_share_one_program(trained):
    run = dataclasses.replace(trained[0], parallel=Parallel.create(num_devices=1, kind="jit"))
    images, labels = tiny.images(n=8)
    batch = {"images": images, "labels": labels, "indices": np.arange(8, dtype=np.int32)}

    def program(weight):
        recipe = dataclasses.replace(run.plan.recipes["l2_sp"], l2_sp=weight)
        state, step = fitting.build_step(
            *(run, "l2_sp", recipe, untrained(run, recipe), run.encoder),
            rates=recipe.rates,
            steps_per_epoch=1,
            seed=0,
        )
        return jax.jit(step.function).lower(state, batch, step.settings).as_text()

    assert program(0.1) == program(10.0)


def test_an_interrupted_train_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    names = ("baseline", "lp_ft", "universal")
    config = tiny_recipes.config({name: RECIPES[name] for name in names})
    calls = []

    def stops():  # five steps into the second recipe
        calls.append(1)
        return len(calls) == 6 + 5

    monkeypatch.setattr(loop, "stop_requested", stops)
    with pytest.raises(Stopped, match="lp_ft-seed0 stopped after step 5 of 6"):
        go(config, tmp_path)
    assert manifest(tmp_path, "recipes/baseline-seed0")["status"] == "done"
    calls[:] = [1] * 6  # and, after its last step, into the third
    with pytest.raises(Stopped, match="universal-seed0 stopped after step 4 of 6"):
        go(config, tmp_path)
    go(config, tmp_path)
    for name in names:
        assert not moved(final(tmp_path, name), weights_of(trained, name)), name


# --- What goes wrong on the way ----------------------------------------------------------------


BROKEN_AT = "recipes/broken-seed0"


def test_a_recipe_that_fails_is_named_and_the_others_are_made(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "robust_ssl")
    recipes = {"broken": BROKEN, "after": {**FROZEN, "start": "broken"}, "baseline": FROZEN}
    config = tiny_recipes.config(recipes)
    results = go(config, tmp_path)["train"]
    assert set(results["trained"]) == {"baseline-seed0"}
    assert set(results["failed"]) == {"broken-seed0", "after-seed0"}
    why = results["failed"]["broken-seed0"]
    assert "lower the learning rate" in why and "last good state is kept in" in why
    assert results["failed"]["after-seed0"] == "it is made from broken-seed0, which failed"
    assert "broken-seed0 failed, the others go on" in caplog.text
    checkpoints = sorted(path.name for path in (tmp_path / BROKEN_AT / "checkpoints").iterdir())
    assert checkpoints and not (tmp_path / BROKEN_AT / "classifier").exists()
    # A second command, and a stage after this one, find the same and try nothing again.
    assert go(config, tmp_path)["train"] == results
    # Once it is changed it begins anew, with what is made from it, and nothing on disk is lost.
    mended = tiny_recipes.config({**recipes, "broken": {"epochs": 1}})
    after = go(mended, tmp_path)["train"]
    assert after["failed"] == {} and len(after["trained"]) == 3
    assert after["trained"]["baseline-seed0"] == results["trained"]["baseline-seed0"]
    aside = tmp_path / f"{BROKEN_AT}-failed1" / "checkpoints"
    assert sorted(path.name for path in aside.iterdir()) == checkpoints
    assert go(mended, tmp_path)["train"] == after


def test_a_recipe_that_is_made_is_not_made_otherwise(tmp_path):
    go(tiny_recipes.config({"baseline": FROZEN}), tmp_path)
    with pytest.raises(ConfigChangedError, match=r"baseline-seed0 holds [^$]*decay: 0.96 -> 0.5"):
        go(tiny_recipes.config({"baseline": {**FROZEN, "decay": 0.5}}), tmp_path)


def test_data_that_cannot_be_read_are_no_recipes_fault(tmp_path, monkeypatch):
    def unreadable(*args):
        raise UnreadableError("image 3 of 'a' (train) cannot be read as an image")

    monkeypatch.setattr(stage_train, "train_recipe", unreadable)
    with pytest.raises(UnreadableError, match="image 3"):
        go(tiny_recipes.config({"full": {}}), tmp_path)
    monkeypatch.undo()
    assert go(tiny_recipes.config({"full": {}}), tmp_path)["train"]["failed"] == {}


def test_a_recipe_that_never_moved_has_failed(tmp_path):
    still = {**BROKEN, "epochs": 1}  # too short for as many skips in a row as end a training
    results = go(tiny_recipes.config({"still": still, "baseline": FROZEN}), tmp_path)["train"]
    assert set(results["trained"]) == {"baseline-seed0"}
    assert "all its 3 updates were skipped" in results["failed"]["still-seed0"]


@pytest.mark.parametrize("error", [ValueError, TypeError, Stopped, KeyboardInterrupt])
def test_whatever_is_wrong_with_one_recipe_the_others_are_made(tmp_path, monkeypatch, error):
    train = fitting.train

    def dies(stage, *args, **kwargs):
        if stage.path.name == "full-seed0":
            raise error("no such thing")
        return train(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", dies)
    config = tiny_recipes.config({"full": {}, "baseline": FROZEN})
    if error in (Stopped, KeyboardInterrupt):
        with pytest.raises(error, match="no such thing"):
            go(config, tmp_path)
        return
    results = go(config, tmp_path)["train"]
    assert results["failed"] == {"full-seed0": "no such thing"}
    assert set(results["trained"]) == {"baseline-seed0"}


def test_what_the_device_stopped_is_tried_again_by_the_next_run(tmp_path, monkeypatch, caplog):
    train, tries = fitting.train, []

    def dies(stage, *args, **kwargs):
        if stage.path.name == "full-seed0":
            tries.append(stage.path)
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return train(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", dies)
    recipes = {"full": {}, "after": {**FROZEN, "start": "full"}, "baseline": FROZEN}
    config = tiny_recipes.config(recipes)
    config.stages = ("attack", "train", "score")
    stopped = go(config, tmp_path)["train"]
    assert set(stopped["failed"]) == {"full-seed0", "after-seed0"}
    assert len(tries) == 1  # `score` asks for what is trained, and tries nothing again
    said = "RESOURCE_EXHAUSTED: Out of memory; the next run tries it again"
    # Though each stage asks for what is trained.
    assert caplog.text.count(f"full-seed0 failed, and is left out: {said}") == 1
    monkeypatch.undo()
    after = go(config, tmp_path)["train"]
    assert after["failed"] == {} and len(after["trained"]) == 3
    assert after["trained"]["baseline-seed0"] == stopped["trained"]["baseline-seed0"]


def test_recipes_may_come_to_a_finished_train(tmp_path):
    before = {"baseline": {**FROZEN, "scored": False}}  # only what another started from
    first = go(tiny_recipes.config(before), tmp_path)["train"]["trained"]
    more = tiny_recipes.config({"baseline": FROZEN, "smoothed": SMOOTH})
    second = go(more, tmp_path)["train"]["trained"]
    assert set(second) == {"baseline-seed0", "smoothed-seed0"}
    assert second["baseline-seed0"] == first["baseline-seed0"]
    more.training.seeds = (0, 1)
    third = go(more, tmp_path)["train"]["trained"]
    assert len(third) == 4 and second.items() <= third.items()
