"""UAP: one perturbation accumulated from the smallest changes that move each image to a new class.

An encoder has no classes, so the clusters of its features stand in for them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct
from robust_ssl.objectives.vectors import unit_vectors
from robust_ssl.types import AttackInputs, Objective

_ROUNDS = 10  # of k-means; it has settled by then at the sizes of a batch


def cluster_directions(features: jax.Array, num_clusters: int) -> jax.Array:
    """Finds the directions around which feature vectors gather: spherical k-means.

    It starts at the first vector and goes on to the one farthest from all taken, so there is
    nothing random in it.

    Args:
      features: Float ``[batch, dim]``.
      num_clusters: How many; at most the batch.

    Returns:
      Unit vectors, float ``[min(num_clusters, batch), dim]``; no gradient flows through.

    Raises:
      ValueError: If there are fewer than two clusters or vectors: one class has no boundary.

    Example:
      >>> features = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
      >>> cluster_directions(features, 2).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    count = min(num_clusters, len(features))
    if count < 2:
        raise ValueError(
            f"pseudo-classes need at least 2 clusters and 2 images, got num_clusters="
            f"{num_clusters} and a batch of {len(features)}"
        )
    vectors = unit_vectors(lax.stop_gradient(features))

    def add(place, carry):
        centers, nearest = carry
        chosen = vectors[jnp.argmin(nearest)]
        return centers.at[place].set(chosen), jnp.maximum(nearest, vectors @ chosen)

    centers = jnp.zeros((count, vectors.shape[1]), vectors.dtype).at[0].set(vectors[0])
    centers, _ = lax.fori_loop(1, count, add, (centers, vectors @ vectors[0]))

    def settle(_, centers):
        members = jax.nn.one_hot(jnp.argmax(vectors @ centers.T, axis=1), count)
        sums = unit_vectors(members.T @ vectors)
        empty = jnp.sum(members, axis=0) == 0
        return jnp.where(empty.reshape(count, 1), centers, sums)

    return lax.fori_loop(0, _ROUNDS, settle, centers)


def cluster_change_rate(inputs: AttackInputs, *, num_clusters: int = 10) -> jax.Array:
    """Measures for which share of the images the nearest cluster has changed.

    The clusters are those of the clean features (`cluster_directions`).  For watching, not for
    ascending: its gradient is zero.

    Returns:
      Share in [0, 1]; NaN if a feature is.

    Raises:
      ValueError: As `cluster_directions`.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> clean, image = Outputs(jnp.eye(2)), jnp.zeros((2, 8, 8, 3))
      >>> swapped = Outputs(jnp.array([[0.0, 1.0], [0.0, 1.0]]))
      >>> float(cluster_change_rate(AttackInputs(clean, swapped, image, image)))
      0.5
    """
    centers = cluster_directions(inputs.clean.features, num_clusters)
    before, after = (x.features @ centers.T for x in (inputs.clean, inputs.adversarial))
    changed = jnp.argmax(before, axis=1) != jnp.argmax(after, axis=1)
    known = jnp.all(jnp.isfinite(before) & jnp.isfinite(after), axis=1)  # NaN has no nearest one
    return jnp.mean(jnp.where(known, changed.astype(jnp.float32), jnp.nan))


def deepfool_step(scores: jax.Array, jacobian: jax.Array, label: jax.Array) -> jax.Array:
    r"""Finds the smallest change that leaves a class, were the scores linear.

    .. math:: \frac{|f_c|}{\|w_c\|^2} w_c, \quad f_c = s_c - s_y, \ w_c = \nabla f_c,
              \quad c = \arg\min_{c \ne y} \frac{|f_c|}{\|w_c\|}

    Args:
      scores: Of one image, float ``[classes]``.
      jacobian: Their gradients, float ``[classes, H, W, 3]``.
      label: The class to leave, int32 scalar.

    Returns:
      The change, ``[H, W, 3]``; zero if the image has left already, or nothing moves it.

    Example:
      >>> jacobian = jnp.zeros((2, 1, 1, 3)).at[1, 0, 0, 0].set(2.0)
      >>> deepfool_step(jnp.array([1.0, 0.0]), jacobian, jnp.array(0)).tolist()
      [[[0.5, 0.0, 0.0]]]

    References:
      Moosavi-Dezfooli et al., "DeepFool", CVPR 2016, Algorithm 2.
    """
    gaps = scores - scores[label]
    slopes = jacobian - jacobian[label][None]
    squared = jnp.sum(slopes**2, axis=(1, 2, 3))
    possible = squared > 0  # not so for the class itself
    safe = jnp.where(possible, squared, 1.0)
    nearest = jnp.argmin(jnp.where(possible, jnp.abs(gaps) * lax.rsqrt(safe), jnp.inf))
    stays = (jnp.argmax(scores) == label) & possible[nearest]
    return jnp.where(stays, jnp.abs(gaps[nearest]) / safe[nearest], 0.0) * slopes[nearest]


