"""Train a model: python train.py [config] [--field value ...]

`config` names one of kha.CONFIGS; every field of kha.Config and of TrainConfig below is an option, --help lists them.
With no argument: `toy`, on the Python standard library's source, in about two minutes on two CPU cores. Under torchrun
the same script trains on many GPUs: torchrun --nproc_per_node 8 train.py gpt2 [--parallel fsdp].

What is random is a function of seed and step alone: the weights' start, and the sequences of each batch. So there is no
random state to save, the number of processes changes nothing but rounding, and a run that is resumed is the same run.
"""

import argparse
import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from data.hf import import_hf
from data.log import Log
from data.prepare import prepare
from data.script import parse_args, run_script
from data.tokens import load_meta, load_tokenizer, open_tokens, verify_tokens
from kha import (
    CONFIGS, Config, Transformer, count_params, flops_per_token, init_weights, memory_per_gpu,
)
from moe import BALANCE_RULES
from sample import can_capture, capture, pick_device, write_samples

DEFAULT_DATA = "data/stdlib"
MAX_SKIPPED = 10  # updates in a row with a loss or gradient that is not finite before a run gives up


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, in one line, for settings that cannot be."""

    data: str = DEFAULT_DATA  # folder made by data/prepare.py
    out: str = ""  # folder for checkpoints and log, out/CONFIG if not given
    seed: int = 1
    steps: int = 1000
    batch_tokens: int = 32768  # tokens per optimizer step
    micro_batch: int = 8  # sequences at a time in each process; the rest of the batch is accumulated
    lr: float = 7.5e-4  # peak, after 5% warm-up; a cosine takes it to 10%
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    balance: str = "rms"  # rule of loss-free balancing: rms or sign
    balance_rate: float = 1e-3
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 262144  # of the held-out data
    save_every: int = 250  # steps between checkpoints; the last two are kept
    import_hf: str = ""  # start from the Qwen3 model in this folder (transformers' format), not at random
    prompt: str = "def "  # of the sample at the end
    parallel: str = "ddp"  # under torchrun: ddp, a model in each process, or fsdp, its parts spread over them
    recompute: bool = False  # compute activations anew in the backward pass: less memory, a third more time
    device: str = "auto"
    compile: bool = True  # torch.compile the blocks and the head, on CUDA

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("seed", "weight_decay", "balance_rate")
            if field.type in (int, float) and not (0 < value < math.inf or value == 0 and may_be_zero):
                raise ValueError(f"{field.name} must be {'0 or more' if may_be_zero else 'positive'}, not {value}")
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 and beta2 must be under 1, not {self.beta1} and {self.beta2}")
        for name, choices in (("balance", BALANCE_RULES), ("parallel", ("ddp", "fsdp"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")


_explore = dict(lr=7.5e-4, batch_tokens=2**21, steps=47_684, micro_batch=4, eval_tokens=2**20)  # 100B tokens
RECIPES = {
    "toy": dict(lr=3e-3, batch_tokens=2048, micro_batch=8, steps=700, eval_every=350, eval_tokens=65536),
    "small": dict(lr=1e-3, batch_tokens=32768, micro_batch=32, steps=2000),
    "gpt2": dict(lr=6e-4, batch_tokens=2**19, micro_batch=32, steps=19_073),  # 10B tokens
    **{name: _explore for name in CONFIGS if name.startswith(("moe-", "dense-"))},
    "moe-1b-6.1b": dict(lr=4.78e-4, batch_tokens=2**22, micro_batch=1, steps=238_419, eval_tokens=2**20),  # 1T tokens
}

# Peak dense bfloat16 FLOP/s by the vendor's datasheet, the denominator of MFU; on other devices there is no MFU.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "NVIDIA A100": 312e12}


def of_gpu(table: dict[str, float], gpu: str) -> float | None:
    """The number of the first entry whose key is part of a GPU's name; None if there is none."""
    return next((number for key, number in table.items() if key in gpu), None)


