"""The function that is served: is this image suspicious, how much, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.evaluation import to_pixels
from robust_ssl.pixels import check_images
from robust_ssl.screening.fusion import Fused

NOTHING = "nothing"


class Screened(NamedTuple):
    """What a screen says of a batch.

    Attributes:
      suspicious: Bool ``[n]``.
      score: How surprising the image would be among clean ones to the detector that is surprised
        the most, nats, float ``[n]``.
      reason: The detector that is surprised the most, by image; "nothing" where none is.
    """

    suspicious: np.ndarray
    score: np.ndarray
    reason: list[str]


@struct.dataclass
class Screen:
    """Screens the images of one classifier; `robust_ssl.load_screen` reads one.

    Attributes:
      model: The classifier.
      fused: The detectors, calibrated on clean images.
      threshold: In nats; an image above is suspicious.
      key: That detectors draw with, the same for all images.

    Example:
      >>> from robust_ssl.screening import Calibrated, Spectrum, Surprise, fit_spectrum
      >>> images = jax.random.uniform(jax.random.key(0), (64, 8, 8, 3))
      >>> spectrum = fit_spectrum(None, None, images, None, num_bands=4)
      >>> clean = [float(spectrum.score(None, None, image)) for image in images]
      >>> members = {"spectrum": Calibrated(spectrum, Surprise.fit(np.asarray(clean)))}
      >>> screen = Screen(None, Fused(members), 5.0, jax.random.key(0))
      >>> screened = screen(np.full((1, 8, 8, 3), 128, np.uint8))
      >>> screened.suspicious.tolist(), screened.reason
      ([True], ['spectrum'])
    """

    model: Any
    fused: Fused
    threshold: jax.Array | float
    key: jax.Array

    def __call__(self, images: np.ndarray | jax.Array) -> Screened:
        """Screens images, each by itself.

        Args:
          images: uint8, or float pixels in [0, 1], ``[n, H, W, 3]``.

        Raises:
          ValueError: If the shape is another, or pixels are not in [0, 1].
        """
        images = np.asarray(images)
        check_images(images)
        if not len(images):
            raise ValueError("there are no images to screen")
        names = sorted(self.fused.members)  # as a compiled function orders them
        pixels = to_pixels(jnp.asarray(images))
        nats = np.asarray(_nats(self.fused, self.key, self.model, pixels))
        score = nats.max(axis=1, initial=0.0)
        reason = [
            names[place] if value > 0 else NOTHING
            for place, value in zip(nats.argmax(axis=1), score, strict=True)
        ]
        # NaN is not below any threshold: what cannot be judged is not let through.
        return Screened(~(score <= float(self.threshold)), score, reason)


@jax.jit
def _nats(fused: Fused, key: jax.Array, model: Any, images: jax.Array) -> jax.Array:
    def one(image):
        own = fused.scores(key, model, image)
        return jnp.stack([own[name] for name in sorted(own)])

    return jax.vmap(one)(images)
