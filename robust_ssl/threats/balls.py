"""Balls around an image, by the largest move of a pixel or by Euclidean length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct

_METHODS = ("sample", "project", "steepest")  # of a `robust_ssl.types.Threat`


def check_epsilon(epsilon) -> None:
    """Raises ValueError unless every budget is a number in [0, 1], as one for a pixel must be.

    For the host, before anything is compiled: inside a compiled function a budget is an array
    whose value nobody can look at.

    Args:
      epsilon: One budget or several, in [0, 1] pixel units.

    Raises:
      ValueError: If a budget is negative, above 1 or not a number.

    Example:
      >>> check_epsilon([0.0, 8 / 255])
      >>> check_epsilon(8)
      Traceback (most recent call last):
      ValueError: epsilon must lie in [0, 1] (pixel units, for example 8/255), got 8.0
    """
    for value in np.asarray(epsilon, np.float64).reshape(-1):
        if not 0 <= value <= 1:
            raise ValueError(
                f"epsilon must lie in [0, 1] (pixel units, for example 8/255), got {value}"
            )


def check(threat: Any, image_shape: tuple[int, ...] | None = None) -> None:
    """Raises ValueError unless a threat, or a stack of threats, can be met by any image.

    For the host, as `check_epsilon` is; `attacks.fit` and loading call it.

    Args:
      threat: Its method ``check(image_shape)`` decides, as that of `L2` does.  Without one its
        `epsilon`, if there is any, must lie in [0, 1].
      image_shape: (height, width, 3), or None to check what does not depend on it.

    Raises:
      ValueError: If it lacks a method of `types.Threat`, a budget is out of range, a patch does
        not fit, a band is empty.

    Example:
      >>> check(Linf(8 / 255), (32, 32, 3))
      >>> check(Linf(np.array([8.0])))
      Traceback (most recent call last):
      ValueError: epsilon must lie in [0, 1] (pixel units, for example 8/255), got 8.0
    """
    check_is_threat(threat)
    check_budget(threat, image_shape)


def check_budget(threat: Any, image_shape: tuple[int, ...] | None = None) -> None:
    """Raises ValueError as `check` does, but asks for no methods: what is saved is its fields."""
    if hasattr(threat, "check"):
        threat.check(image_shape)
    else:
        check_epsilon(getattr(threat, "epsilon", 0.0))


def check_is_threat(threat: Any) -> None:
    """Raises ValueError for what is no threat, by the methods that it lacks.

    Example:
      >>> check_is_threat(Linf(8 / 255))
    """
    if isinstance(threat, type):
        name = threat.__name__
        raise ValueError(f"{name} is a class and no threat; make one: {name}(...)")
    # One that is for all images alone may say `sample` and `project` of a delta.
    named = {name: (name, f"{name}_delta") for name in _METHODS}
    has = {name for name in named if any(callable(getattr(threat, n, None)) for n in named[name])}
    absent = [name for name in _METHODS if name not in has]
    if absent:
        lacks = " and ".join(filter(None, [", ".join(absent[:-1]), absent[-1]]))
        raise ValueError(
            f"a {type(threat).__name__} is no threat: it has no {lacks}, as threats.Linf(8 / 255) "
            "has; take one of robust_ssl.threats, or give yours the methods of "
            "robust_ssl.types.Threat"
        )


def over_largest(gradient: jax.Array) -> jax.Array:
    """Returns a gradient over its largest entry: the squares of a tiny one would vanish.

    Example:
      >>> over_largest(jnp.array([0.0, -2e-30])).tolist()
      [0.0, -1.0]
    """
    largest = jnp.max(jnp.abs(gradient))
    return gradient / jnp.where(largest > 0, largest, 1.0)


@struct.dataclass
class Linf:
    r"""Every pixel value may move by at most `epsilon`.

    .. math:: \{x' \in [0, 1]^d : \max_i |x'_i - x_i| \le \epsilon\}

    Attributes:
      epsilon: Budget in [0, 1] pixel units, float scalar.

    Raises:
      ValueError: If the budget is a number that it cannot be, as 8 for 8/255.

    Example:
      >>> threat = Linf(0.25)
      >>> threat.project(jnp.array([0.9, 1.4]), jnp.array([0.5, 1.0])).tolist()
      [0.75, 1.0]

    References:
      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
      Section 2.
    """

    epsilon: jax.Array | float

    def __check_init__(self):
        """Checks a budget that is a number; arrays may be traced, and are for `check`."""
        if struct.is_number(self.epsilon):
            check(self)

    def norm(self, change: jax.Array) -> jax.Array:
        """Returns what `epsilon` bounds: the largest move of a pixel value, a scalar."""
        return jnp.max(jnp.abs(change))

    def sample(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Returns an image drawn uniformly from the ball, then cut to [0, 1]; same shape."""
        noise = jax.random.uniform(key, image.shape, image.dtype, -1.0, 1.0)
        return self.project(image + self.epsilon * noise, image)

    def project(self, candidate: jax.Array, image: jax.Array) -> jax.Array:
        """Returns the allowed image nearest to `candidate`; `image` must be in [0, 1]."""
        in_ball = jnp.clip(candidate, image - self.epsilon, image + self.epsilon)
        return jnp.clip(in_ball, 0.0, 1.0)

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """Returns the sign of the gradient: all pixels move by one, zeros stay."""
        return jnp.sign(gradient)


