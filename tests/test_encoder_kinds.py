"""Kinds of foreign files: what weights do not tell, what stands beside them, what wraps them."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from torch_bytes import called, group, number, pickled, table, tensor, text, zipped

from robust_ssl import models, weights
from robust_ssl.models.positions import _weights as axis_weights
from robust_ssl.models.positions import resize_positions
from robust_ssl.weights import adjustments, convert, mapping, normalization, selection, variants
from robust_ssl.weights.files import read_weights

FACTS = {"normalization": "none", "image_size": 32}
LAYOUTS = {layout.name: layout for layout in convert.LAYOUTS}


def random_encoder(builder, **options):
    shapes = jax.eval_shape(lambda key: builder(key, **options), jax.random.key(0))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: draw.uniform(0.5, 1, s.shape).astype(np.float32), shapes)


def tensors_of(encoder, layout):
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    return mapping.split(LAYOUTS[layout].entries(encoder), flat)


RESNET = random_encoder(models.resnet18, width=2, stem="imagenet", image_size=32)
PLAIN = tensors_of(RESNET, "torchvision-resnet")
SIZES = {"depth": 1, "patch_size": 16, "image_size": 32}
TINY = random_encoder(models.vision_transformer, width=192, heads=3, **SIZES)
VIT = tensors_of(TINY, "timm-vit")


def vit(width, patch=16, **more):
    """Tensors of one block, by their shapes alone."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.norm1.weight": (width,),
        "blocks.0.mlp.fc1.weight": (4 * width, width), **more,
    }  # fmt: skip
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def under(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def write(folder, tensors, name="file.safetensors", **configs):
    save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / name)
    for key, config in configs.items():
        (folder / f"{key}.json").write_text(json.dumps(config))
    return folder / name


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def empty(*names, shape=(2,)):
    return {name: np.zeros(shape, np.float32) for name in names}


# --- heads ---------------------------------------------------------------------------------------

LS = {"blocks.0.ls1.gamma": (384,)}
REGISTERS = {"register_tokens": (1, 4, 384)}
GAP, SIGLIP_GAP = (
    {"config.json": {"pretrained_cfg": {}, "architecture": f"vit_base_patch16_{kind}_224"}}
    for kind in ("gap", "siglip_gap")
)
GELU = {"options": {"activation": "gelu"}}


def bare(**more):
    """Of patches alone: no class token, and no position of one."""
    tensors = vit(768, pos_embed=(1, 4, 768), **more)
    return {name: x for name, x in tensors.items() if name != "cls_token"}


@pytest.mark.parametrize(
    ("layout", "tensors", "beside", "heads"),
    [
        ("moco-vit", vit(384), {}, 12),
        ("moco-vit", vit(768), {}, 12),
        ("timm-vit", vit(192), {}, 3),
        ("timm-vit", vit(768), {}, 12),
        ("timm-vit", vit(384), {}, None),  # DeiT's 6 or MoCo v3's 12
        ("timm-vit", vit(384), {"path": "deit_small_patch16_224-cd65a155.pth"}, 6),
        ("timm-vit", vit(384), {"path": "dino_deitsmall16_pretrain.pth"}, 6),
        ("timm-vit", vit(384), {"path": "mocov3_vit_small_patch16.pth"}, None),
        ("timm-vit", vit(384, patch=8), {}, 6),
        ("timm-vit", vit(384, **LS), {}, 6),
        ("timm-vit", vit(384, patch=14, **LS, **REGISTERS), {}, 6),
        ("timm-vit", vit(384), {"config.json": {"pretrained_cfg": {}}}, 6),
        ("timm-vit", vit(512), {"config.json": {"pretrained_cfg": {}}}, 8),
        ("timm-vit", vit(512), {}, None),
        ("timm-vit", vit(1536), {}, None),  # SigLIP2's 16 or, gated, DINOv2's 24
        ("timm-vit", vit(384), {"config.json": {"num_heads": 4}}, 4),
        ("timm-vit", vit(768, **{"blocks.0.mlp.fc1.weight": (2304, 768)}), {}, None),
        ("timm-vit", bare(), {}, None),  # 12 or, in one of timm's, 16
        ("timm-vit", bare(), GAP, 16),
        ("timm-vit", bare(), {**SIGLIP_GAP, **GELU}, 12),
        ("timm-vit", bare(**{"fc_norm.weight": (768,)}), {}, 12),
        ("timm-vit", bare(register_tokens=(1, 4, 768)), {}, 12),
        ("timm-vit", bare(**{"attn_pool.latent": (1, 1, 768)}), GELU, 12),
        ("dino", vit(384), {}, None),  # anybody's backbone
        ("dino", vit(384), {"names": {"head.last_layer.weight_g"}}, 6),
        ("mae", vit(384), {}, None),
        ("solo-learn-vit", vit(192), {}, None),
        ("solo-learn-vit", vit(384), {}, None),
        ("solo-learn-vit", vit(768), {}, 12),
    ],
)
def test_heads_are_the_writers_or_asked_for(layout, tensors, beside, heads):
    if heads is None:
        with pytest.raises(ValueError, match=r"attention heads.*name heads"):
            LAYOUTS[layout].network(tensors, beside)
        assert (
            LAYOUTS[layout].network(tensors, {**beside, "options": {"heads": 8}})[1]["heads"] == 8
        )
        return
    _, options, assumed = LAYOUTS[layout].network(tensors, beside)
    assert options["heads"] == heads
    said = any(f"{heads} attention heads" in text for text in assumed)
    assert said == (beside is not GAP and "num_heads" not in beside.get("config.json", {}))


