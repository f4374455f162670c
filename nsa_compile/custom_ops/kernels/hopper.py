"""Attention to intervals and to selected blocks on Hopper GPUs, in Gluon.

64 query rows walk tiles of 64 keys that TMA loads, first those that need a mask, then whole ones, where the scores of
a tile are computed while the values of the one before are summed.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_compile.custom_ops.kernels.tiles import LN2, LOG2E, padded

ROWS = KEYS = 64

# Triton 3.9 knows only the first name, 3.7 only the second
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def plan_walk(
    key_start, key_end, entries, counts, tile, b, g, t, H: gl.constexpr, CAPACITY: gl.constexpr, PIECES: gl.constexpr
):
    """What `find_tile` takes, then how many tiles of 64 keys need a mask and how many there are in all.

    (key_start, key_end) are those of the row b.
    """
    tails, tail, heads, head, body, masked = 0, 0, 0, 0, 0, 0
    if CAPACITY > 0:
        slot = (b.to(gl.int64) * gl.num_programs(1) + g) * gl.num_programs(0) + tile
        entries += slot * (CAPACITY * 2)
        masked = gl.load(counts + slot * 2 + 1)
        hidden = masked * PIECES
        tiles = (gl.load(counts + slot * 2) + masked) * PIECES
    else:
        first, last = tile * 64 // H, gl.minimum((tile * 64 + 63) // H, t - 1)
        head, seen_by_all = gl.load(key_start + first), gl.load(key_start + last)
        full_end, finish = gl.load(key_end + first), gl.load(key_end + last)
        heads = gl.maximum(gl.minimum(seen_by_all, finish) - head + 63, 0) // 64
        body = head + heads * 64
        whole = gl.maximum(full_end - body, 0) // 64
        tail = body + whole * 64
        tails = gl.maximum(finish - tail + 63, 0) // 64
        hidden = tails + heads
        tiles = hidden + whole
    return entries, masked, tails, tail, heads, head, body, hidden, tiles


@gluon.jit
def find_tile(i, entries, masked, tails, tail, heads, head, body, CAPACITY: gl.constexpr, PIECES: gl.constexpr):
    """First key and token bits of the tile i: masked tiles come first."""
    if CAPACITY > 0:
        entry = i // PIECES
        entry = entries + gl.where(entry < masked, CAPACITY - masked + entry, entry - masked) * 2
        return gl.load(entry) + i % PIECES * 64, gl.load(entry + 1)
    else:
        key = gl.where(i < tails + heads, head + (i - tails) * 64, body + (i - tails - heads) * 64)
        return gl.where(i < tails, tail + i * 64, key), -1


@gluon.jit
def load_tile(tiles, shared, barrier, b, g, key, pred):
    mbarrier.expect(barrier, tiles.block_type.nbytes, pred=pred)
    load_async(tiles, [b, g, key, 0], barrier, shared, pred=pred)


@gluon.jit
def load_rows(
    x, row, live, g, x_t, x_n, layout: gl.constexpr, H: gl.constexpr, WIDTH: gl.constexpr, COLS: gl.constexpr
):
    """Rows of a group's heads of x [t, n, WIDTH], head after head; 0 where not `live` and from WIDTH on."""
    col = gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    offset = (row // H).to(gl.int64) * x_t + (g * H + row % H) * x_n
    mask = gl.expand_dims(live, 1) & gl.expand_dims(col < WIDTH, 0)
    return gl.load(x + gl.expand_dims(offset, 1) + gl.expand_dims(col, 0), mask=mask, other=0.0)


@gluon.jit
def place_rows(tile, b, g, t, n, layout: gl.constexpr, H: gl.constexpr, WIDTH: gl.constexpr, COLS: gl.constexpr):
    """Of the 64 rows of a tile: places in [b, t, n] and whether they exist, offsets in [b, t, n, WIDTH] and a mask."""
    row = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    col = gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    place, live = (b.to(gl.int64) * t + row // H) * n + g * H + row % H, row // H < t
    offset = gl.expand_dims(place * WIDTH, 1) + gl.expand_dims(col, 0)
    return place, live, offset, gl.expand_dims(live, 1) & gl.expand_dims(col < WIDTH, 0)


@gluon.jit
def store_rows(
    out, value, tile, b, g, t, n, layout: gl.constexpr, H: gl.constexpr, WIDTH: gl.constexpr, COLS: gl.constexpr
):
    """Store the 64 rows of a tile to out [b, t, n, WIDTH]."""
    value = gl.convert_layout(value.to(out.dtype.element_ty), layout)
    _, _, offset, mask = place_rows(tile, b, g, t, n, layout, H, WIDTH, COLS)
    gl.store(out + offset, value, mask=mask)


@gluon.jit
def _mix_rows(o_slc, o_cmp, o_win, gates, place, live, offset, mask):
    """`g_cmp * o_cmp + g_slc * o_slc + g_win * o_win` in fp32, of rows placed by `place_rows`."""
    gates += place * 3
    gate = gl.load(gates, mask=live, other=0.0).to(gl.float32)
    mixed = gl.expand_dims(gate, 1) * gl.load(o_cmp + offset, mask=mask, other=0.0).to(gl.float32)
    gate = gl.load(gates + 1, mask=live, other=0.0).to(gl.float32)
    mixed += gl.expand_dims(gate, 1) * o_slc.to(gl.float32)
    gate = gl.load(gates + 2, mask=live, other=0.0).to(gl.float32)
    return mixed + gl.expand_dims(gate, 1) * gl.load(o_win + offset, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def holds_broken(tile, layout: gl.constexpr, COLS: gl.constexpr):
    """Whether a tile [64, COLS] in shared memory holds NaN or infinity."""
    zeros = gl.zeros([8, COLS], gl.float32, layout=layout)
    for part in gl.static_range(8):
        zeros = gl.fma(tile.slice(part * 8, 8).load(layout).to(gl.float32), 0.0, zeros)
    return gl.max(gl.max(gl.where(zeros == 0.0, 0, 1), 1), 0) > 0


@gluon.jit
def _softmax(s, top, total, scale2, chosen, LISTED: gl.constexpr):
    """One step of the online softmax: p, the factor for what was summed so far, the new (top, total)."""
    if LISTED:
        new_top = gl.where(chosen, gl.maximum(top, gl.max(s, 1)), top)
        base = gl.where(chosen, new_top * scale2, float("inf"))
    else:
        new_top = gl.maximum(top, gl.max(s, 1))
        base = new_top * scale2
    p = gl.exp2(s * scale2 - gl.expand_dims(base, 1))
    decay = gl.where(
        top > float("-inf"), gl.exp2((top - new_top) * scale2), gl.where(new_top > float("-inf"), 0.0, 1.0)
    )
    return p, decay, new_top, total * decay + gl.sum(p, 1)


@gluon.jit
def attend_kernel(
    q, k_tiles, v_tiles, key_start, key_end, entries, counts, o, lse, o_cmp, o_win, gates, mixed, scale2, t, n,
    q_b, q_t, q_n,
    H: gl.constexpr, D_K: gl.constexpr, D_V: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    CAPACITY: gl.constexpr, PIECES: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """Attention of 64 rows, heads of a group after token, to intervals of keys or, if CAPACITY, to listed blocks.

    NaN and infinity in values that lie after a row are kept from it. Given `gates`, its output is mixed with o_cmp and
    o_win into `mixed`, and stored to o only if that is given.
    """
    BM: gl.constexpr = 64
    BN: gl.constexpr = 64
    LISTED: gl.constexpr = CAPACITY > 0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_tiles.dtype

    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    g, b = gl.program_id(1), gl.program_id(2)
    key_start += b.to(gl.int64) * t
    key_end += b.to(gl.int64) * t
    row = tile * BM + gl.arange(0, BM, layout=s_rows)
    token = row // H
    live = token < t
    start = gl.load(key_start + token, mask=live, other=0)
    end = gl.load(key_end + token, mask=live, other=0)
    entries, masked, tails, tail, heads, head, body, hidden, tiles = plan_walk(
        key_start, key_end, entries, counts, tile, b, g, t, H, CAPACITY, PIECES
    )

    q_row = tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, q_layout))
    q_live = gl.load(key_end + q_row // H, mask=q_row // H < t, other=0) > 0
    q_value = load_rows(q + b.to(gl.int64) * q_b, q_row, q_live, g, q_t, q_n, q_layout, H, D_K, DK)
    if NEGATIVE:
        q_value = -q_value
    q_shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DK], dtype)
    q_shared = gl.allocate_shared_memory(dtype, [BM, DK], q_shared_layout, q_value)
    k_buffer = gl.allocate_shared_memory(dtype, k_tiles.block_type.shape, k_tiles.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [2, 1, 1, BN, DV], v_tiles.layout)
    k_shared = k_buffer.reshape([BN, DK]).permute((1, 0))
    broken_keys = gl.allocate_shared_memory(gl.int32, [BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_ready, count=1)
    mbarrier.init(v_ready.index(0), count=1)
    mbarrier.init(v_ready.index(1), count=1)
    fence_async_shared()

    acc = gl.zeros([BM, DV], gl.float32, layout=o_layout)
    top = gl.full([BM], float("-inf"), gl.float32, layout=s_rows)
    total = gl.zeros([BM], gl.float32, layout=s_rows)
    zero = gl.zeros([BM, BN], gl.float32, layout=s_layout)
    index = gl.arange(0, BM, layout=s_rows) // H
    column = gl.expand_dims(gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout)), 0)
    some = tiles > 0
    key, bits = 0, 0
    if some:
        key, bits = find_tile(0, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
    load_tile(k_tiles, k_buffer, k_ready, b, g, key, some)
    load_tile(v_tiles, v_buffers.index(0), v_ready.index(0), b, g, key, some)

    for i in range(0, hidden):
        mbarrier.wait(k_ready, i & 1)
        s = warpgroup_mma(q_shared, k_shared, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        chosen = ((bits >> index) & 1) == 1
        seen = (column + key < gl.expand_dims(end, 1)) & (column + key >= gl.expand_dims(start, 1))
        if LISTED:
            seen = seen & gl.expand_dims(chosen, 1)
        more = i + 1 < tiles
        if more:
            key, bits = find_tile(i + 1, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
        load_tile(k_tiles, k_buffer, k_ready, b, g, key, more)
        load_tile(v_tiles, v_buffers.index((i + 1) & 1), v_ready.index((i + 1) & 1), b, g, key, more)
        s = gl.where(seen, s, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, 1))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.where(seen, gl.exp2((s - gl.expand_dims(base, 1)) * scale2), 0.0)
        decay = gl.where(top == float("-inf"), 0.0, gl.exp2((top - base) * scale2))
        top = new_top
        total = total * decay + gl.sum(p, 1)
        acc = acc * gl.expand_dims(gl.convert_layout(decay, o_rows), 1)
        mbarrier.wait(v_ready.index(i & 1), (i >> 1) & 1)
        v_shared = v_buffers.index(i & 1).reshape([BN, DV])
        p = gl.convert_layout(p.to(dtype), p_layout)
        if holds_broken(v_shared, out_layout, DV):
            for part in gl.static_range(8):
                piece = v_shared.slice(part * 8, 8).load(out_layout).to(gl.float32)
                sound = (piece - piece) == 0.0
                broken_keys.slice(part * 8, 8).store(gl.max(gl.where(sound, 0, 1), 1))
                v_shared.slice(part * 8, 8).store(gl.where(sound, piece, 0.0).to(dtype))
            fence_async_shared()
            broken_columns = gl.expand_dims(broken_keys.load(gl.SliceLayout(0, s_layout)), 0)
            broken_rows = gl.convert_layout(gl.max(gl.where(seen, broken_columns, 0), 1), o_rows)
            acc = gl.where(gl.expand_dims(broken_rows, 1) > 0, float("nan"), acc)
        acc = warpgroup_mma(p, v_shared, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])

    if hidden < tiles:
        mbarrier.wait(k_ready, hidden & 1)
        s = warpgroup_mma(q_shared, k_shared, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        chosen = ((bits >> index) & 1) == 1
        key1, bits1, key2, bits2 = key, bits, key, bits
        if hidden + 1 < tiles:
            key1, bits1 = find_tile(hidden + 1, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
        load_tile(k_tiles, k_buffer, k_ready, b, g, key1, hidden + 1 < tiles)
        acc_token = warpgroup_mma_init(acc)
        for i in range(hidden, tiles - 1):
            if i + 2 < tiles:
                key2, bits2 = find_tile(i + 2, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
            p, decay, top, total = _softmax(s, top, total, scale2, chosen, LISTED)
            p, acc = warpgroup_mma_wait(0, [p, acc_token])
            p = gl.convert_layout(p.to(dtype), p_layout)
            load_tile(v_tiles, v_buffers.index((i + 1) & 1), v_ready.index((i + 1) & 1), b, g, key1, True)
            mbarrier.wait(k_ready, (i + 1) & 1)
            s_token = warpgroup_mma(q_shared, k_shared, zero, use_acc=False, is_async=True)
            acc = acc * gl.expand_dims(gl.convert_layout(decay, o_rows), 1)
            mbarrier.wait(v_ready.index(i & 1), (i >> 1) & 1)
            acc_token = warpgroup_mma(p, v_buffers.index(i & 1).reshape([BN, DV]), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s_token])
            load_tile(k_tiles, k_buffer, k_ready, b, g, key2, i + 2 < tiles)
            chosen = ((bits1 >> index) & 1) == 1
            key1, bits1 = key2, bits2
        p, decay, top, total = _softmax(s, top, total, scale2, chosen, LISTED)
        p, acc = warpgroup_mma_wait(0, [p, acc_token])
        acc = acc * gl.expand_dims(gl.convert_layout(decay, o_rows), 1)
        final = tiles - 1
        mbarrier.wait(v_ready.index(final & 1), (final >> 1) & 1)
        acc = warpgroup_mma(
            gl.convert_layout(p.to(dtype), p_layout), v_buffers.index(final & 1).reshape([BN, DV]), acc, is_async=True
        )
        acc = warpgroup_mma_wait(0, [acc])
    mbarrier.invalidate(k_ready)
    mbarrier.invalidate(v_ready.index(0))
    mbarrier.invalidate(v_ready.index(1))

    out = acc / gl.expand_dims(gl.convert_layout(gl.where(total == 0.0, 1.0, total), o_rows), 1)
    out = gl.convert_layout(out.to(dtype), out_layout)
    place, alive, offset, mask = place_rows(tile, b, g, t, n, out_layout, H, D_V, DV)
    if o is not None:
        gl.store(o + offset, out, mask=mask)
    if gates is not None:
        mixture = _mix_rows(out, o_cmp, o_win, gates, place, alive, offset, mask)
        gl.store(mixed + offset, mixture.to(dtype), mask=mask)
    value = gl.where(total == 0.0, float("-inf"), (top * scale2 + gl.log2(total)) * LN2)
    gl.store(lse + (b.to(gl.int64) * t + token) * n + g * H + row % H, value, mask=live)


def tile_widths(d_k: int, d_v: int) -> tuple[int, int]:
    """Channels of the tiles of q and k, and of v."""
    return max(64, padded(d_k)), max(64, padded(d_v))


def takes(q: Tensor, d_k: int, d_v: int) -> bool:
    """Whether the kernel runs on this device and takes these sizes."""
    DK, DV = tile_widths(d_k, d_v)
    fits = q.element_size() == 2 and DK <= 256 and DV <= 128
    return fits and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def takes_blocks(h: int, l_sel: int) -> bool:
    """Whether the rows of a tile are those of whole tokens, few enough, and blocks of l_sel tokens are whole tiles."""
    return h in (4, 8, 16, 32, 64) and l_sel % KEYS == 0


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of tiles of an `aligned` tensor of rank 4, 0 outside."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def key_tiles(x: Tensor, cols: int) -> TensorDescriptor:
    """Descriptor of tiles [1, 1, KEYS, cols] of `aligned` x [b, s, g, d] seen as [b, g, s, d]."""
    return descriptor(x.transpose(1, 2), [1, 1, KEYS, cols])


class Mixture(NamedTuple):
    """The other branches [b, t, n, d_v] and the gates [b, t, n, 3] to mix an output with, and where the mixture goes.

    All are contiguous; `o` is written.
    """

    o_cmp: Tensor
    o_win: Tensor
    gates: Tensor
    o: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, unions: tuple[Tensor, Tensor] | None, l_sel: int,
    scale: float, o: Tensor | None, lse: Tensor, mixture: Mixture | None = None,
) -> None:  # fmt: skip
    """Attention of queries to the keys start … end - 1 or, of these, to those in the blocks of `unions` of 64 rows.

    Writes the output to o [b, t, n, d_v] unless None, its LSE to fp32 [b, t, n], and the mixture where one is wanted.
    """
    (b, t, n, d_k), g, d_v = q.shape, k.shape[2], v.shape[-1]
    DK, DV = tile_widths(d_k, d_v)
    entries, counts = unions or (start, start)
    registers = 168 if DK <= 128 else 255  # shared memory has room for 3 programs of narrow tiles, for 2 of wide ones
    attend_kernel[(triton.cdiv(t * (n // g), ROWS), g, b)](
        q, key_tiles(k, DK), key_tiles(v, DV), start, end, entries, counts, o, lse, *(mixture or (None,) * 4),
        abs(scale) * LOG2E.value, t, n, *q.stride()[:3], H=n // g, D_K=d_k, D_V=d_v, DK=DK, DV=DV,
        CAPACITY=entries.shape[3] if unions else 0, PIECES=l_sel // KEYS, NEGATIVE=scale < 0,
        num_warps=4, maxnreg=registers,
    )  # fmt: skip
