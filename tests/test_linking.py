"""Recipes from text: what each says, and which are refused, by their entry, before any step."""

import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import (
    FROZEN,
    LOSSES,
    ON_ADVERSARIAL,
    PGD,
    PGD_AT,
    POOL,
    SMOOTH,
    go,
)

from robust_ssl import experiment
from robust_ssl.experiment.recipe import Recipe

MIXED = {"attack": PGD, "adv_ratio": 0.5}
SMOOTHED = {"function": f"{LOSSES}adversarial_cross_entropy", "smoothing": 0.2}
PGD_AT_OF_THE_PACKAGE = "robust_ssl.recipes:pgd_at"
LAYERS = {"function": "robust_ssl.recipes:gen_af", "start": None, "images": 8}


def planned(recipes, **sections):
    config = {
        "stages": ["train"],
        "encoder": {"function": "tiny:encoder"},
        "downstream": {"function": "tiny:images"},
    }
    return experiment.plan({**config, **sections, "recipes": recipes})


# --- What a recipe says -----------------------------------------------------------------------


def test_a_recipe_is_the_defaults_what_all_share_and_its_own():
    entries, common = {"one": {"head": "mlp"}, "two": {}}, {"epochs": 5, "head": "linear"}
    recipes = planned(entries, common=common).recipes
    defaults = planned({"defaults": {}}).recipes["defaults"]
    assert recipes["one"].text == {**defaults.text, "epochs": 5, "head": "mlp"}
    assert recipes["two"].text == {**defaults.text, **common}
    assert (defaults.epochs, defaults.batch_size) == (Recipe("x").epochs, Recipe("x").batch_size)
    assert entries == {"one": {"head": "mlp"}, "two": {}}  # what is read is not changed


def test_a_recipe_of_the_package_takes_options_and_entries():
    pgd_at = {"function": "robust_ssl.recipes:pgd_at", "epsilon": 0.01, "epochs": 3}
    [recipe] = planned({"one": pgd_at}).recipes.values()
    assert (float(recipe.attack.threat.epsilon), recipe.epochs) == (0.01, 3)


def test_what_an_override_does_not_say_stays():
    trades = {"function": "robust_ssl.recipes:trades"}
    shorter = {**trades, "attack": {"num_steps": 2}}
    other = {**trades, "attack": PGD}
    layers = {**LAYERS, "select": {"layers": 1}}
    plan = planned({"as_it_is": trades, "shorter": shorter, "other": other, "layers": layers})
    attack = plan.recipes["as_it_is"].text["attack"]
    assert plan.recipes["shorter"].text["attack"] == {**attack, "num_steps": 2}
    assert plan.recipes["other"].text["attack"] == PGD  # another function, another attack
    assert plan.recipes["layers"].text["select"] == {"images": 8, "num_steps": 10, "layers": 1}


def test_a_chain_has_each_recipe_once():
    recipes = {
        "a": {},
        "b": {"start": "a"},
        "c": {"start": "a", "scored": False},
        "all": {"members": ("b", "c")},
    }
    plan = planned(recipes)
    chain = [recipe.name for recipe in plan.recipes["all"].chain()]
    assert chain[0] == "all" and sorted(chain) == ["a", "all", "b", "c"]
    assert [recipe.name for recipe in plan.scored] == ["a", "b", "all"]
    order = [recipe.name for recipe in plan.in_order()]
    assert order.index("a") < order.index("b") < order.index("all")


def test_adv_ratio_gives_two_losses_their_weights():
    attacked = {"attack": PGD, "batch_statistics": "both"}
    mixed = {**attacked, "losses": {}, "adv_ratio": 0.25}
    recipes = planned({"mixed": mixed, "all": {**attacked, "adv_ratio": 1.0}}).recipes
    weights = {name: weight for name, (_, weight) in recipes["mixed"].weighted_losses.items()}
    assert weights == {"clean_cross_entropy": 0.75, "adversarial_cross_entropy": 0.25}
    assert list(recipes["all"].losses) == ["adversarial_cross_entropy"]


