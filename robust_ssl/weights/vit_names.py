"""Names of vision transformers against ours, and what the shapes of their tensors tell."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from robust_ssl.types import Encoder
from robust_ssl.weights import mapping
from robust_ssl.weights.mapping import COPY, DENSE, STACKED_BIAS, STACKED_DENSE, Entry, Kind

Tensors = Mapping[str, np.ndarray]
Configs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Names:
    """A naming scheme.

    Attributes:
      table: Our module or parameter, ``"block/attention/qkv"``, to theirs, with ``{}`` for the
        number of the block from 0; several where one of ours is several of theirs.
      kinds: Arrangements that are this scheme's own.
    """

    table: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def of(self, module: str, leaf: str = "", block: int = 0) -> tuple[str, ...]:
        """Returns the foreign names of a module's leaf."""
        end = {"": "", "kernel": ".weight", "scale": ".weight", "bias": ".bias"}[leaf]
        # Torch's MultiheadAttention has no dot there: in_proj_weight.
        return tuple(
            name.format(block) + (end.replace(".", "_") if name.endswith("in_proj") else end)
            for name in self.table[module]
        )

    def entries(self, encoder: Encoder) -> list[Entry]:
        """Returns an entry for every variable of an encoder."""
        paths = traverse_util.flatten_dict(encoder.variables, sep="/")
        return [self._entry(path, encoder.module) for path in paths]

    def _entry(self, path: str, module: Any) -> Entry:
        where, leaf = path.removeprefix("params/"), ""
        if where.rpartition("/")[2] in ("kernel", "scale", "bias"):
            where, _, leaf = where.rpartition("/")
        # Ours count from 1, theirs from 0.
        number = re.match(r"block(\d+)/", where)
        where = re.sub(r"^block\d+/", "block/", where)
        if where.startswith("block/mlp/") and module.activation == "swiglu":
            where = where.replace("mlp", "gated")
        if where == "norm" and module.norm_after_pooling:
            where = "pooled_norm"
        names = self.of(where, leaf, int(number[1]) - 1 if number else 0)
        return Entry(path, names, self._kind(where, leaf, len(names), module.patch_size))

    def _kind(self, where: str, leaf: str, count: int, patch_size: int) -> Kind:
        if where in self.kinds:
            return self.kinds[where]
        if leaf == "kernel":
            if where == "embed/patch":
                return mapping.patches(patch_size)
            return DENSE if count == 1 else STACKED_DENSE
        return COPY if count == 1 else STACKED_BIAS


def names(table: Mapping[str, str | tuple[str, ...]], **options: Any) -> Names:
    """Returns the naming scheme of a table, in which one name needs no tuple."""
    tuples = {key: (name,) if isinstance(name, str) else name for key, name in table.items()}
    return Names(tuples, **options)


def shape_options(
    tensors: Tensors, names: Names, gated: bool = False, image_size: int | None = None
) -> dict[str, Any]:
    """Returns what the shapes say about a network.

    Args:
      tensors: By their names in the scheme.
      names: The scheme.
      gated: Whether its MLPs are.
      image_size: Of a network without positions, whose shapes do not tell it, pixels.

    Raises:
      ValueError: If a tensor that tells something is missing or of no sensible shape.
    """

    def tensor(where: str, leaf: str = "") -> np.ndarray:
        name = names.of(where, leaf)[0]
        if name not in tensors:
            raise ValueError(f"missing {name}, which tells the shape of the network")
        return tensors[name]

    patch = tensor("embed/patch", "kernel").shape
    if len(patch) != 4 or patch[1] != 3 or patch[2] != patch[3]:
        raise ValueError(
            f"{names.of('embed/patch', 'kernel')[0]} has shape {patch}, a ViT needs "
            "[width, 3, patch, patch] (are its axes transposed?)"
        )
    # Of two names, gate and values; one holds both, half each.
    dense = "block/gated/dense1" if gated else "block/mlp/dense1"
    halves = 2 if gated and len(names.table[dense]) == 1 else 1
    options = {
        "width": patch[0],
        "depth": _depth(tensors, names),
        "patch_size": patch[2],
        "mlp_width": tensor(dense, "kernel").shape[0] // halves,
    }
    if image_size is not None:
        return options | {"image_size": image_size}
    side, class_token = _grid(names.of("embed/position")[0], tensor("embed/position"), patch[0])
    pooling = "token" if class_token else "mean"
    return options | {
        "image_size": side * patch[2], "class_token": class_token, "pooling": pooling
    }  # fmt: skip


def _grid(name: str, position: np.ndarray, width: int) -> tuple[int, bool]:
    """How many patches are along a side, and whether there is a class token."""
    count = position.size // width
    side = math.isqrt(count)
    # A square of patches, or a square and one: no number above 1 is both.
    class_token = side * side != count
    if position.size % width or (class_token and side * side + 1 != count):
        raise ValueError(
            f"{name} has shape {position.shape}, which is not positions of width {width} for a "
            "square of patches, with or without one class token"
        )
    return side, class_token


def _depth(tensors: Tensors, names: Names) -> int:
    block = re.escape(names.table["block/norm1"][0].partition("{}")[0]) + r"(\d+)\."
    matches = [re.match(block, name) for name in tensors]
    numbers = [int(match[1]) for match in matches if match]
    return 1 + min(max(numbers), len(tensors))  # a gap is reported, a wild number is not built


def check_sizes(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError where a config contradicts what the shapes tell of image and patches.

    Positions of 2 x 8 patches are as many as those of 4 x 4, so only a config tells them apart.
    """
    table = {**(config.get("model_args") or {}), **config}
    for key, option in (("image_size",) * 2, ("img_size", "image_size"), ("patch_size",) * 2):
        value = table.get(key)
        if value is None:
            continue
        sides = list(value) if isinstance(value, list | tuple) else [value]
        if len(set(sides)) > 1:
            raise ValueError(
                f"config.json: {key} {sides} is no square; an encoder here takes squares"
            )
        if sides[:1] != [options[option]]:
            raise ValueError(
                f"config.json: {key} is {value!r}, and the tensors are of {options[option]}; take "
                "the config that was saved with them"
            )
    size = (config.get("pretrained_cfg") or {}).get("input_size") or [0]
    if len(set(size[1:])) > 1:
        raise ValueError(f"config.json: images of {size[1:]} are no squares")


def rename_below(
    prefix: str, dropped: str, changes: tuple[tuple[str, str], ...] = ()
) -> Callable[[str], str | None]:
    """Takes a prefix off, then drops what `dropped` matches, then writes new names the old way."""
    first, drop = re.compile(prefix), re.compile(dropped)
    steps = [(re.compile(pattern), new) for pattern, new in changes]

    def rename(name: str) -> str | None:
        name = first.sub("", name, count=1)
        if drop.match(name):
            return None
        for pattern, new in steps:
            name = pattern.sub(new, name)
        return name

    return rename
