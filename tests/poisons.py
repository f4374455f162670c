"""NaN and infinity in an argument of an op, and where they may not show: what tests of isolation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from cases import Shape, draw, int32
from torch import Tensor

from nsa_compile import (
    compress_mean,
    compressed_attention,
    gated_sum,
    num_cmp,
    selected_attention,
    window_attention,
)
from nsa_compile.custom_ops.mixture import selected_mixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


class Layout(NamedTuple):
    """Where queries and keys stand; sequence boundaries lie inside the tiles of every kernel."""

    b: int
    t: int
    s: int
    q_start: tuple[int, ...] = ()
    cu_seqlens: tuple[int, ...] = ()

    @property
    def where(self) -> dict[str, Tensor]:
        """The keyword arguments that place queries."""
        given = {"q_start": self.q_start, "cu_seqlens": self.cu_seqlens}
        return {name: int32(*values).to(DEVICE) for name, values in given.items() if values}

    def slots(self, shape: Shape) -> int:
        """Number of compressed tokens of a row."""
        return self.s // shape.d if self.cu_seqlens else num_cmp(self.s, shape.l, shape.d)

    def places(self, axis: str, shape: Shape) -> tuple[Tensor, Tensor]:
        """Of queries, keys or slots, int [b, *]: the sequence each belongs to (-1: none), its (last) position there."""
        if axis == "slot" and self.cu_seqlens:
            counts = [num_cmp(z - a, shape.l, shape.d) for a, z in pairwise(self.cu_seqlens)]
            pairs = [(i, j * shape.d + shape.l - 1) for i, count in enumerate(counts) for j in range(count)]
            pairs += [(-1, 0)] * (self.slots(shape) - len(pairs))
            sequence, position = torch.tensor([pairs], device=DEVICE).unbind(-1)
            return sequence, position
        row = torch.arange(self.b, device=DEVICE)[:, None]
        if axis == "slot":
            position = torch.arange(self.slots(shape), device=DEVICE) * shape.d + shape.l - 1
            return row.expand(self.b, len(position)), position.expand(self.b, -1)
        index = torch.arange(self.t if axis == "query" else self.s, device=DEVICE).expand(self.b, -1)
        if axis == "query" and self.q_start:
            index = index + self.where["q_start"][:, None]
        if not self.cu_seqlens:
            return row.expand_as(index), index
        ends = self.where["cu_seqlens"]
        sequence = (torch.searchsorted(ends, index.contiguous(), right=True) - 1).clamp_max(len(ends) - 2)
        return torch.where(index < ends[-1], sequence, -1), index - ends[sequence]


class Setup(NamedTuple):
    """An implementation, its sizes and layouts."""

    impl: str
    dtype: torch.dtype
    shape: Shape
    layouts: dict[str, Layout]


SMALL_LAYOUTS = {
    "packed": Layout(1, 65, 65, cu_seqlens=(0, 5, 5, 20, 59)),
    "buffer": Layout(2, 21, 60, q_start=(30, 7)),
    "rows": Layout(2, 43, 43),
    "packed-buffer": Layout(1, 50, 65, q_start=(15,), cu_seqlens=(0, 5, 5, 20, 59)),
}
LAYOUTS = {
    "packed": Layout(1, 400, 400, cu_seqlens=(0, 37, 37, 170, 331, 390)),
    "rows": Layout(2, 203, 203),
    "buffer": Layout(2, 130, 500, q_start=(250, 71)),
    "packed-buffer": Layout(1, 190, 400, q_start=(130,), cu_seqlens=(0, 37, 37, 170, 331, 390)),
}
SMALL = Shape(4, 2, 16, 3, 11, local_blocks=1, g=1, h=2, d_k=8, d_v=12)


def paper(h: int, d_k: int, d_v: int) -> Shape:
    """Sizes that the Gluon kernels take."""
    return Shape(32, 16, 64, 3, 70, local_blocks=1, g=2, h=h, d_k=d_k, d_v=d_v)


def is_interpreted(impl: str) -> bool:
    """Whether kernels run in Triton's interpreter, which is slow."""
    return impl == "triton" and DEVICE == "cpu"


