"""`from_callable`: any function of images as an encoder or a classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.bridges import probing
from robust_ssl.bridges.callbacks import differentiable
from robust_ssl.bridges.probing import Traits
from robust_ssl.models.bridge import Bridge
from robust_ssl.types import Classifier, Encoder


def from_callable(
    function: Callable[..., Any],
    image_size: int,
    *,
    variables: Any = None,
    on_host: bool = False,
    gradient: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    output: str | int | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    normalization: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
) -> Encoder | Classifier:
    """Takes a function of images for an encoder, or for a classifier where classes are named.

    It can be attacked, measured and examined.  It cannot be trained, saved or exported here, and
    runs on one device.

    Args:
      function: Maps float32 images ``[n, H, W, 3]`` to features or logits ``[n, numbers]``, each
        image by itself, with operations of JAX; with `variables` it is
        ``function(variables, images)``.
      image_size: Height and width, pixels.
      variables: A tree of arrays; without it, what the function closes over is compiled in, anew
        for each call of `measure` or `attack`.
      on_host: The function takes and returns NumPy arrays: a call of another library, or of a
        service.
      gradient: With `on_host`: ``gradient(images, cotangent)``, of the sum of the outputs times
        the cotangent ``[n, numbers]``, for the images.  Without it only attacks work that need no
        gradient, such as ``"square"``.
      output: A key or a place, where the function returns several arrays.
      num_classes: Makes it a `Classifier`, whose features are its logits.
      class_names: What each logit stands for; makes it a classifier too.
      normalization: What the function gets: pixels in [0, 1] (``"none"``, the default), or
        normalized ones, ``"imagenet"`` and so on as in `import_encoder`.
      mean: In its place, per channel.
      std: In its place, per channel.
      name: For tables.

    Returns:
      An `Encoder`, or a `Classifier`.

    Raises:
      ValueError: If the function does not take such images, or returns something else than
        finite floats for each image, or no gradient reaches the image.

    Example:
      >>> brightness = from_callable(lambda x: x.mean(axis=(1, 2)), 8, num_classes=3)
      >>> brightness(jnp.ones((2, 8, 8, 3))).logits.tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"from_callable takes a function of images, got {function!r}")
    name = name or getattr(function, "__name__", type(function).__name__)
    images = {"normalization": normalization, "mean": mean, "std": std}
    classes = {"num_classes": num_classes, "class_names": class_names}
    traits, kind = Traits.read(image_size, images, classes, name), f"the function {name}"
    if gradient is not None and not on_host:
        raise ValueError("gradient= belongs to on_host=True: JAX differentiates its own functions")
    if on_host:
        if variables is not None:
            raise ValueError("variables= is for functions of JAX: one on the host has its own")
        return _on_host(function, gradient, output, traits, kind)
    taken = {"params": {} if variables is None else variables}
    call = _with(function, variables is not None)
    return over_jax(call, taken, output, traits, kind, closes_over=variables is None)


def _with(function: Callable[..., Any], has_variables: bool) -> Callable[[Any, Any], Any]:
    if has_variables:
        return lambda taken, images: function(taken["params"], images)
    return lambda taken, images: function(images)


def over_jax(
    call: Callable[[Any, jax.Array], Any],
    variables: Any,
    output: str | int | None,
    traits: Traits,
    kind: str,
    *,
    closes_over: bool = False,
) -> Encoder | Classifier:
    """Returns the model over ``call(variables, images)``, once it has been tried."""

    def chosen(variables, images):
        return probing.pick(call(variables, images), output, kind, _is_array)

    def features(variables, images):
        return jnp.asarray(chosen(variables, images), jnp.float32), {}

    images = jnp.asarray(traits.probe())
    try:
        shape = jax.eval_shape(chosen, variables, images)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"{kind} is no function of JAX: it turns images into NumPy arrays; say on_host=True"
        ) from error
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"{kind} does not take images {list(images.shape)}: {error}") from error
    probing.check_output(shape, 2, kind)
    run = jax.jit(lambda images: features(variables, images)[0])
    alone = run(images[:1])
    probing.check_output(alone, 1, kind)
    probing.check_numbers(*(np.asarray(x) for x in (run(images), run(images), alone)), kind)
    weights = jnp.cos(jnp.arange(shape.shape[1]))[None]  # the plain sum of [-x, x] has no gradient
    gradient = jax.jit(jax.grad(lambda images: (run(images) * weights).sum()))(images)
    probing.check_gradient(gradient if np.any(gradient) else None, kind)
    bridge = Bridge(features, kind, traits.shape, closes_over)
    return traits.model(bridge, variables, shape.shape[1])


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _on_host(function, gradient, output, traits: Traits, kind: str) -> Encoder | Classifier:
    def forward(images):
        value = probing.pick(function(images), output, kind, _is_array)
        return (np.asarray(value),)

    def backward(images, cotangents):
        pulled = np.asarray(gradient(images, cotangents[0]))
        if pulled.shape != images.shape:
            raise ValueError(
                f"the gradient of {kind} must be {list(images.shape)}, got {list(pulled.shape)}"
            )
        return pulled

    images = traits.probe()
    # Copies, as at run time: a function may normalize what it is given in place.
    first, again, alone = (forward(x.copy())[0] for x in (images, images, images[:1]))
    probing.check_output(first, 2, kind)
    probing.check_output(alone, 1, kind)
    probing.check_numbers(first, again, alone, kind)
    if gradient is not None:
        pulled = backward(images.copy(), (np.ones_like(first, np.float32),))
        probing.check_gradient(pulled, kind)
    shapes, backward = [first.shape[1:]], None if gradient is None else backward
    call = differentiable(forward, backward, shapes, rank=3, kind=kind)
    bridge = Bridge(functools.partial(_features, call), kind, traits.shape)
    return traits.model(bridge, {"params": {}}, first.shape[1])


def _features(call, variables, images):
    del variables
    return call(images)[0], {}
