"""What EVA-02's vision transformers are called by timm, also inside open_clip's files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import Layout, Network
from robust_ssl.weights.vit_names import Configs, Tensors, check_sizes, names, shape_options

# Queries, keys and values apart, and gate and values too, as in the larger ones; `_prepare` brings
# the smaller ones to this.
_EVA = names(
    {
        "embed/token": "cls_token",
        "embed/position": "pos_embed",
        "embed/patch": "patch_embed.proj",
        "block/norm1": "blocks.{}.norm1",
        "block/attention/qkv": tuple(f"blocks.{{}}.attn.{part}_proj" for part in "qkv"),
        "block/attention/norm": "blocks.{}.attn.norm",
        "block/attention/output": "blocks.{}.attn.proj",
        "block/norm2": "blocks.{}.norm2",
        "block/gated/dense1": ("blocks.{}.mlp.fc1_g", "blocks.{}.mlp.fc1_x"),
        "block/gated/norm": "blocks.{}.mlp.norm",
        "block/gated/dense2": "blocks.{}.mlp.fc2",
        "norm": "norm",
        "pooled_norm": "fc_norm",
    }
)
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # width -> heads: tiny, small, base, large
_REFERENCE = 16  # patches along a side in pre-training, in all of them
# What timm's model_args may say: the tensors tell it, or it is of training alone.
_TOLD = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"),
    *("qkv_fused", "swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_rot_pos_emb", "in_chans"),
    *("ref_feat_shape", "global_pool", "drop_rate", "drop_path_rate", "dynamic_img_size"),
}


def _prepare(tensors: dict[str, np.ndarray], _: int | None) -> dict[str, np.ndarray]:
    """Takes maps apart that lie in one; keys have no bias, which is one of zeros."""
    parts: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        names = _parts(name)
        if x.ndim == 0 or len(x) % len(names):  # reported as it stands
            names = [name]
        parts |= zip(names, np.split(x, len(names)) if len(names) > 1 else [x], strict=True)
    for name in list(parts):
        if name.endswith(".attn.k_proj.weight"):
            bias = f"{name.removesuffix('weight')}bias"
            parts.setdefault(bias, np.zeros(len(parts[name]), np.float32))
    return parts


def _parts(name: str) -> list[str]:
    """The names of the larger networks for a tensor of the smaller ones."""
    if name.endswith(".attn.qkv.weight"):
        return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"]
    if name.endswith((".attn.q_bias", ".attn.v_bias")):
        return [re.sub(r"([qv])_bias$", r"\1_proj.bias", name)]
    packed = re.fullmatch(r"(.*\.mlp\.fc1)(\.\w+)", name)
    return [f"{packed[1]}{part}{packed[2]}" for part in ("_g", "_x")] if packed else [name]


def _network(tensors: Tensors, configs: Configs) -> Network:
    _check_gated(tensors)
    options = shape_options(tensors, _EVA, gated=True)
    config = configs.get("config.json") or {}
    check_sizes(config, options)
    after = "fc_norm.weight" in tensors
    options |= {
        "activation": "swiglu", "norm_epsilon": 1e-6, "rotary": 10000.0,
        "norm_after_pooling": after, "pooling": "mean" if after else "token",
        "mlp_norm": "blocks.0.mlp.norm.weight" in tensors,
        "attention_norm": "blocks.0.attn.norm.weight" in tensors,
    }  # fmt: skip
    told = _told(config) | mapping.named_options(
        configs, "heads", "rotary_reference", "norm_epsilon", "pooling"
    )
    assumed = []
    if "heads" not in told:
        if options["width"] not in _HEADS:
            raise ValueError(
                f"the file does not say how many attention heads it has, and {options['width']} is "
                f"no published width ({sorted(_HEADS)}): name heads, for example --heads 6"
            )
        told["heads"] = _HEADS[options["width"]]
        assumed.append(f"{told['heads']} attention heads, as published ones have (--heads)")
    if "rotary_reference" not in told:
        told["rotary_reference"] = _REFERENCE
        assumed.append(f"places counted by {_REFERENCE} patches a side (--rotary-reference)")
    return Network("vision_transformer", options | told, tuple(assumed))


def _check_gated(tensors: Tensors) -> None:
    """Raises ValueError for an MLP whose first map has no two halves, or whose halves are one."""
    gate, last = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1_g", "fc2"))
    halved = gate is not None and last is not None and len(gate) != last.shape[-1]
    if halved or "blocks.0.mlp.fc1.weight" in tensors:
        raise ValueError(
            "blocks.0.mlp.fc1 is as wide as fc2, so this MLP is not gated: EVA of the first "
            "version, or EVA-02 enormous, whose norms come after; neither is read"
        )


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's config says of what shapes do not."""
    model = mapping.timm_arguments(config, _TOLD)
    told = {}
    if model.get("num_heads") is not None:
        told["heads"] = model["num_heads"]
    if pooling := mapping.timm_pooling(config, {"token": "token", "avg": "mean"}):
        told["pooling"] = pooling
    if (reference := model.get("ref_feat_shape")) is not None:
        sides = set(reference) if isinstance(reference, list | tuple) else {reference}
        if len(sides) != 1:
            raise ValueError(f"config.json: ref_feat_shape {reference} is no square")
        told["rotary_reference"] = sides.pop()
    return told


def _rename(name: str) -> str | None:
    # Angles are computed.
    known = mapping.is_other_part(name) or name.startswith("rope.")
    return None if known or name.endswith(".attn.k_bias") else name


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "timm-eva02",
        "timm's EVA-02 vision transformers, also as the tower of an open_clip file",
        mapping.has(
            r"blocks\.0\.attn\.(q_proj\.weight|q_bias)",
            r"blocks\.0\.mlp\.(fc1_g|fc1)\.weight",
            r"pos_embed",
        ),
        _rename,
        _network,
        _EVA.entries,
        _prepare,
        lambda names, configs: "antialias",
    ),
)
