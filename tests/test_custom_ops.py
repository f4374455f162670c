"""The ops as torch.library sees them: registration, gradients in double, FLOP formulas, whole graphs."""

import pytest
import torch
from models import needs_compiler
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import nsa_compile
from nsa_compile import (
    compress_mean,
    compressed_attention,
    gated_sum,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

OPS = torch.ops.nsa_compile
L, D, L_SEL, N_SEL, W = 4, 2, 6, 3, 7
PLACEMENTS = ["plain", "q_start", "packed"]


def make_inputs(
    placement: str, *, dtype=torch.float64, t: int = 23, g: int = 2, h: int = 2, d_k: int = 4, d_v: int = 3
):
    """q, k, v, k_cmp, v_cmp, gates, q_start, cu_seqlens for one way of placing the queries."""
    torch.manual_seed(0)
    b, s = (1, t) if placement == "packed" else (2, t + 9 if placement == "q_start" else t)
    q_start = torch.tensor([9, 4], dtype=torch.int32) if placement == "q_start" else None
    cu_seqlens = torch.tensor([0, 3, 3, t - 3], dtype=torch.int32) if placement == "packed" else None

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    q, k, v, gates = leaf(b, t, g * h, d_k), leaf(b, s, g, d_k), leaf(b, s, g, d_v), leaf(b, t, g * h, 3)
    k_cmp, v_cmp = (compress_mean(x.detach(), l=L, d=D, cu_seqlens=cu_seqlens).requires_grad_() for x in (k, v))
    return q, k, v, k_cmp, v_cmp, gates, q_start, cu_seqlens


def choose(q, k_cmp, v_cmp, q_start, cu_seqlens):
    where = {"q_start": q_start, "cu_seqlens": cu_seqlens}
    _, lse = compressed_attention(q, k_cmp, v_cmp, l=L, d=D, **where)
    return select_blocks(q, k_cmp, lse, l=L, d=D, l_sel=L_SEL, n_sel=N_SEL, **where)


@pytest.mark.parametrize(
    "positions", [torch.arange(7), torch.arange(12, dtype=torch.int32).view(4, 3).T], ids=["t", "b t"]
)
def test_opcheck_rope_turns(positions):
    opcheck(OPS.rope_turns, (positions, 3, 1e4, False))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_forward_ops(placement, dtype):
    q, k, v, k_cmp, v_cmp, gates, q_start, cu = make_inputs(placement, dtype=dtype)
    where, scale = (q_start, cu), 0.5
    _, lse = compressed_attention(q, k_cmp, v_cmp, l=L, d=D, q_start=q_start, cu_seqlens=cu)
    blocks = choose(q, k_cmp, v_cmp, q_start, cu)
    if placement != "q_start":
        opcheck(OPS.compress_mean, (k, L, D, cu, "auto"))
        opcheck(OPS.compress_mean, (k, 1, 1, cu, "auto"))
    opcheck(OPS.compressed_attention, (q, k_cmp, v_cmp, L, D, *where, scale, "auto"))
    detached = (x.detach() for x in (q, k_cmp, lse))
    opcheck(OPS.select_blocks, (*detached, L, D, L_SEL, N_SEL, 1, 2, *where, scale, "auto"))
    opcheck(OPS.selected_attention, (q, k, v, blocks, L_SEL, *where, scale, "auto"))
    opcheck(OPS.window_attention, (q, k, v, W, *where, scale, "auto"))
    o = torch.randn(*q.shape[:3], v.shape[-1], dtype=dtype, requires_grad=True)
    opcheck(OPS.gated_sum, (o, o.detach() * 2, o.detach() * 3, gates, "auto"))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_opcheck_backward_ops_take_any_stride(placement, layout):
    q, k, v, k_cmp, v_cmp, gates, q_start, cu = (
        x.detach() if isinstance(x, torch.Tensor) else x for x in make_inputs(placement, dtype=torch.float32)
    )
    where, scale = (q_start, cu), 0.5
    b, t, n, d_v = *q.shape[:3], v.shape[-1]
    grad_o = (
        torch.ones(()).expand(b, t, n, d_v) if layout == "expanded" else torch.randn(d_v, n, t, b).permute(3, 2, 1, 0)
    )
    grad_lse = torch.randn(b, t, n)
    blocks = choose(q, k_cmp, v_cmp, q_start, cu)
    o, lse = compressed_attention(q, k_cmp, v_cmp, l=L, d=D, q_start=q_start, cu_seqlens=cu)
    for grad in (grad_lse, None):
        opcheck(OPS.compressed_attention_backward, (grad_o, grad, o, lse, q, k_cmp, v_cmp, L, D, *where, scale, "auto"))
        o_slc, lse_slc = selected_attention(q, k, v, blocks, l_sel=L_SEL, q_start=q_start, cu_seqlens=cu)
        opcheck(
            OPS.selected_attention_backward,
            (grad_o, grad, o_slc, lse_slc, q, k, v, blocks, L_SEL, *where, scale, "auto"),
        )
        o_win, lse_win = window_attention(q, k, v, w=W, q_start=q_start, cu_seqlens=cu)
        opcheck(OPS.window_attention_backward, (grad_o, grad, o_win, lse_win, q, k, v, W, *where, scale, "auto"))
    opcheck(OPS.gated_sum_backward, (grad_o, o, o, o, gates, "auto"))
    if placement != "q_start":
        grad_cmp = k_cmp.transpose(-1, -2).contiguous().transpose(-1, -2)
        opcheck(OPS.compress_mean_backward, (grad_cmp, t, L, D, cu, "auto"))


@pytest.mark.parametrize("count", [None, (3, 0)], ids=["all", "some"])
@pytest.mark.parametrize("t", [1, 3, 12])
def test_opcheck_cache_ops(t, count):
    buffer, new = torch.randn(2, 9, 2, 4), torch.randn(2, t, 2, 4)
    positions, index = torch.tensor([5, 2], dtype=torch.int32), torch.arange(3).repeat(2, 1)
    count = None if count is None else torch.tensor(count, dtype=torch.int32).clamp_max(t)
    for ring in (False, True):
        opcheck(OPS.cache_append, (buffer, new, positions, count, ring))
    opcheck(OPS.cache_write, (buffer, new[:, :1].repeat(1, 3, 1, 1), index, index < 2))
    opcheck(OPS.cache_recall, (buffer, new, positions, positions - 2, 7))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradcheck_through_output_and_lse(placement):
    q, k, v, k_cmp, v_cmp, gates, q_start, cu = make_inputs(placement, t=13, g=1)
    where = {"q_start": q_start, "cu_seqlens": cu}
    blocks = choose(q, k_cmp, v_cmp, q_start, cu)

    def finite(o, lse):
        return o, lse.masked_fill(lse == float("-inf"), 0.0)

    check = torch.autograd.gradcheck
    assert check(lambda *x: finite(*compressed_attention(*x, l=L, d=D, **where)), (q, k_cmp, v_cmp))
    assert check(lambda *x: finite(*selected_attention(*x, blocks, l_sel=L_SEL, **where)), (q, k, v))
    assert check(lambda *x: finite(*window_attention(*x, w=W, **where)), (q, k, v))
    if placement != "q_start":
        assert check(lambda x: compress_mean(x, l=L, d=D, cu_seqlens=cu), (k,))
    outputs = [torch.randn(*q.shape[:3], 3, dtype=q.dtype, requires_grad=True) for _ in range(3)]
    assert check(gated_sum, (*outputs, gates))


def test_lse_alone_and_output_alone_pass_gradients():
    q, k, v, *_ = make_inputs("plain")
    for pick in (0, 1):
        grads = torch.autograd.grad(window_attention(q, k, v, w=W)[pick].sum(), (q, k, v))
        assert [bool(g.abs().sum() > 0) for g in grads] == [True, True, pick == 0]


def test_queries_that_see_nothing_give_finite_gradients_through_the_lse():
    q, _, _, k_cmp, v_cmp, *_ = make_inputs("plain")
    o, lse = compressed_attention(q, k_cmp, v_cmp, l=L, d=D)
    assert torch.isneginf(lse[:, : L - 1]).all() and torch.isfinite(lse[:, L - 1 :]).all()
    for grad in torch.autograd.grad((o, lse), (q, k_cmp, v_cmp), (torch.ones_like(o), torch.ones_like(lse))):
        assert torch.isfinite(grad).all()


def test_the_choice_of_blocks_passes_no_gradient():
    q, _, _, k_cmp, v_cmp, *_ = make_inputs("plain")
    assert not choose(q, k_cmp, v_cmp, None, None).requires_grad


def count_flops(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def test_flop_formulas_count_the_visible_pairs():
    b, t, n, g, d_k, d_v = 2, 41, 4, 2, 8, 6
    q, k, v = (torch.randn(b, t, heads, width) for heads, width in ((n, d_k), (g, d_k), (g, d_v)))
    k_cmp, v_cmp = compress_mean(k, l=L, d=D), compress_mean(v, l=L, d=D)
    cmp_pairs = sum(nsa_compile.num_cmp(i + 1, L, D) for i in range(t))
    win_pairs = sum(min(i + 1, W) for i in range(t))
    slc_pairs = sum(min(i + 1, N_SEL * L_SEL) for i in range(t))
    blocks = choose(q, k_cmp, v_cmp, None, None)
    per_pair = 2 * b * n * (d_k + d_v)
    assert count_flops(lambda: compressed_attention(q, k_cmp, v_cmp, l=L, d=D)) == per_pair * cmp_pairs
    assert count_flops(lambda: window_attention(q, k, v, w=W)) == per_pair * win_pairs
    assert count_flops(lambda: selected_attention(q, k, v, blocks, l_sel=L_SEL)) == per_pair * slc_pairs
    assert count_flops(lambda: compress_mean(k, l=L, d=D)) == b * k_cmp.shape[1] * L * g * d_k
    q.requires_grad_()
    both = count_flops(lambda: window_attention(q, k, v, w=W)[0].sum().backward())
    assert both == 2 * b * n * win_pairs * (d_k + d_v + 3 * d_k + 2 * d_v)


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_forward_and_backward_compile_to_one_graph_each(dynamic):
    q, k, v, _, _, gates, _, _ = make_inputs("plain", dtype=torch.float32)

    def loss(q, k, v, gates):
        k_cmp, v_cmp = compress_mean(k, l=L, d=D), compress_mean(v, l=L, d=D)
        return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, l=L, d=D, l_sel=L_SEL, n_sel=N_SEL, w=W).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    got = torch.autograd.grad(compiled(q, k, v, gates), (q, k, v, gates))
    expected = torch.autograd.grad(loss(q, k, v, gates), (q, k, v, gates))
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "flash", "fast"])
def test_an_implementation_that_cannot_run_is_refused(impl):
    q, k, v, *_ = make_inputs("plain")
    with pytest.raises(ValueError, match=f"impl: expected .* got '{impl}'"):
        window_attention(q, k, v, w=W, impl=impl)
