"""Pages, charts and tables of results; sole home of jinja2 and matplotlib."""

from __future__ import annotations

from kmine.report.comparison import Comparison, ComparisonRow
from kmine.report.html import write_report
from kmine.report.inputs import CATEGORIES, CSV_COLUMNS, Calibrated, Category, GalleryItem, Report, RoundRow
from kmine.report.table import render_table

__all__ = [
    "CATEGORIES",
    "CSV_COLUMNS",
    "Calibrated",
    "Category",
    "Comparison",
    "ComparisonRow",
    "GalleryItem",
    "Report",
    "RoundRow",
    "render_table",
    "write_report",
]
