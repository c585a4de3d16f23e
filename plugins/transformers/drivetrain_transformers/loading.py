"""Everything that transformers loads: configurations, weights, tokenizers. Importing this module imports transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from attrs import frozen
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from drivetrain import ConfigError, ModelError, Problem
from drivetrain_transformers.sources import SCHEME, locate

_CONFIG = "model.transformers.config"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@frozen
class Source:
    """What `from_pretrained` is to be called with."""

    name: str
    options: Mapping[str, Any]
    said: str  # as it was written, for messages


def source_of(path: str) -> Source:
    """A local directory, a GGUF file, or a name on the hub.

    Raises:
        ModelError: when the path leads nowhere and cannot be a name on the hub either.
    """
    found = locate(path)
    if found.is_dir():
        return Source(str(found), {}, path)
    if found.suffix == ".gguf" and found.is_file():
        return Source(str(found.parent), {"gguf_file": found.name}, path)
    if found.is_file():
        raise ModelError(f"transformers: {path} is a file, but no GGUF file. Give the directory that holds config.json.")
    if path.startswith(SCHEME) or not _HUB_NAME.fullmatch(path) or path.endswith(".gguf"):
        raise ModelError(f"transformers: nothing is at {path}. Give a local directory, a GGUF file, or a name on the hub.")
    return Source(path, {}, path)


def load_config(source: Source | None, changes: Mapping[str, Any], trust: bool) -> PreTrainedConfig:
    """The configuration of a model with `changes`, or one made of `changes` alone.

    Raises:
        ConfigError: for a change of what the configuration does not have.
        ModelError: when it cannot be loaded.
    """
    if source is None:
        config = _default_config(changes.get("model_type"))
        changes = {name: value for name, value in changes.items() if name != "model_type"}
    else:
        with _explained(source):
            config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust, **source.options)
    known = set(config.to_dict()) | set(config.attribute_map)  # transformers itself takes any key in silence
    problems = []
    for name in sorted(set(changes) - known):
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        problems.append(Problem(f"{_CONFIG}.{name}", f"is no key of a {config.model_type} model.{hint}"))
    if problems:
        raise ConfigError(problems)
    try:  # made anew, since values that follow from others are computed then
        return type(config).from_dict({**(config.to_dict() if source else {}), **changes})
    except Exception as error:  # each kind of configuration has errors of its own
        raise ConfigError([Problem(_CONFIG, f"transformers does not take it: {_first_line(error)}")]) from error


def _default_config(model_type: Any) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(model_type)
    except (ValueError, TypeError) as error:
        problem = f'must name an architecture, such as "llama": {_first_line(error)}'
        raise ConfigError([Problem(f"{_CONFIG}.model_type", problem)]) from error


def new_model(config: PreTrainedConfig, trust: bool, **options: Any) -> PreTrainedModel:
    """A causal language model with random weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)
    return model


def load_model(source: Source, config: PreTrainedConfig, trust: bool, **options: Any) -> PreTrainedModel:
    """A causal language model with its trained weights, from safetensors or GGUF files: pickled weights are not read.

    Raises:
        ModelError: when it cannot be loaded.
    """
    given = {**options, **source.options} if source.options else {**options, "use_safetensors": True}
    with _explained(source):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.name, config=config, trust_remote_code=trust, **given
        )
    if source.options:  # the weights are plain ones now; what is saved must not ask for the GGUF file again
        for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
            if hasattr(holder, name):
                delattr(holder, name)
        model.is_quantized = False  # type: ignore[assignment]
    return model


@lru_cache(maxsize=4)  # a GGUF file's takes seconds, and training and evaluation data ask for the same one
def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, from a directory, a GGUF file or the hub.

    Raises:
        ModelError: when it cannot be loaded.
    """
    source = source_of(path)
    with _explained(source):
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=False, **source.options)


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Load in silence, and say what went wrong in one line."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda items, **_: items, create=True):  # a bar of its own
            yield
    except ImportError as error:
        wanted = "drivetrain-transformers[gguf]" if source.options else "what it names"
        raise ModelError(f"transformers: {source.said} cannot be read: {_first_line(error)} (pip install {wanted})") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        where = "" if Path(source.name).exists() else " It is no local directory; names on the hub need a network."
        raise ModelError(f"transformers: {source.said} cannot be loaded: {_first_line(error)}{where}") from error
    finally:
        if shows:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(":")


DTYPES: Mapping[str, torch.dtype | str] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
