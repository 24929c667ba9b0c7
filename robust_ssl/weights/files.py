"""Foreign files of weights as named arrays, whatever their format; nothing in them is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

import numpy as np

from robust_ssl import disk
from robust_ssl.weights import beside, normalization, state_dicts, torch_pickle, torch_reader
from robust_ssl.weights.state_dicts import SAVE_AGAIN
from robust_ssl.weights.torch_pickle import DTYPES, RefusedError
from robust_ssl.words import line as one_line

_OLDEST_TORCH = (2, 10)
_MOST_SHARING = 8  # tied weights are stored once and used a few times

# What else is found under the name of weights: its first bytes, what it is, what to do.
_OTHER_FORMATS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights it points to",
        "fetch them with `git lfs pull`",
    ),
    (b"GGUF", "is a GGUF file, made for language models", SAVE_AGAIN),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes", SAVE_AGAIN),
    (b"\x93NUMPY", "is a single NumPy array", SAVE_AGAIN),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it first"),
    (b"BZh", "is compressed with bzip2", "unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard", "unpack it first"),
)
_SAFETENSORS = {
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BF16": DTYPES["bfloat16"],
    "BOOL": np.dtype(bool),
    "C64": np.dtype("complex64"),
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
      path: The file of the tensors.
      format: ``"safetensors"``, ``"torch zip"`` or ``"torch legacy"``.
      sha256: Of the file; of several shards, of their SHA-256 in the order of their names.
      tensors: By name, as in the file's state dict; dtypes as in the file (bfloat16 is
        `ml_dtypes.bfloat16`).
      found_under: Where in the file the state dict was, ``"state_dict"`` or ``""``.
      configs: JSON files beside it, by file name (``"config.json"``,
        ``"preprocessor_config.json"``), the safetensors header's own as ``"__metadata__"``, and
        what a torch file says in words as ``"checkpoint"``.
      notes: What a reader should know: shared storages, metadata left out.
    """

    path: str
    format: str
    sha256: str
    tensors: Mapping[str, np.ndarray]
    found_under: str = ""
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weights(
    path: str | os.PathLike,
    *,
    under: str | None = None,
    reader: str = "safe",
    inert: Collection[str] = (),
) -> WeightsFile:
    """Reads a file of weights, or a folder of one with its JSON files (Hugging Face).

    The format is told by the content, not by the file's name.  Numbers come back bit by bit as they
    are stored, NaN included.

    Args:
      path: A safetensors file, a file of ``torch.save`` (``.pth``, ``.pt``, ``.ckpt``, ``.bin``), a
        ``.index.json`` of shards, or a folder that has ``model.safetensors`` or
        ``pytorch_model.bin``, whole or in shards, or just one file of weights.
      under: The key in a PyTorch file under which the state dict is, ``""`` for the whole file,
        ``"a.b"`` for a dictionary in a dictionary; None takes the first of ``"state_dict"``,
        ``"model"``, ``"teacher"``, ``"model_state_dict"``, ``"net"`` that has tensors, else the
        whole file, else the only place that has some.
      reader: For PyTorch files: ``"safe"`` needs no torch; ``"torch"`` asks
        ``torch.load(weights_only=True)`` of torch 2.10 or newer, never anything less safe.
      inert: Names in the pickle, ``"module.name"``, that are known to be harmless beside the
        weights; for ``"safe"``.  They are passed over, never imported.

    Returns:
      Its tensors, and what is known about them.

    Raises:
      ValueError: If the file is damaged, hostile or of another kind; the message says which, and
        what to do.
      FileNotFoundError: If nothing is there.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"conv1.weight": np.zeros((8, 3, 3, 3))}, f"{folder}/model.safetensors")
      ...     read_weights(folder).tensors["conv1.weight"].shape
      (8, 3, 3, 3)
    """
    if reader not in ("safe", "torch"):
        raise ValueError(f'reader={reader!r}: there are "safe" and "torch"')
    file = beside.locate(pathlib.Path(path))
    sharded = file.name.endswith(beside.INDEX)
    weights = (_read_shards if sharded else _read_file)(file, under, reader, inert)
    configs = {**weights.configs, **beside.read_neighbors(path, file)}
    return dataclasses.replace(weights, configs=configs)


def read_beside(path: str | os.PathLike) -> dict[str, Any]:
    """Returns what lies beside weights, as `read_weights` has it, without the weights."""
    file = beside.locate(pathlib.Path(path))
    return {**normalization.header_of(file), **beside.read_neighbors(path, file)}


