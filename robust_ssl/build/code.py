"""The source of a user's functions: an edited one is another one, whatever it is called."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from robust_ssl.build.functions import names_function, resolve


def code_of(text: Any) -> dict[str, str]:
    """Returns a digest of the source of every function outside this package that a text names.

    An edited function is another function, whatever it is called; so a resumed run must notice.

    Args:
      text: Plain JSON values.

    Returns:
      ``"module:function"`` to digest; a function whose source cannot be read is left out.
    """
    names = sorted({name for name in _texts(text) if names_function(name)})
    digests = {}
    for name in names:
        if name.startswith("robust_ssl"):
            continue
        with contextlib.suppress(ValueError, OSError, TypeError):
            sources = _sources(resolve(name), {})
            digests[name] = hashlib.sha256("\n".join(sources.values()).encode()).hexdigest()[:16]
    return digests


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _sources(function: Any, known: dict[str, str]) -> dict[str, str]:
    """Adds the source of a function, and of what it uses of its own module, to those `known`."""
    function = inspect.unwrap(function)
    name = getattr(function, "__qualname__", "")
    if name in known:
        return known
    known[name] = inspect.getsource(function)
    names = _namespace(function)
    used = set(re.findall(r"[A-Za-z_]\w*", known[name]))
    for other in sorted(used - {name}):
        value = names.get(other)
        beside = getattr(value, "__module__", None) == function.__module__
        if beside and (hasattr(value, "__code__") or isinstance(value, type)):
            _sources(value, known)
        elif isinstance(value, int | float | str):
            known[other] = repr(value)
    return known


def _namespace(function: Any) -> Mapping[str, Any]:
    """The names that a function or a class sees in its module."""
    if isinstance(function, type):
        methods = [value for value in vars(function).values() if hasattr(value, "__globals__")]
        return methods[0].__globals__ if methods else vars(sys.modules[function.__module__])
    # Not by `sys.modules`: a file that is loaded anew is not the module of its first loading.
    return getattr(function, "__globals__", {})
