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
from nsa_compile.custom_ops.kernels.tiles import LOG2E, aligned, dot, gather_rows, key_tiles, load_keys, padded, row_major


@triton.jit
def _score_blocks(
    own_out, next_out, q, k, k_tiles, start, end, lse2, last, slot, live, scale2, b, g, blocks, k_s,
    A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr, HP: tl.constexpr, TOKENS: tl.constexpr,
    D_K: tl.constexpr, DK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store own[j] and next[j] of blocks 0 … last - 1 of a sequence whose compressed tokens begin at `start`.

    Keys are the rows of a tile and heads its columns, so that most of the sum over heads is within a thread.
    """
    row, r = tl.arange(0, BN), tl.arange(0, AP)
    own_weight = tl.where(r < A, tl.minimum(A - r, M), 0).to(tl.float32)[None, :, None]
    next_weight = tl.where(r < A, M - tl.minimum(A - r, M), 0).to(tl.float32)[None, :, None]
    for j in tl.range(0, last, BN // AP):
        i = start + (j + row // AP) * A + row % AP
        if A == AP:
            k_tile = load_keys(k_tiles, b, g, start + j * A, BN, DK)
        else:
            k_tile = gather_rows(k, i, 0 * i, (row % AP < A) & (i < tl.max(end, 0)), k_s, D_K, DK)
        p = tl.exp2(dot(k_tile, tl.trans(q)) * scale2 - lse2[None, :])
        p = tl.sum(p.reshape(BN, TOKENS, HP), 2)
        p = tl.where(i[:, None] < end[None, :], p, 0.0).reshape(BN // AP, AP, TOKENS)
        block = j + tl.arange(0, BN // AP)
        mask = live[None, :] & (block < last)[:, None]
        out = slot[None, :] * blocks + block[:, None]
        tl.store(own_out + out, tl.sum(p * own_weight, 1), mask=mask)
        if M > 1:
            tl.store(next_out + out, tl.sum(p * next_weight, 1), mask=mask)


@triton.jit
def _block_scores_kernel(
    q, k, k_tiles, key_start, key_end, lse, own_out, next_out, scale2, first_token, chunk, t, n, n_groups, blocks,
    q_b, q_t, q_n, k_b, k_s, k_g,
    H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, M: tl.constexpr,
    D_K: tl.constexpr, DK: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
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
    lse2 = tl.load(lse + (b * t + token) * n + head, mask=live, other=float("-inf")) * LOG2E
    lse2 = tl.where(lse2 > float("-inf"), lse2, float("inf"))
    mine = tile + tl.arange(0, TOKENS)
    stored = (mine < chunk) & (first_token + mine < t)
    slot = (b * chunk + mine) * n_groups + g
    start = tl.load(key_start + b * t + first_token + mine, mask=stored, other=0)
    end = tl.load(key_end + b * t + first_token + mine, mask=stored, other=0)
    k += b * k_b + g * k_g
    if PACKED:
        before = -1
        for i in tl.range(0, TOKENS):
            begin = tl.max(tl.where(mine == tile + i, tl.where(stored, start, -1), -1), 0)
            here = stored & (start == begin)
            visible = tl.max(tl.where(here, end, 0), 0) - begin
            count = tl.where(begin == before, 0, tl.maximum(visible, 0))
            _score_blocks(
                own_out, next_out, q_tile, k, k_tiles, begin, end, lse2, tl.cdiv(count, A), slot, here, scale2, b, g,
                blocks, k_s, A, AP, M, HP, TOKENS, D_K, DK, BN,
            )  # fmt: skip
            before = begin
    else:
        _score_blocks(
            own_out, next_out, q_tile, k, k_tiles, 0, end, lse2, tl.cdiv(tl.max(end, 0), A), slot, stored, scale2, b, g,
            blocks, k_s, A, AP, M, HP, TOKENS, D_K, DK, BN,
        )  # fmt: skip


@triton.jit
def _candidate_keys(
    own, after, block, count, last, A: tl.constexpr, M: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr
):
    """int64 keys that order blocks by (score descending, index ascending); forced ones highest, no candidate -1."""
    score = tl.load(own + block, mask=(block <= last) & (block * A < count), other=0.0)
    if M > 1:
        before = block - 1
        score += tl.load(after + before, mask=(block <= last) & (block > 0) & (before * A < count), other=0.0)
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
    """The N highest blocks of a query and group, ascending, from PIECES * WIDTH >= candidates blocks.

    They lie within the N best of the runs of RUN blocks, a run being as good as its best block.
    """
    RUN: tl.constexpr = 4
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = first_token + tl.program_id(0)
    pos = tl.load(position + b * t + token)
    count = tl.load(key_end + b * t + token) - tl.load(key_start + b * t + token)
    last = tl.where(pos >= 0, tl.minimum(pos // L_SEL, candidates - 1), -1)
    row = (b * chunk + tl.program_id(0)) * n_groups + g
    own += row * blocks
    after += row * blocks
    slot, inside = tl.arange(0, NP), tl.arange(0, RUN)[None, :]
    lane = tl.arange(0, WIDTH // RUN)[:, None] * RUN + inside

    runs = tl.zeros([NP], tl.int32)
    limit = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    if PIECES == 1:
        best = tl.max(_candidate_keys(own, after, lane, count, last, A, M, INIT, LOCAL), 1)
        for i in tl.range(0, N):
            limit = tl.max(tl.where(best < limit, best, -1), 0)
            runs = tl.where(slot == i, (limit & 0xFFFFFFFF).to(tl.int32), runs)
    else:
        for i in tl.range(0, N):
            top = tl.full([], -1, tl.int64)
            for piece in tl.range(0, PIECES):
                keys = _candidate_keys(own, after, piece * WIDTH + lane, count, last, A, M, INIT, LOCAL)
                best = tl.max(keys, 1)
                top = tl.maximum(top, tl.max(tl.where(best < limit, best, -1), 0))
            limit = top
            runs = tl.where(slot == i, (limit & 0xFFFFFFFF).to(tl.int32), runs)
    runs = tl.where((slot < N) & (runs >= 0), (0x7FFFFFFF - runs) // RUN, last // RUN + 1)

    keys = _candidate_keys(own, after, runs[:, None] * RUN + inside, count, last, A, M, INIT, LOCAL).reshape(NP * RUN)
    chosen = tl.full([NP], 0x7FFFFFFF, tl.int32)
    limit = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in tl.range(0, N):
        limit = tl.max(tl.where(keys < limit, keys, -1), 0)
        block = tl.where(limit < 0, 0x7FFFFFFF, 0x7FFFFFFF - (limit & 0x7FFFFFFF)).to(tl.int32)
        chosen = tl.where(slot == i, block, chosen)
    place = tl.sum((chosen[None, :] < chosen[:, None]).to(tl.int32), 1)
    out = block_indices + ((b * t + token) * n_groups + g) * N
    some = chosen < 0x7FFFFFFF
    tl.store(out + place, chosen, mask=some)
    tl.store(out + slot, tl.full([NP], -1, tl.int32), mask=(slot < N) & (slot >= tl.sum(some.to(tl.int32), 0)))


TUNE=None
SCRATCH = 64 * 2**20
"""Bytes that the scores of one chunk of queries may take."""


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
    HP = padded(h, 1)
    bytes_per_row = DK * q.element_size()
    tokens = max(1, (64 if bytes_per_row <= 512 else 16) // HP)
    AP = padded(A, 1)
    keys = max(AP, TUNE[0] if TUNE else 64 if bytes_per_row <= 512 else 32)
    chunk = max(tokens, scratch // (8 * b * g * blocks) // tokens * tokens)
    chunk = min(chunk, triton.cdiv(t, tokens) * tokens)
    own, after = (torch.empty(b, chunk, g, blocks, dtype=torch.float32, device=q.device) for _ in range(2))
    for first in range(0, t, chunk):
        size = min(chunk, t - first)
        _block_scores_kernel[(triton.cdiv(size, tokens), g, b)](
            q, k_cmp, key_tiles(k_cmp, keys, DK), *intervals, lse, own, after, scale * LOG2E.value, first, chunk, t, n,
            g, blocks, *q.stride()[:3], *k_cmp.stride()[:3],
            H=h, HP=HP, A=A, AP=AP, M=M, D_K=d_k, DK=DK, TOKENS=tokens, BN=keys, PACKED=cu_seqlens is not None,
            num_warps=4, num_stages=TUNE[1] if TUNE else 2 if bytes_per_row <= 256 else 1,
        )  # fmt: skip
        candidates = blocks if q_start is not None else triton.cdiv(first + size, l_sel)
        width = min(8192, padded(candidates, 128))
        _top_blocks_kernel[(size, g, b)](
            own, after, position, *intervals, indices, first, chunk, t, g, blocks, candidates,
            N=n_sel, L_SEL=l_sel, A=A, M=M, INIT=init_blocks, LOCAL=local_blocks,
            WIDTH=width, PIECES=triton.cdiv(candidates, width), NP=padded(n_sel, 1), num_warps=max(1, width // 1024),
        )  # fmt: skip
    return indices
