"""Encoders of timm, open_clip, torchvision and transformers: their numbers at every tap.

With ``-s`` the largest relative error of each is printed; the table in docs/encoders.md has them.
"""

import json
import math
import re

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
import torchvision_operators  # noqa: E402, F401 (before those that import torchvision)

transformers = pytest.importorskip("transformers")

import parity_cases_vit as cases  # noqa: E402

from robust_ssl import weights  # noqa: E402
from robust_ssl.models.positions import _weights as axis_weights  # noqa: E402

SIZE, WIDTH = cases.SIZE, cases.WIDTH
NAMED = {"mean": cases.MEAN, "std": cases.STD}
SHAPE = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}


def normalized(pixels):
    x = ((pixels - np.float32(cases.MEAN)) / np.float32(cases.STD)).transpose(0, 3, 1, 2)
    return torch.from_numpy(x.copy())


def watched(model, blocks, features, pixels):
    """Features and taps: what goes into the first block, and what comes out of each."""
    taps = {}

    def keep(name, value):
        taps[name] = (value[0] if isinstance(value, tuple) else value).clone().numpy()

    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: keep("embed", (*args, *kwargs.values())[0]), with_kwargs=True
    )
    for number, block in enumerate(blocks, 1):
        block.register_forward_hook(
            lambda module, inputs, output, name=f"block{number}": keep(name, output)
        )
    with torch.no_grad():
        pooled = features(model, normalized(pixels))
    return {"features": pooled.numpy(), **taps}


def save(state, folder, wrap="", name="model.safetensors"):
    # Layouts of the memory differ, and safetensors wants them whole.
    state = {wrap + key: value.contiguous() for key, value in state.items()}
    cases.save_file(state, folder / name)
    return folder / name


def check(case, path, expected, **named):
    pixels = conv_images() if "image_size" in named else cases.images()
    encoder = weights.import_encoder(path, **{**NAMED, **named})
    error = cases.largest_error(encoder, expected, pixels)
    print(f"\n{case} ({weights.inspect_file(path, **{**NAMED, **named}).layout.name}): {error:.1e}")
    assert error < 1e-5
    return encoder


# --- timm ----------------------------------------------------------------------------------------

TIMM = {
    "plain": {},
    "mean of patches": {"global_pool": "avg", "class_token": False},
    "registers, no class token": {
        "global_pool": "avg", "class_token": False, "no_embed_class": True, "reg_tokens": 4,
        "init_values": 0.1,
    },
    # With four, 3 x 3 positions might be of 2 x 2 patches and five tokens.
    "registers, DINOv2": {"no_embed_class": True, "reg_tokens": 3, "init_values": 0.1},
    "registers with positions": {"reg_tokens": 2},
    "SigLIP": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
    "DeiT III": {"no_embed_class": True, "init_values": 0.1},
    "CLIP tower": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": "layernorm"},
}  # fmt: skip


