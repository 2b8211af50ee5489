"""The benchmark and the peers, on the CPU: tiny runs to their ends, with a stand-in for nanoGPT."""

import json
import math
from pathlib import Path

import pytest
import torch

from data.checkpoint import collect, restore
from data.tokens import open_tokens
from kha import Config, Transformer
from tests import bench, peers, report, study
from tests.runs import SHAPE, contents, lines_of, run_process
from train import TrainConfig, parse_config

TINY = f"toy {' '.join(SHAPE)} --batch_tokens 256 --eval_tokens 512 --steps 24"
DENSE = "--n_expert 0 --top_k 0"

# What our scripts know of nanoGPT: files, options, the output, and the model's call.
MODEL = """
import torch

class Even(torch.nn.Module):
    def forward(self, tokens, targets):
        return None, targets.view(-1).float().mean()
"""
TRAIN = """
import json, sys
from contextlib import nullcontext
from model import Even

given = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
json.dump(given, open("given.json", "w"))
open("configurator.py").close()  # a script there finds its files by their names alone
ctx, raw_model = nullcontext(), Even()
print("tokens per iteration will be: 256")
print("step 0: train loss 5.5054, val loss 5.6049")
for i in range(int(given["max_iters"]) + 1):
    loss = 5 - i / 100 if i else float("nan")
    print(f"iter {i}: loss {loss:.4f}, time {10 + i:.2f}ms, mfu -100.00%")
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    for name, text in (("model", MODEL), ("train", TRAIN), ("configurator", "")):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("NANOGPT", str(folder))
    monkeypatch.setattr(peers, "CLONE", folder)
    return folder


def run_peer(command, data):
    """The peer's run as a process; returns its log's updates and evaluations."""
    done = run_process(*command.split(), "--data", data, "--out", "out", script="tests/peers.py")
    assert done.returncode == 0, done.stderr
    return report.read_log(Path("out"))


def test_figures_of_a_log():
    updates = [{"tokens_per_s": 1.0}] * 4  # warming up
    updates += [{"tokens_per_s": s, "mfu": s / 10, "memory_gib": s} for s in (4.0, 1.0, 3.0, 2.0)]
    figures = {"speed": 2.5, "low": 1.25, "high": 3.75, "mfu": 0.25, "memory": 2.0}
    assert bench.summarise(updates) == figures
    figures = bench.summarise([{"tokens_per_s": 1.0}] * 4)  # as a CPU's
    assert figures["speed"] == 1 and math.isnan(figures["mfu"]) and math.isnan(figures["memory"])


def test_a_run_of_nanogpt_leaves_a_log_like_ours(data, clone):
    (updates, (last,)) = run_peer(f"nanoGPT {TINY} --lr 0.01 --knock_v none", data)
    assert [update["step"] for update in updates] == list(range(1, 25))
    assert updates[0]["loss"] == "NaN" and updates[3]["loss"] == 4.97
    assert updates[3]["tokens_per_s"] == pytest.approx(256 / 0.013)
    # Of this model the held-out loss is the mean of the targets: of all that ours sees, once each.
    targets = open_tokens(str(data), "val")[1 : 512 + 1]
    assert last["step"] == 24 and last["val_loss"] == pytest.approx(targets.mean())

    given = json.loads((clone / "given.json").read_text())
    n = {name: int(given[name]) for name in ("gradient_accumulation_steps", "batch_size")}
    assert math.prod(n.values()) * 32 == 256 and given["block_size"] == "32"
    assert given["n_embd"] == "32" and given["bias"] == "False" and given["dropout"] == "0.0"
    assert given["learning_rate"] == "0.01" and given["min_lr"] == "0.001"
    assert given["max_iters"] == "23" and given["lr_decay_iters"] == "24"


@pytest.mark.parametrize("peer", ["transformers", "transformers-float32"])
def test_a_run_of_transformers_learns(data, peer):
    updates, evals = run_peer(f"{peer} {TINY} {DENSE} --lr 0.01", data)
    assert updates[0]["loss"] > 5 > updates[-1]["loss"] and len(updates) == 24 and not evals


def test_a_run_of_transformers_leaves_out_no_sequence():
    words = f"transformers {TINY} {DENSE} --micro_batch 3 --out out/theirs".split()
    with pytest.raises(ValueError, match="micro_batch .* = 96, not 256: lower --micro_batch"):
        peers.main(words)


@pytest.mark.parametrize("rule", peers.RULES)
def test_other_rules_move_the_knocks_as_they_say(rule):
    """Three steps against AdamW's equations in float64. The second of them is to be skipped."""
    train = TrainConfig(lr=0.1, weight_decay=0.5)
    model = Transformer(Config(n_layer=1, n_embd=16, n_head=2, n_kv_head=2, head_dim=8)).double()
    optimizer = peers.make_optimizer_with(rule, model, train)
    knock = model.blocks[0].attn.wv.knock
    others = [p for p in model.parameters() if p is not knock.up]
    p, start = knock.up.detach().clone(), torch.eye(8, dtype=torch.float64)
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    for step in (1, 2, 3):
        skipped = step == 2
        lr = 0.1 * step
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        knock.up.grad = torch.randn(8, 8, dtype=torch.float64)
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        if not skipped:
            n = 1 if step == 1 else 2
            lr = lr / 10 if rule == "slow" else lr
            goal = start if rule == "to-start" else 0
            p = p - lr * 0.5 * (p - goal)
            first = 0.9 * first + 0.1 * knock.up.grad
            second = 0.95 * second + 0.05 * knock.up.grad**2
            p = p - lr * (first / (1 - 0.9**n)) / ((second / (1 - 0.95**n)).sqrt() + 1e-8)
        torch.testing.assert_close(knock.up.detach(), p, rtol=1e-5, atol=1e-6)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 * step)
    in_groups = [x for group in optimizer.param_groups for x in group["params"]]
    assert len(in_groups) == len(set(map(id, in_groups))) == len(others) + 1
    assert [group["weight_decay"] for group in optimizer.param_groups[:2]] == [0.5, 0]


