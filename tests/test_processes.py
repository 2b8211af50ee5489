"""Many processes compute what one does. Signals, torchrun, and two runs in one folder."""

import functools
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest
import torch

import sample
from data import evaluation
from data.checkpoint import list_checkpoints, load_checkpoint
from tests.report import read_log
from tests.runs import (
    LIMIT,
    LONG,
    SCALE,
    SHORT,
    as_in_a_terminal,
    assert_same_run,
    at_step,
    command,
    environment,
    lines_of,
    names,
    run_process,
    wait_for_update,
    weights_of,
)
from train import main

WAYS = {"one": (0, "ddp"), "ddp2": (2, "ddp"), "fsdp2": (2, "fsdp")}


def go(way, *args):
    """Run to the end in one of WAYS, alone in this process."""
    n_process, parallel = WAYS[way]
    args = [*map(str, args), "--parallel", parallel]
    if not n_process:
        return main(args)
    done = run_process(*args, n_process=n_process)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def run_in(data, tmp_path_factory):
    """A function that does one and the same run in one of WAYS, once, and returns its folder."""

    @functools.cache
    def run(way):
        out = tmp_path_factory.mktemp(way)
        go(way, *SCALE, "--data", data, "--out", out)
        return out

    return run


# --- many processes ---


def assert_close_runs(one, two):
    """The same losses, loads, evaluations and weights, within rounding."""
    lines, others = ([line for line in lines_of(out) if "config" not in line] for out in (one, two))
    for line, other in zip(lines, others, strict=True):
        for key in ("step", "loss", "grad_norm", "worst_load", "val_loss"):
            assert (key in line) == (key in other)
            assert line.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-5), key
        for name, knock in line.get("knocks", {}).items():
            assert knock == pytest.approx(other["knocks"][name], rel=1e-3, abs=1e-5)
    weights, others = weights_of(one), weights_of(two)
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
def test_many_processes_train_as_one(way, run_in):
    updates, evals = read_log(run_in("one"))
    assert len(updates) == 20 and len(evals) == 2 and updates[0]["worst_load"] > 1
    biases = [bias for name, bias in weights_of(run_in("one")).items() if name.endswith("ffn.bias")]
    assert any(bias.any() for bias in biases)
    assert_close_runs(run_in("one"), run_in(way))


def test_recomputed_activations_are_the_same(run_in, data, tmp_path):
    go("one", *SCALE, "--data", data, "--out", tmp_path / "one", "--recompute")
    assert_same_run(run_in("one"), tmp_path / "one")
    go("fsdp2", *SCALE, "--data", data, "--out", tmp_path / "fsdp", "--recompute")
    assert_close_runs(run_in("one"), tmp_path / "fsdp")


@pytest.mark.parametrize("saved,resumed", [("fsdp2", "one"), ("ddp2", "one"), ("one", "fsdp2")])
def test_a_checkpoint_goes_on_in_any_way_and_samples(saved, resumed, run_in, tmp_path, capsys):
    out = shutil.copytree(run_in(saved), tmp_path / "run")
    (out / "step-00000020.pt").unlink()
    (out / "best.pt").unlink()
    options = ["--prompt", "1", "--max_new_tokens", "5", "--device", "cpu"]
    sample.main(["--checkpoint", str(out), *options])
    assert capsys.readouterr().out.startswith("1")
    loads = [load for name, load in weights_of(out).items() if name.endswith("load")]
    assert loads and not any(load.any() for load in loads)
    go(resumed, *SCALE, "--out", out, "--resume")
    assert_close_runs(run_in("one"), out)


# --- signals ---


def unexpected(number, _):
    raise AssertionError(f"the run has no handler of the signal {number}")


@contextmanager
def signalled(step, number, handler=unexpected):
    """A context in which a signal comes in the update after this many steps. Its handler at the
    start is this one. (A shell ignores SIGINT in what it runs in the background.)"""
    before = signal.signal(number, handler)
    try:
        with at_step(step, lambda: signal.raise_signal(number)):
            yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(number, whole, data, tmp_path, capfd):
    args = [*SHORT, "--data", str(data), "--out", str(tmp_path)]
    with signalled(13, number):
        main(args)
    end = "stopped by a signal, saved after step 14 of 30: --resume goes on\n"
    output, errors = capfd.readouterr()
    assert output.endswith(end)  # without the sample
    assert "A second signal ends it at once" in errors
    assert names(tmp_path) == ["best.pt", "log.jsonl", "step-00000010.pt", "step-00000014.pt"]
    main([*args, "--resume"])
    assert_same_run(whole, tmp_path)


