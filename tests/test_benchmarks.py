"""The benchmarks run, report what they promise, and do the same work on both sides."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from robust_ssl import attacks, losses, models, objectives, pretraining, threats
from robust_ssl.pretraining import augmentation
from robust_ssl.types import AttackInputs, LossInputs, Outputs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
TINY = ["--width", "8", "--batch", "8", "--image-size", "16", "--steps", "1", "--rounds", "2"]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _options(**changes):
    options = {"network": "resnet18", "width": 8, "stem": "cifar", "batch": 4, "image_size": 16}
    return argparse.Namespace(**{**options, **changes})


def _nchw(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def _nhwc(images):
    return images.detach().permute(0, 2, 3, 1).numpy()


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------- they run


@pytest.mark.parametrize("name", ["secure_finetuning", "advencoder", "pretraining"])
def test_a_benchmark_runs_and_reports_what_it_promises(name, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *TINY, "--json", "found.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ratio jax / torch" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["benchmark"] == name and found["options"]["width"] == 8
    assert set(found["sides"]) == {"jax", "torch"}
    for side in found["sides"].values():
        assert len(side["rounds"]) == 2 and all(speed > 0 for speed in side["rounds"])
        assert min(side["rounds"]) <= side["images_per_second"] <= max(side["rounds"])
        assert side["images_per_step"] == 8 and side["peak_memory_bytes"] > 1e7
        assert side["compile_seconds"] >= 0 and side["device"] and side["versions"]
    jax_side, torch_side = found["sides"]["jax"], found["sides"]["torch"]
    assert jax_side["devices"] == found["machine"]["cores"] and jax_side["method"] == "pmap"
    assert found["ratio"]["torch"] == pytest.approx(
        jax_side["images_per_second"] / torch_side["images_per_second"]
    )


def test_one_side_alone_needs_no_torch(monkeypatch, tmp_path, capsys):
    import harness

    def side(options):
        return harness.Side(lambda steps: 0.5 * steps, 8, _FACTS, lambda: None)

    monkeypatch.setattr(harness, "_Process", _InThisProcess)
    monkeypatch.setattr(sys, "argv", ["x", "--alone", "--json", str(tmp_path / "found.json")])
    options = harness.options_of("")
    found = harness.compare("x", options, side, make_torch=None)
    assert found["sides"].keys() == {"jax"} and found["ratio"] == {}
    assert found["sides"]["jax"]["images_per_second"] == 16
    assert "ratio" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", "--alone", "--tuned"])
    with pytest.raises(SystemExit):
        harness.options_of("")


_FACTS = {
    **{"platform": "cpu", "device": "one", "devices": 1, "method": "pmap", "dtype": "float32"},
    **{"versions": {}, "compile_seconds": 0.0},
}


class _InThisProcess:
    """A side of a benchmark without a process of its own."""

    def __init__(self, name, make, options):
        self.name, self.side, self.facts = name, make(options), _FACTS

    def run(self, steps):
        self.seconds = self.side.run(steps) / steps

    def finish(self):
        images = self.side.images_per_step / self.seconds
        return {
            **{"images_per_second": images, "rounds": [images], "peak_memory_bytes": 1},
            **self.facts,
            **{"seconds_per_step": self.seconds},
        }


def test_a_side_that_fails_ends_the_benchmark(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "pretraining.py"), *TINY, "--devices", "9999"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "num_devices=9999" in done.stderr and "the jax side failed" in done.stderr


# ------------------------------------------------------------------------------ equal in work


def _carry(variables, module):
    """Copies linen weights into the torch module of the same paths."""
    names = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}
    state = dict(module.state_dict())
    flat = flatten_dict({**variables["params"]}) | flatten_dict({**variables["batch_stats"]})
    for (*path, leaf), value in flat.items():
        value = np.array(value)
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
        name = ".".join([*path, names.get(leaf, leaf)])
        assert state[name].shape == value.shape
        state[name] = torch.from_numpy(value.copy())
    module.load_state_dict(state)
    return len(flat)


@pytest.mark.parametrize("network", ["resnet50", "vit_small"])
def test_a_full_size_network_has_as_many_weights_on_both_sides(network):
    import torchvision_operators  # noqa: F401 (before timm, which imports torchvision)

    pytest.importorskip("timm")
    import secure_finetuning

    options = _options(network=network, image_size=32, dtype="float32")
    encoder = secure_finetuning.own_encoder(options)
    module, dim = secure_finetuning.torch_encoder(options)
    ours = sum(leaf.size for leaf in jax.tree.leaves(encoder.variables["params"]))
    assert ours == sum(parameter.numel() for parameter in module.parameters())
    assert module.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, dim)
    assert encoder(jnp.zeros((2, 32, 32, 3))).features.shape == (2, dim)


@pytest.mark.parametrize("stem", ["cifar", "cifar_half"])
def test_the_torch_encoder_is_the_same_network(stem):
    import torch_models

    encoder = models.resnet18(jax.random.key(0), width=8, image_size=16, stem=stem)
    module = torch_models.ResNet18(8, stem).eval()
    carried = _carry(encoder.variables, module)
    kept = [name for name in module.state_dict() if "num_batches" not in name]
    assert carried == len(kept) - 2  # all but the normalization's mean and deviation
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    found = module(_nchw(images)).detach().numpy()
    expected = jax.jit(lambda encoder, x: encoder(x).features)(encoder, images)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_torch_generator_is_the_same_network():
    import torch_models

    attack = attacks.AdvEncoderPER(width=4, noise_vectors=2)
    state = attack.init(jax.random.key(0), (16, 16, 3), threats.Linf(0.1))
    params = jax.tree.map(lambda x: x + 0.1, state.params)  # so that no bias is zero
    expected = jax.jit(attack.delta)(state.replace(params=params), threats.Linf(0.1))
    module = torch_models.Generator(16, channels=4, noise_vectors=2)
    weights = jax.tree.map(np.array, params)
    first, _, up1, second, _, up2 = module.layers
    with torch.no_grad():
        dense = weights["Dense_0"]["kernel"].reshape(100, 4, 4, 8).transpose(3, 1, 2, 0)
        module.dense.weight.copy_(torch.from_numpy(dense.reshape(-1, 100)))
        for norm, name in ((first, "norm1"), (second, "norm2")):
            norm.weight.copy_(torch.from_numpy(weights[name]["scale"]))
            norm.bias.copy_(torch.from_numpy(weights[name]["bias"]))
        for layer, name in ((up1, "kernel1"), (up2, "kernel2")):
            layer.weight.copy_(torch.from_numpy(weights[name].transpose(2, 3, 0, 1)))
        up2.bias.copy_(torch.from_numpy(weights["bias"]))
        module.mix.weight.copy_(torch.from_numpy(weights["mix"].transpose(2, 0, 1)[None]))
        found = module(torch.from_numpy(np.array(state.noise))).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(0.1 * found, expected, atol=1e-5)


def test_the_torch_losses_are_the_same_functions():
    import torch_losses

    clean, adversarial = _random(6, 5), _random(6, 5, seed=1)
    ours, theirs = (clean, adversarial), (torch.from_numpy(clean), torch.from_numpy(adversarial))
    labels = np.array([0, 1, 2, 3, 4, 0], np.int32)
    expected = pretraining.nt_xent(*ours).mean()
    assert torch_losses.nt_xent(*theirs).item() == pytest.approx(float(expected), rel=1e-4)

    outputs = [Outputs(features=jnp.asarray(x), logits=jnp.asarray(x)) for x in ours]
    inputs = LossInputs(labels=jnp.asarray(labels), clean=outputs[0], adversarial=outputs[1])
    expected = losses.genetic_regularization(inputs).mean()
    found = torch_losses.genetic_regularization(*theirs, torch.from_numpy(labels).long())
    assert found.item() == pytest.approx(float(expected), rel=1e-4)

    images, change = np.zeros((6, 16, 16, 3), np.float32), _random(6, 16, 16, 3, seed=2)
    expected = objectives.advencoder_released(AttackInputs(*outputs, images, images + change))
    found = torch_losses.advencoder_released(*theirs, _nchw(change))
    assert found.item() == pytest.approx(float(expected), rel=1e-4)


def test_the_torch_augmentation_is_the_same_operation():
    import torch_augmentation

    images = np.random.default_rng(3).uniform(size=(4, 16, 16, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    factors = jax.vmap(lambda key: jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0))(keys)
    expected = jax.vmap(augmentation.color_jitter)(keys, images)
    found = torch_augmentation.color_jitter(_nchw(images), torch.from_numpy(np.array(factors)))
    np.testing.assert_allclose(_nhwc(found), expected, atol=1e-5)

    top, left, down, across = 0.1, 0.25, 0.8, 0.4
    zoom = jnp.array([1 / down, 1 / across])
    expected = jax.image.scale_and_translate(
        images[0],
        (16, 16, 3),
        (0, 1),
        zoom,
        -jnp.array([16 * top, 16 * left]) * zoom,
        method="linear",
        antialias=False,
    )
    shares = [torch.full((1,), share) for share in (top, left, down, across)]
    found = torch_augmentation.crop(_nchw(images[:1]), *shares)
    np.testing.assert_allclose(_nhwc(found)[0], expected, atol=1e-5)

    view = torch_augmentation.simclr_view(_nchw(images))
    assert view.shape == (4, 3, 16, 16)
    assert view.min() >= 0 and view.max() <= 1


@pytest.mark.parametrize(
    ("name", "forward", "to_input", "to_kernel"),
    [
        # A ResNet-18 has 20 convolutions; the stem's input is an image, which only attacks ask for.
        ("secure_finetuning", 12 * 20, 10 * 20 + 2 * 19, 2 * 20),
        ("advencoder", 2 * 20 + 3, 20 + 3, 3),  # the generator has 3
        ("pretraining", 20, 19, 20),
    ],
)
def test_the_torch_side_makes_the_passes_that_it_says(name, forward, to_input, to_kernel):
    import importlib

    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        found = (0, 0, 0)

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            one = (0, 0, 0)
            if operation is torch.ops.aten.convolution.default:
                one = (1, 0, 0)
            elif operation is torch.ops.aten.convolution_backward.default:
                one = (0, *map(int, args[-1][:2]))
            self.found = tuple(a + b for a, b in zip(self.found, one, strict=True))
            return operation(*args, **(kwargs or {}))

    options = _options(members=1, generator_width=1, noise_vectors=1)
    side = importlib.import_module(name).make_torch(options, tuned=False)
    with Count() as count:
        side.run(1)
    assert count.found == (forward, to_input, to_kernel)
