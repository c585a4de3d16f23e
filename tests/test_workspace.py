"""The repository as a whole: every folder a sound distribution, layers pointing one way, texts that tell the truth."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.benchmarks.speed.environments import closure

import drivetrain
from drivetrain import catalogue, registry

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(f"plugins/{path.parent.name}" for path in ROOT.glob("plugins/*/pyproject.toml"))
CONTRIB = sorted(f"contrib/{path.parent.name}" for path in ROOT.glob("contrib/*/pyproject.toml"))
FOLDERS = ["core", *PLUGINS, *CONTRIB]
GROUP = "drivetrain."

PUBLIC_NAMES = {*drivetrain.__all__, "__version__"}
# Modules that plugins may import besides `drivetrain` itself: what a kind's objects look like, and the registries. The
# command line shows people what the core knows, so it may look further in; so may the kit that checks plugins.
PUBLIC_MODULES = defaultdict(lambda: {"commands", "registry", "tracking"})
PUBLIC_MODULES["plugins/cli"] = {"catalogue", "cluster", "commands", "errors", "formats", "hookspecs", "registry", "structure"}
PUBLIC_MODULES["contrib/optuna"] = {"cluster"}
PUBLIC_MODULES["plugins/doctor"] = {"cluster", "registry"}
PUBLIC_MODULES["plugins/scaffold"] = {"catalogue", "registry"}
PUBLIC_MODULES["plugins/testing"] = {"cluster", "hooks", "hookspecs", "registry", "structure"}
# What is imported only where something else has imported it already.
BEHIND = defaultdict(set, {"contrib/mlflow": {"alembic", "sqlalchemy"}})  # imported by a dependency, which leaves them optional
OPTIONAL = defaultdict(
    set,
    {
        "core": {"numpy", "packaging"},
        "plugins/cli": {"matplotlib"},
        "plugins/plan": {"matplotlib"},
        "plugins/throughput": {"pynvml"},
    },
)

# The core's modules, lowest first: a module imports only from lines above its own.
LAYERS = """
    errors  catalogue  duration  hookspecs  commands  limits  meetings  synchronizer  scalars
    registry  structure  loss  precision  strategy  peers  rng  output  agenda  context  compiling  activations
    cluster  loading
    components  devices  formats  calling  distributed
    config  hooks  optim  tracking
    data  fitting  presets  prepare
    ahead  evaluation  manifest  shrinking
    loop
    rehearsal
    agreement  given
    run
    trainer
"""


@cache
def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(folder: str) -> str:
    return project(folder)["project"]["name"]


def package(folder: str) -> Path:
    """The folder of a distribution's module ("data_pipeline.trainer" lies in data_pipeline/trainer)."""
    return ROOT / folder / project(folder)["tool"]["flit"]["module"]["name"].replace(".", "/")


def requirements(folder: str) -> dict[str, str]:
    """Declared dependencies: normalised name to version range."""
    lines = project(folder)["project"].get("dependencies", [])
    return {normal(line): line[len(re.match(r"[\w.-]+", line)[0]) :] for line in lines}


def normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


class TestDistributions:
    @pytest.mark.parametrize("kind", ["plugins", "contrib"])
    def test_every_folder_is_one(self, kind: str) -> None:
        folders = {f"{kind}/{path.name}" for path in ROOT.glob(f"{kind}/[!_.]*") if path.is_dir()}
        assert folders <= set(FOLDERS)

    def test_requirements_txt_lists_every_folder_core_first_root_last(self) -> None:
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        assert "-c constraints.txt" in lines
        listed = [line.split()[1].partition("[")[0] for line in lines if line.startswith("-e")]
        assert listed == [*(f"./{folder}" for folder in FOLDERS), "."]

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_metadata(self, folder: str) -> None:
        data, name = project(folder), Path(folder).name
        assert data["build-system"]["build-backend"] == "flit_core.buildapi"
        assert data["project"]["name"] == f"drivetrain-{name}"
        assert data["project"]["license"] == "Apache-2.0"
        assert data["project"]["requires-python"] == ">=3.11"
        assert data["project"]["readme"] == "README.md"
        assert "Typing :: Typed" in data["project"]["classifiers"]
        if folder in PLUGINS:
            assert data["tool"]["flit"]["module"]["name"] == f"drivetrain_{name.replace('-', '_')}"
        if folder != "core":
            assert requirements(folder)["drivetrain-core"] == ">=0.1,<1"

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_files(self, folder: str) -> None:
        readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        assert readme.startswith(f"# {name_of(folder)}\n")
        assert "```" in readme, "a README shows an example"
        assert (package(folder) / "py.typed").is_file()
        assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes(), f"cp LICENSE {folder}/"
        assert list((ROOT / "tests" / folder).glob("test_*.py")), f"tests/{folder} has no test"

    @pytest.mark.parametrize("folder", [*FOLDERS, "."])
    def test_our_own_distributions_are_required_by_range(self, folder: str) -> None:
        extras = project(folder)["project"].get("optional-dependencies", {})
        lines = [*project(folder)["project"].get("dependencies", []), *(line for extra in extras.values() for line in extra)]
        ours = [line for line in lines if line.startswith("drivetrain")]
        assert all(re.fullmatch(r"[\w-]+(\[[\w,-]+\])?>=0\.1,<1", line) for line in ours), ours

    def test_versions_move_together(self) -> None:
        assert {project(folder)["project"]["version"] for folder in [*FOLDERS, "."]} == {drivetrain.__version__}
        assert f"## {drivetrain.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_the_root_brings_or_offers_every_distribution(self) -> None:
        root = project(".")["project"]
        extras = {normal(line) for extra in root["optional-dependencies"].values() for line in extra}
        assert {normal(line) for line in root["dependencies"]} | extras == {name_of(folder) for folder in FOLDERS}

    def test_the_readme_names_every_distribution(self) -> None:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert [name for name in map(name_of, FOLDERS) if f"| `{name}` |" not in readme] == []


