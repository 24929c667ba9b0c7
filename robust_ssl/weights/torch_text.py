"""The text of ``model.py``: a network as a PyTorch module that needs nothing of this package.

Parts are put together by a network's options, so that a file has no line that its model does not
need.  Names of parameters are torchvision's for a ResNet and timm's for the others.
"""

from __future__ import annotations

import string
from typing import Any

from robust_ssl.data.resizing import Resizing
from robust_ssl.models import ConvNeXt, ResNet, ViT
from robust_ssl.models.resnet import STEMS
from robust_ssl.weights import torch_pictures

_WHOLE = string.Template('''\
"""A model that robust_ssl wrote; needs torch and safetensors.

``load()(images)`` takes pixels in [0, 1], float32 [n, 3, $size, $size], and returns $returns.
``picture(file)`` makes them of a picture.
"""

import pathlib

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

CLASS_NAMES = $class_names


$pictures$network
class Model(nn.Module):
    """The normalization, the encoder and the head."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))
        self.encoder = Encoder()
        self.head = $head

    def forward(self, images):
        return self.head(self.encoder((images - self.mean) / self.std))


def load(file=pathlib.Path(__file__).with_name("model.safetensors")):
    model = Model()
    model.load_state_dict(load_file(file))
    return model.eval()
''')

_RESNET = string.Template("""\
class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        for i, (a, b, kernel, step) in enumerate($convolutions, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride != 1 or channels != b:
            shortcut = nn.Conv2d(channels, b, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(b))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        $middle
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, $width, $kernel, $stride, $padding, bias=False)
        self.bn1, channels = nn.BatchNorm2d($width), $width
        for i, depth in enumerate($depths):
            blocks = []
            for j in range(depth):
                blocks.append(Block(channels, $width * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = $width * 2**i * $expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))$pool
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x.mean((2, 3))


""")
_CONVOLUTIONS = {  # by expansion: channels in, out, kernel, stride
    1: "[(channels, width, 3, stride), (width, width, 3, 1)]",
    4: "[(channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]",
}
_MIDDLE = {
    1: "y = self.bn2(self.conv2(y))",
    4: "y = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(y)))))",
}

_VIT = string.Template('''\
def activation(x):
$activation


def mlp():
    return nn.ModuleDict({"$fc1": nn.Linear($width, $inner), "$fc2": nn.Linear($mlp, $width)})


def attend(queries, keys, values):
    """Attention of $heads heads; arguments and result are [n, tokens, $width]."""
    split = [x.unflatten(2, ($heads, -1)).transpose(1, 2) for x in (queries, keys, values)]
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)

$rotary
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm($width, $eps), nn.LayerNorm($width, $eps)
        linear = {"qkv": nn.Linear($width, 3 * $width), "proj": nn.Linear($width, $width)}
        self.attn, self.mlp = nn.ModuleDict(linear), mlp()$scales

    def forward(self, x):
        queries, keys, values = self.attn["qkv"](self.norm1(x)).chunk(3, 2)$turn
        x = x + ${scale1}self.attn["proj"](attend(queries, keys, values))
        y = activation(self.mlp["$fc1"](self.norm2(x)))
        return x + ${scale2}self.mlp["$fc2"](y)

$pool_class
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        patch = nn.Conv2d(3, $width, $patch, $patch, bias=$patch_bias)
        self.patch_embed = nn.ModuleDict({"proj": patch})
        for name, count in $tokens.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, count, $width)))
        self.blocks = nn.ModuleList(Block() for _ in range($depth))$norms

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
$embed
        for block in self.blocks:
            x = block(x)
$pool


''')
_ACTIVATION = {
    "gelu": "    return functional.gelu(x)",
    "gelu_tanh": '    return functional.gelu(x, approximate="tanh")',
    "quick_gelu": "    return x * torch.sigmoid(1.702 * x)",
    "swiglu": "    gate, value = x.chunk(2, 2)\n    return functional.silu(gate) * value",
}
_ROTARY = string.Template('''
def turned(x):
    """Turns the patches' queries or keys, [n, tokens, $width], by where they are."""
    side, quarter, x = $side, $width // $heads // 4, x.unflatten(2, ($heads, -1)).transpose(1, 2)
    centers = 2 * (torch.arange(side, dtype=torch.float64, device=x.device) + 0.5) / side - 1
    places = torch.stack(torch.meshgrid(centers, centers, indexing="ij"), -1).reshape(-1, 2, 1)
    powers = torch.arange(quarter, dtype=torch.float64, device=x.device) / quarter
    angles = (2 * torch.pi * places * $rotary**-powers).flatten(1).repeat(1, 2)
    first, second = x[:, :, $prefix:].chunk(2, 3)
    other = torch.cat([-second, first], 3) * angles.sin().to(x.dtype)
    other = x[:, :, $prefix:] * angles.cos().to(x.dtype) + other
    return torch.cat([x[:, :, :$prefix], other], 2).transpose(1, 2).flatten(2)

''')
_POOL = string.Template("""
class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, $width))
        self.q, self.kv = nn.Linear($width, $width), nn.Linear($width, 2 * $width)
        self.proj, self.mlp = nn.Linear($width, $width), mlp()
        self.norm = nn.LayerNorm($width, $eps)

    def forward(self, x):
        query = self.q(self.latent).expand(x.shape[0], -1, -1)
        x = self.proj(attend(query, *self.kv(x).chunk(2, 2)))
        return (x + self.mlp["$fc2"](activation(self.mlp["$fc1"](self.norm(x)))))[:, 0]

""")

