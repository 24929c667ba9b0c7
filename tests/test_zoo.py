"""A zoo can be made again: each config leaves an encoder, its log, its card and a table row."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from test_pretraining import pretrain_config

from robust_ssl import experiment, load_encoder
from robust_ssl.cli import zoo
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress
from robust_ssl.workdir import WorkdirError


def named(name, **changes):
    config = pretrain_config(epochs=1, warmup_epochs=0, **changes)
    config["pretrain"]["encoder"] = {
        "function": "robust_ssl.models.resnet:resnet18", "width": 8, "image_size": 8, "name": name,
    }  # fmt: skip
    return config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("zoo")
    configs = [named("one"), named("broken", batch_size=1000)]
    failures = build(configs, out)
    return out, failures


def build(configs, out):
    layout = Parallel.create(num_devices=2)
    return zoo.build(configs, out, parallel=layout, progress=Progress("quiet"))


def test_a_config_leaves_all_one_needs_to_trust_and_remake_it(built):
    out, _ = built
    folder = out / "one"
    encoder = load_encoder(folder)
    pixels = tiny.images("test")[0][:5].astype(np.float32) / 255
    assert encoder(pixels).features.shape == (5, 64)
    card = json.loads((folder / "encoder.json").read_text())
    weights = (folder / card["weights"]["file"]).read_bytes()
    assert card["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert json.loads((folder / "config.json").read_text()) == card["card"]["config"]
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1]
    page = (folder / "README.md").read_text()
    for words in (card["weights"]["sha256"], "SimCLR", "tiny:images", "64 images, no labels"):
        assert words in page
    for name in ("knn_accuracy", "random_knn_accuracy", "linear_accuracy"):
        assert f"| {100 * card['card'][name]:.1f} |" in page


def test_what_nobody_can_build_is_wrong_usage(tmp_path):
    with pytest.raises(experiment.UsageError, match=r"broken: .*larger than the set"):
        build([named("broken", batch_size=1000)], tmp_path / "zoo")
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write to .*file"):
        build([named("one")], tmp_path / "file")


def test_a_config_that_fails_does_not_stop_the_others(built):
    out, failures = built
    assert set(failures) == {"broken"}
    assert "larger than the set" in failures["broken"]
    assert not (out / "broken").exists()


def test_the_table_has_a_row_for_each_encoder(built):
    out, _ = built
    rows = (out / "README.md").read_text().splitlines()
    assert len(rows) == 3 and rows[2].startswith("| one | SimCLR | 1 | 8 |")


def test_what_is_made_is_not_made_again(built, monkeypatch):
    out, _ = built
    before = (out / "one" / "encoder.safetensors").stat().st_mtime_ns, load_encoder(out / "one")
    monkeypatch.setattr(
        "robust_ssl.experiment.pretrain.train", None
    )  # would raise if it were called
    assert build([named("one")], out) == {}
    np.testing.assert_array_equal(
        load_encoder(out / "one").variables["params"]["stem"]["conv"]["kernel"],
        before[1].variables["params"]["stem"]["conv"]["kernel"],
    )


@pytest.mark.parametrize("text", ['{"name": "al', "[]", "{}"])
def test_a_damaged_card_beside_them_ends_no_build(built, text, caplog, tmp_path):
    out = tmp_path / "zoo"
    shutil.copytree(built[0], out)
    (out / "alien").mkdir()
    (out / "alien" / "encoder.json").write_text(text)
    (out / "apart" / "encoder.json").mkdir(parents=True)
    assert build([named("one")], out) == {}
    assert "alien is not in the table: " in caplog.text
    assert (out / "README.md").read_text() == (built[0] / "README.md").read_text()


def test_what_else_lies_beside_an_encoder_is_not_published(built, tmp_path):
    out = tmp_path / "zoo"
    shutil.copytree(built[0], out)
    expected = sorted(file.name for file in (out / "one").iterdir())
    shutil.rmtree(out / "one")
    left = out / "runs" / "one" / "pretrain" / "encoder"
    (left / ".encoder.safetensors.0123456789abcdef.tmp").write_text("half")
    (left / "__pycache__").mkdir()
    assert build([named("one")], out) == {}
    assert sorted(file.name for file in (out / "one").iterdir()) == expected


def test_two_builds_are_kept_apart(tmp_path):
    out = tmp_path / "zoo"
    out.mkdir()
    another = subprocess.Popen(
        [sys.executable, "-c", HOLDING, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert another.stdout.readline() == b"held\n"
    try:
        with pytest.raises(WorkdirError, match="in use by another run"):
            build([named("one")], out)
        assert [file.name for file in out.iterdir()] == [".lock"]
    finally:
        another.communicate()


HOLDING = """
import sys
from robust_ssl.workdir import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("names", [("one", "one"), ("a/b",), ("runs",), ("",)])
def test_names_that_cannot_be_folders_are_refused_before_anything_runs(names, tmp_path):
    with pytest.raises(experiment.UsageError, match="name"):
        build([named(name) for name in names], tmp_path)
    assert not list(tmp_path.iterdir())
