"""The mean of compression blocks and its gradient."""

import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.places import compressed_ends, find_sequence, search_steps
from nsa_compile.custom_ops.kernels.tiles import check_grid, padded, row_major
from nsa_compile.ops.layout import num_cmp


@triton.jit(do_not_specialize=["sequences", "steps"])
def _compress_mean_fwd_kernel(
    k, out, cu_seqlens, cmp_ends, sequences, steps, s, c, n_groups, k_b, k_s, k_g,
    L: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Mean of the L tokens of each of ROWS blocks."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    live = slot < c
    full = live
    token = slot.to(tl.int64) * D
    if PACKED:
        sequence = find_sequence(cmp_ends, sequences, steps, slot, live)
        block = tl.maximum(slot - tl.load(cmp_ends + sequence, mask=live, other=0), 0)
        token = tl.load(cu_seqlens + sequence, mask=live, other=0) + block * D
        full = live & (slot < tl.load(cmp_ends + sequences)) & (token >= 0) & (token + L <= s)
    pointers = k + b * k_b + g * k_g + token[:, None] * k_s + col
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for _ in tl.range(0, L):
        acc += tl.load(pointers, mask=full[:, None] & (col < WIDTH), other=0.0).to(tl.float32)
        pointers += k_s
    place = ((b * c + slot) * n_groups + g)[:, None] * WIDTH + col
    tl.store(out + place, (acc / L).to(out.dtype.element_ty), mask=live[:, None] & (col < WIDTH))


@triton.jit(do_not_specialize=["sequences", "steps"])
def _compress_mean_bwd_kernel(
    grad, out, cu_seqlens, cmp_ends, sequences, steps, s, c, n_groups, g_b, g_c, g_g,
    L: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Each token's share of the blocks that cover it, those i with `i*D <= position < i*D + L`."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    live = token < s
    pos, slot, count = token, token * 0, token * 0 + c
    if PACKED:
        sequence = find_sequence(cu_seqlens, sequences, steps, token, live)
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence, mask=live, other=0), 0), s)
        pos = tl.where(token < tl.load(cu_seqlens + sequences), token - begin, -1)
        slot = tl.minimum(tl.maximum(tl.load(cmp_ends + sequence, mask=live, other=0), 0), c).to(tl.int32)
        end = tl.load(cmp_ends + sequence + 1, mask=live, other=0)
        count = tl.minimum(tl.maximum(end, 0), c).to(tl.int32) - slot
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for r in tl.range(0, L // D):
        i = pos // D - r
        covers = live & (pos >= 0) & (i >= 0) & (i < count)
        place = b * g_b + (slot + i).to(tl.int64)[:, None] * g_c + g * g_g + col
        acc += tl.load(grad + place, mask=covers[:, None] & (col < WIDTH), other=0.0).to(tl.float32)
    place = ((b * s + token) * n_groups + g)[:, None] * WIDTH + col
    tl.store(out + place, (acc / L).to(out.dtype.element_ty), mask=live[:, None] & (col < WIDTH))


def packing(cu_seqlens: Tensor | None, l: int, d: int) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Ends of the packed sequences, of their compressed tokens, number of sequences, steps to search them."""
    if cu_seqlens is None:
        return None, None, 0, 0
    n = len(cu_seqlens)
    return cu_seqlens.contiguous(), compressed_ends(cu_seqlens, l, d), n - 1, search_steps(n)


def compress_mean(k: Tensor, l: int, d: int, cu_seqlens: Tensor | None) -> Tensor:
    """Means of the blocks: [b, num_cmp(s), g, x]; packed: [1, s // d, g, x], unused slots 0."""
    k = row_major(k)
    b, s, g, x = k.shape
    check_grid("k", "rows or groups", max(b, g))
    c = num_cmp(s, l, d) if cu_seqlens is None else s // d
    out = k.new_empty(b, c, g, x)
    if c == 0:
        return out
    cols = padded(x)
    rows = max(1, 2048 // cols)
    _compress_mean_fwd_kernel[(triton.cdiv(c, rows), g, b)](
        k, out, *packing(cu_seqlens, l, d), s, c, g, *k.stride()[:3], L=l, D=d, WIDTH=x, COLS=cols, ROWS=rows,
        PACKED=cu_seqlens is not None,
    )  # fmt: skip
    return out


def compress_mean_backward(grad: Tensor, s: int, l: int, d: int, cu_seqlens: Tensor | None) -> Tensor:
    """Gradient [b, s, g, x]."""
    grad = row_major(grad)
    b, c, g, x = grad.shape
    check_grid("grad", "rows or groups", max(b, g))
    out = grad.new_empty(b, s, g, x)
    cols = padded(x)
    rows = max(1, 2048 // cols)
    _compress_mean_bwd_kernel[(triton.cdiv(s, rows), g, b)](
        grad, out, *packing(cu_seqlens, l, d), s, c, g, *grad.stride()[:3], L=l, D=d, WIDTH=x, COLS=cols, ROWS=rows,
        PACKED=cu_seqlens is not None,
    )  # fmt: skip
    return out
