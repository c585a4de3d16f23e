"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_finders import BatchSizeFinderCallback, LrFinderCallback, WorkersFinderCallback
from drivetrain_testing import Check, conformance

pytestmark = pytest.mark.slow  # its runs take long to begin and end

ALONE = {"two_ranks_equal_one": "it works with one process, and says so", "steps_call_no_collective": "the same"}


@conformance(BatchSizeFinderCallback(), unsupported=ALONE, processes=pytest.mark.slow)
def test_conformance_of_the_batch_size_finder(check: Check) -> None:
    check()


@conformance(LrFinderCallback(), processes=pytest.mark.slow)
def test_conformance_of_the_learning_rate_finder(check: Check) -> None:
    check()


@conformance(WorkersFinderCallback(most=1), processes=pytest.mark.slow)
def test_conformance_of_the_workers_finder(check: Check) -> None:
    check()
