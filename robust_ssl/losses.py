"""What training minimises: functions of `LossInputs` that return one value per image.

A loss is never reduced: the step takes the mean, knows the weight and logs the name.  A loss sees
the global batch, so one that compares images with each other does not depend on how many devices
there are.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from robust_ssl.types import LossInputs, Outputs

_STABILIZER = 1e-6  # keeps logarithms finite; far below 1 / batch, the size of a row's entries


def clean_cross_entropy(inputs: LossInputs) -> jax.Array:
    r"""Measures how little the model believes in the right class of the unperturbed image.

    .. math:: \ell_i = -\log \operatorname{softmax}(f(x_i))_{y_i}

    0 means "certain and right"; ``log(classes)`` is what guessing costs.

    Args:
      inputs: Uses `labels` and `clean.logits`, float ``[batch, classes]``.

    Returns:
      One loss per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If there are no clean logits.

    Example:
      >>> outputs = Outputs(features=jnp.zeros((2, 3)), logits=jnp.zeros((2, 4)))
      >>> inputs = LossInputs(labels=jnp.array([0, 1]), clean=outputs)
      >>> np.round(clean_cross_entropy(inputs) / np.log(4), 3).tolist()
      [1.0, 1.0]
    """
    return _cross_entropy(_logits(inputs.clean, "clean"), inputs.labels)


def adversarial_cross_entropy(inputs: LossInputs) -> jax.Array:
    r"""Measures how little the model believes in the right class of the perturbed image.

    .. math:: \ell_i = -\log \operatorname{softmax}(f(\tilde x_i))_{y_i}

    With this loss alone training is the saddle point of Madry et al.

    Args:
      inputs: Uses `labels` and `adversarial.logits`, float ``[batch, classes]``.

    Returns:
      One loss per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If there are no adversarial logits: the step was given no attack.

    Example:
      >>> outputs = Outputs(features=jnp.zeros((1, 3)), logits=jnp.array([[0.0, 20.0]]))
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=outputs, adversarial=outputs)
      >>> adversarial_cross_entropy(inputs).tolist()
      [20.0]

    References:
      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
      Eq. 2.1.
    """
    return _cross_entropy(_logits(inputs.adversarial, "adversarial"), inputs.labels)


def trades_kl(inputs: LossInputs) -> jax.Array:
    r"""Measures how far the attack moves the predicted distribution.

    .. math:: \ell_i = \mathrm{KL}\big(p(x_i) \,\|\, p(\tilde x_i)\big)

    0 means "the same prediction"; it has no upper bound.  Labels play no part.  The gradient flows
    into both predictions, as in TRADES.

    Args:
      inputs: Uses `clean.logits` and `adversarial.logits`, float ``[batch, classes]``.

    Returns:
      One divergence per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If clean or adversarial logits are missing.

    Example:
      >>> same = Outputs(features=jnp.zeros((1, 3)), logits=jnp.array([[0.0, 2.0]]))
      >>> trades_kl(LossInputs(labels=jnp.array([0]), clean=same, adversarial=same)).tolist()
      [0.0]

    References:
      Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019,
      Eq. 5.
    """
    clean = jax.nn.log_softmax(_logits(inputs.clean, "clean"))
    adversarial = jax.nn.log_softmax(_logits(inputs.adversarial, "adversarial"))
    chex.assert_equal_shape([clean, adversarial])
    return jnp.sum(jnp.exp(clean) * (clean - adversarial), axis=-1)


def feature_preservation(inputs: LossInputs, of: str = "adversarial") -> jax.Array:
    r"""Measures how far features have moved from the pre-trained encoder's clean features.

    .. math:: \ell_i = \|\phi(\tilde x_i) - \phi_0(x_i)\|_2^2

    0 means "as the public encoder sees the clean image".  With ``of="adversarial"`` it asks for
    robustness and for staying near the pre-trained features at once; with ``of="clean"`` for
    staying near them only.

    Args:
      inputs: Uses `pretrained.features`, a constant that gets no gradient, and the features of
        `clean` or `adversarial`, float ``[batch, dim]``.
      of: ``"adversarial"`` or ``"clean"``: whose features are held in place.

    Returns:
      One squared distance per image, ``[batch]``.

    Raises:
      ValueError: If `of` is not known or the outputs it needs are missing.

    Example:
      >>> outputs = Outputs(features=jnp.array([[3.0, 4.0]]))
      >>> pretrained = Outputs(features=jnp.zeros((1, 2)))
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=outputs, pretrained=pretrained)
      >>> feature_preservation(inputs, of="clean").tolist()
      [25.0]

    References:
      Schlarmann et al., "Robust CLIP", ICML 2024 (their FARE loss).
    """
    if of not in ("clean", "adversarial"):
        raise ValueError(f'feature_preservation: of must be "clean" or "adversarial", got {of!r}')
    if inputs.pretrained is None:
        raise ValueError(
            "feature_preservation needs the pre-trained encoder's features: give the step "
            "pretrained=encoder"
        )
    features = _features(getattr(inputs, of), of)
    anchor = jax.lax.stop_gradient(inputs.pretrained.features)
    chex.assert_equal_shape([features, anchor])
    return jnp.sum(jnp.square(features - anchor), axis=-1)


def genetic_regularization(
    inputs: LossInputs, on: str = "logits", compat: str = "corrected"
) -> jax.Array:
    r"""Measures how far the attack changes who is near whom in the batch.

    Row-normalised outputs give cosine distances, from which each row's nearest one is taken away:
    :math:`D_{ij} = d_{ij} - \min_{k \ne i} d_{ik}`.  The reference (the clean images) is mixed with
    what the labels say, the more the worse it predicts them:

    .. math::
        T_{ij} = \operatorname{clip}\big((1 - S_{ij}) D_{ij} + 2 m_{ij} S_{ij},\ 0,\ 2\big),
        \quad S_{ij} = \tanh\big((\mathrm{CE}_i + \mathrm{CE}_j) / 32\big)

    with :math:`m_{ij} = 1` for different labels and -1 for equal ones.  Similarities
    :math:`1 - D/2` and :math:`1 - T/2` are divided by their row sums to `q` and `p`, and

    .. math:: \ell_i = \sum_{j \ne i} \mathrm{KL}(p_{ij} \| q_{ij}) + \mathrm{KL}(q_{ij} \| p_{ij})

    is the symmetric divergence of Bernoulli variables.  An image is no pair with itself.

    0 means "the attack left the neighbourhoods as they should be".  A row's entries are of the size
    1 / batch, so a row's sum does not depend on the batch size; its mean is the mean over pairs
    times ``batch - 1``.  The released code adds up all pairs: its weight `w` (20) on a batch of `n`
    is the weight ``w * n`` (5120 at 256) on the mean that the step takes.

    Args:
      inputs: Uses `labels`, and `clean` and `adversarial` outputs.
      on: ``"logits"`` or ``"features"``: whose pairwise structure is kept.  The cross-entropies in
        `S` are of the logits either way.
      compat: ``"corrected"``: the adversarial structure follows the clean one, which is a constant
        and gets no gradient.  ``"released"``: clean and adversarial change places and gradient
        flows into everything, as in the authors' code.

    Returns:
      One divergence per image, at least 0, ``[batch]``; its sum is the released code's total.
      0 for a batch of one.  Outputs of length zero have no direction: their distance to all
      others is 1 and they get no gradient.

    Raises:
      ValueError: If `on` or `compat` is not known, or outputs it needs are missing.

    Example:
      >>> same = Outputs(features=jnp.eye(3), logits=40 * jnp.eye(3))
      >>> inputs = LossInputs(labels=jnp.arange(3), clean=same, adversarial=same)
      >>> genetic_regularization(inputs).round(3).tolist()
      [0.0, 0.0, 0.0]

    References:
      Zhou et al., "Securely Fine-tuning Pre-trained Encoders Against Adversarial Examples",
      IEEE S&P 2024, genetic regularisation of the first stage.
    """
    if on not in ("logits", "features"):
        raise ValueError(f'genetic_regularization: on must be "logits" or "features", got {on!r}')
    if compat not in ("corrected", "released"):
        raise ValueError(
            f'genetic_regularization: compat must be "corrected" or "released", got {compat!r}'
        )
    pick = _logits if on == "logits" else _features
    clean, adversarial = pick(inputs.clean, "clean"), pick(inputs.adversarial, "adversarial")
    chex.assert_equal_shape([clean, adversarial])
    if compat == "released":
        reference, follower = adversarial, clean
        error = _cross_entropy(_logits(inputs.adversarial, "adversarial"), inputs.labels)
    else:
        reference, follower = jax.lax.stop_gradient(clean), adversarial
        error = jax.lax.stop_gradient(clean_cross_entropy(inputs))
    target = _pull_to_labels(_local_distances(reference), error, inputs.labels)
    return _bernoulli_divergence(_neighbours(target), _neighbours(_local_distances(follower)))


def _logits(outputs: Outputs | None, which: str) -> jax.Array:
    if outputs is None or outputs.logits is None:
        raise ValueError(f"this loss needs {which} logits{_advice(which)}")
    chex.assert_rank(outputs.logits, 2)
    return outputs.logits


def _features(outputs: Outputs | None, which: str) -> jax.Array:
    if outputs is None:
        raise ValueError(f"this loss needs {which} features{_advice(which)}")
    chex.assert_rank(outputs.features, 2)
    return outputs.features


def _advice(which: str) -> str:
    return ": give the step an attack" if which == "adversarial" else ", and there are none"


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    chex.assert_shape(labels, logits.shape[:1])
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]


def _off_diagonal(size: int) -> jax.Array:
    return ~jnp.eye(size, dtype=bool)


def _local_distances(outputs: jax.Array) -> jax.Array:
    """Cosine distances minus each row's nearest one, ``[batch, batch]``; the diagonal is junk."""
    squared = jnp.sum(jnp.square(outputs), axis=-1, keepdims=True)
    nonzero = squared > 1e-24
    # Two `where`s: the gradient of the branch not taken must be finite too.
    directions = jnp.where(nonzero, outputs * jax.lax.rsqrt(jnp.where(nonzero, squared, 1.0)), 0.0)
    distances = 1.0 - directions @ directions.T
    others = jnp.where(_off_diagonal(len(outputs)), distances, 4.0)  # 4: beyond every distance
    return distances - jnp.min(others, axis=-1, keepdims=True)


