"""Large sets: batches that processes read, and pictures that nobody can read."""

import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
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


def _children():
    return multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_batches_and_no_process(tmp_path, number):
    pytest.importorskip("grain")
    expected = _batches(_streamed(_folder(tmp_path)), 0, 9)
    batches = data.Batches(
        *(_streamed(tmp_path, workers=2), 4),
        seed=0,
        stage="s",
        parallel=Parallel.create(num_devices=2),
        resident=False,
    )
    reader = threading.Thread(target=batches, args=(0,), daemon=True)
    reader.start()
    while len(_children()) < 2:  # as soon as they are there: they import for seconds
        time.sleep(0.01)
    for child in _children():
        os.kill(child.pid, number)
    reader.join(120)
    assert not reader.is_alive()
    for child in _children():
        os.kill(child.pid, number)
    for step in range(1, 9):  # more than was read ahead
        np.testing.assert_array_equal(batches(step)["images"], expected[step]["images"])
    began = time.monotonic()
    batches.close()
    assert not _children()
    assert time.monotonic() - began < 10


READS = """
import multiprocessing, os, signal, sys
from robust_ssl import data
from robust_ssl.parallel import Parallel
streamed = data.load(sys.argv[1], image_size=8, memory_limit=1, workers=2)
batches = data.Batches(
    streamed, 4, seed=0, stage="s", parallel=Parallel.create(), resident=False
)
batches(0)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a signal of Unix")
def test_no_worker_outlives_a_run_that_was_killed(tmp_path):
    pytest.importorskip("grain")
    done = subprocess.run(
        [sys.executable, "-c", READS, str(_folder(tmp_path))],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    try:
        deadline = time.monotonic() + 10
        while any(map(_is_there, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_is_there, workers))
    finally:
        for pid in filter(_is_there, workers):
            os.kill(pid, signal.SIGKILL)


def _is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


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


@pytest.mark.parametrize("skip", [False, True])
def test_a_picture_that_is_gone_is_not_taken_for_a_broken_one(tmp_path, skip):
    """Its disk may be away for a while, and a resumed run must train on what it trained on."""
    streamed = _streamed(_folder(tmp_path, []), skip_unreadable=skip)
    (tmp_path / "train" / "b" / "5.png").unlink()
    with pytest.raises(data.UnreadableError, match=r"b/5\.png\) cannot be opened: No such .*back"):
        streamed.read(np.arange(16))
    assert not streamed.unreadable


def test_where_figures_are_counted_none_takes_its_place(tmp_path):
    streamed = _streamed(_folder(tmp_path, ["test"]), "test", skip_unreadable=True)
    with pytest.raises(ValueError, match="remove the file"):
        list(data.epoch_batches(streamed, 8))


def test_the_broken_picture_that_is_named_is_the_one_of_this_batch(tmp_path):
    """Training and validation share what was noted: a training picture was first, and is fine."""
    folder = _folder(tmp_path, ["train"])
    (folder / "train" / "b" / "5.png").write_bytes(b"no picture")
    streamed = _streamed(folder, skip_unreadable=True)
    training = dataclasses.replace(streamed.take(np.arange(8)), trained_on=True)
    validation = dataclasses.replace(streamed.take(np.arange(8, 16)), trained_on=False)
    training.read(np.arange(8))
    with pytest.raises(data.UnreadableError, match=r"b/5\.png\).*remove the file"):
        validation.read(np.arange(8))


def test_another_file_of_a_large_folder_is_other_data(tmp_path):
    folder = _folder(tmp_path)
    before = _streamed(folder).fingerprint()
    assert _streamed(folder).fingerprint() == before
    last = folder / "train" / "b" / "7.png"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(last)  # of another length
    assert _streamed(folder).fingerprint() != before
    many = data.StreamedExamples(
        lambda rows: [(np.full((4, 4, 3), row // 2, np.uint8), 0) for row in rows],
        *(np.arange(200), None, ["a"]),
    )
    changed = dataclasses.replace(
        many, records=lambda rows: [(np.full((4, 4, 3), row // 3, np.uint8), 0) for row in rows]
    )
    assert many.fingerprint() != changed.fingerprint()  # the first ones alone would be alike


@pytest.mark.parametrize(("split", "trained_on"), [("fold1", True), ("train[:75%]", None)])
def test_what_is_trained_on_is_no_matter_of_a_name(split, trained_on):
    pixels = np.zeros((8, 8, 3), np.uint8)
    examples = data.StreamedExamples(
        lambda rows: [(b"nothing" if row == 1 else pixels, 0) for row in rows],
        np.arange(4),
        *(8, ["a"]),
        split=split,
        skip_unreadable=True,
        trained_on=trained_on,
    )
    batch = examples.read(np.arange(4), places=np.arange(4))
    assert batch["images"].shape == (4, 8, 8, 3)
    _, validation = data.carve(examples, count=1)
    assert validation.trained_on is False
    with pytest.raises(ValueError, match="where figures are counted"):
        dataclasses.replace(examples, trained_on=False).read(np.arange(4), places=np.arange(4))


def test_a_corrected_label_is_another_set(tmp_path):
    folder = tmp_path / "train"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(70):
            Image.new("RGB", (8, 8), (i, i, i)).save(folder / name / f"{i:03}.png")
    before = _streamed(tmp_path).fingerprint()
    assert _streamed(tmp_path).fingerprint() == before
    (folder / "b" / "050.png").rename(folder / "a" / "100.png")
    assert _streamed(tmp_path).fingerprint() != before


def test_a_batch_of_nothing_but_broken_pictures_is_an_error():
    examples = data.StreamedExamples(
        lambda rows: [(b"nothing", None) for _ in rows], np.arange(4), 8, skip_unreadable=True
    )
    with pytest.raises(ValueError, match="none of 2 pictures in a row"):
        examples.read([0, 1])


def _of_two(picture, label):
    return data.StreamedExamples(lambda rows: [(picture, label)] * 2, np.arange(2), None, "ab")


PIXELS = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (_of_two(PIXELS, 5), "image 0 of .*labels"),
        (_of_two(PIXELS, None), "image 0 of .*labels"),
        (_of_two(PIXELS.astype(np.float32), 0), r"image 0 of .* float32 \[4, 4, 3\]; .*uint8"),
        (_of_two(PIXELS[..., 0], 0), r"image 0 of .* uint8 \[4, 4\]; pixels are"),
        (
            data.StreamedExamples(
                lambda rows: [(PIXELS[row:], 0) for row in rows], np.arange(2), None, "ab"
            ),
            r"image 1 of .*\(3, 4, 3\), the first",
        ),
        (
            data.StreamedExamples(lambda rows: {}["row 17"], np.arange(2), None, "ab"),
            "function that reads 'examples'.*KeyError: 'row 17'",
        ),
        (
            data.StreamedExamples(lambda rows: [(PIXELS, 0)], np.arange(2), None, "ab"),
            "1 records for 2 rows",
        ),
    ],
)
def test_whatever_is_wrong_with_what_is_read_is_no_fault_of_what_is_trained(examples, message):
    with pytest.raises(data.UnreadableError, match=message):
        examples.read([0, 1])


def test_a_function_may_say_itself_how_many_processes_read():
    own = data.StreamedExamples(_kill, np.arange(8), 4, "a", workers=3)
    assert data.load(lambda split: own, memory_limit=1).workers == 3
    assert data.load(lambda split: own, memory_limit=1, workers=2).workers == 2


# --- Of several processes each reads its part -------------------------------------------------


def test_a_part_of_a_batch_is_what_it_is_in_the_whole(tmp_path):
    read = []
    folder = _folder(tmp_path, ["train"])
    streamed = _streamed(folder, skip_unreadable=True)

    def records(rows):
        read.extend(rows.tolist())
        return streamed.records(rows)

    for whole in (streamed, streamed.in_memory()):
        rows = np.array([5, BROKEN, 1, 0])
        expected = whole.read(rows)
        for places in ([0, 1], [1, 2], [1], [3], [0, 1, 2, 3]):
            part = whole.read(rows, places=np.array(places))
            for name, values in expected.items():
                np.testing.assert_array_equal(part[name], values[places])
    counted = dataclasses.replace(streamed, records=records)
    counted.read(rows, places=np.array([2, 3]))
    assert read == [1, 0]
    counted.read(rows, places=np.array([1, 2]))  # and what stands in for the broken one
    assert sorted(read[2:]) == [1, BROKEN, 5]


def test_a_part_is_put_where_it_is_in_the_whole():
    layout = Parallel.create(num_devices=2)
    batch = {"images": np.arange(24, dtype=np.uint8).reshape(4, 6)}
    for ours, whole in zip(
        jax.tree.leaves(layout.put_own(batch, 4)), jax.tree.leaves(layout.put(batch)), strict=True
    ):
        assert ours.sharding == whole.sharding
        np.testing.assert_array_equal(ours, whole)
    assert layout.own_places(4).tolist() == [0, 1, 2, 3]


READER = """
import dataclasses, json, sys, jax, numpy as np
number, port, folder, workers = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from robust_ssl import data
from robust_ssl.parallel import Parallel
read = []
streamed = data.load(folder, image_size=8, memory_limit=1, skip_unreadable=True, workers=workers)
records = streamed.records
def counted(rows):
    read.extend(rows.tolist())
    return records(rows)
