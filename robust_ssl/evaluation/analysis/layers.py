"""How far an attack moves what each layer computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import chex
import jax
import jax.numpy as jnp

from robust_ssl.evaluation.metrics import to_pixels
from robust_ssl.parallel import reads_more
from robust_ssl.types import Model

HEAD = "head"  # the name of a classifier's head among the taps of its encoder


def as_value(model: Model) -> Model:
    """Returns a model that can be an argument of a compiled function.

    An `Encoder`, a `Classifier` or any other pytree is one already; a plain function becomes one,
    with the weights it closes over as constants.  They may change between two calls, so what is
    compiled for it is compiled by `Parallel.anew_for` the model.
    """
    whole = jax.tree.structure(0)
    return jax.tree_util.Partial(model) if jax.tree.structure(model) == whole else model


def linear_cka(first: jax.Array, second: jax.Array) -> jax.Array:
    r"""Measures how alike two representations of the same images are.

    .. math:: \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    with centered columns.  1 means equal up to rotation and scale: the images lie to each other as
    before.  Unlike the cosine it sees relations between images only, so a shift that is the same
    for all of them, such as a universal perturbation may cause, leaves it at 1.  Of the two equal
    forms, over features (above) and over images (``tr(XX'YY')``), the cheaper one is computed.

    Args:
      first: Float ``[n, dim]``.
      second: Float ``[n, other dim]``, of the same images in the same order.

    Returns:
      Scalar in [0, 1], float32.  Where nothing varies from image to image in either of them, 1;
      where nothing varies in one of them, 0.

    Raises:
      AssertionError: If they are not matrices of as many rows.

    Example:
      >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
      >>> round(linear_cka(x, 3.0 * x[:, ::-1] + 5.0).item(), 5)
      1.0

    References:
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
      Section 3, Eq. 3-5.
    """
    chex.assert_rank([first, second], 2)
    chex.assert_equal_shape_prefix([first, second], 1)
    x, x_varies = _centered(first)
    y, y_varies = _centered(second)
    if len(x) < max(x.shape[1], y.shape[1]):
        gram_x, gram_y = _product(x, x.T), _product(y, y.T)
        alike = jnp.sum(gram_x * gram_y)
        lengths = jnp.linalg.norm(gram_x) * jnp.linalg.norm(gram_y)
    else:
        alike = jnp.sum(jnp.square(_product(y.T, x)))
        lengths = jnp.linalg.norm(_product(x.T, x)) * jnp.linalg.norm(_product(y.T, y))
    similarity = jnp.clip(alike / jnp.maximum(lengths, 1e-30), 0.0, 1.0)
    constant = jnp.where(x_varies | y_varies, 0.0, 1.0)
    return jnp.where(x_varies & y_varies, similarity, constant)


def _centered(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns centered columns, of unit length in all, and whether they are more than rounding."""
    x = x.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    length, before = jnp.linalg.norm(centered), jnp.linalg.norm(x)
    return centered / jnp.maximum(length, 1e-30), length > 1e-6 * before


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # In full precision: accelerators round the factors of a product otherwise.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def per_layer_stability(
    encoder: Model, clean_images: jax.Array, adversarial_images: jax.Array
) -> dict[str, dict[str, float]]:
    r"""Measures, tap by tap, how far an attack moves what the encoder computes.

    ``cosine`` is 1 where the direction of the activation is kept; ``relative_drift`` is
    :math:`\|\tilde a - a\| / \|a\|`, 0 where nothing moved; both are means over the images.
    ``cka`` (`linear_cka`) is 1 where the images still lie to each other as before.

    Args:
      encoder: Any model; a tap is measured where it has some.
      clean_images: uint8, or float pixels in [0, 1], ``[n, H, W, 3]``.
      adversarial_images: The same images under attack, same shape.

    Returns:
      ``{tap: {"cosine": ..., "cka": ..., "relative_drift": ...}}`` from the first layer to
      ``"features"``.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> images = jnp.linspace(0, 1, 384).reshape(2, 8, 8, 3)
      >>> stability = per_layer_stability(encoder, images, images)
      >>> stability["stage1/block2"]["relative_drift"]
      0.0

    References:
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
    """
    if clean_images.shape != adversarial_images.shape:
        raise ValueError(
            f"clean and adversarial images must have one shape, got {clean_images.shape} and "
            f"{adversarial_images.shape}"
        )
    encoder = as_value(encoder)
    compare = jax.jit(lambda *args: _compare(*args)) if reads_more(encoder) else _COMPARE
    measured = jax.device_get(compare(encoder, clean_images, adversarial_images))
    order: list[str] = []  # a jitted function returns its dictionary sorted by name
    jax.eval_shape(lambda model, x: order.extend(model(x).taps), encoder, to_pixels(clean_images))
    return {
        tap: {name: float(value) for name, value in measured[tap].items()}
        for tap in [*order, "features"]
    }


def _compare(encoder: Model, clean: jax.Array, adversarial: jax.Array):
    def activations(images):
        outputs = encoder(to_pixels(images))
        return {**outputs.taps, "features": outputs.features}

    def compare(x, y):
        x, y = (a.reshape(len(a), -1).astype(jnp.float32) for a in (x, y))
        norm_x, norm_y = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(y, axis=1)
        product, change = norm_x * norm_y, jnp.linalg.norm(y - x, axis=1)
        # A zero activation has no direction: it agrees with another zero and with nothing else.
        same = jnp.where(change == 0, 1.0, 0.0)
        cosine = jnp.where(product > 0, jnp.sum(x * y, axis=1) / jnp.maximum(product, 1e-30), same)
        return {
            "cosine": cosine.mean(),
            "cka": linear_cka(x, y),
            "relative_drift": (change / jnp.maximum(norm_x, 1e-12)).mean(),
        }

    return jax.tree.map(compare, activations(clean), activations(adversarial))


_COMPARE = jax.jit(_compare)


def sensitivity_by_tap(scores: Mapping[str, float], taps: Iterable[str]) -> dict[str, float]:
    """Returns the robust sensitivity of what lies under each tap: that of its worst kernel.

    The scores are those of `robust_ssl.finetuning.layer_sensitivity`, by the path of a kernel.
    Taps without a kernel are left out; a classifier's head comes last under ``"head"``.

    Example:
      >>> scores = {"encoder/stem/kernel": 0.5, "encoder/block1/a/kernel": 0.1,
      ...           "encoder/block1/b/kernel": 0.3, "encoder/block10/kernel": 0.9}
      >>> sensitivity_by_tap(scores, ["stem", "block1"])
      {'stem': 0.5, 'block1': 0.3}
    """
    by_tap: dict[str, float] = {}
    for place in [*taps, HEAD]:
        # With the slash, since "block1" is the beginning of "block10" too.
        inside = [score for path, score in scores.items() if _is_under(path, f"{place}/")]
        if inside:
            by_tap[place] = max(inside)
    return by_tap


def _is_under(path: str, place: str) -> bool:
    return f"{path.removeprefix('encoder/')}/".startswith(place)
