"""Knocking-Heads Attention (Zhou et al. 2025, arXiv 2510.23052) in one file.

Attention heads work alone until their outputs are concatenated. KHA lets them "knock" on each other before that:
one small head_dim x head_dim projection, shared by all heads, is applied to every head's query, key and/or value
right after W^Q, W^K, W^V. It starts as the identity, so step 0 is exactly the model without it; it works on what
scaled_dot_product_attention is given, so every fast attention kernel still applies.

Read from top to bottom: Config, the knocks (eq. 5-9), attention, Block, the initialisation (section 3.3), Transformer;
then a kernel for KHA-MLP, folding, knocks for other models, the cost (eq. 10-12), checkpoints. The model around the
method is a Qwen3-style decoder: RMSNorm before each part, no biases, grouped-query attention with QK-norm and RoPE,
SwiGLU or a mixture of experts (moe.py), tied embeddings.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch.utils.checkpoint import checkpoint as recompute

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA only
    triton = None

from moe import MoE, SwiGLU, upcast

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """Shape of a model. Raises ValueError, in one line, for a shape that cannot be built."""

    vocab_size: int = 50304
    block_size: int = 1024  # longest sequence the model is made for
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12  # query heads
    n_kv_head: int = 12  # key and value heads: n_head is MHA, 1 is MQA, between them GQA
    head_dim: int = 64
    attention: str = "gqa"  # gqa, gta or mla
    kv_rank: int = 0  # MLA: width of the cached latents, all n_kv_head together (1 is MLA, more is GLA)
    q_rank: int = 0  # MLA: width of the query's latent, 0 for none
    d_ff: int = 2048  # width of the SwiGLU, with experts of each one
    n_expert: int = 0  # 0 is a dense model
    top_k: int = 0  # experts per token
    knock_q: str = "none"  # none, linear, mlp or gate
    knock_k: str = "none"
    knock_v: str = "mlp"
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        may_be_zero = ("n_expert", "top_k", "kv_rank", "q_rank")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not (0 < value < math.inf or value == 0 and field.name in may_be_zero):
                raise ValueError(f"{field.name} must be positive, not {value}")
            choices = KNOCKS if field.name.startswith("knock_") else ATTENTIONS if field.name == "attention" else None
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head, but {self.n_head} is not one of {self.n_kv_head}")
        if self.head_dim % 2 or self.rope_dim % 2:
            raise ValueError(f"head_dim must be even (gta, mla: a multiple of 4), for RoPE turns pairs, not {self.head_dim}")
        if self.attention == "gta" and self.knock_k != "none":
            raise ValueError("gta has one state for key and value, and knock_v knocks it: leave knock_k none")
        if self.attention == "mla":
            if {self.knock_q, self.knock_k, self.knock_v} - {"none", "linear"}:
                raise ValueError(
                    "mla takes linear knocks only: it never makes the keys and values on which a non-linear one could"
                    " act when decoding: set knock_q, knock_k, knock_v to linear or none"
                )
            if self.kv_rank == 0 or self.kv_rank % self.n_kv_head:
                raise ValueError(f"mla needs a kv_rank that is a multiple of n_kv_head, not {self.kv_rank}")
        elif self.kv_rank or self.q_rank:
            raise ValueError(f"kv_rank and q_rank belong to mla, not to {self.attention}: leave them 0")
        if (self.n_expert == 0) != (self.top_k == 0) or self.top_k > self.n_expert:
            raise ValueError(f"top_k must be in 1..n_expert (0 for a dense model), not {self.top_k} of {self.n_expert}")
        if self.n_expert and (self.n_embd % 8 or self.d_ff % 8):  # grouped_mm reads rows of whole 16 bytes
            raise ValueError(f"with experts, n_embd and d_ff must be multiples of 8, not {self.n_embd} and {self.d_ff}")

    @property
    def rope_dim(self) -> int:
        """How many features of a head RoPE turns: all of them, in GTA and MLA head_dim/2."""
        return self.head_dim if self.attention == "gqa" else self.head_dim // 2


_paper = dict(vocab_size=157184, head_dim=128, n_head=32, n_kv_head=4, block_size=4096)  # the Ling 2.0 tokenizer
CONFIGS = {
    # Byte-level (257 tokens, rounded up for the GPU's sake): the toy for two CPU cores, and one for studies on a GPU.
    "toy": dict(vocab_size=320, block_size=256, n_layer=3, n_embd=160, n_head=4, n_kv_head=2, head_dim=32, d_ff=128,
                n_expert=8, top_k=2),
    "small": dict(vocab_size=320, block_size=1024, n_layer=10, n_embd=512, n_head=12, n_kv_head=4, head_dim=64,
                  d_ff=224, n_expert=32, top_k=4),
    # As large as GPT-2 124M, for comparisons with nanoGPT.
    "gpt2": dict(),
    # Table 5 of the paper, named after active and total parameters.
    "moe-0.4b-2.3b": dict(_paper, n_layer=12, n_embd=1152, d_ff=768, n_expert=64, top_k=4),
    "moe-0.8b-6.6b": dict(_paper, n_layer=18, n_embd=1536, d_ff=1152, n_expert=64, top_k=4),
    "moe-1.6b-14.6b": dict(_paper, n_layer=23, n_embd=2048, d_ff=1536, n_expert=64, top_k=4),
    "dense-0.6b": dict(_paper, n_layer=24, n_embd=1024, d_ff=3072),
    "dense-1.7b": dict(_paper, n_layer=24, n_embd=2048, d_ff=6144),
    "dense-3.9b": dict(_paper, n_layer=36, n_embd=2560, d_ff=9728),
    # The main model, section 4. The paper prints its sizes, not its shape; this shape has those sizes.
    "moe-1b-6.1b": dict(_paper, block_size=8192, n_layer=18, n_embd=2048, d_ff=384, n_expert=128, top_k=8),
}

# ---------------------------------------------------------------------------------------------------------------------
# Knocks: what one head learns, all heads share


class Knock(nn.Module):
    """One (head_dim, head_dim) matrix for each name in `matrices`, shared by all heads, at the identity.

    A knock is a function of each head, x_i -> `forward`(x_i). What of it is linear may act on a weight instead: on the
    one that makes the heads (`on_weight`), or for values on W^O (`on_output`). That is the same product, and its cost
    does not grow with the number of tokens.
    """

    matrices: tuple[str, ...]

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        for name in self.matrices:
            self.register_parameter(name, nn.Parameter(torch.empty(head_dim, head_dim)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Section 3.3: identity matrices, and a gate of zeros for 2 sigmoid(0) = 1, so that the knock does nothing."""
        for name, p in self.named_parameters():
            p.zero_() if name == "gate" else nn.init.eye_(p)

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (n_head * head_dim, n_in) that makes the heads, knocked."""
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The heads, knocked: (..., head, head_dim) -> the same."""
        return x

    def on_output(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight W^O (n_out, n_head * head_dim) that reads the attended values, knocked."""
        return weight


def absorb(weight: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Eq. 8, W_i' = W_i T for every head i, on the weight (n_head * head_dim, n_in) of an nn.Linear, where the rows of
    head i are W_i^T: the same shape."""
    return (t.mT @ weight.unflatten(0, (-1, len(t)))).flatten(0, 1)


class KnockLinear(Knock):
    """KHA-Linear, eq. 5-7: x_i T for every head i, done on the weight: x_i T = (X W_i) T = X (W_i T). The paper absorbs T
    so at inference (eq. 8); here training does it, too."""

    matrices = ("t",)

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return absorb(weight, self.t.to(weight.dtype))


class KnockMLP(Knock):
    """KHA-MLP, eq. 9: 2 (x_i W^up * sigmoid(x_i W^gate)) W^down for every head i.

    Where the heads are values and nothing else (`down_on_output`), W^down waits for W^O: attention is linear in values.
    """

    matrices = ("up", "gate", "down")
    down_on_output = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.up.to(x.dtype), self.gate.to(x.dtype)
        y = fused_gate(x, up, gate) if can_fuse(x) else 2 * (x @ up) * (x @ gate).sigmoid()
        return y if self.down_on_output else y @ self.down.to(x.dtype)

    def on_output(self, weight: torch.Tensor) -> torch.Tensor:
        """W^O_h' = W^down W^O_h for every query head h, whose block of the weight is (W^O_h)^T."""
        if not self.down_on_output:
            return weight
        return (weight.unflatten(1, (-1, self.head_dim)) @ self.down.to(weight.dtype).mT).flatten(1)


class KnockGate(Knock):
    """The gate alone, 2 x_i * sigmoid(x_i W^gate): the ablation of Table 2, which harms."""

    matrices = ("gate",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x * (x @ self.gate.to(x.dtype)).sigmoid()


class NoKnock(Knock):
    """The baseline: every head keeps its own features."""

    matrices = ()


KNOCKS = {"none": NoKnock, "linear": KnockLinear, "mlp": KnockMLP, "gate": KnockGate}


def heads(x: torch.Tensor, projection: nn.Linear, knock: Knock) -> torch.Tensor:
    """The heads that a projection makes of x, knocked: (B, T, C) -> (B, T, H, D)."""
    return knock(projection(x, knock.on_weight).unflatten(-1, (-1, knock.head_dim)))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Linear(nn.Linear):
    """nn.Linear without bias that computes in its input's dtype: float32 master weights, bfloat16 activations. `knocked`
    is the part of a knock that acts on the weight."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor, knocked: Callable[[torch.Tensor], torch.Tensor] = lambda w: w) -> torch.Tensor:
        return F.linear(x, knocked(self.weight.to(x.dtype)))


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm that computes in its input's dtype: with a wider weight the fused kernel is not taken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rope_tables(positions: torch.Tensor, dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the RoPE angles of integer positions (T,): two tensors (T, 1, dim/2), float32."""
    frequencies = base ** (-torch.arange(0, dim, 2, device=positions.device) / dim)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE in the half-rotation layout: feature i turns with feature i + dim/2. x (B, T, H, dim) -> the same."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """softmax(q k^T * scale) v for each head (eq. 4): q (B, T, H, D), k (B, S, H_kv, D), v (B, S, H_kv, D_v) ->
    (B, T, H, D_v). H/H_kv query heads share a key/value head. A query sees what `mask` (T, S) allows; without it T = S,
    and it sees what is not after it. scale is 1/sqrt(D) if not given."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1)
        return y.transpose(1, 2)  # (B, T, H, D)
    # Few queries and a long past: here the plain products are faster. A group's query heads are as more queries.
    q = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, H_kv, H/H_kv * T, D)
    scores = upcast(q @ k.mT) * (scale or q.shape[-1] ** -0.5)
    y = scores.masked_fill(~mask.repeat(group, 1), -math.inf).softmax(-1).to(v.dtype) @ v
    return y.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2)  # (B, T, H, D)


