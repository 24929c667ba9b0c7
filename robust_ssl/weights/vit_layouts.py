"""What vision transformers are called elsewhere: timm and its kin, Hugging Face, CLIP.

Shapes tell nearly everything of a transformer.  They do not tell the number of attention heads:
that is read from the ``config.json`` beside the file, or is the published one of this width, or
must be named.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.types import Encoder
from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import COPY, DENSE, STACKED_BIAS, STACKED_DENSE, Entry, Kind, Layout

Tensors = Mapping[str, np.ndarray]
Configs = Mapping[str, Any]
Network = tuple[str, dict[str, Any]]

# Width -> heads: ViT and DeiT tiny, small, base, large, huge; timm's giant; DINOv2's giant; timm's
# gigantic.  Heads of 64 features but for the huge, timm's giant and the gigantic.
_PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


@dataclasses.dataclass(frozen=True)
class _Names:
    """A naming scheme.

    Attributes:
      table: Our module or parameter, ``"block/attention/qkv"``, to theirs, with ``{}`` for the
        number of the block from 0; several where one of ours is several of theirs.
      kinds: Arrangements that are this scheme's own.
    """

    table: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def of(self, module: str, leaf: str = "", block: int = 0) -> tuple[str, ...]:
        end = {"": "", "kernel": ".weight", "scale": ".weight", "bias": ".bias"}[leaf]
        return tuple(name.format(block) + end for name in self.table[module])

    def entries(self, encoder: Encoder) -> list[Entry]:
        paths = traverse_util.flatten_dict(encoder.variables, sep="/")
        return [self._entry(path, encoder.module) for path in paths]

    def _entry(self, path: str, module: Any) -> Entry:
        where, leaf = path.removeprefix("params/"), ""
        if where.rpartition("/")[2] in ("kernel", "scale", "bias"):
            where, _, leaf = where.rpartition("/")
        # Ours count from 1, theirs from 0.
        number = re.match(r"block(\d+)/", where)
        where = re.sub(r"^block\d+/", "block/", where)
        if where.startswith("block/mlp/") and module.activation == "swiglu":
            where = where.replace("mlp", "gated")
        if where == "norm" and module.norm_after_pooling:
            where = "pooled_norm"
        names = self.of(where, leaf, int(number[1]) - 1 if number else 0)
        return Entry(path, names, self._kind(where, leaf, len(names), module.patch_size))

    def _kind(self, where: str, leaf: str, count: int, patch_size: int) -> Kind:
        if where in self.kinds:
            return self.kinds[where]
        if leaf == "kernel":
            if where == "embed/patch":
                return mapping.patches(patch_size)
            return DENSE if count == 1 else STACKED_DENSE
        return COPY if count == 1 else STACKED_BIAS


def _names(table: Mapping[str, str | tuple[str, ...]], **options: Any) -> _Names:
    tuples = {key: (name,) if isinstance(name, str) else name for key, name in table.items()}
    return _Names(tuples, **options)


_TIMM = _names(
    {
        "embed/token": "cls_token",
        "embed/position": "pos_embed",
        "embed/registers": "register_tokens",
        "embed/patch": "patch_embed.proj",
        "embed/norm": "norm_pre",
        "block/norm1": "blocks.{}.norm1",
        "block/attention/qkv": "blocks.{}.attn.qkv",
        "block/attention/output": "blocks.{}.attn.proj",
        "block/scale1": "blocks.{}.ls1.gamma",
        "block/norm2": "blocks.{}.norm2",
        "block/mlp/dense1": "blocks.{}.mlp.fc1",
        "block/mlp/dense2": "blocks.{}.mlp.fc2",
        "block/gated/dense1": "blocks.{}.mlp.w12",
        "block/gated/dense2": "blocks.{}.mlp.w3",
        "block/scale2": "blocks.{}.ls2.gamma",
        "norm": "norm",
        "pooled_norm": "fc_norm",
    }
)
_HUGGINGFACE = {
    "embed/token": "embeddings.cls_token",
    "embed/position": "embeddings.position_embeddings",
    "embed/registers": "embeddings.register_tokens",
    "embed/patch": "embeddings.patch_embeddings.projection",
    "block/attention/qkv": tuple(
        f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")
    ),
    "block/attention/output": "encoder.layer.{}.attention.output.dense",
    "norm": "layernorm",
}
_HUGGINGFACE_VIT = _names(
    {
        **_HUGGINGFACE,
        "block/norm1": "encoder.layer.{}.layernorm_before",
        "block/norm2": "encoder.layer.{}.layernorm_after",
        "block/mlp/dense1": "encoder.layer.{}.intermediate.dense",
        "block/mlp/dense2": "encoder.layer.{}.output.dense",
    }
)
_DINOV2 = _names(
    {
        **_HUGGINGFACE,
        "block/norm1": "encoder.layer.{}.norm1",
        "block/scale1": "encoder.layer.{}.layer_scale1.lambda1",
        "block/norm2": "encoder.layer.{}.norm2",
        "block/mlp/dense1": "encoder.layer.{}.mlp.fc1",
        "block/mlp/dense2": "encoder.layer.{}.mlp.fc2",
        "block/gated/dense1": "encoder.layer.{}.mlp.weights_in",
        "block/gated/dense2": "encoder.layer.{}.mlp.weights_out",
        "block/scale2": "encoder.layer.{}.layer_scale2.lambda1",
    }
)
_CLIP_BLOCK = "vision_model.encoder.layers.{}."
_CLIP = _names(
    {
        "embed/token": "vision_model.embeddings.class_embedding",
        "embed/position": "vision_model.embeddings.position_embedding.weight",
        "embed/patch": "vision_model.embeddings.patch_embedding",
        "embed/norm": "vision_model.pre_layrnorm",  # sic
        "block/norm1": f"{_CLIP_BLOCK}layer_norm1",
        "block/attention/qkv": tuple(f"{_CLIP_BLOCK}self_attn.{part}_proj" for part in "qkv"),
        "block/attention/output": f"{_CLIP_BLOCK}self_attn.out_proj",
        "block/norm2": f"{_CLIP_BLOCK}layer_norm2",
        "block/mlp/dense1": f"{_CLIP_BLOCK}mlp.fc1",
        "block/mlp/dense2": f"{_CLIP_BLOCK}mlp.fc2",
        "norm": "vision_model.post_layernorm",
    },
    kinds={
        "embed/token": Kind(lambda x: x[0].reshape(1, 1, -1), lambda x, _: [x.reshape(-1)]),
        "embed/position": Kind(lambda x: x[0][None], lambda x, _: [x[0]]),
    },
)


def _network(tensors: Tensors, names: _Names, gated: bool = False) -> dict[str, Any]:
    """What the shapes say about the network."""

    def tensor(where: str, leaf: str = "") -> np.ndarray:
        (name,) = names.of(where, leaf)
        if name not in tensors:
            raise ValueError(f"missing {name}, which tells the shape of the network")
        return tensors[name]

    patch = tensor("embed/patch", "kernel").shape
    if len(patch) != 4 or patch[1] != 3 or patch[2] != patch[3]:
        raise ValueError(
            f"{names.of('embed/patch', 'kernel')[0]} has shape {patch}, a ViT needs "
            "[width, 3, patch, patch] (are its axes transposed?)"
        )
    position = tensor("embed/position")
    count = position.size // patch[0]
    side = math.isqrt(count)
    # A square of patches, or a square and one: no number above 1 is both.
    class_token = side * side != count
    if position.size % patch[0] or (class_token and side * side + 1 != count):
        raise ValueError(
            f"{names.of('embed/position')[0]} has shape {position.shape}, which is not positions "
            f"of width {patch[0]} for a square of patches, with or without one class token"
        )
    # The gate and the gated values lie in one tensor, half each.
    hidden = tensor("block/gated/dense1" if gated else "block/mlp/dense1", "kernel").shape[0]
    return {
        "width": patch[0],
        "depth": _depth(tensors, names),
        "patch_size": patch[2],
        "image_size": side * patch[2],
        "mlp_width": hidden // 2 if gated else hidden,
        "class_token": class_token,
        "pooling": "token" if class_token else "mean",
    }


def _depth(tensors: Tensors, names: _Names) -> int:
    block = re.escape(names.table["block/norm1"][0].partition("{}")[0]) + r"(\d+)\."
    matches = [re.match(block, name) for name in tensors]
    numbers = [int(match[1]) for match in matches if match]
    return 1 + min(max(numbers), len(tensors))  # a gap is reported, a wild number is not built


def _timm_network(tensors: Tensors, configs: Configs) -> Network:
    """Of timm and every repository that builds on its names."""
    if "dist_token" in tensors:
        raise ValueError("dist_token: distilled DeiT has two class tokens; no network here has")
    if "reg_token" in tensors:
        raise ValueError("reg_token: in timm's models with registers only patches have positions")
    gated = any(".mlp.w12." in name for name in tensors)
    options = _network(tensors, _TIMM, gated)
    config = configs.get("config.json", {})
    # Weights do not tell how they are pooled; timm's config and its fc_norm do.
    if config.get("global_pool") == "avg" or "fc_norm.weight" in tensors:
        options["pooling"] = "mean"
    clip = "norm_pre.weight" in tensors  # timm's CLIP towers
    options |= {
        "norm_after_pooling": "fc_norm.weight" in tensors,
        "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "layer_scale": any(".ls1." in name for name in tensors),
        "activation": "swiglu" if gated else None if clip else "gelu",
        "norm_epsilon": 1e-5 if clip else 1e-6,
        "pre_norm": clip,
        "patch_bias": not clip,
        "heads": _PUBLISHED_HEADS.get(options["width"]),
    }
    # What is named goes over what is guessed, and timm's config over both for the heads.
    options |= mapping.named_options(configs, "heads", "pooling", "activation", "norm_epsilon")
    options["heads"] = config.get("model_args", {}).get("num_heads", options["heads"])
    if options["heads"] is None:
        raise ValueError(
            f"the file does not say how many attention heads it has, and {options['width']} is no "
            f"published width ({sorted(_PUBLISHED_HEADS)}): name heads, for example --heads 6"
        )
    if options["activation"] is None:
        raise ValueError(
            "norm_pre: a CLIP tower, and the file does not say which activation it has: name "
            "--activation quick_gelu (OpenAI's weights) or gelu"
        )
    return "vision_transformer", options


def _huggingface_options(config: Mapping[str, Any], epsilon: float, act: str) -> dict[str, Any]:
    activation = config.get("hidden_act", act)
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"config.json: hidden_act is {activation!r}; gelu and quick_gelu are known"
        )
    # transformers leaves out what is its default, so an absent entry is not an unknown one.
    heads, epsilon = config.get("num_attention_heads", 12), config.get("layer_norm_eps", epsilon)
    if type(heads) is not int or heads < 1:
        raise ValueError(f"config.json: num_attention_heads is {heads!r}")
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise ValueError(f"config.json: layer_norm_eps is {epsilon!r}")
    depth = config.get("num_hidden_layers", 12)
    return {"heads": heads, "depth": depth, "norm_epsilon": epsilon, "activation": activation}


def _huggingface_network(
    names: _Names, kinds: tuple[str, ...], epsilon: float, act="gelu", part="", **fixed: Any
) -> Callable[[Tensors, Configs], Network]:
    """Makes `Layout.network` of a family: its names, model types and defaults in transformers."""

    def network(tensors: Tensors, configs: Configs) -> Network:
        config = mapping.read_config(configs, "how many attention heads the network has")
        config = config.get(part, config)  # a whole CLIP has the vision tower's part inside
        mapping.check_config(
            config, {"model_type": kinds, "num_channels": (3,), "qkv_bias": (True,)}
        )
        gated = "block/gated/dense1" in names.table and config.get("use_swiglu_ffn", False)
        options = _network(tensors, names, gated)
        options |= _huggingface_options(config, epsilon, act) | fixed
        if gated:  # in spite of the entry hidden_act, which says gelu there too
            options["activation"] = "swiglu"
        if config.get("model_type") == "dinov2_with_registers":
            options["registers"] = config.get("num_register_tokens", 4)
        return "vision_transformer", options | mapping.named_options(configs, "pooling")

    return network


def _rename(
    prefix: str, dropped: str, changes: tuple[tuple[str, str], ...] = ()
) -> Callable[[str], str | None]:
    """Takes a prefix off, then drops what `dropped` matches, then writes new names the old way."""
    first, drop = re.compile(prefix), re.compile(dropped)
    steps = [(re.compile(pattern), new) for pattern, new in changes]

    def rename(name: str) -> str | None:
        name = first.sub("", name, count=1)
        if drop.match(name):
            return None
        for pattern, new in steps:
            name = pattern.sub(new, name)
        return name

    return rename


# transformers 5 calls its modules otherwise than its files do: a state dict saved by torch has
# these names, save_pretrained writes the old ones.
_NEW_NAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_NEW_VIT_NAMES = (
    *_NEW_NAMES,
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_SOLO_HEADS = r"head\.|momentum_|projector|predictor|classifier|prototypes|queue|dino_loss_func\."
_HF_BLOCK = r"(\w+\.)?(encoder\.layer|layers)\.0\."


_QKV = r"blocks\.0\.attn\.qkv\.weight"


def _timm_layout(name: str, source: str, matches: Callable, prefix: str, dropped: str) -> Layout:
    return Layout(name, source, matches, _rename(prefix, dropped), _timm_network, _TIMM.entries)


# In the order in which they are tried: the barest names come after those with a prefix.
LAYOUTS: tuple[Layout, ...] = (
    _timm_layout(
        "solo-learn-vit",
        "solo-learn checkpoints with a ViT",
        mapping.has(rf"(module\.)?backbone\.{_QKV}", r"(module\.)?classifier\..*"),
        r"^(module\.)?(backbone\.)?",
        _SOLO_HEADS,
    ),
    _timm_layout(
        "moco-vit",
        "MoCo v3 checkpoints with a ViT (base_encoder)",
        mapping.has(rf"(module\.)?base_encoder\.{_QKV}"),
        r"^(module\.)?(base_encoder\.)?",
        r"head\.|momentum_encoder\.|predictor\.",
    ),
    _timm_layout(
        "dino",
        "the DINO release's full checkpoints (its teacher), with a ViT",
        mapping.has(rf"(teacher\.)?(module\.)?backbone\.{_QKV}", but=r"(module\.)?classifier\..*"),
        r"^(teacher\.)?(module\.)?(backbone\.)?",
        r"head\.|student\.",
    ),
    _timm_layout(
        "mae",
        "the MAE release's pre-training checkpoints; its fixed sines are positions",
        mapping.has(rf"(module\.)?{_QKV}", r"(module\.)?decoder_embed\.weight"),
        r"^module\.",
        r"decoder_|mask_token$|head\.",
    ),
    _timm_layout(
        "timm-vit",
        "timm's and DeiT's ViTs, the DINO, MAE and DINOv2 releases' bare encoders",
        mapping.has(rf"(module\.)?{_QKV}", but=r"(module\.)?decoder_embed\.weight"),
        r"^module\.",
        r"head\.|mask_token$",
    ),
    Layout(
        "huggingface-vit",
        "transformers' ViT and ViTMAE models, with their names before and since version 5",
        mapping.has(_HF_BLOCK + r"layernorm_before\.weight", r".*embeddings\.cls_token"),
        _rename(
            r"^vit\.", r"(pooler|classifier|decoder)\.|embeddings\.mask_token$", _NEW_VIT_NAMES
        ),
        _huggingface_network(_HUGGINGFACE_VIT, ("vit", "vit_mae"), 1e-12),
        _HUGGINGFACE_VIT.entries,
    ),
    Layout(
        "huggingface-dinov2",
        "transformers' DINOv2 models, with and without registers",
        mapping.has(_HF_BLOCK + r"layer_scale1\.lambda1", r".*embeddings\.cls_token"),
        _rename(
            r"^dinov2(_with_registers)?\.", r"classifier\.|embeddings\.mask_token$", _NEW_NAMES
        ),
        _huggingface_network(
            _DINOV2, ("dinov2", "dinov2_with_registers"), 1e-6, layer_scale=True
        ),
        _DINOV2.entries,
    ),
    Layout(
        "huggingface-clip-vision",
        "transformers' CLIP models: the vision tower up to its last norm, not projected",
        mapping.has(r"(vision_model\.)?embeddings\.class_embedding", r".*pre_layrnorm\.weight"),
        _rename(
            r"^vision_model\.",
            r"text_model\.|(text|visual)_projection\.|logit_scale$|embeddings\.position_ids$",
            ((r"^", "vision_model."),),
        ),
        _huggingface_network(
            _CLIP, ("clip_vision_model",), 1e-5, "quick_gelu", "vision_config",
            pre_norm=True, patch_bias=False,
        ),
        _CLIP.entries,
    ),
)  # fmt: skip