def test_after_a_signal_in_the_last_update_the_run_is_finished_without_a_sample(
    whole, data, tmp_path, capsys
):
    with signalled(29, signal.SIGTERM):
        main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    assert_same_run(whole, tmp_path)
    output = capsys.readouterr().out
    assert "stopped by a signal" not in output and "\na" not in output  # as the sample begins


def test_a_signal_in_the_last_evaluation_saves_as_it_says(data, tmp_path, monkeypatch, capsys):
    def evaluate(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluation.evaluate(*args)

    monkeypatch.setattr("train.evaluate", evaluate)
    rare = ["--eval_every", "30", "--save_every", "0"]
    main([*SHORT, *rare, "--data", str(data), "--out", str(tmp_path)])
    assert names(tmp_path) == ["best.pt", "log.jsonl", "step-00000030.pt"]
    assert "a sample" not in capsys.readouterr().out


def test_under_nohup_a_closed_terminal_does_not_stop_a_run(whole, data, tmp_path):
    """nohup starts a program with SIGHUP ignored."""
    with signalled(13, signal.SIGHUP, signal.SIG_IGN):
        main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_run_that_nobody_can_read_any_more_is_saved(name, data, tmp_path):
    """A closed terminal sends SIGHUP. Ctrl-C ends tee, too, and often sooner."""
    ours, theirs = os.openpty() if name == "SIGHUP" else os.pipe()
    args = command(*LONG, "--save_every", 0, "--data", data, "--out", tmp_path)
    how = {"env": environment(), "preexec_fn": as_in_a_terminal}
    process = subprocess.Popen(args, stdout=theirs, stderr=theirs, **how)
    try:
        os.close(theirs)
        wait_for_update(tmp_path, process)
        os.close(ours)
        process.send_signal(getattr(signal, name))
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
    step = load_checkpoint(list_checkpoints(tmp_path)[0])[1]["step"]
    assert [line["step"] for line in read_log(tmp_path)[0]] == list(range(1, step + 1))


def test_torchrun_passes_a_signal_on(start, data, tmp_path):
    args = [*LONG, "--parallel", "fsdp", "--data", data, "--out", tmp_path]
    process = start(*args, n_process=2)
    wait_for_update(tmp_path, process)
    process.terminate()
    output = process.communicate(timeout=LIMIT)[0]
    step = load_checkpoint(list_checkpoints(tmp_path)[0])[1]["step"]
    assert f"stopped by a signal, saved after step {step} of 100000" in output
    assert output.count("A second signal ends it at once") == 1
    assert [line["step"] for line in read_log(tmp_path)[0]] == list(range(1, step + 1))


# --- processes that die, and two runs in one place ---


def test_a_folder_takes_one_run_at_a_time(start, data, tmp_path):
    args = ["--data", str(data), "--out", str(tmp_path)]
    first = start(*LONG, "--save_every", 100000, *args)
    wait_for_update(tmp_path, first)
    for option, message in (("--seed=1", "holds the log of"), ("--resume", "another run is")):
        with pytest.raises(ValueError, match=message):
            main([*SHORT, *args, option])
    first.terminate()
    assert "saved after step" in first.communicate(timeout=LIMIT)[0]
    steps = [line["step"] for line in read_log(tmp_path)[0]]
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def dying(tmp_path):
    """train.py, but its rank 1 gets SIGKILL, or the signal in the environment, at step 14 unless
    torchrun has restarted it."""
    path = tmp_path / "dying.py"
    path.write_text("""
import os, signal, train

lr_at = train.lr_at

def die(step, settings):
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if step == 13 and os.environ["RANK"] == "1" and restarts == "0":
        os.kill(os.getpid(), signal.Signals[os.environ.get("SIGNAL", "SIGKILL")])
    return lr_at(step, settings)

train.lr_at = die
train.run_script(train.main)
""")
    return path


def test_a_rank_that_dies_ends_the_others_and_is_named(dying, data, tmp_path):
    args = [*SCALE, "--data", data, "--out", tmp_path / "run"]
    done = run_process(*args, n_process=2, script=dying)
    assert done.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in done.stderr and "SIGKILL" in done.stderr
    assert names(tmp_path / "run") == ["best.pt", "log.jsonl", "step-00000010.pt"]


def test_a_signal_to_one_process_stops_them_all(dying, data, tmp_path):
    args = [*SCALE, "--data", data, "--out", tmp_path / "run"]
    done = run_process(*args, n_process=2, script=dying, env={"SIGNAL": "SIGTERM"})
    assert done.returncode == 0, done.stderr
    assert "stopped by a signal, saved after step 14 of 20: --resume goes on" in done.stdout


def test_torchrun_restarts_a_run_where_it_was(run_in, dying, data, tmp_path):
    args = [*SCALE, "--data", data, "--out", tmp_path / "run", "--resume", "--prompt", "once"]
    done = run_process(*args, n_process=2, restarts=1, script=dying)
    assert done.returncode == 0, done.stderr
    assert "going on after step 10" in done.stdout and done.stdout.count("once") == 1
    assert_same_run(run_in("ddp2"), tmp_path / "run")


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
    args = [*SHORT, "--micro_batch", 2, "--data", data, "--resume", "--out", halves]
    done = run_process(*args, n_process=2, script=script)
    assert done.returncode != 0
    assert "error: the processes found different checkpoints" in done.stderr
    assert not (tmp_path / "other").exists()


def test_bad_input_ends_all_processes(data, tmp_path):
    args = [*SHORT, "--data", tmp_path / "nowhere", "--out", tmp_path / "run"]
    done = run_process(*args, n_process=2)
    assert done.returncode != 0 and "train.py: error: no prepared data in" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_of_a_gloo_group_does_not_end_in_pythons_way(data, tmp_path):
    """While Python ends, gloo's threads can abort the process: see leave_processes. One run in a
    hundred would show that; here Python's own end aborts it always."""
    script = tmp_path / "ending.py"
    script.write_text("""
import atexit, os, train

atexit.register(os.abort)
train.run_script(train.main)
""")
    args = [*SHORT, "--parallel", "fsdp", "--steps", 1, "--data", data, "--out", tmp_path / "run"]
    done = run_process(*args, n_process=1, script=script)
    assert done.returncode == 0, done.stderr
    assert "\na" in done.stdout and done.stdout.endswith("\n")  # the sample is all there


def test_processes_let_go_of_their_graph_before_they_leave(run_in, data, tmp_path):
    """NCCL waits forever for a graph that is left. Here, on CPUs, a graph is the update itself."""
    script = tmp_path / "graphs.py"
    script.write_text("""
import contextlib, data.device, os, train

def say(word):
    with open(__file__ + os.environ["RANK"], "a") as file:
        print(word, file=file)

class Graph:
    def __init__(self, work, stream):
        say(f"captured on {stream} after {n_update}")
        self.work = work

    def __call__(self):
        return self.work()

    def __del__(self):
        say("freed")

def count(*args):
    global n_update
    n_update += 1
    return update(*args)

n_update, update, leave = 0, train.update, train.leave_processes
train.update = count
train.leave_processes = lambda: say("left") or leave()
train.can_capture = lambda model: True
train.on_side_stream = data.device.on_side_stream = lambda: say("aside") or contextlib.nullcontext()
data.device.side_stream = lambda: "the side stream"
data.device.capture = Graph
train.run_script(train.main)
""")
    # A process has 8 of the 16 sequences, so its micro_batch is 8, and the update becomes a graph.
    args = [*SCALE, "--micro_batch", 16, "--data", data, "--out", tmp_path / "run"]
    done = run_process(*args, n_process=2, script=script)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        said = (tmp_path / f"graphs.py{rank}").read_text().splitlines()
        captured = "captured on the side stream after 11"  # aside are DDP's start and 11 updates
        assert said == ["aside"] * 12 + [captured, "freed", "left"]
    assert_close_runs(run_in("one"), tmp_path / "run")
