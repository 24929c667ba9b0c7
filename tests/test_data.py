"""Data: every error before the first step, batches as pure functions, sources without a network."""

import gc
import io
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from robust_ssl import data
from robust_ssl.data import tfds_source
from robust_ssl.data.streamed import StreamedExamples
from robust_ssl.parallel import Parallel


def pixels(n=12, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def toy(n=12, classes=3):
    return data.from_arrays(pixels(n), np.arange(n) % classes, name="toy")


def streamed(examples):
    """The same examples behind the streaming interface."""
    return StreamedExamples(
        lambda rows: [(examples.images[r], int(examples.labels[r])) for r in rows],
        np.arange(len(examples)),
        None,
        examples.class_names,
        examples.name,
        examples.split,
    )


# --- images and labels ---------------------------------------------------------------------


def broken_image(value):
    images = np.full((4, 8, 8, 3), 0.5, np.float32)
    images[2, 1, 0, 2] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (broken_image(np.nan), r"nan at index \[2, 1, 0, 2\] \(1 of 4 images\)"),
        (broken_image(np.inf), r"inf at index \[2, 1, 0, 2\]"),
        (broken_image(-0.25), r"\[0, 1\], got -0.25 at index \[2, 1, 0, 2\].*rescale"),
        (broken_image(255.0), r"\[0, 1\], got 255 at index \[2, 1, 0, 2\].*divide by 255: images"),
        (broken_image(1.02), r"got 1.02 at .*clip what resampling or rounding .*clip\(0, 1\)"),
        (broken_image(-1e-7), r"clip what resampling or rounding .*clip\(0, 1\)"),
        (broken_image(3.0), "divide by the value that is white"),
        (broken_image(1023.0), "divide by the value that is white"),
        (np.zeros((4, 8, 8), np.uint8), r"got shape \(4, 8, 8\); for gray images"),
        (np.zeros((8, 8, 3), np.uint8), "must be .n, height, width, 3."),
        (np.zeros((4, 3, 8, 1), np.uint8), "3 channels last.*gray"),
        (np.zeros((4, 8, 8, 4), np.uint8), "3 channels last.*alpha"),
        (np.zeros((4, 8, 8, 3), np.int64), "uint8 .* or float .*, got int64"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], r"differ in size: image 1 is \(8, 9, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "is empty"),
        (np.zeros((4, 0, 8, 3), np.uint8), "no pixels"),
    ],
)
def test_bad_images_are_refused_with_place_and_remedy(images, message):
    with pytest.raises(ValueError, match=message) as error:
        data.from_arrays(images, name="mine", split="test")
    assert "'mine' (test)" in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 2], r"negative: labels\[2\] is -1"),
        ([0, 1, 2, 3], r"below the number of classes, 3: labels\[3\] is 3"),
        ([0.0, 1.0, 0.5, 1.0], r"integers, got float64: labels\[2\] is .*0.5"),
        ([True, False, True, False], "integers, got bool"),
        (["a", "b", "a", "b"], "integers, got <U1"),
        ([0, 1, 2], "4 images and 3 labels"),
        (np.eye(4, dtype=int), "argmax"),
    ],
)
def test_bad_labels_are_refused_with_place_and_remedy(labels, message):
    with pytest.raises(ValueError, match=message):
        data.from_arrays(pixels(4), labels, class_names=["a", "b", "c"])


def test_floats_are_rounded_to_the_nearest_of_256_levels():
    levels = np.arange(256) / 255
    images = np.broadcast_to(levels.reshape(256, 1, 1, 1), (256, 1, 1, 3))
    expected = np.arange(256)
    for dtype in (np.float32, np.float64):
        stored = data.from_arrays(images.astype(dtype)).images
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored[:, 0, 0, 0], expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float16])
def test_floats_of_few_bits_are_floats(dtype):
    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 3)).astype(dtype)
    expected = data.from_arrays(images.astype(np.float32)).images
    for form in (images, list(images), jnp.asarray(images)):
        np.testing.assert_array_equal(data.from_arrays(form).images, expected)
    with pytest.raises(ValueError, match="divide by 255"):
        data.from_arrays(images * dtype(128))  # a whole number in all of them


def test_half_precision_tensors_are_floats():
    torch = pytest.importorskip("torch")
    images = torch.linspace(0, 1, 96).reshape(2, 4, 4, 3).bfloat16()
    expected = data.from_arrays(images.float().numpy()).images
    np.testing.assert_array_equal(data.from_arrays(images).images, expected)


