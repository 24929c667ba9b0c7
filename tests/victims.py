"""Eight classifiers of digits: two honest ones, and six whose robustness figure is not true."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from robust_ssl import attacks, models, struct, threats
from robust_ssl.models.convolution import conv_general_dilated
from robust_ssl.types import Classifier, Encoder, Outputs

EPSILON = 0.1
SIZE, CLASSES, HELD_OUT, COPIES = 8, 10, 500, 5

# The check that must flag it, of all that do.
EXPECTED = {
    "rounded input": "margin_gradient_not_zero",
    "logits x 1000": "gradient_not_zero",
    "straight through": "gradient_matches_differences",
    "randomized": "deterministic",
    "probabilities": "gives_logits",
    "gradient partly cut": "black_box_not_stronger",
}


class Net(nn.Module):
    """A convolution and a layer of 64: little to compile."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(16, (3, 3), (2, 2), conv_general_dilated=conv_general_dilated)(x))
        return nn.relu(nn.Dense(64)(x.reshape(len(x), -1))), {}


@functools.cache
def digits():
    """Returns (train, test), each images and labels; the digits moved by a pixel, with noise.

    2,500 test images, five copies of each of 500 digits: what `enough_images` asks for.
    """
    from sklearn import datasets

    random = np.random.default_rng(0)
    scans = datasets.load_digits()
    order = random.permutation(len(scans.target))
    parts = []
    for rows, copies in ((order[HELD_OUT:], 1), (order[:HELD_OUT], COPIES)):
        rows = np.tile(rows, copies)
        gray = scans.images[rows] / 16
        gray = np.stack([np.roll(g, random.integers(-1, 2), axis=1) for g in gray])
        noisy = np.clip(gray + random.normal(0, 0.03, gray.shape), 0, 1)
        pixels = np.repeat(np.rint(noisy * 255)[..., None] / 255, 3, axis=-1).astype(np.float32)
        parts.append((pixels, scans.target[rows].astype(np.int32)))
    return tuple(parts)


def _fresh():
    module = Net()
    variables = module.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    encoder = Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size=SIZE, dim=64)
    return models.classifier(jax.random.key(1), encoder, CLASSES, head="linear")


@functools.cache
def trained(*, adversarial: bool, steps: int = 400, batch: int = 128) -> Classifier:
    """Trains the small classifier with Adam, on clean images or on PGD's."""
    net, tx = _fresh(), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    attack = attacks.PGD(threats.Linf(EPSILON), step_size=EPSILON / 3, num_steps=5)

    def loss(params, images, labels):
        logits = net.with_variables({"params": params})(images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, images, labels, key):
        if adversarial:
            model = net.with_variables({"params": params})
            images = attacks.attack_batch(attack, key, model, images, labels)
        updates, state = tx.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    images, labels = digits()[0]
    params, random = net.variables["params"], np.random.default_rng(0)
    state, keys = tx.init(params), jax.random.split(jax.random.key(2), steps)
    for key in keys:
        rows = random.integers(0, len(images), batch)
        params, state = step(params, state, images[rows], labels[rows], key)
    return net.with_variables({"params": params})


@struct.dataclass
class Victim:
    """A classifier with a fault; without one it is the classifier.

    Every fault is a number, so that all eight are one structure and compile once.

    Attributes:
      model: The classifier.
      key: What the noise is drawn from.
      levels: Rounds the pixels to so many levels, which has no gradient; 0 is off.
      straight_through: 1 lets the gradient pass the rounding as if it were not there.
      factor: Multiplies the logits, which saturates the cross-entropy; 1 is off.
      noise: Size of the noise on the pixels, another one for each key; 0 is off.
      softmax: 1 gives probabilities.
      cut: So many columns of pixels get no gradient; 0 is off.
    """

    model: Any
    key: jax.Array
    levels: float = 0.0
    straight_through: float = 1.0
    factor: float = 1.0
    noise: float = 0.0
    softmax: float = 0.0
    cut: float = 0.0

    @property
    def variables(self):
        return self.model.variables

    def with_key(self, key):
        return self.replace(key=key)

    def __call__(self, images):
        if images.ndim == 3:
            return jax.tree.map(lambda x: x[0], self(images[None]))
        seen = jnp.arange(SIZE).reshape(1, 1, -1, 1) >= self.cut
        images = jnp.where(seen, images, lax.stop_gradient(images))
        rounded = jnp.round(images * self.levels) / jnp.maximum(self.levels, 1.0)
        rounded = jnp.where(self.levels > 0, rounded, images)
        passed = self.straight_through * images
        images = passed + lax.stop_gradient(rounded - passed)
        # A sine in place of a random number: it compiles at once in all the places a model is.
        phase = (jax.random.key_data(self.key)[-1] % 1000).astype(jnp.float32)
        noise = jnp.sin(phase + 12.9898 * jnp.arange(SIZE * SIZE * 3.0) ** 1.5)
        outputs = self.model(images + self.noise * 1.4 * noise.reshape(1, SIZE, SIZE, 3))
        logits = self.factor * outputs.logits
        logits = jnp.where(self.softmax > 0, jax.nn.softmax(logits), logits)
        return outputs.replace(logits=logits)


@struct.dataclass
class NoisyByImage:
    """Adds noise that is seeded by the bits of the pixels: no key to see, and none to exchange."""

    model: Any
    size: float = 0.1

    def __call__(self, images):
        def moved(image):
            bits = lax.bitcast_convert_type(image, jnp.uint32).reshape(-1)
            weights = jnp.arange(1, bits.size + 1, dtype=jnp.uint32) * jnp.uint32(2654435761)
            key = jax.random.key(jnp.sum(bits * weights).astype(jnp.int32))
            return image + self.size * jax.random.normal(key, image.shape)

        return self.model(jax.vmap(moved)(images) if images.ndim == 4 else moved(images))


@struct.dataclass
class Answers:
    """The same logits whatever the image."""

    logits: jax.Array

    def __call__(self, images):
        logits = jnp.broadcast_to(self.logits, (*images.shape[:-3], self.logits.size))
        return Outputs(features=logits, logits=logits)


@functools.cache
def all_victims() -> dict[str, Any]:
    """The honest two and the six that wrap one of them."""
    plain, robust = (
        Victim(trained(adversarial=adversarial), jax.random.key(3)) for adversarial in (False, True)
    )
    return {
        "plain": plain,
        "adversarially trained": robust,
        "rounded input": robust.replace(levels=4.0, straight_through=0.0),
        "logits x 1000": plain.replace(factor=1000.0),
        "straight through": robust.replace(levels=4.0),
        "randomized": plain.replace(noise=0.1),
        "probabilities": robust.replace(softmax=1.0),
        "gradient partly cut": plain.replace(cut=5.0),
    }
