"""What source says without being run: of functions, of what a module holds, of what is imported."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import inspect
import os
import pathlib
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from robust_ssl.build import texts

# Where packages are installed, in this environment or in one that it builds on.
_OTHERS = {"site-packages", "dist-packages"}
_DEEPEST = 40  # wrappers within wrappers


def source_of(function: Any) -> str:
    """Returns the source that a function or a class was made from; without one, its compiled code.

    What its file says may be another by now.
    """
    made = inspect.unwrap(function)
    names = namespace_of(made)
    text = texts.text_of(names)
    functions = [made] if has_code(made) else texts.functions_in(getattr(made, "__dict__", {}))
    try:
        if text is None and not texts.agrees(functions, names):
            raise OSError("its file has changed since it was imported")
        with texts.shown(names.get("__file__", ""), text):
            return inspect.getsource(function)
    except (OSError, TypeError):  # typed into a shell, or made by exec
        if not has_code(function):
            return _methods(function)
        code = function.__code__
        return repr((code.co_code, code.co_names, _constants(code)))


def namespace_of(function: Callable[..., Any] | type) -> Mapping[str, Any]:
    """The names that a function or a class sees in its module."""
    # Not by `sys.modules`: a file that is loaded anew is not the module of its first loading.
    if not isinstance(function, type):
        return getattr(function, "__globals__", {})
    methods = [names for value in vars(function).values() for names in _namespaces(value)]
    own = [names for names in methods if names.get("__name__") == function.__module__]
    module = sys.modules.get(function.__module__)
    # What a library has written into a class, such as flax or `enum`, sees the library's names.
    by_name = [vars(module)] if getattr(module, "__file__", None) else []
    return [*own, *by_name, *methods, vars(module) if module else {}][0]


def _namespaces(member: Any) -> Iterator[Mapping[str, Any]]:
    """The names that a class's member sees, and those that each function within it sees."""
    for _ in range(_DEEPEST):
        if hasattr(member, "__globals__"):
            yield member.__globals__
        # Of functools.wraps, which flax uses, of properties, and of functools.cached_property.
        parts = (getattr(member, n, None) for n in ("__wrapped__", "__func__", "fget", "func"))
        member = next((part for part in parts if callable(part)), None)
        if member is None:
            return


def has_code(value: Any) -> bool:
    """Whether a value is compiled code by itself; Python's type of functions only seems so."""
    return isinstance(getattr(value, "__code__", None), types.CodeType)


def _methods(kind: Any) -> str:
    methods = {n: m for n, m in sorted(vars(kind).items()) if has_code(m)}
    return repr([(name, source_of(method)) for name, method in methods.items()])


def _constants(code: types.CodeType) -> list[Any]:
    # A function within is a code object, whose repr has an address.
    inner = [c if not isinstance(c, types.CodeType) else c.co_code for c in code.co_consts]
    # The order of a set of texts is another one in every process.
    return [repr(sorted(c, key=repr) if isinstance(c, frozenset) else c) for c in inner]


@functools.lru_cache(1024)  # most functions of a run are read once for every stage
def names_used(source: str) -> frozenset[str]:
    """Returns the names that source reads, with dots; those of annotations compute nothing.

    Example:
      >>> sorted(names_used("def f(x: Image): return scale.low * g(x).sum()"))
      ['g', 'scale.low', 'x']
    """
    try:
        nodes: list[Any] = [ast.parse(textwrap.dedent(source))]
    except SyntaxError:  # a lambda within a call
        return frozenset(words_of(source))
    names = set()
    while nodes:
        node = nodes.pop()
        name = _dotted(node)
        if name is not None and isinstance(node.ctx, ast.Load):
            names.add(name)
            continue
        for field, child in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                children = child if isinstance(child, list) else [child]
                nodes += [entry for entry in children if isinstance(entry, ast.AST)]
    return frozenset(names)


def words_of(source: str) -> set[str]:
    """Returns all that could be a name in a text, also of comments."""
    return set(re.findall(r"[A-Za-z_][\w.]*", source))


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return None


# --- What a module says -------------------------------------------------------------------------


def text_of_module(names: Mapping[str, Any]) -> str:
    """Returns the source of a module by its namespace; nothing where there is none."""
    text = texts.text_of(names)
    if text is not None:
        return texts.whole(text)
    try:
        return inspect.getsource(sys.modules.get(names.get("__name__", "")))
    except (OSError, TypeError):
        return ""


