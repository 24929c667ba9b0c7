"""What recipes share: inner attacks, frozen encoders, losses."""

from __future__ import annotations

from typing import Any

LOSSES, ATTACKS = "robust_ssl.losses:", "robust_ssl.attacks:"
PREPROCESSING = "robust_ssl.models.preprocessing:"

Entries = dict[str, Any]

FROZEN: Entries = {
    "rates": {"encoder/**": "freeze", "head/**": 5e-3},
    "batch_statistics": "frozen",  # else batch norm would drift under a frozen encoder
}
CLEAN: Entries = {"clean_cross_entropy": f"{LOSSES}clean_cross_entropy"}
ON_ADVERSARIAL: Entries = {
    "losses": {"adversarial_cross_entropy": f"{LOSSES}adversarial_cross_entropy"},
    "batch_statistics": "adversarial",
}


def pgd(epsilon: float = 8 / 255, step_size: float = 2 / 255, num_steps: int = 10) -> Entries:
    """Returns PGD as training uses it, which needs the last image and not the best.

    Args:
      epsilon: Budget, pixel units.
      step_size: Length of a step, pixel units.
      num_steps: Gradient steps.

    References:
      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    return {
        "function": f"{ATTACKS}PGD",
        "epsilon": epsilon,
        "step_size": step_size,
        "num_steps": num_steps,
        "keep_best": False,
    }


def fgsm(epsilon: float = 8 / 255) -> Entries:
    """Returns one step from a random start, of 1.25 times the budget.

    References:
      Wong et al., "Fast is Better than Free", ICLR 2020.
    """
    return pgd(epsilon, 1.25 * epsilon, num_steps=1)


def towards_kl(attack: Entries) -> Entries:
    """Returns an attack that raises the divergence from the clean prediction."""
    return {**attack, "objective": "robust_ssl.objectives:kl_divergence"}
