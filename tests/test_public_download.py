"""Downloads: what arrives is the published file, and what was cut off goes on."""

import dataclasses
import errno
import io
import json
import os
import socket

import public_archives as made
import pytest

from robust_ssl import data
from robust_ssl.data import public
from robust_ssl.data.public import download as module
from robust_ssl.data.public.download import DownloadError, download
from robust_ssl.progress import Progress

BODY = bytes(range(256)) * 40  # 10,240 bytes
QUIET = Progress("quiet")


@pytest.fixture
def server():
    with made.serving({"pictures.zip": BODY}) as running:
        yield running


def fetch(server, path, file="pictures.zip", **options):
    options = {"progress": QUIET, "wait": lambda seconds: None, "timeout": 5.0, **options}
    return download(f"{server.root}/{file}", path, **options)


def error_of(server, path, **options):
    with pytest.raises(DownloadError) as caught:
        fetch(server, path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    assert not path.exists()
    return message


def test_a_file_arrives_whole_and_nothing_else_is_left(server, tmp_path):
    path = tmp_path / "new" / "pictures.zip"
    assert fetch(server, path, size=len(BODY)) == path
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["pictures.zip"]


def test_what_was_cut_off_goes_on_where_it_ended(server, tmp_path):
    server.cut_after = 4000
    fetch(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == ["", "bytes=4000-", "bytes=8000-"]


def test_another_command_goes_on_too(server, tmp_path):
    path, server.cut_after = tmp_path / "a.zip", 0
    (tmp_path / "a.zip.part").write_bytes(BODY[:3000])
    message = error_of(server, path, size=len(BODY))
    assert "3,000 of 10,240 bytes are in" in message and "--from" in message
    server.cut_after = None
    fetch(server, path, size=len(BODY))
    assert path.read_bytes() == BODY and server.asked[-1][1] == "bytes=3000-"


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.zip.part").write_bytes(BODY[:3000])
    fetch(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == BODY


def test_a_file_that_has_changed_starts_anew(server, tmp_path):
    path = tmp_path / "a.zip"
    server.cut_after = 3000
    error_of(server, path, attempts=1)
    server.cut_after, server.tag = None, '"two"'
    server.files["pictures.zip"] = BODY[::-1]
    fetch(server, path)
    assert path.read_bytes() == BODY[::-1]


def test_a_part_that_is_no_beginning_starts_anew(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(BODY + b"more")
    fetch(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == BODY
    (tmp_path / "b.zip.part").write_bytes(BODY + b"more")
    fetch(server, tmp_path / "b.zip", size=len(BODY))
    assert (tmp_path / "b.zip").read_bytes() == BODY


def test_a_whole_part_is_not_asked_for_again(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(BODY)
    fetch(server, tmp_path / "a.zip", size=len(BODY))
    assert (tmp_path / "a.zip").read_bytes() == BODY and server.asked == []


def test_a_short_answer_is_no_file(server, tmp_path):
    server.cut_after, server.ranges = 4000, False
    message = error_of(server, tmp_path / "a.zip", attempts=2)
    assert "ended after 4,000 of 10,240 bytes" in message
    assert (tmp_path / "a.zip.part").stat().st_size == 4000


def test_another_size_than_the_published_one_is_named(server, tmp_path):
    message = error_of(server, tmp_path / "a.zip", size=99)
    assert "has 10,240 bytes, not 99: it is another file now" in message


def test_what_is_not_there_is_not_asked_for_twice(server, tmp_path):
    message = error_of(server, tmp_path / "none.zip", file="none.zip")
    assert "answered 404" in message and f"{server.root}/none.zip" in message
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server, tmp_path):
    waits = []
    server.status["pictures.zip"] = 503

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            server.status.clear()

    fetch(server, tmp_path / "a.zip", wait=wait)
    assert waits == [2.0, 4.0, 8.0] and (tmp_path / "a.zip").read_bytes() == BODY
    server.status["pictures.zip"] = 503
    assert "answered 503" in error_of(server, tmp_path / "b.zip", attempts=2)


def test_redirects_are_followed_on_the_web_only(server, tmp_path):
    server.leads_to["moved.zip"] = f"{server.root}/pictures.zip"
    fetch(server, tmp_path / "a.zip", file="moved.zip")
    assert (tmp_path / "a.zip").read_bytes() == BODY
    for number, place in enumerate(("file:///etc/passwd", "ftp://localhost/x")):
        server.leads_to["moved.zip"] = place
        message = error_of(server, tmp_path / f"{number}.zip", file="moved.zip", attempts=1)
        assert place in message or "302" in message
    server.leads_to["moved.zip"] = f"{server.root}/moved.zip"
    error_of(server, tmp_path / "c.zip", file="moved.zip", attempts=1)
    with pytest.raises(DownloadError, match="only http and https"):
        download("file:///etc/passwd", tmp_path / "d", progress=QUIET)


def test_nobody_there_is_said_after_some_tries(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.zip"
    waits = []
    with pytest.raises(DownloadError, match=r"a\.zip could not be fetched: ConnectionRefused"):
        download(url, tmp_path / "a.zip", progress=QUIET, wait=waits.append, attempts=3)
    assert waits == [2.0, 4.0]


def test_a_server_that_falls_silent_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.zip"
        with pytest.raises(DownloadError, match="imed out"):
            download(url, tmp_path / "a.zip", progress=QUIET, timeout=0.2, attempts=1)


class FullDisk(io.BytesIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_with_a_way_out(server, tmp_path, monkeypatch):
    real = module.pathlib.Path.open
    monkeypatch.setattr(
        module.pathlib.Path,
        "open",
        lambda path, *a, **k: FullDisk() if a == ("wb",) else real(path, *a, **k),
    )
    message = error_of(server, tmp_path / "a.zip")
    assert "a.zip.part cannot be written: No space left on device" in message
    assert "--data-dir" in message and len(server.asked) == 1


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(server, tmp_path / "file" / "a.zip")


def test_two_processes_do_not_write_into_one_part(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "a.zip.part").open("ab") as other:
        other.write(b"begun")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is fetching" in error_of(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip.part").read_bytes() == b"begun"


def test_an_interrupt_keeps_what_has_arrived(server, tmp_path):
    server.cut_after = 4000

    def wait(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "a.zip", wait=wait)
    assert (tmp_path / "a.zip.part").stat().st_size == 4000
    state = json.loads((tmp_path / "a.zip.part.json").read_text())
    assert state == {"url": f"{server.root}/pictures.zip", "validator": '"one"'}


# --- Whole sets from a server -------------------------------------------------------------------


def prepare(tmp_path, described, **options):
    return public.prepare(described, data_dir=tmp_path, progress=QUIET, **options)


def test_a_set_of_three_archives_is_fetched_and_they_are_kept(tmp_path):
    bodies, content = made.gtsrb()
    images = {split: len(part[0]) for split, part in content.items()}
    with made.serving(bodies) as server:
        described = made.at(made.tiny("gtsrb", bodies, images), server.root)
        assert prepare(tmp_path, described).new
        assert len(data.load("gtsrb", split="test", data_dir=tmp_path)) == 3
        assert sorted(p.name for p in (tmp_path / "downloads").iterdir()) == sorted(bodies)
        server.files.clear()
        assert prepare(tmp_path, described, overwrite=True).new  # from what was kept


def test_an_archive_of_the_other_kind_is_taken_if_it_is_here(tmp_path):
    binary, content = made.cifar10_binary()
    python, _ = made.cifar10_python()
    images = {split: len(part[0]) for split, part in content.items()}
    kinds = [made.tiny("cifar10", b, images, group=g) for g, b in enumerate((binary, python))]
    described = dataclasses.replace(kinds[0], archives=kinds[0].archives + kinds[1].archives)
    made.stored(tmp_path / "downloads", python)
    with made.serving({}) as server:
        assert prepare(tmp_path, made.at(described, server.root)).new
        assert server.asked == []


def test_a_wrong_digest_is_kept_aside_and_not_used(tmp_path):
    bodies, content = made.eurosat()
    images = {split: len(part[0]) for split, part in content.items()}
    with made.serving({"EuroSAT.zip": bodies["EuroSAT.zip"][::-1]}) as server:
        described = made.at(made.tiny("eurosat", bodies, images), server.root)
        with pytest.raises(ValueError, match="is not the published file") as caught:
            prepare(tmp_path, described)
        message, aside = str(caught.value), tmp_path / "downloads" / "EuroSAT.zip.wrong-digest"
        assert str(aside) in message and described.archives[0][0].digest[7:] in message
        assert len(message.splitlines()) <= 5
        assert aside.read_bytes() == bodies["EuroSAT.zip"][::-1]
        with pytest.raises(FileNotFoundError):
            data.load("eurosat", data_dir=tmp_path)
        server.files.update(bodies)
        assert prepare(tmp_path, described).new
    assert len(data.load("eurosat", data_dir=tmp_path)) == 4
