"""What CLIP's ResNets are called by OpenAI and open_clip."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.models.clip_resnet import STRIDE
from robust_ssl.types import Encoder
from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import STACKED_BIAS, STACKED_DENSE, Entry, Kind, Layout, Network
from robust_ssl.weights.resnet_layouts import LEAVES, torchvision_name
from robust_ssl.weights.vit_names import check_sizes, rename_below

_PUBLISHED = (64, 80, 96, 128)  # wide: RN50 and RN101, RN50x4, RN50x16, RN50x64
_POSITIONS = "attnpool.positional_embedding"
_ROWS = Kind(lambda x: x[0][None], lambda x, _: [x[0]])


def _entry(path: str) -> Entry:
    _, *module, leaf = path.split("/")
    if path.startswith("params/pool/"):
        return _pool_entry(path)
    name, kind = LEAVES[leaf]
    if module[0] == "stem":
        place = module[1].replace("conv", "conv" if module[2] == "conv" else "bn")
    else:
        place = torchvision_name(module)
    return Entry(path, (f"{place}.{name}",), kind)


def _pool_entry(path: str) -> Entry:
    inner = path.removeprefix("params/pool/")
    if inner == "position":
        return Entry(path, (_POSITIONS,), _ROWS)
    module, leaf = inner.split("/")
    end = "weight" if leaf == "kernel" else "bias"
    kind = STACKED_DENSE if leaf == "kernel" else STACKED_BIAS
    parts = "qkv" if module == "qkv" else "c"
    return Entry(path, tuple(f"attnpool.{part}_proj.{end}" for part in parts), kind)


def _entries(encoder: Encoder) -> list[Entry]:
    return [_entry(path) for path in traverse_util.flatten_dict(encoder.variables, sep="/")]


def _shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the shapes say: depths, width, features, image size."""
    needed = ("bn3.weight", _POSITIONS, "attnpool.c_proj.weight")
    for name in needed:
        if name not in tensors:
            raise ValueError(f"missing {name}, which tells the shape of the network")
    norm, positions, output = (tensors[name] for name in needed)
    depths = []
    for stage in range(1, 5):
        depth = 0
        while f"layer{stage}.{depth}.conv1.weight" in tensors:
            depth += 1
        depths.append(depth)
    side = math.isqrt(max(len(positions) - 1, 0))
    if positions.ndim != 2 or side < 1 or side * side + 1 != len(positions):
        raise ValueError(
            f"{_POSITIONS} has shape {positions.shape}, which is not positions of a square of "
            "places and their mean"
        )
    return {
        "depths": tuple(depths), "width": norm.shape[0], "dim": output.shape[0],
        "image_size": side * STRIDE,
    }  # fmt: skip


def _network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
    options = _shapes(tensors)
    model = (configs.get("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = model.get("vision_cfg") or {}
    check_sizes({"image_size": vision.get("image_size")}, options)
    heads = mapping.named_options(configs, "heads").get("heads")
    assumed = ("features are the pooling's, in the space of texts",)
    if heads is None and vision:
        heads = 32 * options["width"] // vision.get("head_width", 64)
    elif heads is None:
        heads = options["width"] // 2
        if options["width"] not in _PUBLISHED:
            raise ValueError(
                f"the file does not say how many attention heads its pooling has, and "
                f"{options['width']} is no published width ({', '.join(map(str, _PUBLISHED))}): "
                f"name heads, for example --heads {heads}"
            )
        assumed += (f"{heads} attention heads in the pooling, as OpenAI's have (--heads)",)
    return Network("clip_resnet", options | {"heads": heads}, assumed)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "open-clip-resnet",
        "OpenAI's and open_clip's CLIP ResNets: the vision tower with its attention pooling",
        mapping.has(r"conv3\.weight", r"layer1\.0\.conv1\.weight", re.escape(_POSITIONS)),
        rename_below(r"^", r".*num_batches_tracked$"),
        _network,
        _entries,
        # To be told that positions of a ResNet are for one size, one need not name a way.
        resizing=lambda names, configs: "bicubic",
    ),
)
