"""The words of the pages: one catalogue a language, and no words anywhere else."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from robust_ssl import words


@functools.cache
def messages(language: str) -> Mapping[str, str]:
    """Returns the messages of a language by key."""
    folder = importlib.resources.files("robust_ssl.audit")
    return json.loads((folder / f"pages/catalog.{language}.json").read_text(encoding="utf-8"))


class Catalog:
    """The messages of one language, called by key.

    Attributes:
      language: ``"en"`` or ``"ja"``.
      messages: By key.

    Example:
      >>> text = Catalog.read("en")
      >>> str(text("stage.pilot")), text.has("stage.none")
      ('Pilot', False)
    """

    def __init__(self, language: str, messages: Mapping[str, str]):
        self.language = language
        self.messages = messages

    @classmethod
    def read(cls, language: str) -> Catalog:
        """Reads the catalogue of a language."""
        return cls(language, messages(language))

    def __call__(self, key: str, **values: Any) -> Any:
        """Returns a message as markup, values escaped unless they are markup themselves."""
        from markupsafe import Markup, escape

        shown = {name: seen(value) for name, value in values.items()}
        return Markup(escape(self.messages[key])).format(**shown)

    def has(self, key: str) -> bool:
        """Whether there is such a message."""
        return key in self.messages

    def of(self, texts: Mapping[str, str]) -> str:
        """Returns a text that a policy has in every language."""
        return texts[self.language]

    def plain(self, key: str, **values: Any) -> str:
        """Returns a message as text, for attributes and figures."""
        return self.messages[key].format(**{name: seen(value) for name, value in values.items()})


def seen(value: Any) -> Any:
    r"""Returns a text with every character seen, markup as it is: a name must not forge a page.

    Example:
      >>> print(seen("caf\udce9"), seen(2))
      caf\udce9 2
    """
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return words.line(value) if is_text else value
