"""The mean of compression blocks and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.tiles import check_grid, padded, row_major
from nsa_compile.ops.layout import compressed_ends, compressed_slots, num_cmp, query_layout, sequence_of


@triton.jit
def _compress_mean_fwd_kernel(
    k, out, first, used, c, n_groups, k_b, k_s, k_g,
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
        token = tl.load(first + slot, mask=live, other=0)
        full = tl.load(used + slot, mask=live, other=0) != 0
    pointers = k + b * k_b + g * k_g + token[:, None] * k_s + col
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for _ in tl.range(0, L):
        acc += tl.load(pointers, mask=full[:, None] & (col < WIDTH), other=0.0).to(tl.float32)
        pointers += k_s
    place = ((b * c + slot) * n_groups + g)[:, None] * WIDTH + col
    tl.store(out + place, (acc / L).to(out.dtype.element_ty), mask=live[:, None] & (col < WIDTH))


@triton.jit
def _compress_mean_bwd_kernel(
    grad, out, position, slots, counts, s, c, n_groups, g_b, g_c, g_g,
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
        pos = tl.load(position + token, mask=live, other=-1).to(tl.int32)
        slot = tl.load(slots + token, mask=live, other=0).to(tl.int32)
        count = tl.load(counts + token, mask=live, other=0).to(tl.int32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for r in tl.range(0, L // D):
        i = pos // D - r
        covers = live & (pos >= 0) & (i >= 0) & (i < count)
        place = b * g_b + (slot + i).to(tl.int64)[:, None] * g_c + g * g_g + col
        acc += tl.load(grad + place, mask=covers[:, None] & (col < WIDTH), other=0.0).to(tl.float32)
    place = ((b * s + token) * n_groups + g)[:, None] * WIDTH + col
    tl.store(out + place, (acc / L).to(out.dtype.element_ty), mask=live[:, None] & (col < WIDTH))


def compress_mean(k: Tensor, l: int, d: int, cu_seqlens: Tensor | None) -> Tensor:
    """Means of the blocks: [b, num_cmp(s), g, x]; packed: [1, s // d, g, x], unused slots 0."""
    k = row_major(k)
    b, s, g, x = k.shape
    check_grid("k", "rows or groups", max(b, g))
    c = num_cmp(s, l, d) if cu_seqlens is None else s // d
    out = k.new_empty(b, c, g, x)
    if c == 0:
        return out
    first = used = k
    if cu_seqlens is not None:
        _, first, used = compressed_slots(c, cu_seqlens, l=l, d=d)
        used = (used & (first >= 0) & (first + l <= s)).to(torch.int8)
    cols = padded(x)
    rows = max(1, 2048 // cols)
    _compress_mean_fwd_kernel[(triton.cdiv(c, rows), g, b)](
        k, out, first, used, c, g, *k.stride()[:3], L=l, D=d, WIDTH=x, COLS=cols, ROWS=rows,
        PACKED=cu_seqlens is not None,
    )  # fmt: skip
    return out


def compress_mean_backward(grad: Tensor, s: int, l: int, d: int, cu_seqlens: Tensor | None) -> Tensor:
    """Gradient [b, s, g, x]."""
    grad = row_major(grad)
    b, c, g, x = grad.shape
    check_grid("grad", "rows or groups", max(b, g))
    out = grad.new_empty(b, s, g, x)
    position = slots = counts = grad
    if cu_seqlens is not None:
        layout = query_layout(out, None, cu_seqlens)
        starts = cu_seqlens.long()
        sequence = sequence_of(starts, layout.first[0])
        ends = compressed_ends(cu_seqlens, l=l, d=d).clamp(0, c)
        position = torch.where(layout.valid, layout.position, -1)
        slots = ends[sequence]
        counts = ends[sequence + 1] - slots
    cols = padded(x)
    rows = max(1, 2048 // cols)
    _compress_mean_bwd_kernel[(triton.cdiv(s, rows), g, b)](
        grad, out, position, slots, counts, s, c, g, *grad.stride()[:3], L=l, D=d, WIDTH=x, COLS=cols, ROWS=rows,
        PACKED=cu_seqlens is not None,
    )  # fmt: skip
    return out
