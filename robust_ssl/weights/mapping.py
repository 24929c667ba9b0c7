"""Names of foreign weights against ours: one table, read forwards to import, backwards to export.

A layout lists an `Entry` for every variable of a network: its path in our tree, the foreign
tensor or tensors it is made of, and how the numbers are arranged there.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from robust_ssl.types import Encoder


@dataclasses.dataclass(frozen=True)
class Kind:
    """How numbers are arranged in the foreign file.

    Attributes:
      join: Foreign arrays to ours.
      split: Our array to the foreign ones, given how many there are; the inverse of `join`.
    """

    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray, int], Sequence[np.ndarray]]


def _one(forward: Callable, backward: Callable) -> Kind:
    return Kind(lambda arrays: forward(arrays[0]), lambda array, count: [backward(array)])


# Each pair is exact: no number is computed, only moved, so files come back bit for bit.
COPY = _one(lambda x: x, lambda x: x)
CONV = _one(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
DENSE = _one(np.transpose, np.transpose)  # [out, in], [in, out]
# Several dense layers over the same input that are one here: queries, keys and values.
STACKED_DENSE = Kind(
    lambda arrays: np.concatenate([x.T for x in arrays], axis=1),
    lambda array, count: [x.T for x in np.split(array, count, axis=1)],
)
STACKED_BIAS = Kind(
    lambda arrays: np.concatenate(arrays), lambda array, count: np.split(array, count)
)


def patches(patch_size: int) -> Kind:
    """A strided convolution ``[out, 3, patch, patch]`` that is a dense layer on patches here."""
    return _one(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1),
    )


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variable of ours and what it is called elsewhere.

    Attributes:
      path: Ours, ``"params/stage1/block1/conv1/conv/kernel"``.
      names: The foreign tensors it is made of, in order.
      kind: How they are arranged.
    """

    path: str
    names: tuple[str, ...]
    kind: Kind = COPY


class Network(NamedTuple):
    """A network as a file tells of it.

    Attributes:
      builder: The builder's name in `robust_ssl.models`.
      options: Its options.
      assumed: What neither the file nor anyone says and is filled in, for people.
    """

    builder: str
    options: dict[str, Any]
    assumed: tuple[str, ...] = ()


def _as_they_are(tensors: dict[str, np.ndarray], _: int | None) -> dict[str, np.ndarray]:
    return tensors


