"""Where queries, compressed tokens and keys stand, each in one launch: what `ops/layout.py` says in many."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_compile.custom_ops.kernels.tiles import check_grid

BLOCK = 256


class Places(NamedTuple):
    """Where the queries stand, int32 [b, t]: position in the own sequence (-1 for none), index of its first key."""

    position: Tensor
    first: Tensor


class Intervals(NamedTuple):
    """Keys each query sees, int32 [b, t]: start and end."""

    start: Tensor
    end: Tensor


@triton.jit
def count_below(values, n, steps, x, live):
    """How many of the ascending values[:n] are at most x, for int x [rows]; n < 2 ** steps."""
    low = tl.zeros_like(x).to(tl.int32)
    high = low + n
    for _ in tl.range(0, steps):
        middle = low + (high - low) // 2
        search = low < high
        right = tl.load(values + middle, mask=live & search, other=0).to(tl.int64) <= x
        low, high = tl.where(search & right, middle + 1, low), tl.where(search & (right == 0), middle, high)
    return low


@triton.jit
def find_sequence(ends, sequences, steps, index, live):
    """Number of the packed sequence that holds each index, the last that starts up to it; ends [sequences + 1]."""
    return tl.minimum(tl.maximum(count_below(ends, sequences + 1, steps, index, live) - 1, 0), sequences - 1)


@triton.jit
def blocks_before(length, L: tl.constexpr, D: tl.constexpr):
    """Number of compressed tokens of `length` tokens."""
    return tl.where(length < L, 0, (length - L) // D + 1)


@triton.jit(do_not_specialize=["t", "s", "c", "w", "sequences", "steps"])
def _places_kernel(
    q_start, cu_seqlens, cmp_ends, position, first, span_end, win_start, win_end, cmp_start, cmp_end,
    t, s, c, w, sequences, steps, HAS_START: tl.constexpr, PACKED: tl.constexpr, POSITION: tl.constexpr,
    SPAN: tl.constexpr, WINDOW: tl.constexpr, COMPRESSED: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What is asked for of BLOCK queries: their places among s keys, and the keys and compressed tokens they see."""
    b = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = token < t
    out = b.to(tl.int64) * t + token
    index = token.to(tl.int64)
    if HAS_START:
        index += tl.load(q_start + b)
    start, valid = index * 0, index >= 0
    if PACKED:
        sequence = find_sequence(cu_seqlens, sequences, steps, index, live)
        start = tl.maximum(tl.load(cu_seqlens + sequence, mask=live, other=0).to(tl.int64), 0)
        if not HAS_START:
            start = tl.minimum(start, t)
        valid = (index < tl.load(cu_seqlens + sequences)) & (index >= start)
    own = index - start
    begin = tl.minimum(start, s)
    pos = tl.minimum(tl.maximum(tl.where(valid, own, -1), -1), s - 1 - begin)
    if POSITION:
        tl.store(position + out, pos.to(tl.int32), mask=live)
    if SPAN:
        tl.store(first + out, begin.to(tl.int32), mask=live)
        tl.store(span_end + out, tl.where(pos < 0, 0, begin + pos + 1).to(tl.int32), mask=live)
    if WINDOW:
        end = tl.minimum(tl.maximum(index + 1, 0), s)
        if PACKED:  # of the tokens behind all sequences, too
            end = tl.minimum(end, tl.maximum(tl.load(cu_seqlens + sequences), 0))
        begin = tl.minimum(tl.where(valid, tl.maximum(start, index + 1 - w), end), end)
        tl.store(win_start + out, begin.to(tl.int32), mask=live)
        tl.store(win_end + out, end.to(tl.int32), mask=live)
    if COMPRESSED:
        end = tl.where(valid, blocks_before(own + 1, L, D), 0)
        begin = end * 0
        if PACKED:
            begin = tl.where(valid, tl.load(cmp_ends + sequence, mask=live, other=0), tl.load(cmp_ends + sequences))
            end += begin
        tl.store(cmp_start + out, tl.minimum(tl.maximum(begin, 0), c).to(tl.int32), mask=live)
        tl.store(cmp_end + out, tl.minimum(tl.maximum(end, 0), c).to(tl.int32), mask=live)


