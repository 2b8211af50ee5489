"""Speed and memory, ours and peers in one go: python tests/bench.py [group or row ...] prints a table a group. All groups but
"cpu" are for one GPU.

Each row is measured in a process of its own. Training: whole updates, forward, backward, clipping and optimizer, after some
to warm up; the median of three rounds, and their spread. Tokens are random, so a mixture's experts are as evenly loaded as
the router makes them. Decoding: greedy steps of one token after a prompt, models of random weights.

Peers, skipped where they are not: nanoGPT (a clone at $NANOGPT, by default ../nanoGPT) and transformers.
"""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
import torch.nn as nn

from kha import CONFIGS, Config, Transformer, count_params, flops_per_token
from sample import can_capture, compile_steps, generate, lighten
from train import PEAK_FLOPS, TrainConfig, backward, build_model, graphed_backward, make_optimizer, of_gpu

NANOGPT = os.environ.get("NANOGPT", os.path.join(os.path.dirname(ROOT), "nanoGPT"))
BANDWIDTH = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12}  # bytes/s, by the vendor's datasheet; of others, no bound
PROMPT, NEW = 128, 128  # tokens of a decoding row


class Row(NamedTuple):
    """What to measure: "train" or "decode", "ours" or a peer's; for training sequences in a micro-batch and micro-batches
    in an update, for decoding sequences side by side; the row that it is compared with, and the device."""

    task: str
    whose: str
    config: str
    changes: dict = {}
    batch: int = 32
    n_micro: int = 1
    peer: str = ""
    device: str = "cuda"


VOCAB = dict(vocab_size=50304)
NANO, CHAR, HF, HF32 = "nanoGPT, compiled", "nanoGPT, 4 layers of width 192", "transformers, bfloat16", "transformers, float32 weights"


def knock_rows(name: str, config: str, batch: int, n_micro: int, peer: str, **changes) -> dict[str, Row]:
    """Our config without knock, with a linear and with an MLP one on values."""
    kinds = {"no knock": "none", "linear on v": "linear", "mlp on v": "mlp"}
    return {f"{name}, {kind}": Row("train", "ours", config, {**changes, "knock_v": knock}, batch, n_micro, peer)
            for kind, knock in kinds.items()}


def moe(batch: int, n_micro: int, **changes) -> Row:
    return Row("train", "ours", "moe-0.4b-2.3b", {**VOCAB, **changes}, batch, n_micro)


def decode_rows(config: str, changes: dict) -> dict[str, Row]:
    rows = {}
    for batch in (1, 32):
        hf, ours = (f"{config}, {batch} at a time, {whose}" for whose in ("transformers", "ours"))
        rows[hf] = Row("decode", "transformers", config, changes, batch)
        rows[ours] = Row("decode", "ours", config, changes, batch, peer=hf)
    return rows


