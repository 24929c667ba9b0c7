"""Encoders of the Hugging Face hub, ``hf://owner/name@<40 hex digits>``, through `huggingface_hub`.

A branch or a tag can be moved to other files without a word.  So an address names a commit, and
another revision is refused unless it is asked for.  The library's own cache is read, whose files
are links; ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_HUB_CACHE`` mean what they mean there.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

PREFIX = "hf://"
_PINNED = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Weights that run nothing first: a repository often has both, and each may have gigabytes.
_SAFE = ("*.json", "*.safetensors", "*.md", "LICENSE*", "LICENCE*", "NOTICE*")
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_TRUE = ("1", "ON", "YES", "TRUE")  # as the library reads its own switches


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an encoder lies on the hub.

    Attributes:
      owner: The user or organization.
      name: The repository.
      revision: A commit of 40 hex digits, or a branch or tag; ``""`` where none is named.
    """

    owner: str
    name: str
    revision: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files cannot change."""
        return bool(_PINNED.fullmatch(self.revision))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.owner}/{self.name}{revision}"


def is_address(source: Any) -> bool:
    """Whether a source is an address on the hub.

    Example:
      >>> is_address("hf://owner/name@main"), is_address("owner/name")
      (True, False)
    """
    return isinstance(source, str) and source.startswith(PREFIX)


def parse(source: str, *, allow_moving: bool = False) -> Address:
    """Reads ``hf://owner/name@revision``.

    Args:
      source: The address.
      allow_moving: Whether a branch or a tag, or no revision, is taken too.

    Raises:
      ValueError: If it is no address, or its revision may move and that is not allowed.

    Example:
      >>> parse("hf://owner/name@" + "0" * 40).is_pinned
      True
      >>> parse("hf://owner/name@main")
      Traceback (most recent call last):
      ...
      ValueError: hf://owner/name@main: 'main' is no commit...
    """
    place, _, revision = source.removeprefix(PREFIX).partition("@")
    parts = place.split("/")
    well_formed = len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)
    if not is_address(source) or not well_formed or ("@" in source and not revision):
        raise ValueError(f"{source!r} must be hf://owner/name@<40 hex digits of a commit>")
    address = Address(*parts, revision)
    if not (address.is_pinned or allow_moving):
        what = f"{revision!r} is no commit" if revision else "no revision is named"
        raise ValueError(
            f"{address}: {what}, so other files may lie there tomorrow; pin it, "
            f"hf://{place}@<40 hex digits>, or allow it to move: --allow-moving "
            "(allow_moving=True)"
        )
    return address


def fetch(source: str, *, allow_moving: bool = False) -> tuple[Address, pathlib.Path]:
    """Returns the pinned address and the folder of the library's cache that has its files.

    What the cache has is not fetched again.  Safetensors are fetched alone where there are some.

    Args:
      source: As `parse` takes it.
      allow_moving: As in `parse`; the address that comes back is that of the commit.

    Raises:
      ModuleNotFoundError: If `huggingface_hub` is not installed.
      ValueError: If the address is wrong, or its files can neither be read nor fetched.
    """
    address = parse(source, allow_moving=allow_moving)
    folder = _snapshot(address, _SAFE)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(address, (*_SAFE, *_PICKLED))
    try:
        dangling = sorted(file.name for file in folder.iterdir() if not file.exists())
    except OSError as error:
        raise ValueError(f"{address}: {_unreadable(error)}") from error
    if dangling:
        raise ValueError(
            f"{address}: links of the cache lead nowhere: {', '.join(dangling[:5])}; remove "
            f"{folder} and fetch it again"
        )
    return dataclasses.replace(address, revision=folder.name), folder


def located(source: Any, allow_moving: bool | None = False) -> tuple[Address | None, Any]:
    """Returns the pinned address of a source on the hub, and the path to read.

    Any other source comes back as it is, with None.
    """
    if is_address(source):
        return fetch(source, allow_moving=bool(allow_moving))
    if allow_moving:
        raise ValueError(f"allow_moving is for addresses, hf://owner/name, and not {source}")
    return None, source


def wanted(file: str) -> bool:
    """Whether a file of a snapshot is one of those that are fetched.

    Example:
      >>> wanted("config.json"), wanted("onnx/model.onnx")
      (True, False)
    """
    path = pathlib.PurePosixPath(file)
    return len(path.parts) == 1 and any(path.match(pattern) for pattern in (*_SAFE, *_PICKLED))


def _snapshot(address: Address, patterns: Sequence[str]) -> pathlib.Path:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{address} needs the library `huggingface_hub`: pip install 'robust-ssl[provenance]'"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            f"{address.owner}/{address.name}",
            revision=address.revision or "main",
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            # Asked of the environment now: the library asks when it is imported.
            endpoint=os.environ.get("HF_ENDPOINT"),
            cache_dir=os.environ.get("HF_HUB_CACHE"),
            local_files_only=os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE,
        )
    except Exception as error:  # a dozen kinds, from no network to a cache that cannot be read
        raise ValueError(f"{address} cannot be fetched: {_cause(error)}") from error
    return pathlib.Path(folder)


def _cause(error: Exception) -> str:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return _unreadable(error) if isinstance(error, OSError) and error.filename else cause


def _unreadable(error: OSError) -> str:
    return f"the cache cannot be read: {error}; see HF_HUB_CACHE"
