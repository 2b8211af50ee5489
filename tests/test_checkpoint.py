"""Checkpoints appear whole or not at all, and nothing but data is read from them."""

import dataclasses
import errno
import math
import os
import shutil
import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from data.checkpoint import (
    FORMAT,
    Saver,
    check_none_newer,
    collect,
    list_checkpoints,
    load_checkpoint,
    read_newest,
    save_checkpoint,
    start_from,
    to_cpu,
)
from kha import Config, Transformer
from tests.reference import SMALL, scramble
from tests.runs import equal_weights, names


def tiny_checkpoint(step):
    model = scramble(Transformer(Config(**SMALL, n_expert=4, top_k=2)), step).eval()
    rest = {"step": step, "tokenizer": "byte", "train": {}, "format": FORMAT}
    config = dataclasses.asdict(model.config)
    return model, {"config": config, "model": model.state_dict(), **rest}


def test_checkpoints_come_back_and_the_last_two_are_kept(tmp_path, strict_disk):
    folder = tmp_path / "run [1]"  # a name that is also a pattern
    folder.mkdir()
    for last, step in ((0, 5), (5, 10), (10, 100)):
        model, checkpoint = tiny_checkpoint(step)
        save_checkpoint(folder, checkpoint, last)
    assert names(folder) == ["step-00000010.pt", "step-00000100.pt"]
    tokens = torch.randint(50, (1, 8))
    for path in (folder, folder / "step-00000100.pt"):
        loaded, checkpoint = load_checkpoint(path)
        assert checkpoint["step"] == 100 and torch.equal(loaded(tokens), model(tokens))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(folder / "none.pt")


@pytest.mark.parametrize("resumes", [False, True])
def test_the_best_is_kept_beside_the_last_two(resumes, tmp_path):
    """A step that was not evaluated has no loss. Of equal losses the first stays the best."""
    losses, bests = [3.0, 2.0, None, 2.0, 2.5, 2.2, 1.0], [1, 2, 2, 2, 2, 2, 7]
    saver = Saver(tmp_path, start=0, best=math.inf)
    for step, (loss, best) in enumerate(zip(losses, bests, strict=True), start=1):
        saver.save({**tiny_checkpoint(step)[1], "val_loss": loss})
        saver.wait()
        checkpoint = load_checkpoint(tmp_path)[1]
        assert checkpoint["step"] == best and checkpoint["path"] == f"{tmp_path}/best.pt"
        if resumes:
            newest = load_checkpoint(tmp_path / f"step-{step:08d}.pt")[1]
            saver = Saver(tmp_path, start=step, best=newest["best_loss"])
    assert names(tmp_path) == ["best.pt", "step-00000006.pt", "step-00000007.pt"]


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()


def test_what_a_killed_run_left_is_not_written_to(tmp_path):
    """It may be best.pt under another name: a run can be killed between two renames."""
    save_checkpoint(tmp_path, tiny_checkpoint(1)[1], best=True)
    for name in ("checkpoint.tmp", "best.tmp"):
        os.link(tmp_path / "best.pt", tmp_path / name)
    before = (tmp_path / "best.pt").read_bytes()
    save_checkpoint(tmp_path, tiny_checkpoint(2)[1], last=1)
    assert (tmp_path / "best.pt").read_bytes() == before
    assert names(tmp_path) == ["best.pt", "step-00000001.pt", "step-00000002.pt"]


def test_on_a_disk_without_second_names_the_best_is_a_whole_copy(
    tmp_path, monkeypatch, strict_disk
):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(tmp_path, tiny_checkpoint(1)[1], best=True)
    assert load_checkpoint(tmp_path / "best.pt")[1]["step"] == 1
    before = (tmp_path / "best.pt").read_bytes()

    def full(_, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left .*: mend that, and --resume goes on"):
        save_checkpoint(tmp_path, tiny_checkpoint(2)[1], best=True)
    assert names(tmp_path) == ["best.pt", "step-00000001.pt"]
    assert (tmp_path / "best.pt").read_bytes() == before


def test_a_disk_that_cannot_sync_folders_takes_checkpoints(tmp_path, monkeypatch):
    """Some network disks call that an invalid argument. Any other error ends the run."""
    fsync, number = os.fsync, errno.EINVAL

    def fail(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, tiny_checkpoint(step)[1], last=step - 1)
    assert names(tmp_path) == ["step-00000002.pt", "step-00000003.pt"]
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error") as error:
        save_checkpoint(tmp_path, tiny_checkpoint(4)[1], last=3)
    assert error.value.filename == tmp_path
    assert names(tmp_path) == ["step-00000002.pt", "step-00000003.pt", "step-00000004.pt"]


@pytest.fixture
def slow_save(monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (time.sleep(0.2), save(*args)))


def test_an_error_elsewhere_waits_for_the_checkpoint(tmp_path, slow_save):
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path, start=0, best=math.inf) as saver:
        saver.save({**tiny_checkpoint(1)[1], "val_loss": None})
        raise KeyboardInterrupt
    assert names(tmp_path) == ["step-00000001.pt"]


