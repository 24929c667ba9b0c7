"""Modules of the working directory, found for configs and a user's own modules only.

The working directory is never on `sys.path`: it may be a folder of downloads, where a ``flax.py``
beside the weights would run in place of the installed one.  A library that tries whether ``torch``
is installed must not find a ``torch.py`` there either.  So a finder at the end of the line looks at
who imports.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

RESOLVER = "robust_ssl.build.functions"  # imports nothing but what a config names

_users: set[str] = set()  # top-level names of configs and of what was found for them


def trust(name: str) -> None:
    """Lets a module import others of the working directory.

    Args:
      name: Of a config, or of a module that a config names.
    """
    _users.add(name.partition(".")[0])
    find_modules()


def find_modules() -> None:
    """Has modules of the working directory found from now on."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)  # last: what is installed is never shadowed


def own_name(file: pathlib.Path) -> str:
    """Returns the name of a file as a module: its stem, unless an installed module is called so."""
    name = file.stem
    if name in _users or not name.isidentifier():
        return name
    spec = getattr(sys.modules.get(name), "__spec__", None)
    spec = spec or importlib.machinery.PathFinder.find_spec(name)
    taken = spec is not None or name in sys.modules or name in sys.builtin_module_names
    # A user's losses/optax.py must not become what `import optax` gives.
    return f"file_{name}" if taken and not _is_file(spec, file) else name


def passed_over(module: Any) -> str:
    """Returns what to say where an installed module stands for one of the working directory."""
    file = pathlib.Path(*module.__name__.split(".")).with_suffix(".py")
    spec = getattr(module, "__spec__", None)
    if not file.is_file() or spec is None or _is_file(spec, file):
        return ""
    return f"; it is the installed {spec.origin}: for {file} of this folder write './{file}:...'"


def _is_file(spec: Any, file: pathlib.Path) -> bool:
    origin = getattr(spec, "origin", None)
    return origin is not None and pathlib.Path(origin).resolve() == file.resolve()


class _Finder:
    """Finds a module of the working directory if a user's module, or a config, imports it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """As importlib asks for it; None says that it is not here."""
        importer = _importer()
        # With a path, a package says where its modules are.
        if path is not None or not (importer == RESOLVER or importer.partition(".")[0] in _users):
            return None
        importlib.invalidate_caches()  # a notebook may have written the file a moment ago
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, [os.getcwd()])
        except OSError:  # the working directory is gone
            return None
        if spec is not None:
            trust(name)
        return spec


_FINDER = _Finder()


def _importer() -> str:
    """Returns the name of the module in which an import stands."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] != "importlib" and "<frozen importlib" not in (
            frame.f_code.co_filename
        ):
            return name
        frame = frame.f_back
    return ""
