"""AutoAttack: the ensemble of attacks without parameters, from this package's parts.

Each function returns what `robust_ssl.evaluation.score_in_turn` takes: attacks by name, in order,
a list where one attack has several targets.
"""

from __future__ import annotations

from robust_ssl.attacks.apgd import APGD
from robust_ssl.attacks.fab import FABT
from robust_ssl.attacks.square import Square
from robust_ssl.objectives import labelled
from robust_ssl.types import Attack, Threat

MOST_TARGETS = 9  # Croce and Hein 2020, Section 6
DRAWS = 20  # of a randomized model; their code, version "rand"


def standard(threat: Threat, num_classes: int) -> dict[str, list[Attack]]:
    """Returns AutoAttack's standard ensemble: APGD-CE, targeted APGD, targeted FAB, Square.

    Targets are the likeliest wrong classes, at most 9.  With fewer than 4 classes there is no
    targeted DLR objective; targeted APGD then raises the margin and is named ``"apgd-t-margin"``.

    Args:
      threat: `Linf` or `L2`.
      num_classes: Number of logits of the model, at least 2.

    Returns:
      ``{"apgd-ce": [..], "apgd-t": [..], "fab-t": [..], "square": [..]}``; the members of a list
      have one structure, so that each list compiles once.

    Raises:
      ValueError: If there are fewer than 2 classes.

    Example:
      >>> from robust_ssl import threats
      >>> {name: len(members) for name, members in standard(threats.Linf(8 / 255), 10).items()}
      {'apgd-ce': 1, 'apgd-t': 9, 'fab-t': 9, 'square': 1}

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", ICML 2020, Section 6; targeted versions as in their code.
    """
    ranks = _ranks(num_classes)
    targeted, objective = "apgd-t", labelled.dlr_targeted
    if num_classes < 4:
        targeted, objective = "apgd-t-margin", labelled.margin_targeted
    return {
        "apgd-ce": [APGD(threat)],
        targeted: [APGD(threat, objective, rank=rank) for rank in ranks],
        "fab-t": [FABT(threat, rank=rank) for rank in ranks],
        "square": [Square(threat, rescale_schedule=False)],
    }


def apgd(threat: Threat, num_classes: int) -> dict[str, list[Attack]]:
    """Returns the first two attacks of the standard ensemble: APGD-CE and targeted APGD.

    They take a third of its time.  What they leave, FAB and Square seldom take; where gradients
    are masked they may, so this is no AutoAttack and not to be called so.

    Arguments and errors are those of `standard`.

    Example:
      >>> from robust_ssl import threats
      >>> list(apgd(threats.Linf(8 / 255), 10))
      ['apgd-ce', 'apgd-t']
    """
    return dict(list(standard(threat, num_classes).items())[:2])


def rand(threat: Threat, num_classes: int) -> dict[str, list[Attack]]:
    """Returns AutoAttack for randomized models: APGD on two objectives, over 20 draws a step.

    The model must have a method ``with_key`` (see `robust_ssl.attacks.apgd.draw`).  With two
    classes there is no DLR objective; the margin takes its place, named ``"apgd-margin"``.

    Arguments and errors are those of `standard`.

    Example:
      >>> from robust_ssl import threats
      >>> list(rand(threats.L2(0.5), 10))
      ['apgd-ce', 'apgd-dlr']
    """
    _ranks(num_classes)
    name, objective = "apgd-dlr", labelled.dlr
    if num_classes < 3:
        name, objective = "apgd-margin", labelled.margin
    return {"apgd-ce": [APGD(threat, eot=DRAWS)], name: [APGD(threat, objective, eot=DRAWS)]}


def _ranks(num_classes: int) -> list[int]:
    if num_classes < 2:
        raise ValueError(
            f"AutoAttack needs a model with at least 2 classes, got {num_classes}: with one class "
            "no prediction can be wrong"
        )
    return list(range(1, min(MOST_TARGETS, num_classes - 1) + 1))
