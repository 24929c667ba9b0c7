"""What the vision towers of CLIP and SigLIP, torchvision's ViT and DINOv3 are called."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import Kind, Layout, Network
from robust_ssl.weights.normalization import own_record
from robust_ssl.weights.vit_names import (
    Configs,
    Tensors,
    check_sizes,
    names,
    rename_below,
    shape_options,
)

# Width -> heads of the published towers: B, L, H, g and bigG of OpenAI and open_clip.
_CLIP_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_TORCHVISION_HEADS = {768: 12, 1024: 16, 1280: 16}
# One vector, and one position a row, where ours have leading axes of one.
_VECTOR = Kind(lambda x: x[0].reshape(1, 1, -1), lambda x, _: [x.reshape(-1)])
_ROWS = Kind(lambda x: x[0][None], lambda x, _: [x[0]])

_OPEN_CLIP = names(
    {
        "embed/token": "class_embedding",
        "embed/position": "positional_embedding",
        "embed/patch": "conv1",
        "embed/norm": "ln_pre",
        "block/norm1": "transformer.resblocks.{}.ln_1",
        "block/attention/qkv": "transformer.resblocks.{}.attn.in_proj",
        "block/attention/output": "transformer.resblocks.{}.attn.out_proj",
        "block/scale1": "transformer.resblocks.{}.ls_1.gamma",
        "block/norm2": "transformer.resblocks.{}.ln_2",
        "block/mlp/dense1": "transformer.resblocks.{}.mlp.c_fc",
        "block/mlp/dense2": "transformer.resblocks.{}.mlp.c_proj",
        "block/scale2": "transformer.resblocks.{}.ls_2.gamma",
        "norm": "ln_post",
    },
    kinds={"embed/token": _VECTOR, "embed/position": _ROWS},
)
_TORCHVISION = names(
    {
        "embed/token": "class_token",
        "embed/position": "encoder.pos_embedding",
        "embed/patch": "conv_proj",
        "block/norm1": "encoder.layers.encoder_layer_{}.ln_1",
        "block/attention/qkv": "encoder.layers.encoder_layer_{}.self_attention.in_proj",
        "block/attention/output": "encoder.layers.encoder_layer_{}.self_attention.out_proj",
        "block/norm2": "encoder.layers.encoder_layer_{}.ln_2",
        "block/mlp/dense1": "encoder.layers.encoder_layer_{}.mlp.0",
        "block/mlp/dense2": "encoder.layers.encoder_layer_{}.mlp.3",
        "norm": "encoder.ln",
    }
)
_SIGLIP_BLOCK = "encoder.layers.{}."
_SIGLIP = names(
    {
        "embed/position": "embeddings.position_embedding.weight",
        "embed/patch": "embeddings.patch_embedding",
        "block/norm1": f"{_SIGLIP_BLOCK}layer_norm1",
        "block/attention/qkv": tuple(f"{_SIGLIP_BLOCK}self_attn.{x}_proj" for x in "qkv"),
        "block/attention/output": f"{_SIGLIP_BLOCK}self_attn.out_proj",
        "block/norm2": f"{_SIGLIP_BLOCK}layer_norm2",
        "block/mlp/dense1": f"{_SIGLIP_BLOCK}mlp.fc1",
        "block/mlp/dense2": f"{_SIGLIP_BLOCK}mlp.fc2",
        "norm": "post_layernorm",
        "pool/probe": "head.probe",
        "pool/qkv": "head.attention.in_proj",
        "pool/output": "head.attention.out_proj",
        "pool/norm": "head.layernorm",
        "pool/mlp/dense1": "head.mlp.fc1",
        "pool/mlp/dense2": "head.mlp.fc2",
    },
    kinds={"embed/position": _ROWS},
)
_DINOV3 = names(
    {
        "embed/token": "embeddings.cls_token",
        "embed/registers": "embeddings.register_tokens",
        "embed/patch": "embeddings.patch_embeddings",
        "block/norm1": "layer.{}.norm1",
        "block/attention/qkv": tuple(f"layer.{{}}.attention.{x}_proj" for x in "qkv"),
        "block/attention/output": "layer.{}.attention.o_proj",
        "block/scale1": "layer.{}.layer_scale1.lambda1",
        "block/norm2": "layer.{}.norm2",
        "block/mlp/dense1": "layer.{}.mlp.up_proj",
        "block/mlp/dense2": "layer.{}.mlp.down_proj",
        "block/gated/dense1": ("layer.{}.mlp.gate_proj", "layer.{}.mlp.up_proj"),
        "block/gated/dense2": "layer.{}.mlp.down_proj",
        "block/scale2": "layer.{}.layer_scale2.lambda1",
        "norm": "norm",
    }
)


def _open_clip_network(tensors: Tensors, configs: Configs) -> Network:
    options = shape_options(tensors, _OPEN_CLIP)
    model = (configs.get("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = model.get("vision_cfg") or {}
    check_sizes(vision, options)
    choices = {"pool_type": ("tok",), "final_ln_after_pool": (False,), "no_ln_pre": (False,)}
    mapping.check_config(vision, {**choices, "attentional_pool": (False,)}, "open_clip_config.json")
    told: dict[str, Any] = {}
    if vision:
        told["heads"] = vision.get("width", 768) // vision.get("head_width", 64)
        told |= _open_clip_layers(vision, "quick_gelu" if model.get("quick_gelu") else "gelu")
    told |= mapping.named_options(configs, "heads", "activation", "norm_epsilon", "pooling")
    assumed = []
    if "heads" not in told:
        told["heads"] = _published(_CLIP_HEADS, options["width"])
        assumed.append(f"{told['heads']} attention heads, as published towers have (--heads)")
    if "activation" not in told:
        raise ValueError(
            "the file does not say which activation it has: name --activation quick_gelu "
            "(OpenAI's weights and those named quickgelu) or gelu"
        )
    scaled = any(".ls_1." in name for name in tensors)
    fixed = {"norm_epsilon": 1e-5, "pre_norm": True, "patch_bias": False, "layer_scale": scaled}
    assumed.append("features are the class token after the last norm, not projected")
    return Network("vision_transformer", options | fixed | told, tuple(assumed))


def _open_clip_layers(vision: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """The tower's activation, and what is under the root of its norms.

    Raises:
      ValueError: If these layers are made with anything that no network of this package has.
    """
    act, norm = vision.get("act_kwargs") or {}, vision.get("norm_kwargs") or {}
    if act == {"approximate": "tanh"} and activation == "gelu":
        activation = "gelu_tanh"
    elif act:
        raise ValueError(
            f"open_clip_config.json: act_kwargs is {act!r} for {activation}; only "
            "{'approximate': 'tanh'} for gelu is known"
        )
    epsilon = norm.get("eps", 1e-5)
    if set(norm) - {"eps"} or type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise ValueError(
            f"open_clip_config.json: norm_kwargs is {norm!r}; only eps, from 0 to 1, is known"
        )
    return {"activation": activation, "norm_epsilon": epsilon}


def _published(heads: Mapping[int, int], width: int) -> int:
    if width not in heads:
        raise ValueError(
            f"the file does not say how many attention heads it has, and {width} is no published "
            f"width ({sorted(heads)}): name heads, for example --heads 6"
        )
    return heads[width]


def _torchvision_network(tensors: Tensors, configs: Configs) -> Network:
    options = shape_options(tensors, _TORCHVISION) | {"norm_epsilon": 1e-6}
    named = mapping.named_options(configs, "heads", "pooling", "activation", "norm_epsilon")
    if "heads" in named:
        return Network("vision_transformer", options | named)
    heads = _published(_TORCHVISION_HEADS, options["width"])
    assumed = (f"{heads} attention heads, as torchvision's have at this width (--heads)",)
    return Network("vision_transformer", options | named | {"heads": heads}, assumed)


def _siglip_network(tensors: Tensors, configs: Configs) -> Network:
    whole = mapping.read_config(configs, "how many attention heads the network has")
    config = whole.get("vision_config", whole)
    kinds = ("siglip_vision_model", "siglip2_vision_model")
    choices = {"model_type": kinds, "num_channels": (3,), "vision_use_head": (True,)}
    mapping.check_config(config, choices)
    shapes = shape_options(tensors, _SIGLIP)
    if "image_size" in config:
        check_sizes(config, shapes)
    asked = configs.get("options", {}).get("image_size")
    if asked not in (None, shapes["image_size"]) and _is_siglip2(whole, config):
        raise ValueError(
            f"SigLIP2's positions are for images of {shapes['image_size']} pixels only, and "
            f"image_size={asked} is asked for: leave it out"
        )
    act = config.get("hidden_act", "gelu_pytorch_tanh")
    activation = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}.get(act)
    if activation is None:
        raise ValueError(
            f"config.json: hidden_act is {act!r}; gelu_pytorch_tanh and gelu are known"
        )
    options = shapes | {
        "pooling": "attention", "activation": activation,
        "heads": config.get("num_attention_heads", 12),
        "norm_epsilon": config.get("layer_norm_eps", 1e-6),
    }  # fmt: skip
    return Network("vision_transformer", options)


def _is_siglip2(*tables: Mapping[str, Any]) -> bool:
    """Whether patches are rows of pixels, with positions that follow each image's sides."""
    # SigLIP2's weights for one size have the first version's form, and are resized as it is.
    return any("siglip2" in str(x.get("model_type")) or "num_patches" in x for x in tables)


