"""YAML files that people fill in: every entry knows its line, so an error can name it.

Only mappings, lists and plain texts are read.  What a text means, a number or a date, is decided by
who asks: YAML's own guesses (``1e6`` is a text, ``NO`` is false) surprise people.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from robust_ssl import disk, settings

MOST_BYTES = 2**20
MOST_NESTED = 16
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_TRUE, _FALSE = ("true", "yes"), ("false", "no")
# Groups of three after a first that is not 0, set apart alike: 1,000 and 12 500.75, never 0,001.
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}([, '])\d{3}(?:\1\d{3})*(?:\.\d+)?", re.ASCII)
_SET_APART = re.compile(r"[+-]?\d[\d., '_]*", re.ASCII)


class EntryError(settings.SettingsError):
    """An entry of a file that somebody filled in cannot be used; names file and line."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A value of a YAML file, and where it stands.

    Attributes:
      value: A text, a list of entries, a mapping of names to entries, or None where it is empty.
      line: From 1.
      file: What errors call the file.
      name: The path to it, ``"business.loss_per_error.low"``.
    """

    value: Any
    line: int
    file: str
    name: str = ""

    def error(self, message: str) -> EntryError:
        """Returns the error that names file, line and entry."""
        place = f"{self.file}, line {self.line}"
        return EntryError(f"{place}: {self.name + ' ' if self.name else ''}{message}")

    @property
    def is_blank(self) -> bool:
        """Whether nothing has been filled in, here or in any entry within."""
        return all(entry.value in (None, "") for entry in self._leaves())

    def _leaves(self) -> Iterator[Entry]:
        inner = self.value.values() if isinstance(self.value, dict) else self.value
        if isinstance(self.value, dict | list):
            for entry in inner:
                yield from entry._leaves()
        else:
            yield self

    def mapping(self, known: Iterable[str] | None = None) -> dict[str, Entry]:
        """Returns the entries by name, of which all must be known; none where it is empty."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.error("must be entries with names, `name: value`, one a line")
        for name, entry in self.value.items() if known is not None else ():
            if name not in known:
                raise dataclasses.replace(entry, name="").error(
                    f"unknown entry {name!r}{f' in {self.name}' if self.name else ''}"
                    f"{settings.near(name, known)}"
                )
        return self.value

    def list(self) -> list[Entry]:
        """Returns the items of a list; none where it is empty."""
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            raise self.error("must be a list, `- item`, one a line")
        return self.value

    def get(self, name: str) -> Entry:
        """Returns an entry that must be there and filled in."""
        entries = self.mapping()
        if name not in entries:
            raise self.error(f"lacks {name!r}; add `{name}:` with its value")
        value = entries[name].value
        # Spaces and dashes are nobody's name.
        if value is None or (isinstance(value, str) and not any(map(str.isalnum, value))):
            raise entries[name].error("is empty; fill it in")
        return entries[name]

    def text(self) -> str:
        """Returns the text, which is empty where nothing was filled in."""
        if isinstance(self.value, dict | list):
            raise self.error("must be one text")
        return (self.value or "").strip()

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """Returns the number, which must be finite and in ``[low, high]``."""
        text = self.text()
        try:
            value = float(text)
        except ValueError:
            raise self.error(f"is {text!r}, no number{_number_hint(text)}") from None
        # 0001 is 0,001 without its comma more often than it is 1.
        if (begin := re.match(r"[+-]?(\d)_?\d", text)) and int(begin[1]) == 0:
            raise self.error(
                f"is {text!r}; a zero begins a number only before a decimal point, as in 0.001"
            )
        if not math.isfinite(value):
            raise self.error(f"is {text}; a finite number is needed")
        if value < low:
            allowed = "not be negative" if low == 0 else f"be at least {low:g}"
            raise self.error(f"is {text}; it must {allowed}")
        if value > high:
            raise self.error(f"is {text}; it must be at most {high:g}{_share_hint(value, high)}")
        return value

    def flag(self) -> bool:
        """Returns whether it says true."""
        text = self.text().lower()
        if text not in (*_TRUE, *_FALSE):
            raise self.error(f"is {text!r}; write true or false")
        return text in _TRUE

    def date(self) -> datetime.date:
        """Returns the date, written as 2027-03-31."""
        try:
            if not _DATE.fullmatch(self.text()):  # Python reads weeks too
                raise ValueError
            return datetime.date.fromisoformat(self.text())
        except ValueError:
            raise self.error(f"is {self.text()!r}; write a date as 2027-03-31") from None

    def one_of(self, known: Iterable[str]) -> str:
        """Returns a word that must be one of those known."""
        known, text = list(known), self.text()
        if text not in known:
            raise self.error(f"is {text!r}{settings.near(text, known)}")
        return text

    def plain(self) -> Any:
        """Returns the value without lines."""
        if isinstance(self.value, dict):
            return {name: entry.plain() for name, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value


def _number_hint(text: str) -> str:
    """Returns what to write instead, a number only where no other can be meant.

    Example:
      >>> _number_hint("1,000,000"), _number_hint("2 %")
      ('; write 1000000', '; write a share, 0.01 for 1 %')
      >>> _number_hint("0,001")
      '; write a decimal point and set no thousands apart, as in 0.001 and 12500'
    """
    text = unicodedata.normalize("NFKC", text)  # a Japanese keyboard has commas of its own
    if thousands := _THOUSANDS.fullmatch(text):
        plain = text.replace(thousands[1], "")
        # In half of the world 12,500 is twelve and a half.
        decimal = text.replace(",", ".") if text.count(",") == 1 and "." not in text else ""
        return f"; write {plain}" + (f", or {decimal} if that is meant" if decimal else "")
    if _SET_APART.fullmatch(text):
        return "; write a decimal point and set no thousands apart, as in 0.001 and 12500"
    if text.endswith("%"):
        return "; write a share, 0.01 for 1 %"
    return ""


def _share_hint(value: float, high: float) -> str:
    is_percent = high == 1 and value <= 100
    return f"; a share of {value:g} % is written {value / 100:g}" if is_percent else ""


def read_bytes(path: str | os.PathLike, hint: str = "") -> bytes:
    """Returns the content of a file that was given.

    Args:
      path: The file.
      hint: What to do where it cannot be opened, behind a semicolon.

    Raises:
      EntryError: If it is not there, is a directory or is too large.
    """
    try:
        return disk.read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise EntryError(f"{path} cannot be read: {error.strerror}{hint}") from error
    except ValueError as error:
        raise EntryError(str(error)) from error


def parse(content: bytes | str, file: str) -> Entry:
    """Reads YAML text.

    Args:
      content: The text, UTF-8.
      file: What errors call it.

    Raises:
      EntryError: If it is no YAML, names an entry twice, is nested deeper than `MOST_NESTED`, or
        has references (`&name`, `*name`), which nobody needs here.

    Example:
      >>> entry = parse("business: {currency: JPY}", "answers.yaml")
      >>> entry.get("business").get("currency").text()
      'JPY'
    """
    import yaml

    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                line = token.start_mark.line + 1
                raise EntryError(f"{file}, line {line}: references (& and *) are not read here")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise EntryError(f"{file} is not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}, line {mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise EntryError(f"{place}: this is no YAML: {problem}") from error
    except RecursionError as error:
        raise EntryError(f"{file} is nested deeper than {MOST_NESTED} levels") from error
    if node is None:
        return Entry(None, 1, file)
    return _entry(node, file, "", 0)


def _entry(node: Any, file: str, name: str, depth: int) -> Entry:
    import yaml

    here = Entry(None, node.start_mark.line + 1, file, name)
    if depth > MOST_NESTED:
        raise here.error(f"is nested deeper than {MOST_NESTED} levels")
    if isinstance(node, yaml.ScalarNode):
        # An empty value, or YAML's own words for it.
        blank = node.style is None and node.value in ("", "~", "null")
        return dataclasses.replace(here, value=None if blank else node.value)
    if isinstance(node, yaml.SequenceNode):
        items = [_entry(n, file, f"{name}[{i}]", depth + 1) for i, n in enumerate(node.value)]
        return dataclasses.replace(here, value=items)
    entries: dict[str, Entry] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise here.error("has a name that is no text")
        inner = _entry(value, file, f"{name}.{key.value}" if name else key.value, depth + 1)
        # The line of the name: that of an empty value may be the next one.
        inner = dataclasses.replace(inner, line=key.start_mark.line + 1)
        if key.value in entries:
            raise inner.error(f"is there twice; the first is on line {entries[key.value].line}")
        entries[key.value] = inner
    return dataclasses.replace(here, value=entries)
