"""Whole models for PyTorch and ONNX: encoder, head and normalization, compared before they count.

Nothing is written unless the other side gives the same numbers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import tempfile
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.data import pictures
from robust_ssl.models import heads
from robust_ssl.models.bridge import refuse_bridge
from robust_ssl.types import Classifier, Encoder
from robust_ssl.weights import cards, export, mapping, native, torch_text
from robust_ssl.weights.convert import LAYOUTS

WEIGHTS_FILE, MODEL_FILE = "model.safetensors", "model.py"
TOLERANCE = 1e-5  # of the largest number, between this package and the file
_LAYOUTS = {"ResNet": "torchvision-resnet", "ViT": "timm-vit", "ConvNeXt": "timm-convnext"}


class Exported(NamedTuple):
    """What was written.

    Attributes:
      path: Where.
      difference: The largest between the outputs here and there, relative to the largest output;
        None where PyTorch is not installed, so that nothing was compared.
    """

    path: pathlib.Path
    difference: float | None


def export_torch(model: Encoder | Classifier, directory: str | os.PathLike) -> Exported:
    """Writes a whole model for PyTorch: ``model.safetensors``, and ``model.py`` that loads it.

    The Python file needs torch and safetensors and nothing of this package.  In the directory,
    ``from model import load; load()(images)`` takes pixels in [0, 1], float32 ``[n, 3, H, W]``,
    which ``model.picture(file)`` makes of a picture as `Encoder.resizing` says.
    Where PyTorch is installed, outputs and pictures are compared before anything is written.

    Args:
      model: A `Classifier` with a linear or an MLP head, whose logits are the output, or an
        `Encoder`, whose features are.  Its network is one of `robust_ssl.models`.
      directory: Made if it is not there; the two files in it are replaced.

    Returns:
      The directory, and the largest difference.

    Raises:
      ValueError: If there is no PyTorch form of the network or the head, or the numbers differ.

    Example:
      >>> import tempfile
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = export_torch(net, folder)
      ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
      ['model.py', 'model.safetensors']
    """
    text, weights = _files(model)
    difference = None
    if importlib.util.find_spec("torch") is not None:
        with tempfile.TemporaryDirectory() as folder:
            written = _executed(text, weights, pathlib.Path(folder))
            _compare_pictures(model, written.resized)
            difference = _compared(model, _torch_answers(written.load()), "model.py")
    directory = pathlib.Path(directory)
    cards.replace_file(directory / WEIGHTS_FILE, weights)
    cards.replace_file(directory / MODEL_FILE, text)
    return Exported(directory, difference)


def export_onnx(model: Encoder | Classifier, file: str | os.PathLike) -> Exported:
    """Writes a whole model as one ONNX file: ``images`` in, ``logits`` or ``features`` out.

    Images are pixels in [0, 1], float32 ``[n, 3, H, W]``, any number at a time.  The file is run
    by onnxruntime and compared before it is written.  Its metadata, as JSON, are ``class_names``,
    what logits stand for, and ``transform``, how pictures get their size, where these are known.

    Args:
      model: As in `export_torch`.
      file: Replaced if it is there.

    Returns:
      The file's path, and the largest difference.

    Raises:
      ValueError: As `export_torch`, and if ONNX cannot hold the model.
      ModuleNotFoundError: If a package of the extra `onnx` is not installed.
    """
    check_onnx()
    text, weights = _files(model)
    what = "logits" if isinstance(model, Classifier) else "features"
    with tempfile.TemporaryDirectory() as folder:
        module = _executed(text, weights, pathlib.Path(folder)).load()
        content = _onnx(module, model, what)
    difference = _compared(model, _onnx_answers(content), "the ONNX file")
    cards.replace_file(pathlib.Path(file), content)
    return Exported(pathlib.Path(file), difference)


def check_onnx() -> None:
    """Raises ModuleNotFoundError, with what to do, unless ONNX files can be written."""
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX files are written and checked by {', '.join(packages)}; not installed: "
            f"{', '.join(missing)}; pip install 'robust-ssl[onnx]'",
            name=missing[0],
        )


# --- What is written ----------------------------------------------------------------------------


def _files(model: Encoder | Classifier) -> tuple[bytes, bytes]:
    """Returns the texts of the Python file and of the weights."""
    from safetensors.numpy import save

    refuse_bridge(model, "exported")
    whole = isinstance(model, Classifier)
    encoder = model.encoder if whole else model
    tensors, head = _head(model) if whole else ({}, "nn.Identity()")
    tensors |= {f"encoder.{name}": x for name, x in _encoder_tensors(encoder).items()}
    for name in ("mean", "std"):
        tensors[name] = np.array(getattr(encoder, name), np.float32).reshape(1, 3, 1, 1)
    text = torch_text.text_of(
        encoder.module,
        image_size=encoder.image_size,
        head=head,
        class_names=model.class_names if whole else (),
        classes=model.num_classes if whole else encoder.dim,
        resizing=encoder.resizing,
    )
    # The normalization is in the file, and whoever imports it again means no other.
    header = export.header_of(encoder, _LAYOUTS[type(encoder.module).__name__])
    return text.encode(), save(tensors, header)


def _encoder_tensors(encoder: Encoder) -> dict[str, np.ndarray]:
    native.builder_of(encoder)  # refuses what no builder makes, and input transformations
    kind = type(encoder.module).__name__
    if jnp.dtype(encoder.module.dtype) != jnp.float32:
        raise ValueError(
            f"the encoder computes in {jnp.dtype(encoder.module.dtype).name}, and its PyTorch form "
            "in float32; load it without dtype, or export --stablehlo"
        )
    if kind not in _LAYOUTS or getattr(encoder.module, "rotary_reference", None) is not None:
        raise ValueError(
            f"there is no PyTorch form of this {kind}, but of a ResNet, a ViT (not EVA-02's) and a "
            "ConvNeXt of robust_ssl.models; export --stablehlo"
        )
    (layout,) = (layout for layout in LAYOUTS if layout.name == _LAYOUTS[kind])
    return mapping.split(layout.entries(encoder), cards.to_arrays(encoder.variables))


def _head(classifier: Classifier) -> tuple[dict[str, np.ndarray], str]:
    """Returns the head's tensors and its expression in PyTorch."""
    head, order = classifier.head, slice(None)
    if isinstance(head, heads.Reordered):
        head, order = head.head, np.array(head.order)
    params = classifier.head_variables.get("params", {})
    dim, classes = classifier.encoder.dim, classifier.num_classes
    if isinstance(head, heads.LinearHead):
        return _dense("head", params["linear"], order), f"nn.Linear({dim}, {classes})"
    if isinstance(head, heads.MLPHead):
        hidden = head.hidden
        tensors = _dense("head.0", params["dense1"]) | _dense("head.3", params["dense2"])
        parts = (
            *(f"nn.Linear({dim}, {hidden})", "nn.ReLU()", f"nn.Dropout({head.dropout})"),
            *(f"nn.Linear({hidden}, {hidden})", "nn.ReLU()", f"nn.Linear({hidden}, {classes})"),
        )
        return tensors | _dense(
            "head.5", params["output"], order
        ), f"nn.Sequential({', '.join(parts)})"
    raise ValueError(
        f"there is no PyTorch form of the head {type(head).__name__}; there is one of linear and "
        "MLP heads of robust_ssl.models. --stablehlo writes any"
    )


