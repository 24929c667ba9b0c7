"""Every config that ships builds, names what exists, and says at its top how to run it."""

import ast
import os
import pathlib
import re
import subprocess

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from robust_ssl import experiment, list_encoders, settings
from robust_ssl.experiment import stages
from robust_ssl.experiment.pretrain import build_optimizer
from robust_ssl.experiment.sources import Data
from robust_ssl.experiment.suites import Suite
from robust_ssl.finetuning import mixed_losses

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(file.name for file in CONFIGS.glob("*.py"))


RUNS = [name for name in FILES if name != "common.py"]  # what all of them share


def load(name, *overrides):
    return settings.to_json(settings.load_config(f"{CONFIGS}/{name}", overrides))


def planned(name, *overrides):
    return experiment.plan(settings.load_config(f"{CONFIGS}/{name}", overrides))


def test_these_configs_ship():
    assert {"gen_af.py", "pretrain.py", "quickstart.py"} <= set(FILES)


@pytest.mark.parametrize("name", RUNS)
def test_a_config_begins_with_its_command(name):
    text = ast.get_docstring(ast.parse((CONFIGS / name).read_text()))
    first_lines = "\n".join(text.splitlines()[:4])
    assert re.search(rf"robust-ssl run {name.removesuffix('.py')}\b", first_lines)
    assert "--workdir=" in first_lines


@pytest.mark.parametrize("name", RUNS)
def test_a_config_names_what_exists(name):
    described = settings.describe(load(name))
    assert "NOT FOUND" not in described
    assert set(load(name)["stages"]) <= set(experiment.STAGES)


def test_the_band_of_a_defense_is_an_argument():
    band = load("compare.py:band=0.25-0.5")["recipes"]["universal_band"]
    assert (band["low"], band["high"]) == (0.25, 0.5)
    with pytest.raises(settings.SettingsError, match="band must be LOW-HIGH in cycles per pixel"):
        load("compare.py:band=wide")


@pytest.mark.parametrize("name", RUNS)
def test_nothing_stands_in_two_places_of_a_config(name):
    """Else one override would change several recipes."""
    places, waiting = {}, [((), settings.load_config(f"{CONFIGS}/{name}"))]
    while waiting:
        path, node = waiting.pop()
        assert places.setdefault(id(node), path) == path
        inner = node.items() if isinstance(node, ConfigDict) else ()
        waiting += [((*path, key), v) for key, v in inner if isinstance(v, ConfigDict | dict)]


def test_an_override_of_a_recipe_is_of_that_one_alone():
    changed = planned("compare.py", "--config.recipes.pgd_at.attack.num_steps=7").recipes
    plain = planned("compare.py").recipes
    assert [n for n in plain if changed[n].text != plain[n].text] == ["pgd_at"]
    assert changed["pgd_at"].build_attack(None).num_steps == 7


def test_a_section_that_may_be_left_out_is_left_out_by_none():
    config = "evidence.py:recipes=ramp_fgsm"
    assert planned(config).scoring.labelled is not None
    assert planned(config, "--config.scoring.labelled=None").scoring.labelled is None
    with pytest.raises(experiment.UsageError, match=r"needs config\.suite"):
        planned(config, "--config.suite=None")


def test_whatever_has_a_name_is_left_out_by_none():
    config = "evidence.py:recipes=ramp_fgsm+roli"
    whole = planned(config)
    left = planned(
        config,
        "--config.recipes.roli=None",
        "--config.compare.claims=()",  # the config's speak of it
        f"--config.suite.attacks.{next(iter(whole.suite.attacks))}=None",
        "--config.scoring.per_image.attacks.embed=None",
    )
    assert {*whole.recipes} - {*left.recipes} == {"roli"}
    assert [*left.suite.attacks] == [*whole.suite.attacks][1:]
    assert [*left.scoring.per_image.attacks] == ["pgd"]
    with pytest.raises(experiment.UsageError, match=r"labelled\.attacks is empty"):
        planned(config, "--config.scoring.labelled.attacks.universal_ce=None")
    with pytest.raises(experiment.UsageError, match=r"config.training.seeds must be a list"):
        planned(config, "--config.training.seeds=None")


