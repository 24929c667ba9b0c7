"""A grid over a recipe's entries: each point once, impossible ones named, on validation only."""

import csv
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tiny_recipes
from tiny_recipes import BROKEN, FROZEN, UNIVERSAL, context, go, manifest

from robust_ssl import evaluation, experiment, progress, report, settings, stopping
from robust_ssl.cli import flags, main
from robust_ssl.cli import run as cli_run
from robust_ssl.experiment import costs, fitting, sweep, trace, train
from robust_ssl.finetuning import cost
from robust_ssl.stopping import Stopped
from robust_ssl.workdir import ConfigChangedError
from robust_ssl.workdir.manifest import seal

pytestmark = pytest.mark.usefixtures("quick_programs")

RECIPES = {"baseline": FROZEN, "full": {}, "universal": UNIVERSAL}
GRID = (("attack.epsilon", (0.02, 0.04, 7.0)),)
POINTS = ["universal epsilon 0.02", "universal epsilon 0.04"]
WEIGHT = "losses.adversarial_cross_entropy.weight"


def config(grid=GRID, recipe="universal", **recipes):
    changed = tiny_recipes.config({**RECIPES, **recipes}, "attack", "sweep")
    changed.compare.claims = ()
    changed.sweep = {"recipe": recipe, "grid": grid}
    return changed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep, what it trained, and the images it scored."""
    workdir, trained, scored = tmp_path_factory.mktemp("sweep"), [], []
    train_steps, score = fitting.train, evaluation.score

    def spied_train(stage, *args, **kwargs):
        trained.append(stage.path.name)
        return train_steps(stage, *args, **kwargs)

    def spied_score(model, batches, *args, **kwargs):
        batches = list(batches)
        scored.extend(np.asarray(image) for batch in batches for image in batch["images"])
        return score(model, iter(batches), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "train", spied_train)
        patch.setattr(evaluation, "score", spied_score)
        results = go(config(), workdir)
    return workdir, results["sweep"], trained, scored


SECOND = {"start": "universal", "rates": {"encoder/**": "freeze", "head/**": 1e-3}}
DEEP = (("start.attack.epsilon", (0.02,)), ("weight_decay", (0.0, 1e-3)))


# --- Before the first step --------------------------------------------------------------------


def test_points_are_tried_and_warned_about_once_in_a_run(tmp_path, monkeypatch, caplog):
    tried, check_recipe = [], trace.check_recipe

    def counts(run, recipe):
        tried.append(recipe.name)
        if recipe.name.startswith("universal"):  # tracing the others' steps has no part in this
            check_recipe(run, recipe)

    monkeypatch.setattr(trace, "check_recipe", counts)
    run = context(config(), tmp_path)
    *_, impossible = sweep.with_points(run)
    assert list(impossible) == ["universal epsilon 7"]
    assert sweep.with_points(run)[2] is impossible
    assert tried == ["baseline", "full", *POINTS]
    assert caplog.text.count("is impossible and left out") == 1


def test_a_point_that_the_workdir_has_with_other_values_is_named(tmp_path):
    def with_points(epsilon):
        return sweep.with_points(context(config((("attack.epsilon", (epsilon,)),)), tmp_path))

    run, *_ = with_points(0.02)
    recipe = run.plan.recipes[POINTS[0]]
    run.open(train.directory(recipe, 0), fitting.settings_of(run, recipe), {}).close()
    assert not with_points(0.02)[2]
    with pytest.raises(ConfigChangedError) as caught:
        with_points(0.020001)
    assert f"a point {POINTS[0]!r} with other settings" in str(caught.value)
    assert "config.recipe.attack.epsilon: 0.02 -> 0.020001" in str(caught.value)


@pytest.mark.parametrize(("stage", "entry"), [("sweep", "max_cost"), ("sweep_cost", "rounds")])
def test_settings_of_a_finished_sweep_are_compared_before_a_point_is_made(tmp_path, stage, entry):
    run, *_ = sweep.with_points(context(config(), tmp_path))
    told = sweep._told(run.plan) if stage == "sweep" else costs._timing(run)
    run.open(stage, told, {}, run.plan.seed).close()
    changed = config()
    changed.compare[entry] = 7
    with pytest.raises(ConfigChangedError, match=rf"{entry}: .* -> 7"):
        sweep.with_points(context(changed, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grid": (("attack.epsilon", (7.0, 8.0)),)},
            "no point .* possible: .*epsilon must lie",
        ),
        ({"grid": (("attack.epsilom", (0.1,)),)}, "did you mean attack.epsilon"),
        ({"grid": (("start.epochs", (1,)),)}, "'start.epochs' leads to no setting"),
        ({"grid": ()}, "the grid is empty"),
        ({"grid": GRID[0]}, "must be a list of .path, values. pairs, got 'attack.epsilon'"),
        ({"grid": (("batch_statistics", "both"),)}, "list of values, got 'both'"),
        ({"grid": GRID + GRID}, "'attack.epsilon' is there twice"),
        ({"grid": (("batch_size", (8,)),)}, "no point .* one batch size"),
        ({"recipe": "universel"}, "config.sweep.recipe is 'universel'.* did you mean 'universal'"),
        ({"recpe": "universal"}, "unknown entry 'recpe' in config.sweep; did you mean 'recipe'"),
    ],
)
def test_a_wrong_sweep_is_refused_before_the_first_step(tmp_path, options, message):
    changed = config()
    changed.sweep = {**changed.sweep, **options}
    with pytest.raises(experiment.UsageError, match=f"(?s){message}") as caught:
        go(changed, tmp_path)
    assert "config.sweep" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_points_are_held_against_must_be_there(tmp_path):
    changed = config()
    changed.compare.baseline = "baselin"
    with pytest.raises(experiment.UsageError, match=r"compare\.baseline .*did you mean 'baseline'"):
        go(changed, tmp_path)


# --- What it leaves ---------------------------------------------------------------------------


def test_a_start_that_is_swept_is_made_once(tmp_path):
    results = go(config(DEEP, "second", second=SECOND), tmp_path)["sweep"]
    assert [row["point"] for row in results["rows"][1:]] == [
        "second epsilon 0.02 weight_decay 0",
        "second epsilon 0.02 weight_decay 0.001",
    ]
    names = {path.name.split("-")[0] for path in (tmp_path / "recipes").iterdir()}
    starts = {name for name in names if name.startswith("universal")}
    assert len(starts) == 1 and "universal" not in starts


def test_an_impossible_point_is_named_and_the_others_are_made(finished):
    workdir, results, trained, _ = finished
    assert [row["point"] for row in results["rows"]] == ["baseline", *POINTS]
    assert set(results["failed"]) == {"universal epsilon 7"}
    assert "epsilon must lie in [0, 1]" in results["failed"]["universal epsilon 7"]
    page = (workdir / "sweep.md").read_text()
    assert "universal epsilon 7 is left out: " in page and "epsilon must lie in [0, 1]" in page
    assert page.startswith("Within 2 points of clean accuracy and 2x the reference's training time")
    assert "16 validation images" in page
    names = ["baseline", "full", *POINTS]
    assert sorted(trained) == [f"{name}-seed0" for name in names]


def test_the_table_says_what_the_results_say(finished):
    workdir, results, *_ = finished
    with open(workdir / "sweep.csv") as file:
        *lines, last = csv.DictReader(file)
    measured = manifest(workdir, "sweep_cost")["results"]
    for line, row in zip(lines, results["rows"], strict=True):
        costs = measured[row["point"]]
        assert line["point"] == row["point"]
        for name in ("clean", "robust", "cost"):
            assert float(line[name]) == row[name]
        for name in ("gradients", "seconds_per_image"):
            assert float(line[name]) == costs[name]
        assert 0 <= row["robust"] <= 1 and row["cost"] == costs["factor"] > 0
        assert row["clean"] * 16 == round(row["clean"] * 16)
        assert line["peak_bytes"] == line["why"] == ""
    assert [line["attack.epsilon"] for line in lines] == ["", "0.02", "0.04"]
    assert (last["point"], last["attack.epsilon"]) == ("universal epsilon 7", "7.0")
    assert "epsilon must lie in [0, 1]" in last["why"] and last["clean"] == last["cost"] == ""
    assert (workdir / "figures" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_scored_but_validation_images(finished):
    workdir, *_, scored = finished
    _, validation = context(config(), workdir).downstream
    attacked = {image.tobytes() for image in scored}
    assert attacked == {np.asarray(image).tobytes() for image in validation.images}
    assert not attacked & {image.tobytes() for image in tiny.images("test")[0]}


def test_points_are_the_recipes_of_these_settings(finished, tmp_path):
    """A point is trained as the recipe with its settings is."""
    workdir, *_ = finished
    at_002 = {**UNIVERSAL, "attack": {**UNIVERSAL["attack"], "epsilon": 0.02}}
    entries = settings.to_json(config())  # a ConfigDict takes no name with a dot
    entries["recipes"][POINTS[0]] = at_002
    run = context(entries, tmp_path)
    train.train_recipe(run, run.plan.recipes[POINTS[0]], 0)
    ours, theirs = (tiny_recipes.final(where, POINTS[0]) for where in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_finished_sweep_changes_nothing(finished, monkeypatch):
    workdir, results, *_ = finished
    for place, name in ((fitting, "train"), (evaluation, "score"), (report, "figure_pareto")):
        monkeypatch.setattr(place, name, lambda *a, **k: pytest.fail("done again"))
    before = tiny_recipes.snapshot(workdir)
    assert go(config(), workdir)["sweep"] == results
    assert tiny_recipes.snapshot(workdir) == before


@pytest.fixture
def copy(finished, tmp_path):
    """The finished sweep once more, to be changed."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def spied_scores(monkeypatch):
    """A list that gets the name of each point that is scored."""
    scored, score = [], sweep._score

    def counts(run, recipe, fitted):
        scored.append(recipe.name)
        return score(run, recipe, fitted)

    monkeypatch.setattr(sweep, "_score", counts)
    return scored


