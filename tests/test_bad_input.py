"""What is wrong is said before the first step: what, where, what to do; and nothing is lost."""

import os
import re

import jax
import numpy as np
import pytest
import tiny

from robust_ssl import experiment, parallel, progress, stopping
from robust_ssl.cli import main, run
from robust_ssl.experiment import stages
from robust_ssl.workdir import WorkdirError

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
        pixels = pixels.reshape(len(pixels), -1)
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
    elif how == "another class":
        labels[7] = 4
    elif how == "a class without images":
        return {"images": pixels, "labels": labels, "class_names": "abcde"}
    elif how == "from one":
        labels = labels + 1
    return pixels, labels


def other_names(split="train"):
    """`tiny.images` whose splits call a class by two names."""
    pixels, labels = tiny.images(split)
    return {
        "images": pixels,
        "labels": labels,
        "class_names": "abCd" if split == "train" else "abcd",
    }


def batch_mean(inputs):
    """A loss that takes the mean itself, which the step has to do."""
    return inputs.clean.logits.mean()


def normalized(key, image):
    """An augmentation that returns what a network of PyTorch would be given."""
    return (image - 0.5) / 0.25


def needs_attack(inputs):
    """A loss that looks at adversarial images, which clean training has not."""
    return inputs.adversarial.logits.sum(axis=1)


def data(how, **options):
    source = {"function": "test_bad_input:spoiled", "how": how, "validation": 0.25, **options}
    return {"downstream": source}


def recipe(**entries):
    return {"stages": ("train",), "recipes.mine": {"batch_size": 16, **entries}}


