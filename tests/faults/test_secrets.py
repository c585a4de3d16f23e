"""No file of a run, and nothing that is printed, holds a secret: whatever wrote it, and however the secret was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drivetrain import ConfigError, TrainingConfig, load_training_config
from drivetrain.config import HIDDEN, without_secrets
from drivetrain_cli import main

PLUGIN = """
from typing import Any
import torch
from drivetrain import Callback, Component, component, option

@component
class Line(Component):
    kind = "model"
    def make_model(self, ctx):
        return torch.nn.Linear(4, 1)
    def make_loss(self, ctx):
        return torch.nn.functional.mse_loss

@component
class Points(Component):
    kind = "dataset"
    secret_key: str = option(default="", help="to the data's store")
    def make_dataset(self, ctx):
        return torch.utils.data.TensorDataset(torch.ones(16, 4), torch.ones(16, 1))
    make_eval_dataset = make_dataset

@component
class Remote(Callback):
    api_key: str = option(default="", help="a secret")
    token: str = option(default="", help="a secret, too")
    password: int | None = option(default=None, help="even a number")
    credentials: Any = option(default=None, help="a table of secrets")
    server: str = option(default="", help="an address that may name who logs in")
    note: str = option(default="", help="no secret")
    eos_token: str = option(default="", help="no secret")
    max_tokens: int = option(default=0, help="no secret")
"""
ENTRY_POINTS = """
[drivetrain.model]
line = secretive:Line
[drivetrain.dataset]
points = secretive:Points
[drivetrain.callback]
remote = secretive:Remote
"""
RUN = """
model = "line"
data = { use = "points", secret_key = "CANARY-one" }
device = "cpu"
max_duration = "4st"
per_device_batch_size = 4
log_interval = "1st"
eval_interval = "2st"

[[callbacks]]
use = "remote"
api_key = "CANARY-two"
password = 70317031
credentials = { user = "me", nested = ["CANARY-three"] }
server = "https://me:CANARY-four@example.org/path"
note = "plain-note"
eos_token = "<end>"
max_tokens = 4096

[[callbacks]]
use = "checkpoint"
every = "2st"

[[callbacks]]
use = "ledger"
"""
TOKEN = 'callbacks.remote.token="CANARY-five"'
AGAIN = [
    TOKEN,
    "callbacks.remote.api_key=CANARY-two",
    "callbacks.remote.password=70317031",
    'callbacks.remote.credentials={user="me"}',
    "callbacks.remote.server=https://example.org",
    "data.secret_key=CANARY-one",
]
SECRETS = (b"CANARY", b"70317031")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def drivetrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Said]:
    """Run the program in tmp_path, where a plugin of somebody else with secret options is installed."""
    metadata = tmp_path / "site" / "secretive-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: secretive\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "site" / "secretive.py").write_text(PLUGIN)
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Said:
        return Said(main(words), *capfd.readouterr())

    return run


def holding(folder: Path, text: bytes) -> set[str]:
    """The names of the files in which a text is."""
    return {path.name for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()}


def test_no_file_of_a_run_and_no_output_holds_one(tmp_path: Path, drivetrain: Any) -> None:
    done = drivetrain("train", "run.toml", TOKEN)
    assert done.code == 0, done.err
    runs = list((tmp_path / "runs").iterdir())
    # It is looked for where things are written: what is no secret is found in the files of each writer.
    names = holding(runs[0], b"plain-note")
    assert {"config.json", "state.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert holding(runs[0], b"4096") >= {"config.json", "state.json"} and holding(runs[0], b"example.org")
    for secret in SECRETS:
        assert not holding(tmp_path / "runs", secret)
        assert secret not in (done.out + done.err).encode()

    # The same command goes on with the same run, also with a new key; its own directory is not enough.
    for words in (("train", "run.toml", TOKEN), ("train", "run.toml", TOKEN.replace("five", "six"))):
        again = drivetrain(*words)
        assert again.code == 0 and "already complete" in again.out, again.err
    assert list((tmp_path / "runs").iterdir()) == runs
    refused = drivetrain("resume", str(runs[0]))
    assert refused.code == 2
    assert "callbacks.remote.api_key: is a secret, which is not kept with a run; give it again" in refused.err
    resumed = drivetrain("resume", str(runs[0]), *AGAIN)
    assert resumed.code == 0 and "already complete" in resumed.out, resumed.err
    for secret in SECRETS:
        assert not holding(tmp_path / "runs", secret)


def test_the_configuration_is_shown_and_saved_without_them(tmp_path: Path, drivetrain: Any) -> None:
    for action in ("show", "explain"):
        done = drivetrain("config", action, "run.toml", TOKEN)
        assert done.code == 0 and "plain-note" in done.out and "<end>" in done.out
        assert not any(secret in (done.out + done.err).encode() for secret in SECRETS)
    config = load_training_config(tmp_path / "run.toml", overrides=[TOKEN])
    for suffix in ("toml", "json", "yaml"):
        config.save(tmp_path / f"saved.{suffix}")
        saved = (tmp_path / f"saved.{suffix}").read_bytes()
        assert not any(secret in saved for secret in SECRETS) and b"plain-note" in saved
        with pytest.raises(ConfigError, match=r"give it again: data\.secret_key="):
            load_training_config(tmp_path / f"saved.{suffix}")
        again = load_training_config(tmp_path / f"saved.{suffix}", overrides=AGAIN)
        assert again.callbacks[0]["api_key"] == "CANARY-two" and again.callbacks[0]["note"] == "plain-note"


def test_the_object_itself_keeps_them() -> None:
    """Negative control: it is the files that lack them, not what the components are given."""
    config = TrainingConfig(callbacks=[{"use": "wandb", "api_key": "CANARY", "eos_token": "<end>"}])
    assert config.to_dict()["callbacks"][0]["api_key"] == "CANARY"
    hidden = {"use": "wandb", "api_key": "(not recorded)", "eos_token": "<end>"}
    assert config.to_dict(secrets=False)["callbacks"][0] == hidden


TELLING = {
    "api_key": "s3cr3t",
    "HF_TOKEN": "s3cr3t",
    "wandb": {"apikey": "s3cr3t"},
    "password": 12345_678,
    "clientSecret": "s3cr3t",
    "list": [{"access_token": "s3cr3t"}],
    "aws-secret-access-key": "s3cr3t",
    "passphrase": "s3cr3t",
    "auth": {"user": "s3cr3t"},
    "server": "https://me:s3cr3t@example.org/path",
    "credentials": ["s3cr3t"],
}
PLAIN = {
    "max_tokens": 4096,
    "num_key_value_heads": 8,
    "tokenizer": "bpe",
    "author": "me",
    "server": "https://example.org/a@b",
    "use_auth": True,
    "key": None,
    "values": [1, 2.5, "x"],
}


def test_secrets_are_masked() -> None:
    said = json.dumps(without_secrets(TELLING))
    assert "s3cr3t" not in said and "12345" not in said
    assert said.count(HIDDEN) == len(TELLING)
    assert without_secrets(TELLING)["server"] == f"https://{HIDDEN}@example.org/path"


def test_what_is_no_secret_stays() -> None:
    assert without_secrets(PLAIN) == PLAIN
