"""The choice of blocks: probabilities of compressed tokens summed over heads, folded to blocks, the best of them.

Two kernels take turns over chunks of queries. With a = l_sel / d and m = l / d, compressed token i = j*a + r overlaps
block j by `min(m, a - r)` strides and block j + 1 by the rest.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.places import places_of_choice
from nsa_compile.custom_ops.kernels.tiles import (
    LOG2E,
    aligned,
    check_grid,
    dot,
    gather_rows,
    key_tiles,
    load_keys,
    padded,
    row_major,
)
from nsa_compile.ops.selection import number_of_blocks


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
    start, end = tl.minimum(start, width), tl.minimum(end, width)  # garbage sequences may promise more
    slot = ((b * chunk + mine) * n_groups + g) * width
    for first in tl.range(tl.min(start, 0), tl.max(end, 0), BN):
        k_tile = load_keys(k_tiles, b, g, first, BN, DK)
        p = tl.exp2(dot(k_tile, tl.trans(q_tile)) * scale2 - lse2[None, :])
        i = first + tl.arange(0, BN)
        p = tl.sum(p.reshape(BN, TOKENS, HP), 2)
        p = tl.minimum(p, 1.0 * H, propagate_nan=tl.PropagateNan.ALL)  # whatever the LSE is
        seen = i[:, None] < end[None, :]
        if ALIGNED:
            tl.store(out + slot[None, :] + i[:, None], tl.where(seen, p, 0.0))
        else:
            tl.store(out + slot[None, :] + i[:, None], p, mask=seen & (i[:, None] >= start[None, :]))


@triton.jit
def _free_scores(
    p, block, count, last, A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of blocks as int32 in the same order: the bits of fp32 numbers >= 0; -1 if forced or no candidate.

    p holds what `count` compressed tokens give or, if A is 0, the scores of blocks.
    """
    free = (block >= INIT) & (block <= last - LOCAL)
    if A == 0:
        score = tl.load(p + block, mask=free, other=0.0)
    else:
        r = tl.arange(0, AP)
        own = tl.where(r < A, tl.minimum(A - r, M), 0)[None, :]
        i = block[:, None] * A + r[None, :]
        if ALIGNED:
            i = tl.multiple_of(i, (1, AP))
            value = tl.load(p + i, mask=(free & (block * A < count))[:, None], other=0.0)
        else:
            value = tl.load(p + i, mask=free[:, None] & (own > 0) & (i < count), other=0.0)
        score = tl.sum(value * own, 1)
        for before in tl.static_range(1, M):
            i = block * A - before
            score += tl.load(p + i, mask=free & (i >= 0) & (i < count), other=0.0) * (M - before)
    score = tl.where(score == score, tl.maximum(score, 0.0), 0.0)
    return tl.where(free, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _take_best(score, block):
    """The block of the highest score, the lowest one of equals, -1 if none is >= 0; and the scores without it."""
    best = tl.max(score, 0)
    taken = tl.min(tl.where(score == best, block, 0x7FFFFFFF), 0)
    return tl.where(best < 0, -1, taken), tl.where(block == taken, -1, score)


@triton.jit
def choose_blocks(
    p, count, last, out, N: tl.constexpr, NP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, ALIGNED: tl.constexpr, TEAMS: tl.constexpr, TEAM: tl.constexpr,
    UNROLL: tl.constexpr = 1,
):  # fmt: skip
    """The forced blocks of 0 … last and the best others, N in all, ascending at `out` and then -1; returned unordered.

    The best of the TEAMS * TEAM > last blocks lie within as many best teams, each as good as its best block; block j
    belongs to team j % TEAMS. p, count and A are as in `_free_scores`.
    """
    slot, lane = tl.arange(0, NP), tl.arange(0, TEAMS)
    FREE: tl.constexpr = N - INIT - LOCAL
    local = tl.where(last >= INIT + LOCAL, last + 1 - LOCAL - INIT, 0)
    forced = tl.where(slot < INIT, slot, slot + local)
    chosen = tl.where((slot < INIT + LOCAL) & (forced <= last), forced, -1)
    if FREE > 0:
        best, block = tl.full([TEAMS], -1, tl.int32), lane
        for first in tl.range(0, last + 1, TEAMS, loop_unroll_factor=UNROLL):
            score = _free_scores(p, first + lane, count, last, A, AP, M, INIT, LOCAL, ALIGNED)
            block = tl.where(score > best, first + lane, block)
            best = tl.maximum(best, score)
        team = tl.full([NP], -1, tl.int32)
        for i in tl.range(0, FREE):
            taken, best = _take_best(best, block)
            team = tl.where(slot == i, tl.where(taken < 0, -1, taken % TEAMS), team)
        block = tl.where(team < 0, last + 1, team)[None, :] + tl.arange(0, TEAM)[:, None] * TEAMS
        block = block.reshape(TEAM * NP)
        score = _free_scores(p, block, count, last, A, AP, M, INIT, LOCAL, ALIGNED)
        for i in tl.range(INIT + LOCAL, N):
            taken, score = _take_best(score, block)
            chosen = tl.where(slot == i, taken, chosen)
    some = chosen >= 0
    place = tl.sum((some[None, :] & (chosen[None, :] < chosen[:, None])).to(tl.int32), 1)
    tl.store(out + place, chosen, mask=some)
    tl.store(out + slot, tl.full([NP], -1, tl.int32), mask=(slot < N) & (slot >= tl.sum(some.to(tl.int32), 0)))
    return chosen


@triton.jit
def _top_blocks_kernel(
    p, position, key_start, key_end, block_indices, first_token, chunk, t, width, n_groups, candidates,
    N: tl.constexpr, NP: tl.constexpr, L_SEL: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, ALIGNED: tl.constexpr, TEAMS: tl.constexpr, TEAM: tl.constexpr,
):  # fmt: skip
    """`choose_blocks` of one query and group, with TEAMS * TEAM >= candidates."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = first_token + tl.program_id(0)
    pos = tl.load(position + b * t + token)
    start = tl.minimum(tl.load(key_start + b * t + token), width)
    count = tl.minimum(tl.load(key_end + b * t + token), width) - start
    last = tl.where(pos >= 0, tl.minimum(pos // L_SEL, candidates - 1), -1)
    p += tl.multiple_of(((b * chunk + tl.program_id(0)) * n_groups + g) * width, 16)
    if not ALIGNED:
        p += start
    out = block_indices + ((b * t + token) * n_groups + g) * N
    choose_blocks(p, count, last, out, N, NP, A, AP, M, INIT, LOCAL, ALIGNED, TEAMS, TEAM)


SCRATCH = 512
"""Bytes that the probabilities of one chunk may take for every query of the call and every group (of at least 4), if
over 64 MiB in all: so that more groups are no more chunks."""
TEAM = 8
"""Blocks of a team, of which its best stands for it while the best teams are sought."""


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, l: int, d: int, l_sel: int, n_sel: int, init_blocks: int, local_blocks: int,
    q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float, scratch: int | None = None,
) -> Tensor:  # fmt: skip
    """The blocks each query and group attends to: int32 [b, t, g, n_sel], ascending, -1 in unused slots."""
    q, k_cmp, lse = row_major(q), aligned(k_cmp), lse.contiguous()
    (b, t, n, d_k), (c, g) = q.shape, k_cmp.shape[1:3]
    check_grid("q", "rows or groups", max(b, g))
    h, DK, A, M = n // g, padded(d_k), l_sel // d, l // d
    position, intervals = places_of_choice(q, c, l, d, q_start, cu_seqlens)
    indices = torch.empty(b, t, g, n_sel, dtype=torch.int32, device=q.device)
    HP, bytes_per_row = padded(h, 1), DK * q.element_size()
    columns, keys = (128, 64) if bytes_per_row <= 256 else (64, 64) if bytes_per_row <= 512 else (16, 32)
    tokens = max(1, columns // HP)
    is_aligned, tiles = cu_seqlens is None and keys % A == 0, key_tiles(k_cmp, keys, DK) if c > 0 else None
    scratch = scratch or max(2**26, SCRATCH * b * t * max(4, g))
    chunks = list(_chunks(t, c, None if q_start is not None else d, tokens, keys, scratch // (4 * b * g)))
    most = max(triton.cdiv(size, tokens) * tokens * width for _, size, width in chunks)
    p = torch.empty(b * g * most, dtype=torch.float32, device=q.device)
    for first, size, width in chunks:
        chunk = triton.cdiv(size, tokens) * tokens  # whole tiles are written
        if c > 0:
            _group_probabilities_kernel[(triton.cdiv(size, tokens), g, b)](
                q, tiles, *intervals, lse, p, scale * LOG2E.value, first, chunk, t, width, n, g,
                *q.stride()[:3], H=h, HP=HP, D_K=d_k, DK=DK, TOKENS=tokens, BN=keys, ALIGNED=is_aligned,
                num_warps=4, num_stages=1,
            )  # fmt: skip
        candidates = number_of_blocks(first + size, c, l=l, d=d, l_sel=l_sel, static=q_start is not None)
        teams, NP, AP = min(4096, padded(triton.cdiv(candidates, TEAM), 32)), padded(n_sel, 1), padded(A, 1)
        team = padded(triton.cdiv(candidates, teams), 2)
        scores = max(teams, team * NP) * AP  # at once: of a block of every team, then of the best teams' blocks
        _top_blocks_kernel[(size, g, b)](
            p, position, *intervals, indices, first, chunk, t, width, g, candidates,
            N=n_sel, NP=NP, L_SEL=l_sel, A=A, AP=AP, M=M, INIT=init_blocks, LOCAL=local_blocks, ALIGNED=is_aligned,
            TEAMS=teams, TEAM=team, num_warps=min(8, max(1, scores // 2048)),
            # a product fused with the sum over lanes rounds differently in each lane, which then differ in what is best
            enable_fp_fusion=False,
        )  # fmt: skip
    return indices


def _chunks(t: int, c: int, d: int | None, tokens: int, keys: int, elements: int) -> Iterator[tuple[int, int, int]]:
    """Chunks (first query, size, compressed tokens to score) of t queries, of about `elements` scores each.

    The query at t sees none of the c compressed tokens from (t + 1) / d on, where d is given.
    """

    def width(end: int) -> int:
        seen = c if d is None else min(c, triton.cdiv(end, d))
        return triton.cdiv(max(1, seen), keys) * keys

    first = 0
    while first < t:
        size = max(tokens, elements // width(t) // tokens * tokens)
        if d is not None:  # early queries see less: size * (first + size) / d = elements
            size = max(size, (math.isqrt(first * first + 4 * d * elements) - first) // 2 // tokens * tokens)
        size = min(size, t - first)
        yield first, size, width(first + size)
        first += size
