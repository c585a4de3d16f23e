"""`drivetrain plan`."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

from drivetrain import ConfigError, Problem, load_training_config


class PlanCommand:
    """Memory, time and cost of the run that a configuration means."""

    help = "say what a run needs before it is started: memory, time, cost, for any number of devices"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", type=Path, nargs="?", help="the configuration of the run")
        parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="values in place of the file's")
        parser.add_argument("--ranks", type=int, default=None, help="processes, one for each device (1)")
        parser.add_argument("--device", default="auto", help="h100, h200, a100, l40s, 4090, mi300x, cpu or a file.toml")
        parser.add_argument("--price", type=float, help="of one device for one hour")
        parser.add_argument("--sweep", action="store_true", help="try strategies, batch sizes, optimizers and ranks")
        parser.add_argument("--curve", metavar="FILE", type=Path, help="draw 1 to 4,096 ranks as .png or .html")
        parser.add_argument("--write", metavar="FILE", type=Path, help="with --sweep: write the chosen configuration")
        parser.add_argument("--calibrate", action="store_true", help="measure this machine and keep its profile")
        parser.add_argument("--json", action="store_true", help="as JSON, in bytes and seconds")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the plan; 1 when it does not fit, or something could not be simulated."""
        warnings.simplefilter("ignore")  # torch's about the simulated tensors; problems of the run are in the plan
        if arguments.calibrate:
            _calibrate()
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


def _calibrate() -> None:
    from drivetrain_plan.calibrate import calibrate, save
    from drivetrain_plan.profiles import stored

    path = save(calibrate(), stored())
    print(f"measured this machine; its profile is in {path}")
