"""Frequencies: where a perturbation has its energy, and where a model is hurt.

All in cycles per pixel, as in `robust_ssl.frequencies`, so that image sizes can be compared.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import frequencies
from robust_ssl.evaluation.analysis.layers import as_value
from robust_ssl.evaluation.metrics import compiled, predictions, to_pixels
from robust_ssl.keys import check_key
from robust_ssl.parallel import Parallel
from robust_ssl.pixels import check_images
from robust_ssl.types import Model

# Bands of equal width up to the finest stripes, then the corner that only diagonals reach.
EDGES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 0.71)


def check_edges(edges: Sequence[float]) -> None:
    """Raises ValueError unless `edges` are at least two rising frequencies from 0 upwards."""
    rising = all(low < high for low, high in itertools.pairwise(edges))
    if len(edges) < 2 or edges[0] < 0 or not rising:
        raise ValueError(
            f"edges of bands must be two or more rising frequencies in cycles per pixel, got "
            f"{tuple(edges)}"
        )


def energy_by_band(deltas: jax.Array, edges: Sequence[float] = EDGES) -> jax.Array:
    r"""Splits the energy of a perturbation over radial bands of spatial frequency.

    .. math:: E_b = \frac{1}{HW} \sum_{c} \sum_{r(u, v) \in b} |\hat\delta_c(u, v)|^2

    The energy of a band is that of `frequencies.band_pass` of the perturbation to it; by Parseval's
    theorem bands that cover [0, 0.71] add up to :math:`\|\delta\|_2^2`.

    Args:
      deltas: Perturbations in pixel units, float ``[..., H, W, channels]``.
      edges: Rising frequencies in cycles per pixel; band i is ``[edges[i], edges[i + 1])``.

    Returns:
      Float ``[..., len(edges) - 1]``, at least 0, in squared pixel units.

    Raises:
      ValueError: If the edges do not rise.

    Example:
      >>> stripes = jnp.zeros((8, 8, 1)).at[:, ::2].set(1.0)  # energy 32: mean 0.5, stripes 0.5
      >>> energy_by_band(stripes, (0.0, 0.1, 0.4, 0.71)).round(3).tolist()
      [16.0, 0.0, 16.0]
    """
    check_edges(edges)
    *_, height, width, _ = deltas.shape
    power = jnp.sum(jnp.square(frequencies.transform(deltas)), axis=-1)
    radius = frequencies.radii(height, width)
    inside = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges)]
    weights = jnp.stack(inside).astype(power.dtype)
    # In full precision: accelerators round the factors of a product otherwise.
    return jnp.einsum("...hw,bhw->...b", power, weights, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class FourierMap:
    """How much each single spatial frequency hurts a model.

    Attributes:
      vertical: Frequencies of the rows, cycles per pixel, rising, ``[rows]``.
      horizontal: Frequencies of the columns, the same, ``[columns]``.
      harm: Float ``[rows, columns]``; point-symmetric.
      clean: The same measure without noise.
      measure: ``"error_rate"`` in [0, 1], or ``"feature_drift"``, at least 0.
      norm: L2 norm of the noise in each channel, pixel units.
    """

    vertical: np.ndarray
    horizontal: np.ndarray
    harm: np.ndarray
    clean: float
    measure: str
    norm: float

    @property
    def radius(self) -> np.ndarray:
        """Frequency of each entry of `harm`, cycles per pixel."""
        return np.hypot(self.vertical[:, None], self.horizontal[None, :])


def fourier_sensitivity(
    model: Model,
    images: np.ndarray | jax.Array,
    labels: np.ndarray | jax.Array | None = None,
    *,
    key: jax.Array,
    norm: float = 4.0,  # Yin et al. 2019, Sec. 4: for CIFAR-10, 32 pixels
    stride: int = 1,
    chunk: int = 8,
    parallel: Parallel | None = None,
    on_chunk: Callable[[int, int], None] | None = None,
) -> FourierMap:
    r"""Measures how much noise of a single spatial frequency hurts a model.

    For every frequency the real wave :math:`U` with :math:`\|U\|_2 = 1` is added to each channel of
    each image with a random sign, :math:`x + s_c\,\nu\,U`, and cut to [0, 1].  With labels, harm
    is the share of wrong predictions; without, the mean over images of
    :math:`\|f(\tilde x) - f(x)\| / \|f(x)\|` of the features, which needs no classifier.

    A wave and its mirror image are the same, so half of the plane is measured, ``H W / 2 + 2``
    frequencies; `stride` 2 measures every second one in both directions, a quarter of them.

    Args:
      model: Any model; with logits if there are labels.
      images: uint8, or float pixels in [0, 1], ``[n, H, W, 3]``.
      labels: Integer ``[n]``; None measures features.
      key: Of the signs.  Image i under frequency f always gets the same, whatever the stride,
        chunk or devices.
      norm: L2 norm of the noise in each channel, pixel units.  The same noise per pixel at another
        size is ``norm * size / 32``.
      stride: Distance between measured frequencies, in units of one cycle per image.
      chunk: Frequencies at once; memory grows with ``chunk * n``.
      parallel: Spreads the images over devices; None uses the first device.
      on_chunk: Called with (frequencies done, frequencies in all).

    Returns:
      The map, with frequency 0 in the middle.

    Raises:
      ValueError: If `norm`, `stride` or `chunk` is not positive, images are of another kind, or
        labels are no integers, one for each.

    References:
      Yin et al., "A Fourier Perspective on Model Robustness in Computer Vision", NeurIPS 2019,
      Section 3.
    """
    check_key(key)
    if not 0 < norm < np.inf or stride < 1 or chunk < 1:
        raise ValueError(
            f"norm, stride and chunk must be positive, got {norm}, {stride} and {chunk}"
        )
    check_images(images)
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels must be integers [{len(images)}], one for each image, got {labels.dtype} "
                f"{labels.shape}"
            )
    parallel = (parallel or Parallel.create(num_devices=1)).anew_for(model)
    model = parallel.replicate(as_value(model))
    n, height, width = np.shape(images)[:3]
    rows, columns, numbers, place = _half_plane(height, width, stride)
    batch = {"images": np.asarray(images), "indices": np.arange(n, dtype=np.int32)}
    plain = compiled(parallel, _plain)(model, {"images": batch["images"]})
    if labels is None:
        batch["features"] = plain["features"]
    else:
        batch["labels"] = np.asarray(labels, np.int32)
    measure = compiled(parallel, _harm)
    harm = []
    for start in range(0, len(numbers), chunk):
        # The last chunk repeats the last frequency, so that one shape is compiled.
        chosen = numbers[np.minimum(np.arange(start, start + chunk), len(numbers) - 1)]
        waves = norm * _waves(chosen, height, width)
        constants = parallel.replicate((key, model, waves, chosen.astype(np.int32)))
        harm.append(measure(constants, batch).astype(np.float64).mean(0))
        if on_chunk is not None:
            on_chunk(min(start + chunk, len(numbers)), len(numbers))
    # Features do not drift without noise.
    clean = 0.0 if labels is None else float(np.mean(plain["answers"] != batch["labels"]))
    return FourierMap(
        vertical=rows / height,
        horizontal=columns / width,
        harm=np.concatenate(harm)[place].reshape(len(rows), len(columns)),
        clean=clean,
        measure="feature_drift" if labels is None else "error_rate",
        norm=float(norm),
    )


def _plain(model: Model, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    images = to_pixels(batch["images"])
    outputs = model(images)
    answers = {} if outputs.logits is None else {"answers": predictions(model, images)}
    return {"features": outputs.features, **answers}


def _harm(constants, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the harm of every wave to every image of this device, ``[n, waves]``."""
    key, model, waves, numbers = constants
    images = to_pixels(batch["images"])
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["indices"])

    def under(wave, number):
        signs = jax.vmap(lambda k: jax.random.rademacher(jax.random.fold_in(k, number), (3,)))(keys)
        noise = signs.reshape(-1, 1, 1, 3) * wave.reshape(1, *wave.shape, 1)
        # Cut, as any image is, so where pixels are at their ends less of the noise arrives.
        noisy = jnp.clip(images + noise, 0.0, 1.0)
        if "labels" in batch:
            return (predictions(model, noisy) != batch["labels"]).astype(jnp.float32)
        before = batch["features"]
        change = jnp.linalg.norm(model(noisy).features - before, axis=1)
        return change / jnp.maximum(jnp.linalg.norm(before, axis=1), 1e-12)

    return jax.vmap(under, out_axes=1)(waves, numbers)