class Branch(NamedTuple):
    """An op: the axes of its inputs and of its outputs, its call with sizes, blocks, inputs and keyword arguments."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    call: Callable[..., Any]
    files: tuple[str, ...]
    """Files of its kernels."""


ATTENTION = {"o": "query", "lse": "query"}
INTERVAL, SELECTION = ("interval", "hopper", "hopper_backward"), ("selection", "hopper", "hopper_backward")
BRANCHES = {
    "compressed_attention": Branch(
        {"q": "query", "k_cmp": "slot", "v_cmp": "slot"}, ATTENTION,
        lambda shape, blocks, *x, **how: compressed_attention(*x, **shape.compression, **how), INTERVAL,
    ),
    "window_attention": Branch(
        {"q": "query", "k": "key", "v": "key"}, ATTENTION,
        lambda shape, blocks, *x, **how: window_attention(*x, w=shape.w, **how), INTERVAL,
    ),
    "selected_attention": Branch(
        {"q": "query", "k": "key", "v": "key"}, ATTENTION,
        lambda shape, blocks, *x, **how: selected_attention(*x, blocks, l_sel=shape.l_sel, **how), SELECTION,
    ),
    "selected_mixture": Branch(
        {"q": "query", "k": "key", "v": "key", "o_cmp": "query", "o_win": "query", "gates": "query"}, {"o": "query"},
        lambda shape, blocks, q, k, v, *x, **how: (
            selected_mixture(q, k, v, blocks, *x, l_sel=shape.l_sel, **how),
        ), SELECTION,
    ),
    "gated_sum": Branch(
        {"o_cmp": "query", "o_slc": "query", "o_win": "query", "gates": "query"}, {"o": "query"},
        lambda shape, blocks, *x, impl, **where: (gated_sum(*x, impl=impl),), ("gating",),
    ),
    "compress_mean": Branch(
        {"k": "key"}, {"k_cmp": "slot"},
        lambda shape, blocks, k, impl, q_start=None, **where: (
            compress_mean(k, **shape.compression, impl=impl, **where),
        ), ("compression",),
    ),
}  # fmt: skip


class Poison(NamedTuple):
    """A value in one input or gradient: in a whole sequence, or in one channel of the token in its middle."""

    name: str
    value: float
    sequence: int
    whole: bool


def draw_arguments(branch: Branch, setup: Setup, layout: Layout) -> dict[str, Tensor]:
    """Random inputs, and gradients of the outputs as "grad_..."."""
    shape = setup.shape
    lengths = {"query": layout.t, "key": layout.s, "slot": layout.slots(shape)}
    n, g = shape.g * shape.h, shape.g
    tails = {
        "q": (n, shape.d_k), "k": (g, shape.d_k), "k_cmp": (g, shape.d_k), "v": (g, shape.d_v),
        "v_cmp": (g, shape.d_v), "o": (n, shape.d_v), "gates": (n, 3), "lse": (n,),
    }  # fmt: skip
    arguments = {}
    for i, (name, axis) in enumerate((branch.inputs | branch.outputs).items()):
        tail = tails.get(name) or tails[name[0]]
        dtype = torch.promote_types(setup.dtype, torch.float32) if name == "lse" else setup.dtype
        x = draw(layout.b, lengths[axis], *tail, seed=i, dtype=dtype).to(DEVICE)
        arguments[f"grad_{name}" if name in branch.outputs else name] = x
    return arguments


def axis_of(branch: Branch, name: str) -> str:
    """The axis of an argument or a result: of outputs and inputs, and their gradients."""
    return (branch.outputs | branch.inputs)[name.removeprefix("grad_")]


def draw_blocks(setup: Setup, layout: Layout) -> Tensor:
    """Blocks that neighbouring queries do not share: first, own, and others anywhere in the past."""
    _, position = layout.places("query", setup.shape)
    last, n_sel = position.clamp_min(0) // setup.shape.l_sel, setup.shape.n_sel
    some = torch.rand(*position.shape, setup.shape.g, n_sel, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    blocks = (some * (last[..., None, None] + 1)).int()
    blocks[..., 0], blocks[..., 1] = 0, last[..., None]
    blocks = blocks.sort(-1).values
    repeated = torch.nn.functional.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0), value=False)
    return blocks.masked_fill(repeated, -1)


def run(branch: Branch, setup: Setup, layout: Layout, blocks: Tensor, arguments: dict[str, Tensor]):
    """Outputs, and gradients as "grad_...", by name."""
    leaves = [arguments[name].detach().requires_grad_() for name in branch.inputs]
    outputs = branch.call(setup.shape, blocks, *leaves, **layout.where, impl=setup.impl)
    grads = torch.autograd.grad(outputs, leaves, [arguments[f"grad_{name}"] for name in branch.outputs])
    names = (*branch.outputs, *(f"grad_{name}" for name in branch.inputs))
    return dict(zip(names, (*(x.detach() for x in outputs), *grads), strict=True))


def poisoned(branch: Branch, setup: Setup, layout: Layout, arguments: dict[str, Tensor], poison: Poison):
    """The arguments with the poison, and the first position that has it; None if the sequence has no such token."""
    sequence, position = layout.places(axis_of(branch, poison.name), setup.shape)
    mine = (sequence == poison.sequence).nonzero()
    if not len(mine):
        return None
    x = arguments[poison.name].clone()
    if poison.whole:
        x[sequence == poison.sequence] = poison.value
        earliest = position[sequence == poison.sequence].min()
    else:
        row, token = mine[len(mine) // 2]
        x[row, token].view(-1)[-1] = poison.value
        earliest = position[row, token]
    return arguments | {poison.name: x}, earliest


def assert_same(got: Tensor, expected: Tensor, what: str, exact: bool) -> None:
    assert got.isfinite().sum() == expected.isfinite().sum(), f"{what}: NaN or infinity"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, expected, **tolerance, msg=lambda m: f"{what}: {m}")


def poisons_of(branch: Branch, layout: Layout, interpreted: bool) -> Iterator[Poison]:
    """Poison in every argument: all of one sequence, or one number in the middle of it; fewer if `interpreted`."""
    names = (*branch.inputs, *(f"grad_{name}" for name in branch.outputs))
    last = len(layout.cu_seqlens) - 2 if layout.cu_seqlens else layout.b - 1
    for i, name in enumerate(names):
        yield Poison(name, NAN, max(0, last - 1), whole=True)
        if not interpreted or i % 2:
            yield Poison(name, INF, last, whole=False)
        if not interpreted:
            yield Poison(name, -INF, 0, whole=True)
            yield Poison(name, NAN, last, whole=False)


def check_isolation(branch: Branch, setup: Setup, layout: Layout) -> None:
    """Poison in any argument changes nothing that must not see it, and leaves NaN where the reference has NaN."""
    arguments, blocks = draw_arguments(branch, setup, layout), draw_blocks(setup, layout)
    clean = run(branch, setup, layout, blocks, arguments)
    assert all(x.isfinite().all() for name, x in clean.items() if name != "lse")
    reference = setup._replace(impl="reference", dtype=torch.float64)
    felt, exact = set(), DEVICE == "cuda" and setup.impl != "reference"
    for poison in poisons_of(branch, layout, is_interpreted(setup.impl)):
        changed = poisoned(branch, setup, layout, arguments, poison)
        if changed is None:
            continue
        changed, earliest = changed
        got = run(branch, setup, layout, blocks, changed)
        expected = run(branch, reference, layout, blocks, {name: x.double() for name, x in changed.items()})
        for name, x in got.items():
            sequence, position = layout.places(axis_of(branch, name), setup.shape)
            kept = sequence != poison.sequence
            if axis_of(branch, name) == "query":
                kept = kept | (position < earliest)
            assert_same(x[kept], clean[name][kept], f"{name} with {poison}", exact)
            if poison.value != poison.value:  # and no row that must hold NaN looks sound
                both = (x.isnan(), expected[name].isnan())
                got_nan, expected_nan = both if name == "lse" else (y.any(-1) for y in both)
                assert (got_nan | ~expected_nan).all(), f"{name} with {poison}: finite"
        if any(x.isnan().any() for x in got.values()):
            felt.add(poison.name)
    assert felt == arguments.keys(), "an argument whose NaN has no effect"