class Cache:
    """What one layer must remember of the past: tensors (B, length, ...), of which `used` positions are filled."""

    def __init__(self, length: int):
        self.length, self.used, self.buffers = length, 0, []

    def reserve(self, n: int) -> None:
        """Count n more positions as used. Raises ValueError if they do not fit."""
        self.used += n
        if self.used > self.length:
            raise ValueError(f"the cache holds {self.length} positions, {self.used} were asked for")

    def write(self, positions: torch.Tensor, *new: torch.Tensor) -> list[torch.Tensor]:
        """Store new (B, T, ...) at positions (T,) and return all there is, each (B, length, ...). Shapes never change and
        positions are on the device: so a CUDA graph of a step serves every later step."""
        if not self.buffers:
            self.buffers = [x.new_zeros(x.shape[0], self.length, *x.shape[2:]) for x in new]
        return [buffer.index_copy_(1, positions, x) for buffer, x in zip(self.buffers, new)]

    def repeat(self, n: int) -> None:
        """Let each sequence be n sequences that share this past."""
        self.buffers = [buffer.repeat_interleave(n, dim=0) for buffer in self.buffers]


class Step(NamedTuple):
    """Where the tokens of one forward pass stand, the same for all layers."""

    rope: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor  # (T,)
    mask: torch.Tensor | None  # (T, length of the cache), what is not after each; None: there is no past


