"""What is in the way of a file is named as it was typed, before anything is written."""

import errno
import json
import os
import re

import audit_cases as cases
import numpy as np
import pytest

from robust_ssl import disk
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.audit import document, pages
from robust_ssl.cli import main
from robust_ssl.threats import Linf
from robust_ssl.workdir import UnwritableError, WorkdirError, check_files, write_atomically


def perturbation():
    return UniversalPerturbation(np.zeros((4, 4, 3), np.float32), Linf(8 / 255), "small")


WRITERS = {
    "replace": lambda path: disk.replace(path, "text"),
    "save": lambda path: perturbation().save(path),
    "write_atomically": lambda path: write_atomically(path, "text"),
}


def refusal(write, path):
    with pytest.raises((disk.PlaceError, UnwritableError)) as raised:
        WRITERS[write](path)
    text = str(raised.value)
    assert ".tmp" not in text and str(path) in text
    return text


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_in_the_way_of_a_file_is_named_and_not_the_name_in_between(write, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    assert "is a directory" in refusal(write, tmp_path / "folder")
    assert f"no folder {tmp_path / 'none'}; make it" in refusal(write, tmp_path / "none" / "file")
    long = refusal(write, tmp_path / ("a" * 300))
    assert "File name too long" in long
    with pytest.raises((disk.PlaceError, UnwritableError), match="file is no directory"):
        WRITERS[write](tmp_path / "file" / "inner")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_written_to_the_current_directory_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", "."):
        with pytest.raises(disk.PlaceError, match="is a directory"):
            disk.replace(path, "text")


@pytest.fixture
def measured(tmp_path):
    document.write(tmp_path / "audit.json", cases.sealed())
    (tmp_path / "mine.yaml").write_text(cases.answers_text(), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", [*pages.NAMES[1:], "answers.yaml"])
def test_a_directory_in_the_way_of_a_decision_is_wrong_usage(name, measured, capsys):
    (measured / name).mkdir()
    before = sorted(each.name for each in measured.iterdir())
    command = ["audit", "decide", str(measured), f"--answers={measured / 'mine.yaml'}"]
    assert main.main(command) == 2
    err = capsys.readouterr().err
    assert f"{measured / name} is a directory" in " ".join(err.split()) and "move it away" in err
    assert sorted(each.name for each in measured.iterdir()) == before
    assert json.loads((measured / "audit.json").read_text())["decided"] is None


def test_a_file_in_the_way_of_a_runs_figures_is_refused_first(tmp_path):
    (tmp_path / "figures").write_text("")
    with pytest.raises(WorkdirError, match="figures is a file, and a directory of this name"):
        check_files(tmp_path, ["figures/epsilon.png"])


OUTPUTS = {
    "lock": ["encoder", "lock", "simclr-cifar10-r18w24", "-o", "PLACE"],
    "verify": ["encoder", "verify", "none.json", "--json", "PLACE"],
    "export": ["encoder", "export", "simclr-cifar10-r18w24", "--out", "PLACE"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_directory_for_a_file_is_refused_before_the_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("robust_ssl.weights.native.load_encoder", None)
    monkeypatch.setattr("robust_ssl.provenance.open_source", None)
    argv = [str(tmp_path) if word == "PLACE" else word for word in OUTPUTS[name]]
    assert main.main(argv) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path} is a" in err and "name a file in it" in err


@pytest.mark.parametrize("inner", ["", "/deeper"])
def test_a_file_where_an_encoder_is_to_be_written_is_refused(inner, tmp_path, capsys):
    (tmp_path / "taken").write_text("kept")
    argv = ["encoder", "convert", str(tmp_path / "x.pth"), "--out", f"{tmp_path}/taken{inner}"]
    assert main.main(argv) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/taken is no directory" in err and "move it away" in err
    assert "Errno" not in err and (tmp_path / "taken").read_text() == "kept"


LONG = "a" * 300
PATHS = {
    "show": ["show", LONG],
    "decide": ["audit", "decide", LONG],
    "verify": ["encoder", "verify", LONG],
    "encoder": ["encoder", "inspect", f"{LONG}/x.pth"],
    "inspect": ["inspect", LONG, "--baseline", f"{LONG}/x"],
    "run": ["run", "quickstart", f"--workdir={LONG}"],
    "loop": ["show", "loop/inner"],
    "home": ["show", "~nobody-of-this-name/runs"],
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_nothing_can_have_is_wrong_usage(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    try:
        code = main.main(PATHS[name])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and "Errno" not in err, err
    assert not [file for file in tmp_path.iterdir() if file.name != "loop"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_failing_disk_is_not_the_users_mistake(number, tmp_path, monkeypatch):
    def fails(path, *rest):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(disk.os, "open", fails)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "kept"))) as caught:
        disk.replace(tmp_path / "kept", b"content")
    assert caught.value.errno == number and not isinstance(caught.value, disk.PlaceError)
