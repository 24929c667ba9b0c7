"""What attacks do to a classifier, image by image, over a whole split.

A short last batch weighs what it holds, adversarial images are scored as a file would hold them,
and the worst case over several attacks is taken image by image.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import threats
from robust_ssl.attacks.apgd import draw
from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.evaluation.counts import PerImage, worst_case
from robust_ssl.keys import check_key
from robust_ssl.pixels import check_images
from robust_ssl.types import Attack, Classifier

WORST = "worst"  # the name of the worst case per image over all attacks
NO_ANSWER = -1  # the prediction of a model whose logits are NaN: never correct
_ANSWERS = 2**31 - 1  # key number of a randomized model's answers; no attack has it


def to_pixels(images: jax.Array | np.ndarray) -> jax.Array:
    """Turns 8-bit images into float32 pixels in [0, 1]; float images pass unchanged.

    Example:
      >>> to_pixels(np.array([0, 255], np.uint8)).tolist()
      [0.0, 1.0]
    """
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def quantize(images: jax.Array) -> jax.Array:
    """Clips to [0, 1] and rounds to 8 bits: the image as a file would hold it.

    A pixel value moves by at most 1/510, so an image may leave its `Linf` ball by that much and no
    more, and its `L2` ball by at most ``sqrt(d) / 510`` with ``d`` pixel values (0.11 at 32x32,
    0.76 at 224x224).  If the clean image is 8-bit and epsilon a multiple of 1/255, it does not
    leave the `Linf` ball at all.

    Example:
      >>> np.asarray(quantize(jnp.array([-0.2, 0.303, 1.7])) * 255).round(3).tolist()
      [0.0, 77.0, 255.0]
    """
    return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


def predictions(classifier: Classifier, images: jax.Array) -> jax.Array:
    """Returns the most likely class of each image, int32 ``[batch]``.

    Images are uint8, or float pixels in [0, 1].  Where a logit is NaN the class is -1, so that no
    broken model scores by chance.
    """
    logits = classifier(to_pixels(images)).logits
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isnan(logits).any(axis=-1), NO_ANSWER, likeliest)


def answers(
    key: jax.Array, classifier: Classifier, images: jax.Array, indices: jax.Array
) -> jax.Array:
    """Returns what the model says of images whose place in the split is known.

    A randomized model (`robust_ssl.attacks.apgd.draw`) is drawn once for each image, from the key
    of the evaluation and the image's place: whoever attacks, and with what else in the batch, an
    image that did not change keeps its answer.  Images and answers are as for `predictions`.
    """
    if not hasattr(classifier, "with_key"):
        return predictions(classifier, images)
    key = jax.random.fold_in(key, _ANSWERS)

    def one(index, image):
        return predictions(draw(classifier, jax.random.fold_in(key, index)), image[None])[0]

    return jax.vmap(one)(indices, images)


def _clean_answers(constants, batch: Mapping[str, jax.Array]) -> jax.Array:
    key, model = constants
    return answers(key, model, batch["images"], batch["indices"])


def _attacked_answers(constants, batch: Mapping[str, jax.Array]):
    """Attacks each image by itself; returns answers and whether all pixels are numbers."""
    key, model, attack = constants
    adversarial = attack_batch(
        attack, key, model, to_pixels(batch["images"]), batch["labels"], batch["indices"]
    )
    # Asked here, since a NaN pixel gives no answer, which would count as a success of the attack.
    finite = jnp.isfinite(adversarial).all(axis=(1, 2, 3))
    scored = quantize(adversarial) if getattr(attack, "eight_bit", True) else adversarial
    answered = answers(key, model, scored, batch["indices"])
    return answered, finite, _excess_of(attack, adversarial, batch["images"])


def _excess_of(attack: Attack, adversarial: jax.Array, images: jax.Array) -> jax.Array:
    """Returns `excess` of an attack that names its threat; NaN for all others."""
    threat = getattr(attack, "threat", None)
    # What is fitted has been projected, and where a patch lies depends on the image's key.
    unknown = isinstance(attack, UniversalPerturbation) or isinstance(threat, threats.Patch)
    if unknown or not hasattr(threat, "project"):
        return jnp.full(len(images), jnp.nan)
    return excess(threat, adversarial, to_pixels(images))


def excess(threat: Any, adversarial: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the largest distance of a pixel to the nearest image that a threat allows.

    Args:
      threat: The threat.
      adversarial: Float ``[batch, H, W, 3]``.
      images: What they were made from, float pixels.

    Returns:
      Pixel units, float32 ``[batch]``; NaN where a pixel is.

    Example:
      >>> clean = jnp.zeros((1, 2, 2, 3))
      >>> excess(threats.Linf(0.25), clean + 0.5, clean).tolist()
      [0.25]
    """
    # A band is left a little where the cut to [0, 1] bites: its inner budget is what must hold.
    threat = threat.threat if isinstance(threat, threats.Band) else threat
    nearest = jax.vmap(threat.project)(adversarial, images)
    return jnp.max(jnp.abs(adversarial - nearest), axis=(1, 2, 3))


