"""Stand-ins for both versions of flash-attn: the functions that the package calls, with their real signatures.

They compute in torch with the masks that flash-attn documents (causal and windows aligned at the last key), assert what
the real ones assert of their arguments, and leave NaN wherever the real ones leave memory unwritten. Where those
multiply what is hidden in a tile by 0, which may reach into another sequence, they assert that it is finite.
"""

import math
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor


def masked_scores(q: Tensor, k: Tensor, scale: float, left: int | None, right: int | None) -> Tensor:
    """scale * q·k [n, t, s]; key j is visible to query i where -left <= j - i - (s - t) <= right."""
    t, s = q.shape[0], k.shape[0]
    offset = torch.arange(s) - (torch.arange(t)[:, None] + s - t)
    visible = torch.ones(t, s, dtype=torch.bool)
    visible &= (offset <= right) if right is not None else True
    visible &= (offset >= -left) if left is not None else True
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (torch.einsum("tnx,snx->nts", q.float(), k.float()) * scale).masked_fill(~visible, -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None, right: int | None):
    """o [t, n, d_v] and LSE [n, t] of one sequence."""
    scores = masked_scores(q, k, scale, left, right)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    lse = scores.logsumexp(-1)
    return torch.einsum("nts,snx->tnx", scores.softmax(-1), v.float()), lse.masked_fill(lse.isnan(), -math.inf)


def attend_backward(q, k, v, dout, lse, delta, scale, left, right):
    """dq, dk, dv of one sequence from what the forward left: dS = P * (dO Vᵀ - delta)."""
    g, h = k.shape[1], q.shape[1] // k.shape[1]
    p = torch.exp(masked_scores(q, k, scale, left, right) - lse[..., None])
    dp = torch.einsum("tnx,snx->nts", dout.float(), v.float().repeat_interleave(h, dim=1))
    ds = p * (dp - delta[..., None]) * scale
    dq = torch.einsum("nts,snx->tnx", ds, k.float().repeat_interleave(h, dim=1))
    dk = torch.einsum("nts,tnx->snx", ds, q.float()).unflatten(1, (g, h)).sum(2)
    dv = torch.einsum("nts,tnx->snx", p, dout.float()).unflatten(1, (g, h)).sum(2)
    return dq, dk, dv


def sequences(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None):
    """(index of queries, index of keys) of every sequence: rows of a batch, or slices of a packed one."""
    if cu_seqlens_q is None:
        return [(b, b) for b in range(q.shape[0])]
    for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k)):
        assert x.ndim == 3 and cu.dtype == torch.int32 and cu.stride(0) == 1
        assert cu.min() >= 0 and cu.max() <= x.shape[0] and (cu.diff() >= 0).all()
    pairs = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    return [(slice(a, c), slice(b, d)) for (a, b), (c, d) in pairwise(pairs) if c > a]


def forward(q, k, v, scale, causal, left, right, cu_q=None, cu_k=None, out=None, lse=None):
    check(q, k, v)
    assert v.isfinite().all(), "hidden values are multiplied by 0"
    right = 0 if causal else right
    if out is None:
        out = q.new_full((*q.shape[:-1], v.shape[-1]), math.nan)
    if lse is None:
        shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0])
        lse = torch.full(shape, math.nan)
    for at_q, at_k in sequences(q, k, cu_q, cu_k):
        o, each = attend(q[at_q], k[at_k], v[at_k], scale, left, right)
        out[at_q] = o.to(out.dtype)
        if cu_q is None:
            lse[at_q] = each
        else:
            lse[:, at_q] = each
    return out, lse


