"""`attack`: one perturbation for all images, from an encoder and some images without labels."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import attacks, disk, report, threats
from robust_ssl.api import inputs
from robust_ssl.api.names import AUTOATTACK, PER_IMAGE, UNIVERSAL
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.attacks.universal import how_to_make_encoder
from robust_ssl.build import Function, near
from robust_ssl.evaluation.analysis.layers import as_value
from robust_ssl.experiment.attack import surrogate_batches
from robust_ssl.keys import check_key
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress
from robust_ssl.types import Classifier, Encoder, Outputs, Threat


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbation:
    """A perturbation for all images, ready to be applied, shown and saved.

    Attributes:
      value: The perturbation as attacks of this package are: ``value(key, model, image)``.
      curve: The objective before each step of its fit, float ``[steps]``; empty for a loaded one.
      seconds: What the fit took, compilation included.
    """

    value: UniversalPerturbation
    curve: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0), repr=False)
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Shows what it is, without its pixels."""
        height, width, _ = self.value.delta.shape
        threat = type(self.value.threat).__name__
        budget = report.budget(float(self.epsilon), threat)
        return f"Perturbation({self.value.name!r}, {height}x{width} pixels, budget {budget})"

    @property
    def epsilon(self) -> float:
        """The budget, pixel units; of a patch its share of the area."""
        threat = self.value.threat
        return float(getattr(threat, "epsilon", getattr(threat, "area", np.nan)))

    def apply(self, images: Any, key: jax.Array | None = None) -> np.ndarray:
        """Returns the attacked images, float32 ``[n, H, W, 3]`` in [0, 1].

        Args:
          images: 8-bit images or floats in [0, 1], ``[n, H, W, 3]``, or one ``[H, W, 3]``.
          key: Draws the place of a patch of random location; None is its canonical place.

        Raises:
          ValueError: If the images are of another size or range, with the line that converts them;
            if the key is none.
        """
        if key is not None:
            check_key(key)
        batch = self._batch_of(images)
        attacked = np.asarray(_apply(self.value, jnp.asarray(inputs.pixels_of(batch)), key))
        return attacked if batch is images else attacked[0]

    def _batch_of(self, images: Any) -> Any:
        """Returns the images themselves, or a batch of the one image that is given."""
        single = getattr(images, "ndim", 4) == 3 and np.shape(images) == self.value.delta.shape
        return np.asarray(images)[None] if single else images

    def numpy(self) -> np.ndarray:
        """Returns what is added to every image (of a patch its canvas), float32 ``[H, W, 3]``."""
        return np.asarray(self.value.delta, np.float32)

    def resized(self, size: int | tuple[int, int]) -> Perturbation:
        """Returns it for images of another size, inside the same budget."""
        return dataclasses.replace(self, value=self.value.resized(size))

    def save(self, path: str | os.PathLike) -> None:
        """Writes one ``.npz`` file that NumPy alone can read; see `load`."""
        self.value.save(pathlib.Path(path))

    def export_npy(self, path: str | os.PathLike) -> None:
        """Writes one ``.npy`` array that PyTorch adds to pixels in [0, 1], float32 ``[3, H, W]``.

        ``(images + torch.from_numpy(numpy.load(path))).clamp(0, 1)`` is then `apply`.

        Raises:
          ValueError: If it is not just added, as a patch is not.
        """
        delta = self.numpy()
        images = np.random.default_rng(0).uniform(size=(4, *delta.shape)).astype(np.float32)
        if np.abs(np.clip(images + delta, 0, 1) - self.apply(images)).max() > 1e-6:
            threat = type(self.value.threat).__name__
            raise ValueError(
                f"a perturbation under {threat} is not just added to an image, and one array does "
                "not say what else happens; give away the images: perturbation.apply(images)"
            )
        content = io.BytesIO()
        np.save(content, np.ascontiguousarray(delta.transpose(2, 0, 1)))
        disk.replace(path, content.getvalue())

    @classmethod
    def load(
        cls, path: str | os.PathLike, threat: Callable[..., Threat] | None = None
    ) -> Perturbation:
        """Reads what `save` wrote; `threat` is the class of a threat of your own."""
        return cls(UniversalPerturbation.load(pathlib.Path(path), threat))

    def plot(self, images: Any = None) -> Any:
        """Draws the images, the same under attack, and the change made visible.

        Args:
          images: As for `apply`, of which the first eight are drawn; None draws it on gray.

        Returns:
          A matplotlib figure; ``.savefig(path)`` writes it.
        """
        gray = np.full((1, *self.value.delta.shape), 0.5, np.float32)
        pixels = gray if images is None else inputs.pixels_of(self._batch_of(images))[:8]
        return report.draw_examples(pixels, self.apply(pixels))


@jax.jit
def _apply(value: UniversalPerturbation, images: jax.Array, key: jax.Array | None) -> jax.Array:
    return value.apply(images, key)