def trained_once():
    model = Transformer(Config(**SMALL, n_expert=4, top_k=2))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def test_all_checkpoints_are_copied_into_memory_that_is_made_at_the_start(tmp_path):
    def tensors(state):
        moments = [m for of_one in state["optimizer"]["state"].values() for m in of_one.values()]
        return [t.data_ptr() for t in (*state["model"].values(), *moments) if t.dim()]

    model, optimizer = trained_once()
    with Saver(tmp_path, start=0, best=math.inf, model=model) as saver:
        saver.wait()
        reserved = set(tensors(saver.memory))
        first = tensors(saver.collect(model, optimizer))
        assert len(first) > 60 and set(first) <= reserved
        optimizer.step()
        second = saver.collect(model, optimizer)
        assert tensors(second) == first
    assert equal_weights(second["model"], model.state_dict())
    for name, p in model.named_parameters():
        assert equal_weights(second["optimizer"]["state"][name], optimizer.state[p])


@pytest.mark.parametrize("start,n_fit,warns", [(0, 3, True), (0, 4, False), (9, 3, False)])
def test_a_new_run_on_a_small_disk_is_told_so(
    tmp_path, monkeypatch, capsys, start, n_fit, warns
):
    model, _ = trained_once()
    size = 12 * sum(w.numel() for w in model.state_dict().values())
    usage = shutil.disk_usage(tmp_path)._replace(free=n_fit * size)
    monkeypatch.setattr(shutil, "disk_usage", {tmp_path: usage}.get)
    with Saver(tmp_path, start, best=math.inf, model=model):
        pass
    warning = capsys.readouterr().err
    assert ("may come to hold four checkpoints" in warning) == warns


def test_only_the_first_process_keeps_a_copy(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    kept = collect(*trained_once())
    assert len(kept["model"]) > 20 and set(kept["model"].values()) == {None}
    moments = [m for of_one in kept["optimizer"]["state"].values() for m in of_one.values()]
    assert len(moments) > 40 and set(moments) == {None}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_says_that_a_run_goes_on_from_an_older_one(
    rank, tmp_path, monkeypatch, capsys
):
    for step in (1, 2):
        save_checkpoint(tmp_path, tiny_checkpoint(step)[1], last=step - 1)
    (tmp_path / "step-00000002.pt").write_bytes(b"")
    monkeypatch.setenv("RANK", rank)
    assert read_newest(list_checkpoints(str(tmp_path)))["step"] == 1
    assert ("going on from the checkpoint before it" in capsys.readouterr().err) == (rank == "0")


def test_a_new_run_does_not_replace_a_best_checkpoint_that_stands_alone(tmp_path):
    """As it does while another run's first checkpoint gets its names: best.pt comes first."""
    save_checkpoint(tmp_path, tiny_checkpoint(1)[1])
    (tmp_path / "step-00000001.pt").rename(tmp_path / "best.pt")
    with pytest.raises(ValueError, match="another run has saved .*best.pt"):
        check_none_newer(str(tmp_path), 0)
    check_none_newer(str(tmp_path), 1)  # a run that goes on from it


def test_a_checkpoint_is_on_the_disk_before_the_next_takes_its_memory(tmp_path, slow_save):
    model, optimizer = trained_once()
    before = to_cpu(model.state_dict())
    checkpoint = {**tiny_checkpoint(1)[1], "val_loss": None}
    with Saver(tmp_path, start=0, best=math.inf, model=model) as saver:
        saver.save(checkpoint | saver.collect(model, optimizer))
        optimizer.step()
        saver.collect(model, optimizer)
    assert equal_weights(load_checkpoint(tmp_path)[0].state_dict(), before)


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    save_checkpoint(tmp_path, tiny_checkpoint(1)[1])
    path = tmp_path / "step-00000001.pt"
    whole = path.read_bytes()
    flipped = []
    for record in zipfile.ZipFile(path).infolist():  # one bit, in each of the tensors
        if "/data/" in record.filename:
            name, extra = struct.unpack("<HH", whole[record.header_offset + 26 :][:4])
            start = record.header_offset + 30 + name + extra
            copy = bytearray(whole)
            copy[start + record.file_size // 2] ^= 1 << len(flipped) % 8
            flipped.append(bytes(copy))
    assert len(flipped) > 20
    entry = whole.index(b"PK\1\2")  # of the first record, with its way of compression: here bz2
    flipped.append(whole[: entry + 10] + b"\x0c" + whole[entry + 11 :])
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], *flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "model": []},
        lambda c: {**c, "model": {}},
        lambda c: {**c, "model": {name: "text" for name in c["model"]}},
        lambda c: {**c, "model": {1: torch.zeros(1)}},
        lambda c: {**c, "step": "1"},
        lambda c: {**c, "tokenizer": 1},
        lambda c: {**c, "config": {}},
        lambda c: {name: c[name] for name in c if name != "tokenizer"},
        lambda c: {name: c[name] for name in c if name != "step"},
        lambda c: {name: c[name] for name in c if name != "format"},
        lambda c: c["model"],
        lambda c: [1],
    ],
)
def test_what_is_whole_but_no_checkpoint_is_refused_in_one_line(change, tmp_path):
    torch.save(change(tiny_checkpoint(1)[1]), tmp_path / "step-00000001.pt")
    message = "not a checkpoint of this project|does not hold the weights"
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not a checkpoint of this project|do not fit a model"):
        start_from(str(tmp_path), {})


def test_another_format_is_named(tmp_path):
    save_checkpoint(tmp_path, {"format": FORMAT - 1, "step": 1, "weights": {}})
    with pytest.raises(ValueError, match="has the checkpoint format 2 and this version .* has 3"):
        load_checkpoint(tmp_path)
