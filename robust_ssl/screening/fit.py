"""A screen in one call: detectors fitted, calibrated, and a threshold chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from robust_ssl.evaluation import to_pixels
from robust_ssl.parallel import Parallel
from robust_ssl.pixels import check_images
from robust_ssl.screening.detector import Detector, Known, scores
from robust_ssl.screening.disagreement import fit_disagreement
from robust_ssl.screening.fusion import Calibrated, Fused, Surprise
from robust_ssl.screening.neighbors import fit_neighbors
from robust_ssl.screening.screen import Screen
from robust_ssl.screening.spectrum import fit_spectrum
from robust_ssl.screening.squeeze import fit_squeeze
from robust_ssl.screening.statistics import threshold
from robust_ssl.screening.template import fit_template
from robust_ssl.types import Model


def fit_screen(
    key: jax.Array,
    model: Model,
    images: np.ndarray,
    calibration: np.ndarray,
    *,
    known: Known | None = None,
    detectors: Mapping[str, Callable[..., Detector]] | None = None,
    false_alarms: float = 0.01,
    parallel: Parallel | None = None,
    batch_size: int = 250,
) -> Screen:
    """Fits the detectors of a classifier, and chooses the threshold of their fusion.

    Args:
      key: That detectors draw with.
      model: The screened classifier.
      images: Clean images that detectors are fitted on, uint8 or pixels, ``[n, H, W, 3]``.
      calibration: Other clean images, by which scores are calibrated and the threshold is chosen;
        the model should not be trained on them.
      known: Known attacks and a second classifier.  Without them no template and no disagreement.
      detectors: Functions ``fit(key, model, images, known)`` by name; None takes all of the package
        that `known` is enough for.
      false_alarms: Share of the calibration images that may be suspicious.
      parallel: The devices; None is all.
      batch_size: Images at a time.

    Returns:
      The screen, for `robust_ssl.save_screen`.

    Raises:
      ValueError: If images are of another kind, there are none, or fewer than the rate of false
        alarms needs: one of a hundred takes at least a hundred images.

    Example:
      >>> images = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8)
      >>> screen = fit_screen(jax.random.key(0), None, images[:100], images[100:],
      ...                     detectors={"spectrum": fit_spectrum})
      >>> int(screen(images[100:]).suspicious.sum())
      1
    """
    if not 0 < false_alarms < 1 or len(calibration) * false_alarms < 1:
        raise ValueError(
            f"false_alarms={false_alarms:g} of {len(calibration)} calibration images is less than "
            f"one image; give at least {int(np.ceil(1 / max(false_alarms, 1e-6)))}, or more alarms"
        )
    parallel = Parallel.create() if parallel is None else parallel
    check_images(images)
    pixels = to_pixels(images)
    known = Known.of({}, pixels) if known is None else known
    detectors = usual_detectors(known) if detectors is None else detectors
    members, nats = {}, []
    for name, fit in detectors.items():
        detector = fit(key, model, pixels, known)
        clean = scores(detector, key, model, calibration, parallel=parallel, batch_size=batch_size)
        surprise = Surprise.fit(clean)
        members[name] = Calibrated(detector, surprise)
        nats.append(np.asarray(surprise(clean)))
    fused = np.max(nats, axis=0)
    return Screen(model, Fused(members), threshold(fused, false_alarms), key)


def usual_detectors(known: Known) -> dict[str, Callable[..., Detector]]:
    """Returns the package's detectors by name, without those that `known` is not enough for."""
    detectors = {"squeeze": fit_squeeze, "neighbors": fit_neighbors, "spectrum": fit_spectrum}
    if known.names:
        detectors["template"] = fit_template
    if known.public is not None:
        detectors["disagreement"] = fit_disagreement
    return detectors
