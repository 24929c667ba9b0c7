"""The pickle inside PyTorch's files of weights, read without running anything in it.

`robust_ssl.pickles` does the reading; here is what such a file may name.  "Calling" a name either
describes a tensor or leaves an inert `Stub`.  Tensors stay descriptions until `Tensor.array` is
asked for them, so an optimizer's state is never read.

References:
  What torch writes: `torch/_utils.py`, ``_rebuild_tensor_v2`` and its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from robust_ssl import pickles
from robust_ssl.pickles import DICTS, Name, RefusedError, Stub

PICKLE_LIMIT = 2**24  # bytes; a large network with its optimizer needs a hundredth of it
_LARGEST = 2**48  # of a tensor's sizes, strides and offset
_RANK_LIMIT = 32  # axes of a tensor; more than NumPy could hold not long ago


# ------------------------------------------------------------------------------ what may be named

_NUMPY = "float64 float32 float16 complex64 complex128 bool"
_NUMPY += " int64 int32 int16 int8 uint64 uint32 uint16 uint8"
# NumPy has none of these itself; ml_dtypes, on which JAX stands, registers them.
_EXTENDED = "bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
DTYPES = {name: np.dtype(name) for name in _NUMPY.split()}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED.split()}
_DTYPE_NAMES = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
_STORAGE_NAMES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "Untyped": "uint8", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_STORAGE_TYPES = {}
for _module in ("torch", "torch.cuda", "torch.storage"):
    for _kind, _dtype in _STORAGE_NAMES.items():
        _STORAGE_TYPES[f"{_module}.{_kind}Storage"] = DTYPES[_dtype]
# Names that stand beside weights and are of no use to us; none of them is imported.
_BUILTINS = "bool bytearray bytes complex float frozenset int list long object set slice str tuple"
_PATHS = "PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath Path"
_INERT = {
    # Python 2, and every pickle of protocol 2, says __builtin__ and copy_reg.
    *(f"builtins.{name}" for name in _BUILTINS.split()),
    *(f"__builtin__.{name}" for name in (*_BUILTINS.split(), "unicode")),
    *("builtins.unicode", "copyreg._reconstructor", "copy_reg._reconstructor"),
    # Python 3.13 has paths in a module of its own, those of the other system among them.
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS.split()),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("collections.deque", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *("zoneinfo.ZoneInfo", "zoneinfo.ZoneInfo._unpickle", "copyreg.__newobj__"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),  # before NumPy 2
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "types.SimpleNamespace", "typing.Any"),
    *("argparse.Namespace", "collections.Counter"),
    *("torch.Size", "torch.Tensor", "torch.device"),
    *("torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter"),
}
# Classes of hyper-parameters, of callbacks' counters and of schedules.
_INERT_PACKAGES = (
    *("lightning.", "lightning_fabric.", "omegaconf.", "pytorch_lightning."),
    *("addict.", "easydict.", "yacs.config.", "ml_collections.", "fvcore.common.config."),
    *("mmcv.utils.config.", "mmengine.config.", "mmengine.logging.", "torch.optim."),
    "numpy.random.",
)
_ADVICE = (
    "If that is a network's class, the file is a whole pickled model: where it was made, save "
    "model.state_dict() instead, best as safetensors. If it stands beside the weights and you know "
    "it, name it and it is passed over, never run: --inert NAME (inert= in Python). If not, the "
    "file may be hostile: open it with nothing else"
)


# ---------------------------------------------------------------------------------------- tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of bytes that tensors are views of.

    Attributes:
      key: Its name in the file.
      count: How many numbers, as the pickle has it; the container must agree.
      itemsize: Bytes of each.
      fetch: Reads them from the container.
    """

    key: str
    count: int
    itemsize: int
    fetch: Callable[[Storage], np.ndarray]

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.count * self.itemsize

    @functools.cached_property
    def content(self) -> np.ndarray:
        """The bytes, read once."""
        return self.fetch(self)


Fetch = Callable[[Storage], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as the pickle describes it: a strided view of a storage, counted in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.offset, *self.shape, *self.strides)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise RefusedError("a tensor's offset, shape or strides are negative or no integers")
        if max(numbers) >= _LARGEST:
            raise RefusedError("a tensor's offset, shape or strides are absurd; it is forged")
        if len(self.shape) != len(self.strides) or len(self.shape) > _RANK_LIMIT:
            axes, strides = len(self.shape), len(self.strides)
            raise RefusedError(f"a tensor has {axes} axes and {strides} strides; it is forged")
        steps = zip(self.shape, self.strides, strict=True)
        end = self.offset + sum((size - 1) * stride for size, stride in steps) + 1
        size = self.storage.nbytes // self.dtype.itemsize
        count = math.prod(self.shape)
        if count and end > size:
            raise RefusedError(
                f"a tensor of shape {self.shape} ends at element {end} of storage "
                f"{self.storage.key!r}, which has {size}"
            )
        if count > size:  # with strides of zero a few bytes could ask for terabytes
            raise RefusedError(
                f"a tensor of shape {self.shape} repeats the {size} elements of storage "
                f"{self.storage.key!r}; call .contiguous() on it before saving"
            )

    def array(self) -> np.ndarray:
        """Returns the numbers in C order; a view of the storage where it is contiguous."""
        size = self.dtype.itemsize
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        strides = tuple(stride * size for stride in self.strides)
        content = self.storage.content
        view = np.ndarray(self.shape, self.dtype, content, self.offset * size, strides)
        return view if view.flags.c_contiguous else view.copy(order="C")


