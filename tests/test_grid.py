"""A grid becomes recipes: their values, their names, and what is refused."""

import copy

import pytest
import tiny_recipes
from tiny_recipes import FROZEN, LOSSES, UNIVERSAL

from robust_ssl import experiment
from robust_ssl.experiment.grid import apart, expand, points, read
from robust_ssl.experiment.plan import with_recipes
from robust_ssl.experiment.recipe import Selection

BASE = {
    "epochs": 10,
    "attack": {"function": "robust_ssl.attacks:PGD", "epsilon": 8 / 255, "num_steps": 10},
    "losses": {
        "clean_cross_entropy": ("robust_ssl.losses:clean_cross_entropy", 1.0),
        "genetic_regularization": ["robust_ssl.losses:genetic_regularization", 0.5, {"k": 1}],
    },
    "select": {"epsilon": 0.1},
}


def test_product_in_the_order_of_the_paths():
    points = expand(BASE, {"attack.num_steps": [1, 10], "epochs": (3, 5)})
    assert list(points) == [
        "num_steps=1, epochs=3",
        "num_steps=1, epochs=5",
        "num_steps=10, epochs=3",
        "num_steps=10, epochs=5",
    ]
    point = points["num_steps=1, epochs=5"]
    assert point["attack"] == {**BASE["attack"], "num_steps": 1} and point["epochs"] == 5
    assert {**point, "attack": 0, "epochs": 0} == {**BASE, "attack": 0, "epochs": 0}


def test_places_in_tuples_and_lists_keep_their_type():
    points = expand(
        BASE,
        {
            "losses.clean_cross_entropy.1": [2.0],
            "losses.genetic_regularization.2.k": [5],
        },
    )
    (name, point), *_ = points.items()
    assert name == "clean_cross_entropy.1=2, k=5"
    assert point["losses"]["clean_cross_entropy"] == (
        "robust_ssl.losses:clean_cross_entropy",
        2.0,
    )
    assert point["losses"]["genetic_regularization"][1:] == [0.5, {"k": 5}]
    assert isinstance(point["losses"]["clean_cross_entropy"], tuple)
    assert isinstance(point["losses"]["genetic_regularization"], list)


def test_nothing_is_shared_and_the_base_stays():
    before = copy.deepcopy(BASE)
    options = {"k": [7]}
    points = expand(BASE, {"losses.genetic_regularization.2": [options, None], "epochs": [1, 2]})
    first, second, *_ = points.values()
    first["attack"]["epsilon"] = "changed"
    first["losses"]["genetic_regularization"][2]["k"].append(8)
    assert before == BASE and options == {"k": [7]}
    assert second["attack"]["epsilon"] == 8 / 255
    assert second["losses"]["genetic_regularization"][2] == {"k": [7]}


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        ({"attack.epsilon": [8 / 255], "epochs": [3]}, ["epsilon=0.0314, epochs=3"]),
        (
            {"attack.epsilon": [0.5], "select.epsilon": [0.25]},
            ["attack.epsilon=0.5, select.epsilon=0.25"],
        ),
        ({"attack.epsilon": [0.12341, 0.12342]}, ["epsilon=0.12341", "epsilon=0.12342"]),
        ({"attack": [None]}, ["attack=None"]),
        ({"epochs": range(2)}, ["epochs=0", "epochs=1"]),
    ],
)
def test_names_are_short_and_tell_the_points_apart(grid, names):
    assert list(expand(BASE, grid)) == names


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"attack.epsilom": [1]}, "'attack.epsilom'.*did you mean attack.epsilon"),
        ({"num_steps": [1]}, "did you mean attack.num_steps"),
        ({"losses.clean_cross_entropy.2": [1]}, "losses.clean_cross_entropy.1"),
        ({"losses.clean_cross_entropy.-1": [1]}, "leads to no setting"),
        ({"epochs.1": [1]}, "leads to no setting"),
        ({"zzz": [1]}, "known: epochs, attack, attack.function"),
        ({"epochs": []}, "empty list"),
        ({"epochs": 3}, "list of values, got 3"),
        ({"attack.function": "abc"}, "list of values, got 'abc'"),
        ({"epochs": [3, 3]}, "twice"),
        ({"attack.epsilon": [1, 1.0]}, "twice"),
        ({"attack": [None], "attack.epsilon": [0.5]}, "lies in 'attack'"),
        ({}, "the grid is empty"),
    ],
)
def test_what_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        expand(BASE, grid)


