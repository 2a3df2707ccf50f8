"""The report of a comparison: one self-contained HTML file, and its figures as SVG files."""

from foretune.evaluation.report.page import write_report
from foretune.evaluation.report.summary import summary_rows

__all__ = ["summary_rows", "write_report"]
