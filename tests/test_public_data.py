"""Public data sets: what comes out of an archive is what went into it, or nothing is there."""

import dataclasses
import errno
import json
import logging
import pathlib
import subprocess
import sys

import numpy as np
import public_archives as made
import pytest
from public_archives import FORMATS, QUIET, counts, pairs, planes, prepared, stored

from robust_ssl import data
from robust_ssl.data import public
from robust_ssl.data.public import cifar, gtsrb, subsets

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


# --- From archives to examples ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_and_labels_come_out_as_they_went_in(tmp_path, kind):
    import tensorflow_datasets as tfds

    bodies, content = FORMATS[kind]()
    name = kind.split()[0]
    described = made.tiny(name, bodies, counts(content), group=int(kind.endswith("python")))
    result = prepared(tmp_path, described, bodies)
    assert result.new and result.folder == tmp_path / "sets" / described.stored / described.version
    one_size = name != "flowers102"
    for split, (images, labels) in content.items():
        size = None if one_size else 16
        examples = data.load(name, split=split, data_dir=tmp_path / "sets", image_size=size)
        classes = 16 if name == "tiny_imagenet" else described.classes
        assert examples.num_classes == (0 if labels is None else classes)
        found = None if labels is None else examples.labels.tolist()
        if one_size:
            expected = None if labels is None else list(map(int, labels))
            assert pairs(examples.images, found) == pairs(images, expected)
        else:
            assert sorted(found) == sorted(labels)
        digests = [
            public.image_digest(image, -1 if labels is None else labels[row])
            for row, image in enumerate(images)
        ]
        assert result.pixels[split] == public.pixel_digest(digests)
    builder = tfds.builder_from_directory(result.folder)
    assert {s: len(builder.as_data_source(s)) for s in builder.info.splits} == counts(content)
    assert "tensorflow" not in sys.modules
    assert not list((tmp_path / "sets").glob(".*"))


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar100_has_fine_and_coarse_labels(tmp_path, kind):
    bodies, content = made.cifar100(kind)
    group = int(kind == "python")
    described = made.tiny("cifar100", bodies, counts(content), group=group)
    prepared(tmp_path, described, bodies)
    import tensorflow_datasets as tfds

    source = tfds.builder("cifar100", data_dir=tmp_path / "sets").as_data_source("train")
    images, labels, _ = content["train"]
    rows = [int(example["id"].decode().removeprefix("train_")) for example in source]
    assert sorted(rows) == list(range(6))
    for row, example in zip(rows, source, strict=True):
        np.testing.assert_array_equal(example["image"], images[row])
        assert (example["label"], example["coarse_label"]) == (labels[row], labels[row] + 5)
    assert data.load("cifar100", data_dir=tmp_path / "sets").class_names[:2] == (
        "fine_00",
        "fine_01",
    )


def test_the_order_is_that_of_tfds_whatever_the_archive(tmp_path):
    orders = []
    for make, group in ((made.cifar10_binary, 0), (made.cifar10_python, 1)):
        bodies, content = make()
        described = made.tiny("cifar10", bodies, counts(content), group=group)
        prepared(tmp_path / str(group), described, bodies)
        orders.append(data.load("cifar10", data_dir=tmp_path / str(group) / "sets").images)
    np.testing.assert_array_equal(*orders)


def test_the_small_cifar100_is_drawn_by_class_and_name(tmp_path):
    bodies, content = made.cifar100("python", {"train": 80, "test": 25})
    described = made.tiny("cifar100_small", bodies, {"train": 140, "test": 40})
    prepared(tmp_path, described, bodies)
    generator = np.random.default_rng(0)
    images, labels, numbers = content["train"]
    chosen = [
        (label, number)
        for label in (0, 1)
        for number in np.sort(generator.permutation(80)[:70]).tolist()
    ]
    places = {(int(c), int(n)): row for row, (c, n) in enumerate(zip(labels, numbers, strict=True))}
    rows = [places[entry] for entry in chosen]
    examples = data.load("cifar100_small", data_dir=tmp_path / "sets")
    expected = pairs(images[rows], labels[rows].tolist())
    assert pairs(examples.images, examples.labels.tolist()) == expected
    assert examples.num_classes == 100

    binary, _ = made.cifar100("binary")
    path = stored(tmp_path / "binary", binary) / "cifar-100-binary.tar.gz"
    with pytest.raises(ValueError, match=r"no names of images.*take cifar-100-python"):
        cifar.cifar100_small({path.name: path})


