"""What a config names becomes a value: ``"module:function"``, alone or with options."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any


def resolve(name: str | Callable) -> Callable:
    """Turns ``"module:function"`` into the function.

    Args:
      name: ``"my_losses:tilted"`` (an installed module, or ``my_losses.py`` in the working
        directory), ``"path/to/file.py:tilted"``, ``"__main__:tilted"`` (a notebook cell), or a
        callable, which is returned as it is.

    Returns:
      The callable.

    Raises:
      ValueError: If the module or the function is missing (with near names), the name has no
        colon, or what it names cannot be called.

    Example:
      >>> resolve("robust_ssl.losses:trades_kl").__name__
      'trades_kl'
    """
    if callable(name):
        return name
    module_name, colon, attribute = str(name).rpartition(":")
    if not (colon and module_name and attribute):
        raise ValueError(
            f'{name!r} names no function: write "module:function" or "path/to/file.py:function"'
        )
    module = _import(module_name, name)
    function = getattr(module, attribute, None)
    if function is None:
        known = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(attribute, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name!r}: {module_name} has no function {attribute!r}{hint}")
    if not callable(function):
        raise ValueError(f"{name!r} is a {type(function).__name__}, not a function")
    return function


def _import(module_name: str, name: str) -> Any:
    if module_name == "__main__":
        return sys.modules["__main__"]
    if module_name.endswith(".py"):
        return _load_file(pathlib.Path(module_name), name)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but fails to import something else must say so itself.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
    beside = pathlib.Path(*module_name.split(".")).with_suffix(".py")
    if beside.is_file():
        return _load_file(beside, name)
    raise ValueError(
        f"{name!r}: there is no module {module_name!r}, neither installed nor as {beside} in "
        f"{pathlib.Path.cwd()}"
    )


def _load_file(path: pathlib.Path, name: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{name!r}: there is no file {path} (from {pathlib.Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are being made.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
