"""How a foreign encoder's images were normalized, and how large they were.

A part of the encoder: read from the files beside the weights, or named.  Nothing is assumed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import disk
from robust_ssl.models.clip_resnet import CLIP_MEAN, CLIP_STD
from robust_ssl.models.resnet import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD
from robust_ssl.weights import transforms

Numbers = tuple[float, float, float]

# name -> (mean, std) per channel, of pixels in [0, 1]
PRESETS: dict[str, tuple[Numbers, Numbers]] = {
    "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
    # of the training split's pixels
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # pixels in [-1, 1]: google/vit, BEiT
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # pixels as they are
}

_INNER = ("image_processor", "pretrained_cfg", "data_preprocessor", "img_norm_cfg")
# Entries of JSON files that tell the order of colors, and what they say of blue first.
_CHANNEL_ENTRIES = ("channel_order", "channels", "color_format", "color_order", "color_space",
                    "input_space", "image_mode")  # fmt: skip

HOW_TO_NAME = (
    f"name it: --normalization {'|'.join(PRESETS)}, or --mean R,G,B and --std R,G,B "
    "(normalization=, mean=, std= in Python and in a config's encoder)"
)
HOW_TO_SIZE = "name it: --image-size PIXELS (image_size= in Python and in a config's encoder)"


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What happens to an image before the network sees it; None is what is not known.

    Attributes:
      mean: Per channel, of pixels in [0, 1].
      std: Per channel, of pixels in [0, 1].
      image_size: Height and width, pixels.
      source: Where this was read, for people.
      transform: What made an image of this size where the encoder was evaluated, as far as it is
        said, see `robust_ssl.weights.transforms`.  Kept with the encoder, and applied to pictures
        that need resizing.
    """

    mean: Numbers | None = None
    std: Numbers | None = None
    image_size: int | None = None
    source: str = ""
    transform: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if self.mean is None:
            return "not found"
        size = f", images of {self.image_size} pixels" if self.image_size else ""
        how = "".join(f", {key} {value}" for key, value in self.transform.items())
        return f"mean {self.mean}, std {self.std}{size}{how} ({self.source})"


def choose(
    configs: Mapping[str, Any],
    *,
    normalization: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
) -> Normalization:
    """Returns what is named, and what the files say where nothing is.

    Args:
      configs: JSON files beside the weights, by name.
      normalization: A name of `PRESETS`, in place of mean and std.
      mean: Per channel; with `std`.
      std: Per channel; with `mean`.
      image_size: Pixels.

    Raises:
      ValueError: If what is named contradicts itself, or a file asks for something an encoder of
        this package cannot do.

    Example:
      >>> choose({}, normalization="half", image_size=32).mean
      (0.5, 0.5, 0.5)
    """
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: name both")
    if normalization is not None:
        if mean is not None:
            raise ValueError("name either a normalization or mean and std")
        if normalization not in PRESETS:
            raise ValueError(f"no normalization {normalization!r}; there are {sorted(PRESETS)}")
        mean, std = PRESETS[normalization]
    # Not even read if all is named: naming is the remedy for files that make no sense.
    images = read(configs) if mean is None or image_size is None else Normalization()
    if mean is not None:
        size, transform = images.image_size, images.transform
        images = dataclasses.replace(_of(mean, std), image_size=size, transform=transform)
    if image_size is not None:
        images = dataclasses.replace(images, image_size=_size(image_size))
    return images


def read(configs: Mapping[str, Any]) -> Normalization:
    """Returns what the files beside the weights say; the fields are None where they do not.

    Raises:
      ValueError: If a file asks for what an encoder of this package cannot do.
    """
    header = own_record(configs)
    if header:
        options = header["options"]
        size = _size(options["image_size"])
        images = _of(options["mean"], options["std"], size, "the file's own header")
        return dataclasses.replace(images, transform=_own_transform(header, configs))
    record = configs.get("preprocessor_config.json")
    if record is None:  # newer processors of several inputs keep the image's part in here
        record = (configs.get("processor_config.json") or {}).get("image_processor")
    if record is not None:
        return _preprocessor(record)
    timm = (configs.get("config.json") or {}).get("pretrained_cfg")
    if timm and {"mean", "std", "input_size"} <= timm.keys():
        size = _square(timm["input_size"][1:])
        images = _of(timm["mean"], timm["std"], size, "config.json")
        return dataclasses.replace(images, transform=transforms.of_timm(timm, size))
    return _open_clip(configs.get("open_clip_config.json") or {})


def _own_transform(header: Mapping[str, Any], configs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of our own export; where it does not say, what JSON beside it says, as its origin's may."""
    transform = header.get("transform")
    if isinstance(transform, Mapping):
        return transform
    try:
        return read({name: x for name, x in configs.items() if name != "__metadata__"}).transform
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}


def _open_clip(config: Mapping[str, Any]) -> Normalization:
    preprocess = config.get("preprocess_cfg") or {}
    vision = (config.get("model_cfg") or {}).get("vision_cfg") or {}
    size = preprocess.get("size", vision.get("image_size"))
    size = None if size is None else _square(size) if isinstance(size, Sequence) else _size(size)
    if not {"mean", "std"} <= preprocess.keys():
        return Normalization(image_size=size, source="open_clip_config.json" if size else "")
    images = _of(preprocess["mean"], preprocess["std"], size, "open_clip_config.json")
    return dataclasses.replace(images, transform=transforms.of_open_clip(preprocess, size))


