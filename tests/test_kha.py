"""Knocks, attention and the model against the plainest float64 version of the equations."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

import kha
import sample
from data import loss as chunked
from data.figures import count_params, flops_per_token, knock_movement, knocks_of
from data.loss import chunked_loss
from kha import Config, Heads, Knock, Transformer, fold, rope_tables, rotate
from moe import MoE, SwiGLU
from sample import Cache, generate
from tests import reference
from tests.reference import relative_error, scramble
from tests.runs import ROOT

SMALL = dict(reference.SMALL, rope_base=500.0, norm_eps=1e-4)


# --- knocks ---


@pytest.mark.parametrize("kind", ["linear", "mlp", "gate"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_knock_is_the_equation_forward_and_backward(kind, dtype, tolerance):
    torch.manual_seed(0)
    heads = scramble(Heads(12, 3, 8, kind).to(dtype))
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    out_grad = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    y = heads(x)
    y.backward(out_grad.to(dtype))

    exact = {
        name.split(".")[-1]: p.detach().double().requires_grad_()
        for name, p in heads.named_parameters()
    }
    exact_x = x.detach().double().requires_grad_()
    exact_y = reference.knock(kind, exact, (exact_x @ exact["weight"].T).unflatten(-1, (3, 8)))
    exact_y.backward(out_grad)
    torch.testing.assert_close(y.double(), exact_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=10 * tolerance)
    # The gradients of all heads arrive in the one matrix that they share.
    for name, p in heads.named_parameters():
        expected = exact[name.split(".")[-1]].grad
        torch.testing.assert_close(p.grad.double(), expected, rtol=tolerance, atol=100 * tolerance)


def check_kernel(head_dim, n_token, tolerance, **where):
    """KHA-MLP and its gradients on a device, in a dtype, against the equation in float64."""
    torch.manual_seed(0)
    knock = scramble(Knock("mlp", head_dim)).to(**where)
    heads = torch.randn((2, n_token, 4, head_dim), **where, requires_grad=True)
    x = heads[:, :, 1:]  # not contiguous, as where each head has a knock of its own
    y_grad = torch.randn_like(x).mT.contiguous().mT  # nor is this, as attention's may be
    y = knock(x)
    y.backward(y_grad)

    exact = {name: p.detach().double().requires_grad_() for name, p in knock.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    exact_y = reference.knock("mlp", exact, exact_x)
    exact_y.backward(y_grad.double())
    pairs = [
        (y, exact_y),
        (heads.grad[:, :, 1:], exact_x.grad),
        *((p.grad, exact[name].grad) for name, p in knock.named_parameters()),
    ]
    for ours, right in pairs:
        assert (ours - right).norm() < tolerance * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "n_token", [1, 77, 4096], ids=["less than a tile", "uneven tiles", "many tiles"]
)
def test_the_kernel_is_the_equation_forward_and_backward(head_dim, n_token):
    where = dict(device="cuda", dtype=torch.bfloat16)
    assert kha.can_fuse(torch.empty(head_dim, **where)) == kha.is_hopper()
    check_kernel(head_dim, n_token, 0.01, **where)  # bfloat16 rounds to 0.4%


def test_the_kernel_is_the_equation_without_a_gpu():
    """In Triton's interpreter, in float32. That of 3.9 gets bfloat16 wrong, that of 3.6 fails."""
    pytest.importorskip("triton", minversion="3.9")
    script = """if True:
        from types import SimpleNamespace
        import torch
        import triton
        import triton.language as tl
        import kha
        from tests.test_kha import check_kernel

        # It has no instructions of a GPU.
        kha.twice_sigmoid = triton.jit(lambda x: 2 * tl.sigmoid(x))
        kha.can_fuse = lambda x: True
        gpu = SimpleNamespace(multi_processor_count=2)  # so few that a program has many tiles
        torch.cuda.get_device_properties = lambda device: gpu
        for head_dim in (16, 32, 64, 128):
            for n_token in (1, 77):
                check_kernel(head_dim, n_token, 1e-5, device="cpu", dtype=torch.float32)
        """
    env = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True)


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
    assert list(knocks_of(knocking)) == [f"blocks.{i}.attn.w{place[-1]}.knock" for i in range(2)]
    assert torch.equal(without(tokens), knocking(tokens))


