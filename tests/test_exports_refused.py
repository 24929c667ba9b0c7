"""What cannot be written as it is meant is refused, and what was exported is itself again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import robust_ssl
from robust_ssl import models, weights
from robust_ssl.data import pictures


@pytest.fixture(scope="module")
def net():
    encoder = models.resnet18(jax.random.key(0), width=4, image_size=16)
    return models.classifier(jax.random.key(1), encoder, 3, head="linear")


@pytest.mark.parametrize("name", ["a.pth", "a.PT", "a.ckpt", "a.bin"])
def test_safetensors_have_no_name_of_torchs(net, tmp_path, name):
    with pytest.raises(ValueError, match=r"name it a\.safetensors"):
        weights.export_safetensors(net.encoder, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_encoder_and_a_classifier_are_told_apart(net, tmp_path):
    for call in (weights.export_safetensors, weights.save_encoder):
        with pytest.raises(
            ValueError, match=r"takes an Encoder, got a Classifier.*save_classifier"
        ):
            call(net, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"takes a Classifier, got a Encoder.*save_encoder"):
        weights.save_classifier(net.encoder, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_not_exported(net, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, net.encoder.variables)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        weights.export_safetensors(
            net.encoder.replace(variables=broken), tmp_path / "a.safetensors"
        )


@pytest.mark.slow
def test_what_was_exported_for_torch_keeps_its_normalization(net, tmp_path):
    pytest.importorskip("torch")
    robust_ssl.export_torch(net, tmp_path)
    images = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)
    again = robust_ssl.import_encoder(tmp_path / "model.safetensors")
    assert again.mean == pytest.approx(net.encoder.mean)
    np.testing.assert_allclose(again(images).features, net.encoder(images).features, atol=1e-5)
    with pytest.raises(ValueError, match="own header says mean"):
        robust_ssl.import_encoder(tmp_path / "model.safetensors", normalization="imagenet")


@pytest.mark.slow
def test_a_picture_that_scoring_refuses_is_refused_beside_the_export(net, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    robust_ssl.export_torch(net, tmp_path)
    text = (tmp_path / "model.py").read_text()
    module = {"__file__": str(tmp_path / "model.py"), "__name__": "exported"}
    exec(compile(text, "model.py", "exec"), module)
    deep = np.random.default_rng(0).integers(0, 65536, (20, 20)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name, what in (("deep.png", "more than 8 bits"), ("moving.gif", "several frames")):
        with pytest.raises(ValueError, match=what):
            module["picture"](tmp_path / name)
    # A phone's photograph with previews of itself behind it is one picture.
    frames[0].save(tmp_path / "fine.mpo", format="MPO", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "fine.png")
    for name in ("fine.mpo", "fine.png"):
        expected = pictures.decode(tmp_path / name, 16, name)
        taken = module["picture"](tmp_path / name)
        np.testing.assert_array_equal(taken[0].permute(1, 2, 0) * 255, expected)
