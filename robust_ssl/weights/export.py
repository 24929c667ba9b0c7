"""Encoders for others: safetensors under torchvision's and timm's names, and StableHLO programs."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import disk
from robust_ssl.models import CLIPResNet, ConvNeXt, ResNet, Swin, ViT
from robust_ssl.models.bridge import refuse_bridge
from robust_ssl.types import Classifier, Encoder
from robust_ssl.weights import cards, mapping, native
from robust_ssl.weights.layouts import LAYOUTS

PLATFORMS = ("cpu", "cuda", "tpu")


def export_safetensors(encoder: Encoder, file: str | os.PathLike) -> pathlib.Path:
    """Writes an encoder as PyTorch knows it: torchvision's names for a ResNet, timm's for others.

    A ViT with rotary positions gets transformers' names, of DINOv3; CLIP's ResNets get open_clip's.

    ``model.load_state_dict(safetensors.torch.load_file(file))`` takes it, strictly, where the model
    has no classification layer.  The header says what weights do not (stem, padding, normalization,
    image size), so `import_encoder` reads the file back without being told anything.

    Args:
      encoder: A network of `robust_ssl.models`.
      file: Replaced if it is there.

    Returns:
      The file's path.

    Raises:
      ValueError: If the network is not one of `robust_ssl.models`.

    Example:
      >>> import tempfile
      >>> from robust_ssl import models
      >>> from safetensors.numpy import load_file
      >>> encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = export_safetensors(encoder, f"{folder}/encoder.safetensors")
      ...     load_file(path)["layer4.1.conv2.weight"].shape
      (32, 32, 3, 3)
    """
    from safetensors.numpy import save

    refuse_bridge(encoder, "exported")
    if pathlib.Path(file).suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
        raise ValueError(
            f"{file} would hold safetensors, which torch.load does not read: name it "
            f"{pathlib.Path(file).stem}.safetensors"
        )
    cards.check_encoder(encoder)
    arrays = cards.to_arrays(encoder.variables)
    cards.check_arrays(arrays, arrays, "the encoder to export")
    name = _layout_of(encoder)
    (layout,) = (layout for layout in LAYOUTS if layout.name == name)
    tensors = mapping.split(layout.entries(encoder), arrays)
    return _write(file, save(tensors, header_of(encoder, name)))


def header_of(encoder: Encoder, layout: str) -> dict[str, str]:
    """Returns what a file's header says to whoever imports it: network, normalization, layout."""
    builder, options = native.builder_of(encoder)
    record = {"name": encoder.name, "builder": builder, "options": options, "layout": layout}
    record |= native.transform_entry(encoder)
    # transformers and timm refuse a file whose header does not say "pt".
    return {"format": "pt", "robust_ssl": json.dumps(record, allow_nan=False)}


def _layout_of(encoder: Encoder) -> str:
    """The best-known layout that has a name for every variable of a network."""
    module = encoder.module
    if isinstance(module, ResNet):
        return "torchvision-resnet"
    if isinstance(module, ConvNeXt):
        return "timm-convnext"
    if isinstance(module, CLIPResNet):
        return "open-clip-resnet"
    if isinstance(module, Swin):
        return "timm-swin"
    if isinstance(module, ViT) and module.rotary_reference is not None:
        raise ValueError(
            "EVA-02 has no bias of its keys in PyTorch, which training here moves: it is not "
            "exported under timm's names; export_stablehlo takes all of it"
        )
    return "timm-vit" if module.rotary is None else "huggingface-dinov3"


def export_stablehlo(
    model: Encoder | Classifier, file: str | os.PathLike, *, batch: int | None = None
) -> pathlib.Path:
    """Writes a whole model as one StableHLO program: pixels in [0, 1] in, numbers out.

    Weights and normalization are inside; what runs it needs neither this package nor flax, only
    `jax.export.deserialize`.  The same file runs on CPU, CUDA GPUs and TPUs.  What is known of the
    logits and of the pictures is written beside it, ``{"class_names": [...], "transform": {...}}``
    in ``FILE.json``.

    Args:
      model: A `Classifier`, whose logits are the output, or an `Encoder`, whose features are.
      file: Replaced if it is there.
      batch: Images per call; None for any number.

    Returns:
      The file's path.

    Raises:
      ModuleNotFoundError: If the package flatbuffers, which JAX writes such files with, is not
        installed.

    Example:
      >>> import tempfile
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run = load_stablehlo(export_stablehlo(encoder, f"{folder}/encoder.stablehlo"))
      >>> run(jnp.zeros((3, 8, 8, 3))).shape
      (3, 32)
    """
    from jax import export

    refuse_bridge(model, "exported")
    _need_flatbuffers()
    size = model.image_size

    def apply(images):
        outputs = model(images)
        return outputs.logits if isinstance(model, Classifier) else outputs.features

    # A symbol: the program is exported once and takes batches of any size.
    count = batch if batch is not None else export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.float32)
    exported = export.export(jax.jit(apply), platforms=PLATFORMS)(images)
    about = pathlib.Path(f"{os.fspath(file)}.json")
    about.unlink(missing_ok=True)  # of another model that was here
    written = _write(file, bytes(exported.serialize()))
    if beside := names_and_transform(model):
        _write(about, cards.encode(beside))
    return written


def names_and_transform(model: Encoder | Classifier) -> dict[str, Any]:
    """Returns what is known of a model's logits and pictures: ``class_names``, ``transform``."""
    names = getattr(model, "class_names", ())
    encoder = model.encoder if isinstance(model, Classifier) else model
    return ({"class_names": list(names)} if names else {}) | native.transform_entry(encoder)


def load_stablehlo(file: str | os.PathLike) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that `export_stablehlo` wrote.

    Args:
      file: The file; only load one you trust: it is a program.

    Returns:
      A function of pixels in [0, 1], float32 ``[batch, size, size, 3]``.

    Raises:
      ValueError: If the file is not one that JAX exported.
      ModuleNotFoundError: As in `export_stablehlo`.
    """
    from jax import export

    _need_flatbuffers()
    content = disk.read_bytes(file)
    try:
        exported = export.deserialize(bytearray(content))
    except Exception as error:  # flatbuffers says it in many ways
        raise ValueError(f"{file} is not a program that jax.export wrote: {error}") from error
    return exported.call


def _need_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "JAX writes and reads StableHLO files with the package flatbuffers: "
            "pip install flatbuffers",
            name="flatbuffers",
        ) from None


def _write(file: str | os.PathLike, content: bytes) -> pathlib.Path:
    cards.replace_file(pathlib.Path(file), content)
    return pathlib.Path(file)
