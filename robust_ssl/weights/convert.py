"""Foreign weights to an `Encoder`: found out, mapped name by name, refused where anything is left.

`inspect_file` and `import_encoder` go the same way; the first reports all that it met, the second
raises it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from robust_ssl import models
from robust_ssl.types import Encoder
from robust_ssl.weights import mapping, native, normalization, resnet_layouts, vit_layouts
from robust_ssl.weights.files import WeightsFile, read_weights
from robust_ssl.weights.normalization import Normalization

LAYOUTS: tuple[mapping.Layout, ...] = (*resnet_layouts.LAYOUTS, *vit_layouts.LAYOUTS)

_WIDENED = ("bfloat16", "float16", "float64")
_WRAPPERS = ("module", "model")
_PLACEHOLDER_SIZE = 32  # of a ResNet whose image size is not known yet: no shape hangs on it


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a file of weights holds and what becomes of it.

    Attributes:
      file: The file as it was read.
      layout: How its tensors are called; None where no layout fits.
      builder: The network's builder in `robust_ssl.models`; None where it is not known.
      options: The builder's options.
      kept: Names in the file of the tensors that are used.
      dropped: How many tensors are left out on purpose, by the part of a model they belong to.
      normalization: What is named, or found beside the weights.
      notes: What one should know and need not act on.
      problems: Why it cannot be converted as it was asked; empty if it can.
    """

    file: WeightsFile
    layout: mapping.Layout | None = None
    builder: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: tuple[str, ...] = ()
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    normalization: Normalization = dataclasses.field(default_factory=Normalization)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        types = collections.Counter(self.file.tensors[name].dtype.name for name in self.kept)
        numbers = sum(self.file.tensors[name].size for name in self.kept)
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        under = f", under {self.file.found_under!r}" if self.file.found_under else ""
        lines = [
            ("file", f"{self.file.path} ({self.file.format}{under})"),
            ("sha256", self.file.sha256),
            ("layout", f"{self.layout.name}: {self.layout.source}" if self.layout else "unknown"),
            ("network", f"{self.builder}({options})" if self.builder else "unknown"),
            ("kept", f"{len(self.kept)} tensors, {numbers:,} numbers ({', '.join(types)})"),
            ("dropped", ", ".join(f"{k} ({n})" for k, n in self.dropped.items()) or "nothing"),
            ("normalization", str(self.normalization)),
            *(("note", note) for note in self.notes),
            *(("problem", problem) for problem in self.problems),
        ]
        verdict = "cannot be converted like this" if self.problems else "can be converted"
        return "\n".join([*(f"{key:14} {text}" for key, text in lines), verdict])


def is_foreign(path: str | os.PathLike) -> bool:
    """Whether a path is a file or a folder that `save_encoder` did not write.

    False also where there is nothing of this name: `load_encoder` says so best.

    Example:
      >>> is_foreign("simclr-cifar10-r18w24"), is_foreign("nothing/here.pth")
      (False, False)
    """
    return pathlib.Path(path).exists() and not _is_native(path)


def _is_native(path: str | os.PathLike) -> bool:
    return path in native.list_encoders() or (pathlib.Path(path) / native.CARD_FILE).exists()


