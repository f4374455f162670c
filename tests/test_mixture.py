"""Selected attention mixed with the other branches in one op: equal to the functions it is composed of, on any device.

Inputs of the kernels lie in larger buffers of NaN, and NaN stands wherever no query may look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from cases import draw
from launches import Launches, watch
from models import needs_compiler
from test_custom_ops import L_SEL, D, L, W, choose, count_flops, make_inputs
from test_gpu_kernels import Case, assert_close, assert_within, compress, deterministic, no_sync
from test_gpu_kernels import shape as gpu_shape
from test_kernels import CASES, DEVICE, SMALL, check_against_fp64, surrounded
from test_kernels import choose as choose_blocks
from torch import Tensor
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

from nsa_compile import (
    NSAAttention,
    NSACache,
    compressed_attention,
    gated_sum,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_compile.custom_ops.mixture import selected_mixture
from nsa_compile.ops import nsa as reference

OPS = torch.ops.nsa_compile
PLACEMENTS = ["plain", "q_start", "packed"]
NAMES = ("q", "k", "v", "o_cmp", "o_win", "gates")
NAN = float("nan")


@pytest.fixture
def launches(monkeypatch) -> Launches:
    return watch(monkeypatch)


def composed(q, k, v, blocks, o_cmp, o_win, gates, *, impl="auto", **how) -> Tensor:
    """The mixture by the functions that it is made of."""
    o_slc, _ = selected_attention(q, k, v, blocks, **how, impl=impl)
    return gated_sum(o_cmp, o_slc, o_win, gates, impl=impl)


def make_mixture(placement: str, **changes):
    """The inputs (q, k, v, o_cmp, o_win, gates), blocks and where the queries stand."""
    q, k, v, k_cmp, v_cmp, gates, q_start, cu = make_inputs(placement, **changes)
    where = {"q_start": q_start, "cu_seqlens": cu}
    o_cmp, _ = compressed_attention(q, k_cmp, v_cmp, l=L, d=D, **where)
    o_win, _ = window_attention(q, k, v, w=W, **where)
    branches = (x.detach().requires_grad_() for x in (o_cmp, o_win))
    return [q, k, v, *branches, gates], choose(q, k_cmp, v_cmp, q_start, cu), where


def differentiate(mix: Callable[..., Tensor], inputs: Sequence[Tensor], blocks: Tensor, grad: Tensor, **how):
    """Output and gradients by name."""
    q, k, v, *others = leaves = [x.detach().requires_grad_() for x in inputs]
    o = mix(q, k, v, blocks, *others, **how)
    return {"o": o.detach(), **dict(zip(NAMES, torch.autograd.grad(o, leaves, grad), strict=True))}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_composed_functions(placement, dtype):
    inputs, blocks, where = make_mixture(placement, dtype=dtype)
    grad = torch.randn_like(inputs[3])
    got = differentiate(selected_mixture, inputs, blocks, grad, l_sel=L_SEL, **where)
    for mix, exact in ((composed, {"rtol": 0, "atol": 0}), (reference.selected_mixture, {})):
        if mix is not composed and dtype == torch.bfloat16:
            continue  # autograd rounds elsewhere
        expected = differentiate(mix, inputs, blocks, grad, l_sel=L_SEL, **where)
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, **exact, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradcheck(placement):
    (q, k, v, *others), blocks, where = make_mixture(placement, t=13, g=1)
    call = lambda q, k, v, *x: selected_mixture(q, k, v, blocks, *x, l_sel=L_SEL, **where)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, *others))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(placement, dtype):
    (q, k, v, *others), blocks, where = make_mixture(placement, dtype=dtype)
    opcheck(OPS.selected_mixture, (q, k, v, blocks, *others, L_SEL, *where.values(), 0.5, True, "auto"))
    q, k, v, *others = (x.detach() for x in (q, k, v, *others))
    opcheck(OPS.selected_mixture, (q, k, v, blocks, *others, L_SEL, *where.values(), 0.5, False, "auto"))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_opcheck_of_the_gradient_takes_any_stride(placement, layout):
    inputs, blocks, where = make_mixture(placement, dtype=torch.float32)
    q, k, v, *others = (x.detach() for x in inputs)
    b, t, n, d_v = others[0].shape
    grad = (
        torch.ones(()).expand(b, t, n, d_v) if layout == "expanded" else torch.randn(d_v, n, t, b).permute(3, 2, 1, 0)
    )
    o_slc, lse = selected_attention(q, k, v, blocks, l_sel=L_SEL, **where)
    call = (grad, o_slc, lse, q, k, v, blocks, *others, L_SEL, *where.values(), 0.5, "auto")
    opcheck(OPS.selected_mixture_backward, call)


def test_flops_are_those_of_the_composed_functions():
    inputs, blocks, _ = make_mixture("plain", dtype=torch.float32)
    grad = torch.randn_like(inputs[3])
    counts = [
        count_flops(lambda mix=mix: differentiate(mix, inputs, blocks, grad, l_sel=L_SEL))
        for mix in (selected_mixture, composed)
    ]
    assert counts[0] == counts[1] > 0


def test_the_branch_is_kept_for_gradients_only():
    inputs, blocks, _ = make_mixture("plain", dtype=torch.float32)
    q, k, v, *others = inputs
    call = lambda keep: OPS.selected_mixture(q, k, v, blocks, *others, L_SEL, None, None, 0.5, keep, "auto")  # noqa: E731
    o, o_slc, lse = call(True)
    assert o_slc.shape == o.shape and o.requires_grad and not o_slc.requires_grad and not lse.requires_grad
    without, nothing, _ = call(False)
    assert torch.equal(without, o) and nothing.shape == (0,)
    with pytest.raises(ValueError, match="keep: expected True where a gradient is wanted, got False"):
        without.sum().backward()
    with torch.no_grad():
        o = selected_mixture(q, k, v, blocks, *others, l_sel=L_SEL)
    torch.testing.assert_close(o, composed(q, k, v, blocks, *others, l_sel=L_SEL), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o_cmp": (2, 23, 4, 2)}, r"o_cmp: expected axis d_v = 3 .*, got shape \(2, 23, 4, 2\)"),
        ({"o_win": (2, 22, 4, 3)}, "o_win: expected axis t = 23 .*, got shape"),
        ({"gates": (2, 23, 4, 2)}, "gates: expected axis branches = 3 .*, got shape"),
        ({"k": (2, 22, 2, 4), "v": (2, 22, 2, 3)}, "k: expected s = t = 23 keys without q_start, got shape"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    inputs, blocks, _ = make_mixture("plain", dtype=torch.float32)
    given = dict(zip(NAMES, inputs, strict=True)) | {name: torch.randn(size) for name, size in change.items()}
    with pytest.raises(ValueError, match=message):
        selected_mixture(**given, block_indices=blocks, l_sel=L_SEL)


@pytest.mark.parametrize("impl", ["triton", "flash", "fast"])
def test_an_implementation_that_cannot_run_is_refused(impl):
    inputs, blocks, _ = make_mixture("plain")
    given = dict(zip(NAMES, inputs, strict=True))
    with pytest.raises(ValueError, match=f"impl: expected .* got '{impl}'"):
        selected_mixture(**given, block_indices=blocks, l_sel=L_SEL, impl=impl)


@needs_compiler
def test_compiles_to_one_graph_each_way():
    inputs, blocks, _ = make_mixture("plain", dtype=torch.float32)
    grad = torch.randn_like(inputs[3])
    torch._dynamo.reset()
    mix = torch.compile(selected_mixture, fullgraph=True, dynamic=True)
    got = differentiate(mix, inputs, blocks, grad, l_sel=L_SEL)
    for name, x in differentiate(selected_mixture, inputs, blocks, grad, l_sel=L_SEL).items():
        torch.testing.assert_close(got[name], x)
    q, k, v, *others = inputs
    with torch.no_grad():
        torch.testing.assert_close(mix(q, k, v, blocks, *others, l_sel=L_SEL), got["o"])


def test_checkpointing_gives_the_same_gradients():
    inputs, blocks, _ = make_mixture("plain", dtype=torch.float32)
    grad = torch.randn_like(inputs[3])
    expected = differentiate(selected_mixture, inputs, blocks, grad, l_sel=L_SEL)
    for reentrant in (False, True):
        again = lambda *x, again=reentrant, **how: torch.utils.checkpoint.checkpoint(  # noqa: E731
            lambda *y: selected_mixture(*y, **how), *x, use_reentrant=again
        )
        q, k, v, *others = leaves = [x.detach().requires_grad_() for x in inputs]
        again(q, k, v, blocks, *others, l_sel=L_SEL).backward(grad)
        assert all(torch.equal(x.grad, expected[name]) for name, x in zip(NAMES, leaves, strict=True))


def count_calls(run: Callable[[], object]) -> list[str]:
    """Names of the ops of this package that run, forward ones."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run()
    names = {event.key for event in trace.key_averages() if event.key.startswith("nsa_compile::")}
    return sorted(name.removeprefix("nsa_compile::") for name in names)


