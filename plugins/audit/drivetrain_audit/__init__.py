"""Who made an ordinary step wait for the device, write a file or call a collective."""

from __future__ import annotations

from drivetrain_audit.callback import AuditCallback
from drivetrain_audit.findings import Finding

__all__ = ["AuditCallback", "Finding"]
