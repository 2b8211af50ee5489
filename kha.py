"""Knocking-Heads Attention (Zhou et al. 2025, arXiv 2510.23052): the method and the model.

Attention heads work alone until their outputs are concatenated. KHA lets them "knock" on each
other earlier. In each layer, all heads of W^V share one small map from head_dim numbers to head_dim
numbers, and every head goes through it right after the projection. W^Q and W^K may have such a map,
too. Each starts as the identity, so step 0 is exactly the model without them. Attention itself does
not change, so every fast kernel still applies. Equations, tables and sections are the paper's.

Read to the end of `Transformer`: this is the method (`Knock`, `Heads`) in a decoder like Qwen3.
Look the rest up: other attentions, knocks for other models, folding, configs, a faster kernel.

Letters in the comments on shapes:
    B     sequences in a batch            S  tokens that are attended to (S = T without a cache)
    T     tokens that are fed in          G  latents of MLA, of R features each
    C     features of a token, n_embd     V  token ids, vocab_size
    H     heads (of queries)              N  tokens of all sequences, B * T
    H_kv  key and value heads             E  experts, K of them for a token (top_k)
    D     features of a head, head_dim    F  width of a SwiGLU, d_ff
"""

import fnmatch
import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU does not bring it along
    triton = None

if __package__:  # installed with pip: this file is the package kha, and moe.py a module in it
    from .moe import MoE, SwiGLU, upcast
else:
    from moe import MoE, SwiGLU, upcast


@dataclass(frozen=True)
class Config:
    """Shape of a model. Raises ValueError, in one line, for a shape that cannot be built."""

    vocab_size: int = 50304  # token ids
    block_size: int = 1024  # the longest sequence, in tokens
    n_layer: int = 12  # blocks
    n_embd: int = 768  # features of a token
    n_head: int = 12  # query heads
    n_kv_head: int = 12  # key/value heads (n_head: MHA, 1: MQA, else GQA); MLA: latents
    head_dim: int = 64  # features of a head
    attention: str = "gqa"  # gqa, gta or mla
    kv_rank: int = 0  # MLA: features of all its latents together
    q_rank: int = 0  # MLA: features of the query's latent; 0: it has none
    d_ff: int = 2048  # width of the SwiGLU, or of each expert
    n_expert: int = 0  # experts in each block; 0 is a dense model
    top_k: int = 0  # experts per token
    knock_q: str = "none"  # none, linear, mlp or gate
    knock_k: str = "none"  # as knock_q
    knock_v: str = "mlp"  # as knock_q; in the paper a knock gains most on values (Table 2)
    knock_init: str = "identity"  # identity, or random for the paper's ablation
    tie_embeddings: bool = True  # the output has the weight of the embedding, not one of its own
    rope_base: float = 10000.0  # RoPE: pair j turns by rope_base^(-2j / rope_dim) radians a token
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm

    def __post_init__(self):
        check_config(self)

    @property
    def rope_dim(self) -> int:
        """How many features RoPE turns in each head: head_dim; in GTA and MLA head_dim / 2."""
        return self.head_dim if self.attention == "gqa" else self.head_dim // 2


# --------------------------------------------------------------------------------------------------
# The method

# Each kind of knock and its (D, D) matrices; and how each matrix starts (section 3.3).
KNOCKS = {"none": (), "linear": ("t",), "mlp": ("up", "gate", "down"), "gate": ("gate",)}
INITS = {"t": nn.init.eye_, "up": nn.init.eye_, "gate": nn.init.zeros_, "down": nn.init.eye_}


class Knock(nn.Module):
    """What KHA does to one head x_i (..., D), the same for every head i of a projection.

        none     x_i                                                eq. 1-3
        linear   x_i t                                              eq. 5-7: the paper's T
        mlp      2 (x_i W^up * sigmoid(x_i W^gate)) W^down          eq. 9
        gate     2 x_i * sigmoid(x_i W^gate)                        Table 2, where it harms

    No head reads another's numbers. The heads interact because all of them train these shared D x D
    matrices. At the start the knock returns x_i, bit for bit: t, W^up and W^down are the identity,
    W^gate is zero, and 2 sigmoid(0) = 1 (section 3.3). Raises ValueError for another kind.
    """

    def __init__(self, kind: str, head_dim: int):
        super().__init__()
        if kind not in KNOCKS:
            raise ValueError(f"kind must be one of {', '.join(KNOCKS)}, not {kind!r}")
        self.kind, self.head_dim = kind, head_dim
        for name in KNOCKS[kind]:
            matrix = nn.Parameter(torch.empty(head_dim, head_dim))
            self.register_parameter(name, INITS[name](matrix))

    def extra_repr(self) -> str:  # for print(model)
        return f"{self.kind}, {self.head_dim}"

    def forward(self, x: Tensor) -> Tensor:
        """Every head of x (..., H, D) on its own: the same shape."""
        if self.kind == "linear":
            return x @ self.t.to(x.dtype)  # `Heads` does not call this: its weight has t already
        if self.kind == "mlp":
            if can_fuse(x):  # one kernel: the end of this file
                return fused_mlp(x, torch.stack((self.up, self.gate, self.down)).to(x.dtype))
            up, gate, down = self.up.to(x.dtype), self.gate.to(x.dtype), self.down.to(x.dtype)
            return (2 * (x @ up) * torch.sigmoid(x @ gate)) @ down
        if self.kind == "gate":
            return 2 * x * torch.sigmoid(x @ self.gate.to(x.dtype))
        return x


