"""Encoders of the hub: pinned, read through the cache's links, offline too; never the network."""

import json
import shutil

import jax
import numpy as np
import pytest
from hub_server import serving
from safetensors.numpy import save_file

from robust_ssl import models, weights
from robust_ssl.cli import main
from robust_ssl.experiment.sources import EncoderSource
from robust_ssl.weights import hub

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HERE = f"hf://someone/encoder@{COMMIT}"
FACTS = {"normalization": "cifar10", "image_size": 16}


@pytest.fixture(scope="module")
def encoder():
    return models.resnet18(jax.random.key(0), width=8, image_size=16)


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    weights.export_safetensors(encoder, folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# An encoder\n")
    (folder / "weights.bin").write_bytes(b"never fetched")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return tmp_path / "cache"


@pytest.fixture
def served(exported, cache, monkeypatch):
    with serving(exported) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def same(ours, theirs):
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def test_a_pinned_encoder_is_read_through_the_links_and_again_offline(served, encoder, monkeypatch):
    loaded = weights.import_encoder(HERE)
    assert same(loaded.variables, encoder.variables)
    assert loaded.name == "encoder"
    _, folder = hub.fetch(HERE)
    assert (folder / "model.safetensors").is_symlink()
    assert not any("weights.bin" in path for path in served.asked)
    served.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same(weights.import_encoder(HERE).variables, encoder.variables)
    assert not served.asked


def test_a_config_and_the_command_line_take_it(served, encoder, tmp_path, capsys):
    source = EncoderSource.read(HERE, "encoder")
    assert same(source.load(jax.random.key(0)).variables, encoder.variables)
    assert main.main(["encoder", "convert", HERE, "--out", str(tmp_path / "ours")]) == 0
    card = weights.encoder_card(tmp_path / "ours")["card"]
    assert card["imported_from"]["source"] == HERE
    assert main.main(["encoder", "inspect", HERE]) == 0
    assert "can be converted" in capsys.readouterr().out


def test_an_encoder_of_this_package_needs_to_be_told_nothing(encoder, tmp_path, cache, monkeypatch):
    folder = weights.save_encoder(encoder, tmp_path / "saved", {"data": "none"})
    with serving(folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        assert same(weights.import_encoder(HERE).variables, encoder.variables)
        place = weights.convert_encoder(HERE, tmp_path / "again")
        card = weights.encoder_card(place)["card"]
        assert card == {"data": "none", "imported_from": {"source": HERE}}
        with pytest.raises(ValueError, match="leave out normalization"):
            weights.import_encoder(HERE, normalization="cifar10")


def test_its_files_say_how_pictures_are_resized(exported, tmp_path, cache, monkeypatch):
    folder = shutil.copytree(exported, tmp_path / "with a processor")
    weights.export_safetensors(
        models.resnet18(jax.random.key(0), width=8, image_size=16), folder / "model.safetensors"
    )
    record = {"size": {"shortest_edge": 20}, "crop_size": 16, "resample": 3}
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps({**record, **means}))
    with serving(folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        resizing = EncoderSource.read(HERE, "encoder").resizing(16)
    local = weights.resizing_of(folder, 16)
    assert resizing == local


def test_shards_are_read(encoder, exported, tmp_path, cache, monkeypatch):
    tensors = dict(weights.inspect_file(exported).file.tensors)
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for place, (name, tensor) in enumerate(tensors.items()):
        parts["ab"[place % 2] + ".safetensors"][name] = tensor
    folder = tmp_path / "shards"
    folder.mkdir()
    for file, part in parts.items():
        save_file(part, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    with serving(folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        loaded = weights.import_encoder(HERE, **FACTS, stem="cifar", stem_padding=1)
    assert same(loaded.variables, encoder.variables)


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", "@0123abc", f"@{COMMIT.upper()}"])
def test_a_moving_revision_is_refused_before_anything_is_fetched(revision, served):
    for read in (weights.import_encoder, lambda source: EncoderSource.read(source, "encoder")):
        with pytest.raises(ValueError, match="pin it"):
            read(f"hf://someone/encoder{revision}")
    assert not served.asked


def test_a_moving_revision_that_is_asked_for_is_pinned_in_the_card(served, tmp_path):
    place = weights.convert_encoder("hf://someone/encoder", tmp_path / "ours", allow_moving=True)
    assert weights.encoder_card(place)["card"]["imported_from"]["source"] == HERE


@pytest.mark.parametrize("source", ["hf://encoder", "hf://a/b/c@x", "hf://a/../b", "hf://a/b@"])
def test_what_is_no_address_is_named(source):
    with pytest.raises(ValueError, match="must be hf://owner/name@"):
        weights.import_encoder(source)


def test_allow_moving_is_for_addresses(exported):
    with pytest.raises(ValueError, match="is for addresses"):
        weights.import_encoder(exported, allow_moving=True)


def test_what_cannot_be_fetched_or_read_is_said(served, cache, monkeypatch):
    with pytest.raises(ValueError, match="cannot be fetched"):
        weights.import_encoder(f"hf://someone/encoder@{'f' * 40}")
    _, folder = hub.fetch(HERE)
    link = folder / "model.safetensors"
    link.resolve().unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"lead nowhere|cannot be fetched"):
        weights.import_encoder(HERE)
    shutil.rmtree(folder)
    folder.write_text("no folder")
    with pytest.raises(ValueError, match=r"the cache cannot be read|cannot be fetched"):
        weights.import_encoder(HERE)
    monkeypatch.setenv("HF_HUB_CACHE", "/dev/null/cache")
    with pytest.raises(ValueError, match="cannot be fetched"):
        weights.import_encoder(HERE)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"robust-ssl\[provenance\]"):
        weights.import_encoder(HERE)