class TestCatalogue:
    """`drivetrain/catalogue.py` and the entry points must say the same, or an error names the wrong `pip install`."""

    def entry_points(self, folder: str) -> set[tuple[str, str]]:
        groups = project(folder)["project"].get("entry-points", {})
        return {
            (group.removeprefix(GROUP), name) for group, names in groups.items() for name in names if group.startswith(GROUP)
        }

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_agrees_with_the_entry_points(self, folder: str) -> None:
        promised = {(kind, name) for kind, homes in catalogue.FIRST_PARTY.items() for name in homes.get(name_of(folder), ())}
        assert self.entry_points(folder) == promised

    def test_every_kind_is_known_and_every_name_has_one_home(self) -> None:
        assert set(catalogue.FIRST_PARTY) <= set(registry.KINDS)
        for kind in catalogue.FIRST_PARTY:
            names = catalogue.names_of(kind)
            assert len(names) == len(set(names)), kind

    def test_installed_entry_points_are_those_of_the_files(self) -> None:
        """Guards against a stale environment: an editable install keeps the entry points of the day it was made."""
        written = {(*point, name_of(folder)) for folder in FOLDERS for point in self.entry_points(folder)}
        installed = {(c.kind, c.name, c.distribution) for c in registry.all_candidates()}
        assert {entry for entry in installed if entry[2].startswith("drivetrain-")} == written

    def test_every_entry_point_loads(self) -> None:
        for candidate in registry.all_candidates():
            assert callable(candidate.load()), candidate


class Import(NamedTuple):
    module: str
    names: tuple[str, ...]
    typing_only: bool
    where: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_in(code: str, file: str) -> Iterator[Import]:
    """Every import in a piece of code, those inside functions too."""
    tree = ast.parse(code)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, (), id(node) in guarded, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.module or "", tuple(alias.name for alias in node.names), id(node) in guarded, where)


def imports_of(path: Path) -> Iterator[Import]:
    yield from imports_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))


def all_imports(folder: str) -> list[Import]:
    return [found for path in sorted(package(folder).rglob("*.py")) for found in imports_of(path)]


class TestConformance:
    """Every plugin of ours is held to the kit: a class or function that an entry point names is an argument of some `@conformance`."""

    @pytest.mark.parametrize("folder", [*PLUGINS, *CONTRIB])
    def test_the_kit_checks_every_entry_point(self, folder: str) -> None:
        given = set().union(*map(given_to_the_kit, (ROOT / "tests" / folder).glob("test_*.py")))
        points = project(folder)["project"].get("entry-points", {})
        missing = [
            f"{group.removeprefix('drivetrain.')}:{name}"
            for group, entries in points.items()
            if group.startswith("drivetrain.")
            for name, target in entries.items()
            if not {target.rpartition(":")[2], f"use {name}"} & given
        ]
        assert not missing, f"write @conformance(…) for {', '.join(missing)} in tests/{folder}"

    def test_one_that_is_left_out_is_noticed(self, tmp_path: Path) -> None:
        page = tmp_path / "test_x.py"
        page.write_text("SPECS = [{'use': 'sgd'}]\n@conformance(Lion(), make(SPECS[0]))\ndef test(): Sophia()\n")
        assert given_to_the_kit(page) & {"Lion", "Sophia", "use sgd", "use lion"} == {"Lion", "use sgd"}


