"""A run's log.jsonl."""

import errno
import json
import math
import os
import statistics
from collections import deque

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SPIKE = 6  # deviations above the median of the last 100 losses that make a loss a spike


class Log:
    """The run's log.jsonl: one line for each update and each evaluation, written as they come.

    `spikes` and `skipped` count, over the whole run, the losses more than SPIKE deviations (median absolute deviation
    * 1.4826) above the median of the up to 100 before (from the 21st on), and the updates left out since something was
    not finite.
    """

    def __init__(self, out: str, last_step: int, writes: bool):
        """Go on after `last_step`: what an earlier try wrote behind it is cut off, and the counts are read back.

        Raises ValueError if there is a log that does not reach `last_step`, or if another run is writing it.
        """
        path = os.path.join(out, "log.jsonl")
        self.losses, self.spikes, self.skipped, self.skipped_in_a_row = deque(maxlen=100), 0, 0, 0
        reached = kept = 0  # last step and bytes of the lines to keep
        if last_step and os.path.exists(path):
            with open(path, "rb") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                        if record["step"] > last_step or not line.endswith(b"\n"):
                            break
                        if "loss" in record:
                            self.count(float(record["loss"]), record["skipped"] == self.skipped)
                        reached, kept = record["step"], kept + len(line)
                    except (ValueError, TypeError, KeyError):
                        break  # half a line: the run was killed in the middle of it
            if reached < last_step and os.path.getsize(path):
                raise ValueError(f"{path} is damaged after step {reached}, the run goes on after step {last_step}: mend that"
                                 f" line, or move the file away to go on without the log until then")
        self.file = None
        if writes:
            os.makedirs(out, exist_ok=True)
            self.file = open(path, "ab", buffering=0)  # a line is one write
            if fcntl:
                try:
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
                except (BlockingIOError, PermissionError):
                    raise ValueError(f"another run is writing {out}: choose another --out, or stop that run") from None
                except OSError:
                    pass  # a file system without locks
            self.file.truncate(kept)

    def count(self, loss: float, finite: bool) -> None:
        if not finite:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            return
        self.skipped_in_a_row = 0
        if len(self.losses) >= 20:
            median = statistics.median(self.losses)
            deviation = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            self.spikes += loss > median + SPIKE * deviation
        self.losses.append(loss)

    def write(self, **record) -> None:
        if self.file:
            numbers = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in record.items()}
            line = f"{json.dumps(numbers)}\n".encode()
            try:
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                reason = f"cannot write {self.file.name} ({error.strerror}): the checkpoints beside it stand"
                raise OSError(reason) from error
