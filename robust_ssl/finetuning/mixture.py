"""Gen-AF's first-stage losses with their weights, of which clean cross-entropy alone is one."""

from __future__ import annotations

import functools

from robust_ssl import losses as losses_lib
from robust_ssl.types import Loss


def mixed_losses(
    adv_ratio: float,
    regularization_weight: float = 0.0,
    *,
    on: str = "logits",
    compat: str = "corrected",
) -> dict[str, tuple[Loss, float]]:
    r"""Returns Gen-AF's first-stage losses with their weights.

    .. math:: (1 - r)\,\mathrm{CE}(x) + r\,\mathrm{CE}(\tilde x) + w\,\mathrm{GR}

    A term of weight 0 is left out, so ``mixed_losses(0)`` is usual fine-tuning and needs no attack.

    Args:
      adv_ratio: `r` in [0, 1]; the released code has 1, no clean cross-entropy.
      regularization_weight: `w`, at least 0.  The step takes the mean over images where the
        released code adds up all pairs: its 20 at batch 256 is ``20 * 256`` here.
      on: ``"logits"`` or ``"features"``, as in `genetic_regularization`.
      compat: ``"corrected"`` or ``"released"``, as in `genetic_regularization`.  The released
        code's other choices are arguments elsewhere: the attack's (budget 0.03, step 0.007, no
        random start, un-normalized inputs) belong to the attack and the encoder.  Its leak of the
        attack's gradients into the update is a bug that pure functions cannot have.

    Returns:
      Name to (loss, weight), as `make_step` takes them.

    Raises:
      ValueError: If `adv_ratio` is outside [0, 1] or the weight is negative.

    Example:
      >>> {name: weight for name, (_, weight) in mixed_losses(0.25, 2.0).items()}
      {'clean_cross_entropy': 0.75, 'adversarial_cross_entropy': 0.25, 'genetic_regularization': 2.0}

    References:
      Zhou et al., IEEE S&P 2024, first stage.
    """  # noqa: E501
    if not 0 <= adv_ratio <= 1:
        raise ValueError(f"adv_ratio must be in [0, 1], got {adv_ratio}")
    if not 0 <= regularization_weight < float("inf"):
        raise ValueError(f"regularization_weight must be at least 0, got {regularization_weight}")
    regularization = functools.partial(losses_lib.genetic_regularization, on=on, compat=compat)
    terms = {
        "clean_cross_entropy": (losses_lib.clean_cross_entropy, 1 - adv_ratio),
        "adversarial_cross_entropy": (losses_lib.adversarial_cross_entropy, adv_ratio),
        "genetic_regularization": (regularization, regularization_weight),
    }
    return {name: (loss, weight) for name, (loss, weight) in terms.items() if weight > 0}