def inspect_file(
    path: str | os.PathLike, *, layout: str | None = None, under: str | None = None, **named: Any
) -> Inspection:
    """Finds out what a file of weights holds, and whether it can be converted.

    Args:
      path: As in `import_encoder`, like all others.
      layout: The layout's name; None to find it.
      under: Where in the file the tensors are.
      **named: What `import_encoder` would be given.

    Returns:
      The `Inspection`; what stands in the way of a conversion is in its `problems`.

    Raises:
      ValueError: If the file cannot be read at all.
      FileNotFoundError: If it is not there.
    """
    inspection, _ = _examine(path, layout, under, named)
    return inspection


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
    **options: Any,
) -> Encoder:
    """Reads an encoder that another package wrote; nothing in the file is executed.

    Every tensor of the file is used, or belongs to a part that its layout drops on purpose;
    every variable of the network is filled, by a tensor of its shape.

    Args:
      path: A ``.safetensors``, ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` file, or a folder with one
        and its JSON files, as Hugging Face has them.
      layout: The name of one of `LAYOUTS`; None to find it by the tensors' names.
      under: Where in the file the tensors are, ``"state_dict"``; None to find them.
      normalization: How training images were normalized, a name of `normalization.PRESETS`;
        None to read it beside the file, or to name `mean` and `std` instead.
      mean: Per-channel mean of pixels in [0, 1].
      std: Per-channel standard deviation of pixels in [0, 1].
      image_size: Height and width the encoder was trained for, pixels; None to read it beside
        the file.  Positions of a ViT that are for another size are resized, with a note.
      name: For tables and manifests; None for the file's.
      reader: Of PyTorch files, see `files.read_weights`: ``"safe"`` or ``"torch"``.
      **options: What weights do not tell: ``stem``, ``stem_padding``, ``heads``, ...; also
        ``dtype``, ``"bfloat16"`` to compute in it.

    Returns:
      The `Encoder`, float32.

    Raises:
      ValueError: With everything that is in the way and what to name.
      FileNotFoundError: If the file is not there.
    """
    named = {
        "normalization": normalization, "mean": mean, "std": std, "image_size": image_size,
        "reader": reader, **options,
    }  # fmt: skip
    return _imported(path, layout, under, name, named)[1]


def convert_encoder(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: str | None = None,
    under: str | None = None,
    name: str | None = None,
    **named: Any,
) -> pathlib.Path:
    """Writes a foreign encoder in this package's own format; the card says where it came from.

    Args:
      path: As in `import_encoder`, like all others.
      out: The directory that `load_encoder` will take.
      layout: The layout's name; None to find it.
      under: Where in the file the tensors are.
      name: For tables and manifests.
      **named: The other arguments of `import_encoder`.

    Returns:
      `out`.

    Raises:
      ValueError: As `import_encoder`; nothing is written then.
    """
    found, encoder = _imported(path, layout, under, name, named)
    origin = {
        "file": pathlib.Path(found.file.path).name,
        "format": found.file.format,
        "sha256": found.file.sha256,
        "found_under": found.file.found_under,
        "layout": found.layout.name,
        "dropped": dict(found.dropped),
        "normalization": found.normalization.source,
        "notes": list(found.notes),
    }
    return native.save_encoder(encoder, out, {"imported_from": origin})


def _imported(path, layout, under, name, named) -> tuple[Inspection, Encoder]:
    found, encoder = _examine(path, layout, under, named)
    if found.problems:
        raise ValueError(f"{path} cannot be imported:\n  " + "\n  ".join(found.problems))
    place = pathlib.Path(path)
    return found, encoder.replace(name=name or (place.name if place.is_dir() else place.stem))


