"""All checks of a model and its per-image figure on a sample of images, in a dozen passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.attacks.square import Square
from robust_ssl.evaluation.checks import bench, gradients, model, scoring, strength
from robust_ssl.evaluation.checks.bench import Bench
from robust_ssl.evaluation.checks.comparisons import nothing_left, settle
from robust_ssl.evaluation.checks.path import OBJECTIVES, Climb, full_range, with_budget
from robust_ssl.evaluation.checks.result import Check, Verdict, not_run
from robust_ssl.evaluation.counts import Counts
from robust_ssl.evaluation.metrics import to_pixels
from robust_ssl.keys import check_key
from robust_ssl.parallel import Parallel
from robust_ssl.pixels import check_images
from robust_ssl.threats import L2, Linf, check_epsilon
from robust_ssl.types import Attack, Classifier

NUM_STEPS, NUM_QUERIES = 20, 200
CLIMBS = 7  # three objectives, one that goes on, half and twice the budget, the full range
MOST_LINKS = 16  # climbs, each from the last one's end, until the examination's PGD stands still
NEARBY = 1e-6  # a change of the pixels that changes no honest logit
WENT_ON = (
    "The examination's own attack went on by itself, for {} steps. Score APGD on single images: it "
    "starts anew."
)
NOT_FINITE = "The logits are not finite."
AFTER_MODEL = ("gradients", "path", "strength", "scoring")  # groups that presume finite logits


def cost(
    num_steps: int = NUM_STEPS, num_queries: int = NUM_QUERIES, *, surrogate: bool = False
) -> float:
    """Returns what `examine` spends per image, in input gradients.

    A forward pass counts a third of one.

    Example:
      >>> round(cost(20, 200))
      224
    """
    climbs = CLIMBS + surrogate
    # Of the model checks, the probe with its finite differences, Square, and scoring each path.
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

    `spent` are its input gradients, for example images times steps.  Fewer images than `least` say
    nothing, so small evaluations pay for so many anyway.

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
    excess: float | None = None,
    counts: Counts | None = None,
    surrogate: Classifier | None = None,
    black_box: Attack | None = None,
    num_steps: int = NUM_STEPS,
    num_queries: int = NUM_QUERIES,
    parallel: Parallel | None = None,
    batch_size: int = 128,
) -> Verdict:
    """Says whether a robustness figure of a classifier can be believed.

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
        bool ``[n]``; None takes the examination's own PGD for it, which then goes on until it
        stands still, up to fifteen times `num_steps`.
      adversarial: Images of the evaluation's attack, float ``[n, H, W, 3]``; must keep the threat.
      excess: How far they left it where that is known, `PerImage.excess`; NaN and None: it is not.
      counts: Of the figure over the whole split, which must have enough images; None counts this
        sample.
      surrogate: Another model of the same classes, whose adversarial images are tried too.
      black_box: An attack without gradients; None is `Square` with `num_queries`.
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
    check_key(key)
    check_images(images)
    images, labels = np.asarray(to_pixels(images), np.float32), np.asarray(labels)
    threat = _checked(classifier, images, labels, threat, num_steps)
    parallel = parallel or Parallel.create(num_devices=1)
    sample = Bench(images, labels.astype(np.int32), parallel, batch_size)
    trial = _Trial(sample, classifier, threat, num_steps)
    keys = jax.random.split(key, 4)
    price = cost(num_steps, num_queries, surrogate=surrogate is not None)
    checks = _model_checks(sample, classifier, keys[0])
    if checks[0].status == "failed":
        return Verdict((*checks, *not_run(AFTER_MODEL, NOT_FINITE)), len(images), price)
    probed = sample.run(bench.probe, (keys[1], classifier, threat))
    checks += _gradient_checks(probed)
    if not probed["clean"].any():
        return Verdict((*checks, *_nothing_correct(len(images))), len(images), price)
    # From here on only images in `clean` count: one that is wrong anyway is no attack's success.
    clean, paths = probed["clean"], trial.paths(keys[2])
    main = paths["cross_entropy"]
    # Nobody could follow the advice to take more steps of the examination's own PGD.
    own = reported is None
    chain = trial.chain(keys[2], main, clean, most=MOST_LINKS if own else 2)
    price += num_steps * (len(chain) - 2)
    reported = clean & (_right(chain[:-1]) if own else np.asarray(reported, bool))
    independent = {
        "black_box": trial.black_boxed(keys[3], black_box, num_queries),
        # From the starts of the model's own paths, so that only the gradient is another one.
        "transfer": None if surrogate is None else trial.climb(keys[2], model=surrogate),
    }
    others = [*chain, *(paths[name] for name in OBJECTIVES), *independent.values()]
    correct = [other["rounded"] for other in others if other is not None]
    worst = np.logical_and.reduce([reported, probed["one_step"], *correct])

    checks += _path_checks(trial, paths, chain, probed, reported, own)
    checks += _independent_checks(reported, clean, **independent)
    checks = nothing_left(settle(checks, clean, worst), reported)
    attacked = [each for each in (main, independent["black_box"]) if each is not None]
    if adversarial is not None:
        attacked.append(trial.score(np.asarray(adversarial, np.float32)))
    counted = (counts.robust_correct, counts.n) if counts else (int(reported.sum()), len(images))
    checks += _scoring_checks(main, attacked, excess, counted)
    shares = {"clean": clean, "reported": reported, "worst": worst}
    accuracies = {name: float(np.mean(right)) for name, right in shares.items()}
    return Verdict(checks, len(images), price, accuracies)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A model under the attacks of the examination, all on one sample and under one threat."""

    sample: Bench
    classifier: Any
    threat: Any
    num_steps: int

    def score(self, adversarial: np.ndarray, threat: Any = None):
        """Says what is right on adversarial images, and how far they are outside the threat."""
        constants = (self.classifier, self.threat if threat is None else threat)
        return self.sample.run(bench.scored, constants, adversarial=adversarial)

    def climb(self, key: jax.Array, *, threat=None, objective: int = 0, start=None, model=None):
        """Scores a recorded PGD: the same compiled function with other numbers."""
        threat = self.threat if threat is None else threat
        attack = Climb(threat, jnp.asarray(objective, jnp.int32), self.num_steps)
        model = self.classifier if model is None else model
        constants = (key, model, attack, jnp.asarray(start is not None))
        start = self.sample.images if start is None else start
        path = self.sample.run(bench.climb, constants, start=start)
        return path | self.score(path["best"], threat)

    def budgets(self) -> dict[str, float]:
        """Returns the budgets of the recorded PGDs by the path's name, the figure's included."""
        full = full_range(self.threat, self.sample.images.shape[1:])
        epsilon = float(self.threat.epsilon)
        budgets = {"half budget": epsilon / 2, "cross_entropy": epsilon}
        return {**budgets, "double budget": min(2 * epsilon, full), "full range": full}

    def paths(self, key: jax.Array) -> dict[str, Any]:
        """Runs every recorded PGD on the model."""
        paths = {name: self.climb(key, objective=i) for i, name in enumerate(OBJECTIVES)}
        for name, epsilon in self.budgets().items():
            if name not in paths:
                paths[name] = self.climb(key, threat=with_budget(self.threat, epsilon))
        return paths

    def chain(self, key: jax.Array, first, clean: np.ndarray, most: int) -> list[Any]:
        """Goes on where a path ended, once, or until it stands still or `most` links are made.

        From a new start, twice the steps could do less by chance.
        """
        links = [first, self.climb(key, start=first["best"])]
        while len(links) < most and not _stands_still(links, clean):
            links.append(self.climb(key, start=links[-1]["best"]))
        return links

    def black_boxed(self, key: jax.Array, black_box: Attack | None, num_queries: int):
        """Scores the black-box attack; None where there is none for this threat."""
        if black_box is None and not isinstance(self.threat, Linf | L2):
            return None
        attack = black_box or Square(self.threat, num_queries=num_queries)
        return self.score(self.sample.run(bench.strike, (key, self.classifier, attack)))


def _checked(classifier, images: np.ndarray, labels: np.ndarray, threat: Any, num_steps: int):
    """Returns the threat with a float32 budget, if a verdict can be had at all."""
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            "examine takes images [n, H, W, 3] and labels [n], n at least 1, got "
            f"{images.shape} and {labels.shape}"
        )
    if np.ndim(getattr(threat, "epsilon", None)) or not hasattr(threat, "epsilon"):
        raise ValueError(
            f"examine takes a threat with one epsilon (Linf, L2, Band of them), got {threat}; "
            "patches are compared by patch_places_agree"
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
    # A model that always gives one answer is perfect on one class.
    if len(np.unique(labels)) < 2 and len(labels) > 1:
        raise ValueError(
            f"all {len(labels)} images are of class {labels[0]}: accuracy on one class tells "
            "nothing; take a sample of several classes"
        )
    return with_budget(threat, threat.epsilon)


def _model_checks(sample: Bench, classifier, key: jax.Array) -> tuple[Check, ...]:
    """Runs the checks of the model."""
    keyed = [classifier]
    # Noise that is drawn from a key shows only under another key.
    if isinstance(classifier, model.Randomized):
        keyed = [classifier.with_key(k) for k in jax.random.split(key)]
    first = sample.run(bench.forward, (keyed[0],))
    again = sample.run(bench.forward, (keyed[-1],))
    # Batch statistics that do not stand still make an answer depend on who else is in the batch.
    turned = sample.run(bench.forward, (keyed[0],), images=sample.images[::-1])[::-1]
    signs = np.random.default_rng(0).choice([-NEARBY, NEARBY], sample.images.shape)
    near = sample.run(bench.forward, (keyed[0],), images=sample.images + signs.astype(np.float32))
    finite = model.finite_logits(first)
    if finite.status == "failed":
        return (finite, *not_run(("deterministic", "gives_logits"), NOT_FINITE))
    return (finite, model.deterministic(first, [again, turned], near), model.gives_logits(first))


def _gradient_checks(probed) -> tuple[Check, ...]:
    """Runs the checks of the gradient."""
    return (
        gradients.gradient_not_zero(probed["vanished"]),
        gradients.margin_gradient_not_zero(probed["margin_vanished"]),
        gradients.gradient_matches_differences(probed["predicted"], probed["measured"]),
    )


def _right(links) -> np.ndarray:
    """Returns what every link of a chain leaves right."""
    return np.logical_and.reduce([link["rounded"] for link in links])


def _as_one_path(links, before: np.ndarray) -> tuple[Check, Check]:
    """Asks of a chain whether it has converged, and whether it breaks more than the figure did.

    Args:
      links: The chain.
      before: What the figure leaves right, bool ``[n]``.
    """
    first, *more = (link["losses"] for link in links)
    losses = np.concatenate([first, *(each[:, 1:] for each in more)], axis=1)
    left = _right(links) & before
    return (
        strength.converged(losses, still_right=left),
        strength.twice_the_steps_not_stronger(before, left),
    )


def _stands_still(links, clean: np.ndarray) -> bool:
    checks = _as_one_path(links, _right(links[:-1]) & clean)
    return all(check.status != "failed" for check in checks)


def _path_checks(
    trial: _Trial, paths, chain, probed, reported: np.ndarray, own: bool
) -> tuple[Check, ...]:
    """Runs the checks of the path, and those of strength that need no other attack.

    With `own` the figure is that of the chain.
    """
    clean, main = probed["clean"], paths["cross_entropy"]
    correct = {name: path["rounded"] & clean for name, path in paths.items()}
    budgets = trial.budgets()
    names = ("half budget", "cross_entropy", "double budget")
    by_budget = {budgets[name]: correct[name] for name in names}
    by_objective = {"reported": reported, **{name: correct[name] for name in OBJECTIVES}}
    full = strength.full_range_breaks_all(correct["full range"])
    # With the steps that go on from its end: those that a figure was made with may be more than the
    # examination can pay for.
    converged, twice = _as_one_path(chain, reported)
    if own and converged.advice:
        advice = WENT_ON.format(len(chain) * trial.num_steps)
        converged = dataclasses.replace(converged, advice=advice)
    noise = probed["noise"] & clean
    # Nothing to gain on a robust model: then our own PGD, which does work, gains nothing either.
    gains = strength.beats_noise(noise, correct["cross_entropy"]).status == "passed"
    able = not gains and full.status == "passed"
    return (
        strength.steps_raise_loss(main["losses"]),
        converged,
        strength.no_silent_hits(main["hit"] & clean, main["exact"]),
        twice,
        strength.one_step_not_stronger(reported, probed["one_step"] & clean),
        strength.objectives_agree(by_objective, first="reported"),
        strength.accuracy_falls_with_epsilon(by_budget),
        full,
        strength.beats_noise(noise, reported, able=able),
    )


def _independent_checks(reported, clean, *, black_box, transfer) -> tuple[Check, ...]:
    """Runs the checks of strength that need an attack without this model's gradient."""
    checks = not_run(
        "black_box_not_stronger", "Square knows Linf and L2 only, and no other black_box was given."
    )
    if black_box is not None:
        checks = (strength.black_box_not_stronger(reported, black_box["rounded"] & clean),)
    if transfer is None:
        return checks + not_run("transfer_not_stronger", "No surrogate classifier was given.")
    return (*checks, strength.transfer_not_stronger(reported, transfer["rounded"] & clean))


def _scoring_checks(main, attacked, excess, counted: tuple[int, int]) -> tuple[Check, ...]:
    """Runs the checks of scoring: the budget, rounding, the number of images."""
    outside = [result["excess"] for result in attacked]
    if excess is not None and not np.isnan(excess):
        outside.append(np.float32([excess]))
    return (
        scoring.budget_kept(np.concatenate(outside)),
        scoring.survives_rounding(main["exact"], main["rounded"]),
        scoring.enough_images(*counted),
    )


def _nothing_correct(n: int) -> tuple[Check, ...]:
    why = f"None of the {n} images is classified correctly when nobody attacks."
    few = Check(
        name="enough_images",
        status="note",
        meaning=f"There is nothing to attack. {why}",
        advice="Look at the clean accuracy first: wrong labels, normalization or weights.",
    )
    return (*not_run(("path", "strength", "budget_kept", "survives_rounding"), why), few)
