"""Attention to intervals and to selected blocks on Hopper GPUs, in Gluon: the forward, dK and dV.

TMA loads the tiles. The forward: 64 query rows walk tiles of 64 keys, first those that need a mask, then whole ones,
where the scores of a tile are computed while the values of the one before are summed. dK and dV: 64 keys walk tiles of
64 rows.
"""

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


@gluon.jit
def _tile(i, entries, masked, tails, tail, heads, head, body, CAPACITY: gl.constexpr, PIECES: gl.constexpr):
    """First key and token bits of the tile i: masked tiles come first."""
    if CAPACITY > 0:
        entry = i // PIECES
        entry = entries + gl.where(entry < masked, CAPACITY - masked + entry, entry - masked) * 2
        return gl.load(entry) + i % PIECES * 64, gl.load(entry + 1)
    else:
        key = gl.where(i < tails + heads, head + (i - tails) * 64, body + (i - tails - heads) * 64)
        return gl.where(i < tails, tail + i * 64, key), -1


@gluon.jit
def _load(tiles, shared, barrier, b, g, key, pred):
    mbarrier.expect(barrier, tiles.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(tiles, [b, g, key, 0], barrier, shared, pred=pred)


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
    q, k_tiles, v_tiles, key_start, key_end, entries, counts, o, lse, scale2, t, n, q_b, q_t, q_n,
    H: gl.constexpr, D_K: gl.constexpr, D_V: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    CAPACITY: gl.constexpr, PIECES: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """Attention of 64 rows, heads of a group after token, to intervals of keys or, if CAPACITY, to listed blocks.

    NaN and infinity in values that lie after a row are kept from it.
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
    tails, tail, heads, head, body, masked = 0, 0, 0, 0, 0, 0
    if LISTED:
        slot = (b.to(gl.int64) * gl.num_programs(1) + g) * gl.num_programs(0) + tile
        entries += slot * (CAPACITY * 2)
        masked = gl.load(counts + slot * 2 + 1)
        hidden = masked * PIECES
        tiles = (gl.load(counts + slot * 2) + masked) * PIECES
    else:
        first, last = tile * BM // H, gl.minimum((tile * BM + BM - 1) // H, t - 1)
        head, seen_by_all = gl.load(key_start + first), gl.load(key_start + last)
        full_end, finish = gl.load(key_end + first), gl.load(key_end + last)
        heads = gl.maximum(gl.minimum(seen_by_all, finish) - head + BN - 1, 0) // BN
        body = head + heads * BN
        whole = gl.maximum(full_end - body, 0) // BN
        tail = body + whole * BN
        tails = gl.maximum(finish - tail + BN - 1, 0) // BN
        hidden = tails + heads
        tiles = hidden + whole

    q_row = tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, q_layout))
    q_col = gl.arange(0, DK, layout=gl.SliceLayout(0, q_layout))
    q_offset = (q_row // H).to(gl.int64) * q_t + (g * H + q_row % H) * q_n
    q_live = gl.load(key_end + q_row // H, mask=q_row // H < t, other=0) > 0
    q_mask = gl.expand_dims(q_live, 1) & gl.expand_dims(q_col < D_K, 0)
    q_value = gl.load(
        q + b.to(gl.int64) * q_b + gl.expand_dims(q_offset, 1) + gl.expand_dims(q_col, 0), mask=q_mask, other=0.0
    )
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
        key, bits = _tile(0, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
    _load(k_tiles, k_buffer, k_ready, b, g, key, some)
    _load(v_tiles, v_buffers.index(0), v_ready.index(0), b, g, key, some)

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
            key, bits = _tile(i + 1, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
        _load(k_tiles, k_buffer, k_ready, b, g, key, more)
        _load(v_tiles, v_buffers.index((i + 1) & 1), v_ready.index((i + 1) & 1), b, g, key, more)
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
        zeros = gl.zeros([8, DV], gl.float32, layout=out_layout)
        for part in gl.static_range(8):
            zeros = gl.fma(v_shared.slice(part * 8, 8).load(out_layout).to(gl.float32), 0.0, zeros)
        if gl.max(gl.max(gl.where(zeros == 0.0, 0, 1), 1), 0) > 0:
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
            key1, bits1 = _tile(hidden + 1, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
        _load(k_tiles, k_buffer, k_ready, b, g, key1, hidden + 1 < tiles)
        acc_token = warpgroup_mma_init(acc)
        for i in range(hidden, tiles - 1):
            if i + 2 < tiles:
                key2, bits2 = _tile(i + 2, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
            p, decay, top, total = _softmax(s, top, total, scale2, chosen, LISTED)
            p, acc = warpgroup_mma_wait(0, [p, acc_token])
            p = gl.convert_layout(p.to(dtype), p_layout)
            _load(v_tiles, v_buffers.index((i + 1) & 1), v_ready.index((i + 1) & 1), b, g, key1, True)
            mbarrier.wait(k_ready, (i + 1) & 1)
            s_token = warpgroup_mma(q_shared, k_shared, zero, use_acc=False, is_async=True)
            acc = acc * gl.expand_dims(gl.convert_layout(decay, o_rows), 1)
            mbarrier.wait(v_ready.index(i & 1), (i >> 1) & 1)
            acc_token = warpgroup_mma(p, v_buffers.index(i & 1).reshape([BN, DV]), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s_token])
            _load(k_tiles, k_buffer, k_ready, b, g, key2, i + 2 < tiles)
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
    out_row = tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, out_layout))
    out_col = gl.arange(0, DV, layout=gl.SliceLayout(0, out_layout))
    out_offset = ((b.to(gl.int64) * t + out_row // H) * n + g * H + out_row % H) * D_V
    out_mask = gl.expand_dims(out_row // H < t, 1) & gl.expand_dims(out_col < D_V, 0)
    gl.store(o + gl.expand_dims(out_offset, 1) + gl.expand_dims(out_col, 0), out, mask=out_mask)
    value = gl.where(total == 0.0, float("-inf"), (top * scale2 + gl.log2(total)) * LN2)
    gl.store(lse + (b.to(gl.int64) * t + token) * n + g * H + row % H, value, mask=live)


@gluon.jit
def _load_queries(
    q_tiles, go_tiles, q_buffer, go_buffer, ready, tokens, count, i, row, b, g, t, pred,
    H: gl.constexpr, TOKENS: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Load the 64 rows of the tile i of q and dO; rows of tokens outside of 0 … t - 1 become 0."""
    mbarrier.expect(ready, 128 * (q_buffer.shape[3] + go_buffer.shape[3]), pred=pred)
    if LISTED:
        for j in gl.static_range(TOKENS):
            token = t
            if pred & (i * TOKENS + j < count):
                token = gl.load(tokens + i * TOKENS + j)
            tma.async_copy_global_to_shared(
                q_tiles, [b, token, g * H, 0], ready, q_buffer.slice(j, 1, dim=1), pred=pred
            )
            tma.async_copy_global_to_shared(
                go_tiles, [b, token, g * H, 0], ready, go_buffer.slice(j, 1, dim=1), pred=pred
            )
    else:
        tma.async_copy_global_to_shared(q_tiles, [b, row // H, g * H, 0], ready, q_buffer, pred=pred)
        tma.async_copy_global_to_shared(go_tiles, [b, row // H, g * H, 0], ready, go_buffer, pred=pred)


@gluon.jit
def _row_slots(
    tokens, count, i, row, begin, finish, layout: gl.constexpr,
    H: gl.constexpr, TOKENS: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """(token, head in the group, whether it counts) of the 64 rows of the tile i."""
    index = gl.arange(0, 64, layout=layout)
    if LISTED:
        place = i * TOKENS + index // H
        return gl.load(tokens + place, mask=place < count, other=0), index % H, place < count
    else:
        return (row + index) // H, index % H, (row + index >= begin) & (row + index < finish)


@gluon.jit
def sum_keys_kernel(
    q_tiles, k_tiles, v_tiles, go_tiles, key_start, key_end, query_start, query_end, tokens, ends, item_ends, buckets,
    lse2, delta, grad_k, grad_v, scale, t, s, n, n_groups, n_buckets, split_stride,
    H: gl.constexpr, D_K: gl.constexpr, D_V: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    ITEM: gl.constexpr, L_SEL: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys from the rows that see them or, if ITEM, from one item of the tokens that chose their block.

    The scores start from -LSE and dP from -delta, so that the tile products give what the softmax gradient takes.
    """
    BM: gl.constexpr = 64
    BN: gl.constexpr = 64
    LISTED: gl.constexpr = ITEM > 0
    TOKENS: gl.constexpr = BM // H
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = k_tiles.dtype
    begin, finish, first_row, count, full_begin, full_end, shift = 0, 0, 0, 0, 0, 0, 0
    if LISTED:
        item = gl.program_id(0).to(gl.int64)
        bucket = gl.load(buckets + item)
        if bucket >= n_buckets:
            return
        g, b = (bucket // s % n_groups).to(gl.int32), (bucket // s // n_groups).to(gl.int32)
        first_key = (bucket % s).to(gl.int32) + gl.program_id(1) * BN
        before, first_token = item * 0, item * 0
        if bucket > 0:
            before, first_token = gl.load(item_ends + bucket - 1), gl.load(ends + bucket - 1)
        first_token += (item - before) * ITEM
        count = (gl.minimum(first_token + ITEM, gl.load(ends + bucket)) - first_token).to(gl.int32)
        tokens += first_token
        tiles = (count + TOKENS - 1) // TOKENS
        slot = item * L_SEL + gl.program_id(1) * BN
        shift = gl.load(key_start + b.to(gl.int64) * t) + gl.load(key_end + b.to(gl.int64) * t)
    else:
        part = gl.program_id(1)
        g, b = gl.program_id(2) % n_groups, gl.program_id(2) // n_groups
        first_key = gl.program_id(0) * BN
        last_key = gl.minimum(first_key + BN, s) - 1
        query_start += b.to(gl.int64) * s
        query_end += b.to(gl.int64) * s
        begin, finish = gl.load(query_start + first_key) * H, gl.load(query_end + last_key) * H
        full_begin, full_end = gl.load(query_start + last_key) * H, gl.load(query_end + first_key) * H
        size = ((finish - begin + gl.num_programs(1) - 1) // gl.num_programs(1) + BM - 1) // BM * BM
        begin += part * size
        finish = gl.minimum(finish, begin + size)
        tiles = gl.maximum(finish - begin + BM - 1, 0) // BM
        # the last tile ends with the last row: what lies behind it may be padding that holds NaN
        first_row = finish - tiles * BM
        slot = part * split_stride + b.to(gl.int64) * s + first_key
    key_start += b.to(gl.int64) * t
    key_end += b.to(gl.int64) * t
    lse2 += b.to(gl.int64) * t * n + g * H
    delta += b.to(gl.int64) * t * n + g * H

    k_buffer = gl.allocate_shared_memory(dtype, k_tiles.block_type.shape, k_tiles.layout)
    v_buffer = gl.allocate_shared_memory(dtype, v_tiles.block_type.shape, v_tiles.layout)
    q_buffers = gl.allocate_shared_memory(dtype, [2, 1, TOKENS, H, DK], q_tiles.layout)
    go_buffers = gl.allocate_shared_memory(dtype, [2, 1, TOKENS, H, DV], go_tiles.layout)
    lse_buffer = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    delta_buffer = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(3):
        mbarrier.init(ready.index(j), count=1)
    fence_async_shared()
    mbarrier.expect(ready.index(2), k_tiles.block_type.nbytes + v_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(k_tiles, [b, g, first_key, 0], ready.index(2), k_buffer)
    tma.async_copy_global_to_shared(v_tiles, [b, g, first_key, 0], ready.index(2), v_buffer)
    _load_queries(
        q_tiles, go_tiles, q_buffers.index(0), go_buffers.index(0), ready.index(0), tokens, count, 0, first_row, b, g,
        t, tiles > 0, H, TOKENS, LISTED,
    )  # fmt: skip
    k_shared, v_shared = k_buffer.reshape([BN, DK]), v_buffer.reshape([BN, DV])
    scale2 = scale * LOG2E
    key = gl.expand_dims(first_key + gl.arange(0, BN, layout=gl.SliceLayout(1, s_layout)), 1)
    zero = gl.zeros([BN, BM], gl.float32, layout=s_layout)
    dk = warpgroup_mma_init(gl.zeros([BN, DK], gl.float32, layout=k_layout))
    dv = warpgroup_mma_init(gl.zeros([BN, DV], gl.float32, layout=v_layout))
    token, head, live = _row_slots(tokens, count, 0, first_row, begin, finish, lanes, H, TOKENS, LISTED)
    row_lse = gl.load(lse2 + token.to(gl.int64) * n + head, mask=live, other=float("inf"))
    row_delta = gl.load(delta + token.to(gl.int64) * n + head, mask=live, other=0.0)
    mbarrier.wait(ready.index(2), 0)

    for i in range(0, tiles):
        row = first_row + i * BM
        lse_buffer.store(row_lse / -scale2)
        delta_buffer.store(-row_delta)
        s_start = zero + gl.expand_dims(lse_buffer.load(columns), 0)
        dp_start = zero + gl.expand_dims(delta_buffer.load(columns), 0)
        token, head, live = _row_slots(tokens, count, i + 1, row + BM, begin, finish, lanes, H, TOKENS, LISTED)
        row_lse = gl.load(lse2 + token.to(gl.int64) * n + head, mask=live, other=float("inf"))
        row_delta = gl.load(delta + token.to(gl.int64) * n + head, mask=live, other=0.0)
        mbarrier.wait(ready.index(i & 1), (i >> 1) & 1)
        q_shared, go_shared = q_buffers.index(i & 1).reshape([BM, DK]), go_buffers.index(i & 1).reshape([BM, DV])
        scores = warpgroup_mma(k_shared, q_shared.permute((1, 0)), s_start, is_async=True)
        dp = warpgroup_mma(v_shared, go_shared.permute((1, 0)), dp_start, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        _load_queries(
            q_tiles, go_tiles, q_buffers.index((i + 1) & 1), go_buffers.index((i + 1) & 1), ready.index((i + 1) & 1),
            tokens, count, i + 1, row + BM, b, g, t, i + 1 < tiles, H, TOKENS, LISTED,
        )  # fmt: skip
        exponent = scores * scale2
        p = gl.exp2(gl.where(exponent > 0.0, 0.0, exponent))
        if LISTED:
            earliest = t
            for j in gl.static_range(TOKENS):
                if i * TOKENS + j < count:
                    earliest = gl.minimum(earliest, gl.load(tokens + i * TOKENS + j))
            masked = earliest + shift < first_key + BN - 1
        else:
            masked = (row < gl.maximum(full_begin, begin)) | (row + BM > full_end)
        if masked:
            here, _, alive = _row_slots(tokens, count, i, row, begin, finish, columns, H, TOKENS, LISTED)
            if LISTED:
                seen = (key <= gl.expand_dims(here + shift, 0)) & gl.expand_dims(alive, 0)
            else:
                first_seen = gl.load(key_start + here, mask=alive, other=0)
                last_seen = gl.load(key_end + here, mask=alive, other=0)
                seen = (key >= gl.expand_dims(first_seen, 0)) & (key < gl.expand_dims(last_seen, 0))
            p = gl.where(seen, p, 0.0)
        p_operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, v_layout, 2))
        dp = warpgroup_mma_wait(0, [dp])
        dv = warpgroup_mma(p_operand, go_shared, dv, is_async=True)
        ds = gl.where(p == 0.0, 0.0, p * dp)
        ds = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, k_layout, 2))
        dk = warpgroup_mma(ds, q_shared, dk, is_async=True)

    dv, dk = warpgroup_mma_wait(0, [dv, dk])
    for j in gl.static_range(3):
        mbarrier.invalidate(ready.index(j))
    _store_keys(grad_k, dk * scale, slot, s - first_key, n_groups, g, k_layout, D_K, DK, LISTED)
    _store_keys(grad_v, dv, slot, s - first_key, n_groups, g, v_layout, D_V, DV, LISTED)


@gluon.jit
def _store_keys(
    out, tile, slot, keys, n_groups, g, layout: gl.constexpr, WIDTH: gl.constexpr, COLS: gl.constexpr,
    LISTED: gl.constexpr,
):  # fmt: skip
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, COLS, layout=gl.SliceLayout(0, layout)), 0)
    if LISTED:
        offset = (slot + row) * WIDTH
        mask = column < WIDTH
    else:
        offset = ((slot + row) * n_groups + g) * WIDTH
        mask = gl.expand_dims(row < keys, 1) & (column < WIDTH)
    gl.store(out + gl.expand_dims(offset, 1) + column, tile.to(out.dtype.element_ty), mask=mask)


def tile_widths(d_k: int, d_v: int) -> tuple[int, int]:
    """Channels of the tiles of q and k, and of v."""
    return max(64, padded(d_k)), max(64, padded(d_v))


def takes(q: Tensor, d_k: int, d_v: int) -> bool:
    """Whether the kernel runs on this device and takes these sizes."""
    DK, DV = tile_widths(d_k, d_v)
    fits = q.element_size() == 2 and DK <= 256 and DV <= 128
    return fits and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of tiles of an `aligned` tensor of rank 4, 0 outside."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def key_tiles(x: Tensor, cols: int) -> TensorDescriptor:
    """Descriptor of tiles [1, 1, KEYS, cols] of `aligned` x [b, s, g, d] seen as [b, g, s, d]."""
    return _descriptor(x.transpose(1, 2), [1, 1, KEYS, cols])


def attend(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, unions: tuple[Tensor, Tensor] | None, l_sel: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries to the keys start … end - 1 or, of these, to those in the blocks of `unions` of 64 rows."""
    (b, t, n, d_k), g, d_v = q.shape, k.shape[2], v.shape[-1]
    o, lse = q.new_empty(b, t, n, d_v), q.new_empty(b, t, n, dtype=torch.float32)
    DK, DV = tile_widths(d_k, d_v)
    entries, counts = unions or (start, start)
    attend_kernel[(triton.cdiv(t * (n // g), ROWS), g, b)](
        q, key_tiles(k, DK), key_tiles(v, DV), start, end, entries, counts, o, lse, abs(scale) * LOG2E.value, t, n,
        *q.stride()[:3], H=n // g, D_K=d_k, D_V=d_v, DK=DK, DV=DV, CAPACITY=entries.shape[3] if unions else 0,
        PIECES=l_sel // KEYS, NEGATIVE=scale < 0, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return o, lse


def sums_keys(q: Tensor, d_k: int, d_v: int, h: int, scale: float, listed: bool) -> bool:
    """Whether `sum_keys_kernel` runs on this device and takes these sizes."""
    heads = h in (8, 16, 32, 64) or (h in (1, 2, 4) and not listed)
    return heads and scale != 0 and takes(q, d_k, d_v) and tile_widths(d_k, d_v)[0] <= 128


def sum_keys(
    q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, lse2: Tensor, delta: Tensor, start: Tensor, end: Tensor,
    grad_k: Tensor, grad_v: Tensor, scale: float, *, queries: tuple[Tensor, Tensor] | None = None,
    index: tuple[Tensor, ...] | None = None, item: int = 0, l_sel: int = KEYS,
) -> None:  # fmt: skip
    """Write dK and dV, in parts: of the keys that the `queries` of each see, grad [parts, b, s, g, d]; or of the blocks
    of an inverse `index` in items of `item` tokens, grad [items, l_sel, d], (start, end) being the queries' places.
    """
    (b, t, n, d_k), (s, g), d_v = q.shape, k.shape[1:3], v.shape[-1]
    h, (DK, DV) = n // g, tile_widths(d_k, d_v)
    tokens = 1 if index else ROWS // h
    grid = (grad_k.shape[0], l_sel // KEYS) if index else (triton.cdiv(s, KEYS), grad_k.shape[0], g * b)
    sum_keys_kernel[grid](
        _descriptor(q, [1, tokens, h, DK]), key_tiles(k, DK), key_tiles(v, DV), _descriptor(grad_o, [1, tokens, h, DV]),
        start, end, *(queries or (start, start)), *(index or (start, start, start, start)), lse2, delta, grad_k, grad_v,
        scale, t, s, n, g, b * g * s, b * s,
        H=h, D_K=d_k, D_V=d_v, DK=DK, DV=DV, ITEM=item, L_SEL=l_sel, num_warps=4,
    )  # fmt: skip
