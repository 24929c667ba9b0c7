"""The story of a run: skipped when finished, bit-equal when resumed, refused when changed."""

import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
import tiny_recipes
from flax.traverse_util import flatten_dict
from tiny_recipes import context, final, go, manifest, snapshot

from robust_ssl import attacks, experiment, report
from robust_ssl.experiment import fitting, groups, loop
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.experiment.train import load_trained
from robust_ssl.stopping import Stopped
from robust_ssl.workdir import ConfigChangedError, WorkdirError, open_stage

pytestmark = pytest.mark.usefixtures("quick_programs")

ONE = "recipes/everything-seed0"
EVERYTHING = {
    "best": "highest",
    "rates": {"encoder/**": 1e-2, "head/**": 1e-2},
    "augment": "robust_ssl.pretraining:flip_and_shift",
}


def metrics(workdir, stage):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def training_everything(**entries):
    return tiny_recipes.config({"everything": {**EVERYTHING, **entries}})


# --- What stages share ------------------------------------------------------------------------


def test_the_attacker_gets_no_labels(tmp_path):
    config = tiny.config()
    config.surrogate.function = "tiny:images"
    run = context(config, tmp_path)
    assert run.surrogate.labels is None
    assert run.downstream[0].labels is not None


def test_data_are_read_once_and_carved_by_index(tmp_path):
    run = context(tiny.config(), tmp_path)
    train, validation = run.downstream
    assert (len(train), len(validation), len(run.test)) == (48, 16, 64)
    assert run.load(run.plan.downstream, "test") is run.load(run.plan.downstream, "test")
    both = np.concatenate([train.images, validation.images])
    assert len(np.unique(both.reshape(64, -1), axis=0)) == 64


def test_images_that_a_function_makes_get_the_encoders_size(tmp_path):
    config = tiny.config().unlock()
    config.surrogate = {"function": "robust_ssl.data:photo_crops", "n": 4}
    assert context(config, tmp_path).surrogate.image_shape == (tiny.SIZE, tiny.SIZE, 3)
    config.surrogate.image_size = 2 * tiny.SIZE  # what is said is not overruled
    with pytest.raises(ValueError, match=f"the encoder takes {tiny.SIZE}x{tiny.SIZE}"):
        _ = context(config, tmp_path).surrogate


def test_limits_and_split_names_are_the_configs(tmp_path):
    config = tiny.config()
    config.downstream.update(train_limit=20, test_limit=8, test_split="test2")
    run = context(config, tmp_path)
    assert sum(map(len, run.downstream)) == 20
    assert (len(run.test), run.test.split) == (8, "test2")


def test_every_recipe_starts_from_the_same_head(tmp_path):
    runs = [context(tiny.config(), tmp_path) for _ in range(2)]
    heads = [run.classifier(run.encoder, "mlp", 0).head_variables for run in runs]
    jax.tree.map(np.testing.assert_array_equal, *heads)


def test_an_encoder_that_is_yet_to_be_trained_is_missed(tmp_path):
    config = tiny.config()
    config.encoder = {}
    with pytest.raises(experiment.UsageError, match=r"needs config\.encoder"):
        experiment.plan(config)


def test_a_stages_key_depends_on_seed_and_name_only():
    same = [jax.random.key_data(loop.stage_key(1, "one")) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    for seed, name in ((1, "two"), (2, "one")):
        assert not np.array_equal(same[0], jax.random.key_data(loop.stage_key(seed, name)))


def test_a_recipe_shows_itself_by_name():
    assert repr(Recipe("mine")) == "Recipe('mine')"


# --- One training -----------------------------------------------------------------------------


def wandering(split="train"):
    """Images of a function that changes the process's directory."""
    os.chdir("/")
    return tiny.images(split)


def test_a_data_function_that_changes_directory_moves_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "wandering", wandering, raising=False)
    config = training_everything()
    config.unlock().downstream = {"function": "tiny:wandering"}
    go(config, "run")
    assert pathlib.Path.cwd() == pathlib.Path("/")
    assert (tmp_path / "run" / ONE / "manifest.json").is_file()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, go(training_everything(), workdir)


