"""Native Sparse Attention with dense masks: the judge of the fuzzer, which imports nothing of the package.

Every function is plain torch, computes in the type it is given (fp64 for a judge) and is differentiable by autograd.
Layouts are those of the contract: q [b, t, n, d_k], keys [b, s, g, d_k], values [b, s, g, d_v], query head n in group
n // (n // g). Memory grows with b * n * t * s. Inputs are finite: what no query sees may hold any finite number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """Where queries [b, t] and keys [b, s] stand.

    position: int64, position in the own sequence, -1 for a token of no sequence. first: int64, index of the first key
    of that sequence in the row. valid: bool, whether there is a sequence. The same of the keys.
    """

    position: Tensor
    first: Tensor
    valid: Tensor
    key_position: Tensor
    key_first: Tensor
    key_valid: Tensor


def sequence_of(index: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the sequence with `ends[i] <= index < ends[i + 1]`, and whether there is one."""
    inside = (ends[:-1] <= index.unsqueeze(-1)) & (index.unsqueeze(-1) < ends[1:])
    return inside.long().argmax(-1), inside.any(-1)


def positions(
    b: int, t: int, s: int, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, device: object = None
) -> Positions:
    """Places of t queries from 0 or `q_start` [b] on, and of s keys, in rows or in one row packed by `cu_seqlens`."""
    given = q_start if q_start is not None else cu_seqlens
    device = given.device if given is not None else device
    query = torch.arange(t, device=device).expand(b, t)
    key = torch.arange(s, device=device).expand(b, s)
    if q_start is not None:
        query = query + q_start.long().unsqueeze(1)
    if cu_seqlens is None:
        return Positions(query, query * 0, query >= 0, key, key * 0, key >= 0)
    ends, places = cu_seqlens.long(), []
    for index in (query, key):
        sequence, valid = sequence_of(index, ends)
        first = torch.where(valid, ends[sequence], 0)
        places += [torch.where(valid, index - first, -1), first, valid]
    return Positions(*places)


