"""The op of the cross-entropy of a linear head: its forward computes the gradients too, chunk by chunk."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.custom_ops.transforms import attach_autograd
from nsa_compile.ops import cross_entropy as reference
from nsa_compile.ops.attend import compute_dtype
from nsa_compile.ops.checks import check_int, check_layout, check_tensor, has_shape, values_are_visible


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, *, chunk: int | None = None) -> Tensor:
    """Cross-entropy of a linear head in nats, summed over the tokens with a target >= 0.

    `[n, vocab]` logits never exist: tokens go through head, softmax and both gradients in chunks, and what is kept for
    the backward pass is the gradients of x and weight.

    Args:
        x: [n, dim] float, what the head reads.
        weight: [vocab, dim] of the same type.
        target: int64 [n] on the device, the next token's id; below 0 for none.
        chunk: tokens at a time, default 2^25 // vocab.

    Returns: a scalar, fp32 (fp64 for fp64), differentiable in x and weight.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout({"x": (x, "n dim"), "weight": (weight, "vocab dim")})
    check_tensor("target", target)
    if target.dtype != torch.int64 or not has_shape(target, x.shape[0]):
        raise ValueError(f"target: expected int64 {tuple(x.shape[:1])}, got {target.dtype} {tuple(target.shape)}")
    if values_are_visible(target) and target.max() >= sizes["vocab"]:
        raise ValueError(f"target: expected values below {sizes['vocab']}, got {int(target.max())}")
    chunk = reference.chunk_tokens(sizes["vocab"]) if chunk is None else chunk
    check_int("chunk", chunk)
    keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total, _, _ = torch.ops.nsa_compile.linear_cross_entropy(x, weight, target, chunk, keep)
    return total


@torch.library.custom_op("nsa_compile::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, chunk: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of x, gradient of weight); without `keep` there are no gradients, and empty tensors instead."""
    total, grad_x, grad_weight = reference.linear_cross_entropy(
        x.contiguous(), weight.contiguous(), target, chunk=chunk, keep=keep
    )
    if grad_x is None or grad_weight is None:
        return total, x.new_empty(0), weight.new_empty(0)
    return total, grad_x, grad_weight


@_linear_cross_entropy.register_fake
def _(x, weight, target, chunk, keep):
    grads = (y.new_empty(y.shape if keep else 0) for y in (x, weight))
    return x.new_empty((), dtype=compute_dtype(x)), *grads


def _keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:], *inputs[:3])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *second):
    grad_x, grad_weight, x, weight, target = ctx.saved_tensors
    if any(y is not None for y in second):  # double backward: the gradients are outputs, too
        call = partial(reference.traceable_cross_entropy, target=target)
        outputs, pull = torch.func.vjp(call, x, weight)[:2]
        given = (torch.zeros_like(o) if y is None else y for o, y in zip(outputs, (grad, *second), strict=True))
        return *pull(tuple(given)), None, None, None
    if grad is None:
        return (None,) * 5
    return *((y * grad).to(y.dtype) for y in (grad_x, grad_weight)), None, None, None


attach_autograd(
    _linear_cross_entropy, _gradient, _keep_gradients, fold=False,
    forward_mode=lambda x, weight, target, chunk, keep: reference.traceable_cross_entropy(x, weight, target),
)  # fmt: skip


@register_flop_formula(torch.ops.nsa_compile.linear_cross_entropy)
def _(x, weight, target, chunk, keep, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * x[1] * weight[0] * (3 if keep else 1)
