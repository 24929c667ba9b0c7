"""Sets of JPEG files: EuroSAT, Imagenette, Tiny ImageNet and the flowers of Oxford.

The files are kept as they were published; they are decoded when they are read.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from robust_ssl.data.public.archives import tar_members, zip_members
from robust_ssl.data.public.matrices import load_matrices
from robust_ssl.data.public.subsets import drawn
from robust_ssl.data.public.values import Content, Example, Files

EUROSAT_CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"),
    *("PermanentCrop", "Residential", "River", "SeaLake"),
)
IMAGENETTE_CLASSES = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)
_EUROSAT_PICTURE = re.compile(r"(?:.*/)?([A-Za-z]+)/([A-Za-z]+_\d+\.jpg)")
_IMAGENETTE_PICTURE = re.compile(r"(?:.*/)?(train|val)/(n\d{8})/([^/.][^/]*\.JPEG)")
_TINY_PICTURE = re.compile(r"(?:.*/)?train/(n\d{8})/images/([^/]+\.JPEG)")
_TINY_TEST_PICTURE = re.compile(r"(?:.*/)?val/images/([^/]+\.JPEG)")
_FLOWER_PICTURE = re.compile(r"(?:.*/)?image_(\d{5})\.jpg")


def eurosat(files: Files) -> Content:
    """Reads EuroSAT in red, green and blue; it has no split, so all is ``train``."""
    (path,) = files.values()

    def read() -> Iterator[Example]:
        with zip_members(path) as members:
            for match in filter(None, map(_EUROSAT_PICTURE.fullmatch, sorted(members))):
                member, folder, file = match[0], match[1], match[2]
                label = _number(folder, EUROSAT_CLASSES, path)
                example = {"image": members[member](), "label": label, "filename": file}
                yield f"{folder}_{file}", example

    return Content({"label": EUROSAT_CLASSES}, {"train": read}, ("filename",))


def imagenette(files: Files) -> Content:
    """Reads Imagenette: ``train`` and ``validation``; classes are WordNet's numbers."""
    (path,) = files.values()

    def reader(part: str):
        def read() -> Iterator[Example]:
            for name, file in tar_members(path):
                match = _IMAGENETTE_PICTURE.fullmatch(name)
                if match and match[1] == part:
                    label = _number(match[2], IMAGENETTE_CLASSES, path)
                    yield match[3], {"image": file.read(), "label": label}

        return read

    splits = {"train": reader("train"), "validation": reader("val")}
    return Content({"label": IMAGENETTE_CLASSES}, splits)


def _number(name: str, names: tuple[str, ...], path: pathlib.Path) -> int:
    if name not in names:
        raise ValueError(f"{path} has a class {name!r}, which the set has not")
    return names.index(name)


def tiny_imagenet(files: Files) -> Content:
    """Reads Tiny ImageNet; ``test`` is the published validation set, as tests have no labels."""
    return _tiny(files, slice(None), None, None)


def tiny_imagenet20(files: Files) -> Content:
    """Reads every tenth class from the sixth: 150 training images of each, and all 50 others."""
    return _tiny(files, slice(5, None, 10), 150, 50)


def _tiny(files: Files, classes: slice, train: int | None, test: int | None) -> Content:
    (path,) = files.values()
    with zip_members(path) as members:
        numbers = sorted(_text(members, "wnids.txt", path).split())[classes]
        table = [line.split("\t") for line in _text(members, "words.txt", path).splitlines()]
        words = {row[0]: row[1].split(",")[0] for row in table if len(row) == 2}
        annotations = _text(members, "val/val_annotations.txt", path)
    of_test = dict(line.split("\t")[:2] for line in annotations.splitlines())

    def read_train() -> Iterator[Example]:
        with zip_members(path) as members:
            matches = filter(None, map(_TINY_PICTURE.fullmatch, members))
            entries = [(m[1], m[2], m[0]) for m in matches]
            yield from _tiny_examples(entries, members, "train", numbers, train)

    def read_test() -> Iterator[Example]:
        with zip_members(path) as members:
            matches = filter(None, map(_TINY_TEST_PICTURE.fullmatch, members))
            entries = [(of_test.get(m[1]), m[1], m[0]) for m in matches]
            yield from _tiny_examples(entries, members, "test", numbers, test)

    names = tuple(f"{number} {words.get(number, '')}".strip() for number in numbers)
    return Content({"label": names}, {"train": read_train, "test": read_test}, ("id",))


def _tiny_examples(entries, members, split, numbers, per_class) -> Iterator[Example]:
    labels = {number: label for label, number in enumerate(numbers)}
    known = sorted((labels[n], file, member) for n, file, member in entries if n in labels)
    if per_class is not None:
        rows = drawn(np.array([label for label, _, _ in known]), per_class)
        known = [known[row] for row in rows]
    for index, (label, _, member) in enumerate(known):
        name = f"{split}_{index:05d}"
        yield name, {"id": name, "image": members[member](), "label": label}


def _text(members, name: str, path: pathlib.Path) -> str:
    for member, read in members.items():
        if member == name or member.endswith(f"/{name}"):
            return read().decode()
    raise ValueError(f"{path} has no {name}; it is not the published file")


def flowers102(files: Files) -> Content:
    """Reads the flowers of Oxford: ``train``, ``validation`` and ``test``; pictures of any size."""
    labels = load_matrices(files["imagelabels.mat"], ("labels",))["labels"].ravel()
    keys = {"train": "trnid", "validation": "valid", "test": "tstid"}
    table = load_matrices(files["setid.mat"], tuple(keys.values()))

    def reader(key: str):
        numbers = {int(number) for number in table[key].ravel()}

        def read() -> Iterator[Example]:
            # In the archive's order: going back in a gzip means reading it from its start.
            for name, file in tar_members(files["102flowers.tgz"]):
                match = _FLOWER_PICTURE.fullmatch(name)
                if match and int(match[1]) in numbers:
                    base, label = name.rpartition("/")[2], int(labels[int(match[1]) - 1]) - 1
                    yield base, {"image": file.read(), "label": label, "file_name": base}

        return read

    splits = {split: reader(key) for split, key in keys.items()}
    return Content({"label": _flower_names()}, splits, ("file_name",))


def _flower_names() -> tuple[str, ...]:
    """The names of the flowers, which no archive has and TFDS knows."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_cls("oxford_flowers102")(data_dir="nowhere")
    return tuple(builder.info.features["label"].names)
