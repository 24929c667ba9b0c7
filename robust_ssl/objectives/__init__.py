"""What an attacker maximises: ``AttackInputs -> scalar``, the mean over the batch.

An objective is a plain function of named arrays, so one's own is written in a few lines:

    def towards_zero(inputs):
        return -jnp.mean(jnp.sum(inputs.adversarial.features**2, axis=-1))

Every array carries a batch axis (of one in a per-image attack), and the batch is the *global* one
whatever the number of devices.  Options are set with `functools.partial`; make the partial once and
reuse it, since two equal partials are two different functions to the compiler.
"""

from robust_ssl.objectives.features import feature_cosine_distance, feature_l2, info_nce
from robust_ssl.objectives.labelled import cross_entropy, margin
from robust_ssl.objectives.pixels import (
    advencoder_paper,
    advencoder_released,
    high_frequency_change,
    pixel_l2,
)
from robust_ssl.objectives.vectors import safe_norm, unit_vectors

__all__ = [
    "advencoder_paper",
    "advencoder_released",
    "cross_entropy",
    "feature_cosine_distance",
    "feature_l2",
    "high_frequency_change",
    "info_nce",
    "margin",
    "pixel_l2",
    "safe_norm",
    "unit_vectors",
]
