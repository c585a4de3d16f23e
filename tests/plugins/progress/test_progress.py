"""The bar and the lines as a person sees them: a real run, a real pseudo-terminal, and a screen that follows it."""

from __future__ import annotations

import functools
import io
import os
import pty
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import Callback, ConfigError, Trainer, TrainingConfig, component, make_component
from drivetrain_progress import ProgressCallback, text, views

LENGTH = 40


@component
class Say(Callback):
    """Do something at one step, and give the log what other plugins would."""

    at: int = 20
    what: object = None

    def on_step_end(self, ctx: Any) -> None:
        if ctx.step == self.at and self.what is not None:
            self.what(ctx)  # type: ignore[operator]

    def on_log(self, ctx: Any) -> None:
        ctx.metrics |= {"speed/tokens_per_second": 33_512.0, "speed/data_wait": 0.021}


def trainer(*callbacks: Callback, pause: float = 0.0, **options: Any) -> Trainer:
    """A run of a linear model on eight samples an epoch, two to a step."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        time.sleep(pause)
        return nn.functional.mse_loss(outputs, targets)

    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    data = [(torch.randn(2), torch.randn(1)) for _ in range(8)]
    given = {"max_duration": f"{LENGTH}st", "eval_interval": "20st", "per_device_batch_size": 2, "standard_callbacks": False}
    config = TrainingConfig(**{**given, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=4.1e-4)
    return Trainer(model, config, data, data, loss=loss, optimizer=optimizer, callbacks=callbacks)


class Screen:
    """What a wide terminal would show after some output: text, CR, LF and cursor up; nothing else is allowed."""

    def __init__(self, written: str) -> None:
        self.lines, self.row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+|\x1b", written):
            if token == "\x1b[A":
                self.row -= 1
            elif token == "\r":
                column = 0
            elif token == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            else:
                assert token != "\x1b", f"an escape sequence reached the terminal: {written!r}"
                line = self.lines[self.row].ljust(column)
                self.lines[self.row] = line[:column] + token + line[column + len(token) :]
                column += len(token)
        self.lines = [line.rstrip() for line in self.lines]


@contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int = 80, encoding: str = "utf-8", colour: bool = False
) -> Iterator[Callable[[], str]]:
    """Make the standard streams a pseudo-terminal; gives a function that returns all that was written to it."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    chunks: list[bytes] = []

    def follow() -> None:
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # how a pseudo-terminal says that its other side is closed
                return
            chunks.append(chunk)

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    stream = open(slave, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)

    def written() -> str:
        if reader.is_alive():
            with suppress(ValueError):  # closed by the test
                stream.flush()
            os.close(slave)
            reader.join(5)
        return b"".join(chunks).decode(encoding).replace("\r\n", "\n\r")  # the terminal's line discipline: LF becomes CR LF

    try:
        yield written
    finally:
        written()
        os.close(master)


