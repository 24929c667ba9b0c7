"""What is typed over a config: ``--config.KEY=VALUE``, by the rules of ml_collections."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from robust_ssl.settings import FUNCTION, SettingsError

MAY_HAVE_OTHERS = ("losses", "rates")  # of a recipe: mappings that its function fills
OTHERS = "+"  # the name in such a mapping that says: and what the function gives besides


def apply(config: config_dict.ConfigDict, overrides: Sequence[str]) -> None:
    """Sets what ``--config.KEY=VALUE`` texts say, in a config that is not locked.

    Raises:
      SettingsError: If a text cannot be read, or its value does not fit what is there.

    Example:
      >>> config = config_dict.ConfigDict({"seed": 0, "suite": {"steps": 2}})
      >>> apply(config, ["--config.suite.steps=3", "--config.suite.attacks=None"])
      >>> config.suite.to_dict()
      {'attacks': None, 'steps': 3}
    """
    _set_typed(config, [argument for argument in overrides if not _set_untyped(config, argument)])


def _set_untyped(config: config_dict.ConfigDict, argument: str) -> bool:
    """Sets what config_flags cannot: what is new, is or becomes None, or is a list; else False."""
    from ml_collections.config_flags import config_path

    match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument, re.DOTALL)
    if match is None:
        raise SettingsError(f"cannot read {argument!r}: write --config.KEY=VALUE")
    key, text = match.groups()
    value = _literal(key, text)
    try:
        if _add(config, key, value, config_path):
            return True
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"--config.{key}: {error}") from None
    kind = config_path.get_type(key, config)
    if kind is config_dict.ConfigDict and value is not None and not isinstance(value, Mapping):
        raise SettingsError(
            f"--config.{key} is a section and not one value, got {text!r}; set an entry of it, "
            f"--config.{key}.NAME=VALUE, or all of it by a mapping"
        )
    if kind in (tuple, list) and isinstance(value, str) and "," in value:
        value = tuple(part.strip() for part in value.split(","))  # words, as in train,score
    elif kind not in (type(None), list) and value is not None:
        _check_number(key, kind, value, text)
        return False
    if kind is list and value is not None:
        value = list(value) if isinstance(value, list | tuple) else [value]
    config_path.set_value(key, config, value)
    return True


def _check_number(key: str, kind: type, value: Any, text: str) -> None:
    words = {int: "a whole number", float: "a number"}
    fits = isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in words and not fits:
        raise SettingsError(f"--config.{key} must be {words[kind]}, got {text!r}")


def _literal(key: str, text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        if not text.startswith(("{", "[")):
            return text
        try:
            return json.loads(text)
        except ValueError:
            raise SettingsError(
                f"--config.{key}: cannot read {text!r} as a mapping or a list "
                f"({getattr(error, 'msg', error)})"
            ) from None


def _add(config: config_dict.ConfigDict, key: str, value: Any, config_path: Any) -> bool:
    """Adds an entry, and the sections it lies in, unless it is there.

    A function's bare name that gets an option becomes ``{"function": name}`` first.
    """
    try:
        *parents, last = config_path.split(key)
    except ValueError as error:
        raise SettingsError(f"--config.{key}: cannot read this name ({error})") from None
    node, walked = config, "config"
    for place, field in enumerate(parents):
        if isinstance(node, config_dict.ConfigDict):
            if field not in node or node[field] is None:
                if isinstance([*parents, last][place + 1], int):
                    raise SettingsError(
                        f"--config.{key}: {walked} has no list {field!r}; give all of it"
                    )
                node[field] = config_dict.ConfigDict(_section(node, parents[: place + 1]))
            elif isinstance(node[field], str) and FUNCTION.fullmatch(node[field]):
                name = node[field]
                del node[field]
                node[field] = config_dict.ConfigDict({"function": name})
        try:
            node = node[field]
        except (TypeError, KeyError, IndexError):
            raise SettingsError(
                f"--config.{key}: {walked} is {node!r} and has no {field!r}"
            ) from None
        walked += f".{field}"
    if not isinstance(node, config_dict.ConfigDict):
        _check_place(node, last, key, walked)
        return False
    if last in node:
        return False
    node[last] = value
    return True


def _section(node: Mapping[str, Any], path: Sequence[Any]) -> dict[str, Any]:
    """Returns a new section: of losses or rates of a recipe's function the other ones stay."""
    of_recipe = len(path) == 3 and path[0] == "recipes" and "function" in node
    return {OTHERS: True} if of_recipe and path[2] in MAY_HAVE_OTHERS else {}


def _check_place(node: Any, last: Any, key: str, walked: str) -> None:
    try:
        node[last]
    except (TypeError, KeyError, IndexError):
        raise SettingsError(f"--config.{key}: {walked} is {node!r} and has no {last!r}") from None


def _set_typed(config: config_dict.ConfigDict, overrides: list[str]) -> None:
    from absl import flags
    from ml_collections import config_flags

    argv = ["robust-ssl", *overrides]
    parsed = flags.FlagValues()  # our own: the global flags belong to whoever imports us
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=argv)
        parsed(argv)
    except (flags.Error, TypeError, ValueError, KeyError) as error:
        raise SettingsError(str(error).replace("flag --", "--")) from error
