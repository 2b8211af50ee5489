"""Checkpoints: one file of tensors and plain data, never code.

A run's folder holds step-N.pt, the last two, and best.pt, the one with the lowest held-out loss of
those that were saved right after an evaluation. A checkpoint is a dictionary:

    format      FORMAT, the version of this layout
    step        how many updates were done
    config      all fields of kha.Config
    train       all fields of train.TrainConfig
    tokenizer   the name of the tokenizer, or the text of its tokenizer.json
    data        sha256 of the run's train.bin
    val_loss    held-out loss, nats a token, if it was evaluated at this step, else None
    best_loss   the lowest val_loss that was saved up to this step; infinite if none was
    model       the state dict of the model, whole tensors
    optimizer   that of the optimizer
"""

import errno
import math
import os
import pickle
import shutil
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded

from data.hf import start_from_hf
from data.processes import is_first, warn, whole
from data.script import sync, sync_names
from kha import Config, Transformer

FORMAT = 3  # a file of another format is refused
TYPES = {"format": int, "step": int, "config": dict, "train": dict, "tokenizer": str, "model": dict}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, memory: dict | None = None) -> dict:
    """The "model" and "optimizer" of a checkpoint, copied to the CPU: whole tensors, also where
    FSDP has them in parts. All processes call it; the first one gets the tensors. A tensor that
    is also in `memory`, an earlier result, is copied into that one, not into a new one."""
    parts = {"model": sharded.get_model_state_dict(model)}
    if optimizer.state:  # before its first update the call below would make one up
        parts["optimizer"] = sharded.get_optimizer_state_dict(model, optimizer)
    return to_cpu(parts, memory, keep=is_first())


