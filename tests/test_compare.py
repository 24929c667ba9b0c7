"""The comparison from end to end: every figure in it is one that a stage has measured."""

import csv

import pytest
import tiny_methods
from tiny_methods import FROZEN, PGD_AT, SMOOTH, UNIVERSAL, go, manifest

from robust_ssl import attacks, report, stages
from robust_ssl.stages import costs, fitting, methods, scoring

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
    left = [row["robust_hardened"] for row in rows]
    assert left == sorted(left, reverse=True)


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
        assert f"| {report.tables.model_name(name)} | 2 |" in page
    assert "usual fine-tuning < PGD-AT" in page or "usual fine-tuning < pgd_at" in page
    assert "For at most 2 points of clean accuracy and 2x the training time" in page
    picture = (workdir / "figures" / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_costs_are_relative_to_the_reference(finished):
    rows = {(r["method"], r["seed"]): r for r in finished[1]["compare"]["rows"]}
    assert rows["full", 0]["cost_factor"] == rows["full", 1]["cost_factor"] == 1
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
    assert measured["smoothed"]["seconds_per_step"] is None


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
    made = tiny_methods.config(
        {
            "usual": FROZEN,
            "full": {},
            "broken": {"losses": {"nan": ("tiny_methods:not_a_number", 1.0)}, "epochs": 8},
        },
        *STAGES,
    )
    results = go(made, tmp_path)
    assert {row["method"] for row in results["compare"]["rows"]} == {"usual", "full"}
    page = (tmp_path / "comparison.md").read_text()
    assert "methods/broken-seed0 failed: the last 2" in page and "lower the learning rate" in page


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