class Heads(nn.Module):
    """W^Q, W^K or W^V (eq. 1-3) and its knock: x (B, T, n_in) -> heads (B, T, H, D), knocked."""

    def __init__(self, n_in: int, n_head: int, head_dim: int, kind: str = "none"):
        super().__init__()
        # As in nn.Linear: rows i * D to (i + 1) * D are the transposed W_i of head i.
        self.weight = nn.Parameter(0.02 * torch.randn(n_head * head_dim, n_in))
        self.knock = Knock(kind, head_dim)

    def absorbed_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight to use, W_i for every head i; for a linear knock W_i t: (H * D, n_in)."""
        weight = self.weight.to(dtype)
        return absorb(weight, self.knock.t) if self.knock.kind == "linear" else weight

    def forward(self, x: Tensor) -> Tensor:
        # A linear knock is in the weight: x (W_i t) = (x W_i) t, cheaper for more tokens than n_in.
        heads = F.linear(x, self.absorbed_weight(x.dtype))  # (B, T, H * D)
        heads = heads.unflatten(-1, (-1, self.knock.head_dim))  # (B, T, H, D)
        return heads if self.knock.kind == "linear" else self.knock(heads)


def absorb(weight: Tensor, m: Tensor) -> Tensor:
    """Eq. 8 for m = t: W_i m for all heads i of a transposed weight (H * D, n_in): same shape."""
    heads = weight.unflatten(0, (-1, len(m)))  # (H, D, n_in)
    return (m.mT.to(weight.dtype) @ heads).flatten(0, 1)  # (W_i m)^T = m^T W_i^T


class Linear(nn.Linear):
    """nn.Linear without bias. As in all layers here, its weight is cast to the dtype of x."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm that casts its weight, too: torch's fused kernel needs equal dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Common(NamedTuple):
    """What all layers need to know of the tokens in one forward pass."""

    position: Tensor  # (T,) integers
    rope: tuple[Tensor, Tensor]  # cosine and sine of the angles, (T, 1, rope_dim / 2)
    mask: Tensor | None  # (T, S), true where t sees s; None: the tokens begin a text, causal


def rope_tables(position: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RoPE's angles at positions (T,): two tensors (T, 1, dim / 2), float32."""
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim
    angles = position[:, None, None] * base**-exponent  # (T, 1, dim / 2), the same for all heads
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (B, T, H, dim): feature j turns with feature j + dim/2 (half-rotation layout)."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """O_i of eq. 4 for each head, softmax(q k^T / sqrt(d)) v: (B, T, H, D). q is (B, T, H, d), k
    (B, S, H_kv, d) and v (B, S, H_kv, D), with d = D; only in MLA d is more. H / H_kv query heads
    share a key/value head. mask None: a token sees itself and all before it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or H_kv, T or S, D)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                       enable_gqa=q.shape[1] > k.shape[1])
    return y.transpose(1, 2)  # (B, T, H, D)


