"""Adapters through peft: adding them, saving nothing else, merging them. Importing this module imports peft."""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from typing import Any

import peft
import torch
from torch import nn

from drivetrain import ConfigError, ModelError, Problem
from drivetrain_qlora.layers import is_conv1d, linear_layers, norms_as_they_were

PATH = "training_mode.qlora"


def add_adapters(
    model: nn.Module, targets: list[str] | None, r: int, alpha: float, dropout: float, dora: bool, seed: int
) -> peft.PeftModel:
    """Freeze a model and put adapters beside its linear layers.

    Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685, eq. 3): W x + (alpha / r) B A x with B = 0 at first; DoRA, Liu et al. 2024
    (arXiv:2402.09353, eq. 5): the same direction update with a trained magnitude for each output.

    Args:
        targets: names or ends of names of the layers; None for all linear layers except the head.
        seed: fixes the adapters' first values.

    Raises:
        ConfigError: for a target that matches no layer.
        ModelError: when there is no linear layer to adapt.
    """
    names = chosen_layers(model, targets)
    config: Any = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        use_dora=dora,
        task_type=peft.TaskType.CAUSAL_LM if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    adapted = _with(model, config, seed)
    keep_frozen_out_of_state(adapted)
    return adapted


def chosen_layers(model: nn.Module, targets: list[str] | None) -> list[str]:
    """The full names of the layers to adapt."""
    if targets is None:
        if names := list(quantizable_names(model)):
            return names
        raise ModelError(
            f"qlora: {type(model).__name__} has no linear layer (nn.Linear) besides its head, so there is nothing to adapt. "
            "Use the mode full_finetune, or name layers in target_modules."
        )
    known = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    found, problems = [], []
    for index, target in enumerate(targets):
        hits = [name for name in known if name == target or name.endswith(f".{target}")]
        found += hits
        if not hits:
            ends = sorted({name.rpartition(".")[2] for name in known})
            near = get_close_matches(target, ends, n=3) or ends[:8]
            message = f"{target!r} names no linear layer of the model; there are {', '.join(near)}"
            problems.append(Problem(f"{PATH}.target_modules[{index}]", message))
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(found))


def quantizable_names(model: nn.Module) -> list[str]:
    """All linear layers but the head, before or after they were quantized."""
    quantized = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    return quantized or list(linear_layers(model))


def _with(model: Any, config: Any, seed: int) -> peft.PeftModel:
    """peft's model, whose first values follow from the seed and leave the global random state alone."""
    quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if quantized:
        model.is_loaded_in_4bit = True  # peft looks for quantized layers only in models that say so
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # which peft sets right by itself
        torch.manual_seed(seed)
        adapted: Any = peft.get_peft_model(model, config)
    return adapted  # type: ignore[no-any-return]


def keep_frozen_out_of_state(model: nn.Module) -> None:
    """From now on `state_dict` leaves the frozen parameters out, and `load_state_dict` does not ask for them.

    Checkpoints then hold the adapters and the buffers. The hooks are torch's own, so every strategy that goes through these two
    methods has it for nothing. The frozen parameters come from where the model was built.
    """
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}

    def is_frozen(name: str) -> bool:  # quantized ones have further entries below their name
        return name in frozen or any(name[:end] in frozen for end, c in enumerate(name) if c == ".")

    def leave_out(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and is_frozen(name[len(prefix) :])]:
            del state[name]

    def not_missing(_module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if not is_frozen(name)]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(not_missing)


def merged(model: peft.PeftModel, dtype: torch.dtype) -> nn.Module:
    """The base model with the adapters' effect in its weights; takes the adapted model apart.

    Quantized layers are unpacked first: the adapters were trained beside the quantized weights, so those are what they fit, and
    quantizing the sum again would lose what was learned. Merging is done in fp32.
    """
    config: Any = model.peft_config["default"]
    adapters = {name: value.detach().float() for name, value in peft.get_peft_model_state_dict(model).items()}
    base: Any = model.unload()
    norms_as_they_were(base)
    if any(type(module).__name__ == "Linear4bit" for module in base.modules()):
        from drivetrain_qlora.quantize import dequantize

        dequantize(base, torch.float32)
        del base.is_loaded_in_4bit
    again: Any = _with(base.float(), config, seed=0)
    result: Any = peft.set_peft_model_state_dict(again, adapters)
    if result.unexpected_keys:
        raise ModelError(f"qlora: the adapters do not fit the model: {result.unexpected_keys[:3]}")
    plain: nn.Module = again.merge_and_unload()
    return plain.to(dtype)