def test_points_come_and_go_and_only_new_ones_are_scored(copy, monkeypatch):
    scored = spied_scores(monkeypatch)
    fewer = go(config((("attack.epsilon", (0.02, 7.0)),)), copy)["sweep"]
    assert [row["point"] for row in fewer["rows"]] == ["baseline", POINTS[0]] and not scored
    more = go(config((("attack.epsilon", (0.02, 0.03)),)), copy)["sweep"]
    assert more["rows"][-1]["point"] == "universal epsilon 0.03"
    assert scored == ["universal epsilon 0.03"]
    assert not more["failed"]


def test_a_share_that_comes_out_otherwise_is_taken(finished, copy, monkeypatch):
    """Another number of devices may count one image more; its training is the same."""
    (copy / "sweep" / "points" / f"{POINTS[0]}-seed0.npz").unlink()
    shares = {"clean": np.asarray(1.0), "robust": np.asarray(0.0)}
    monkeypatch.setattr(sweep, "_score", lambda *args: shares)
    results = go(config(), copy)["sweep"]
    before = {row["point"]: row for row in finished[1]["rows"]}
    for row in results["rows"]:
        is_new = row["point"] == POINTS[0]
        expected = {**before[row["point"]], **({"clean": 1.0, "robust": 0.0} if is_new else {})}
        assert row == expected


