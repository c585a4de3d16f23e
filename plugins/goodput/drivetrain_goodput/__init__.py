"""Where every second of a run went."""

from __future__ import annotations

from drivetrain_goodput.callback import GoodputCallback
from drivetrain_goodput.sittings import TOTALS_FILE, Sitting, read_sittings

__all__ = ["TOTALS_FILE", "GoodputCallback", "Sitting", "read_sittings"]
