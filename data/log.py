"""A run's log.jsonl and its progress on the terminal.

log.jsonl has one JSON object a line, written as things happen:
- the settings, first and again where a resumed run has others: step (after which they hold), config
  and train (all fields of both, but out: a folder may be moved), tokenizer, data (sha256 of
  train.bin), n_process, device, torch (version);
- each update: step, loss (nats a token), lr, grad_norm (before clipping), worst_load (of a mixture:
  the busiest expert's load over the mean, in the worst layer), tokens_per_s, on CUDA memory_gib
  (the peak so far, of one process), on known GPUs mfu (of the datasheet's bfloat16 FLOP/s), and
  over the whole run so far spikes and skipped (see `Log`);
- each evaluation: step, val_loss (nats a token), val_bpb (bits a byte), knocks (two numbers for
  each knock matrix, see figures.knock_movement).
A number that is not finite is a string, such as "NaN".
"""

import errno
import json
import os
import statistics
import sys
import time
from collections import deque
from contextlib import suppress

import torch
from tqdm import tqdm

from data.checkpoint import check_none_newer, list_checkpoints, list_to_resume, way_on
from data.device import Moment
from data.figures import PEAK_FLOPS, count_params, flops_per_token, of_gpu
from data.script import drop_unread_output, naming
from kha import Transformer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SPIKE = 6  # deviations above the median of the last 100 losses that make a loss a spike
MAX_SKIPPED = 10  # updates in a row that are not finite before a run gives up
SECONDS_A_LINE = 10  # between lines of progress where there is no terminal


