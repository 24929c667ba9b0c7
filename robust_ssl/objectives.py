"""What an attacker maximises: ``AttackInputs -> scalar``, the mean over the batch.

An objective is a plain function of named arrays, so one's own is written in a few lines:

    def towards_zero(inputs):
        return -jnp.mean(jnp.sum(inputs.adversarial.features**2, axis=-1))

Every array carries a batch axis (of one in a per-image attack), and the batch is the *global* one
whatever the number of devices.  Options are set with `functools.partial`; make the partial once and
reuse it, since two equal partials are two different functions to the compiler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from robust_ssl.types import AttackInputs


def safe_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Euclidean length with gradient zero, not NaN, where the length is zero.

    Args:
      x: Float, any shape.
      axis: What is summed over; None is all of it.

    Returns:
      Lengths, without the axes that were summed over.

    Example:
      >>> float(safe_norm(jnp.array([3.0, 4.0])))
      5.0
      >>> jax.grad(safe_norm)(jnp.zeros(2)).tolist()
      [0.0, 0.0]
    """
    squared = jnp.sum(x**2, axis=axis)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def unit_vectors(x: jax.Array) -> jax.Array:
    """Scales each row of ``[batch, dim]`` to length one; a zero row stays zero, gradient and all.

    Example:
      >>> unit_vectors(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    positive = squared > 0
    return jnp.where(positive, x * jax.lax.rsqrt(jnp.where(positive, squared, 1.0)), 0.0)


def _labelled_logits(inputs: AttackInputs, name: str) -> tuple[jax.Array, jax.Array]:
    if inputs.labels is None:
        raise ValueError(
            f"objective {name} needs labels, but the attack was called without them; pass labels, "
            "or take an objective on features such as feature_l2"
        )
    if inputs.adversarial.logits is None:
        raise ValueError(
            f"objective {name} needs logits, but the model has no head; attack a Classifier, or "
            "take an objective on features such as feature_l2"
        )
    return inputs.adversarial.logits, inputs.labels


def cross_entropy(inputs: AttackInputs) -> jax.Array:
    """Measures how improbable the true class has become, in nats.

    Args:
      inputs: Reads ``adversarial.logits`` and ``labels``.

    Returns:
      Mean over the batch, at least 0; ``log(classes)`` where all classes look alike.

    Raises:
      ValueError: If there are no labels or no logits.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.zeros((1, 4)))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> inputs = AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))
      >>> round(float(cross_entropy(inputs)), 4)  # log(4)
      1.3863

    References:
      Madry et al., ICLR 2018, Section 2.
    """
    logits, labels = _labelled_logits(inputs, "cross_entropy")
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def margin(inputs: AttackInputs) -> jax.Array:
    """Measures by how much the best wrong logit exceeds the true one.

    Positive means misclassified.  Unlike the cross-entropy its gradient does not fade where the
    model is very sure.

    Args:
      inputs: Reads ``adversarial.logits`` and ``labels``.

    Returns:
      Mean over the batch, in logit units.

    Raises:
      ValueError: If there are no labels or no logits.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.array([[1.0, 4.0, 3.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(margin(AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))))
      -1.0

    References:
      Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017,
      Section V, objective f6.
    """
    logits, labels = _labelled_logits(inputs, "margin")
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    right = jnp.sum(jnp.where(true, logits, 0.0), axis=-1)
    return jnp.mean(jnp.max(jnp.where(true, -jnp.inf, logits), axis=-1) - right)


def feature_l2(inputs: AttackInputs) -> jax.Array:
    r"""Measures how far the attack has moved each feature vector, ``||z' - z||``.

    Zero is a stationary point: an attack on it needs a random start.

    Args:
      inputs: Reads ``adversarial.features`` and ``clean.features``.

    Returns:
      Mean over the batch, at least 0; the gradient at equality is zero.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> clean, moved = Outputs(jnp.zeros((1, 2))), Outputs(jnp.array([[3.0, 4.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(feature_l2(AttackInputs(clean, moved, image, image)))
      5.0
    """
    return jnp.mean(safe_norm(inputs.adversarial.features - inputs.clean.features, axis=-1))


def feature_cosine_distance(inputs: AttackInputs) -> jax.Array:
    r"""Measures how far the attack has turned each feature vector, ``1 - cos(z', z)``.

    0 means "same direction", 2 means "opposite".  Only direction counts, because a downstream probe
    on normalised features sees nothing else.  Zero is a stationary point: an attack on it needs a
    random start.

    Args:
      inputs: Reads ``adversarial.features`` and ``clean.features``.

    Returns:
      Mean over the batch, in [0, 2].  A zero feature vector has no direction; its distance is 1.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> clean, moved = Outputs(jnp.array([[1.0, 0.0]])), Outputs(jnp.array([[0.0, 3.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(feature_cosine_distance(AttackInputs(clean, moved, image, image)))
      1.0
    """
    products = unit_vectors(inputs.adversarial.features) * unit_vectors(inputs.clean.features)
    return 1.0 - jnp.mean(jnp.sum(products, axis=-1))


def info_nce(
    inputs: AttackInputs,
    *,
    temperature: float = 0.1,  # AdvEncoder's released code
) -> jax.Array:
    r"""Measures how hard it has become to find each clean image's own adversarial image.

    .. math:: -\frac1n \sum_i \log
              \frac{\exp(\cos(z_i, z'_i) / t)}{\sum_j \exp(\cos(z_i, z'_j) / t)}

    Near 0 each adversarial feature vector is still closest to its own clean one; ``log(n)`` means
    that all look alike; more means that others are closer.  A universal perturbation gets there
    without pointing away from the clean features, by making all images alike.

    Args:
      inputs: Reads ``clean.features`` (the queries) and ``adversarial.features`` (the keys; the
        other images' are the negatives).
      temperature: Divides the cosines, positive.

    Returns:
      Mean over the batch, at least 0.

    Raises:
      ValueError: If there is one image only: without negatives the value is 0 whatever one does.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs, image = Outputs(jnp.ones((4, 2))), jnp.zeros((4, 8, 8, 3))
      >>> round(float(info_nce(AttackInputs(outputs, outputs, image, image))), 4)  # log(4)
      1.3863

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, and its released code.
    """
    clean, adversarial = inputs.clean.features, inputs.adversarial.features
    if clean.shape[0] < 2:
        raise ValueError(
            "info_nce compares images with each other and needs a batch of at least 2, got 1; in "
            "a per-image attack take feature_cosine_distance or feature_l2"
        )
    cosines = unit_vectors(clean) @ unit_vectors(adversarial).T
    own = jnp.arange(clean.shape[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(cosines / temperature, own))


def pixel_l2(inputs: AttackInputs) -> jax.Array:
    """Measures the size of the perturbation, ``||x' - x||`` over all pixels and channels.

    Args:
      inputs: Reads ``adversarial_images`` and ``clean_images``.

    Returns:
      Mean over the batch, at least 0, pixel units; the gradient at equality is zero.
    """
    change = inputs.adversarial_images - inputs.clean_images
    return jnp.mean(safe_norm(change, axis=(1, 2, 3)))


def high_pass(
    images: jax.Array,
    *,
    cutoff: float = 8 / 64,  # AdvEncoder: radius 8 at 64 pixels
) -> jax.Array:
    """Removes the spatial frequencies below a radius, the mean included.

    Args:
      images: Float ``[batch, H, W, channels]``.
      cutoff: Radius in cycles per pixel, from 0 (removes nothing) to above 0.71 (everything), so
        that one value means the same at every image size.

    Returns:
      The rest, same shape; linear in `images`.

    Example:
      >>> bool(jnp.allclose(high_pass(jnp.ones((1, 8, 8, 3))), 0.0, atol=1e-6))
      True

    References:
      Zhou et al., ICCV 2023, and its released code (a mask with a hard edge).
    """
    _, height, width, _ = images.shape
    vertical = jnp.fft.fftfreq(height).reshape(height, 1)
    horizontal = jnp.fft.rfftfreq(width).reshape(1, width // 2 + 1)
    keep = (vertical**2 + horizontal**2 >= cutoff**2).reshape(1, height, width // 2 + 1, 1)
    spectrum = jnp.fft.rfft2(images, axes=(1, 2))
    return jnp.fft.irfft2(jnp.where(keep, spectrum, 0.0), s=(height, width), axes=(1, 2))


def high_frequency_change(inputs: AttackInputs, *, cutoff: float = 8 / 64) -> jax.Array:
    """Measures the part of the perturbation that is edges and texture, as an L2 norm.

    The filter is linear, so it sees the difference of the images once.

    Args:
      inputs: Reads ``adversarial_images`` and ``clean_images``.
      cutoff: As in `high_pass`, cycles per pixel.

    Returns:
      Mean over the batch, at least 0 and at most `pixel_l2`.

    References:
      Zhou et al., ICCV 2023.
    """
    change = high_pass(inputs.adversarial_images - inputs.clean_images, cutoff=cutoff)
    return jnp.mean(safe_norm(change, axis=(1, 2, 3)))


def advencoder_paper(inputs: AttackInputs) -> jax.Array:
    """AdvEncoder as published: ``1 info_nce + 5 high_frequency_change - 1 pixel_l2``.

    The norms are L2 norms per image, so the frequency term weighs about as much as the features.

    Args:
      inputs: Reads features and images, both clean and adversarial, of at least two images.

    Returns:
      Scalar.

    References:
      Zhou et al., ICCV 2023; weights as other papers' comparisons report them.
    """
    return info_nce(inputs) + 5.0 * high_frequency_change(inputs) - pixel_l2(inputs)


def advencoder_released(inputs: AttackInputs) -> jax.Array:
    """AdvEncoder as released: ``5 info_nce - MSE(x', x) + MSE(highpass x', highpass x)``.

    The two squared errors are means over pixels, under 0.002 at any usual budget: in effect this
    is 5 times `info_nce`.

    Args:
      inputs: Reads features and images, both clean and adversarial, of at least two images.

    Returns:
      Scalar.

    References:
      The authors' code, github.com/CGCL-codes/AdvEncoder, commit 3dd1c4e.
    """
    change = inputs.adversarial_images - inputs.clean_images
    return 5.0 * info_nce(inputs) - jnp.mean(change**2) + jnp.mean(high_pass(change) ** 2)
