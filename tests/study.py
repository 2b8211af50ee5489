"""How well does it learn? Studies of many runs of train.py, and what they found.

    python tests/study.py types              # do the missing runs, one at a time on each GPU
    python tests/study.py types --minutes 9  # and end in nine minutes; the next call goes on
    python tests/study.py types --table      # print the table, from the results alone
    python tests/study.py types --update     # rewrite all tables in results/README.md, and pictures
    python tests/study.py plot out/a out/b   # draw losses and learned matrices of your own runs

A run is a command line of train.py, or of tests/peers.py if it begins with the name of a peer. This
is also the name of the run: studies share the runs that they have in common. A finished run is a
line in tests/results/STUDY.jsonl, of the study that did it, and no study repeats it. A run that was
stopped leaves no line, and goes on from its checkpoint if that is still there.

The study time_to_loss compares two projects: GPT-2 124M as nanoGPT trains it and as ours does, on
the same tokens, with the same batch and number of updates, each with its best of three learning
rates. It asks after how many seconds of training ours has reached the held-out loss at which
nanoGPT ends. Not only the knocks differ, so ours is there without them, too.
"""

import fcntl
import hashlib
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TextIO

if __name__ == "__main__":  # Python looks for modules in this file's folder, not in the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from tqdm import tqdm

from data.checkpoint import list_to_resume
from data.documents import find_files
from data.log import MAX_SKIPPED
from data.prepare import prepare
from data.script import (
    drop_unread_output,
    handling,
    import_optional,
    new_parser,
    parse_args,
    run_script,
)
from data.tokens import SPLITS, load_meta
from tests.peers import ROOT, missing, split_command
from tests.report import (
    Run,
    Study,
    append_result,
    by_data,
    fill,
    knock_figures,
    knock_matrices,
    last_step,
    read_log,
    read_results,
    report,
    rounded,
    saved_step,
)
from train import parse_config

RESULTS = ROOT / "tests" / "results"
TRAIN = [sys.executable, str(ROOT / "train.py")]
SCRATCH = Path("out/study")  # where runs write; a run's folder is removed when its line is written
DATA = {"byte": "data/studies", "gpt2": "data/studies_gpt2"}  # by tokenizer
EVAL_GAP = 50e6  # tokens, about, between evaluations, if a run's options do not say it
EVAL_TOKENS = 1 << 22  # held-out tokens: many, because knocks change the loss by little
CURVE = 200  # points to keep of a training loss
LEARNING = (  # settings of the training that decide what a run learns
    "steps", "batch_tokens", "lr", "weight_decay", "beta1", "beta2", "grad_clip", "balance",
    "balance_rate",
)

# ---- the studies

KINDS = {  # the peer that runs it, "" for train.py, and its options
    "none": ("", "--knock_v none"),
    "linear on v, decay": ("decay", "--knock_v linear"),
    "mlp on v, decay": ("decay", "--knock_v mlp"),
    "gate on v, decay": ("decay", "--knock_v gate"),
    "linear on q, k, v, decay": ("decay", "--knock_q linear --knock_k linear --knock_v linear"),
    "mlp on q, k, v, decay": ("decay", "--knock_q mlp --knock_k mlp --knock_v mlp"),
    "mlp on v, random start, decay": ("decay", "--knock_v mlp --knock_init random"),
    "mlp on v, one for each head, decay": ("unshared", "--knock_v mlp"),
    "linear on v": ("", "--knock_v linear"),
    "mlp on v": ("", "--knock_v mlp"),
    "gate on v": ("", "--knock_v gate"),
    "mlp on q, k, v": ("", "--knock_q mlp --knock_k mlp --knock_v mlp"),
    "mlp on v, one for each head": ("unshared-no-decay", "--knock_v mlp"),
    "mlp on v, decay to the start": ("to-start", "--knock_v mlp"),
    "mlp on v, slow, decay": ("slow", "--knock_v mlp"),
}
LR = 1e-3  # the best rate without knocks in the study `stability`


def small(shape: str = "", steps: int = 7630, lr: float = LR) -> str:
    """A run of `small`, perhaps in another shape. 7,630 updates of 32,768 bytes are 250M bytes."""
    return " ".join(f"small {shape} --lr {lr:g} --steps {steps}".split())


def gpt2(lr: float, steps: int = 2500) -> str:
    """A run of `gpt2` with ten evaluations. 2,500 updates of 32,768 tokens are 82M tokens."""
    every = steps // 10
    return f"gpt2 --batch_tokens 32768 --steps {steps} --eval_every {every} --lr {lr:g}"


