"""PyTorch's two kinds of file, read without PyTorch: the zip of today and the stream before 1.6.

Both hold one pickle, which says what the tensors are called and which bytes they are made of
(`torch_pickle` reads it), and the bytes.  In a zip every member has a checksum; in a stream nothing
has one, so a flipped bit there shows only in the file's SHA-256.

References:
  `torch/serialization.py`: ``_load`` and ``_legacy_load``.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from robust_ssl.weights import torch_pickle
from robust_ssl.weights.torch_pickle import RefusedError, Scripted, Storage

# The number that torch.save pickles first, with the opcode that carries it and the full stop.
LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")
_PICKLE = "data.pkl"
_CHUNK = 2**20
NOTES = {  # by what `files.WeightsFile.format` calls them
    "torch legacy": ("this format has no checksum: compare the SHA-256 with its maker's",),
    "torch script": ("a TorchScript program: its tensors are taken, what it computes is not read",),
}
_MODULES, _DEEPEST = 2**16, 64  # in a TorchScript program; large networks have some thousand
_SAVE_AGAIN = "load it where it was made and save its state dict with torch.save or as safetensors"
_DAMAGE = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error)


def read_zip(file: BinaryIO, inert: Collection[str] = ()) -> Any:
    """Reads what ``torch.save`` has written since PyTorch 1.6.

    Args:
      file: Open for reading; must stay open while tensors' numbers are asked for.
      inert: Further names that its pickle may have, see `torch_pickle.load`.

    Returns:
      The saved object, see `torch_pickle.load`; of a TorchScript program, as ``torch.jit.save``
      writes it, a `Script`.

    Raises:
      RefusedError: If the archive is not a plain, undamaged one of weights.
    """
    archive, members, root, script = _open(file)
    # Older files do not say it.
    if f"{root}byteorder" in members:
        order = _content(archive, members[f"{root}byteorder"], 16).tobytes()
        if order != b"little":
            raise RefusedError(
                f"its numbers are stored {order!r}-endian, only little-endian is read"
            )

    def fetch(storage: Storage) -> np.ndarray:
        member = members.get(f"{root}data/{storage.key}")
        if member is None:
            raise RefusedError(f"storage {storage.key!r} is not in the archive")
        if member.file_size != storage.nbytes:
            raise RefusedError(
                f"{member.filename} has {member.file_size} bytes, the pickle says {storage.nbytes}"
            )
        return _content(archive, member, storage.nbytes)

    content = _content(archive, members[root + _PICKLE], torch_pickle.PICKLE_LIMIT)
    saved = torch_pickle.load(io.BytesIO(content.tobytes()), fetch, inert=inert, script=script)
    return Script.of(saved) if script else saved


class Script(dict):
    """The tensors of a TorchScript program by the names that its state dict has."""

    @classmethod
    def of(cls, module: Any) -> Script:
        """Collects the tensors of a module and of those in it.

        Raises:
          RefusedError: If it is no module, or one that holds itself or absurdly many others.
        """
        if not isinstance(module, Scripted):
            raise RefusedError(f"it is a TorchScript program without a module; {_SAVE_AGAIN}")
        tensors, waiting, count = cls(), [("", module)], 0
        while waiting:
            prefix, module = waiting.pop()
            count += 1
            # One that holds itself goes on for ever; one that is held twice, and so on, nearly.
            if count > _MODULES or prefix.count(".") > _DEEPEST:
                raise RefusedError("its modules hold each other without an end; it is forged")
            for name, value in module.attributes.items():
                if isinstance(value, Scripted):
                    waiting.append((f"{prefix}{name}.", value))
                elif isinstance(value, torch_pickle.Tensor):
                    tensors[f"{prefix}{name}"] = value
        return tensors


def check_zip(file: BinaryIO) -> None:
    """Raises `RefusedError` unless every member of the archive is plain and has its checksum."""
    archive, members, _, script = _open(file)
    if script:
        raise RefusedError('it is a TorchScript program, whose tensors reader="safe" takes')
    for member in members.values():
        _content(archive, member, member.file_size)


def _open(file: BinaryIO) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], str, bool]:
    """The archive, its members by name, the folder of its pickle, whether it is TorchScript."""
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise RefusedError(f"its end is missing or damaged ({error}); fetch it again") from error
    members = _members(archive)
    root = _root(members)
    whole = len(members)
    # TorchScript is a program with weights in it: the program is not even read.
    program = tuple(f"{root}{name}" for name in ("code/", "constants.pkl", "constants/", "extra/"))
    members = {name: x for name, x in members.items() if not name.startswith(program)}
    _check_plain(members.values(), file.seek(0, io.SEEK_END))
    return archive, members, root, len(members) < whole


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name, every name once."""
    members = {member.filename: member for member in archive.infolist()}
    # Readers differ in which of two they take: a scanner could see one and a loader the other.
    if len(members) < len(archive.infolist()):
        raise RefusedError(
            f"its archive has two members of one name, which torch never writes; {_SAVE_AGAIN}"
        )
    return members


