"""Train a model: python train.py [config] [--field value ...]

`config` names one of kha.CONFIGS; every field of kha.Config and of TrainConfig below is an option, --help lists them.
With no argument: `toy`, on the Python standard library's source, in about two minutes on two CPU cores.

What is random is a function of seed and step alone: the weights' start, and the sequences of each batch.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data.prepare import load_meta, load_tokenizer, open_tokens, parse_args, prepare, run_script
from kha import CONFIGS, Config, Transformer, count_params, flops_per_token, load_checkpoint, save_checkpoint
from moe import BALANCE_RULES
from sample import pick_device, write_samples

DEFAULT_DATA = "data/stdlib"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, in one line, for settings that cannot be."""

    data: str = DEFAULT_DATA  # folder made by data/prepare.py
    out: str = ""  # folder for checkpoint and log; empty: out/<config>
    seed: int = 1
    steps: int = 1000
    batch_tokens: int = 32768  # tokens per optimizer step
    micro_batch: int = 8  # sequences at a time; the rest of the batch is accumulated
    lr: float = 7.5e-4  # peak, after 5% warm-up; a cosine takes it to 10%
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    balance: str = "rms"  # rule of loss-free balancing: rms or sign
    balance_rate: float = 1e-3
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 262144  # of the held-out data
    save_every: int = 250  # steps between checkpoints
    prompt: str = "def "  # of the sample at the end
    device: str = "auto"
    compile: bool = True  # torch.compile the blocks and the head, on CUDA

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("seed", "weight_decay", "balance_rate")
            if field.type in (int, float) and not (value > 0 or may_be_zero and value == 0):
                raise ValueError(f"{field.name} must be {'0 or more' if may_be_zero else 'positive'}, not {value}")
        if self.balance not in BALANCE_RULES:
            raise ValueError(f"balance must be one of {', '.join(BALANCE_RULES)}, not {self.balance!r}")


_explore = dict(lr=7.5e-4, batch_tokens=2**21, steps=47_684, micro_batch=4, eval_tokens=2**20)  # 100B tokens
RECIPES = {
    "toy": dict(lr=2e-3, batch_tokens=2048, micro_batch=8, steps=800, eval_every=200, eval_tokens=65536),
    "small": dict(lr=1e-3, batch_tokens=32768, micro_batch=32, steps=2000),
    "gpt2": dict(lr=6e-4, batch_tokens=2**19, micro_batch=32, steps=19_073),  # 10B tokens
    **{name: _explore for name in CONFIGS if name.startswith(("moe-", "dense-"))},
    "moe-1b-6.1b": dict(lr=4.78e-4, batch_tokens=2**22, micro_batch=1, steps=238_419, eval_tokens=2**20),  # 1T tokens
}

# Peak dense bfloat16 FLOP/s by the vendor's datasheet, the denominator of MFU; on other devices there is no MFU.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}


def parse_config(argv: list[str]) -> tuple[Config, TrainConfig, bool]:
    """Command line to (model config, training config, resume). Raises ValueError for what it does not know.

    With --resume, the run in --out goes on as its checkpoint says: training settings given here replace the
    checkpoint's, the model's cannot change.
    """
    parser = argparse.ArgumentParser("train.py", description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", default="toy", choices=CONFIGS, help="default: toy")
    parser.add_argument("--resume", action="store_true", default=False, help="go on from the checkpoint in --out")
    for cls in (Config, TrainConfig):
        for field in dataclasses.fields(cls):
            how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
            parser.add_argument(f"--{field.name}", help=f"default: {field.default!r}, or the config's own", **how)
    given = vars(parse_args(parser, argv))
    name, resume = given.pop("config"), given.pop("resume")
    model = {f.name: given.pop(f.name) for f in dataclasses.fields(Config) if f.name in given}
    base_model, base_train = CONFIGS[name], {"out": f"out/{name}", **RECIPES[name]}
    if resume:
        _, checkpoint = load_checkpoint(checkpoint_path(given.get("out", base_train["out"])))
        base_model, base_train = checkpoint["config"], checkpoint["train"]
        for field, value in model.items():
            if base_model[field] != value:
                raise ValueError(f"--{field} {value} differs from the checkpoint's {base_model[field]}: leave it out")
    return Config(**{**base_model, **model}), TrainConfig(**{**base_train, **given}), resume


def checkpoint_path(out: str) -> str:
    """Where a run keeps its checkpoint."""
    return os.path.join(out, "checkpoint.pt")


def lr_at(step: int, train: TrainConfig) -> float:
    """Learning rate of update `step` (from 0): 5% linear warm-up to the peak, then a cosine to 10% of it."""
    warmup = max(1, train.steps // 20)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - warmup)
    return train.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_batch(tokens: np.ndarray, batch: int, length: int, seed: int, step: int) -> torch.Tensor:
    """The sequences of one update: (batch, length + 1) ids at random places, a function of seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(len(tokens) - length, size=batch)
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def inputs_and_targets(rows: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, T + 1) on the device as tokens (B, T) and the token after each, (B, T)."""
    if device.startswith("cuda"):
        rows = rows.pin_memory().to(device, non_blocking=True)
    else:
        rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model: Transformer, tokens: np.ndarray, train: TrainConfig, device: str) -> float:
    """Mean loss in nats per token on the first eval_tokens of held-out data, in sequences side by side."""
    length = model.config.block_size
    n = max(1, min(train.eval_tokens, len(tokens) - 1) // length)
    rows = torch.from_numpy(np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(n)]).astype(np.int64))
    model.eval()
    losses = [model(*inputs_and_targets(part, device)) * len(part) for part in rows.split(train.micro_batch)]
    model.train()
    return torch.stack(losses).sum().item() / n


