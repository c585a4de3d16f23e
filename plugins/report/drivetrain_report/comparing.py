"""`drivetrain runs compare`: two runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from drivetrain_report.figures import Figure, figures, shown
from drivetrain_report.listing import columns
from drivetrain_report.manifest import Setting
from drivetrain_report.page import labels
from drivetrain_report.reading import Run

_AHEAD = "*"


def compared(a: Run, b: Run, everything: bool) -> Iterator[str]:
    """The lines: numbers, then what differs in configuration and environment (all of it with `everything`)."""
    names = labels([a, b])
    yield from _numbers(a, b, names)
    for title, one, other in (
        ("configuration", a.settings, b.settings),
        ("environment", a.environment, b.environment),
    ):
        yield ""
        yield from _settings(title, one, other, names, everything)
    notes = [f"{name}: {note}" for name, run in zip(names, (a, b), strict=True) for note in run.notes]
    yield from (["", *notes] if notes else [])


def _numbers(a: Run, b: Run, names: Sequence[str]) -> Iterator[str]:
    """Both numbers, what the second has more than the first, and a mark at the one that is ahead."""
    left, right = ({figure.label: figure for figure in figures(run)} for run in (a, b))
    rows = [("", names[0], names[1], "DIFFERENCE")]
    for label in dict.fromkeys([*left, *right]):
        one, other = left.get(label), right.get(label)
        rows.append((label, _number(one, other), _number(other, one), _difference(one, other)))
    yield from columns(rows, right=(1, 2, 3), shrink=(0, 1, 2))
    kinds = ("anomaly", "restart", "hang")
    counts = [{kind: sum(event.kind == kind for event in run.events) for kind in kinds} for run in (a, b)]
    for kind in kinds:
        if any(count[kind] for count in counts):
            yield f"{kind}: {counts[0][kind]} and {counts[1][kind]}"
    if any(_AHEAD in cell for row in rows for cell in row[1:3]):
        yield f"{_AHEAD} the better one, as the name of the metric tells"


def _number(one: Figure | None, other: Figure | None) -> str:
    if one is None:
        return "—"
    ahead = other is not None and one.better and one.value != other.value
    pick = min if one.better == "min" else max
    mark = _AHEAD if ahead and other is not None and pick(one.value, other.value) == one.value else " "
    return f"{shown(one.value, one.unit)} {mark}"


def _difference(one: Figure | None, other: Figure | None) -> str:
    if one is None or other is None:
        return ""
    difference = other.value - one.value
    if not difference:
        return "="
    if one.unit == "share":
        return f"{100 * difference:+.1f} points"
    sign = "+" if difference > 0 else "-"
    share = f" ({difference / abs(one.value):+.1%})" if one.value else ""
    return f"{sign}{shown(abs(difference), one.unit)}{share}"


def _settings(title: str, one: list[Setting], other: list[Setting], names: Sequence[str], everything: bool) -> Iterator[str]:
    left, right = ({setting.key: setting for setting in settings} for settings in (one, other))
    missing = [name for name, settings in zip(names, (left, right), strict=True) if not settings]
    if missing:
        yield f"{title}: not known of {' and '.join(missing)} (a checkpoint keeps it)"
        return
    keys = [key for key in dict.fromkeys([*left, *right]) if everything or _differs(left.get(key), right.get(key))]
    if not keys:
        yield f"{title}: no difference"
        return
    rows = [(key, _value(left, key), _value(right, key)) for key in keys]
    yield from columns([(title.upper(), *names), *rows], shrink=(0, 1, 2))


def _differs(one: Setting | None, other: Setting | None) -> bool:
    """Whether it is worth a line; a default of a component that the other run does not have is not."""
    if one is None or other is None:
        return any(found is not None and found.origin != "default" for found in (one, other))
    return one.value != other.value


def _value(settings: dict[str, Setting], key: str) -> str:
    return settings[key].value if key in settings else "(not there)"
