"""Encoders on disk: a safetensors file and a JSON card beside it, and the ones the package ships.

A saved encoder is a directory of two files.  ``encoder.safetensors`` holds every variable in
float32 under its path, ``params/stem/conv/kernel``.  ``encoder.json`` says how to build the network
those belong to, the SHA-256 of the weights (safetensors itself does not notice a flipped bit) and
of itself, and whatever its maker wants to tell: how it was trained, how accurate it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import models
from robust_ssl.build import resolve
from robust_ssl.models import resnet, vit
from robust_ssl.models.bridge import refuse_bridge
from robust_ssl.models.clip_resnet import CLIPResNet
from robust_ssl.models.convnext import ConvNeXt
from robust_ssl.models.swin import Swin
from robust_ssl.types import Encoder
from robust_ssl.weights import cards, transforms

WEIGHTS_FILE = "encoder.safetensors"
CARD_FILE = "encoder.json"
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # as `encoder inspect` takes

# A card names its builder; only these names are ever called, whatever the card says.
_BUILDERS = {
    f"robust_ssl.models:{name}": getattr(models, name)
    for name in (
        *(*resnet.VARIANTS, "convnext", "clip_resnet", "swin_transformer"),
        *(*(f"vit_{size}" for size in vit.SIZES), "vision_transformer"),
    )
}
_SKELETONS: dict[Any, Encoder] = {}
_MOST_SKELETONS = 32
# The most that is built of what a card asks for: a billion layers would be built for ever.
_MOST = {"depth": 512, "depths": 512, "image_size": 4096, "width": 2**14, "mlp_width": 2**17}
RESNETS: dict[Any, str] = {blocks: name for name, blocks in resnet.VARIANTS.items()}
# Image size, dtype and device axis stand elsewhere in an encoder, or are no choice of the network.
_OPTIONS = {
    kind: tuple(
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in ("image_size", "dtype", "axis_name", "remat", "parent", "name")
    )
    for kind in (vit.ViT, ConvNeXt, CLIPResNet, Swin)
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
    directory = pathlib.Path(directory)
    for name, content in files_of(encoder, card, builder=builder, options=options).items():
        cards.replace_file(directory / name, content)
    return directory


def files_of(
    encoder: Encoder,
    card: Mapping[str, Any] | None = None,
    *,
    builder: Callable[..., Encoder] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Returns what `save_encoder` writes, by name, in order, and refuses what it refuses."""
    from safetensors.numpy import save

    cards.check_encoder(encoder)
    refuse_bridge(encoder, "saved")
    if builder is None:
        builder_name, options = builder_of(encoder.replace(preprocess=None))
        builder = _BUILDERS[builder_name]
    else:
        builder_name = f"{builder.__module__}:{builder.__qualname__}"
        options = dict(options or {})
    arrays = cards.to_arrays(encoder.variables)
    # Rebuilt while the encoder is at hand: what could not be loaded is refused here.
    cards.check_normalization(encoder.mean, encoder.std, "the encoder to save")
    skeleton = build_skeleton(builder, options, "the encoder to save").replace(name=encoder.name)
    skeleton = skeleton.replace(resizing=encoder.resizing)
    preprocess = {}
    if encoder.preprocess not in (None, skeleton.preprocess):
        preprocess = cards.describe_preprocess(encoder.preprocess)
        skeleton = skeleton.replace(preprocess=encoder.preprocess)
    if _static(skeleton) != _static(encoder):
        raise ValueError(
            f"{builder_name}({options}) does not rebuild this encoder:\n  {_static(skeleton)}\n"
            f"against\n  {_static(encoder)}\npass builder= and options= that do"
        )
    cards.check_arrays(arrays, cards.flatten(skeleton.variables), "the encoder to save")
    weights = save(arrays)
    record = {
        "schema": cards.SCHEMA,
        "name": encoder.name,
        "builder": builder_name,
        "options": options,
        **preprocess,
        **transform_entry(encoder),
        "weights": cards.describe_file(WEIGHTS_FILE, weights),
        "card": dict(card or {}),
    }
    # Weights first: after an interruption the old card does not fit them, and loading says so.
    return {WEIGHTS_FILE: weights, CARD_FILE: cards.encode(record)}