def _pull_to_labels(distances: jax.Array, error: jax.Array, labels: jax.Array) -> jax.Array:
    """Replaces distances by what labels say where the reference predicts labels badly."""
    doubt = jnp.tanh((error[:, None] + error[None, :]) / 32.0)
    sign = jnp.where(labels[:, None] == labels[None, :], -1.0, 1.0)
    return (1.0 - doubt) * distances + 2.0 * sign * doubt


def _neighbours(distances: jax.Array) -> jax.Array:
    """Distances to similarities in [0, 1] whose rows, without the diagonal, sum to 1."""
    similarities = 1.0 - jnp.clip(distances, 0.0, 2.0) / 2.0
    similarities = jnp.where(_off_diagonal(len(distances)), similarities, 0.0)
    total = jnp.sum(similarities, axis=-1, keepdims=True)
    return similarities / jnp.maximum(total, _STABILIZER)


def _bernoulli_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Symmetric KL of Bernoulli variables, summed over each row: ``(p - q)(logit p - logit q)``."""
    p = jnp.clip(p, _STABILIZER, 1.0 - _STABILIZER)
    q = jnp.clip(q, _STABILIZER, 1.0 - _STABILIZER)
    logit_difference = jnp.log(p) - jnp.log1p(-p) - jnp.log(q) + jnp.log1p(-q)
    return jnp.sum((p - q) * logit_difference, axis=-1)
