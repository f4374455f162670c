"""Every public function against the loops of the oracle, dense attention and autograd, on small random shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import oracle
import pytest
import torch
from cases import Inputs, Shape, draw, draw_inputs, int32
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from nsa_compile import (
    apply_rope,
    compress_mean,
    compressed_attention,
    gated_sum,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

# No shrinking: a failing problem is a seed, printed with all its sizes, and another seed is no simpler.
SETTINGS = settings(deadline=None, max_examples=40, derandomize=True, phases=[Phase.generate])
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 3e-5, "atol": 3e-5}}
TYPES = st.sampled_from(list(TOLERANCE))


@dataclass(frozen=True)
class Problem:
    """A shape, a layout (`where`: q_start or cu_seqlens, and scale) and sizes of the inputs."""

    shape: Shape
    where: dict[str, Any]
    sizes: dict[str, int]

    def inputs(self, dtype: torch.dtype = torch.float64, *, leaves: bool = False) -> Inputs:
        return Inputs(*(x.requires_grad_(leaves) for x in draw_inputs(self.shape, **self.sizes, dtype=dtype)))


def draw_shape(random: Random) -> Shape:
    d = random.randint(1, 3)
    l = d * random.randint(1, 3)
    l_sel = l + d * random.randint(0, 2)
    init_blocks, local_blocks = random.randint(0, 2), random.randint(1, 2)
    forced = init_blocks + local_blocks
    n_sel = forced + random.randint(0, max(0, min(8, 50 // l_sel - forced)))
    g, h = random.choice([(1, h) for h in range(1, 9)] + [(2, h) for h in range(1, 6)] + [(3, 2), (4, 1)])
    d_k, d_v = random.sample(range(1, 9), 2)
    return Shape(l, d, l_sel, n_sel, random.randint(1, 20), init_blocks, local_blocks, g, h, d_k, d_v)


@st.composite
def problems(pick, layouts=("plain", "q_start", "packed")):
    """Mostly longer than n_sel * l_sel, so that blocks are dropped; lengths are as often odd as even.

    True random numbers, as hypothesis prefers the smallest values, at which hardly any block is ever dropped.
    """
    random = pick(st.randoms(use_true_random=True))
    shape = draw_shape(random)
    full = shape.n_sel * shape.l_sel
    t = full + random.randint(1, 30) if random.random() < 0.8 else random.randint(1, full)
    layout = random.choice(layouts)
    sizes = {"t": t, "b": 1, "seed": random.randint(0, 999)}
    where = {"scale": random.choice([None, 0.4])}
    if layout == "plain":
        sizes["b"] = random.randint(1, 2)
    elif layout == "q_start":
        sizes |= {"t": random.randint(1, min(t, 15)), "b": 2}
        starts = [t - sizes["t"], random.randint(0, t)]
        where["q_start"] = int32(*starts)
        sizes["s"] = max(starts) + sizes["t"] + random.randint(0, 5)
    else:
        cuts = sorted(random.randint(0, t) if random.random() < 0.7 else 0 for _ in range(random.randint(1, 3)))
        where["cu_seqlens"] = int32(0, *cuts, *random.choice([(), (t,), (t, t)]))
        sizes["c"] = t // shape.d
    event(f"{layout}, blocks dropped: {t > full}")
    return Problem(shape, where, sizes)


def assert_attention(actual, expected, dtype):
    """Compare (o, lse) and their types: o has the inputs' type, lse fp32 at least."""
    assert [x.dtype for x in actual] == [dtype, torch.promote_types(dtype, torch.float32)]
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


# --- against the oracle ----------------------------------------------------------------------------------------------


@SETTINGS
@given(problems(layouts=("plain", "packed")), TYPES)
def test_compress_mean(problem, dtype):
    inputs = problem.inputs(dtype)
    for x in (inputs.k_win, inputs.v_win):
        how = {**problem.shape.compression, "cu_seqlens": problem.where.get("cu_seqlens")}
        out = compress_mean(x, **how)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), oracle.compress_mean(x, **how), **TOLERANCE[dtype])


