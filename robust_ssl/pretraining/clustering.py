"""SwAV and DeepCluster v2: the views of an image belong to the same cluster."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    enqueue,
    normalize,
    option,
)
from robust_ssl.pretraining.two_views import MultiCrop, TwoViews, frozen_at_first
from robust_ssl.types import Encoder, Variables


def sinkhorn(
    scores: jax.Array,
    *,
    num_steps: int = 3,  # Caron et al. 2020, Sec. 3.1
    smoothness: float = 0.05,  # the same; epsilon in the paper
) -> jax.Array:
    r"""Assigns images to prototypes so that every prototype gets an equal share of them.

    .. math:: Q^* = \mathrm{Diag}(u) \exp(S / \varepsilon) \mathrm{Diag}(v)

    by turns makes the prototypes' shares equal and the images' sums 1.  Computed with logarithms,
    which cannot overflow.

    Args:
      scores: Likeness of images and prototypes, float ``[batch, prototypes]``.
      num_steps: Turns; with more of them the shares are more nearly equal.
      smoothness: Large values spread an image over many prototypes.

    Returns:
      Non-negative weights, ``[batch, prototypes]``; each row sums to 1, each column nearly to
      ``batch / prototypes``.  No gradient flows through them.

    Raises:
      AssertionError: If scores is not rank 2.

    Example:
      >>> sinkhorn(jnp.array([[1.0, 0.0], [0.0, 1.0]])).round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
      >>> sinkhorn(jnp.array([[1.0, 0.0], [1.0, 0.0]])).round(3).tolist()
      [[0.5, 0.5], [0.5, 0.5]]

    References:
      Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
      NeurIPS 2020, Eq. 3 and 5; Cuturi, "Sinkhorn Distances", NeurIPS 2013.
    """
    chex.assert_rank(scores, 2)

    def turn(_, logs):
        logs = logs - jax.nn.logsumexp(logs, axis=0, keepdims=True)
        return logs - jax.nn.logsumexp(logs, axis=1, keepdims=True)

    logs = jax.lax.stop_gradient(scores) / smoothness
    return jnp.exp(jax.lax.fori_loop(0, num_steps, turn, logs))


def cross_view_entropy(targets: jax.Array, logits: jax.Array) -> jax.Array:
    r"""The cross-entropy between each target view and every other view of an image, averaged.

    .. math:: \ell = \frac{1}{|P|} \sum_{(a, v) \in P} - \sum_k q^a_k \log p^v_k, \qquad
              P = \{(a, v) : a \ne v\}, \quad p^v = \mathrm{softmax}(\mathrm{logits}_v)

    Args:
      targets: Probabilities, float ``[target views, batch, prototypes]``.  A constant: no gradient
        flows into it.
      logits: Float ``[views, batch, prototypes]``; its first views are those of the targets.

    Returns:
      One loss per image, ``[batch]``, at least the targets' entropy.

    Raises:
      AssertionError: If the shapes do not fit.

    Example:
      >>> targets = jnp.full((2, 3, 4), 0.25)
      >>> round(float(cross_view_entropy(targets, jnp.zeros((2, 3, 4)))[0]), 4)  # log 4
      1.3863

    References:
      Caron et al., NeurIPS 2020, Eq. 2; Caron et al., "Emerging Properties in Self-Supervised
      Vision Transformers", ICCV 2021, Eq. 3.
    """
    chex.assert_rank([targets, logits], 3)
    chex.assert_equal_shape_suffix([targets, logits], 2)
    targets = jax.lax.stop_gradient(targets)
    logs = jax.nn.log_softmax(logits, axis=-1)
    pairs = [(a, v) for a in range(len(targets)) for v in range(len(logits)) if a != v]
    return sum(-jnp.sum(targets[a] * logs[v], axis=-1) for a, v in pairs) / len(pairs)


@struct.dataclass
class SwAV(MultiCrop):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `MultiCrop`.

    Its variables: a projector, the prototypes (columns of length 1) and a queue of earlier
    projections, which `sinkhorn` sees beside the batch.  Small views are compared, never assigned.

    Attributes:
      temperature: Of the views' softmax over prototypes.
      projection_dim: Size of the projections.
      num_prototypes: Number of prototypes.
      sinkhorn_steps: See `sinkhorn`.
      smoothness: See `sinkhorn`.
      queue_size: Images in the queue; 0 is no queue.
      queue_start: Share of the training after which the queue is used, once it is full.
      freeze: Share of the training in which the prototypes have no gradient.

    References:
      Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
      NeurIPS 2020.
    """

    # Defaults are those of solo-learn's CIFAR recipe (shares are its epochs of 1000).
    temperature: float = option(0.1)
    projection_dim: int = option(128)
    num_prototypes: int = option(3000)
    sinkhorn_steps: int = option(3)
    smoothness: float = option(0.05)
    queue_size: int = option(3840)
    queue_start: float = option(0.05)
    freeze: float = option(0.002)

    projector = MLP(())

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns projector, prototypes ``[dim, prototypes]`` and queue ``[2, size, dim]``."""
        projector_key, prototypes_key = jax.random.split(key)
        variables = super().init(projector_key, encoder, num_images)
        shape = (self.num_prototypes, self.projection_dim)
        variables["params"]["prototypes"] = normalize(jax.random.normal(prototypes_key, shape)).T
        queue = jnp.zeros((2, self.queue_size, self.projection_dim))
        return {**variables, "state": {"queue": queue} if self.queue_size else {}}

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `cross_view_entropy` of the assignments per image of the global batch."""
        (out,), update = self.forward(variables, encoder, inputs)
        views = tuple(jnp.split(normalize(out), len(inputs.views)))
        # `sinkhorn` shares out the images of the whole batch, so all devices need all of them.
        projections = jnp.stack(parallel.gather(views, inputs.axis_name))
        prototypes = variables["params"]["prototypes"]
        prototypes = frozen_at_first(prototypes, inputs.progress, self.freeze)
        scores = projections @ prototypes
        state = variables["state"]
        assignments = self._assign(scores[:2], prototypes, state, inputs.progress)
        losses = cross_view_entropy(assignments, scores / self.temperature)
        if self.queue_size:
            state = {"queue": jax.vmap(enqueue)(state["queue"], _constant(projections[:2]))}
        return losses, update.replace(state=state)

    def _assign(
        self, scores: jax.Array, prototypes: jax.Array, state: Variables, progress: jax.Array
    ) -> jax.Array:
        """Assigns the images of both views, ``[2, batch, prototypes]``."""
        scores, prototypes = _constant((scores, prototypes))

        def assign(scores):
            return sinkhorn(scores, num_steps=self.sinkhorn_steps, smoothness=self.smoothness)

        def with_queue(scores):
            both = jnp.concatenate([scores, state["queue"] @ prototypes], axis=1)
            return jax.vmap(assign)(both)[:, : scores.shape[1]]

        if not self.queue_size:
            return jax.vmap(assign)(scores)
        # It starts as zeros, which no projection is: the oldest row tells whether it is full.
        full = jnp.any(state["queue"][:, -1] != 0)
        use = full & (progress >= self.queue_start)
        return jax.lax.cond(use, with_queue, jax.vmap(assign), scores)

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Gives every prototype length 1 again."""
        params = variables["params"]
        prototypes = normalize(params["prototypes"].T).T
        return {**variables, "params": {**params, "prototypes": prototypes}}


def _constant(tree):
    return jax.tree.map(jax.lax.stop_gradient, tree)


def spherical_kmeans(
    key: jax.Array,
    points: jax.Array,
    *,
    num_clusters: int,
    num_steps: int = 10,  # Caron et al. 2020, App. A.3
) -> tuple[jax.Array, jax.Array]:
    """Clusters directions: a centroid is the direction of the mean of its points.

    Starts at random points; a cluster that loses all points keeps its centroid.

    Args:
      key: Random key, for the start.
      points: Unit vectors, float ``[n, dim]``.  A row of zeros stands for a point that is not
        known yet: it moves no centroid.
      num_clusters: At most n.
      num_steps: Rounds of assigning and averaging.

    Returns:
      Centroids, ``[num_clusters, dim]``, and the nearest one of each point, int32 ``[n]``; -1 for
      rows of zeros.

    Raises:
      ValueError: If there are more clusters than points.

    Example:
      >>> points = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
      >>> _, nearest = spherical_kmeans(jax.random.key(0), points, num_clusters=3)
      >>> bool(nearest[0] == nearest[1]), bool(nearest[0] == nearest[2]), int(nearest[3])
      (True, False, -1)

    References:
      Hornik et al., "Spherical k-Means Clustering", Journal of Statistical Software 50, 2012;
      Caron et al., NeurIPS 2020, App. A.3 (DeepCluster-v2).
    """
    chex.assert_rank(points, 2)
    if num_clusters > len(points):
        raise ValueError(f"{num_clusters} clusters need as many points, there are {len(points)}")
    seen = jnp.any(points != 0, axis=1)
    # Unknown points sort behind all others, so the start takes them only where points are short.
    order = jnp.argsort(jnp.where(seen, jax.random.uniform(key, seen.shape), 2.0))

    def nearest(centroids):
        # In parts: all points by all clusters would be 600 MB for CIFAR-10.
        return jax.lax.map(lambda point: jnp.argmax(centroids @ point), points, batch_size=4096)

    def refine(_, centroids):
        sums = jax.ops.segment_sum(points, nearest(centroids), num_clusters)
        empty = jnp.all(sums == 0, axis=1, keepdims=True)
        return jnp.where(empty, centroids, normalize(sums))

    centroids = jax.lax.fori_loop(0, num_steps, refine, points[order[:num_clusters]])
    return centroids, jnp.where(seen, nearest(centroids), -1).astype(jnp.int32)


def deepcluster_loss(
    projections: jax.Array,
    prototypes: jax.Array,
    assignments: jax.Array,
    *,
    temperature: float = 0.1,  # solo-learn, CIFAR
) -> jax.Array:
    r"""The cross-entropy of telling an image's cluster from each of its views.

    .. math:: \ell_i = -\frac{1}{H V} \sum_{h, v} \log \frac{\exp(z_i^v \cdot c^h_{a_i} / \tau)}
                                                         {\sum_k \exp(z_i^v \cdot c^h_k / \tau)}

    Args:
      projections: Unit vectors z, float ``[views, batch, dim]``.
      prototypes: Centroids c of each clustering, ``[clusterings, prototypes, dim]``.
      assignments: The images' clusters a, int32 ``[clusterings, batch]``; -1 for an image that has
        none yet.
      temperature: How sharply near centroids are told apart.

    Returns:
      One loss per image, ``[batch]``; 0, without gradient, for an image without a cluster.

    Raises:
      AssertionError: If a rank is wrong.

    Example:
      >>> z, clusters = jnp.ones((2, 1, 3)), jnp.array([[0]])
      >>> round(float(deepcluster_loss(z, jnp.ones((1, 4, 3)), clusters)[0]), 4)  # log 4
      1.3863

    References:
      Caron et al., NeurIPS 2020, App. A.3 (DeepCluster-v2).
    """
    chex.assert_rank([projections, prototypes, assignments], [3, 3, 2])
    logits = jnp.einsum("vbd,hkd->hvbk", projections, prototypes) / temperature
    # -1 would take the last cluster; its loss is set to 0 below.
    clusters = jnp.maximum(assignments, 0)[:, None, :, None]
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), clusters, axis=-1)[..., 0]
    losses = jnp.where((assignments >= 0)[:, None], -logs, 0.0)
    return jnp.mean(losses, axis=(0, 1))


@struct.dataclass
class DeepClusterV2(TwoViews):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `TwoViews`.

    It remembers the projections of every image and clusters them before each epoch; the centroids
    are the classifier of that epoch.  In the first epoch nothing is known, so it only fills the
    memory: losses and gradients are 0.

    Attributes:
      temperature: Of `deepcluster_loss`.
      projection_dim: Size of the projections.
      num_prototypes: Clusters of each clustering.
      num_clusterings: Clusterings from different starts; by turns of the first and second views.
      kmeans_steps: Of `spherical_kmeans`.

    References:
      Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
      NeurIPS 2020, App. A.3.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    temperature: float = option(0.1)
    projection_dim: int = option(128)
    num_prototypes: int = option(3000)
    num_clusterings: int = option(3)
    kmeans_steps: int = option(10)

    projector = MLP(())

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, an empty memory ``[2, num_images, dim]`` and no clusters.

        Raises:
          ValueError: If there are fewer images than prototypes.
        """
        if num_images < self.num_prototypes:
            raise ValueError(
                f"DeepClusterV2 has num_prototypes={self.num_prototypes} but only {num_images} "
                "images to cluster; set fewer prototypes"
            )
        variables = super().init(key, encoder, num_images)
        clusters = (self.num_clusterings, self.num_prototypes, self.projection_dim)
        state = {
            "memory": jnp.zeros((2, num_images, self.projection_dim)),
            "prototypes": jnp.zeros(clusters),
            "assignments": jnp.full((self.num_clusterings, num_images), -1, jnp.int32),
        }
        return {**variables, "state": state}

    def epoch_start(self, key: jax.Array, variables: Variables) -> Variables:
        """Clusters the memory anew."""
        state = variables["state"]

        def cluster(args):
            key, view = args
            return spherical_kmeans(
                key,
                state["memory"][view],
                num_clusters=self.num_prototypes,
                num_steps=self.kmeans_steps,
            )

        keys = jax.random.split(key, self.num_clusterings)
        views = jnp.arange(self.num_clusterings) % 2
        prototypes, assignments = jax.lax.map(cluster, (keys, views))
        state = {**state, "prototypes": prototypes, "assignments": assignments}
        return {**variables, "state": state}

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `deepcluster_loss` per image of the global batch; remembers the projections."""
        (out,), update = self.forward(variables, encoder, inputs)
        views = tuple(jnp.split(normalize(out), 2))
        # The memory is the same on all devices, so each one writes the images of all.
        views, rows = parallel.gather((views, inputs.rows), inputs.axis_name)
        projections = jnp.stack(views)
        state = variables["state"]
        losses = deepcluster_loss(
            projections,
            state["prototypes"],
            state["assignments"][:, rows],
            temperature=self.temperature,
        )
        memory = state["memory"].at[:, rows].set(_constant(projections))
        return losses, update.replace(state={**state, "memory": memory})
