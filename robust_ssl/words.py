r"""Words of files, data sets and users on their way out: one function for each place they go to.

A class may be called ``=1+1``, a tensor ``"\x1b[2J"``, a recipe ``[x](http://y)``.  Where such a
name ends, it must be read as it is: by a terminal, a spreadsheet, a Markdown page, a figure.
"""

from __future__ import annotations

import re
import sys
from typing import Any

MOST_IN_FIGURE = 80  # characters of a name in a figure; more than that leaves no room for the rest

# Control characters, lone halves of a surrogate pair (a file name that is no UTF-8), and what turns
# the direction of writing or is not seen at all.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_FORMULA = re.compile(r"(^|[;|,\t])(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")
_AUTOLINK = re.compile(r"://|www\.|@", re.IGNORECASE)
# Brackets alone are no link: "[0, 1]" stays readable in the file, too.
_MARKUP = re.compile(
    r"[\\`*|$~]|\](?=[(\[:])|\[(?=\^)|(?<![^\W_])_|_(?![^\W_])|<(?=[A-Za-z/!?])|&(?=#?\w+;)"
)
# At the start of a line: a heading, a quotation, an item of a list, a rule.
_LEADING = re.compile(
    r"^(\s*(?:\d+(?=[.)](?:\s|$)))?)(?=#{1,6}(?:\s|$)|>|[-+](?:\s|$)|[-=]{2}|[.)]|\[[ xX]\])"
)


class Markup(str):
    """Text that is Markdown already: a table takes it as it is."""

    __slots__ = ()


def line(text: Any) -> str:
    r"""Returns a text as one line in which every character is seen.

    Example:
      >>> print(line("a\x1b[2J\nb"), line("caf\udce9"))
      a\x1b[2J\nb caf\udce9
    """
    return _UNSEEN.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def lines(text: Any, margin: str = "  ") -> str:
    r"""Returns a text for a terminal or a log; a line that it forges is set in from the margin.

    Example:
      >>> print(lines("cannot read a\x07\nrobust-ssl: all is well"))
      cannot read a\x07
        robust-ssl: all is well
    """
    first, *rest = str(text).replace("\r\n", "\n").split("\n")
    shown = [line(first.expandtabs())]
    for each in rest:
        each = line(each.expandtabs())
        shown.append(each if each.startswith(margin) or not each else margin + each)
    return "\n".join(shown)


def say(text: Any, file: Any = None, margin: str = "  ") -> None:
    """Prints `lines` to standard error, or to a file; what its encoding lacks is escaped.

    A line for standard error is lost where that is closed or cannot be written: a log that fills
    its disk ends no training.  A reader that has left is told by `BrokenPipeError`.
    """
    file = file or sys.stderr
    if file is None:  # print() would take standard output
        return
    shown = encodable(lines(text, margin), getattr(file, "encoding", None))
    try:
        print(shown, file=file, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        if file is not sys.stderr:
            raise


def encodable(text: str, encoding: str | None) -> str:
    r"""Returns a text with an escape for every character that an encoding lacks.

    Example:
      >>> print(encodable("\u72ac 1 %", "ascii"))
      \u72ac 1 %
    """
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def markdown(text: Any) -> str:
    r"""Returns a text that Markdown shows as it is: no markup, link, HTML or formula.

    Example:
      >>> markdown("gen_af, 8/255"), markdown("[x](y)"), markdown("a|b")
      ('gen_af, 8/255', '[x\\](y)', 'a\\|b')
    """
    if isinstance(text, Markup):
        return text
    shown = _MARKUP.sub(lambda match: _entity(match[0]), line(text))
    # GitHub makes links of bare addresses, whatever is escaped in them, but not within code.
    shown = _AUTOLINK.sub(lambda match: f"`{match[0]}`", shown)
    return _LEADING.sub(r"\1\\", shown)


def _entity(character: str) -> str:
    return {"<": "&lt;", "&": "&amp;"}.get(character, f"\\{character}")


def csv_cell(value: Any) -> Any:
    """Returns a value for a CSV file: text that a spreadsheet would compute gets a quote before it.

    Numbers stay, as text too.

    Example:
      >>> [csv_cell(value) for value in ("=1+1", "-0.5", 2, "gen_af", "a;=b")]
      ["'=1+1", '-0.5', 2, 'gen_af', "a;'=b"]
    """
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        return _FORMULA.sub(r"\1\2'", line(value))
    return value


def in_figure(text: str) -> str:
    """Returns a text for a figure: every character seen, the middle of a long line left out."""
    return "\n".join(_short(line(each)) for each in text.split("\n"))


def _short(text: str) -> str:
    half = MOST_IN_FIGURE // 2
    return text if len(text) <= MOST_IN_FIGURE else f"{text[: half - 1]}…{text[-half:]}"
