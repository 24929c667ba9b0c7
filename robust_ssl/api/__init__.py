"""The three calls: attack an encoder, measure a classifier, secure an encoder.

They are thin over the values that a run has: no config, no working directory, one device unless
more are given.  What they return can be saved, plotted, and passed on.
"""

from robust_ssl.api.attacking import Perturbation, attack
from robust_ssl.api.measuring import Result, measure
from robust_ssl.api.names import Names, list_names
from robust_ssl.api.securing import secure

__all__ = ["Names", "Perturbation", "Result", "attack", "list_names", "measure", "secure"]
