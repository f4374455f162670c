"""Every Triton kernel against the reference: on a CUDA device if there is one, else in Triton's interpreter.

Inputs lie in larger buffers of NaN, and NaN stands wherever no query may look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from cases import Inputs, Shape, draw, draw_inputs, int32
from launches import Launches, find_kernels, watch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from nsa_compile import (
    compress_mean,
    compressed_attention,
    gated_sum,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_compile.custom_ops.kernels import block_choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
ATOL = {torch.float32: 1e-5, torch.float16: 1e-3}
OPS = torch.ops.nsa_compile

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> Launches:
    return watch(monkeypatch)


def surrounded(x: Tensor) -> Tensor:
    """x as the middle of a larger buffer of NaN."""
    buffer = x.new_full([n + 2 for n in x.shape[:-1]] + [x.shape[-1] + 16], NAN)
    view = buffer[(slice(1, -1),) * (x.ndim - 1) + (slice(8, -8),)]
    return view.copy_(x)


def heads_first(x: Tensor) -> Tensor:
    """x stored as [b, n, t, ...]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(x: Tensor) -> Tensor:
    """x with its last axis stored first."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@dataclass(frozen=True)
class Case:
    """Sizes and places of the queries and keys of a test."""

    shape: Shape
    t: int
    b: int = 1
    s: int | None = None
    q_start: tuple[int, ...] = ()
    cu_seqlens: tuple[int, ...] = ()
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    arrange: Callable[[Tensor], Tensor] = surrounded

    @property
    def where(self) -> dict[str, Any]:
        """The keyword arguments that place queries."""
        given = {"q_start": self.q_start, "cu_seqlens": self.cu_seqlens}
        return {name: int32(*values).to(DEVICE) for name, values in given.items() if values}

    @property
    def how(self) -> dict[str, Any]:
        """The keyword arguments of an attention that are no block sizes."""
        return {**self.where, "scale": self.scale}

    def draw(self) -> Inputs:
        """Random inputs in the case's type, NaN where no query looks."""
        x = draw_inputs(self.shape, self.t, b=self.b, s=self.s, c=self.t // self.shape.d if self.cu_seqlens else None)
        count, ends = oracle.count_blocks, [(row, start + self.t) for row, start in enumerate(self.q_start)]
        ends_cmp = [(row, count(end, self.shape.l, self.shape.d)) for row, end in ends]
        if self.cu_seqlens:
            lengths = int32(*self.cu_seqlens).diff().tolist()
            ends = [(0, self.cu_seqlens[-1])]
            ends_cmp = [(0, sum(count(length, self.shape.l, self.shape.d) for length in lengths))]
            for tensor in (x.q, x.gates):
                tensor[:, self.cu_seqlens[-1] :] = NAN
        for row, end in ends:
            for keys in (x.k_slc, x.v_slc, x.k_win, x.v_win):
                keys[row, end:] = NAN
        for row, end in ends_cmp:
            x.k_cmp[row, end:], x.v_cmp[row, end:] = NAN, NAN
        return Inputs(*(self.arrange(tensor.to(DEVICE, self.dtype)) for tensor in x))


CASES = {
    "one-head": Case(Shape(8, 4, 16, 5, 40, g=1, h=1, d_k=12, d_v=20), t=151),
    "three-heads-packed": Case(
        Shape(4, 2, 6, 4, 33, g=1, h=3, d_k=12, d_v=7), t=127, cu_seqlens=(0, 61, 61, 62, 122), arrange=heads_first
    ),
    "four-heads-in-a-buffer": Case(
        Shape(8, 4, 16, 4, 50, g=1, h=4, d_k=24, d_v=16), t=70, b=2, s=160, q_start=(90, 3), dtype=torch.float16
    ),
    "eight-heads-blocks-of-24": Case(
        Shape(8, 4, 24, 2, 35, init_blocks=0, local_blocks=1, g=1, h=8, d_k=16, d_v=32), t=77, b=2, arrange=torch.clone
    ),
    "sixteen-heads": Case(
        Shape(32, 16, 64, 2, 70, init_blocks=0, local_blocks=1, g=1, h=16, d_k=24, d_v=40), t=157, dtype=torch.float16
    ),
    "blocks-of-48-packed": Case(
        Shape(16, 8, 48, 3, 64, local_blocks=1, g=1, h=4, d_k=10, d_v=18), t=179, cu_seqlens=(0, 7, 173), scale=-0.7
    ),
    "blocks-of-one-token": Case(
        Shape(1, 1, 1, 6, 9, g=1, h=2, d_k=8, d_v=8), t=51, scale=-0.5, arrange=channels_first
    ),
    "all-blocks": Case(Shape(4, 2, 6, 20, 200, g=2, h=3, d_k=5, d_v=3), t=45, scale=1.5),
    "wide": Case(Shape(8, 4, 16, 3, 40, local_blocks=1, g=1, h=4, d_k=160, d_v=72), t=71),
    "wide-fp16": Case(
        Shape(8, 4, 16, 3, 40, local_blocks=1, g=1, h=4, d_k=192, d_v=128), t=71, dtype=torch.float16,
        arrange=torch.clone,
    ),
    "decode": Case(Shape(8, 4, 16, 4, 50, g=2, h=4, d_k=16, d_v=16), t=1, b=3, s=150, q_start=(149, 0, 66)),
}  # fmt: skip
SMALL = Case(Shape(8, 4, 16, 3, 20, local_blocks=1, g=1, h=3, d_k=12, d_v=20), t=89)


class Branch(NamedTuple):
    """An attention: the file of its kernels, its inputs, and its call with a case, blocks and keyword arguments."""

    file: str
    inputs: tuple[str, str, str]
    call: Callable[..., tuple[Tensor, Tensor]]


BRANCHES = {
    "compression": Branch(
        "interval",
        ("q", "k_cmp", "v_cmp"),
        lambda shape, blocks, *x, **how: compressed_attention(*x, **shape.compression, **how),
    ),
    "selection": Branch(
        "selection",
        ("q", "k_slc", "v_slc"),
        lambda shape, blocks, *x, **how: selected_attention(*x, blocks, l_sel=shape.l_sel, **how),
    ),
    "window": Branch(
        "interval",
        ("q", "k_win", "v_win"),
        lambda shape, blocks, *x, **how: window_attention(*x, w=shape.w, **how),
    ),
}
every_branch = pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def choose(case: Case, x: Inputs, impl: str = "reference") -> Tensor:
    """The blocks of a case's queries, by the reference's LSE."""
    _, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, **case.shape.compression, **case.how, impl="reference")
    return select_blocks(x.q, x.k_cmp, lse, **case.shape.choice, **case.how, impl=impl)


