"""What Swin transformers are called by timm, by their authors, and by Hugging Face."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.types import Encoder
from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import (
    CONV,
    COPY,
    DENSE,
    STACKED_BIAS,
    STACKED_DENSE,
    Entry,
    Layout,
    Network,
)
from robust_ssl.weights.vit_names import rename_below

# Our module or parameter to theirs; {s} and {b} count stages and blocks from 0, {before} is the
# stage before.
_Names = Mapping[str, tuple[str, ...]]
_TIMM: _Names = {
    "stem/conv": ("patch_embed.proj",),
    "stem/norm": ("patch_embed.norm",),
    "downsample/norm": ("layers.{s}.downsample.norm",),
    "downsample/reduction": ("layers.{s}.downsample.reduction",),
    "block/norm1": ("layers.{s}.blocks.{b}.norm1",),
    "block/attention/qkv": ("layers.{s}.blocks.{b}.attn.qkv",),
    "block/attention/positions": ("layers.{s}.blocks.{b}.attn.relative_position_bias_table",),
    "block/attention/output": ("layers.{s}.blocks.{b}.attn.proj",),
    "block/norm2": ("layers.{s}.blocks.{b}.norm2",),
    "block/mlp/dense1": ("layers.{s}.blocks.{b}.mlp.fc1",),
    "block/mlp/dense2": ("layers.{s}.blocks.{b}.mlp.fc2",),
    "norm": ("norm",),
}
_BLOCK = "encoder.layers.{s}.blocks.{b}"
_HUGGINGFACE: _Names = {
    "stem/conv": ("embeddings.patch_embeddings.projection",),
    "stem/norm": ("embeddings.norm",),
    "downsample/norm": ("encoder.layers.{before}.downsample.norm",),
    "downsample/reduction": ("encoder.layers.{before}.downsample.reduction",),
    "block/norm1": (f"{_BLOCK}.layernorm_before",),
    "block/attention/qkv": tuple(
        f"{_BLOCK}.attention.self.{part}" for part in ("query", "key", "value")
    ),
    "block/attention/positions": (f"{_BLOCK}.attention.self.relative_position_bias_table",),
    "block/attention/output": (f"{_BLOCK}.attention.output.dense",),
    "block/norm2": (f"{_BLOCK}.layernorm_after",),
    "block/mlp/dense1": (f"{_BLOCK}.intermediate.dense",),
    "block/mlp/dense2": (f"{_BLOCK}.output.dense",),
    "norm": ("layernorm",),
}
# transformers 5 calls its modules otherwise than its files do.
_NEW_NAMES = (
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_EPSILON = 1e-5
# What timm's model_args may say: the tensors tell it, or it is of training alone.
_TOLD = {
    *("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"),
    *("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "proj_drop_rate"),
}


def _entry(path: str, names: _Names) -> Entry:
    where, leaf = path.removeprefix("params/"), ""
    if not where.endswith("/positions"):
        where, _, leaf = where.rpartition("/")
    place = re.match(r"stage(\d+)/(?:block(\d+)/)?", where)
    stage, block = (int(x or 1) - 1 for x in place.groups()) if place else (0, 0)
    inner = where[place.end() :] if place else where
    inner = f"block/{inner}" if place and place[2] else inner
    end = {"": "", "bias": ".bias"}.get(leaf, ".weight")
    theirs = tuple(n.format(s=stage, b=block, before=stage - 1) + end for n in names[inner])
    return Entry(path, theirs, _kind(inner, leaf, len(theirs)))


def _kind(module: str, leaf: str, count: int) -> mapping.Kind:
    if leaf == "kernel":
        if module == "stem/conv":
            return CONV
        return DENSE if count == 1 else STACKED_DENSE
    return COPY if count == 1 else STACKED_BIAS


def _entries(names: _Names) -> Callable[[Encoder], list[Entry]]:
    def entries(encoder: Encoder) -> list[Entry]:
        paths = traverse_util.flatten_dict(encoder.variables, sep="/")
        return [_entry(path, names) for path in paths]

    return entries


def _shapes(tensors: Mapping[str, np.ndarray], names: _Names) -> dict[str, Any]:
    """What the shapes say: depths, width, heads, windows, patches and MLPs."""

    def tensor(path: str) -> np.ndarray:
        (name,) = _entry(f"params/{path}", names).names
        if name not in tensors:
            raise ValueError(f"missing {name}, which tells the shape of the network")
        return tensors[name]

    def has(stage: int, block: int) -> bool:
        path = f"params/stage{stage}/block{block}/norm1/scale"
        return _entry(path, names).names[0] in tensors

    depths: list[int] = []
    while has(len(depths) + 1, 1):
        depth = 1
        while has(len(depths) + 1, depth + 1):
            depth += 1
        depths.append(depth)
    tables = [
        tensor(f"stage{stage}/block1/attention/positions") for stage in range(1, len(depths) + 1)
    ]
    kernel = tensor("stem/conv/kernel")
    if kernel.ndim != 4:
        raise ValueError(f"the first convolution has shape {kernel.shape}; it needs four axes")
    hidden = tensor("stage1/block1/mlp/dense1/kernel").shape[0]
    return {
        "depths": tuple(depths), "width": kernel.shape[0],
        "heads": tuple(table.shape[-1] for table in tables),
        "windows": tuple(map(_window, tables)), "patch_size": kernel.shape[-1],
        "mlp_ratio": hidden / kernel.shape[0],
    }  # fmt: skip


def _window(table: np.ndarray) -> int:
    side = math.isqrt(len(table))
    if table.ndim != 2 or side * side != len(table) or side % 2 == 0:
        raise ValueError(
            f"a relative_position_bias_table has shape {table.shape}, which is not that of a "
            "square window: [(2 * window - 1) ** 2, heads]"
        )
    return (side + 1) // 2


def _timm_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
    config = configs.get("config.json") or {}
    mapping.timm_arguments(config, _TOLD)
    mapping.timm_pooling(config, {"avg": "mean"})
    named = mapping.named_options(configs, "norm_epsilon")
    return Network("swin_transformer", _shapes(tensors, _TIMM) | named)


def _huggingface_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
    config = mapping.read_config(configs, "how large its windows and images are")
    choices = {
        "model_type": ("swin",), "num_channels": (3,), "hidden_act": ("gelu",),
        "layer_norm_eps": (_EPSILON,), "qkv_bias": (True,), "use_absolute_embeddings": (False,),
    }  # fmt: skip
    mapping.check_config(config, choices)
    options = _shapes(tensors, _HUGGINGFACE)
    window = config.get("window_size", options["windows"][0])
    if {*options["windows"]} != {window}:
        raise ValueError(
            f"config.json: window_size is {window!r}, and the tensors are of {options['windows']}; "
            "take the config that was saved with them"
        )
    return Network("swin_transformer", options | {"pad_first": True})


def _timm_prepare(tensors: dict[str, np.ndarray], _: int | None) -> dict[str, np.ndarray]:
    """Its authors merge at the end of a stage, timm since 2023 at the beginning of the next."""
    if "layers.0.downsample.reduction.weight" not in tensors:
        return tensors

    def later(match: re.Match) -> str:
        return f"layers.{int(match[1]) + 1}.downsample."

    return {re.sub(r"^layers\.(\d+)\.downsample\.", later, n): x for n, x in tensors.items()}


# Which pair has which position, and what a shift hides, is computed.
_COMPUTED = r".*\.(relative_position_index|attn_mask)$"

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "timm-swin",
        "timm's Swin transformers and the releases of their authors, of the first version",
        mapping.has(
            r"patch_embed\.proj\.weight",
            r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table",
            but=r"layers\.0\.blocks\.0\.attn\.(logit_scale|cpb_mlp)\b.*",
        ),
        rename_below(r"^", rf"head\.|mask_token$|{_COMPUTED}"),
        _timm_network,
        _entries(_TIMM),
        _timm_prepare,
        lambda names, configs: "bicubic",
    ),
    Layout(
        "huggingface-swin",
        "transformers' Swin models of the first version, with their names before and since 5",
        mapping.has(
            r"(swin\.)?embeddings\.patch_embeddings\.projection\.weight",
            r"(swin\.)?encoder\.layers\.0\.blocks\.0\..*\.relative_position_bias_table",
        ),
        rename_below(
            r"^swin\.",
            rf"(pooler|classifier|decoder)\.|embeddings\.mask_token$|{_COMPUTED}",
            _NEW_NAMES,
        ),
        _huggingface_network,
        _entries(_HUGGINGFACE),
        resizing=lambda names, configs: "bicubic",
    ),
)