def _read_shards(index: pathlib.Path, under: str | None, reader: str, inert) -> WeightsFile:
    """Several files that an index names, as one."""
    places = beside.places_of(index)
    names = sorted(set(places.values()))
    total = sum((index.parent / name).stat().st_size for name in names)
    if total > disk.memory():
        raise ValueError(f"{index} and its shards have {total:,} bytes, more than there is memory")
    tensors, contents, digests = {}, set(), hashlib.sha256()
    notes = [f"{len(names)} shards; the SHA-256 is that of their SHA-256 in order"]
    shards = [_read_file(index.parent / name, under, reader, inert) for name in names]
    for name, shard in zip(names, shards, strict=True):
        tensors |= shard.tensors
        contents |= {(tensor, name) for tensor in shard.tensors}
        digests.update(shard.sha256.encode())
        notes += [f"{name}: {note}" for note in shard.notes]
    # Both ways: a tensor that the index does not list could shadow one of another shard.
    wrong = sorted({tensor for tensor, _ in contents ^ set(places.items())})
    if wrong:
        raise ValueError(
            f"{index} and its shards do not agree about {wrong[:5]}; {beside.FETCH_AGAIN}"
        )
    return dataclasses.replace(
        shards[0], path=str(index), sha256=digests.hexdigest(), tensors=tensors, notes=tuple(notes)
    )


# ----------------------------------------------------------------------------------------- one file


def _read_file(path: pathlib.Path, under: str | None, reader: str, inert) -> WeightsFile:
    """Reads one file by what its first bytes say it is."""
    weights = _read_open(path, under, reader, inert)
    forged = [name for name in weights.tensors if one_line(name) != name]
    if forged:
        raise ValueError(
            f"cannot read {path}: names of tensors hold characters that no network has, "
            f"{one_line(forged[0])[:200]}; it is forged"
        )
    return weights


