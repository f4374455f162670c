"""Which tokens a block covers, how scores pass from one kind of block to the other, and which blocks are chosen."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import Shape, draw, draw_inputs, int32
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_compile import (
    apply_rope,
    compress_mean,
    compressed_attention,
    num_cmp,
    range_statistics,
    select_blocks,
    selected_attention,
    selection_ranges,
)
from nsa_compile.ops.selection import choose_blocks, compression_probabilities, group_scores, selection_scores

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def block_sizes(draw_from):
    """(l, d, l_sel) with d | l, d | l_sel and l <= l_sel."""
    d = draw_from(st.integers(1, 5))
    l = d * draw_from(st.integers(1, 4))
    return l, d, l + d * draw_from(st.integers(0, 4))


# --- compression blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l, d", [(32, 16), (4, 2), (6, 2), (5, 5), (1, 1), (9, 3)], ids=lambda size: str(size))
def test_num_cmp_counts_the_blocks_that_fit(l, d):
    lengths = range(4 * l + 3 * d)
    assert [num_cmp(tokens, l, d) for tokens in lengths] == [oracle.count_blocks(tokens, l, d) for tokens in lengths]


def test_num_cmp_at_the_edges_of_a_block():
    assert [num_cmp(tokens, 32, 16) for tokens in (0, 31, 32, 47, 48, 63, 64)] == [0, 0, 1, 1, 2, 2, 3]


@SETTINGS
@given(block_sizes(), st.integers(1, 60))
def test_compressed_token_is_the_mean_of_its_own_tokens(sizes, tokens):
    l, d, _ = sizes
    one_hot = torch.eye(tokens, dtype=torch.float64).view(1, tokens, 1, tokens)
    covered = compress_mean(one_hot, l=l, d=d)[0, :, 0]
    expected = [[1 / l if i * d <= s < i * d + l else 0.0 for s in range(tokens)] for i in range(num_cmp(tokens, l, d))]
    assert covered.shape == (len(expected), tokens)
    torch.testing.assert_close(covered, torch.tensor(expected, dtype=torch.float64).view(covered.shape))


def test_compressed_blocks_start_anew_in_each_packed_sequence():
    tokens, cu_seqlens = 23, int32(0, 7, 7, 10, 20)
    one_hot = torch.eye(tokens, dtype=torch.float64).view(1, tokens, 1, tokens)
    covered = compress_mean(one_hot, l=4, d=2, cu_seqlens=cu_seqlens)[0, :, 0]
    starts = [0, 2, 10, 12, 14, 16]  # 7 tokens: two blocks, 0 and 3 tokens: none, 10 tokens: four
    expected = [[0.25 if start <= s < start + 4 else 0.0 for s in range(tokens)] for start in starts]
    assert covered.shape == (tokens // 2, tokens)
    torch.testing.assert_close(covered[: len(starts)], torch.tensor(expected, dtype=torch.float64))
    assert covered[len(starts) :].eq(0).all()


# --- Eq. 9: from compression blocks to selection blocks --------------------------------------------------------------


def test_weights_of_the_paper_are_1_2_2_2_1():
    overlap = selection_scores(torch.eye(32), l=32, d=16, l_sel=64, n_blocks=8)
    assert overlap.shape == (32, 8)
    for j in range(8):
        weights = {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
        assert overlap[:, j].tolist() == [weights.get(i, 0) for i in range(32)]


@SETTINGS
@given(block_sizes(), st.integers(0, 20), st.integers(1, 8))
def test_weights_count_shared_tokens(sizes, c, n_blocks):
    l, d, l_sel = sizes
    expected = [[oracle.shared_tokens(i, j, l, d, l_sel) / d for j in range(n_blocks)] for i in range(c)]
    one_hot = torch.eye(c, dtype=torch.float64)
    assert selection_scores(one_hot, l=l, d=d, l_sel=l_sel, n_blocks=n_blocks).tolist() == expected


@SETTINGS
@given(block_sizes(), st.integers(20, 60), st.integers(0, 9), st.integers(0, 1000))
def test_probabilities_become_scores_of_groups(sizes, t, start, seed):
    l, d, l_sel = sizes
    shape = Shape(l=l, d=d, l_sel=l_sel, g=2, h=2)
    q_start = int32(start, 0)
    n_blocks = (t + start) // l_sel + 1
    inputs = draw_inputs(shape, t, b=2, s=t + start + 3, seed=seed)
    _, lse = compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, l=l, d=d, q_start=q_start)

    p_cmp = compression_probabilities(inputs.q, inputs.k_cmp, lse, l=l, d=d, q_start=q_start)
    expected = oracle.compression_probabilities(inputs.q, inputs.k_cmp, l=l, d=d, q_start=q_start)
    torch.testing.assert_close(p_cmp, expected)
    sees_any = torch.tensor([[oracle.count_blocks(at + i + 1, l, d) > 0 for i in range(t)] for at in (start, 0)])
    torch.testing.assert_close(p_cmp.sum(-1), sees_any.double()[..., None, None].expand(2, t, 2, 2))

    p_slc = selection_scores(p_cmp, l=l, d=d, l_sel=l_sel, n_blocks=n_blocks)
    rows = expected.flatten(2, 3).tolist()
    per_head = torch.tensor([oracle.scores_sequence(row, l, d, l_sel, n_blocks) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(p_slc.flatten(2, 3), per_head)

    grouped = torch.tensor([oracle.group_sequence(row, 2) for row in per_head.tolist()], dtype=torch.float64)
    torch.testing.assert_close(group_scores(p_slc), grouped)


def test_every_token_of_a_block_inside_the_sequence_is_counted_once_per_stride():
    """The scores of one query sum to l/d as long as every visible token lies in a selection block."""
    inputs = draw_inputs(Shape(l=6, d=2, l_sel=10), 50)
    _, lse = compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, l=6, d=2)
    p_cmp = compression_probabilities(inputs.q, inputs.k_cmp, lse, l=6, d=2)
    total = selection_scores(p_cmp, l=6, d=2, l_sel=10, n_blocks=5).sum(-1)
    torch.testing.assert_close(total[:, 5:], torch.full_like(total[:, 5:], 3.0))


# --- which blocks are chosen -----------------------------------------------------------------------------------------


def score_inputs(scores, width):
    """(q, k_cmp, lse) for which block j, `width` tokens long, scores `scores[j]` exactly, in one group of heads.

    With l = d = l_sel the score is the sum of the heads' p_cmp. Head n gives 1 = exp(0 - lse) to the blocks whose score
    exceeds n and 0 = exp(-10000) to the others.
    """
    t, h = len(scores) * width, max([*scores, 1])
    q = torch.eye(h, dtype=torch.float32).expand(1, t, h, h).contiguous()
    k_cmp = torch.tensor([[0.0 if score > n else -1e4 for n in range(h)] for score in scores]).view(1, -1, 1, h)
    return q, k_cmp, torch.zeros(1, t, h)


def choose(scores, position, *, n_sel, init_blocks=0, local_blocks=1, width=3):
    """The blocks `select_blocks` takes for the query at `position` when the blocks have the given integer scores."""
    q, k_cmp, lse = score_inputs(scores, width)
    forced = {"init_blocks": init_blocks, "local_blocks": local_blocks}
    chosen = select_blocks(q, k_cmp, lse, l=width, d=width, l_sel=width, n_sel=n_sel, scale=1.0, **forced)
    return chosen[0, position, 0].tolist()


def test_highest_scores_are_taken_in_ascending_order():
    assert choose([1, 4, 2, 5, 3, 0, 0], 20, n_sel=4) == [1, 3, 4, 6]


def test_equal_scores_go_to_the_lower_index():
    assert choose([2, 2, 2, 2, 2, 2, 2], 20, n_sel=3) == [0, 1, 6]
    assert choose([1, 2, 1, 2, 1, 2, 1], 20, n_sel=3) == [1, 3, 6]
    assert choose([1, 3, 1, 3, 1, 3, 0], 20, n_sel=5) == [0, 1, 3, 5, 6]
    assert choose([0, 0, 0, 0, 0, 1, 0], 20, n_sel=4) == [0, 1, 5, 6]


@pytest.mark.parametrize("n_sel", [1, 2, 5, 9, 16])
def test_equal_scores_of_many_blocks_go_to_the_lower_index(n_sel):
    assert choose([3] * 40, 119, n_sel=n_sel) == [*range(n_sel - 1), 39]


@SETTINGS
@given(st.randoms(use_true_random=True))
def test_choice_by_integer_scores_is_exact(random):
    """Full of ties; true random numbers, as hypothesis prefers short lists, from which nothing is left out."""
    scores, width = [random.randint(0, 3) for _ in range(random.randint(1, 20))], random.randint(1, 4)
    init_blocks, local_blocks = random.randint(0, 3), random.randint(1, 3)
    n_sel = init_blocks + local_blocks + random.randint(0, 4)
    rule = {"n_sel": n_sel, "init_blocks": init_blocks, "local_blocks": local_blocks}
    q, k_cmp, lse = score_inputs(scores, width)
    chosen = select_blocks(q, k_cmp, lse, l=width, d=width, l_sel=width, scale=1.0, **rule)
    for position in range(len(scores) * width):
        expected = oracle.choose_blocks(scores, position, l_sel=width, **rule)
        assert chosen[0, position, 0].tolist() == expected + [-1] * (n_sel - len(expected))


@pytest.mark.parametrize("l, d, l_sel", [(4, 2, 6), (32, 16, 64), (3, 1, 3), (6, 3, 9)], ids=lambda size: str(size))
def test_equal_scores_of_overlapping_blocks_go_to_the_lower_index(l, d, l_sel):
    """q = 0 and lse = 0 make every visible p_cmp exactly 1, so that inner blocks tie and the first has a score less."""
    t, h, rule = 9 * l_sel + 2, 3, {"n_sel": 4, "init_blocks": 0, "local_blocks": 1}
    q, k_cmp = torch.zeros(1, t, h, 5), torch.ones(1, num_cmp(t, l, d), 1, 5)
    chosen = select_blocks(q, k_cmp, torch.zeros(1, t, h), l=l, d=d, l_sel=l_sel, **rule)
    for position in (2 * l_sel, 5 * l_sel + 1, 9 * l_sel - 1, t - 1):
        seen = range(oracle.count_blocks(position + 1, l, d))
        scores = [h * sum(oracle.shared_tokens(i, j, l, d, l_sel) for i in seen) for j in range(10)]
        expected = oracle.choose_blocks(scores, position, l_sel=l_sel, **rule)
        assert chosen[0, position, 0].tolist() == expected + [-1] * (4 - len(expected))


def test_forced_blocks_beat_higher_scores():
    scores = [0, 0, 5, 5, 5, 0, 0, 0]
    assert choose(scores, 23, n_sel=4, init_blocks=2, local_blocks=2) == [0, 1, 6, 7]
    assert choose(scores, 23, n_sel=5, init_blocks=2, local_blocks=2) == [0, 1, 2, 6, 7]


@pytest.mark.parametrize(("broken", "best"), [(float("nan"), 4), (float("inf"), 3)], ids=["nan", "inf"])
def test_forced_blocks_beat_scores_that_are_no_numbers(broken, best):
    p_grp, position = torch.tensor([0, 1, 2, broken, 3, broken, 0, 0]).view(1, 1, 1, 8), torch.tensor([[23]])
    for n_sel, expected in ((3, [0, 6, 7]), (4, [0, best, 6, 7])):
        assert choose_blocks(p_grp, position, l_sel=3, n_sel=n_sel).flatten().tolist() == expected


def test_no_initial_blocks_may_be_forced():
    assert choose([0, 0, 4, 3, 0, 0], 17, n_sel=3, init_blocks=0, local_blocks=1) == [2, 3, 5]


def test_forced_blocks_that_coincide_use_one_slot():
    """Up to block 2 some blocks are both initial and local: they stand once, and no slot repeats them."""
    assert choose([0, 0, 0, 0, 0, 0], 2, n_sel=4, init_blocks=2, local_blocks=2) == [0, -1, -1, -1]
    assert choose([0, 0, 0, 0, 0, 0], 5, n_sel=4, init_blocks=2, local_blocks=2) == [0, 1, -1, -1]
    assert choose([0, 0, 1, 0, 0, 0], 8, n_sel=4, init_blocks=2, local_blocks=2) == [0, 1, 2, -1]
    assert choose([0, 0, 1, 0, 0, 0], 11, n_sel=4, init_blocks=2, local_blocks=2) == [0, 1, 2, 3]


def test_incomplete_last_block_is_forced():
    """No compression block touches the own block yet, so that only forcing can bring it in."""
    shape = Shape(l=4, d=2, l_sel=8, n_sel=3, init_blocks=0, local_blocks=1)
    inputs = draw_inputs(shape, 42)
    _, lse = compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, **shape.compression)
    chosen = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice)
    for position in range(42):
        assert chosen[0, position].eq(position // 8).any(-1).all(), f"query {position} misses its own block"


def test_early_positions_take_every_block_that_has_started():
    shape = Shape(l=4, d=4, l_sel=4, n_sel=4, init_blocks=2, local_blocks=2)
    inputs = draw_inputs(shape, 20)
    _, lse = compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, **shape.compression)
    chosen = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice)
    for position in range(16):
        expected = [j for j in range(4) if 4 * j <= position]
        for group in range(shape.g):
            assert chosen[0, position, group].tolist() == expected + [-1] * (4 - len(expected))


def test_fewer_candidates_than_slots_take_all_and_leave_minus_one():
    assert choose([1, 0, 2], 8, n_sel=16) == [0, 1, 2] + [-1] * 13
    assert choose([1, 0, 2], 5, n_sel=16) == [0, 1] + [-1] * 14
    assert choose([1, 0, 2], 0, n_sel=16) == [0] + [-1] * 15


def test_without_any_visible_compressed_token_all_scores_tie():
    """T < l: the candidates are the one block that has started, whatever q is."""
    shape = Shape(l=8, d=2, l_sel=10)
    q = draw(1, 7, 6, 5, seed=0)
    k_cmp = torch.zeros(1, 0, 2, 5, dtype=torch.float64)
    chosen = select_blocks(q, k_cmp, torch.full((1, 7, 6), -torch.inf, dtype=q.dtype), **shape.choice)
    assert chosen.eq(int32(0, -1, -1, -1)).all()


# --- rotary positions ------------------------------------------------------------------------------------------------


def test_rope_turns_by_the_position_and_pairs_halves():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    angle = torch.tensor(3.0, dtype=torch.float64)
    expected = torch.stack([angle.cos(), torch.zeros_like(angle), angle.sin(), torch.zeros_like(angle)])
    torch.testing.assert_close(apply_rope(x, torch.tensor([3]))[0, 0, 0], expected)


def test_rope_scores_depend_on_differences_of_positions_only():
    q, k = draw(1, 9, 3, 8, seed=1), draw(1, 9, 3, 8, seed=2)
    scores = [
        torch.einsum("bthd,bshd->bhts", apply_rope(q, positions), apply_rope(k, positions))
        for positions in (torch.arange(9), torch.arange(9) + 1000)
    ]
    torch.testing.assert_close(scores[0], scores[1])


def test_rope_is_applied_to_each_head_alone():
    x = draw(2, 6, 4, 6, seed=3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 0, 1, 40, 41]])
    heads = [apply_rope(x[:, :, n : n + 1], positions) for n in range(4)]
    torch.testing.assert_close(apply_rope(x, positions), torch.cat(heads, 2), rtol=0, atol=0)


# --- ranges and their statistics -------------------------------------------------------------------------------------


def test_neighbouring_blocks_become_one_range_cut_at_the_query():
    blocks = int32(0, 1, 3, 5, -1).view(1, 1, 1, 5)
    ranges = selection_ranges(blocks, l_sel=4, q_start=int32(21))
    assert ranges.dtype == torch.int32
    assert ranges[0, 0, 0].tolist() == [[0, 8], [12, 16], [20, 22], [-1, -1], [-1, -1]]


def test_statistics_of_ranges():
    ranges = int32(0, 8, 12, 16, 20, 22, -1, -1).view(1, 1, 1, 4, 2)
    statistics = range_statistics(ranges, q_start=int32(21))
    assert statistics.n_ranges.item() == 3
    assert statistics.mean_length.item() == pytest.approx(14 / 3)
    assert statistics.max_length.item() == 8
    assert statistics.mean_distance.item() == pytest.approx((21 + 9 + 1) / 3)
    assert statistics.max_distance.item() == 21


def test_query_without_ranges_has_zero_statistics():
    statistics = range_statistics(torch.full((2, 3, 1, 4, 2), -1, dtype=torch.int32))
    for value in statistics:
        assert value.shape == (2, 3, 1)
        assert value.eq(0).all()


@SETTINGS
@given(
    block_sizes(),
    st.integers(1, 60),
    st.integers(3, 6),
    st.sampled_from(["plain", "q_start", "packed"]),
    st.integers(0, 99),
)
def test_ranges_and_statistics_match_the_oracle(sizes, t, n_sel, layout, seed):
    l, d, l_sel = sizes
    shape = Shape(l=l, d=d, l_sel=l_sel, n_sel=n_sel, h=1)
    where = {"q_start": {"q_start": int32(11)}, "packed": {"cu_seqlens": int32(0, t // 3, t // 3, t - t // 4)}}
    where = where.get(layout, {})
    inputs = draw_inputs(shape, t, s=t + 11, c=(t + 11) // d, seed=seed)
    blocks = oracle.select_blocks(inputs.q, inputs.k_cmp, **shape.choice, **where).block_indices
    ranges = selection_ranges(blocks, l_sel=l_sel, **where)
    assert torch.equal(ranges, oracle.selection_ranges(blocks, l_sel=l_sel, **where))
    for value, expected in zip(
        range_statistics(ranges, **where), oracle.range_statistics(ranges, **where), strict=True
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


def test_ranges_hold_exactly_the_tokens_that_are_attended():
    """The gradient of the values marks the tokens a query reads."""
    shape = Shape(l=2, d=2, l_sel=6, n_sel=4, g=1, h=1)
    inputs = draw_inputs(shape, 50)
    _, lse = compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, **shape.compression)
    blocks = select_blocks(inputs.q, inputs.k_cmp, lse, **shape.choice)
    ranges = selection_ranges(blocks, l_sel=6)
    v = inputs.v_slc.clone().requires_grad_()
    o, _ = selected_attention(inputs.q, inputs.k_slc, v, blocks, l_sel=6)
    for position in (0, 5, 6, 29, 49):
        (grad,) = torch.autograd.grad(o[0, position].sum(), v, retain_graph=True)
        read = grad[0, :, 0, 0].nonzero().flatten().tolist()
        pairs = [pair for pair in ranges[0, position, 0].tolist() if pair != [-1, -1]]
        assert read == [s for start, end in pairs for s in range(start, end)]