def test_the_layer_trains_and_prefills_by_the_op():
    layer = NSAAttention(16, 4, 2, 4, 4, l=4, d=2, l_sel=4, n_sel=3, w=7)
    x = torch.randn(2, 23, 16)
    for run in (lambda: layer(x), lambda: layer(x, NSACache.for_model(layer, 2, 30))):
        with torch.no_grad():
            names = count_calls(run)
        assert "selected_mixture" in names and not {"selected_attention", "gated_sum"} & set(names)


KERNEL_CASES = [
    "one-head", "three-heads-packed", "four-heads-in-a-buffer", "eight-heads-blocks-of-24", "blocks-of-48-packed",
    "decode",
]  # fmt: skip


def draw_mixture(case) -> tuple[list[Tensor], Tensor]:
    """The inputs of a mixture for a case of the kernels' tests, NaN where no query looks, and the blocks."""
    x = case.draw()
    size = (*x.q.shape[:3], x.v_slc.shape[-1])
    o_cmp, o_win = (case.arrange(draw(*size, seed=50 + i).to(DEVICE, case.dtype)) for i in range(2))
    return [x.q, x.k_slc, x.v_slc, o_cmp, o_win, case.arrange(x.gates.nan_to_num())], choose_blocks(case, x)


@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_kernels(name, launches):
    case = CASES[name]
    inputs, blocks = draw_mixture(case)
    padding = torch.arange(case.t, device=DEVICE) >= (case.cu_seqlens[-1] if case.cu_seqlens else case.t)

    def call(q, k, v, *others, impl):
        if case.cu_seqlens:  # hides the NaN in the gradients of padding
            others = [x.masked_fill(padding[:, None, None], 0.0) for x in others]
        return selected_mixture(q, k, v, blocks, *others, l_sel=case.shape.l_sel, **case.how, impl=impl)

    check_against_fp64(call, inputs, case, launches, "selection")
    assert launches["gating._gated_sum_bwd_kernel"] == 1
    assert launches["tiles._delta_kernel"] == 0


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_kernels_give_what_the_composed_ones_give(launches):
    inputs, blocks = draw_mixture(SMALL)
    grad = surrounded(draw(*inputs[3].shape, seed=3, dtype=torch.float32).to(DEVICE))
    how = {"l_sel": SMALL.shape.l_sel, "impl": "triton"}
    got = differentiate(selected_mixture, inputs, blocks, grad, **how)
    expected = differentiate(composed, inputs, blocks, grad, **how)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_closed_gate_lets_nan_through_as_the_gated_sum_does(impl):
    inputs, blocks = draw_mixture(SMALL)
    gates = torch.zeros_like(inputs[5])
    for i in (1, 3, 4):  # keys, then the other branches
        broken = [x.clone() for x in inputs]
        broken[i][:, 5] = NAN
        broken[5] = gates
        q, k, v, *others = broken
        got = selected_mixture(q, k, v, blocks, *others, l_sel=SMALL.shape.l_sel, impl=impl)
        expected = composed(q, k, v, blocks, *others, l_sel=SMALL.shape.l_sel, impl=impl)
        assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().any() and not got.isnan().all()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU_CASES = [
    *(Case(gpu_shape(h, *widths), BF16, 501) for h in (4, 16) for widths in ((128, 128), (64, 128), (192, 128))),
    *(Case(gpu_shape(h, 128, 128), FP16, 333, layout) for h in (4, 16) for layout in ("packed", "buffer")),
    Case(gpu_shape(16, 192, 128), BF16, 431, "packed"),
    Case(gpu_shape(16, 128, 128, l_sel=128, d=32, w=64), BF16, 301, scale=-0.05),
    Case(gpu_shape(8, 78, 70), FP16, 450, "packed"),
    Case(gpu_shape(64, 128, 64, g=1), BF16, 150, "buffer"),
    Case(gpu_shape(16, 128, 128), BF16, 1, "buffer"),
    Case(gpu_shape(16, 256, 256), BF16, 201),  # not for the Hopper kernel, as the next two
    Case(gpu_shape(3, 128, 128), BF16, 201, "packed"),
    Case(gpu_shape(16, 64, 64), FP32, 201),
]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def draw_on_gpu(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs of the mixture by the kernels of the other branches, NaN where no query looks; blocks; a gradient of o."""
    q, k, v, k_slc, v_slc, k_win, v_win, gates, grad = case.draw()
    how = {**case.where, "scale": case.scale}
    k_cmp, v_cmp = compress(case, k, v)
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **case.shape.compression, **how)
    blocks = select_blocks(q, k_cmp, lse, **case.shape.choice, **how)
    o_win, _ = window_attention(q, k_win, v_win, w=case.shape.w, **how)
    return [q, k_slc, v_slc, o_cmp, o_win, gates.nan_to_num()], blocks, grad


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("case", GPU_CASES, ids=str)
    def test_output_and_every_gradient(self, case):
        inputs, blocks, grad = draw_on_gpu(case)
        how = {"l_sel": case.shape.l_sel, "scale": case.scale, **case.where}
        got = differentiate(selected_mixture, inputs, blocks, grad, **how)
        exact = [x.double() for x in inputs]
        exact = differentiate(composed, exact, blocks, grad.double(), **how, impl="reference")
        same_type = differentiate(composed, inputs, blocks, grad, **how, impl="reference")
        for name in got:
            assert got[name].is_contiguous()
            assert_within(name, got[name], same_type[name], exact[name])
        assert_close(got, differentiate(composed, inputs, blocks, grad, **how))

    @pytest.mark.parametrize("case", [GPU_CASES[i] for i in (0, 3, 5, 6, 7)], ids=str)
    def test_reads_no_uninitialised_memory_and_needs_no_kept_branch(self, case):
        inputs, blocks, grad = draw_on_gpu(case)
        how = {"l_sel": case.shape.l_sel, "scale": case.scale, **case.where}
        expected = differentiate(selected_mixture, inputs, blocks, grad, **how)
        with deterministic():
            assert_close(differentiate(selected_mixture, inputs, blocks, grad, **how), expected)
            q, k, v, *others = inputs
            with torch.no_grad():
                assert torch.equal(selected_mixture(q, k, v, blocks, *others, **how), expected["o"])

    @pytest.mark.parametrize("name", ["v", "o_cmp", "o_win"])
    def test_a_closed_gate_lets_nan_through_as_the_gated_sum_does(self, name):
        case = GPU_CASES[3]
        inputs, blocks, _ = draw_on_gpu(case)
        q, k, v, *others = [*inputs[:-1], torch.zeros_like(inputs[-1])]
        dict(zip(NAMES, (q, k, v, *others), strict=True))[name][:, 70] = NAN
        got, expected = (mix(q, k, v, blocks, *others, l_sel=case.shape.l_sel) for mix in (selected_mixture, composed))
        assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().any() and not got.isnan().all()

    def test_the_kernel_that_attends_also_mixes_on_hopper(self):
        case = GPU_CASES[3]
        inputs, blocks, grad = draw_on_gpu(case)
        run = lambda: differentiate(selected_mixture, inputs, blocks, grad, l_sel=case.shape.l_sel)  # noqa: E731
        run()
        with no_sync():
            run()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        launched = {event.key for event in trace.key_averages()}
        on_hopper = torch.cuda.get_device_capability()[0] == 9
        assert ("attend_kernel" in launched) == on_hopper
        assert ("_gated_sum_fwd_kernel" in launched) != on_hopper
        assert "_gated_sum_bwd_kernel" in launched and "_delta_kernel" not in launched
