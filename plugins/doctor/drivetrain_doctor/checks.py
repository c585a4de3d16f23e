"""What the doctor looks at: each check says what it found, and a remedy when that will not do."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch
from packaging.requirements import InvalidRequirement, Requirement

from drivetrain import DrivetrainError
from drivetrain.cluster import Cluster, asked, detect
from drivetrain.registry import CORE, Candidate, all_candidates, candidates, find
from drivetrain_doctor.imports import Imported, import_all

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # what foreign text could tell a terminal
_MEGABYTES = 16
_SLOW = 5.0  # MB/s
_MEETING = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
value = torch.tensor([float(rank + 1)])
dist.all_reduce(value)
dist.destroy_process_group()
assert value.item() == 3.0, value
"""


@attrs.frozen
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        ok: whether a training could go on.
        text: what was found.
        remedy: what to do, when that is not as it should be.
    """

    check: str
    ok: bool
    text: str
    remedy: str = ""

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        advice = f"\n{' ' * 8}→ {_clean(self.remedy)}" if self.remedy else ""
        return f"{'ok' if self.ok else 'FAILED':<7} {_clean(self.check)}: {_clean(self.text)}{advice}"


def examine(output_dir: Path) -> Iterator[Finding]:
    """Run every check, each by itself: one that raises becomes a finding."""
    checks: list[tuple[str, Callable[[], Finding | Iterator[Finding]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("devices", _devices),
        ("launch environment", _launch),
        ("plugins", _plugins),
        ("dependencies", _dependencies),
        ("two processes", _two_processes),
        ("output directory", lambda: _writing(output_dir)),
        ("checks of plugins", _brought),
    ]
    for name, check in checks:
        try:
            found = check()
            yield from ([found] if isinstance(found, Finding) else found)
        except Exception as error:
            yield Finding(name, False, f"{type(error).__name__}: {error}", "this is not expected; please report it")


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    return Finding(
        "python", fine, f"{platform.python_version()} in {sys.prefix}", "" if fine else "install Python 3.11 or newer"
    )


def _torch() -> Finding:
    threads, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    said = f"{torch.__version__}, {threads} threads{f' (OMP_NUM_THREADS={wanted})' if wanted else ''}, drivetrain-core "
    value = torch.ones(2, 2, requires_grad=True)
    (value @ value).sum().backward()
    works = value.grad is not None and value.grad.sum().item() == 16.0
    remedy = "" if works else "a product and its gradient are wrong: install torch again"
    return Finding("torch", works, said + metadata.version(CORE), remedy)


def _devices() -> Iterator[Finding]:
    if not torch.accelerator.is_available():
        built = torch.version.cuda or torch.version.hip
        remedy = "this torch has GPU support but sees no device: look at the driver and CUDA_VISIBLE_DEVICES" if built else ""
        yield Finding("devices", True, "cpu", remedy)
        return
    kind = torch.accelerator.current_accelerator()
    for index in range(torch.accelerator.device_count()):
        name = torch.device("cpu") if kind is None else torch.device(kind.type, index)
        try:
            total = float(torch.ones(2, device=name).sum())
            remedy = (
                "" if total == 2.0 else "a sum on it is wrong: it or its driver is broken; choose another with device = ..."
            )
            yield Finding("devices", total == 2.0, f"{name}: {_device_name(name)}", remedy)
        except RuntimeError as error:
            yield Finding("devices", False, f"{name}: {error}", "it cannot compute: is it in use, or its driver too old?")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _launch() -> Iterator[Finding]:
    """Which process this is and how that is known; then everybody who was asked, in order, and why it was not they."""
    try:
        found = detect()
    except DrivetrainError as error:
        yield Finding("launch environment", False, str(error), "unset the variables of the launcher that is not in use")
        return
    if found.launcher == "none":
        yield Finding("launch environment", True, "one process, no launcher")
    else:
        yield Finding("launch environment", True, f"{_place(found)} (from {', '.join(found.evidence)})")
    said, known = [], False
    for name, answer in asked(os.environ):
        if isinstance(answer, str):
            said.append(f"{name}: {answer}")
        else:
            said.append(f"{name}: {_place(answer)}, but an earlier one counts" if known else f"{name}: this one")
            known = True
    yield Finding("launchers in order", True, "; ".join(said))


def _place(found: Cluster) -> str:
    return f"{found.launcher}: rank {found.rank} of {found.world_size}, {found.local_rank} on this machine"


def _plugins() -> Iterator[Finding]:
    """Version ranges, conflicts of names, and whether each can be imported."""
    every = list(all_candidates())
    bad = 0
    for candidate, imported in zip(every, import_all(every), strict=True):
        finding = _plugin(candidate, imported)
        if not finding.ok:
            bad += 1
            yield finding
    distributions = sorted({f"{candidate.distribution} {candidate.version}" for candidate in every})
    said = f"{len(every) - bad} of {len(every)} in {len(distributions)} distributions can be used"
    yield Finding("plugins", True, said)
    yield Finding("versions", True, ", ".join([f"{CORE} {metadata.version(CORE)}", *distributions]))


def _plugin(candidate: Candidate, imported: Imported) -> Finding:
    name, repair = f"plugin {candidate.kind}:{candidate.name}", f"repair {candidate.distribution}, or pip uninstall it"
    try:
        if len(candidates(candidate.kind)[candidate.name]) > 1:
            find(candidate.kind, candidate.name)  # says who claims the name
    except DrivetrainError as error:
        text, _, remedy = str(error).partition(". ")
        return Finding(name, False, text, remedy or repair)
    text, _, remedy = imported.error.partition(". ")
    return Finding(name, False, text, remedy or repair) if text else Finding(name, True, candidate.target)


def _dependencies() -> Iterator[Finding]:
    """Whether the core and every distribution with plugins find what they require, in the versions that they require."""
    wrong = 0
    for name in sorted({CORE, *(candidate.distribution for candidate in all_candidates())}):
        for problem in _unmet(name):
            wrong += 1
            yield Finding(
                f"dependencies of {name}", False, problem, f"pip install -U {name}, and read what pip says of conflicts"
            )
    if not wrong:
        yield Finding("dependencies", True, "all are there, in versions that suit")


def _unmet(name: str) -> Iterator[str]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # what has no metadata requires nothing
        return
    for line in lines:
        try:
            wanted = Requirement(line)
        except InvalidRequirement as error:
            yield f"it requires {line!r}: {error}"
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"it requires {wanted.name}{wanted.specifier}, which is not installed"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"it requires {wanted.name}{wanted.specifier}, but {wanted.name} {found} is installed"


def _two_processes() -> Finding:
    """An all-reduce over gloo on this machine."""
    with tempfile.TemporaryDirectory(prefix="drivetrain-doctor-") as folder:
        command = [sys.executable, "-c", _MEETING]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank), f"{folder}/meeting"], env=env, stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        try:
            errors = [rank.communicate(timeout=120)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.kill()
                rank.communicate()
            errors = ["they did not meet within two minutes"] * 2
    failed = [error.strip().rpartition("\n")[2] for rank, error in zip(ranks, errors, strict=True) if rank.returncode]
    if failed:
        remedy = "look at the firewall of the loopback, and set GLOO_SOCKET_IFNAME to an interface that works, such as lo"
        return Finding("two processes", False, failed[0], remedy)
    return Finding("two processes", True, "an all-reduce over gloo works")


def _writing(folder: Path) -> Finding:
    """How fast the directory takes what a checkpoint writes; nothing is left behind, and no directory is made."""
    where = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            began = time.perf_counter()
            for _ in range(_MEGABYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _MEGABYTES / (time.perf_counter() - began)
    except OSError as error:
        return Finding("output directory", False, f"{where}: {error.strerror}", "give another output_dir")
    slow = "checkpoints would be slow there: give an output_dir on a local disk" if speed < _SLOW else ""
    return Finding("output directory", True, f"{where} takes {speed:.0f} MB/s", slow)


def _brought() -> Iterator[Finding]:
    """The checks of installed plugins."""
    for group in candidates("check").values():
        for candidate in group:
            name = f"{candidate.name} ({candidate.distribution})"
            try:
                check: Any = candidate.load()
                ok, text, remedy = check()
                advice = str(remedy) or ("" if ok else f"ask {candidate.distribution} what to do")
                yield Finding(name, bool(ok), str(text), advice)
            except Exception as error:
                yield Finding(name, False, f"{type(error).__name__}: {error}", f"report it to {candidate.distribution}")


def _clean(text: str) -> str:
    return _CONTROL.sub(" ", text)