def timm_features(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("case", TIMM)
def test_timm(case, tmp_path):
    timm = pytest.importorskip("timm")
    options = {**SHAPE, **TIMM[case]}
    if "norm_layer" in options:
        options["norm_layer"] = lambda width, **more: torch.nn.LayerNorm(width, 1e-5)
    model = cases.randomize(timm.models.VisionTransformer(num_classes=0, **options))
    expected = watched(model, model.blocks, timm_features, cases.images())
    named = {"heads": 2, "activation": TIMM[case].get("act_layer")}
    check(f"timm, {case}", save(model.state_dict(), tmp_path), expected, **named)


def test_timm_distilled_deit(tmp_path):
    timm = pytest.importorskip("timm")
    build = timm.models.deit.VisionTransformerDistilled
    model = cases.randomize(build(num_classes=3, **SHAPE))
    token = lambda model, x: model.forward_features(x)[:, 0]  # noqa: E731
    expected = watched(model, model.blocks, token, cases.images())
    check("timm, distilled DeiT", save(model.state_dict(), tmp_path), expected, heads=2)


EVA = {
    "tiny, small": {},
    "base, large": {"qkv_fused": False, "scale_mlp": True},
    "CLIP": {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True,
             "global_pool": "token"},
}  # fmt: skip


@pytest.mark.parametrize("case", EVA)
def test_timm_eva02(case, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.models.Eva(
        **SHAPE, num_classes=0, mlp_ratio=5 / 3, swiglu_mlp=True, use_rot_pos_emb=True,
        ref_feat_shape=(16, 16), dynamic_img_size=True, **EVA[case],
    )  # fmt: skip
    cases.randomize(model)
    expected = watched(model, model.blocks, timm_features, cases.images())
    path = save(model.state_dict(), tmp_path, "visual.trunk." * (case == "CLIP"))
    check(f"timm EVA-02, {case}", path, expected, heads=2)
    if EVA[case]:
        return  # one of them is enough to see that both kinds of positions follow the size
    pixels = np.random.default_rng(1).uniform(size=(2, 40, 40, 3)).astype(np.float32)
    expected = watched(model, model.blocks, timm_features, pixels)
    encoder = weights.import_encoder(path, **NAMED, heads=2, image_size=40)
    assert cases.largest_error(encoder, expected, pixels) < 1e-5


def test_timm_resizes_positions_as_we_do(tmp_path):
    timm = pytest.importorskip("timm")
    options = {**SHAPE, "dynamic_img_size": True}
    model = cases.randomize(timm.models.VisionTransformer(num_classes=0, **options))
    pixels = np.random.default_rng(1).uniform(size=(2, 40, 40, 3)).astype(np.float32)
    expected = watched(model, model.blocks, timm_features, pixels)
    path = save(model.state_dict(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {}}))  # timm's
    encoder = weights.import_encoder(tmp_path, **NAMED, heads=2, image_size=40)
    assert path.exists() and cases.largest_error(encoder, expected, pixels) < 1e-5


@pytest.mark.parametrize("kind", ["resnetaa50", "resnetblur50"])
def test_timm_variants_with_a_plain_networks_tensors_are_refused(kind, tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model(kind, pretrained=False).state_dict()
    path = save(state, tmp_path, name=f"{kind}.safetensors")
    with pytest.raises(ValueError, match="--variant plain"):
        weights.import_encoder(path, **NAMED, image_size=64)


# --- positions, by torch's own function ----------------------------------------------------------


@pytest.mark.parametrize("old,new", [(37, 16), (37, 7), (37, 24), (14, 20), (8, 3)])
@pytest.mark.parametrize("resizing", ["bicubic", "antialias", "offset", "corners"])
def test_positions_are_torchs(old, new, resizing):
    grid = torch.randn(1, 4, old, old, dtype=torch.float64, generator=torch.Generator())
    how = {
        "bicubic": {"size": (new, new)},
        "antialias": {"size": (new, new), "antialias": True},
        "offset": {"scale_factor": ((new + 0.1) / old,) * 2},
        "corners": {"size": (new, new), "align_corners": True},
    }[resizing]
    theirs = torch.nn.functional.interpolate(grid, mode="bicubic", **how).numpy()
    rows = axis_weights(old, new, resizing)
    ours = np.einsum("yi,xj,bcij->bcyx", rows, rows, grid.numpy())
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


# --- open_clip, torchvision ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_open_clip(activation, tmp_path):
    pytest.importorskip("open_clip")
    from open_clip.transformer import QuickGELU, VisionTransformer

    act = {"gelu": torch.nn.GELU, "quick_gelu": QuickGELU}[activation]
    model = cases.randomize(
        VisionTransformer(SIZE, 8, WIDTH, 2, 2, 2.0, output_dim=5, act_layer=act)
    )
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(3), "logit_scale": torch.ones(())}
    state = {**{f"visual.{key}": x for key, x in model.state_dict().items()}, **text}
    features = lambda model, x: model._pool(model.transformer(model._embeds(x)))[0]  # noqa: E731
    expected = watched(model, model.transformer.resblocks, features, cases.images())
    check(
        f"open_clip, {activation}", save(state, tmp_path), expected, heads=2, activation=activation
    )


def test_clip_resnet(tmp_path):
    pytest.importorskip("open_clip")
    from open_clip.modified_resnet import ModifiedResNet

    model = cases.randomize(ModifiedResNet([2, 1, 1, 1], 5, 2, CONV_SIZE, 4))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_var.abs_().add_(0.1)  # randomized too, and a variance is positive
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    state = {f"visual.{key}": x for key, x in model.state_dict().items()}
    # The text's part, and the numbers that OpenAI keeps beside the weights.
    state |= {"transformer.resblocks.0.ln_1.weight": torch.ones(3)}
    state |= {"input_resolution": torch.ones(()), "logit_scale": torch.ones(())}
    expected = watched_convnext(
        model, model.avgpool, stages, lambda model, x: model(x), conv_images()
    )
    path = save(state, tmp_path)
    encoder = check("CLIP ResNet", path, expected, image_size=CONV_SIZE, heads=2)
    back = weights.import_encoder(weights.export_safetensors(encoder, tmp_path / "out.safetensors"))
    assert back.module == encoder.module


def test_torchvision_vit(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model = cases.randomize(
        torchvision.models.VisionTransformer(SIZE, 8, 2, 2, WIDTH, 40, num_classes=3)
    )
    model.heads = torch.nn.Identity()
    expected = watched(model, model.encoder.layers, lambda model, x: model(x), cases.images())
    check("torchvision ViT", save(model.state_dict(), tmp_path), expected, heads=2)


# --- transformers --------------------------------------------------------------------------------


def pooled(model, x):
    return model(pixel_values=x).pooler_output


@pytest.mark.parametrize("whole", [False, True])
def test_siglip(whole, tmp_path):
    config = {**cases.HUGGINGFACE, "intermediate_size": 40}
    if whole:
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 8, "vocab_size": 20}  # fmt: skip
        both = transformers.SiglipConfig(text_config=text, vision_config=config)
        full = cases.randomize(transformers.SiglipModel(both))
        full.save_pretrained(tmp_path)
        model = full.vision_model
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
        cases.randomize(model).save_pretrained(tmp_path)
    expected = watched(model, model.encoder.layers, pooled, cases.images())
    check(f"SigLIP{', with text' * whole}", tmp_path, expected)


def test_siglip2(tmp_path):
    """Its images come as rows of pixels, here of a square."""
    config = {**cases.HUGGINGFACE, "intermediate_size": 40, "num_patches": 9}
    del config["image_size"]
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config))
    cases.randomize(model).save_pretrained(tmp_path)

    def features(model, x):
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(x), 9, -1)
        mask = torch.ones(len(x), 9, dtype=torch.long)
        shapes = torch.full((len(x), 2), 3)
        return model(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        ).pooler_output

    expected = watched(model, model.encoder.layers, features, cases.images())
    check("SigLIP2", tmp_path, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(gated, tmp_path):
    config = transformers.DINOv3ViTConfig(
        **cases.HUGGINGFACE, intermediate_size=40, num_register_tokens=4, use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    model = cases.randomize(transformers.DINOv3ViTModel(config))
    model.save_pretrained(tmp_path)
    expected = watched(model, model.model.layer, pooled, cases.images())
    encoder = check(f"DINOv3{', gated' * gated}", tmp_path, expected)
    # Rotary positions are for any size.
    pixels = np.random.default_rng(1).uniform(size=(2, 40, 40, 3)).astype(np.float32)
    other = weights.import_encoder(tmp_path, **NAMED, image_size=40)
    with torch.no_grad():
        expected = pooled(model, normalized(pixels)).numpy()
    ours = np.asarray(jax.jit(lambda encoder, x: encoder(x).features)(other, pixels))
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    assert encoder.image_size == SIZE


# --- ConvNeXt ------------------------------------------------------------------------------------

DEPTHS, WIDTHS, CONV_SIZE = (2, 1, 2, 1), (8, 16, 12, 8), 64


def conv_images():
    return np.random.default_rng(0).uniform(size=(2, CONV_SIZE, CONV_SIZE, 3)).astype(np.float32)


def watched_convnext(model, stem, stages, features, pixels):
    taps = {}

    def keep(name):
        return lambda module, inputs, output: taps.__setitem__(
            name, output.permute(0, 2, 3, 1).clone().numpy()
        )

    stem.register_forward_hook(keep("stem"))
    for s, blocks in enumerate(stages, 1):
        for b, block in enumerate(blocks, 1):
            block.register_forward_hook(keep(f"stage{s}/block{b}"))
    with torch.no_grad():
        pooled = features(model, normalized(pixels))
    return {"features": pooled.numpy(), **taps}


@pytest.mark.parametrize("options", [{}, {"use_grn": True, "ls_init_value": None},
                                     {"conv_mlp": True}], ids=["V1", "V2", "1x1"])  # fmt: skip
def test_timm_convnext(options, tmp_path):
    timm = pytest.importorskip("timm")
    shape = {"depths": DEPTHS, "dims": WIDTHS, "num_classes": 0}
    model = cases.randomize(timm.models.ConvNeXt(**shape, **options))
    stages = [stage.blocks for stage in model.stages]
    expected = watched_convnext(model, model.stem, stages, timm_features, conv_images())
    path = save(model.state_dict(), tmp_path)
    check(f"timm ConvNeXt {options}", path, expected, image_size=CONV_SIZE)


def test_torchvision_convnext(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    settings = [
        torchvision.models.convnext.CNBlockConfig(width, following, depth)
        for width, following, depth in zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)
    ]
    model = cases.randomize(torchvision.models.ConvNeXt(settings, num_classes=3))

    def features(model, x):
        return model.classifier[1](model.classifier[0](model.avgpool(model.features(x))))

    stages = [model.features[2 * s + 1] for s in range(len(DEPTHS))]
    expected = watched_convnext(model, model.features[0], stages, features, conv_images())
    path = save(model.state_dict(), tmp_path)
    encoder = check("torchvision ConvNeXt", path, expected, image_size=CONV_SIZE)
    again = weights.export_safetensors(encoder, tmp_path / "out.safetensors")
    back = weights.import_encoder(again)
    assert back.module == encoder.module
    for a, b in zip(jax.tree.leaves(encoder), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["ConvNext", "ConvNextV2", "DINOv3ConvNext"])
def test_huggingface_convnext(kind, tmp_path):
    config = getattr(transformers, kind + "Config")(
        depths=list(DEPTHS), hidden_sizes=list(WIDTHS), image_size=CONV_SIZE
    )
    model = cases.randomize(getattr(transformers, kind + "Model")(config))
    model.save_pretrained(tmp_path)
    if kind == "DINOv3ConvNext":
        stem, stages = model.model.stages[0].downsample_layers, model.model.stages
        stem = stem[1]
    else:
        stem, stages = model.embeddings, model.encoder.stages
    expected = watched_convnext(
        model, stem, [stage.layers for stage in stages], pooled, conv_images()
    )
    check(kind, tmp_path, expected, image_size=CONV_SIZE)


# --- Swin ----------------------------------------------------------------------------------------

SWIN_SIZE = 48  # sides of 12 and 6: windows of 6 tile and shift, and are the whole
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "mlp_ratio": 2.0}


def swin_images(size=SWIN_SIZE):
    return np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)


