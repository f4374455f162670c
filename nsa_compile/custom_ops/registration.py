"""What the three attention ops share in torch.library: fakes, the gradient, FLOP counts."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.custom_ops.transforms import attach_autograd, attach_double_backward
from nsa_compile.ops.attend import compute_dtype


def empty_attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten o [b, t, n, d_v] and LSE [b, t, n] of an attention."""
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=compute_dtype(q))


def empty_contiguous(*like: Tensor) -> tuple[Tensor, ...]:
    """Unwritten contiguous tensors of the shapes and types given."""
    return tuple(x.new_empty(x.shape) for x in like)


def attach_gradient(op: Any, backward: Any) -> None:
    """Make `op(q, k, v, ...) -> (o, lse)` differentiable by `backward(grad_o, grad_lse, o, lse, q, k, v, ...)`, an op.

    An unused LSE reaches the backward op as `grad_lse = None`, not as zeros.
    """

    def save(ctx, inputs, output):
        ctx.save_for_backward(*output, *(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.options = tuple(None if isinstance(x, Tensor) else x for x in inputs)
        ctx.set_materialize_grads(False)

    def gradient(ctx, grad_o, grad_lse):
        o, lse, *tensors = ctx.saved_tensors
        inputs = (option if x is None else x for x, option in zip(tensors, ctx.options, strict=True))
        grads = backward(torch.zeros_like(o) if grad_o is None else grad_o, grad_lse, o, lse, *inputs)
        return *grads, *(None,) * (len(tensors) - 3)

    attach_autograd(op, gradient, save)
    attach_double_backward(backward, op, lambda args: ((0, 1), tuple(range(4, len(args))), args[4:]))


def causal_pairs(t: int, most: int, static: bool) -> int:
    """(query, key) pairs of one row and head that see their last `most` tokens: `sum_t min(t + 1, most)`."""
    most = min(most, t) if not static else most
    return t * most if static else most * (most + 1) // 2 + (t - most) * most


def compressed_pairs(t: int, c: int, l: int, d: int, static: bool) -> int:
    """(query, compressed token) pairs of one row and head, `sum_t num_cmp(t + 1)`; all of them for a static buffer."""
    full, rest = divmod(max(0, t - l + 1), d)
    return t * c if static else d * full * (full + 1) // 2 + rest * (full + 1)


def register_attention_flops(op: Any, backward_op: Any, pairs: Any) -> None:
    """FLOP formulas of an attention op and its gradient from `pairs(q, k, v, ...)`, which is given shapes for tensors.

    The forward multiplies q·k and p·v per pair and head; the backward computes q·k again, dP, dV, dQ and dK.
    """

    @register_flop_formula(op)
    def forward(q, k, v, *args, out_shape=None, **kwargs) -> int:
        return 2 * q[0] * q[2] * pairs(q, k, v, *args) * (q[-1] + v[-1])

    @register_flop_formula(backward_op)
    def backward(grad_o, grad_lse, o, lse, q, k, v, *args, out_shape=None, **kwargs) -> int:
        return 2 * q[0] * q[2] * pairs(q, k, v, *args) * (3 * q[-1] + 2 * v[-1])
