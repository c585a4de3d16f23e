"""References made from the code at each build: configuration, plugins, API, and the texts that lie elsewhere in the repository.

`write` makes docs/generated/ (not in git), `fill` puts tables into pages that ask for them by a comment such as
`<!-- generated: configuration -->` and mends links to files outside of docs/.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import drivetrain
from drivetrain.catalogue import names_of
from drivetrain.config import DataLoaderConfig
from drivetrain.registry import KINDS, Candidate, all_candidates
from drivetrain_cli import plugins as shown  # the words of `drivetrain plugins show`

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Texts of the repository that become pages; the links to them lead there.
PAGES = {
    ROOT / "README.md": "generated/readme.md",
    ROOT / "CHANGELOG.md": "generated/changelog.md",
    ROOT / "CONTRIBUTING.md": "generated/contributing.md",
    ROOT / "SECURITY.md": "generated/security.md",
    ROOT / "docs" / "examples" / "third-party-plugin" / "README.md": "generated/third-party-plugin.md",
}
PAGES |= {
    readme: f"generated/distributions/{readme.parent.name}.md"
    for pattern in ("core/README.md", "plugins/*/README.md", "contrib/*/README.md")
    for readme in sorted(ROOT.glob(pattern))
}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def write(folder: Path) -> None:
    """Make the folder of generated pages anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for source, page in PAGES.items():
        path = DOCS / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "---\norphan: true\n---\n\n" + relinked(source.read_text(encoding="utf-8"), source, page), encoding="utf-8"
        )
    for kind in kinds():
        (folder / f"{kind}.md").write_text("\n".join(["---", "orphan: true", "---", "", *of_kind(kind)]), encoding="utf-8")


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put generated parts into a page, and mend its links; the event `source-read`."""
    parts = {"configuration": configuration, "plugins": plugins, "distributions": distributions, "api": api}
    source[0] = re.sub(r"<!-- generated: (\w+) -->", lambda match: "\n".join(parts[match[1]]()), source[0])
    if not page.startswith("generated/"):
        source[0] = relinked(source[0], DOCS / f"{page}.md", f"{page}.md")


def relinked(text: str, source: Path, page: str) -> str:
    """`text` of the file `source` with its relative links as they are seen from `page` of the site."""

    def mend(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if target.is_dir():  # a folder has no page: name it
            target = target / "README.md"
        there = PAGES.get(target) or os.path.relpath(target, DOCS)
        return (
            f"{match[1]}{os.path.relpath(there, Path(page).parent)}{match[3] or ''}{match[4]}" if target.exists() else match[0]
        )

    return LINK.sub(mend, text)


# -- configuration -------------------------------------------------------------------------------------------------------------


def configuration() -> Iterator[str]:
    """The keys of `TrainingConfig`, and those of its table `dataloader`."""
    yield from _options(drivetrain.TrainingConfig)
    yield from ("", "## The table `dataloader`", "", _summary(DataLoaderConfig), "")
    yield from _options(DataLoaderConfig)


def _options(cls: Any) -> Iterator[str]:
    rows = [(f"`{name}`", _code(kind), _code(default), _cell(help)) for name, kind, default, help in shown._options(cls)]
    yield from _table(("", "type", "default", "meaning"), rows)


# -- plugins -------------------------------------------------------------------------------------------------------------------


def kinds() -> list[str]:
    """The kinds of which we have plugins."""
    return [kind for kind in KINDS if any(True for _ in ours(kind))]


def ours(kind: str) -> Iterator[Candidate]:
    """Our own plugins of a kind, whether or not something else is installed beside them."""
    names = names_of(kind)
    yield from (c for c in all_candidates() if c.kind == kind and c.name in names and c.distribution.startswith("drivetrain-"))


def plugins() -> Iterator[str]:
    """The catalogue: every name with its distribution and what it is, by kind."""
    for kind in kinds():
        rows = [
            (f"[`{c.name}`](generated/{kind}.md#{c.name})", f"`{c.distribution}`", _cell(_summary(c.load())))
            for c in ours(kind)
        ]
        yield from ("", f"## {kind}", "")
        yield from _table(("name", "distribution", "what it is"), rows)


def of_kind(kind: str) -> Iterator[str]:
    """A page with the options and events of every plugin of one kind."""
    yield f"# Plugins of the kind {kind}"
    for candidate in ours(kind):
        thing = candidate.load()
        home = f"distributions/{candidate.distribution.removeprefix('drivetrain-')}.md"
        yield from ("", f"## {candidate.name}", "", _summary(thing), "", f"From [{candidate.distribution}]({home}).", "")
        for what, hooks in shown._hooks(thing).items():
            if hooks:
                yield from (f"{what.capitalize()} {', '.join(f'`{hook}`' for hook in hooks)}.", "")
        yield from _options(thing)


def distributions() -> Iterator[str]:
    """A list of the distributions' own pages."""
    for readme, page in PAGES.items():
        if "distributions" in page:
            text = readme.read_text(encoding="utf-8")
            title, _, rest = text.partition("\n")
            line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", rest.strip().partition("\n\n")[0].replace("\n", " "))
            yield f"- [{title.removeprefix('# ')}]({page}): {line}"


def _summary(thing: Any) -> str:
    """The docstring's first paragraph, or a command's own line of help."""
    return str(shown._summary(thing)) if thing.__doc__ else str(getattr(thing, "help", ""))


# -- API -----------------------------------------------------------------------------------------------------------------------


GROUPS = {
    "Training": ["Trainer", "TrainOutput", "Step", "Loss", "Duration"],
    "Configuration": ["TrainingConfig", "TrainingMode", "load_training_config", "get_qlora_config", "get_pretraining_config"],
    "Writing plugins": [
        "component", "option", "state", "hook", "Component", "Callback", "CallbackContext", "make_component", "is_installed", "at_hand",
        "OptimizerComponent", "ForeachOptimizer", "Precision", "Tracker", "SampleOrder", "repeated_blocks", "parameters_of",
        "map_tensors", "random_state", "set_random_state",
    ],
    "Several processes": ["Strategy", "ProcessGroupStrategy", "GradientSynchronizer", "DeviceManager", "Peer"],
    "Errors": ["DrivetrainError", "ConfigError", "Problem", "PluginError", "DataError", "ModelError", "RunError", "PeerFailure"],
    "Callbacks of the standard plugins": [
        "ProgressCallback", "LoggingCallback", "CheckpointCallback", "EarlyStoppingCallback",
    ],
}  # fmt: skip


def api() -> Iterator[str]:
    """Every public name of `drivetrain` with its docstring."""
    for title, names in GROUPS.items():
        yield from ("", f"## {title}", "", "```{eval-rst}")
        for name in names:
            is_class = inspect.isclass(getattr(drivetrain, name))
            yield from (
                f".. auto{'class' if is_class else 'function'}:: drivetrain.{name}",
                *(["   :members:"] if is_class else []),
                "",
            )
        yield "```"


# -- Markdown ------------------------------------------------------------------------------------------------------------------


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    if rows:
        yield from (f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")
