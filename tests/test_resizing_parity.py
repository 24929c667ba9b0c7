"""Evaluation transforms, pixel by pixel against timm, transformers and open_clip."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
import torchvision_operators  # noqa: E402, F401 (before those that import torchvision)

from robust_ssl.weights import normalization, transforms  # noqa: E402

SIZES = ((97, 131), (131, 97), (64, 64), (40, 333), (301, 87), (30, 25), (223, 224))


def photographs():
    """Smooth colors, edges and noise, at sizes that round in every way."""
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        coarse = rng.integers(0, 256, (7, 9, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (height, width, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        pixels[height // 3 : height // 2, width // 4 :] = rng.integers(0, 256, 3)
        yield pixels


def largest_difference(transform, theirs, image_size):
    """Gray levels of 255, over all photographs."""
    resizing = dataclasses.replace(transforms.resizing(transform, image_size), sized="resize")
    differences = [
        np.abs(resizing(pixels, image_size).astype(float) - theirs(pixels)).max()
        for pixels in photographs()
    ]
    return max(differences)


# --- timm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interpolation", "size", "crop_pct"),
    [("bilinear", 32, 0.875), ("bicubic", 45, 0.9), ("lanczos", 64, 1.0), ("nearest", 33, None)],
)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", None])
def test_timm(interpolation, crop_mode, size, crop_pct):
    timm = pytest.importorskip("timm")
    config = {
        "mean": (0.485, 0.456, 0.406), "std": (0.5,) * 3, "input_size": (3, size, size),
        "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation,
    }  # fmt: skip
    theirs = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=config), is_training=False, normalize=False
    )
    read = normalization.read({"config.json": {"pretrained_cfg": config}})
    difference = largest_difference(
        read.transform, lambda x: theirs(Image.fromarray(x)).numpy().transpose(1, 2, 0), size
    )
    assert difference == 0


def test_timm_at_another_size():
    timm = pytest.importorskip("timm")
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 224, 224), "crop_pct": 0.9}
    theirs = timm.data.create_transform(
        48, is_training=False, normalize=False, crop_pct=0.9, interpolation="bicubic"
    )
    read = normalization.read({"config.json": {"pretrained_cfg": config}})
    difference = largest_difference(
        read.transform, lambda x: theirs(Image.fromarray(x)).numpy().transpose(1, 2, 0), 48
    )
    assert difference == 0


# --- open_clip -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize_mode", "interpolation"),
    [("shortest", "bicubic"), ("squash", "bilinear"), ("longest", "random"), (None, None)],
)
def test_open_clip(resize_mode, interpolation):
    open_clip = pytest.importorskip("open_clip")
    told = {"size": 33, "resize_mode": resize_mode, "interpolation": interpolation, "fill_color": 9}
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    theirs = open_clip.transform.image_transform(
        33, False, **plain, resize_mode=resize_mode, interpolation=interpolation, fill_color=9
    )
    read = normalization.read({"open_clip_config.json": {"preprocess_cfg": {**plain, **told}}})

    def pixels(x):
        return np.rint(255 * theirs(Image.fromarray(x)).numpy().transpose(1, 2, 0))

    assert largest_difference(read.transform, pixels, 33) == 0


# --- transformers --------------------------------------------------------------------------------

PROCESSORS = {
    "CLIP": {"size": {"shortest_edge": 40}, "crop_size": {"height": 33, "width": 33}},
    "CLIP, whole": {"size": {"shortest_edge": 32}, "crop_size": 32},
    "ViT": {"size": {"height": 32, "width": 32}},
    "ViT, one number": {"size": 48, "resample": 3},
    "CLIP, bilinear": {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 2},
    "DeiT": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 33, "width": 33}},
    "Siglip": {"size": {"height": 32, "width": 32}},
    "Bit": {"size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 32}},
    "ConvNext": {"size": {"shortest_edge": 32}},
    "ConvNext, share": {"size": {"shortest_edge": 45}, "crop_pct": 0.95},
    "ConvNext, warped": {"size": {"shortest_edge": 384}},
    "PoolFormer": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "DINOv3ViT": {"size": {"height": 32, "width": 32}},
}


@pytest.mark.parametrize("tensors", [False, True], ids=["Pillow", "torchvision"])
@pytest.mark.parametrize("case", PROCESSORS)
def test_transformers(case, tensors, tmp_path):
    """With Pillow equal; through tensors by one level, or two where a bicubic enlarges."""
    transformers = pytest.importorskip("transformers")
    kind = case.partition(",")[0]
    name = f"{kind}ImageProcessor{'' if tensors else 'Pil'}"
    if not hasattr(transformers, name):
        pytest.skip("no such processor")
    theirs = getattr(transformers, name)(**PROCESSORS[case])
    theirs.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "preprocessor_config.json").read_text())
    read = normalization.read({"preprocessor_config.json": record})

    def pixels(x):
        out = theirs(x, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return np.clip(255 * out.transpose(1, 2, 0), 0, 255)  # DINOv3's goes beyond

    difference = largest_difference(read.transform, pixels, read.image_size)
    print(f"\n{case}, {name}: {difference:.2f}")
    assert difference < (2.01 if tensors else 1e-3)
    assert difference < 1.01 or "warped" in case or "one number" in case
