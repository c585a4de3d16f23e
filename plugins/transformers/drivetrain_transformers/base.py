"""What the data sets of this distribution share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain import Component, ConfigError, DataError, Problem, component, option
from drivetrain_transformers.records import Record, read_records, split
from drivetrain_transformers.rows import PackedRows, Padding, Sample, documents_are_apart, pack_whole

if TYPE_CHECKING:
    from drivetrain import CallbackContext


@component
class TokenData(Component):
    """Base of the data sets: where the records are, which are held out, and how tokens become rows."""

    kind: ClassVar[str] = "dataset"
    whole_files: ClassVar[bool] = False

    path: str = option(help="a file, a folder, a glob such as 'books/**/*.txt', or package:NAME/FILE")
    context: int = option(default=1024, at_least=2, help="tokens in a row; at most the model's context")
    packing: bool = option(default=True, help="fill rows with several documents that do not see each other; or pad each one")
    held_out: float = option(
        default=0.05, at_least=0, below=1, help="share of the records kept for evaluation, by hash; 0 for none"
    )
    tokenizer: str = option(default="", help="as the model's path; by default the model's own tokenizer")

    def __attrs_post_init__(self) -> None:
        self._pad = 0

    def make_dataset(self, ctx: CallbackContext) -> PackedRows | list[Sample]:
        """The part to train on."""
        return self._rows(ctx, held_out=False)

    def make_eval_dataset(self, ctx: CallbackContext) -> PackedRows | list[Sample] | None:
        """The part held out, None when there is none."""
        return self._rows(ctx, held_out=True) if self.held_out else None

    def make_collator(self, ctx: CallbackContext) -> Padding | None:
        """Padding, for rows that are not packed."""
        return None if self.packing else Padding(self._pad)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Look whether the model keeps packed documents apart, and warn when it does not."""
        if self.packing and not documents_are_apart(ctx) and ctx.is_main:
            name = type(ctx.trainer.model).__name__
            warnings.warn(
                f"data: {name} lets the documents of a packed row see each other, with this attention implementation and batch "
                "size. Set data.packing = false, or model.attention = 'sdpa', or go on if that does not matter.",
                stacklevel=2,
            )

    # -- for subclasses ----------------------------------------------------------------------------------------------------

    def encode(self, tokenizer: Any, records: Sequence[Record]) -> list[Sample]:
        """The records as samples of at most `context` tokens each."""
        raise NotImplementedError

    def field_and_pattern(self) -> tuple[str, str]:
        """Which field of a record to take, and which files of a folder to read."""
        raise NotImplementedError

    def choose(self, records: list[Record], held_out: bool) -> list[Record]:
        """One part of the records."""
        return split(records, self.held_out, held_out)

    def pack(self, samples: list[Sample]) -> PackedRows:
        """Samples as rows."""
        return pack_whole(samples, self.context, self._pad)

    # ----------------------------------------------------------------------------------------------------------------------

    def _rows(self, ctx: CallbackContext, held_out: bool) -> PackedRows | list[Sample]:
        tokenizer = self._tokenizer(ctx)
        self._pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        field, pattern = self.field_and_pattern()
        records = self.choose(read_records(self.path, pattern, field, self.whole_files), held_out)
        samples = self.encode(tokenizer, records)
        if not samples:
            which = "held-out " if held_out else ""
            raise DataError(f"{self.path}: there is no {which}text to learn from in {len(records)} records.")
        return self.pack(samples) if self.packing else samples

    def _tokenizer(self, ctx: CallbackContext) -> Any:
        from drivetrain_transformers.loading import load_tokenizer

        path = self.tokenizer or getattr(ctx.model, "name_or_path", "") or ctx.config.model_name
        if not path:
            raise ConfigError([Problem("data.tokenizer", "is missing: the model does not say where its tokenizer is")])
        return load_tokenizer(path)
