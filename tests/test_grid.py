"""A grid becomes recipes: their values, their names, and what is refused."""

import copy

import pytest

from robust_ssl.stages.grid import apart, expand, read, replaced

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
        ({"attack.epsilon": [1, 1.0]}, ["epsilon=1", "epsilon=1.0"]),
        ({"attack": [None]}, ["attack=None"]),
        ({"epochs": range(2)}, ["epochs=0", "epochs=1"]),
    ],
)
def test_names_are_short_and_tell_the_points_apart(grid, names):
    assert list(expand(BASE, grid)) == names


@pytest.mark.parametrize(
    ("grid", "said"),
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
        ({"attack": [None], "attack.epsilon": [0.5]}, "lies in 'attack'"),
        ({}, "the grid is empty"),
    ],
)
def test_what_is_refused(grid, said):
    with pytest.raises(ValueError, match=said):
        expand(BASE, grid)


def test_paths_move_together():
    points = expand(BASE, {"attack.num_steps & epochs": [2, 4]})
    assert list(points) == ["num_steps=2", "num_steps=4"]
    point = points["num_steps=4"]
    assert (point["attack"]["num_steps"], point["epochs"]) == (4, 4)
    with pytest.raises(ValueError, match="'epochs' is there twice"):
        expand(BASE, {"attack.num_steps & epochs": [2], "epochs": [1]})


@pytest.mark.parametrize(
    ("pairs", "said"),
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
def test_what_is_no_list_of_pairs_is_refused(pairs, said):
    with pytest.raises(ValueError, match=said):
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


def test_a_value_is_replaced_where_it_is_and_nowhere_else():
    found = replaced(BASE, "select.epsilon", None)
    assert found == {**BASE, "select": {"epsilon": None}} and BASE["select"] == {"epsilon": 0.1}
