"""What a user might bring, in a few lines each: an encoder, images, a config around them."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import settings, struct
from robust_ssl.types import Encoder, Outputs

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SIZE = 8


class TwoConvolutions(nn.Module):
    """The smallest encoder with batch norm."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        taps = {}
        for index in (1, 2):
            x = nn.Conv(4 * index, (3, 3), (2, 2), use_bias=False, name=f"conv{index}")(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                axis_name=self.axis_name if train else None,
                name=f"norm{index}",
            )(x)
            x = taps[f"conv{index}"] = nn.relu(x)
        return jnp.mean(x, axis=(1, 2)), taps


@struct.dataclass
class TwoBlocks:
    """A linear block, then one with a bend; features are what comes out."""

    first: jax.Array  # [48, 5]
    second: jax.Array  # [5, 4]

    def __call__(self, images):
        one = images.reshape(len(images), -1) @ self.first
        two = jnp.tanh(one @ self.second)
        return Outputs(features=two, taps={"stem": images, "block1": one, "block2": two})


@functools.cache
def _variables():
    return TwoConvolutions().init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))


def encoder(key=None, image_size=SIZE):
    """The same weights whatever the key, so that nothing is compiled twice."""
    return Encoder(
        variables=_variables(),
        module=TwoConvolutions(),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=image_size,
        dim=8,
        name="tiny",
    )


def constant(key):
    """An encoder that has collapsed: the same features for every image."""
    zeros = jax.tree.map(jnp.zeros_like, _variables()["params"])
    zeros["norm2"]["bias"] = jnp.ones_like(zeros["norm2"]["bias"])
    return encoder().replace(variables={**_variables(), "params": zeros})


def images(split="train", *, n=64, size=SIZE, classes=4):
    """Noisy images whose brightness on one side tells the class, ``uint8 [n, size, size, 3]``."""
    random = np.random.default_rng([len(split), n])
    labels = np.arange(n) % classes
    pixels = random.uniform(0.0, 0.5, (n, size, size, 3))
    pixels[:, :, : size // 2] += 0.5 * (labels / (classes - 1)).reshape(n, 1, 1, 1)
    return np.rint(255 * pixels).astype(np.uint8), labels


def unlabelled(split="train", *, n=32, size=SIZE):
    """The same without labels, for an attacker."""
    return {"images": images(split + "surrogate", n=n, size=size)[0]}


def config(*stages):
    """The quickstart's config with everything small; locked, but values may be set."""
    tiny = settings.load_config(str(CONFIGS / "quickstart.py")).unlock()
    tiny.encoder = {"builder": "tiny:encoder"}
    tiny.surrogate = {"source": "tiny:unlabelled"}
    tiny.downstream = {"source": "tiny:images", "validation": 0.25}
    tiny.downstream_head = "linear"
    tiny.stages = stages or tiny.stages
    tiny.attack.num_steps = 2
    tiny.attack.batch_size = 16
    tiny.attack.methods.advencoder.width = 4
    for stage in ("usual", "finetune", "stage2"):
        tiny[stage].batch_size = 16
        tiny[stage].epochs = 2
    tiny.finetune.attack.num_steps = 2
    tiny.sensitivity.images = 16
    tiny.sensitivity.num_steps = 1
    tiny.sensitivity.top_k_fraction = 0.4
    tiny.evaluate.batch_size = 16
    tiny.evaluate.per_image.num_steps = 2
    return tiny
