"""Launchers recognised by the variables they set."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from drivetrain import ConfigError, PluginError
from drivetrain.cluster import Cluster, detect

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
    assert found.port == 15000 + 4242


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [("4", "0", 4), ("2(x2),3", "2", 3), ("1(x2)", "1", 1), ("", "0", 2)],
    ids=lambda v: str(v) or "unknown",
)
def test_tasks_on_this_node(tasks: str, node: str, here: int) -> None:
    found = detect(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": str(min(1, here - 1))})
    assert found.local_world_size == here


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": None}, {"SLURM_JOB_NAME": "bash"}, {"SLURM_PTY_PORT": "3"}], ids=str)
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
