"""`drivetrain plan`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

from drivetrain import ConfigError, Problem, Trainer, TrainingConfig, load_training_config


class PlanCommand:
    """Memory, time and cost of the run that a configuration means."""

    help = "say what a run needs before it is started: memory, time, cost, for any number of devices"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", type=Path, nargs="?", help="the configuration of the run")
        parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="values in place of the file's")
        parser.add_argument("--ranks", type=int, default=None, help="processes, one for each device (1)")
        parser.add_argument("--device", default="auto", help="h100, h200, a100, l40s, 4090, mi300x, cpu or file.toml")
        parser.add_argument("--price", type=float, help="of one device for one hour")
        parser.add_argument("--sweep", action="store_true", help="try strategies, batch sizes, optimizers and ranks")
        parser.add_argument("--curve", metavar="FILE", type=Path, help="draw 1 to 4,096 ranks as .png or .html")
        parser.add_argument("--write", metavar="FILE", type=Path, help="with --sweep: write the chosen configuration")
        parser.add_argument(
            "--calibrate", action="store_true", help="measure this machine's accelerator (--device cpu: its CPU)"
        )
        parser.add_argument("--json", action="store_true", help="as JSON, in bytes and seconds")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the plan; 1 when it does not fit, or something could not be simulated."""
        warnings.simplefilter("ignore")  # torch's about the simulated tensors; problems of the run are in the plan
        _check(arguments)
        if arguments.calibrate:
            _calibrate(arguments.device)
            if arguments.file is None:
                return 0
        if arguments.file is None:
            raise ConfigError([Problem("FILE", "is missing: drivetrain plan run.toml")])
        config = load_training_config(arguments.file, overrides=arguments.overrides)
        if arguments.sweep:
            from drivetrain_plan.sweep import command

            return command(config, arguments)
        if arguments.curve is not None:
            from drivetrain_plan.curve import command as draw

            return draw(config, arguments)
        from drivetrain_plan.planning import plan

        found = plan(config, 1 if arguments.ranks is None else arguments.ranks, arguments.device, arguments.price)
        print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
        return 0 if found.fits and not found.simulation.problems else 1

    @staticmethod
    def plan(run: Trainer | TrainingConfig, *, sweep: bool = False, **options: Any) -> Any:
        """What `Trainer.plan` gives: a `Plan`, or with `sweep` a `Sweep`; see `plan` and `sweep` of this distribution."""
        if sweep:
            from drivetrain_plan.sweep import sweep as search

            return search(run, **options)
        from drivetrain_plan.planning import plan

        ranks = options.pop("ranks", None)
        return plan(run, 1 if ranks is None else ranks, **options)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would be ignored.

    Raises:
        ConfigError: naming every such option.
    """
    alone = "is nothing that a scaling curve takes"
    wrong = [
        ("--write", "goes with --sweep", arguments.write is not None and not arguments.sweep),
        ("--curve", "does not go with --sweep", arguments.curve is not None and arguments.sweep),
        ("--ranks", f"{alone}: it is drawn for 1 to 4,096", arguments.curve is not None and arguments.ranks is not None),
        ("--price", alone, arguments.curve is not None and arguments.price is not None),
        ("--ranks", f"must be at least 1, got {arguments.ranks}", arguments.ranks is not None and arguments.ranks < 1),
        (
            "--price",
            f"must be at least 0, got {arguments.price}",
            arguments.price is not None and not 0 <= arguments.price < math.inf,
        ),
    ]
    if problems := [Problem(option, message) for option, message, is_so in wrong if is_so]:
        raise ConfigError(problems)


def _calibrate(device: str) -> None:
    from drivetrain_plan.calibrate import calibrate, save
    from drivetrain_plan.profiles import stored

    profile = calibrate(device)
    path = save(profile, stored())
    print(f"measured {profile.name}; its profile is in {path}", file=sys.stderr)
