"""Vision transformers of PyTorch with random weights, saved the way each layout's writers do.

`measure(name, folder)` is one line of the parity table in the documentation.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from robust_ssl.weights.convert import LAYOUTS, import_encoder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
WIDTH, HEADS, DEPTH, PATCH, SIZE = 24, 2, 2, 8, 24
HUGGINGFACE = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": DEPTH,
    "patch_size": PATCH, "image_size": SIZE,
}  # fmt: skip
torch.set_num_threads(1)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class GatedMLP(nn.Module):
    """DINOv2 giant's, with its names."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


class PlainMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self, width, heads, dinov2, gated):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, 1e-6), SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = GatedMLP(width, 40) if gated else PlainMLP(width, 4 * width)
        self.ls1, self.ls2 = (Scale(width), Scale(width)) if dinov2 else (nn.Identity(),) * 2

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmViT(nn.Module):
    """The VisionTransformer of timm, DeiT, DINO, MAE and DINOv2, with their names."""

    def __init__(self, *, token=True, fc_norm=False, dinov2=False, gated=False, registers=0):
        super().__init__()
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, WIDTH)) if registers else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH)) if token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + token, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(TimmBlock(WIDTH, HEADS, dinov2, gated) for _ in range(DEPTH))
        norm = nn.LayerNorm(WIDTH, 1e-6)
        self.norm = nn.Identity() if fc_norm else norm
        self.fc_norm = norm if fc_norm else nn.Identity()
        self.mean_pooled = fc_norm or not token

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x, first = x + self.pos_embed, 0 if self.cls_token is None else 1
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        taps = {"embed": x}
        for number, block in enumerate(self.blocks, 1):
            x = taps[f"block{number}"] = block(x)
        x = self.norm(x)
        return self.fc_norm(x[:, first:].mean(1)) if self.mean_pooled else x[:, 0], taps


def huggingface_forward(model, x):
    vision = getattr(model, "vision_model", getattr(model, "vit", model))
    # ViTMAE hides patches at random; with rising noise and no masking it hides and moves none.
    rising = {"noise": torch.arange(9.0).expand(len(x), 9)} if "MAE" in str(type(model)) else {}
    outputs = vision(x, output_hidden_states=True, **rising)
    names = ["embed", *(f"block{number}" for number in range(1, DEPTH + 1))]
    clip = "CLIP" in str(type(model))  # its last states are before the last norm
    features = outputs.pooler_output if clip else outputs.last_hidden_state[:, 0]
    return features, dict(zip(names, outputs.hidden_states, strict=True))


def save_torch(wrap: Callable[[dict], Any]):
    """`wrap` puts a state dict into what the layout's release saves."""

    def save(model, folder):
        path = folder / "checkpoint.pth"
        torch.save(wrap(model.state_dict()), path)
        return path

    return save


