"""Encoded pictures to pixels, with Pillow."""

from __future__ import annotations

import errno
import functools
import io
import os
import pathlib
import stat
from typing import Any

import numpy as np

from robust_ssl.data.resizing import FIT, Resizing

# The only formats that Pillow is asked for: it tells a picture by its content, and would hand
# PostScript in a file called .png to Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
)
# Formats of pictures that are not read: a folder of these is no folder without pictures.
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jxr", ".tga", ".exr", ".hdr", ".pfm"),
    *(".svg", ".eps", ".ps", ".pdf", ".psd", ".ico", ".dcm", ".nii", ".fits", ".npy", ".npz"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)
_SIGNATURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n", b"P5 ", b"P6 "),
)
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_DEPTH = 258  # the TIFF tag: bits of each channel
# Pillow's own errors have no number.  A file that one may not read is no more there tomorrow.
_OF_THE_PICTURE = (None, errno.EACCES, errno.EPERM)


class UnreadableError(ValueError):
    """Data that cannot be read where they are needed: whoever trains on them must not go on."""


class LostError(UnreadableError):
    """A file that was there and cannot be opened: the disk is to blame and not the picture."""


def decode(
    picture: bytes | pathlib.Path | np.ndarray,
    image_size: int | None,
    where: str,
    resizing: Resizing | None = None,
) -> np.ndarray:
    """Returns one picture as ``uint8 [H, W, 3]``, at `image_size` if that is given.

    Gray and palette pictures become RGB, alpha is dropped, and a photograph is turned as its EXIF
    tag says.  A picture of another size is resized as `resizing` says; without one it is scaled
    with Lanczos' filter so that its shorter side fits, and the center is kept.

    Args:
      picture: An encoded file, its path, or pixels ``uint8 [H, W, 3]``.
      image_size: Height and width, pixels; None leaves the picture as it is stored.
      where: What an error calls it.
      resizing: How it gets its size; None is `FIT`.

    Raises:
      UnreadableError: If the file is broken or no regular file, has another format than `FORMATS`,
        several frames, or more than 8 bits a channel.
      LostError: If it is gone, or its disk is.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray):
        return resize(picture, image_size, resizing)
    try:
        if isinstance(picture, pathlib.Path):
            _check_regular(picture)
        source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        with Image.open(source, formats=_formats()) as opened:
            refusal = _refusal(opened)
            if resizing is not None and image_size is not None:
                resizing.drafted(opened, image_size)
            pixels = None if refusal else _upright_rgb(opened)
    except Exception as error:  # what broken data and metadata make their readers raise
        if isinstance(error, OSError) and error.errno not in _OF_THE_PICTURE:
            raise LostError(
                f"{where} cannot be opened: {error.strerror}; bring it back, or see to its disk, "
                "and run the same command again"
            ) from error
        raise UnreadableError(
            f"{where} cannot be read as an image: {error}; replace or remove it"
        ) from error
    if refusal:
        raise UnreadableError(f"{where} {refusal}")
    return resize(pixels, image_size, resizing)


def to_rgb(picture: Any, where: str) -> np.ndarray:
    """Returns a Pillow image as ``uint8 [H, W, 3]``, upright by its EXIF tag.

    Args:
      picture: A ``PIL.Image.Image``.
      where: What an error calls it.

    Raises:
      ValueError: If it has several frames, or more than 8 bits a channel.

    Example:
      >>> from PIL import Image
      >>> to_rgb(Image.new("L", (4, 2), 7), "an example").shape
      (2, 4, 3)
    """
    refusal = _refusal(picture)
    if refusal:
        raise ValueError(f"{where} {refusal}")
    return _upright_rgb(picture)


def _refusal(picture: Any) -> str:
    """Says why a picture that can be read is not taken; nothing if it is."""
    if _is_deep(picture):  # Pillow would cut to the upper 8 bits without a word
        return "has more than 8 bits a channel; convert it to 8-bit RGB"
    # An MPO is a JPEG with previews of itself behind it.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    return f"has {frames} frames; save the one that is meant as a picture" if frames > 1 else ""


def _upright_rgb(picture: Any) -> np.ndarray:
    from PIL import ImageOps

    if picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("P", "PA"):  # straight to RGB, Pillow warns of a transparent color
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))


def starts_like_picture(file: str | os.PathLike) -> bool:
    """Whether the first bytes of a regular file are those of a format that is read."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(16)
    except OSError:
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    # Two letters are too few to tell a bitmap by; its reserved bytes are zero.
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(_SIGNATURES) or webp or bitmap


def looks_like_one(file: pathlib.Path) -> bool:
    """Whether a file is a picture by its name, of a format that is not read too, or by content."""
    if file.name.startswith(".") or not file.is_file():
        return False
    known = file.suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES)
    return known or starts_like_picture(file)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with; it fails on a name it does not know."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_regular(file: pathlib.Path) -> None:
    # A pipe waits for ever, and /dev/zero never ends.
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError("it is no regular file")


def _is_deep(picture: Any) -> bool:
    """Whether a picture has more than 8 bits a channel, also where Pillow's mode hides it."""
    if picture.mode.startswith(("I", "F")):
        return True
    tiles = [] if not hasattr(picture, "tile") else picture.tile
    # Of a tile the raw mode is a text or the first of several arguments.
    arguments = [args if isinstance(args, tuple) else (args,) for *_, args in tiles]
    if picture.format == "PNG":
        return any(str(args[0]).partition(";")[2].startswith("16") for args in arguments)
    if picture.format == "PPM":  # the second argument is the largest value
        return any(isinstance(n, int) and n > 255 for args in arguments for n in args[1:2])
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_DEPTH, (1,))) > 8
    return False


def resize(
    image: np.ndarray, image_size: int | None, resizing: Resizing | None = None
) -> np.ndarray:
    """Returns ``uint8 [H, W, 3]`` brought to `image_size`, by default with Lanczos, center kept.

    Example:
      >>> resize(np.full((10, 20, 3), 7, np.uint8), 5).shape
      (5, 5, 3)
    """
    # Not by the longer side: encoders take squares, and bars at the edges are no pixels of the set.
    return image if image_size is None else (resizing or FIT)(image, image_size)
