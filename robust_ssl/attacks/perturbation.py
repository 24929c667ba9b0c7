"""One fitted perturbation for all images: how it is kept, applied, resized, saved and loaded."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from robust_ssl import threats
from robust_ssl.types import Model, Threat

GREY = 0.5  # the image around which a perturbation without an image is drawn and projected


@struct.dataclass
class UniversalPerturbation:
    """A fitted perturbation; it is called like any attack and looks at the image only.

    Attributes:
      delta: What is added to every image, float ``[H, W, 3]``, pixel units.
      threat: The budget it was fitted for; `project` makes every attacked image valid.
      name: For tables and file names.

    Example:
      >>> attack = UniversalPerturbation(jnp.full((8, 8, 3), 0.1), threats.Linf(0.1))
      >>> round(float(attack(None, None, jnp.full((8, 8, 3), 0.95)).max()), 4)
      1.0
    """

    delta: jax.Array
    threat: Any
    name: str = struct.field(pytree_node=False, default="universal")

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per attacked image: none, they were spent in fitting."""
        return 0

    def __call__(
        self,
        key: jax.Array | None,
        model: Model | None,
        image: jax.Array,
        label: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the adversarial image ``[H, W, 3]``; only `image` is looked at.

        Raises:
          ValueError: If the image has another size than the perturbation.
        """
        del key, model, label
        if image.shape != self.delta.shape:
            raise ValueError(
                f"the perturbation {self.name!r} has size {self.delta.shape}, but the image has "
                f"size {image.shape}; resize it with .resized({image.shape[:2]})"
            )
        return self.threat.project(image + self.delta, image)

    def apply(self, images: jax.Array) -> jax.Array:
        """Returns the adversarial images ``[batch, H, W, 3]``."""
        return jax.vmap(lambda image: self(None, None, image))(images)

    def resized(self, size: int | tuple[int, int]) -> UniversalPerturbation:
        """Returns the perturbation at another image size (bilinear), inside the same budget."""
        height, width = (size, size) if isinstance(size, int) else size
        delta = jax.image.resize(self.delta, (height, width, 3), "bilinear")
        return self.replace(delta=within_budget(delta, self.threat))

    def save(self, path: str | pathlib.Path) -> None:
        """Writes one ``.npz`` file that NumPy alone can read.

        Raises:
          ValueError: If this is a stack of perturbations, or its threat is not of this package.
        """
        kind = type(self.threat).__name__
        if np.ndim(self.delta) != 3:
            raise ValueError(
                f"save writes one perturbation [H, W, 3], got shape {self.delta.shape}; save the "
                "members of a fit one by one: fitted.member(i).save(path)"
            )
        if kind not in _THREATS:
            raise ValueError(f"save knows the threats {sorted(_THREATS)}, got {kind}")
        with open(path, "wb") as file:  # np.savez on a name would append .npz to it
            np.savez(
                file,
                delta=np.asarray(self.delta, np.float32),
                epsilon=np.asarray(self.threat.epsilon, np.float32),
                kind=np.asarray(kind),
                name=np.asarray(self.name),
            )

    @classmethod
    def load(cls, path: str | pathlib.Path) -> UniversalPerturbation:
        """Reads what `save` wrote.

        Raises:
          ValueError: If the file is not such a file; the message says what is wrong with it.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                entries = {name: stored[name] for name in ("delta", "epsilon", "kind", "name")}
        except (ValueError, KeyError, EOFError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} is not a saved universal perturbation: {error}") from error
        delta, kind = entries["delta"], str(entries["kind"])
        if kind not in _THREATS or delta.ndim != 3 or not np.all(np.isfinite(delta)):
            raise ValueError(
                f"{path}: expected a finite delta [H, W, 3] and a threat of {sorted(_THREATS)}, "
                f"got shape {delta.shape} and {kind!r}"
            )
        threats.check_epsilon(entries["epsilon"])
        threat = _THREATS[kind](jnp.asarray(entries["epsilon"]))
        return cls(jnp.asarray(delta), threat, name=str(entries["name"]))


_THREATS = {"Linf": threats.Linf, "L2": threats.L2}


def within_budget(delta: jax.Array, threat: Threat) -> jax.Array:
    """Returns the allowed perturbation nearest to `delta`, whatever the image.

    A threat speaks of images; a perturbation alone is judged on a grey one, so no entry exceeds
    half of the pixel range.
    """
    grey = jnp.full(delta.shape, GREY, delta.dtype)
    return threat.project(grey + delta, grey) - grey
