"""What ResNets are called elsewhere: torchvision, solo-learn, MoCo, Hugging Face.

Weights do not tell a convolution's stride or padding.  What a layout's writers always use is filled
in; where they differ, it must be named, because a wrong guess loads without an error and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.models.resnet import STEMS, BasicBlock, Bottleneck
from robust_ssl.types import Encoder
from robust_ssl.weights.mapping import CONV, COPY, Entry, Layout
from robust_ssl.weights.native import RESNETS

NameOf = Callable[[Sequence[str]], str]  # ("stage1", "block1", "conv1", "norm") -> "layer1.0.bn1"

_LEAVES = {
    "kernel": ("weight", CONV),
    "scale": ("weight", COPY),
    "bias": ("bias", COPY),
    "mean": ("running_mean", COPY),
    "var": ("running_var", COPY),
}


def _torchvision_name(parts: Sequence[str]) -> str:
    if parts[0] == "stem":
        return {"conv": "conv1", "norm": "bn1"}[parts[1]]
    stage, block, *inner = parts
    name = f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}"
    if not inner:
        return name
    if inner[0] == "shortcut":
        return f"{name}.downsample.{('conv', 'norm').index(inner[1])}"
    number = inner[0].removeprefix("conv")
    return f"{name}.{'conv' if inner[1] == 'conv' else 'bn'}{number}"


def _huggingface_name(parts: Sequence[str]) -> str:
    last = {"conv": "convolution", "norm": "normalization"}
    if parts[0] == "stem":
        return f"embedder.embedder.{last[parts[1]]}"
    stage, block, *inner = parts
    stage, block = int(stage.removeprefix("stage")) - 1, int(block.removeprefix("block")) - 1
    name = f"encoder.stages.{stage}.layers.{block}"
    if not inner:
        return name
    if inner[0] == "shortcut":
        return f"{name}.shortcut.{last[inner[1]]}"
    return f"{name}.layer.{int(inner[0].removeprefix('conv')) - 1}.{last[inner[1]]}"


def _entries(name_of: NameOf) -> Callable[[Encoder], list[Entry]]:
    def entries(encoder: Encoder) -> list[Entry]:
        table = []
        for path in traverse_util.flatten_dict(encoder.variables, sep="/"):
            _, *module, leaf = path.split("/")
            name, kind = _LEAVES[leaf]
            table.append(Entry(path, (f"{name_of(module)}.{name}",), kind))
        return table

    return entries


def _body(tensors: Mapping[str, np.ndarray], name_of: NameOf) -> tuple[str, int]:
    """The builder that has these blocks, and the width of the first stage."""
    norm = f"{name_of(('stem', 'norm'))}.weight"
    if norm not in tensors:
        raise ValueError(f"missing {norm}, which tells the width of the network")
    depths = []
    for stage in range(1, 5):
        depth = 0
        while any(x.startswith(_block(name_of, stage, depth + 1)) for x in tensors):
            depth += 1
        depths.append(depth)
    third = f"{name_of(('stage1', 'block1', 'conv3', 'conv'))}.weight"
    block = Bottleneck if third in tensors else BasicBlock
    builder = RESNETS.get((block, tuple(depths)))
    if builder is None:
        known = ", ".join(f"{name} {list(depths)}" for (_, depths), name in RESNETS.items())
        raise ValueError(
            f"the file has {depths} {block.__name__}s in its stages; there are {known}"
        )
    return builder, tensors[norm].shape[0]


def _block(name_of: NameOf, stage: int, block: int) -> str:
    return name_of((f"stage{stage}", f"block{block}")) + "."


def _stem_kernel(tensors: Mapping[str, np.ndarray], name_of: NameOf, width: int) -> int:
    """The side of the first convolution, also of one whose axes are transposed."""
    name = f"{name_of(('stem', 'conv'))}.weight"
    if name not in tensors:
        raise ValueError(f"missing {name}, the first convolution")
    sides = list(tensors[name].shape)
    for size in (width, 3):
        if size in sides:
            sides.remove(size)
    known = {kernel for kernel, *_ in STEMS.values()}
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] not in known:
        raise ValueError(
            f"{name} has shape {tensors[name].shape}; a stem is [{width}, 3, k, k] with k in "
            f"{sorted(known)}"
        )
    return sides[0]


def _network(name_of: NameOf, small_stem: Mapping[str, Any] | None = None):
    """Returns `Layout.network`; `small_stem` is what the layout's writers mean by a 3x3 stem."""

    def network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]):
        builder, width = _body(tensors, name_of)
        kernel = _stem_kernel(tensors, name_of, width)
        usual = small_stem or {} if kernel == 3 else {"stem": "imagenet", "stem_padding": 3}
        stem = {**usual, **_named(configs)}
        unnamed = {"stem", "stem_padding"} - stem.keys()
        if unnamed:
            raise ValueError(
                f"the stem is {kernel}x{kernel}, and its stride and padding are not in the file: "
                'name stem, "cifar" (stride 1) or "cifar_half" (stride 2), and stem_padding, 1 '
                "(usual) or 2 (solo-learn's, which --layout solo-learn says too); for example "
                "--stem cifar --stem-padding 1"
            )
        if stem["stem"] not in STEMS or STEMS[stem["stem"]][0] != kernel:
            fitting = sorted(name for name, (side, *_) in STEMS.items() if side == kernel)
            raise ValueError(
                f"stem {stem['stem']!r} does not fit a {kernel}x{kernel} convolution; "
                f"one of {fitting} does"
            )
        return builder, {"width": width, **stem}

    return network