def backward(dout, q, k, v, out, lse, dq, dk, dv, scale, causal, left, right, cu_q=None, cu_k=None, dlse=None):
    check(q, k, v, out, dout)
    right = 0 if causal else right
    assert out.shape == dout.shape and lse.is_contiguous() and lse.dtype == torch.float32
    assert lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0]))
    assert dlse is None or (dlse.shape == lse.shape and dlse.dtype == torch.float32)
    if cu_q is None:
        for x in (dq, dk, dv):
            x.fill_(math.nan)
    inputs = (dout, q, k, v, out, lse, *(() if dlse is None else (dlse,)))
    assert all(x.isfinite().all() for x in inputs), "hidden pairs are multiplied by 0"
    for at_q, at_k in sequences(q, k, cu_q, cu_k):
        saved = lse[at_q] if cu_q is None else lse[:, at_q]
        delta = (dout[at_q].float() * out[at_q].float()).sum(-1).T
        if dlse is not None:
            delta = delta - (dlse[at_q] if cu_q is None else dlse[:, at_q])
        each = attend_backward(q[at_q], k[at_k], v[at_k], dout[at_q], saved, delta, scale, left, right)
        for x, at, grad in zip((dq, dk, dv), (at_q, at_k, at_k), each, strict=True):
            x[at] = grad.to(x.dtype)


def check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        assert x.dtype == tensors[0].dtype and x.shape[-1] % 8 == 0


class Calls(list):
    """Names of the functions called, in order, with their keyword arguments."""


def flash_attn_4(calls: Calls) -> ModuleType:
    """`flash_attn.cute.interface` of 4.0.0b36."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
        q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        calls.append(("_flash_attn_fwd", {"left": window_size_left, "pack_gqa": pack_gqa}))
        assert return_lse and qv is None and seqused_q is None and seqused_k is None
        o, lse = forward(
            q, k, v, softmax_scale, causal, window_size_left, window_size_right, cu_seqlens_q, cu_seqlens_k, out, lse
        )
        return o, lse, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        calls.append(("_flash_attn_bwd", {"deterministic": deterministic, "dlse": dlse is not None}))
        assert softcap == 0.0
        backward(
            dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, causal, window_size_left, window_size_right,
            cu_seqlens_q, cu_seqlens_k, dlse,
        )  # fmt: skip
        return dq, dk, dv

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


def flash_attn_2(calls: Calls) -> ModuleType:
    """`flash_attn.flash_attn_interface` of 2.8.3: sizes of windows are -1 for no bound, d_k = d_v."""

    def bounds(left: int, right: int) -> tuple[int | None, int | None]:
        return (None if left < 0 else left), (None if right < 0 else right)

    def plain(dropout_p, softcap, alibi_slopes, q, v) -> None:
        assert dropout_p == 0.0 and softcap == 0.0 and alibi_slopes is None and q.shape[-1] == v.shape[-1]

    def like(q: Tensor) -> Tensor:
        return torch.full_like(q, math.nan)  # strides as q has them

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        calls.append(("_flash_attn_forward", {"left": window_size_left}))
        plain(dropout_p, softcap, alibi_slopes, q, v)
        o, lse = forward(q, k, v, softmax_scale, causal, *bounds(window_size_left, window_size_right), out=like(q))
        return o, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        calls.append(("_flash_attn_varlen_forward", {"left": window_size_left}))
        plain(dropout_p, softcap, alibi_slopes, q, v)
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
        out, lse = like(q), None
        if zero_tensors:
            out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), -math.inf)
        bound = bounds(window_size_left, window_size_right)
        o, lse = forward(q, k, v, softmax_scale, causal, *bound, cu_seqlens_q, cu_seqlens_k, out, lse)
        return o, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        calls.append(("_flash_attn_backward", {"deterministic": deterministic}))
        plain(dropout_p, softcap, alibi_slopes, q, v)
        bound = bounds(window_size_left, window_size_right)
        backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, *bound)
        return torch.empty(0)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        calls.append(("_flash_attn_varlen_backward", {"deterministic": deterministic}))
        plain(dropout_p, softcap, alibi_slopes, q, v)
        for x in (dq, dk, dv):  # with GQA dk and dv are sums of scratch, unwritten unless zero_tensors
            x.fill_(0.0 if zero_tensors else math.nan)
        bound = bounds(window_size_left, window_size_right)
        backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, *bound, cu_seqlens_q, cu_seqlens_k)
        return torch.empty(0)

    module = ModuleType("flash_attn.flash_attn_interface")
    for function in (
        _flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward,
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    return module