def save_safetensors(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def save_huggingface(model, folder):
    model.save_pretrained(folder)
    return folder


def save_new_names(model, folder):
    """A state dict with the names that transformers 5 has in memory."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def head(name):
    return {f"{name}.weight": torch.randn(5, WIDTH), f"{name}.bias": torch.randn(5)}


def dino_release(state):
    teacher = under("backbone.", state) | under("head.", head("last_layer"))
    student = {f"module.{name}": -tensor for name, tensor in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 3}


def mae_release(state):
    decoder = under("decoder_", head("embed") | head("blocks.0.mlp.fc1"))
    return {"model": {**state, **decoder, "mask_token": torch.randn(1, 1, 8)}, "epoch": 3}


def solo_learn(state):
    heads = head("classifier") | under("momentum_backbone.", state) | head("projector.0")
    return {"state_dict": under("backbone.", state) | heads, "epoch": 3}


def moco_release(state):
    online = under("module.base_encoder.", state | head("head.0"))
    momentum = under("module.momentum_encoder.", state)
    return {"state_dict": online | momentum | head("module.predictor.0"), "arch": "vit_small"}


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str
    build: Callable[[], nn.Module]
    save: Callable[[nn.Module, pathlib.Path], pathlib.Path] = save_huggingface
    named: dict = dataclasses.field(default_factory=dict)
    forward: Callable = huggingface_forward


def timm_case(layout, save, **options):
    build = functools.partial(TimmViT, **options)
    return Case(layout, build, save, {"heads": HEADS}, lambda model, x: model(x))


def huggingface_case(layout, kind, save=save_huggingface, **options):
    def build():
        model, config = (getattr(transformers, kind + end) for end in ("Model", "Config"))
        return model(config(**HUGGINGFACE, **options))

    return Case(layout, build, save)


def clip(config_name="CLIPVisionConfig", model_name="CLIPVisionModel", **options):
    vision = HUGGINGFACE | {"intermediate_size": 40} | options
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"text_config": text | {"intermediate_size": 8, "vocab_size": 20}}
    full = {"vision_config": vision, **small}
    config = getattr(transformers, config_name)(**(full if model_name == "CLIPModel" else vision))
    return getattr(transformers, model_name)(config)


def clip_case(*names, **options):
    return Case("huggingface-clip-vision", functools.partial(clip, *names, **options))


CASES = {
    "timm-vit": timm_case("timm-vit", save_safetensors),
    "timm-vit, mean of patches": timm_case("timm-vit", save_safetensors, token=False),
    "timm-vit, fc_norm": timm_case("timm-vit", save_safetensors, fc_norm=True),
    "timm-vit, DINOv2 release": timm_case(
        "timm-vit",
        save_torch(lambda state: state | {"mask_token": torch.randn(1, WIDTH)}),
        dinov2=True, registers=4,
    ),
    "timm-vit, DINOv2 giant": timm_case(
        "timm-vit", save_torch(dict), dinov2=True, gated=True
    ),
    "dino": timm_case("dino", save_torch(dino_release)),
    "mae": timm_case("mae", save_torch(mae_release)),
    "solo-learn-vit": timm_case("solo-learn-vit", save_torch(solo_learn)),
    "moco-vit": timm_case("moco-vit", save_torch(moco_release)),
    "huggingface-vit": huggingface_case("huggingface-vit", "ViT", intermediate_size=40),
    "huggingface-vit, new names": huggingface_case(
        "huggingface-vit", "ViT", save_new_names, intermediate_size=40
    ),
    "huggingface-vit, MAE": huggingface_case(
        "huggingface-vit", "ViTMAE", intermediate_size=40, mask_ratio=0.0
    ),
    "huggingface-dinov2": huggingface_case("huggingface-dinov2", "Dinov2", mlp_ratio=2),
    "huggingface-dinov2, new names": huggingface_case(
        "huggingface-dinov2", "Dinov2", save_new_names, mlp_ratio=2
    ),
    "huggingface-dinov2, gated": huggingface_case(
        "huggingface-dinov2", "Dinov2", mlp_ratio=2, use_swiglu_ffn=True
    ),
    "huggingface-dinov2, registers": huggingface_case(
        "huggingface-dinov2", "Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=3
    ),
    "huggingface-clip-vision": clip_case(),
    "huggingface-clip-vision, projected": clip_case(
        "CLIPVisionConfig", "CLIPVisionModelWithProjection", hidden_act="gelu"
    ),
    "huggingface-clip-vision, with text": clip_case("CLIPConfig", "CLIPModel"),
}  # fmt: skip


def randomize(model, seed=0):
    """Random numbers everywhere: a fresh model's zeros and ones hide what is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                many = tensor.ndim > 1 and tensor.shape[0] > 1
                spread = tensor[0].numel() ** -0.5 if many else 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + (not many))
    return model.eval()


def images(count=3):
    return np.random.default_rng(0).uniform(size=(count, SIZE, SIZE, 3)).astype(np.float32)


def torch_outputs(case, model, pixels):
    """Features and taps as arrays, of normalized images."""
    x = ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        features, taps = case.forward(model, torch.from_numpy(x.copy()))
    return {"features": features.numpy(), **{name: tap.numpy() for name, tap in taps.items()}}


def largest_error(encoder, expected, pixels):
    """The largest difference over the largest value, of the worst tap."""
    ours = jax.jit(lambda encoder, images: encoder(images))(encoder, pixels)
    ours = {"features": ours.features, **ours.taps}
    assert ours.keys() == expected.keys()
    errors = []
    for name, theirs in expected.items():
        assert ours[name].shape == theirs.shape, name
        errors.append(np.abs(np.asarray(ours[name]) - theirs).max() / np.abs(theirs).max())
    return float(max(errors))


def imported(name, folder):
    """The PyTorch model of a case, and the encoder that its file becomes."""
    case = CASES[name]
    model = randomize(case.build())
    path = case.save(model, pathlib.Path(folder))
    return model, import_encoder(path, mean=MEAN, std=STD, **case.named)


def measure(name, folder):
    """The layout of a case, and its largest relative error."""
    model, encoder = imported(name, folder)
    expected = torch_outputs(CASES[name], model, images())
    return CASES[name].layout, largest_error(encoder, expected, images())


def entries(name, encoder):
    layout = next(layout for layout in LAYOUTS if layout.name == CASES[name].layout)
    return layout.entries(encoder)
