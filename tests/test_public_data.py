"""Public data sets: what comes out of an archive is what went into it, or nothing is there."""

import dataclasses
import errno
import io
import json
import logging
import pathlib
import re
import sys
import tarfile
import zipfile

import numpy as np
import public_archives as made
import pytest

from robust_ssl import data, pickles
from robust_ssl.cli.main import main
from robust_ssl.data import public
from robust_ssl.data.public import archives, cifar, gtsrb, matrices, preparation, subsets
from robust_ssl.progress import Progress

QUIET = Progress("quiet")
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
FORMATS = {
    "cifar10": made.cifar10_binary,
    "cifar10 python": made.cifar10_python,
    "gtsrb": made.gtsrb,
    "stl10": made.stl10,
    "svhn": made.svhn,
    "eurosat": made.eurosat,
    "tiny_imagenet": made.tiny_imagenet,
    "flowers102": made.flowers102,
    "imagenette": made.imagenette,
}


def stored(folder, bodies):
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    return folder


def prepared(tmp_path, described, bodies, **options):
    source = stored(tmp_path / "copies", bodies)
    options = {"source": source, "progress": QUIET, **options}
    return public.prepare(described, data_dir=tmp_path / "sets", **options)


def pairs(images, labels):
    labels = [None] * len(images) if labels is None else labels
    return sorted((str(label), im.tobytes()) for im, label in zip(images, labels, strict=True))


def counts(content):
    return {split: len(part[0]) for split, part in content.items()}


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
        records = np.concatenate([labels[:, None].astype(np.uint8), made.planes(images)], axis=1)
        files[f"data_batch_{i}.bin" if i < 6 else "test_batch.bin"] = records.tobytes()
    files["batches.meta.txt"] = "\n".join(names).encode()
    bodies = {"cifar-10-binary.tar.gz": made.tar(files, "w")}
    described = public.find_set("cifar10")
    tiny = made.tiny("cifar10", bodies, described.images)
    result = prepared(
        tmp_path, dataclasses.replace(tiny, pixels=described.pixels, proven=True), bodies
    )
    assert result.pixels == described.pixels


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
    with pytest.raises(ValueError, match=r"mine.zip is not EuroSAT.zip: its SHA256 is \w{64}, not"):
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


