"""Ops over static cache buffers: append tokens in place, and read the past together with tokens about to be appended.

A buffer [b, length, g, channels] holds token p of a row at index p % length: a ring if it is shorter than the past.
These ops are opaque so that a decode step stays a small graph, and inference-only: what mutates has no gradient.
"""

from typing import Optional

import torch
from torch import Tensor


@torch.library.custom_op("nsa_compile::cache_append", mutates_args=("buffer",))
def cache_append(buffer: Tensor, new: Tensor, positions: Tensor, count: Optional[Tensor], ring: bool) -> None:
    """Write the first `count` int32 [b] (default all) of the tokens new [b, t, g, *] at the rows' positions int32 [b].

    Unless the buffer is a ring, tokens past its end are dropped.
    """
    t, length = new.shape[1], buffer.shape[1]
    n = min(t, length)  # of a ring only the last tokens matter
    ends = torch.full_like(positions, t) if count is None else count.clamp(0, t)
    offset = torch.arange(n, device=new.device) + (ends[:, None] - n)
    index = positions[:, None] + offset
    row = torch.arange(new.shape[0], device=new.device)[:, None]
    keep = (offset >= 0) & (ring | (index < length))
    # rows are written at n different slots each, the unwanted ones with what they hold
    write_slots(buffer, row, index % length, new[row, offset.clamp(0, t - 1)], keep)


@torch.library.custom_op("nsa_compile::cache_write", mutates_args=("buffer",))
def cache_write(buffer: Tensor, new: Tensor, index: Tensor, keep: Tensor) -> None:
    """Write new [b, n, g, *] at the consecutive slots index int [b, n] where keep bool [b, n]; n <= length."""
    row = torch.arange(new.shape[0], device=new.device)[:, None]
    write_slots(buffer, row, index % buffer.shape[1], new, keep & (index >= 0) & (index < buffer.shape[1]))


def write_slots(buffer: Tensor, row: Tensor, slot: Tensor, new: Tensor, keep: Tensor) -> None:
    """Write where `keep`, and elsewhere what was there: no shape depends on data, no row leaves its memory."""
    buffer[row, slot] = torch.where(keep[..., None, None], new, buffer[row, slot])


@torch.library.custom_op("nsa_compile::cache_recall", mutates_args=())
def cache_recall(buffer: Tensor, new: Tensor, positions: Tensor, first: Tensor, length: int) -> Tensor:
    """Tokens `first … first + length - 1` of each row, of which those from `positions` on are new [b, t, g, *].

    positions, first int [b] → [b, length, g, *]. Tokens beyond the new ones repeat the last of them.
    """
    token = first[:, None] + torch.arange(length, device=new.device)
    row = torch.arange(new.shape[0], device=new.device)[:, None]
    old = buffer[row, token % buffer.shape[1]]
    fresh = new[row, (token - positions[:, None]).clamp(0, new.shape[1] - 1)]
    return torch.where((token < positions[:, None])[..., None, None], old, fresh)


@cache_recall.register_fake
def _(buffer, new, positions, first, length):
    return buffer.new_empty(buffer.shape[0], length, *buffer.shape[2:])