@pytest.mark.parametrize("kind,matrices", [("none", 0), ("linear", 1), ("mlp", 3), ("gate", 1)])
def test_one_set_of_knock_matrices_serves_all_heads(kind, matrices):
    for n_head in (2, 6):
        shape = {**SMALL, "n_head": n_head, "n_kv_head": n_head, "n_layer": 1}
        model = Transformer(Config(**shape, knock_v=kind))
        shapes = [p.shape for knock in knocks_of(model).values() for p in knock.parameters()]
        assert shapes == [(8, 8)] * matrices
        assert f"(knock): Knock({kind}, 8)" in str(model)


def test_knock_movement_reports_diagonal_and_the_rest():
    model = Transformer(Config(**SMALL, knock_q="linear"))
    assert knock_movement(model)["blocks.0.attn.wq.knock.t"] == (1, 0)
    assert knock_movement(model)["blocks.1.attn.wv.knock.gate"] == (0, 0)
    with torch.no_grad():
        t = knocks_of(model)["blocks.0.attn.wq.knock"].t
        t.copy_(torch.eye(8) * 0.5)
        t[0, 1], t[3, 2] = 3, -4
    assert knock_movement(model)["blocks.0.attn.wq.knock.t"] == (0.5, 5)
    knocks_of(model)["blocks.0.attn.wq.knock"].t = torch.nn.Parameter(torch.ones(2, 3))
    assert knock_movement(model)["blocks.0.attn.wq.knock.t"] == (1, 2)  # any matrix will do


# --- the start ---


OUT = 0.02 / 2  # 0.02 / sqrt(2 * n_layer) with the two layers of SMALL
STARTS = {  # the end of a weight's name: its standard deviation at the start
    "embed.weight": 0.02, "wq.weight": 0.02, "wk.weight": 0.02, "wv.weight": 0.02,
    "wq_latent.weight": 0.02, "wq_rope.weight": 0.02, "wkv_latent.weight": 0.02,
    "wk_rope.weight": 0.02, "ffn.w_up": 0.02, "ffn.experts_up": 0.02, "ffn.router": 0.02,
    "wo.weight": OUT, "ffn.w_down": OUT, "ffn.experts_down": OUT,
}


@pytest.mark.parametrize("ffn", [{}, dict(n_expert=16, top_k=2)], ids=["dense", "mixture"])
@pytest.mark.parametrize(
    "attention",
    [
        dict(knock_q="linear", knock_k="gate"),
        dict(attention="gta"),
        dict(attention="mla", kv_rank=40, q_rank=40, knock_v="linear"),
    ],
    ids=["gqa", "gta", "mla"],
)
def test_every_weight_starts_with_its_standard_deviation(attention, ffn):
    torch.manual_seed(0)
    wide = dict(n_embd=160, n_head=4, head_dim=32, d_ff=64, vocab_size=320)
    model = Transformer(Config(**{**SMALL, **wide, **attention, **ffn}))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif "knock" in name:
            expected = torch.zeros(32, 32) if name.endswith("gate") else torch.eye(32)
            assert torch.equal(p, expected)
        else:
            (std,) = (STARTS[end] for end in STARTS if name.endswith(f".{end}") or name == end)
            assert p.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * std, name
    assert not any(buffer.any() for buffer in model.buffers())


@pytest.mark.parametrize("part", [
    lambda: Heads(64, 4, 16), lambda: SwiGLU(64, 128), lambda: MoE(64, 32, 8, 2)])
def test_a_part_in_a_model_of_ones_own_has_a_start(part):
    torch.manual_seed(0)
    for name, p in part().named_parameters():
        assert p.std().item() == pytest.approx(0.02, rel=0.1), name


def test_random_knocks_keep_the_variance():
    torch.manual_seed(0)
    config = Config(**{**SMALL, "head_dim": 64}, knock_init="random")
    knock = Transformer(config).blocks[0].attn.wv.knock
    for name, p in knock.named_parameters():
        assert p.std().item() == pytest.approx(1 / 8, rel=0.1), name


# --- the model ---


