"""`from_torch`: a PyTorch module as an encoder or a classifier, without conversion."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl.bridges import probing
from robust_ssl.bridges.callbacks import differentiable
from robust_ssl.bridges.probing import Traits
from robust_ssl.bridges.torch_runner import Runner
from robust_ssl.models.bridge import Bridge
from robust_ssl.types import Classifier, Encoder


def from_torch(
    module: Any,
    image_size: int,
    *,
    output: str | int | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    head: str | None = None,
    taps: Mapping[str, str] | None = None,
    normalization: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
) -> Encoder | Classifier:
    """Takes a PyTorch module for an encoder, or for a classifier where classes or a head are named.

    Every attack, score and check calls the module itself, and its gradient is torch's own.  It
    stays where it is and as it is: it is never put into another mode, and no ``.grad`` is written.
    It cannot be trained, saved or exported here, and runs for one JAX device.  Images go to the
    module through host memory, also where both are on a GPU.

    Args:
      module: Maps float images ``[n, 3, H, W]`` to ``[n, numbers]``, each image by itself; in
        evaluation mode, on one device.
      image_size: Height and width, pixels.
      output: A key, field or place, where the module returns several tensors: ``"logits"``, 0.
      num_classes: Makes it a `Classifier`.
      class_names: What each logit stands for; makes it a classifier too.
      head: Name of the submodule that makes logits of features, such as ``"fc"``; makes it a
        classifier whose features are what goes into that one.  Without it they are the logits.
      taps: Names of taps and of the submodules whose outputs they are, for attacks on layers:
        ``{"block1": "layer1", "block2": "layer2"}``.
      normalization: What the module gets: pixels in [0, 1] (``"none"``, the default), or
        normalized ones, ``"imagenet"`` and so on as in `import_encoder`.
      mean: In its place, per channel.
      std: In its place, per channel.
      name: For tables; None is the class's name.

    Returns:
      An `Encoder`, or a `Classifier`.

    Raises:
      TypeError: If it is no module.
      ValueError: If a part of it is in training mode or on another device, it does not take such
        images, returns something else than finite floats for each image, or no gradient reaches
        the image.
      ModuleNotFoundError: If PyTorch is not installed.

    Example:
      >>> import torch  # doctest: +SKIP
      >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))  # doctest: +SKIP
      >>> from_torch(net.eval(), 8, num_classes=5).image_size  # doctest: +SKIP
      8
    """
    kind = _kind(module)
    images = {"normalization": normalization, "mean": mean, "std": std}
    classes = {"num_classes": num_classes, "class_names": class_names}
    traits = Traits.read(image_size, images, classes, name or type(module).__name__)
    runner = Runner(module, kind, output, dict(taps or {}), head)
    shapes = _tried(runner, traits, kind)
    names = tuple(runner.taps)
    call = differentiable(
        runner.forward, runner.backward, shapes, rank=3, kind=kind, remembering=runner.remembering
    )
    function = functools.partial(_features, call, names)
    bridge = Bridge(function, kind, traits.shape)
    if head is None:
        return traits.model(bridge, {"params": {}}, shapes[0][0])
    return _with_head(runner, traits, bridge, shapes[0], kind)


def _kind(module: Any) -> str:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "from_torch needs PyTorch: pip install torch, as for the module itself", name="torch"
        ) from None
    if isinstance(module, type) or not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"from_torch takes a torch.nn.Module, got {module!r}; a function of images goes "
            "through robust_ssl.from_callable"
        )
    return f"the torch module {type(module).__name__}"


def _tried(runner: Runner, traits: Traits, kind: str) -> list[tuple[int, ...]]:
    """Calls the module on made-up images; returns the shapes of its outputs for one image."""
    images = traits.probe()
    # Asked of the tensor: made into a NumPy array it would say float32 of anything.
    for count in (2, 1):
        probing.check_output(runner.output_of(images[:count]), count, kind)
    first, again, alone = (runner.forward(x) for x in (images, images, images[:1]))
    probing.check_numbers(first[0], again[0], alone[0], kind)
    cotangents = tuple(np.ones_like(values) for values in first)
    probing.check_gradient(runner.gradient(images, cotangents, output_only=True), kind)
    return [values.shape[1:] for values in first]


def _features(call, names, variables, images):
    del variables
    features, *activations = call(images)
    return features, dict(zip(names, activations, strict=True))


def _with_head(
    runner: Runner, traits: Traits, bridge: Bridge, shape: tuple[int, ...], kind: str
) -> Classifier:
    """Returns a classifier in two parts: the module up to its head, and the head."""
    images = traits.probe()
    whole, part = runner.whole(images), runner.head_runner()
    (features, *_), kind = runner.forward(images), f"the head {runner.head!r} of {kind}"
    (logits,) = part.forward(features)
    probing.check_output(logits, 2, kind)
    if logits.shape != whole.shape or not np.allclose(logits, whole, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{kind} is not the last thing that the module does; name another, or none"
        )
    call = differentiable(part.forward, part.backward, [logits.shape[1:]], rank=1, kind=kind)
    head = Bridge(functools.partial(_logits, call), kind, shape)
    return traits.classifier(
        traits.encoder(bridge, {"params": {}}, shape[0]), head, logits.shape[1]
    )


def _logits(call, variables, features):
    del variables
    return call(features)[0]