def test_a_training_leaves_its_result_and_its_metrics(uninterrupted):
    workdir, results = uninterrupted
    results = results["train"]["trained"]["everything-seed0"]
    assert manifest(workdir, ONE)["status"] == "done"
    lines = metrics(workdir, ONE)
    assert [line["step"] for line in lines] == list(range(6))
    assert {"loss", "clean_accuracy", "clean_cross_entropy", "gradient_norm"} <= lines[0].keys()
    scored = [line for line in lines if "epoch" in line]
    assert [line["step"] for line in scored] == [2, 5]
    best = max(scored, key=lambda line: (line["validation_clean_accuracy"], line["epoch"]))
    assert results["best_epoch"] == best["epoch"]
    assert results["validation_score"] == pytest.approx(best["validation_clean_accuracy"])
    assert results["gradient_evaluations_per_image"] == 2
    assert not (workdir / ONE / "final").exists()  # classifier/ is the one form of it


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_training_is_bit_equal(stop_after, uninterrupted, tmp_path, monkeypatch):
    steps = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_requested", lambda: next(steps) >= stop_after)
        with pytest.raises(Stopped, match=f"after step {stop_after} of 6"):
            go(training_everything(), tmp_path)
    assert manifest(tmp_path, ONE)["status"] == "running"
    assert not (tmp_path / ONE / "classifier").exists()
    seen = []
    batches = fitting.data.Batches.__call__
    monkeypatch.setattr(
        fitting.data.Batches,
        "__call__",
        lambda self, step: seen.append(step) or batches(self, step),
    )
    go(training_everything(), tmp_path)
    assert seen == list(range(stop_after, 6))  # goes on, does not start again
    expected, ours = final(uninterrupted[0], "everything"), final(tmp_path, "everything")
    assert expected.keys() == ours.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    assert metrics(tmp_path, ONE) == metrics(uninterrupted[0], ONE)


def test_a_finished_training_is_skipped(uninterrupted, monkeypatch):
    workdir, results = uninterrupted
    before = snapshot(workdir)
    monkeypatch.setattr(fitting, "train", lambda *a, **k: pytest.fail("it trained again"))
    assert go(training_everything(), workdir) == results
    assert snapshot(workdir) == before


def test_a_changed_config_is_refused_with_the_difference(uninterrupted):
    workdir, _ = uninterrupted
    before = snapshot(workdir)
    with pytest.raises(ConfigChangedError, match=r"config\.recipe\.epochs: 2 -> 3"):
        go(training_everything(epochs=3), workdir)
    config = training_everything()
    config.training.validation["num_steps"] = 3
    with pytest.raises(ConfigChangedError, match=r"validation\.num_steps: 2 -> 3"):
        go(config, workdir)
    config = training_everything()
    config.downstream.n = 60
    for call in (go, lambda *given: experiment.check(context(*given))):
        with pytest.raises(ConfigChangedError, match=r"inputs\.train: its content is another one"):
            call(config, workdir)
    assert snapshot(workdir) == before


def test_other_test_images_are_refused_before_anything_is_trained(tmp_path):
    config = tiny.config("attack", "train", "score")
    images = context(config, tmp_path).test.fingerprint()
    with open_stage(tmp_path, "score", {}, {"test": images}, 0):
        pass
    config.downstream.test_limit = 60
    with pytest.raises(ConfigChangedError, match=r"/score [^$]*inputs\.test: its content"):
        experiment.check(context(config, tmp_path))


def test_weights_that_were_changed_are_not_believed(uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "run")
    again = tmp_path / "again"
    go(training_everything(epochs=1), again)
    # A whole classifier of another training, whose own checksums agree.
    shutil.rmtree(workdir / ONE / "classifier")
    shutil.copytree(again / ONE / "classifier", workdir / ONE / "classifier")
    run = context(training_everything(), workdir)
    with pytest.raises(WorkdirError, match="is not what was trained there"):
        load_trained(run, run.plan.recipes["everything"], 0)


def test_a_frozen_encoder_stays_bit_equal(tmp_path):
    go(tiny_recipes.config({"baseline": tiny_recipes.FROZEN}), tmp_path)
    public = flatten_dict(dict(tiny.encoder().variables), sep="/")
    ours = final(tmp_path, "baseline")
    for path, leaf in public.items():
        collection, _, rest = path.partition("/")
        np.testing.assert_array_equal(ours[f"{collection}/encoder/{rest}"], leaf, err_msg=path)
    run = context(tiny.config(), tmp_path)
    head = run.classifier(run.encoder, "linear", 0).head_variables["params"]["linear"]["kernel"]
    assert not np.array_equal(ours["params/head/linear/kernel"], head)


def test_one_device_and_two_agree(uninterrupted, tmp_path):
    one = tiny_recipes.layout(1)
    experiment.run(training_everything(), tmp_path, parallel=one, progress=tiny_recipes.QUIET)
    expected, ours = final(uninterrupted[0], "everything"), final(tmp_path, "everything")
    for path, leaf in expected.items():
        # Adam divides by the gradient's size: rounding in a tiny gradient shows.
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-2, atol=2e-3, err_msg=path)


def test_a_workdir_of_before_is_refused_whole(uninterrupted, tmp_path):
    old = tmp_path / "usual"
    old.mkdir()
    record = {**manifest(uninterrupted[0], ONE), "schema": 1}
    (old / "manifest.json").write_text(json.dumps(record))
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=r"robust_ssl 0\.1: usual; take another --workdir"):
        go(training_everything(), tmp_path)
    assert snapshot(tmp_path) == before