@SETTINGS
@given(problems(), TYPES)
def test_compressed_attention(problem, dtype):
    arguments, how = problem.inputs(dtype)[:3], {**problem.shape.compression, **problem.where}
    assert_attention(compressed_attention(*arguments, **how), oracle.compressed_attention(*arguments, **how), dtype)


@SETTINGS
@given(problems(), TYPES)
def test_select_blocks(problem, dtype):
    inputs = problem.inputs(dtype)
    _, lse = compressed_attention(*inputs[:3], **problem.shape.compression, **problem.where)
    chosen = select_blocks(inputs.q, inputs.k_cmp, lse, **problem.shape.choice, **problem.where)
    expected = oracle.select_blocks(inputs.q, inputs.k_cmp, **problem.shape.choice, **problem.where)
    oracle.assert_blocks_agree(chosen, expected, TOLERANCE[dtype]["atol"] * problem.shape.h)


@SETTINGS
@given(problems(), TYPES)
def test_selected_attention(problem, dtype):
    inputs = problem.inputs(dtype)
    blocks = oracle.select_blocks(inputs.q, inputs.k_cmp, **problem.shape.choice, **problem.where).block_indices
    arguments, how = (inputs.q, inputs.k_slc, inputs.v_slc, blocks), {"l_sel": problem.shape.l_sel, **problem.where}
    assert_attention(selected_attention(*arguments, **how), oracle.selected_attention(*arguments, **how), dtype)


@SETTINGS
@given(problems(), TYPES)
def test_window_attention(problem, dtype):
    inputs, how = problem.inputs(dtype), {"w": problem.shape.w, **problem.where}
    arguments = (inputs.q, inputs.k_win, inputs.v_win)
    assert_attention(window_attention(*arguments, **how), oracle.window_attention(*arguments, **how), dtype)


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 8), st.integers(1, 9), TYPES)
def test_gated_sum(b, t, n_heads, d_v, dtype):
    branches = [draw(b, t, n_heads, d_v, seed=i, dtype=dtype) for i in range(3)]
    gates = draw(b, t, n_heads, 3, seed=3, dtype=dtype)
    out = gated_sum(*branches, gates)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), oracle.gated_sum(*branches, gates), **TOLERANCE[dtype])


@SETTINGS
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1e4, 50.0]))
def test_apply_rope(b, t, heads, half, theta):
    x = draw(b, t, heads, 2 * half, seed=t)
    for positions in (torch.arange(b * t).view(b, t) * 7 % 61, torch.arange(t) + 5):
        expected = oracle.apply_rope(x, positions, theta=theta)
        torch.testing.assert_close(apply_rope(x, positions, theta=theta), expected)


