"""What torch writes is read bit by bit as torch itself reads it, or refused with the cause."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import types
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest

import robust_ssl
from robust_ssl import models
from robust_ssl.weights import cards, mapping
from robust_ssl.weights.files import read_weights
from robust_ssl.weights.layouts import LAYOUTS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

FORMATS = {"zip": True, "legacy": False}


@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    """Writes an object with torch, in each of its two formats."""

    def save(value, name="weights.pth", **options):
        zipped = FORMATS[request.param]
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=zipped, **options)
        return tmp_path / name

    save.format = f"torch {request.param}"
    return save


def as_bytes(value):
    """A torch tensor's numbers in C order."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(stored, expected):
    assert list(stored) == list(expected)
    for name, value in expected.items():
        assert stored[name].shape == tuple(value.shape), name
        assert stored[name].dtype.name == str(value.dtype).removeprefix("torch."), name
        assert stored[name].tobytes() == as_bytes(value), name


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


TYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


@pytest.mark.parametrize("reader", ["safe", "torch"])
def test_a_network_is_read_as_torch_reads_it(save, reader):
    module = network()
    path = save(module.state_dict())
    stored = read_weights(path, reader=reader)
    assert stored.format == save.format
    assert_same(stored.tensors, torch.load(path, weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(save, protocol):
    state = network().state_dict()
    assert_same(read_weights(save(state, pickle_protocol=protocol)).tensors, state)


@pytest.mark.parametrize("reader", ["safe", "torch"])
def test_every_number_type(save, reader):
    state = {}
    # Torch itself cannot read the newer types back from its older format.
    unreadable = save.format == "torch legacy" and reader == "torch"
    for name in TYPES[:-8] if unreadable else TYPES:
        bits = torch.arange(48, dtype=torch.uint8) % (2 if name == "bool" else 48)
        state[name] = bits.view(getattr(torch, name)).reshape(-1, 3)
    stored = read_weights(save(state), reader=reader).tensors
    assert_same(stored, state)
    assert stored["bfloat16"].dtype == ml_dtypes.bfloat16


def test_views_parameters_and_shared_storages(save):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    tied = torch.nn.Parameter(torch.randn(4))
    tied.marked = "by its owner"  # saved in another way than a plain parameter
    state = {
        "turned": whole.permute(2, 0, 1),
        "sliced": whole[1:, ::2, 3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "one": whole[:1].expand(1, 4, 5),
        "tied": tied,
        "again": tied,
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }
    stored = read_weights(save(state))
    assert_same(stored.tensors, state)
    shared = [note for note in stored.notes if "shared" in note]
    assert shared == [
        "one storage is shared by turned, sliced, one",
        "one storage is shared by tied, again",
    ]


def fake_module(monkeypatch, name, **members):
    """A module that exists while the file is written, and no longer when it is read."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    for member in members.values():
        member.__module__ = name
        setattr(sys.modules[name], member.__name__, member)


def test_metadata_of_lightning_omegaconf_argparse_and_numpy(save, monkeypatch, tmp_path):
    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    class DictConfig:
        def __init__(self):
            self.me = self  # omegaconf's objects are cyclic

    for cls in (ModelCheckpoint, AttributeDict, DictConfig):
        cls.__qualname__ = cls.__name__
    with monkeypatch.context() as while_saving:
        fake_module(while_saving, "pytorch_lightning.callbacks.checkpoint", a=ModelCheckpoint)
        fake_module(while_saving, "pytorch_lightning.utilities.parsing", a=AttributeDict)
        fake_module(while_saving, "omegaconf.dictconfig", a=DictConfig)
        sys.modules["pytorch_lightning.callbacks"] = types.ModuleType("pytorch_lightning.callbacks")
        fake_module(while_saving, "pytorch_lightning.callbacks.checkpoint", a=ModelCheckpoint)
        module = network()
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(1, 3, 4, 4)).sum().backward()
        optimizer.step()
        path = save(
            {
                "epoch": 3,
                "state_dict": module.state_dict(),
                "optimizer_states": [optimizer.state_dict()],
                "callbacks": {ModelCheckpoint: {"best": np.float64(0.5)}},
                "hyper_parameters": AttributeDict(lr=0.1),
                "config": DictConfig(),
                "args": argparse.Namespace(out=tmp_path, device=torch.device("cpu"), d=torch.half),
                "best": np.float32(0.5),
                "seen": {1, 2},
                "counts": collections.defaultdict(int, a=1),
                "array": np.arange(3),
            }
        )
    assert "omegaconf" not in sys.modules
    stored = read_weights(path)
    assert "omegaconf" not in sys.modules and "pytorch_lightning" not in sys.modules
    assert stored.found_under == "state_dict"
    assert_same(stored.tensors, module.state_dict())
    assert any("hyper_parameters" in note and "optimizer_states" in note for note in stored.notes)
    with pytest.raises(ValueError, match="torch does not load it"):
        read_weights(path, reader="torch")


def test_a_flipped_bit_that_torch_does_not_see_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    state = {"w": torch.arange(1000.0)}
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    place = content.index(as_bytes(state["w"])) + 2002
    content[place] ^= 0x40
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], state["w"])  # silently wrong
    for reader in ("safe", "torch"):
        with pytest.raises(ValueError, match=r"data/0 is damaged .*CRC"):
            read_weights(path, reader=reader)


def test_a_whole_module_is_refused_by_name(save):
    path = save(network())
    for reader in ("safe", "torch"):
        with pytest.raises(
            ValueError, match=r"torch\.nn\.modules\.container\.Sequential"
        ) as caught:
            read_weights(path, reader=reader)
        assert str(path) in str(caught.value)


def scripted(module, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(module), file)
    return file


def test_of_a_torchscript_program_the_tensors_are_read_and_nothing_else(tmp_path):
    module = torch.nn.Sequential(network(), torch.nn.ModuleDict({"a": network().half()})["a"])
    module.register_buffer("resolution", torch.tensor(224))
    file = scripted(module, tmp_path / "script.pt")
    read = read_weights(file)
    assert read.format == "torch script" and "what it computes is not read" in str(read.notes)
    state = module.state_dict()
    assert read.tensors.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(read.tensors[name], tensor.numpy())
    with pytest.raises(ValueError, match=r'TorchScript program, whose tensors reader="safe" takes'):
        read_weights(file, reader="torch")


class Holder(torch.nn.Module):
    """Holds what a program holds, and computes nothing of interest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_openais_own_form_of_clip_is_read_as_its_state_dict(tmp_path):
    tower = {"width": 64, "heads": 1, "depth": 1, "patch_size": 8, "image_size": 16}
    tower |= {"pre_norm": True, "patch_bias": False, "norm_epsilon": 1e-5}
    encoder = models.vision_transformer(jax.random.key(0), activation="quick_gelu", **tower)
    (layout,) = (layout for layout in LAYOUTS if layout.name == "open-clip-vision")
    arrays = mapping.split(layout.entries(encoder), cards.to_arrays(encoder.variables))
    state = {f"visual.{name}": torch.tensor(x).half() for name, x in arrays.items()}
    state |= {"visual.proj": torch.ones(64, 4), "text_projection": torch.ones(4, 4)}
    numbers = {"input_resolution": 16, "context_length": 8, "vocab_size": 16}
    state |= {name: torch.tensor(number) for name, number in numbers.items()}
    program = Holder()
    for name, tensor in state.items():
        *owners, last = name.split(".")
        place = program
        for owner in owners:
            if owner not in dict(place.named_children()):
                place.add_module(owner, Holder())
            place = getattr(place, owner)
        place.register_buffer(last, tensor)
    torch.save(state, tmp_path / "plain.pt")
    files = (scripted(program, tmp_path / "ViT.pt"), tmp_path / "plain.pt")
    told = {"normalization": "clip", "activation": "quick_gelu", "heads": 1}
    ours, plain = (robust_ssl.import_encoder(file, **told) for file in files)
    assert ours.module == plain.module == encoder.module
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("value", [torch.nn.Linear, torch.ones(2).to_sparse()])
def test_what_is_not_plain_numbers_is_refused(save, value):
    with pytest.raises(ValueError, match="its pickle names torch"):
        read_weights(save({"w": torch.ones(2), "x": value}))


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("reader", ["safe", "torch"])
def test_nothing_of_a_hostile_file_runs(save, tmp_path, reader):
    marker, program = tmp_path / "owned", tmp_path / "program.py"
    program.write_text(f"open({str(marker)!r}, 'w').close()")
    for payload in (
        Hostile(os.system, f"touch {marker}"),
        Hostile(exec, program.read_text()),
        Hostile(eval, program.read_text()),
        Hostile(runpy.run_path, str(program)),
        Hostile(os.mkdir, str(marker)),
    ):
        pickle.loads(pickle.dumps(payload))
        assert marker.exists()  # it would
        marker.rmdir() if marker.is_dir() else marker.unlink()
        path = save({"w": torch.ones(2), "x": payload})
        with pytest.raises(ValueError, match=r"system|exec|eval|run_path|mkdir"):
            read_weights(path, reader=reader)
        assert not marker.exists()


def test_an_old_torch_is_refused(save, monkeypatch):
    path = save({"w": torch.ones(2)})
    for version in ("2.9.1", "1.13.0+cpu"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(ValueError, match=r"torch 2\.10 or newer"):
            read_weights(path, reader="torch")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git")
    assert list(read_weights(path, reader="torch").tensors) == ["w"]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="which is not here"):
        read_weights(path, reader="torch")


def test_the_benchmark_of_importing_runs(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [
            sys.executable,
            str(root / "benchmarks/import_weights.py"),
            "--rounds",
            "1",
            "--json",
            "f",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "f").read_text())
    assert set(stored) == {"zip", "legacy", "safetensors"}
    for row in stored.values():
        assert 95e6 < row["file_bytes"] < 110e6
        for side in ("robust_ssl", "torch"):  # the file is held once, not twice
            assert row[side]["seconds"] > 0
            assert 0.9 < row[side]["peak_memory_bytes"] / row["file_bytes"] < 1.5
