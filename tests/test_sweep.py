"""A grid over a recipe's settings: each point once, impossible ones named, on validation only."""

import csv
import importlib

import jax
import numpy as np
import pytest
import tiny
import tiny_methods
from tiny_methods import BROKEN, FROZEN, UNIVERSAL, go, manifest

from robust_ssl import checkpoints, evaluation, finetuning, main, progress, settings, stages
from robust_ssl.finetuning import cost
from robust_ssl.progress import Stopped
from robust_ssl.stages import fitting, methods, recipes, sweep, training
from robust_ssl.stages.run import Run

RECIPES = {"usual": FROZEN, "full": {}, "universal": UNIVERSAL}
GRID = (("attack.epsilon", (0.02, 0.04, 7.0)),)
POINTS = ["universal epsilon 0.02", "universal epsilon 0.04"]


def config(grid=GRID, **options):
    made = tiny_methods.config(RECIPES, "attack", "sweep")
    made.sweep.update(grid=grid, **options)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep, what it trained, and the images it scored."""
    workdir, trained, scored = tmp_path_factory.mktemp("sweep"), [], []
    train, score = fitting.train, evaluation.score

    def spied_train(stage, *args, **kwargs):
        trained.append(stage.path.name)
        return train(stage, *args, **kwargs)

    def spied_score(model, batches, *args, **kwargs):
        batches = list(batches)
        scored.extend(np.asarray(image) for batch in batches for image in batch["images"])
        return score(model, iter(batches), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "train", spied_train)
        patch.setattr(evaluation, "score", spied_score)
        results = go(config(), workdir)
    return workdir, results["sweep"], trained, scored


def test_the_points_are_the_grids():
    grid = (("attack.epsilon", (0.02, 0.04)), ("losses.adversarial_cross_entropy.1", (1.0, 2.0)))
    found, starts, values = sweep.points(settings.to_json(config(grid)))
    assert not starts and list(values) == list(found)
    assert list(found) == [
        f"universal epsilon {e} adversarial_cross_entropy.1 {w}" for e in (0.02, 0.04) for w in "12"
    ]
    for (epsilon, weight), recipe in zip(
        ((e, w) for e in (0.02, 0.04) for w in (1.0, 2.0)), found.values(), strict=True
    ):
        assert recipe["attack"]["epsilon"] == epsilon and recipe["epochs"] == 2
        assert recipe["losses"]["adversarial_cross_entropy"][1] == weight
    assert list(values.values())[1] == {
        "attack.epsilon": 0.02,
        "losses.adversarial_cross_entropy.1": 2.0,
    }


SECOND = {"start": "universal", "rates": {"encoder/**": "freeze", "head/**": 1e-3}}
DEEP = (("start.attack.epsilon", (0.02, 0.03)), ("weight_decay", (0.0, 1e-3)))


def test_a_path_leads_into_what_the_method_starts_from():
    made = config(DEEP, method="second")
    made.methods.second = SECOND
    made.methods.universal.attack.epsilon = 0.03
    made = settings.to_json(made)
    found, starts, _ = sweep.points(made)
    # One start for both points that share it; the recipe's own settings are the recipe.
    assert len(found) == 4 and len(starts) == 1
    [(name, start)] = starts.items()
    assert name.startswith("universal ") and start["attack"]["epsilon"] == 0.02
    assert [recipe["start"] for recipe in found.values()] == [name, name] + 2 * ["universal"]
    whole = {**made, "methods": {**made["methods"], **starts, **found}}
    assert recipes.scored(whole) == [*made["methods"], *found]
    point = next(iter(found))
    assert point == "second epsilon 0.02 weight_decay 0"
    assert recipes.chain(whole, point) == [point, name]


def points_of(recipe, *grid, **others):
    made = config(grid, method="swept")
    made.methods.update(swept=recipe, **others)
    return sweep.points(settings.to_json(made))


MIXED = {"adv_ratio": 0.7, "attack": UNIVERSAL["attack"]}
WEIGHT = "losses.adversarial_cross_entropy.1"


@pytest.mark.parametrize(
    ("recipe", "grid", "says"),
    [
        (MIXED, [(WEIGHT, (1.0, 2.0))], "sweep adv_ratio instead"),
        ({**MIXED, "adv_ratio": 0.0}, [(WEIGHT, (1.0,))], "sweep adv_ratio instead"),
        (MIXED, [("l2_sp & losses.clean_cross_entropy.1", (1.0,))], "sweep adv_ratio instead"),
        (MIXED, [("losses.clean_cross_entropy", (("m", 1.0),))], "sweep adv_ratio instead"),
        (UNIVERSAL, [("adv_ratio", (None, 0.5)), (WEIGHT, (1.0,))], "sweep adv_ratio instead"),
        ({"start": "mixed"}, [(f"start.{WEIGHT}", (1.0,))], "sweep start.adv_ratio instead"),
        ({"start": "mixed"}, [(WEIGHT, (1.0,))], "leads to no setting"),
    ],
)
def test_a_weight_that_adv_ratio_decides_is_no_path(recipe, grid, says):
    path = grid[-1][0].split(" & ")[-1]
    with pytest.raises(ValueError, match=f"the grid's path '{path}' .*{says}"):
        points_of(recipe, *grid, mixed=MIXED)


def test_a_weight_is_a_path_where_adv_ratio_is_none():
    found = points_of(MIXED, ("adv_ratio", (None,)), (WEIGHT, (1.0, 2.0))).recipes
    weights = [recipe["losses"]["adversarial_cross_entropy"][1] for recipe in found.values()]
    assert weights == [1.0, 2.0]


LAYERS = {
    **{"images": 16, "num_steps": 1, "learning_rate": 1.0, "radius": 0.1, "rate": 1e-3},
    **{"top_k": None, "top_k_fraction": 0.2},
}


def test_a_number_of_layers_is_said_in_one_way():
    scores, selected = dict.fromkeys("abcde", 0.0), {"start": "usual", "select": LAYERS}

    def chosen(recipe):
        options = {name: recipe["select"][name] for name in ("top_k", "top_k_fraction")}
        return len(finetuning.select_redundant(scores, **options))

    found = points_of(selected, ("select.top_k", (2, 3))).recipes.values()
    assert [chosen(recipe) for recipe in found] == [2, 3]
    by_number = {**selected, "select": {**LAYERS, "top_k": 2, "top_k_fraction": None}}
    found = points_of(by_number, ("select.top_k_fraction", (0.4, 0.8))).recipes.values()
    assert [chosen(recipe) for recipe in found] == [2, 4]
    grid = ("start.select.top_k", (3,)), ("start.rates", ({"**": 1e-3},))
    [start] = points_of({"start": "first"}, *grid, first=selected).starts.values()
    assert chosen(start) == 3
    # Who gives both has to say which.
    grid = ("select.top_k", (None, 2)), ("select.top_k_fraction", (None, 0.2))
    found = points_of(selected, *grid).recipes.values()
    assert [(r["select"]["top_k"], r["select"]["top_k_fraction"]) for r in found] == [
        (None, None),
        (None, 0.2),
        (2, None),
        (2, 0.2),
    ]


def test_points_of_one_name_get_another_and_long_names_are_cut():
    found, _, values = points_of(UNIVERSAL, ("augment", ("ab", "a,b", "c")))
    assert [recipe["augment"] for recipe in found.values()] == ["ab", "a,b", "c"]
    assert [value["augment"] for value in values.values()] == ["ab", "a,b", "c"]
    *twins, other = found
    assert other == "swept augment c" and all(n.startswith("swept augment ab ") for n in twins)
    rules = [{f"encoder/{number}{'x' * 300}": 1e-3} for number in (1, 2)]
    names = list(points_of(UNIVERSAL, ("rates", rules)).recipes)
    assert [len(name) for name in names] == [80, 80] and len({*names}) == 2
    assert list(points_of(UNIVERSAL, ("rates", rules[:1])).recipes) == names[:1]


def test_points_are_tried_and_warned_about_once_in_a_run(tmp_path, monkeypatch, caplog):
    tried, check_one = [], methods.check_one

    def counts(run, name, seeds):
        tried.append(name)
        if name.startswith("universal"):  # tracing the others' steps has no part in this
            check_one(run, name, seeds)

    monkeypatch.setattr(methods, "check_one", counts)
    run = tiny_methods.a_run(config(), tmp_path)
    _, _, failed = sweep.check(run)
    failed.clear()
    assert list(sweep.check(run)[2]) == ["universal epsilon 7"]
    assert tried == ["usual", "full", *POINTS, "universal epsilon 7"]
    assert caplog.text.count("is impossible and left out") == 1


def test_a_point_that_the_workdir_has_with_other_values_is_named(tmp_path):
    def a_run(epsilon):
        return tiny_methods.a_run(config((("attack.epsilon", (epsilon,)),)), tmp_path)

    with_points, *_ = sweep.check(a_run(0.02))
    recipe = recipes.complete(with_points.config, POINTS[0])
    recipe.pop("scored")
    with_points.open(methods.directory(POINTS[0], 0), recipe, {}).close()
    assert not sweep.check(a_run(0.02))[2]
    with pytest.raises(checkpoints.ConfigChangedError) as caught:
        sweep.check(a_run(0.020001))
    assert f"a point {POINTS[0]!r} with other settings" in str(caught.value)
    assert "config.attack.epsilon: 0.02 -> 0.020001" in str(caught.value)


def test_a_start_that_is_swept_is_made_once(tmp_path):
    made = config((("start.attack.epsilon", (0.02,)), DEEP[1]), method="second")
    made.methods.second = SECOND
    results = go(made, tmp_path)["sweep"]
    assert [row["point"] for row in results["rows"][1:]] == [
        "second epsilon 0.02 weight_decay 0",
        "second epsilon 0.02 weight_decay 0.001",
    ]
    made = {path.name.split("-")[0] for path in (tmp_path / "methods").iterdir()}
    starts = {name for name in made if name.startswith("universal")}
    assert len(starts) == 1 and "universal" not in starts


def test_an_impossible_point_is_named_and_the_others_are_made(finished):
    workdir, results, trained, _ = finished
    assert [row["point"] for row in results["rows"]] == ["usual", *POINTS]
    assert set(results["failed"]) == {"universal epsilon 7"}
    assert "epsilon must lie in [0, 1]" in results["failed"]["universal epsilon 7"]
    page = (workdir / "sweep.md").read_text()
    assert "universal epsilon 7 is left out: epsilon must lie in [0, 1]" in page
    assert (
        "For at most 2 points of clean accuracy and 2x the training time of usual fine-tuning"
        in page
    )
    assert "16 validation images" in page
    assert sorted(trained) == ["full-seed0", *(f"{p}-seed0" for p in POINTS), "usual-seed0"]


def test_the_table_says_what_the_results_say(finished):
    workdir, results, *_ = finished
    with open(workdir / "sweep.csv") as file:
        *lines, last = csv.DictReader(file)
    measured = manifest(workdir, "sweep_cost")["results"]
    for line, row in zip(lines, results["rows"], strict=True):
        assert line["point"] == row["point"]
        assert {k: float(line[k]) for k in ("clean", "robust", "cost")} == {
            k: row[k] for k in ("clean", "robust", "cost")
        }
        assert {k: float(line[k]) for k in ("gradients", "seconds_per_image")} == {
            k: measured[row["point"]][k] for k in ("gradients", "seconds_per_image")
        }
        assert 0 <= row["robust"] <= 1 and row["cost"] > 0
        assert row["clean"] * 16 == round(row["clean"] * 16)
        assert line["peak_bytes"] == line["why"] == ""
    assert [line["attack.epsilon"] for line in lines] == ["", "0.02", "0.04"]
    assert (last["point"], last["attack.epsilon"]) == ("universal epsilon 7", "7.0")
    assert "epsilon must lie in [0, 1]" in last["why"] and last["clean"] == last["cost"] == ""
    assert (workdir / "figures" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert {r["point"]: r["cost"] for r in results["rows"]} == {
        name: manifest(workdir, "sweep_cost")["results"][name]["factor"]
        for name in ("usual", *POINTS)
    }


def test_nothing_is_scored_but_validation_images(finished):
    workdir, *_, scored = finished
    _, validation = tiny_methods.a_run(config(), workdir).downstream
    allowed = {np.asarray(image).tobytes() for image in validation.images}
    found = {image.tobytes() for image in scored}
    assert found == allowed
    test = {image.tobytes() for image in tiny.images("test")[0]}
    assert not test & found


def test_points_are_the_recipes_of_these_settings(finished, tmp_path):
    """A point is trained as the recipe with its settings is."""
    workdir, *_ = finished
    attack = {**UNIVERSAL["attack"], "epsilon": 0.02}
    run = tiny_methods.a_run(config(), tmp_path)
    run.config["methods"][POINTS[0]] = {**UNIVERSAL, "attack": attack}
    methods.method(run, POINTS[0], 0)
    ours, theirs = (tiny_methods.final(where, POINTS[0]) for where in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_finished_sweep_changes_nothing(finished, monkeypatch):
    workdir, results, *_ = finished
    for place in (fitting, training):
        monkeypatch.setattr(place, "train", lambda *a, **k: pytest.fail("trained again"))
    before = (workdir / "sweep.csv").read_bytes()
    assert go(config(), workdir)["sweep"] == results
    assert (workdir / "sweep.csv").read_bytes() == before


def test_a_stopped_sweep_goes_on_with_what_is_missing(finished, tmp_path, monkeypatch):
    _, results, *_ = finished
    train, trained = fitting.train, []

    def dies(stage, *args, **kwargs):
        if stage.path.name == f"{POINTS[1]}-seed0":
            raise Stopped("killed")
        return train(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", dies)
    with pytest.raises(Stopped):
        go(config(), tmp_path)
    finished_before = {p.name for p in (tmp_path / "methods").iterdir() if (p / "final").exists()}
    assert finished_before == {"usual-seed0", "full-seed0", f"{POINTS[0]}-seed0"}

    def counts(stage, *args, **kwargs):
        trained.append(stage.path.name)
        return train(stage, *args, **kwargs)

    monkeypatch.setattr(fitting, "train", counts)
    again = go(config(), tmp_path)["sweep"]
    assert trained == [f"{POINTS[1]}-seed0"]
    for ours, theirs in zip(again["rows"], results["rows"], strict=True):
        assert {k: v for k, v in ours.items() if k != "cost"} == {
            k: v for k, v in theirs.items() if k != "cost"
        }


@pytest.mark.slow
def test_a_point_that_fails_in_training_is_named(tmp_path):
    made = config((("losses.adversarial_cross_entropy.1", (1.0, 3e38)),))
    made.methods.universal = {**UNIVERSAL, "epochs": 8}
    results = go(made, tmp_path)["sweep"]
    [(name, why)] = results["failed"].items()
    assert "3e+38" in name and "lower the learning rate" in why
    assert len(results["rows"]) == 2
    assert f"{name} is left out: the last 2" in (tmp_path / "sweep.md").read_text()


@pytest.mark.slow
def test_without_the_reference_points_have_no_cost(tmp_path, monkeypatch):
    made = config((("attack.epsilon", (0.02,)),))
    made.methods.full = BROKEN
    results = go(made, tmp_path)["sweep"]
    assert set(results["failed"]) == {"full"}
    assert [(row["point"], row["cost"]) for row in results["rows"]] == [
        ("usual", None),
        (POINTS[0], None),
    ]
    page = (tmp_path / "sweep.md").read_text()
    assert page.startswith("full is left out: ") and page.count("| n/a |") == 2
    assert "For at most" not in page and not (tmp_path / "figures").exists()
    # A failure that comes to a finished sweep is told.
    made.sweep.grid = (("attack.epsilon", (0.02, 7.0)),)
    results = go(made, tmp_path)["sweep"]
    assert set(results["failed"]) == {"full", "universal epsilon 7"}
    assert "universal epsilon 7 is left out" in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grid": (("attack.epsilon", (7.0, 8.0)),)}, "no point .* possible: epsilon must lie in"),
        ({"grid": (("attack.epsilom", (0.1,)),)}, "did you mean attack.epsilon"),
        ({"grid": (("start.epochs", (1,)),)}, "'start.epochs' leads to no setting"),
        ({"grid": ()}, "the grid is empty"),
        ({"grid": GRID[0]}, "must be a list of .path, values. pairs, got 'attack.epsilon'"),
        ({"grid": (("batch_statistics", "both"),)}, "list of values, got 'both'"),
        ({"grid": GRID + GRID}, "'attack.epsilon' is there twice"),
        ({"grid": (("batch_size", (8,)),)}, "no point .* one batch size"),
        ({"method": "universel"}, "no 'universel'; near names: universal"),
        ({"usual": "usuall"}, "no 'usuall'; near names: usual"),
    ],
)
def test_a_wrong_sweep_is_refused_before_the_first_step(tmp_path, options, says):
    made = config()
    made.sweep.update(options)
    with pytest.raises(stages.UsageError, match=f"(?s){says}.*in config.sweep"):
        go(made, tmp_path)
    assert not list(tmp_path.iterdir())


# --- On the command line ----------------------------------------------------------------------

CONFIG = """
import test_sweep