def test_a_plan_that_cannot_be_made_leaves_no_file(tmp_path):
    config = training_everything()
    config.recipes.everything["epoch"] = 1
    with pytest.raises(experiment.UsageError, match=r"unknown entry 'epoch'.*'epochs'"):
        go(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- The whole story --------------------------------------------------------------------------

RECIPES = ("baseline", "gen_af_stage1", "gen_af")
MODELS = {f"{name}-seed0" for name in RECIPES}


def whole():
    config = tiny.config()
    config.suite.seeds = (0, 1)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, go(whole(), workdir)


@pytest.mark.slow
def test_results_keep_their_contract(finished):
    workdir, results = finished
    assert list(results) == ["attack", "train", "score", "compare"]
    document = report.results.read(workdir / "results.json")  # checks it against the schema
    entries = document["results"]
    assert {entry["model"] for entry in entries} == MODELS
    assert {entry["crafted_against"] for entry in entries} == {"public", "hardened"}
    assert {entry["n"] for entry in entries} == {64}
    for model in MODELS:
        ours = [entry for entry in entries if entry["model"] == model]
        assert len({entry["clean_accuracy"] for entry in ours}) == 1
        public = {(e["attack"], e["seed"]) for e in ours if e["crafted_against"] == "public"}
        assert {("advencoder", 0), ("universal_pgd", 1), ("embed", 0), ("worst", None)} <= public
        # It needs labels: whoever has them attacks the model itself.
        assert ("pgd", 0) not in public
        single = [entry for entry in ours if entry["attack"] != "worst"]
        for worst in (entry for entry in ours if entry["attack"] == "worst"):
            group = ("crafted_against", "family", "epsilon")
            rivals = [
                entry["robust_accuracy"]
                for entry in single
                if all(entry[field] == worst[field] for field in group)
            ]
            assert worst["robust_accuracy"] <= min(rivals)
    for model, verdict in document["verdicts"].items():
        words = {entry["verdict"] for entry in entries if entry["model"] == model}
        assert words == {verdict["verdict"]}
        assert {check["number"] for check in verdict["checks"]} == set(range(1, 30))
    costs = {row["recipe"]: row["gradients"] for row in document["comparison"]["rows"]}
    assert costs["gen_af"] > costs["gen_af_stage1"] > costs["baseline"] > 0


@pytest.mark.slow
def test_the_report_shows_figures_that_exist(finished):
    workdir, _ = finished
    text = (workdir / "report.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(shown) >= 5  # pareto, examples, epsilon, stability, sensitivity
    assert all((workdir / path).stat().st_size > 1000 for path in shown)


@pytest.mark.slow
def test_perturbations_can_be_loaded_and_stay_in_their_budget(finished):
    workdir, _ = finished
    files = sorted((workdir / "attack").glob("*.npz"))
    assert len(files) == 3 * 2 * 4  # attacks, seeds, budgets
    gray = np.full((1, 8, 8, 3), 0.5, np.float32)
    for file in files:
        perturbation = attacks.UniversalPerturbation.load(file)
        budget = float(re.search(r"eps([\d.]+)-", file.name).group(1)) / 255
        moved = np.abs(np.asarray(perturbation.apply(gray)) - gray)
        assert 0 < moved.max() <= budget + 1e-4


@pytest.mark.slow
def test_only_selected_kernels_move_in_the_second_stage(finished):
    workdir, _ = finished
    selected = manifest(workdir, "recipes/gen_af-seed0-layers")["results"]["selected"]
    assert selected
    first, second = final(workdir, "gen_af_stage1"), final(workdir, "gen_af")
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        if path.removeprefix("params/") not in selected:
            np.testing.assert_array_equal(second[path], leaf, err_msg=path)
    if manifest(workdir, "recipes/gen_af-seed0")["results"]["alpha"] > 0:
        paths = [f"params/{path}" for path in selected]
        assert not any(np.array_equal(first[path], second[path]) for path in paths)


@pytest.mark.slow
def test_both_tracks_move_in_the_first_stage(finished):
    workdir, _ = finished
    public = flatten_dict(dict(tiny.encoder().variables), sep="/")
    first = final(workdir, "gen_af_stage1")
    for path, leaf in public.items():
        collection, _, rest = path.partition("/")
        assert not np.array_equal(first[f"{collection}/encoder/{rest}"], leaf), path


@pytest.mark.slow
def test_a_finished_run_is_skipped_whole(finished, monkeypatch):
    workdir, results = finished
    before = snapshot(workdir)

    def again(*args, **kwargs):
        pytest.fail("something was computed again")

    monkeypatch.setattr(fitting, "train", again)
    monkeypatch.setattr(attacks, "fit", again)
    monkeypatch.setattr(groups.evaluation, "score", again)
    assert go(whole(), workdir) == results
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_a_changed_run_is_refused_and_loses_nothing(finished):
    workdir, _ = finished
    before = snapshot(workdir)
    config = whole()
    config.recipes.gen_af_stage1.adv_ratio = 0.5
    with pytest.raises(ConfigChangedError, match=r"adv_ratio: 0\.7 -> 0\.5"):
        go(config, workdir)
    assert snapshot(workdir) == before
