"""Two network namespaces with host names of their own stand for two machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SCRIPT = str(Path(__file__).with_name("failing_rank.py"))
NAMES = [f"dt{os.getpid() % 10000}{letter}" for letter in "ab"]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


def connect() -> bool:
    """Two namespaces with a cable between them."""
    return (
        all(ip("netns", "add", name) for name in NAMES)
        and ip("link", "add", NAMES[0], "netns", NAMES[0], "type", "veth", "peer", "name", NAMES[1], "netns", NAMES[1])
        and all(
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name) for name, address in zip(NAMES, ADDRESSES, strict=True)
        )
        and all(ip("-n", name, "link", "set", device, "up") for name in NAMES for device in (name, "lo"))
    )


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the programs ip and unshare")
    try:
        if not connect():
            pytest.skip("this machine does not allow network namespaces")
        yield NAMES
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def run(hosts: list[str], folder: Path, *fault: str) -> list[tuple[int, str]]:
    """One process on each host; the exit codes and what was said."""
    processes = []
    for rank, host in enumerate(hosts):
        place = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": 29400,
        }
        env = (
            os.environ
            | {name: str(value) for name, value in place.items()}
            | {"GLOO_SOCKET_IFNAME": host, "OMP_NUM_THREADS": "1"}
        )
        inside = ["sh", "-c", f'hostname {host}; exec "$@"', "sh", sys.executable, SCRIPT, str(folder), *fault]
        command = ["ip", "netns", "exec", host, "unshare", "--uts", *inside]
        processes.append(subprocess.Popen(command, env=env, stderr=-1, text=True))
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    ours = [
        "\n".join(line for line in text.splitlines() if not line.startswith("[W")) for text in said
    ]  # c10d warns of the names
    return [(process.returncode, text) for process, text in zip(processes, ours, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_process_on_another_host_is_named_and_the_rerun_is_exact(hosts: list[str], tmp_path: Path) -> None:
    reference, failing = tmp_path / "reference", tmp_path / "failing"
    for folder in (reference, failing):
        folder.mkdir()
    assert [code for code, _ in run(hosts, reference, "nothing", "nowhere", "1")] == [0, 0]
    (first, said), (second, _) = run(hosts, failing, "kill", "evaluation", "1")
    assert (first, second) == (1, -9)
    assert said.startswith(f"rank 1 on {hosts[1]} does not answer: its process ")
    assert [code for code, _ in run(hosts, failing, "kill", "evaluation", "1")] == [0, 0]
    one, other = (torch.load(folder / "final.pt") for folder in (reference, failing))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_an_error_on_another_host_is_told(hosts: list[str], tmp_path: Path) -> None:
    (_, first), (_, second) = run(hosts, tmp_path, "raise", "forward", "1")
    line = f"rank 1 on {hosts[1]} failed: RuntimeError: the data went away"
    assert first.startswith(line) and second.startswith(line)
