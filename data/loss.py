"""The cross-entropy of `Transformer.forward` in chunks: the same numbers, with less memory. One
difference: forward leaves out targets of -100, as F.cross_entropy does. Here they are an error."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kha import upcast

LOGITS_AT_ONCE = 2**29  # 1 GiB in bfloat16


def chunk_loss(x: Tensor, weight: Tensor, targets: Tensor, dw):
    """Returns three: the summed cross-entropy of x (N, C) with W (V, C) and targets (N,); its
    gradient with respect to x; and dw, float32, plus that with respect to W. If dw is None, so are
    the last two."""
    logits = upcast(F.linear(x, weight))  # (N, V)
    log_sum = logits.logsumexp(-1, keepdim=True)  # (N, 1)
    loss = (log_sum - logits.gather(-1, targets[:, None])).sum()
    if dw is None:
        return loss, None, None
    is_target = torch.arange(len(weight), device=x.device) == targets[:, None]  # (N, V)
    d_logits = ((logits - log_sum).exp() - is_target.to(logits.dtype)).to(x.dtype)  # (N, V)
    return loss, d_logits @ weight, dw + d_logits.mT @ x


class ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy, some tokens at a time: logits (N, V) never exist whole. They are not
    made twice either, because each chunk's gradients are taken together with its loss. There is no
    second derivative."""

    @staticmethod
    def forward(ctx, x, weight, targets, one_chunk, with_gradients):
        """x (N, C), weight (V, C), targets (N,) -> a scalar. `one_chunk` is chunk_loss, or that
        compiled."""
        n_chunk = -(-len(x) * len(weight) // LOGITS_AT_ONCE)
        loss, dx, low = 0, [], weight.to(x.dtype)
        dw = upcast(torch.zeros_like(weight)) if with_gradients else None
        for x_chunk, targets_chunk in zip(x.chunk(n_chunk), targets.chunk(n_chunk), strict=True):
            part, dx_part, dw = one_chunk(x_chunk, low, targets_chunk, dw)
            loss = loss + part
            dx.append(dx_part)
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx), dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return dx * scale, dw * scale, None, None, None


def chunked_loss(compiles: bool) -> Callable[..., Tensor]:
    """A `loss` for kha.Transformer that computes the mean cross-entropy in chunks, a scalar."""
    one_chunk = torch.compile(chunk_loss) if compiles else chunk_loss

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        return ChunkedCrossEntropy.apply(x, weight, targets, one_chunk, torch.is_grad_enabled())

    return loss
