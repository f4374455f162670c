"""Compression ops: `compress_mean` and `compressed_attention`, each with its gradient as an op of its own."""

from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.custom_ops import flash
from nsa_compile.custom_ops.dispatch import choose_attention, runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.registration import (
    attach_gradient,
    compressed_pairs,
    empty_attention,
    empty_contiguous,
    register_attention_flops,
)
from nsa_compile.custom_ops.transforms import attach_autograd
from nsa_compile.ops import compression as reference
from nsa_compile.ops.attend import default_scale
from nsa_compile.ops.checks import check_blocks, check_heads, check_layout, check_placement
from nsa_compile.ops.layout import num_cmp


def compress_mean(k: Tensor, *, l: int, d: int, cu_seqlens: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Mean of every compression block: `k_cmp[i] = mean(k[i*d : i*d+l])` (Eq. 7 with the mean as φ).

    Args:
        k: [b, s, g, channels] keys or values, float.
        l, d: length and stride of a block in tokens; d divides l.
        cu_seqlens: int32 or int64 [N + 1] on the device of k, for b = 1 packed sequences.
        impl: "auto", "reference" or "triton".

    Returns: [b, c, g, channels] in the type of k, summed in at least fp32. c = num_cmp(s, l, d); packed: c = s // d
        slots, sequence after sequence, the unused ones 0.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    check_layout({"k": (k, "b s g channels")})
    check_blocks(l=l, d=d)
    _, cu_seqlens = check_placement(k, q_start=None, cu_seqlens=cu_seqlens, end=None, key="k")
    runs_triton("compress_mean", impl, k)
    return torch.ops.nsa_compile.compress_mean(k, l, d, cu_seqlens, impl)


@torch.library.custom_op("nsa_compile::compress_mean", mutates_args=())
@in_range("cmp")
def _compress_mean(k: Tensor, l: int, d: int, cu_seqlens: Optional[Tensor], impl: str) -> Tensor:
    if runs_triton("compress_mean", impl, k):
        from nsa_compile.custom_ops.kernels import compression

        with torch.cuda.device_of(k):
            return compression.compress_mean(k, l, d, cu_seqlens)
    return reference.compress_mean(k, l=l, d=d, cu_seqlens=cu_seqlens).contiguous()


@_compress_mean.register_fake
def _(k, l, d, cu_seqlens, impl):
    b, s, g, x = k.shape
    return k.new_empty(b, num_cmp(s, l, d) if cu_seqlens is None else s // d, g, x)


@torch.library.custom_op("nsa_compile::compress_mean_backward", mutates_args=())
@in_range("cmp backward")
def _compress_mean_backward(grad: Tensor, s: int, l: int, d: int, cu_seqlens: Optional[Tensor], impl: str) -> Tensor:
    if runs_triton("compress_mean", impl, grad):
        from nsa_compile.custom_ops.kernels import compression

        with torch.cuda.device_of(grad):
            return compression.compress_mean_backward(grad, s, l, d, cu_seqlens)
    return reference.compress_mean_backward(grad, s, l=l, d=d, cu_seqlens=cu_seqlens).contiguous()


@_compress_mean_backward.register_fake
def _(grad, s, l, d, cu_seqlens, impl):
    return grad.new_empty(grad.shape[0], s, *grad.shape[2:])


def _compress_mean_context(ctx, inputs, output):
    k, ctx.l, ctx.d, cu_seqlens, ctx.impl = inputs
    ctx.s = k.shape[1]
    ctx.save_for_backward(cu_seqlens)


def _compress_mean_gradient(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    grad_k = torch.ops.nsa_compile.compress_mean_backward(grad, ctx.s, ctx.l, ctx.d, cu_seqlens, ctx.impl)
    return grad_k, None, None, None, None


def _compress_mean_backward_context(ctx, inputs, output):
    _, _, ctx.l, ctx.d, cu_seqlens, ctx.impl = inputs
    ctx.save_for_backward(cu_seqlens)


def _compress_mean_backward_gradient(ctx, grad):  # a linear op's gradient has the op as its own
    (cu_seqlens,) = ctx.saved_tensors
    return torch.ops.nsa_compile.compress_mean(grad, ctx.l, ctx.d, cu_seqlens, ctx.impl), *(None,) * 5


attach_autograd(_compress_mean, _compress_mean_gradient, _compress_mean_context)
attach_autograd(_compress_mean_backward, _compress_mean_backward_gradient, _compress_mean_backward_context)


@register_flop_formula(torch.ops.nsa_compile.compress_mean)
def _(k, l, d, cu_seqlens, impl, *args, out_shape=None, **kwargs) -> int:
    b, s, g, x = k
    return b * num_cmp(s, l, d) * l * g * x


@register_flop_formula(torch.ops.nsa_compile.compress_mean_backward)
def _(grad, s, l, d, cu_seqlens, impl, *args, out_shape=None, **kwargs) -> int:
    b, _, g, x = grad
    return b * num_cmp(s, l, d) * l * g * x


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, l: int, d: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the compressed tokens of its past (Eq. 7).

    The query at position t sees the first `num_cmp(t + 1, l, d)` blocks.

    Args:
        q: [b, t, n_heads, d_k] float; query head n belongs to group n // (n_heads // g).
        k_cmp, v_cmp: [b, c, g, d_k], [b, c, g, d_v], as `compress_mean` gives them.
        l, d: length and stride of a compression block in tokens; d divides l.
        q_start: int32 or int64 [b] on the device, position of each row's first query (packed: its index in the row);
            c may then be that of a longer buffer.
        cu_seqlens: int32 or int64 [N + 1] on the device, for b = 1 packed sequences; c = t // d without q_start.
        scale: factor on q·k, default d_k ** -0.5.
        impl: "auto", "reference", "triton" or "flash".

    Returns: o [b, t, n_heads, d_v] in the type of q, and the natural-log LSE [b, t, n_heads] in fp32 (fp64 for fp64
        inputs), both differentiable. A query that sees no block has o = 0 and LSE = -inf.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout({"q": (q, "b t n d_k"), "k_cmp": (k_cmp, "b c g d_k"), "v_cmp": (v_cmp, "b c g d_v")})
    check_heads(sizes["n"], sizes["g"])
    check_blocks(l=l, d=d)
    q_start, cu_seqlens = check_compressed_placement(q, k_cmp, l=l, d=d, q_start=q_start, cu_seqlens=cu_seqlens)
    runs_triton("compressed_attention", impl, q, v_cmp)
    scale = default_scale(q, scale)
    return torch.ops.nsa_compile.compressed_attention(q, k_cmp, v_cmp, l, d, q_start, cu_seqlens, scale, impl)


def check_compressed_placement(
    q: Tensor, k_cmp: Tensor, *, l: int, d: int, q_start: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check where the queries stand against the number of compressed tokens; `q_start` and `cu_seqlens` as int32."""
    t, c = q.shape[1], k_cmp.shape[1]
    where = check_placement(q, q_start=q_start, cu_seqlens=cu_seqlens, end=c * d + l - 1, key="k_cmp")
    expected = num_cmp(t, l, d) if cu_seqlens is None else t // d
    if q_start is None and c != expected:
        raise ValueError(
            f"k_cmp: expected c = {expected} compressed tokens for t = {t}, got shape {tuple(k_cmp.shape)}"
        )
    return where


@torch.library.custom_op("nsa_compile::compressed_attention", mutates_args=())
@in_range("cmp")
def _compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, l: int, d: int, q_start: Optional[Tensor],
    cu_seqlens: Optional[Tensor], scale: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    choice = choose_attention("compressed_attention", impl, q, v_cmp, q_start=q_start, cu_seqlens=cu_seqlens, fold=d)
    if choice.impl == "flash":
        return flash.compressed_attention(
            q, k_cmp, v_cmp, l=l, d=d, cu_seqlens=cu_seqlens, scale=scale, version=choice.flash_version
        )
    if choice.impl == "triton":
        from nsa_compile.custom_ops.kernels import interval, places

        with torch.cuda.device_of(q):
            keys = places.compressed_intervals(q, k_cmp.shape[1], l, d, q_start, cu_seqlens)
            return interval.interval_attention(q, k_cmp, v_cmp, keys, scale)
    return reference.compressed_attention(
        q, k_cmp, v_cmp, l=l, d=d, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale
    )


@_compressed_attention.register_fake
def _(q, k_cmp, v_cmp, l, d, q_start, cu_seqlens, scale, impl):
    return empty_attention(q, v_cmp)


@torch.library.custom_op("nsa_compile::compressed_attention_backward", mutates_args=())
@in_range("cmp backward")
def _compressed_attention_backward(
    grad_o: Tensor, grad_lse: Optional[Tensor], o: Tensor, lse: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor,
    l: int, d: int, q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    choice = choose_attention(
        "compressed_attention", impl, q, v_cmp, q_start=q_start, cu_seqlens=cu_seqlens, backward=True,
        grad_lse=grad_lse, fold=d,
    )  # fmt: skip
    if choice.impl == "flash":
        return flash.compressed_attention_backward(
            grad_o, grad_lse, o, lse, q, k_cmp, v_cmp, l=l, d=d, cu_seqlens=cu_seqlens, scale=scale,
            version=choice.flash_version,
        )  # fmt: skip
    if choice.impl == "triton":
        from nsa_compile.custom_ops.kernels import interval, places

        with torch.cuda.device_of(q):
            keys = places.compressed_intervals(q, k_cmp.shape[1], l, d, q_start, cu_seqlens)
            return interval.interval_attention_backward(grad_o, grad_lse, o, lse, q, k_cmp, v_cmp, keys, scale)
    return reference.compressed_attention_backward(
        grad_o, grad_lse, q, k_cmp, v_cmp, o, lse, l=l, d=d, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale
    )


@_compressed_attention_backward.register_fake
def _(grad_o, grad_lse, o, lse, q, k_cmp, v_cmp, l, d, q_start, cu_seqlens, scale, impl):
    return empty_contiguous(q, k_cmp, v_cmp)


attach_gradient(_compressed_attention, _compressed_attention_backward)
register_attention_flops(
    torch.ops.nsa_compile.compressed_attention,
    torch.ops.nsa_compile.compressed_attention_backward,
    lambda q, k, v, l, d, q_start, *_: compressed_pairs(q[1], k[1], l, d, q_start is not None),
)
