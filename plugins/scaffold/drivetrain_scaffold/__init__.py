"""`drivetrain new`: a plugin distribution or a training project, from templates that are part of this package."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from drivetrain import DrivetrainError

__all__ = ["KINDS", "New", "make_plugin", "make_project"]

KINDS = (
    "optimizer",
    "scheduler",
    "precision",
    "strategy",
    "callback",
    "tracker",
    "mode",
    "model",
    "dataset",
    "cluster",
    "command",
)
_SUFFIX = ".template"  # keeps tools from taking a template for a source file


class New:
    """Write a plugin distribution or a training project into a new folder."""

    help = "make a plugin or a training project to start from"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare `plugin` and `project`."""
        what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
        plugin = what.add_parser("plugin", help="a distribution with one component and its tests", description="Make a plugin.")
        plugin.add_argument("name", metavar="NAME", help="of the distribution, such as loss-floor")
        plugin.add_argument("--kind", choices=KINDS, required=True, help="what the plugin is")
        project = what.add_parser("project", help="a model, data and configuration that train", description="Make a project.")
        project.add_argument("name", metavar="NAME", help="of the folder, such as digits")

    def run(self, arguments: argparse.Namespace) -> int:
        """Write the files and say what to do with them."""
        if arguments.what == "plugin":
            folder = make_plugin(arguments.name, arguments.kind)
            steps = ["python -m pip install -e . drivetrain-testing", "python -m pytest"]
        else:
            folder = make_project(arguments.name)
            steps = ["python train.py", "python -m pytest"]
        print(f"made {folder}. Next:\n" + "\n".join(f"  {step}" for step in [f"cd {folder}", *steps]))
        return 0


def make_plugin(name: str, kind: str, parent: Path | None = None) -> Path:
    """Write a plugin distribution to `parent`/`name`; returns that folder.

    Raises:
        DrivetrainError: for a name that cannot be a distribution's and a module's, or a folder that is there already.
    """
    folder = _new_folder(name, parent)
    plain = name.lower().removeprefix("drivetrain-").replace("-", "_")
    words = {
        "distribution": name.lower(),
        "name": plain,
        "NAME": plain.upper(),
        "module": name.lower().replace("-", "_"),
        "kind": kind,
    }
    words["dollar"] = "${{ matrix.python }}"  # of the CI file, which has braces of its own
    words |= {"Class": "".join(part.title() for part in plain.split("_")), "target": _target(kind, plain)}
    code = {part: _template(f"kinds/{kind}.{part}") for part in ("py", "test", "use")}
    words |= {"test": _filled(code["test"], words).strip(), "use": _filled(code["use"], words).strip()}
    _write(folder, "plugin", words)
    package = folder / words["module"]
    package.mkdir()
    (package / "__init__.py").write_text(_filled(code["py"], words), encoding="utf-8")
    (package / "py.typed").touch()
    return folder


def make_project(name: str, parent: Path | None = None) -> Path:
    """Write a training project to `parent`/`name`; returns that folder. Raises as `make_plugin`."""
    folder = _new_folder(name, parent)
    _write(folder, "project", {"name": name})
    return folder


def _new_folder(name: str, parent: Path | None) -> Path:
    module = name.lower().replace("-", "_")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", name) or keyword.iskeyword(module):
        raise DrivetrainError(f"{name!r} cannot be a name: letters and digits, parts joined by -, such as loss-floor.")
    if module in sys.stdlib_module_names or module in ("torch", "drivetrain"):
        raise DrivetrainError(f"the module {module!r} exists already; choose another name, such as {name}-plugin.")
    folder = (parent or Path()) / name
    if folder.exists():
        raise DrivetrainError(f"{folder} exists already; choose another name or remove it.")
    return folder


def _target(kind: str, plain: str) -> str:
    """What the entry point names: a function for launch environments, a class for all others."""
    return "detect" if kind == "cluster" else "".join(part.title() for part in plain.split("_"))


def _write(folder: Path, which: str, words: Mapping[str, str]) -> None:
    for path, template in _files(resources.files(__name__) / "templates" / which, Path()):
        target = folder / _filled(str(path), words).removesuffix(_SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_filled(template.read_text(encoding="utf-8"), words), encoding="utf-8")


def _files(folder: Traversable, below: Path) -> Iterator[tuple[Path, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, below / entry.name)
        else:
            yield below / entry.name, entry


def _template(path: str) -> str:
    return (resources.files(__name__) / "templates" / f"{path}{_SUFFIX}").read_text(encoding="utf-8")


def _filled(text: str, words: Mapping[str, str]) -> str:
    """`{{name}}` becomes what `words` has for it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)
