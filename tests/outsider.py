"""What a user brings of every kind, a few lines each, without a word of devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tiny

from robust_ssl import struct
from robust_ssl.attacks import random_delta
from robust_ssl.types import Encoder


def focal(inputs, gamma=2.0):
    """A loss."""
    right = jnp.take_along_axis(
        jax.nn.softmax(inputs.adversarial.logits), inputs.labels[:, None], axis=1
    )[:, 0]
    return -((1 - right) ** gamma) * jnp.log(right + 1e-6)


def towards_zero(inputs):
    """An objective."""
    return -jnp.mean(jnp.sum(inputs.adversarial.features**2, axis=-1))


@struct.dataclass
class OneStep:
    """An attack on single images."""

    threat: object
    gradient_evaluations: int = struct.field(pytree_node=False, default=1)

    def __call__(self, key, model, image, label=None):
        def loss(x):
            logits = model(x).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)

        moved = image + self.threat.epsilon * self.threat.steepest(jax.grad(loss)(image))
        return self.threat.project(moved, image)


@struct.dataclass
class Ascent:
    """A universal attack."""

    step_size: float = 0.01
    objective: object = struct.field(pytree_node=False, default=towards_zero)

    def init(self, key, image_shape, threat):
        return random_delta(key, image_shape, threat)

    def step(self, state, threat, batch):
        value, gradient = batch.value_and_grad(self.objective, state)
        return batch.project(state + self.step_size * batch.steepest(gradient)), value

    def delta(self, state, threat):
        return state


@struct.dataclass
class OneChannel:
    """A threat: an L-infinity ball in one channel."""

    epsilon: jax.Array
    channel: int = struct.field(pytree_node=False, default=0)

    @property
    def mask(self):
        return jnp.arange(3) == self.channel

    def sample(self, key, image):
        noise = jax.random.uniform(key, image.shape, minval=-1.0, maxval=1.0)
        return self.project(image + self.epsilon * noise, image)

    def project(self, candidate, image):
        change = jnp.clip(candidate - image, -self.epsilon, self.epsilon) * self.mask.reshape(
            (1,) * (image.ndim - 1) + (3,)
        )
        return jnp.clip(image + change, 0.0, 1.0)

    def steepest(self, gradient):
        return jnp.sign(gradient)


class OneConvolution(nn.Module):
    """A network."""

    width: int = 6
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3), (2, 2), name="conv")(x))
        return jnp.mean(x, axis=(1, 2)), {"block1": x}


def encoder(key, width=6):
    """An encoder builder."""
    module = OneConvolution(width)
    return Encoder(
        variables=module.init(key, jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3))),
        module=module,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=tiny.SIZE,
        dim=width,
        name="one convolution",
    )


class Cosines(nn.Module):
    """A head."""

    num_classes: int

    @nn.compact
    def __call__(self, features, *, train=False):
        unit = features / (1e-6 + jnp.linalg.norm(features, axis=-1, keepdims=True))
        return nn.Dense(self.num_classes, use_bias=False, name="directions")(unit)


def darker(key, image):
    """An augmentation."""
    return image * jax.random.uniform(key, (), minval=0.8, maxval=1.0)


@struct.dataclass
class Dim:
    """An input transformation."""

    share: float = struct.field(pytree_node=False, default=0.9)

    def __call__(self, images):
        return self.share * images


def everything(epsilon=0.05):
    """A recipe of all of it."""
    here = "outsider:"
    return {
        "head": f"{here}Cosines",
        "losses": {"focal": {"function": f"{here}focal", "weight": 0.5, "gamma": 1.0}},
        "attack": {
            "function": "robust_ssl.attacks:PGD",
            "threat": {"function": f"{here}OneChannel", "channel": 1},
            "epsilon": epsilon,
            "num_steps": 1,
        },
        "batch_statistics": "adversarial",
        "augment": f"{here}darker",
        "preprocess": {"function": f"{here}Dim", "share": 0.95},
    }
