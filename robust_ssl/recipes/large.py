"""Secure fine-tuning of large encoders: adapters, or the last blocks only."""

from __future__ import annotations

from robust_ssl.recipes.parts import FROZEN, ON_ADVERSARIAL, Entries, pgd


def lora(
    rank: int = 8, alpha: float = 16.0, rate: float = 1e-3, epsilon: float = 8 / 255
) -> Entries:
    """Returns adversarial fine-tuning of low-rank adapters in a frozen ViT's attention.

    Args:
      rank: Of the adapters.
      alpha: Their product is multiplied by ``alpha / rank``.
      rate: Learning rate of the adapters.
      epsilon: Budget of the inner attack, pixel units.

    References:
      Hu et al., "LoRA", ICLR 2022; Madry et al., ICLR 2018, for the losses and the attack.
    """
    return {
        **FROZEN,
        "losses": ON_ADVERSARIAL["losses"],
        "attack": pgd(epsilon),
        "lora": {"rank": rank, "alpha": alpha, "rate": rate},
    }


def last_blocks(count: int = 2, epsilon: float = 8 / 255) -> Entries:
    """Returns adversarial fine-tuning of an encoder's last blocks and the head.

    Args:
      count: How many blocks move.
      epsilon: Budget of the inner attack, pixel units.

    References:
      He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, Section 4.3, for
      fine-tuning the last blocks; Madry et al., ICLR 2018, for the losses and the attack.
    """
    return {
        "losses": ON_ADVERSARIAL["losses"],
        "attack": pgd(epsilon),
        "batch_statistics": "frozen",  # those of frozen norms must not drift
        "last_blocks": count,
    }