class Log:
    """A run's log.jsonl, and its counts over the whole run.

    `spikes` counts the losses that are more than SPIKE deviations above the median of the up to 100
    losses before, from the 21st loss on. A deviation is 1.4826 times the median absolute deviation.
    `skipped` counts the updates that were left out because loss or gradient was not finite, and
    `skipped_in_a_row` counts those of them that came after the last finite update.
    """

    def __init__(self, out: str, last_step: int, writes: bool = True):
        """Go on after `last_step`: cut off what an earlier try wrote behind it, read the counts.

        Raises ValueError if a log is there that does not reach `last_step`, if another run is
        writing it, or if one has saved a checkpoint after `last_step`.
        """
        path = os.path.join(out, "log.jsonl")
        self.losses = deque(maxlen=100)
        self.spikes = self.skipped = self.skipped_in_a_row = 0
        self.out, self.start, self.settings, self.file = out, last_step, {}, None
        kept = self.read(path, last_step) if last_step and os.path.exists(path) else 0
        if not writes:
            return
        os.makedirs(out, exist_ok=True)
        self.file = open(path, "ab", buffering=0)  # a line is one write
        if fcntl:
            try:
                # The lock lasts until the process ends, however it ends.
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"another run is writing {out}: choose another --out, or stop that run"
                ) from None
            except OSError:
                pass  # a file system without locks
        check_none_newer(out, last_step)
        self.file.truncate(kept)

    def read(self, path: str, last_step: int) -> int:
        """Take counts from the lines up to `last_step`; returns how many bytes these have."""
        reached = kept = 0
        with open(path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    if record["step"] > last_step or not line.endswith(b"\n"):
                        break
                    if "loss" in record:
                        self.set_counts(float(record["loss"]), record["spikes"], record["skipped"])
                    if "config" in record:
                        self.settings = record
                    reached, kept = record["step"], kept + len(line)
                except (ValueError, TypeError, KeyError):
                    break  # half a line: the run was killed in the middle of it
        if reached < last_step and os.path.getsize(path):
            raise ValueError(
                f"{path} is damaged after step {reached}, and the run goes on after step"
                f" {last_step}: mend that line, or move the file away to go on without it"
            )
        return kept

    def set_counts(self, loss: float, spikes: int, skipped: int) -> None:
        """Set the counts to those after an update with this loss."""
        if skipped == self.skipped:
            self.skipped_in_a_row = 0
            self.losses.append(loss)
        else:
            self.skipped_in_a_row += 1
        self.spikes, self.skipped = spikes, skipped

    def count(self, loss: float, finite: bool) -> None:
        """Count an update with this loss, also as a spike if it is one. An update that is not
        `finite` was left out."""
        spike = False
        if finite and len(self.losses) >= 20:
            median = statistics.median(self.losses)
            deviation = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            spike = loss > median + SPIKE * deviation
        self.set_counts(loss, self.spikes + spike, self.skipped + (not finite))

    def begin(
        self, model: Transformer, settings: dict, device: str, n_process: int, n_tokens: int
    ) -> None:
        """Start the clock and the progress, and write the settings if they are not those of the
        lines so far. `settings` has the fields of both configs and what else stands in line 1. The
        training data have `n_tokens`."""
        train, self.device, self.clock = settings["train"], device, Moment(device)
        self.batch_tokens = train["batch_tokens"]
        name = device if not device.startswith("cuda") else torch.cuda.get_device_name(device)
        self.flops_per_token = flops_per_token(model, model.config.block_size)
        self.peak_flops = n_process * (of_gpu(PEAK_FLOPS, name) or 0)  # 0: not known
        where = {"n_process": n_process, "device": name, "torch": torch.__version__}
        train = {key: value for key, value in train.items() if key != "out"}  # it may be moved
        record = {"step": self.start, **settings, "train": train, **where}
        if {**self.settings, "step": self.start} != record:
            self.write(**record)
        self.progress = Progress(train["steps"], self.start, shows=self.file is not None)
        total, active = count_params(model)
        kinds = {place: getattr(model.config, f"knock_{place}") for place in "qkv"}
        knocks = [f"{kind} on {place}" for place, kind in kinds.items() if kind != "none"]
        epochs = train["steps"] * self.batch_tokens / n_tokens
        self.say(
            f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active,"
            f" {', '.join(knocks) or 'no knocks'}; {train['steps']} steps of {self.batch_tokens}"
            f" tokens ({epochs:.3g} epochs of {train['data']}), lr {train['lr']:g}, on {n_process}"
            f" x {device.split(':')[0]}, micro_batch {train['micro_batch']}; writing {self.out}"
            + (f", going on after step {self.start}" if self.start else
               f", beginning with the weights of {train['init']}" if train["init"] else "")
        )
        seconds = self.flops_per_token * self.batch_tokens / 1e11  # about what two CPU cores need
        if device == "cpu" and seconds > 60:
            minutes, least = seconds / 60, model.config.block_size * n_process
            self.say(f"this is for a GPU: two CPU cores need about {minutes:,.0f} minutes and much"
                     f" memory for an update, less with --batch_tokens {least} --micro_batch 1")

    def update(self, step: int, lr: float, moment: Moment, loss: float, grad_norm: float,
               worst_load: float, finite: bool) -> None:
        """Log an update that the device had done at `moment`. train.update explains the numbers.

        Raises ValueError after MAX_SKIPPED updates in a row that were not finite.
        """
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        if worst_load:
            record["worst_load"] = worst_load
        record["tokens_per_s"] = self.batch_tokens / moment.seconds_since(self.clock)
        self.clock = moment
        if self.device.startswith("cuda"):
            record["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.peak_flops:
            record["mfu"] = record["tokens_per_s"] * self.flops_per_token / self.peak_flops
        self.count(loss, finite)
        self.write(**record, spikes=self.spikes, skipped=self.skipped)
        self.progress.update(record)
        if self.skipped_in_a_row == MAX_SKIPPED:
            way = "start again with a lower --lr and another --out"
            if list_checkpoints(self.out):
                way = (
                    f"go on with --resume and a lower --lr from what is saved in {self.out}, after"
                    " deleting the newest checkpoint if it fails again"
                )
            raise ValueError(
                f"{MAX_SKIPPED} updates in a row, the last step {step}, had a loss or gradient"
                f" that is not finite: {way}"
            )

    def restart_clock(self) -> None:
        """Start the clock of the next update."""
        self.clock = Moment(self.device)

    def say(self, text: str) -> None:
        """Print a line, above the progress; nothing in processes that do not write."""
        if self.file:
            drop_unread_output()
            self.progress.bar.write(text)

    def evaluation(self, step: int, val_loss: float, val_bpb: float, knocks: dict) -> None:
        """Log an evaluation."""
        self.write(step=step, val_loss=val_loss, val_bpb=val_bpb, knocks=knocks)
        self.say(
            f"step {step}: held-out loss {val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte"
        )

    def sync(self) -> None:
        """Bring what was written to the disk. Raises OSError if that fails, and ValueError if the
        log is another file now: then a user has deleted the folder, and begun another run in it."""
        path, number = self.file.name, self.file.fileno()
        with naming(path):  # some network disks find only now that they are full
            os.fsync(number)
        if os.path.exists(path) and not os.path.samefile(path, number):
            raise ValueError(f"{path} was replaced while this run wrote it: choose another --out")

    def close(self) -> None:
        """End the progress, and say how many updates were left out, if any."""
        if self.skipped:
            self.say(f"updates that were left out, because their loss or gradient was not finite:"
                     f" {self.skipped} (a lower --lr may help)")
        self.progress.bar.close()

    def write(self, **record) -> None:
        """Append a line. Raises OSError if it cannot be written."""
        if not self.file:
            return
        record = json.loads(json.dumps(record), parse_constant=str)  # NaN is no JSON
        line = f"{json.dumps(record)}\n".encode()
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            reason = f"cannot write {self.file.name} ({error.strerror})"
            raise OSError(f"{reason}: {way_on(self.out)}") from error


def check_new(out: str) -> None:
    """Raises ValueError if a folder holds a run already, or a log with more than its first line."""
    if list_to_resume(out):
        raise ValueError(
            f"{out} holds a run already: add --resume to go on with it, or choose another --out"
        )
    with suppress(FileNotFoundError), open(os.path.join(out, "log.jsonl"), "rb") as file:
        file.readline()
        if file.readline():
            raise ValueError(
                f"{out} holds the log of a run without checkpoints: choose another --out (with"
                " --resume the run starts again, and replaces the log)"
            )


class Progress:
    """A bar on a terminal; where there is none, a plain line of output every SECONDS_A_LINE."""

    def __init__(self, total: int, done: int, shows: bool = True):
        self.shows, self.total, self.written = shows, total, time.monotonic()
        bar = shows and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=not bar)

    def update(self, record: dict) -> None:
        """Show an update's line of the log."""
        text = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  mfu {record['mfu']:.1%}"
        drop_unread_output()
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        late = time.monotonic() - self.written > SECONDS_A_LINE
        if self.shows and self.bar.disable and (late or record["step"] == self.total):
            self.written = time.monotonic()
            print(f"step {record['step']} of {self.total}: {text}", flush=True)
