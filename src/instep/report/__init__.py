"""The HTML page of one or several runs. It may import `training` and everything below it."""

from instep.report.page import is_report, write_report

__all__ = ["is_report", "write_report"]
