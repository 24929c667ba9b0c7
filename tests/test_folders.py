"""A folder of pictures: what its folders mean is certain, or it is refused; nothing is silent."""

import logging
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from robust_ssl import data
from robust_ssl.data import folders

GOOD = {"train": {"cat": 3, "dog": 3}, "test": {"cat": 2, "dog": 2}}


def picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path, format="PNG")
    return path


def make(root, spec=GOOD):
    """Pictures ``root/split/class/0.png``, or ``root/class/0.png`` for a count in place of one."""
    for outer, inner in spec.items():
        classes = {f"{outer}/{name}": n for name, n in inner.items()} if inner else {}
        for name, count in classes.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(root / name / f"{i}.png", 100 + i)
    return root


def counts(root, split="train"):
    examples = data.load(root, split=split)
    return dict(
        zip(
            examples.class_names,
            np.bincount(examples.labels, minlength=examples.num_classes).tolist(),
            strict=True,
        )
    )


# --- folders that are no classes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("__MACOSX/train/cat/._0.png", "__MACOSX/"),
        ("train/__MACOSX/cat/x.png", "__MACOSX/"),
        ("train/cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/"),
        ("train/lost+found/x.png", "lost+found/"),
        ("train/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints/"),
        ("train/annotations/0.xml", "annotations/"),
        ("train/empty/", "empty/"),
        ("unlabeled/images/0.png", "unlabeled/ (1 pictures)"),
        ("old/cat_old/0.png", "old/ (1 pictures)"),
        ("annotations/trimaps/0.png", "annotations/ (1 pictures)"),
        ("train/overview.png", "1 pictures in train/ (overview.png)"),
        ("train/cat/notes.txt", "1 .txt"),
        ("val/0.png", "val/ (1 pictures)"),
        ("samples/grid.png", "samples/ (1 pictures)"),
        ("overview.png", None),
    ],
)
def test_what_is_no_class_is_left_out_and_named(tmp_path, caplog, place, named):
    root = make(tmp_path / "set")
    if place.endswith("/"):
        (root / place).mkdir(parents=True)
    elif place.endswith((".png", ".jpg")):
        picture(root / place)
    else:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("text")
    with caplog.at_level(logging.WARNING):
        train = data.load(root)
    assert train.class_names == ("cat", "dog")
    assert np.bincount(train.labels).tolist() == [3, 3]
    if named is not None:
        assert named in " ".join(train.notes) and named in caplog.text
        assert len(caplog.records) == 1
    assert counts(root, "test") == {"cat": 2, "dog": 2}


def test_a_class_that_may_be_none_is_read_and_named(tmp_path):
    root = make(tmp_path / "set", {"train": {"cat": 2, "dog": 2, "masks": 3}})
    train = data.load(root)
    assert train.class_names == ("cat", "dog", "masks")
    assert "taken for classes: masks/ (3 pictures)" in train.notes[0]


def test_an_archive_is_no_folder(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is a file; unpack"):
        data.load(tmp_path / "set.zip")


def test_hidden_files_are_no_pictures_and_not_worth_a_word(tmp_path):
    root = make(tmp_path / "set")
    for name in ("._0.png", ".DS_Store", "Thumbs.db"):
        (root / "train" / "cat" / name).write_text("text")
    assert data.load(root).notes == ()


# --- pictures that were passed over --------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["0.tif", "0.TIFF", "0.jfif", "0.gif", "0", "0.image", "2021/may/0.png", "0.PNG"]
)
def test_every_picture_of_a_class_is_read(tmp_path, name):
    root = make(tmp_path / "set", {"train": {"cat": 2, "dog": 0}})
    file = root / "train" / "dog" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = {".tif": "TIFF", ".tiff": "TIFF", ".jfif": "JPEG", ".gif": "GIF"}
    picture = Image.new("RGB", (4, 4), (9, 99, 9))
    picture.save(file, format=kind.get(file.suffix.lower(), "PNG"))
    assert counts(root) == {"cat": 2, "dog": 1}


