"""The story of a run: skipped when finished, bit-equal when resumed, refused when changed."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from robust_ssl import attacks, checkpoints, report, settings, stages, trees
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress, Stopped
from robust_ssl.stages import training

QUIET = Progress("quiet")


def layout():
    return Parallel.create(num_devices=2)


def a_run(config):
    return stages.Run(settings.to_json(config), pathlib.Path("nowhere"), layout(), QUIET)


def go(config, workdir):
    return stages.run(config, workdir, parallel=layout(), progress=QUIET)


def final(workdir, stage):
    """The variables a stage left, by path."""
    return flatten_dict(trees.read(workdir / stage / "final"), sep="/")


def manifest(workdir, stage):
    return json.loads((workdir / stage / "manifest.json").read_text())


def metrics(workdir, stage):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def snapshot(folder):
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


def training_everything():
    config = tiny.config("usual")
    config.usual.rates = {"encoder/**": 1e-2, "head/**": 1e-2}
    config.usual.batch_statistics = "clean"
    config.usual.augment = "robust_ssl.pretraining:flip_and_shift"
    return config


# --- What stages share ------------------------------------------------------------------------


def test_the_attacker_gets_no_labels():
    config = tiny.config()
    config.surrogate.source = "tiny:images"
    assert a_run(config).surrogate.labels is None
    assert a_run(config).downstream[0].labels is not None


def test_data_are_read_once_and_carved_by_index():
    run = a_run(tiny.config())
    train, validation = run.downstream
    assert (len(train), len(validation), len(run.test)) == (48, 16, 64)
    assert run.load(run.config["downstream"], "test") is run.load(run.config["downstream"], "test")
    both = np.concatenate([train.images, validation.images])
    assert len(np.unique(both.reshape(64, -1), axis=0)) == 64


def test_limits_and_split_names_are_the_configs():
    config = tiny.config()
    config.downstream.update(train_limit=20, test_limit=8, test_split="test2")
    run = a_run(config)
    assert sum(map(len, run.downstream)) == 20
    assert (len(run.test), run.test.split) == (8, "test2")


def test_every_stage_starts_from_the_same_head():
    heads = [a_run(tiny.config()).classifier("mlp").head_variables for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *heads)


def test_an_encoder_comes_from_a_path_or_from_a_builder():
    config = tiny.config()
    config.encoder = {"path": "somewhere", "builder": "tiny:encoder"}
    with pytest.raises(ValueError, match="a path and also"):
        _ = a_run(config).encoder
    config.encoder = {}
    with pytest.raises(FileNotFoundError, match="pretrain"):
        _ = a_run(config).encoder


def test_a_stages_key_depends_on_seed_and_name_only():
    same = [jax.random.key_data(training.stage_key(1, "stage1")) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    for seed, name in ((1, "stage2"), (2, "stage1")):
        assert not np.array_equal(same[0], jax.random.key_data(training.stage_key(seed, name)))


# --- One stage --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    results = go(training_everything(), workdir)
    return workdir, results


def test_a_stage_leaves_its_result_and_its_metrics(uninterrupted):
    workdir, results = uninterrupted
    assert manifest(workdir, "usual")["status"] == "done"
    lines = metrics(workdir, "usual")
    assert [line["step"] for line in lines] == list(range(6))
    assert {"loss", "clean_accuracy", "clean_cross_entropy", "gradient_norm"} <= lines[0].keys()
    scored = [line for line in lines if "epoch" in line]
    assert [line["step"] for line in scored] == [2, 5]
    best = max(scored, key=lambda line: (line["validation_clean_accuracy"], line["epoch"]))
    assert results["usual"]["best_epoch"] == best["epoch"]
    assert results["usual"]["validation_score"] == pytest.approx(best["validation_clean_accuracy"])
    assert results["usual"]["gradient_evaluations_per_image"] == 2


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_stage_is_bit_equal(stop_after, uninterrupted, tmp_path, monkeypatch):
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_requested", lambda: next(asked) >= stop_after)
        with pytest.raises(Stopped, match=f"after step {stop_after} of 6"):
            go(training_everything(), tmp_path)
    assert manifest(tmp_path, "usual")["status"] == "running"
    assert not (tmp_path / "usual" / "final").exists()
    seen = []
    batches = stages.fitting.data.Batches.__call__
    monkeypatch.setattr(
        stages.fitting.data.Batches,
        "__call__",
        lambda self, step: seen.append(step) or batches(self, step),
    )
    go(training_everything(), tmp_path)
    assert seen == list(range(stop_after, 6))  # goes on, does not start again
    expected, ours = final(uninterrupted[0], "usual"), final(tmp_path, "usual")
    assert expected.keys() == ours.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    assert metrics(tmp_path, "usual") == metrics(uninterrupted[0], "usual")


def test_a_finished_stage_is_skipped(uninterrupted, monkeypatch):
    workdir, results = uninterrupted
    before = snapshot(workdir)
    monkeypatch.setattr(stages.fitting, "train", lambda *a, **k: pytest.fail("it trained again"))
    assert go(training_everything(), workdir) == results
    assert snapshot(workdir) == before


def test_a_changed_config_is_refused_with_the_difference(uninterrupted):
    workdir, _ = uninterrupted
    before = snapshot(workdir)
    config = training_everything()
    config.usual.epochs = 3
    with pytest.raises(checkpoints.ConfigChangedError, match=r"config\.epochs: 2 -> 3"):
        go(config, workdir)
    config = training_everything()
    config.seed = 1
    with pytest.raises(checkpoints.ConfigChangedError, match=r"seed: 0 -> 1"):
        go(config, workdir)
    config = training_everything()
    config.downstream.n = 60
    with pytest.raises(checkpoints.ConfigChangedError, match=r"inputs\.train: "):
        go(config, workdir)
    assert snapshot(workdir) == before


def test_a_frozen_encoder_stays_bit_equal(tmp_path):
    go(tiny.config("usual"), tmp_path)
    public = flatten_dict(dict(tiny.encoder().variables), sep="/")
    ours = final(tmp_path, "usual")
    for path, leaf in public.items():
        collection, _, rest = path.partition("/")
        np.testing.assert_array_equal(ours[f"{collection}/encoder/{rest}"], leaf, err_msg=path)
    head = a_run(tiny.config()).classifier("linear").head_variables["params"]["linear"]["kernel"]
    assert not np.array_equal(ours["params/head/linear/kernel"], head)


def test_one_device_and_two_agree(uninterrupted, tmp_path):
    one = Parallel.create(num_devices=1)
    stages.run(training_everything(), tmp_path, parallel=one, progress=QUIET)
    expected, ours = final(uninterrupted[0], "usual"), final(tmp_path, "usual")
    for path, leaf in expected.items():
        # Adam divides by the gradient's size: rounding in a tiny gradient shows.
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-2, atol=2e-3, err_msg=path)


# --- The whole story --------------------------------------------------------------------------


def whole():
    config = tiny.config()
    config.attack.seeds = (0, 1)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, go(whole(), workdir)


@pytest.mark.slow
def test_results_keep_their_contract(finished):
    workdir, results = finished
    assert list(results) == ["attack", "usual", "stage1", "sensitivity", "stage2", "evaluate"]
    document = report.read_results(workdir / "results.json")  # checks it against the schema
    entries = document["results"]
    assert {entry["model"] for entry in entries} == {"usual", "stage1", "stage2"}
    assert {entry["crafted_against"] for entry in entries} == {"public", "hardened"}
    assert {entry["n"] for entry in entries} == {64}
    for model in ("usual", "stage1", "stage2"):
        ours = [entry for entry in entries if entry["model"] == model]
        assert len({entry["clean_accuracy"] for entry in ours}) == 1
        public = {
            (entry["attack"], entry["seed"])
            for entry in ours
            if entry["crafted_against"] == "public"
        }
        assert {("advencoder", 0), ("universal_pgd", 1), ("embed", 0), ("worst", None)} <= public
        assert (
            "pgd",
            0,
        ) not in public  # it needs labels: whoever has them attacks the model itself
        single = [entry for entry in ours if entry["attack"] != "worst"]
        for worst in (entry for entry in ours if entry["attack"] == "worst"):
            rivals = [
                entry["robust_accuracy"]
                for entry in single
                if all(entry[f] == worst[f] for f in ("crafted_against", "family", "epsilon"))
            ]
            assert worst["robust_accuracy"] <= min(rivals)
    for model, found in document["verdicts"].items():
        assert {entry["verdict"] for entry in entries if entry["model"] == model} == {
            found["verdict"]
        }
        assert {check["number"] for check in found["checks"]} == set(range(1, 28))
    costs = document["run"]["costs"]
    assert costs["stage2"]["gradient_evaluations"] > costs["stage1"]["gradient_evaluations"] > 0


@pytest.mark.slow
def test_the_report_shows_figures_that_exist(finished):
    workdir, _ = finished
    text = (workdir / "report.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(shown) >= 4  # examples, epsilon, stability, sensitivity
    assert all((workdir / path).stat().st_size > 1000 for path in shown)


@pytest.mark.slow
def test_perturbations_can_be_loaded_and_stay_in_their_budget(finished):
    workdir, _ = finished
    files = sorted((workdir / "attack").glob("*.npz"))
    assert len(files) == 3 * 2 * 4  # methods, seeds, budgets
    gray = np.full((1, 8, 8, 3), 0.5, np.float32)
    for file in files:
        perturbation = attacks.UniversalPerturbation.load(file)
        budget = float(re.search(r"eps([\d.]+)-", file.name).group(1)) / 255
        moved = np.abs(np.asarray(perturbation.apply(gray)) - gray)
        assert 0 < moved.max() <= budget + 1e-4


@pytest.mark.slow
def test_only_selected_kernels_move_in_the_second_stage(finished):
    workdir, _ = finished
    selected = manifest(workdir, "sensitivity")["results"]["selected"]
    assert selected
    first, second = final(workdir, "stage1"), final(workdir, "stage2")
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        if path.removeprefix("params/") not in selected:
            np.testing.assert_array_equal(second[path], leaf, err_msg=path)
    guard = manifest(workdir, "stage2")["results"]
    if guard["alpha"] > 0:
        paths = [f"params/{path}" for path in selected]
        assert not any(np.array_equal(first[path], second[path]) for path in paths)


@pytest.mark.slow
def test_both_tracks_move_in_the_first_stage(finished):
    workdir, _ = finished
    public = flatten_dict(dict(tiny.encoder().variables), sep="/")
    first = final(workdir, "stage1")
    for path, leaf in public.items():
        collection, _, rest = path.partition("/")
        assert not np.array_equal(first[f"{collection}/encoder/{rest}"], leaf), path


@pytest.mark.slow
def test_a_finished_run_is_skipped_whole(finished, monkeypatch):
    workdir, results = finished
    before = snapshot(workdir)

    def again(*args, **kwargs):
        pytest.fail("something was computed again")

    monkeypatch.setattr(stages.fitting, "train", again)
    monkeypatch.setattr(attacks, "fit", again)
    monkeypatch.setattr(stages.evaluate_stage.evaluation, "score", again)
    assert go(whole(), workdir) == results
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_a_changed_run_is_refused_and_loses_nothing(finished):
    workdir, _ = finished
    before = snapshot(workdir)
    config = whole()
    config.finetune.adv_ratio = 0.5
    with pytest.raises(checkpoints.ConfigChangedError, match=r"adv_ratio: 0\.7 -> 0\.5"):
        go(config, workdir)
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_the_quickstart_runs_at_smoke_size(tmp_path):
    config = settings.load_config(str(tiny.CONFIGS / "quickstart.py")).unlock()
    config.encoder = {"builder": "resnet18", "width": 8, "image_size": 32, "stem": "cifar_half"}
    config.surrogate.n = 128
    config.downstream.update(train_limit=256, test_limit=64)
    config.attack.num_steps = 2
    for stage in ("usual", "finetune", "stage2"):
        config[stage].epochs = 1
    config.finetune.attack.num_steps = 2
    config.sensitivity.update(images=16, num_steps=1)
    config.evaluate.batch_size = 32
    config.evaluate.per_image.num_steps = 2
    go(config, tmp_path)
    document = report.read_results(tmp_path / "results.json")
    assert {entry["n"] for entry in document["results"]} == {64}
    assert (tmp_path / "report.md").exists()