def test_an_attempt_to_break_a_recipe_is_one_argument():
    stressed = planned("evidence.py:stress=yes,recipes=ramp_fgsm,seeds=0")
    assert stressed.stages == ("attack", "train", "score")
    assert [recipe.name for recipe in stressed.scored] == ["ramp_fgsm"]
    placed = [a.make_threat(a.budgets[0]) for a in stressed.suite.attacks.values()]
    assert [getattr(threat, "location", None) for threat in placed] == ["fixed", "random", None]
    per_image, labelled = stressed.scoring.per_image, stressed.scoring.labelled
    tried = {
        (name, type(budget.threat).__name__, round(255 * budget.epsilon, 2))
        for budget in per_image.scored
        for name in per_image.at(budget)
    }
    assert tried == {
        *(("pgd_restarts", "Linf", 8), ("pgd_restarts", "Linf", 12)),
        *(("pgd_restarts", "L2", 127.5), ("pgd_restarts", "Patch", 7.65)),
        *(("embed", "Linf", 10), ("embed", "Linf", 12)),
    }
    assert per_image.images == 200
    kinds = [type(a.make_threat(a.budgets[0])).__name__ for a in labelled.attacks.values()]
    assert kinds == ["Patch", "Linf"] and labelled.attacks["universal_ce"].budgets == (12 / 255,)
    with pytest.raises(settings.SettingsError, match="stress must be yes"):
        load("evidence.py:stress=no")


def test_what_is_one_factor_away_differs_by_nothing_else():
    recipes = load("evidence.py:factors=yes,round=2")["recipes"]
    base = recipes["ramp_fgsm"]
    added = ("no_ramp", "ramp_from_start", "ramp_ends_early", "low_rate", "constant_rates")
    for name in (*added, "mlp_head"):
        other = recipes[name]
        changed = [entry for entry in other if other[entry] != base.get(entry)]
        assert len(changed) == 1 and other["function"] == base["function"]
    for name in ("ramp_pgd2", "ramp_nfgsm", "ramp_ema", "ramp_teacher"):
        entries = ("rates", "ramp", "head")
        assert [recipes[name][entry] for entry in entries] == [base[entry] for entry in entries]
    scored = [recipe.name for recipe in planned("evidence.py:factors=yes,round=2").scored]
    assert len(scored) == 12 and "full" not in scored


def test_a_sweep_of_the_evidence_has_the_claims_that_its_directories_began_with():
    claims = [planned(f"evidence.py:tune={r}").compare.claims for r in ("", "ramp_fgsm")]
    assert [len(each) for each in claims] == [8, 7] and claims[0][:7] == claims[1]


def test_who_tunes_in_the_second_round_has_what_the_first_has_taken():
    def tuned(round, recipe):
        return planned(f"evidence.py:tune={recipe},round={round}").recipes[recipe]

    assert tuned(1, "ramp_fgsm").ramp.end != tuned(2, "ramp_fgsm").ramp.end == 1.0
    swept = planned("evidence.py:tune=gen_af_unguarded,round=2").sweep
    assert swept.recipe == "gen_af_unguarded" and len(swept.grid[0][1]) == 4
    both = planned("evidence.py:tune=gen_af_unguarded,round=3,downstream=cifar10").sweep
    assert [len(values) for _, values in both.grid] == [2, 4]
    with pytest.raises(settings.SettingsError, match="round must be one of 1, 2, 3, 4"):
        load("evidence.py:round=5")


def test_the_third_round_has_values_for_each_set_and_none_for_others():
    weights = {}
    for downstream in ("cifar10", "tiny_imagenet20"):
        recipes = load(f"evidence.py:round=3,downstream={downstream}")["recipes"]
        weights[downstream] = recipes["gen_af_stage1"]["weight"]
        assert recipes["ramp_fgsm"]["rates"]["head/**"] == 5e-3
    assert weights == {"cifar10": 0.0, "tiny_imagenet20": 20.0}
    fourth = load("evidence.py:round=4,downstream=tiny_imagenet20")["recipes"]
    assert fourth["ramp_from_start"] == fourth["ramp_fgsm"] | {"ramp": {"start": 0.0, "end": 0.6}}
    second = load("evidence.py:round=2")["recipes"]["ramp_fgsm"]
    assert load("evidence.py:round=4")["recipes"]["ramp_fgsm"] == second
    with pytest.raises(settings.SettingsError, match="round 3 has values for cifar10, tiny_imag"):
        load("evidence.py:round=3,downstream=gtsrb32")


