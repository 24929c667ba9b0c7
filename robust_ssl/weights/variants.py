"""Networks that have a plain ResNet's tensors and compute something else.

A stride in another convolution, a blur before it or dilation leave no trace in a ResNet's tensors.
What a file's name, its own words, its other tensors or its JSON say of them is therefore looked at;
where nothing speaks of them a plain network is assumed, and said to be.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

# A word in a name of timm, of Caffe's or of TensorFlow's networks.
_NAMES = re.compile(
    r"(?<![a-z])(resnet-?(blur|aa|rs|v2)\w*|blur-?pool\w*|aa|antialias\w*|lpf\d|caffe\d?|msra|bgr"
    r"|detectron\d?|dilated|deeplab\w*|fcn|pspnet|(?<!\d)dc5(?!\d)|os(8|16)"
    r"|resnet-?\d+[cdst])(?![a-z])",
    re.IGNORECASE,
)
# A convolution of a network of segmentation, beside its ResNet.
_SEGMENTATION = re.compile(r"(^|.*\.)(aux_)?classifier\.\d+\.weight")
_PLAIN = re.compile(r"(tv_)?resnet(18|34|50|101|152)")
# Entries of a network's options that change it and leave its tensors as they are, and what each
# must be.
_OPTIONS = {
    "aa_layer": (None, ""), "anti_alias": (False, None), "antialias": (False, None),
    "avg_down": (False, None), "blur": (False, None), "block_reduce_first": (1, None),
    "deep_stem": (False, None), "dilation": (1, None), "dilations": ((1, 1, 1, 1), None),
    "output_stride": (32, None), "replace_stride_with_dilation": (None, (False,) * 3),
    "stride_in_1x1": (False, None), "strides": ((1, 2, 2, 2), None),
    "style": ("pytorch", None), "act_layer": ("relu", None), "zero_init_last": (True, False),
    "global_pool": ("avg", "", None),
}  # fmt: skip
_NAMED = "if it is a plain one all the same, name it: --variant plain"
# timm's ViT that norms after each branch has the tensors of one that norms before it.
_VIT_NAMES = re.compile(r"(?<![a-z])(rpn|res-?post-?norm)(?![a-z])", re.IGNORECASE)
# What a Perception Encoder is called.
_ROTARY_NAMES = re.compile(
    r"(?<![a-z])(pe[-_](core|lang|spatial)|perception[-_ ]encoder)(?![a-z])", re.IGNORECASE
)


def assumed(configs: Mapping[str, Any], builder: str) -> tuple[str, ...]:
    """Returns what is assumed of a network of which nothing says that it is a plain one."""
    # A config of timm names the network; `check` has refused any other than a plain one.
    if _is_told(configs) or "pretrained_cfg" in (configs.get("config.json") or {}):
        return ()
    where = "convolution" if builder in ("resnet18", "resnet34") else "3x3 convolution"
    return (f"a plain ResNet as torchvision's: stride in the first {where} of a stage, no blur, "
            "no dilation (--variant plain)",)  # fmt: skip


def _is_told(configs: Mapping[str, Any]) -> bool:
    own = (configs.get("__metadata__") or {}).get("robust_ssl")
    return bool(own) or configs.get("options", {}).get("variant") == "plain"


def check(configs: Mapping[str, Any]) -> None:
    """Raises ValueError where a file's name, words, tensors or JSON speak of a variant.

    Args:
      configs: As `Layout.network` takes them.
    """
    variant = configs.get("options", {}).get("variant")
    if variant not in (None, "plain"):
        raise ValueError(f"variant={variant!r}: only plain ResNets are known, --variant plain")
    _check_timm(configs.get("config.json") or {})
    if _is_told(configs):
        return
    otherwise = "strides, dilates, blurs or pools otherwise"
    _check_words(configs, _NAMES, f"has a plain ResNet's tensors and {otherwise}")
    _check_segmentation(configs.get("shapes") or {})
    wrong = [
        f"{key} is {value!r}"
        for key, value in _entries(configs.get("config.json") or {})
        if not any(_same(value, choice) for choice in _OPTIONS[key])
    ]
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}, which no plain ResNet has; {_NAMED}")


def check_vit(configs: Mapping[str, Any]) -> None:
    """Raises ValueError where a file's name or words speak of a ViT that is another one."""
    if not _is_told(configs):
        _check_words(configs, _VIT_NAMES, "has a plain ViT's tensors and norms after its branches")
        _check_words(configs, _ROTARY_NAMES, "has a ViT's tensors and rotary positions besides")


def is_called(configs: Mapping[str, Any], word: str) -> bool:
    """Whether a file's name, words or JSON speak of something."""
    return any(word in text.lower() for _, text in _texts(configs))


def _check_words(configs: Mapping[str, Any], words: re.Pattern, what: str) -> None:
    for where, text in _texts(configs):
        word = words.search(text)
        if word:
            raise ValueError(f"{where} is {text!r}: {word[0]!r} is a variant that {what}; {_NAMED}")


def _check_segmentation(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A classifier of places, not of images, stands beside a ResNet that is mostly dilated."""
    if not any(re.search(r"(^|\.)backbone\.", name) for name in shapes):
        return
    for name, shape in shapes.items():
        if len(shape) == 4 and _SEGMENTATION.fullmatch(name):
            raise ValueError(
                f"{name} is a convolution beside a backbone: networks of segmentation dilate "
                f"theirs, which no tensor tells; {_NAMED}"
            )


def _check_timm(config: Mapping[str, Any]) -> None:
    """A config of timm says for certain what the network is."""
    if "pretrained_cfg" not in config:
        return
    architecture = str(config.get("architecture", ""))
    if not _PLAIN.fullmatch(architecture):
        raise ValueError(
            f"the JSON beside the weights: architecture {architecture!r} is no plain ResNet-18, "
            "34, 50, 101 or 152"
        )
    # Options such as another stem or stride leave the tensors' names as they are.
    changed = {
        key
        for key, value in (config.get("model_args") or {}).items()
        if key not in ("num_classes", "in_chans", "drop_rate", "drop_path_rate")
        and not any(_same(value, choice) for choice in _OPTIONS.get(key, ()))
    }
    if changed:
        raise ValueError(f"config.json: model_args changes the network: {sorted(changed)}")


def _texts(configs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where a network's name may stand."""
    path = pathlib.Path(configs.get("path") or "")
    yield "the file's name", path.name
    # Of a published folder; a lone file's folder is its owner's.
    if path.name.startswith(("model.safetensors", "pytorch_model.bin")):
        yield "the folder's name", path.parent.name
    checkpoint = configs.get("checkpoint") or {}
    for key in ("arch", "architecture", "model_name", "model", "backbone"):
        if key in checkpoint:
            yield f"{key} in the file", checkpoint[key]
    config = configs.get("config.json") or {}
    for key in ("architecture", "arch", "model_name", "backbone"):
        if isinstance(config.get(key), str):
            yield f"{key} in the JSON beside the weights", config[key]


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for table in (config, *nested):
        for key, value in table.items():
            if key in _OPTIONS:
                yield key, value


def _same(value: Any, choice: Any) -> bool:
    # JSON has lists where Python has tuples.
    return (tuple(value) if isinstance(value, list) else value) == choice