def parse_config(argv: list[str]) -> tuple[Config, TrainConfig, dict | None]:
    """Command line to (model config, training config, checkpoint to go on from). Raises ValueError for what it does
    not know.

    With --resume the run in --out goes on as its newest checkpoint says: training settings given here replace the
    checkpoint's, the model's cannot change. Under torchrun --max-restarts it goes on without being told, if all settings
    are those of the checkpoint: then it is this very run, and torchrun has started it anew.
    """
    parser = argparse.ArgumentParser("train.py", description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", default="toy", choices=CONFIGS, help="default: toy")
    parser.add_argument("--resume", action="store_true", default=False, help="go on from the newest checkpoint in --out")
    for cls in (Config, TrainConfig):
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        for field in dataclasses.fields(cls):
            how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
            text = f"{comments.get(field.name, '')} (default: {field.default!r}, or the config's own)".replace("%", "%%")
            parser.add_argument(f"--{field.name}", help=text, **how)
    given = vars(parse_args(parser, argv))
    name, resume = given.pop("config"), given.pop("resume")
    model = {f.name: given.pop(f.name) for f in dataclasses.fields(Config) if f.name in given}
    base_model, base_train, checkpoint = CONFIGS[name], {"out": f"out/{name}", **RECIPES[name]}, None
    out = given.get("out", base_train["out"])
    if not out:
        raise ValueError("--out is empty: name a folder")
    saved = list_checkpoints(out)
    if "import_hf" in given and not saved:
        imported = import_hf(given["import_hf"], **model)
        base_model, checkpoint = dataclasses.asdict(imported.config), {"model": imported.state_dict(), "step": 0}
    if resume and not saved:
        raise ValueError(f"no checkpoint in {out}: leave --resume out to start a run")
    if saved:
        taken = ValueError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
        if not resume and not may_restart():
            raise taken
        checkpoint = read_newest(saved)
        try:
            saved_train = dataclasses.asdict(TrainConfig(**{**checkpoint["train"], "out": out}))
        except (LookupError, TypeError) as error:
            raise ValueError(f"the run in {out} is not of this version of train.py ({error}): sample from it only") from error
        saved_model = checkpoint["config"]
        if not resume:
            same_train = dataclasses.asdict(TrainConfig(**{**base_train, **given})) == saved_train
            same_model = "import_hf" in given or dataclasses.asdict(Config(**{**base_model, **model})) == saved_model
            if not (same_train and same_model):
                raise taken
        base_model, base_train = saved_model, saved_train
        for field, value in model.items():
            if base_model[field] != value:
                raise ValueError(f"--{field} {value} differs from the checkpoint's {base_model[field]}: leave it out")
    return Config(**{**base_model, **model}), TrainConfig(**{**base_train, **given}), checkpoint


def read_newest(paths: list[str]) -> dict:
    """The first checkpoint of paths, newest first, that is whole; says so if it is not the newest."""
    for path in paths[:-1]:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            print(f"train.py: warning: {error}: going on from the checkpoint before it", file=sys.stderr)
    return read_checkpoint(paths[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def may_restart() -> bool:
    """Whether torchrun (--max-restarts) starts processes in place of those that died. That it has done so it says only
    on the machine where one died."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def join_processes(device: str) -> tuple[int, int, str]:
    """(rank, number of processes, device of this one): under torchrun those it started, else this process alone."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    patience = timedelta(hours=2)  # others wait while one process reads all data, or writes a checkpoint
    store, rank, n_process = next(dist.rendezvous("env://"))
    store.set_timeout(patience)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, where it leaves what dead processes wrote
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_process, timeout=patience)
    return dist.get_rank(), dist.get_world_size(), device


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """x summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def build_model(config: Config, train: TrainConfig, device: str, n_process: int) -> tuple[Transformer, nn.Module]:
    """The model with its starting weights, made on the device part by part, and what to call for the loss: the model
    itself, or DDP around it. With FSDP a device holds at most one whole part at a time; the rest is its shard."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shard = n_process > 1 and train.parallel == "fsdp"
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    torch.set_float32_matmul_precision("high")  # the routers: TF32 holds bfloat16 inputs exactly, weights to 11 bits (FSDP: 8)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # its successor is not in older versions of torch
    torch.manual_seed(train.seed)
    with torch.device("meta"):
        model = Transformer(config, dtype, train.recompute)
    for part in (model.embed, *model.blocks, model.head):
        init_weights(part.to_empty(device=device), config.n_layer)
        if train.compile and device.startswith("cuda") and part is not model.embed:
            # One compiled block serves all: a minute less than the whole model.
            (part.cross_entropy if part is model.head else part).compile()
        if shard and part not in (model.embed, model.head):
            fully_shard(part, mp_policy=policy)
    if shard:
        return model, fully_shard(model, mp_policy=policy)
    if n_process > 1:
        torch._dynamo.config.optimize_ddp = False  # it would split blocks further, to no use, and compile them anew
        ids = [torch.device(device)] if device.startswith("cuda") else None
        return model, DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model, model


def synchronising(model: nn.Module, yes: bool):
    """Context of a micro-batch: with DDP only the last of an update sums gradients over processes. FSDP sums each time,
    for to wait would mean whole gradients on every device, which is the memory that it is there to save."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not yes else nullcontext()


def check_memory(config: Config, train: TrainConfig, device: str, n_process: int) -> None:
    """Raises ValueError, naming what would help, if training cannot fit the GPU."""
    has, n_shard = torch.cuda.get_device_properties(device).total_memory, n_process if train.parallel == "fsdp" else 1
    # Else gradients come as activations go, but not in DDP's buckets, which are there from the start.
    accumulates = train.batch_tokens > train.micro_batch * config.block_size * n_process or n_shard < n_process
    needs = lambda micro, shard, anew: memory_per_gpu(config, micro, shard, anew, accumulates)["total"]
    if (now := needs(train.micro_batch, n_shard, train.recompute)) <= has:
        return
    ways = {
        f"--micro_batch {train.micro_batch // 2 or 1}": needs(train.micro_batch // 2 or 1, n_shard, train.recompute),
        "--recompute": needs(train.micro_batch, n_shard, True),
        f"--parallel fsdp on {max(8, 2 * n_process)} GPUs": needs(train.micro_batch, max(8, 2 * n_process), train.recompute),
        "all of these": needs(train.micro_batch // 2 or 1, max(8, 2 * n_process), True),
    }
    advice = ", ".join(f"{way}: {need / 2**30:.0f}" for way, need in ways.items() if need < now)
    raise ValueError(f"this needs about {now / 2**30:.0f} GiB a GPU, which has {has / 2**30:.0f}; needed with {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the loop


def lr_at(step: int, train: TrainConfig) -> float:
    """Learning rate of update `step` (from 0): 5% linear warm-up to the peak, then a cosine to 10% of it."""
    warmup = max(1, train.steps // 20)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - warmup)
    return train.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def sequences(tokens: np.ndarray, starts: Iterable[int], length: int) -> torch.Tensor:
    """The length + 1 ids from each of `starts` on, one a row: (len(starts), length + 1)."""
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def draw_batch(
    tokens: np.ndarray, batch: int, length: int, seed: int, step: int, rank: int = 0, n_process: int = 1
) -> torch.Tensor:
    """This process's share of the sequences of one update: (batch / n_process, length + 1) ids from random places, which
    are a function of seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(len(tokens) - length, size=batch)[rank::n_process]
    return sequences(tokens, starts, length)


def mean_loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss, in nats, of predicting each token of rows (B, T + 1) but the first from those before it."""
    return model(rows[:, :-1], rows[:, 1:])


def on_device(rows: torch.Tensor, device: str) -> torch.Tensor:
    """Rows on the device; a CUDA GPU copies them while the CPU goes on."""
    return rows.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else rows.to(device)


def backward(model: nn.Module, rows: torch.Tensor, n_micro: int) -> torch.Tensor:
    """Add a micro-batch's share of the gradients; returns its share of the loss, a scalar."""
    loss = mean_loss(model, rows) / n_micro
    loss.backward()
    return loss.detach()


def graphed_backward(model: nn.Module, rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`backward` of an update of one micro-batch as a CUDA graph, for rows of this shape. Small models have too many
    small kernels for a CPU to launch one by one. The model must have run before, and have no gradients now."""
    rows = rows.clone()
    replay = capture(lambda: backward(model, rows, 1))
    gradients = [(p, p.grad) for p in model.parameters()]  # where the graph writes them

    def run(new: torch.Tensor) -> torch.Tensor:
        rows.copy_(new)
        loss = replay()
        for p, gradient in gradients:
            p.grad = gradient
        return loss

    return run


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: np.ndarray, length: int, train: TrainConfig, device: str, rank: int = 0, n_process: int = 1
) -> float:
    """Mean loss in nats per token on the first eval_tokens of held-out data, in sequences side by side."""
    n = max(1, min(train.eval_tokens, len(tokens) - 1) // length)
    parts = sequences(tokens, range(0, n * length, length), length).split(train.micro_batch)
    model.eval()
    total = torch.zeros((), device=device)
    for first in range(0, len(parts), n_process):  # in step with the others, for FSDP's sake
        i = min(first + rank, len(parts) - 1)
        total += mean_loss(model, on_device(parts[i], device)) * len(parts[i]) * (i == first + rank)
    model.train()
    return sum_over_processes(total).item() / n


def make_optimizer(model: Transformer, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)


def main(argv: list[str]) -> None:
    # Everything that bad input can break comes first.
    config, train, checkpoint = parse_config(argv)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        if train.data == DEFAULT_DATA and not os.path.exists(train.data):
            prepare([], train.data)
        verify_tokens(train.data)
    rank, n_process, device = join_processes(train.device)
    T = config.block_size
    unit = T * train.micro_batch * n_process
    if train.batch_tokens % unit:
        each, rest = divmod(train.batch_tokens, T * n_process)  # sequences of a process
        fits = 0 if rest else next(n for n in range(min(train.micro_batch, each), 0, -1) if each % n == 0)
        raise ValueError(
            f"batch_tokens must be a multiple of micro_batch * block_size * processes = {train.micro_batch} * {T}"
            f" * {n_process} = {unit}, not {train.batch_tokens}: add --batch_tokens {-(-train.batch_tokens // unit) * unit}"
            + f" or --micro_batch {fits}" * (fits > 0)
        )
    start = checkpoint["step"] if checkpoint else 0
    if start > train.steps:
        raise ValueError(f"the run in {train.out} has done {start} steps: give more than --steps {train.steps}")
    if sum_over_processes(torch.tensor(start, device=device)) != start * n_process:  # they wait here for the data, too
        raise ValueError(f"the processes found different checkpoints in {train.out}: name a folder that all machines share")
    meta, splits = load_meta(train.data), {split: open_tokens(train.data, split) for split in ("train", "val")}
    if meta["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"{train.data} has a vocabulary of {meta['vocab_size']} ({meta['tokenizer']}), more than the model's"
            f" {config.vocab_size}: add --vocab_size {-(-meta['vocab_size'] // 64) * 64}"
        )
    for split, tokens in splits.items():
        if len(tokens) <= T:
            raise ValueError(f"{train.data} ({split}) has {len(tokens)} tokens, fewer than one sequence of {T} + 1")
    data_hash = meta["train"]["sha256"]
    if checkpoint and checkpoint.get("data", data_hash) != data_hash:
        raise ValueError(f"{train.data} is not the data that the run in {train.out} was trained on: name that with --data")
    tokenizer = load_tokenizer(meta["tokenizer"])
    room = T - max(1, len(tokenizer.encode(train.prompt, disallowed_special=())))  # an empty prompt is read as one token
    if room < 1:
        raise ValueError(f"the prompt of the sample leaves no room in a context of {T}: give a shorter --prompt")
    if device.startswith("cuda"):
        check_memory(config, train, device, n_process)

    model, parallel = build_model(config, train, device, n_process)
    optimizer = make_optimizer(model, train)
    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if checkpoint:
        options = sharded.StateDictOptions(full_state_dict=True)
        sharded.set_model_state_dict(model, checkpoint["model"], options=options)
        if "optimizer" in checkpoint:
            own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            sharded.set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"], options=options)
            for group, settings in zip(optimizer.param_groups, own):  # of the checkpoint only the moments
                group.update(settings)
        checkpoint = None  # the file is mapped into memory, and would stay on the disk after its removal

    log = Log(train.out, start, writes=rank == 0)
    total, active = count_params(model)
    if rank == 0:
        print(f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active; {train.steps} steps of {train.batch_tokens}"
              f" tokens on {n_process} x {device.split(':')[0]}; writing {train.out}"
              + f", going on after step {start}" * (start > 0))
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    peak = of_gpu(PEAK_FLOPS, gpu)
    flops = flops_per_token(model, T)
    bytes_per_token = meta["val"]["bytes"] / meta["val"]["tokens"]

    stop = []  # when signals came: the first ends the run after its step, a second at once

    def on_signal(number, _):
        stop.append(time.monotonic())
        if stop[-1] - stop[0] > 1:  # sooner is the first again: a scheduler signals all, and torchrun its processes
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def draw(step: int) -> torch.Tensor:
        return draw_batch(splits["train"], train.batch_tokens // T, T, train.seed, step, rank, n_process)

    graph = None  # of updates that are one micro-batch on one GPU
    can_graph = n_process == 1 and train.batch_tokens == unit and can_capture(model)
    stopping = last = False
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    model.train()
    bar = tqdm(total=train.steps, initial=start, unit="step", dynamic_ncols=True, disable=None if rank == 0 else True)
    rows = draw(start) if start < train.steps else None
    for step in range(start, train.steps):
        clock = time.perf_counter()
        lr = lr_at(step, train)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micros = rows.split(train.micro_batch)
        state = torch.zeros(2, device=device)  # loss, and whether a signal came
        for i, micro in enumerate(micros):
            micro = on_device(micro, device)
            if can_graph and step == start + 1:
                graph = graphed_backward(model, micro)
            with synchronising(parallel, i == len(micros) - 1):
                state[0] += (graph(micro) if graph else backward(parallel, micro, len(micros))) / n_process
        state[1] = len(stop)
        sum_over_processes(state)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        if isinstance(grad_norm, dist.tensor.DTensor):
            grad_norm = grad_norm.full_tensor()
        # Whether to leave the update out is decided on the device: the CPU need not wait for it to go on.
        finite = state[0].isfinite() & grad_norm.isfinite()
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        # DDP's gradients stay in its buckets, or accumulation makes a second set.
        optimizer.zero_grad(set_to_none=not isinstance(parallel, DistributedDataParallel))
        numbers = [*state, grad_norm, finite]
        if moes := model.moes():
            loads = sum_over_processes(torch.stack([moe.load for moe in moes]))  # (layers, experts)
            numbers.append((loads.amax(-1) / loads.mean(-1)).max())
            for moe, load in zip(moes, loads):
                moe.load.copy_(load)
                moe.balance(train.balance_rate * finite, train.balance)
        if step + 1 < train.steps:
            rows = draw(step + 1)
        loss, stopping, grad_norm, finite, *worst_load = torch.stack(numbers).tolist()  # waits for the device
        record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        record |= {"worst_load": ratio for ratio in worst_load}
        log.count(loss, finite)
        record["tokens_per_s"] = train.batch_tokens / (time.perf_counter() - clock)
        if gpu:
            record["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30  # the peak so far, of this process
        if peak:
            record["mfu"] = record["tokens_per_s"] * flops / (peak * n_process)
        log.write(**record, spikes=log.spikes, skipped=log.skipped)
        bar.update()
        bar.set_postfix_str(" ".join(f"{key} {record[key]:.3g}" for key in ("loss", "tokens_per_s", "mfu") if key in record))
        if log.skipped_in_a_row == MAX_SKIPPED:
            way = (
                f"go on with --resume and a lower --lr from what is saved in {train.out}, after deleting the newest"
                f" checkpoint if it fails again"
            )
            raise ValueError(
                f"{MAX_SKIPPED} updates in a row, the last step {step + 1}, had a loss or gradient that is not finite: "
                + (way if list_checkpoints(train.out) else "start anew with a lower --lr")
            )

        done = step + 1
        last = done == train.steps
        if done % train.eval_every == 0 or last:
            val_loss = evaluate(parallel, splits["val"], T, train, device, rank, n_process)
            val_bpb = val_loss / math.log(2) / bytes_per_token
            log.write(step=done, val_loss=val_loss, val_bpb=val_bpb, knocks=model.knock_movement())
            if rank == 0:
                bar.write(f"step {done}: held-out loss {val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte")
        # Not while updates are skipped: if the weights are at fault, the checkpoints before must stay.
        if done % train.save_every == 0 and finite or last or stopping:
            clock = time.perf_counter()
            checkpoint = {
                "config": dataclasses.asdict(config), "train": dataclasses.asdict(train), "step": done,
                "tokenizer": meta["tokenizer"], "data": data_hash,
                "model": sharded.get_model_state_dict(model, options=whole),
            }
            if optimizer.state:  # asked for it before its first update, it would count one
                checkpoint["optimizer"] = sharded.get_optimizer_state_dict(model, optimizer, options=whole)
            if rank == 0:
                os.fsync(log.file.fileno())  # no checkpoint on the disk without the log up to it
                save_checkpoint(train.out, checkpoint)
                bar.write(f"step {done}: saved in {time.perf_counter() - clock:.1f} s")
            checkpoint = None
        if stopping and not last:
            break
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopping and not last:
        if rank == 0:
            print(f"stopped by a signal and saved after step {done} of {train.steps}: --resume goes on")
    else:
        torch.compiler.set_stance("force_eager")  # each new length would compile anew
        with nullcontext() if rank == 0 else redirect_stdout(None):
            write_samples(model.eval(), tokenizer, train.prompt, max_new_tokens=min(200, room))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