def watched_swin(model, stem, stages, features, pixels):
    """As for a ConvNeXt; transformers has places in a row, and its blocks return tuples."""
    taps = {}

    def keep(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            side = math.isqrt(output.shape[1]) if output.ndim == 3 else output.shape[1]
            taps[name] = output.reshape(len(output), side, side, -1).clone().numpy()

        return hook

    stem.register_forward_hook(keep("stem"))
    for s, blocks in enumerate(stages, 1):
        for b, block in enumerate(blocks, 1):
            block.register_forward_hook(keep(f"stage{s}/block{b}"))
    with torch.no_grad():
        pooled = features(model, normalized(pixels))
    return {"features": pooled.numpy(), **taps}


def assert_swin(case, path, expected, size=SWIN_SIZE):
    encoder = weights.import_encoder(path, **NAMED, image_size=size)
    error = cases.largest_error(encoder, expected, swin_images(size))
    print(f"\n{case} ({weights.inspect_file(path, **NAMED).layout.name}): {error:.1e}")
    assert error < 1e-5
    return encoder


def test_timm_swin(tmp_path):
    timm = pytest.importorskip("timm")
    build = timm.models.SwinTransformer
    model = cases.randomize(build(img_size=SWIN_SIZE, window_size=6, num_classes=0, **SWIN))
    stages = [stage.blocks for stage in model.layers]
    expected = watched_swin(model, model.patch_embed, stages, timm_features, swin_images())
    state = model.state_dict()
    path = save(state, tmp_path)
    encoder = assert_swin("timm Swin", path, expected)
    # As its authors name it: merged at a stage's end, with what is computed.
    old = {
        re.sub(r"layers\.(\d)\.downsample", lambda x: f"layers.{int(x[1]) - 1}.downsample", key): x
        for key, x in state.items()
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(36, 36, dtype=torch.long)
    old = weights.import_encoder(save(old, tmp_path), **NAMED, image_size=SWIN_SIZE)
    again = weights.export_safetensors(encoder, tmp_path / "out.safetensors")
    for back in (old, weights.import_encoder(again)):
        assert back.module == encoder.module
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(encoder), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not model.load_state_dict(load_torch(again), strict=True).missing_keys


def load_torch(file):
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_swins_whose_windows_do_not_tile(library, tmp_path):
    """Sides of 7 and 4, with a pad before the shift or after it."""
    if library == "timm":
        timm = pytest.importorskip("timm")
        build = timm.models.SwinTransformer
        model = cases.randomize(
            build(img_size=28, window_size=((3, 3), (2, 2)), num_classes=0, **SWIN)
        )
        stages = [stage.blocks for stage in model.layers]
        expected = watched_swin(model, model.patch_embed, stages, timm_features, swin_images(28))
        path = save(model.state_dict(), tmp_path)
    else:
        path, expected, _ = huggingface_swin(28, 3, tmp_path)
    assert_swin(f"{library} Swin, padded", path, expected, 28)


def huggingface_swin(size, window, folder):
    config = transformers.SwinConfig(image_size=size, window_size=window, **SWIN)
    model = cases.randomize(transformers.SwinModel(config))
    model.save_pretrained(folder)
    stages = [stage.blocks for stage in model.encoder.layers]
    stem = model.embeddings.norm
    return folder, watched_swin(model, stem, stages, pooled, swin_images(size)), model


def test_huggingface_swin(tmp_path):
    path, expected, model = huggingface_swin(SWIN_SIZE, 6, tmp_path)
    encoder = assert_swin("transformers Swin", path, expected)
    # Names as they are in memory.
    save(model.state_dict(), tmp_path)
    back = weights.import_encoder(tmp_path, **NAMED, image_size=SWIN_SIZE)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(encoder), strict=True):
        np.testing.assert_array_equal(a, b)


# --- the way back --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Siglip", "DINOv3"])
def test_what_is_exported_comes_back(kind, tmp_path):
    if kind == "Siglip":
        config = transformers.SiglipVisionConfig(**cases.HUGGINGFACE, intermediate_size=40)
        model = transformers.SiglipVisionModel(config)
    else:
        config = transformers.DINOv3ViTConfig(**cases.HUGGINGFACE, intermediate_size=40)
        model = transformers.DINOv3ViTModel(config)
    cases.randomize(model).save_pretrained(tmp_path)
    encoder = weights.import_encoder(tmp_path, **NAMED)
    for back in (
        weights.import_encoder(weights.export_safetensors(encoder, tmp_path / "out.safetensors")),
        weights.load_encoder(weights.save_encoder(encoder, tmp_path / "ours")),
    ):
        assert back.module == encoder.module
        for a, b in zip(jax.tree.leaves(encoder), jax.tree.leaves(back), strict=True):
            np.testing.assert_array_equal(a, b)