LINEAR, MLP, NONE = ("linear",) * 3, ("mlp",) * 3, ("none",) * 3
VARIANTS = {  # attention: (its shape, the knocks on q, k, v to try)
    "MQA": (dict(n_kv_head=1), [NONE, LINEAR, MLP]),
    "GQA": (dict(n_kv_head=2), [NONE, LINEAR, MLP, ("gate",) * 3, ("linear", "none", "mlp")]),
    "MHA": (dict(n_kv_head=6), [NONE, LINEAR, MLP]),
    "GTA": (
        dict(attention="gta"),
        [NONE, ("linear", "none", "linear"), ("mlp", "none", "mlp"), ("none", "none", "gate")],
    ),
    "MLA": (dict(attention="mla", n_kv_head=1, kv_rank=20), [NONE, LINEAR]),
    "MLA with q_rank": (dict(attention="mla", n_kv_head=1, kv_rank=20, q_rank=12), [LINEAR]),
    "GLA": (dict(attention="mla", n_kv_head=2, kv_rank=20), [NONE, LINEAR]),
}
EVERY_VARIANT = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            dict(shape, **dict(zip(("knock_q", "knock_k", "knock_v"), knocks, strict=True))),
            id=f"{name}-{'-'.join(knocks)}",
        )
        for name, (shape, tried) in VARIANTS.items()
        for knocks in tried
    ],
)


def in_pieces(model, tokens, pieces, cache=None):
    """Logits of tokens (B, T), fed in pieces of these lengths, each after what is cached."""
    cache, index = cache or Cache(model, tokens.shape[1]), torch.arange(tokens.shape[1])
    logits = []
    for part, where in zip(tokens.split(pieces, dim=1), index.split(pieces), strict=True):
        logits.append(model(part, position=where if where[0] else None, cache=cache))
    return torch.cat(logits, dim=1)


@EVERY_VARIANT
def test_model_is_the_equations_forward_and_backward(shape):
    model = scramble(Transformer(Config(**{**SMALL, **shape})).double())
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    weights = reference.plain_weights(model)
    exact = reference.forward(model.config, weights, tokens)
    logits = model(tokens)
    assert relative_error(logits, exact) < 1e-6  # RoPE's angles are float32, whatever the model
    out_grad = torch.randn_like(exact)
    exact.backward(out_grad)
    logits.backward(out_grad)
    for (name, p), expected in zip(model.named_parameters(), weights.values(), strict=True):
        assert relative_error(p.grad, expected.grad) < 1e-5, name
    assert relative_error(model.float()(tokens), exact) < 1e-4
    loss = -exact.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(model(tokens, tokens).double(), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [7, 83, 2**29], ids=["many chunks", "uneven chunks", "one"])
def test_cross_entropy_in_chunks_is_the_whole_one_forward_and_backward(at_once, monkeypatch):
    one_chunk = chunked.chunk_loss

    def counted(x, weight, targets, dw):
        assert (len(x) - 1) * len(weight) < at_once * 3  # a row at least
        return one_chunk(x, weight, targets, dw)

    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", at_once * 3)
    monkeypatch.setattr(chunked, "chunk_loss", counted)
    model = scramble(Transformer(Config(**SMALL), loss=chunked_loss(compiles=False)).double())
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(1)
    exact = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).mean() * 3
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    loss = model(tokens, targets) * 3
    loss.backward()
    torch.testing.assert_close(loss, exact)
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert relative_error(p.grad, gradient) < 1e-10, name
    with torch.no_grad():  # as in evaluation
        torch.testing.assert_close(model(tokens, targets) * 3, exact)


def test_an_output_with_a_weight_of_its_own(monkeypatch):
    """Its logits, its loss whole and in chunks, and its start, which is that of the embedding."""
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 100)
    torch.manual_seed(0)
    own = Transformer(Config(**SMALL, tie_embeddings=False), loss=chunked_loss(compiles=False))
    tied = Transformer(Config(**SMALL))
    assert own.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    scramble(own)
    tied.load_state_dict(own.state_dict(), strict=False)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own.head.weight.copy_(own.embed.weight)
    torch.testing.assert_close(own(tokens), tied(tokens))
    with torch.no_grad():
        own.head.weight.mul_(2)
    logits = tied(tokens) * 2
    torch.testing.assert_close(own(tokens), logits)
    exact = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    loss = own(tokens, tokens)
    torch.testing.assert_close(loss, exact)
    loss.backward()
    assert own.head.weight.grad.any() and own.embed.weight.grad.any()
    numbers = count_params(own)[0] - count_params(tied)[0]
    assert numbers == own.head.weight.numel()
    assert flops_per_token(own, 9) == flops_per_token(tied, 9)


def test_rope_turns_with_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def at(x, position):
        return rotate(x, rope_tables(torch.tensor([position]), 16, 10000.0))

    near, far = ((at(q, t) * at(k, t - 5)).sum() for t in (5, 105))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(near, (at(q, 5) * at(k, 3)).sum())


