"""Every config that ships builds, names what exists, and says at its top how to run it."""

import ast
import os
import pathlib
import subprocess

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from robust_ssl import list_encoders, settings, stages, threats
from robust_ssl.build import resolve
from robust_ssl.finetuning import mixed_losses
from robust_ssl.stages import attack, evaluate, finetune, pretrain, recipes

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(file.name for file in CONFIGS.glob("*.py"))


def load(name, *overrides):
    return settings.to_json(settings.load_config(f"{CONFIGS}/{name}", overrides))


def test_these_configs_ship():
    assert {"gen_af.py", "pretrain.py", "quickstart.py"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_config_begins_with_its_command(name):
    text = ast.get_docstring(ast.parse((CONFIGS / name).read_text()))
    first_lines = "\n".join(text.splitlines()[:4])
    assert f"robust-ssl run --config=configs/{name}" in first_lines
    assert "--workdir=" in first_lines


@pytest.mark.parametrize("name", FILES)
def test_a_config_names_what_exists(name):
    described = settings.describe(load(name))
    assert "NOT FOUND" not in described
    assert set(load(name)["stages"]) <= set(stages.STAGES)


def test_the_band_of_a_defence_is_an_argument():
    band = load("compare.py:band=0.25-0.5")["methods"]["universal_band"]["attack"]["threat"]
    assert (band["low"], band["high"]) == (0.25, 0.5)
    with pytest.raises(settings.SettingsError, match="band must be LOW-HIGH in cycles per pixel"):
        load("compare.py:band=wide")


@pytest.mark.parametrize("name", FILES)
def test_nothing_stands_in_two_places_of_a_config(name):
    """Else one override would change several recipes."""
    places, waiting = {}, [((), settings.load_config(f"{CONFIGS}/{name}"))]
    while waiting:
        path, node = waiting.pop()
        assert places.setdefault(id(node), path) == path
        inner = node.items() if isinstance(node, ConfigDict) else ()
        waiting += [((*path, key), v) for key, v in inner if isinstance(v, ConfigDict | dict)]
    override = "--config.methods.pgd_at.attack.num_steps=7"
    if name == "compare.py":
        changed, plain = load(name, override)["methods"], load(name)["methods"]
        assert [n for n in plain if changed[n] != plain[n]] == ["pgd_at"]


def test_what_recipes_have_in_common_is_what_they_have_if_nothing_is_said():
    common = load("compare.py")["common"]
    of_the_run = ("epochs", "batch_size")
    assert {n: v for n, v in common.items() if n not in of_the_run} == {
        n: recipes.DEFAULTS[n] for n in common if n not in of_the_run
    }


def test_methods_can_be_left_out_with_all_that_is_made_from_them():
    assert "twins" not in load("compare.py:without=twins")["methods"]
    for wrong in ("without=alf", "without=usual", "methods=roli,without=alf"):
        with pytest.raises(settings.SettingsError, match="leave that one out too"):
            load(f"compare.py:{wrong}")
    one = load("compare.py:methods=trades")["methods"]
    assert one["usual"].get("scored", True) and not one["full"]["scored"]
    assert load("compare.py:other=runs/mine")["methods"]["other_encoder"]["encoder"] == "runs/mine"


FINE_TUNING = [name for name in FILES if name not in ("pretrain.py", "evaluate.py", "compare.py")]


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_the_suite_can_be_built(scale):
    config = load(f"evaluate.py:scale={scale}")
    built = attack.build_attacks(config["attack"]["methods"])
    assert set(built) == set(config["attack"]["methods"])
    kinds = {type(value).__name__ for value in built.values()}
    assert {
        *("AdvEncoderPER", "AdvEncoderPAT", "L4ABase", "L4AFuse", "L4AUGS", "SSP", "FFF", "STD"),
        *("UAP", "UAPPGD", "RandomNoise"),
    } <= kinds
    for name in built:
        fitted = [attack.fit_option(config["attack"], name, o) for o in ("num_steps", "batch_size")]
        assert min(fitted) > 0
        assert attack.budgets(config["attack"], curve=True, method=name)


@pytest.mark.parametrize("name", FINE_TUNING)
def test_what_a_config_describes_can_be_built(name):
    config = load(name)
    budgets = attack.budgets(config["attack"], curve=True)
    assert budgets[0] == config["attack"]["epsilon"] and len(budgets) == len(set(budgets))
    threats.check_epsilon(budgets)
    assert set(attack.build_attacks(config["attack"]["methods"])) == set(
        config["attack"]["methods"]
    )
    assert finetune.build_pgd(config["finetune"]["attack"]).num_steps > 0
    assert "adversarial_cross_entropy" in finetune.build_losses(config["finetune"])
    assert set(finetune.clean_losses(config["usual"])) == {"clean_cross_entropy"}
    evaluate.check_models(config["evaluate"]["models"])
    per_image = evaluate.build_per_image(config["evaluate"]["per_image"])
    assert set(per_image) == {"embed", "pgd"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "pretrain.py"])
