"""Where a model runs: the device, copies to it, and CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kha import Transformer, is_hopper


def pick_device(name: str) -> str:
    """The device to run on: `name`, or for "auto" the best there is. Raises ValueError if that
    device is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if name == "auto":
        return next(device for device, found in available.items() if found)
    if not available.get(name, False):
        choices = ", ".join(device for device, found in available.items() if found)
        hint = " (CUDA_VISIBLE_DEVICES says which GPU)" if available["cuda"] else ""
        raise ValueError(f"device {name!r} is not available here: choose from {choices}{hint}")
    return name


def on_device(rows: Tensor, device: str) -> Tensor:
    """Rows on the device; a CUDA GPU copies them while the CPU goes on."""
    if device.startswith("cuda"):
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def can_capture(model: Transformer) -> bool:
    """Whether a CUDA graph can hold what the model does.

    It cannot if FSDP gathers weights on streams of its own, nor if F.grouped_mm asks the CPU how
    many rows each expert has. In bfloat16 on Hopper and Blackwell grouped_mm does not ask.
    """
    weight = model.embed.weight
    if not weight.is_cuda or hasattr(weight, "full_tensor"):
        return False
    dtype = model.compute_dtype or weight.dtype
    return not model.moes() or is_hopper() and dtype == torch.bfloat16


def capture(work: Callable[[], Any], generator: torch.Generator | None = None) -> Callable[[], Any]:
    """`work` as a CUDA graph: each call launches the same kernels on the same memory, all at once,
    and returns the same tensors. `work` must have run before. It may draw from `generator`."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
