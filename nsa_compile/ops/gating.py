"""Gates (Eq. 5): the mixture of the three branches, and what a gate's values look like."""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from nsa_compile.ops.attend import compute_dtype
from nsa_compile.ops.checks import check_layout, check_number, check_tensor, has_shape


def gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """`o = sum_c g_c * o_c` (Eq. 5) in at least fp32: o_* [b, t, n, d_v], gates [b, t, n, 3] → [b, t, n, d_v]."""
    dtype = compute_dtype(o_cmp)
    outputs = torch.stack((o_cmp, o_slc, o_win), dim=-1).to(dtype)
    return reduce(outputs * rearrange(gates.to(dtype), "b t n c -> b t n 1 c"), "b t n d c -> b t n d", "sum").to(
        o_cmp.dtype
    )


def gated_sum_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_sum`: `do_c = g_c * do` and `dg_c = sum_d do * o_c`."""
    dtype = compute_dtype(grad)
    grad = grad.to(dtype)
    grad_o = (grad * g.unsqueeze(-1) for g in gates.to(dtype).unbind(-1))
    grad_gates = torch.stack([(grad * o.to(dtype)).sum(-1) for o in (o_cmp, o_slc, o_win)], dim=-1)
    d_cmp, d_slc, d_win = (x.to(o_cmp.dtype) for x in grad_o)
    return d_cmp, d_slc, d_win, grad_gates.to(gates.dtype)


class GateStatistics(NamedTuple):
    """How gates mix the branches: scalars, and `share` [3] in the order cmp, slc, win.

    `mean` and `std` [3] are of the gate values, `share` is each branch's part of their sum, `entropy` that of the parts
    in nats (log 3 when even), `collapse` the fraction of (token, head) pairs in which one branch takes over 90 %.
    """

    mean: Tensor
    std: Tensor
    share: Tensor
    entropy: Tensor
    collapse: Tensor


def gate_statistics(gates: Tensor, valid: Tensor | None = None, *, threshold: float = 0.9) -> GateStatistics:
    """Statistics of gates [b, t, n, 3] over the tokens where `valid` bool [b, t] (default all)."""
    sizes = check_layout({"gates": (gates, "b t n branches")}, {"branches": 3})
    if valid is not None and (
        not has_shape(check_tensor("valid", valid), sizes["b"], sizes["t"]) or valid.dtype != torch.bool
    ):
        raise ValueError(f"valid: expected bool [{sizes['b']}, {sizes['t']}], got {valid.dtype} {tuple(valid.shape)}")
    check_number("threshold", threshold)
    gates = gates.detach().to(compute_dtype(gates))
    weight = (
        gates.new_ones(gates.shape[:3]) if valid is None else valid[..., None].expand(gates.shape[:3]).to(gates.dtype)
    )
    gates = gates.masked_fill(weight.unsqueeze(-1) == 0, 0.0)  # what padding holds, be it NaN
    total = weight.sum().clamp_min(1)

    def mean(x: Tensor) -> Tensor:
        return (x * weight.reshape(*weight.shape, *(1,) * (x.ndim - 3))).sum((0, 1, 2)) / total

    share = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    average = mean(gates)
    return GateStatistics(
        mean=average,
        std=mean((gates - average) ** 2).sqrt(),
        share=mean(share),
        entropy=mean(-torch.special.xlogy(share, share).sum(-1)),
        collapse=mean((share.amax(-1) > threshold).to(gates.dtype)),
    )