def given_to_the_kit(path: Path) -> set[str]:
    """The names in the arguments of a file's `@conformance(…)`, and what they name as {"use": name}, also through a constant."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "conformance"]
    seen = [inner for call in calls for argument in call.args for inner in ast.walk(argument)]
    seen += [inner for n in list(seen) if isinstance(n, ast.Name) and n.id in constants for inner in ast.walk(constants[n.id])]
    tables = [n for n in seen if isinstance(n, ast.Dict)]
    pairs = [pair for table in tables for pair in zip(table.keys, table.values, strict=True)]
    uses = {
        f"use {v.value}" for k, v in pairs if isinstance(k, ast.Constant) and k.value == "use" and isinstance(v, ast.Constant)
    }
    return {n.id for n in seen if isinstance(n, ast.Name)} | uses


class TestLayers:
    def test_the_cores_modules_import_one_way(self) -> None:
        level = {name: index for index, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
        modules = {path.stem: path for path in package("core").glob("*.py") if path.stem != "__init__"}
        assert set(modules) == set(level), "LAYERS names every module of the core"
        wrong = [
            f"{found.where}: {module} (layer {level[module]}) imports {target}"
            for module, path in modules.items()
            for found in imports_of(path)
            if not found.typing_only
            for target in core_modules(found)
            if level[target] >= level[module]
        ]
        assert not wrong, "\n".join(wrong)

    def test_the_cores_readme_leads_through_every_module(self) -> None:
        rows = (ROOT / "core/README.md").read_text(encoding="utf-8").partition("## Reading it")[2].split("\n| ")[2:]
        named = [re.findall(r"`(\w+)`", row) for row in rows]
        assert sorted(name for row in named for name in row) == sorted(LAYERS.split())
        files = [package("core") / f"{name}.py" for name in named[0]]
        assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 2200, "it says about 2,000 lines"

    @pytest.mark.parametrize("folder", [*PLUGINS, *CONTRIB])
    def test_plugins_use_public_names_only(self, folder: str) -> None:
        wrong = []
        for found in all_imports(folder):
            module = found.module.removeprefix("drivetrain.")
            private = module != found.module and module not in PUBLIC_MODULES[folder] and not found.typing_only
            known = PUBLIC_NAMES | PUBLIC_MODULES[folder]
            unknown = [name for name in found.names if found.module == "drivetrain" and name not in known]
            if private or unknown:
                wrong.append(f"{found.where}: {found.module} {', '.join(unknown)}")
        assert not wrong, "\n".join(wrong)

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_no_distribution_imports_a_sibling(self, folder: str) -> None:
        own = package(folder).relative_to(ROOT / folder).parts[0]
        others = {package(other).relative_to(ROOT / other).parts[0] for other in FOLDERS} - {own, "drivetrain"}
        assert not [found.where for found in all_imports(folder) if found.top in others]

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_imports_and_declared_dependencies_agree(self, folder: str) -> None:
        own = package(folder).relative_to(ROOT / folder).parts[0]
        used = {found.top for found in all_imports(folder) if not found.typing_only}
        used |= {"tensorboard" for found in all_imports(folder) if found.module == "torch.utils.tensorboard"}  # its front
        used -= {own, "drivetrain", *OPTIONAL[folder], *sys.stdlib_module_names}
        providers = packages_distributions()
        declared = {name for name in requirements(folder) if not name.startswith("drivetrain")}
        given = declared if folder == "core" else declared | {"torch", "attrs"}  # the core's interface is made of these
        undeclared = {top for top in used if not providers.get(top, {top}) & given}
        unused = {name for name in declared - BEHIND[folder] if not any(name in providers.get(top, {top}) for top in used)}
        assert (undeclared, unused) == (set(), set())

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_tests_import_what_is_installed_beside_their_distribution(self, folder: str) -> None:
        """`nox -s isolated` has the distribution with its extra `test`, the kit and pytest: what others bring is not there."""
        extra = project(folder)["project"].get("optional-dependencies", {}).get("test", [])
        given = closure([name_of(folder), *map(normal, extra), "drivetrain-testing", "pytest", "torch", "flit-core"])
        ours = {package(other).relative_to(ROOT / other).parts[0]: {name_of(other)} for other in FOLDERS}
        providers, files = packages_distributions() | ours, list((ROOT / "tests" / folder).rglob("*.py"))
        own = {"tests", *sys.stdlib_module_names, *(path.stem for path in files)}
        used = {(name, str(path.relative_to(ROOT))) for path in files for name in imported_at_once(path) if name not in own}
        missing = sorted((name, where) for name, where in used if not providers.get(name, {name}) & given)
        assert not missing, "declare it in the extra `test`, import it in the test that needs it, or move that to tests/e2e"

    def test_the_reader_of_imports_sees_what_is_hidden(self) -> None:
        """Negative control for the tests above: an import inside a function is found, a guarded one is marked."""
        code = "if TYPE_CHECKING:\n    import a.b\ndef f():\n    from drivetrain_lm import GPT\n"
        found = list(imports_in(code, "planted.py"))
        assert [(i.top, i.names, i.typing_only) for i in found] == [("a", (), True), ("drivetrain_lm", ("GPT",), False)]


@cache
def packages_distributions() -> dict[str, set[str]]:
    """The distributions that install each top-level module; reading all their files takes a second."""
    return {top: {normal(dist) for dist in dists} for top, dists in metadata.packages_distributions().items()}


def imported_at_once(path: Path) -> set[str]:
    """The top-level modules that importing a file imports, but for those that it asks for in a try."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    plain = {alias.name.partition(".")[0] for node in body if isinstance(node, ast.Import) for alias in node.names}
    return plain | {(node.module or "").partition(".")[0] for node in body if isinstance(node, ast.ImportFrom)}


