"""Attacks one after the other, each only on the images that are still classified correctly.

The worst case over all attacks for a fraction of the cost: an image that one attack breaks needs no
other.  `score_in_turn` does all of it; `clean_correct` and `strike` are its steps, for a caller
that stores the progress between them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.attacks.per_image import attack_batch, checked
from robust_ssl.evaluation import metrics
from robust_ssl.evaluation.counts import PerImage
from robust_ssl.evaluation.metrics import check_attacks, check_threats, compiled, on_some, padded
from robust_ssl.keys import check_key
from robust_ssl.types import Attack, Classifier

SHARES = (0.02, 0.1, 0.3, 1.0)  # of a search's queries; then images that are broken drop out
TOGETHER = 16  # batches whose searches are held in host memory at once


def gathered(batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Puts the batches of a split, as for `robust_ssl.evaluation.score`, into one in host memory.

    Raises:
      ValueError: If a batch is malformed or there is no image.

    Example:
      >>> part = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 1])}
      >>> gathered([part, part])["indices"].tolist()
      [0, 1, 2, 3]
    """
    parts = [{name: values[:n] for name, values in batch.items()} for n, batch in padded(batches)]
    if not parts:
        raise ValueError("no images to score: the split is empty")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _is_right(constants, batch: Mapping[str, jax.Array]) -> jax.Array:
    key, model = constants
    return metrics.answers(key, model, batch["images"], batch["indices"]) == batch["labels"]


def _outcome(key, model, adversarial: jax.Array, batch: Mapping[str, jax.Array], eight_bit: bool):
    """Returns which images stay right, and which have finite pixels only, bool ``[batch]``."""
    finite = jnp.isfinite(adversarial).all(axis=(1, 2, 3))
    scored = metrics.quantize(adversarial) if eight_bit else adversarial
    return metrics.answers(key, model, scored, batch["indices"]) == batch["labels"], finite


def _attacked(constants, batch: Mapping[str, jax.Array], *, eight_bit: bool):
    (key, attack_key), model, attack = constants
    images, labels, indices = (batch[name] for name in ("images", "labels", "indices"))
    pixels = metrics.to_pixels(images)
    adversarial = attack_batch(attack, attack_key, model, pixels, labels, indices)
    return _outcome(key, model, adversarial, batch, eight_bit)


def _first_try(key: jax.Array, index: jax.Array) -> jax.Array:
    """The key that an attack with restarts, called for that image, gives its first try."""
    return jax.random.fold_in(jax.random.fold_in(key, index), 0)


def _started(constants, batch: Mapping[str, jax.Array]):
    (_, key), model, attack = constants

    def start(index, image, label):
        return attack.start(_first_try(key, index), model, image, label)

    images = metrics.to_pixels(batch["images"])
    return jax.vmap(start)(batch["indices"], images, batch["labels"])


def _searched(constants, batch: Mapping[str, jax.Array]):
    (_, key), model, attack, until = constants

    def search(index, image, label, state):
        return attack.search(_first_try(key, index), model, image, label, state, until)

    images = metrics.to_pixels(batch["images"])
    return jax.vmap(search)(batch["indices"], images, batch["labels"], batch["state"])


def _after_search(constants, batch: Mapping[str, jax.Array], *, eight_bit: bool):
    (key, _), model, attack = constants
    found = checked(attack, batch["state"].best, metrics.to_pixels(batch["images"]))
    return _outcome(key, model, found, batch, eight_bit)


# Made once: two equal partials are two different functions to `compiled`.
_ATTACKED = {bits: functools.partial(_attacked, eight_bit=bits) for bits in (True, False)}
_AFTER_SEARCH = {bits: functools.partial(_after_search, eight_bit=bits) for bits in (True, False)}


def _members(attack: Attack | Sequence[Attack]) -> Sequence[Attack]:
    members = attack if isinstance(attack, Sequence) else [attack]
    if not members:
        raise ValueError("an attack is an empty list: name at least one member, or leave it out")
    return members


def clean_correct(
    classifier: Classifier,
    examples: Mapping[str, np.ndarray],
    *,
    key: jax.Array,
    parallel: Any,
    batch_size: int = 128,
) -> np.ndarray:
    """Returns which images of a `gathered` split are right when nobody attacks, bool ``[n]``.

    Of a randomized model (`robust_ssl.attacks.apgd.draw`) the key gives one draw for each image.
    The batch size changes nothing but speed and memory.
    """
    check_key(key)
    parallel = parallel.anew_for(classifier)
    constants = parallel.replicate((key, classifier))
    right = np.zeros(len(examples["labels"]), bool)
    function = compiled(parallel, _is_right)
    everything = np.arange(len(right))
    for rows, answers in on_some(function, constants, examples, everything, batch_size):
        right[rows] = answers
    return right


def _by_shares(constants, examples, rows: np.ndarray, parallel, batch_size: int, eight_bit: bool):
    """As `on_some` for a search that can be interrupted: who is broken is not asked again."""
    attack = constants[2]
    start, search = compiled(parallel, _started), compiled(parallel, _searched)
    score = compiled(parallel, _AFTER_SEARCH[eight_bit])
    for first in range(0, len(rows), TOGETHER * batch_size):
        some = rows[first : first + TOGETHER * batch_size]
        part = {name: values[some] for name, values in examples.items()}
        whole = np.arange(len(some))
        states = [state for _, state in on_some(start, constants, part, whole, batch_size)]
        part["state"] = state = jax.tree.map(lambda *x: np.concatenate(x), *states)
        for share in SHARES:
            until = parallel.replicate(np.int32(np.ceil(share * attack.num_queries)))
            searching = np.flatnonzero(~state.fooled)
            shared = (*constants, until)
            for places, reached in on_some(search, shared, part, searching, batch_size):
                # In place, in host memory: who dropped out keeps the state in which that happened.
                for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(reached), strict=True):
                    old[places] = new
        for places, outcome in on_some(score, constants, part, whole, batch_size):
            yield some[places], outcome


