"""What ResNets are called elsewhere: torchvision, solo-learn, MoCo, Hugging Face.

Weights do not tell a convolution's stride or padding.  What a layout's writers always use is filled
in; where they differ, it must be named, because a wrong guess loads without an error and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.models.resnet import STEMS, BasicBlock, Bottleneck
from robust_ssl.types import Encoder
from robust_ssl.weights import mapping, variants
from robust_ssl.weights.mapping import CONV, COPY, Entry, Layout, Network
from robust_ssl.weights.native import RESNETS

NameOf = Callable[[Sequence[str]], str]  # ("stage1", "block1", "conv1", "norm") -> "layer1.0.bn1"

LEAVES = {
    "kernel": ("weight", CONV),
    "scale": ("weight", COPY),
    "bias": ("bias", COPY),
    "mean": ("running_mean", COPY),
    "var": ("running_var", COPY),
}


def torchvision_name(parts: Sequence[str]) -> str:
    """Returns torchvision's name of a module, ``("stage1", "block1", "conv1", "norm")``."""
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
            name, kind = LEAVES[leaf]
            table.append(Entry(path, (f"{name_of(module)}.{name}",), kind))
        return table

    return entries


def _body(tensors: Mapping[str, np.ndarray], name_of: NameOf) -> tuple[str, int]:
    """The builder that has these blocks, and the width of the first stage."""
    norm = f"{name_of(('stem', 'norm'))}.weight"
    if norm not in tensors:
        raise ValueError(f"missing {norm}, which tells the width of the network")
    # Counted from the first block: a gap makes depths that no variant has, and is reported.
    depths = []
    for stage in range(1, 5):
        depth = 0
        while any(x.startswith(_block(name_of, stage, depth + 1)) for x in tensors):
            depth += 1
        depths.append(depth)
    # Only a bottleneck has a third convolution.
    third = f"{name_of(('stage1', 'block1', 'conv3', 'conv'))}.weight"
    block = Bottleneck if third in tensors else BasicBlock
    builder = RESNETS.get((block, tuple(depths)))
    if builder is None:
        variants = ", ".join(f"{name} {list(depths)}" for (_, depths), name in RESNETS.items())
        raise ValueError(
            f"the file has {depths} {block.__name__}s in its stages; there are {variants}"
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
    # Whatever the order of the axes: `join` then says that they are transposed, in its list.
    for size in (width, 3):
        if size in sides:
            sides.remove(size)
    kernels = {kernel for kernel, *_ in STEMS.values()}
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] not in kernels:
        raise ValueError(
            f"{name} has shape {tensors[name].shape}; a stem is [{width}, 3, k, k] with k in "
            f"{sorted(kernels)}"
        )
    return sides[0]


def _network(name_of: NameOf, small_stem: Mapping[str, Any] | None = None):
    """Returns `Layout.network`; `small_stem` is what the layout's writers mean by a 3x3 stem."""

    def network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
        builder, width = _body(tensors, name_of)
        kernel = _stem_kernel(tensors, name_of, width)
        # All writers give a 7x7 stem stride 2 and padding 3; they differ in the 3x3 one.
        usual = small_stem or {} if kernel == 3 else {"stem": "imagenet", "stem_padding": 3}
        stem = {**usual, **mapping.named_options(configs, "stem", "stem_padding")}
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
        # Depths are the builder's; image size and normalization are settled by the caller.
        return Network(builder, {"width": width, **stem}, variants.assumed(configs, builder))

    return network


def _solo_learn_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
    # Others write ``backbone.`` too, so only a layout that is named tells the padding.
    certain = configs.get("layout") == "solo-learn"
    small_stem = {"stem": "cifar", "stem_padding": 2} if certain else None
    return _plain(_network(torchvision_name, small_stem))(tensors, configs)


