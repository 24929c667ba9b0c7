"""What vision transformers are called by timm and its kin: DeiT, DINO, MAE, MoCo v3, solo-learn."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np

from robust_ssl.weights import mapping, variants
from robust_ssl.weights.mapping import Kind, Layout, Network
from robust_ssl.weights.vit_names import Configs, Tensors, check_sizes, names, shape_options

TIMM = names(
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
        "pool/probe": "attn_pool.latent",
        "pool/qkv": ("attn_pool.q", "attn_pool.kv"),
        "pool/output": "attn_pool.proj",
        "pool/norm": "attn_pool.norm",
        "pool/mlp/dense1": "attn_pool.mlp.fc1",
        "pool/mlp/dense2": "attn_pool.mlp.fc2",
    },
    # The query's map lies by itself, those of keys and values together.
    kinds={
        "pool/qkv": Kind(
            lambda arrays: np.concatenate([x.T for x in arrays], axis=-1),
            lambda array, _: [x.T for x in np.split(array, [array.shape[-1] // 3], axis=-1)],
        )
    },
)
# Width -> heads: ViT and DeiT tiny, base, large, huge; timm's giant; DINOv2's giant; timm's
# gigantic.  Heads of 64 features but for the huge, timm's giant and the gigantic.
_PUBLISHED = {192: 3, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
_SMALL = 384  # wide: 6 heads in DeiT, DINO and DINOv2, 12 in MoCo v3 and solo-learn's MAE
# timm's further widths, for files that come with timm's config.
_TIMM_HEADS = {_SMALL: 6, 256: 4, 320: 5, 512: 8, 640: 10, 896: 14, 1152: 16}
# MoCo v3, vits.py; its authors have 12 heads in the small one, for 32 features each.
_MOCO_HEADS = {_SMALL: 12, 768: 12, 1024: 16, 1280: 16}
# solo-learn has timm's networks and its own of MAE and MoCo v3, tiny and small with 12 heads.
_SOLO_HEADS = {width: heads for width, heads in _PUBLISHED.items() if width != 192}
_SIX_HEADS = re.compile(r"deit|dino|ibot|vit_small_patch|vits(8|14|16)", re.IGNORECASE)
_GAP = "vit_base_patch16_gap_224"  # heads of 48 features, and a ViT-B's tensors
# What timm's model_args may say: the tensors tell it, or it is of training alone.
_TOLD = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "num_classes"),
    *("in_chans", "global_pool", "fc_norm", "dynamic_img_size", "weight_init", "final_norm"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "act_layer"),
}


def _prepare(tensors: dict[str, np.ndarray], image_size: int | None) -> dict[str, np.ndarray]:
    """Brings positions into one form: class token and patches have some, further tokens have none.

    A token's position is only ever added to it, so both are one number: what a further token's
    position says goes into the token, and a class token without a position gets zeros.

    Raises:
      ValueError: If positions may be of all tokens or of patches alone, and no image size tells.
    """
    tensors = dict(tensors)
    further = [name for name in ("dist_token", "reg_token") if name in tensors]
    position, token = tensors.get("pos_embed"), tensors.get("cls_token")
    arrays = [x for x in (position, token, *(tensors[name] for name in further)) if x is not None]
    # Anything else is reported as it stands.
    if position is None or any(x.ndim != 3 or x.shape[2] != arrays[0].shape[2] for x in arrays):
        return tensors
    first, count = int(token is not None), position.shape[1]
    if further:
        registers = np.concatenate([tensors.pop(name) for name in further], axis=1)
        rest = first + registers.shape[1]
        patch = tensors["patch_embed.proj.weight"].shape[-1]
        if _is_square(count - rest) and not _of_patches(count, rest, patch, image_size):
            registers = registers + position[:, first:rest]
            position = np.concatenate([position[:, :first], position[:, rest:]], axis=1)
        tensors["register_tokens"] = registers
    if first and _is_square(position.shape[1]):
        position = np.concatenate([np.zeros_like(token), position], axis=1)
    return {**tensors, "pos_embed": position}


def _of_patches(count: int, rest: int, patch: int, image_size: int | None) -> bool:
    """Whether `count` positions are all of patches, where they may be of `rest` tokens besides."""
    if not _is_square(count) or count - rest == 1:  # no image is one patch
        return _is_square(count)
    sizes = [patch * math.isqrt(patches) for patches in (count, count - rest)]
    if image_size not in sizes:
        raise ValueError(
            f"pos_embed has {count} positions: of patches alone in images of {sizes[0]} pixels, or "
            f"of {rest} other tokens too in images of {sizes[1]}; name the image size"
        )
    return image_size == sizes[0]


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _network(heads: Mapping[int, int], writer: str) -> Callable[[Tensors, Configs], Network]:
    """Makes `Layout.network`; `heads` are this writer's by width."""

    def network(tensors: Tensors, configs: Configs) -> Network:
        variants.check_vit(configs)
        gated = any(".mlp.w12." in name for name in tensors)
        options = shape_options(tensors, TIMM, gated)
        config = configs.get("config.json") or {}
        check_sizes(config, options)
        clip = "norm_pre.weight" in tensors  # timm's CLIP towers
        pooled = "attn_pool.latent" in tensors  # its SigLIP towers
        if clip and pooled and "robust_ssl" not in (configs.get("__metadata__") or {}):
            raise ValueError(
                "norm_pre beside attn_pool: a Perception Encoder, whose rotary positions leave no "
                "trace in its file; it is not read"
            )
        registers = tensors.get("register_tokens")
        options |= {
            "norm_after_pooling": "fc_norm.weight" in tensors,
            "registers": 0 if registers is None else registers.shape[1],
            "layer_scale": any(".ls1." in name for name in tensors),
            "norm_epsilon": 1e-5 if clip else 1e-6,
            "pre_norm": clip,
            "patch_bias": not clip,
        }
        told = _told(config, tensors) | mapping.named_options(
            configs, "heads", "pooling", "activation", "norm_epsilon"
        )
        if "heads" not in told:
            options["heads"] = _heads(options | told, gated, configs, heads)
        if "activation" not in told and not gated:
            options["activation"] = _activation(
                clip, pooled or variants.is_called(configs, "siglip")
            )
        options |= ({"activation": "swiglu"} if gated else {}) | told
        source = "timm" if "pretrained_cfg" in config else writer
        assumed = _assumed(options, told, source)
        if any(name.endswith("dist_token") for name in configs.get("names", ())):
            assumed += (_DISTILLED,)
        return Network("vision_transformer", options, assumed)

    return network


