"""Where an encoder comes from, and whether it still is what it was: ten checks, locks, statements.

`examine` makes the checks, always ten, each passed, failed or absent with the reason.  `lock` keeps
what an encoder is now; `verify` compares it later.
"""

from robust_ssl.provenance.check import (
    NAMES,
    Check,
    as_json,
    differs,
    holds,
    is_missing,
    show,
)
from robust_ssl.provenance.examination import examine
from robust_ssl.provenance.lock_files import read_lock, write_lock
from robust_ssl.provenance.locks import lock, needed, verify
from robust_ssl.provenance.materials import bill_of_materials
from robust_ssl.provenance.source import Source, open_source
from robust_ssl.provenance.statement import statement, write_beside

__all__ = [
    "NAMES",
    "Check",
    "Source",
    "as_json",
    "bill_of_materials",
    "differs",
    "examine",
    "holds",
    "is_missing",
    "lock",
    "needed",
    "open_source",
    "read_lock",
    "show",
    "statement",
    "verify",
    "write_beside",
    "write_lock",
]
