"""Runs of train.py for the tests: a tiny mixture of experts with knocks, started as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

import train
from data.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
SHAPE = "--n_layer 1 --n_embd 32 --head_dim 8 --d_ff 32 --n_expert 4 --block_size 32 --micro_batch 4 --device cpu".split()
SHORT = [*SHAPE, *"--batch_tokens 256 --steps 30 --eval_every 10 --save_every 10 --eval_tokens 512 --prompt a".split()]


def command(*args, n_process=0, restarts=0, script="train.py"):
    """Command line of a run, under torchrun if n_process is given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n_process, "--max-restarts", restarts]
    return [str(word) for word in (sys.executable, *(torchrun if n_process else []), ROOT / script, *args)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def train_script(*args, preexec_fn=None, **how):
    """Run the script to its end, which must come within a minute."""
    return subprocess.run(command(*args, **how), env=environment(), capture_output=True, text=True, timeout=60,
                          preexec_fn=preexec_fn)


def start_script(*args, **how):
    """Start the script, as a process with its output in `stdout`."""
    return subprocess.Popen(command(*args, **how), env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def stop_at(step, args):
    """Run main and press Ctrl-C in the middle of an update."""
    original = train.lr_at

    def interrupt(at, settings):
        if at == step:
            raise KeyboardInterrupt
        return original(at, settings)

    with mock.patch.object(train, "lr_at", interrupt):
        train.main(args)


def lines_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def log_of(out):
    """The log's updates and its evaluations."""
    lines = lines_of(out)
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def untimed(out):
    """The log's updates and evaluations, but for what differs from run to run."""
    timed = ("tokens_per_s", "mfu", "memory_gib")
    lines = [line for line in lines_of(out) if "config" not in line]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def weights_of(out):
    return load_checkpoint(out)[0].state_dict()


def assert_same_run(one, two):
    """Two runs have the same log, with each step once, and ended with the same weights to the bit."""
    assert untimed(one) == untimed(two)
    updates = [line["step"] for line in log_of(one)[0]]
    assert updates == list(range(1, len(updates) + 1))
    weights, others = weights_of(one), weights_of(two)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