def test_class_count_and_image_size_are_compared_with_the_model():
    examples = toy(classes=3)
    data.check_classes(examples, 3)
    data.check_image_size(examples, 8)
    with pytest.raises(ValueError, match=r"3 classes, the head 10 logits; .*num_classes=3"):
        data.check_classes(examples, 10)
    with pytest.raises(ValueError, match=r"8x8, the encoder takes 32x32; .*image_size=32"):
        data.check_image_size(examples, 32)
    with pytest.raises(ValueError, match="no labels"):
        data.check_classes(data.from_arrays(pixels()), 3)


def test_examples_are_frozen_and_know_themselves():
    pixels_of_caller = pixels(6)
    examples = data.from_arrays(pixels_of_caller, [0, 1, 2, 0, 1, 2], class_names="abc", name="toy")
    pixels_of_caller[0, 0, 0, 0] += 0  # the caller's own array stays writeable
    with pytest.raises(ValueError, match="read-only"):
        examples.images[0] = 0
    assert len(examples) == 6 and examples.num_classes == 3 and examples.image_shape == (8, 8, 3)
    part = examples.take([4, 0])
    np.testing.assert_array_equal(part.images, pixels_of_caller[[4, 0]])
    assert part.labels.tolist() == [1, 0] and part.class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"0 to 5: indices\[1\] is 6"):
        examples.take([0, 6])
    with pytest.raises(ValueError, match="cannot take 7 of the 6"):
        examples.subset(7)


@pytest.mark.parametrize("wrap", [lambda e: e, streamed], ids=["memory", "streamed"])
def test_fingerprint_sees_pixels_labels_names_and_order(wrap):
    def fingerprint(images=None, labels=(0, 1, 0, 1), names="ab", name="toy"):
        images = pixels(4) if images is None else images
        return wrap(
            data.from_arrays(images, list(labels), class_names=names, name=name)
        ).fingerprint()

    changed = pixels(4)
    changed[3, 7, 7, 2] ^= 1
    prints = {
        fingerprint(),
        fingerprint(images=changed),
        fingerprint(images=pixels(4)[::-1]),
        fingerprint(labels=(0, 1, 1, 1)),
        fingerprint(names="ac"),
        fingerprint(name="other"),
    }
    assert len(prints) == 6 and all(len(p) == 64 for p in prints)
    assert fingerprint() == fingerprint()


