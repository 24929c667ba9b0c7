"""The pickle inside PyTorch's files of weights, read without running anything in it.

A pickle is a program: ordinarily it may import any function and call it.  Here a name in the
pickle becomes a `Name`, a value that cannot be called, and only if it is in the tables below;
"calling" one either describes a tensor or leaves an inert `Stub`.  Tensors stay descriptions until
`Tensor.array` is asked for them, so an optimizer's state is never read.

References:
  What torch writes: `torch/_utils.py`, ``_rebuild_tensor_v2`` and its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np

PICKLE_LIMIT = 2**24  # bytes; a large network with its optimizer needs a hundredth of it
_DEPTH_LIMIT = 1000  # marks that are open at once; files of weights have less than ten
_LARGEST = 2**48  # of a tensor's sizes, strides and offset
_RANK_LIMIT = 32  # axes of a tensor; more than NumPy could hold not long ago


class RefusedError(ValueError):
    """A file that is not read, with the reason."""


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
_DICTS = {"builtins.dict", "__builtin__.dict", "collections.OrderedDict", "collections.defaultdict"}
# Names that stand beside weights and are of no use to us; none of them is imported.
_BUILTINS = "bool bytearray bytes complex float frozenset int list long object set slice str tuple"
_INERT = {
    # Python 2, and every pickle of protocol 2, says __builtin__ and copy_reg.
    *(f"builtins.{name}" for name in _BUILTINS.split()),
    *(f"__builtin__.{name}" for name in (*_BUILTINS.split(), "unicode")),
    *("builtins.unicode", "copyreg._reconstructor", "copy_reg._reconstructor"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),  # before NumPy 2
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "types.SimpleNamespace", "typing.Any"),
    *("argparse.Namespace", "collections.Counter", "datetime.datetime", "datetime.timedelta"),
    *("torch.Size", "torch.Tensor", "torch.device"),
    *("torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter"),
}
# Lightning's and OmegaConf's own classes hold hyper-parameters and callbacks' counters.
_INERT_PACKAGES = ("lightning.", "lightning_fabric.", "omegaconf.", "pytorch_lightning.")


@dataclasses.dataclass(frozen=True)
class Name:
    """What the pickle names, ``"torch.float32"``; it is never looked up anywhere."""

    path: str


class Stub:
    """Stands where an object of no interest would be; takes whatever the pickle gives it."""

    def append(self, item: Any) -> None:
        """Takes what a list would."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Takes what a dictionary would."""

    extend = add = append


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
_KNOWN = _STORAGE_TYPES.keys() | _DTYPE_NAMES.keys() | _BUILDERS.keys() | _DICTS | _INERT


def _call(name: Any, args: Any) -> Any:
    """What the pickle gets for calling a name: nothing outside this file is ever called."""
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise RefusedError(
            f"its pickle calls a {type(name).__name__}, which no file of weights does"
        )
    if name.path in _BUILDERS:
        return _BUILDERS[name.path](*args)
    # Python's own dictionaries keep order, so an OrderedDict loses nothing.
    if name.path in _DICTS:
        pairs = args[0] if args and isinstance(args[0], list) else []  # Python 2's OrderedDict
        return {_key(key): value for key, value in pairs}
    return Stub()


def _key(key: Any) -> Any:
    """A dictionary's key; anything but a plain one becomes inert, as hashing may take for ever."""
    plain = (str, bytes, int, float, bool, type(None), Name, Stub)
    if type(key) is int and abs(key) >= 2**60:  # only these can be chosen to have equal hashes
        return Stub()
    return key if isinstance(key, plain) else Stub()


# ------------------------------------------------------------------------------------- the pickle


class _Lines:
    """A file whose lines are whole: half a name, where a file is cut off, would look hostile."""

    def __init__(self, file: BinaryIO):
        self.read, self._readline = file.read, file.readline

    def readline(self) -> bytes:
        line = self._readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends within a name")
        return line