def test_what_is_assumed_is_noted_until_it_is_named(tmp_path):
    file = write(tmp_path, VIT)
    notes = " ".join(weights.inspect_file(file, **FACTS).notes)
    for flag in ("--heads", "--pooling", "--norm-epsilon", "--activation"):
        assert flag in notes
    named = {"heads": 3, "pooling": "token", "norm_epsilon": 1e-6, "activation": "gelu"}
    assert "assumed" not in " ".join(weights.inspect_file(file, **FACTS, **named).notes)
    file = write(tmp_path, PLAIN)
    assert "no blur" in " ".join(weights.inspect_file(file, **FACTS).notes)
    assert not weights.inspect_file(file, **FACTS, variant="plain").notes
    own = weights.export_safetensors(RESNET, tmp_path / "own.safetensors")
    assert not weights.inspect_file(own).notes  # its header tells


# --- variants of a ResNet ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["resnetblur50-84f4748f.pth", "resnetaa50_a1h.pth", "resnet50_msra.pth", "resnet50-caffe.pth",
     "resnet101_os8.pth", "detectron2_r50.pth", "resnet50_lpf4.pth", "resnet18_aa.pth",
     "r50-bgr.pth", "resnet50d.pth", "fcn_resnet50_coco-1167a1af.pth", "detr-r50-dc5-f0fb7ef5.pth",
     "pspnet_r50.pth"],
)  # fmt: skip
def test_a_name_that_speaks_of_a_variant_is_refused(name):
    with pytest.raises(ValueError, match="--variant plain"):
        variants.check({"path": name})
    variants.check({"path": name, "options": {"variant": "plain"}})


@pytest.mark.parametrize(
    "name",
    ["resnet50-0676ba61.pth", "moco_v2_800ep_pretrain.pth.tar", "resnet50_a1h.pth", "simclr_v1.pth",
     "swav_800ep_pretrain.pth.tar", "aardvark.pth", "resnet50.tv_in1k", "blurred_views_byol.pth",
     "fcos_resnet50_fpn_coco-99b0c9b7.pth", "resnet50_fc.pth", "fcnet_probe.pth",
     "resnet50-0dc5a1b2.pth", "resnet50-3dc57e11.pth", "resnet50-1e2dc504.pth"],
)  # fmt: skip
def test_other_names_are_not(name):
    variants.check({"path": name})


@pytest.mark.parametrize(
    "beside",
    [
        {"checkpoint": {"arch": "resnetblur50"}},
        {"config.json": {"architecture": "resnetaa50", "pretrained_cfg": {}}},
        {"config.json": {"style": "caffe"}},
        {"config.json": {"backbone": {"type": "ResNet", "strides": [1, 2, 1, 1]}}},
        {"config.json": {"model_args": {"aa_layer": "blurpool"}}},
        {"config.json": {"output_stride": 8}},
        {"path": "timm/resnetaa50.a1h_in1k/model.safetensors"},
    ],
)
def test_what_stands_beside_speaks_of_variants_too(beside):
    with pytest.raises(ValueError, match=r"variant|plain ResNet"):
        variants.check(beside)


@pytest.mark.parametrize("part", ["classifier.4.weight", "aux_classifier.4.weight"])
def test_a_network_of_segmentation_is_refused_by_its_other_parts(part, tmp_path):
    tensors = under("backbone.", PLAIN)
    file = write(tmp_path, {**tensors, **empty(part, shape=(3, 4, 1, 1))})
    with pytest.raises(ValueError, match=rf"{part} is a convolution .* --variant plain"):
        weights.import_encoder(file, **FACTS)
    assert_same(weights.import_encoder(file, **FACTS, variant="plain"), RESNET)
    file = write(tmp_path, {**tensors, **empty("classifier.1.weight", shape=(3, 4))})
    assert_same(weights.import_encoder(file, **FACTS), RESNET)  # of images


def test_a_vit_that_norms_elsewhere_is_refused():
    beside = {"path": "vit_base_patch16_rpn_224-00e3b3b4.pth"}
    with pytest.raises(ValueError, match="--variant plain"):
        LAYOUTS["timm-vit"].network(vit(768), beside)
    LAYOUTS["timm-vit"].network(vit(768), {"path": "trpnet.pth"})


def test_timms_own_config_of_a_plain_network_is_taken():
    config = {"architecture": "resnet18", "pretrained_cfg": {}, "global_pool": "avg"}
    arguments = {"num_classes": 10, "in_chans": 3, "global_pool": "avg"}
    variants.check({"config.json": {**config, "model_args": arguments}})
    with pytest.raises(ValueError, match="global_pool"):
        variants.check({"config.json": {**config, "model_args": {"global_pool": "max"}}})


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("resizing", models.RESIZINGS)
@pytest.mark.parametrize("sizes", [(7, 4), (4, 7), (37, 16), (14, 14)])
def test_constant_positions_stay_constant(resizing, sizes):
    rows = axis_weights(*sizes, resizing)
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, atol=1e-12)
    if sizes[0] == sizes[1] and resizing != "offset":
        np.testing.assert_allclose(rows, np.eye(sizes[0]), atol=1e-12)


def test_aligned_corners_keep_the_corners():
    rows = axis_weights(5, 9, "corners")
    np.testing.assert_allclose(rows[[0, 4, 8]] @ np.arange(5.0), [0, 2, 4], atol=1e-12)


