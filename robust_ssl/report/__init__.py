"""What a run leaves for people and for programs: `results.json`, `report.md`, tables, figures."""

from robust_ssl.report import announced, claims, results
from robust_ssl.report.comparison import summarize
from robust_ssl.report.figures import (
    attempt,
    draw_examples,
    figure_epsilon,
    figure_examples,
    figure_sensitivity,
    figure_stability,
    files_of,
)
from robust_ssl.report.gains import gain_shares, share_rows
from robust_ssl.report.pages import print_summary, write_report
from robust_ssl.report.pareto import Point, area_under_front, figure_pareto, front, points_of
from robust_ssl.report.screening import screening_page
from robust_ssl.report.sentences import advice, answer, verdict_lines
from robust_ssl.report.tables import budget, label, names
from robust_ssl.report.text import csv_text, markdown_table

__all__ = [
    "Point",
    "advice",
    "announced",
    "answer",
    "area_under_front",
    "attempt",
    "budget",
    "claims",
    "csv_text",
    "draw_examples",
    "figure_epsilon",
    "figure_examples",
    "figure_pareto",
    "figure_sensitivity",
    "figure_stability",
    "files_of",
    "front",
    "gain_shares",
    "label",
    "markdown_table",
    "names",
    "points_of",
    "print_summary",
    "results",
    "screening_page",
    "share_rows",
    "summarize",
    "verdict_lines",
    "write_report",
]
