"""Plan before you rent: memory, time and cost of a run, simulated for any number of ranks on one machine without the hardware."""

from __future__ import annotations

from drivetrain_plan.planning import Plan, plan
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.simulate import Simulation
from drivetrain_plan.sweep import Sweep, sweep

__all__ = ["DeviceProfile", "Plan", "Simulation", "Sweep", "load_profile", "plan", "sweep"]
