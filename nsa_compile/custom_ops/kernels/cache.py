"""Tokens into and out of the static buffers of a cache, in one launch each."""

import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.tiles import check_grid, padded, row_major


@triton.jit
def _rows(pointer, b, row, g, stride_b, stride_t, stride_g, COLS: tl.constexpr):
    """Pointers [rows, COLS] to what `row` of a tensor [b, t, g, *] holds for a group."""
    return pointer + b * stride_b + row.to(tl.int64)[:, None] * stride_t + g * stride_g + tl.arange(0, COLS)[None, :]


@triton.jit
def _slot(position, length):
    """Where a buffer holds a position: the remainder, which lies in the buffer for negative positions, too."""
    return (position % length + length) % length


@triton.jit(do_not_specialize=["t", "length"])
def _cache_append_kernel(
    buffer, new, positions, count, t, length, b_b, b_t, b_g, n_b, n_t, n_g,
    RING: tl.constexpr, HAS_COUNT: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    end = tl.minimum(tl.maximum(tl.load(count + b), 0), t) if HAS_COUNT else t
    fits = tl.minimum(t, length)  # of a ring only the last tokens matter
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = end - fits + i
    index = tl.load(positions + b).to(tl.int64) + offset
    keep = (i < fits) & (offset >= 0) & (RING | (index < length))
    mask = keep[:, None] & (tl.arange(0, COLS)[None, :] < WIDTH)
    tile = tl.load(_rows(new, b, offset, g, n_b, n_t, n_g, COLS), mask=mask)
    tl.store(_rows(buffer, b, _slot(index, length), g, b_b, b_t, b_g, COLS), tile, mask=mask)


@triton.jit(do_not_specialize=["n", "length"])
def _cache_write_kernel(
    buffer, new, index, keep, n, length, b_b, b_t, b_g, n_b, n_t, n_g,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    slot = tl.load(index + b * n + i, mask=live, other=-1)
    live = live & (tl.load(keep + b * n + i, mask=live, other=0) != 0) & (slot >= 0) & (slot < length)
    mask = live[:, None] & (tl.arange(0, COLS)[None, :] < WIDTH)
    tile = tl.load(_rows(new, b, i, g, n_b, n_t, n_g, COLS), mask=mask)
    tl.store(_rows(buffer, b, slot, g, b_b, b_t, b_g, COLS), tile, mask=mask)


@triton.jit(do_not_specialize=["n", "t", "length"])
def _cache_recall_kernel(
    buffer, new, positions, first, out, n, t, length, b_b, b_t, b_g, n_b, n_t, n_g, o_b, o_t, o_g,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, position = tl.load(first + b).to(tl.int64) + i, tl.load(positions + b)
    live = (i < n)[:, None] & (tl.arange(0, COLS)[None, :] < WIDTH)
    old = (token < position)[:, None]
    fresh = tl.minimum(tl.maximum(token - position, 0), t - 1)
    tile = tl.load(_rows(buffer, b, _slot(token, length), g, b_b, b_t, b_g, COLS), mask=live & old)
    tile = tl.where(old, tile, tl.load(_rows(new, b, fresh, g, n_b, n_t, n_g, COLS), mask=live & (old == 0)))
    tl.store(_rows(out, b, i, g, o_b, o_t, o_g, COLS), tile, mask=live)


def _sizes(x: Tensor, tokens: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and sizes for `tokens` tokens of every row and group of x [b, t, g, *]."""
    b, _, g, width = x.shape
    check_grid("cache", "rows or groups", max(b, g))
    cols = padded(width)
    rows = max(1, 2048 // cols)
    return (triton.cdiv(tokens, rows), g, b), {"WIDTH": width, "COLS": cols, "ROWS": rows}


def cache_append(buffer: Tensor, new: Tensor, positions: Tensor, count: Tensor | None, ring: bool) -> None:
    """Write the first `count` (default all) of the tokens new [b, t, g, *] at the rows' positions."""
    new, t, length = row_major(new), new.shape[1], buffer.shape[1]
    positions, count = positions.contiguous(), None if count is None else count.contiguous()
    grid, sizes = _sizes(buffer, min(t, length))
    _cache_append_kernel[grid](
        buffer, new, positions, count, t, length, *buffer.stride()[:3], *new.stride()[:3],
        RING=ring, HAS_COUNT=count is not None, **sizes,
    )  # fmt: skip


def cache_write(buffer: Tensor, new: Tensor, index: Tensor, keep: Tensor) -> None:
    """Write new [b, n, g, *] at the slots index [b, n] of the buffer where keep [b, n]."""
    new, n, length = row_major(new), new.shape[1], buffer.shape[1]
    grid, sizes = _sizes(buffer, n)
    _cache_write_kernel[grid](
        buffer, new, index.contiguous(), keep.contiguous(), n, length, *buffer.stride()[:3], *new.stride()[:3], **sizes
    )


def cache_recall(buffer: Tensor, new: Tensor, positions: Tensor, first: Tensor, length: int) -> Tensor:
    """Tokens `first … first + length - 1` of each row, of which those from `positions` on are new."""
    new, out = row_major(new), buffer.new_empty(buffer.shape[0], length, *buffer.shape[2:])
    grid, sizes = _sizes(buffer, length)
    _cache_recall_kernel[grid](
        buffer, new, positions.contiguous(), first.contiguous(), out, length, new.shape[1], buffer.shape[1],
        *buffer.stride()[:3], *new.stride()[:3], *out.stride()[:3], **sizes,
    )  # fmt: skip
    return out
