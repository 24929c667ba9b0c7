"""The prepared research data sets: read whole, without TensorFlow, as their sources say."""

import functools
import os
import pathlib
import sys

import numpy as np
import pytest

from robust_ssl import data

pytestmark = pytest.mark.slow

DATA_DIR = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@functools.cache
def load(name, split):
    if not (DATA_DIR / name).is_dir():
        pytest.skip(
            f"{name} is not prepared in {DATA_DIR}: python ../shared/data/prepare_tfds.py {name}"
        )
    return data.load(name, split=split)


@pytest.mark.parametrize(
    ("name", "split", "count", "classes"),
    [
        ("cifar10", "train", 50_000, 10),
        ("cifar10", "test", 10_000, 10),
        ("gtsrb32", "train", 6_450, 43),
        ("gtsrb32", "test", 3_990, 43),
        ("cifar100_small", "train", 7_000, 100),
        ("cifar100_small", "test", 2_000, 100),
    ],
)
def test_counts_and_classes(name, split, count, classes):
    examples = load(name, split)
    assert examples.images.shape == (count, 32, 32, 3)
    data.check_classes(examples, classes)
    assert set(examples.labels.tolist()) == set(range(classes))
    assert "tensorflow" not in sys.modules


def test_cifar10_pixels_have_the_known_mean_and_deviation():
    images, levels = load("cifar10", "train").images, np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    # Krizhevsky 2009; the figures that every CIFAR-10 recipe normalizes with.
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(std, [0.2470, 0.2435, 0.2616], atol=1e-4)


def test_every_gtsrb_image_arrives_with_its_own_label():
    examples = load("gtsrb32", "test")
    if not SHARED.is_dir():
        pytest.skip(f"the source of gtsrb32 is not at {SHARED}")
    if (DATA_DIR / "gtsrb32" / "1.0.0" / "source.json").exists():
        pytest.skip("prepared from the published archives, which have not been through JPEG")
    sys.path.insert(0, str(SHARED))
    try:
        import prepare_tfds
    finally:
        sys.path.remove(str(SHARED))
    images, labels, names = prepare_tfds.read_npz(SHARED / "gtsrb32_test.npz")

    def pairs(pixels, classes):  # TFDS shuffles what it writes
        return sorted((int(c), p.tobytes()) for p, c in zip(pixels, classes, strict=True))

    assert pairs(examples.images, examples.labels) == pairs(images, labels)
    assert list(examples.class_names) == names


def test_limit_reads_only_what_it_takes():
    first, again = (
        data.load(load("gtsrb32", "test"), limit=50),
        data.load("gtsrb32", split="test", limit=50),
    )
    assert len(again) == 50 and first.fingerprint() == again.fingerprint()
