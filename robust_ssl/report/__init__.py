"""What a run leaves for people and for programs: tables, figures, `report.md`, `results.json`."""

from robust_ssl.report.advice import advice
from robust_ssl.report.comparison import ordering, summarize, write_comparison
from robust_ssl.report.figures import (
    figure_epsilon,
    figure_examples,
    figure_sensitivity,
    figure_stability,
)
from robust_ssl.report.leaderboard import write_leaderboard
from robust_ssl.report.page import write_report
from robust_ssl.report.pareto import Point, area_under_front, figure_pareto, front
from robust_ssl.report.results import (
    check_results,
    read_results,
    results_schema,
    write_results,
)
from robust_ssl.report.tables import conclusions, print_table, summary_table
from robust_ssl.report.verdicts import verdict_lines

__all__ = [
    "Point",
    "advice",
    "area_under_front",
    "check_results",
    "conclusions",
    "figure_epsilon",
    "figure_examples",
    "figure_pareto",
    "figure_sensitivity",
    "figure_stability",
    "front",
    "ordering",
    "print_table",
    "read_results",
    "results_schema",
    "summarize",
    "summary_table",
    "verdict_lines",
    "write_comparison",
    "write_leaderboard",
    "write_report",
    "write_results",
]
