"""The kernels on a CUDA device at the sizes they are made for: exact, in any layout, in order, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from cases import Shape, int32
from torch import Tensor
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

from nsa_compile import (
    compress_mean,
    compressed_attention,
    gated_sum,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_compile.ops.layout import query_layout, visible_slots
from nsa_compile.ops.selection import compression_probabilities, group_scores, selection_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMORY = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
NAMES = ("q", "k", "v", "k_slc", "v_slc", "k_win", "v_win", "gates")
IN_ANY_ORDER = ("k_slc", "v_slc")
"""Gradients whose sums run in any order, unless algorithms are to be deterministic."""
LAYOUTS = ["rows", "packed", "buffer"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def shape(h: int, d_k: int, d_v: int, **changes: int) -> Shape:
    """The paper's blocks, of which few enough are chosen that several hundred tokens leave some out."""
    sizes = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 4, "w": 100, "g": 2, "h": h, "d_k": d_k, "d_v": d_v}
    return Shape(**sizes | changes)


@dataclass(frozen=True)
class Case:
    """Sizes, type and layout: "rows", "packed" by cu_seqlens, or in a "buffer" of longer keys by q_start."""

    shape: Shape
    dtype: torch.dtype
    t: int
    layout: str = "rows"
    scale: float | None = None

    def __str__(self) -> str:
        x = self.shape
        return f"{self.layout}-{self.t}-l_sel{x.l_sel}-{x.h}x{x.d_k}x{x.d_v}-{str(self.dtype)[6:]}"

    @cached_property
    def where(self) -> dict[str, Tensor]:
        """The keyword arguments that place the queries."""
        t = self.t
        places = {
            "packed": {"cu_seqlens": (0, t // 5, t // 5, t // 5 + 5, t - 7)},
            "buffer": {"q_start": (389, 40)},
        }
        return {name: int32(*values).to(DEVICE) for name, values in places.get(self.layout, {}).items()}

    @property
    def s(self) -> int:
        """Length of the keys."""
        return self.t + 420 if self.layout == "buffer" else self.t

    def draw(self, seed: int = 0) -> list[Tensor]:
        """The inputs in the order of NAMES and a gradient of o; NaN stands wherever no query may look."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        x, b = self.shape, 1 if self.layout == "packed" else 2
        n, keys = x.g * x.h, [(self.s, x.g, width) for width in (x.d_k, x.d_v) * 3]
        sizes = [(self.t, n, x.d_k), *keys, (self.t, n, 3), (self.t, n, x.d_v)]
        tensors = [torch.randn(b, *size, generator=generator, device=DEVICE) for size in sizes]
        tensors[0] *= 3  # far from uniform attention
        if self.layout == "packed":
            for tensor in tensors[:-1]:
                tensor[:, self.t - 7 :] = torch.nan
        for row, start in enumerate((389, 40) if self.layout == "buffer" else ()):
            for tensor in tensors[1:7]:
                tensor[row, start + self.t :] = torch.nan
        return [tensor.to(self.dtype) for tensor in tensors]


def common(layout: str = "rows", t: int = 501) -> Case:
    """The configuration of every test that does not vary it, so that its kernels are compiled once."""
    return Case(shape(16, 128, 128), BF16, t, layout)


CASES = [
    common(t=1201),  # more tokens choose the first block than one item of its gradient takes
    common("packed", 650),
    common("buffer", 301),
    common("buffer", 1),
    common(t=20),  # no compressed token
    Case(shape(16, 128, 128, l_sel=128, d=32, w=64), BF16, 901, scale=-0.05),
    Case(shape(16, 128, 128, l=16, d=8, l_sel=48, init_blocks=0, local_blocks=1), BF16, 450, "buffer"),
    Case(shape(16, 192, 128), BF16, 501),
    Case(shape(1, 64, 32), FP16, 450, "packed"),
    Case(shape(1, 64, 32), FP16, 150, "buffer"),
    Case(shape(4, 128, 128), BF16, 333, "buffer"),
    Case(shape(8, 78, 70), FP16, 450, "packed"),
    Case(shape(8, 78, 70), FP16, 150, "buffer"),
    Case(shape(64, 128, 64, g=1), BF16, 150, "buffer"),
    Case(shape(3, 256, 256), BF16, 450, "packed"),
    Case(shape(16, 64, 64), FP32, 450, "packed"),
    Case(shape(4, 40, 256), FP32, 331, "buffer"),
]


def compress(case: Case, *raw: Tensor, impl: str = "auto") -> list[Tensor]:
    """Block means; those of a buffer are NaN from the first that covers a hidden token on."""
    cu_seqlens = case.where.get("cu_seqlens")
    return [compress_mean(x, **case.shape.compression, cu_seqlens=cu_seqlens, impl=impl) for x in raw]


def attend(
    case: Case, tensors: Sequence[Tensor], impl: str = "auto", blocks: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs, LSEs and gradients of every op, the gradients also through the LSEs; `blocks` replace the chosen."""
    *inputs, grad = tensors
    q, k, v, k_slc, v_slc, k_win, v_win, gates = leaves = [x.detach().requires_grad_() for x in inputs]
    how: dict[str, Any] = {**case.where, "scale": case.scale, "impl": impl}
    k_cmp, v_cmp = compress(case, k, v, impl=impl)
    o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, **case.shape.compression, **how)
    chosen = select_blocks(q, k_cmp, lse_cmp, **case.shape.choice, **how)
    o_slc, lse_slc = selected_attention(
        q, k_slc, v_slc, chosen if blocks is None else blocks, l_sel=case.shape.l_sel, **how
    )
    o_win, lse_win = window_attention(q, k_win, v_win, w=case.shape.w, **how)
    o = gated_sum(o_cmp, o_slc, o_win, gates.nan_to_num(), impl=impl)
    lses = {"lse_cmp": lse_cmp, "lse_slc": lse_slc, "lse_win": lse_win}
    grad_lses = (grad[..., i].to(lse.dtype) for i, lse in enumerate(lses.values()))
    grads = torch.autograd.grad((o, *lses.values()), leaves, (grad, *grad_lses))
    outputs = {"blocks": chosen, "k_cmp": k_cmp, "o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win, "o": o}
    return {**outputs, **lses, **dict(zip(NAMES, grads, strict=True))}


def attention(case: Case, impl: str = "auto") -> Callable[..., Tensor]:
    """`nsa_attention` from raw keys as a function of the inputs."""
    where, cu_seqlens = case.where, case.where.get("cu_seqlens")
    compression, sizes = case.shape.compression, {**case.shape.everything, "scale": case.scale}

    def forward(q, k, v, k_slc, v_slc, k_win, v_win, gates):
        k_cmp = compress_mean(k, **compression, cu_seqlens=cu_seqlens, impl=impl)
        v_cmp = compress_mean(v, **compression, cu_seqlens=cu_seqlens, impl=impl)
        return nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, **sizes, **where, impl=impl)

    return forward


def step(forward: Callable[..., Tensor], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Output and gradients of an attention."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = forward(*leaves)
    return {"o": o.detach(), **dict(zip(NAMES, torch.autograd.grad(o, leaves, grad), strict=True))}


def error(actual: Tensor, exact: Tensor, order: float) -> float:
    """`|actual - exact| / |exact|` in the norm of an order; where both are NaN or the same infinity there is none."""
    if not exact.numel():
        return 0.0
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, actual.double() - exact.double())
    size = torch.linalg.vector_norm(exact.double().nan_to_num(0, 0, 0), order).clamp_min(1e-30)
    return (torch.linalg.vector_norm(difference, order) / size).item()


def assert_within(name: str, actual: Tensor, same_type: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of the reference in the same type, and a rounding: overall and at the worst."""
    for order, part in ((2, 1 / 16), (torch.inf, 1 / 2)):
        found, allowed = error(actual, exact, order), 2 * error(same_type, exact, order)
        allowed += max(1e-5, torch.finfo(actual.dtype).eps * part)
        assert found <= allowed, f"{name}, norm of order {order}: {found:.2e} > {allowed:.2e}"


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-2) -> None:
    """No element is further off than a part of the largest one."""
    for name, x in expected.items():
        found = error(got[name], x, torch.inf)
        assert found <= tolerance, f"{name}: {found:.2e}"


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], close: Sequence[str] = IN_ANY_ORDER) -> None:
    """The same bits, but for the gradients that are summed in any order."""
    differ = [name for name, x in expected.items() if name not in close and not torch.equal(got[name], x)]
    assert not differ
    assert_close(got, {name: expected[name] for name in close})


def assert_same_choice(
    sizes: Shape, q: Tensor, k_cmp: Tensor, blocks: Tensor, *, scale: float | None = None, **where: Tensor
) -> None:
    """The blocks are those of the reference in fp64, except where scores tie within rounding.

    A score is a sum of `exp(x)` in fp32, each off by about |x| * 2**-23 of itself: by 4e-6 at the |x| < 30 here.
    """
    q, k_cmp, how = q.double(), k_cmp.double(), {**sizes.compression, **where, "scale": scale}
    _, lse = compressed_attention(q, k_cmp, k_cmp[..., :1], **how, impl="reference")
    expected = select_blocks(q, k_cmp, lse, **sizes.choice, **where, scale=scale, impl="reference")
    assert torch.equal(blocks < 0, expected < 0)
    assert ((blocks[..., 1:] > blocks[..., :-1]) | (blocks[..., 1:] < 0)).all()
    n_blocks = ((k_cmp.shape[1] + 1) * sizes.d + sizes.l) // sizes.l_sel + 1
    cu_seqlens = where.get("cu_seqlens")
    layout = query_layout(q, where.get("q_start"), cu_seqlens)
    first = None if cu_seqlens is None else visible_slots(layout, cu_seqlens, **sizes.compression)[0]
    fold = {**sizes.compression, "l_sel": sizes.l_sel, "first": first, "n_blocks": n_blocks}
    scores = group_scores(selection_scores(compression_probabilities(q, k_cmp, lse, **how), **fold))
    empty = torch.zeros(*scores.shape[:-1], n_blocks + 1, dtype=torch.bool, device=q.device)
    chosen, wanted = (empty.scatter(-1, x.long() % (n_blocks + 1), True)[..., :-1] for x in (blocks, expected))
    disputed = chosen != wanted
    highest = scores.masked_fill(~disputed, -torch.inf).amax(-1)
    lowest = scores.masked_fill(~disputed, torch.inf).amin(-1)
    some = disputed.any(-1)
    assert (highest - lowest <= 1e-5 * highest)[some].all()
    assert some.sum() <= 1 + some.numel() // 1000


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; what is allocated without a value holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def no_sync() -> Iterator[None]:
    """Operations that make the host wait for the device are errors."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_choices_and_gradients(case):
    tensors = case.draw()
    got = attend(case, tensors)
    exact = attend(case, [x.double() for x in tensors], "reference", got["blocks"])
    same_type = attend(case, tensors, "reference", got["blocks"])
    assert_same_choice(case.shape, tensors[0], got["k_cmp"], got["blocks"], scale=case.scale, **case.where)
    for name in got.keys() - {"blocks"}:
        assert (got[name].dtype, got[name].shape) == (same_type[name].dtype, exact[name].shape)
        assert got[name].is_contiguous()
        assert_within(name, got[name], same_type[name], exact[name])


def test_choice_among_hundreds_of_blocks():
    case = Case(shape(4, 64, 64, l=16, d=8, l_sel=32, n_sel=8), BF16, 8192)
    q, *raw = case.draw()
    k_cmp, v_cmp = compress(case, *raw[:2])
    _, lse = compressed_attention(q, k_cmp, v_cmp, **case.shape.compression)
    assert_same_choice(case.shape, q, k_cmp, select_blocks(q, k_cmp, lse, **case.shape.choice))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hundred_repetitions_differ_only_in_the_order_of_sums(layout):
    case = common(layout)
    forward, tensors = attention(case), case.draw()
    first = step(forward, tensors)
    for _ in range(100):
        assert_same(step(forward, tensors), first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_repetitions_are_equal_and_read_no_uninitialised_memory(layout):
    case = common(layout)
    forward, tensors = attention(case), case.draw()
    expected = step(forward, tensors)
    with deterministic():
        first = step(forward, tensors)
        for _ in range(100):
            assert_same(step(forward, tensors), first, close=())
    assert_same(first, expected)


def test_tokens_of_no_sequence_get_zeros():
    case = common("packed")
    got = step(attention(case), case.draw())
    assert all(x.isfinite().all() for x in got.values())
    assert not any(x[:, case.t - 7 :].any() for x in got.values())


ARRANGEMENTS = {
    "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels-first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "part-of-nan": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0, 1, 1), value=torch.nan)[:, 1:-1, 1:, 1:-2],
    "one-head-for-all": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_inputs_and_gradients_may_have_any_strides(arrange):
    case = common()
    tensors = [arrange(x) for x in case.draw()]
    assert not any(x.is_contiguous() for x in tensors)
    expected = attend(case, [x.contiguous() for x in tensors])
    got = attend(case, tensors)
    assert all(x.is_contiguous() for x in got.values())
    assert torch.equal(got.pop("blocks"), expected.pop("blocks"))
    assert_close(got, expected)


def test_gradients_may_be_one_expanded_number():
    case = common()
    *inputs, grad = case.draw()
    grad = grad[:1, :1, :1, :1].expand_as(grad)
    expected = attend(case, [*inputs, grad.contiguous()])
    got = attend(case, [*inputs, grad])
    assert_close(got, expected)


def test_auto_runs_kernels_only():
    forward, tensors = attention(common()), common().draw()
    step(forward, tensors)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step(forward, tensors)
        torch.cuda.synchronize()
    launched = {event.key for event in trace.key_averages()}
    wanted = {
        "_compress_mean_fwd_kernel", "_compress_mean_bwd_kernel", "_group_probabilities_kernel", "_top_blocks_kernel",
        "_union_kernel", "_inverse_kernel", "_delta_kernel", "_sum_items_kernel", "_gated_sum_bwd_kernel",
    }  # fmt: skip
    attends = [{f"_{branch}_{x}_kernel" for x in ("fwd", "bwd_dq", "bwd_dkv")} for branch in ("interval", "selected")]
    attends.append({"_gated_sum_fwd_kernel"})  # on Hopper the kernel that attends also mixes
    kinds = [set.union(*attends), {"attend_kernel", "sum_queries_kernel", "sum_keys_kernel"}]
    on_hopper = torch.cuda.get_device_capability()[0] == 9
    assert wanted | kinds[on_hopper] <= launched
    assert not kinds[not on_hopper] & launched
    assert not [name for name in launched if "gemm" in name.lower() or "softmax" in name.lower()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_never_stops_the_host(layout):
    case = common(layout)
    forward, tensors = attention(case), case.draw()
    step(forward, tensors)
    with no_sync():
        step(forward, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_captured_step_follows_changed_inputs(layout):
    case = common(layout)
    forward, tensors = attention(case), case.draw()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            before = step(forward, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(forward, tensors)
    for x, new in zip(tensors, case.draw(seed=1), strict=True):
        x.copy_(new)
    for where in case.where.values():  # the packed sequences begin earlier, as does a row of a buffer
        where[1 : -1 if layout == "packed" else None] -= 3
    graph.replay()
    assert_same(captured, step(forward, tensors))
    assert not torch.equal(captured["o"], before["o"])


def test_kernels_run_on_the_current_stream():
    case = common()
    forward, tensors = attention(case), case.draw()
    expected = step(forward, tensors)
    late = [torch.zeros_like(x) for x in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2 * 10**8)
        for x, value in zip(late, tensors, strict=True):
            x.copy_(value)
        got = step(forward, late)
    torch.cuda.synchronize()
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_kernels_run_on_the_device_of_their_inputs():
    forward, tensors = attention(common()), common().draw()
    expected = step(forward, tensors)
    got = step(forward, [x.to("cuda:1") for x in tensors])
    assert torch.cuda.current_device() == 0
    assert {x.device for x in got.values()} == {torch.device("cuda:1")}
    assert_close({name: x.to("cuda:0") for name, x in got.items()}, expected)


def test_a_compiled_fullgraph_step_equals_an_eager_one():
    case = common("packed")
    forward, tensors = attention(case), case.draw()
    torch._dynamo.reset()
    assert_close(step(torch.compile(forward, fullgraph=True), tensors), step(forward, tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    case, ops, scale = common(layout, t=170), torch.ops.nsa_compile, 0.1
    *inputs, grad = (x.nan_to_num() for x in case.draw())
    k_cmp, v_cmp = compress(case, *inputs[1:3])
    x, where = case.shape, (case.where.get("q_start"), case.where.get("cu_seqlens"))
    q, k, v, gates, k_cmp, v_cmp = (y.requires_grad_() for y in (*inputs[:3], inputs[-1], k_cmp, v_cmp))
    o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, **x.compression, **case.where, scale=scale)
    block_sizes = (x.l_sel, x.n_sel, x.init_blocks, x.local_blocks)
    choice = (*(y.detach() for y in (q, k_cmp, lse_cmp)), x.l, x.d, *block_sizes, *where, scale, "triton")
    blocks = ops.select_blocks(*choice)
    attentions = {
        "compressed_attention": (q, k_cmp, v_cmp, x.l, x.d, *where, scale, "triton"),
        "selected_attention": (q, k, v, blocks, x.l_sel, *where, scale, "triton"),
        "window_attention": (q, k, v, x.w, *where, scale, "triton"),
    }
    calls = {
        "select_blocks": choice,
        **attentions,
        "gated_sum": (o_cmp.detach(), o_cmp.detach() * 2, grad, gates, "triton"),
    }
    detached = lambda arguments: [y.detach() if isinstance(y, Tensor) else y for y in arguments]  # noqa: E731
    for name, arguments in attentions.items():
        o, lse = (y.detach() for y in getattr(ops, name)(*arguments))
        calls[f"{name}_backward"] = (grad, torch.rand_like(lse), o, lse, *detached(arguments))
    calls["gated_sum_backward"] = (grad, *detached(calls["gated_sum"]))
    if layout != "buffer":
        calls["compress_mean"] = (k, x.l, x.d, where[1], "triton")
        calls["compress_mean_backward"] = (k_cmp.detach(), case.t, x.l, x.d, where[1], "triton")
    for name, arguments in calls.items():
        opcheck(getattr(ops, name).default, arguments, atol=2e-2, rtol=2e-2)


def memory_of_the_choice(t: int) -> int:
    """Bytes that choosing blocks takes beyond its inputs, for 64 heads of 128 channels in 4 groups."""
    q = torch.randn(1, t, 64, 128, device=DEVICE, dtype=BF16)
    k_cmp = torch.randn(1, t // 16 - 1, 4, 128, device=DEVICE, dtype=BF16)
    lse = torch.full((1, t, 64), 8.0, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select_blocks(q, k_cmp, lse, l=32, d=16, l_sel=64, n_sel=16)
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_the_choice_is_bounded():
    used = [memory_of_the_choice(t) for t in (65536, 131072)]
    assert used[0] < 256 * 2**20
    assert used[1] < 2.2 * used[0]


def row_by_hand(q: Tensor, k: Tensor, v: Tensor, i: int, keys: Tensor) -> Tensor:
    """Attention of the query i to the keys of a single group, in fp64."""
    p = (q[0, i].double() @ k[0, keys, 0].double().T * q.shape[-1] ** -0.5).softmax(-1)
    return p @ v[0, keys, 0].double()


def span(first: int, end: int) -> Tensor:
    return torch.arange(first, end, device=DEVICE)


def check_long(t: int, some: Sequence[int]) -> None:
    """All branches over t tokens in bf16, 16 heads in one group; the queries `some` by hand."""
    sizes = Shape(32, 16, 64, 16, 512, g=1, h=16, d_k=64, d_v=64)
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(1, t, n, 64, generator=generator, device=DEVICE, dtype=BF16) for n in (16, 1, 1))
    k_cmp, v_cmp = (compress_mean(x, **sizes.compression) for x in (k, v))
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **sizes.compression)
    blocks = select_blocks(q, k_cmp, lse, **sizes.choice)
    o_slc, _ = selected_attention(q, k, v, blocks, l_sel=64)
    o_win, _ = window_attention(q, k, v, w=512)
    for i in some:
        visible, chosen = max(0, (i - 15) // 16), blocks[0, i, 0]
        tokens = (chosen[chosen >= 0, None] * 64 + span(0, 64)).flatten()
        expected = {
            "o_cmp": row_by_hand(q, k_cmp, v_cmp, i, span(0, visible)),
            "o_slc": row_by_hand(q, k, v, i, tokens[tokens <= i]),
            "o_win": row_by_hand(q, k, v, i, span(max(0, i - 511), i + 1)),
        }
        assert_close({"o_cmp": o_cmp[0, i], "o_slc": o_slc[0, i], "o_win": o_win[0, i]}, expected)
        assert_same_choice(sizes, q[:, i : i + 1], k_cmp, blocks[:, i : i + 1], q_start=int32(i).to(DEVICE))


def test_a_million_tokens():
    t = 2**20
    check_long(t, [0, 31, 46, 5000, 262143, 524288, t - 65, t - 1])


@pytest.mark.skipif(MEMORY < 48 * 2**30, reason="less than 48 GiB of memory")
@pytest.mark.parametrize("d", [128, 256])
def test_offsets_beyond_32_bits(d):
    t, n, w = 2**20, 2048 // d + 1, 64
    middle = 2**31 // (n * d)  # here element 2**31 stands
    q, k, v = (torch.empty(1, t, n, d, device=DEVICE, dtype=BF16).normal_().requires_grad_() for _ in range(3))
    o, _ = window_attention(q, k, v, w=w)
    got = (o.detach(), *torch.autograd.grad(o, (q, k, v), q.detach()))
    means = compress_mean(k.detach(), l=32, d=16)
    assert error(means[:, -1], k.detach()[:, -32:].double().mean(1), torch.inf) < 1e-2
    for first, end in ((0, 64), (middle - 30, middle + 34), (t - 64, t)):
        near = slice(max(0, first - w), end + w)  # all tokens that bear on first … end - 1
        leaves = [x.detach()[:, near].double().requires_grad_() for x in (q, k, v)]
        exact, _ = window_attention(*leaves, w=w, impl="reference")
        expected = (exact.detach(), *torch.autograd.grad(exact, leaves, leaves[0].detach()))
        inner = slice(first - near.start, end - near.start)
        for actual, wanted in zip(got, expected, strict=True):
            assert error(actual[:, first:end], wanted[:, inner], torch.inf) < 2e-2
