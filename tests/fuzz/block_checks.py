"""Judging a choice of blocks by the oracle's scores: what roundings may reorder, and what they may not."""

from __future__ import annotations

import math
from typing import NamedTuple

import dense_oracle as oracle
import torch
from bounds import AT_ONCE, LOST, compute_type, epsilons
from torch import Tensor


class Scores(NamedTuple):
    """p_grp of every query, group and block.

    exact, tolerance: fp64 [b, t, g, blocks], and how far from it an fp32 sum may be. blank: bool [b, t, 1, blocks],
    no visible compressed token touches the block, so its score is 0 in any arithmetic. level: bool [b, t, g, blocks],
    the scores of these blocks of a row are sums of the same numbers in the same order, so their bits agree: the query
    is zero (or the scale), and all compressed tokens that touch the block are visible and inside the sequence.
    """

    exact: Tensor
    tolerance: Tensor
    blank: Tensor
    level: Tensor

    def part(self, queries: slice) -> Scores:
        """The same for a range of queries."""
        return Scores(*(x[:, queries] for x in self))


def bound_scores(
    q: Tensor, k_cmp: Tensor, where: dict[str, Tensor], scale: float, dtype: torch.dtype, *, l: int, d: int, l_sel: int
) -> Scores:
    """Scores of finite q [b, t, n, d_k] and k_cmp [b, c, g, d_k] at the places `where`."""
    (b, t, n, _), (c, g), eps = q.shape, k_cmp.shape[1:3], epsilons(dtype)
    h, sizes = n // g, {"l": l, "d": d}
    places = oracle.positions(b, t, 0, **where, device=q.device)
    blocks = oracle.n_blocks(places, l_sel)
    compressed = oracle.slots(c, l, d, where.get("cu_seqlens"), q.device)
    visible = oracle.sees_compressed(places, compressed, l, d)
    step = max(1, min(g, AT_ONCE // max(1, h * t * c)))
    exact, tolerance = (torch.zeros(b, t, g, blocks, dtype=torch.float64, device=q.device) for _ in range(2))
    for row in range(b):
        place = {name: x[row : row + 1] if name == "q_start" else x for name, x in where.items()}
        for first in range(0, g, step):
            groups, heads = slice(first, first + step), slice(first * h, (first + step) * h)
            own = q[row : row + 1, :, heads], k_cmp[row : row + 1, :, groups]
            wide = (x.double() for x in own)
            score = oracle.block_scores(*wide, **sizes, l_sel=l_sel, **place, scale=scale, blocks=blocks)
            sums = _largest_sum(*(x.to(compute_type(dtype)).abs() for x in own), visible[row : row + 1])
            off = 16 * eps.compute * abs(scale) * sums.unsqueeze(-1)
            off = torch.where(off > LOST, math.inf, 4 * off + eps.compute * (64 + math.sqrt(h)))
            exact[row, :, groups] = score[0]
            tolerance[row, :, groups] = torch.where(score == 0, 0.0, off * score)[0] + h * l * 1e-36
    level = (q == 0).all(-1).unflatten(2, (g, h)).all(-1) | (scale == 0)
    blank, inside = _patterns(places.position, blocks, l, d, l_sel)
    return Scores(exact, tolerance, blank, level.unsqueeze(-1) & inside)


def _largest_sum(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Largest `sum_d |q_d k_d|` over the heads of a group and the keys a query sees, [b, t, g]."""
    t, g, h = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    sums = (oracle.rows_of(q, g) @ k.transpose(1, 2).mT).masked_fill_(~oracle.rows_see(visible, h), 0.0)
    sums = sums.amax(-1) if sums.shape[-1] else sums.new_zeros(sums.shape[:-1])
    return sums.unflatten(2, (t, h)).amax(-1).transpose(1, 2)


def _patterns(position: Tensor, blocks: int, l: int, d: int, l_sel: int) -> tuple[Tensor, Tensor]:
    """Blocks that no visible compressed token touches, and those that only visible ones touch, all that there can be.

    bool [b, t, 1, blocks] each. With m = l / d and a = l_sel / d, the tokens j*a - m + 1 … j*a + a - 1 touch block j.
    """
    m, a = l // d, l_sel // d
    seen = oracle.count_blocks(position + 1, l, d)[..., None, None]
    block = torch.arange(blocks, device=position.device)
    first, last = block * a - (m - 1), block * a + a - 1
    return first.clamp_min(0) >= seen, (first >= 0) & (last < seen)


def judge(
    lists: Tensor, scores: Scores, position: Tensor, *, l_sel: int, n_sel: int, init_blocks: int, local_blocks: int
) -> list[str]:
    """What is wrong with lists int32 [b, t, g, n_sel] of queries at position [b, t], -1 for those of no sequence."""
    b, t, g, blocks = scores.exact.shape
    if lists.dtype != torch.int32 or lists.shape != (b, t, g, n_sel):
        return [f"{lists.dtype} {tuple(lists.shape)}, expected int32 {(b, t, g, n_sel)}"]
    used = lists >= 0
    started, forced = oracle.candidates(
        position, blocks, l_sel=l_sel, init_blocks=init_blocks, local_blocks=local_blocks
    )
    index = torch.where(used & (lists < blocks), lists.long(), blocks)
    chosen = torch.zeros(b, t, g, blocks + 1, dtype=torch.bool, device=lists.device)
    chosen = chosen.scatter_(-1, index, True)[..., :blocks]
    free = started & ~forced
    count = started.sum(-1).clamp_max(n_sel)
    rise = (lists[..., 1:] > lists[..., :-1]) | ~used[..., 1:]
    lowest = _least(scores.exact + scores.tolerance, chosen & free)
    best = -_least(scores.tolerance - scores.exact, free & ~chosen)
    rules = {
        "not ascending": ~(rise & (used[..., :-1] | ~used[..., 1:])).all(-1),
        "a block that has not started": (lists >= blocks).any(-1) | (chosen & ~started).any(-1),
        "a number below -1": (lists < -1).any(-1),
        "not as many as there are": used.sum(-1) != count,
        "a forced block is missing": (forced & ~chosen).any(-1),
        "a better block was left out": lowest < best,
        "the higher of blocks without a score": _out_of_order(scores.blank & free, chosen),
        "the higher of blocks of equal bits": _out_of_order(scores.level & free, chosen),
    }
    messages = []
    for what, wrong in rules.items():
        if bool(wrong.any()):
            row, token, group = (int(x) for x in wrong.nonzero()[0])
            messages.append(
                f"{what}: {int(wrong.sum())} of {wrong.numel()} lists, first at {[row, token, group]}, position "
                f"{int(position[row, token])}: {lists[row, token, group].tolist()}"
            )
    return messages


def _least(x: Tensor, among: Tensor) -> Tensor:
    """The least of the last axis among some, inf of none."""
    return torch.where(among, x, math.inf).amin(-1)


def _out_of_order(alike: Tensor, chosen: Tensor) -> Tensor:
    """Whether of blocks alike one was chosen and a lower one not."""
    index = torch.arange(chosen.shape[-1], device=chosen.device)
    missing = torch.where(alike & ~chosen, index, chosen.shape[-1]).amin(-1)
    return torch.where(alike & chosen, index, -1).amax(-1) > missing
