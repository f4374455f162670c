"""Attention to selected blocks: kernels over the union of the blocks that neighbouring queries chose.

A tile of neighbouring tokens, the heads of a group as its rows, walks the union of their blocks once, so that a block
that several of them chose is read once. dK and dV walk the tokens that chose a block, found by an inverse index.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels import hopper, hopper_backward
from nsa_compile.custom_ops.kernels.places import Places, query_places
from nsa_compile.custom_ops.kernels.tiles import (
    LN2,
    LOG2E,
    Tiles,
    accumulate,
    aligned,
    check_grid,
    dot,
    finite,
    gather_rows,
    key_tiles,
    load_keys,
    load_rows,
    padded,
    row_major,
    scatter_rows,
    score_gradient,
    softmax_delta,
)


class Unions(NamedTuple):
    """Blocks that tiles of neighbouring tokens chose, each once.

    entries: int32 [b, g, tiles, tokens * n_sel, 2], (first key, bits of the tokens that chose the block). The first
        counts[..., 0] blocks lie before all tokens, which are of one sequence; the last counts[..., 1], stored from the
        end, need a mask.
    """

    entries: Tensor
    counts: Tensor


@triton.jit
def _union_kernel(
    block_indices, position, first, entries, counts, t, tiles, i_b, i_t, i_g, i_n,
    N: tl.constexpr, L_SEL: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Merge the block lists of the TOKENS queries of a tile, one tile per lane."""
    tile = tl.program_id(0) * LANES + tl.arange(0, LANES)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, PAD)[None, :]
    token = tile[:, None] * TOKENS + i
    live = (i < TOKENS) & (token < t)
    pos = tl.load(position + b * t + token, mask=live, other=-1)
    start = tl.load(first + b * t + token, mask=live, other=0)
    far: tl.constexpr = 2147483647
    earliest = tl.min(tl.where(live & (pos >= 0), start + pos, far), 1)
    alike = tl.max(tl.where(live & (pos >= 0), start, 0), 1) == tl.min(tl.where(live & (pos >= 0), start, far), 1)
    alike = alike & (tl.min(tl.where(live, pos, 0), 1) >= 0)  # a token of no sequence must get 0 beside NaN, too
    lists = block_indices + b * i_b + token.to(tl.int64) * i_t + g * i_g
    out = ((b * tl.num_programs(1) + g) * tiles + tile) * (TOKENS * N)
    cursor = tl.zeros([LANES, PAD], tl.int32)
    full, masked = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
    left = 1
    while left > 0:
        more = live & (cursor < N)
        block = tl.load(lists + cursor * i_n, mask=more, other=-1)
        usable = more & (block >= 0) & (pos // L_SEL >= block) & (pos >= 0)
        key = tl.where(usable, start + block * L_SEL, far)
        lowest = tl.min(key, 1)
        chosen = usable & (key == lowest[:, None])
        bits = tl.sum(tl.where(chosen, 1 << i, 0), 1)
        some = bits > 0
        past = some & alike & (lowest + (L_SEL - 1) <= earliest)
        slot = tl.where(past, full, TOKENS * N - 1 - masked)
        tl.store(entries + (out + slot) * 2, lowest, mask=some)
        tl.store(entries + (out + slot) * 2 + 1, bits, mask=some)
        full += past.to(tl.int32)
        masked += (some & (past == 0)).to(tl.int32)
        cursor += (chosen | (more & (usable == 0))).to(tl.int32)
        left = tl.max(tl.max((live & (cursor < N)).to(tl.int32), 1), 0)
    out = ((b * tl.num_programs(1) + g) * tiles + tile) * 2
    tl.store(counts + out, full, mask=tile < tiles)
    tl.store(counts + out + 1, masked, mask=tile < tiles)


def tile_tokens(h: int, bytes_per_key: int) -> int:
    """Neighbouring tokens of a tile: 64 rows for large groups, else 4 tokens or 16 rows; 16 rows of the widest keys."""
    if bytes_per_key > 512:
        return max(1, 16 // h)
    return max(1, 64 // h) if h >= 16 else max(4, 16 // h)


def block_unions(block_indices: Tensor, places: Places, l_sel: int, tokens: int) -> Unions:
    """The union of the blocks of every `tokens` neighbouring queries, from int32 [b, t, g, n_sel]."""
    b, t, g, n_sel = block_indices.shape
    tiles = triton.cdiv(t, tokens)
    entries = torch.empty(b, g, tiles, tokens * n_sel, 2, dtype=torch.int32, device=block_indices.device)
    counts = torch.empty(b, g, tiles, 2, dtype=torch.int32, device=block_indices.device)
    lanes = max(1, 32 // padded(tokens, 1))
    _union_kernel[(triton.cdiv(tiles, lanes), g, b)](
        block_indices, *places, entries, counts, t, tiles, *block_indices.stride(),
        N=n_sel, L_SEL=l_sel, TOKENS=tokens, PAD=padded(tokens, 1), LANES=lanes, num_warps=1,
    )  # fmt: skip
    return Unions(entries, counts)


@triton.jit
def _attend_blocks(
    acc, top, total, q, k, v, k_tiles, v_tiles, entries, first, last, index, place, end, scale2, k_s, v_s, b, g,
    L_SEL: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`accumulate` over entries first … last - 1; `place` is each row's own key, `index` its token in the tile.

    If WHOLE, pieces of BN keys lie wholly inside their block and before all rows.
    """
    PIECES: tl.constexpr = (L_SEL + BN - 1) // BN
    for i in tl.range(first * PIECES, last * PIECES):
        entry = entries + (i // PIECES) * 2
        block, bits = tl.load(entry), tl.load(entry + 1)
        key = block + (i % PIECES) * BN
        chosen = (bits >> index) & 1 == 1
        if WHOLE:
            k_tile, v_tile = load_keys(k_tiles, b, g, key, BN, DK), load_keys(v_tiles, b, g, key, BN, DV)
            acc, top, total = accumulate(acc, top, total, q, k_tile, v_tile, scale2, chosen)
        else:
            stop = tl.minimum(block + L_SEL, end)
            k_tile = load_rows(k, key, stop, k_s, D_K, BN, DK, True)
            v_tile = load_rows(v, key, stop, v_s, D_V, BN, DV, True)
            column = key + tl.arange(0, BN)[None, :]
            seen = chosen[:, None] & (column <= place[:, None]) & (column < stop)
            acc, top, total = accumulate(acc, top, total, q, k_tile, v_tile, scale2, seen, True)
    return acc, top, total


@triton.jit
def _selected_fwd_kernel(
    q, k, v, k_tiles, v_tiles, position, first, entries, counts, o, lse, scale2, t, s, n,
    q_b, q_t, q_n, k_b, k_s, k_g, v_b, v_s, v_g,
    H: tl.constexpr, L_SEL: tl.constexpr, CAPACITY: tl.constexpr, TOKENS: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BM)
    index = row // H
    token, head = tile * TOKENS + index, g * H + row % H
    live = (index < TOKENS) & (token < t)
    pos = tl.load(position + b * t + token, mask=live, other=-1)
    place = tl.where(pos >= 0, pos + tl.load(first + b * t + token, mask=live, other=0), -1)
    tiles = (b * tl.num_programs(1) + g) * tl.num_programs(0) + tile
    entries += tiles * (CAPACITY * 2)
    full, masked = tl.load(counts + tiles * 2), tl.load(counts + tiles * 2 + 1)
    q_tile = gather_rows(q + b * q_b, token, head * q_n, live & (pos >= 0), q_t, D_K, DK)
    if NEGATIVE:
        q_tile = -q_tile
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    end = tl.minimum(tl.max(place, 0) + 1, s)
    acc = tl.zeros([BM, DV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc, top, total = _attend_blocks(
        acc, top, total, q_tile, k, v, k_tiles, v_tiles, entries, CAPACITY - masked, CAPACITY, index, place, end,
        scale2, k_s, v_s, b, g, L_SEL, D_K, D_V, DK, DV, BC, False,
    )  # fmt: skip
    acc, top, total = _attend_blocks(
        acc, top, total, q_tile, k, v, k_tiles, v_tiles, entries, 0, full, index, place, end,
        scale2, k_s, v_s, b, g, L_SEL, D_K, D_V, DK, DV, BN, L_SEL % BN == 0,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    scatter_rows(o + b * t * n * D_V, acc, token, head * D_V, live, n * D_V, D_V, DV)
    value = tl.where(total == 0.0, float("-inf"), (top * scale2 + tl.log2(total)) * LN2)
    tl.store(lse + (b * t + token) * n + head, value, mask=live)


@triton.jit
def _selected_dq_blocks(
    acc, q, grad_o, k, v, k_tiles, v_tiles, lse2, delta, entries, first, last, index, place, end, scale2, k_s, v_s,
    b, g, L_SEL: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (L_SEL + BN - 1) // BN
    for i in tl.range(first * PIECES, last * PIECES):
        entry = entries + (i // PIECES) * 2
        block, bits = tl.load(entry), tl.load(entry + 1)
        key = block + (i % PIECES) * BN
        chosen = (bits >> index) & 1 == 1
        hidden = tl.where(chosen, lse2, float("inf"))
        if WHOLE:
            k_tile, v_tile = load_keys(k_tiles, b, g, key, BN, DK), load_keys(v_tiles, b, g, key, BN, DV)
        else:
            stop = tl.minimum(block + L_SEL, end)
            k_tile = load_rows(k, key, stop, k_s, D_K, BN, DK, True)
            v_tile = load_rows(v, key, stop, v_s, D_V, BN, DV, True)
        scores, dp = dot(q, tl.trans(k_tile)), dot(grad_o, tl.trans(v_tile))
        _, ds = score_gradient(scores, hidden[:, None], dp, delta[:, None], scale2)
        if not WHOLE:
            column = key + tl.arange(0, BN)[None, :]
            ds = tl.where(chosen[:, None] & (column <= place[:, None]) & (column < stop), ds, 0.0)
            k_tile = finite(k_tile)
        acc += dot(ds.to(k_tile.dtype), k_tile)
    return acc


@triton.jit
def _selected_bwd_dq_kernel(
    q, k, v, k_tiles, v_tiles, position, first, entries, counts, grad_o, lse2, delta, grad_q, scale, t, s, n,
    q_b, q_t, q_n, k_b, k_s, k_g, v_b, v_s, v_g, o_b, o_t, o_n,
    H: tl.constexpr, L_SEL: tl.constexpr, CAPACITY: tl.constexpr, TOKENS: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BM)
    index = row // H
    token, head = tile * TOKENS + index, g * H + row % H
    live = (index < TOKENS) & (token < t)
    pos = tl.load(position + b * t + token, mask=live, other=-1)
    place = tl.where(pos >= 0, pos + tl.load(first + b * t + token, mask=live, other=0), -1)
    tiles = (b * tl.num_programs(1) + g) * tl.num_programs(0) + tile
    entries += tiles * (CAPACITY * 2)
    full, masked = tl.load(counts + tiles * 2), tl.load(counts + tiles * 2 + 1)
    q_tile = gather_rows(q + b * q_b, token, head * q_n, live & (pos >= 0), q_t, D_K, DK)
    go_tile = gather_rows(grad_o + b * o_b, token, head * o_n, live & (pos >= 0), o_t, D_V, DV)
    slot = (b * t + token) * n + head
    lse2_row = tl.load(lse2 + slot, mask=live, other=float("inf"))
    delta_row = tl.load(delta + slot, mask=live, other=0.0)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    end = tl.minimum(tl.max(place, 0) + 1, s)
    scale2 = scale * LOG2E
    acc = tl.zeros([BM, DK], tl.float32)
    acc = _selected_dq_blocks(
        acc, q_tile, go_tile, k, v, k_tiles, v_tiles, lse2_row, delta_row, entries, CAPACITY - masked, CAPACITY,
        index, place, end, scale2, k_s, v_s, b, g, L_SEL, D_K, D_V, DK, DV, BC, False,
    )  # fmt: skip
    acc = _selected_dq_blocks(
        acc, q_tile, go_tile, k, v, k_tiles, v_tiles, lse2_row, delta_row, entries, 0, full, index, place, end,
        scale2, k_s, v_s, b, g, L_SEL, D_K, D_V, DK, DV, BN, L_SEL % BN == 0,
    )  # fmt: skip
    scatter_rows(grad_q + b * t * n * D_K, acc * scale, token, head * D_K, live, n * D_K, D_K, DK)


class InverseIndex(NamedTuple):
    """The tokens that chose each block, cut into items of at most ITEM tokens.

    A block is named by its bucket, `(b * g + group) * s + its first key`. tokens int32 [b * t * g * n_sel], block after
    block; ends int64 [b * g * s], where a bucket's tokens end; item_ends int64 [b * g * s], where its items end;
    bucket int64 [items], the bucket of each item, b * g * s for the unused ones.
    """

    tokens: Tensor
    ends: Tensor
    item_ends: Tensor
    bucket: Tensor


ITEM = 1024


@triton.jit
def _inverse_kernel(
    block_indices, position, first, counters, tokens, t, s, n_groups, i_b, i_t, i_g, i_n, entries,
    N: tl.constexpr, L_SEL: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Count the tokens of each bucket or, if FILL, write them where the counters stand."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = e < entries
    row, i = e // N, e % N
    token, g = row // n_groups, row % n_groups
    b = token // t
    token -= b * t
    block = tl.load(block_indices + b * i_b + token * i_t + g * i_g + i * i_n, mask=live, other=-1)
    pos = tl.load(position + b * t + token, mask=live, other=-1)
    usable = live & (block >= 0) & (pos // L_SEL >= block) & (pos >= 0)
    key = tl.load(first + b * t + token, mask=live, other=0) + block * L_SEL
    counter = counters + (b * n_groups + g) * s + key
    if FILL:
        slot = tl.atomic_add(counter, 1, mask=usable, sem="relaxed")
        tl.store(tokens + slot, token.to(tl.int32), mask=usable)
    else:
        tl.atomic_add(counter, 1, mask=usable, sem="relaxed")


def invert(block_indices: Tensor, places: Places, s: int, l_sel: int, max_blocks: int) -> InverseIndex:
    """The inverse index of block_indices int32 [b, t, g, n_sel] over s keys with at most max_blocks blocks per group.

    Tokens stand in ascending order under `torch.use_deterministic_algorithms`, otherwise in any.
    """
    b, t, g, n_sel = block_indices.shape
    entries, device = block_indices.numel(), block_indices.device
    counters = torch.zeros(b * g * s, dtype=torch.int64, device=device)
    tokens = torch.empty(entries, dtype=torch.int32, device=device)

    def launch(fill: bool) -> None:
        _inverse_kernel[(triton.cdiv(entries, 1024),)](
            block_indices, *places, counters, tokens, t, s, g, *block_indices.stride(), entries,
            N=n_sel, L_SEL=l_sel, BLOCK=1024, FILL=fill,
        )  # fmt: skip

    launch(fill=False)
    ends = counters.cumsum(0)
    item_ends = ((counters + ITEM - 1) // ITEM).cumsum(0)
    if torch.are_deterministic_algorithms_enabled():
        key = places.first[..., None, None].long() + block_indices * l_sel
        usable = (block_indices >= 0) & (block_indices <= places.position[..., None, None] // l_sel)
        group = torch.arange(b * g, device=device).view(b, 1, g, 1)
        bucket = torch.where(usable, group * s + key, b * g * s)
        order = bucket.flatten().sort(stable=True).indices
        tokens = (order // (g * n_sel) % t).int()
    else:
        torch.sub(ends, counters, out=counters)
        launch(fill=True)
    items = b * g * max_blocks + entries // ITEM
    bucket = torch.searchsorted(item_ends, torch.arange(items, device=device), right=True)
    return InverseIndex(tokens, ends, item_ends, bucket)


@triton.jit
def _selected_bwd_dkv_kernel(
    q, k, v, position, first, tokens, ends, item_ends, buckets, grad_o, lse2, delta, sum_k, sum_v, scale,
    t, s, n, n_groups, n_buckets, q_b, q_t, q_n, k_b, k_s, k_g, v_b, v_s, v_g, o_b, o_t, o_n,
    H: tl.constexpr, L_SEL: tl.constexpr, ITEM: tl.constexpr, TOKENS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of one piece of a block from one item of the tokens that chose it."""
    item, piece = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    bucket = tl.load(buckets + item)
    if bucket >= n_buckets:
        return
    row_of, block = bucket // s, (bucket % s).to(tl.int32)
    b, g = row_of // n_groups, (row_of % n_groups).to(tl.int32)
    before = tl.load(item_ends + bucket - 1, mask=bucket > 0, other=0)
    begin = tl.load(ends + bucket - 1, mask=bucket > 0, other=0) + (item - before) * ITEM
    finish = tl.minimum(begin + ITEM, tl.load(ends + bucket))
    stop = tl.minimum(block + L_SEL, s)
    k_tile = load_rows(k + b * k_b + g * k_g, block + piece, stop, k_s, D_K, BN, DK, True)
    v_tile = load_rows(v + b * v_b + g * v_g, block + piece, stop, v_s, D_V, BN, DV, True)
    key = block + piece + tl.arange(0, BN)[:, None]
    index = tl.arange(0, BM) // H
    head = g * H + tl.arange(0, BM) % H
    q += b * q_b
    grad_o += b * o_b
    position += b * t
    first += b * t
    lse2 += b * t * n
    delta += b * t * n
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DK], tl.float32), tl.zeros([BN, DV], tl.float32)
    tokens += begin
    count = (finish - begin).to(tl.int32)
    mine = tl.arange(0, TOKENS_PAD)
    for i in tl.range(0, count, TOKENS):
        live = (index < TOKENS) & (i + index < count)
        token = tl.load(tokens + i + index, mask=live, other=0)
        q_tile = gather_rows(q, token, head * q_n, live, q_t, D_K, DK)
        go_tile = gather_rows(grad_o, token, head * o_n, live, o_t, D_V, DV)
        slot = token.to(tl.int64) * n + head
        lse2_row = tl.load(lse2 + slot, mask=live, other=float("inf"))
        delta_row = tl.load(delta + slot, mask=live, other=0.0)
        near = (mine < TOKENS) & (i + mine < count)
        near_token = tl.load(tokens + i + mine, mask=near, other=0)
        place = tl.load(position + near_token, mask=near, other=0) + tl.load(first + near_token, mask=near, other=0)
        # whether a key comes after a query; of floats, since ptxas 12.8 makes wrong code where an integer is reduced
        # into a uniform register beside wgmma
        hides = tl.max(tl.where(near & (place < block + piece + BN - 1), 1.0, 0.0), 0)
        scores, dp = dot(k_tile, tl.trans(q_tile)), dot(v_tile, tl.trans(go_tile))
        p, ds = score_gradient(scores, lse2_row[None, :], dp, delta_row[None, :], scale2)
        if hides > 0.0:
            own = tl.load(position + token, mask=live, other=-1) + tl.load(first + token, mask=live, other=0)
            seen = key <= own[None, :]
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        dv += dot(p.to(go_tile.dtype), go_tile)
        dk += dot(ds.to(q_tile.dtype), q_tile)
    inside = piece + tl.arange(0, BN)
    slot = item * L_SEL + inside
    scatter_rows(sum_k, dk * scale, slot, 0 * slot, inside < L_SEL, D_K, D_K, DK)
    scatter_rows(sum_v, dv, slot, 0 * slot, inside < L_SEL, D_V, D_V, DV)


@triton.jit
def _sum_items_kernel(
    sums, position, first, item_ends, grad, items, t, s, n_groups,
    L_SEL: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Add the items of every key's block: grad [b, s, g, WIDTH] from sums fp32 [items, L_SEL, WIDTH].

    (position, first) are the places of the keys.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = key < s
    start = key * 0
    inside = key % L_SEL
    if PACKED:
        start = tl.load(first + key, mask=live, other=0)
        pos = tl.load(position + key, mask=live, other=-1)
        inside = tl.maximum(pos, 0) % L_SEL
        bucket = (b * n_groups + g) * s + start + tl.maximum(pos, 0) - inside
        owned = live & (pos >= 0)
    else:
        bucket = (b * n_groups + g) * s + key - inside
        owned = live
    item = tl.load(item_ends + bucket - 1, mask=owned & (bucket > 0), other=0)
    count = (tl.load(item_ends + bucket, mask=owned, other=0) - item).to(tl.int32)
    count = tl.where(owned, count, 0)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for i in tl.range(0, tl.max(count, 0)):
        slot = (item + i) * L_SEL + inside
        acc += gather_rows(sums, slot, 0 * slot, owned & (i < count) & (item + i < items), WIDTH, WIDTH, COLS)
    slot = (b * s + key) * n_groups + g
    scatter_rows(grad, acc, slot, 0 * slot, live, WIDTH, WIDTH, COLS)


def runs_on_hopper(q: Tensor, k: Tensor, v: Tensor, l_sel: int) -> bool:
    """Whether the forward runs in Gluon."""
    return hopper.takes_blocks(q.shape[2] // k.shape[2], l_sel) and hopper.takes(q, q.shape[-1], v.shape[-1])


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, l_sel: int, q_start: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the tokens up to its own of its blocks: o [b, t, n, d_v], LSE fp32 [b, t, n]."""
    q, k, v = row_major(q), aligned(k), aligned(v)
    (b, t, n, d_k), (s, g), d_v = q.shape, k.shape[1:3], v.shape[-1]
    check_grid("q", "rows or groups", max(b, g))
    o, lse = q.new_empty(b, t, n, d_v), q.new_empty(b, t, n, dtype=torch.float32)
    h, DK, DV = n // g, padded(d_k), padded(d_v)
    on_hopper = tiles is None and runs_on_hopper(q, k, v, l_sel)
    tokens = hopper.ROWS // h if on_hopper else tile_tokens(h, max(DK, DV) * q.element_size())
    block_indices, (places, span) = block_indices.contiguous(), query_places(q, s, q_start, cu_seqlens)
    entries, counts = block_unions(block_indices, places, l_sel, tokens)
    if on_hopper:
        hopper.attend(q, k, v, *span, (entries, counts), l_sel, scale, o, lse)
        return o, lse
    rows, keys, warps, stages = tiles or union_tiles(q, tokens * h, l_sel, DK, DV)[0]
    _selected_fwd_kernel[(triton.cdiv(t, tokens), g, b)](
        q, k, v, key_tiles(k, keys, DK), key_tiles(v, keys, DV), *places, entries, counts, o, lse,
        abs(scale) * LOG2E.value, t, s, n, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H=h, L_SEL=l_sel, CAPACITY=entries.shape[3], TOKENS=tokens, D_K=d_k, D_V=d_v, DK=DK, DV=DV,
        BM=rows, BN=keys, BC=16, NEGATIVE=scale < 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o, lse


def union_tiles(q: Tensor, rows: int, l_sel: int, DK: int, DV: int) -> tuple[Tiles, Tiles]:
    """Tile sizes of the forward and the dQ kernel, which walk unions of blocks."""
    rows, bytes_per_key = padded(rows), max(DK, DV) * q.element_size()
    keys = min(padded(l_sel), 64 if bytes_per_key <= 256 else 32 if bytes_per_key <= 512 else 16)
    if bytes_per_key > 256:
        return Tiles(rows, keys, 4, 1), Tiles(rows, keys, 4, 1)
    # With wgmma, ptxas 12.8 (Triton 3.6 and 3.7) reads values of up to 32 channels at wrong addresses where blocks are
    # not whole tiles: it drops the move of a uniform register that holds their descriptor. Two warps cannot run wgmma.
    warps = max(1, rows // 16) if l_sel % keys == 0 or DV > 32 else min(2, rows // 16)
    return Tiles(rows, keys, warps, 1), Tiles(rows, keys, max(2, rows // 16), 3)


def selected_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, l_sel: int, q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `selected_attention`."""
    grad_o = aligned(grad_o)
    delta, lse2 = softmax_delta(o, grad_o, lse, grad_lse)
    return selected_gradients(grad_o, delta, lse2, q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale, tiles)


def selected_gradients(
    grad_o: Tensor, delta: Tensor, lse2: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, l_sel: int,
    q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float, tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `selected_attention` by (delta, lse2) as `softmax_delta` gives them."""
    q, k, v, grad_o = aligned(q), aligned(k), aligned(v), aligned(grad_o)
    (b, t, n, d_k), (s, g), d_v = q.shape, k.shape[1:3], v.shape[-1]
    check_grid("q", "rows or groups", max(b, g))
    h, DK, DV = n // g, padded(d_k), padded(d_v)
    width = max(DK, DV)
    on_hopper = tiles is None and hopper.takes_blocks(h, l_sel) and hopper_backward.sums_queries(q, d_k, d_v)
    tokens = hopper.ROWS // h if on_hopper else tile_tokens(h, width * q.element_size())
    sizes = {"H": h, "L_SEL": l_sel, "D_K": d_k, "D_V": d_v, "DK": DK, "DV": DV}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_o.stride()[:3])
    block_indices, (places, span) = block_indices.contiguous(), query_places(q, s, q_start, cu_seqlens)
    entries, counts = block_unions(block_indices, places, l_sel, tokens)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    if on_hopper:
        unions = (entries, counts)
        grad_q = hopper_backward.sum_queries(q, k, v, grad_o, lse2, delta, *span, unions, l_sel, scale)
    else:
        grad_q = q.new_empty(q.shape)
        rows, keys, warps, stages = tiles[0] if tiles else union_tiles(q, tokens * h, l_sel, DK, DV)[1]
        _selected_bwd_dq_kernel[(triton.cdiv(t, tokens), g, b)](
            q, k, v, key_tiles(k, keys, DK), key_tiles(v, keys, DV), *places, entries, counts, grad_o, lse2, delta,
            grad_q, scale, t, s, n, *strides, **sizes,
            CAPACITY=entries.shape[3], TOKENS=tokens, BM=rows, BN=keys, BC=16, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    max_blocks = triton.cdiv(s, l_sel) if cu_seqlens is None else s // l_sel + len(cu_seqlens)
    index = invert(block_indices, places, s, l_sel, max_blocks)
    items = len(index.bucket)
    sum_k, sum_v = (torch.empty(items, l_sel, x, dtype=torch.float32, device=q.device) for x in (d_k, d_v))
    if tiles is None and l_sel % hopper.KEYS == 0 and hopper_backward.sums_keys(q, d_k, d_v, h, scale, listed=True):
        hopper_backward.sum_keys(
            q, k, v, grad_o, lse2, delta, *places, sum_k, sum_v, scale, index=index, item=ITEM, l_sel=l_sel
        )
    else:
        rows, keys, warps, stages = tiles[1] if tiles else gather_tiles(q, h, l_sel, width)
        _selected_bwd_dkv_kernel[(items, triton.cdiv(l_sel, keys))](
            q, k, v, *places, *index, grad_o, lse2, delta, sum_k, sum_v, scale, t, s, n, g, b * g * s, *strides,
            **sizes, ITEM=ITEM, TOKENS=max(1, rows // h), TOKENS_PAD=padded(rows // h, 1), BM=rows, BN=keys,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    key_places = places if q_start is None or cu_seqlens is None else query_places(k, s, None, cu_seqlens)[0]
    for sums, grad, channels in ((sum_k, grad_k, d_k), (sum_v, grad_v, d_v)):
        per_program = max(1, 4096 // padded(channels))
        _sum_items_kernel[(triton.cdiv(s, per_program), g, b)](
            sums, *key_places, index.item_ends, grad, items, t, s, g,
            L_SEL=l_sel, WIDTH=channels, COLS=padded(channels), ROWS=per_program, PACKED=cu_seqlens is not None,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def gather_tiles(q: Tensor, h: int, l_sel: int, width: int) -> Tiles:
    """Tile sizes of the kernel that gathers the queries of a block."""
    bytes_per_key = width * q.element_size()
    rows = max(padded(h), 32 if bytes_per_key <= 256 else 16)
    keys = min(padded(l_sel), 64 if bytes_per_key <= 512 else 16)
    return Tiles(rows, keys, 4, 3 if bytes_per_key <= 256 else 1)