# The smallest mixture of the paper's Table 5, with GPT-2's vocabulary and shorter sequences. 1,000
# updates of 32,768 tokens are 33M tokens.
MIXTURE = (
    "moe-0.4b-2.3b --vocab_size 50304 --block_size 1024 --batch_tokens 32768 --micro_batch 16"
    " --steps 1000 --eval_every 500"
)


def grid(groups: dict[str, str], kinds: list[str], seeds: Iterable[int]) -> list[Run]:
    """All runs, seed by seed. The runs of a pair stand side by side, to end together.

    Of every second seed the kinds come in reverse, so that no kind always comes first.
    """
    runs = []
    for seed in seeds:
        for group, options in groups.items():
            for kind in kinds if seed % 2 else kinds[::-1]:
                peer, knocks = KINDS[kind]
                command = f"{peer} {options} {knocks} --seed {seed}".strip()
                runs.append(Run(group, kind, seed, command))
    return runs


# Lists of kinds. In train.py knocks do not decay. Where a name ends in ", decay" they do.
DEFAULT = ["none", "mlp on v"]
WITH_LINEAR = ["none", "linear on v", "mlp on v"]
DECAY = ["none", "mlp on v, decay"]
BOTH = [*DECAY, "mlp on v"]
TYPES = [
    "mlp on v, decay", "linear on v, decay", "gate on v, decay", "linear on q, k, v, decay",
    "mlp on q, k, v, decay", "mlp on v, random start, decay", "linear on v", "gate on v",
    "mlp on q, k, v",
]
GPT2_TYPES = [
    "mlp on v, one for each head", "gate on v", "mlp on q, k, v", "mlp on v, decay",
]
OWN = ["mlp on v, one for each head, decay", "mlp on v, one for each head"]
RULES = ["mlp on v", "mlp on v, decay to the start", "mlp on v, slow, decay"]
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
THIRD = "--n_layer 6 --n_embd 384 --n_head 9 --n_kv_head 3"
THRICE = "--n_layer 14 --n_embd 768 --n_head 18 --n_kv_head 6"
DENSE = "--n_expert 0 --top_k 0 --d_ff"
SHORTER = {"60M": small(steps=1830), "125M": small(steps=3815), "250M": small()}
LONGER = {"500M": small(steps=15260), "1B": small(steps=30520)}
KV_HEADS = {
    "1": small("--n_kv_head 1"),
    "2": small("--n_kv_head 2"),
    "4": small(),
    "12": small("--n_kv_head 12"),
}
SIZES = {
    "8M of 39M": small(f"{THIRD} --d_ff 160"),
    "25M of 121M": small(),
    "8M, dense": small(f"{THIRD} {DENSE} 640"),
    "25M, dense": small(f"{DENSE} 896"),
}
LARGER = {
    "73M of 348M": small(f"{THRICE} --d_ff 304"),
    "73M, dense": small(f"{THRICE} {DENSE} 1216"),
}
VARIANTS = {
    "MHA": small("--n_kv_head 12"),
    "MQA": small("--n_kv_head 1"),
    "GTA": small("--attention gta"),
}
MLA = {"MLA": small("--attention mla --n_kv_head 1 --kv_rank 256")}
HEADS = {
    "24 × 32": small("--n_head 24 --n_kv_head 8 --head_dim 32"),
    "12 × 64": small(),
    "6 × 128": small("--n_head 6 --n_kv_head 2 --head_dim 128"),
}
GPT2_RATES = {f"{lr:g}": gpt2(lr) for lr in (3e-4, 6e-4, 1.2e-3)}
STUDIES = {
    "stability": Study(
        "learning rate",
        grid(
            {f"{lr:g}": small(steps=1830, lr=lr) for lr in RATES},
            ["none", "linear on v, decay", "mlp on v, decay"],
            range(1, 3),
        ),
    ),
    "types": Study(
        "",
        grid({"": small()}, DEFAULT, range(1, 5))
        + grid({"": small()}, TYPES, range(1, 5))
        + grid({"": small()}, DECAY, range(5, 9)),
    ),
    "toy": Study("", grid({"": "toy"}, DECAY, range(1, 6))),
    "tokens": Study(
        "bytes",
        grid(SHORTER, BOTH, range(1, 5))
        + grid(LONGER, BOTH, range(1, 4))
        + grid({"250M": small()}, DECAY, range(5, 9)),
    ),
    "kv_heads": Study(
        "key/value heads of 12",
        grid(KV_HEADS, BOTH, range(1, 4))
        + grid({n: KV_HEADS[n] for n in ("4", "12")}, OWN, range(1, 4)),
    ),
    "sizes": Study(
        "parameters",
        grid(SIZES, WITH_LINEAR, range(1, 4)) + grid(LARGER, WITH_LINEAR, range(1, 4)),
    ),
    "variants": Study(
        "attention",
        grid(VARIANTS, BOTH, range(1, 4))
        + grid(MLA, ["none", "linear on v"], range(1, 4)),
    ),
    "decay": Study(
        "",
        grid({"": small()}, DECAY, range(1, 5)) + grid({"": small()}, RULES, range(1, 5)),
        baseline="mlp on v, decay",
    ),
    "heads": Study("query heads", grid(HEADS, DECAY, range(1, 4))),
    "gpt2": Study(
        "tokens",
        grid({"82M": gpt2(6e-4)}, WITH_LINEAR, range(1, 4))
        + grid({"164M": gpt2(6e-4, steps=5000)}, DEFAULT, range(1, 4))
        + grid({"82M": gpt2(6e-4)}, GPT2_TYPES, range(1, 4))
        + grid({"82M": gpt2(6e-4)}, DEFAULT, range(4, 7)),
        tokenizer="gpt2",
    ),
    "mixture": Study("", grid({"": MIXTURE}, DEFAULT, range(1, 9)), tokenizer="gpt2"),
    "time_to_loss": Study(
        "learning rate",
        [Run(lr, "nanoGPT", 1, f"nanoGPT {options}") for lr, options in GPT2_RATES.items()]
        + grid(GPT2_RATES, BOTH, range(1, 2)),
        tokenizer="gpt2",
    ),
}
FIGURE_3 = [  # runs with matrices to keep
    run.command
    for run in grid({"": small()}, ["linear on v, decay", "mlp on v, decay"], range(1, 2))
]

