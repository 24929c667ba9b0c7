"""One fitted perturbation for all images: how it is kept, applied, resized, saved and loaded."""

from __future__ import annotations

import operator
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robust_ssl import disk, struct, threats
from robust_ssl.build import happened_in, short_name
from robust_ssl.keys import check_key
from robust_ssl.pixels import check_images, float_pixels
from robust_ssl.types import AttackInputs, Model, Objective, Threat

GRAY = 0.5  # the image around which a perturbation without an image is drawn and projected
_ABSENT = {  # among what an objective gets, and what to do about it
    "labels": ": this attack was given none",
    "target": ": TDAA alone has one",
}


def value_of(objective: Objective, inputs: AttackInputs) -> jax.Array:
    """Returns what an objective gives for a batch, one number.

    Raises:
      ValueError: If it gives something else, as a value for each image.
      Exception: What the objective raises, with a note that names it.
    """
    name = short_name(objective)
    absent = {part: _ABSENT[part] for part in _ABSENT if getattr(inputs, part) is None}
    if inputs.adversarial.logits is None:
        absent["adversarial.logits"] = ": an encoder has none; attack a classifier"
    with happened_in(f"the objective {name!r}", absent):
        value = objective(inputs)
    if getattr(value, "shape", None) != () and not isinstance(value, int | float):
        raise ValueError(
            f"the objective {name} must return one number, the mean over the batch, and returned "
            f"{struct.kind(value)}"
        )
    return value


