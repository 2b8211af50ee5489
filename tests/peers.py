"""Other projects and other rules, as train.py runs ours: python tests/peers.py PEER [options]

A peer takes the options of train.py and leaves a log.jsonl like ours in --out: loss, tokens_per_s
and on CUDA memory_gib of each update. nanoGPT and transformers save no checkpoint: a signal ends
them at once, and with --resume they start again from nothing. All other peers are our own train.py,
so they save and resume as it does.

nanoGPT: its own train.py runs, unchanged, from a clone at $NANOGPT (by default beside this
project). It has what train.py has with these options: tokens, batch, number of updates, learning
rates (in the warm-up lower by one part in steps / 20 + 1), the settings of AdamW, clipping,
bfloat16 and torch.compile. It draws its batches from random places as ours does, but its seed is
fixed. Of the model it takes layers, heads, width, context and vocabulary; there are no biases and
no dropout. nanoGPT estimates its held-out loss from some random batches. Here it is measured as
ours is, by `evaluate`: the model that nanoGPT has trained, in the precision in which it was
trained, on the first eval_tokens of the held-out tokens. This is the last line of the log.

transformers: its Qwen3 or Qwen3-MoE in our config's shape, not compiled. There is no script to run,
so it is a loop in this file, on random tokens that are on the GPU already. Weights, gradients and
moments are bfloat16; those of transformers-float32 are float32, and its products bfloat16 as ours
are.

decay, to-start, slow: our own train.py with another rule for the knocks. In train.py they do not
decay. With decay they decay to zero, as all other matrices do. With to-start they decay to where
they started: T, W^up and W^down to the identity, W^gate to zero. With slow they decay to zero, but
their learning rate is a tenth, and so is their decay.

unshared, unshared-no-decay: each head has a knock of its own, which decays as in decay, or does
not, as in train.py. So the heads do not interact, and this is no longer KHA: it is the control that
shows, beside decay or train.py, what the sharing does. The seed gives the same start and batches as
in train.py, unless knocks start at random.
"""

import importlib.util
import io
import os
import pickle
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

if __name__ == "__main__":  # Python looks for modules in this file's folder, not in the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

import kha
import train as ours
from data.checks import check_run
from data.device import pick_device
from data.evaluation import bits_per_byte, evaluate
from data.figures import PEAK_FLOPS, flops_per_token, knocks_of, of_gpu
from data.log import Log
from data.script import run_script
from data.tokens import load_tokenizer, open_tokens
from kha import Config, Heads, Knock, Transformer
from train import TrainConfig, make_optimizer, parse_config

ROOT = Path(__file__).resolve().parent.parent
CLONE = Path(os.environ.get("NANOGPT", ROOT.parent / "nanoGPT")).resolve()
RULES = ("decay", "to-start", "slow")
UNSHARED = ("unshared", "unshared-no-decay")
RULED = (*RULES, *UNSHARED)  # our own train.py, with RuledConfig
PEERS = ("nanoGPT", "transformers", "transformers-float32", *RULED)


def split_command(command: str) -> tuple[str, list[str]]:
    """The peer that a command starts with, "" if it is one of train.py, and the options."""
    words = command.split()
    return (words[0], words[1:]) if words[0] in PEERS else ("", words)


def missing(peer: str) -> str:
    """Why a peer cannot run here, in one line; "" if it can."""
    if peer.startswith("transformers") and not importlib.util.find_spec("transformers"):
        return "transformers is not installed: pip install transformers"
    for name in ("train.py", "model.py", "configurator.py"):
        if peer == "nanoGPT" and not (CLONE / name).is_file():
            return (
                f"no clone of nanoGPT at {CLONE} ({name} is missing): git clone"
                " https://github.com/karpathy/nanoGPT, and set NANOGPT to its folder"
            )
    return ""


