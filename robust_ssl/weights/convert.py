"""Foreign weights to an `Encoder`: found out, mapped name by name, refused where anything is left.

`inspect_file` and `import_encoder` go the same way; the first reports all that it met, the second
raises it.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from robust_ssl import models
from robust_ssl.build import near
from robust_ssl.types import Encoder
from robust_ssl.weights import (
    adjustments,
    hub,
    mapping,
    native,
    normalization,
    selection,
    transforms,
)
from robust_ssl.weights.files import read_weights
from robust_ssl.weights.inspection import Inspection, Report
from robust_ssl.weights.layouts import LAYOUTS
from robust_ssl.weights.normalization import Normalization

# Exact in float32, but for float64, which is rounded.
_WIDENED = ("bfloat16", "float16", "float64")
# Foreign JSON may have any shape; what its reading stumbles over is the reader's to know.
NONSENSE = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError)
# Of what is asked for, what no builder takes.
_NOT_OPTIONS = ("variant", "position_resizing")
# Before the package had one spelling; configs of that time still have it.
_FORMER = {"normalisation": "normalization"}
# Of a network whose image size is not known yet and changes no shape; windows of 7 and 12 fit.
_PLACEHOLDER_SIZE = 384


def is_foreign(path: str | os.PathLike) -> bool:
    """Whether a path is a file or a folder that `save_encoder` did not write, or one of the hub.

    False also where there is nothing of this name: `load_encoder` says so best.

    Example:
      >>> is_foreign("simclr-cifar10-r18w24"), is_foreign("nothing/here.pth")
      (False, False)
    """
    return hub.is_address(path) or (pathlib.Path(path).exists() and not _is_native(path))


def _is_native(path: str | os.PathLike) -> bool:
    return path in native.list_encoders() or (pathlib.Path(path) / native.CARD_FILE).exists()


def inspect_file(
    path: str | os.PathLike,
    *,
    layout: str | None = None,
    under: str | None = None,
    **arguments: Any,
) -> Inspection:
    """Finds out what a file of weights holds, and whether it can be converted.

    Args:
      path: As in `import_encoder`, like all others.
      layout: The layout's name.
      under: Where in the file the tensors are.
      **arguments: What `import_encoder` would be given.

    Returns:
      The `Inspection`; what stands in the way of a conversion is in its `problems`.

    Raises:
      ValueError: If the file cannot be read at all.
      FileNotFoundError: If it is not there.
    """
    _, path = hub.located(path, arguments.pop("allow_moving", False))
    return _examine(path, layout, under, arguments)[0]


def import_encoder(
    path: str | os.PathLike,
    *,
    layout: str | None = None,
    under: str | None = None,
    normalization: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    name: str | None = None,
    reader: str = "safe",
    inert: Sequence[str] = (),
    prefix: str | None = None,
    drop: Sequence[str] = (),
    channels: str | None = None,
    allow_moving: bool | None = False,
    **options: Any,
) -> Encoder:
    """Reads an encoder that another package wrote; nothing in the file is executed.

    Every tensor of the file is used, or belongs to a part that its layout drops on purpose;
    every variable of the network is filled, by a tensor of its shape.

    Args:
      path: A ``.safetensors``, ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` file, or a folder with one
        and its JSON files, as Hugging Face has them, or ``hf://owner/name@<commit>`` itself.
      layout: The name of one of `LAYOUTS`; None to find it by the tensors' names.
      under: Where in the file the tensors are, ``"state_dict"``; None to find them.
      normalization: How training images were normalized, a name of `normalization.PRESETS`; None
        to read it beside the file, or to name `mean` and `std` instead.
      mean: Per-channel mean of pixels in [0, 1].
      std: Per-channel standard deviation of pixels in [0, 1].
      image_size: Height and width the encoder was trained for, pixels; None to read it beside
        the file.  Positions of a ViT that are for another size are resized, with a note.
      name: For tables and manifests; None for the file's.
      reader: Of PyTorch files, see `files.read_weights`: ``"safe"`` or ``"torch"``.
      inert: Harmless names in the pickle, see `files.read_weights`.
      prefix: What the names of the encoder's tensors begin with; None to find it.  All that is not
        under it is left out.
      drop: Parts to leave out that nothing here knows, ``("gate", "backbone.gate")``.
      channels: ``"bgr"`` for a network whose images are blue first; its first kernel is turned,
        mean and std are red first.  None: ``"rgb"``, or what JSON says.
      allow_moving: Whether a revision on the hub may be a branch or a tag, see `hub.parse`.
      **options: What weights do not tell: ``stem``, ``stem_padding``, ``variant``, ``heads``,
        ``position_resizing``, ...; also ``dtype``, ``"bfloat16"`` to compute in it.

    Returns:
      The `Encoder`, float32.

    Raises:
      ValueError: With everything that is in the way and what to name.
      FileNotFoundError: If the file is not there.
    """
    arguments = {
        "normalization": normalization, "mean": mean, "std": std, "image_size": image_size,
        "reader": reader, "inert": inert, "prefix": prefix, "drop": drop, "channels": channels,
        **options,
    }  # fmt: skip
    address, place = hub.located(path, allow_moving)
    if address and _is_native(place):
        return _native(address, place, {"layout": layout, "under": under, **arguments})
    return _imported(place, layout, under, name or getattr(address, "name", None), arguments)[1]


def convert_encoder(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: str | None = None,
    under: str | None = None,
    name: str | None = None,
    **arguments: Any,
) -> pathlib.Path:
    """Writes a foreign encoder in this package's own format; the card says where it came from.

    Args:
      path: As in `import_encoder`, like all others.
      out: The directory that `load_encoder` will take.
      layout: The layout's name; None to find it.
      under: Where in the file the tensors are.
      name: For tables and manifests.
      **arguments: The others of `import_encoder`.

    Returns:
      `out`.

    Raises:
      ValueError: As `import_encoder`; nothing is written then.
    """
    address, place = hub.located(path, arguments.pop("allow_moving", False))
    if address and _is_native(place):
        encoder = _native(address, place, {"layout": layout, "under": under, **arguments})
        card = {**native.encoder_card(place)["card"], "imported_from": {"source": str(address)}}
        return native.save_encoder(encoder.replace(name=name or encoder.name), out, card)
    name = name or getattr(address, "name", None)
    inspection, encoder = _imported(place, layout, under, name, arguments)
    file = inspection.file
    origin = ({"source": str(address)} if address else {}) | {
        "file": pathlib.Path(file.path).name,
        "format": file.format,
        "sha256": file.sha256,
        "found_under": file.found_under,
        "layout": inspection.known_layout.name,
        "dropped": dict(inspection.dropped),
        "normalization": inspection.normalization.source,
        "transform": dict(inspection.normalization.transform),
        "notes": list(inspection.notes),
    }
    return native.save_encoder(encoder, out, {"imported_from": origin})


def _native(address: hub.Address, path: pathlib.Path, arguments: Mapping[str, Any]) -> Encoder:
    named = [key for key, value in arguments.items() if value not in (None, (), "safe")]
    if named:
        raise ValueError(f"{address} is an encoder of this package; leave out {', '.join(named)}")
    return native.load_encoder(path)


def _imported(path, layout, under, name, arguments) -> tuple[Inspection, Encoder]:
    inspection, encoder = _examine(path, layout, under, arguments)
    if inspection.problems:
        raise ValueError(f"{path} cannot be imported:\n  " + "\n  ".join(inspection.problems))
    assert encoder is not None  # else there would be a problem
    place = pathlib.Path(path)
    resizing = transforms.known(inspection.normalization.transform, encoder.image_size)
    name = name or (place.name if place.is_dir() else place.stem)
    return inspection, encoder.replace(name=name, resizing=resizing)


def _examine(path, layout, under, arguments) -> tuple[Inspection, Encoder | None]:
    """Collects all that can be said about a file; the encoder is None if there are problems."""
    if _is_native(path):
        raise ValueError(f"{path} is an encoder of this package already; load_encoder takes it")
    arguments = {_FORMER.get(key, key): x for key, x in arguments.items() if x is not None}
    for key in ("drop", "inert"):
        if isinstance(arguments.get(key), str):  # one name is not its letters
            arguments[key] = (arguments[key],)
    reading = {key: arguments.pop(key) for key in ("reader", "inert") if key in arguments}
    place = {key: arguments.pop(key) for key in ("prefix", "drop") if key in arguments}
    channels = arguments.pop("channels", None)
    file = read_weights(path, under=under, **reading)
    file = dataclasses.replace(file, configs=mapping.with_timm_tower(file.configs, file.tensors))
    report = Report(list(file.notes))
    inspection, encoder = Inspection(file), None
    with report.collecting():
        images = _normalization(file.configs, arguments, report)
        inspection = dataclasses.replace(inspection, normalization=images)
    with report.collecting():
        chosen = selection.select(file.tensors, LAYOUTS, layout=layout, **place)
        report.notes += chosen.notes
        inspection = dataclasses.replace(inspection, layout=chosen.layout)
    # Without a layout no tensor means anything, so nothing more can be said.
    if inspection.layout is not None:
        inspection, tensors = _with_tensors(inspection, chosen, report)
        with report.collecting():
            inspection, skeleton = _with_network(inspection, tensors, arguments, layout, report)
            encoder = _fill(skeleton, tensors, inspection)
            encoder, notes = adjustments.in_channels(encoder, file.configs, channels)
            report.notes += notes
            encoder, notes = adjustments.resized(encoder, inspection, arguments)
            report.notes += notes
            size = encoder.image_size
            images = dataclasses.replace(inspection.normalization, image_size=size)
            inspection = dataclasses.replace(inspection, normalization=images)
    all_notes, problems = tuple(report.notes), tuple(report.problems)
    inspection = dataclasses.replace(inspection, notes=all_notes, problems=problems)
    return inspection, None if problems else encoder


def _normalization(configs, arguments: dict[str, Any], report: Report) -> Normalization:
    """Takes mean and standard deviation out of what is named, or reads them beside the weights."""
    choice = {"image_size": arguments.get("image_size")}
    choice |= {key: arguments.pop(key, None) for key in ("normalization", "mean", "std")}
    try:
        images = normalization.choose(configs, **choice)
    except NONSENSE as error:
        raise ValueError(
            "the JSON beside the weights says nothing sensible about images: "
            f"{type(error).__name__} {error}"
        ) from error
    if images.mean is None:
        report.problems.append(
            "nothing beside the weights says how images were normalized; "
            + normalization.HOW_TO_NAME
        )
    elif images.source == "named":
        _note_contradiction(configs, images, report)
    return images


def _note_contradiction(configs, images: Normalization, report: Report) -> None:
    """A name against another encoder's own header is an error; against other JSON it is noted."""
    try:
        stored = normalization.read(configs)
    except (*NONSENSE, ValueError):
        return  # naming is the remedy for a file that cannot be understood
    if stored.mean is None or (stored.mean, stored.std) == (images.mean, images.std):
        return
    text = (
        f"{stored.source} says mean {stored.mean}, std {stored.std}; "
        f"mean {images.mean}, std {images.std} is asked for"
    )
    certain = normalization.own_record(configs)  # ours was written with the weights, not beside
    (report.problems if certain else report.notes).append(text)


def _with_tensors(
    inspection: Inspection, chosen: selection.Selection, report: Report
) -> tuple[Inspection, dict[str, np.ndarray]]:
    """Returns the tensors under the layout's names, float32."""
    sources: dict[str, str] = {}
    dropped = list(chosen.dropped)
    rename = inspection.known_layout.rename
    for name, own in chosen.names.items():
        renamed = rename(own)
        if renamed is None:
            dropped.append(name)
        elif renamed in sources:
            report.problems.append(f"{name} and {sources[renamed]} are the same weight; which one?")
        else:
            sources[renamed] = name
    tensors = _as_float32(inspection.file.tensors, sources, report)
    parts = selection.count_parts(dropped, sources.values())
    inspection = dataclasses.replace(inspection, kept=tuple(sources.values()), dropped=parts)
    return inspection, inspection.known_layout.prepare(tensors, inspection.normalization.image_size)


def _as_float32(arrays, sources: Mapping[str, str], report: Report) -> dict[str, np.ndarray]:
    tensors, wrong, bad = {}, [], []
    widened: collections.Counter[str] = collections.Counter()
    for renamed, name in sources.items():
        kind = arrays[name].dtype.name
        if kind in _WIDENED:
            widened[kind] += 1
        elif kind != "float32":
            wrong.append(f"{name} is {kind}; weights are floating-point numbers of 16 bits or more")
        with np.errstate(over="ignore"):  # a float64 too large is infinite, and refused as such
            tensors[renamed] = arrays[name].astype(np.float32)
        if kind in (*_WIDENED, "float32") and not np.isfinite(tensors[renamed]).all():
            bad.append(f"{name} has NaN or infinite values")
        elif renamed.endswith("running_var") and (tensors[renamed] < 0).any():
            bad.append(f"{name} has negative variances")
    report.problems += wrong + bad
    report.notes += [f"{n} tensors are {kind}; converted to float32" for kind, n in widened.items()]
    return tensors


def _with_network(
    inspection: Inspection, tensors, arguments: dict[str, Any], layout, report: Report
):
    """Finds builder and options and returns the network with shapes in place of weights."""
    configs = inspection.file.configs
    stored = dict(normalization.own_record(configs).get("options", {}))
    for key in ("mean", "std", "image_size", "dtype"):
        stored.pop(key, None)
    file = inspection.file
    try:
        sources = {
            **configs, "options": {**stored, **arguments}, "layout": layout, "path": file.path,
            "names": file.tensors.keys(), "shapes": {n: x.shape for n, x in file.tensors.items()},
        }  # fmt: skip
        name, options, assumed = inspection.known_layout.network(tensors, sources)
    except NONSENSE as error:
        raise ValueError(
            f"what is beside the weights is not as {inspection.known_layout.name} has it: "
            f"{type(error).__name__} {error}"
        ) from error
    if assumed:
        report.notes.append(f"assumed, because nothing here says so: {'; '.join(assumed)}")
    options = {**options, **stored}  # the header knows more than names and shapes tell
    arguments = {key: value for key, value in arguments.items() if key not in _NOT_OPTIONS}
    _check_options(name, arguments)
    # image_size is no contradiction: it asks for positions to be resized.
    for key, value in arguments.items():
        if options.setdefault(key, value) != value and key != "image_size":
            report.problems.append(
                f"{key} is {options[key]!r} in the file, and {value!r} is asked for"
            )
    named = "image_size" in arguments
    images = adjustments.with_image_size(inspection.normalization, options, named, report)
    inspection = dataclasses.replace(
        inspection, normalization=images, builder=name, options=dict(options)
    )
    options.setdefault("image_size", _PLACEHOLDER_SIZE)
    # A depth from a hostile config would build blocks without end before anything is compared.
    depth = options.get("depth", 1)
    if type(depth) is not int or not 1 <= depth <= len(tensors):
        raise ValueError(f"depth is {depth!r}, and the file has {len(tensors)} tensors")
    mean, std = normalization.PRESETS["none"]  # stands in, so that all other problems show too
    options |= {"mean": images.mean or mean, "std": images.std or std}
    return inspection, native.build_skeleton(getattr(models, name), options, "the network")


def _check_options(builder: str, arguments: Mapping[str, Any]) -> None:
    known = [*inspect.signature(getattr(models, builder)).parameters, *_NOT_OPTIONS]
    for key in arguments:
        if key not in known:
            raise ValueError(f"{builder} takes no {key!r}{near(key, known[1:])}")


def _fill(skeleton: Encoder, tensors: Mapping[str, np.ndarray], inspection: Inspection) -> Encoder:
    expected = traverse_util.flatten_dict(skeleton.variables, sep="/")
    entries = inspection.known_layout.entries(skeleton)
    arrays = mapping.join(entries, tensors, expected, inspection.file.path)
    leaves = {path: jnp.asarray(array) for path, array in arrays.items()}
    return skeleton.replace(variables=traverse_util.unflatten_dict(leaves, sep="/"))
