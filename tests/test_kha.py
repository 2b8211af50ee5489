"""The knocks, attention and the model against the plainest float64 version of the paper's equations."""

import dataclasses
import itertools
import math

import pytest
import torch

from kha import (
    CONFIGS, KNOCKS, Cache, Config, Transformer, count_params, flops_per_token, load_checkpoint, paper_flops, rotate,
    rope_tables, save_checkpoint,
)

SMALL = dict(vocab_size=50, block_size=32, n_layer=2, n_embd=24, n_head=6, n_kv_head=2, head_dim=8, d_ff=24)


def scramble(module, seed=0):
    """Random weights everywhere, knocks included, so that no identity hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


def build(name, **overrides):
    with torch.device("meta"):
        return Transformer(Config(**{**CONFIGS[name], **overrides}))


# --- knocks ---


def knock_reference(kind, weights, x):
    """Eq. 5-7, eq. 9 and the gate of Table 2, head by head and token by token; x (B, T, H, D)."""
    out = torch.empty_like(x)
    for b, t, h in itertools.product(*map(range, x.shape[:3])):
        row = x[b, t, h]
        if kind == "linear":
            out[b, t, h] = row @ weights["t"]
        if kind == "mlp":
            hidden = (row @ weights["up"]) * (1 / (1 + torch.exp(-(row @ weights["gate"]))))
            out[b, t, h] = 2 * (hidden @ weights["down"])
        if kind == "gate":
            out[b, t, h] = 2 * row * (1 / (1 + torch.exp(-(row @ weights["gate"]))))
    return out


@pytest.mark.parametrize("kind", ["linear", "mlp", "gate"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_knock_is_the_equation_forward_and_backward(kind, dtype, tolerance):
    torch.manual_seed(0)
    knock = scramble(KNOCKS[kind](8).to(dtype))
    x = torch.randn(2, 5, 3, 8, dtype=dtype, requires_grad=True)
    out_grad = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    y = knock(x)
    y.backward(out_grad.to(dtype))

    exact = {name: p.detach().double().requires_grad_() for name, p in knock.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    exact_y = knock_reference(kind, exact, exact_x)
    exact_y.backward(out_grad)
    torch.testing.assert_close(y.double(), exact_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=tolerance)
    for name, p in knock.named_parameters():  # every head's gradient arrives in the one shared matrix
        torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=tolerance, atol=10 * tolerance)


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
    assert any(place in name for name, _ in knocking.named_parameters())
    assert torch.equal(without(tokens), knocking(tokens))


@pytest.mark.parametrize("kind,matrices", [("none", 0), ("linear", 1), ("mlp", 3), ("gate", 1)])
def test_one_set_of_knock_matrices_serves_all_heads(kind, matrices):
    for n_head in (2, 6):
        model = Transformer(Config(**{**SMALL, "n_head": n_head, "n_kv_head": n_head, "knock_v": kind}))
        knocks = [p for name, p in model.named_parameters() if "blocks.0" in name and "knock" in name]
        assert [tuple(p.shape) for p in knocks] == [(8, 8)] * matrices


def test_knock_movement_reports_diagonal_and_the_rest():
    model = Transformer(Config(**SMALL, knock_q="linear"))
    assert model.knock_movement()["blocks.0.attn.knock_q.t"] == (1, 0)
    assert model.knock_movement()["blocks.1.attn.knock_v.gate"] == (0, 0)
    with torch.no_grad():
        model.blocks[0].attn.knock_q.t.copy_(torch.eye(8) * 0.5)
        model.blocks[0].attn.knock_q.t[0, 1], model.blocks[0].attn.knock_q.t[3, 2] = 3, -4
    assert model.knock_movement()["blocks.0.attn.knock_q.t"] == (0.5, 5)


# --- the model ---


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def model_reference(model, tokens):
    """The whole dense model in float64, straight from the equations, one head at a time."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    x = w["embed.weight"][tokens]
    B, T, D = *tokens.shape, c.head_dim
    for i in range(c.n_layer):
        layer = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        h = rms_norm(x, layer["attn_norm.weight"], c.norm_eps)
        heads = {}
        for part, n in (("q", c.n_head), ("k", c.n_kv_head), ("v", c.n_kv_head)):
            z = (h @ layer[f"attn.w{part}.weight"].T).view(B, T, n, D)
            knock = {m: layer.get(f"attn.knock_{part}.{m}") for m in ("t", "up", "gate", "down")}
            kind = getattr(c, f"knock_{part}")
            z = z if kind == "none" else knock_reference(kind, knock, z)
            if part != "v":
                z = rms_norm(z, layer[f"attn.{part}_norm.weight"], c.norm_eps)
                for t, j in itertools.product(range(T), range(D // 2)):
                    angle = t * c.rope_base ** (-2 * j / D)
                    a, b = z[:, t, :, j].clone(), z[:, t, :, j + D // 2].clone()
                    z[:, t, :, j] = a * math.cos(angle) - b * math.sin(angle)
                    z[:, t, :, j + D // 2] = b * math.cos(angle) + a * math.sin(angle)
            heads[part] = z
        outs = []
        for n in range(c.n_head):
            kv = n // (c.n_head // c.n_kv_head)
            scores = heads["q"][:, :, n] @ heads["k"][:, :, kv].mT / math.sqrt(D)
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            outs.append(scores.softmax(-1) @ heads["v"][:, :, kv])
        x = x + torch.cat(outs, -1) @ layer["attn.wo.weight"].T
        h = rms_norm(x, layer["ffn_norm.weight"], c.norm_eps)
        gate, up = (h @ layer["ffn.w_up"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["ffn.w_down"].T
    return rms_norm(x, w["norm.weight"], c.norm_eps) @ w["embed.weight"].T


@pytest.mark.parametrize("n_kv_head", [1, 2, 6], ids=["MQA", "GQA", "MHA"])
@pytest.mark.parametrize("knocks", [("none",) * 3, ("linear",) * 3, ("mlp",) * 3, ("linear", "none", "mlp")])
def test_model_is_the_equations(n_kv_head, knocks):
    places = dict(zip(("knock_q", "knock_k", "knock_v"), knocks))
    model = scramble(Transformer(Config(**{**SMALL, "n_kv_head": n_kv_head, **places})).double())
    tokens = torch.randint(50, (2, 9))
    exact = model_reference(model, tokens)
    # RoPE's angles are float32, whatever the model.
    torch.testing.assert_close(model(tokens), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.float()(tokens).double(), exact, rtol=1e-3, atol=1e-4)
    loss = -exact.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(model(tokens, tokens).double(), loss, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_model_are_right():
    """Autograd through the float64 model against finite differences of its loss, knocks and base weights alike."""
    model = scramble(Transformer(Config(**SMALL, knock_q="linear", knock_k="mlp")).double())
    tokens = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(3))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name in ("blocks.0.attn.knock_v.gate", "blocks.0.attn.knock_q.t", "blocks.1.attn.knock_k.down", "embed.weight"):
        p = model.get_parameter(name)
        direction, losses = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                losses.append(model(tokens[:, :-1], tokens[:, 1:]))
                p -= sign * 1e-5 * direction
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, (p.grad * direction).sum(), rtol=1e-6, atol=1e-9)


def test_rope_turns_with_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = lambda x, position: rotate(x, rope_tables(torch.tensor([position]), 16, 10000.0))
    near, far = ((at(q, t) * at(k, t - 5)).sum() for t in (5, 105))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(near, (at(q, 5) * at(k, 3)).sum())


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 12], [19, 1]])
def test_cached_pieces_give_the_logits_of_the_whole(pieces):
    model = scramble(Transformer(Config(**SMALL, knock_k="mlp", n_expert=4, top_k=2))).eval()
    tokens = torch.randint(50, (3, 20))
    cache = model.new_cache(20)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_cache_says_when_it_is_full():
    cache = Cache(4)
    cache.append(torch.zeros(1, 3, 2, 8))
    with pytest.raises(ValueError, match="holds 4 positions, 5"):
        cache.append(torch.zeros(1, 2, 2, 8))


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


# --- sizes and costs ---


@pytest.mark.parametrize(
    "name,total,active",
    [
        ("moe-0.4b-2.3b", "2.3", "0.44"), ("moe-0.8b-6.6b", "6.6", "0.88"), ("moe-1.6b-14.6b", "14.7", "1.63"),
        ("dense-0.6b", "0.62", "0.62"), ("dense-1.7b", "1.68", "1.68"), ("dense-3.9b", "3.94", "3.94"),
        ("moe-1b-6.1b", "6.1", "1.01"), ("small", "0.12", "0.025"), ("gpt2", "0.124", "0.124"),
    ],
)
def test_sizes_of_the_named_configs(name, total, active):
    sizes = count_params(build(name))
    assert tuple(f"{n / 1e9:.{len(s.split('.')[1])}f}" for n, s in zip(sizes, (total, active))) == (total, active)


@pytest.mark.parametrize(
    "n_head,n_kv_head,active", [(32, 1, 859), (16, 8, 795), (32, 4, 880), (16, 16, 852)],
    ids=["MQA", "GQA-8", "GQA-4", "MHA"],
)
def test_active_sizes_of_table_3(n_head, n_kv_head, active):
    model = build("moe-0.8b-6.6b", n_head=n_head, n_kv_head=n_kv_head, knock_v="none")
    assert round(count_params(model)[1] / 1e6) == active


def test_every_config_builds_on_the_meta_device():
    for name in CONFIGS:
        assert all(p.is_meta for p in build(name).parameters())


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


def test_checkpoint_round_trip_and_damage(tmp_path):
    model, path = scramble(Transformer(Config(**SMALL, n_expert=4, top_k=2))).eval(), tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "step": 3})
    loaded, checkpoint = load_checkpoint(path)
    tokens = torch.randint(50, (1, 8))
    assert checkpoint["step"] == 3 and torch.equal(loaded(tokens), model(tokens))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or not a checkpoint") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()
