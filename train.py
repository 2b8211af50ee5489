"""Train a model: python train.py [config] [--option value ...]

`config` names one of kha.CONFIGS. Every field of kha.Config and of TrainConfig below is an option;
--help lists them. With no argument: `toy`, on the source of the Python standard library, in about
two minutes on two CPU cores. torchrun trains on many GPUs with the same script:
torchrun --nproc_per_node 8 train.py gpt2 --data FOLDER (made by data/prepare.py).

All that is random is a function of seed and step: the weights' start, and the sequences of each
batch. So there is no random state to save, the number of processes changes nothing but rounding,
and a run that is resumed is the same run.

Read `update`. `main` is the loop around it, with resuming, signals and CUDA graphs.
"""

import dataclasses
import math
import os
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial

# Waiting threads must sleep soon, because a second job on the machine has no cores while they spin.
# torch reads these variables when it is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from data.checkpoint import Saver, best_so_far, list_to_resume, read_newest, restore, start_from
from data.checks import check_run
from data.device import (
    Moment,
    can_capture,
    copy_to_cpu,
    graphed,
    on_device,
    on_side_stream,
    pick_device,
    start_compilers,
)
from data.evaluation import bits_per_byte, evaluate
from data.figures import advice_on_memory, knock_movement
from data.log import Log, check_new
from data.loss import chunked_loss
from data.prepare import DEFAULT_DATA, find_data
from data.processes import (
    Signals,
    join_processes,
    leave_processes,
    n_processes,
    sum_over_processes,
    synchronising,
    warn,
    whole,
)
from data.script import add_fields, parse_args, run_script
from data.tokenizer_json import Tokenizer
from data.tokens import (
    draw_batch,
    load_tokenizer,
    open_tokens,
    tokenizer_for_checkpoint,
)
from kha import CONFIGS, Block, Config, Transformer, check_fields, init_weights
from moe import BALANCE_RULES
from sample import write_samples


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, in one line, for impossible settings."""

    data: str = DEFAULT_DATA  # folder made by data/prepare.py
    out: str = ""  # folder for checkpoints and log; out/CONFIG if not given
    init: str = ""  # start from these weights: another run's folder, a checkpoint or a Qwen3 folder
    seed: int = 1  # of the starting weights and of the batches
    steps: int = 1000  # optimizer steps of the whole run
    batch_tokens: int = 32768  # tokens per optimizer step, a multiple of block_size * processes
    micro_batch: int = 8  # at most so many sequences at a time in a process; a run may take fewer
    lr: float = 7.5e-4  # peak, after 5% warm-up; a cosine takes it to 10%
    weight_decay: float = 0.1  # of matrices, not of norms and knocks
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of all gradients together
    balance: str = "rms"  # rule of loss-free balancing: rms or sign
    balance_rate: float = 1e-3  # how far an update moves the experts' biases, root mean square
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 262144  # an evaluation reads so many held-out tokens, the first ones
    save_every: int = 250  # steps between checkpoints (two and the best stay); 0: only at a signal
    sample_tokens: int = 200  # length of the sample at the end; 0 for none
    prompt: str = "def "  # what the sample continues
    parallel: str = "ddp"  # under torchrun: ddp, a model in each process, or fsdp, parts of one
    recompute: bool = False  # compute activations again in the backward pass: less memory, slower
    device: str = "auto"  # auto, cuda, mps or cpu
    compile: bool = True  # torch.compile the blocks and the loss, on CUDA

    def __post_init__(self):
        choices = {"balance": BALANCE_RULES, "parallel": ("ddp", "fsdp")}
        may_be_zero = ("seed", "weight_decay", "balance_rate", "save_every", "sample_tokens")
        check_fields(self, choices, may_be_zero)
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 and beta2 must be under 1, not {self.beta1} and {self.beta2}")


# The paper's settings for its exploratory mixtures, 100B tokens, and for the main model, 1T tokens.
# Those of the dense models are not known: these are our guess.
_explore = dict(lr=7.5e-4, batch_tokens=2**21, steps=47_684, micro_batch=4, eval_tokens=2**20)
_main = dict(lr=4.78e-4, batch_tokens=2**22, steps=238_419, micro_batch=1, eval_tokens=2**20)
RECIPES = {
    "toy": dict(lr=3e-3, batch_tokens=2048, micro_batch=8, steps=700, eval_every=350,
                save_every=350, eval_tokens=65536),
    "small": dict(lr=1e-3, batch_tokens=32768, micro_batch=32, steps=2000),
    "gpt2": dict(lr=6e-4, batch_tokens=2**19, micro_batch=32, steps=19_073),  # 10B tokens
    **{name: _explore for name in CONFIGS if name.startswith(("moe-", "dense-"))},
    "moe-1b-6.1b": _main,
}


# --------------------------------------------------------------------------------------------------
# One update


def update(
    model: Transformer,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    micros: Tensor,
) -> Tensor:
    """One optimizer step on micro-batches (n_micro, B, T + 1) of token ids.

    `wrapped` is what to call for the loss: the model itself, or DDP around it. Returns a tensor
    (4,), which the device may not have computed yet: loss, grad_norm, worst_load and finite: 1, or
    0 if loss or gradients are not finite. With 0 the weights stay as they were.
    """
    loss = torch.zeros((), device=micros.device)
    for i, rows in enumerate(micros):
        with synchronising(wrapped, i == len(micros) - 1):
            share = wrapped(rows[:, :-1], rows[:, 1:]) / len(micros)
            share.backward()
        loss += share.detach()
    loss = sum_over_processes(loss) / n_processes()
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip))
    finite = loss.isfinite() & grad_norm.isfinite()
    optimizer.found_inf = (~finite).float()  # fused AdamW skips its step if this is 1
    optimizer.step()
    # DDP's gradients stay in its buckets. With None, backward would make others beside them.
    optimizer.zero_grad(set_to_none=not isinstance(wrapped, DistributedDataParallel))
    worst_load = balance_experts(model, train.balance_rate * finite, train.balance)
    return torch.stack((loss, grad_norm, worst_load, finite))


def balance_experts(model: Transformer, rate: Tensor, rule: str) -> Tensor:
    """Move the bias of every mixture against its load in this update, of all processes. Returns
    the worst load, a scalar: the busiest expert's over the mean, in the worst layer; 0 if dense."""
    moes = model.moes()
    if not moes:
        return torch.zeros_like(rate)
    loads = sum_over_processes(torch.stack([moe.load for moe in moes]))  # (n_layer, E)
    for moe, load in zip(moes, loads, strict=True):
        moe.load.copy_(load)
        moe.balance(rate, rule)
    return (loads.amax(-1) / loads.mean(-1)).max()


