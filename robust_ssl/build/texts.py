"""The text that a user's module was loaded from; its file may say something else by now."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.machinery
import io
import linecache
import pathlib
import sys
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_RECORD = "__robust_ssl_loaded__"  # in the namespace of a module: old functions keep theirs


@dataclasses.dataclass(frozen=True)
class Record:
    """How a module was loaded.

    Attributes:
      spec: Of the loading; ``importlib.reload`` gives the module another.
      text: Of its file.
      imports: The user's modules that it imports, by name, with their specs.
    """

    spec: Any
    text: str
    imports: Mapping[str, tuple[types.ModuleType, Any]]


def read(file: Any) -> str | None:
    """Returns the text of a source file, as Python reads it; None where it cannot be read."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError, TypeError):
        return None


def keep(names: dict[str, Any], text: str, imports: Mapping[str, types.ModuleType]) -> None:
    """Keeps what the module of a namespace was loaded from."""
    modules = {name: (module, module.__spec__) for name, module in imports.items()}
    names[_RECORD] = Record(names.get("__spec__"), text, modules)


def record_of(names: Mapping[str, Any]) -> Record | None:
    """Returns how the module of a namespace was loaded; None where nobody has looked."""
    record = names.get(_RECORD)
    return record if record is not None and record.spec is names.get("__spec__") else None


def text_of(names: Mapping[str, Any]) -> str | None:
    """Returns what the module of a namespace was loaded from; None where nobody has looked."""
    record = record_of(names)
    return None if record is None else record.text


def whole(text: str) -> str:
    """Returns a text whose last line has an end, as `inspect` gives a file's."""
    return text if not text or text.endswith("\n") else f"{text}\n"


@contextlib.contextmanager
def shown(file: str, text: str | None) -> Iterator[None]:
    """Has `inspect` find a text in a file; None is what the file says."""
    before = linecache.cache.get(file)
    if text is not None:
        # Without a time of change the entry is not compared with the file.
        lines = list(io.StringIO(whole(text)))
        linecache.cache[file] = (len(text), None, lines, file)
    try:
        yield
    finally:
        if text is not None:
            linecache.cache.pop(file)
            if before is not None:
                linecache.cache[file] = before


# --- Modules that were imported before anybody looked ---------------------------------------------


def is_edited(names: Mapping[str, Any]) -> bool:
    """Whether the file of a module that nobody has looked at was edited since it was imported."""
    return not agrees(functions_in(names), names) or _is_newer_than_bytecode(names)


def _is_newer_than_bytecode(names: Mapping[str, Any]) -> bool:
    """Whether a file is another than that of its bytecode, which an import writes or takes."""
    if sys.dont_write_bytecode or not _is_plain(names):
        return False
    try:
        head = pathlib.Path(names["__cached__"]).read_bytes()[:16]
        now = pathlib.Path(names["__file__"]).stat()
    except (OSError, KeyError, TypeError):
        return False
    flags, made, size = (int.from_bytes(head[i : i + 4], "little") for i in (4, 8, 12))
    mask = 0xFFFFFFFF
    return flags == 0 and (made, size) != (int(now.st_mtime) & mask, now.st_size & mask)


def _is_plain(names: Mapping[str, Any]) -> bool:
    # Others' loaders change what they load, as those of pytest and jaxtyping do.
    return type(names.get("__loader__")) is importlib.machinery.SourceFileLoader


def agrees(functions: Iterable[Any], names: Mapping[str, Any]) -> bool:
    """Whether functions are those that the file of their module says now.

    True too where that cannot be known, as of what is typed into a shell, or of a module whose
    loader changes what it loads.
    """
    file = names.get("__file__")
    if not _is_plain(names):
        return True
    text = read(file)
    codes = [getattr(function, "__code__", None) for function in functions]
    own = [code for code in codes if getattr(code, "co_filename", None) == file]
    return text is None or not own or {*map(_signature, own)} <= _signatures(text)


def functions_in(names: Mapping[str, Any]) -> list[Any]:
    """Returns the functions of a namespace and those of its classes, without their wrappers."""
    found = []
    for value in list(names.values()):
        own = isinstance(value, type) and value.__module__ == names.get("__name__")
        for member in vars(value).values() if own else [value]:
            for _ in range(20):
                if isinstance(member, types.FunctionType):
                    found.append(member)
                member = getattr(member, "__wrapped__", None) or getattr(member, "__func__", None)
    return found


@functools.lru_cache(32)
def _signatures(text: str) -> frozenset[Any]:
    try:
        waiting = [compile(text, "", "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return frozenset()
    signatures = set()
    while waiting:
        code = waiting.pop()
        signatures.add(_signature(code))
        waiting += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return frozenset(signatures)


def _signature(code: types.CodeType) -> Any:
    # Not by ==, which may see how often the code has run.
    parts = [
        _signature(c) if isinstance(c, types.CodeType) else repr(_set(c)) for c in code.co_consts
    ]
    place = (code.co_name, code.co_firstlineno)
    return (*place, code.co_code, code.co_names, code.co_varnames, tuple(parts))


def _set(constant: Any) -> Any:
    return sorted(constant, key=repr) if isinstance(constant, frozenset) else constant
