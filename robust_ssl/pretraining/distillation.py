"""DINO: a student learns what its own moving average, the teacher, says of other views."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC
from robust_ssl.pretraining.clustering import cross_view_entropy
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    apply_network,
    encode,
    momentum_average,
    momentum_schedule,
    normalize,
    option,
)
from robust_ssl.pretraining.two_views import MultiCrop, frozen_at_first
from robust_ssl.types import Encoder, Variables


def dino_loss(
    student: jax.Array,
    teacher: jax.Array,
    center: jax.Array,
    *,
    temperature: float = 0.1,  # Caron et al. 2021, Sec. 3.2
    teacher_temperature: float | jax.Array = 0.07,  # solo-learn, CIFAR
) -> jax.Array:
    r"""How far the student's distribution over prototypes is from the teacher's on other views.

    .. math:: \ell = \mathrm{mean}_{a \ne v} \; H\big(\mathrm{softmax}((t^a - c) / \tau_t),
                                                  \mathrm{softmax}(s^v / \tau_s)\big)

    The center c keeps the teacher from always naming one prototype, its low temperature from
    naming all alike.  ``log(prototypes)`` when all logits are equal.

    Args:
      student: Logits s, float ``[views, batch, prototypes]``.
      teacher: Logits t of the first views, ``[2, batch, prototypes]``.  A constant: no gradient
        flows into it.
      center: Moving average c of the teacher's logits, ``[prototypes]``.
      temperature: Of the student.
      teacher_temperature: Of the teacher; lower is sharper.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes do not fit.

    Example:
      >>> losses = dino_loss(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4)), jnp.zeros(4))
      >>> losses.shape, round(float(losses[0]), 4)  # log 4
      ((3,), 1.3863)

    References:
      Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, Eq. 3
      and Algorithm 1.
    """
    chex.assert_rank([student, teacher, center], [3, 3, 1])
    centered = (teacher - center.reshape(1, 1, -1)) / teacher_temperature
    return cross_view_entropy(jax.nn.softmax(centered, axis=-1), student / temperature)


@struct.dataclass
class DINO(MultiCrop):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `MultiCrop`.

    Its variables: projector and prototypes of the student, and as state the teacher (encoder,
    projector and prototypes) and its center.  Logits are cosines: projections and prototypes are
    normalized.  Only the student sees the small views.

    Attributes:
      temperature: Of the student.
      teacher_temperature: Of the teacher.
      first_teacher_temperature: The same at the start of its warm-up.
      warmup: Share of the training in which the teacher's temperature rises linearly.
      num_prototypes: Number of prototypes.
      momentum: Of the teacher, at the start.
      final_momentum: Of the teacher, at the end.
      center_momentum: Of the center.
      freeze: Share of the training in which the prototypes have no gradient.
      local_scale: Smallest and largest share of the area that small views keep.

    References:
      Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.
    """

    # Defaults are those of solo-learn's CIFAR recipe (shares are its epochs of 1000).
    temperature: float = option(0.1)
    teacher_temperature: float = option(0.07)
    first_teacher_temperature: float = option(0.04)
    warmup: float = option(0.0)
    num_prototypes: int = option(4096)
    momentum: float = option(0.9995)
    final_momentum: float = option(1.0)
    center_momentum: float = option(0.9)
    freeze: float = option(0.001)
    local_scale: tuple[float, float] = option((0.05, 0.4))  # the authors' code

    augmentations = ASYMMETRIC
    hidden_layers = 2
    projector = MLP((), batch_norm=False, activation="gelu")

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the student's projector and prototypes, an equal teacher and a center of 0."""
        projector_key, prototypes_key = jax.random.split(key)
        variables = super().init(projector_key, encoder, num_images)
        shape = (self.projection_dim, self.num_prototypes)
        # Of length 1: only directions count, and a step turns a longer one less.
        random = jax.random.normal(prototypes_key, shape)
        variables["params"]["prototypes"] = normalize(random.T).T
        teacher = {"encoder": dict(encoder.variables), "params": variables["params"]}
        # A copy: a state whose leaves are one buffer could not be donated.
        teacher = jax.tree.map(jnp.copy, teacher)
        center = jnp.zeros(self.num_prototypes)
        return {**variables, "state": {"teacher": teacher, "center": center}}

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `dino_loss` per image of the global batch; moves the center."""
        state = variables["state"]
        teacher, teacher_logits = self._run_teacher(state["teacher"], encoder, inputs)
        features, statistics = encode(encoder, inputs.views, inputs.axis_name)
        params = variables["params"]
        prototypes = frozen_at_first(params["prototypes"], inputs.progress, self.freeze)
        losses = dino_loss(
            self._logits({**params, "prototypes": prototypes}, features),
            teacher_logits,
            state["center"],
            temperature=self.temperature,
            teacher_temperature=self._teacher_temperature(inputs.progress),
        )
        # The losses of the images are independent given the center, so they are gathered and not
        # the logits, which are thousands per image.
        mean = parallel.average(jnp.mean(teacher_logits, axis=(0, 1)), inputs.axis_name)
        center = momentum_average(state["center"], mean, self.center_momentum)
        state = {"teacher": teacher, "center": center}
        update = MethodUpdate(statistics, variables["batch_stats"], state)
        return parallel.gather(losses, inputs.axis_name), update

    def _run_teacher(
        self, teacher: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[Variables, jax.Array]:
        """Runs the teacher on the first two views; returns it with new statistics, and logits."""
        network = encoder.replace(variables=teacher["encoder"])
        features, statistics = encode(network, inputs.views[:2], inputs.axis_name)
        logits = self._logits(teacher["params"], features)
        if statistics:
            teacher = {**teacher, "encoder": {**teacher["encoder"], "batch_stats": statistics}}
        return jax.lax.stop_gradient((teacher, logits))

    def _logits(self, params: Variables, features: list[jax.Array]) -> jax.Array:
        """Cosines with the prototypes, ``[views, batch, prototypes]``."""
        projector, x = self.networks["projector"], jnp.concatenate(features)
        out, _ = apply_network(projector, {"params": params}, "projector", x, None)
        logits = normalize(out) @ normalize(params["prototypes"].T).T
        return jnp.stack(jnp.split(logits, len(features)))

    def _teacher_temperature(self, progress: jax.Array) -> jax.Array | float:
        if not self.warmup:
            return self.teacher_temperature
        share = jnp.minimum(progress / self.warmup, 1.0)
        first = self.first_teacher_temperature
        return first + share * (self.teacher_temperature - first)

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Moves the teacher's weights; its batch statistics are of its own forward passes."""
        momentum = momentum_schedule(self.momentum, progress, self.final_momentum)
        old = variables["state"]["teacher"]
        params = momentum_average(
            (old["encoder"]["params"], old["params"]),
            (encoder.variables["params"], variables["params"]),
            momentum,
        )
        teacher = {"encoder": {**old["encoder"], "params": params[0]}, "params": params[1]}
        return {**variables, "state": {**variables["state"], "teacher": teacher}}
