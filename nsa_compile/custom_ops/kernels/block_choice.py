"""The choice of blocks: probabilities of compressed tokens summed over heads, folded to blocks, the best of them.

Two kernels take turns over chunks of queries. With a = l_sel / d and m = l / d, compressed token i = j*a + r overlaps
block j by `min(m, a - r)` strides and block j + 1 by the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.interval import compressed_intervals
from nsa_compile.custom_ops.kernels.selection import query_places
from nsa_compile.custom_ops.kernels.tiles import (
    LOG2E,
    aligned,
    dot,
    gather_rows,
    key_tiles,
    load_keys,
    padded,
    row_major,
)


@triton.jit
def _group_probabilities_kernel(
    q, k_tiles, key_start, key_end, lse, out, scale2, first_token, chunk, t, width, n, n_groups, q_b, q_t, q_n,
    H: tl.constexpr, HP: tl.constexpr, D_K: tl.constexpr, DK: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """out [b, chunk, g, width] at the compressed tokens that a query sees: `sum_h exp(scale * q·k_cmp - lse)`.

    If ALIGNED, what follows in the tile is 0. Keys are the rows of a tile and heads its columns, so that most of the
    sum over heads is within a thread.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0) * TOKENS
    row = tl.arange(0, TOKENS * HP)
    index = tile + row // HP
    token = first_token + index
    live = (index < chunk) & (token < t) & (row % HP < H)
    head = g * H + row % HP
    q_tile = gather_rows(q + b * q_b, token, head * q_n, live, q_t, D_K, DK)
    lse2 = tl.load(lse + (b * t + token) * n + head, mask=live, other=float("-inf")) * LOG2E
    lse2 = tl.where(lse2 > float("-inf"), lse2, float("inf"))
    mine = tile + tl.arange(0, TOKENS)
    stored = (mine < chunk) & (first_token + mine < t)
    start = tl.load(key_start + b * t + first_token + mine, mask=stored, other=0x7FFFFFFF)
    end = tl.load(key_end + b * t + first_token + mine, mask=stored, other=0)
    slot = ((b * chunk + mine) * n_groups + g) * width
    for first in tl.range(tl.min(start, 0), tl.max(end, 0), BN):
        k_tile = load_keys(k_tiles, b, g, first, BN, DK)
        exponent = dot(k_tile, tl.trans(q_tile)) * scale2 - lse2[None, :]
        p = tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
        i = first + tl.arange(0, BN)
        p = tl.sum(p.reshape(BN, TOKENS, HP), 2)
        seen = i[:, None] < end[None, :]
        if ALIGNED:
            tl.store(out + slot[None, :] + i[:, None], tl.where(seen, p, 0.0))
        else:
            tl.store(out + slot[None, :] + i[:, None], p, mask=seen & (i[:, None] >= start[None, :]))


@triton.jit
def _candidate_keys(
    p, block, count, last, A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """int64 keys that order blocks by (score descending, index ascending); forced ones highest, no candidate -1."""
    r = tl.arange(0, AP)
    own = tl.where(r < A, tl.minimum(A - r, M), 0)[None, :]
    i = block[:, None] * A + r[None, :]
    some = (block <= last) & (block * A < count)
    if ALIGNED:
        i = tl.multiple_of(i, (1, AP))
        value = tl.load(p + i, mask=some[:, None], other=0.0)
    else:
        value = tl.load(p + i, mask=some[:, None] & (own > 0) & (i < count), other=0.0)
    score = tl.sum(value * own, 1)
    for before in tl.static_range(1, M):
        i = block * A - before
        score += tl.load(p + i, mask=(block <= last) & (i >= 0) & (i < count), other=0.0) * (M - before)
    score = tl.where(score == score, tl.maximum(score, 0.0), 0.0)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where((block < INIT) | (block > last - LOCAL), 0x7FFFFFFF, bits)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)
    return tl.where(block <= last, key, -1)


