"""Check 4: a signature by OpenSSF model-signing with an elliptic-curve key."""

from __future__ import annotations

import base64
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

from robust_ssl import disk
from robust_ssl.provenance.check import INSTALL, Check, absent, failed, passed, some
from robust_ssl.provenance.source import Source, about

_BESIDE = ("model.sig",)  # what model-signing calls it


def check_signature(
    source: Source,
    signature: str | os.PathLike | None,
    public_key: str | os.PathLike | None,
) -> Check:
    """Verifies a signature over the files of a source; nothing is asked of the network.

    Args:
      source: What was signed.
      signature: The file; None looks for ``model.sig`` beside the files.
      public_key: The signer's key, PEM.
    """
    beside = [source.folder / name for name in _BESIDE if (source.folder / name).is_file()]
    file = pathlib.Path(signature) if signature else next(iter(beside), None)
    if file is None:
        return absent("signature", "nobody has signed it, or the signature is not beside it")
    if public_key is None:
        said = "there is a signature and no key to verify it with: --public-key"
        return absent("signature", said, signature=file.name)
    missing = [str(path) for path in (file, public_key) if not pathlib.Path(path).is_file()]
    if missing:
        return absent("signature", f"{missing[0]} is not there")
    try:
        from model_signing import verifying
    except ImportError:
        return absent("signature", INSTALL, signature=file.name)
    key, evidence = pathlib.Path(public_key), {"signature": file.name}
    try:
        evidence["key_sha256"] = hashlib.sha256(disk.read_bytes(key)).hexdigest()
        _verify(verifying, source, file, key)
    except Exception as error:  # each library below has errors of its own
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return failed("signature", f"the signature does not hold: {cause}", **evidence)
    said = f"signed with the key {evidence['key_sha256'][:16]}..."
    return passed("signature", said, **evidence)


def _verify(verifying: Any, source: Source, signature: pathlib.Path, key: pathlib.Path) -> None:
    """Raises unless the signature holds and every file of the source is signed."""
    config = verifying.Config().use_elliptic_key_verifier(public_key=str(key))
    if source.path.is_file():
        config.verify(str(source.path.resolve()), str(signature))
        return
    # What lies about an encoder may be signed with it or may have come later.
    config.set_ignore_unsigned_files(True)
    # A folder of these files: the hub's cache holds links, which model-signing refuses.
    with tempfile.TemporaryDirectory() as folder:
        for name, file in {**source.files, **about(source.folder)}.items():
            if not file.is_file():  # a pipe would be read for ever
                raise ValueError(f"{name} is no regular file")
            place = pathlib.Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(file.resolve(), place)
        config.verify(pathlib.Path(folder), signature)  # a text fails in the library
    unsigned = sorted(source.files.keys() - _signed(signature))
    if unsigned:
        raise ValueError(f"not signed: {some(unsigned)}")


def _signed(signature: pathlib.Path) -> set[str]:
    """Returns the names that a signature, which has been verified, is over."""
    bundle = disk.read_json(signature)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    statement = disk.parse_json(payload, signature)
    # Of a file that is signed in shards, each has its first and last byte behind the name.
    names = (entry["name"] for entry in statement["predicate"]["resources"])
    return {re.sub(r":\d+:\d+$", "", name) for name in names}


def _link(file: pathlib.Path, place: pathlib.Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another disk
        shutil.copyfile(file, place)
