"""`robust-ssl data`, and the table of public sets."""

import pathlib
import re
import subprocess
import sys

import public_archives as made
import pytest
from public_archives import counts, prepared, stored

from robust_ssl.cli.main import main
from robust_ssl.data import public
from robust_ssl.data.public import photographs, preparation


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
        (["prepare", "CIFAR-10"], "did you mean 'cifar10'"),
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


TERMINATED = """
import os, signal, sys, time
from robust_ssl.cli import main
from robust_ssl.data.public import preparation

def write(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

preparation.obtain, preparation.write = lambda *_, **__: {}, write
preparation.PublicSet.read = lambda *_: None
sys.argv[1:] = ["data", "prepare", "gtsrb32", "--data-dir", "sets"]
sys.exit(main.main())
"""


def test_a_terminated_command_leaves_nothing_half_made(tmp_path):
    command = [sys.executable, "-c", TERMINATED]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75 and "nothing half-made is left" in ended.stderr
    assert not list((tmp_path / "sets").iterdir())


def test_the_page_has_the_sets_of_the_table():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    for described in public.SETS:
        images = f"{sum(described.images.values()):,}"
        assert f"| `{described.name}` | {images} | {described.classes} |" in page
        for digest in described.pixels.values():
            assert digest in page
