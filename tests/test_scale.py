"""Many processes compute what one does, and whatever ends a run, nothing is lost."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch

import sample
import train
from data.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from data.log import Log
from kha import Transformer
from tests.runs import (
    SHAPE, SHORT, assert_same_run, lines_of, log_of, start_script, stop_at, train_script, untimed, weights_of,
)
from train import main, parse_config

# 16 sequences an update: 8 micro-batches for one process, 2 for each of four. Losses then agree to some 2e-7, unless
# rounding decides which expert takes a token: with few tokens, a wide model and a low rate that is rare.
SCALE = [*SHAPE, *"--n_layer 2 --n_embd 64 --block_size 8 --batch_tokens 128 --micro_batch 2 --lr 5e-4 --steps 20".split(),
         *"--eval_every 10 --save_every 10 --eval_tokens 144 --balance_rate 0.01 --prompt a".split()]
LONG = [*SHAPE, *"--batch_tokens 256 --steps 100000 --eval_every 1 --save_every 1 --eval_tokens 512 --prompt a".split()]
WAYS = {"one": (0, "ddp"), "ddp2": (2, "ddp"), "fsdp2": (2, "fsdp"), "ddp4": (4, "ddp")}


def go(way, *args):
    """Run to the end in one of WAYS, alone in this process."""
    n_process, parallel = WAYS[way]
    args = [*map(str, args), "--parallel", parallel]
    if not n_process:
        return main(args)
    done = train_script(*args, n_process=n_process)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folders of one and the same run in each of WAYS."""
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    for way, out in folders.items():
        go(way, *SCALE, "--data", data, "--out", out)
    return folders


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run of 30 steps that nothing disturbed, with its checkpoints at 20 and 30."""
    out = tmp_path_factory.mktemp("whole")
    main([*SHORT, "--data", str(data), "--out", str(out)])
    return out


@pytest.fixture
def halves(whole, tmp_path):
    """A copy of `whole`, for a test to disturb."""
    return shutil.copytree(whole, tmp_path / "halves")


@pytest.fixture
def start():
    """runs.start_script; what still runs when the test ends is killed."""
    processes = []

    def start(*args, **how):
        processes.append(start_script(*args, **how))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def names(out):
    return sorted(path.name for path in out.iterdir())


def wait_for(condition, process):
    """Wait until `condition()` while the process runs."""
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def has_line(out):
    return lambda: (out / "log.jsonl").exists() and '"loss"' in (out / "log.jsonl").read_text()


# --- scale ---


def assert_close_runs(one, two):
    """The same losses, loads, evaluations and weights, but for rounding."""
    lines, others = ([line for line in lines_of(out) if "config" not in line] for out in (one, two))
    for line, other in zip(lines, others, strict=True):
        for key in ("step", "loss", "grad_norm", "worst_load", "val_loss"):
            assert (key in line) == (key in other) and line.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-5), key
        for name, knock in line.get("knocks", {}).items():
            assert knock == pytest.approx(other["knocks"][name], rel=1e-3, abs=1e-5)
    weights, others = weights_of(one), weights_of(two)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
def test_many_processes_train_as_one(way, runs):
    updates, evals = log_of(runs["one"])
    assert len(updates) == 20 and len(evals) == 2 and updates[0]["worst_load"] > 1
    assert any(bias.any() for name, bias in weights_of(runs["one"]).items() if name.endswith("ffn.bias"))
    assert_close_runs(runs["one"], runs[way])


def test_recomputed_activations_are_the_same(runs, data, tmp_path):
    go("one", *SCALE, "--data", data, "--out", tmp_path / "one", "--recompute")
    assert_same_run(runs["one"], tmp_path / "one")
    go("fsdp2", *SCALE, "--data", data, "--out", tmp_path / "fsdp", "--recompute")
    assert_close_runs(runs["one"], tmp_path / "fsdp")


@pytest.mark.parametrize("saved,resumed", [("fsdp2", "one"), ("fsdp2", "ddp2"), ("one", "fsdp2"), ("ddp2", "one")])
def test_a_checkpoint_goes_on_in_any_way_and_samples(saved, resumed, runs, tmp_path, capsys):
    out = shutil.copytree(runs[saved], tmp_path / "run")
    (out / "step-00000020.pt").unlink()
    sample.main(["--checkpoint", str(out), "--prompt", "1", "--max_new_tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("1")
    assert not any(load.any() for name, load in weights_of(out).items() if name.endswith("load"))
    go(resumed, *SCALE, "--out", out, "--resume")
    assert_close_runs(runs["one"], out)


# --- kill -9 ---


def test_killed_at_any_moment_and_resumed_is_the_same_run(data, tmp_path):
    """Children of a server that has imported torch, so that a start costs little. Killed at 25 random moments or more,
    until one was in the middle of writing a checkpoint: some while they start, some after a random part of a few steps.
    """
    args = [*SHORT, *"--steps 120 --save_every 1 --eval_every 20 --data".split(), str(data), "--out"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(out, *more):
        process = context.Process(target=main, args=([*args, str(out), *more],))
        process.start()
        return process

    clock = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    step_time = (time.monotonic() - clock) / 120
    out, killed, in_writing, reached, rng = tmp_path / "killed", 0, 0, 0, random.Random(1)
    while killed < 25 or not in_writing:
        size = lambda: (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0
        newest = list_checkpoints(out)
        process = start(out, *(["--resume"] if newest else []))
        if killed % 4:
            while size() <= reached and process.is_alive():
                time.sleep(step_time / 20)
        time.sleep(rng.uniform(0, 4 * step_time))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        killed, reached = killed + 1, max(reached, size())
        if (out / "checkpoint.tmp").exists():
            in_writing += 1
            (out / "checkpoint.tmp").unlink()  # to see the next one
    assert list_checkpoints(out)
    last = start(out, "--resume")
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "whole", out)
    assert names(out) == names(tmp_path / "whole") == ["best.pt", "log.jsonl", "step-00000119.pt", "step-00000120.pt"]


def test_a_finished_run_resumes_to_its_sample(whole, halves, data, capsys):
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    assert "going on after step 30" in capsys.readouterr().out
    assert_same_run(whole, halves)


def test_settings_given_with_resume_replace_those_of_the_run(whole, halves, data):
    (halves / "step-00000030.pt").unlink()
    changed = ["--weight_decay", "0.9", "--beta1", "0.5", "--beta2", "0.6"]
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume", *changed])
    groups = load_checkpoint(halves)[1]["optimizer"]["param_groups"]
    assert {(*group["betas"], group["weight_decay"]) for group in groups} == {(0.5, 0.6, 0.9), (0.5, 0.6, 0.0)}
    assert untimed(halves)[:20] == untimed(whole)[:20] and untimed(halves)[-1] != untimed(whole)[-1]


def test_a_run_cannot_go_back(halves, data):
    with pytest.raises(ValueError, match="has done 30 steps: give more than --steps 25"):
        main([*SHORT, "--data", str(data), "--out", str(halves), "--resume", "--steps", "25"])


# --- damage ---


def cut(file):
    return file[: len(file) // 2]


def flip_one_bit(file):
    return file[: len(file) // 2] + bytes([file[len(file) // 2] ^ 8]) + file[len(file) // 2 + 1 :]


@pytest.mark.parametrize("damage", [cut, flip_one_bit])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, whole, halves, data, capsys):
    newest = halves / "step-00000030.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    captured = capsys.readouterr()
    assert "going on after step 20" in captured.out
    assert "warning" in captured.err and "step-00000030.pt" in captured.err and "checkpoint before it" in captured.err
    assert_same_run(whole, halves)


def test_with_all_checkpoints_damaged_nothing_is_touched(halves):
    for path in halves.glob("*.pt"):
        path.write_bytes(cut(path.read_bytes()))
    before = {path: path.read_bytes() for path in halves.iterdir()}
    done = train_script("--out", halves, "--resume")
    assert done.returncode == 2 and done.stdout == ""
    warning, error = done.stderr.splitlines()
    assert "warning" in warning and "error" in error and "step-00000020.pt is damaged" in error
    assert {path: path.read_bytes() for path in halves.iterdir()} == before


def test_a_disk_that_cannot_read_is_not_a_damaged_checkpoint(halves, monkeypatch):
    """It may be whole: to go on from the one before would remove it."""
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(OSError, match="Input/output error"):
        parse_config(["--out", str(halves), "--resume"])


def test_a_checkpoint_of_another_version_is_refused(halves):
    checkpoint = load_checkpoint(halves)[1]
    save_checkpoint(halves, {**checkpoint, "train": {**checkpoint["train"], "dropout": 0.1}})
    with pytest.raises(ValueError, match="not of this version of train.py .*'dropout'"):
        parse_config(["--out", str(halves), "--resume"])


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    """Run back to step 20, a run saves more often than before: what it kept must be two whole files."""
    checkpoint = {"config": dataclasses.asdict(parse_config(["toy"])[0]), "model": {}, "tokenizer": "byte"}
    save_checkpoint(tmp_path, {**checkpoint, "step": 20})
    (tmp_path / "step-00000030.pt").write_bytes(b"damaged")
    (tmp_path / "step-best.pt").write_bytes(b"a copy of the user's")
    save_checkpoint(tmp_path, {**checkpoint, "step": 25})
    assert names(tmp_path) == ["step-00000020.pt", "step-00000025.pt", "step-best.pt"]


def test_a_disk_full_while_saving_leaves_the_earlier_checkpoint(whole, halves, data):
    (halves / "step-00000030.pt").unlink()
    limit_files = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    done = train_script(*SHORT, "--data", data, "--out", halves, "--resume", preexec_fn=limit_files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: cannot save to {halves}" in done.stderr and "the earlier checkpoints there stand" in done.stderr
    assert names(halves) == ["best.pt", "log.jsonl", "step-00000020.pt"]
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    assert_same_run(whole, halves)


def test_a_disk_full_while_logging_leaves_half_a_line_at_most(whole, halves, data):
    (halves / "step-00000030.pt").unlink()
    size = len((halves / "log.jsonl").read_bytes()) - 100
    limit_files = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    done = train_script(*SHORT, "--data", data, "--out", halves, "--resume", preexec_fn=limit_files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: cannot write {halves}/log.jsonl" in done.stderr
    main([*SHORT, "--data", str(data), "--out", str(halves), "--resume"])
    assert_same_run(whole, halves)


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(number, start, data, tmp_path):
    process = start(*LONG, "--save_every", 100000, "--data", data, "--out", tmp_path)
    wait_for(has_line(tmp_path), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    step = load_checkpoint(tmp_path)[1]["step"]
    assert process.returncode == 0
    assert f"stopped by a signal and saved after step {step} of 100000: --resume goes on" in output
    assert "Traceback" not in output and [line["step"] for line in log_of(tmp_path)[0]] == list(range(1, step + 1))


def test_a_second_signal_ends_the_run_at_once(start, data, tmp_path):
    """In a step of a minute. What comes within a second of the first is its echo: a scheduler signals torchrun and its
    processes, and torchrun passes it on to these."""
    args = [*SHORT, "--batch_tokens", 32 * 4 * 20_000, "--data", data, "--out", tmp_path]
    process = start(*args)
    assert "writing" in process.stdout.readline()
    time.sleep(1)
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    time.sleep(2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM
    assert names(tmp_path) == ["log.jsonl"]


def test_torchrun_passes_a_signal_on(start, data, tmp_path):
    process = start(*LONG, "--parallel", "fsdp", "--data", data, "--out", tmp_path, n_process=2)
    wait_for(has_line(tmp_path), process)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    step = load_checkpoint(tmp_path)[1]["step"]
    assert f"stopped by a signal and saved after step {step} of 100000" in output
    assert [line["step"] for line in log_of(tmp_path)[0]] == list(range(1, step + 1))


# --- updates that are not finite, spikes ---


@pytest.fixture
def poison(monkeypatch):
    """A function that makes loss (or with `gradient` only the gradient) NaN in the updates that it is given, counted
    from 1; it returns a dict that gets the weights before each update."""
    lr_at, forward, now = train.lr_at, Transformer.forward, {}

    def install(steps, gradient=False):
        weights = {}

        def at(step, settings):
            now["step"] = step + 1
            return lr_at(step, settings)

        def poisoned(model, tokens, targets=None, **past):
            loss = forward(model, tokens, targets, **past)
            if model.training and targets is not None:
                if now["step"] not in weights:
                    weights[now["step"]] = {name: x.clone() for name, x in model.state_dict().items() if "load" not in name}
                if now["step"] in steps:
                    loss.register_hook(lambda grad: grad * float("nan"))
                    return loss if gradient else loss * float("nan")
            return loss

        monkeypatch.setattr(train, "lr_at", at)
        monkeypatch.setattr(Transformer, "forward", poisoned)
        return weights

    return install


@pytest.mark.parametrize("gradient", [False, True])
def test_an_update_that_is_not_finite_is_skipped_and_logged(gradient, poison, data, tmp_path):
    weights = poison({3, 14, 15}, gradient)
    main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    for step in range(1, 30):
        unchanged = all(torch.equal(weights[step][name], weights[step + 1][name]) for name in weights[step])
        assert unchanged == (step in (3, 14, 15))
    updates, before = log_of(tmp_path)[0], 0
    for line in updates:  # the data of an update is a function of its step
        assert line["skipped"] == before + (line["step"] in (3, 14, 15))
        assert (line["grad_norm"] == "nan") == (line["step"] in (3, 14, 15))
        before = line["skipped"]
    assert all(x.isfinite().all() for x in weights_of(tmp_path).values())


def test_skipped_updates_count_on_after_a_resume(poison, data, tmp_path):
    args = [*SHORT, "--data", str(data), "--out"]
    poison({3, 14, 15})
    main([*args, str(tmp_path / "whole")])
    with pytest.raises(KeyboardInterrupt):
        stop_at(17, [*args, str(tmp_path / "halves")])
    main([*args, str(tmp_path / "halves"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_run_saved_before_its_first_update_goes_on_the_same(poison, data, tmp_path, monkeypatch):
    """The state of the optimizer is not there yet, and must not be made up."""
    args = [*SHORT, "--data", str(data), "--out"]
    poison({1, 2})
    main([*args, str(tmp_path / "whole")])
    lr_at = train.lr_at

    def stop(step, settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(step, settings)

    monkeypatch.setattr(train, "lr_at", stop)
    main([*args, str(tmp_path / "halves")])
    assert load_checkpoint(tmp_path / "halves")[1]["step"] == 1
    monkeypatch.setattr(train, "lr_at", lr_at)
    main([*args, str(tmp_path / "halves"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_ten_skipped_updates_in_a_row_end_the_run(poison, data, tmp_path):
    args = [*SHORT, "--save_every", "4", "--data", str(data), "--out", str(tmp_path)]
    poison({5, *range(10, 100)})
    with pytest.raises(ValueError, match="10 updates in a row, the last step 19, .* --resume and a lower --lr"):
        main(args)
    # Weights that make every loss NaN would be in the later ones.
    assert names(tmp_path) == ["log.jsonl", "step-00000004.pt", "step-00000008.pt"]
    assert log_of(tmp_path)[0][-1]["step"] == 19 and log_of(tmp_path)[0][-1]["skipped"] == 11
    poison({5})
    main([*args, "--resume"])
    assert [line["skipped"] for line in log_of(tmp_path)[0]] == [0] * 4 + [1] * 26


def test_ten_skipped_updates_before_a_checkpoint(poison, data, tmp_path):
    poison({*range(5, 100)})
    with pytest.raises(ValueError, match="10 updates in a row, the last step 14, .*: start again with a lower --lr"):
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
    """Of 9, 10, 11 in turn the median is 10 and the median deviation 1: a spike is above 10 + 6 * 1.4826 = 18.9."""
    even = [9.0, 10.0, 11.0] * 40
    spikes = lambda *losses: write_log(tmp_path, [*even, *losses]).spikes
    assert spikes() == 0 and spikes(18.8) == 0 and spikes(19) == 1 and spikes(19, 10, 25) == 2 and spikes(-100) == 0
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
    "end", [b'{"step": 9, "lo', b'{"step": 9, "loss": 1, "skipped": 0}', b"\0" * 20 + b"\n", b"[9]\n{}\n"]
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
    main(args)


# --- processes that die, and two runs in one place ---


def test_a_folder_takes_one_run_at_a_time(start, data, tmp_path):
    args = [*LONG, "--save_every", 100000, "--data", data, "--out", tmp_path]
    first = start(*args)
    wait_for(has_line(tmp_path), first)
    second = train_script(*args)
    assert second.returncode == 2 and f"error: another run is writing {tmp_path}" in second.stderr
    first.terminate()
    assert "saved after step" in first.communicate(timeout=60)[0]
    steps = [line["step"] for line in log_of(tmp_path)[0]]
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def dying(tmp_path):
    """train.py, but for a rank 1 that dies at step 14 unless torchrun has restarted it."""
    path = tmp_path / "dying.py"
    path.write_text("""