def count_blocks(tokens: Tensor, l: int, d: int) -> Tensor:
    """Compression blocks that lie wholly inside the first `tokens` tokens."""
    return torch.where(tokens < l, 0, (tokens - l) // d + 1)


class Slots(NamedTuple):
    """Compressed tokens, [c] each: block number in the own sequence, index of that sequence's first key, in use."""

    block: Tensor
    first: Tensor
    used: Tensor


def slots(c: int, l: int, d: int, cu_seqlens: Tensor | None = None, device: object = None) -> Slots:
    """What the c compressed tokens of a row stand for; packed ones follow one another, sequence after sequence."""
    slot = torch.arange(c, device=device if cu_seqlens is None else cu_seqlens.device)
    if cu_seqlens is None:
        return Slots(slot, slot * 0, slot >= 0)
    ends = torch.nn.functional.pad(count_blocks(cu_seqlens.long().diff(), l, d).cumsum(0), (1, 0))
    sequence, used = sequence_of(slot, ends)
    return Slots(slot - ends[sequence], cu_seqlens.long()[sequence], used)


def sees_window(places: Positions, w: int) -> Tensor:
    """Which keys a query sees in the sliding window, bool [b, t, 1, s]."""
    q, k = _pairs(places)
    return ((k.first == q.first) & k.valid & q.valid & (k.at <= q.at) & (k.at > q.at - w)).unsqueeze(2)


def sees_compressed(places: Positions, compressed: Slots, l: int, d: int) -> Tensor:
    """Which compressed tokens a query sees, bool [b, t, 1, c]: blocks i of its sequence with `i*d + l <= t + 1`."""
    past = compressed.block * d + l <= places.position.unsqueeze(-1) + 1
    own = compressed.used & (compressed.first == places.first.unsqueeze(-1))
    return (past & own & places.valid.unsqueeze(-1)).unsqueeze(2)


def sees_selected(places: Positions, block_indices: Tensor, l_sel: int) -> Tensor:
    """Which keys a query sees in its blocks int [b, t, g, n_sel], bool [b, t, g, s]."""
    q, k = _pairs(places)
    past = (k.first == q.first) & k.valid & q.valid & (k.at <= q.at)
    n_blocks = max(1, -(-places.key_position.shape[1] // l_sel))
    index = block_indices.long()
    index = torch.where((index < 0) | (index >= n_blocks), n_blocks, index)
    chosen = torch.zeros(*index.shape[:3], n_blocks + 1, dtype=torch.bool, device=index.device)
    chosen = chosen.scatter(-1, index, True)[..., :n_blocks]
    b, t, g = index.shape[:3]
    block = (places.key_position.clamp_min(0) // l_sel)[:, None, None].expand(b, t, g, -1)
    return chosen.gather(-1, block) & past.unsqueeze(2)


class _Side(NamedTuple):
    at: Tensor
    first: Tensor
    valid: Tensor


def _pairs(places: Positions) -> tuple[_Side, _Side]:
    """Queries as [b, t, 1] and keys as [b, 1, s]."""
    return _Side(*(x.unsqueeze(2) for x in places[:3])), _Side(*(x.unsqueeze(1) for x in places[3:]))


def default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def rows_of(q: Tensor, g: int) -> Tensor:
    """Queries or the like [b, t, n, x] as [b, g, t * h, x], the rows of a product with the keys of a group."""
    b, t, n, x = q.shape
    return q.reshape(b, t, g, n // g, x).transpose(1, 2).reshape(b, g, t * (n // g), x)


def from_rows(x: Tensor, t: int) -> Tensor:
    """[b, g, t * h, x] back to [b, t, g * h, x]."""
    b, g, rows, width = x.shape
    return x.reshape(b, g, t, rows // t, width).transpose(1, 2).reshape(b, t, g * (rows // t), width)


def rows_see(visible: Tensor, h: int) -> Tensor:
    """bool [b, t, 1 or g, s] as [b, 1 or g, t * h, s]."""
    return visible.transpose(1, 2).repeat_interleave(h, dim=2)


def softmax(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities [b, g, t * h, s] and LSE [b, g, t * h, 1] of rows; 0 and -inf where a row sees nothing."""
    scores = (q @ k.transpose(1, 2).mT * scale).masked_fill(~visible, -math.inf)
    if not scores.shape[-1]:
        return scores, scores.new_full((*scores.shape[:-1], 1), -math.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - largest)
    blind = ~visible.any(-1, keepdim=True)
    total = weights.sum(-1, keepdim=True).masked_fill(blind, 1.0)
    return weights / total, (largest + total.log()).masked_fill(blind, -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention over the keys that `visible` [b, t, 1 or g, s] shows: o [b, t, n, d_v], natural-log LSE [b, t, n].

    A query that sees nothing gets 0 and -inf.
    """
    t, n, g = q.shape[1], q.shape[2], k.shape[2]
    p, lse = softmax(rows_of(q, g), k, rows_see(visible, n // g), default_scale(q, scale))
    return from_rows(p @ v.transpose(1, 2), t), from_rows(lse, t).squeeze(-1)


def compress_mean(x: Tensor, l: int, d: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Means of the compression blocks of x [b, s, g, d]: [b, c, g, d]; packed: c = s // d, unused slots 0."""
    s = x.shape[1]
    c = (0 if s < l else (s - l) // d + 1) if cu_seqlens is None else s // d
    compressed = slots(c, l, d, cu_seqlens, x.device)
    start = compressed.first + compressed.block * d
    token = torch.arange(s, device=x.device)
    covers = (token >= start[:, None]) & (token < start[:, None] + l) & compressed.used[:, None]
    return torch.einsum("cs,bsgd->bcgd", covers.to(x.dtype) / l, x)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, l: int, d: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 7: (o, lse) of attention to the compressed tokens of the past."""
    places = positions(q.shape[0], q.shape[1], 0, q_start, cu_seqlens, q.device)
    compressed = slots(k_cmp.shape[1], l, d, cu_seqlens, q.device)
    return attend(q, k_cmp, v_cmp, sees_compressed(places, compressed, l, d), scale)


def block_scores(
    q: Tensor, k_cmp: Tensor, *, l: int, d: int, l_sel: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
    blocks: int | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 8-10: p_grp [b, t, g, blocks], by default of every block up to that of the last query."""
    b, t, n, _ = q.shape
    g = k_cmp.shape[2]
    places = positions(b, t, 0, q_start, cu_seqlens, q.device)
    compressed = slots(k_cmp.shape[1], l, d, cu_seqlens, q.device)
    visible = rows_see(sees_compressed(places, compressed, l, d), n // g)
    p, _ = softmax(rows_of(q, g), k_cmp, visible, default_scale(q, scale))
    p = p.unflatten(2, (t, n // g)).sum(3).transpose(1, 2)
    blocks = n_blocks(places, l_sel) if blocks is None else blocks
    return p @ overlaps(compressed, l, d, l_sel, blocks).to(p.dtype) / d


def n_blocks(places: Positions, l_sel: int) -> int:
    """Selection blocks up to that of the last query."""
    return int(places.position.amax().clamp_min(0)) // l_sel + 1


def overlaps(compressed: Slots, l: int, d: int, l_sel: int, blocks: int) -> Tensor:
    """Tokens that each compressed token shares with each selection block of its sequence, [c, blocks]."""
    start = (compressed.block * d).unsqueeze(-1)
    block = torch.arange(blocks, device=start.device) * l_sel
    shared = torch.minimum(start + l, block + l_sel) - torch.maximum(start, block)
    return shared.clamp_min(0) * compressed.used.unsqueeze(-1)


def candidates(position: Tensor, blocks: int, *, l_sel: int, init_blocks: int, local_blocks: int):
    """Which blocks have started, and which of them are forced: bool [b, t, 1, blocks] each, for position [b, t]."""
    block = torch.arange(blocks, device=position.device)
    own = torch.where(position < 0, -1, position // l_sel)[..., None, None]
    started = block <= own
    return started, started & ((block < init_blocks) | (block > own - local_blocks))


def choose(
    p_grp: Tensor, position: Tensor, *, l_sel: int, n_sel: int, init_blocks: int = 1, local_blocks: int = 2
) -> Tensor:
    """Eq. 11: the forced blocks and the highest scores, the lower index on ties; int64 [b, t, g, n_sel], -1 last."""
    blocks = p_grp.shape[-1]
    started, forced = candidates(position, blocks, l_sel=l_sel, init_blocks=init_blocks, local_blocks=local_blocks)
    rank = p_grp.masked_fill(forced, math.inf).masked_fill(~started, -math.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(blocks, device=order.device) < started.sum(-1, keepdim=True)
    chosen = torch.where(taken, order, blocks)[..., :n_sel]
    chosen = torch.nn.functional.pad(chosen, (0, max(0, n_sel - blocks)), value=blocks).sort(-1).values
    return torch.where(chosen == blocks, -1, chosen)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, l_sel: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 12: (o, lse) of attention to the tokens up to the query's own of its blocks."""
    places = positions(q.shape[0], q.shape[1], k.shape[1], q_start, cu_seqlens, q.device)
    return attend(q, k, v, sees_selected(places, block_indices, l_sel), scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, w: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse) of attention to the last w tokens, the query's own counted."""
    places = positions(q.shape[0], q.shape[1], k.shape[1], q_start, cu_seqlens, q.device)
    return attend(q, k, v, sees_window(places, w), scale)


def mix(gates: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
    """Eq. 5: `sum_c g_c * o_c` of gates [b, t, n, 3] and outputs [b, t, n, d_v] in the order cmp, slc, win."""
    return sum(gate.unsqueeze(-1) * o for gate, o in zip(gates.unbind(-1), outputs, strict=True))


def rope(x: Tensor, position: Tensor, theta: float = 10000.0) -> Tensor:
    """Channel pairs (i, i + d/2) of x [b, t, n, d] turned by `position * theta ** (-2i/d)`, position [b, t] or [t]."""
    half = x.shape[-1] // 2
    angle = position.double()[..., None, None] * theta ** (-torch.arange(half, device=x.device).double() / half)
    turned = torch.polar(torch.ones_like(angle), angle) * torch.complex(x[..., :half].double(), x[..., half:].double())
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)