def test_unshared_knocks_start_as_shared_ones_and_share_their_gradient(monkeypatch):
    config = Config(vocab_size=64, n_layer=2, n_embd=32, n_head=4, n_kv_head=4, head_dim=16)
    tokens, models = torch.randint(64, (2, 17)), []
    for heads in (peers.Heads, peers.UnsharedHeads):
        monkeypatch.setattr(peers.kha, "Heads", heads)
        torch.manual_seed(1)
        models.append(Transformer(config))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in models]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    shared, unshared = (model.blocks[0].attn.wv for model in models)
    assert len(unshared.own) == 4
    for name, p in shared.knock.named_parameters():
        parts = [part["knock"].get_parameter(name).grad for part in unshared.own]
        torch.testing.assert_close(p.grad, sum(parts))
        assert not torch.allclose(parts[0], parts[1])
    with pytest.raises(ValueError, match="knocks of each head's own cannot be linear"):
        peers.UnsharedHeads(32, 4, 16, "linear")


@pytest.mark.parametrize("rule", peers.RULES)
def test_a_resume_with_another_rule_changes_no_weight(rule):
    train, pairs = TrainConfig(lr=0.1, weight_decay=0.5), []
    for _ in range(2):
        model = Transformer(Config(n_layer=1, n_embd=16, n_head=2, n_kv_head=2, head_dim=8))
        pairs.append((model, peers.make_optimizer_with(rule, model, train)))
    (model, optimizer), resumed = pairs
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    restore(*resumed, {**collect(model, optimizer), "step": 1})
    for p, same in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, same)


CHANGED = ((peers.ours, "make_optimizer"), (peers.ours, "TrainConfig"), (peers.kha, "Heads"))


