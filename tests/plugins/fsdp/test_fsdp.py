"""Real processes over gloo against one process with the same global batch, and states that move between strategies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import ConfigError, ModelError, Precision, make_component
from drivetrain_fsdp import Fsdp, FsdpStrategy, blocks_to_shard, deferred
from drivetrain_fsdp.deferred import Filler
from drivetrain_fsdp.tensor import TensorParallel, TensorPlan

TRAINING = str(Path(__file__).parents[1] / "ddp" / "training.py")  # the same trainings as for ddp
OPTIONS = str(Path(__file__).parent / "options.py")
MOVING = str(Path(__file__).parent / "moving.py")


def launch(processes: int, *arguments: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    for processes in (1, 2):
        launch(processes, TRAINING, str(folder / f"{processes}.json"), "fsdp")
    return {processes: json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2)}


def difference(one: list[Any], two: list[Any]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(two, dtype=torch.float64)
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("run", ["pairs", "tokens", "loader"])
@pytest.mark.parametrize("what", ["losses", "gradients", "weights", "eval"])
def test_two_processes_equal_one(results: dict[int, dict[str, Any]], run: str, what: str) -> None:
    """Accumulation, a last step of 5 of 24 samples, unequal numbers of targets, clipping: equal to rounding."""
    one, two = results[1][run], results[2][run]
    assert one["steps"] == two["steps"] == 6
    assert difference(one[what], two[what]) < 1e-6


def test_negative_control_means_without_weights_differ(results: dict[int, dict[str, Any]]) -> None:
    assert difference(results[1]["unweighted"]["gradients"], results[2]["unweighted"]["gradients"]) > 1e-3


@pytest.mark.slow
def test_a_state_moves_between_strategies_and_numbers_of_processes(tmp_path: Path) -> None:
    """Saved on two sharded processes, it loads bit by bit on two, and on one, and the rest of the run is the same."""
    state, two, one = (str(tmp_path / name) for name in ("state.pt", "two.json", "one.json"))
    launch(2, MOVING, "save", state, two)
    launch(2, MOVING, "load", state, str(tmp_path / "again.json"))
    launch(1, MOVING, "load", state, one)
    saved, again, alone = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "again.json", "one.json"))
    assert saved["shapes"] != saved["local_shapes"], "nothing was sharded"
    assert again["at_load"] == alone["at_load"] == saved["at_save"]
    assert again["end"] == saved["end"]
    assert difference(alone["end"], saved["end"]) < 1e-6


TENSOR: dict[str, Any] = {"tensor_parallel": {"size": 2}}
TWO: dict[str, dict[str, Any]] = {
    "default": {},
    "half": {"half": True},
    "deferred": {"options": {"defer_init": True}},
    "deferred, tied": {"options": {"defer_init": True}, "model": "tied"},
    "on meta": {"model": "meta"},
    "recomputed": {"activation_checkpointing": True},
    "recomputed in part": {"activation_checkpointing": "selective"},
    "offload": {"options": {"cpu_offload": True}},
    "not resharded": {"options": {"reshard_after_forward": False}},
    "tensor parallel": {"options": TENSOR, "data_ranks": 1},
    "tensor parallel, deferred, tied": {"options": {**TENSOR, "defer_init": True}, "model": "tied", "data_ranks": 1},
}
LONG: dict[int, dict[str, dict[str, Any]]] = {
    2: {"compiled": {"compile": True}, "only replicas": {"options": {"shards": 1}}},
    4: {"replicas of shards": {"options": {"shards": 2}}, "tensor parallel": {"options": TENSOR, "data_ranks": 2}},
}


def options_of(processes: int, wanted: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the trainings in options.py give with that many processes."""
    if processes == 1:
        wanted = {
            name: {k: v for k, v in given.items() if k not in ("options", "data_ranks")} for name, given in wanted.items()
        }
    launch(processes, OPTIONS, str(folder / f"{processes}.json"), json.dumps(wanted))
    found: dict[str, Any] = json.loads((folder / f"{processes}.json").read_text())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("options")
    return {processes: options_of(processes, TWO, folder) for processes in (1, 2)}


@pytest.mark.parametrize("name", TWO)
def test_options_change_no_number(two: dict[int, dict[str, Any]], name: str) -> None:
    """The first weights bit by bit, whether they were drawn at once or block by block; the rest to rounding."""
    one, many = two[1][name], two[2][name]
    assert many["first"] == one["first"]
    close = 1e-3 if name == "half" else 1e-6
    assert difference(one["losses"], many["losses"]) < close
    assert difference(one["last"], many["last"]) < close
    assert any(shape != whole for shape, whole in zip(many["local"], one["local"], strict=True)), "nothing was sharded"


