"""Ops over static cache buffers: append tokens in place, and read the past together with tokens about to be appended.

A buffer [b, length, g, channels] holds token p of a row at index p % length: a ring if it is shorter than the past.
These ops are opaque so that a decode step stays a small graph, and inference-only: what mutates has no gradient.
"""

from typing import Optional

import torch
from torch import Tensor

from nsa_compile.custom_ops.dispatch import resolve_impl, runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.transforms import refuse_transforms


@torch.library.custom_op("nsa_compile::cache_append", mutates_args=("buffer",))
@in_range("cache")
def cache_append(buffer: Tensor, new: Tensor, positions: Tensor, count: Optional[Tensor], ring: bool) -> None:
    """Write the first `count` int32 [b] (default all) of the tokens new [b, t, g, *] at the rows' positions int32 [b].

    Unless the buffer is a ring, tokens past its end are dropped.
    """
    if runs_triton("cache_append", "auto", buffer):
        from nsa_compile.custom_ops.kernels import cache

        with torch.cuda.device_of(buffer):
            return cache.cache_append(buffer, new, positions, count, ring)
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
@in_range("cache")
def cache_write(buffer: Tensor, new: Tensor, index: Tensor, keep: Tensor) -> None:
    """Write new [b, n, g, *] at the consecutive slots index int [b, n] where keep bool [b, n]; n <= length."""
    if runs_triton("cache_write", "auto", buffer):
        from nsa_compile.custom_ops.kernels import cache

        with torch.cuda.device_of(buffer):
            return cache.cache_write(buffer, new, index, keep)
    row = torch.arange(new.shape[0], device=new.device)[:, None]
    write_slots(buffer, row, index % buffer.shape[1], new, keep & (index >= 0) & (index < buffer.shape[1]))


def write_slots(buffer: Tensor, row: Tensor, slot: Tensor, new: Tensor, keep: Tensor) -> None:
    """Write where `keep`, and elsewhere what was there: no shape depends on data, no row leaves its memory."""
    buffer[row, slot] = torch.where(keep[..., None, None], new, buffer[row, slot])


@torch.library.custom_op("nsa_compile::cache_recall", mutates_args=())
@in_range("cache")
def cache_recall(buffer: Tensor, new: Tensor, positions: Tensor, first: Tensor, length: int) -> Tensor:
    """Tokens `first … first + length - 1` of each row, of which those from `positions` on are new [b, t, g, *].

    positions, first int [b] → [b, length, g, *]. Tokens beyond the new ones repeat the last of them.
    """
    if runs_triton("cache_recall", "auto", buffer):
        from nsa_compile.custom_ops.kernels import cache

        with torch.cuda.device_of(buffer):
            return cache.cache_recall(buffer, new, positions, first, length)
    token = first[:, None] + torch.arange(length, device=new.device)
    row = torch.arange(new.shape[0], device=new.device)[:, None]
    old = buffer[row, token % buffer.shape[1]]
    fresh = new[row, (token - positions[:, None]).clamp(0, new.shape[1] - 1)]
    return torch.where((token < positions[:, None])[..., None, None], old, fresh)


@cache_recall.register_fake
def _(buffer, new, positions, first, length):
    return buffer.new_empty(buffer.shape[0], length, *buffer.shape[2:])


STEP = 8
"""Tokens per row that one step of `decode_attention` takes at most, and that a row of a cache can take back."""


def runs_step(impl: str, q: Tensor, v: Tensor, *, d: int, l_sel: int) -> bool:
    """Whether `decode_attention` takes a step of queries q [b, t, n, d_k] with values v [b, t, g, d_v].

    A launch has at most 65535 rows times tokens.
    """
    fits = q.shape[1] <= STEP and q.shape[0] * q.shape[1] <= 65535 and l_sel // d <= 64
    width = max(q.shape[-1], v.shape[-1])
    return fits and resolve_impl("decode_attention", impl, q.device, q.dtype, width).impl == "triton"


@torch.library.custom_op(
    "nsa_compile::decode_attention",
    mutates_args=(
        "positions", "nominal_reads", "actual_reads", "cached_k_cmp", "cached_v_cmp", "k_raw", "v_raw",
        "cached_k_slc", "cached_v_slc", "cached_k_win", "cached_v_win",
    ),
)  # fmt: skip
@in_range("step")
def decode_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Optional[Tensor],
    v_win: Optional[Tensor], k_emitted: Optional[Tensor], v_emitted: Optional[Tensor], gates: Tensor,
    count: Optional[Tensor], positions: Tensor, nominal_reads: Tensor, actual_reads: Tensor,
    cached_k_cmp: Tensor, cached_v_cmp: Tensor, k_raw: Tensor, v_raw: Tensor, cached_k_slc: Tensor,
    cached_v_slc: Tensor, cached_k_win: Optional[Tensor], cached_v_win: Optional[Tensor],
    l: int, d: int, l_sel: int, n_sel: int, w: int, init_blocks: int, local_blocks: int, theta: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer's attention for t <= STEP new tokens per row, appended to its caches on the way (Triton kernels only).

    q [b, t, n, d_k], keys and values [b, t, g, *] of the new tokens, none of them rotated; gates [b, t, n, 3]; `count`
    int32 [b] of them are taken, default all. k_emitted, v_emitted [b, ceil(t / d), g, *] are φ of the blocks from the
    first incomplete one on, default their means. The window's are None where it shares the selection's keys and values.
    Tokens past the capacity are kept nowhere, but positions count them. Returns o [b, t, n, d_v], NaN for tokens past
    the capacity and 0 for those not taken, and the chosen blocks int32 [b, t, g, n_sel].
    """
    from nsa_compile.custom_ops.kernels import decode

    with torch.cuda.device_of(q):
        return decode.decode_attention(
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, k_emitted, v_emitted, gates, count,
            positions, nominal_reads, actual_reads, cached_k_cmp, cached_v_cmp, k_raw, v_raw,
            cached_k_slc, cached_v_slc, cached_k_win, cached_v_win,
            l, d, l_sel, n_sel, w, init_blocks, local_blocks, theta, scale,
        )  # fmt: skip


@decode_attention.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, k_emitted, v_emitted, gates, count, *rest):
    n_sel = rest[-6]
    blocks = q.new_empty(*q.shape[:2], k_slc.shape[2], n_sel, dtype=torch.int32)
    return q.new_empty(*q.shape[:3], v_slc.shape[-1]), blocks


for op in (cache_append, cache_write, cache_recall, decode_attention):
    refuse_transforms(op)