def _dense(name: str, params: Any, order: Any = slice(None)) -> dict[str, np.ndarray]:
    weight, bias = np.asarray(params["kernel"]).T[order], np.asarray(params["bias"])[order]
    return {f"{name}.weight": np.ascontiguousarray(weight), f"{name}.bias": bias}


# --- What is compared ---------------------------------------------------------------------------


def _probe(size: int) -> np.ndarray:
    """Returns black, white and random images, float32 ``[4, size, size, 3]``."""
    images = np.random.default_rng(0).uniform(size=(4, size, size, 3)).astype(np.float32)
    images[0], images[1] = 0.0, 1.0
    return images


def _compared(model: Encoder | Classifier, answers: Any, what: str) -> float:
    """Returns the largest relative difference to ``answers(images)``.

    Raises:
      ValueError: If it is above `TOLERANCE`, or a number is not finite.
    """
    images = _probe(model.image_size)

    def apply(model, images):
        outputs = model(images)
        return outputs.logits if isinstance(model, Classifier) else outputs.features

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(apply)(model, images))
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    theirs = np.concatenate([answers(channels_first[:1]), answers(channels_first[1:])])
    difference = float(np.abs(ours - theirs).max() / (np.abs(ours).max() or 1.0))
    if not difference <= TOLERANCE:  # NaN too
        raise ValueError(
            f"{what} gives other numbers than the model: the largest difference is "
            f"{difference:.1e} of the largest number, at most {TOLERANCE:.0e} is allowed; "
            "nothing is written"
        )
    return difference


def _compare_pictures(model: Encoder | Classifier, resized: Any) -> None:
    """Raises ValueError unless the file resizes pictures to the very pixels that data get here."""
    from PIL import Image

    encoder = model.encoder if isinstance(model, Classifier) else model
    size = encoder.image_size
    for height, width in ((size, size), (size + 5, 2 * size + 3), (3 * size + 4, size + 2)):
        random = np.random.default_rng(width)
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = pictures.resize(image, size, encoder.resizing)
        if not np.array_equal(np.asarray(resized(Image.fromarray(image))), ours):
            raise ValueError(
                f"model.py resizes pictures of {width}x{height} pixels to others than this package "
                f"as {encoder.resizing}; nothing is written"
            )


def _executed(text: bytes, weights: bytes, folder: pathlib.Path) -> Any:
    """Returns the Python file as a user would have it, imported from a folder of the two."""
    (folder / MODEL_FILE).write_bytes(text)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    spec: Any = importlib.util.spec_from_file_location("robust_ssl_exported", folder / MODEL_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch_answers(module: Any) -> Any:
    def answers(images: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return answers


def _onnx(module: Any, model: Encoder | Classifier, what: str) -> bytes:
    """Returns a torch module as ONNX."""
    import onnx
    import torch

    size = model.image_size
    example = torch.zeros(2, 3, size, size)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own parts
        program = torch.onnx.export(
            module, (example,), input_names=["images"], output_names=[what], dynamo=True,
            dynamic_shapes={"images": {0: batch}}, verbose=False,
        )  # fmt: skip
    written = program.model_proto
    known = export.names_and_transform(model)
    if known:
        texts = {name: json.dumps(value) for name, value in known.items()}
        onnx.helper.set_model_props(written, texts)
    try:
        return written.SerializeToString()
    except ValueError as error:  # protobuf's limit of 2 GB
        raise ValueError(f"ONNX cannot hold the model in one file: {error}") from error


def _onnx_answers(content: bytes) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def answers(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": images})[0]

    return answers