def test_the_small_tiny_imagenet_takes_every_tenth_class(tmp_path):
    bodies, content = made.tiny_imagenet()
    described = made.tiny("tiny_imagenet20", bodies, {"train": 2, "test": 2})
    prepared(tmp_path, described, bodies)
    for split, (images, _) in content.items():
        examples = data.load("tiny_imagenet20", split=split, data_dir=tmp_path / "sets")
        assert examples.class_names == ("n00000105 word 05", "n00000115 word 15")
        assert pairs(examples.images, examples.labels) == pairs([images[5], images[15]], [0, 1])


def test_the_small_gtsrb_is_the_whole_one_where_classes_are_small(tmp_path):
    bodies, content = made.gtsrb()
    prepared(tmp_path, made.tiny("gtsrb32", bodies, counts(content)), bodies)
    examples = data.load("gtsrb32", data_dir=tmp_path / "sets")
    assert pairs(examples.images, examples.labels.tolist()) == pairs(*content["train"])
    assert examples.class_names[42] == "42"


def test_which_images_are_chosen_does_not_change():
    labels = np.repeat([0, 1], [210, 500])
    assert subsets.evenly(labels, 150)[:8].tolist() == [0, 1, 3, 4, 6, 7, 8, 10]
    assert subsets.drawn(labels[210:], 70)[:8].tolist() == [2, 5, 15, 27, 41, 54, 55, 63]
    assert len(subsets.drawn(labels, 400)) == 210 + 400


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the small copies are not at {SHARED}")
def test_the_rules_choose_the_images_of_the_small_copies():
    with np.load(SHARED / "gtsrb32_train.npz") as copy:
        names, labels = [name.decode() for name in copy["src"]], copy["y"]
    for label in np.unique(labels):
        own = [name for name, y in zip(names, labels, strict=True) if y == label]
        tracks = [int(name[6:11]) for name in own]
        whole = [
            f"{label:05d}/{t:05d}_{f:05d}.ppm" for t in range(max(tracks) + 1) for f in range(30)
        ]
        if label == 33:  # the only track that lacks a frame
            continue
        rows = subsets.evenly(np.zeros(len(whole), int), 150)
        assert [whole[row] for row in rows] == own


def test_resizing_gives_what_opencv_gives():
    # Red of cv2.resize(image, (4, 4)) by OpenCV 5.0: rows are reduced, columns enlarged.
    image = (np.arange(7 * 3 * 3).reshape(7, 3, 3) * 37 % 251).astype(np.uint8)
    red = [[31, 100, 148, 159], [174, 87, 76, 145], [98, 148, 137, 69], [210, 123, 112, 181]]
    assert gtsrb.resize(image, 4)[..., 0].tolist() == red
    same = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(gtsrb.resize(same, 32), same)
    np.testing.assert_array_equal(gtsrb.resize(np.full((9, 40, 3), 201, np.uint8), 32), 201)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"CIFAR-10's batches are not at {SHARED}")
def test_cifar10_has_the_digests_of_the_table(tmp_path):
    sys.path.insert(0, str(SHARED))
    try:
        import prepare_tfds
    finally:
        sys.path.remove(str(SHARED))
    files = {}
    for i in range(1, 7):
        file = f"cifar10_train_lossless_{i}.npz" if i < 6 else "cifar10_test.npz"
        images, labels, names = prepare_tfds.read_npz(SHARED / file)
        records = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        files[f"data_batch_{i}.bin" if i < 6 else "test_batch.bin"] = records.tobytes()
    files["batches.meta.txt"] = "\n".join(names).encode()
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(made.tar(files, "w"))
    content = cifar.cifar10({path.name: path})
    for split, digest in public.find_set("cifar10").pixels.items():
        examples = [example for _, example in content.splits[split]()]
        images = [public.image_digest(example["image"], example["label"]) for example in examples]
        assert public.pixel_digest(images) == digest


