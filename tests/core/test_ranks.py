"""What processes of one run agree upon before they train, and what is said when they cannot."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import ConfigError, DeviceManager, Peer, PeerFailure, ProcessGroupStrategy
from drivetrain.agreement import _shared_devices
from drivetrain.devices import divide_cores
from drivetrain.fitting import choose_strategy, training_bytes
from drivetrain.peers import Blame
from drivetrain.run import Run

SCRIPT = Path(__file__).with_name("two_ranks.py")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def place(rank: int, port: int) -> dict[str, str]:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in names.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    env = os.environ | {"OMP_NUM_THREADS": "1", "DRIVETRAIN_PLUGINS": "off"}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], env=env | place(rank, port), stderr=-1, text=True)
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


HOST = os.uname().nodename


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("seed", f"seed: 0 on rank 0 on {HOST}, but 1 on rank 1 on {HOST}"),
        ("own period", f".every: '1st' on rank 0 on {HOST}, but '2st' on rank 1 on {HOST}"),
        ("versions", f"version of drivetrain-core: '0.1.0' on rank 0 on {HOST}, but '0.0.9' on rank 1 on {HOST}"),
        ("data", f"samples of the training data: 8 on rank 0 on {HOST}, but 9 on rank 1 on {HOST}"),
        ("model", f"shape of weight: (2, 2) on rank 0 on {HOST}, but (3, 2) on rank 1 on {HOST}"),
        ("callback's version", f"mine 1.0 on rank 0 on {HOST}, but 'mine 1.1' on rank 1".replace("mine 1.0", "'mine 1.0'")),
        ("indivisible", "global_batch_size: 6 is no multiple of per_device_batch_size × processes = 2 × 2 = 4"),
    ],
)
def test_a_difference_is_told_on_both_and_said_by_rank_0(results: list[dict[str, Any]], scenario: str, message: str) -> None:
    first, second = (found[scenario] for found in results)
    assert message in first["error"] and first["error"] == second["error"]
    assert (first["said"], second["said"]) == (False, True)


@pytest.mark.parametrize("scenario", ["equal", "local", "own callback", "one sample"])
def test_what_may_differ_is_left_alone(results: list[dict[str, Any]], scenario: str) -> None:
    """Places on the machine, callbacks without a period, and fewer samples than ranks: one rank stands in with weight 0."""
    first, second = (found[scenario] for found in results)
    assert (first["error"], second["error"]) == ("", "")
    assert first["weights"] == second["weights"]


def test_one_sample_on_two_ranks_trains_as_on_one(results: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.01), torch.arange(2.0).reshape(1, 2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(rows), rows, reduction="mean").backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(torch.tensor(results[0]["one sample"]["weights"]), model.weight, rtol=1e-6)


def test_a_rehearsal_of_a_run_measured_in_tokens_leaves_no_trace(results: list[dict[str, Any]]) -> None:
    assert results[0]["tokens"]["steps"] == 5
    assert all(found["tokens after a rehearsal"] == results[0]["tokens"] for found in results)


def test_timeouts_are_long_until_the_first_step(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert (found["equal"]["before"], found["equal"]["after"]) == (60.0, 30.0)


def test_each_knows_the_others(results: list[dict[str, Any]]) -> None:
    peers = [[rank, results[rank]["pid"], "running"] for rank in (0, 1)]
    assert results[0]["equal"]["peers"] == results[1]["equal"]["peers"] == peers


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unreachable_meeting_place(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    port = free_port()
    for name, value in place(rank, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=rf"process {rank} of 2 did not meet the others at 127.0.0.1:{port} .*Were all 2 started"
    ):
        ProcessGroupStrategy(timeout=2.0, setup_timeout=2.0).setup(torch.device("cpu"))


def test_the_connections_are_closed_while_the_interpreter_is_whole() -> None:
    """Handlers run in the reverse order of their registration: this one after the engine's."""
    code = """
import atexit, torch, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))
from drivetrain import ProcessGroupStrategy
ProcessGroupStrategy().setup(torch.device("cpu"))
print(dist.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout.split(), done.returncode) == (["True", "False"], 0), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_collective_just_before_the_end_kills_nobody() -> None:
    """Without the pause at the end one in four of these processes aborts, in a thread of gloo that lets go of a tensor too late."""
    code = """