class _Reader(pickle._Unpickler):
    """Python's own unpickler (the readable one) with everything that calls taken out of it.

    ``dispatch`` maps each opcode to its function, as in the parent; those that import, call, set
    attributes, hash what the file says or allocate what it asks for are replaced.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, fetch: Fetch, storages: dict[str, Storage]):
        # The encoding is that of strings which Python 2 wrote.
        super().__init__(_Lines(file), encoding="utf-8", errors="surrogateescape")
        self._fetch = fetch
        self._storages = storages

    def find_class(self, module, name):
        path = f"{module}.{name}"
        if path in _KNOWN or path.startswith(_INERT_PACKAGES):
            return Name(path)
        raise RefusedError(
            f"its pickle names {path[:200]}, which no file of weights needs; reading stopped "
            "there and nothing was run. If that is a network's class, the file is a whole pickled "
            "model: where it was made, save model.state_dict() instead, best as safetensors. If "
            "not, the file may be hostile: open it with nothing else"
        )

    def persistent_load(self, pid):
        """Returns a storage and its number type, as ``(Storage, dtype)``."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or type(pid[2]) is not str:
            raise RefusedError("its pickle refers to something that is not a storage of numbers")
        _, kind, key, _, count, *view = pid
        dtype = _STORAGE_TYPES.get(kind.path) if isinstance(kind, Name) else None
        if dtype is None or type(count) is not int or count < 0:
            raise RefusedError(f"storage {key[:50]!r} is of an unknown kind or size")
        if any(part is not None for part in view):
            raise RefusedError("it has views of storages, as torch wrote in 2017; save it again")
        storage = Storage(key, count, dtype.itemsize, self._fetch)
        first = self._storages.setdefault(key, storage)
        if storage.nbytes != first.nbytes:
            raise RefusedError(f"storage {key!r} is described with two different sizes")
        return first, dtype

    def load_reduce(self):
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def load_newobj(self):
        args = self.stack.pop()
        self.append(_call(self.stack.pop(), args))

    def load_newobj_ex(self):
        self.stack.pop()  # keyword arguments
        self.load_newobj()

    def load_inst(self):
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(_call(self.find_class(module, name), tuple(self.pop_mark())))

    def load_obj(self):
        name, *args = self.pop_mark()
        self.append(_call(name, tuple(args)))

    def load_build(self):
        self.stack.pop()  # an object's attributes: never weights

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_dict(self):
        items = self.pop_mark()
        pairs = zip(items[::2], items[1::2], strict=True)
        self.append({_key(key): value for key, value in pairs})

    # Sets hash what the file says, and equal hashes make that quadratic; no weights are in one.
    def load_frozenset(self):
        self.pop_mark()
        self.append(Stub())

    def load_empty_set(self):
        self.append(Stub())

    def load_mark(self):
        if len(self.metastack) >= _DEPTH_LIMIT:
            raise RefusedError(f"its pickle is nested more than {_DEPTH_LIMIT} deep")
        super().load_mark()

    def load_refused(self):
        raise RefusedError("its pickle uses an instruction that files of weights do not need")

    for opcode, function in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.INST, load_inst),
        (pickle.OBJ, load_obj),
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.FROZENSET, load_frozenset),
        (pickle.EMPTY_SET, load_empty_set),
        (pickle.MARK, load_mark),
    ):
        dispatch[opcode[0]] = function
    for opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):  # looked up in a registry of classes
        dispatch[opcode[0]] = load_refused
    for opcode in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        dispatch[opcode[0]] = load_refused
    del opcode, function


def load(file: BinaryIO, fetch: Fetch, storages: dict[str, Storage] | None = None) -> Any:
    """Reads one pickle.

    Args:
      file: Where the pickle starts; read up to its end and no further.
      fetch: Gives a storage's bytes, uint8 ``[nbytes]``, once a tensor's numbers are asked for.
      storages: Filled with those that the pickle mentions, by key.

    Returns:
      Dictionaries, lists, numbers and strings as they are, each tensor a `Tensor`, all else inert.

    Raises:
      RefusedError: If it names anything that is not known, or is damaged.

    Example:
      >>> import io
      >>> load(io.BytesIO(pickle.dumps({"epoch": 3})), fetch=None)
      {'epoch': 3}
      >>> load(io.BytesIO(pickle.dumps(print)), fetch=None)
      Traceback (most recent call last):
      robust_ssl.weights.torch_pickle.RefusedError: its pickle names builtins.print, which ...
    """
    try:
        return _Reader(file, fetch, {} if storages is None else storages).load()
    except RefusedError:
        raise
    except Exception as error:  # whatever nonsense does to a machine of sixty instructions
        cause = f"{type(error).__name__}: {error}"[:200]
        raise RefusedError(f"its pickle is damaged or cut off ({cause}); fetch it again") from error
