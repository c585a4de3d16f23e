"""Conversations, with a loss on what the assistant says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from drivetrain import DataError, component, option
from drivetrain_transformers.base import TokenData
from drivetrain_transformers.loss import IGNORED
from drivetrain_transformers.records import Record
from drivetrain_transformers.rows import Sample

Messages = Sequence[Mapping[str, str]]


@component
class Chat(TokenData):
    """Conversations from JSON Lines or Parquet: a list of {"role": …, "content": …} in the field "messages" of each record.

    They are written with the tokenizer's chat template. The loss counts the assistant's answers and the token that ends each;
    everything else has the label -100. Packed (the default), several whole conversations share a row and do not see each other.
    What is longer than `context` is cut at the end, and left out when no answer remains.
    """

    pattern: str = option(default="*.jsonl", help="which files of a folder, at any depth")
    field: str = option(default="messages", help="field of a JSON line, column of a Parquet file")
    learn: Literal["assistant", "all"] = option(default="assistant", help="whose tokens count: the answers', or all of them")

    def field_and_pattern(self) -> tuple[str, str]:
        return self.field, self.pattern

    def encode(self, tokenizer: Any, records: Sequence[Record]) -> list[Sample]:
        """One sample for each conversation."""
        if not tokenizer.chat_template:
            raise DataError(
                f"{self.path}: the tokenizer has no chat template. Set data.tokenizer to the one of an instruction-tuned model."
            )
        if not tokenizer.is_fast:
            raise DataError(f"{self.path}: chat data need a fast tokenizer, {type(tokenizer).__name__} is none.")
        samples, cut = [], 0
        for record in records:
            messages = checked_messages(record)
            sample = encode_chat(tokenizer, messages, record.where, self.learn == "assistant")
            cut += len(sample.ids) > self.context
            sample = Sample(sample.ids[: self.context], sample.labels[: self.context])
            if any(label != IGNORED for label in sample.labels[1:]):
                samples.append(sample)
        if cut or len(samples) < len(records):
            left_out = len(records) - len(samples)
            warnings.warn(
                f"data: of {len(records)} conversations {cut} are longer than context = {self.context} and were cut; {left_out} "
                "have no answer to learn from and were left out.",
                stacklevel=2,
            )
        return samples


def checked_messages(record: Record) -> Messages:
    """The messages of a record.

    Raises:
        DataError: when they are not a list of tables with a role and a content, both texts.
    """
    messages = record.value
    fine = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not fine or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise DataError(f'{record.where}: a conversation is a list of {{"role": text, "content": text}}.')
    return messages  # type: ignore[no-any-return]


def encode_chat(tokenizer: Any, messages: Messages, where: str, assistant_only: bool) -> Sample:
    """A conversation as tokens, with labels for what the assistant says, or for everything.

    Raises:
        DataError: when the template refuses the conversation, or writes an earlier part differently once more follows, so that
            it cannot be told which tokens are the answer.
    """
    text = _written(tokenizer, messages, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    if not assistant_only:
        return Sample(ids, ids)
    spans = answer_spans(tokenizer, messages, text, where)
    labels = [
        token if any(start <= begin < end for start, end in spans) else IGNORED
        for token, (begin, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Sample(ids, labels)


def answer_spans(tokenizer: Any, messages: Messages, text: str, where: str) -> list[tuple[int, int]]:
    """Where in the written conversation the answers are, as (first, past the last) character, their end tokens included."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _written(tokenizer, messages[:index], where, asking=True) if index else text[: text.find(message["content"])]
        upto = _written(tokenizer, messages[: index + 1], where)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise DataError(
                f"{where}: the tokenizer's chat template writes earlier messages differently when others follow, so the answers "
                "cannot be told from the rest. Keep one answer in each conversation, or set data.learn = 'all'."
            )
        spans.append((len(before), len(upto.rstrip())))
    return spans


def _written(tokenizer: Any, messages: Messages, where: str, asking: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asking))
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the tokenizer's chat template refuses it: {error}") from error
