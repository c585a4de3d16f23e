"""What two runs recorded, compared: where they part, and which part of the state did it.

A record is made before each step: a digest of every leaf of the state tree, of the batches at hand, and the samples' indices.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import frozen

# Later ones follow from earlier ones: of several parts that differ at once, the first in this order is the cause.
_CAUSES = ("progress", "samples", "batch", "rng", "precision", "components", "optimizer", "model")
_SHOWN = 6


@frozen
class Record:
    """One line of a sitting's record.

    Attributes:
        sitting: which process of its run wrote it, from 0.
        place: (epoch, window): where in the data.
        step: the step about to be taken.
        first: whether it is the first after a resume.
        leaves: digests by path, "samples" and "batch" among them.
        clock: seconds since some moment.
    """

    sitting: int
    place: tuple[int, int]
    step: int
    first: bool
    leaves: Mapping[str, str]
    clock: float = 0.0


@frozen
class Divergence:
    """The first place where a run differs from the reference.

    Attributes:
        step: the step about to be taken there.
        component: the part of the state that caused it: "model", "optimizer", "rng", "callback:ema", "samples", …
        leaves: what differs, in the order of causes.
        after_resume: whether the state was wrong right after it was restored, before any step.
    """

    step: int
    sitting: int
    component: str
    leaves: tuple[str, ...]
    after_resume: bool

    @property
    def components(self) -> tuple[str, ...]:
        """All parts that differ. Right after a resume nothing has followed from anything yet: each of them was lost by itself."""
        return tuple(dict.fromkeys(map(_component, self.leaves)))

    def __str__(self) -> str:
        shown = ", ".join(self.leaves[:_SHOWN]) + (
            f" and {len(self.leaves) - _SHOWN} more" if len(self.leaves) > _SHOWN else ""
        )
        if self.after_resume:
            was = (
                f"{self.component} is not as it was"
                if len(self.components) == 1
                else f"{', '.join(self.components)} are not as they were"
            )
            return f"before step {self.step}, right after the resume: {was} when saved ({shown})"
        return f"before step {self.step}: {self.component} differs ({shown}){self._hidden()}"

    def _hidden(self) -> str:
        return (
            ". The restored state, random numbers and samples were equal, so what differs is kept outside of the saved state: "
            "an attribute of the model, a callback, the loss or the data set that no state_dict holds"
        )


def read_records(path: Path) -> list[Record]:
    """The whole lines of a file; the last one may have been cut short by a kill."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            epoch, window = row["place"]
            records.append(Record(row["sitting"], (epoch, window), row["step"], row["first"], row["leaves"], row["clock"]))
        except (ValueError, KeyError, TypeError):
            continue
    return records


def unrepeatable(one: Iterable[Record], other: Iterable[Record]) -> set[str]:
    """The leaves that differ between two uninterrupted runs: clocks, and whatever else is never the same twice."""
    known = {record.place: record.leaves for record in one}
    found: set[str] = set()
    for record in other:
        if (leaves := known.get(record.place)) is not None:
            found |= {key for key in leaves.keys() | record.leaves.keys() if leaves.get(key) != record.leaves.get(key)}
    return found


def first_divergence(reference: Iterable[Record], trial: Iterable[Record], ignored: Iterable[str] = ()) -> Divergence | None:
    """Where `trial` first differs from `reference`; None when every record of it is equal."""
    known, skipped = {record.place: record for record in reference}, set(ignored)
    for record in trial:
        expected = known.get(record.place)
        if expected is None:
            return Divergence(record.step, record.sitting, "progress", (f"place {record.place}",), record.first)
        keys = (expected.leaves.keys() | record.leaves.keys()) - skipped
        differing = sorted((k for k in keys if expected.leaves.get(k) != record.leaves.get(k)), key=_cause)
        if differing:
            return Divergence(record.step, record.sitting, _component(differing[0]), tuple(differing), record.first)
    return None


def _cause(leaf: str) -> tuple[int, str]:
    top = leaf.split("/")[0]
    return (_CAUSES.index(top) if top in _CAUSES else len(_CAUSES), leaf)


def _component(leaf: str) -> str:
    top, _, rest = leaf.partition("/")
    return rest.split("/")[0] if top == "components" else top
