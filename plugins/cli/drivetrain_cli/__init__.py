"""The command line of Drivetrain: `drivetrain train run.toml`."""

from __future__ import annotations

from drivetrain_cli.app import main

__all__ = ["main"]
