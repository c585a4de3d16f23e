"""Small language models on two and four processes, sharded in several ways, against one process with the same global batch."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain_checkpoint import read_checkpoint

SGD = {"use": "sgd", "lr": 0.3}
TENSOR = {"use": "fsdp", "tensor_parallel": {"size": 2}}
WRONG = {
    "use": "fsdp",
    "tensor_parallel": {"size": 2, "plan": {"blocks.*.qkv": "colwise", "blocks.*.attention_out": "rowwise"}},
}
# What is trained, without how it is divided. Each of lion's and Adam's updates has the size of the learning rate whatever the gradient's
# is, so that rounding shows where a gradient is nearly nothing: a share of the largest weight.
OPTIMIZERS = {"adamw": 1e-4, "lion": 1e-4, "muon": 1e-4, "lamb": 1e-4, "sgd": 1e-5}


def load(name: str) -> Any:
    """A module that lies beside this file."""
    spec = importlib.util.spec_from_file_location(f"e2e_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


launch = load("launching").launch


def trainings(processes: int) -> dict[str, Any]:
    """Every training by name, as that many processes do it."""
    alone = processes == 1
    sharded, tensor, wrong = ("none",) * 3 if alone else ("fsdp", TENSOR, WRONG)
    share = 1 if alone else processes // 2
    found: dict[str, Any] = {
        "tensor gpt": {"distributed": tensor, "optimizer": SGD, "data_ranks": share},
        "tensor gpt, tied": {"distributed": tensor, "optimizer": SGD, "data_ranks": share, "sizes": {"tied": True}},
        "tensor gpt, wrong plan": {"distributed": wrong, "optimizer": SGD, "data_ranks": share},
        "tensor llama": {"distributed": tensor, "optimizer": SGD, "data_ranks": share, "model": "llama"},
        "tensor muon": {"distributed": tensor, "optimizer": {"use": "muon", "lr": 0.01}, "data_ranks": share},
        "bf16": {"distributed": sharded, "optimizer": SGD, "precision": "bf16"},
        "fp16": {"distributed": sharded, "optimizer": SGD, "precision": {"use": "fp16", "init_scale": 256.0}},
    }
    for name in ("ddp", "fsdp"):
        found[f"qlora {name}"] = {
            "model": "llama",
            "sizes": {"hidden_size": 64, "intermediate_size": 128},  # quantized in blocks of 64
            "distributed": "none" if alone else name,
            "training_mode": {"use": "qlora", "r": 4, "dropout": 0.0},
        }
    for name in (*OPTIMIZERS, "sophia", "sophia_h", "adamw_8bit", "adafactor"):
        found[name] = {"distributed": sharded, "optimizer": {"use": name, "lr": SGD["lr"] if name == "sgd" else 0.01}}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("sharding")
    return {n: launch("sharded.py", n, folder / f"{n}.json", json.dumps(trainings(n))) for n in (1, 2, 4)}


def difference(one: list[float], many: list[float]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(many, dtype=torch.float64)
    return float((a - b).abs().max() / a.abs().max())


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["tensor gpt", "tensor gpt, tied", "tensor llama", "tensor muon"])
def test_tensor_parallelism_equals_one_process(results: dict[int, Any], processes: int, name: str) -> None:
    """Alone on two processes; on four, two models, each sharded over two pairs."""
    one, many = results[1][name], results[processes][name]
    assert many["samples"] == one["samples"]
    for what in ("losses", "norms", "weights"):
        assert difference(one[what], many[what]) < 1e-5, what
    assert any(a[-1] * 2 == b[-1] for a, b in zip(many["local"], one["local"], strict=True)), "no matrix was cut by columns"


@pytest.mark.parametrize("processes", [2, 4])
def test_negative_control_three_matrices_cut_as_one(results: dict[int, Any], processes: int) -> None:
    one, many = (results[n]["tensor gpt, wrong plan"] for n in (1, processes))
    assert difference(one["losses"], many["losses"]) > 1e-3


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_update_shards_as_they_update_wholes(results: dict[int, Any], processes: int, name: str) -> None:
    one, many = results[1][name], results[processes][name]
    assert difference(one["losses"], many["losses"]) < 1e-6
    assert difference(one["weights"], many["weights"]) < OPTIMIZERS[name]


@pytest.mark.parametrize("processes", [2, 4])
def test_sophia_draws_other_labels_on_each_rank(results: dict[int, Any], processes: int) -> None:
    """Its curvature is an estimate from drawn labels: the same losses only about. test_sophia_ranks.py looks at the estimate itself."""
    assert difference(results[1]["sophia"]["losses"], results[processes]["sophia"]["losses"]) < 1e-2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamw_8bit", "in blocks of a whole tensor"),
        ("sophia_h", "needs the whole weights"),
        ("adafactor", "needs whole matrices"),
    ],
)
def test_optimizers_that_cannot_say_so(results: dict[int, Any], name: str, said: str) -> None:
    assert "error" not in results[1][name]
    assert said in results[2][name]["error"]
    assert said in results[4][name]["error"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("precision", "close"), [("bf16", 5e-4), ("fp16", 1e-4)])
def test_16_bits_equal_one_process_to_their_rounding(
    results: dict[int, Any], processes: int, precision: str, close: float
) -> None:
    one, many = results[1][precision], results[processes][precision]
    assert many["samples"] == one["samples"]
    assert difference(one["losses"], many["losses"]) < close


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_on_a_quantized_model_train_as_on_one_process(results: dict[int, Any], processes: int, strategy: str) -> None:
    one, many = results[1][f"qlora {strategy}"], results[processes][f"qlora {strategy}"]
    for what, close in (("losses", 1e-6), ("norms", 1e-6), ("weights", 1e-4)):
        assert difference(one[what], many[what]) < close, what
    assert [4, 64] in one["local"], "no adapter"
    assert ([4 // processes, 64] in many["local"]) is (strategy == "fsdp")


SITTINGS: list[tuple[int, Any, int]] = [
    (4, "fsdp", 4),
    (2, "ddp", 2),
    (1, "none", 1),
    (2, TENSOR, 1),
    (2, "mpi", 2),
    (4, {"use": "fsdp", "shards": 2}, 4),
    (1, "fsdp", 1),
    (2, "fsdp", 2),
]


def sittings(folder: Path, plan: list[tuple[int, Any, int]]) -> list[Any]:
    """One run of two steps each after another, each from the checkpoint of the one before."""
    found: list[Any] = []
    for index, (processes, strategy, share) in enumerate(plan):
        given = {
            "max_duration": f"{2 * index + 2}st",
            "distributed": strategy,
            "data_ranks": share,
            "callbacks": [{"use": "checkpoint", "every": "100st"}, {"use": "ema", "decay": 0.9}],
            "output_dir": str(folder),
            "run_name": f"sitting-{index}",
            "resume": found[-1]["checkpoint"] if found else "never",
        }
        how = {"torchrun": strategy == "fsdp", "mpirun": strategy == "mpi"}
        one = launch("sharded.py", processes, folder / f"{index}.json", json.dumps({"run": given}), **how)["run"]
        assert "error" not in one, one
        found.append(one)
    return found


def averages(checkpoint: str) -> list[float]:
    """The moving averages of all weights, in the model's own order of rows whoever wrote them."""
    found = read_checkpoint(checkpoint)["components"]["callback:ema"]["averages"]
    return [x for name in sorted(found) for x in found[name].flatten().tolist()]


