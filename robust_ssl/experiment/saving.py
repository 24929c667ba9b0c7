"""What a finished training leaves: a classifier that is read without its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax

from robust_ssl import provenance, weights
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory, json_ready

_log = logging.getLogger(__name__)


def builder_of(context: Context, recipe: Recipe):
    """Returns the builder of that encoder and its options, where it is not of this package."""
    source = recipe.public_encoder()
    return context.own_builder if source is None else source.own_builder


def save_classifier(
    context: Context,
    stage: StageDirectory,
    classifier: Classifier,
    results: Mapping[str, Any],
    recipe: Recipe,
) -> None:
    """Writes ``classifier/``, which `weights.load_classifier` reads without this run's config."""
    if jax.process_index():
        return
    builder, options = builder_of(context, recipe)
    card = {"stage": stage.path.name, "downstream": context.downstream[0].name, **results}
    weights.save_classifier(
        classifier,
        stage.path / "classifier",
        json_ready(card),
        builder=builder,
        options=options or None,
    )
    provenance.write_beside(stage.path / "classifier", made_from=_origin(context, recipe))


def _origin(context: Context, recipe: Recipe) -> list[provenance.Source]:
    """Returns the public encoder that a recipe began with, where it lies on disk."""
    source = recipe.public_encoder() or context.plan.encoder
    path = context.workdir / "pretrain" / "encoder" if source.is_pretrained else source.path
    if path is None or (source.is_pretrained and not path.exists()):
        return []  # `secure` has its encoder from a caller
    moving = source.options.get("allow_moving")
    try:
        return [provenance.open_source(path, allow_moving=moving)]
    except (OSError, ValueError) as error:  # no reason to lose what was trained
        _log.warning("the statement beside the classifier names no encoder: %s", error)
        return []
