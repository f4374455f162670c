"""The op of attention to the selected blocks, and its gradient."""

from typing import Optional

import torch
from torch import Tensor

from nsa_compile.custom_ops.dispatch import runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.registration import (
    attach_gradient,
    causal_pairs,
    empty_attention,
    empty_contiguous,
    register_attention_flops,
)
from nsa_compile.ops import selection as reference
from nsa_compile.ops.attend import default_scale
from nsa_compile.ops.checks import (
    check_block_indices,
    check_heads,
    check_int,
    check_key_placement,
    check_layout,
)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, l_sel: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of the query at position t to the tokens `s <= t` of its selected blocks (the selection branch).

    Args:
        q: [b, t, n_heads, d_k] float; query head n belongs to group n // (n_heads // g).
        k, v: [b, s, g, d_k], [b, s, g, d_v]; s = t unless `q_start` is given.
        block_indices: int32 or int64 [b, t, g, n_sel] as `select_blocks` gives them: blocks of l_sel tokens of the
            query's own sequence, no block twice, -1 in unused slots. Carries no gradient.
        l_sel: length of a selection block in tokens.
        q_start: int32 or int64 [b] on the device, position of each row's first query (packed: its index in the row);
            the keys may then be a longer buffer.
        cu_seqlens: int32 or int64 [N + 1] on the device, for b = 1 packed sequences.
        scale: factor on q·k, default d_k ** -0.5.
        impl: "auto", "reference" or "triton".

    Returns: o [b, t, n_heads, d_v] in the type of q, and the natural-log LSE [b, t, n_heads] in fp32 (fp64 for fp64
        inputs), both differentiable. A query without a visible token has o = 0 and LSE = -inf.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout({"q": (q, "b t n d_k"), "k": (k, "b s g d_k"), "v": (v, "b s g d_v")})
    check_heads(sizes["n"], sizes["g"])
    check_int("l_sel", l_sel)
    q_start, cu_seqlens = check_key_placement(q, k, q_start=q_start, cu_seqlens=cu_seqlens)
    block_indices = check_block_indices(block_indices, q, k, l_sel=l_sel, q_start=q_start)
    runs_triton("selected_attention", impl, q, v)
    return torch.ops.nsa_compile.selected_attention(
        q, k, v, block_indices, l_sel, q_start, cu_seqlens, default_scale(q, scale), impl
    )


@torch.library.custom_op("nsa_compile::selected_attention", mutates_args=())
@in_range("slc")
def _selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, l_sel: int, q_start: Optional[Tensor],
    cu_seqlens: Optional[Tensor], scale: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if runs_triton("selected_attention", impl, q, v):
        from nsa_compile.custom_ops.kernels import selection

        with torch.cuda.device_of(q):
            return selection.selected_attention(q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale)
    return reference.selected_attention(
        q, k, v, block_indices, l_sel=l_sel, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale
    )


@_selected_attention.register_fake
def _(q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale, impl):
    return empty_attention(q, v)


@torch.library.custom_op("nsa_compile::selected_attention_backward", mutates_args=())
@in_range("slc backward")
def _selected_attention_backward(
    grad_o: Tensor, grad_lse: Optional[Tensor], o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, l_sel: int, q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if runs_triton("selected_attention", impl, q, v):
        from nsa_compile.custom_ops.kernels import selection

        with torch.cuda.device_of(q):
            return selection.selected_attention_backward(
                grad_o, grad_lse, o, lse, q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale
            )
    return reference.selected_attention_backward(
        grad_o, grad_lse, q, k, v, block_indices, o, lse,
        l_sel=l_sel, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale,
    )  # fmt: skip


@_selected_attention_backward.register_fake
def _(grad_o, grad_lse, o, lse, q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale, impl):
    return empty_contiguous(q, k, v)


def selected_pairs(q, k, v, block_indices, l_sel: int, q_start: object) -> int:
    """(query, key) pairs of one row and head, from shapes."""
    return causal_pairs(q[1], min(block_indices[-1] * l_sel, k[1]), q_start is not None)


attach_gradient(_selected_attention, _selected_attention_backward)
register_attention_flops(
    torch.ops.nsa_compile.selected_attention,
    torch.ops.nsa_compile.selected_attention_backward,
    lambda *args: selected_pairs(*args[:6]),
)
