"""Defenses of the literature."""

from __future__ import annotations

from robust_ssl.recipes.parts import (
    ATTACKS,
    CLEAN,
    FROZEN,
    LOSSES,
    ON_ADVERSARIAL,
    PREPROCESSING,
    Entries,
    fgsm,
    pgd,
    towards_kl,
)


def baseline() -> Entries:
    """Returns usual fine-tuning: Gen-AF's head on the public encoder, which is frozen."""
    return dict(FROZEN)


def linear_probe() -> Entries:
    """Returns a linear head on the frozen public encoder."""
    return {**FROZEN, "head": "linear"}


def full() -> Entries:
    """Returns fine-tuning of all layers on clean images, what costs are relative to."""
    return {}


def lp_ft() -> Entries:
    """Returns fine-tuning of all layers, slowly, from a linear probe.

    References:
      Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022.
    """
    return {"start": "linear_probe", "rates": {"encoder/**": 1e-4, "head/**": 1e-3}}


def l2_sp(weight: float = 0.1) -> Entries:
    """Returns fine-tuning that is pulled to where it started.

    Args:
      weight: Of the squared distance; the paper searches 0.001 to 1.

    References:
      Li et al., "Explicit Inductive Bias for Transfer Learning", ICML 2018.
    """
    return {"l2_sp": weight}


def pruned(share: float = 0.5) -> Entries:
    """Returns fine-tuning of an encoder whose smallest weights are zero and stay so."""
    return {"prune": share}


def jpeg() -> Entries:
    """Returns the baseline behind JPEG compression of its images."""
    return {"start": "baseline", "epochs": 0, "preprocess": f"{PREPROCESSING}JPEG"}


def quantized() -> Entries:
    """Returns the baseline behind fewer levels of brightness."""
    return {"start": "baseline", "epochs": 0, "preprocess": f"{PREPROCESSING}Quantize"}


def smoothed() -> Entries:
    """Returns the baseline behind a blur."""
    return {"start": "baseline", "epochs": 0, "preprocess": f"{PREPROCESSING}Smooth"}


# --- Adversarial training -----------------------------------------------------------------------


def pgd_at(epsilon: float = 8 / 255) -> Entries:
    """Returns adversarial training with PGD.

    References:
      Madry et al., ICLR 2018.
    """
    return {**ON_ADVERSARIAL, "attack": pgd(epsilon)}


def trades(epsilon: float = 8 / 255, weight: float = 6.0) -> Entries:
    """Returns TRADES: clean cross-entropy, and a divergence that the attack raises.

    Args:
      epsilon: Budget, pixel units.
      weight: 1 / lambda of the paper.

    References:
      Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019.
    """
    divergence = {"function": f"{LOSSES}trades_kl", "weight": weight}
    return {
        "losses": {**CLEAN, "trades_kl": divergence},
        "attack": towards_kl(pgd(epsilon)),
        "batch_statistics": "both",
    }


def mart(epsilon: float = 8 / 255, weight: float = 5.0) -> Entries:
    """Returns MART: misclassified images count more.

    References:
      Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
      ICLR 2020.
    """
    divergence = {"function": f"{LOSSES}misclassification_kl", "weight": weight}
    boosted = f"{LOSSES}boosted_cross_entropy"
    return {
        "losses": {"boosted_cross_entropy": boosted, "misclassification_kl": divergence},
        "attack": pgd(epsilon),
        "batch_statistics": "both",
    }


def fgsm_rs(epsilon: float = 8 / 255) -> Entries:
    """Returns adversarial training with one step from a random start.

    References:
      Wong et al., ICLR 2020.
    """
    return {**ON_ADVERSARIAL, "attack": fgsm(epsilon)}


def free_at(epochs: int, epsilon: float = 8 / 255, replays: int = 4) -> Entries:
    """Returns adversarial training for free: each batch is shown several times in a row.

    Args:
      epochs: Passes over the data that the gradients may cost; each batch is shown `replays` times.
      epsilon: Budget, pixel units.
      replays: 8 in the paper; with few epochs 4 leave enough passes over the data.

    References:
      Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019.
    """
    attack = {"function": "robust_ssl.finetuning:FreeReplays", "epsilon": epsilon}
    attack |= {"replays": replays}
    return {**ON_ADVERSARIAL, "attack": attack, "epochs": -(-epochs // replays)}


def alf() -> Entries:
    """Returns adversarial training of a linear head alone (ALF)."""
    return {**FROZEN, "head": "linear", "losses": ON_ADVERSARIAL["losses"], "attack": pgd()}


def aff() -> Entries:
    """Returns TRADES of all layers under a linear head (AFF)."""
    return {**trades(), "head": "linear"}


def roli() -> Entries:
    """Returns adversarial training from a robust linear head.

    References:
      Hua et al., "Initialization Matters for Adversarial Transfer Learning", CVPR 2024.
    """
    return {**ON_ADVERSARIAL, "start": "alf", "attack": pgd()}


def twins() -> Entries:
    """Returns adversarial training whose batch norm sees the pre-trained statistics too.

    References:
      Liu et al., "TWINS", CVPR 2023.
    """
    return {**ON_ADVERSARIAL, "attack": pgd(), "batch_statistics": "twins"}


def rift() -> Entries:
    """Returns clean fine-tuning of the most robust-redundant layer of an adversarial training.

    References:
      Zhu et al., "Improving Generalization of Adversarial Training via Robust Critical
      Fine-Tuning", ICCV 2023.
    """
    return {
        "start": "pgd_at",
        "select": {"layers": 1},
        "batch_statistics": "frozen",
        "tolerance": 0.01,
    }


def fare_encoder() -> Entries:
    """Returns the encoder of FARE: features under attack stay at the public encoder's.

    References:
      Schlarmann et al., "Robust CLIP", ICML 2024.
    """
    drift = {**pgd(), "function": f"{ATTACKS}DriftPGD"}
    drift.pop("keep_best")
    return {
        "losses": {"preservation": f"{LOSSES}feature_preservation"},
        "attack": drift,
        "rates": {"encoder/**": 1e-3, "head/**": "freeze"},
        "batch_statistics": "adversarial",
        "compare_with_pretrained": True,
        "best": "last",
        "scored": False,
    }


def fare() -> Entries:
    """Returns a head on the encoder of `fare_encoder`, which is frozen."""
    return {**FROZEN, "start": "fare_encoder"}