def get_config():
    return test_sweep.config()
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "_start_jax", lambda arguments, several: None)
    (tmp_path / "config.py").write_text(CONFIG)

    def call(*overrides, file=tmp_path / "config.py"):
        flags = [f"--config={file}", f"--workdir={tmp_path / 'run'}", "--no-progress"]
        return main.main(["sweep", "--devices=2", *flags, *overrides])

    yield call
    progress.set_mode("auto")
    progress.clear_stop()


def test_the_command_ends_with_the_table(finished, command, tmp_path, capsys):
    """Whatever stages the config names, a sweep attacks and sweeps."""
    assert command("--config.stages=('defend','protocol')") == main.DONE
    said = capsys.readouterr()
    assert "| universal epsilon 0.02 |" in said.out and "is impossible and left out" in said.err
    assert not (tmp_path / "run" / "protocol").exists()
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
    made = settings.load_config(f"{tiny.CONFIGS}/compare.py", [f"--config.sweep.grid={typed}"])
    assert settings.to_json(made)["sweep"]["grid"] == settings.to_json({"grid": grid})["grid"]


def test_text_between_quotes_and_names_are_not_expanded():
    values = ["'1/2'", '"1/2"', "('a/b', '8/255')", "['it\\'s 1/2']", "runs/'1'/1/2", "a(1/2)"]
    kept = [f"--config.name={value}" for value in [*values, "it's 1/2", "'1/2", "' ' " * 60 + "x"]]
    assert settings.expand_fractions(kept) == kept
    assert settings.expand_fractions(["--config.a={'b': 1/2}"]) == ["--config.a={'b': 0.5}"]
    with pytest.raises(settings.SettingsError, match="'1/0' is no number"):
        settings.expand_fractions(["--config.a=('b',1/0)"])