class Attention(nn.Module):
    """What all variants share: (B, T, C) -> (B, T, C).

    A variant's `project` makes the queries and what a later token must remember of these (the cache's content);
    its `attend` makes keys and values of that, and attends: (B, T, H, D).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.wo = Linear(config.n_head * config.head_dim, config.n_embd)
        self.knock_q, self.knock_k, self.knock_v = (
            KNOCKS[kind](config.head_dim) for kind in (config.knock_q, config.knock_k, config.knock_v)
        )

    def forward(self, x: torch.Tensor, step: Step, cache: Cache | None = None) -> torch.Tensor:
        q, *state = self.project(x, step.rope)
        if cache is not None:
            past = cache.write(step.positions, *state)
            state = state if step.mask is None else past
        return self.wo(self.attend(q, *state, step.mask).flatten(2), self.knock_v.on_output)


class GQA(Attention):
    """Grouped-query attention (eq. 1-4); n_kv_head = n_head is MHA, n_kv_head = 1 MQA.

    Knocks come after the projections and before QK-norm (section 4.5.2), RoPE and attention.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        C, D = config.n_embd, config.head_dim
        self.wq = Linear(C, config.n_head * D)
        self.wk = Linear(C, config.n_kv_head * D)
        self.wv = Linear(C, config.n_kv_head * D)
        self.q_norm, self.k_norm = (RMSNorm(D, eps=config.norm_eps) for _ in range(2))
        self.knock_v.down_on_output = True  # if it has a W^down: what it knocks on is values only

    def project(self, x: torch.Tensor, rope: tuple) -> tuple[torch.Tensor, ...]:
        q, k, v = heads(x, self.wq, self.knock_q), heads(x, self.wk, self.knock_k), heads(x, self.wv, self.knock_v)
        return rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return causal_attention(q, k, v, mask)


