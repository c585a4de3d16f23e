"""Text data: which files, which part, and that its windows are the text."""

from __future__ import annotations

import errno
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from drivetrain import ConfigError, Trainer, TrainingConfig
from drivetrain_lm import TextComponent, TextDataset
from drivetrain_lm.text import find_files, held_out_names

NAMES = [f"part{i}/file{j}.txt" for i in range(5) for j in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A hundred files of 40 to 99 bytes, each byte saying which file it is of."""
    for index, name in enumerate(NAMES):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([index]) * (40 + index % 60))
    return tmp_path


def parts(**options: Any) -> tuple[TextDataset, TextDataset | None]:
    made = TextComponent(**options)
    return made.make_dataset(None), made.make_eval_dataset(None)  # type: ignore[arg-type]


def files_in(data: TextDataset | None) -> set[int]:
    return set() if data is None else set(data.text.tolist())


class TestWindows:
    @pytest.mark.parametrize("length", [5, 8, 9, 13, 100])
    def test_cover_the_text_exactly(self, length: int) -> None:
        text = torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        data = TextDataset(text, 4)
        samples = [data[i] for i in range(len(data))]
        assert len(data) == (length - 1) // 4
        used = len(data) * 4
        assert torch.cat([s["input_ids"] for s in samples]).tolist() == text[:used].tolist()
        assert torch.cat([s["labels"] for s in samples]).tolist() == text[1 : used + 1].tolist()
        assert {(s[k].dtype, s[k].shape) for s in samples for k in s} == {(torch.int64, (4,))}

    def test_fetch_is_the_stack_of_the_samples(self) -> None:
        data = TextDataset(torch.arange(200, dtype=torch.uint8), 7)
        indices = [3, 0, 27, 3]
        fetched = data.fetch(indices)
        for key in ("input_ids", "labels"):
            assert torch.equal(fetched[key], torch.stack([data[i][key] for i in indices]))
            assert fetched[key].is_contiguous()

    def test_works_in_torchs_data_loader(self) -> None:
        data = TextDataset(torch.arange(200, dtype=torch.uint8), 7)
        [batch] = DataLoader(data, batch_size=len(data))
        expected = data.fetch(range(len(data)))
        assert all(torch.equal(batch[key], expected[key]) for key in ("input_ids", "labels"))

    def test_is_a_sequence_with_an_end(self) -> None:
        data = TextDataset(torch.arange(20, dtype=torch.uint8), 4)
        assert torch.equal(data[-1]["input_ids"], data[3]["input_ids"])
        with pytest.raises(IndexError, match="sample 4 of 4"):
            data[4]


class TestHeldOut:
    def test_the_parts_are_whole_files_disjoint_and_complete(self, folder: Path) -> None:
        train, held = parts(path=str(folder), context=1, held_out=0.2)
        assert not files_in(train) & files_in(held)
        assert files_in(train) | files_in(held) == set(range(100))
        assert 8 <= len(files_in(held)) <= 35  # 20 ± 4 expected
        assert len(train.text) + len(held.text) == sum(40 + i % 60 for i in range(100))  # type: ignore[union-attr]

    def test_the_choice_is_fixed_for_all_time(self) -> None:
        """Worked out with `sha256sum`: another choice would move held-out data of older runs into training."""
        assert sorted(held_out_names(NAMES, 0.05)) == ["part1/file2.txt", "part3/file14.txt", "part4/file9.txt"]

    def test_the_choice_does_not_depend_on_place_or_company(self, folder: Path, tmp_path_factory: Any) -> None:
        first = held_out_names(NAMES, 0.2)
        assert held_out_names(reversed(NAMES[:50]), 0.2) == first & set(NAMES[:50])
        moved = tmp_path_factory.mktemp("elsewhere") / "x"
        folder.rename(moved)
        train, _ = parts(path=str(moved), context=1, held_out=0.2)
        assert files_in(train) == {NAMES.index(name) for name in NAMES if name not in first}

    @pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
    def test_of_several_files_neither_part_is_empty(self, share: float) -> None:
        assert len(held_out_names(["a", "b"], share)) == 1

    def test_none(self, folder: Path) -> None:
        train, held = parts(path=str(folder), context=1, held_out=0.0)
        assert held is None
        assert files_in(train) == set(range(100))

    def test_of_a_single_file_the_end_is_held_out(self, tmp_path: Path) -> None:
        file = tmp_path / "one.txt"
        file.write_bytes(bytes(range(200)))
        train, held = parts(path=str(file), context=4, held_out=0.1)
        assert held is not None
        assert (train.text.tolist(), held.text.tolist()) == (list(range(180)), list(range(180, 200)))

    def test_every_share_is_checked(self) -> None:
        with pytest.raises(ConfigError, match=r"data\.text\.held_out: must be at least 0 and below 1, got 1\.5"):
            TrainingConfig(data={"use": "text", "held_out": 1.5}).components()


class TestFiles:
    def test_a_folder_and_its_pattern(self, folder: Path) -> None:
        (folder / "part0" / "code.py").write_text("x = 1\n")
        assert find_files(str(folder), "*.txt") == (folder, sorted(NAMES))
        assert find_files(str(folder), "*.py")[1] == ["part0/code.py"]

    def test_a_glob(self, folder: Path) -> None:
        assert find_files(str(folder / "part[12]" / "file1?.txt"), "") == (
            folder,
            [f"part{i}/file1{j}.txt" for i in (1, 2) for j in range(10)],
        )
        assert len(find_files(str(folder / "**" / "*.txt"), "")[1]) == 100

    def test_names_with_wildcard_characters_are_still_names(self, tmp_path: Path) -> None:
        (tmp_path / "[a]").mkdir()
        (tmp_path / "[a]" / "x.txt").write_text("x")
        assert find_files(str(tmp_path / "[a]"), "*.txt")[1] == ["x.txt"]

    def test_max_bytes_limits_each_part(self, folder: Path) -> None:
        train, held = parts(path=str(folder), context=3, held_out=0.2, max_bytes=100)
        full, _ = parts(path=str(folder), context=3, held_out=0.2)
        assert train.text.tolist() == full.text[:100].tolist()
        assert held is not None
        assert len(held.text) == 100

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"path": "nowhere"}, "path: nothing is at 'nowhere'"),
            ({"path": "nowhere/*.txt"}, r"path: nothing is at \'nowhere/\*.txt\'"),
            ({"path": "x" * 300}, "path: 'x{200}…' with the pattern .* cannot be read: "),
            ({"path": "~nobody-has-this-name/x"}, "path: '~nobody-has-this-name/x' with the pattern .* cannot be read: "),
            ({"path": ".", "pattern": "*.none"}, r"path: no file matches '\*\*/\*.none' in '.'. Set pattern"),
            ({"path": "empty.txt"}, "path: the file is empty at 'empty.txt'. Give another path"),
            (
                {"path": ".", "context": 99999},
                r"context: the files of path '.' hold \d+ bytes, less than one window of context \+ 1 = 100000. Lower it.",
            ),
            (
                {"path": "part0", "context": 700, "held_out": 0.01},
                "context: the held-out files .* Lower it, raise held_out or set it to 0",
            ),
        ],
    )
    def test_errors_name_the_option_and_its_value(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
    ) -> None:
        monkeypatch.chdir(folder)
        (folder / "empty.txt").touch()
        with pytest.raises(ConfigError, match=said):
            parts(**options)

    def test_a_run_says_which_key_of_the_configuration_is_wrong(self, folder: Path) -> None:
        small = {"use": "gpt", "layers": 1, "heads": 1, "width": 4, "context": 4}
        nowhere, here = {"use": "text", "path": "nowhere"}, {"use": "text", "path": str(folder), "context": 4}
        for data, eval_data, key in (
            (nowhere, None, "data"),
            (here, nowhere, "eval_data"),
            ({**here, "context": 10**6}, None, "data"),
        ):
            with pytest.raises(ConfigError) as caught:
                Trainer(None, TrainingConfig(model=small, data=data, eval_data=eval_data))
            (problem,) = caught.value.problems
            assert problem.path == f"{key}.text.{'path' if nowhere in (data, eval_data) else 'context'}"

    def test_an_unreadable_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)  # not by its mode: root reads everything
        with pytest.raises(ConfigError, match=r"file0\.txt cannot be read: Permission denied"):
            parts(path=str(folder), context=1)

    def test_the_standard_library(self) -> None:
        root, names = find_files("stdlib", "*.txt")
        assert str(root) == sysconfig.get_path("stdlib")
        assert {"argparse.py", "json/decoder.py"} <= set(names)
        assert names == sorted(names)
        assert not [
            n for n in names if {"test", "tests", "site-packages", "encodings"} & set(n.split("/")) or not n.endswith(".py")
        ]
        data = TextComponent(max_bytes=5000).make_dataset(None)  # type: ignore[arg-type]
        assert len(data) == 39
        assert b"import" in bytes(data.text.tolist())
