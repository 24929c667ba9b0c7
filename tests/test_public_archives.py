"""Archives that are damaged or hostile: named, and nothing of them is used or run."""

import io
import pickle
import re
import tarfile
import zipfile

import numpy as np
import public_archives as made
import pytest
from public_archives import FORMATS, counts, prepared, stored

from robust_ssl import pickles
from robust_ssl.data.public import archives, cifar, matrices


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


def test_one_file_must_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MEMBER_LIMIT", 1000)
    files = {"train.bin": np.random.default_rng(0).bytes(1001)}
    folder = stored(tmp_path, {"large.tgz": made.tar(files), "large.zip": made.zipped(files)})
    with pytest.raises(ValueError, match="a file too large"):
        archives.tar_files(folder / "large.tgz", set(files))
    with (
        pytest.raises(ValueError, match="a file too large"),
        archives.zip_members(folder / "large.zip"),
    ):
        pass


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
    for array in (np.zeros((2, 2)), np.asfortranarray(np.zeros((2, 3), np.uint8))):
        value = cifar.load_pickle(pickle.dumps({"data": array}, protocol=2))["data"]
        with pytest.raises(pickles.RefusedError, match="not of plain bytes"):
            value.array()
