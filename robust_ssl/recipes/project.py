"""Gen-AF, as here and as released, and the defenses of this project."""

from __future__ import annotations

from robust_ssl.recipes.parts import (
    ATTACKS,
    CLEAN,
    FROZEN,
    LOSSES,
    ON_ADVERSARIAL,
    Entries,
    fgsm,
    pgd,
)


def gen_af_stage1(
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    adv_ratio: float = 0.7,
    weight: float = 20.0,
) -> Entries:
    """Returns Gen-AF's first stage: two rates, adversarial images, genetic regularization.

    Args:
      epsilon: Budget of the inner attack, pixel units.
      step_size: Of its steps, pixel units.
      num_steps: Of the inner attack.
      adv_ratio: Weight of adversarial cross-entropy; clean has the rest.
      weight: Of genetic regularization, per image, whatever the batch.

    References:
      Zhou et al., "Securely Fine-tuning Pre-trained Encoders Against Adversarial Examples", IEEE
      S&P 2024.
    """
    regularization = {"function": f"{LOSSES}genetic_regularization", "weight": weight}
    return {
        "adv_ratio": adv_ratio,
        "losses": {"genetic_regularization": regularization},
        "attack": pgd(epsilon, step_size, num_steps),
        "batch_statistics": "both",
    }


def gen_af(images: int = 256, num_steps: int = 10, tolerance: float | None = 0.01) -> Entries:
    """Returns Gen-AF's second stage: only the robust-redundant layers move, on clean images.

    Args:
      images: Validation images that layers are measured on.
      num_steps: Ascent steps in each layer's weights.
      tolerance: Robust accuracy that the interpolation guard may lose; None: no guard.

    References:
      Zhou et al., IEEE S&P 2024.
    """
    return {
        "start": "gen_af_stage1",
        "losses": dict(CLEAN),
        "select": {"images": images, "num_steps": num_steps, "layers": 0.2},
        "batch_statistics": "frozen",
        "tolerance": tolerance,
    }


def gen_af_unguarded(images: int = 256, num_steps: int = 10) -> Entries:
    """Returns Gen-AF's second stage as published: without the interpolation guard, which is ours.

    Args:
      images: As in `gen_af`.
      num_steps: As in `gen_af`.

    References:
      Zhou et al., IEEE S&P 2024.
    """
    return gen_af(images, num_steps, tolerance=None)


def gen_af_released_stage1() -> Entries:
    """Returns Gen-AF's first stage with the numbers of its released code.

    Adversarial images alone, its swapped regularization, 20 times the sum over pairs of a batch of
    256, a tenth of our encoder rate, its inner attack.
    """
    regularization = {"function": f"{LOSSES}genetic_regularization", "weight": 5120.0}
    return {
        "losses": {
            **ON_ADVERSARIAL["losses"],
            "genetic_regularization": {**regularization, "compat": "released"},
        },
        "attack": {**pgd(0.03, 0.007), "random_start": False},
        "rates": {"encoder/**": 1e-4, "head/**": 5e-3},
        "batch_statistics": "both",
        "scored": False,
    }


def gen_af_released() -> Entries:
    """Returns Gen-AF's second stage after the released code's first, without the guard."""
    return {
        "start": "gen_af_released_stage1",
        "select": {"layers": 0.2},
        "batch_statistics": "frozen",
    }


def shallow_stable(epsilon: float = 8 / 255) -> Entries:
    """Returns clean fine-tuning whose second block stays, under a one-step attack on that block."""
    attack = {
        "function": f"{ATTACKS}DriftPGD",
        "epsilon": epsilon,
        "step_size": epsilon,
        "num_steps": 1,
        "layer": 1,
    }
    return {
        "losses": {**CLEAN, "drift": {"function": f"{LOSSES}feature_drift", "layers": (1,)}},
        "attack": attack,
        "compare_with_pretrained": True,
        "best": "last",
    }


def universal(epsilon: float = 8 / 255, clean_share: float = 0.5) -> Entries:
    """Returns fine-tuning against a pool of universal perturbations, at the price of clean images.

    Args:
      epsilon: Budget, pixel units.
      clean_share: Share of images that stay as they are.

    References:
      Shafahi et al., "Universal Adversarial Training", AAAI 2020, for one perturbation.
    """
    pool = {"function": "robust_ssl.finetuning:UniversalPool", "epsilon": epsilon, "size": 4}
    return {**ON_ADVERSARIAL, "attack": {**pool, "clean_share": clean_share}}


def universal_band(low: float, high: float) -> Entries:
    """Returns `universal` with perturbations of a band of frequencies.

    Args:
      low: Its lower edge, cycles per pixel.
      high: Its upper edge.
    """
    recipe = universal()
    threat = {"function": "robust_ssl.threats:Band", "threat": "robust_ssl.threats:Linf"}
    return {
        **recipe,
        "attack": {**recipe["attack"], "threat": {**threat, "low": low, "high": high}},
    }


def universal_shallow() -> Entries:
    """Returns `universal` whose second block stays at the public encoder's."""
    drift = {"function": f"{LOSSES}feature_drift", "layers": (1,)}
    return {
        **universal(),
        "losses": {**ON_ADVERSARIAL["losses"], "drift": drift},
        "compare_with_pretrained": True,
    }


def universal_trades() -> Entries:
    """Returns `universal` with the losses of TRADES."""
    return {
        **universal(clean_share=0.0),
        "losses": {**CLEAN, "trades_kl": {"function": f"{LOSSES}trades_kl", "weight": 3.0}},
        "batch_statistics": "both",
    }


def warm_fgsm(epsilon: float = 8 / 255) -> Entries:
    """Returns one-step adversarial fine-tuning from a head that fits.

    Args:
      epsilon: Budget, pixel units.

    Ratios of 0.5 and 0.7 were tried on training images that no comparison has; 0.6 was taken
    between them, untried.
    """
    return _warm(fgsm(epsilon))


def warm_pgd() -> Entries:
    """Returns adversarial fine-tuning by PGD from a head that fits."""
    return _warm(pgd())


def _warm(attack: Entries) -> Entries:
    return {"start": "baseline", "adv_ratio": 0.6, "attack": attack, "batch_statistics": "both"}


def other_encoder(encoder: str = "byol-cifar10-r18w16") -> Entries:
    """Returns the baseline on another public encoder, for an ensemble."""
    return {**FROZEN, "encoder": encoder, "scored": False}


def ensemble() -> Entries:
    """Returns what is accurate, what is robust and another encoder; the most certain decides.

    ZePAD's idea, built from its description.
    """
    return {"members": ("baseline", "gen_af", "other_encoder")}