class GTA(Attention):
    """Grouped-tied attention (Zadouri et al. 2025, arXiv 2505.21487).

    One tied state per key/value head is the value, and its first half the half of the key that RoPE does not turn;
    the half that it does turn is one head for all. knock_v knocks the tied state once, before it is split, so the
    cache stays n_kv_head * head_dim + head_dim/2 numbers a token.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        C, D = config.n_embd, config.head_dim
        self.wq = Linear(C, config.n_head * D)
        self.wv = Linear(C, config.n_kv_head * D)
        self.wk_rope = Linear(C, D // 2)
        self.q_norm = RMSNorm(D, eps=config.norm_eps)
        self.k_norm, self.k_rope_norm = (RMSNorm(D // 2, eps=config.norm_eps) for _ in range(2))

    def project(self, x: torch.Tensor, rope: tuple) -> tuple[torch.Tensor, ...]:
        q, tied = heads(x, self.wq, self.knock_q), heads(x, self.wv, self.knock_v)  # (B, T, H, D)
        q, q_rope = self.q_norm(q).chunk(2, dim=-1)  # (B, T, H, D/2)
        k_rope = self.k_rope_norm(self.wk_rope(x))[:, :, None]  # (B, T, 1, D/2)
        return torch.cat((q, rotate(q_rope, rope)), dim=-1), tied, rotate(k_rope, rope)

    def attend(
        self, q: torch.Tensor, tied: torch.Tensor, k_rope: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        k = self.k_norm(tied[..., : self.head_dim // 2])  # (B, S, H_kv, D/2)
        return causal_attention(q, torch.cat((k, k_rope.expand_as(k)), dim=-1), tied, mask)


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434); with n_kv_head > 1 latent heads it is GLA (arXiv
    2505.21487).

    Keys and values of all heads come from latents, kv_rank/n_kv_head numbers for each of n_kv_head groups of query
    heads, and RoPE turns head_dim/2 features of its own, which all heads share on the key side. The latents take the
    norm that elsewhere queries and keys take. Decoding never makes keys and values: W^UK moves to the query, W^UV to
    the output, and attention runs on the latents, which are all the cache holds. This needs knocks that are linear.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.n_latent, rank = config.n_kv_head, config.kv_rank // config.n_kv_head
        self.wq_latent = Linear(C, config.q_rank) if config.q_rank else nn.Identity()
        self.q_norm = RMSNorm(config.q_rank, eps=config.norm_eps) if config.q_rank else nn.Identity()
        self.wq = Linear(config.q_rank or C, H * D)
        self.wq_rope = Linear(config.q_rank or C, H * D // 2)
        self.wkv_latent = Linear(C, config.kv_rank)
        self.kv_norm = RMSNorm(rank, eps=config.norm_eps)
        self.wk_rope = Linear(C, D // 2)
        self.wk = Linear(rank, H * D)  # W^UK and W^UV: head h reads the latent of its group
        self.wv = Linear(rank, H * D)

    def project(self, x: torch.Tensor, rope: tuple) -> tuple[torch.Tensor, ...]:
        c = self.q_norm(self.wq_latent(x))
        q = heads(c, self.wq, self.knock_q)  # (B, T, H, D)
        q_rope = self.wq_rope(c).unflatten(-1, (-1, self.head_dim // 2))  # (B, T, H, D/2)
        latent = self.kv_norm(self.wkv_latent(x).unflatten(-1, (self.n_latent, -1)))  # (B, T, G, rank)
        k_rope = self.wk_rope(x)[:, :, None]  # (B, T, 1, D/2)
        return torch.cat((q, rotate(q_rope, rope)), dim=-1), latent, rotate(k_rope, rope)

    def attend(
        self, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        wk, wv = (w.weight.to(q.dtype) for w in (self.wk, self.wv))
        wk, wv = self.knock_k.on_weight(wk), self.knock_v.on_weight(wv)  # (H * D, rank)
        wk, wv = (w.unflatten(0, (self.n_latent, -1, self.head_dim)) for w in (wk, wv))  # (G, H/G, D, rank)
        if mask is None:  # no past: make keys and values, whose heads are smaller than latents
            k, v = (torch.einsum("btgr,ghdr->btghd", latent, w).flatten(2, 3) for w in (wk, wv))
            return causal_attention(q, torch.cat((k, k_rope.expand(-1, -1, k.shape[2], -1)), dim=-1), v)
        scale = q.shape[-1] ** -0.5
        q, q_rope = q.split((self.head_dim, self.head_dim // 2), dim=-1)
        q = torch.einsum("btghd,ghdr->btghr", q.unflatten(2, (self.n_latent, -1)), wk).flatten(2, 3)  # (B, T, H, rank)
        k = torch.cat((latent, k_rope.expand(-1, -1, self.n_latent, -1)), dim=-1)
        y = causal_attention(torch.cat((q, q_rope), dim=-1), k, latent, mask, scale)  # (B, T, H, rank)
        return torch.einsum("btghr,ghdr->btghd", y.unflatten(2, (self.n_latent, -1)), wv).flatten(2, 3)


ATTENTIONS = {"gqa": GQA, "gta": GTA, "mla": MLA}

# ---------------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """x + attention, then x + feed-forward, each on the normalised x: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm, self.ffn_norm = (RMSNorm(config.n_embd, eps=config.norm_eps) for _ in range(2))
        self.attn = ATTENTIONS[config.attention](config)
        if config.n_expert:
            self.ffn = MoE(config.n_embd, config.d_ff, config.n_expert, config.top_k)
        else:
            self.ffn = SwiGLU(config.n_embd, config.d_ff)

    def forward(self, x: torch.Tensor, step: Step, cache: Cache | None = None) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), step, cache)
        return x + self.ffn(self.ffn_norm(x))


LOGITS_AT_ONCE = 2**29  # 1 GiB in bfloat16