_CONVNEXT = string.Template('''\
def norm(layer, x):
    """A layer norm over the channels of [n, channels, height, width]."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, $inner_eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )$block_init

    def forward(self, x):
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = functional.gelu(self.mlp["fc1"](y))$response
        y = self.mlp["fc2"](y)$scaled
        return x + y.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths, stages = $widths, []
        self.stem = nn.ModuleList(
            [nn.Conv2d(3, widths[0], $patch, $patch), nn.LayerNorm(widths[0], $inner_eps)]
        )
        for i, depth in enumerate($depths):
            blocks = [Block(widths[i]) for _ in range(depth)]
            stage = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
            if i > 0:
                before = nn.LayerNorm(widths[i - 1], $inner_eps)
                down = [before, nn.Conv2d(widths[i - 1], widths[i], 2, 2)]
                stage["downsample"] = nn.ModuleList(down)
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(widths[-1], $eps)})

    def forward(self, x):
        x = norm(self.stem[1], self.stem[0](x))
        for stage in self.stages:
            if "downsample" in stage:
                x = stage["downsample"][1](norm(stage["downsample"][0], x))
            x = stage["blocks"](x)
        return self.head["norm"](x.mean((2, 3)))


''')
_RESPONSE = """
        size = y.square().sum((1, 2), keepdim=True).sqrt()
        y = y + self.mlp["grn"]["weight"] * y * (size / (size.mean(3, keepdim=True) + 1e-6))
        y = y + self.mlp["grn"]["bias"]"""


def text_of(
    module: Any,
    *,
    image_size: int,
    head: str,
    class_names: tuple[str, ...],
    classes: int,
    resizing: Resizing | None = None,
) -> str:
    """Returns the file for a network of `robust_ssl.models`.

    Args:
      module: A `ResNet`, a `ViT` or a `ConvNeXt`.
      image_size: Pixels.
      head: The head as an expression of PyTorch.
      class_names: What the logits stand for.
      classes: Number of logits, or of features where there is no head.
      resizing: How pictures get their size, where that is known.

    Raises:
      ValueError: If there is no PyTorch form of the network.
    """
    makers = {ResNet: _resnet, ViT: _vit, ConvNeXt: _convnext}
    if type(module) not in makers:
        raise ValueError(
            f"there is no PyTorch form of {type(module).__name__}; there is one of a ResNet, a "
            "ViT and a ConvNeXt of robust_ssl.models. --stablehlo writes any"
        )
    what = "features" if head == "nn.Identity()" else "logits"
    return _WHOLE.substitute(
        size=image_size, returns=f"{what} [n, {classes}]", class_names=repr(class_names),
        network=makers[type(module)](module), head=head,
        pictures=torch_pictures.text_of(resizing, image_size),
    )  # fmt: skip


def _resnet(module: ResNet) -> str:
    kernel, stride, pool, _ = STEMS[module.stem]
    expansion = module.block.expansion
    pooled = "\n        x = functional.max_pool2d(x, 3, 2, 1)" if pool else ""
    return _RESNET.substitute(
        convolutions=_CONVOLUTIONS[expansion], middle=_MIDDLE[expansion], expansion=expansion,
        width=module.width, kernel=kernel, stride=stride, padding=module.stem_padding,
        depths=tuple(module.depths), pool=pooled,
    )  # fmt: skip


