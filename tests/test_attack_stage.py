"""The stage `attack`: an attack's threat and budgets, and what is refused before it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import ATTACKS, context

from robust_ssl import experiment, threats
from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.experiment import attack as stage
from robust_ssl.experiment.suites import Suite
from robust_ssl.stopping import Stopped
from robust_ssl.threats import Band, Linf

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
NOISE = {"function": f"{ATTACKS}RandomNoise"}
PATCH = {
    "function": "robust_ssl.attacks.generative:AdvEncoderPAT",
    "width": 4,
    "threat": {"function": "robust_ssl.threats:Patch", "location": "random"},
    "epsilon": 0.05,
    "curve": (0.02, 0.05),
}
BAND = {"function": "robust_ssl.threats:Band", "threat": {"function": "robust_ssl.threats:Linf"}}


def suite(**attacks):
    return {"attacks": attacks, "epsilon": 0.1, "curve": (0.05,), "batch_size": 4}


def config(**attacks):
    changed = tiny_recipes.config({}, "attack")
    changed.suite = {**suite(**attacks), "num_steps": 2}
    return changed


def test_an_attack_has_the_threat_and_the_budgets_of_its_options():
    attacks = Suite.read(suite(noise=NOISE, patch=PATCH), "config.suite").attacks
    assert attacks["patch"].attack.name == "patch" and attacks["patch"].attack.width == 4
    assert attacks["noise"].budgets_for(curve=True) == (0.1, 0.05)
    assert attacks["patch"].budgets_for(curve=True) == (0.05, 0.02)
    assert attacks["patch"].budgets_for(curve=False) == (0.05,)
    threat = attacks["patch"].make_threat(0.3)
    assert (threat.area, threat.location) == (0.3, "random")
    assert attacks["noise"].make_threat is threats.Linf


def test_a_config_names_the_inner_threat_and_shares_the_budgets():
    low = {**BAND, "low": 0.1, "high": 0.3}
    banded = {"function": f"{ATTACKS}UniversalPGD", "threat": low}
    attack = Suite.read(suite(banded=banded), "config.suite").attacks["banded"]
    assert attack.budgets == (0.1, 0.05) and attack.attack.name == "banded"
    assert attack.make_threat(0.1) == Band(Linf(0.1), 0.1, 0.3)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({**PATCH, "epsilon": 5}, "the area of a patch"),
        ({**PATCH, "threat": {**PATCH["threat"], "radius": 1}}, "'radius'"),
        ({**PATCH, "threat": {"location": "fixed"}}, 'threat must be .*"function"'),
        ({**NOISE, "threat": {"function": "robust_ssl.threats:Patch"}}, "not in pixel units"),
        ({**NOISE, "threat": {"function": "robust_ssl.threats:Pach"}}, "did you mean Patch"),
        (
            {**NOISE, "fit": {"batch_size": 33}},
            "surrogate set: a batch of 33 is .*of 32",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(attack, message, tmp_path):
    with pytest.raises(experiment.UsageError, match=rf"config\.suite\.attacks\.one.*{message}"):
        tiny_recipes.go(config(one=attack), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_stage_fits_saves_and_loads_each_attack_with_its_own_threat(tmp_path):
    banded, patch = {**NOISE, "threat": {**BAND, "high": 0.3}}, {**PATCH, "noise_vectors": 2}
    changed = config(plain=NOISE, banded=banded, patch=patch)
    tiny_recipes.go(changed, tmp_path)
    run = context(changed, tmp_path)
    fitted = stage.load_perturbations(run, stage.attack(run))
    assert {(one.attack, one.epsilon) for one in fitted} == {
        *(("plain", 0.1), ("plain", 0.05), ("banded", 0.1), ("banded", 0.05)),
        *(("patch", 0.05), ("patch", 0.02)),
    }
    names = sorted(path.name for path in (tmp_path / "attack").glob("*.npz"))
    assert len(names) == len(fitted) and "patch-area0.02-seed0.npz" in names
    image = jnp.asarray(np.random.default_rng(0).uniform(size=SHAPE), jnp.float32)
    for name, seed, budget, perturbation, *_ in fitted:
        kind = f"area{budget:g}" if name == "patch" else f"eps{np.round(255 * budget, 2):g}"
        saved = UniversalPerturbation.load(tmp_path / "attack" / f"{name}-{kind}-seed{seed}.npz")
        np.testing.assert_array_equal(saved(KEY, None, image), perturbation(KEY, None, image))
        assert type(saved.threat) is type(perturbation.threat)


def test_a_killed_fit_goes_on_with_the_next_attack(tmp_path, monkeypatch):
    changed = config(universal_pgd=f"{ATTACKS}UniversalPGD", random_noise=NOISE)
    fitted, original = [], stage._fit

    def counts(run, name, member, *args, **options):
        fitted.append(member.name)
        return original(run, name, member, *args, **options)

    def dies(*args, **options):
        if fitted:
            raise Stopped("killed")
        return counts(*args, **options)

    monkeypatch.setattr(stage, "_fit", dies)
    with pytest.raises(Stopped):
        stage.attack(context(changed, tmp_path / "killed"))
    assert fitted == ["random_noise"]
    monkeypatch.setattr(stage, "_fit", counts)
    resumed = stage.attack(context(changed, tmp_path / "killed"))
    assert fitted == ["random_noise", "universal_pgd"]
    whole = stage.attack(context(changed, tmp_path / "whole"))
    assert resumed.fingerprint == whole.fingerprint
    steps = [entry["step"] for entry in resumed.metrics()]
    assert steps == list(range(len(steps)))
