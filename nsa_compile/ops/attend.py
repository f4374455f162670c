"""Masked grouped-query attention with its log-sum-exp, and its gradient: the core all three branches share.

Axes: b batch, t query token, s key token, g key/value head, h query head of the group, d channel. Keys are shared by
the queries [b, s, g, d] or gathered for each of them [b, t, g, s, d].
"""

from collections.abc import Callable, Iterable

import torch
from einops import einsum, rearrange
from torch import Tensor

from nsa_compile.ops.checks import check_number
from nsa_compile.ops.layout import QueryLayout

KeyIndex = slice | Tensor
KeyView = Callable[[slice], tuple[KeyIndex, Tensor]]
"""Which keys a range of queries looks at: (index, visible).

`index` picks keys: a slice for all rows, [b, s'] for each row, [b, t, g, s'] for each query and group.
`visible` bool [b, t, 1 or g, s'] says which of the picked keys a query sees; indices of hidden keys may be anything.
"""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type the reference computes in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def default_scale(q: Tensor, scale: float | None) -> float:
    """`d_k ** -0.5` unless given."""
    if scale is not None:
        check_number("scale", scale)
    return q.shape[-1] ** -0.5 if scale is None else scale


def split_heads(q: Tensor, g: int, layout: QueryLayout, part: slice) -> Tensor:
    """Queries of a range [b, t, g, h, d] in the compute type, 0 where the query belongs to no sequence."""
    q = rearrange(q[:, part], "b t (g h) d -> b t g h d", g=g).to(compute_dtype(q))
    return q.masked_fill(~layout.valid[:, part, None, None, None], 0.0)


def key_axes(k: Tensor) -> str:
    """einops axes of keys or values without their channel axis."""
    return "b s g" if k.ndim == 4 else "b t g s"


def masked_scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`scale * q·k` [b, t, g, h, s], -inf where `visible` [b, t, 1 or g, s] is False."""
    scores = einsum(q, k, f"b t g h d, {key_axes(k)} d -> b t g h s") * scale
    return scores.masked_fill(~visible.unsqueeze(3), float("-inf"))


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """`exp(scores - lse)`, 0 where nothing is visible (lse = -inf)."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys: o [b, t, g, h, d_v] and natural-log LSE [b, t, g, h].

    A query that sees nothing gets o = 0 and LSE = -inf. NaN and infinity in a key or value it does not see leave it
    alone; a value it sees makes its output NaN.
    """
    scores = masked_scores(q, k, visible, scale)
    # a shift of all scores changes nothing, so it needs no derivative
    top = scores.detach()
    largest = top.amax(-1, keepdim=True) if top.shape[-1] else top.new_zeros(*top.shape[:-1], 1)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    p = torch.exp(scores - largest)
    total = p.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    o = einsum(p, finite(v), f"b t g h s, {key_axes(v)} d -> b t g h d") / total
    broken = rearrange(~v.isfinite().all(-1), "b s g -> b 1 g s" if v.ndim == 4 else "b t g s -> b t g s")
    o = o.masked_fill((visible & broken).any(-1)[..., None, None], float("nan"))
    return o, (largest + total.log()).masked_fill(nothing, float("-inf")).squeeze(-1)


def finite(x: Tensor) -> Tensor:
    """x with 0 for NaN and infinity, for products in which hidden rows have the factor 0."""
    return x.masked_fill(~x.isfinite(), 0.0)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, lse: Tensor, grad_o: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `attend`, where `delta = sum_d(grad_o * o) - grad_lse` [b, t, g, h].

    With P the probabilities: dV = Pᵀ dO, dS = P * (dO Vᵀ - delta), dQ = scale * dS K, dK = scale * dSᵀ Q.
    NaN and infinity in a query or its gradients reach the keys it sees, those in keys and values the queries that see
    them: pairs that are hidden add 0, not 0 * NaN.
    """
    kv = key_axes(k)
    hidden = ~visible.unsqueeze(3)
    p = probabilities(masked_scores(q, k, visible, scale), lse).masked_fill(hidden, 0.0)
    grad_p = einsum(grad_o, finite(v), f"b t g h d, {kv} d -> b t g h s")
    grad_s = (p * (grad_p - delta.unsqueeze(-1)) * scale).masked_fill(hidden, 0.0)
    grad_q = einsum(grad_s, finite(k), f"b t g h s, {kv} d -> b t g h d")
    grad_k = einsum(grad_s, finite(q), f"b t g h s, b t g h d -> {kv} d")
    broken = ~grad_o.isfinite().all(-1, keepdim=True)
    grad_v = einsum(p.masked_fill(broken & ~hidden, float("nan")), finite(grad_o), f"b t g h s, b t g h d -> {kv} d")
    return grad_q, grad_k, grad_v


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, layout: QueryLayout, view: KeyView, chunks: Iterable[slice], scale: float
) -> tuple[Tensor, Tensor]:
    """`attend` over ranges of queries, so that memory stays bounded: o [b, t, g*h, d_v], LSE [b, t, g*h]."""
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    for part in chunks:
        index, visible = view(part)
        q_part = split_heads(q, k.shape[2], layout, part)
        o_part, lse_part = attend(q_part, pick(k, index), pick(v, index), visible, scale)
        o[:, part] = rearrange(o_part, "b t g h d -> b t (g h) d")
        lse[:, part] = rearrange(lse_part, "b t g h -> b t (g h)")
    return o, lse


