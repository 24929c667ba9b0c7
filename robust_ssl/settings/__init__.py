"""Config files and what is typed over them: fractions, checked overrides, plain JSON."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from robust_ssl import disk, shipped, working_directory

_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?"
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
# Values without other words than these: numbers, lists, mappings of quoted names.
_PLAIN = re.compile(
    rf"(?:(?:{_QUOTED})(?:\s*:)?|None|True|False|[\d\s.,/e+(){{}}\[\]-])+", re.IGNORECASE
)
_QUOTED_OR_FRACTION = re.compile(
    rf"({_QUOTED})|(?<![\w./]){_NUMBER}/{_NUMBER}(?![\w./])", re.IGNORECASE
)
_MOST_CONFIG = 2**24  # bytes of a config file
FUNCTION = re.compile(r"[\w./-]+:[A-Za-z_]\w*")


class SettingsError(ValueError):
    """A config file, an argument of one, or an override that cannot be used."""


def parse_fraction(text: str) -> float:
    """Returns the number a text such as ``"8/255"`` or ``"0.03"`` stands for.

    Raises:
      SettingsError: If it is neither a number nor one number over another.

    Example:
      >>> parse_fraction("8/255") == 8 / 255
      True
    """
    try:
        over, slash, under = text.partition("/")
        value = float(over) / float(under) if slash else float(over)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise SettingsError(f"{text!r} is no number; write for example 0.03 or 8/255")
    return value


def expand_fractions(argv: Iterable[str]) -> list[str]:
    """Replaces fractions of numbers in ``--config.KEY=VALUE`` by decimal numbers.

    Only values made of numbers, brackets, commas and quoted texts are touched, and no text
    between quotes, so names with a slash stay.

    Example:
      >>> expand_fractions(["--config.epsilon=1/4", "--config.epsilons=(1/4, 1/2)", "a=1/4"])
      ['--config.epsilon=0.25', '--config.epsilons=(0.25, 0.5)', 'a=1/4']
      >>> expand_fractions(["--config.grid=(('a.b', (1/4, 'a/b')),)"])
      ["--config.grid=(('a.b', (0.25, 'a/b')),)"]
    """
    expanded = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--config.") and equals and _PLAIN.fullmatch(value):
            value = _QUOTED_OR_FRACTION.sub(
                lambda match: match[1] or repr(parse_fraction(match[0])), value
            )
        expanded.append(name + equals + value)
    return expanded


def parse_arguments(text: str | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what follows the colon in ``gen_af:downstream=cifar10,epsilon=10/255``.

    Args:
      text: ``name=value`` pairs between commas; None or empty for the defaults.
      defaults: Every known name with its default, whose type the value is read as.

    Returns:
      The defaults with what was given in their place.

    Raises:
      SettingsError: If a name is not known, given twice, or its value is of another type.

    Example:
      >>> parse_arguments("epsilon=1/4", {"downstream": "cifar10", "epsilon": 0.1})
      {'downstream': 'cifar10', 'epsilon': 0.25}
    """
    given: dict[str, Any] = {}
    for pair in filter(None, (text or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise SettingsError(f"{pair!r} is no name=value; known names: {', '.join(defaults)}")
        if name not in defaults:
            raise SettingsError(f"unknown argument {name!r}{near(name, defaults)}")
        if name in given:
            raise SettingsError(f"argument {name!r} is given twice")
        given[name] = _like(name, value, defaults[name])
    return {**defaults, **given}


def _like(name: str, value: str, default: Any) -> Any:
    """Reads a value as the type of its default."""
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise SettingsError(f"{name}={value}: write true or false")
        return value.lower() == "true"
    if isinstance(default, int):
        try:
            return int(value)
        except ValueError:
            raise SettingsError(f"{name}={value}: must be a whole number") from None
    if isinstance(default, float):
        try:
            return parse_fraction(value)
        except SettingsError as error:
            raise SettingsError(f"{name}={value}: {error}") from None
    return value


def _unshared(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """Copies a config so that what a file uses in two places is not changed in both by one."""
    copy, values = config_dict.ConfigDict(), dict(config.items(preserve_field_references=True))
    for name in _as_written(config):
        value = values[name]
        copy[name] = _unshared(value) if isinstance(value, config_dict.ConfigDict) else value
    return copy


def _as_written(config: Mapping[str, Any] | config_dict.ConfigDict) -> list[str]:
    """Returns the names of a section in the order in which they were given, not sorted."""
    return list(getattr(config, "_fields", config))


def load_config(path_with_arguments: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
    """Loads a config file and applies what the command line says over it.

    Args:
      path_with_arguments: ``gen_af`` or ``gen_af:downstream=gtsrb32`` for a shipped config; a
        text that ends in ``.py`` or has a slash is a file, ``mine.py:downstream=gtsrb32``.  The
        file defines ``get_config()`` or ``get_config(text)``, and gets what follows the colon.
      overrides: ``--config.KEY=VALUE`` texts, with the meaning of `ml_collections.config_flags`:
        a value that is there keeps its type, and fractions may be written as such.  A key that is
        not there is added: `experiment.plan` refuses what means nothing.  A single loss or rate of
        a recipe leaves the others that its function gives.

    Returns:
      The config.  It may be added to, as a config file may: `experiment.plan` refuses what means
      nothing, with near names.

    Raises:
      SettingsError: If there is no such file, it fails, or a value does not fit.
    """
    drive, rest = os.path.splitdrive(path_with_arguments)
    path, colon, text = rest.partition(":")
    path = drive + path
    config = _get_config(path, (text,) if colon else ())
    if not isinstance(config, config_dict.ConfigDict):
        raise SettingsError(
            f"get_config in {path} returned a {type(config).__name__}, not a ConfigDict"
        )
    from robust_ssl.settings import overrides as given

    config = _unshared(config)
    given.apply(config, expand_fractions(overrides))
    return config.unlock()  # `config_flags` has locked it


def load_beside(file: str, name: str) -> Any:
    """Loads a config file that lies beside another one, for what both share.

    Args:
      file: ``__file__`` of the one.
      name: Of the other, without ``.py``.
    """
    return _run_file(os.path.join(os.path.dirname(os.path.abspath(file)), f"{name}.py"))


def find_config(name: str) -> str:
    """Returns the file that the name of a config stands for.

    Raises:
      SettingsError: If there is none, with near names.
    """
    known = shipped.configs()
    if not (name.endswith(".py") or "/" in name or os.sep in name):
        if name not in known:
            raise SettingsError(
                f"there is no shipped config {name!r}{near(name, known)}; `robust-ssl list "
                "configs` says what they are for; a file of yours ends in .py or has a slash"
            )
        return str(known[name])
    if os.path.isfile(name) and not name.endswith(".py"):
        raise SettingsError(f"{name} is no config: a config is a Python file that ends in .py")
    if os.path.isfile(name):
        return name
    stem = os.path.splitext(os.path.basename(name))[0]
    if stem in known:
        raise SettingsError(f"there is no config file {name}; the shipped one is called {stem}")
    folder = os.path.dirname(name) or "."
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [os.path.join(folder, other) for other in names if other.endswith(".py")]
    files = [file for file in found if os.path.isfile(file)]
    raise SettingsError(f"there is no config file {name}{near(name, files)}")


def _get_config(name: str, arguments: tuple[str, ...]) -> Any:
    file = find_config(name)
    try:
        # Some files of /proc have no end and say that they are empty: Python would wait for it.
        if not disk.read_bytes(file, _MOST_CONFIG).strip():
            raise SettingsError("is empty")
        module = _run_file(file)
        if not hasattr(module, "get_config"):
            raise SettingsError("defines no get_config()")
        if arguments and not inspect.signature(module.get_config).parameters:
            raise SettingsError(f"takes no arguments, got {arguments[0]!r} after the colon")
        return module.get_config(*arguments)
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from error
    except (Exception, SystemExit) as error:  # no config ends the command by itself
        frames = traceback.extract_tb(error.__traceback__)
        whole = os.path.abspath(file)
        places = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == whole]
        where = f"{name}, line {places[-1]}" if places else name
        raise SettingsError(f"{where}: {type(error).__name__}: {error}") from error


def _run_file(path: str) -> Any:
    name = "config_" + re.sub(r"\W", "_", os.path.splitext(os.path.basename(path))[0])
    working_directory.trust(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def near(name: Any, known: Iterable[Any]) -> str:
    """Returns what to say after naming something unknown."""
    known = [str(entry) for entry in known]
    close = difflib.get_close_matches(str(name), known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if known else hint


def to_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as plain JSON values, references resolved.

    Tuples become lists and functions ``"module:name"``.

    Raises:
      SettingsError: If a value is NaN, infinite or has no meaning in JSON.

    Example:
      >>> config = config_dict.ConfigDict({"a": {"sizes": (1, 2)}})
      >>> to_json(config)
      {'a': {'sizes': [1, 2]}}
    """
    return _plain(config, "config")


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, config_dict.FieldReference):
        value = value.get()
    if isinstance(value, Mapping | config_dict.ConfigDict):
        # Of rates that fit a parameter the last one counts.
        names = _as_written(value) if name.endswith(".rates") else value
        return {str(key): _plain(value[key], f"{name}.{key}") for key in names}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} is {value}; it must be a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    raise SettingsError(
        f"{name} is {value!r}; a config holds numbers, texts, lists and functions only"
    )


def describe(config: Mapping[str, Any]) -> str:
    """Returns every entry of a config, one a line, functions with what they are for.

    An entry ``"module:function"`` is followed by the first line of that function's docstring, or
    by the reason why there is no such function.

    Example:
      >>> print(describe({"seed": 0, "loss": "robust_ssl.settings:to_json"}))
      config.seed = 0
      config.loss = "robust_ssl.settings:to_json"
          Returns a config as plain JSON values, references resolved.
    """
    lines: list[str] = []
    _describe(to_json(config), "config", lines)
    return "\n".join(lines)


def _describe(value: Any, name: str, lines: list[str]) -> None:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            _describe(entry, f"{name}.{key}" if key.isidentifier() else f'{name}["{key}"]', lines)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for i, entry in enumerate(value):
            _describe(entry, f"{name}[{i}]", lines)
    else:
        lines.append(f"{name} = {json.dumps(value)}")
        names = value if isinstance(value, list) else [value]
        functions = [n for n in names if isinstance(n, str) and FUNCTION.fullmatch(n)]
        lines.extend(f"    {_first_line(function)}" for function in functions)


def _first_line(name: str) -> str:
    from robust_ssl.build import resolve

    try:
        function = resolve(name)
    except Exception as error:  # importing a stranger's module may raise anything
        return f"NOT FOUND: {error}"
    return (function.__doc__ or "(no docstring)").strip().splitlines()[0]