def attack(
    encoder: Any,
    images: Any,
    *,
    epsilon: float = 10 / 255,
    attack: Any = "universal_pgd",
    num_steps: int = 300,
    batch_size: int = 64,
    threat: Callable[[Any], Threat] = threats.Linf,
    seed: int = 0,
    parallel: Parallel | None = None,
    progress: str = "auto",
    **options: Any,
) -> Perturbation:
    """Fits one perturbation that moves the encoder's features of every image.

    It needs no labels and no downstream task: this is what someone can do who has the encoder.

    Args:
      encoder: An `Encoder` (or any model of this package), a shipped name, a path, or a function of
        images that returns `Outputs`; what it closes over is read anew by each call.
      images: Surrogate images, which need not be those of the task: ``uint8`` or float in
        [0, 1], ``[n, H, W, 3]``; `data.Examples`; or a name, such as ``"photo_crops"``.
      epsilon: Budget, pixel units; what `threat` takes.
      attack: A name of ``robust_ssl.list("attacks")`` that is universal, ``"module:function"``,
        or an `attacks.UniversalAttack`.
      num_steps: Steps of the fit.
      batch_size: Images a step; of fewer images the largest power of two.
      threat: Makes a threat of the budget: `threats.Linf`, `threats.L2`, `threats.Patch` (of an
        area).
      seed: Of the start and of the batches.
      parallel: The devices; None is the first one.
      progress: ``"auto"``, or ``"quiet"`` for none.
      **options: Of the attack by name, for example ``step_size=0.01``.

    Returns:
      The perturbation.

    Raises:
      ValueError: If there is no such attack, an option is wrong, or images do not fit the encoder.

    Example:
      >>> perturbation = attack("simclr-cifar10-r18w24", "photo_crops", num_steps=1, batch_size=8,
      ...                       progress="quiet")
      >>> perturbation.apply(np.zeros((2, 32, 32, 3), np.uint8)).shape
      (2, 32, 32, 3)
      >>> perturbation
      Perturbation('universal_pgd', 32x32 pixels, budget 10/255)
    """
    fitted = universal_attack(attack, options)
    if isinstance(threat, str):
        raise ValueError(f"threat= is a class and no name: threat=threats.Linf; got {threat!r}")
    if not callable(threat):
        raise ValueError(
            f"threat= makes a threat of the budget, as threats.Linf does; {threat!r} is one: "
            f"threat=threats.{type(threat).__name__}, epsilon=..."
        )
    epsilon = inputs.one_budget(epsilon, "call attack once for each")
    num_steps = inputs.count(num_steps, "num_steps")
    batch_size, seed = inputs.count(batch_size, "batch_size"), inputs.seed(seed)
    resizing = inputs.resizing_of(encoder)
    encoder, parallel = inputs.encoder_of(encoder), inputs.devices_of(parallel)
    surrogate = inputs.examples_of(images, None, inputs.size_of(encoder), "train", resizing)
    batch_size = inputs.batch_of(batch_size, len(surrogate), parallel)
    _check_outputs(encoder, surrogate.image_shape)
    encoder, parallel = as_value(encoder), parallel.anew_for(encoder, fitted, threat)
    keys, epsilons = attacks.members(seeds=(seed,), epsilons=(epsilon,))
    begun = time.perf_counter()
    name = getattr(fitted, "name", type(fitted).__name__)
    with Progress(progress).stage(f"attack {name}", num_steps, batch_size) as bar:
        result = attacks.fit(
            fitted,
            encoder,
            surrogate_batches(surrogate, num_steps, batch_size, seed=seed, parallel=parallel),
            keys=keys,
            epsilons=epsilons,
            image_shape=surrogate.image_shape,
            parallel=parallel,
            threat=threat,
            on_step=lambda step, values: bar.update(step + 1, loss=values[0]),
        )
    return Perturbation(result.member(0), result.curve[:, 0], time.perf_counter() - begun)


def _check_outputs(encoder: Any, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError for a plain function that returns no `Outputs`, or no features of each."""
    if isinstance(encoder, Encoder | Classifier):
        return
    returned = inputs.answer_of(encoder, 2, image_shape)
    name = getattr(encoder, "__name__", type(encoder).__name__)
    if not isinstance(returned, Outputs):
        raise ValueError(
            f"the encoder {name} returns {inputs.what_is(returned)} for 2 images and no "
            f"robust_ssl.Outputs; {how_to_make_encoder(name)}"
        )
    features = returned.features
    if np.ndim(features) != 2 or len(features) != 2:
        raise ValueError(
            f"the encoder {name} returns {inputs.what_is(features)} of features for 2 images; they "
            "must be [n, numbers], a row for each image"
        )


def refuse_class(attack: Any) -> None:
    """Raises ValueError for an attack's class in place of a value of it."""
    if isinstance(attack, type):
        raise ValueError(f"{attack.__name__} is a class; make one: {attack.__name__}(...)")


def universal_attack(named: Any, options: Mapping[str, Any]) -> Any:
    """Returns a universal attack by name, or the given one.

    Raises:
      ValueError: If there is none of this name, or it attacks each image by itself.
    """
    if not isinstance(named, str):
        refuse_class(named)
        if options:
            raise ValueError(f"{sorted(options)} are options of an attack by name; set them in it")
        if not hasattr(named, "init") or not hasattr(named, "step"):
            raise ValueError(f"{named!r} does not fit one perturbation for all images")
        return named
    if named in PER_IMAGE or named == AUTOATTACK:
        raise ValueError(
            f"{named!r} attacks each image of a classifier by itself: robust_ssl.measure("
            f"classifier, images, labels, attacks={named!r}); universal are {', '.join(UNIVERSAL)}"
        )
    if named not in UNIVERSAL and ":" not in named:
        raise ValueError(
            f"no attack {named!r}{near(named, [*UNIVERSAL, *PER_IMAGE])}; see "
            'robust_ssl.list("attacks")'
        )
    entries = {"function": UNIVERSAL.get(named, named), **options}
    return Function.read(entries, f"attack {named!r}")()
