"""Every optimizer, schedule, precision and mode says where it is from: a paper and the place in it."""

from __future__ import annotations

import inspect
import re

import pytest

from drivetrain.registry import candidates

NO_ALGORITHM = {
    "optimizer:routed": "other optimizers, each with a source of its own",
    "precision:auto": "a choice among the others",
    "mode:full_finetune": "changes nothing about a model",
    "mode:pretraining": "changes nothing about a model",
}
KINDS = ("optimizer", "scheduler", "precision", "mode")
FOUND = {
    f"{kind}:{name}": owners[0]
    for kind in KINDS
    for name, owners in candidates(kind).items()
    if owners[0].distribution.startswith("drivetrain-") and f"{kind}:{name}" not in NO_ALGORITHM
}
WORK = re.compile(r"\b(19|20)\d\d\b")  # a year, and where the work can be found
WHERE = re.compile(r"arXiv:\d{4}\.\d{4,5}|JMLR|ICML|ICLR|IEEE 754|whitepaper|lecture|kellerjordan\.github\.io")
PLACE = re.compile(r"\b(equations?|algorithms?|section|appendix|tables?|lecture|figure) \(?[\dA-Z]", re.IGNORECASE)


def test_what_is_left_out_exists_and_the_rest_is_most() -> None:
    for name in NO_ALGORITHM:
        kind, _, bare = name.partition(":")
        assert bare in candidates(kind)
    assert len(FOUND) > 40


@pytest.mark.parametrize("name", FOUND)
def test_the_docstring_cites_a_work_and_the_place_in_it(name: str) -> None:
    cited = ""
    loaded = FOUND[name].load()
    assert isinstance(loaded, type)
    for cls in loaded.__mro__:  # a variant may leave the citation to what it is a variant of
        if cls.__module__.startswith("drivetrain_"):
            cited += inspect.cleandoc(cls.__dict__.get("__doc__") or "") + "\n"
    text = " ".join(cited.split())
    assert WORK.search(text), "no year of a work"
    assert WHERE.search(text), "no arXiv number, or what else leads to the work"
    assert PLACE.search(text), "no equation, algorithm, section or table"


def test_control_a_sentence_without_a_place_is_not_enough() -> None:
    sentence = "Adam (Kingma & Ba 2015, arXiv:1412.6980), by default with weight decay."
    assert WORK.search(sentence) and WHERE.search(sentence) and not PLACE.search(sentence)
    assert PLACE.search("see algorithm 1") and PLACE.search("lecture 6e") and PLACE.search("appendix B")
