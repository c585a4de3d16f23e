"""Models of transformers, data sets of `datasets`, collators and `accelerate launch`, all as they come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from drivetrain import DataError, Trainer, TrainingConfig
from drivetrain_testing import tiny_data

SIZE = 50


def rows() -> list[dict[str, Any]]:
    """Tokenized sentences of several lengths; the label is the parity of the sum."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (40,), generator=generator).tolist()
    sentences = [torch.randint(4, SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": sum(ids) % 2} for ids in sentences]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[CLS]": 3} | {str(number): number for number in range(4, SIZE)}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def padding(tokenizer: Any) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer)


def bert(kind: Any = BertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(BertConfig(vocab_size=SIZE, max_position_embeddings=32, num_labels=2, **sizes))


def trainer(
    data: Any, collator: Any, eval_data: Any = None, kind: Any = BertForSequenceClassification, **options: Any
) -> Trainer:
    given = {"max_duration": "10st", "per_device_batch_size": 8, "log_interval": "1st", "device": "cpu", "precision": "fp32"}
    config = TrainingConfig(**{**given, "standard_callbacks": False, "optimizer": {"use": "adamw", "lr": 1e-3}, **options})
    return Trainer(bert(kind), config, data, eval_data, data_collator=collator)


def outcome(trainer: Trainer) -> tuple[list[Any], dict[str, float]]:
    output = trainer.train()
    return output.losses, output.metrics


class TestMapStyle:
    def test_a_data_set_is_the_list_of_its_rows(self, padding: Any) -> None:
        data = Dataset.from_list(rows())
        fingerprint = data._fingerprint
        found = outcome(trainer(data, padding, data))
        assert found == outcome(trainer(rows(), padding, rows()))
        assert found[1]["eval/loss"] > 0 and len(found[0]) == 10
        assert found != outcome(trainer(data, padding, data, seed=1)), "negative control"
        assert data._fingerprint == fingerprint and data.format["type"] is None

    def test_formats(self, padding: Any) -> None:
        """A torch format with chosen columns hides the others, which the model would not take."""
        data = Dataset.from_list([{**row, "text": "so and so"} for row in rows()])
        data.set_format("torch", columns=["input_ids", "attention_mask", "labels"])
        assert outcome(trainer(data, padding)) == outcome(trainer(Dataset.from_list(rows()), padding))

    def test_rows_of_one_length_need_no_collator(self) -> None:
        data = Dataset.from_list([{**row, "input_ids": [7] * 8, "attention_mask": [1] * 8} for row in rows()])
        tensors = [{name: torch.tensor(value) for name, value in row.items()} for row in data]
        assert outcome(trainer(data.with_format("torch"), None)) == outcome(trainer(tensors, None))

    def test_workers_and_derived_data_sets(self, padding: Any) -> None:
        """Selected, filtered and shuffled views are data sets too; processes that fetch change nothing."""
        data = Dataset.from_list(rows()).select(range(32)).filter(lambda row: len(row["input_ids"]) > 3)
        assert outcome(trainer(data, padding)) == outcome(trainer(data, padding, dataloader={"num_workers": 2}))

    def test_a_language_model_collator_draws_its_masks_again_after_an_interruption(
        self, tokenizer: Any, tmp_path: Path
    ) -> None:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
        data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
        assert_resumes(lambda **options: trainer(data, collator, kind=BertForMaskedLM, **options), tmp_path)


class TestStreams:
    def stream(self) -> IterableDataset:
        return Dataset.from_list(rows()).to_iterable_dataset(num_shards=4)

    def test_a_stream_is_the_data_set_in_order(self, padding: Any) -> None:
        ordered = trainer(Dataset.from_list(rows()), padding, max_duration="5st", dataloader={"shuffle": False})
        assert outcome(trainer(self.stream(), padding, max_duration="5st")) == outcome(ordered)

    def test_a_shuffled_stream_has_another_order_in_each_epoch(self, padding: Any) -> None:
        seen: list[Any] = []

        def collate(samples: list[Any]) -> Any:
            seen.extend(tuple(sample["input_ids"]) for sample in samples)
            return padding(samples)

        trainer(self.stream().shuffle(seed=1, buffer_size=20), collate, max_duration="10st").train()
        first, second = seen[:40], seen[40:80]
        assert first != second and sorted(first) == sorted(second)

    def test_an_interrupted_stream_goes_on_where_it_was(self, padding: Any, tmp_path: Path) -> None:
        """In the second epoch, whose order is its own."""
        assert_resumes(lambda **options: trainer(self.stream().shuffle(seed=1, buffer_size=20), padding, **options), tmp_path)

    def test_a_stream_begun_in_the_middle_by_its_own_state(self, padding: Any) -> None:
        """Whoever has read a part of it elsewhere gives the rest."""
        whole, rest = self.stream(), self.stream()
        found = iter(whole)
        for _ in range(24):
            next(found)
        rest.load_state_dict(whole.state_dict())
        direct = trainer(rows()[24:], padding, max_duration="2st", dataloader={"shuffle": False})
        assert outcome(trainer(rest, padding, max_duration="2st")) == outcome(direct)


def assert_resumes(make: Any, folder: Path) -> None:
    """Stopped after step 7 and gone on in a new trainer, a run ends as one that was not stopped, bit by bit."""
    options = {"output_dir": folder, "callbacks": ["checkpoint"]}
    stopped = make(run_name="a", **options)
    for step in stopped.steps():
        if step.number == 7:
            break
    resumed, straight = make(run_name="a", **options), make(run_name="b", **options)
    losses = resumed.train().losses
    assert [step for step, _ in losses] == [8, 9, 10]
    assert losses == straight.train().losses[7:]
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_a_data_set_in_parts_is_refused(kind: Any, padding: Any) -> None:
    data = Dataset.from_list(rows())
    parts = kind(train=data if kind is DatasetDict else data.to_iterable_dataset(), test=data)
    expected = (
        rf"train data: the data is a {kind.__name__} with the parts 'train', 'test'; give one of them, such as data\['train'\]"
    )
    with pytest.raises(DataError, match=expected):
        trainer(parts, padding)


@pytest.mark.timeout(180)
def test_accelerate_launch_starts_the_ranks(tmp_path: Path) -> None:
    """As on a machine with GPUs; the script trains on the CPU. Against one process with the same global batch."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = str(Path(__file__).parent / "accelerated.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([*command, script, str(tmp_path / "two.pt")], env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    assert found["world_size"] == 2
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 1)
    given = {"max_duration": "2ep", "per_device_batch_size": 16, "optimizer": "sgd", "precision": "fp32", "device": "cpu"}
    config = TrainingConfig(**given, standard_callbacks=False)
    Trainer(model, config, tiny_data(), loss=torch.nn.MSELoss()).train()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], weight, rtol=1e-6, atol=1e-7)
