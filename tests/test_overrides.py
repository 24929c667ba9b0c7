"""What is typed over a config sets what it names, and loses nothing beside it."""

import pytest
from ml_collections import config_dict

from robust_ssl.experiment import UsageError, linking, plan
from robust_ssl.optimizers import FREEZE, layer_rates
from robust_ssl.settings import SettingsError, load_config, overrides, to_json

RECIPES = {
    "baseline": "robust_ssl.recipes:baseline",
    "full": "robust_ssl.recipes:full",
    "trades": {"function": "robust_ssl.recipes:trades", "epochs": 3},
}


def typed(*texts, recipes=RECIPES):
    config = config_dict.ConfigDict({"seed": 0, "downstream": {"name": "a"}, "recipes": recipes})
    overrides.apply(config, [f"--config.{text}" for text in texts])
    return config


def entries(config, recipe):
    return linking.entries_of(config.recipes[recipe].to_dict(), {}, recipe)


def losses(config, recipe):
    return {name: entry["weight"] for name, entry in entries(config, recipe)["losses"].items()}


def test_one_weight_leaves_the_other_losses_of_the_recipes_function():
    config = typed("recipes.trades.losses.trades_kl.weight=3")
    assert losses(config, "trades") == {"clean_cross_entropy": 1.0, "trades_kl": 3.0}
    assert config.recipes.trades.epochs == 3


def test_a_new_loss_comes_to_the_others():
    mine = "recipes.full.losses.mine={'function': 'robust_ssl.losses:trades_kl', 'weight': 2.0}"
    assert losses(typed(mine), "full") == {"clean_cross_entropy": 1.0, "mine": 2.0}
    whole = "recipes.full.losses={'mine': {'function': 'robust_ssl.losses:trades_kl'}}"
    assert [*entries(typed(whole), "full")["losses"]] == ["mine"]  # all of it was typed
    both = (
        "recipes.full.losses.mine=robust_ssl.losses:trades_kl",
        "recipes.full.losses.mine.weight=3",
    )
    assert losses(typed(*both), "full") == {"clean_cross_entropy": 1.0, "mine": 3}


@pytest.mark.parametrize(
    ("pattern", "rates"),
    [
        ("encoder/**", {"encoder/**": 1e-4, "head/**": 5e-3}),
        ("encoder/stem/**", {"encoder/**": 1e-3, "encoder/stem/**": 1e-4, "head/**": 5e-3}),
        ("**", {"**": 1e-4}),  # nothing is left of what it covers
    ],
)
def test_one_rate_leaves_those_that_it_does_not_cover(pattern, rates):
    config = typed(f"recipes.full.rates['{pattern}']=1e-4")
    assert entries(config, "full")["rates"] == rates


def test_of_rates_the_last_one_counts_in_the_order_in_which_they_were_written():
    rates = {"encoder/**": 1e-3, "head/**": 5e-3, "**/bias": "freeze"}
    given = config_dict.ConfigDict({"recipes": {"mine": {"rates": rates}}})
    assert [*to_json(given)["recipes"]["mine"]["rates"]] == [*rates]
    config = load_config("quickstart", [f"--config.recipes.mine={ {'rates': rates} }"])
    mine = plan(config).recipes["mine"]
    assert [*mine.rates] == [*rates]
    params = {part: {"layer": {"kernel": 0, "bias": 0}} for part in ("encoder", "head")}
    assert layer_rates(params, mine.rates)["encoder/layer/kernel"] == 1e-3
    assert layer_rates(params, mine.rates)["encoder/layer/bias"] == FREEZE
    typed = [f"--config.recipes.gen_af_stage1.rates['{name}']={rates[name]}" for name in rates]
    assert [*plan(load_config("quickstart", typed)).recipes["gen_af_stage1"].rates] == [*rates]


def test_what_a_config_has_is_not_asked_of_a_function():
    recipes = {"full": {"function": "robust_ssl.recipes:full", "losses": {"mine": {"weight": 1.0}}}}
    config = typed("recipes.full.losses.mine.weight=2", recipes=recipes)
    assert losses(config, "full") == {"mine": 2.0}
    config = typed("recipes.other.losses.mine=robust_ssl.losses:trades_kl")
    assert config.recipes.other.losses.to_dict() == {"mine": "robust_ssl.losses:trades_kl"}


def test_the_example_of_the_guide_is_a_plan():
    config = load_config("compare", ["--config.recipes.full.rates['encoder/**']=1e-4"])
    assert plan(config).recipes["full"].rates == {"encoder/**": 1e-4, "head/**": 5e-3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipes['a.b']={'start': 'baseline'}", r"recipes\['a.b'\].*dots"),
        ("recipes.mine={'start': 'baseline'", "cannot read .* as a mapping or a list .*closed"),
        ("downstream=digits", "is a section and not one value, got 'digits'"),
        ("scoring.budgets[0]=0.1", "config.scoring has no list 'budgets'; give all of it"),
        ("recipes.mine={[]: 1}", "cannot read .* as a mapping or a list .*unhashable"),
        ("seed.x=1", "config.seed is 0 and has no 'x'"),
        ("seed=2.5", "config.seed must be a whole number, got '2.5'"),
        ("seed=two", "config.seed must be a whole number, got 'two'"),
        ("seed=true", "config.seed must be a whole number, got 'true'"),
    ],
)
def test_what_cannot_be_set_is_said(text, said):
    with pytest.raises(SettingsError, match=said):
        typed(text)


@pytest.mark.parametrize("text", ["attack,train", "attack, train", "('attack', 'train')"])
def test_words_of_a_list_are_divided_by_commas(text):
    config = load_config("quickstart", [f"--config.stages={text}"])
    assert config.stages == ("attack", "train")


def test_a_number_that_is_none_is_said():
    with pytest.raises(SettingsError, match=r"suite\.epsilon must be a number, got 'big'"):
        load_config("quickstart", ["--config.suite.epsilon=big"])


def test_mappings_may_be_json():
    config = typed('recipes.mine={"function": "a:b", "keep_best": true}')
    assert config.recipes.mine.to_dict() == {"function": "a:b", "keep_best": True}


def test_a_loaded_config_may_be_added_to_and_a_misspelt_key_is_refused_with_near_names():
    config = load_config("quickstart")
    config.recipes.mine = {"function": "robust_ssl.recipes:pgd_at", "epochs": 1}
    config.scoring.labelled = {"attacks": {"mine": "robust_ssl.attacks:UniversalPGD"}}
    assert plan(config).recipes["mine"].epochs == 1
    config.suite.numsteps = 3
    with pytest.raises(UsageError, match=r"'numsteps' in config\.suite; did you mean 'num_steps'"):
        plan(config)
