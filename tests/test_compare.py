"""The comparison from end to end: every figure in it is one that a stage has measured."""

import csv
import json
import shutil

import numpy as np
import pytest
import tiny_methods
from tiny_methods import (
    BROKEN,
    FROZEN,
    ON_ADVERSARIAL,
    PGD_AT,
    SMOOTH,
    UNIVERSAL,
    go,
    manifest,
)

from robust_ssl import attacks, finetuning, report, stages
from robust_ssl.stages import compare, costs, fitting, methods, scoring

pytestmark = pytest.mark.slow  # a minute: each recipe and each attack is compiled

RECIPES = {
    "usual": FROZEN,
    "full": {},
    "pgd_at": PGD_AT,
    "universal": UNIVERSAL,
    "smoothed": SMOOTH,
    "ensemble": {"members": ("usual", "pgd_at")},
}
STAGES = ("attack", "defend", "protocol", "compare")


def config():
    made = tiny_methods.config(RECIPES, *STAGES)
    made.defend.seeds = (0, 1)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare")
    return workdir, go(config(), workdir)


def entries(workdir, model, against):
    """Of the leaderboard: the worst case per image over the suite, at its main budget."""
    found = report.read_results(workdir / "leaderboard.json")["results"]
    mine = [e for e in found if e["model"] == model and e["crafted_against"] == against]
    mine = [e for e in mine if e["family"] == "universal" and round(e["epsilon"], 6) == 0.039216]
    return next((e for e in mine if e["attack"] == "worst"), None) or mine[0]


def test_every_recipe_and_seed_has_a_row_that_agrees_with_the_leaderboard(finished):
    workdir, results = finished
    rows = results["compare"]["rows"]
    assert {(r["method"], r["seed"]) for r in rows} == {(n, s) for n in RECIPES for s in (0, 1)}
    for row in rows:
        model = methods.model_name(row["method"], row["seed"])
        public, hardened = (entries(workdir, model, w) for w in ("public", "hardened"))
        assert row["clean"] == public["clean_accuracy"]
        assert row["robust_public"] == public["robust_accuracy"]
        assert row["robust_hardened"] == hardened["robust_accuracy"]
        assert (row["images"], row["verdict"]) == (64, "not examined")
        assert row["autoattack"] is None and row["autoattack_images"] is None
    left = [row["robust_worst"] for row in rows]
    assert left == sorted(left, reverse=True)


def test_methods_are_compared_image_by_image(finished):
    workdir, results = finished
    with np.load(workdir / "protocol" / "outcomes.npz") as stored:
        outcomes = dict(stored)
    run = tiny_methods.a_run(config(), workdir)
    for row in results["compare"]["rows"]:
        right = compare.images_right(run, outcomes, row["method"], row["seed"])
        # No AutoAttack was asked for.
        assert {*right} == {"clean", "robust_public", "robust_hardened", "robust_worst"}
        for share, each in right.items():
            assert each.shape == (64,) and each.mean() == row[share]
        assert row["robust_worst"] <= min(row["robust_public"], row["robust_hardened"])


