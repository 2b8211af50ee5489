"""Sampling: the cache changes nothing, the options do what they say, bad input is one line."""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

from data.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from data.device import can_capture, pick_device
from data.evaluation import evaluate
from data.loss import chunk_loss
from data.prepare import prepare
from data.tokens import load_meta, load_tokenizer, open_tokens
from kha import Config, Transformer
from sample import (
    Cache,
    compile_steps,
    generate,
    lighten,
    main,
    sample_logits,
    write_samples,
)
from tests.reference import scramble
from tests.runs import ROOT, change_token

TINY = dict(
    vocab_size=320, block_size=64, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=32
)


@pytest.fixture
def model():
    return scramble(Transformer(Config(**TINY, n_expert=4, top_k=2))).eval()


def new_tokens(*args, **options):
    return [list(step) for step in zip(*generate(*args, **options), strict=True)]


def save(model, folder):
    """As step 1 of a run in the folder."""
    weights = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    rest = {"format": FORMAT, "train": {}, "tokenizer": "byte", "step": 1, "val_loss": 1.25}
    save_checkpoint(folder, {**weights, **rest}, best=True)


@pytest.mark.parametrize("prompt", [[5], list(range(30))], ids=["one token", "thirty"])
@pytest.mark.parametrize("how", [(0, 0, 1), (0.9, 50, 0.9)], ids=["greedy", "drawn"])
def test_with_the_cache_as_without(model, prompt, how):
    options = dict(zip(("temperature", "top_k", "top_p"), how, strict=True))
    (cached,) = new_tokens(model, prompt, max_new_tokens=30, seed=3, **options)
    plain, generator = list(prompt), torch.Generator().manual_seed(3)
    for _ in range(30):
        logits = model(torch.tensor([plain]))[:, -1]
        plain.append(sample_logits(logits, generator=generator, **options).item())
    assert cached == plain[len(prompt) :]


@pytest.mark.parametrize("n_prompt", [1, 20, 63, 64, 100])
def test_text_longer_than_the_context_slides(model, n_prompt):
    """The model sees the end of a long prompt; a full context goes on from its last half."""
    prompt = torch.randint(320, (n_prompt,)).tolist()
    samples = new_tokens(model, prompt, n_samples=2, max_new_tokens=150, temperature=0)
    seen, plain = prompt[-64:], []
    for _ in range(150):
        plain.append(model(torch.tensor([seen]))[0, -1].argmax().item())
        seen = (seen if len(seen) < 64 else seen[-31:]) + plain[-1:]
    assert samples == [plain, plain]


def test_a_batch_of_samples_differs_and_the_seed_repeats(model):
    def draw(seed):
        options = dict(n_samples=3, max_new_tokens=20, temperature=1.0)
        return new_tokens(model, [1], seed=seed, **options)

    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(sample) for sample in draw(0)}) == 3
    greedy = new_tokens(model, [1], n_samples=2, max_new_tokens=20, temperature=0)
    assert greedy[0] == greedy[1] == new_tokens(model, [1], max_new_tokens=20, temperature=0)[0]


def test_top_k_top_p_and_temperature():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1 - 1e-6]]).log().expand(4000, -1)

    def share(temperature=1, top_k=0, top_p=1):
        tokens = sample_logits(logits, temperature, top_k, top_p, generator=None)
        return (tokens.bincount(minlength=4) / 4000).tolist()

    torch.manual_seed(0)
    assert share() == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.04)
    assert share(top_k=2) == pytest.approx([5 / 8, 0, 3 / 8, 0], abs=0.04)
    # Of the likeliest, 0.5 is too little for 0.6, and 0.8 is enough.
    assert share(top_p=0.6) == pytest.approx([5 / 8, 0, 3 / 8, 0], abs=0.04)
    assert share(top_p=0.4) == [1, 0, 0, 0]
    equal = torch.zeros(4000, 4)  # two tokens have exactly a half
    drawn = sample_logits(equal, temperature=1, top_k=0, top_p=0.5, generator=None)
    assert len(drawn.unique()) == 2
    assert share(temperature=0) == [1, 0, 0, 0]
    for tiny in (1e-39, 1e-300):  # in float32 the quotients are infinite, and the second is 0
        assert sample_logits(logits[:1, [1, 0]], tiny, 0, 1, generator=None) == 1
        assert sample_logits(logits[:1, [1, 0]], tiny, 0, 0.9, generator=None) == 1
    assert share(temperature=0.5)[0] == pytest.approx(0.25 / (0.25 + 0.09 + 0.02), abs=0.04)


