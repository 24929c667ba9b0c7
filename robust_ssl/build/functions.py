"""``"module:function"``, alone or with options: the one way a config names what is called."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robust_ssl import working_directory
from robust_ssl.build import renewal, texts
from robust_ssl.build.entries import inside, name_of, near
from robust_ssl.build.options import limited, may_be_function, read_option

_files: dict[pathlib.Path, types.ModuleType] = {}  # those that are named by their path


def resolve(name: str | Callable) -> Callable:
    """Turns ``"module:function"`` into the function.

    A module of the user's whose file has changed is loaded again, with all it imports.

    Args:
      name: ``"my_losses:tilted"`` (an installed module, else ``my_losses.py`` in the working
        directory), ``"path/to/file.py:tilted"``, ``"__main__:tilted"`` (a notebook cell), or a
        callable, which is returned as it is.

    Returns:
      The callable.

    Raises:
      ValueError: If the module or the function is missing (with near names), the name has no
        colon, or what it names cannot be called.
      Exception: What a module raises while it is loaded.

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
        close = difflib.get_close_matches(attribute, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"{name!r}: {module_name} has no function {attribute!r}{hint}"
            f"{working_directory.passed_over(module)}"
        )
    if not callable(function):
        raise ValueError(f"{name!r} is a {type(function).__name__}, not a function")
    return function


def _import(module_name: str, name: str) -> Any:
    if module_name == "__main__":
        return sys.modules["__main__"]
    if module_name.endswith(".py"):
        return _load_file(pathlib.Path(module_name), name)
    working_directory.find_modules()
    try:
        with renewal.renewing(sys.modules.get(module_name)):
            module = importlib.import_module(module_name)
        renewal.note(module)
        return module
    except ModuleNotFoundError as error:
        # A module that exists but fails to import something else must say so itself.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
    file = pathlib.Path(*module_name.split(".")).with_suffix(".py")
    raise ValueError(
        f"{name!r}: there is no module {module_name!r}, neither installed nor as {file} in "
        f"{pathlib.Path.cwd()}{_near_modules(module_name)}"
    )


