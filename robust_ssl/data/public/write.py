"""A set's content into TFDS's own format, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from robust_ssl.data import pictures
from robust_ssl.data.public.digests import image_digest, pixel_digest
from robust_ssl.data.public.values import Content, PublicSet
from robust_ssl.progress import Bar, Progress


def write(
    public: PublicSet, content: Content, folder: pathlib.Path, *, progress: Progress | None = None
) -> tuple[pathlib.Path, dict[str, str]]:
    """Writes a set under a folder.

    Args:
      public: The set.
      content: What its archives hold.
      folder: A data directory; gets ``name/version`` or ``name/config/version``.
      progress: How to report.

    Returns:
      The set's new folder, and the digest of each split's pixels.

    Raises:
      ValueError: If an archive is damaged, or a split has another number of images than it must.
    """
    seen: dict[str, list[bytes]] = {}
    total = sum(public.images.values())
    with (progress or Progress()).stage(f"prepare {public.name}", total) as bar, _without_bars():
        builder = _builder(public, content, seen, bar)(
            data_dir=str(folder), file_format="array_record"
        )
        # TFDS says what it does on standard output, which is the caller's.
        with contextlib.redirect_stdout(io.StringIO()), _disk_errors():
            builder.download_and_prepare()
    for split, expected in public.images.items():
        if len(seen.get(split, ())) != expected:
            raise ValueError(_miscounted(public, split, len(seen.get(split, ()))))
    digests = {split: pixel_digest(images) for split, images in seen.items()}
    return folder / public.stored / public.version, digests


def _miscounted(public: PublicSet, split: str, count: int) -> str:
    archives = ", ".join(archive.file for archive in public.archives[0])
    return (
        f"{public.name} has {count:,} images in split {split!r}, not {public.images[split]:,}; not "
        f"the published ones: {archives}"
    )


def _builder(public: PublicSet, content: Content, seen: dict[str, list[bytes]], bar: Bar) -> type:
    """Returns a builder class of TFDS that writes the content and notes the digests of images."""
    import tensorflow_datasets as tfds

    dataset, _, config = public.stored.partition("/")
    version = tfds.core.Version(public.version)
    configs = [tfds.core.BuilderConfig(name=config, version=version)] if config else []

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = version
        BUILDER_CONFIGS = configs

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=_features(content),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(split) for split in content.splits}

        def _generate_examples(self, split):
            digests = seen.setdefault(split, [])
            for key, example in content.splits[split]():
                encoded, digest = _encode(example, f"{key} of {public.name}")
                digests.append(digest)
                bar.update(sum(map(len, seen.values())), doing=f"{split}: {len(digests):,} images")
                yield key, encoded
            if not digests:  # which TFDS would say in words of its own
                raise ValueError(_miscounted(public, split, 0))

    return Builder


def _features(content: Content) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            **{name: tfds.features.Text() for name in content.texts},
            "image": tfds.features.Image(shape=(None, None, 3)),
            **{n: tfds.features.ClassLabel(names=c) for n, c in content.classes.items()},
        }
    )


def _encode(example: dict[str, Any], where: str) -> tuple[dict[str, Any], bytes]:
    """Returns the example with its image as a file's bytes, and the digest of its pixels."""
    from PIL import Image

    image, label = example["image"], example["label"]
    if isinstance(image, bytes):  # a JPEG stays what it was
        return example, image_digest(pictures.decode(image, None, where), label)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG", compress_level=1)
    return {**example, "image": file.getvalue()}, image_digest(image, label)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns what array_record says of a full or broken disk into an OSError."""
    try:
        yield
    except RuntimeError as error:
        match = re.search(r"\b(?:open|write|close)\(\) failed: ([^;]+)", str(error))
        if match is None:
            raise
        raise OSError(match[1]) from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """TFDS's own bars are off for as long as ours is there."""
    from tensorflow_datasets.core.utils import tqdm_utils

    active = tqdm_utils._active
    tqdm_utils.display_progress_bar(False)
    try:
        yield
    finally:
        tqdm_utils.display_progress_bar(active)
