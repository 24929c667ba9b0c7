"""CIFAR-100 as folders of its twenty superclasses, which the evidence's last set is made with."""

import importlib.util
import pathlib
import types

import numpy as np
import pytest

from robust_ssl import data

FILE = pathlib.Path(__file__).parents[1] / "tools" / "cifar100_superclasses.py"
spec = importlib.util.spec_from_file_location("superclasses", FILE)
superclasses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(superclasses)


def test_each_class_is_in_one_of_twenty():
    assert len(superclasses.SUPERCLASSES) == 20 and len(superclasses.SUPERCLASS_OF) == 100


def test_a_set_becomes_folders_that_are_read(tmp_path, monkeypatch, capsys):
    classes = sorted(superclasses.SUPERCLASS_OF)  # as CIFAR-100 has them, one image each
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    given = types.SimpleNamespace(images=images, labels=np.arange(100), class_names=classes)
    monkeypatch.setattr(superclasses.data, "load", lambda *_, **__: given)
    assert superclasses.main([str(tmp_path / "set")]) == 0
    monkeypatch.undo()
    read = data.load(tmp_path / "set", split="test")
    assert list(read.class_names) == sorted(superclasses.SUPERCLASSES)
    for image, label in zip(read.images, read.labels, strict=True):
        fine = classes[image[0, 0, 0]]
        assert superclasses.SUPERCLASS_OF[fine] == read.class_names[label]
    with pytest.raises(SystemExit):  # nothing is written over
        superclasses.main([str(tmp_path / "set")])
    assert "name another folder" in capsys.readouterr().err