def test_ids_outside_the_tokenizer_are_never_drawn(model):
    (tokens,) = new_tokens(model, [1], max_new_tokens=60, temperature=5.0, n_vocab=10)
    assert max(tokens) < 10


def test_each_sample_stops_at_end_of_text(model):
    options = dict(n_samples=4, max_new_tokens=60, temperature=3.0, n_vocab=8, eot=7)
    samples = new_tokens(model, [1], **options)
    assert all(7 not in tokens for tokens in samples)
    for tokens in samples:
        length = tokens.index(None) if None in tokens else len(tokens)
        assert None not in tokens[:length] and set(tokens[length:]) <= {None}
    assert sum(None in tokens for tokens in samples) > 1
    shortest = max(len(tokens) - tokens.count(None) for tokens in samples)
    assert len(samples[0]) <= shortest + 1  # nothing is computed once all have ended


@pytest.mark.parametrize(
    "prompt,options,message",
    [
        ([], {}, "the prompt is empty"),
        ([320], {}, "outside the model's vocabulary of 320"),
        ([-1], {}, "outside the model's vocabulary of 320"),
        ([1], dict(n_samples=0), "at least 1"),
        ([1], dict(top_p=0), "top_p"),
        ([1], dict(top_p=1.1), "top_p"),
        ([1], dict(temperature=-1), "temperature"),
        ([1], dict(temperature=math.nan), "temperature"),
        ([1], dict(top_k=-1), "top_k"),
        ([1], dict(seed=2**64), "seed must be from .* not 18446744073709551616"),
        ([1], dict(seed=-(2**63) - 1), "seed must be"),
    ],
)
def test_generate_refuses_in_one_line(model, prompt, options, message):
    with pytest.raises(ValueError, match=message) as error:
        next(generate(model, prompt, **{"max_new_tokens": 5, **options}))
    assert "\n" not in str(error.value)


def test_what_is_written_is_whole_characters_up_to_the_end_of_the_text(model, capsys):
    text = "naïve – 漢字"
    ids, prompts = load_tokenizer("byte").encode(text), []

    class Parrot(Transformer):  # says the text, byte by byte, whatever it is asked
        def forward(self, tokens, targets=None, position=None, cache=None):
            if position is None:
                prompts.append(tokens.tolist())
            said = 0 if position is None else position.item()
            return torch.nn.functional.one_hot(torch.tensor([[ids[said]]]), 320).float()

    with torch.device("cpu"):
        parrot = Parrot(Config(**TINY))
    write_samples(parrot, load_tokenizer("byte"), "", max_new_tokens=len(ids), temperature=0)
    assert capsys.readouterr().out == text + "\n"
    write_samples(parrot, load_tokenizer("byte"), "", max_new_tokens=len(ids) - 1, temperature=0)
    assert capsys.readouterr().out == text[:-1] + "\ufffd\n"  # it ends within a character
    assert prompts == [[[256]]] * 2  # an empty prompt is the start of a document
    write_samples(parrot, load_tokenizer("byte"), "<|endoftext|>", max_new_tokens=1)
    assert prompts[-1] == [list(b"<|endoftext|>")]  # in a prompt it is text, as in a document
    ids.extend([256, *b"not written"])  # 256 ends the text
    capsys.readouterr()
    write_samples(parrot, load_tokenizer("byte"), "", 2, max_new_tokens=len(ids), temperature=0)
    assert capsys.readouterr().out == f"--- 1 of 2 ---\n{text}\n--- 2 of 2 ---\n{text}\n"


def test_a_single_text_appears_while_it_is_written(model, capsys, monkeypatch):
    shown = []

    def generate(*_, **__):
        for token in b"abc":
            yield [token]
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr("sample.generate", generate)
    write_samples(model, load_tokenizer("byte"), "the ")
    assert shown == ["the a", "b", "c"]


def test_the_script_writes_samples(model, run_here):
    os.makedirs("out/toy")  # the default
    save(model, "out/toy")

    def write(*words, **how):
        done = run_here(main, "--max_new_tokens", 10, *words, **how)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = write("--prompt", "def")
    assert one.startswith("def") and 10 < len(one) <= len("def") + 10 + 1
    assert write("--prompt", "-", stdin=b"def") == one
    several = write("--prompt", "def", "--n_samples", 3)
    rulers = re.findall(r"^--- (.*) ---\ndef", several, re.MULTILINE)
    assert rulers == ["1 of 3", "2 of 3", "3 of 3"]


