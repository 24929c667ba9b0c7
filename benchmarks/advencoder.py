"""Times one step of fitting AdvEncoder's generator against a ResNet-18.

    python benchmarks/advencoder.py --width 16 --json advencoder.json

Both sides start from the same float32 images, resident on the device, and make per step:

1. One forward pass of the clean images through the encoder, in evaluation mode.
2. One forward pass of the generator (16 noise vectors, width 128) to one perturbation.
3. One forward pass of the perturbed images, and the released objective: 5 InfoNCE minus the mean
   squared change plus the mean squared high-frequency change (a real FFT and back).
4. One backward pass to the pixels and on into the generator's weights; no gradient with respect to
   the encoder's weights is computed.
5. Adam (2e-4; 0.5, 0.999) on the generator.

That is 2 forward passes and 1 input gradient of the encoder per image on each side.  With
``--members n`` one fits n perturbations at once, as the package does for seeds and budgets: both
sides then share the clean pass, the torch side loops over the rest.  The package's generator writes
its transposed convolutions as matrix products of the same size.  The torch side is eager, channels
last, with the fused Adam; ``--tuned`` adds `torch.compile` and, on a GPU, bfloat16 autocast.
"""

from __future__ import annotations

import time

import harness
import numpy as np

EPSILON, LEARNING_RATE = 10 / 255, 2e-4


def data(options):
    """Returns random images, float32 ``[batch, H, W, 3]`` in [0, 1]."""
    shape = (options.batch, options.image_size, options.image_size, 3)
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def make_jax(options):
    """The package's own fit, without its start and its end."""
    parallel = harness.start_jax(options)
    import jax

    from robust_ssl import attacks, models

    encoder = models.resnet18(
        jax.random.key(0),
        width=options.width,
        stem=options.stem,
        image_size=options.image_size,
        dtype=options.dtype,
    )
    attack = attacks.AdvEncoderPER(
        learning_rate=LEARNING_RATE,
        width=options.generator_width,
        noise_vectors=options.noise_vectors,
    )
    keys, epsilons = attacks.members(range(options.members), (EPSILON,))
    batch = parallel.put({"images": data(options)})

    def run(steps):
        marks = []

        def on_step(number, value):
            if number in (0, steps):  # the first step only starts the clock
                value.block_until_ready()
                marks.append(time.perf_counter())

        attacks.fit(
            attack,
            encoder,
            [batch] * (steps + 1),
            keys=keys,
            epsilons=epsilons,
            image_shape=batch["images"].shape[1:],
            parallel=parallel,
            on_step=on_step,
        )
        return marks[1] - marks[0]

    return harness.jax_side(run, options.batch * options.members, parallel, options)


def make_torch(options, *, tuned):
    """The same step as a plain torch program."""
    import torch
    import torch_models
    from torch_losses import advencoder_released

    here = harness.Torch.start(tuned)
    encoder = torch_models.ResNet18(options.width, options.stem).eval().requires_grad_(False)
    encoder = here.compiled(here.network(encoder))
    images = here.images(data(options))

    def member():
        size, noise_vectors = options.image_size, options.noise_vectors
        generator = torch_models.Generator(size, options.generator_width, noise_vectors)
        generator = here.network(generator)
        optimizer = torch.optim.Adam(
            generator.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999), fused=True
        )
        noise = torch.randn(noise_vectors, 100, device=here.device)
        return here.compiled(generator), optimizer, noise

    members = [member() for _ in range(options.members)]

    def features(pixels):
        with here.autocast():
            return encoder(pixels).float()

    def step():
        with torch.no_grad():
            clean = features(images)
        for generator, optimizer, noise in members:
            with here.autocast():
                output = generator(noise).float()
            adversarial = (images + EPSILON * output).clamp(0, 1)
            objective = advencoder_released(clean, features(adversarial), adversarial - images)
            optimizer.zero_grad(set_to_none=True)
            (-objective).backward()
            optimizer.step()

    return here.side(step, options.batch * options.members)


def add_options(parser):
    """Adds what only this benchmark knows."""
    parser.add_argument("--members", type=int, default=1, help="perturbations fitted at once (1)")
    parser.add_argument("--generator-width", type=int, default=128, help="as released: 128")
    parser.add_argument("--noise-vectors", type=int, default=16, help="generator inputs (16)")


if __name__ == "__main__":
    harness.compare("advencoder", harness.options_of(__doc__, add_options), make_jax, make_torch)
