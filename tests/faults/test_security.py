"""What must not stand in the sources: ways from data to code, to a shell, or to an open port (research list S1, S12, S14, S16)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for top in ("core", "plugins", "contrib") for path in ROOT.glob(f"{top}/**/*.py") if "build" not in path.parts
)

CALLS = {
    "pickle.load": "a pickle runs code when it is read",
    "pickle.loads": "a pickle runs code when it is read",
    "pickle.Unpickler": "a pickle runs code when it is read",
    "marshal.loads": "marshal is not safe against foreign data",
    "shelve.open": "a shelf is made of pickles",
    "joblib.load": "joblib files are pickles",
    "dill.load": "a pickle runs code when it is read",
    "cloudpickle.load": "a pickle runs code when it is read",
    "eval": "text becomes code",
    "exec": "text becomes code",
    "os.system": "a shell reads it",
    "os.popen": "a shell reads it",
    "yaml.load": "YAML tags make objects; use the safe loader's events",
    "yaml.unsafe_load": "YAML tags make objects",
    "torch.hub.load": "downloads and runs code",
    "torch.jit.load": "an archive of code",
    "torch.package.PackageImporter": "an archive of code",
    "tempfile.mktemp": "another process can take the name first",
    "urllib.request.urlopen": "nothing is downloaded by itself",
    "urllib.request.urlretrieve": "nothing is downloaded by itself",
}
ARGUMENTS = {
    "shell": (True, "a shell reads it"),
    "weights_only": (False, "a pickle runs code when it is read"),
    "allow_pickle": (True, "a pickle runs code when it is read"),
    "trust_remote_code": (True, "runs code that was downloaded"),
}
# Where it is right: an object that another process of the same run made, as torch's own `all_gather_object` sends it; and a file
# of plugins that the command line or code has named, which is imported.
ALLOWED = {
    ("core/drivetrain/distributed.py", "pickle.loads"),
    ("plugins/xla/drivetrain_xla/__init__.py", "pickle.loads"),
    ("core/drivetrain/registry.py", "exec"),
}
TEXTS = re.compile(r"bind_all|0\.0\.0\.0|verify\s*=\s*False")


def findings(code: str, where: str) -> Iterator[str]:
    """Everything forbidden in a piece of code."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, place = ast.unparse(node.func), f"{where}:{node.lineno}"
        if name in CALLS and (where, name) not in ALLOWED:
            yield f"{place}: {name}: {CALLS[name]}"
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        for argument, (forbidden, why) in ARGUMENTS.items():
            if argument in keywords and keywords[argument] is forbidden:
                yield f"{place}: {argument}={forbidden}: {why}"
        if name == "torch.load" and keywords.get("weights_only") is not True:
            yield f"{place}: torch.load without weights_only=True"
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and TEXTS.search(node.value)
        ):
            yield f"{where}:{node.lineno}: {node.value!r}: opens a port to everybody, or trusts everybody"


def test_the_sources_have_none_of_it() -> None:
    found = [line for path in SOURCES for line in findings(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]
    assert len(SOURCES) > 50
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "subprocess.run(text, shell=True)",
        "def f():\n    return eval('1')",
        "numpy.load(path, allow_pickle=True)",
        "start(['tensorboard', '--bind_all'])",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_would_be_found(code: str) -> None:
    assert len(list(findings(code, "planted.py"))) >= 1


@pytest.mark.parametrize(
    "code", ["torch.load(path, weights_only=True)", "model.eval()", "'''says: never use --bind_all'''", "run(x, shell=False)"]
)
def test_what_is_harmless_is_not(code: str) -> None:
    assert not list(findings(code, "planted.py"))
