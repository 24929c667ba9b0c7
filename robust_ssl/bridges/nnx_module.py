"""`from_nnx`: a module of `flax.nnx` as an encoder or a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robust_ssl.bridges.functions import over_jax
from robust_ssl.bridges.probing import Traits
from robust_ssl.types import Classifier, Encoder

# What modules of nnx have where training and evaluation differ, and its value in training.
_TRAINING = {"deterministic": False, "use_running_average": False}


def from_nnx(
    module: Any,
    image_size: int,
    *,
    output: str | int | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    normalization: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
) -> Encoder | Classifier:
    """Takes a `flax.nnx` module for an encoder, or for a classifier where classes are named.

    Its weights are copied: a later update of the module is not seen.

    Args:
      module: Maps float32 images ``[n, H, W, 3]`` to ``[n, numbers]``; in evaluation mode.
      image_size: Height and width, pixels.
      output: As in `from_callable`, as all that follow.
      num_classes: Makes it a `Classifier`.
      class_names: What each logit stands for.
      normalization: What the module gets; pixels in [0, 1] if nothing is said.
      mean: In its place, per channel.
      std: In its place, per channel.
      name: For tables; None is the class's name.

    Returns:
      An `Encoder`, or a `Classifier`.

    Raises:
      TypeError: If it is no module of nnx.
      ValueError: If a part of it is in training mode, and as in `from_callable`.

    Example:
      >>> from flax import nnx
      >>> class Flat(nnx.Module):
      ...     def __init__(self):
      ...         self.linear = nnx.Linear(48, 5, rngs=nnx.Rngs(0))
      ...     def __call__(self, x):
      ...         return self.linear(x.reshape(len(x), -1))
      >>> from_nnx(Flat(), 4).dim
      5
    """
    from flax import nnx

    if isinstance(module, type) or not isinstance(module, nnx.Module):
        raise TypeError(f"from_nnx takes a flax.nnx.Module, got {module!r}; see from_callable")
    kind = f"the nnx module {type(module).__name__}"
    training = [
        f"{'/'.join(map(str, path)) or 'itself'} ({field}={value})"
        for path, part in nnx.iter_modules(module)
        for field, value in _TRAINING.items()
        if getattr(part, field, None) is value
    ]
    if training:
        raise ValueError(
            f"{kind} is in training mode: {', '.join(training[:3])}; call module.eval() first"
        )
    images = {"normalization": normalization, "mean": mean, "std": std}
    classes = {"num_classes": num_classes, "class_names": class_names}
    traits = Traits.read(image_size, images, classes, name or type(module).__name__)
    # Random keys, which dropout carries, are no weights, and no file and no sum can hold them.
    graph, random, state = nnx.split(module, nnx.RngState, ...)

    def call(variables, images):
        return nnx.merge(graph, random, variables["params"])(images)

    return over_jax(call, {"params": state}, output, traits, kind)
