"""Does what you brought keep the package's laws?  Checks for a loss and for an attack.

Call them from a test of your own; they raise `AssertionError` and name what failed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.build import resolve
from robust_ssl.types import Attack, Loss, LossInputs, Model, Outputs, Threat


def check_loss(
    loss: Loss | str, *, batch: int = 6, num_classes: int = 4, dim: int = 8, seed: int = 0
) -> None:
    """Checks that a loss keeps the laws of training.

    It must return one finite float per image, ``[batch]``, with a finite gradient (at ordinary
    outputs, where clean and adversarial agree, and at zero outputs), give the same under `jax.jit`,
    and follow its images when the batch is permuted.

    Args:
      loss: ``LossInputs -> [batch]``, or ``"module:function"``.
      batch: Number of made-up images.
      num_classes: Number of made-up logits.
      dim: Number of made-up features.
      seed: Of the made-up outputs.

    Raises:
      AssertionError: Names the loss and the law it breaks.

    Example:
      >>> check_loss(lambda inputs: inputs.clean.features.sum(axis=1))
      >>> check_loss("robust_ssl.losses:genetic_regularization")
    """
    loss = resolve(loss)
    name = _name(loss)
    inputs = _made_up_inputs(batch, num_classes, dim, seed)
    zero = jax.tree.map(jnp.zeros_like, inputs)
    cases = {
        "ordinary outputs": inputs,
        "clean = adversarial": inputs.replace(adversarial=inputs.clean),
        "zero outputs": zero.replace(labels=inputs.labels),
    }
    for case, example in cases.items():
        values = loss(example)
        shape = getattr(values, "shape", None)
        assert shape == (batch,), f"{name} must return [batch] = ({batch},), got {shape} at {case}"
        assert jnp.issubdtype(values.dtype, jnp.floating), f"{name} must be float: {values.dtype}"
        assert bool(jnp.isfinite(values).all()), f"{name} is not finite at {case}: {values}"
        gradients = jax.grad(lambda x: jnp.mean(loss(x)), allow_int=True)(example)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            finite = leaf.dtype == jax.dtypes.float0 or bool(jnp.isfinite(leaf).all())
            where = jax.tree_util.keystr(path)
            assert finite, f"{name} has a gradient that is not finite at {case}, in {where}"
    values = np.asarray(loss(inputs))
    _assert_close(jax.jit(loss)(inputs), values, f"{name} gives something else under jax.jit")
    order = np.random.default_rng(seed).permutation(batch)
    permuted = loss(jax.tree.map(lambda x: x[order], inputs))
    _assert_close(permuted, values[order], f"{name} does not follow a permutation of the batch")


def _made_up_inputs(batch: int, num_classes: int, dim: int, seed: int) -> LossInputs:
    random = np.random.default_rng(seed)

    def draw(size):
        return jnp.asarray(random.normal(size=(batch, size)), jnp.float32)

    return LossInputs(
        labels=jnp.asarray(np.arange(batch) % num_classes, jnp.int32),
        clean=Outputs(features=draw(dim), logits=draw(num_classes)),
        adversarial=Outputs(features=draw(dim), logits=draw(num_classes)),
        pretrained=Outputs(features=draw(dim)),
    )


@struct.dataclass
class _Bilinear:
    """The smallest model with features and logits that depend on every pixel, not linearly."""

    weights: jax.Array  # [H * W * 3, dim]
    head: jax.Array  # [dim, classes]

    def __call__(self, images: jax.Array) -> Outputs:
        flat = images.reshape(*images.shape[:-3], -1)
        features = jnp.tanh((flat - 0.5) @ self.weights)
        return Outputs(features=features, logits=features @ self.head)


def check_attack(
    attack: Attack,
    *,
    threat: Threat | None = None,
    model: Model | None = None,
    image_size: int = 8,
    batch: int = 3,
    needs_label: bool = False,
    seed: int = 0,
) -> None:
    """Checks that an attack keeps the laws of attacks.

    Its image must have the shape and type of the original, lie in [0, 1] and inside the budget
    (projecting it changes nothing); the same key must give the same image, under `jax.jit` too; and
    in a batch each image's result must not depend on its neighbours.  Where the attack carries its
    `threat` and that an `epsilon` (or a threat that has one, as `Band` does), an `epsilon` of 0
    must return the image.  Attack and threat must be classes that `jax.jit` tells apart
    (`robust_ssl.struct`).  At least one image must move: an attack that does nothing keeps every
    law, and so would one that found nothing to do here.

    Args:
      attack: ``attack(key, model, image, label=None) -> image``.
      threat: Whose `project` tells what is allowed; None takes ``attack.threat``.
      model: Attacked; None takes a small one with 4 classes.
      image_size: Height and width of the made-up images, pixels.
      batch: Number of made-up images, at least 2.
      needs_label: Call the attack with a label, the model's own answer, so that an attack which
        leaves misclassified images alone has something to do; a downstream-agnostic attack never
        has one.
      seed: Of the made-up images.

    Raises:
      AssertionError: Names the attack and the law it breaks.
      ValueError: If no threat is given and the attack carries none, or labels are needed and the
        model has no logits.

    Example:
      >>> from robust_ssl import struct
      >>> @struct.dataclass
      ... class Brighter:
      ...     threat: object
      ...     def __call__(self, key, model, image, label=None):
      ...         return self.threat.project(image + 1.0, image)
      >>> class Ball:
      ...     def project(self, candidate, image):
      ...         return jnp.clip(jnp.clip(candidate, image - 0.1, image + 0.1), 0.0, 1.0)
      >>> check_attack(Brighter(Ball()))
    """
    name = _name(attack)
    threat = getattr(attack, "threat", None) if threat is None else threat
    for value in (attack, threat):
        assert "_flax_dataclass" not in vars(type(value)), (
            f"jax.jit may take {type(value).__name__} for another class of flax.struct: make it "
            "with robust_ssl.struct.dataclass, which is the same otherwise"
        )
    if threat is None:
        raise ValueError(f"{name} carries no threat: pass threat=, for example Linf(8 / 255)")
    random = np.random.default_rng(seed)
    images = jnp.asarray(random.uniform(size=(batch, image_size, image_size, 3)), jnp.float32)
    # Corners of the box: what leaves [0, 1] there is seen at once.
    images = images.at[0, 0].set(0.0).at[0, 1].set(1.0)
    model = _small_model(random, image_size) if model is None else model
    labels = _own_answers(name, model, images) if needs_label else None
    keys = jax.random.split(jax.random.key(seed), batch)

    def craft(attack, keys, images, labels):
        return jax.vmap(lambda k, x, y: attack(k, model, x, y))(keys, images, labels)

    one = attack(keys[0], model, images[0], None if labels is None else labels[0])
    assert one.shape == images[0].shape, f"{name} must return {images[0].shape}, got {one.shape}"
    assert one.dtype == images.dtype, f"{name} must return {images.dtype}, got {one.dtype}"
    adversarial = craft(attack, keys, images, labels)
    assert bool(jnp.isfinite(adversarial).all()), f"{name} returns values that are not finite"
    low, high = float(adversarial.min()), float(adversarial.max())
    assert low >= 0 and high <= 1, f"{name} leaves [0, 1]: pixels from {low:.4f} to {high:.4f}"
    allowed = jax.vmap(threat.project)(adversarial, images)
    _assert_close(adversarial, allowed, f"{name} leaves the budget of {threat}")
    assert not bool((adversarial == images).all()), (
        f"{name} moved no image, so nothing is known of the other laws: pass a model that it can "
        "attack, or give it a larger budget or more steps"
    )
    _check_repeatable(name, attack, craft, keys, images, labels, np.asarray(adversarial))
    calm = _without_budget(getattr(attack, "threat", None))
    if calm is not None:
        still = dataclasses.replace(attack, threat=calm)
        unmoved = craft(still, keys, images, labels)
        _assert_close(unmoved, images, f"{name} moves the image although epsilon is 0")


def _check_repeatable(name, attack, craft, keys, images, labels, adversarial) -> None:
    # Sign steps may differ where a gradient is zero up to rounding, so a few pixels may.
    def same(other, law, share=0.0):
        differs = float(np.mean(np.abs(np.asarray(other) - adversarial) > 1e-5))
        assert differs <= share, f"{name} {law} ({100 * differs:.1f} % of the pixels differ)"

    same(craft(attack, keys, images, labels), "gives another image for the same key")
    compiled = jax.jit(lambda *batch: craft(attack, *batch))
    together = np.asarray(compiled(keys, images, labels))
    same(together, "gives something else under jax.jit", share=0.01)
    for place in range(len(images)):
        strangers = images[:, ::-1].at[place].set(images[place])
        beside = np.asarray(compiled(keys, strangers, labels))
        differs = float(np.max(np.abs(beside[place] - together[place])))
        assert differs <= 1e-5, (
            f"{name}'s image depends on its neighbours in the batch (place {place}, {differs:.4f})"
        )


def _own_answers(name: str, model: Model, images: jax.Array) -> jax.Array:
    logits = model(images).logits
    if logits is None:
        raise ValueError(f"{name} needs labels, but the model has no logits: pass a classifier")
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _without_budget(threat: Any) -> Any:
    """Returns the threat with an epsilon of 0, its own or an inner threat's; None if none has."""
    fields = getattr(threat, "__dataclass_fields__", ())
    if "epsilon" in fields:
        return dataclasses.replace(threat, epsilon=0.0)
    inner = _without_budget(threat.threat) if "threat" in fields else None
    return None if inner is None else dataclasses.replace(threat, threat=inner)


def _small_model(random: np.random.Generator, image_size: int) -> _Bilinear:
    pixels = image_size * image_size * 3
    return _Bilinear(
        weights=jnp.asarray(random.normal(size=(pixels, 8)) / np.sqrt(pixels), jnp.float32),
        head=jnp.asarray(random.normal(size=(8, 4)), jnp.float32),
    )


def _assert_close(actual, desired, law: str) -> None:
    actual, desired = np.asarray(actual), np.asarray(desired)
    worst = float(np.max(np.abs(actual - desired), initial=0.0))
    scale = 1.0 + float(np.max(np.abs(desired), initial=0.0))
    assert worst <= 1e-5 * scale, f"{law} (by up to {worst:.2g})"


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
