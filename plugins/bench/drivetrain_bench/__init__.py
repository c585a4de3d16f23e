"""What Drivetrain costs a training over a loop by hand, and what would make it faster: measured, on one's own configuration."""

from __future__ import annotations

from drivetrain_bench.measure import Speed, bench
from drivetrain_bench.report import Report

__all__ = ["Report", "Speed", "bench"]
