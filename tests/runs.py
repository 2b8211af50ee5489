"""What tests of the scripts share: runs of train.py, a tiny mixture of experts with knocks, started
as a user does; and what they leave in files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

import train
from data.checkpoint import list_checkpoints, load_checkpoint
from tests.peers import ROOT
from tests.report import read_log

LIMIT = 600  # seconds until a process counts as hanging, also on a busy machine
SHAPE = (
    "--n_layer 1 --n_embd 32 --head_dim 8 --d_ff 32 --n_expert 4 --block_size 32 --micro_batch 4"
    " --device cpu"
).split()
SHORT = [
    *SHAPE,
    *"--batch_tokens 256 --steps 30 --eval_every 10 --save_every 10 --eval_tokens 512".split(),
    *"--prompt a".split(),
]
LONG = [*SHORT, *"--steps 100000 --eval_every 1 --save_every 1".split()]
# 16 sequences an update: 8 micro-batches for one process, 4 for each of two. Losses then agree to
# some 2e-7, unless rounding decides which expert takes a token. With few tokens, a wide model and a
# low rate that is rare.
SCALE = [
    *SHAPE,
    *"--n_layer 2 --n_embd 64 --block_size 8 --batch_tokens 128 --micro_batch 2 --lr 5e-4".split(),
    *"--steps 20 --eval_every 10 --save_every 10 --eval_tokens 144 --balance_rate 0.01".split(),
    *"--prompt a".split(),
]


def command(*args, n_process=0, restarts=0, script="train.py"):
    """The command line of a run, under torchrun if n_process is given."""
    torchrun = "-m torch.distributed.run --standalone".split()
    torchrun += ["--nproc_per_node", n_process, "--max-restarts", restarts]
    words = [sys.executable, *(torchrun if n_process else []), ROOT / script, *args]
    return [str(word) for word in words]


def environment():
    """The variables of a process that finds the checkout's modules from every folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_process(*args, env=None, **how):
    """Run a script to its end; `env` adds to the environment."""
    return subprocess.run(
        command(*args, **how),
        env={**environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def as_in_a_terminal():
    """For preexec_fn: nohup ignores SIGHUP for all that the tests start, and a shell ignores SIGINT
    for what it runs in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_process(*args, **how):
    """Start a script as a terminal does, as a process with its output in `stdout`."""
    return subprocess.Popen(
        command(*args, **how),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=as_in_a_terminal,
    )


def wait_for_update(out, process):
    """Wait until the log of a running process has an update."""
    log = out / "log.jsonl"
    while not (log.exists() and '"loss"' in log.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


@contextmanager
def at_step(step, act):
    """A context in which `act()` is called in the middle of the update after this many steps."""
    original = train.lr_at

    def act_first(done, settings):
        if done == step:
            act()
        return original(done, settings)

    with mock.patch.object(train, "lr_at", act_first):
        yield


def change_token(path, token):
    """Put a token in the middle of a file of tokens."""
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[len(tokens) // 2] = token
    tokens.tofile(path)


@contextmanager
def limit_files(size):
    """In this context no file can grow past `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(out):
    """The names of all files in a folder."""
    return sorted(path.name for path in out.iterdir())


def contents(folder):
    """What all files in a folder hold, also in folders below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(out):
    """The log's updates and evaluations, without what differs from run to run."""
    timed = ("tokens_per_s", "mfu", "memory_gib")
    lines = [line for line in lines_of(out) if "config" not in line]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def weights_of(out):
    """The weights of a run's newest checkpoint."""
    return load_checkpoint(list_checkpoints(out)[0])[0].state_dict()


def equal_weights(one, two):
    """Whether two state dicts have the same names and the same tensors, to the bit."""
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def assert_same_run(one, two):
    """Two runs have the same log, with each step once, and the same checkpoints to the bit."""
    assert untimed(one) == untimed(two)
    updates = [line["step"] for line in read_log(one)[0]]
    assert updates == list(range(1, len(updates) + 1))
    assert names(one) == names(two)
    assert equal_weights(weights_of(one), weights_of(two))
    (best, about), (other, about_other) = load_checkpoint(one), load_checkpoint(two)
    assert about["step"] == about_other["step"]
    assert equal_weights(best.state_dict(), other.state_dict())
