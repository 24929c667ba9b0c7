"""What ConvNeXts are called elsewhere: timm, their authors, torchvision, Hugging Face."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.types import Encoder
from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import CONV, COPY, DENSE, Entry, Kind, Layout, Network
from robust_ssl.weights.normalization import own_record
from robust_ssl.weights.vit_names import rename_below


@dataclasses.dataclass(frozen=True)
class _Names:
    """A naming scheme: our module to theirs; ``{s}`` and ``{b}`` count stages and blocks from 0.

    Attributes:
      modules: Names of layers, which end in ``.weight`` and ``.bias``.
      stage: Number of stage 1 and the step to the next, ``{s}``.
      down: The same for what downsamples.
      scale: Name of a block's scale.
      response: Names of a response norm's scale and bias.
      response_axes: Their shape, -1 for channels.
      scale_axes: The shape of a block's scale.
    """

    modules: Mapping[str, str]
    stage: Callable[[int], int] = lambda stage: stage
    down: Callable[[int], int] = lambda stage: stage
    scale: str = ""
    response: tuple[str, str] = ("weight", "bias")
    response_axes: tuple[int, ...] = (1, 1, 1, -1)
    scale_axes: tuple[int, ...] = (-1,)

    def entries(self, encoder: Encoder) -> list[Entry]:
        paths = traverse_util.flatten_dict(encoder.variables, sep="/")
        return [self.entry(path) for path in paths]

    def entry(self, path: str) -> Entry:
        """The entry of one of our variables."""
        module, _, leaf = path.removeprefix("params/").rpartition("/")
        place = re.match(r"stage(\d+)/(?:block(\d+)/?)?", module)
        stage, block = (int(x or 1) - 1 for x in place.groups()) if place else (0, 0)
        inner = module[place.end() :] if place else module
        number = self.down(stage) if inner.startswith("downsample") else self.stage(stage)
        if place and place[2]:
            inner = f"block/{inner}" if inner else "block"
        if inner == "block":
            name = self.scale.format(s=number, b=block)
            return Entry(path, (name,), _reshaped(self.scale_axes))
        name = self.modules[inner].format(s=number, b=block)
        if inner == "block/mlp/response":
            end = self.response[leaf == "bias"]
            return Entry(path, (f"{name}.{end}",), _reshaped(self.response_axes))
        end = "bias" if leaf == "bias" else "weight"
        dense = inner.startswith("block/mlp")
        kind = (DENSE if dense else CONV) if leaf == "kernel" else COPY
        return Entry(path, (f"{name}.{end}",), kind)


def _reshaped(axes: tuple[int, ...]) -> Kind:
    return Kind(lambda x: x[0].reshape(-1), lambda x, _: [x.reshape(axes)])


_TIMM = _Names(
    {
        "stem/conv": "stem.0",
        "stem/norm": "stem.1",
        "downsample/norm": "stages.{s}.downsample.0",
        "downsample/conv": "stages.{s}.downsample.1",
        "block/conv": "stages.{s}.blocks.{b}.conv_dw",
        "block/norm": "stages.{s}.blocks.{b}.norm",
        "block/mlp/dense1": "stages.{s}.blocks.{b}.mlp.fc1",
        "block/mlp/response": "stages.{s}.blocks.{b}.mlp.grn",
        "block/mlp/dense2": "stages.{s}.blocks.{b}.mlp.fc2",
        "norm": "head.norm",
    },
    scale="stages.{s}.blocks.{b}.gamma",
    response_axes=(-1,),
)
_AUTHORS = _Names(
    {
        "stem/conv": "downsample_layers.0.0",
        "stem/norm": "downsample_layers.0.1",
        "downsample/norm": "downsample_layers.{s}.0",
        "downsample/conv": "downsample_layers.{s}.1",
        "block/conv": "stages.{s}.{b}.dwconv",
        "block/norm": "stages.{s}.{b}.norm",
        "block/mlp/dense1": "stages.{s}.{b}.pwconv1",
        "block/mlp/response": "stages.{s}.{b}.grn",
        "block/mlp/dense2": "stages.{s}.{b}.pwconv2",
        "norm": "norm",
    },
    scale="stages.{s}.{b}.gamma",
    response=("gamma", "beta"),
)
_TORCHVISION = _Names(
    {
        "stem/conv": "features.0.0",
        "stem/norm": "features.0.1",
        "downsample/norm": "features.{s}.0",
        "downsample/conv": "features.{s}.1",
        "block/conv": "features.{s}.{b}.block.0",
        "block/norm": "features.{s}.{b}.block.2",
        "block/mlp/dense1": "features.{s}.{b}.block.3",
        "block/mlp/dense2": "features.{s}.{b}.block.5",
        "norm": "classifier.0",
    },
    stage=lambda stage: 2 * stage + 1,
    down=lambda stage: 2 * stage,
    scale="features.{s}.{b}.layer_scale",
    scale_axes=(-1, 1, 1),
)
_HUGGINGFACE = _Names(
    {
        "stem/conv": "embeddings.patch_embeddings",
        "stem/norm": "embeddings.layernorm",
        "downsample/norm": "encoder.stages.{s}.downsampling_layer.0",
        "downsample/conv": "encoder.stages.{s}.downsampling_layer.1",
        "block/conv": "encoder.stages.{s}.layers.{b}.dwconv",
        "block/norm": "encoder.stages.{s}.layers.{b}.layernorm",
        "block/mlp/dense1": "encoder.stages.{s}.layers.{b}.pwconv1",
        "block/mlp/response": "encoder.stages.{s}.layers.{b}.grn",
        "block/mlp/dense2": "encoder.stages.{s}.layers.{b}.pwconv2",
        "norm": "layernorm",
    },
    scale="encoder.stages.{s}.layers.{b}.layer_scale_parameter",
)
_DINOV3 = _Names(
    {
        "stem/conv": "stages.0.downsample_layers.0",
        "stem/norm": "stages.0.downsample_layers.1",
        "downsample/norm": "stages.{s}.downsample_layers.0",
        "downsample/conv": "stages.{s}.downsample_layers.1",
        "block/conv": "stages.{s}.layers.{b}.depthwise_conv",
        "block/norm": "stages.{s}.layers.{b}.layer_norm",
        "block/mlp/dense1": "stages.{s}.layers.{b}.pointwise_conv1",
        "block/mlp/dense2": "stages.{s}.layers.{b}.pointwise_conv2",
        "norm": "layer_norm",
    },
    scale="stages.{s}.layers.{b}.gamma",
)


def _shapes(tensors: Mapping[str, np.ndarray], names: _Names) -> dict[str, Any]:
    """What the shapes say: depths, widths, patches, and which version."""
    depths, widths = [], []
    while _conv(names, len(depths) + 1, 1) in tensors:
        stage, depth = len(depths) + 1, 1
        widths.append(tensors[_conv(names, stage, 1)].shape[0])
        while _conv(names, stage, depth + 1) in tensors:
            depth += 1
        depths.append(depth)
    stem = names.entry("params/stem/conv/kernel").names[0]
    if not depths or stem not in tensors:
        missing = stem if stem not in tensors else _conv(names, 1, 1)
        raise ValueError(f"missing {missing}, which tells the shape of the network")
    scale = names.entry("params/stage1/block1/scale").names[0]
    responses = (
        names.entry("params/stage1/block1/mlp/response/scale").names[0]
        if "block/mlp/response" in names.modules
        else ""
    )
    return {
        "depths": tuple(depths), "widths": tuple(widths),
        "patch_size": tensors[stem].shape[-1],
        "layer_scale": scale in tensors, "response_norm": responses in tensors,
    }  # fmt: skip


def _conv(names: _Names, stage: int, block: int) -> str:
    return names.entry(f"params/stage{stage}/block{block}/conv/kernel").names[0]


# What timm's model_args may say: the tensors tell it, or it is of training alone.
_TOLD = {"depths", "dims", "use_grn", "ls_init_value", "drop_path_rate", "drop_rate", "num_classes",
         "in_chans", "patch_size", "global_pool", "norm_eps"}  # fmt: skip


def _network(names: _Names) -> Callable:
    def network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
        options = _shapes(tensors, names)
        config = configs.get("config.json") or {}
        model = mapping.timm_arguments(config, _TOLD)
        mapping.timm_pooling(config, {"avg": "mean"})
        named = mapping.named_options(configs, "norm_epsilon", "inner_epsilon")
        # timm's CLIP tower has another one by its name alone.
        xxlarge = "convnext_xxlarge" in str(config.get("architecture", ""))
        usual = model.get("norm_eps", 1e-5 if xxlarge else 1e-6)
        options["norm_epsilon"] = named.get("norm_epsilon", usual)
        # These writers have one for all norms.  Our own header tells the last from the others.
        if not own_record(configs):
            options["inner_epsilon"] = options["norm_epsilon"]
        assumed = () if "pretrained_cfg" in config or "norm_epsilon" in named else (
            "1e-06 under the root of every norm (--norm-epsilon), exact GELU",
        )  # fmt: skip
        return Network("convnext", options | named, assumed)

    return network


def _huggingface_network(names: _Names, kinds: tuple[str, ...], epsilon: float) -> Callable:
    def network(tensors: Mapping[str, np.ndarray], configs: Mapping[str, Any]) -> Network:
        config = mapping.read_config(configs, "what is under the root of the last norm")
        choices = {"model_type": kinds, "num_channels": (3,), "hidden_act": ("gelu",)}
        mapping.check_config(config, choices)
        told = config.get("layer_norm_eps", epsilon)
        if type(told) not in (int, float) or not 0 <= told < 1:
            raise ValueError(f"config.json: layer_norm_eps is {told!r}")
        options = _shapes(tensors, names) | {"norm_epsilon": told}
        # In DINOv3's it is of all norms; in the others of the last one.
        inner = {"inner_epsilon": told} if names is _DINOV3 else {}
        return Network("convnext", options | inner)

    return network


def _prepare(tensors: dict[str, np.ndarray], _: int | None) -> dict[str, np.ndarray]:
    """Convolutions of one pixel, in some of timm's MLPs, are dense layers."""
    return {
        name: x[:, :, 0, 0] if ".mlp.fc" in name and x.shape[2:] == (1, 1) else x
        for name, x in tensors.items()
    }