def _solo_learn_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]):
    # Others write ``backbone.`` too, so only a layout that is named tells the padding.
    named = configs.get("layout") == "solo-learn"
    small_stem = {"stem": "cifar", "stem_padding": 2} if named else None
    return _network(_torchvision_name, small_stem)(tensors, configs)


def _torchvision_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]):
    """A file of timm may be a variant with a plain ResNet's tensors and other numbers."""
    config = configs.get("config.json") or {}
    architecture = config.get("architecture", "")
    if "pretrained_cfg" in config and not _PLAIN.fullmatch(architecture):
        raise ValueError(
            f"config.json: architecture {architecture!r} is no plain ResNet-18, 34, 50, 101 or 152"
        )
    changed = set(config.get("model_args") or {}) - {"num_classes", "in_chans"}
    if changed:
        raise ValueError(f"config.json: model_args changes the network: {sorted(changed)}")
    return _network(_torchvision_name)(tensors, configs)


def _named(configs: Mapping[str, Any]) -> dict[str, Any]:
    options = configs.get("options", {})
    return {key: options[key] for key in ("stem", "stem_padding") if key in options}


def _huggingface_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]):
    config = configs.get("config.json")
    if config is None:
        raise ValueError(
            "there is no config.json, which says where the network strides; give the folder that "
            "save_pretrained wrote"
        )
    needed = {
        "model_type": ("resnet",),
        "num_channels": (3,),
        "hidden_act": ("relu",),
        "downsample_in_first_stage": (False,),
        # A basic block has no bottleneck to stride in.
        "downsample_in_bottleneck": (False, True)
        if config.get("layer_type") == "basic"
        else (False,),
    }
    wrong = [
        f"{key} is {config[key]!r}, which this package's networks are not"
        for key, values in needed.items()
        if config.get(key, values[0]) not in values
    ]
    if wrong:
        raise ValueError("config.json: " + "; ".join(wrong))
    return _network(_huggingface_name)(tensors, configs)


def _rename(prefix: str, dropped: str) -> Callable[[str], str | None]:
    """Takes a prefix off and drops counters, heads and what else `dropped` matches."""
    counters = r".*\.num_batches_tracked$"
    drop, first = re.compile(f"{dropped}|{counters}"), re.compile(prefix)

    def rename(name: str) -> str | None:
        return None if drop.match(name) else first.sub("", name, count=1)

    return rename


def _has(pattern: str) -> Callable[[Set[str]], bool]:
    wanted = re.compile(pattern)
    return lambda names: any(wanted.fullmatch(name) for name in names)


_PLAIN = re.compile(r"(tv_)?resnet(18|34|50|101|152)")
_SOLO_HEADS = (
    r"(module\.)?(momentum_|projector|predictor|classifier|prototypes|queue|head\.|whitening"
    r"|dino_loss_func\.|local_memory_|(backbone|encoder)\.fc\.)"
)

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="solo-learn",
        source="solo-learn checkpoints with a ResNet; if it is named, a 3x3 stem has padding 2",
        matches=_has(r"(module\.)?(backbone|encoder)\.conv1\.weight"),
        rename=_rename(r"^(module\.)?(backbone|encoder)\.", _SOLO_HEADS),
        network=_solo_learn_network,
        entries=_entries(_torchvision_name),
    ),
    Layout(
        name="moco",
        source="MoCo v1, v2 (encoder_q) and v3 (base_encoder) checkpoints with a ResNet",
        matches=_has(r"(module\.)?(encoder_q|base_encoder)\.conv1\.weight"),
        rename=_rename(
            r"^(module\.)?(encoder_q|base_encoder)\.",
            r"(module\.)?(encoder_k\.|momentum_encoder\.|predictor\.|queue(_ptr)?$"
            r"|(encoder_q|base_encoder)\.fc\.)",
        ),
        network=_network(_torchvision_name),
        entries=_entries(_torchvision_name),
    ),
    Layout(
        name="torchvision-resnet",
        source="torchvision and timm ResNets, and every repository that builds on them",
        matches=_has(r"(module\.)?conv1\.weight"),
        rename=_rename(r"^module\.", r"(module\.)?fc\."),
        network=_torchvision_network,
        entries=_entries(_torchvision_name),
    ),
    Layout(
        name="huggingface-resnet",
        source="transformers' ResNetModel and ResNetForImageClassification",
        matches=_has(r"(resnet\.)?embedder\.embedder\.convolution\.weight"),
        rename=_rename(r"^resnet\.", r"classifier\."),
        network=_huggingface_network,
        entries=_entries(_huggingface_name),
    ),
)