@triton.jit
def _top_blocks_kernel(
    p, position, key_start, key_end, block_indices, first_token, chunk, t, width, n_groups, candidates, n,
    L_SEL: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    ALIGNED: tl.constexpr, TEAMS: tl.constexpr, TEAM: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """The n highest blocks of a query and group, ascending, from TEAMS * TEAM >= candidates blocks.

    They lie within the n best teams, each as good as its best block; block j belongs to team j % TEAMS.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = first_token + tl.program_id(0)
    pos = tl.load(position + b * t + token)
    start = tl.load(key_start + b * t + token)
    count = tl.load(key_end + b * t + token) - start
    last = tl.where(pos >= 0, tl.minimum(pos // L_SEL, candidates - 1), -1)
    p += tl.multiple_of(((b * chunk + tl.program_id(0)) * n_groups + g) * width, 16)
    if not ALIGNED:
        p += start
    slot, lane = tl.arange(0, NP), tl.arange(0, TEAMS)

    best = tl.full([TEAMS], -1, tl.int64)
    for first in tl.range(0, last + 1, TEAMS):
        best = tl.maximum(best, _candidate_keys(p, first + lane, count, last, A, AP, M, INIT, LOCAL, ALIGNED))
    team = tl.full([NP], -1, tl.int32)
    limit = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in tl.range(0, n):
        limit = tl.max(tl.where(best < limit, best, -1), 0)
        of_limit = tl.where(limit < 0, -1, (0x7FFFFFFF - (limit & 0x7FFFFFFF)) % TEAMS).to(tl.int32)
        team = tl.where(slot == i, of_limit, team)

    block = tl.where(team < 0, last + 1, team)[None, :] + tl.arange(0, TEAM)[:, None] * TEAMS
    keys = _candidate_keys(p, block.reshape(TEAM * NP), count, last, A, AP, M, INIT, LOCAL, ALIGNED)
    chosen = tl.full([NP], 0x7FFFFFFF, tl.int32)
    limit = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in tl.range(0, n):
        limit = tl.max(tl.where(keys < limit, keys, -1), 0)
        of_limit = tl.where(limit < 0, 0x7FFFFFFF, 0x7FFFFFFF - (limit & 0x7FFFFFFF)).to(tl.int32)
        chosen = tl.where(slot == i, of_limit, chosen)
    place = tl.sum((chosen[None, :] < chosen[:, None]).to(tl.int32), 1)
    out = block_indices + ((b * t + token) * n_groups + g) * n
    some = chosen < 0x7FFFFFFF
    tl.store(out + place, chosen, mask=some)
    tl.store(out + slot, tl.full([NP], -1, tl.int32), mask=(slot < n) & (slot >= tl.sum(some.to(tl.int32), 0)))


SCRATCH = 64 * 2**20
"""Bytes that the probabilities of one chunk of queries may take."""


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, l: int, d: int, l_sel: int, n_sel: int, init_blocks: int, local_blocks: int,
    q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float, scratch: int = SCRATCH,
) -> Tensor:  # fmt: skip
    """The blocks each query and group attends to: int32 [b, t, g, n_sel], ascending, -1 in unused slots."""
    q, k_cmp, lse = row_major(q), aligned(k_cmp), lse.contiguous()
    (b, t, n, d_k), (c, g) = q.shape, k_cmp.shape[1:3]
    h, DK, A, M = n // g, padded(d_k), l_sel // d, l // d
    tokens_in_keys = c * d + l - 1 if q_start is not None else t
    blocks = max(1, triton.cdiv(tokens_in_keys, l_sel))
    intervals = compressed_intervals(q, c, l, d, q_start, cu_seqlens)
    position = query_places(q, 2**31 - 1, q_start, cu_seqlens).position
    indices = torch.empty(b, t, g, n_sel, dtype=torch.int32, device=q.device)
    HP, bytes_per_row = padded(h, 1), DK * q.element_size()
    columns, keys = (128, 64) if bytes_per_row <= 256 else (64, 64) if bytes_per_row <= 512 else (16, 32)
    tokens = max(1, columns // HP)
    is_aligned, stride = cu_seqlens is None and keys % A == 0, triton.cdiv(max(1, c), keys) * keys
    chunk = max(tokens, scratch // (4 * b * g * stride) // tokens * tokens)
    chunk = min(chunk, triton.cdiv(t, tokens) * tokens)
    p = torch.empty(b, chunk, g, stride, dtype=torch.float32, device=q.device)
    for first in range(0, t, chunk):
        size = min(chunk, t - first)
        if c > 0:
            _group_probabilities_kernel[(triton.cdiv(size, tokens), g, b)](
                q, key_tiles(k_cmp, keys, DK), *intervals, lse, p, scale * LOG2E.value, first, chunk, t, stride, n, g,
                *q.stride()[:3], H=h, HP=HP, D_K=d_k, DK=DK, TOKENS=tokens, BN=keys, ALIGNED=is_aligned,
                num_warps=4, num_stages=1,
            )  # fmt: skip
        candidates = blocks if q_start is not None else triton.cdiv(first + size, l_sel)
        teams = min(4096, padded(triton.cdiv(candidates, 4), 32))
        _top_blocks_kernel[(size, g, b)](
            p, position, *intervals, indices, first, chunk, t, stride, g, candidates, n_sel,
            L_SEL=l_sel, A=A, AP=padded(A, 1), M=M, INIT=init_blocks, LOCAL=local_blocks, ALIGNED=is_aligned,
            TEAMS=teams, TEAM=padded(triton.cdiv(candidates, teams), 4), NP=padded(n_sel, 1),
            num_warps=min(8, max(1, teams * padded(A, 1) // 2048)),
        )  # fmt: skip
    return indices
