"""``robust-ssl encoder lock`` and ``verify``: whether an encoder still is what it was."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from robust_ssl import disk, words
from robust_ssl.cli.flags import (
    DONE,
    FAILED,
    MISSING,
    add_command,
    add_debug,
    add_own,
    own_of,
)

_EXAMPLES = """\
examples:
  robust-ssl encoder lock hf://owner/name@0123456789abcdef0123456789abcdef01234567 \\
      -o encoder.lock.json --normalization imagenet --image-size 224
      what the encoder is today: hashes, architecture, features of eight images, documents

  robust-ssl encoder verify encoder.lock.json
      ten checks against it; each says pass, fail or absent

  robust-ssl encoder verify encoder.lock.json --signature model.sig --public-key key.pub
      the same, and the signature must hold

Nothing in a file is executed.  Exit codes of verify: 0 it holds, 1 something differs, 2 wrong usage
or a lock that cannot be used, 3 evidence is missing.  The scanner's opinion decides nothing."""


def add_parsers(actions: Any, add_names: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the two commands to those of ``robust-ssl encoder``.

    Args:
      actions: argparse's.
      add_names: Adds the flags for what a foreign file may not tell.
    """
    lock = add_command(
        actions, "lock", "write down what an encoder is, to verify it later", _EXAMPLES
    )
    lock.add_argument(
        "source",
        metavar="SOURCE",
        help="a shipped name, a directory of an encoder or a classifier, a foreign file or folder, "
        "or hf://owner/name@<commit>",
    )
    lock.add_argument(
        "-o", "--out", required=True, metavar="FILE", help="such as encoder.lock.json"
    )
    lock.add_argument(
        "--statement",
        action="store_true",
        help="write provenance.intoto.json beside it, an in-toto statement of SLSA provenance",
    )
    lock.add_argument(
        "--bom", action="store_true", help="write bom.cdx.json beside it, a CycloneDX ML-BOM"
    )
    verify = add_command(actions, "verify", "check an encoder against its lock", _EXAMPLES)
    verify.set_defaults(decides=True)
    verify.add_argument("lock", metavar="LOCK", help="what `encoder lock` wrote")
    verify.add_argument(
        "source", nargs="?", metavar="SOURCE", help="the encoder (default: the one the lock names)"
    )
    verify.add_argument("--signature", metavar="FILE", help="of OpenSSF model-signing")
    verify.add_argument("--public-key", metavar="FILE", help="the signer's, PEM")
    verify.add_argument("--json", metavar="FILE", help="write the ten checks with their evidence")
    for command in (lock, verify):
        add_own(command)
        add_debug(command)
    add_names(lock)


def lock(arguments: argparse.Namespace, named: dict[str, Any]) -> int:
    """Writes the lock and what else was asked for; `named` is what a foreign file does not tell."""
    from robust_ssl import provenance
    from robust_ssl.weights import cards

    disk.check_place(arguments.out)  # before seconds of work
    options = {name: value for name, value in named.items() if value is not None}
    source = provenance.open_source(arguments.source, **options, **own_of(arguments))
    record = provenance.lock(source)
    file = provenance.write_lock(record, arguments.out)
    words.say(f"written: {file}")
    beside = {"statement": provenance.statement, "bom": provenance.bill_of_materials}
    names = {"statement": "provenance.intoto.json", "bom": "bom.cdx.json"}
    for flag, make in beside.items():
        if getattr(arguments, flag):
            place = file.with_name(names[flag])
            cards.replace_file(place, (json.dumps(make(source), indent=2) + "\n").encode())
            words.say(f"written: {place}")
    return DONE


def verify(arguments: argparse.Namespace) -> int:
    """Prints the ten checks and says by the exit code whether the lock holds."""
    from robust_ssl import provenance
    from robust_ssl.weights import cards

    if arguments.json:
        disk.check_place(arguments.json)
    record = provenance.read_lock(arguments.lock)
    checks = provenance.verify(
        arguments.lock,
        arguments.source,
        signature_file=arguments.signature,
        public_key=arguments.public_key,
        **own_of(arguments),
    )
    words.say(provenance.show(checks), sys.stdout, margin="")
    if arguments.json:
        text = json.dumps(provenance.as_json(checks), indent=2, allow_nan=False)
        cards.replace_file(pathlib.Path(arguments.json), f"{text}\n".encode())
    signed = arguments.signature is not None or arguments.public_key is not None
    names = provenance.needed(record, signed=signed)
    if provenance.differs(checks):
        print("\nit differs from its lock")
        return FAILED
    if provenance.is_missing(checks, names):
        print("\nevidence is missing; what is there agrees with the lock")
        return MISSING
    print("\nit is what the lock says")
    return DONE


def write_beside(source: Any, folder: Any = None, made_from: tuple[str, ...] = ()) -> None:
    """Writes the statement and the bill of materials beside what a command has written."""
    from robust_ssl import provenance

    for file in provenance.write_beside(source, folder, made_from=made_from):
        words.say(f"written: {file}")
