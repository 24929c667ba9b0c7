"""Where in the network and at which frequencies an attack works, and on which models."""

from robust_ssl.evaluation.analysis.filtering import filtered, filtering_curves
from robust_ssl.evaluation.analysis.layers import (
    linear_cka,
    per_layer_stability,
    sensitivity_by_tap,
)
from robust_ssl.evaluation.analysis.spectra import (
    EDGES,
    FourierMap,
    HarmfulBand,
    energy_by_band,
    fourier_sensitivity,
    harm_by_band,
    most_harmful_band,
)
from robust_ssl.evaluation.analysis.transfer import transfer_matrix

__all__ = [
    "EDGES",
    "FourierMap",
    "HarmfulBand",
    "energy_by_band",
    "filtered",
    "filtering_curves",
    "fourier_sensitivity",
    "harm_by_band",
    "linear_cka",
    "most_harmful_band",
    "per_layer_stability",
    "sensitivity_by_tap",
    "transfer_matrix",
]