def test_a_checkpoint_goes_on_under_any_strategy_and_number_of_processes(tmp_path: Path) -> None:
    """Two steps each: every bit of weights and optimizer state is there at each load, and the sample order goes on."""
    steps = 2 * len(SITTINGS)
    given = {
        "max_duration": f"{steps}st",
        "distributed": "none",
        "callbacks": [{"use": "checkpoint", "every": "100st"}, {"use": "ema", "decay": 0.9}],
        "output_dir": str(tmp_path),
        "run_name": "straight",
    }
    straight = launch("sharded.py", 1, tmp_path / "straight.json", json.dumps({"run": given}))["run"]
    found = sittings(tmp_path, SITTINGS)
    for before, after in pairwise(found):
        assert after["at_start"] == before["at_end"]
        assert after["at_end"] != after["at_start"]
    for (_, strategy, _), one in zip(SITTINGS, found, strict=True):  # in parts where the state is divided, else whole
        divided = strategy not in ("ddp", "none", "mpi")
        assert (Path(one["checkpoint"]) / "index.json").exists() is divided, strategy
    assert [step for s in found for step in s["samples"]] == straight["samples"]
    assert difference(straight["losses"], [loss for s in found for loss in s["losses"]]) < 1e-6
    assert difference(averages(straight["checkpoint"]), averages(found[-1]["checkpoint"])) < 1e-4


def test_memory_is_a_quarter_and_what_is_gathered(tmp_path: Path) -> None:
    """Measured parameters, gradients and optimizer state on four processes, each within 5% of a quarter of one process's, and the most
    at once within 5% of that and what is gathered; the script says how. The control: without what is gathered it would not be."""
    found = launch("../benchmarks/fsdp_memory.py", 4, tmp_path / "memory.json")
    assert len(found["ranks"]) == 4
    for rank in found["ranks"]:
        for what in ("parameters", "gradients", "optimizer", "most"):
            assert rank[what] == pytest.approx(found["expected"][what], rel=0.05), what
        assert rank["most"] != pytest.approx(found["expected"]["most"] - found["gathered"], rel=0.05)