def test_the_encoder_a_config_starts_from_ships(name):
    assert load(name)["encoder"]["path"] in list_encoders()


def test_the_research_config_takes_arguments_and_settings():
    config = load(
        "gen_af.py:downstream=cifar10,epsilon=8/255,epochs=3,train_limit=500,batch_size=64",
        "--config.finetune.adv_ratio=0.5",
        "--config.attack.seeds=(0,1)",
        "--config.attack.curve=(1/255,2/255)",
    )
    assert config["downstream"]["source"] == "cifar10"
    assert config["downstream"]["train_limit"] == 500
    assert config["attack"]["epsilon"] == 8 / 255
    assert config["attack"]["seeds"] == [0, 1]
    assert config["attack"]["curve"] == [1 / 255, 2 / 255]
    assert {config[stage]["epochs"] for stage in ("usual", "finetune", "stage2")} == {3}
    assert {config[stage]["batch_size"] for stage in ("usual", "finetune", "stage2")} == {64}
    losses = finetune.build_losses(config["finetune"])
    expected = mixed_losses(0.5, config["finetune"]["regularization_weight"])
    assert {name: weight for name, (_, weight) in losses.items()} == {
        name: weight for name, (_, weight) in expected.items()
    }


def test_the_research_config_uses_all_images_unless_told_otherwise():
    assert load("gen_af.py")["downstream"]["train_limit"] is None
    limited = load("gen_af.py", "--config.downstream.train_limit=100")
    assert limited["downstream"]["train_limit"] == 100
    for name in ("gen_af.py", "compare.py", "evaluate.py"):
        sizes = [f"--config.{images}.image_size=48" for images in ("downstream", "surrogate")]
        resized = load(name, *sizes)
        assert resized["downstream"]["image_size"] == resized["surrogate"]["image_size"] == 48


def test_the_attacker_has_other_images_than_the_defender():
    for name in FILES:
        config = load(name)
        if "attack" in config["stages"]:
            assert config["surrogate"]["source"] != config["downstream"]["source"]


METHODS = {
    *("simclr", "mocov2plus", "mocov3", "byol", "dino", "nnclr", "ressl", "swav", "vibcreg"),
    *("wmse", "barlow", "vicreg", "simsiam", "supcon", "deepclusterv2"),
}


@pytest.mark.parametrize("scale", ["small", "research"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_pretraining_config_builds_every_method_and_its_optimizer(name, scale):
    config = load(f"pretrain.py:method={name},scale={scale},data=cifar100_small")["pretrain"]
    assert config["data"] == {"source": "cifar100_small"}
    width = {"small": 16, "research": 64}[scale]
    assert config["encoder"]["name"] == f"{name}-cifar100_small-r18w{width}"
    method = resolve(config["method"])(**config["method_options"])
    encoder = tiny.encoder()
    variables = jax.eval_shape(lambda key: method.init(key, encoder, 5000), jax.random.key(0))
    tx = pretrain.build_optimizer(config, steps_per_epoch=10)
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
    told = "\n".join(f"ended with {code}" for code in hosts)
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"#!/bin/sh\ncat <<'END'\n{told}\nEND\n")
    gcloud.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", CLUSTERS / "tpu-pod.sh"], cwd=tmp_path, env=path, check=False)
    assert done.returncode == status
