"""Trials of `drivetrain train FILE`: killed or signalled, started again by the same words until it is complete, then compared.

A process for each call is forked by a server that has imported torch (`served.py`), so a start takes a fraction of a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from tests.faults.served import Ended, Served

from drivetrain_checkpoint import find_checkpoints, read_checkpoint

PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PLUGIN = Path(__file__).with_name("trial_plugin.py")
RUN = """
model = {{ use = "trial_model", width = {width} }}
data = {{ use = "trial_data" }}
optimizer = "trial_adam"
scheduler = "fall"
max_duration = "{steps}st"
per_device_batch_size = 4
gradient_accumulation_steps = 2
eval_interval = "3st"
log_interval = "2st"
device = "cpu"
standard_callbacks = false
callbacks = [{{ use = "checkpoint", every = "1st", keep_last = 2 }}, "early_stopping", {{ use = "logging", trackers = ["jsonl"] }}, "fault"]
"""


@define
class Trials:
    """The runs of one configuration below a folder.

    Attributes:
        width: of the model: 64 makes a state of 60 KB, 512 one of 3 MB.
        places: the directories of runs that are elsewhere.
        seconds: how long the uninterrupted run took; `training`, without what comes before its first step and after its last.
    """

    folder: Path
    width: int = 64
    steps: int = 8
    variables: dict[str, str] = field(factory=dict)
    places: dict[str, Path] = field(factory=dict)
    seconds: float = 0.0
    training: float = 0.0
    _server: Any = None
    _whole: Any = None

    def __enter__(self) -> Trials:
        self._server = Served(self.folder, self.variables).__enter__()
        (self.folder / "run.toml").write_text(RUN.format(width=self.width, steps=self.steps))
        for name in ("whole", "again"):
            began = time.monotonic()
            ended = self.call(name)
            assert ended.code == 0, ended.err
            self.seconds = time.monotonic() - began
        self.training = _newest(self.folder / "runs" / "again")["progress"]["seconds"]
        self._whole = final(self.folder / "runs" / "whole")
        assert self._whole["progress"]["step"] == self.steps
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)

    def words(self, name: str, *more: str) -> list[str]:
        """The command line of a run."""
        return ["train", "run.toml", "--run-name", name, f'plugins=["{PLUGIN}"]', *more]

    def start(self, name: str, *more: str, **variables: Any) -> int:
        """Begin a sitting; its process's id."""
        return int(self._server.start(*self.words(name, *more), **variables))

    def wait(self) -> Ended:
        """The end of the sitting."""
        return self._server.wait()  # type: ignore[no-any-return]

    def has_ended(self) -> bool:
        """Whether the sitting is over."""
        return bool(self._server.has_ended())

    def call(self, name: str, *more: str, **variables: Any) -> Ended:
        """A whole sitting."""
        self.start(name, *more, **variables)
        return self.wait()

    def run(self, name: str) -> Path:
        """The directory of a run."""
        return self.places.get(name, self.folder / "runs" / name)

    def finish(self, name: str, *more: str) -> None:
        """The same words once more: the run must end as if nothing had been, with nothing left over."""
        ended = self.call(name, *more)
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.err
        assert differing(final(self.run(name)), self._whole) == []
        left = leftovers(self.run(name))
        assert left == [], left
        assert len(find_checkpoints(self.run(name))) <= 3  # one more when the last sitting was ended before it removed one

    def is_equal(self, name: str) -> bool:
        """Whether a run ended as the uninterrupted one."""
        return differing(final(self.run(name)), self._whole) == []


def _newest(run: Path) -> Any:
    return read_checkpoint(find_checkpoints(run)[0].path)


def final(run: Path) -> Any:
    """The newest state of a run, without clocks and places."""
    state = _newest(run)
    del state["manifest"], state["progress"]["seconds"]
    return state


def leftovers(run: Path) -> list[str]:
    """What is neither a checkpoint nor a file that belongs to a run."""
    known = {"config.json", "checkpoints", "metrics.jsonl", "metrics.previous.jsonl"}  # the rows before an anew begun run
    return [p.name for p in run.iterdir() if p.name not in known] + [
        p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith("step-")
    ]


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two states differ in a bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differing(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        return [place for i, pair in enumerate(zip(one, other, strict=True)) for place in differing(*pair, f"{path}/{i}")]
    return [] if type(one) is type(other) and (one == other or one != one) else [path]


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def wait_for_an_instant(trials: Trials, name: str, chance: random.Random) -> None:
    """Wait for a random step's checkpoint, or for none, and then for a random part of the time that a step takes.

    A fixed time would be too early on a busy machine and too late on an idle one.
    """
    step, root = chance.randrange(trials.steps), trials.run(name) / "checkpoints"
    while step and not trials.has_ended() and not (root / f"step-{step:08d}").exists():
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, trials.training / trials.steps if step else trials.seconds / 2))


def killed(trials: Trials, number: int, seed: int, kills: int = 2) -> Counter[str]:
    """So many runs with SIGKILLs at random instants; what came of it."""
    chance, count = random.Random(f"kill {seed}"), Counter[str]()
    one = size_of(find_checkpoints(trials.run("whole"))[0].path)
    for trial in range(number):
        name = f"killed-{trial}"
        for _ in range(kills):
            process = trials.start(name)
            wait_for_an_instant(trials, name, chance)
            if not trials.has_ended():
                with suppress(ProcessLookupError):  # it has ended since
                    os.killpg(process, signal.SIGKILL)
            ended = trials.wait()
            assert ended.code in (0, -signal.SIGKILL), ended.err
            count["hit"] += ended.code != 0
            root = trials.run(name) / "checkpoints"
            count["in a save"] += root.exists() and any(path.name.startswith(".drivetrain-") for path in root.iterdir())
            # at most: those that are kept, one more, and one that is being written or removed for each kill
            assert size_of(trials.run(name)) < 6 * one if root.exists() else True
        trials.finish(name)
        count["equal"] += 1
        shutil.rmtree(trials.run(name))
    return count


def signalled(trials: Trials, number: int, seed: int) -> Counter[str]:
    """So many runs with two signals at random instants each, now and then a second one soon after."""
    chance, count = random.Random(f"signal {seed}"), Counter[str]()
    allowed = {0, PREEMPTED, *(128 + n for n in SIGNALS), *(-n for n in SIGNALS), 128 + signal.SIGINT}
    for trial in range(number):
        name = f"signalled-{trial}"
        for _ in range(2):
            process = trials.start(name)
            wait_for_an_instant(trials, name, chance)
            for _ in range(2 if chance.random() < 0.3 else 1):
                which = chance.choice(SIGNALS)
                if not trials.has_ended():
                    with suppress(ProcessLookupError):  # it has ended since
                        os.kill(process, which)
                time.sleep(chance.uniform(0.0, 0.02))
            ended = trials.wait()
            assert ended.code in allowed, (ended.code, ended.err)
            count["hit"] += ended.code != 0
            count["preempted"] += ended.code == PREEMPTED
        trials.finish(name)
        count["equal"] += 1
        shutil.rmtree(trials.run(name))
    return count
