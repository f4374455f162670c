"""The gated sum of the branches and its gradient, one pass over memory each."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.tiles import gather_rows, padded, row_delta, row_major, scatter_rows


@triton.jit
def _locate(row, x_b, x_t, x_n, t, n):
    """Offset of row (b, t, n) by strides."""
    head, token = row % n, row // n
    return token // t * x_b + token % t * x_t + head * x_n


@triton.jit
def _gated_sum_fwd_kernel(
    o_cmp, o_slc, o_win, gates, out, rows, t, n, c_b, c_t, c_n, s_b, s_t, s_n, w_b, w_t, w_n, g_b, g_t, g_n, g_c,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live, zero = row < rows, row * 0
    gate = gates + _locate(row, g_b, g_t, g_n, t, n)
    acc = tl.load(gate, mask=live, other=0.0).to(tl.float32)[:, None] * gather_rows(
        o_cmp, zero, _locate(row, c_b, c_t, c_n, t, n), live, 0, WIDTH, COLS
    ).to(tl.float32)
    acc += tl.load(gate + g_c, mask=live, other=0.0).to(tl.float32)[:, None] * gather_rows(
        o_slc, zero, _locate(row, s_b, s_t, s_n, t, n), live, 0, WIDTH, COLS
    ).to(tl.float32)
    acc += tl.load(gate + 2 * g_c, mask=live, other=0.0).to(tl.float32)[:, None] * gather_rows(
        o_win, zero, _locate(row, w_b, w_t, w_n, t, n), live, 0, WIDTH, COLS
    ).to(tl.float32)
    scatter_rows(out, acc, row, zero, live, WIDTH, WIDTH, COLS)


@triton.jit
def _gated_sum_branch(grad, o, place, grad_o, gate, grad_gate, row, live, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Gradient of one branch and of its gate; the branch's output and its gradient as stored, both fp32."""
    out = gather_rows(o, row * 0, place, live, 0, WIDTH, COLS).to(tl.float32)
    tl.store(grad_gate, tl.sum(grad * out, 1).to(grad_gate.dtype.element_ty), mask=live)
    factor = tl.load(gate, mask=live, other=0.0).to(tl.float32)[:, None]
    grad_out = (grad * factor).to(grad_o.dtype.element_ty)
    scatter_rows(grad_o, grad_out, row, row * 0, live, WIDTH, WIDTH, COLS)
    return out, grad_out.to(tl.float32)


@triton.jit
def _gated_sum_bwd_kernel(
    grad, o_cmp, o_slc, o_win, gates, lse, d_cmp, d_slc, d_win, d_gates, delta, lse2, rows, t, n,
    d_b, d_t, d_n, c_b, c_t, c_n, s_b, s_t, s_n, w_b, w_t, w_n, g_b, g_t, g_n, g_c,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the branches and gates; given the LSE of the selected branch, what its gradient takes from it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    gate, grad_gate = gates + _locate(row, g_b, g_t, g_n, t, n), d_gates + row * 3
    tile = gather_rows(grad, row * 0, _locate(row, d_b, d_t, d_n, t, n), live, 0, WIDTH, COLS).to(tl.float32)
    place = _locate(row, c_b, c_t, c_n, t, n)
    _gated_sum_branch(tile, o_cmp, place, d_cmp, gate, grad_gate, row, live, WIDTH, COLS)
    place = _locate(row, s_b, s_t, s_n, t, n)
    out, grad_out = _gated_sum_branch(tile, o_slc, place, d_slc, gate + g_c, grad_gate + 1, row, live, WIDTH, COLS)
    if lse is not None:
        value, value2 = row_delta(out, grad_out, tl.load(lse + row, mask=live, other=float("-inf")))
        tl.store(delta + row, value, mask=live)
        tl.store(lse2 + row, value2, mask=live)
    place = _locate(row, w_b, w_t, w_n, t, n)
    _gated_sum_branch(tile, o_win, place, d_win, gate + 2 * g_c, grad_gate + 2, row, live, WIDTH, COLS)


def gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """`sum_c g_c * o_c`: [b, t, n, d_v]."""
    b, t, n, d_v = o_cmp.shape
    branches = [row_major(o) for o in (o_cmp, o_slc, o_win)]
    out = o_cmp.new_empty(o_cmp.shape)
    rows, cols = b * t * n, padded(d_v)
    per_program = max(1, 2048 // cols)
    _gated_sum_fwd_kernel[(triton.cdiv(rows, per_program),)](
        *branches, gates, out, rows, t, n, *(x for o in branches for x in o.stride()[:3]), *gates.stride(),
        WIDTH=d_v, COLS=cols, ROWS=per_program,
    )  # fmt: skip
    return out


class Gradients(NamedTuple):
    """Gradients of the branches [b, t, n, d_v] and gates [b, t, n, 3]."""

    cmp: Tensor
    slc: Tensor
    win: Tensor
    gates: Tensor


def gated_sum_backward(grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Gradients:
    """Gradients of the three branches and of the gates."""
    return _launch_backward(grad, o_cmp, o_slc, o_win, gates)


def gated_sum_backward_with_delta(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, lse: Tensor
) -> tuple[Gradients, Tensor, Tensor]:
    """Gradients and, fp32 [b, t, n], what `softmax_delta` would give for the selected branch of the LSE `lse`."""
    lse = lse.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    return _launch_backward(grad, o_cmp, o_slc, o_win, gates, lse, delta, lse2), delta, lse2


def _launch_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor,
    lse: Tensor | None = None, delta: Tensor | None = None, lse2: Tensor | None = None,
) -> Gradients:  # fmt: skip
    b, t, n, d_v = o_cmp.shape
    inputs = [row_major(x) for x in (grad, o_cmp, o_slc, o_win)]
    d_cmp, d_slc, d_win = (o.new_empty(o.shape) for o in (o_cmp, o_slc, o_win))
    d_gates = gates.new_empty(gates.shape)
    rows, cols = b * t * n, padded(d_v)
    per_program = max(1, 2048 // cols)
    _gated_sum_bwd_kernel[(triton.cdiv(rows, per_program),)](
        *inputs, gates, lse, d_cmp, d_slc, d_win, d_gates, delta, lse2, rows, t, n,
        *(x for o in inputs for x in o.stride()[:3]), *gates.stride(), WIDTH=d_v, COLS=cols, ROWS=per_program,
    )  # fmt: skip
    return Gradients(d_cmp, d_slc, d_win, d_gates)
