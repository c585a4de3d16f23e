"""`drivetrain new`: a plugin distribution or a training project, from templates that are part of this package."""

from __future__ import annotations

import argparse
import builtins
import getpass
import json
import keyword
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path

from drivetrain import DrivetrainError
from drivetrain.catalogue import distribution_of
from drivetrain.registry import candidates

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
        plugin.add_argument(
            "--author", metavar="NAME", help="whom the metadata names; without it what git knows, else the account"
        )
        project = what.add_parser("project", help="a model, data and configuration that train", description="Make a project.")
        project.add_argument("name", metavar="NAME", help="of the folder, such as digits")

    def run(self, arguments: argparse.Namespace) -> int:
        """Write the files and say what to do with them."""
        if arguments.what == "plugin":
            folder = make_plugin(arguments.name, arguments.kind, author=arguments.author)
            steps = ["python -m pip install -e . drivetrain-testing", "python -m pytest"]
        else:
            folder = make_project(arguments.name)
            steps = ["python train.py", "python -m pytest"]
        print(f"made {folder}. Next:\n" + "\n".join(f"  {step}" for step in [f"cd {folder}", *steps]))
        return 0


def make_plugin(name: str, kind: str, parent: Path | None = None, author: str | None = None) -> Path:
    """Write a plugin distribution to `parent`/`name`; returns that folder.

    Args:
        author: whom the metadata names; without it `git config user.name`, else the account.

    Raises:
        DrivetrainError: for a name that cannot be a distribution's and a module's, that is taken, or a folder that is there.
    """
    folder = _new_folder(name, parent)
    plain = name.lower().removeprefix("drivetrain-").replace("-", "_")
    _refuse_taken(kind, plain)
    code = {part: _template(f"kinds/{kind}.{part}") for part in ("py", "test", "use")}
    class_name = _class_name(plain, kind, code["py"])
    words = {
        "distribution": name.lower(),
        "name": plain,
        "NAME": plain.upper(),
        "module": name.lower().replace("-", "_"),
        "kind": kind,
    }
    words["dollar"] = "${{ matrix.python }}"  # of the CI file, which has braces of its own
    words |= {"Class": class_name, "target": "detect" if kind == "cluster" else class_name}  # the launcher's is a function
    words["author"] = json.dumps(author or _author(), ensure_ascii=False)  # a text of JSON is one of TOML
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
    folder = (parent or Path()) / name
    if folder.exists():
        raise DrivetrainError(f"{folder} exists already; choose another name or remove it.")
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise DrivetrainError(f"the module {module!r} exists already; choose another name, such as {name}-plugin.")
    return folder


def _refuse_taken(kind: str, name: str) -> None:
    """A name that somebody provides would be a conflict for whoever installs both."""
    owners = {c.distribution for c in candidates(kind).get(name, ())} | {distribution_of(kind, name)} - {None}
    if owners:
        raise DrivetrainError(f"the {kind} {name!r} comes with {', '.join(map(str, owners))}; choose another name.")


def _class_name(name: str, kind: str, template: str) -> str:
    """ "loss_floor" as "LossFloor"; with the kind behind it where the template has a meaning for that already."""
    plain = "".join(part.title() for part in name.split("_"))
    taken = {*re.findall(r"\w+", template), *dir(builtins)}
    return next(found for found in (plain, plain + kind.title(), f"{plain}Plugin") if found not in taken)


def _author() -> str:
    """Who writes this, as far as the machine knows."""
    try:
        found = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, timeout=10).stdout.strip()
        return found or getpass.getuser()
    except (OSError, KeyError, subprocess.SubprocessError):
        return "the author"


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