@contextmanager
def pipe(monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> Iterator[Callable[[], str]]:
    """Make the standard error stream something that is no terminal."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    yield lambda: buffer.getvalue().decode(encoding)


# -- the bar ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_evaluations_and_one_full_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 100) as written:
        trainer(ProgressCallback(), Say()).train()
        lines = Screen(written()).lines
    assert re.fullmatch(r"step 20  eval/loss \d\.\d+", lines[0])
    assert re.fullmatch(r"step 40  eval/loss \d\.\d+", lines[1])
    end = r"step 40/40 ━+ 100%  loss \d\.\d\d  lr 4\.1e-4  33\.5k tok/s  data wait 2%  in 0:0\d"
    assert re.fullmatch(end, lines[2]), lines[2]
    assert len(lines[2]) == 99, "the bar takes what is left of the width, less one column"
    assert lines[3:] == [""], "the cursor is left below the bar"


def test_what_is_done_has_a_colour_and_the_width_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 100, colour=True) as written:
        trainer(ProgressCallback(), Say(), eval_interval=False).train()
        raw = written()
    assert re.search("step 0/40 \x1b\\[2m─+\x1b\\[0m   0%", raw)
    assert re.search("step 40/40 \x1b\\[36m━+\x1b\\[0m 100%", raw)
    first, *rest = Screen(re.sub(r"\x1b\[\d+m", "", raw)).lines
    assert len(first) == 99 and rest == [""]


def test_the_bar_moves_while_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        trainer(ProgressCallback(), pause=0.25, max_duration="6st", log_interval="100st", eval_interval=False).train()
        seen = re.findall(r"step (\d)/6", written())
    assert set(seen) >= {"0", "2", "3", "4", "5", "6"}


@pytest.mark.parametrize(
    ("columns", "kept", "dropped"),
    [
        (120, ["loss", "lr", "tok/s", "data wait", "in"], []),
        (80, ["loss", "tok/s", "in"], ["data wait"]),
        (50, ["loss"], ["lr"]),
    ],
)
def test_values_make_room_for_the_bar(
    monkeypatch: pytest.MonkeyPatch, columns: int, kept: list[str], dropped: list[str]
) -> None:
    with terminal(monkeypatch, columns) as written:
        trainer(ProgressCallback(), Say(), eval_interval=False).train()
        raw = written()
    for line in re.split(r"[\r\n]+", raw):
        assert len(line) < columns, "no line may reach the last column, where some terminals wrap"
    bar = Screen(raw).lines[0]
    assert bar.count("━") >= 10
    assert all(word in bar for word in kept) and not any(word in bar for word in dropped)


def test_a_terminal_without_the_characters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, encoding="ascii") as written:
        trainer(ProgressCallback(), eval_interval=False).train()
        assert re.match(r"step 40/40 =+ 100%", Screen(written()).lines[0])


def test_a_long_evaluation_shows_its_batches_and_takes_them_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views.BarView, "patience", 0.0)
    monkeypatch.setattr(views.BarView, "pace", 0.0)
    with terminal(monkeypatch) as written:
        trainer(ProgressCallback()).train()
        raw = written()
    assert "evaluating  4 batches" not in raw, "the number of batches is known"
    assert re.search(r"evaluating ━+ 4/4 batches", raw)
    assert not any("evaluating" in line for line in Screen(raw).lines)


def test_what_others_print_gets_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def speak(ctx: Any) -> None:
        print("Loss is low!")
        sys.stderr.write("UserWarning: odd\n")
        print("no newline", end="")

    with terminal(monkeypatch) as written:
        stdout = sys.stdout
        trainer(ProgressCallback(), Say(what=speak), eval_interval=False).train()
        assert sys.stdout is stdout, "the stream is put back"
        lines = Screen(written()).lines
    assert lines[:3] == ["Loss is low!", "UserWarning: odd", "no newline"]
    assert lines[3].startswith("step 40/40 ━") and lines[4:] == [""]


def test_an_early_end_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 100) as written:
        trainer(ProgressCallback(), Say(what=lambda ctx: ctx.stop("enough")), eval_interval=False).train()
        lines = Screen(written()).lines
    assert lines[0] == "stopped at step 20: enough"
    assert re.match(r"step 20/40 ━+╾?─+  50%", lines[1])


def test_an_exception_leaves_the_terminal_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ctx: Any) -> None:
        raise RuntimeError("boom")

    with terminal(monkeypatch, 100) as written:
        stderr = sys.stderr
        with pytest.raises(RuntimeError, match="boom"):
            trainer(ProgressCallback(), Say(what=fail)).train()
        assert sys.stderr is stderr
        lines = Screen(written()).lines
    assert re.match(r"step 20/40 ━+╾?─+  50%.*after 0:0\d", lines[0])
    assert lines[1:] == [""]


def test_a_terminal_that_goes_away_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as _:
        streams = sys.stdout, sys.stderr
        output = trainer(ProgressCallback(), Say(what=lambda ctx: sys.stderr.close())).train()
        assert (sys.stdout, sys.stderr) == streams
    assert output.steps == LENGTH


# -- lines -----------------------------------------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe(monkeypatch) as written:
        trainer(ProgressCallback(), Say()).train()
        lines = written().splitlines()
    values = r"loss \d\.\d+  lr 4\.1e-4  33\.5k tok/s  data wait 2%"
    assert re.fullmatch(rf"step 10/40  25%  {values}  ETA 0:0\d", lines[0]), "a sign of life with the first values"
    assert re.fullmatch(r"step 20  eval/loss \d\.\d+", lines[1])
    assert re.fullmatch(rf"step 40/40  100%  {values}  in 0:0\d", lines[-1])
    assert len(lines) == 4, "ten seconds have not passed"


def test_lines_come_at_most_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe(monkeypatch) as written:
        began = time.monotonic()
        trainer(ProgressCallback(seconds=0.1), pause=0.01, log_interval="1st", eval_interval=False).train()
        seconds = time.monotonic() - began
        lines = written().splitlines()
    assert 3 <= len(lines) <= seconds / 0.1 + 2  # the first comes with the first values, the last with the end


def test_nothing_that_a_name_holds_reaches_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(Say):
        def on_evaluate_end(self, ctx: Any) -> None:
            ctx.eval_metrics["eval/a\x1b[2Jb\nc\u202e\u2028\x9b"] = 1.0

    with pipe(monkeypatch, encoding="latin-1") as written:
        trainer(ProgressCallback(), component(Named)()).train()
        raw = written()
    assert "eval/a?[2Jb?c???" in raw
    assert not set(raw) & {"\x1b", "\x9b", "\r"}


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe(monkeypatch) as written:
        run = trainer(ProgressCallback(seconds=0.01))
        run.ctx.strategy.rank = 1
        run.train()
        assert written() == ""


def test_a_process_without_a_standard_error_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert trainer(ProgressCallback()).train().steps == LENGTH


# -- the run's length ------------------------------------------------------------------------------------------------------


def test_after_a_resume_the_bar_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(max_duration="15st")
    first.train()
    saved = first.ctx.state_dict()

    @component
    class Restore(Callback):
        def on_restore(self, ctx: Any) -> None:
            ctx.load_state_dict({**saved, "components": {}})

    with terminal(monkeypatch) as written:
        trainer(ProgressCallback(), Restore(), eval_interval=False).train()
        seen = [int(step) for step in re.findall(r"step (\d+)/40", written())]
    assert seen[0] == 15 and seen[-1] == 40


def test_a_run_measured_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        trainer(ProgressCallback(), pause=0.01, max_duration="0.6s", eval_interval=False).train()
        assert re.match(r"0:01/0:01 ━+ 100%", Screen(written()).lines[0])


@pytest.mark.parametrize(
    ("position", "length", "unit", "expected"),
    [
        (812, 1600, "st", "step 812/1600"),
        (812, float("inf"), "st", "step 812"),
        (1_234_000, 5_000_000, "tok", "1.23M/5M tok"),
        (2_000_000, 10_500_000, "tok", "2.00M/10.5M tok"),
        (100, 100_000, "tok", "100/100k tok"),
        (999, 64_000, "sp", "999/64k samples"),
        (31.4, 7200, "s", "0:31/2:00:00"),
        (1, 3, "ep", "epoch 1.00/3"),
    ],
)
def test_places(position: float, length: float, unit: str, expected: str) -> None:
    assert text.place(position, length, unit) == expected


def test_steps_stand_below_each_other() -> None:
    assert [text.step(step, 1600, "st") for step in (0, 400, 1600)] == ["step    0", "step  400", "step 1600"]
    assert [text.step(7, float("inf"), "st"), text.step(7, 5e6, "tok")] == ["step 7", "step 7"]


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.7149, "1.71"),
        (9.999, "10.0"),
        (0.0312, "0.0312"),
        (-0.5, "-0.500"),
        (812.4, "812"),
        (999.9, "1.00k"),
        (33_512, "33.5k"),
        (4.123e-5, "4.1e-5"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (1e300, "1.0e300"),
    ],
)
def test_numbers(value: float, expected: str) -> None:
    assert text.number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (49, "0:49"), (725, "12:05"), (12_000, "3:20:00"), (187_800, "2d 04:10")]
)
def test_clock(seconds: float, expected: str) -> None:
    assert text.clock(seconds) == expected


def test_learning_rates() -> None:
    assert [text.small(lr) for lr in (4.1e-4, 0.001, 0.0, 1.0)] == ["4.1e-4", "1.0e-3", "0", "1.0e0"]


# -- cost and configuration ------------------------------------------------------------------------------------------------


def test_a_step_costs_a_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: between two drawings `on_step_end` calls `monotonic` and draws nothing."""
    with pipe(monkeypatch):
        bar = ProgressCallback(seconds=1000.0)
        ctx = SimpleNamespace(step=1, position=1, run_length=10, run_unit="st", is_main=True)
        bar.on_run_start(ctx)
        bar.on_step_end(ctx)
        calls: list[str] = []
        sys.setprofile(
            lambda frame, event, arg: calls.append(getattr(arg, "__name__", frame.f_code.co_name)) if "call" in event else None
        )
        try:
            bar.on_step_end(SimpleNamespace(step=2))  # reads nothing else of the context
        finally:
            sys.setprofile(None)
    remembering = ("__setattr__", "wrapped_pipe", "convert", "validate")  # when to look again, of short steps
    assert calls[:2] == ["on_step_end", "monotonic"] and set(calls[2:]) <= {"setprofile", *remembering}


@pytest.mark.parametrize(("pause", "least", "most"), [(0.0, 9, 40), (0.03, 80, 80)])
def test_of_short_steps_it_looks_at_each_eighth(pause: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, own = [], ProgressCallback.on_step_end

    @functools.wraps(own)  # its place and its sleep with it
    def counted(self: ProgressCallback, ctx: Any) -> None:
        looks.append(ctx.step)
        own(self, ctx)

    monkeypatch.setattr(ProgressCallback, "on_step_end", counted)
    with terminal(monkeypatch):
        trainer(ProgressCallback(), max_duration="80st", pause=pause, eval_interval=False, log_interval="1000st").train()
    assert least <= len(looks) <= most


def test_it_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(*callbacks: Callback) -> int:
        count = 0
        item = torch.Tensor.item

        def counted(self: torch.Tensor) -> Any:
            nonlocal count
            count += 1
            return item(self)

        run = trainer(*callbacks, max_duration="9st", pause=0.03, eval_interval=False)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", counted)
            run.train()
        return count

    with terminal(monkeypatch):
        monkeypatch.setattr(views.BarView, "pace", 0.0)
        assert reads(ProgressCallback()) == reads()
        assert reads(ProgressCallback(), Say(at=5, what=lambda ctx: ctx.loss)) == reads() + 1  # the count does see a read


def test_the_option_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"callbacks\[0\]\.progress"):
        make_component("callback", {"use": "progress", "seconds": 0}, "callbacks[0]")


def test_it_is_a_standard_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe(monkeypatch):
        assert "callback:progress" in trainer(standard_callbacks=True, output_dir=tmp_path).plugins()


def test_no_thread_and_no_multiprocessing_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    before = threading.active_count()
    with terminal(monkeypatch) as written:
        trainer(ProgressCallback(), eval_interval=False).train()
        written()
    assert threading.active_count() == before
    assert multiprocessing.get_start_method(allow_none=True) is None or not hasattr(views._Tqdm.get_lock(), "mp_lock")


# -- notebooks ---------------------------------------------------------------------------------------------------------------

# What a kernel has, as far as tqdm asks for it: the shell's configuration, and widgets that remember what they show.
KERNEL = """
import sys
from types import ModuleType, SimpleNamespace

class Widget:
    made = []
    def __init__(self, children=(), **values):
        self.children, self.layout, self.style = children, SimpleNamespace(), SimpleNamespace()
        self.value, self.bar_style = "", ""
        self.__dict__.update(values)
        Widget.made.append(self)
    def close(self): self.closed = True

def module(name, **names):
    sys.modules[name] = made = ModuleType(name)
    made.__dict__.update(names)

displayed = []
class ZMQInteractiveShell:
    config = {"IPKernelApp": {}}

module("ipykernel.zmqshell")
module("IPython", get_ipython=ZMQInteractiveShell)
module("IPython.display", display=displayed.append)
if WIDGETS:
    module("ipywidgets", HBox=type("HBox", (Widget,), {}), HTML=type("HTML", (Widget,), {}),
           FloatProgress=type("FloatProgress", (Widget,), {}), __version__="8.1.0")
else:
    sys.modules["ipywidgets"] = None

import torch
from torch import nn
from drivetrain import ProgressCallback, Trainer, TrainingConfig
from drivetrain_progress import views

torch.manual_seed(0)
model = nn.Linear(2, 1)
data = [(torch.randn(2), torch.randn(1)) for _ in range(24)]
config = TrainingConfig(max_duration="12st", per_device_batch_size=2, log_interval="4st", eval_interval="6st",
                        standard_callbacks=False, device="cpu")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
Trainer(model, config, data, data[:4], loss=nn.MSELoss(), optimizer=optimizer, callbacks=[ProgressCallback()]).train()
print("NOTEBOOK", views.NOTEBOOK, len(displayed))
for widget in Widget.made:
    print(type(widget).__name__, repr(widget.value), widget.bar_style)
"""


def kernel(widgets: bool) -> subprocess.CompletedProcess[str]:
    code = KERNEL.replace("WIDGETS", str(widgets))
    without_numpy = "ignore:Failed to initialize NumPy:UserWarning"  # torch's own words
    return subprocess.run(
        [sys.executable, "-W", without_numpy, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )


def test_a_notebook_has_a_widget_below_its_cell() -> None:
    done = kernel(widgets=True)
    lines = done.stdout.splitlines()
    assert "NOTEBOOK True 1" in lines
    bar = next(line for line in lines if line.startswith("FloatProgress"))
    assert bar == "FloatProgress 1.0 success"
    left, right = (line.replace("\\u2007", " ") for line in lines if line.startswith("HTML"))
    assert "step 12/12" in left
    assert re.search(r"100%  loss \S+  lr .* in 0:0", right)
    assert [line for line in lines if "eval/loss" in line and line.startswith("step")], "evaluations are lines of the output"
    assert done.stderr == ""


def test_a_notebook_without_widgets_has_lines() -> None:
    done = kernel(widgets=False)
    assert "NOTEBOOK False 0" in done.stdout
    assert re.search(r"^step 12/12  100%  loss ", done.stderr, re.MULTILINE)
    assert "Warning" not in done.stderr
