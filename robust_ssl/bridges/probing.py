"""What every model of another library is asked before it is taken for an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ssl.build import near
from robust_ssl.models.bridge import Bridge
from robust_ssl.types import Classifier, Encoder
from robust_ssl.weights import normalization

_TOLERANCE = 1e-3  # of the largest output: what other kernels for another batch size may change


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a user says of a model, beside the model.

    Attributes:
      image_size: Height and width, pixels.
      mean: Per channel, of pixels in [0, 1].
      std: Per channel, of pixels in [0, 1].
      num_classes: Of a classifier; None of an encoder, or where only the model knows.
      class_names: What each logit stands for.
      name: For tables.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int | None
    class_names: tuple[str, ...]
    name: str

    @classmethod
    def read(
        cls, image_size: Any, images: Mapping[str, Any], classes: Mapping[str, Any], name: str
    ) -> Traits:
        """Checks what was said.

        Args:
          image_size: Pixels.
          images: ``normalization``, ``mean`` and ``std``, as in `robust_ssl.import_encoder`.
          classes: ``num_classes`` and ``class_names``.
          name: For tables.

        Raises:
          ValueError: If something makes no sense, or contradicts something else.
        """
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ValueError(
                f"image_size must be the height and width in pixels, got {image_size!r}"
            )
        named = dict(images)
        if named["normalization"] is None and named["mean"] is None and named["std"] is None:
            named["normalization"] = "none"  # as attacks of other libraries take a model
        chosen = normalization.choose({}, image_size=image_size, **named)
        names = tuple(map(str, classes["class_names"]))
        count = classes["num_classes"]
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and (not whole or count < 1):
            raise ValueError(f"num_classes must be an integer above 0, got {count!r}")
        if names and count not in (None, len(names)):
            raise ValueError(f"num_classes is {count}, and there are {len(names)} class names")
        return cls(image_size, chosen.mean, chosen.std, count or len(names) or None, names, name)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return (self.image_size, self.image_size, 3)

    def probe(self) -> np.ndarray:
        """Returns two made-up images as the network gets them, float32 ``[2, H, W, 3]``."""
        pixels = np.random.default_rng(0).uniform(size=(2, *self.shape))
        return ((pixels - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def encoder(self, bridge: Bridge, variables: Any, dim: int) -> Encoder:
        """Returns the encoder over a bridge."""
        mean, std = tuple(self.mean), tuple(self.std)
        return Encoder(variables, bridge, mean, std, self.image_size, dim, self.name)

    def model(self, bridge: Bridge, variables: Any, dim: int) -> Encoder | Classifier:
        """Returns an encoder, or a classifier whose features are its logits."""
        encoder = self.encoder(bridge, variables, dim)
        if self.num_classes is None:
            return encoder
        return self.classifier(encoder, Bridge(_same, bridge.kind, (dim,)), dim)

    def classifier(self, encoder: Encoder, head: Bridge, logits: int) -> Classifier:
        """Returns a classifier of an encoder and a head.

        Raises:
          ValueError: If there are other than the named classes, or fewer than two.
        """
        if self.num_classes not in (None, logits):
            raise ValueError(
                f"{head.kind} returns {logits} numbers for an image, and num_classes is "
                f"{self.num_classes}"
            )
        if logits < 2:
            raise ValueError(
                f"{head.kind} returns one number for an image; a classifier here has a logit for "
                "each class, two at least: torch.stack([-x, x]) for one that says yes or no"
            )
        return Classifier(encoder, {"params": {}}, head, logits, self.class_names)


def _same(variables: Any, features: Any) -> Any:
    del variables
    return features


def pick(value: Any, output: str | int | None, kind: str, is_array: Callable[[Any], bool]) -> Any:
    """Returns the one array among what a model returned.

    Args:
      value: An array, a tuple, a list, a mapping, or an object with fields.
      output: Which one: a key, a field, or a place; None where there is only an array.
      kind: What the model is, for messages.
      is_array: Tells arrays from the rest.

    Raises:
      ValueError: If `output` must be named, is not there, or is no array.

    Example:
      >>> pick({"logits": np.ones(2)}, "logits", "it", lambda x: isinstance(x, np.ndarray)).tolist()
      [1.0, 1.0]
    """
    if is_array(value):
        if output in (None, 0):
            return value
        raise ValueError(f"{kind} returns one array, so there is no output {output!r}")
    parts = _parts(value)
    shown = ", ".join(f"{key!r}: {_shown(part, is_array)}" for key, part in parts.items())
    returned = f"{kind} returns a {type(value).__name__} of {{{shown}}}"
    if output is None:
        raise ValueError(f"{returned}; say which is meant: output={next(iter(parts), 0)!r}")
    if isinstance(output, int) and output in range(len(parts)):
        output = list(parts)[output]
    if output not in parts:
        raise ValueError(f"{returned}, no output {output!r}{near(str(output), parts)}")
    if not is_array(parts[output]):
        raise ValueError(f"{returned}; output {output!r} is no array")
    return parts[output]


def _parts(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        names = getattr(value, "_fields", range(len(value)))  # of a named tuple
        return dict(zip(names, value, strict=True))
    return dict(getattr(value, "__dict__", {}))


def _shown(value: Any, is_array: Callable[[Any], bool]) -> str:
    return str(list(value.shape)) if is_array(value) else type(value).__name__


def check_output(values: Any, count: int, kind: str) -> None:
    """Raises ValueError unless an output has one row of finite floats for each image."""
    shape, name = list(np.shape(values)), str(values.dtype).removeprefix("torch.")
    if len(shape) != 2 or shape[0] != count:
        flat = "; flatten or pool it to one row an image" if len(shape) != 2 else ""
        raise ValueError(
            f"{kind} turns {count} image{'s' * (count > 1)} into {shape}; must be "
            f"[{count}, numbers]{flat}"
        )
    if "float" not in name:
        raise ValueError(
            f"{kind} returns {name}, not floats: an answer has no gradient; return features or "
            "logits"
        )


def check_numbers(first: np.ndarray, again: np.ndarray, alone: np.ndarray, kind: str) -> None:
    """Raises ValueError for outputs that are not finite, or that depend on other images.

    Args:
      first: Of two images.
      again: The same once more; where it differs the model is random, which an examination says.
      alone: Of the first image by itself.
      kind: What the model is, for messages.
    """
    if not np.isfinite(first).all():
        bad = "NaN" if np.isnan(first).any() else "infinite"
        raise ValueError(
            f"{kind} returns {bad} numbers for random images in [0, 1]; look at its weights, and "
            "at mean and std"
        )
    scale = np.abs(first).max() or 1.0
    if np.array_equal(first, again) and np.abs(first[:1] - alone).max() > _TOLERANCE * scale:
        raise ValueError(
            f"{kind} gives an image other numbers beside another image: something in it looks at "
            "the batch (batch norm without running statistics?), so no attack on one image is one"
        )


def check_gradient(gradient: Any, kind: str) -> None:
    """Raises ValueError if a gradient for the image is not there or not finite."""
    if gradient is None:
        raise ValueError(
            f"no gradient reaches the image through {kind}: something in it detaches (no_grad, "
            "detach, stop_gradient, numpy); attacks would move nothing"
        )
    if not np.isfinite(jnp.asarray(gradient)).all():
        raise ValueError(f"the gradient of {kind} for a random image is not finite")