def _read_open(path: pathlib.Path, under: str | None, reader: str, inert) -> WeightsFile:
    try:
        with disk.open_regular(path) as file:
            # Some files of /proc have no end, and say that they are empty.
            head = file.read(512) if os.fstat(file.fileno()).st_size else b""
            if not head:
                raise RefusedError(f"it is empty; {beside.FETCH_AGAIN}")
            sha256 = hashlib.file_digest(_rewound(file), "sha256").hexdigest()
            _rewound(file)
            if head[5:9] == b"\0\0\0{":  # a length of eight bytes, then JSON
                return _read_safetensors(path, file, sha256, under)
            if head.startswith(b"PK\x03\x04"):
                kind, read = "torch zip", torch_reader.read_zip
            elif torch_reader.LEGACY_MAGIC in head[:32]:
                kind, read = "torch legacy", torch_reader.read_legacy
            else:
                raise RefusedError(_other_format(head))
            saved = read(file, inert) if reader == "safe" else _torch_load(path, file, kind)
            place, state, notes = state_dicts.locate(saved, under)
            tensors, more = _arrays(state)
            kind = "torch script" if isinstance(saved, torch_reader.Script) else kind
            notes += torch_reader.NOTES.get(kind, ())
            said = state_dicts.words(saved)
            configs = {"checkpoint": said} if said else {}
            return WeightsFile(
                str(path), kind, sha256, tensors, place, configs, notes=(*notes, *more)
            )
    except ValueError as error:  # a refusal, or what NumPy has against forged sizes
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def _rewound(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


def _other_format(head: bytes) -> str:
    """What a file is that is not one of weights, and what to do."""
    for magic, what, remedy in _OTHER_FORMATS:
        if head.startswith(magic):
            return f"it {what}; {remedy}"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error", b"{")):
        return (
            "it is text (HTML, XML or JSON), such as a server sends in place of a file; read it "
            "in an editor to see why, then fetch the file itself"
        )
    if head[257:262] == b"ustar":
        return f"it is a tar archive; unpack it, or if torch wrote it before 2017, {SAVE_AGAIN}"
    if head[:1] == b"\x08" and b"\x12" in head[2:4]:
        return f"it is an ONNX graph; {SAVE_AGAIN} where it was exported from"
    if head[:1] == b"\x80":
        return f"it is a plain pickle, not written by torch.save; {SAVE_AGAIN}"
    return (
        f"it begins with {head[:8]!r}, which is neither safetensors nor a file of torch.save; "
        f"{beside.FETCH_AGAIN} if it should be, else {SAVE_AGAIN}"
    )


def _read_safetensors(
    path: pathlib.Path, file: BinaryIO, sha256: str, under: str | None
) -> WeightsFile:
    """Lets the safetensors library check the header, then takes views of the bytes."""
    import safetensors

    if under:
        raise RefusedError(
            f"it is a safetensors file, whose tensors lie in one place; leave out under={under!r}"
        )
    try:
        # It compares sizes and offsets; the numbers are then views, also of types NumPy lacks.
        with safetensors.safe_open(path, "numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise RefusedError(f"{error}; it is cut off or damaged, {beside.FETCH_AGAIN}") from error
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", None)
    content = np.fromfile(file, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS:
            raise RefusedError(
                f"{name} is of type {entry['dtype']}, which is not known here; convert it to F32"
            )
        first, end = entry["data_offsets"]
        flat = content[first:end].view(_SAFETENSORS[entry["dtype"]])
        # Offsets in the file need not be multiples of a number's size; unaligned ones are copied.
        tensors[name] = np.require(flat.reshape(entry["shape"]), requirements="A")
    configs = {} if metadata is None else {"__metadata__": metadata}
    return WeightsFile(str(path), "safetensors", sha256, tensors, configs=configs)


# -------------------------------------------------------------------------------- the state dict


def _arrays(state: Mapping[Any, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors' numbers by name, and notes about the rest."""
    _refuse_multiplied(state)
    tensors, left, unnamed, sharing = {}, [], [], {}
    for name, value in state.items():
        if not state_dicts.is_tensor(value):
            left.append(str(name))
            continue
        if not isinstance(name, str):
            unnamed.append(repr(name))
            continue
        if isinstance(value, torch_pickle.Tensor):
            tensors[name], storage = value.array(), id(value.storage)
        else:
            tensors[name], storage = _from_torch(value), value.untyped_storage().data_ptr()
        sharing.setdefault(storage, []).append(name)
    if unnamed and not tensors:
        raise RefusedError(
            f"the names of its tensors are no text: {', '.join(unnamed[:3])}; save the state dict "
            "of the network, whose names are texts"
        )
    notes = [f"left out, not tensors: {', '.join(left[:10])}"] if left else []
    notes += [f"left out, names that are no text: {', '.join(unnamed[:10])}"] if unnamed else []
    shared = [names for names in sharing.values() if len(names) > 1]
    notes += [f"one storage is shared by {', '.join(names[:10])}" for names in shared[:10]]
    return tensors, notes


def _refuse_multiplied(state: Mapping[Any, Any]) -> None:
    """One small storage under thousands of names could ask for terabytes."""
    # Each tensor alone fits into its storage, which `Tensor` checks; together they need not.
    described = [x for x in state.values() if isinstance(x, torch_pickle.Tensor)]
    demand = sum(math.prod(x.shape) * x.dtype.itemsize for x in described)
    supply = sum({id(x.storage): x.storage.nbytes for x in described}.values())
    if demand > _MOST_SHARING * supply + 2**20:
        raise RefusedError(
            f"its tensors ask for {demand} bytes and it holds {supply}; it is forged"
        )


# ---------------------------------------------------------------------------- torch, if it is asked


def _torch_load(path: pathlib.Path, file: BinaryIO, kind: str) -> Any:
    """The second way in: torch's own safe loader, and the checksums that it does not compare."""
    try:
        import torch
    except ImportError as error:
        raise RefusedError(
            'reader="torch" needs torch 2.10 or newer, which is not here; reader="safe" needs none'
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        raise RefusedError(
            'reader="torch" needs torch 2.10 or newer: the safe loader of older ones, here '
            f'{torch.__version__}, has known holes; update torch or take reader="safe"'
        )
    # torch takes a flipped bit in silence: it does not compare the zip's checksums.
    if kind == "torch zip":
        torch_reader.check_zip(file)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage happens to cause
        raise RefusedError(f"torch does not load it ({error})") from error


def _from_torch(tensor: Any) -> np.ndarray:
    """A torch tensor as an array of the same type; those that NumPy lacks go by their bytes."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES or tensor.layout != torch.strided:
        raise RefusedError(f"a tensor is {name}, {tensor.layout}; save it dense, as float32")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise RefusedError("a tensor repeats its elements; call .contiguous() on it before saving")
    whole = tensor.detach().contiguous()
    flat = whole.reshape(-1).view(torch.uint8).numpy()
    return flat.view(DTYPES[name]).reshape(tuple(whole.shape))
