"""Plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from drivetrain import DataError, component, option
from drivetrain_transformers.base import TokenData
from drivetrain_transformers.records import Record
from drivetrain_transformers.rows import PackedRows, Sample, pack_text


@component
class TextFiles(TokenData):
    """Text to continue: text files, each one document, or a field of JSON Lines or a column of Parquet.

    Every document ends in the tokenizer's end token. Packed (the default), documents are joined to one stream and cut into rows
    of `context` tokens, and a token sees its own document only. Not packed, each document is cut into pieces of `context`
    tokens, padded to the longest of a microbatch. Held out are whole documents; of a single one its end.
    """

    whole_files: ClassVar[bool] = True

    pattern: str = option(default="*.txt", help="which files of a folder, at any depth")
    field: str = option(default="text", help="field of a JSON line, column of a Parquet file")

    def field_and_pattern(self) -> tuple[str, str]:
        return self.field, self.pattern

    def choose(self, records: list[Record], held_out: bool) -> list[Record]:
        """One part of the documents, or of a single one its beginning or end."""
        for record in records:
            if not isinstance(record.value, str):
                raise DataError(f"{record.where}: the field {self.field!r} is no text but a {type(record.value).__name__}.")
        if len(records) != 1:
            return super().choose(records, held_out)
        text = records[0].value
        cut = round(len(text) * (1 - self.held_out))
        return [Record(text[cut:] if held_out else text[:cut], records[0].where)]

    def encode(self, tokenizer: Any, records: Sequence[Record]) -> list[Sample]:
        """Each document's tokens and the end token; pieces of them when rows are not packed."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = [record.value for record in records if record.value]
        documents = [] if not texts else tokenizer(texts, verbose=False)["input_ids"]
        complete = [ids if ids[-1:] == end else ids + end for ids in documents if ids]
        size = max(map(len, complete), default=0) if self.packing else self.context
        return [Sample(ids[at : at + size], ids[at : at + size]) for ids in complete for at in range(0, len(ids), size)]

    def pack(self, samples: list[Sample]) -> PackedRows:
        return pack_text([sample.ids for sample in samples], self.context, self._pad)