def _told(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """What the config beside the file, and names in the file, say of what shapes do not."""
    model = mapping.timm_arguments(config, _TOLD)
    told: dict[str, Any] = {"heads": 16} if config.get("architecture") == _GAP else {}
    for key in ("num_heads", "num_attention_heads"):
        if (value := model.get(key, config.get(key))) is not None:
            told["heads"] = value
    if "fc_norm.weight" in tensors:
        told["pooling"] = "mean"
    if "attn_pool.latent" in tensors:
        told["pooling"] = "attention"
    if pooling := mapping.timm_pooling(config, _POOLS):
        told["pooling"] = pooling
    if "pretrained_cfg" in config and "norm_pre.weight" in tensors:
        quick = "quickgelu" in str(config.get("architecture", ""))
        told["activation"] = "quick_gelu" if quick else "gelu"
    if "act_layer" in model:
        told["activation"] = model["act_layer"]
    return told


def _heads(options, gated: bool, configs: Configs, heads: Mapping[int, int]) -> int:
    """The published number for a width, where all writers of this layout have the same."""
    width, config = options["width"], configs.get("config.json") or {}
    if width == 768 and "architecture" not in config and _is_bare(options):
        raise ValueError(
            "the file does not say how many attention heads it has, and networks of 768 without a "
            f"class token differ: {_GAP} has 16, others 12; name heads, for example --heads 12"
        )
    if "pretrained_cfg" in config:
        heads = {**heads, **_TIMM_HEADS}
    elif width == _SMALL and width not in heads and _has_six_heads(options, configs):
        heads = {**heads, _SMALL: 6}
    if width == 768 and options["mlp_width"] == 3 * width:
        heads = {}  # timm's first vit_small: eight blocks, eight heads
    if width == 1536 and not gated:
        heads = {}  # SigLIP2's giant has 16, DINOv2's, which is gated, 24
    if width in heads:
        return heads[width]
    if width in (_SMALL, 192):
        raise ValueError(
            f"the file does not say how many attention heads it has, and writers differ at a width "
            f"of {width}: {width // 64} in DeiT, DINO and DINOv2, 12 in MoCo v3's small network "
            f"and in solo-learn's own; name heads, for example --heads {width // 64}"
        )
    raise ValueError(
        f"the file does not say how many attention heads it has, and {width} is no "
        f"published width ({sorted(heads)}): name heads, for example --heads 6"
    )


def _is_bare(options: Mapping[str, Any]) -> bool:
    """Whether a network takes the mean of patches and has nothing besides, as `_GAP` does."""
    further = options["class_token"] or options["registers"] or options["norm_after_pooling"]
    return not further and options["pooling"] != "attention"


def _has_six_heads(options: Mapping[str, Any], configs: Configs) -> bool:
    """Whether a small network is DeiT's, DINO's or DINOv2's rather than MoCo v3's."""
    # MoCo v3 has patches of 16 pixels and neither layer scale nor further tokens.
    if options["layer_scale"] or options["registers"] or options["patch_size"] != 16:
        return True
    file = pathlib.Path(configs.get("path") or "")
    texts = (file.name, (configs.get("checkpoint") or {}).get("arch", ""))
    dino_head = any(re.search(r"(^|\.)(head\.(mlp|last_layer)|dino_head)\.", name)
                    for name in configs.get("names", ()))  # fmt: skip
    named = any(map(_SIX_HEADS.search, texts)) and not any("moco" in text for text in texts)
    return dino_head or named


def _activation(clip: bool, pooled: bool) -> str:
    if pooled:
        raise ValueError(
            "a SigLIP tower (attn_pool, or by its name), and the file does not say which "
            "activation it has: name --activation gelu_tanh (the release's) or gelu"
        )
    if clip:
        raise ValueError(
            "norm_pre: a CLIP tower, and the file does not say which activation it has: name "
            "--activation quick_gelu (OpenAI's weights) or gelu"
        )
    return "gelu"


def _assumed(options: Mapping[str, Any], told: Mapping[str, Any], writer: str) -> tuple[str, ...]:
    """What is filled in, and the flag that names it."""
    pooled = _POOLED.get(options["pooling"])  # none of what is named and not known
    texts = {
        "heads": f"{options['heads']} attention heads, as {writer} has at a width of "
        f"{options['width']} (--heads)",
        "activation": f"{options['activation']} (--activation)",
        "norm_epsilon": f"{options['norm_epsilon']} under the root of a norm (--norm-epsilon)",
        "pooling": f"features are {pooled} (--pooling)",
    }
    return tuple(text for key, text in texts.items() if key not in told)


_DISTILLED = (
    "features are the class token alone, as in transformers' DeiT; timm takes the mean of it and "
    "of the distillation token"
)
_POOLS = {"avg": "mean", "token": "token", "map": "attention"}
_POOLED = {
    "token": "the class token", "mean": "the mean of the patches",
    "attention": "pooled by attention",
}  # fmt: skip


def _resizing(usual: str | None) -> Callable[[Set[str], Configs], str | None]:
    """Makes `Layout.resizing`; what the names tell of the writer goes over the usual."""

    def resizing(names: Set[str], configs: Configs) -> str | None:
        last = {name.rpartition(".")[2] for name in names}
        if "register_tokens" in last:
            return "antialias"  # DINOv2 with registers
        if "reg_token" in last or "pretrained_cfg" in (configs.get("config.json") or {}):
            return "antialias"  # timm
        dino = any(re.search(r"(^|\.)(head\.(mlp|last_layer)|dino_head)\.", x) for x in names)
        if usual is None and (dino or last & {"mask_token", "masked_embed"}):
            return "offset"  # DINO, iBOT, DINOv2
        return usual

    return resizing


def _rename(prefix: str, dropped: str = "nothing at all") -> Callable[[str], str | None]:
    """Takes a prefix off; drops what is not under it and what trainings have beside an encoder."""
    first, drop = re.compile(prefix), re.compile(dropped)

    def rename(name: str) -> str | None:
        start = first.match(name)
        own = name[start.end() :] if start else ""
        return None if not own or drop.match(own) or mapping.is_other_part(own) else own

    return rename


def _layout(
    name: str,
    source: str,
    matches: Callable,
    prefix: str,
    heads: Mapping[int, int],
    writer: str,
    resizing: str | None = None,
) -> Layout:
    network, rename = _network(heads, writer), _rename(prefix, r"head_dist\.")
    return Layout(
        name, source, matches, rename, network, TIMM.entries, _prepare, _resizing(resizing)
    )


_QKV = r"blocks\.0\.attn\.qkv\.weight"

# In the order in which they are tried: the barest names come after those with a prefix.
LAYOUTS: tuple[Layout, ...] = (
    _layout(
        "solo-learn-vit",
        "solo-learn checkpoints with a ViT",
        mapping.has(rf"(module\.)?backbone\.{_QKV}", r"(module\.)?classifier\..*"),
        r"^(module\.)?backbone\.",
        _SOLO_HEADS,
        "all of solo-learn's",
    ),
    _layout(
        "moco-vit",
        "MoCo v3 checkpoints with a ViT (base_encoder)",
        mapping.has(rf"(module\.)?base_encoder\.{_QKV}"),
        r"^(module\.)?base_encoder\.",
        _MOCO_HEADS,
        "MoCo v3",
    ),
    _layout(
        "dino",
        "the DINO release's full checkpoints (its teacher), with a ViT",
        mapping.has(rf"(teacher\.)?(module\.)?backbone\.{_QKV}", but=r"(module\.)?classifier\..*"),
        r"^(teacher\.)?(module\.)?backbone\.",
        _PUBLISHED,
        "DINO",
    ),
    _layout(
        "mae",
        "the MAE release's pre-training checkpoints; its fixed sines are positions",
        mapping.has(rf"(module\.)?{_QKV}", r"(module\.)?decoder_embed\.weight"),
        r"^(module\.)?",
        {width: heads for width, heads in _PUBLISHED.items() if width != 192},
        "MAE",
        "bicubic",
    ),
    _layout(
        "timm-vit",
        "timm's and DeiT's ViTs, the DINO, MAE and DINOv2 releases' bare encoders",
        mapping.has(
            rf"(module\.)?{_QKV}", but=r"(module\.)?(decoder_embed\.weight|blocks\.0\.attn\.q_bias)"
        ),
        r"^(module\.)?",
        _PUBLISHED,
        "DeiT",
    ),
)
