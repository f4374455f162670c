"""Scores of selection blocks and the choice of the best: two kernels that take turns over chunks of queries.

With a = l_sel / d and m = l / d, compressed token i = j*a + r overlaps block j by `min(m, a - r)` strides and block
j + 1 by the rest. So the score of block j is `own[j] + next[j - 1]`, two weighted sums over its own a tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.interval import compressed_intervals
from nsa_compile.custom_ops.kernels.selection import query_places
from nsa_compile.custom_ops.kernels.tiles import LOG2E, dot, gather_rows, padded, row_major


@triton.jit
def _score_blocks(
    own_out, next_out, q, k, start, end, lse2, first, last, slot, live, scale2, k_s, blocks,
    A: tl.constexpr, M: tl.constexpr, HP: tl.constexpr, TOKENS: tl.constexpr, D_K: tl.constexpr, DK: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Store own[j] and next[j] of the blocks first … last - 1 of a sequence whose compressed tokens begin at `start`."""
    column = tl.arange(0, BN)
    for j in tl.range(first, last, BN):
        own, after = tl.zeros([TOKENS * HP, BN], tl.float32), tl.zeros([TOKENS * HP, BN], tl.float32)
        for r in tl.static_range(A):
            i = start + (j + column) * A + r
            pointers = k + i.to(tl.int64)[:, None] * k_s + tl.arange(0, DK)[None, :]
            if MASK:
                k_tile = tl.load(
                    pointers, mask=(i < tl.max(end, 0))[:, None] & (tl.arange(0, DK) < D_K)[None, :], other=0.0
                )
            elif D_K < DK:
                k_tile = tl.load(pointers, mask=(tl.arange(0, DK) < D_K)[None, :], other=0.0)
            else:
                k_tile = tl.load(pointers)
            p = tl.exp2(dot(q, tl.trans(k_tile)) * scale2 - lse2[:, None])
            if MASK:
                p = tl.where(i[None, :] < end[:, None], p, 0.0)
            if A - r < M:
                own += p * (A - r)
                after += p * (M - A + r)
            else:
                own += p * M
        mask = live[:, None] & (j + column < blocks)[None, :]
        out = slot[:, None] * blocks + (j + column)[None, :]
        tl.store(own_out + out, tl.sum(own.reshape(TOKENS, HP, BN), 1), mask=mask)
        if M > 1:
            tl.store(next_out + out, tl.sum(after.reshape(TOKENS, HP, BN), 1), mask=mask)


