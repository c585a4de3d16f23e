"""FLOPs of a step, counted once while one is computed, and what a device could do at most.

FLOP counts what torch calls: matrix products, convolutions and attention of forward and backward, a multiplication and an addition
being two. Recomputation for activation checkpointing is in it (it is work done); attention is counted whole, not halved for causality, as
llm.c and PaLM do. Model FLOPs utilisation is the FLOPs of a second over the device's dense peak in 16 bits, without sparsity.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Dense 16-bit matrix products in TFLOP/s without sparsity, as in the makers' data sheets; the first part found in a device's name counts.
PEAKS: dict[str, float] = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.0,
    "3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
    "MI250": 362.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """Of one device; None for a CPU and for what the table does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class StepCounter:
    """Counts the FLOPs of one step of this process, from its start to its end: what runs between two steps is no part of one, and may
    run on another thread.

    The mode sees each operation and changes none: not torch's own `FlopCounterMode`, which takes some of them apart, and the step would
    end with other last bits. A compiled model runs past it, so there is no count for one.
    """

    def __init__(self) -> None:
        self.flops: int | None = None
        self._mode: Any = None

    def begin(self) -> None:
        """A step begins; what there is of an earlier one, which was skipped, does not count."""
        self.cancel()
        self._mode = _counting_mode()
        self._mode.__enter__()

    def end(self) -> bool:
        """A step has ended. Returns whether it was counted."""
        if self._mode is None:
            return False
        self.flops = self._mode.flops or None
        self.cancel()
        return True

    def cancel(self) -> None:
        """Stop counting; something else than the step is computed, or the run ends."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None


def _counting_mode() -> Any:
    """A mode that adds up what torch's table says of each operation, in its `flops`."""

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.flops = 0
            self._table = {**flop_registry, **_on_cpus()}

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            """Torch asks when the class is made, and would import the compiler, half a second, to keep it from tracing what follows."""
            return "torch._dynamo" in sys.modules

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            count = self._table.get(func._overloadpacket)
            if count is not None:
                self.flops += int(count(*args, **(kwargs or {}), out_val=found))
            return found

    return Counting()


def _on_cpus() -> dict[Any, Any]:
    """The attention kernel of CPUs, which torch's own table leaves out."""
    aten: Any = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query.shape, key.shape, value.shape))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))

    names = {
        "_scaled_dot_product_flash_attention_for_cpu": forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": backward,
    }
    return {getattr(aten, name): count for name, count in names.items() if hasattr(aten, name)}
