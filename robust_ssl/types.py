"""The values that travel through the package, and the contracts of what a user may bring.

Everything here is a frozen pytree of arrays whose choices are static fields, so it can be passed
through `jax.jit`, `jax.vmap` and `jax.pmap`, saved, and compared.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.pixels import check_channels

Variables = Mapping[str, Any]  # {"params": tree, "batch_stats": tree, ...}


@struct.dataclass
class Outputs(struct.Value):
    """What a model says about a batch of images (or about one image, without the batch axis).

    Attributes:
      features: The encoder's output, float ``[batch, dim]``.
      logits: The head's output, float ``[batch, classes]``; None where there is no head.
      taps: Intermediate activations by name, for example ``"stage1/block2"``, in the order of the
        layers; under `jax.jit` what nobody reads is never computed.
    """

    features: jax.Array
    logits: jax.Array | None = None
    taps: Mapping[str, jax.Array] = struct.field(default_factory=dict)

    def __repr__(self) -> str:
        """Shows shapes instead of numbers."""
        shown = [f"{name}: {struct.kind(leaf)}" for name, leaf in list(self.taps.items())[:2]]
        more = [f"{len(self.taps) - 2} more"] if len(self.taps) > 2 else []
        return struct.lines(
            f"Outputs(features: {struct.kind(self.features)}, logits: {struct.kind(self.logits)})",
            *([f"  taps: {', '.join(shown + more)}"] if shown else []),
        )

    def without_taps(self) -> Outputs:
        """Returns the same outputs with no intermediate activations."""
        return self.replace(taps={})


def _with_batch_axis(images: jax.Array, apply: Callable[[jax.Array], Outputs]) -> Outputs:
    """Calls `apply` on a batch; one image ``[H, W, 3]`` travels as a batch of one."""
    if images.ndim == 4:
        return apply(images)
    if images.ndim != 3:
        raise ValueError(f"images must be [batch, H, W, 3] or [H, W, 3], got shape {images.shape}")
    return jax.tree.map(lambda leaf: leaf[0], apply(images[None]))


@struct.dataclass
class Encoder(struct.Value):
    """A feature extractor with its weights and its own normalization.

    Calling it is evaluation mode: batch statistics are read, never written.  Images are pixels in
    [0, 1]; the normalization ``(image - mean) / std`` happens in here and nowhere else, so no
    attack can miss it.

    Attributes:
      variables: ``{"params": ..., "batch_stats": ...}`` of `module`.
      module: A linen module; ``module.apply(variables, x, train=False)`` returns
        ``(features [batch, dim], taps)``.
      mean: Per-channel mean in pixel units, three floats.
      std: Per-channel standard deviation in pixel units, three floats.
      image_size: Height and width the encoder was trained for, pixels.
      dim: Number of features.
      name: For tables and manifests.
      preprocess: An input transformation that comes before the normalization, pixels
        ``[..., H, W, 3]`` in [0, 1] to the same shape: one of `robust_ssl.models.preprocessing`,
        or any callable that hashes (equal ones compile once); None for none.
      resizing: How pictures of other sizes became its images where it was trained or scored, a
        `robust_ssl.data.Resizing`; None where nobody has said.  Calling the encoder does not look
        at it: `robust_ssl.data.load` takes it.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=16)
      >>> encoder(jnp.zeros((2, 16, 16, 3))).features.shape
      (2, 64)
      >>> black_or_white = encoder.replace(preprocess=models.Quantize(levels=2))
      >>> float(black_or_white.replace(mean=(0.0,) * 3, std=(1.0,) * 3).normalize(
      ...     jnp.full((1, 1, 3), 0.4)).max())
      0.0
    """

    variables: Variables
    module: nn.Module = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    image_size: int = struct.field(pytree_node=False)
    dim: int = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False, default="encoder")
    preprocess: Callable[[jax.Array], jax.Array] | None = struct.field(
        pytree_node=False, default=None
    )
    resizing: Any = struct.field(pytree_node=False, default=None)

    # What `dataclasses` would write holds every weight: 195,830 characters for a ResNet-18, in each
    # traceback and notebook cell that shows one.
    def __repr__(self) -> str:
        """Shows what the encoder is, without its weights."""
        mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
        return struct.lines(
            f"Encoder {self.name!r}: {type(self.module).__name__}, {struct.count(self.variables)}",
            f"  images {self.image_size}x{self.image_size}x3 to {self.dim} features",
            f"  (image - ({mean})) / ({std})",
            *([] if self.preprocess is None else [f"  after {self.preprocess!r}"]),
        )

    def normalize(self, images: jax.Array) -> jax.Array:
        """Turns pixels in [0, 1] into what the module was trained on; float32, same shape.

        First `preprocess`, then ``(image - mean) / std``.

        Raises:
          TypeError: If the images are integers, which are not in [0, 1].
          ValueError: If images have other than three channels, last; if `preprocess` returns
            another shape.
        """
        check_channels(images.shape)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"an encoder takes float pixels in [0, 1], got {images.dtype}; divide 8-bit "
                "images by 255"
            )
        images = jnp.asarray(images, jnp.float32)
        if self.preprocess is not None:
            processed = jnp.asarray(self.preprocess(images), jnp.float32)
            if processed.shape != images.shape:
                raise ValueError(
                    f"preprocess={self.preprocess} turns images {images.shape} into "
                    f"{processed.shape}; it must keep the shape"
                )
            images = processed
        channels = (1,) * (images.ndim - 1) + (3,)
        mean = jnp.asarray(self.mean, jnp.float32).reshape(channels)
        std = jnp.asarray(self.std, jnp.float32).reshape(channels)
        return (images - mean) / std

    def __call__(self, images: jax.Array) -> Outputs:
        """Returns features and taps in evaluation mode, for a batch or for one image."""
        stale = getattr(self.module, "closes_over", False)  # perhaps, what was traced before
        evaluated = _evaluated.__wrapped__ if stale else _evaluated  # type: ignore[attr-defined]

        def apply(batch):
            features, taps = evaluated(self, batch)
            return Outputs(features=features, taps=taps)

        return _with_batch_axis(images, apply)

    def apply_train(
        self, images: jax.Array, *, key: jax.Array | None = None, axis_name: str | None = None
    ) -> tuple[Outputs, Mapping[str, Any]]:
        """Runs in training mode: batch norm uses this batch, across `axis_name` if it is given.

        Args:
          images: Pixels, float ``[batch, H, W, 3]``.
          key: For modules with dropout; None where there is none.
          axis_name: The device axis over which batch statistics are averaged.

        Returns:
          The outputs and the new ``batch_stats`` (an empty mapping where there are none).
        """
        features, taps, statistics = _trained(self, images, key, axis_name)
        return Outputs(features=features, taps=taps), statistics


# Under a `jax.jit` of their own each is traced once for all programs that hold it: tracing a deep
# network takes a second, and a run traces it a hundred times.  `inline` leaves nothing else of it.
# Of an ordered dictionary JAX keeps the order, here that of the layers.
@functools.partial(jax.jit, inline=True)
def _evaluated(encoder: Encoder, images: jax.Array) -> tuple[jax.Array, OrderedDict]:
    outputs: Any = encoder.module.apply(encoder.variables, encoder.normalize(images), train=False)
    features, taps = outputs
    return features, OrderedDict(taps)


@functools.partial(jax.jit, inline=True, static_argnums=3)
def _trained(
    encoder: Encoder, images: jax.Array, key: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, OrderedDict, Mapping[str, Any]]:
    module = encoder.module.clone(axis_name=axis_name)
    (features, taps), updated = module.apply(
        encoder.variables,
        encoder.normalize(images),
        train=True,
        mutable=["batch_stats"],
        rngs=None if key is None else {"dropout": key},
    )
    return features, OrderedDict(taps), updated.get("batch_stats", {})


@struct.dataclass
class Classifier(struct.Value):
    """An encoder with a head: what a downstream team ships.

    Attributes:
      encoder: The feature extractor.
      head_variables: ``{"params": ...}`` of `head`.
      head: A linen module; ``head.apply(variables, features, train=False)`` returns logits.
      num_classes: Number of logits.
      class_names: What each logit stands for; empty where nobody has said.
    """

    encoder: Encoder
    head_variables: Variables
    head: nn.Module = struct.field(pytree_node=False)
    num_classes: int = struct.field(pytree_node=False)
    class_names: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def __repr__(self) -> str:
        """Shows what the classifier is, without its weights."""
        return struct.lines(
            f"Classifier: {self.num_classes} classes, head {type(self.head).__name__}, "
            f"{struct.count(self.head_variables)}",
            *(f"  {line}" for line in repr(self.encoder).splitlines()),
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images, pixels."""
        return self.encoder.image_size

    @property
    def variables(self) -> Variables:
        """All variables in one tree, ``{collection: {"encoder": ..., "head": ...}}``.

        Paths in it, such as ``encoder/stem/conv/kernel`` or ``head/linear/bias``, are what
        layer-wise learning rates and layer sensitivity are keyed by.
        """
        merged: dict[str, dict[str, Any]] = {}
        for part, tree in (("encoder", self.encoder.variables), ("head", self.head_variables)):
            for collection, leaves in tree.items():
                merged.setdefault(collection, {})[part] = leaves
        return merged

    def with_variables(self, variables: Variables) -> Classifier:
        """Returns this classifier with the weights of a tree shaped like `variables`."""
        encoder = {c: tree["encoder"] for c, tree in variables.items() if "encoder" in tree}
        head = {c: tree["head"] for c, tree in variables.items() if "head" in tree}
        return self.replace(encoder=self.encoder.replace(variables=encoder), head_variables=head)

    def __call__(self, images: jax.Array) -> Outputs:
        """Returns features, logits and taps in evaluation mode, for a batch or one image."""

        def apply(batch):
            outputs = self.encoder(batch)
            logits = self.head.apply(self.head_variables, outputs.features, train=False)
            return outputs.replace(logits=logits)

        return _with_batch_axis(images, apply)

    def apply_train(
        self, images: jax.Array, *, key: jax.Array, axis_name: str | None = None
    ) -> tuple[Outputs, Mapping[str, Any]]:
        """Runs in training mode (dropout on, batch statistics of this batch).

        Returns:
          The outputs and the new ``batch_stats``, ``{"encoder": ...}``.
        """
        encoder_key, head_key = jax.random.split(key)
        outputs, stats = self.encoder.apply_train(images, key=encoder_key, axis_name=axis_name)
        logits = self.head.apply(
            self.head_variables, outputs.features, train=True, rngs={"dropout": head_key}
        )
        return outputs.replace(logits=logits), {"encoder": stats} if stats else {}


