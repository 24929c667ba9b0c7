"""Large sets: batches that processes read, and pictures that nobody can read."""

import logging
import os
import signal

import numpy as np
import pytest
from PIL import Image

from robust_ssl import data
from robust_ssl.parallel import Parallel

BROKEN = 3  # its place in its class, the training split's first


def _folder(tmp_path, broken=()):
    """Two classes of eight pictures of 12 x 12 pixels, each of one color."""
    for split in ("train", "test"):
        for label, name in enumerate(("a", "b")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                color = (20 * i + 90, 100 * label, 40)
                Image.new("RGB", (12, 12), color).save(folder / f"{i}.png")
    for split in broken:
        (tmp_path / split / "a" / f"{BROKEN}.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return tmp_path


def _streamed(folder, split="train", **options):
    return data.load(str(folder), split=split, image_size=8, memory_limit=1, **options)


def _batches(examples, first=0, count=3, devices=2):
    batches = data.Batches(
        *(examples, 4),
        seed=0,
        stage="s",
        parallel=Parallel.create(num_devices=devices),
        resident=False,
    )
    try:
        return [
            {name: np.asarray(x) for name, x in batches(first + step).items()}
            for step in range(count)
        ]
    finally:
        batches.close()


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "first"), [(2, 0), (1, 5)])
def test_batches_are_the_same_however_many_processes_read(tmp_path, devices, first):
    pytest.importorskip("grain")
    folder = _folder(tmp_path)
    expected = _batches(_streamed(folder), first, 6)
    read = _streamed(folder, workers=2)
    for got, want in zip(_batches(read, first, 6, devices), expected, strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    assert np.count_nonzero(read.digests) == len(read)  # what workers saw is known here


def _kill(rows):
    if 5 in rows:
        os.kill(os.getpid(), signal.SIGKILL)
    return [(np.zeros((4, 4, 3), np.uint8), 0) for _ in rows]


@pytest.mark.slow
def test_a_worker_that_dies_and_a_picture_that_is_broken_are_told(tmp_path):
    pytest.importorskip("grain")
    dying = data.StreamedExamples(_kill, np.arange(8), None, "a", workers=1)
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        _batches(dying)
    broken = _streamed(_folder(tmp_path, ["train"]), workers=1)
    with pytest.raises(ValueError, match=rf"{BROKEN}\.png\) cannot be read"):
        _batches(broken, 0, 4)


def test_without_grain_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(RuntimeError, match=r"robust-ssl\[grain\]"):
        _batches(_streamed(_folder(tmp_path), workers=1))


def test_a_broken_picture_is_an_error_or_left_out_and_counted(tmp_path, caplog):
    folder = _folder(tmp_path, ["train", "test"])
    with pytest.raises(ValueError, match=rf"{BROKEN}\.png\) cannot be read"):
        data.load(str(folder), image_size=8)
    for split in ("train", "test"):
        examples = data.load(str(folder), split=split, image_size=8, skip_unreadable=True)
        assert len(examples) == 15
        assert examples.labels.tolist() == [0] * 7 + [1] * 8
        assert "left out, 1 that cannot be read" in examples.notes[-1]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "robust_ssl"):
        streamed = _streamed(folder, skip_unreadable=True)
        batches = _batches(streamed, 0, 4)
    assert list(streamed.unreadable) == [BROKEN]
    assert sum("left out (1 so far)" in line for line in caplog.messages) == 1
    # Its place in the batch is taken by the picture before it, with that one's label.
    colors = np.concatenate([b["images"][:, 0, 0, 1] for b in batches])
    labels = np.concatenate([b["labels"] for b in batches])
    np.testing.assert_array_equal(colors, 100 * labels)
    for batch in batches:
        [place] = np.nonzero(batch["rows"] == BROKEN)[0] if BROKEN in batch["rows"] else [None]
        if place is not None:
            np.testing.assert_array_equal(batch["images"][place], batch["images"][place - 1])


def test_where_figures_are_counted_none_takes_its_place(tmp_path):
    streamed = _streamed(_folder(tmp_path, ["test"]), "test", skip_unreadable=True)
    with pytest.raises(ValueError, match="remove the file"):
        list(data.epoch_batches(streamed, 8))


def test_a_batch_of_nothing_but_broken_pictures_is_an_error():
    examples = data.StreamedExamples(
        lambda rows: [(b"nothing", None) for _ in rows], np.arange(4), 8, skip_unreadable=True
    )
    with pytest.raises(ValueError, match="none of 2 pictures in a row"):
        examples.read([0, 1])


def test_a_function_may_say_itself_how_many_processes_read():
    own = data.StreamedExamples(_kill, np.arange(8), 4, "a", workers=3)
    assert data.load(lambda split: own, memory_limit=1).workers == 3
    assert data.load(lambda split: own, memory_limit=1, workers=2).workers == 2
