"""Hugging Face transformers in Drivetrain: models, tokenizers, packed text and chat data, exact token-weighted loss."""

from __future__ import annotations

from drivetrain_transformers.chat import Chat
from drivetrain_transformers.loss import token_loss
from drivetrain_transformers.model import TransformersModel
from drivetrain_transformers.prompts import SamplePromptsCallback
from drivetrain_transformers.sources import locate
from drivetrain_transformers.text import TextFiles

__all__ = ["Chat", "SamplePromptsCallback", "TextFiles", "TransformersModel", "locate", "token_loss"]