def _must_be_named(names: Set[str], configs: Mapping[str, Any]) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which encoders are named in files.

    Attributes:
      name: What `--layout` calls it, ``"torchvision-resnet"``.
      source: Who writes such files, for people.
      matches: Whether a file's tensor names look like this layout; the first that does is taken.
      rename: A file's tensor name to the name in `entries`, without wrappers' prefixes; None for
        what is dropped on purpose (projector, classifier, momentum copy, counters).  A name it
        does not know comes back as it is, and `join` reports it.
      network: The network, worked out from the renamed tensors' shapes and what is said beside
        them: JSON files by file name, ``"options"`` that are named, the ``"names"`` and
        ``"shapes"`` in the file, its ``"path"``.  Raises ValueError that says what must be named
        where they do not tell (stem padding, attention heads) and where this layout's writers
        differ.
      entries: Every variable of such an encoder.
      prepare: Brings renamed tensors into the form that `entries` has, where writers differ in it;
        told the image size, pixels, where one is known.
      resizing: How this writer resizes positions, a name of `models.RESIZINGS`, from the names in
        the file and what is said beside it; None where it must be named.
    """

    name: str
    source: str
    matches: Callable[[Set[str]], bool]
    rename: Callable[[str], str | None]
    network: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], Network]
    entries: Callable[[Encoder], list[Entry]]
    prepare: Callable[[dict[str, np.ndarray], int | None], dict[str, np.ndarray]] = _as_they_are
    resizing: Callable[[Set[str], Mapping[str, Any]], str | None] = _must_be_named


def has(*patterns: str, but: str = "nothing at all") -> Callable[[Set[str]], bool]:
    """Makes `Layout.matches`: each pattern is a whole name in the file, and `but` is none."""
    required, excluded = [re.compile(pattern) for pattern in patterns], re.compile(but)

    def matches(names: Set[str]) -> bool:
        present = all(any(pattern.fullmatch(name) for name in names) for pattern in required)
        return present and not any(excluded.fullmatch(name) for name in names)

    return matches


def timm_arguments(config: Mapping[str, Any], known: Set[str]) -> Mapping[str, Any]:
    """Returns what timm's config says of the network's making, its ``model_args``.

    Raises:
      ValueError: If one is not among the known ones: it may change the network.
    """
    model = config.get("model_args") or {}
    changed = sorted(set(model) - known)
    if changed:
        raise ValueError(f"config.json: model_args changes the network: {changed}")
    return model


def timm_pooling(config: Mapping[str, Any], poolings: Mapping[str, str]) -> str | None:
    """Returns what timm's config says of pooling, in our words.

    Args:
      config: timm's ``config.json``.
      poolings: Those that a layout knows, timm's words to ours.

    Returns:
      One of ours; None where the architecture's own is meant.

    Raises:
      ValueError: If it is not among the known ones.

    Example:
      >>> timm_pooling({"global_pool": "avg"}, {"avg": "mean"})
      'mean'
    """
    pool = config.get("global_pool", (config.get("model_args") or {}).get("global_pool"))
    if pool in (None, ""):
        return None
    if pool not in poolings:
        raise ValueError(
            f"config.json: global_pool (open_clip's timm_pool) is {pool!r}; known here: "
            f"{', '.join(poolings)}"
        )
    return poolings[pool]


def with_timm_tower(configs: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Returns what stands beside the weights, and timm's config where open_clip has a tower of it.

    open_clip names architecture and pooling in its own file.  Layouts read them as timm's.

    Args:
      configs: JSON files by file name.
      names: Of the file's tensors.

    Example:
      >>> vision = {"timm_model_name": "convnext_xxlarge", "timm_pool": ""}
      >>> beside = {"open_clip_config.json": {"model_cfg": {"vision_cfg": vision}}}
      >>> with_timm_tower(beside, ["visual.trunk.stem.0.weight"])["config.json"]["architecture"]
      'convnext_xxlarge'
    """
    vision: Any = configs
    for key in ("open_clip_config.json", "model_cfg", "vision_cfg"):
        vision = vision.get(key) if isinstance(vision, Mapping) else None
    tower = any("visual.trunk." in name for name in names)
    if not (tower and isinstance(vision, Mapping) and vision.get("timm_model_name")):
        return configs
    config = {
        "architecture": str(vision["timm_model_name"]).partition(".")[0],  # the rest is a tag
        "global_pool": vision.get("timm_pool", "avg"),  # open_clip's default
        "pretrained_cfg": (configs.get("config.json") or {}).get("pretrained_cfg", {}),
    }
    return {**configs, "config.json": config}