@triton.jit
def _block_scores_kernel(
    q, k, key_start, key_end, lse, own_out, next_out, scale2, first_token, chunk, t, n, n_groups, blocks,
    q_b, q_t, q_n, k_b, k_s, k_g,
    H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, M: tl.constexpr, D_K: tl.constexpr, DK: tl.constexpr,
    TOKENS: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """own and next [b, chunk, g, blocks] of TOKENS queries: `sum_h sum_r weight * exp(scale * q·k_cmp - lse)`."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0) * TOKENS
    row = tl.arange(0, TOKENS * HP)
    index = tile + row // HP
    token = first_token + index
    live = (index < chunk) & (token < t) & (row % HP < H)
    head = g * H + row % HP
    q_tile = gather_rows(q + b * q_b, token, head * q_n, live, q_t, D_K, DK)
    start = tl.load(key_start + b * t + token, mask=live, other=0)
    end = tl.load(key_end + b * t + token, mask=live, other=0)
    lse2 = tl.load(lse + (b * t + token) * n + head, mask=live, other=float("inf")).to(tl.float32) * LOG2E
    lse2 = tl.where(live & (start < end) & (lse2 > float("-inf")), lse2, float("inf"))
    k += b * k_b + g * k_g
    mine = tl.arange(0, TOKENS)
    slot = (b * chunk + tile + mine) * n_groups + g
    stored = (tile + mine < chunk) & (first_token + tile + mine < t)
    if PACKED:
        own_start = tl.load(key_start + b * t + first_token + tile + mine, mask=stored, other=0)
        before = -1
        for i in tl.range(0, TOKENS):
            here = first_token + tile + i
            begin = tl.load(key_start + b * t + here, mask=(tile + i < chunk) & (here < t), other=-1)
            run_end = tl.where(start == begin, end, 0)
            count = tl.where(begin == before, 0, tl.maximum(tl.max(run_end, 0) - begin, 0))
            _score_blocks(
                own_out, next_out, q_tile, k, begin, run_end, lse2, 0, tl.cdiv(count, A), slot,
                stored & (own_start == begin), scale2, k_s, blocks, A, M, HP, TOKENS, D_K, DK, BN, True,
            )  # fmt: skip
            before = begin
    else:
        visible = tl.max(end, 0)
        whole = tl.min(tl.where(live, end, visible), 0) // (A * BN) * BN
        _score_blocks(
            own_out, next_out, q_tile, k, 0, end, lse2, 0, whole, slot, stored, scale2, k_s, blocks,
            A, M, HP, TOKENS, D_K, DK, BN, False,
        )  # fmt: skip
        _score_blocks(
            own_out, next_out, q_tile, k, 0, end, lse2, whole, tl.cdiv(visible, A), slot, stored, scale2, k_s, blocks,
            A, M, HP, TOKENS, D_K, DK, BN, True,
        )  # fmt: skip


@triton.jit
def _candidate_keys(
    own, after, row, block, count, last, blocks, A: tl.constexpr, M: tl.constexpr, INIT: tl.constexpr,
    LOCAL: tl.constexpr,
):  # fmt: skip
    """int64 keys that order blocks by (score descending, index ascending); forced ones highest, no candidate -1."""
    score = tl.load(own + row * blocks + block, mask=(block * A < count) & (block < blocks), other=0.0)
    if M > 1:
        score += tl.load(
            after + row * blocks + block - 1,
            mask=(block > 0) & ((block - 1) * A < count) & (block <= blocks),
            other=0.0,
        )
    score = tl.where(score == score, tl.maximum(score, 0.0), 0.0)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where((block < INIT) | (block > last - LOCAL), 0x7FFFFFFF, bits)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)
    return tl.where(block <= last, key, -1)


@triton.jit
def _top_blocks_kernel(
    own, after, position, key_start, key_end, block_indices, first_token, chunk, t, n_groups, blocks, candidates,
    N: tl.constexpr, L_SEL: tl.constexpr, A: tl.constexpr, M: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """The N highest blocks of a query and group, ascending, from PIECES * WIDTH >= candidates blocks."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = first_token + tl.program_id(0)
    pos = tl.load(position + b * t + token)
    count = tl.load(key_end + b * t + token) - tl.load(key_start + b * t + token)
    last = tl.where(pos >= 0, tl.minimum(pos // L_SEL, candidates - 1), -1)
    row = (b * chunk + tl.program_id(0)) * n_groups + g
    lane = tl.arange(0, WIDTH)
    limit = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    if PIECES == 1:
        keys = _candidate_keys(own, after, row, lane, count, last, blocks, A, M, INIT, LOCAL)
        for _ in tl.range(0, N):
            limit = tl.max(tl.where(keys < limit, keys, -1), 0)
    else:
        for _ in tl.range(0, N):
            best = tl.full([], -1, tl.int64)
            for piece in tl.range(0, PIECES):
                keys = _candidate_keys(own, after, row, piece * WIDTH + lane, count, last, blocks, A, M, INIT, LOCAL)
                best = tl.maximum(best, tl.max(tl.where(keys < limit, keys, -1), 0))
            limit = best
    limit = tl.maximum(limit, 0)
    out = block_indices + ((b * t + token) * n_groups + g) * N
    taken = 0
    for piece in tl.range(0, PIECES):
        block = piece * WIDTH + lane
        keys = _candidate_keys(own, after, row, block, count, last, blocks, A, M, INIT, LOCAL)
        chosen = keys >= limit
        place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out + place, block, mask=chosen & (place < N))
        taken += tl.sum(chosen.to(tl.int32), 0)
    rest = tl.arange(0, NP)
    tl.store(out + rest, tl.full([NP], -1, tl.int32), mask=(rest >= taken) & (rest < N))


SCRATCH = 64 * 2**20
"""Bytes that the scores of one chunk of queries may take."""


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, l: int, d: int, l_sel: int, n_sel: int, init_blocks: int, local_blocks: int,
    q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float, scratch: int = SCRATCH,
) -> Tensor:  # fmt: skip
    """The blocks each query and group attends to: int32 [b, t, g, n_sel], ascending, -1 in unused slots."""
    q, k_cmp, lse = row_major(q), row_major(k_cmp), lse.contiguous()
    (b, t, n, d_k), (c, g) = q.shape, k_cmp.shape[1:3]
    h, DK, A, M = n // g, padded(d_k), l_sel // d, l // d
    tokens_in_keys = c * d + l - 1 if q_start is not None else t
    blocks = max(1, triton.cdiv(tokens_in_keys, l_sel))
    intervals = compressed_intervals(q, c, l, d, q_start, cu_seqlens)
    position = query_places(q, 2**31 - 1, q_start, cu_seqlens).position
    indices = torch.empty(b, t, g, n_sel, dtype=torch.int32, device=q.device)
    HP = padded(h, 1)
    bytes_per_row = DK * q.element_size()
    tokens = max(1, (64 if bytes_per_row <= 512 else 16) // HP)
    BN = 64 if bytes_per_row <= 256 else 32 if bytes_per_row <= 512 else 16
    chunk = max(tokens, scratch // (8 * b * g * blocks) // tokens * tokens)
    chunk = min(chunk, triton.cdiv(t, tokens) * tokens)
    own, after = (torch.empty(b, chunk, g, blocks, dtype=torch.float32, device=q.device) for _ in range(2))
    for first in range(0, t, chunk):
        size = min(chunk, t - first)
        _block_scores_kernel[(triton.cdiv(size, tokens), g, b)](
            q, k_cmp, *intervals, lse, own, after, scale * LOG2E.value, first, chunk, t, n, g, blocks,
            *q.stride()[:3], *k_cmp.stride()[:3],
            H=h, HP=HP, A=A, M=M, D_K=d_k, DK=DK, TOKENS=tokens, BN=BN, PACKED=cu_seqlens is not None,
            num_warps=4, num_stages=2 if bytes_per_row <= 256 else 1,
        )  # fmt: skip
        candidates = blocks if q_start is not None else triton.cdiv(first + size, l_sel)
        width = min(2048, padded(candidates, 32))
        _top_blocks_kernel[(size, g, b)](
            own, after, position, *intervals, indices, first, chunk, t, g, blocks, candidates,
            N=n_sel, L_SEL=l_sel, A=A, M=M, INIT=init_blocks, LOCAL=local_blocks,
            WIDTH=width, PIECES=triton.cdiv(candidates, width), NP=padded(n_sel, 1), num_warps=1 if width <= 1024 else 4,
        )  # fmt: skip
    return indices
