"""What is taken from a working directory was made there, from the same things, by one run."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl.workdir import (
    DamagedTreeError,
    WorkdirError,
    hold,
    load_arrays,
    lock,
    open_stage,
    paths,
    save_arrays,
    workdir_path,
)

STATE = {"w": jnp.arange(3.0)}


def begun(workdir, config=None, seed=0):
    """A stage that was ended suddenly after its first checkpoint."""
    with open_stage(workdir, "s", config or {"epochs": 1}, {"data": "a"}, seed) as stage:
        stage.log(0, loss=1.0)
        stage.save(1, STATE)
    return stage


def done(workdir, **options):
    with open_stage(workdir, "s", {}, {}, 0, **options) as stage:
        if not stage.done:
            (stage.path / "model.bin").write_bytes(b"weights")
            stage.finish({"accuracy": 0.5}, "identity")
    return stage


# --- What it was made from --------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"epochs": 2}},
        {"seed": 1},
        {"inputs": {"data": "b"}},
        {"inputs": {"data": "a", "code/mine:loss": "c"}},
    ],
)
def test_without_its_manifest_a_state_is_taken_for_its_own_settings_only(other, tmp_path, caplog):
    (begun(tmp_path).path / "manifest.json").unlink()
    own = {"config": {"epochs": 1}, "inputs": {"data": "a"}, "seed": 0}
    with open_stage(tmp_path, "s", **{**own, **other}) as stage:
        assert stage.restore_latest(STATE) is None
        assert stage.metrics() == []
    assert "was made with another config, seed, input or code" in caplog.text
    assert (stage.path / "other-1").is_dir()  # nothing is lost


def test_without_its_manifest_the_same_run_goes_on(tmp_path):
    (begun(tmp_path).path / "manifest.json").unlink()
    assert begun(tmp_path).restore_latest(STATE)[0] == 1


def test_a_state_under_another_number_is_not_taken(tmp_path):
    stage = begun(tmp_path)
    (stage.checkpoints / "1").rename(stage.checkpoints / "7")
    assert stage.restore_latest(STATE) is None


def test_arrays_are_given_for_what_they_were_made_from(tmp_path, caplog):
    file = tmp_path / "part.npz"
    save_arrays(file, {"a": np.arange(3), "name": "x"}, "mine")
    assert load_arrays(file, "mine")["a"].tolist() == [0, 1, 2]
    assert load_arrays(file, "another") is None
    assert "made again" in caplog.text and (tmp_path / "part.npz.other").exists()
    save_arrays(file, {"a": np.arange(3)}, "mine")
    file.rename(tmp_path / "exchanged.npz")
    assert load_arrays(tmp_path / "exchanged.npz", "mine") is None


def test_no_flipped_bit_of_an_array_file_is_believed(tmp_path):
    file = tmp_path / "part.npz"
    save_arrays(file, {"a": np.arange(3)}, "mine")
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        arrays = load_arrays(file, "mine")
        assert arrays is None or arrays["a"].tolist() == [0, 1, 2], place
    assert (tmp_path / "part.npz.damaged").exists()


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no lzma")])
def test_what_is_no_damage_sets_nothing_aside(error, tmp_path, monkeypatch):
    def fails(*given, **options):
        raise error

    file = tmp_path / "part.npz"
    save_arrays(file, {"a": np.arange(3)}, "mine")
    stage = begun(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", fails)
        patch.setattr("robust_ssl.workdir.stage.read_tree", fails)
        with pytest.raises(type(error)):
            load_arrays(file, "mine")
        with pytest.raises(type(error)):
            stage.restore_latest(STATE)
    assert sorted(tmp_path.rglob("*")) == before
    assert load_arrays(file, "mine")["a"].tolist() == [0, 1, 2]
    assert begun(tmp_path / "run").restore_latest(STATE)[0] == 1


def test_a_digit_in_a_manifest_is_noticed_with_the_way_out(tmp_path):
    file = done(tmp_path).path / "manifest.json"
    file.write_text(file.read_text().replace('"accuracy": 0.5', '"accuracy": 0.9'))
    with pytest.raises(WorkdirError, match=r"manifest.json is not what was written.*remove it"):
        done(tmp_path)
    file.unlink()
    assert done(tmp_path).results == {"accuracy": 0.5}


def test_other_versions_and_devices_are_said_and_kept(tmp_path, caplog):
    file = begun(tmp_path).path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["versions"]["jax"], manifest["devices"]["count"] = "0.4.1", 64
    file.write_text(json.dumps(manifest))
    begun(tmp_path)
    assert "jax: 0.4.1 -> " in caplog.text and "count: 64 -> 4" in caplog.text
    begun(tmp_path)
    [before] = json.loads(file.read_text())["before"]
    assert before["versions"]["jax"] == "0.4.1" and before["devices"]["count"] == 64


# --- What a finished stage left ---------------------------------------------------------------


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_what_is_gone_after_done_is_named_or_made_again(damage, tmp_path, caplog):
    file = done(tmp_path).path / "model.bin"
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes({"cut": b"wei", "flipped": b"weightr"}[damage])
    with pytest.raises(WorkdirError, match=r"(?s)not what was trained there.*model.bin.*remove"):
        done(tmp_path, made="trained")
    assert done(tmp_path, redo=True).done
    assert file.read_bytes() == b"weights"
    assert "is made again" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *(".metrics.jsonl.swp", "notes.txt~", ".nfs000012", ".DS_Store", "Thumbs.db"),
        *("__pycache__/mine.pyc", "part/.model.bin.swp", "part/__pycache__/a.pyc"),
    ],
)
def test_what_an_editor_or_a_disk_left_there_is_no_result(name, tmp_path):
    with open_stage(tmp_path, "s", {}, {}, 0) as stage:
        for file in (stage.path / "part" / "model.bin", foreign := stage.path / name):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"weights")
        stage.finish({"accuracy": 0.5}, "identity")
    assert list(stage.manifest["files"]) == ["part/model.bin"]
    foreign.unlink()
    assert done(tmp_path, made="trained").results == {"accuracy": 0.5}


def test_a_checkpoint_whose_arrays_are_not_there_is_an_error_at_once(tmp_path, monkeypatch):
    from robust_ssl.workdir import stage as module

    with open_stage(tmp_path, "s", {}, {}, 0) as stage:
        monkeypatch.setattr(module, "is_committed", lambda path, origin: False)
        stage.save(1, STATE)
        with pytest.raises(OSError, match=r"cannot write .*checkpoints/1: it is not what was"):
            stage.wait()


@pytest.mark.parametrize("name", ["lr=[0.1]", "back\\slash", "all*"])
def test_a_name_that_reads_as_a_pattern_is_a_name(name, tmp_path):
    begun(tmp_path / name)
    step, state = begun(tmp_path / name).restore_latest(STATE)
    assert step == 1 and state["w"].tolist() == [0, 1, 2]


def test_a_way_around_a_pattern_goes_with_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    for name in ("a[1]", "a[2]"):
        begun(tmp_path / name)
    assert len(list((tmp_path / "links").iterdir())) == 2
    shutil.rmtree(tmp_path / "a[1]")
    begun(tmp_path / "a[3]")
    ends = {os.readlink(link) for link in (tmp_path / "links").iterdir()}
    assert ends == {str(tmp_path / name / "s" / "checkpoints") for name in ("a[2]", "a[3]")}


@pytest.mark.parametrize(
    "name", ["", " ", "gs://bucket/run", "http://127.0.0.1/run", "s3:/b", "caf\udce9", "a\0b"]
)
def test_what_is_no_directory_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError, match="--workdir"):
        open_stage(name, "s", {}, {}, 0)
    assert not list(tmp_path.iterdir())


def test_a_home_that_is_not_known_is_named(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(WorkdirError, match="write the whole path"):
        workdir_path("~/runs")


def test_a_tilde_is_the_home_only_where_the_text_begins_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert workdir_path("~/runs") == tmp_path / "home" / "runs"
    for name in ("./~u", "./~/x", "a/~u", pathlib.Path("a/~")):
        assert workdir_path(name) == tmp_path / name
        assert workdir_path(workdir_path(name)) == tmp_path / name


def test_a_working_directory_stays_where_it_was_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with open_stage("run", "s", {}, {}, 0) as stage, hold("run"):
        monkeypatch.chdir(tmp_path / "elsewhere")
        stage.log(0, loss=1.0)
        stage.finish({})
    assert (tmp_path / "run" / "s" / "manifest.json").is_file()
    assert not (tmp_path / "run" / lock.FILE).exists()
    assert not list((tmp_path / "elsewhere").iterdir())


# --- The log ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"\xff", b"\x00", b"{", b'{"step": "x"}', b"[]", b""])
def test_a_bad_byte_in_the_log_costs_its_line(damage, tmp_path, caplog):
    stage = begun(tmp_path)
    file = stage.path / "metrics.jsonl"
    file.write_bytes(damage + b"\n" + file.read_bytes())
    with open_stage(tmp_path, "s", {"epochs": 1}, {"data": "a"}, 0) as stage:
        assert stage.restore_latest(STATE)[0] == 1
    assert stage.metrics() == [{"step": 0, "loss": 1.0}]
    assert "metrics.jsonl: 1 lines cannot be read" in caplog.text
    assert (stage.path / "metrics.jsonl.damaged").exists()


def test_a_digit_in_the_log_is_said(tmp_path, caplog):
    file = begun(tmp_path).path / "metrics.jsonl"
    file.write_text(file.read_text().replace("1.0", "2.0"))
    with open_stage(tmp_path, "s", {"epochs": 1}, {"data": "a"}, 0) as stage:
        assert stage.restore_latest(STATE)[0] == 1
    assert "metrics.jsonl is lost, or not what was logged before step 1" in caplog.text


@pytest.mark.parametrize("remains", [None, ""])
def test_a_lost_log_of_a_running_stage_is_said(remains, tmp_path, caplog):
    file = begun(tmp_path).path / "metrics.jsonl"
    file.unlink()
    if remains is not None:
        file.write_text(remains)
    with open_stage(tmp_path, "s", {"epochs": 1}, {"data": "a"}, 0) as stage:
        assert stage.restore_latest(STATE)[0] == 1
    assert "metrics.jsonl is lost, or not what was logged before step 1" in caplog.text


def test_a_changed_log_of_a_finished_stage_is_said(tmp_path, caplog):
    with open_stage(tmp_path, "s", {"epochs": 1}, {"data": "a"}, 0) as stage:
        stage.log(0, loss=1.0)
        stage.finish({})
    (stage.path / "metrics.jsonl").unlink()
    assert open_stage(tmp_path, "s", {"epochs": 1}, {"data": "a"}, 0).done
    assert "metrics.jsonl is lost, or not what was logged" in caplog.text


# --- One run at a time ------------------------------------------------------------------------

OTHER = """
import sys
from robust_ssl.workdir import lock
import contextlib
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def other_run(workdir):
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(workdir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_a_dead_one_gives_way(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "robust_ssl")
    process = other_run(tmp_path)
    with pytest.raises(WorkdirError, match=rf"in use by another run, process {process.pid} on "):
        begun(tmp_path)
    process.kill()  # not waited for: it is a zombie, which holds nothing
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    begun(tmp_path)
    assert f"held by process {process.pid}" in caplog.text and "which is gone" in caplog.text
    assert not (tmp_path / lock.FILE).exists()
    process.communicate()


def holder(**changes):
    mine = {"host": "elsewhere", "process": 1, "started": "5", "machine": "x", "since": "then"}
    return json.dumps({**mine, "token": "t", **changes})


def test_of_another_machine_the_file_is_watched(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 0.3)
    monkeypatch.setattr(lock, "TOUCH_EVERY", 0.1)
    (tmp_path / lock.FILE).write_text(holder())
    with hold(tmp_path):
        assert "watching" in caplog.text and "which is gone" in caplog.text
    (tmp_path / lock.FILE).write_text(holder())
    times = iter(range(100))
    monkeypatch.setattr(lock, "_touched_at", lambda file: next(times))
    with pytest.raises(WorkdirError, match="process 1 on elsewhere since then"), hold(tmp_path):
        pass


def test_a_process_of_the_same_number_is_not_the_holder(tmp_path):
    here = {"host": lock.platform.node(), "machine": lock._machine(), "process": os.getpid()}
    (tmp_path / lock.FILE).write_text(holder(**here, started="1"))
    with hold(tmp_path):
        pass


def test_who_was_taken_for_dead_writes_no_more(tmp_path):
    with open_stage(tmp_path, "s", {}, {}, 0) as stage:
        (tmp_path / lock.FILE).write_text(holder())
        for write in (stage.write_manifest, lambda: stage.save(1, STATE)):
            with pytest.raises(WorkdirError, match="was taken over by process 1 on elsewhere"):
                write()
    assert (tmp_path / lock.FILE).exists()  # it is the other one's


def test_a_directory_that_is_gone_was_taken_over_by_nobody(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with hold(run):
        run.rename(tmp_path / "moved")
        with pytest.raises(WorkdirError, match="is not there any more: the directory was moved"):
            lock.check_held(run)


def test_a_copy_of_a_directory_in_use_is_in_nobodys_use(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 0.3)
    run = tmp_path / "run"
    run.mkdir()
    with hold(run):
        shutil.copytree(run, tmp_path / "copy")
        with hold(tmp_path / "copy"):
            assert "whose directory was copied here" in caplog.text
        # Of the directory itself nobody doubts who has it.
        with pytest.raises(WorkdirError, match="in use by another run"):
            lock._take(run, "another")


def test_a_link_is_followed_once(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    latest = tmp_path / "latest"
    latest.symlink_to("first")
    with open_stage(latest, "s", {}, {}, 0) as stage:
        latest.unlink()
        latest.symlink_to("second")
        stage.finish({})
    assert (tmp_path / "first" / "s").is_dir() and not list((tmp_path / "second").iterdir())


def test_a_run_may_hold_its_directory_twice_and_a_damaged_lock_is_none(tmp_path):
    (tmp_path / lock.FILE).write_text("{")
    with hold(tmp_path):
        with hold(tmp_path):
            pass
        assert (tmp_path / lock.FILE).exists()
    assert not (tmp_path / lock.FILE).exists()


def test_a_state_that_cannot_be_read_at_all_is_still_an_error(tmp_path):
    stage = begun(tmp_path)
    for file in (stage.checkpoints / "1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(DamagedTreeError, match="remove"):
        stage.restore_latest(STATE)


# --- What a sudden end leaves -------------------------------------------------------------------

WRITES = """
import sys
from robust_ssl import disk
with disk.replacing(sys.argv[1]) as file:
    print("begun", flush=True)
    sys.stdin.readline()
"""


def writing(file):
    """Another process in the middle of writing a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_who_holds_a_directory_removes_what_a_killed_run_was_writing(tmp_path):
    places = [tmp_path, tmp_path / "analysis", tmp_path / "s", tmp_path / "s" / "classifier"]
    for folder in places:
        folder.mkdir(exist_ok=True)
        process = writing(folder / "manifest.json")
        process.kill()
        process.communicate()
        assert [file.suffix for file in folder.iterdir() if file.is_file()] == [".tmp"]
    others = [tmp_path / ".mine.tmp", tmp_path / ".x.0123456789abcdeF.tmp", tmp_path / "a.tmp"]
    for file in others:
        file.write_text("of somebody else")
    done(tmp_path)
    assert {file for file in tmp_path.rglob("*.tmp")} == set(others)


def test_what_another_process_is_writing_stays(tmp_path):
    process = writing(tmp_path / "export.bin")
    with hold(tmp_path):
        pass
    process.communicate("\n")
    assert process.returncode == 0 and (tmp_path / "export.bin").exists()


def test_what_was_taken_for_a_result_and_is_none_may_go(tmp_path, caplog):
    """Earlier a leftover, or a file manager's file, was in the manifest."""
    beside = tmp_path / "figures"
    beside.mkdir()
    leftovers = [beside / ".DS_Store", beside / ".fourier.png.2ef82ef82ef82ef8.tmp"]
    with open_stage(tmp_path, "s", {}, {}, 0) as stage:
        for file in leftovers:
            file.write_text("x")
        stage.finish({}, beside=leftovers)
    for file in leftovers:
        file.unlink()
    assert open_stage(tmp_path, "s", {}, {}, 0).done and not caplog.text


def test_what_is_made_again_is_said_once_and_edited_text_is_kept(tmp_path, caplog):
    table = tmp_path / "energy.csv"

    def made():
        with open_stage(tmp_path, "s", {}, {}, 0, redo=True) as stage:
            if not stage.done:
                table.write_text("numbers")
                stage.finish({}, beside=[table])

    made()
    table.write_text("numbers and notes")
    made()
    assert caplog.text.count("is made again") == 1
    assert "what was there is energy.csv.changed" in caplog.text
    assert (tmp_path / "energy.csv.changed").read_text() == "numbers and notes"
    assert table.read_text() == "numbers"
