"""What is wrong is said before the first step: what, where, what to do; and nothing is lost."""

import os
import re

import jax
import numpy as np
import pytest
import tiny

from robust_ssl import checkpoints, main, parallel, progress, stages

QUICKSTART = str(tiny.CONFIGS / "quickstart.py")


def spoiled(split="train", *, how="", only="train"):
    """`tiny.images`, spoiled in one way."""
    pixels, labels = tiny.images(split)
    pixels = pixels.astype(np.float32) / 255
    if split != only:
        return pixels, labels
    if how == "nan":
        pixels[3, 1, 2, 0] = np.nan
    elif how == "above":
        pixels[5] *= 255
    elif how == "below":
        pixels[5] = -1
    elif how == "rank":
        pixels = pixels[..., 0]
    elif how == "channels":
        pixels = np.concatenate([pixels, pixels[..., :1]], axis=-1)
    elif how == "size":
        pixels = pixels[:, :6]
    elif how == "negative":
        labels[7] = -1
    elif how == "large":
        labels[7] = 4
        return {"images": pixels, "labels": labels, "class_names": "abcd"}
    elif how == "fractions":
        labels = labels + 0.5
    elif how == "empty":
        pixels, labels = pixels[:0], labels[:0]
    elif how == "one label short":
        labels = labels[1:]
    elif how == "fewer classes":
        labels = np.minimum(labels, 2)
    return pixels, labels


def batch_mean(inputs):
    """A loss that takes the mean itself, which the step has to do."""
    return inputs.clean.logits.mean()


def needs_attack(inputs):
    """A loss that looks at adversarial images, which clean training has not."""
    return inputs.adversarial.logits.sum(axis=1)


def data(how, **options):
    source = {"source": "test_bad_input:spoiled", "how": how, "validation": 0.25, **options}
    return {"downstream": source}


