"""Losses of labelled images, clean and attacked, and of features that are held in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from robust_ssl.losses.inputs import advice, logits_of
from robust_ssl.objectives import pairs
from robust_ssl.objectives.layers import activation
from robust_ssl.types import LossInputs, Outputs

_Held = Literal["adversarial", "clean"]
_SILENT = 1e-12  # squared length below which an activation is no measure of anything


def clean_cross_entropy(inputs: LossInputs, smoothing: float = 0.0) -> jax.Array:
    r"""Measures how little the model believes in the right class of the unperturbed image.

    .. math:: \ell_i = -\log \operatorname{softmax}(f(x_i))_{y_i}

    0 means "certain and right"; ``log(classes)`` is what guessing costs.

    Args:
      inputs: Uses `labels` and `clean.logits`, float ``[batch, classes]``.
      smoothing: Share of the label that all classes get in equal parts, in [0, 1).

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
    return _cross_entropy(logits_of(inputs.clean, "clean"), inputs.labels, smoothing)


def adversarial_cross_entropy(inputs: LossInputs, smoothing: float = 0.0) -> jax.Array:
    r"""Measures how little the model believes in the right class of the perturbed image.

    .. math:: \ell_i = -\log \operatorname{softmax}(f(\tilde x_i))_{y_i}

    With this loss alone training is the saddle point of Madry et al.

    Args:
      inputs: Uses `labels` and `adversarial.logits`, float ``[batch, classes]``.
      smoothing: As in `clean_cross_entropy`.

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
    return _cross_entropy(logits_of(inputs.adversarial, "adversarial"), inputs.labels, smoothing)


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
    clean = jax.nn.log_softmax(logits_of(inputs.clean, "clean"))
    adversarial = jax.nn.log_softmax(logits_of(inputs.adversarial, "adversarial"))
    chex.assert_equal_shape([clean, adversarial])
    return jnp.sum(jnp.exp(clean) * (clean - adversarial), axis=-1)


def boosted_cross_entropy(inputs: LossInputs) -> jax.Array:
    r"""Measures how little the model believes in the right class under attack, with a margin.

    .. math:: \ell_i = -\log p_{y_i}(\tilde x_i)
              - \log\big(1 - \max_{k \ne y_i} p_k(\tilde x_i)\big)

    The first term of MART: the second logarithm pushes the likeliest wrong class down.  0 means
    "certain and right"; with two classes it is twice the cross-entropy.  The logarithms are taken
    of logits, so that nothing overflows and nothing needs a guard; the released code guards the
    second one by adding 1e-4, which holds it, and its gradient, down where a model is surely wrong.

    Args:
      inputs: Uses `labels` and `adversarial.logits`, float ``[batch, classes]``.

    Returns:
      One loss per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If there are no adversarial logits or fewer than two classes.

    Example:
      >>> outputs = Outputs(features=jnp.zeros((1, 3)), logits=jnp.zeros((1, 4)))
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=outputs, adversarial=outputs)
      >>> boosted_cross_entropy(inputs).round(3).tolist()  # log(4) + log(4 / 3)
      [1.674...]

    References:
      Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
      ICLR 2020, first term of the loss in Algorithm 1.
    """
    logits = logits_of(inputs.adversarial, "adversarial")
    if logits.shape[-1] < 2:
        raise ValueError(
            f"boosted_cross_entropy needs a wrong class: at least 2 logits, got {logits.shape[-1]}"
        )
    error = _cross_entropy(logits, inputs.labels)
    log_probabilities = jax.nn.log_softmax(logits)
    true = jax.nn.one_hot(inputs.labels, logits.shape[-1], dtype=bool)
    # One rival, the first, even where several are equally likely: all others sum to 1 - p.
    rival = jnp.argmax(jnp.where(true, -jnp.inf, log_probabilities), axis=-1)
    rival = jax.nn.one_hot(rival, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(rival, -jnp.inf, log_probabilities), axis=-1)
    return error - others


def misclassification_kl(inputs: LossInputs) -> jax.Array:
    r"""Measures how far the attack moves the prediction, the more the worse it was without one.

    .. math:: \ell_i = \mathrm{KL}\big(p(x_i) \,\|\, p(\tilde x_i)\big)
              \cdot \big(1 - p_{y_i}(x_i)\big)

    The second term of MART.  0 means "the same prediction", or "certain and right without the
    attack".  The gradient flows into both predictions and into the factor, as in MART's
    algorithm and its released code.

    Args:
      inputs: Uses `labels`, and `clean.logits` and `adversarial.logits`, float
        ``[batch, classes]``.

    Returns:
      One weighted divergence per image, at least 0, ``[batch]``.

    Raises:
      ValueError: If clean or adversarial logits are missing.

    Example:
      >>> guess = Outputs(features=jnp.zeros((1, 3)), logits=jnp.zeros((1, 2)))
      >>> surer = guess.replace(logits=jnp.log(jnp.array([[1.0, 3.0]])))
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=guess, adversarial=surer)
      >>> (misclassification_kl(inputs) / trades_kl(inputs)).round(3).tolist()
      [0.5]

    References:
      Wang et al., ICLR 2020, second term of the loss in Algorithm 1.
    """
    logits = logits_of(inputs.clean, "clean")
    wrong = ~jax.nn.one_hot(inputs.labels, logits.shape[-1], dtype=bool)
    # 1 - p as a sum, which keeps its digits where p is nearly 1.
    doubt = jnp.sum(jnp.where(wrong, jax.nn.softmax(logits), 0.0), axis=-1)
    return trades_kl(inputs) * doubt


def feature_preservation(inputs: LossInputs, of: _Held = "adversarial") -> jax.Array:
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
    moved, anchor = _moved_and_anchor(inputs, of, "feature_preservation")
    features = _features(moved, of)
    anchor = jax.lax.stop_gradient(anchor.features)
    chex.assert_equal_shape([features, anchor])
    return jnp.sum(jnp.square(features - anchor), axis=-1)


def feature_drift(
    inputs: LossInputs, layers: Sequence[int | str] = (0,), of: _Held = "adversarial"
) -> jax.Array:
    r"""Measures how far layers have moved from the pre-trained encoder's, relative to their length.

    .. math:: \ell_i = \frac{1}{|L|} \sum_{l \in L}
              \frac{\|a_l(\tilde x_i) - a^0_l(x_i)\|_2^2}{\|a^0_l(x_i)\|_2^2}

    0 means "as in the public encoder on the clean image"; 1 is what a layer that has fallen silent
    costs.  Relative, because layers differ in scale and in size: one weight serves them all.

    Args:
      inputs: Uses `pretrained.taps`, constants that get no gradient, and the taps of `clean` or
        `adversarial`.
      layers: Names of taps, or places among the blocks (0 is the first, -1 the last), as in
        `objectives.activation`.
      of: ``"adversarial"`` or ``"clean"``: whose activations are held in place.

    Returns:
      One mean of squared relative distances per image, at least 0, ``[batch]``.  Where the
      pre-trained layer is silent on an image there is no scale, and the squared distance itself
      is taken.

    Raises:
      ValueError: If `of` is not known, no layer or no such layer is named, or outputs or taps are
        missing.

    Example:
      >>> public = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.array([[3.0, 4.0]])})
      >>> silent = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.zeros((1, 2))})
      >>> inputs = LossInputs(labels=jnp.array([0]), clean=silent, pretrained=public)
      >>> feature_drift(inputs, layers=("block1",), of="clean").tolist()
      [1.0]
    """
    if isinstance(layers, int | str) or not len(layers):
        raise ValueError(f"feature_drift: layers must list at least one, as (0,), got {layers!r}")
    moved, anchor = _moved_and_anchor(inputs, of, "feature_drift")
    drifts = [
        _relative_drift(_tap(moved, layer, of), _tap(anchor, layer, "pretrained"))
        for layer in layers
    ]
    return sum(drifts) / len(drifts)


def genetic_regularization(
    inputs: LossInputs,
    on: Literal["logits", "features"] = "logits",
    compat: Literal["corrected", "released"] = "corrected",
) -> jax.Array:
    r"""Measures how far the attack changes who is near whom in the batch.

    Row-normalized outputs give cosine distances, from which each row's nearest one is taken away:
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
    1 / batch, so a row's sum does not depend on the batch size.  The released code adds up all
    pairs: its weight `w` (20) on a batch of `n` is ``w * n`` (5120 at 256) on the step's mean.

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
      IEEE S&P 2024, genetic regularization of the first stage.
    """
    if on not in ("logits", "features"):
        raise ValueError(f'genetic_regularization: on must be "logits" or "features", got {on!r}')
    if compat not in ("corrected", "released"):
        raise ValueError(
            f'genetic_regularization: compat must be "corrected" or "released", got {compat!r}'
        )
    pick = logits_of if on == "logits" else _features
    clean, adversarial = pick(inputs.clean, "clean"), pick(inputs.adversarial, "adversarial")
    chex.assert_equal_shape([clean, adversarial])
    if compat == "released":
        reference, follower = adversarial, clean
        error = _cross_entropy(logits_of(inputs.adversarial, "adversarial"), inputs.labels)
    else:
        reference, follower = jax.lax.stop_gradient(clean), adversarial
        error = jax.lax.stop_gradient(clean_cross_entropy(inputs))
    target = pairs.pulled_to_labels(pairs.local_distances(reference), error, inputs.labels)
    return pairs.bernoulli_divergence(
        pairs.neighbor_shares(target), pairs.neighbor_shares(pairs.local_distances(follower))
    )


def _features(outputs: Outputs | None, which: str) -> jax.Array:
    if outputs is None:
        raise ValueError(f"this loss needs {which} features{advice(which)}")
    chex.assert_rank(outputs.features, 2)
    return outputs.features


def _moved_and_anchor(inputs: LossInputs, of: str, loss: str) -> tuple[Outputs | None, Outputs]:
    """Returns the outputs that are held in place and the pre-trained ones that hold them."""
    if of not in ("clean", "adversarial"):
        raise ValueError(f'{loss}: of must be "clean" or "adversarial", got {of!r}')
    if inputs.pretrained is None:
        raise ValueError(f"{loss} needs the pre-trained encoder's outputs{advice('pretrained')}")
    return getattr(inputs, of), inputs.pretrained


def _tap(outputs: Outputs | None, layer: int | str, which: str) -> jax.Array:
    """One activation of every image as a row, ``[batch, units]``."""
    if outputs is None:
        raise ValueError(f"this loss needs {which} taps{advice(which)}")
    if not outputs.taps:
        raise ValueError(
            f"this loss needs {which} taps, and the outputs have none: the encoder must return "
            "taps, and whoever builds LossInputs must not drop them"
        )
    values = activation(outputs, layer)
    return values.reshape(len(values), -1)


def _relative_drift(moved: jax.Array, anchor: jax.Array) -> jax.Array:
    chex.assert_equal_shape([moved, anchor])
    anchor = jax.lax.stop_gradient(anchor)
    energy = jnp.sum(jnp.square(anchor), axis=-1)
    scale = jnp.where(energy > _SILENT, energy, 1.0)
    return jnp.sum(jnp.square(moved - anchor), axis=-1) / scale


def _cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    chex.assert_shape(labels, logits.shape[:1])
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}")
    log_probabilities = jax.nn.log_softmax(logits)
    error = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    if smoothing == 0:
        return error
    return (1 - smoothing) * error - smoothing * jnp.mean(log_probabilities, axis=-1)