def _examine(path, layout, under, named) -> tuple[Inspection, Encoder | None]:
    """Collects all that can be said about a file; the encoder is None if there are problems."""
    if _is_native(path):
        raise ValueError(f"{path} is an encoder of this package already; load_encoder takes it")
    named = {key: value for key, value in named.items() if value is not None}
    file = read_weights(path, under=under, reader=named.pop("reader", "safe"))
    problems: list[str] = []
    found = Inspection(file, notes=tuple(file.notes))
    with _collected(problems):
        found = _with_normalization(found, named, problems)
    with _collected(problems):
        found = dataclasses.replace(found, layout=_choose_layout(file.tensors, layout))
    if found.layout is None:
        return dataclasses.replace(found, problems=tuple(problems)), None
    found, tensors = _with_tensors(found, problems)
    encoder = None
    with _collected(problems):
        wanted = named.get("image_size")
        found, skeleton = _with_network(found, tensors, named, layout, problems)
        encoder = _fill(skeleton, tensors, found)
        found, encoder = _with_asked_size(found, encoder, wanted)
    found = dataclasses.replace(found, problems=tuple(problems))
    return found, None if problems else encoder


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Goes on after an error, which it notes; a list of errors becomes as many notes."""
    try:
        yield
    except ValueError as error:
        first, *more = str(error).splitlines()
        problems += [line.strip() for line in more] if first.endswith("problems:") else [str(error)]


def _with_normalization(found: Inspection, named: dict[str, Any], problems) -> Inspection:
    """Takes what belongs to the normalization out of what is named."""
    keys = ("normalization", "mean", "std", "image_size")
    mine = {key: named.pop(key) for key in keys if key in named}
    if "image_size" in mine:
        named["image_size"] = mine["image_size"]
    try:
        chosen = normalization.choose(found.file.configs, **mine)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            "the JSON beside the weights says nothing sensible about images: "
            f"{type(error).__name__} {error}"
        ) from error
    if chosen.mean is None:
        problems.append(
            "nothing beside the weights says how images were normalized; "
            + normalization.HOW_TO_NAME
        )
    elif chosen.source == "named":
        found = _with_contradiction(found, chosen, problems)
    return dataclasses.replace(found, normalization=chosen)


def _with_contradiction(found: Inspection, chosen: Normalization, problems) -> Inspection:
    """A name beside another encoder's own header is an error; beside other JSON it is noted."""
    try:
        said = normalization.read(found.file.configs)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return found  # naming is the remedy for a file that cannot be understood
    if said.mean is None or (said.mean, said.std) == (chosen.mean, chosen.std):
        return found
    text = (
        f"{said.source} says mean {said.mean}, std {said.std}; "
        f"mean {chosen.mean}, std {chosen.std} is asked for"
    )
    if normalization.own_record(found.file.configs):
        problems.append(text)
        return found
    return dataclasses.replace(found, notes=(*found.notes, text))


def _choose_layout(names: Mapping[str, Any], wanted: str | None) -> mapping.Layout:
    known = "\n".join(f"    {layout.name}: {layout.source}" for layout in LAYOUTS)
    if wanted is not None:
        for layout in LAYOUTS:
            if layout.name == wanted:
                return layout
        raise ValueError(f"no layout {wanted!r}; there are\n{known}")
    for layout in LAYOUTS:
        if layout.matches(names.keys()):
            return layout
    shown = ", ".join(sorted(names)[:3])
    raise ValueError(f"no layout has tensors called {shown}, ...; looked for\n{known}")


def _with_tensors(found: Inspection, problems) -> tuple[Inspection, dict[str, np.ndarray]]:
    """Returns the tensors under the layout's names, float32."""
    sources: dict[str, str] = {}
    dropped = []
    for name in found.file.tensors:
        renamed = found.layout.rename(name)
        if renamed is None:
            dropped.append(name)
        elif renamed in sources:
            problems.append(f"{name} and {sources[renamed]} are the same weight; which one?")
        else:
            sources[renamed] = name
    tensors, notes = _as_float32(found, sources, problems)
    kept = tuple(sources.values())
    groups = collections.Counter(_part(name, {_first(x) for x in kept}) for name in dropped)
    found = dataclasses.replace(
        found, kept=kept, dropped=dict(groups), notes=(*found.notes, *notes)
    )
    return found, tensors


def _as_float32(found: Inspection, sources: Mapping[str, str], problems):
    tensors, widened, wrong, bad = {}, collections.Counter(), [], []
    for renamed, name in sources.items():
        array = found.file.tensors[name]
        kind = array.dtype.name
        if kind in _WIDENED:
            widened[kind] += 1
        elif kind != "float32":
            wrong.append(f"{name} is {kind}; weights are floating-point numbers of 16 bits or more")
        with np.errstate(over="ignore"):  # a float64 too large is infinite, and refused as such
            tensors[renamed] = array.astype(np.float32)
        if kind in (*_WIDENED, "float32") and not np.isfinite(tensors[renamed]).all():
            bad.append(f"{name} has NaN or infinite values")
        elif renamed.endswith("running_var") and (tensors[renamed] < 0).any():
            bad.append(f"{name} has negative variances")
    problems += wrong + bad
    return tensors, [f"{n} tensors are {kind}; converted to float32" for kind, n in widened.items()]