def test_blocks_are_gathered_in_what_the_precision_computes_in(two: dict[int, dict[str, Any]]) -> None:
    assert two[1]["half"]["seen"]["weights"] == "torch.float32"  # and cast by autocast
    assert two[2]["half"]["seen"] == {"weights": "torch.bfloat16", "inputs": two[1]["half"]["seen"]["inputs"]}
    assert two[2]["default"]["seen"]["weights"] == "torch.float32"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", LONG)
def test_replicas_tensor_parallelism_and_compiled_blocks(processes: int, tmp_path: Path) -> None:
    wanted = LONG[processes]
    one, many = (options_of(n, wanted, tmp_path) for n in (1, processes))
    for name in wanted:
        assert many[name]["first"] == one[name]["first"]
        assert difference(one[name]["losses"], many[name]["losses"]) < 1e-6, name
        assert difference(one[name]["last"], many[name]["last"]) < 1e-6, name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_blocks_are_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(3)), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    assert blocks_to_shard(model) == list(model[1])
    assert blocks_to_shard(model, min_parameters=21) == []
    model._no_split_modules = ["Linear"]
    assert len(blocks_to_shard(model)) == 5
    assert blocks_to_shard(nn.Linear(2, 2)) == []


def test_blocks_by_size() -> None:
    """Without repetition: modules of at least an eighth of the model, what is small with the one around it; never a tied one."""
    small = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2))
    model = nn.Sequential(nn.Linear(8, 8), small, nn.Conv1d(8, 8, 1), nn.ModuleDict({"a": nn.Linear(8, 8, bias=False)}))
    assert blocks_to_shard(model) == [model[0], model[2], model[3]["a"]]
    assert blocks_to_shard(model, min_parameters=70) == [model[0], model[2]]
    model[3]["a"].weight = model[0].weight
    assert blocks_to_shard(model) == [model[2]]


class Elaborate(nn.Module):
    """Weights drawn, drawn again, computed from others, tied, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.norm = nn.BatchNorm1d(6)
        nn.init.trunc_normal_(self.attention.out_proj.weight)
        nn.init.orthogonal_(self.attention.in_proj_weight)
        self.layer.weight.data.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None])
        self.tied.weight = self.layer.weight
        self.free = nn.Parameter(torch.randn(3, 6) @ self.layer.weight.detach())
        self.register_buffer("table", torch.outer(torch.arange(4), torch.tensor([0.5, 0.25])).cos())


def test_a_deferred_model_gets_the_weights_it_would_have_had() -> None:
    torch.manual_seed(3)
    at_once, after = Elaborate(), torch.default_generator.get_state()
    torch.manual_seed(3)
    later = deferred(Elaborate)
    assert isinstance(later, Elaborate)
    assert torch.equal(torch.default_generator.get_state(), after)
    assert all(p.is_meta for p in later.parameters())
    fill = Filler(later, torch.device("cpu"))
    for module in reversed(list(later.modules())):
        fill(module)
    found = later.state_dict()
    for name, value in at_once.state_dict().items():
        assert torch.equal(found[name], value), name


def test_what_cannot_be_deferred_says_so() -> None:
    class Reading(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight.data.div_(self.weight.sum().item())

    class Own(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight.data.normal_(generator=torch.Generator())

    with pytest.raises(ModelError, match="cannot be built on the meta device"):
        deferred(lambda: Reading(2, 2))
    with pytest.raises(ModelError, match="generator of its own"):
        deferred(lambda: Own(2, 2))
    with torch.device("meta"):
        model = Elaborate()
    with pytest.raises(ModelError, match=r"Elaborate on the meta device .* no reset_parameters"):
        Filler(model, torch.device("cpu"))(model)


class Mesh:
    """A mesh of two as far as a plan looks at it."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({}, "has no plan of its own"),
        ({"0": "diagonal"}, "'diagonal' is unknown"),
        ({"5": "colwise"}, "'5' matches no layer"),
        ({"1": "colwise"}, "not LayerNorm"),
        ({"0": "colwise:4"}, "4 features cannot be divided among 2 processes"),
        ({"0": "rowwise:2"}, "'rowwise:2' is unknown"),
    ],
)
def test_plans_that_do_not_fit_say_why(plan: dict[str, str], said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match=said):
        TensorPlan(model, TensorParallel(size=2, plan=plan), Mesh())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"shards": 2}, "groups of 2"), ({"tensor_parallel": {"size": 3}}, "tensor_parallel.size: 1 processes")],
)
def test_sizes_must_divide_the_processes(options: dict[str, Any], said: str) -> None:
    class Context:
        precision = Precision()

    made: Any = make_component("strategy", {"use": "fsdp", **options}, "distributed")
    strategy = FsdpStrategy(made, Context())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        strategy.setup(torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_options_have_defaults() -> None:
    assert Fsdp().options()["reshard_after_forward"] is True
