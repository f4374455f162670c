"""Attention of queries to an interval of keys each: the kernels of compressed attention and of the sliding window.

The query at t sees the keys `start[t] … end[t] - 1`; both ends never fall with t. So the queries that see a key are an
interval, too, and a tile of queries and keys needs a mask only near the ends. A tile's rows are a group's heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels import hopper, hopper_backward
from nsa_compile.custom_ops.kernels.places import Intervals, invert_intervals
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
    load_queries,
    load_rows,
    padded,
    query_tiles,
    row_major,
    scatter_rows,
    score_gradient,
    softmax_delta,
)


@triton.jit
def _rows_and_keys(key_start, key_end, g, t, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """Token, head, liveness and keys start … end - 1 of a program's rows; they see keys begin … finish - 1.

    All rows see the keys full_begin … full_end - 1, whole tiles of BN; BC divides full_begin - begin.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * BM + tl.arange(0, BM)
    token, head = row // H, g * H + row % H
    live = token < t
    start = tl.load(key_start + token, mask=live, other=0)
    end = tl.load(key_end + token, mask=live, other=0)
    first, last = tile * BM // H, tl.minimum((tile * BM + BM - 1) // H, t - 1)
    begin, full_begin = tl.load(key_start + first), tl.load(key_start + last)
    full_end, finish = tl.load(key_end + first), tl.load(key_end + last)
    full_begin = begin + tl.cdiv(full_begin - begin, BC) * BC
    full_end = full_begin + tl.maximum(full_end - full_begin, 0) // BN * BN
    return token, head, live, start, end, begin, full_begin, full_end, finish