class CrossEntropy(nn.Module):
    """Summed cross-entropy of targets (N,) by logits x W^T, x (N, C), W (V, C); its gradient by x; and `dw`, float32, plus
    that by W. Without dw no gradients, but None."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dw: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        logits = upcast(F.linear(x, weight))  # (N, V)
        total = logits.logsumexp(-1, keepdim=True)
        loss = (total - logits.gather(-1, targets[:, None])).sum()
        if dw is None:
            return loss, None, None
        hit = torch.arange(len(weight), device=x.device) == targets[:, None]
        d_logits = ((logits - total).exp() - hit.to(logits.dtype)).to(x.dtype)
        return loss, d_logits @ weight, dw + d_logits.mT @ x


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of targets (N,) by logits x W^T, some tokens at a time: (N, V) logits never exist whole, nor are
    they made twice, for each chunk's gradients are taken along with its loss.

    The same as F.linear_cross_entropy of newer versions of torch.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cross_entropy, gradients):
        n_chunk = 1
        while len(x) * len(weight) > n_chunk * LOGITS_AT_ONCE:
            n_chunk *= 2
        loss, dx, dw = 0, [], upcast(torch.zeros_like(weight)) if gradients else None
        low = weight.to(x.dtype)
        for x_chunk, targets_chunk in zip(x.chunk(n_chunk), targets.chunk(n_chunk)):
            part, dx_part, dw = cross_entropy(x_chunk, low, targets_chunk, dw)
            loss = loss + part
            dx.append(dx_part)
        if gradients:
            ctx.save_for_backward(torch.cat(dx), dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return (dx * scale).to(dx.dtype), dw * scale, None, None, None


class LMHead(nn.Module):
    """The model's end: norm, then logits by the embedding's weight (V, C); with targets (B, T) their cross-entropy."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.cross_entropy = CrossEntropy()

    def forward(self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(x)
        if targets is None:
            return F.linear(x, weight.to(x.dtype))  # (B, T, V)
        x, targets = x.flatten(0, 1), targets.flatten()
        return ChunkedCrossEntropy.apply(x, weight, targets, self.cross_entropy, torch.is_grad_enabled())


@torch.no_grad()
def init_weights(module: nn.Module, n_layer: int) -> None:
    """Every weight's start, in place, for a whole model or one part after the other.

    Knocks draw no random numbers, so the same seed gives the same base weights whichever knocks there are, and with
    knocks at the identity the very same function (section 3.3).
    """
    std = 0.02
    out_std = std / math.sqrt(2 * n_layer)  # GPT-2: keeps the residual stream's size over depth
    for name, p in module.named_parameters():
        match name.split("."):
            case [*_, "t" | "up" | "down" | "gate"]:
                pass  # knocks, below
            case [*_, layer, "weight"] if layer.endswith("norm"):
                p.fill_(1)
            case [*_, "wo", "weight"] | [*_, "w_down" | "experts_down"]:
                p.normal_(std=out_std)
            case _:  # embedding, the projections into attention, w_up, experts_up, router
                p.normal_(std=std)
    for part in module.modules():
        if isinstance(part, Knock):
            part.reset_parameters()
        if isinstance(part, MoE):
            part.bias.zero_()
            part.load.zero_()


class Transformer(nn.Module):
    """The decoder. `compute_dtype` is the dtype of the activations, None that of the weights; with `recompute` the
    backward pass computes each block's activations anew instead of keeping them."""

    def __init__(self, config: Config, compute_dtype: torch.dtype | None = None, recompute: bool = False):
        super().__init__()
        self.config, self.compute_dtype, self.recompute = config, compute_dtype, recompute
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # also the output projection
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = LMHead(config)
        init_weights(self, config.n_layer)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, cache: list[Cache] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, vocab_size) of the token after each of tokens (B, T); or with targets (B, T) the mean
        cross-entropy in nats, a scalar.

        With a cache (`new_cache`), tokens continue what it holds; `positions` (T,) says where that is, for a CUDA graph,
        in which Python does not count. Raises ValueError past block_size or the cache's end.
        """
        start = cache[0].used if cache else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than the model's context of {self.config.block_size} (block_size)")
        if positions is None:
            positions = torch.arange(start, end, device=tokens.device)
        mask = None
        if start:  # (T, length)
            mask = torch.arange(cache[0].length, device=tokens.device) <= positions[:, None]
        step = Step(rope_tables(positions, self.config.rope_dim, self.config.rope_base), positions, mask)
        x = self.embed(tokens).to(dtype=self.compute_dtype)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x = recompute(block, x, step, use_reentrant=False)
                continue
            if cache:
                cache[i].reserve(tokens.shape[1])
            x = block(x, step, cache[i] if cache else None)
        return self.head(x, self.embed.weight, targets)

    def new_cache(self, length: int) -> list[Cache]:
        """An empty key/value cache for `length` positions, one Cache a layer."""
        return [Cache(length) for _ in self.blocks]

    def moes(self) -> list[MoE]:
        """The mixtures of experts, first layer first; none in a dense model."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def knocks(self) -> dict[str, Knock]:
        """Every knock by its place, such as blocks.0.attn.knock_v."""
        knocks = ((name, module) for name, module in self.named_modules() if isinstance(module, Knock))
        return {name: knock for name, knock in knocks if not isinstance(knock, NoKnock)}

    @torch.no_grad()
    def knock_movement(self) -> dict[str, tuple[float, float]]:
        """How far each knock matrix has come: name -> (mean of the diagonal, Frobenius norm of the rest).

        At the start (1, 0), for gates (0, 0). Figure 3 of the paper shows these matrices after training.
        """
        whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # FSDP's parameters are in shards
        matrices = {
            f"{place}.{name}": whole(p) for place, knock in self.knocks().items() for name, p in knock.named_parameters()
        }
        return {
            name: (p.diagonal().mean().item(), (p - p.diagonal().diag()).norm().item()) for name, p in matrices.items()
        }


# ---------------------------------------------------------------------------------------------------------------------
# KHA-MLP as one kernel
#
# What eq. 9 costs on a GPU is not its FLOPs but the passes of the values through memory. Product by product they are
# 7 forward and 16 backward. Here a tile of heads stays on the chip, and they are 2 and 3.


def can_fuse(x: torch.Tensor) -> bool:
    """Whether `fused_gate` takes heads x (..., D): bfloat16 on CUDA, and a D whose tiles the chip can hold. With 128 an
    H100 can, an A100 cannot."""
    if triton is None or not x.is_cuda or x.dtype != torch.bfloat16 or x.shape[-1] not in (16, 32, 64, 128):
        return False
    return memory_on_chip(x.device) >= (192 if x.shape[-1] == 128 else 96) * 1024


