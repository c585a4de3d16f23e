"""Runs as one HTML file, and as tables in the terminal; read from what they have written, with torch left alone."""

from __future__ import annotations

from drivetrain_report.page import page
from drivetrain_report.reading import Run, read_run

__all__ = ["Run", "page", "read_run"]
