"""``robust-ssl list``: what a config can name, one a line."""

from __future__ import annotations

import argparse
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from robust_ssl import shipped
from robust_ssl.cli.flags import DONE, add_command, add_debug

_EXAMPLES = """\
examples:
  robust-ssl list configs
      what `robust-ssl run NAME` takes

  robust-ssl list losses
      what a recipe's losses can name, `robust_ssl.losses:NAME`

  robust-ssl list data
      sets that are here, and those that can be fetched"""

Lines = Iterator[tuple[str, str]]


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    command = add_command(commands, "list", "say what there is of a kind, by name", _EXAMPLES)
    command.add_argument(
        "kind", choices=tuple(_KINDS), nargs="?", help="of what; without it the kinds are listed"
    )
    command.add_argument(
        "--data-dir", metavar="DIR", help="where data sets are (default: as for a run)"
    )
    add_debug(command)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints a list and returns the exit code."""
    lines = _KINDS[arguments.kind] if arguments.kind else _kinds
    entries = list(_data(arguments.data_dir) if lines is _data else lines())
    width = max((len(name) for name, _ in entries), default=0)
    for name, text in entries:
        print(f"{name:{width}}  {text}".rstrip())
    if arguments.kind in _HOMES:
        home = _HOMES[arguments.kind]
        print(f'in a config: "{home}:NAME", or {{"function": "{home}:NAME", ...}}', file=sys.stderr)
    return DONE


def _kinds() -> Lines:
    from robust_ssl.api.names import KINDS

    yield "configs", "What `robust-ssl run NAME` takes."
    yield from KINDS.items()


def _configs() -> Lines:
    for name, file in shipped.configs().items():
        yield name, shipped.summary(file)


def _attacks() -> Lines:
    from robust_ssl import attacks
    from robust_ssl.api.names import first_line

    others = (attacks.UniversalAttack, attacks.UniversalPerturbation)  # a contract, a result
    for name in attacks.__all__:
        value = getattr(attacks, name)
        if inspect.isclass(value) and value not in others and _is_attack(value):
            yield name, first_line(value)


def _is_attack(value: type) -> bool:
    """Whether values of a class are called on an image, or fitted step by step."""
    # Not `hasattr(value, "__call__")`: a class itself can always be called.
    return hasattr(value, "step") or any("__call__" in vars(base) for base in value.__mro__)


def _named(kind: str) -> Callable[[], Lines]:
    """As `robust_ssl.list` has them."""

    def lines() -> Lines:
        from robust_ssl.api.names import list_names

        return iter(list_names(kind).purposes.items())

    return lines


def _data(data_dir: str | None = None) -> Lines:
    from robust_ssl import data
    from robust_ssl.api.names import describe_set, first_line
    from robust_ssl.data import prepared
    from robust_ssl.data.public import SETS, find_set

    for name in ("digits", "photo_crops"):
        yield f"robust_ssl.data:{name}", f"{first_line(getattr(data, name))} [built in]"
    folder = prepared.data_directory(data_dir)
    # Some public sets lie under the longer name that TFDS has for them.
    here = {one.name if (one := find_set(name)) else name for name in _prepared(folder)}
    public = {one.name: one for one in SETS}
    for name in sorted(here | public.keys()):
        size = describe_set(public[name]) if name in public else ""
        place = f"[in {folder}]" if name in here else f"[robust-ssl data prepare {name}]"
        yield name, " ".join(filter(None, [size, place]))


def _prepared(folder: pathlib.Path) -> Iterator[str]:
    """Names of the sets that lie in a folder as TFDS writes them: NAME/[CONFIG/]VERSION."""
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for file in folder.glob(pattern):
            yield file.parent.parent.relative_to(folder).as_posix()


_KINDS: dict[str, Callable[..., Lines]] = {
    "configs": _configs,
    "encoders": _named("encoders"),
    "attacks": _attacks,
    "losses": _named("losses"),
    "objectives": _named("objectives"),
    "recipes": _named("recipes"),
    "data": _data,
}
# Where a config finds what is listed.
_HOMES = {name: f"robust_ssl.{name}" for name in ("attacks", "losses", "objectives", "recipes")}