@struct.dataclass
class AttackInputs(struct.Value):
    """What an attack objective may look at; every array has a batch axis (of one, per image).

    Attributes:
      clean: Outputs for the unperturbed images; a constant, no gradient flows into it.
      adversarial: Outputs for the perturbed images; what the attacker moves.
      clean_images: Pixels, float ``[batch, H, W, 3]``.
      adversarial_images: Pixels, float ``[batch, H, W, 3]``.
      labels: int32 ``[batch]``; None for every downstream-agnostic attack.
      target: Outputs for the image whose features a targeted attack moves to, or None.
    """

    clean: Outputs
    adversarial: Outputs
    clean_images: jax.Array
    adversarial_images: jax.Array
    labels: jax.Array | None = None
    target: Outputs | None = None


@struct.dataclass
class LossInputs(struct.Value):
    """What a training loss may look at, for the *global* batch, whatever the device count.

    Attributes:
      labels: int32 ``[batch]``.
      clean: Outputs for the unperturbed images.
      adversarial: Outputs for the perturbed images; None where nothing is attacked.
      pretrained: Outputs of the frozen public encoder on the unperturbed images, without logits.
      teacher: Outputs of another classifier on the unperturbed images.  Both have no gradient, and
        are None unless the step was asked for them.
    """

    labels: jax.Array
    clean: Outputs
    adversarial: Outputs | None = None
    pretrained: Outputs | None = None
    teacher: Outputs | None = None