def log_update(log: Log, device: str, **update: float) -> None:
    """Write an update as train.py does; none is skipped here."""
    if device == "cuda":
        update["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    log.count(update["loss"], finite=True)
    log.write(**update, spikes=log.spikes, skipped=log.skipped)


# ---- nanoGPT


def nanogpt_options(config: Config, train: TrainConfig, folder: str, device: str) -> list[str]:
    """The command line of nanoGPT's train.py. `folder` holds the tokens."""
    on_gpu = device == "cuda"
    settings = dict(
        dataset=folder, out_dir=folder,  # it comes to no evaluation at which it saves
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        block_size=config.block_size, dropout=0.0, bias=False,
        batch_size=train.micro_batch,
        gradient_accumulation_steps=train.batch_tokens // (train.micro_batch * config.block_size),
        max_iters=train.steps - 1,  # it does one more
        learning_rate=train.lr, min_lr=train.lr / 10,
        warmup_iters=max(1, train.steps // 20), lr_decay_iters=train.steps,
        weight_decay=train.weight_decay, beta1=train.beta1, beta2=train.beta2,
        grad_clip=train.grad_clip,
        eval_interval=train.steps, eval_iters=1,  # before the first update it always evaluates
        device=device, dtype="bfloat16" if on_gpu else "float32",
        compile=train.compile and on_gpu,  # its README advises not to on a CPU
    )
    return [f"--{name}={value}" for name, value in settings.items()]


class Lines(io.TextIOBase):
    """An output from which `take` gets each line, too."""

    def __init__(self, output: io.TextIOBase, take: Callable[[str], None]):
        self.output, self.take, self.rest = output, take, ""

    def write(self, text: str) -> int:
        self.output.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.take(line)
        return len(text)


class Loss(nn.Module):
    """nanoGPT's model, called as ours is: tokens and targets (B, T) to the loss, a scalar."""

    def __init__(self, gpt: nn.Module):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.gpt(tokens, targets.contiguous())[1]


def run_nanogpt(config: Config, train: TrainConfig, device: str) -> None:
    """Run its train.py, and measure the held-out loss of what it has trained. Raises ValueError for
    what check_run refuses, and for token ids of more than 16 bits."""
    meta, train = check_run(config, train, None, device)
    if meta["dtype"] != "uint16":
        raise ValueError(f"{train.data} has ids of {meta['dtype']}, and nanoGPT reads uint16 only:"
                         " prepare the text with --tokenizer gpt2")
    held_out = open_tokens(train.data, "val")[: train.eval_tokens + 1]
    log = Log(train.out, 0)

    def take(line: str) -> None:
        match = re.match(r"iter (\d+): loss (\S+), time (\S+)ms", line)
        if match:
            speed = train.batch_tokens / (float(match[3]) / 1000)
            step, loss = int(match[1]) + 1, float(match[2])
            log_update(log, device, step=step, loss=loss, tokens_per_s=speed)

    with tempfile.TemporaryDirectory(dir=os.path.abspath(train.out)) as folder:
        for name in ("train.bin", "val.bin"):
            os.symlink(Path(train.data, name).resolve(), Path(folder, name))
        Path(folder, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": config.vocab_size}))
        sys.argv = ["train.py", *nanogpt_options(config, train, folder, device)]
        sys.path.insert(0, str(CLONE))  # as Python does for a script there
        with chdir(CLONE), redirect_stdout(Lines(sys.stdout, take)):
            trained = runpy.run_path("train.py", run_name="__main__")
    model = Loss(getattr(trained["raw_model"], "_orig_mod", trained["raw_model"]))  # not compiled
    with trained["ctx"]:
        loss = evaluate(model, held_out, config.block_size, train.micro_batch, device).item()
    tokenizer = load_tokenizer(meta["tokenizer"])
    bpb = loss * bits_per_byte(held_out, config.block_size, tokenizer)
    log.write(step=train.steps, val_loss=loss, val_bpb=bpb, knocks={})
    print(f"step {train.steps}: held-out loss {loss:.4f} nats per token, {bpb:.4f} bits per byte")


# ---- transformers


def build_transformers(config: Config, dtype: torch.dtype, device: str) -> nn.Module:
    """transformers' Qwen3 or Qwen3-MoE in our config's shape."""
    import transformers

    shape = dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, tie_word_embeddings=True,
        max_position_embeddings=config.block_size, attn_implementation="sdpa",
    )
    name = "Qwen3"
    if config.n_expert:
        name = "Qwen3Moe"
        shape |= dict(
            moe_intermediate_size=config.d_ff, num_experts=config.n_expert,
            num_experts_per_tok=config.top_k, norm_topk_prob=True,
            experts_implementation="grouped_mm",
        )
    torch.set_default_dtype(dtype)
    with torch.device(device):
        settings = getattr(transformers, f"{name}Config")(**shape)
        model = getattr(transformers, f"{name}ForCausalLM")(settings)
    torch.set_default_dtype(torch.float32)
    return model


def run_transformers(config: Config, train: TrainConfig, device: str, dtype: torch.dtype) -> None:
    """Train it on random tokens, the same in each update. Raises ValueError if micro_batch does not
    divide the sequences of an update."""
    model = build_transformers(config, dtype, device).train()
    optimizer = make_optimizer(model, train)
    tokens = torch.randint(config.vocab_size, (train.micro_batch, config.block_size), device=device)
    n_micro, rest = divmod(train.batch_tokens, tokens.numel())
    if rest:
        raise ValueError(f"batch_tokens must be a multiple of micro_batch * block_size ="
                         f" {tokens.numel()}, not {train.batch_tokens}: lower --micro_batch")
    casts = torch.autocast(device, torch.bfloat16) if dtype == torch.float32 else nullcontext()
    with torch.device("meta"):
        flops = flops_per_token(Transformer(config), config.block_size)
    peak = of_gpu(PEAK_FLOPS, torch.cuda.get_device_name()) if device == "cuda" else None
    log, start = Log(train.out, 0), time.perf_counter()
    for step in range(train.steps):
        total = torch.zeros((), device=device)
        for _ in range(n_micro):
            with casts:
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / n_micro
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total, now = total.item(), time.perf_counter()  # item() waits for the device
        speed, start = train.batch_tokens / (now - start), now
        mfu = {"mfu": speed * flops / peak} if peak else {}
        log_update(log, device, step=step + 1, loss=total, tokens_per_s=speed, **mfu)


# ---- our own train.py with other knocks, or another rule for them


@dataclass(frozen=True)
class RuledConfig(TrainConfig):
    """train.py's settings and the rule, so that log and checkpoints have it. Without this peer
    train.py refuses to go on from such a checkpoint: it knows no setting of that name. Raises
    ValueError for a run with another rule."""

    peer: ClassVar[str]  # the rule of this process
    rule: str = "that of train.py"  # for the knocks

    def __post_init__(self):
        super().__post_init__()
        if self.rule != self.peer:
            raise ValueError(
                f"the run in {self.out} has the rule {self.rule!r}, not {self.peer!r}: choose"
                " another --out"
            )


def make_optimizer_with(
    rule: str, model: Transformer, train: TrainConfig
) -> torch.optim.Optimizer:
    """What train.make_optimizer makes, but knocks follow `rule`: one of RULES, or unshared, which
    decays as in decay. The docstring of this file says what they do."""
    optimizer = make_optimizer(model, train)
    knocks = [p for knock in knocks_of(model).values() for p in knock.parameters()]
    ids = set(map(id, knocks))
    kept = optimizer.param_groups[1]  # what does not decay
    kept["params"] = [p for p in kept["params"] if id(p) not in ids]
    decay = 0.0 if rule == "to-start" else train.weight_decay
    lr = kept["lr"]  # a tensor, in which train.py writes the rate of each update
    optimizer.add_param_group({"params": knocks, "weight_decay": decay, "lr": lr.clone()})
    start = [p.detach().clone() for p in knocks]

    @torch.no_grad()
    def before_step(*_) -> None:
        if not hasattr(optimizer, "found_inf"):
            return  # no update: torch steps once to make room for the moments of a resumed run
        if rule == "slow":
            optimizer.param_groups[-1]["lr"].copy_(lr / 10)
        if rule == "to-start":
            pull = lr * train.weight_decay * (1 - optimizer.found_inf)  # 0 if this step is skipped
            for p, goal in zip(knocks, start, strict=True):
                p.add_((goal - p) * pull)

    optimizer.register_step_pre_hook(before_step)
    return optimizer


class UnsharedHeads(Heads):
    """Heads as ours, x (B, T, C) -> (B, T, H, D), but each head has a knock of its own. Raises
    ValueError for linear knocks, which are not in the forward pass: ours multiplies them into the
    weights."""

    def __init__(self, n_in: int, n_head: int, head_dim: int, kind: str = "none"):
        super().__init__(n_in, n_head, head_dim)
        if kind == "linear":
            raise ValueError("knocks of each head's own cannot be linear: use mlp or gate")
        n_knock = 0 if kind == "none" else n_head
        # The names end as ours do, so init_weights knows them.
        own = [nn.ModuleDict({"knock": Knock(kind, head_dim)}) for _ in range(n_knock)]
        self.own = nn.ModuleList(own)

    def forward(self, x: Tensor) -> Tensor:
        heads = super().forward(x)  # (B, T, H, D)
        if not self.own:
            return heads
        pairs = zip(self.own, heads.unbind(2), strict=True)
        return torch.stack([part["knock"](head) for part, head in pairs], dim=2)


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input."""
    peer, options = argv[0] if argv else "", argv[1:]
    if peer not in PEERS:
        raise ValueError(f"name a peer first, one of {', '.join(PEERS)}; then options of train.py")
    if reason := missing(peer):
        raise FileNotFoundError(reason)
    if peer in RULED:
        ours.TrainConfig, RuledConfig.peer = RuledConfig, peer
        if peer in UNSHARED:
            kha.Heads = UnsharedHeads
        if peer != "unshared-no-decay":
            ours.make_optimizer = partial(make_optimizer_with, peer)
        return ours.main([*options, "--rule", peer])
    config, train, _ = parse_config(options)
    device = pick_device(train.device)
    if peer == "nanoGPT":
        run_nanogpt(config, train, device)
    else:
        dtype = torch.float32 if peer == "transformers-float32" else torch.bfloat16
        run_transformers(config, train, device, dtype)


if __name__ == "__main__":
    run_script(main)