def test_adv_ratio_decides_weights_and_nothing_else():
    smooth = {"clean_cross_entropy": {"smoothing": 0.1}, "adversarial_cross_entropy": SMOOTHED}
    stage1 = {"function": "robust_ssl.recipes:gen_af_stage1", "start": None}
    recipes = planned(
        {
            "both": {"attack": PGD, "losses": smooth, "adv_ratio": 0.25},
            "beside": {**stage1, "losses": {"+": True, **smooth}},
            "adversarial": {"attack": PGD, "losses": smooth, "adv_ratio": 1.0},
        }
    ).recipes
    expected = {"clean_cross_entropy": 0.1, "adversarial_cross_entropy": 0.2}
    for name, weights in (("both", (0.75, 0.25)), ("beside", (0.3, 0.7))):
        losses = [recipes[name].losses[loss] for loss in expected]
        assert [each.loss.keywords["smoothing"] for each in losses] == [*expected.values()]
        np.testing.assert_allclose([each.weight for each in losses], weights)
    assert [*recipes["adversarial"].losses] == ["adversarial_cross_entropy"]
    again = planned({name: dict(recipe.text) for name, recipe in recipes.items()}).recipes
    assert {name: recipe.text for name, recipe in again.items()} == {
        name: recipe.text for name, recipe in recipes.items()
    }
    # A recipe's own function may weigh them: the ratio comes from outside and decides.
    pgd_at = planned({"mine": {"function": PGD_AT_OF_THE_PACKAGE, "adv_ratio": 0.5}}).recipes[
        "mine"
    ]
    assert {n: w for n, (_, w) in pgd_at.weighted_losses.items()} == dict.fromkeys(expected, 0.5)


def test_patience_of_all_is_not_for_a_recipe_without_a_best_epoch():
    recipes = planned({"a": {}, "b": {"best": "last"}}, common={"patience": 3}).recipes
    assert (recipes["a"].patience, recipes["b"].patience) == (3, None)


# --- What is refused ----------------------------------------------------------------------------