def transform_entry(encoder: Encoder) -> dict[str, Any]:
    """Returns what a card says of how an encoder's pictures get their size, nothing where unknown.

    Raises:
      ValueError: If it is no `robust_ssl.data.Resizing` to the encoder's image size.
    """
    if encoder.resizing is None:
        return {}
    return {"transform": transforms.described(encoder.resizing, encoder.image_size)}


def load_encoder(
    name_or_path: str | os.PathLike,
    *,
    builder: str | Callable[..., Encoder] | None = None,
    preprocess: str | Callable[..., Any] | None = None,
) -> Encoder:
    """Reads an encoder and checks all of it before a single weight is used.

    Nothing that the files say is executed: the card may only name a public builder of
    `robust_ssl.models`, and its options are data.

    Args:
      name_or_path: A name of `list_encoders`, or the directory that `save_encoder` wrote (write
        ``"./name"`` for a directory that is called like a shipped encoder).
      builder: ``builder(key, **options) -> Encoder``, for a network of your own, or its name,
        ``"module:function"``; it is called under `jax.eval_shape`, so no weights are made.
      preprocess: Class of an input transformation of your own, or its name.

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
    # A name from the caller is resolved and imported; one from the card never is.
    where = f"{folder}/{CARD_FILE}"
    builder = allowed_builder(record["builder"], folder) if builder is None else resolve(builder)
    skeleton = build_skeleton(builder, record["options"], where)
    preprocess = cards.read_preprocess(record, where, preprocess) or skeleton.preprocess
    cards.check_normalization(skeleton.mean, skeleton.std, where)
    variables = cards.read_variables(folder, record["weights"], WEIGHTS_FILE, skeleton.variables)
    cards.check_seal(record, where)  # last: what is wrong in itself says more of it
    resizing = transforms.of_saved(record, where) or skeleton.resizing
    return skeleton.replace(
        variables=variables, name=record["name"], preprocess=preprocess, resizing=resizing
    )


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
    folder = _locate(name_or_path)
    record = _read_card(folder)
    cards.check_seal(record, f"{folder}/{CARD_FILE}")
    return record


def list_encoders() -> list[str]:
    """Returns the names of the encoders that the package ships, sorted."""
    zoo = resources.files("robust_ssl.zoo")
    return sorted(entry.name for entry in zoo.iterdir() if entry.joinpath(CARD_FILE).is_file())


def _locate(name_or_path):
    """A directory of the zoo (a `Traversable`, which may lie in a zip) or of the file system."""
    names = list_encoders()
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise ValueError(
            'an encoder is a shipped name (robust_ssl.list("encoders")) or a directory, got '
            f"{name_or_path!r}"
        )
    if isinstance(name_or_path, str) and name_or_path in names:
        return resources.files("robust_ssl.zoo").joinpath(name_or_path)
    path = pathlib.Path(name_or_path)
    if path.is_dir():
        return path
    _refuse_file(path)
    if len(path.parts) > 1 or not isinstance(name_or_path, str):
        raise FileNotFoundError(f"no directory {path}: an encoder is a directory of two files")
    # One word that is no directory is most likely a misspelt name.
    near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.4)
    raise ValueError(
        f"no encoder named {name_or_path!r} and no directory of this name; "
        + (f"near: {', '.join(near)}; " if near else "")
        + f"shipped: {', '.join(names) or 'none'}"
    )


def _refuse_file(path: pathlib.Path) -> None:
    """Says what to do with one file of weights, or that there is none of its name."""
    if path.is_file():
        raise ValueError(
            f"{path} is a file, and an encoder is a directory of two files; weights of PyTorch or "
            f"safetensors are read by robust_ssl.import_encoder({str(path)!r})"
        )
    if path.suffix in _WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"there is no file {path} (from {os.getcwd()})")


def _read_card(folder) -> dict[str, Any]:
    where = f"{folder}/{CARD_FILE}"
    record = cards.decode(cards.read_bytes(folder, CARD_FILE), where)
    if not isinstance(record, dict) or record.get("schema") != cards.SCHEMA:
        raise ValueError(f'{where} must be an object with "schema": {cards.SCHEMA}')
    kinds = {"name": str, "builder": str, "options": dict, "weights": dict, "card": dict}
    cards.check_card(record, kinds, where)
    return record


def allowed_builder(name: str, folder) -> Callable[..., Encoder]:
    """Returns the builder that a card names; only those of `robust_ssl.models` are looked up."""
    if name not in _BUILDERS:
        raise ValueError(
            f"{folder}/{CARD_FILE} names the builder {name!r}, which is not one of "
            f"{sorted(_BUILDERS)}; if you trust it, pass the function itself as builder=, or in a "
            f'config write {{"path": "{folder}", "builder": "{name}"}}'
        )
    return _BUILDERS[name]


def build_skeleton(
    builder: Callable[..., Encoder], options: Mapping[str, Any], where: str
) -> Encoder:
    """The encoder with shapes in place of weights: nothing is computed, whatever the options."""
    if builder in _BUILDERS.values():
        _check_claims(options, where)
    try:
        # Bound first: a card with a wrong option is told apart from a builder that fails.
        inspect.signature(builder).bind(None, **options)
        made = functools.partial(builder, **options)
        if builder not in _BUILDERS.values():  # a user's may be another one under the same name
            return jax.eval_shape(made, jax.random.key(0))
        # A run loads the same network many times, and a trace of it takes a quarter of a second.
        key = builder, repr(sorted(options.items()))
        if key not in _SKELETONS:
            if len(_SKELETONS) == _MOST_SKELETONS:
                _SKELETONS.clear()
            _SKELETONS[key] = jax.eval_shape(made, jax.random.key(0))
        return _SKELETONS[key]
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot build the network from {options}: {error}") from error


def _check_claims(options: Mapping[str, Any], where: str) -> None:
    for name, most in _MOST.items():
        said = options.get(name)
        parts = said if isinstance(said, list | tuple) else [said]
        total = sum(part for part in parts if isinstance(part, int))
        if total > most:
            raise ValueError(f"{where}: {name} is {said}; at most {most} is built")


def builder_of(encoder: Encoder) -> tuple[str, dict[str, Any]]:
    """The public builder and the options that make an encoder like this one."""
    if encoder.preprocess is not None:
        raise ValueError(
            f"no builder of robust_ssl.models makes an encoder with {encoder.preprocess!r}, and "
            "PyTorch's layouts know no input transformation; take encoder.replace(preprocess=None) "
            "and apply it yourself"
        )
    module = encoder.module
    name: str | None = None
    keys: tuple[str, ...] = ()
    if isinstance(module, resnet.ResNet):
        name = RESNETS.get((module.block, tuple(module.depths)))
        keys = ("width", "stem", "stem_padding")
    elif isinstance(module, vit.ViT):
        name, keys = "vision_transformer", _OPTIONS[vit.ViT]
    elif isinstance(module, ConvNeXt):
        name, keys = "convnext", _OPTIONS[ConvNeXt]
    elif isinstance(module, CLIPResNet):
        name, keys = "clip_resnet", _OPTIONS[CLIPResNet]
    elif isinstance(module, Swin):
        name, keys = "swin_transformer", _OPTIONS[Swin]
    if name is None:
        raise ValueError(
            f"no builder of robust_ssl.models makes {type(module).__name__}; pass the function "
            f"that does as builder= and its arguments as options="
        )
    options = {key: _as_json(getattr(module, key)) for key in keys}
    # As JSON has it: a dtype is its name, tuples are lists.
    options |= {"image_size": encoder.image_size, "dtype": jnp.dtype(module.dtype).name}
    options |= {"mean": list(encoder.mean), "std": list(encoder.std)}
    return f"robust_ssl.models:{name}", options


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _static(encoder: Encoder) -> tuple:
    """All of an encoder but its variables."""
    return tuple(
        getattr(encoder, field.name)
        for field in dataclasses.fields(encoder)
        if field.name != "variables"
    )
