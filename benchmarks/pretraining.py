"""Times one step of SimCLR pre-training of a ResNet-18, augmentation included.

    python benchmarks/pretraining.py --width 16 --json pretraining.json

Both sides start from the same uint8 images, resident on the device, and make per step:

1. Two random views of each image: resized crop (bilinear), flip, color jitter (brightness,
   contrast, saturation, hue), sometimes gray; every image draws its own numbers.
2. One forward pass of both views together (2 x batch) in training mode and through the projector
   (hidden 1024, 128 projections), and NT-Xent at temperature 0.2.
3. One backward pass to all weights, and AdamW (1e-3, decay 1e-4).

That is 2 forward passes and 2 parameter gradients per image on each side.  The torch side augments
the whole batch at once on the device in plain torch (`affine_grid` and `grid_sample`, batched
color operations); it is eager, channels last, with the fused AdamW; ``--tuned`` adds
`torch.compile` of network and augmentation and, on a GPU, bfloat16 autocast.
"""

from __future__ import annotations

import harness
import numpy as np

HIDDEN, PROJECTIONS, TEMPERATURE = 1024, 128, 0.2
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4


def data(options):
    """Returns random images, uint8 ``[batch, H, W, 3]``."""
    shape = (options.batch, options.image_size, options.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_jax(options):
    """The package's own step."""
    parallel = harness.start_jax(options)
    import jax
    import optax

    from robust_ssl import models, pretraining

    encoder = models.resnet18(
        jax.random.key(0),
        width=options.width,
        stem=options.stem,
        image_size=options.image_size,
        dtype=options.dtype,
    )
    method = _unblurred()(temperature=TEMPERATURE, hidden=HIDDEN, projection_dim=PROJECTIONS)
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    step = pretraining.make_step(
        encoder,
        method,
        tx,
        key=jax.random.key(2),
        total_steps=1000,
        steps_per_epoch=100,
        axis_name=parallel.axis_name,
    )
    indices = np.arange(options.batch, dtype=np.int32)
    batch = parallel.put({"images": data(options), "indices": indices, "rows": indices})
    state = pretraining.init_state(jax.random.key(1), encoder, method, tx, num_images=options.batch)
    run = harness.jax_loop(parallel.compile(step), parallel.replicate(state), batch)
    return harness.jax_side(run, options.batch, parallel, options)


def _unblurred():
    """SimCLR with the views of the torch side: crop, flip, colors and gray."""
    from robust_ssl import pretraining, struct

    @struct.dataclass
    class Unblurred(pretraining.SimCLR):
        def views(self, key, image):
            return pretraining.random_views(key, image, (pretraining.View(),) * 2)

    return Unblurred


def make_torch(options, *, tuned):
    """The same step as a plain torch program."""
    import torch
    import torch_models
    from torch_augmentation import simclr_view
    from torch_losses import nt_xent

    here = harness.Torch.start(tuned)
    encoder = torch_models.ResNet18(options.width, options.stem)
    projector = torch_models.Projector(encoder.dim, HIDDEN, PROJECTIONS)
    model = here.network(torch.nn.Sequential(encoder, projector)).train()
    compiled, view = here.compiled(model), here.compiled(simclr_view)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    stored = here.images(data(options))

    def step():
        images = stored.float() / 255
        views = torch.cat([view(images), view(images)])
        views = views.contiguous(memory_format=torch.channels_last)
        with here.autocast():
            projections = compiled(views).float()
        loss = nt_xent(*projections.chunk(2), temperature=TEMPERATURE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return here.side(step, options.batch)


if __name__ == "__main__":
    harness.compare("pretraining", harness.options_of(__doc__), make_jax, make_torch)