@pytest.mark.parametrize("downstream", ["gtsrb32", "cifar10", "tiny_imagenet20"])
def test_the_ninth_round_has_all_recipes_and_compares_each_with_gen_af(downstream):
    plan = planned(f"evidence.py:round=9,downstream={downstream}")
    eight = {"full", "gen_af", "roli", "trades", "ramp_fgsm", "ramp_pgd", "ramp_from_start"}
    assert {recipe.name for recipe in plan.scored} == {"baseline", "gen_af_unguarded", *eight}
    assert plan.compare.claims[0] == {"better_than": "gen_af_unguarded"}
    tuned = planned(f"evidence.py:round=9,tune=roli,downstream={downstream}")
    assert [*tuned.sweep.grid[0][1]] == [5e-4, 1e-3, 2e-3, 4e-3]


def test_the_rounds_keep_the_epochs_that_were_announced():
    recipes = planned("evidence.py:round=9").recipes
    last = {"ramp_fgsm", "ramp_pgd", "ramp_from_start"}
    assert {name: recipe.best for name, recipe in recipes.items()} == {
        name: "last" if name in last else "highest" for name in recipes
    }


def test_a_round_with_a_recipe_left_out_has_no_variant_of_it():
    assert "ramp_from_start" not in load("evidence.py:round=4,recipes=full")["recipes"]


def test_the_seventh_round_is_of_one_folder_wherever_it_lies():
    folder = "downstream=data/cifar100_superclasses"
    recipes = load(f"evidence.py:round=7,{folder}")["recipes"]
    assert recipes["ramp_from_start"]["ramp"] == {"start": 0.0, "end": 1.0}
    tuned = planned(f"evidence.py:round=7,tune=ramp_from_start,{folder}")
    assert [*tuned.sweep.grid[0][1]] == [5e-4, 1e-3, 2e-3, 4e-3]
    second = load("evidence.py:round=2")["recipes"]["ramp_fgsm"]["rates"]
    assert tuned.recipes["ramp_from_start"].text["rates"] == second
    with pytest.raises(settings.SettingsError, match="a folder cifar100_superclasses alone"):
        load("evidence.py:round=7")


def test_recipes_can_be_left_out_with_all_that_is_made_from_them():
    assert "twins" not in load("compare.py:without=twins")["recipes"]
    for wrong in ("without=alf", "without=baseline", "recipes=roli,without=alf"):
        with pytest.raises(settings.SettingsError, match="leave that one out too"):
            load(f"compare.py:{wrong}")
    one = planned("compare.py:recipes=trades").recipes
    assert one["baseline"].scored and not one["full"].scored
    other = load("compare.py:other=runs/mine")["recipes"]["other_encoder"]
    assert other["encoder"] == "runs/mine"


FINE_TUNING = ("analyze.py", "gen_af.py", "quickstart.py")


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_the_suite_can_be_built(scale):
    suite = Suite.read(load(f"score.py:scale={scale}")["suite"], "config.suite")
    kinds = {type(entry.attack).__name__ for entry in suite.attacks.values()}
    assert {
        *("AdvEncoderPER", "AdvEncoderPAT", "L4ABase", "L4AFuse", "L4AUGS", "SSP", "FFF", "STD"),
        *("UAP", "UAPPGD", "RandomNoise"),
    } <= kinds
    for entry in suite.attacks.values():
        assert min(entry.num_steps, entry.batch_size) > 0
        assert entry.budgets_for(curve=True)


