"""Several classifiers as one: the most confident members decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.types import Classifier, Encoder


class MemberEncoders(nn.Module):
    """Runs encoders side by side; their features are concatenated.

    Attributes:
      members: The encoders without their variables, which are under ``member0``, ``member1``, ...
      axis_name: The device axis of batch statistics in training.
    """

    members: tuple[Encoder, ...]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False):
        """Returns features, float ``[batch, dim]``, and taps, for pixels in [0, 1]."""
        axis = {} if self.axis_name is None else {"axis_name": self.axis_name}
        features, taps = [], {}
        for index, member in enumerate(self.members):
            name = f"member{index}"
            # A copy without parent: the member's own module belongs to nobody and has no name.
            module = member.module.copy(name=name, **axis)
            outputs, inside = module(member.normalize(images), train=train)
            features.append(outputs)
            taps |= {f"{name}/{tap}": activation for tap, activation in inside.items()}
        return jnp.concatenate(features, axis=-1), taps


class ConfidenceFusion(nn.Module):
    """Applies each member's head to its share of the features, and weighs what they say.

    Attributes:
      members: The classifiers without their variables, which are under ``member0``, ``member1``...
      temperature: Divides the members' logits.
    """

    members: tuple[Classifier, ...]
    temperature: float = 1.0

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logarithm of the fused probabilities, float32 ``[batch, num_classes]``."""
        # NumPy, because the places to split at must be known when the model is traced.
        ends = np.cumsum([member.encoder.dim for member in self.members])
        parts = jnp.split(features, ends[:-1].tolist(), axis=-1)
        logits = [
            member.head.copy(name=f"member{index}")(part, train=train)
            for index, (member, part) in enumerate(zip(self.members, parts, strict=True))
        ]
        return fuse(jnp.stack(logits), temperature=self.temperature)


def fuse(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    r"""Fuses what the members of an ensemble say, each as much as it is sure.

    .. math::
        p = \sum_m \frac{\max_k p_m^k}{\sum_n \max_k p_n^k} \, p_m, \qquad
        p_m = \mathrm{softmax}(z_m / \tau)

    All in logarithms: finite, and with a finite gradient, for any finite logits.

    Args:
      logits: Of the members, float ``[members, batch, classes]``.
      temperature: Divides them; above 1 the members are less sure and closer to equal.

    Returns:
      Log-probabilities, float32 ``[batch, classes]``.

    Example:
      >>> sure, unsure = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.4, 0.6]))
      >>> fused = fuse(jnp.stack([sure, unsure]).reshape(2, 1, 2))
      >>> [round(p, 3) for p in jnp.exp(fused)[0].tolist()]  # weights 0.6 and 0.4
      [0.7, 0.3]
    """
    # float32 whatever the heads compute in: the weights are differences of logarithms.
    log_probabilities = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32) / temperature)
    confidence = jnp.max(log_probabilities, axis=-1, keepdims=True)
    weights = confidence - jax.nn.logsumexp(confidence, axis=0, keepdims=True)
    return jax.nn.logsumexp(weights + log_probabilities, axis=0)


def confidence_ensemble(
    classifiers: Sequence[Classifier], *, temperature: float = 1.0
) -> Classifier:
    """Makes one classifier of several; see `fuse` for how they decide.

    The members keep their own architecture, normalization and input transformation.  The result is
    a `Classifier` like any other: attacked through all its members, its variables are all of
    theirs under ``encoder/member0``, ``head/member0``, ..., its features theirs side by side, its
    taps ``member0/...``.  One evaluation costs as much as all members together.

    Args:
      classifiers: At least two, of the same image size and classes.
      temperature: Divides the members' logits before they are compared, above 0.

    Returns:
      The ensemble; `ensemble_members` takes it apart again.

    Raises:
      ValueError: If there are fewer than two, or they do not fit, or the temperature is not
        positive.

    Example:
      >>> from robust_ssl import models
      >>> nets = [
      ...     models.classifier(key, models.resnet18(key, width=4, image_size=8), 3, head="linear")
      ...     for key in jax.random.split(jax.random.key(0))
      ... ]
      >>> both = confidence_ensemble(nets)
      >>> both(jnp.zeros((8, 8, 3))).logits.shape, both.encoder.dim
      ((3,), 64)

    References:
      ZePAD, ICLR 2026 (several encoders at inference, fused by their confidence).
    """
    classifiers = tuple(classifiers)
    if len(classifiers) < 2:
        raise ValueError(f"an ensemble needs at least two classifiers, got {len(classifiers)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
    for what in ("image_size", "num_classes", "class_names"):
        values = [getattr(member, what) for member in classifiers]
        if len(set(values)) > 1:
            raise ValueError(f"the members of an ensemble must have one {what}, got {values}")
    # A module's attributes are hashed by jit, and arrays do not hash: the members go in bare.
    encoders = tuple(member.encoder.replace(variables=None) for member in classifiers)
    bare = tuple(
        member.replace(encoder=encoder, head_variables=None)
        for member, encoder in zip(classifiers, encoders, strict=True)
    )
    resizings = {member.resizing for member in encoders}
    encoder = Encoder(
        variables=_joined([member.encoder.variables for member in classifiers]),
        module=MemberEncoders(encoders),
        mean=(0.0, 0.0, 0.0),  # the members normalize, each in its own way
        std=(1.0, 1.0, 1.0),
        image_size=classifiers[0].image_size,
        dim=sum(member.dim for member in encoders),
        name=" + ".join(member.name for member in encoders),
        # Pictures are resized once for all of them; where members differ nobody has said how.
        resizing=resizings.pop() if len(resizings) == 1 else None,
    )
    return Classifier(
        encoder=encoder,
        head_variables=_joined([member.head_variables for member in classifiers]),
        head=ConfidenceFusion(bare, float(temperature)),
        num_classes=classifiers[0].num_classes,
        class_names=classifiers[0].class_names,
    )


def ensemble_members(classifier: Classifier) -> tuple[Classifier, ...]:
    """Returns the members of an ensemble with their present weights; none of any other classifier.

    Example:
      >>> from robust_ssl import models
      >>> key = jax.random.key(0)
      >>> net = models.classifier(key, models.resnet18(key, width=4, image_size=8), 3)
      >>> ensemble_members(net), len(ensemble_members(confidence_ensemble([net, net])))
      ((), 2)
    """
    # The head tells, not the encoder: `replace` may have given that another name or preprocess.
    if not isinstance(classifier.head, ConfidenceFusion):
        return ()
    return tuple(
        member.replace(
            encoder=member.encoder.replace(variables=_part(classifier.encoder.variables, index)),
            head_variables=_part(classifier.head_variables, index),
        )
        for index, member in enumerate(classifier.head.members)
    )


def _joined(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``{collection: {"member0": ..., "member1": ...}}``."""
    joined: dict[str, dict[str, Any]] = {}
    for index, variables in enumerate(members):
        for collection, tree in variables.items():
            joined.setdefault(collection, {})[f"member{index}"] = tree
    return joined


def _part(variables: Mapping[str, Any], index: int) -> dict[str, Any]:
    name = f"member{index}"
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}
