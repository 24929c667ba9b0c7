"""Encoders on disk: a safetensors file and a JSON card beside it, and the ones the package ships.

A saved encoder is a directory of two files.  ``encoder.safetensors`` holds every variable in
float32 under its path, ``params/stem/conv/kernel``.  ``encoder.json`` says how to build the network
those belong to, the SHA-256 of the weights (safetensors itself does not notice a flipped bit), and
whatever its maker wants to tell: how it was trained, how accurate it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from robust_ssl.models import preprocessing, resnet, vit
from robust_ssl.types import Encoder

SCHEMA = 1
WEIGHTS_FILE = "encoder.safetensors"
CARD_FILE = "encoder.json"

# A card names its builder; only these names are ever called, whatever the card says.
_BUILDERS = {
    f"robust_ssl.models:{builder.__name__}": builder
    for builder in (
        resnet.resnet18, resnet.resnet34, resnet.resnet50, resnet.resnet101, resnet.resnet152,
        vit.vit_tiny, vit.vit_small, vit.vit_base, vit.vision_transformer,
    )
}  # fmt: skip
RESNETS = {
    (resnet.BasicBlock, (2, 2, 2, 2)): "resnet18",
    (resnet.BasicBlock, (3, 4, 6, 3)): "resnet34",
    (resnet.Bottleneck, (3, 4, 6, 3)): "resnet50",
    (resnet.Bottleneck, (3, 4, 23, 3)): "resnet101",
    (resnet.Bottleneck, (3, 8, 36, 3)): "resnet152",
}
_VIT_OPTIONS = (
    "width", "heads", "depth", "patch_size", "mlp_width", "pooling", "class_token",
    "norm_after_pooling", "registers", "pre_norm", "patch_bias", "layer_scale", "activation",
    "norm_epsilon",
)  # fmt: skip
# The same for an input transformation.
_STEPS = {
    step.__name__: step
    for step in (preprocessing.JPEG, preprocessing.Quantize, preprocessing.Smooth)
}


def save_encoder(
    encoder: Encoder,
    directory: str | os.PathLike,
    card: Mapping[str, Any] | None = None,
    *,
    builder: Callable[..., Encoder] | None = None,
    options: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes an encoder as ``encoder.safetensors`` and ``encoder.json``.

    Args:
      encoder: What to save; every variable float32 and finite.
      directory: Made if it is not there; the two files in it are replaced.
      card: Anything JSON can say: configuration, accuracy, provenance.
      builder: Only for a network that is not one of `robust_ssl.models`: the function
        ``builder(key, **options) -> Encoder`` that makes it, needed again to load it.
      options: Keyword arguments of `builder`, as JSON values.

    Returns:
      The directory.

    Raises:
      ValueError: If the encoder cannot be rebuilt from what would be written (its input
        transformation is not one of `robust_ssl.models.preprocessing`), a variable is not finite
        float32, or the card is not JSON (NaN is not).

    Example:
      >>> import tempfile
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=16)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_encoder(encoder, folder, {"data": "none"})
      ...     load_encoder(folder).name
      'resnet18'
    """
    from safetensors.numpy import save

    if builder is None:
        builder_name, options = builder_of(encoder.replace(preprocess=None))
        builder = _BUILDERS[builder_name]
    else:
        builder_name = f"{builder.__module__}:{builder.__qualname__}"
        options = dict(options or {})
    arrays = {path: np.asarray(leaf) for path, leaf in flat(encoder.variables).items()}
    skeleton = build_skeleton(builder, options, "the encoder to save").replace(name=encoder.name)
    preprocess = {}
    if encoder.preprocess not in (None, skeleton.preprocess):
        preprocess = describe_preprocess(encoder.preprocess)
        skeleton = skeleton.replace(preprocess=encoder.preprocess)
    if _static(skeleton) != _static(encoder):
        raise ValueError(
            f"{builder_name}({options}) does not rebuild this encoder:\n  {_static(skeleton)}\n"
            f"against\n  {_static(encoder)}\npass builder= and options= that do"
        )
    check_arrays(arrays, flat(skeleton.variables), "the encoder to save")
    weights = save(arrays)
    record = {
        "schema": SCHEMA,
        "name": encoder.name,
        "builder": builder_name,
        "options": options,
        **preprocess,
        "weights": describe_file(WEIGHTS_FILE, weights),
        "card": dict(card or {}),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / WEIGHTS_FILE, weights)  # first: an interruption shows as a wrong sum
    replace_file(directory / CARD_FILE, text.encode())
    return directory


