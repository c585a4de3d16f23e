"""The arithmetic of the benchmark scripts, and one small run of those that take little time; in earnest they are run by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


optimizers: Any = script("optimizers")


@pytest.mark.parametrize(
    ("losses", "text", "steps"),
    [
        ([2.0, 1.5, 1.0], "200", 200.0),
        ([2.0, 1.75, 1.25], "283", 200 * math.sqrt(2)),  # half way between 200 and 400, in the logarithm
        ([1.4, 1.3, 1.2], "<100", math.nan),
        ([2.0, 1.9, 1.6], ">400", math.nan),
        ([2.0, math.inf, 1.6], ">400", math.nan),
    ],
)
def test_steps_to_a_target_are_read_between_the_lengths(losses: list[float], text: str, steps: float) -> None:
    said, number = optimizers.steps_to(1.5, (100, 200, 400), losses)
    assert (said, number) == (text, pytest.approx(steps, nan_ok=True))


def row(name: str, *middle: float) -> Any:
    return optimizers.Row(name, 1e-3, {240: [9.0] * 3, 360: list(middle), 540: [0.0] * 3})


def test_a_difference_counts_from_the_rules_number_of_standard_errors_on() -> None:
    """σ = 0.01 for every row, so the limit is 3.08 · 0.01 · √(2/3) = 0.02515."""
    near, far = 1.0 - 0.025, 1.0 - 0.0253
    rows = [row("adamw", 0.99, 1.0, 1.01), row("near", near - 0.01, near, near + 0.01), row("far", far - 0.01, far, far + 0.01)]
    rows.append(row("bad", 1.1, 1.11, 1.12))
    lines = list(optimizers.table(rows, optimizers.Setting(lengths=(240, 360, 540))))
    verdicts = [line.split("|")[7].strip() for line in lines[2:6]]
    assert verdicts == ["the baseline", "no difference", "better", "worse"]
    assert lines[2].split("|")[3:5] == [" 360 ", " 1.00 "]
    assert any("= 0.0251 on." in line for line in lines)


def test_ratios_of_steps_are_judged_by_the_same_rule() -> None:
    """In the logarithm of the steps, seed by seed; a seed beyond the lengths gives no verdict."""

    def made(name: str, *steps: float) -> Any:
        """A row whose seeds reach a loss of 1 after these steps, falling by 1 for each doubling."""
        lengths = (240, 360, 540)
        return optimizers.Row(name, 1e-3, {n: [1 - math.log2(n / s) for s in steps] for n in lengths})

    rows = [made("adamw", 350, 360, 370), made("near", 340, 350, 360), made("fewer", 290, 300, 310)]
    rows += [made("more", 440, 450, 460), made("beyond", 500, 530, 560)]
    found = optimizers.Comparison(rows, optimizers.Setting(lengths=(240, 360, 540)))
    assert found.target == pytest.approx(1.0, abs=1e-3)
    assert [found.step_verdict(row) for row in rows] == ["the baseline", "no difference", "fewer", "more", "beyond the lengths"]
    assert found.ratio(rows[2]) == pytest.approx(300 / 360, rel=1e-3)
    logs = [[math.log(s) for s in row.steps(found.target)] for row in rows[:4]]
    sigma = math.sqrt(sum(statistics.variance(some) for some in logs) / 4)
    assert found.step_sigma == pytest.approx(sigma)
    text = " ".join(optimizers.words(found))
    assert "Fewer steps than `adamw` took `fewer` (0.83 times as many)" in text
    assert "not to say that there is none, for `near`" in text


def test_a_toy_run_has_a_loss_on_held_out_text_and_sophias_win_rate() -> None:
    threads = torch.get_num_threads()
    try:
        found = optimizers.train(optimizers.Job("sophia", 1e-3, 12, 0, optimizers.TINY))
    finally:
        torch.set_num_threads(threads)
    assert 3 < found["loss"] < 6
    assert found["seconds"] > 0
    assert 0 <= found["win_rate"] <= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_toy_comparison_trains_records_and_can_be_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself, at a size that takes seconds: its tables are complete, and its record gives the same page."""
    page, saved = tmp_path / "page.md", tmp_path / "record.json"
    places = ["--results", str(tmp_path / "runs.json"), "--document", str(page), "--record", str(saved)]
    threads = torch.get_num_threads()
    try:
        optimizers.main(["adamw", "sophia", "--tiny", "--seeds", "2", "--jobs", "0", *places])
    finally:
        torch.set_num_threads(threads)
    text = page.read_text()
    assert "| `sophia` |" in text and "The win rate of `sophia`" in text and "Rates that were tried" in text
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert len(runs) >= 2 * (3 + 6)
    assert all(0 < run["loss"] < 6 and run["seconds"] > 0 for run in runs.values())
    seeds = [json.loads(key)[3] for key in runs]
    assert set(seeds) == {0, 1, optimizers.TUNING_SEED}, "the seed that chooses is not scored"
    page.write_text("# Optimizers compared\n")
    optimizers.main(["--text", *places])
    again = page.read_text()
    assert again.partition("<!-- results -->")[2] == text.partition("<!-- results -->")[2]