def _near_modules(name: str) -> str:
    """Says which modules have nearly this name, of those in its package and of this one's."""
    packages = [importlib.import_module("robust_ssl")]
    with contextlib.suppress(ImportError, ValueError):
        packages.append(importlib.import_module(name.rpartition(".")[0]))
    known = {package.__name__ for package in packages}
    for package in packages:
        modules = pkgutil.walk_packages if package is packages[0] else pkgutil.iter_modules
        paths = getattr(package, "__path__", ())
        known |= {module.name for module in modules(paths, f"{package.__name__}.")}
    close = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _load_file(path: pathlib.Path, name: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{name!r}: there is no file {path} (from {pathlib.Path.cwd()})")
    place = path.resolve()
    with renewal.renewing(_files.get(place)) as is_new:
        if is_new:
            _files[place] = _run_file(path)
    renewal.note(_files[place])
    return _files[place]


def _run_file(path: pathlib.Path) -> types.ModuleType:
    module_name = working_directory.own_name(path)
    working_directory.trust(module_name)
    spec: Any = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are being made.
    sys.modules.setdefault(module_name, module)
    text = texts.read(spec.origin)
    if text is None:
        spec.loader.exec_module(module)  # says what is wrong with it
    else:  # and no bytecode of before
        exec(compile(text, spec.origin, "exec", dont_inherit=True), vars(module))
    renewal.note(module, text)
    return module


@dataclasses.dataclass(frozen=True)
class Function:
    """A function with options, as a config names it.

    Attributes:
      function: What it names.
      options: Its keyword arguments; what is itself a function with options is a `Function`.
      text: What the config said, plain JSON values.

    Example:
      >>> levels = Function.read({"function": "robust_ssl.models:Quantize", "levels": 2}, "here")
      >>> levels()
      Quantize(levels=2, straight_through=True)
    """

    function: Callable[..., Any]
    options: Mapping[str, Any]
    text: Any

    @classmethod
    def read(cls, value: Any, where: str, others: Sequence[str] = ()) -> Function:
        """Reads ``{"function": "module:name", **options}``, or the bare name without options.

        Args:
          value: The text, or a callable.
          where: The entry's name, for errors.
          others: Entries beside the options, which the caller reads: near names, too.

        Raises:
          ValueError: If there is no such function, or it does not take an option, or the option is
            of another kind or out of range.
        """
        entries = {"function": value} if isinstance(value, str) or callable(value) else value
        if not isinstance(entries, Mapping) or "function" not in entries:
            raise ValueError(
                f'{where} must be "module:function" or {{"function": "module:function", '
                f"**options}}, got {value!r}"
            )
        name, place = entries["function"], where if entries is not value else f"{where}.function"
        if not (isinstance(name, str) or callable(name)):
            raise ValueError(f'{place} must be "module:function", got {name!r}')
        with inside(place):
            function = resolve(name)
        options = {str(name): entry for name, entry in entries.items() if name != "function"}
        return cls(function, _read_options(function, options, where, others), value)

    def __call__(self, *arguments: Any) -> Any:
        """Calls it on these arguments and its options.

        Raises:
          ValueError: If it does not take them.
        """
        try:
            inspect.signature(self.function).bind(*arguments, **self.bound_options)
        except TypeError as error:
            raise ValueError(f"{name_of(self.function)} does not take that: {error}") from error
        return self.function(*arguments, **self.bound_options)

    @functools.cached_property
    def bound_options(self) -> dict[str, Any]:
        """The options as values: functions among them with their own options set."""
        return {
            name: option.bound if isinstance(option, Function) else option
            for name, option in self.options.items()
        }

    @functools.cached_property
    def bound(self) -> Callable[..., Any]:
        """The function with its options set, the function itself where there are none."""
        # Made once: to the compiler two equal partials are two functions.
        if not self.options:
            return self.function
        return functools.partial(self.function, **self.bound_options)

    def takes(self, name: str) -> bool:
        """Whether it has an option of this name."""
        parameters, _ = _parameters(self.function)
        return parameters is not None and name in parameters

    def with_defaults(self, **values: Any) -> Function:
        """Returns it with those of the options that it takes and was not given."""
        lacking = {n: v for n, v in values.items() if n not in self.options and self.takes(n)}
        return dataclasses.replace(self, options={**self.options, **lacking}) if lacking else self

    def without(self, *names: str) -> Function:
        """Returns it without some of its options."""
        left = {name: option for name, option in self.options.items() if name not in names}
        return dataclasses.replace(self, options=left)


def names_function(value: Any) -> bool:
    """Whether a text reads as ``"module:function"``."""
    # "hf:name" is a data set of the Hugging Face hub.
    return isinstance(value, str) and bool(re.fullmatch(r"(?!hf:)[\w./~-]+:[A-Za-z_]\w*", value))


def _read_options(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, others: Sequence[str]
) -> dict[str, Any]:
    defaults, hints = _parameters(function)
    of_package = getattr(function, "__module__", "").partition(".")[0] == "robust_ssl"
    taken = {}
    for name, value in options.items():
        entry = f"{where}.{name}"
        if defaults is not None and name not in defaults:
            raise ValueError(
                f"{entry}: {name_of(function)} takes no option {name!r}"
                f"{near(name, [*defaults, *others])}"
            )
        hint, default = hints.get(name, Any), (defaults or {}).get(name, inspect.Parameter.empty)
        given = callable(value) and not isinstance(value, Function)  # as in Python, not in a file
        named = names_function(value) or (isinstance(value, Mapping) and "function" in value)
        if (given or named) and may_be_function(hint, default):
            taken[name] = Function.read(value, entry)
        else:
            taken[name] = read_option(value, hint, default, entry)
            if of_package:
                taken[name] = limited(taken[name], name, entry)
    return taken


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The options a function takes by name, with their defaults, and their annotations.

    None in place of the options, where it takes any.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of C have none
        return None, {}
    parameters = signature.parameters.values()
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        if isinstance(function, type):
            hints = {**typing.get_type_hints(function.__init__, include_extras=True), **hints}
    except Exception:  # a name that only type checkers see
        hints = {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None, hints
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in parameters if p.kind in by_name}, hints
