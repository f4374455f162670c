"""A decode step of up to 8 tokens per row over static caches, in six launches, none of which knows a length.

Append (rotate q and keys, write every cache, emit the compressed tokens that are due) | scan the compressed tokens and
the window in splits | scores of blocks | choice | attend to the chosen blocks in splits | merge splits and branches.
Row b was given positions[b] tokens before the step and is given `count[b]` <= t more. Those past the capacity are kept
nowhere and give NaN, but positions count them. Buffers are contiguous [b, length, g, channels], token p at index
p % length. LSEs are in base 2.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.block_choice import choose_blocks
from nsa_compile.custom_ops.kernels.tiles import (
    LOG2E,
    check_grid,
    dot,
    finite,
    gather_rows,
    is_finite,
    padded,
    row_major,
    scatter_rows,
)


class Splits(NamedTuple):
    """Programs that share the keys of one row and group, per branch."""

    cmp: int
    win: int
    slc: int


@triton.jit
def _tokens_given(count, b, T: tl.constexpr, HAS_COUNT: tl.constexpr):
    """How many of the T new tokens a row is given, room or not."""
    return tl.minimum(tl.maximum(tl.load(count + b), 0), T) if HAS_COUNT else T


@triton.jit
def _tokens_of_row(positions, count, b, capacity, T: tl.constexpr, HAS_COUNT: tl.constexpr):
    """Tokens that a row holds before the step, and how many of the new ones it has room for."""
    held = tl.minimum(tl.maximum(tl.load(positions + b), 0), capacity)
    return held, tl.minimum(_tokens_given(count, b, T, HAS_COUNT), capacity - held)


@triton.jit
def _num_cmp(tokens, L: tl.constexpr, D: tl.constexpr):
    return tl.where(tokens >= L, (tokens - L) // D + 1, 0)


@triton.jit
def _rotate(first, second, position, LOG2_THETA: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """RoPE of halves [rows, HALF] of rows of WIDTH channels at int [rows] or, where all rows share it, [1].

    Quarter turns are counted in fp64, and their fraction kept. Polynomials give its sine and cosine to 1e-7, without
    the memory that the general functions take.
    """
    i = tl.arange(0, HALF)
    frequency = tl.full([HALF], 0.6366197723675814, tl.float64)
    for bit in tl.static_range(16):  # theta^(-2i / WIDTH) by the bits of i
        if 2**bit < HALF:
            factor = tl.full([HALF], 2.0 ** (-2.0 / WIDTH * LOG2_THETA * 2**bit), tl.float64)
            frequency = tl.where((i >> bit) & 1 != 0, frequency * factor, frequency)
    turns = position.to(tl.float64)[:, None] * frequency[None, :]
    nearest = tl.floor(turns + 0.5)
    angle = (turns - nearest).to(tl.float32) * 1.5707963267948966
    square = angle * angle
    sin = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * angle + angle
    cos = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cos = (cos * square - 0.5) * square + 1.0
    quarter = nearest.to(tl.int64)
    odd = quarter & 1 != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cos = tl.where((quarter + 1) & 2 != 0, -cos, cos)
    sin = tl.where(quarter & 2 != 0, -sin, sin)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _append(
    source, cache, read, b, g, n_groups, length, positions, count, capacity, T: tl.constexpr, TP: tl.constexpr,
    WIDTH: tl.constexpr, COLS: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """Copy the tokens that a row takes of the T at `read` int64 [TP]; they are loaded before their number is known."""
    i = tl.arange(0, TP)
    value = gather_rows(source, read, 0 * i, i < T, 1, WIDTH, COLS)
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    at = (b * length + (held + i) % length) * n_groups + g
    scatter_rows(cache, value, at, 0 * i, i < new, WIDTH, WIDTH, COLS)


@triton.jit
def _append_rotated(
    source, cache, read, write, rows, token, length, b, n_groups, positions, count, capacity, LOG2_THETA: tl.constexpr,
    T: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """Rotate `rows` rows of a token at `read`, loaded before its position is known, to the rows that begin at `write`.

    Both are int64 [ROWS]; a cache holds `length` tokens, `rotated` is as one of 1.
    """
    PART: tl.constexpr = WIDTH // 2
    live = tl.arange(0, ROWS) < rows
    first = gather_rows(source, read, 0 * read, live, 1, PART, HALF).to(tl.float32)
    second = gather_rows(source + PART, read, 0 * read, live, 1, PART, HALF).to(tl.float32)
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    first, second = _rotate(first, second, held + token + tl.arange(0, 1), LOG2_THETA, WIDTH, HALF)
    live, write = live & (token < new), write + (held + token) % length * n_groups
    scatter_rows(cache, first, write, 0 * write, live, WIDTH, PART, HALF)
    scatter_rows(cache + PART, second, write, 0 * write, live, WIDTH, PART, HALF)


@triton.jit
def _mean_of_block(
    new, ring, first, held, new_t, ring_s, length, L: tl.constexpr, LP: tl.constexpr, WIDTH: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Mean [1, COLS] of the tokens first … first + L - 1, of which those from `held` on are new."""
    token, inside = first + tl.arange(0, LP), tl.arange(0, LP) < L
    old = gather_rows(ring, token % length, 0 * token, inside & (token < held), ring_s, WIDTH, COLS)
    fresh = gather_rows(new, token - held, 0 * token, inside & (token >= held), new_t, WIDTH, COLS)
    return (tl.sum(old.to(tl.float32) + fresh.to(tl.float32), 0) / L).to(ring.dtype.element_ty).to(tl.float32)[None, :]