def test_a_sweep_of_before_is_taken_with_all_that_it_trained(finished, copy, monkeypatch):
    """Its inputs were the shares that had been measured."""
    monkeypatch.setattr(fitting, "train", lambda *a, **k: pytest.fail("trained again"))
    old = manifest(copy, "sweep")
    shares = {row["point"]: json.dumps(row) for row in old["results"]["rows"]}
    old |= {"inputs": {**shares, "universal epsilon 7, left out": "failed"}, "files": {}}
    (copy / "sweep" / "manifest.json").write_text(json.dumps(seal(old)))
    shutil.rmtree(copy / "sweep" / "points")
    assert go(config(), copy)["sweep"] == finished[1]
    assert not list(copy.glob("*.changed"))


def test_notes_on_the_page_of_a_sweep_are_kept(copy, monkeypatch, caplog):
    page = (copy / "sweep.md").read_text()
    for name in ("sweep.md", "sweep.csv"):
        with open(copy / name, "a") as file:
            file.write("my note")
    scored = spied_scores(monkeypatch)
    go(config(), copy)
    assert (copy / "sweep.md").read_text() == page and not scored
    for name in ("sweep.md", "sweep.csv"):
        assert (copy / f"{name}.changed").read_text().endswith("my note")
        assert caplog.text.count(f"what was there is {name}.changed") == 1


