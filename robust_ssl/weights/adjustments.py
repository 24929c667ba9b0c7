"""What is done to an encoder that was read: positions for another size, another order of colors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from robust_ssl import models
from robust_ssl.types import Encoder
from robust_ssl.weights import normalization
from robust_ssl.weights.inspection import Inspection, Report
from robust_ssl.weights.normalization import Normalization

CHANNELS = ("rgb", "bgr")


def resized(
    encoder: Encoder, inspection: Inspection, arguments: Mapping[str, Any]
) -> tuple[Encoder, list[str]]:
    """Resizes a ViT's positions if the caller names another size than the file's.

    Args:
      encoder: As it was read.
      inspection: Of its file.
      arguments: ``image_size`` and ``position_resizing`` that are named, if they are.

    Returns:
      The encoder, and notes of what was done.

    Raises:
      ValueError: If those who write such files resize differently and no way is named.
    """
    size, old = arguments.get("image_size"), encoder.image_size
    if size in (None, old):
        return encoder, []
    layout, file = inspection.layout, inspection.file
    resizing = arguments.get("position_resizing")
    resizing = resizing or layout.resizing(file.tensors.keys(), file.configs)
    if resizing is None:
        listed = "; ".join(f"{name} ({who})" for name, who in models.RESIZINGS.items())
        raise ValueError(
            f"positions are for images of {old} pixels, and writers of {layout.name} resize them "
            f"differently: name --position-resizing, one of {listed}"
        )
    note = (
        f"positions resized from images of {old} pixels to {size}, as image_size asks: {resizing} "
        f"({models.RESIZINGS.get(resizing)})"
    )
    return models.resize_positions(encoder, size, resizing), [note]


def in_channels(
    encoder: Encoder, configs: Mapping[str, Any], channels: str | None
) -> tuple[Encoder, list[str]]:
    """Turns the first kernel of a network that takes blue first, so that it takes red first.

    Args:
      encoder: As it was read.
      configs: What stands beside the weights.
      channels: A name in `CHANNELS`; None for what is said beside the weights, else ``"rgb"``.

    Returns:
      The encoder, and notes of what was done.

    Raises:
      ValueError: If the order is not known.
    """
    # What is exported here takes red first, whatever stands beside it of the model it came from.
    told = None if normalization.own_record(configs) else normalization.channels(configs)
    if channels not in (None, *CHANNELS):
        raise ValueError(f"channels={channels!r}: there are {', '.join(CHANNELS)}")
    notes = []
    if channels is not None and told not in (None, channels):
        notes.append(f"channels {told} is said beside the weights; {channels} is asked for")
    if (channels or told) != "bgr":
        return encoder, notes
    notes.append("the network takes blue first: its first kernel is turned, to red first")
    return reverse_channels(encoder), notes


def reverse_channels(encoder: Encoder) -> Encoder:
    """Returns an encoder for images of the other order of colors: its first kernel is turned.

    Mean and standard deviation stay as they are: of red, green and blue.
    """
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    first = ("stem/conv", "stem/conv1/conv", "embed/patch")  # a network has one of them
    for path in (f"params/{module}/kernel" for module in first):
        if path in flat:
            kernel = flat[path]
            # Both end in color, feature: a patch's rows are its pixels, color by color.
            colors = kernel.reshape(-1, 3, kernel.shape[-1])[:, ::-1]
            flat[path] = colors.reshape(kernel.shape)
    return encoder.replace(variables=traverse_util.unflatten_dict(flat, sep="/"))


def with_image_size(
    images: Normalization, options: dict[str, Any], named: bool, report: Report
) -> Normalization:
    """A network with positions knows its image size; another one's must be read or named."""
    size = options.setdefault("image_size", images.image_size)
    if size is None:
        del options["image_size"]
        report.problems.append(
            "nothing beside the weights says how large images were; " + normalization.HOW_TO_SIZE
        )
    elif images.image_size not in (None, size) and not named:
        report.notes.append(
            f"the weights have positions for images of {size} pixels; {images.image_size} is said "
            "beside them"
        )
    return dataclasses.replace(images, image_size=size)
