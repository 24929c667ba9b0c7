"""How a foreign encoder's pictures got their size, as the files beside its weights say it.

A transform is plain values, which the encoder's card keeps: ``mode``, ``resize`` (the scaled side,
pixels), ``crop``, ``interpolation``, ``offset``, ``fill`` as in `robust_ssl.data.Resizing`, and
``crop_pct`` where a file says that.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl.data.resizing import Resizing

# Pillow's numbers, which processors write.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Processor -> what a size that is one number means to it, and how it interpolates by default.
_PROCESSORS = {
    "ViT": ("squash", "bilinear"),
    "DeiT": ("squash", "bicubic"),
    "Siglip": ("squash", "bicubic"),
    "DINOv3ViT": ("squash", "bilinear"),
    "CLIP": ("shorter", "bicubic"),
    "Bit": ("shorter", "bicubic"),
    "ConvNext": ("shorter", None),  # differs between versions of transformers
    "PoolFormer": ("shorter", "bicubic"),
}
_TIMM_MODES = {"center": "shorter", "squash": "squash", "border": "longest"}
_WARPED = 384  # from this size on ConvNeXt's processor crops nothing


def positive(value: Any, name: str) -> float:
    """Returns a share that a file names; it may be a little above 1, and is never 0.

    Raises:
      ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 10:
        raise ValueError(f"{name} must be a positive share, got {value!r}")
    return float(value)


def of_timm(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns the transform of timm's ``pretrained_cfg``, with timm's defaults."""
    share = positive(config.get("crop_pct") or 0.875, "crop_pct")
    mode = _TIMM_MODES.get(config.get("crop_mode") or "center")
    transform = {"crop_pct": share, "interpolation": config.get("interpolation") or "bicubic"}
    if mode is None:
        return transform
    transform |= {"mode": mode, "resize": math.floor(size / share), "crop": size}
    if mode == "longest":
        transform["fill"] = [round(255 * value) for value in config["mean"]]
    return {**transform, "offset": "nearest"}


def of_open_clip(preprocess: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Returns the transform of open_clip's ``preprocess_cfg``, with its defaults."""
    mode = preprocess.get("resize_mode") or "shortest"
    mode = {"shortest": "shorter", "longest": "longest", "squash": "squash"}.get(mode)
    told = preprocess.get("interpolation") or "bicubic"
    # "random" is a word about training; its evaluation is bicubic.
    transform = {"interpolation": "bilinear" if told == "bilinear" else "bicubic"}
    if mode is None or size is None:
        return transform
    transform |= {"mode": mode, "resize": size, "crop": size, "offset": "nearest"}
    if mode == "longest":
        transform["fill"] = [int(preprocess.get("fill_color") or 0)] * 3
    return transform


def of_processor(record: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Returns the transform of a processor of Hugging Face, whose images end with `size` pixels."""
    if not record.get("do_resize", True):
        return {}
    kind = _kind(record)
    _, default = _PROCESSORS.get(kind, (None, None))
    resample, transform = record.get("resample"), {}
    if resample in range(len(_RESAMPLE)):
        default = _RESAMPLE[resample]
    if default is not None:
        transform["interpolation"] = default
    mode, side = _scaled(record.get("size"), kind)
    if mode is None or size is None:
        return transform
    share = record.get("crop_pct")
    if share is None and kind == "ConvNext":
        share = 224 / 256
    if share is not None and mode == "shorter":
        if side >= _WARPED and kind != "PoolFormer":
            mode = "squash"
        else:
            side = int(side / positive(share, "crop_pct"))
            transform["crop_pct"] = share
    return {**transform, "mode": mode, "resize": side, "crop": size, "offset": "down"}


def _kind(record: Mapping[str, Any]) -> str:
    """A processor's name without what all are called."""
    name = record.get("image_processor_type") or record.get("feature_extractor_type") or ""
    return re.sub(r"(ImageProcessor|FeatureExtractor)\w*$", "", str(name)).removesuffix("V2")


def _scaled(size: Any, kind: str) -> tuple[str | None, int]:
    """Which side is scaled, and to how many pixels; the mode is None where it is not said."""
    if isinstance(size, Mapping):
        if size.get("shortest_edge") and not size.get("longest_edge"):
            return "shorter", size["shortest_edge"]
        sides = [size.get("height"), size.get("width")]
    elif isinstance(size, Sequence) and not isinstance(size, str):
        sides = list(size)
    else:
        sides = [size]
        mode, _ = _PROCESSORS.get(kind, (None, None))
        return (mode, size) if isinstance(size, int) else (None, 0)
    square = len(set(sides)) == 1 and isinstance(sides[0], int)
    return ("squash", sides[0]) if square else (None, 0)


def resizing(transform: Mapping[str, Any], image_size: int) -> Resizing | None:
    """Returns what a transform does to a picture that becomes `image_size` pixels a side.

    For another size than its own the scaled side changes in proportion, as timm computes it.

    Returns:
      The `Resizing`, which takes pictures of this size as they are; None where the transform does
      not say enough.

    Raises:
      ValueError: If it asks for what a `Resizing` cannot be.

    Example:
      >>> told = {"mode": "shorter", "crop_pct": 0.875, "interpolation": "bicubic", "resize": 256}
      >>> resizing({**told, "crop": 224}, 32).side
      36
    """
    if not {"resize", "crop", "interpolation"} <= transform.keys():
        return None
    side, crop = transform["resize"], transform["crop"]
    if crop != image_size:
        share = transform.get("crop_pct")
        side = math.floor(image_size / share if share else side * image_size / crop)
    # Before cards had a mode, only those of "shorter" had both numbers.
    read = {key: transform[key] for key in ("mode", "interpolation", "offset") if key in transform}
    if "fill" in transform:
        read["fill"] = list(transform["fill"])
    try:
        return Resizing.read({**read, "side": side, "sized": "keep"}, "the encoder's transform")
    except ValueError as error:
        raise ValueError(
            f"{error}; say how pictures are resized: resizing, 'fit' for one"
        ) from error


def resizing_of(
    path: str | os.PathLike, image_size: int | None = None, *, allow_moving: bool = False
) -> Resizing | None:
    """Returns how pictures were resized where an encoder was evaluated.

    Args:
      path: A shipped encoder's name, a directory of `save_encoder`, a foreign file or folder, or an
        address of the hub.
      image_size: What the pictures will have, pixels; None is the encoder's own size.
      allow_moving: Whether a revision on the hub may be a branch or a tag.

    Returns:
      For `robust_ssl.data.load`; None where neither card nor files say it, as of the shipped
      encoders, whose images have their size.

    Raises:
      ValueError: If the transform is none that `robust_ssl.data.Resizing` does.
      FileNotFoundError: If there is no encoder.

    Example:
      >>> resizing_of("simclr-cifar10-r18w24") is None
      True
    """
    from robust_ssl.weights import convert, files, hub, native, normalization

    _, path = hub.located(path, allow_moving)
    if convert.is_foreign(path):
        try:
            images = normalization.read(files.read_beside(path))
        except (*convert.NONSENSE, ValueError):  # named then, and the files are not asked
            return None
        transform, own = images.transform, images.image_size
    else:
        record = native.encoder_card(path)
        origin = record["card"].get("imported_from") or {}
        transform, own = origin.get("transform") or {}, record["options"].get("image_size")
    size = image_size or own
    return resizing(transform, size) if size else None
