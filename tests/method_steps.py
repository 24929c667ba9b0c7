"""Runs a pre-training method for a few steps on the tiny encoder, on any layout of devices."""

import functools

import jax
import numpy as np
import optax
import tiny

from robust_ssl import pretraining
from robust_ssl.parallel import Parallel

NUM_STEPS = 30
IMAGES, LABELS = tiny.images(n=8)
BATCH = {
    "images": IMAGES,
    "labels": LABELS.astype(np.int32),
    "indices": np.arange(8, dtype=np.int32),
    "rows": np.arange(8, dtype=np.int32),
}


@functools.cache
def run(method, *, num_steps=NUM_STEPS, num_devices=1, layout="pmap"):
    """Returns the states before and after each step, and each step's metrics."""
    encoder, tx = tiny.encoder(), optax.sgd(0.05, momentum=0.9)
    parallel = Parallel.create(num_devices=num_devices, method=layout)
    step = parallel.compile(
        pretraining.make_step(
            encoder,
            method,
            tx,
            key=jax.random.key(2),
            total_steps=NUM_STEPS,
            steps_per_epoch=1,
            axis_name=parallel.axis_name,
        )
    )
    state = pretraining.init_state(jax.random.key(1), encoder, method, tx, num_images=8)
    states, metrics = [jax.device_get(state)], []
    state = parallel.replicate(state)
    for _ in range(num_steps):
        state, now = step(state, parallel.put(BATCH))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(now))
    return states, metrics


def assert_devices_do_not_matter(method, *, layout="pmap"):
    """Two steps on four devices are the first two steps on one."""
    ours = run(method, num_steps=2, num_devices=4, layout=layout)
    states, metrics = run(method)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        ours,
        (states[:3], metrics[:2]),
    )