# ---- running


@dataclass
class Job:
    """A run on some data, and the process that does it."""

    run: Run
    settings: dict  # of the model, and those of the training in LEARNING
    folder: Path
    lock: TextIO | None = None
    process: subprocess.Popen | None = None
    first: int = 0  # the step from which the process goes on
    start: float = 0.0  # when it started, in seconds

    def tokens(self, steps: int) -> int:
        """The tokens of so many steps."""
        return steps * self.settings["batch_tokens"]

    def claim(self) -> bool:
        """Lock the file beside the folder. False if another process is doing this run.

        The run's process inherits the lock: if it outlives its runner, it is not started again.
        """
        self.lock = open(f"{self.folder}.lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            return False
        return True

    def release(self) -> None:
        """Give up the claim on a run that is finished."""
        Path(self.lock.name).unlink(missing_ok=True)  # who had it before may have removed it
        self.lock.close()

    def begin(self, device: str, data: str, keep: bool) -> None:
        """Start the process, which goes on from the run's checkpoint if there is one. With `keep`
        it also saves one at its end; without, only at a signal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = self.settings["steps"]
        evals = max(1, round(self.tokens(steps) / EVAL_GAP))
        peer, options = split_command(self.run.command)
        script = [sys.executable, ROOT / "tests/peers.py", peer] if peer else TRAIN
        command = [
            *script, "--eval_every", math.ceil(steps / evals), *options, "--data", data,
            "--out", self.folder, "--resume", "--eval_tokens", EVAL_TOKENS,
            "--save_every", steps if keep else 0, "--sample_tokens", 0,
        ]
        self.first, self.start = saved_step(self.folder), time.monotonic()
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=output,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
                pass_fds=[self.lock.fileno()],
                start_new_session=True,  # Ctrl-C is for the runner, which tells its runs
            )

    def outcome(self) -> str:
        """How the process has ended: finished, diverged, stopped or failed."""
        code = self.process.returncode
        updates, evals = read_log(self.folder)
        skipped = [0] * (MAX_SKIPPED + 1) + [update["skipped"] for update in updates]
        if code == 2 and skipped[-1] - skipped[-1 - MAX_SKIPPED] == MAX_SKIPPED:
            return "diverged"
        if code == 0 and evals and evals[-1]["step"] == self.settings["steps"]:
            return "finished"
        return "stopped" if code in (0, -signal.SIGTERM) else "failed"

    def result(self) -> dict:
        """What the results say of the run. Losses are in nats per token."""
        updates, evals = read_log(self.folder)
        losses = [float(update["loss"]) for update in updates]
        size = math.ceil(len(losses) / CURVE)
        bins = [losses[start : start + size] for start in range(0, len(losses), size)]
        speed = statistics.median(update["tokens_per_s"] for update in updates)
        seconds = time.monotonic() - self.start + self.tokens(self.first) / speed
        last = evals[-1] if self.outcome() == "finished" else {"val_loss": "nan", "val_bpb": "nan"}
        return {
            "run": self.run.command,
            "seed": self.run.seed,
            "val_loss": rounded(last["val_loss"], 6),
            "val_bpb": rounded(last["val_bpb"], 6),
            "first_loss": rounded(losses[0], 4),  # that of the initialisation
            "spikes": updates[-1]["spikes"],
            "skipped": updates[-1]["skipped"],
            "tokens": self.tokens(len(updates)),
            "tokens_per_s": round(speed),
            "seconds": round(seconds, 1),
            "evals": [
                [line["step"], rounded(line["val_loss"], 6), rounded(line["val_bpb"], 6)]
                for line in evals
            ],
            "curve_bin": size,
            "curve": [rounded(statistics.fmean(some), 4) for some in bins],
            "knocks": knock_figures(evals[-1]["knocks"]) if evals else {},
            "settings": self.settings,
        }


def speed_settings(settings: dict) -> dict:
    """All that decides the speed of a run, except its knocks, which cost little."""
    return {k: v for k, v in settings.items() if k not in LEARNING and not k.startswith("knock")}


def code_version() -> dict:
    """What ran: git's commit, None if this is no clone, and a hash that needs no git."""
    source = b"".join((ROOT / name).read_bytes() for name in ("kha.py", "moe.py", "train.py"))
    version = {"commit": None, "dirty": None, "source_sha256": hashlib.sha256(source).hexdigest()}
    if (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT)]
        version["commit"] = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", "*.py"]
        version["dirty"] = bool(subprocess.check_output(changes))
    return version