# --- All or nothing -----------------------------------------------------------------------------


def test_a_prepared_set_is_kept_unless_told_otherwise(tmp_path):
    bodies, content = made.eurosat()
    described = made.tiny("eurosat", bodies, counts(content))
    first = prepared(tmp_path, described, bodies)
    time = (first.folder / "dataset_info.json").stat().st_mtime_ns
    record = json.loads((first.folder / "source.json").read_text())
    assert record["archives"].keys() == bodies.keys() and record["pixels"] == first.pixels
    again = prepared(tmp_path, described, {}, source=tmp_path / "nowhere")
    assert not again.new and again.pixels == first.pixels
    assert (first.folder / "dataset_info.json").stat().st_mtime_ns == time
    anew = prepared(tmp_path, described, bodies, overwrite=True)
    assert anew.new and anew.pixels == first.pixels
    assert (first.folder / "dataset_info.json").stat().st_mtime_ns > time


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "eurosat cannot be prepared"),
        (RuntimeError("write() failed: No space left; writing x"), OSError, "No space left\nmake"),
        (ValueError("a broken picture"), ValueError, "a broken picture"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_what_ends_half_way_leaves_what_was_there(tmp_path, failure, error, message, before):
    bodies, content = made.eurosat()
    described = made.tiny("eurosat", bodies, counts(content))
    if before:
        prepared(tmp_path, described, bodies)

    def read(files):
        whole = described.read(files)

        def interrupted():
            yield from list(whole.splits["train"]())[:2]
            raise failure

        return dataclasses.replace(whole, splits={"train": interrupted})

    with pytest.raises(error, match=message) as caught:
        prepared(tmp_path, dataclasses.replace(described, read=read), bodies, overwrite=True)
    assert len(str(caught.value).splitlines()) <= 5
    assert not list((tmp_path / "sets").glob(".*"))
    if before:
        assert len(data.load("eurosat", data_dir=tmp_path / "sets")) == 4
    else:
        with pytest.raises(FileNotFoundError, match="robust-ssl data prepare eurosat"):
            data.load("eurosat", data_dir=tmp_path / "sets")


KILLED = """
import pathlib, sys
from robust_ssl.data.public.scratch import scratch
directory = pathlib.Path(sys.argv[1])
with scratch(directory, directory / "eurosat" / "rgb" / "2.0.0") as folder:
    (folder / "half").write_text("made")
    print(folder, flush=True)
    sys.stdin.read()
"""


def _preparing(sets):
    """A process that prepares, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, sets], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    return process, pathlib.Path(process.stdout.readline().decode().strip())


def test_what_a_killed_process_was_preparing_goes_and_what_another_prepares_stays(tmp_path):
    sets = tmp_path / "sets"
    sets.mkdir()
    (killed, gone), (alive, kept) = _preparing(sets), _preparing(sets)
    elsewhere = sets / ".preparing-elsewhere"
    elsewhere.mkdir()
    owner = {"host": "another", "target": "eurosat/2.0.0"}
    (elsewhere / "owner.json").write_text(json.dumps(owner))
    (sets / ".preparing-begins").mkdir()
    killed.kill()
    killed.communicate()
    bodies, content = made.eurosat()
    try:
        assert prepared(tmp_path, made.tiny("eurosat", bodies, counts(content)), bodies).new
        left = {file.name for file in sets.glob(".preparing-*")}
        assert left == {kept.name, ".preparing-elsewhere", ".preparing-begins"}
    finally:
        alive.communicate()
    assert not gone.exists() and not kept.exists()


def test_a_set_that_a_killed_process_had_put_aside_gets_its_place_back(tmp_path):
    bodies, content = made.eurosat()
    described = made.tiny("eurosat", bodies, counts(content))
    first = prepared(tmp_path, described, bodies)
    killed, folder = _preparing(tmp_path / "sets")
    assert first.folder == tmp_path / "sets" / "eurosat" / "rgb" / "2.0.0"
    first.folder.rename(folder / "replaced")
    killed.kill()
    killed.communicate()
    again = prepared(tmp_path, described, bodies)
    assert not again.new and again.pixels == first.pixels and not folder.exists()


def test_another_number_of_images_is_an_error(tmp_path):
    bodies, _ = made.eurosat()
    with pytest.raises(ValueError, match=r"4 images in split 'train', not 5; .*: EuroSAT"):
        prepared(tmp_path, made.tiny("eurosat", bodies, {"train": 5}), bodies)
    assert not (tmp_path / "sets" / "eurosat").exists()


def test_other_pixels_are_an_error_only_where_the_table_is_proven(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("robust_ssl"), "propagate", True)
    bodies, content = made.cifar10_binary()
    described = dataclasses.replace(
        made.tiny("cifar10", bodies, counts(content)), pixels={"train": "0" * 64}
    )
    assert described.proven
    with pytest.raises(ValueError, match=r"cifar10 \(train\) have the digest .* nothing was"):
        prepared(tmp_path, described, bodies)
    prepared(tmp_path, dataclasses.replace(described, proven=False), bodies)
    assert "computed from a copy" in caplog.text


# --- Copies and digests -------------------------------------------------------------------------


def test_a_copy_may_have_any_name_and_either_format(tmp_path):
    binary, content = made.cifar10_binary()
    python, _ = made.cifar10_python()
    both = [
        made.tiny("cifar10", b, counts(content), group=g) for g, b in enumerate((binary, python))
    ]
    described = dataclasses.replace(both[0], archives=both[0].archives + both[1].archives)
    for number, body in enumerate((*binary.values(), *python.values())):
        copy = tmp_path / f"copy {number}"
        copy.write_bytes(body)
        public.prepare(described, data_dir=tmp_path / str(number), source=copy, progress=QUIET)
        assert len(data.load("cifar10", data_dir=tmp_path / str(number))) == 10


def test_a_wrong_copy_is_named_with_both_digests_and_stays(tmp_path):
    bodies, content = made.eurosat()
    described = made.tiny("eurosat", bodies, counts(content))
    copy = tmp_path / "mine.zip"
    copy.write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"mine\.zip is not EuroSAT.zip: its SHA256 is \w{64}, not"
    ):
        public.prepare(described, data_dir=tmp_path, source=copy, progress=QUIET)
    assert copy.read_bytes() == b"something else"
    with pytest.raises(ValueError, match=r"(?s)there is no EuroSAT.zip.*what is needed: EuroSAT"):
        public.prepare(described, data_dir=tmp_path, source=tmp_path, progress=QUIET)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        public.prepare(described, data_dir=tmp_path, source=tmp_path / "no", progress=QUIET)


def test_one_file_is_not_enough_for_a_set_of_three(tmp_path):
    bodies, content = made.gtsrb()
    folder = stored(tmp_path / "copies", bodies)
    described = made.tiny("gtsrb", bodies, counts(content))
    with pytest.raises(ValueError, match="one of 3 archives; name the folder of all"):
        prepared(tmp_path, described, {}, source=folder / "GTSRB_Final_Training_Images.zip")


def test_without_a_digest_the_first_archive_is_trusted_and_no_other(tmp_path):
    bodies, content = made.tiny_imagenet()
    described = made.tiny("tiny_imagenet", bodies, counts(content))
    unknown = dataclasses.replace(described.archives[0][0], digest=None)
    described = dataclasses.replace(described, archives=((unknown,),))
    said = []
    prepared(tmp_path, described, bodies, say=said.append)
    assert "no digest of tiny-imagenet-200.zip is known" in said[0]
    prepared(tmp_path, described, bodies, say=said.append, overwrite=True)
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"the first one seen \(.*tiny-imagenet-200.zip.sha256\)"):
        other = {name: body + b" " for name, body in bodies.items()}
        prepared(tmp_path, described, other, say=said.append, overwrite=True)


def test_digests_do_not_depend_on_the_order_but_on_labels_and_shape():
    images = made.pixels(3)
    digests = [public.image_digest(image, label) for label, image in enumerate(images)]
    assert public.pixel_digest(digests) == public.pixel_digest(digests[::-1])
    assert public.image_digest(images[0], 1) != digests[0]
    assert public.image_digest(images[0].reshape(16, 64, 3), 0) != digests[0]