def compiled(parallel, function):
    """Returns ``parallel.map(function)``, cached: a second call compiles nothing."""
    # By the function itself, so two equal partials or lambdas are compiled twice: make them once.
    return parallel.made_once(type(parallel).map, function)


def padded(batches: Iterable[Mapping[str, np.ndarray]]):
    """Yields (number of images, batch), every batch as long as the first: one shape, one compile.

    What is padded repeats the first image.
    """
    start = size = 0
    for batch in batches:
        images, labels = np.asarray(batch["images"]), np.asarray(batch["labels"])
        if images.ndim != 4 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                "a batch must be images [n, H, W, 3] and integer labels [n], got "
                f"{images.shape} and {labels.dtype} {labels.shape}"
            )
        if images.shape[1:3] != (1, 1):  # those are features, which a head is trained on
            check_images(images)
        n = len(images)
        indices = np.asarray(batch.get("indices", np.arange(start, start + n)))
        size = max(size, n)
        start += n
        if n == 0:  # no first image to pad with
            continue
        take = np.concatenate([np.arange(n), np.zeros(size - n, int)])
        whole = {"images": images, "labels": labels.astype(np.int32)}
        whole["indices"] = indices.astype(np.int32)
        yield n, {name: values[take] for name, values in whole.items()}


def on_some(function, constants, examples: Mapping[str, Any], rows: np.ndarray, batch_size: int):
    """Calls a compiled function on some rows, in batches of one shape; yields (rows, results)."""
    for start in range(0, len(rows), batch_size):
        # Filled up with its first row: the images get fewer with every attack, the shape must not.
        some = rows[start : start + batch_size]
        whole = np.concatenate([some, np.repeat(some[:1], batch_size - len(some))])
        results = function(constants, jax.tree.map(lambda x, whole=whole: x[whole], examples))
        count = len(some)
        yield some, jax.tree.map(lambda x, count=count: x[:count], results)


def check_finite(name: str, attack: Attack, broken: np.ndarray) -> None:
    """Raises ValueError if an attack has made pixels that are no numbers, in images of a split."""
    if not len(broken):
        return
    objective = getattr(attack, "objective", None)
    objective = getattr(objective, "func", objective)  # of a partial
    called = getattr(objective, "__name__", type(objective).__name__)
    advice = "" if objective is None else f"; look at its objective, {called}, and its gradient"
    raise ValueError(
        f"attack {name} made pixels that are not finite, in images {broken[:5].tolist()} of the "
        f"split; a perturbed image may hold neither NaN nor infinity{advice}"
    )


def _check_answered(unperturbed: np.ndarray, broken: np.ndarray) -> None:
    """Raises ValueError where the model, and no attack, is why pixels are no numbers."""
    silent = broken[unperturbed == NO_ANSWER]
    if len(silent):
        raise ValueError(
            f"the classifier's logits are NaN when nobody attacks, on images "
            f"{silent[:5].tolist()} of the split; no attack has a gradient there. Look at its "
            "weights, and at the mean and std of its normalization"
        )


def check_attacks(attacks: Mapping[str, Attack]) -> None:
    """Raises unless there is an attack, none is called "worst", and each is a pytree value."""
    if not attacks or WORST in attacks:
        raise ValueError(
            f"name at least one attack, and none {WORST!r} (the worst case over all of them is "
            f"added); got {sorted(attacks)}"
        )
    for name, attack in attacks.items():
        leaves = jax.tree.leaves(attack)
        arrays = all(hasattr(x, "dtype") or isinstance(x, (int, float)) for x in leaves)
        if not arrays or not callable(attack):
            raise TypeError(
                f"attack {name!r} must be a callable pytree of arrays (a "
                "robust_ssl.struct.dataclass with __call__, or jax.tree_util.Partial of a "
                f"function), got {attack!r}"
            )


def check_threats(attacks: Iterable[Attack], image_shape: tuple[int, ...]) -> None:
    """Raises ValueError where an attack carries a threat that no such image can meet.

    For the host: a threat inside a compiled function is passed over, as its values are unknown.
    """
    for attack in attacks:
        threat = getattr(attack, "threat", None)
        # Inside a compiled function a budget has no value yet.
        if threat is not None and not any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(threat)
        ):
            threats.check(threat, image_shape)


