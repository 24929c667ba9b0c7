"""From the text of a config to values: the one grammar, read by one function.

A function with options is ``{"function": "module:function", **options}``, or the bare name where
there are none; everything else is numbers, texts, lists and mappings.  Whatever means nothing is
refused here, with near names.
"""

from robust_ssl.build.code import code_of
from robust_ssl.build.entries import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    annotations,
    check_known,
    inside,
    name_of,
    near,
    read,
    read_entries,
    text_of,
    without_none,
)
from robust_ssl.build.functions import Function, names_function, resolve
from robust_ssl.build.notes import happened_in, short_name
from robust_ssl.build.renewal import as_loaded

__all__ = [
    "Count",
    "Function",
    "Natural",
    "NotNegative",
    "Positive",
    "Range",
    "Seed",
    "Share",
    "annotations",
    "as_loaded",
    "check_known",
    "code_of",
    "happened_in",
    "inside",
    "name_of",
    "names_function",
    "near",
    "read",
    "read_entries",
    "resolve",
    "short_name",
    "text_of",
    "without_none",
]