@pytest.mark.parametrize(
    "args,message",
    [
        ("--checkpoint none.pt", "no checkpoint at"),
        ("--checkpoint broken.pt", "damaged"),
        ("--checkpoint none.pt --top_p 2", "top_p must be"),  # before a model is loaded
        ("--prompt -x1", "a value needs =, as in --option=-VALUE"),
        ("--top 5", "unknown option --top: did you mean --top_"),
        ("--out_dir x", "unknown option --out_dir: did you mean --checkpoint?"),
        ("--start x", "unknown option --start: did you mean --prompt?"),
        ("--device tpu", "device 'tpu' is not available"),
        ("--seed x", "invalid int value"),
        ("--prompt -", "the prompt is not UTF-8 text"),
        ("--prompt a\udcff", "--prompt a? is not UTF-8 text"),
        ("--evaluate a --export_hf b", "give one of them"),
        ("--evaluate a --top_p 0.5", "--top_p changes nothing in"),
        ("--export_hf a --prompt b", "--prompt changes nothing"),
        ("--export_hf EMPTY", "--export_hf is empty"),
        ("--device cpu --compile", "--compile is for CUDA"),
    ],
)
def test_bad_input_is_one_line(args, message, model, tmp_path, run_here):
    save(model, tmp_path)
    checkpoint = tmp_path / "step-00000001.pt"
    Path("broken.pt").write_bytes(checkpoint.read_bytes()[:1000])
    words = ["" if word == "EMPTY" else word for word in args.split()]
    done = run_here(main, "--checkpoint", checkpoint, *words, stdin=b"a\xff")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("sample.py: error: ") and message in done.stderr


def test_the_held_out_loss_of_a_checkpoint(whole, data, capsys):
    main(["--checkpoint", str(whole), "--device", "cpu", "--evaluate", str(data)])
    counts, (model, _) = load_meta(data)["val"], load_checkpoint(whole)
    loss = evaluate(model, open_tokens(data, "val"), 32, 8, "cpu").item()
    n = (counts["tokens"] - 1) // 32 * 32  # a sequence that is cut short is not measured
    measured = open_tokens(data, "val")[1 : n + 1]
    bits = loss / math.log(2) * n / (measured != 256).sum()  # the end of a text has no bytes
    output = capsys.readouterr().out
    assert output.startswith(f"{loss:.4f} nats per token, {bits:.4f} bits per byte (3,")
    assert f"({n:,} of {counts['tokens']:,} held-out tokens of " in output


def test_of_little_text_all_is_measured(whole, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("1 and 2 are 3\n" * 5)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "data"))
    n = load_meta(tmp_path / "data")["val"]["tokens"]
    main(["--checkpoint", str(whole), "--device", "cpu", "--evaluate", str(tmp_path / "data")])
    output, (model, _) = capsys.readouterr().out, load_checkpoint(whole)
    ids = torch.tensor([open_tokens(tmp_path / "data", "val").tolist()])
    assert output.startswith(f"{model.eval()(ids[:, :-1], ids[:, 1:]):.4f} nats per token, ")
    assert f"({n - 1} of {n} held-out tokens of " in output and n < 32


def test_sequences_longer_than_a_micro_batch_are_measured(
    text, tmp_path, capsys, monkeypatch
):
    """Each one alone, by the loss in chunks, or it would need too much memory."""
    prepare([text], str(tmp_path / "data"), val_fraction=0.5)
    shape = dict(n_layer=1, n_embd=8, n_head=1, n_kv_head=1, head_dim=8, d_ff=8)
    save(Transformer(Config(vocab_size=257, block_size=9000, **shape)), tmp_path)
    sizes = []

    def count(x, *rest):
        sizes.append(len(x))
        return chunk_loss(x, *rest)

    monkeypatch.setattr("data.loss.chunk_loss", count)
    main(["--checkpoint", str(tmp_path), "--device", "cpu", "--evaluate", str(tmp_path / "data")])
    assert "in sequences of 9000)" in capsys.readouterr().out
    assert len(sizes) > 1 and set(sizes) == {9000}


def test_data_that_have_changed_are_not_measured(whole, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "data")
    change_token(other / "val.bin", 7)
    with pytest.raises(ValueError, match="has changed since it was"):
        main(["--checkpoint", str(whole), "--device", "cpu", "--evaluate", str(other)])
    assert capsys.readouterr().out == ""


