"""A run that resumes exactly passes; one that loses a part of its state fails, and the part is named."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pytest

from drivetrain import DrivetrainError
from drivetrain_verify import Record, first_divergence, unrepeatable, verify_resume
from drivetrain_verify.command import VerifyResume
from drivetrain_verify.compare import read_records


def record(window: int, first: bool = False, **leaves: str) -> Record:
    return Record(0, (0, window), window + 1, first, {"model/w": "a", "optimizer/m": "b", "samples": "1 2", **leaves})


class TestCompare:
    def test_equal_records_do_not_diverge_however_often_a_step_was_repeated(self) -> None:
        reference = [record(0), record(1), record(2)]
        assert first_divergence(reference, [record(0), record(1), record(1, first=True), record(2)]) is None

    @pytest.mark.parametrize(
        ("leaves", "component"),
        [
            ({"model/w": "x"}, "model"),
            ({"model/w": "x", "optimizer/m": "x"}, "optimizer"),
            ({"model/w": "x", "samples": "2 1", "batch": "x"}, "samples"),
            ({"model/w": "x", "components/callback:ema/decay": "x"}, "callback:ema"),
            ({"model/w": "x", "rng/0/torch": "x"}, "rng"),
        ],
    )
    def test_the_cause_is_the_earliest_of_what_differs(self, leaves: dict[str, str], component: str) -> None:
        found = first_divergence([record(0), record(1)], [record(0), record(1, first=True, **leaves)])
        assert found is not None
        assert (found.step, found.component, found.after_resume) == (2, component, True)

    def test_right_after_a_resume_every_part_that_differs_was_lost(self) -> None:
        lost = {"optimizer/m": "x", "components/callback:ema/decay": "x", "components/callback:ema/weights": "x"}
        found = first_divergence([record(0)], [record(0, first=True, **lost)])
        assert found is not None and found.components == ("callback:ema", "optimizer")
        assert "callback:ema, optimizer are not as they were when saved" in str(found)

    def test_what_is_never_the_same_twice_is_left_out(self) -> None:
        one, other = [record(0, clock="1")], [record(0, clock="2")]
        assert unrepeatable(one, other) == {"clock"}
        assert first_divergence(one, other, {"clock"}) is None
        assert first_divergence(one, other) is not None

    def test_a_step_that_the_reference_did_not_take_is_a_divergence(self) -> None:
        found = first_divergence([record(0)], [record(5)])
        assert found is not None and found.component == "progress"

    def test_a_line_cut_short_is_no_record(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        whole = '{"sitting": 0, "place": [0, 1], "step": 2, "first": false, "leaves": {"a": "b"}, "clock": 1.0}'
        path.write_text(f"\n{whole}\n\n{whole[:30]}\n{whole}\n")
        assert [r.place for r in read_records(path)] == [(0, 1), (0, 1)]


def test_an_exact_run_passes(config: Any, capsys: Any) -> None:
    parser = argparse.ArgumentParser()
    command = VerifyResume()
    command.add_arguments(parser)
    words = [config("checkpoint", "counter"), "--steps", "10", "--kills", "2", "seed=3"]
    assert command.run(parser.parse_intermixed_args(words)) == 0
    assert "\nEQUAL: " in capsys.readouterr().out
    assert not list(Path(tempfile.gettempdir()).glob("drivetrain-verify-*/killed.order.json"))


@pytest.mark.parametrize("lost", ["rng", *(pytest.param(part, marks=pytest.mark.slow) for part in ("optimizer", "components"))])
def test_a_lost_part_is_named(config: Any, lost: str) -> None:
    report = verify_resume(config({"use": "checkpoint", "forgets": lost}, "counter"), steps=10, kills=1, seed=1)
    assert report.kills == 1 and not report.passed
    assert report.divergence is not None and report.divergence.after_resume
    assert report.divergence.component == {"components": "callback:counter"}.get(lost, lost)


def test_what_is_kept_outside_of_the_state_is_recognised(config: Any) -> None:
    report = verify_resume(config("checkpoint", {"use": "counter", "hides": True}), steps=10, kills=1, seed=1)
    assert report.divergence is not None and not report.passed
    assert "outside of the saved state" in str(report)


def test_a_run_that_never_repeats_itself_is_not_blamed_on_resuming(config: Any) -> None:
    report = verify_resume(config("checkpoint", {"use": "counter", "noise": True}), steps=4, kills=1)
    assert report.unstable is not None and not report.passed
    assert "two uninterrupted runs differ" in str(report)


def test_without_a_checkpoint_plugin_nothing_was_tested(config: Any) -> None:
    report = verify_resume(config({"use": "checkpoint", "forgets": "everything"}), steps=6, kills=1)
    assert report.divergence is None and report.finished and not report.passed
    assert "NOTHING TESTED" in str(report)


def test_a_process_that_fails_by_itself_is_shown(config: Any) -> None:
    with pytest.raises(DrivetrainError, match=r"(?s)the reference run ended with exit code 1.*expected a number"):
        verify_resume(config("checkpoint"), ["optimizer.lr='a'"], steps=4, kills=1)