import torch
from torch.nn.parallel import DistributedDataParallel
from drivetrain import ProcessGroupStrategy
strategy = ProcessGroupStrategy()
strategy.setup(torch.device("cpu"))
keeps_the_group = DistributedDataParallel(torch.nn.Linear(4, 4))
for _ in range(20):
    strategy.gather("x" * 1000)
"""
    for _ in range(16):
        env, port = os.environ | {"OMP_NUM_THREADS": "1"}, free_port()
        ranks = [subprocess.Popen([sys.executable, "-c", code], env=env | place(rank, port), stderr=-1) for rank in (0, 1)]
        said = [process.communicate(timeout=100)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], said


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for processes in (1, 2, 16):
        divide_cores(processes)
    assert threads == [4, 1], "one alone keeps what torch chose"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    divide_cores(4)  # bound to two cores of its own
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    divide_cores(4)
    assert threads == [4, 1]


class TestDevices:
    @pytest.fixture(autouse=True)
    def two_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.set_devices(2)

    def set_devices(self, count: int) -> None:
        self.monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        self.monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        self.monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    @pytest.mark.parametrize("wanted", ["auto", "cuda"])
    def test_each_process_has_its_own(self, wanted: str) -> None:
        assert DeviceManager(wanted, 1).device == torch.device("cuda", 1)
        with pytest.raises(ConfigError, match=r"process 3 of this machine has none: there are only 2 cuda devices\. Start 2"):
            DeviceManager(wanted, 2)

    def test_a_process_bound_to_one_device_by_slurm_takes_it(self) -> None:
        self.set_devices(1)
        with pytest.raises(ConfigError, match=r"process 2 of this machine has none: there are only 1 cuda device\. Start 1"):
            DeviceManager("auto", 1)
        for name in ("SLURM_PROCID", "SLURM_LOCALID"):
            self.monkeypatch.setenv(name, "1")
        for name, value in {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}.items():
            self.monkeypatch.setenv(name, value)
        assert DeviceManager("auto", 1).device == torch.device("cuda", 0)

    def test_two_processes_on_one_device_are_found(self) -> None:
        apart = [Peer(0, "a", 1, "GPU-0"), Peer(1, "a", 2, "GPU-1"), Peer(2, "b", 1, "GPU-0")]
        assert _shared_devices(apart) == ""
        assert _shared_devices([*apart, Peer(3, "b", 2, "GPU-0")]).startswith("rank 2 on b and rank 3 have the same device")
        assert _shared_devices([Peer(0, "a", 1), Peer(1, "a", 2)]) == "", "the CPU is shared"


class TestChoice:
    """ddp or fsdp: 4 + 4 + 8 bytes for each trained parameter of fp32 against 0.7 of a device."""

    def model(self) -> nn.Module:
        return nn.Linear(1000, 1000, bias=False)

    def test_bytes(self) -> None:
        model = self.model()
        assert training_bytes(model) == 16e6
        assert training_bytes(model, state_8bit=True) == 10e6
        assert training_bytes(model.bfloat16()) == 12e6
        assert training_bytes(model.requires_grad_(False)) == 2e6

    @pytest.mark.parametrize(
        ("memory", "given", "name", "why"),
        [
            (None, {}, "ddp", "on the CPU"),
            (int(16.1e6 / 0.7), {}, "ddp", "fits one device"),
            (int(15.9e6 / 0.7), {}, "fsdp", "does not fit one device"),
            (int(15.9e6 / 0.7), {"state_8bit": True}, "ddp", "fits one device"),
            (1, {"adapters": True}, "ddp", "only adapters"),
        ],
    )
    @pytest.mark.parametrize("built", [True, False])
    def test_choice(
        self, monkeypatch: pytest.MonkeyPatch, memory: int | None, given: dict[str, bool], name: str, why: str, built: bool
    ) -> None:
        monkeypatch.setattr("drivetrain.fitting.is_installed", lambda kind, name: True)
        options = {"state_8bit": False, "adapters": False} | given
        chosen, because = choose_strategy(self.model() if built else None, self.model, memory, **options)
        assert chosen == name and why in because

    def test_without_fsdp_it_stays_ddp_and_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("drivetrain.fitting.is_installed", lambda kind, name: False)
        name, why = choose_strategy(self.model(), self.model, 1000, state_8bit=False, adapters=False)
        assert name == "ddp" and "drivetrain-fsdp is not installed" in why

    def test_a_model_that_cannot_be_built_without_memory(self) -> None:
        def fails() -> nn.Module:
            return nn.Linear(torch.ones(1).int().item(), 1)  # reads a value, which the meta device has not

        assert choose_strategy(None, fails, 1000, state_8bit=False, adapters=False)[0] == "ddp"

    @pytest.mark.parametrize("launcher", ["ddp", "mpi"])
    def test_auto_asks_whether_the_model_fits_whatever_has_started_the_processes(
        self, monkeypatch: pytest.MonkeyPatch, launcher: str
    ) -> None:
        monkeypatch.setattr("drivetrain.run.choose_strategy", lambda *_, **__: ("fsdp", "it is large"))
        monkeypatch.setattr("drivetrain.run.make_component", lambda kind, name, where: f"{kind}:{name}")
        run = SimpleNamespace(
            single={"distributed": SimpleNamespace(plugin_name=f"strategy:{launcher}")},
            config=SimpleNamespace(distributed="auto", mode_name="pretraining"),
            given=SimpleNamespace(model=self.model()),
            devices=SimpleNamespace(total_memory=1),
            ctx=None,
        )
        assert Run._choose_strategy(run) == "it is large"  # type: ignore[arg-type]
        assert run.single["distributed"] == "strategy:fsdp"


class TestBlame:
    """Who is at fault, as told over one store by objects that stand for ranks."""

    @pytest.fixture(autouse=True)
    def one_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("drivetrain.peers._rounds", itertools.repeat(7))

    def of(self, store: Any, rank: int) -> Blame:
        return Blame(store, Peer(rank, "elsewhere", 1))

    def peers(self) -> list[Peer]:
        return [Peer(rank, "elsewhere", 1) for rank in (0, 1)]

    def test_the_first_that_fails_by_itself_is_named_on_the_others(self) -> None:
        store = torch.distributed.HashStore()
        own = RuntimeError("the data went away")
        assert self.of(store, 1).judge(own, self.peers()) is own
        cause = self.of(store, 0).judge(torch.distributed.DistBackendError("closed"), self.peers())
        assert isinstance(cause, PeerFailure)
        assert str(cause).startswith("rank 1 on elsewhere failed: RuntimeError: the data went away")

    def test_an_error_stays_what_it_is_when_the_store_is_gone(self) -> None:
        class Gone:
            def __getattr__(self, name: str) -> Any:
                raise torch.distributed.DistNetworkError("closed")

        blame, own = self.of(torch.distributed.HashStore(), 1), ValueError("mine")
        blame.store = Gone()
        assert blame.judge(own, self.peers()) is own
        cause = blame.judge(torch.distributed.DistBackendError("closed"), self.peers())
        assert str(cause).startswith("rank 0 does not answer")

    def test_a_failed_collective_without_anybody_to_blame_stays_what_it_is(self) -> None:
        store = torch.distributed.HashStore()
        error = torch.distributed.DistBackendError("sizes differ")
        store.set("drivetrain/7/waits/1", "")
        assert self.of(store, 0).judge(error, self.peers()) is error


def test_states_of_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    peer = Peer(1, os.uname().nodename, process.pid)
    assert peer.state == "running"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert peer.state == "gone", "not yet waited for"
    process.wait()
    assert peer.state == "gone"
    assert Peer(1, "elsewhere", process.pid).state == "unknown"
