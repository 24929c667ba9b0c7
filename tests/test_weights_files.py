"""Foreign files of weights are read bit by bit, or refused with the cause."""

import functools
import hashlib
import io
import json
import pickle
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_bytes
from safetensors.numpy import save, save_file
from torch_bytes import (
    CONTAINERS,
    NUMBERS,
    PLAIN,
    called,
    group,
    legacy,
    named,
    number,
    pickled,
    table,
    tensor,
    text,
    zipped,
)

from robust_ssl.weights.files import read_weights


@pytest.fixture
def read(tmp_path):
    return functools.partial(torch_bytes.read_bytes, tmp_path)


@pytest.fixture
def refused(tmp_path):
    return functools.partial(torch_bytes.refuse, tmp_path)


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_state_dict_is_read_bit_by_bit(read, container):
    content = CONTAINERS[container](PLAIN)
    weights = read(content)
    assert weights.format == f"torch {container}" and weights.found_under == ""
    assert weights.sha256 == hashlib.sha256(content).hexdigest()
    assert list(weights.tensors) == ["weight"]
    np.testing.assert_array_equal(weights.tensors["weight"], NUMBERS.reshape(2, 3))
    assert weights.tensors["weight"].dtype == np.float32
    assert any("checksum" in note for note in weights.notes) == (container == "legacy")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Double", np.float64),
        ("Half", np.float16),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Long", np.int64),
        ("Char", np.int8),
        ("Bool", np.bool_),
    ],
)
def test_every_number_type_keeps_its_bits(read, kind, dtype):
    numbers = np.array([1, 0, 1, 1, 0, 1]).astype(dtype)
    weights = read(zipped(pickled(table(w=tensor(kind))), {"0": numbers.tobytes()})).tensors["w"]
    assert weights.dtype == dtype and weights.tobytes() == numbers.tobytes()


def test_nan_and_infinity_are_read_as_they_are(read):
    numbers = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 1], np.float32)
    weights = read(zipped(PLAIN, {"0": numbers.tobytes()}))
    assert weights.tensors["weight"].tobytes() == numbers.tobytes()


def test_strided_views_and_scalars_and_empty_tensors(read):
    views = {
        "turned": tensor(shape=(3, 2), strides=(1, 3)),
        "column": tensor(offset=1, shape=(2,), strides=(3,)),
        "scalar": tensor(offset=5, shape=(), strides=()),
        "empty": tensor(offset=6, shape=(0, 4), strides=(4, 1)),
    }
    weights = read(zipped(pickled(table(**views)))).tensors
    whole = NUMBERS.reshape(2, 3)
    np.testing.assert_array_equal(weights["turned"], whole.T)
    np.testing.assert_array_equal(weights["column"], whole[:, 1])
    assert weights["scalar"].shape == () and weights["scalar"] == NUMBERS[5]
    assert weights["empty"].shape == (0, 4) and weights["empty"].dtype == np.float32
    assert all(array.flags.c_contiguous for array in weights.values())


def test_shared_storages_are_noted(read):
    weights = read(zipped(pickled(table(a=tensor(), b=tensor(), c=tensor(key="1"))), {
        "0": NUMBERS.tobytes(), "1": NUMBERS.tobytes(),
    }))  # fmt: skip
    assert [note for note in weights.notes if "shared" in note] == ["one storage is shared by a, b"]


def test_only_the_state_dict_is_read_and_the_rest_is_named(read):
    args = named("argparse.Namespace") + b")\x81" + table(lr=number(3)) + b"b"
    scalar = called("numpy._core.multiarray.scalar", called("numpy.dtype", text("f8")), text("x"))
    callback = named("pytorch_lightning.callbacks.ModelCheckpoint")
    body = table(
        state_dict=table(weight=tensor(), steps=number(7)),
        optimizer=table(state=table(momentum=tensor(key="never there"))),
        args=args,
        best=scalar,
        config=called("omegaconf.dictconfig.DictConfig") + table(a=number(1)) + b"b",
        callbacks=b"}(" + callback + table(best=number(1)) + b"u",
    )
    weights = read(zipped(pickled(body)))
    assert weights.found_under == "state_dict" and list(weights.tensors) == ["weight"]
    assert "left out, not weights: args, best, callbacks, config, optimizer" in weights.notes
    assert "left out, not tensors: steps" in weights.notes
    assert not {"omegaconf", "pytorch_lightning"} & set(sys.modules)  # named, never imported


def test_tensors_whose_names_are_no_text_are_refused_or_noted(read, refused):
    numbered = b"}(" + number(0) + tensor() + number(1) + tensor() + b"u"
    refused(zipped(pickled(numbered)), r"names of its tensors are no text: 0, 1; save")
    mixed = b"}(" + number(7) + tensor() + text("weight") + tensor() + b"u"
    weights = read(zipped(pickled(mixed)))
    assert list(weights.tensors) == ["weight"]
    assert "left out, names that are no text: 7" in weights.notes


