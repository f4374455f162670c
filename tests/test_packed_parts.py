"""Queries from anywhere in a packed row: with `q_start`, parts of the queries give what all of them give."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import Inputs, Shape, draw, draw_inputs, int32

from nsa_compile import compress_mean, compressed_attention, nsa_attention, select_blocks
from nsa_compile.ops.layout import query_layout

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
SHAPE = Shape()
T = 61
PARTS = [(0, 17), (17, 23), (23, 61)]
BOUNDS = {"sequences": (0, 5, 5, 40, 58), "one": (0, 61), "starts-with-a-part": (0, 17, 60)}


def attend(x: Inputs, impl: str, **where) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixture and the chosen blocks."""
    _, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, **SHAPE.compression, **where, impl=impl)
    blocks = select_blocks(x.q, x.k_cmp, lse, **SHAPE.choice, **where, impl=impl)
    return nsa_attention(*x, **SHAPE.everything, **where, impl=impl), blocks


@pytest.mark.parametrize("cut", [False, True], ids=["all-keys", "keys-up-to-the-last-query"])
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_parts_of_the_queries_give_what_all_give(bounds, impl, cut):
    exact = impl == "reference"
    dtype, device = (
        torch.float64 if exact else torch.float32,
        "cuda" if torch.cuda.is_available() and not exact else "cpu",
    )
    cu_seqlens = int32(*bounds).to(device)
    drawn = Inputs(*(x.to(device, dtype) for x in draw_inputs(SHAPE, T)))
    compressed = (compress_mean(x, **SHAPE.compression, cu_seqlens=cu_seqlens) for x in (drawn.k_slc, drawn.v_slc))
    drawn = Inputs(drawn.q, *compressed, *drawn[3:])
    weights = draw(1, T, SHAPE.g * SHAPE.h, SHAPE.d_v, seed=7).to(device, dtype)

    def run(parts) -> list[torch.Tensor]:
        x = Inputs(*(y.detach().requires_grad_() for y in drawn))
        outputs, choices = [], []
        for first, end in parts:
            where = {"cu_seqlens": cu_seqlens}
            keys = list(x[1:7])
            if parts != [(0, T)]:
                where["q_start"] = int32(first).to(device)
            if cut:
                where["cu_seqlens"] = cu_seqlens.clamp_max(end)
                keys = [y[:, : end // SHAPE.d] for y in keys[:2]] + [y[:, :end] for y in keys[2:]]
            part = Inputs(x.q[:, first:end], *keys, x.gates[:, first:end])
            o, blocks = attend(part, impl, **where)
            outputs.append(o)
            choices.append(blocks)
        o = torch.cat(outputs, 1)
        return [torch.cat(choices, 1), o, *torch.autograd.grad((o * weights).sum(), list(x))]

    expected, got = run([(0, T)]), run(PARTS)
    assert torch.equal(got[0], expected[0])
    tolerance = 1e-9 if exact else 1e-5
    for a, e in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_a_few_queries_gather_their_keys():
    """The reference's other way through the keys, for few queries over many."""
    shape = Shape(n_sel=3, w=7)
    cu_seqlens, first = int32(0, 30, 96, 200), 97
    x = draw_inputs(shape, 200, c=100)
    everything = nsa_attention(*x, **shape.everything, cu_seqlens=cu_seqlens)
    part = Inputs(x.q[:, first : first + 4], *x[1:7], x.gates[:, first : first + 4])
    got = nsa_attention(*part, **shape.everything, q_start=int32(first), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, everything[:, first : first + 4], rtol=1e-12, atol=1e-12)


def test_positions_restart_with_each_sequence():
    layout = query_layout(torch.empty(1, 6), int32(3), int32(0, 5, 5, 8))
    assert layout.position.tolist() == [[3, 4, 0, 1, 2, 3]]
    assert layout.first.tolist() == [[0, 0, 5, 5, 5, 5]]
    assert layout.valid.tolist() == [[True] * 5 + [False]]
