"""The op of selected attention mixed with the other branches (Eq. 5), and its gradient."""

from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.custom_ops.dispatch import runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.registration import empty_attention, empty_contiguous
from nsa_compile.custom_ops.selection import selected_pairs
from nsa_compile.custom_ops.transforms import attach_autograd, attach_double_backward
from nsa_compile.ops import gating, selection
from nsa_compile.ops.attend import default_scale
from nsa_compile.ops.checks import (
    check_block_indices,
    check_heads,
    check_int,
    check_key_placement,
    check_layout,
)


def selected_mixture(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor, o_win: Tensor, gates: Tensor, *, l_sel: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Selected attention and the mixture of the branches: `o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win` (Eq. 5).

    What `gated_sum` gives for the output o_slc of `selected_attention`, which on Hopper GPUs needs no memory of its own
    unless a gradient is wanted.

    Args:
        q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale: as `selected_attention` takes them.
        o_cmp, o_win: [b, t, n_heads, d_v] float, outputs of the other branches.
        gates: [b, t, n_heads, 3] in the order cmp, slc, win.
        impl: "auto", "reference" or "triton".

    Returns: o [b, t, n_heads, d_v] in the type of q, differentiable in every float argument.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout(
        {
            "q": (q, "b t n d_k"), "k": (k, "b s g d_k"), "v": (v, "b s g d_v"), "o_cmp": (o_cmp, "b t n d_v"),
            "o_win": (o_win, "b t n d_v"), "gates": (gates, "b t n branches"),
        },
        {"branches": 3},
    )  # fmt: skip
    check_heads(sizes["n"], sizes["g"])
    check_int("l_sel", l_sel)
    q_start, cu_seqlens = check_key_placement(q, k, q_start=q_start, cu_seqlens=cu_seqlens)
    block_indices = check_block_indices(block_indices, q, k, l_sel=l_sel, q_start=q_start)
    runs_triton("selected_mixture", impl, q, v)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, o_cmp, o_win, gates))
    o, _, _ = torch.ops.nsa_compile.selected_mixture(
        q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, cu_seqlens, default_scale(q, scale), keep, impl
    )
    return o


_gated_sum = in_range("gates")(gating.gated_sum)
_gated_sum_backward = in_range("gates backward")(gating.gated_sum_backward)


@torch.library.custom_op("nsa_compile::selected_mixture", mutates_args=())
@in_range("slc")
def _selected_mixture(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor, o_win: Tensor, gates: Tensor, l_sel: int,
    q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float, keep: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, o_slc, lse); o_slc is empty unless `keep`, without which there is no gradient."""
    o_slc: Tensor | None
    if runs_triton("selected_mixture", impl, q, v):
        from nsa_compile.custom_ops.kernels import mixture

        with torch.cuda.device_of(q):
            o, o_slc, lse = mixture.selected_mixture(
                q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, cu_seqlens, scale, keep
            )
    else:
        o_slc, lse = selection.selected_attention(
            q, k, v, block_indices, l_sel=l_sel, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale
        )
        o = _gated_sum(o_cmp, o_slc, o_win, gates).contiguous()
    return o, o_slc if keep and o_slc is not None else q.new_empty(0), lse


@_selected_mixture.register_fake
def _(q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, cu_seqlens, scale, keep, impl):
    o_slc, lse = empty_attention(q, v)
    return torch.empty_like(o_slc), o_slc if keep else q.new_empty(0), lse


@torch.library.custom_op("nsa_compile::selected_mixture_backward", mutates_args=())
@in_range("slc backward")
def _selected_mixture_backward(
    grad: Tensor, o_slc: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor,
    o_win: Tensor, gates: Tensor, l_sel: int, q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, o_cmp, o_win and gates."""
    if runs_triton("selected_mixture", impl, q, v):
        from nsa_compile.custom_ops.kernels import mixture

        with torch.cuda.device_of(q):
            return mixture.selected_mixture_backward(
                grad, o_slc, lse, q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, cu_seqlens, scale
            )
    d_cmp, d_slc, d_win, d_gates = _gated_sum_backward(grad, o_cmp, o_slc, o_win, gates)
    d_q, d_k, d_v = selection.selected_attention_backward(
        d_slc, None, q, k, v, block_indices, o_slc, lse,
        l_sel=l_sel, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale,
    )  # fmt: skip
    return d_q, d_k, d_v, d_cmp.contiguous(), d_win.contiguous(), d_gates.contiguous()


@_selected_mixture_backward.register_fake
def _(grad, o_slc, lse, q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, cu_seqlens, scale, impl):
    return empty_contiguous(q, k, v, o_cmp, o_win, gates)


def _selected_mixture_context(ctx, inputs, output):
    *tensors, ctx.l_sel, q_start, cu_seqlens, ctx.scale, ctx.keep, ctx.impl = inputs
    _, o_slc, lse = output
    ctx.mark_non_differentiable(o_slc, lse)
    ctx.save_for_backward(o_slc, lse, *tensors, q_start, cu_seqlens)


def _selected_mixture_gradient(ctx, grad, *_):
    if not ctx.keep:
        raise ValueError("keep: expected True where a gradient is wanted, got False")
    *tensors, q_start, cu_seqlens = ctx.saved_tensors
    d_q, d_k, d_v, d_cmp, d_win, d_gates = torch.ops.nsa_compile.selected_mixture_backward(
        grad, *tensors, ctx.l_sel, q_start, cu_seqlens, ctx.scale, ctx.impl
    )
    return d_q, d_k, d_v, None, d_cmp, d_win, d_gates, *(None,) * 6


attach_autograd(_selected_mixture, _selected_mixture_gradient, _selected_mixture_context)
attach_double_backward(
    _selected_mixture_backward,
    _selected_mixture,
    lambda args: ((0,), (*range(3, 14), -1, 14), (*args[3:14], False, args[14])),
)


@register_flop_formula(torch.ops.nsa_compile.selected_mixture)
def _(q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, *args, out_shape=None, **kwargs) -> int:
    pairs = selected_pairs(q, k, v, block_indices, l_sel, q_start)
    return q[0] * q[2] * (2 * pairs * (q[-1] + v[-1]) + 6 * q[1] * v[-1])


@register_flop_formula(torch.ops.nsa_compile.selected_mixture_backward)
def _(
    grad, o_slc, lse, q, k, v, block_indices, o_cmp, o_win, gates, l_sel, q_start, *args, out_shape=None, **kwargs
) -> int:
    pairs = selected_pairs(q, k, v, block_indices, l_sel, q_start)
    return q[0] * q[2] * (2 * pairs * (3 * q[-1] + 2 * v[-1]) + 9 * q[1] * v[-1])
