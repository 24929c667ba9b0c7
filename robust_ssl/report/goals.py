"""What this project wants of a defence, held against what a comparison has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl.evaluation.checks.result import NOT_TRUSTED
from robust_ssl.report.columns import SHARES
from robust_ssl.report.differences import decided
from robust_ssl.report.tables import method_name

Summary = Mapping[str, Mapping[str, Any]]

ROBUST = "accuracy in the worst case over both suites"


def cheap_robustness(
    summary: Summary,
    *,
    usual: str = "usual",
    leader: str = "gen_af",
    share: float = 0.9,
    max_cost: float = 1.5,
    reference: str = "full",
) -> str:
    """Says which methods have nearly all of a leader's robustness at little cost.

    Args:
      summary: What `robust_ssl.report.summarize` returned, with both.
      usual: From whose robust accuracy gains are counted.
      leader: Whose gain is to be reached.
      share: Of that gain which is enough.
      max_cost: Training time that may be taken, relative to the comparison's reference.
      reference: That one's name.

    Returns:
      One sentence: the methods that do, with their numbers, or that none does.  What is not trusted
      does not count.
    """
    low, high = (summary[name]["robust_worst"].mean for name in (usual, leader))
    goal = (
        f"At least {share:.0%} of {method_name(leader)}'s gain over {method_name(usual)} in "
        f"{ROBUST}, at a cost of at most {max_cost:g}x that of {method_name(reference)}"
    )
    doubted = _not_trusted(summary, (usual, leader))
    if doubted:
        return f"{goal}: cannot be judged, NOT TRUSTED: {doubted}."
    if high <= low:
        return f"{goal}: {method_name(leader)} gains nothing ({100 * (high - low):+.1f} points)."
    slack, reached = 1e-9, []
    for name, found in _others(summary, (usual, leader)).items():
        gain, cost = (found["robust_worst"].mean - low) / (high - low), found["cost_factor"].mean
        if gain >= share - slack and (cost or float("inf")) <= max_cost + slack:
            reached.append(f"{method_name(name)} ({gain:.0%} of the gain, cost {cost:.2f}x)")
    all_of_it = f"all of it is {100 * (high - low):.1f} points"
    return f"{goal} ({all_of_it}): {', '.join(reached) or 'no method has that'}."


def better_on_all(summary: Summary, *, leader: str = "gen_af") -> str:
    """Says which methods are above a leader in clean and in robust accuracy.

    Args:
      summary: What `robust_ssl.report.summarize` returned, with the leader.
      leader: What is to be beaten, on AutoAttack too where both were measured.

    Returns:
      One sentence: the methods that are, with their differences and whether chance can be the
      reason, or that none is.  What is not trusted does not count.
    """
    goal = (
        f"Better than {method_name(leader)} in clean accuracy, in accuracy under both suites and, "
        "where measured, in accuracy under AutoAttack"
    )
    doubted = _not_trusted(summary, (leader,))
    if doubted:
        return f"{goal}: cannot be judged, NOT TRUSTED: {doubted}."
    better = []
    for name, found in _others(summary, (leader,)).items():
        measured = [by for by in SHARES if found[by].n and summary[leader][by].n]
        more = {by: found[by].mean - summary[leader][by].mean for by in measured}
        if min(more.values()) <= 0:
            continue
        numbers = ", ".join(f"{SHARES[by].heading} {100 * d:+.1f}" for by, d in more.items())
        unsure = not all(decided(found, summary[leader], by) for by in measured)
        chance = "; not all of it more than chance" if unsure else ""
        better.append(f"{method_name(name)} ({numbers} points{chance})")
    return f"{goal}: {', '.join(better) or 'no method is'}."


def _others(summary: Summary, names: Sequence[str]) -> Summary:
    return {
        name: found
        for name, found in summary.items()
        if name not in names and found["verdict"] != NOT_TRUSTED
    }


def _not_trusted(summary: Summary, names: Sequence[str]) -> str:
    return ", ".join(method_name(name) for name in names if summary[name]["verdict"] == NOT_TRUSTED)
