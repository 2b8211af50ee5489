"""Training speed and memory on one GPU: python tests/bench.py [row ...] prints a table, each row from a fresh process.

A row is a config, its changes and the micro-batches of an update. Whole updates are timed, forward, backward, clipping and
optimizer, after three to warm up: the median of three rounds, and their spread. The tokens are random, so a mixture's
experts are as evenly loaded as the router makes them.
"""

import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn as nn

import kha
from kha import CONFIGS, Config, flops_per_token
from train import PEAK_FLOPS, TrainConfig, build_model, make_optimizer

MOE, QKV = dict(vocab_size=50304), dict(knock_q="linear", knock_k="linear", knock_v="linear")
ROWS = {  # name: (config, changes, sequences in a micro-batch, micro-batches)
    "gpt2, no knock": ("gpt2", dict(knock_v="none"), 32, 1),
    "gpt2, linear on v": ("gpt2", dict(knock_v="linear"), 32, 1),
    "gpt2, linear on q, k, v": ("gpt2", QKV, 32, 1),
    "gpt2, linear on q, k, v, on activations": ("gpt2", QKV, 32, 1),
    "gpt2, mlp on v": ("gpt2", {}, 32, 1),
    "moe, no knock": ("moe-0.4b-2.3b", dict(MOE, knock_v="none"), 4, 4),
    "moe, linear on v": ("moe-0.4b-2.3b", dict(MOE, knock_v="linear"), 4, 4),
    "moe, linear on q, k, v": ("moe-0.4b-2.3b", dict(MOE, **QKV), 4, 4),
    "moe, linear on q, k, v, on activations": ("moe-0.4b-2.3b", dict(MOE, **QKV), 4, 4),
    "moe, mlp on v": ("moe-0.4b-2.3b", MOE, 4, 4),
    "small, mlp on v": ("small", {}, 32, 1),
}


def heads_on_activations(x: torch.Tensor, projection: nn.Linear, knock: kha.Knock) -> torch.Tensor:
    """kha.heads with eq. 5-7 as written, x_i T: what KnockLinear is compared with."""
    return projection(x).unflatten(-1, (-1, knock.head_dim)) @ knock.t.to(x.dtype)


def measure(row: str) -> dict[str, float]:
    """Tokens/s (median, least, most), MFU, peak memory in GiB and the seconds of the first update of a row of ROWS."""
    name, changes, micro_batch, n_micro = ROWS[row]
    if row.endswith("on activations"):
        kha.heads = heads_on_activations
    config, train = Config(**{**CONFIGS[name], **changes}), TrainConfig()
    model, _ = build_model(config, train, "cuda", 1)
    optimizer = make_optimizer(model, train)
    tokens = torch.randint(config.vocab_size, (micro_batch, config.block_size + 1), device="cuda")

    def update() -> None:
        for _ in range(n_micro):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for moe in model.moes():
            moe.balance(train.balance_rate, train.balance)

    def seconds(updates: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(updates):
            update()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / updates

    first = seconds(1)
    seconds(3)
    speeds = [micro_batch * config.block_size * n_micro / seconds(10) for _ in range(3)]
    median = statistics.median(speeds)
    peak = next(flops for gpu, flops in PEAK_FLOPS.items() if gpu in torch.cuda.get_device_name())
    return {
        "tokens_per_s": median, "least": min(speeds), "most": max(speeds), "first": first,
        "mfu": median * flops_per_token(model, config.block_size) / peak,
        "memory": torch.cuda.max_memory_allocated() / 2**30,
    }


def main(argv: list[str]) -> None:
    if argv[:1] == ["--row"]:
        print(json.dumps(measure(argv[1])))
        return
    if not torch.cuda.is_available():
        sys.exit("bench.py: error: this measures a CUDA GPU, and there is none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| row | ktokens/s (3 rounds) | MFU | memory, GiB | first update, s |\n| --- | --- | --- | --- | --- |")
    for row in argv or ROWS:
        done = subprocess.run([sys.executable, __file__, "--row", row], stdout=subprocess.PIPE, text=True, check=True)
        r = json.loads(done.stdout)
        spread = f"{r['least'] / 1e3:.1f}-{r['most'] / 1e3:.1f}"
        print(f"| {row} | {r['tokens_per_s'] / 1e3:.1f} ({spread}) | {r['mfu']:.1%} | {r['memory']:.1f} | {r['first']:.1f} |",
              flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