def attend_in_chunks_backward(
    q: Tensor, k: Tensor, v: Tensor, layout: QueryLayout, view: KeyView, chunks: Iterable[slice], scale: float,
    o: Tensor, lse: Tensor, grad_o: Tensor, grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `attend_in_chunks`, in the types of q, k and v; sums run in the compute type."""
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=compute_dtype(x)) for x in (k, v))
    for part in chunks:
        index, visible = view(part)
        q_part, o_part, grad_o_part = (split_heads(x, k.shape[2], layout, part) for x in (q, o, grad_o))
        lse_part = rearrange(lse[:, part], "b t (g h) -> b t g h", g=k.shape[2])
        delta = einsum(grad_o_part, o_part, "b t g h d, b t g h d -> b t g h")
        if grad_lse is not None:
            delta = delta - rearrange(grad_lse[:, part], "b t (g h) -> b t g h", g=k.shape[2])
        delta = delta.masked_fill(lse_part == float("-inf"), 0.0)
        dq, dk, dv = attend_backward(
            q_part, pick(k, index), pick(v, index), visible, scale, lse_part, grad_o_part, delta
        )
        grad_q[:, part] = rearrange(dq, "b t g h d -> b t (g h) d")
        add_picked(grad_k, index, dk)
        add_picked(grad_v, index, dv)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def pick(x: Tensor, index: KeyIndex) -> Tensor:
    """The picked rows of x [b, s, g, d] in the compute type."""
    if isinstance(index, slice):
        return x[:, index].to(compute_dtype(x))
    return rows_of(x, index).index_select(0, flat_index(index, x)).unflatten(0, index.shape).to(compute_dtype(x))


def add_picked(grad: Tensor, index: KeyIndex, picked: Tensor) -> None:
    """Add gradients of picked rows to grad [b, s, g, d] in place: the transpose of `pick`."""
    if isinstance(index, slice):
        grad[:, index] += picked
    else:
        rows_of(grad, index).index_add_(0, flat_index(index, grad), picked.flatten(0, index.ndim - 1))


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [b, s, g, d] as the rows that `flat_index` counts: one per token, or one per token and group."""
    return x.flatten(0, 1 if index.ndim == 2 else 2)


def flat_index(index: Tensor, x: Tensor) -> Tensor:
    """Rows of the flattened x [b, s, g, d] for key indices [b, s'] or [b, t, g, s'], clamped into the row's memory."""
    b, s, g, _ = x.shape
    row = torch.arange(b, device=x.device).view(b, *(1,) * (index.ndim - 1))
    flat = row * s + index.clamp(0, s - 1)
    if index.ndim == 4:
        flat = flat * g + torch.arange(g, device=x.device)[:, None]
    return flat.flatten()
