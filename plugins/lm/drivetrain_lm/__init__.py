"""A small GPT, byte-level text data, text samples during training, and the pretraining preset."""

from __future__ import annotations

from drivetrain_lm.loss import linear_cross_entropy
from drivetrain_lm.model import GPT, GPTComponent
from drivetrain_lm.preset import pretraining
from drivetrain_lm.sample import SampleTextCallback
from drivetrain_lm.text import TextComponent, TextDataset

__all__ = ["GPT", "GPTComponent", "SampleTextCallback", "TextComponent", "TextDataset", "linear_cross_entropy", "pretraining"]
