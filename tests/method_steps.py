"""Runs a pre-training method for a few steps on the tiny encoder, on any layout of devices."""

import functools

import jax
import jax.numpy as jnp
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


def noisy_views(method, key, image):
    """Views that compile in no time: noise, and every other pixel for the small ones."""
    noise = 0.1 * jax.random.normal(key, (2, *image.shape))
    local = getattr(method, "local_crops", 0)
    return (*(jnp.clip(image + noise[i], 0, 1) for i in range(2)), *(image[::2, ::2],) * local)


def plain(method):
    """The same method with `noisy_views`."""
    return _plain(type(method))(**vars(method))


@functools.cache
def _plain(kind):
    return type("Plain", (kind,), {"views": noisy_views})


def plain_simclr():
    """For a config."""
    return plain(pretraining.SimCLR(hidden=16, projection_dim=8))


@functools.cache
def run(
    method,
    *,
    num_steps=NUM_STEPS,
    num_devices=1,
    layout="pmap",
    learning_rate=0.1,
    optimized=False,
):
    """Returns the states before and after each step, and each step's metrics.

    `optimized` programs take longer to compile and round sums less.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before and not optimized)
    try:
        return _run(method, num_steps, num_devices, layout, learning_rate)
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _run(method, num_steps, num_devices, layout, learning_rate):
    encoder, tx = tiny.encoder(), optax.sgd(learning_rate, momentum=0.9)
    parallel = Parallel.create(num_devices=num_devices, kind=layout)
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


def assert_devices_do_not_matter(method, *, layout="pmap", **options):
    """Two steps on four devices are two steps on one."""
    one, four = (
        run(plain(method), num_steps=2, num_devices=devices, layout=layout, **options)
        for devices in (1, 4)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5),
        four,
        one,
    )


def trained(state):
    """The encoder of a state."""
    return pretraining.trained_encoder(tiny.encoder(), state.variables)


@functools.cache
def _features_of():
    """Compiled once: features of 64 images and of two random views of each."""
    pixels = tiny.images("test", n=64)[0].astype(np.float32) / 255
    keys = jax.random.split(jax.random.key(7), (2, 64))
    make = jax.vmap(jax.vmap(pretraining.View(min_scale=0.2)), (0, None))
    views = jax.jit(make)(keys, pixels)
    everything = np.concatenate([pixels, *np.asarray(views)])
    forward = jax.jit(lambda encoder: encoder(everything).features)
    return lambda encoder: np.split(np.asarray(forward(encoder)), 3)


def agreement_and_spread(state):
    """How much more alike an image's two views are than two images', and `feature_std`."""
    clean, first, second = _features_of()(trained(state))
    both = np.concatenate([first, second])
    both = both - both.mean(axis=0, keepdims=True)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    cosines = both[:64] @ both[64:].T
    return np.diag(cosines).mean() - cosines.mean(), float(pretraining.feature_std(clean))