def _plain(network: Callable) -> Callable:
    """A network whose file or JSON must not speak of a variant with a plain ResNet's tensors."""

    def checked(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
        variants.check(configs)
        return network(tensors, configs)

    return checked


def _huggingface_network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
    config = mapping.read_config(configs, "where the network strides")
    # A basic block has no bottleneck to stride in, so there the entry means nothing.
    strides = (False, True) if config.get("layer_type") == "basic" else (False,)
    choices = {"model_type": ("resnet",), "num_channels": (3,), "hidden_act": ("relu",)}
    choices |= {"downsample_in_first_stage": (False,), "downsample_in_bottleneck": strides}
    mapping.check_config(config, choices)
    # Its config says where it strides, so nothing is assumed.
    return _network(_huggingface_name)(tensors, configs)._replace(assumed=())


def _rename(
    prefix: str, dropped: str, changes: tuple[tuple[str, str], ...] = ()
) -> Callable[[str], str | None]:
    """Takes a prefix off; drops what is not under it, counters, and what else `dropped` matches."""
    first, drop = re.compile(prefix), re.compile(rf"({dropped})|.*\.num_batches_tracked$")
    steps = [(re.compile(pattern), new) for pattern, new in changes]

    def rename(name: str) -> str | None:
        start = first.match(name)
        if start is None or drop.match(name[start.end() :]):
            return None
        own = name[start.end() :]
        if mapping.is_other_part(own):
            return None
        for pattern, new in steps:
            own = pattern.sub(new, own)
        return own

    return rename


def _layout(
    name: str,
    source: str,
    first: str,
    prefix: str,
    dropped: str,
    network: Callable,
    name_of: NameOf = torchvision_name,
    block: str = r"layer\d\.\d+\..*",
    but: str = "nothing at all",
    changes: tuple[tuple[str, str], ...] = (),
) -> Layout:
    """A layout that is told by its first convolution and a block, and of which names change."""
    matches = mapping.has(rf"{prefix}{first}\.weight", rf"{prefix}{block}", but=but)
    rename = _rename(f"^{prefix}", dropped, changes)
    return Layout(name, source, matches, rename, network, _entries(name_of))


# kuangliu's CIFAR networks and all that began as theirs call the convolution of a shortcut so.
_SHORTCUT = (r"\.shortcut\.", ".downsample.")
_CIFAR_STEM = {"stem": "cifar", "stem_padding": 1}
# ``nn.Sequential(*resnet.children())``: convolution, norm, (activation, pooling,) four stages.
_CHILDREN = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    *((rf"^{i + 3}\.", f"layer{i}.") for i in (1, 2, 3, 4)),
)
_FEW_CHILDREN = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    *((rf"^{i + 1}\.", f"layer{i}.") for i in (1, 2, 3, 4)),
)

# In the order in which they are tried: the barest names come after those with a prefix.
LAYOUTS: tuple[Layout, ...] = (
    _layout(
        "solo-learn",
        "solo-learn checkpoints with a ResNet; if it is named, a 3x3 stem has padding 2",
        "conv1",
        r"(module\.)?(backbone|encoder)\.",
        r"fc\.",
        _solo_learn_network,
        but=r".*\.shortcut\..*",
    ),
    _layout(
        "moco",
        "MoCo v1, v2 (encoder_q) and v3 (base_encoder) checkpoints with a ResNet",
        "conv1",
        r"(module\.)?(encoder_q|base_encoder)\.",
        r"fc\.",
        _plain(_network(torchvision_name)),
        but=r".*\.shortcut\..*",
    ),
    _layout(
        "cifar-resnet",
        "kuangliu's CIFAR ResNets (shortcut) and repositories that began with them: stride 1",
        "conv1",
        r"(module\.)?",
        r"(fc|linear)\.",
        _plain(_network(torchvision_name, _CIFAR_STEM)),
        block=r"layer\d\.\d+\.shortcut\.\d\..*",
        changes=(_SHORTCUT,),
    ),
    _layout(
        "torchvision-resnet",
        "torchvision and timm ResNets, and every repository that builds on them",
        "conv1",
        r"(module\.)?",
        r"fc\.",
        _plain(_network(torchvision_name)),
        but=r".*\.shortcut\..*|attnpool\..*",
    ),
    _layout(
        "sequential-resnet",
        "a torchvision ResNet as nn.Sequential of its children, as lightly's tutorials have it",
        "0",
        r"",
        r"fc\.",
        _plain(_network(torchvision_name)),
        block=r"7\.0\.conv1\.weight",
        changes=_CHILDREN,
    ),
    _layout(
        "sequential-cifar-resnet",
        "lightly's ResNetGenerator as nn.Sequential of its children: stride 1",
        "0",
        r"",
        r"fc\.",
        _plain(_network(torchvision_name, _CIFAR_STEM)),
        block=r"5\.0\.conv1\.weight",
        but=r"7\.0\.conv1\.weight",
        changes=(*_FEW_CHILDREN, _SHORTCUT),
    ),
    _layout(
        "huggingface-resnet",
        "transformers' ResNetModel and ResNetForImageClassification",
        r"embedder\.embedder\.convolution",
        r"(resnet\.)?",
        r"classifier\.",
        _huggingface_network,
        _huggingface_name,
        block=r"encoder\.stages\.\d.*",
    ),
)
