"""The kernels on a CUDA device at the sizes they are made for: exact to the reference, in place, in order, in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from cases import int32
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import nsa_compile as nsa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MEAN = {"l": 32, "d": 16}
CHOICE = {**MEAN, "l_sel": 64, "n_sel": 8}
WINDOW = 100


class Case(NamedTuple):
    """Sizes of a test; `layout` is "rows", "packed" or "buffer" (q_start with longer keys)."""

    h: int
    d_k: int
    d_v: int
    dtype: torch.dtype
    t: int
    layout: str = "rows"
    g: int = 2

    @property
    def where(self) -> dict[str, Tensor]:
        """The keyword arguments that place the queries."""
        if self.layout == "packed":
            t = self.t
            return {"cu_seqlens": int32(0, t // 3, t // 3, t // 2 + 5, t - 7).cuda()}
        return {"q_start": int32(389, 40).cuda()} if self.layout == "buffer" else {}


CASES = [
    Case(16, 128, 128, torch.bfloat16, 701),
    Case(16, 128, 128, torch.float16, 650, "packed"),
    Case(16, 128, 128, torch.bfloat16, 301, "buffer"),
    Case(16, 192, 128, torch.bfloat16, 333),
    Case(1, 64, 32, torch.float16, 257, "packed"),
    Case(4, 128, 128, torch.bfloat16, 333, "buffer"),
    Case(8, 80, 72, torch.float16, 300, "packed"),
    Case(64, 128, 64, torch.bfloat16, 150, "buffer", g=1),
    Case(3, 256, 256, torch.bfloat16, 250, "packed"),
    Case(16, 64, 64, torch.float32, 400, "packed"),
    Case(4, 40, 256, torch.float32, 331, "buffer"),
]


def name(case: Case) -> str:
    return f"{case.layout}-{case.h}x{case.d_k}x{case.d_v}-{str(case.dtype)[6:]}"


def inputs_of(case: Case) -> list[Tensor]:
    """q, three pairs of keys and values, gates: in the case's type, NaN where no query looks."""
    torch.manual_seed(0)
    b = 2 if case.layout == "buffer" else 1
    s = case.t + 420 if case.layout == "buffer" else case.t
    draw = lambda length, n, width: torch.randn(b, length, n, width, device="cuda", dtype=torch.float64)  # noqa: E731
    n = case.g * case.h
    tensors = [draw(case.t, n, case.d_k), *[draw(s, case.g, x) for x in (case.d_k, case.d_v) * 3], draw(case.t, n, 3)]
    if case.layout == "packed":
        for x in tensors:
            x[:, case.t - 7 :] = torch.nan
    if case.layout == "buffer":
        for row, start in enumerate((389, 40)):
            for x in tensors[1:7]:
                x[row, start + case.t :] = torch.nan
    return [x.to(case.dtype) for x in tensors]


def attend(case: Case, tensors: Sequence[Tensor], impl: str, blocks: Tensor | None = None) -> dict[str, Tensor]:
    """Every output and gradient of every op; `blocks` stands in for the chosen ones."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    q, k, v, k_slc, v_slc, k_win, v_win, gates = leaves
    how: dict[str, Any] = {**case.where, "impl": impl}
    raw = (k, v) if case.layout != "buffer" else (k.nan_to_num(), v.nan_to_num())
    packed = {name: x for name, x in how.items() if name != "q_start"}
    k_cmp, v_cmp = (nsa.compress_mean(x, **MEAN, **packed) for x in raw)
    o_cmp, lse_cmp = nsa.compressed_attention(q, k_cmp, v_cmp, **MEAN, **how)
    chosen = nsa.select_blocks(q, k_cmp, lse_cmp, **CHOICE, **how)
    o_slc, lse_slc = nsa.selected_attention(q, k_slc, v_slc, chosen if blocks is None else blocks, l_sel=64, **how)
    o_win, lse_win = nsa.window_attention(q, k_win, v_win, w=WINDOW, **how)
    o = nsa.gated_sum(o_cmp, o_slc, o_win, gates, impl=impl)
    torch.manual_seed(1)
    loss = (o.double() * torch.randn(o.shape, device="cuda", dtype=torch.float64)).nansum()
    for lse in (lse_cmp, lse_slc, lse_win):
        loss = loss + torch.where(lse > -torch.inf, lse, 0).double().sin().sum()
    grads = torch.autograd.grad(loss, leaves)
    outputs = {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win, "o": o, "lse_cmp": lse_cmp, "lse_slc": lse_slc}
    gradients = dict(zip(("q", "k", "v", "k_slc", "v_slc", "k_win", "v_win", "gates"), grads, strict=True))
    return {"blocks": chosen, "k_cmp": k_cmp, **outputs, "lse_win": lse_win, **gradients}


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; where both are the same infinity or NaN there is none."""
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, actual.double() - exact.double())
    return (difference.norm() / exact.double().nan_to_num(0, 0, 0).norm().clamp_min(1e-30)).item()