@pytest.mark.parametrize("when", [0, 2])
def test_who_asks_to_stop_waits_for_one_batch_and_keeps_the_points(copy, monkeypatch, when):
    for name in ("sweep", "sweep_cost"):
        shutil.rmtree(copy / name)
    scored, asked = spied_scores(monkeypatch), []

    def asks():
        asked.append(len(scored))
        return asked[-1] > when

    monkeypatch.setattr(sweep, "stop_requested", asks)
    with pytest.raises(Stopped, match="the points that were scored are kept"):
        go(config(), copy)
    assert len(scored) == when + 1 and len(list(copy.glob("sweep/points/*"))) == when
    monkeypatch.setattr(sweep, "stop_requested", lambda: False)
    scored.clear()
    go(config(), copy)
    assert len(scored) == 3 - when


def test_who_asks_to_stop_waits_for_one_timing(copy, monkeypatch):
    for name in ("sweep", "sweep_cost"):
        shutil.rmtree(copy / name)
    scored, asked = spied_scores(monkeypatch), []

    def asks():
        asked.append(len(scored))
        return len(asked) == 6

    monkeypatch.setattr(costs, "stop_requested", asks)
    with pytest.raises(Stopped, match="sweep_cost stopped while it timed"):
        go(config(), copy)
    assert set(asked) == {3} and manifest(copy, "sweep_cost")["status"] != "done"
    results = go(config(), copy)["sweep"]
    assert len(scored) == 3 and all(row["cost"] > 0 for row in results["rows"])


