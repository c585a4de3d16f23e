"""What README files and the site say is done, block by block, in an empty folder: `nox -s trials` runs the commands, `nox` the rest.

The rules of a page. Its blocks are run in their order and share one folder; Python blocks share their names, as when typed in.
A block that opens with `# NAME.ext` is a file. A TOML block that is no file is checked as a configuration, or, if it is a part of a
pyproject.toml, read; so are JSON and YAML, and hooks in an outline must exist. Lines of a console block that open with `$ ` are
commands, others what they print: each must be found in the output, in this order, with `…` for anything. A comment before a block,
`<!-- not run: REASON -->`, leaves it at a check of its syntax; NOT_RUN counts them. `pip install` is passed over here, but for
`pip install -e .`: test_extending.py, test_install.py and test_dist.py install, the last of them by the words of
docs/tutorials/optimizer.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.e2e.pages import ROOT, Block, blocks, commands_of, find_what_is_shown
from torch import nn

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig
from drivetrain.hookspecs import HOOKS

PATTERNS = ("*.md", "core/README.md", "plugins/*/README.md", "contrib/*/README.md", "docs/*.md", "docs/tutorials/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))

# Commands of a page find these before the real ones: what is installed here stays as it is. `pip install -e .` builds the folder and
# puts it where only this page finds it.
PYTHON = shlex.quote(sys.executable)
INSTALL = "-m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --no-index --upgrade --target"
PASS_OVER = {
    "pip": "#!/bin/sh\nexit 0\n",
    "python": f"""#!/bin/sh
case "$*" in
    "-m pip install "*"-e ."*) exec {PYTHON} {INSTALL} "$PAGE_SITE" . ;;
    "-m pip "*) exit 0 ;;
esac
exec {PYTHON} "$@"
""",
}
# Pages with blocks that are not run, and how many each has: one more needs a look, and a reason.
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "docs/distributed.md": 1,
    "docs/optimizers.md": 1,
    "docs/reliability.md": 1,
    "docs/tutorials/many-gpus.md": 1,
    "docs/tutorials/optimizer.md": 1,
    "docs/tutorials/qlora.md": 1,
    "plugins/audit/README.md": 1,
    "plugins/checkpoint/README.md": 1,
    "plugins/launch/README.md": 1,
    "plugins/tensorboard/README.md": 1,
    "plugins/watchdog/README.md": 1,
    "plugins/xla/README.md": 1,
}
TINY_RUN = """
model = { use = "gpt", layers = 2, heads = 2, width = 16, context = 16 }
data = { use = "text", path = "TEXT", context = 16, held_out = 0.1 }
optimizer = { use = "adamw", lr = 1e-2 }
max_duration = "6st"
per_device_batch_size = 2
callbacks = [{ use = "checkpoint", every = "3st" }]
device = "cpu"
"""


def run(page: Path, commands: bool) -> None:
    names = what_a_reader_has()
    for block in blocks(page):
        check_syntax(block)
        if block.reason is not None:
            continue
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "toml":
            check_table(tomllib.loads(block.text))
        elif block.language == "console" and commands:
            run_commands(block)


def check_syntax(block: Block) -> None:
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "json":
        check_json(block.text)
    elif block.language == "text":
        check_hooks(block.text)
    elif block.language in ("console", "sh"):
        subprocess.run(["bash", "-n"], input="\n".join(commands_of(block)), text=True, check=True)


def check_json(text: str) -> None:
    """One document, or one on each line."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        for line in text.splitlines():
            json.loads(line)


def check_hooks(text: str) -> None:
    """What looks like a hook in an outline of the loop is one."""
    named = set(re.findall(r"\b(?:on|make)_[a-z_]+\b", text))
    assert named <= set(HOOKS), f"no hooks: {sorted(named - set(HOOKS))}"


def check_table(table: dict[str, Any]) -> None:
    """A part of a configuration must be one that could be run; names in it are those of installed plugins."""
    if not table.keys() & {"project", "build-system", "tool"}:
        TrainingConfig.from_table(table).components()


