"""The preset for pretraining."""

from __future__ import annotations

import warnings

import pytest

from drivetrain import Duration, TrainingMode, get_pretraining_config, parameters_of
from drivetrain_lm import pretraining
from drivetrain_lm.preset import batch_and_rate


def test_gives_a_configuration() -> None:
    config = get_pretraining_config("my-model-125M", seed=3)
    assert (config.model_name, config.training_mode, config.seed) == ("my-model-125M", TrainingMode.PRETRAINING, 3)
    assert config.optimizer == pretraining("my-model-125M")["optimizer"]
    assert (config.origin("optimizer"), config.origin("seed"), config.origin("device")) == (
        "preset pretraining",
        "python",
        "default",
    )


def test_tokens_batch_and_rate_follow_from_the_size() -> None:
    small, large = (get_pretraining_config(name) for name in ("llama-125M", "llama-7b"))
    assert (small.max_duration, large.max_duration) == (Duration(2.5e9, "tok"), Duration(140e9, "tok"))
    assert (small.optimizer["lr"], large.optimizer["lr"]) == (0.0016, 0.00059)
    assert (small.global_batch_size, large.global_batch_size) == (128, 2048)  # rows of 2048: 0.26 and 4.2 million tokens


def test_with_another_number_of_tokens_batch_and_rate_follow() -> None:
    """As DeepSeek LLM 7B was trained, on 2e12 tokens (arXiv:2401.02954, table 2): 9.4 million tokens at 4.2e-4."""
    given = get_pretraining_config("llama-7b", max_duration="2e12tok")
    assert given.max_duration == Duration(2e12, "tok")
    assert given.optimizer["lr"] == pytest.approx(4.2e-4, rel=0.03)
    assert given.global_batch_size == 4096  # rows of 2048: 8.4 million, the nearest power of two
    assert given.origin("max_duration") == "python"
    plain, steps = get_pretraining_config("llama-7b"), get_pretraining_config("llama-7b", max_duration="500st")
    assert steps.max_duration == Duration(500, "st")
    assert (steps.optimizer, steps.global_batch_size) == (plain.optimizer, plain.global_batch_size)
    assert plain.global_batch_size != given.global_batch_size


@pytest.mark.parametrize(
    ("parameters", "tokens", "batch", "rate"),
    [(7e9, 2e12, 2304 * 4096, 4.2e-4), (67e9, 2e12, 4608 * 4096, 3.2e-4)],
)
def test_the_fit_gives_what_its_authors_used(parameters: float, tokens: float, batch: float, rate: float) -> None:
    """DeepSeek LLM 7B and 67B (arXiv:2401.02954, table 2)."""
    found = batch_and_rate(6 * parameters * tokens)
    assert found[0] == pytest.approx(batch, rel=0.04)
    assert found[1] == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt2", 124e6),
        ("openai-community/gpt2-large", 774e6),
        ("SmolLM2-135M", 135e6),
        ("x/Qwen2.5-0.5B", 0.5e9),
        ("mistralai/Mixtral-8x7B-v0.1", 46.7e9),
        ("microsoft/phi-2", 2.7e9),
        ("own-8x3b", 24e9),
        ("nano", None),
    ],
)
def test_sizes_in_names(name: str, size: float | None) -> None:
    assert parameters_of(name) == size


def test_a_name_without_a_size_gets_generic_settings_and_is_told() -> None:
    with pytest.warns(UserWarning, match="does not say how many parameters"):
        generic = pretraining("my-model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generic["optimizer"] == pretraining("my-model-125M")["optimizer"]
