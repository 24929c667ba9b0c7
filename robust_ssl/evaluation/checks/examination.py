"""Checks 1 to 20 on a sample of images, in a dozen passes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.attacks.square import Square
from robust_ssl.evaluation.checks import bench, gradients, model, scoring, strength
from robust_ssl.evaluation.checks.bench import Bench
from robust_ssl.evaluation.checks.path import OBJECTIVES, Climb, full_range, with_budget
from robust_ssl.evaluation.checks.result import Check, Verdict, not_run
from robust_ssl.evaluation.counts import Counts
from robust_ssl.evaluation.metrics import to_pixels
from robust_ssl.parallel import Parallel
from robust_ssl.threats import L2, Linf, check_epsilon
from robust_ssl.types import Attack, Classifier

NUM_STEPS, NUM_QUERIES = 20, 200
CLIMBS = 7  # three objectives, one that goes on, half and twice the budget, the full range
NEARBY = 1e-6  # a change of the pixels that changes no honest logit


def cost(
    num_steps: int = NUM_STEPS, num_queries: int = NUM_QUERIES, *, surrogate: bool = False
) -> float:
    """Returns what `examine` spends per image, in input gradients.

    A forward pass counts a third of one.

    Args:
      num_steps: As for `examine`.
      num_queries: As for `examine`.
      surrogate: Whether check 17 is run.

    Example:
      >>> round(cost(20, 200))
      224
    """
    climbs = CLIMBS + surrogate
    passes = 5 + 3 + 2 * bench.DIRECTIONS + num_queries + 3 * climbs + 2
    return 2 + climbs * num_steps + passes / 3


def affordable_images(
    spent: float,
    num_steps: int = NUM_STEPS,
    num_queries: int = NUM_QUERIES,
    *,
    share: float = 0.25,
    least: int = 64,
) -> int:
    """Returns on how many images `examine` costs at most a share of the evaluation.

    Args:
      spent: Input gradients of the whole evaluation, for example images times steps.
      num_steps: As for `examine`.
      num_queries: As for `examine`.
      share: Largest share of `spent`.
      least: Fewer images than this say nothing, so small evaluations pay for this many anyway.

    Example:
      >>> affordable_images(10_000 * 100), affordable_images(10_000 * 20)
      (1114, 222)
    """
    return max(least, int(share * spent / cost(num_steps, num_queries)))


def examine(
    classifier: Classifier,
    images: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    threat: Any,
    key: jax.Array,
    reported: np.ndarray | None = None,
    adversarial: np.ndarray | None = None,
    counts: Counts | None = None,
    surrogate: Classifier | None = None,
    black_box: Attack | None = None,
    num_steps: int = NUM_STEPS,
    num_queries: int = NUM_QUERIES,
    parallel: Parallel | None = None,
    batch_size: int = 128,
) -> Verdict:
    """Says whether a robustness figure of a classifier can be believed: checks 1 to 20.

    Two things are examined: the model (has it an honest gradient?) with a recorded PGD, and the
    figure (does anything cheap beat it?), where `reported` takes the place of that PGD.

    Args:
      classifier: Anything with logits.  If it has `with_key`, two keys are compared.
      images: A sample of the evaluated images, uint8 or float in [0, 1], ``[n, H, W, 3]``; see
        `affordable_images`.
      labels: Integer ``[n]``.
      threat: The threat of the figure, with one `epsilon` above 0.
      key: Random key.
      reported: Correct under every *per-image* attack of the evaluation that sees this model,
        bool ``[n]``; None takes the examination's own PGD for it.
      adversarial: Images of the evaluation's attack, float ``[n, H, W, 3]``, for check 18.
      counts: Of the figure over the whole split, for check 20; None counts this sample.
      surrogate: Another model of the same classes, for check 17.
      black_box: For check 16; None is `Square` with `num_queries`.
      num_steps: Steps of each recorded PGD, at least 4.
      num_queries: Queries of Square.
      parallel: Over which devices; None is the first one.
      batch_size: At most so many images at once.

    Returns:
      The verdict.  What cannot be run (a NaN model, nothing classified correctly) is listed as
      not run with the reason.

    Raises:
      ValueError: If there is nothing to examine: no image, no logits, one class, a label out of
        range, epsilon 0.

    References:
      Croce and Hein, ICML 2020 (AutoAttack's flags); Carlini et al., "On Evaluating Adversarial
      Robustness", 2019; Pintor et al., "Indicators of Attack Failure", NeurIPS 2022; Tramer et
      al., "On Adaptive Attacks", NeurIPS 2020.
    """
    images, labels = np.asarray(to_pixels(images), np.float32), np.asarray(labels)
    threat = _checked(classifier, images, labels, threat, num_steps)
    parallel = parallel or Parallel.create(num_devices=1)
    sample = Bench(images, labels.astype(np.int32), parallel, batch_size)
    keys = jax.random.split(key, 4)
    price = cost(num_steps, num_queries, surrogate=surrogate is not None)

    found = _model_checks(sample, classifier, keys[0])
    if found[0].status == "failed":
        found += not_run(range(4, 21), "the logits are not finite")
        return Verdict(found, len(images), price)
    probed = sample.run(bench.probe, (keys[1], classifier, threat))
    found += _gradient_checks(probed)
    clean = probed["clean"]
    if not clean.any():
        why = f"none of the {len(images)} images is classified correctly when nobody attacks"
        found += not_run(range(7, 20), why)
        return Verdict((*found, _nothing_correct(why)), len(images), price)
    climbs = _climbs(sample, classifier, threat, keys[2], num_steps)
    attacked = clean & climbs["cross_entropy"]["rounded"]
    reported = attacked if reported is None else np.asarray(reported, bool) & clean
    found += _path_checks(climbs, probed, reported)
    boxed = _black_boxed(sample, classifier, black_box, threat, keys[3], num_queries)
    moved = _transferred(sample, classifier, surrogate, threat, keys[2], num_steps)
    found += _black_box_checks(reported, clean, boxed, moved)
    outside = [climbs["cross_entropy"]["excess"]]
    outside += [] if boxed is None else [boxed["excess"]]
    if adversarial is not None:
        given = np.asarray(adversarial, np.float32)
        outside.append(sample.run(bench.scored, (classifier, threat), adversarial=given)["excess"])
    counted = (int(reported.sum()), len(images))
    found += (
        scoring.budget_kept(np.concatenate(outside)),
        scoring.survives_rounding(
            climbs["cross_entropy"]["exact"], climbs["cross_entropy"]["rounded"]
        ),
        scoring.enough_images(*((counts.robust_correct, counts.n) if counts else counted)),
    )
    others = [climbs[name]["rounded"] for name in ("twice", *OBJECTIVES)]
    others += [probed["one_step"]] + ([] if boxed is None else [boxed["rounded"]])
    worst = np.logical_and.reduce([reported, *others])
    accuracies = {"clean": clean, "reported": reported, "worst": worst}
    accuracies = {name: float(np.mean(correct)) for name, correct in accuracies.items()}
    return Verdict(found, len(images), price, accuracies)


def _checked(classifier, images: np.ndarray, labels: np.ndarray, threat: Any, num_steps: int):
    """Returns the threat with a float32 budget, if a verdict can be had at all."""
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            "examine takes images [n, H, W, 3] and labels [n], n at least 1, got "
            f"{images.shape} and {labels.shape}"
        )
    if np.ndim(getattr(threat, "epsilon", None)) or not hasattr(threat, "epsilon"):
        raise ValueError(
            f"examine takes a threat with one epsilon (Linf, L2, Band of them), got {threat}; "
            "for a patch there is examine_universal"
        )
    if not float(threat.epsilon) > 0:
        raise ValueError(
            f"epsilon is {float(threat.epsilon)}: with no budget nothing is attacked, so there is "
            "no robustness figure to give a verdict on; take epsilon above 0"
        )
    if isinstance(threat, Linf):
        check_epsilon(threat.epsilon)
    if num_steps < 4:
        raise ValueError(f"num_steps must be at least 4 to see an attack converge, got {num_steps}")
    logits = jax.eval_shape(classifier, jnp.zeros(images.shape[1:], jnp.float32)[None]).logits
    if logits is None or logits.shape[-1] < 2:
        raise ValueError(
            "examine takes a model with logits of at least two classes, got "
            f"{'no logits (an encoder?)' if logits is None else 'one class'}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[-1]:
        raise ValueError(f"labels must be integers in 0 to {logits.shape[-1] - 1}, got {labels}")
    if len(np.unique(labels)) < 2 and len(labels) > 1:
        raise ValueError(
            f"all {len(labels)} images are of class {labels[0]}: accuracy on one class tells "
            "nothing; take a sample of several classes"
        )
    return with_budget(threat, threat.epsilon)


def _model_checks(sample: Bench, classifier, key: jax.Array):
    """Runs checks 1 to 3."""
    keyed = [classifier]
    if isinstance(classifier, model.Randomized):
        keyed = [classifier.with_key(k) for k in jax.random.split(key)]
    first = sample.run(bench.forward, (keyed[0],))
    again = sample.run(bench.forward, (keyed[-1],))
    turned = sample.run(bench.forward, (keyed[0],), images=sample.images[::-1])[::-1]
    signs = np.random.default_rng(0).choice([-NEARBY, NEARBY], sample.images.shape)
    near = sample.run(bench.forward, (keyed[0],), images=sample.images + signs.astype(np.float32))
    checks = (model.finite_logits(first),)
    if checks[0].status == "failed":
        return checks + not_run([2, 3], "the logits are not finite")
    checks += (model.deterministic(first, [again, turned], near), model.gives_logits(first))
    return checks


def _gradient_checks(probed) -> tuple[Check, ...]:
    return (
        gradients.zero_gradient(probed["vanished"]),
        gradients.zero_margin_gradient(probed["margin_vanished"]),
        gradients.finite_differences(probed["predicted"], probed["measured"]),
    )


def _climbs(sample: Bench, classifier, threat, key: jax.Array, num_steps: int):
    """Runs every recorded PGD: the same compiled function with other numbers."""

    def run(threat, objective=0, start=None):
        climb = Climb(threat, jnp.asarray(objective, jnp.int32), num_steps)
        goes_on = jnp.asarray(start is not None)
        start = sample.images if start is None else start
        path = sample.run(bench.climb, (key, classifier, climb, goes_on), start=start)
        return path | sample.run(bench.scored, (classifier, threat), adversarial=path["best"])

    found = {name: run(threat, place) for place, name in enumerate(OBJECTIVES)}
    full = full_range(threat, sample.images.shape[1:])
    epsilon = float(threat.epsilon)
    more = min(2 * epsilon, full)
    return found | {
        "twice": run(threat, start=found["cross_entropy"]["best"]),
        "half budget": run(with_budget(threat, epsilon / 2)),
        "double budget": run(with_budget(threat, more)),
        "full range": run(with_budget(threat, full)),
        "budgets": (epsilon / 2, epsilon, more),
    }


def _path_checks(climbs, probed, reported: np.ndarray) -> tuple[Check, ...]:
    """Runs checks 7 to 15."""
    clean, main = probed["clean"], climbs["cross_entropy"]
    correct = {name: path["rounded"] & clean for name, path in climbs.items() if name != "budgets"}
    names = ("half budget", "cross_entropy", "double budget")
    by_budget = {e: correct[name] for e, name in zip(climbs["budgets"], names, strict=True)}
    full = strength.full_range_breaks_all(correct["full range"])
    noise = probed["noise"] & clean
    # Nothing to gain on a robust model: then our own PGD, which does work, gains nothing either.
    robust = strength.beats_noise(noise, correct["cross_entropy"]).status != "passed"
    by_objective = {"reported": reported, **{name: correct[name] for name in OBJECTIVES}}
    return (
        strength.falling_steps(main["losses"]),
        strength.converged(main["losses"], still_right=correct["cross_entropy"] & reported),
        strength.silent_hits(main["hit"] & clean, main["exact"]),
        strength.twice_the_steps(reported, correct["twice"] & correct["cross_entropy"]),
        strength.iterative_not_weaker(reported, probed["one_step"] & clean),
        strength.objectives_agree(by_objective, first="reported"),
        strength.falls_with_epsilon(by_budget),
        full,
        strength.beats_noise(noise, reported, able=robust and full.status == "passed"),
    )


def _transferred(sample: Bench, classifier, surrogate, threat, key, num_steps: int):
    """Scores images crafted on the surrogate; None without one."""
    if surrogate is None:
        return None
    climb = Climb(threat, jnp.asarray(0, jnp.int32), num_steps)
    constants = (key, surrogate, climb, jnp.asarray(False))
    path = sample.run(bench.climb, constants, start=sample.images)
    return sample.run(bench.scored, (classifier, threat), adversarial=path["best"])


def _black_boxed(sample: Bench, classifier, black_box, threat, key, num_queries: int):
    """Scores what the black-box attack finds; None where there is none for this threat."""
    if black_box is None and not isinstance(threat, Linf | L2):
        return None
    attack = black_box or Square(threat, num_queries=num_queries)
    struck = sample.run(bench.strike, (key, classifier, attack))
    return sample.run(bench.scored, (classifier, threat), adversarial=struck)


def _black_box_checks(reported, clean, boxed, moved) -> tuple[Check, ...]:
    """Runs checks 16 and 17."""
    if boxed is None:
        found = not_run([16], "Square knows Linf and L2 only, and no other black_box was given")
    else:
        found = (strength.black_box_not_stronger(reported, boxed["rounded"] & clean),)
    if moved is None:
        return found + not_run([17], "no surrogate classifier was given")
    return (*found, strength.transfer_not_stronger(reported, moved["rounded"] & clean))


def _nothing_correct(why: str) -> Check:
    return Check(
        20,
        None,
        None,
        "note",
        f"There is nothing to attack: {why}.",
        "Look at the clean accuracy first: wrong labels, normalization or weights.",
    )