@SETTINGS
@given(problems(), TYPES)
def test_nsa_attention(problem, dtype):
    """The oracle attends to the package's own choice, which is judged by the scores: a tie may fall either way."""
    inputs, shape = problem.inputs(dtype), problem.shape
    _, lse = compressed_attention(*inputs[:3], **shape.compression, **problem.where)
    blocks = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice, **problem.where)
    judged = oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice, **problem.where)
    oracle.assert_blocks_agree(blocks, judged, TOLERANCE[dtype]["atol"] * shape.h)
    how = {**shape.compression, "l_sel": shape.l_sel, "w": shape.w, **problem.where}
    expected = oracle.nsa_attention(*inputs, blocks, **how)
    out = nsa_attention(*inputs, **shape.everything, **problem.where)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_types_are_computed_in_fp32_and_rounded_once(dtype):
    shape = Shape(d_k=6, d_v=4)
    inputs, last_bit = draw_inputs(shape, 61, dtype=dtype), torch.finfo(dtype).eps
    blocks = oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice).block_indices
    slc = (inputs.q, inputs.k_slc, inputs.v_slc, blocks)
    win = (inputs.q, inputs.k_win, inputs.v_win)
    pairs = [
        (compressed_attention, oracle.compressed_attention, inputs[:3], shape.compression),
        (selected_attention, oracle.selected_attention, slc, {"l_sel": shape.l_sel}),
        (window_attention, oracle.window_attention, win, {"w": shape.w}),
    ]
    for function, judge, arguments, how in pairs:
        o, lse = function(*arguments, **how)
        o_expected, lse_expected = judge(*arguments, **how)
        assert (o.dtype, lse.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(o.double(), o_expected, rtol=last_bit, atol=1e-5)
        torch.testing.assert_close(lse.double(), lse_expected, rtol=1e-5, atol=1e-5)
    means = compress_mean(inputs.k_win, **shape.compression)
    expected = oracle.compress_mean(inputs.k_win, **shape.compression)
    torch.testing.assert_close(means.double(), expected, rtol=last_bit, atol=1e-6)
    gated = gated_sum(*(inputs.v_win.repeat_interleave(3, 2) * i for i in (1, 2, 4)), inputs.gates)
    expected = oracle.gated_sum(*(inputs.v_win.repeat_interleave(3, 2) * i for i in (1, 2, 4)), inputs.gates)
    torch.testing.assert_close(gated.double(), expected, rtol=last_bit, atol=1e-6)


@pytest.mark.parametrize("init_blocks, local_blocks, n_sel", [(1, 2, 4), (0, 1, 2), (2, 1, 5)])
def test_lengths_at_which_blocks_are_dropped(init_blocks, local_blocks, n_sel):
    """Where every block is selected anyway, scores, Eq. 9 and top-n could be wrong without any effect."""
    shape = Shape(init_blocks=init_blocks, local_blocks=local_blocks, n_sel=n_sel)
    inputs = draw_inputs(shape, 71)
    _, lse = compressed_attention(*inputs[:3], **shape.compression)
    chosen = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice)
    assert chosen[:, n_sel * shape.l_sel :].ge(0).all(), "slots stay unused although blocks are left over"
    assert chosen[:, -1].unique().numel() > n_sel, "all groups and heads agree: the scores are not tested"
    oracle.assert_blocks_agree(chosen, oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice), 1e-12)
    every = replace(shape, n_sel=12)
    assert not torch.allclose(nsa_attention(*inputs, **shape.everything), nsa_attention(*inputs, **every.everything))


# --- against dense attention -----------------------------------------------------------------------------------------