def strike(
    classifier: Classifier,
    examples: Mapping[str, np.ndarray],
    attack: Attack | Sequence[Attack],
    alive: np.ndarray,
    *,
    key: jax.Array,
    parallel: Any,
    batch_size: int = 128,
    eight_bit: bool = True,
) -> np.ndarray:
    """Attacks the images that are still right; returns which of them stay right.

    The members of a list go in turn too.  Whether an image stays right depends on the image, its
    place in the split, the attack and the key, and not on who else is alive.

    Args:
      classifier: The model under attack.
      examples: A whole split, as `gathered` returns it.
      attack: One attack, or several of one structure (for example one for each target), which
        share one compiled function.  One with methods ``start`` and ``search``, as `Square` has,
        is interrupted a few times to drop the images that it has broken; the outcome is the same.
      alive: Which images are to be attacked, bool ``[n]``; left as it is.
      key: Random key; member m of a list gets ``fold_in(key, m)``, a single attack and the first
        member `key` itself; of that, the image at place i gets ``fold_in(.., i)``.  The answers of
        a randomized model depend on `key` and the place alone (`metrics.answers`).
      parallel: A `robust_ssl.parallel.Parallel`.
      batch_size: Images of a batch.  The last one is filled up, so that nothing compiles twice.
      eight_bit: Round adversarial images to 8 bits before they are classified, as
        `robust_ssl.evaluation.score` does; AutoAttack's own code does not.

    Returns:
      Which images were alive and are still classified correctly, bool ``[n]``.

    Raises:
      ValueError: If `alive` is not a bool for each image, a threat makes no sense for the images,
        or an attack makes pixels that are not numbers.
    """
    check_key(key)
    alive = np.array(alive)  # a copy: the caller's stays as it is
    if alive.shape != examples["labels"].shape or alive.dtype != bool:
        raise ValueError(
            f"alive must be bool {examples['labels'].shape}, one for each image, got "
            f"{alive.dtype} {alive.shape}"
        )
    check_threats(_members(attack), examples["images"].shape[1:])
    parallel = parallel.anew_for(classifier)
    function = compiled(parallel, _ATTACKED[eight_bit])
    for number, member in enumerate(_members(attack)):
        # The first gets the key of a single attack, so that a list of one is that attack.
        member_key = key if number == 0 else jax.random.fold_in(key, number)
        constants = ((key, member_key), classifier, metrics.settled(member))
        constants = parallel.replicate(constants)
        rows = np.flatnonzero(alive)
        # Shares follow the first try only; one with restarts is run as a whole.
        if hasattr(member, "search") and member.restarts == 1:
            outcomes = _by_shares(constants, examples, rows, parallel, batch_size, eight_bit)
        else:
            outcomes = on_some(function, constants, examples, rows, batch_size)
        for some, (right, finite) in outcomes:
            broken = examples["indices"][some[~finite]]
            metrics.check_finite(type(member).__name__, member, broken)
            alive[some] = right
    return alive


def score_in_turn(
    classifier: Classifier,
    batches: Iterable[Mapping[str, np.ndarray]],
    attacks: Mapping[str, Attack | Sequence[Attack]],
    *,
    key: jax.Array,
    parallel: Any,
    batch_size: int = 128,
    eight_bit: bool = True,
) -> dict[str, PerImage]:
    """Attacks with one after the other, each only the images that are still right.

    The worst case is the one of running every attack on every image, at a fraction of the cost.
    The result of a single attack is therefore *after it and all earlier ones*; for the accuracy
    under one attack alone, name only that one.

    The batches are those of `robust_ssl.evaluation.score`, held in memory as they are; the options
    those of `strike`.  Attacks are run in their order, so the cheapest goes first; a list is one
    attack in several parts.  `robust_ssl.attacks.autoattack` makes such a mapping.

    Returns:
      One `PerImage` per attack: `robust_correct` is right without an attack, under it and under
      all earlier ones; `flipped` are the images that were right and are no longer (one that was
      wrong from the start is never attacked, so another change of its answer is not seen);
      `seconds` are the attack's own.  ``"worst"`` is the last one with the seconds of all.

    Raises:
      ValueError: If there is no image or no attack, a batch is malformed, a threat makes no sense
        for the images, or an attack makes pixels that are not numbers.
      TypeError: If an attack is not a pytree value, or returns no floats.
    """
    check_key(key)
    parts = {name: _members(attack) for name, attack in attacks.items()}
    check_attacks({name: members[0] for name, members in parts.items()})
    examples = gathered(batches)
    for members in parts.values():  # all of them before the first one costs anything
        check_threats(members, examples["images"].shape[1:])
    parallel = parallel.anew_for(classifier)  # once, for all of them
    shared = {"key": key, "parallel": parallel, "batch_size": batch_size}
    clean = alive = clean_correct(classifier, examples, **shared)
    results = {}
    for name, attack in attacks.items():
        begun = time.perf_counter()
        alive = strike(classifier, examples, attack, alive, eight_bit=eight_bit, **shared)
        results[name] = PerImage(clean, alive, clean & ~alive, time.perf_counter() - begun)
    seconds = sum(result.seconds for result in results.values())
    return {**results, metrics.WORST: PerImage(clean, alive, clean & ~alive, seconds)}
