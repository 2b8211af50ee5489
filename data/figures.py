"""Figures of a model: parameters, FLOPs, memory, and how its knocks have changed."""

from contextlib import contextmanager

import torch
from torch import nn

from data.loss import LOGITS_AT_ONCE
from data.processes import whole
from kha import Config, Heads, Knock, Transformer

# Peak dense bfloat16 FLOP/s by the vendor's datasheet, the denominator of MFU.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200 NVL": 835e12, "H200": 989e12, "NVIDIA A100": 312e12}


def of_gpu(table: dict[str, float], gpu: str) -> float | None:
    """The number in `table` for a GPU: the first with a key that is in its name; else None."""
    return next((number for key, number in table.items() if key in gpu), None)


def knocks_of(model: nn.Module) -> dict[str, Knock]:
    """Every knock of a model that does something, by its name, such as blocks.0.attn.wv.knock."""
    parts = model.named_modules()
    return {name: p for name, p in parts if isinstance(p, Knock) and p.kind != "none"}


@torch.no_grad()
def knock_movement(model: Transformer) -> dict[str, tuple[float, float]]:
    """Two numbers for each knock matrix: name -> (mean of the diagonal, Frobenius norm of the
    rest). They start at (1, 0), those of a gate at (0, 0). In train.py knocks do not decay, so all
    changes are learned. Figure 3 of the paper shows these matrices after training. Under FSDP all
    processes must call it."""
    movement = {}
    for place, knock in knocks_of(model).items():
        for name, p in knock.named_parameters():
            rest = whole(p).clone()
            diagonal = rest.diagonal().mean().item()
            movement[f"{place}.{name}"] = (diagonal, rest.fill_diagonal_(0).norm().item())
    return movement


def count_params(model: Transformer) -> tuple[int, int]:
    """Parameters in total and active for one token (top_k of n_expert experts): the columns of
    Tables 3 and 5."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts_" in name)
    c = model.config
    idle = experts // c.n_expert * (c.n_expert - c.top_k) if experts else 0
    return total, total - idle


def flops_per_token(model: Transformer, length: int) -> int:
    """Training FLOPs of one token in a sequence of `length` tokens, forward and backward.

    PaLM's count (arXiv 2204.02311, appendix B), as in nanoGPT: 6 for each weight that a token
    meets, and 12 n_layer n_head head_dim length for the attention matrix, causal or not. A
    knock's weights count once in each head, as in eq. 10-12; so do linear ones, though training
    multiplies them into W^Q, W^K and W^V. An embedding that is not the output's weight is only
    read, which costs nothing.
    """
    c, again = model.config, 0  # again: knocks' weights, for every head after the first
    for part in model.modules():
        if isinstance(part, Heads):
            n_head = len(part.weight) // part.knock.head_dim
            again += (n_head - 1) * sum(p.numel() for p in part.knock.parameters())
    qk_dim = c.head_dim + (c.rope_dim if c.attention == "mla" else 0)
    attention = 6 * c.n_layer * c.n_head * (qk_dim + c.head_dim) * length
    only_read = 0 if c.tie_embeddings else c.vocab_size * c.n_embd
    return 6 * (count_params(model)[1] - only_read + again) + attention


def memory_per_gpu(config: Config, micro_batch: int, n_shard: int = 1, recompute: bool = False,
                   accumulates: bool = True) -> dict[str, float]:
    """An estimate of the GPU memory, in bytes, that training needs at its peak, by what needs it;
    "total" is the sum. Tested to be within 15% of twelve measurements.

    float32 weights, gradients and both moments of Adam are spread over n_shard GPUs (FSDP; 1
    without it). The rest is for micro_batch sequences of block_size tokens in bfloat16: the casts
    of the weights, which the backward pass keeps (FSDP has embedding, output and two blocks whole
    at a time), each layer's activations (with recompute all layers' inputs and one layer's
    activations), and a chunk of logits with its gradient and that of the output's weight. If an
    update is one micro-batch (accumulates=False), each gradient takes the place of activations.
    """
    c = config
    with torch.device("meta"):
        model = Transformer(c)
    n, n_block = count_params(model)[0], sum(p.numel() for p in model.blocks[0].parameters())
    tokens = micro_batch * c.block_size
    # Numbers that a token leaves in a layer. Queries and keys count twice, because norm and RoPE
    # lie between projection and attention.
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    if c.attention == "mla":
        layer = 3 * c.n_embd + c.q_rank + 2 * c.kv_rank + int(6.5 * q)
    else:
        layer = 3 * c.n_embd + 3 * q + 3 * kv
    # How often a knock keeps its heads for the backward pass. For mlp this is the kernel's number.
    kept = {"none": 0, "linear": 0, "mlp": 1, "gate": 3}
    layer += kept[c.knock_q] * q + kept[c.knock_k] * kv + kept[c.knock_v] * kv
    layer += c.top_k * (c.n_embd + 3 * c.d_ff) if c.n_expert else 2 * c.d_ff
    parts = {
        "weights": 4 * n / n_shard,
        "adam": 8 * n / n_shard,
        "gradients": 4 * n / n_shard,
        "casts": 2 * (n if n_shard == 1 else n - (c.n_layer - 2) * n_block),
        "activations": 2 * tokens * (c.n_layer * c.n_embd + layer if recompute else
                                     c.n_layer * layer),
        "logits": 2 * 2 * min(tokens * c.vocab_size, LOGITS_AT_ONCE)
                  + 2 * 4 * c.vocab_size * c.n_embd,
    }
    if not accumulates:
        rest = parts["activations"] + parts["logits"]
        parts["gradients"] = max(0, parts["gradients"] - rest)
    return {**parts, "total": sum(parts.values())}


def memory_advice(config: Config, train, n_process: int) -> str:
    """What would need less memory than this run, each with the estimate for it, in one line."""
    micro_batch, recompute = train.micro_batch, train.recompute

    def gib(micro_batch, recompute, n_gpu=n_process, shards=train.parallel == "fsdp") -> float:
        accumulates = train.batch_tokens > micro_batch * config.block_size * n_gpu
        n_shard = n_gpu if shards else 1
        need = memory_per_gpu(config, micro_batch, n_shard, recompute, accumulates)
        return need["total"] / 2**30

    more, less = max(8, 2 * n_process), max(1, micro_batch // 2)
    now = gib(micro_batch, recompute)
    ways = {
        f"--micro_batch {less}": gib(less, recompute),
        "--recompute": gib(micro_batch, True),
        f"--parallel fsdp on {more} GPUs": gib(micro_batch, recompute, more, True),
        "all of these": gib(less, True, more, True),
    }
    helps = [f"{way}: {need:.0f}" for way, need in ways.items() if need < now]
    return f"it needs about {now:.0f} GiB a GPU; with {', '.join(helps)}"


@contextmanager
def advice_on_memory(config: Config, train, n_process: int):
    """Turn a GPU's out-of-memory error into a ValueError that says what would help. `train` is a
    train.TrainConfig."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = memory_advice(config, train, n_process)
        raise ValueError(f"the GPU's memory is too small for this run: {advice}") from error