@pytest.mark.parametrize("name", FINE_TUNING)
def test_what_a_config_describes_can_be_built(name):
    plan = planned(name)
    for attack in plan.suite.attacks.values():
        assert attack.budgets[0] == plan.suite.epsilon
        curve = 1 if name == "quickstart.py" else 4  # which compiles one program less
        assert len(attack.budgets) == len(set(attack.budgets)) == curve
    assert plan.training.validation.build(None).num_steps > 0
    recipes = plan.recipes
    assert recipes["gen_af_stage1"].losses.keys() >= {"adversarial_cross_entropy"}
    assert set(recipes["baseline"].losses) == {"clean_cross_entropy"}
    assert recipes["gen_af"].start is recipes["gen_af_stage1"]
    assert set(plan.scoring.per_image.attacks) == {"pgd"}


MADE_FIRST = ("large.py", "pretrain.py")  # their encoder


@pytest.mark.parametrize("name", [name for name in RUNS if name not in MADE_FIRST])
def test_the_encoder_a_config_starts_from_ships(name):
    assert load(name)["encoder"]["path"] in list_encoders()


def test_a_run_that_pretrains_first_reads_its_task_before(tmp_path):
    run = experiment.Context(planned("large.py:blocks=1,rank=4"), tmp_path, None, None)
    assert run.plan.recipes["last_blocks"].last_blocks == 1
    assert run.image_size == 32
    stages.check_data(run)  # there is no encoder yet


def test_the_research_config_takes_arguments_and_settings():
    plan = planned(
        "gen_af.py:downstream=cifar10,epsilon=8/255,epochs=3,train_limit=500,batch_size=64",
        "--config.recipes.gen_af_stage1.adv_ratio=0.5",
        "--config.suite.seeds=(0,1)",
        "--config.suite.curve=(1/255,2/255)",
    )
    assert plan.downstream.source == "cifar10"
    assert plan.downstream.train_limit == 500
    assert plan.suite.epsilon == 8 / 255
    assert plan.suite.seeds == (0, 1)
    assert plan.suite.curve == (1 / 255, 2 / 255)
    assert {recipe.epochs for recipe in plan.recipes.values()} == {3}
    assert {recipe.batch_size for recipe in plan.recipes.values()} == {64}
    losses = plan.recipes["gen_af_stage1"].losses
    expected = mixed_losses(0.5, losses["genetic_regularization"].weight)
    assert {name: term.weight for name, term in losses.items()} == {
        name: weight for name, (_, weight) in expected.items()
    }


def test_the_research_config_uses_all_images_unless_told_otherwise():
    assert planned("gen_af.py").downstream.train_limit is None
    limited = load("gen_af.py", "--config.downstream.train_limit=100")
    assert limited["downstream"]["train_limit"] == 100
    for name in ("gen_af.py", "compare.py", "score.py"):
        sizes = [f"--config.{images}.image_size=48" for images in ("downstream", "surrogate")]
        resized = load(name, *sizes)
        assert resized["downstream"]["image_size"] == resized["surrogate"]["image_size"] == 48


def test_the_attacker_has_other_images_than_the_defender():
    for name in RUNS:
        config = load(name)
        if "attack" in config["stages"]:
            surrogate, downstream = Data.read(config["surrogate"], ""), config["downstream"]
            assert surrogate != Data.read(downstream, "")


# --- What is typed over a config ----------------------------------------------------------------


def test_a_recipe_is_typed_as_a_mapping_or_entry_by_entry():
    mapping = "{'start': 'baseline', 'epochs': 2, 'rates': {'**': 1/1000, 'head/**': 'freeze'}}"
    typed = planned("quickstart.py", f"--config.recipes.mine={mapping}").recipes["mine"]
    assert (typed.start.name, typed.epochs) == ("baseline", 2)
    assert typed.rates == {"**": 1e-3, "head/**": "freeze"}
    one_by_one = ["start=baseline", "epochs=2", "rates={'**': 1/1000, 'head/**': 'freeze'}"]
    entries = [f"--config.recipes.mine.{entry}" for entry in one_by_one]
    assert planned("quickstart.py", *entries).recipes["mine"] == typed
    named = planned("quickstart.py", "--config.recipes.mine=robust_ssl.recipes:trades")
    assert "trades_kl" in named.recipes["mine"].losses