def test_the_table_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "optimizers.md"
    optimizers.write(document, ["first"])
    document.write_text(document.read_text() + "\nA remark.\n")
    optimizers.write(document, ["second"])
    text = document.read_text()
    assert "first" not in text
    assert text.startswith("# Optimizers compared\n")
    assert text.endswith("second\n\n<!-- end of results -->\n\nA remark.\n")


def test_the_grid_grows_until_the_best_rate_is_inside_and_known_runs_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def run(self: Any, jobs: Any, workers: int) -> None:
        for job in jobs:
            if job.key not in self.known:
                asked.append(job.lr)
                self.known[job.key] = {"loss": abs(math.log2(job.lr / 1.6e-2)), "seconds": 1.0}

    monkeypatch.setattr(optimizers.Results, "run", run)
    results = optimizers.Results(tmp_path / "results.json")
    assert optimizers.tuned_rate("adamw", optimizers.Setting(), results, 1)[0] == 1.6e-2
    assert asked == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])
    optimizers.tuned_rate("adamw", optimizers.Setting(), results, 1)
    assert len(asked) == 6


def test_a_changed_setting_is_another_result() -> None:
    setting = optimizers.Setting()
    job = optimizers.Job("adamw", 1e-3, 10, 0, setting)
    assert job.key != optimizers.Job("adamw", 1e-3, 10, 1, setting).key
    assert job.key != optimizers.Job("adamw", 1e-3, 10, 0, setting._replace(width=64)).key
    assert job.key == optimizers.Job("adamw", 1e-3, 10, 0, setting._replace(lengths=(10, 20))).key
    json.loads(job.key)


def test_the_stall_of_a_save_is_measured_through_the_callback(tmp_path: Path) -> None:
    """Whatever the numbers on a busy machine: every row is there, and each way has waited longer than for nothing."""
    text = script("checkpoint_stall").main(["--parameters", "2e6", "--rounds", "1", "--directory", str(tmp_path)])
    rows = [line.split("|")[2:5] for line in text.splitlines() if line.startswith("| ") and "seconds" not in line]
    assert len(rows) == 8
    assert all(float(value) > 0 and float(copy) > 0 for value, copy, _ in rows[:6])
    assert "State: 0.03 GB" in text
    assert list(tmp_path.iterdir()) == []


def test_precisions_are_compared_in_turns_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At toy size, where only the form can be looked at: the speeds are those of another day."""
    page, saved = tmp_path / "page.md", tmp_path / "precision.json"
    page.write_text("# A page\n")
    words = ["--model", "toy", "--seeds", "2", "--steps", "6", "--turn", "2", "--max-bytes", "3000"]
    script("precision_cpu").main([*words, "--json", str(saved), "--document", str(page)])
    (found,) = json.loads(saved.read_text())
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"fp32": 4, "bf16": 4}
    assert all(speed > 0 for speed in found["tokens_per_second"].values())
    assert found["loss"]["fp32"]["mean"] == pytest.approx(statistics.mean(found["losses"]["fp32"]))
    assert found["losses"]["fp32"] != found["losses"]["bf16"], "control: two precisions"
    ratios = sorted(a / b for a, b in zip(found["seconds"]["fp32"], found["seconds"]["bf16"], strict=True))
    assert found["ratio"]["median"] == pytest.approx(statistics.median(ratios))
    text = page.read_text()
    assert text.startswith("# A page\n") and "| toy: 1 × 32, context 16, batch 2 |" in text
    assert "| toy: 1 × 32, context 16, batch 2 |" in capsys.readouterr().out
