"""The op that scores the selection blocks and picks the best of them for every query and group."""

from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.custom_ops.compression import check_compressed_placement
from nsa_compile.custom_ops.dispatch import runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.registration import compressed_pairs
from nsa_compile.custom_ops.transforms import pass_no_gradient
from nsa_compile.ops import selection as reference
from nsa_compile.ops.attend import compute_dtype, default_scale
from nsa_compile.ops.checks import check_blocks, check_heads, check_layout, check_selected, check_tensor, has_shape


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, l: int, d: int, l_sel: int, n_sel: int,
    init_blocks: int = 1, local_blocks: int = 2, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None,
    scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Choose the blocks each query and group attends to (Eq. 8-12).

    The scores are `p_grp[j] = sum_h sum_i p_cmp[i] * overlap(i, j) / d` with `p_cmp = exp(scale * q·k_cmp - lse)` over
    the visible compressed tokens. The first `init_blocks` and the last `local_blocks` up to the query's own are forced
    and count towards n_sel; the other slots go to the highest scores. Passes no gradient.

    The same inputs give the same blocks at every call. Scores whose bits agree are ties, and the lower index wins.
    Scores that are equal on paper (repeated keys, say) are sums in fp32, whose last bits depend on the order of their
    terms: implementations, devices and layouts may rank those differently. With q = 0 all blocks between the first
    one and the last ones are ties.

    Args:
        q: [b, t, n_heads, d_k] float; query head n belongs to group n // (n_heads // g).
        k_cmp: [b, c, g, d_k] compressed keys.
        lse: [b, t, n_heads] of `compressed_attention` with the same arguments.
        l, d, l_sel: length and stride of a compression block, length of a selection block, in tokens; d divides l and
            l_sel, l <= l_sel.
        n_sel: blocks per query, at least init_blocks + local_blocks; init_blocks >= 0, local_blocks >= 1.
        q_start: int32 or int64 [b] on the device, position of each row's first query (packed: its index in the row);
            c may then be that of a longer buffer.
        cu_seqlens: int32 or int64 [N + 1] on the device, for b = 1 packed sequences; block numbers are local to each.
        scale: factor on q·k, default d_k ** -0.5.
        impl: "auto", "reference" or "triton".

    Returns: int32 [b, t, g, n_sel], ascending and unique; -1 in the unused slots, which stand last.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout({"q": (q, "b t n d_k"), "k_cmp": (k_cmp, "b c g d_k")})
    check_heads(sizes["n"], sizes["g"])
    if not has_shape(check_tensor("lse", lse), *q.shape[:3]) or lse.dtype != compute_dtype(q) or lse.device != q.device:
        raise ValueError(
            f"lse: expected {compute_dtype(q)} {tuple(q.shape[:3])} on {q.device}, "
            f"got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )
    check_blocks(l=l, d=d, l_sel=l_sel)
    check_selected(n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks)
    q_start, cu_seqlens = check_compressed_placement(q, k_cmp, l=l, d=d, q_start=q_start, cu_seqlens=cu_seqlens)
    runs_triton("select_blocks", impl, q)
    return torch.ops.nsa_compile.select_blocks(
        q.detach(), k_cmp.detach(), lse.detach(), l, d, l_sel, n_sel, init_blocks, local_blocks, q_start, cu_seqlens,
        default_scale(q, scale), impl,
    )  # fmt: skip


@torch.library.custom_op("nsa_compile::select_blocks", mutates_args=())
@in_range("choice")
def _select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, l: int, d: int, l_sel: int, n_sel: int, init_blocks: int,
    local_blocks: int, q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float, impl: str,
) -> Tensor:  # fmt: skip
    if runs_triton("select_blocks", impl, q):
        from nsa_compile.custom_ops.kernels import block_choice

        with torch.cuda.device_of(q):
            return block_choice.select_blocks(
                q, k_cmp, lse, l, d, l_sel, n_sel, init_blocks, local_blocks, q_start, cu_seqlens, scale
            )
    return reference.select_blocks(
        q, k_cmp, lse, l=l, d=d, l_sel=l_sel, n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks,
        q_start=q_start, cu_seqlens=cu_seqlens, scale=scale,
    )  # fmt: skip


@_select_blocks.register_fake
def _(q, k_cmp, lse, l, d, l_sel, n_sel, init_blocks, local_blocks, q_start, cu_seqlens, scale, impl):
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], n_sel, dtype=torch.int32)


pass_no_gradient(_select_blocks)


@register_flop_formula(torch.ops.nsa_compile.select_blocks)
def _(
    q, k_cmp, lse, l, d, l_sel, n_sel, init_blocks, local_blocks, q_start, cu_seqlens, scale, impl,
    *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    b, t, n, d_k = q
    return 2 * b * n * compressed_pairs(t, k_cmp[1], l, d, q_start is not None) * d_k