def run_commands(block: Block) -> None:
    """Run a block's commands in one shell, and find what they are said to print."""
    text = "\n".join(commands_of(block))
    for name in sorted(set(re.findall(r"\bruns/([\w-]+)", text))):  # a page that looks at a run has had one
        if not Path("runs", name).exists():
            shell(f"drivetrain train run.toml run_name={name}", block)
    find_what_is_shown(block, shell(text, block))


def shell(script: str, block: Block) -> str:
    here = Path.cwd()
    path = f"{here.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
    settings |= {"PAGE_SITE": str(here.parent / "site"), "PYTHONPATH": str(here.parent / "site")}
    settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-e", "-o", "pipefail", "-c", script]
    result = subprocess.run(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{block}: exit code {result.returncode}\n{script}\n{result.stdout[-4000:]}"
    return result.stdout


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))  # Python blocks import the files that the page has made
    (tmp_path / "bin").mkdir()
    for name, script in PASS_OVER.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    run(page, commands=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "console" for b in blocks(p)) and p.stem != "optimizer"], ids=name
)
def test_the_commands_of_a_page_run(page: Path) -> None:
    run(page, commands=True)


def test_only_blocks_in_a_language_are_written() -> None:
    """A block that no test looks at would be one without a language, or in a new one."""
    known = {"python", "toml", "yaml", "json", "console", "sh", "text"}
    said = [f"{block}: {block.language}" for page in PAGES for block in blocks(page) if block.language not in known]
    bare = [name(page) for page in PAGES if page.read_text(encoding="utf-8").count("\n```") % 2]
    assert (said, bare) == ([], [])


def test_what_is_not_run_is_known() -> None:
    found = {name(page): sum(block.reason is not None for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


def test_wrong_pages_are_noticed(tmp_path: Path) -> None:
    """Negative control: each kind of block can fail."""
    page = ROOT / "planted.md"

    def block(language: str, text: str) -> Block:
        return Block(page, 1, language, text, None)

    with pytest.raises(AssertionError, match="exit code 1"):
        run_commands(block("console", "$ false\n"))
    with pytest.raises(AssertionError, match="is not printed"):
        run_commands(block("console", "$ echo one two\none…three\n"))
    run_commands(block("console", "$ echo one two three\none…three\n"))
    with pytest.raises(Exception, match="optimiser"):
        check_table({"optimiser": "adamw"})
    with pytest.raises(SyntaxError):
        check_syntax(block("python", "def"))
    with pytest.raises(json.JSONDecodeError):
        check_syntax(block("json", '{"a": 1}\n{"b": }\n'))
    with pytest.raises(yaml.YAMLError):
        check_syntax(block("yaml", "a: [1\n"))
    with pytest.raises(AssertionError, match="on_step_ended"):
        check_syntax(block("text", "on_step_start\non_step_ended\n"))
    with pytest.raises(subprocess.CalledProcessError):
        check_syntax(block("console", "$ if true\n"))


def what_a_reader_has() -> dict[str, Any]:
    """Stands for what a page leaves to its reader: a model, data, a configuration and a trainer, under their usual names."""
    Path("train_config.yaml").write_text("max_duration: 2st\nper_device_batch_size: 4\n", encoding="utf-8")
    Path("run.toml").write_text(TINY_RUN.replace("TEXT", str(Path.cwd().parent / "text.txt")), encoding="utf-8")
    data = [{"x": torch.randn(3)} for _ in range(8)]
    names = {"__name__": "__main__", "Callback": Callback, "CallbackContext": CallbackContext}
    names |= {"config": TrainingConfig(max_duration="2st"), "train_ds": data, "eval_ds": data}
    names |= {"model": Squares(), "my_model": Squares()}
    return names | {"trainer": Trainer(Squares(), names["config"], data)}


class Squares(nn.Module):
    """A model that returns its loss, as a mapping batch asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}