def named_options(configs: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Returns those of some builder options that the caller, or our own header, has named."""
    options = configs.get("options", {})
    return {key: options[key] for key in keys if key in options}


# What trainings have beside an encoder, by the first word of its name; none of it is of a network
# whose layout is here.
_OTHER_PARTS = re.compile(
    r"(projector|projection_head|projection|proj_head|predictor|prediction_head|prototypes?"
    r"|head|heads|classifiers?|classification_head|linear|linear_head|neck|decoder|decoder_\w+"
    r"|mask_token|masked_embed|mask_embed|dino_head|ibot_head|dino_loss|dino_loss_func|ibot_loss"
    r"|ibot_patch_loss|koleo_loss|criterion|loss|center|queue\w*|queue_ptr|memory|memory_bank"
    r"|momentum_\w+|bn|whitening|online_classifier|logit_scale|logit_bias|student|ema|n_averaged)(\.|$)"
)


def is_other_part(name: str) -> bool:
    """Whether a name is of a part that trainings have beside an encoder.

    Example:
      >>> is_other_part("projection_head.0.weight"), is_other_part("bn1.weight")
      (True, False)
      >>> is_other_part("n_averaged")  # of torch's AveragedModel
      True
    """
    return bool(_OTHER_PARTS.match(name))


def read_config(configs: Mapping[str, Any], tells: str) -> Mapping[str, Any]:
    """Returns the ``config.json`` that transformers writes; `tells` is what it is needed for."""
    config = configs.get("config.json")
    if config is None and "robust_ssl" in (configs.get("__metadata__") or {}):
        return {}  # our own header tells all of it, and goes over what is taken for it here
    if config is None:
        raise ValueError(
            f"there is no config.json, which says {tells}; give the folder that save_pretrained "
            "wrote"
        )
    return config


def check_config(
    config: Mapping[str, Any],
    choices: Mapping[str, tuple[Any, ...]],
    file: str = "config.json",
) -> None:
    """Raises ValueError where a network's config asks for what no network of this package does.

    transformers leaves out what is its default, which is the first of each key's choices.
    """
    wrong = [
        f"{key} is {config[key]!r}, which is none of {values}"
        for key, values in choices.items()
        if config.get(key, values[0]) not in values
    ]
    if wrong:
        raise ValueError(f"{file}: " + "; ".join(wrong))


def join(
    entries: Sequence[Entry],
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    where: str,
) -> dict[str, np.ndarray]:
    """Returns our arrays, float32, by path; every foreign tensor must be used, every path filled.

    Args:
      entries: The whole network.
      tensors: Foreign tensors by name, wrappers' prefixes already removed.
      expected: Our leaves by path, anything with a shape.
      where: What errors call the file.

    Raises:
      ValueError: A list of all that is missing, unexpected, transposed or of a wrong shape.
    """
    names = dict.fromkeys(itertools.chain.from_iterable(entry.names for entry in entries))
    problems = [f"missing {name}" for name in names if name not in tensors]
    problems += [f"unexpected {name} {x.shape}" for name, x in tensors.items() if name not in names]
    arrays = {}
    for entry in entries:
        if any(name not in tensors for name in entry.names):
            continue
        # What the way back makes of an empty array of bytes has the foreign shapes.
        parts = entry.kind.split(np.empty(expected[entry.path].shape, np.int8), len(entry.names))
        wrong = []
        for name, part in zip(entry.names, parts, strict=True):
            shape = tensors[name].shape
            if shape != part.shape:
                turned = sorted(part.shape) == sorted(shape)
                hint = " (are its axes transposed?)" if turned else ""
                wrong.append(f"{name} has shape {shape}, the network needs {part.shape}{hint}")
        problems += wrong
        if not wrong:
            joined = entry.kind.join([np.asarray(tensors[name]) for name in entry.names])
            arrays[entry.path] = np.ascontiguousarray(joined, dtype=np.float32)
    uncovered = expected.keys() - {entry.path for entry in entries}
    problems += [f"no foreign name is known for {path}" for path in sorted(uncovered)]
    if problems:
        raise ValueError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join(problems))
    return arrays


def split(entries: Sequence[Entry], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns foreign tensors by name from our arrays by path: the way back of `join`.

    Example:
      >>> entry = Entry("params/dense/kernel", ("fc.weight",), DENSE)
      >>> split([entry], {"params/dense/kernel": np.zeros((2, 3), np.float32)})["fc.weight"].shape
      (3, 2)
    """
    tensors = {}
    for entry in entries:
        parts = entry.kind.split(arrays[entry.path], len(entry.names))
        for name, part in zip(entry.names, parts, strict=True):
            # Transposed views, written out in the order that files have.
            tensors[name] = np.ascontiguousarray(part)
    return tensors