@triton.jit
def _emit(
    source, emitted, raw, cache, positions, count, capacity, b, g, n_groups, slots, tail, x_b, x_t, x_g,
    LOG2_THETA: tl.constexpr, T: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    COLS: tl.constexpr, HAS_COUNT: tl.constexpr, ROTATED: tl.constexpr, EMITTED: tl.constexpr,
):  # fmt: skip
    """Write φ of the blocks that the new tokens complete, if any: their mean or, if EMITTED, what is given."""
    BLOCKS: tl.constexpr = (T + D - 1) // D
    PART: tl.constexpr = WIDTH // 2 if ROTATED else WIDTH
    source += b * x_b + g * x_g
    raw += (b * tail * n_groups + g) * WIDTH
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    due, one = _num_cmp(held, L, D), tl.arange(0, 1)
    for block in tl.range(due, tl.minimum(_num_cmp(held + new, L, D), slots)):
        some = one == 0
        given = ((b * BLOCKS + block - due) * n_groups + g) * WIDTH + one
        at = (b * slots + block) * n_groups + g + one
        if EMITTED:
            first = gather_rows(emitted, given, 0 * given, some, 1, PART, COLS).to(tl.float32)
        else:
            first = _mean_of_block(source, raw, block * D, held, x_t, n_groups * WIDTH, tail, L, LP, PART, COLS)
        if ROTATED:
            if EMITTED:
                second = gather_rows(emitted + PART, given, 0 * given, some, 1, PART, COLS).to(tl.float32)
            else:
                second = _mean_of_block(
                    source + PART, raw + PART, block * D, held, x_t, n_groups * WIDTH, tail, L, LP, PART, COLS
                )
            first, second = _rotate(first, second, block * D + L - 1 + one, LOG2_THETA, WIDTH, COLS)
            scatter_rows(cache + PART, second, at, 0 * at, some, WIDTH, PART, COLS)
        scatter_rows(cache, first, at, 0 * at, some, WIDTH, PART, COLS)