def core_modules(found: Import) -> list[str]:
    """The modules of the core that one import statement reaches."""
    if found.module == "drivetrain":
        return [home for name in found.names if (home := drivetrain._HOME.get(name, name if is_module(name) else None))]
    return [found.module.split(".")[1]] if found.module.startswith("drivetrain.") else []


def is_module(name: str) -> bool:
    return (package("core") / f"{name}.py").is_file()


class TestLaziness:
    """What must answer before torch has been imported, in a process of its own."""

    @pytest.mark.parametrize(
        "code",
        [
            "import drivetrain",
            "from drivetrain import Callback, TrainingConfig, component, load_training_config, option; TrainingConfig()",
            "from drivetrain.registry import all_candidates; assert list(all_candidates())",
        ],
    )
    def test_no_torch_and_no_plugin_is_imported(self, code: str) -> None:
        check = "import sys; print([m for m in sys.modules if m == 'torch' or m.startswith('drivetrain_')])"
        result = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
        assert (result.stdout.strip(), result.stderr) == ("[]", "")


TEXTS = sorted(
    path
    for pattern in ("*.md", "core/**/*.md", "plugins/*/*.md", "contrib/*/*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[Any]:
    """The fenced blocks of every document, as pytest parameters."""
    return [
        pytest.param(
            match[2], id=f"{path.relative_to(ROOT)}:{path.read_text(encoding='utf-8')[: match.start()].count(chr(10)) + 1}"
        )
        for path in TEXTS
        for match in FENCE.finditer(path.read_text(encoding="utf-8"))
        if match[1] in languages
    ]


class TestTexts:
    @pytest.mark.parametrize("code", blocks("python"))
    def test_python_blocks_parse_and_import_what_exists(self, code: str) -> None:
        for found in imports_in(code, "README.md"):
            if found.module == "drivetrain":
                assert set(found.names) <= PUBLIC_NAMES

    @pytest.mark.parametrize("code", blocks("toml"))
    def test_toml_blocks_parse(self, code: str) -> None:
        tomllib.loads(code)

    @pytest.mark.parametrize("text", blocks("console", "bash", "sh"))
    def test_commands_name_what_exists(self, text: str) -> None:
        commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ") or "$ " not in text]
        for command in (part for line in commands for part in re.split(r"&&|\|", line.partition("#")[0]) if part.strip()):
            program, *arguments = shlex.split(command)
            assert program in (
                "python",
                "pip",
                "nox",
                "drivetrain",
                "tensorboard",
                "torchrun",
                "mpirun",
                "cd",
                "echo",
                ".",
                "git",
                "pytest",
            ), command
            if program == "drivetrain" and not arguments[0].startswith("-"):
                assert arguments[0] in catalogue.names_of("command"), command
            for argument in arguments:
                if re.match(r"(\./|core/|plugins/|contrib/|docs/|tests/)", argument):
                    assert (ROOT / argument).exists(), command
                if re.match(r"drivetrain-\w", argument):
                    assert argument in map(name_of, FOLDERS), command

    def test_no_file_names_a_machine(self) -> None:
        """Paths of one computer and hosts of registries do not belong into a repository."""
        machine = re.compile(r"(?<![\w.}>])/(work|home|root|Users|opt)/\w|\bpypi\.org|files\.pythonhosted")
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        files = [ROOT / line for line in listed.stdout.splitlines() if line != "tests/test_workspace.py"]
        said = [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for path in files
            if path.is_file()
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
            if machine.search(line)
        ]
        assert len(files) > 50
        assert not said, "\n".join(said)