GROUPS: dict[str, dict[str, Row]] = {
    "gpt2": {NANO: Row("train", NANO, "gpt2"), **knock_rows("gpt2", "gpt2", 32, 1, NANO)},
    "small": knock_rows("small", "small", 32, 1, ""),
    "moe": {
        HF: Row("train", HF, "moe-0.4b-2.3b", VOCAB, 4, 4),
        HF32: Row("train", HF32, "moe-0.4b-2.3b", VOCAB, 4, 4, HF),
        **knock_rows("moe", "moe-0.4b-2.3b", 8, 2, HF, **VOCAB),
    },
    "memory": {
        "moe, an update of 4 x 4096": moe(4, 1), "moe, an update of 4 x 4096, recompute": moe(4, 1, recompute=True),
        "gpt2, an update of 8 x 1024": Row("train", "ours", "gpt2", {}, 8),
        "dense-0.6b, an update of 2 x 4096": Row("train", "ours", "dense-0.6b", {}, 2),
        "moe-0.4b-2.3b, an update of 1 x 4096": Row("train", "ours", "moe-0.4b-2.3b", {}, 1),
    },
    "decoding": {**decode_rows("dense-1.7b", {}), **decode_rows("moe-0.4b-2.3b", {})},
    "sequence": {f"moe, {32768 // t} x {t}": moe(32768 // t, 2, block_size=t) for t in (1024, 4096, 8192, 32768)},
    "batch": {f"moe, {b} x 4096": moe(b, 8 // b * 2) for b in (1, 2, 4)},
    "experts": {f"small, 4 of {e} experts": Row("train", "ours", "small", dict(n_expert=e)) for e in (8, 32, 128)},
    # On a CPU nanoGPT advises not to compile. Its character-level model in the size of ours: 1.78M parameters.
    "cpu": {CHAR: Row("train", CHAR, "toy", {}, 8, device="cpu"),
            "toy, no knock": Row("train", "ours", "toy", dict(knock_v="none"), 8, 1, CHAR, "cpu"),
            "toy, mlp on v": Row("train", "ours", "toy", {}, 8, 1, CHAR, "cpu")},
    "6.1b": {"moe-1b-6.1b, 1 x 4096": Row("train", "ours", "moe-1b-6.1b", dict(block_size=4096), 1, 8)},
}
ROWS = {name: row for rows in GROUPS.values() for name, row in rows.items()}


def hf_model(config: Config, dtype: torch.dtype) -> nn.Module:
    """transformers' Qwen3 or Qwen3-MoE in our config's shape."""
    import transformers

    shape = dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim, max_position_embeddings=config.block_size, tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    if config.n_expert:
        shape |= dict(moe_intermediate_size=config.d_ff, num_experts=config.n_expert, num_experts_per_tok=config.top_k,
                      norm_topk_prob=True, experts_implementation="grouped_mm")
    kind = "Qwen3Moe" if config.n_expert else "Qwen3"
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    torch.set_default_dtype(torch.float32)
    return model


def training(row: Row, config: Config, train: TrainConfig) -> tuple[nn.Module, torch.optim.Optimizer, Callable]:
    """Model, optimizer and the function that adds a micro-batch's gradients, ours or a peer's."""
    if row.whose == "ours":
        model, _ = build_model(config, train, row.device, 1)
        return model, make_optimizer(model, train), lambda rows: backward(model, rows, row.n_micro)
    if row.whose in (NANO, CHAR):
        sys.path.insert(0, NANOGPT)
        import model as nanogpt

        torch.set_float32_matmul_precision("high")
        shape = dict(vocab_size=65, n_layer=4, n_head=4, n_embd=192) if row.whose == CHAR else VOCAB
        with redirect_stdout(sys.stderr):
            model = nanogpt.GPT(nanogpt.GPTConfig(block_size=config.block_size, bias=False, **shape)).to(row.device)
            settings = train.weight_decay, train.lr, (train.beta1, train.beta2), row.device
            optimizer = model.configure_optimizers(*settings)
        compiled = torch.compile(model) if row.whose == NANO else model
        loss = lambda rows: compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1]
    else:
        model = hf_model(config, torch.bfloat16 if row.whose == HF else torch.float32).train()
        optimizer = make_optimizer(model, train)
        loss = lambda rows: model(input_ids=rows[:, :-1], labels=rows[:, :-1], use_cache=False).loss

    def add_gradients(rows: torch.Tensor) -> None:
        with torch.autocast(row.device, dtype=torch.bfloat16, enabled=row.whose in (NANO, HF32)):
            value = loss(rows)
        (value / row.n_micro).backward()

    return model, optimizer, add_gradients


def measure_training(row: Row) -> dict[str, float]:
    changes = dict(row.changes)
    train = TrainConfig(recompute=changes.pop("recompute", False))
    config = Config(**{**CONFIGS[row.config], **changes})
    model, optimizer, add_gradients = training(row, config, train)
    vocab_size = 65 if row.device == "cpu" else config.vocab_size
    tokens = torch.randint(vocab_size, (row.batch, config.block_size + 1), device=row.device)

    def update() -> None:
        for _ in range(row.n_micro):
            add_gradients(tokens)
        norm = nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for moe in model.moes() if row.whose == "ours" else ():
            moe.balance(train.balance_rate, train.balance)
        norm.item()

    def seconds(updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            update()  # waits for the device: the next one starts from nothing, as in training
        return (time.perf_counter() - start) / updates

    first = seconds(1)
    memory = torch.cuda.max_memory_allocated() / 2**30
    if row.whose == "ours" and row.n_micro == 1 and can_capture(model):
        add_gradients = graphed_backward(model, tokens)
    once = seconds(3)
    speeds = [row.batch * config.block_size * row.n_micro / seconds(max(3, int(2 / once))) for _ in range(3)]
    flops = flops_per_token(build_shape(config), config.block_size)
    return {"speed": statistics.median(speeds), "least": min(speeds), "most": max(speeds), "flops": flops, "first": first,
            "memory": max(memory, torch.cuda.max_memory_allocated() / 2**30)}


def build_shape(config: Config) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def measure_decoding(row: Row) -> dict[str, float]:
    config = Config(**{**CONFIGS[row.config], **row.changes})
    prompt = torch.randint(config.vocab_size, (PROMPT,)).tolist()
    if row.whose == "ours":
        model = lighten(build_model(config, TrainConfig(compile=False), "cuda", 1)[0].eval())
        model.compute_dtype = None
        compile_steps(model, row.batch)

        def run() -> float:
            for i, _ in enumerate(generate(model, prompt, row.batch, NEW, temperature=0)):
                if i == 4:  # the prompt is read, the graph is there
                    start = time.perf_counter()
            return (time.perf_counter() - start) / (NEW - 5)
    else:
        model = hf_model(config, torch.bfloat16).eval()
        ids = torch.tensor([prompt] * row.batch, device="cuda")

        def run() -> float:
            times = []
            for new in (1, NEW):
                start = time.perf_counter()
                model.generate(ids, min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            return (times[1] - times[0]) / (NEW - 1)

    run()  # warms up, and compiles
    step = min(run() for _ in range(2))
    # Bytes a step must read: weights, of the experts those that some token takes; and the past, half of NEW on average.
    total, active = count_params(build_shape(config))
    share = (1 - config.top_k / config.n_expert) ** row.batch if config.n_expert else 0  # of the experts idle
    idle = (total - active) / (1 - config.top_k / config.n_expert) * share if config.n_expert else 0
    past = row.batch * config.n_layer * 2 * config.n_kv_head * config.head_dim * (PROMPT + NEW // 2)
    return {"speed": row.batch / step, "step": step, "bytes": 2 * (total - idle + past)}


def measure_matmul() -> float:
    """FLOP/s of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / statistics.median(times)


def missing(row: Row) -> str | None:
    """Why a peer cannot be measured here."""
    if row.whose in (NANO, CHAR) and not os.path.exists(os.path.join(NANOGPT, "model.py")):
        return f"no clone of nanoGPT at {NANOGPT}"
    if row.whose.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def table_line(name: str, row: Row, r: dict[str, float], rate: float, speeds: dict[str, float]) -> str:
    ratio = f"{r['speed'] / speeds[row.peer]:.2f} x" if row.peer in speeds else ""
    if row.device == "cpu":
        return f"| {name} | {r['speed'] / 1e3:.2f} ({r['least'] / 1e3:.2f}-{r['most'] / 1e3:.2f}) | {ratio} |"
    gpu = torch.cuda.get_device_name()
    if row.task == "train":
        peak = of_gpu(PEAK_FLOPS, gpu) or math.nan
        mfu, of_rate = r["speed"] * r["flops"] / peak, r["speed"] * r["flops"] / rate
        return (f"| {name} | {r['speed'] / 1e3:.1f} ({r['least'] / 1e3:.1f}-{r['most'] / 1e3:.1f}) | {mfu:.1%} | {of_rate:.1%} |"
                f" {r['memory']:.1f} | {r['first']:.1f} | {ratio} |")
    bound = r["bytes"] / (of_gpu(BANDWIDTH, gpu) or math.nan)
    return f"| {name} | {r['speed']:.0f} | {r['step'] * 1e3:.2f} | {bound * 1e3:.2f} | {bound / r['step']:.0%} | {ratio} |"


def main(argv: list[str]) -> None:
    if argv[:1] == ["--row"]:
        row = ROWS[argv[1]]
        print(json.dumps(measure_training(row) if row.task == "train" else measure_decoding(row)))
        return
    groups = {name: rows for name, rows in GROUPS.items() if name in argv or not argv and name != "6.1b"}
    if unknown := set(argv) - set(GROUPS) - set(ROWS):
        sys.exit(f"bench.py: error: no group or row {', '.join(sorted(unknown))}: groups are {', '.join(GROUPS)}")
    if rows := {name: ROWS[name] for name in argv if name in ROWS}:
        groups["rows"] = rows
    rate = 0.0
    if any(row.device == "cuda" for rows in groups.values() for row in rows.values()):
        if not torch.cuda.is_available():
            sys.exit("bench.py: error: this measures a CUDA GPU, and there is none: only the group cpu can run here")
        rate = measure_matmul()
        torch.cuda.empty_cache()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matrix products at {rate / 1e12:.0f} TFLOP/s")
    for group, rows in groups.items():
        head = "row | ktokens/s (3 rounds) | MFU | of the matmul rate | memory, GiB | first update, s | against peer"
        if any(row.task == "decode" for row in rows.values()):
            head = "row | tokens/s | step, ms | bandwidth bound, ms | bound / step | against peer"
        if any(row.device == "cpu" for row in rows.values()):
            head = "row | ktokens/s (3 rounds) | against peer"
        print(f"\n{group}\n| {head} |\n|{' --- |' * len(head.split('|'))}")
        speeds = {}
        for name, row in rows.items():
            if reason := missing(row):
                print(f"| {name}: skipped, {reason} |", flush=True)
                continue
            done = subprocess.run([sys.executable, __file__, "--row", name], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"| {name}: failed, see above |", flush=True)
                continue
            result = json.loads(done.stdout.strip().split("\n")[-1])
            speeds[name] = result["speed"]
            print(table_line(name, row, result, rate, speeds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
