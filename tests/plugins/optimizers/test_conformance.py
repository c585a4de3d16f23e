"""It keeps every promise of an optimizer; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_optimizers import SGD, Adafactor, Adagrad, Adam, AdamW, MuonTorch, NAdam, RAdam, RMSprop, Routed
from drivetrain_testing import Check, conformance

ROUTES = [{"match": "*.weight", "use": "adamw", "lr": 1e-2}]
OWN_GROUPS = {"options_of_groups_count": "its routes are its groups, and their optimizers have `groups`"}


@conformance(AdamW(), Adam(), SGD(), Adagrad(), RMSprop(), RAdam(), processes=pytest.mark.slow)
def test_conformance_of_most(check: Check) -> None:
    check()


@conformance(
    Adafactor(),
    NAdam(),
    unsupported={"steps_wait_for_no_device": "torch's own code reads a scalar of its state in every step"},
    processes=pytest.mark.slow,
)
def test_conformance_of_those_that_read_on_the_host(check: Check) -> None:
    check()


@conformance(
    MuonTorch(),
    unsupported={"sparse_gradients_are_used_or_refused": "torch's own code meets the sparse one when others have moved"},
    processes=pytest.mark.slow,
)
def test_conformance_of_muon_of_torch(check: Check) -> None:
    check()


@conformance(
    Routed(routes=ROUTES, default={"use": "sgd", "lr": 1e-2}),
    unsupported=OWN_GROUPS,
    allow=("drivetrain-optimizers",),
    processes=pytest.mark.slow,
)
def test_conformance_of_routes(check: Check) -> None:
    check()
