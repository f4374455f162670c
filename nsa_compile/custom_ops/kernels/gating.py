"""The gated sum of the branches and its gradient, one pass over memory each."""

import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.tiles import gather_rows, padded, row_major, scatter_rows


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
    """Gradient of one branch and of its gate."""
    out = gather_rows(o, row * 0, place, live, 0, WIDTH, COLS).to(tl.float32)
    tl.store(grad_gate, tl.sum(grad * out, 1).to(grad_gate.dtype.element_ty), mask=live)
    factor = tl.load(gate, mask=live, other=0.0).to(tl.float32)[:, None]
    scatter_rows(grad_o, grad * factor, row, row * 0, live, WIDTH, WIDTH, COLS)


@triton.jit
def _gated_sum_bwd_kernel(
    grad, o_cmp, o_slc, o_win, gates, d_cmp, d_slc, d_win, d_gates, rows, t, n,
    d_b, d_t, d_n, c_b, c_t, c_n, s_b, s_t, s_n, w_b, w_t, w_n, g_b, g_t, g_n, g_c,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    gate, grad_gate = gates + _locate(row, g_b, g_t, g_n, t, n), d_gates + row * 3
    tile = gather_rows(grad, row * 0, _locate(row, d_b, d_t, d_n, t, n), live, 0, WIDTH, COLS).to(tl.float32)
    place = _locate(row, c_b, c_t, c_n, t, n)
    _gated_sum_branch(tile, o_cmp, place, d_cmp, gate, grad_gate, row, live, WIDTH, COLS)
    place = _locate(row, s_b, s_t, s_n, t, n)
    _gated_sum_branch(tile, o_slc, place, d_slc, gate + g_c, grad_gate + 1, row, live, WIDTH, COLS)
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


def gated_sum_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three branches and of the gates."""
    b, t, n, d_v = o_cmp.shape
    inputs = [row_major(x) for x in (grad, o_cmp, o_slc, o_win)]
    d_cmp, d_slc, d_win = (o.new_empty(o.shape) for o in (o_cmp, o_slc, o_win))
    d_gates = gates.new_empty(gates.shape)
    rows, cols = b * t * n, padded(d_v)
    per_program = max(1, 2048 // cols)
    _gated_sum_bwd_kernel[(triton.cdiv(rows, per_program),)](
        *inputs, gates, d_cmp, d_slc, d_win, d_gates, rows, t, n, *(x for o in inputs for x in o.stride()[:3]),
        *gates.stride(), WIDTH=d_v, COLS=cols, ROWS=per_program,
    )  # fmt: skip
    return d_cmp, d_slc, d_win, d_gates