@struct.dataclass
class UAP:
    """Universal adversarial perturbation: image by image, add the smallest change that fools.

    In each batch the clean features are clustered; an image's pseudo-class is its nearest cluster
    and its scores are the cosines to all.  Groups of images come one after the other; each image
    that keeps its pseudo-class adds its DeepFool step, and the sum is projected into the budget.
    Clusters and groups are those of the global batch in its order, so the result does not depend on
    how many devices share the work.

    The published algorithm has one image in a group and iterates DeepFool until the image crosses;
    here an image makes one linear step a visit, and the next visit goes on from there, so that a
    batch costs a known `num_clusters` gradients per image.

    Attributes:
      overshoot: How much farther than the boundary a step goes, a share of its length.
      num_clusters: Pseudo-classes; a batch smaller than that has one for each image.
      images_at_once: Images of a group; 1 is the published order.  The largest divisor of the
        batch up to this is taken.

    Raises:
      ValueError: If `images_at_once` is below 1 or `num_clusters` below 2.

    Example:
      >>> UAP(num_clusters=5).gradients_per_batch(64)
      320

    References:
      Moosavi-Dezfooli et al., "Universal Adversarial Perturbations", CVPR 2017, Algorithm 1.
    """

    overshoot: jax.Array | float = 0.02  # DeepFool's eta
    num_clusters: int = struct.field(pytree_node=False, default=10)
    images_at_once: int = struct.field(pytree_node=False, default=8)
    name: str = struct.field(pytree_node=False, default="uap")

    def __post_init__(self):
        """Checks the static fields."""
        if self.images_at_once < 1 or self.num_clusters < 2:
            raise ValueError(
                "need images_at_once of at least 1 and num_clusters of at least 2, got "
                f"{self.images_at_once} and {self.num_clusters}"
            )

    @property
    def objective(self) -> Objective:
        """What the curve reports."""
        return functools.partial(cluster_change_rate, num_clusters=self.num_clusters)

    def gradients_per_batch(self, images: int) -> int:
        """Returns the input gradients of one step of the fit: one for each cluster."""
        return min(self.num_clusters, images) * images

    def init(self, key, image_shape, threat) -> jax.Array:
        """Starts at zero, as published."""
        return jnp.zeros(image_shape)

    def step(self, state, threat, batch):
        """Goes through the batch once; returns the perturbation and the objective before it."""
        value = batch.value(self.objective, state)
        features, images = batch.clean.features, batch.images
        centers = cluster_directions(features, self.num_clusters)
        labels = jnp.argmax(features @ centers.T, axis=1)
        size = max(n for n in range(1, self.images_at_once + 1) if len(images) % n == 0)
        groups = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]),
            {"image": images, "label": labels, "place": jnp.arange(len(images))},
        )

        def visit(delta, group):
            changes = batch.map(lambda example: self._change(delta, example, batch, centers), group)
            total = jnp.sum(changes, axis=0)
            return batch.project(delta + (1 + self.overshoot) * total), None

        return lax.scan(visit, state, groups)[0], value

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``."""
        return state

    def _change(self, delta, example, batch, centers) -> jax.Array:
        """Returns the DeepFool step of one image from where the perturbation has brought it."""
        image = example["image"][None]

        def scores(delta):
            attacked = batch.attacked(delta, image, first=example["place"])
            cosines = unit_vectors(batch.model(attacked).features)[0] @ centers.T
            return cosines, cosines

        jacobian, cosines = jax.jacrev(scores, has_aux=True)(delta)
        return deepfool_step(cosines, jacobian, example["label"])
