"""Cross-entropy of a linear head, a few tokens at a time: logits of all tokens never exist at once."""

import torch
from torch import Tensor

from nsa_compile.ops.attend import compute_dtype

LOGITS = 2**25
"""Most logits that exist at once, in at least fp32."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens of a chunk, by the size of the vocabulary."""
    return max(1, LOGITS // vocab_size)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, chunk: int, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_t (logsumexp(W x_t) - (W x_t)_target)` in nats over the tokens with a target >= 0, and its gradients.

    x [n, dim], weight [vocab, dim], target int64 [n] → a scalar in at least fp32; with `keep` also the gradients of x
    and weight, in their types. Works through `chunk` tokens at a time; sums the weight's gradient in at least fp32.
    What tokens without a target hold, be it NaN, is not read into a result.
    """
    dtype = compute_dtype(x)
    total = x.new_zeros((), dtype=dtype)
    grad_x = torch.empty_like(x) if keep else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if keep else None
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        counted = target[part] >= 0
        index = target[part].clamp_min(0).unsqueeze(-1)
        rows = x[part].masked_fill(~counted.unsqueeze(-1), 0.0)
        log_p = torch.log_softmax((rows @ weight.mT).to(dtype), dim=-1)
        own = log_p.gather(-1, index)
        total -= torch.where(counted, own.squeeze(-1), 0.0).sum()
        if grad_x is not None and grad_weight is not None:
            grad = log_p.exp_().scatter_(-1, index, own.exp() - 1)
            grad = grad.masked_fill_(~counted.unsqueeze(-1), 0.0).to(x.dtype)
            torch.mm(grad, weight, out=grad_x[part])
            grad_weight += grad.mT @ rows
    return total, grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


def traceable_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` and its gradients from all logits at once, by operations that have derivatives."""
    counted, index = (target >= 0).unsqueeze(-1), target.clamp_min(0).unsqueeze(-1)
    log_p = torch.log_softmax((x @ weight.mT).to(compute_dtype(x)), dim=-1)
    total = -torch.where(counted, log_p.gather(-1, index), 0.0).sum()
    own = torch.arange(weight.shape[0], device=x.device) == index
    grad = torch.where(counted, log_p.exp() - own.to(log_p.dtype), 0.0).to(x.dtype)
    return total, grad @ weight, grad.mT @ x
