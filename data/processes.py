"""Many processes that train together: torchrun's, one for each GPU; and signals to them."""

import os
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from data.script import drop_unread_output, handling


def join_processes(device: str) -> tuple[int, int, str]:
    """(rank, number of processes, device of this one): under torchrun those it started, else this
    process alone. `device` is cuda, mps or cpu."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    patience = timedelta(hours=2)  # others wait while one process reads data or writes a checkpoint
    store, rank, n_process = next(dist.rendezvous("env://"))
    store.set_timeout(patience)
    # torchrun's own store still has what processes wrote that have died since.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_process, timeout=patience)
    return rank, n_process, device


def is_first() -> bool:
    """Whether this is the first process of torchrun's, or the only one; also before they join."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str) -> None:
    """Print a warning of train.py, once for all processes."""
    if is_first():
        print(f"train.py: warning: {text}", file=sys.stderr)


def n_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(x: Tensor) -> Tensor:
    """x summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def whole(x: Tensor) -> Tensor:
    """x itself, or all of it if FSDP keeps it in parts: then all processes must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def synchronising(model: nn.Module, last: bool):
    """Context of a micro-batch. With DDP only the last one of an update sums gradients over the
    processes. FSDP sums each time: otherwise every device would need room for whole gradients."""
    waits = isinstance(model, DistributedDataParallel) and not last
    return model.no_sync() if waits else nullcontext()


def leave_processes() -> None:
    """The end of `join_processes`. With gloo it ends this process as well, with code 0."""
    if not dist.is_initialized():
        return
    backend = dist.get_backend()
    dist.destroy_process_group()
    if backend == "gloo":
        # DTensor's caches keep gloo's threads alive. If one of these lets go of a tensor while
        # Python (before 3.14) ends, the process aborts. So it must not end in Python's way:
        # https://github.com/pytorch/pytorch/issues/190489
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Signals(ExitStack):
    """A context in which SIGTERM, Ctrl-C and SIGHUP (a closed terminal) only set `came`, and print
    that the run stops.

    A second one ends the process at once. Within a second of the first it is an echo: a scheduler
    signals torchrun and its processes, and torchrun passes it on to these.
    """

    def __enter__(self):
        self.first = None
        self.enter_context(handling(self.receive, "SIGTERM", "SIGINT", "SIGHUP"))
        return super().__enter__()

    def receive(self, number: int, _) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            drop_unread_output()
            if is_first():
                # print would fail if the signal came during another print
                os.write(2, b"stopping: the run saves a checkpoint after this update. A second"
                            b" signal ends it at once, without one\n")
        elif now - self.first > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def came(self) -> bool:
        return self.first is not None