# --- Damaged and hostile archives ---------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("spoil", ["cut", "other"])
def test_a_damaged_archive_is_named(tmp_path, kind, spoil):
    bodies, content = FORMATS[kind]()
    file, body = next(iter(bodies.items()))
    bodies[file] = body[: len(body) // 2] if spoil == "cut" else b"\x00" * 2000
    described = made.tiny(
        kind.split()[0], bodies, counts(content), group=int(kind.endswith("python"))
    )
    with pytest.raises(ValueError, match=re.escape(file)) as caught:
        prepared(tmp_path, described, bodies)
    assert len(str(caught.value).splitlines()) <= 5
    assert not list((tmp_path / "sets").glob("[!d]*"))


def test_a_small_archive_that_grows_is_refused(tmp_path):
    bombs = {
        "bomb.zip": made.zipped({"a.txt": bytes(10**7)}),
        "bomb.tgz": made.tar({"a.txt": bytes(10**7)}),
        "bomb.mat": made.matrix(X=np.zeros((10**7, 1), np.uint8)),
    }
    folder = stored(tmp_path, bombs)
    with (
        pytest.raises(ValueError, match=r"bomb.zip holds more than 100 times"),
        archives.zip_members(folder / "bomb.zip"),
    ):
        pass
    with pytest.raises(ValueError, match=r"bomb.tgz holds more than 100 times"):
        list(archives.tar_members(folder / "bomb.tgz"))
    with pytest.raises(ValueError, match=r"bomb.mat holds more than 100 times"):
        matrices.load_matrices(folder / "bomb.mat", ("X",))


def test_links_and_names_that_lead_out_are_not_followed(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, kind, target in (
            ("class_names.txt", tarfile.SYMTYPE, "/etc/hostname"),
            ("train_y.bin", tarfile.LNKTYPE, "/etc/hostname"),
            ("device", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("../../outside"), io.BytesIO())
    path = tmp_path / "links.tar"
    path.write_bytes(content.getvalue())
    assert [name for name, _ in archives.tar_members(path)] == ["../../outside"]
    with pytest.raises(ValueError, match=r"has no class_names.txt, train_y.bin"):
        archives.tar_files(path, {"class_names.txt", "train_y.bin"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["links.tar"]


def test_an_encrypted_zip_is_refused(tmp_path):
    path = tmp_path / "secret.zip"
    path.write_bytes(made.zipped({"a.txt": b"x"}))
    with zipfile.ZipFile(path) as archive:
        offset = archive.start_dir
    spoiled = bytearray(path.read_bytes())
    spoiled[offset + 8] |= 1
    path.write_bytes(spoiled)
    with pytest.raises(ValueError, match="is encrypted"), archives.zip_members(path):
        pass


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x80\x02cos\nsystem\nU\x05touchq\x00\x85R.", "names os.system, which no batch of CIFAR"),
        (b"\x80\x02}U\x04dataK\x01s.", "without"),
        (b"\x80\x02}", "cut off"),
        (b"\x80\x02]]a.", "without"),
    ],
)
def test_a_forged_pickle_runs_nothing(tmp_path, body, message):
    bodies = {f"data_batch_{i}": body for i in range(1, 6)} | dict.fromkeys(
        ("test_batch", "batches.meta"), body
    )
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(made.tar(bodies))
    with pytest.raises(ValueError, match=message):
        cifar.cifar10({path.name: path})


def test_an_array_in_a_pickle_must_be_plain_bytes():
    import pickle

    for array in (np.zeros((2, 2)), np.asfortranarray(np.zeros((2, 3), np.uint8))):
        value = cifar.load_pickle(pickle.dumps({"data": array}, protocol=2))["data"]
        with pytest.raises(pickles.RefusedError, match="not of plain bytes"):
            value.array()


# --- Names and the command line -----------------------------------------------------------------


def test_every_set_of_the_table_can_be_listed(tmp_path, capsys):
    bodies, content = made.eurosat()
    prepared(tmp_path, made.tiny("eurosat", bodies, counts(content)), bodies)
    assert main(["data", "list", "--data-dir", str(tmp_path / "sets")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "name",
        "images",
        "classes",
        "size",
        "px",
        "to",
        "download",
        "prepared",
    ]
    for described, line in zip(public.SETS, lines[1:], strict=False):
        assert line.startswith(described.name)
        state = "eurosat/rgb/2.0.0" if described.name == "eurosat" else "no"
        assert line.endswith(f"  {state}")


def test_the_table_is_whole():
    names = [described.name for described in public.SETS]
    assert len(set(names)) == len(names)
    for described in public.SETS:
        assert described.size > 0 and described.pixels.keys() <= described.images.keys()
        for archive in (archive for group in described.archives for archive in group):
            assert re.fullmatch(r"https?://\S+/[\w.-]+", archive.url)
            assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", archive.digest)
        for digest in described.pixels.values():
            assert re.fullmatch(r"[0-9a-f]{64}", digest)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "stl10", "svhn", "eurosat", "flowers102", "imagenette"]
)
def test_names_versions_and_classes_are_those_of_tfds(name, tmp_path):
    import tensorflow_datasets as tfds

    described = public.find_set(name)
    dataset, _, config = described.stored.partition("/")
    arguments = {"config": config} if config else {}
    builder = tfds.builder_cls(dataset)(data_dir=tmp_path, **arguments)
    assert str(builder.info.version) == described.version
    assert builder.info.features["label"].num_classes == described.classes
    if name in ("eurosat", "imagenette"):
        from robust_ssl.data.public import photographs

        ours = {
            "eurosat": photographs.EUROSAT_CLASSES,
            "imagenette": photographs.IMAGENETTE_CLASSES,
        }
        assert tuple(builder.info.features["label"].names) == ours[name]


def test_the_command_prepares_from_a_copy_and_says_what_it_made(tmp_path, capsys, monkeypatch):
    bodies, content = made.eurosat()
    described = made.tiny("eurosat", bodies, counts(content))
    monkeypatch.setattr(
        preparation, "find_set", lambda name: described if name == "eurosat" else None
    )
    copy = stored(tmp_path / "copies", bodies) / "EuroSAT.zip"
    place = ["--data-dir", str(tmp_path / "sets")]
    command = ["data", "prepare", "eurosat", *place, "--no-progress"]
    assert main([*command, "--from", str(copy)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"eurosat: prepared: \S+\n  train: 4 images, pixels [0-9a-f]{64}\n", out)
    assert main(command) == 0
    assert "already prepared (--overwrite makes it anew)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "cifar11"], "unknown data set 'cifar11'; did you mean 'cifar10'"),
        (["prepare", "cifar10", "--from", "/nowhere.zip"], "/nowhere.zip does not exist"),
        (["prepare", "cifar10", "--config.seed=1"], "there is no config here"),
    ],
)
def test_wrong_usage_is_a_few_lines(tmp_path, capsys, arguments, message):
    assert main(["data", *arguments, "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 5 and "Traceback" not in error


def test_an_interrupted_command_may_be_repeated(tmp_path, capsys, monkeypatch):
    def obtain(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "obtain", obtain)
    assert main(["data", "prepare", "gtsrb32", "--data-dir", str(tmp_path)]) == 75
    error = capsys.readouterr().err
    assert "what was downloaded is kept" in error and "run the same command again" in error
