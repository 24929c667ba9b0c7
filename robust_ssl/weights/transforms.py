"""How a foreign encoder's pictures got their size, as the files beside its weights say it.

A transform is plain values, which the encoder's card keeps: ``mode``, ``resize`` (the scaled side,
pixels), ``crop``, ``interpolation``, ``offset``, ``fill`` as in `robust_ssl.data.Resizing`, and
``crop_pct`` where a file says that.  The card of what this package saves has the same values under
``transform``, of the encoder or of the classifier's encoder, with ``sized`` besides.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl.data.resizing import Resizing

_log = logging.getLogger(__name__)

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
    # Before cards had a mode, only those of "shorter" had both numbers.
    words = ("mode", "interpolation", "offset", "sized", "draft")
    read = {"sized": "keep"} | {key: transform[key] for key in words if key in transform}
    try:
        side, crop, share = (transform.get(key) for key in ("resize", "crop", "crop_pct"))
        if side is not None and crop != image_size:
            side = math.floor(image_size / share if share else side * image_size / crop)
        if "fill" in transform:
            read["fill"] = list(transform["fill"])
        return Resizing.read({**read, "side": side}, "the encoder's transform")
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(
            f"{error}; say how pictures are resized: resizing, 'fit' for one"
        ) from error


def described(resizing: Resizing, image_size: int) -> dict[str, Any]:
    """Returns the transform of a `Resizing`, which `resizing` reads back.

    Raises:
      ValueError: If it is no `Resizing`, or not for images of this size.

    Example:
      >>> described(Resizing("squash"), 32)["crop"]
      32
    """
    if not isinstance(resizing, Resizing):
        raise ValueError(f"an encoder's resizing must be a robust_ssl.data.Resizing: {resizing!r}")
    fields = {**dataclasses.asdict(resizing), "crop": resizing.size(image_size)}
    fields |= {"fill": list(resizing.fill)}
    if not fields["draft"]:  # came later: cards that do not use it are as they were
        fields.pop("draft")
    return {"mode": fields.pop("mode"), "resize": fields.pop("side"), **fields}


def of_card(record: Mapping[str, Any], image_size: int | None = None) -> Resizing | None:
    """Returns what the card of an encoder or an ensemble says of resizing.

    Args:
      record: The card.
      image_size: What pictures will have, pixels; None is the card's own size.

    Raises:
      ValueError: If it says what a `Resizing` cannot be.
    """
    saved = record.get("transform") or {}
    if not isinstance(saved, Mapping):
        raise ValueError(f"the card's transform must be a mapping, got {saved!r}")
    origin = _entry(_entry(record.get("card"), "imported_from"), "transform")
    own = record.get("options", {}).get("image_size") or saved.get("crop")
    if not own:
        return None
    # The same at its own size: then the origin's share of a side is exact at others too.
    if not saved or (origin and known(origin, own) == resizing(saved, own)):
        saved = origin
    return resizing(saved, image_size or own)


def _entry(record: Any, name: str) -> Mapping[str, Any]:
    """A mapping in what others may have written; an empty one for anything else."""
    value = record.get(name) if isinstance(record, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def of_saved(record: Mapping[str, Any], where: str | os.PathLike) -> Resizing | None:
    """Returns what a card says of resizing at its own size, for the encoder that is loaded.

    Raises:
      ValueError: If this package's own entry says what a `Resizing` cannot be; what a foreign
        file's transform cannot be is a warning.
    """
    try:
        return of_card(record)
    except ValueError as error:
        if record.get("transform"):
            raise ValueError(f"{where}: {error}") from error
        _log.warning("%s: %s", where, error)
        return None


def known(transform: Mapping[str, Any], image_size: int) -> Resizing | None:
    """Returns what `resizing` does; None, with a warning, for what a `Resizing` cannot be."""
    try:
        return resizing(transform, image_size)
    except ValueError as error:
        _log.warning("%s", error)
        return None


def resizing_of(
    path: str | os.PathLike, image_size: int | None = None, *, allow_moving: bool = False
) -> Resizing | None:
    """Returns how pictures were resized where an encoder was evaluated, or a classifier scored.

    Args:
      path: A shipped encoder's name, a directory of `save_encoder` or `save_classifier` or a
        finished recipe's, a foreign file or folder, or an address of the hub.
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
    from robust_ssl.weights import classifiers, convert, files, hub, native, normalization

    _, path = hub.located(path, allow_moving)
    if classifiers.is_classifier(path):
        return of_card(classifiers.encoder_record(path), image_size)
    if not convert.is_foreign(path):
        return of_card(native.encoder_card(path), image_size)
    try:
        images = normalization.read(files.read_beside(path))
    except (*convert.NONSENSE, ValueError):  # named then, and the files are not asked
        return None
    size = image_size or images.image_size
    return resizing(images.transform, size) if size else None
