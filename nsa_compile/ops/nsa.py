"""Native Sparse Attention on one screen: three branches over the past of each query, mixed by gates (Figure 2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from nsa_compile.ops.compression import compressed_attention
from nsa_compile.ops.gating import gated_sum
from nsa_compile.ops.layout import query_layout
from nsa_compile.ops.selection import select_blocks, selected_attention
from nsa_compile.ops.window import window_attention


class Branches(NamedTuple):
    """The functions attention is made of; a set of them is one implementation."""

    compressed_attention: Callable[..., Any] = compressed_attention
    select_blocks: Callable[..., Any] = select_blocks
    selected_attention: Callable[..., Any] = selected_attention
    window_attention: Callable[..., Any] = window_attention
    gated_sum: Callable[..., Any] = gated_sum


class BranchOutputs(NamedTuple):
    """Outputs [b, t, n_heads, d_v] of the branches before the gates, and the chosen blocks [b, t, g, n_sel]."""

    o_cmp: Tensor
    o_slc: Tensor
    o_win: Tensor
    block_indices: Tensor


REFERENCE = Branches()


def attend_branches(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, *,
    l: int, d: int, l_sel: int, n_sel: int, w: int, init_blocks: int = 1, local_blocks: int = 2,
    q_start: Tensor | None = None, q_start_win: Tensor | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_win: Tensor | None = None, scale: float | None = None, branches: Branches = REFERENCE,
) -> BranchOutputs:  # fmt: skip
    """The three branches of `nsa_attention`, not yet mixed.

    `q_start_win` int32 [b] is the first query's position among the window's keys, where those are not a buffer from
    position 0 on (a ring in order); default `q_start`. `cu_seqlens_win` [N + 1] packs them then.
    """
    where: dict[str, Any] = {"q_start": q_start, "cu_seqlens": cu_seqlens, "scale": scale}
    o_cmp, lse = branches.compressed_attention(q, k_cmp, v_cmp, l=l, d=d, **where)
    blocks = branches.select_blocks(
        q, k_cmp, lse, l=l, d=d, l_sel=l_sel, n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks, **where
    )
    o_slc, _ = branches.selected_attention(q, k_slc, v_slc, blocks, l_sel=l_sel, **where)
    if q_start_win is not None:
        where |= {"q_start": q_start_win, "cu_seqlens": cu_seqlens_win}
    o_win, _ = branches.window_attention(q, k_win, v_win, w=w, **where)
    return BranchOutputs(o_cmp, o_slc, o_win, blocks)


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, *,
    branches: Branches = REFERENCE, **sizes: Any,
) -> Tensor:  # fmt: skip
    """`o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win` (Eq. 5); arguments as in `attend_branches`."""
    out = attend_branches(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, branches=branches, **sizes)
    if sizes.get("cu_seqlens") is not None:  # tokens of no sequence get 0, whatever their gates hold
        valid = query_layout(q, sizes.get("q_start"), sizes["cu_seqlens"]).valid
        gates = gates.masked_fill(~valid[..., None, None], 0.0)
    return branches.gated_sum(out.o_cmp, out.o_slc, out.o_win, gates)