def _half_plane(height: int, width: int, stride: int):
    """Lists the frequencies of which no two are mirror images.

    Returns:
      Rows and columns of the map in cycles per image, the number of every frequency to be
      measured, and where among these each entry of the map finds its own.
    """
    rows, columns = (_cycles(size, stride) for size in (height, width))
    v, h = (axis.reshape(-1) for axis in np.meshgrid(rows, columns, indexing="ij"))
    number = (v % height) * width + h % width
    # Mirror images get the smaller of their two numbers, so that one of each is left.
    mirrored = (-v % height) * width + (-h) % width
    return rows, columns, *np.unique(np.minimum(number, mirrored), return_inverse=True)


def _cycles(size: int, stride: int) -> np.ndarray:
    cycles = np.arange(-(size // 2), (size + 1) // 2)
    return cycles[cycles % stride == 0]


def _waves(numbers: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the real wave of unit length of each frequency, float32 ``[n, H, W]``."""
    v, h = (axis.reshape(-1, 1, 1) for axis in np.divmod(numbers, width))
    y, x = np.arange(height).reshape(1, -1, 1), np.arange(width).reshape(1, 1, -1)
    # Divided by their measured length: where a wave is its own mirror image the cosine is longer.
    waves = np.cos(2 * np.pi * (v * y / height + h * x / width))
    return (waves / np.sqrt(np.sum(waves**2, axis=(1, 2), keepdims=True))).astype(np.float32)


def harm_by_band(fourier_map: FourierMap, edges: Sequence[float] = EDGES) -> np.ndarray:
    """Returns the mean harm of the frequencies of each band; NaN where the map has none in it."""
    check_edges(edges)
    harm, radius = fourier_map.harm, fourier_map.radius
    pairs = itertools.pairwise(edges)
    inside = [harm[(radius >= low) & (radius < high)] for low, high in pairs]
    return np.array([harm.mean() if harm.size else np.nan for harm in inside])


@dataclasses.dataclass(frozen=True)
class HarmfulBand:
    """The band of frequencies that hurts a model the most.

    Attributes:
      low: Cycles per pixel, inclusive.
      high: Cycles per pixel, exclusive; ``frequencies.band_pass(noise, low, high)`` is noise of
        this band.
      harm: Mean harm of its frequencies, in the measure of the map.
    """

    low: float
    high: float
    harm: float


def most_harmful_band(fourier_map: FourierMap, edges: Sequence[float] = EDGES) -> HarmfulBand:
    """Returns the band whose frequencies, at equal L2 norm, hurt the model the most on average.

    Of equal bands it is the lowest.

    Raises:
      ValueError: If no band holds a frequency of the map.

    Example:
      >>> cycles = np.array([-0.5, 0.0])
      >>> example = FourierMap(cycles, cycles, np.array([[0.4, 0.2], [0.6, 0.1]]), 0.1, "", 1.0)
      >>> most_harmful_band(example, (0.0, 0.25, 0.6, 0.71))
      HarmfulBand(low=0.25, high=0.6, harm=0.4)
    """
    harm = harm_by_band(fourier_map, edges)
    if np.isnan(harm).all():
        raise ValueError(f"no frequency of the map is in a band of {tuple(edges)}")
    worst = int(np.nanargmax(harm))
    return HarmfulBand(float(edges[worst]), float(edges[worst + 1]), float(harm[worst]))
