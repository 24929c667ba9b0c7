"""The source of a user's functions: an edited one is another one, whatever it is called."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import pathlib
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from robust_ssl.build.entries import name_of
from robust_ssl.build.functions import names_function, resolve

_DEEPEST = 40  # functions that call functions; a loop ends by itself


def code_of(value: Any) -> dict[str, str]:
    """Returns a digest of the source of every function outside this package that a value has.

    An edited function is another function, whatever it is called; so a resumed run must notice.
    With a function come the functions, classes and constants of the user's that it uses, also
    those of other files, what a closure or a partial has bound, and the fields of an object.

    Args:
      value: Plain JSON values, in which texts name functions, or functions themselves, or
        dataclasses of both.

    Returns:
      ``"module:function"`` to digest.  Without a source there is the compiled code; what has
      neither, a function of C, is left out.
    """
    digests = {}
    for name, function in _named(value):
        if name.startswith("robust_ssl") and not _has_state(function):
            continue
        with contextlib.suppress(ValueError, OSError, TypeError, ImportError):
            function = resolve(name) if function is None else function
            text = "\n".join(_Reader(function).read())
            digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return dict(sorted(digests.items()))


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields names with their functions; None where a name is all there is."""
    if isinstance(value, str):
        if names_function(value):
            yield value, None
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _named(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _named(entry)
    elif hasattr(value, "text") and not isinstance(value, type):
        yield from _named(value.text)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _named(getattr(value, field.name))
    elif callable(value):
        yield name_of(value), value


def _has_state(function: Any) -> bool:
    """Whether it is more than its name says: a partial, a closure, an object with fields."""
    plain = isinstance(function, type | types.FunctionType) and not getattr(
        function, "__closure__", None
    )
    return function is not None and not plain


class _Reader:
    """Reads a function with all of the user's that it uses, each once, in a fixed order."""

    def __init__(self, function: Any):
        self._parts: dict[int, str] = {}
        self._kept: list[Any] = []  # else an id could be another object's
        self._home = _module_of(function).partition(".")[0]
        self._follow(function, 0)

    def read(self) -> list[str]:
        """Returns the texts in the order in which they were met."""
        return list(self._parts.values())

    def _follow(self, value: Any, depth: int) -> None:
        if id(value) in self._parts or depth > _DEEPEST:
            return
        if isinstance(value, functools.partial):
            self._note(value, "partial")
            for part in (value.func, value.args, value.keywords):
                self._follow(part, depth + 1)
        elif isinstance(value, Mapping):
            self._note(value, "mapping")
            for name, entry in value.items():
                self._note(object(), repr(name))
                self._follow(entry, depth + 1)
        elif isinstance(value, list | tuple | set | frozenset):
            self._note(value, type(value).__name__)
            entries = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            for entry in entries:
                self._follow(entry, depth + 1)
        elif isinstance(value, types.MethodType):
            self._follow(value.__func__, depth + 1)
            self._follow(value.__self__, depth + 1)
        elif isinstance(value, type) or hasattr(value, "__code__"):
            self._read_source(value, depth)
        elif hasattr(value, "__wrapped__"):  # of functools.cache, jax.jit
            self._follow(value.__wrapped__, depth + 1)
        else:
            self._note(value, _constant(value))
            if self._is_users(type(value)):
                self._follow(type(value), depth + 1)
                self._follow(getattr(value, "__dict__", {}), depth + 1)

    def _note(self, value: Any, text: str) -> None:
        self._kept.append(value)
        self._parts[id(value)] = text

    def _read_source(self, function: Any, depth: int) -> None:
        self._note(function, _source(function))
        if hasattr(function, "__wrapped__"):  # beside its wrapper, which may be the user's too
            self._follow(function.__wrapped__, depth + 1)
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                self._follow(cell.cell_contents, depth + 1)
        self._follow(getattr(function, "__defaults__", None) or (), depth + 1)
        if isinstance(function, type):
            for base in function.__bases__:
                if self._is_users(base):
                    self._follow(base, depth + 1)
        names = _namespace(function)
        for path in sorted(set(re.findall(r"[A-Za-z_][\w.]*", _source(function)))):
            for value in self._users(names, path.split(".")):
                self._follow(value, depth + 1)

    def _users(self, names: Mapping[str, Any], path: list[str]) -> Iterator[Any]:
        """What a dotted name means, if it is the user's own: a function, a class, a constant."""
        if path[0] not in names:
            return
        value = names[path[0]]
        for attribute in path[1:]:
            if not isinstance(value, types.ModuleType) or not _is_users_file(value, self._home):
                break
            value = getattr(value, attribute, None)
        if isinstance(value, types.ModuleType):
            return
        if isinstance(value, type) or callable(value):
            if self._is_users(value):
                yield value
        elif not path[0].startswith("__"):
            yield from self._of_constant(names, path[0], value)

    def _of_constant(self, names: Mapping[str, Any], name: str, value: Any) -> Iterator[Any]:
        if isinstance(value, list | dict | set):  # perhaps filled while running, as a cache is
            text = _assignment(names, name) if value is names[name] else None
            entries = value.values() if isinstance(value, dict) else value
            yield from (entry for entry in entries if callable(entry) and self._is_users(entry))
            if text is not None:
                yield text
                return
        if _is_plain(value):
            yield value

    def _is_users(self, value: Any) -> bool:
        module = sys.modules.get(_module_of(value))
        known = module is not None and _is_users_file(module, self._home)
        return known or _module_of(value).partition(".")[0] == self._home


def _module_of(value: Any) -> str:
    kind = value if isinstance(value, type) or hasattr(value, "__code__") else type(value)
    if hasattr(value, "__wrapped__"):
        kind = value
    return getattr(kind, "__module__", None) or ""


def _is_users_file(module: types.ModuleType, home: str) -> bool:
    """Whether a module is neither Python's, nor installed, nor of this package."""
    top = module.__name__.partition(".")[0]
    if top == "robust_ssl":
        return False
    if top in (home, "__main__"):
        return True
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    return not any(pathlib.Path(file).is_relative_to(folder) for folder in _installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    package = importlib.import_module("robust_ssl").__path__[0]
    return (*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), package)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into a shell, or made by exec
        code = getattr(function, "__code__", None)
        if code is None:
            return _methods(function)
        return repr((code.co_code, code.co_names, _constants(code)))


def _methods(kind: Any) -> str:
    methods = {n: m for n, m in sorted(vars(kind).items()) if hasattr(m, "__code__")}
    return repr([(name, _source(method)) for name, method in methods.items()])


def _constants(code: types.CodeType) -> list[Any]:
    # A function within is a code object, whose repr has an address.
    inner = [c if not isinstance(c, types.CodeType) else c.co_code for c in code.co_consts]
    return [repr(constant) for constant in inner]


def _assignment(names: Mapping[str, Any], name: str) -> str | None:
    """Returns the lines of a module that give a name its value; None where there is no source."""
    module = sys.modules.get(names.get("__name__", ""))
    try:
        text = inspect.getsource(module)
        statements = ast.parse(text).body
    except (OSError, TypeError, SyntaxError):
        return None
    lines = []
    for statement in statements:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            lines.append(ast.get_source_segment(text, statement))
    return "\n".join(lines) or None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return (
        value is None
        or isinstance(value, bool | int | float | complex | str | bytes)
        or (hasattr(value, "dtype") and hasattr(value, "shape"))
    )


def _constant(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        with contextlib.suppress(Exception):  # a random key, an array that is gone
            import numpy as np

            array = np.asarray(value)
            return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _namespace(function: Callable[..., Any] | type) -> Mapping[str, Any]:
    """The names that a function or a class sees in its module."""
    if isinstance(function, type):
        methods = [value for value in vars(function).values() if hasattr(value, "__globals__")]
        module = sys.modules.get(function.__module__)
        return methods[0].__globals__ if methods else vars(module) if module else {}
    # Not by `sys.modules`: a file that is loaded anew is not the module of its first loading.
    return getattr(function, "__globals__", {})
