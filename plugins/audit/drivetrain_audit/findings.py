"""What was seen, step by step, and the table of what remains when the steps that log, evaluate or save are taken away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from attrs import define, field, frozen

from drivetrain_audit.place import Place


@frozen
class Finding:
    """One line of one plugin: what it does (`kind`: reads a tensor, collective, writes a file), how often, on which steps."""

    place: Place
    kind: str
    what: str
    times: int
    steps: int
    first: int
    last: int

    def __str__(self) -> str:
        at = f"{self.place.file}:{self.place.line}"
        return f"{self.place.plugin} ({at}): {self.kind}, {self.what}; {self.times} times on {self.steps} steps"


@define
class _Seen:
    times: int = 0
    steps: int = 0
    first: int = 0
    last: int = 0


@define
class Findings:
    """Counts by place and act, of the steps that turned out to be ordinary ones."""

    ordinary: int = 0
    _busy: set[int] = field(factory=set)
    _open: dict[int, Counter[tuple[Place, str, str]]] = field(factory=dict)
    _seen: dict[tuple[Place, str, str], _Seen] = field(factory=dict)

    def begin(self, step: int) -> None:
        """A step begins; those before it are settled."""
        self.settle()
        self._open[step] = Counter()

    def add(self, step: int, place: Place, kind: str, what: str) -> None:
        """Something was seen; on a step that was not begun, such as the first, it does not count."""
        if step in self._open:
            self._open[step][place, kind, what] += 1

    def busy(self, step: int) -> None:
        """This step logs, evaluates or saves."""
        self._busy.add(step)

    def settle(self) -> None:
        """Take over what the ordinary ones among the finished steps have done."""
        for step, counts in self._open.items():
            if step in self._busy:
                continue
            self.ordinary += 1
            for act, times in counts.items():
                seen = self._seen.setdefault(act, _Seen(first=step))
                seen.times, seen.steps, seen.last = seen.times + times, seen.steps + 1, step
        self._open.clear()
        self._busy.clear()

    def found(self) -> list[Finding]:
        """All findings, the most frequent first."""
        rows = [Finding(*act, seen.times, seen.steps, seen.first, seen.last) for act, seen in self._seen.items()]
        return sorted(rows, key=lambda row: (-row.times, row.place.plugin, row.place.file, row.place.line))


def table(found: list[Finding], ordinary: int) -> Iterator[str]:
    """The lines that a person reads at the end."""
    steps = f"{ordinary} ordinary step{'s' * (ordinary != 1)}"
    if not ordinary:
        yield "audit: no ordinary step was seen: each one logged, evaluated or saved. Give a longer log_interval."
        return
    if not found:
        yield f"audit: nothing waited for the device, wrote a file or called a collective on {steps}"
        return
    yield f"audit: {len(found)} finding{'s' * (len(found) > 1)} on {steps}, which neither log nor evaluate nor save"
    rows = [("plugin", "where", "what", "times", "on steps")]
    for row in found:
        where = f"{row.place.file}:{row.place.line}" + (f" in {row.place.event}" if row.place.event else "")
        span = f"{row.first}–{row.last}" if row.last > row.first else str(row.first)
        rows.append((row.place.plugin, where, f"{row.kind}: {row.what}", str(row.times), f"{span} ({row.steps})"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for plugin, where, what, times, span in rows:
        yield f"  {plugin:<{widths[0]}}  {where:<{widths[1]}}  {what:<{widths[2]}}  {times:>6}  {span}"