def test_paths_move_together():
    points = expand(BASE, {"attack.num_steps & epochs": [2, 4]})
    assert list(points) == ["num_steps=2", "num_steps=4"]
    point = points["num_steps=4"]
    assert (point["attack"]["num_steps"], point["epochs"]) == (4, 4)
    with pytest.raises(ValueError, match="'epochs' is there twice"):
        expand(BASE, {"attack.num_steps & epochs": [2], "epochs": [1]})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("attack.epsilon", (0.01, 0.02)), r"pairs, got 'attack.epsilon' where.*write for example"),
        ({"attack.epsilon": (0.01, 0.02)}, r"config.sweep.grid must be a list .* got \{'attack"),
        ("(('attack.epsilon',(1/2 5)),)", "a list of .path, values. pairs"),
        (None, "pairs, got None"),
        ((("attack.epsilon", 0.01, 0.02),), "pairs, got .'attack.epsilon', 0.01, 0.02."),
        (((1, (2,)),), "pairs, got .1, .2"),
        (("ab",), "pairs, got 'ab'"),
        ((("attack.epsilon", 0.01),), r"list of values, got 0.01; write \(0.01,\)"),
        ((("batch_statistics", "both"),), r"list of values, got 'both'; write \('both',\)"),
        ((("epochs", ()),), "'epochs' has an empty list"),
        ((("epochs", (1,)), ("epochs", (2,))), "'epochs' is there twice"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        read(pairs)


def test_values_are_read_as_they_are():
    grid = (("attack", (None, {"epsilon": 0.5})), ("a & b", [1]))
    assert read(grid) == {"attack": (None, {"epsilon": 0.5}), "a & b": [1]}
    assert read(()) == {}


def test_a_name_that_others_have_ends_in_a_digest():
    grid = {"attack.function": ["1, epochs=2", "1"], "epochs": [3, "2, epochs=3"]}
    points = expand(BASE, grid)
    assert [(p["attack"]["function"], p["epochs"]) for p in points.values()] == [
        ("1, epochs=2", 3),
        ("1, epochs=2", "2, epochs=3"),
        ("1", 3),
        ("1", "2, epochs=3"),
    ]
    first, _, third, fourth = points
    assert third == "function=1, epochs=3"
    assert first != fourth and first[:-8] == fourth[:-8] == "function=1, epochs=2, epochs=3 "


def test_long_names_are_cut_and_differ():
    names = apart(["a" * 81, "b" * 80, "a" * 79 + "b" * 9], [1, 2, 3], 80)
    assert [len(name) for name in names] == [80, 80, 80] and len({*names}) == 3
    assert names[1] == "b" * 80 and names[0].startswith("a" * 71 + " ")
    assert names == apart(["a" * 81, "b" * 80, "a" * 79 + "b" * 9], [1, 2, 3], 80)


# --- The points of a sweep -------------------------------------------------------------------

WEIGHT = "losses.adversarial_cross_entropy.weight"


def planned(swept, **others):
    recipes = {"baseline": FROZEN, "universal": UNIVERSAL, "swept": swept, **others}
    return experiment.plan(tiny_recipes.config(recipes, "train"))


def points_of(swept, *grid, **others):
    return points(planned(swept, **others).recipes["swept"], grid)


def test_the_points_are_the_grids():
    grid = (("attack.epsilon", (0.02, 0.04)), (WEIGHT, (1.0, 2.0)))
    grid_points = points_of(UNIVERSAL, *grid)
    entries = grid_points.entries
    assert not grid_points.starts and list(grid_points.values) == list(entries)
    assert list(entries) == [f"swept epsilon {e} weight {w}" for e in (0.02, 0.04) for w in "12"]
    for (epsilon, weight), recipe in zip(
        ((e, w) for e in (0.02, 0.04) for w in (1.0, 2.0)), entries.values(), strict=True
    ):
        assert recipe["attack"]["epsilon"] == epsilon and recipe["epochs"] == 2
        assert recipe["losses"]["adversarial_cross_entropy"]["weight"] == weight
    assert list(grid_points.values.values())[1] == {"attack.epsilon": 0.02, WEIGHT: 2.0}


SECOND = {"start": "universal", "rates": {"encoder/**": "freeze", "head/**": 1e-3}}
DEEP = (("start.attack.epsilon", (0.02, 0.03)), ("weight_decay", (0.0, 1e-3)))


def test_a_path_leads_into_what_the_recipe_starts_from():
    at_003 = {**UNIVERSAL, "attack": {**UNIVERSAL["attack"], "epsilon": 0.03}}
    plan = planned(SECOND, universal=at_003)
    entries, starts, _ = points(plan.recipes["swept"], DEEP)
    # One start for both points that share it; the recipe's own settings are the recipe.
    assert len(entries) == 4 and len(starts) == 1
    [(name, start)] = starts.items()
    assert name.startswith("universal ") and start["attack"]["epsilon"] == 0.02
    assert [recipe["start"] for recipe in entries.values()] == [name, name, *2 * ["universal"]]
    whole = with_recipes(plan, {**starts, **entries})
    assert [recipe.name for recipe in whole.scored] == [*plan.recipes, *entries]
    point = next(iter(entries))
    assert point == "swept epsilon 0.02 weight_decay 0"
    assert [recipe.name for recipe in whole.recipes[point].chain()] == [point, name]


MIXED = {"adv_ratio": 0.7, "attack": UNIVERSAL["attack"]}
CLEAN = {"clean_cross_entropy": f"{LOSSES}clean_cross_entropy"}


@pytest.mark.parametrize(
    ("recipe", "grid", "message"),
    [
        (MIXED, [(WEIGHT, (1.0, 2.0))], "sweep adv_ratio instead"),
        ({**MIXED, "adv_ratio": 0.0}, [(WEIGHT, (1.0,))], "sweep adv_ratio instead"),
        (
            {**MIXED, "losses": CLEAN},
            [("l2_sp & losses.clean_cross_entropy.weight", (1.0,))],
            "sweep adv_ratio instead",
        ),
        ({**MIXED, "losses": CLEAN}, [("losses.clean_cross_entropy", (CLEAN,))], "sweep adv_ratio"),
        (UNIVERSAL, [("adv_ratio", (None, 0.5)), (WEIGHT, (1.0,))], "sweep adv_ratio instead"),
        ({"start": "mixed"}, [(f"start.{WEIGHT}", (1.0,))], "sweep start.adv_ratio instead"),
        ({"start": "mixed"}, [(WEIGHT, (1.0,))], "leads to no setting"),
    ],
)
def test_a_weight_that_adv_ratio_decides_is_no_path(recipe, grid, message):
    path = grid[-1][0].split(" & ")[-1]
    with pytest.raises(ValueError, match=f"the grid's path '{path}' .*{message}"):
        points_of(recipe, *grid, mixed=MIXED)


def test_layers_are_swept_as_numbers_and_as_shares():
    scores = dict.fromkeys("abcde", 0.0)
    swept = {"start": "baseline", "select": {"layers": 1}}
    entries = points_of(swept, ("select.layers", (2, 0.6))).entries.values()
    chosen = [Selection(**recipe["select"]).choose(scores) for recipe in entries]
    assert [len(layers) for layers in chosen] == [2, 3]


def test_points_of_one_name_get_another_and_long_names_are_cut():
    entries, _, values = points_of(UNIVERSAL, ("augment", ("ab", "a,b", "c")))
    assert [recipe["augment"] for recipe in entries.values()] == ["ab", "a,b", "c"]
    assert [value["augment"] for value in values.values()] == ["ab", "a,b", "c"]
    *twins, other = entries
    assert other == "swept augment c" and all(n.startswith("swept augment ab ") for n in twins)
    rules = [{f"encoder/{number}{'x' * 300}": 1e-3} for number in (1, 2)]
    names = list(points_of(UNIVERSAL, ("rates", rules)).entries)
    assert [len(name) for name in names] == [80, 80] and len({*names}) == 2
    assert list(points_of(UNIVERSAL, ("rates", rules[:1])).entries) == names[:1]
