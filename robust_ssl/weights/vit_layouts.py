"""What vision transformers are called elsewhere: timm and its kin, Hugging Face, CLIP.

Shapes tell nearly everything of a transformer.  They do not tell the number of attention heads:
that is read from the ``config.json`` beside the file, or is the published one of this width, or
must be named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from robust_ssl.weights import mapping, timm_layouts, tower_layouts
from robust_ssl.weights.mapping import Kind, Layout, Network
from robust_ssl.weights.vit_names import (
    Configs,
    Names,
    Tensors,
    check_sizes,
    names,
    rename_below,
    shape_options,
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
_HUGGINGFACE_VIT = names(
    {
        **_HUGGINGFACE,
        "block/norm1": "encoder.layer.{}.layernorm_before",
        "block/norm2": "encoder.layer.{}.layernorm_after",
        "block/mlp/dense1": "encoder.layer.{}.intermediate.dense",
        "block/mlp/dense2": "encoder.layer.{}.output.dense",
    }
)
_DINOV2 = names(
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
_CLIP = names(
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
    names: Names, kinds: tuple[str, ...], epsilon: float, act="gelu", part="", **fixed: Any
) -> Callable[[Tensors, Configs], Network]:
    """Makes `Layout.network` of a family: its names, model types and defaults in transformers."""

    def network(tensors: Tensors, configs: Configs) -> Network:
        config = mapping.read_config(configs, "how many attention heads the network has")
        config = config.get(part, config)  # a whole CLIP has the vision tower's part inside
        mapping.check_config(
            config, {"model_type": kinds, "num_channels": (3,), "qkv_bias": (True,)}
        )
        gated = "block/gated/dense1" in names.table and config.get("use_swiglu_ffn", False)
        options = shape_options(tensors, names, gated)
        check_sizes(config, options)
        options |= _huggingface_options(config, epsilon, act) | fixed
        if gated:  # in spite of the entry hidden_act, which says gelu there too
            options["activation"] = "swiglu"
        if config.get("model_type") == "dinov2_with_registers":
            options["registers"] = config.get("num_register_tokens", 4)
        named = mapping.named_options(configs, "pooling")
        return Network("vision_transformer", options | named)

    return network


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


def _bicubic(names: Set[str], configs: Configs) -> str:
    """How transformers resizes positions: only its DINOv2 with registers smooths."""
    last = {name.rpartition(".")[2] for name in names}
    return "antialias" if "register_tokens" in last else "bicubic"


_HF_BLOCK = r"(\w+\.)?(encoder\.layer|layers)\.0\."


# In the order in which they are tried: the barest names come after those with a prefix.
LAYOUTS: tuple[Layout, ...] = (
    *timm_layouts.LAYOUTS,
    *tower_layouts.LAYOUTS,
    Layout(
        "huggingface-vit",
        "transformers' ViT and ViTMAE models, with their names before and since version 5",
        mapping.has(_HF_BLOCK + r"layernorm_before\.weight", r".*embeddings\.cls_token"),
        rename_below(
            r"^vit\.", r"(pooler|classifier|decoder)\.|embeddings\.mask_token$", _NEW_VIT_NAMES
        ),
        _huggingface_network(_HUGGINGFACE_VIT, ("vit", "vit_mae"), 1e-12),
        _HUGGINGFACE_VIT.entries,
        resizing=_bicubic,
    ),
    Layout(
        "huggingface-dinov2",
        "transformers' DINOv2 models, with and without registers",
        mapping.has(_HF_BLOCK + r"layer_scale1\.lambda1", r".*embeddings\.cls_token"),
        rename_below(
            r"^dinov2(_with_registers)?\.", r"classifier\.|embeddings\.mask_token$", _NEW_NAMES
        ),
        _huggingface_network(
            _DINOV2, ("dinov2", "dinov2_with_registers"), 1e-6, layer_scale=True
        ),
        _DINOV2.entries,
        resizing=_bicubic,
    ),
    Layout(
        "huggingface-clip-vision",
        "transformers' CLIP models: the vision tower up to its last norm, not projected",
        mapping.has(r"(vision_model\.)?embeddings\.class_embedding", r".*pre_layrnorm\.weight"),
        rename_below(
            r"^vision_model\.",
            r"text_model\.|(text|visual)_projection\.|logit_scale$|embeddings\.position_ids$",
            ((r"^", "vision_model."),),
        ),
        _huggingface_network(
            _CLIP, ("clip_vision_model",), 1e-5, "quick_gelu", "vision_config",
            pre_norm=True, patch_bias=False,
        ),
        _CLIP.entries,
        resizing=_bicubic,
    ),
)  # fmt: skip
