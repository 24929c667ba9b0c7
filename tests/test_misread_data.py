"""Pixels, labels and splits that flatter or are read as something else: refused, turned or said."""

import io
import json
import logging
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from robust_ssl import data, models, weights
from robust_ssl.data import checks, pictures
from robust_ssl.data.streamed import StreamedExamples


def pixels(n=6, height=8, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- pictures ------------------------------------------------------------------------------


def chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def deep_png(channels, color_type):
    """A PNG of 16 bits a channel, which holds 12-bit values."""
    values = np.random.default_rng(0).integers(0, 4096, (4, 5, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 5, 4, 16, color_type, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_tiff():
    data_offset, content = 14, bytes(2 * 4 * 5 * 3)
    head = b"II*\0" + struct.pack("<IHHH", data_offset + len(content), 16, 16, 16)
    entries = {256: 5, 257: 4, 258: 8, 259: 1, 262: 2, 273: 14, 277: 3, 278: 4, 279: len(content)}
    ifd = struct.pack("<H", len(entries))
    for tag, value in entries.items():
        ifd += struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value)
    return head + content + ifd + bytes(4)


DEEP = {
    "PNG, RGB": deep_png(3, 2),
    "PNG, RGBA": deep_png(4, 6),
    "PNG, gray and alpha": deep_png(2, 4),
    "PNG, gray": deep_png(1, 0),
    "TIFF, RGB": deep_tiff(),
    "TIFF, gray": encoded(Image.fromarray(np.full((4, 5), 4000, np.uint16)), "TIFF"),
    "TIFF, floats": encoded(Image.fromarray(np.ones((4, 5), np.float32)), "TIFF"),
    "PPM": b"P6\n5 4\n4095\n" + bytes(2 * 4 * 5 * 3),
    "PPM, plain": b"P3\n1 1\n4095\n1 2 3\n",
    "PGM": b"P5\n5 4\n65535\n" + bytes(2 * 4 * 5),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_a_channel_are_refused(kind):
    with pytest.raises(ValueError, match="a picture has more than 8 bits a channel"):
        pictures.decode(DEEP[kind], None, "a picture")


MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "TIFF": ("RGB", "RGBA", "L", "P", "1", "CMYK"),
    "BMP": ("RGB", "L", "P", "1"),
    "GIF": ("RGB", "L", "P"),
    "JPEG": ("RGB", "L", "CMYK"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_eight_bits_or_less_of_any_mode_are_read(kind, mode):
    content = encoded(Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode), kind)
    assert (pictures.decode(content, None, "white") == 255).all()


def test_levels_below_255_are_spread_not_read_as_nearly_black():
    assert (pictures.decode(b"P5\n2 1\n15\n\x0f\x0f", None, "16 levels") == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_photographs_are_turned_as_their_tag_says(kind, tag):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8] = 255
    upright[:, :4] = 128  # so that mirrored is told from turned
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    decoded = pictures.decode(content, None, "photograph")
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 8


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_a_picture_of_several_frames_is_refused(kind):
    first, second = (Image.fromarray(image) for image in pixels(2, 8, 8))
    content = encoded(first, kind, save_all=True, append_images=[second])
    with pytest.raises(ValueError, match="has 2 frames"):
        pictures.decode(content, None, "a film")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ""])
@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4\n", b"\xc5\xd0\xd3\xc6"])
def test_no_picture_starts_ghostscript(tmp_path, monkeypatch, suffix, head):
    started = tmp_path / "started"
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    file = tmp_path / "set" / "a" / f"cat{suffix}"
    file.parent.mkdir(parents=True)
    file.write_bytes(head + b"%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match=r"cannot be read as an image|is empty"):
        data.load(tmp_path / "set")
    assert not started.exists()


def test_broken_metadata_end_in_an_error_that_names_the_picture():
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "TIFF"):
        content = encoded(Image.fromarray(pixels(1, 8, 8)[0]), kind, exif=exif)
        for _ in range(60):
            broken = bytearray(content)
            for place in random.integers(0, min(len(broken), 300), 4):
                broken[place] = random.integers(256)
            try:
                pictures.decode(bytes(broken), 8, "a picture")
            except ValueError as error:
                assert "a picture" in str(error)


# --- images as arrays ----------------------------------------------------------------------

PIXELS = pixels()
GRAY = np.repeat(PIXELS[..., :1], 3, axis=-1)
FLOATS = (PIXELS / 255).astype(np.float32)


class Tensor:
    """As torch has them: no array while it needs a gradient."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def cpu(self):
        return self.array


CERTAIN = {
    "channels first": (PIXELS.transpose(0, 3, 1, 2), PIXELS),
    "channels first, floats": (FLOATS.transpose(0, 3, 1, 2), PIXELS),
    "a list": (list(PIXELS), PIXELS),
    "a list, channels first": ([image.transpose(2, 0, 1) for image in PIXELS], PIXELS),
    "Pillow images": ([Image.fromarray(image) for image in PIXELS], PIXELS),
    "Pillow images in gray": ([Image.fromarray(image[..., 0]) for image in PIXELS], GRAY),
    "tensors": (Tensor(FLOATS.transpose(0, 3, 1, 2)), PIXELS),
    "a list of tensors": ([Tensor(image) for image in PIXELS], PIXELS),
    "jax": (jnp.asarray(FLOATS), PIXELS),
    "half floats": (FLOATS.astype(np.float16), PIXELS),
    "gray": (PIXELS[..., 0], GRAY),
    "gray, one channel": (PIXELS[..., :1], GRAY),
    "gray, channel first": (PIXELS[:, None, :, :, 0], GRAY),
    "gray, floats": (FLOATS[..., 0], GRAY),
}


@pytest.mark.parametrize("form", CERTAIN)
def test_what_can_mean_one_thing_only_is_taken(form):
    images, expected = CERTAIN[form]
    for examples in (data.from_arrays(images), data.load({"images": images})):
        np.testing.assert_array_equal(examples.images, expected)


def test_a_palette_image_is_its_colors_not_its_places():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    examples = data.load([image, image])
    assert examples.images[0, 0, 0].tolist() == [10, 200, 30]


def test_a_list_of_many_sizes_is_brought_to_one():
    images = [Image.new("RGB", size, (50, 60, 70)) for size in ((8, 8), (5, 9))]
    with pytest.raises(ValueError, match=r"image 1 is \(9, 5, 3\)"):
        data.load((images, [0, 1]))
    assert data.load((images, [0, 1]), image_size=4).images.shape == (2, 4, 4, 3)
    assert data.load(images, image_size=4).labels is None


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (PIXELS.astype(np.float32), "images / 255"),
        (FLOATS * 2 - 1, r"\(images \+ 1\) / 2"),
        ((FLOATS - 0.45) / 0.22, r"images \* std \+ mean"),
        (PIXELS.astype(np.int64), r"images.astype\(np.uint8\)"),
        (PIXELS.astype(np.uint16) * 16, "images / 65535 for 16 bits, images / 4095 for 12"),
        (PIXELS > 9, r"images \* np.uint8\(255\)"),
        ((PIXELS > 9).astype(np.uint8), "0 and 1 only"),
        (FLOATS / 255, "by 255 twice"),
        (PIXELS[0], r"images\[None\]"),
        (PIXELS[0].transpose(2, 0, 1), r"images.transpose\(1, 2, 0\)\[None\]"),
        (PIXELS[:3, ..., 0], "for gray images"),  # or one image, channels first
        (PIXELS[:, :3, :, :1], "for gray images"),
        (PIXELS.reshape(6, -1), r"images.reshape\(-1, height, width, 3\)"),
        (np.concatenate([PIXELS, GRAY], -1)[..., :4], r"images\[..., :3\]"),
        (np.zeros((6, 4, 8, 9), np.uint8), r"images\[:, :3\].transpose"),
        (["a.png", "b.png"], "give their folder"),
        (np.ma.masked_greater(FLOATS, 0.5), "masked"),
        ([PIXELS, np.arange(6)], "are a tuple"),
        ([Image.fromarray(np.full((8, 9), 999, np.uint16))], "more than 8 bits"),
    ],
)
def test_what_is_not_certain_is_refused_with_the_line_that_converts(images, line):
    with pytest.raises(ValueError, match=line):
        data.load(images)


def test_images_that_are_nearly_black_are_counted(caplog):
    with caplog.at_level(logging.WARNING):
        examples = data.load((PIXELS // 20, [0, 1] * 3))
    note = "6 of 6 images are nearly black: no value above 15 of 255"
    assert examples.notes == (note,) and note in caplog.text
    mixed = np.concatenate([pixels(200), PIXELS[:2] // 20])
    assert data.load((mixed, np.zeros(202, int))).notes == ()  # below one in a hundred
    assert data.load((PIXELS, [0, 1] * 3)).notes == ()


# --- labels --------------------------------------------------------------------------------


def test_a_column_of_labels_is_taken_for_what_it_is():
    examples = data.from_arrays(PIXELS, np.array([[0], [1], [2]] * 2))
    assert examples.labels.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(2)[[0, 1] * 3], r"labels.argmax\(axis=-1\)"),
        (np.ones((6, 3), int), "several or no classes"),
        (np.array([[0, 3]] * 6), r"for example labels\[:, 0\]"),
        (np.array([[0, 1] * 3]), r"one row: labels\[0\]"),
        (np.array([1, 2] * 3), "1, 2: they start at 1, .* labels - 1"),
        (np.array([7, 1007] * 3), r"ids up to 1007 of 2 classes.*return_inverse"),
        (np.array([0, 1, 3] * 2), "class 2 has no training image"),
        (np.array([0, 10**9] * 3), r"labels\[1\] is 1000000000"),
        (np.array([0, 2**31 - 1] * 3), r"labels\[1\] is 2147483647"),
        (np.array([0, 2**32] * 3), r"labels\[1\] is 4294967296"),
        (np.array([0, 2**63] * 3, np.uint64), r"labels\[1\] is 9223372036854775808"),
        (["cat", "dog"] * 3, r"class_names, labels = np.unique\(labels, return_inverse=True\)"),
    ],
)
def test_labels_that_mean_something_else_are_refused_with_the_right_remedy(labels, message):
    with pytest.raises(ValueError, match=message) as error:
        data.from_arrays(PIXELS, labels)
    assert ("argmax" in str(error.value)) == (message == r"labels.argmax\(axis=-1\)")


@pytest.mark.parametrize("split", ["test", "validation", "fold2"])
def test_large_labels_are_refused_in_any_split(split):
    with pytest.raises(ValueError, match="1000000000"):
        data.from_arrays(PIXELS, [0, 10**9] * 3, split=split)


def test_class_names_must_differ():
    with pytest.raises(ValueError, match="must differ"):
        data.from_arrays(PIXELS, [0, 1] * 3, class_names=["cat", "cat"])


# --- classes of the splits -----------------------------------------------------------------


def arrays(labels, names=None, split="train"):
    images = pixels(len(labels))
    return data.from_arrays(images, labels, class_names=names, split=split)


def test_a_test_split_of_numbers_takes_the_classes_of_the_training_split():
    train, test = arrays([0, 1, 2, 3, 4]), arrays([0, 1, 3], split="test")
    data.check_classes(test, train.num_classes)
    assert data.with_classes_of(test, train).num_classes == 5
    named = arrays([0, 1, 2], ["ant", "bee", "cat"])
    both = data.with_classes_of(arrays([0, 1], split="test"), named)
    assert both.class_names == ("ant", "bee", "cat") and both.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bee", "ant", "cat"], "same names in another order: 'bee', 'ant', 'cat'"),
        (["ant", "Bee", "cat"], r"only the first has 'Bee' \(near 'bee'\); only the second 'bee'"),
        (["ant", "bee"], "only the second has 'cat'"),
        (["ant", "bee", "cat", "dog"], "only the first has 'dog'"),
    ],
)
def test_splits_of_other_class_names_are_refused(names, message):
    train = arrays([0, 1, 2], ["ant", "bee", "cat"])
    test = arrays(list(range(len(names))), names, split="test")
    with pytest.raises(ValueError, match=message):
        data.with_classes_of(test, train)


def test_more_classes_in_the_test_split_are_refused():
    with pytest.raises(ValueError, match="only the first has '3'"):
        data.with_classes_of(arrays([0, 1, 2, 3], split="test"), arrays([0, 1, 2]))
    with pytest.raises(ValueError, match="every class needs training images"):
        data.check_classes(arrays([0, 1, 2, 3], split="test"), 3)


def test_every_class_needs_a_training_image():
    data.check_trained(arrays([0, 1]))
    with pytest.raises(ValueError, match=r"1 of the 3 classes .* no training image: 'cat'"):
        data.check_trained(arrays([0, 1], ["ant", "bee", "cat"]))
    with pytest.raises(ValueError, match="one class only, '0'"):
        data.check_trained(arrays([0, 0]))


# --- images in both splits -----------------------------------------------------------------


def streamed(images, reads):
    def records(rows):
        reads.extend(int(row) for row in rows)
        return [(images[row], int(row) % 2) for row in rows]

    return StreamedExamples(records, np.arange(len(images)), None, ("a", "b"), "big")


@pytest.mark.parametrize("on_demand", [False, True])
def test_an_image_under_two_training_classes_is_counted(on_demand):
    images = pixels(9)
    twice = np.concatenate([images[:6], images[:2], images[2:3]])
    labels = [0, 1, 0, 1, 0, 1, 1, 1, 1]  # the first and the third image have both
    train = data.from_arrays(twice, labels)
    if on_demand:
        records = [(image, label) for image, label in zip(twice, labels, strict=True)]
        read = lambda rows: [records[row] for row in rows]  # noqa: E731
        train = StreamedExamples(read, np.arange(len(twice)), None, ("a", "b"), "big")
    found = data.shared(data.from_arrays(images[6:]), train)
    assert found.two_labels == 2
    assert found.notes == [
        "2 training images have more than one label, pixel by pixel: is a picture, or a folder, "
        "there under two classes?"
    ]
    unlabelled = data.from_arrays(twice)
    assert data.shared(data.from_arrays(images[6:]), unlabelled).notes == []


def test_test_images_among_the_training_images_are_counted():
    images = pixels(20)
    train, validation = (data.from_arrays(part) for part in (images[:10], images[10:12]))
    test = data.from_arrays(np.concatenate([images[8:11], images[15:], images[8:9]]))
    assert data.shared(test, train, validation) == (4, 9, 12, 8, 0)  # each copy counts
    changed = images[:10].copy()
    changed[:, 0, 0, 0] ^= 1
    assert data.shared(data.from_arrays(changed), train).count == 0


def test_a_streamed_set_is_hashed_while_it_is_read_and_never_twice():
    images, reads = pixels(12), []
    whole = streamed(images, reads)
    train, test = whole.take(np.arange(8)), data.from_arrays(images[6:])
    assert not data.are_known(train, test)
    train.read(np.arange(6))
    reads.clear()
    assert data.shared(test, train) == (2, 6, 8, 6, 0) and reads == [6, 7]
    reads.clear()
    assert data.are_known(train, test) and data.shared(test, train).count == 2 and not reads
    assert data.shared(test, whole.take([9, 3])).count == 1 and {*reads} == {9}


def test_labels_of_a_streamed_set_are_read_without_decoding():
    images = [b"no picture"] * 5
    assert data.labels_of(streamed(images, [])).tolist() == [0, 1, 0, 1, 0]
    assert data.labels_of(data.from_arrays(PIXELS)) is None


def test_the_same_picture_in_another_format_is_found(tmp_path):
    image = Image.fromarray(pixels(1)[0])
    for split, kind in (("train", "png"), ("test", "bmp")):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            image.rotate(0 if name == "a" else 180).save(tmp_path / split / name / f"0.{kind}")
    train, test = (data.load(tmp_path, split=split) for split in ("train", "test"))
    assert data.shared(test, train) == (2, 2, 2, 2, 0)


def test_copies_of_a_test_image_are_no_images_more():
    images = pixels(5)
    shared = data.shared(
        data.from_arrays(np.tile(images[:4], (60, 1, 1, 1))), data.from_arrays(images[4:])
    )
    assert shared == (0, 240, 1, 4, 0)
    [note] = shared.notes
    assert note.startswith("of 240 test images 4 are different ones, pixel by pixel")
    assert not data.shared(data.from_arrays(images[:4]), data.from_arrays(images[4:])).notes


# --- class names that travel ---------------------------------------------------------------


NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def named():
    head = {"head": "linear", "class_names": NAMES}
    return models.classifier(jax.random.key(1), tiny.encoder(), 3, **head)


def test_class_names_are_saved_and_read_with_a_classifier(tmp_path, named):
    weights.save_classifier(named, tmp_path / "net", builder=tiny.encoder)
    loaded = weights.load_classifier(tmp_path / "net", builder=tiny.encoder)
    assert loaded.class_names == NAMES
    card = json.loads((tmp_path / "net" / "classifier.json").read_text())
    assert card["class_names"] == ["ant", "bee", "cat"]
    weights.export_stablehlo(named, tmp_path / "net.stablehlo")
    beside = json.loads((tmp_path / "net.stablehlo.json").read_text())
    assert beside["class_names"] == ["ant", "bee", "cat"]
    for wrong in (["ant"], "abc", [1, 2, 3]):
        text = json.dumps({**card, "class_names": wrong})
        (tmp_path / "net" / "classifier.json").write_text(text)
        with pytest.raises(ValueError, match="class_names"):
            weights.load_classifier(tmp_path / "net", builder=tiny.encoder)


def test_logits_are_put_in_another_order_by_name(tmp_path, named):
    images = jnp.asarray(pixels(2, 8, 8)) / 255.0
    turned = models.in_order_of(named, ("cat", "ant", "bee"))
    before, after = (np.asarray(net(images).logits) for net in (named, turned))
    np.testing.assert_array_equal(after, before[:, [2, 0, 1]])
    back = models.in_order_of(turned, named.class_names)
    assert back.head == named.head
    np.testing.assert_array_equal(np.asarray(back(images).logits), before)
    weights.save_classifier(turned, tmp_path / "net", builder=tiny.encoder)
    loaded = weights.load_classifier(tmp_path / "net", builder=tiny.encoder)
    assert loaded.class_names == NAMES and loaded.head == named.head
    with pytest.raises(ValueError, match="which are not"):
        models.in_order_of(named, ("ant", "bee", "dog"))
    with pytest.raises(ValueError, match="3 classes have 2 names"):
        models.classifier(jax.random.key(1), named.encoder, 3, class_names=("a", "b"))


def test_an_ensemble_keeps_the_names_and_wants_the_same(named):
    turned = models.in_order_of(named, ("cat", "bee", "ant"))
    with pytest.raises(ValueError, match="one class_names"):
        models.confidence_ensemble([named, turned])
    assert models.confidence_ensemble([named, named]).class_names == named.class_names
    images = jnp.asarray(pixels(2, 8, 8)) / 255.0
    both = models.confidence_ensemble([turned, turned])
    np.testing.assert_array_equal(
        np.argmax(both(images).logits, axis=1), np.argmax(turned(images).logits, axis=1)
    )


# --- one answer ----------------------------------------------------------------------------


def test_checks_of_the_data_judge_shares():
    from robust_ssl.evaluation.checks import leakage, one_answer

    assert [leakage(n, 400, 900).status for n in (0, 1, 3, 4, 400)] == [
        *("passed", "note", "note", "failed", "failed")
    ]
    labels = np.repeat([0, 1, 2], [190, 12, 8])
    always = one_answer(labels == 0, labels, ("good", "bent", "torn"))
    assert always.status == "failed" and "'good'" in always.meaning and "90.5 %" in always.meaning
    nearly = (labels == 0) | (np.arange(210) == 190)
    assert one_answer(nearly, labels).status == "note"
    assert one_answer(labels >= 0, labels).status == "passed"
    assert one_answer(labels == 2, labels).status == "failed"  # the smallest class, for all
    assert one_answer(np.zeros(210, bool), labels).status == "passed"  # bad, but not one answer
    assert one_answer(labels == 1, np.ones(210, int)).status == "not run"


def test_nothing_of_this_needs_more_than_labels_and_limits():
    assert checks.MOST_UNNAMED >= 21_843  # ImageNet-21k, whose test split may be numbers only


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, np.nan, 1]),
        np.array([0, -np.inf, 1]),
        ["cat", None, "dog"],
        [0, None, 1],
        np.array([0, float("nan"), 1], object),
        np.ma.masked_array([0, 9, 1], [False, True, False]),
    ],
)
def test_images_without_a_label_are_named_by_their_rows(labels):
    with pytest.raises(ValueError, match=r"1 of 3 labels of mine are missing.*rows 1; ") as caught:
        checks.as_labels(labels, 3, None, "mine")
    assert "astype" not in str(caught.value) and "unique" not in str(caught.value)


def test_labels_that_a_cast_would_cut_are_not_advised_one():
    with pytest.raises(ValueError, match=r"labels\[1\] is .*0\.5.*2 of 3 are no whole") as caught:
        checks.as_labels([0.0, 0.5, 1.5], 3, None, "mine")
    assert "astype" not in str(caught.value)
    with pytest.raises(ValueError, match=r"astype\(np\.int64\)"):
        checks.as_labels([0.0, 3e9], 2, None, "mine")