def assert_same_choice(case: Case, tensors: Sequence[Tensor], got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Where two choices differ, the scores of the blocks in question differ by rounding only."""
    n_blocks = -(-tensors[1].shape[1] // 64)

    def chosen(blocks: Tensor) -> Tensor:
        taken = torch.zeros(*blocks.shape[:3], n_blocks + 1, device="cuda")
        return taken.scatter_(3, blocks.long() % (n_blocks + 1), 1)[..., :-1]

    disputed = chosen(got["blocks"]) != chosen(exact["blocks"])
    if not disputed.any():
        return
    how = {**MEAN, **case.where}
    p = nsa.ops.selection.compression_probabilities(tensors[0].double(), got["k_cmp"].double(), got["lse_cmp"], **how)
    fold = {**MEAN, "l_sel": 64, "n_blocks": n_blocks, "cu_seqlens": case.where.get("cu_seqlens")}
    p_slc = nsa.ops.selection.selection_scores(p, **fold)
    scores = p_slc.unflatten(2, (case.g, case.h)).sum(3)
    highest = torch.where(disputed, scores, -torch.inf).amax(-1)
    lowest = torch.where(disputed, scores, torch.inf).amin(-1)
    assert ((highest - lowest) <= 1e-5 * highest)[disputed.any(-1)].all()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_outputs_choices_and_gradients(case):
    tensors = inputs_of(case)
    got = attend(case, tensors, "auto")
    exact = attend(case, [x.double() for x in tensors], "reference", got["blocks"])
    same_type = attend(case, tensors, "reference", got["blocks"])
    assert_same_choice(case, tensors, got, same_type)
    atol = 1e-6 if case.dtype == torch.float32 else 1e-4
    for key in got.keys() - {"blocks"}:
        assert got[key].dtype == same_type[key].dtype
        assert got[key].is_contiguous()
        allowed = 2 * error(same_type[key], exact[key]) + atol
        assert error(got[key], exact[key]) <= allowed, (key, error(got[key], exact[key]), allowed)


def test_uninitialised_memory_is_never_read():
    """Deterministic mode fills new tensors with NaN; results must stay the same, bit for bit, at every repetition."""
    case = Case(16, 128, 128, torch.bfloat16, 701)
    tensors = inputs_of(case)
    expected = attend(case, tensors, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        first = attend(case, tensors, "triton")
        for _ in range(100):
            again = attend(case, tensors, "triton")
            assert all(torch.equal(x, again[key]) for key, x in first.items())
    finally:
        torch.use_deterministic_algorithms(False)
    for key, x in first.items():
        torch.testing.assert_close(x, expected[key], rtol=2e-2, atol=2e-2, msg=key)


def small_step() -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 600, n, x, device="cuda", dtype=torch.bfloat16) for n, x in ((32, 128), *[(2, 128)] * 6)]
    gates = torch.rand(1, 600, 32, 3, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (*tensors, gates)]

    def step() -> list[Tensor]:
        q, k, v, k_slc, v_slc, k_win, v_win, gates = leaves
        k_cmp, v_cmp = (nsa.compress_mean(x, **MEAN) for x in (k, v))
        o = nsa.nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, **CHOICE, w=WINDOW)
        return [o, *torch.autograd.grad(o.float().square().sum(), leaves)]

    return step, leaves


def test_auto_runs_kernels_without_a_stop_of_the_host():
    step, _ = small_step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = {event.key for event in trace.key_averages()}
    wanted = {"_compress_mean_fwd_kernel", "_compress_mean_bwd_kernel", "_group_probabilities_kernel"}
    wanted |= {"_top_blocks_kernel", "_union_kernel", "_inverse_kernel", "_selected_bwd_dq_kernel"}
    wanted |= {"_interval_bwd_dq_kernel", "_gated_sum_fwd_kernel", "_gated_sum_bwd_kernel", "_delta_kernel"}
    hopper = torch.cuda.get_device_capability()[0] == 9
    attention = {"_interval_fwd_kernel", "_selected_fwd_kernel", "_interval_bwd_dkv_kernel", "_selected_bwd_dkv_kernel"}
    wanted |= {"attend_kernel", "sum_keys_kernel"} if hopper else attention
    assert wanted <= kernels
    assert not any("gemm" in kernel or "softmax" in kernel for kernel in kernels)


def test_steps_can_be_captured_in_a_cuda_graph():
    step, leaves = small_step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_kernels_run_on_the_current_stream():
    step, leaves = small_step()
    expected = step()
    values = [x.detach().clone() for x in leaves]
    with torch.no_grad():
        for x in leaves:
            x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        with torch.no_grad():
            for x, value in zip(leaves, values, strict=True):
                x.copy_(value)
        got = step()
    torch.cuda.synchronize()
    for actual, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_kernels_run_on_the_device_of_their_inputs():
    step, leaves = small_step()
    expected = step()[0]
    q, k, v, *rest, gates = (x.detach().to("cuda:1") for x in leaves)
    k_cmp, v_cmp = (nsa.compress_mean(x, **MEAN) for x in (k, v))
    o = nsa.nsa_attention(q, k_cmp, v_cmp, *rest, gates, **CHOICE, w=WINDOW)
    torch.testing.assert_close(o.cpu(), expected.cpu(), rtol=2e-2, atol=2e-2)


def test_inputs_may_have_any_strides():
    case = Case(16, 128, 128, torch.bfloat16, 301)
    tensors = inputs_of(case)
    expected = attend(case, tensors, "triton")
    for arrange in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    ):
        got = attend(case, [arrange(x) for x in tensors], "triton")
        assert torch.equal(got["blocks"], expected["blocks"])
        for key, x in got.items():
            torch.testing.assert_close(x, expected[key], rtol=2e-2, atol=2e-2, msg=key)


@pytest.mark.parametrize("op", ["compressed", "selected", "window", "gated", "mean"])
def test_opcheck(op):
    ops, t = torch.ops.nsa_compile, 150
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    q, k, v = draw(1, t, 16, 64), draw(1, t, 1, 64), draw(1, t, 1, 64)
    blocks = (torch.arange(t, device="cuda", dtype=torch.int32) // 64).view(1, t, 1, 1)
    arguments = {
        "compressed": (ops.compressed_attention, (q, k[:, :8], v[:, :8], 32, 16, None, None, 0.1, "triton")),
        "selected": (ops.selected_attention, (q, k, v, blocks, 64, None, None, 0.1, "triton")),
        "window": (ops.window_attention, (q, k, v, 50, None, None, 0.1, "triton")),
        "gated": (ops.gated_sum, (q, q, q, draw(1, t, 16, 3), "triton")),
        "mean": (ops.compress_mean, (k, 32, 16, None, "triton")),
    }
    overload, args = arguments[op]
    torch.library.opcheck(overload.default, args, atol=2e-2, rtol=2e-2)


def test_memory_of_the_choice_is_bounded():
    used = []
    for t in (65536, 131072):
        q = torch.randn(1, t, 64, 128, device="cuda", dtype=torch.bfloat16)
        k_cmp = torch.randn(1, t // 16 - 1, 4, 128, device="cuda", dtype=torch.bfloat16)
        lse = torch.full((1, t, 64), 8.0, device="cuda")
        nsa.select_blocks(q[:, :64], k_cmp[:, :3], lse[:, :64], **MEAN, l_sel=64, n_sel=16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nsa.select_blocks(q, k_cmp, lse, **MEAN, l_sel=64, n_sel=16)
        used.append(torch.cuda.max_memory_allocated() - before)
    assert used[0] < 256 * 2**20
    assert used[1] < 2.2 * used[0]


def rows_by_hand(q: Tensor, k: Tensor, v: Tensor, tokens: dict[int, Tensor]) -> dict[int, Tensor]:
    """Attention of the queries i to the keys tokens[i], one group, in fp64."""
    attended = {}
    for i, chosen in tokens.items():
        p = (q[0, i].double() @ k[0, chosen, 0].double().T * q.shape[-1] ** -0.5).softmax(-1)
        attended[i] = p @ v[0, chosen, 0].double()
    return attended


def test_a_million_tokens():
    t, h = 2**20, 16
    torch.manual_seed(0)
    q = torch.randn(1, t, h, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, t, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k_cmp, v_cmp = (nsa.compress_mean(x, **MEAN) for x in (k, v))
    o_cmp, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **MEAN)
    blocks = nsa.select_blocks(q, k_cmp, lse, **MEAN, l_sel=64, n_sel=16)
    o_slc, _ = nsa.selected_attention(q, k, v, blocks, l_sel=64)
    o_win, _ = nsa.window_attention(q, k, v, w=512)
    some = [0, 1, 31, 5000, 262143, 524288, t - 65, t - 1]
    span = lambda first, end: torch.arange(first, end, device="cuda")  # noqa: E731
    visible = {i: span(0, (i + 1 - 32) // 16 + 1) for i in some if i >= 31}
    of_blocks = {i: (blocks[0, i, 0][blocks[0, i, 0] >= 0][:, None] * 64 + span(0, 64)).flatten() for i in some}
    of_blocks = {i: x[x <= i] for i, x in of_blocks.items()}
    for o, expected in (
        (o_cmp, rows_by_hand(q, k_cmp, v_cmp, visible)),
        (o_slc, rows_by_hand(q, k, v, of_blocks)),
        (o_win, rows_by_hand(q, k, v, {i: span(max(0, i - 511), i + 1) for i in some})),
    ):
        for i, row in expected.items():
            torch.testing.assert_close(o[0, i].double(), row, rtol=2e-2, atol=4e-3)
    for i in (5000, 524288, t - 1):
        p = (q[0, i].double() @ k_cmp[0, visible[i], 0].double().T * 0.125).softmax(-1).sum(0)
        n_blocks = i // 64 + 1
        fold = {**MEAN, "l_sel": 64, "n_blocks": n_blocks}
        scores = nsa.ops.selection.selection_scores(p, **fold)
        scores[0], scores[-2:] = torch.inf, torch.inf
        lowest = scores.topk(16).values[-1]
        assert (scores[blocks[0, i, 0].long()] >= lowest * (1 - 1e-4)).all()


def test_offsets_beyond_32_bits():
    t, h, d = 2**20, 16, 256
    q = torch.empty(1, t, h, d, device="cuda", dtype=torch.bfloat16).normal_()
    k, v = (torch.empty(1, t, 1, d, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    assert q.numel() > 2**31
    o, _ = nsa.window_attention(q, k, v, w=64)
    expected = rows_by_hand(q, k, v, {i: torch.arange(i - 63, i + 1, device="cuda") for i in (t // 2 + 5, t - 1)})
    for i, row in expected.items():
        torch.testing.assert_close(o[0, i].double(), row, rtol=2e-2, atol=1e-2)