def test_what_needs_float32_has_it_whatever_the_default_is():
    position = torch.arange(4000, 4008)
    right = rope_tables(position, 16, 10000.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        tables = rope_tables(position, 16, 10000.0)
        model = Transformer(Config(**SMALL, n_expert=4, top_k=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(table, exact) for table, exact in zip(tables, right, strict=True))
    assert model.embed.weight.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@EVERY_VARIANT
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 12]], ids=str)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 0.05)])
def test_cached_pieces_give_the_logits_of_the_whole(shape, pieces, dtype, tolerance):
    model = scramble(Transformer(Config(**{**SMALL, **shape})).to(dtype)).eval()
    tokens = torch.randint(50, (3, 20))
    assert relative_error(in_pieces(model, tokens, pieces), model(tokens)) < tolerance


def test_cached_mixture_of_experts_gives_the_logits_of_the_whole():
    """Also with `recompute`, which is for training: train.py samples with it at its end."""
    model = scramble(Transformer(Config(**SMALL, n_expert=4, top_k=2), recompute=True)).eval()
    tokens = torch.randint(50, (3, 20))
    assert relative_error(in_pieces(model, tokens, [12] + [1] * 8), model(tokens)) < 1e-4
    model.train()
    assert relative_error(in_pieces(model, tokens, [12] + [1] * 8), model(tokens)) < 1e-4


