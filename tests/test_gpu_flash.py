"""The real flash-attn on a CUDA device, where it is installed: exact, in any layout, without a stop of the host."""

import math
from itertools import pairwise

import pytest
import torch
from cases import int32
from poisons import BRANCHES, LAYOUTS, Setup, check_isolation, paper
from torch import Tensor

from nsa_compile import compress_mean, compressed_attention, nsa_attention, num_cmp, window_attention
from nsa_compile.custom_ops import flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not flash.installed(), reason="flash-attn is not installed"),
]
L, D, W = 32, 16, 100
SIZES = {"l": L, "d": D, "l_sel": 64, "n_sel": 4, "w": W}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def needs(q: Tensor, v: Tensor, **options) -> int:
    """The version of flash-attn that takes the call; the test is skipped where none does."""
    pick = flash.pick_version(q, v, q_start=None, **options)
    if not pick.version:
        pytest.skip(pick.why_not)
    return pick.version


def draw(t: int, *, b: int = 2, g: int = 2, h: int = 4, d_k: int = 128, d_v: int = 128, dtype=torch.bfloat16):
    """q, k, v and gradients of o and LSE."""
    torch.manual_seed(0)
    sizes = ((b, t, g * h, d_k), (b, t, g, d_k), (b, t, g, d_v), (b, t, g * h, d_v))
    q, k, v, grad = (torch.randn(size, device="cuda").to(dtype) for size in sizes)
    return q * 2, k, v, grad, torch.randn(b, t, g * h, device="cuda")