def load_encoder(
    name_or_path: str | os.PathLike, *, builder: Callable[..., Encoder] | None = None
) -> Encoder:
    """Reads an encoder and checks all of it before a single weight is used.

    Nothing that the files say is executed: the card may only name a public builder of
    `robust_ssl.models`, and its options are data.

    Args:
      name_or_path: A name of `list_encoders`, or the directory that `save_encoder` wrote (write
        ``"./name"`` for a directory that is called like a shipped encoder).
      builder: ``builder(key, **options) -> Encoder``, for a network of your own; it is called
        under `jax.eval_shape`, so no weights are made.

    Returns:
      The `Encoder`, bit-equal to the one that was saved.

    Raises:
      ValueError: If the name is not known, the card is not valid, or the weights differ from the
        card or from the network: truncated, changed, missing, unexpected, wrong in shape or
        dtype, not finite.
      FileNotFoundError: If the directory or one of its files is not there.

    Example:
      >>> load_encoder("resnet-of-dreams")
      Traceback (most recent call last):
      ...
      ValueError: no encoder named 'resnet-of-dreams'...
    """
    folder = _locate(name_or_path)
    record = _read_card(folder)
    if builder is None:
        builder = _allowed_builder(record["builder"], folder)
    where = f"{folder}/{CARD_FILE}"
    skeleton = build_skeleton(builder, record["options"], where)
    preprocess = read_preprocess(record, where) or skeleton.preprocess
    variables = read_variables(folder, WEIGHTS_FILE, record["weights"], skeleton.variables)
    return skeleton.replace(variables=variables, name=record["name"], preprocess=preprocess)


def encoder_card(name_or_path: str | os.PathLike) -> dict[str, Any]:
    """Returns what ``encoder.json`` says, without reading any weights.

    Args:
      name_or_path: As in `load_encoder`.

    Returns:
      ``{"name", "builder", "options", "weights": {"sha256", ...}, "card": {...}}``.

    Raises:
      ValueError: If the name is not known or the card is not valid.
      FileNotFoundError: If the directory or its card is not there.
    """
    return _read_card(_locate(name_or_path))


def list_encoders() -> list[str]:
    """Returns the names of the encoders that the package ships, sorted."""
    zoo = resources.files("robust_ssl.zoo")
    return sorted(entry.name for entry in zoo.iterdir() if entry.joinpath(CARD_FILE).is_file())


def _locate(name_or_path):
    """A directory of the zoo (a `Traversable`, which may lie in a zip) or of the file system."""
    names = list_encoders()
    if isinstance(name_or_path, str) and name_or_path in names:
        return resources.files("robust_ssl.zoo").joinpath(name_or_path)
    path = pathlib.Path(name_or_path)
    if path.is_dir():
        return path
    if len(path.parts) > 1 or not isinstance(name_or_path, str):
        raise FileNotFoundError(f"no directory {path}: an encoder is a directory of two files")
    near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.4)
    raise ValueError(
        f"no encoder named {name_or_path!r} and no directory of this name; "
        + (f"near: {', '.join(near)}; " if near else "")
        + f"shipped: {', '.join(names) or 'none'}"
    )


def _read(folder, name: str) -> bytes:
    file = folder.joinpath(name)
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {name}; save_encoder writes {WEIGHTS_FILE} and {CARD_FILE}"
        )
    return file.read_bytes()


