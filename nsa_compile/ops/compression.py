"""Compression branch (Eq. 7): block means, and attention over the compressed tokens."""

import torch
from einops import rearrange, reduce
from torch import Tensor

from nsa_compile.ops.attend import (
    attend_in_chunks,
    attend_in_chunks_backward,
    compute_dtype,
    default_scale,
)
from nsa_compile.ops.layout import compressed_slots, num_cmp, query_chunks, query_layout, visible_slots


def gather_blocks(k: Tensor, cu_seqlens: Tensor, *, l: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens of every compression block of a packed row, [1, c, l, g, *] with c = s // d; which slots are used [c]."""
    s = k.shape[1]
    _, first, used = compressed_slots(s // d, cu_seqlens, l=l, d=d)
    token = (first[:, None] + torch.arange(l, device=k.device)).clamp(0, s - 1)
    return k[:, token].masked_fill(~used[:, None, None, None], 0.0), used


def compress_mean(k: Tensor, *, l: int, d: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean of every compression block: `k_cmp[i] = mean(k[i*d : i*d+l])`.

    k [b, s, g, *] → [b, num_cmp(s), g, *]; packed: [1, s // d, g, *], unused slots 0. Sums run in at least fp32.
    """
    if cu_seqlens is not None:
        blocks, _ = gather_blocks(k, cu_seqlens, l=l, d=d)
        return reduce(blocks.to(compute_dtype(k)), "b c l g x -> b c g x", "mean").to(k.dtype)
    c = num_cmp(k.shape[1], l, d)
    strides = k[:, : (c + l // d - 1) * d if c else 0].to(compute_dtype(k))
    strides = reduce(strides, "b (n d) g x -> b n g x", "sum", d=d)
    total = strides.new_zeros(k.shape[0], c, *k.shape[2:])
    for r in range(l // d):  # a block is l // d neighbouring strides
        total += strides[:, r : r + c]
    return (total / l).to(k.dtype)


def compress_mean_backward(grad: Tensor, s: int, *, l: int, d: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Gradient [b, s, g, *] of `compress_mean`: every token gets `1 / l` of each block that covers it."""
    b, c, g, x = grad.shape
    share = grad.to(compute_dtype(grad)) / l
    out = share.new_zeros(b, s, g, x)
    if cu_seqlens is not None:
        _, first, used = compressed_slots(c, cu_seqlens, l=l, d=d)
        share = share.masked_fill(~used[:, None, None], 0.0)
        for r in range(l):
            out.index_add_(1, (first + r).clamp(0, s - 1), share)
    elif c:
        strides = share.new_zeros(b, c + l // d - 1, g, x)
        for r in range(l // d):
            strides[:, r : r + c] += share
        out[:, : strides.shape[1] * d] = (
            rearrange(strides, "b n g x -> b n 1 g x").expand(-1, -1, d, -1, -1).flatten(1, 2)
        )
    return out.to(grad.dtype)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, l: int, d: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the compressed tokens it sees (Eq. 7): o [b, t, g*h, d_v], LSE [b, t, g*h]."""
    layout, view, chunks = compressed_view(q, k_cmp, l, d, q_start, cu_seqlens)
    return attend_in_chunks(q, k_cmp, v_cmp, layout, view, chunks, default_scale(q, scale))


def compressed_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor, *,
    l: int, d: int, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk_cmp, dv_cmp) of `compressed_attention`."""
    layout, view, chunks = compressed_view(q, k_cmp, l, d, q_start, cu_seqlens)
    return attend_in_chunks_backward(
        q, k_cmp, v_cmp, layout, view, chunks, default_scale(q, scale), o, lse, grad_o, grad_lse
    )


def compressed_view(q: Tensor, k_cmp: Tensor, l: int, d: int, q_start: Tensor | None, cu_seqlens: Tensor | None):
    """Layout of the queries, the compressed tokens each of them sees, and the chunks to work through."""
    c = k_cmp.shape[1]
    layout = query_layout(q, q_start, cu_seqlens)
    first, end = visible_slots(layout, cu_seqlens, l=l, d=d)
    slot = torch.arange(c, device=q.device)

    def view(part: slice) -> tuple[slice, Tensor]:
        return slice(None), ((slot >= first[:, part, None]) & (slot < end[:, part, None])).unsqueeze(2)

    return layout, view, list(query_chunks(q.shape[1], q.shape[0] * q.shape[2] * c))
