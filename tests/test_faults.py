"""Whatever ends or disturbs a run, nothing is lost."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

import train
from data.checkpoint import Saver, best_so_far, list_checkpoints, load_checkpoint, save_checkpoint
from data.evaluation import evaluate
from data.log import Log, Progress
from kha import Transformer
from tests.report import read_log
from tests.runs import (
    LIMIT,
    LONG,
    ROOT,
    SHORT,
    assert_same_run,
    at_step,
    change_token,
    contents,
    equal_weights,
    limit_files,
    lines_of,
    names,
    run_process,
    untimed,
    weights_of,
)
from train import main, parse_config

# --- kill -9 ---


def test_killed_at_any_moment_and_resumed_is_the_same_run(data, tmp_path, monkeypatch):
    """It is killed at 25 random moments, some while it starts, some after a random part of a few
    steps; then until one was in the middle of writing a checkpoint. The processes are children of a
    server that has imported torch, so that a start costs little."""
    args = [*SHORT, *"--steps 200 --save_every 1 --eval_every 20".split(), "--data", str(data)]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # or the server would not find train
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(out, *more):
        process = context.Process(target=main, args=([*args, "--out", str(out), *more],))
        process.start()
        return process

    clock = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    step_time = (time.monotonic() - clock) / 200
    out, killed, in_writing, reached, rng = tmp_path / "killed", 0, 0, 0, random.Random(1)
    log, unfinished = out / "log.jsonl", out / "checkpoint.tmp"

    def size():
        return log.stat().st_size if log.exists() else 0

    while killed < 25 or not in_writing:
        process = start(out, "--resume")  # from the start if no checkpoint is there yet
        if killed >= 25:
            while not unfinished.exists() and process.is_alive():
                pass
        elif killed % 4:
            while size() <= reached and process.is_alive():
                time.sleep(step_time / 20)
        if killed < 25:
            time.sleep(rng.uniform(0, 4 * step_time))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed often enough"
        killed, reached = killed + 1, max(reached, size())
        if unfinished.exists():
            in_writing += 1
            unfinished.unlink()  # to see the next one
    assert list_checkpoints(out)
    last = start(out, "--resume")
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "whole", out)
    assert names(out) == ["best.pt", "log.jsonl", "step-00000199.pt", "step-00000200.pt"]


def test_a_finished_run_resumes_to_its_sample(whole, halves, data, capsys, monkeypatch):
    monkeypatch.setattr(Saver, "reserve", None)  # it needs no memory for checkpoints
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    output = capsys.readouterr().out
    assert "going on after step 30" in output
    assert "nothing to train: all 30 steps are done (give more --steps)" in output
    assert_same_run(whole, halves)
    assert sum("config" in line for line in lines_of(halves)) == 1


def test_settings_given_with_resume_replace_those_of_the_run(whole, halves, data):
    (halves / "step-00000030.pt").unlink()
    changed = ["--weight_decay", "0.9", "--beta1", "0.5", "--beta2", "0.6"]
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume", *changed])
    groups = load_checkpoint(halves)[1]["optimizer"]["param_groups"]
    now = {(*group["betas"], group["weight_decay"]) for group in groups}
    assert now == {(0.5, 0.6, 0.9), (0.5, 0.6, 0.0)}
    assert untimed(halves)[:20] == untimed(whole)[:20] and untimed(halves)[-1] != untimed(whole)[-1]
    before, now = [line for line in lines_of(halves) if "config" in line]  # the log has both
    assert (before["step"], before["train"]["beta1"]) == (0, 0.9)
    assert (now["step"], now["train"]["beta1"]) == (20, 0.5)


@pytest.mark.parametrize(
    "change,rates", [("--steps 300", "0.00102 to 0.003"), ("--lr 0.001", "0.00102 to 0.000339")]
)
def test_a_resume_says_if_the_learning_rate_jumps(change, rates, halves, capsys, monkeypatch):
    (halves / "step-00000030.pt").unlink()
    for small in ([], ["--lr", "0.0032"]):
        parse_config(["--out", str(halves), "--resume", *small])
        assert capsys.readouterr().err == ""
    parse_config(["--out", str(halves), "--resume", *change.split()])
    assert f"warning: the learning rate goes from {rates} at step 21" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # of the processes of torchrun only the first one says so
    parse_config(["--out", str(halves), "--resume", *change.split()])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux")
def test_a_run_does_not_keep_the_file_from_which_it_goes_on(halves, data):
    """The file is mapped into memory. If it stayed there, its space would not be free when the run
    has removed it."""
    maps = []

    def look():
        maps.append(Path("/proc/self/maps").read_text())

    (halves / "step-00000030.pt").unlink()
    with at_step(20, look), at_step(29, look):
        main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    assert "step-00000020.pt" in maps[0] and "step-00000020.pt" not in maps[-1]


def test_a_run_cannot_go_back(halves, data):
    with pytest.raises(ValueError, match="has done 30 steps, more .*: give --steps 31 or more"):
        main([*SHORT, "--data", str(data), "--out", str(halves), "--resume", "--steps", "25"])


# --- another run in the same folder ---


def save_meanwhile(monkeypatch, source, out):
    """Between the look of a run for checkpoints and its lock on the folder, another run saves what
    is in `source`, and ends. Returns a dict that gets what the folder then holds."""
    build_model, then = train.build_model, {}

    def build(*args):
        monkeypatch.setattr(train, "build_model", build_model)
        shutil.copytree(source, out, dirs_exist_ok=True)
        then.update(contents(out))
        return build_model(*args)

    monkeypatch.setattr(train, "build_model", build)
    return then


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["new", "resumed, if there is one"])
def test_a_new_run_does_not_replace_one_that_was_faster(
    options, whole, data, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    then = save_meanwhile(monkeypatch, whole, out)
    with pytest.raises(ValueError, match="another run has saved .*step-00000030.pt .* --resume"):
        main([*SHORT, "--data", str(data), "--out", str(out), *options])
    assert then and contents(out) == then
    main([*SHORT, "--data", str(data), "--out", str(out), "--resume"])  # as the message says
    assert_same_run(whole, out)


def test_a_run_saves_nothing_in_a_folder_that_is_anothers_now(data, tmp_path):
    """Its user has deleted the folder, and begun another run there."""
    out = tmp_path / "run"

    def begin_another():
        shutil.rmtree(out)
        out.mkdir()
        (out / "log.jsonl").touch()

    with at_step(3, begin_another), pytest.raises(ValueError, match="was replaced while this run"):
        main([*SHORT, "--data", str(data), "--out", str(out)])
    assert names(out) == ["log.jsonl"]


def test_a_resumed_run_does_not_replace_one_that_was_faster(whole, halves, data, monkeypatch):
    (halves / "step-00000030.pt").unlink()
    then = save_meanwhile(monkeypatch, whole, halves)
    with pytest.raises(ValueError, match="another run has saved .*step-00000030.pt .* --resume"):
        main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    assert then and contents(halves) == then


@pytest.mark.parametrize("name", [30, 40])
def test_a_run_goes_on_from_a_checkpoint_that_the_user_has_renamed(name, halves, data, capsys):
    """It is the newest by name, even if another one has done more steps."""
    shutil.copyfile(halves / "step-00000020.pt", halves / f"step-{name:08d}.pt")
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    assert "going on after step 20" in capsys.readouterr().out


# --- damage ---


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, halves, data, capsys):
    newest = halves / "step-00000030.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    captured = capsys.readouterr()
    assert "going on after step 20" in captured.out
    for words in ("warning", "step-00000030.pt", "checkpoint before it"):
        assert words in captured.err
    assert_same_run(whole, halves)


@pytest.mark.parametrize("n_rename", range(5))
def test_killed_between_renames_a_run_ends_with_the_same_best(
    n_rename, whole, data, tmp_path, monkeypatch
):
    """Held-out losses are made to be lowest at step 20. So the renames are to best.pt, step 10,
    best.pt, step 20 and step 30. The run is killed before one of these."""
    lowest = load_checkpoint(whole / "step-00000020.pt")[1]["val_loss"]
    monkeypatch.setattr(train, "evaluate", lambda *args: abs(evaluate(*args) - lowest))
    args = [*SHORT, "--data", str(data), "--out", str(tmp_path)]
    replace, done = os.replace, []

    def rename(*names):
        if len(done) == n_rename:
            raise KeyboardInterrupt
        done.append(replace(*names))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", rename)
        main(args)
    main([*args, "--resume"])
    assert load_checkpoint(tmp_path)[1]["step"] == 20
    assert names(tmp_path) == ["best.pt", "log.jsonl", "step-00000020.pt", "step-00000030.pt"]


@pytest.mark.parametrize(
    "before,now,best",
    [(512, 544, 30), (512, 543, 20), (10**6, 512, 30), (10**6, 10**7, 20), (None, 512, 30)],
)
def test_losses_on_other_tokens_are_not_compared(before, now, best, halves, data, capsys):
    """Whole sequences of 32 tokens are read, and there are fewer than 10**6 held-out tokens. With
    None the checkpoint is of an older version, which did not save the best loss."""
    checkpoint = load_checkpoint(halves / "step-00000020.pt")[1] | {"best_loss": 0.1}
    checkpoint["train"]["eval_tokens"] = before or now
    for key in ["path"] if before else ["path", "best_loss"]:
        del checkpoint[key]
    save_checkpoint(halves, checkpoint, best=True)
    args = ["--data", str(data), "--out", str(halves), "--resume", "--eval_tokens", str(now)]
    main([*SHORT, *args])
    assert load_checkpoint(halves)[1]["step"] == best
    assert ("after an evaluation replaces it" in capsys.readouterr().err) == (best == 30)


def test_of_held_out_tokens_the_last_is_only_a_target():
    before = {"config": {"block_size": 32}, "train": {"eval_tokens": 32}, "best_loss": 1.0}
    before["step"] = 10
    assert best_so_far(before, 10**6, held_out=64) == 1
    assert best_so_far(before, 10**6, held_out=65) == float("inf")


def test_a_run_of_which_only_the_best_is_left_goes_on_from_it(whole, halves, data):
    """Nor does a new run take its place."""
    shutil.copyfile(halves / "step-00000020.pt", halves / "best.pt")
    for path in halves.glob("step-*.pt"):
        path.unlink()
    args = [*SHORT, "--data", str(data), "--out", str(halves)]
    before = contents(halves)
    with pytest.raises(ValueError, match="holds a run already"):
        main(args)
    assert contents(halves) == before
    main([*args, "--resume"])
    assert untimed(halves) == untimed(whole)
    assert equal_weights(weights_of(halves), weights_of(whole))


def test_a_log_alone_is_a_run_too(data, tmp_path, capsys, monkeypatch):
    """Of a run without checkpoints it is all there is. A log without updates is nobody's loss."""
    args = [*SHORT, "--data", str(data), "--out", str(tmp_path / "run"), "--save_every", "0"]
    main([*args, "--steps", "3"])
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="holds the log of a run without checkpoints"):
        main([*args, "--steps", "3"])
    assert contents(tmp_path / "run") == before
    capsys.readouterr()
    main([*args, "--steps", "4", "--resume"])  # as torchrun does, and the message says
    assert "so the run starts again, with the settings" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # of the processes of torchrun only the first one says so
    parse_config([*args, "--resume"])
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RANK")
    assert len(read_log(tmp_path / "run")[0]) == 4
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(before[log].splitlines(keepends=True)[0])
    main([*args, "--steps", "2"])
    assert len(read_log(tmp_path / "run")[0]) == 2


