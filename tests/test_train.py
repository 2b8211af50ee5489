"""Training as a user runs it, on small models and data."""

import copy
import dataclasses
import math
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import train
from data.checkpoint import load_checkpoint, restore
from data.device import Moment, graphed, start_compilers
from data.evaluation import bits_per_byte, evaluate
from data.figures import flops_per_token, memory_advice
from data.hf import export_hf
from data.log import Log
from data.tokens import draw_batch, load_meta, load_tokenizer, open_tokens
from kha import CONFIGS, Config, Transformer
from tests.reference import scramble
from tests.report import read_log
from tests.runs import (
    SHORT,
    assert_same_run,
    at_step,
    contents,
    equal_weights,
    lines_of,
    run_process,
    weights_of,
)
from train import TrainConfig, lr_at, main, make_optimizer, parse_config

TINY = dict(vocab_size=50, block_size=8, n_layer=1, n_embd=16, n_head=2, n_kv_head=2)
TINY |= dict(head_dim=8, d_ff=16)


def test_a_run_learns_logs_saves_and_samples(data, tmp_path, capsys):
    out = tmp_path / "run"
    main([*SHORT, "--data", str(data), "--out", str(out), "--lr", "0.01"])
    steps, evals = read_log(out)
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < 2.5 < 4.5 < steps[0]["loss"]
    for line in steps:
        assert line["worst_load"] >= 1 and line["grad_norm"] > 0 and line["tokens_per_s"] > 0
    schedule = TrainConfig(lr=0.01, steps=30)
    assert [line["lr"] for line in steps] == [lr_at(step, schedule) for step in range(30)]
    assert [line["step"] for line in evals] == [10, 20, 30]
    measured = open_tokens(data, "val")[1:513]  # a byte is a token, and the end of a text is one
    bits = evals[-1]["val_loss"] / math.log(2) * 512 / (measured != 256).sum()
    assert evals[-1]["val_bpb"] == pytest.approx(bits, rel=1e-6)
    diagonal, rest = evals[-1]["knocks"]["blocks.0.attn.wv.knock.down"]
    assert diagonal == pytest.approx(1, abs=0.3) and rest > 0
    shown = capsys.readouterr().out
    assert "\na" in shown  # the sample, from the prompt on
    epochs = 30 * 256 / load_meta(data)["train"]["tokens"]
    of_data = f"({epochs:.3g} epochs of {data})"
    assert f"active, mlp on v; 30 steps of 256 tokens {of_data}, lr 0.01, on 1 x" in shown
    assert ", micro_batch 4; writing" in shown

    model, checkpoint = load_checkpoint(out)
    assert checkpoint["step"] == 30 and checkpoint["tokenizer"] == "byte"
    tokens = np.memmap(data / "val.bin", dtype=np.uint16, mode="r")
    again = evaluate(model, tokens[:513], 32, 4, "cpu")
    assert again == pytest.approx(evals[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("most,fits", [(3, 2), (5, 4), (100, 8)])
def test_a_micro_batch_divides_the_batch(most, fits, data, tmp_path):
    """Here of 8 sequences. The run is that with such a micro_batch, bit for bit."""
    runs = []
    for size in (most, fits):
        runs.append(tmp_path / str(size))
        args = [*SHORT, *f"--steps 2 --micro_batch {size} --data {data}".split()]
        main([*args, "--out", str(runs[-1])])
    assert lines_of(runs[0])[0]["train"]["micro_batch"] == fits
    assert_same_run(*runs)


def test_a_resumed_run_fits_its_micro_batch_again(data, tmp_path, capsys):
    """A checkpoint keeps what was asked for, not what fitted the batch at that time."""
    args = [*SHORT, *f"--micro_batch 5 --save_every 2 --data {data}".split()]
    args += ["--out", str(tmp_path / "run")]
    main([*args, "--steps", "2"])
    assert ", micro_batch 4; writing" in capsys.readouterr().out
    again = f"--resume --steps 4 --batch_tokens 320 --data {data} --out {tmp_path / 'run'}"
    main(again.split())
    assert ", micro_batch 5; writing" in capsys.readouterr().out


def test_the_log_begins_with_the_settings(whole, data):
    config, settings, _ = parse_config([*SHORT, "--data", str(data), "--out", "anywhere"])
    first, *others = lines_of(whole)
    assert first["step"] == 0 and first["config"] == dataclasses.asdict(config)
    settings = dataclasses.asdict(settings)
    del settings["out"]  # a folder may be moved
    assert first["train"] == settings and first["data"] == load_meta(data)["train"]["sha256"]
    assert (first["n_process"], first["device"]) == (1, "cpu")
    assert first["torch"] == torch.__version__
    assert not any("config" in line for line in others)


def interrupt():
    raise KeyboardInterrupt


def test_resumed_ends_as_if_never_stopped(whole, data, tmp_path):
    args = [*SHORT, "--data", str(data), "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt), at_step(14, interrupt):
        main(args)
    assert load_checkpoint(tmp_path)[1]["step"] == 10
    main([*args, "--resume"])
    assert_same_run(whole, tmp_path)


def test_resume_takes_the_shape_from_the_checkpoint_and_not_from_the_named_config(data, tmp_path):
    mla = "--attention mla --n_kv_head 1 --kv_rank 16 --knock_v linear".split()
    main([*SHORT, *mla, "--data", str(data), "--out", str(tmp_path), "--steps", "1"])
    words = ["toy", "--resume", "--out", str(tmp_path), "--kv_rank", "16"]
    config, _, checkpoint = parse_config(words)
    assert (config.attention, config.kv_rank, checkpoint["step"]) == ("mla", 16, 1)
    shutil.copytree(tmp_path, "out/toy")  # a folder may be moved, here to the default one
    assert parse_config(["--resume"])[1].out == "out/toy"


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["--n_expert 0 --top_k 0", ""], ids=["dense", "mixture"])
def test_on_a_gpu_a_graph_many_micro_batches_and_a_cpu_learn_the_same(experts, data, tmp_path):
    """One micro-batch an update is a CUDA graph from the second update on."""
    losses = []
    for how in ("--micro_batch 8", "--micro_batch 2", "--micro_batch 8 --device cpu"):
        out = tmp_path / how.replace(" ", "")
        args = f"{experts} --data {data} --out {out} --device cuda {how}"
        main([*SHORT, *args.split()])
        losses.append([line["loss"] for line in read_log(out)[0]])
    assert losses[0] == pytest.approx(losses[2], rel=0.02)
    assert losses[1] == pytest.approx(losses[2], rel=0.02)


@pytest.mark.gpu
def test_two_gpus_learn_what_one_learns(data, tmp_path):
    """With one micro-batch for each, an update is a CUDA graph from the twelfth on."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = [*SHORT, *f"--data {data} --device cuda --micro_batch 4".split()]
    main([*args, "--out", str(tmp_path / "one")])
    done = run_process(*args, "--out", tmp_path / "two", n_process=2)
    assert done.returncode == 0, done.stderr
    one, two = ([u["loss"] for u in read_log(tmp_path / name)[0]] for name in ("one", "two"))
    assert len(two) == 30 and two == pytest.approx(one, rel=0.02)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_where_it_was(data, tmp_path):
    args = f"--data {data} --device cuda --out {tmp_path}".split()
    main([*SHORT, *args])
    whole = read_log(tmp_path)[0]
    (tmp_path / "step-00000030.pt").unlink()
    main([*SHORT, *args, "--resume"])
    again = read_log(tmp_path)[0]
    assert [line["step"] for line in again] == list(range(1, 31))
    assert again[:20] == whole[:20] and again[20:] != whole[20:]  # the times differ
    losses = ([line["loss"] for line in lines] for lines in (whole, again))
    assert next(losses) == pytest.approx(next(losses), rel=0.02)


def test_learning_rate_warms_up_peaks_and_ends_at_a_tenth():
    settings = TrainConfig(lr=1.0, steps=1000)
    rates = [lr_at(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == 1.0 and max(rates) == 1.0
    assert rates[525] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(rates[50:]))


def test_each_update_has_the_learning_rate_of_its_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "lr_at", lambda step, settings: 0.0 if step == 0 else 0.01)
    args = [*SHORT, "--data", str(data), "--out", str(tmp_path), "--steps", "2", "--save_every"]
    main([*args, "1"])
    config, settings, checkpoint = parse_config([*args, "1", "--resume"])
    start = dict(train.build_model(config, settings, "cpu", 1)[0].named_parameters())
    for step, same in ((1, True), (2, False)):
        now = load_checkpoint(tmp_path / f"step-{step:08d}.pt")[0].state_dict()
        assert all(torch.equal(now[name], p) for name, p in start.items()) == same


def test_updates_are_adamw_on_clipped_gradients():
    """Two updates, each of two micro-batches, against the published formulas. Norms and knocks do
    not decay."""
    settings = TrainConfig(lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.5, grad_clip=0.1)
    torch.manual_seed(0)
    model = Transformer(Config(**TINY, knock_q="linear")).double()
    plain, optimizer = copy.deepcopy(model), make_optimizer(model, settings)
    m, v = ([torch.zeros_like(p) for p in plain.parameters()] for _ in range(2))
    for t in (1, 2):
        micros = torch.randint(50, (2, 3, 9))
        rows = micros.flatten(0, 1)
        loss = plain(rows[:, :-1], rows[:, 1:])
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 2 * settings.grad_clip
        for (name, p), g, m_, v_ in zip(plain.named_parameters(), gradients, m, v, strict=True):
            g = g * settings.grad_clip / norm
            decays = p.dim() > 1 and "knock" not in name
            m_.mul_(0.8).add_(0.2 * g)
            v_.mul_(0.9).add_(0.1 * g.square())
            step = (m_ / (1 - 0.8**t)) / ((v_ / (1 - 0.9**t)).sqrt() + 1e-8)
            p.data -= 0.01 * (step + 0.5 * decays * p.data)
        numbers = train.update(model, model, optimizer, settings, micros)
        expected = torch.stack((loss, norm, torch.zeros(()), torch.ones(())))
        torch.testing.assert_close(numbers, expected.detach(), check_dtype=False)
        for p, right in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["rms", "sign"])
def test_a_run_balances_by_the_rule_it_is_given(rule, data, tmp_path):
    args = f"--steps 1 --balance {rule} --balance_rate 0.25 --out".split()
    main([*SHORT, "--data", str(data), *args, str(tmp_path)])
    bias = weights_of(tmp_path)["blocks.0.ffn.bias"]
    assert bias.any()
    assert set(bias.abs().tolist()) <= {0, 0.25} or rule == "rms"
    assert bias.square().mean().sqrt() == pytest.approx(0.25) or rule == "sign"


def test_the_worst_load_is_that_of_the_worst_layer_and_each_is_balanced():
    model = Transformer(Config(**{**TINY, "n_layer": 2}, n_expert=4, top_k=2))
    for moe, load in zip(model.moes(), ([6, 3, 2, 1], [3, 3, 3, 3]), strict=True):
        moe.load.copy_(torch.tensor(load))
    assert train.balance_experts(model, torch.tensor(0.01), "sign") == 2
    first, second = (moe.bias for moe in model.moes())
    torch.testing.assert_close(first, torch.tensor([-0.01, 0, 0.01, 0.01]))
    assert not second.any()


def test_the_seed_decides_the_start_and_the_batches(data, tmp_path, monkeypatch):
    def draw(tokens, n, length, seed, *rest):
        seeds.append(seed)
        return draw_batch(tokens, n, length, seed, *rest)

    seeds, starts = [], []
    monkeypatch.setattr(train, "draw_batch", draw)
    monkeypatch.setattr(train, "lr_at", lambda *_: 0.0)  # the end is the start
    for out, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        args = ["--seed", seed, "--steps", "1", "--out", str(tmp_path / out)]
        main([*SHORT, "--data", str(data), *args])
        starts.append(weights_of(tmp_path / out)["embed.weight"])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert set(seeds[:-2]) == {7} and set(seeds[-2:]) == {8}  # each run draws one batch ahead


def test_speed_is_tokens_in_a_second_and_the_share_of_all_peaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    config, settings, _ = parse_config([*SHORT, "--out", str(tmp_path)])
    model, log = Transformer(config), Log(str(tmp_path), 0)
    settings = {"config": dataclasses.asdict(config), "train": dataclasses.asdict(settings)}

    def at(time):
        return SimpleNamespace(time=time, seconds_since=lambda earlier: time - earlier.time)

    def update_ends(step, time):
        log.update(step, 0.1, at(time), loss=2.0, grad_norm=1.0, worst_load=0, finite=True)

    monkeypatch.setattr("data.log.Moment", lambda device: at(10))
    log.begin(model, settings, "cuda:0", n_process=2, n_tokens=1000)
    epochs = settings["train"]["steps"] * 256 / 1000
    assert f"({epochs:.3g} epochs of" in capsys.readouterr().out
    update_ends(1, 10.5)
    update_ends(2, 10.75)
    monkeypatch.setattr("data.log.Moment", lambda device: at(20))
    log.restart_clock()
    update_ends(3, 21)
    _, line, *others = lines_of(tmp_path)
    assert (line["tokens_per_s"], line["memory_gib"]) == (512, 3)  # 256 tokens an update
    assert line["mfu"] == pytest.approx(512 * flops_per_token(model, 32) / (2 * 989e12))
    assert [line["tokens_per_s"] for line in others] == [1024, 256]


@pytest.mark.parametrize("batch_tokens,says", [(256, False), (2**30, True)])
def test_on_a_cpu_a_run_says_that_it_is_for_a_gpu(batch_tokens, says, tmp_path, capsys):
    config, settings, _ = parse_config([*SHORT, "--out", str(tmp_path)])
    settings = dataclasses.asdict(settings) | {"batch_tokens": batch_tokens}
    log = Log(str(tmp_path), 0)
    log.begin(Transformer(config), {"train": settings}, "cpu", n_process=1, n_tokens=1)
    said = capsys.readouterr().out
    assert ("for a GPU: two CPU cores need about" in said) == says
    assert ("less with --batch_tokens 32 --micro_batch 1" in said) == says


def test_the_time_of_evaluations_and_checkpoints_is_not_that_of_updates(
    data, tmp_path, monkeypatch
):
    """On a clock that goes on by 1 at each look, and by 1000 in each of these."""
    now = [0]

    def look():
        now[0] += 1
        return now[0]

    def slowly(function):
        def run(*args):
            now[0] += 1000
            return function(*args)

        return run

    monkeypatch.setattr("data.device.time", SimpleNamespace(perf_counter=look))
    monkeypatch.setattr(train, "evaluate", slowly(evaluate))
    monkeypatch.setattr(train.Saver, "collect", slowly(train.Saver.collect))
    args = "--steps 6 --eval_every 2 --save_every 3 --out".split()
    main([*SHORT, "--data", str(data), *args, str(tmp_path)])
    assert {line["tokens_per_s"] for line in read_log(tmp_path)[0]} == {256}
    # Only a step that was evaluated has a held-out loss.
    losses = [load_checkpoint(tmp_path / f"step-{n:08d}.pt")[1]["val_loss"] for n in (3, 6)]
    assert losses[0] is None and losses[1] == read_log(tmp_path)[1][-1]["val_loss"]


def test_data_that_just_suffice_are_taken(data):
    n, size = load_meta(data)["val"]["tokens"], load_meta(data)["vocab_size"]

    def check(length):
        words = f"--block_size {length} --batch_tokens {length} --eval_tokens {length}".split()
        words += ["--micro_batch", "1", "--vocab_size", str(size), "--data", str(data)]
        config, settings, _ = parse_config(words)
        return train.check_run(config, settings, None, "cpu")[0]

    assert check(n - 1) == load_meta(data)
    with pytest.raises(ValueError, match=f"val. has {n} tokens, .* --block_size {n - 1} or less"):
        check(n)


@pytest.mark.gpu
def test_a_moment_is_the_gpus_however_late_the_cpu_looks():
    moments = [Moment("cuda")]
    for _ in range(3):
        torch.cuda._sleep(10**8)  # cycles: at least 40 ms
        moments.append(Moment("cuda"))
    moments[-1].wait()
    spans = [later.seconds_since(earlier) for earlier, later in pairwise(moments)]
    assert 0.04 < min(spans) and max(spans) < 2 * min(spans)


def test_an_update_of_one_micro_batch_in_each_process_becomes_a_graph(monkeypatch):
    monkeypatch.setattr(train, "can_capture", lambda model: True)
    model = Transformer(Config(**TINY))  # sequences of 8 tokens
    for n_process, batch_tokens, becomes in [(1, 32, True), (1, 64, False), (2, 64, True)]:
        settings = TrainConfig(micro_batch=4, batch_tokens=batch_tokens)
        assert train.becomes_graph(model, settings, n_process) == becomes
    monkeypatch.setattr(train, "can_capture", lambda model: False)
    assert not train.becomes_graph(model, TrainConfig(micro_batch=4, batch_tokens=32), 1)


@pytest.mark.parametrize("n_process, n_before", [(1, 1), (2, 11)])
def test_a_graph_comes_after_some_calls_and_reads_one_place(n_process, n_before, monkeypatch):
    places, captured = [], []

    def double(x):
        places.append(x.data_ptr())
        return 2 * x

    def capture(work, stream):
        captured.append(len(places))
        return work

    monkeypatch.setattr("data.device.capture", capture)
    monkeypatch.setattr("data.device.side_stream", lambda: None)
    run = graphed(double, n_process)
    batches = [torch.tensor([i]) for i in range(15)]
    assert [run(x).item() for x in batches] == list(range(0, 30, 2))
    assert captured == [n_before] and len({*places[n_before:]}) == 1
    assert [x.item() for x in batches] == list(range(15))


def test_this_torch_can_start_its_compilers_early():
    start_compilers()  # a private name of torch: ImportError if it is gone


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    batch = draw_batch(tokens, 8, 16, seed=1, step=5)
    assert batch.shape == (8, 17) and torch.equal(batch, draw_batch(tokens, 8, 16, seed=1, step=5))
    assert torch.equal(batch, batch[:, :1] + torch.arange(17))  # whole sequences of the data
    for seed, step in ((1, 6), (2, 5), (2, 4), (5, 1)):
        assert not torch.equal(batch, draw_batch(tokens, 8, 16, seed, step))
    last = draw_batch(tokens[:17], 8, 16, seed=1, step=5)[:, -1]  # the last token is reached
    assert last.tolist() == [16] * 8


def test_evaluation_is_the_mean_over_the_first_tokens():
    torch.manual_seed(0)
    model = Transformer(Config(**TINY, n_expert=4, top_k=2))
    tokens = np.random.default_rng(0).integers(50, size=100)
    rows = torch.from_numpy(np.stack([tokens[i * 8 : i * 8 + 9] for i in range(5)]))
    expected = model.eval()(rows[:, :-1], rows[:, 1:]).item()
    model.train()
    assert evaluate(model, tokens[:48], 8, 2, "cpu").item() == pytest.approx(expected, rel=1e-5)
    assert model.training and not model.moes()[0].load.any()  # experts were chosen in eval mode


def test_bits_per_byte_are_those_of_the_tokens_that_were_measured(monkeypatch):
    """Here token 257 is three bytes, and 258 the end of a text, which has none."""
    ranks = {**{bytes([i]): i for i in range(256)}, b"ab": 256, b"abc": 257}
    tokenizer = tiktoken.Encoding(
        "abc", pat_str=".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    tokens = np.array([257, 257, 65, 258, 66, 257])  # of these 4 or 5 are predicted
    assert bits_per_byte(tokens, 4, tokenizer) == pytest.approx(4 / 5 / math.log(2))
    assert bits_per_byte(tokens, 5, tokenizer) == pytest.approx(5 / 8 / math.log(2))
    monkeypatch.setattr("data.evaluation.CHUNK", 2)  # many tokens are read in pieces
    assert bits_per_byte(tokens, 5, tokenizer) == pytest.approx(5 / 8 / math.log(2))
    assert math.isfinite(bits_per_byte(tokens[2:4], 1, tokenizer))  # no text, and no error


# --- starting from weights that are there ---


def test_a_new_run_starts_from_the_weights_of_another(whole, data, tmp_path, monkeypatch, capsys):
    """With one more knock, at the identity. The learning rate 0 shows the start."""
    monkeypatch.setattr(train, "lr_at", lambda *_: 0.0)
    args = ["--init", str(whole), "--data", str(data), "--out", str(tmp_path), "--steps", "1"]
    main([*SHORT, *args, "--knock_q", "linear", "--balance_rate", "0"])
    assert f"beginning with the weights of {whole}\n" in capsys.readouterr().out
    trained, about = load_checkpoint(whole)
    model, checkpoint = load_checkpoint(tmp_path)
    assert checkpoint["step"] == 1 and model.config.knock_q == "linear"
    assert checkpoint["val_loss"] == pytest.approx(about["val_loss"], rel=1e-6)
    new = model.state_dict()
    assert torch.equal(new.pop("blocks.0.attn.wq.knock.t"), torch.eye(8))
    assert equal_weights(new, trained.state_dict())
    settings, *lines = lines_of(tmp_path)
    assert settings["train"]["init"] == str(whole) and lines[0]["step"] == 1


def test_a_new_run_starts_from_a_qwen3_folder(data, tmp_path):
    pytest.importorskip("safetensors")
    shape = dict(vocab_size=320, block_size=32, n_layer=1, n_embd=32, n_head=4, n_kv_head=2)
    model = scramble(Transformer(Config(**shape, head_dim=8, d_ff=32, knock_v="none")))
    export_hf(model, tmp_path / "qwen3", load_tokenizer("byte"))

    def start_of(*more):
        args = ["--init", str(tmp_path / "qwen3"), "--knock_v", "mlp", "--block_size", "16", *more]
        config, settings, checkpoint = parse_config(args)
        start, _ = train.build_model(config, settings, "cpu", 1)
        restore(start, make_optimizer(start, settings), checkpoint)
        return start

    start, tokens = start_of(), torch.randint(320, (2, 16))
    config = start.config
    assert (config.knock_v, config.n_embd, config.block_size) == ("mlp", 32, 16)
    torch.testing.assert_close(start(tokens), model(tokens), rtol=1e-4, atol=1e-4)

    def start_of_knock(seed):
        return start_of("--knock_init", "random", "--seed", seed).blocks[0].attn.wv.knock.up

    assert torch.equal(start_of_knock("1"), start_of_knock("1"))
    assert not torch.equal(start_of_knock("1"), start_of_knock("2"))


def test_a_random_start_of_knocks_changes_no_other_weight():
    """So its runs are pairs with those of no knocks, too."""

    def start(**knocks):
        config = Config(**{**TINY, "n_layer": 2}, tie_embeddings=False, **knocks)
        return dict(train.build_model(config, TrainConfig(), "cpu", 1)[0].named_parameters())

    without, random = start(knock_v="none"), start(knock_v="mlp", knock_init="random")
    assert all(torch.equal(random[name], p) for name, p in without.items())
    knocks = [p.flatten() for name, p in random.items() if "knock." in name]
    assert len(knocks) == 6
    others = torch.cat([p.flatten() / p.std() for p in without.values() if p.dim() == 2])
    for i, knock in enumerate(knocks):  # all of their 64 numbers are new: the same ones give 8
        assert (others.unfold(0, 64, 1) @ (knock / knock.norm()) < 6).all()
        assert all((knock - other).norm() > 0.1 * knock.norm() for other in knocks[:i])


@pytest.mark.parametrize(
    "change,message",
    [
        ("--n_embd 64", "do not fit a model with --n_embd 64 .* differs.: leave out what changes"),
        ("--n_layer 2", "do not fit a model with --n_layer 2"),
        ("--knock_v none", "has trained with knock_v mlp, .*: leave out --knock_v none, or start"),
        ("--knock_v linear", "has trained with knock_v mlp, .*: leave out --knock_v linear"),
        ("--n_expert 0 --top_k 0", "do not fit a model with --n_expert 0, --top_k 0"),
        ("--knock_v mlp --knock_init random", "--knock_init random is for new knocks, and there"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, whole):
    with pytest.raises(ValueError, match=message) as error:
        parse_config(["--init", str(whole), *change.split()])
    assert "\n" not in str(error.value)


# --- the command line ---


def test_every_option_is_typed_and_the_config_is_the_default():
    words = ["gpt2", "--n_layer", "3", "--lr", "1e-4", "--no-compile"]
    config, settings, resume = parse_config(words)
    assert (config.n_layer, config.n_embd) == (3, 768)
    assert (settings.lr, settings.compile, resume) == (1e-4, False, None)
    assert settings.out == "out/gpt2"
    assert parse_config([])[0].n_expert == 8  # toy


def test_bytes_that_are_not_text_are_refused():
    with pytest.raises(ValueError, match="^--out a.b is not UTF-8 text: convert or rename it"):
        parse_config(["--out", "a\udcffb"])


def test_help_says_what_each_option_is(run_here):
    words = " ".join(run_here(main, "--help").stdout.split())
    lr = "--lr float peak, after 5% warm-up; a cosine takes it to 10%"
    assert f"{lr} (default: the config's own)" in words  # each has one
    assert "--n_layer int blocks (default: 12, or the config's own)" in words
    assert "--attention str gqa, gta or mla (default: gqa)" in words
    assert "out/CONFIG if not given --init str" in words  # an empty text is no default


@pytest.mark.parametrize("where", ["build_model", "update"])
def test_a_gpu_without_memory_is_told_what_would_help(data, tmp_path, monkeypatch, where):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, where, fail)
    with pytest.raises(ValueError, match="the GPU's memory is too small for this run: it needs"):
        main([*SHORT, "--data", str(data), "--out", str(tmp_path)])
    settings = TrainConfig(micro_batch=1, batch_tokens=2**22)
    advice = memory_advice(Config(**CONFIGS["moe-1b-6.1b"]), settings, 8)
    assert advice.startswith("it needs about 119 GiB a GPU; with --recompute: 108, --parallel fsdp")
    assert "--micro_batch" not in advice and "\n" not in advice  # it is 1 already


def test_smaller_micro_batches_are_advised_only_if_they_need_less():
    """Two in an update add their gradients up, which takes more than the smaller one saves."""
    config, one = Config(**CONFIGS["moe-0.4b-2.3b"]), TrainConfig(micro_batch=4, batch_tokens=2**14)
    assert "--micro_batch" not in memory_advice(config, one, 1)
    more = dataclasses.replace(one, batch_tokens=2**16)
    assert "with --micro_batch 2: " in memory_advice(config, more, 1)


@pytest.mark.parametrize(
    "args,message",
    [
        ("--n_leyer 3", "unknown option --n_leyer: did you mean --n_layer?"),
        ("--batch_size 4", "unknown option --batch_size: did you mean --micro_batch?"),
        ("--init_from resume", "unknown option --init_from: did you mean --resume?"),
        ("--dropout 0.1", "unknown option --dropout: none is like it, see --help"),
        ("--compile=False", "ignored explicit argument 'False': a switch takes no value"),
        ("toy out/toy", "unrecognized arguments: out/toy: put a value after its option"),
        ("huge", "invalid choice: 'huge'"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--steps 0", "steps must be > 0"),
        ("--lr nan", "lr must be > 0"),
        ("--lr 1e39", "lr must be > 0 and < 2^63, not 1e+39"),
        ("--seed 99999999999999999999", "seed must be >= 0 and < 2^63, not 99999999999999999999"),
        ("--weight_decay=-1", "weight_decay must be >= 0"),
        ("--norm_eps nan", "norm_eps must be > 0"),
        ("--beta2 1", "beta1 and beta2 must be under 1, not 0.9 and 1.0"),
        ("--out EMPTY", "--out is empty"),
        ("--out=~/x", "--out ~/x: your shell left the ~: put a space before, not ="),
        ("--init EMPTY", "--init is empty"),
        ("--n_kv_head 3", "n_head must be a multiple of n_kv_head"),
        ("--data DATA --batch_tokens 1000",
         "of block_size * processes = 256 * 1 = 256, not 1000: add --batch_tokens 1024"),
        ("--balance rsm", "balance must be one of rms, sign"),
        ("--device tpu", "device 'tpu' is not available"),
        ("--data DATA --vocab_size 100",
         "a vocabulary of 257 (byte), more than the model's 100: add --vocab_size 320"),
        ("--data DATA --eval_tokens 16", "eval_tokens must be at least block_size, 256, not 16"),
        ("--data nowhere", "no prepared data in nowhere"),
        (f"--data {__file__}", "is a file: name a folder that data/prepare.py made"),
        ("--data DATA --out RUN", "holds a run already: add --resume"),
        ("--data DATA --out RUN --lr nan", "lr must be > 0 and < 2^63, not nan"),
        ("--data DATA --out DATA", "holds the data: choose another --out"),
        ("--init llama/model.safetensors", "name the folder of the model, not a file in it"),
        ("--init nowhere", "--init nowhere: there is no such file or folder"),
        ("--init llama/config.json", "name the folder of the model, not a file in it"),
        ("--out BROKEN --resume", "damaged"),
        ("--out RUN --resume --n_layer 3",
         "halves (1): leave it out to go on with that run, or name another with --out"),
        ("--out RUN --resume --init BROKEN", "halves (''): leave it out to go on with that run"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(args, message, data, halves, tmp_path, run_here):
    broken = tmp_path / "broken" / "step-00000001.pt"
    broken.parent.mkdir()
    broken.write_bytes(b"PK")
    before = contents(tmp_path)
    places = {"DATA": data, "RUN": halves, "BROKEN": broken.parent, "EMPTY": ""}
    words = [places.get(word, word) for word in args.split()]
    done = run_here(main, *words, *([] if "--out" in args else ["--out", tmp_path / "new"]))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("train.py: error: ") and message in done.stderr
    assert contents(tmp_path) == before
