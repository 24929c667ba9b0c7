"""What a user brings works wherever its kind can stand: trained, saved, resumed, scored by path."""

import json
import shutil

import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import context, final, go, manifest

from robust_ssl import attacks, experiment, report, weights
from robust_ssl.experiment import attack, train

HERE = "outsider:"
BUDGET = {"epsilon": 0.05, "threat": {"function": f"{HERE}OneChannel", "channel": 2}}


def config(*stages):
    config = tiny_recipes.config({"mine": f"{HERE}everything", "full": {}}, *stages)
    config.encoder = {"function": f"{HERE}encoder", "width": 5}
    config.common = {"epochs": 2, "batch_size": 16}
    config.suite.attacks = {
        "ascent": {"function": f"{HERE}Ascent", **BUDGET},
        "pgd": {
            "function": "robust_ssl.attacks:UniversalPGD",
            "objective": f"{HERE}towards_zero",
        },
    }
    config.scoring.per_image = {
        "attacks": {
            "one_step": f"{HERE}OneStep",
            "pgd": {"function": "robust_ssl.attacks:PGD", "num_steps": 1},
        },
        "budgets": (BUDGET, 0.03),
    }
    config.compare.update(baseline="full", claims=())
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("outsider")
    return workdir, go(config("attack", "train", "score", "compare"), workdir)


def test_everything_of_a_user_is_trained_and_scored(finished):
    workdir, results = finished
    assert set(results["train"]["trained"]) == {"mine-seed0", "full-seed0"}
    entries = report.results.read(workdir / "results.json")["results"]
    scored = {(e["attack"], e["family"], e["threat"], e["crafted_against"]) for e in entries}
    for against in ("public", "hardened"):
        assert ("ascent", "universal", "OneChannel", against) in scored
        assert ("pgd", "universal", "Linf", against) in scored
    for name in ("one_step", "pgd"):
        for threat in ("OneChannel", "Linf"):
            assert (name, "per_image", threat, "hardened") in scored


def test_a_threat_of_a_user_is_saved_with_what_was_fitted(finished):
    workdir, _ = finished
    [file] = (workdir / "attack").glob("ascent-*.npz")
    import outsider

    loaded = attacks.UniversalPerturbation.load(file, threat=outsider.OneChannel)
    assert loaded.threat.channel == 2
    [ours] = [
        one
        for one in attack.load_perturbations(context(config(), workdir), stage(workdir))
        if one.attack == "ascent"
    ]
    np.testing.assert_array_equal(loaded.delta, ours.perturbation.delta)
    assert np.abs(loaded.delta[..., 2]).max() > 0 and not np.abs(loaded.delta[..., :2]).any()


def stage(workdir):
    return attack.attack(context(config(), workdir))


def test_a_finished_run_is_skipped(finished, monkeypatch):
    workdir, results = finished
    before = tiny_recipes.snapshot(workdir)
    monkeypatch.setattr(attacks, "fit", lambda *a, **k: pytest.fail("fitted again"))
    assert go(config("attack", "train", "score", "compare"), workdir) == results
    assert tiny_recipes.snapshot(workdir) == before


def test_it_is_scored_by_path(finished, tmp_path):
    workdir, _ = finished
    made = config("attack", "score")
    made.recipes = {}
    made.classifiers = {
        "theirs": {
            "path": str(workdir / "recipes" / "mine-seed0"),
            "builder": f"{HERE}encoder",
            "head": f"{HERE}Cosines",
            "preprocess": f"{HERE}Dim",
        }
    }
    made.scoring.adaptive = False
    shutil.copytree(workdir / "attack", tmp_path / "attack")
    go(made, tmp_path)
    [first, second] = (
        report.results.read(folder / "results.json")["results"] for folder in (workdir, tmp_path)
    )

    def figures(entries, model):
        return {
            (e["attack"], e["threat"], e["family"]): e["robust_accuracy"]
            for e in entries
            if e["model"] == model and e["crafted_against"] == "public"
        }

    assert figures(second, "theirs") == figures(first, "mine-seed0")
    del made.classifiers.theirs.preprocess
    with pytest.raises(experiment.UsageError, match=r"'outsider:Dim'.*preprocess=.*theirs"):
        go(made, tmp_path / "other")


def test_nothing_that_a_file_names_is_imported(finished):
    workdir, _ = finished
    folder = workdir / "recipes" / "mine-seed0"
    with pytest.raises(ValueError, match="builder="):
        weights.load_classifier(folder)
    card = json.loads((folder / "classifier" / "encoder.json").read_text())
    assert card["preprocess"]["name"] == "outsider:Dim"


def test_two_devices_and_one_agree(finished, tmp_path):
    workdir, _ = finished
    one = context(config("attack"), tmp_path, num_devices=1)
    fitted = attack.load_perturbations(one, attack.attack(one))
    two = attack.load_perturbations(context(config(), workdir), stage(workdir))
    for ours, theirs in zip(fitted, two, strict=True):
        np.testing.assert_allclose(
            ours.perturbation.delta, theirs.perturbation.delta, atol=2e-2 * 0.05
        )


def test_an_edited_function_is_noticed(tmp_path, monkeypatch):
    """Under the same name it is another one: what was made with the first is not taken for it."""
    monkeypatch.chdir(tmp_path)
    source = "import jax.numpy as jnp\nSCALE = 1.0\ndef part(x):\n    return SCALE * x\n"
    source += "def loss(inputs):\n    return part(jnp.sum(inputs.clean.logits ** 2, axis=-1))\n"
    (tmp_path / "brought.py").write_text(source)
    recipes = {"own": {"losses": {"mine": f"{tmp_path}/brought.py:loss"}}}
    made, workdir = tiny_recipes.config(recipes), tmp_path / "run"
    go(made, workdir)
    go(made, workdir)
    before = final(workdir, "own")
    (tmp_path / "brought.py").write_text(source.replace("SCALE = 1.0", "SCALE = 3.0"))
    with pytest.raises(ValueError, match=r"brought\.py:loss"):
        go(made, workdir)
    after = final(workdir, "own")
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf)
    assert manifest(workdir, "recipes/own-seed0")["status"] == "done"


def test_a_stranger_and_train_meet(finished):
    workdir, _ = finished
    run = context(config(), workdir)
    recipe = run.plan.recipes["mine"]
    classifier = train.load_trained(run, recipe, 0)
    assert type(classifier.encoder.preprocess).__name__ == "Dim"
    assert type(classifier.head).__name__ == "Cosines"
