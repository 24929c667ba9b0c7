"""Times one step of secure fine-tuning: Gen-AF's first stage with PGD-10.

    python benchmarks/secure_finetuning.py --width 16 --json secure_finetuning.json
    python benchmarks/secure_finetuning.py --network vit_small --image-size 224 --batch 8

The network is a ResNet-18 of `--width` and `--stem`, or one of full size with timm's on the other
side: a ResNet-50 or a ViT-S with patches of 16 pixels.

Both sides start from the same uint8 images, resident on the device, and make per step:

1. PGD: a random start and 10 gradients of the cross-entropy with respect to the pixels, in
   evaluation mode; no gradient with respect to the weights is computed.
2. One forward pass on the clean and one on the adversarial images in training mode, each with its
   own batch statistics.
3. The loss 0.3 CE(clean) + 0.7 CE(adversarial) + genetic regularization of the logits, and one
   backward pass through both to all weights.
4. Adam with L2 (8e-4): rate 1e-3 for the encoder, 5e-3 for the head (Gen-AF's MLP, dropout 0.2).

That is 12 forward passes, 10 input gradients and 2 parameter gradients per image on each side.  The
package besides counts accuracies, averages over devices, and looks at every new weight for NaN.
The torch side is eager, channels last, with the fused Adam; ``--tuned`` adds `torch.compile` and,
on a GPU, bfloat16 autocast.
"""

from __future__ import annotations

import harness
import numpy as np

CLASSES, EPSILON, STEP_SIZE, NUM_STEPS = 10, 8 / 255, 2 / 255, 10
ADV_RATIO, REGULARIZATION, WEIGHT_DECAY = 0.7, 1.0, 8e-4
ENCODER_RATE, HEAD_RATE = 1e-3, 5e-3
TIMM = {"resnet50": "resnet50", "vit_small": "vit_small_patch16_224"}  # by our name


def data(options):
    """Returns random images, uint8 ``[batch, H, W, 3]``, and labels."""
    rng = np.random.default_rng(0)
    shape = (options.batch, options.image_size, options.image_size, 3)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, CLASSES, options.batch, np.int32)


def add_network(parser):
    """Adds the option that names the network."""
    networks = ("resnet18", *TIMM)
    parser.add_argument("--network", default="resnet18", choices=networks)


def own_encoder(options):
    """Returns the encoder of the JAX side."""
    import jax

    from robust_ssl import models

    own = {
        "resnet18": {"width": options.width, "stem": options.stem},
        "resnet50": {"stem": "imagenet"},
        "vit_small": {"patch_size": 16},
    }[options.network]
    build = getattr(models, options.network)
    size = {"image_size": options.image_size, "dtype": options.dtype}
    return build(jax.random.key(0), **size, **own)


def torch_encoder(options):
    """Returns the encoder of the torch side, a module, and its number of features."""
    import torch
    import torch_models

    if options.network == "resnet18":
        encoder = torch_models.ResNet18(options.width, options.stem)
        return encoder, encoder.dim
    import timm

    size = {"img_size": options.image_size} if options.network.startswith("vit") else {}
    network = timm.create_model(TIMM[options.network], num_classes=0, **size)
    return torch.nn.Sequential(torch_models.Normalize(), network), network.num_features


def make_jax(options):
    """The package's own step, as its `stage1` builds it."""
    parallel = harness.start_jax(options)
    import jax

    from robust_ssl import finetuning, models, optimizers, threats
    from robust_ssl.attacks import PGD

    encoder = own_encoder(options)
    classifier = models.classifier(jax.random.key(1), encoder, CLASSES)
    params = classifier.variables["params"]
    rates = optimizers.layer_rates(params, {"encoder/**": ENCODER_RATE, "head/**": HEAD_RATE})
    tx = optimizers.layerwise_optimizer(params, rates)  # Adam with L2, 8e-4
    step = finetuning.make_step(
        classifier,
        tx,
        losses=finetuning.mixed_losses(ADV_RATIO, REGULARIZATION),
        key=jax.random.key(2),
        attack=PGD(
            threats.Linf(EPSILON), step_size=STEP_SIZE, num_steps=NUM_STEPS, keep_best=False
        ),
        batch_statistics="both",
        axis_name=parallel.axis_name,
    )
    images, labels = data(options)
    indices = np.arange(options.batch, dtype=np.int32)
    batch = parallel.put({"images": images, "labels": labels, "indices": indices})
    state = parallel.replicate(finetuning.init_state(classifier, tx))
    run = harness.jax_loop(parallel.compile(step), state, batch)
    return harness.jax_side(run, options.batch, parallel, options)


def make_torch(options, *, tuned):
    """The same step as a plain torch program."""
    import torch
    import torch_models
    from torch.nn import functional
    from torch_losses import genetic_regularization

    here = harness.Torch.start(tuned)
    encoder, dim = torch_encoder(options)
    head = torch_models.MLPHead(dim, CLASSES)
    model = here.network(torch.nn.Sequential(encoder, head))
    compiled = here.compiled(model)
    optimizer = torch.optim.Adam(
        [
            {"params": encoder.parameters(), "lr": ENCODER_RATE},
            {"params": head.parameters(), "lr": HEAD_RATE},
        ],
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    stored, labels = data(options)
    stored, labels = here.images(stored), torch.from_numpy(labels).long().to(here.device)

    def logits(images):
        with here.autocast():
            return compiled(images).float()

    def pgd(images):
        adversarial = images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)
        adversarial = adversarial.clamp_(0, 1)
        for _ in range(NUM_STEPS):
            adversarial.requires_grad_()
            loss = functional.cross_entropy(logits(adversarial), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            with torch.no_grad():
                moved = adversarial + STEP_SIZE * gradient.sign()
                moved = torch.clamp(moved, images - EPSILON, images + EPSILON)
                adversarial = moved.clamp_(0, 1)
        return adversarial

    def step():
        images = stored.float() / 255
        model.eval().requires_grad_(False)
        adversarial = pgd(images)
        model.train().requires_grad_(True)
        clean, attacked = logits(images), logits(adversarial)
        loss = (
            (1 - ADV_RATIO) * functional.cross_entropy(clean, labels)
            + ADV_RATIO * functional.cross_entropy(attacked, labels)
            + REGULARIZATION * genetic_regularization(clean, attacked, labels)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return here.side(step, options.batch)


if __name__ == "__main__":
    harness.compare(
        "secure_finetuning", harness.options_of(__doc__, add_network), make_jax, make_torch
    )
