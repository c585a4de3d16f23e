"""Run names: two words from a hash of the configuration, so that the same command goes on with the same run."""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain import TrainingConfig

SAVED_CONFIG = "config.json"
_NOT_PART_OF_A_RUN = (
    "run_name",
    "output_dir",
    "resume",
    "resume_changed",
    "plugins",
)  # where a run is kept and how it begins, not what it computes

ADJECTIVES = """
able agile airy amber ample azure bold brave breezy brief bright brisk calm candid casual cheery civil clean clear clever
cosmic cozy crisp curious daring deft dewy downy eager early earnest easy fair fancy fast fine firm fleet fluent fond frank
free fresh frosty gentle giddy glad golden grand green handy happy hardy hazel hearty honest humble ideal jolly jovial keen
kind lively loyal lucid lucky mellow merry mild misty modest neat nimble noble novel open patient placid plucky polite prime
proud quick quiet rapid ready rosy rustic serene sharp shiny silent silver smart snug solid spry steady sturdy sunny swift
tidy vivid warm wise witty zesty
"""
ANIMALS = """
adder alpaca auk badger bat bear beaver bee bison boar bobcat bream bunting buzzard camel carp cat chough civet cod condor
coot cougar crab crane cricket crow curlew deer dingo dipper dolphin dove duck dunlin eagle eel egret eider elk ermine falcon
ferret finch fox frog gannet gazelle gecko gibbon goat goose grebe grouse gull hare harrier hawk hedgehog heron hobby hoopoe
horse ibex ibis jackal jackdaw jay kestrel kite kiwi koala lark lemur linnet lion llama lynx magpie marmot marten merlin mink
mole moose moth mouse newt okapi oriole osprey otter owl panda parrot pelican perch petrel pike pipit plover puffin puma
quail rabbit raven robin rook
"""


def name_run(config: TrainingConfig) -> str:
    """The name of the run that `config` describes: a new one, or that of the run which this very configuration began earlier.

    Two configurations can hash to the same words; then the directory is taken by the other one, and the next name is tried.
    """
    digest = _digest(config)
    for attempt in count():
        name = _words(f"{digest}{attempt or ''}")
        if _is_free(config.output_dir / name, digest):
            return name
    raise AssertionError("unreachable: count() does not end")


def _is_free(directory: Path, digest: str) -> bool:
    """Whether no other configuration has its run in `directory`."""
    from drivetrain import DrivetrainError, TrainingConfig
    from drivetrain.formats import read_table

    saved = directory / SAVED_CONFIG
    try:
        if not saved.exists():
            return True
        table = read_table(saved) | {"plugins": []}  # a file may not load code
        return _digest(TrainingConfig.from_table(table)) == digest
    except DrivetrainError:  # of an older version, or damaged: not ours to continue
        return False


def _digest(config: TrainingConfig) -> str:
    table = {key: value for key, value in config.to_dict(secrets=False).items() if key not in _NOT_PART_OF_A_RUN}
    return hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode()).hexdigest()


def _words(seed: str) -> str:
    adjectives, animals = ADJECTIVES.split(), ANIMALS.split()
    number, adjective = divmod(int(hashlib.sha256(seed.encode()).hexdigest(), 16), len(adjectives))
    return f"{adjectives[adjective]}-{animals[number % len(animals)]}"
