"""Kill a run for real, resume it, and compare it bit by bit with an uninterrupted one."""

from __future__ import annotations

from drivetrain_verify.compare import Divergence, Record, first_divergence, unrepeatable
from drivetrain_verify.trial import Report, verify_resume

__all__ = ["Divergence", "Record", "Report", "first_divergence", "unrepeatable", "verify_resume"]
