"""Attacks are scored group by group; each group is kept once it is done.

A group is what is scored in one go: the attacks of one family on one model at one budget.  Its
result, what happened to each image, is written to ``<stage>/groups/`` as soon as it is there, so an
interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import data, evaluation, struct, threats
from robust_ssl.build import text_of
from robust_ssl.evaluation import PerImage
from robust_ssl.experiment.attack import Fitted
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.context import identity as identity  # names a group's model
from robust_ssl.experiment.loop import stage_key
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory, digest, load_arrays, save_arrays


class Group(NamedTuple):
    """What is scored in one go.

    Attributes:
      model: The classifier's name.
      crafted_against: Whose weights the attacker saw: ``"public"``; ``"hardened"``, the model's
        own; ``"twin"``, those of the same recipe with another seed; ``"half"``, the same of half of
        the images; ``"labelled"``, the model's own with its head and labelled training images.
      family: ``"universal"``, ``"per_image"`` or ``"autoattack"``.
      threat: What bounds the change, for example ``"Linf"``; see `threat_name`.
      epsilon: The budget (pixel units; for a patch the share of the image's area).
    """

    model: str
    crafted_against: str
    family: str
    threat: str
    epsilon: float


class Member(NamedTuple):
    """One attack of a group.

    Attributes:
      attack: Its name.
      seed: Its seed; None where there is none.
      value: What `evaluation.score` takes.
      seconds: What it took to craft, before it is applied to any image.
      gradient_evaluations: Input gradients that crafting and applying it took, over all images;
        0 for noise.
      text: What the config says of it, JSON-able; None of one that was fitted in another stage.
    """

    attack: str
    seed: int | None
    value: Any
    seconds: float = 0.0
    gradient_evaluations: int = 0
    text: Any = None

    @property
    def label(self) -> str:
        """Names it within its group."""
        return self.attack if self.seed is None else f"{self.attack}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores groups on a run's test split and keeps what is done.

    Attributes:
      context: The run.
      stage: Whose directory keeps the groups.
      batch_size: At most so many images at a time.
      on_part: Called after each part, for a progress bar.
      origin: What the parts are made from; see `score.origin_of`.
    """

    context: Context
    stage: StageDirectory
    batch_size: int
    on_part: Callable[[], None] = lambda: None
    origin: str = ""

    def score(
        self,
        group: Group,
        model: Classifier,
        members: Sequence[Member],
        rows: np.ndarray | None = None,
    ) -> Scored:
        """Scores all members on the whole split or some rows, or reads what was scored before.

        Per-image attacks take long, so each is kept by itself; universal ones share one pass over
        the clean images.
        """
        parts = [[m] for m in members] if group.family == "per_image" else [members]
        results: dict[str, PerImage] = {}
        for part in parts:
            chosen = {member.label: member.value for member in part}
            some = [] if rows is None else [f"{len(rows)} images"]
            name = file_name(group, [*chosen, *some])
            texts = [member.text for member in part if member.text is not None]
            origin = digest([self.origin, texts])[:16] if texts else self.origin
            keeper = dataclasses.replace(self, origin=origin)
            results |= keeper.kept(name, lambda c=chosen: self._score(model, c, rows))
        alone = {member.label: results[member.label] for member in members}
        worst = evaluation.worst_case(alone.values())
        return Scored(group, tuple(members), {**alone, evaluation.WORST: worst}, rows)

    def kept(self, name: str, compute: Callable[[], Mapping[str, PerImage]]) -> dict[str, PerImage]:
        """Returns what was computed under this name before, else computes and keeps it."""
        file = self.stage.path / "groups" / f"{name}.npz"
        results = _kept(file, self.origin)
        if results is None:
            self.check_stop()
            results = dict(compute())
            if jax.process_index() == 0:
                _keep(file, results, self.origin)
        self.on_part()
        return results

    def at_once(self, count: int) -> int:
        """Returns the size of as few batches as can be, all alike: a short one costs as much."""
        batches = -(-count // self.batch_size)
        return -(-count // batches)

    def _score(
        self, model: Classifier, chosen: Mapping[str, Any], rows: np.ndarray | None
    ) -> dict[str, PerImage]:
        test = self.context.test
        size = self.at_once(len(test if rows is None else rows))
        batches = data.epoch_batches(test, size) if rows is None else _batches(test, rows, size)
        return evaluation.score(
            model,
            self._until_stopped(batches),
            chosen,
            key=stage_key(self.context.plan.seed, "score"),
            parallel=self.context.parallel,
        )

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches; a stop waits for one of them, not for all attacks on all images."""
        for batch in batches:
            self.check_stop()
            yield batch

    def check_stop(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if stop_requested():
            raise Stopped(f"{self.stage.path.name} stopped, and what was scored is kept")


def _batches(test: Any, rows: np.ndarray, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Some images of a split, each with its place in all of it, which decides on its key."""
    for start in range(0, len(rows), batch_size):
        places = rows[start : start + batch_size].astype(np.int32)
        yield {**test.read(places), "indices": places}


class Scored(NamedTuple):
    """A group with what happened to each image, by member label and for the worst case.

    Attributes:
      group: What was scored.
      members: Its attacks.
      results: By label, and the worst case.
      rows: Which images of the test split, int ``[n]``; None is all of them.
    """

    group: Group
    members: tuple[Member, ...]
    results: Mapping[str, PerImage]
    rows: np.ndarray | None = None

    @property
    def worst(self) -> PerImage:
        """The worst case per image over the members."""
        return self.results[evaluation.WORST]

    def among(self, right: np.ndarray) -> np.ndarray:
        """Returns outcomes of the whole split for the images that this was scored on."""
        return right if self.rows is None else right[self.rows]

    def entries(self, verdict: str) -> list[dict[str, Any]]:
        """Returns the group's part of ``results.json``: each member, then the worst case.

        Args:
          verdict: Whether the model's robustness figures can be believed.
        """
        entries = [
            self._entry(m.attack, m.seed, m.label, m.seconds, m.gradient_evaluations, verdict)
            for m in self.members
        ]
        if len(self.members) > 1:
            seconds = sum(m.seconds for m in self.members)
            gradients = sum(m.gradient_evaluations for m in self.members)
            worst = evaluation.WORST
            entries.append(self._entry(worst, None, worst, seconds, gradients, verdict))
        return entries

    def _entry(self, attack, seed, label, seconds, gradients, verdict) -> dict[str, Any]:
        per_image, epsilon = self.results[label], self.group.epsilon
        return {
            "model": self.group.model,
            "attack": attack,
            "seed": seed,
            "family": self.group.family,
            "threat": self.group.threat,
            "crafted_against": self.group.crafted_against,
            "epsilon": float(epsilon) if np.isfinite(epsilon) else None,
            **per_image.counts.as_dict(),
            "verdict": verdict,
            "seconds": round(seconds + per_image.seconds, 3),
            "gradient_evaluations": int(gradients),
        }


def outcomes(scored: Iterable[Scored]) -> dict[str, np.ndarray]:
    """Returns which images stayed right, for comparing models image by image.

    Returns:
      Bool arrays: ``"<model>, clean"``, all images of the split when nobody attacks, and by
      `outcome_name` under the worst case of each group, over the images that it was scored on.
    """
    right = {}
    for group, _, results, rows in scored:
        right[outcome_name(group)] = results[evaluation.WORST].robust_correct
        if rows is None:
            right[f"{group.model}, clean"] = results[evaluation.WORST].clean_correct
    return right


def outcome_name(group: Group) -> str:
    """Names the worst case of a group among `outcomes`."""
    return ", ".join(map(str, group))


def by_budget(fitted: Iterable[Fitted]) -> dict[tuple[str, float], list[Member]]:
    """Sorts fitted perturbations by (threat, budget)."""
    groups: dict[tuple[str, float], list[Member]] = {}
    for one in fitted:
        threat = threat_name(one.perturbation.threat)
        member = Member(
            one.attack, one.seed, one.perturbation, one.seconds, one.gradient_evaluations
        )
        groups.setdefault((threat, one.epsilon), []).append(member)
    return groups


def threat_name(threat: Any) -> str:
    """Returns what a threat is called in tables: its class, and for a band its inside and edges.

    Example:
      >>> threat_name(threats.Band(threats.Linf(0.1), high=0.125))
      'Linf, 0-0.125 cycles/pixel'
    """
    if isinstance(threat, threats.Band):
        low, high = float(threat.low), float(threat.high)
        edges = f"{low:.3g}-{high:.3g}" if np.isfinite(high) else f"from {low:.3g}"
        return f"{threat_name(threat.threat)}, {edges} cycles/pixel"
    return type(threat).__name__


def sample(context: Context, count: int) -> np.ndarray:
    """Returns the places of at most `count` random images of the test split, sorted.

    The places for a smaller count are among those for a larger one.
    """
    order = np.random.default_rng([context.plan.seed, 20]).permutation(len(context.test))
    return np.sort(order[:count])


def per_image_members(
    context: Context, built: Mapping[str, Any], against: str, seeds: Sequence[int] = (0,)
) -> list[Member]:
    """Returns per-image attacks as members, crafted on the public encoder or on the model.

    Args:
      context: Its public encoder is what an attack sees that needs no label.
      built: Attacks by name.
      against: ``"public"`` or ``"hardened"``; against the public encoder those that need labels
        are left out, since it has none.
      seeds: One member each; a seed turns the key of every image.
    """
    members = []
    for seed in seeds:
        for name, attack in built.items():
            value = attack
            if against == "public":
                if not getattr(attack, "label_free", False):
                    continue
                value = Transferred(attack, context.encoder)
            images = context.plan.scoring.per_image.images or len(context.test)
            cost = getattr(attack, "gradient_evaluations", 0) * min(images, len(context.test))
            value = value if seed == 0 else Reseeded(value, jnp.int32(seed))
            text = text_of(context.plan.scoring.per_image.attacks[name])
            if isinstance(text, Mapping):
                text = {entry: said for entry, said in text.items() if entry != "budgets"}
            members.append(Member(name, seed, value, 0.0, cost, text))
    return members


class _Around:
    """What is asked of an attack, asked of the one inside."""

    @property
    def threat(self):
        """What bounds it."""
        return self.attack.threat

    @property
    def eight_bit(self):
        """Whether its images are rounded before they are scored."""
        return getattr(self.attack, "eight_bit", True)


@struct.dataclass
class Transferred(_Around):
    """A per-image attack that looks at another model than the one it is then used on.

    Attributes:
      attack: The attack.
      source: The model it sees, for example the public encoder.
    """

    attack: Any
    source: Any

    def __call__(self, key, model, image, label=None) -> jax.Array:
        """Returns the adversarial image, crafted on `source`."""
        del model
        return self.attack(key, self.source, image, label)


@struct.dataclass
class Reseeded(_Around):
    """An attack with other random numbers.

    Attributes:
      attack: The attack.
      seed: Folded into each image's key.
    """

    attack: Any
    seed: jax.Array

    def __call__(self, key, model, image, label=None) -> jax.Array:
        """Returns the adversarial image."""
        return self.attack(jax.random.fold_in(key, self.seed), model, image, label)


def file_name(group: Group, labels: Iterable[str]) -> str:
    """Returns the name of the file that keeps a part of a group."""
    # The labels too: which attacks are in a group may differ from one group to the next.
    text = json.dumps([*group, sorted(labels)])
    digest = f"{zlib.crc32(text.encode()):08x}"  # the same in every process, unlike hash()
    words = f"{group.model}-{group.crafted_against}-{group.family}-{group.epsilon:.4f}-{digest}"
    return re.sub(r"[^\w.\-]", "_", words)


_FIELDS = ("clean_correct", "robust_correct", "flipped", "seconds", "excess")


def _keep(file, results: Mapping[str, PerImage], origin: str) -> None:
    labels = list(results)
    stacked = {f: np.stack([np.asarray(getattr(results[n], f)) for n in labels]) for f in _FIELDS}
    save_arrays(file, {"labels": np.asarray(labels), **stacked}, origin)


def _kept(file, origin: str) -> dict[str, PerImage] | None:
    fields = load_arrays(file, origin)
    if fields is None or not {"labels", *_FIELDS} <= fields.keys():
        return None
    return {
        str(label): PerImage(
            fields["clean_correct"][i],
            fields["robust_correct"][i],
            fields["flipped"][i],
            float(fields["seconds"][i]),
            float(fields["excess"][i]),
        )
        for i, label in enumerate(fields["labels"])
    }
