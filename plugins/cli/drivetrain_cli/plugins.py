"""`drivetrain plugins`: what is installed, from metadata alone, what one plugin offers, and whether it keeps its promises."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from drivetrain.catalogue import distribution_of
from drivetrain.errors import PluginError, suggest
from drivetrain.registry import KINDS, Candidate, all_candidates, candidates, find
from drivetrain_cli.terminal import bold, clean, columns


class Plugins:
    """List the installed plugins, show one with its options, or check those of a distribution."""

    help = "list the installed plugins, show one with its options, or check a distribution"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare `list`, `show` and `check`; without any, it lists."""
        parser.set_defaults(action=_list, kind=None, json=False)
        actions = parser.add_subparsers(metavar="ACTION")
        listing = actions.add_parser(
            "list", help="every installed plugin (imports none)", description="List every installed plugin."
        )
        listing.add_argument("--kind", choices=KINDS, metavar="KIND", help=f"only these: {', '.join(KINDS)}")
        listing.add_argument("--json", action="store_true", help="as JSON, for programs")
        listing.set_defaults(action=_list)
        show = actions.add_parser(
            "show", help="one plugin: what it does, its options and hooks", description="Show one plugin."
        )
        show.add_argument("plugin", metavar="KIND:NAME", help="such as callback:checkpoint; NAME alone when it is unique")
        show.set_defaults(action=_show)
        # every word, --help included, goes to the command of drivetrain-testing: no prefix makes one an option of ours
        check = actions.add_parser("check", help="the conformance kit on a distribution", prefix_chars="\0", add_help=False)
        check.add_argument("words", nargs="*")
        check.set_defaults(action=_check, parser=type(parser))

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the list, the plugin or the checks."""
        return arguments.action(arguments) or 0


# -- list ----------------------------------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> None:
    found = [(c, *_status(c, group)) for c, group in _installed(arguments.kind)]
    if arguments.json:
        print(json.dumps([_as_data(candidate) | {"status": word, "remark": text} for candidate, word, text in found], indent=2))
        return
    if not found:
        print(f"no plugin{f' of the kind {arguments.kind}' if arguments.kind else ''} is installed", file=sys.stderr)
        return
    rows = [(clean(c.name), c.kind, clean(c.distribution), clean(c.version), word, clean(c.target)) for c, word, _ in found]
    head, *lines = columns([("NAME", "KIND", "DISTRIBUTION", "VERSION", "STATUS", "ORIGIN"), *rows])
    print(bold(head, sys.stdout), *lines, sep="\n")
    if remarks := dict.fromkeys(clean(text) for _, _, text in found if text):
        print("", *remarks, sep="\n")


def _installed(wanted: str | None) -> Iterator[tuple[Candidate, list[Candidate]]]:
    """Every plugin, each with all those of its kind and name."""
    for kind in KINDS if wanted is None else (wanted,):
        for group in candidates(kind).values():
            yield from ((candidate, group) for candidate in group)


def _status(candidate: Candidate, group: list[Candidate]) -> tuple[str, str]:
    """Whether a plugin could be used, judged by its metadata: a word, and what to do when it is not "ok"."""
    try:
        candidate.check_version()
    except PluginError as error:
        return "incompatible core", str(error)
    try:
        if len(group) > 1:
            find(candidate.kind, candidate.name)
    except PluginError as error:
        return "conflict", str(error)
    return "ok", ""


def _as_data(candidate: Candidate) -> dict[str, str]:
    return {name: getattr(candidate, name) for name in ("name", "kind", "distribution", "version")} | {
        "origin": candidate.target
    }


# -- show ----------------------------------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> None:
    candidate = _find(arguments.plugin)
    thing = candidate.load()
    print(bold(clean(f"{candidate.kind}:{candidate.name}"), sys.stdout))
    print(*textwrap.wrap(_summary(thing), 100), "", sep="\n")
    facts = [("from", f"{candidate.distribution} {candidate.version} ({candidate.target})")]
    facts += [(name, ", ".join(hooks)) for name, hooks in _hooks(thing).items() if hooks]
    print(*columns([(name, clean(value)) for name, value in facts], wrap_last=True), sep="\n")
    options = list(_options(thing))
    if options:
        head, *lines = columns([("OPTION", "TYPE", "DEFAULT", "WHAT IT IS"), *options], wrap_last=True)
        print("", bold(head, sys.stdout), *lines, sep="\n")


def _find(text: str) -> Candidate:
    """The plugin meant by "KIND:NAME", "NAME", or either with "DISTRIBUTION:" before the name."""
    kind, colon, name = text.partition(":")
    if colon and kind in KINDS:
        return find(kind, name)
    bare = text.rpartition(":")[2]
    kinds = [kind for kind in KINDS if bare in candidates(kind)]
    if len(kinds) == 1:
        return find(kinds[0], text)
    if kinds:
        raise PluginError(f"{text!r} is the name of several plugins; write one of: {', '.join(f'{k}:{text}' for k in kinds)}")
    raise PluginError(f"no plugin named {text!r} is installed.{_hint(bare)}")


def _hint(name: str) -> str:
    home = next((home for kind in KINDS if (home := distribution_of(kind, name))), None)
    if home:
        return f" It comes with {home}: pip install {home}"
    return suggest(name, {c.name for c in all_candidates()}) or " See drivetrain plugins list."


def _summary(thing: object) -> str:
    """The first paragraph of the docstring, on one line."""
    paragraph = inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0]
    return clean(paragraph) or "(it has no description)"


def _hooks(thing: object) -> dict[str, list[str]]:
    """What a component makes and which events it listens to, in the order of the loop; "first" and "last" among listeners."""
    from drivetrain.hookspecs import EVENTS, HOOKS

    found = {name: method for name in HOOKS if callable(method := getattr(thing, name, None))}
    places = {"tryfirst": " (first)", "trylast": " (last)"}
    said = {
        name: name + "".join(text for mark, text in places.items() if getattr(method, "drivetrain_hook", {}).get(mark))
        for name, method in found.items()
    }
    return {
        "makes": [text for name, text in said.items() if name not in EVENTS],
        "listens to": [text for name, text in said.items() if name in EVENTS],
    }


def _options(thing: object) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and help of every option, for plugins that are attrs classes."""
    import attrs

    if not (isinstance(thing, type) and attrs.has(thing)):
        return
    for field in attrs.fields(thing):
        if field.init:
            limits = str(field.metadata.get("limits", ""))
            said = field.metadata.get("help", "") + (f" ({limits})" if limits else "")
            yield tuple(map(clean, (field.name, _type(field.type), _default(field.default), said)))  # type: ignore[misc]


def _type(annotation: object) -> str:
    """A type as one would say it: "int | None", "'min' | 'max'", without the modules it comes from."""
    plain = isinstance(annotation, type) and not get_args(annotation)
    text = annotation.__name__ if plain else re.sub(r"\b(\w+\.)+(?=[A-Z])", "", str(annotation))  # type: ignore[attr-defined]
    return re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " | "), text)


def _default(default: Any) -> str:
    import attrs

    from drivetrain.formats import toml_value
    from drivetrain.structure import unstructure

    if default is attrs.NOTHING:
        return "(required)"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        if default.takes_self:
            return "(depends on the others)"
        default = default.factory()
    return "none" if default is None else toml_value(unstructure(default))


# -- check ---------------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    """Hand over to the command of drivetrain-testing, which is not needed for anything else."""
    loaded: Any = find("command", "check").load()
    command = loaded()
    parser = arguments.parser(prog="drivetrain plugins check", description=f"{command.help}.".capitalize())
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(arguments.words)))
