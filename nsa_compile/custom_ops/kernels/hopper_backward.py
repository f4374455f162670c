"""The gradients of attention to intervals and to selected blocks on Hopper GPUs, in Gluon.

dQ: 64 query rows walk the tiles of 64 keys that the forward walks; the scores of a tile and dP are computed while the
keys of the one before are summed. dK and dV: 64 keys walk tiles of 64 rows. TMA loads what is walked.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from nsa_compile.custom_ops.kernels.hopper import (
    KEYS,
    ROWS,
    descriptor,
    find_tile,
    holds_broken,
    key_tiles,
    load_async,
    load_rows,
    plan_walk,
    store_rows,
    takes,
    tile_widths,
)
from nsa_compile.custom_ops.kernels.tiles import LOG2E

ALL_NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _load_values(x, row, t, n, other, H: gl.constexpr):
    """x [t, n] of rows that are the heads of a group, head after head; `other` from token t on."""
    return gl.load(x + (row // H).to(gl.int64) * n + row % H, mask=row // H < t, other=other)


@gluon.jit
def _load_keys_and_values(k_tiles, v_tiles, k_buffers, v_buffers, ready, i, b, g, key, pred):
    """Load the tile i of keys and values into one of the 3 places for keys and one of the 2 for values."""
    barrier = ready.index(i & 1)
    mbarrier.expect(barrier, k_tiles.block_type.nbytes + v_tiles.block_type.nbytes, pred=pred)
    load_async(k_tiles, [b, g, key, 0], barrier, k_buffers.index(i % 3), pred=pred)
    load_async(v_tiles, [b, g, key, 0], barrier, v_buffers.index(i & 1), pred=pred)


@gluon.jit
def _score_gradients(s, dp, row_lse, row_delta, scale2, bits, H: gl.constexpr, LISTED: gl.constexpr):
    """dS / scale of a tile from its scores and dP, if LISTED only of the rows whose tokens have a bit."""
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    if LISTED:
        chosen = ((bits >> (gl.arange(0, 64, layout=rows) // H)) & 1) == 1
        row_lse = gl.where(chosen, row_lse, float("inf"))
    exponent = s * scale2 - gl.expand_dims(row_lse, 1)
    return gl.exp2(gl.minimum(exponent, 0.0, propagate_nan=ALL_NAN)) * (dp - gl.expand_dims(row_delta, 1))


@gluon.jit
def _hide(
    ds, k_shared, key_start, key_end, row, key, bits, t, layout: gl.constexpr,
    H: gl.constexpr, DK: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """dS with 0 where a row does not see a key; NaN and infinity in the keys become 0, so that 0 * key is 0.

    A row that sees a broken key has a broken dS.
    """
    token = row // H
    start = gl.load(key_start + token, mask=token < t, other=0)
    end = gl.load(key_end + token, mask=token < t, other=0)
    column = key + gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, ds.type.layout)), 0)
    seen = (column < gl.expand_dims(end, 1)) & (column >= gl.expand_dims(start, 1))
    if LISTED:
        index = gl.arange(0, 64, layout=gl.SliceLayout(1, ds.type.layout)) // H
        seen = seen & gl.expand_dims(((bits >> index) & 1) == 1, 1)
    if holds_broken(k_shared, layout, DK):
        for part in gl.static_range(8):
            piece = k_shared.slice(part * 8, 8).load(layout).to(gl.float32)
            k_shared.slice(part * 8, 8).store(gl.where((piece - piece) == 0.0, piece, 0.0).to(k_shared.dtype))
        fence_async_shared()
    return gl.where(seen, ds, 0.0)


@gluon.jit
def sum_queries_kernel(
    q, k_tiles, v_tiles, grad_o, key_start, key_end, entries, counts, lse2, delta, grad_q, scale, t, n,
    q_b, q_t, q_n, o_b, o_t, o_n,
    H: gl.constexpr, D_K: gl.constexpr, D_V: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    CAPACITY: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """dQ of 64 rows, heads of a group after token, from intervals of keys or, if CAPACITY, from listed blocks.

    NaN and infinity in keys and values that lie after a row are kept from it. A row whose LSE is +inf sees nothing.
    A tile is loaded two tiles ahead. Its keys are needed a tile longer than its values: they have 3 places, those 2.
    """
    BM: gl.constexpr = 64
    BN: gl.constexpr = 64
    LISTED: gl.constexpr = CAPACITY > 0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, q_layout, 2)
    k_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    v_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_tiles.dtype

    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    g, b = gl.program_id(1), gl.program_id(2)
    key_start += b.to(gl.int64) * t
    key_end += b.to(gl.int64) * t
    lse2 += b.to(gl.int64) * t * n + g * H
    delta += b.to(gl.int64) * t * n + g * H
    row = tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, s_layout))
    row_lse = _load_values(lse2, row, t, n, float("inf"), H)
    row_delta = _load_values(delta, row, t, n, 0.0, H)
    q_row = tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, k_rows))
    go_row = tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, v_rows))
    q_live = _load_values(lse2, q_row, t, n, float("inf"), H) != float("inf")
    go_live = _load_values(lse2, go_row, t, n, float("inf"), H) != float("inf")
    q_value = load_rows(q + b.to(gl.int64) * q_b, q_row, q_live, g, q_t, q_n, k_rows, H, D_K, DK)
    go_value = load_rows(grad_o + b.to(gl.int64) * o_b, go_row, go_live, g, o_t, o_n, v_rows, H, D_V, DV)
    entries, masked, tails, tail, heads, head, body, hidden, tiles = plan_walk(
        key_start, key_end, entries, counts, tile, b, g, t, H, CAPACITY, PIECES
    )

    k_buffers = gl.allocate_shared_memory(dtype, [3, 1, 1, BN, DK], k_tiles.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [2, 1, 1, BN, DV], v_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    fence_async_shared()
    key, bits, key1, bits1, key2, bits2 = 0, 0, 0, 0, 0, 0
    if tiles > 0:
        key, bits = find_tile(0, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
    _load_keys_and_values(k_tiles, v_tiles, k_buffers, v_buffers, ready, 0, b, g, key, tiles > 0)
    if tiles > 1:
        key1, bits1 = find_tile(1, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
    _load_keys_and_values(k_tiles, v_tiles, k_buffers, v_buffers, ready, 1, b, g, key1, tiles > 1)
    if tiles > 2:
        key2, bits2 = find_tile(2, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
    q_shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DK], dtype)
    q_shared = gl.allocate_shared_memory(dtype, [BM, DK], q_shared_layout, q_value)
    go_shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DV], dtype)
    go_shared = gl.allocate_shared_memory(dtype, [BM, DV], go_shared_layout, go_value)
    fence_async_shared()

    scale2 = scale * LOG2E
    zero = gl.zeros([BM, BN], gl.float32, layout=s_layout)
    acc = gl.zeros([BM, DK], gl.float32, layout=q_layout)
    if tiles > 0:
        mbarrier.wait(ready.index(0), 0)
        k_shared, v_shared = k_buffers.index(0).reshape([BN, DK]), v_buffers.index(0).reshape([BN, DV])
        s = warpgroup_mma(q_shared, k_shared.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(go_shared, v_shared.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dp = warpgroup_mma_wait(0, [s, dp])
        acc_token = warpgroup_mma_init(acc)
        for i in range(0, tiles - 1):
            key3, bits3 = key2, bits2
            if i + 3 < tiles:
                key3, bits3 = find_tile(i + 3, entries, masked, tails, tail, heads, head, body, CAPACITY, PIECES)
            k_shared = k_buffers.index(i % 3).reshape([BN, DK])
            ds = _score_gradients(s, dp, row_lse, row_delta, scale2, bits, H, LISTED)
            if i < hidden:
                ds = _hide(ds, k_shared, key_start, key_end, row, key, bits, t, k_rows, H, DK, LISTED)
            ds, acc = warpgroup_mma_wait(0, [ds, acc_token])
            ds = gl.convert_layout(ds.to(dtype), ds_layout)
            _load_keys_and_values(k_tiles, v_tiles, k_buffers, v_buffers, ready, i + 2, b, g, key2, i + 2 < tiles)
            mbarrier.wait(ready.index((i + 1) & 1), ((i + 1) >> 1) & 1)
            next_k, next_v = k_buffers.index((i + 1) % 3).reshape([BN, DK]), v_buffers.index((i + 1) & 1)
            s_token = warpgroup_mma(q_shared, next_k.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp_token = warpgroup_mma(
                go_shared, next_v.reshape([BN, DV]).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            acc_token = warpgroup_mma(ds, k_shared, acc, is_async=True)
            s, dp = warpgroup_mma_wait(1, [s_token, dp_token])
            key, bits, key1, bits1, key2, bits2 = key1, bits1, key2, bits2, key3, bits3
        k_shared = k_buffers.index((tiles - 1) % 3).reshape([BN, DK])
        ds = _score_gradients(s, dp, row_lse, row_delta, scale2, bits, H, LISTED)
        if tiles - 1 < hidden:
            ds = _hide(ds, k_shared, key_start, key_end, row, key, bits, t, k_rows, H, DK, LISTED)
        ds, acc = warpgroup_mma_wait(0, [ds, acc_token])
        acc = warpgroup_mma(gl.convert_layout(ds.to(dtype), ds_layout), k_shared, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
    mbarrier.invalidate(ready.index(0))
    mbarrier.invalidate(ready.index(1))
    saw = gl.expand_dims(gl.convert_layout(row_lse, gl.SliceLayout(1, q_layout)) != float("inf"), 1)
    store_rows(grad_q, gl.where(saw, acc * scale, 0.0), tile, b, g, t, n, k_rows, H, D_K, DK)


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
            load_async(q_tiles, [b, token, g * H, 0], ready, q_buffer.slice(j, 1, dim=1), pred=pred)
            load_async(go_tiles, [b, token, g * H, 0], ready, go_buffer.slice(j, 1, dim=1), pred=pred)
    else:
        load_async(q_tiles, [b, row // H, g * H, 0], ready, q_buffer, pred=pred)
        load_async(go_tiles, [b, row // H, g * H, 0], ready, go_buffer, pred=pred)


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
def _clear_broken_rows(q_shared, go_shared, starts, columns: gl.constexpr, q_rows: gl.constexpr, go_rows: gl.constexpr):
    """Write 0 to the rows of the tiles q and dO in shared memory whose start [64] is NaN or infinite, if any is."""
    start = starts.load(columns)
    if gl.max(gl.where((start - start) == 0.0, 0, 1), 0) > 0:
        for part in gl.static_range(8):
            _clear_piece(q_shared.slice(part * 8, 8), starts.slice(part * 8, 8), q_rows)
            _clear_piece(go_shared.slice(part * 8, 8), starts.slice(part * 8, 8), go_rows)
        fence_async_shared()


@gluon.jit
def _clear_piece(tile, starts, layout: gl.constexpr):
    start = gl.expand_dims(starts.load(gl.SliceLayout(1, layout)), 1)
    value = tile.load(layout)
    tile.store(gl.where((start - start) == 0.0, value, gl.zeros_like(value)))


@gluon.jit
def sum_keys_kernel(
    q_tiles, k_tiles, v_tiles, go_tiles, key_start, key_end, query_start, query_end, tokens, ends, item_ends, buckets,
    lse2, delta, grad_k, grad_v, scale, t, s, n, n_groups, n_buckets, split_stride,
    H: gl.constexpr, D_K: gl.constexpr, D_V: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    ITEM: gl.constexpr, L_SEL: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys from the rows that see them or, if ITEM, from one item of the tokens that chose their block.

    The scores start from -LSE and dP from -delta, so that the tile products give what the softmax gradient takes.
    Rows with NaN or infinity are kept from the keys that they do not see, but for later keys of a listed block.
    """
    BM: gl.constexpr = 64
    BN: gl.constexpr = 64
    LISTED: gl.constexpr = ITEM > 0
    TOKENS: gl.constexpr = BM // H
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    q_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    go_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
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
    load_async(k_tiles, [b, g, first_key, 0], ready.index(2), k_buffer)
    load_async(v_tiles, [b, g, first_key, 0], ready.index(2), v_buffer)
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
        if not LISTED:
            masked = (row < gl.maximum(full_begin, begin)) | (row + BM > full_end)
            if masked:  # rows whose LSE is no number, those of no key included: 0 * what they hold must be 0
                _clear_broken_rows(q_shared, go_shared, lse_buffer, columns, q_rows, go_rows)
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


