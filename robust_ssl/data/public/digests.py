"""Digests: of an archive's bytes, and of a set's pixels whatever their order."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable

import numpy as np

_CHUNK = 2**20


def file_digests(path: pathlib.Path) -> dict[str, str]:
    """Returns a file's ``"sha256"`` and ``"md5"`` in hexadecimal."""
    # MD5 is all that some archives are known by; it is no defense against forgery.
    hashes = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in hashes.values():
                digest.update(chunk)
    return {kind: digest.hexdigest() for kind, digest in hashes.items()}


def image_digest(image: np.ndarray, label: int) -> bytes:
    r"""Returns the SHA-256 of one image, ``uint8 [H, W, 3]``, with its label (-1: none).

    Hashed are the text ``"{label} {height}x{width}\n"`` and the pixels by row.
    """
    height, width, _ = image.shape
    head = f"{int(label)} {height}x{width}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(image).tobytes()).digest()


def pixel_digest(images: Iterable[bytes]) -> str:
    """Returns the digest of a split: the SHA-256 of all its `image_digest`, sorted.

    So it does not depend on the order, and copies can be compared that were stored in different
    ones.

    Example:
      >>> black, white = (np.full((1, 1, 3), value, np.uint8) for value in (0, 255))
      >>> one, other = image_digest(black, 0), image_digest(white, 1)
      >>> pixel_digest([one, other]) == pixel_digest([other, one])
      True
    """
    return hashlib.sha256(b"".join(sorted(images))).hexdigest()