def _layout(
    name: str, source: str, names: _Names, prefix: str, dropped: str, network: Callable
) -> Layout:
    stem, block = (re.escape(x) for x in (
        names.entry("params/stem/norm/scale").names[0], _conv(names, 1, 1)
    ))  # fmt: skip
    matches = mapping.has(f"{prefix}{stem}", f"{prefix}{block}")
    rename = rename_below(f"^{prefix}", dropped)
    return Layout(name, source, matches, rename, network, names.entries, _prepare)


LAYOUTS: tuple[Layout, ...] = (
    _layout(
        "timm-convnext", "timm's ConvNeXts, V1 and V2", _TIMM, "", r"head\.fc\.", _network(_TIMM)
    ),
    _layout(
        "convnext",
        "the ConvNeXt releases of its authors, V1 and V2",
        _AUTHORS,
        "",
        r"head\.|decoder\.|proj\.|pred\.|mask_token$",
        _network(_AUTHORS),
    ),
    _layout(
        "torchvision-convnext",
        "torchvision's ConvNeXts",
        _TORCHVISION,
        "",
        r"classifier\.2\.",
        _network(_TORCHVISION),
    ),
    _layout(
        "huggingface-convnext",
        "transformers' ConvNeXt and ConvNeXt V2 models",
        _HUGGINGFACE,
        r"(convnext(v2)?\.)?",
        r"classifier\.",
        _huggingface_network(_HUGGINGFACE, ("convnext", "convnextv2"), 1e-12),
    ),
    _layout(
        "huggingface-dinov3-convnext",
        "transformers' DINOv3 ConvNeXts",
        _DINOV3,
        r"(model\.)?",
        r"classifier\.",
        _huggingface_network(_DINOV3, ("dinov3_convnext",), 1e-6),
    ),
)
