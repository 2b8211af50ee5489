"""The studies: tiny ones, run as a user runs them, and tables worked out by hand."""

import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.checkpoint import list_checkpoints
from tests import report, study
from tests.peers import split_command
from tests.runs import LIMIT, ROOT, SHAPE, SHORT, limit_files
from train import main, parse_config

TINY = f"toy {' '.join(SHAPE)} --batch_tokens 256 --prompt a"

# train.py, which also keeps a record of when each run was on which device.
TRAIN = f"""
import json, os, sys, time
start = time.time()
sys.path[0] = {str(ROOT)!r}
import train
from data.script import run_script
out = sys.argv[sys.argv.index("--out") + 1]
try:
    run_script(train.main)
finally:
    record = [os.environ["CUDA_VISIBLE_DEVICES"], start, time.time(), out]
    with open("record", "a") as file:
        file.write(json.dumps(record) + "\\n")
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(study, "TRAIN", [sys.executable, str(tmp_path / "train.py")])


def grid(steps=20, kinds=("none", "mlp on v"), seeds=(1,), more=""):
    return study.grid({"": f"{TINY} --steps {steps} {more}".strip()}, kinds, seeds)


def work(monkeypatch, data, runs):
    """Do the study of these runs; returns the exit code and the results."""
    monkeypatch.setitem(study.STUDIES, "tiny", study.Study("", runs))
    with pytest.raises(SystemExit) as end:
        study.main(["tiny", "--data", str(data), "--results", "results"])
    return end.value.code, report.read_results(Path("results"))


@pytest.fixture
def start_study(start, tmp_path, data):
    """A function that starts the study of some runs as a process of its own."""

    def start_some(runs):
        commands = [tuple(run) for run in runs]
        (tmp_path / "study.py").write_text(f"""
