"""Launchers recognised by the variables they set."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest
import torch

from drivetrain import ConfigError, DeviceManager, PluginError, ProcessGroupStrategy
from drivetrain.cluster import Cluster, asked, detect

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "train",
}


def place(found: Cluster) -> tuple[str, int, int, int, int]:
    return found.launcher, found.rank, found.world_size, found.local_rank, found.local_world_size


def test_torchrun() -> None:
    found = detect(TORCHRUN)
    assert place(found) == ("torchrun", 3, 4, 1, 2)
    assert (found.address, found.port) == ("host", 1234)


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert detect(SRUN | TORCHRUN).launcher == "torchrun"


def test_srun() -> None:
    found = detect(SRUN)
    assert place(found) == ("slurm", 5, 6, 1, 2)
    assert found.address == "gpu07"
    assert found.port is not None and 15000 <= found.port < 30000
    assert found.port != detect(SRUN | {"SLURM_STEP_ID": "1"}).port, "another step of the same job"


def test_srun_on_one_machine_needs_no_port() -> None:
    """The processes meet in a file."""
    found = detect(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"})
    assert (found.address, found.port) == ("127.0.0.1", None)


def test_what_the_caller_chose_is_taken() -> None:
    found = detect(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "4321"})
    assert (found.address, found.port) == ("here", 4321)


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [("4", "0", 4), ("2(x2),3", "2", 3), ("1(x2)", "1", 1), ("", "0", 2)],
    ids=lambda v: str(v) or "unknown",
)
def test_tasks_on_this_node(tasks: str, node: str, here: int) -> None:
    found = detect(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": str(min(1, here - 1))})
    assert found.local_world_size == here


@pytest.mark.parametrize("name", ["interactive", "bash", "zsh"])
def test_a_step_is_one_whatever_the_job_is_called(name: str) -> None:
    """srun inside salloc, whose jobs are called interactive, and `srun -n 6 bash run.sh`."""
    assert place(detect(SRUN | {"SLURM_JOB_NAME": name}))[:3] == ("slurm", 5, 6)


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": None}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_PTY_PORT": "3"}], ids=str)
def test_a_person_at_a_prompt_is_one_process(change: dict[str, str | None]) -> None:
    env = {k: v for k, v in (SRUN | change).items() if v is not None}
    assert place(detect(env)) == ("none", 0, 1, 0, 1)


@pytest.mark.parametrize(
    "env",
    [
        {
            "OMPI_COMM_WORLD_RANK": "2",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
        {"PMIX_RANK": "2", "PMIX_SIZE": "4", "PMIX_LOCAL_RANK": "0", "PMIX_LOCAL_SIZE": "2"},
    ],
    ids=["Open MPI", "Hydra", "PMIx"],
)
def test_mpi(env: dict[str, str]) -> None:
    assert place(detect(env)) == ("mpi", 2, 4, 0, 2)


# mpirun of Open MPI in an allocation of two machines: its daemon there is a task of srun's, and the ranks inherit that one's variables
OMPI_IN_SLURM = SRUN | {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "PMIX_RANK": "9",
}
HYDRA_IN_SLURM = {name: value for name, value in OMPI_IN_SLURM.items() if not name.startswith(("OMPI", "PMIX"))} | {
    "PMI_RANK": "9",
    "PMI_SIZE": "16",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "8",
}


@pytest.mark.parametrize("env", [OMPI_IN_SLURM, HYDRA_IN_SLURM], ids=["Open MPI", "Hydra"])
def test_mpirun_inside_an_allocation_is_mpi(env: dict[str, str]) -> None:
    assert place(detect(env)) == ("mpi", 9, 16, 1, 8)


@pytest.mark.parametrize(
    "own", [{"PMI_RANK": "5", "PMI_SIZE": "6"}, {"PMIX_RANK": "5", "PMIX_SIZE": "6"}], ids=["pmi2", "pmix"]
)
def test_srun_that_speaks_pmi_is_slurm(own: dict[str, str]) -> None:
    assert place(detect(SRUN | own)) == ("slurm", 5, 6, 1, 2)


def test_hydra_in_the_shell_of_sbatch_is_mpi() -> None:
    """Rank 0 has the numbers of the job, by chance."""
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    found = detect(shell | {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"})
    assert place(found) == ("mpi", 0, 4, 0, 4)


def test_cray_names_the_place_on_the_machine_otherwise() -> None:
    found = detect({"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"})
    assert place(found) == ("mpi", 5, 8, 1, 4)


def test_an_mpi_that_does_not_say_which_process_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for the only machine; where that cannot be, the error says what is missing."""
    for name, value in {"PMI_RANK": "5", "PMI_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert place(detect()) == ("mpi", 5, 8, 5, 8)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"process 6 of this machine has none.*set MPI_LOCALRANKID and MPI_LOCALNRANKS"):
        DeviceManager("auto", 5)


@pytest.mark.parametrize("left", [("RANK",), ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")], ids=str)
def test_some_of_torchruns_variables_are_an_error_and_not_one_process(left: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"of torchrun's variables .* are set, but not .*; set all or none"):
        detect({name: TORCHRUN[name] for name in left})


def test_scripts_that_export_some_of_them_for_srun_are_understood() -> None:
    assert detect(SRUN | {"WORLD_SIZE": "6", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}).launcher == "slurm"


def test_who_is_asked_in_which_order_and_what_each_says() -> None:
    answers = dict(asked(OMPI_IN_SLURM))
    assert list(answers) == ["torchrun", "mpi", "slurm"]
    assert answers["torchrun"] == "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"
    assert isinstance(answers["mpi"], Cluster) and isinstance(answers["slurm"], Cluster)
    assert dict(asked({}))["mpi"] == "none of OMPI_COMM_WORLD_RANK, PMI_RANK, PMIX_RANK set"


def test_a_port_that_something_else_has_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what listens for IPv6 too, beside which torch's store would listen in vain."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in (SRUN | {"SLURM_PROCID": "0", "MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"something else has port .*; set MASTER_PORT to another one"):
            ProcessGroupStrategy().setup(torch.device("cpu"))


def test_nothing_is_one_process() -> None:
    assert place(detect({})) == ("none", 0, 1, 0, 1)


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}])
def test_contradictions_are_errors(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="distributed: the environment"):
        detect(TORCHRUN | change)


def test_a_plugin_is_asked_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names it, so that nothing is imported that nobody asked for."""
    asked = []

    def found(environment: Mapping[str, str]) -> Cluster | None:
        asked.append(environment)
        return Cluster("mine", 1, 2) if "MINE" in environment else None

    monkeypatch.setattr("drivetrain.cluster.load", lambda kind, name: {("cluster", "mine"): found}[kind, name])
    assert place(detect({"DRIVETRAIN_CLUSTER": "mine", "MINE": "1", **TORCHRUN}))[:3] == ("mine", 1, 2)
    assert detect({"DRIVETRAIN_CLUSTER": "mine", **TORCHRUN}).launcher == "torchrun"
    assert detect(TORCHRUN).launcher == "torchrun" and len(asked) == 2
    monkeypatch.undo()
    with pytest.raises(PluginError, match="no plugin named 'nobodys' of the kind cluster"):
        detect({"DRIVETRAIN_CLUSTER": "nobodys"})
