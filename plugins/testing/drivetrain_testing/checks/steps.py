"""Ordinary steps, those that do not log, evaluate or save: nothing on their way waits, writes or talks to other ranks."""

from __future__ import annotations

from drivetrain import DrivetrainError
from drivetrain_testing.kit import ORDINARY, check
from drivetrain_testing.subject import Subject
from drivetrain_testing.watching import ACCELERATOR, PretendedRanks, Watch, pretended_group

_LATER = "do it in on_log or on_evaluate_end, or in on_every with a period of its own"


@check(*ORDINARY)
def steps_wait_for_no_device(subject: Subject) -> None:
    """No tensor is read by the host: on an accelerator each such read stops the queue of work."""
    found = _watch(subject, "reads")
    subject.require(
        not found,
        f"an ordinary step reads a tensor's values: {_shown(found)}",
        f"keep them on the device (torch.where, "
        f"in-place arithmetic, ctx.log with the tensor itself) or {_LATER}, where ctx.metrics has floats",
    )


@check(*ORDINARY)
def steps_write_no_file(subject: Subject) -> None:
    """No file is opened for writing, made or removed, and nothing is printed."""
    found = _watch(subject, "writes")
    subject.require(not found, f"an ordinary step writes: {_shown(found)}", f"{_LATER}, on rank 0 (ctx.is_main)")


@check(*(kind for kind in ORDINARY if kind != "strategy"))
def steps_call_no_collective(subject: Subject) -> None:
    """No rank waits for another, besides what the strategy does for gradients."""
    watch = Watch(what="collectives")
    try:
        with pretended_group():  # so that what asks for a group finds one
            subject.trainer(watch, strategy=PretendedRanks(), per_device_batch_size=8).train()
    except DrivetrainError as error:
        subject.fail(
            f"a run of several processes is refused: {error}", "state it as unsupported, and say so in its documentation"
        )
    subject.require(not watch.found, f"an ordinary step calls a collective: {_shown(watch.found)}", f"{_LATER}, on every rank")


@check("callback", "tracker", "scheduler")
def steps_cost_few_calls(subject: Subject) -> None:
    """The plugin adds at most `budget` calls of Python to an ordinary step. Calls are counted, times are not taken."""
    counts = []
    for make in (subject.trainer, subject.plain_trainer):
        watch = Watch(what="calls")
        make(watch).train()
        counts.append(watch.calls / (watch.last - watch.first + 1))
    added = counts[0] - counts[1]
    subject.require(
        added <= subject.budget,
        f"it adds {added:.0f} calls to an ordinary step, {subject.budget} are allowed",
        f"{_LATER}; work on all tensors at once (torch._foreach_…) instead of one by one",
    )


def _watch(subject: Subject, what: str) -> list[str]:
    watch = Watch(what=what)
    subject.trainer(watch, **({"device": str(ACCELERATOR)} if what == "reads" and subject.device == "cpu" else {})).train()
    return watch.found


def _shown(found: list[str]) -> str:
    first, *rest = dict.fromkeys(found) or [""]
    return f"{first} and {len(rest)} more places" if rest else first
