"""Whether a run's model, settings, data, checkpoint and processes fit together."""

import dataclasses
import os
from typing import Any

import torch

from data.processes import n_processes, sum_over_processes
from data.tokens import SPLITS, check_tokenizer, load_meta
from kha import Config


def check_run(config: Config, train, checkpoint: dict | None, device: str) -> tuple[dict, Any]:
    """Raises ValueError for what does not fit. Returns the meta.json of the data, and the settings
    with the micro_batch of this run: the largest, up to the given one, that divides the sequences
    of a process in an update. A checkpoint keeps the given one, because a resumed run may have more
    or fewer processes. `train` is a TrainConfig: train.py imports this file, not the reverse."""
    T, data, n_process = config.block_size, train.data, n_processes()
    start = checkpoint["step"] if checkpoint else 0
    # Here all processes also wait until the first one of each machine has prepared the data.
    if sum_over_processes(torch.tensor(start, device=device)) != start * n_process:
        raise ValueError(f"the processes found different checkpoints in {train.out}: name a folder"
                         " that all machines share")
    meta, unit = load_meta(data), T * n_process
    data_hash = meta["train"]["sha256"]
    if checkpoint:
        check_tokenizer(data, checkpoint["tokenizer"])
    each, rest = divmod(train.batch_tokens, unit)  # sequences of a process
    if rest:
        size = min(train.micro_batch, each + 1)  # advise no micro-batches smaller than this
        raise ValueError(f"batch_tokens must be a multiple of block_size * processes = {T} *"
                         f" {n_process} = {unit}, not {train.batch_tokens}: add --batch_tokens"
                         f" {(each // size + 1) * size * unit}")
    micro = max(n for n in range(1, min(train.micro_batch, each) + 1) if each % n == 0)
    if meta["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"{data} has a vocabulary of {meta['vocab_size']} ({meta['tokenizer']}), more than the"
            f" model's {config.vocab_size}: add --vocab_size {-(-meta['vocab_size'] // 64) * 64}"
        )
    n, split = min((meta[split]["tokens"], split) for split in SPLITS)
    if n <= T:
        raise ValueError(f"{data} ({split}) has {n} tokens, fewer than one sequence of {T} + 1:"
                         f" prepare more text, or train with --block_size {n - 1} or less")
    if train.eval_tokens < T:
        raise ValueError(f"eval_tokens must be at least block_size, {T}, not {train.eval_tokens}")
    if start > train.steps:
        raise ValueError(f"the run in {train.out} has done {start} steps, more than --steps"
                         f" {train.steps}: give --steps {start + 1} or more")
    if os.path.realpath(train.out) == os.path.realpath(data):
        raise ValueError(f"{data} holds the data: choose another --out")
    if checkpoint and checkpoint.get("data", data_hash) != data_hash:
        raise ValueError(f"{data} is not the data that the run in {train.out} was trained on: name"
                         " that with --data")
    return meta, dataclasses.replace(train, micro_batch=micro)
