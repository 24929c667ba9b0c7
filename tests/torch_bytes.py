"""Files as torch writes them, made by hand from a pickle's instructions; no torch is needed."""

import io
import struct
import zipfile

import numpy as np
import pytest

from robust_ssl.weights.files import read_weights
from robust_ssl.weights.torch_reader import LEGACY_MAGIC


def named(path):
    """The instruction that imports: GLOBAL."""
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(string):
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def called(path, *args):
    return named(path) + group(*args) + b"R"


def table(**entries):
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def pickled(body, protocol=2):
    return b"\x80" + bytes([protocol]) + body + b"."


def storage(kind, key, count, *view):
    name = named(f"torch.{kind}Storage")
    return group(text("storage"), name, text(key), text("cpu"), number(count), *view) + b"Q"


def tensor(kind="Float", key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1), view=()):
    return called(
        "torch._utils._rebuild_tensor_v2",
        storage(kind, key, count, *view),
        number(offset),
        group(*map(number, shape)),
        group(*map(number, strides)),
        b"\x89",
        called("collections.OrderedDict"),
    )


NUMBERS = np.arange(6, dtype=np.float32) - 2.5
STORAGES = {"0": NUMBERS.tobytes()}


def zipped(body, storages=STORAGES, extra=(), root="archive/", compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}data.pkl", body)
        archive.writestr(f"{root}byteorder", b"little")
        for key, content in storages.items():
            archive.writestr(f"{root}data/{key}", content)
        for name, content in extra:
            archive.writestr(name, content)
    return file.getvalue()


def legacy(body, storages=STORAGES, itemsize=4, little=b"\x88"):
    content = b"\x80\x02" + LEGACY_MAGIC + pickled(number(1001))
    content += pickled(table(protocol_version=number(1001), little_endian=little)) + body
    content += pickled(b"](" + b"".join(map(text, storages)) + b"e")
    for data in storages.values():
        content += struct.pack("<q", len(data) // itemsize) + data
    return content


CONTAINERS = {
    "zip": lambda body: zipped(body),
    "legacy": lambda body: legacy(body.replace(number(6) + b"tQ", number(6) + b"NtQ")),
}
PLAIN = pickled(table(weight=tensor()))


def read_bytes(folder, content, name="weights.pth", **options):
    """Writes bytes to a file and reads it."""
    (folder / name).write_bytes(content)
    return read_weights(folder / name, **options)


def refuse(folder, content, match, name="weights.pth", **options):
    """Asserts that bytes are refused, naming the file; returns the reason."""
    with pytest.raises(ValueError, match=match) as caught:
        read_bytes(folder, content, name, **options)
    assert str(folder / name) in str(caught.value)
    return str(caught.value)
