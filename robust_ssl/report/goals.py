"""What this project wants of a defence, held against what a comparison has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl.evaluation.checks.result import NOT_TRUSTED
from robust_ssl.report.comparison import SHARES, interval
from robust_ssl.report.tables import method_name

Summary = Mapping[str, Mapping[str, Any]]

SUITES = {
    "robust_public": "accuracy under the suite crafted on the public encoder",
    "robust_hardened": "accuracy under the suite crafted again on the hardened model",
}


def cheap_robustness(
    summary: Summary,
    *,
    by: str = "robust_hardened",
    usual: str = "usual",
    leader: str = "gen_af",
    share: float = 0.9,
    max_cost: float = 1.5,
) -> str:
    """Says which methods have nearly all of a leader's robustness at little cost.

    Args:
      summary: What `robust_ssl.report.summarise` returned, with both.
      by: Under which suite, a key of `SUITES`.
      usual: From whose robust accuracy gains are counted.
      leader: Whose gain is to be reached.
      share: Of that gain which is enough.
      max_cost: Training time that may be taken, relative to the comparison's reference.

    Returns:
      One sentence: the methods that do, with their numbers, or that none does.  What is not trusted
      does not count.
    """
    low, high = (summary[name][by].mean for name in (usual, leader))
    goal = (
        f"At least {share:.0%} of {method_name(leader)}'s gain over {method_name(usual)} in "
        f"{SUITES[by]}, at a cost of at most {max_cost:g}x"
    )
    doubted = _not_trusted(summary, (usual, leader))
    if doubted:
        return f"{goal}: cannot be judged, NOT TRUSTED: {doubted}."
    if high <= low:
        return f"{goal}: {method_name(leader)} gains nothing ({100 * (high - low):+.1f} points)."
    slack = 1e-9
    reached = [
        f"{method_name(name)} ({(found[by].mean - low) / (high - low):.0%} of the gain, "
        f"cost {found['cost_factor'].mean:.2f}x)"
        for name, found in _others(summary, (usual, leader)).items()
        if found[by].mean - low >= share * (high - low) - slack
        and (found["cost_factor"].mean or float("inf")) <= max_cost + slack
    ]
    all_of_it = f"all of it is {100 * (high - low):.1f} points"
    return f"{goal} ({all_of_it}): {', '.join(reached) or 'no method has that'}."


def better_on_all(summary: Summary, *, leader: str = "gen_af") -> str:
    """Says which methods are above a leader in clean and in robust accuracy.

    Args:
      summary: What `robust_ssl.report.summarise` returned, with the leader.
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
        unsure = any(interval(found, b)[0] <= interval(summary[leader], b)[1] for b in measured)
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