@pytest.mark.parametrize("suffix", [".heic", ".avif", ".npy", ".dcm", ".svg"])
def test_a_class_of_formats_that_are_not_read_is_refused(tmp_path, suffix):
    root = make(tmp_path / "set", {"train": {"cat": 2, "dog": 0}})
    (root / "train" / "dog" / f"0{suffix}").write_bytes(b"anything")
    with pytest.raises(ValueError, match=rf"dog' holds 1 \{suffix} .* to PNG or JPEG"):
        data.load(root)
    picture(root / "train" / "dog" / "1.png")
    assert f"1 {suffix}" in " ".join(data.load(root).notes)


def test_pipes_devices_and_broken_links_are_left_out(tmp_path):
    root = make(tmp_path / "set")
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "train" / "cat" / "zero.png").symlink_to("/dev/zero")
    (root / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    train = data.load(root)
    assert len(train) == 6 and "3 no regular file" in " ".join(train.notes)
    with pytest.raises(ValueError, match="it is no regular file"):
        data.pictures.decode(root / "train" / "cat" / "pipe.png", None, "a pipe")


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    root = make(tmp_path / "set", {"train": {"cat": 2}})
    picture(tmp_path / "elsewhere" / "0.png")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    assert counts(root) == {"cat": 2, "dog": 1}


# --- splits and classes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"train": {"Cat": 1, "Dog": 1}, "test": {"cat": 1, "dog": 1}}, ["'cat'", "'Cat'"]),
        ({"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dgo": 1}}, ["'dgo' (is it 'dog'?)"]),
        ({"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "emu": 1}}, ["'emu'", "train/ has"]),
        ({"train": {"cat": 1, "dog": 0}, "test": {"cat": 1, "dog": 1}}, ["'dog'", "'cat'"]),
        ({"train": {"cat ": 1, "dog": 1}, "test": {"cat": 1}}, ["'cat' (is it 'cat '?)"]),
    ],
)
def test_a_class_without_training_pictures_is_refused_with_near_names(tmp_path, spec, words):
    root = make(tmp_path / "set", spec)
    with pytest.raises(ValueError, match="every class needs pictures in train/") as error:
        data.load(root, split="test")
    assert all(word in str(error.value) for word in words)


def test_a_test_split_may_lack_a_class_and_labels_do_not_shift(tmp_path):
    root = make(tmp_path / "set", {"train": {"a": 1, "b": 1, "c": 1}, "test": {"c": 2}})
    assert counts(root, "test") == {"a": 0, "b": 0, "c": 2}


def test_classes_are_in_natural_order(tmp_path):
    root = make(tmp_path / "set", {"train": {f"class{i}": 1 for i in (10, 2, 1)}})
    assert data.load(root).class_names == ("class1", "class2", "class10")


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = make(tmp_path / "set", {"train": {composed: 1, "tea": 1}, "test": {apart: 2}})
    assert counts(root, "test") == {composed: 2, "tea": 0}


@pytest.mark.parametrize("names", [("cat", "Cat"), ("café", unicodedata.normalize("NFD", "Café"))])
def test_classes_that_differ_in_case_only_are_refused(tmp_path, names):
    root = make(tmp_path / "set", {"train": dict.fromkeys(names, 1)})
    with pytest.raises(ValueError, match="merge or rename them"):
        data.load(root)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Test", "testing", "VAL"])
def test_the_test_split_goes_by_many_names(tmp_path, name):
    root = make(tmp_path / "set", {"train": {"cat": 1, "dog": 1}, name: {"cat": 2, "dog": 1}})
    assert counts(root, "test") == {"cat": 2, "dog": 1}
    note = f"the split 'test' is read from {name}/"
    assert (note in data.load(root, split="test").notes) == (name != "Test")


def test_a_split_of_the_very_name_comes_first(tmp_path):
    root = make(tmp_path / "set", {**GOOD, "val": {"cat": 9, "dog": 9}, "Train": {"cow": 1}})
    assert counts(root, "test") == {"cat": 2, "dog": 2} and counts(root) == {"cat": 3, "dog": 3}
    assert counts(root, "val") == {"cat": 9, "dog": 9}


