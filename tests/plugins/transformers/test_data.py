"""Text and chat data: what becomes a token row, what counts, and who sees whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from drivetrain import ConfigError, DataError, Loss, Precision, Trainer, TrainingConfig
from drivetrain_transformers import Chat, TextFiles, token_loss
from drivetrain_transformers.chat import answer_spans, encode_chat
from drivetrain_transformers.records import Record, split
from drivetrain_transformers.rows import Padding, Sample, pack_text, pack_whole

TURNS = [
    {"role": "user", "content": "Why does the fox jump?"},
    {"role": "assistant", "content": "Because it can."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "It is lazy."},
]


def trainer_of(model: nn.Module, train: Any, evaluation: Any = None, **table: Any) -> Trainer:
    config = TrainingConfig(**{"max_duration": "1st", "standard_callbacks": False, "dataloader": {"shuffle": False}, **table})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, config, train, evaluation, optimizer=optimizer, precision=Precision(), loss=token_loss)


def rows_of(component: Any, held_out: bool = False) -> Any:
    """What the component makes in a run whose model has no name."""
    trainer = trainer_of(nn.Linear(1, 1), [0])
    return component.make_eval_dataset(trainer.ctx) if held_out else component.make_dataset(trainer.ctx)


def documents_in(rows: Any) -> list[list[int]]:
    """The tokens of each document of packed rows, padding included, by their positions."""
    found: list[list[int]] = []
    for ids, positions in zip(rows.ids.flatten().tolist(), rows.positions.flatten().tolist(), strict=True):
        if positions == 0:
            found.append([])
        found[-1].append(ids)
    return found


class TestPackingText:
    def test_by_hand(self) -> None:
        rows = pack_text([[1, 2, 9], [3, 4, 5, 6, 9], [7, 9]], context=4, pad=0)
        assert rows.ids.tolist() == [[1, 2, 9, 3], [4, 5, 6, 9], [7, 9, 0, 0]]
        assert rows.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
        assert rows.labels.tolist() == [[-100, 2, 9, -100], [-100, 5, 6, 9], [-100, 9, -100, -100]]

    def test_a_full_last_row_has_no_padding(self) -> None:
        rows = pack_text([[1, 2], [3, 4]], context=4, pad=0)
        assert (rows.ids.tolist(), rows.positions.tolist()) == ([[1, 2, 3, 4]], [[0, 1, 0, 1]])

    def test_nothing_is_lost_or_doubled(self) -> None:
        generator = torch.Generator().manual_seed(0)
        documents = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (3, 17, 1, 8, 40, 2)]
        rows = pack_text(documents, context=8, pad=0)
        assert [i for i in rows.ids.flatten().tolist() if i] == [i for d in documents for i in d]
        batch = rows.fetch([0, 2])
        assert {(k, v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
            (name, torch.int64, (2, 8)) for name in ("input_ids", "labels", "position_ids")
        }
        assert torch.equal(rows[2]["input_ids"], batch["input_ids"][1])


class TestPackingWhole:
    def test_no_sample_is_cut_and_labels_stay_with_their_tokens(self) -> None:
        generator = torch.Generator().manual_seed(0)
        samples = []
        for size in (5, 3, 8, 2, 6, 1, 4):
            ids = torch.randint(1, 90, (size,), generator=generator).tolist()
            samples.append(Sample(ids, [i if i % 2 else -100 for i in ids]))
        rows = pack_whole(samples, context=8, pad=0)
        assert len(rows) == 4, "29 tokens fit into four rows of eight"
        found = [d for d in documents_in(rows) if any(d)]
        assert sorted(found) == sorted(list(s.ids) for s in samples)
        counted = sorted(i for i in rows.labels.flatten().tolist() if i != -100)
        assert counted == sorted(i for s in samples for i in s.labels[1:] if i != -100)

    def test_padding(self) -> None:
        batch = Padding(7)([Sample([1, 2, 3], [1, -100, 3]), Sample([4], [4])])
        assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 3], [-100, -100, -100]]


class TestDocumentMasks:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_a_packed_document_has_the_logits_it_has_alone(
        self, make_llama: Callable[..., Any], attention: str, kind: str
    ) -> None:
        model = model_of(kind, make_llama, attention).eval()
        documents = [[5, 6, 7, 8, 9], [10, 11, 12]]
        batch = pack_text(documents, context=8, pad=0).fetch([0])
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in documents])
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        seen = model(input_ids=batch["input_ids"], use_cache=False).logits[0]  # negative control: without positions they see
        assert not torch.allclose(seen[5:], alone[5:], rtol=1e-2)

    def test_packed_and_padded_rows_have_one_loss(self, make_llama: Callable[..., Any]) -> None:
        samples = [Sample(ids, ids) for ids in ([1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15])]
        model = make_llama().eval()
        model.config.use_cache = False
        results = []
        for batch in (pack_whole(samples, 8, 0).fetch([0, 1]), Padding(0)(samples)):
            results.append(token_loss(model(**batch), batch))
        assert results[0].weight == results[1].weight == 4 + 2 + 6
        torch.testing.assert_close(results[0].total, results[1].total)

    def test_a_model_that_lets_documents_see_each_other_is_told_of(
        self, make_llama: Callable[..., Any], tokenizer_dir: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a.txt").write_text("the quick brown fox " * 20)
        data = TextFiles(path=str(tmp_path), context=16, tokenizer=str(tokenizer_dir), held_out=0)
        mixing = make_llama()  # with its cache of keys, transformers makes no document mask
        with pytest.warns(UserWarning, match="lets the documents of a packed row see each other"):
            run(mixing, data)
        apart = make_llama()
        apart.config.use_cache = False
        assert run(apart, data).ctx.step == 1

    def test_a_model_without_positions_is_refused(self, tokenizer_dir: Path, tmp_path: Path) -> None:
        class Unpositioned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Embedding(300, 300)

            def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
                return self.layer(input_ids)

        (tmp_path / "a.txt").write_text("the quick brown fox " * 20)
        with pytest.raises(DataError, match="cannot keep packed documents apart"):
            run(Unpositioned(), TextFiles(path=str(tmp_path), context=16, tokenizer=str(tokenizer_dir), held_out=0))


def model_of(kind: str, make_llama: Callable[..., Any], attention: str) -> Any:
    if kind == "llama":
        return make_llama(attn_implementation=attention)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_implementation=attention)
    return AutoModelForCausalLM.from_config(config)


def run(model: nn.Module, data: Any) -> Trainer:
    """One step on data named as a configuration does."""
    config = TrainingConfig(max_duration="1st", standard_callbacks=False, data=data, per_device_batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, config, optimizer=optimizer, precision=Precision(), loss=token_loss)
    trainer.train()
    return trainer


class TestTextFiles:
    def test_files_are_documents_that_end_in_the_end_token(self, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
        texts = {"a.txt": "the quick brown fox", "sub/b.txt": "over the lazy dog", "c.md": "not this one"}
        (tmp_path / "sub").mkdir()
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        rows = rows_of(TextFiles(path=str(tmp_path), context=64, tokenizer=str(tokenizer_dir), held_out=0))
        end = tokenizer.eos_token_id
        first, second = ([*tokenizer(texts[name])["input_ids"], end] for name in ("a.txt", "sub/b.txt"))
        assert documents_in(rows)[:2] == [first, second]

    def test_of_one_document_the_end_is_held_out(self, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
        text = " ".join(map(str, range(100)))
        (tmp_path / "a.txt").write_text(text)
        data = TextFiles(path=str(tmp_path / "a.txt"), context=64, tokenizer=str(tokenizer_dir), held_out=0.2)
        said = ["".join(tokenizer.decode(d) for d in documents_in(rows_of(data, held))) for held in (False, True)]
        assert "".join(part.replace("<|end|>", "") for part in said) == text
        assert "99" in said[1] and "99" not in said[0]

    def test_json_lines_and_their_mistakes(self, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "the fox"}\n\n{"text": "the dog"}\n')
        given = {"path": str(file), "context": 16, "tokenizer": str(tokenizer_dir), "held_out": 0}
        ids = [*tokenizer("the dog")["input_ids"], tokenizer.eos_token_id]
        assert documents_in(rows_of(TextFiles(**given)))[1] == ids
        for line, said in (("{", r"a.jsonl:4: is not JSON"), ('{"txt": 1}', r"a.jsonl:4: has no field 'text' \(it has txt\)")):
            file.write_text('{"text": "the fox"}\n\n\n' + line)
            with pytest.raises(DataError, match=said):
                rows_of(TextFiles(**given))
        file.write_text('{"text": 3}')
        with pytest.raises(DataError, match=r"a.jsonl:1: the field 'text' is no text but a int"):
            rows_of(TextFiles(**given))

    def test_parquet(self, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["the fox", "the dog"], "n": [1, 2]}), tmp_path / "a.parquet")
        given = {"path": str(tmp_path / "a.parquet"), "context": 16, "tokenizer": str(tokenizer_dir), "held_out": 0}
        ids = [*tokenizer("the dog")["input_ids"], tokenizer.eos_token_id]
        assert documents_in(rows_of(TextFiles(**given)))[1] == ids
        with pytest.raises(DataError, match=r"has no column 'body' \(it has text, n\)"):
            rows_of(TextFiles(**given, field="body"))

    def test_not_packed_long_documents_become_pieces(self, tokenizer_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("zyxwvutsrqponmlkjihgfedcba")
        samples = rows_of(TextFiles(path=str(tmp_path), context=10, packing=False, tokenizer=str(tokenizer_dir), held_out=0))
        assert [len(s.ids) for s in samples] == [10, 10, 7]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"path": "nowhere"}, "nothing is at 'nowhere'"),
            ({"path": "."}, r"no file matches '\*\*/\*.txt'"),
            ({"path": "*.md"}, r"no file matches '\*.md'"),
        ],
    )
    def test_paths_that_lead_nowhere(
        self, options: dict[str, Any], said: str, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=said):
            rows_of(TextFiles(**options, tokenizer=str(tokenizer_dir)))

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"data.tokenizer: is missing"):
            rows_of(TextFiles(path=str(tmp_path)))


class TestHoldingOut:
    def test_by_content_alone(self) -> None:
        records = [Record(f"text {n}", "") for n in range(200)]
        held = split(records, 0.2, True)
        assert 20 <= len(held) <= 60
        assert {r.value for r in split(records, 0.2, False)} | {r.value for r in held} == {r.value for r in records}
        fewer = split(records[::2], 0.2, True)
        assert {r.value for r in fewer} == {r.value for r in held} & {r.value for r in records[::2]}
        doubled = split([*records, *records], 0.2, False)
        assert not {r.value for r in doubled} & {r.value for r in held}

    def test_at_least_one_and_never_all(self) -> None:
        pair = [Record("a", ""), Record("b", "")]
        for share in (1e-9, 0.999):
            assert len(split(pair, share, True)) == len(split(pair, share, False)) == 1
        assert split(pair, 0.0, True) == []


class TestChat:
    def write(self, folder: Path, conversations: list[Any]) -> str:
        file = folder / "chats.jsonl"
        file.write_text("\n".join(json.dumps({"messages": c}) for c in conversations))
        return str(file)

    def test_only_answers_and_their_end_tokens_count(self, tokenizer: Any) -> None:
        sample = encode_chat(tokenizer, TURNS, "here", assistant_only=True)
        assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
        counted = [label for label in sample.labels if label != -100]
        assert tokenizer.decode(counted) == "Because it can.<|end|>It is lazy.<|end|>"

    def test_or_everything(self, tokenizer: Any) -> None:
        sample = encode_chat(tokenizer, TURNS, "here", assistant_only=False)
        assert list(sample.labels) == list(sample.ids)

    def test_a_conversation_may_begin_with_an_answer(self, tokenizer: Any) -> None:
        sample = encode_chat(tokenizer, TURNS[1:2], "here", assistant_only=True)
        assert tokenizer.decode([i for i in sample.labels if i != -100]) == "Because it can.<|end|>"

    def test_a_template_that_rewrites_the_past_is_refused(self, tokenizer: Any) -> None:
        forgetful = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% else %}…{% endif %}{% endfor %}"

        class Forgetful:
            def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
                return str(tokenizer.apply_chat_template(messages, chat_template=forgetful, **kwargs))

        text = Forgetful().apply_chat_template(TURNS, tokenize=False)
        with pytest.raises(DataError, match="writes earlier messages differently"):
            answer_spans(Forgetful(), TURNS, text, "here")

    def test_whole_conversations_share_rows(self, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
        path = self.write(tmp_path, [TURNS, TURNS[:2], TURNS[2:]])
        data = Chat(path=path, context=128, tokenizer=str(tokenizer_dir), held_out=0)
        rows = rows_of(data)
        wanted = sorted(tokenizer.apply_chat_template(c, tokenize=False) for c in (TURNS, TURNS[:2], TURNS[2:]))
        documents = sorted(tokenizer.decode(d).rstrip("\n") for d in documents_in(rows))
        assert [d for d in documents if "fox" in d or "dog" in d] == [w.rstrip("\n") for w in wanted]

    def test_what_is_too_long_is_cut_and_said(self, tokenizer_dir: Path, tmp_path: Path) -> None:
        path = self.write(tmp_path, [TURNS, TURNS[2:]])
        data = Chat(path=path, context=34, packing=False, tokenizer=str(tokenizer_dir), held_out=0)
        with pytest.warns(UserWarning, match="of 2 conversations 1 are longer than context = 34"):
            samples = rows_of(data)
        assert max(len(s.ids) for s in samples) <= 34

    @pytest.mark.parametrize("messages", ["hello", [], [{"role": "user"}], [3], [{"role": "user", "content": None}]])
    def test_what_is_no_conversation(self, messages: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
        path = self.write(tmp_path, [TURNS, messages])
        with pytest.raises(DataError, match=r"chats.jsonl:2: a conversation is a list"):
            rows_of(Chat(path=path, tokenizer=str(tokenizer_dir), held_out=0))

    def test_a_tokenizer_without_a_template(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path / "bare")
        (tmp_path / "bare" / "chat_template.jinja").unlink()
        with pytest.raises(DataError, match="has no chat template"):
            rows_of(Chat(path=self.write(tmp_path, [TURNS]), tokenizer=str(tmp_path / "bare"), held_out=0))


class TestRuns:
    @pytest.mark.parametrize("packing", [True, False])
    def test_a_run_from_a_configuration(self, packing: bool, model_dir: Path, tmp_path: Path) -> None:
        """The tokenizer is the model's, the held-out part is evaluated, the loss falls, and the weight is the tokens'."""
        (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
        config = TrainingConfig(
            max_duration="30st",
            per_device_batch_size=4,
            standard_callbacks=False,
            model={"use": "transformers", "path": str(model_dir)},
            data={"use": "text_files", "path": str(tmp_path / "a.txt"), "context": 32, "packing": packing},
            eval_interval="30st",
            log_interval="1st",
        )
        weights = []

        def adam(trainer_model: Any) -> torch.optim.Optimizer:
            return torch.optim.Adam(trainer_model.parameters(), lr=0.01)

        from drivetrain import Callback, CallbackContext, OptimizerComponent, component

        @component
        class Adam(OptimizerComponent):
            def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
                return adam(ctx.model)

        class Weights(Callback):
            def on_loss(self, ctx: CallbackContext) -> None:
                assert isinstance(ctx.microbatch_loss, Loss)
                weights.append(int(ctx.microbatch_loss.weight) == int((ctx.batch["labels"][:, 1:] != -100).sum()))

        output = Trainer(None, config, callbacks=[Weights()], optimizer=Adam(), precision=Precision()).train()
        assert weights == [True] * 30
        assert output.losses[0][1] > 5.5
        assert output.metrics["eval/loss"] < 3
        assert {"eval/bits_per_token", "eval/perplexity"} <= set(output.metrics)
