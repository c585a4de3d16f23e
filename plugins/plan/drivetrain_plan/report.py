"""A plan on one screen of 80 columns."""

from __future__ import annotations

import textwrap

from drivetrain_plan.planning import DISK, Plan, communication

_ORDER = (
    "parameters",
    "gradients",
    "unreduced gradients",
    "optimizer state",
    "activations",
    "gathered parameters",
    "buffers",
    "batch",
    "temporary",
)
_WIDTH = 80
_BAR = 30


def report(plan: Plan) -> str:
    """The plan for people."""
    found = plan.simulation
    many = f"{plan.ranks} × " if plan.ranks > 1 else ""
    frozen = "" if found.trainable == found.parameters else f", {count(found.trainable)} trained"
    lines = [
        f"{count(found.parameters)} parameters{frozen} · {found.strategy} · {found.precision} · {many}{plan.device.name}",
        "",
    ]
    lines += [said("!", problem) for problem in found.problems] + ([""] if found.problems else [])
    lines += _memory(plan)
    if found.complete:
        lines += ["", *_time(plan)]
    lines += ["", *_rest(plan)]
    lines += ["", "estimated, on these grounds:", *(said("-", text) for text in plan.assumptions)]
    return "\n".join(
        line if len(line) <= _WIDTH else textwrap.fill(line, _WIDTH, subsequent_indent="    ") for line in _flat(lines)
    )


def _flat(lines: list[str]) -> list[str]:
    return "\n".join(lines).split("\n")


def said(mark: str, text: str) -> str:
    """A text after a mark, in 80 columns."""
    return textwrap.fill(text, _WIDTH, initial_indent=f"{mark} ", subsequent_indent="  ", break_on_hyphens=False)


def _memory(plan: Plan) -> list[str]:
    found = plan.simulation
    rows = [(kind, found.at_peak.get(kind, 0)) for kind in _ORDER if found.at_peak.get(kind, 0)]
    most = max((size for _, size in rows), default=1)
    what = "at its peak" if found.complete else "without activations"
    lines = [f"memory of each rank {what}"]
    lines += [f"  {kind:<20}{amount(size):>11}  {'█' * max(1, round(_BAR * size / most))}" for kind, size in rows]
    verdict = _verdict(plan)
    lines.append(f"  {'together':<20}{amount(found.peak):>11}  {verdict}")
    if found.host:
        lines.append(f"  {'in host memory':<20}{amount(sum(found.host.values())):>11}")
    return lines


def _verdict(plan: Plan) -> str:
    peak, usable = plan.simulation.peak, plan.usable
    if plan.fits is None:
        return "whether it fits cannot be said"
    if plan.fits:
        left = "over 99%" if peak < 0.01 * usable else f"{1 - peak / usable:.0%}"
        return f"fits: {left} of {amount(usable)} is left"
    return f"does NOT fit: {amount(peak - usable)} more than {amount(usable)}; try --sweep"


def _time(plan: Plan) -> list[str]:
    low, likely, high = plan.step.total
    lines = [f"{'a step':<22}{'likely':>14}{'at best':>14}{'at worst':>14}"]
    lines.append(f"  {'seconds':<20}{seconds(likely):>14}{seconds(low):>14}{seconds(high):>14}")
    rates = [count(plan.rate(x)) for x in (likely, low, high)]
    lines.append(f"  {plan.unit + '/s':<20}" + "".join(f"{x:>14}" for x in rates))
    if plan.ranks > 1:
        each = [count(plan.rate(x) / plan.ranks) for x in (likely, low, high)]
        lines.append(f"  {plan.unit + '/s/device':<20}" + "".join(f"{x:>14}" for x in each))
    lines.append(
        f"  {count(plan.tokens_per_step)} {plan.unit}: {plan.simulation.accumulation} "
        f"microbatch{'es' if plan.simulation.accumulation > 1 else ''} of {plan.simulation.samples_per_microbatch} "
        "on each rank"
    )
    mfu = "" if plan.mfu is None else f"; MFU {plan.mfu:.1%}"
    lines.append(f"  {count(plan.model_flops_per_token)}FLOP for each, {count(plan.flops_per_token)}FLOP as executed{mfu}")
    rows = communication(plan.simulation)
    for (name, ranks), (times, size) in rows.items():
        lines.append(f"  {name} × {times} among {ranks}: {amount(size)}")
    if rows:
        lines.append(f"  communication {seconds(plan.step.communication)}, of which {seconds(plan.step.exposed)} is waited for")
    return lines


def _rest(plan: Plan) -> list[str]:
    lines = ["the run"]
    if plan.course.steps is not None:
        tokens = f", {count(plan.course.tokens)} tokens" if plan.course.tokens else ""
        turns = ", ".join(f"{what} at {step:,.0f}" for step, what in plan.course.milestones[:-1])
        lines.append(f"  {plan.course.steps:,.0f} steps{tokens}{'; ' + turns if turns else ''}")
    else:
        lines.append(f"  max_duration {plan.config.max_duration}; the steps cannot be counted ahead")
    if plan.hours is not None:
        low, likely, high = plan.hours
        price = f", {plan.cost:,.2f} at {plan.price:g} an hour" if plan.cost is not None else ""
        lines.append(
            f"  {seconds(likely * 3600)} ({seconds(low * 3600)} to {seconds(high * 3600)}), "
            f"{_number(likely * plan.ranks)} device hours{price}"
        )
    beside = []
    if plan.course.evaluations:
        often = f"{plan.course.evaluations:,} evaluation{'s' if plan.course.evaluations > 1 else ''}"
        beside.append(f"{often} {seconds(plan.evaluation.likely)}")
    if plan.course.checkpoints:
        beside.append(
            f"{plan.course.checkpoints:,} checkpoint{'s' if plan.course.checkpoints > 1 else ''} {seconds(plan.saving)}"
        )
    if plan.hours is not None and beside:
        lines.append(f"  of which {', '.join(beside)}")
    whole = plan.simulation.whole
    lines.append(
        f"  a checkpoint is {amount(whole)}: training waits {seconds(plan.stall)}, the disk takes {seconds(whole / DISK)}"
    )
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(size: float) -> str:
    """Bytes, as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def count(number: float) -> str:
    """A number in three digits: 8.03 G."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}".rstrip() if unit else f"{number:.3g}"
        number /= 1000
    return f"{number:.3g} P"


def seconds(value: float) -> str:
    """A time, as a person reads it."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    if value < 7200:
        return f"{value / 60:.3g} min"
    return f"{value / 3600:,.3g} h" if value < 172800 else f"{value / 86400:,.3g} days"
