"""Writes CIFAR-100 as folders of its twenty superclasses.

    robust-ssl data prepare cifar100_small
    python tools/cifar100_superclasses.py data/cifar100_superclasses

The folders are what ``downstream.source`` takes: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, in
the order of the set.  ``--set=cifar100`` takes all of its images.

The twenty are those of Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
each of five classes.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
from PIL import Image

from robust_ssl import data

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
SUPERCLASS_OF = {fine: name for name, five in SUPERCLASSES.items() for fine in five.split()}


def write(images: np.ndarray, classes: list[str], folder: pathlib.Path) -> None:
    """Writes images ``[n, H, W, 3]``, uint8, as PNGs in the folders of their superclasses."""
    for place, (image, fine) in enumerate(zip(images, classes, strict=True)):
        parent = folder / SUPERCLASS_OF[fine]
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(parent / f"{place:05}.png")


def main(argv: list[str] | None = None) -> int:
    """Writes both splits; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--set", default="cifar100_small")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; name another folder, or remove it")
    for split in ("train", "test"):
        examples = data.load(arguments.set, split=split)
        classes = [examples.class_names[label] for label in examples.labels]
        write(examples.images, classes, arguments.folder / split)
        print(f"{split}: {len(classes):,} images in {arguments.folder / split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