def packed_ends(t: int) -> Tensor:
    return int32(0, t // 5, t // 5, t // 5 + 5, t - 7).cuda()


def sequence_ends(t: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    ends = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    return list(pairwise(ends))


def naive(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in the inputs' type, rounded after every step, over visible [t, s]."""
    h = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(h, dim=2) for x in (k, v))
    scores = torch.einsum("btnx,bsnx->bnts", q * q.shape[-1] ** -0.5, k).masked_fill(~visible, -math.inf)
    lse = scores.float().logsumexp(-1).transpose(1, 2)
    some = visible.any(-1)[None, None, :, None]
    p = torch.softmax(torch.where(some, scores, 0.0), -1).masked_fill(~some, 0.0)
    return torch.einsum("bnts,bsnx->btnx", p, v), lse


def window_mask(t: int, w: int, cu_seqlens: Tensor | None) -> Tensor:
    visible = torch.zeros(t, t, dtype=torch.bool, device="cuda")
    for a, z in sequence_ends(t, cu_seqlens):
        ones = torch.ones(z - a, z - a, dtype=torch.bool, device="cuda")
        visible[a:z, a:z] = ones.tril() & ones.triu(1 - w)
    return visible


def compression_mask(t: int, c: int, cu_seqlens: Tensor | None) -> Tensor:
    visible, first = torch.zeros(t, c, dtype=torch.bool, device="cuda"), 0
    for a, z in sequence_ends(t, cu_seqlens):
        for i in range(a, z):
            visible[i, first : first + num_cmp(i - a + 1, L, D)] = True
        first += num_cmp(z - a, L, D)
    return visible


def gradients(o: Tensor, lse: Tensor, leaves, grad: Tensor, grad_lse: Tensor | None):
    if grad_lse is None:
        return torch.autograd.grad(o, leaves, grad.to(o.dtype))
    grad_lse = torch.where(torch.isfinite(lse), grad_lse, 0.0).to(lse.dtype)
    lse = torch.where(torch.isfinite(lse), lse, 0.0)
    return torch.autograd.grad((o, lse), leaves, (grad.to(o.dtype), grad_lse))


def check(function, mask: Tensor, tensors, grad: Tensor, grad_lse: Tensor | None) -> None:
    """Errors against fp64 are at most twice those of naive attention in the same type: in the 2-norm, at the worst."""
    results = {}
    for name, dtype in (("flash", None), ("exact", torch.float64), ("naive", None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
        if name == "naive":
            o, lse = naive(*leaves, mask)
        else:
            o, lse = function(*leaves, impl="flash" if name == "flash" else "reference")
            assert o.is_contiguous() and lse.is_contiguous()
        results[name] = (o, lse, *gradients(o, lse, leaves, grad, grad_lse))
    assert torch.equal(torch.isneginf(results["flash"][1]), torch.isneginf(results["exact"][1]))
    for what, got, exact, rounded in zip(("o", "lse", "dq", "dk", "dv"), *results.values(), strict=True):
        got, exact, rounded = (x.detach().double().nan_to_num(neginf=0.0) for x in (got, exact, rounded))
        for order in (2, math.inf) if exact.numel() else ():
            found, allowed = (torch.linalg.vector_norm(x - exact, order) for x in (got, rounded))
            size = torch.linalg.vector_norm(exact, order).clamp_min(1.0)  # a single key leaves a gradient dq of 0
            assert found <= 2 * allowed + 1e-4 * size, f"{what}, norm {order}: {found:.2e} against {allowed:.2e}"


CASES = pytest.mark.parametrize(
    "dtype, packed, t, h, d_k, d_v",
    [
        ("bf16", False, 501, 16, 128, 128),
        ("bf16", True, 650, 4, 128, 128),
        ("bf16", False, 33, 4, 128, 128),
        ("bf16", False, 20, 4, 128, 128),
        ("bf16", False, 1, 4, 64, 64),
        ("fp16", False, 333, 1, 64, 64),
        ("fp16", True, 333, 3, 96, 96),
        ("bf16", False, 333, 4, 256, 256),
        ("bf16", False, 333, 1, 192, 128),
        ("bf16", False, 333, 4, 192, 128),
    ],
)


@CASES
@pytest.mark.parametrize("lse", [False, True], ids=["o", "o-and-lse"])
@pytest.mark.parametrize("w", [W, 1000])
def test_window(dtype, packed, t, h, d_k, d_v, lse, w):
    q, k, v, grad, grad_lse = draw(t, b=1 if packed else 2, h=h, d_k=d_k, d_v=d_v, dtype=DTYPES[dtype])
    grad_lse = grad_lse if lse else None
    needs(q, v, backward=True, grad_lse=grad_lse)
    cu_seqlens = packed_ends(t) if packed else None
    check(
        lambda *x, impl: window_attention(*x, w=w, cu_seqlens=cu_seqlens, impl=impl),
        window_mask(t, w, cu_seqlens), (q, k, v), grad, grad_lse,
    )  # fmt: skip


@CASES
@pytest.mark.parametrize("lse", [False, True], ids=["o", "o-and-lse"])
def test_compression(dtype, packed, t, h, d_k, d_v, lse):
    q, k, v, grad, grad_lse = draw(t, b=1 if packed else 2, h=h, d_k=d_k, d_v=d_v, dtype=DTYPES[dtype])
    grad_lse = grad_lse if lse else None
    needs(q, v, backward=True, grad_lse=grad_lse, fold=D)
    cu_seqlens = packed_ends(t) if packed else None
    k_cmp, v_cmp = (compress_mean(x, l=L, d=D, cu_seqlens=cu_seqlens) for x in (k, v))
    check(
        lambda *x, impl: compressed_attention(*x, l=L, d=D, cu_seqlens=cu_seqlens, impl=impl),
        compression_mask(t, k_cmp.shape[1], cu_seqlens), (q, k_cmp, v_cmp), grad, grad_lse,
    )  # fmt: skip


def test_forward_alone_takes_widths_that_the_gradient_may_not():
    q, k, v, *_ = draw(301, d_k=192, d_v=128)
    needs(q, v)
    (o, lse), (o_ref, lse_ref) = (window_attention(q, k, v, w=W, impl=x) for x in ("flash", "reference"))
    torch.testing.assert_close(o, o_ref, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, lse_ref, rtol=1e-3, atol=1e-3)


def test_long_rows_equal_those_of_triton():
    q, k, v, grad, _ = draw(16411, b=1, g=4, h=16)
    needs(q, v, backward=True, fold=D)
    k_cmp, v_cmp = compress_mean(k, l=L, d=D), compress_mean(v, l=L, d=D)
    for function, tensors in (
        (lambda *x, impl: window_attention(*x, w=512, impl=impl), (q, k, v)),
        (lambda *x, impl: compressed_attention(*x, l=L, d=D, impl=impl), (q, k_cmp, v_cmp)),
    ):
        leaves = [x.detach().requires_grad_() for x in tensors]
        results = []
        for impl in ("flash", "triton"):
            o, lse = function(*leaves, impl=impl)
            results.append((o, lse, *torch.autograd.grad(o, leaves, grad)))
        for a, e in zip(*results, strict=True):
            finite = torch.isfinite(e)
            assert torch.equal(finite, torch.isfinite(a))
            assert (a[finite].float() - e[finite].float()).abs().max() <= 2e-2 * e[finite].float().abs().max()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_a_compiled_step_is_one_graph_and_never_stops_the_host(packed):
    t = 501
    q, k, v, grad, _ = draw(t, b=1 if packed else 2, h=16)
    needs(q, v, backward=True, fold=D)
    cu_seqlens = packed_ends(t) if packed else None
    gates = torch.rand(*q.shape[:3], 3, device="cuda", dtype=q.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step(impl, function):
        o = function(*leaves, impl)
        return [o.detach(), *torch.autograd.grad(o, leaves, grad)]

    def forward(q, k, v, impl):
        k_cmp, v_cmp = (compress_mean(x, l=L, d=D, cu_seqlens=cu_seqlens) for x in (k, v))
        return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **SIZES, cu_seqlens=cu_seqlens, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)
    step("flash", compiled)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step("flash", compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, e in zip(got, step("triton", forward), strict=True):
        assert (a.float() - e.float()).abs().max() <= 3e-2 * e.float().abs().max()


def test_gradients_are_the_same_bits_where_asked_for():
    q, k, v, grad, _ = draw(777, h=16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.use_deterministic_algorithms(True)
    try:
        needs(q, v, backward=True)
        o, _ = window_attention(*leaves, w=W, impl="flash")
        first = torch.autograd.grad(o, leaves, grad, retain_graph=True)
        for _ in range(20):
            again = torch.autograd.grad(o, leaves, grad, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_nan_after_the_last_sequence_stays_there():
    t = 301
    q, k, v, grad, _ = draw(t, b=1)
    needs(q, v, backward=True)
    cu_seqlens = packed_ends(t)
    for x in (q, k, v, grad):
        x[:, t - 7 :] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = window_attention(*leaves, w=W, cu_seqlens=cu_seqlens, impl="flash")
    assert not o[:, t - 7 :].any() and torch.isneginf(lse[:, t - 7 :]).all()
    grads = torch.autograd.grad(o, leaves, grad)
    assert all(x.isfinite().all() and not x[:, t - 7 :].any() for x in grads)


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("name", ["window_attention", "compressed_attention"])
def test_nan_and_infinity_stay_where_they_may_be(name, layout):
    shape, where = paper(4, 128, 128), LAYOUTS[layout]
    q, _, v, *_ = draw(where.t)
    needs(q, v, backward=True, grad_lse=q[..., 0], fold=D)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check_isolation(BRANCHES[name], Setup("flash", torch.bfloat16, shape, {}), where)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("arrange", ["heads-first", "channels-first", "one-head-for-all", "odd-offset"])
def test_inputs_may_have_any_strides(arrange):
    q, k, v, grad, _ = draw(301)
    needs(q, v, backward=True)
    change = {
        "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels-first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        "one-head-for-all": lambda x: x[:, :, :1].expand_as(x),
        "odd-offset": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
    }[arrange]
    tensors = [change(x) for x in (q, k, v)]
    results = []
    for x in (tensors, [x.contiguous() for x in tensors]):
        leaves = [y.detach().requires_grad_() for y in x]
        o, _ = window_attention(*leaves, w=W, impl="flash")
        results.append((o, *torch.autograd.grad(o, leaves, change(grad))))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2)
