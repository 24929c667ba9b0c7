"""UAP: one perturbation accumulated from the smallest changes that move each image to a new class.

An encoder has no classes, so the clusters of its features stand in for them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct
from robust_ssl.attacks.perturbation import attacked_images, within_budget
from robust_ssl.attacks.universal import objective_of_delta
from robust_ssl.objectives.vectors import unit_vectors
from robust_ssl.parallel import gather
from robust_ssl.types import AttackInputs, Model, Objective, Threat

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

    For watching, not for ascending: its gradient is zero.

    Args:
      inputs: Reads features; the clusters are those of the clean ones.
      num_clusters: As in `cluster_directions`.

    Returns:
      Share in [0, 1]; NaN if a feature is.

    Raises:
      ValueError: If there are fewer than two clusters or images.

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
      >>> from robust_ssl import threats
      >>> UAP().init(jax.random.key(0), (8, 8, 3), threats.Linf(0.05)).shape
      (8, 8, 3)

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
        del key, threat
        return jnp.zeros(image_shape)

    def step(self, state, threat, model, clean, images, *, axis_name=None):
        """Goes through the batch once; returns the perturbation and the objective before it."""
        value = objective_of_delta(
            state,
            objective=self.objective,
            threat=threat,
            model=model,
            clean=clean,
            images=images,
            axis_name=axis_name,
        )
        features, everything = gather((clean.features, images), axis_name)
        centers = cluster_directions(features, self.num_clusters)
        labels = jnp.argmax(features @ centers.T, axis=1)
        size = max(n for n in range(1, self.images_at_once + 1) if len(everything) % n == 0)
        groups = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]),
            {"image": everything, "label": labels, "place": jnp.arange(len(everything))},
        )

        def visit(delta, group):
            def change(image):
                return self._change(delta, image, threat, model, centers)

            total = jnp.sum(_shared_map(change, group, axis_name), axis=0)
            return within_budget(delta + (1 + self.overshoot) * total, threat), None

        return lax.scan(visit, state, groups)[0], value

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``."""
        del threat
        return state

    def _change(self, delta, example, threat: Threat, model: Model, centers) -> jax.Array:
        """Returns the DeepFool step of one image from where the perturbation has brought it."""
        image = example["image"][None]

        def scores(delta):
            attacked = attacked_images(delta, image, threat, first=example["place"])
            found = unit_vectors(model(attacked).features)[0] @ centers.T
            return found, found

        jacobian, found = jax.jacrev(scores, has_aux=True)(delta)
        return deepfool_step(found, jacobian, example["label"])


def _shared_map(function, group, axis_name):
    """Maps over a group that every device holds; each computes its part where that divides."""
    size = len(jax.tree.leaves(group)[0])
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if devices == 1 or size % devices:
        return jax.vmap(function)(group)
    part = size // devices
    first = part * lax.axis_index(axis_name)
    mine = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, part), group)
    return gather(jax.vmap(function)(mine), axis_name)
