"""Heads of a group share one choice of blocks; groups and batch rows have nothing to do with one another."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import Inputs, Shape, draw, draw_inputs, int32

from nsa_compile import (
    compressed_attention,
    nsa_attention,
    num_cmp,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_compile.ops.selection import compression_probabilities, group_scores, selection_scores

SHAPE = Shape(g=3, h=4)
T = 61
LATE = slice(SHAPE.n_sel * SHAPE.l_sel, T)  # queries that have more blocks than slots
LAYOUTS = {
    "plain": {},
    "q_start": {"q_start": int32(0)},
    "packed": {"cu_seqlens": int32(0, 11, T)},
}


def choose(q, k_cmp, shape=SHAPE, **where):
    _, lse = compressed_attention(q, k_cmp, k_cmp, **shape.compression, **where)
    return select_blocks(q, k_cmp, lse, **shape.choice, **where)


def layout_inputs(layout, b=1):
    c = T // SHAPE.d if layout == "packed" else None
    return draw_inputs(SHAPE, T, b=b, c=c), LAYOUTS[layout]


def permute_heads(inputs: Inputs, order: list[int]) -> Inputs:
    return inputs._replace(q=inputs.q[:, :, order], gates=inputs.gates[:, :, order])


def test_one_set_of_blocks_for_each_group():
    chosen = choose(*draw_inputs(SHAPE, T, b=2)[:2])
    assert chosen.shape == (2, T, SHAPE.g, SHAPE.n_sel)
    assert (chosen[:, LATE, 0] != chosen[:, LATE, 1]).any(), "groups choose for themselves"


def test_heads_of_a_group_attend_to_the_same_tokens():
    """The gradient of each head's output marks the keys that it reads."""
    inputs = draw_inputs(SHAPE, T)
    chosen = choose(*inputs[:2])
    v = inputs.v_slc.clone().requires_grad_()
    o, _ = selected_attention(inputs.q, inputs.k_slc, v, chosen, l_sel=SHAPE.l_sel)
    for position in (10, 30, 60):
        for n in range(SHAPE.g * SHAPE.h):
            (grad,) = torch.autograd.grad(o[0, position, n].sum(), v, retain_graph=True)
            for group in range(SHAPE.g):
                blocks = chosen[0, position, group].tolist() if group == n // SHAPE.h else []
                expected = [s for s in range(position + 1) if s // SHAPE.l_sel in blocks]
                assert grad[0, :, group].ne(0).any(-1).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("n", range(SHAPE.g * SHAPE.h), ids=lambda n: f"head{n}")
def test_query_head_belongs_to_group_n_over_h(n):
    """Another key in one group changes the heads of that group and no other."""
    inputs, other = draw_inputs(SHAPE, T), draw_inputs(SHAPE, T, seed=1)
    group = n // SHAPE.h
    keep = torch.arange(SHAPE.g).view(1, 1, -1, 1) != group
    changed = inputs._replace(
        **{
            name: torch.where(keep, getattr(inputs, name), getattr(other, name))
            for name in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
        }
    )
    for run in (
        lambda x: compressed_attention(*x[:3], **SHAPE.compression),
        lambda x: window_attention(x.q, x.k_win, x.v_win, w=SHAPE.w),
        lambda x: (nsa_attention(*x, **SHAPE.everything),),
    ):
        for before, after in zip(run(inputs), run(changed), strict=True):
            differs = [(before[:, -1, m] != after[:, -1, m]).any().item() for m in range(SHAPE.g * SHAPE.h)]
            assert differs == [m // SHAPE.h == group for m in range(SHAPE.g * SHAPE.h)]
            assert differs[n]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", range(SHAPE.g * SHAPE.h), ids=lambda n: f"head{n}")
def test_choice_depends_on_every_head_of_its_group_alone(n, layout):
    """A head that stares at one compressed token brings that token's block in, for its own group only."""
    inputs, where = layout_inputs(layout)
    before = choose(inputs.q, inputs.k_cmp, **where)
    q = inputs.q.clone()
    q[:, :, n] = 10 * draw(1, T, SHAPE.d_k, seed=50)
    after = choose(q, inputs.k_cmp, **where)
    differs = (before != after)[:, LATE].any(-1).flatten(0, 1).any(0)
    assert differs.tolist() == [group == n // SHAPE.h for group in range(SHAPE.g)]


def test_choice_goes_by_the_sum_over_heads():
    """One head gives block 2 a score of 1, three give block 4 together 1.5: the sum decides, not the largest head."""
    shape = Shape(l=4, d=4, l_sel=4, n_sel=2, init_blocks=0, local_blocks=1, g=1, h=4)
    t, probabilities = 40, torch.zeros(4, 10, dtype=torch.float64)
    probabilities[0, 2] = 1.0
    probabilities[1:, 4] = 0.5
    q = torch.eye(4, dtype=torch.float64).expand(1, t, 4, 4).contiguous()
    k_cmp = probabilities.clamp_min(1e-30).log().T.reshape(1, 10, 1, 4)
    lse = torch.zeros(1, t, 4, dtype=torch.float64)
    chosen = select_blocks(q, k_cmp, lse, **shape.choice, scale=1.0)
    assert chosen[0, 39, 0].tolist() == [4, 9]
    p_cmp = compression_probabilities(q, k_cmp, lse, l=4, d=4, scale=1.0)
    scores = group_scores(selection_scores(p_cmp, l=4, d=4, l_sel=4, n_blocks=10))
    expected = [0, 0, 1, 0, 1.5, 0, 0, 0, 0, 0]
    torch.testing.assert_close(scores[0, 39, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_permuting_heads_inside_groups_keeps_the_choice_and_permutes_outputs(layout):
    inputs, where = layout_inputs(layout)
    order = [1, 3, 0, 2, 7, 6, 5, 4, 9, 8, 11, 10]
    permuted = permute_heads(inputs, order)
    blocks, again = (choose(x.q, x.k_cmp, **where) for x in (inputs, permuted))
    assert torch.equal(again, blocks)
    out, again = (nsa_attention(*x, **SHAPE.everything, **where) for x in (inputs, permuted))
    torch.testing.assert_close(again, out[:, :, order])


def test_permuting_heads_between_groups_changes_the_choice():
    inputs = draw_inputs(SHAPE, T)
    moved = permute_heads(inputs, [4, 1, 2, 3, 0, 5, 6, 7, 8, 9, 10, 11])
    differs = (choose(*inputs[:2]) != choose(*moved[:2])).any(-1).flatten(0, 1).any(0)
    assert differs.tolist() == [True, True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_independent(layout):
    """Each group with its heads alone gives what it gives beside the others."""
    inputs, where = layout_inputs(layout)
    together = nsa_attention(*inputs, **SHAPE.everything, **where)
    blocks = choose(inputs.q, inputs.k_cmp, **where)
    for group in range(SHAPE.g):
        heads = slice(group * SHAPE.h, (group + 1) * SHAPE.h)
        keys = [x[:, :, group : group + 1] for x in inputs[1:7]]
        alone = Inputs(inputs.q[:, :, heads], *keys, inputs.gates[:, :, heads])
        assert torch.equal(choose(alone.q, alone.k_cmp, **where)[:, :, 0], blocks[:, :, group])
        torch.testing.assert_close(nsa_attention(*alone, **SHAPE.everything, **where), together[:, :, heads])


@pytest.mark.parametrize("layout", ["plain", "q_start"])
def test_batch_rows_are_independent(layout):
    inputs = draw_inputs(SHAPE, T, b=3)
    starts = {"q_start": int32(0, 0, 0)} if layout == "q_start" else {}
    together = nsa_attention(*inputs, **SHAPE.everything, **starts)
    blocks = choose(inputs.q, inputs.k_cmp, **starts)
    for row in range(3):
        alone = Inputs(*(x[row : row + 1] for x in inputs))
        assert torch.equal(choose(*alone[:2]), blocks[row : row + 1])
        torch.testing.assert_close(nsa_attention(*alone, **SHAPE.everything), together[row : row + 1])


def test_gradients_of_batch_rows_and_groups_do_not_mix():
    inputs = Inputs(*(x.requires_grad_() for x in draw_inputs(SHAPE, T, b=2)))
    o = nsa_attention(*inputs, **SHAPE.everything)
    loss = o[1, :, SHAPE.h : 2 * SHAPE.h].square().sum()  # row 1, group 1
    for name, grad in zip(Inputs._fields, torch.autograd.grad(loss, inputs), strict=True):
        own = slice(SHAPE.h, 2 * SHAPE.h) if name in ("q", "gates") else slice(1, 2)
        assert grad[1, :, own].ne(0).any(), name
        grad[1, :, own] = 0
        assert grad.eq(0).all(), name


@pytest.mark.parametrize("g, h", [(1, 1), (1, 8), (4, 1), (2, 5)], ids=lambda n: str(n))
def test_group_sizes_match_the_oracle(g, h):
    shape = Shape(g=g, h=h)
    inputs = draw_inputs(shape, T)
    chosen = choose(inputs.q, inputs.k_cmp, shape)
    oracle.assert_blocks_agree(chosen, oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice), 1e-12)
    how = {**shape.compression, "l_sel": shape.l_sel, "w": shape.w}
    expected = oracle.nsa_attention(*inputs, chosen, **how)
    torch.testing.assert_close(nsa_attention(*inputs, **shape.everything), expected)


def test_heads_that_groups_do_not_divide_are_refused():
    inputs = draw_inputs(SHAPE, T)
    with pytest.raises(ValueError, match="11"):
        window_attention(inputs.q[:, :, :11], inputs.k_win, inputs.v_win, w=SHAPE.w)
    assert inputs.k_cmp.shape[1] == num_cmp(T, SHAPE.l, SHAPE.d)
    with pytest.raises(ValueError, match="11"):
        compressed_attention(inputs.q[:, :, :11], inputs.k_cmp, inputs.v_cmp, **SHAPE.compression)