def settled(attack: Attack) -> Attack:
    """Returns the attack with one type for each number, so that 1, 1.0 and NumPy's compile once.

    Of the single numbers every float becomes float32, a threat's whole ones too; other whole
    numbers become int32.  Arrays stay as they are.  A
    perturbation's name is left out.

    Example:
      >>> from robust_ssl.attacks import APGD
      >>> attack = settled(APGD(threats.Linf(1), rank=2))
      >>> attack.threat.epsilon.dtype, attack.rank.dtype
      (dtype('float32'), dtype('int32'))
    """

    def settle(path, leaf):
        if jnp.ndim(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        # Of a threat whole numbers are budgets, which are float32 wherever they are not whole.
        of_threat = any(getattr(step, "name", None) == "threat" for step in path)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(jnp.float32)
        if jnp.issubdtype(leaf.dtype, jnp.signedinteger):
            return leaf.astype(jnp.float32 if of_threat else jnp.int32)
        return leaf

    if isinstance(attack, UniversalPerturbation):
        attack = attack.replace(name="")  # nothing is computed from it
    return jax.tree_util.tree_map_with_path(settle, attack)


def score(
    classifier: Classifier,
    batches: Iterable[Mapping[str, np.ndarray]],
    attacks: Mapping[str, Attack],
    *,
    key: jax.Array,
    parallel: Any,
) -> dict[str, PerImage]:
    """Attacks every image of a split with every attack, and counts what happens.

    Adversarial images are clipped and rounded to 8 bits (`quantize`) before they are classified,
    unless their attack has an attribute `eight_bit` that is False (`robust_ssl.attacks.FABT`).
    Attacks of one structure (the same class and static choices, another epsilon or perturbation)
    share one compiled function.

    Args:
      classifier: The model under attack; its batch statistics are read, never written.
      batches: NumPy ``{"images": uint8, or float in [0, 1], [n, H, W, 3], "labels": integer
        [n]}`` and, where it is not just counted up, ``"indices"``, the place of each image in
        the split; for example `robust_ssl.data.epoch_batches`.  A short last batch counts each
        of its images once.
      attacks: Attacks by name.  Each is called as ``attack(key, model, image, label)``.
      key: Random key; the image at place i gets ``fold_in(key, i)`` whatever the batch size, the
        devices or the other attacks, and a randomized model one draw for it (`answers`).
      parallel: A `robust_ssl.parallel.Parallel`.

    Returns:
      One `PerImage` per attack, and the worst case over them under ``"worst"``.

    Raises:
      ValueError: If there is no image or no attack, a batch is malformed, a threat makes no sense
        for the images, or an attack makes pixels that are not numbers.
      TypeError: If an attack is not a pytree value, or returns no floats.
    """
    check_key(key)
    check_attacks(attacks)
    parallel = parallel.anew_for(classifier)
    classify, strike = (compiled(parallel, f) for f in (_clean_answers, _attacked_answers))
    unattacked = parallel.replicate((key, classifier))
    constants = {
        name: parallel.replicate((key, classifier, settled(a))) for name, a in attacks.items()
    }
    labels, clean, seconds = [], [], dict.fromkeys(attacks, 0.0)
    adversarial: dict[str, list[np.ndarray]] = {name: [] for name in attacks}
    outside = dict.fromkeys(attacks, -np.inf)
    for n, batch in padded(batches):
        if not labels:  # the first batch, before it costs anything
            check_threats(attacks.values(), batch["images"].shape[1:])
        labels.append(batch["labels"][:n])
        unperturbed = classify(unattacked, batch)
        clean.append(unperturbed[:n])
        for name in attacks:
            begun = time.perf_counter()
            answered, finite, beyond = strike(constants[name], batch)
            seconds[name] += time.perf_counter() - begun
            _check_answered(unperturbed[~finite], batch["indices"][~finite])
            check_finite(repr(name), attacks[name], batch["indices"][~finite])
            adversarial[name].append(answered[:n])
            outside[name] = float(np.maximum(outside[name], beyond[:n].max()))  # NaN stays NaN
    if not labels:
        raise ValueError("no images to score: the split is empty")
    truth, before = np.concatenate(labels), np.concatenate(clean)
    results = {}
    for name in attacks:
        after = np.concatenate(adversarial[name])
        changed = (before == truth, after == truth, after != before)
        results[name] = PerImage(*changed, seconds[name], outside[name])
    return {**results, WORST: worst_case(results.values())}