def test_antialiasing_takes_all_positions_into_account():
    # Four times fewer: without smoothing most positions have no weight at all.
    assert (np.abs(axis_weights(16, 4, "antialias")).sum(axis=0) > 0).all()
    assert not (np.abs(axis_weights(64, 4, "bicubic")).sum(axis=0) > 0).all()


@pytest.mark.parametrize(
    ("layout", "names", "beside", "wanted"),
    [
        ("timm-vit", {"register_tokens"}, {}, "antialias"),
        ("timm-vit", {"mask_token"}, {}, "offset"),
        ("timm-vit", {"masked_embed"}, {}, "offset"),
        ("timm-vit", {"reg_token"}, {}, "antialias"),
        ("timm-vit", {"pos_embed"}, {"config.json": {"pretrained_cfg": {}}}, "antialias"),
        ("timm-vit", {"pos_embed"}, {}, None),
        ("mae", {"mask_token"}, {}, "bicubic"),
        ("dino", {"head.last_layer.weight_g"}, {}, "offset"),
        ("dino", {"backbone.pos_embed"}, {}, None),
        ("moco-vit", {"pos_embed"}, {}, None),
        ("huggingface-vit", {"embeddings.position_embeddings"}, {}, "bicubic"),
        ("huggingface-dinov2", {"embeddings.register_tokens"}, {}, "antialias"),
    ],
)
def test_each_writer_resizes_in_its_own_way(layout, names, beside, wanted):
    assert LAYOUTS[layout].resizing(names, beside) == wanted


def test_resizing_is_the_writers_says_how_and_can_be_named(tmp_path):
    file = write(tmp_path, {**VIT, **empty("mask_token")})
    asked = {**FACTS, "image_size": 48}
    encoder = weights.import_encoder(file, **asked)
    assert_same(encoder, resize_positions(TINY, 48, "offset"))
    assert "offset (the DINO" in " ".join(weights.inspect_file(file, **asked).notes)
    encoder = weights.import_encoder(file, **asked, position_resizing="corners")
    assert_same(encoder, resize_positions(TINY, 48, "corners"))
    with pytest.raises(ValueError, match="no resizing 'cubic'; there are bicubic"):
        weights.import_encoder(file, **asked, position_resizing="cubic")


def test_positions_of_patches_only_and_of_further_tokens_become_one_form():
    draw = np.random.default_rng(0)
    token, further, grid = (draw.normal(size=(1, n, 8)).astype(np.float32) for n in (1, 2, 4))
    patch = np.zeros((8, 3, 4, 4), np.float32)

    def prepare(tensors, size=None):
        whole = LAYOUTS["timm-vit"].prepare({**tensors, "patch_embed.proj.weight": patch}, size)
        return {name: x for name, x in whole.items() if name in {*tensors, "register_tokens"}}

    patches_only = prepare({"cls_token": token, "pos_embed": grid})
    np.testing.assert_array_equal(patches_only["pos_embed"][:, 0], 0)
    np.testing.assert_array_equal(patches_only["pos_embed"][:, 1:], grid)
    # timm's reg4: registers, positions for patches only
    registers = prepare({"cls_token": token, "reg_token": further, "pos_embed": grid})
    np.testing.assert_array_equal(registers["register_tokens"], further)
    assert registers["pos_embed"].shape == (1, 5, 8)
    # distilled DeiT: every token has one
    whole = np.concatenate([token, further[:, :1], grid], axis=1)
    distilled = prepare({"cls_token": token, "dist_token": further[:, 1:], "pos_embed": whole})
    np.testing.assert_array_equal(distilled["register_tokens"], further[:, 1:] + further[:, :1])
    np.testing.assert_array_equal(distilled["pos_embed"], np.concatenate([token, grid], axis=1))
    usual = {"cls_token": token, "pos_embed": np.concatenate([token, grid], axis=1)}
    assert prepare(usual).keys() == usual.keys()
    for name, x in prepare(usual).items():
        np.testing.assert_array_equal(x, usual[name])


@pytest.mark.parametrize("first", [0, 1])
def test_positions_that_may_be_of_registers_too_need_the_image_size(first):
    draw = np.random.default_rng(0)
    further = draw.normal(size=(1, 9 - first, 8)).astype(np.float32)
    position = draw.normal(size=(1, 25, 8)).astype(np.float32)  # 5 x 5, or 4 x 4 and 9 tokens
    tensors = {"reg_token": further, "pos_embed": position}
    tensors |= {"cls_token": further[:, :1]} if first else {}
    tensors["patch_embed.proj.weight"] = np.zeros((8, 3, 8, 8), np.float32)
    prepare = LAYOUTS["timm-vit"].prepare
    alone, too = prepare(tensors, 40), prepare(tensors, 32)
    np.testing.assert_array_equal(alone["pos_embed"][:, first:], position)
    np.testing.assert_array_equal(alone["register_tokens"], further)
    assert too["pos_embed"].shape == (1, 16 + first, 8)
    np.testing.assert_array_equal(too["register_tokens"], further + position[:, first:9])
    for unknown in (None, 48):
        with pytest.raises(ValueError, match=r"images of 40 pixels, or of 9 other .* of 32; name"):
            prepare(tensors, unknown)


def test_what_features_a_distilled_deit_has_is_said():
    assumed = LAYOUTS["timm-vit"].network(vit(192), {"names": {"dist_token"}})[2]
    assert any("distillation token" in text for text in assumed)


# --- open_clip's own file ------------------------------------------------------------------------


