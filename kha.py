"""Knocking-Heads Attention (Zhou et al. 2025, arXiv 2510.23052) in one file.

Attention heads work alone until their outputs are concatenated. KHA lets them "knock" on each other before that:
one small head_dim x head_dim projection, shared by all heads, is applied to every head's query, key and/or value
right after W^Q, W^K, W^V. It starts as the identity, so step 0 is exactly the model without it; it works on what
scaled_dot_product_attention is given, so every fast attention kernel still applies.

Read from top to bottom: Config, the knocks (eq. 5-9), attention, Block, Transformer, its initialisation (section
3.3), its cost (eq. 10-12), checkpoints. The model around the method is a Qwen3-style decoder: RMSNorm before each
part, no biases, grouped-query attention with QK-norm and RoPE, SwiGLU or a mixture of experts (moe.py), tied
embeddings.
"""

import dataclasses
import math
import os
import pickle
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    d_ff: int = 2048  # width of the SwiGLU, with experts of each one
    n_expert: int = 0  # 0 is a dense model
    top_k: int = 0  # experts per token
    knock_q: str = "none"  # none, linear, mlp or gate
    knock_k: str = "none"
    knock_v: str = "mlp"
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        may_be_zero = ("n_expert", "top_k")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and (value < 0 or value == 0 and field.name not in may_be_zero):
                raise ValueError(f"{field.name} must be positive, not {value}")
            if field.name.startswith("knock_") and value not in KNOCKS:
                raise ValueError(f"{field.name} must be one of {', '.join(KNOCKS)}, not {value!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head, but {self.n_head} is not one of {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for RoPE turns pairs, not {self.head_dim}")
        if (self.n_expert == 0) != (self.top_k == 0) or self.top_k > self.n_expert:
            raise ValueError(f"top_k must be in 1..n_expert (0 for a dense model), not {self.top_k} of {self.n_expert}")
        if self.n_expert and (self.n_embd % 8 or self.d_ff % 8):  # grouped_mm reads rows of whole 16 bytes
            raise ValueError(f"with experts, n_embd and d_ff must be multiples of 8, not {self.n_embd} and {self.d_ff}")