def test_the_teacher_comes_before_the_student_unless_asked(read):
    both = table(student=table(s=tensor()), teacher=table(t=tensor()), epoch=number(3))
    weights = read(zipped(pickled(both)))
    assert weights.found_under == "teacher" and list(weights.tensors) == ["t"]
    assert any("['student']" in note for note in weights.notes)
    assert list(read(zipped(pickled(both)), under="student").tensors) == ["s"]


def test_what_python_2_wrote_is_read(read):
    pair = b"](U\x06weight" + tensor() + b"e"
    body = named("collections.OrderedDict") + b"(](" + pair + b"etR"
    np.testing.assert_array_equal(read(zipped(pickled(body))).tensors["weight"].ravel(), NUMBERS)


def test_safetensors_with_every_type_and_its_metadata(read):
    arrays = {"w": NUMBERS.reshape(2, 3), "h": NUMBERS.astype(np.float16), "n": np.array(3)}
    weights = read(save(arrays, metadata={"format": "pt"}), "weights.bin")
    assert weights.format == "safetensors" and weights.configs == {"__metadata__": {"format": "pt"}}
    for name, array in arrays.items():
        assert (
            weights.tensors[name].dtype == array.dtype
            and weights.tensors[name].shape == array.shape
        )
        assert weights.tensors[name].tobytes() == array.tobytes()
    header = json.dumps({"b": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    half = read(struct.pack("<Q", len(header)) + header + b"\x80\x3f").tensors["b"]
    assert half.dtype == ml_dtypes.bfloat16 and float(half[0]) == 1.0


# ---------------------------------------------------------------------------- folders and shards


def test_a_folder_brings_its_json_files(tmp_path):
    save_file({"w": NUMBERS}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # safetensors comes first
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    expected = {
        "config.json": {"model_type": "vit"},
        "preprocessor_config.json": {"image_mean": [0.5]},
    }
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        weights = read_weights(path)
        assert weights.configs == expected and weights.path == str(tmp_path / "model.safetensors")
    (tmp_path / "lonely.pth").write_bytes(zipped(PLAIN))
    assert read_weights(tmp_path / "lonely.pth").configs == {}  # it has no part in them
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_weights(tmp_path)


def test_a_folder_of_one_file_or_of_too_many(tmp_path):
    with pytest.raises(ValueError, match="no file of weights"):
        read_weights(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(zipped(PLAIN))
    assert list(read_weights(tmp_path).tensors) == ["weight"]
    (tmp_path / "b.ckpt").write_bytes(zipped(PLAIN))
    with pytest.raises(ValueError, match=r"several files of weights, a\.ckpt, b\.ckpt"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_weights(tmp_path / "c.ckpt")


def shards(folder, places, **files):
    for name, arrays in files.items():
        save_file(arrays, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def test_shards_are_one_file(tmp_path):
    places = {"a": "1.safetensors", "b": "2.safetensors"}
    index = shards(tmp_path, places, **{"1": {"a": NUMBERS}, "2": {"b": NUMBERS * 2}})
    for path in (tmp_path, index):
        weights = read_weights(path)
        np.testing.assert_array_equal(weights.tensors["b"], NUMBERS * 2)
        assert sorted(weights.tensors) == ["a", "b"] and "2 shards" in weights.notes[0]
    before = weights.sha256
    save_file({"b": NUMBERS * 3}, tmp_path / "2.safetensors")
    assert read_weights(index).sha256 != before


@pytest.mark.parametrize(
    ("places", "match"),
    [
        ({"a": "1.safetensors", "c": "1.safetensors"}, r"do not agree about \['c'\]"),
        ({}, "weight_map"),
        ({"a": "2.safetensors"}, "not beside it"),
        ({"a": "../1.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, places, match):
    index = shards(tmp_path, places, **{"1": {"a": NUMBERS}})
    with pytest.raises(ValueError, match=match) as caught:
        read_weights(index)
    assert str(index) in str(caught.value)


# ------------------------------------------------------------------------------- what is no weights


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; fetch"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"<?xml version='1.0'?><Error>AccessDenied", "HTML"),
        (b'{"error": "not found"}', "JSON"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\0", "NumPy array"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x08\x07\x12\x07pytorch", "ONNX"),
        (bytes(257) + b"ustar", "tar archive"),
        (pickle.dumps({"w": 1}), "plain pickle"),
        (b"nonsense that is long enough", "neither safetensors nor"),
    ],
)
def test_other_files_are_told_by_their_content(refused, content, match):
    for name in ("weights.pth", "model.safetensors"):
        refused(content, match, name)


def test_archives_that_torch_never_writes_are_refused(refused):
    npz = io.BytesIO()
    np.savez_compressed(npz, w=NUMBERS)
    refused(npz.getvalue(), r"NumPy \.npz")
    refused(zipped(PLAIN, root="a/", extra=[("b/data.pkl", PLAIN)]), r"2 members data\.pkl")
    refused(zipped(PLAIN, compression=zipfile.ZIP_DEFLATED), "is compressed")
    script = [("archive/code/__torch__.py", b""), ("archive/constants.pkl", b"")]
    refused(zipped(PLAIN, extra=script), "TorchScript program without a module")
    refused(zipped(PLAIN, extra=script, compression=zipfile.ZIP_DEFLATED), "is compressed")
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped(PLAIN, extra=[("archive/data/0", bytes(24))])
    refused(twice, "two members of one name")
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w") as archive:
        archive.writestr("a/data.pkl", PLAIN)
        archive.writestr("a/byteorder", "big")
    refused(big.getvalue(), "only little-endian")


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_way_to_cut_a_file_off_is_refused(refused, container):
    content = CONTAINERS[container](PLAIN)
    for length in range(0, len(content), 3):
        refused(content[:length], "fetch it again|cut off|damaged|end is missing|neither|plain")
    if container == "legacy":
        refused(content[:-1], "is cut off")
        refused(content + b"x", "1 bytes follow")


def test_a_flipped_bit_is_refused_or_changes_nothing(read):
    content = zipped(PLAIN)
    expected, refusals = read(content).tensors["weight"].tobytes(), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        try:
            weights = read(bytes(damaged))
        except ValueError:
            refusals += 1
        else:
            assert weights.tensors["weight"].tobytes() == expected, place
    data = content.index(NUMBERS.tobytes())
    damaged = bytearray(content)
    damaged[data + 5] ^= 1
    with pytest.raises(ValueError, match=r"archive/data/0 is damaged .*CRC"):
        read(bytes(damaged))
    assert refusals > len(content) / 2


def test_damaged_safetensors_are_refused(refused):
    content = save({"w": NUMBERS})
    for damaged in (content[:-1], content[:30], content + b"0", content.replace(b"F32", b"F99")):
        refused(damaged, "fetch it again")
    refused(content, "leave out under='model'", under="model")


def test_a_state_dict_that_is_not_there_lists_the_choices(refused):
    two = table(student=table(w=tensor()), other=table(w=tensor()), epoch=number(1))
    content = zipped(pickled(two))
    message = refused(content, "has no usual state dict")
    assert "under: 'student', 'other'" in message and "'epoch'" in message
    refused(content, "no tensors under 'teacher'", under="teacher")
    refused(zipped(pickled(table(epoch=number(1)))), "under: nowhere")
    refused(zipped(pickled(b"]")), "holds a list")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (tensor(shape=(2, 4), strides=(4, 1)), "ends at element 8 of storage '0', which has 6"),
        (tensor(offset=1), "ends at element 7"),
        (tensor(shape=(7,), strides=(1,)), "ends at element 7"),
        (tensor(offset=-1), "negative"),
        (tensor(shape=(-2, 3)), "negative"),
        (tensor(strides=(-3, 1)), "negative"),
        (tensor(strides=(3,)), "2 axes and 1 strides"),
        (tensor(shape=(1,) * 40, strides=(1,) * 40), "40 axes"),
        (tensor(shape=(1 << 30, 1 << 30), strides=(0, 0)), "repeats the 6 elements"),
        (tensor(count=5, shape=(5,), strides=(1,)), "has 24 bytes, the pickle says 20"),
        (tensor(count=-1), "unknown kind or size"),
        (tensor(kind="QInt8"), r"torch\.QInt8Storage"),
        (tensor(key="7"), "storage '7' is not in the archive"),
        (tensor(key="../../data.pkl"), "is not in the archive"),
        (tensor(view=(group(text("v"), number(0), number(3)),)), "views of storages"),
    ],
)
def test_a_view_that_leaves_its_storage_is_refused(refused, body, match):
    refused(zipped(pickled(table(weight=body))), match)


def test_a_legacy_storage_of_another_size_is_refused(refused):
    body = pickled(table(weight=tensor(view=(b"N",))))
    refused(legacy(body, {"0": bytes(20)}), "has 5 elements, the pickle says 6")
    refused(legacy(body, {"1": bytes(24)}), "list of storages")
    refused(legacy(body, little=b"\x89"), "little-endian")


def test_an_argument_that_is_not_known(read):
    with pytest.raises(ValueError, match='there are "safe" and "torch"'):
        read(zipped(PLAIN), reader="fast")