def differentiate(
    call: Callable[..., Any], tensors: Sequence[Tensor], case: Case, wanted: tuple[int, ...] = (0, 1)
) -> list[Tensor]:
    """The outputs of a call, and its gradients through the `wanted` outputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = call(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted_outputs = [outputs[i] for i in wanted if i < len(outputs)]
    grads = [draw(*o.shape, seed=900 + i, dtype=case.dtype) for i, o in enumerate(wanted_outputs)]
    if case.cu_seqlens:
        for grad in grads:
            grad[:, case.cu_seqlens[-1] :] = NAN
    grads = [case.arrange(x.to(DEVICE, o.dtype)) for x, o in zip(grads, wanted_outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(wanted_outputs, leaves, grads)]


def check_against_fp64(
    call: Callable[..., Any], tensors: Sequence[Tensor], case: Case, launches: Launches, file: str,
    wanted: tuple[int, ...] = (0, 1),
) -> None:  # fmt: skip
    """Outputs and gradients are within twice the error of the reference in the same type, from that in fp64."""
    exact = differentiate(lambda *x: call(*x, impl="reference"), [x.double() for x in tensors], case, wanted)
    same_type = differentiate(lambda *x: call(*x, impl="reference"), tensors, case, wanted)
    assert launches.total() == 0
    forward = []

    def counted(*x):
        outputs = call(*x, impl="triton")
        forward.append(launches.of(file, "hopper", "hopper_backward"))
        return outputs

    got = differentiate(counted, tensors, case, wanted)
    assert 0 < forward[0] < launches.of(file, "hopper", "hopper_backward")
    for actual, reference, expected in zip(got, same_type, exact, strict=True):
        assert (actual.dtype, actual.shape) == (reference.dtype, expected.shape)
        assert_within(actual, expected, 2, reference, ATOL[case.dtype])


def assert_within(actual: Tensor, expected: Tensor, factor: float, reference: Tensor, atol: float) -> None:
    """`max|actual - expected| <= factor * max|reference - expected| + atol * max(1, max|expected|)`; -inf agree."""
    hidden = expected.isneginf()
    assert torch.equal(actual.isneginf(), hidden)
    actual, reference, expected = (x.double().masked_fill(hidden, 0.0) for x in (actual, reference, expected))
    if actual.numel():
        allowed = factor * (reference - expected).abs().max() + atol * expected.abs().max().clamp_min(1.0)
        assert (actual - expected).abs().max() <= allowed


@every_case
@every_branch
def test_attention(branch, case, launches):
    x = case.draw()
    blocks = choose(case, x)
    tensors = [getattr(x, name) for name in branch.inputs]
    check_against_fp64(
        lambda *tensors, impl: branch.call(case.shape, blocks, *tensors, **case.how, impl=impl),
        tensors, case, launches, branch.file,
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=["output", "lse"])
@every_branch
def test_gradients_of_one_output_alone(branch, wanted, launches):
    x = SMALL.draw()
    blocks = choose(SMALL, x)
    tensors = [getattr(x, name) for name in branch.inputs]
    check_against_fp64(
        lambda *tensors, impl: branch.call(SMALL.shape, blocks, *tensors, impl=impl),
        tensors, SMALL, launches, branch.file, wanted,
    )  # fmt: skip


def check_choice(blocks: Tensor, shape: Shape) -> None:
    """The blocks [b, t, g, n_sel] of queries from position 0 on are ascending, unique and past, the forced ones in."""
    last = torch.arange(blocks.shape[1], device=DEVICE)[:, None, None] // shape.l_sel
    block = torch.arange(int(last.max()) + 1, device=DEVICE)
    forced = (block <= last) & ((block < shape.init_blocks) | (block > last - shape.local_blocks))
    assert ((blocks[..., None] == block).any(-2) | ~forced).all()
    assert ((blocks >= -1) & (blocks <= last)).all()
    assert ((blocks[..., 1:] > blocks[..., :-1]) | (blocks[..., 1:] < 0)).all()
    assert ((blocks >= 0).sum(-1, keepdim=True) == (last + 1).clamp_max(shape.n_sel)).all()


@every_case
def test_choice_of_blocks(case, launches):
    x = case.draw()
    expected = choose(case, x)
    assert launches.total() == 0
    assert torch.equal(choose(case, x, "triton"), expected)
    assert launches.of("block_choice") > 0


def test_choice_among_equal_scores_takes_the_first_blocks(launches):
    shape, t = Shape(8, 4, 16, 4, g=1, h=4, d_k=12, d_v=20), 150
    x = Inputs(*(y.to(DEVICE) for y in draw_inputs(shape, t, dtype=torch.float32)))
    blocks = choose(Case(shape, t), x._replace(q=torch.zeros_like(x.q)), "triton").cpu()
    last = torch.arange(t) // shape.l_sel
    expected = torch.stack((0 * last, torch.where(last > 2, 1, last - 1), last - 1, last), -1)
    late = last >= 4
    assert torch.equal(blocks[0, late, 0].long(), expected[late])
    assert launches.of("block_choice") > 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_choice_by_nan_scores_forces_the_forced_blocks_and_takes_the_first_others(impl):
    shape, t = Shape(8, 4, 16, 4, g=2, h=3, d_k=12, d_v=20), 150
    x = Inputs(*(y.to(DEVICE) for y in draw_inputs(shape, t, dtype=torch.float32)))
    blocks = choose(Case(shape, t), x._replace(q=torch.full_like(x.q, NAN)), impl)
    check_choice(blocks, shape)
    last = torch.arange(t, device=DEVICE)[:, None] // shape.l_sel
    assert (blocks[0, ..., 1] == last.clamp_max(1)).where(last > 0, True).all()


def test_choice_for_one_chunk_of_queries_after_another(launches, monkeypatch):
    monkeypatch.setattr(block_choice, "select_blocks", partial(block_choice.select_blocks, scratch=2**14))
    case = Case(SMALL.shape, t=151)
    x = case.draw()
    assert torch.equal(choose(case, x, "triton"), choose(case, x))
    assert launches.of("block_choice") > 2


def test_garbage_sequences_keep_the_scores_of_a_chunk_in_the_scratch(launches, monkeypatch):
    """The sequences promise 192 compressed tokens of 128; the interpreter and guard zones see where scores are kept."""
    guarded, empty, guard = [], torch.empty, 2**16

    def guarded_empty(*size, **how):
        if len(size) > 1 or how.get("dtype") != torch.float32:
            return empty(*size, **how)
        guarded.append(torch.full((guard + size[0] + guard,), 7.0, device=how["device"]))
        return guarded[-1][guard:-guard]

    shape, t = Shape(1, 1, 4, 4, g=1, h=1, d_k=256, d_v=8), 128
    q, k_cmp = (x.to(DEVICE) for x in draw_inputs(shape, t, dtype=torch.float32)[:2])
    lse, cu_seqlens = torch.zeros(1, t, 1, device=DEVICE), int32(-64, 0, t).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded_empty)
        blocks = block_choice.select_blocks(
            q, k_cmp, lse, **shape.choice, q_start=None, cu_seqlens=cu_seqlens, scale=0.3, scratch=2**14
        )
    assert launches.of("block_choice") > 2
    (scratch,) = guarded
    assert (scratch[:guard] == 7.0).all()
    assert (scratch[-guard:] == 7.0).all()
    check_choice(blocks, shape)


def test_more_groups_take_no_more_chunks(monkeypatch):
    grids = {4: [], 16: []}
    for g, launched in grids.items():
        for kind in (JITFunction, InterpretedFunction):
            monkeypatch.setattr(kind, "run", lambda *args, grid, launched=launched, **how: launched.append(grid))
        q, k_cmp = torch.zeros(1, 2**15, g, 8), torch.zeros(1, 2**11 - 1, g, 8)
        lse, sizes = q[..., 0], Shape(32, 16, 64, 16).choice
        block_choice.select_blocks(q, k_cmp, lse, **sizes, q_start=None, cu_seqlens=None, scale=1.0)
    assert len(grids[16]) == len(grids[4]) > 2


def test_choice_among_more_blocks_than_one_tile_holds(launches):
    case = Case(Shape(1, 1, 1, 5, 9, g=1, h=2, d_k=8, d_v=8), t=2, s=9000, q_start=(8990,), arrange=torch.clone)
    x = case.draw()
    assert torch.equal(choose(case, x, "triton"), choose(case, x))
    assert launches.of("block_choice") > 0


@pytest.mark.parametrize(("l", "d"), [(1, 1), (4, 2), (8, 4), (12, 4), (32, 16)])
@pytest.mark.parametrize("cu_seqlens", [(), (0, 9, 9, 10, 83)], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", ATOL, ids=str)
def test_compress_mean(l, d, cu_seqlens, dtype, launches):
    case = Case(SMALL.shape, 87, cu_seqlens=cu_seqlens, dtype=dtype)
    k = draw(1 if cu_seqlens else 2, 87, 2, 37, seed=l, dtype=dtype).to(DEVICE)
    if cu_seqlens:
        k[:, cu_seqlens[-1] :] = NAN
    check_against_fp64(
        lambda k, impl: compress_mean(k, l=l, d=d, **case.where, impl=impl),
        [surrounded(k)], case, launches, "compression",
    )  # fmt: skip


def test_compress_mean_of_too_few_tokens(launches):
    k = torch.randn(2, 7, 1, 5, device=DEVICE, requires_grad=True)
    k_cmp = compress_mean(k, l=8, d=4, impl="triton")
    assert k_cmp.shape == (2, 0, 1, 5)
    assert not torch.autograd.grad(k_cmp.sum(), k)[0].any()
    assert launches.of("compression") > 0


@pytest.mark.parametrize("arrange", [surrounded, heads_first, channels_first, torch.clone])
@pytest.mark.parametrize("dtype", ATOL, ids=str)
def test_gated_sum(arrange, dtype, launches):
    case = Case(SMALL.shape, 23, dtype=dtype, arrange=arrange)
    shape = (2, case.t, 3)
    tensors = [arrange(draw(*shape, x, seed=x + i, dtype=dtype).to(DEVICE)) for i, x in enumerate((21, 21, 21, 3))]
    check_against_fp64(gated_sum, tensors, case, launches, "gating")


PLACED = {
    "rows": SMALL,
    "packed": Case(replace(SMALL.shape, g=2, h=2), t=93, cu_seqlens=(0, 5, 5, 86), arrange=torch.clone),
    "buffer": Case(SMALL.shape, t=9, b=2, s=120, q_start=(100, 0)),
}


def attend(case: Case, x: Inputs, impl: str) -> list[Tensor]:
    """Output and gradients of the whole attention, from raw keys."""

    def call(q, k, v, gates):
        sizes = {**case.shape.compression, "impl": impl}
        if case.q_start:
            k_cmp, v_cmp = (compress_mean(y.nan_to_num(), **sizes) for y in (k, v))
        else:
            k_cmp, v_cmp = (compress_mean(y, **sizes, **case.where) for y in (k, v))
        return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **case.shape.everything, **case.how, impl=impl)

    return differentiate(call, (x.q, x.k_slc, x.v_slc, x.gates), case)


def test_nsa_attention_launches_all_kernels(launches):
    for case in PLACED.values():
        x = case.draw()
        expected = attend(case, x, "reference")
        launched = launches.total()
        got = attend(case, x, "triton")
        assert launches.total() > launched
        for actual, reference in zip(got, expected, strict=True):
            assert_within(actual, reference, 0, reference, 1e-4)
    assert {name for name in find_kernels() if not name.startswith(("cache.", "decode."))} <= set(launches)


@every_branch
def test_deterministic_mode(branch, launches):
    """The same bits at every call; all memory that is not written holds NaN."""
    case = PLACED["packed"]
    x = case.draw()
    blocks = choose(case, x)
    tensors = [getattr(x, name) for name in branch.inputs]

    def call(*tensors, impl):
        return branch.call(case.shape, blocks, *tensors, **case.how, impl=impl)

    torch.use_deterministic_algorithms(True)
    try:
        check_against_fp64(call, tensors, case, launches, branch.file)
        first, second = (differentiate(partial(call, impl="triton"), tensors, case) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


@every_branch
@pytest.mark.parametrize("poison", ["key", "value"])
def test_nan_reaches_only_later_queries(branch, poison, launches):
    x = SMALL.draw()
    blocks = choose(SMALL, x)
    tensors = [getattr(x, name).clone() for name in branch.inputs]
    tensors[1 if poison == "key" else 2][:, tensors[1].shape[1] // 2] = NAN
    expected = branch.call(SMALL.shape, blocks, *tensors, impl="reference")
    got = branch.call(SMALL.shape, blocks, *tensors, impl="triton")
    assert launches.of(branch.file, "hopper", "hopper_backward") > 0
    broken = expected[0].isnan().any(-1).any(-1)[0]
    first = int(broken.int().argmax())
    assert 0 < first < SMALL.t - 1
    certain = (torch.arange(SMALL.t, device=DEVICE) < first) | broken
    if branch.file == "interval":
        certain |= ~broken
    for actual, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(actual[:, certain], reference[:, certain], rtol=1e-5, atol=1e-5, equal_nan=True)


@every_branch
def test_nan_of_a_sequence_stays_in_it(branch, launches):
    first = 58
    case = replace(SMALL, t=111, cu_seqlens=(0, first, 111))
    x, shape = case.draw(), case.shape
    blocks = choose(case, x)
    tensors = [getattr(x, name) for name in branch.inputs]
    expected = branch.call(shape, blocks, *tensors, **case.how, impl="reference")
    length = oracle.count_blocks(first, shape.l, shape.d) if branch.inputs[1] == "k_cmp" else first
    for tensor in tensors[1:]:
        tensor[:, :length] = NAN
    got = branch.call(shape, blocks, *tensors, **case.how, impl="triton")
    assert launches.of(branch.file, "hopper", "hopper_backward") > 0
    for actual, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(actual[:, first:], reference[:, first:], rtol=1e-5, atol=1e-5)


def test_blocks_in_any_order_with_unused_slots_between(launches):
    x = SMALL.draw()
    blocks = choose(SMALL, x)
    shuffle = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0)).argsort(-1).to(DEVICE)
    blocks = blocks.gather(-1, shuffle)
    check_against_fp64(
        lambda *tensors, impl: selected_attention(*tensors, blocks, l_sel=SMALL.shape.l_sel, impl=impl),
        (x.q, x.k_slc, x.v_slc), SMALL, launches, "selection",
    )  # fmt: skip


def test_many_queries_of_one_block(launches):
    case = Case(Shape(g=1, h=1, d_k=8, d_v=8), t=1100)
    x = case.draw()
    blocks = torch.zeros(1, case.t, 1, 1, dtype=torch.int32, device=DEVICE)
    check_against_fp64(
        lambda *tensors, impl: selected_attention(*tensors, blocks, l_sel=16, impl=impl),
        (x.q, x.k_slc, x.v_slc), case, launches, "selection",
    )  # fmt: skip


LARGE = 2**31 - 1


@pytest.mark.parametrize("cu_seqlens", [(), (0, 20, 58)], ids=["rows", "packed"])
def test_blocks_that_have_not_started_are_ignored(cu_seqlens, launches):
    case = Case(SMALL.shape, SMALL.t, cu_seqlens=cu_seqlens)
    x, l_sel = case.draw(), case.shape.l_sel
    blocks = choose(case, x)
    garbage = torch.tensor([LARGE, -LARGE - 1, -2, 4, 2**27, 1000], dtype=torch.int32, device=DEVICE)
    garbage = torch.cat((garbage.expand(*blocks.shape[:3], 6), blocks), -1)
    garbage[..., 3] = blocks.amax(-1) + 1
    tensors = [y.detach().requires_grad_() for y in (x.q, x.k_slc, x.v_slc)]
    results = []
    for b in (blocks, garbage):
        o, lse = OPS.selected_attention(*tensors, b, l_sel, None, case.where.get("cu_seqlens"), 0.3, "triton")
        results.append((o, lse, *torch.autograd.grad((o, lse), tensors, (torch.ones_like(o), torch.ones_like(lse)))))
    assert launches.of("selection") > 0
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "where",
    [
        {"q_start": (LARGE, -5)}, {"q_start": (-LARGE - 1, 30)}, {"cu_seqlens": (0, 50, 20, 90)},
        {"cu_seqlens": (-7, 30, LARGE)}, {"cu_seqlens": (40, -LARGE, 30, 5)},
    ],
    ids=str,
)  # fmt: skip
def test_no_value_of_an_index_reaches_other_memory(where, launches):
    """The interpreter checks every address; on a GPU only a crash would show."""
    packed = "cu_seqlens" in where
    shape, t, b = Shape(8, 4, 16, 4, 20, g=1, h=2, d_k=8, d_v=8), 31, 1 if packed else 2
    x = draw_inputs(shape, t, b=b, c=t // shape.d if packed else None, dtype=torch.float32)
    x = Inputs(*(y.to(DEVICE).requires_grad_() for y in x))
    q_start, cu_seqlens = (
        int32(*where[name]).to(DEVICE) if name in where else None for name in ("q_start", "cu_seqlens")
    )
    place, compression = (q_start, cu_seqlens, 0.3, "triton"), (shape.l, shape.d)
    o_cmp, lse = OPS.compressed_attention(x.q, x.k_cmp, x.v_cmp, *compression, *place)
    blocks = OPS.select_blocks(
        x.q.detach(), x.k_cmp.detach(), lse.detach(), *compression, shape.l_sel, shape.n_sel, 1, 2, *place
    )
    outputs = [
        o_cmp, OPS.selected_attention(x.q, x.k_slc, x.v_slc, blocks, shape.l_sel, *place)[0],
        OPS.window_attention(x.q, x.k_win, x.v_win, shape.w, *place)[0],
        OPS.compress_mean(x.k_slc, *compression, cu_seqlens, "triton"),
    ]  # fmt: skip
    torch.autograd.grad(outputs, x[:-1], [torch.ones_like(o) for o in outputs])
    assert (
        launches.of("interval", "hopper", "hopper_backward") and launches.of("selection") and launches.of("compression")
    )


def test_more_rows_than_a_grid_holds_are_refused(launches):
    x, how = torch.zeros(2**16, 1, 1, 1, device=DEVICE), {"impl": "triton"}
    blocks, two = x.int(), torch.zeros(2**15, 1, 2, 1, device=DEVICE)
    calls = [
        lambda: compress_mean(x, l=1, d=1, **how),
        lambda: compressed_attention(x, x, x, l=1, d=1, **how),
        lambda: select_blocks(x, x, x[..., 0], l=1, d=1, l_sel=1, n_sel=1, init_blocks=0, local_blocks=1, **how),
        lambda: selected_attention(x, x, x, blocks, l_sel=1, **how),
        lambda: OPS.window_attention_backward(two, None, two, two[..., 0], two, two, two, 1, None, None, 1.0, "triton"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^[qk]: expected at most 65535 rows .*, got 65536"):
            call()
    assert launches.total() == launches.of("places") <= 1


def test_auto_means_the_reference_on_the_cpu(launches):
    x = draw_inputs(SMALL.shape, 20, dtype=torch.float32)
    nsa_attention(*x, **SMALL.shape.everything)
    assert launches.total() == 0


@every_branch
def test_huge_scores_leave_gradients_finite(branch, launches):
    x = SMALL.draw()
    blocks = choose(SMALL, x)
    tensors = [getattr(x, name) for name in branch.inputs]
    tensors = [tensors[0] * 1e3, tensors[1] * 1e3, tensors[2]]
    o, _, *grads = differentiate(
        lambda *y: branch.call(SMALL.shape, blocks, *y, impl="triton"), tensors, SMALL, wanted=(0,)
    )
    expected, _ = branch.call(SMALL.shape, blocks, *tensors, impl="reference")
    torch.testing.assert_close(o, expected, rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[2].abs().max() <= SMALL.t * SMALL.shape.h * 10
    assert launches.of(branch.file, "hopper", "hopper_backward") > 0


def test_queries_behind_the_buffer_see_no_key_twice(launches):
    case = Case(SMALL.shape, t=9, b=2, s=50, q_start=(47, 49))
    x = draw_inputs(case.shape, case.t, b=2, s=50, dtype=torch.float32)
    tensors = [y.to(DEVICE) for y in (x.q, x.k_win, x.v_win)]
    check_against_fp64(
        lambda *y, impl: OPS.window_attention(*y, case.shape.w, case.where["q_start"], None, 0.3, impl),
        tensors, case, launches, "interval",
    )  # fmt: skip
