"""The provenance of an audit: the ten checks of the encoder, and whose encoder is deployed."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import disk, provenance, settings
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.score import saved_classifiers
from robust_ssl.models import ensembles
from robust_ssl.provenance.check import NAMES, OPINIONS, absent
from robust_ssl.types import Classifier, Encoder

_FILES = NAMES.index("files")
_log = logging.getLogger(__name__)


def check(context: Context) -> None:
    """Raises unless the lock can be read and a classifier from elsewhere may fit the encoder.

    Raises:
      SettingsError: If the classifier's encoder is another network.
      ValueError: If the lock is none.
      OSError: If the lock cannot be read.
    """
    _lock(context)
    classifier = _from_elsewhere(context)
    if classifier is None or _source(context) is None:
        return
    for own in _encoders(classifier):
        unlike = _unlike(own, context.encoder)
        if unlike:
            raise settings.SettingsError(
                f"config.classifiers.{context.plan.audit.secured}: its encoder, {own.name!r}, is "
                f"another network than the audited one, {context.encoder.name!r}: {unlike}. Audit "
                "the encoder that it was fine-tuned from (--encoder, config.encoder)"
            )
    if reason := _other_encoder(context):
        _log.warning("%s: that its files equal the lock is not decided", reason)


def examine(context: Context) -> dict[str, Any] | None:
    """Returns the ten checks of the encoder and their counts; None where they cannot be made here.

    An opinion is among the checks and counts as no failure: it closes no gate.
    """
    source = _source(context)
    if source is None:
        return None
    options = context.plan.encoder.options
    checks = list(provenance.examine(source, lock=_lock(context), **options))
    reason = _other_encoder(context)
    # Files of another encoder say nothing of those that are deployed, unless they are bad as well.
    if reason and checks[_FILES].outcome == "pass":
        checks[_FILES] = absent("files", f"{reason}: whether its files are locked is not known")
    deciding = [one.outcome for one in checks if one.name not in OPINIONS]
    outcomes = [one.outcome for one in checks]
    return {
        "checks": provenance.as_json(checks),
        "passed": outcomes.count("pass"),
        "failed": deciding.count("fail"),
        "absent": outcomes.count("absent"),
    }


def _lock(context: Context) -> pathlib.Path | None:
    """Returns the whole path of the encoder's lock, which is read before anything is trained."""
    given = context.plan.audit.lock

    def readable() -> pathlib.Path | None:
        path = None if given is None else disk.expanded(given).absolute()
        if path is not None:
            provenance.read_lock(path)
        return path

    return context.once("audit lock", readable)


def _source(context: Context) -> str | None:
    """Returns where the encoder comes from, as provenance is asked for; None for a function."""
    return None if context.plan.encoder.is_pretrained else context.plan.encoder.path


def _from_elsewhere(context: Context) -> Classifier | None:
    secured = context.plan.audit.secured
    return None if secured in context.plan.recipes else saved_classifiers(context)[secured]


def _encoders(classifier: Classifier) -> list[Encoder]:
    return [one.encoder for one in ensembles.ensemble_members(classifier) or (classifier,)]


def _unlike(own: Encoder, audited: Encoder) -> str:
    """Returns in which parameters two networks differ; ``""`` where they may be the same."""
    shapes = [
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
        for leaves, _ in (
            jax.tree_util.tree_flatten_with_path(one.variables["params"]) for one in (own, audited)
        )
    ]
    paths = sorted({path for path, _ in shapes[0].items() ^ shapes[1].items()})
    return f"{len(paths)} of its parameters differ in shape, {paths[0]} first" if paths else ""


def _other_encoder(context: Context) -> str:
    """Returns why the secured classifier seems to be of another encoder; ``""`` where it does not.

    Fine-tuning changes every weight and keeps the name, so a name is all that is left to go by.
    """
    secured, audited = context.plan.audit.secured, context.encoder.name
    classifier = _from_elsewhere(context)
    if classifier is not None:
        names = sorted({own.name for own in _encoders(classifier)} - {audited})
        return f"{secured} was fine-tuned from {names[0]!r}, not {audited!r}" if names else ""
    lineage = context.plan.recipes[secured].lineage()
    same = (None, context.plan.encoder)
    if any(recipe.public_encoder() not in same for recipe in lineage):
        return f"{secured} is fine-tuned from an encoder of its own, not {audited!r}"
    return ""
