"""`drivetrain config plot`: the curve itself, the length of the run, and what is built for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from drivetrain_cli.chart import chart, nice_top, number, number_at

FALL = "scheduler.use=fall"


def dots(line: str) -> int:
    return sum(bin(ord(c) - 0x2800).count("1") for c in line if 0x2800 <= ord(c) < 0x2900)


class TestChart:
    def test_every_value_is_where_the_scale_says(self) -> None:
        """Decoded back from the characters, a line is the values again, to half a dot."""
        values = [0.0, 1.0, 2.0, 3.0, 4.0] + [4.0 - 4.0 * i / 123 for i in range(123)]
        lines = chart(values, 128, width=80)
        left = lines[0].index("┤") + 1
        columns = (len(lines[16]) - left) * 2
        assert len(values) <= columns
        for x in range(columns):
            lit = [
                63 - 4 * row - dot
                for row in range(16)
                for dot, bit in enumerate(((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[x % 2])
                if left + x // 2 < len(lines[row])
                and lines[row][left + x // 2] > "\u2800"
                and ord(lines[row][left + x // 2]) & bit
            ]
            wanted = values[x * len(values) // columns] / 4.0 * 63
            assert min(abs(y - wanted) for y in lit) <= 0.5

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_it_keeps_to_the_width_and_the_scales_meet_their_ticks(self, width: int) -> None:
        lines = chart([0.004, 0.002, 0.0], 1500, width)
        assert max(map(len, lines)) <= width
        assert [lines[row].split("┤")[0].strip() for row in (0, 4, 8, 12)] == ["0.004", "0.003", "0.002", "0.001"]
        ticks = [i for i, c in enumerate(lines[16]) if c == "┴"]
        ends = [lines[17].index(text) + len(text) - 1 for text in (" 375", "750", "1125", "1500")]
        assert ends == ticks

    def test_a_constant_and_a_zero_are_lines_too(self) -> None:
        constant, zero = chart([0.1] * 5, 5, 60), chart([0.0], 1, 60)
        assert dots(constant[6]) + dots(constant[0]) > 0
        assert dots("".join(constant)) == dots("".join(zero)) == 2 * (len(zero[16]) - zero[16].index("└") - 1)
        assert dots(zero[15]) == dots("".join(zero))

    def test_without_braille_it_is_drawn_in_ascii(self) -> None:
        lines = chart([1.0, 0.5, 0.0], 3, 60, dots=False)
        assert "\n".join(lines).isascii()
        assert "*" in lines[0] and "*" in lines[15]

    @pytest.mark.parametrize(
        ("highest", "top"), [(0.0, 1.0), (4e-3, 4e-3), (6e-4, 6e-4), (0.0011, 0.0012), (7.0, 8.0), (0.95, 1.0), (1e-7, 1e-7)]
    )
    def test_the_top_of_the_scale_is_a_short_number(self, highest: float, top: float) -> None:
        assert nice_top(highest) == pytest.approx(top)

    def test_numbers_are_short(self) -> None:
        assert [number(v) for v in (0.0, 3e-4, 4.86e-9, 0.1)] == ["0", "0.0003", "4.86e-9", "0.1"]
        assert [number_at(v) for v in (0.0, 2.5, 6231.75, 1e9)] == ["0", "2.5", "6232", "1e9"]


class TestPlot:
    def test_shows_the_rate_of_every_step_of_the_run(self, drivetrain: Any) -> None:
        said = drivetrain("config", "plot", "run.toml", FALL, "scheduler.wait=4st", "max_duration=8st", "optimizer.lr=0.2")
        title, *_, numbers = said.out.strip().splitlines()
        assert (said.code, said.err) == (0, "")
        assert title == "learning rate · fall · plain_sgd · 8 steps"
        assert numbers == "first 0.2 · highest 0.2 after 0 steps · last 0.05 · mean 0.163"  # 5 × 0.2, 0.15, 0.1, 0.05

    def test_epochs_become_the_steps_that_the_data_gives(self, drivetrain: Any) -> None:
        out = drivetrain("config", "plot", "run.toml", FALL, "data.size=40", "per_device_batch_size=8").out
        assert " · 10 steps\n" in out  # 2 epochs of 5
        out = drivetrain("config", "plot", "run.toml", FALL, "max_duration=20st", "scheduler.wait=1ep", "data.size=80").out
        assert "· last 0.01 ·" in out, "a length of the schedule may need the data as well"  # 0.1 × 1/10

    def test_the_model_is_not_built_and_data_only_when_needed(self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import toy_plugin

        def fail(self: Any, ctx: Any) -> Any:
            raise AssertionError

        monkeypatch.setattr(toy_plugin.Line, "make_model", fail)
        monkeypatch.setattr(toy_plugin.PlainSgd, "make_optimizer", fail)
        assert drivetrain("config", "plot", "run.toml", FALL).code == 0
        assert drivetrain("config", "plot", "run.toml", FALL, "max_duration=5st", "data.file=missing").code == 0
        assert drivetrain("config", "plot", "run.toml", FALL, "data.file=missing").code == 2
        assert drivetrain("config", "plot", "run.toml", "max_duration=1000tok", FALL).out.startswith(
            "learning rate · fall · plain_sgd · 1000 tokens\n"
        )

    def test_without_a_schedule_the_rate_stays(self, drivetrain: Any) -> None:
        assert "first 0.1 · highest 0.1 after 0 steps · last 0.1 · mean 0.1" in drivetrain("config", "plot", "run.toml").out

    def test_epochs_without_data_ask_for_steps(self, drivetrain: Any, project: Path) -> None:
        (project / "no_data.toml").write_text('max_duration = "2ep"\noptimizer = { use = "plain_sgd", lr = 0.1 }\n')
        said = drivetrain("config", "plot", "no_data.toml")
        assert said.code == 2
        assert said.err.startswith("no_data.toml: 1 problem\n  max_duration: is in epochs")
        assert "max_duration=1000st" in said.err
        assert drivetrain("config", "plot", "no_data.toml", "max_duration=10st").code == 0

    def test_nothing_is_trained_or_written(self, drivetrain: Any, project: Path) -> None:
        drivetrain("config", "plot", "run.toml", FALL)
        assert [path.name for path in project.iterdir()] == ["run.toml"]


class TestOutput:
    def test_without_matplotlib_it_says_what_to_install(self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        said = drivetrain("config", "plot", "run.toml", FALL, "--output", "lr.png")
        assert said.code == 2
        assert "pip install 'drivetrain-cli[plot]'" in said.err

    def test_the_figure_holds_the_curve(self, drivetrain: Any, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a stand-in for matplotlib, which need not be installed."""
        drawn: dict[str, Any] = {}

        class Anything:
            def __getattr__(self, name: str) -> Any:
                return lambda *args, **kwargs: drawn.setdefault(name, args)

            def __getitem__(self, key: Any) -> Any:
                return self

            spines = property(lambda self: self)

        class Figure:
            def __init__(self, **kwargs: Any) -> None: ...

            def subplots(self) -> Any:
                return Anything()

            def savefig(self, path: Path, dpi: int) -> None:
                if path.suffix != ".png":
                    raise ValueError("Format is not supported")
                path.write_text("picture")

        module: Any = ModuleType("matplotlib.figure")
        module.Figure = Figure
        monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(figure=module))
        monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
        said = drivetrain("config", "plot", "run.toml", FALL, "max_duration=4st", "--output", "lr.png")
        assert said.out == "learning rate · fall · plain_sgd · 4 steps: lr.png\n"
        assert drawn["plot"] == ((0.0, 1.0, 2.0, 3.0), pytest.approx((0.1, 0.075, 0.05, 0.025)))
        assert (project / "lr.png").is_file()
        assert "lr.xyz cannot be written" in drivetrain("config", "plot", "run.toml", "--output", "lr.xyz").err

    def test_matplotlib_itself_writes_a_picture(self, drivetrain: Any, project: Path) -> None:
        pytest.importorskip("matplotlib")
        assert drivetrain("config", "plot", "run.toml", FALL, "--output", "lr.png").code == 0
        assert (project / "lr.png").read_bytes().startswith(b"\x89PNG")