def test_a_bare_function_gets_an_option():
    options = ("--config.recipes.baseline.epochs=3", "--config.recipes.baseline.head=linear")
    baseline = planned("quickstart.py", *options).recipes["baseline"]
    assert (baseline.epochs, baseline.head) == (3, "linear")
    assert baseline.rates["encoder/**"] == "freeze"
    step = "--config.suite.attacks.universal_pgd.step_size=1/255"
    assert planned("quickstart.py", step).suite.attacks["universal_pgd"].attack.step_size == 1 / 255


def test_a_section_that_a_config_has_not_is_added():
    assert planned("quickstart.py", "--config.scoring.batch_size=100").scoring.batch_size == 100
    budgets = "--config.scoring.autoattack.budgets=(8/255,)"
    [budget] = planned("quickstart.py", budgets).scoring.autoattack.budgets
    assert budget.epsilon == 8 / 255
    with pytest.raises(experiment.UsageError, match="'scorin' in config; did you mean 'scoring'"):
        planned("quickstart.py", "--config.scorin.batch_size=100")


def test_none_leaves_a_guard_out():
    assert (
        planned("gen_af.py", "--config.recipes.gen_af.tolerance=None").recipes["gen_af"].tolerance
        is None
    )


METHODS = {
    *("simclr", "mocov2plus", "mocov3", "byol", "dino", "nnclr", "ressl", "swav", "vibcreg"),
    *("wmse", "barlow", "vicreg", "simsiam", "supcon", "deepclusterv2"),
}


@pytest.mark.parametrize("scale", ["small", "research"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_pretraining_config_builds_every_method_and_its_optimizer(name, scale):
    section = planned(f"pretrain.py:method={name},scale={scale},data=cifar100_small").pretrain
    assert section.data.source == "cifar100_small"
    width = {"small": 16, "research": 64}[scale]
    assert section.encoder.options["name"] == f"{name}-cifar100_small-r18w{width}"
    method, encoder = section.method(), tiny.encoder()
    variables = jax.eval_shape(lambda key: method.init(key, encoder, 5000), jax.random.key(0))
    tx = build_optimizer(section, steps_per_epoch=10)
    assert jax.tree.leaves(jax.eval_shape(tx.init, variables["params"]))


def test_a_method_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(settings.SettingsError, match=r"method='simclrr' is none of simclr"):
        load("pretrain.py:method=simclrr")


CLUSTERS = CONFIGS.parent / "docs" / "clusters"


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu-pod.sh"])
def test_a_cluster_script_is_one(name):
    subprocess.run(["bash", "-n", CLUSTERS / name], check=True)


@pytest.mark.parametrize(("hosts", "status"), [((0, 0), 0), ((0, 1), 1), ((), 1)])
def test_a_pod_has_succeeded_when_every_host_has(tmp_path, hosts, status):
    """The last lines of the script, with a `gcloud` that only says how each host ended."""
    endings = "\n".join(f"ended with {code}" for code in hosts)
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"#!/bin/sh\ncat <<'END'\n{endings}\nEND\n")
    gcloud.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", CLUSTERS / "tpu-pod.sh"], cwd=tmp_path, env=path, check=False)
    assert done.returncode == status


def test_the_quickstart_has_two_sizes():
    small, full = (
        experiment.plan(settings.load_config(f"quickstart:size={size}"))
        for size in ("small", "full")
    )
    assert small == experiment.plan(settings.load_config("quickstart"))
    assert {r.epochs for r in full.recipes.values()} == {8}
    assert all(small.recipes[name].epochs < 8 for name in full.recipes)
    with pytest.raises(ValueError, match="small or full"):
        settings.load_config("quickstart:size=huge")


def test_the_sixth_round_is_with_the_published_head_alone():
    announced = "evidence.py:head=mlp,round=6,tune="
    swept = [planned(announced + recipe) for recipe in ("gen_af_unguarded", "ramp_from_start")]
    assert [[values for _, values in each.sweep.grid] for each in swept] == [
        [[5e-4, 1e-3, 2e-3, 4e-3]]
    ] * 2
    assert [each.sweep.grid[0][0] for each in swept] == [
        "start.rates.encoder/**",
        "rates.encoder/**",
    ]
    assert all(each.recipes["ramp_from_start"].head == "mlp" for each in swept)
    with pytest.raises(settings.SettingsError, match="round 6 has values for head=mlp"):
        load("evidence.py:round=6")