@struct.dataclass
class L2:
    r"""The whole image may move by at most `epsilon` in Euclidean length.

    .. math:: \{x' \in [0, 1]^d : \|x' - x\|_2 \le \epsilon\}

    All entries of an array count into one length, so a batch goes through `jax.vmap`.

    Attributes:
      epsilon: Budget, float scalar, at least 0: the Euclidean length of a change of pixels in
        [0, 1], which grows with the image.  Usual are 0.5 at 32x32 and 3.0 at 224x224; a change
        of every pixel from 0 to 1 has ``sqrt(H * W * 3)``.

    Raises:
      ValueError: If the budget is a number that it cannot be.

    Example:
      >>> L2(0.25).project(jnp.array([0.0, 1.0]), jnp.zeros(2)).tolist()
      [0.0, 0.25]
    """

    epsilon: jax.Array | float

    def __check_init__(self):
        """Checks a budget that is a number; arrays may be traced, and are for `check`."""
        if struct.is_number(self.epsilon):
            check(self)

    def check(self, image_shape: tuple[int, ...] | None = None) -> None:
        """Raises ValueError unless every budget is finite, at least 0 and within the image."""
        most = np.inf if image_shape is None else np.sqrt(np.prod(image_shape))
        for value in np.asarray(self.epsilon, np.float64).reshape(-1):
            if not (np.isfinite(value) and 0 <= value <= most):
                bound = "" if image_shape is None else f", at most {most:.4g} for {image_shape}"
                raise ValueError(
                    "the epsilon of L2 is a Euclidean length of pixels in [0, 1], finite and at "
                    f"least 0 (for example 0.5 at 32x32){bound}, got {value}"
                )

    def norm(self, change: jax.Array) -> jax.Array:
        """Returns what `epsilon` bounds: the Euclidean length, a scalar with gradient 0 at zero."""
        squared = jnp.sum(change**2)
        return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)

    def sample(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Returns an image drawn uniformly from the ball, then cut to [0, 1]; same shape."""
        direction_key, radius_key = jax.random.split(key)
        direction = self.steepest(jax.random.normal(direction_key, image.shape, image.dtype))
        radius = jax.random.uniform(radius_key, (), image.dtype) ** (1 / image.size)
        return self.project(image + self.epsilon * radius * direction, image)

    def project(self, candidate: jax.Array, image: jax.Array) -> jax.Array:
        """Returns `candidate` pulled straight towards `image` into the ball, then cut to [0, 1].

        Cutting moves every pixel nearer to `image`, which is in [0, 1], so the result stays in
        the ball.  It is the nearest allowed image wherever the cut changes nothing.
        """
        change = candidate - image
        squared = jnp.sum(change**2)
        inside = squared <= self.epsilon**2
        length = jnp.sqrt(jnp.where(inside, 1.0, squared))  # never the root of zero: its gradient
        shrunk = image + change * (self.epsilon / length)
        return jnp.clip(jnp.where(inside, candidate, shrunk), 0.0, 1.0)

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """Returns the gradient scaled to length one; a zero gradient stays zero."""
        scaled = over_largest(gradient)
        length = jnp.sqrt(jnp.sum(scaled**2))
        return scaled / jnp.where(length > 0, length, 1.0)
