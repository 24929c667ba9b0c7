"""Names of vision transformers, without PyTorch: what they tell, and what is refused."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from robust_ssl import models
from robust_ssl.weights import mapping, resnet_layouts, vit_layouts

LAYOUTS = {layout.name: layout for layout in vit_layouts.LAYOUTS}
SMALL = {
    "width": 24, "heads": 2, "depth": 2, "patch_size": 4, "image_size": 12, "mlp_width": 40,
    "pooling": "token", "class_token": True,
}  # fmt: skip
CONFIG = {"num_attention_heads": 2, "num_hidden_layers": 2}
HEADS = {"options": {"heads": 2}}
CLIP = {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "norm_epsilon": 1e-5}
SIGLIP = {"class_token": False, "pooling": "attention", "activation": "gelu_tanh"}
DINOV3 = {
    "layer_scale": True, "registers": 3, "activation": "swiglu", "rotary": 100.0,
    "norm_epsilon": 1e-5,
}  # fmt: skip
NINE = {"image_size": 12, "patch_size": 4}
DINOV2 = {"layer_scale": True, "registers": 3, "activation": "swiglu"}
SIGLIP2 = {"model_type": "siglip2", "vision_config": CONFIG}
PERCEPTION = {"pre_norm": True, "pooling": "attention", "norm_epsilon": 1e-5}
SIGLIP_GAP = {"pretrained_cfg": {}, "architecture": "vit_base_patch32_siglip_gap_256"}


def config(**more):
    return {"config.json": {**CONFIG, **more}}


CASES = [  # layout, options of the network, what is said beside the file
    ("timm-vit", {}, HEADS),
    ("timm-vit", {"class_token": False, "pooling": "mean"}, HEADS),
    ("timm-vit", {"pooling": "mean", "norm_after_pooling": True}, HEADS),
    ("timm-vit", {"pooling": "mean"}, {"options": {"heads": 2, "pooling": "mean"}}),
    ("timm-vit", {"width": 192, "heads": 3}, {}),
    ("timm-vit", {}, {"config.json": {"model_args": {"num_heads": 2}}}),
    ("timm-vit", {"pooling": "mean"}, {**HEADS, "config.json": {"global_pool": "avg"}}),
    ("timm-vit", DINOV2, HEADS),
    ("timm-vit", CLIP, {"options": {"heads": 2, "activation": "quick_gelu"}}),
    ("mae", {}, HEADS),
    ("dino", {}, HEADS),
    ("solo-learn-vit", {}, HEADS),
    ("moco-vit", {}, HEADS),
    ("huggingface-vit", {"norm_epsilon": 1e-12}, config(model_type="vit")),
    ("huggingface-vit", {"norm_epsilon": 0.1}, config(layer_norm_eps=0.1, model_type="vit_mae")),
    ("huggingface-dinov2", {"layer_scale": True}, config(model_type="dinov2")),
    (
        "huggingface-dinov2",
        DINOV2,
        config(model_type="dinov2_with_registers", use_swiglu_ffn=True, num_register_tokens=3),
    ),
    ("huggingface-clip-vision", CLIP, config(hidden_act="quick_gelu")),
    (
        "huggingface-clip-vision",
        {**CLIP, "activation": "gelu"},
        {"config.json": {"model_type": "clip", "vision_config": {**CONFIG, "hidden_act": "gelu"}}},
    ),
    ("timm-vit", SIGLIP, {"options": {"heads": 2, "activation": "gelu_tanh"}}),
    ("open-clip-vision", CLIP, {"options": {"heads": 2, "activation": "quick_gelu"}}),
    ("torchvision-vit", {}, HEADS),
    ("huggingface-siglip-vision", SIGLIP, config(model_type="siglip_vision_model")),
    ("huggingface-dinov3", DINOV3, config(model_type="dinov3_vit", hidden_act="silu", **NINE)),
]
# How each layout's files call its names, and what else is in them.
WRAPPED = {
    "mae": ("", ["decoder_embed.weight", "mask_token"]),
    "dino": ("backbone.", ["head.mlp.0.weight"]),
    "solo-learn-vit": ("backbone.", ["classifier.weight", "momentum_backbone.cls_token"]),
    "moco-vit": (
        "module.base_encoder.",
        ["module.momentum_encoder.cls_token", "module.base_encoder.head.0.weight"],
    ),
    "huggingface-vit": ("vit.", ["classifier.bias"]),
    "huggingface-clip-vision": ("", ["logit_scale", "text_model.final_layer_norm.bias"]),
}


@functools.cache
def skeleton(**options):
    build = functools.partial(models.vision_transformer, **{**SMALL, **options})
    return jax.eval_shape(build, jax.random.key(0))


def foreign(layout, encoder):
    """Our variables, numbered through, and their foreign tensors."""
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    random = np.random.default_rng(0)
    arrays = {path: random.normal(size=x.shape).astype(np.float32) for path, x in flat.items()}
    return arrays, mapping.split(LAYOUTS[layout].entries(encoder), arrays)


@pytest.mark.parametrize("layout,options,beside", CASES)
def test_the_network_and_its_weights_come_back(layout, options, beside):
    encoder = skeleton(**options)
    arrays, tensors = foreign(layout, encoder)
    builder, rebuilt, _ = LAYOUTS[layout].network(tensors, beside)
    assert builder == "vision_transformer"
    assert skeleton(**rebuilt).module == encoder.module
    back = mapping.join(LAYOUTS[layout].entries(encoder), tensors, encoder_shapes(encoder), "it")
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)


def encoder_shapes(encoder):
    return traverse_util.flatten_dict(encoder.variables, sep="/")


@pytest.mark.parametrize("layout,options,beside", CASES)
def test_a_file_fits_one_layout_alone_and_loses_its_wrapping(layout, options, beside):
    _, tensors = foreign(layout, skeleton(**options))
    prefix, extra = WRAPPED.get(layout, ("", []))
    names = {prefix + name for name in tensors} | set(extra)
    every = (*resnet_layouts.LAYOUTS, *vit_layouts.LAYOUTS)
    assert [other.name for other in every if other.matches(names)] == [layout]
    renamed = {name: LAYOUTS[layout].rename(name) for name in names}
    assert {name for name in renamed.values() if name is not None} == tensors.keys()
    assert {name for name, new in renamed.items() if new is None} == set(extra)
    assert LAYOUTS[layout].rename(f"{prefix}something.else.weight") is not None  # not dropped


@pytest.mark.parametrize(
    "layout,new,old",
    [
        ("huggingface-vit", "layers.3.attention.q_proj.bias", "attention.attention.query.bias"),
        ("huggingface-vit", "vit.layers.3.attention.o_proj.bias", "attention.output.dense.bias"),
        ("huggingface-vit", "layers.3.mlp.fc1.weight", "intermediate.dense.weight"),
        ("huggingface-vit", "layers.3.mlp.fc2.weight", "output.dense.weight"),
        ("huggingface-dinov2", "dinov2.encoder.layer.3.mlp.fc1.bias", "mlp.fc1.bias"),
        (
            "huggingface-dinov2",
            "encoder.layer.3.attention.v_proj.bias",
            "attention.attention.value.bias",
        ),
    ],
)
def test_the_names_of_transformers_5(layout, new, old):
    assert LAYOUTS[layout].rename(new) == f"encoder.layer.3.{old}"


def test_what_is_lost_is_missing_and_not_an_option():
    for layout, options, beside in CASES:
        encoder = skeleton(**options)
        _, tensors = foreign(layout, encoder)
        for lost in tensors:
            rest = {name: x for name, x in tensors.items() if name != lost}
            if lost.endswith(("register_tokens", "attn_pool.latent")):
                continue  # nothing else in a file tells that there were any
            # fc_norm and norm_pre tell by their names what they are: the bias is left over then
            message = f"missing {lost}|unexpected {lost.removesuffix('weight')}bias"
            with pytest.raises(ValueError, match=message):
                _, rebuilt, _ = LAYOUTS[layout].network(rest, beside)
                network = skeleton(**rebuilt)
                entries, shapes = LAYOUTS[layout].entries(network), encoder_shapes(network)
                mapping.join(entries, rest, shapes, "it")


ASKED = {"options": {"image_size": 24}}
REFUSED = [
    ("timm-vit", {}, {}, {}, "how many attention heads it has, and 24 is no published width"),
    ("timm-vit", CLIP, HEADS, {}, "name --activation quick_gelu"),
    ("timm-vit", {}, HEADS, {"pos_embed": (1, 12, 24)}, r"\(1, 12, 24\), which is not positions"),
    ("timm-vit", {}, HEADS, {"patch_embed.proj.weight": (4, 4, 3, 24)}, "axes transposed"),
    ("timm-vit", PERCEPTION, HEADS, {}, "a Perception Encoder, whose rotary positions"),
    ("timm-vit", {}, {**HEADS, "path": "pe_core_base.pth"}, {}, "rotary positions besides"),
    ("timm-vit", {}, {**HEADS, "config.json": SIGLIP_GAP}, {}, "--activation gelu_tanh"),
    (
        "huggingface-siglip-vision",
        SIGLIP,
        {**config(num_patches=9), **ASKED},
        {},
        "of 12 pixels only",
    ),
    (
        "huggingface-siglip-vision",
        SIGLIP,
        {"config.json": SIGLIP2, **ASKED},
        {},
        "of 12 pixels only",
    ),
    ("huggingface-vit", {}, {}, {}, "no config.json.*how many attention heads"),
    ("huggingface-vit", {}, config(model_type="deit"), {}, "model_type is 'deit'"),
    ("huggingface-vit", {}, config(qkv_bias=False), {}, "qkv_bias is False"),
    ("huggingface-vit", {}, config(num_channels=1), {}, "num_channels is 1"),
    ("huggingface-vit", {}, config(hidden_act="relu"), {}, "hidden_act is 'relu'"),
]


@pytest.mark.parametrize("layout,options,beside,changed,message", REFUSED)
def test_what_cannot_be_computed_is_refused(layout, options, beside, changed, message):
    _, tensors = foreign(layout, skeleton(**options))
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout].network(tensors, beside)


def test_siglip2_takes_the_size_of_its_positions_and_the_first_version_others():
    _, tensors = foreign("huggingface-siglip-vision", skeleton(**SIGLIP))
    network = LAYOUTS["huggingface-siglip-vision"].network
    same = {"config.json": SIGLIP2, "options": {"image_size": 12}}
    first = {**config(model_type="siglip_vision_model"), **ASKED}
    assert [network(tensors, beside)[1]["image_size"] for beside in (same, first)] == [12, 12]


def test_a_wild_block_number_builds_no_giant():
    _, tensors = foreign("timm-vit", skeleton())
    tensors["blocks.999999999.norm1.weight"] = np.zeros(24, np.float32)
    assert LAYOUTS["timm-vit"].network(tensors, HEADS)[1]["depth"] <= len(tensors) + 1
