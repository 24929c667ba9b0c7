"""What an attacker maximizes: ``AttackInputs -> scalar``, the mean over the batch.

An objective is a plain function of named arrays, so one's own is written in a few lines::

    def towards_zero(inputs):
        return -jnp.mean(jnp.sum(inputs.adversarial.features**2, axis=-1))

Every array carries a batch axis (of one in a per-image attack), and the batch is the *global* one
whatever the number of devices.  Options are set with `functools.partial`; make the partial once and
reuse it, since two equal partials are two different functions to the compiler.
"""

from robust_ssl.objectives.features import feature_cosine_distance, feature_l2, info_nce
from robust_ssl.objectives.labelled import (
    cross_entropy,
    dlr,
    dlr_targeted,
    margin,
    margin_targeted,
)
from robust_ssl.objectives.layers import (
    activation,
    activation_distance,
    activation_energy,
    block_names,
    fused_energy,
    log_activation_norms,
    negative_dispersion,
)
from robust_ssl.objectives.pixels import (
    advencoder_paper,
    advencoder_released,
    high_frequency_change,
    pixel_l2,
)
from robust_ssl.objectives.predictions import kl_divergence
from robust_ssl.objectives.vectors import safe_norm, unit_vectors

__all__ = [
    "activation",
    "activation_distance",
    "activation_energy",
    "advencoder_paper",
    "advencoder_released",
    "block_names",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "feature_cosine_distance",
    "feature_l2",
    "fused_energy",
    "high_frequency_change",
    "info_nce",
    "kl_divergence",
    "log_activation_norms",
    "margin",
    "margin_targeted",
    "negative_dispersion",
    "pixel_l2",
    "safe_norm",
    "unit_vectors",
]