def to_cpu(tree, memory=None, keep: bool = True):
    """A copy of nested dictionaries and lists with all their tensors: see `collect`. A process that
    does not keep it only helps to gather the tensors."""
    if isinstance(tree, dict):
        memory = memory or {}
        return {key: to_cpu(value, memory.get(key), keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [to_cpu(value, keep=keep) for value in tree]
    if not isinstance(tree, torch.Tensor):
        return tree
    tensor = whole(tree)
    if not keep:
        return None
    return (torch.empty_like(tensor, device="cpu") if memory is None else memory).copy_(tensor)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: dict) -> None:
    """Put a checkpoint's tensors into a model and an optimizer, in place.

    Of the optimizer's state only the moments are taken, not its settings. Raises ValueError if the
    weights of a run that goes on are not those of its config.
    """
    saved = {name: weight.shape for name, weight in checkpoint["model"].items()}
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    if checkpoint["step"] > 0 and saved != wanted:
        raise ValueError(f"the checkpoint of step {checkpoint['step']} does not hold the weights of"
                         " its config: remove it, and --resume goes on from the one before")
    # What a new run starts from may lack knocks: then these keep their own start. In a run that is
    # resumed, strict finds a weight without moments. It does not find a missing weight.
    options = sharded.StateDictOptions(full_state_dict=True, strict=checkpoint["step"] > 0)
    sharded.set_model_state_dict(model, checkpoint["model"], options=options)
    if "optimizer" not in checkpoint:
        return
    settings = [dict(group) for group in optimizer.param_groups]
    state = checkpoint["optimizer"]
    if next(model.parameters()).device.type == "cpu":
        state = to_cpu(state)  # torch would keep these tensors, and with them the file they are in
    sharded.set_optimizer_state_dict(model, optimizer, state, options=options)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


class Saver:
    """Writes a run's checkpoints in a thread, while training goes on. As a context it ends when all
    is on the disk. `start` is the step after which the run goes on, 0 for a new run, and `best` the
    lowest held-out loss that was saved before.

    A checkpoint stays in memory, and the next one is copied into it. Training waits for this copy,
    and into new memory it takes ten times as long. With a `model` the thread makes that memory
    at once, so that the first copy is short, too.
    """

    def __init__(self, folder: str, start: int, best: float, model: nn.Module | None = None):
        self.folder, self.last, self.best, self.memory = folder, start, best, None
        self.thread, self.work = ThreadPoolExecutor(1), None
        if model is not None:
            weights = sharded.get_model_state_dict(model)
            size = 3 * sum(w.numel() * w.element_size() for w in weights.values())  # with moments
            free = shutil.disk_usage(folder).free
            if not start and free < 4 * size:  # the last two, the best, and one that is not whole
                warn(f"{folder} has room for {free / 1e9:.2f} GB, but may come to hold four"
                     f" checkpoints of {size / 1e9:.2f} GB")
            self.work = self.thread.submit(self.reserve, weights)

    def collect(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """The function `collect`, after the checkpoint before is on the disk. Raises its error."""
        self.wait()
        self.memory = collect(model, optimizer, self.memory)
        return self.memory

    def save(self, checkpoint: dict) -> None:
        """Start to write a checkpoint, after the one before is on the disk. Raises its error."""
        self.wait()
        self.work = self.thread.submit(self.write, checkpoint)

    def reserve(self, weights: dict[str, torch.Tensor]) -> None:
        """Make the memory for copies of weights and of AdamW's moments. Zeros are written to it,
        because the system finds memory only then. Raises OSError if there is too little."""
        model, state, moments = {}, {}, ("exp_avg", "exp_avg_sq")
        try:
            for name, w in weights.items():
                model[name] = torch.zeros(w.shape, dtype=w.dtype)
                state[name] = {key: torch.zeros(w.shape, dtype=w.dtype) for key in moments}
        except (MemoryError, RuntimeError) as error:  # RuntimeError is torch's
            del model, state  # or their part would stay, and training might fail first
            reason = str(error).split("\n")[0]
            raise OSError(f"no memory for the checkpoints of {self.folder} ({reason})") from error
        self.memory = {"model": model, "optimizer": {"state": state}}

    def write(self, checkpoint: dict) -> None:
        """`save_checkpoint`, as best.pt too if its held-out loss is the lowest so far."""
        loss = checkpoint["val_loss"]
        improves = loss is not None and loss < self.best
        if improves:
            self.best = loss
        more = {"format": FORMAT, "best_loss": self.best}
        save_checkpoint(self.folder, {**checkpoint, **more}, self.last, improves)
        self.last = checkpoint["step"]

    def wait(self) -> None:
        """Wait until all is on the disk. Raises OSError if a checkpoint could not be written, or if
        there is too little memory for it."""
        if self.work:
            self.work.result()

    @property
    def failed(self) -> bool:
        """Whether the thread has ended with an error, which `wait` raises."""
        return bool(self.work and self.work.done() and self.work.exception())

    def __enter__(self):
        return self

    def __exit__(self, error: type | None, *_) -> None:
        self.thread.shutdown()  # it waits
        if error is None:  # else that error is the one to show
            self.wait()


def save_checkpoint(folder: str, checkpoint: dict, last: int = 0, best: bool = False) -> None:
    """Write a checkpoint to folder/step-N.pt, where N is its "step". Keep it and that of the step
    `last`, the newest that is known to be whole, and remove all others. `best` makes it best.pt as
    well.

    A file appears whole or not at all: it is written under another name, brought to the disk and
    then renamed. Raises OSError if it cannot be written; the earlier ones then stand.
    """
    name = step_file(checkpoint["step"])
    temporary, second = os.path.join(folder, "checkpoint.tmp"), os.path.join(folder, "best.tmp")
    try:
        # What a killed run left may be best.pt under another name: it must not be written to.
        remove(temporary, second)
        torch.save(checkpoint, temporary)
        sync(temporary)
        if best:
            try:
                os.link(temporary, second)  # another name of the file, which costs no space
            except OSError:  # some disks have one name for each file
                shutil.copyfile(temporary, second)
                sync(second)
            os.replace(second, os.path.join(folder, "best.pt"))
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        remove(temporary, second)
        reason = str(error).split("\n")[0]
        if not isinstance(error, OSError):
            reason = f"as on a full disk: {reason}"
        raise OSError(f"cannot save to {folder} ({reason}): {way_on(folder)}") from error
    os.replace(temporary, os.path.join(folder, name))
    sync_names(folder)  # before an old file goes
    for path in list_checkpoints(folder):
        if os.path.basename(path) not in (name, step_file(last)):
            os.remove(path)


def remove(*paths: str) -> None:
    """Remove those of the files that are there."""
    for path in paths:
        Path(path).unlink(missing_ok=True)


def best_so_far(checkpoint: dict | None, eval_tokens: int, held_out: int) -> float:
    """The "best_loss" of the checkpoint from which a run goes on; infinite for a new run. It is
    infinite, too, and a warning says so, if an earlier version saved none, or if evaluations read
    more or fewer of all `held_out` tokens now, with `eval_tokens`."""
    if not checkpoint or checkpoint["step"] == 0:
        return math.inf
    length, before = checkpoint["config"]["block_size"], checkpoint["train"]["eval_tokens"]
    n_before, n_now = (min(n, held_out - 1) // length for n in (before, eval_tokens))
    if n_before == n_now and "best_loss" in checkpoint:
        return checkpoint["best_loss"]
    warn(f"how good best.pt is on {n_now} sequences is not known: the next checkpoint after an"
         " evaluation replaces it")
    return math.inf


def step_file(step: int) -> str:
    """The name of the checkpoint after so many updates. Names sort as steps do."""
    return f"step-{step:08d}.pt"


def list_checkpoints(folder: str) -> list[str]:
    """The checkpoints step-N.pt in a run's folder, newest first."""
    paths = Path(folder).glob(f"step-{8 * '[0-9]'}.pt")
    return sorted(map(str, paths), reverse=True)


def list_to_resume(folder: str) -> list[str]:
    """The checkpoints from which a run can go on: the newest first, best.pt after all others."""
    paths, best = list_checkpoints(folder), os.path.join(folder, "best.pt")
    if os.path.isfile(best):
        paths.append(best)
    return paths


def way_on(folder: str) -> str:
    """What the user of a run can do after its folder could not be written to."""
    if list_to_resume(folder):
        return "mend that, and --resume goes on from the checkpoints there"
    return "mend that, and --resume starts again, for no checkpoint was saved yet"


def check_none_newer(folder: str, step: int) -> None:
    """Raises ValueError if a run's folder holds a whole checkpoint after `step` (0 for a new run).
    Then another run has saved it since this one looked for checkpoints."""
    for path in list_to_resume(folder):
        name = os.path.basename(path)
        if step and (name == "best.pt" or name <= step_file(step)):
            return  # it is not newer, nor are those after it
        try:
            found = read_checkpoint(path)["step"]
        except ValueError:
            continue  # read_newest has passed over it and said so
        if found > step:
            raise ValueError(
                f"another run has saved {path} while this one started: go on from it with --resume,"
                " or choose another --out"
            )
        return  # the run goes on from this one, which the user may have renamed


def read_newest(paths: list[str]) -> dict:
    """The first checkpoint of paths, newest first, that is whole; says so if it is an older one.
    Raises ValueError if none is whole, OSError if one cannot be read."""
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            if path == paths[-1]:
                raise ValueError(f"{error} (to start again, choose another --out)") from error
            warn(f"{error}: going on from the checkpoint before it")


def read_checkpoint(path: str) -> dict:
    """What save_checkpoint wrote: tensors, on the CPU, and plain data. Code in it is never run.

    Raises ValueError if its content is damaged, even by one bit, or not a checkpoint; OSError if it
    cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} in it fails its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # What another format holds is not known here. A file without "format" is no checkpoint.
        if checkpoint.get("format", FORMAT) == FORMAT:
            for key, kind in TYPES.items():
                if not isinstance(checkpoint.get(key), kind):
                    raise LookupError(f"it lacks {key}, or that is no {kind.__name__}")
            for name, weight in checkpoint["model"].items():
                if not (isinstance(name, str) and isinstance(weight, torch.Tensor)):
                    raise LookupError(f"{name!r} in its model is no tensor")
            Config(**checkpoint["config"])
    except (
        OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError,
        zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
    ) as error:
        # A damaged file may point outside itself, which the system calls an invalid argument. An
        # error without a number is not of the system: bz2 has one for data that are not its own.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = path  # an error of reading has none
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged or not a checkpoint of this project ({reason})"
        ) from error
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has the checkpoint format {checkpoint['format']} and this version of the"
            f" project has {FORMAT}: use the version that wrote it, or train again"
        )
    return checkpoint


def find_checkpoint(path: str) -> str:
    """The file that `path` names: itself, or of a run's folder best.pt, or if there is none the
    newest. Raises FileNotFoundError if there is none."""
    for file in (path, os.path.join(path, "best.pt"), *list_checkpoints(path)):
        if os.path.isfile(file):
            return file
    raise FileNotFoundError(f"no checkpoint at {path}: train one with train.py, or name another")


def start_from(path: str, changes: dict) -> tuple[Config, dict]:
    """The Config of a new run and the checkpoint that it starts from, with the weights at `path`: a
    file, or the folder of a run or of a Qwen3 model. `changes` are fields of the Config; new knocks
    are left to their start.

    Raises ValueError for weights that do not fit these changes, FileNotFoundError if there are
    none at `path`, and what read_checkpoint and start_from_hf raise.
    """
    if os.path.exists(os.path.join(path, "config.json")):
        return start_from_hf(path, changes)
    if path.endswith((".safetensors", ".json")):
        raise ValueError(f"--init {path}: name the folder of the model, not a file in it")
    if not os.path.exists(path):
        raise FileNotFoundError(f"--init {path}: there is no such file or folder")
    saved = read_checkpoint(find_checkpoint(path))
    config, weights = Config(**{**saved["config"], **changes}), saved["model"]
    with torch.device("meta"):
        wanted = Transformer(config).state_dict()
    for name in {**wanted, **weights}:
        new, old = wanted.get(name), weights.get(name)
        is_new_knock = old is None and ".knock." in name
        field = f"knock_{name.split('.knock.')[0][-1]}"  # blocks.0.attn.wv.knock.up -> knock_v
        if new is None and field in changes:
            raise ValueError(
                f"{path} has trained with {field} {saved['config'][field]}, and its other weights"
                f" rely on that: leave out --{field} {changes[field]}, or start from a run without"
                " that knock"
            )
        if not is_new_knock and (new is None or old is None or new.shape != old.shape):
            given = ", ".join(f"--{field} {value}" for field, value in changes.items())
            raise ValueError(
                f"the weights of {path} do not fit a model with {given or 'its own config'}"
                f" ({name} differs): leave out what changes their shapes"
            )
    if "knock_init" in changes and wanted.keys() <= weights.keys():
        raise ValueError(
            f"--knock_init {changes['knock_init']} is for new knocks, and there are none beside"
            f" those of {path}: leave it out, or add some, such as --knock_v mlp"
        )
    return config, {"model": weights, "step": 0, "tokenizer": saved["tokenizer"]}


def load_checkpoint(path: str, device: str = "cpu") -> tuple[Transformer, dict]:
    """The model in a checkpoint, in evaluation mode, and all else that the checkpoint holds, with
    its "path". Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(Config(**checkpoint["config"]))
    try:
        model.to_empty(device=device).load_state_dict(checkpoint["model"])
    except (RuntimeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not hold the weights of its config") from error
    return model.eval(), {**checkpoint, "path": path}
