"""A tiny classifier, batches for it and a run of its step; what tests of the step share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tiny import encoder as tiny_encoder

from robust_ssl import models, struct
from robust_ssl.finetuning import init_state, make_step
from robust_ssl.parallel import Parallel

KEY = jax.random.key(7)


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
    head = models.MLPHead(3, hidden=16) if head == "mlp" else head
    return models.classifier(jax.random.key(1), tiny_encoder(), 3, head=head)


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
    parallel = parallel or Parallel.create(num_devices=1, kind="jit")
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