@triton.jit
def _attend_masked(
    acc, top, total, q, k, v, start, end, first, last, scale2, k_s, v_s,
    D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`accumulate` over the keys first … last - 1, of which a row sees start … end - 1."""
    for key in tl.range(first, last, BN):
        k_tile = load_rows(k, key, last, k_s, D_K, BN, DK, True)
        v_tile = load_rows(v, key, last, v_s, D_V, BN, DV, True)
        index = key + tl.arange(0, BN)[None, :]
        seen = (index >= start[:, None]) & (index < tl.minimum(end, last)[:, None])
        acc, top, total = accumulate(acc, top, total, q, k_tile, v_tile, scale2, seen, True)
    return acc, top, total


@triton.jit
def _interval_fwd_kernel(
    q, k, v, k_tiles, v_tiles, key_start, key_end, o, lse, scale2, t, n,
    q_b, q_t, q_n, k_b, k_s, k_g, v_b, v_s, v_g,
    H: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, head, live, start, end, begin, full_begin, full_end, finish = _rows_and_keys(
        key_start + b * t, key_end + b * t, g, t, H, BM, BN, BC
    )

    q_tile = gather_rows(q + b * q_b, token, head * q_n, live, q_t, D_K, DK)
    if NEGATIVE:
        q_tile = -q_tile
    acc = tl.zeros([BM, DV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    acc, top, total = _attend_masked(
        acc, top, total, q_tile, k, v, start, end, full_end, finish, scale2, k_s, v_s, D_K, D_V, DK, DV, BC
    )
    acc, top, total = _attend_masked(
        acc, top, total, q_tile, k, v, start, end, begin, tl.minimum(full_begin, finish), scale2, k_s, v_s,
        D_K, D_V, DK, DV, BC,
    )  # fmt: skip
    for key in tl.range(full_begin, full_end, BN):
        k_tile, v_tile = load_keys(k_tiles, b, g, key, BN, DK), load_keys(v_tiles, b, g, key, BN, DV)
        acc, top, total = accumulate(acc, top, total, q_tile, k_tile, v_tile, scale2)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    scatter_rows(o + b * t * n * D_V, acc, token, head * D_V, live, n * D_V, D_V, DV)
    value = tl.where(total == 0.0, float("-inf"), (top * scale2 + tl.log2(total)) * LN2)
    tl.store(lse + (b * t + token) * n + head, value, mask=live)


@triton.jit
def _interval_dq_masked(
    acc, q, grad_o, k, v, start, end, lse2, delta, first, last, scale2, k_s, v_s,
    D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for key in tl.range(first, last, BN):
        k_tile = load_rows(k, key, last, k_s, D_K, BN, DK, True)
        v_tile = load_rows(v, key, last, v_s, D_V, BN, DV, True)
        scores, dp = dot(q, tl.trans(k_tile)), dot(grad_o, tl.trans(v_tile))
        _, ds = score_gradient(scores, lse2[:, None], dp, delta[:, None], scale2)
        index = key + tl.arange(0, BN)[None, :]
        ds = tl.where((index >= start[:, None]) & (index < tl.minimum(end, last)[:, None]), ds, 0.0)
        acc += dot(ds.to(k_tile.dtype), finite(k_tile))
    return acc


@triton.jit
def _interval_bwd_dq_kernel(
    q, k, v, k_tiles, v_tiles, key_start, key_end, grad_o, lse2, delta, grad_q, scale, t, n,
    q_b, q_t, q_n, k_b, k_s, k_g, v_b, v_s, v_g, o_b, o_t, o_n,
    H: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, head, live, start, end, begin, full_begin, full_end, finish = _rows_and_keys(
        key_start + b * t, key_end + b * t, g, t, H, BM, BN, BC
    )

    q_tile = gather_rows(q + b * q_b, token, head * q_n, live, q_t, D_K, DK)
    go_tile = gather_rows(grad_o + b * o_b, token, head * o_n, live & (start < end), o_t, D_V, DV)
    slot = (b * t + token) * n + head
    lse2_row = tl.load(lse2 + slot, mask=live, other=float("inf"))
    delta_row = tl.load(delta + slot, mask=live, other=0.0)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    scale2 = scale * LOG2E
    acc = tl.zeros([BM, DK], tl.float32)
    acc = _interval_dq_masked(
        acc, q_tile, go_tile, k, v, start, end, lse2_row, delta_row, full_end, finish, scale2, k_s, v_s,
        D_K, D_V, DK, DV, BC,
    )  # fmt: skip
    acc = _interval_dq_masked(
        acc, q_tile, go_tile, k, v, start, end, lse2_row, delta_row, begin, tl.minimum(full_begin, finish), scale2,
        k_s, v_s, D_K, D_V, DK, DV, BC,
    )  # fmt: skip
    for key in tl.range(full_begin, full_end, BN):
        k_tile, v_tile = load_keys(k_tiles, b, g, key, BN, DK), load_keys(v_tiles, b, g, key, BN, DV)
        scores, dp = dot(q_tile, tl.trans(k_tile)), dot(go_tile, tl.trans(v_tile))
        _, ds = score_gradient(scores, lse2_row[:, None], dp, delta_row[:, None], scale2)
        acc += dot(ds.to(k_tile.dtype), k_tile)
    scatter_rows(grad_q + b * t * n * D_K, acc * scale, token, head * D_K, live, n * D_K, D_K, DK)


@triton.jit
def _interval_dkv_range(
    dk, dv, k, v, q, grad_o, q_tiles, go_tiles, key_start, key_end, lse2, delta, first_key, first, last, b, g, n,
    scale2, q_t, q_n, o_t, o_n,
    H: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add to (dk, dv) of a tile of keys what the query rows first … last - 1 give, a row being token * H + head.

    If WHOLE, all rows see all keys and come in tiles of BM.
    """
    BOX: tl.constexpr = WHOLE and H & (H - 1) == 0
    key = first_key + tl.arange(0, BN)[:, None]
    for start_row in tl.range(first, last, BM):
        row = start_row + tl.arange(0, BM)
        token, head = row // H, g * H + row % H
        live = row < last
        slot = token.to(tl.int64) * n + head
        lse2_row = tl.load(lse2 + slot, mask=live, other=float("inf"))
        if not WHOLE:  # rows that hold NaN or infinity become 0: they may not meet keys that they do not see
            start = tl.load(key_start + token, mask=live, other=0)
            end = tl.load(key_end + token, mask=live, other=0)
            live = live & (lse2_row < float("inf"))
        if BOX:
            q_tile = load_queries(q_tiles, b, start_row // H, g * H + start_row % H, BM, DK)
            go_tile = load_queries(go_tiles, b, start_row // H, g * H + start_row % H, BM, DV)
        else:
            q_tile = gather_rows(q, token, head * q_n, live, q_t, D_K, DK)
            go_tile = gather_rows(grad_o, token, head * o_n, live, o_t, D_V, DV)
        delta_row = tl.load(delta + slot, mask=live, other=0.0)
        scores, dp = dot(k, tl.trans(q_tile)), dot(v, tl.trans(go_tile))
        p, ds = score_gradient(scores, lse2_row[None, :], dp, delta_row[None, :], scale2)
        if not WHOLE:
            seen = (key >= start[None, :]) & (key < end[None, :])
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        dv += dot(p.to(go_tile.dtype), go_tile)
        dk += dot(ds.to(q_tile.dtype), q_tile)
    return dk, dv


@triton.jit
def _interval_bwd_dkv_kernel(
    q, k, v, q_tiles, go_tiles, key_start, key_end, query_start, query_end, grad_o, lse2, delta, grad_k, grad_v,
    scale, t, s, n, n_groups, q_b, q_t, q_n, k_b, k_s, k_g, v_b, v_s, v_g, o_b, o_t, o_n, split_stride,
    H: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys from one of num_programs(1) equal parts of the query rows that see it."""
    first_key, part, parts = tl.program_id(0) * BN, tl.program_id(1), tl.num_programs(1)
    g, b = tl.program_id(2) % n_groups, (tl.program_id(2) // n_groups).to(tl.int64)
    last_key = tl.minimum(first_key + BN, s) - 1
    query_start += b * s
    query_end += b * s
    begin, full_begin = tl.load(query_start + first_key) * H, tl.load(query_start + last_key) * H
    full_end, finish = tl.load(query_end + first_key) * H, tl.load(query_end + last_key) * H
    full_end = tl.maximum(full_begin, full_end)
    size = tl.cdiv(tl.cdiv(finish - begin, parts), BM) * BM
    begin += part * size
    finish = tl.minimum(finish, begin + size)
    full_begin = tl.maximum(tl.minimum(full_begin, finish), begin)
    full_end = full_begin + (tl.maximum(tl.minimum(full_end, finish), full_begin) - full_begin) // BM * BM

    k_tile = load_rows(k + b * k_b + g * k_g, first_key, s, k_s, D_K, BN, DK, True)
    v_tile = load_rows(v + b * v_b + g * v_g, first_key, s, v_s, D_V, BN, DV, True)
    q += b * q_b
    grad_o += b * o_b
    key_start += b * t
    key_end += b * t
    lse2 += b * t * n
    delta += b * t * n
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DK], tl.float32), tl.zeros([BN, DV], tl.float32)
    dk, dv = _interval_dkv_range(
        dk, dv, k_tile, v_tile, q, grad_o, q_tiles, go_tiles, key_start, key_end, lse2, delta, first_key, begin,
        full_begin, b, g, n, scale2, q_t, q_n, o_t, o_n, H, D_K, D_V, DK, DV, BM, BN, False,
    )  # fmt: skip
    dk, dv = _interval_dkv_range(
        dk, dv, k_tile, v_tile, q, grad_o, q_tiles, go_tiles, key_start, key_end, lse2, delta, first_key,
        full_begin, full_end, b, g, n, scale2, q_t, q_n, o_t, o_n, H, D_K, D_V, DK, DV, BM, BN, True,
    )  # fmt: skip
    dk, dv = _interval_dkv_range(
        dk, dv, k_tile, v_tile, q, grad_o, q_tiles, go_tiles, key_start, key_end, lse2, delta, first_key,
        full_end, finish, b, g, n, scale2, q_t, q_n, o_t, o_n, H, D_K, D_V, DK, DV, BM, BN, False,
    )  # fmt: skip
    key = first_key + tl.arange(0, BN)
    slot = (part.to(tl.int64) * split_stride + b * s + key) * n_groups + g
    scatter_rows(grad_k, dk * scale, slot, 0 * slot, key < s, D_K, D_K, DK)
    scatter_rows(grad_v, dv, slot, 0 * slot, key < s, D_V, D_V, DV)


def forward_tiles(q: Tensor, DK: int, DV: int) -> Tiles:
    """Tile sizes of the forward kernel."""
    width = max(DK, DV) * q.element_size()
    return Tiles(64, 64, 4, 1) if width <= 512 else Tiles(32, 32, 4, 1)


def backward_tiles(q: Tensor, DK: int, DV: int) -> tuple[Tiles, Tiles]:
    """Tile sizes of the dQ and the dK/dV kernel."""
    width = max(DK, DV) * q.element_size()
    if width <= 256:
        return Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3)
    return (Tiles(64, 32, 4, 1), Tiles(16, 64, 4, 1)) if width <= 512 else (Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1))


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its interval of keys: o [b, t, n, d_v], LSE fp32 [b, t, n]."""
    q, k, v = row_major(q), aligned(k), aligned(v)
    (b, t, n, d_k), (s, g), d_v = q.shape, k.shape[1:3], v.shape[-1]
    check_grid("q", "rows or groups", max(b, g))
    o, lse = q.new_empty(b, t, n, d_v), q.new_empty(b, t, n, dtype=torch.float32)
    if s == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    if tiles is None and hopper.takes(q, d_k, d_v):
        hopper.attend(q, k, v, *intervals, None, 0, scale, o, lse)
        return o, lse
    h, DK, DV = n // g, padded(d_k), padded(d_v)
    rows, keys, warps, stages = tiles or forward_tiles(q, DK, DV)
    _interval_fwd_kernel[(triton.cdiv(t * h, rows), g, b)](
        q, k, v, key_tiles(k, keys, DK), key_tiles(v, keys, DV), *intervals, o, lse, abs(scale) * LOG2E.value, t, n,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H=h, D_K=d_k, D_V=d_v, DK=DK, DV=DV, BM=rows, BN=keys, BC=16,
        NEGATIVE=scale < 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o, lse


def interval_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    intervals: Intervals, scale: float, tiles: tuple[Tiles, Tiles] | None = None, parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `interval_attention`; the same bits at every call.

    The query rows of a tile of keys are cut into `parts`, whose sums are added afterwards.
    """
    q, k, v, grad_o = aligned(q), aligned(k), aligned(v), aligned(grad_o)
    (b, t, n, d_k), (s, g), d_v = q.shape, k.shape[1:3], v.shape[-1]
    check_grid("q", "rows times groups", b * g)
    if s == 0:
        return q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    h, DK, DV = n // g, padded(d_k), padded(d_v)
    sizes = {"H": h, "D_K": d_k, "D_V": d_v, "DK": DK, "DV": DV}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_o.stride()[:3])
    delta, lse2 = softmax_delta(o, grad_o, lse, grad_lse)
    if tiles is None and hopper_backward.sums_queries(q, d_k, d_v):
        grad_q = hopper_backward.sum_queries(q, k, v, grad_o, lse2, delta, *intervals, None, 0, scale)
    else:
        grad_q = q.new_empty(q.shape)
        rows, keys, warps, stages = tiles[0] if tiles else backward_tiles(q, DK, DV)[0]
        _interval_bwd_dq_kernel[(triton.cdiv(t * h, rows), g, b)](
            q, k, v, key_tiles(k, keys, DK), key_tiles(v, keys, DV), *intervals, grad_o, lse2, delta, grad_q, scale,
            t, n, *strides, **sizes, BM=rows, BN=keys, BC=16, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    on_hopper = tiles is None and hopper_backward.sums_keys(q, d_k, d_v, h, scale, listed=False)
    if on_hopper:
        rows, keys = hopper.ROWS, hopper.KEYS
    else:
        rows, keys, warps, stages = tiles[1] if tiles else backward_tiles(q, DK, DV)[1]
    columns = triton.cdiv(s, keys)
    parts = parts or max(1, min(16, 2048 // (columns * g * b), triton.cdiv(t * h, 4 * rows)))
    whole = parts == 1
    grad_k = torch.empty(parts, *k.shape, dtype=k.dtype if whole else torch.float32, device=k.device)
    grad_v = torch.empty(parts, *v.shape, dtype=v.dtype if whole else torch.float32, device=v.device)
    queries = invert_intervals(intervals, s)
    if on_hopper:
        hopper_backward.sum_keys(q, k, v, grad_o, lse2, delta, *intervals, grad_k, grad_v, scale, queries=queries)
    else:
        _interval_bwd_dkv_kernel[(columns, parts, g * b)](
            q, k, v, query_tiles(q, h, rows, DK), query_tiles(grad_o, h, rows, DV), *intervals, *queries,
            grad_o, lse2, delta, grad_k, grad_v, scale, t, s, n, g, *strides, b * s,
            **sizes, BM=rows, BN=keys, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if whole:
        return grad_q, grad_k[0], grad_v[0]
    return grad_q, grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype)