@pytest.mark.parametrize(
    "shape,elements",
    [
        (dict(n_head=32, n_kv_head=1), 256),
        (dict(n_head=16, n_kv_head=8), 2048),
        (dict(n_head=32, n_kv_head=4), 1024),
        (dict(n_head=16, n_kv_head=16), 4096),
        (dict(n_head=32, n_kv_head=4, attention="gta"), 512 + 64),
        (dict(n_head=32, n_kv_head=1, attention="mla", kv_rank=512, knock_v="linear"), 512 + 64),
        (dict(n_head=32, n_kv_head=2, attention="mla", kv_rank=512, knock_v="linear"), 512 + 64),
    ],
    ids=["MQA", "GQA-8", "GQA-4", "MHA", "GTA", "MLA", "GLA"],
)
def test_cache_sizes_of_table_3(shape, elements, monkeypatch):
    """Counted from the buffers that sampling fills, per token and layer."""
    model = fold(Transformer(Config(**{**SMALL, "head_dim": 128, **shape})))
    caches = []

    class Kept(Cache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(sample, "Cache", Kept)
    list(generate(model, [1, 2, 3], n_samples=2, max_new_tokens=7))
    (cache,) = caches
    sizes = {sum(x.numel() for x in layer.buffers) / (2 * cache.length) for layer in cache.layers}
    assert sizes == {elements}


def test_a_cache_longer_than_the_context_is_refused():
    model = Transformer(Config(**SMALL))
    with pytest.raises(ValueError, match="33 tokens are more than the model's context of 32"):
        Cache(model, 33)
    cache = Cache(model, 4)
    in_pieces(model, torch.zeros(1, 4, dtype=torch.long), [3, 1], cache)
    with pytest.raises((IndexError, RuntimeError)):  # the cache is full
        model(torch.zeros(1, 1, dtype=torch.long), position=torch.tensor([4]), cache=cache)


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
    """At the start, with random weights, and in bfloat16, as sampling has it."""
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    start = Transformer(Config(**{**SMALL, **shape})).double().eval()
    for model in (start, scramble(copy.deepcopy(start))):
        folded = fold(copy.deepcopy(model))
        assert not knocks_of(folded)
        assert relative_error(folded(tokens), model(tokens)) < 1e-10
        caches = [Cache(model, 20), Cache(folded, 20)]
        decoded = [in_pieces(m, tokens, 1, c) for m, c in zip((model, folded), caches, strict=True)]
        assert relative_error(decoded[1], decoded[0]) < 1e-10
        shapes = [[b.shape for layer in c.layers for b in layer.buffers] for c in caches]
        assert shapes[0] == shapes[1]
    for m in (model, folded):
        m.bfloat16()
    assert relative_error(folded(tokens), model.float()(tokens)) < 0.05


def test_a_folded_model_folds_again_to_itself():
    for knock in ("linear", "mlp", "gate"):
        folded = fold(scramble(Transformer(Config(**SMALL | dict(knock_v=knock)))))
        tokens = torch.randint(50, (2, 9))
        before = folded(tokens)
        assert torch.equal(fold(folded)(tokens), before)


@pytest.mark.parametrize("part", ["wv", "wo"])
def test_a_weight_that_layers_share_is_not_folded_into(part):
    model = scramble(Transformer(Config(**SMALL | dict(knock_v="mlp"))))
    first, second = (block.attn for block in model.blocks)
    getattr(second, part).weight = getattr(first, part).weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"blocks.0.attn.{part} is shared, sharded or computed"):
        fold(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_is_frozen_stays_frozen_when_folded():
    model = Transformer(Config(**SMALL | dict(knock_k="mlp", knock_v="mlp"))).requires_grad_(False)
    assert not any(p.requires_grad for p in fold(model).parameters())


def test_a_fold_leaves_a_kind_of_ones_own(monkeypatch):
    before = Knock.forward

    def forward(knock: Knock, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ knock.gate) if knock.kind == "tanh" else before(knock, x)

    monkeypatch.setitem(kha.KNOCKS, "tanh", ("gate",))
    monkeypatch.setattr(Knock, "forward", forward)
    model = scramble(Transformer(Config(**SMALL | dict(knock_q="linear", knock_v="tanh"))))
    tokens = torch.randint(50, (2, 9))
    folded = fold(copy.deepcopy(model))
    assert [name.split(".")[-2] for name in knocks_of(folded)] == ["wv", "wv"]
    torch.testing.assert_close(folded(tokens), model(tokens))


def test_what_a_fold_leaves():
    """Linear knocks leave a plain model. An MLP on the value leaves a projection twice as wide."""
    knocks = dict(knock_q="linear", knock_k="linear", knock_v="linear", knock_init="random")
    linear = fold(Transformer(Config(**SMALL, **knocks)))
    plain = Transformer(Config(**SMALL | dict(knock_v="none")))
    assert linear.config == plain.config
    plain.load_state_dict(linear.state_dict())
    attn = fold(Transformer(Config(**SMALL | dict(knock_v="mlp")))).blocks[0].attn
    assert {name: p.shape for name, p in attn.wv.named_parameters()} == {"weight": (2 * 2 * 8, 24)}


# --- bad input ---


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(n_head=6, n_kv_head=4), "n_head must be a multiple of n_kv_head, not 6 and 4"),
        (dict(head_dim=7), "head_dim must be even"),
        (dict(knock_v="none", knock_init="random"), "without knocks set knock_init identity"),
        (dict(knock_v="lnear"), "knock_v must be one of none, linear, mlp, gate"),
        (dict(attention="mla", kv_rank=16), "not none, none and mlp: set knock_v linear"),
        (dict(attention="mla", knock_v="linear"), "n_kv_head, 2, not 0: set it, to 64 for example"),
        (dict(attention="mla", knock_v="linear", kv_rank=15), "mla needs a kv_rank"),
        (dict(attention="gta", knock_k="linear"), "leave knock_k none"),
        (dict(attention="gta", head_dim=6), "a multiple of 4"),
        (dict(attention="gpa"), "attention must be one of gqa, gta, mla"),
        (dict(kv_rank=16), "belong to mla"),
        (dict(n_layer=0), "n_layer must be > 0"),
        (dict(n_layer=2.5), "n_layer must be of type int, not 2.5"),
        (dict(rope_base="x"), "rope_base must be of type float, not 'x'"),
        (dict(n_expert=-1), "n_expert must be >= 0"),
        (dict(n_expert=4, top_k=5), "top_k must be in 1..n_expert"),
        (dict(n_expert=4, top_k=2, d_ff=20), "multiples of 8"),
        (dict(n_expert=4), "top_k must be in 1..n_expert"),
    ],
)
def test_shapes_that_cannot_be_are_refused_in_one_line(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**{**SMALL, **bad})
    assert "\n" not in str(error.value)


def test_a_knock_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of none, linear, mlp, gate, not 'foo'"):
        Knock("foo", 8)


def test_kha_and_moe_copied_alone_are_enough(tmp_path):
    for name in ("kha.py", "moe.py"):
        shutil.copy(ROOT / name, tmp_path)
    script = """
import torch, kha
model = kha.Transformer(kha.Config(**kha.CONFIGS["toy"]))
tokens = torch.randint(320, (2, 16))
model(tokens, tokens).backward()
assert all(p.grad is not None for p in model.parameters())
"""
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path[0:0] = ['.']{script}"],
                   cwd=tmp_path, check=True)


def test_a_sequence_longer_than_the_context_is_refused():
    model = Transformer(Config(**SMALL))
    with pytest.raises(ValueError, match="33 tokens are more than the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
