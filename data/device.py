"""Where a model runs: the device, copies to it, its clock, and CUDA graphs."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kha import Transformer, is_hopper


def pick_device(name: str) -> str:
    """The device to run on: `name`, or for "auto" the best there is. Raises ValueError if that
    device is not available."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    choices = [device for device in found if found[device]] + ["cpu"]  # the best one first
    if name == "auto":
        return choices[0]
    if name not in choices:
        hint = " (CUDA_VISIBLE_DEVICES says which GPU)" if "cuda" in choices else ""
        raise ValueError(f"device {name!r} is not available here: choose from"
                         f" {', '.join(choices)}{hint}")
    return name


def on_device(rows: Tensor, device: str) -> Tensor:
    """Rows on the device; a CUDA GPU copies them while the CPU goes on."""
    if device.startswith("cuda"):
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def start_compilers() -> None:
    """Start the processes that compile kernels for torch.compile. They take seconds to start. Torch
    itself starts them with the first compilation, and until they run it compiles alone."""
    from torch._inductor.async_compile import maybe_warm_pool  # slow to import

    maybe_warm_pool()


class Moment:
    """The moment at which a device has done all that it was given before this was made. On CUDA it
    is the GPU's own time, so it does not matter if the CPU is late. It often is, because a
    launch waits while about a thousand others are in the queue."""

    def __init__(self, device: str):
        self.event, self.time = None, time.perf_counter()
        if device.startswith("cuda"):
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def wait(self) -> None:
        """Return when the moment has come."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Seconds between two moments that have come."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.time - earlier.time


def copy_to_cpu(x: Tensor) -> Callable[[], tuple[list, Moment]]:
    """Copy x to the CPU. Returns a function that gives the list, and the moment at which the device
    had it. A CUDA GPU copies while the CPU goes on; the function waits for it."""
    copy = x.to("cpu", non_blocking=x.is_cuda, copy=True)
    moment = Moment(str(x.device))

    def wait() -> tuple[list, Moment]:
        moment.wait()
        return copy.tolist(), moment

    return wait


def can_capture(model: Transformer) -> bool:
    """Whether a CUDA graph can hold what the model does.

    It cannot in two cases: FSDP gathers weights on streams of its own, or F.grouped_mm asks the CPU
    how many rows each expert has. In bfloat16 on Hopper and Blackwell grouped_mm does not ask.
    """
    weight = model.embed.weight
    if not weight.is_cuda or hasattr(weight, "full_tensor"):
        return False
    dtype = model.compute_dtype or weight.dtype
    return not model.moes() or is_hopper() and dtype == torch.bfloat16


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The stream on which DDP is made, does its updates, and is captured as a graph. Backward adds
    gradients on the stream on which DDP was made, and a graph cannot hold work of the default one.
    Updates on another stream would have to keep all their gradients at once."""
    return torch.cuda.Stream()


@contextmanager
def on_side_stream() -> Iterator[None]:
    """In the with block, work goes to `side_stream`, between the work before and after."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(
    work: Callable[[], Any],
    generator: torch.Generator | None = None,
    stream: torch.cuda.Stream | None = None,
) -> Callable[[], Any]:
    """`work` as a CUDA graph: each call launches the same kernels on the same memory, all at once,
    and returns the same tensors. `work` must have run before. It may draw from `generator`. It is
    captured on `stream`; None: on one of torch's own."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        result = work()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def graphed(work: Callable[[Tensor], Any], n_process: int) -> Callable[[Tensor], Any]:
    """`work` on tensors of one shape, first called as it is and later as a CUDA graph. A CPU is too
    slow to launch the many small kernels of a small model one by one. With many processes the first
    eleven calls have no graph: DDP times the first ten, and reads the tenth time in the eleventh
    call."""
    n_before, stream = (1, None) if n_process == 1 else (11, side_stream())
    n_calls, place, replay = 0, None, None

    def run(x: Tensor) -> Any:
        nonlocal n_calls, place, replay
        n_calls += 1
        if n_calls <= n_before:
            with on_side_stream() if stream else nullcontext():
                return work(x)
        if replay is None:
            place = torch.empty_like(x)
            replay = capture(lambda: work(place), stream=stream)
        place.copy_(x)
        return replay()

    return run
