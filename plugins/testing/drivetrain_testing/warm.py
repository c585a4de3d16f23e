"""Imported by the server that test processes are forked from: what they would each spend seconds on importing.

Nothing here runs a backward: threads of autograd do not survive a fork.
"""

from __future__ import annotations

from drivetrain_testing.harness import tiny_trainer

tiny_trainer(steps=1)
