"""Fine-tuning that meets the task first, then a growing budget; each variant one factor away."""

from __future__ import annotations

from robust_ssl.recipes.parts import ATTACKS, LOSSES, ON_ADVERSARIAL, Entries, fgsm, pgd


def ramp_fgsm(epsilon: float = 8 / 255, start: float = 0.4, end: float = 0.6) -> Entries:
    """Returns fine-tuning on clean images, then under a growing budget, then under all of it.

    One step of attack, a linear head, rates that fall along a cosine.  Where there is no budget no
    attack is computed.  No epoch is chosen, so nothing is validated: the last one is kept.

    Args:
      epsilon: The whole budget, pixel units.
      start: Share of the training that is clean.
      end: Share of the training after which the budget is whole.

    References:
      Ngnawe et al., "Epsilon-Scheduling", ICLR 2026, with APGD and 0.25 to 0.75 of 50 epochs; the
      one step is Wong et al., ICLR 2020.
    """
    return {
        **ON_ADVERSARIAL,
        "head": "linear",
        "attack": fgsm(epsilon),
        "ramp": {"start": start, "end": end},
        "decay": "cosine",
        "best": "last",
    }


def ramp_from_start(epsilon: float = 8 / 255, end: float = 1.0) -> Entries:
    """Returns `ramp_fgsm` whose budget grows from the first step on: no training is clean.

    Args:
      epsilon: The whole budget, pixel units.
      end: Share of the training after which the budget is whole.
    """
    return ramp_fgsm(epsilon, start=0.0, end=end)


def ramp_pgd(epsilon: float = 8 / 255) -> Entries:
    """Returns `ramp_fgsm` with PGD of ten steps, against an attacker who sees the weights.

    Args:
      epsilon: The whole budget, pixel units.
    """
    return {**ramp_fgsm(epsilon), "attack": pgd(epsilon)}


def ramp_pgd2(epsilon: float = 8 / 255) -> Entries:
    """Returns `ramp_fgsm` with PGD of two steps, between the two in cost.

    Args:
      epsilon: The whole budget, pixel units.
    """
    return {**ramp_fgsm(epsilon), "attack": pgd(epsilon, 0.625 * epsilon, num_steps=2)}


def ramp_nfgsm(epsilon: float = 8 / 255) -> Entries:
    """Returns `ramp_fgsm` whose step starts from twice the budget of noise, and is not projected.

    Args:
      epsilon: The whole budget, pixel units.

    References:
      de Jorge et al., "Make Some Noise", NeurIPS 2022.
    """
    return {**ramp_fgsm(epsilon), "attack": {"function": f"{ATTACKS}NFGSM", "epsilon": epsilon}}


def ramp_ema(decay: float = 0.95, epsilon: float = 8 / 255) -> Entries:
    """Returns `ramp_fgsm` of which the average of the last updates' weights is kept.

    Args:
      decay: Of the average, by update; after 60 updates 5 % of the start are left at 0.95.
      epsilon: The whole budget, pixel units.
    """
    return {**ramp_fgsm(epsilon), "ema": decay}


def ramp_teacher(weight: float = 1.0, epsilon: float = 8 / 255) -> Entries:
    """Returns `ramp_fgsm` that is pulled to the logits which `full` has for the clean image.

    Args:
      weight: Of the pull.
      epsilon: The whole budget, pixel units.

    References:
      Cui et al., "Learnable Boundary Guided Adversarial Training", ICCV 2021.
    """
    pull = {"function": f"{LOSSES}teacher_distance", "weight": weight}
    return {
        **ramp_fgsm(epsilon),
        "losses": {**ON_ADVERSARIAL["losses"], "teacher_distance": pull},
        "teacher": "full",
    }