def test_with_all_checkpoints_damaged_nothing_is_touched(halves, run_here):
    for path in halves.glob("*.pt"):
        os.truncate(path, path.stat().st_size // 2)
    before = contents(halves)
    done = run_here(main, "--out", halves, "--resume")
    assert done.returncode == 2 and done.stdout == ""
    *warnings, error = done.stderr.splitlines()
    assert len(warnings) == 2 and all("warning" in warning for warning in warnings)
    assert "error" in error and "best.pt is damaged" in error
    assert error.endswith("(to start again, choose another --out)")
    assert contents(halves) == before


def test_a_disk_that_cannot_read_is_not_a_damaged_checkpoint(halves, monkeypatch):
    """It may be whole: to go on from the one before would remove it."""

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        parse_config(["--out", str(halves), "--resume"])
    assert error.value.filename == str(halves / "step-00000030.pt")


def test_a_run_from_before_a_field_has_its_default(halves):
    checkpoint = load_checkpoint(halves)[1]
    del checkpoint["config"]["tie_embeddings"], checkpoint["path"]
    save_checkpoint(halves, checkpoint)
    args = ["--out", str(halves), "--resume"]
    assert parse_config([*args, "--tie_embeddings"])[0].tie_embeddings
    message = r"--tie_embeddings False differs from the run in .* \(True\)"
    with pytest.raises(ValueError, match=message):
        parse_config([*args, "--no-tie_embeddings"])


@pytest.mark.parametrize("weight", [None, torch.zeros(8, 9)], ids=["missing", "of another shape"])
def test_a_checkpoint_without_all_weights_is_refused(weight, halves, data):
    checkpoint = load_checkpoint(halves)[1]
    name, weights = "blocks.0.attn.wv.knock.up", checkpoint["model"]
    weights[name] = weight
    if weight is None:
        del weights[name]
    del checkpoint["path"]
    save_checkpoint(halves, checkpoint)
    before = contents(halves)
    with pytest.raises(ValueError, match="of step 30 does not hold the weights of its config"):
        main([*SHORT, "--data", str(data), "--out", str(halves), "--resume", "--steps", "40"])
    assert contents(halves) == before


def test_a_weight_without_its_moments_is_refused(halves, data):
    checkpoint = load_checkpoint(halves)[1]
    del checkpoint["optimizer"]["state"]["blocks.0.attn.wv.knock.up"], checkpoint["path"]
    save_checkpoint(halves, checkpoint)
    with pytest.raises((RuntimeError, LookupError), match=r"blocks\.0\.attn\.wv\.knock\.up"):
        main([*SHORT, "--data", str(data), "--out", str(halves), "--resume", "--steps", "40"])


def test_a_checkpoint_of_another_version_is_refused(halves):
    checkpoint = load_checkpoint(halves)[1]
    save_checkpoint(halves, {**checkpoint, "train": {**checkpoint["train"], "dropout": 0.1}})
    with pytest.raises(ValueError, match="not of this version of train.py .*'dropout'"):
        parse_config(["--out", str(halves), "--resume"])


@pytest.mark.parametrize("step", [25, 35])
def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(step, tmp_path):
    """Run back to step 20, a run saves at another step than before. What it keeps must be two whole
    files."""
    config = dataclasses.asdict(parse_config(["toy"])[0])
    checkpoint = {"config": config, "model": {}, "tokenizer": "byte"}
    save_checkpoint(tmp_path, {**checkpoint, "step": 20})
    (tmp_path / "step-00000030.pt").write_bytes(b"damaged")
    (tmp_path / "step-best.pt").write_bytes(b"a copy of the user's")
    save_checkpoint(tmp_path, {**checkpoint, "step": step}, last=20)
    assert names(tmp_path) == ["step-00000020.pt", f"step-000000{step}.pt", "step-best.pt"]


def test_a_disk_full_while_saving_leaves_the_earlier_checkpoint(whole, halves, data, run_here):
    (halves / "step-00000030.pt").unlink()
    args = [*SHORT, "--data", str(data), "--out", str(halves), "--resume"]
    with limit_files(50_000):
        done = run_here(main, *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: cannot save to {halves}" in done.stderr
    assert "mend that, and --resume goes on from the checkpoints there" in done.stderr
    assert names(halves) == ["best.pt", "log.jsonl", "step-00000020.pt"]
    main(args)
    assert_same_run(whole, halves)


def test_a_disk_full_while_logging_leaves_half_a_line_at_most(whole, halves, data, run_here):
    (halves / "step-00000030.pt").unlink()
    args = [*SHORT, "--data", str(data), "--out", str(halves), "--resume"]
    with limit_files(len((halves / "log.jsonl").read_bytes()) - 100):
        done = run_here(main, *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: cannot write {halves}/log.jsonl" in done.stderr
    assert "--resume goes on from the checkpoints there" in done.stderr
    main(args)
    assert_same_run(whole, halves)


def test_a_full_disk_is_named_before_the_log_begins(tmp_path):
    """The peers in tests/peers.py write lines without `begin`."""
    log = Log(str(tmp_path), 0)
    with limit_files(3), pytest.raises(OSError, match="cannot write .*log.jsonl .*starts again"):
        log.write(step=1)


def test_a_disk_that_is_full_when_the_log_is_brought_to_it(data, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    assert error.value.filename == str(tmp_path / "log.jsonl")
    assert names(tmp_path) == ["log.jsonl"]


# --- what is printed ---


@pytest.mark.parametrize(
    "text,encoding,shown", [("a line", "utf-8", "a line\n"), ("naïve 漢字", "ascii", "na?ve ??\n")]
)
def test_each_line_is_out_at_once_in_any_encoding(text, encoding, shown, tmp_path, monkeypatch):
    """A process that is killed after it has printed. It does without torch, which starts slowly."""
    script = tmp_path / "prints.py"
    script.write_text("""
import os, signal
from data.script import run_script

run_script(lambda argv: (print(argv[0]), os.kill(os.getpid(), signal.SIGKILL)))
""")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    done = run_process(text, script=script, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, shown), done.stderr


@pytest.mark.parametrize(
    "error,code,shown",
    [(KeyboardInterrupt(), 130, ""),
     (OSError("two\n lines"), 2, "test_faults.py: error: two lines\n"),
     (OSError("tried to allocate"), 2, "test_faults.py: error: tried to allocate\n"),
     (MemoryError(), 2, "test_faults.py: error: too little memory, ask for less.\n")],
)
def test_what_ends_a_script_is_one_line_at_most(error, code, shown, run_here):
    def end(argv):
        raise error

    done = run_here(end)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", shown)


def test_an_error_that_we_do_not_raise_says_where_it_is(run_here):
    """It may be in code that the user has changed."""
    def end(argv):
        one, two = argv

    done = run_here(end, 1, 2, 3)
    line = end.__code__.co_firstlineno + 1
    assert done.stderr == (
        "test_faults.py: error: too many values to unpack (expected 2)"
        f" (tests/test_faults.py:{line})\n"
    )


@pytest.mark.parametrize("size", [2**50, 2**62])
def test_too_little_memory_is_one_line_also_in_torchs_words(size, run_here):
    done = run_here(lambda argv: torch.zeros(size))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: too little memory, ask for less. " in done.stderr


def test_another_error_of_torch_is_a_fault_and_keeps_its_traceback(run_here):
    with pytest.raises(RuntimeError, match="must match"):
        run_here(lambda argv: torch.zeros(2) + torch.zeros(3))


def test_an_error_of_the_system_has_no_place(run_here):
    done = run_here(lambda argv: os.close(99_999))
    assert done.stderr == "test_faults.py: error: [Errno 9] Bad file descriptor\n"


def test_an_error_of_ours_needs_no_place_however_a_script_is_named(tmp_path):
    link = tmp_path / "link.py"
    link.symlink_to(ROOT / "data/prepare.py")
    for script in (link, "tests/../data/prepare.py"):
        done = run_process("--val_fraction", 3, script=script)
        assert done.stderr.endswith("at most 0.5, not 3\n")


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    progress = Progress(total=3, done=0)
    for step, seconds in ((1, 3600), (2, -1), (3, 3600)):
        monkeypatch.setattr("data.log.SECONDS_A_LINE", seconds)
        progress.update({"step": step, "loss": 0.00123, "tokens_per_s": 3987.6})
    shown = "loss 0.0012  3,988 tokens/s"
    assert capsys.readouterr().out == f"step 2 of 3: {shown}\nstep 3 of 3: {shown}\n"


# --- updates that are not finite, spikes ---


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the loss NaN (or with `gradient` the gradient) in the updates that it
    is given, counted from 1. It returns a dict that gets the weights before each update."""
    lr_at, forward, now = train.lr_at, Transformer.forward, {}

    def install(steps, gradient=False):
        weights = {}

        def at(step, settings):
            now["step"] = step + 1
            return lr_at(step, settings)

        def poisoned(model, tokens, targets=None, **past):
            loss = forward(model, tokens, targets, **past)
            if model.training and targets is not None:
                state = model.state_dict().items()
                before = {name: x.clone() for name, x in state if "load" not in name}
                weights.setdefault(now["step"], before)
                if now["step"] in steps and gradient:
                    loss.register_hook(lambda grad: grad * float("nan"))
                elif now["step"] in steps:
                    return loss + float("nan")
            return loss

        monkeypatch.setattr(train, "lr_at", at)
        monkeypatch.setattr(Transformer, "forward", poisoned)
        return weights

    return install


@pytest.mark.parametrize("gradient", [False, True])
def test_an_update_that_is_not_finite_is_skipped_and_logged(
    gradient, poison, data, tmp_path, capsys
):
    weights = poison({3, 14, 15, 30}, gradient)
    main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    assert "loss or gradient was not finite: 4 (a lower --lr may help)\n" in capsys.readouterr().out
    for step in range(1, 30):
        assert equal_weights(weights[step], weights[step + 1]) == (step in (3, 14, 15))
    updates, before = read_log(tmp_path)[0], 0
    for line in updates:  # the data of an update is a function of its step
        skipped = line["step"] in (3, 14, 15, 30)
        assert line["skipped"] == before + skipped
        assert (line["grad_norm" if gradient else "loss"] == "NaN") == skipped
        before = line["skipped"]
    assert all(x.isfinite().all() for x in weights_of(tmp_path).values())
    assert "step-00000030.pt" in names(tmp_path)  # the end is saved all the same


def test_a_run_saved_before_its_first_update_goes_on_the_same(poison, data, tmp_path):
    """The state of the optimizer is not there yet, and must not be made up."""
    args = [*SHORT, "--data", str(data), "--out"]
    poison({1, 2})
    main([*args, str(tmp_path / "whole")])
    with at_step(0, lambda: signal.raise_signal(signal.SIGTERM)):
        main([*args, str(tmp_path / "halves")])
    assert load_checkpoint(tmp_path / "halves")[1]["step"] == 1
    main([*args, str(tmp_path / "halves"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_ten_skipped_updates_in_a_row_end_the_run(poison, data, tmp_path):
    args = [*SHORT, "--save_every", "4", "--data", str(data), "--out", str(tmp_path)]
    poison({5, *range(10, 100)})
    message = "10 updates in a row, the last step 19, .* --resume and a lower --lr"
    with pytest.raises(ValueError, match=message):
        main(args)
    # Weights that make every loss NaN would be in the later ones.
    assert names(tmp_path) == ["log.jsonl", "step-00000004.pt", "step-00000008.pt"]
    assert read_log(tmp_path)[0][-1]["step"] == 19 and read_log(tmp_path)[0][-1]["skipped"] == 11
    poison({5})
    main([*args, "--resume"])
    assert [line["skipped"] for line in read_log(tmp_path)[0]] == [0] * 4 + [1] * 26


def test_ten_skipped_updates_before_a_checkpoint(poison, data, tmp_path):
    poison({*range(5, 100)})
    message = "10 updates in a row, the last step 14, .*: start again with a lower --lr"
    with pytest.raises(ValueError, match=message):
        main([*SHORT, "--save_every", "20", "--data", str(data), "--out", str(tmp_path)])


def write_log(out, losses, skipped=()):
    """A log of these losses, as train.main would write it; returns it, still open."""
    log = Log(str(out), 0, writes=True)
    for step, loss in enumerate(losses, start=1):
        log.count(loss, finite=step not in skipped)
        log.write(step=step, loss=loss, spikes=log.spikes, skipped=log.skipped)
    return log


def counts(log):
    return log.spikes, log.skipped, log.skipped_in_a_row, list(log.losses)


def test_losses_far_above_the_median_count_as_spikes(tmp_path):
    """Of 9, 10, 11 in turn the median is 10 and the median deviation 1. So a spike is above
    10 + 6 * 1.4826 = 18.9."""
    even = [9.0, 10.0, 11.0] * 40
    for losses, n_spike in [([], 0), ([18.8], 0), ([19], 1), ([19, 10, 25], 2), ([-100], 0)]:
        assert write_log(tmp_path, [*even, *losses]).spikes == n_spike
    assert write_log(tmp_path, [*even[:19], 1e9]).spikes == 0  # too early to tell
    assert write_log(tmp_path, [*even[:20], 1e9]).spikes == 1
    # Of the 100 before: an old level is forgotten.
    assert write_log(tmp_path, [100.0, 101.0, 102.0] * 70 + even + [90.0]).spikes == 1
    # What was skipped is neither a spike nor in the median.
    assert write_log(tmp_path, [*even, float("nan"), 1e9, 19], skipped=(121, 122)).spikes == 1


def test_counts_go_on_after_a_resume(tmp_path):
    losses = [9.0, 10.0, 11.0] * 20 + [19.0, float("nan"), 10.0, float("nan"), float("inf")]
    log = write_log(tmp_path, losses, skipped=(62, 64, 65))
    again = Log(str(tmp_path), 65, writes=False)
    assert counts(again) == counts(log) and counts(log)[:3] == (1, 3, 2)
    assert counts(Log(str(tmp_path), 63, writes=False))[:3] == (1, 1, 0)


@pytest.mark.parametrize(
    "end",
    [b'{"step": 9, "lo', b'{"step": 9, "loss": 1, "skipped": 0}', b"\0" * 20 + b"\n", b"[9]\n{}\n"],
)
def test_what_was_logged_after_the_checkpoint_is_cut_off(end, tmp_path):
    write_log(tmp_path, [5.0] * 8)
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + end)
    Log(str(tmp_path), 8, writes=True).write(step=9)
    assert path.read_bytes() == b"".join(lines) + b'{"step": 9}\n'
    Log(str(tmp_path), 6, writes=True)
    assert path.read_bytes() == b"".join(lines[:6])
    path.write_bytes(b"".join(lines)[:-1])  # what comes next would be in the same line
    with pytest.raises(ValueError, match="log.jsonl is damaged after step 7"):
        Log(str(tmp_path), 8)


@pytest.mark.parametrize("damage", ['"step"; 12', '"step": 12, "loss": "x", "was": 1'])
def test_a_log_damaged_before_the_checkpoint_is_not_thrown_away(damage, halves, data):
    path = halves / "log.jsonl"
    damaged = re.sub('"step": 12, "loss": [^,]*', damage, path.read_text())
    path.write_text(damaged)
    args = [*SHORT, "--data", str(data), "--out", str(halves), "--resume"]
    with pytest.raises(ValueError, match="log.jsonl is damaged after step 11"):
        main(args)
    assert path.read_text() == damaged
    path.unlink()  # as the message says
    Log(str(halves), 30)  # as a run that is killed at its start
    main(args)


def test_a_long_log_is_read_without_counting_its_spikes_again(tmp_path, monkeypatch):
    """So a resume costs little: one line of JSON for each update, and no median."""
    lines = [{"step": i, "loss": 2.0, "spikes": i // 100, "skipped": 0} for i in range(1, 10_001)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loads, medians, parsed = json.loads, [], []

    def count_loads(line):
        parsed.append(1)
        return loads(line)

    monkeypatch.setattr("data.log.statistics.median", medians.append)
    monkeypatch.setattr("data.log.json.loads", count_loads)
    log = Log(str(tmp_path), 10_000)
    assert counts(log) == (100, 0, 0, [2.0] * 100)
    assert len(parsed) == 10_000 and not medians


# --- saving in a thread ---


def test_training_goes_on_while_a_checkpoint_is_written(whole, data, tmp_path, monkeypatch):
    """The disk takes the checkpoint of step 20 only when the log has step 25."""
    save, log = torch.save, tmp_path / "log.jsonl"

    def slow(checkpoint, path):
        deadline = time.monotonic() + LIMIT
        while checkpoint["step"] == 20 and log.read_text().count('"loss"') < 25:
            assert time.monotonic() < deadline, "training waits for the disk"
            time.sleep(0.01)
        save(checkpoint, path)

    monkeypatch.setattr(torch, "save", slow)
    main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    assert_same_run(whole, tmp_path)
    then, right = (load_checkpoint(out / "step-00000020.pt")[1] for out in (tmp_path, whole))
    assert equal_weights(then["model"], right["model"])
    for name, state in right["optimizer"]["state"].items():
        assert equal_weights(then["optimizer"]["state"][name], state)


@pytest.mark.parametrize(
    "error,step,message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10, "No space .*--resume starts again"),
        (RuntimeError("unexpected pos"), 10, "cannot save to .*as on a full disk: unexpected pos"),
        (TypeError("a slip in the code"), 10, "a slip in the code"),
        (TypeError("a slip in the code"), 30, "a slip in the code"),  # the last checkpoint
    ],
)
def test_an_error_of_the_thread_ends_the_run(error, step, message, data, tmp_path, monkeypatch):
    save = torch.save

    def fail(checkpoint, path):
        save(checkpoint, path)
        if checkpoint["step"] == step:
            raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((OSError, TypeError), match=message) as raised:
        main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    assert "\n" not in str(raised.value)
    saved = {10: [], 30: ["step-00000010.pt", "step-00000020.pt"]}[step]
    assert [path.name for path in tmp_path.glob("step*")] == saved


def test_too_little_memory_for_checkpoints_ends_the_run_early(data, tmp_path, monkeypatch):
    reserve, petabytes = Saver.reserve, {"weight": torch.empty(2**50, device="meta")}
    monkeypatch.setattr(Saver, "reserve", lambda saver, _: reserve(saver, petabytes))
    with pytest.raises(OSError, match=f"no memory for the checkpoints of {tmp_path} .*allocate"):
        main([*LONG, "--steps", "1000", "--save_every", "1000", "--eval_every", "1000",
              "--data", str(data), "--out", str(tmp_path)])
    assert len(read_log(tmp_path)[0]) < 1000


@pytest.fixture
def slow_disk(tmp_path):
    """train.py with a disk that writes half of the checkpoint of step 20 and then waits until the
    file "go" appears."""
    path = tmp_path / "slow_disk.py"
    path.write_text(f"""
import os, time, torch, train

save = torch.save

def slow(checkpoint, path):
    if checkpoint["step"] == 20:
        with open(path, "wb") as file:
            file.write(b"half")
        print("half of step 20 is written")
        while not os.path.exists({str(tmp_path / "go")!r}):
            time.sleep(0.01)
    save(checkpoint, path)

torch.save = slow
train.run_script(train.main)
""")
    return path


@pytest.fixture
def half_saved(start, slow_disk, data, tmp_path):
    """A run that has written half of a checkpoint, and its folder."""
    out = tmp_path / "run"
    args = [*LONG, "--save_every", 10, "--data", data, "--out", out]
    process = start(*args, script=slow_disk)
    while "half of step 20" not in process.stdout.readline():
        assert process.poll() is None
    return process, out


def test_a_signal_while_a_checkpoint_is_written_saves_one_more(half_saved, tmp_path):
    process, out = half_saved
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    output = process.communicate(timeout=LIMIT)[0]
    step = load_checkpoint(list_checkpoints(out)[0])[1]["step"]
    assert process.returncode == 0 and f"saved after step {step} of" in output and step >= 20
    assert [line["step"] for line in read_log(out)[0]] == list(range(1, step + 1))
    assert "checkpoint.tmp" not in names(out)


def test_a_second_signal_ends_a_run_at_once_and_it_goes_on(half_saved, data):
    """While it writes a checkpoint. What comes within a second of the first signal is its echo: a
    scheduler signals torchrun and its processes, and torchrun passes it on to these."""
    process, out = half_saved
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=LIMIT) == -signal.SIGTERM
    assert names(out) == ["best.pt", "checkpoint.tmp", "log.jsonl", "step-00000010.pt"]
    assert load_checkpoint(out)[1]["step"] == 10
    main([*LONG, "--save_every", "10", "--data", str(data), "--out", str(out), "--resume",
          "--steps", "30"])
    assert names(out) == ["best.pt", "log.jsonl", "step-00000020.pt", "step-00000030.pt"]


# --- data that are not what they were, any prompt ---


def test_data_that_is_not_what_it_was_is_refused(halves, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    change_token(other / "train.bin", 7)
    args = [*SHORT, "--data", str(other), "--out", str(halves), "--resume"]
    before = contents(halves)
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        main(args)
    meta = json.loads((other / "meta.json").read_text())  # now as if it was prepared so
    meta["train"]["sha256"] = hashlib.sha256((other / "train.bin").read_bytes()).hexdigest()
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is not the data that the run in .* was trained on"):
        main(args)
    assert contents(halves) == before


@pytest.mark.parametrize("prompt", ["a" * 100, "a" * 31, ""], ids=["long", "nearly full", "empty"])
def test_the_sample_takes_any_prompt(prompt, data, tmp_path, capsys):
    args = [*SHORT, "--steps", "1", "--data", str(data), "--out", str(tmp_path / "run")]
    main([*args, "--prompt", prompt])
    captured = capsys.readouterr()
    assert prompt in captured.out and captured.out.count("\n") > 2
    note = "the model sees the last 32 of the prompt's 100 tokens"
    assert (note in captured.err) == (len(prompt) == 100)
