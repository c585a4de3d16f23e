"""Real processes started by `drivetrain launch`: exit codes, signals, restarts, and the job's file for SLURM."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain import DrivetrainError
from drivetrain_launch import Launch

PROGRAM = """
import argparse, sys
from drivetrain import DrivetrainError
from drivetrain_launch import Launch
command, parser = Launch(), argparse.ArgumentParser()
command.add_arguments(parser)
try:
    sys.exit(command.run(parser.parse_args()))
except DrivetrainError as error:
    sys.exit(f"error: {error}")
"""


def launched(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    """`drivetrain launch ARGUMENTS`, without the program `drivetrain`, which is another distribution's."""
    env = os.environ | {"PYTHONWARNINGS": "ignore"} | variables  # torch warns where NumPy is missing
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=-1, stderr=-1, text=True, env=env)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, errors = process.communicate(timeout=100)
    return process.returncode, said, errors


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], list[str]]:
    """The arguments that launch a script with this body in two processes."""

    def write(body: str, *options: str) -> list[str]:
        (tmp_path / "body.py").write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
        return ["--nproc", "2", *options, str(tmp_path / "body.py")]

    return write


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("time.sleep(0.5 * rank); sys.exit(75 if rank == 0 else 0)", 75),
        ("sys.exit(7) if rank else time.sleep(60)", 7),
        ("sys.exit(2) if rank else time.sleep(600)", 2),  # the end of this test is within its own time limit
        pytest.param("sys.exit(75)", 75, marks=pytest.mark.slow),
        pytest.param("sys.exit(2)", 2, marks=pytest.mark.slow),
    ],
    ids=["75 waits for the other", "the first failure ends the other", "one mistake ends the other", "75 stays 75", "2"],
)
def test_the_exit_code_is_the_runs(script: Callable[[str], list[str]], body: str, code: int) -> None:
    assert ended(launched(script(body)))[0] == code


def test_the_environment_is_the_loopback_with_threads_divided(script: Callable[[str], list[str]]) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS"
    body = f"print(*[os.environ[n] for n in '{names}'.split()], sys.argv[1:], flush=True)"
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *script(body), "--run-name", "x", "a=1"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        timeout=100,
    )
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    lines = [f"{rank} 2 {rank} 2 127.0.0.1 {threads} ['--run-name', 'x', 'a=1']" for rank in (0, 1)]
    assert (process.returncode, sorted(process.stdout.splitlines())) == (0, lines), process.stderr


def test_a_killed_process_is_named(script: Callable[[str], list[str]]) -> None:
    code, _, errors = ended(launched(script("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)")))
    assert code == 128 + signal.SIGKILL
    assert errors.startswith(f"rank 1 on {os.uname().nodename} was killed by SIGKILL (process ")


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(script: Callable[..., list[str]]) -> None:
    """The agent starts new attempts, which end at once."""
    code, said, _ = ended(
        launched(script("print('tried', flush=True)\nsys.exit(2) if rank else time.sleep(600)", "--max-restarts", "2"))
    )
    assert (code, said.count("tried")) == (2, 2)


@pytest.mark.slow
def test_restarts(script: Callable[..., list[str]]) -> None:
    """The second attempt is the one that counts."""
    body = "n = os.environ['TORCHELASTIC_RESTART_COUNT']\nprint(n, flush=True)\nif n == '0': sys.exit(3 * rank)\n"
    code, said, _ = ended(launched(script(body, "--max-restarts", "1")))
    assert code == 0
    assert said.split().count("1") == 2


WAITS = """
def stop(number, frame):
    print('saving', flush=True)
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGUSR1, stop)
print('ready', os.getpid(), flush=True)
while True: time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_reaches_all_and_they_may_save(script: Callable[[str], list[str]], number: signal.Signals) -> None:
    process = launched(script(WAITS))
    pids = wait_for_two(process)
    process.send_signal(number)
    code, said, _ = ended(process)
    assert (code, said.count("saving")) == (75, 2)
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
def test_the_second_signal_ends_all_at_once(script: Callable[[str], list[str]]) -> None:
    process = launched(
        script(WAITS.replace("print('saving'", "signal.signal(15, signal.SIG_DFL); print('saving'").replace("0.5", "60"))
    )
    pids = wait_for_two(process)
    process.terminate()
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in (0, 1)] == ["saving", "saving"]
    process.terminate()
    assert ended(process)[0] == 128 + signal.SIGTERM
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(script: Callable[[str], list[str]]) -> None:
    process = launched(script(WAITS))
    pids = wait_for_two(process)
    process.kill()
    end = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids)
    process.communicate()


def wait_for_two(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in (0, 1)]
    assert [line[:1] for line in lines] == [["ready"], ["ready"]], ended(process)
    return [int(line[1]) for line in lines]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    Launch().add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "what is to be launched"),
        (("--nproc", "2", "tarin", "run.toml"), "'tarin' is no command to launch"),
        (("--nproc", "2", "launch"), "is no command to launch"),
        (("--nproc", "2", "missing.py"), "there is no script missing.py"),
        (("--nodes", "2", "train", "run.toml"), "--nodes goes with --slurm"),
        (("--slurm", "train", "run.toml"), "--slurm needs --nproc"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(DrivetrainError, match=message):
        Launch().run(parsed(*words))


def test_a_mistake_in_the_configuration_is_told_once_and_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("sede = 1")
    with pytest.raises(DrivetrainError, match="sede: unknown key"):
        Launch().run(parsed("--nproc", "2", "train", str(tmp_path / "run.toml")))


def test_the_job_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--slurm", "--nodes", "2", "--nproc", "8", "--time", "1:00:00", "--sbatch", "partition=gpu"]
    assert Launch().run(parsed(*words, "train", "my run.toml", "seed=1")) == 0
    assert capsys.readouterr().out == "sbatch my run.sbatch\n"
    text = (tmp_path / "my run.sbatch").read_text()
    for line in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=1:00:00",
        "partition=gpu",
        "signal=USR1@120",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "drivetrain train 'my run.toml' seed=1\n" in text
    with pytest.raises(DrivetrainError, match="exists already with other content"):
        Launch().run(parsed(*words, "train", "my run.toml", "seed=2"))


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_the_job_requeues_itself_when_it_was_interrupted(tmp_path: Path, code: int, requeued: bool) -> None:
    """The file is run by bash, with programs of SLURM that only say what they were asked for."""
    assert (bash := shutil.which("bash"))
    job = tmp_path / "job.sbatch"
    Launch().run(parsed("--slurm", "--nproc", "1", "--gpus", "0", "--output", str(job), "train", "run.toml"))
    for name, body in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" > requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    assert subprocess.run([bash, str(job)], cwd=tmp_path, env=env).returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import argparse, sys; from drivetrain_launch import Launch; Launch().add_arguments(argparse.ArgumentParser())"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