def test_the_files_say_what_the_rows_say(finished):
    workdir, results = finished
    with open(workdir / "comparison.csv") as file:
        written = list(csv.DictReader(file))
    for line, row in zip(written, results["compare"]["rows"], strict=True):
        assert (line["method"], int(line["seed"])) == (row["method"], row["seed"])
        for name in ("clean", "robust_public", "robust_hardened", "gradients", "cost_factor"):
            assert float(line[name]) == row[name]
    page = (workdir / "comparison.md").read_text()
    for name in RECIPES:
        assert f"| {report.tables.method_name(name)} | 2 |" in page
    order = "The order usual (frozen encoder) < pgd_at, which Zhou et al. (IEEE S&P 2024) report,"
    assert page.count(order) == 3  # by both suites and together; clean needs one more than usual
    assert "and 2x the training time of usual fine-tuning of all layers, " in page
    picture = (workdir / "figures" / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_the_page_says_what_was_compared(finished):
    page = (finished[0] / "comparison.md").read_text()
    assert "Encoder tiny; surrogate " in page and " (32 images); downstream set " in page
    assert ": 48 training, 16 validation and 64 test images." in page
    assert "Training: 2 epochs of batches of 16, seeds 0, 1; the best epoch" in page
    assert "8/255 for pgd_at; 10.2/255 for universal." in page
    assert (
        "Attacked at epsilon 10/255 by the suite random_noise, universal_pgd (2 steps), fitted "
        "with seeds 0."
    ) in page
    assert "choosing layers counts by its gradients" in page


def test_costs_are_relative_to_the_reference(finished):
    rows = {(r["method"], r["seed"]): r for r in finished[1]["compare"]["rows"]}
    assert rows["full", 0]["cost_factor"] == rows["full", 1]["cost_factor"] == 1
    each = {name: rows[name, 0]["gradients_per_epoch"] for name in RECIPES}
    assert each == {
        **{"usual": 1.0, "full": 1.0, "pgd_at": 3.0, "universal": 1.0},
        **{"smoothed": None, "ensemble": None},
    }
    gradients = {name: rows[name, 0]["gradients"] for name in RECIPES}
    assert gradients == {
        "usual": 1.0,
        "full": 1.0,
        "pgd_at": 3.0,  # two steps of PGD and the update's own
        "universal": 1.0,
        "smoothed": 1.0,  # its start's
        "ensemble": 4.0,  # its members'
    }
    assert rows["smoothed", 0]["cost_factor"] == rows["usual", 0]["cost_factor"] > 0
    together = rows["usual", 0]["cost_factor"] + rows["pgd_at", 0]["cost_factor"]
    assert rows["ensemble", 0]["cost_factor"] == pytest.approx(together)
    assert rows["universal", 0]["training_seconds"] > 0


def test_a_cost_is_steps_times_seconds(finished):
    workdir, _ = finished
    measured = manifest(workdir, "cost")["results"]
    assert set(measured) == set(RECIPES)
    reference = measured["full"]["seconds_per_step"]
    for name in ("usual", "pgd_at", "universal"):
        expected = measured[name]["seconds_per_step"] / reference  # all have six steps
        assert measured[name]["factor"] == pytest.approx(expected)
        per_image = measured[name]["seconds_per_step"] / 16
        assert measured[name]["seconds_per_image"] == pytest.approx(per_image)
    assert measured["smoothed"]["seconds_per_step"] is None


def test_choosing_layers_counts_by_its_gradients_and_replays_by_the_images(monkeypatch, tmp_path):
    """Closed forms, with measurements that are made up."""
    free = {"function": "robust_ssl.finetuning:FreeReplays", "epsilon": 0.03, "replays": 2}
    recipes = {"full": {}, "free": {**ON_ADVERSARIAL, "attack": free}, "rift": {"start": "full"}}
    run = tiny_methods.a_run(tiny_methods.config(recipes), tmp_path)
    found = {
        "full": {"epochs": 2, "steps": 6, "gradient_evaluations_per_image": 4},
        "free": {"epochs": 2, "steps": 12, "gradient_evaluations_per_image": 4},
        "rift": {
            **{"epochs": 1, "steps": 3, "gradient_evaluations_per_image": 1},
            **{"selection_gradient_evaluations_per_image": 10, "selection_seconds": 1e9},
        },
    }
    own = {n: costs._own(run, n, found[n], finetuning.Cost(0.5, None)) for n in found}
    assert own["full"]["seconds_per_image"] == 0.5 / 16
    assert own["free"]["seconds_per_image"] == 2 * 0.5 / 16
    assert [own[n]["gradients_per_epoch"] for n in found] == [2, 2, 1]
    assert costs._seconds(run, ["full"], found, own) == 6 * 0.5
    selecting = 10 * 48 * (0.5 / 16 / 2)
    assert costs._seconds(run, ["rift", "full"], found, own) == 6 * 0.5 + 3 * 0.5 + selecting


def test_a_comparison_follows_what_was_scored_again(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    file = workdir / "protocol" / "manifest.json"
    scored = json.loads(file.read_text())
    scored["results"]["verdicts"]["usual-seed0"]["verdict"] = "not trusted"
    file.write_text(json.dumps(scored))
    rows = go(config(), workdir)["compare"]["rows"]
    marked = {(r["method"], r["seed"]) for r in rows if r["verdict"] == "not trusted"}
    assert marked == {("usual", 0)}
    assert "usual,0,not trusted," in (workdir / "comparison.csv").read_text()


def test_what_went_wrong_in_training_is_said():
    fine = {"skipped": 0, "steps": 6, "catastrophic_overfitting": None}
    made = {
        "made": {
            "methods/fine-seed0": fine,
            "methods/fgsm_rs-seed1": {**fine, "catastrophic_overfitting": 3, "best_epoch": 2},
            "methods/shaky-seed0": {**fine, "skipped": 2},
        },
        "failed": {"methods/broken-seed0": "no luck"},
    }
    assert compare.happened(made) == [
        "methods/broken-seed0 failed: no luck.",
        "fgsm_rs-seed1 overfitted catastrophically at epoch 3: it withstood the one step of its "
        "own attack and no longer PGD; the weights of epoch 2 were kept.",
        "shaky-seed0: 2 of 6 updates were skipped, as they were not finite.",
    ]


def test_the_same_command_again_recomputes_nothing(finished, monkeypatch):
    workdir, results = finished
    before = tiny_methods.snapshot(workdir)

    def never(*args, **kwargs):
        pytest.fail("this was done before")

    for place, name in (
        (fitting, "train"),
        (costs, "_measure_steps"),
        (attacks, "fit"),
        (scoring.Scorer, "_score"),
    ):
        monkeypatch.setattr(place, name, never)
    assert go(config(), workdir) == results
    after = tiny_methods.snapshot(workdir)
    assert {name: text for name, (_, text) in after.items()} == {
        name: text for name, (_, text) in before.items()
    }
    rewritten = {name for name in after if after[name][0] != before[name][0]}
    assert rewritten <= {"comparison.csv", "comparison.md", *_pictures(before)}


def _pictures(files):
    return {name for name in files if name.startswith("figures/")}


def test_a_recipe_that_failed_is_named_and_not_compared(tmp_path):
    recipes = {"usual": FROZEN, "full": {}}
    go(tiny_methods.config(recipes, *STAGES), tmp_path)  # finished before the broken one comes
    results = go(tiny_methods.config({**recipes, "broken": BROKEN}, *STAGES), tmp_path)
    assert {row["method"] for row in results["compare"]["rows"]} == {"usual", "full"}
    assert set(results["compare"]["failed"]) == {"methods/broken-seed0"}
    page = (tmp_path / "comparison.md").read_text()
    assert "methods/broken-seed0 failed: the last 2" in page and "lower the learning rate" in page


def test_without_the_reference_there_are_no_cost_factors(tmp_path):
    results = go(tiny_methods.config({"usual": FROZEN, "full": BROKEN}, *STAGES), tmp_path)
    [row] = results["compare"]["rows"]
    assert row["method"] == "usual" and row["cost_factor"] is None
    assert row["seconds_per_image"] > 0 and row["gradients"] == 2 / BROKEN["epochs"]
    assert "methods/full-seed0 failed" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compare.reference": "fool"}, "config.compare.reference is 'fool'"),
        ({"compare.reference": "smoothed"}, "nothing is trained"),
        ({"methods.universal.batch_size": 8}, "one batch size"),
        ({"protocol.adaptive": False}, "config.protocol.adaptive"),
        ({"attack.methods": {"n": {"function": "robust_ssl.attacks:RandomNoise"}}}, "noise"),
        ({"sweep": None}, "config.*sweep"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_step(tmp_path, change, says):
    made = config()
    made.methods = {**RECIPES, "universal": {**UNIVERSAL, "batch_size": 16}}
    for path, value in change.items():
        *parents, last = path.split(".")
        place = made
        for parent in parents:
            place = place[parent]
        del place[last]
        if value is not None:
            place[last] = value
    with pytest.raises(stages.UsageError, match=f"(?s){says}"):
        go(made, tmp_path)
    assert not list(tmp_path.iterdir())
