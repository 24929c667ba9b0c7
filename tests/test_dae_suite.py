"""The benchmark of the downstream-agnostic attacks runs, and does the same work on both sides."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import models, threats
from robust_ssl.attacks import FitBatch, per_image, targeted
from robust_ssl.types import AttackInputs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
BUDGET = threats.Linf(10 / 255)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_suite_runs_and_reports_what_it_promises(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
    }
    tiny = ["--width", "8", "--batch", "8", "--image-size", "16", "--steps", "1", "--rounds", "2"]
    chosen = ["--members", "2", "--attacks", "l4a_ugs", "uap", "tdaa", "--json", "found.json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "dae_suite.py"), *tiny, *chosen],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["benchmark"] == "dae_suite" and list(found["attacks"]) == [
        "l4a_ugs",
        "uap",
        "tdaa",
    ]
    for name, report in found["attacks"].items():
        sides = report["sides"]
        assert report["ratio"]["torch"] > 0 and set(sides) == {"jax", "torch"}
        assert ("members" in sides["jax"]) == (name != "tdaa")
    assert 0 < found["attacks"]["uap"]["sides"]["jax"]["members"]["ratio"] < 20
    assert done.stdout.splitlines()[-1].startswith("all ")


def _both_encoders():
    import torch_models
    from test_benchmarks import _carry

    encoder = models.resnet18(jax.random.key(0), width=8, image_size=16)
    module = torch_models.ResNet18(8, "cifar").eval().requires_grad_(False)
    _carry(encoder.variables, module)
    return encoder, module


def _images(count):
    return np.random.default_rng(1).uniform(size=(count, 16, 16, 3)).astype(np.float32)


def _nchw(array):
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "name", ["l4a_base", "l4a_fuse", "l4a_ugs", "ssp", "std", "fff", "uap", "uap_pgd"]
)
def test_both_sides_make_the_same_step(name):
    import dae_suite
    import torch_dae_suite

    encoder, module = _both_encoders()
    images, attack = jnp.asarray(_images(8)), dae_suite.universal_attack(name)
    if name == "uap_pgd":  # more steps than that part at the first gradient that is nearly zero
        attack = attack.replace(num_steps=1)
    state = attack.init(jax.random.key(3), (16, 16, 3), BUDGET)
    start = attack.delta(state, BUDGET)
    theirs = torch_dae_suite.make(name, module, _nchw(images), 10 / 255)
    with torch.no_grad():
        theirs.delta.copy_(_nchw(start[None]))
    if name == "l4a_ugs":
        key = jax.random.fold_in(state.key, 0)
        drawn = attack.gaussian_images(key, jnp.arange(8), (16, 16, 3))
        theirs.draw = lambda images: _nchw(drawn)
    if name == "uap_pgd":
        theirs.step_sizes = (2e-3, 2e-4)
    step = jax.jit(lambda state: attack.step(state, BUDGET, FitBatch.on(encoder, BUDGET, images)))
    state, _ = step(state)
    theirs.step()
    ours = state.current if name == "fff" else attack.delta(state, BUDGET)
    found = theirs.delta.detach()[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - start).max() > 1e-4
    # The sign of a gradient that is zero up to rounding may differ.
    assert np.mean(np.abs(found - ours) > 2e-5) < 0.01


@pytest.mark.parametrize("name", ["embed", "tdaa"])
def test_per_image_attacks_get_equally_far_on_both_sides(name):
    import torch_dae_suite

    encoder, module = _both_encoders()
    images = jnp.asarray(_images(4))
    attack = targeted.TDAA(BUDGET, images[0]) if name == "tdaa" else per_image.EmbedAttack(BUDGET)
    craft = jax.jit(lambda x: per_image.attack_batch(attack, jax.random.key(0), encoder, x))
    theirs = torch_dae_suite.make(name, module, _nchw(images), 10 / 255)
    theirs.step()
    adversarial = jnp.asarray(theirs.adversarial.permute(0, 2, 3, 1).contiguous().numpy())
    assert np.abs(adversarial - images).max() <= 10 / 255 + 1e-6
    goal = encoder(images[:1]) if name == "tdaa" else None
    values = []
    for moved in (craft(images), adversarial):
        inputs = AttackInputs(encoder(images), encoder(moved), images, moved, target=goal)
        values.append(float(attack.objective(inputs)))
    assert values[1] == pytest.approx(values[0], rel=0.25)  # the random starts differ