def _siglip_prepare(tensors: dict[str, np.ndarray], _: int | None) -> dict[str, np.ndarray]:
    """SigLIP2's patches are rows of pixels, row, column, color; written as a convolution."""
    kernel = tensors.get("embeddings.patch_embedding.weight")
    if kernel is None or kernel.ndim != 2:
        return tensors
    side = math.isqrt(kernel.shape[1] // 3)
    if side * side * 3 != kernel.shape[1]:
        return tensors
    convolution = kernel.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
    return {**tensors, "embeddings.patch_embedding.weight": convolution}


def _dinov3_network(tensors: Tensors, configs: Configs) -> Network:
    config = mapping.read_config(configs, "how many attention heads the network has")
    mapping.check_config(
        config, {"model_type": ("dinov3_vit",), "num_channels": (3,), "apply_layernorm": (True,)}
    )
    gated = any(".gate_proj." in name for name in tensors)
    # transformers leaves out its default, gelu, which a gated MLP never has.
    act, known = config.get("hidden_act", "gelu"), "silu" if gated else "gelu"
    if config and act != known:
        raise ValueError(f"config.json: hidden_act is {act!r}; with this MLP {known} is known")
    size = configs.get("options", {}).get("image_size") or _image_size(config, configs)
    options = shape_options(tensors, _DINOV3, gated, image_size=size)
    check_sizes({"patch_size": config.get("patch_size")}, options)
    registers = tensors.get("embeddings.register_tokens")
    return Network("vision_transformer", options | {
        "class_token": True, "pooling": "token", "layer_scale": True,
        "registers": 0 if registers is None else registers.shape[1],
        "activation": "swiglu" if gated else "gelu",
        "rotary": float(config.get("rope_theta", 100.0)),
        "heads": config.get("num_attention_heads", 6),
        "norm_epsilon": config.get("layer_norm_eps", 1e-5),
    })  # fmt: skip


def _image_size(config: Mapping[str, Any], configs: Configs) -> int:
    stored = own_record(configs).get("options", {}).get("image_size")
    size = stored or config.get("image_size", 224)
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) > 1:
        raise ValueError(f"config.json: image_size {size} is no square; an encoder takes squares")
    return sides.pop()