def _tensor(storage, offset, shape, strides, *rest, dtype=None):
    if not (isinstance(storage, tuple) and isinstance(storage[0], Storage)):
        raise RefusedError("a tensor is built from something that is not a storage")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise RefusedError("a tensor's shape and strides must be tuples")
    return Tensor(storage[0], dtype or storage[1], offset, shape, strides)


def _tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None):
    # The numbers in the file are then not those of the tensor.
    if metadata:
        raise RefusedError("a tensor is stored as a conjugate; call .resolve_conj() before saving")
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
    numbers = _DTYPE_NAMES.get(dtype.path) if isinstance(dtype, Name) else None
    if metadata or numbers is None:
        raise RefusedError("a tensor's number type is not known here; save it as float32")
    return _tensor(storage, offset, shape, strides, dtype=numbers)


def _parameter(data, *rest):
    return data


def _from_type(function, kind, args, state):
    """A tensor with Python attributes, or of a subclass: the tensor alone."""
    return _call(function, args)


_BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}


class Scripted:
    """A module or another object of a TorchScript program: what it holds, by name; no code."""

    def __init__(self):
        self.attributes: dict[Any, Any] = {}


def _build(instance: Any, state: Any) -> None:
    if isinstance(instance, Scripted) and isinstance(state, dict):
        instance.attributes = state


# What a program calls its own classes, and what it makes typed lists with.
_SCRIPT = ("__torch__.", "torch.jit._pickle.")
_KNOWN = _STORAGE_TYPES.keys() | _DTYPE_NAMES.keys() | _BUILDERS.keys() | DICTS | _INERT


def is_known(path: str, inert: Collection[str] = ()) -> bool:
    """Whether a name, ``"module.name"``, may stand in a file of weights.

    Example:
      >>> is_known("torch.FloatStorage"), is_known("os.system")
      (True, False)
    """
    return path in _KNOWN or path.startswith(_INERT_PACKAGES) or path in inert


def is_scripted(path: str) -> bool:
    """Whether a name may stand in the pickle of a TorchScript program besides."""
    return path.startswith(_SCRIPT)


def _call(name: Name, args: tuple) -> Any:
    if name.path in _BUILDERS:
        return _BUILDERS[name.path](*args)
    return Scripted() if name.path.startswith(_SCRIPT[0]) else Stub()


def _refer(pid: Any, fetch: Fetch, storages: dict[str, Storage]) -> tuple[Storage, np.dtype]:
    """Returns a storage and its number type."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or type(pid[2]) is not str:
        raise RefusedError("its pickle refers to something that is not a storage of numbers")
    _, kind, key, _, count, *view = pid
    dtype = _STORAGE_TYPES.get(kind.path) if isinstance(kind, Name) else None
    if dtype is None or type(count) is not int or count < 0:
        raise RefusedError(f"storage {key[:50]!r} is of an unknown kind or size")
    if any(part is not None for part in view):
        raise RefusedError("it has views of storages, as torch wrote in 2017; save it again")
    storage = Storage(key, count, dtype.itemsize, fetch)
    first = storages.setdefault(key, storage)
    if storage.nbytes != first.nbytes:
        raise RefusedError(f"storage {key!r} is described with two different sizes")
    return first, dtype


def load(
    file: BinaryIO,
    fetch: Fetch,
    storages: dict[str, Storage] | None = None,
    inert: Collection[str] = (),
    script: bool = False,
) -> Any:
    """Reads one pickle.

    Args:
      file: Where the pickle starts; read up to its end and no further.
      fetch: Gives a storage's bytes, uint8 ``[nbytes]``, once a tensor's numbers are asked for.
      storages: Filled with those that the pickle mentions, by key.
      inert: Further names, ``"module.name"``, that may stand in it; they become inert like all.
      script: Whether it is of a TorchScript program, whose objects are then `Scripted`.

    Returns:
      Dictionaries, lists, numbers and strings as they are, each tensor a `Tensor`, all else inert.

    Raises:
      RefusedError: If it names anything that is not known, or is damaged.

    Example:
      >>> import io, pickle
      >>> load(io.BytesIO(pickle.dumps({"epoch": 3})), fetch=None)
      {'epoch': 3}
      >>> load(io.BytesIO(pickle.dumps(print)), fetch=None)
      Traceback (most recent call last):
      robust_ssl.pickles.RefusedError: its pickle names builtins.print, which no file of ...
    """
    kept = {} if storages is None else storages
    refer = functools.partial(_refer, fetch=fetch, storages=kept)

    def known(path: str) -> bool:
        return is_known(path, inert) or (script and is_scripted(path))

    rules = pickles.Rules("file of weights", known, _call, refer, _build, _ADVICE)
    return pickles.load(file, rules)