def _first(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return parts[0] if parts else name


def _part(name: str, kept: set[str]) -> str:
    """The part of a model that a dropped tensor belongs to: ``projector``, ``backbone.fc``."""
    if name.endswith("num_batches_tracked"):
        return "num_batches_tracked"
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[: 2 if parts[0] in kept else 1])


def _with_network(found: Inspection, tensors, named: dict[str, Any], layout, problems):
    """Finds builder and options and returns the network with shapes in place of weights."""
    own = dict(normalization.own_record(found.file.configs).get("options", {}))
    for key in ("mean", "std", "image_size", "dtype"):
        own.pop(key, None)
    asked = {**own, **named}
    said = {"options": asked, "layout": layout}
    name, options = _network(found, tensors, {**found.file.configs, **said})
    options = {**options, **own}  # the header knows more than names and shapes tell
    for key, value in named.items():
        if options.setdefault(key, value) != value and key != "image_size":
            problems.append(f"{key} is {options[key]!r} in the file, and {value!r} is asked for")
    found = _with_image_size(found, options, problems)
    found = dataclasses.replace(found, builder=name, options=dict(options))
    options.setdefault("image_size", _PLACEHOLDER_SIZE)
    depth = options.get("depth", 1)
    if type(depth) is not int or not 1 <= depth <= len(tensors):
        raise ValueError(f"depth is {depth!r}, and the file has {len(tensors)} tensors")
    mean, std = normalization.PRESETS["none"]
    options |= {"mean": found.normalization.mean or mean, "std": found.normalization.std or std}
    return found, native.build_skeleton(getattr(models, name), options, "the network")


def _network(found: Inspection, tensors, configs) -> tuple[str, dict[str, Any]]:
    try:
        name, options = found.layout.network(tensors, configs)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"what is beside the weights is not as {found.layout.name} has it: "
            f"{type(error).__name__} {error}"
        ) from error
    return name, dict(options)


def _with_image_size(found: Inspection, options: dict[str, Any], problems) -> Inspection:
    """A network with positions knows its image size; another one's must be found or named."""
    said = found.normalization.image_size
    size = options.setdefault("image_size", said)
    if size is None:
        del options["image_size"]
        problems.append(
            "nothing beside the weights says how large images were; " + normalization.HOW_TO_SIZE
        )
    elif said not in (None, size):
        note = f"the weights have positions for images of {size} pixels; {said} is said beside them"
        found = dataclasses.replace(found, notes=(*found.notes, note))
    known = dataclasses.replace(found.normalization, image_size=size)
    return dataclasses.replace(found, normalization=known)


def _with_asked_size(
    found: Inspection, encoder: Encoder, wanted: int | None
) -> tuple[Inspection, Encoder]:
    """A ViT's positions are resized only if somebody names another size than the file's."""
    size = encoder.image_size
    if wanted in (None, size):
        return found, encoder
    resized = models.resize_positions(encoder, wanted)
    note = f"positions resized from images of {size} pixels to {wanted}, as image_size asks"
    known = dataclasses.replace(found.normalization, image_size=wanted)
    notes = (*found.notes, note)
    return dataclasses.replace(found, normalization=known, notes=notes), resized


def _fill(skeleton: Encoder, tensors: Mapping[str, np.ndarray], found: Inspection) -> Encoder:
    expected = traverse_util.flatten_dict(skeleton.variables, sep="/")
    arrays = mapping.join(found.layout.entries(skeleton), tensors, expected, found.file.path)
    leaves = {path: jnp.asarray(array) for path, array in arrays.items()}
    return skeleton.replace(variables=traverse_util.unflatten_dict(leaves, sep="/"))