def channels(configs: Mapping[str, Any]) -> str | None:
    """Returns ``"bgr"`` or ``"rgb"`` where a file beside the weights says so, else None.

    Example:
      >>> channels({"preprocessor_config.json": {"do_flip_channel_order": True}})
      'bgr'
    """
    for record in _image_records(configs):
        if record.get("do_flip_channel_order") is True or record.get("to_rgb") is False:
            return "bgr"
        for key in _CHANNEL_ENTRIES:
            word = str(record.get(key, "")).lower()
            if word in ("bgr", "rgb"):
                return word
    return None


def _image_records(configs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tables in the files beside the weights that may speak of images."""
    records = []
    for name in ("preprocessor_config.json", "processor_config.json", "config.json"):
        record = configs.get(name) or {}
        records += [record, *(record.get(key) for key in _INNER)]
    return [record for record in records if isinstance(record, Mapping)]


def _of(mean, std, image_size: int | None = None, source: str = "named", prefix: str = ""):
    mean, std = _three(mean, f"{prefix}mean"), _three(std, f"{prefix}std", positive=True)
    return Normalization(mean, std, image_size, source)


def header_of(file: pathlib.Path) -> dict[str, Any]:
    """Returns the metadata in a safetensors file's header, ``{"__metadata__": {...}}``, if any."""
    import safetensors

    if file.suffix != ".safetensors":
        return {}
    try:
        with disk.open_regular(file), safetensors.safe_open(file, "numpy") as opened:
            metadata = opened.metadata()
    except (safetensors.SafetensorError, OSError, ValueError):  # reading the weights says so best
        return {}
    return {"__metadata__": metadata} if metadata else {}


def own_record(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `export_safetensors` wrote in the header of a file, or nothing."""
    text = (configs.get("__metadata__") or {}).get("robust_ssl")
    if text is None:
        return {}
    try:
        record = json.loads(text)
        if {"mean", "std", "image_size"} <= record["options"].keys():
            return record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError("the file's header has an entry robust_ssl that export did not write")


def _preprocessor(record: Mapping[str, Any]) -> Normalization:
    """Hugging Face's ``preprocessor_config.json``."""
    where = "preprocessor_config.json"
    # Compared with a tolerance: files have 1/255 as a rounded decimal.
    scale = record.get("rescale_factor", 1 / 255)
    if not record.get("do_rescale", True) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise ValueError(
            f"{where} does not scale pixels to [0, 1] (rescale_factor {scale}); name mean, std "
            "and image size for pixels in [0, 1]"
        )
    if record.get("rescale_offset"):
        raise ValueError(
            f"{where} takes 1 from the scaled pixels before they are normalized (rescale_offset); "
            "name mean, std and image size for pixels in [0, 1]"
        )
    size = _image_size(record)
    transform = transforms.of_processor(record, size)
    mean, std = PRESETS["none"]
    if record.get("do_normalize", True):
        if "image_mean" not in record or "image_std" not in record:
            return Normalization(image_size=size, source=where, transform=transform)
        mean, std = record["image_mean"], record["image_std"]
    images = _of(mean, std, size, where, "image_")
    if record.get("do_flip_channel_order") is True:  # after which they were normalized
        images = dataclasses.replace(images, mean=images.mean[::-1], std=images.std[::-1])
    return dataclasses.replace(images, transform=transform)


def _image_size(record: Mapping[str, Any]) -> int | None:
    """The side of what reaches the network: of the crop where there is one."""
    # Resizing comes first and the crop after it, so the crop is what the network sees.
    cropped = record.get("do_center_crop", "crop_size" in record) and record.get("crop_size")
    size = cropped or record.get("size")
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return _size(size["shortest_edge"])
        size = [size.get("height"), size.get("width")]
    if size is None:
        return None
    return _square(size) if isinstance(size, Sequence) else _size(size)


def _square(sides: Sequence[Any]) -> int:
    if len(set(sides)) != 1:
        raise ValueError(f"images of {list(sides)} pixels: an encoder here takes squares")
    return _size(sides[0])


def _size(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"image_size must be a whole number of pixels, got {size!r}")
    return size


def _three(values: Any, name: str, positive: bool = False) -> Numbers:
    values = values.tolist() if hasattr(values, "tolist") else values  # an array
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(numbers) != 3 or not all(
        isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not positive) for x in numbers
    ):
        kind = "positive numbers" if positive else "numbers"
        raise ValueError(f"{name} must be three {kind}, of pixels in [0, 1]; got {values!r}")
    # Pixels in [0, 1] have no mean or deviation above 1; those in [0, 255] mostly have 50 and more.
    if max(map(abs, numbers)) > 2:
        raise ValueError(f"{name} {list(numbers)} is of pixels in [0, 255]; divide it by 255")
    return tuple(map(float, numbers))
