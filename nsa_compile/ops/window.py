"""Sliding-window branch: attention to the tokens `max(0, t-w+1) … t`."""

import torch
from torch import Tensor

from nsa_compile.ops.attend import KeyIndex, attend_in_chunks, attend_in_chunks_backward, default_scale
from nsa_compile.ops.layout import query_chunks, query_layout


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, w: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the last `w` tokens, its own counted: o [b, t, g*h, d_v], LSE [b, t, g*h]."""
    layout, view, chunks = window_view(q, k.shape[1], w, q_start, cu_seqlens)
    return attend_in_chunks(q, k, v, layout, view, chunks, default_scale(q, scale))


def window_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, w: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `window_attention`."""
    layout, view, chunks = window_view(q, k.shape[1], w, q_start, cu_seqlens)
    return attend_in_chunks_backward(q, k, v, layout, view, chunks, default_scale(q, scale), o, lse, grad_o, grad_lse)


def window_view(q: Tensor, s: int, w: int, q_start: Tensor | None, cu_seqlens: Tensor | None):
    """Layout of the queries, the band of s keys each chunk of them sees, and the chunks to work through."""
    (b, t, n, _), w = q.shape, min(w, s)
    layout = query_layout(q, q_start, cu_seqlens)
    own = (layout.first + layout.position).unsqueeze(2)  # key index of the query's own token

    def view(part: slice) -> tuple[KeyIndex, Tensor]:
        own_part, first, valid = own[:, part], layout.first[:, part, None], layout.valid[:, part, None]
        if q_start is None:
            band = slice(max(0, part.start - w + 1), part.stop)
            key = torch.arange(band.start, band.stop, device=q.device)
            index: KeyIndex = band
        else:
            key = own_part[:, :1] + torch.arange(1 - w, own_part.shape[1], device=q.device)  # [b, 1, band]
            index = key.squeeze(1)
        visible = (key >= first) & (key <= own_part) & (key > own_part - w) & (key < s) & valid
        return index, visible.unsqueeze(2)

    return layout, view, list(query_chunks(t, 2 * b * n * w, most=max(w, 64)))