def _read_card(folder) -> dict[str, Any]:
    where = f"{folder}/{CARD_FILE}"
    try:
        record = json.loads(_read(folder, CARD_FILE))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f'{where} must be an object with "schema": {SCHEMA}')
    kinds = {"name": str, "builder": str, "options": dict, "weights": dict, "card": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if not wrong and not isinstance(record["weights"].get("sha256"), str):
        wrong.append("weights/sha256")
    if wrong:
        raise ValueError(f"{where}: missing or of the wrong type: {', '.join(wrong)}")
    return record


def read_variables(folder, name: str, promised: Mapping[str, Any], like: Any) -> dict[str, Any]:
    """Reads a safetensors file of this package and checks all of it.

    Args:
      folder: Where it lies.
      name: Of the file.
      promised: What its card says of it; see `describe_file`.
      like: The tree expected, arrays or shapes.

    Returns:
      The variables, a tree like `like`.

    Raises:
      ValueError: If the file is not the one that the card describes, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    where = f"{folder}/{name}"
    try:
        arrays = load(_read_weights(folder, name, promised, where))
    except SafetensorError as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from error
    check_arrays(arrays, flat(like), where)
    leaves = {path: jnp.asarray(array) for path, array in arrays.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def describe_file(name: str, content: bytes) -> dict[str, Any]:
    """Returns what a card says of a file: its name, length and SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    return {"file": name, "bytes": len(content), "sha256": digest}


def _read_weights(folder, name: str, promised: Mapping[str, Any], where: str) -> bytes:
    weights = _read(folder, name)
    found = hashlib.sha256(weights).hexdigest()
    if found != promised["sha256"]:
        size = promised.get("bytes")
        cut = f" (it has {len(weights)} bytes instead of {size})" if size != len(weights) else ""
        raise ValueError(
            f"{where} is not the file its card describes{cut}: SHA-256 is {found}, the card says "
            f"{promised['sha256']}; fetch or save it again"
        )
    return weights


def _allowed_builder(name: str, folder) -> Callable[..., Encoder]:
    if name not in _BUILDERS:
        raise ValueError(
            f"{folder}/{CARD_FILE} names the builder {name!r}, which is not one of "
            f"{sorted(_BUILDERS)}; if you trust it, pass the function itself as builder="
        )
    return _BUILDERS[name]


def build_skeleton(
    builder: Callable[..., Encoder], options: Mapping[str, Any], where: str
) -> Encoder:
    """The encoder with shapes in place of weights: nothing is computed, whatever the options."""
    try:
        inspect.signature(builder).bind(None, **options)
        return jax.eval_shape(functools.partial(builder, **options), jax.random.key(0))
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot build the network from {options}: {error}") from error


def describe_preprocess(preprocess: Any) -> dict[str, Any]:
    """Returns what a card says of an input transformation, nothing where there is none."""
    if preprocess is None:
        return {}
    name = type(preprocess).__name__
    if _STEPS.get(name) is not type(preprocess):
        raise ValueError(
            f"a card cannot name the input transformation {preprocess!r}, only one of "
            f"robust_ssl.models.preprocessing ({', '.join(_STEPS)}); save "
            "encoder.replace(preprocess=None) and put it back after loading, or pass a builder= "
            "whose encoder has it"
        )
    return {"preprocess": {"name": name, "options": dataclasses.asdict(preprocess)}}


def read_preprocess(record: Mapping[str, Any], where: str) -> Any:
    """Returns the input transformation that a card tells of, None where it tells of none."""
    said = record.get("preprocess")
    if said is None:
        return None
    well_formed = isinstance(said, dict) and isinstance(said.get("options"), dict)
    if not well_formed or not isinstance(said.get("name"), str) or said["name"] not in _STEPS:
        raise ValueError(
            f'{where}: "preprocess" must be {{"name": ..., "options": {{...}}}} with one of the '
            f"names {sorted(_STEPS)}, got {said!r}"
        )
    try:
        return _STEPS[said["name"]](**said["options"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot make {said['name']}: {error}") from error


def builder_of(encoder: Encoder) -> tuple[str, dict[str, Any]]:
    """The public builder and the options that make an encoder like this one."""
    if encoder.preprocess is not None:
        raise ValueError(
            f"no builder of robust_ssl.models makes an encoder with {encoder.preprocess!r}, and "
            "PyTorch's layouts know no input transformation; take encoder.replace(preprocess=None) "
            "and apply it yourself"
        )
    module = encoder.module
    if isinstance(module, resnet.ResNet):
        name = RESNETS.get((module.block, tuple(module.depths)))
        keys = ("width", "stem", "stem_padding")
    elif isinstance(module, vit.ViT):
        name, keys = "vision_transformer", _VIT_OPTIONS
    else:
        name, keys = None, ()
    if name is None:
        raise ValueError(
            f"no builder of robust_ssl.models makes {type(module).__name__}; pass the function "
            f"that does as builder= and its arguments as options="
        )
    options = {key: getattr(module, key) for key in keys}
    options |= {"image_size": encoder.image_size, "dtype": jnp.dtype(module.dtype).name}
    options |= {"mean": list(encoder.mean), "std": list(encoder.std)}
    return f"robust_ssl.models:{name}", options


def _static(encoder: Encoder) -> tuple:
    """All of an encoder but its variables."""
    return tuple(
        getattr(encoder, field.name)
        for field in dataclasses.fields(encoder)
        if field.name != "variables"
    )


def flat(variables) -> dict[str, Any]:
    """Returns the leaves of a tree by path, ``params/stem/conv/kernel``."""
    return traverse_util.flatten_dict(variables, sep="/")


def check_arrays(arrays: Mapping[str, np.ndarray], expected: Mapping[str, Any], where: str) -> None:
    """Raises ValueError that lists every difference between the arrays and the network."""
    problems = [f"missing {path}" for path in sorted(expected.keys() - arrays.keys())]
    problems += [f"unexpected {path}" for path in sorted(arrays.keys() - expected.keys())]
    for path in sorted(arrays.keys() & expected.keys()):
        array, leaf = arrays[path], expected[path]
        if array.shape != leaf.shape:
            problems.append(f"{path} has shape {array.shape}, the network needs {leaf.shape}")
        elif array.dtype != np.float32 or leaf.dtype != np.float32:
            problems.append(f"{path} is {array.dtype} for {leaf.dtype}; both must be float32")
        elif not np.isfinite(array).all():
            problems.append(f"{path} has NaN or infinite values")
    if problems:
        raise ValueError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join(problems))


def replace_file(file: pathlib.Path, content: bytes) -> None:
    """Writes beside the file and renames, so that nobody ever reads half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, file)