def _vit(module: ViT) -> str:
    gated = module.activation == "swiglu"
    prefix = int(module.class_token) + module.registers
    side = module.image_size // module.patch_size
    fc1, fc2 = ("w12", "w3") if gated else ("fc1", "fc2")
    numbers = {"width": module.width, "heads": module.heads, "eps": module.norm_epsilon}
    numbers |= {"fc1": fc1, "fc2": fc2, "rotary": module.rotary, "prefix": prefix, "side": side}
    turn = "\n        queries, keys = turned(queries), turned(keys)"
    scales = "".join(
        f'\n        self.ls{i} = nn.ParameterDict({{"gamma": torch.ones({module.width})}})'
        for i in (1, 2)
    )
    tokens = {"cls_token": 1} if module.class_token else {}
    tokens |= {} if module.rotary is not None else {"pos_embed": side**2 + module.class_token}
    tokens |= {"register_tokens": module.registers} if module.registers else {}
    return _VIT.substitute(
        **{k: v for k, v in numbers.items() if k not in ("rotary", "prefix", "side")},
        activation=_ACTIVATION[module.activation], mlp=module.mlp_width,
        inner=module.mlp_width * (2 if gated else 1), depth=module.depth,
        turn=turn if module.rotary is not None else "",
        rotary=_ROTARY.substitute(numbers) if module.rotary is not None else "",
        scales=scales if module.layer_scale else "",
        scale1='self.ls1["gamma"] * ' if module.layer_scale else "",
        scale2='self.ls2["gamma"] * ' if module.layer_scale else "",
        pool_class=_POOL.substitute(numbers) if module.pooling == "attention" else "",
        patch=module.patch_size, patch_bias=module.patch_bias, tokens=tokens,
        norms=_vit_norms(module), embed=_vit_embed(module), pool=_vit_pool(module, prefix),
    )  # fmt: skip


def _vit_norms(module: ViT) -> str:
    norm = f"nn.LayerNorm({module.width}, {module.norm_epsilon})"
    lines = [f"self.{'fc_norm' if module.norm_after_pooling else 'norm'} = {norm}"]
    lines += [f"self.norm_pre = {norm}"] if module.pre_norm else []
    lines += ["self.attn_pool = Pool()"] if module.pooling == "attention" else []
    return "".join(f"\n        {line}" for line in lines)


def _vit_embed(module: ViT) -> str:
    first = int(module.class_token)
    lines = []
    if first:
        lines.append("x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)")
    if module.rotary is None:
        lines.append("x = x + self.pos_embed")
    if module.registers:
        lines.append("registers = self.register_tokens.expand(x.shape[0], -1, -1)")
        lines.append(f"x = torch.cat([x[:, :{first}], registers, x[:, {first}:]], 1)")
    if module.pre_norm:
        lines.append("x = self.norm_pre(x)")
    return "\n".join(f"        {line}" for line in lines)


def _vit_pool(module: ViT, prefix: int) -> str:
    pooled = "{}[:, 0]" if module.pooling == "token" else f"{{}}[:, {prefix}:].mean(1)"
    if module.pooling == "attention":
        return f"        return self.attn_pool(self.norm(x)[:, {prefix}:])"
    if module.norm_after_pooling:
        return f"        return self.fc_norm({pooled.format('x')})"
    return f"        return {pooled.format('self.norm(x)')}"


def _convnext(module: ConvNeXt) -> str:
    init = "\n        self.gamma = nn.Parameter(torch.ones(width))" if module.layer_scale else ""
    if module.response_norm:
        init += '\n        self.mlp["grn"] = nn.ParameterDict(\n            '
        init += '{"weight": torch.zeros(4 * width), "bias": torch.zeros(4 * width)}\n        )'
    return _CONVNEXT.substitute(
        widths=tuple(module.widths), depths=tuple(module.depths), patch=module.patch_size,
        eps=module.norm_epsilon, inner_eps=module.inner_epsilon, block_init=init,
        response=_RESPONSE if module.response_norm else "",
        scaled=" * self.gamma" if module.layer_scale else "",
    )  # fmt: skip
