"""`nsa_attention` made of the ops of this package."""

from functools import partial

from torch import Tensor

from nsa_compile.custom_ops.block_choice import select_blocks
from nsa_compile.custom_ops.compression import compressed_attention
from nsa_compile.custom_ops.dispatch import beside_flash
from nsa_compile.custom_ops.mixture import selected_mixture
from nsa_compile.custom_ops.window import window_attention
from nsa_compile.ops import nsa as reference
from nsa_compile.ops.checks import check_blocks, check_heads, check_int, check_layout, check_placement, check_selected
from nsa_compile.ops.nsa import Branches


def op_branches(impl: str) -> Branches:
    """The branch functions as ops, with one choice of implementation; beside "flash", "auto" for what it has not."""
    other = beside_flash(impl)
    return Branches(
        compressed_attention=partial(compressed_attention, impl=impl),
        select_blocks=partial(select_blocks, impl=other),
        window_attention=partial(window_attention, impl=impl),
        selected_mixture=partial(selected_mixture, impl=other),
    )


def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, *,
    l: int, d: int, l_sel: int, n_sel: int, w: int, init_blocks: int = 1, local_blocks: int = 2,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Native Sparse Attention: compression, selection and sliding window, mixed by gates (Eq. 5, Figure 2).

    Args:
        q: [b, t, n_heads, d_k] float; query head n belongs to group n // (n_heads // g).
        k_cmp, v_cmp: [b, c, g, d_k], [b, c, g, d_v] compressed tokens, as `compress_mean` gives them.
        k_slc, v_slc, k_win, v_win: [b, s, g, d_k] or d_v; s = t unless `q_start` is given.
        gates: [b, t, n_heads, 3] in the order cmp, slc, win.
        l, d, l_sel: length and stride of a compression block, length of a selection block, in tokens; d divides l and
            l_sel, l <= l_sel.
        n_sel: blocks selected per query, the first `init_blocks` (>= 0) and last `local_blocks` (>= 1) included.
        w: window length in tokens, the query's own counted.
        q_start: int32 or int64 [b] on the device, position of each row's first query (packed: its index in the row);
            keys may then be longer buffers, of which nothing after a row's last query is read into a result.
        cu_seqlens: int32 or int64 [N + 1] on the device, for b = 1 packed sequences; tokens after the last one get 0.
        scale: factor on q·k, default d_k ** -0.5.
        impl: "auto", "reference" or "triton" for every branch; "flash" for flash-attn in compressed and window
            attention, and "auto" for the rest.

    Returns: o [b, t, n_heads, d_v] in the type of q, differentiable in every float argument.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout(
        {
            "q": (q, "b t n d_k"), "k_cmp": (k_cmp, "b c g d_k"), "v_cmp": (v_cmp, "b c g d_v"),
            "k_slc": (k_slc, "b s g d_k"), "v_slc": (v_slc, "b s g d_v"),
            "k_win": (k_win, "b s_win g d_k"), "v_win": (v_win, "b s_win g d_v"), "gates": (gates, "b t n branches"),
        },
        {"branches": 3},
    )  # fmt: skip
    check_heads(sizes["n"], sizes["g"])
    check_blocks(l=l, d=d, l_sel=l_sel)
    check_selected(n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks)
    check_int("w", w)
    # the branches check more; one cast serves all of them
    q_start, cu_seqlens = check_placement(q, q_start=q_start, cu_seqlens=cu_seqlens, end=k_slc.shape[1], key="k_slc")
    return reference.nsa_attention(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, branches=op_branches(impl), l=l, d=d, l_sel=l_sel,
        n_sel=n_sel, w=w, init_blocks=init_blocks, local_blocks=local_blocks,
        q_start=q_start, cu_seqlens=cu_seqlens, scale=scale,
    )  # fmt: skip
