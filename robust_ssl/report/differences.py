"""By how much methods differ on the same images, and whether chance may be the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl.evaluation import difference, wilson_interval
from robust_ssl.evaluation.checks.result import NOT_TRUSTED
from robust_ssl.report.columns import SHARES
from robust_ssl.report.leaderboard import markdown_table
from robust_ssl.report.tables import method_name


def decided(found: Mapping[str, Any], other: Mapping[str, Any], by: str) -> bool:
    """Whether two methods differ in a share by more than chance.

    Where it is known what happened to each image, the difference must be more than the half-width
    of its 95 % interval (`robust_ssl.evaluation.difference`) and than the deviations of both over
    the seeds.  Else what is known of the two (`interval`) must not overlap, which asks for more.

    Args:
      found: A method's part of what `summarize` returned.
      other: Another's.
      by: The share, a name in `SHARES`.
    """
    known = differ(found, other, by)
    if known is not None:
        return abs(known[0]) > known[1]
    a, b = interval(found, by), interval(other, by)
    return a[1] < b[0] or b[1] < a[0]


def differ(
    found: Mapping[str, Any], other: Mapping[str, Any], by: str
) -> tuple[float, float] | None:
    """Returns by how much a method exceeds another, and what chance may do; None where not known.

    Args:
      found: A method's part of what `summarize` returned.
      other: Another's.
      by: The share, a name in `SHARES`.

    Returns:
      The difference and the larger of its 95 % half-width over the images, which are the same for
      both, and the sum of both deviations over the seeds.
    """
    mine, others = (each["right"].get(by) for each in (found, other))
    if mine is None or others is None or len(mine) != len(others):
        return None
    value, half = difference(mine, others)
    return value, max(half, (found[by].deviation or 0) + (other[by].deviation or 0))


def interval(found: Mapping[str, Any], by: str) -> tuple[float, float]:
    """Returns what is known of a share: its 95 % interval over images, and its deviation."""
    mean, deviation, _ = found[by]
    images = found["autoattack_images" if by == "autoattack" else "images"]
    low, high = wilson_interval(round(mean * images), images)
    return min(low, mean - (deviation or 0)), max(high, mean + (deviation or 0))


def differences(summary: Mapping[str, Mapping[str, Any]], leader: str) -> list[dict[str, str]]:
    """Returns how every method differs from one of them, where it is known image by image.

    Args:
      summary: What `robust_ssl.report.summarize` returned.
      leader: The method that the others are held against.

    Returns:
      For each method and share ``method``, ``share``, ``difference`` and ``half_width`` (shares,
      with their sign), ``decided``: whether that is more than chance, and both verdicts' mark.
    """
    lines = []
    for name, found in summary.items():
        marked = NOT_TRUSTED in (found["verdict"], summary[leader]["verdict"])
        for by in SHARES:
            known = differ(found, summary[leader], by) if name != leader else None
            if known is None:
                continue
            lines.append(
                {
                    "method": name,
                    "share": by,
                    "difference": f"{known[0]:.6f}",
                    "half_width": f"{known[1]:.6f}",
                    "decided": "yes" if abs(known[0]) > known[1] else "no",
                    "verdict": NOT_TRUSTED if marked and by != "clean" else "",
                }
            )
    return lines


def differences_table(lines: Sequence[Mapping[str, str]], leader: str) -> str:
    """Returns what `differences` found as a Markdown table with its heading and what it means."""
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        row = rows.setdefault(line["method"], {"method": method_name(line["method"])})
        row |= dict.fromkeys((c.heading for c in SHARES.values() if c.heading not in row), "n/a")
        value, half = (100 * float(line[name]) for name in ("difference", "half_width"))
        text = f"{value:+.1f} ± {half:.1f}"
        text = f"**{text}**" if line["decided"] == "yes" else text
        row[SHARES[line["share"]].heading] = text + (" NOT TRUSTED" if line["verdict"] else "")
    return (
        f"## Against {method_name(leader)}\n\n"
        f"{markdown_table(list(rows.values()))}\n\n"
        f"Points more than {method_name(leader)} has on the same images, ± the 95 % half-width; "
        "with several seeds at least both deviations over them. **Bold**: more than chance, each "
        "pair looked at by itself: of twenty comparisons without a difference one is bold too."
    )