@struct.dataclass
class UniversalPerturbation:
    """A fitted perturbation; it is called like any attack and looks at the image only.

    Attributes:
      delta: What is added to every image, or a patch's canvas, float ``[H, W, 3]``, pixel units.
      threat: The budget it was fitted for; it says how `delta` meets an image and makes every
        attacked image valid.
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
        """Returns the adversarial image ``[H, W, 3]``; `model` and `label` are not looked at.

        `key` draws the place of a patch of random location; None is its canonical place.

        Raises:
          ValueError: If the image has another size than the perturbation.
        """
        del model, label
        if image.shape != self.delta.shape:
            called = f" {self.name!r}" if self.name else ""
            raise ValueError(
                f"the perturbation{called} has size {self.delta.shape}, but the image has "
                f"size {image.shape}; resize it with .resized({image.shape[:2]})"
            )
        return apply_delta(self.delta, float_pixels(image), self.threat, key)

    def apply(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the adversarial images ``[batch, H, W, 3]``; image i gets ``fold_in(key, i)``.

        Raises:
          ValueError: If images are neither uint8 nor float pixels in [0, 1], or of another size.
        """
        if key is not None:
            check_key(key)
        check_images(images)
        if images.dtype == jnp.uint8:
            images = jnp.asarray(images, jnp.float32) / 255
        if key is None:
            return jax.vmap(lambda image: self(None, None, image))(images)
        keys = _image_keys(key, images.shape[0], None)
        return jax.vmap(lambda k, image: self(k, None, image))(keys, images)

    def resized(self, size: int | tuple[int, int]) -> UniversalPerturbation:
        """Returns the perturbation at another image size (bilinear), inside the same budget.

        A patch keeps its share of the area, a band its frequencies in cycles per pixel.

        Raises:
          ValueError: If that is no size, or the threat makes no sense at it, as a patch below one
            pixel.
        """
        sides = (size, size) if np.ndim(size) == 0 else tuple(size)
        if len(sides) != 2 or any(np.asarray(side).dtype.kind not in "iu" for side in sides):
            raise ValueError(f"a size is one whole number of pixels or two, got {size!r}")
        size = tuple(map(operator.index, sides))
        if min(size) < 1:
            raise ValueError(f"a size is of at least one pixel, got {size}")
        threats.check(self.threat, (*size, 3))
        return self.replace(delta=resize_delta(self.delta, size, self.threat))

    def save(self, path: str | pathlib.Path) -> None:
        """Writes one ``.npz`` file that NumPy alone can read.

        Raises:
          ValueError: If this is a stack of perturbations, it is not finite, or its threat cannot be
            saved (`threats.check_saveable`).
        """
        if np.ndim(self.delta) != 3:
            raise ValueError(
                f"save writes one perturbation [H, W, 3], got shape {self.delta.shape}; save the "
                "members of a fit one by one: fitted.member(i).save(path)"
            )
        if not np.all(np.isfinite(self.delta)):
            raise ValueError(
                f"the perturbation {self.name!r} has entries that are not finite and is not saved; "
                "look at what it was made of: a fit's curve, the model's outputs"
            )
        entries = threats.to_entries(self.threat)
        with disk.replacing(path) as file:  # np.savez on a name would append .npz to it
            np.savez(file, delta=np.asarray(self.delta, np.float32), name=self.name, **entries)

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        threat: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
    ) -> UniversalPerturbation:
        """Reads what `save` wrote.

        Nothing that a file names is imported: `threat` is the class of a threat that is not of this
        package, as `threats.from_entries` takes it.

        Raises:
          ValueError: If the file is not such a file, or the class is needed and not given.
        """
        entries = _read_entries(path)
        delta = entries.pop("delta")
        if delta.ndim != 3 or delta.dtype.kind != "f" or not np.all(np.isfinite(delta)):
            raise ValueError(
                f"{path}: expected a finite float delta [H, W, 3], got {delta.dtype} of shape "
                f"{delta.shape}"
            )
        try:
            budget = threats.from_entries(entries, threat)
            threats.check(budget, delta.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(jnp.asarray(delta, jnp.float32), budget, name=str(entries["name"]))


_MOST_BYTES = 2**30  # of all arrays in a file; those of a perturbation of 4,096 pixels have 2**28


def _read_entries(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with disk.open_regular(path) as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("it holds one array, not named ones")
            entries = disk.read_npz(file, _MOST_BYTES)
        absent = {"delta", "name", "kind"} - set(entries)
        if absent:
            raise ValueError(f"it has no entry {' and no '.join(sorted(absent))}")
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a saved universal perturbation: {error}") from error
    return entries


# ------------------------------------------------- how a perturbation meets an image, by its threat
#
# Only the functions below ask what a threat brings (see `types.Threat`).  To a threat that brings
# nothing a perturbation is added; it speaks of images only, so a perturbation alone is judged on a
# gray one, and no entry exceeds half of the pixel range.


def apply_delta(
    delta: jax.Array, image: jax.Array, threat: Threat, key: jax.Array | None = None
) -> jax.Array:
    """Returns the attacked image, ``[H, W, 3]`` in [0, 1]; `key` is the image's, or None."""
    if hasattr(threat, "apply"):
        return threat.apply(delta, image, key)
    return threat.project(image + delta, image)


def attacked_images(
    delta: jax.Array,
    images: jax.Array,
    threat: Threat,
    *,
    axis_name: str | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Returns a device's part of the attacked images, with the gradient fitting needs.

    An image's key is the threat's own (see `at_step`) folded with the image's place in the global
    batch, so the result does not depend on the number of devices; `first` is the place of the first
    device's first image.  The gradient is that of the pixels that `delta` may move, and lies in the
    threat's band if it has one.
    """
    if hasattr(threat, "apply"):
        if getattr(threat, "key", None) is None:
            return jax.vmap(lambda image: threat.apply(delta, image, None))(images)
        keys = _image_keys(threat.key, images.shape[0], axis_name, first)
        return jax.vmap(lambda key, image: threat.apply(delta, image, key))(keys, images)
    candidates = images + delta.reshape(1, *delta.shape)
    valid = jax.vmap(threat.project)(candidates, images)
    # Where delta touches its budget, rounding decides whether `project` lets the gradient through;
    # only the cut to [0, 1] may stop it, because only there a pixel cannot move.  A pixel at 0 or 1
    # itself can, and a clip would halve its gradient.
    if hasattr(threat, "filter_delta"):
        candidates = images + threat.filter_delta(delta).reshape(1, *delta.shape)
    movable = jnp.where((candidates >= 0.0) & (candidates <= 1.0), candidates, 0.0)
    return lax.stop_gradient(valid) + (movable - lax.stop_gradient(movable))


def at_step(threat: Threat, key: jax.Array, step: jax.Array) -> Threat:
    """Returns the threat as one step of fitting sees it: with the step's key if it wants one."""
    return threat.keyed(jax.random.fold_in(key, step)) if hasattr(threat, "keyed") else threat


def random_delta(key: jax.Array, image_shape: tuple[int, ...], threat: Threat) -> jax.Array:
    """Returns a random allowed perturbation, ``[H, W, 3]``."""
    if hasattr(threat, "sample_delta"):
        return threat.sample_delta(key, image_shape)
    gray = jnp.full(image_shape, GRAY)
    return threat.sample(key, gray) - gray


def within_budget(delta: jax.Array, threat: Threat) -> jax.Array:
    """Returns the allowed perturbation nearest to `delta`, whatever the image."""
    if hasattr(threat, "project_delta"):
        return threat.project_delta(delta)
    gray = jnp.full(delta.shape, GRAY, delta.dtype)
    return threat.project(gray + delta, gray) - gray


def share_at_budget(delta: jax.Array, threat: Threat) -> jax.Array:
    """Returns the share of the entries that the budget alone keeps from growing, a scalar.

    Under a Euclidean budget that is none (unless one entry takes it all), nor in a patch, whose
    budget is no entry's; in a band mostly a few, since the largest entry scales all others.
    """
    if not hasattr(threat, "epsilon"):
        return jnp.zeros(())
    return jnp.mean((jnp.abs(delta) >= threat.epsilon - 1e-6).astype(jnp.float32))


def check_fits_gray(threat: Threat, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError if a budget is larger than a perturbation without an image can use.

    For the host, and for a stack of threats.  Nothing is to be said of a threat that projects
    deltas by itself, or has no ``norm(change)`` for its `epsilon`.
    """
    if hasattr(threat, "project_delta") or not hasattr(threat, "norm"):
        return
    most, largest = float(threat.norm(jnp.full(image_shape, GRAY))), np.max(threat.epsilon)
    if largest > most:
        raise ValueError(
            f"a perturbation for all images cannot use {type(threat).__name__} with epsilon "
            f"{largest:g}: it is judged on a gray image and ends at {most:g}, so larger budgets "
            f"would silently be {most:g}; take at most {most:g}, or a per-image attack such as PGD"
        )


def delta_of_pattern(pattern: jax.Array, threat: Threat) -> jax.Array:
    """Returns the perturbation that numbers in [-1, 1], ``[H, W, 3]``, stand for.

    Added ones are the pattern times `epsilon`; a patch goes from black at -1 to white at 1.
    """
    if hasattr(threat, "delta_of"):
        return threat.delta_of(pattern)
    return within_budget(threat.epsilon * pattern, threat)


def resize_delta(delta: jax.Array, size: tuple[int, int], threat: Threat) -> jax.Array:
    """Returns the perturbation at another image size (bilinear), inside the same budget."""
    if hasattr(threat, "resize_delta"):
        return threat.resize_delta(delta, size)
    return within_budget(jax.image.resize(delta, (*size, delta.shape[-1]), "bilinear"), threat)


def _image_keys(
    key: jax.Array, count: int, axis_name: str | None, first: jax.Array | int = 0
) -> jax.Array:
    """Returns the keys of a device's part of the batch, by the images' global places."""
    if axis_name is not None:
        first = first + count * lax.axis_index(axis_name)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(first + jnp.arange(count))