CASES = {
    "images with NaN": (data("nan"), ["nan at index [3, 1, 2, 0]", "repair or drop"]),
    "images above 1": (data("above"), ["[0, 1]", "1 of 64 images", "divide by 255"]),
    "images below 0": (data("below"), ["[0, 1]", "[5, 0, 0, 0]", "normalization"]),
    "images of rank 3": (data("rank"), ["[n, height, width, 3]", "(64, 8, 8)", "np.repeat"]),
    "images of 4 channels": (data("channels"), ["3 channels", "(64, 8, 8, 4)", "[..., :3]"]),
    "images of another size": (data("size"), ["6x8", "8x8", "image_size=8"]),
    "test images with NaN": (data("nan", only="test"), ["(test)", "nan at index"]),
    "negative labels": (data("negative"), ["labels[7] is -1", "unlabelled"]),
    "labels too large": (data("large"), ["labels[7] is 4", "number of classes, 4"]),
    "labels not integers": (data("fractions"), ["integers", "labels[0]", "astype(np.int32)"]),
    "labels missing": (data("one label short"), ["64 images and 63 labels"]),
    "other classes in test": (data("fewer classes", only="test"), ["3 classes", "4 logits"]),
    "another class count": (data("", num_classes=10), ["4 classes", "10 logits", "num_classes=4"]),
    "an empty split": (data("empty"), ["(train) is empty", "another split"]),
    "an empty test split": (data("empty", only="test"), ["(test) is empty"]),
    "no validation": (data("", validation=0.0), ["(0, 1)", "got 0.0"]),
    "no labels": ({"downstream": {"source": "tiny:unlabelled", "validation": 0.25}}, ["no labels"]),
    "no such function": (
        {"downstream": {"source": "test_bad_input:spoilt", "validation": 0.25}},
        ["no function 'spoilt'"],
    ),
    "surrogate of another size": (
        {"surrogate": {"source": "tiny:unlabelled", "size": 6}},
        ["6x6", "config.surrogate"],
    ),
    "an epsilon below 0": ({"attack.epsilon": -0.1}, ["[0, 1]", "got -0.1", "config.attack"]),
    "an epsilon above 1": ({"attack.epsilon": 8.0}, ["8/255", "got 8.0", "config.attack"]),
    "a budget above 1": ({"attack.curve": (0.1, 2.0)}, ["[0, 1]", "got 2.0", "config.attack"]),
    "a training epsilon above 1": (
        {"finetune.attack.epsilon": 1.5},
        ["[0, 1]", "got 1.5", "config.finetune.attack"],
    ),
    "a scoring epsilon below 0": (
        {"evaluate.per_image.epsilon": -1.0},
        ["[0, 1]", "got -1.0", "config.evaluate"],
    ),
    "an adv_ratio above 1": (
        {"finetune.adv_ratio": 1.5},
        ["adv_ratio must be in [0, 1]", "got 1.5", "config.finetune"],
    ),
    "an adv_ratio below 0": ({"finetune.adv_ratio": -0.5}, ["adv_ratio must be in [0, 1]"]),
    "a pattern that matches nothing": (
        {"usual.rates": {"encoder/**": 1e-3, "head/**": 1e-3, "encoder/stem/**": 1e-4}},
        ["'encoder/stem/**'", "config.usual"],
    ),
    "a layer without a rate": (
        {"finetune.rates": {"encoder/**": 1e-3}},
        ["head/linear/kernel", "config.finetune"],
    ),
    "a loss that takes the mean": (
        {"finetune.losses": {"mine": ("test_bad_input:batch_mean", 1.0)}},
        ["'mine'", "[batch]", "do not take the mean", "config.finetune"],
    ),
    "such a loss in usual fine-tuning": (
        {"usual.losses": {"mine": ("test_bad_input:batch_mean", 1.0)}},
        ["'mine'", "[batch]", "config.usual"],
    ),
    "such a loss in the second stage": (
        {"stage2.losses": {"mine": ("test_bad_input:batch_mean", 1.0)}},
        ["'mine'", "[batch]", "config.stage2"],
    ),
    "a loss that misses its inputs": (
        {"stage2.losses": {"mine": ("test_bad_input:needs_attack", 1.0)}},
        ["'mine'", "config.stage2"],
    ),
    "a loss that is not there": (
        {"finetune.losses": {"mine": ("test_bad_input:batch_men", 1.0)}},
        ["did you mean batch_mean"],
    ),
    "an augmentation that is not there": (
        {"stage2.augment": "robust_ssl.pretraining:flip_and_shif"},
        ["did you mean flip_and_shift", "config.stage2"],
    ),
    "an attack that is not there": (
        {"attack.methods": {"uap": {"function": "robust_ssl.attacks:UniversalPDG"}}},
        ["did you mean UniversalPGD", "config.attack"],
    ),
    "an option the attack has not": (
        {"attack.methods": {"uap": {"function": "robust_ssl.attacks:UniversalPGD", "size": 1}}},
        ["'uap'", "size"],
    ),
    "a per-image attack that is not there": (
        {"evaluate.per_image.attacks": ("fgsm",)},
        ["'fgsm'", "embed", "pgd"],
    ),
    "a model that is not there": ({"evaluate.models": ("stage3",)}, ["stage3", "stage2"]),
    "a stage that is not there": ({"stages": ("atack",)}, ["atack", "attack", "evaluate"]),
    "no stage": ({"stages": ()}, ["config.stages", "empty"]),
    "a batch larger than the set": ({"usual.batch_size": 512}, ["512", "48", "config.usual"]),
    "a batch that does not divide": ({"stage2.batch_size": 15}, ["15", "multiple of 2"]),
    "an encoder that is not shipped": (
        {"encoder": {"path": "simclr-of-dreams"}},
        ["simclr-of-dreams", "config.encoder"],
    ),
    "no such builder": ({"encoder": {"builder": "resnet19"}}, ["resnet19", "resnet18"]),
    "a head that is not there": ({"downstream_head": "mpl"}, ["mpl", "linear"]),
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir with earlier work in it, in which no stage may begin."""
    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, lambda run: pytest.fail("a stage was begun"))
    for file in ("results.json", "usual/manifest.json", "usual/final/weights"):
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text("earlier work")
    return tmp_path / "run"


def snapshot(folder):
    files = sorted(folder.rglob("*"))
    return [(f, f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else None) for f in files]


def attempt(workdir, changes):
    config = tiny.config()
    for name, value in changes.items():
        *path, last = name.split(".")
        node = config
        for part in path:
            node = node[part]
        if last in node:
            del node[last]
        node[last] = value
    layout = parallel.Parallel.create(num_devices=2)
    stages.run(config, workdir, parallel=layout, progress=progress.Progress("quiet"))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_the_first_step(case, workdir):
    changes, said = CASES[case]
    before = snapshot(workdir)
    with pytest.raises(stages.UsageError) as refused:
        attempt(workdir, changes)
    for words in said:
        assert words in str(refused.value)
    assert snapshot(workdir) == before


def test_the_same_config_unspoiled_is_accepted(workdir):
    with pytest.raises(pytest.fail.Exception, match="a stage was begun"):
        attempt(workdir, data(""))


def test_a_misspelt_data_set_is_answered_with_near_ones(workdir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(workdir.parent / "tfds"))
    before = snapshot(workdir)
    with pytest.raises(stages.UsageError, match=r"'cifra10' is not known to TFDS.*cifar10"):
        attempt(workdir, {"downstream": {"source": "cifra10", "validation": 0.1}})
    assert snapshot(workdir) == before


def test_a_data_set_not_prepared_yet_is_answered_with_the_command(workdir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(workdir.parent / "tfds"))
    with pytest.raises(stages.UsageError, match=r"robust-ssl\[prepare\].* tfds build cifar10 "):
        attempt(workdir, {"surrogate": {"source": "cifar10"}})


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(checkpoints.WorkdirError, match=re.escape(f"{tmp_path}/file/run")):
        attempt(tmp_path / "file" / "run", {})
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_read_only_workdir_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(checkpoints.WorkdirError, match="cannot write"):
        attempt(folder, {})


# --- The same on the command line -------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(main, "_start_jax", lambda arguments, several: jax.devices())
    yield lambda *arguments: main.main(["run", f"--config={QUICKSTART}", *arguments])
    progress.set_mode("auto")
    progress.clear_stop()


def test_a_missing_workdir_is_a_usage_error(command, capsys):
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == main.USAGE
    assert "--workdir" in capsys.readouterr().err


def test_an_unknown_setting_is_a_usage_error(command, capsys, tmp_path):
    workdir = tmp_path / "run"
    assert command(f"--workdir={workdir}", "--config.finetune.adv_ration=1.0") == main.USAGE
    said = capsys.readouterr().err
    assert "config.finetune.adv_ration" in said and "did you mean adv_ratio" in said
    assert not workdir.exists()


def test_bad_input_is_a_usage_error_on_the_command_line(command, capsys, workdir):
    before = snapshot(workdir)
    setting = "--config.finetune.adv_ratio=3/2"
    tiny_encoder = "--config.encoder.path=simclr-of-dreams"
    assert command(f"--workdir={workdir}", setting, tiny_encoder) == main.USAGE
    said = capsys.readouterr().err
    assert "robust-ssl: error: " in said and "Traceback" not in said
    assert snapshot(workdir) == before