def sums_queries(q: Tensor, d_k: int, d_v: int) -> bool:
    """Whether `sum_queries_kernel` runs on this device, takes these sizes and is faster than the Triton kernels."""
    # measured on an H200: 10 % faster than in Triton where a tile is 128 channels wide, slower where it is 64
    return takes(q, d_k, d_v) and max(tile_widths(d_k, d_v)) == 128


def sum_queries(
    q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, lse2: Tensor, delta: Tensor, start: Tensor, end: Tensor,
    unions: tuple[Tensor, Tensor] | None, l_sel: int, scale: float,
) -> Tensor:  # fmt: skip
    """dQ of `hopper.attend`, which takes (start, end), unions and l_sel alike."""
    (b, t, n, d_k), g, d_v = q.shape, k.shape[2], v.shape[-1]
    DK, DV = tile_widths(d_k, d_v)
    grad_q = q.new_empty(q.shape)
    entries, counts = unions or (start, start)
    sum_queries_kernel[(triton.cdiv(t * (n // g), ROWS), g, b)](
        q, key_tiles(k, DK), key_tiles(v, DV), grad_o, start, end, entries, counts, lse2, delta, grad_q, scale, t, n,
        *q.stride()[:3], *grad_o.stride()[:3],
        H=n // g, D_K=d_k, D_V=d_v, DK=DK, DV=DV, CAPACITY=entries.shape[3] if unions else 0, PIECES=l_sel // KEYS,
        num_warps=4,
    )  # fmt: skip
    return grad_q


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
        descriptor(q, [1, tokens, h, DK]), key_tiles(k, DK), key_tiles(v, DV), descriptor(grad_o, [1, tokens, h, DV]),
        start, end, *(queries or (start, start)), *(index or (start, start, start, start)), lse2, delta, grad_k, grad_v,
        scale, t, s, n, g, b * g * s, b * s,
        H=h, D_K=d_k, D_V=d_v, DK=DK, DV=DV, ITEM=item, L_SEL=l_sel, num_warps=4,
    )  # fmt: skip
