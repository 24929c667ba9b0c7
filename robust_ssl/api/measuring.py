"""`measure`: what attacks leave of a classifier, and whether the figure can be believed."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from robust_ssl import data, disk, evaluation, models, report, threats
from robust_ssl.api import choice, inputs
from robust_ssl.evaluation import PerImage, checks
from robust_ssl.evaluation.checks import Verdict
from robust_ssl.experiment.examine import (
    PER_IMAGE_CHECKS,
    affordable,
    of_sample,
    of_two_classes,
)
from robust_ssl.experiment.examined import counts_of, sees_labels
from robust_ssl.experiment.groups import Group, Member, Scored
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Bar, Progress
from robust_ssl.types import Classifier

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A line of a `Result`: what is left under an attack.

    `low` and `high` bound the accuracy with 95 % confidence; `success_rate` is the share of the
    right answers that the attack turned.
    """

    attack: str
    budget: str
    accuracy: float
    low: float
    high: float
    success_rate: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What happened to every image; prints as a table.

    Attributes:
      groups: Attacks of one kind and budget, with what happened to each image.
      verdict: Whether the figures can be believed, with every check.
    """

    groups: tuple[Scored, ...]
    verdict: Verdict

    @functools.cached_property
    def worst(self) -> PerImage:
        """What is left in the worst case per image over all attacks."""
        return evaluation.worst_case(group.worst for group in self.groups)

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are right when nobody attacks."""
        return self.worst.counts.clean_accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share of the images that are right under every attack."""
        return self.worst.counts.robust_accuracy

    @property
    def rows(self) -> list[Row]:
        """The lines of the table: no attack, each attack, the worst case."""
        n = self.worst.counts.n
        correct = self.worst.counts.clean_correct
        interval = evaluation.wilson_interval(correct, n)
        rows = [Row("none", "", self.clean_accuracy, *interval, 0.0, 0.0)]
        for group in self.groups:
            budget = report.budget(group.group.epsilon, group.group.threat)
            rows += [_row(m.label, budget, group.results[m.label]) for m in group.members]
        if len(rows) > 2:
            rows.append(_row(choice.TAKEN[-1], "", self.worst))
        return rows

    def __repr__(self) -> str:
        """Shows the table and the verdict, with the checks that did not pass."""
        width = max(len(row.attack) for row in self.rows)
        lines = [f"{'attack':<{width}}  {'budget':>8}  accuracy  95 % interval   seconds"]
        for row in self.rows:
            accuracy, interval = f"{100 * row.accuracy:.1f} %", _interval(row)
            line = f"{row.attack:<{width}}  {row.budget:>8}  {accuracy:>8}  {interval:<15}"
            lines.append(f"{line} {row.seconds:.1f}".rstrip() if row.seconds else line.rstrip())
        return "\n".join([*lines, f"{self.worst.counts.n} images; {self.verdict}"])

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        head = ("attack", "budget", "accuracy", "95 % interval", "seconds")
        rows = [
            (r.attack, r.budget, f"{100 * r.accuracy:.1f} %", _interval(r), f"{r.seconds:.1f}")
            for r in self.rows
        ]
        cells = "".join(_html_row("td", row) for row in rows)
        verdict = "<br>".join(html.escape(line) for line in str(self.verdict).splitlines())
        images = self.worst.counts.n
        return f"<table>{_html_row('th', head)}{cells}</table><p>{images} images; {verdict}</p>"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: entries as in ``results.json``, and the verdict."""
        word = self.verdict.word
        entries = [entry for group in self.groups for entry in group.entries(word)]
        worst = self.worst.counts.as_dict()
        return {"worst": worst, "results": entries, "verdict": self.verdict.as_dict()}

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Returns `as_dict` as text, and writes it if a path is given."""
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False)
        if path is not None:
            disk.replace(path, text + "\n")
        return text


def _row(name: str, budget: str, result: PerImage) -> Row:
    counts = result.counts
    interval = evaluation.wilson_interval(counts.robust_correct, counts.n)
    success = counts.attack_success_rate
    return Row(name, budget, counts.robust_accuracy, *interval, success, result.seconds)


def _interval(row: Row) -> str:
    return f"{100 * row.low:.1f} to {100 * row.high:.1f}"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def measure(
    classifier: Any,
    images: Any,
    labels: Any = None,
    *,
    attacks: Any = "pgd",
    epsilon: float | None = None,
    examine: bool = True,
    batch_size: int = 250,
    seed: int = 0,
    parallel: Parallel | None = None,
    progress: str = "auto",
) -> Result:
    """Attacks every image and counts what is left, exactly and with intervals.

    The classifier is then examined (has it an honest gradient, does anything cheap beat the
    figure?), and the verdict says whether the figure can be believed.

    Args:
      classifier: A `Classifier`, the directory of a saved one, or a function of images that returns
        `Outputs`; what it closes over is read anew by each call.
      images: ``uint8`` or float in [0, 1], ``[n, H, W, 3]``; `data.Examples`; or a name, such as
        ``"digits"``, whose test split is taken.
      labels: Integers ``[n]``; None where `images` has its own.
      attacks: One or several of: a name of ``robust_ssl.list("attacks")`` that attacks single
        images, or ``"autoattack"``; a `Perturbation`; a value of `robust_ssl.attacks`.  A mapping
        says what they are called.
      epsilon: Budget of attacks by name, pixel units, under `threats.Linf`; None is that of the
        perturbations, and 8/255 where there are none.
      examine: Whether the figure is examined; it costs a quarter of the attacks, or 32 images.
      batch_size: Images at a time.
      seed: Of every random choice.
      parallel: The devices; None is the first one.
      progress: ``"auto"``, or ``"quiet"`` for none.

    Returns:
      The result; ``print`` shows it as a table.

    Raises:
      ValueError: If there is no such attack, or images, labels and classifier do not fit.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
      >>> result = measure(net, images, labels, attacks="fgsm", examine=False, progress="quiet")
      >>> result.clean_accuracy == 1 / 3, result.robust_accuracy <= 1 / 3
      (True, True)
    """
    batch_size, seed = inputs.count(batch_size, "batch_size"), inputs.seed(seed)
    examine = inputs.switch(examine, "examine")
    classifier, parallel = inputs.classifier_of(classifier), inputs.devices_of(parallel)
    resizing = inputs.resizing_of(classifier)
    examples = inputs.examples_of(images, labels, inputs.size_of(classifier), "test", resizing)
    if not examples.class_names:
        raise ValueError("labels are needed to count right answers: measure(net, images, labels)")
    classifier = _in_order(classifier, examples)
    # Of the logits, not of the labels: those of some images may be of a few classes only, and
    # AutoAttack tries as many wrong classes as there are.
    num_classes = _count_logits(classifier, examples)
    _check_labels(examples, num_classes)
    named = choice.named(attacks)
    parallel = parallel.anew_for(classifier, named)
    epsilon = choice.largest_budget(named) if epsilon is None else epsilon
    epsilon = inputs.one_budget(epsilon, "call measure once for each")
    groups = choice.grouped(named, epsilon, num_classes)
    scorer = _Scorer(classifier, examples, batch_size, jax.random.key(seed), parallel)
    parts = sum(len(members) for members in groups.values())
    with Progress(progress).stage("measure", parts + examine) as bar:
        scored = tuple(scorer.score(group, members, bar) for group, members in groups.items())
        bar.update(doing="examining the figure")
        verdict = scorer.examine(scored) if examine else Verdict(())
        bar.update(parts + examine)
    return Result(scored, verdict)


def _count_logits(classifier: Any, examples: Any) -> int:
    """Returns how many classes a classifier tells apart, which may be more than are labelled.

    Raises:
      ValueError: If it does not return logits ``[n, classes]``.
    """
    if isinstance(classifier, Classifier):
        return classifier.num_classes
    answer = inputs.answer_of(classifier, 2, examples.image_shape)
    logits: Any = getattr(answer, "logits", None)
    shape: tuple[int, ...] = getattr(logits, "shape", ())
    if logits is not None and len(shape) == 2 and shape[0] == 2:
        if not np.issubdtype(logits.dtype, np.inexact):
            raise ValueError(
                f"the classifier's logits are of {logits.dtype}, which have no gradient; return "
                "the floats before rounding or argmax"
            )
        return shape[1]
    what = inputs.what_is(answer if logits is None else logits)
    raise ValueError(
        "the classifier must return robust_ssl.Outputs with logits [n, classes], got "
        f"{what}{'' if logits is None else ' of logits'} for 2 images; of a function of yours: "
        "lambda images: Outputs(features=f(images), logits=f(images))"
    )


def _in_order(classifier: Any, examples: Any) -> Any:
    """Returns the classifier with its logits in the order of the images' classes, if both say it.

    Where only the images do, logits are taken in that order, with a warning.

    Raises:
      ValueError: If they have other classes.
    """
    mine, asked = getattr(classifier, "class_names", ()), examples.class_names
    if data.is_numbered(asked):
        return classifier
    if mine and not data.is_numbered(mine):
        return models.in_order_of(classifier, asked)
    count = getattr(classifier, "num_classes", None)
    if count not in (None, len(asked)):
        raise ValueError(
            f"the classifier has {count} logits, and {examples.name} the classes "
            f"{data.listed(asked)}; give images of as many classes, or arrays with labels of yours"
        )
    _log.warning("the classifier: %s", data.taken_in_order(mine, asked))
    return classifier


def _check_labels(examples: Any, classes: int) -> None:
    if examples.labels is not None and examples.labels.max() >= classes:
        raise ValueError(
            f"there is a label {examples.labels.max()}, and the classifier has {classes} classes, "
            f"0 to {classes - 1}"
        )


# --- Scoring and examining ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """A classifier and the images that it is measured on."""

    classifier: Any
    examples: Any
    batch_size: int
    key: jax.Array
    parallel: Parallel

    @property
    def shared(self) -> dict[str, Any]:
        """What every scoring is told."""
        return {"key": self.key, "parallel": self.parallel}

    @property
    def at_once(self) -> int:
        """How many images are passed together."""
        devices = len(self.parallel.devices)
        return min(self.batch_size, -(-len(self.examples) // devices) * devices)

    def batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields the images in order."""
        return data.epoch_batches(self.examples, self.at_once)

    def score(self, group: Group, members: list[tuple[str, Any]], bar: Bar) -> Scored:
        """Scores the attacks of a group, each by itself."""
        results, done = {}, []
        for name, value in members:
            bar.update(doing=name)
            results[name] = self._worst(name, value)
            done.append(Member(name, None, value, 0.0, self._gradients(value)))
            bar.update(bar.sent + 1, doing=name)
        worst = evaluation.worst_case(results.values())
        return Scored(group, tuple(done), {**results, evaluation.WORST: worst})

    def _worst(self, name: str, value: Any) -> evaluation.PerImage:
        """Scores an attack, or those of an ensemble in turn."""
        if not isinstance(value, Mapping):
            scored = evaluation.score(self.classifier, self.batches(), {name: value}, **self.shared)
            return scored[evaluation.WORST]
        # As AutoAttack's own code: FAB stops just past the boundary, and rounding may push it back.
        options = {"batch_size": self.at_once, "eight_bit": False, **self.shared}
        scored = evaluation.score_in_turn(self.classifier, self.batches(), value, **options)
        return scored[evaluation.WORST]

    def _gradients(self, value: Any) -> int:
        """Input gradients over all images, at most: AutoAttack leaves out what has fallen."""
        parts = (
            [value] if not isinstance(value, Mapping) else [p for m in value.values() for p in m]
        )
        each = sum(getattr(part, "gradient_evaluations", 0) for part in parts)
        return each * len(self.examples)

    def examine(self, scored: Iterable[Scored]) -> Verdict:
        """Says whether the figure can be believed: the one per image, of the largest budget.

        Where no attack per image sees labels, the examination's own PGD is looked at, at the
        largest budget of all.
        """
        scored = list(scored)
        linf = [s for s in scored if s.group.threat == "Linf" and s.group.epsilon > 0]
        if not linf:
            reason = "Nothing was scored under Linf, which is what is examined."
            return Verdict(checks.not_run(PER_IMAGE_CHECKS, reason))
        per_image = [s for s in linf if s.group.family != "universal"]
        seeing = [s for s in per_image if sees_labels(s)]
        epsilon = max(s.group.epsilon for s in seeing or linf)
        figures = [s for s in per_image if seeing and s.group.epsilon == epsilon]
        spent = sum(m.gradient_evaluations for s in figures for m in s.members)
        steps, queries, count = affordable(spent)
        order = np.random.default_rng(20).permutation(len(self.examples))
        rows = np.sort(order[:count])
        rows = of_two_classes(rows, np.arange(len(order)), np.asarray(self.examples.labels))
        batch = self.examples.read(rows)
        figure = evaluation.worst_case(s.worst for s in figures) if figures else None
        return of_sample(
            self.classifier,
            batch,
            figure,
            rows,
            counts=counts_of(figure, scored),
            excess=evaluation.largest_excess(s.worst for s in scored),
            threat=threats.Linf(epsilon),
            num_steps=steps,
            num_queries=queries,
            at_once=self.at_once,
            **self.shared,
        )