def without(entries, name):
    return {key: value for key, value in entries.items() if key != name}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"epoch": 1}, "unknown entry 'epoch' in .*did you mean 'epochs'"),
        ({"start": "baselin"}, "no recipe 'baselin'; did you mean 'baseline"),
        ({"start": "wrong"}, "start from each other: wrong <- wrong"),
        ({"start": "wrong_too"}, "each other: .*wrong <- wrong_too"),
        ({"members": ("baseline", "nobody")}, "no recipe 'nobody'"),
        ({"members": ("baseline",)}, "two"),
        ({"losses": {"mine": (f"{LOSSES}clean_cross_entropy", 1.0)}}, "losses.mine must be"),
        ({"losses": {"mine": f"{LOSSES}clean_cross_entropi"}}, "clean_cross_entropy"),
        ({"losses": {"mine": "clean"}}, "losses.mine.*names no function"),
        ({"losses": {}}, "losses is empty"),
        ({**MIXED, "losses": {"clean_cross_entropy": {"weight": 2.0}}}, "weight is what adv_ratio"),
        ({**MIXED, "losses": {"clean_cross_entropy": "no:where"}}, "give yours another name"),
        ({**MIXED, "losses": {"clean_cross_entropy": 2.0}}, "a function's name or a mapping"),
        ({**MIXED, "losses": {"clean_cross_entropy": {"smoothin": 0.1}}}, "smoothing"),
        ({"losses": ON_ADVERSARIAL["losses"]}, "adversarial"),
        ({"batch_statistics": "adversarial"}, "needs an attack"),
        ({"batch_statistics": "none"}, "batch_statistics must be one of"),
        ({"rates": {"encoder/**": 1e-3}}, "head/linear/kernel"),
        ({"rates": {"**": 1e-3, "encoder/stem/**": 1e-4}}, "'encoder/stem/\\*\\*'"),
        ({**PGD_AT, "attack": {**PGD, "epsilon": 8.0}}, r"epsilon must lie in \[0, 1\]"),
        ({**PGD_AT, "attack": without(PGD, "epsilon")}, 'needs an "epsilon"'),
        ({**PGD_AT, "attack": {**PGD, "steps": 3}}, "PGD takes no option 'steps'.*'num_steps'"),
        ({**PGD_AT, "attack": without(PGD, "function")}, 'must be a mapping with a "function"'),
        ({"best": "worst"}, "best must be one of 'clean', 'robust', 'highest', 'last'"),
        ({"best": "robust"}, "robust.*attack"),
        ({"best": "last", "patience": 1}, "patience"),
        ({"patience": 0}, "patience must be a whole number of at least 1"),
        ({"batch_size": 15}, "multiple of 2"),
        ({"batch_size": 512}, "512"),
        ({**PGD_AT, "batch_statistics": "twins", "batch_size": 10}, "even number of images, got 5"),
        ({"prune": 1.5}, r"prune must be a number in \[0, 1\)"),
        ({"prune": 1.0}, r"prune must be a number in \[0, 1\)"),
        ({"l2_sp": -1.0}, "l2_sp must be a number of at least 0, got -1.0"),
        ({"head": "mpl"}, "mpl"),
        ({"encoder": "simclr-of-dreams"}, "simclr-of-dreams"),
        ({"select": {"layers": 99}}, "99 of 3 layers"),
        ({"select": {"top_k": 1}}, "unknown entry 'top_k'"),
        (
            {"select": {"layers": 1.5}},
            r"select.layers must be a whole number of at least 1, or a share in \(0, 1\]",
        ),
        ({"preprocess": {"function": "robust_ssl.models.preprocessing:JPG"}}, "JPEG"),
        (
            {**SMOOTH, "preprocess": {"function": SMOOTH["preprocess"], "sise": 3}},
            "no option 'sise'",
        ),
        ({"epochs": -1}, "epochs must be a whole number of at least 0, got -1"),
        ({"epochs": 2.5}, "epochs must be a whole number of at least 0, got 2.5"),
        ({"patience": 1.5}, "patience must be a whole number of at least 1, got 1.5"),
        ({"decay": 2}, r"decay must be a number in \(0, 1\], got 2"),
        ({"decay": 0.0}, r"decay must be a number in \(0, 1\], got 0.0"),
        ({"weight_decay": "much"}, "weight_decay must be a number of at least 0, got 'much'"),
        ({"tolerance": -1}, r"tolerance must be a number in \[0, 1\], got -1"),
        ({"prune": "half"}, r"prune must be a number in \[0, 1\), got 'half'"),
        ({"rates": "slow"}, "rates must be a mapping, got 'slow'"),
        ({"losses": 3}, "losses must be a mapping, got 3"),
        (
            {"losses": {"mine": {"function": f"{LOSSES}clean_cross_entropy", "weight": "1"}}},
            "losses.mine.weight must be a number of at least 0, got '1'",
        ),
        ({**PGD_AT, "attack": "pgd"}, "must be a mapping with a .*got 'pgd'"),
        (
            {**PGD_AT, "attack": {**PGD, "num_steps": 2.5}},
            "attack.num_steps must be a whole number",
        ),
        ({**PGD_AT, "attack": {**PGD, "step_size": -0.1}}, "attack.step_size must be a number"),
        ({**PGD_AT, "attack": {**PGD, "step_size": 0}}, r"step_size must be a number in \(0, 1\]"),
        ({**ON_ADVERSARIAL, "attack": {**POOL, "epsilon": 0.8}}, "ends at 0.5"),
        ({"adv_ratio": 1.5}, r"adv_ratio must be a number in \[0, 1\], got 1.5"),
        ({"start": "baseline", "head": "linear"}, "both 'start' and 'head', which"),
        ({"best": "last", "patience": 2}, "needs a validated epoch"),
    ],
)
def test_a_wrong_recipe_is_refused_before_the_first_step(tmp_path, recipe, message):
    config = tiny_recipes.config({"baseline": FROZEN, "wrong": recipe})
    if recipe.get("start") == "wrong_too":
        config.recipes.wrong_too = {"start": "wrong"}
    with pytest.raises(experiment.UsageError, match=f"(?s){message}") as error:
        go(config, tmp_path)
    # Recipes that start from each other are all wrong.
    place = "config.recipes" if "each other" in message else "config.recipes.wrong"
    assert place in str(error.value) and "JAX" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "config.training: seeds: need at least one seed"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"validation": {**PGD, "epsilon": 2.0}}, r"epsilon must lie in \[0, 1\]"),
        ({"validation": None}, "config.training.validation must be a mapping"),
        ({"validation": POOL}, "validation must be an attack on single images"),
    ],
)
def test_a_wrong_training_is_refused_before_the_first_step(tmp_path, change, message):
    config = tiny_recipes.config({"baseline": FROZEN})
    config.training = {**config.training.to_dict(), **change}
    with pytest.raises(experiment.UsageError, match=message):
        go(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_cannot_be_a_directorys_name_is_refused(tmp_path):
    with pytest.raises(experiment.UsageError, match=r"config.recipes: 'a/b' cannot be a name"):
        go(tiny_recipes.config({"a/b": FROZEN}), tmp_path)


def test_a_seed_is_one_of_jaxs_keys():
    """Of 2**32 the keys are those of 0, so both would be one seed."""
    for sections in ({"seed": 2**32}, {"training": {"seeds": (0, 2**32)}}):
        with pytest.raises(experiment.UsageError, match="seed"):
            planned({"a": {}}, **sections)
    assert planned({"a": {}}, seed=2**32 - 1).seed == 2**32 - 1