def run_ruled(*words):
    """The peer's run in this process. What it changes in our modules is put back."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CHANGED:
            patch.setattr(module, name, getattr(module, name))
        peers.main(list(words))


def test_a_run_with_another_rule_goes_on_where_it_was(data):
    options = f"{TINY} --prompt a --data {data} --out".split()
    for rule in ("slow", "decay"):
        run_ruled(rule, *options, rule)
    run_ruled("slow", *options, "halves", "--save_every", "12", "--steps", "12")
    run_ruled("slow", *options, "halves", "--resume")
    slow, fast, halves = (report.read_log(Path(out))[1] for out in ("slow", "decay", "halves"))
    assert halves[-1]["step"] == slow[-1]["step"] == 24 and slow[-1]["knocks"] != fast[-1]["knocks"]


def test_a_single_head_learns_the_same_whether_it_shares_or_not(data):
    options = f"{TINY} --n_kv_head 1 --weight_decay 9 --prompt a --data {data} --out".split()
    for rule in ("unshared", "decay", "unshared-no-decay"):
        run_ruled(rule, *options, rule)
    peers.ours.main([*options, "as-in-train"])
    found = (*peers.UNSHARED, "decay", "as-in-train")
    own, own_no_decay, decay, no_decay = (
        report.read_log(Path(folder))[1][-1]["val_loss"] for folder in found
    )
    assert own == decay != own_no_decay == no_decay


def test_heads_with_knocks_of_their_own_learn_otherwise(data):
    options = f"{TINY} --lr 0.1 --prompt a --data {data} --out".split()
    run_ruled("unshared-no-decay", *options, "own")
    peers.ours.main([*options, "shared"])
    own, shared = (report.read_log(Path(folder)) for folder in ("own", "shared"))
    assert own[0][0]["loss"] == shared[0][0]["loss"]  # both start as the identity
    assert own[1][-1]["val_loss"] != shared[1][-1]["val_loss"]


@pytest.mark.parametrize("rule", peers.RULED)
def test_a_run_with_another_rule_does_not_go_on_without_it(rule, data):
    options, out = f"{TINY} --prompt a --data {data} --out run".split(), Path("run")
    run_ruled(rule, *options, "--steps", "12")
    assert lines_of(out)[0]["train"]["rule"] == rule
    before = contents(out)
    another = "slow" if rule == "decay" else "decay"
    with pytest.raises(ValueError, match=f"has the rule '{rule}', not '{another}'"):
        run_ruled(another, *options, "--resume")
    with pytest.raises(ValueError, match="the run in run is not of this version .*'rule'"):
        peers.ours.main([*options, "--resume"])
    assert contents(out) == before


def table(monkeypatch, capfd, rows, data):
    """Print the table of these rows; returns the exit code and the cells of each line."""
    monkeypatch.setattr(bench, "GROUPS", {"tiny": rows})
    with pytest.raises(SystemExit) as end:
        bench.main(["tiny", "--data", str(data)])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    return end.value.code, [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_table_of_runs_to_its_end(data, clone, monkeypatch, capfd):
    rows = {
        "peer": bench.Row(f"nanoGPT {TINY}"),
        "ours": bench.Row(TINY, "peer"),
        "wrong": bench.Row(f"{TINY} --vocab_size 100"),
        "GPU": bench.Row("small"),
    }
    code, (head, _, peer, ours, wrong, gpu) = table(monkeypatch, capfd, rows, data)
    assert code == 1 and wrong == ["wrong", "failed, see above"] and len(head) == 7
    # In the second half updates take 22 to 33 ms, the middle one 27.5: 256 bytes / 27.5 ms.
    assert peer[:3] == ["peer", "9.3 (8.3-10.6)", ""] and peer[-1] == ""
    speed, ratio = float(ours[1].split()[0]), float(ours[-1].removesuffix(" x"))
    assert ratio == pytest.approx(speed / 9.3, abs=0.1)
    assert float(ours[2]) > 0 and ours[3:5] == ["", ""] and float(ours[5]) > 0
    if not torch.cuda.is_available():
        assert gpu == ["GPU", "left out: there is no CUDA GPU"]


def test_a_table_of_decoding_to_its_end(data, monkeypatch, capfd):
    options = "toy --n_layer 1 --n_embd 32 --d_ff 32 --device cpu"
    rows = {
        "theirs": bench.Row(f"transformers {options} {DENSE}", samples=2),
        "ours": bench.Row(options, "theirs", 2),
    }
    code, (head, _, theirs, ours) = table(monkeypatch, capfd, rows, data)
    assert code == 0 and len(head) == len(theirs) == len(ours) == 6
    speed, step = float(ours[1]), float(ours[2])
    assert speed == pytest.approx(2 / step * 1000, rel=0.05)
    assert float(ours[-1].removesuffix(" x")) == pytest.approx(speed / float(theirs[1]), rel=0.05)


def test_what_a_step_reads(monkeypatch):
    """The second sample brings its past, and in three cases of four another one of four experts."""
    options = "toy --n_layer 1 --n_embd 32 --d_ff 32 --n_expert 4 --top_k 1 --n_head 2"
    row = bench.Row(f"{options} --n_kv_head 1 --head_dim 8 --device cpu", samples=1, prompt=90)
    monkeypatch.setattr(bench, "NEW", 6)
    generate, read = bench.generate, set()

    def watched(model, prompt, *rest, **options):
        read.add(len(prompt))
        return generate(model, prompt, *rest, **options)

    monkeypatch.setattr(bench, "generate", watched)
    one = bench.measure_decoding(row)["bytes"]
    two = bench.measure_decoding(row._replace(samples=2))["bytes"]
    expert, past = 3 * 32 * 32, 2 * 8 * (90 + 6 / 2)
    assert two - one == 2 * (3 / 4 * expert + past)  # bfloat16
    assert read == {90}


@pytest.mark.parametrize("name", bench.GROUPS)
def test_every_row_is_known_to_train_py(name):
    for row in bench.GROUPS[name].values():
        _, options = peers.split_command(row.command)
        config, train, _ = parse_config([*options, "--out", "out/none"])
        assert row.samples or train.batch_tokens % (train.micro_batch * config.block_size) == 0
        assert row.samples or train.steps // 2 + bench.PROFILED < train.steps
        assert not row.samples or row.prompt + bench.NEW <= config.block_size
        assert not row.against or row.against in bench.GROUPS[name]


def test_a_missing_clone_is_named_before_the_first_run(data, monkeypatch, capfd):
    monkeypatch.setattr(peers, "CLONE", Path("nowhere"))
    with pytest.raises(FileNotFoundError, match="no clone of nanoGPT at nowhere .*: git clone"):
        study.main(["time_to_loss", "--data", str(data)])
    rows = {"peer": bench.Row(f"nanoGPT {TINY}")}
    code, (*_, line) = table(monkeypatch, capfd, rows, data)
    assert code == 0 and line[1].startswith("left out: no clone of nanoGPT at nowhere")


def test_a_row_that_is_stopped_leaves_no_files(data, monkeypatch):
    folders = []

    def stopped(command, env, **_):
        folders.append(Path(env["TMPDIR"]))
        (folders[0] / "checkpoint").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["toy, mlp on v", "--data", str(data)])
    assert len(folders) == 1 and not folders[0].exists()


def test_bad_data_is_one_error_before_any_row(capsys):
    with pytest.raises(FileNotFoundError, match="no prepared data in nowhere"):
        bench.main(["toy, mlp on v", "--data", "nowhere"])
    assert capsys.readouterr().out == ""


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no group or row gpt3: name some of gpt2, small, "):
        bench.main(["gpt2", "gpt3"])


def test_data_of_another_tokenizer_are_refused(data, clone):
    with pytest.raises(ValueError, match="in tokens of byte, and this study needs those of gpt2"):
        study.main(["time_to_loss", "--data", str(data)])


def test_time_to_loss_in_the_shape_of_a_toy(data, clone, monkeypatch, capsys):
    options = f"{TINY} --eval_every 8"
    runs = [study.Run("1", "nanoGPT", 1, f"nanoGPT {options}")]
    runs += study.grid({"1": options}, study.DECAY, [1])
    monkeypatch.setitem(study.STUDIES, "time_to_loss", study.Study("learning rate", runs))
    for _ in range(2):  # the second time there is nothing to do
        with pytest.raises(SystemExit) as end:
            study.main(["time_to_loss", "--data", str(data), "--results", "results"])
        assert end.value.code == 0
    theirs, none, mlp = report.read_results(Path("results"))
    assert theirs["run"] == runs[0].command
    assert theirs["tokens_per_s"] == pytest.approx(256 / 0.0215, rel=0.001)
    assert [step for step, *_ in theirs["evals"]] == [24]
    assert [step for step, *_ in mlp["evals"]] == [8, 16, 24]
    assert theirs["eval_tokens"] == none["eval_tokens"] and theirs["data"] == none["data"]
    capsys.readouterr()
    study.main(["time_to_loss", "--table", "--results", "results"])
    lines = capsys.readouterr().out.splitlines()
    # The stand-in's loss is that far above ours that the first evaluation is below it.
    assert lines[2].startswith(f"| nanoGPT | 1 | {theirs['val_loss']:.4f} |")
    assert all(" s, 33% of the updates | " in line for line in lines[3:5])
    study.main(["time_to_loss", "--update", "--results", "results"])
    assert Path("results/time_to_loss.svg").stat().st_size > 10_000
