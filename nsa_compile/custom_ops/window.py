"""The sliding-window op and its gradient."""

from typing import Optional

import torch
from torch import Tensor

from nsa_compile.custom_ops import flash
from nsa_compile.custom_ops.dispatch import choose_attention, runs_triton
from nsa_compile.custom_ops.ranges import in_range
from nsa_compile.custom_ops.registration import (
    attach_gradient,
    causal_pairs,
    empty_attention,
    empty_contiguous,
    register_attention_flops,
)
from nsa_compile.ops import window as reference
from nsa_compile.ops.attend import default_scale
from nsa_compile.ops.checks import check_heads, check_int, check_key_placement, check_layout


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, w: int,
    q_start: Tensor | None = None, cu_seqlens: Tensor | None = None, scale: float | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of the query at position t to the tokens `max(0, t-w+1) … t` (the sliding-window branch).

    Args:
        q: [b, t, n_heads, d_k] float; query head n belongs to group n // (n_heads // g).
        k, v: [b, s, g, d_k], [b, s, g, d_v]; s = t unless `q_start` is given.
        w: window length in tokens, the query's own counted.
        q_start: int32 or int64 [b] on the device, position of each row's first query (packed: its index in the row);
            the keys may then be a longer buffer.
        cu_seqlens: int32 or int64 [N + 1] on the device, for b = 1 packed sequences.
        scale: factor on q·k, default d_k ** -0.5.
        impl: "auto", "reference", "triton" or "flash".

    Returns: o [b, t, n_heads, d_v] in the type of q, and the natural-log LSE [b, t, n_heads] in fp32 (fp64 for fp64
        inputs), both differentiable. Tokens of no packed sequence have o = 0 and LSE = -inf.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    sizes = check_layout({"q": (q, "b t n d_k"), "k": (k, "b s g d_k"), "v": (v, "b s g d_v")})
    check_heads(sizes["n"], sizes["g"])
    check_int("w", w)
    q_start, cu_seqlens = check_key_placement(q, k, q_start=q_start, cu_seqlens=cu_seqlens)
    runs_triton("window_attention", impl, q, v)
    return torch.ops.nsa_compile.window_attention(q, k, v, w, q_start, cu_seqlens, default_scale(q, scale), impl)


@torch.library.custom_op("nsa_compile::window_attention", mutates_args=())
@in_range("win")
def _window_attention(
    q: Tensor, k: Tensor, v: Tensor, w: int, q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    choice = choose_attention("window_attention", impl, q, v, q_start=q_start, cu_seqlens=cu_seqlens)
    if choice.impl == "flash":
        return flash.window_attention(q, k, v, w=w, cu_seqlens=cu_seqlens, scale=scale, version=choice.flash_version)
    if choice.impl == "triton":
        from nsa_compile.custom_ops.kernels import interval, places

        with torch.cuda.device_of(q):
            keys = places.window_intervals(q, k.shape[1], w, q_start, cu_seqlens)
            return interval.interval_attention(q, k, v, keys, scale)
    return reference.window_attention(q, k, v, w=w, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale)


@_window_attention.register_fake
def _(q, k, v, w, q_start, cu_seqlens, scale, impl):
    return empty_attention(q, v)


@torch.library.custom_op("nsa_compile::window_attention_backward", mutates_args=())
@in_range("win backward")
def _window_attention_backward(
    grad_o: Tensor, grad_lse: Optional[Tensor], o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, w: int,
    q_start: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    choice = choose_attention(
        "window_attention", impl, q, v, q_start=q_start, cu_seqlens=cu_seqlens, backward=True, grad_lse=grad_lse
    )
    if choice.impl == "flash":
        return flash.window_attention_backward(
            grad_o, grad_lse, o, lse, q, k, v, w=w, cu_seqlens=cu_seqlens, scale=scale, version=choice.flash_version
        )
    if choice.impl == "triton":
        from nsa_compile.custom_ops.kernels import interval, places

        with torch.cuda.device_of(q):
            keys = places.window_intervals(q, k.shape[1], w, q_start, cu_seqlens)
            return interval.interval_attention_backward(grad_o, grad_lse, o, lse, q, k, v, keys, scale)
    return reference.window_attention_backward(
        grad_o, grad_lse, q, k, v, o, lse, w=w, q_start=q_start, cu_seqlens=cu_seqlens, scale=scale
    )


@_window_attention_backward.register_fake
def _(grad_o, grad_lse, o, lse, q, k, v, w, q_start, cu_seqlens, scale, impl):
    return empty_contiguous(q, k, v)


attach_gradient(_window_attention, _window_attention_backward)
register_attention_flops(
    torch.ops.nsa_compile.window_attention,
    torch.ops.nsa_compile.window_attention_backward,
    lambda q, k, v, w, q_start, *_: causal_pairs(q[1], min(w, k[1]), q_start is not None),
)
