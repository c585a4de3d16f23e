"""`python -m drivetrain_cli` is the `drivetrain` program."""

from __future__ import annotations

import sys

from drivetrain_cli.app import main

sys.exit(main())