def dense_attention(q, k, v):
    """torch's own causal attention in the layout of this package."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


DENSE = {
    "window-as-long-as-the-sequence": Shape(w=61, d_k=8, d_v=6),
    "all-blocks-selected": Shape(n_sel=11, d_k=8, d_v=6),
    "blocks-of-one-token": Shape(l=1, d=1, l_sel=5, d_k=8, d_v=6),
}


@pytest.mark.parametrize("branch", DENSE)
@pytest.mark.parametrize("t", [61, 60, 1], ids=lambda t: f"t{t}")
def test_branch_that_sees_everything_is_dense_attention(branch, t):
    shape = DENSE[branch]
    inputs = draw_inputs(shape, t, b=2, dtype=torch.float32)
    q, k, v = inputs.q, inputs.k_win, inputs.v_win
    expected = dense_attention(q, k, v)
    if branch == "window-as-long-as-the-sequence":
        out = window_attention(q, k, v, w=shape.w)[0]
    elif branch == "all-blocks-selected":
        _, lse = compressed_attention(*inputs[:3], **shape.compression)
        blocks = select_blocks(q, inputs.k_cmp, lse, **shape.choice)
        out = selected_attention(q, k, v, blocks, l_sel=shape.l_sel)[0]
    else:
        k_cmp, v_cmp = (compress_mean(x, **shape.compression) for x in (k, v))
        out = compressed_attention(q, k_cmp, v_cmp, **shape.compression)[0]
    assert (out - expected).abs().mean() < 1e-5
    assert (out - expected).abs().max() < 1e-4


def test_sum_of_branches_that_see_everything_is_dense_attention():
    shape = Shape(l=1, d=1, l_sel=6, n_sel=11, w=61, d_k=8, d_v=6)
    inputs = draw_inputs(shape, 61, b=2, dtype=torch.float32)
    k, v = inputs.k_win, inputs.v_win
    out = nsa_attention(inputs.q, k, v, k, v, k, v, inputs.gates.softmax(-1), **shape.everything)
    assert (out - dense_attention(inputs.q, k, v)).abs().mean() < 1e-5


def test_each_gate_opens_its_own_branch():
    shape = Shape()
    inputs = draw_inputs(shape, 61)
    o_cmp, lse = compressed_attention(*inputs[:3], **shape.compression)
    blocks = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice)
    o_slc, _ = selected_attention(inputs.q, inputs.k_slc, inputs.v_slc, blocks, l_sel=shape.l_sel)
    o_win, _ = window_attention(inputs.q, inputs.k_win, inputs.v_win, w=shape.w)
    for i, expected in enumerate((o_cmp, o_slc, o_win)):
        gates = torch.eye(3, dtype=torch.float64)[i].expand_as(inputs.gates).contiguous()
        torch.testing.assert_close(nsa_attention(*inputs._replace(gates=gates), **shape.everything), expected)


@pytest.mark.parametrize("branch, w", [("window", 50), ("window", 300), ("selected", 300)])
def test_sizes_that_are_worked_through_in_several_steps(branch, w):
    """Enough queries and channels for an implementation to loop over ranges of queries, forward and backward."""
    shape, t = Shape(l_sel=16, d=16, l=16, n_sel=19, w=w, g=2, h=4, d_k=64, d_v=48), 293
    inputs = draw_inputs(shape, t, dtype=torch.float32)
    q, k, v = leaves = [x.requires_grad_() for x in (inputs.q, inputs.k_win, inputs.v_win)]
    if branch == "window":
        out = window_attention(q, k, v, w=w)[0]
    else:
        started = torch.arange(19).expand(1, t, 2, 19)
        blocks = started.masked_fill(started > torch.arange(t).view(1, t, 1, 1) // 16, -1).int()
        out = selected_attention(q, k, v, blocks, l_sel=16)[0]
    distance = torch.arange(t)[:, None] - torch.arange(t)
    heads = (x.transpose(1, 2) for x in leaves)
    mask = (distance >= 0) & (distance < w)
    expected = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    upstream = draw(*out.shape, seed=9, dtype=torch.float32)
    grads = [torch.autograd.grad(x, leaves, upstream) for x in (out, expected)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# --- gradients against autograd --------------------------------------------------------------------------------------


def masked_attention(q, k, v, mask, scale):
    """Dense attention under `mask [b, t, g, s]` in plain torch: (o, lse); queries that see nothing give 0 and -inf."""
    h = q.shape[2] // k.shape[2]
    k, v, mask = k.repeat_interleave(h, 2), v.repeat_interleave(h, 2), mask.repeat_interleave(h, 2)
    blind = ~mask.any(-1)
    scores = torch.einsum("btnd,bsnd->btns", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(blind[..., None], 0.0)
    weights = scores.softmax(-1).masked_fill(blind[..., None], 0.0)
    return torch.einsum("btns,bsnd->btnd", weights, v), scores.logsumexp(-1).masked_fill(blind, -torch.inf)


def masks(problem, inputs, blocks):
    """What each query sees of the compressed, selected and window keys, `[b, t, g, s]` each, by the definitions."""
    shape, (b, t) = problem.shape, inputs.q.shape[:2]
    keys = (inputs.k_cmp, inputs.k_slc, inputs.k_win)
    cmp, slc, win = (torch.zeros(b, t, shape.g, max(1, k.shape[1]), dtype=torch.bool) for k in keys)
    parts = oracle.pieces(b, t, problem.where.get("q_start"), problem.where.get("cu_seqlens"))
    for part, slot in zip(parts, oracle.slots(parts, shape.l, shape.d), strict=True):
        for i in range(part.stop - part.first):
            position, at = part.start + i, (part.row, part.first + i)
            cmp[(*at, slice(None), slice(slot, slot + oracle.count_blocks(position + 1, shape.l, shape.d)))] = True
            win[(*at, slice(None), slice(part.key + max(0, position - shape.w + 1), part.key + position + 1))] = True
            for group in range(shape.g):
                for s in range(position + 1):
                    slc[(*at, group, part.key + s)] = s // shape.l_sel in blocks[at][group].tolist()
    return cmp[..., : inputs.k_cmp.shape[1]], slc, win


def assert_same_gradients(actual, expected, leaves, seed, through):
    """Compare the gradients of (o, lse), or of the one `through` names, for random gradients of the outputs."""
    wanted = {"o": [0], "lse": [1], "both": [0, 1]}[through]
    upstream = {i: draw(*actual[i].shape, seed=seed + i) for i in wanted}
    gradients = [
        torch.autograd.grad([out[i] for i in wanted], leaves, [upstream[i] for i in wanted], materialize_grads=True)
        for out in (actual, expected)
    ]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


THROUGH = st.sampled_from(["o", "lse", "both"])


@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
@SETTINGS
@given(problem=problems(), through=THROUGH)
def test_gradients_of_each_branch(branch, problem, through):
    inputs, shape, where = problem.inputs(leaves=True), problem.shape, problem.where
    blocks = oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice, **where).block_indices
    cmp, slc, win = masks(problem, inputs, blocks)
    if branch == "compressed":
        leaves, mask = inputs[:3], cmp
        actual = compressed_attention(*leaves, **shape.compression, **where)
    elif branch == "selected":
        leaves, mask = (inputs.q, inputs.k_slc, inputs.v_slc), slc
        actual = selected_attention(*leaves, blocks, l_sel=shape.l_sel, **where)
    else:
        leaves, mask = (inputs.q, inputs.k_win, inputs.v_win), win
        actual = window_attention(*leaves, w=shape.w, **where)
    if mask.shape[-1] == 0:  # no compressed token at all: torch has no softmax over nothing
        zeros = torch.autograd.grad(actual, leaves, [torch.ones_like(x) for x in actual], materialize_grads=True)
        assert all(grad.eq(0).all() for grad in zeros)
        return
    assert_same_gradients(actual, masked_attention(*leaves, mask, where["scale"]), leaves, 7, through)


@SETTINGS
@given(problems())
def test_gradients_of_nsa_attention(problem):
    """The formula holds the chosen blocks fixed: the choice itself passes no gradient."""
    inputs, shape, where = problem.inputs(leaves=True), problem.shape, problem.where
    blocks = oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice, **where).block_indices
    cmp, slc, win = masks(problem, inputs, blocks)
    if cmp.shape[-1] == 0:
        o_cmp = torch.zeros(*inputs.q.shape[:3], shape.d_v, dtype=torch.float64)
    else:
        o_cmp, _ = masked_attention(*inputs[:3], cmp, where["scale"])
    o_slc, _ = masked_attention(inputs.q, inputs.k_slc, inputs.v_slc, slc, where["scale"])
    o_win, _ = masked_attention(inputs.q, inputs.k_win, inputs.v_win, win, where["scale"])
    expected = (torch.stack([o_cmp, o_slc, o_win], -1) * inputs.gates[..., None, :]).sum(-1)
    actual = nsa_attention(*inputs, **shape.everything, **where)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    assert_same_gradients((actual,), (expected,), inputs, 7, "o")


@SETTINGS
@given(problems(layouts=("plain", "packed")))
def test_gradients_of_compress_mean(problem):
    k, cu_seqlens = problem.inputs(leaves=True).k_win, problem.where.get("cu_seqlens")
    how = {**problem.shape.compression, "cu_seqlens": cu_seqlens}
    one_hot = torch.eye(k.shape[1], dtype=torch.float64).view(1, k.shape[1], 1, -1)
    averages = oracle.compress_mean(one_hot, **how)[0, :, 0]
    expected = torch.einsum("cs,bsgd->bcgd", averages, k)
    assert_same_gradients((compress_mean(k, **how),), (expected,), [k], 7, "o")


@pytest.mark.parametrize("layout", ["plain", "expanded"])
def test_gradients_of_gated_sum(layout):
    branches = [draw(2, 5, 6, 3, seed=i).requires_grad_() for i in range(3)]
    gates = draw(2, 5, 6, 3, seed=3).requires_grad_()
    if layout == "expanded":
        gates = draw(2, 5, 1, 3, seed=3).expand(2, 5, 6, 3).requires_grad_()
    expected = (torch.stack(branches, -1) * gates[..., None, :]).sum(-1)
    assert_same_gradients((gated_sum(*branches, gates),), (expected,), [*branches, gates], 7, "o")


def test_gradients_of_apply_rope():
    x, positions = draw(2, 7, 3, 10, seed=0).requires_grad_(), torch.arange(14).view(2, 7)
    angle = positions[..., None, None] * 10000.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(apply_rope(x, positions), expected)
    assert_same_gradients((apply_rope(x, positions),), (expected,), [x], 7, "o")


def test_choice_of_blocks_passes_no_gradient():
    shape = Shape()
    inputs = Inputs(*(x.requires_grad_() for x in draw_inputs(shape, 61)))
    _, lse = compressed_attention(*inputs[:3], **shape.compression)
    assert lse.requires_grad
    chosen = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice)
    assert not chosen.requires_grad
    o, _ = selected_attention(inputs.q, inputs.k_slc, inputs.v_slc, chosen, l_sel=shape.l_sel)
    assert torch.autograd.grad(o.sum(), inputs.k_cmp, allow_unused=True) == (None,)


@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_gradients_take_any_strides(branch):
    """A sum hands back a gradient with strides of zero, a transposed consumer a transposed one."""
    shape = Shape()
    inputs = Inputs(*(x.requires_grad_() for x in draw_inputs(shape, 31)))
    blocks = oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice).block_indices
    calls = {
        "compressed": lambda: compressed_attention(*inputs[:3], **shape.compression),
        "selected": lambda: selected_attention(*inputs[:1], *inputs[3:5], blocks, l_sel=shape.l_sel),
        "window": lambda: window_attention(*inputs[:1], *inputs[5:7], w=shape.w),
    }
    o, lse = calls[branch]()
    seen = lse.isfinite()
    weight = draw(*o.transpose(1, 3).shape, seed=9).transpose(1, 3)
    cases = [
        (torch.ones(()).double().expand_as(o), o.sum()),
        (weight, (o.transpose(1, 3) * weight.transpose(1, 3)).sum()),
    ]
    for upstream, loss in cases:
        strided = torch.autograd.grad(loss + lse[seen].sum(), inputs.q, retain_graph=True)
        plain = torch.autograd.grad([o, lse], inputs.q, [upstream.contiguous(), seen.double()], retain_graph=True)
        torch.testing.assert_close(strided, plain)


def test_noncontiguous_inputs_equal_contiguous_ones():
    shape = Shape()
    inputs = draw_inputs(shape, 61, b=2)
    strided = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    assert not strided.q.is_contiguous()
    plain, other = (nsa_attention(*x, **shape.everything) for x in (inputs, strided))
    torch.testing.assert_close(other, plain)
