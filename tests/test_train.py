"""Training as a user runs it, on small models and data."""

import math
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

import train
from data.checkpoint import load_checkpoint
from data.figures import memory_advice
from data.tokens import draw_batch
from kha import CONFIGS, Config, Transformer
from sample import evaluate
from tests.runs import ROOT, SHORT, assert_same_run, log_of, stop_at, train_script
from train import TrainConfig, lr_at, main, make_optimizer, parse_config


def test_a_run_learns_logs_saves_and_samples(data, tmp_path, capsys):
    out = tmp_path / "run"
    main([*SHORT, "--data", str(data), "--out", str(out), "--lr", "0.01"])
    steps, evals = log_of(out)
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < 2.5 < 4.5 < steps[0]["loss"]
    assert all(
        line["worst_load"] >= 1 and line["grad_norm"] > 0 and line["tokens_per_s"] > 0
        for line in steps
    )
    assert [line["step"] for line in evals] == [10, 20, 30]
    assert evals[-1]["val_bpb"] == pytest.approx(
        evals[-1]["val_loss"] / math.log(2), rel=0.01
    )  # bytes are tokens
    diagonal, rest = evals[-1]["knocks"]["blocks.0.attn.wv.knock.down"]
    assert diagonal == pytest.approx(1, abs=0.3) and rest > 0
    assert "\na" in capsys.readouterr().out  # the sample, from the prompt on

    model, checkpoint = load_checkpoint(out)
    assert checkpoint["step"] == 30 and checkpoint["tokenizer"] == "byte"
    tokens = np.memmap(data / "val.bin", dtype=np.uint16, mode="r")
    again = evaluate(model, tokens[:513], 32, 4, "cpu")
    assert again == pytest.approx(evals[-1]["val_loss"], rel=1e-6)


