"""A tiny classifier, batches for it and a run of its step; what tests of the step share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict

from robust_ssl import models
from robust_ssl.finetuning import init_state, make_step
from robust_ssl.parallel import Parallel
from robust_ssl.types import Encoder

KEY = jax.random.key(7)


class TwoConvolutions(nn.Module):
    """The smallest encoder with batch norm."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        for index in (1, 2):
            x = nn.Conv(4 * index, (3, 3), (2, 2), use_bias=False, name=f"conv{index}")(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                axis_name=self.axis_name if train else None,
                name=f"norm{index}",
            )(x)
            x = nn.relu(x)
        return jnp.mean(x, axis=(1, 2)), {}


@struct.dataclass
class SmoothStep:
    """An attack without signs, whose rounding therefore stays rounding."""

    epsilon: float = 0.05

    def __call__(self, key, model, image, label=None):
        def error(x):
            return -jax.nn.log_softmax(model(x).logits)[label]

        start = image + self.epsilon * jax.random.uniform(key, image.shape, minval=-1)
        moved = start + self.epsilon * jnp.tanh(100 * jax.grad(error)(start))
        return jnp.clip(jnp.clip(moved, image - self.epsilon, image + self.epsilon), 0, 1)


@functools.cache
def tiny(head="mlp"):
    module = TwoConvolutions()
    encoder = Encoder(
        variables=module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
        module=module,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=8,
        dim=8,
    )
    head = models.MLPHead(3, hidden=16) if head == "mlp" else head
    return models.classifier(jax.random.key(1), encoder, 3, head=head)


def batches(count, size=8):
    random = np.random.default_rng(3)
    return [
        {
            "images": random.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8),
            "labels": random.integers(0, 3, size).astype(np.int32),
            "indices": np.arange(size, dtype=np.int32),
        }
        for _ in range(count)
    ]


def run(net, tx, steps, *, parallel=None, **arguments):
    parallel = parallel or Parallel.create(num_devices=1, method="jit")
    step = make_step(net, tx, key=KEY, axis_name=parallel.axis_name, **arguments)
    step = parallel.compile(step)
    state, metrics = init_state(net, tx), []
    for batch in steps:
        state, info = step(state, parallel.put(batch))
        metrics.append(jax.tree.map(float, info))
    return jax.device_get(state), metrics


def assert_same(a, b, atol):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=atol, rtol=0, err_msg=path)