@triton.jit
def _decode_append_kernel(
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, k_emitted, v_emitted, count, positions,
    cached_k_cmp, cached_v_cmp, k_raw, v_raw, cached_k_slc, cached_v_slc, cached_k_win, cached_v_win, rotated,
    capacity, slots, tail, ring, n, n_groups, q_b, q_t, q_n, kc_b, kc_t, kc_g, vc_b, vc_t, vc_g,
    ks_b, ks_t, ks_g, vs_b, vs_t, vs_g, kw_b, kw_t, kw_g, vw_b, vw_t, vw_g,
    T: tl.constexpr, TP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    D: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, HALF: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr,
    LOG2_THETA: tl.constexpr, HAS_COUNT: tl.constexpr, EMITTED: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """Work of one kind by program_id(0): φ of the blocks due, values or raw keys copied to a cache, a token rotated.

    With EMITTED, φ is given [b, ceil(T / D), g, *], else it is the mean. q goes rotated to `rotated` [b, T, n, D_K].
    """
    BRANCHES: tl.constexpr = 2 if TIED else 3  # of values; and of what is rotated: q, keys, those of the window
    part, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, one = tl.arange(0, TP), tl.cast(1, tl.int32)
    if part == 0:
        _emit(
            k_cmp, k_emitted, k_raw, cached_k_cmp, positions, count, capacity, b, g, n_groups, slots, tail,
            kc_b, kc_t, kc_g, LOG2_THETA, T, L, LP, D, D_K, HALF, HAS_COUNT, True, EMITTED,
        )  # fmt: skip
    elif part == 1:
        _emit(
            v_cmp, v_emitted, v_raw, cached_v_cmp, positions, count, capacity, b, g, n_groups, slots, tail,
            vc_b, vc_t, vc_g, LOG2_THETA, T, L, LP, D, D_V, DV, HAS_COUNT, False, EMITTED,
        )  # fmt: skip
    elif part == 2:
        read = b * kc_b + i * kc_t + g * kc_g
        _append(k_cmp, k_raw, read, b, g, n_groups, tail, positions, count, capacity, T, TP, D_K, DK, HAS_COUNT)
    elif part < 3 + BRANCHES:
        if part == 3:
            source, cache, length, read = v_cmp, v_raw, one * tail, b * vc_b + i * vc_t + g * vc_g
        elif part == 4:
            source, cache, length, read = v_slc, cached_v_slc, one * capacity, b * vs_b + i * vs_t + g * vs_g
        else:
            source, cache, length, read = v_win, cached_v_win, one * ring, b * vw_b + i * vw_t + g * vw_g
        _append(source, cache, read, b, g, n_groups, length, positions, count, capacity, T, TP, D_V, DV, HAS_COUNT)
    else:
        kind, token = (part - 3 - BRANCHES) % BRANCHES, (part - 3 - BRANCHES) // BRANCHES
        head = tl.arange(0, HP)
        if kind == 0:
            source, cache, length, rows = q, rotated, one, one * H
            start = b * q_b + token * q_t + (g * H + head) * q_n
            write = (b * T + token) * n + g * H + head
        elif kind == 1:
            source, cache, length, rows = k_slc, cached_k_slc, one * capacity, one
            start = b * ks_b + token * ks_t + g * ks_g + 0 * head
            write = b * capacity * n_groups + g + 0 * head
        else:
            source, cache, length, rows = k_win, cached_k_win, one * ring, one
            start = b * kw_b + token * kw_t + g * kw_g + 0 * head
            write = b * ring * n_groups + g + 0 * head
        _append_rotated(
            source, cache, start, write, rows, token, length, b, n_groups, positions, count, capacity,
            LOG2_THETA, T, D_K, HALF, HP, HAS_COUNT,
        )  # fmt: skip


@triton.jit
def _attend_tile(acc, top, total, q, k, v, seen, scale2, CAREFUL: tl.constexpr):
    """One step of the online softmax over a tile of keys, of which `seen` bool [rows, keys] are seen.

    Returns acc, top, total, and of this tile `exp2(scores - highest)` with the highest score of each row. If CAREFUL,
    NaN in values that some rows do not see is kept from these.
    """
    scores = tl.where(seen, dot(q, tl.trans(k)) * scale2, float("-inf"))
    highest = tl.max(scores, 1)
    p = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    new_top = tl.maximum(top, highest)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay, share = tl.exp2(top - base), tl.exp2(highest - base)
    total = total * decay + tl.sum(p, 1) * share
    if CAREFUL:
        p = tl.where(seen, p, 0.0)
        broken = tl.max(tl.where(seen, tl.max(tl.where(is_finite(v), 0, 1), 1)[None, :], 0), 1)
        v = finite(v)
        acc = tl.where(broken[:, None] > 0, float("nan"), acc)
    acc = acc * decay[:, None] + dot(p.to(v.dtype), v) * share[:, None]
    return acc, new_top, total, p, highest


@triton.jit
def _store_part(
    part_o, part_lse, acc, top, total, slot, inside, split, empty, SPLITS: tl.constexpr, D_V: tl.constexpr,
    DV: tl.constexpr,
):  # fmt: skip
    """Store attention [rows, DV] and LSE of one split of the rows at `slot` int64 [rows].

    Where no key is there is no output, and the LSE is `empty`.
    """
    at = slot * SPLITS + split
    some = total != 0.0
    scatter_rows(part_o, acc / tl.where(some, total, 1.0)[:, None], at, 0 * at, inside & some, D_V, D_V, DV)
    tl.store(part_lse + at, tl.where(some, top + tl.log2(total), empty), mask=inside)


@triton.jit
def _decode_scan_kernel(
    q, k_cmp, v_cmp, k_win, v_win, count, positions, folded, spilled, tops, part_o, part_lse, scale2,
    capacity, slots, ring, n, n_groups,
    T: tl.constexpr, H: tl.constexpr, L: tl.constexpr, D: tl.constexpr, W: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    ROW_TILES: tl.constexpr, SPLIT_CMP: tl.constexpr, SPLIT_WIN: tl.constexpr, SPLITS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """One split of the compressed tokens or, from SPLIT_CMP on, of the window, for BM rows (token * H + head).

    A tile is BLOCKS * A keys: of compressed tokens those that begin in BLOCKS selection blocks. Of these
    `exp2(scores - tops[tile])`, summed with their overlap with their own block, goes to `folded`, with that with the
    next block to `spilled`, both fp32 [b, T, n, TILES * BLOCKS].
    """
    STEP: tl.constexpr = BLOCKS * A
    split, g, b = tl.program_id(0), tl.program_id(1) // ROW_TILES, tl.program_id(2).to(tl.int64)
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    row = tl.program_id(1) % ROW_TILES * BM + tl.arange(0, BM)
    token, head = row // H, g * H + row % H
    live, own = token < new, held + token
    slot = (b * T + token) * n + head
    q_tile = gather_rows(q, slot, 0 * slot, live, D_K, D_K, DK)
    folds = split < SPLIT_CMP
    if folds:
        k, v, length = k_cmp, v_cmp, tl.cast(slots, tl.int32)
        low, high = 0 * own, tl.where(live, _num_cmp(own + 1, L, D), 0)
        most = tl.minimum(tl.max(high, 0), slots)
        share = tl.cdiv(tl.cdiv(most, STEP), SPLIT_CMP) * STEP
        first = split * share
        origin, end = first, tl.minimum(first + share, most)
    else:
        k, v, length = k_win, v_win, tl.cast(ring, tl.int32)
        low, high = own - W + 1, tl.where(live, own + 1, 0)
        SHARE: tl.constexpr = ((W + T - 1 + STEP - 1) // STEP + SPLIT_WIN - 1) // SPLIT_WIN * STEP
        first = tl.maximum(held - W + 1, 0) + (split - SPLIT_CMP) * SHARE
        origin, end = first % ring, tl.minimum(first + SHARE, held + new)
    k += (b * length * n_groups + g) * D_K
    v += (b * length * n_groups + g) * D_V
    r = tl.arange(0, BLOCKS * AP) % AP
    inside = tl.arange(0, BLOCKS * AP) // AP * A + r
    own_block = tl.where(r < A, tl.minimum(A - r, M), 0)
    next_block = tl.where(r < A, M - own_block, 0)
    acc = tl.zeros([BM, DV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(first, end, STEP):
        i = start + inside
        ok = (r < A) & (i < end)
        place = origin + (i - first)
        place = tl.where(place < length, place, place - length)
        k_tile = gather_rows(k, place, 0 * place, ok, n_groups * D_K, D_K, DK)
        v_tile = gather_rows(v, place, 0 * place, ok, n_groups * D_V, D_V, DV)
        seen = ok[None, :] & (i[None, :] >= low[:, None]) & (i[None, :] < high[:, None])
        acc, top, total, p, highest = _attend_tile(acc, top, total, q_tile, k_tile, v_tile, seen, scale2, T > 1)
        tile = start // STEP
        at = slot[:, None] * (TILES * BLOCKS) + (tile * BLOCKS + tl.arange(0, BLOCKS))[None, :]
        sums = tl.sum((p * own_block[None, :]).reshape(BM, BLOCKS, AP), 2)
        tl.store(folded + at, sums, mask=(live & folds)[:, None])
        if M > 1:
            sums = tl.sum((p * next_block[None, :]).reshape(BM, BLOCKS, AP), 2)
            tl.store(spilled + at, sums, mask=(live & folds)[:, None])
        tl.store(tops + slot * TILES + tile, highest, mask=live & folds)
    _store_part(part_o, part_lse, acc, top, total, slot, token < T, split, float("-inf"), SPLITS, D_V, DV)


@triton.jit
def _decode_scores_kernel(
    folded, spilled, tops, part_lse, scores, count, positions, capacity, n, n_groups, width,
    T: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, L: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    M: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, BJ: tl.constexpr, SPLIT_CMP: tl.constexpr,
    SP: tl.constexpr, SPLITS: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """Scores fp32 [b, T, g, width] of blocks: probabilities summed over a group's heads."""
    g, b, token = tl.program_id(1), (tl.program_id(2) // T).to(tl.int64), tl.program_id(2) % T
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    own = held + token
    block = tl.program_id(0) * BJ + tl.arange(0, BJ)
    if (token < new) & (tl.program_id(0) * BJ * (A * D) <= own):
        tiles = tl.cdiv(_num_cmp(own + 1, L, D), BLOCKS * A)
        head = tl.arange(0, HP)
        slot = (b * T + token) * n + g * H + head
        split = tl.arange(0, SP)[None, :]
        there = (head[:, None] < H) & (split < SPLIT_CMP)
        lse = tl.load(part_lse + slot[:, None] * SPLITS + split, mask=there, other=float("-inf"))
        highest = tl.max(lse, 1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        lse = highest + tl.log2(tl.sum(tl.exp2(lse - highest[:, None]), 1))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        total = tl.zeros([HP, BJ], tl.float32)
        for back in tl.static_range(2 if M > 1 else 1):
            j = block - back
            there = (head[:, None] < H) & ((j >= 0) & (j < tiles * BLOCKS))[None, :]
            top = tl.load(tops + slot[:, None] * TILES + j[None, :] // BLOCKS, mask=there, other=float("-inf"))
            sums = folded if back == 0 else spilled
            value = tl.load(sums + slot[:, None] * (TILES * BLOCKS) + j[None, :], mask=there, other=0.0)
            total += value * tl.exp2(tl.minimum(top - lse[:, None], 0.0))
        tl.store(scores + ((b * T + token) * n_groups + g) * width + block, tl.sum(total, 0), mask=block < width)


@triton.jit
def _decode_choice_kernel(
    scores, block_indices, nominal_reads, actual_reads, count, positions, capacity, n_groups, width,
    T: tl.constexpr, L: tl.constexpr, D: tl.constexpr, L_SEL: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, W: tl.constexpr, TEAMS: tl.constexpr, TEAM: tl.constexpr,
    HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """The blocks of one query and group; the last query of a row also counts its reads, 0 where the row is idle."""
    token, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    own = held + token
    last = tl.where(token < new, own // L_SEL, -1)
    at = (b * T + token) * n_groups + g
    chosen = choose_blocks(
        scores + at * width, 0, last, block_indices + at * N, N, NP, 0, 1, 1, INIT, LOCAL, True, TEAMS, TEAM, 4
    )
    if token == tl.maximum(new - 1, 0):
        size = tl.minimum(own + 1 - chosen * L_SEL, L_SEL)
        branch = tl.arange(0, 4)
        cmp, win = _num_cmp(own + 1, L, D), tl.minimum(own + 1, W)
        slc = tl.sum(tl.where(chosen >= 0, size, 0), 0)
        actual = tl.where(branch == 0, cmp, tl.where(branch == 1, slc, tl.where(branch == 2, win, cmp + slc + win)))
        tl.store(actual_reads + (b * n_groups + g) * 4 + branch, tl.where(new > 0, actual, 0).to(tl.int64))
        slc = N * L_SEL
        nominal = tl.where(branch == 0, cmp, tl.where(branch == 1, slc, tl.where(branch == 2, win, cmp + slc + win)))
        mask = (branch >= 0) & (g == 0)
        tl.store(nominal_reads + b * 4 + branch, tl.where(new > 0, nominal, 0).to(tl.int64), mask=mask)


@triton.jit
def _decode_selected_kernel(
    q, k, v, block_indices, count, positions, part_o, part_lse, scale2, capacity, n, n_groups,
    T: tl.constexpr, H: tl.constexpr, L_SEL: tl.constexpr, N: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FIRST_SPLIT: tl.constexpr,
    SPLIT_SLC: tl.constexpr, SHARE_P: tl.constexpr, SPLITS: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """One split of the chosen blocks of one query and group; the heads are the rows."""
    split, g = tl.program_id(0), tl.program_id(1)
    b, token = (tl.program_id(2) // T).to(tl.int64), tl.program_id(2) % T
    held, new = _tokens_of_row(positions, count, b, capacity, T, HAS_COUNT)
    own = held + token
    head = tl.arange(0, BM)
    live = (head < H) & (token < new)
    slot = (b * T + token) * n + g * H + head
    q_tile = gather_rows(q, slot, 0 * slot, live, D_K, D_K, DK)
    k += (b * capacity * n_groups + g) * D_K
    v += (b * capacity * n_groups + g) * D_V
    block_indices += ((b * T + token) * n_groups + g) * N
    acc = tl.zeros([BM, DV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    SHARE: tl.constexpr = (N + SPLIT_SLC - 1) // SPLIT_SLC
    PIECES: tl.constexpr = (L_SEL + BN - 1) // BN
    mine = tl.arange(0, SHARE_P)  # loaded at once, so that no load of keys waits for another in the loop
    chosen = split * SHARE + mine
    blocks = tl.load(block_indices + chosen, mask=(mine < SHARE) & (chosen < N), other=-1)
    for i in tl.range(0, tl.minimum(SHARE, N - split * SHARE) * PIECES):
        block = tl.max(tl.where(mine == i // PIECES, blocks, -1), 0)
        inside = i % PIECES * BN + tl.arange(0, BN)
        key = block * L_SEL + inside
        ok = (block >= 0) & (inside < L_SEL) & (key <= own) & (token < new)
        k_tile = gather_rows(k, key, 0 * key, ok, n_groups * D_K, D_K, DK)
        v_tile = gather_rows(v, key, 0 * key, ok, n_groups * D_V, D_V, DV)
        seen = ok[None, :] & live[:, None]
        acc, top, total, _, _ = _attend_tile(acc, top, total, q_tile, k_tile, v_tile, seen, scale2, False)
    # a token without room sees no key; the merge makes NaN of it
    lost = (token >= new) & (token < _tokens_given(count, b, T, HAS_COUNT))
    empty = tl.where(lost, float("nan"), float("-inf"))
    _store_part(part_o, part_lse, acc, top, total, slot, head < H, FIRST_SPLIT + split, empty, SPLITS, D_V, DV)


@triton.jit
def _decode_merge_kernel(
    part_o, part_lse, gates, o, count, positions, n, g_b, g_t, g_n, g_c,
    T: tl.constexpr, D_V: tl.constexpr, COLS: tl.constexpr, SPLIT_CMP: tl.constexpr, SPLIT_WIN: tl.constexpr,
    SPLITS: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr, EAGER: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """COLS channels of o = sum of the branches' gates * attention, merged over their splits.

    If EAGER, all splits are loaded at once, also those without keys, before their LSEs are known. The first program of
    a row moves its position on.
    """
    head, b, token = tl.program_id(0), (tl.program_id(1) // T).to(tl.int64), tl.program_id(1) % T
    slot = (b * T + token) * n + head
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    if EAGER:
        split = tl.arange(0, CHUNK)
        at = part_o + (slot * SPLITS + split)[:, None] * D_V + col[None, :]
        value = tl.load(at, mask=(split < SPLITS)[:, None] & (col < D_V)[None, :], other=0.0)
    gates += b * g_b + token * g_t + head * g_n
    g_cmp, g_slc = tl.load(gates).to(tl.float32), tl.load(gates + g_c).to(tl.float32)
    g_win = tl.load(gates + 2 * g_c).to(tl.float32)
    if EAGER:
        tl.debug_barrier()  # without it ptxas moves these loads behind what is done with the LSEs
    split = tl.arange(0, SP)
    lse = tl.load(part_lse + slot * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    is_cmp, is_slc = split < SPLIT_CMP, split >= SPLIT_CMP + SPLIT_WIN
    lse_cmp = _merged_lse(tl.where(is_cmp, lse, float("-inf")))
    lse_win = _merged_lse(tl.where(is_cmp | is_slc, float("-inf"), lse))
    lse_slc = _merged_lse(tl.where(is_slc, lse, float("-inf")))
    out = tl.zeros([COLS], tl.float32)
    for first in tl.static_range(0, SPLITS, CHUNK):
        split = first + tl.arange(0, CHUNK)
        lse = tl.load(part_lse + slot * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
        is_cmp, is_slc = split < SPLIT_CMP, split >= SPLIT_CMP + SPLIT_WIN
        whole = tl.where(is_cmp, lse_cmp, tl.where(is_slc, lse_slc, lse_win))
        gate = tl.where(is_cmp, g_cmp, tl.where(is_slc, g_slc, g_win))
        some = lse != float("-inf")
        weight = tl.where(some, tl.exp2(lse - whole) * gate, 0.0)
        if not EAGER:
            at = part_o + (slot * SPLITS + split)[:, None] * D_V + col[None, :]
            value = tl.load(at, mask=some[:, None] & (col < D_V)[None, :], other=0.0)
        out += tl.sum(tl.where(some[:, None], value * weight[:, None], 0.0), 0)
    tl.store(o + slot * D_V + col, out.to(o.dtype.element_ty), mask=col < D_V)
    if (head == 0) & (token == 0) & (tl.program_id(2) == 0):  # no other program of this launch looks at the positions
        given = tl.minimum(tl.maximum(tl.load(positions + b), 0), 2**31 - 1 - T)
        tl.store(positions + b, given + _tokens_given(count, b, T, HAS_COUNT))


@triton.jit
def _merged_lse(lse):
    """LSE of the LSEs of splits; +inf where all are -inf, so that their weights are 0."""
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return tl.where(top == float("-inf"), float("inf"), base + tl.log2(tl.sum(tl.exp2(lse - base), 0)))


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the device of x."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def share_keys(q: Tensor, row_tiles: int, g: int, tiles: int, window_tiles: int, n_sel: int) -> Splits:
    """Splits that fill the device, several programs a multiprocessor, and give no program a long walk."""
    b, t = q.shape[:2]
    units = multiprocessors(q)
    per_group, per_token = b * g * row_tiles, b * t * g
    cmp = max(1, min(tiles, 128, max(8, 4 * units // per_group)))
    win = max(1, min(window_tiles, units // per_group))
    return Splits(cmp, win, min(n_sel, max(4, 2 * units // per_token)))


def decode_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor | None, v_win: Tensor | None,
    k_emitted: Tensor | None, v_emitted: Tensor | None, gates: Tensor, count: Tensor | None,
    positions: Tensor, nominal_reads: Tensor, actual_reads: Tensor, cached_k_cmp: Tensor, cached_v_cmp: Tensor,
    k_raw: Tensor, v_raw: Tensor, cached_k_slc: Tensor, cached_v_slc: Tensor,
    cached_k_win: Tensor | None, cached_v_win: Tensor | None,
    l: int, d: int, l_sel: int, n_sel: int, w: int, init_blocks: int, local_blocks: int, theta: float, scale: float,
    splits: Splits | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step: o [b, t, n, d_v] and block_indices int32 [b, t, g, n_sel]; caches, positions and reads move on."""
    (b, t, n, d_k), (g, d_v) = q.shape, v_slc.shape[2:]
    capacity, slots, tail = cached_k_slc.shape[1], cached_k_cmp.shape[1], k_raw.shape[1]
    h, DK, DV, HALF = n // g, padded(d_k), padded(d_v), padded(d_k // 2)
    A, M, AP = l_sel // d, l // d, padded(l_sel // d, 1)
    bytes_per_key = max(DK, DV) * q.element_size()
    keys, stages = (64, 2) if bytes_per_key <= 256 else (32, 2) if bytes_per_key <= 512 else (16, 1)
    keys = max(AP, keys)
    blocks = keys // AP
    tiles, window_tiles = triton.cdiv(slots, blocks * A), triton.cdiv(w + t - 1, blocks * A)
    rows = min(64, padded(t * h))
    row_tiles, width = triton.cdiv(t * h, rows), triton.cdiv(capacity, l_sel)
    check_grid("q", "rows times tokens, or groups", max(b * t, g * row_tiles))
    splits = splits or share_keys(q, row_tiles, g, tiles, window_tiles, n_sel)
    total = sum(splits)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=q.device)

    q, k_cmp, v_cmp, k_slc, v_slc = (row_major(x) for x in (q, k_cmp, v_cmp, k_slc, v_slc))
    tied = k_win is None
    if k_win is None or v_win is None or cached_k_win is None or cached_v_win is None:
        k_win, v_win, cached_k_win, cached_v_win = k_slc, v_slc, cached_k_slc, cached_v_slc
    k_win, v_win, ring = row_major(k_win), row_major(v_win), cached_k_win.shape[1]
    where = {"T": t, "HAS_COUNT": count is not None}
    counts = positions if count is None else count.contiguous()
    rotated, o = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(b, t, n, d_v)
    block_indices = torch.empty(b, t, g, n_sel, dtype=torch.int32, device=q.device)
    folded, tops, scores = empty(b, t, n, tiles * blocks), empty(b, t, n, tiles), empty(b, t, g, width)
    spilled = torch.empty_like(folded) if M > 1 else folded
    part_o, part_lse = empty(b, t, n, total, d_v), empty(b, t, n, total)
    strides = (y for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win) for y in x.stride()[:3])
    branches = 2 if tied else 3
    _decode_append_kernel[(3 + branches + t * branches, g, b)](
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, *((k_cmp, v_cmp) if k_emitted is None else (k_emitted, v_emitted)),
        counts, positions, cached_k_cmp, cached_v_cmp, k_raw, v_raw, cached_k_slc, cached_v_slc,
        cached_k_win, cached_v_win, rotated, capacity, slots, tail, ring, n, g, *strides,
        TP=padded(t, 1), H=h, HP=padded(h, 1), L=l, LP=padded(l, 1), D=d, D_K=d_k, D_V=d_v, HALF=HALF, DV=DV, DK=DK,
        LOG2_THETA=math.log2(theta), EMITTED=k_emitted is not None, TIED=tied,
        **where, num_warps=4,
    )  # fmt: skip
    sizes = {"D_K": d_k, "D_V": d_v, "DK": DK, "DV": DV}
    scale2 = scale * LOG2E.value
    _decode_scan_kernel[(splits.cmp + splits.win, g * row_tiles, b)](
        rotated, cached_k_cmp, cached_v_cmp, cached_k_win, cached_v_win, counts, positions, folded, spilled, tops,
        part_o, part_lse, scale2, capacity, slots, ring, n, g,
        H=h, L=l, D=d, W=w, A=A, AP=AP, M=M, BLOCKS=blocks, TILES=tiles, BM=rows, ROW_TILES=row_tiles,
        SPLIT_CMP=splits.cmp, SPLIT_WIN=splits.win, SPLITS=total, **sizes, **where, num_warps=4, num_stages=stages,
    )  # fmt: skip
    _decode_scores_kernel[(triton.cdiv(width, 64), g, b * t)](
        folded, spilled, tops, part_lse, scores, counts, positions, capacity, n, g, width,
        H=h, HP=padded(h, 1), L=l, D=d, A=A, M=M, BLOCKS=blocks, TILES=tiles, BJ=64, SPLIT_CMP=splits.cmp,
        SP=padded(splits.cmp, 1), SPLITS=total, **where, num_warps=4,
    )  # fmt: skip
    teams = min(4096, padded(triton.cdiv(width, 4), 32))
    _decode_choice_kernel[(t, g, b)](
        scores, block_indices, nominal_reads, actual_reads, counts, positions, capacity, g, width,
        L=l, D=d, L_SEL=l_sel, N=n_sel, NP=padded(n_sel, 1), INIT=init_blocks, LOCAL=local_blocks, W=w, TEAMS=teams,
        TEAM=padded(triton.cdiv(width, teams), 2), **where, num_warps=min(8, max(1, teams // 512)),
    )  # fmt: skip
    _decode_selected_kernel[(splits.slc, g, b * t)](
        rotated, cached_k_slc, cached_v_slc, block_indices, counts, positions, part_o, part_lse, scale2, capacity, n, g,
        H=h, L_SEL=l_sel, N=n_sel, BM=padded(h), BN=min(padded(l_sel), keys, 64),
        FIRST_SPLIT=splits.cmp + splits.win, SPLIT_SLC=splits.slc, SHARE_P=padded(triton.cdiv(n_sel, splits.slc), 1),
        SPLITS=total, **sizes, **where,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    few = padded(total, 1) * DV <= 4096  # a warp takes a head; else many programs where there are few heads
    cols = 32 if not few and b * t * n < 8 * multiprocessors(q) else DV
    _decode_merge_kernel[(n, b * t, triton.cdiv(d_v, cols))](
        part_o, part_lse, gates, o, counts, positions, n, *gates.stride(),
        D_V=d_v, COLS=cols, SPLIT_CMP=splits.cmp, SPLIT_WIN=splits.win, SPLITS=total, SP=padded(total, 1),
        CHUNK=min(4096 // cols, padded(total, 1)), EAGER=few, **where, num_warps=1 if few else 4,
    )  # fmt: skip
    return o, block_indices
