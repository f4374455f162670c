"""Selected attention mixed with the other branches: on Hopper GPUs the kernel that attends also mixes.

Elsewhere a kernel mixes after the one that attends. The gradient takes the selected branch's delta from the kernel that
differentiates the mixture, where output and gradient of the branch are at hand.
"""

import torch
from torch import Tensor

from nsa_compile.custom_ops.kernels import gating, hopper, selection
from nsa_compile.custom_ops.kernels.places import query_places
from nsa_compile.custom_ops.kernels.tiles import aligned, check_grid, row_major


def selected_mixture(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor, o_win: Tensor, gates: Tensor, l_sel: int,
    q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The mixture o, the selected branch's output, both [b, t, n, d_v], and its LSE fp32 [b, t, n].

    The branch's output is wanted only if `keep`, and may be None otherwise.
    """
    if not selection.runs_on_hopper(q, k, v, l_sel):
        o_slc, lse = selection.selected_attention(q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale)
        return gating.gated_sum(o_cmp, o_slc, o_win, gates), o_slc, lse
    q, k, v = row_major(q), aligned(k), aligned(v)
    (b, t, n, _), (s, g) = q.shape, k.shape[1:3]
    check_grid("q", "rows or groups", max(b, g))
    o, lse = q.new_empty(o_cmp.shape), q.new_empty(b, t, n, dtype=torch.float32)
    kept = torch.empty_like(o) if keep else None
    places, span = query_places(q, s, q_start, cu_seqlens)
    unions = selection.block_unions(block_indices.contiguous(), places, l_sel, hopper.ROWS // (n // g))
    mixture = hopper.Mixture(o_cmp.contiguous(), o_win.contiguous(), gates.contiguous(), o)
    hopper.attend(q, k, v, *span, unions, l_sel, scale, kept, lse, mixture)
    return o, kept, lse


def selected_mixture_backward(
    grad: Tensor, o_slc: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor,
    o_win: Tensor, gates: Tensor, l_sel: int, q_start: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv, do_cmp, do_win, dgates) of the mixture."""
    grads, delta, lse2 = gating.gated_sum_backward_with_delta(grad, o_cmp, o_slc, o_win, gates, lse)
    grad_q, grad_k, grad_v = selection.selected_gradients(
        grads.slc, delta, lse2, q, k, v, block_indices, l_sel, q_start, cu_seqlens, scale
    )
    return grad_q, grad_k, grad_v, grads.cmp, grads.win, grads.gates