def _dinov3_prepare(tensors: dict[str, np.ndarray], _: int | None) -> dict[str, np.ndarray]:
    """Keys have no bias, which is one of zeros; no registers are none."""
    tensors = dict(tensors)
    for name in list(tensors):
        block = re.fullmatch(r"(layer\.\d+\.attention\.)([qkv])_proj\.weight", name)
        if block and f"{block[1]}{block[2]}_proj.bias" not in tensors:
            zeros = np.zeros(len(tensors[name]), np.float32)
            tensors[f"{block[1]}{block[2]}_proj.bias"] = zeros
    registers = tensors.get("embeddings.register_tokens")
    if registers is not None and not registers.size:
        del tensors["embeddings.register_tokens"]
    return tensors


def _always(resizing: str) -> Callable:
    return lambda names, configs: resizing


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "open-clip-vision",
        "open_clip's and OpenAI CLIP's vision towers up to their last norm, not projected",
        mapping.has(r"class_embedding", r"conv1\.weight", r"transformer\.resblocks\.0\..*"),
        rename_below(r"^", r"proj$"),
        _open_clip_network,
        _OPEN_CLIP.entries,
        resizing=_always("antialias"),
    ),
    Layout(
        "torchvision-vit",
        "torchvision's vision transformers",
        mapping.has(r"conv_proj\.weight", r"encoder\.layers\.encoder_layer_0\..*"),
        rename_below(
            r"^",
            r"heads\.",
            ((r"\.linear_1\.", ".0."), (r"\.linear_2\.", ".3.")),
        ),
        _torchvision_network,
        _TORCHVISION.entries,
        resizing=_always("corners"),
    ),
    Layout(
        "huggingface-siglip-vision",
        "transformers' SigLIP and SigLIP2 models: the vision tower with its pooling",
        mapping.has(
            r"(vision_model\.)?embeddings\.patch_embedding\.weight",
            r"(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",
            r"(vision_model\.)?head\.probe",
        ),
        rename_below(
            r"^vision_model\.",
            r"text_model\.|logit_(scale|bias)$|(embeddings\.)?position_ids$",
        ),
        _siglip_network,
        _SIGLIP.entries,
        _siglip_prepare,
        _always("bicubic"),
    ),
    Layout(
        "huggingface-dinov3",
        "transformers' DINOv3 vision transformers",
        mapping.has(
            r"(dinov3_vit\.)?embeddings\.cls_token",
            r"(dinov3_vit\.)?(model\.)?layer\.0\.layer_scale1\.lambda1",
        ),
        rename_below(
            r"^(dinov3_vit\.)?", r"embeddings\.mask_token$", ((r"^model\.layer", "layer"),)
        ),
        _dinov3_network,
        _DINOV3.entries,
        _dinov3_prepare,
        _always("bicubic"),
    ),
)
