"""How a picture of any size becomes a square: the evaluation transforms of timm and its like."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from robust_ssl.build import Count, Natural, near, read_entries

MODES = ("shorter", "squash", "longest", "fit")


@dataclasses.dataclass(frozen=True)
class Resizing:
    """Scales a picture and takes the square in its middle, with Pillow.

    Attributes:
      mode: ``"shorter"``: the shorter side gets `side`.  ``"squash"``: both do.  ``"longest"``: the
        longer one does, and what is missing is filled.  ``"fit"``: the largest square of the middle
        is scaled in one step.
      side: Of the scaled picture, pixels; None is `crop`.
      crop: Height and width of the square, pixels; None is the ``image_size`` of whoever loads.
      interpolation: One of Pillow's filters, by its name in lower case.
      offset: Where half a pixel before the square goes: ``"nearest"`` even one (torchvision, timm,
        open_clip) or ``"down"`` (transformers).
      fill: Color of what ``"longest"`` fills, 0 to 255.
      sized: Whether a picture that has the size already is treated like others (``"resize"``) or
        taken as it is (``"keep"``), because somebody has prepared it.
      draft: Whether a JPEG is decoded at a half, a quarter or an eighth of its size where twice the
        scaled side is left, as Pillow's thumbnails are.  Faster, and other pixels.

    Raises:
      ValueError: If `side` is below `crop`, which only ``"longest"`` could fill, or has no meaning.

    Example:
      >>> resizing = Resizing("shorter", side=8, crop=6)
      >>> resizing(np.zeros((20, 40, 3), np.uint8)).shape
      (6, 6, 3)
    """

    mode: Literal["shorter", "squash", "longest", "fit"] = "shorter"
    side: Count | None = None
    crop: Count | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = (
        "bicubic"
    )
    offset: Literal["nearest", "down"] = "nearest"
    fill: tuple[Natural, ...] = (0, 0, 0)
    sized: Literal["resize", "keep"] = "resize"
    draft: bool = False

    def __post_init__(self):
        if self.mode == "fit" and self.side is not None:
            raise ValueError("mode 'fit' scales to the square itself: leave out side")
        if len(self.fill) != 3 or max(self.fill) > 255:
            raise ValueError(f"fill must be three numbers of 0 to 255, got {list(self.fill)}")
        if self.crop is not None:
            self._check_side(self.crop)

    def _check_side(self, size: int) -> None:
        if self.side is not None and self.side < size and self.mode != "longest":
            raise ValueError(
                f"side is {self.side} and the square {size} pixels, which is more than the scaled "
                "picture has; take a larger side, or mode 'longest', which fills"
            )

    @classmethod
    def read(cls, value: Any, where: str) -> Resizing:
        """Reads a `Resizing`, a mapping of its fields, or the name of a mode.

        Raises:
          ValueError: If a field or a name is not known, with near ones.
        """
        if isinstance(value, Resizing):
            return value
        if isinstance(value, str):
            if value not in MODES:
                raise ValueError(f"{where}: there is no mode {value!r}{near(value, MODES)}")
            # Alone, the word is what the package does where nothing else is said.
            value = {"mode": value} | ({"interpolation": "lanczos"} if value == "fit" else {})
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{where} must be one of {', '.join(MODES)}, or a mapping with mode, side, "
                f"interpolation and so on, got {value!r}"
            )
        return read_entries(cls, value, where)

    def size(self, image_size: int | None) -> int:
        """Returns the side of the square, pixels.

        Raises:
          ValueError: If it is not known, or `crop` and `image_size` contradict each other.
        """
        if self.crop is None and image_size is None:
            raise ValueError("resizing needs to know the square's size: give image_size or crop")
        if None not in (self.crop, image_size) and self.crop != image_size:
            raise ValueError(
                f"resizing has crop={self.crop} and image_size is {image_size}; leave out one"
            )
        size = self.crop or image_size
        self._check_side(size)
        return size

    def drafted(self, picture: Any, image_size: int | None) -> None:
        """Tells Pillow's JPEG reader how small it may decode a picture that is not loaded yet.

        Only powers of two are decoded so, so both sides keep at least the asked ones.
        """
        if self.draft:
            least = 2 * (self.side or self.size(image_size))
            picture.draft("RGB", (least, least))

    def __call__(self, image: np.ndarray, image_size: int | None = None) -> np.ndarray:
        """Returns ``uint8 [size, size, 3]`` of an image ``uint8 [H, W, 3]``."""
        from PIL import Image, ImageOps

        size = self.size(image_size)
        if self.sized == "keep" and image.shape[:2] == (size, size):
            return image
        filter_ = Image.Resampling[self.interpolation.upper()]
        picture = Image.fromarray(image)
        if self.mode == "fit":
            return np.asarray(ImageOps.fit(picture, (size, size), method=filter_))
        scaled = picture.resize(self._scaled(*picture.size, self.side or size), filter_)
        return self._middle(np.asarray(scaled), size)

    def _scaled(self, width: int, height: int, side: int) -> tuple[int, int]:
        """Width and height of the scaled picture, rounded as torchvision and timm do it."""
        if self.mode == "squash":
            return side, side
        if self.mode == "longest":
            ratio = max(width / side, height / side)
            return max(round(width / ratio), 1), max(round(height / ratio), 1)
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side

    def _middle(self, pixels: np.ndarray, size: int) -> np.ndarray:
        missing = [max(size - length, 0) for length in pixels.shape[:2]]
        if any(missing):
            edges = [(n // 2, n - n // 2) for n in missing]
            channels = [
                np.pad(pixels[..., c], edges, constant_values=self.fill[c]) for c in range(3)
            ]
            pixels = np.stack(channels, axis=-1)
        top, left = (self._start(length - size) for length in pixels.shape[:2])
        return np.ascontiguousarray(pixels[top : top + size, left : left + size])

    def _start(self, rest: int) -> int:
        return rest // 2 if self.offset == "down" else round(rest / 2)


# What the package does where nobody says more: Lanczos, the center kept, in one step.
FIT = Resizing("fit", interpolation="lanczos", sized="keep")