CASES = {
    "images with NaN": (data("nan"), ["nan at index [3, 1, 2, 0]", "repair or drop"]),
    "images above 1": (data("above"), ["[0, 1]", "1 of 64 images", "divide by 255"]),
    "images below 0": (data("below"), ["[0, 1]", "[5, 0, 0, 0]", "normalization"]),
    "images of rank 2": (data("rank"), ["[n, height, width, 3]", "(64, 192)", "reshape"]),
    "images of 4 channels": (data("channels"), ["3 channels", "(64, 8, 8, 4)", "[..., :3]"]),
    "images of another size": (data("size"), ["6x8", "8x8", "image_size=8"]),
    "test images with NaN": (data("nan", only="test"), ["(test)", "nan at index"]),
    "negative labels": (data("negative"), ["labels[7] is -1", "unlabelled"]),
    "labels too large": (data("large"), ["labels[7] is 4", "number of classes, 4"]),
    "labels not integers": (data("fractions"), ["integers", "labels[0]", "no whole", "digitize"]),
    "labels missing": (data("one label short"), ["64 images and 63 labels"]),
    "other classes in test": (
        data("another class", only="test"),
        ["not those of", "only the first has '4'"],
    ),
    "other class names in test": (
        {"downstream": {"function": "test_bad_input:other_names", "validation": 0.25}},
        ["only the first has 'c' (near 'C')", "'C'"],
    ),
    "a class that nothing trains": (
        data("a class without images"),
        ["1 of the 5 classes", "no training image: 'e'"],
    ),
    "labels from 1": (data("from one"), ["start at 1", "labels - 1"]),
    "another class count": (data("", num_classes=10), ["4 classes", "10 logits", "num_classes=4"]),
    "an empty split": (data("empty"), ["(train) is empty", "another split"]),
    "an empty test split": (data("empty", only="test"), ["(test) is empty"]),
    "no validation": (data("", validation=0.0), ["(0, 1)", "got 0.0"]),
    "no labels": (
        {"downstream": {"function": "tiny:unlabelled", "validation": 0.25}},
        ["no labels"],
    ),
    "no such function": (
        {"downstream": {"function": "test_bad_input:spoilt", "validation": 0.25}},
        ["no function 'spoilt'"],
    ),
    "surrogate of another size": (
        {"surrogate": {"function": "tiny:unlabelled", "size": 6}},
        ["6x6", "config.surrogate"],
    ),
    "an epsilon below 0": ({"suite.epsilon": -0.1}, ["suite.epsilon", "in [0, 1], got -0.1"]),
    "an epsilon above 1": ({"suite.epsilon": 8.0}, ["[0, 1]", "got 8.0", "config.suite"]),
    "a budget above 1": ({"suite.curve": (0.1, 2.0)}, ["[0, 1]", "got 2.0", "config.suite"]),
    "a training epsilon above 1": (
        {"recipes.gen_af_stage1.epsilon": 1.5},
        ["[0, 1]", "got 1.5", "config.recipes.gen_af_stage1.epsilon"],
    ),
    "a scoring epsilon below 0": (
        {"scoring.per_image.budgets": (-1.0,)},
        ["at least 0, got -1.0", "config.scoring.per_image.budgets"],
    ),
    "an adv_ratio above 1": (
        {"recipes.gen_af_stage1.adv_ratio": 1.5},
        ["adv_ratio", "in [0, 1], got 1.5", "config.recipes.gen_af_stage1"],
    ),
    "an adv_ratio below 0": (
        {"recipes.gen_af_stage1.adv_ratio": -0.5},
        ["adv_ratio", "in [0, 1], got -0.5"],
    ),
    "a pattern that matches nothing": (
        recipe(rates={"encoder/**": 1e-3, "head/**": 1e-3, "encoder/stem/**": 1e-4}),
        ["'encoder/stem/**'", "config.recipes.mine.rates"],
    ),
    "a layer without a rate": (
        recipe(rates={"encoder/**": 1e-3}),
        ["head/linear/kernel", "config.recipes.mine.rates"],
    ),
    "a loss that takes the mean": (
        recipe(losses={"mean": "test_bad_input:batch_mean"}),
        ["'mean'", "[batch]", "do not take the mean", "config.recipes.mine"],
    ),
    "a loss that misses its inputs": (
        recipe(losses={"blind": "test_bad_input:needs_attack"}),
        ["'blind'", "config.recipes.mine"],
    ),
    "a loss that is not there": (
        recipe(losses={"mean": "test_bad_input:batch_men"}),
        ["did you mean batch_mean", "config.recipes.mine.losses.mean"],
    ),
    "an augmentation that is not there": (
        recipe(augment="robust_ssl.pretraining:flip_and_shif"),
        ["did you mean flip_and_shift", "config.recipes.mine.augment"],
    ),
    "an augmentation that normalizes": (
        recipe(augment="test_bad_input:normalized"),
        ["pixels from -", "normalization to the encoder", "config.recipes.mine"],
    ),
    "an attack that is not there": (
        {"suite.attacks": {"uap": "robust_ssl.attacks:UniversalPDG"}},
        ["did you mean UniversalPGD", "config.suite.attacks.uap"],
    ),
    "an option the attack has not": (
        {"suite.attacks": {"uap": {"function": "robust_ssl.attacks:UniversalPGD", "size": 1}}},
        ["config.suite.attacks.uap.size"],
    ),
    "a per-image attack that is not there": (
        {"scoring.per_image.attacks": {"fgsm": "robust_ssl.attacks:FGMS"}},
        ["did you mean FGSM", "config.scoring.per_image.attacks.fgsm"],
    ),
    "a recipe that is not there": (
        {"compare.baseline": "baselin"},
        ["config.compare.baseline", "did you mean 'baseline'"],
    ),
    "a stage that is not there": ({"stages": ("atack",)}, ["'atack'", "did you mean 'attack'"]),
    "no stage": ({"stages": ()}, ["config.stages", "empty"]),
    "a batch larger than the set": (recipe(batch_size=512), ["512", "48", "config.recipes.mine"]),
    "a batch that does not divide": (recipe(batch_size=15), ["15", "multiple of 2"]),
    "an encoder that is not shipped": (
        {"encoder": {"path": "simclr-of-dreams"}},
        ["simclr-of-dreams", "config.encoder"],
    ),
    "no such builder": (
        {"encoder": {"function": "robust_ssl.models:resnet19"}},
        ["resnet19", "did you mean resnet18"],
    ),
    "a head that is not there": (recipe(head="mpl"), ["'mpl'", "did you mean 'mlp'"]),
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir with earlier work in it, in which no stage may begin."""
    for name in stages._RUN:
        monkeypatch.setitem(stages._RUN, name, lambda run: pytest.fail("a stage was begun"))
    for file in ("results.json", "train/manifest.txt", "train/weights"):
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
    experiment.run(config, workdir, parallel=layout, progress=progress.Progress("quiet"))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_the_first_step(case, workdir):
    changes, words = CASES[case]
    before = snapshot(workdir)
    with pytest.raises(experiment.UsageError) as refused:
        attempt(workdir, changes)
    for word in words:
        assert word in str(refused.value)
    assert snapshot(workdir) == before


def test_the_same_config_unspoiled_is_accepted(workdir):
    with pytest.raises(pytest.fail.Exception, match="a stage was begun"):
        attempt(workdir, data(""))


def test_a_misspelt_data_set_is_answered_with_near_ones(workdir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(workdir.parent / "tfds"))
    before = snapshot(workdir)
    with pytest.raises(experiment.UsageError, match=r"'cifra10' is not known to TFDS.*cifar10"):
        attempt(workdir, {"downstream": {"source": "cifra10", "validation": 0.1}})
    assert snapshot(workdir) == before


def test_a_data_set_not_prepared_yet_is_answered_with_the_command(workdir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(workdir.parent / "tfds"))
    with pytest.raises(experiment.UsageError, match=r"robust-ssl data prepare cifar10 "):
        attempt(workdir, {"surrogate": {"source": "cifar10"}})


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WorkdirError, match=re.escape(f"{tmp_path}/file/run")):
        attempt(tmp_path / "file" / "run", {})
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_read_only_workdir_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(WorkdirError, match="cannot write"):
        attempt(folder, {})


# --- The same on the command line -------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(run, "_start_jax", lambda arguments, several: jax.devices())
    yield lambda *arguments: main.main(["run", f"--config={QUICKSTART}", *arguments])
    progress.set_mode("auto")
    stopping.clear_stop()


def test_a_missing_workdir_is_a_usage_error(command, capsys):
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == main.USAGE
    assert "--workdir" in capsys.readouterr().err


def test_an_unknown_setting_is_a_usage_error(command, capsys, tmp_path):
    workdir = tmp_path / "run"
    setting = "--config.recipes.gen_af_stage1.adv_ration=1.0"
    assert command(f"--workdir={workdir}", setting) == main.USAGE
    text = capsys.readouterr().err
    assert "'adv_ration' in config.recipes.gen_af_stage1" in text
    assert "did you mean 'adv_ratio'" in text
    assert not workdir.exists()


def test_bad_input_is_a_usage_error_on_the_command_line(command, capsys, workdir):
    before = snapshot(workdir)
    setting = "--config.recipes.gen_af_stage1.adv_ratio=3/2"
    tiny_encoder = "--config.encoder.path=simclr-of-dreams"
    assert command(f"--workdir={workdir}", setting, tiny_encoder) == main.USAGE
    text = capsys.readouterr().err
    assert "robust-ssl: error: " in text and "Traceback" not in text
    assert snapshot(workdir) == before