import sys
sys.path[0] = {str(ROOT)!r}
from data.script import run_script
from tests import study
study.TRAIN = {study.TRAIN!r}
study.STUDIES["tiny"] = study.Study("", [study.Run(*run) for run in {commands!r}])
run_script(study.main)
""")
        words = ["tiny", "--data", data, "--results", "results"]
        return start(*words, script=tmp_path / "study.py")

    return start_some


def wait_for_updates():
    """Until a run is on its way."""
    limit = time.monotonic() + LIMIT
    while not any('"loss"' in log.read_text() for log in Path(".").glob("out/study/*/log.jsonl")):
        assert time.monotonic() < limit
        time.sleep(0.02)


def records():
    return [json.loads(line) for line in Path("record").read_text().splitlines()]


def test_a_study_with_runs_that_fail_and_diverge(data, monkeypatch, capsys):
    monkeypatch.setattr(study, "EVAL_GAP", 4 * 256)  # an evaluation every 4 updates
    fails, diverges = grid(more="--vocab_size 100")[0], grid(more="--lr 1e18")[0]
    runs = [fails, diverges, *grid()]
    monkeypatch.setattr(study, "FIGURE_3", [runs[-1].command])
    code, results = work(monkeypatch, data, runs)
    assert code == 1
    assert [r["run"] for r in results] == [run.command for run in runs if run != fails]
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("failed")]
    assert fails.command in line and "a vocabulary of 257 (byte), more than" in line
    assert "runs to do: 4, on 1 x CPU\nthis study is for GPUs" in output
    assert "3 of 4 runs are done, 1 failed" in output

    diverged, first, last = results
    assert first["seed"] == 1 and first["tokens"] == 20 * 256 and first["gpu"] == "CPU"
    assert first["torch"] == torch.__version__ and len(first["source_sha256"]) == 64
    assert first["data"] == json.loads((data / "meta.json").read_text())["train"]["sha256"]
    assert first["settings"]["n_embd"] == 32 and first["settings"]["steps"] == 20
    assert [step for step, *_ in first["evals"]] == [4, 8, 12, 16, 20]
    assert first["evals"][-1] == [20, first["val_loss"], first["val_bpb"]]
    assert len(first["curve"]) == 20 and first["curve"][0] == first["first_loss"]
    assert first["first_loss"] > 5 > first["val_loss"]
    assert first["knocks"] == {} and first["skipped"] == 0
    ((name, ((diagonal, rest),)),) = [(n, f) for n, f in last["knocks"].items() if "up" in n]
    assert not name.startswith("blocks") and 0.9 < diagonal < 1.1 and rest > 0

    assert diverged["val_loss"] is None and diverged["skipped"] == 10
    assert diverged["tokens"] < 20 * 256 and len(diverged["curve"]) == diverged["tokens"] // 256
    with np.load("results/figure3-mlp-on-v.npz") as matrices:
        assert {m.shape for m in matrices.values()} == {(8, 8)} and len(matrices.files) == 3
    left = [path for path in Path("out/study").iterdir() if path.is_dir()]
    assert len(left) == 1 and "vocab_size-100" in left[0].name  # what failed can be looked at

    # The second time only what failed is done again.
    n_runs = len(records())
    code, again = work(monkeypatch, data, runs)
    assert code == 1 and again == results and len(records()) == n_runs + 1
    assert "runs to do: 1, on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_interrupted_run_leaves_no_line_and_goes_on(name, start_study, data, monkeypatch):
    runs = grid(steps=400, kinds=["mlp on v"])
    process = start_study(runs)
    wait_for_updates()
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 128 + getattr(signal, name)
    stopped = int(re.search(r"stopped after step (\d+): toy", output)[1])
    assert 0 < stopped < 400 and report.read_results(Path("results")) == []

    code, (result,) = work(monkeypatch, data, runs)
    assert code == 0 and len(records()) == 2
    monkeypatch.setattr(study, "SCRATCH", Path("out/other"))
    Path("results/tiny.jsonl").unlink()
    code, (whole,) = work(monkeypatch, data, runs)
    for key in ("val_loss", "evals", "curve", "tokens", "knocks"):
        assert result[key] == whole[key]


def test_a_run_that_outlives_its_runner_is_not_started_again(start_study, data, monkeypatch):
    runs = grid(steps=500, kinds=["none"])
    process = start_study(runs)
    wait_for_updates()
    process.kill()
    process.communicate(timeout=LIMIT)
    assert work(monkeypatch, data, runs) == (0, [])
    limit = time.monotonic() + LIMIT
    results = []
    while not results:  # once the run has ended, it is taken in
        assert time.monotonic() < limit
        time.sleep(0.1)
        _, results = work(monkeypatch, data, runs)
    assert results[0]["tokens"] == 500 * 256 and len(results[0]["evals"]) == 1


def test_time_that_is_up_stops_a_run_which_can_go_on(data, monkeypatch, capsys):
    runs = grid(steps=20_000, kinds=["none"]) + grid(kinds=["none"], seeds=[2])
    monkeypatch.setitem(study.STUDIES, "tiny", study.Study("", runs))
    runner = study.Runner("tiny", Path("results"), str(data), minutes=60, keep=False)

    def end_its_time():
        wait_for_updates()
        runner.deadline = time.monotonic()

    threading.Thread(target=end_its_time).start()
    assert runner.work() == 0
    assert report.read_results(Path("results")) == [] and len(records()) == 1
    output = capsys.readouterr().out
    assert "stopped after step" in output and "0 of 2 runs are done, 0 failed" in output
    assert len(list(Path(".").glob("out/study/*/step-*.pt"))) == 1


def test_a_run_starts_only_if_it_ends_in_time(data, monkeypatch):
    monkeypatch.setitem(study.STUDIES, "tiny", study.Study("", grid(kinds=["none"])))
    runner = study.Runner("tiny", Path("results"), str(data), minutes=1, keep=False)
    (job,) = runner.jobs  # of 20 steps
    another = {"settings": {**job.settings, "knock_v": "mlp", "steps": 1}, "gpu": "CPU"}
    another |= {"tokens": 256, "tokens_per_s": 256, "seconds": 21}  # 20 s to start, 1 s a step
    runner.found = [another]  # so this one takes 40 s
    assert runner.fits(job, "CPU")
    runner.deadline -= 15
    assert runner.fits(job, "CPU")
    runner.deadline -= 15
    assert not runner.fits(job, "CPU")
    runner.minutes = 0.5  # it fits into no session of this length
    assert runner.fits(job, "CPU")
    runner.minutes = 1
    assert runner.fits(job, "another")  # of which nothing is known
    runner.found = [{**another, "settings": {**job.settings, "n_embd": 64}}]
    assert runner.fits(job, "CPU")  # nor of this shape


def test_two_processes_do_no_run_twice(start_study):
    runs = grid(kinds=["none"], seeds=[1, 2])
    processes = [start_study(runs) for _ in range(2)]
    for process in processes:
        output = process.communicate(timeout=LIMIT)[0]
        assert process.returncode == 0, output
    results = report.read_results(Path("results"))
    assert {r["run"] for r in results} == {run.command for run in runs}
    assert len(results) == len(records()) == 2


def test_one_run_at_a_time_on_each_device(data, monkeypatch):
    monkeypatch.setattr(study, "find_devices", lambda: {"3": "a GPU", "5": "a GPU"})
    code, results = work(monkeypatch, data, grid(kinds=["none"], seeds=[1, 2, 3]))
    assert code == 0 and {r["gpu"] for r in results} == {"a GPU"}
    one, two, three = sorted(records(), key=lambda record: record[1])  # device, start, end
    assert sorted(r["device"] for r in results) == sorted([one[0], two[0], three[0]])
    assert {one[0], two[0]} == {"3", "5"} and two[1] < one[2]  # side by side
    (earlier,) = [record for record in (one, two) if record[0] == three[0]]
    assert three[1] > earlier[2]


def test_visible_devices_keep_their_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert study.find_devices() == {"0": "GPU 0", "1": "GPU 1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,2")
    assert study.find_devices() == {"6": "GPU 0", "2": "GPU 1"}


@pytest.mark.parametrize("damage", ['{"run": "toy", "da', '{"run": "toy"}\n', "\n", '["run", 1]\n'])
def test_a_damaged_line_is_named(data, monkeypatch, damage):
    folder = Path("results")
    folder.mkdir()
    whole = json.dumps({"run": "toy", "data": "abc"})
    (folder / "tiny.jsonl").write_text(f"{whole}\n{damage}")
    with pytest.raises(ValueError, match=r"tiny.jsonl, line 2 is damaged .*: delete it"):
        work(monkeypatch, data, grid())
    assert (folder / "tiny.jsonl").read_text() == f"{whole}\n{damage}"


def test_the_same_run_twice_is_named():
    line = json.dumps({"run": "toy", "data": "abc"}) + "\n"
    Path("one.jsonl").write_text(line)
    Path("two.jsonl").write_text(line)
    with pytest.raises(ValueError, match="two.jsonl, line 1 is the same run as one.jsonl, line 1"):
        report.read_results(Path("."))


def test_a_claim_on_a_lock_that_was_removed_can_be_released():
    first, second = (study.Job(report.Run("", "none", 1, "toy"), {}, Path("run")) for _ in "12")
    assert first.claim()
    second.lock = open("run.lock", "w")  # between the first one's last write and its release
    first.release()
    second.release()
    assert not Path("run.lock").exists()


def test_a_full_disk_leaves_the_results_whole():
    report.append_result(Path("some.jsonl"), {"run": "toy", "data": "abc"})
    before = Path("some.jsonl").read_bytes()
    with limit_files(len(before) + 10), pytest.raises(OSError, match="cannot grow"):
        report.append_result(Path("some.jsonl"), {"run": "another", "data": "abc"})
    assert Path("some.jsonl").read_bytes() == before


def test_half_a_line_does_not_spoil_the_next():
    Path("some.jsonl").write_text('{"run": "half')
    report.append_result(Path("some.jsonl"), {"run": "toy", "data": "abc"})
    with pytest.raises(ValueError, match=r"some.jsonl, line 1 is damaged"):
        report.read_results(Path("."))
    assert json.loads(Path("some.jsonl").read_text().splitlines()[1])["run"] == "toy"


def test_a_wrong_option_shows_before_the_first_run(data, monkeypatch):
    with pytest.raises(ValueError, match="unknown option --knok"):
        work(monkeypatch, data, grid() + grid(more="--knok 1"))
    assert not Path("record").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        ("toy --minutes nan", "--minutes must be above 0, not nan"),
        ("toy --minutes 0", "--minutes must be above 0, not 0"),
        ("toy --update", "no results in empty"),
        ("toy --table", "no results in empty"),
        ("plot out/a", "--results changes nothing here: leave it out"),
        ("toy --table --minutes 9", "--minutes changes nothing here: leave it out"),
        ("toy --update --keep", "--keep changes nothing here: leave it out"),
        ("toy out/a", "only plot takes any"),
    ],
)
def test_what_would_do_nothing_is_refused(words, message):
    with pytest.raises((ValueError, OSError), match=message):
        study.main([*words.split(), "--results", "empty"])
    assert not os.listdir()


def test_the_data_are_the_python_files_of_the_packages(tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "other").mkdir()
    for i in range(40):
        (packages / "other" / f"{i}.py").write_text(f"x = {i}\n" * 50)
    (packages / "other" / "notes.txt").write_text("not Python")
    (packages / ".hidden.py").write_text("hidden = True")
    (packages / "other" / "latin.py").write_bytes("x = 'é'".encode("latin-1"))
    monkeypatch.setattr(torch, "__file__", str(packages / "torch" / "__init__.py"))
    one, two = study.prepare_data("one"), study.prepare_data("two")
    assert one["train"] == two["train"] and one["val"] == two["val"]
    assert one["train"]["documents"] + one["val"]["documents"] == 40 and one["skipped_files"] == 1
    assert one["tokenizer"] == "byte" and one["val_fraction"] == 0.05
    assert study.prepare_data("one") == one  # not made again


# ---- the studies themselves


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_run_has_its_baseline_and_is_known_to_train_py(name):
    runs = study.STUDIES[name].runs
    commands = [run.command for run in runs]
    assert len(set(commands)) == len(commands)
    with_baseline = {(run.group, run.seed) for run in runs if run.kind == "none"}
    for run in runs:
        assert (run.group, run.seed) in with_baseline
        _, options = split_command(run.command)
        _, train, _ = parse_config([*options, "--out", "out/none"])
        assert train.batch_tokens == (2048 if name == "toy" else 32768) and train.seed == run.seed


def test_a_pair_stands_side_by_side():
    pairs = [(run.kind, run.seed) for run in study.STUDIES["types"].runs[:8]]
    both = ["none", "mlp on v"]
    assert [seed for _, seed in pairs] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [kind for kind, _ in pairs] == [*both, *both[::-1]] * 2


def test_studies_share_runs():
    types = {run.command for run in study.STUDIES["types"].runs}
    for name in ("tokens", "kv_heads", "sizes", "heads"):
        assert types & {run.command for run in study.STUDIES[name].runs}


# ---- tables


def result(run, val_loss, data="abc", **more):
    """A made-up line of the results."""
    loss = {"val_loss": val_loss, "val_bpb": val_loss and val_loss * 2}
    return {
        "study": "tiny",
        "run": run.command,
        "seed": run.seed,
        **loss,
        "first_loss": 6.0,
        "spikes": 1,
        "skipped": 0,
        "tokens": 250_000_000,
        "tokens_per_s": 1_000_000,
        "evals": [[5, 2.0, 4.0], [10, *loss.values()]],
        "curve_bin": 2,
        "curve": [5.0, 4.0, 3.0, 2.0, 1.5],
        "data": data,
        "data_bytes": [363_100_000, 20_900_000],
        "eval_tokens": 4_194_304,
        "gpu": "GPU",
        "torch": "2.11",
        "commit": "0123456789",
        "dirty": False,
        "settings": {"batch_tokens": 100, "knock_v": run.kind},
        **more,
    }


def made_up(runs, key, losses, **more):
    """Results of the first runs of each key, with these losses."""
    results = []
    for name, some in losses.items():
        of_key = [run for run in runs if key(run) == name]
        results += [result(run, loss, **more) for run, loss in zip(of_key, some, strict=False)]
    return results


def test_the_table_of_a_study_worked_out_by_hand():
    runs = study.grid({"": "toy"}, ["none", "mlp on v", "gate on v"], [1, 2, 3, 4])
    losses = {
        "none": [1.00, 1.10, 1.30, 1.00],
        "mlp on v": [0.99, 1.08, 1.27],  # differences -0.01, -0.02, -0.03; no fourth seed yet
        "gate on v": [1.50, None],  # the second diverged
    }
    results = made_up(runs, lambda run: run.kind, losses)
    # The mean difference is -0.02, its deviation 0.01; t is 4.303 for two degrees of freedom:
    # 4.303 * 0.01 / sqrt(3) = 0.0248.
    assert report.report("tiny", study.Study("", runs), results).split("\n")[:5] == [
        "| knocks | held-out loss | spikes | skipped | runs | difference | pairs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| none | 1.1000 | 4 | 0 | 4 |  |  |",
        "| mlp on v | 1.1133 | 3 | 0 | 3 | −0.0200 ± 0.0248 | 3 |",
        "| gate on v | 1.5000 | 2 | 0 | 2 (1 diverged) | +0.5000 | 1 |",
    ]


def test_runs_on_different_data_are_never_compared():
    runs = study.grid({"": "toy"}, ["none", "mlp on v"], [1])
    results = [result(runs[0], 1.0), result(runs[1], 0.9, data="other"), result(runs[1], 0.8)]
    text = report.report("tiny", study.Study("", runs), results)
    assert text.count("| knocks |") == 2 and text.count("sha256 other") == 1
    assert "| mlp on v | 0.8000 | 1 | 0 | 1 | −0.2000 | 1 |" in text
    assert "| mlp on v | 0.9000 | 1 | 0 | 1 |  |  |" in text


def test_runs_of_two_versions_are_never_compared():
    runs = study.grid({"": "toy"}, ["none", "mlp on v"], [1])
    settings = {"batch_tokens": 200, "knock_v": "mlp"}
    results = [result(runs[0], 1.0), result(runs[1], 0.9, settings=settings)]
    with pytest.raises(ValueError, match="differ in batch_tokens"):
        report.report("tiny", study.Study("", runs), results)
    results = [result(runs[0], 1.0), result(runs[1], 0.9, eval_tokens=1024)]
    with pytest.raises(ValueError, match="differ in eval_tokens"):
        report.report("tiny", study.Study("", runs), results)


def test_the_course_of_a_difference_is_of_the_evaluations_that_both_runs_had():
    runs = study.grid({"": "toy"}, ["none", "mlp on v"], [1])
    evals = [[[10, 3.0, 0], [20, 2.0, 0], [30, None, 0], [40, 1.0, 0]],
             [[20, 1.5, 0], [30, 1.25, 0], [40, 0.75, 0], [50, 0.5, 0]]]
    results = [result(run, 1.0, evals=e) for run, e in zip(runs, evals, strict=True)]
    batch = 100  # tokens, of `result`
    course = report.Findings(study.Study("", runs), results).course("", runs[1].kind)
    assert course == {20 * batch: [-0.5], 40 * batch: [-0.25]}


def test_many_pairs_have_an_interval():
    mean, half = report.interval([1.0, 3.0] * 50)
    assert mean == 2 and 1.98 / 100**0.5 < half < 2.06 / 100**0.5


def test_a_caption_names_all_versions():
    runs = study.grid({"": "toy"}, ["none", "mlp on v"], [1, 2])
    older = result(runs[0], 1.0, commit="abcdefghij", dirty=True)
    no_git = result(runs[1], 1.0, commit=None, dirty=None, source_sha256="9876543210")
    other = result(runs[2], 1.0, gpu="other")
    text = report.report("tiny", study.Study("", runs), [older, no_git, other])
    assert text.endswith(
        "GPU, torch 2.11, commit abcdefg with changes, source 9876543; other, torch 2.11, commit"
        " 0123456.\n"
    )


def test_runs_of_another_study_alone_make_no_table():
    runs = study.grid({"1": "toy", "2": "small"}, ["none", "mlp on v"], [1])
    shared = [result(run, 1.0) for run in runs[:2]]
    found = study.Study("group", runs)
    assert report.report("other", found, shared) == "No run of its own has ended yet.\n"
    text = report.report("other", found, [*shared, result(runs[2], 2.0, study="other")])
    rows = re.findall(r"^\| (\d) \| (none|mlp on v) \|", text, re.MULTILINE)
    assert rows == [("1", "none"), ("1", "mlp on v"), ("2", "none")]


def test_the_differences_at_each_evaluation_worked_out_by_hand():
    runs = study.grid({"": "small"}, ["none", "linear on v", "mlp on v"], [1, 2])
    losses = {  # at both evaluations, seed by seed
        "none": [(2.0, 1.0), (2.2, 1.2)],
        "linear on v": [(2.1, 1.0)],
        "mlp on v": [(None, 0.8), (2.1, 1.0)],  # one was not finite for a while
    }
    results = []
    for run in runs:
        if run.seed <= len(losses[run.kind]):
            first, last = losses[run.kind][run.seed - 1]
            evals = [[10_000, first, 0.0], [20_000, last, 0.0]]
            results.append(result(run, last, study="types", evals=evals))
    text = report.report("types", study.Study("", runs), results)
    assert text.split("\n\n")[1].split("\n") == [
        "| difference after | 1M | 2M |",
        "| --- | --- | --- |",
        "| linear on v | +0.1000 | +0.0000 |",
        "| mlp on v | −0.1000 | −0.2000 ± 0.0000 |",
    ]


def test_sensitivity_to_the_learning_rate_worked_out_by_hand():
    groups = {"0.001": "toy --lr 0.001", "0.002": "toy --lr 0.002", "0.004": "toy --lr 0.004"}
    runs = study.grid(groups, ["none", "mlp on v"], [1, 2])
    losses = {
        ("none", 1): [1.0, 1.3, None],  # diverged counts as the initialisation's loss, 6.0
        ("none", 2): [1.0, 1.3, 7.0],  # and so does what is worse than it
        ("mlp on v", 1): [0.9, 1.2, 1.5],
        ("mlp on v", 2): [0.9, 1.2],  # incomplete: does not count
    }
    results = made_up(runs, lambda run: (run.kind, run.seed), losses, study="stability")
    text = report.report("stability", study.Study("learning rate", runs), results)
    # none: (1.0 + 1.3 + 6.0) / 3 - 1.0 = 1.7667, both seeds; mlp: (0.9 + 1.2 + 1.5) / 3 - 0.9 = 0.3
    assert "| none | 1.7667 | 2 |  |  |\n| mlp on v | 0.3000 | 1 | −1.4667 | 1 |\n" in text
    assert "| 0.004 | none | 7.0000 | 2 | 0 | 2 (1 diverged) |  |  |" in text


def test_time_to_loss_worked_out_by_hand():
    options = {"0.1": "gpt2 --lr 0.1", "0.2": "gpt2 --lr 0.2"}
    runs = [report.Run(lr, "nanoGPT", 1, f"nanoGPT {text}") for lr, text in options.items()]
    runs += study.grid(options, ["none", "mlp on v"], [1])
    losses = [1.2, 1.3, 1.4, 1.1, 1.25, None]
    results = []
    for run, loss in zip(runs, losses, strict=True):
        some = result(run, loss, tokens=2_000_000, study="time_to_loss")
        some["tokens_per_s"] = 50_000 if run.kind == "nanoGPT" else 40_000
        some["evals"] = [[5, 2.0, 4.0], [10, 1.5, 3.0], [20, loss, 6.0]]
        some["settings"] = {"batch_tokens": 100_000, "steps": 20}
        results.append(some)
    # nanoGPT's better run takes 40 s to come to 1.2. With knocks ours goes from 1.5 after 10
    # updates to 1.1 after 20, so it is there after 17.5, which are 43.75 s.
    found = study.Study("learning rate", runs, tokenizer="gpt2")
    text = report.report("time_to_loss", found, results)
    assert text.split("\n")[2:8] == [
        "| nanoGPT | 0.1 | 1.2000 | 50.0 | 40 |  |  |",
        "| nanoGPT | 0.2 | 1.3000 | 50.0 | 40 |  |  |",
        "| ours, none | 0.1 | 1.4000 | 40.0 | 50 |  |  |",
        "| ours, none | 0.2 | 1.2500 | 40.0 | 50 | never |  |",
        "| ours, mlp on v | 0.1 | 1.1000 | 40.0 | 50 |"
        " 44 s, 88% of the updates | 0.91 x |",
        "| ours, mlp on v | 0.2 | diverged | 40.0 | 50 |  |  |",
    ]
    assert "Losses in nats per token, over 4.2M tokens. Seconds are" in text
    text = report.report("time_to_loss", found, results[2:])  # nanoGPT's runs are not done yet
    assert "| ours, mlp on v | 0.1 | 1.1000 | 40.0 | 50 |  |  |" in text


def test_quantiles_of_students_t():
    """Against the integral of its density."""
    for df, quantile in enumerate(report.T975, start=1):
        x = np.linspace(0, quantile, 200_001)
        scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=4e-5)  # of three decimals


def test_the_readme_shows_what_the_results_say():
    results = report.read_results(study.RESULTS)
    text = (study.RESULTS / "README.md").read_text()
    assert set(re.findall(r"<!-- study (\w+) -->", text)) == set(study.STUDIES)
    assert report.fill(text, study.STUDIES, results) == text, (
        "it is out of date: python tests/study.py types --update"
    )


# ---- pictures


def test_update_rewrites_tables_and_draws_pictures(monkeypatch, capsys):
    folder = Path("results")
    folder.mkdir()
    done = set()
    for name, some in study.STUDIES.items():
        for run in some.runs:
            if run.seed <= 2 and run.command not in done:
                done.add(run.command)
                line = result(run, 1.0 + 0.01 * run.seed, study=name)
                line["curve"][0] = "NaN"  # of updates that were left out
                report.append_result(folder / f"{name}.jsonl", line)
    matrices = {f"blocks.{i}.attn.wv.knock.{m}": np.eye(8) for i in range(2) for m in ("t", "gate")}
    np.savez_compressed(folder / "figure3-linear-on-v.npz", **matrices)
    (folder / "README.md").write_text("Types:\n<!-- study types -->\nold\n<!-- end -->\nend\n")
    study.main(["types", "--update", "--results", "results"])
    text = (folder / "README.md").read_text()
    study.main(["types", "--table", "--results", "results"])
    table = capsys.readouterr().out.split("wrote")[-1].split("\n", 1)[1]
    assert text == f"Types:\n<!-- study types -->\n{table}<!-- end -->\nend\n"
    kinds = {run.kind for run in study.STUDIES["types"].runs}
    assert table.count(" ± 0.0000 | 2 |\n") == len(kinds) - 1
    pictures = {"loss.svg", "figure3.png", *(f"{name}.svg" for name in study.STUDIES)}
    pictures -= {"toy.svg", "mixture.svg"}  # their tables have one row with a difference
    assert pictures == {path.name for path in folder.iterdir() if path.suffix in (".svg", ".png")}
    before = {name: (folder / name).read_bytes() for name in pictures}
    study.main(["types", "--update", "--results", "results"])
    assert before == {name: (folder / name).read_bytes() for name in pictures}


@pytest.mark.filterwarnings("error")  # such as matplotlib's about a legend without a line
def test_the_picture_of_gpt2_has_all_kinds_that_do_not_decay(monkeypatch):
    plot, drawn = study.load_plot(), []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure.axes))
    gpt2, data = study.STUDIES["gpt2"], {"settings": {"batch_tokens": 10**6}}
    runs = [run for run in gpt2.runs if run.group == "82M"]
    lines = [result(run, 2.0 + 0.1 * (run.kind == "none"), **data) for run in runs]
    lines += [result(run, 1.0, **data) for run in gpt2.runs if run.group == "164M"]
    apart = [line for line in lines if ("linear" in line["run"]) == (line["seed"] == 3)]
    for some in (lines, apart):
        plot.draw_study("gpt2", report.Findings(gpt2, some), Path("."))
    (top, bottom), (top_apart, bottom_apart) = drawn
    assert not top_apart.lines and len(bottom_apart.lines) > 1  # no seed that all have, but pairs
    assert top.get_ylabel() == "held-out loss, nats per token"
    assert bottom.get_xlabel() == "millions of tokens trained on"
    kinds = {run.kind for run in runs} - {"mlp on v, decay"}
    assert len(top.lines) == len(kinds) == len(bottom.lines)  # there none is the line at 0
    assert {line.get_label().removesuffix(", 3 seeds") for line in top.lines} == kinds
    lowest, last = (min(line.get_ydata()[-1] for line in axes.lines) for axes in (top, bottom))
    assert (lowest, last) == pytest.approx((2.0, -0.1))
    assert {line.get_xdata()[-1] for line in top.lines} == {10}


def test_the_picture_of_times_leaves_out_knocks_that_decay(monkeypatch):
    plot, drawn = study.load_plot(), []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.extend(figure.axes))
    times = study.STUDIES["time_to_loss"]
    lines = [result(run, 2.0, study="time_to_loss") for run in times.runs]
    plot.draw_study("time_to_loss", report.Findings(times, lines), Path("."))
    labels = drawn[0].get_legend_handles_labels()[1]
    assert labels == ["nanoGPT", "ours, none", "ours, mlp on v"]


def test_without_a_pair_there_are_no_pictures(capsys):
    Path("results").mkdir()
    report.append_result(Path("results/types.jsonl"), result(study.STUDIES["types"].runs[0], 1.0))
    study.main(["types", "--update", "--results", "results"])
    assert os.listdir("results") == ["types.jsonl"] and capsys.readouterr().out == ""


def test_plot_draws_the_losses_and_matrices_of_runs(whole, halves, data, capsys):
    (run, other) = halves, Path("no checkpoints")
    other.mkdir()
    (other / "log.jsonl").write_bytes((whole / "log.jsonl").read_bytes())
    words = "--knock_v none --steps 1 --out no-knocks --data".split()
    main([*SHORT, *words, str(data)])
    capsys.readouterr()
    study.main(["plot", str(run), str(other), "no-knocks"])
    assert capsys.readouterr().out == f"wrote {run}/loss.png\nwrote {run}/knocks.png\n"
    for name in ("loss.png", "knocks.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"
    for path in (*list_checkpoints(str(run)), run / "knocks.png"):
        os.remove(path)
    study.main(["plot", str(run)])
    assert (run / "knocks.png").exists()  # of best.pt, which is left
    with pytest.raises(FileNotFoundError, match="no log.jsonl with updates in out/nothing"):
        study.main(["plot", "out/nothing"])
    (other / "log.jsonl").write_bytes(b"\x8c\n")
    with pytest.raises(ValueError, match="no checkpoints.*log.jsonl is damaged: .*utf-8"):
        study.main(["plot", str(other)])


@pytest.mark.parametrize("upright,arrows", [(False, "<>"), (True, "v^")])
def test_an_arrow_says_where_an_interval_leaves_the_picture(upright, arrows):
    plot = pytest.importorskip("tests.plot")

    def drawn(*differences):
        axes = plot.plt.figure().subplots()
        plot.draw_interval(axes, 3, list(differences), "k", upright)
        assert axes.containers[0].has_yerr == upright
        ends = {line.get_marker(): line.get_xydata()[0].tolist() for line in axes.lines}
        return {marker: end for marker, end in ends.items() if marker in arrows}

    low, high = ([3, -0.01], [3, 0.01]) if upright else ([-0.01, 3], [0.01, 3])
    assert drawn(-0.001, -0.002) == {}  # -0.0015 ± 0.0064
    assert drawn(-0.004, -0.006) == {arrows[0]: low}  # -0.005 ± 0.0127
    assert drawn(-0.005, 0.005) == {arrows[0]: low, arrows[1]: high}


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tests.plot", raising=False)
    monkeypatch.delattr("tests.plot", raising=False)
    Path("log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match="a picture needs the package matplotlib"):
        study.main(["plot", "."])
    assert os.listdir() == ["log.jsonl"]


def test_what_is_not_finite_is_no_number_in_the_results():
    assert [report.rounded(x, 2) for x in (1.234, "nan", "inf", math.nan)] == [1.23] + [None] * 3