class GQA(nn.Module):
    """Grouped-query attention with knocks: x (B, T, C) -> (B, T, C).

    n_kv_head = n_head is multi-head attention (eq. 1-4), n_kv_head = 1 multi-query attention.
    Knocks come after the projections and before QK-norm (section 4.5.2), RoPE and attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.wo = Linear(config.n_head * D, C)  # the order of these lines decides what a seed gives
        self.wq = Heads(C, config.n_head, D, config.knock_q)
        self.wk = Heads(C, config.n_kv_head, D, config.knock_k)
        self.wv = Heads(C, config.n_kv_head, D, config.knock_v)
        self.q_norm = RMSNorm(D, eps=config.norm_eps)
        self.k_norm = RMSNorm(D, eps=config.norm_eps)

    def forward(self, x: Tensor, common: Common, layer_cache=None) -> Tensor:
        q = self.wq(x)  # (B, T, H, D), knocked
        k, v = self.wk(x), self.wv(x)  # (B, T, H_kv, D), knocked
        q = rotate(self.q_norm(q), common.rope)
        k = rotate(self.k_norm(k), common.rope)
        if layer_cache is not None:  # a sample.LayerCache
            k, v = layer_cache.update(common, k, v)  # (B, S, H_kv, D), now of earlier tokens, too
        y = attend(q, k, v, common.mask)  # (B, T, H, D)
        return self.wo(y.flatten(2))  # (B, T, H * D) -> (B, T, C)


class Block(nn.Module):
    """x = x + attention(norm(x)), then x + feed-forward(norm(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = ATTENTIONS[config.attention](config)  # such as GQA(config)
        if config.n_expert:
            self.ffn = MoE(config.n_embd, config.d_ff, config.n_expert, config.top_k)
        else:
            self.ffn = SwiGLU(config.n_embd, config.d_ff)

    def forward(self, x: Tensor, common: Common, layer_cache=None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), common, layer_cache)
        return x + self.ffn(self.ffn_norm(x))


@torch.no_grad()
def init_weights(module: nn.Module, config: Config, generator: torch.Generator | None = None):
    """Give every weight its start, in place, for a model or a part such as a block.

    Knocks at the identity (section 3.3) draw no random numbers. So with the same seed they change
    no other weight, and no output of step 0. Random knocks draw from `generator`, if given.
    """
    out_std = 0.02 / math.sqrt(2 * config.n_layer)  # GPT-2: activations do not grow with depth
    for name, p in module.named_parameters():
        if "knock." in name and config.knock_init == "random":
            p.normal_(std=len(p) ** -0.5, generator=generator)  # keeps the variance
        elif "knock." in name:
            INITS[name.split(".")[-1]](p)
        elif p.dim() == 1:  # the norms
            p.fill_(1)
        elif name.endswith(("wo.weight", "w_down", "experts_down")):
            p.normal_(std=out_std)
        else:  # all other matrices, such as the embedding, W^Q and the router
            p.normal_(std=0.02)
    for buffer in module.buffers():  # the balancing bias and the load of a mixture of experts
        buffer.zero_()


class Transformer(nn.Module):
    """The decoder. `compute_dtype` is that of activations (None: that of the weights). With
    `recompute` the backward pass computes each block again, instead of keeping its activations.
    `loss(normed x, output weight, targets)`, if given, is forward's loss: see data/loss.py."""

    def __init__(self, config: Config, compute_dtype=None, recompute=False, loss=None):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.recompute, self.loss = recompute, loss
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size)
        init_weights(self, config)

    def forward(self, tokens: Tensor, targets=None, position=None, cache=None) -> Tensor:
        """Logits (B, T, V) of the token after each of tokens (B, T); or with targets (B, T) the
        mean cross-entropy in nats, a scalar. A cache (sample.Cache) stores what later tokens need.
        With `position`, a tensor (T,), tokens continue the text in the cache. Without it they begin
        one, also in the cache. Raises ValueError for more than block_size tokens."""
        T, config = tokens.shape[1], self.config
        if T > config.block_size:
            raise ValueError(f"{T} tokens are more than the model's context of {config.block_size}")
        if position is None:
            position, mask = torch.arange(T, device=tokens.device), None
        else:  # a token sees the cache up to its own position, and not the empty places after it
            mask = torch.arange(cache.length, device=tokens.device) <= position[:, None]  # (T, S)
        common = Common(position, rope_tables(position, config.rope_dim, config.rope_base), mask)
        x = self.embed(tokens).to(dtype=self.compute_dtype)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training and cache is None:
                x = checkpoint(block, x, common, use_reentrant=False)
            else:
                x = block(x, common, None if cache is None else cache.layers[i])
        if targets is None:
            return self.logits(x)
        if self.loss is not None:
            return self.loss(self.norm(x), (self.head or self.embed).weight, targets)
        return F.cross_entropy(upcast(self.logits(x)).flatten(0, 1), targets.flatten())

    def logits(self, x: Tensor) -> Tensor:
        """The model's end, norm and output: (B, T, C) -> (B, T, V)."""
        weight = (self.head or self.embed).weight  # (V, C)
        return F.linear(self.norm(x), weight.to(x.dtype))

    def moes(self) -> list[MoE]:
        """The mixtures of experts, first layer first; none in a dense model."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]


# --------------------------------------------------------------------------------------------------
# To look up: the other attentions of Table 3, knocks on models that are not ours, folding, configs


class GTA(nn.Module):
    """Grouped-tied attention (Zadouri et al. 2025, arXiv 2505.21487): (B, T, C) -> (B, T, C).

    Each key/value head has one tied state, which is the value. Its first half is also the half of
    the key without RoPE. All heads share the other half of the key. knock_v knocks the tied state.
    """

    def __init__(self, config: Config):
        super().__init__()
        C, D, eps = config.n_embd, config.head_dim, config.norm_eps
        self.wo = Linear(config.n_head * D, C)
        self.wq = Heads(C, config.n_head, D, config.knock_q)
        self.wv = Heads(C, config.n_kv_head, D, config.knock_v)
        self.wk_rope = Linear(C, D // 2)
        self.q_norm = RMSNorm(D, eps=eps)
        self.k_norm = RMSNorm(D // 2, eps=eps)
        self.k_rope_norm = RMSNorm(D // 2, eps=eps)

    def forward(self, x: Tensor, common: Common, layer_cache=None) -> Tensor:
        q, state = self.wq(x), self.wv(x)  # (B, T, H, D) and (B, T, H_kv, D), knocked
        q, q_rope = self.q_norm(q).chunk(2, dim=-1)  # (B, T, H, D/2)
        q = torch.cat((q, rotate(q_rope, common.rope)), dim=-1)  # (B, T, H, D)
        k_rope = self.k_rope_norm(self.wk_rope(x))  # (B, T, D/2)
        k_rope = rotate(k_rope[:, :, None], common.rope)  # (B, T, 1, D/2)
        if layer_cache is not None:
            state, k_rope = layer_cache.update(common, state, k_rope)  # (B, S, ...)
        k = self.k_norm(state.chunk(2, dim=-1)[0])  # (B, S, H_kv, D/2)
        k = torch.cat((k, k_rope.expand_as(k)), dim=-1)  # (B, S, H_kv, D)
        return self.wo(attend(q, k, state, common.mask).flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): (B, T, C) -> (B, T, C).

    Keys and values come from a latent of R numbers; with n_kv_head > 1 each group of heads has its
    own: GLA (arXiv 2505.21487). RoPE turns D/2 more features, which all keys share. Sampling moves
    W^UK to the query and W^UV to the output, and attends to the cached latents.
    """

    def __init__(self, config: Config):
        super().__init__()
        C, H, D, eps = config.n_embd, config.n_head, config.head_dim, config.norm_eps
        self.n_latent, rank = config.n_kv_head, config.kv_rank // config.n_kv_head
        self.wo = Linear(H * D, C)
        self.wq_latent = Linear(C, config.q_rank) if config.q_rank else nn.Identity()
        self.q_norm = RMSNorm(config.q_rank, eps=eps) if config.q_rank else nn.Identity()
        self.wq = Heads(config.q_rank or C, H, D, config.knock_q)
        self.wq_rope = Linear(config.q_rank or C, H * D // 2)
        self.wkv_latent = Linear(C, config.kv_rank)
        self.kv_norm = RMSNorm(rank, eps=eps)
        self.wk_rope = Linear(C, D // 2)
        self.wk = Heads(rank, H, D, config.knock_k)  # W^UK: head h reads the latent of its group
        self.wv = Heads(rank, H, D, config.knock_v)  # W^UV; forward uses only the weights

    def forward(self, x: Tensor, common: Common, layer_cache=None) -> Tensor:
        G, D = self.n_latent, self.wq.knock.head_dim
        q_latent = self.q_norm(self.wq_latent(x))  # (B, T, q_rank); x itself if q_rank is 0
        q = self.wq(q_latent)  # (B, T, H, D)
        q_rope = rotate(self.wq_rope(q_latent).unflatten(-1, (-1, D // 2)), common.rope)
        latent = self.kv_norm(self.wkv_latent(x).unflatten(-1, (G, -1)))  # (B, T, G, R)
        k_rope = rotate(self.wk_rope(x)[:, :, None], common.rope)  # (B, T, 1, D/2)
        if layer_cache is not None:
            latent, k_rope = layer_cache.update(common, latent, k_rope)  # (B, S, ...)
        wk = self.wk.absorbed_weight(x.dtype).unflatten(0, (G, -1, D))  # (G, H/G, D, R)
        wv = self.wv.absorbed_weight(x.dtype).unflatten(0, (G, -1, D))  # as wk
        if common.mask is None:  # all tokens are new: make each head's k and v, D wide, not R
            k = torch.einsum("btgr,ghdr->btghd", latent, wk).flatten(2, 3)  # (B, T, H, D)
            v = torch.einsum("btgr,ghdr->btghd", latent, wv).flatten(2, 3)
            k = torch.cat((k, k_rope.expand_as(q_rope)), dim=-1)  # (B, T, H, D + D/2)
            return self.wo(attend(torch.cat((q, q_rope), dim=-1), k, v).flatten(2))
        # By hand, because torch's attention is slower where values are narrower than keys.
        q = torch.einsum("btghd,ghdr->btghr", q.unflatten(2, (G, -1)), wk)  # (B, T, G, H/G, R)
        q = torch.cat((q, q_rope.unflatten(2, (G, -1))), dim=-1)  # (B, T, G, H/G, R + D/2)
        k = torch.cat((latent, k_rope.expand(-1, -1, G, -1)), dim=-1)  # (B, S, G, R + D/2)
        scores = upcast(torch.einsum("btghr,bsgr->bghts", q, k)) * (D + D // 2) ** -0.5
        p = scores.masked_fill(~common.mask, -math.inf).softmax(-1)  # (B, G, H/G, T, S)
        y = torch.einsum("bghts,bsgr->btghr", p.to(latent.dtype), latent)
        y = torch.einsum("btghr,ghdr->btghd", y, wv)  # (B, T, G, H/G, D)
        return self.wo(y.flatten(2))


ATTENTIONS = {"gqa": GQA, "gta": GTA, "mla": MLA}


class KnockedLinear(nn.Linear):
    """The nn.Linear of another model, and its knocks: knocks[i] is on the outputs rows[i]."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for knock, rows in zip(self.knocks, self.rows, strict=True):
            before, heads, after = y.tensor_split(rows, dim=-1)
            heads = knock(heads.unflatten(-1, (-1, knock.head_dim))).flatten(-2)
            y = torch.cat((before, heads, after), dim=-1)
        return y


def add_knocks(model: nn.Module, kind: str, pattern: str, head_dim: int, rows=slice(None)) -> dict:
    """Put knocks of `kind` (linear or mlp) on a model that is not ours: on each nn.Linear with a
    name that fits the fnmatch `pattern`, such as "*.v_proj". Its heads, each head_dim neighbouring
    outputs, share one knock. With `rows`, a slice, only these outputs have it: nanoGPT's values are
    slice(2 * n_embd, 3 * n_embd), GPT-NeoX's are no slice. Knocks start as the identity, in float32
    or wider: in bfloat16 a small step from 1 is lost. Returns {name of a projection: its Knock}.
    Raises ValueError if none matches or one cannot be knocked. Call it before DDP and FSDP. To
    load: base model, add_knocks, load_state_dict. LoRA beside a linear knock: fold, then merge."""
    if isinstance(model, Transformer):
        raise ValueError("a Transformer has its knocks by Config: set knock_q, knock_k, knock_v")
    if kind not in ("linear", "mlp"):
        raise ValueError(f"kind must be linear or mlp, not {kind!r}")
    if not isinstance(head_dim, int):
        raise ValueError(f"head_dim must be an int, not {head_dim!r}")
    matches = {}  # a module can have several names: the first one is taken
    for name, part in model.named_modules(remove_duplicate=False):
        if fnmatch.fnmatchcase(name, pattern):
            matches.setdefault(part, name)
    if not matches:
        raise ValueError(f"no module's full name matches {pattern!r}: see model.named_modules()")
    for part, name in matches.items():
        name = name or "the model"
        if type(part) not in (nn.Linear, KnockedLinear):
            raise ValueError(f"{name} is a {type(part).__name__}, not an nn.Linear: match only"
                             " those, and add knocks before they are quantised or wrapped")
        if "forward" in vars(part) or type(part.weight) not in (nn.Parameter, Tensor):
            raise ValueError(f"{name} is sharded or has a forward of its own: add knocks first")
        start, stop, step = rows.indices(part.out_features)
        if step != 1 or start >= stop or head_dim < 1 or (stop - start) % head_dim:
            raise ValueError(f"outputs {start}:{stop}:{step} of {name} are not heads of {head_dim}")
        if any(a < stop and start < b for a, b in getattr(part, "rows", ())):
            raise ValueError(f"{name} has a knock on some of these outputs already")
    knocks = {}
    for part, name in matches.items():
        if type(part) is nn.Linear:
            part.__class__ = KnockedLinear  # still the same module, with its hooks
            part.knocks, part.rows = nn.ModuleList(), []
        knocks[name] = Knock(kind, head_dim).to(upcast(part.weight[:1]))  # float32 or wider
        part.knocks.append(knocks[name])
        part.rows.append(rows.indices(part.out_features)[:2])
    return knocks


class FoldedGate(nn.Module):
    """What folding leaves of an mlp or gate knock: 2 up * sigmoid(gate), and W^down if W^O did not
    take it. The projection makes up and gate, side by side: (..., 2 * H, D) -> (..., H, D)."""

    def __init__(self, head_dim: int, down: Tensor | None):
        super().__init__()
        self.kind, self.head_dim = "folded", head_dim
        self.down = None if down is None else nn.Parameter(down.clone(), down.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-2)
        x = 2 * up * torch.sigmoid(gate)
        return x if self.down is None else x @ self.down.to(x.dtype)


@torch.autocast("cpu", enabled=False)  # it would round the products
@torch.autocast("cuda", enabled=False)
@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Multiply knocks into the weights beside them, in place; returns the model. Its outputs change
    by rounding only. Linear knocks vanish (eq. 8), also those of `add_knocks` if no MLP knock is on
    the same projection. Of an mlp or gate knock in `Heads` a `FoldedGate` remains: fewer products,
    but a wider projection, which no Config describes, so save the model before. Other knocks stay.
    Raises ValueError, with nothing changed, if such a weight is shared, sharded or computed."""
    attns = [part for part in model.modules() if isinstance(part, GQA)]
    # Attention is linear in the values. So W^down can go into W^O, which all of them pass.
    wo = {attn.wv: attn.wo for attn in attns if attn.wv.knock.kind == "mlp"}
    ours = [part for part in model.modules() if isinstance(part, Heads)]
    ours = [part for part in ours if part.knock.kind in ("linear", "mlp", "gate")]
    linears = [part for part in model.modules() if isinstance(part, KnockedLinear)]
    linears = [part for part in linears if all(knock.kind == "linear" for knock in part.knocks)]
    check_own(model, {*ours, *linears, *wo.values()})
    for part in linears:
        for knock, (start, stop) in zip(part.knocks, part.rows, strict=True):
            part.weight[start:stop] = absorb(part.weight[start:stop], knock.t)
            if part.bias is not None:  # (x W + b) t = x W t + b t
                part.bias[start:stop] = absorb(part.bias[start:stop, None], knock.t)[:, 0]
        del part.knocks, part.rows
        part.__class__ = nn.Linear
    for part in ours:
        if part.knock.kind == "linear":
            part.weight.copy_(part.absorbed_weight(part.weight.dtype))
            part.knock = Knock("none", part.knock.head_dim)
        else:
            fold_gate(part, wo.get(part))
    if isinstance(model, Transformer):
        gone = {f: "none" for f, kind in vars(model.config).items() if kind == "linear"}  # knocks
        model.config = replace(model.config, **gone, knock_init="identity")
    torch.clear_autocast_cache()  # it may hold the old weights
    return model


def check_own(model: nn.Module, parts: set[nn.Module]) -> None:
    """Raises ValueError if a change of these weights would be lost, or change others, too."""
    ids = [id(x) for m in model.modules() for x in (*m._modules.values(), *m._parameters.values())]
    sharded = any(hasattr(part, "reshard") for part in model.modules())  # by FSDP
    for name, part in model.named_modules():
        if part not in parts:
            continue
        own = [x for x in (part, part.weight, getattr(part, "bias", None)) if x is not None]
        # LoRA's .weight belongs to the layer in it. A replaced forward may not use .weight.
        wrapped = part.weight is not part._parameters.get("weight") or "forward" in vars(part)
        if sharded or wrapped or any(type(x) is Tensor or ids.count(id(x)) > 1 for x in own):
            raise ValueError(f"{name} is shared, sharded or computed: fold first, or merge LoRA")


def fold_gate(part: Heads, wo: nn.Module | None) -> None:
    """Fold an mlp or gate knock; W^down goes into `wo`, if given."""
    knock, weight, down = part.knock, part.weight, None
    up, gate = weight, absorb(weight, knock.gate)
    if knock.kind == "mlp":
        up, down = absorb(weight, knock.up), knock.down
    part.weight = nn.Parameter(torch.cat((up, gate)), weight.requires_grad)  # (2 * H * D, n_in)
    if wo is not None:
        heads = wo.weight.unflatten(1, (-1, knock.head_dim))  # (C, H, D): transposed W^O_h
        wo.weight.copy_((heads @ down.mT.to(heads.dtype)).flatten(1))
        down = None
    part.knock = FoldedGate(knock.head_dim, down)


def check_fields(config, choices: dict, may_be_zero: tuple[str, ...]) -> None:
    """Raises ValueError for a field outside its `choices`, or for a number that is not positive."""
    for field in fields(config):
        name, value, zero = field.name, getattr(config, field.name), field.name in may_be_zero
        if name in choices and value not in choices[name]:
            raise ValueError(f"{name} must be one of {', '.join(choices[name])}, not {value!r}")
        if field.type not in (int, float):
            continue
        if not isinstance(value, (int, field.type)):
            raise ValueError(f"{name} must be of type {field.type.__name__}, not {value!r}")
        if not (0 < value < 2**63 or zero and value == 0):
            raise ValueError(f"{name} must be {'>= 0' if zero else '> 0'} and < 2^63, not {value}")


def check_config(c: Config) -> None:
    """Raises ValueError, in one line, for a shape that cannot be built."""
    choices = {"attention": ATTENTIONS, "knock_init": ("identity", "random")}
    choices |= {"knock_q": KNOCKS, "knock_k": KNOCKS, "knock_v": KNOCKS}
    check_fields(c, choices, may_be_zero=("n_expert", "top_k", "kv_rank", "q_rank"))
    mla, knocks = c.attention == "mla", {c.knock_q, c.knock_k, c.knock_v}
    for wrong, message in [
        (c.n_head % c.n_kv_head,
         f"n_head must be a multiple of n_kv_head, not {c.n_head} and {c.n_kv_head}"),
        (c.head_dim % 2 or c.rope_dim % 2, "head_dim must be even; in gta and mla a multiple of 4"),
        (knocks == {"none"} and c.knock_init == "random", "without knocks set knock_init identity"),
        (c.attention == "gta" and c.knock_k != "none", "gta knocks by knock_v: leave knock_k none"),
        (mla and knocks - {"none", "linear"},
         "in mla, knock_q, knock_k and knock_v must be linear or none,"
         f" not {c.knock_q}, {c.knock_k} and {c.knock_v}: set knock_v linear, or none"),
        (mla and (c.kv_rank == 0 or c.kv_rank % c.n_kv_head),
         f"mla needs a kv_rank that is a multiple of n_kv_head, {c.n_kv_head}, not {c.kv_rank}:"
         f" set it, to {4 * c.head_dim * c.n_kv_head} for example"),
        (not mla and (c.kv_rank or c.q_rank), "kv_rank and q_rank belong to mla: leave them 0"),
        ((c.n_expert == 0) != (c.top_k == 0) or c.top_k > c.n_expert,
         f"top_k must be in 1..n_expert, or 0 if n_expert is 0, not {c.top_k} of {c.n_expert}"),
        (c.n_expert and (c.n_embd % 8 or c.d_ff % 8),  # grouped_mm reads rows of whole 16 bytes
         f"with experts, n_embd and d_ff must be multiples of 8, not {c.n_embd} and {c.d_ff}"),
    ]:
        if wrong:
            raise ValueError(message)


_paper = dict(vocab_size=157184, head_dim=128, n_head=32, n_kv_head=4, block_size=4096)
CONFIGS = {  # toy is for two CPU cores, small for studies on one GPU, both for bytes
    "toy": dict(vocab_size=320, block_size=256, n_layer=3, n_embd=160, n_head=4, n_kv_head=2,
                head_dim=32, d_ff=128, n_expert=8, top_k=2),
    "small": dict(vocab_size=320, n_layer=10, n_embd=512, n_head=12, n_kv_head=4, head_dim=64,
                  d_ff=224, n_expert=32, top_k=4),
    "gpt2": dict(),  # as large as GPT-2 124M, to compare with nanoGPT
    # Table 5, and the main model (section 4). Its shape and all vocabularies are our guess.
    "moe-0.4b-2.3b": dict(_paper, n_layer=12, n_embd=1152, d_ff=768, n_expert=64, top_k=4),
    "moe-0.8b-6.6b": dict(_paper, n_layer=18, n_embd=1536, d_ff=1152, n_expert=64, top_k=4),
    "moe-1.6b-14.6b": dict(_paper, n_layer=23, n_embd=2048, d_ff=1536, n_expert=64, top_k=4),
    "dense-0.6b": dict(_paper, n_layer=24, n_embd=1024, d_ff=3072),
    "dense-1.7b": dict(_paper, n_layer=24, n_embd=2048, d_ff=6144),
    "dense-3.9b": dict(_paper, n_layer=36, n_embd=2560, d_ff=9728),
    "moe-1b-6.1b": dict(_paper, block_size=8192, n_layer=18, n_embd=2048, d_ff=384, n_expert=128,
                        top_k=8),
}


# --------------------------------------------------------------------------------------------------
# The same, faster: KHA-MLP as one kernel. Heads pass through memory 5 times in all, not about 32.


@torch.compiler.assume_constant_result
def is_hopper() -> bool:
    """Whether the GPU is Hopper or Blackwell for servers: the tiles below need their memory."""
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] in (9, 10)


def can_fuse(x: Tensor) -> bool:
    """Whether `fused_mlp` takes heads x (..., D): bfloat16, is_hopper(), D 16, 32, 64 or 128."""
    fits = x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] in (16, 32, 64, 128)
    return fits and triton is not None and is_hopper()


if triton:

    @triton.jit
    def twice_sigmoid(x):
        """1 + tanh(x / 2), by the GPU's own tanh. That is wrong by at most 2^-11 of its value."""
        asm: tl.constexpr = "tanh.approx.f32 $0, $1;"
        return 1 + tl.inline_asm_elementwise(asm, "=f,f", [x / 2], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def mlp_kernel(x_ptr, w_ptr, y_ptr, n, D: tl.constexpr, ROWS: tl.constexpr):
        """Eq. 9 on n heads x (n, D), in tiles of ROWS heads. Each program does some of them."""
        column = tl.arange(0, D)
        square = column[:, None] * D + column
        w_up, w_gate = tl.load(w_ptr + square), tl.load(w_ptr + D * D + square)
        w_down = tl.load(w_ptr + 2 * D * D + square)
        for i in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
            row = i * ROWS + tl.arange(0, ROWS)[:, None]
            tile = row.to(tl.int64) * D + column
            x = tl.load(x_ptr + tile, mask=row < n, other=0.0)  # (ROWS, D)
            h = tl.dot(x, w_up) * twice_sigmoid(tl.dot(x, w_gate))
            y = tl.dot(h.to(x.dtype), w_down)
            tl.store(y_ptr + tile, y.to(x.dtype), mask=row < n)

    @triton.jit
    def mlp_backward_kernel(x_ptr, w_ptr, dy_ptr, dx_ptr, dw_ptr, n,
                            D: tl.constexpr, ROWS: tl.constexpr):
        """Gradients of eq. 9, by x (n, D) and by the matrices. Each program does some tiles of ROWS
        heads, and writes its sums for the matrices to its part of dw (programs, 3, D, D)."""
        column = tl.arange(0, D)
        square = column[:, None] * D + column
        w_up, w_gate = tl.load(w_ptr + square), tl.load(w_ptr + D * D + square)
        w_down = tl.load(w_ptr + 2 * D * D + square)
        d_up, d_gate = tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32)
        d_down = tl.zeros((D, D), tl.float32)
        for i in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
            row = i * ROWS + tl.arange(0, ROWS)[:, None]
            tile = row.to(tl.int64) * D + column
            x = tl.load(x_ptr + tile, mask=row < n, other=0.0)  # (ROWS, D)
            dy = tl.load(dy_ptr + tile, mask=row < n, other=0.0)
            # up and s again: cheaper than to keep them. This order needs the fewest registers.
            s = twice_sigmoid(tl.dot(x, w_gate))
            by_up = s * tl.dot(dy, w_down.T)
            up = tl.dot(x, w_up)
            d_down += tl.dot(dy.T, (up * s).to(x.dtype))  # transposed: free for loaded tiles only
            by_gate = (by_up * up * (1 - s / 2)).to(x.dtype)
            d_up += tl.dot(x.T, by_up.to(x.dtype))
            dx = tl.dot(by_up.to(x.dtype), w_up.T)
            d_gate += tl.dot(x.T, by_gate)
            dx += tl.dot(by_gate, w_gate.T)
            tl.store(dx_ptr + tile, dx.to(x.dtype), mask=row < n)
        own = tl.program_id(0) * 3 * D * D + square
        tl.store(dw_ptr + own, d_up)
        tl.store(dw_ptr + own + D * D, d_gate)
        tl.store(dw_ptr + own + 2 * D * D, d_down.T)

    def n_program(x: Tensor, rows: int, each: int) -> int:
        """How many programs: one a tile of `rows` heads, at most `each` a processor of the GPU."""
        n_processor = torch.cuda.get_device_properties(x.device).multi_processor_count
        return min(each * n_processor, triton.cdiv(x.numel(), rows * x.shape[-1]))

    @torch.library.triton_op("kha::fused_mlp", mutates_args=())
    def fused_mlp(x: Tensor, w: Tensor) -> Tensor:
        """Eq. 9 on heads x (..., D), with W^up, W^gate and W^down in w (3, D, D): x's shape."""
        x, D = x.contiguous(), x.shape[-1]
        rows, each, warps = (64, 4, 4) if D < 128 else (128, 1, 8)  # the fastest of those tried
        y, kernel = torch.empty_like(x), torch.library.wrap_triton(mlp_kernel)
        kernel[(n_program(x, rows, each),)](x, w, y, x.numel() // D, D, rows, num_warps=warps)
        return y

    @torch.library.triton_op("kha::fused_mlp_backward", mutates_args=())
    def fused_mlp_backward(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `fused_mlp`, by x and by w."""
        x, dy, D = x.contiguous(), dy.contiguous(), x.shape[-1]
        rows = 128 if D < 128 else 16  # the fastest of those tried
        programs, kernel = n_program(x, rows, 1), torch.library.wrap_triton(mlp_backward_kernel)
        dx, dw = torch.empty_like(x), x.new_empty(programs, 3, D, D, dtype=torch.float32)
        kernel[(programs,)](x, w, dy, dx, dw, x.numel() // D, D, rows, num_warps=8)
        return dx, dw.sum(0).to(w.dtype)

    fused_mlp.register_autograd(
        lambda ctx, dy: fused_mlp_backward(*ctx.saved_tensors, dy),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