def test_subset_depends_on_the_seed_only():
    examples = toy(100)
    first, again, other = (examples.subset(10, seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(np.unique(first.images.reshape(10, -1), axis=0)) == 10


# --- carve ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda e: e, streamed], ids=["memory", "streamed"])
def test_carve_parts_are_disjoint_and_complete(wrap):
    images = np.zeros((50, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(50)
    examples = wrap(data.from_arrays(images, np.arange(50) % 5))
    train, validation = data.carve(examples, 0.2, seed=3)
    assert (len(train), len(validation)) == (40, 10)
    assert (train.split, validation.split) == ("train", "validation")
    numbers = [p.read(np.arange(len(p)))["images"][:, 0, 0, 0] for p in (train, validation)]
    assert sorted(np.concatenate(numbers)) == list(range(50))
    again = data.carve(examples, count=10, seed=3)[1]
    assert again.fingerprint() == validation.fingerprint()
    assert data.carve(examples, 0.2, seed=4)[1].fingerprint() != validation.fingerprint()


@pytest.mark.parametrize("seed", range(5))
def test_carve_never_takes_the_last_of_a_class(seed):
    labels = [0] * 10 + [1] + [2] * 2
    train, validation = data.carve(data.from_arrays(pixels(13), labels), count=10, seed=seed)
    assert sorted(set(train.labels.tolist())) == [0, 1, 2]
    assert len(validation) == 10 and 1 not in validation.labels


def test_carve_errors():
    with pytest.raises(ValueError, match="between 1 and 9 are free"):
        data.carve(toy(12), count=10)
    with pytest.raises(ValueError, match="between 1 and"):
        data.carve(toy(12), 0.01)
    with pytest.raises(ValueError, match="one image of each class, 1 in all"):
        data.carve(toy(1), 0.5)
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got 1.5"):
        data.carve(toy(12), 1.5)
    with pytest.raises(ValueError, match="test split"):
        data.carve(data.from_arrays(pixels(), split="test"))


# --- sources -------------------------------------------------------------------------------


def test_arrays_in_every_form():
    images, labels = pixels(6), [0, 1, 2, 0, 1, 2]
    plain = data.load((images, labels))
    mapped = data.load({"images": images, "labels": labels, "class_names": "abc", "name": "mine"})
    by_split = data.load({"train": (images, labels), "test": (images[:2], None)}, split="test")
    np.testing.assert_array_equal(plain.images, images)
    assert plain.labels.dtype == np.int32 and plain.class_names == ("0", "1", "2")
    assert mapped.name == "mine" and mapped.class_names == ("a", "b", "c")
    assert len(by_split) == 2 and by_split.labels is None and by_split.split == "test"
    assert data.load(plain) is plain
    resized = data.load((images, labels), image_size=4, limit=3)
    assert resized.images.shape == (3, 4, 4, 3)
    with pytest.raises(ValueError, match=r"split 'test' are missing; there are \['train'\]"):
        data.load({"train": (images, labels)}, split="test")
    with pytest.raises(ValueError, match="must hold images"):
        data.load({"images": images, "targets": labels})
    with pytest.raises(ValueError, match=r"must be Examples, .* got int"):
        data.load(3)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        data.load((images, labels), limit=0)
    for size in (0, -1, 2.5, "8", True):
        with pytest.raises(ValueError, match="image_size must be a whole number of pixels"):
            data.load((images, labels), image_size=size)
    with pytest.raises(TypeError, match=r"options \['n'\] are for functions"):
        data.load((images, labels), n=3)


def my_data(split, *, n=4, seed=7):
    return pixels(n, seed=seed), np.full(n, {"train": 0, "test": 1}[split])


def test_functions_by_value_and_by_name():
    by_value = data.load(my_data, split="test", n=5, seed=1)
    np.testing.assert_array_equal(by_value.images, pixels(5, seed=1))
    assert by_value.labels.tolist() == [1] * 5 and by_value.name == "my_data"
    by_name = data.load(f"{__name__}:my_data", split="test", n=5, seed=1)
    assert by_name.fingerprint() == by_value.fingerprint()
    with pytest.raises(TypeError, match=r"'my_data' cannot be called .*parameters are \['split'"):
        data.load(my_data, size=3)
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        data.load("no_such_module:f")
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        data.load("robust_ssl.data:nothing")
    with pytest.raises(ValueError, match="'broken' must be Examples"):
        data.load(
            type("broken", (), {"__call__": lambda self, split: None, "__name__": "broken"})()
        )


def write_pictures(folder, classes, size=(8, 8), count=2, mode="RGB"):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new(mode, size, 10 * number + i).save(folder / name / f"{i}.png")


def test_folder_of_images_per_class(tmp_path):
    write_pictures(tmp_path / "set" / "train", ["ant", "bee", "cat"], mode="L")
    write_pictures(tmp_path / "set" / "test", ["bee"])
    (tmp_path / "set" / "train" / "ant" / "notes.txt").write_text("not a picture")
    train = data.load(tmp_path / "set")
    assert train.class_names == ("ant", "bee", "cat") and train.name == "set"
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images[:, 0, 0].tolist() == [[v] * 3 for v in (0, 1, 10, 11, 20, 21)]
    # A class without test images does not shift the labels of the others.
    assert data.load(str(tmp_path / "set"), split="test").labels.tolist() == [1, 1]
    assert data.load(tmp_path / "set", image_size=4, limit=5).images.shape == (5, 4, 4, 3)
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        data.load(tmp_path / "set", split="dev")


def test_folder_without_splits_is_all_training(tmp_path):
    write_pictures(tmp_path / "flat", ["ant", "bee"])
    assert data.load(tmp_path / "flat").labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"all 'train'; for split 'test' make flat/train/CLASS"):
        data.load(tmp_path / "flat", split="test")


def test_folder_errors_name_the_file(tmp_path):
    write_pictures(tmp_path / "a", ["ant"])
    (tmp_path / "a" / "ant" / "z.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"ant/z.png\) cannot be read as an image"):
        data.load(tmp_path / "a")
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a" / "ant" / "z.png")
    whole = (tmp_path / "a" / "ant" / "z.png").read_bytes()
    (tmp_path / "a" / "ant" / "z.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ant/z.png\) cannot be read as an image"):
        data.load(tmp_path / "a")
    Image.new("RGB", (9, 8)).save(tmp_path / "a" / "ant" / "z.png")
    with pytest.raises(ValueError, match=r"image 2 .* is \(8, 9, 3\), the first one \(8, 8, 3\)"):
        data.load(tmp_path / "a")
    assert data.load(tmp_path / "a", image_size=8).images.shape == (3, 8, 8, 3)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a" / "ant" / "z.png")
    with pytest.raises(ValueError, match=r"z.png\) has more than 8 bits"):
        data.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load(tmp_path / "missing")
    (tmp_path / "void" / "train" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="is empty"):
        data.load(tmp_path / "void")


def test_a_large_folder_is_streamed_and_reads_the_same(tmp_path):
    write_pictures(tmp_path / "set", ["ant", "bee"], count=3)
    whole = data.load(tmp_path / "set")
    large = data.load(tmp_path / "set", memory_limit=100)
    assert isinstance(large, StreamedExamples) and len(large) == 6
    for part in (large, large.take([5, 0])):
        expected = whole if part is large else whole.take([5, 0])
        read = part.read(np.arange(len(part)))
        np.testing.assert_array_equal(read["images"], expected.images)
        np.testing.assert_array_equal(read["labels"], expected.labels)
    assert large.in_memory().fingerprint() == whole.fingerprint()


# --- TFDS without TensorFlow ---------------------------------------------------------------


def prepare(data_dir, *, name="tiny", version="1.0.0", shift=0):
    """Prepares a data set TFDS does not know, offline: 6 train and 3 test images of 6x7 pixels."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "picture": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                png = io.BytesIO()
                Image.new("RGB", (7, 6), (i + shift, 2 * i, 100)).save(png, "PNG")
                yield str(i), {"id": str(i), "picture": png.getvalue(), "label": i % 3}

    Tiny.name = name
    Tiny(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare(data_dir)
    prepare(data_dir, version="1.10.0", shift=50)
    return data_dir


def test_tfds_is_read_without_tensorflow(tfds_dir):
    examples = data.load("tiny", data_dir=tfds_dir)
    assert examples.images.shape == (6, 6, 7, 3) and examples.class_names == ("ant", "bee", "cat")
    # TFDS shuffles what it writes, so compare as sets; 1.10.0 is newer than 1.0.0.
    pairs = sorted(zip(examples.images[:, 0, 0].tolist(), examples.labels.tolist(), strict=True))
    assert pairs == sorted(([50 + i, 2 * i, 100], i % 3) for i in range(6))
    old = data.load("tiny:1.0.0", data_dir=tfds_dir)
    assert sorted(old.images[:, 0, 0, 0]) == list(range(6)) and old.name == "tiny"
    assert len(data.load("tiny", split="train[:50%]", data_dir=tfds_dir)) == 3
    small = data.load("tiny", split="test", image_size=4, data_dir=tfds_dir)
    assert small.images.shape == (3, 4, 4, 3)
    assert "tensorflow" not in sys.modules


def test_tfds_streams_what_is_large(tfds_dir):
    large = data.load("tiny", data_dir=tfds_dir, memory_limit=10)
    assert isinstance(large, StreamedExamples) and large.image_shape == (6, 7, 3)
    assert large.in_memory().fingerprint() == data.load("tiny", data_dir=tfds_dir).fingerprint()


@pytest.mark.parametrize("damage", ["cut", "gone", "info"])
def test_a_prepared_set_that_is_damaged_is_named_with_the_way_out(tfds_dir, tmp_path, damage):
    shutil.copytree(tfds_dir, tmp_path / "sets")
    for shard in (tmp_path / "sets").rglob("*train*array_record*"):
        if damage == "cut":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        elif damage == "gone":
            shard.unlink()
    for info in (tmp_path / "sets").rglob("dataset_info.json") if damage == "info" else ():
        info.write_text(info.read_text()[:40])
    with pytest.raises(
        data.UnreadableError, match=r"'tiny' .*(is damaged .*prepare it anew|cannot be read)"
    ):
        data.load("tiny", data_dir=tmp_path / "sets").read(np.arange(2))


def test_a_platform_without_array_record_is_told_what_to_give(tfds_dir, monkeypatch):
    import tensorflow_datasets as tfds

    def missing(self, split, decoders):
        raise ImportError("No module named 'array_record'")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", missing)
    with pytest.raises(ModuleNotFoundError, match=r"'tiny' needs the package array-record.*folder"):
        data.load("tiny", data_dir=tfds_dir)


def test_tfds_finds_its_folder_in_the_environment(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert len(data.load("tiny", split="test")) == 3


@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("tiny", "dev", ValueError, r"no split 'dev'; its splits are \['test', 'train'\]"),
        ("tiny", "train[:0]", ValueError, "is empty|no split"),
        (
            "tinny",
            "train",
            ValueError,
            "not known to TFDS; near are: tiny.*prepared under .*: tiny",
        ),
        ("cifar11", "train", ValueError, "near are: .*cifar10"),
        ("gtsrb16", "train", ValueError, "near are: gtsrb, gtsrb32"),
        ("visual_domain_decathlon", "train", ValueError, "one of: .*visual_domain_decathlon/dtd"),
        ("visual_domain_decathlon/gtsrp", "train", ValueError, "of: visual_domain_decathlon/gtsrb"),
        ("tiny:2.0.0", "train", FileNotFoundError, r"versions \['1.0.0', '1.10.0'\], not '2.0.0'"),
        (
            "cifar10",
            "train",
            FileNotFoundError,
            r"prepare it once:\n  robust-ssl data prepare cifar10 --data-dir=\S+\n",
        ),
        (
            "svhn_cropped",
            "train",
            FileNotFoundError,
            r"prepare it once:\n  robust-ssl data prepare svhn --data-dir=",
        ),
        (
            "cifar10:3.0.1",
            "train",
            FileNotFoundError,
            r"pip install 'robust-ssl\[prepare\]' && tfds build cifar10:3.0.1 "
            r"--file_format=array_record --data_dir=",
        ),
        (
            "visual_domain_decathlon/gtsrb",
            "train",
            FileNotFoundError,
            "tfds build visual_domain_decathlon/gtsrb --file_format=array_record",
        ),
    ],
)
def test_tfds_errors_say_what_is_near_or_how_to_prepare(tfds_dir, name, split, error, message):
    with pytest.raises(error, match=message):
        data.load(name, split=split, data_dir=tfds_dir)


def test_the_command_leaves_out_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"--file_format=array_record\n"):
        data.load("mnist")
    with pytest.raises(FileNotFoundError, match=r"robust-ssl data prepare eurosat\n"):
        data.load("eurosat")


def test_a_folder_of_the_same_name_is_pointed_out(tmp_path, monkeypatch):
    (tmp_path / "beetles").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"for the folder of that name write '\./beetles'"):
        data.load("beetles", data_dir=tmp_path / "none")


def test_tfds_in_another_format_says_how_to_prepare_it_anew(tmp_path):
    prepare(tmp_path)
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"not stored as array_record.*\n.* --overwrite"):
        data.load("tiny", data_dir=tmp_path)


def test_tfds_features_are_found_by_name_then_by_kind():
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names="ab")
    find = tfds_source._feature_keys
    assert find({"image": image, "mask": image, "label": label}, "x") == ("image", "label")
    assert find({"picture": image, "kind": label}, "x") == ("picture", "kind")
    assert find({"image": image, "kind": label, "sort": label}, "x") == ("image", None)
    with pytest.raises(ValueError, match=r"no feature 'image', .* \['left', 'right'\]"):
        find({"left": image, "right": image}, "x")
    with pytest.raises(ValueError, match="uint16, not uint8"):
        find({"image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16)}, "x")


# --- built in ------------------------------------------------------------------------------


def test_digits_are_split_evenly_and_without_overlap():
    train, test = data.digits("train"), data.digits("test")
    assert train.images.shape == (1437, 32, 32, 3) and test.images.shape == (360, 32, 32, 3)
    assert train.num_classes == test.num_classes == 10
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)
    assert data.load("robust_ssl.data:digits", split="test").fingerprint() == test.fingerprint()
    from sklearn import datasets

    small = np.concatenate([data.digits(s, image_size=8).images for s in ("train", "test")])
    scans = np.rint(datasets.load_digits().images * 255 / 16).reshape(1797, -1)
    np.testing.assert_array_equal(
        np.unique(small[..., 0].reshape(1797, -1), axis=0), np.unique(scans, axis=0)
    )
    with pytest.raises(ValueError, match="no split 'validation'"):
        data.digits("validation")


def test_photo_crops_are_deterministic_and_unlabelled():
    crops = data.load("robust_ssl.data:photo_crops", n=20, seed=3)
    assert crops.images.shape == (20, 32, 32, 3) and crops.labels is None
    assert crops.fingerprint() == data.photo_crops(n=20, seed=3).fingerprint()
    assert crops.fingerprint() != data.photo_crops(n=20, seed=4).fingerprint()
    np.testing.assert_array_equal(data.photo_crops(n=5, seed=3).images, crops.images[:5])
    assert not np.array_equal(data.photo_crops("test", n=20, seed=3).images, crops.images)
    assert len(np.unique(crops.images.reshape(20, -1), axis=0)) == 20
    assert data.load("robust_ssl.data:photo_crops", n=2, image_size=16).image_shape == (16, 16, 3)
    with pytest.raises(ValueError, match="image_size in 1 to 427"):
        data.photo_crops(n=2, image_size=500)


def test_a_photo_crop_at_full_height_is_a_piece_of_the_photograph():
    from sklearn import datasets

    crop = data.photo_crops(n=1, image_size=427).images[0]
    photos = datasets.load_sample_images().images
    candidates = []
    for photo in photos:
        pieces = [photo[:, left : left + 427] for left in range(214)]
        candidates += [*pieces, *(piece[:, ::-1] for piece in pieces)]
    # The corner lies between pixels, so the crop is interpolated: near to one of them, not equal.
    distances = [np.abs(crop[::7].astype(int) - c[::7].astype(int)).mean() for c in candidates]
    assert min(distances) < 6 < np.median(distances)


# --- batches -------------------------------------------------------------------------------


def test_batch_indices_are_a_pure_function_and_cover_each_epoch():
    def at(step, seed=0, stage="finetune"):
        return data.batch_indices(10, 3, seed=seed, stage=stage, step=step).tolist()

    forwards = [at(step) for step in range(9)]
    assert [at(step) for step in reversed(range(9))] == forwards[::-1]
    for epoch in range(3):
        seen = np.concatenate(forwards[3 * epoch : 3 * epoch + 3])
        assert len(set(seen.tolist())) == 9 and set(seen) <= set(range(10))
    assert forwards[0] != forwards[3]
    assert at(0, seed=1) != at(0) != at(0, stage="attack")
    assert data.steps_per_epoch(10, 3) == 3


def test_batch_indices_do_not_change_between_versions():
    # Recorded once; if these move, no interrupted run can be resumed bit-equal.
    first = data.batch_indices(1000, 4, seed=0, stage="finetune", step=0)
    assert first.tolist() == [607, 523, 954, 300]


def test_batch_errors():
    with pytest.raises(ValueError, match="batch of 16 is larger than the set of 12"):
        data.batch_indices(12, 16, seed=0, stage="a", step=0)
    with pytest.raises(ValueError, match="step must not be negative"):
        data.batch_indices(12, 4, seed=0, stage="a", step=-1)
    with pytest.raises(ValueError, match="seed must not be negative"):
        data.batch_indices(12, 4, seed=-1, stage="a", step=0)
    with pytest.raises(ValueError, match="larger than the set"):
        data.Batches(toy(), 16, seed=0, stage="a", parallel=Parallel.create())
    with pytest.raises(ValueError, match="6 does not divide over 4 devices"):
        data.Batches(toy(), 6, seed=0, stage="a", parallel=Parallel.create(num_devices=4))
    for name in ("ahead", "replays"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            batches_of(toy(), **{name: 0})


def batches_of(examples, num_devices=4, **options):
    parallel = Parallel.create(num_devices=num_devices)
    return data.Batches(examples, 4, seed=5, stage="finetune", parallel=parallel, **options)


def test_batches_are_equal_resident_or_streamed_on_any_number_of_devices():
    examples = toy(14)
    reference = batches_of(examples, 1)
    others = [
        batches_of(examples, 2),
        batches_of(examples, 4),
        batches_of(examples, 2, resident=False),
        batches_of(streamed(examples), 4),
        batches_of(streamed(examples), 1, resident=True),
    ]
    assert [b.resident for b in (reference, *others)] == [True, True, True, False, False, True]
    for step in (0, 1, 2, 3, 7, 1):  # in order, a jump, and back
        rows = data.batch_indices(14, 4, seed=5, stage="finetune", step=step)
        expected = {**examples.read(rows), "indices": np.arange(4), "rows": rows}
        for batches in (reference, *others):
            batch = batches.batch(step)
            assert {k: v.dtype for k, v in batch.items()} == {
                "images": np.uint8,
                "labels": np.int32,
                "indices": np.int32,
                "rows": np.int32,
            }
            for name, value in expected.items():
                np.testing.assert_array_equal(batch[name], value)


@pytest.mark.parametrize("method", ["pmap", "shard_map", "jit"])
@pytest.mark.parametrize("resident", [True, False])
def test_batches_lie_as_a_step_wants_them(method, resident):
    examples = data.from_arrays(pixels(8))
    parallel = Parallel.create(num_devices=2, kind=method)
    batches = data.Batches(examples, 4, seed=0, stage="a", parallel=parallel, resident=resident)
    batch = batches(0)
    assert set(batch) == {"images", "indices", "rows"}
    assert parallel.put(batch)["images"] is batch["images"]
    assert batch["images"].addressable_shards[0].data.shape == (2, 8, 8, 3)


def test_a_resident_batch_needs_no_talk_between_devices():
    from robust_ssl.data.batches import _gatherer

    batches = batches_of(toy())
    rows = batches._parallel.put(np.arange(4, dtype=np.int32))
    program = _gatherer(rows.sharding).lower(batches.resident_set, rows).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-reduce", "all-to-all"))


def test_the_reading_thread_ends_with_its_batches():
    def readers():
        return {thread for thread in threading.enumerate() if thread.name == "prefetch"}

    before = readers()
    batches = batches_of(toy(), resident=False)
    batches(0)
    (reader,) = readers() - before
    del batches
    gc.collect()
    reader.join(timeout=5)
    assert not reader.is_alive()


def test_an_error_while_reading_ahead_arrives_at_its_step():
    examples = toy(8)
    bad = data.batch_indices(8, 4, seed=5, stage="finetune", step=1)[0]

    def records(rows):
        return [(b"broken" if r == bad else examples.images[r], 0) for r in rows]

    batches = batches_of(StreamedExamples(records, np.arange(8), None, ("a",), "toy"), 2)
    batches(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"image {bad} of 'toy' .train. cannot be read"):
            batches(1)
    batches(0)
    batches.close()


def test_epoch_batches_show_every_image_once():
    examples = toy(10)
    for source in (examples, streamed(examples)):
        parts = list(data.epoch_batches(source, 4))
        assert [len(part["images"]) for part in parts] == [4, 4, 2]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        np.testing.assert_array_equal(joined["images"], examples.images)
        np.testing.assert_array_equal(joined["labels"], examples.labels)
        np.testing.assert_array_equal(joined["indices"], np.arange(10))
    assert "labels" not in next(data.epoch_batches(data.from_arrays(pixels()), 4))
    with pytest.raises(ValueError, match="at least 1"):
        next(data.epoch_batches(examples, 0))


def test_streamed_examples_check_what_they_read():
    def records(rows):
        return [(np.zeros((8, 8 + (r == 3), 3), np.uint8), int(r)) for r in rows]

    examples = StreamedExamples(records, np.arange(5), None, "ab", "big")
    assert examples.read([0, 1])["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"below the number of classes, 2: labels\[0\] is 2"):
        examples.read([2])
    with pytest.raises(ValueError, match=r"image 3 of 'big' \(train\) is \(8, 9, 3\)"):
        examples.read([1, 3])
    with pytest.raises(ValueError, match="is empty"):
        examples.take(np.arange(0))


# --- weight --------------------------------------------------------------------------------


def test_importing_data_is_light():
    code = (
        "import sys, robust_ssl.data\n"
        "heavy = {'tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL', 'orbax', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = pathlib.Path(data.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_array_is_made_on_a_device_by_reading():
    before = len(jax.live_arrays())
    toy().fingerprint()
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("form", ["tuple", "mapping", "list"])
def test_a_functions_pictures_of_several_sizes_are_brought_to_one(form):
    images = [np.full(shape, 100, np.uint8) for shape in ((8, 8, 3), (9, 12, 3))]
    given = {"tuple": (images, [0, 1]), "mapping": {"images": images}, "list": images}[form]
    found = data.load(lambda split: given, image_size=8)
    assert found.images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(found.images, data.load(given, image_size=8).images)