@struct.dataclass
class TrainState(struct.Value):
    """All that training needs to go on: arrays only, so orbax saves it as it is.

    Attributes:
      step: Number of updates tried so far, int32 scalar.
      variables: ``{"params": ..., "batch_stats": ...}``.
      opt_state: State of the optax transformation.
      counters: int32 scalars by name, for example updates skipped because of NaN.
    """

    step: jax.Array
    variables: Variables
    opt_state: Any
    counters: Mapping[str, jax.Array] = struct.field(default_factory=dict)

    def __repr__(self) -> str:
        """Shows how much there is instead of the numbers."""
        counters = ", ".join(self.counters) or None
        return struct.lines(
            f"TrainState(step: {struct.kind(self.step)}, counters: {counters})",
            f"  variables: {struct.size(self.variables)}",
            f"  opt_state: {struct.size(self.opt_state)}",
        )


Loss = Callable[[LossInputs], jax.Array]  # -> [batch], minimized
Objective = Callable[[AttackInputs], jax.Array]  # -> scalar, maximized


@runtime_checkable
class Model(Protocol):
    """Anything that turns pixels in [0, 1] into `Outputs`: an `Encoder`, a `Classifier`."""

    def __call__(self, images: jax.Array) -> Outputs:
        """Returns the outputs for ``[batch, H, W, 3]`` or for one image ``[H, W, 3]``."""


@runtime_checkable
class Attack(Protocol):
    """A pytree value that perturbs one image; `jax.vmap` makes it a batch."""

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the adversarial image, ``[H, W, 3]`` in [0, 1]."""


@runtime_checkable
class Threat(Protocol):
    """What the attacker may do to an image.

    One perturbation for all images, a *delta* ``[H, W, 3]``, is added to an image and projected.
    A threat that means something else brings any of these methods, and they are used instead:

    * ``apply(delta, image, key=None)``: the attacked image, valid, with a gradient for `delta`;
    * ``sample_delta(key, image_shape)``: a random allowed delta;
    * ``project_delta(delta)``: the allowed delta nearest to one;
    * ``delta_of(pattern)``: the delta that numbers in [-1, 1], ``[H, W, 3]``, stand for;
    * ``resize_delta(delta, (height, width))``: the same delta for another image size;
    * ``filter_delta(delta)``: the part of a delta that the threat lets through, linear and its own
      transpose: gradients of a fit pass through it too;
    * ``keyed(key)``: the threat for one step of fitting; its field `key` is then folded with an
      image's index to what `apply` gets as `key`;
    * ``check(image_shape)``: raises ValueError where the budget makes no sense.

    `threats.Patch` brings all of them, `threats.Band` those that speak of the delta alone.  A
    dataclass of numbers, arrays and strings can be saved with what was fitted under it; its class
    is passed to load it (`threats.check_saveable`).
    """

    def sample(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Returns a random allowed image."""

    def project(self, candidate: jax.Array, image: jax.Array) -> jax.Array:
        """Returns the allowed image nearest to `candidate`: inside the budget and [0, 1]."""

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """Returns the unit step that raises a linear function the most."""
