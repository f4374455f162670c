"""How far from fp64 a result may be: twice the error of plain torch in the same type, and what roundings add up to.

The three-way bound is `|x - exact| <= 2 * |plain - exact| + units`: exact is the dense oracle in fp64 with autograd,
plain the textbook computation in fp32 (fp64 for fp64) that rounds to the type of the inputs where a kernel may, its
error the largest over a row's channels, and units an a-priori bound on roundings, made of the magnitudes that were
summed. It is as narrow for small rows of a tensor as for large ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import dense_oracle as oracle
import torch
from torch import Tensor

AT_ONCE = 2**25
"""Most (query head, key) pairs that are judged at once."""
LOST = 0.25
"""Relative error of a probability from which on its numbers say nothing: scores so large that fp32 loses them."""


class Bound(NamedTuple):
    """What a tensor should be, fp64, and how far each element may be from it."""

    exact: Tensor
    tolerance: Tensor

    def part(self, *index: slice) -> Bound:
        """The same of a part of the tensor."""
        return Bound(self.exact[index], self.tolerance[index])


class Epsilons(NamedTuple):
    """Spacing at 1 of the inputs' type and of the type that is computed in; what either may lose at 0."""

    own: float
    compute: float
    smallest: float


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def epsilons(dtype: torch.dtype) -> Epsilons:
    own, compute = torch.finfo(dtype), torch.finfo(compute_type(dtype))
    # a GPU's exp2 gives 0 for what is not a normal number
    return Epsilons(own.eps, compute.eps, max(own.smallest_normal * own.eps, 4 * compute.smallest_normal))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def bound_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, grad_o: Tensor | None, grad_lse: Tensor | None,
    dtype: torch.dtype, loose: float = 0.0,
) -> dict[str, Bound]:  # fmt: skip
    """Bounds of o, lse and, with a gradient of either, of q, k and v; all finite, of an op on inputs of `dtype`.

    Rows and groups are judged one after another, so that memory stays bounded. `loose` is the relative error that
    grad_o already has.
    """
    (b, t, n, _), (s, g) = q.shape, k.shape[1:3]
    h = n // g
    step = max(1, min(g, AT_ONCE // max(1, h * t * s)))
    backward = grad_o is not None or grad_lse is not None
    names = ("o", "lse", "q", "k", "v") if backward else ("o", "lse")
    rows = []
    for row in range(b):
        parts = []
        for first in range(0, g, step):
            groups, part = slice(first, min(g, first + step)), slice(first * h, min(g, first + step) * h)
            shown = visible[row : row + 1, :, groups if visible.shape[2] > 1 else slice(None)]
            inputs = q[row : row + 1, :, part], k[row : row + 1, :, groups], v[row : row + 1, :, groups]
            grads = [None if x is None else x[row : row + 1, :, part] for x in (grad_o, grad_lse)]
            parts.append(_bound_part(*inputs, shown, scale, *grads, dtype, loose))
        rows.append([_joined(bounds, 2) for bounds in zip(*parts, strict=True)])
    return dict(zip(names, (_joined(bounds, 0) for bounds in zip(*rows, strict=True)), strict=True))


def _joined(bounds: Sequence[Bound], axis: int) -> Bound:
    return Bound(torch.cat([x.exact for x in bounds], axis), torch.cat([x.tolerance for x in bounds], axis))


def _bound_part(q, k, v, visible, scale, grad_o, grad_lse, dtype, loose) -> list[Bound]:
    """Bounds (o, lse, q, k, v) of one row and some groups."""
    exact = _exact(q, k, v, visible, scale, grad_o, grad_lse)
    plain, units = plain_attention(q, k, v, visible, scale, grad_o, grad_lse, dtype, loose)
    bounds = []
    for truth, same, unit in zip(exact, plain, units, strict=True):
        error = torch.where(truth == same, 0.0, (same.double() - truth).abs())
        if truth.ndim == 4 and error.numel():
            error = error.amax(-1, keepdim=True)
        bounds.append(Bound(truth, 2 * error + unit))
    return bounds


def _exact(q, k, v, visible, scale, grad_o, grad_lse) -> list[Tensor]:
    """The dense oracle in fp64, gradients by autograd."""
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    o, lse = oracle.attend(*leaves, visible, scale)
    if grad_o is None and grad_lse is None:
        return [o.detach(), lse.detach()]
    pairs = [(x, y.double()) for x, y in ((o, grad_o), (lse, grad_lse)) if y is not None]
    if k.shape[1]:
        grads = torch.autograd.grad([x for x, _ in pairs], leaves, [y for _, y in pairs], materialize_grads=True)
    else:
        grads = tuple(map(torch.zeros_like, leaves))
    return [o.detach(), lse.detach(), *grads]


def plain_attention(q, k, v, visible, scale, grad_o, grad_lse, dtype, loose) -> tuple[list[Tensor], list[Tensor]]:
    """(results, units) of plain attention; rows of a group are its heads, token after token.

    With P the probabilities: dV = Pᵀ dO, dS = P * (dO Vᵀ - delta), delta = sum(dO * o) - dLSE, dQ = scale * dS K,
    dK = scale * dSᵀ Q. A score may be off by some roundings of the products that it sums, and a probability by twice as
    much; probabilities and dS may be rounded to the inputs' type, and delta is that of an output that was.
    """
    t, g, h = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    eps, compute = epsilons(dtype), compute_type(dtype)
    q_rows, seen = oracle.rows_of(q, g).to(compute), oracle.rows_see(visible, h)
    k, v = k.transpose(1, 2).to(compute), v.transpose(1, 2).to(compute)
    scores = q_rows @ k.mT * scale
    largest = _largest(scores.masked_fill(~seen, -math.inf))
    weights = torch.exp(scores.masked_fill_(~seen, -math.inf) - largest)
    del scores
    blind = ~seen.any(-1, keepdim=True)
    total = weights.sum(-1, keepdim=True).masked_fill_(blind, 1.0)
    # weights are at most 1: those that the type cannot hold are lost
    lost = eps.smallest * seen.sum(-1, keepdim=True) * v.abs().amax((-2, -1), keepdim=True) if v.numel() else 0.0
    o = rounded(rounded(weights, dtype) @ v / total, dtype)
    lse = (largest + total.log()).masked_fill(blind, -math.inf)
    drift = 16 * eps.compute * abs(scale) * _largest((q_rows.abs() @ k.abs().mT).masked_fill_(~seen, 0.0))
    drift = torch.where(drift > LOST, 1e9, drift)
    p = weights.div_(total)
    sums = eps.compute * (32 + math.sqrt(p.shape[-1]))
    units = [
        p @ v.abs() * (eps.own + 2 * drift + sums) + eps.own * o.abs() + lost / total + eps.smallest,
        2 * drift + eps.compute * (8 + 4 * lse.abs()),
    ]
    results = [o, lse]
    if grad_o is not None or grad_lse is not None:
        x = (q_rows, k, v, p, o, drift, blind, seen)
        more = _plain_gradients(*x, scale, *_rows_of_gradients(q_rows, v, g, grad_o, grad_lse), eps, dtype, loose)
        results, units = results + more[0], units + more[1]

    def back(tensors: list[Tensor]) -> list[Tensor]:
        o, lse, *grads = tensors
        out = [oracle.from_rows(o, t), oracle.from_rows(lse, t).squeeze(-1)]
        return out + [oracle.from_rows(x, t) if i == 0 else x.transpose(1, 2) for i, x in enumerate(grads)]

    return back(results), back(units)


def _largest(x: Tensor) -> Tensor:
    """The largest of each row, 0 where there is none."""
    if not x.shape[-1]:
        return x.new_zeros(*x.shape[:-1], 1)
    return x.amax(-1, keepdim=True).nan_to_num(neginf=0.0)


def _rows_of_gradients(q_rows, v, g, grad_o, grad_lse) -> tuple[Tensor, Tensor]:
    """grad_o and grad_lse as rows in the compute type, zeros for None."""
    size = q_rows.shape[:-1]
    go = q_rows.new_zeros(*size, v.shape[-1]) if grad_o is None else oracle.rows_of(grad_o, g).to(q_rows.dtype)
    gl = q_rows.new_zeros(*size, 1) if grad_lse is None else oracle.rows_of(grad_lse.unsqueeze(-1), g).to(q_rows.dtype)
    return go, gl


def _plain_gradients(q, k, v, p, o, drift, blind, seen, scale, go, gl, eps, dtype, loose):
    """(dq, dk, dv) and their units, rows as in `plain_attention`."""
    keys, rows = (eps.compute * (32 + math.sqrt(n)) for n in (p.shape[-1], p.shape[-2]))
    go, gl = go.masked_fill(blind, 0.0), gl.masked_fill(blind, 0.0)
    delta = (o * go).sum(-1, keepdim=True) - gl
    gap = go @ v.mT - delta
    ds = rounded(p * gap, dtype)
    results = [rounded(x, dtype) for x in (ds @ k * scale, ds.mT @ q * scale, rounded(p, dtype).mT @ go)]
    del ds
    off = (go.abs() @ v.abs().mT).add_(gl.abs()).mul_(loose + 32 * eps.compute)  # of dO Vᵀ
    off += (eps.own + loose + 32 * eps.compute) * (o * go).abs().sum(-1, keepdim=True)  # of delta
    off += gap.abs_() * (eps.own + 4 * drift + max(keys, rows))
    off = off.mul_(p).add_(seen, alpha=eps.smallest)
    units = [off @ k.abs() * abs(scale), off.mT @ q.abs() * abs(scale)]
    del off, gap
    shares = p * (eps.own + loose + 4 * drift + rows) + eps.smallest * seen
    units.append(shares.mT @ go.abs())
    for i, x in enumerate(results):
        units[i] = units[i] + eps.own * x.abs().nan_to_num(posinf=0.0) + torch.where(units[i] > 0, eps.smallest, 0.0)
    return results, units


def bound_mean(x: Tensor, l: int, d: int, cu_seqlens: Tensor | None, dtype: torch.dtype, grad: Tensor | None):
    """Bounds of `compress_mean` of finite x and of its gradient."""
    eps = epsilons(dtype)
    leaf = x.double().requires_grad_()
    exact = oracle.compress_mean(leaf, l, d, cu_seqlens)
    sizes = oracle.compress_mean(x.double().abs(), l, d, cu_seqlens)
    sums = eps.compute * (8 + math.sqrt(l))
    bounds = {"k_cmp": Bound(exact.detach(), (eps.own + sums) * sizes + eps.smallest * (sizes > 0))}
    if grad is not None:
        (exact_grad,) = torch.autograd.grad(exact, leaf, grad.double(), retain_graph=True)
        (sizes,) = torch.autograd.grad(exact, leaf, grad.double().abs())
        bounds["k"] = Bound(exact_grad, (eps.own + sums) * sizes + eps.smallest * (sizes > 0))
    return bounds


def judge(name: str, actual: Tensor, bound: Bound, only: Tensor | None = None) -> list[str]:
    """Messages about the elements of `actual` outside the bound; of those where `only` (leading axes) is True."""
    if actual.shape != bound.exact.shape:
        return [f"{name}: shape {tuple(actual.shape)}, expected {tuple(bound.exact.shape)}"]
    if not actual.numel():
        return []
    error = (actual.double() - bound.exact).abs()
    right = (error <= bound.tolerance) | (actual == bound.exact)
    most = torch.finfo(actual.dtype).max  # what the type cannot hold may be infinite
    right |= actual.isinf() & (bound.exact.abs() + bound.tolerance >= most) & (actual.sign() == bound.exact.sign())
    wrong = ~right
    if only is not None:
        wrong &= only.view(*only.shape, *(1,) * (wrong.ndim - only.ndim))
    if not bool(wrong.any()):
        return []
    ratio = torch.where(wrong, (error / bound.tolerance.clamp_min(1e-300)).nan_to_num(nan=math.inf), -1.0)
    at = int(ratio.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape)]
    got, exact, allowed = (float(x.flatten()[at]) for x in (actual.double(), bound.exact, bound.tolerance))
    return [
        f"{name}: {int(wrong.sum())} of {actual.numel()} elements off, worst at {index}: got {got:.6g}, "
        f"expected {exact:.6g} within {allowed:.2g}"
    ]
