"""Runs on data that flatter: they say so; what a classifier's logits stand for is kept."""

import json
import logging
import types

import numpy as np
import pytest
import tiny
from PIL import Image

from robust_ssl import experiment, models, progress, weights
from robust_ssl.experiment import pages
from robust_ssl.experiment.class_order import in_order_of_test
from robust_ssl.experiment.sections import SavedClassifier
from robust_ssl.workdir import digest, sum_files


def fake(*names):
    """As much of a run as is looked at: its test split."""
    return types.SimpleNamespace(test=types.SimpleNamespace(class_names=names, name="parts"))


def net(*names, classes=3):
    head = {"head": "linear", "class_names": names}
    return models.classifier(tiny.jax.random.key(0), tiny.encoder(), classes, **head)


def test_the_same_classes_in_another_order_are_matched_by_name():
    turned = in_order_of_test(fake("b", "c", "a"), "mine", net("a", "b", "c"))
    assert turned.class_names == ("b", "c", "a") and turned.head.order == (1, 2, 0)
    same = net("a", "b", "c")
    assert in_order_of_test(fake("a", "b", "c"), "mine", same) is same


@pytest.mark.parametrize("names", [("a", "b", "C"), ("x", "y", "z")])
def test_other_classes_are_refused_with_the_difference(names):
    with pytest.raises(ValueError, match=r"other classes than .* parts: only the first .*say so"):
        in_order_of_test(fake(*names), "mine", net("a", "b", "c"))


@pytest.mark.parametrize(
    ("mine", "asked"), [((), "abc"), (("0", "1", "2"), "abc"), (("a", "b", "c"), "012")]
)
def test_a_guess_is_said(caplog, mine, asked):
    with caplog.at_level(logging.WARNING):
        classifier = net(*mine)
        assert in_order_of_test(fake(*asked), "mine", classifier) is classifier
    assert "config.classifiers.mine" in caplog.text and "in this order" in caplog.text


def test_a_config_may_say_what_the_logits_stand_for(tmp_path):
    weights.save_classifier(net("a", "b", "c"), tmp_path, builder=tiny.encoder)
    saved = {"path": str(tmp_path), "builder": "tiny:encoder"}
    told = SavedClassifier.read({**saved, "class_names": ("x", "y", "z")}, "here")
    assert told.load().class_names == ("x", "y", "z") and told.text["class_names"]
    assert SavedClassifier.read(saved, "here").load().class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="2 names, and the classifier 3 logits"):
        SavedClassifier.read({**saved, "class_names": ("x", "y")}, "here")


def folder(root, names, counts=(24, 24)):
    """Two classes that brightness tells apart: the first name is the dark one."""
    for split in ("train", "test"):
        for name, level, count in zip(names, (60, 180), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                random = np.random.default_rng([len(split), level, i])
                image = random.integers(level - 30, level + 30, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i}.png")
    return root


def config(source, *stages, **changes):
    changed = tiny.config(*stages)
    changed.downstream = {"source": str(source), "validation": 0.25}  # no image_size: the encoder's
    changed.suite.attacks = {"random_noise": "robust_ssl.attacks:RandomNoise"}
    changed.suite.curve = ()
    changed.recipes = {"baseline": "robust_ssl.recipes:baseline"}
    changed.common.epochs = 4
    changed.scoring.update(adaptive=False, per_image={"budgets": ()})
    del changed.compare
    changed.update(changes)
    return changed


def run(changed, workdir):
    return experiment.run(changed, workdir, progress=progress.Progress("quiet"))


def clean(workdir):
    document = json.loads((workdir / "results.json").read_text())
    return document, {e["model"]: e["clean_accuracy"] for e in document["results"]}


def turned(split="train"):
    """The images of `folder`, whose classes are named in the other order."""
    labels = np.arange(24) % 2
    levels = np.where(labels == 1, 60, 180).reshape(-1, 1, 1, 1)
    random = np.random.default_rng(len(split))
    images = random.integers(-30, 30, (24, tiny.SIZE, tiny.SIZE, 3)) + levels
    return {"images": images.astype(np.uint8), "labels": labels, "class_names": ["torn", "good"]}


@pytest.mark.slow
def test_a_test_folder_that_is_the_training_folder_is_not_believed(tmp_path, caplog):
    root = folder(tmp_path / "set", ("good", "torn"), counts=(30, 6))
    (root / "test").rename(tmp_path / "elsewhere")
    (root / "test").symlink_to(root / "train")
    (root / "__MACOSX").mkdir()
    with caplog.at_level(logging.WARNING):
        run(config(root, "attack", "train", "score"), tmp_path / "run")
    assert "36 of 36 test images are among the 36 training images" in caplog.text
    document, _ = clean(tmp_path / "run")
    verdict = document["verdicts"]["baseline-seed0"]
    [leakage] = [check for check in verdict["checks"] if check["name"] == "leakage"]
    assert (leakage["status"], leakage["value"]) == ("failed", 1.0)
    assert verdict["verdict"] == "not believable"
    downstream = document["run"]["downstream"]
    assert downstream["test_among_train"] == 36
    assert downstream["largest_class"] == {"name": "good", "images": 30}
    assert any("__MACOSX/" in note for note in downstream["notes"])
    page = (tmp_path / "run" / "report.md").read_text()
    assert "always 'good'" in page and "36 of 36 test images are among" in page

    # What its logits stand for is kept: another order of the classes changes nothing.
    saved = tmp_path / "run" / "recipes" / "baseline-seed0"
    card = json.loads((saved / "classifier" / "classifier.json").read_text())
    assert card["class_names"] == ["good", "torn"]
    changed = config("", "attack", "score")
    changed.classifiers = {"mine": {"path": str(saved), "builder": "tiny:encoder"}}
    changed.downstream = {"function": "test_misread_runs:turned", "validation": 0.25}
    changed.scoring.checks = False
    del changed.recipes
    run(changed, tmp_path / "other")
    assert clean(tmp_path / "other")[1]["mine"] > 0.9


def test_what_somebody_wrote_into_a_page_is_kept_each_time(tmp_path, caplog):
    files = [tmp_path / "report.md", tmp_path / "results.csv"]

    def written():
        for file in files:
            file.write_text("ours")
        sums = sum_files(tmp_path, files)
        (tmp_path / pages.WRITTEN).write_text(json.dumps({"files": sums, "sha256": digest(sums)}))

    for number in ("", 1):
        written()
        assert pages._as_written(tmp_path)
        for file in files:
            file.write_text(f"mine {number}")
        assert not pages._as_written(tmp_path)
        for file in files:
            name = f"{file.name}.changed{number}"
            assert (tmp_path / name).read_text() == f"mine {number}" and name in caplog.text