def test_output_that_nobody_reads_ends_quietly(model, tmp_path):
    save(model, tmp_path)
    command = f"{sys.executable} {ROOT}/sample.py --checkpoint {tmp_path}"
    script = f"{command} --prompt abc --max_new_tokens 60 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    note = f"{tmp_path}/best.pt: step 1, held-out loss 1.2500\n"  # and no traceback
    assert (done.returncode, done.stdout, done.stderr) == (141, "a", note)


def test_an_id_that_is_no_token_is_written_as_unknown(model, capsys):
    ranks, special = {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 319}
    tokenizer = tiktoken.Encoding(
        "gap", pat_str=".", mergeable_ranks=ranks, special_tokens=special
    )
    write_samples(model, tokenizer, "a", n_samples=3, max_new_tokens=40, temperature=5.0)
    assert "\ufffd" in capsys.readouterr().out


# --- on a GPU ---


def test_the_device_is_what_was_asked_for(monkeypatch):
    assert pick_device("cpu") == "cpu"
    message = "device 'cuda:0' is not available here: choose from .*cpu"
    with pytest.raises(ValueError, match=message):
        pick_device("cuda:0")
    for there, best in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert pick_device("auto") == best


@pytest.mark.parametrize("n_moe,chip,dtype,takes", [
    (0, 8, torch.float32, True), (1, 8, torch.bfloat16, False),
    (1, 9, torch.float32, False), (1, 9, torch.bfloat16, True),
])
def test_graphs_are_for_what_needs_no_cpu(n_moe, chip, dtype, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (chip, 0))
    weight = SimpleNamespace(is_cuda=True, device="cuda", dtype=dtype)
    embed = SimpleNamespace(weight=weight)
    fake = SimpleNamespace(embed=embed, moes=lambda: [None] * n_moe, compute_dtype=None)
    assert can_capture(fake) == takes and not can_capture(Transformer(Config(**TINY)))


@pytest.mark.parametrize("n_prompt", [1, 62, 63, 64, 70], ids=lambda n: f"{n} of 64")
def test_the_step_is_captured_once_after_it_has_run(n_prompt, model, monkeypatch):
    """Also where the prompt fills the context, so that the first new token needs no step."""
    right = new_tokens(model, [1] * n_prompt, 2, 6)
    lengths, captured = [], []

    def capture(step, generator):
        captured.append(list(lengths))
        return step

    monkeypatch.setattr("sample.can_capture", lambda model: True)
    monkeypatch.setattr("sample.capture", capture)
    model.embed.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape))
    assert new_tokens(model, [1] * n_prompt, 2, 6) == right
    (before,) = captured
    assert before.count((2, 1)) == 1


@pytest.mark.gpu
def test_for_sampling_all_but_the_routers_becomes_bfloat16():
    model = lighten(Transformer(Config(**TINY, n_expert=4, top_k=2)).to("cuda"))
    dtypes = {name.split(".")[-1]: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("router") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("n_samples", [1, 32])
@pytest.mark.parametrize("shape", [
    {}, dict(n_expert=128, top_k=4), dict(attention="gta"),
    dict(attention="mla", kv_rank=16, knock_v="linear"),
], ids=["dense", "mixture", "gta", "mla"])
def test_compiled_steps_are_eager_ones(shape, n_samples):
    model = scramble(Transformer(Config(**TINY, **shape))).to("cuda", torch.bfloat16).eval()
    device = model.embed.weight.device

    @torch.no_grad()
    def step():
        cache = Cache(model, 4)
        with torch.compiler.set_stance("force_eager"):
            model(torch.tensor([[5, 6, 7]], device=device), cache=cache)
        cache.repeat(n_samples)
        position = torch.tensor([3], device=device)
        return model(
            torch.arange(n_samples, device=device)[:, None], position=position, cache=cache
        )

    eager = step()
    assert len(new_tokens(model, [5, 6, 7], n_samples, max_new_tokens=4)) == n_samples
    compile_steps(model, n_samples)
    assert (step() - eager).norm() < 0.05 * eager.norm()
    assert len(new_tokens(model, [5, 6, 7], n_samples, max_new_tokens=4)) == n_samples


def test_the_end_of_the_model_is_compiled_with_its_blocks(model, monkeypatch):
    calls, options = [], dict(max_new_tokens=3, temperature=0)
    eager = new_tokens(model, [5, 6, 7], **options)

    def compiled(function, **_):
        return lambda x: calls.append(x.shape) or function(x)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    compile_steps(model, 1)
    assert new_tokens(model, [5, 6, 7], **options) == eager
    assert (1, 1, 32) in calls
