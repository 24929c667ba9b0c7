"""The pages of an audit: one self-contained HTML file a language, a checklist, JUnit XML.

No script, no request, nothing but what ``audit.json`` holds.  The same document gives the same
bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import importlib.util
import logging
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from robust_ssl import disk, settings
from robust_ssl.audit import checklists, document, junit
from robust_ssl.audit.answers import LANGUAGES
from robust_ssl.audit.pages import drawing
from robust_ssl.audit.pages.catalog import Catalog, seen
from robust_ssl.audit.pages.numbers import Numbers

PAGES = {"en": "audit.html", "ja": "audit.ja.html"}
CHECKLIST, JUNIT = "checklist.csv", "junit.xml"
NAMES = (document.NAME, *PAGES.values(), CHECKLIST, JUNIT)  # all that `write` writes
_log = logging.getLogger(__name__)
_COLUMNS = ("phase", "item_en", "item_ja", "state", "by", "date", "evidence", "note")


def check_installed() -> None:
    """Raises SettingsError where what writes pages is not installed, before the first step."""
    if importlib.util.find_spec("jinja2") is None:
        raise settings.SettingsError(
            "the pages of an audit need jinja2; install it: pip install 'robust-ssl[audit]'"
        )


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robust_ssl.audit", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = shlex.quote
    return environment


def html(whole: Mapping[str, Any], language: str) -> str:
    """Returns the page of a decided document, ``"en"`` or ``"ja"``.

    Raises:
      ValueError: If nothing has been decided on the document.
    """
    if whole["decided"] is None:
        raise ValueError("nothing is decided on this audit; robust_ssl.audit.decision.decide does")
    check_installed()
    style = (importlib.resources.files("robust_ssl.audit") / "pages/style.css").read_text("utf-8")
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    text = Catalog.read(language)
    numbers = Numbers(language, whole["decided"]["answers"]["currency"])
    template = _environment().get_template("page.html.j2")
    page = template.render(
        m=whole["measured"],
        d=whole["decided"],
        seal=whole["seal"],
        schema=whole["schema"],
        t=text,
        n=numbers,
        draw=drawing.Figures(text, numbers),
        style=style,
        style_hash=hashed,
        other=next(other for other in LANGUAGES if other != language),
        pages=PAGES,
    )
    return page if page.endswith("\n") else page + "\n"


def write(workdir: str | os.PathLike, whole: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes ``audit.json``, pages, ``checklist.csv`` and ``junit.xml``; returns their paths.

    A checklist that somebody has filled in is kept under another name, with a word in the log.
    """
    folder = pathlib.Path(workdir)
    check_places(folder)
    # All is made before anything is replaced: a failure leaves the pages of before.
    contents: dict[str, str | bytes] = {PAGES[name]: html(whole, name) for name in LANGUAGES}
    contents[CHECKLIST] = checklists.as_csv(whole["decided"]["checklist"], _COLUMNS)
    contents[JUNIT] = junit.xml(whole["decided"])
    _keep_filled_in(folder, contents[CHECKLIST])
    document.write(folder / document.NAME, whole)
    for name, content in contents.items():
        disk.replace(folder / name, content)
    return [folder / document.NAME, *(folder / name for name in contents)]


def check_places(workdir: str | os.PathLike) -> None:
    """Raises PlaceError where something is in the way of what `write` writes."""
    for name in NAMES:
        disk.check_place(pathlib.Path(workdir, name))


def _keep_filled_in(folder: pathlib.Path, checklist: str | bytes) -> None:
    file = folder / CHECKLIST
    if file.is_file() and disk.read_bytes(file) not in (checklist, _checklist_before(folder)):
        kept = disk.keep_edited(file)
        said = "%s was edited; states come from the answers file, so it is written again%s"
        _log.warning(said, file, kept and f"; {kept}")


def _checklist_before(folder: pathlib.Path) -> bytes | None:
    """The checklist of the audit that is there; None where that cannot be read."""
    try:
        decided = document.read(folder / document.NAME)["decided"]
    except (OSError, ValueError):
        return None
    return decided and checklists.as_csv(decided["checklist"], _COLUMNS)