def tower(folder, tensors, architecture, pool="", **beside):
    """A folder as open_clip writes it, with a tower of timm's."""
    vision = {"timm_model_name": architecture, "timm_pool": pool, "timm_proj": "linear"}
    config = {"model_cfg": {"vision_cfg": vision}}
    trunk = under("visual.trunk.", tensors)
    write(folder, trunk, "open_clip_model.safetensors", open_clip_config=config, **beside)
    return folder


def test_architecture_and_pooling_of_open_clips_timm_tower_are_read(tmp_path):
    for pool, pooling in (("avg", "mean"), ("token", "token"), ("", "token"), (None, "token")):
        # Of another form of the same weights, for transformers.
        folder = tower(tmp_path, VIT, "vit_tiny_patch16_224", pool, config={"model_type": "clip"})
        found = weights.inspect_file(folder, **FACTS)
        assert not found.problems and found.options["pooling"] == pooling
        assert ("features are" in str(found.notes)) == (not pool)
    encoder = weights.import_encoder(folder, **{**FACTS, "image_size": 48})
    assert_same(encoder, resize_positions(TINY, 48, "antialias"))
    clip = random_encoder(
        models.vision_transformer, width=192, heads=3, **SIZES, pre_norm=True, patch_bias=False
    )
    tensors = tensors_of(clip, "timm-vit")
    for name, activation in (("clip", "gelu"), ("clip_quickgelu", "quick_gelu")):
        found = weights.inspect_file(tower(tmp_path, tensors, f"vit_x_{name}_224"), **FACTS)
        assert found.options["activation"] == activation
    eva = random_encoder(
        models.vision_transformer, width=192, heads=3, **SIZES, mlp_width=8, activation="swiglu",
        rotary=1e4, rotary_reference=16,
    )  # fmt: skip
    folder = tower(tmp_path, tensors_of(eva, "timm-eva02"), "eva02_tiny_patch14_224", "avg")
    assert weights.inspect_file(folder, **FACTS).options["pooling"] == "mean"
    convnext = tensors_of(random_encoder(models.convnext, **CONVNEXT), "timm-convnext")
    found = weights.inspect_file(tower(tmp_path, convnext, "convnext_xxlarge.tag"), **FACTS)
    assert (found.options["norm_epsilon"], found.options["inner_epsilon"]) == (1e-5, 1e-5)
    assert "assumed" not in str(found.notes)


@pytest.mark.parametrize(
    ("kind", "architecture", "pool", "message"),
    [
        ("vit", "vit_tiny_patch16_rpn_224", "", "norms after its branches"),
        ("vit", "vit_pe_core_tiny_patch16_384", "map", "rotary positions besides"),
        ("vit", "vit_base_patch16_siglip_gap_224", "avg", "--activation gelu_tanh"),
        (
            "vit",
            "vit_tiny_patch16_224",
            "rot_attn",
            "timm_pool.* is 'rot_attn'; known here: avg, token",
        ),
        ("convnext", "convnext_tiny", "rot_attn", "timm_pool.* is 'rot_attn'; known here: avg"),
        (
            "swin",
            "swin_tiny_patch4_window7_224",
            "token",
            "timm_pool.* is 'token'; known here: avg",
        ),
        ("resnet", "resnet18d", "avg", "'resnet18d'"),
    ],
)
def test_what_open_clips_timm_tower_is_besides_is_refused(
    kind, architecture, pool, message, tmp_path
):
    tensors = {
        "vit": lambda: VIT,
        "resnet": lambda: PLAIN,
        "convnext": lambda: tensors_of(
            random_encoder(models.convnext, **CONVNEXT), "timm-convnext"
        ),
        "swin": lambda: tensors_of(random_encoder(models.swin_transformer, **SWIN), "timm-swin"),
    }[kind]()
    with pytest.raises(ValueError, match=message):
        weights.import_encoder(tower(tmp_path, tensors, architecture, pool), **FACTS)


