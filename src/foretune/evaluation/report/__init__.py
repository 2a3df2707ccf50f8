"""The report of a comparison: one HTML file that needs nothing else, and its pictures."""

from foretune.evaluation.report.page import write_report
from foretune.evaluation.report.summary import summary_rows

__all__ = ["summary_rows", "write_report"]
