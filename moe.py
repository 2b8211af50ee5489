"""The feed-forward part of a block: a dense SwiGLU, or a mixture of SwiGLU experts.

The mixture is the one the paper trains: sigmoid scores, the top k of score + bias, no shared expert, no dropped
token. Its bias is moved by loss-free balancing (Wang et al. 2024, arXiv 2408.15664; rule of Su 2025), so no
auxiliary loss pulls on the model. Read `MoE.forward` from top to bottom: route, sort, two grouped matmuls, un-sort.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

BALANCE_RULES = ("rms", "sign")


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or unchanged if it is wider: for the few places where bfloat16 is too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate, up] side by side: (..., 2f) -> (..., f)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """Dense feed-forward: (..., n_embd) -> (..., n_embd) through a gated layer of width d_ff."""

    def __init__(self, n_embd: int, d_ff: int):
        super().__init__()
        self.w_up = nn.Parameter(torch.empty(2 * d_ff, n_embd))  # gate rows, then up rows
        self.w_down = nn.Parameter(torch.empty(n_embd, d_ff))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(swiglu(F.linear(x, self.w_up.to(x.dtype))), self.w_down.to(x.dtype))


def largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest of each row are, largest first: (N, E) -> (N, k). Compiled, it is one kernel with what is around
    it; topk would be a kernel of its own, and slower, and a sort takes longer to compile."""
    columns, indices = torch.arange(x.shape[-1], device=x.device), []
    for _ in range(k):
        indices.append(x.argmax(-1, keepdim=True))  # (N, 1)
        x = x.masked_fill(columns == indices[-1], -math.inf)
    return torch.cat(indices, dim=-1)


class Permute(torch.autograd.Function):
    """Rows in another order, x[order]. The gradient of a permutation is a gather by its inverse; autograd cannot
    know that and would scatter with atomic adds, which is slower and not deterministic."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return Permute.apply(grad, inverse, order), None, None


class MoE(nn.Module):
    """Mixture of n_expert SwiGLU experts of width d_ff, top_k of them per token: (..., n_embd) -> (..., n_embd).

    Buffers: `bias` (n_expert,), added to the scores for the choice only; `load` (n_expert,), the tokens each expert
    was given in training mode since the last `balance` (twice, if the backward pass computes anew).
    """

    def __init__(self, n_embd: int, d_ff: int, n_expert: int, top_k: int):
        super().__init__()
        self.n_expert, self.top_k = n_expert, top_k
        self.router = nn.Parameter(torch.empty(n_expert, n_embd))
        self.experts_up = nn.Parameter(torch.empty(n_expert, n_embd, 2 * d_ff))
        self.experts_down = nn.Parameter(torch.empty(n_expert, d_ff, n_embd))
        self.register_buffer("bias", torch.zeros(n_expert, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(n_expert, dtype=torch.float32))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token and their weights: x (N, n_embd) -> (N, top_k) indices, (N, top_k) weights.

        The bias decides who is chosen, never how much the chosen count: weights are the plain sigmoid scores,
        normalised over the chosen.
        """
        scores = F.linear(upcast(x), upcast(self.router)).sigmoid()  # (N, E)
        chosen = largest(scores.detach() + self.bias, self.top_k)  # (N, K)
        weights = scores.gather(-1, chosen)  # (N, K)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # (N, C)
        chosen, weights = self.route(x)
        if not self.training and chosen.numel() < self.n_expert:  # few tokens: read the weights of their experts only
            h = x[:, None, None] @ self.experts_up[chosen].to(x.dtype)  # (N, K, 1, 2F)
            h = (swiglu(h) * weights[..., None, None]).to(x.dtype)
            return (h @ self.experts_down[chosen].to(x.dtype)).sum(1).view(shape)

        # Slot n*K + j is choice j of token n. Sorted by expert, each expert's slots are neighbours: one grouped
        # matmul runs them all, with no capacity and so no dropped token.
        expert, order = chosen.flatten().to(torch.int16).sort(stable=True)  # (N*K,); short keys sort faster
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        experts = torch.arange(self.n_expert, dtype=expert.dtype, device=x.device)
        ends = torch.searchsorted(expert, experts, right=True)  # (E,)
        if self.training:
            self.load.add_(ends.diff(prepend=ends.new_zeros(1)))

        slots = x[:, None].expand(-1, self.top_k, -1).reshape(-1, shape[-1])  # (N*K, C)
        h = Permute.apply(slots, order, inverse)
        ends = ends.to(torch.int32)
        h = swiglu(F.grouped_mm(h, self.experts_up.to(x.dtype), offs=ends))  # (N*K, F)
        # Weighed here, and not at the end, since here is less to weigh, and the backward pass need not know what comes.
        h = (h * Permute.apply(weights.flatten(), order, inverse)[:, None]).to(x.dtype)
        h = F.grouped_mm(h, self.experts_down.to(x.dtype), offs=ends)  # (N*K, C)
        h = Permute.apply(h, inverse, order).view(-1, self.top_k, shape[-1])  # (N, K, C)
        return h.sum(1).view(shape)

    @torch.no_grad()
    def balance(self, rate: float, rule: str) -> None:
        """Move the bias against the load since the last call, and start counting anew.

        With F the share of the load each expert had and Q = 1/n_expert: rule "rms" (Su 2025) is
        b <- b - rate * (F - Q) / RMS(F - Q), rule "sign" (Wang et al. 2024) is b <- b - rate * sign(F - Q).
        """
        error = self.load - self.load.mean()  # F - Q in tokens: both rules are free of the scale
        if rule == "sign":
            step = error.sign()
        else:  # an even load has RMS 0 and asks for no step
            step = error / error.square().mean().sqrt().clamp_min(torch.finfo(error.dtype).tiny)
        self.bias -= rate * step
        self.load.zero_()