def test_arguments_of_open_clips_layers_are_read_or_refused():
    encoder = random_encoder(
        models.vision_transformer, width=192, heads=3, **SIZES, pre_norm=True, patch_bias=False
    )
    tensors = tensors_of(encoder, "open-clip-vision")

    def options(quick=False, **layers):
        model = {"vision_cfg": {"width": 192, "patch_size": 16, **layers}, "quick_gelu": quick}
        beside = {"open_clip_config.json": {"model_cfg": model}}
        return LAYOUTS["open-clip-vision"].network(tensors, beside)[1]

    told = options(norm_kwargs={"eps": 1e-3}, act_kwargs={"approximate": "tanh"})
    assert (told["norm_epsilon"], told["activation"]) == (1e-3, "gelu_tanh")
    told = options(norm_kwargs=None, act_kwargs=None)
    assert (told["norm_epsilon"], told["activation"]) == (1e-5, "gelu")
    for wrong in (
        {"act_kwargs": {"inplace": True}}, {"act_kwargs": {"approximate": "sigmoid"}},
        {"act_kwargs": {"approximate": "tanh"}, "quick": True},
        {"norm_kwargs": {"eps": 1e-5, "elementwise_affine": False}},
        {"norm_kwargs": {"eps": "small"}}, {"norm_kwargs": {"eps": -1}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"open_clip_config\.json: {next(iter(wrong))} is"):
            options(**wrong)


# --- what stands beside --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": [16, 64]},
        {"img_size": [16, 64]},
        {"model_args": {"img_size": [16, 64]}},
        {"pretrained_cfg": {"input_size": [3, 16, 64]}},
        {"patch_size": [16, 8]},
        {"image_size": 224},
        {"patch_size": 14},
        {"global_pool": "avgmax"},
        {"pretrained_cfg": {}, "model_args": {"qk_norm": True}},
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(config):
    with pytest.raises(ValueError, match=r"config\.json"):
        LAYOUTS["timm-vit"].network(vit(192), {"config.json": config})


@pytest.mark.parametrize(
    ("configs", "wanted"),
    [
        ({"preprocessor_config.json": {"do_flip_channel_order": True}}, "bgr"),
        ({"preprocessor_config.json": {"do_flip_channel_order": False}}, None),
        ({"config.json": {"pretrained_cfg": {"input_space": "BGR"}}}, "bgr"),
        ({"config.json": {"data_preprocessor": {"to_rgb": False}}}, "bgr"),
        ({"config.json": {"color_format": "rgb"}}, "rgb"),
        ({"processor_config.json": {"image_processor": {"channel_order": "bgr"}}}, "bgr"),
        ({}, None),
    ],
)
def test_the_order_of_colors_is_read(configs, wanted):
    assert normalization.channels(configs) == wanted


@pytest.mark.parametrize(
    "encoder", [TINY, random_encoder(models.resnet18, width=2, stem="cifar", image_size=8)]
)
def test_turned_kernels_take_the_other_order(encoder):
    images = np.random.default_rng(0).random((1, *2 * (encoder.image_size,), 3)).astype(np.float32)
    plain = encoder.replace(mean=(0.0,) * 3, std=(1.0,) * 3)
    turned = adjustments.reverse_channels(plain)
    ours, theirs = plain(images).features, turned(images[..., ::-1]).features
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blue_first_is_noted_and_can_be_named(tmp_path):
    file = write(tmp_path, PLAIN)
    notes = weights.inspect_file(file, **FACTS, channels="bgr").notes
    assert any("blue first" in note for note in notes)
    encoder = weights.import_encoder(file, **FACTS, channels="bgr")
    assert_same(encoder, adjustments.reverse_channels(RESNET))
    with pytest.raises(ValueError, match="'grb': there are rgb, bgr"):
        weights.import_encoder(file, **FACTS, channels="grb")


TIMM_CONFIG = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 224, 224]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SHORTER = {"mode": "shorter", "resize": 256, "crop": 224}