def test_resumed_ends_as_if_never_stopped(data, tmp_path):
    args = [*SHORT, "--data", str(data)]
    main([*args, "--out", str(tmp_path / "whole")])
    with pytest.raises(KeyboardInterrupt):
        stop_at(14, [*args, "--out", str(tmp_path / "halves")])
    assert load_checkpoint(tmp_path / "halves")[1]["step"] == 10
    main([*args, "--out", str(tmp_path / "halves"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_resume_takes_the_shape_from_the_checkpoint_and_not_from_the_named_config(data, tmp_path):
    mla = "--attention mla --n_kv_head 1 --kv_rank 16 --knock_v linear".split()
    main([*SHORT, *mla, "--data", str(data), "--out", str(tmp_path), "--steps", "1"])
    config, _, checkpoint = parse_config(
        ["toy", "--resume", "--out", str(tmp_path), "--kv_rank", "16"]
    )
    assert (config.attention, config.kv_rank, checkpoint["step"]) == ("mla", 16, 1)


def test_gradient_accumulation_is_the_large_batch(data, tmp_path):
    losses = []
    for name, micro in (("large", 8), ("small", 2)):
        main(
            [
                *SHORT,
                "--data",
                str(data),
                "--out",
                str(tmp_path / name),
                "--micro_batch",
                str(micro),
                "--steps",
                "10",
            ]
        )
        losses.append([line["loss"] for line in log_of(tmp_path / name)[0]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_learning_rate_warms_up_peaks_and_ends_at_a_tenth():
    settings = TrainConfig(lr=1.0, steps=1000)
    rates = [lr_at(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == 1.0 and max(rates) == 1.0
    assert rates[525] == pytest.approx(0.55, abs=0.01) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(rates[50:]))


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    batch = draw_batch(tokens, 8, 16, seed=1, step=5)
    assert batch.shape == (8, 17) and torch.equal(batch, draw_batch(tokens, 8, 16, seed=1, step=5))
    assert torch.equal(batch, batch[:, :1] + torch.arange(17))  # whole sequences of the data
    assert not torch.equal(batch, draw_batch(tokens, 8, 16, seed=1, step=6))
    assert not torch.equal(batch, draw_batch(tokens, 8, 16, seed=2, step=5))
    assert (
        draw_batch(tokens[:17], 8, 16, seed=1, step=5)[:, -1].tolist() == [16] * 8
    )  # the last token is reached


def test_evaluation_is_the_mean_over_the_first_tokens():
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=50, block_size=8, n_layer=1, n_embd=16, n_head=2, n_kv_head=2, head_dim=8)
    )
    tokens = np.random.default_rng(0).integers(50, size=100)
    rows = torch.from_numpy(np.stack([tokens[i * 8 : i * 8 + 9] for i in range(5)]))
    expected = model(rows[:, :-1], rows[:, 1:]).item()
    assert evaluate(model, tokens[:48], 8, 2, "cpu").item() == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_matrices_decay_and_norms_do_not():
    model = Transformer(
        Config(vocab_size=50, n_layer=1, n_embd=16, n_head=2, n_kv_head=2, head_dim=8)
    )
    decay = {
        p: group["weight_decay"]
        for group in make_optimizer(model, TrainConfig()).param_groups
        for p in group["params"]
    }
    assert {name for name, p in model.named_parameters() if decay[p] == 0} == {
        name for name, _ in model.named_parameters() if name.endswith("norm.weight")
    }
    assert len(decay) == len(list(model.parameters()))


def test_every_option_is_typed_and_the_config_is_the_default():
    config, settings, resume = parse_config(
        ["gpt2", "--n_layer", "3", "--lr", "1e-4", "--no-compile"]
    )
    assert (config.n_layer, config.n_embd, settings.lr, settings.compile, resume) == (
        3,
        768,
        1e-4,
        False,
        None,
    )
    assert settings.out == "out/gpt2"
    assert parse_config([])[0].n_expert == 8  # toy


def test_help_says_what_each_option_is():
    words = " ".join(train_script("--help").stdout.split())
    lr = "--lr LR peak, after 5% warm-up; a cosine takes it to 10%"
    assert f"{lr} (default: 0.00075, or the config's own)" in words
    assert "--attention ATTENTION gqa, gta or mla (default" in words


def test_killed_while_it_prepares_its_data_it_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("data/stdlib.tmp-*/tokens/train.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert list(tmp_path.rglob("*")) == [tmp_path / "data"]


def test_a_gpu_without_memory_is_told_what_would_help(data, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "update", fail)
    with pytest.raises(ValueError, match="the GPU's memory is too small for this run: it needs"):
        main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    advice = memory_advice(Config(**CONFIGS["moe-1b-6.1b"]), 1, "ddp", False, 8)
    assert advice.startswith("it needs about 119 GiB a GPU; with --recompute: 108, --parallel fsdp")
    assert "--micro_batch" not in advice and "\n" not in advice  # it is 1 already


@pytest.mark.parametrize(
    "args,message",
    [
        ("--n_leyer 3", "unknown option --n_leyer: did you mean --n_layer?"),
        ("huge", "invalid choice: 'huge'"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--steps 0", "steps must be positive"),
        ("--lr nan", "lr must be positive"),
        ("--lr inf", "lr must be positive"),
        ("--norm_eps nan", "norm_eps must be positive"),
        ("--beta2 1", "beta1 and beta2 must be under 1, not 0.9 and 1.0"),
        ("--out EMPTY", "--out is empty"),
        ("--n_kv_head 3", "n_head must be a multiple of n_kv_head"),
        ("--head_dim 7", "head_dim must be even"),
        ("--batch_tokens 100", "batch_tokens must be a multiple of"),
        (
            "--batch_tokens 1024",
            "8 * 256 * 1 = 2048, not 1024: add --batch_tokens 2048 or --micro_batch 4",
        ),
        ("--balance rsm", "balance must be one of rms, sign"),
        ("--device tpu", "device 'tpu' is not available"),
        (
            "--data DATA --vocab_size 100",
            "a vocabulary of 257 (byte), more than the model's 100: add --vocab_size 320",
        ),
        (
            "--data DATA --block_size 1000000 --micro_batch 1 --batch_tokens 1000000",
            "fewer than one sequence",
        ),
        ("--data nowhere", "no prepared data in nowhere"),
        ("--data CUT", "truncated"),
        ("--data DATA --out RUN", "holds a run already: add --resume"),
        ("--out BROKEN --resume", "damaged"),
        (
            "--out RUN --resume --n_layer 3",
            "--n_layer 3 differs from the checkpoint's 1: leave it out",
        ),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(args, message, data, tmp_path):
    run, cut = tmp_path / "run", tmp_path / "cut"
    cut.mkdir()
    for file in data.iterdir():
        (cut / file.name).write_bytes(
            file.read_bytes()[: 1000 if file.name == "train.bin" else None]
        )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "step-00000001.pt").write_bytes(b"PK")
    if "RUN" in args:
        main([*SHORT, "--data", str(data), "--out", str(run), "--steps", "1"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {
        "DATA": data,
        "CUT": cut,
        "RUN": run,
        "BROKEN": tmp_path / "broken",
        "NEW": tmp_path / "new",
        "EMPTY": "",
    }
    done = train_script(
        *(places.get(word, word) for word in args.split()),
        *([] if "--out" in args else ["--out", tmp_path / "new"]),
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
