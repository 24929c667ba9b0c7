"""Data sets of the Hugging Face hub, through a stand-in for its library (nothing is fetched)."""

import dataclasses
import io
import sys
import types

import numpy as np
import pytest
from PIL import Image as Pillow

from robust_ssl import data
from robust_ssl.data.streamed import StreamedExamples
from robust_ssl.experiment.sources import Data


@dataclasses.dataclass(frozen=True)
class Image:
    decode: bool = True


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    names: tuple = ("ant", "bee")
    dtype: str = "int64"


@dataclasses.dataclass(frozen=True)
class Value:
    dtype: str


class Table:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: [column[row] for row in key] for name, column in self.columns.items()}

    def cast_column(self, name, feature):
        assert feature == Image(decode=False)
        return Table({**self.features, name: feature}, self.columns)


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 7, 3), np.uint8)


def files():
    contents = []
    for pixels in PIXELS:
        content = io.BytesIO()
        Pillow.fromarray(pixels).save(content, "PNG")
        contents.append({"bytes": content.getvalue(), "path": None})
    return contents


@pytest.fixture
def hub(monkeypatch):
    """A function that puts a table on the hub; returns what `load_dataset` was called with."""

    def put(features, **columns):
        calls = []

        def load_dataset(*name, split):
            calls.append((*name, split))
            if split == "dev":
                raise ValueError("Unknown split 'dev'.\nMore of it.")
            return Table(features, columns)

        library = types.SimpleNamespace(load_dataset=load_dataset, Image=Image)
        monkeypatch.setitem(sys.modules, "datasets", library)
        return calls

    return put


def test_columns_are_found_by_their_kind(hub):
    features = {"picture": Image(), "kind": ClassLabel(), "size": Value("int64")}
    calls = hub(features, picture=files(), kind=[0, 1, 1, 0], size=[1, 2, 3, 4])
    examples = data.load("hf:owner/insects/small", split="test")
    assert calls == [("owner/insects", "small", "test")]
    np.testing.assert_array_equal(examples.images, PIXELS)
    assert examples.labels.tolist() == [0, 1, 1, 0] and examples.class_names == ("ant", "bee")
    assert (examples.name, examples.split) == ("hf:owner/insects/small", "test")
    streamed = data.load("hf:owner/insects", memory_limit=10, image_size=4)
    assert isinstance(streamed, StreamedExamples) and streamed.image_shape == (4, 4, 3)
    assert len(data.carve(streamed, count=1)[0]) == 3  # labels are known without the pictures


def test_pictures_may_be_files_and_labels_numbers(hub, tmp_path):
    paths = []
    for row, content in enumerate(files()):
        (tmp_path / f"{row}.png").write_bytes(content["bytes"])
        paths.append({"bytes": None, "path": str(tmp_path / f"{row}.png")})
    features = {"img": Image(), "thumb": Image(), "label": Value("int32")}
    hub(features, img=paths, thumb=paths, label=[2, 0, 1, 0])
    examples = data.load("hf:owner/insects")
    np.testing.assert_array_equal(examples.images, PIXELS)
    assert examples.labels.tolist() == [2, 0, 1, 0] and examples.num_classes == 3


def test_a_split_without_labels_has_none(hub):
    hub({"image": Image(), "label": ClassLabel()}, image=files(), label=[-1] * 4)
    assert data.load("hf:owner/insects").labels is None
    hub({"image": Image(), "caption": Value("string")}, image=files(), caption=list("abcd"))
    assert data.load("hf:owner/insects").num_classes == 0


def test_what_has_no_image_names_its_columns(hub):
    hub({"text": Value("string"), "label": ClassLabel()}, text=list("abcd"), label=[0] * 4)
    with pytest.raises(ValueError, match=r"columns are text \(Value\), label \(ClassLabel\)"):
        data.load("hf:owner/poems")


def test_errors_name_the_set(hub):
    hub({"image": Image()}, image=[*files()[:3], None])
    with pytest.raises(ValueError, match=r"'hf:owner/x', split 'dev', .*: Unknown split 'dev'\.$"):
        data.load("hf:owner/x", split="dev")
    with pytest.raises(ValueError, match="image 3 of 'hf:owner/x' is empty"):
        data.load("hf:owner/x", image_size=4)
    for name in ("hf:", "hf:owner/", "hf:a/b/c/d"):
        with pytest.raises(ValueError, match="must be hf:owner/name"):
            data.load(name)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'robust-ssl\[hf\]'"):
        data.load("hf:owner/insects")


@pytest.mark.parametrize("name", ["hf:mnist", "hf:owner/insects", "hf:owner/insects/small"])
def test_a_config_takes_it_for_a_source(name):
    assert Data.read(name, "downstream").source == name
    assert Data.read({"source": name}, "downstream").source == name
