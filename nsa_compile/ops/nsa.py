"""Native Sparse Attention on one screen: three branches over the past of each query, mixed by gates (Figure 2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from nsa_compile.ops.compression import compressed_attention
from nsa_compile.ops.gating import gated_sum
from nsa_compile.ops.layout import query_layout
from nsa_compile.ops.selection import select_blocks, selected_attention
from nsa_compile.ops.window import window_attention


def selected_mixture(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor, o_win: Tensor, gates: Tensor, **how: Any
) -> Tensor:
    """Selected attention, and the mixture of the branches by gates [b, t, n_heads, 3]."""
    o_slc, _ = selected_attention(q, k, v, block_indices, **how)
    return gated_sum(o_cmp, o_slc, o_win, gates)


class Branches(NamedTuple):
    """The functions attention is made of; a set of them is one implementation."""

    compressed_attention: Callable[..., Any] = compressed_attention
    select_blocks: Callable[..., Any] = select_blocks
    window_attention: Callable[..., Any] = window_attention
    selected_mixture: Callable[..., Any] = selected_mixture


REFERENCE = Branches()


def attend_branches(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, *,
    l: int, d: int, l_sel: int, n_sel: int, w: int, init_blocks: int = 1, local_blocks: int = 2,
    q_start: Tensor | None = None, q_start_win: Tensor | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_win: Tensor | None = None, scale: float | None = None, branches: Branches = REFERENCE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The branches, mixed by the gates: o [b, t, n_heads, d_v], and the chosen blocks [b, t, g, n_sel].

    `q_start_win` int32 [b] is the first query's position among the window's keys, where those are not a buffer from
    position 0 on (a ring in order); default `q_start`. `cu_seqlens_win` [N + 1] packs them then.
    """
    where: dict[str, Any] = {"q_start": q_start, "cu_seqlens": cu_seqlens, "scale": scale}
    o_cmp, lse = branches.compressed_attention(q, k_cmp, v_cmp, l=l, d=d, **where)
    blocks = branches.select_blocks(
        q, k_cmp, lse, l=l, d=d, l_sel=l_sel, n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks, **where
    )
    ring = where if q_start_win is None else where | {"q_start": q_start_win, "cu_seqlens": cu_seqlens_win}
    o_win, _ = branches.window_attention(q, k_win, v_win, w=w, **ring)
    return branches.selected_mixture(q, k_slc, v_slc, blocks, o_cmp, o_win, gates, l_sel=l_sel, **where), blocks


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, **sizes: Any,
) -> Tensor:  # fmt: skip
    """`o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win` (Eq. 5); arguments as in `attend_branches`."""
    if sizes.get("cu_seqlens") is not None:  # tokens of no sequence get 0, whatever their gates hold
        valid = query_layout(q, sizes.get("q_start"), sizes["cu_seqlens"]).valid
        gates = gates.masked_fill(~valid[..., None, None], 0.0)
    o, _ = attend_branches(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, **sizes)
    return o