def find_devices() -> dict[str, str]:
    """The GPUs there are, as CUDA_VISIBLE_DEVICES calls them, with their names; else the CPU."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(i) for i in range(len(names))]
    return dict(zip(ids, names, strict=False)) or {"": "CPU"}


def prepare_data(folder: str, tokenizer: str = "byte") -> dict:
    """The meta.json of the data. If there are none, they are made of the Python packages here.

    Raises ValueError if they are in tokens of another tokenizer.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with open(SCRATCH / "data.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be making them
        if not os.path.exists(folder):
            packages = Path(torch.__file__).parent.parent
            print(f"making {folder} from the Python packages in {packages}", flush=True)
            with tempfile.TemporaryDirectory() as links:
                for i, path in enumerate(find_files(str(packages))):
                    if path.suffix == ".py":
                        os.symlink(path, Path(links, f"{i:06d}.py"))
                prepare([links], folder, tokenizer)
    meta = load_meta(folder)
    if meta["tokenizer"] != tokenizer:
        raise ValueError(f"{folder} is in tokens of {meta['tokenizer']}, and this study needs those"
                         f" of {tokenizer}: name other data with --data")
    return meta


class Runner:
    """Does the runs of a study that are not in the results, one at a time on each device."""

    def __init__(self, name: str, results: Path, data: str, minutes: float, keep: bool):
        """Raises ValueError or OSError if a run's options, the results or the data are wrong."""
        self.deadline = time.monotonic() + 60 * minutes
        self.name, self.results, self.data = name, results, data
        self.minutes, self.keep = minutes, keep
        study, nowhere = STUDIES[name], str(SCRATCH / "none")  # where there is no checkpoint
        settings = []
        for run in study.runs:
            peer, options = split_command(run.command)
            if reason := missing(peer):
                raise FileNotFoundError(reason)
            settings.append(parse_config([*options, "--out", nowhere]))
        self.found = read_results(results)
        self.meta = prepare_data(data, study.tokenizer)
        self.sha256 = self.meta["train"]["sha256"]
        self.jobs = []
        for run, (config, train, _) in zip(study.runs, settings, strict=True):
            folder = re.sub(r"[^\w.]+", "-", f"{run.command} {self.sha256[:8]}")
            learning = {name: getattr(train, name) for name in LEARNING}
            self.jobs.append(Job(run, {**asdict(config), **learning}, SCRATCH / folder))
        results.mkdir(parents=True, exist_ok=True)
        self.devices = find_devices()
        self.running: dict[str, Job] = {}  # by device
        self.n_failed = 0

    def finished(self) -> set[str]:
        """The runs in the results that were trained on this data."""
        return {result["run"] for result in self.found if result["data"] == self.sha256}

    def tokens_done(self) -> int:
        """The tokens of the whole study so far."""
        finished, tokens = self.finished(), 0
        for job in self.jobs:
            whole = job.run.command in finished
            tokens += job.tokens(job.settings["steps"] if whole else last_step(job.folder))
        return tokens

    def fits(self, job: Job, gpu: str) -> bool:
        """Whether a run would end in time, by the runs of this shape that such a GPU has done.

        A run that is too long for any session of this length starts all the same. It is stopped
        when time is up, and goes on in the next session.
        """
        mine = gpu, speed_settings(job.settings)
        like = [r for r in self.found if (r["gpu"], speed_settings(r["settings"])) == mine]
        if not like:
            return True
        speed = statistics.median(r["tokens_per_s"] for r in like)
        rest = [r["seconds"] - r["tokens"] / r["tokens_per_s"] for r in like]
        tokens = job.tokens(job.settings["steps"] - saved_step(job.folder))
        seconds = statistics.median(rest) + tokens / speed
        return seconds <= self.deadline - time.monotonic() or seconds > 60 * self.minutes

    def start_next(self, device: str) -> None:
        """Start the first run that is to be done, ends in time, and is not another process's."""
        for job in self.jobs:
            done = job.process or job.run.command in self.finished()
            if done or not self.fits(job, self.devices[device]) or not job.claim():
                continue
            self.found = read_results(self.results)  # it may have been finished a moment ago
            if job.run.command in self.finished():
                job.release()
                continue
            job.begin(device, self.data, keep=self.keep or job.run.command in FIGURE_3)
            self.running[device] = job
            return

    def take_in(self, device: str) -> str:
        """Record how the run on a device has ended. Returns what to tell the user."""
        job = self.running.pop(device)
        outcome, command = job.outcome(), job.run.command
        if outcome in ("stopped", "failed"):
            job.lock.close()
            if outcome == "stopped":
                return f"stopped after step {last_step(job.folder)}: {command}"
            self.n_failed += 1
            output = job.folder / "output.txt"
            reason = output.read_text().strip().split("\n")[-1]
            return f"failed with exit code {job.process.returncode}: {command}: {reason} ({output})"
        if outcome == "finished" and command in FIGURE_3:
            name = f"figure3-{re.sub('[^a-z]+', '-', job.run.kind)}.npz"
            np.savez_compressed(self.results / name, **knock_matrices(job.folder))
        result = {
            "study": self.name,
            **job.result(),
            "data": self.sha256,
            "data_bytes": [self.meta[split]["bytes"] for split in SPLITS],
            "eval_tokens": min(EVAL_TOKENS, self.meta["val"]["tokens"]),
            "gpu": self.devices[device],
            "device": device,
            "torch": torch.__version__,
            **code_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_result(self.results / f"{self.name}.jsonl", result)
        self.found = read_results(self.results)
        if not self.keep:
            shutil.rmtree(job.folder)
        job.release()
        loss, seconds = result["val_loss"], result["seconds"]
        return f"{outcome} after {seconds:.0f} s, held-out loss {loss}: {command}"

    def work(self) -> int:
        """Run until all is done, time is up or a signal comes. Returns the exit code."""
        signals, told = [], 0
        commands = {job.run.command for job in self.jobs}
        n_missing, names = len(commands - self.finished()), sorted({*self.devices.values()})
        print(f"{self.name}: runs to do: {n_missing}, on {len(self.devices)} x {', '.join(names)}",
              flush=True)
        if names == ["CPU"] and self.name != "toy":
            print("this study is for GPUs: on a CPU each run takes days", flush=True)
        total = sum(job.tokens(job.settings["steps"]) for job in self.jobs)
        bar = tqdm(total=total, initial=self.tokens_done(), unit="tok", unit_scale=True,
                   smoothing=0, dynamic_ncols=True, disable=None)
        asks = handling(lambda number, _: signals.append(number), "SIGTERM", "SIGINT", "SIGHUP")
        with asks, bar:
            try:
                while True:
                    drop_unread_output()
                    stops = len(signals) or int(time.monotonic() > self.deadline)
                    if stops > told:
                        self.stop()
                        told = stops
                    for device in self.devices:
                        if device not in self.running and not stops:
                            self.start_next(device)
                    if not self.running:
                        break
                    time.sleep(0.5)
                    for device, job in list(self.running.items()):
                        if job.process.poll() is not None:
                            bar.write(self.take_in(device))
                            sys.stdout.flush()
                    bar.update(self.tokens_done() - bar.n)
            finally:
                self.stop()  # nothing runs now, except after an error
        n_done = len(commands & self.finished())
        print(f"{self.name}: {n_done} of {len(self.jobs)} runs are done, {self.n_failed} failed")
        if signals:
            return 128 + signals[0]
        return 1 if self.n_failed else 0

    def stop(self) -> None:
        """Tell all runs to save and end. Told a second time, they end at once."""
        for job in self.running.values():
            job.process.terminate()


# ---- the command line


def load_plot() -> ModuleType:
    """tests/plot.py. Raises ValueError if matplotlib is missing."""
    import_optional("matplotlib", "a picture", extra="plot")
    from tests import plot

    return plot


def existing_results(folder: Path) -> list[dict]:
    """`read_results`. Raises FileNotFoundError if there are none."""
    found = read_results(folder)
    if not found:
        raise FileNotFoundError(f"no results in {folder}: name their folder with --results")
    return found


def update(results: Path) -> None:
    """Rewrite the tables in README.md there, and draw the pictures of all studies with results."""
    plot, found = load_plot(), existing_results(results)
    readme = results / "README.md"
    if readme.exists():
        new = readme.with_suffix(".new")  # so that no half of it can be left
        new.write_text(fill(readme.read_text(), STUDIES, found))
        os.replace(new, readme)
        print(f"wrote {readme}")
    for name, study in STUDIES.items():
        for findings in by_data(name, study, found)[:1]:
            for path in plot.draw_study(name, findings, results):
                print(f"wrote {path}")


def draw_runs(folders: list[str]) -> None:
    """Draw the losses of runs into the folder of the first, and into each folder its matrices."""
    plot = load_plot()
    logs = {folder: read_log(Path(folder)) for folder in folders}
    for folder, (updates, _) in logs.items():
        if not updates:
            raise FileNotFoundError(f"no log.jsonl with updates in {folder}: name a run's folder")
    print(f"wrote {plot.draw_logs(logs, Path(folders[0], 'loss.png'))}")
    for folder in folders:
        matrices = knock_matrices(folder) if list_to_resume(folder) else {}
        if matrices:
            print(f"wrote {plot.draw_matrices(matrices, Path(folder, 'knocks.png'))}")


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input."""
    parser = new_parser("study.py", __doc__)
    parser.add_argument("study", choices=[*STUDIES, "plot"])
    parser.add_argument("folders", nargs="*", default=[], metavar="FOLDER",
                        help="of runs, for plot alone")
    instead = parser.add_mutually_exclusive_group()  # of doing the missing runs
    instead.add_argument("--table", action="store_true", help="print the table of the study")
    instead.add_argument("--update", action="store_true", help="rewrite all tables and pictures")
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="folder of the results (default: tests/results)")
    parser.add_argument("--data", help="folder made by data/prepare.py (default: data/studies, or"
                        " data/studies_gpt2 if the study has GPT-2's tokens; made if not there)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many minutes")
    parser.add_argument("--keep", action="store_true", help="keep what finished runs wrote")
    args = parse_args(parser, argv)
    if (args.study == "plot") != bool(args.folders):
        raise ValueError("plot needs the folders of runs, and only plot takes any: "
                         "python tests/study.py plot out/a out/b")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, not {args.minutes:g}")
    plots, reports = args.study == "plot", args.table or args.update  # these do no runs
    if plots or reports:
        used = {"study", "folders"} if plots else {"study", "folders", "table", "update", "results"}
        for option in sorted(vars(args).keys() - used):
            if getattr(args, option) != parser.get_default(option):
                raise ValueError(f"--{option} changes nothing here: leave it out")
    if plots:
        draw_runs(args.folders)
    elif args.table:
        print(report(args.study, STUDIES[args.study], existing_results(args.results)), end="")
    elif args.update:
        update(args.results)
    else:
        data = args.data or DATA[STUDIES[args.study].tokenizer]
        runner = Runner(args.study, args.results, data, args.minutes, args.keep)
        sys.exit(runner.work())


if __name__ == "__main__":
    run_script(main)