def make_optimizer(model: Transformer, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)


class Log:
    """The run's log.jsonl: one line per update and one per evaluation. Numbers stay on the device until `flush`, so
    that the GPU never waits for the log."""

    def __init__(self, path: str, keep_until: int):
        """Open the log; of an earlier run, keep the lines up to step `keep_until`."""
        lines = []
        if keep_until and os.path.exists(path):
            with open(path) as old:
                lines = [line for line in old if line.endswith("\n") and json.loads(line)["step"] <= keep_until]
        with open(f"{path}.tmp", "w") as new:
            new.writelines(lines)
        os.replace(f"{path}.tmp", path)
        self.file, self.pending = open(path, "a"), []

    def add(self, **record) -> None:
        self.pending.append(record)

    def flush(self, **common) -> dict:
        """Write what is pending, with `common` in every line; returns the last line."""
        plain = lambda x: x.item() if isinstance(x, torch.Tensor) else x
        lines = [{key: plain(value) for key, value in (record | common).items()} for record in self.pending]
        self.file.writelines(json.dumps(line) + "\n" for line in lines)
        self.file.flush()
        self.pending = []
        return lines[-1]


def main(argv: list[str]) -> None:
    # Everything that bad input can break comes first.
    config, train, resume = parse_config(argv)
    device = pick_device(train.device)
    T = config.block_size
    if train.batch_tokens % (T * train.micro_batch):
        raise ValueError(
            f"batch_tokens must be a multiple of micro_batch * block_size = {train.micro_batch} * {T}"
            f" = {T * train.micro_batch}, not {train.batch_tokens}"
        )
    path = checkpoint_path(train.out)
    if os.path.exists(path) and not resume:
        raise ValueError(f"{train.out} holds a run already: add --resume to go on with it, or choose another --out")
    if train.data == DEFAULT_DATA and not os.path.exists(train.data):
        prepare([], train.data)
    meta, splits = load_meta(train.data), {split: open_tokens(train.data, split) for split in ("train", "val")}
    if meta["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"{train.data} has a vocabulary of {meta['vocab_size']} ({meta['tokenizer']}), more than the model's"
            f" {config.vocab_size}: add --vocab_size {-(-meta['vocab_size'] // 64) * 64}"
        )
    for split, tokens in splits.items():
        if len(tokens) <= T:
            raise ValueError(f"{train.data} ({split}) has {len(tokens)} tokens, fewer than one sequence of {T} + 1")
    tokenizer = load_tokenizer(meta["tokenizer"])

    torch.manual_seed(train.seed)
    compute_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        model = Transformer(config, compute_dtype)
    optimizer = make_optimizer(model, train)
    start = 0
    if resume:
        loaded, checkpoint = load_checkpoint(path, device)
        model.load_state_dict(loaded.state_dict())
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        del loaded, checkpoint
    if train.compile and device.startswith("cuda"):
        for part in (*model.blocks, model.head):  # one compiled block serves all: a minute less than the whole model
            part.compile()

    os.makedirs(train.out, exist_ok=True)
    log = Log(os.path.join(train.out, "log.jsonl"), keep_until=start)
    total, active = count_params(model)
    print(f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active; {train.steps} steps of {train.batch_tokens} tokens"
          f" on {device}; writing {train.out}")
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    flops = flops_per_token(model, T)
    bytes_per_token = meta["val"]["bytes"] / meta["val"]["tokens"]

    model.train()
    bar = tqdm(total=train.steps, initial=start, unit="step", dynamic_ncols=True)
    clock, clock_step = time.perf_counter(), start
    for step in range(start, train.steps):
        lr = lr_at(step, train)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micros = draw_batch(splits["train"], train.batch_tokens // T, T, train.seed, step).split(train.micro_batch)
        loss = torch.zeros((), device=device)
        for rows in micros:
            part = model(*inputs_and_targets(rows, device)) / len(micros)
            part.backward()
            loss += part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        if moes := model.moes():
            record["worst_load"] = torch.stack([moe.load.max() / moe.load.mean() for moe in moes]).max()
            for moe in moes:
                moe.balance(train.balance_rate, train.balance)
        log.add(**record)
        bar.update()

        done = step + 1
        last = done == train.steps
        if done % 10 == 0 or last:
            loss = loss.item()  # waits for the device, so that the clock tells the truth
            speed = (done - clock_step) * train.batch_tokens / (time.perf_counter() - clock)
            mfu = {"mfu": speed * flops / peak} if peak else {}
            line = log.flush(tokens_per_s=speed, **mfu)
            bar.set_postfix_str(" ".join(f"{key} {line[key]:.3g}" for key in ("loss", "tokens_per_s", "mfu") if key in line))
            clock, clock_step = time.perf_counter(), done
        if done % train.eval_every == 0 or last:
            val_loss = evaluate(model, splits["val"], train, device)
            val_bpb = val_loss / math.log(2) / bytes_per_token
            log.add(step=done, val_loss=val_loss, val_bpb=val_bpb, knocks=model.knock_movement())
            log.flush()
            bar.write(f"step {done}: held-out loss {val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte")
        if done % train.save_every == 0 or last:
            save_checkpoint(path, {
                "config": dataclasses.asdict(config), "train": dataclasses.asdict(train), "step": done,
                "tokenizer": meta["tokenizer"], "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            })
        if done % train.eval_every == 0 or done % train.save_every == 0:
            clock = time.perf_counter()  # evaluating and saving is not training
    bar.close()
    write_samples(model.eval(), tokenizer, train.prompt, max_new_tokens=min(200, T - len(tokenizer.encode(train.prompt))))


if __name__ == "__main__":
    run_script(main)
