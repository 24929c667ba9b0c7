"""The configs that come with the package, by name: ``quickstart``, ``gen_af``, ``compare``, ...

They lie in ``configs/`` at the top of a checkout and in ``robust_ssl/configs/`` of a wheel.  They
are read as files there and as files here, so that a copy of one is a config like any other.
"""

from __future__ import annotations

import ast
import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parent


def configs() -> dict[str, pathlib.Path]:
    """Returns the file of every shipped config, by name.

    Example:
      >>> "quickstart" in configs(), "common" in configs()
      (True, False)
    """
    # What defines no config is what the others load.
    files = {file: _functions(file) for file in sorted(_folder().glob("*.py"))}
    return {file.stem: file for file, functions in files.items() if "get_config" in functions}


def loaded_beside(file: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that a config loads beside itself, and those that they load.

    Example:
      >>> [file.name for file in loaded_beside(configs()["analyze"])]
      ['gen_af.py', 'common.py']
    """
    files: list[pathlib.Path] = []
    waiting = [file]
    while waiting:
        for name in _names_beside(waiting.pop()):
            other = file.with_name(f"{name}.py")
            if other not in (file, *files):
                files.append(other)
                waiting.append(other)
    return files


def summary(file: pathlib.Path) -> str:
    """Returns the first line of a file's docstring."""
    text = ast.get_docstring(_tree(file)) or "(no docstring)"
    return text.splitlines()[0]


def _folder() -> pathlib.Path:
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def _tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _functions(file: pathlib.Path) -> set[str]:
    return {node.name for node in _tree(file).body if isinstance(node, ast.FunctionDef)}


def _names_beside(file: pathlib.Path) -> list[str]:
    """Returns the names in calls of ``settings.load_beside(__file__, NAME)``."""
    names = []
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.Call) or len(node.args) != 2:
            continue
        function, name = node.func, node.args[1]
        called = getattr(function, "id", getattr(function, "attr", None))
        if called == "load_beside" and isinstance(name, ast.Constant):
            names.append(name.value)
    return names