def assignment(names: Mapping[str, Any], name: str) -> str | None:
    """Returns the lines of a module that give a name its value; None where there is no source."""
    text = text_of_module(names)
    lines = []
    for statement in _statements(text):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            lines.append(ast.get_source_segment(text, statement))
    return "\n".join(lines) or None


def changes(names: Mapping[str, Any], name: str) -> str | None:
    """Returns the lines of a module that change what a name holds, as ``TABLE["a"] = 1`` does."""
    text = text_of_module(names)
    lines = [
        ast.get_source_segment(text, statement)
        for statement in _statements(text)
        if not _runs_as_script(statement) and _changes(statement, name)
    ]
    return "\n".join(lines) or None


@functools.lru_cache(64)
def _statements(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except SyntaxError:
        return []


def _runs_as_script(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _changes(statement: ast.AST, name: str) -> bool:
    """Whether a statement, or one in its blocks, calls with a name or assigns to its parts."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    if isinstance(statement, ast.Expr):
        return any(getattr(node, "id", None) == name for node in ast.walk(statement))
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    if any(_root(t) == name for t in targets if isinstance(t, ast.Attribute | ast.Subscript)):
        return True
    inner = (node for node in ast.iter_child_nodes(statement))
    blocks = (ast.stmt, ast.ExceptHandler, ast.match_case)
    return any(_changes(node, name) for node in inner if isinstance(node, blocks))


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return getattr(node, "id", None)


# --- What is imported ---------------------------------------------------------------------------


def imported(source: str, names: Mapping[str, Any], home: str) -> list[str]:
    """Returns the whole source of a user's modules that source imports, and of what they import.

    Whole, and from the file: what is imported within a function may be loaded or not.

    Args:
      source: Of a function.
      names: The namespace of its module.
      home: The top-level name of what is a user's own wherever it is installed.
    """
    package = names.get("__package__") or str(names.get("__name__", "")).rpartition(".")[0]
    found: dict[pathlib.Path, str] = {}
    waiting = list(imports_of(source, package))
    while waiting:
        name = waiting.pop(0)
        file = _file_of(name)
        if file is None or file in found or not is_users_file(name, file, home):
            continue
        found[file] = text = _text_of_file(name, file)
        inner = name if file.stem == "__init__" else name.rpartition(".")[0]
        waiting += imports_of(text, inner)
    return list(found.values())


@functools.lru_cache(1024)
def imports_of(source: str, package: str) -> tuple[str, ...]:
    """The modules that source may import: of ``from a import b`` both ``a`` and ``a.b``."""
    if "import" not in source:
        return ()
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:
        return ()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(dict.fromkeys(names))


def _file_of(name: str) -> pathlib.Path | None:
    """Where a module is; found as Python finds it, but nothing is run, its packages neither."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
        return pathlib.Path(file) if file else None
    spec, path = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        spec = _spec(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and end < len(parts):  # a function of a module, no module
            return None
    return pathlib.Path(spec.origin) if spec and spec.has_location else None


def _spec(name: str, path: Any) -> Any:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is None or type(finder).__module__ == "_distutils_hack":  # it imports setuptools
            continue
        with contextlib.suppress(Exception):  # others' finders may fail as they like
            spec = find(name, path)
            if spec is not None:
                return spec
    # A user's modules find those of the working directory too.
    return None if path else importlib.machinery.PathFinder.find_spec(name, [os.getcwd()])


def _text_of_file(name: str, file: pathlib.Path) -> str:
    loaded = texts.text_of(vars(sys.modules[name])) if name in sys.modules else None
    if loaded is not None:
        return loaded
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a compiled one
        return ""


def is_users_file(name: str, file: Any, home: str) -> bool:
    """Whether a module is neither Python's, nor installed, nor of this package."""
    top = name.partition(".")[0]
    if top == "robust_ssl":
        return False
    if top in (home, "__main__"):
        return True
    if file is None or _OTHERS & {*pathlib.Path(file).parts}:
        return False
    return not any(pathlib.Path(file).is_relative_to(folder) for folder in _installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    package = importlib.import_module("robust_ssl").__path__[0]
    return (*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), package)
