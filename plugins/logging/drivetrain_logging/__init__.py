"""Metrics of a run, written to any number of trackers; two of them, `jsonl` and `csv`, are here."""

from __future__ import annotations

from drivetrain_logging.callback import LoggingCallback
from drivetrain_logging.csv import CsvTracker
from drivetrain_logging.jsonl import JsonlTracker

__all__ = ["CsvTracker", "JsonlTracker", "LoggingCallback"]
