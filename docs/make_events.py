"""Makes docs/events.md from the hook specifications and the context: `python docs/make_events.py`. A test compares the two."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from drivetrain import CallbackContext, hookspecs
from drivetrain.hookspecs import EVENTS, OF_EACH_STEP, EventSpecs, MakeSpecs

PAGE = Path(__file__).with_name("events.md")

# What reading or calling costs; all else is free. tests/core/test_events_page.py holds the run to it.
SYNC, COLLECTIVE = "waits for the device", "collective: on all ranks alike"
COSTS = {
    "loss": f"{SYNC}, once a step",
    "lr": "free; waits for the device where an optimizer keeps its rate in a tensor there",
    "run_dir": "makes a directory when it is first read",
    "gradients_of": f"a forward and backward of the whole step; {COLLECTIVE}",
    "loss_of": "a forward",
    "rehearsal": f"{SYNC}: a copy of the state, and the steps; {COLLECTIVE}",
    "resize": "opens the data anew",
    "state_dict": COLLECTIVE,
    "load_state_dict": COLLECTIVE,
    "checkpoint_saved": "what the listeners cost",
}
LOGGING = (
    "What a logging step costs.",
    "Losses and whatever `ctx.log` was given stay on the device, each labelled by the step that the log belongs to. A logging step stacks "
    "them and reads them in one transfer; the host waits until the device has done the steps that it was given so far, because "
    "`on_log` promises numbers. An accelerator idles from then until the next kernel arrives: about the time in which the host launches "
    "a step's first kernels, plus the listeners of `on_log`; with several ranks also one all-reduce of a number. Make "
    "`log_interval` longer where that shows (`logging` in the table of goodput).",
)
NOT_SHOWN = ("run",)  # for the engine's own use


def page() -> str:
    """The text of the page."""
    return "\n".join([*_beginning(), *_events(), *_others(), *_context()]) + "\n"


def _beginning() -> Iterator[str]:
    _, loop, *rules = inspect.cleandoc(hookspecs.__doc__ or "").split("\n\n")
    yield from ("<!-- Made by docs/make_events.py from core/drivetrain/hookspecs.py and context.py; do not edit. -->", "")
    yield from ("# Events", "", "Every point of a run at which a plugin can take part, in order:", "")
    yield from ("```text", *(line.removeprefix("    ") for line in loop.splitlines()), "```")
    for rule in rules:
        title, _, text = rule.partition(". ")
        yield from ("", f"**{title}.** {text}")
    yield from ("", f"**{LOGGING[0]}** {LOGGING[1]}")
    yield from (
        "",
        "To see who listens to what in your run, and in which order: `Trainer.listeners()`. To see who breaks the rules:",
    )
    yield "`drivetrain train FILE --audit`."


def _events() -> Iterator[str]:
    yield from ("", "## The events of a run", "", "Each has the one argument `ctx` and returns nothing.", "")
    rows = []
    for name in EVENTS:
        sees, may = _told(getattr(EventSpecs, name))
        rows.append((f"`{name}`", sees, may or "—", _waits(name), _talks(name)))
    yield from _table(("event", "when, and what is there", "may", "waiting, files", "collectives"), rows)


def _waits(event: str) -> str:
    return "would cost every step" if event in OF_EACH_STEP else "yes"


def _talks(event: str) -> str:
    failed = {
        "on_exception": "no: the others may not be there",
        "on_run_end": "when `ctx.exception` is None, on all ranks alike",
    }
    return failed.get(event, "would cost every step" if event in OF_EACH_STEP else "on all ranks alike")


def _told(hook: Any) -> tuple[str, str]:
    """What a docstring says, apart from what it allows: its sentences that begin with "May"."""
    sentences = re.split(r"(?<=[.)])\s+(?=[A-Z])", " ".join((inspect.getdoc(hook) or "").split()))
    allowed = [sentence for sentence in sentences if sentence.startswith("May ")]
    return " ".join(s for s in sentences if s not in allowed), " ".join(s[4].upper() + s[5:] for s in allowed)


def _others() -> Iterator[str]:
    yield from ("", "## Choosing the parts", "")
    yield from (
        "Called once while the run is put together. One component at most may answer, except for wrappers of listeners.",
        "",
    )
    hooks = [getattr(MakeSpecs, name) for name in vars(MakeSpecs) if name.startswith("make_")]
    rows = [(f"`{h.__name__}`", " ".join(_told(h)).strip(), f"`{h.__annotations__['return']}`") for h in hooks]
    yield from _table(("hook", "what it does", "returns"), rows)


# -- the context ---------------------------------------------------------------------------------------------------------------


def _context() -> Iterator[str]:
    yield from ("", "## What `ctx` has", "")
    yield from ("Free means: a Python value or a tensor at hand, no waiting for the device, no collective, no file.", "")
    for title, rows in _attributes().items():
        yield from (f"### {title[0].upper()}{title[1:]}", "")
        shown = [(f"`{name}`", _cell(what), f"`{_cell(kind)}`", COSTS.get(name, "free")) for name, kind, what in rows]
        yield from (*_table(("", "what it is", "type", "cost"), shown), "")
    yield from ("### Methods and properties", "")
    yield from _table(("", "what it does", "cost"), list(_methods()))


def _attributes() -> dict[str, list[tuple[str, str, str]]]:
    """By the titles of the class: name, type, comment."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    title = ""
    for line in inspect.getsource(CallbackContext).splitlines():
        if match := re.match(r"    # -- (.+)", line):
            title = match[1]
            found[title] = []
        elif (match := re.match(r"    ([a-z]\w*): ([^=#]+?)(?: = [^#]*?)?(?:  # (.*))?$", line)) and match[1] not in NOT_SHOWN:
            found[title].append((match[1], match[2], match[3] or ""))
    return found


def _methods() -> Iterator[tuple[str, str, str]]:
    for name, member in vars(CallbackContext).items():
        if name.startswith("_") or not (callable(member) or isinstance(member, property)):
            continue
        call = "" if isinstance(member, property) else "()"
        text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
        yield f"`{name}{call}`", _cell(text), COSTS.get(name, "free")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield from (f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
