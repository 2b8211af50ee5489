"""Speed and memory, ours and of peers: python tests/bench.py [GROUP or ROW ...] prints tables.

Each group is a table, and each of its rows is measured in processes of its own. All groups but
"cpu" are for one GPU. tests/BENCHMARKS.md keeps what they said.

Training rows are runs of train.py as a user starts them, or of a peer (tests/peers.py says how they
compare). The numbers come from log.jsonl: the median of the updates in the second half of the run,
in brackets their quartiles; MFU; the peak of memory. "First update" is the time from the command
until the first update is in the log, with torch's caches empty. "Kernels alone" comes from a second
run: torch's profiler adds up the kernels of ten updates (on a CPU all operations), and the number
is the speed that there would be without gaps between them.

Decoding rows are greedy steps of one token, on models of random weights: "32 x 3900" is 32 samples
after a prompt of 3,900 tokens. Their bound is the time in which the GPU can read what a step needs
from its memory: the weights (only of experts that some token uses) and the cache of the past.

Peers that are not installed are left out: nanoGPT (a clone at $NANOGPT, or beside this
project) and transformers.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":  # Python looks for modules in this file's folder, not in the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import train as training
from data.device import pick_device
from data.figures import count_params, of_gpu
from data.prepare import DEFAULT_DATA, find_data
from data.script import new_parser, parse_args, run_script
from kha import Transformer
from sample import compile_steps, generate, lighten
from tests.peers import ROOT, build_transformers, missing, split_command
from tests.report import read_log

BANDWIDTH = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12}  # bytes/s, by the vendor's datasheet
NEW = 128  # tokens that a decoding row generates
PROFILED = 10  # updates of which the kernels are added up
TRAIN_HEAD = "row | ktokens/s | kernels alone | MFU | memory, GiB | first update, s | against"
DECODE_HEAD = "row | tokens/s | step, ms | bound, ms | bound / step | against"


class Row(NamedTuple):
    """What to measure: training, or with `samples` decoding."""

    command: str  # the options of train.py, after the name of a peer if it is one's
    against: str = ""  # the row to compare it with
    samples: int = 0  # texts side by side
    prompt: int = 128  # tokens of their prompt


def knock_rows(name: str, options: str, against: str = "") -> dict[str, Row]:
    """Ours without knocks, with a linear one on the values, and with an MLP on them."""
    kinds = {"no knock": "none", "linear on v": "linear", "mlp on v": "mlp"}
    return {f"{name}, {k}": Row(f"{options} --knock_v {v}", against) for k, v in kinds.items()}


def decoding_rows(config: str) -> dict[str, Row]:
    """One sample and 32, after a short and a long prompt, of transformers and of ours."""
    rows = {}
    for n, prompt in product((1, 32), (128, 3900)):
        ours, theirs = f"{config}, {n} x {prompt}", f"{config}, {n} x {prompt}, transformers"
        rows[theirs] = Row(f"transformers {config}", "", n, prompt)
        rows[ours] = Row(config, theirs, n, prompt)
    return rows


GPT2 = "gpt2 --batch_tokens 32768 --steps 160"
SMALL = "small --steps 200"
MOE = "moe-0.4b-2.3b --vocab_size 50304 --batch_tokens 65536 --micro_batch 8 --steps 24"
ONE_4 = f"{MOE} --batch_tokens 16384 --micro_batch 4"  # an update is one micro-batch
MAIN = "moe-1b-6.1b --block_size 4096 --batch_tokens 32768 --steps 24"
TOY = "toy --steps 60 --device cpu"
HF, CHAR = "transformers, bfloat16", "nanoGPT, 4 layers of width 192"  # CHAR is as large as toy
GROUPS = {
    "gpt2": {"nanoGPT": Row(f"nanoGPT {GPT2}"), **knock_rows("gpt2", GPT2, "nanoGPT")},
    "small": knock_rows("small", SMALL),
    "moe": {
        HF: Row(f"transformers {MOE} --micro_batch 4"),
        "transformers, float32": Row(f"transformers-float32 {MOE} --micro_batch 4", HF),
        **knock_rows("moe", MOE, HF),
    },
    "memory": {
        "moe, 4 x 4096": Row(ONE_4),
        "moe, 4 x 4096, recompute": Row(f"{ONE_4} --recompute"),
        "gpt2, 8 x 1024": Row(f"{GPT2} --batch_tokens 8192 --micro_batch 8"),
        "dense-0.6b, 2 x 4096": Row("dense-0.6b --batch_tokens 8192 --micro_batch 2 --steps 24"),
        "moe, its own vocabulary, 1 x 4096": Row(
            "moe-0.4b-2.3b --batch_tokens 4096 --micro_batch 1 --steps 24"
        ),
    },
    "decoding": {**decoding_rows("dense-1.7b"), **decoding_rows("moe-0.4b-2.3b")},
    "sequence": {
        f"moe, {32768 // t} x {t}": Row(f"{MOE} --block_size {t} --micro_batch {32768 // t}")
        for t in (1024, 4096, 8192, 32768)
    },
    "batch": {f"moe, {b} x 4096": Row(f"{MOE} --micro_batch {b}") for b in (1, 2, 4)},
    "experts": {f"small, 4 of {n} experts": Row(f"{SMALL} --n_expert {n}") for n in (8, 32, 128)},
    "cpu": {CHAR: Row(f"nanoGPT {TOY} --n_layer 4 --n_embd 192"), **knock_rows("toy", TOY, CHAR)},
    "6.1b": {"moe-1b-6.1b, 1 x 4096": Row(MAIN)},
}


def measure(row: Row, data: str) -> dict[str, float]:
    """The figures of a row: see `run_training` and `measure_decoding`. Training rows of ours have
    those of `profile_kernels`, too. Raises ChildProcessError if a script fails."""
    if row.samples:
        return measure_decoding(row)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        figures = run_training(row, data, f"{folder}/run")
        peer, options = split_command(row.command)
        if not peer:
            figures["kernels"] = profile_kernels(run_options(options, data, f"{folder}/profiled"))
    return figures


# ---- training


def run_options(options: list[str], data: str, out: str) -> list[str]:
    """The options of a run that leaves a log and no more."""
    return [*options, "--data", data, "--out", out, "--save_every", "0", "--sample_tokens", "0"]


def run_training(row: Row, data: str, out: str) -> dict[str, float]:
    """Run train.py or a peer. The figures of its log, see `summarise`, and the seconds until its
    first update. Raises ChildProcessError if it fails."""
    peer, options = split_command(row.command)
    script = [str(ROOT / "tests/peers.py"), peer] if peer else [str(ROOT / "train.py")]
    command = [sys.executable, *script, *run_options(options, data, out)]
    first, start = math.nan, time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr.fileno())
    while process.poll() is None:
        if math.isnan(first) and read_log(Path(out))[0]:
            first = time.perf_counter() - start
        time.sleep(0.05)
    if process.returncode:
        raise ChildProcessError(f"exit code {process.returncode} of {' '.join(command)}")
    return {**summarise(read_log(Path(out))[0]), "first": first}


def summarise(updates: list[dict]) -> dict[str, float]:
    """Of the second half of a log's updates: median and quartiles of the tokens a second, median
    MFU, peak of memory in GiB; nan for what is not in the log."""
    late = updates[len(updates) // 2 :]
    low, speed, high = statistics.quantiles([update["tokens_per_s"] for update in late], n=4)
    mfu = statistics.median(update.get("mfu", math.nan) for update in late)
    memory = late[-1].get("memory_gib", math.nan)
    return {"speed": speed, "low": low, "high": high, "mfu": mfu, "memory": memory}


def profile_kernels(argv: list[str]) -> float:
    """The tokens a second of train.py with these options if kernels were all its time, by those of
    ten updates in the second half of the run."""
    _, train, _ = training.parse_config(argv)
    on_gpu = pick_device(train.device) == "cuda"
    first, lr_at = train.steps // 2, training.lr_at
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    def watched(step: int, train: training.TrainConfig) -> float:
        """lr_at, with which train.py begins each update."""
        if on_gpu and step in (first, first + PROFILED):
            torch.cuda.synchronize()
        if step == first:
            profiler.start()
        elif step == first + PROFILED:
            profiler.stop()
        return lr_at(step, train)

    with mock.patch.object(training, "lr_at", watched):
        training.main(argv)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [e for e in profiler.events() if e.device_type == kind and not e.is_user_annotation]
    us = sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events)
    return PROFILED * train.batch_tokens / us * 1e6


# ---- decoding


def measure_decoding(row: Row) -> dict[str, float]:
    """Tokens a second, the seconds of a step, and the bytes that a step must read."""
    peer, options = split_command(row.command)
    config, train, _ = training.parse_config(options)
    device = pick_device(train.device)
    prompt = torch.randint(config.vocab_size, (row.prompt,)).tolist()
    if peer:
        model = build_transformers(config, torch.bfloat16, device).eval()
        ids = torch.tensor([prompt] * row.samples, device=device)

        def run() -> float:
            times = []
            for n in (1, NEW):
                start, length = time.perf_counter(), dict(min_new_tokens=n, max_new_tokens=n)
                model.generate(ids, **length, do_sample=False, pad_token_id=0).cpu()
                times.append(time.perf_counter() - start)
            return (times[1] - times[0]) / (NEW - 1)
    else:
        not_compiled = training.TrainConfig(compile=False)
        model = lighten(training.build_model(config, not_compiled, device, 1)[0].eval())
        model.compute_dtype = None
        if device == "cuda":
            compile_steps(model, row.samples)

        def run() -> float:
            for i, _ in enumerate(generate(model, prompt, row.samples, NEW, temperature=0)):
                if i == 4:  # the prompt is read, the graph is there
                    start = time.perf_counter()
            return (time.perf_counter() - start) / (NEW - 5)

    run()  # warms up, and compiles
    step = min(run() for _ in range(2))
    with torch.device("meta"):
        total, active = count_params(Transformer(config))
    idle = 0
    if config.n_expert:  # the experts that none of the samples' tokens takes
        idle = (total - active) * (1 - config.top_k / config.n_expert) ** (row.samples - 1)
    length = row.prompt + NEW // 2  # of the past, on average
    past = row.samples * config.n_layer * 2 * config.n_kv_head * config.head_dim * length
    return {"speed": row.samples / step, "step": step, "bytes": 2 * (total - idle + past)}


# ---- tables


def cells(row: Row, found: dict[str, float], speeds: dict[str, float]) -> list[str]:
    """What the table says after a row's name, nothing where nothing was measured. `speeds` are
    those of the rows before."""
    speed = found["speed"]
    if row.samples:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        bound, step = found["bytes"] / (of_gpu(BANDWIDTH, gpu) or math.nan), found["step"]
        texts = [f"{speed:.0f}", f"{step * 1e3:.2f}", f"{bound * 1e3:.2f}", f"{bound / step:.0%}"]
    else:
        spread = f"({found['low'] / 1e3:.1f}-{found['high'] / 1e3:.1f})"
        texts = [f"{speed / 1e3:.1f} {spread}", f"{found.get('kernels', math.nan) / 1e3:.1f}",
                 f"{found['mfu']:.1%}", f"{found['memory']:.1f}", f"{found['first']:.1f}"]
    texts.append(f"{speed / speeds[row.against]:.2f} x" if row.against in speeds else "")
    return ["" if text.startswith("nan") else text for text in texts]


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input."""
    parser = new_parser("bench.py", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a group or a row")
    parser.add_argument("--data", default=DEFAULT_DATA,
                        help=f"made by data/prepare.py (default: {DEFAULT_DATA})")
    parser.add_argument("--here", metavar="ROW", help="measure one row, in JSON, in this process")
    args = parse_args(parser, argv)
    if args.here:
        print(json.dumps(measure(Row(*json.loads(args.here)), args.data)))
        return
    rows = {name: row for rows in GROUPS.values() for name, row in rows.items()}
    unknown = [name for name in args.names if name not in GROUPS and name not in rows]
    if unknown or not args.names:
        wrong = f"no group or row {', '.join(unknown)}: " if unknown else ""
        raise ValueError(f"{wrong}name some of {', '.join(GROUPS)}, or rows of their tables")
    find_data(args.data)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{gpu}, torch {torch.__version__}")
    speeds, n_failed = {}, 0
    for wanted in args.names:
        group = GROUPS.get(wanted) or {wanted: rows[wanted]}
        head = DECODE_HEAD if any(row.samples for row in group.values()) else TRAIN_HEAD
        print(f"\n| {head} |\n|{' --- |' * len(head.split('|'))}", flush=True)
        for name, row in group.items():
            peer, options = split_command(row.command)
            reason = missing(peer)
            if "cpu" not in options and not torch.cuda.is_available():
                reason = "there is no CUDA GPU"
            if reason:
                print(f"| {name} | left out: {reason} |", flush=True)
                continue
            command = [sys.executable, __file__, "--data", args.data, "--here", json.dumps(row)]
            # The row's own folders are in here, so that a row that is stopped leaves none.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                there = {**os.environ, "TMPDIR": folder}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=there)
            if done.returncode:
                n_failed += 1
                print(f"| {name} | failed, see above |", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            speeds[name] = found["speed"]
            print(f"| {name} | {' | '.join(cells(row, found, speeds))} |", flush=True)
    sys.exit(1 if n_failed else 0)


if __name__ == "__main__":
    run_script(main)
