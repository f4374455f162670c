"""The op of the gated sum of the branches, and its gradient."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.custom_ops.dispatch import runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.registration import empty_contiguous
from nsa_compile.custom_ops.transforms import attach_autograd, attach_double_backward
from nsa_compile.ops import gating as reference
from nsa_compile.ops.checks import check_layout


def gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, *, impl: str = "auto") -> Tensor:
    """Mix the branches: `o = sum_c g_c * o_c`, c in (cmp, slc, win) (Eq. 5).

    Args:
        o_cmp, o_slc, o_win: [b, t, n_heads, d_v] float.
        gates: [b, t, n_heads, 3] in the order cmp, slc, win, of the same type.
        impl: "auto", "reference" or "triton".

    Returns: [b, t, n_heads, d_v] in the type of the outputs, summed in at least fp32.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    axes = "b t n d_v"
    check_layout(
        {"o_cmp": (o_cmp, axes), "o_slc": (o_slc, axes), "o_win": (o_win, axes), "gates": (gates, "b t n branches")},
        {"branches": 3},
    )
    runs_triton("gated_sum", impl, o_cmp)
    return torch.ops.nsa_compile.gated_sum(o_cmp, o_slc, o_win, gates, impl)


@torch.library.custom_op("nsa_compile::gated_sum", mutates_args=())
@in_range("gates")
def _gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, impl: str) -> Tensor:
    if runs_triton("gated_sum", impl, o_cmp):
        from nsa_compile.custom_ops.kernels import gating

        with torch.cuda.device_of(o_cmp):
            return gating.gated_sum(o_cmp, o_slc, o_win, gates)
    return reference.gated_sum(o_cmp, o_slc, o_win, gates).contiguous()


@_gated_sum.register_fake
def _(o_cmp, o_slc, o_win, gates, impl):
    return o_cmp.new_empty(o_cmp.shape)


@torch.library.custom_op("nsa_compile::gated_sum_backward", mutates_args=())
@in_range("gates backward")
def _gated_sum_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runs_triton("gated_sum", impl, o_cmp):
        from nsa_compile.custom_ops.kernels import gating

        with torch.cuda.device_of(o_cmp):
            return gating.gated_sum_backward(grad, o_cmp, o_slc, o_win, gates)
    d_cmp, d_slc, d_win, d_gates = reference.gated_sum_backward(grad, o_cmp, o_slc, o_win, gates)
    return d_cmp.contiguous(), d_slc.contiguous(), d_win.contiguous(), d_gates.contiguous()


@_gated_sum_backward.register_fake
def _(grad, o_cmp, o_slc, o_win, gates, impl):
    return empty_contiguous(o_cmp, o_slc, o_win, gates)


def _gated_sum_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _gated_sum_gradient(ctx, grad):
    return *torch.ops.nsa_compile.gated_sum_backward(grad, *ctx.saved_tensors, ctx.impl), None


attach_autograd(_gated_sum, _gated_sum_gradient, _gated_sum_context)
attach_double_backward(_gated_sum_backward, _gated_sum, lambda args: ((0,), (1, 2, 3, 4, 5), args[1:]))


@register_flop_formula(torch.ops.nsa_compile.gated_sum)
def _(o_cmp, o_slc, o_win, gates, impl, *args, out_shape=None, **kwargs) -> int:
    b, t, n, d_v = o_cmp
    return 6 * b * t * n * d_v


@register_flop_formula(torch.ops.nsa_compile.gated_sum_backward)
def _(grad, o_cmp, o_slc, o_win, gates, impl, *args, out_shape=None, **kwargs) -> int:
    b, t, n, d_v = o_cmp
    return 9 * b * t * n * d_v
