"""How much robustness hangs on each layer's weights, and which layers may be moved freely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robust_ssl.losses import clean_cross_entropy
from robust_ssl.optimizers.layerwise import FREEZE, Rate, match_paths
from robust_ssl.parallel import Parallel, average
from robust_ssl.types import Classifier, LossInputs


def layer_sensitivity(
    classifier: Classifier,
    adversarial_images: jax.Array,
    labels: jax.Array,
    *,
    num_steps: int = 10,  # RiFT, released code: ten epochs
    learning_rate: float = 1.0,  # the same
    radius: float = 0.1,  # the same
    layers: Iterable[str] | None = None,
    parallel: Parallel | None = None,
) -> dict[str, float]:
    r"""Measures how much robustness the worst small change of one layer's kernel costs.

    .. math::
        s_l = \max_{\|\Delta\|_F \le r \|W_l\|_F} L(W_l + \Delta) - L(W_l)

    `L` is the mean cross-entropy of the adversarial images, which were crafted once, against the
    unchanged weights.  The maximum is sought by gradient ascent on that kernel alone, projected to
    the ball after every step.  0 means robust-redundant: the layer can be moved without harm.

    All layers share one compiled step, and its first one is shared by all layers, so the cost is
    ``1 + layers * (num_steps - 1)`` evaluations of loss and gradient, and one of the loss a layer.

    Args:
      classifier: In evaluation mode; its weights are not changed.
      adversarial_images: Pixels, float ``[batch, H, W, 3]``, of a held-out part of the downstream
        training data, already attacked.
      labels: int32 ``[batch]``.
      num_steps: Ascent steps per layer.
      learning_rate: Of plain gradient ascent.
      radius: Of the ball, as a share of the kernel's Frobenius norm.
      layers: Paths or patterns of kernels; None takes every convolution and dense layer.
      parallel: Spreads the images over devices; None uses the first device.

    Returns:
      Path of each kernel to its score, at least 0, in nats, in the order of the parameters.

    Raises:
      ValueError: If a pattern matches nothing, or `num_steps` or `radius` is not positive.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> images, labels = jnp.full((2, 8, 8, 3), 0.5), jnp.array([0, 1])
      >>> list(layer_sensitivity(net, images, labels, num_steps=1, layers=["head/**"]))
      ['head/linear/kernel']

    References:
      Zhu et al., "Improving Generalization of Adversarial Training via Robust Critical
      Fine-Tuning", ICCV 2023, module robust criticality.
    """
    if num_steps < 1 or radius <= 0:
        raise ValueError(f"num_steps and radius must be positive, got {num_steps} and {radius}")
    parallel = Parallel.create(num_devices=1, kind="jit") if parallel is None else parallel
    original = classifier.variables["params"]
    paths = list(flatten_dict(original, sep="/"))
    selected = kernels(original, layers)
    measure, ascend = _compile(classifier, parallel, learning_rate, radius)
    batch = parallel.put(_filled(adversarial_images, labels, len(parallel.devices)))

    others = {name: value for name, value in classifier.variables.items() if name != "params"}
    # With no layer chosen nothing moves: the base loss, and the first gradient of every layer.
    nothing = dict.fromkeys(paths, np.zeros((), np.float32))
    zero = jax.tree.map(jnp.zeros_like, original)
    fixed = {"mask": nothing, "original": original, "others": others}
    # Where results lie, so that the first step is the program of the later ones.
    state = parallel.replicate({**fixed, "params": original, "gradient": zero})
    start, base = ascend(state, batch)
    curves = {}
    for path in selected:
        mask = parallel.replicate(nothing | {path: np.ones((), np.float32)})
        ascent, losses = start | {"mask": mask}, []
        for _ in range(num_steps - 1):
            ascent, loss = ascend(ascent, batch)
            losses.append(loss)
        # After the last step nobody needs a gradient.
        curves[path] = [*losses, measure(ascent, batch)[1]]
    # One transfer at the end: the devices do not wait for the host between layers.
    curves, base = jax.device_get((curves, base))
    broken = [path for path, losses in curves.items() if not np.isfinite([*losses, base]).all()]
    if broken:  # 0 would call them the least sensitive
        raise ValueError(
            f"the loss is not finite at {', '.join(broken[:3])}; look at the attacked images, the "
            "labels (0 to classes - 1) and the weights"
        )
    # The best point of the ascent: a step may overshoot, and the unmoved kernel is in the ball.
    return {path: max(0.0, float(max(losses) - base)) for path, losses in curves.items()}


def select_redundant(
    scores: Mapping[str, float], *, top_k: int | None = None, top_k_fraction: float | None = None
) -> list[str]:
    """Returns the least sensitive layers, the least sensitive one first.

    Args:
      scores: As `layer_sensitivity` returns them.
      top_k: How many layers; or
      top_k_fraction: which share of them, in (0, 1], rounded down (the released code has 0.2).

    Returns:
      Paths; layers of equal score in the order of `scores`.

    Raises:
      ValueError: If not exactly one of the two is given, or it asks for no layer or too many.

    Example:
      >>> select_redundant({"a": 0.3, "b": 0.1, "c": 0.2}, top_k=2)
      ['b', 'c']
    """
    if (top_k is None) == (top_k_fraction is None):
        raise ValueError(
            f"give exactly one of top_k and top_k_fraction, got {top_k} and {top_k_fraction}"
        )
    count = int(top_k_fraction * len(scores)) if top_k is None else top_k
    if not 1 <= count <= len(scores):
        given = f"top_k={top_k}" if top_k is not None else f"top_k_fraction={top_k_fraction}"
        raise ValueError(f"{given} selects {count} of {len(scores)} layers; at least one must move")
    return sorted(scores, key=scores.get)[:count]


def rates_for(selected: Sequence[str], rate: float) -> dict[str, Rate]:
    """Returns the rules that free exactly these kernels and freeze everything else.

    Example:
      >>> rates_for(["head/output/kernel"], 1e-3)
      {'**': 'freeze', 'head/output/kernel': 0.001}
    """
    return {"**": FREEZE, **dict.fromkeys(selected, rate)}


def kernels(params: Mapping[str, Any], patterns: Iterable[str] | None = None) -> list[str]:
    """Returns the paths of the convolution and dense kernels, all or those that patterns match.

    Example:
      >>> kernels({"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
      ['head/kernel']
    """
    flat = flatten_dict(params, sep="/")
    kernels = [path for path, x in flat.items() if path.endswith("kernel") and x.ndim >= 2]
    if patterns is None:
        return kernels
    matches: set[str] = set()
    for pattern in patterns:
        matches.update(match_paths(kernels, pattern))
    return [path for path in kernels if path in matches]


def _compile(classifier: Classifier, parallel: Parallel, learning_rate: float, radius: float):
    """Returns compiled ``(state, batch) -> (state, loss)``: loss only, and with the gradient.

    Which layer moves is an argument (a mask), so that one compilation serves all layers.
    """

    def robust_loss(params, others, batch):
        model = classifier.with_variables({**others, "params": params})
        outputs = model(batch["images"])
        losses = clean_cross_entropy(LossInputs(labels=batch["labels"], clean=outputs))
        return jnp.mean(batch["weights"] * losses)

    def move(state):
        params, gradient, original = (
            flatten_dict(state[name], sep="/") for name in ("params", "gradient", "original")
        )
        for path, mask in state["mask"].items():
            ascended = params[path] + learning_rate * mask * gradient[path]
            params[path] = _into_ball(ascended, original[path], radius)
        return unflatten_dict(params, sep="/")

    def measure(state, batch):
        params = move(state)
        return params, average(robust_loss(params, state["others"], batch), parallel.axis_name)

    def ascend(state, batch):
        params = move(state)
        loss, gradient = jax.value_and_grad(robust_loss)(params, state["others"], batch)
        loss, gradient = average((loss, gradient), parallel.axis_name)
        return state | {"params": params, "gradient": gradient}, loss

    return parallel.compile(measure), parallel.compile(ascend)


def _filled(images: Any, labels: Any, devices: int) -> dict[str, np.ndarray]:
    """Fills a batch up until it divides over the devices; what was added has no weight."""
    images, labels = np.asarray(images), np.asarray(labels)
    count = len(images)
    more = -count % devices
    weights = np.full(count, (count + more) / count, np.float32)  # the mean is over all rows
    return {
        "images": np.concatenate([images, np.repeat(images[:1], more, axis=0)]),
        "labels": np.concatenate([labels, np.repeat(labels[:1], more)]),
        "weights": np.concatenate([weights, np.zeros(more, np.float32)]),
    }


def _into_ball(x: jax.Array, center: jax.Array, radius: float) -> jax.Array:
    delta = x - center
    length = jnp.linalg.norm(delta.reshape(-1))
    limit = radius * jnp.linalg.norm(center.reshape(-1))
    inside = length <= limit
    return jnp.where(inside, x, center + delta * (limit / jnp.where(inside, 1.0, length)))
