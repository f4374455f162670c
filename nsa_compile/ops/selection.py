"""Selection branch (Eq. 8-12): scores of blocks, their choice, attention to the tokens of the chosen ones."""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from nsa_compile.ops.attend import (
    attend_in_chunks,
    attend_in_chunks_backward,
    default_scale,
    masked_scores,
    pick,
    probabilities,
    split_heads,
)
from nsa_compile.ops.checks import check_blocks, check_int, check_ints_of, check_placement
from nsa_compile.ops.compression import compressed_view
from nsa_compile.ops.layout import num_cmp_at, query_chunks, query_layout, visible_slots


def compression_probabilities(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, l: int, d: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`p_cmp = softmax(scale * q·k_cmp)` over the visible blocks (Eq. 8), by the branch's LSE: [b, t, g, h, c]."""
    layout, view, _ = compressed_view(q, k_cmp, l, d, q_start, cu_seqlens)
    return visible_probabilities(q, k_cmp, lse, layout, view, slice(0, q.shape[1]), default_scale(q, scale))


def visible_probabilities(q, k_cmp, lse, layout, view, part: slice, scale: float) -> Tensor:
    """`compression_probabilities` of a range of queries."""
    _, visible = view(part)
    q_part = split_heads(q, k_cmp.shape[2], layout, part)
    lse_part = rearrange(lse[:, part], "b t (g h) -> b t g h", g=k_cmp.shape[2])
    return probabilities(masked_scores(q_part, pick(k_cmp, slice(None)), visible, scale), lse_part)


def selection_scores(
    p_cmp: Tensor, *, l: int, d: int, l_sel: int, n_blocks: int, first: Tensor | None = None
) -> Tensor:
    """`p_slc[j] = sum_i p_cmp[i] * overlap(i, j) / d` (Eq. 9): [b, t, g, h, c] → [b, t, g, h, n_blocks].

    `first` int64 [b, t]: packed, the slot of the first compressed token of each query's own sequence, whose blocks are
    counted. Every block sums in the same order, whatever the device, so that equal probabilities give equal bits.
    """
    c, a, m = p_cmp.shape[-1], l_sel // d, l // d
    if first is not None and c > 0:
        slot = first[..., None, None, None] + torch.arange(c, device=p_cmp.device)
        p_cmp = p_cmp.gather(-1, slot.clamp_max(c - 1).expand_as(p_cmp)).masked_fill(slot >= c, 0.0)
    # block j meets the compressed tokens that begin in its a strides, and the m - 1 ones before
    p_cmp = torch.nn.functional.pad(p_cmp, (m - 1, max(0, n_blocks * a - c)))
    p_slc = p_cmp.new_zeros(*p_cmp.shape[:-1], n_blocks)
    for i in range(a + m - 1):
        strides = min(i + 1, m, a + m - 1 - i)
        p_slc += p_cmp[..., i : i + (n_blocks - 1) * a + 1 : a] * strides
    return p_slc


def group_scores(p_slc: Tensor) -> Tensor:
    """`p_grp = sum_h p_slc` over the heads of a group (Eq. 10): [b, t, g, h, n_blocks] → [b, t, g, n_blocks]."""
    return reduce(p_slc, "b t g h n -> b t g n", "sum")


def choose_blocks(
    p_grp: Tensor, position: Tensor, *, l_sel: int, n_sel: int, init_blocks: int = 1, local_blocks: int = 2
) -> Tensor:
    """Forced blocks, then the highest scores, lower index first on ties (Eq. 11): int32 [b, t, g, n_sel].

    p_grp [b, t, g, n_blocks], NaN counting as 0; position [b, t]. Ascending; -1 in the unused slots, which stand last.
    """
    block = torch.arange(p_grp.shape[-1], device=p_grp.device)
    last = (position // l_sel)[..., None, None]
    candidate = block <= last
    forced = candidate & ((block < init_blocks) | (block > last - local_blocks))
    scores = p_grp.nan_to_num(0.0)  # finite, so that nothing passes the forced blocks
    scores = scores.masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True)
    unused = p_grp.shape[-1]  # sorts behind every block
    chosen = order.indices.masked_fill(order.values == float("-inf"), unused)[..., :n_sel]
    chosen = torch.nn.functional.pad(chosen, (0, max(0, n_sel - unused)), value=unused).sort(dim=-1).values
    return chosen.masked_fill(chosen == unused, -1).int()


def number_of_blocks(t: int, c: int, *, l: int, d: int, l_sel: int, static: bool) -> int:
    """Selection blocks that queries of a sequence may see: of t tokens, or of what c static compressed tokens cover."""
    tokens = c * d + l - 1 if static else t
    return max(1, -(-tokens // l_sel))


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, l: int, d: int, l_sel: int, n_sel: int,
    init_blocks: int = 1, local_blocks: int = 2,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The blocks each query and group attends to (Eq. 8-12): int32 [b, t, g, n_sel], ascending, -1 in unused slots."""
    (b, t, n, _), (c, g) = q.shape, k_cmp.shape[1:3]
    n_blocks = number_of_blocks(t, c, l=l, d=d, l_sel=l_sel, static=q_start is not None)
    layout, view, _ = compressed_view(q, k_cmp, l, d, q_start, cu_seqlens)
    first = None if cu_seqlens is None else visible_slots(layout, cu_seqlens, l=l, d=d)[0]
    indices = torch.empty(b, t, g, n_sel, dtype=torch.int32, device=q.device)
    for part in query_chunks(t, b * (n + g) * max(c, n_blocks)):
        p_cmp = visible_probabilities(q, k_cmp, lse, layout, view, part, default_scale(q, scale))
        own = None if first is None else first[:, part]
        p_slc = selection_scores(p_cmp, l=l, d=d, l_sel=l_sel, n_blocks=n_blocks, first=own)
        chosen = choose_blocks(
            group_scores(p_slc), layout.position[:, part],
            l_sel=l_sel, n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks,
        )  # fmt: skip
        indices[:, part] = chosen.masked_fill(~layout.valid[:, part, None, None], -1)
    return indices


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, l_sel: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention to the tokens `s <= t` of the chosen blocks (Eq. 12): o [b, t, g*h, d_v], LSE [b, t, g*h]."""
    layout, view, chunks = selected_view(q, k, v, block_indices, l_sel, q_start, cu_seqlens)
    return attend_in_chunks(q, k, v, layout, view, chunks, default_scale(q, scale))


def selected_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o: Tensor,
    lse: Tensor, *, l_sel: int, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `selected_attention`; the choice of blocks passes none."""
    layout, view, chunks = selected_view(q, k, v, block_indices, l_sel, q_start, cu_seqlens)
    return attend_in_chunks_backward(q, k, v, layout, view, chunks, default_scale(q, scale), o, lse, grad_o, grad_lse)


def selected_view(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    l_sel: int,
    q_start: Tensor | None,
    cu_seqlens: Tensor | None,
):
    """Layout of the queries, the tokens of each query's blocks, and the chunks to work through.

    A few queries over a long buffer gather their tokens; otherwise a mask over all keys is less work than gathering.
    """
    b, t, g, n_sel = block_indices.shape
    s, n = k.shape[1], q.shape[2]
    layout = query_layout(q, q_start, cu_seqlens)
    key = torch.arange(s, device=q.device)
    key_first, key_position = key * 0, key
    if cu_seqlens is not None:
        keys = query_layout(k, None, cu_seqlens)
        key_first, key_position = keys.first[0], keys.position[0]
    n_blocks = -(-s // l_sel)

    def view_gathered(part: slice) -> tuple[Tensor, Tensor]:
        position, first, valid = (x[:, part, None, None] for x in layout)
        block = block_indices[:, part].long()
        token = (block[..., None] * l_sel + torch.arange(l_sel, device=q.device)).flatten(3)  # [b, t, g, n_sel * l_sel]
        return token + first, (token >= 0) & (token <= position) & (token + first < s) & valid

    def view_masked(part: slice) -> tuple[slice, Tensor]:
        position, first, valid = (x[:, part, None, None] for x in layout)
        past = slice(0, part.stop if q_start is None else s)
        block = block_indices[:, part].long()
        block = block.masked_fill((block < 0) | (block >= n_blocks), n_blocks)
        chosen = torch.zeros(*block.shape[:3], n_blocks + 1, dtype=torch.bool, device=q.device).scatter_(
            -1, block, True
        )
        visible = chosen[..., key_position[past] // l_sel]
        return past, visible & (key_first[past] == first) & (key_position[past] <= position) & valid

    if q_start is not None and t * n_sel * l_sel < s:
        return layout, view_gathered, list(query_chunks(t, b * n_sel * l_sel * (n + g * (k.shape[-1] + v.shape[-1]))))
    return layout, view_masked, list(query_chunks(t, b * n * s))


class RangeStatistics(NamedTuple):
    """What a selection looks like as merged ranges: tensors [b, t, g], lengths and distances in tokens.

    A range's distance is `t - start`; all are 0 where a query has no range.
    """

    n_ranges: Tensor
    mean_length: Tensor
    max_length: Tensor
    mean_distance: Tensor
    max_distance: Tensor


def selection_ranges(
    block_indices: Tensor, *, l_sel: int, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """A selection as merged half-open token ranges [start, end): int32 [b, t, g, n_sel, 2], ascending.

    block_indices int32 or int64 [b, t, g, n_sel] as `select_blocks` gives them. Neighbouring blocks become one range,
    which ends at the query's position + 1 at the latest; positions are those of the query's own sequence. Unused slots
    hold (-1, -1) and stand last.
    """
    check_ints_of("block_indices", block_indices, "b", "t", "g", "n_sel")
    check_int("l_sel", l_sel)
    q_start, cu_seqlens = check_placement(block_indices, q_start=q_start, cu_seqlens=cu_seqlens, end=None, key="")
    layout = query_layout(block_indices, q_start, cu_seqlens)
    block = block_indices.long()
    used = (block >= 0) & (block * l_sel <= layout.position[..., None, None])
    follows = used & (block == torch.nn.functional.pad(block, (1, 0), value=-2)[..., :-1] + 1)
    range_of = ((used & ~follows).cumsum(-1) - 1).clamp_min(0)
    end = torch.minimum((block + 1) * l_sel, layout.position[..., None, None] + 1).masked_fill(~used, -1)
    starts = torch.full_like(block, -1).scatter_reduce(
        -1, range_of, (block * l_sel).masked_fill(~(used & ~follows), -1), "amax"
    )
    ends = torch.full_like(block, -1).scatter_reduce(-1, range_of, end, "amax")
    return torch.stack((starts, ends), dim=-1).int()


def range_statistics(
    ranges: Tensor, *, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> RangeStatistics:
    """Number, lengths and distances of the ranges of each query and group; see `selection_ranges`."""
    check_ints_of("ranges", ranges, "b", "t", "g", "n_sel", "2", sizes={"2": 2})
    q_start, cu_seqlens = check_placement(ranges, q_start=q_start, cu_seqlens=cu_seqlens, end=None, key="")
    position = query_layout(ranges, q_start, cu_seqlens).position[..., None, None]
    start, end = ranges.long().unbind(-1)
    used = start >= 0
    n_ranges = used.sum(-1)
    length = (end - start) * used
    distance = (position - start) * used
    count = n_ranges.clamp_min(1)
    return RangeStatistics(
        n_ranges, length.sum(-1) / count, length.amax(-1), distance.sum(-1) / count, distance.amax(-1)
    )


class TokenReads(NamedTuple):
    """Keys a query reads, int64, last axis (cmp, slc, win, total): nominal [b, t, 4], actual per group [b, t, g, 4]."""

    nominal: Tensor
    actual: Tensor


def token_reads(position: Tensor, block_indices: Tensor, *, l: int, d: int, l_sel: int, w: int) -> TokenReads:
    """Token reads of queries at `position` [b, t], of which block_indices [b, t, g, n_sel] were chosen.

    With S = position + 1 tokens in the cache, nominal is `num_cmp(S) + n_sel*l_sel + min(w, S)`; actual counts the
    tokens of the chosen blocks that exist.
    """
    check_ints_of("position", position, "b", "t")
    b, t = position.shape
    check_ints_of("block_indices", block_indices, "b", "t", "g", "n_sel", sizes={"b": b, "t": t})
    check_blocks(l=l, d=d)
    check_int("l_sel", l_sel)
    check_int("w", w)
    S = position + 1
    cmp, win = num_cmp_at(position, l=l, d=d), S.clamp_max(w)
    slc = torch.full_like(S, block_indices.shape[-1] * l_sel)
    block = block_indices.long()
    exist = (S[..., None, None] - block * l_sel).clamp(0, l_sel) * (block >= 0)
    slc_actual = exist.sum(-1)
    cmp_g, win_g = (x.unsqueeze(-1).expand_as(slc_actual) for x in (cmp, win))
    return TokenReads(
        torch.stack((cmp, slc, win, cmp + slc + win), -1),
        torch.stack((cmp_g, slc_actual, win_g, cmp_g + slc_actual + win_g), -1),
    )