streamed = dataclasses.replace(streamed, records=counted)
batches = data.Batches(streamed, 4, seed=0, stage="s", parallel=Parallel.create(), resident=False)
own = [{name: x.addressable_shards[0].data for name, x in batches(step).items()} for step in (0, 1)]
batches.close()
own = [{name: np.asarray(x).tolist() for name, x in batch.items()} for batch in own]
print(json.dumps([own, len(read)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0])  # 1 holds too, and takes three times as long
def test_of_two_processes_each_reads_its_half_of_every_batch(tmp_path, workers):
    if workers:
        pytest.importorskip("grain")
    folder = str(_folder(tmp_path, ["train"]))
    whole = _batches(_streamed(folder, skip_unreadable=True), 0, 2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    root = str(pathlib.Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(number), port, folder, str(workers)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in both]
    finally:
        for one in both:
            one.kill()
    for number, (own, read) in enumerate(said):
        for batch, expected in zip(own, whole, strict=True):
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name], values[2 * number : 2 * number + 2])
        # Half of four steps (two are read ahead), and what stands in for the broken picture.
        assert workers or read <= 2 * 4 + 3


def test_pictures_that_cannot_be_read_are_no_copies_of_any(tmp_path):
    """The first picture is among them, by which the size of all is known where none is given."""
    folder = _folder(tmp_path, ["train"])
    (folder / "train" / "a" / f"{BROKEN}.png").rename(folder / "train" / "a" / "00.png")
    options = {"memory_limit": 1, "skip_unreadable": True}
    train, test = (data.load(str(folder), split=s, **options) for s in ("train", "test"))
    assert train.image_shape == (12, 12, 3)
    # All but that of the renamed place are in both.
    assert data.shared(test, train) == (15, 16, 15, 16, 0) and data.are_known(train, test)
    assert data.shared(test, train) == (15, 16, 15, 16, 0)  # and nothing is asked of it again
