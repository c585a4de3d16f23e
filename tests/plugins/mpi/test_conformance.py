"""It keeps every promise of a strategy; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_mpi import Mpi
from drivetrain_testing import Check, conformance

NO_MPI = "the kit's ranks meet over gloo, this strategy's are started by mpirun: tests/plugins/mpi does that"
GLOO = dict.fromkeys(
    [
        "two_ranks_equal_one",
        "collectives_agree",
        "partial_windows_are_exact",
        "states_fit_other_strategies",
    ],
    NO_MPI,
)


@conformance(Mpi(), unsupported=GLOO, processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