def test_a_stopped_sweep_goes_on_with_what_is_missing(finished, tmp_path, monkeypatch):
    _, results, *_ = finished
    train_steps, trained = fitting.train, []

    def dies(stage, *args, **kwargs):
        if stage.path.name == f"{POINTS[1]}-seed0":
            raise Stopped("killed")
        return train_steps(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", dies)
    with pytest.raises(Stopped):
        go(config(), tmp_path)
    folders = [path for path in (tmp_path / "recipes").iterdir() if (path / "classifier").exists()]
    assert {path.name for path in folders} == {
        *("baseline-seed0", "full-seed0"),
        f"{POINTS[0]}-seed0",
    }

    def counts(stage, *args, **kwargs):
        trained.append(stage.path.name)
        return train_steps(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", counts)
    again = go(config(), tmp_path)["sweep"]
    assert trained == [f"{POINTS[1]}-seed0"]

    def without_cost(rows):
        return [{**row, "cost": None} for row in rows]

    assert without_cost(again["rows"]) == without_cost(results["rows"])


@pytest.mark.slow
def test_a_point_that_fails_in_training_is_named(tmp_path):
    changed = config(((WEIGHT, (1.0, 3e38)),), universal={**UNIVERSAL, "epochs": 8})
    results = go(changed, tmp_path)["sweep"]
    [(name, why)] = results["failed"].items()
    assert "3e+38" in name and "lower the learning rate" in why
    assert len(results["rows"]) == 2
    assert f"{name} is left out: the last 2" in (tmp_path / "sweep.md").read_text()


@pytest.mark.slow
def test_without_the_reference_points_have_no_cost(tmp_path):
    changed = config((("attack.epsilon", (0.02,)),), full=BROKEN)
    results = go(changed, tmp_path)["sweep"]
    assert set(results["failed"]) == {"full"}
    assert [(row["point"], row["cost"]) for row in results["rows"]] == [
        ("baseline", None),
        (POINTS[0], None),
    ]
    page = (tmp_path / "sweep.md").read_text()
    assert page.startswith("full is left out: ") and page.count("| n/a |") == 2
    assert "Within 2 points" not in page and not (tmp_path / "figures").exists()
    # A failure that comes to a finished sweep is told.
    changed.sweep.grid = (("attack.epsilon", (0.02, 7.0)),)
    results = go(changed, tmp_path)["sweep"]
    assert set(results["failed"]) == {"full", "universal epsilon 7"}
    assert "universal epsilon 7 is left out" in (tmp_path / "sweep.md").read_text()


# --- On the command line ----------------------------------------------------------------------

CONFIG = """
import test_sweep

def get_config():
    return test_sweep.config()
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setattr(cli_run, "_start_jax", lambda arguments, several: None)
    (tmp_path / "config.py").write_text(CONFIG)

    def call(*overrides, file=tmp_path / "config.py"):
        flags = [f"--config={file}", f"--workdir={tmp_path / 'run'}", "--no-progress"]
        return main.main(["sweep", "--devices=2", *flags, *overrides])

    yield call
    progress.set_mode("auto")
    stopping.clear_stop()


def test_the_command_ends_with_the_table(finished, command, tmp_path, capsys):
    """Whatever stages the config names, a sweep attacks and sweeps."""
    assert command("--config.stages=('train','score')") == flags.DONE
    printed = capsys.readouterr()
    assert "| universal epsilon 0.02 |" in printed.out
    assert "is impossible and left out" in printed.err
    assert not (tmp_path / "run" / "score").exists()
    rows = manifest(tmp_path / "run", "sweep")["results"]["rows"]
    assert [r["robust"] for r in rows] == [r["robust"] for r in finished[1]["rows"]]


def test_a_grid_is_typed_with_fractions():
    typed = """(("attack.epsilon", (4/255,8/255)), ('augment', ('a/b', "1/2", '8/255.py:f', None)),
     ('attack', ({'function': '1/4', 'epsilon': 1/4}, True)))"""
    grid = (
        ("attack.epsilon", (4 / 255, 8 / 255)),
        ("augment", ("a/b", "1/2", "8/255.py:f", None)),
        ("attack", ({"function": "1/4", "epsilon": 0.25}, True)),
    )
    loaded = settings.load_config(f"{tiny.CONFIGS}/compare.py", [f"--config.sweep.grid={typed}"])
    assert settings.to_json(loaded)["sweep"]["grid"] == settings.to_json({"grid": grid})["grid"]


def test_text_between_quotes_and_names_are_not_expanded():
    values = ["'1/2'", '"1/2"', "('a/b', '8/255')", "['it\\'s 1/2']", "runs/'1'/1/2", "a(1/2)"]
    typed = [f"--config.name={value}" for value in [*values, "it's 1/2", "'1/2", "' ' " * 60 + "x"]]
    assert settings.expand_fractions(typed) == typed
    assert settings.expand_fractions(["--config.a={'b': 1/2}"]) == ["--config.a={'b': 0.5}"]
    with pytest.raises(settings.SettingsError, match="'1/0' is no number"):
        settings.expand_fractions(["--config.a=('b',1/0)"])


def test_wrong_usage_is_2(command, capsys, tmp_path):
    assert command("--config.sweep.grid=(('attack.epsilon',(7.0,)),)") == flags.USAGE
    assert "no point of the sweep is possible" in capsys.readouterr().err
    assert command(file=tiny.CONFIGS / "quickstart.py") == flags.USAGE
    printed = capsys.readouterr().err
    assert "quickstart.py has no config.sweep; the shipped config `compare` has one" in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.slow
def test_points_that_differ_in_numbers_compile_nothing_more(
    compiled_programs, tmp_path, monkeypatch
):
    """One point, and four in budget and weight: as many steps are compiled."""
    # What a process has compiled is not dropped midway.
    for module in (importlib.import_module(experiment.Context.__module__), cost):
        monkeypatch.setattr(module, "release_programs", lambda most=0: False)
    grid = (("attack.epsilon", (0.02, 0.04)), (WEIGHT, (1.0, 2.0)))
    counts = []
    for number in (1, 1, 2):  # what is compiled once in a process is so after the first
        compiled_programs.clear()
        go(config(tuple((p, options[:number]) for p, options in grid)), tmp_path / str(len(counts)))
        counts.append(len(compiled_programs))
    # Two reshapes are new; three more points whose steps are compiled anew would be three or more.
    assert counts[1] > 0 and counts[2] - counts[1] <= 2, counts
