"""The knocks, attention and the model against the plainest float64 version of the paper's equations."""

import copy
import dataclasses
import resource

import pytest
import torch
import torch.nn as nn

import kha
from data.checkpoint import load_checkpoint, save_checkpoint
from kha import (
    CONFIGS, KNOCKS, Cache, Config, Linear, Transformer, count_params, flops_per_token, fold, heads,
    memory_per_gpu, paper_flops, rope_tables, rotate,
)
from sample import generate
from tests import reference
from tests.reference import scramble

SMALL = dict(vocab_size=50, block_size=32, n_layer=2, n_embd=24, n_head=6, n_kv_head=2, head_dim=8, d_ff=24)


def build(name, **overrides):
    with torch.device("meta"):
        return Transformer(Config(**{**CONFIGS[name], **overrides}))


# --- knocks ---


@pytest.mark.parametrize("kind", ["linear", "mlp", "gate"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_knock_is_the_equation_forward_and_backward(kind, dtype, tolerance):
    torch.manual_seed(0)
    projection, knock = Linear(12, 3 * 8), KNOCKS[kind](8)
    both = scramble(nn.ModuleList((projection, knock)).to(dtype))
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    out_grad = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    y = heads(x, projection, knock)
    y.backward(out_grad.to(dtype))

    exact = {name.split(".")[-1]: p.detach().double().requires_grad_() for name, p in both.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    exact_y = reference.knock(kind, exact, (exact_x @ exact["weight"].T).unflatten(-1, (3, 8)))
    exact_y.backward(out_grad)
    torch.testing.assert_close(y.double(), exact_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=10 * tolerance)
    for name, p in both.named_parameters():  # every head's gradient arrives in the one shared matrix
        expected = exact[name.split(".")[-1]].grad
        torch.testing.assert_close(p.grad.double(), expected, rtol=tolerance, atol=100 * tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a CUDA GPU")
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("n_token", [1, 77, 4096], ids=["less than a tile", "uneven tiles", "many tiles"])
def test_the_kernel_is_the_equation_forward_and_backward(head_dim, n_token):
    torch.manual_seed(0)
    knock = scramble(KNOCKS["mlp"](head_dim)).to("cuda", torch.bfloat16)
    x = torch.randn(2, n_token, 3, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y_grad = torch.randn_like(x).mT.contiguous().mT  # not contiguous, as attention's may be
    assert kha.can_fuse(x) or head_dim == 128 and torch.cuda.get_device_capability() < (9, 0)
    y = knock(x)
    y.backward(y_grad)

    exact = {name: p.detach().double().requires_grad_() for name, p in knock.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    exact_y = reference.knock("mlp", exact, exact_x)
    exact_y.backward(y_grad.double())
    pairs = [(y, exact_y), (x.grad, exact_x.grad), *((p.grad, exact[name].grad) for name, p in knock.named_parameters())]
    for ours, right in pairs:
        assert (ours - right).norm() < 0.01 * right.norm()  # bfloat16 rounds to 0.4%


@pytest.mark.parametrize("place", ["knock_q", "knock_k", "knock_v"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_step_0_the_model_is_the_baseline_bit_for_bit(place, kind, dtype):
    tokens = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    baseline = Config(**SMALL, knock_v="none", n_expert=4, top_k=2)
    torch.manual_seed(7)
    without = Transformer(baseline, dtype)
    torch.manual_seed(7)
    knocking = Transformer(dataclasses.replace(baseline, **{place: kind}), dtype)
    assert list(knocking.knocks()) == [f"blocks.{i}.attn.{place}" for i in range(2)]
    assert torch.equal(without(tokens), knocking(tokens))


@pytest.mark.parametrize("kind,matrices", [("none", 0), ("linear", 1), ("mlp", 3), ("gate", 1)])
def test_one_set_of_knock_matrices_serves_all_heads(kind, matrices):
    for n_head in (2, 6):
        model = Transformer(Config(**{**SMALL, "n_head": n_head, "n_kv_head": n_head, "knock_v": kind}))
        knocks = [p for place, knock in model.knocks().items() if "blocks.0" in place for p in knock.parameters()]
        assert [tuple(p.shape) for p in knocks] == [(8, 8)] * matrices


def test_knock_movement_reports_diagonal_and_the_rest():
    model = Transformer(Config(**SMALL, knock_q="linear"))
    assert model.knock_movement()["blocks.0.attn.knock_q.t"] == (1, 0)
    assert model.knock_movement()["blocks.1.attn.knock_v.gate"] == (0, 0)
    with torch.no_grad():
        t = model.knocks()["blocks.0.attn.knock_q"].t
        t.copy_(torch.eye(8) * 0.5)
        t[0, 1], t[3, 2] = 3, -4
    assert model.knock_movement()["blocks.0.attn.knock_q.t"] == (0.5, 5)


# --- the model ---


LINEAR, MLP, NONE = ("linear",) * 3, ("mlp",) * 3, ("none",) * 3
VARIANTS = {  # attention: (its shape, the knocks on q, k, v to try)
    "MQA": (dict(n_kv_head=1), [NONE, LINEAR, MLP]),
    "GQA": (dict(n_kv_head=2), [NONE, LINEAR, MLP, ("gate",) * 3, ("linear", "none", "mlp")]),
    "MHA": (dict(n_kv_head=6), [NONE, LINEAR, MLP]),
    "GTA": (dict(attention="gta"), [NONE, ("linear", "none", "linear"), ("mlp", "none", "mlp"), ("none", "none", "gate")]),
    "MLA": (dict(attention="mla", n_kv_head=1, kv_rank=20), [NONE, LINEAR]),
    "MLA with q_rank": (dict(attention="mla", n_kv_head=1, kv_rank=20, q_rank=12), [LINEAR]),
    "GLA": (dict(attention="mla", n_kv_head=2, kv_rank=20), [NONE, LINEAR]),
}
EVERY_VARIANT = pytest.mark.parametrize(
    "shape", [
        pytest.param(dict(shape, **dict(zip(("knock_q", "knock_k", "knock_v"), knocks))), id=f"{name}-{'-'.join(knocks)}")
        for name, (shape, tried) in VARIANTS.items() for knocks in tried
    ],
)


def error(a, b):
    """Relative error of a tensor against the exact one."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@EVERY_VARIANT
def test_model_is_the_equations_forward_and_backward(shape):
    model = scramble(Transformer(Config(**{**SMALL, **shape})).double())
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    weights = reference.plain_weights(model)
    exact = reference.forward(model.config, weights, tokens)
    logits = model(tokens)
    assert error(logits, exact) < 1e-6  # RoPE's angles are float32, whatever the model
    out_grad = torch.randn_like(exact)
    exact.backward(out_grad)
    logits.backward(out_grad)
    for (name, p), expected in zip(model.named_parameters(), weights.values(), strict=True):
        assert error(p.grad, expected.grad) < 1e-5, name
    assert error(model.float()(tokens), exact) < 1e-4
    loss = -exact.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(model(tokens, tokens).double(), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [7, 50, 2**29], ids=["many chunks", "uneven chunks", "one"])
def test_cross_entropy_in_chunks_is_the_whole_one_forward_and_backward(at_once, monkeypatch):
    monkeypatch.setattr(kha, "LOGITS_AT_ONCE", at_once * 3)
    model = scramble(Transformer(Config(**SMALL)).double())
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(1)
    exact = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).mean() * 3
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    loss = model(tokens, targets) * 3
    loss.backward()
    torch.testing.assert_close(loss, exact)
    for (name, p), gradient in zip(model.named_parameters(), gradients):
        assert error(p.grad, gradient) < 1e-10, name
    with torch.no_grad():  # as in evaluation
        torch.testing.assert_close(model(tokens, targets) * 3, exact)


def test_rope_turns_with_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = lambda x, position: rotate(x, rope_tables(torch.tensor([position]), 16, 10000.0))
    near, far = ((at(q, t) * at(k, t - 5)).sum() for t in (5, 105))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(near, (at(q, 5) * at(k, 3)).sum())


@EVERY_VARIANT
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 12], [19, 1]], ids=str)
def test_cached_pieces_give_the_logits_of_the_whole(shape, pieces):
    model = scramble(Transformer(Config(**{**SMALL, **shape})).double()).eval()
    tokens = torch.randint(50, (3, 20))
    cache = model.new_cache(20)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    assert error(logits, model(tokens)) < 1e-10


def test_cached_mixture_of_experts_gives_the_logits_of_the_whole():
    model = scramble(Transformer(Config(**SMALL, n_expert=4, top_k=2))).eval()
    tokens = torch.randint(50, (3, 20))
    cache = model.new_cache(20)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split([12] + [1] * 8, dim=1)], dim=1)
    assert error(logits, model(tokens)) < 1e-4


@pytest.mark.parametrize(
    "shape,elements",
    [
        (dict(n_head=32, n_kv_head=1), 256), (dict(n_head=16, n_kv_head=8), 2048), (dict(n_head=32, n_kv_head=4), 1024),
        (dict(n_head=16, n_kv_head=16), 4096), (dict(n_head=32, n_kv_head=4, attention="gta"), 512 + 64),
        (dict(n_head=32, n_kv_head=1, attention="mla", kv_rank=512, knock_v="linear"), 512 + 64),
        (dict(n_head=32, n_kv_head=2, attention="mla", kv_rank=512, knock_v="linear"), 512 + 64),
    ],
    ids=["MQA", "GQA-8", "GQA-4", "MHA", "GTA", "MLA", "GLA"],
)
def test_cache_sizes_of_table_3(shape, elements):
    """Counted from the buffers that sampling fills, per token and layer."""
    model = fold(Transformer(Config(**{**SMALL, "head_dim": 128, **shape})))
    list(generate(model, [1, 2, 3], n_samples=2, max_new_tokens=7))
    caches = []
    model.new_cache = lambda length: caches.extend(Transformer.new_cache(model, length)) or caches
    list(generate(model, [1, 2, 3], n_samples=2, max_new_tokens=7))
    assert {sum(buffer.numel() for buffer in cache.buffers) / (2 * cache.length) for cache in caches} == {elements}


def test_cache_says_when_it_is_full():
    cache = Cache(4)
    cache.reserve(3)
    with pytest.raises(ValueError, match="holds 4 positions, 5"):
        cache.reserve(2)


def test_bfloat16_activations_on_float32_weights():
    torch.manual_seed(0)
    model = Transformer(Config(**SMALL, n_expert=4, top_k=2), torch.bfloat16)
    tokens = torch.randint(50, (2, 32))
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    model(tokens, tokens).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    model.compute_dtype = None
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0.05, atol=0.05)


# --- folding ---


@EVERY_VARIANT
def test_folded_is_the_same_function_with_fewer_parts(shape):
    config = Config(**{**SMALL, **shape})
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(2))
    for seed in range(2):
        model = scramble(Transformer(config).double(), seed).eval()
        folded = fold(copy.deepcopy(model))
        assert not folded.knocks()
        assert error(folded(tokens), model(tokens)) < 1e-10
        caches = [m.new_cache(20) for m in (model, folded)]
        decoded = [torch.cat([m(t, cache=c) for t in tokens.split(1, 1)], 1) for m, c in zip((model, folded), caches)]
        assert error(decoded[1], decoded[0]) < 1e-10
        assert [b.shape for c in caches[0] for b in c.buffers] == [b.shape for c in caches[1] for b in c.buffers]


@EVERY_VARIANT
def test_folding_holds_at_the_start_and_after_training_steps(shape):
    torch.manual_seed(0)
    model = Transformer(Config(**{**SMALL, **shape})).double()
    tokens = torch.randint(50, (4, 20))
    assert error(fold(copy.deepcopy(model))(tokens), model(tokens)) < 1e-10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(off > 0 for _, off in model.knock_movement().values())
    folded = fold(copy.deepcopy(model))
    assert error(folded(tokens), model(tokens)) < 1e-10

    for m in (model, folded):  # as sampling has it: bfloat16 weights
        m.bfloat16()
    exact = model.float()(tokens)
    assert error(folded(tokens), exact) < 0.05


def test_what_a_fold_leaves():
    """Linear knocks leave a plain model; an MLP on the value leaves one wider projection and no matrix a head."""
    linear = fold(Transformer(Config(**SMALL | dict(knock_q="linear", knock_k="linear", knock_v="linear"))))
    plain = Transformer(Config(**SMALL | dict(knock_v="none")))
    assert linear.config == plain.config
    plain.load_state_dict(linear.state_dict())
    attn = fold(Transformer(Config(**SMALL | dict(knock_v="mlp")))).blocks[0].attn
    assert {name: tuple(p.shape) for name, p in attn.wv.named_parameters()} == {"weight": (2 * 2 * 8, 24)}


# --- sizes and costs ---


@pytest.mark.parametrize(
    "name,total,active",
    [
        ("moe-0.4b-2.3b", "2.3", "0.44"), ("moe-0.8b-6.6b", "6.6", "0.8"), ("moe-1.6b-14.6b", "14.6", "1.6"),
        ("dense-0.6b", "0.61", "0.61"), ("dense-1.7b", "1.68", "1.68"), ("dense-3.9b", "3.94", "3.94"),
        ("moe-1b-6.1b", "6.1", "1.01"), ("small", "0.12", "0.025"), ("gpt2", "0.124", "0.124"),
    ],
)
def test_sizes_of_the_named_configs(name, total, active):
    """Billions, as Table 5 and section 4 print them, which now round and now cut off: within one in the last digit."""
    for size, printed in zip(count_params(build(name)), (total, active)):
        assert abs(size / 1e9 - float(printed)) < 10.0 ** -len(printed.split(".")[1])


@pytest.mark.parametrize(
    "shape,active",
    [
        (dict(n_head=32, n_kv_head=1), 859), (dict(n_head=16, n_kv_head=8), 795), (dict(n_head=32, n_kv_head=4), 880),
        (dict(n_head=16, n_kv_head=16), 852), (dict(n_head=32, n_kv_head=4, attention="gta"), 868),
        # The paper prints 970 and no ranks; the round numbers nearest to it give 972.
        (dict(n_head=32, n_kv_head=1, attention="mla", kv_rank=512, q_rank=1024), 972),
    ],
    ids=["MQA", "GQA-8", "GQA-4", "MHA", "GTA", "MLA"],
)
def test_active_sizes_of_table_3(shape, active):
    model = build("moe-0.8b-6.6b", **shape, knock_v="none")
    assert round(count_params(model)[1] / 1e6) == active


def test_every_config_builds_on_the_meta_device():
    for name in CONFIGS:
        assert all(p.is_meta for p in build(name).parameters())


@pytest.mark.parametrize(
    "name,shape,micro_batch,how,measured",
    [
        ("gpt2", dict(knock_v="none"), 32, dict(accumulates=False), 13.7), ("gpt2", {}, 32, dict(accumulates=False), 14.3),
        ("gpt2", {}, 32, dict(n_shard=2), 13.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304, knock_v="none"), 8, {}, 64.2),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 8, {}, 64.7), ("moe-0.4b-2.3b", dict(vocab_size=50304), 1, {}, 41.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 4, dict(accumulates=False), 43.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 4, dict(accumulates=False, recompute=True), 34.6),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 8, dict(n_shard=2), 44.4),
        ("moe-1b-6.1b", dict(block_size=4096), 1, {}, 112.8), ("moe-1b-6.1b", dict(block_size=4096), 1, dict(n_shard=2), 57.1),
        ("moe-1b-6.1b", dict(block_size=4096), 2, dict(n_shard=2), 64.2),
    ],
)
def test_memory_is_within_15_percent_of_what_a_gpu_needed(name, shape, micro_batch, how, measured):
    """measured: torch.cuda.max_memory_allocated in GiB over updates, torch 2.11, compiled; 112.8 on an H200, else H100s."""
    config = Config(**{**CONFIGS[name], **shape})
    assert memory_per_gpu(config, micro_batch, **how)["total"] / 2**30 == pytest.approx(measured, rel=0.15)


def test_memory_falls_where_it_should():
    config = Config(**CONFIGS["moe-0.8b-6.6b"])
    alone, spread = memory_per_gpu(config, 1), memory_per_gpu(config, 1, n_shard=8)
    for part in ("weights", "adam", "gradients"):
        assert spread[part] == alone[part] / 8
    assert spread["activations"] == alone["activations"] == memory_per_gpu(config, 2)["activations"] / 2
    assert memory_per_gpu(config, 1, recompute=True)["activations"] < alone["activations"] / 5
    assert sum(alone.values()) == pytest.approx(2 * alone["total"])


def test_active_parameters_are_those_a_token_meets():
    moe = Config(**SMALL, n_expert=5, top_k=2)
    one_expert = 3 * SMALL["n_embd"] * SMALL["d_ff"] * SMALL["n_layer"]
    total, active = count_params(Transformer(moe))
    assert total - active == 3 * one_expert
    assert sum(p.numel() for p in Transformer(moe).parameters()) == total


def test_costs_are_the_papers():
    mha, ffn, kha = paper_flops(length=2048, d=1024, n_head=32)
    assert f"{kha / (mha + ffn):.2%} {kha / mha:.2%}" == "0.55% 1.17%"
    # The model's own count agrees with eq. 10-12 for the paper's layer: 3 x forward, no embedding, no norms.
    shape = dict(n_layer=1, n_embd=1024, n_head=32, n_kv_head=32, head_dim=32, d_ff=3072)
    with_knock, without = (
        flops_per_token(build("gpt2", **shape, knock_v=kind), 2048) for kind in ("mlp", "none")
    )
    assert with_knock - without == 3 * kha // 2048
    head = 6 * 1024 * 50304
    assert abs(without - head - 3 * (mha + ffn) / 2048) < 1e-3 * without


# --- bad input ---


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(n_head=6, n_kv_head=4), "n_head must be a multiple of n_kv_head"),
        (dict(head_dim=7), "head_dim must be even"),
        (dict(knock_v="lnear"), "knock_v must be one of none, linear, mlp, gate"),
        (dict(attention="mla", kv_rank=16), "mla takes linear knocks only"),
        (dict(attention="mla", knock_v="linear"), "mla needs a kv_rank"),
        (dict(attention="mla", knock_v="linear", kv_rank=15), "mla needs a kv_rank"),
        (dict(attention="gta", knock_k="linear"), "leave knock_k none"),
        (dict(attention="gta", head_dim=6), "a multiple of 4"),
        (dict(attention="gpa"), "attention must be one of gqa, gta, mla"),
        (dict(kv_rank=16), "belong to mla"),
        (dict(n_layer=0), "n_layer must be positive"),
        (dict(n_expert=4, top_k=5), "top_k must be in 1..n_expert"),
        (dict(n_expert=4, top_k=2, d_ff=20), "multiples of 8"),
        (dict(n_expert=4), "top_k must be in 1..n_expert"),
    ],
)
def test_shapes_that_cannot_be_are_refused_in_one_line(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**{**SMALL, **bad})
    assert "\n" not in str(error.value)


def test_a_sequence_longer_than_the_context_is_refused():
    model = Transformer(Config(**SMALL))
    with pytest.raises(ValueError, match="33 tokens are more than the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


def tiny_checkpoint(step):
    model = scramble(Transformer(Config(**SMALL, n_expert=4, top_k=2)), step).eval()
    config = dataclasses.asdict(model.config)
    return model, {"config": config, "model": model.state_dict(), "step": step, "tokenizer": "byte"}


def test_checkpoints_come_back_and_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 100):
        model, checkpoint = tiny_checkpoint(step)
        save_checkpoint(tmp_path, checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010.pt", "step-00000100.pt"]
    tokens = torch.randint(50, (1, 8))
    for path in (tmp_path, tmp_path / "step-00000100.pt"):
        loaded, checkpoint = load_checkpoint(path)
        assert checkpoint["step"] == 100 and torch.equal(loaded(tokens), model(tokens))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    save_checkpoint(tmp_path, tiny_checkpoint(1)[1])
    path = tmp_path / "step-00000001.pt"
    whole = path.read_bytes()
    flipped = [bytearray(whole) for _ in range(20)]
    for i, copy_ in enumerate(flipped):  # one bit, anywhere in the weights
        copy_[len(whole) // 4 + i * len(whole) // 40] ^= 1 << i % 8
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], *flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda c: {**c, "model": []},
    lambda c: {**c, "model": {}},
    lambda c: {**c, "config": {}},
    lambda c: {name: c[name] for name in c if name != "tokenizer"},
    lambda c: {name: c[name] for name in c if name != "step"},
    lambda c: [1],
])
def test_what_is_whole_but_no_checkpoint_is_refused_in_one_line(change, tmp_path):
    torch.save(change(tiny_checkpoint(1)[1]), tmp_path / "step-00000001.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project|does not hold the weights") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    save_checkpoint(tmp_path, tiny_checkpoint(1)[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # files cannot grow past this
    try:
        with pytest.raises(OSError, match="cannot save to .*: the earlier checkpoints there stand") as error:
            save_checkpoint(tmp_path, tiny_checkpoint(2)[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"] and load_checkpoint(tmp_path)[1]["step"] == 1


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()
