"""What a user might bring, in a few lines each: an encoder, images, a config around them."""

import contextlib
import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, settings, struct
from robust_ssl.types import Encoder, Outputs

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SIZE = 8
STEP = {"step_size": 2 / 255}
# Options of universal attacks by which a fit is over soon.
QUICK = {
    "step_size": 0.02,
    "fine_step_size": 0.005,
    "learning_rate": 0.01,
    "num_steps": 2,
    "width": 4,
    "noise_vectors": 2,
    "num_clusters": 3,
}


def quick_attack(name):
    """A universal attack of the package by its name, small and short."""
    kind = getattr(attacks, name)
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{option: value for option, value in QUICK.items() if option in fields})


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
    with jax.ensure_compile_time_eval():  # whoever asks first may be tracing
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
    tiny = settings.load_config(f"{CONFIGS / 'quickstart.py'}:size=full").unlock()
    tiny.encoder = {"function": "tiny:encoder"}
    tiny.surrogate = {"function": "tiny:unlabelled"}
    tiny.downstream = {"function": "tiny:images", "validation": 0.25}
    tiny.stages = stages or tiny.stages
    tiny.suite.update(num_steps=2, batch_size=16)
    tiny.suite.attacks.advencoder.width = 4
    tiny.common = {"epochs": 2, "batch_size": 16, "head": "linear"}
    validation = {**tiny.training.validation, "num_steps": 2, "keep_best": False}
    tiny.training = {"validation": validation, "batch_size": 16}
    tiny.recipes.gen_af_stage1.num_steps = 2
    tiny.recipes.gen_af = {
        "function": "robust_ssl.recipes:gen_af",
        "select": {"images": 16, "num_steps": 1, "layers": 0.4},
        "tolerance": 0.02,
    }
    tiny.scoring = {
        "batch_size": 16,
        "per_image": {
            "attacks": {
                name: {"function": f"robust_ssl.attacks:{attack}", "num_steps": 2, **STEP}
                for name, attack in (("embed", "EmbedAttack"), ("pgd", "PGD"))
            }
        },
    }
    tiny.compare = {**tiny.compare, "rounds": 1, "steps_per_round": 1, "memory": False}
    return tiny


@functools.cache
def _listening() -> list:
    """The names of all programs that are compiled, or read from a cache, from now on."""
    names: list = []

    def listen(event, seconds, **more):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(more.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


@contextlib.contextmanager
def programs():
    """Gives the list of the names of all programs that are compiled inside the block."""
    names, inside = _listening(), []
    first = len(names)
    yield inside
    inside += names[first:]