import os, signal, train

lr_at = train.lr_at

def die(step, settings):
    if step == 13 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_at(step, settings)

train.lr_at = die
train.run_script(train.main)
""")
    return path


def test_a_rank_that_dies_ends_the_others_and_is_named(dying, data, tmp_path):
    done = train_script(*SCALE, "--data", data, "--out", tmp_path / "run", n_process=2, script=dying)
    assert done.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in done.stderr and "SIGKILL" in done.stderr
    assert names(tmp_path / "run") == ["best.pt", "log.jsonl", "step-00000010.pt"]


def test_torchrun_restarts_a_run_where_it_was(runs, dying, data, tmp_path):
    args = [*SCALE, "--data", data, "--out", tmp_path / "run", "--resume"]
    done = train_script(*args, n_process=2, restarts=1, script=dying)
    assert done.returncode == 0, done.stderr
    assert "going on after step 10" in done.stdout
    assert_same_run(runs["ddp2"], tmp_path / "run")


def test_processes_that_see_different_checkpoints_do_not_start(halves, data, tmp_path):
    """As on two machines without a shared folder."""
    script = tmp_path / "alone.py"
    script.write_text(f"""
import os, sys, train

if os.environ["RANK"] == "1":
    sys.argv.remove("--resume")
    sys.argv[-1] = {str(tmp_path / "other")!r}