@triton.jit(do_not_specialize=["sequences"])
def _compressed_ends_kernel(cu_seqlens, ends, sequences, L: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([1], tl.int64)
    tl.store(ends + tl.arange(0, 1), total)
    for first in tl.range(0, sequences, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < sequences
        begin = tl.load(cu_seqlens + i, mask=live, other=0).to(tl.int64)
        count = blocks_before(tl.load(cu_seqlens + i + 1, mask=live, other=0) - begin, L, D)
        tl.store(ends + i + 1, total + tl.cumsum(count, 0), mask=live)
        total += tl.sum(count, 0)


@triton.jit(do_not_specialize=["t", "s", "steps"])
def _interval_queries_kernel(start, end, query_start, query_end, t, s, steps, BLOCK: tl.constexpr):
    """The queries that see each of BLOCK keys, from the keys start … end - 1 that each of t queries sees."""
    b = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = key < s
    start += b * t
    end += b * t
    # behind the last query that sees a key, none sees one: there start is what end is at last
    highest = tl.minimum(key, tl.load(end + t - 1) - 1)
    tl.store(query_start + b * s + key, count_below(end, t, steps, key, live), mask=live)
    tl.store(query_end + b * s + key, count_below(start, t, steps, highest, live), mask=live)


def search_steps(n: int) -> int:
    """Steps in which `count_below` searches n values."""
    return n.bit_length()


def compressed_ends(cu_seqlens: Tensor, l: int, d: int) -> Tensor:
    """Cumulative numbers of compressed tokens, int64 [N + 1], of packed sequences."""
    ends = torch.empty(len(cu_seqlens), dtype=torch.int64, device=cu_seqlens.device)
    _compressed_ends_kernel[(1,)](cu_seqlens.contiguous(), ends, len(ends) - 1, L=l, D=d, BLOCK=1024)
    return ends


def _launch(
    q: Tensor, names: tuple[str, ...], s: int, q_start: Tensor | None, cu_seqlens: Tensor | None,
    c: int = 0, l: int = 1, d: int = 1, w: int = 1,
) -> list[Tensor]:  # fmt: skip
    """The arguments `names` of `_places_kernel`, int32 [b, t] each, of queries q [b, t, ...]."""
    b, t = q.shape[:2]
    check_grid("q", "rows", b)
    q_start, cu_seqlens = (x if x is None else x.contiguous() for x in (q_start, cu_seqlens))
    out = {name: torch.empty(b, t, dtype=torch.int32, device=q.device) for name in names}
    cmp_ends = compressed_ends(cu_seqlens, l, d) if cu_seqlens is not None and "cmp_start" in names else None
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    every = ("position", "first", "span_end", "win_start", "win_end", "cmp_start", "cmp_end")
    _places_kernel[(triton.cdiv(t, BLOCK), b)](
        q_start, cu_seqlens, cmp_ends, *map(out.get, every), t, s, c, w, sequences, search_steps(sequences + 1),
        HAS_START=q_start is not None, PACKED=cu_seqlens is not None, POSITION="position" in names,
        SPAN="first" in names, WINDOW="win_start" in names, COMPRESSED="cmp_start" in names, L=l, D=d, BLOCK=BLOCK,
    )  # fmt: skip
    return list(out.values())


def query_places(q: Tensor, s: int, q_start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Places, Intervals]:
    """Positions and first keys of queries over s keys, what lies past them cut off; and their keys up to their own."""
    position, first, end = _launch(q, ("position", "first", "span_end"), s, q_start, cu_seqlens)
    return Places(position, first), Intervals(first, end)


def window_intervals(q: Tensor, s: int, w: int, q_start: Tensor | None, cu_seqlens: Tensor | None) -> Intervals:
    """Tokens `max(first, t - w + 1) … t` as indices of s keys; empty where a query belongs to no sequence."""
    return Intervals(*_launch(q, ("win_start", "win_end"), s, q_start, cu_seqlens, w=w))


def compressed_intervals(
    q: Tensor, c: int, l: int, d: int, q_start: Tensor | None, cu_seqlens: Tensor | None
) -> Intervals:
    """Compressed tokens that each query sees as indices of c slots."""
    return Intervals(*_launch(q, ("cmp_start", "cmp_end"), 0, q_start, cu_seqlens, c, l, d))


def places_of_choice(
    q: Tensor, c: int, l: int, d: int, q_start: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Intervals]:
    """Position of each query in its sequence, -1 for none, and `compressed_intervals`."""
    position, *ends = _launch(q, ("position", "cmp_start", "cmp_end"), 2**31 - 1, q_start, cu_seqlens, c, l, d)
    return position, Intervals(*ends)


def invert_intervals(keys: Intervals, s: int) -> Intervals:
    """The queries that see each key: int32 [b, s]; none of them behind the last query that sees a key."""
    b, t = keys.start.shape
    start, end = (torch.empty(b, s, dtype=torch.int32, device=keys.start.device) for _ in range(2))
    _interval_queries_kernel[(triton.cdiv(s, BLOCK), b)](*keys, start, end, t, s, search_steps(t), BLOCK=BLOCK)
    return Intervals(start, end)
