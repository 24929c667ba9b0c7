"""Recipes: what each says happens, and nothing else; a wrong one is refused before any step."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import tiny
import tiny_methods
from flax.traverse_util import flatten_dict
from tiny_methods import (
    ATTACKS,
    BROKEN,
    FROZEN,
    LOSSES,
    ON_ADVERSARIAL,
    PGD,
    PGD_AT,
    POOL,
    SMOOTH,
    UNIVERSAL,
    final,
    go,
    manifest,
)

from robust_ssl import checkpoints, finetuning, models, stages, weights
from robust_ssl.manifests import ConfigChangedError
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Stopped
from robust_ssl.stages import costs, fitting, methods, recipes, training
from robust_ssl.trees import fingerprint

LAYERS = {
    "images": 16,
    "num_steps": 1,
    "learning_rate": 1.0,
    "radius": 0.1,
    "top_k": 1,
    "top_k_fraction": None,
    "rate": 1e-2,
}
DRIFT = {"function": f"{ATTACKS}DriftPGD", "epsilon": 4 / 255, "step_size": 1 / 255, "num_steps": 2}
NO_MOVE = {"rates": {"**": 1e-12}, "batch_statistics": "frozen"}
RECIPES = {
    "usual": FROZEN,
    "full": {},
    "lp_ft": {"start": "usual", "rates": {"encoder/**": 1e-4, "head/**": 1e-3}},
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
        "losses": {"preservation": (f"{LOSSES}feature_preservation", 1.0)},
        "attack": DRIFT,
        "rates": {"encoder/**": 1e-3, "head/**": "freeze"},
        "batch_statistics": "adversarial",
        "compare_with_pretrained": True,
        "best": "last",
        "scored": False,
    },
    "fare": {**FROZEN, "start": "fare_encoder"},
    "smoothed": SMOOTH,
    "ensemble": {"members": ("usual", "pgd_at")},
    "impatient": {**NO_MOVE, "epochs": 5, "patience": 1},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All of them, made."""
    workdir = tmp_path_factory.mktemp("methods")
    config = tiny_methods.config(RECIPES)
    results = go(config, workdir)["defend"]
    assert results["failed"] == {}
    return tiny_methods.a_run(config, workdir), results["made"]


def weights_of(made, name):
    return final(made[0].workdir, name)


def start_of(made, name):
    """The weights before any training, by path."""
    return flatten_dict(methods.untrained(made[0], name).variables, sep="/")


def moved(left, right):
    assert left.keys() == right.keys()
    return {path for path in left if not np.array_equal(left[path], right[path])}


def distance(left, right, part="params/encoder/"):
    return sum(np.sum((left[p] - right[p]) ** 2) for p in left if p.startswith(part))


# --- What a recipe says -----------------------------------------------------------------------


def test_a_recipe_is_the_defaults_what_all_share_and_its_own():
    config = {"common": {"epochs": 5, "head": "linear"}, "methods": {"one": {"head": "mlp"}}}
    recipe = methods.complete(config, "one")
    assert recipe == {**recipes.DEFAULTS, "epochs": 5, "head": "mlp"}
    assert methods.complete({"methods": {"one": {}}}, "one") == recipes.DEFAULTS
    assert "epochs" not in config["methods"]["one"]


def test_a_name_that_is_not_there_is_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"no 'trade'; near names: trades"):
        methods.complete({"methods": {"trades": {}, "mart": {}}}, "trade")
    with pytest.raises(ValueError, match=r"'one' has an entry 'epoch' .*near names: epochs"):
        methods.complete({"methods": {"one": {"epoch": 1}}}, "one")


def test_a_chain_has_each_recipe_once():
    config = {
        "methods": {
            "a": {},
            "b": {"start": "a"},
            "c": {"start": "a", "scored": False},
            "all": {"members": ("b", "c")},
        }
    }
    chain = recipes.chain(config, "all")
    assert chain[0] == "all" and sorted(chain) == ["a", "all", "b", "c"]
    assert recipes.scored(config) == ["a", "b", "all"]


