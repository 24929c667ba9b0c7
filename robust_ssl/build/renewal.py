"""A user's module whose file has changed is loaded again, with those that import it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import pathlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from robust_ssl.build import sources, texts

_log = logging.getLogger(__name__)
_held: list[bool] = []  # one for each run under way


@contextlib.contextmanager
def as_loaded() -> Iterator[None]:
    """Takes modules as they are loaded: whoever edits one during a run edits the next run."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()


@contextlib.contextmanager
def renewing(module: types.ModuleType | None) -> Iterator[bool]:
    """Has a module loaded anew inside, with all it imports, where a file of theirs has changed.

    Those that are loaded stay as they were for whoever holds them; a fresh import makes others.

    Args:
      module: As it is loaded; None where it is not.

    Yields:
      Whether it is to be loaded.
    """
    stale, changed = _stale(module) if module is not None else ([], [])
    names = {name: m for m in stale for name in _names_of(m)}
    for name, old in names.items():
        _take_out(name)
        # Of an edit within the second of the last import Python would take the old bytecode.
        with contextlib.suppress(OSError, TypeError, NotImplementedError):
            pathlib.Path(importlib.util.cache_from_source(str(old.__file__))).unlink()
    files = ", ".join(str(m.__file__) for m in changed)
    try:
        yield module is None or module in stale
    except BaseException as error:
        for name, old in names.items():
            _put_back(name, old)
        if stale:
            error.add_note(f"{files} changed since it was loaded: mend it, or restart Python")
        raise
    if stale:
        more = sorted({m.__name__ for m in stale if m not in changed})
        _log.warning(
            "%s changed: loaded again%s", files, f", with {', '.join(more)}" if more else ""
        )


def note(module: types.ModuleType, text: str | None = None) -> None:
    """Keeps what a module and those that it imports were loaded from.

    Args:
      module: Just loaded, or found as its file says.
      text: What it was made from; None is what its file says.
    """
    for each in _with_imports(module):
        if texts.record_of(vars(each)) is None:
            own = text if each is module and text is not None else texts.read(each.__file__)
            if own is not None:
                texts.keep(vars(each), own, _imported_by(each))


def _take_out(name: str) -> None:
    module, (package, _, own) = sys.modules.pop(name), name.rpartition(".")
    if getattr(sys.modules.get(package), own, None) is module:  # else `from package import own`
        delattr(sys.modules[package], own)


def _put_back(name: str, module: types.ModuleType) -> None:
    package, _, own = name.rpartition(".")
    sys.modules[name] = module
    if package in sys.modules:
        setattr(sys.modules[package], own, module)


def _stale(module: types.ModuleType) -> tuple[list[types.ModuleType], list[types.ModuleType]]:
    """Returns the modules to load anew, the given one among them, and which of them changed."""
    if _held:
        return [], []
    modules = _with_imports(module)
    changed = [m for m in modules if _differs(m)]
    stale = list(changed)
    grown = bool(stale)
    while grown:
        above = [
            m
            for m in modules
            if m not in stale and any(i in stale for i in _imported_by(m).values())
        ]
        # A package that is made anew would not have its modules.
        packages = tuple(f"{m.__name__}." for m in stale if hasattr(m, "__path__"))
        inner = [m for name, m in list(sys.modules.items()) if name.startswith(packages or "\0")]
        grown = bool(new := [*above, *(m for m in inner if m not in stale and m not in above)])
        stale += new
    return (stale, changed) if module in stale else ([], [])


def _differs(module: types.ModuleType) -> bool:
    """Whether a module is not what its file says, or holds another than the loaded one."""
    record, text = texts.record_of(vars(module)), texts.read(module.__file__)
    if text is None:
        return False
    if record is None:
        return texts.is_edited(vars(module))
    return record.text != text or any(
        sys.modules.get(name) is not loaded or loaded.__spec__ is not spec
        for name, (loaded, spec) in record.imports.items()
    )


def _with_imports(module: types.ModuleType) -> list[types.ModuleType]:
    """Returns a module and the user's modules that it imports, directly or not."""
    modules, waiting = [], [module]
    while waiting:
        each = waiting.pop()
        if each not in modules and _is_users(each):
            modules.append(each)
            waiting += _imported_by(each).values()
    return modules


def _imported_by(module: types.ModuleType) -> dict[str, types.ModuleType]:
    """Returns the user's loaded modules that a module imports, by name."""
    names: Mapping[str, Any] = vars(module)
    text = texts.text_of(names) or texts.read(module.__file__) or ""
    package = names.get("__package__") or module.__name__.rpartition(".")[0]
    loaded = {name: sys.modules.get(name) for name in sources.imports_of(text, package)}
    return {n: m for n, m in loaded.items() if m is not None and m is not module and _is_users(m)}


def _is_users(module: Any) -> bool:
    file, name = getattr(module, "__file__", None), getattr(module, "__name__", "__main__")
    is_source = str(file).endswith(".py") and name != "__main__"
    return is_source and sources.is_users_file(name, file, "")


def _names_of(module: types.ModuleType) -> list[str]:
    return [name for name, loaded in list(sys.modules.items()) if loaded is module]
