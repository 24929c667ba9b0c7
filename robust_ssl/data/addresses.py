"""Addresses of buckets and sites, which are no folders and are not taken for any."""

from __future__ import annotations

import os
import re
from typing import Any

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def refuse_addresses(**given: Any) -> None:
    """Raises ValueError for an address among what was given, by name.

    Example:
      >>> refuse_addresses(source="gs://bucket/parts")
      Traceback (most recent call last):
      ...
      ValueError: source 'gs://bucket/parts' is the address of a bucket or a site...
    """
    for name, value in given.items():
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        if isinstance(text, str) and _URL.match(text):
            raise ValueError(
                f"{name} {text!r} is the address of a bucket or a site, and only local folders "
                "are read; mount the bucket, or copy what is in it"
            )
