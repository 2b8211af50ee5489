"""The feed-forward part of a block: a dense SwiGLU, or a mixture of SwiGLU experts.

The mixture is the paper's: sigmoid scores, the top k of score + bias. It has no shared expert: a
guess, which fits the sizes that the paper prints. No token is dropped. Loss-free balancing moves
the bias (Wang et al. 2024, arXiv 2408.15664; the paper uses a rule that it cites as Su 2025), so no
auxiliary loss pulls on the model. Read `MoE.forward` from top to bottom: route, sort, two grouped
matmuls, un-sort. The letters of shapes are those of kha.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BALANCE_RULES = ("rms", "sign")


def upcast(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is wider. Some places need more than bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up for x = [gate, up] side by side: (..., 2F) -> (..., F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """Dense feed-forward: (..., n_embd) -> (..., n_embd) through a gated layer of width d_ff."""

    def __init__(self, n_embd: int, d_ff: int):
        super().__init__()
        self.w_up = nn.Parameter(0.02 * torch.randn(2 * d_ff, n_embd))  # gate rows, then up rows
        self.w_down = nn.Parameter(0.02 * torch.randn(n_embd, d_ff))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x, self.w_up.to(x.dtype))), self.w_down.to(x.dtype))


def largest(x: Tensor, k: int) -> Tensor:
    """The columns of the k largest numbers of each row, largest first: (N, E) -> (N, k).

    Compiled, this becomes one kernel with the operations around it. topk is a kernel of its own and
    slower; a sort takes longer to compile.
    """
    columns = torch.arange(x.shape[-1], device=x.device)
    indices = []
    for _ in range(k):
        indices.append(x.argmax(-1, keepdim=True))  # (N, 1)
        x = x.masked_fill(columns == indices[-1], -math.inf)
    return torch.cat(indices, dim=-1)


class Permute(torch.autograd.Function):
    """Rows in another order, x[order]. The gradient of a permutation is a gather by its inverse.
    Autograd cannot know that: it would scatter with atomic adds, slower and not deterministic."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class MoE(nn.Module):
    """Mixture of n_expert SwiGLU experts of width d_ff, top_k of them per token: (..., C) -> same.

    Buffers: `bias` (E,) is added to the scores when experts are chosen, and nowhere else. `load`
    (E,) counts the tokens of each expert in training mode since the last `balance`. With recompute
    it counts each token twice. That changes nothing, because `balance` looks at shares only.
    Give x in the dtype you want. torch.autocast would round the router to bfloat16, too.
    """

    def __init__(self, n_embd: int, d_ff: int, n_expert: int, top_k: int):
        super().__init__()
        self.n_expert, self.top_k = n_expert, top_k
        self.router = nn.Parameter(0.02 * torch.randn(n_expert, n_embd))
        # As grouped_mm takes them: x @ weight, where SwiGLU has x @ weight.T.
        self.experts_up = nn.Parameter(0.02 * torch.randn(n_expert, n_embd, 2 * d_ff))  # gate, up
        self.experts_down = nn.Parameter(0.02 * torch.randn(n_expert, d_ff, n_embd))
        # float32 whatever the default is: a step of the bias is too fine for bfloat16
        self.register_buffer("bias", torch.zeros(n_expert, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(n_expert, dtype=torch.float32))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights: x (N, C) -> (N, K) indices, (N, K) weights.

        The bias decides which experts are chosen, never how much they count: the weights are the
        plain sigmoid scores, normalised over the chosen experts.
        """
        scores = F.linear(upcast(x), upcast(self.router)).sigmoid()  # (N, E)
        chosen = largest(scores.detach() + self.bias, self.top_k)  # (N, K)
        weights = scores.gather(-1, chosen)  # (N, K)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # (N, C)
        chosen, weights = self.route(x)
        if not self.training and chosen.numel() < self.n_expert:
            # A shortcut when few tokens are sampled: read the matrices of the chosen experts only.
            h = x[:, None, None] @ self.experts_up[chosen].to(x.dtype)  # (N, K, 1, 2F)
            h = (swiglu(h) * weights[..., None, None]).to(x.dtype)  # (N, K, 1, F)
            return (h @ self.experts_down[chosen].to(x.dtype)).sum(1).view(shape)

        # Slot n*K + j is choice j of token n. Sorted by expert, the slots of an expert are
        # neighbours: one grouped matmul runs all experts, with any number of tokens each.
        dtype = torch.int16 if self.n_expert <= 2**15 else torch.int32  # 16 bits sort faster
        sorted_expert, order = chosen.flatten().to(dtype).sort(stable=True)  # (N*K,)
        slots = torch.arange(len(order), device=x.device)
        inverse = torch.empty_like(order).scatter_(0, order, slots)  # argsort, without a sort
        experts = torch.arange(self.n_expert, dtype=sorted_expert.dtype, device=x.device)
        ends = torch.searchsorted(sorted_expert, experts, right=True)  # (E,): where each one ends
        if self.training:
            self.load.add_(ends.diff(prepend=ends.new_zeros(1)))  # (E,): how many each one has

        h = x.repeat_interleave(self.top_k, dim=0)  # (N*K, C), a row for each slot
        h = Permute.apply(h, order, inverse)  # (N*K, C), expert by expert
        ends = ends.to(torch.int32)  # grouped_mm takes no other
        h = swiglu(F.grouped_mm(h, self.experts_up.to(x.dtype), offs=ends))  # (N*K, F)
        # The weights come in here and not at the end: F is smaller than C.
        h = (h * Permute.apply(weights.flatten(), order, inverse)[:, None]).to(x.dtype)
        h = F.grouped_mm(h, self.experts_down.to(x.dtype), offs=ends)  # (N*K, C)
        h = Permute.apply(h, inverse, order).view(-1, self.top_k, shape[-1])  # (N, K, C)
        return h.sum(1).view(shape)

    @torch.no_grad()
    def balance(self, rate: float | Tensor, rule: str) -> None:
        """Move the bias against the load since the last call, and start to count again.

        f is the share of the load that each expert had, and q = 1/n_expert. Rule "rms" (Su 2025) is
        b <- b - rate * (f - q) / RMS(f - q), rule "sign" (Wang et al. 2024) is
        b <- b - rate * sign(f - q). Raises ValueError for another rule.
        """
        if rule not in BALANCE_RULES:
            raise ValueError(f"balance must be one of {', '.join(BALANCE_RULES)}, not {rule!r}")
        error = self.load - self.load.mean()  # in proportion to f - q: both rules cancel the scale
        if rule == "sign":
            step = error.sign()
        else:  # an even load has RMS 0 and moves nothing
            step = error / error.square().mean().sqrt().clamp_min(torch.finfo(error.dtype).tiny)
        self.bias -= rate * step
        self.load.zero_()
