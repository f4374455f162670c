"""Where queries, keys and blocks stand: absolute positions, static buffers and packed sequences as one thing."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class QueryLayout(NamedTuple):
    """Positions of the queries, each int64 or bool [b, t].

    `position` counts from 0 in the query's own sequence, `first` is the index of that sequence's first token among the
    keys (0 unless packed), and `valid` is False for tokens after the last packed sequence.
    """

    position: Tensor
    first: Tensor
    valid: Tensor

    def chunk(self, part: slice) -> "QueryLayout":
        """The same for a range of queries."""
        return QueryLayout(*(x[:, part] for x in self))


def num_cmp(T: int, l: int, d: int) -> int:
    """Number of compressed tokens of a sequence of `T` tokens: `0 if T < l else (T - l) // d + 1`."""
    return 0 if l > T else (T - l) // d + 1


def num_cmp_at(position: Tensor, *, l: int, d: int) -> Tensor:
    """Number of compressed tokens a query at `position` sees: `num_cmp(position + 1, l, d)`, elementwise."""
    return torch.where(position + 1 < l, 0, (position + 1 - l) // d + 1)


def sequence_of(ends: Tensor, index: Tensor) -> Tensor:
    """Number of the packed sequence that holds each index: the last whose start is not past it; ends int64 [N + 1]."""
    # in the whole of ends, since Inductor cannot search in a part
    return (torch.searchsorted(ends, index, right=True) - 1).clamp(0, len(ends) - 2)


def query_layout(q: Tensor, q_start: Tensor | None, cu_seqlens: Tensor | None) -> QueryLayout:
    """Positions of queries q [b, t, ...]: from 0 or `q_start` int32 [b] in a row, which `cu_seqlens` [N + 1] packs."""
    b, t = q.shape[:2]
    index = torch.arange(t, device=q.device).expand(b, t)
    if q_start is not None:
        index = index + q_start.long()[:, None]
    if cu_seqlens is None:
        return QueryLayout(index, torch.zeros_like(index), index >= 0)
    ends = cu_seqlens.long()
    sequence = sequence_of(ends, index)
    first = ends[sequence].clamp(0, t if q_start is None else None)
    return QueryLayout(index - first, first, (index < ends[-1]) & (index >= first))


def compressed_ends(cu_seqlens: Tensor, *, l: int, d: int) -> Tensor:
    """Cumulative numbers of compressed tokens, int64 [N + 1], of packed sequences."""
    lengths = cu_seqlens.long().diff()
    counts = num_cmp_at(lengths - 1, l=l, d=d)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def compressed_slots(c: int, cu_seqlens: Tensor, *, l: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `c` packed slots: block number in its own sequence, index of its first token, whether it is used."""
    ends = compressed_ends(cu_seqlens, l=l, d=d)
    slot = torch.arange(c, device=cu_seqlens.device)
    sequence = sequence_of(ends, slot)
    block = (slot - ends[sequence]).clamp_min(0)
    return block, cu_seqlens.long()[sequence] + block * d, slot < ends[-1]


def visible_slots(layout: QueryLayout, cu_seqlens: Tensor | None, *, l: int, d: int) -> tuple[Tensor, Tensor]:
    """First and end index [b, t] of the compressed tokens each query sees: blocks i with `i*d + l <= t + 1`."""
    count = num_cmp_at(layout.position, l=l, d=d) * layout.valid
    if cu_seqlens is None:
        return torch.zeros_like(count), count
    first = compressed_ends(cu_seqlens, l=l, d=d)[sequence_of(cu_seqlens.long(), layout.first)]
    return first, first + count


def roll_rows(x: Tensor, shift: Tensor) -> Tensor:
    """Rows of x [b, t, ...] rolled to the left by `shift` int64 [b]; what leaves one comes back at its right end."""
    t = x.shape[1]
    source = (torch.arange(t, device=x.device) + shift[:, None]) % t
    return x.gather(1, source.view(*source.shape, *(1,) * (x.ndim - 2)).expand_as(x))


def ends_of_sequences(begins: Tensor) -> Tensor:
    """`cu_seqlens` int64 [n + 1] of n packed tokens from where sequences begin, bool [n], the first one included.

    Of a shape that depends on no data: behind the last sequence stand empty ones.
    """
    n = begins.shape[0]
    index = torch.arange(n, device=begins.device)
    return torch.nn.functional.pad(torch.where(begins, index, n).sort().values, (0, 1), value=n)


def query_chunks(t: int, elements_per_query: int, most: int | None = None) -> Iterator[slice]:
    """Ranges of queries that keep one intermediate tensor of a branch near 2**22 elements."""
    size = max(1, min(t, 2**22 // max(1, elements_per_query), most or t))
    for start in range(0, t, size):
        yield slice(start, min(start + size, t))