def without(name, entry):
    return {key: value for key, value in name.items() if key != entry}


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"epoch": 1}, "'epoch' that means nothing; near names: epochs"),
        ({"start": "usuall"}, "no 'usuall'; near names: usual"),
        ({"start": "wrong"}, "start from each other: wrong <- wrong"),
        ({"start": "wrong_too"}, "each other: .*wrong <- wrong_too"),
        ({"members": ("usual", "nobody")}, "no 'nobody'"),
        ({"members": ("usual",)}, "two"),
        ({"losses": {"mine": (f"{LOSSES}clean_cross_entropy",)}}, "the loss 'mine' must be"),
        ({"losses": {"mine": (f"{LOSSES}clean_cross_entropi", 1.0)}}, "clean_cross_entropy"),
        ({"losses": {"mine": "clean"}}, "the loss 'mine' must be"),
        ({"losses": {}}, "losses is empty"),
        ({"losses": ON_ADVERSARIAL["losses"]}, "adversarial"),
        ({"batch_statistics": "adversarial"}, "needs an attack"),
        ({"batch_statistics": "none"}, "batch_statistics must be one of"),
        ({"rates": {"encoder/**": 1e-3}}, "head/linear/kernel"),
        ({"rates": {"**": 1e-3, "encoder/stem/**": 1e-4}}, "'encoder/stem/\\*\\*'"),
        ({**PGD_AT, "attack": {**PGD, "epsilon": 8.0}}, r"epsilon must lie in \[0, 1\]"),
        ({**PGD_AT, "attack": without(PGD, "epsilon")}, 'needs an "epsilon"'),
        ({**PGD_AT, "attack": {**PGD, "steps": 3}}, "PGD does not take that: .*steps"),
        ({**PGD_AT, "attack": without(PGD, "function")}, 'needs a "function"'),
        ({"best": "worst"}, 'best must be "clean", "robust" or "last"'),
        ({"best": "robust"}, "robust.*attack"),
        ({"best": "last", "patience": 1}, "patience"),
        ({"patience": 0}, "patience"),
        ({"batch_size": 15}, "multiple of 2"),
        ({"batch_size": 512}, "512"),
        ({**PGD_AT, "batch_statistics": "twins", "batch_size": 10}, "even number of images, got 5"),
        ({"prune": 1.5}, r"\[0, 1\)"),
        ({"l2_sp": -1.0}, "l2_sp must be a number of at least 0, got -1.0"),
        ({"head": "mpl"}, "mpl"),
        ({"encoder": "simclr-of-dreams"}, "simclr-of-dreams"),
        ({"select": {**LAYERS, "top_k": 99}}, "99"),
        ({"select": without(LAYERS, "rate")}, "rate"),
        ({"select": without(LAYERS, "images")}, "images"),
        ({"preprocess": {"function": "robust_ssl.models.preprocessing:JPG"}}, "JPEG"),
        ({**SMOOTH, "preprocess": {**SMOOTH["preprocess"], "sise": 3}}, "does not take that"),
        ({"epochs": -1}, "epochs must be a whole number of at least 0, got -1"),
        ({"epochs": 2.5}, "epochs must be a whole number of at least 0, got 2.5"),
        ({"patience": 1.5}, "patience must be a whole number of at least 1, got 1.5"),
        ({"decay": 2}, r"decay must be a number in \[0, 1\], got 2"),
        ({"decay": 0.0}, "must be above 0"),
        ({"weight_decay": "much"}, "weight_decay must be a number of at least 0, got 'much'"),
        ({"tolerance": -1}, r"tolerance must be a number in \[0, 1\], got -1"),
        ({"prune": "half"}, "prune must be a number of at least 0, got 'half'"),
        ({"rates": "slow"}, "rates must be a mapping, got 'slow'"),
        ({"losses": 3}, "losses must be a mapping, got 3"),
        ({"losses": {"mine": (f"{LOSSES}clean_cross_entropy", "1")}}, "weight of the loss 'mine'"),
        ({**PGD_AT, "attack": "pgd"}, "attack must be a mapping or None, got 'pgd'"),
        ({**PGD_AT, "attack": {**PGD, "num_steps": 2.5}}, "attack.num_steps must be a whole"),
        ({**PGD_AT, "attack": {**PGD, "step_size": -0.1}}, "attack.step_size must be a number"),
        ({**PGD_AT, "attack": {**PGD, "step_size": 0}}, "must be above 0"),
        ({**ON_ADVERSARIAL, "attack": {**POOL, "epsilon": 0.8}}, "ends at 0.5"),
    ],
)
def test_a_wrong_recipe_is_refused_before_the_first_step(tmp_path, recipe, says):
    config = tiny_methods.config({"usual": FROZEN, "wrong": recipe})
    if recipe.get("start") == "wrong_too":
        config.methods.wrong_too = {"start": "wrong"}
    with pytest.raises(stages.UsageError, match=f"(?s){says}.*in config.methods.wrong"):
        go(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": ()}, "config.defend.seeds: need at least one seed"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"validation": {**PGD, "epsilon": 2.0}}, r"epsilon must lie in \[0, 1\]"),
        ({"validation": None}, "config.defend.validation must be an attack on single images"),
        ({"validation": POOL}, "config.defend.validation must be an attack on single images"),
    ],
)
def test_a_wrong_defend_is_refused_before_the_first_step(tmp_path, change, says):
    config = tiny_methods.config({"usual": FROZEN})
    config.defend = {**config.defend.to_dict(), **change}
    with pytest.raises(stages.UsageError, match=says):
        go(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_cannot_be_a_directorys_name_is_refused(tmp_path):
    with pytest.raises(stages.UsageError, match=r"config.methods: 'a/b' cannot be a name"):
        go(tiny_methods.config({"a/b": FROZEN}), tmp_path)


# --- What happens -----------------------------------------------------------------------------


def test_every_recipe_is_made_and_loads_elsewhere(made):
    run, results = made
    assert sorted(results) == sorted(f"methods/{name}-seed0" for name in RECIPES)
    images = jax.numpy.asarray(tiny.images("test")[0][:4] / 255, "float32")
    for name in RECIPES:
        directory = run.workdir / "methods" / f"{name}-seed0"
        loaded = weights.load_classifier(directory, builder=tiny.encoder)
        ours = methods.load_method(run, name, 0)
        np.testing.assert_array_equal(loaded(images).logits, ours(images).logits, err_msg=name)
        card = json.loads((directory / "classifier" / "classifier.json").read_text())["card"]
        assert card["stage"] == f"{name}-seed0" and card["downstream"] == run.downstream[0].name


def test_only_what_has_a_rate_moves(made):
    usual = moved(weights_of(made, "usual"), start_of(made, "usual"))
    assert usual == {"params/head/linear/kernel", "params/head/linear/bias"}
    full = moved(weights_of(made, "full"), start_of(made, "full"))
    assert full == set(start_of(made, "full"))
    fare_encoder = moved(weights_of(made, "fare_encoder"), start_of(made, "fare_encoder"))
    assert fare_encoder == {path for path in full if "/encoder/" in path}
    fare = moved(weights_of(made, "fare"), weights_of(made, "fare_encoder"))
    assert fare == usual


def test_what_starts_from_another_starts_from_its_weights(made):
    run, _ = made
    for name, start in (("lp_ft", "usual"), ("rift", "pgd_at"), ("fare", "fare_encoder")):
        inputs = manifest(run.workdir, f"methods/{name}-seed0")["inputs"]
        assert inputs["start"] == manifest(run.workdir, f"methods/{start}-seed0")["fingerprint"]
    first = manifest(run.workdir, "methods/full-seed0")["inputs"]["start"]
    assert first == fingerprint(methods.untrained(run, "full").variables)
    assert moved(weights_of(made, "lp_ft"), weights_of(made, "usual"))


def test_every_recipe_of_a_seed_has_the_same_head_and_other_seeds_another(made):
    run, _ = made
    one, two, other = (
        methods.untrained(run, name, seed).head_variables
        for name, seed in (("usual", 0), ("full", 0), ("usual", 1))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert fingerprint(one) != fingerprint(other)


def test_only_selected_layers_move(made):
    _, results = made
    [selected] = results["methods/rift-seed0"]["selected"]
    start, end = weights_of(made, "pgd_at"), weights_of(made, "rift")
    layer = selected.removesuffix("/kernel")
    assert moved(start, end) <= {p for p in start if p.startswith(f"params/{layer}/")}
    assert results["methods/rift-seed0"]["alpha"] == 0 or moved(start, end)
    assert 0 <= results["methods/rift-seed0"]["alpha"] <= 1
    kept = manifest(made[0].workdir, "methods/rift-seed0-layers")["results"]
    assert min(kept["scores"], key=kept["scores"].get) == selected


def test_pruned_weights_stay_zero(made):
    start, end = start_of(made, "pruned"), weights_of(made, "pruned")
    kernels = [path for path in start if "/encoder/" in path and path.endswith("kernel")]
    zeros = {path: start[path] == 0 for path in kernels}
    total = sum(mask.size for mask in zeros.values())
    assert sum(mask.sum() for mask in zeros.values()) == round(total / 2)
    for path, mask in zeros.items():
        np.testing.assert_array_equal(end[path] == 0, mask)
        assert not np.array_equal(end[path], start[path])


def test_a_spring_keeps_the_encoder_near_its_start(made):
    start = start_of(made, "full")
    near, far = (distance(weights_of(made, name), start) for name in ("l2_sp", "full"))
    assert 0 < near < far


def test_an_input_transformation_has_its_starts_weights(made):
    run, results = made
    assert not moved(weights_of(made, "smoothed"), weights_of(made, "usual"))
    smoothed, usual = (methods.load_method(run, name, 0) for name in ("smoothed", "usual"))
    assert type(smoothed.encoder.preprocess).__name__ == "Smooth"
    images = jax.numpy.asarray(tiny.images("test")[0][:4] / 255, "float32")
    np.testing.assert_array_equal(
        smoothed(images).logits, usual(smoothed.encoder.preprocess(images)).logits
    )
    assert not np.array_equal(smoothed(images).logits, usual(images).logits)
    assert results["methods/smoothed-seed0"]["gradient_evaluations_per_image"] == 0
    assert results["methods/smoothed-seed0"]["steps"] == 0


def test_an_ensembles_members_are_the_classifiers_that_were_made(made):
    run, _ = made
    ensemble = methods.load_method(run, "ensemble", 0)
    for name, member in zip(("usual", "pgd_at"), models.ensemble_members(ensemble), strict=True):
        alone = methods.load_method(run, name, 0)
        jax.tree.map(np.testing.assert_array_equal, member.variables, alone.variables)


def test_what_is_counted_is_what_was_done(made):
    _, results = made
    each = {
        name: results[f"methods/{name}-seed0"]["gradient_evaluations_per_image"] for name in RECIPES
    }
    assert each["usual"] == each["full"] == each["universal"] == 2  # epochs of one gradient
    assert each["pgd_at"] == each["fare_encoder"] == 2 * (1 + 2)
    for name in ("full", "pgd_at"):
        assert results[f"methods/{name}-seed0"]["steps"] == 2 * 3
        assert results[f"methods/{name}-seed0"]["skipped"] == 0
    whole = costs.total_cost(made[0], "lp_ft", 0)["gradient_evaluations"]
    assert whole == each["usual"] + each["lp_ft"]
    layers = manifest(made[0].workdir, "methods/rift-seed0-layers")["results"]
    rift = costs.total_cost(made[0], "rift", 0)["gradient_evaluations"]
    measured = layers["gradient_evaluations"] / 48
    assert rift == each["pgd_at"] + each["rift"] + measured
    assert measured == 16 * (2 + 1 + len(layers["scores"])) / 48


def test_the_last_epoch_is_kept_without_validation(made):
    run, results = made
    last = results["methods/fare_encoder-seed0"]
    assert last["best_epoch"] == last["epochs"] == 2 and last["validation_score"] is None

    def validated(name):
        lines = (run.workdir / "methods" / f"{name}-seed0" / "metrics.jsonl").read_text()
        return {k for k in json.loads(lines.splitlines()[-1]) if k.startswith("validation")}

    assert validated("fare_encoder") == set()
    assert validated("usual") == {"validation_clean_accuracy"}
    assert validated("pgd_at") == {"validation_clean_accuracy", "validation_robust_accuracy"}


def test_what_does_not_get_better_is_stopped_early(made):
    found = made[1]["methods/impatient-seed0"]
    assert (found["epochs"], found["steps"]) == (2, 6)  # of five
    assert found["gradient_evaluations_per_image"] == 2


def test_the_adversarys_perturbations_are_no_part_of_the_classifier(made):
    assert set(weights_of(made, "universal")) == set(start_of(made, "universal"))


# --- Again ------------------------------------------------------------------------------------


def test_what_is_finished_is_not_trained_again(made, monkeypatch):
    run, results = made
    before = tiny_methods.snapshot(run.workdir)
    for place in (fitting, training):
        monkeypatch.setattr(place, "train", lambda *a, **k: pytest.fail("trained again"))
    # Nor is its step built, only to see that it could be.
    monkeypatch.setattr(fitting, "build_step", lambda *a, **k: pytest.fail("built again"))
    assert go(tiny_methods.config(RECIPES), run.workdir)["defend"]["made"] == results
    assert tiny_methods.snapshot(run.workdir) == before


def test_another_setting_is_refused_in_the_same_workdir(made):
    run, _ = made
    config = tiny_methods.config({**RECIPES, "full": {"weight_decay": 0.5}})
    before = tiny_methods.snapshot(run.workdir)
    with pytest.raises(checkpoints.ConfigChangedError, match="weight_decay"):
        methods.method(tiny_methods.a_run(config, run.workdir), "full", 0)
    assert tiny_methods.snapshot(run.workdir) == before


@pytest.mark.parametrize(
    ("name", "change", "seeds"),
    [
        ("full", {"weight_decay": 0.5}, (0,)),
        ("full", {"rates": {"**": 0.5}}, (0,)),
        ("rift", {"tolerance": 0.5}, (0,)),
        ("full", {}, (0, 1)),
    ],
)
def test_only_what_is_made_as_it_is_asked_for_counts_as_made(made, name, change, seeds):
    recipe = {**RECIPES[name], **change}
    run = tiny_methods.a_run(tiny_methods.config({**RECIPES, name: recipe}), made[0].workdir)
    assert not methods.is_made(run, name, seeds)
    assert methods.is_made(made[0], name, (0,))


def test_recipes_that_differ_in_the_pull_to_the_start_share_one_program(made):
    alone = dataclasses.replace(made[0], parallel=Parallel.create(num_devices=1, method="jit"))
    classifier = methods.untrained(alone, "l2_sp")
    images, labels = tiny.images(n=8)
    batch = {"images": images, "labels": labels, "indices": np.arange(8, dtype=np.int32)}

    def program(weight):
        recipe = {**methods.complete(alone.config, "l2_sp"), "l2_sp": weight}
        losses = fitting.build_losses(recipe["losses"])
        state, step = fitting.build_step(alone, "l2_sp", classifier, recipe, losses, None, 1)
        return jax.jit(step.function).lower(state, batch, step.settings).as_text()

    assert program(0.1) == program(10.0)


def test_an_interrupted_defend_ends_with_the_same_weights(made, tmp_path, monkeypatch):
    names = ("usual", "lp_ft", "universal")
    config = tiny_methods.config({name: RECIPES[name] for name in names})
    calls = []

    def asked():  # five steps into the second recipe
        calls.append(1)
        return len(calls) == 6 + 5

    monkeypatch.setattr(training, "stop_requested", asked)
    with pytest.raises(Stopped, match="lp_ft-seed0 stopped after step 5 of 6"):
        go(config, tmp_path)
    assert manifest(tmp_path, "methods/usual-seed0")["status"] == "done"
    calls[:] = [1] * 6  # and, after its last step, into the third
    with pytest.raises(Stopped, match="universal-seed0 stopped after step 4 of 6"):
        go(config, tmp_path)
    go(config, tmp_path)
    for name in names:
        assert not moved(final(tmp_path, name), weights_of(made, name)), name


# --- What goes wrong on the way ----------------------------------------------------------------


def test_a_recipe_that_fails_is_named_and_the_others_are_made(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "robust_ssl")
    recipes = {"broken": BROKEN, "after": {**FROZEN, "start": "broken"}, "usual": FROZEN}
    config = tiny_methods.config(recipes)
    results = go(config, tmp_path)["defend"]
    assert set(results["made"]) == {"methods/usual-seed0"}
    assert set(results["failed"]) == {"methods/broken-seed0", "methods/after-seed0"}
    said = results["failed"]["methods/broken-seed0"]
    assert "lower the learning rate" in said and "last good state is kept in" in said
    assert results["failed"]["methods/after-seed0"] == "it is made from broken-seed0, which failed"
    assert "methods/broken-seed0 failed, the others go on" in caplog.text
    kept = sorted((tmp_path / "methods" / "broken-seed0" / "checkpoints").iterdir())
    assert kept and not (tmp_path / "methods" / "broken-seed0" / "final").exists()
    # A second command, and a stage after this one, find the same and try nothing again.
    assert go(config, tmp_path)["defend"] == results
    # Once it is changed it begins anew, with what is made from it, and nothing on disk is lost.
    mended = tiny_methods.config({**recipes, "broken": {"epochs": 1}})
    after = go(mended, tmp_path)["defend"]
    assert after["failed"] == {} and len(after["made"]) == 3
    assert after["made"]["methods/usual-seed0"] == results["made"]["methods/usual-seed0"]
    aside = tmp_path / "methods" / "broken-seed0-failed1" / "checkpoints"
    assert sorted(file.name for file in aside.iterdir()) == [file.name for file in kept]
    assert go(mended, tmp_path)["defend"] == after


def test_a_recipe_that_is_made_is_not_made_otherwise(tmp_path):
    go(tiny_methods.config({"usual": FROZEN}), tmp_path)
    with pytest.raises(ConfigChangedError, match=r"usual-seed0 holds [^$]*decay: 0.96 -> 0.5"):
        go(tiny_methods.config({"usual": {**FROZEN, "decay": 0.5}}), tmp_path)


def test_a_recipe_that_never_moved_has_failed(tmp_path):
    still = {**BROKEN, "epochs": 1}  # too short for as many skips in a row as end a training
    results = go(tiny_methods.config({"still": still, "usual": FROZEN}), tmp_path)["defend"]
    assert set(results["made"]) == {"methods/usual-seed0"}
    assert "all its 3 updates were skipped" in results["failed"]["methods/still-seed0"]


@pytest.mark.parametrize("error", [ValueError, TypeError, Stopped, KeyboardInterrupt])
def test_whatever_is_wrong_with_one_recipe_the_others_are_made(tmp_path, monkeypatch, error):
    train = fitting.train

    def dies(stage, *args, **kwargs):
        if stage.path.name == "full-seed0":
            raise error("no such thing")
        return train(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", dies)
    config = tiny_methods.config({"full": {}, "usual": FROZEN})
    if error in (Stopped, KeyboardInterrupt):
        with pytest.raises(error, match="no such thing"):
            go(config, tmp_path)
        return
    results = go(config, tmp_path)["defend"]
    assert results["failed"] == {"methods/full-seed0": "no such thing"}
    assert set(results["made"]) == {"methods/usual-seed0"}


def test_catastrophic_overfitting_reaches_the_results(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "robust_ssl")
    history = iter([(0.5, 0.5), (1.0, 0.0), (1.0, 0.0)])

    def collapses(*args):
        one_step, pgd = next(history)
        return {
            "validation_clean_accuracy": 1.0,
            "validation_robust_accuracy": pgd,
            "validation_one_step_accuracy": one_step,
        }

    monkeypatch.setattr(fitting, "validate", collapses)
    one_step = {**PGD, "num_steps": 1, "step_size": 10 / 255}
    recipes = {"fgsm_rs": {**ON_ADVERSARIAL, "attack": one_step, "epochs": 3}}
    found = go(tiny_methods.config(recipes), tmp_path)["defend"]["made"]["methods/fgsm_rs-seed0"]
    assert found["catastrophic_overfitting"] == 2
    assert found["best_epoch"] == 1 and found["validation_score"] == 0.5
    assert "fgsm_rs-seed0: catastrophic overfitting at epoch 2" in caplog.text


def test_one_step_training_is_measured_under_its_own_attack_too(tmp_path):
    one_step = {**PGD, "num_steps": 1, "step_size": 10 / 255}
    recipes = {"fgsm_rs": {**ON_ADVERSARIAL, "attack": one_step, "epochs": 1}}
    found = go(tiny_methods.config(recipes), tmp_path)["defend"]["made"]["methods/fgsm_rs-seed0"]
    assert found["catastrophic_overfitting"] is None
    lines = (tmp_path / "methods" / "fgsm_rs-seed0" / "metrics.jsonl").read_text().splitlines()
    assert "validation_one_step_accuracy" in json.loads(lines[-1])


def test_the_layers_that_move_are_those_of_the_table():
    rates = finetuning.rates_for(["encoder/conv1/kernel"], 0.1)
    assert 0.1 in rates.values() and "freeze" in rates.values()


def test_recipes_may_come_to_a_finished_defend(tmp_path):
    before = {"usual": {**FROZEN, "scored": False}}  # only what another started from
    first = go(tiny_methods.config(before), tmp_path)["defend"]["made"]
    more = tiny_methods.config({"usual": FROZEN, "smoothed": SMOOTH})
    second = go(more, tmp_path)["defend"]["made"]
    assert set(second) == {"methods/usual-seed0", "methods/smoothed-seed0"}
    assert second["methods/usual-seed0"] == first["methods/usual-seed0"]
    more.defend.seeds = (0, 1)
    third = go(more, tmp_path)["defend"]["made"]
    assert len(third) == 4 and second.items() <= third.items()


def test_adv_ratio_gives_two_losses_their_weights():
    config = {"methods": {"mixed": {"losses": {}, "adv_ratio": 0.25}, "all": {"adv_ratio": 1.0}}}
    weights = {n: w for n, (_, w) in methods.complete(config, "mixed")["losses"].items()}
    assert weights == {"clean_cross_entropy": 0.75, "adversarial_cross_entropy": 0.25}
    assert list(methods.complete(config, "all")["losses"]) == ["adversarial_cross_entropy"]
    config["methods"]["wrong"] = {"adv_ratio": 1.5}
    with pytest.raises(ValueError, match=r"'wrong': adv_ratio must be in \[0, 1\], got 1.5"):
        methods.complete(config, "wrong")


def test_patience_of_all_is_not_for_a_recipe_without_a_best_epoch():
    last = {"best": "last"}
    config = {"common": {"patience": 3}, "methods": {"a": {}, "b": last}}
    assert methods.complete(config, "a")["patience"] == 3
    assert methods.complete(config, "b")["patience"] is None
    config["methods"]["b"] = {**last, "patience": 2}
    with pytest.raises(ValueError, match="needs a validated epoch"):
        recipes.check_values(methods.complete(config, "b"))


def test_what_a_start_decides_is_not_ignored_silently():
    config = {"methods": {"a": {}, "b": {"start": "a", "head": "linear"}}}
    with pytest.raises(ValueError, match="'b' has both a start and 'head'"):
        methods.complete(config, "b")
