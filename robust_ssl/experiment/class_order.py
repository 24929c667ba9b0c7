"""What the logits of a classifier from elsewhere stand for, held against the test split."""

from __future__ import annotations

import logging

from robust_ssl import data
from robust_ssl.experiment.context import Context
from robust_ssl.models import in_order_of
from robust_ssl.types import Classifier

_log = logging.getLogger(__name__)


def in_order_of_test(context: Context, name: str, classifier: Classifier) -> Classifier:
    """Returns a classifier whose logits come in the order of the test split's classes.

    Where one of the two has no names but numbers, they are taken in their order, with a warning.

    Args:
      context: The run.
      name: Of the classifier in the config.
      classifier: The classifier.

    Raises:
      ValueError: If its classes are others.
    """
    mine, asked = classifier.class_names, context.test.class_names
    if mine == asked or (mine and len(mine) != len(asked)):
        return classifier  # the second is refused with the number of logits
    if not mine or data.is_numbered(mine) or data.is_numbered(asked):
        _log.warning(
            "config.classifiers.%s: %s; class_names beside its path says what they stand for",
            name,
            data.taken_in_order(mine, asked),
        )
        return classifier
    if sorted(mine) == sorted(asked):
        _log.info("config.classifiers.%s: its logits are put in the test split's order", name)
        return in_order_of(classifier, asked)
    raise ValueError(
        f"the logits of the classifier stand for other classes than those of {context.test.name}: "
        f"{data.difference(mine, asked)}; if they mean the same, say so with class_names beside "
        "its path, one for each logit"
    )