def test_wrong_usage_is_2(command, capsys, tmp_path):
    assert command("--config.sweep.grid=(('attack.epsilon',(7.0,)),)") == main.USAGE
    assert "no point of the sweep is possible" in capsys.readouterr().err
    assert command(file=tiny.CONFIGS / "quickstart.py") == main.USAGE
    said = capsys.readouterr().err
    assert "quickstart.py has no config.sweep; see configs/compare.py" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.slow
def test_points_that_differ_in_numbers_compile_nothing_more(
    compiled_programs, tmp_path, monkeypatch
):
    """One point, and four in budget and weight: as many steps are compiled."""
    # What a process has compiled is not dropped midway.
    for module in (importlib.import_module(Run.__module__), cost):
        monkeypatch.setattr(module, "release_programs", lambda most=0: False)
    grid = (
        ("attack.epsilon", (0.02, 0.04)),
        ("losses.adversarial_cross_entropy.1", (1.0, 2.0)),
    )
    found = []
    for number in (1, 1, 2):  # what is compiled once in a process is so after the first
        compiled_programs.clear()
        made = config(tuple((path, options[:number]) for path, options in grid))
        go(made, tmp_path / str(len(found)))
        found.append(len(compiled_programs))
    # Two reshapes are new; three more points whose steps are compiled anew would be three or more.
    assert found[1] > 3 and found[2] - found[1] <= 2, found
