"""The model in float64 as the equations have it: loops over heads, nothing fused or cached."""

import functools
import itertools
import math

import pytest
import torch

SMALL = dict(  # the shape of a small model
    vocab_size=50, block_size=32, n_layer=2, n_embd=24, n_head=6, n_kv_head=2, head_dim=8, d_ff=24
)
HEADS = {"wide": (6, 2, 8), "odd": (3, 1, 32)}  # n_head, n_kv_head, head_dim; n_embd is 24


def scramble(module, seed=0):
    """Random weights everywhere, knocks included, so that no identity hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


def theirs(name="Qwen3", heads="wide", **overrides):
    """A small random model of transformers, with its HEADS. Without transformers the test skips."""
    transformers = pytest.importorskip("transformers")
    fields = dict(vocab_size=320, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    fields |= zip(names, HEADS[heads], strict=True)
    fields |= dict(max_position_embeddings=128, tie_word_embeddings=True)
    config = getattr(transformers, f"{name}Config")(**{**fields, **overrides})
    return scramble(getattr(transformers, f"{name}ForCausalLM")(config)).eval()


def logits(model, tokens):
    """What a model computes: of models of transformers the logits alone."""
    out = model(tokens)
    return getattr(out, "logits", out)


def relative_error(a, b):
    """The largest difference of two tensors, as a part of the largest number in b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def knock(kind, weights, x):
    """Eq. 5-7, eq. 9 and the gate of Table 2, head by head; x (B, T, H, D)."""
    heads = []
    for head in x.unbind(2):
        if kind == "linear":
            head = head @ weights["t"]
        if kind == "mlp":
            up, gate = head @ weights["up"], torch.sigmoid(head @ weights["gate"])
            head = (2 * up * gate) @ weights["down"]
        if kind == "gate":
            head = 2 * head * torch.sigmoid(head @ weights["gate"])
        heads.append(head)
    return torch.stack(heads, 2)


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x, base):
    """Turn the pair (j, j + D/2) of the token at t by t * base^(-2j/D); x (B, T, H, D)."""
    out = torch.empty_like(x)
    D = x.shape[-1]
    for t, j in itertools.product(range(x.shape[1]), range(D // 2)):
        angle = t * base ** (-2 * j / D)
        a, b = x[:, t, :, j], x[:, t, :, j + D // 2]
        out[:, t, :, j] = a * math.cos(angle) - b * math.sin(angle)
        out[:, t, :, j + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def softmax_attention(q, k, v):
    """One head: q, k (B, T, D_qk), v (B, T, D)."""
    T = q.shape[1]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def gqa(c, w, project):
    q, k, v = project("q"), project("k"), project("v")
    q = rope(rms_norm(q, w["q_norm.weight"], c.norm_eps), c.rope_base)
    k = rope(rms_norm(k, w["k_norm.weight"], c.norm_eps), c.rope_base)
    group = c.n_head // c.n_kv_head
    return [
        softmax_attention(q[:, :, h], k[:, :, h // group], v[:, :, h // group])
        for h in range(c.n_head)
    ]


def gta(c, w, project):
    half = c.head_dim // 2
    q, tied, k_rope = project("q"), project("v"), project("k_rope")
    q = rms_norm(q, w["q_norm.weight"], c.norm_eps)
    q_rope = rope(q[..., half:], c.rope_base)
    k_rope = rope(rms_norm(k_rope, w["k_rope_norm.weight"], c.norm_eps), c.rope_base)
    heads = []
    for h in range(c.n_head):
        state = tied[:, :, h // (c.n_head // c.n_kv_head)]
        k_plain = rms_norm(state[..., :half], w["k_norm.weight"], c.norm_eps)
        query = torch.cat((q[:, :, h, :half], q_rope[:, :, h]), -1)
        key = torch.cat((k_plain, k_rope[:, :, 0]), -1)
        heads.append(softmax_attention(query, key, state))
    return heads


def mla(c, w, project):
    D, rank = c.head_dim, c.kv_rank // c.n_kv_head
    q, q_rope = project("q"), rope(project("q_rope"), c.rope_base)
    k_rope = rope(project("k_rope"), c.rope_base)
    heads = []
    for h in range(c.n_head):
        g = h // (c.n_head // c.n_kv_head)
        latent = project("kv_latent")[:, :, 0, g * rank : (g + 1) * rank]
        latent = rms_norm(latent, w["kv_norm.weight"], c.norm_eps)
        head = {}
        for part in "kv":
            matrices = {"t": w.get(f"w{part}.knock.t")}
            plain = latent @ w[f"w{part}.weight"][h * D : (h + 1) * D].T
            head[part] = knock(getattr(c, f"knock_{part}"), matrices, plain[:, :, None])[:, :, 0]
        query = torch.cat((q[:, :, h], q_rope[:, :, h]), -1)
        key = torch.cat((head["k"], k_rope[:, :, 0]), -1)
        heads.append(softmax_attention(query, key, head["v"]))
    return heads


def plain_weights(model):
    """The model's weights in float64, asking for gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def project(c, w, h, part):
    """The heads (B, T, H, D) that one projection makes of h (B, T, C), knocked where it knocks."""
    if part.startswith("q") and c.q_rank:
        h = rms_norm(h @ w["wq_latent.weight"].T, w["q_norm.weight"], c.norm_eps)
    if part in ("q", "k", "v"):
        width = c.head_dim
    elif part == "kv_latent":
        width = c.kv_rank
    else:
        width = c.head_dim // 2
    heads = (h @ w[f"w{part}.weight"].T).unflatten(-1, (-1, width))
    matrices = {name: w.get(f"w{part}.knock.{name}") for name in ("t", "up", "gate", "down")}
    return knock(getattr(c, f"knock_{part}", "none"), matrices, heads)


def below(weights, prefix):
    """The weights with this prefix, without it."""
    return {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}


def forward(config, weights, tokens):
    """Logits (B, T, V) of a dense model of any attention, float64."""
    c = config
    attention = {"gqa": gqa, "gta": gta, "mla": mla}[c.attention]
    x = weights["embed.weight"][tokens]
    for i in range(c.n_layer):
        layer = below(weights, f"blocks.{i}.")
        w = below(layer, "attn.")
        h = rms_norm(x, layer["attn_norm.weight"], c.norm_eps)
        heads = attention(c, w, functools.partial(project, c, w, h))
        x = x + torch.cat(heads, -1) @ w["wo.weight"].T
        h = rms_norm(x, layer["ffn_norm.weight"], c.norm_eps)
        gate, up = (h @ layer["ffn.w_up"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["ffn.w_down"].T
    return rms_norm(x, weights["norm.weight"], c.norm_eps) @ weights["embed.weight"].T
