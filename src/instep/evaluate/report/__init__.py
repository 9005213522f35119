"""A run, or several, as one self-contained HTML page."""

from instep.evaluate.report.page import write_report

__all__ = ["write_report"]
