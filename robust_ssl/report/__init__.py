"""What a run leaves for people and for programs: `results.json`, `report.md`, tables, figures."""

from robust_ssl.report import claims, results
from robust_ssl.report.comparison import summarize
from robust_ssl.report.figures import (
    draw_examples,
    figure_epsilon,
    figure_examples,
    figure_sensitivity,
    figure_stability,
)
from robust_ssl.report.pages import print_summary, write_report
from robust_ssl.report.pareto import Point, area_under_front, figure_pareto, front, points_of
from robust_ssl.report.sentences import advice, answer, verdict_lines
from robust_ssl.report.tables import budget, csv_text, label, markdown_table, names

__all__ = [
    "Point",
    "advice",
    "answer",
    "area_under_front",
    "budget",
    "claims",
    "csv_text",
    "draw_examples",
    "figure_epsilon",
    "figure_examples",
    "figure_pareto",
    "figure_sensitivity",
    "figure_stability",
    "front",
    "label",
    "markdown_table",
    "names",
    "points_of",
    "print_summary",
    "results",
    "summarize",
    "verdict_lines",
    "write_report",
]
