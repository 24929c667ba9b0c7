"""Layouts of vision transformers: PyTorch's numbers after import, its own weights on export."""

import numpy as np
import pytest
from flax import traverse_util

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import parity_cases_vit as cases  # noqa: E402

from robust_ssl import weights  # noqa: E402
from robust_ssl.models.positions import resize_positions  # noqa: E402
from robust_ssl.weights import mapping  # noqa: E402


def split(name, encoder):
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    arrays = {path: np.asarray(leaf) for path, leaf in flat.items()}
    tensors = mapping.split(cases.entries(name, encoder), arrays)
    return {key: torch.from_numpy(array.copy()) for key, array in tensors.items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_features_and_taps_are_theirs(name, tmp_path):
    layout, error = cases.measure(name, tmp_path)
    print(f"\n{name} ({layout}): {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", [name for name in cases.CASES if "hugging" not in name])
def test_timm_names_go_back(name, tmp_path):
    model, encoder = cases.imported(name, tmp_path)
    other = cases.randomize(cases.CASES[name].build(), seed=1)
    other.load_state_dict(split(name, encoder), strict=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


HUGGINGFACE = [name for name in cases.CASES if "hugging" in name and "new names" not in name]


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_from_pretrained_takes_them_back(name, tmp_path):
    model, encoder = cases.imported(name, tmp_path)
    tensors = split(name, encoder)
    cases.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    unfilled = {key.split(".")[0] for key in info["missing_keys"]}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    # what an encoder does not have
    heads = {"pooler", "visual_projection", "text_projection", "text_model", "logit_scale"}
    assert unfilled <= heads or info["missing_keys"] == {"embeddings.mask_token"}
    pixels, case = cases.images(), cases.CASES[name]
    expected = cases.torch_outputs(case, model, pixels)
    for key, array in cases.torch_outputs(case, other.eval(), pixels).items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)


@pytest.mark.parametrize("name", ["timm-vit, DINOv2 release", "huggingface-clip-vision"])
def test_an_imported_encoder_round_trips(name, tmp_path):
    _, encoder = cases.imported(name, tmp_path)
    loaded = weights.load_encoder(weights.save_encoder(encoder, tmp_path / "ours"))
    assert loaded.module == encoder.module and loaded.mean == cases.MEAN
    ours, theirs = (encoder.variables["params"] for encoder in (loaded, encoder))
    np.testing.assert_array_equal(ours["block2"]["mlp"]["dense1"]["kernel"],
                                  theirs["block2"]["mlp"]["dense1"]["kernel"])  # fmt: skip


@pytest.mark.parametrize("size", [16, 40])
def test_resized_positions_are_those_of_dinov2(size, tmp_path):
    name = "huggingface-dinov2"
    model, encoder = cases.imported(name, tmp_path)
    pixels = np.random.default_rng(1).uniform(size=(2, size, size, 3)).astype(np.float32)
    expected = cases.torch_outputs(cases.CASES[name], model, pixels)
    assert cases.largest_error(resize_positions(encoder, size), expected, pixels) < 1e-5
