"""The attack stage: a method's own threat and budgets, and what is refused before it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import progress, settings, stages, threats
from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.parallel import Parallel
from robust_ssl.stages import attack as stage
from robust_ssl.threats import Band, Linf

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
CONFIG = {
    "methods": {
        "noise": {"function": "robust_ssl.attacks:RandomNoise"},
        "patch": {
            "function": "robust_ssl.attacks.generative:AdvEncoderPAT",
            "width": 4,
            "threat": {"function": "robust_ssl.threats:Patch", "location": "random"},
            "epsilon": 0.05,
            "curve": (0.02, 0.05),
        },
    },
    "epsilon": 0.1,
    "curve": (0.05,),
    "batch_size": 4,
    "seeds": (0,),
}


class Surrogate:
    image_shape = SHAPE

    def __len__(self):
        return 6


def _changed(method, **options):
    methods = {**CONFIG["methods"], method: {**CONFIG["methods"][method], **options}}
    return {**CONFIG, "methods": methods}


def test_a_method_has_the_threat_and_the_budgets_of_its_options():
    stage.check_config(CONFIG, Surrogate())
    built = stage.build_attacks(CONFIG["methods"])
    assert built["patch"].name == "patch" and built["patch"].width == 4
    assert stage.budgets(CONFIG, curve=True) == [0.1, 0.05]
    assert stage.budgets(CONFIG, curve=True, method="noise") == [0.1, 0.05]
    assert stage.budgets(CONFIG, curve=True, method="patch") == [0.05, 0.02]
    assert stage.budgets(CONFIG, curve=False, method="patch") == [0.05]
    threat = stage.threat_of("patch", CONFIG["methods"]["patch"])(0.3)
    assert (threat.area, threat.location) == (0.3, "random")
    assert stage.threat_of("noise", CONFIG["methods"]["noise"]) is threats.Linf


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**CONFIG, "batch_size": 7}, "surrogate set: a batch of 7 is larger than the set of 6"),
        (_changed("patch", epsilon=5), "attack 'patch': the area of a patch"),
        (_changed("patch", threat={"function": "robust_ssl.threats:Patch", "radius": 1}), "radius"),
        (_changed("patch", threat={"location": "fixed"}), 'a threat needs a "function"'),
        (_changed("noise", threat={"function": "robust_ssl.threats:Patch"}), "not in pixel units"),
        (_changed("noise", threat={"function": "robust_ssl.threats:Pach"}), "did you mean Patch"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(config, words):
    with pytest.raises(ValueError, match=words):
        stage.check_config(config, Surrogate())


@pytest.mark.slow
def test_the_stage_fits_saves_and_loads_each_method_with_its_own_threat(tmp_path):
    linf = {"function": "robust_ssl.threats:Linf"}
    noise = {"function": "robust_ssl.attacks:RandomNoise"}
    config = tiny.config("attack")
    with config.ignore_type():
        config.attack.methods = {
            "plain": noise,
            "banded": {
                **noise,
                "threat": {"function": "robust_ssl.threats:Band", "threat": linf, "high": 0.3},
            },
            "patch": {**CONFIG["methods"]["patch"], "noise_vectors": 2},
        }
    config.attack.epsilon, config.attack.curve = 0.1, (0.05,)
    parallel = Parallel.create(num_devices=2)
    stages.run(config, tmp_path, parallel=parallel, progress=progress.Progress("quiet"))
    plain = settings.to_json(config)
    run = stages.Run(plain, tmp_path, parallel, progress.Progress("quiet"))
    found = stage.load_perturbations(stage.attack(run), plain["attack"], curve=True)
    assert {(method, budget) for method, _, budget in found} == {
        *(("plain", 0.1), ("plain", 0.05), ("banded", 0.1), ("banded", 0.05)),
        *(("patch", 0.05), ("patch", 0.02)),
    }
    names = sorted(path.name for path in (tmp_path / "attack").glob("*.npz"))
    assert len(names) == len(found) and "patch-area0.02-seed0.npz" in names
    image = jnp.asarray(np.random.default_rng(0).uniform(size=SHAPE), jnp.float32)
    for (method, seed, budget), value in found.items():
        kind = f"area{budget:g}" if method == "patch" else f"eps{np.round(255 * budget, 2):g}"
        saved = UniversalPerturbation.load(tmp_path / "attack" / f"{method}-{kind}-seed{seed}.npz")
        np.testing.assert_array_equal(saved(KEY, None, image), value(KEY, None, image))
        assert type(saved.threat) is type(value.threat)


def test_a_config_names_the_inner_threat_and_shares_the_budgets():
    linf = {"function": "robust_ssl.threats:Linf"}
    band = {"function": "robust_ssl.threats:Band", "threat": linf, "low": 0.1, "high": 0.3}
    methods = {"banded": {"function": "robust_ssl.attacks:UniversalPGD", "threat": band}}
    config = {"methods": methods, "epsilon": 0.1, "curve": (0.05,)}
    assert stage.budgets(config, curve=True, method="banded") == [0.1, 0.05]
    threat = stage.threat_of("banded", methods["banded"])(0.1)
    assert threat == Band(Linf(0.1), 0.1, 0.3)
    assert stage.build_attacks(methods)["banded"].name == "banded"


def test_a_killed_fit_goes_on_with_the_next_method(tmp_path, monkeypatch):
    config = tiny.config("attack")
    fitted, original = [], stage._fit

    def dies(run, name, universal, *args):
        if len(fitted) == 1:
            raise progress.Stopped("killed")
        fitted.append(universal.name)
        return original(run, name, universal, *args)

    def go(workdir):
        run = stages.Run(
            settings.to_json(config),
            workdir,
            Parallel.create(num_devices=1),
            progress.Progress("quiet"),
        )
        return stage.attack(run)

    monkeypatch.setattr(stage, "_fit", dies)
    with pytest.raises(progress.Stopped):
        go(tmp_path / "killed")
    first = list(fitted)
    monkeypatch.setattr(
        stage, "_fit", lambda *args: (fitted.append(args[2].name), original(*args))[1]
    )
    resumed = go(tmp_path / "killed")
    assert fitted == list(config.attack.methods) and fitted[:1] == first
    monkeypatch.setattr(stage, "_fit", original)
    whole = go(tmp_path / "whole")
    assert resumed.fingerprint == whole.fingerprint
    steps = [entry["step"] for entry in resumed.metrics()]
    assert steps == list(range(len(steps)))