_paper = dict(vocab_size=157184, head_dim=128, n_head=32, n_kv_head=4, block_size=4096)  # the Ling 2.0 tokenizer
CONFIGS = {
    # Byte-level (257 tokens, rounded up for the GPU's sake): the toy for two CPU cores, and one for studies on a GPU.
    "toy": dict(vocab_size=320, block_size=256, n_layer=4, n_embd=128, n_head=4, n_kv_head=2, head_dim=32, d_ff=128,
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


class KnockLinear(nn.Module):
    """KHA-Linear, eq. 5-7: x T, with one T (head_dim, head_dim) for all heads. (..., head, head_dim) -> the same."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.t = nn.Parameter(torch.empty(head_dim, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.t.to(x.dtype)


class KnockMLP(nn.Module):
    """KHA-MLP, eq. 9: 2 (x W^up * sigmoid(x W^gate)) W^down, shared by all heads. (..., head, head_dim) -> the same."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(head_dim, head_dim))
        self.gate = nn.Parameter(torch.empty(head_dim, head_dim))
        self.down = nn.Parameter(torch.empty(head_dim, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = x @ self.up.to(x.dtype), x @ self.gate.to(x.dtype)
        return 2 * (up * gate.sigmoid()) @ self.down.to(x.dtype)


class KnockGate(nn.Module):
    """The gate alone, 2 x * sigmoid(x W^gate): the ablation of Table 2, which harms. (..., head, head_dim) -> the same."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(head_dim, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x * (x @ self.gate.to(x.dtype)).sigmoid()


def no_knock(head_dim: int) -> nn.Module:
    """The baseline: every head keeps its own features."""
    return nn.Identity()


KNOCKS = {"none": no_knock, "linear": KnockLinear, "mlp": KnockMLP, "gate": KnockGate}

# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Linear(nn.Linear):
    """nn.Linear without bias that computes in its input's dtype: float32 master weights, bfloat16 activations."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


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


class Cache:
    """What one layer must remember of the past: tensors (B, T, ...), kept in buffers for `length` positions."""

    def __init__(self, length: int):
        self.length, self.used, self.buffers = length, 0, []

    def append(self, *new: torch.Tensor) -> list[torch.Tensor]:
        """Store new (B, T_new, ...) behind what is there and return all of it, each (B, T_all, ...).

        Raises ValueError if it does not fit.
        """
        start, self.used = self.used, self.used + new[0].shape[1]
        if self.used > self.length:
            raise ValueError(f"the cache holds {self.length} positions, {self.used} were asked for")
        if not self.buffers:
            self.buffers = [x.new_empty(x.shape[0], self.length, *x.shape[2:]) for x in new]
        for buffer, x in zip(self.buffers, new):
            buffer[:, start : self.used] = x
        return [buffer[:, : self.used] for buffer in self.buffers]


class Attention(nn.Module):
    """Grouped-query attention (eq. 1-4; MHA and MQA are its ends) with knocking heads: (B, T, C) -> (B, T, C).

    Knocks come after the projections and before QK-norm (section 4.5.2), RoPE and attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = D = config.head_dim
        self.wq = Linear(config.n_embd, config.n_head * D)
        self.wk = Linear(config.n_embd, config.n_kv_head * D)
        self.wv = Linear(config.n_embd, config.n_kv_head * D)
        self.wo = Linear(config.n_head * D, config.n_embd)
        self.knock_q, self.knock_k, self.knock_v = (
            KNOCKS[kind](D) for kind in (config.knock_q, config.knock_k, config.knock_v)
        )
        self.q_norm, self.k_norm = (RMSNorm(D, eps=config.norm_eps) for _ in range(2))

    def forward(self, x: torch.Tensor, rope: tuple, cache: Cache | None = None) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, T, H, D)
        q, k, v = self.knock_q(q), self.knock_k(k), self.knock_v(v)  # the method
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, S, H_kv, D), S >= T
        T, S = q.shape[1], k.shape[1]
        # New tokens after cached ones: token t sees all of the past and the new ones up to itself. One token sees all.
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        gqa = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S, enable_gqa=gqa)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, H, D) -> (B, T, C)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """x + attention, then x + feed-forward, each on the normalised x: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm, self.ffn_norm = (RMSNorm(config.n_embd, eps=config.norm_eps) for _ in range(2))
        self.attn = Attention(config)
        if config.n_expert:
            self.ffn = MoE(config.n_embd, config.d_ff, config.n_expert, config.top_k)
        else:
            self.ffn = SwiGLU(config.n_embd, config.d_ff)

    def forward(self, x: torch.Tensor, rope: tuple, cache: Cache | None = None) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), rope, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """The decoder. `compute_dtype` is the dtype of the activations; None takes that of the weights."""

    def __init__(self, config: Config, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # also the output projection
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.init_weights()

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, cache: list[Cache] | None = None
    ) -> torch.Tensor:
        """Logits (B, T, vocab_size) of the token after each of tokens (B, T); or with targets (B, T) the mean
        cross-entropy in nats, a scalar.

        With a cache (`new_cache`), tokens continue what it holds. Raises ValueError past block_size.
        """
        start = cache[0].used if cache else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than the model's context of {self.config.block_size} (block_size)")
        rope = rope_tables(torch.arange(start, end, device=tokens.device), self.config.head_dim, self.config.rope_base)
        x = self.embed(tokens).to(dtype=self.compute_dtype)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, cache[i] if cache else None)
        logits = F.linear(self.norm(x), self.embed.weight.to(x.dtype))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(upcast(logits).flatten(0, 1), targets.flatten())

    def new_cache(self, length: int) -> list[Cache]:
        """An empty key/value cache for `length` positions, one Cache a layer."""
        return [Cache(length) for _ in self.blocks]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every weight's start, in place. Knocks draw no random numbers, so the same seed gives the same base
        weights whichever knocks there are, and with knocks at the identity the very same function (section 3.3)."""
        std = 0.02
        out_std = std / math.sqrt(2 * self.config.n_layer)  # GPT-2: keeps the residual stream's size over depth
        for name, p in self.named_parameters():
            match name.split("."):
                case [*_, "knock_q" | "knock_k" | "knock_v", "gate"]:
                    p.zero_()  # 2 sigmoid(0) = 1
                case [*_, "knock_q" | "knock_k" | "knock_v", _]:
                    nn.init.eye_(p)
                case [*_, "norm" | "attn_norm" | "ffn_norm" | "q_norm" | "k_norm", "weight"]:
                    p.fill_(1)
                case [*_, "wo", "weight"] | [*_, "w_down" | "experts_down"]:
                    p.normal_(std=out_std)
                case _:  # embedding, wq, wk, wv, w_up, experts_up, router
                    p.normal_(std=std)
        for module in self.modules():
            if isinstance(module, MoE):
                module.bias.zero_()
                module.load.zero_()

    def moes(self) -> list[MoE]:
        """The mixtures of experts, first layer first; none in a dense model."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    @torch.no_grad()
    def knock_movement(self) -> dict[str, tuple[float, float]]:
        """How far each knock matrix has come: name -> (mean of the diagonal, Frobenius norm of the rest).

        At the start (1, 0), for gates (0, 0). Figure 3 of the paper shows these matrices after training.
        """
        matrices = {name: p for name, p in self.named_parameters() if ".knock_" in name}
        return {
            name: (p.diagonal().mean().item(), (p - p.diagonal().diag()).norm().item()) for name, p in matrices.items()
        }


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
    heads = {"knock_q": c.n_head, "knock_k": c.n_kv_head, "knock_v": c.n_kv_head}
    knocks = sum(
        p.numel() * (heads[kind] - 1) for name, p in model.named_parameters() for kind in heads if f".{kind}." in name
    )
    return 6 * (count_params(model)[1] + knocks) + 12 * c.n_layer * c.n_head * c.head_dim * length


def paper_flops(length: int, d: int, n_head: int) -> tuple[int, int, int]:
    """Forward FLOPs of one layer on a sequence, as the paper counts them: (MHA, FFN with d_ff = 3d, what KHA adds).

    Eq. 10-12: 8 L d^2 + 4 L^2 d; 18 L d^2; 6 L d^2 / n for KHA-Linear on q, k, v as for KHA-MLP on v.
    """
    return 8 * length * d**2 + 4 * length**2 * d, 18 * length * d**2, 6 * length * d**2 // n_head


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file of tensors and plain data, never code


def save_checkpoint(path: str, checkpoint: dict) -> None:
    """Write a checkpoint so that at every moment `path` holds a whole one: the old one until the new one is on disk."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str, device: str = "cpu") -> tuple[Transformer, dict]:
    """A trained model in evaluation mode, and all that its checkpoint holds.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or not one of ours.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {path}: train one with train.py, or name another")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        with torch.device("meta"):
            model = Transformer(Config(**checkpoint["config"]))
        model.to_empty(device=device).load_state_dict(checkpoint["model"])
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error
    return model.eval(), checkpoint