def lr_at(step: int, train: TrainConfig) -> float:
    """Learning rate of update `step` (from 0): 5% linear warm-up, then a cosine to a tenth."""
    warmup = max(1, train.steps // 20)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - warmup)
    return train.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Transformer, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay to 0, norms and knocks do not. The paper does not say whether its
    knocks do. In `small` the MLP on values learns better without (tests/results, `decay`). The
    learning rate is a tensor, so that a CUDA graph of the step reads what it is then."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        (no_decay if p.dim() < 2 or "knock." in name else decay).append(p)
    groups = [
        {"params": decay, "weight_decay": train.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    device = decay[0].device
    return torch.optim.AdamW(
        groups,
        lr=torch.tensor(train.lr, device=device),
        betas=(train.beta1, train.beta2),
        fused=True,
        capturable=device.type == "cuda",
    )


# --------------------------------------------------------------------------------------------------
# The model and its loss, made for training


def becomes_graph(model: Transformer, train: TrainConfig, n_process: int) -> bool:
    """Whether an update becomes a CUDA graph: it is a single micro-batch that a graph can hold."""
    tokens = model.config.block_size * train.micro_batch * n_process
    return train.batch_tokens == tokens and can_capture(model)


def build_model(
    config: Config, train: TrainConfig, device: str, n_process: int
) -> tuple[Transformer, nn.Module]:
    """The model with its starting weights, and what to call for the loss: the model itself, or DDP
    around it. It is made on the device part by part. With FSDP a device holds its share of each
    block, and while the model is made the embedding, the head and one block whole."""
    on_gpu = device.startswith("cuda")
    compiles, shard = train.compile and on_gpu, n_process > 1 and train.parallel == "fsdp"
    if compiles:
        start_compilers()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # The routers compute in float32. TF32 is faster, and rounds its inputs to 11 bits. That changes
    # their weights and gradients only, because activations are bfloat16, which has 8 bits. (With
    # FSDP these weights have 8 bits, too: its policy casts every parameter of a block.)
    torch.set_float32_matmul_precision("high")
    # broadcast_buffers is the old name: older versions of torch do not have the new one.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")
    torch.manual_seed(train.seed)
    generator = torch.Generator(device).manual_seed(train.seed + 10**6)  # for random knocks
    with torch.device("meta"):
        model = Transformer(config, dtype, train.recompute, chunked_loss(compiles))
    parts = [model.embed, *model.blocks, model.norm]
    if model.head is not None:
        parts.append(model.head)
    for part in parts:
        init_weights(part.to_empty(device=device), config, generator)
        if isinstance(part, Block) and compiles:
            part.compile()  # one compiled block serves all: a minute less than the whole model
        if isinstance(part, Block) and shard:
            fully_shard(part, mp_policy=policy)
    if shard:
        return model, fully_shard(model, mp_policy=policy)
    if n_process > 1:
        torch._dynamo.config.optimize_ddp = False  # it would split blocks and compile each again
        ids = [torch.device(device)] if on_gpu else None
        # Backward adds gradients on the stream of this call. A graph cannot hold the default one.
        with on_side_stream() if becomes_graph(model, train, n_process) else nullcontext():
            return model, DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    return model, model


# --------------------------------------------------------------------------------------------------
# The run


def parse_config(argv: list[str]) -> tuple[Config, TrainConfig, dict | None]:
    """Command line to (model config, training config, checkpoint to start from or None).

    With --resume the run in --out goes on from its newest checkpoint, if there is one (`go_on`).
    With --init the model's shape comes with the weights. Raises ValueError or OSError for what is
    impossible.
    """
    configs = {name: CONFIGS[name] | RECIPES[name] for name in CONFIGS}
    parser = add_fields("train.py", __doc__, configs, "toy", (Config, TrainConfig))
    parser.add_argument("--resume", action="store_true", default=False,
                        help="go on from the newest checkpoint in --out, if any; the command can"
                        " change its settings, not its model; a config then only gives an --out")
    options = vars(parse_args(parser, argv))
    name, resume = options.pop("config"), options.pop("resume")
    shape = {f.name: options.pop(f.name) for f in dataclasses.fields(Config) if f.name in options}
    settings = {"out": f"out/{name}", **RECIPES[name], **options}
    if resume and (saved := list_to_resume(settings["out"])):
        return go_on(read_newest(saved), settings["out"], shape, options)
    train = TrainConfig(**settings)
    if train.init:
        config, checkpoint = start_from(train.init, shape)
    else:
        config, checkpoint = Config(**{**CONFIGS[name], **shape}), None
    if not resume:
        check_new(train.out)
    elif os.path.exists(os.path.join(train.out, "log.jsonl")):
        warn(f"{train.out} has a log and no checkpoint, so the run starts again, with the settings"
             " of this command")
    return config, train, checkpoint


def go_on(
    checkpoint: dict, out: str, shape: dict, options: dict
) -> tuple[Config, TrainConfig, dict]:
    """What `parse_config` returns for a run that goes on from a checkpoint in `out`. The training
    settings in `options` replace the checkpoint's; the model's cannot change. Raises ValueError for
    another `shape` or init, or for a run of another version."""
    try:
        before = TrainConfig(**{**checkpoint["train"], "out": out})
    except TypeError as error:
        raise ValueError(f"the run in {out} is not of this version of train.py ({error}): sample"
                         " from it only") from error
    config, train = Config(**checkpoint["config"]), dataclasses.replace(before, **options)
    fixed = {**asdict(config), "init": before.init}
    for field, value in {**shape, "init": train.init}.items():
        if fixed[field] != value:
            raise ValueError(f"--{field} {value} differs from the run in {out} ({fixed[field]!r}):"
                             " leave it out to go on with that run, or name another with --out")
    warn_of_a_jump(before, train, checkpoint["step"])
    return config, train, checkpoint


def warn_of_a_jump(before: TrainConfig, after: TrainConfig, step: int) -> None:
    """Say so if resumed settings move the learning rate by more than a tenth."""
    old, new = lr_at(min(step, before.steps - 1), before), lr_at(step, after)
    if step < after.steps and abs(new - old) > 0.1 * old:
        warn(f"the learning rate goes from {old:.3g} to {new:.3g} at step {step + 1}, because its"
             " schedule is another one now")


def show_sample(model: Transformer, tokenizer: Tokenizer, train: TrainConfig, rank: int) -> None:
    """Print what the model makes of `prompt`. All processes take part, because with FSDP each has a
    part of the weights."""
    torch.compiler.set_stance("force_eager")  # each length would be compiled for itself
    with nullcontext() if rank == 0 else redirect_stdout(None):
        print("a sample:")
        write_samples(model.eval(), tokenizer, train.prompt, max_new_tokens=train.sample_tokens)


def copy_with_stop(numbers: Tensor, stops: bool) -> Callable[[], tuple[list[float], Moment]]:
    """`copy_to_cpu` of an update's numbers and one more: how many processes want to stop."""
    n_stopping = sum_over_processes(torch.full((1,), float(stops), device=numbers.device))
    return copy_to_cpu(torch.cat((numbers, n_stopping)))


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input, before --out is written."""
    config, given, checkpoint = parse_config(argv)
    device = pick_device(given.device)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        find_data(given.data)
    rank, n_process, device = join_processes(device)
    meta, train = check_run(config, given, checkpoint, device)
    start, T = checkpoint["step"] if checkpoint else 0, config.block_size
    tokens = open_tokens(train.data, "train")
    held_out = open_tokens(train.data, "val")[: train.eval_tokens + 1]
    best = best_so_far(checkpoint, train.eval_tokens, meta["val"]["tokens"])
    tokenizer = load_tokenizer(meta["tokenizer"])
    bpb = bits_per_byte(held_out, T, tokenizer)  # of a loss of one nat a token
    with advice_on_memory(config, train, n_process):
        model, wrapped = build_model(config, train, device, n_process)
        optimizer = make_optimizer(model, train)
        if checkpoint:
            restore(model, optimizer, checkpoint)
            checkpoint = None  # it maps its file, which would take space even if deleted
    log = Log(train.out, start, writes=rank == 0)
    settings = {"config": asdict(config), "train": asdict(train), "tokenizer": meta["tokenizer"],
                "data": meta["train"]["sha256"]}
    log.begin(model, settings, device, n_process, len(tokens))
    # Checkpoints keep the micro_batch as given, not the one that fits, and the whole tokenizer.
    settings |= {"train": asdict(given), "tokenizer": tokenizer_for_checkpoint(tokenizer)}

    def draw(step: int) -> Tensor:
        """This process's micro-batches of an update: (n_micro, micro_batch, T + 1)."""
        rows = draw_batch(tokens, train.batch_tokens // T, T, train.seed, step, rank, n_process)
        return on_device(rows.unflatten(0, (-1, train.micro_batch)), device)

    step_once = partial(update, model, wrapped, optimizer, train)
    waiting, n_stopping = deque(), 0
    reserves = rank == 0 and train.save_every and start < train.steps  # a checkpoint's memory, now
    saver = Saver(train.out, start, best, model if reserves else None)
    with Signals() as signals, advice_on_memory(config, train, n_process), saver:
        micros = draw(start)
        if becomes_graph(model, train, n_process):
            step_once = graphed(step_once, n_process)
        for step in range(start, train.steps):
            done, last, lr = step + 1, step + 1 == train.steps, lr_at(step, train)
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)
            new = step_once(micros)
            waiting.append((done, lr, copy_with_stop(new, signals.came or saver.failed)))
            micros = draw(done)  # while the device computes

            evaluates = last or done % train.eval_every == 0
            saves = train.save_every and (last or done % train.save_every == 0)
            ahead = 1 if device.startswith("cuda") else 0  # a GPU always has an update waiting
            while len(waiting) > (0 if evaluates or saves or n_stopping else ahead):
                its_step, its_lr, arrive = waiting.popleft()
                (*numbers, finite, n_stopping), moment = arrive()
                log.update(its_step, its_lr, moment, *numbers, finite=finite > 0)
            val_loss = None
            if evaluates:
                share = evaluate(wrapped, held_out, T, train.micro_batch, device, rank, n_process)
                val_loss = sum_over_processes(share).item()  # this waits, and signals may come
                n_stopping += sum_over_processes(torch.full_like(share, signals.came)).item()
                log.evaluation(done, val_loss, val_loss * bpb, knock_movement(model))
            # After a skipped update the weights may be at fault: then only the end of a run saves.
            if n_stopping or (saves and (finite or last)):
                state = saver.collect(model, optimizer)
                if rank == 0:
                    log.sync()  # no checkpoint on the disk without the log up to it
                    saver.save({**settings, "step": done, "val_loss": val_loss, **state})
            if evaluates or saves:
                log.restart_clock()
            if n_stopping:
                break
    log.close()
    if n_stopping and not last:
        log.say(f"stopped by a signal, saved after step {done} of {train.steps}: --resume goes on")
    elif start == train.steps:
        log.say(f"nothing to train: all {start} steps are done (give more --steps)")
    if train.sample_tokens and not n_stopping:
        show_sample(model, tokenizer, train, rank)
    del step_once  # NCCL would wait forever for a graph that holds its work
    leave_processes()


if __name__ == "__main__":
    run_script(main)
