"""Pickles read without running anything in them.

A pickle is a program: ordinarily it may import any function and call it.  Here a name in the
pickle becomes a `Name`, a value that cannot be called, and only if the rules of its kind of file
list it.  What "calling" one gives is the rules' own answer; most leave an inert `Stub`.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

DICTS = {"builtins.dict", "__builtin__.dict", "collections.OrderedDict", "collections.defaultdict"}
_DEPTH_LIMIT = 1000  # marks that are open at once; files of weights have less than ten


class RefusedError(ValueError):
    """A file that is not read, with the reason."""


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


def _refuse_reference(pid: Any) -> Any:
    raise RefusedError("its pickle refers to something outside of it")


def _ignore(instance: Any, state: Any) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the pickles of one kind of file may name, and what that gives.

    Attributes:
      kind: What an error calls such a file, ``"file of weights"``.
      known: Whether a name, ``"module.name"``, may stand in it.
      call: Gives the value of calling a known name; the plain dictionaries are called already.
      refer: Gives the value of a reference out of the pickle.
      build: Takes an object's attributes; by default they are forgotten.
      advice: What to do about a name that is not known.
      encoding: Of the strings that Python 2 wrote.
    """

    kind: str
    known: Callable[[str], bool]
    call: Callable[[Name, tuple], Any]
    refer: Callable[[Any], Any] = _refuse_reference
    build: Callable[[Any, Any], None] = _ignore
    advice: str = "The file may be hostile: open it with nothing else"
    encoding: str = "utf-8"


def _call(rules: Rules, name: Any, args: Any) -> Any:
    """What the pickle gets for calling a name: nothing that the file brings is ever called."""
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise RefusedError(f"its pickle calls a {type(name).__name__}, which no {rules.kind} does")
    # Python's own dictionaries keep order, so an OrderedDict loses nothing.
    if name.path in DICTS:
        pairs = args[0] if args and isinstance(args[0], list) else []  # Python 2's OrderedDict
        return {plain_key(key): value for key, value in pairs}
    return rules.call(name, args)


def plain_key(key: Any) -> Any:
    """A dictionary's key; anything but a plain one becomes inert, as hashing may take for ever."""
    plain = (str, bytes, int, float, bool, type(None), Name, Stub)
    if type(key) is int and abs(key) >= 2**60:  # only these can be chosen to have equal hashes
        return Stub()
    return key if isinstance(key, plain) else Stub()


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

    def __init__(self, file: BinaryIO, rules: Rules):
        super().__init__(_Lines(file), encoding=rules.encoding, errors="surrogateescape")
        self._rules = rules

    def find_class(self, module, name):
        path = f"{module}.{name}"
        if self._rules.known(path):
            return Name(path)
        raise RefusedError(
            f"its pickle names {path[:200]}, which no {self._rules.kind} needs; reading stopped "
            f"there and nothing was run. {self._rules.advice}"
        )

    def persistent_load(self, pid):
        return self._rules.refer(pid)

    def load_reduce(self):
        args = self.stack.pop()
        self.stack[-1] = _call(self._rules, self.stack[-1], args)

    def load_newobj(self):
        args = self.stack.pop()
        self.append(_call(self._rules, self.stack.pop(), args))

    def load_newobj_ex(self):
        self.stack.pop()  # keyword arguments
        self.load_newobj()

    def load_inst(self):
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(_call(self._rules, self.find_class(module, name), tuple(self.pop_mark())))

    def load_obj(self):
        name, *args = self.pop_mark()
        self.append(_call(self._rules, name, tuple(args)))

    def load_build(self):
        state = self.stack.pop()
        self._rules.build(self.stack[-1], state)

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][plain_key(key)] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][plain_key(key)] = value

    def load_dict(self):
        items = self.pop_mark()
        pairs = zip(items[::2], items[1::2], strict=True)
        self.append({plain_key(key): value for key, value in pairs})

    # Sets hash what the file says, and equal hashes make that quadratic; no data are in one.
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
        raise RefusedError(
            f"its pickle uses an instruction that a {self._rules.kind} does not need"
        )

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


def load(file: BinaryIO, rules: Rules) -> Any:
    """Reads one pickle.

    Args:
      file: Where the pickle starts; read up to its end and no further.
      rules: What it may name.

    Returns:
      Dictionaries, lists, numbers and strings as they are, the rest as the rules say.

    Raises:
      RefusedError: If it names anything that is not known, or is damaged.

    Example:
      >>> import io
      >>> rules = Rules("table", known=lambda path: False, call=lambda name, args: Stub())
      >>> load(io.BytesIO(pickle.dumps({"epoch": 3})), rules)
      {'epoch': 3}
      >>> load(io.BytesIO(pickle.dumps(print)), rules)
      Traceback (most recent call last):
      robust_ssl.pickles.RefusedError: its pickle names builtins.print, which no table needs; ...
    """
    try:
        return _Reader(file, rules).load()
    except RefusedError:
        raise
    except Exception as error:  # whatever nonsense does to a machine of sixty instructions
        cause = f"{type(error).__name__}: {error}"[:200]
        raise RefusedError(f"its pickle is damaged or cut off ({cause}); fetch it again") from error
