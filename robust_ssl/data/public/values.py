"""What is known of a public data set, as values."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Files = Mapping[str, pathlib.Path]  # archives on this machine, by the name they are published under
Example = tuple[int | str, dict[str, Any]]  # TFDS's key, and one value for each feature


@dataclasses.dataclass(frozen=True)
class Archive:
    """One published file.

    Attributes:
      url: Where it is.
      size: Bytes; None where nobody has said.
      digest: ``"sha256:..."`` or ``"md5:..."``; None where none is known, and then the first one
        seen is trusted.

    Example:
      >>> Archive("https://example.org/data/pictures.zip").file
      'pictures.zip'
    """

    url: str
    size: int | None = None
    digest: str | None = None

    @property
    def file(self) -> str:
        """The name it is published under."""
        return self.url.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Content:
    """What the archives hold, still to be read.

    Attributes:
      classes: Names of the classes, by the feature that has them; ``"label"`` is one of them.
      splits: A function for each split that reads its examples; an image is ``uint8 [H, W, 3]``
        or a picture's file as it was published, a label of -1 stands for none.
      texts: Features that are texts.
    """

    classes: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, Callable[[], Iterator[Example]]]
    texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A public data set: where it comes from and what it becomes.

    Attributes:
      name: What one asks for.
      stored: The prepared set's name, with its configuration: TFDS's own where TFDS has the set.
      version: Of the prepared set; TFDS's where TFDS has it.
      images: How many images each split has.
      classes: How many classes.
      image_size: Height and width in pixels, for people.
      archives: The ways to get it; each is a tuple of archives, all of which are needed.  The first
        is downloaded, any is taken from a folder.
      read: Turns the archives into content.
      pixels: The digest of each split's pixels and labels where it is known; see `pixel_digest`.
      proven: Whether `pixels` were computed from the published bytes.  Then others are an error,
        else a warning.
    """

    name: str
    stored: str
    version: str
    images: Mapping[str, int]
    classes: int
    image_size: str
    archives: tuple[tuple[Archive, ...], ...]
    read: Callable[[Files], Content]
    pixels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    proven: bool = False

    @property
    def size(self) -> int | None:
        """Bytes to download; None where a size is not known."""
        sizes = [archive.size for archive in self.archives[0]]
        return None if None in sizes else sum(sizes)