def _root(members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder of the one pickle, with its slash."""
    roots = [name[: -len(_PICKLE)] for name in members if name.rpartition("/")[2] == _PICKLE]
    if not roots:
        npz = any(name.endswith(".npy") for name in members)
        what = "a NumPy .npz" if npz else f"a zip archive without {_PICKLE}"
        raise RefusedError(f"it is {what}, not a file of torch.save; {_SAVE_AGAIN}")
    if len(roots) > 1:
        raise RefusedError(f"its archive has {len(roots)} members {_PICKLE}; {_SAVE_AGAIN}")
    (root,) = roots
    return root


def _check_plain(members: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Every member is stored as it is, and all of them fit into the file."""
    # Compressed or overlapping members could unpack a small file to terabytes.
    members = list(members)
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise RefusedError(
                f"{member.filename} is compressed, which torch never does; {_SAVE_AGAIN}"
            )
        if member.flag_bits & 1:
            raise RefusedError(f"{member.filename} is encrypted; {_SAVE_AGAIN}")
    if sum(member.file_size for member in members) > size:
        raise RefusedError("its archive's members are larger than the file; fetch it again")


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> np.ndarray:
    """A member's bytes; `zipfile` compares the checksum at the end."""
    if member.file_size > limit:
        raise RefusedError(f"{member.filename} has {member.file_size} bytes, more than {limit}")
    try:
        with archive.open(member) as stream:
            content = _fill(stream, member.file_size)
            stream.read(1)  # the end is where the checksum of an empty member is compared, too
    except _DAMAGE as error:
        raise RefusedError(
            f"{member.filename} is damaged ({error}); fetch the file again"
        ) from error
    return content


def _fill(stream, size: int) -> np.ndarray:
    """The next bytes of a stream, uint8 ``[size]``, in memory that NumPy owns and aligns."""
    # Straight into the array: `read` would hold everything twice.
    content = np.empty(size, np.uint8)
    view, done = memoryview(content), 0
    while done < size:
        count = stream.readinto(view[done : done + _CHUNK])
        if not count:
            raise EOFError(f"{size - done} bytes are missing")
        done += count
    return content


def read_legacy(file: BinaryIO, inert: Collection[str] = ()) -> Any:
    """Reads what ``torch.save`` wrote before PyTorch 1.6: five pickles, then the storages.

    Args:
      file: Open for reading; must stay open while tensors' numbers are asked for.
      inert: Further names that its pickle may have, see `torch_pickle.load`.

    Returns:
      The saved object, see `torch_pickle.load`.

    Raises:
      RefusedError: If it is cut off, or not a plain file of weights.
    """
    # Where each storage lies comes last in the file, and is needed only once numbers are asked for.
    where: dict[str, int] = {}

    def fetch(storage: Storage) -> np.ndarray:
        if storage.key not in where:
            raise RefusedError(
                f"storage {storage.key!r} is not in the file; it is cut off or forged"
            )
        file.seek(where[storage.key])
        return _fill(file, storage.nbytes)

    storages: dict[str, Storage] = {}
    head = io.BytesIO(file.read(torch_pickle.PICKLE_LIMIT))
    _, protocol, system = (torch_pickle.load(head, fetch) for _ in range(3))
    if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise RefusedError(
            "it is not a little-endian stream of protocol 1001, the only one that is read"
        )
    saved = torch_pickle.load(head, fetch, storages, inert)
    keys = torch_pickle.load(head, fetch)
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or sorted(keys) != sorted(storages):
        raise RefusedError(
            "its list of storages is not that of its tensors; it is damaged or forged"
        )
    _locate(file, head.tell(), [storages[key] for key in keys], where)
    return saved


def _locate(file: BinaryIO, start: int, storages: list[Storage], where: dict[str, int]) -> None:
    """Notes where each storage lies: one after the other, each after its count of elements."""
    size = file.seek(0, io.SEEK_END)
    for storage in storages:
        file.seek(start)
        count = file.read(8)
        # Fewer than eight bytes is the end of the file, which is told below.
        if len(count) == 8 and struct.unpack("<q", count) != (storage.count,):
            raise RefusedError(
                f"storage {storage.key!r} has {struct.unpack('<q', count)[0]} elements, the pickle "
                f"says {storage.count}; the file is damaged or forged"
            )
        where[storage.key] = start + 8
        start += 8 + storage.nbytes
        if start > size:
            raise RefusedError(
                f"it is cut off: {size} bytes, at least {start} are needed; fetch it again"
            )
    # Bytes that nothing refers to are damage, or a second file that was hidden here.
    if start < size:
        raise RefusedError(f"{size - start} bytes follow its last storage; it is damaged or forged")
