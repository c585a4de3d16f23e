"""Runs as they lie on a disk, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        name: str = "tidy-otter",
        metrics: Iterable[dict[str, Any]] | bytes = (),
        checkpoints: dict[int, dict[str, Any]] | None = None,
        **files: Any,
    ) -> Path:
        """A run's directory; `files` are JSON by name (`goodput={…}`), or lines of it when a list is given."""
        path = tmp_path / name
        path.mkdir(parents=True)
        if not isinstance(metrics, bytes):
            metrics = b"".join(json.dumps(row).encode() + b"\n" for row in metrics)
        if metrics:
            (path / "metrics.jsonl").write_bytes(metrics)
        for step, state in (checkpoints or {}).items():
            folder = path / "checkpoints" / f"step-{step:08}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"step": step, "files": {}}))
            (folder / "state.json").write_text(json.dumps(state))
        for key, content in files.items():
            if isinstance(content, list):
                (path / f"{key}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content))
            else:
                (path / f"{key}.json").write_text(json.dumps(content))
        return path

    return make
