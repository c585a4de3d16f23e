"""`drivetrain config plot` of every schedule there is: on the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain import TrainingConfig
from drivetrain.registry import candidates
from drivetrain_cli import main
from drivetrain_cli.plot import plan_of

NAMES = sorted(name for name, found in candidates("scheduler").items() if found[0].distribution == "drivetrain-schedulers")
STEPS = 60
FILE = f"""
max_duration = "{STEPS}st"
optimizer = {{ use = "sgd", lr = 0.5 }}
scheduler = {{ use = "NAME", warmup = "10st" }}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(FILE.replace("NAME", request.param))
    return str(request.param)


def test_there_are_eight() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("file", NAMES, indirect=True)
def test_each_is_drawn_with_the_rate_of_every_step(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["config", "plot", "run.toml"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"learning rate · {file} · sgd · {STEPS} steps")
    points = plan_of(TrainingConfig.from_table({"max_duration": f"{STEPS}st", **table(file)})).points()
    assert [position for position, _ in points] == list(range(STEPS))
    rates = [rate for _, rate in points]
    assert rates[9 if file == "one_cycle" else 10] == pytest.approx(0.5), "the peak, where the warm-up ends"
    assert max(rates) <= 0.5 * (1 + 1e-12)
    assert rates[0] < 0.05 and rates[5] < rates[9]
    assert (rates[-1] < 0.5) is (file != "constant"), "only the constant one does not fall"
    assert main(["config", "plot", "run.toml", "--output", "lr.png"]) == 0
    picture = Path("lr.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert main(["config", "plot", "run.toml", "optimizer.lr=0.7", "--output", "other.png"]) == 0
    assert Path("other.png").read_bytes() != picture, "control: another curve is another picture"


def table(name: str) -> dict[str, object]:
    return {"optimizer": {"use": "sgd", "lr": 0.5}, "scheduler": {"use": name, "warmup": "10st"}}
