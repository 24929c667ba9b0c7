"""Puts the announced claims of several working directories together: on which every set agrees.

    python tools/claims_on_every_set.py runs/evidence_cifar10 runs/evidence_tiny runs/evidence_gtsrb

A line for each claim: its difference on each set with the 95 % interval and the one-sided p-value
before any correction, and the p-value over all sets (`robust_ssl.report.announced.on_every_set`).
"""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl import report
from robust_ssl.report import announced


def main(arguments: list[str] | None = None) -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    workdirs = parser.parse_args(arguments).workdirs
    try:
        comparisons = [_comparison(path) for path in workdirs]
        claims = announced.on_every_set(comparisons)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = [path.name for path in workdirs]
    if len({*names}) < len(names):  # columns of one name could not be told apart
        names = list(map(str, workdirs))
    print("| claim |", " | ".join(names), "| p over all sets |")
    print("| --- |" + " --- |" * len(names) + " ---: |")
    for place, (claim, p) in enumerate(claims):
        cells = [_cell(comparison, place) for comparison in comparisons]
        words = f"{claim['more']} against {claim['than']}, {claim['by']}"
        print("|", words, "|", " | ".join(cells), f"| {p:.2g} |")


def _comparison(workdir: pathlib.Path) -> Mapping[str, Any]:
    comparison = report.results.read(workdir / "results.json")["comparison"]
    if comparison is None:
        raise ValueError(f"{workdir}: nothing was compared; run the stage compare")
    return comparison


def _cell(comparison: Mapping[str, Any], place: int) -> str:
    one = [one for one in comparison["claims"] if "more" in one["claim"]][place]
    judged = one["measured"]
    mean, low, high = (f"{100 * judged[name]:+.1f}" for name in ("difference", "low", "high"))
    mark = report.claims.mark(one["claim"], report.summarize(comparison["rows"])).rstrip(".")
    return f"{mean} ({low} to {high}), p {judged['p']:.2g}{mark}"


if __name__ == "__main__":
    main()