def test_a_split_that_is_not_there_names_the_option(tmp_path):
    root = make(tmp_path / "set", {"train": {"cat": 1, "dog": 1}, "holdout": {"cat": 1}})
    with pytest.raises(
        ValueError, match=r"no split 'test'; it has \['holdout', 'train'\].*test_sp"
    ):
        data.load(root, split="test")
    assert counts(root, "holdout") == {"cat": 1, "dog": 0}


def test_splits_of_other_names_share_their_classes(tmp_path):
    root = make(tmp_path / "set", {"fold1": {"a": 1, "b": 1}, "fold2": {"b": 2, "c": 1}})
    assert counts(root, "fold1") == {"a": 1, "b": 1, "c": 0}
    assert counts(root, "fold2") == {"a": 0, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["train/0.png", "test/0.png"], "directly in test/, train/, not in class folders"),
        (["set/train/cat/0.png", "set/train/dog/0.png"], "only folder with pictures .* is set/"),
        (["train/images/cat/0.png", "train/images/dog/0.png"], "only folder .* is images/"),
        (["cat/train/0.png", "cat/test/0.png", "dog/train/0.png"], "splits go outside"),
        (["a/cat/0.png", "a/dog/0.png", "b/cat/0.png", "b/dog/0.png"], "not clear which are"),
        (["0.png", "1.png"], "is empty.*2 pictures in set/"),
        ([], "is empty"),
    ],
)
def test_a_layout_that_means_something_else_is_refused(tmp_path, places, message):
    root = tmp_path / "set"
    root.mkdir()
    for place in places:
        picture(root / place)
    with pytest.raises(ValueError, match=message):
        data.load(root)


def test_a_class_may_be_called_train_among_others(tmp_path):
    root = tmp_path / "vehicles"
    for name in ("bus", "car", "train"):
        picture(root / name / "0.png")
    assert counts(root) == {"bus": 1, "car": 1, "train": 1}


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    name = os.path.join(os.fsencode(tmp_path), b"set", b"caf\xe9")
    try:
        os.mkdir(name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    Image.new("RGB", (4, 4)).save(os.path.join(os.fsdecode(name), "0.png"))
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        data.load(tmp_path / "set")


def test_folders_say_what_a_text_names(tmp_path):
    assert data.is_folder(tmp_path) and data.is_folder("~/x") and not data.is_folder("cifar10")
    assert not data.is_folder(None) and not data.is_folder("/x/mine.py:images")
    assert set(folders.SPLITS) == {"train", "test", "validation"}


def test_a_missing_test_split_is_never_advised_to_be_the_training_split(tmp_path):
    make(tmp_path, {"train": GOOD["train"]})
    with pytest.raises(ValueError, match="has no split 'test'") as error:
        data.load(tmp_path, split="test")
    assert "--config" not in str(error.value)
    make(tmp_path, {"holdout": GOOD["test"]})
    with pytest.raises(ValueError, match=r"config\.downstream\.test_split=holdout"):
        data.load(tmp_path, split="test")


def test_a_split_in_two_cases_is_read_once_and_the_other_is_named(tmp_path):
    make(tmp_path, GOOD)
    (tmp_path / "Train").mkdir()
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("this file system knows no case")
    make(tmp_path, {"Train": {"cat": 1, "dog": 1}})
    examples = data.load(tmp_path)
    assert len(examples) == 6
    assert any("Train/ (2 pictures)" in note for note in examples.notes)


def test_a_link_to_itself_is_no_folder_and_no_picture(tmp_path):
    make(tmp_path, GOOD)
    for name in ("loop", "loop.png"):
        os.symlink(name, tmp_path / "train" / "cat" / name)
        os.symlink(name, tmp_path / "train" / name)
        os.symlink(name, tmp_path / name)
    assert counts(tmp_path) == {"cat": 3, "dog": 3}