train.run_script(train.main)
""")
    done = train_script(*SHORT, "--micro_batch", 2, "--data", data, "--resume", "--out", halves, n_process=2, script=script)
    assert done.returncode != 0 and "error: the processes found different checkpoints" in done.stderr
    assert not (tmp_path / "other").exists()


# --- bad input ---


def test_bad_input_ends_all_processes(data, tmp_path):
    done = train_script(*SHORT, "--data", tmp_path / "nowhere", "--out", tmp_path / "run", n_process=2)
    assert done.returncode != 0 and "train.py: error: no prepared data in" in done.stderr
    assert not (tmp_path / "run").exists()


def change_token(folder, token, rehash):
    tokens = np.fromfile(folder / "train.bin", dtype=np.uint16)
    tokens[1000] = token
    tokens.tofile(folder / "train.bin")
    if rehash:
        meta = json.loads((folder / "meta.json").read_text())
        meta["train"]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "token,rehash,message",
    [(300, True, "has the token 300, outside its vocabulary of 257"), (7, False, "has changed since it was prepared"),
     (7, True, "is not the data that the run in .* was trained on")],
)
def test_data_that_is_not_what_it_was_is_refused(token, rehash, message, halves, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    change_token(other, token, rehash)
    before = {path: path.read_bytes() for path in halves.iterdir()}
    with pytest.raises(ValueError, match=message):
        main([*SHORT, "--data", str(other), "--out", str(halves), "--resume"])
    assert {path: path.read_bytes() for path in halves.iterdir()} == before


@pytest.mark.parametrize("prompt", ["a" * 100, "a" * 31, ""], ids=["long", "nearly full", "empty"])
def test_the_sample_takes_any_prompt(prompt, data, tmp_path, capsys):
    args = [*SHORT, "--steps", "1", "--data", str(data), "--out", str(tmp_path / "run")]
    main([*args, "--prompt", prompt])
    captured = capsys.readouterr()
    assert prompt in captured.out and captured.out.count("\n") > 2
    assert ("the model sees the last 32 of the prompt's 100 tokens" in captured.err) == (
        len(prompt) == 100
    )
