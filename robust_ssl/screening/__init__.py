"""Does an input look attacked?  Detectors, their fusion, and attacks that know them."""

from robust_ssl.screening.adaptive import Adaptive
from robust_ssl.screening.bench import Bench, Case, Images
from robust_ssl.screening.detector import Detector, Known, scores
from robust_ssl.screening.disagreement import Disagreement, fit_disagreement
from robust_ssl.screening.evaluate import FUSED, Evaluation, evaluate, parts_of
from robust_ssl.screening.evasion import Evasion, UniversalEvasion
from robust_ssl.screening.fit import fit_screen
from robust_ssl.screening.fusion import Calibrated, Fused, Surprise
from robust_ssl.screening.neighbors import Neighbors, fit_neighbors
from robust_ssl.screening.screen import Screen, Screened
from robust_ssl.screening.spectrum import Spectrum, fit_spectrum
from robust_ssl.screening.squeeze import Squeeze, fit_squeeze
from robust_ssl.screening.statistics import JUDGED, auc, auc_interval, threshold
from robust_ssl.screening.template import Template, fit_template

__all__ = [
    "FUSED",
    "JUDGED",
    "Adaptive",
    "Bench",
    "Calibrated",
    "Case",
    "Detector",
    "Disagreement",
    "Evaluation",
    "Evasion",
    "Fused",
    "Images",
    "Known",
    "Neighbors",
    "Screen",
    "Screened",
    "Spectrum",
    "Squeeze",
    "Surprise",
    "Template",
    "UniversalEvasion",
    "auc",
    "auc_interval",
    "evaluate",
    "fit_disagreement",
    "fit_neighbors",
    "fit_screen",
    "fit_spectrum",
    "fit_squeeze",
    "fit_template",
    "parts_of",
    "scores",
    "threshold",
]
