"""A company's own files, kept beside the audit, so that it can be decided again from one folder."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

from robust_ssl import disk
from robust_ssl.audit import lines

ANSWERS, POLICY = "answers.yaml", "policy.yaml"


class Given(NamedTuple):
    """Where answers and policy are read from; None where there is none.

    Attributes:
      answers: The company's ``answers.yaml``.
      policy: The company's own policy.
    """

    answers: pathlib.Path | None
    policy: pathlib.Path | None


def chosen(
    workdir: pathlib.Path, answers: str | os.PathLike | None, policy: str | os.PathLike | None
) -> Given:
    """Returns the files that were given, or else those kept in a working directory.

    With their whole paths: an audit reads them again when a function may have left the directory.
    """

    def one(path: str | os.PathLike | None, name: str) -> pathlib.Path | None:
        kept = workdir / name
        if path is not None:
            return disk.expanded(path).absolute()
        return kept if kept.is_file() else None

    return Given(one(answers, ANSWERS), one(policy, POLICY))


def check_kept(workdir: pathlib.Path, given: Given) -> None:
    """Raises PlaceError where something is in the way of what `keep` writes."""
    for path, name in zip(given, (ANSWERS, POLICY), strict=True):
        if path is not None:
            disk.check_place(workdir / name)


def keep(workdir: pathlib.Path, given: Given) -> None:
    """Keeps a copy of what was given in a working directory."""
    for path, name in zip(given, (ANSWERS, POLICY), strict=True):
        if path is not None and path.resolve() != (workdir / name).resolve():
            disk.replace(workdir / name, lines.read_bytes(path))
