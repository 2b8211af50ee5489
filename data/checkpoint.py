"""Checkpoints: one file of tensors and plain data, never code."""

import errno
import glob
import os
import pickle
import zipfile
import zlib

import torch

from kha import Config, Transformer


def save_checkpoint(folder: str, checkpoint: dict) -> None:
    """Write a checkpoint to folder/step-N.pt, N its "step", and remove all but the last two up to it: later ones can
    only be damaged, a run that finds them whole goes on from them.

    The file appears whole or not at all: it is written under another name, brought to the disk and then renamed.
    Raises OSError if it cannot be written; the earlier ones then stand.
    """
    name = f"step-{checkpoint['step']:08d}.pt"
    temporary = os.path.join(folder, "checkpoint.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = ("" if isinstance(error, OSError) else "as on a full disk: ") + str(error).split("\n")[0]
        raise OSError(f"cannot save to {folder} ({reason}): the earlier checkpoints there stand") from error
    os.replace(temporary, os.path.join(folder, name))
    if os.name == "posix":  # bring the new name to the disk before an old file goes
        entries = os.open(folder, os.O_RDONLY)
        os.fsync(entries)
        os.close(entries)
    there = list_checkpoints(folder)
    last_two = [path for path in there if os.path.basename(path) <= name][:2]
    for path in set(there) - set(last_two):
        os.remove(path)


def list_checkpoints(folder: str) -> list[str]:
    """The checkpoints in a run's folder, newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"step-{8 * '[0-9]'}.pt")), reverse=True)


def read_checkpoint(path: str) -> dict:
    """What save_checkpoint wrote: tensors, on the CPU, and plain data; code in the file is never run.

    Raises ValueError if the file is damaged, be it by one bit, or not a checkpoint; OSError if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} in it fails its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        Config(**checkpoint["config"])
        if missing := {"model", "step", "tokenizer"} - set(checkpoint):
            raise LookupError(f"it lacks {', '.join(sorted(missing))}")
        return checkpoint
    except (
        OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error,
        pickle.UnpicklingError,
    ) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a seek to where a damaged file points
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error


def load_checkpoint(path: str, device: str = "cpu") -> tuple[Transformer, dict]:
    """The model in a checkpoint, in evaluation mode, and all else that the checkpoint holds. `path` names a file, or a
    run's folder for the newest in it.

    Raises FileNotFoundError if there is none, ValueError if it is damaged.
    """
    if os.path.isdir(path) and list_checkpoints(path):
        path = list_checkpoints(path)[0]
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}: train one with train.py, or name another")
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(Config(**checkpoint["config"]))
    try:
        model.to_empty(device=device).load_state_dict(checkpoint["model"])
    except (RuntimeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not hold the weights of its config") from error
    return model.eval(), checkpoint