@pytest.mark.parametrize(
    ("configs", "size", "transform"),
    [
        (
            {"config.json": {"pretrained_cfg": {
                **TIMM_CONFIG, "crop_pct": 0.875, "interpolation": "bicubic"}}},
            224, {"crop_pct": 0.875, "interpolation": "bicubic", **SHORTER, "offset": "nearest"},
        ),
        (
            {"preprocessor_config.json": {
                **HALF, "size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3}},
            224, {"interpolation": "bicubic", **SHORTER, "offset": "down"},
        ),
        (
            {"preprocessor_config.json": {
                **HALF, "size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 2}},
            224,
            {"interpolation": "bilinear", "crop_pct": 0.875, **SHORTER, "offset": "down"},
        ),
        ({"preprocessor_config.json": {**HALF, "size": 32}}, 32, {}),
        (
            {"open_clip_config.json": {
                "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
                "model_cfg": {"vision_cfg": {"image_size": 224}}}},
            224, {"interpolation": "bicubic", **SHORTER, "resize": 224, "offset": "nearest"},
        ),
    ],
)  # fmt: skip
def test_how_an_image_got_its_size_is_kept(configs, size, transform):
    images = normalization.read(configs)
    assert images.mean == (0.5,) * 3 and images.image_size == size
    assert images.transform == transform
    named = normalization.choose(configs, normalization="imagenet")
    assert named.transform == transform and named.image_size == size


def test_colors_and_means_are_turned_together():
    record = {**HALF, "image_mean": [0.1, 0.2, 0.3], "do_flip_channel_order": True, "size": 8}
    assert normalization.read({"preprocessor_config.json": record}).mean == (0.3, 0.2, 0.1)


@pytest.mark.parametrize("record", [{**HALF, "rescale_offset": True}, {**HALF, "crop_pct": "x",
                                    "size": {"shortest_edge": 224}}])  # fmt: skip
def test_a_transform_we_cannot_follow_is_refused(record):
    with pytest.raises(ValueError, match=r"rescale_offset|crop_pct"):
        normalization.read({"preprocessor_config.json": record})


def test_absurd_numbers_beside_the_weights_are_problems(tmp_path):
    options = {**SIZES, "width": 8, "heads": 2, "registers": 1, "layer_scale": True, "rotary": 1e2}
    encoder = random_encoder(models.vision_transformer, **options)
    tensors = tensors_of(encoder, "huggingface-dinov3")
    known = {"patch_size": 16, "num_attention_heads": 2}
    for config, message in (
        ({"image_size": 10**9}, "at most 4096 is built"),
        ({"image_size": [16, 32]}, "no square"),
        ({"image_size": "x"}, "x"),
        ({"rope_theta": "x"}, "rope_theta|float"),
        ({"num_attention_heads": 0}, "heads"),
    ):
        file = write(tmp_path, tensors, "model.safetensors", config={**known, **config})
        with pytest.raises(ValueError, match=message):
            weights.import_encoder(file, normalization="half")


CONVNEXT = {"depths": (2, 1), "widths": (4, 8), "patch_size": 2, "image_size": 8}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    "layout", [layout.name for layout in convert.LAYOUTS if "convnext" in layout.name]
)
def test_every_convnext_comes_back(layout, second):
    if second and layout in ("torchvision-convnext", "huggingface-dinov3-convnext"):
        return  # these have the first version only
    encoder = random_encoder(
        models.convnext, **CONVNEXT, layer_scale=not second, response_norm=second
    )
    tensors = tensors_of(encoder, layout)
    matching = [other.name for other in convert.LAYOUTS if other.matches(tensors.keys())]
    assert matching == [layout]
    _, options, _ = LAYOUTS[layout].network(tensors, {"config.json": {}})
    assert {key: options[key] for key in ("depths", "widths", "patch_size")} == {
        key: value for key, value in CONVNEXT.items() if key != "image_size"
    }
    assert (options["layer_scale"], options["response_norm"]) == (not second, second)
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    back = mapping.join(LAYOUTS[layout].entries(encoder), tensors, flat, "it")
    for path, leaf in flat.items():
        np.testing.assert_array_equal(back[path], leaf)


def test_timms_clip_convnext_has_another_epsilon_by_its_name():
    encoder = random_encoder(models.convnext, **CONVNEXT, layer_scale=True, response_norm=False)
    tensors = tensors_of(encoder, "timm-convnext")
    for name, epsilon in (("convnext_xxlarge", 1e-5), ("convnext_base", 1e-6)):
        told = {"config.json": {"pretrained_cfg": {}, "architecture": name}}
        options = LAYOUTS["timm-convnext"].network(tensors, told)[1]
        assert (options["norm_epsilon"], options.get("inner_epsilon", 1e-6)) == (epsilon, epsilon)


def test_a_convnexts_epsilon_is_of_all_norms_where_its_writers_have_one(tmp_path):
    encoder = random_encoder(models.convnext, **CONVNEXT)
    file = write(tmp_path, tensors_of(encoder, "timm-convnext"))
    assert "every norm (--norm-epsilon)" in str(weights.inspect_file(file, **FACTS).notes)
    named = weights.import_encoder(file, **FACTS, norm_epsilon=1e-3).module
    assert (named.norm_epsilon, named.inner_epsilon) == (1e-3, 1e-3)
    # Of Hugging Face's the last norm alone has another one, which our own header keeps.
    apart = random_encoder(models.convnext, **CONVNEXT, norm_epsilon=1e-12)
    back = weights.import_encoder(weights.export_safetensors(apart, tmp_path / "own.safetensors"))
    assert back.module == apart.module


def test_clips_resnet_comes_back_and_what_is_missing_is_named(tmp_path):
    options = {"depths": (1, 1, 1, 1), "width": 2, "heads": 2, "dim": 5, "image_size": 32}
    encoder = random_encoder(models.clip_resnet, **options)
    tensors = tensors_of(encoder, "open-clip-resnet")
    matching = [other.name for other in convert.LAYOUTS if other.matches(tensors.keys())]
    assert matching == ["open-clip-resnet"]
    file = write(tmp_path, under("visual.", tensors))
    assert_same(weights.import_encoder(file, normalization="clip", heads=2), encoder)
    with pytest.raises(ValueError, match=r"2 is no published width .*--heads 1"):
        weights.import_encoder(file, normalization="clip")
    with pytest.raises(ValueError, match="only a ViT has positions"):
        weights.import_encoder(file, normalization="clip", heads=2, image_size=64)
    turned = weights.import_encoder(file, normalization="clip", heads=2, channels="bgr")
    kernel = encoder.variables["params"]["stem"]["conv1"]["conv"]["kernel"]
    ours = turned.variables["params"]["stem"]["conv1"]["conv"]["kernel"]
    np.testing.assert_array_equal(ours, kernel[:, :, ::-1])
    folder = weights.save_encoder(encoder, tmp_path / "ours")
    assert weights.load_encoder(folder).module == encoder.module
    del tensors["bn3.weight"]
    with pytest.raises(ValueError, match=r"missing bn3\.weight"):
        weights.import_encoder(write(tmp_path, tensors), normalization="clip", heads=2)


def packed(tensors):
    """EVA-02's tensors as the smaller ones have them."""
    names = dict(tensors)
    for letter in "qv":
        names[f"blocks.0.attn.{letter}_bias"] = names.pop(f"blocks.0.attn.{letter}_proj.bias")
    for whole, parts in (
        ("attn.qkv.weight", "attn.{}_proj.weight"), ("mlp.fc1.weight", "mlp.fc1_{}.weight"),
        ("mlp.fc1.bias", "mlp.fc1_{}.bias"),
    ):  # fmt: skip
        letters = "qkv" if "attn" in whole else "gx"
        pieces = [names.pop(f"blocks.0.{parts.format(letter)}") for letter in letters]
        names[f"blocks.0.{whole}"] = np.concatenate(pieces)
    return names


def test_every_eva02_comes_back(tmp_path):
    options = {**SIZES, "width": 24, "heads": 3, "mlp_width": 8, "activation": "swiglu",
               "rotary": 1e4, "rotary_reference": 16}  # fmt: skip
    encoder = random_encoder(models.vision_transformer, **options, mlp_norm=True)
    tensors = tensors_of(encoder, "timm-eva02")
    del tensors["blocks.0.attn.k_proj.bias"]
    for state in (tensors, under("visual.trunk.", packed(tensors))):
        file = write(tmp_path, state)
        found = weights.inspect_file(file, **FACTS, heads=3)
        assert found.layout.name == "timm-eva02" and "16 patches a side" in str(found.notes)
        back = weights.import_encoder(file, **FACTS, heads=3)
        bias = back.variables["params"]["block1"]["attention"]["qkv"]["bias"]
        np.testing.assert_array_equal(bias[24:48], 0)
        assert back.module == encoder.module
        ours = mapping.split(LAYOUTS["timm-eva02"].entries(back), {
            path: np.asarray(x)
            for path, x in traverse_util.flatten_dict(back.variables, sep="/").items()
        })  # fmt: skip
        assert all(np.array_equal(x, ours[name]) for name, x in tensors.items())
    with pytest.raises(ValueError, match="no published width"):
        weights.import_encoder(file, **FACTS)
    with pytest.raises(ValueError, match="no bias of its keys"):
        weights.export_safetensors(back, tmp_path / "out.safetensors")
    ungated = {**packed(tensors), "blocks.0.mlp.fc2.weight": np.zeros((24, 16), np.float32)}
    with pytest.raises(ValueError, match="this MLP is not gated"):
        weights.import_encoder(write(tmp_path, ungated), **FACTS, heads=3)
    with pytest.raises(ValueError, match="rotary_reference=16 must be positive, and needs rotary"):
        models.vision_transformer(jax.random.key(0), **{**options, "rotary": None})


SWIN = {"depths": (2, 1), "width": 4, "heads": (1, 2), "windows": 2, "image_size": 32,
        "mlp_ratio": 2.0}  # fmt: skip


@pytest.mark.parametrize("layout", ["timm-swin", "huggingface-swin"])
def test_every_swin_comes_back(layout, tmp_path):
    encoder = random_encoder(models.swin_transformer, **SWIN, pad_first=layout != "timm-swin")
    tensors = tensors_of(encoder, layout)
    matching = [other.name for other in convert.LAYOUTS if other.matches(tensors.keys())]
    assert matching == [layout]
    config = {"model_type": "swin"} if layout != "timm-swin" else {}
    file = write(tmp_path, tensors, "model.safetensors", config=config)
    back = weights.import_encoder(file, **FACTS)
    assert back.module == encoder.module
    assert_same(back, encoder)
    with pytest.raises(ValueError, match="how large images were") as caught:
        weights.import_encoder(file, normalization="none")
    assert len(str(caught.value).splitlines()) == 2  # and nothing besides
    with pytest.raises(ValueError, match="stage 2: windows of 2 places are larger than its side"):
        weights.import_encoder(file, normalization="none", image_size=8)
    table = next(name for name in tensors if name.endswith("bias_table"))
    tensors[table] = tensors[table][:-1]
    file = write(tmp_path, tensors, "model.safetensors", config=config)
    with pytest.raises(ValueError, match="not that of a square window"):
        weights.import_encoder(file, **FACTS)


def test_a_swin_whose_config_is_anothers_is_refused(tmp_path):
    encoder = random_encoder(models.swin_transformer, **SWIN, pad_first=True)
    tensors = tensors_of(encoder, "huggingface-swin")
    for wrong in ({"window_size": 7}, {"use_absolute_embeddings": True}, {"layer_norm_eps": 1e-6}):
        config = {"model_type": "swin", **wrong}
        file = write(tmp_path, tensors, "model.safetensors", config=config)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            weights.import_encoder(file, **FACTS)


# --- wrappers and other parts --------------------------------------------------------------------

_CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
_FEW = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}


def numbered(tensors, numbers):
    parts = {name: name.partition(".") for name in tensors}
    return {f"{numbers[parts[name][0]]}.{parts[name][2]}": x for name, x in tensors.items()}


CIFAR = random_encoder(models.resnet18, width=2, stem="cifar", image_size=32)
KUANGLIU = {
    name.replace("downsample", "shortcut"): x
    for name, x in tensors_of(CIFAR, "torchvision-resnet").items()
}
WRAPPED = {
    "torch.compile": (under("_orig_mod.", PLAIN), "torchvision-resnet", {}),
    "FSDP": (under("_fsdp_wrapped_module.", PLAIN), "torchvision-resnet", {}),
    "DDP of a compiled backbone": (under("module.backbone._orig_mod.", PLAIN), "solo-learn", {}),
    "VISSL": (
        {**under("_feature_blocks.", PLAIN), **empty("heads.0.clf.weight")},
        "torchvision-resnet", {"heads": 1},
    ),
    "Lightning around a wrapper": (
        {**under("model.backbone.", PLAIN), **empty("model.projection_head.layers.0.weight")},
        "solo-learn", {"projection_head": 1},
    ),
    "SwAV": (
        {**under("module.", PLAIN), **empty("module.projection_head.0.bias",
                                            "module.prototypes.weight")},
        "torchvision-resnet", {"projection_head": 1, "prototypes": 1},
    ),
    "PIRL": (
        {**under("encoder.", PLAIN), **empty("head_jig.fc1.weight", "memory_1")},
        "solo-learn", {"head_jig": 1, "memory_1": 1},
    ),
    "mmselfsup, MoCo": (
        {**under("encoder_q.0.", PLAIN), **under("encoder_k.0.", PLAIN),
         **empty("encoder_q.1.mlp.0.bias", "queue")},
        "torchvision-resnet", {"encoder_k": len(PLAIN), "encoder_q.1": 1, "queue": 1},
    ),
    "lightly, BYOL": (
        {**under("backbone.", numbered(PLAIN, _CHILDREN)),
         **{name: x + 1 for name, x in
            under("backbone_momentum.", numbered(PLAIN, _CHILDREN)).items()}},
        "sequential-resnet", {"backbone_momentum": len(PLAIN)},
    ),
    "queue beside a bare network": ({**PLAIN, **empty("queue", "queue_ptr")}, "torchvision-resnet",
                                    {"queue": 1, "queue_ptr": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_come_off_and_other_parts_are_counted(case, tmp_path):
    tensors, layout, dropped = WRAPPED[case]
    file = write(tmp_path, tensors)
    inspection = weights.inspect_file(file, **FACTS)
    assert not inspection.problems and inspection.layout.name == layout
    assert dict(inspection.dropped) == dropped
    assert_same(weights.import_encoder(file, **FACTS), RESNET)


@pytest.mark.parametrize(
    "tensors",
    [KUANGLIU, under("encoder.", KUANGLIU) | empty("head.0.weight"),
     under("backbone.", numbered(KUANGLIU, _FEW))],
    ids=["kuangliu", "SupContrast", "lightly's ResNetGenerator"],
)  # fmt: skip
def test_cifar_networks_with_shortcuts_need_no_stem_named(tensors, tmp_path):
    assert_same(weights.import_encoder(write(tmp_path, tensors), **FACTS), CIFAR)


def test_two_encoders_must_be_told_apart(tmp_path):
    student = under("student_backbone.", PLAIN)
    teacher = {name.replace("student", "teacher"): x + 1 for name, x in student.items()}
    file = write(tmp_path, {**student, **teacher})
    with pytest.raises(ValueError, match="--prefix student_backbone or teacher_backbone"):
        weights.import_encoder(file, **FACTS)
    assert_same(weights.import_encoder(file, **FACTS, prefix="student_backbone"), RESNET)
    with pytest.raises(ValueError, match="did you mean 'teacher_backbone"):
        weights.import_encoder(file, **FACTS, prefix="teacher_backbon")


def test_an_unknown_part_is_left_out_if_it_is_named(tmp_path):
    file = write(tmp_path, {**PLAIN, **empty("gate.weight", "layer1.0.probe")})
    with pytest.raises(ValueError, match=r"unexpected gate\.weight(.|\n)*unexpected layer1"):
        weights.import_encoder(file, **FACTS)
    one = weights.inspect_file(file, **FACTS, drop="gate").problems
    assert len(one) == 1 and "layer1.0.probe" in one[0]
    named = {"drop": ("gate", "layer1.0.probe")}
    assert_same(weights.import_encoder(file, **FACTS, **named), RESNET)
    inspection = weights.inspect_file(file, **FACTS, **named)
    assert dict(inspection.dropped) == {"gate": 1, "layer1.0": 1}
    with pytest.raises(ValueError, match=r"no part 'gates' to leave out; did you mean 'gate'"):
        weights.import_encoder(file, **FACTS, drop=("gates",))
    with pytest.raises(ValueError, match="missing bn1"):
        weights.import_encoder(file, **FACTS, drop=("gate", "layer1.0.probe", "bn1"))


def test_one_network_by_two_names_is_one(tmp_path):
    twice = {**under("online.net.", PLAIN), **under("net.", PLAIN)}
    assert_same(weights.import_encoder(write(tmp_path, twice), **FACTS), RESNET)


def test_an_unknown_option_has_a_near_name(tmp_path):
    with pytest.raises(ValueError, match="takes no 'stem_pading'; did you mean 'stem_padding'"):
        weights.import_encoder(write(tmp_path, PLAIN), **FACTS, stem_pading=3)


def test_a_part_that_looks_like_an_encoder_is_not_searched_for_in_one():
    places = selection._places(under("a.b.", PLAIN).keys(), convert.LAYOUTS)
    assert list(places) == ["a.b."]


# --- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        called("pathlib.WindowsPath", text("C:\\runs")),
        called("pathlib._local.PureWindowsPath", text("C:\\runs")),
        called("datetime.date", text("2024")),
        called("datetime.timezone", called("datetime.timedelta", number(0))),
        called("collections.deque", group()),
        called("uuid.UUID"),
        called("easydict.EasyDict"),
        called("torch.optim.lr_scheduler.CosineAnnealingLR"),
    ],
)
def test_harmless_names_beside_weights_stop_nothing(value, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(zipped(pickled(table(state_dict=table(w=tensor()), extra=value))))
    assert list(read_weights(file).tensors) == ["w"]


def test_other_names_must_be_named_and_are_never_run(tmp_path):
    file = tmp_path / "weights.pth"
    extra = called("os.system", text("touch " + str(tmp_path / "run")))
    file.write_bytes(zipped(pickled(table(state_dict=table(w=tensor()), extra=extra))))
    with pytest.raises(ValueError, match=r"names os\.system(.|\n)*--inert NAME"):
        read_weights(file)
    assert list(read_weights(file, inert=("os.system",)).tensors) == ["w"]
    assert not (tmp_path / "run").exists()


def test_a_state_dict_deep_in_a_file_is_found(tmp_path):
    trunk = table(model=table(trunk=table(w=tensor()), heads=table()), other=number(1))
    content = zipped(pickled(table(classy_state_dict=table(base_model=trunk))))
    (tmp_path / "vissl.torch").write_bytes(content)
    found = read_weights(tmp_path / "vissl.torch")
    assert found.found_under == "classy_state_dict.base_model.model.trunk"
    assert list(found.tensors) == ["w"]
    two = table(a=table(x=table(w=tensor())), b=table(w=tensor()))
    (tmp_path / "two.pth").write_bytes(zipped(pickled(two)))
    with pytest.raises(ValueError, match=r"tensors are under: 'b', 'a\.x'"):
        read_weights(tmp_path / "two.pth")
    assert read_weights(tmp_path / "two.pth", under="a.x").found_under == "a.x"