if triton:

    @torch.compiler.assume_constant_result
    def memory_on_chip(device: torch.device) -> int:
        """Bytes of shared memory that one program may have."""
        return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)

    @triton.jit
    def gate_kernel(x_ptr, up_ptr, gate_ptr, y_ptr, n, D: tl.constexpr, ROWS: tl.constexpr):
        """y = 2 (x up * sigmoid(x gate)) for n heads (n, D); each program does ROWS of them."""
        column = tl.arange(0, D)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        tile, square = row * D + column, column[:, None] * D + column
        x = tl.load(x_ptr + tile, mask=row < n, other=0.0)  # (ROWS, D)
        up = tl.dot(x, tl.load(up_ptr + square))
        gate = tl.dot(x, tl.load(gate_ptr + square))
        tl.store(y_ptr + tile, (2 * up * tl.sigmoid(gate)).to(x.dtype), mask=row < n)

    @triton.jit
    def gate_backward_kernel(
        x_ptr, up_ptr, gate_ptr, dy_ptr, dx_ptr, d_up_ptr, d_gate_ptr, n, n_tile, D: tl.constexpr, ROWS: tl.constexpr
    ):
        """The gradients by x (n, D), and by the matrices: each program does n_tile tiles of ROWS heads, and writes the
        sum over its heads to a (D, D) of its own."""
        column = tl.arange(0, D)
        square = column[:, None] * D + column
        w_up, w_gate = tl.load(up_ptr + square), tl.load(gate_ptr + square)
        d_up, d_gate = tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32)
        for i in range(n_tile):
            row = (tl.program_id(0).to(tl.int64) * n_tile + i) * ROWS + tl.arange(0, ROWS)[:, None]
            tile = row * D + column
            x = tl.load(x_ptr + tile, mask=row < n, other=0.0)  # (ROWS, D)
            dy = tl.load(dy_ptr + tile, mask=row < n, other=0.0)
            up, s = tl.dot(x, w_up), tl.sigmoid(tl.dot(x, w_gate))  # as before: cheaper than to keep them
            by_up = 2 * dy * s
            by_gate = (by_up * up * (1 - s)).to(x.dtype)
            by_up = by_up.to(x.dtype)
            tl.store(dx_ptr + tile, (tl.dot(by_up, w_up.T) + tl.dot(by_gate, w_gate.T)).to(x.dtype), mask=row < n)
            d_up += tl.dot(x.T, by_up)
            d_gate += tl.dot(x.T, by_gate)
        own = tl.program_id(0) * D * D + square
        tl.store(d_up_ptr + own, d_up)
        tl.store(d_gate_ptr + own, d_gate)

    @torch.library.triton_op("kha::fused_gate", mutates_args=())
    def fused_gate(x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """2 (x up * sigmoid(x gate)) of eq. 9, x (..., D), up and gate (D, D): the shape of x. For what `can_fuse` allows."""
        x, D, rows = x.contiguous(), x.shape[-1], 64
        n, y = x.numel() // D, torch.empty_like(x)
        torch.library.wrap_triton(gate_kernel)[(triton.cdiv(n, rows),)](x, up, gate, y, n, D, rows, num_warps=4)
        return y

    @torch.library.triton_op("kha::fused_gate_backward", mutates_args=())
    def fused_gate_backward(
        x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `fused_gate`, given that by its output: by x, and by up and gate, one tensor (2, D, D)."""
        x, dy, D = x.contiguous(), dy.contiguous(), x.shape[-1]
        rows, num_warps, per_processor = (64, 4, 2) if D < 128 else (32, 8, 1)  # the fastest of those tried on an H100
        n, n_processor = x.numel() // D, torch.cuda.get_device_properties(x.device).multi_processor_count
        n_tile = triton.cdiv(n, rows * n_processor * per_processor)
        n_program = triton.cdiv(n, rows * n_tile)
        dx, parts = torch.empty_like(x), x.new_empty(2, n_program, D, D, dtype=torch.float32)
        torch.library.wrap_triton(gate_backward_kernel)[(n_program,)](
            x, up, gate, dy, dx, parts[0], parts[1], n, n_tile, D, rows, num_warps=num_warps, num_stages=3
        )
        return dx, parts.sum(1).to(x.dtype)

    def fused_gate_autograd(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dx, d_matrices = fused_gate_backward(*ctx.saved_tensors, dy)
        return dx, *d_matrices

    fused_gate.register_autograd(
        fused_gate_autograd, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Folding: a trained model without its knocks


class GatedProjection(nn.Module):
    """What an MLP or gate knock leaves of a projection x W: 2 (x A * sigmoid(x B)) with A = W W^up (or W), B = W W^gate,
    side by side in one weight; then, if it does not act on W^O, W^down on every head."""

    def __init__(self, weight: torch.Tensor, knock: Knock):
        super().__init__()
        up = absorb(weight, knock.up) if isinstance(knock, KnockMLP) else weight
        self.weight = nn.Parameter(torch.cat((up, absorb(weight, knock.gate))))  # (2 * H * D, C)
        down = isinstance(knock, KnockMLP) and not knock.down_on_output
        self.down = nn.Parameter(knock.down.clone()) if down else None

    def forward(self, x: torch.Tensor, *_) -> torch.Tensor:
        up, gate = F.linear(x, self.weight.to(x.dtype)).chunk(2, dim=-1)
        y = 2 * up * gate.sigmoid()  # (B, T, H * D)
        return y if self.down is None else (y.unflatten(-1, (-1, len(self.down))) @ self.down.to(x.dtype)).flatten(-2)


def fold(model: nn.Module, value: str | None = None, output: str | None = None) -> nn.Module:
    """Turn a trained model, in place, into one that computes the same without knocks; returns it.

    Linear knocks vanish into W^Q, W^K, W^V (eq. 8). Of an MLP knock the non-linearity remains, in a `GatedProjection`;
    its W^down vanishes into W^O where the knocked state is nothing but a value, for attention is linear in values.
    What is folded can sample, not train on; only a model whose knocks were all linear can still be saved.

    A model that is not ours must say which projections make nothing but values and where their W^O is, by the names that
    these nn.Linear have side by side, such as "v_proj" and "o_proj"; else W^down stays with the projection. Raises
    ValueError if W^O is not there or is parametrized, and for an MLP knock on a projection with bias or on a part of its
    outputs.
    """
    return fold_ours(model) if isinstance(model, Transformer) else fold_added(model, value, output)


@torch.no_grad()
def fold_ours(model: Transformer) -> Transformer:
    """`fold` of a Transformer."""
    for place, knock in model.knocks().items():
        attn, part = model.get_submodule(place.rpartition(".")[0]), place[-1]
        projection = getattr(attn, f"w{part}")
        if isinstance(knock, KnockLinear):
            projection.weight.copy_(knock.on_weight(projection.weight))
        else:
            setattr(attn, f"w{part}", GatedProjection(projection.weight, knock))
            attn.wo.weight.copy_(knock.on_output(attn.wo.weight))
        setattr(attn, f"knock_{part}", NoKnock(knock.head_dim))
    linear = {f"knock_{part}": "none" for part in "qkv" if getattr(model.config, f"knock_{part}") == "linear"}
    model.config = dataclasses.replace(model.config, **linear)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Knocks for models that are not ours


class AddedLinear(KnockLinear):
    """KnockLinear on rows `rows` (start, stop) of another model's weight (n_out, n_in) or bias (n_out,)."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        before, heads, after = weight.tensor_split(self.rows)
        return torch.cat((before, self.on_weight(heads.reshape(len(heads), -1)).view_as(heads), after))


class AddedMLP(KnockMLP):
    """KnockMLP on features `rows` (start, stop) of another projection's output: (..., n_out) -> the same."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        before, heads, after = y.tensor_split(self.rows, dim=-1)
        knocked = super().forward(heads.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return torch.cat((before, knocked, after), dim=-1)


def knock_output(projection: nn.Linear, _, y: torch.Tensor) -> torch.Tensor:
    """Forward hook of a projection with an AddedMLP. A hook leaves the names of the model's weights as they are, and
    in a copy of the model finds the copy's knock."""
    return projection.knock(y)


def add_knocks(
    model: nn.Module, kind: str, pattern: str, head_dim: int, rows: slice = slice(None)
) -> dict[str, Knock]:
    """Put knocks on a PyTorch model's query, key or value projections: the nn.Linear modules whose names match the
    fnmatch `pattern`, such as "*.v_proj". Each gets one knock, shared by its heads of head_dim outputs; returns the
    knocks by the names of their projections.

    kind is linear (a parametrization of weight and bias) or mlp. The knocks are parameters of the model, at the
    identity: its output is what it was. Where one nn.Linear makes queries, keys and values, `rows` are the outputs to
    knock on, for nanoGPT's values slice(2 * n_embd, 3 * n_embd).

    Raises ValueError, and leaves the model as it is, if it is ours, if nothing matches, or if a match is no nn.Linear,
    knocks already, or does not divide into heads.
    """
    if isinstance(model, Transformer):
        raise ValueError("our own models take their knocks from their Config: set knock_q, knock_k, knock_v")
    if kind not in ("linear", "mlp"):
        raise ValueError(f"kind must be linear or mlp, not {kind!r}")
    matches = {name: module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, pattern)}
    if not matches:
        raise ValueError(f"no module's name matches {pattern!r}: see model.named_modules() for the names")
    knocks = {}
    for name, projection in matches.items():
        if not isinstance(projection, nn.Linear):
            raise ValueError(f"{name} is a {type(projection).__name__}, not an nn.Linear")
        start, stop, step = rows.indices(projection.out_features)
        if step != 1 or start >= stop or head_dim < 1 or (stop - start) % head_dim:
            raise ValueError(f"outputs {start}:{stop} of {name} do not divide into heads of head_dim {head_dim}")
        there = [module.rows for module in projection.modules() if isinstance(module, Knock)]
        if any(a < stop and start < b for a, b in there) or kind == "mlp" and hasattr(projection, "knock"):
            raise ValueError(f"{name} knocks already")
        knocks[name] = (AddedLinear if kind == "linear" else AddedMLP)(head_dim).to(projection.weight)
        knocks[name].rows = (start, stop)
    for name, projection in matches.items():
        if kind == "mlp":
            projection.knock = knocks[name]
            projection.register_forward_hook(knock_output)
            continue
        for part in ("weight", "bias"):  # x T + b T: the same T
            if getattr(projection, part) is not None:
                parametrize.register_parametrization(projection, part, knocks[name])
    return knocks


@torch.no_grad()
def fold_added(model: nn.Module, value: str | None, output: str | None) -> nn.Module:
    """`fold` of a model with knocks by `add_knocks`."""
    for name, projection in list(model.named_modules()):
        if parametrize.is_parametrized(projection) and any(isinstance(m, AddedLinear) for m in projection.modules()):
            parts = [(part, chain.original, chain()) for part, chain in projection.parametrizations.items()]
            # Not remove_parametrizations: it edits a class that copies of the model share.
            projection.__class__ = type(projection).__bases__[0]
            del projection.parametrizations
            for part, original, value in parts:
                setattr(projection, part, original)
                original.copy_(value)
        knock = getattr(projection, "knock", None)
        if not isinstance(knock, AddedMLP):
            continue
        if projection.bias is not None or knock.rows != (0, projection.out_features):
            raise ValueError(f"cannot fold the MLP knock of {name}: it has a bias, or outputs that do not knock")
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        if child == value:
            after = getattr(parent, output or "", None)
            if not isinstance(after, nn.Linear) or parametrize.is_parametrized(after):
                raise ValueError(f"{name} has no neighbour {output} that is a plain nn.Linear")
            knock.down_on_output = True
            after.weight.copy_(knock.on_output(after.weight))
        setattr(parent, child, GatedProjection(projection.weight, knock))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and costs


def count_params(model: Transformer) -> tuple[int, int]:
    """Parameters in total and active for one token (top_k of n_expert experts): the columns of Tables 3 and 5."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts_" in name)
    idle = experts - experts // model.config.n_expert * model.config.top_k if experts else 0
    return total, total - idle


def flops_per_token(model: Transformer, length: int) -> int:
    """Training FLOPs of one token in a sequence of `length` tokens, forward and backward.

    PaLM's count (arXiv 2204.02311, appendix B), which nanoGPT uses too: 6 per weight a token meets, and
    12 n_layer n_head head_dim length for the attention matrix, causal or not. A knock's weights meet every head.
    """
    c = model.config
    kv_heads = c.n_head if c.attention == "mla" else c.n_kv_head
    knocks = sum(
        p.numel() * ((c.n_head if place.endswith("q") else kv_heads) - 1)
        for place, knock in model.knocks().items() for p in knock.parameters()
    )
    qk_dim = c.head_dim + (c.rope_dim if c.attention == "mla" else 0)
    attention = 6 * c.n_layer * c.n_head * (qk_dim + c.head_dim) * length
    return 6 * (count_params(model)[1] + knocks) + attention


def memory_per_gpu(
    config: Config, micro_batch: int, n_shard: int = 1, recompute: bool = False, accumulates: bool = True
) -> dict[str, float]:
    """GPU memory, in bytes, that training needs at its peak, by what needs it; "total" is the sum.

    float32 weights, gradients and both moments of Adam are spread over n_shard GPUs (FSDP; 1 without it). The rest is
    for micro_batch sequences of block_size tokens in bfloat16: the casts of the weights, which the backward pass keeps
    (FSDP has the embedding and two blocks whole at a time), each layer's activations (with recompute all layers' inputs
    and one layer's activations), and a chunk of logits, its gradient and that of the embedding, before it joins the
    others and after. If an update is one micro-batch (accumulates=False), gradients come only as activations go.
    """
    c = config
    with torch.device("meta"):
        model = Transformer(c)
    n, n_block = count_params(model)[0], sum(p.numel() for p in model.blocks[0].parameters())
    tokens = micro_batch * c.block_size
    # Numbers a token leaves in a layer. Queries and keys twice, for norm and RoPE lie between projection and attention.
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    if c.attention == "mla":
        layer = 3 * c.n_embd + c.q_rank + 2 * c.kv_rank + int(6.5 * q)
    else:
        layer = 3 * c.n_embd + 3 * q + 3 * kv
    kept = {"mlp": 1, "gate": 3}  # of each knocked head, the first by `fused_gate`
    layer += sum(kept.get(kind, 0) * heads for kind, heads in ((c.knock_q, q), (c.knock_k, kv), (c.knock_v, kv)))
    layer += c.top_k * (c.n_embd + 3 * c.d_ff) if c.n_expert else 2 * c.d_ff
    parts = {
        "weights": 4 * n / n_shard,
        "adam": 8 * n / n_shard,
        "gradients": 4 * n / n_shard,
        "casts": 2 * (n if n_shard == 1 else c.vocab_size * c.n_embd + 2 * n_block),
        "activations": 2 * tokens * (c.n_layer * c.n_embd + layer if recompute else c.n_layer * layer),
        "logits": 2 * 2 * min(tokens * c.vocab_size, LOGITS_AT_ONCE) + 2 * 4 * c.vocab_size * c.n_embd,
    }
    if not accumulates:
        parts["gradients"] = max(0, parts["gradients"] - parts["activations"] - parts["logits"])
    return {**parts, "total": sum(parts.values())}


def paper_flops(length: int, d: int, n_head: int) -> tuple[int, int, int]:
    """Forward FLOPs of one layer on a sequence, as the paper counts them: (MHA, FFN with d_ff = 3d, what KHA adds).

    Eq. 10-12: 8 L d^2 + 4 L^2 d; 18 L d^2; 6 L d^2 / n for KHA-Linear on q, k, v as for KHA-MLP on v.
    """
    return 8 * length * d**2 + 4 * length**2 * d, 18 * length * d**2, 6 * length * d**2 // n_head
