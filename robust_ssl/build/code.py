"""The source of a user's functions: an edited one is another one, whatever it is called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from robust_ssl.build import sources, values
from robust_ssl.build.entries import name_of
from robust_ssl.build.functions import names_function, resolve
from robust_ssl.build.renewal import as_loaded
from robust_ssl.build.sources import has_code, source_of

_DEEPEST = 40  # functions that call functions; a loop ends by itself


def code_of(value: Any) -> dict[str, str]:
    """Returns a digest of the source of every function outside this package that a value has.

    An edited function is another function, whatever it is called; so a resumed run must notice.
    With a function come the functions, classes and constants of the user's that it uses, also
    those of other files, what a closure or a partial has bound, and the fields of an object.
    Of a list, dict or set, which may be filled while running, the lines that make it count.

    Nothing is imported.  A module that is imported within a function counts as a whole, with the
    user's modules that it imports.  So does a module that holds something which is used and cannot
    be followed, such as a random generator or an optimizer.

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
            with as_loaded():  # what runs is digested, not what a file says by now
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
        self._defaults: set[int] = set()  # constants that were met where source says them too
        self._met: set[tuple[int, str]] = set()  # names that were followed, by their namespace
        self._home = _module_of(_written(function)).partition(".")[0]
        self._follow(function, 0)

    def read(self) -> list[str]:
        """Returns the texts in the order in which they were met."""
        return list(self._parts.values())

    def _follow(self, value: Any, depth: int, *, once: bool = False) -> None:
        """Reads a value; `once` leaves out a constant that was met, since source says it too."""
        if once and not isinstance(value, tuple):
            self._defaults.add(id(value))
        if depth > _DEEPEST or (id(value) in self._parts and (once or not _repeats(value))):
            return
        if isinstance(value, functools.partial):
            self._note(value, "partial")
            for part in (value.func, value.args, value.keywords):
                self._follow(part, depth + 1)
        elif isinstance(value, Mapping):
            self._note(value, "mapping")
            for name, entry in value.items():
                self._note(object(), repr(name))
                self._follow(entry, depth + 1, once=once)
        elif isinstance(value, list | tuple | set | frozenset):
            self._note(value, type(value).__name__)
            is_set = isinstance(value, set | frozenset)
            for entry in values.in_order(value) if is_set else value:
                self._follow(entry, depth + 1, once=once)
                if isinstance(entry, list | tuple) and not once:
                    self._note(object(), "end")  # else ((1, 2), 3) were ((1,), 2, 3)
        elif isinstance(value, types.MethodType):
            self._follow(value.__func__, depth + 1)
            self._follow(value.__self__, depth + 1)
        elif isinstance(value, type) or has_code(value):
            self._read_source(value, depth)
        elif hasattr(value, "__wrapped__"):  # of functools.cache, jax.jit
            self._follow(value.__wrapped__, depth + 1)
            self._follow_attributes(value, depth)
        else:
            self._read_object(value, depth)

    def _note(self, value: Any, text: str) -> None:
        value = object() if id(value) in self._parts else value
        self._kept.append(value)
        self._parts[id(value)] = text

    def _read_object(self, value: Any, depth: int) -> None:
        if not self._is_users(type(value)):
            self._note(value, values.constant(value))
            with contextlib.suppress(values.UnknownValueError, RecursionError):
                for item in list(values.describe(value, self._is_users)):
                    if not isinstance(item, str):
                        self._follow(item, depth + 1)
            return
        state = values.state_of(value)
        has_set = any(isinstance(entry, set | frozenset) for entry in state.values())
        # The repr of a set is another one in every process.
        self._note(value, name_of(type(value)) if has_set else values.constant(value))
        self._follow(type(value), depth + 1)
        self._follow(state, depth + 1, once=dataclasses.is_dataclass(value))

    def _follow_attributes(self, function: Any, depth: int) -> None:
        """Reads the functions that a function has been given, as by ``f.defvjp(fwd, bwd)``."""
        for name, value in getattr(function, "__dict__", {}).items():
            if not name.startswith("__") and callable(value):
                for item in self._described({}, name, value):
                    self._follow(item, depth + 1)

    def _read_source(self, function: Any, depth: int) -> None:
        source = source_of(function)
        self._note(function, source)
        if hasattr(function, "__wrapped__"):  # beside its wrapper, which may be the user's too
            self._follow(function.__wrapped__, depth + 1)
        names = sources.namespace_of(function)
        # What a library's wrapper has bound is its own business, such as axes twice.
        once = not self._is_users_module(names.get("__name__") or "")
        bound = function if has_code(function) else None  # Python's type of functions has neither
        for cell in getattr(bound, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                self._follow(cell.cell_contents, depth + 1, once=once)
        self._follow(getattr(bound, "__defaults__", None) or (), depth + 1, once=True)
        if isinstance(function, type):
            for base in function.__bases__:
                if self._is_users(base):
                    self._follow(base, depth + 1)
        else:
            self._follow_attributes(function, depth)
        for value in self._used(source, names):
            self._follow(value, depth + 1)
        for text in sources.imported(source, names, self._home):
            self._follow(text, depth + 1)

    def _used(self, source: str, names: Mapping[str, Any]) -> Iterator[Any]:
        """Yields what source uses of the user's, of a module with these names."""
        used = sources.names_used(source)
        for path in sorted(used | sources.words_of(source)):
            yield from self._users(names, path.split("."), path in used)

    def _users(self, names: Mapping[str, Any], path: list[str], used: bool) -> Iterator[Any]:
        """What a dotted name means, if it is the user's own: a function, a class, a constant.

        A word of a comment is taken for a name too; `used` says that it is none.
        """
        if path[0] not in names:
            return
        holder, name, value = names, path[0], names[path[0]]
        for attribute in path[1:]:
            if not self._is_users_module(value):
                break
            holder, name = vars(value), attribute
            value = holder.get(attribute)
        if (id(holder), name) in self._met:
            return
        if isinstance(value, types.ModuleType):
            if used and self._is_users_module(value):  # and not what of it
                self._met.add((id(holder), name))
                yield sources.text_of_module(vars(value))
        elif isinstance(value, type) or callable(value):
            own_name = getattr(value, "__name__", None) == name
            if own_name or not used:
                yield from [value] if self._is_users(value) else ()
                return
            self._met.add((id(holder), name))
            is_users = self._is_users(value)
            yield from (
                self._once_more(value) if is_users else self._described(holder, name, value)
            )
        elif not path[0].startswith("__"):
            self._met.add((id(holder), name))
            yield from self._of_constant(holder, name, value, holder is names, used)

    def _of_constant(
        self, names: Mapping[str, Any], name: str, value: Any, is_own: bool, used: bool
    ) -> Iterator[Any]:
        plain = values.is_plain(value)
        if isinstance(value, list | dict | set):  # perhaps filled while running, as a cache is
            yield from self._functions_in(value)
            text = sources.assignment(names, name) if is_own or not plain else None
            if text is not None:
                yield from self._of_lines(names, name, text)
                return
        if plain:
            if self._defaults != {id(value)}:  # else it is surely what the default says
                yield value
            if self._is_users(type(value)):
                yield type(value)
        elif used:
            yield from self._described(names, name, value)

    def _of_lines(self, names: Mapping[str, Any], name: str, text: str) -> Iterator[Any]:
        """Yields the lines that make what a name holds, and what they use."""
        yield text
        changes = sources.changes(names, name)
        if changes is not None:
            yield changes
        yield from self._used(f"{text}\n{changes or ''}", names)

    def _described(self, names: Mapping[str, Any], name: str, value: Any) -> Iterator[Any]:
        """Yields the parts of a value, or all of the module that holds it."""
        try:
            items = list(values.describe(value, self._is_users))
        except (values.UnknownValueError, RecursionError):
            yield sources.text_of_module(names)
            yield from self._used(sources.assignment(names, name) or "", names)
            return
        if len(items) == 1:
            yield from items
            return
        for item in items:
            yield from [item] if isinstance(item, str) else self._once_more(item)

    def _once_more(self, function: Any) -> Iterator[Any]:
        """Yields a function, or of one that was met which it is: its place tells something."""
        if id(function) in self._parts:
            yield f"again {list(self._parts).index(id(function))}"
        else:
            yield function

    def _functions_in(self, value: Any, above: tuple[int, ...] = ()) -> Iterator[Any]:
        if isinstance(value, list | tuple | dict | set | frozenset) and id(value) not in above:
            entries = value.values() if isinstance(value, dict) else value
            entries = values.in_order(value) if isinstance(value, set | frozenset) else entries
            for entry in entries:
                yield from self._functions_in(entry, (*above, id(value)))
        elif callable(value) and self._is_users(value):
            yield value

    def _is_users(self, value: Any) -> bool:
        name = _module_of(value)
        if name in sys.modules or not (isinstance(value, type) or has_code(value)):
            return self._is_users_module(name)
        # Of a module that was loaded again without it.
        file = sources.namespace_of(value).get("__file__")
        return sources.is_users_file(name, file, self._home)

    def _is_users_module(self, module: Any) -> bool:
        if isinstance(module, str):
            if module.partition(".")[0] == self._home:
                return True
            module = sys.modules.get(module)
        if not isinstance(module, types.ModuleType):
            return False
        file = getattr(module, "__file__", None)
        return sources.is_users_file(module.__name__, file, self._home)


def _written(value: Any) -> Any:
    """Returns the base that somebody wrote, of a class that a library made, as `nn.remat` does."""
    plain = isinstance(value, type) or has_code(value) or hasattr(value, "__wrapped__")
    kind = value if plain else type(value)
    for base in kind.__mro__ if isinstance(kind, type) else ():
        outer, _, inner = base.__qualname__.partition(".")
        if "<locals>" in inner or hasattr(sys.modules.get(base.__module__), outer):
            return base
    return value


def _repeats(value: Any) -> bool:
    """Whether a value may stand in several places, of which each can be edited by itself."""
    empty = isinstance(value, tuple) and not value  # as of most defaults
    return values.is_plain(value) and not empty


def _module_of(value: Any) -> str:
    kind = value if isinstance(value, type) or has_code(value) else type(value)
    if hasattr(value, "__wrapped__"):
        kind = value
    return getattr(kind, "__module__", None) or ""
